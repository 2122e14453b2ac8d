"""MultiGraph against dense adjacency matrices, and its invariants on random multigraphs."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import re
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cellattn import MultiGraph
from cellattn._file import write_atomic
from cellattn.data import GeneList
from cellattn.graph import SEGMENT, cut_rows

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


# ---------------------------------------------------------------------------------------------------- constructors


def scipy_matrices(kind: str) -> dict[str, Any]:
    make = getattr(sp, kind)
    return {name: make(sp.coo_array((WEIGHT[name].numpy(), tuple(INDEX[name].numpy())), shape=(N, N))) for name in EDGES}


def networkx_graphs(make: Callable[[], Any]) -> dict[str, Any]:
    graphs = {}
    for name, (index, weights) in EDGES.items():
        graphs[name] = make()
        for i, j, w in zip(*index, weights, strict=True):
            graphs[name].add_edge(f"Y{i}", f"Y{j}", weight=w)
    return graphs


def sparse_tensor(name: str) -> Tensor:
    return torch.sparse_coo_tensor(INDEX[name], WEIGHT[name], (N, N), check_invariants=True)


class SparseTensor:
    """The part of torch_sparse.SparseTensor that is read."""

    def __init__(self, index: Tensor, value: Tensor | None, sizes: list[int]) -> None:
        self.index, self.value, self._sizes = index, value, sizes

    def coo(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.index[0], self.index[1], self.value

    def sizes(self) -> list[int]:
        return self._sizes


def hetero_data() -> Any:
    data = pytest.importorskip("torch_geometric.data").HeteroData()
    data["gene"].num_nodes = N
    data["drug"].num_nodes = 2
    for name in EDGES:
        data["gene", name, "gene"].edge_index = INDEX[name]
        data["gene", name, "gene"].edge_weight = WEIGHT[name]
    return data


NODES = [f"Y{i}" for i in range(N)]
CONSTRUCTORS: dict[str, Callable[[], MultiGraph]] = {
    "edge_index": weighted,
    "edge_index-int32": lambda: MultiGraph.from_edge_index({k: v.int() for k, v in INDEX.items()}, N, edge_weight=WEIGHT),
    "scipy-csr_matrix": lambda: MultiGraph.from_scipy(scipy_matrices("csr_matrix")),
    "scipy-coo_matrix": lambda: MultiGraph.from_scipy(scipy_matrices("coo_matrix")),
    "scipy-csc_array": lambda: MultiGraph.from_scipy(scipy_matrices("csc_array")),
    "scipy-lil_matrix": lambda: MultiGraph.from_scipy(scipy_matrices("lil_matrix")),
    "networkx-multidigraph": lambda: MultiGraph.from_networkx(networkx_graphs(nx.MultiDiGraph), NODES),
    "torch-coo": lambda: MultiGraph.from_sparse_tensor({name: sparse_tensor(name) for name in EDGES}),
    "torch-csr": lambda: MultiGraph.from_sparse_tensor({name: sparse_tensor(name).to_sparse_csr() for name in EDGES}),
    "torch-csc": lambda: MultiGraph.from_sparse_tensor({name: sparse_tensor(name).to_sparse_csc() for name in EDGES}),
    "torch_sparse": lambda: MultiGraph.from_sparse_tensor(
        {name: SparseTensor(INDEX[name], WEIGHT[name], [N, N]) for name in EDGES}
    ),
    "hetero_data": lambda: MultiGraph.from_hetero_data(hetero_data()),
}


@pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_constructor_agrees_with_dense(make: Callable[[], MultiGraph]) -> None:
    graph = make()
    check_dense(graph, DENSE)
    check_invariants(graph)
    assert graph == weighted()


@pytest.mark.parametrize("make", [nx.Graph, nx.MultiGraph, nx.DiGraph], ids=["graph", "multigraph", "digraph"])
def test_networkx_agrees_with_its_own_adjacency(make: Callable[[], Any]) -> None:
    graphs = networkx_graphs(make)
    for graph in graphs.values():
        graph.add_nodes_from(NODES)
    # networkx counts the self-loop of an undirected graph once in to_numpy_array, as one entry of the matrix
    expected = {name: torch.from_numpy(nx.to_numpy_array(graph, nodelist=NODES)) for name, graph in graphs.items()}
    check_dense(MultiGraph.from_networkx(graphs, NODES), expected)


def test_networkx_nodelist_gives_the_index_and_weight_is_1_where_missing() -> None:
    edges = nx.DiGraph([("b", "a"), ("a", "c")])
    graph = MultiGraph.from_networkx({"r": edges}, ["a", "b", "c", "d"])
    assert graph.num_nodes == 4
    assert graph.edge_index("r").tolist() == [[0, 1], [2, 0]]
    assert graph.weight("r").tolist() == [1, 1]


def test_torch_sparse_without_values_has_weight_1() -> None:
    graph = MultiGraph.from_sparse_tensor({"r": SparseTensor(INDEX["physical"], None, [N, N])})
    assert torch.equal(dense(graph, "r"), (DENSE["physical"] > 0).double())


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int64"])
def test_integer_and_bool_matrices_give_floating_weights(dtype: str) -> None:
    a = np.array([[0, 1], [1, 0]], dtype=dtype)
    assert MultiGraph.from_scipy({"r": sp.csr_matrix(a)}).weight("r").tolist() == [1, 1]
    assert MultiGraph.from_sparse_tensor({"r": torch.from_numpy(a).to_sparse()}).weight("r").dtype == torch.float32


def test_float64_weights_keep_their_digits() -> None:
    third = 1 / 3
    from_edges = MultiGraph.from_edge_index(
        {"r": torch.tensor([[0], [1]])}, 2, edge_weight={"r": torch.tensor([third], dtype=torch.float64)}
    )
    from_scipy = MultiGraph.from_scipy({"r": sp.coo_array(([third], ([0], [1])), shape=(2, 2))})
    for graph in (from_edges, from_scipy):
        assert graph.weight("r").dtype == torch.float64
        assert graph.weight("r").item() == third


def test_hetero_data_without_weights() -> None:
    data = hetero_data()
    for name in EDGES:
        del data["gene", name, "gene"].edge_weight
    graph = MultiGraph.from_hetero_data(data, undirected=["regulatory"])
    assert graph == MultiGraph.from_edge_index(INDEX, N, undirected=["regulatory"])


def hetero_with(**attributes: Any) -> Any:
    data = pytest.importorskip("torch_geometric.data").HeteroData()
    data["gene"].num_nodes = 3
    data["gene", "p", "gene"].edge_index = torch.tensor([[0, 1], [1, 2]])
    for name, value in attributes.items():
        data["gene", "p", "gene"][name] = value
    return data


HALF = torch.tensor([0.5, 0.25])


@pytest.mark.parametrize(
    ("attributes", "weight"),
    [
        ({"edge_weight": HALF}, [0.5, 0.25]),
        ({"edge_weight": HALF[:, None]}, [0.5, 0.25]),
        ({"edge_attr": HALF}, [0.5, 0.25]),
        ({"edge_attr": HALF[:, None]}, [0.5, 0.25]),
        ({"edge_attr": torch.tensor([[3], [2]])}, [3, 2]),
        ({"edge_attr": torch.tensor([True, True])}, [1, 1]),
        ({"weight": HALF.bfloat16()}, [0.5, 0.25]),
        ({"edge_weight": HALF, "edge_attr": torch.rand(2, 3), "weight": HALF + 1}, [0.5, 0.25]),
        ({"edge_attr": HALF, "weight": HALF + 1}, [0.5, 0.25]),
        ({"edge_attr": torch.rand(2, 3), "weight": HALF}, [0.5, 0.25]),
        ({"edge_weight": HALF.numpy()}, [0.5, 0.25]),
        ({"edge_attr": HALF.numpy()[:, None]}, [0.5, 0.25]),
        ({"edge_weight": [0.5, 0.25]}, [0.5, 0.25]),
        ({"edge_attr": ["a", "b"]}, [1, 1]),
        ({"edge_attr": [[1.0], [2.0, 3.0]]}, [1, 1]),
        ({"e_id": torch.arange(2), "name": ["a", "b"]}, [1, 1]),
    ],
    ids=[
        "edge_weight", "edge_weight-column", "edge_attr", "edge_attr-column", "int", "bool", "weight", "edge_weight-first",
        "edge_attr-first", "features-and-weight", "numpy", "numpy-column", "list", "words", "ragged", "none",
    ],
)  # fmt: skip
def test_hetero_data_weights(attributes: dict[str, Any], weight: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MultiGraph.from_hetero_data(hetero_with(**attributes)).weight("p").tolist() == weight


@pytest.mark.parametrize(
    ("attributes", "ignored"),
    [
        ({"edge_attr": torch.rand(2, 3)}, r"edge_attr \[2, 3\]"),
        ({"score": HALF}, r"score \[2\]"),
        ({"score": HALF.numpy()}, r"score \[2\]"),
        ({"edge_attr": torch.rand(2, 2), "score": HALF[:, None]}, r"edge_attr \[2, 2\], score \[2, 1\]"),
    ],
    ids=["features", "other-name", "other-name-numpy", "both"],
)
def test_hetero_data_says_what_it_ignores(attributes: dict[str, Any], ignored: str) -> None:
    with pytest.warns(
        UserWarning, match=rf"\('gene', 'p', 'gene'\) has weight 1, {ignored} ignored; set edge_weight"
    ) as caught:
        assert MultiGraph.from_hetero_data(hetero_with(**attributes)).weight("p").tolist() == [1, 1]
    assert caught[0].filename == __file__


def test_hetero_data_refuses_weights_of_another_shape() -> None:
    with pytest.raises(
        ValueError, match=r"edge_weight\['p'\]: expected 1 dimension\(s\), got a float32 tensor of shape \[2, 2\]"
    ):
        MultiGraph.from_hetero_data(hetero_with(edge_weight=torch.rand(2, 2)))
    for words in (["a", "b"], [[1.0], [2.0, 3.0]]):
        with pytest.raises(TypeError, match=r"data: edge_weight of edge type .*'p'.*: expected a tensor of numbers"):
            MultiGraph.from_hetero_data(hetero_with(edge_weight=words))


TWICE = torch.tensor([[0, 0, 1], [1, 1, 2]])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "float16", "bfloat16", "float32", "float64"])
def test_duplicates_add_without_loss_in_any_dtype(dtype: str) -> None:
    """Added in 8 or 16 bits they would wrap around or be rounded."""
    value = torch.tensor([100, 101, 3]).to(getattr(torch, dtype))
    tensors = {"r": torch.sparse_coo_tensor(TWICE, value, (3, 3))}
    assert MultiGraph.from_sparse_tensor(tensors).weight("r").tolist() == [201, 3]
    assert MultiGraph.from_sparse_tensor({"r": SparseTensor(TWICE, value[:, None], [3, 3])}).weight("r").tolist() == [201, 3]
    if "float16" not in dtype:  # scipy has neither
        matrix = sp.coo_array((value.numpy(), (TWICE[0].numpy(), TWICE[1].numpy())), shape=(3, 3))
        assert MultiGraph.from_scipy({"r": matrix}).weight("r").tolist() == [201, 3]


def test_bool_entries_have_no_weights() -> None:
    value = torch.tensor([True, True, False])
    matrix = sp.coo_array((value.numpy(), (TWICE[0].numpy(), TWICE[1].numpy())), shape=(3, 3))
    for graph in (
        MultiGraph.from_sparse_tensor({"r": torch.sparse_coo_tensor(TWICE, value, (3, 3))}),
        MultiGraph.from_sparse_tensor({"r": SparseTensor(TWICE, value, [3, 3])}),
        MultiGraph.from_scipy({"r": matrix}),
    ):
        assert graph.edge_index("r").tolist() == [[0], [1]]
        assert graph.weight("r").tolist() == [1]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1j], ids=str)
def test_entries_that_are_no_weights_are_refused(value: Any) -> None:
    """Also where another entry of the same place would hide them."""
    values = torch.tensor([value, 2, 3])
    with pytest.raises(ValueError, match=r"edge_weight\['r'\]: "):
        MultiGraph.from_sparse_tensor({"r": torch.sparse_coo_tensor(TWICE, values, (3, 3))})
    with pytest.raises(ValueError, match=r"(edge_weight|matrices)\['r'\]: "):
        MultiGraph.from_scipy({"r": sp.coo_array((values.numpy(), (TWICE[0].numpy(), TWICE[1].numpy())), shape=(3, 3))})
    with pytest.raises(ValueError, match=r"(edge_weight|graphs)\['r'\]: "):
        MultiGraph.from_networkx({"r": nx.DiGraph([(0, 1, {"weight": value})])}, [0, 1])


def test_networkx_reads_the_attribute_that_is_asked_for() -> None:
    graphs = {"r": nx.DiGraph([(0, 1, {"score": 0.5, "label": "x"}), (1, 2, {"score": np.float32(0.25)}), (2, 0, {})])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MultiGraph.from_networkx(graphs, [0, 1, 2], weight="score").weight("r").tolist() == [0.5, 0.25, 1]
        assert MultiGraph.from_networkx(graphs, [0, 1, 2], weight=None).weight("r").tolist() == [1, 1, 1]
    with pytest.warns(
        UserWarning, match=r"graphs\['r'\]: no edge has the attribute 'weight'.*ignored: 'score', of which weight="
    ) as caught:
        assert MultiGraph.from_networkx(graphs, [0, 1, 2]).weight("r").tolist() == [1, 1, 1]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("weight", ["1", None, 1j, [1], 10**400], ids=["text", "none", "complex", "list", "large"])
def test_networkx_weights_are_numbers(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"graphs\['r'\]: edge \(0, 1\) has weight .*, expected a number"):
        MultiGraph.from_networkx({"r": nx.DiGraph([(0, 1, {"weight": weight})])}, [0, 1])


@pytest.mark.parametrize("weights", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_undirected_is_what_pyg_gives(reduce: str, weights: bool) -> None:
    """Duplicates, both directions and self-loops; float64 sums of quarters are exact."""
    to_undirected = pytest.importorskip("torch_geometric.utils").to_undirected
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(9, (2, 60), generator=generator)
    value = torch.randint(1, 9, (60,), generator=generator).double() / 4
    if reduce == "max":  # PyG has one reduction for duplicates, which we add, and for directions
        index, first = index.unique(dim=1), torch.randperm(60, generator=generator)
        value = value[first[: index.shape[1]]]
    given = {"r": value} if weights else None
    graph = MultiGraph.from_edge_index({"r": index}, 9, edge_weight=given, undirected=True, undirected_reduce=reduce)
    want, wanted = to_undirected(index, value, num_nodes=9, reduce="add" if reduce == "sum" else reduce)
    assert torch.equal(graph.edge_index("r"), want)
    assert torch.equal(graph.weight("r"), wanted if weights else torch.ones(len(wanted)))


def test_every_constructor_takes_undirected_reduce() -> None:
    options: dict[str, Any] = {"undirected": True, "undirected_reduce": "sum"}
    want = weighted(**options)
    assert MultiGraph.from_scipy(scipy_matrices("csr_matrix"), **options) == want
    assert MultiGraph.from_sparse_tensor({name: sparse_tensor(name) for name in EDGES}, **options) == want
    assert MultiGraph.from_networkx(networkx_graphs(nx.MultiDiGraph), NODES, **options) == want
    assert MultiGraph.from_hetero_data(hetero_data(), **options) == want
    loop = {"physical": torch.tensor([[N, N, 0], [N, 0, N]])}
    extended = weighted().extend(1, loop, edge_weight={"physical": torch.tensor([1.0, 2, 4])}, **options)
    assert dense(extended, "physical")[N].tolist() == [6, *[0] * (N - 1), 2]
    with pytest.raises(ValueError, match="undirected_reduce: unknown value 'mean', expected one of 'max', 'sum'"):
        weighted(undirected_reduce="mean")


def test_duplicates_without_weights_count_once() -> None:
    graph = MultiGraph.from_edge_index(INDEX, N)
    check_dense(graph, {name: (a > 0).double() for name, a in DENSE.items()})


def test_relations_without_weights_stand_beside_weighted_ones() -> None:
    graph = MultiGraph.from_edge_index(INDEX, N, edge_weight={"physical": WEIGHT["physical"]})
    check_dense(graph, {name: a if name == "physical" else (a > 0).double() for name, a in DENSE.items()})


def test_weight_0_is_no_edge() -> None:
    index = torch.tensor([[0, 1, 1, 2], [1, 2, 2, 0]])
    weight = torch.tensor([0.0, 0.0, 2.0, 1.0])
    graph = MultiGraph.from_edge_index({"r": index}, 3, edge_weight={"r": weight})
    assert graph.edge_index("r").tolist() == [[1, 2], [2, 0]]
    assert graph.weight("r").tolist() == [2, 1]


@pytest.mark.parametrize(
    ("undirected", "names"),
    [
        (True, set(EDGES)),
        (False, set()),
        (["physical"], {"physical"}),
        (("regulatory", "physical"), {"regulatory", "physical"}),
        ({"regulatory"}, {"regulatory"}),
        ("regulatory", {"regulatory"}),
        ([], set()),
    ],
    ids=["true", "false", "list", "tuple", "set", "one-name", "no-names"],
)
def test_undirected_is_the_maximum_of_both_directions(undirected: Any, names: set[str]) -> None:
    graph = weighted(undirected=undirected)
    check_dense(graph, {name: torch.maximum(a, a.t()) if name in names else a for name, a in DENSE.items()})
    check_invariants(graph)


def test_undirected_adds_duplicates_before_it_takes_the_maximum() -> None:
    index, weight = torch.tensor([[0, 0, 1], [1, 1, 0]]), torch.tensor([1.0, 1.0, 1.5])
    graph = MultiGraph.from_edge_index({"r": index}, 2, edge_weight={"r": weight}, undirected=True)
    assert dense(graph, "r").tolist() == [[0, 2], [2, 0]]


def test_weights_carry_no_gradient() -> None:
    weight = torch.ones(2, requires_grad=True)
    graph = MultiGraph.from_edge_index({"r": torch.tensor([[0, 1], [1, 0]])}, 2, edge_weight={"r": weight})
    assert not graph.weight("r").requires_grad


def test_no_relations() -> None:
    graph = MultiGraph.from_edge_index({}, 4)
    assert (graph.relations, graph.num_nodes, graph.num_edges()) == ((), 4, 0)
    assert graph.extend(2).num_nodes == 6


@pytest.mark.parametrize("relation", ["physicl", "Physical", "string12_physical"])
def test_unknown_relation_names_the_nearest(relation: str) -> None:
    with pytest.raises(ValueError, match=f"relation: unknown value '{relation}'.* did you mean 'physical'"):
        weighted().col(relation)


# ------------------------------------------------------------------------------------------------ derived quantities


def test_inv_mass_and_entropy_agree_with_dense() -> None:
    graph = weighted()
    for r, name in enumerate(graph.relations):
        mass = DENSE[name].sum(1)
        t = torch.where(mass[:, None] > 0, DENSE[name] / mass[:, None], 0)
        here = slice(r * N, (r + 1) * N)
        # float64 on both sides, sums of a row's edges: fewer than 1e4 roundings
        torch.testing.assert_close(graph.inv_mass[here], torch.where(mass > 0, 1 / mass, 0), rtol=1e-12, atol=0)
        torch.testing.assert_close(graph.entropy[here], torch.xlogy(t, t).sum(1), rtol=1e-12, atol=1e-12)


def dense_of_transpose(graph: MultiGraph, relation: str) -> Tensor:
    """A read column by column."""
    transpose, n = graph.transpose(), graph.num_nodes
    first = graph.relation_id(relation) * n
    _, _, weight = graph.stacked_by_column()
    a = torch.zeros(n, n, dtype=torch.float64)
    for j in range(n):
        for p in range(int(transpose.colptr[first + j]), int(transpose.colptr[first + j + 1])):
            a[int(transpose.row[p]), j] += float(weight[p])
    return a


def test_transpose_agrees_with_dense() -> None:
    graph = weighted()
    for name in EDGES:
        assert torch.equal(dense_of_transpose(graph, name), DENSE[name])
    assert graph.transpose() is graph.transpose()
    colptr, row, weight = graph.stacked_by_column()
    assert colptr is graph.transpose().colptr
    assert row is graph.transpose().row
    assert torch.equal(weight, graph.stacked[2][graph.transpose().edge])
    assert weight is graph.stacked_by_column()[2]


def test_rows_longer_than_a_segment_are_cut() -> None:
    """Two relations of four rows, the lengths beside the longest among them."""
    degree = [0, 8, 9, 1, 16, 17, 0, 60]
    segments = cut_rows(torch.tensor(degree), 4, longest=8)
    counts = [0, 0, 2, 0, 2, 3, 0, 8]
    assert segments.ptr.tolist() == [sum(counts[:i]) for i in range(9)]
    assert segments.row.tolist() == [2, 2, 4, 4, 5, 5, 5, *[7] * 8]
    assert segments.offset == (0, 2, 15)


@pytest.mark.parametrize("longest", [1, 7, 8])
def test_segments_are_even_and_no_longer_than_asked(longest: int) -> None:
    degree = torch.arange(70)
    count = cut_rows(degree, 70, longest).ptr.diff().tolist()
    for d, n in enumerate(count):
        lengths = [d * (s + 1) // n - d * s // n for s in range(n)]
        assert (n == 0) == (d <= longest)
        assert sum(lengths) == (d if n else 0)
        assert all(longest / 2 <= length <= longest for length in lengths)


def test_segments_of_rows_and_of_columns() -> None:
    """A row of exactly SEGMENT + 1 entries in one relation, a column of it in another, one entry fewer in the last."""
    n = SEGMENT + 1
    hub = torch.stack([torch.full((n,), 5), torch.arange(n)])
    graph = MultiGraph.from_edge_index({"rows": hub, "columns": hub.flip(0), "whole": hub[:, 1:]}, n)
    by_row, by_column = graph.segments
    assert (by_row.row.tolist(), by_row.offset) == ([5, 5], (0, 2, 2, 2))
    assert (by_column.row.tolist(), by_column.offset) == ([n + 5, n + 5], (0, 0, 2, 2))
    for segments, first in ((by_row, 5), (by_column, n + 5)):
        assert torch.equal(segments.ptr, 2 * (torch.arange(3 * n + 1) > first))


@pytest.mark.parametrize("edges", [{}, {"a": torch.empty(2, 0, dtype=torch.int64)}], ids=["no relations", "no edges"])
def test_no_segments(edges: dict[str, Tensor]) -> None:
    for segments in MultiGraph.from_edge_index(edges, 3).segments:
        assert segments.ptr.tolist() == [0] * (3 * len(edges) + 1)
        assert segments.row.numel() == 0
        assert segments.offset == (0,) * (len(edges) + 1)


# ----------------------------------------------------------------------------------------------------- known, extend


def test_known() -> None:
    known = torch.tensor([True] * 5 + [False, True])
    graph = MultiGraph.from_edge_index(INDEX, N, known={"regulatory": known})
    assert torch.equal(graph.known("regulatory"), known)
    assert bool(graph.known("physical").all())


def test_edge_at_an_unknown_gene_is_refused() -> None:
    known = torch.tensor([True] * 5 + [False, True])
    with pytest.raises(ValueError, match=r"edge_index\['physical'\]: position 4 holds the edge \[5, 4\]"):
        MultiGraph.from_edge_index(INDEX, N, known={"physical": known})


def test_extend_makes_new_genes_unknown() -> None:
    old = weighted()
    graph = old.extend(2)
    check_dense(graph, {name: torch.nn.functional.pad(a, (0, 2, 0, 2)) for name, a in DENSE.items()})
    for name in EDGES:
        assert graph.known(name).tolist() == [True] * N + [False] * 2
    check_dense(old, DENSE)  # the old graph is as it was


@pytest.mark.parametrize("undirected", [False, True, ["physical"]], ids=["directed", "undirected", "by-name"])
def test_extend_with_weighted_edges(undirected: Any) -> None:
    edges = {"physical": torch.tensor([[N, 3, N], [0, N + 1, 0]]), "regulatory": torch.tensor([[N], [N]])}
    weight = {"physical": torch.tensor([0.5, 2.0, 0.25])}
    graph = weighted().extend(3, edges, edge_weight=weight, undirected=undirected)
    expected = {name: torch.nn.functional.pad(a, (0, 3, 0, 3)) for name, a in DENSE.items()}
    expected["physical"][N, 0], expected["physical"][3, N + 1] = 0.75, 2
    if undirected:  # of the new edges alone
        expected["physical"][0, N], expected["physical"][N + 1, 3] = 0.75, 2
    expected["regulatory"][N, N] = 1
    check_dense(graph, expected)
    check_invariants(graph)
    assert graph.known("physical").tolist() == [True] * (N + 2) + [False]
    assert graph.known("regulatory").tolist() == [True] * (N + 1) + [False] * 2
    assert graph.known("empty").tolist() == [True] * N + [False] * 3


def test_extend_twice() -> None:
    once = weighted().extend(1)
    twice = once.extend(1, {"physical": torch.tensor([[N + 1], [N]])})  # the edge makes the first new gene known too
    assert twice.num_nodes == N + 2
    assert twice.known("physical").tolist() == [True] * (N + 2)
    assert twice.known("regulatory").tolist() == [True] * N + [False] * 2
    assert dense(twice, "physical")[N + 1, N] == 1
    assert torch.equal(dense(twice, "physical")[:N, :N], DENSE["physical"])


def test_extend_with_float64_weights_widens_the_graph() -> None:
    third = torch.tensor([1 / 3], dtype=torch.float64)
    graph = weighted().extend(1, {"empty": torch.tensor([[N], [0]])}, edge_weight={"empty": third})
    assert torch.equal(graph.weight("empty"), third)
    assert torch.equal(dense(graph, "physical")[:N, :N], DENSE["physical"])


def test_extend_refuses_edges_between_old_genes() -> None:
    with pytest.raises(ValueError, match=r"edge_index\['physical'\]: edge \[1, 2\] joins two genes that are not new"):
        weighted().extend(1, {"physical": torch.tensor([[N, 1], [0, 2]])})


def test_extended_row_targets_follow_the_new_edges() -> None:
    graph = weighted().extend(1, {"physical": torch.tensor([[0], [N]])})
    assert graph.inv_mass[0].item() == 1 / (1.25 + 1)


# ------------------------------------------------------------------------------------------------- subgraph, to, files


@pytest.mark.parametrize("available", [True, False], ids=["extension", "torch"])
@pytest.mark.parametrize("nodes", [[2, 0, 3], [6], [0, 2, 3], [5, 4, 3, 2, 1, 0]], ids=["three", "one", "ascending", "six"])
def test_subgraph_agrees_with_dense(nodes: list[int], available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellattn.graph.rows.AVAILABLE", available)
    known = torch.tensor([True] * 5 + [False, True])
    old = MultiGraph.from_edge_index(INDEX, N, edge_weight=WEIGHT, known={"empty": known})
    graph = old.subgraph(torch.tensor(nodes))
    check_dense(graph, {name: a[nodes][:, nodes] for name, a in DENSE.items()})
    assert torch.equal(graph.known("empty"), known[nodes])


def test_subgraph_of_no_relation() -> None:
    graph = MultiGraph.from_edge_index({}, N).subgraph(torch.tensor([3, 1]))
    assert (graph.num_nodes, graph.relations, graph.num_edges()) == (2, (), 0)


def test_to_the_same_device_is_the_same_graph() -> None:
    graph = weighted()
    assert graph.to("cpu") is graph
    assert graph.to(torch.device("cpu")) is graph
    assert graph.device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = {"physical": torch.rand(6, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 0.1}
    known = {"empty": torch.arange(N) < 4}
    graph = MultiGraph.from_edge_index(INDEX, N, edge_weight=weight, known=known).extend(1)
    graph.save(tmp_path / "graph.safetensors")
    loaded = MultiGraph.load(str(tmp_path / "graph.safetensors"))
    assert loaded == graph
    assert loaded.weight("physical").dtype == dtype
    assert os.listdir(tmp_path) == ["graph.safetensors"]


def test_save_and_load_names_of_any_script(tmp_path: Path) -> None:
    graph = MultiGraph.from_edge_index({"méthode Δ/1": torch.tensor([[0], [1]]), " ": torch.tensor([[1], [1]])}, 2)
    graph.save(tmp_path / "g")
    assert MultiGraph.load(tmp_path / "g") == graph


def test_save_replaces_the_old_file(tmp_path: Path) -> None:
    weighted().save(tmp_path / "g")
    weighted().extend(3).save(tmp_path / "g")
    assert MultiGraph.load(tmp_path / "g").num_nodes == N + 3


def test_saved_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    weighted().save(tmp_path / "g")
    assert (tmp_path / "g").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    weighted().save(tmp_path / "g")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="no space left"):
            weighted().extend(1).save(tmp_path / "g")
    assert MultiGraph.load(tmp_path / "g") == weighted()
    assert os.listdir(tmp_path) == ["g"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444 | 0o200, 0o777], ids=oct)
def test_a_file_that_is_there_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    weighted().save(tmp_path / "g")
    (tmp_path / "g").chmod(mode)
    weighted().extend(1).save(tmp_path / "g")
    assert stat.S_IMODE((tmp_path / "g").stat().st_mode) == mode
    assert MultiGraph.load(tmp_path / "g").num_nodes == N + 1


def test_new_content_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while it is being written: the mode of a private file is on the part before the content is."""
    path, modes = tmp_path / "g", list[int]()
    write_atomic(path, b"old")
    path.chmod(0o600)
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(stat.S_IMODE(os.fstat(fd).st_mode)))
    write_atomic(path, b"new")
    assert modes[0] == 0o600
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'") as caught:
        write_atomic(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == ["f"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("links", [1, 3])
@pytest.mark.parametrize("there", [True, False], ids=["there", "dangling"])
def test_links_are_written_through(tmp_path: Path, links: int, there: bool) -> None:
    (tmp_path / "store").mkdir()
    real = tmp_path / "store" / "real"
    if there:
        weighted().save(real)
    names = [tmp_path / f"link{i}" for i in range(links)]
    for name, target in zip(names, ["store/real", *(name.name for name in names)], strict=False):
        name.symlink_to(target)
    weighted().extend(2).save(names[-1])
    assert all(name.is_symlink() for name in names)
    assert not real.is_symlink()
    assert MultiGraph.load(real) == MultiGraph.load(names[-1]) == weighted().extend(2)
    assert os.listdir(tmp_path / "store") == ["real"]


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ELOOP))):
        weighted().save(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert (tmp_path / "a").is_symlink()


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="regular file"):
        weighted().save(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_file_without_leave_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighted().save(tmp_path / "g")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(PermissionError, match="g'"):
        weighted().extend(1).save(tmp_path / "g")
    assert MultiGraph.load(tmp_path / "g") == weighted()


def test_the_longest_name_of_a_file(tmp_path: Path) -> None:
    for name in ("g" * 255, "Δ" * 127):
        weighted().save(tmp_path / name)
        assert MultiGraph.load(tmp_path / name) == weighted()


def test_a_file_cut_or_rewritten_while_it_is_loaded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read of the file once its content is taken: it may be emptied in place at any later moment."""
    path = tmp_path / "g"
    large = MultiGraph.from_edge_index({"a": torch.randint(5000, (2, 100_000))}, 5000)
    large.save(path)
    read = Path.read_bytes

    def read_and_cut(file: Path) -> bytes:
        content = read(file)
        os.truncate(file, 0)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_and_cut)
        assert MultiGraph.load(path) == large
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        MultiGraph.load(path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    weighted().save(tmp_path / "g")
    content = (tmp_path / "g").read_bytes()
    for length in range(len(content)):
        (tmp_path / "part").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"path: '.*part'"):
            MultiGraph.load(tmp_path / "part")


@pytest.mark.parametrize("with_names", [False, True], ids=["plain", "names"])
def test_every_flipped_bit_is_found(tmp_path: Path, with_names: bool) -> None:
    graph = named() if with_names else weighted()
    graph.save(tmp_path / "g")
    content = (tmp_path / "g").read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            loaded = MultiGraph.load(tmp_path / "damaged")
        except ValueError as error:
            assert "damaged'" in str(error)  # noqa: PT017 (a flip in the padding of the header does no harm)
        else:
            assert loaded == graph, f"byte {position}"


@pytest.mark.parametrize("content", [b"", b"YAL001C\tYAL002W\n" * 10, bytes(100)], ids=["empty", "text", "zeros"])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(ValueError, match=r"path: '.*foreign'"):
        MultiGraph.load(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "format"),
        ({"format": "other"}, "other"),
        ({"format": "cellattn.MultiGraph/1"}, "crc32"),
        ({"format": "cellattn.MultiGraph/1", "relations": '["r"]', "crc32": "00000000"}, "checksum"),
    ],
    ids=["none", "other-format", "no-checksum", "wrong-checksum"],
)
def test_safetensors_file_of_something_else(tmp_path: Path, metadata: dict[str, str] | None, words: str) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, tmp_path / "model", metadata)
    with pytest.raises(ValueError, match=rf"path: '.*model'.*{words}"):
        MultiGraph.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("relations", "change", "words"),
    [
        (("r", "r"), {}, "distinct"),
        (("r", "s"), {"rowptr": torch.tensor([0, 1, 1, 0, 1])}, "rise"),
        (("r", "s"), {"rowptr": torch.tensor([1, 1, 1, 1, 1])}, "rise"),
        (("r", "s"), {"rowptr": torch.tensor([0, 1, 1, 1])}, "rowptr: expected 5"),
        (("r", "s"), {"rowptr": torch.tensor([0, 1, 1, 1, 2])}, "lengths"),
        (("r", "s"), {"rowptr": torch.tensor([0.0, 1, 1, 1, 1])}, "rowptr"),
        (("r", "s"), {"col": torch.tensor([2], dtype=torch.int32)}, "holds 2"),
        (("r", "s"), {"col": torch.tensor([-1], dtype=torch.int32)}, "holds -1"),
        (("r", "s"), {"weight": torch.tensor([torch.nan])}, "holds nan"),
        (("r", "s"), {"weight": torch.tensor([1])}, "weight"),
        (("r", "s"), {"known": torch.ones(3, 2, dtype=torch.bool)}, "known: expected 2 rows"),
        (("r", "s"), {"known": torch.zeros(2, 2, dtype=torch.bool)}, "unknown"),
        (("r", 3), {}, "int 3"),
        (("r", "s"), {"extra": torch.ones(1)}, "extra"),
    ],
    ids=[
        "names-twice", "falling", "not-from-0", "short", "wrong-end", "float", "col-large", "col-negative", "weight-nan",
        "weight-int", "known-rows", "edge-unknown", "name-int", "extra",
    ],
)  # fmt: skip
def test_file_with_impossible_arrays(tmp_path: Path, relations: Any, change: dict[str, Tensor], words: str) -> None:
    import json
    import zlib

    from safetensors.torch import save_file

    arrays = {
        "rowptr": torch.tensor([0, 1, 1, 1, 1]),
        "col": torch.tensor([1], dtype=torch.int32),
        "weight": torch.ones(1),
        "known": torch.ones(2, 2, dtype=torch.bool),
        **change,
    }
    names = json.dumps(list(relations))
    crc = zlib.crc32(names.encode())
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].numpy().tobytes(), crc)
    metadata = {"format": "cellattn.MultiGraph/1", "relations": names, "crc32": f"{crc:08x}"}
    save_file(arrays, tmp_path / "g", metadata)
    with pytest.raises(ValueError, match=rf"path: '.*g' holds no valid MultiGraph.*{words}"):
        MultiGraph.load(tmp_path / "g")


# --------------------------------------------------------------------------------------------------------------- names

NAMES = [f"Y{i}" for i in range(N)]


def named(**options: Any) -> MultiGraph:
    return weighted(names=GeneList(NAMES, aliases={"TFC3": "Y3", "é": "Y5"}), **options)


def test_names_are_taken_by_every_constructor() -> None:
    matrices = {name: sp.coo_matrix(a.numpy()) for name, a in DENSE.items()}
    sparse = {name: a.to_sparse() for name, a in DENSE.items()}
    graphs = {name: nx.from_scipy_sparse_array(a, create_using=nx.DiGraph) for name, a in matrices.items()}
    for graph in (
        MultiGraph.from_edge_index(INDEX, N, names=NAMES),
        MultiGraph.from_scipy(matrices, names=NAMES),
        MultiGraph.from_sparse_tensor(sparse, names=NAMES),
        MultiGraph.from_networkx(graphs, range(N), names=NAMES),
    ):
        assert graph.names == GeneList(NAMES)
    assert weighted().names is None


def test_hetero_data_brings_its_names() -> None:
    data = pytest.importorskip("torch_geometric.data").HeteroData()
    data["gene", "physical", "gene"].edge_index = INDEX["physical"]
    data["gene"].num_nodes = N
    assert MultiGraph.from_hetero_data(data).names is None
    data["gene"].node_ids = NAMES
    assert MultiGraph.from_hetero_data(data).names == GeneList(NAMES)
    data["gene"].node_ids = np.array(NAMES)
    assert MultiGraph.from_hetero_data(data).names == GeneList(NAMES)
    other = NAMES[::-1]
    assert MultiGraph.from_hetero_data(data, names=other).names == GeneList(other)
    data["gene"].node_ids = NAMES[1:]
    with pytest.raises(ValueError, match="names: expected 7, one a gene, got 6"):
        MultiGraph.from_hetero_data(data)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (NAMES[:-1], ValueError, "names: expected 7, one a gene, got 6"),
        (["Y0"] * N, ValueError, "names: 'Y0' stands at positions 0 and 1"),
        ("YAL001C", TypeError, "names: expected several gene names"),
        (range(N), TypeError, "names: expected a string at position 0, got int 0"),
        (7, TypeError, "names: expected a GeneList or a sequence of names, got int 7"),
    ],
    ids=["few", "twice", "one", "numbers", "number"],
)
def test_names_that_are_none(names: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MultiGraph.from_edge_index(INDEX, N, names=names)


def test_names_travel(tmp_path: Path) -> None:
    graph = named()
    assert graph.names is not None
    assert graph.subgraph(torch.tensor([5, 0, 3])).names == GeneList(["Y5", "Y0", "Y3"], aliases={"TFC3": "Y3", "é": "Y5"})
    assert graph.extend(2).names == graph.names.extend(["new1", "new2"])
    assert graph.extend(1).extend(1).names == graph.names.extend(["new1", "new2"])
    assert graph.extend(1, names=["GFP"]).names == graph.names.extend(["GFP"])
    graph.save(tmp_path / "g")
    loaded = MultiGraph.load(tmp_path / "g")
    assert loaded == graph
    assert loaded.names is not None
    assert loaded.names.index(["TFC3", "é"]).tolist() == [3, 5]
    for copied in (copy.copy(graph), copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), graph.to("cpu")):
        assert copied.names == graph.names
    with pytest.raises(ValueError, match="names: expected 2, one a gene, got 1"):
        graph.extend(2, names=["GFP"])
    with pytest.raises(ValueError, match="'Y1' stands at positions 1 and 7"):
        graph.extend(1, names=["Y1"])
    with pytest.raises(ValueError, match="names: the graph has none"):
        weighted().extend(1, names=["GFP"])


def test_a_graph_without_names_has_the_file_that_it_had(tmp_path: Path) -> None:
    weighted().save(tmp_path / "g")
    assert b"cellattn.MultiGraph/1" in (tmp_path / "g").read_bytes()
    assert b"names" not in (tmp_path / "g").read_bytes()


def test_an_old_pickle_has_no_names() -> None:
    graph = weighted()
    del graph.__dict__["names"]
    assert pickle.loads(pickle.dumps(graph)).names is None


def test_digest_is_of_all_that_a_graph_is(tmp_path: Path) -> None:
    graph = named()
    graph.save(tmp_path / "g")
    assert graph.digest() == named().digest() == MultiGraph.load(tmp_path / "g").digest() == copy.deepcopy(graph).digest()
    others = [
        weighted(),
        weighted(names=NAMES[::-1]),
        named(undirected=True),
        named(known={"empty": torch.arange(N) > 0}),
        MultiGraph.from_edge_index(INDEX, N, names=NAMES),
        MultiGraph.from_edge_index({name + "'": index for name, index in INDEX.items()}, N, edge_weight={}, names=NAMES),
        graph.subgraph(torch.arange(N).flip(0)),
        graph.extend(1),
        MultiGraph.from_edge_index(INDEX, N, edge_weight={k: w.double() for k, w in WEIGHT.items()}, names=NAMES),
    ]
    digests = {graph.digest(), *(other.digest() for other in others)}
    assert len(digests) == 1 + len(others)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


# -------------------------------------------------------------------------------------------------------- Python's own


@pytest.mark.parametrize(
    "other",
    [
        MultiGraph.from_edge_index(INDEX, N),
        weighted().extend(1),
        weighted(undirected=True),
        MultiGraph.from_edge_index(dict(reversed(INDEX.items())), N, edge_weight=WEIGHT),
        MultiGraph.from_edge_index({k: INDEX[k] for k in ("physical", "regulatory")}, N, edge_weight={}),
        weighted(known={"empty": torch.arange(N) > 0}),
        named(),
        "physical",
        None,
    ],
    ids=["weights", "nodes", "edges", "order", "relations", "known", "names", "str", "none"],
)
def test_unequal(other: Any) -> None:
    assert weighted() != other
    assert other != weighted()


def test_equal() -> None:
    graph = weighted()
    graph.transpose()  # what is kept for later is no part of the value
    assert graph == weighted()


def test_unhashable() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(weighted())


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))], ids=["copy", "deepcopy", "pickle"]
)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_copies(copied: Callable[[MultiGraph], MultiGraph], transposed: bool) -> None:
    graph = weighted()
    if transposed:
        graph.transpose()
    other = copied(graph)
    assert other == graph
    assert torch.equal(other.inv_mass, graph.inv_mass)
    assert torch.equal(other.transpose().edge, graph.transpose().edge)
    assert other.relation_id("regulatory") == 1


def test_repr() -> None:
    lines = repr(weighted(known={"empty": torch.arange(N) > 0})).splitlines()
    assert lines[0] == "MultiGraph(num_nodes=7, num_edges=7, device=cpu)"
    assert repr(named()).startswith(lines[0][:-1] + ", names=GeneList(7 genes: Y0, Y1, Y2, ...))\n")
    assert lines[1].split() == ["relation", "genes", "edges", "mean", "deg", "max", "deg", "unknown"]
    assert lines[2].split() == ["physical", "6", "5", "1.2", "2", "0"]
    assert lines[3].split() == ["regulatory", "3", "2", "1.0", "1", "0"]
    assert lines[4].split() == ["empty", "0", "0", "0.0", "0", "1"]
    assert len({len(line) for line in lines[1:]}) == 1, "columns stand below each other"


# ---------------------------------------------------------------------------------------------------------- properties


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


@settings(max_examples=60)
@given(edge_lists(), st.booleans(), st.booleans())
def test_random_graphs_agree_with_dense(
    edges: tuple[int, dict[str, Tensor], dict[str, Tensor]], with_weights: bool, undirected: bool
) -> None:
    n, index, weight = edges
    graph = MultiGraph.from_edge_index(index, n, edge_weight=weight if with_weights else None, undirected=undirected)
    check_invariants(graph)
    expected = {}
    for name in index:
        if with_weights:
            a = dense_of_edges(index[name], weight[name], n)
        else:
            a = (dense_of_edges(index[name], torch.ones(index[name].shape[1]), n) > 0).double()
        expected[name] = torch.maximum(a, a.t()) if undirected else a
    check_dense(graph, expected)


@settings(max_examples=60)
@given(edge_lists())
def test_random_graphs_come_back(tmp_path_factory: Any, edges: tuple[int, dict[str, Tensor], dict[str, Tensor]]) -> None:
    n, index, weight = edges
    graph = MultiGraph.from_edge_index(index, n, edge_weight=weight)
    matrices, graphs = {}, {}
    for name in graph.relations:
        rows, cols = graph.edge_index(name).numpy()
        matrices[name] = sp.coo_matrix((graph.weight(name).numpy(), (rows, cols)), shape=(n, n))
        graphs[name] = nx.from_scipy_sparse_array(matrices[name], create_using=nx.DiGraph)
    assert MultiGraph.from_scipy(matrices) == graph
    assert MultiGraph.from_networkx(graphs, range(n)) == graph
    assert MultiGraph.from_edge_index({name: graph.edge_index(name) for name in index}, n,
                                      edge_weight={name: graph.weight(name) for name in index}) == graph  # fmt: skip
    path = tmp_path_factory.mktemp("graph") / "g"
    graph.save(path)
    assert MultiGraph.load(path) == graph


@settings(max_examples=60)
@given(edge_lists())
def test_transpose_twice_is_the_graph(edges: tuple[int, dict[str, Tensor], dict[str, Tensor]]) -> None:
    n, index, weight = edges
    graph = MultiGraph.from_edge_index(index, n, edge_weight=weight)
    flipped_index, flipped_weight = {}, {}
    transpose = graph.transpose()
    for name in graph.relations:
        assert torch.equal(dense_of_transpose(graph, name), dense(graph, name))
        first = graph.relation_id(name) * n
        colptr = transpose.colptr[first : first + n + 1]
        entries = slice(int(colptr[0]), int(colptr[-1]))
        col = torch.arange(n).repeat_interleave(colptr.diff())
        flipped_index[name] = torch.stack([col, transpose.row[entries].long()])
        flipped_weight[name] = graph.stacked[2][transpose.edge[entries]]
    flipped = MultiGraph.from_edge_index(flipped_index, n, edge_weight=flipped_weight)
    for name in graph.relations:
        assert torch.equal(dense_of_transpose(flipped, name).t(), dense(graph, name))
        assert torch.equal(flipped.edge_index(name), flipped_index[name]), "columns are sorted, rows ascend within them"


@settings(max_examples=60)
@given(edge_lists(), st.randoms(use_true_random=False))
def test_order_of_the_input_does_not_matter(edges: tuple[int, dict[str, Tensor], dict[str, Tensor]], random: Any) -> None:
    n, index, weight = edges
    # Weights whose float32 sums depend on the order of summation.
    rough = {name: w * 0.1 for name, w in weight.items()}
    graph = MultiGraph.from_edge_index(index, n, edge_weight=rough)
    shuffled_index, shuffled_weight = {}, {}
    for name in index:
        order = list(range(index[name].shape[1]))
        random.shuffle(order)
        at = torch.tensor(order, dtype=torch.int64)
        shuffled_index[name], shuffled_weight[name] = index[name][:, at], rough[name][at]
    assert MultiGraph.from_edge_index(shuffled_index, n, edge_weight=shuffled_weight) == graph


@settings(max_examples=60)
@given(edge_lists(), st.randoms(use_true_random=False))
def test_trivial_extension_and_subgraphs(edges: tuple[int, dict[str, Tensor], dict[str, Tensor]], random: Any) -> None:
    n, index, weight = edges
    graph = MultiGraph.from_edge_index(index, n, edge_weight=weight)
    assert graph.extend(0) == graph
    assert graph.subgraph(torch.arange(n)) == graph
    assert graph.extend(3).subgraph(torch.arange(n)) == graph
    order = list(range(n))
    random.shuffle(order)
    there = torch.tensor(order)
    assert graph.subgraph(there).subgraph(there.argsort()) == graph


META = torch.empty(2, 3, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    "build",
    [
        lambda: MultiGraph.from_edge_index({"a": META}, N),
        lambda: MultiGraph.from_edge_index({"a": META[:, :0]}, N),
        lambda: MultiGraph.from_edge_index(INDEX, N, edge_weight={"physical": torch.ones(6, device="meta")}),
        lambda: MultiGraph.from_edge_index(INDEX, N, known={"physical": torch.ones(N, dtype=torch.bool, device="meta")}),
        lambda: MultiGraph.from_sparse_tensor({"a": torch.sparse_coo_tensor(META, torch.ones(3, device="meta"), (N, N))}),
        lambda: MultiGraph.from_sparse_tensor({"a": torch.eye(N).to_sparse_csr().to("meta")}),
        lambda: weighted().extend(1, {"physical": META}),
        lambda: weighted().subgraph(META[0]),
        lambda: weighted().to("meta"),
    ],
    ids=["index", "no-edges", "weight", "known", "sparse", "csr", "extend", "subgraph", "to"],
)
def test_tensors_without_values_are_refused(build: Callable[[], MultiGraph]) -> None:
    with pytest.raises(ValueError, match="meta"):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda path: weighted(undirected=True),
        lambda path: weighted().extend(1, {"physical": INDEX["physical"].new_tensor([[0], [N]])}),
        lambda path: weighted().subgraph(INDEX["physical"][0].unique()),
        lambda path: MultiGraph.from_networkx({"a": nx.path_graph(3)}, [0, 1, 2]),
        lambda path: MultiGraph.from_scipy({"a": sp.eye(3, format="coo")}),
        MultiGraph.load,
    ],
    ids=["from_edge_index", "extend", "subgraph", "from_networkx", "from_scipy", "load"],
)
def test_a_default_device_changes_nothing(tmp_path: Path, build: Callable[[Path], MultiGraph]) -> None:
    """As where a model is made under `with torch.device("meta")`: the arrays stay where those that came are."""
    weighted().save(tmp_path / "g")
    want = build(tmp_path / "g")
    with torch.device("meta"):
        got = build(tmp_path / "g")
        name = got.relations[0]
        sparse = got[name].to_sparse_csr()
    assert got == want
    assert got.device.type == sparse.device.type == "cpu"
    assert torch.equal(sparse.values(), want.weight(name))
