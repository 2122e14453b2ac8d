"""The genes within a number of hops of each perturbation set, for the whole batch at once.

A gene's visited samples are bits of 64-bit words, so one OR along an edge serves 64 samples: a hop is one pass over the
edges whatever the batch. All k-hop ops share the format: int64 [N, W] with W = ceil(B / 64), where bit b % 64 of
words[i, b // 64] says that gene i is in the set of sample b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import count_of, require_choice, tensor_of
from .._extension import fake
from ..graph import MultiGraph
from ._sets import allocating, check_sets

TRAVERSALS = ("per_relation", "mixed")
DIRECTIONS = ("in", "out", "both")
WORD_BITS = 64


def khop_mask(
    graph: MultiGraph,
    seeds: Tensor,
    ptr: Tensor,
    num_hops: int,
    *,
    traversal: str = "per_relation",
    direction: str = "in",
    packed: bool = False,
) -> Tensor:
    """Mark the genes within `num_hops` hops of each perturbation set, the set itself included.

    Args:
        graph: the relations; edge weights are not used.
        seeds: int64 [nnz], the genes of set after set; a gene may stand in a set twice.
        ptr: int64 [B + 1]: set b holds entries ptr[b] to ptr[b + 1] of `seeds`; sets may be empty.
        num_hops: >= 0.
        traversal: "per_relation", hops inside each relation, the node sets united; or "mixed", every hop over any relation.
        direction: "in", from a gene to the sources of its incoming edges (as PyG's `k_hop_subgraph`); "out", to the targets
            of its outgoing ones; "both".
        packed: return words instead of bools.

    Returns:
        bool [B, N]; or, packed, int64 [N, ceil(B / 64)]: bit b % 64 of word [i, b // 64] says that gene i is reached
        from set b.

    Raises:
        ValueError, TypeError: naming the argument. Values of `seeds` and `ptr` are looked at on the CPU; on other devices,
            where looking would force a sync, under CELLATTN_CHECKS=1.
        MemoryError, torch.OutOfMemoryError: on the CPU, on a GPU: the mask does not fit.
        ImportError, NotImplementedError: the extension was not built, or not for the graph's device.
    """
    seeds, ptr = tensor_of(seeds), tensor_of(ptr)
    words = khop_words(graph, seeds, ptr, num_hops, traversal=traversal, direction=direction)
    return words if packed else unpack(words, ptr.numel() - 1, "genes")


def khop_words(graph: Any, seeds: Any, ptr: Any, num_hops: Any, *, traversal: Any, direction: Any) -> Tensor:
    """Words [N, W] of the genes within `num_hops` hops; checks all arguments."""
    check_sets(graph, seeds, ptr)
    num_hops = count_of("num_hops", num_hops)
    require_choice("traversal", traversal, TRAVERSALS)
    require_choice("direction", direction, DIRECTIONS)
    rowptr, col, _ = graph.stacked
    colptr, row, _ = graph.transpose()
    hops = min(num_hops, graph.num_nodes)  # no path without a cycle is longer
    mixed, incoming, outgoing = traversal == "mixed", direction != "out", direction != "in"
    num_nodes, num_sets = graph.num_nodes, ptr.numel() - 1
    return allocating(
        lambda: torch.ops.cellattn.khop_words(
            rowptr, col, colptr, row, seeds.contiguous(), ptr.contiguous(), num_nodes, hops, mixed, incoming, outgoing
        ),
        8 * num_nodes * num_words(num_sets),
        seeds,
        lambda: f"the sets of {num_nodes:,} genes in {num_sets:,} samples, as bits",
        "lower the number of samples",
    )


def unpack(words: Tensor, num_sets: int, what: str) -> Tensor:
    """Words [M, W] of `what` as bool [B, M]."""
    return allocating(
        lambda: torch.ops.cellattn.unpack_words(words, num_sets),
        num_sets * words.shape[0],
        words,
        lambda: f"a mask of {words.shape[0]:,} {what} by {num_sets:,} samples",
        "lower the number of samples, or take packed=True, an eighth of it",
    )


def num_words(num_sets: int) -> int:
    """Words that hold one bit a sample."""
    return (num_sets + WORD_BITS - 1) // WORD_BITS


# ------------------------------------------------------------------------------------------------------- operators


@fake("khop_words")
def _(
    rowptr: Tensor, col: Tensor, colptr: Tensor, row: Tensor, seeds: Tensor, ptr: Tensor, num_nodes: int, *rest: Any
) -> Tensor:
    return ptr.new_empty(num_nodes, num_words(ptr.shape[0] - 1))


@fake("unpack_words")
def _(words: Tensor, num_sets: int) -> Tensor:
    return words.new_empty(num_sets, words.shape[0], dtype=torch.bool)
