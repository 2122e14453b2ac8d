"""The launches that are looked at: recorded, on tensors without values, or with those that decide how often loops run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from cellattn import MultiGraph, edge_attention, khop_mask, masked_spmm, relational_spmm
from cellattn.kernels import attention as attention_kernels
from cellattn.kernels import attention_bce as bce_kernels
from cellattn.kernels import config
from cellattn.kernels import perturbation_attention as perturbation_kernels
from cellattn.kernels import row_dot as row_dot_kernels
from cellattn.nn.wildtype import Subset
from cellattn.ops._negatives import sample_negatives_of_graph
from tests.kernels.aot import Launch, recorded
from tests.ptx.device import Allocations

from .chips import Chip


@contextmanager
def on(chip: Chip) -> Iterator[list[Launch]]:
    """Every launch of a Triton kernel is recorded instead of run; launchers see the chip."""
    with recorded(chip.arch) as launches, mock.patch.object(config, "num_multiprocessors", return_value=chip.multiprocessors):
        yield launches


@contextmanager
def with_values(chip: Chip) -> Iterator[list[Launch]]:
    """Likewise of calls on CPU tensors, whose operators take their CUDA way. What a kernel would have written is ones, bit by
    bit: no row has a sharp entry."""
    with on(chip) as launches, Allocations():
        yield launches


def attention(heads: int, tokens: int, dim: int, dtype: torch.dtype, *, lse: bool, device: str = "meta") -> Callable[[], None]:
    """Forward and backward; `lse`: LSE has a gradient too, as the graph losses give it one."""

    def call() -> None:
        q, k, v = (torch.zeros(1, heads, tokens, dim, dtype=dtype, device=device) for _ in range(3))
        out, log_sum = attention_kernels.attention(q, k, v, None, dim**-0.5)
        attention_kernels.attention_backward(
            torch.zeros_like(out), torch.zeros_like(log_sum) if lse else None, q, k, v, None, out, log_sum, dim**-0.5
        )

    return call


def ties(
    num_genes: int, num_edges: int, rows: list[int], columns: list[int], dim: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward and backward of the products along the edges, one tie a relation, each with a head of its own and all rows.

    Args:
        rows, columns: [K + 1], where the segments of each relation begin.
    """

    def empty(*shape: int, of: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    def call() -> None:
        count = len(rows) - 1
        q, k = (empty(1, count, num_genes + 1, dim, of=dtype) for _ in range(2))
        pointer = empty(count * num_genes + 1, of=torch.int64)
        entries = pointer, empty(num_edges, of=torch.int32), empty(num_edges, of=torch.float32)
        by_row, by_column = (
            (empty(count * num_genes + 1, of=torch.int64), empty(cut[-1], of=torch.int64), cut) for cut in (rows, columns)
        )
        tied = list(range(count)), list(range(count)), None, [num_genes] * count, 1
        y, kbar = row_dot_kernels.row_dot(q, k, *entries, *entries, *by_row, *by_column, *tied)
        row_dot_kernels.row_dot_backward(y, q, kbar, *entries, *by_column, *tied)

    return call


def edges(graph: MultiGraph, dim: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of hard masks, one relation a head, with a prefix token and self-loops."""

    def call() -> None:
        heads = [(name, i) for i, name in enumerate(graph.relations)]
        q, k, v = (torch.empty(len(heads), 1 + graph.num_nodes, dim, dtype=dtype, requires_grad=True) for _ in range(3))
        edge_attention(q, k, v, graph, heads)[0].sum().backward()

    return call


def bce(graph: MultiGraph, dim: int, dtype: torch.dtype, ratio: float | None) -> Callable[[], None]:
    """Forward and backward of every relation's cross-entropy with a head of its own, all rows.

    Args:
        ratio: negatives that were drawn, over edges; None: every non-edge.
    """
    generator = torch.Generator().manual_seed(0)
    negatives = {
        name: (None,) * 4 if ratio is None else sample_negatives_of_graph(graph, name, ratio, generator, torch.float32)
        for name in graph.relations
    }

    def call() -> None:
        n, (by_row, by_column) = graph.num_nodes, graph.segments
        for i, name in enumerate(graph.relations):
            q, k = (torch.empty(1, n + 1, dim, dtype=dtype) for _ in range(2))
            lse, dloss, rest, pull = (torch.empty(1, n) for _ in range(4))
            problem = (
                q, k, lse, *graph.stacked, *graph.stacked_by_column(), *by_row, *by_column,
                graph.targets(torch.float32).inv_mass.flatten(), graph.known(name), None, *negatives[name], i, 1, dim**-0.5,
                True,
            )  # fmt: skip
            bce_kernels.bce_rows(*problem)
            bce_kernels.bce_rows_backward(dloss, torch.full((1, n), -1, dtype=torch.int32), rest, pull, *problem)

    return call


def _sets(num_genes: int, num_sets: int, size: int) -> tuple[Tensor, Tensor]:
    """Genes of so many sets, and where each begins."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(num_genes, (num_sets * size,), generator=g), size * torch.arange(num_sets + 1)


def masked(graph: MultiGraph, num_sets: int, features: int, dtype: torch.dtype) -> Callable[[], None]:
    """Means over neighbours in so many cells, each without three genes, by every relation; gradients of features and edges."""
    n = graph.num_nodes
    keep = ~khop_mask(graph, *_sets(n, num_sets, 3), 0)

    def call() -> None:
        for name in graph.relations:
            x = torch.empty(num_sets, n, features, dtype=dtype, requires_grad=True)
            weight = torch.empty(graph.num_edges(name), dtype=dtype, requires_grad=True)
            masked_spmm(graph, name, x, keep, edge_weight=weight, reduce="mean").sum().backward()

    return call


def relational(graph: MultiGraph, num_sets: int, features: int, dtype: torch.dtype) -> Callable[[], None]:
    """Messages of all relations from the genes next to each of so many sets of three to those within two hops."""
    sets = _sets(graph.num_nodes, num_sets, 3)
    source, target = Subset.of(*(khop_mask(graph, *sets, hops) for hops in (1, 2)))

    def call() -> None:
        x = torch.empty(len(source.genes.gene), len(graph.relations), features, dtype=dtype, requires_grad=True)
        relational_spmm(graph, x, *source.genes, *target.genes).sum().backward()

    return call


def perturbation(num_genes: int, num_sets: int, heads: int, dim: int, dtype: torch.dtype) -> Callable[[], None]:
    """What their own genes change in the attention of so many pairs, forward and backward."""
    index, ptr = _sets(num_genes, num_sets, 2)

    def call() -> None:
        query, dz = (torch.empty(heads, num_sets, dim, dtype=dtype) for _ in range(2))
        key, value = (torch.empty(heads, num_genes, dim, dtype=dtype) for _ in range(2))
        override = torch.empty(heads, len(index), dim, dtype=dtype)
        problem = query, key, value, torch.empty(heads, num_sets), index, ptr, override, dim**-0.5
        perturbation_kernels.perturbation_correction(*problem)
        perturbation_kernels.perturbation_correction_backward(dz, *problem)

    return call
