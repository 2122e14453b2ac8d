"""Which genes and edges a perturbation leaves: masks over one shared graph, made where they are used from the sets alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import tensor_of
from .._extension import fake
from ..graph import MultiGraph
from ._sets import allocating, check_sets
from .khop_mask import num_words, unpack


def perturbation_mask(
    graph: MultiGraph, seeds: Tensor, ptr: Tensor, *, packed: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mark the genes outside each perturbation set, and the edges of every relation with no end in it.

    Args:
        graph: the relations.
        seeds: int64 [nnz], the genes of set after set; a gene may stand in a set twice.
        ptr: int64 [B + 1]: set b holds entries ptr[b] to ptr[b + 1] of `seeds`; sets may be empty.
        packed: return words instead of bools.

    Returns:
        (node_keep bool [B, N], edge_keep: relation -> bool [B, E] in the order of `graph.col(relation)`); or, packed,
        (int64 [N, W], relation -> int64 [E, W]) with W = ceil(B / 64): bit b % 64 of word b // 64 is that of sample b.

    Raises:
        ValueError, TypeError: naming the argument. Values of `seeds` and `ptr` are looked at on the CPU; on other devices,
            where looking would force a sync, under CELLATTN_CHECKS=1.
        MemoryError, torch.OutOfMemoryError: on the CPU, on a GPU: a mask does not fit.
        ImportError, NotImplementedError: the extension was not built, or not for the graph's device.
    """
    seeds, ptr = tensor_of(seeds), tensor_of(ptr)
    check_sets(graph, seeds, ptr)
    num_sets = ptr.numel() - 1
    words = set_words(seeds, ptr, graph.num_nodes, complement=True)
    node_keep = words if packed else unpack(words, num_sets, "genes")
    edge_keep = {}
    for relation in graph.relations:
        edges = _edge_words(graph, relation, words)
        edge_keep[relation] = edges if packed else unpack(edges, num_sets, "edges")
    return node_keep, edge_keep


def set_words(seeds: Tensor, ptr: Tensor, num_nodes: int, *, complement: bool = False) -> Tensor:
    """Words [N, W] of the genes in each set, or of those that are not; arguments are checked by the caller."""
    num_sets = ptr.numel() - 1
    return allocating(
        lambda: torch.ops.cellattn.set_words(seeds.contiguous(), ptr.contiguous(), num_nodes, complement),
        8 * num_nodes * num_words(num_sets),
        seeds,
        lambda: f"the sets of {num_nodes:,} genes in {num_sets:,} samples, as bits",
        "lower the number of samples",
    )


def _edge_words(graph: MultiGraph, relation: str, words: Tensor) -> Tensor:
    """Words [E, W] of the edges with both ends in the sets of `words`."""
    num_edges = graph.num_edges(relation)
    return allocating(
        lambda: torch.ops.cellattn.edge_words(graph.rowptr(relation), graph.col(relation), words),
        num_edges * words.shape[1] * 8,
        words,
        lambda: f"{num_edges:,} edges by {words.shape[1]:,} words of 64 samples",
        "lower the number of samples",
    )


# ------------------------------------------------------------------------------------------------------- operators


@fake("are_sets")
def _(index: Tensor, ptr: Tensor, size: int, ascending: bool, distinct: bool) -> Tensor:
    return index.new_empty((), dtype=torch.bool)


@fake("set_words")
def _(seeds: Tensor, ptr: Tensor, num_nodes: int, complement: bool) -> Tensor:
    return ptr.new_empty(num_nodes, num_words(ptr.shape[0] - 1))


@fake("edge_words")
def _(rowptr: Tensor, col: Tensor, words: Tensor) -> Any:
    return words.new_empty(col.shape[0], words.shape[1])
