"""The cell that is trained on: genes that are tokens, their graphs and features, and measured pairs in parts."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cellattn import MultiGraph
from cellattn.data import (
    PerturbationDataset,
    leakage,
    load_dcell_subset,
    load_yeast,
    read_interactions,
    require_same_genes,
    synthetic_cell,
    synthetic_phenotypes,
)
from cellattn.data import split as split_dataset

from .checkpoint import keep_rng, seed_everything

SPECTRAL_RANK = 128
VALIDATION_SHARE = 0.2
SOURCE = "source"  # the split that the data come with, beside the kinds of `cellattn.data.split`
SYNTHETIC_SIZES = {"labelled": (200, 8_000), "full": (6607, 100_000)}  # genes and measured sets


@dataclass(frozen=True)
class Cell:
    """Genes that are tokens, their graphs, and pairs of them that were measured."""

    source: str
    graph: MultiGraph  # among the tokens
    features: Tensor  # float32 [N, F]
    train: PerturbationDataset  # of pairs, each once, genes numbered as tokens
    test: PerturbationDataset
    notes: dict[str, int]  # counts that the report tells
    validation: PerturbationDataset | None = None  # None: drawn from train

    def __post_init__(self) -> None:
        for part in (self.train, self.test, *([] if self.validation is None else [self.validation])):
            require_same_genes(self.graph.names, part.names, what=("graph", "measured pairs"))


def load_cell(folder: Path | None, tokens: str = "labelled") -> Cell:
    """The real cell of a folder of yeast tables, or the synthetic one.

    Args:
        folder: the tables; None for a synthetic cell.
        tokens: "labelled", the genes of measured pairs; "neighbours:N", these and the N genes with the most edges to them;
            "full", all genes. The synthetic cell has 200 genes, or, at "full", the published number.
    """
    if folder is None:
        if tokens not in SYNTHETIC_SIZES:
            raise ValueError(f"tokens: expected 'labelled' or 'full' for the synthetic cell, got {tokens!r}")
        num_genes, num_samples = SYNTHETIC_SIZES[tokens]
        graph = synthetic_cell(seed=0, num_genes=num_genes, symmetrize=True, self_loops=False)
        return synthetic(graph, synthetic_phenotypes(graph, num_samples, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown gene names are counted by the loaders, and are no news here
        genes, graph = load_yeast(folder)
        data = load_dcell_subset(folder, genes)
        listed = read_interactions(folder / "costanzo2016_dcell_subset.tsv.gz", genes, split="split")
    nodes = token_genes(graph, data.seeds.unique(), tokens)
    train, test = (distinct_pairs(data.subset(split), nodes) for split in ("*_training", "*_testing"))
    notes = {
        "listed pairs": len(data),
        "training pairs removed since they are tested": len(listed.score) - len(data),
        "listed twice, averaged": len(data) - len(train) - len(test),
    }
    features = spectral_features(graph)[nodes]
    return Cell("real yeast tables", graph.subgraph(nodes), standardize(features), train, test, notes)


def synthetic(graph: MultiGraph, data: PerturbationDataset) -> Cell:
    """A cell of planted phenotypes, in the split they come with."""
    nodes = torch.arange(graph.num_nodes)
    train, validation, test = (distinct_pairs(data.subset(split), nodes) for split in ("train", "validation", "test"))
    notes = {"listed pairs": len(data), "listed twice, averaged": len(data) - len(train) - len(validation) - len(test)}
    return Cell("synthetic", graph, standardize(spectral_features(graph)), train, test, notes, validation)


def recut(cell: Cell, kind: str, seed: int = 0) -> Cell:
    """The cell with all its measured pairs split anew, by a kind of `cellattn.data.split`."""
    given = [cell.train, *([] if cell.validation is None else [cell.validation]), cell.test]
    pairs, y = torch.cat([part.seeds for part in given]).view(-1, 2), torch.cat([part.y for part in given])
    data = PerturbationDataset.from_sets(pairs.tolist(), y, num_genes=cell.graph.num_nodes, genes=cell.graph.names)
    parts = split_dataset(data, kind, seed=seed)
    found = leakage(data, parts)
    train, validation, test = (data.subset(parts[name]) for name in ("train", "validation", "test"))
    notes = {
        f"left out of a {kind} split": found["left out"]["samples"],
        "test pairs with both genes seen": found["test"]["every gene seen"],
        "test pairs with neither gene seen": found["test"]["no gene seen"],
    }
    return replace(cell, train=train, validation=validation, test=test, notes=cell.notes | notes)


def token_genes(graph: MultiGraph, labelled: Tensor, tokens: str) -> Tensor:
    """The genes that are tokens, int64, labelled genes first."""
    kind, _, number = tokens.partition(":")
    if kind == "labelled" and not number:
        return labelled
    counts = torch.zeros(graph.num_nodes)
    is_labelled = counts.index_fill(0, labelled, 1)
    for relation in graph.relations:
        source, target = graph.edge_index(relation)
        counts.index_add_(0, source, is_labelled[target]).index_add_(0, target, is_labelled[source])
    others = counts.index_fill_(0, labelled, -1).argsort(descending=True, stable=True)[: graph.num_nodes - len(labelled)]
    if kind == "full" and not number:
        return torch.cat([labelled, others])
    if kind == "neighbours" and number.isdecimal():
        return torch.cat([labelled, others[: int(number)]])
    raise ValueError(f"tokens: expected 'labelled', 'neighbours:N' or 'full', got {tokens!r}")


def distinct_pairs(data: PerturbationDataset, nodes: Tensor) -> PerturbationDataset:
    """Each pair once, with its mean phenotype; gene nodes[m] becomes token m."""
    token = torch.full((data.num_genes,), -1).index_put_((nodes,), torch.arange(len(nodes)))
    pairs, inverse = token[data.seeds.view(-1, 2)].sort(1).values.unique(dim=0, return_inverse=True)
    y = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, inverse, data.y.double()) / inverse.bincount()
    names = None if data.names is None else data.names.select(nodes)
    return PerturbationDataset.from_sets(pairs.tolist(), y, num_genes=len(nodes), genes=names)


def spectral_features(graph: MultiGraph, rank: int = SPECTRAL_RANK) -> Tensor:
    """Leading singular vectors of D^-1/2 A D^-1/2 of each relation, times sqrt(s): float32 [N, F].

    Left ones, and where A is not symmetric, right ones too.
    """
    n, rank = graph.num_nodes, min(rank, graph.num_nodes // 2)
    parts = []
    for relation in graph.relations:
        (i, j), w = graph.edge_index(relation), graph.weight(relation)
        out_degree, in_degree = (torch.zeros(n).index_add_(0, end, w) for end in (i, j))
        a = torch.sparse_coo_tensor(torch.stack([i, j]), w * (out_degree[i] * in_degree[j]).rsqrt(), (n, n)).coalesce()
        with keep_rng():
            seed_everything(0)
            u, s, v = torch.svd_lowrank(a, q=rank + 8, niter=6)
        scale = s[:rank].sqrt()
        parts.append(u[:, :rank] * scale)
        if not torch.equal(i * n + j, (j * n + i).sort().values):
            parts.append(v[:, :rank] * scale)
    return torch.cat(parts, 1)


def standardize(features: Tensor) -> Tensor:
    """z-scores over the tokens; a few genes carry most of a leading vector, hence clamped to +-5."""
    return ((features - features.mean(0)) / features.std(0).clamp_min(1e-6)).clamp(-5, 5)


class Splits(NamedTuple):
    """Parts of the pairs; phenotypes in standard deviations of the training part."""

    train: PerturbationDataset
    validation: PerturbationDataset
    test: PerturbationDataset


def split(cell: Cell, seed: int) -> Splits:
    """Hold out the validation pairs of a seed, and standardise by the rest."""
    train, validation = held_out(cell, seed)
    unit = unit_of(train)
    parts = (_with_y(part, (part.y - unit["mean"]) / unit["std"]) for part in (train, validation, cell.test))
    return Splits(*parts)


def unit_of(train: PerturbationDataset) -> dict[str, float]:
    """Mean and standard deviation of phenotypes as they were measured, which predictions are in."""
    return {"mean": float(train.y.mean()), "std": float(train.y.std())}


def held_out(cell: Cell, seed: int) -> tuple[PerturbationDataset, PerturbationDataset]:
    """Training and validation pairs of a seed, phenotypes as they were measured."""
    train, validation = cell.train, cell.validation
    if validation is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1000 + seed))
        size = round(VALIDATION_SHARE * len(order))
        train, validation = train.subset(order[size:]), train.subset(order[:size])
    return train, validation


def _with_y(data: PerturbationDataset, y: Tensor) -> PerturbationDataset:
    return PerturbationDataset(data.seeds, data.ptr, data.types, y, num_genes=data.num_genes, names=data.names)
