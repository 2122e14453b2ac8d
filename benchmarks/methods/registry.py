"""The methods that are compared, each by its name: for the report, the profiler and the search for the largest batch.

A small size of each, that a CPU can train, and of the cell transformer the published one as well.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cellattn import MultiGraph, khop_mask, relational_degree
from cellattn.data import PERTURBATION_TYPES, PerturbationBatch
from cellattn.nn import CellTransformer, Dango, PairwiseInteraction, WildtypeDifference
from cellattn.nn.wildtype import Subset

from ..training.baselines import pair_mlp
from ..training.engine import Forward

DIM, NUM_LAYERS = 64, 2
NUM_TYPES = len(PERTURBATION_TYPES)


@dataclass(frozen=True)
class Method:
    """A model of a cell: what builds it, untrained, on a device, and how it is called on a batch."""

    name: str
    build: Callable[[MultiGraph, torch.device], tuple[nn.Module, Forward]]


def on_cell(graph: MultiGraph) -> Forward:
    """How models of a cell are called: the graph stays where it is, a batch brings indices."""
    return lambda model, batch: model(graph, batch.seeds, batch.ptr, batch.types)


def cell_transformer(
    graph: MultiGraph, device: torch.device, *, dim: int, layers: int, heads: int, ffn_dim: int, **options: Any
) -> tuple[nn.Module, Forward]:
    """Every relation is tied to a head of its own, layer by layer."""
    ties = [(*divmod(position, heads), relation, 0.1) for position, relation in enumerate(graph.relations[: layers * heads])]
    model = CellTransformer(
        dim, layers, heads, num_types=NUM_TYPES, num_genes=graph.num_nodes, ties=ties, ffn_dim=ffn_dim, **options
    )
    return model.to(device), on_cell(graph)


def wildtype_difference(graph: MultiGraph, device: torch.device, **options: Any) -> tuple[nn.Module, Forward]:
    """GraphSAGE over all relations."""
    model = WildtypeDifference(
        DIM, NUM_LAYERS, relations=graph.relations, num_types=NUM_TYPES, num_genes=graph.num_nodes, readout="mean", **options
    )
    return model.to(device), on_cell(graph)


def dango(graph: MultiGraph, device: torch.device) -> tuple[nn.Module, Forward]:
    """Joint training on all relations."""
    weights = dict.fromkeys(graph.relations, 1 / max(len(graph.relations), 1))
    model = Dango(DIM, relations=weights, num_genes=graph.num_nodes)
    return model.to(device), on_cell(graph)


def pairwise(graph: MultiGraph, device: torch.device) -> tuple[nn.Module, Forward]:
    """No graph is read."""
    model = PairwiseInteraction(DIM, num_types=NUM_TYPES, num_genes=graph.num_nodes)
    return model.to(device), on_cell(graph)


_SMALL: dict[str, Any] = {
    "dim": DIM, "layers": NUM_LAYERS, "heads": 4, "ffn_dim": 128, "pool": ("sum", "pairwise"), "hidden_dim": DIM,
}  # fmt: skip
# 4.77 million parameters, all nine graphs in one layer
_PUBLISHED: dict[str, Any] = {"dim": 180, "layers": 8, "heads": 9, "ffn_dim": 720, "norm": "post"}
METHODS = {
    "dango": Method("DANGO", dango),
    "lazy": Method("wildtype difference, whole graph", partial(wildtype_difference, mode="lazy")),
    "khop-1": Method("wildtype difference, 1 hop", partial(wildtype_difference, mode="khop", num_hops=1)),
    "khop-2": Method("wildtype difference, 2 hops", partial(wildtype_difference, mode="khop", num_hops=2)),
    "khop-3": Method("wildtype difference, 3 hops", partial(wildtype_difference, mode="khop", num_hops=3)),
    "delta": Method("wildtype difference, the difference alone", partial(wildtype_difference, mode="delta")),
    "pairwise": Method("pairwise interaction", pairwise),
    "cell-transformer": Method("cell transformer", partial(cell_transformer, **_SMALL)),
    "cell-transformer-published": Method("cell transformer, published size", partial(cell_transformer, **_PUBLISHED)),
    "pair-mlp": Method("pair MLP", pair_mlp),
}


def nodes_and_edges(method: str, graph: MultiGraph, batch: PerturbationBatch) -> tuple[float, float]:
    """Genes and edges that a sample of the batch has to itself, in the mean; what all samples share is not counted.

    DANGO, the pairwise model and the transformer encode one cell for the whole batch: a sample is its set. In "delta" a gene
    counts where its value may change, and an edge in each layer along which a change is sent.
    """
    seeds, ptr, num_sets = batch.seeds, batch.ptr, max(len(batch), 1)
    if method not in ("lazy", "delta") and not method.startswith("khop"):
        return len(seeds) / num_sets, 0.0
    deleted = khop_mask(graph, seeds, ptr, 0)
    if method == "delta":
        within = [khop_mask(graph, seeds, ptr, hops, traversal="mixed") for hops in range(NUM_LAYERS + 1)]
        edges = sum(_edges(graph, source, target) for source, target in itertools.pairwise(within))
        return int(within[-1].sum()) / num_sets, edges / num_sets
    there = torch.ones_like(deleted) if method == "lazy" else khop_mask(graph, seeds, ptr, int(method[-1]))
    return int(there.sum()) / num_sets, _edges(graph, there, there) / num_sets


def _edges(graph: MultiGraph, source: Tensor, target: Tensor) -> int:
    """Edges from the genes of target to those of source, masks [B, N], in all relations and samples."""
    senders, receivers = Subset.of(source, target)
    return int(relational_degree(graph, *senders.genes, *receivers.genes).sum())


def method_of(name: str) -> Method:
    """A method by its name in `METHODS`, or by where it stands: "module:attribute"."""
    module, _, attribute = name.rpartition(":")
    if module:
        found: Method = getattr(importlib.import_module(module), attribute)
        return found
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, or module:attribute, got {name!r}")
    return METHODS[name]
