"""A small multigraph with all that is awkward, drawn ones, and what holds a graph to its dense matrices."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cellattn import MultiGraph
from cellattn.data import GeneList

N = 7
# Unsorted, with a duplicate, a self-loop and rows without edges; relation -> (edge index, weights).
EDGES: dict[str, tuple[list[list[int]], list[float]]] = {
    "physical": ([[4, 0, 2, 0, 5, 2], [1, 3, 2, 3, 4, 0]], [0.5, 1.0, 2.0, 0.25, 4.0, 0.125]),
    "regulatory": ([[6, 1], [0, 6]], [1.5, 3.0]),
    "empty": ([[], []], []),
}
INDEX = {name: torch.tensor(edges, dtype=torch.int64) for name, (edges, _) in EDGES.items()}
WEIGHT = {name: torch.tensor(weight) for name, (_, weight) in EDGES.items()}


def dense(graph: MultiGraph, relation: str) -> Tensor:
    """float64 [N, N], read from the CSR arrays alone."""
    a = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    rowptr, col, weight = graph.rowptr(relation), graph.col(relation), graph.weight(relation)
    for i in range(graph.num_nodes):
        for e in range(int(rowptr[i]), int(rowptr[i + 1])):
            a[i, int(col[e])] += float(weight[e])
    return a


def dense_of_edges(index: Tensor, weight: Tensor, num_nodes: int) -> Tensor:
    """float64 [N, N], the weights of duplicates added."""
    a = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    for (i, j), w in zip(index.t().tolist(), weight.tolist(), strict=True):
        a[i, j] += w
    return a


# All weights above are sums of powers of two: float32 holds every sum exactly, and results are compared with ==.
DENSE = {name: dense_of_edges(INDEX[name], WEIGHT[name], N) for name in EDGES}


def weighted(**options: Any) -> MultiGraph:
    return MultiGraph.from_edge_index(INDEX, N, edge_weight=WEIGHT, **options)


def check_dense(graph: MultiGraph, expected: dict[str, Tensor]) -> None:
    assert graph.relations == tuple(expected)
    for name, a in expected.items():
        assert torch.equal(dense(graph, name), a), name
        assert graph.num_edges(name) == int((a > 0).sum())
    assert graph.num_edges() == sum(int((a > 0).sum()) for a in expected.values())


def check_invariants(graph: MultiGraph) -> None:
    n = graph.num_nodes
    for name in graph.relations:
        rowptr, col, weight = graph.rowptr(name), graph.col(name), graph.weight(name)
        assert rowptr.dtype == torch.int64
        assert rowptr.shape == (n + 1,)
        assert int(rowptr[0]) == 0
        assert int(rowptr[-1]) == col.numel() == weight.numel() == graph.num_edges(name)
        assert bool((rowptr.diff() >= 0).all())
        assert torch.equal(graph.degree(name), rowptr.diff())
        assert graph.max_degree(name) == int(graph.degree(name).max())
        assert graph.num_rows_with_edges(name) == int((graph.degree(name) > 0).sum())
        assert col.dtype == torch.int32
        row, column = graph.edge_index(name)
        assert bool(((row * n + column).diff() > 0).all()), "sorted by row, then column, without duplicates"
        assert bool((weight > 0).all())
        assert bool((graph.known(name)[row] & graph.known(name)[column]).all())


NAMES = [f"Y{i}" for i in range(N)]


def named(**options: Any) -> MultiGraph:
    return weighted(names=GeneList(NAMES, aliases={"TFC3": "Y3", "é": "Y5"}), **options)


@st.composite
def edge_lists(draw: st.DrawFn) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """(N, edge index, weights): up to three relations with duplicates, self-loops, hubs and zeros among the weights."""
    n = draw(st.integers(1, 12))
    names = draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3, unique=True))
    index, weight = {}, {}
    for name in names:
        # Eighths: sums of duplicates are exact in float32, in any order.
        entry = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1), st.integers(0, 40))
        entries = draw(st.lists(entry, max_size=40))
        index[name] = torch.tensor([e[:2] for e in entries], dtype=torch.int64).reshape(-1, 2).t()
        weight[name] = torch.tensor([e[2] / 8 for e in entries], dtype=torch.float32)
    return n, index, weight
