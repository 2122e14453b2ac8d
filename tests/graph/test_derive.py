"""Relations made from relations, against dense matrices and networkx; random graphs, against what they have to keep."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cellattn import MultiGraph
from cellattn.data import synthetic_cell
from cellattn.graph import derive

from ..compare import random_graph
from .samples import INDEX, NAMES, WEIGHT, N, check_dense, check_invariants, dense, edge_lists, named, weighted

EdgeLists = tuple[int, dict[str, Tensor], dict[str, Tensor]]


def graph_of(edges: EdgeLists, **options: Any) -> MultiGraph:
    n, index, weight = edges
    return MultiGraph.from_edge_index(index, n, edge_weight=weight, **options)


@pytest.fixture(params=[1 << 22, 3], ids=["one-block", "many-blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(derive, "_BLOCK", request.param)
    return int(request.param)


def changed(graph: MultiGraph, make: Callable[[MultiGraph], MultiGraph], expected: Callable[[Tensor], Tensor]) -> None:
    new = make(graph)
    check_invariants(new)
    check_dense(new, {name: expected(dense(graph, name)) for name in graph.relations})
    assert torch.equal(new.stacked[0], new.stacked[0].sort().values)
    assert new.names == graph.names


def reached(a: Tensor, k: int) -> Tensor:
    """float64 [N, N]: 1 where a walk of 1 to k edges leads from i to j."""
    power = total = (a > 0).double()
    for _ in range(k - 1):
        power = ((power @ (a > 0).double()) > 0).double()
        total = total + power
    return (total > 0).double()


# --------------------------------------------------------------------------------------------------------------- targets


@settings(max_examples=60)
@given(edge_lists(), st.integers(1, 5), st.booleans(), st.sampled_from([1, 5, 1 << 22]))
def test_hops_are_walks(edges: EdgeLists, k: int, undirected: bool, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derive, "_BLOCK", block)
        changed(graph_of(edges, undirected=undirected), lambda g: g.hops(None, k), lambda a: reached(a, k))


@pytest.mark.parametrize("k", [1, 2, 3, 50])
def test_hops_agree_with_networkx(k: int) -> None:
    graph = synthetic_cell(num_genes=90).select(["regulatory", "string12_fusion"]).without_self_loops(None)
    far = graph.hops(None, k)
    for name in graph.relations:
        g = nx.DiGraph(graph.edge_index(name).t().tolist())
        expected = set()
        for i in g:
            # a shortest walk back to i is one edge and a shortest path
            length = nx.single_source_shortest_path_length(g, i)
            back = min((length[j] + 1 for j in g.predecessors(i) if j in length), default=k + 1)
            expected |= {(i, j) for j, steps in length.items() if 0 < steps <= k} | ({(i, i)} if back <= k else set())
        assert set(map(tuple, far.edge_index(name).t().tolist())) == expected
        assert (far.weight(name) == 1).all()


def test_a_gene_reaches_itself_along_a_cycle_alone() -> None:
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 1, 2, 3, 4], [1, 2, 0, 4, 4]])}, 5)
    assert [dense(graph.hops("a", k), "a").diagonal().tolist() for k in (1, 2, 3)] == [
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1],
        [1, 1, 1, 0, 1],
    ]


def test_two_hops_of_a_hub_are_nearly_all_pairs() -> None:
    n = 500
    star = torch.stack([torch.zeros(n - 1, dtype=torch.int64), torch.arange(1, n)])
    graph = MultiGraph.from_edge_index({"star": star}, n, undirected=True)
    far = graph.hops("star", 2)
    assert far.num_edges("star") == n * n
    assert torch.equal(far.symmetrized("star").col("star"), far.col("star"))


@pytest.mark.usefixtures("block")
def test_symmetrized() -> None:
    changed(named(), lambda g: g.symmetrized(None), lambda a: torch.maximum(a, a.t()))


@settings(max_examples=40)
@given(edge_lists(), st.sampled_from([1, 5, 1 << 22]))
def test_symmetrized_and_loops_on_random_graphs(edges: EdgeLists, block: int) -> None:
    n, graph = edges[0], graph_of(edges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derive, "_BLOCK", block)
        changed(graph, lambda g: g.symmetrized(None), lambda a: torch.maximum(a, a.t()))
        changed(graph, lambda g: g.without_self_loops(None), lambda a: a - a.diagonal().diag())
        loops = torch.eye(n, dtype=torch.float64)
        changed(graph, lambda g: g.with_self_loops(None), lambda a: torch.where((loops > 0) & (a == 0), loops, a))
    assert graph.symmetrized(None) == graph_of(edges, undirected=True)


def test_no_loop_at_an_unknown_gene() -> None:
    known = torch.arange(N) != 3
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 1], [1, 1]])}, N, known={"a": known}).extend(1)
    looped = graph.with_self_loops("a")
    assert looped.known("a").tolist() == [*known.tolist(), False]
    assert dense(looped, "a").diagonal().tolist() == [1, 1, 1, 0, 1, 1, 1, 0]
    assert looped.hops("a", 2).num_known("a") == N - 1


MAKERS: dict[str, Callable[[MultiGraph, Any], MultiGraph]] = {
    "hops": lambda g, names: g.hops(names, 2),
    "symmetrized": lambda g, names: g.symmetrized(names),
    "with_self_loops": lambda g, names: g.with_self_loops(names),
    "without_self_loops": lambda g, names: g.without_self_loops(names),
    "rewired": lambda g, names: g.rewired(names, seed=3),
    "permuted": lambda g, names: g.permuted(names, seed=3),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_one_relation_several_or_all(make: Callable[[MultiGraph, Any], MultiGraph]) -> None:
    graph = named(known={"empty": torch.arange(N) < 5})
    everything = make(graph, None)
    assert everything.relations == graph.relations
    assert make(graph, list(graph.relations)) == everything
    assert make(graph, ()) == graph
    for chosen in (["regulatory"], ["regulatory", "physical"]):
        new = make(graph, chosen)
        for name in graph.relations:
            assert new.select([name]) == (everything if name in chosen else graph).select([name])
        assert new.names == graph.names
    assert make(graph, "physical") == make(graph, ["physical"])
    with pytest.raises(ValueError, match=r"relation: unknown value 'psysical'.*did you mean 'physical'"):
        make(graph, "psysical")
    with pytest.raises(ValueError, match="relation: unknown value 7"):
        make(graph, ["physical", 7])
    with pytest.raises(TypeError, match="relation: expected a name, several or None, got int 7"):
        make(graph, 7)
    assert make(MultiGraph.from_edge_index({}, 3), None) == MultiGraph.from_edge_index({}, 3)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_float64_weights_stay_so(make: Callable[[MultiGraph, Any], MultiGraph]) -> None:
    graph = MultiGraph.from_edge_index(INDEX, N, edge_weight={name: w.double() for name, w in WEIGHT.items()})
    assert make(graph, "physical").weight("physical").dtype == torch.float64


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_hops_that_are_none(k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"k: expected"):
        weighted().hops("physical", k)


# -------------------------------------------------------------------------------------------------------------- controls


@settings(max_examples=80)
@given(edge_lists(), st.booleans(), st.integers(0, 3))
def test_rewired_keeps_what_it_should(edges: EdgeLists, undirected: bool, seed: int) -> None:
    graph = graph_of(edges, undirected=undirected)
    new = graph.rewired(None, seed)
    check_invariants(new)
    for name in graph.relations:
        a, b = dense(graph, name), dense(new, name)
        assert torch.equal((a > 0).sum(0), (b > 0).sum(0))
        assert torch.equal((a > 0).sum(1), (b > 0).sum(1))
        assert torch.equal(a.diagonal(), b.diagonal()), "loops stay, and none is made"
        assert torch.equal(a[a > 0].sort().values, b[b > 0].sort().values), "the weights are those that there were"
        if torch.equal(a, a.t()):
            assert torch.equal(b, b.t())
    assert new == graph.rewired(None, seed)


def test_rewired_pairs_keep_both_their_weights() -> None:
    """A symmetric pattern whose two directions weigh differently: they stay together."""
    n = 40
    i, j = torch.tensor(list(combinations(range(n), 2)))[torch.randperm(n * (n - 1) // 2)[:60]].t()
    up = torch.arange(1.0, 61)
    edges, weight = torch.cat([torch.stack([i, j]), torch.stack([j, i])], 1), torch.cat([up, 100 + up])
    b = dense(MultiGraph.from_edge_index({"a": edges}, n, edge_weight={"a": weight}).rewired("a"), "a")
    assert torch.equal(b > 0, (b > 0).t())
    assert torch.equal((b - b.t()).abs()[b > 0], torch.full((120,), 100.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("edges", "undirected", "graphs"),
    [
        ([[0, 2, 4], [1, 3, 5]], True, 15),  # ways to pair six genes
        ([[0, 1, 2, 3], [1, 2, 3, 0]], False, 9),  # permutations of four that leave none in its place
        ([[0, 0, 1, 1, 2, 2], [3, 4, 3, 5, 4, 5]], False, 6),  # a permutation of three: which of the others each leaves out
    ],
    ids=["pairs", "derangements", "bipartite"],
)
def test_rewired_reaches_every_graph_of_its_degrees(edges: list[list[int]], undirected: bool, graphs: int) -> None:
    graph = MultiGraph.from_edge_index({"a": torch.tensor(edges)}, 6, undirected=undirected)
    drawn = [str(graph.rewired("a", seed).edge_index("a").tolist()) for seed in range(30 * graphs)]
    counts = [drawn.count(one) for one in set(drawn)]
    assert len(counts) == graphs
    assert min(counts) >= 10, "30 of each are expected"
    assert max(counts) <= 60


def test_rewired_leaves_little_of_a_sparse_graph() -> None:
    """Where all genes have the same few edges, an edge is found again with a probability of about degree / N."""
    n, step = 2000, torch.arange(1, 4)
    index = torch.stack([torch.arange(n).repeat(3), (torch.arange(n) + step[:, None]).flatten() % n])
    for undirected in (False, True):
        graph = MultiGraph.from_edge_index({"ring": index}, n, undirected=undirected)
        old, new = (set(map(tuple, g.edge_index("ring").t().tolist())) for g in (graph, graph.rewired("ring")))
        assert len(old & new) < 0.02 * len(old)
        assert graph.rewired("ring", 1) != graph.rewired("ring", 0)


def test_a_complete_graph_cannot_be_rewired() -> None:
    n = 6
    graph = MultiGraph.from_edge_index({"a": (1 - torch.eye(n)).nonzero().t()}, n)
    assert graph.rewired("a") == graph


@settings(max_examples=40)
@given(edge_lists(), st.integers(0, 3))
def test_permuted_is_the_graph_under_other_names(edges: EdgeLists, seed: int) -> None:
    n = edges[0]
    code = MultiGraph.from_edge_index(
        {"code": torch.cartesian_prod(torch.arange(n), torch.arange(n)).t()},
        n,
        edge_weight={"code": torch.arange(1.0, n * n + 1)},
    )
    place = dense(code.permuted("code", seed), "code").diagonal()  # the gene that came to each place
    old = ((place - 1) / (n + 1)).long()
    graph = graph_of(edges)
    changed(graph, lambda g: g.permuted(None, seed), lambda a: a[old][:, old])


def test_within_a_transform_of_torch_func() -> None:
    """A graph holds no tensors of the transform's, which have no storage."""
    graph = random_graph(12, {"a": 30})

    def loss(x: Tensor) -> Tensor:
        made.append(graph.permuted("a", seed=1))
        return x.sum()

    made: list[MultiGraph] = []
    torch.func.grad(loss)(torch.ones(3))
    assert made[0].digest() == graph.permuted("a", seed=1).digest()


def test_permuted_leaves_unknown_genes_alone() -> None:
    known = torch.arange(N) % 3 != 0
    index = torch.tensor([[1, 2, 4], [2, 4, 5]])
    graph = MultiGraph.from_edge_index({"a": index}, N, known={"a": known}, names=NAMES)
    new = [graph.permuted("a", seed) for seed in range(20)]
    assert all(torch.equal(g.known("a"), known) and g.names == graph.names for g in new)
    assert len({g.digest() for g in new}) > 5


@pytest.mark.parametrize("seed", [-1, 1.5, None])
def test_seeds_that_are_none(seed: Any) -> None:
    for make in (weighted().rewired, weighted().permuted):
        with pytest.raises((ValueError, TypeError), match="seed: expected"):
            make("physical", seed)


# ------------------------------------------------------------------------------------------------------------- selection


def test_select() -> None:
    graph = named(known={"empty": torch.arange(N) < 5})
    part = graph.select(["empty", "physical"])
    check_invariants(part)
    assert part.relations == ("empty", "physical")
    assert part.names == graph.names
    for name in part.relations:
        assert torch.equal(dense(part, name), dense(graph, name))
        assert torch.equal(part.known(name), graph.known(name))
    assert graph.select(graph.relations) == graph
    assert graph.select([]).relations == ()
    with pytest.raises(ValueError, match="distinct names"):
        graph.select(["empty", "empty"])
    with pytest.raises(TypeError, match="relations: expected a sequence of names, got str 'empty'"):
        graph.select("empty")
