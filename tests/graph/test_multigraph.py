"""MultiGraph against dense adjacency matrices, and its invariants on random multigraphs."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cellattn import MultiGraph
from cellattn.data import GeneList
from cellattn.graph import SEGMENT, cut_rows

from .samples import (
    DENSE,
    EDGES,
    INDEX,
    NAMES,
    WEIGHT,
    N,
    check_dense,
    check_invariants,
    dense,
    dense_of_edges,
    edge_lists,
    named,
    weighted,
)


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


# -------------------------------------------------------------------------------------------------------- subgraph, to


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


# ---------------------------------------------------------------------------------------------------------------- names


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


# ----------------------------------------------------------------------------------------------------------- properties


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
