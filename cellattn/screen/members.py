"""The models of a screen: from files or from Python, each with its graph, held to the same genes."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checkpoint
from .._check import describe, require
from .._wrapped import require_values, unwrapped
from ..genes import GeneList, require_same_genes
from ..graph import MultiGraph
from ..nn import PairwiseInteraction
from ..nn.tokens import GeneTokens
from .scorers import Scorer, make_scorer

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class Member:
    """One model of an ensemble and what it is called with.

    Attributes:
        name: of its file, or of its class.
        model: the module.
        graph: that it is called with; None for a module that takes none.
        features: that it is called with.
        genes: names that its file holds.
        digest: of the model, its features and genes.
    """

    name: str
    model: nn.Module
    graph: MultiGraph | None
    features: Tensor | None
    genes: GeneList | None
    digest: str

    @property
    def num_genes(self) -> int:
        """Of the graph, or what the module says."""
        if self.graph is not None:
            return self.graph.num_nodes
        found = getattr(unwrapped(self.model)[0], "num_genes", None)
        if not isinstance(found, int):
            raise TypeError(f"graph: expected one, since {self.name} has no attribute num_genes")
        return found

    def scorer(
        self, *, phenotype: int, dtype: torch.dtype | None, device: torch.device | str | None, num_threads: int | None
    ) -> Scorer:
        """Ready to score, the cell encoded; see `make_scorer`."""
        return make_scorer(
            self.model, self.graph, phenotype=phenotype, dtype=dtype, device=device, num_threads=num_threads,
            features=self.features,
        )  # fmt: skip


Model = nn.Module | str | os.PathLike[str] | Member


def members_of(models: Model | Sequence[Model], graph: MultiGraph | Path_ | None = None) -> list[Member]:
    """The ensemble.

    Args:
        models: files that `checkpoint.save` wrote, and modules; one or several. Members are returned as they are.
        graph: what all of them are called with, or its file; None: each with the graph that its file names.

    Raises:
        FileNotFoundError: a file is not there. ValueError: one is damaged, or belongs to another graph.
    """
    one = isinstance(models, str | os.PathLike | nn.Module | Member)
    if not one and (isinstance(models, Mapping | type) or not isinstance(models, Iterable)):
        raise TypeError(f"models: expected modules and files, one or several, got {describe(models)}")
    several = [models] if one else list(models)  # type: ignore[arg-type]
    require(len(several) > 0, "models: expected at least one, got none")
    if isinstance(graph, str | os.PathLike):
        graph = MultiGraph.load(graph)
    if graph is not None and not isinstance(graph, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph, its file or None, got {describe(graph)}")
    if all(isinstance(model, Member) for model in several):
        return cast(list[Member], several)
    given = cast(Sequence[nn.Module | Path_], several)
    members = [_from_module(x, graph) if isinstance(x, nn.Module) else _from_file(x, graph) for x in given]
    members = [replace(member, name=name) for member, name in zip(members, _distinct(members, given), strict=True)]
    digests = [member.digest for member in members]
    for position, digest in enumerate(digests):
        first = digests.index(digest)
        require(first == position, f"models: {members[position].name} is the same model as {members[first].name}")
    return members


def _require_all_genes(member: Member) -> None:
    """A screen gives no `gene_ids`: in a graph without some of the genes others would have their embeddings."""
    tokens = getattr(unwrapped(member.model)[0], "tokens", None)
    table = tokens.num_genes if isinstance(tokens, GeneTokens) else None
    if member.graph is not None and table is not None and member.graph.num_nodes < table:
        raise ValueError(
            f"graph: expected all {table} genes that {member.name} has embeddings of, in their order, got one of "
            f"{member.graph.num_nodes} genes; those to screen are said by `genes`"
        )


def _distinct(members: Sequence[Member], models: Sequence[nn.Module | Path_]) -> list[str]:
    """Names that tell members apart: with the folders of their files, or numbered, where they are alike."""
    names = [member.name for member in members]
    if len(set(names)) < len(names):
        folders = [None if isinstance(x, nn.Module) else Path(x).absolute().parent.name for x in models]
        names = [name if folder is None else f"{folder}/{name}" for name, folder in zip(names, folders, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} {position + 1}" for position, name in enumerate(names)]
    return names


def _from_module(model: nn.Module, graph: MultiGraph | None) -> Member:
    inner, _ = unwrapped(model)
    require_values(inner)
    if graph is None and isinstance(inner, PairwiseInteraction):
        graph = _without_edges(inner, None)
    member = Member(type(inner).__name__, model, graph, None, None, checkpoint.digest(inner))
    _require_all_genes(member)
    return member


def _from_file(path: Path_, graph: MultiGraph | None) -> Member:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"models: expected modules and files, got {describe(path)}")
    path = Path(path)
    found = checkpoint.load(path)
    if graph is None and found.graph_file is not None and found.graph_file.is_file():
        graph = MultiGraph.load(found.graph_file)
    if graph is None and isinstance(found.model, PairwiseInteraction):
        graph = _without_edges(found.model, found.genes)
    elif graph is None:
        told = "it names none" if found.graph_file is None else f"{str(found.graph_file)!r}, which it names, is not there"
        raise ValueError(f"graph: expected one for {str(path)!r}: {told}")
    elif found.graph_digest is not None and graph.digest() != found.graph_digest:
        if found.genes is not None and graph.names is not None:
            require_same_genes(found.genes, graph.names, what=(path.name, "graph"))
        raise ValueError(
            f"graph: {str(path)!r} belongs to a graph with digest {found.graph_digest[:12]}, got one with {graph.digest()[:12]}"
        )
    member = Member(path.name, found.model, graph, found.features, found.genes, found.digest)
    if found.graph_digest is None:  # else it is the very graph that the model was trained on, and a table may have spare rows
        _require_all_genes(member)
    return member


def _without_edges(model: PairwiseInteraction, genes: GeneList | None) -> MultiGraph | None:
    """For a model that reads no graph but for the number of genes."""
    size = model.tokens.num_genes
    return None if size is None else MultiGraph.from_edge_index({}, size, names=genes)


def names_of(members: Sequence[Member], names: GeneList | Sequence[str] | None = None) -> tuple[GeneList, list[str]]:
    """The gene names that all members and graphs, and `names`, agree on, and what there is to say about those without.

    Where nobody has names, genes are called by their index.

    Raises:
        ValueError: two of them part; the message says where.
    """
    sizes = {member.name: member.num_genes for member in members}
    require(len(set(sizes.values())) == 1, f"models: expected equal numbers of genes, got {sizes}")
    (size,) = set(sizes.values())
    given = names if names is None or isinstance(names, GeneList) else GeneList(names)
    sources: dict[str, GeneList | None] = {} if given is None else {"names": given}
    for member in members:
        if member.genes is not None or member.graph is None:
            sources[member.name] = member.genes
        if member.graph is not None:
            sources[f"graph of {member.name}"] = member.graph.names
    named = {source: found for source, found in sources.items() if found is not None}
    if not named:
        return GeneList(str(gene) for gene in range(size)), ["no gene names anywhere: genes are called by their index"]
    first, agreed = next(iter(named.items()))
    if len(agreed) != size:
        raise ValueError(f"{first}: expected names of {size} genes, got {len(agreed)}")
    notes: list[str] = []
    for source, found in sources.items():
        notes += compare(agreed, found, (first, source))
    return agreed, notes


def compare(a: GeneList | None, b: GeneList | None, what: tuple[str, str]) -> list[str]:
    """`require_same_genes`, whose warning, that one of them has no names, is returned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        require_same_genes(a, b, what=what)
    return [str(one.message) for one in caught]


def function_of(name: str) -> Callable[..., nn.Module]:
    """A function by where it stands, "package.module:function"."""
    module, _, attribute = name.partition(":")
    require(bool(module and attribute), f"model: expected package.module:function, got {name!r}")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model: {name!r} is not found: {error}") from error
    if not callable(found):
        raise TypeError(f"model: expected {name!r} to be a function, got {describe(found)}")
    make: Callable[..., nn.Module] = found
    return make
