"""The k-hop operators on a GPU: bit for bit what the CPU gives, from run to run, and inside a CUDA graph."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, SubgraphBatch, _extension
from cellattn.data import synthetic_cell
from cellattn.ops.khop_mask import DIRECTIONS, TRAVERSALS

from ..ops.sets import Problem, assert_kept_past_the_ends, problem, random_sets
from ..ops.test_khop_subgraph import FORMATS, arrays, assert_equal

if not (torch.cuda.is_available() and "cuda" in _extension._DEVICES):
    pytest.skip("needs a CUDA GPU, and the extension built with CUDA", allow_module_level=True)

# A word, a chunk of words and the edges of a tile (128) are each met exactly, missed by one, and exceeded several times.
NUM_SETS = [0, 1, 28, 63, 64, 65, 300, 600]
GRAPHS = [
    pytest.param(1, [], id="no relation"),
    pytest.param(1, [1, 0], id="one gene"),
    pytest.param(33, [0, 0], id="no edges"),
    pytest.param(40, [127, 0, 200], id="sparse"),
    pytest.param(64, [5, 9000], id="almost full"),
    pytest.param(257, [6000, 128, 3, 20_000], id="hubs"),
]
by_num_sets = pytest.mark.parametrize("num_sets", NUM_SETS)
by_graph = pytest.mark.parametrize(("num_nodes", "edges"), GRAPHS)


def on_gpu(p: Problem) -> Problem:
    return Problem(p.graph.to("cuda"), p.seeds.cuda(), p.ptr.cuda())


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.device.type == "cuda"
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert torch.equal(got.cpu(), want)


def assert_same_batch(got: SubgraphBatch, want: SubgraphBatch) -> None:
    assert got.device.type == "cuda"
    assert_equal(got.to("cpu"), want)


@functools.cache
def cell() -> MultiGraph:
    return synthetic_cell(seed=0)


# ----------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("traversal", TRAVERSALS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@by_num_sets
@by_graph
def test_khop_mask(num_nodes: int, edges: list[int], num_sets: int, direction: str, traversal: str) -> None:
    p = problem(1, num_nodes, edges, num_sets)
    here = on_gpu(p)
    for num_hops in (0, 1, 2, 5):
        options: dict[str, Any] = {"traversal": traversal, "direction": direction}
        for packed in (False, True):
            want = cellattn.khop_mask(*p, num_hops, **options, packed=packed)
            assert_same(cellattn.khop_mask(*here, num_hops, **options, packed=packed), want)


@pytest.mark.parametrize("traversal", TRAVERSALS)
@pytest.mark.parametrize("num_sets", [28, 64, 300, 2000])
def test_khop_mask_of_a_cell(num_sets: int, traversal: str) -> None:
    """Hubs of thousands of edges; the 32 words of 2,000 sets do not share one launch."""
    p = Problem(cell(), *random_sets(cell().num_nodes, num_sets))
    here = on_gpu(p)
    for num_hops in (1, 3):
        want = cellattn.khop_mask(*p, num_hops, traversal=traversal, packed=True)
        assert_same(cellattn.khop_mask(*here, num_hops, traversal=traversal, packed=True), want)


@by_num_sets
@by_graph
def test_perturbation_mask(num_nodes: int, edges: list[int], num_sets: int) -> None:
    p = problem(2, num_nodes, edges, num_sets)
    here = on_gpu(p)
    for packed in (False, True):
        nodes, by_relation = cellattn.perturbation_mask(*p, packed=packed)
        got_nodes, got_by_relation = cellattn.perturbation_mask(*here, packed=packed)
        assert_same(got_nodes, nodes)
        for name in p.graph.relations:
            assert_same(got_by_relation[name], by_relation[name])


@by_num_sets
def test_masks_to_words_and_back(num_sets: int) -> None:
    keep = torch.rand(num_sets, 1001, generator=torch.Generator().manual_seed(0)) < 0.3
    words = torch.ops.cellattn.pack_words(keep)
    assert_same(torch.ops.cellattn.pack_words(keep.cuda()), words)
    assert_same(torch.ops.cellattn.unpack_words(words.cuda(), num_sets), keep)


# ------------------------------------------------------------------------------------------------------------- subgraphs


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
@by_num_sets
@by_graph
def test_khop_subgraph(num_nodes: int, edges: list[int], num_sets: int, index_dtype: torch.dtype, layout: str) -> None:
    p = problem(3, num_nodes, edges, num_sets)
    here = on_gpu(p)
    for num_hops, drop_seeds, return_edge_id in ((0, False, True), (1, True, True), (2, False, False), (2, True, True)):
        options: dict[str, Any] = {
            "drop_seeds": drop_seeds,
            "return_edge_id": return_edge_id,
            "index_dtype": index_dtype,
            "layout": layout,
        }
        assert_same_batch(cellattn.khop_subgraph(*here, num_hops, **options), cellattn.khop_subgraph(*p, num_hops, **options))


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
@pytest.mark.parametrize(("num_sets", "num_hops"), [(28, 1), (65, 1), (3, 3)])
def test_khop_subgraph_of_a_cell(num_sets: int, num_hops: int, index_dtype: torch.dtype, layout: str) -> None:
    p = Problem(cell(), *random_sets(cell().num_nodes, num_sets))
    options: dict[str, Any] = {"index_dtype": index_dtype, "layout": layout}
    want = cellattn.khop_subgraph(*p, num_hops, **options)
    assert want.num_edges() > 1_000_000
    assert_same_batch(cellattn.khop_subgraph(*on_gpu(p), num_hops, **options), want)


def test_rows_without_edges_in_csr() -> None:
    """Runs of them before, between and after rows that begin in the middle of a tile, at its start, and a relation of none."""
    rng = random.Random(0)
    rows = [50, 51, 300, 301, 302, 700]
    degree = [100, 28, 128, 1, 130, 5]  # the third row begins with a tile
    pairs = [(i, j) for i, count in zip(rows, degree, strict=True) for j in rng.sample(range(800), count)]
    index = {"a": torch.tensor(pairs).t(), "none": torch.empty(2, 0, dtype=torch.int64), "b": torch.tensor([[799], [0]])}
    graph = MultiGraph.from_edge_index(index, 800)
    p = Problem(graph, *random_sets(800, 70, size=300))
    for index_dtype in (torch.int64, torch.int32):
        options: dict[str, Any] = {"index_dtype": index_dtype, "layout": "csr"}
        assert_same_batch(cellattn.khop_subgraph(*on_gpu(p), 0, **options), cellattn.khop_subgraph(*p, 0, **options))


@pytest.mark.parametrize("num_relations", [63, 64, 130])
def test_many_relations(num_relations: int) -> None:
    """More than their sizes fit into the arguments of one launch."""
    p = problem(4, 20, [r % 7 for r in range(num_relations)], 30)
    assert_same_batch(cellattn.khop_subgraph(*on_gpu(p), 2), cellattn.khop_subgraph(*p, 2))


def test_equal_from_run_to_run() -> None:
    p = on_gpu(problem(5, 257, [6000, 128, 3, 20_000], 300))
    first = cellattn.khop_subgraph(*p, 2)
    for _ in range(5):
        assert_equal(cellattn.khop_subgraph(*p, 2), first)


# ------------------------------------------------------------------------------------------------------------ capacities

Room = Callable[[int, int], int]


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
@pytest.mark.parametrize(
    ("nodes", "edges"),
    [
        pytest.param(lambda n: n + 5, lambda n, r: n + r, id="enough"),
        pytest.param(lambda n: n // 2, lambda n, r: n, id="nodes overflow"),
        pytest.param(lambda n: n, lambda n, r: n // 2 if r == 2 else n, id="a relation overflows"),
        pytest.param(lambda n: n // 3, lambda n, r: n // 3, id="all overflow"),
        pytest.param(lambda n: 0, lambda n, r: 0, id="nothing fits"),
    ],
)
@pytest.mark.parametrize("num_sets", [1, 28, 65, 300])
def test_capacities(num_sets: int, nodes: Callable[[int], int], edges: Room, index_dtype: torch.dtype, layout: str) -> None:
    """What fits is written and nothing else, on both devices; arrays that come right after the batch's own stay whole."""
    p = problem(6, 64, [500, 0, 2000], num_sets)
    options: dict[str, Any] = {"index_dtype": index_dtype, "layout": layout}
    exact = cellattn.khop_subgraph(*p, 1, **options)
    room = {name: edges(exact.num_edges(name), r) for r, name in enumerate(p.graph.relations)}
    options.update(max_nodes=nodes(exact.num_nodes), max_edges=room)
    want = cellattn.khop_subgraph(*p, 1, **options)
    too_small = nodes(exact.num_nodes) < exact.num_nodes or any(room[n] < exact.num_edges(n) for n in room)
    assert bool(want.overflow) == too_small
    assert_same_batch(cellattn.khop_subgraph(*on_gpu(p), 1, **options), want)


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
def test_nothing_is_written_past_the_ends(index_dtype: torch.dtype, layout: str) -> None:
    assert_kept_past_the_ends(on_gpu(problem(7, 64, [500, 0, 2000], 70)), index_dtype, layout, nullcontext())


def test_values_that_are_no_genes_are_skipped() -> None:
    """Values are not looked at on the way to a GPU; what is out of range takes part in nothing."""
    p = problem(8, 64, [500], 70)
    want = cellattn.khop_mask(*p, 2, packed=True)
    seeds = torch.cat([p.seeds, torch.tensor([-1, 64, 2**62, -(2**62)])])
    ptr = torch.cat([p.ptr[:-1], p.ptr[-1:] + 4])
    assert_same(cellattn.khop_mask(p.graph.to("cuda"), seeds.cuda(), ptr.cuda(), 2, packed=True), want)
    falling = p.ptr.flip(0)
    words = cellattn.khop_mask(p.graph.to("cuda"), seeds.cuda(), falling.cuda(), 2, packed=True)
    assert words.shape == want.shape
    torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------ CUDA graphs


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
@pytest.mark.parametrize("num_sets", [28, 300])
def test_captured_in_a_cuda_graph(num_sets: int, index_dtype: torch.dtype, layout: str) -> None:
    """One capture serves batch after batch of new seeds, one that does not fit among them."""
    graph = problem(9, 257, [6000, 128, 0, 3000], 0).graph
    here = graph.to("cuda")
    batches = [random_sets(257, num_sets, size=2, seed=seed) for seed in range(4)]
    exact = [cellattn.khop_subgraph(graph, *sets, 1) for sets in batches]
    options: dict[str, Any] = {
        "index_dtype": index_dtype,
        "layout": layout,
        "max_nodes": sorted(x.num_nodes for x in exact)[-2],
        "max_edges": {name: max(x.num_edges(name) for x in exact) for name in graph.relations},
    }
    seeds, ptr = (x.cuda() for x in batches[0])
    extract = functools.partial(cellattn.khop_subgraph, here, seeds, ptr, 1, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        extract()  # kernels are loaded, the transposed graph is made
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        batch = extract()
    overflows = []
    for new_seeds, new_ptr in batches:
        seeds.copy_(new_seeds)
        ptr.copy_(new_ptr)
        for x in batch._buffers:
            if x is not None:
                x.fill_(1)  # of the batch before
        captured.replay()
        want = cellattn.khop_subgraph(graph, new_seeds, new_ptr, 1, **options)
        overflows.append(bool(want.overflow))
        assert_same_batch(batch, want)
    assert sum(overflows) == 1


def test_waits_for_nothing_with_capacities() -> None:
    p = on_gpu(problem(10, 257, [6000, 128, 0, 3000], 70))
    options: dict[str, Any] = {"max_nodes": 70 * 257, "max_edges": 70 * 6000}
    cellattn.khop_subgraph(*p, 2, **options)
    torch.cuda.set_sync_debug_mode("error")  # PyTorch's own calls; that the extension's do not wait is what a capture proves
    try:
        batch = cellattn.khop_subgraph(*p, 2, **options)
        cellattn.khop_mask(*p, 2)
        cellattn.perturbation_mask(*p)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not batch.overflow
    assert all(x.device.type == "cuda" for x in arrays(batch))
