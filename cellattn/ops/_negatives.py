"""Negatives of a loss over edges: valid non-edges of a graph, drawn uniformly and with replacement, without listing them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph import MultiGraph
from ._operator import operator
from ._rows import take
from .sample_rows import generator_of_draw


class Negatives(NamedTuple):
    """Drawn non-edges: the chosen row r has gene[ptr[r] : ptr[r + 1]], each of weight[r]."""

    gene: Tensor  # int64 [M]
    row: Tensor  # int64 [M], the chosen row of each
    ptr: Tensor  # int64 [R + 1]
    weight: Tensor  # [R]


def sample_negatives(
    graph: MultiGraph,
    relation: str,
    rows: Tensor | None,
    num_negatives: int,
    generator: torch.Generator | None,
    dtype: torch.dtype = torch.float64,
) -> Negatives:
    """Draw num_negatives valid non-edges a row, uniformly with replacement, of weight (valid non-edges / num_negatives).

    Rows where every valid pair is an edge get an edge, of weight 0: its score is one of the row, an unknown gene's is none.
    """
    num_free = take(graph.num_free(relation), 0, rows, 0)
    num_rows = num_free.shape[0]
    uniform = torch.empty(num_rows, num_negatives, dtype=torch.float64, device=graph.device)
    uniform.uniform_(generator=generator_of_draw(generator))
    rank = (uniform * num_free[:, None]).long().flatten()
    row = torch.arange(num_rows * num_negatives, device=graph.device) // num_negatives
    ptr = torch.arange(num_rows + 1, device=graph.device) * num_negatives
    gene = nonedges(graph, relation, row if rows is None else rows[row], rank)
    gene = torch.where((num_free > 0)[row], gene, graph.known_ranks(relation)[0][:1])
    return Negatives(gene, row, ptr, num_free.to(dtype) / num_negatives)


def sample_negatives_of_graph(
    graph: MultiGraph, relation: str, ratio: float, generator: torch.Generator | None, dtype: torch.dtype = torch.float64
) -> Negatives:
    """Draw int(ratio * edges) valid non-edges of the rows with an edge, uniformly over all of them with replacement."""
    num_free, end = graph.num_free(relation), graph.free_ends(relation)
    total = graph.num_rows_with_edges(relation) * graph.num_known(relation) - graph.num_edges(relation)
    num_negatives = int(ratio * graph.num_edges(relation)) if total > 0 else 0
    uniform = torch.empty(num_negatives, dtype=torch.float64, device=graph.device)
    place = (uniform.uniform_(generator=generator_of_draw(generator)) * total).long().sort().values
    row = torch.searchsorted(end, place, right=True)
    rank = place - (end - num_free)[row]
    ptr = F.pad(torch.searchsorted(place, end), (1, 0))
    return Negatives(nonedges(graph, relation, row, rank), row, ptr, torch.ones_like(num_free, dtype=dtype))


def nonedges(graph: MultiGraph, relation: str, gene: Tensor, rank: Tensor) -> Tensor:
    """The valid non-edges of the given ranks in the rows of the given genes, int64 [M]."""
    return _nonedges(*graph.stacked[:2], *graph.known_ranks(relation), gene, rank, graph.relation_id(relation))


# ------------------------------------------------------------------------------------------------------- operator


@operator("nonedges")
def _nonedges(
    rowptr: Tensor, col: Tensor, by_rank: Tensor, rank_of: Tensor, gene: Tensor, rank: Tensor, relation: int
) -> Tensor:
    """Of a row with the columns c_0 < c_1 < ..., counted among the known genes, the r-th non-edge is r + e with e the number
    of edges that stand before it: the smallest e with c_e - e > r, found by bisection.
    """
    n = by_rank.shape[0]
    first = rowptr[relation * n + gene]
    low, high = torch.zeros_like(rank), rowptr[relation * n + gene + 1] - first
    for _ in range(int(high.max()).bit_length() if high.numel() else 0):
        open_ = low < high
        middle = (low + high) // 2
        before = rank_of[col[(first + middle).clamp_max(col.numel() - 1)].long()] - middle <= rank
        low = torch.where(open_ & before, middle + 1, low)
        high = torch.where(open_ & ~before, middle, high)
    return by_rank[(rank + low).clamp_max(n - 1)]


@_nonedges.register_fake
def _(rowptr: Tensor, col: Tensor, by_rank: Tensor, rank_of: Tensor, gene: Tensor, rank: Tensor, relation: int) -> Tensor:
    return torch.empty_like(rank)


@_nonedges.register_kernel("cuda")
def _(*arguments: Any) -> Tensor:
    from ..kernels import negatives as kernels  # needs Triton

    return kernels.nonedges(*arguments)
