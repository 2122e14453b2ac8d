"""A graph as a mapping, from arrays, and through PyTorch's own files."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import cellattn
from cellattn import MultiGraph
from cellattn.data import GeneList

from .samples import INDEX, NAMES, WEIGHT, N, dense, named, weighted


def test_a_graph_is_a_mapping_of_its_relations() -> None:
    graph = named(known={"empty": torch.arange(N) < 5})
    assert list(graph) == list(graph.relations)
    assert len(graph) == 3
    assert "physical" in graph
    assert "psysical" not in graph
    assert 0 not in graph
    with pytest.raises(ValueError, match=r"unknown value 'psysical'.*did you mean 'physical'"):
        graph["psysical"]
    for name in graph:
        one = graph[name]
        assert torch.equal(one.edge_index, graph.edge_index(name))
        assert torch.equal(one.rowptr, graph.rowptr(name))
        assert one.col.data_ptr() == graph.col(name).data_ptr(), "no copy"
        assert torch.equal(one.weight, graph.weight(name))
        assert torch.equal(one.known, graph.known(name))
        assert torch.equal(one.degree, graph.degree(name))
        assert one.num_edges == graph.num_edges(name)
        assert torch.equal(one.to_sparse_csr().to_dense().double(), dense(graph, name))
    assert repr(graph["physical"]) == "Relation('physical', num_nodes=7, num_edges=5, device=cpu)"


def test_a_graph_without_relations_is_there() -> None:
    graph = MultiGraph.from_edge_index({}, 3)
    assert len(graph) == 0
    assert graph


def test_numpy_arrays_go_in() -> None:
    index: dict[str, Any] = {name: x.numpy() for name, x in INDEX.items()}
    index["physical"].setflags(write=False)
    weight: dict[str, Any] = {name: x.numpy() for name, x in WEIGHT.items()}
    known: dict[str, Any] = {"empty": np.arange(N) < 5}
    graph = MultiGraph.from_edge_index(index, N, edge_weight=weight, known=known)
    assert graph == weighted(known={name: torch.from_numpy(x) for name, x in known.items()})
    nodes: Any = np.array([3, 0])
    edge: Any = np.array([[7], [0]])
    wrong: Any = np.zeros((2, 1))
    assert graph.subgraph(nodes) == graph.subgraph(torch.tensor([3, 0]))
    assert graph.extend(1, {"physical": edge}) == graph.extend(1, {"physical": torch.tensor([[7], [0]])})
    with pytest.raises(ValueError, match=r"edge_index\['a'\]: expected dtype int64 or int32, got a float64 tensor"):
        MultiGraph.from_edge_index({"a": wrong}, N)
    with pytest.raises(TypeError, match=r"edge_index\['a'\]: expected a tensor, got ndarray"):
        MultiGraph.from_edge_index({"a": wrong.astype(str)}, N)


def test_numpy_sets_go_into_the_khop_ops() -> None:
    graph = weighted()
    seeds: Any = np.array([1, 4, 5])
    ptr: Any = np.array([0, 1, 3])
    tensors = torch.from_numpy(seeds), torch.from_numpy(ptr)
    assert torch.equal(cellattn.khop_mask(graph, seeds, ptr, 1), cellattn.khop_mask(graph, *tensors, 1))
    assert torch.equal(cellattn.khop_subgraph(graph, seeds, ptr, 1).node, cellattn.khop_subgraph(graph, *tensors, 1).node)
    assert torch.equal(cellattn.perturbation_mask(graph, seeds, ptr)[0], cellattn.perturbation_mask(graph, *tensors)[0])


def test_subgraphs_of_some_relations() -> None:
    graph, seeds, ptr = weighted(undirected=True), torch.tensor([1, 6]), torch.tensor([0, 1, 2])
    for relations in (["regulatory"], ["regulatory", "physical"]):
        got = cellattn.khop_subgraph(graph, seeds, ptr, 2, relations=relations)
        want = cellattn.khop_subgraph(MultiGraph.from_edge_index(
            {name: graph.edge_index(name) for name in relations}, N), seeds, ptr, 2)  # fmt: skip
        assert got.relations == tuple(relations)
        assert torch.equal(got.node, want.node)
        assert all(torch.equal(got.edge_index[name], want.edge_index[name]) for name in relations)
    assert graph.select(["regulatory"]) is graph.select(("regulatory",)), "made once"
    with pytest.raises(ValueError, match="unknown value 'x'"):
        cellattn.khop_subgraph(graph, seeds, ptr, 2, relations=["x"])


def test_some_edge_types_of_hetero_data() -> None:
    data = pytest.importorskip("torch_geometric.data").HeteroData()
    data["gene"].num_nodes, data["term"].num_nodes = N, 3
    for name, index in INDEX.items():
        data["gene", name, "gene"].edge_index = index
    data["gene", "annotated", "term"].edge_index = torch.tensor([[0], [2]])
    assert MultiGraph.from_hetero_data(data).num_nodes == N + 3
    graph = MultiGraph.from_hetero_data(data, relations=["regulatory", "physical"])
    assert graph == MultiGraph.from_edge_index(INDEX, N).select(["regulatory", "physical"])
    with pytest.raises(ValueError, match="relations: unknown value 'annotate', expected one of 'physical', "):
        MultiGraph.from_hetero_data(data, relations=["annotate"])
    with pytest.raises(TypeError, match="relations: expected a sequence of names, got str"):
        MultiGraph.from_hetero_data(data, relations="physical")


def test_hetero_data_that_lacks_something_says_what() -> None:
    data = pytest.importorskip("torch_geometric.data").HeteroData()
    data["gene", "physical", "gene"].edge_index = INDEX["physical"]
    with pytest.raises(ValueError, match=r"data: node type 'gene' has edges, but no size; set data\['gene'\]\.num_nodes"):
        MultiGraph.from_hetero_data(data)
    data["gene"].num_nodes = N
    del data["gene", "physical", "gene"].edge_index
    data["gene", "physical", "gene"].adj_t = torch.eye(N).to_sparse_csr()
    with pytest.raises(ValueError, match="has no edge_index, but adj_t, its transpose: undo ToSparseTensor"):
        MultiGraph.from_hetero_data(data)


def test_arrays_of_the_other_byte_order() -> None:
    index: Any = {name: x.numpy().astype(x.numpy().dtype.newbyteorder()) for name, x in INDEX.items()}
    assert MultiGraph.from_edge_index(index, N) == MultiGraph.from_edge_index(INDEX, N)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_torch_save_is_read_with_weights_only(used: bool) -> None:
    graph = named(known={"empty": torch.arange(N) < 5})
    if used:  # with all that is kept for later
        _ = graph.digest(), graph.stacked_by_column(), graph.select(["empty"]), graph._lightest
    file = io.BytesIO()
    torch.save({"graph": graph, "genes": GeneList(NAMES), "relation": graph["physical"]}, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    assert read["graph"] == graph
    assert read["graph"].names == graph.names
    assert read["genes"] == GeneList(NAMES)
    assert torch.equal(read["relation"].col, graph.col("physical"))
    assert read["graph"].hops("physical", 2) == graph.hops("physical", 2)
    assert torch.equal(read["graph"].transpose().edge, graph.transpose().edge)


def test_what_was_selected_is_not_pickled() -> None:
    graph = named()
    size = len(pickle.dumps(graph))
    graph.select(["physical"])
    assert len(pickle.dumps(graph)) == size
