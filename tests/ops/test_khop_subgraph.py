from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cellattn
from cellattn import MultiGraph, SubgraphBatch, reference
from cellattn.data import synthetic_cell
from cellattn.ops import _sets
from cellattn.ops.khop_mask import DIRECTIONS, TRAVERSALS
from cellattn.ops.khop_subgraph import check_index_range

from ..conftest import exhaustive
from .sets import Problem, assert_kept_past_the_ends, problem, problems, random_sets

OPS = torch.ops.cellattn
FORMATS = [
    pytest.param(dtype, layout, id=f"{str(dtype).removeprefix('torch.')}-{layout}")
    for dtype in (torch.int64, torch.int32)
    for layout in ("coo", "csr")
]


def assert_samples(batch: SubgraphBatch, want: list[dict[str, Any]]) -> None:
    """Every array equals the one of the reference's samples, put one after the other."""
    nodes = torch.tensor([0, *(len(sample["node"]) for sample in want)]).cumsum(0)
    num_nodes = int(nodes[-1])
    assert len(batch) == len(want)
    assert torch.equal(batch.node_ptr, nodes)
    empty = torch.empty(0, dtype=torch.int64)
    dtype = batch.node.dtype
    assert torch.equal(batch.node[:num_nodes], torch.cat([empty, *(s["node"] for s in want)]).to(dtype))
    assert torch.equal(batch.seed_mask[:num_nodes], torch.cat([empty.bool(), *(s["seed_mask"] for s in want)]))
    for name in batch.relations:
        edges = torch.tensor([0, *(s["edge_id"][name].numel() for s in want)]).cumsum(0)
        count = int(edges[-1])
        assert torch.equal(batch.edge_ptr[name], edges)
        starts = nodes[:-1].tolist()
        parts = [s["edge_index"][name] + start for s, start in zip(want, starts, strict=True)]
        index = torch.cat([torch.empty(2, 0, dtype=torch.int64), *parts], 1)
        if batch.layout == "coo":
            got = batch.edge_index[name]
            assert got.dtype == dtype
            assert torch.equal(got[:, :count], index.to(dtype))
        else:
            rowptr, col = batch.rowptr[name], batch.col[name]
            assert rowptr.dtype == col.dtype == dtype
            degree = torch.bincount(index[0], minlength=batch.num_nodes)
            assert torch.equal(rowptr, torch.cat([torch.zeros(1, dtype=torch.int64), degree.cumsum(0)]).to(dtype))
            assert torch.equal(col[:count], index[1].to(dtype))
        if batch.edge_id is not None:
            assert torch.equal(batch.edge_id[name][:count], torch.cat([empty, *(s["edge_id"][name] for s in want)]).to(dtype))


def arrays(batch: SubgraphBatch) -> list[Tensor]:
    """Everything a batch shows."""
    edges = [batch.edge_index] if batch.layout == "coo" else [batch.rowptr, batch.col]
    by_relation = [batch.edge_ptr, *edges, *([] if batch.edge_id is None else [batch.edge_id])]
    return [batch.node, batch.node_ptr, batch.seed_mask, batch.overflow, *(x for one in by_relation for x in one.values())]


def assert_equal(got: SubgraphBatch, want: SubgraphBatch) -> None:
    assert got.layout == want.layout
    for a, b in zip(arrays(got), arrays(want), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def poison(batch: SubgraphBatch) -> None:
    """Overwrite all memory a batch has, room for later ones included."""
    for x in batch._buffers:
        if x is not None:
            x.fill_(True if x.dtype == torch.bool else -77)


# ---------------------------------------------------------------------------------------------- against definitions


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
def test_is_the_reference(index_dtype: torch.dtype, layout: str, isa: str) -> None:
    options = st.fixed_dictionaries(
        {
            "traversal": st.sampled_from(TRAVERSALS),
            "direction": st.sampled_from(DIRECTIONS),
            "drop_seeds": st.booleans(),
        }
    )

    @settings(max_examples=100)
    @given(problems(), st.integers(0, 4), options, st.booleans())
    def check(p: Problem, num_hops: int, options: dict[str, Any], return_edge_id: bool) -> None:
        batch = cellattn.khop_subgraph(
            *p, num_hops, **options, index_dtype=index_dtype, layout=layout, return_edge_id=return_edge_id
        )
        assert (batch.edge_id is not None) == return_edge_id
        assert batch.node.dtype == index_dtype
        assert batch.num_nodes == int(batch.node_ptr[-1])
        assert not batch.overflow
        assert_samples(batch, reference.khop_subgraph(*p, num_hops, **options))

    check()


def pyg_samples(graph: MultiGraph, seeds: Tensor, ptr: Tensor, num_hops: int, drop_seeds: bool) -> list[dict[str, Any]]:
    """The pipeline of PyG's users: k_hop_subgraph for each relation, united, then subgraph for each relation."""
    utils = pytest.importorskip("torch_geometric.utils")
    n, samples = graph.num_nodes, []
    edges = {name: graph.edge_index(name) for name in graph.relations}
    for b in range(ptr.numel() - 1):
        mine = seeds[int(ptr[b]) : int(ptr[b + 1])]
        reached = [utils.k_hop_subgraph(mine, num_hops, index, num_nodes=n)[0] for index in edges.values()]
        node = torch.cat([mine, *reached]).unique()
        if drop_seeds:
            node = node[~torch.isin(node, mine)]
        edge_index, edge_id = {}, {}
        for name, index in edges.items():
            edge_index[name], _, mask = utils.subgraph(node, index, relabel_nodes=True, num_nodes=n, return_edge_mask=True)
            edge_id[name] = mask.nonzero().flatten()
        samples.append({"node": node, "seed_mask": torch.isin(node, mine), "edge_index": edge_index, "edge_id": edge_id})
    return samples


@pytest.mark.parametrize("drop_seeds", [False, True], ids=["whole", "drop_seeds"])
@pytest.mark.parametrize("num_hops", [0, 1, 2, 3])
def test_is_the_pyg_pipeline(num_hops: int, drop_seeds: bool, isa: str) -> None:
    p = problem(0, 60, [50, 0, 400], 70)
    assert_samples(cellattn.khop_subgraph(*p, num_hops, drop_seeds=drop_seeds), pyg_samples(*p, num_hops, drop_seeds))


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
@pytest.mark.parametrize("num_hops", [*exhaustive(1), 2])
def test_synthetic_cell(num_hops: int, index_dtype: torch.dtype, layout: str, isa: str) -> None:
    graph = synthetic_cell(num_genes=1500)
    sets = random_sets(1500, 13)
    batch = cellattn.khop_subgraph(graph, *sets, num_hops, index_dtype=index_dtype, layout=layout)
    assert batch.num_edges() > 10_000
    assert_samples(batch, pyg_samples(graph, *sets, num_hops, False))


def test_real_tables(yeast_graph: MultiGraph, isa: str) -> None:
    sets = random_sets(yeast_graph.num_nodes, 5)
    for num_hops in (1, 2):
        assert_samples(cellattn.khop_subgraph(yeast_graph, *sets, num_hops), pyg_samples(yeast_graph, *sets, num_hops, False))


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
def test_a_batch_without_edges(index_dtype: torch.dtype, layout: str, isa: str) -> None:
    """Regression test: the writer once took the null pointer of an empty `edge_index` for the CSR layout, and crashed."""
    path = MultiGraph.from_edge_index({"r": torch.tensor([[0], [1]])}, 3)
    seeds, ptr = torch.tensor([0, 2]), torch.tensor([0, 1, 2])
    batch = cellattn.khop_subgraph(path, seeds, ptr, 0, index_dtype=index_dtype, layout=layout)
    assert_samples(batch, reference.khop_subgraph(path, seeds, ptr, 0))
    assert batch.num_edges() == 0


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_arrays_that_begin_anywhere_in_a_line(index_dtype: torch.dtype, isa: str) -> None:
    """Lines that several flushes or two tasks share; a flush holds 256 edges of a sample."""
    p = problem(5, 200, [20_000, 900], 34)
    want = cellattn.khop_subgraph(*p, 1, index_dtype=index_dtype)
    assert min(want.num_edges(name) for name in ("r0", "r1")) // 34 > 100
    rowptr, col, _ = p.graph.stacked
    words = cellattn.khop_mask(*p, 1, packed=True)
    seed_words = OPS.set_words(p.seeds, p.ptr, 200, False)
    node_ptr, edge_ptr, offsets = OPS.induced_sizes(rowptr, col, words, 34)
    sizes = edge_ptr[:, -1].tolist()
    for shift in range(17):
        node, seed_mask = torch.empty_like(want.node), torch.empty_like(want.seed_mask)
        index, ids = (torch.full((k * sum(sizes) + 40,), -5, dtype=index_dtype) for k in (2, 1))
        inner = [x[shift : x.numel() - 40 + shift] for x in (index, ids)]
        OPS.induced_write(rowptr, col, words, seed_words, node_ptr, edge_ptr, offsets, node, seed_mask, *inner, None, sizes)
        assert torch.equal(inner[0], torch.cat([want.edge_index[name].reshape(-1) for name in p.graph.relations]))
        assert want.edge_id is not None
        assert torch.equal(inner[1], torch.cat([want.edge_id[name] for name in p.graph.relations]))
        assert all((x[:shift] == -5).all() and (x[x.numel() - 40 + shift :] == -5).all() for x in (index, ids))


def test_loops_of_16_bit_ranks_are_for_graphs_that_fit(isa: str) -> None:
    assert not OPS.induced_avx512(2**15)
    assert not (isa != "native" and OPS.induced_avx512(100))


def test_edge_id_gathers_the_weights() -> None:
    p = problem(4, 40, [200], 9)
    batch = cellattn.khop_subgraph(*p, 1)
    assert batch.edge_id is not None
    source, target = batch.node[batch.edge_index["r0"]]
    assert source.numel() > 50
    assert torch.equal(p.graph.weight("r0")[batch.edge_id["r0"]], reference.adjacency(p.graph, "r0")[source, target].float())


# ---------------------------------------------------------------------------------------------------- arrays used again


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
def test_out_is_used_again_where_it_fits(index_dtype: torch.dtype, layout: str, isa: str) -> None:
    graph = problem(5, 40, [90, 0, 200], 0).graph
    options: dict[str, Any] = {"index_dtype": index_dtype, "layout": layout}
    batch = cellattn.khop_subgraph(graph, *random_sets(40, 30, seed=1), 2, **options)
    for seed, num_sets in ((2, 20), (3, 0), (4, 1), (5, 25)):
        held = [x.data_ptr() for x in batch._buffers if x is not None]
        sets = random_sets(40, num_sets, seed=seed)
        poison(batch)
        batch = cellattn.khop_subgraph(graph, *sets, 1, **options, out=batch)
        assert [x.data_ptr() for x in batch._buffers if x is not None] == held
        assert_equal(batch, cellattn.khop_subgraph(graph, *sets, 1, **options))


def test_out_too_small_gives_a_quarter_more_room() -> None:
    graph = problem(5, 40, [90, 0, 200], 0).graph
    small = cellattn.khop_subgraph(graph, *random_sets(40, 3), 1)
    poison(small)
    sets = random_sets(40, 40)
    large = cellattn.khop_subgraph(graph, *sets, 1, out=small)
    assert_equal(large, cellattn.khop_subgraph(graph, *sets, 1))
    assert large._buffers.node.numel() == large.num_nodes + large.num_nodes // 4
    assert large._buffers.edge.numel() == 2 * large.num_edges() + 2 * large.num_edges() // 4
    assert all((x == (1 if x.dtype == torch.bool else -77)).all() for x in small._buffers if x is not None)


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 99),
            st.sampled_from([0, 1, 5, 70]),
            st.integers(0, 2),
            st.sampled_from([torch.int64, torch.int32]),
            st.sampled_from(["coo", "csr"]),
            st.booleans(),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_any_sequence_of_batches_through_out(calls: list[tuple[Any, ...]]) -> None:
    batch = None
    for seed, num_sets, num_hops, index_dtype, layout, return_edge_id, capacity in calls:
        p = problem(seed, 17, [20, 0, 60], num_sets)
        options: dict[str, Any] = {"index_dtype": index_dtype, "layout": layout, "return_edge_id": return_edge_id}
        if capacity:
            options.update(max_nodes=17 * num_sets, max_edges=60 * num_sets)
        if batch is not None:
            poison(batch)
        batch = cellattn.khop_subgraph(*p, num_hops, **options, out=batch)
        assert_equal(batch, cellattn.khop_subgraph(*p, num_hops, **options))


def test_out_stays_whole_where_a_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    p, larger = problem(5, 40, [90, 200], 3), problem(5, 40, [90, 200], 50)
    batch = cellattn.khop_subgraph(*p, 1)
    want = [x.clone() for x in arrays(batch)]
    monkeypatch.setattr(_sets, "_WORTH_ASKING", 0)
    monkeypatch.setattr(_sets, "available_memory", lambda device: 100)
    with pytest.raises(MemoryError):
        cellattn.khop_subgraph(*larger, 1, out=batch)
    for a, b in zip(arrays(batch), want, strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------- fixed capacities


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
def test_capacities_that_are_enough(index_dtype: torch.dtype, layout: str, isa: str) -> None:
    @settings(max_examples=40)
    @given(problems(), st.integers(0, 2), st.integers(0, 9), st.booleans())
    def check(p: Problem, num_hops: int, spare: int, drop_seeds: bool) -> None:
        options: dict[str, Any] = {"index_dtype": index_dtype, "layout": layout, "drop_seeds": drop_seeds}
        exact = cellattn.khop_subgraph(*p, num_hops, **options)
        room = {name: exact.num_edges(name) + spare for name in p.graph.relations}
        batch = cellattn.khop_subgraph(*p, num_hops, **options, max_nodes=exact.num_nodes + spare, max_edges=room)
        assert not batch.overflow
        assert batch.num_nodes == exact.num_nodes + spare
        assert {name: batch.num_edges(name) for name in room} == room
        assert_samples(batch, reference.khop_subgraph(*p, num_hops, drop_seeds=drop_seeds))
        assert not batch.node[exact.num_nodes :].any()
        assert not batch.seed_mask[exact.num_nodes :].any()
        for name in p.graph.relations:
            end = exact.num_edges(name)
            edges = batch.edge_index[name] if layout == "coo" else batch.col[name]
            assert not edges[..., end:].any()
            assert batch.edge_id is not None
            assert not batch.edge_id[name][end:].any()

    check()


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
@pytest.mark.parametrize("short", ["nodes", "r0", "r2"])
def test_overflow_is_told_and_not_written_past(short: str, index_dtype: torch.dtype, layout: str, isa: str) -> None:
    p = problem(6, 40, [90, 0, 300], 70)
    options: dict[str, Any] = {"index_dtype": index_dtype, "layout": layout}
    exact = cellattn.khop_subgraph(*p, 1, **options)
    room = {name: exact.num_edges(name) - (name == short) for name in p.graph.relations}
    max_nodes = exact.num_nodes - (short == "nodes")
    larger = cellattn.khop_subgraph(*p, 4, **options)
    poison(larger)
    batch = cellattn.khop_subgraph(*p, 1, **options, max_nodes=max_nodes, max_edges=room, out=larger)
    assert batch.overflow.shape == ()
    assert batch.overflow
    # the sizes it would have taken
    assert torch.equal(batch.node_ptr, exact.node_ptr)
    assert all(torch.equal(batch.edge_ptr[name], exact.edge_ptr[name]) for name in room)
    used = batch._used()
    for name, whole, mine in zip(used._fields, larger._buffers, used, strict=True):
        if name == "rowptr" and layout == "coo":
            assert whole is mine is None
            continue
        assert whole is not None
        assert mine is not None
        assert mine.data_ptr() == whole.data_ptr()
        assert whole.numel() > mine.numel()
        assert (whole[mine.numel() :] == (1 if whole.dtype == torch.bool else -77)).all(), name
    # what fits is there
    assert torch.equal(batch.node[:max_nodes], exact.node[:max_nodes])
    for name in room:
        if short != "nodes":
            edges, want = (x.edge_index if layout == "coo" else x.col for x in (batch, exact))
            assert torch.equal(edges[name], want[name][..., : room[name]])
    with pytest.raises(ValueError, match=r"overflow: .* did not fit max_nodes="):
        batch[0]


def test_max_edges_of_one_number_is_for_each_relation() -> None:
    p = problem(6, 40, [90, 0, 300], 7)
    batch = cellattn.khop_subgraph(*p, 1, max_nodes=300, max_edges=500)
    assert not batch.overflow
    assert {name: index.shape for name, index in batch.edge_index.items()} == {f"r{r}": (2, 500) for r in range(3)}


def test_no_room_at_all() -> None:
    p = problem(6, 40, [90], 7)
    batch = cellattn.khop_subgraph(*p, 1, max_nodes=0, max_edges=0)
    assert batch.overflow
    assert batch.node.numel() == batch.num_edges() == 0
    empty = cellattn.khop_subgraph(p.graph, p.seeds[:0], p.ptr[:1], 1, max_nodes=0, max_edges=0)
    assert not empty.overflow
    assert len(empty) == 0


# ------------------------------------------------------------------------------------------------- too large a result


@pytest.fixture(scope="module")
def complete() -> MultiGraph:
    """2,000 genes that all reach each other, self-loops too: 4 million edges."""
    everyone = torch.arange(2000)
    return MultiGraph.from_edge_index({"r": torch.cartesian_prod(everyone, everyone).t()}, 2000)


def test_more_than_2_to_the_31_edges(complete: MultiGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in 64 bits; refused where int32 cannot number them, and where they do not fit in memory."""
    num_sets = 600
    count = num_sets * 4_000_000
    sets = random_sets(2000, num_sets)
    with pytest.raises(ValueError, match=f"index_dtype: expected torch.int64 for {count} edges"):
        cellattn.khop_subgraph(complete, *sets, 1, index_dtype=torch.int32, layout="csr")
    monkeypatch.setattr(_sets, "available_memory", lambda device: 10**10)
    num_bytes = num_sets * 2000 * 9 + count * 24
    words = (
        f"cannot allocate {num_bytes:,} bytes on cpu for 1,200,000 nodes and {count:,} edges of 600 samples, "
        "of which 10,000,000,000 are available; lower the number of samples, num_hops"
    )
    with pytest.raises(MemoryError, match=words):
        cellattn.khop_subgraph(complete, *sets, 1)


def test_index_range() -> None:
    limit = 2**31 - 1
    check_index_range(torch.int32, "csr", limit, [limit, 0])
    check_index_range(torch.int32, "coo", limit, [limit + 1])  # of which only positions of nodes are stored
    check_index_range(torch.int64, "csr", limit + 1, [limit + 1])
    with pytest.raises(ValueError, match=f"index_dtype: expected torch.int64 for {limit + 1} nodes"):
        check_index_range(torch.int32, "coo", limit + 1, [])
    with pytest.raises(ValueError, match=f"index_dtype: expected torch.int64 for {limit + 1} edges"):
        check_index_range(torch.int32, "csr", 5, [0, limit + 1])


def test_equal_from_run_to_run() -> None:
    p = problem(7, 40, [90, 0, 1600], 130)
    assert_equal(cellattn.khop_subgraph(*p, 2), cellattn.khop_subgraph(*p, 2))


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
def test_nothing_is_written_past_the_ends(index_dtype: torch.dtype, layout: str) -> None:
    assert_kept_past_the_ends(problem(7, 64, [500, 0, 2000], 70), index_dtype, layout, nullcontext())


def test_fake_tensors() -> None:
    """Shapes and dtypes where sizes are given, otherwise an error that says to give them."""
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 1, 2], [1, 2, 0]])}, 4)
    seeds, ptr = torch.tensor([0, 3]), torch.tensor([0, 1, 2])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = mode.from_tensor(seeds), mode.from_tensor(ptr)
        found = cellattn.khop_subgraph(graph, *given, 1, max_nodes=9, max_edges=7)
        with pytest.raises(NotImplementedError, match=r"cellattn\.ops: khop_subgraph: .* give max_nodes and max_edges"):
            cellattn.khop_subgraph(graph, *given, 1)
    real = cellattn.khop_subgraph(graph, seeds, ptr, 1, max_nodes=9, max_edges=7)
    for fake, x in zip(found._buffers, real._buffers, strict=True):
        assert (fake is None) == (x is None)
        assert x is None or (fake is not None and (fake.shape, fake.dtype) == (x.shape, x.dtype))
    assert cellattn.khop_subgraph(graph, seeds, ptr, 1).num_nodes == 3


def test_sizes_of_one_batch_are_not_recorded_for_all() -> None:
    """`make_fx` makes numbers of them: another batch would be cut short, or end in memory that nobody wrote."""
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 1, 2], [1, 2, 0]])}, 4)
    seeds, others, ptr = torch.tensor([0, 1]), torch.tensor([3, 0]), torch.tensor([0, 1, 2])

    def extract(room: int | None) -> Callable[[Tensor, Tensor], list[Tensor]]:
        def f(seeds: Tensor, ptr: Tensor) -> list[Tensor]:
            batch = cellattn.khop_subgraph(graph, seeds, ptr, 1, max_nodes=room, max_edges=room)
            return [batch.node, batch.node_ptr, batch.seed_mask, batch.edge_index["a"]]

        return f

    with pytest.raises(NotImplementedError, match=r"cellattn\.ops: khop_subgraph: .* give max_nodes and max_edges"):
        make_fx(extract(None))(seeds, ptr)
    recorded = make_fx(extract(9))(seeds, ptr)
    for got, want in zip(recorded(others, ptr), extract(9)(others, ptr), strict=True):
        assert torch.equal(got, want)
