"""The extension's CUDA half, compiled by nvcc and launched by its own host code: bit for bit what the CPU half gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import SubgraphBatch
from cellattn.ops.khop_mask import DIRECTIONS, TRAVERSALS

from ..conftest import exhaustive
from ..ops.sets import Problem, assert_kept_past_the_ends, problem, random_sets
from ..ops.test_khop_subgraph import FORMATS, arrays
from ..ptx import cuda

pytestmark = [
    pytest.mark.skipif(cuda.home() is None, reason="needs nvcc (CUDA_HOME)"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/cuda runs the same on the GPU"),
]

# A word, a chunk of words and the edges of a tile (128) are each met exactly, missed by one, and exceeded several times.
GRAPHS = {
    "no relation": (1, []),
    "one gene": (1, [1, 0]),
    "no edges": (33, [0, 0]),
    "sparse": (40, [127, 0, 200]),
    "almost full": (64, [5, 9000]),
    "hubs": (257, [6000, 128, 3, 20_000]),
}
CASES = [("sparse", 65), ("one gene", 0), *exhaustive(("sparse", 28))]
MORE = [
    *((name, count) for name in GRAPHS for count in (1, 63, 64) if name != "hubs"),
    ("hubs", 28),
    *(("sparse", count) for count in (130, 300, 600)),
    ("almost full", 130),
]
by_problem = pytest.mark.parametrize(("graph", "num_sets"), [*CASES, *exhaustive(*MORE)])


def tensors_of(x: Any) -> list[Tensor]:
    if isinstance(x, SubgraphBatch):
        return arrays(x)
    if isinstance(x, Tensor):
        return [x]
    return [y for part in (x.values() if isinstance(x, dict) else x) for y in tensors_of(part)]


def assert_same(op: Callable[[], Any]) -> Any:
    """By the CPU half, and by the CUDA half with its blocks in two orders."""
    want = op()
    for order in (None, 1):
        with cuda.device(order=order):
            got = op()
        for a, b in zip(tensors_of(got), tensors_of(want), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    return want


@pytest.mark.parametrize("traversal", TRAVERSALS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@by_problem
def test_khop_mask(graph: str, num_sets: int, direction: str, traversal: str) -> None:
    p = problem(1, *GRAPHS[graph], num_sets)
    for num_hops, packed in ((0, True), (1, False), (5, True)):
        assert_same(lambda: cellattn.khop_mask(*p, num_hops, traversal=traversal, direction=direction, packed=packed))


@by_problem
def test_perturbation_mask(graph: str, num_sets: int) -> None:
    p = problem(2, *GRAPHS[graph], num_sets)
    for packed in (False, True):
        assert_same(lambda: cellattn.perturbation_mask(*p, packed=packed))


@pytest.mark.parametrize("num_sets", [1, 63, 64, 65, 300])
def test_masks_to_words_and_back(num_sets: int) -> None:
    keep = torch.rand(num_sets, 1001, generator=torch.Generator().manual_seed(0)) < 0.3
    words = assert_same(lambda: torch.ops.cellattn.pack_words(keep))
    assert torch.equal(assert_same(lambda: torch.ops.cellattn.unpack_words(words, num_sets)), keep)


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
@by_problem
def test_khop_subgraph(graph: str, num_sets: int, index_dtype: torch.dtype, layout: str) -> None:
    p = problem(3, *GRAPHS[graph], num_sets)
    for num_hops, drop_seeds, return_edge_id in ((0, False, True), (2, False, False), (2, True, True)):
        options = {"drop_seeds": drop_seeds, "return_edge_id": return_edge_id, "index_dtype": index_dtype, "layout": layout}
        assert_same(lambda: cellattn.khop_subgraph(*p, num_hops, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_relations", [63, 64, *exhaustive(130)])
def test_many_relations(num_relations: int) -> None:
    """More than their sizes fit into the arguments of one launch."""
    p = problem(4, 20, [r % 7 for r in range(num_relations)], 30)
    assert_same(lambda: cellattn.khop_subgraph(*p, 2))


ROOM: dict[str, tuple[Callable[[int], int], Callable[[int, int], int]]] = {
    "enough": (lambda n: n + 5, lambda n, r: n + r),
    "nodes overflow": (lambda n: n // 2, lambda n, r: n),
    "a relation overflows": (lambda n: n, lambda n, r: n // 2 if r == 2 else n),
    "all overflow": (lambda n: n // 3, lambda n, r: n // 3),
    "nothing fits": (lambda n: 0, lambda n, r: 0),
}


def rooms() -> list[Any]:
    """Every room in one format, one room in every format, and `exhaustive` the others."""
    cases = [(room, *form.values) for room in ROOM for form in FORMATS]
    short = [case for case in cases if case[0] == "a relation overflows" or case[1:] == FORMATS[0].values]
    return [*short, *exhaustive(*(case for case in cases if case not in short))]


@pytest.mark.parametrize(("room", "index_dtype", "layout"), rooms(), ids=str)
@pytest.mark.parametrize("num_sets", [28, *exhaustive(1, 65, 300)])
def test_capacities(num_sets: int, room: str, index_dtype: torch.dtype, layout: str) -> None:
    """What fits is written and nothing else; whether anything did not is said."""
    nodes, edges = ROOM[room]
    p = problem(6, 64, [500, 0, 2000], num_sets)
    options: dict[str, Any] = {"index_dtype": index_dtype, "layout": layout}
    exact = cellattn.khop_subgraph(*p, 1, **options)
    most = {name: edges(exact.num_edges(name), r) for r, name in enumerate(p.graph.relations)}
    options.update(max_nodes=nodes(exact.num_nodes), max_edges=most)
    batch = assert_same(lambda: cellattn.khop_subgraph(*p, 1, **options))
    fits = nodes(exact.num_nodes) >= exact.num_nodes and all(most[name] >= exact.num_edges(name) for name in most)
    assert bool(batch.overflow) == (not fits)


@pytest.mark.parametrize(("index_dtype", "layout"), FORMATS)
def test_nothing_is_written_past_the_ends(index_dtype: torch.dtype, layout: str) -> None:
    assert_kept_past_the_ends(problem(7, 64, [500, 0, 2000], 70), index_dtype, layout, cuda.device())


def test_values_that_are_no_genes_are_skipped() -> None:
    """Values are not looked at on the way to a GPU; what is out of range takes part in nothing, and reads nothing outside."""
    p = problem(8, 64, [500], 70)
    rowptr, col, _ = p.graph.stacked

    def words(seeds: Tensor, ptr: Tensor) -> Tensor:
        found: Tensor = torch.ops.cellattn.khop_words(
            rowptr, col, *p.graph.stacked_by_column()[:2], seeds, ptr, 64, 2, True, True, True
        )
        return found

    want = words(p.seeds, p.ptr)
    seeds = torch.cat([p.seeds, torch.tensor([-1, 64, 2**62, -(2**62)])])
    with cuda.device():
        got = words(seeds, torch.cat([p.ptr[:-1], p.ptr[-1:] + 4]))
        falling = words(seeds, p.ptr.flip(0))
    assert torch.equal(got, want)
    assert falling.shape == want.shape


def test_a_scan_over_many_blocks() -> None:
    """Blocks of the prefix sum wait for those before them, in whatever order they come."""
    p = Problem(problem(9, 64, [3000], 0).graph, *random_sets(64, 600))
    rowptr, col, _ = p.graph.stacked
    words = torch.ops.cellattn.set_words(p.seeds, p.ptr, 64, True)
    want = torch.ops.cellattn.induced_sizes(rowptr, col, words, 600)[:2]
    for order in (None, 1, 2):
        with cuda.device(order=order) as made:
            got = torch.ops.cellattn.induced_sizes(rowptr, col, words, 600)[:2]
        assert max(n for name, n in zip(made.launches, made.blocks, strict=True) if "DeviceScanKernel" in name) > 2
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_every_kernel_is_launched() -> None:
    launched: set[str] = set()
    for num_sets in (28, 65, 130, 300):
        p = problem(1, 40, [127, 0, 200], num_sets)
        with cuda.device() as made:
            cellattn.perturbation_mask(*p)
            torch.ops.cellattn.pack_words(torch.ones(num_sets, 5, dtype=torch.bool))
            cellattn.khop_mask(*p, 2)
            for form in FORMATS if num_sets < 100 else []:
                options: dict[str, Any] = dict(zip(("index_dtype", "layout"), form.values, strict=True))
                for return_edge_id in (False, True):
                    cellattn.khop_subgraph(*p, 1, return_edge_id=return_edge_id, **options)
            if num_sets == 28:
                cellattn.khop_subgraph(*problem(1, 20, [5] * 70, num_sets), 1)
        launched |= set(made.launches)
    never = {name for name in cuda.programs() if "EmptyKernel" not in name} - launched
    assert not never, sorted(re.findall(r"\w+_kernel\w*?E", name) for name in never)
