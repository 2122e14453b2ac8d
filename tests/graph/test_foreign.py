"""Graphs of scipy, networkx, PyG and of sparse tensors are those of their edges."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from cellattn import MultiGraph
from cellattn.data import GeneList

from .samples import DENSE, EDGES, INDEX, NAMES, WEIGHT, N, check_dense, check_invariants, dense, weighted


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


CONSTRUCTORS: dict[str, Callable[[], MultiGraph]] = {
    "edge_index": weighted,
    "edge_index-int32": lambda: MultiGraph.from_edge_index({k: v.int() for k, v in INDEX.items()}, N, edge_weight=WEIGHT),
    "scipy-csr_matrix": lambda: MultiGraph.from_scipy(scipy_matrices("csr_matrix")),
    "scipy-coo_matrix": lambda: MultiGraph.from_scipy(scipy_matrices("coo_matrix")),
    "scipy-csc_array": lambda: MultiGraph.from_scipy(scipy_matrices("csc_array")),
    "scipy-lil_matrix": lambda: MultiGraph.from_scipy(scipy_matrices("lil_matrix")),
    "networkx-multidigraph": lambda: MultiGraph.from_networkx(networkx_graphs(nx.MultiDiGraph), NAMES),
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
        graph.add_nodes_from(NAMES)
    # networkx counts the self-loop of an undirected graph once in to_numpy_array, as one entry of the matrix
    expected = {name: torch.from_numpy(nx.to_numpy_array(graph, nodelist=NAMES)) for name, graph in graphs.items()}
    check_dense(MultiGraph.from_networkx(graphs, NAMES), expected)


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


def test_every_constructor_takes_undirected_reduce() -> None:
    options: dict[str, Any] = {"undirected": True, "undirected_reduce": "sum"}
    want = weighted(**options)
    assert MultiGraph.from_scipy(scipy_matrices("csr_matrix"), **options) == want
    assert MultiGraph.from_sparse_tensor({name: sparse_tensor(name) for name in EDGES}, **options) == want
    assert MultiGraph.from_networkx(networkx_graphs(nx.MultiDiGraph), NAMES, **options) == want
    assert MultiGraph.from_hetero_data(hetero_data(), **options) == want
    loop = {"physical": torch.tensor([[N, N, 0], [N, 0, N]])}
    extended = weighted().extend(1, loop, edge_weight={"physical": torch.tensor([1.0, 2, 4])}, **options)
    assert dense(extended, "physical")[N].tolist() == [6, *[0] * (N - 1), 2]
    with pytest.raises(ValueError, match="undirected_reduce: unknown value 'mean', expected one of 'max', 'sum'"):
        weighted(undirected_reduce="mean")


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
