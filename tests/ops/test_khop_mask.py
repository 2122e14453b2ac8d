from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cellattn
from cellattn import MultiGraph, _extension, reference
from cellattn.data import synthetic_cell
from cellattn.ops import _sets
from cellattn.ops.khop_mask import DIRECTIONS, TRAVERSALS

from .sets import Problem, problem, problems, ragged, random_sets


def unpacked(words: Tensor, num_sets: int) -> Tensor:
    """Bit b % 64 of words[i, b // 64] as bool [B, N], one sample at a time."""
    rows = [(words[:, b // 64] >> (b % 64)) & 1 == 1 for b in range(num_sets)]
    return torch.stack(rows) if rows else torch.empty(0, words.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_is_the_reference(traversal: str, direction: str, isa: str) -> None:
    @settings(max_examples=60)
    @given(problems(), st.integers(0, 4))
    def check(p: Problem, num_hops: int) -> None:
        options: dict[str, Any] = {"traversal": traversal, "direction": direction}
        mask = cellattn.khop_mask(*p, num_hops, **options)
        assert torch.equal(mask, reference.khop_mask(*p, num_hops, **options))
        words = cellattn.khop_mask(*p, num_hops, **options, packed=True)
        num_sets = p.ptr.numel() - 1
        assert words.shape == (p.graph.num_nodes, -(-num_sets // 64))
        assert torch.equal(unpacked(words, num_sets), mask)
        # bits past the last sample are 0: all that are set belong to the mask
        assert sum(bin(w % 2**64).count("1") for w in words.flatten().tolist()) == int(mask.sum())

    check()


def pyg_mask(graph: MultiGraph, seeds: Tensor, ptr: Tensor, num_hops: int, traversal: str, direction: str) -> Tensor:
    """PyG's k_hop_subgraph for each sample and relation."""
    utils = pytest.importorskip("torch_geometric.utils")
    edges = [graph.edge_index(name) for name in graph.relations]
    if traversal == "mixed":
        edges = [torch.cat(edges, 1)]
    if direction == "both":
        edges = [torch.cat([index, index.flip(0)], 1) for index in edges]
    flow = "target_to_source" if direction == "out" else "source_to_target"
    mask = torch.zeros(ptr.numel() - 1, graph.num_nodes, dtype=torch.bool)
    for b in range(ptr.numel() - 1):
        mine = seeds[int(ptr[b]) : int(ptr[b + 1])]
        mask[b, mine] = True
        for index in edges:
            node, *_ = utils.k_hop_subgraph(mine, num_hops, index, num_nodes=graph.num_nodes, flow=flow)
            mask[b, node] = True
    return mask


@pytest.mark.parametrize("num_hops", [0, 1, 2, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_is_what_pyg_reaches(traversal: str, direction: str, num_hops: int) -> None:
    p = problem(0, 60, [50, 0, 120], 70)
    want = pyg_mask(*p, num_hops, traversal, direction)
    assert torch.equal(cellattn.khop_mask(*p, num_hops, traversal=traversal, direction=direction), want)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_synthetic_cell(traversal: str, direction: str, isa: str) -> None:
    graph = synthetic_cell(num_genes=900)
    sets = random_sets(900, 67)
    for num_hops in (1, 2):
        mask = cellattn.khop_mask(graph, *sets, num_hops, traversal=traversal, direction=direction)
        assert torch.equal(mask, reference.khop_mask(graph, *sets, num_hops, traversal=traversal, direction=direction))


def test_real_tables(yeast_graph: MultiGraph) -> None:
    sets = random_sets(yeast_graph.num_nodes, 5)
    for num_hops in (1, 2):
        assert torch.equal(
            cellattn.khop_mask(yeast_graph, *sets, num_hops), pyg_mask(yeast_graph, *sets, num_hops, "per_relation", "in")
        )


def test_directions_on_a_path() -> None:
    """0 -> 1 -> 2 in one relation, 2 -> 3 in another."""
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 1], [1, 2]]), "b": torch.tensor([[2], [3]])}, 5)
    sets = ragged([[2], [0], [3]])

    def genes(num_hops: int, **options: Any) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in cellattn.khop_mask(graph, *sets, num_hops, **options)]

    assert genes(0) == [[2], [0], [3]]
    assert genes(1) == [[1, 2], [0], [2, 3]]
    assert genes(2) == [[0, 1, 2], [0], [2, 3]]  # inside "b" nothing leads to 2
    assert genes(2, traversal="mixed") == [[0, 1, 2], [0], [1, 2, 3]]
    assert genes(1, direction="out") == [[2, 3], [0, 1], [3]]
    assert genes(2, direction="out") == [[2, 3], [0, 1, 2], [3]]
    assert genes(10**30, direction="both", traversal="mixed") == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("num_sets", [1, 64, 512, 1030])
def test_a_long_path_takes_as_many_hops_as_it_has_edges(num_sets: int) -> None:
    n = 50
    graph = MultiGraph.from_edge_index({"r": torch.stack([torch.arange(n - 1), torch.arange(1, n)])}, n)
    ends = torch.arange(num_sets) % n
    distance = ends[:, None] - torch.arange(n)
    for num_hops in (7, 49):
        mask = cellattn.khop_mask(graph, ends, torch.arange(num_sets + 1), num_hops)
        assert torch.equal(mask, (distance >= 0) & (distance <= num_hops))


def test_strided_sets() -> None:
    p = problem(1, 40, [60], 9)
    spread = torch.stack([p.seeds, p.seeds - 1], 1)[:, 0]
    assert not spread.is_contiguous()
    assert torch.equal(cellattn.khop_mask(p.graph, spread, p.ptr, 2), cellattn.khop_mask(*p, 2))


def test_inputs_are_left_as_they_are() -> None:
    p = problem(2, 40, [60], 9)
    before = p.seeds.clone(), p.ptr.clone(), p.graph.to("cpu")
    cellattn.khop_mask(*p, 2)
    assert torch.equal(p.seeds, before[0])
    assert torch.equal(p.ptr, before[1])
    assert p.graph == problem(2, 40, [60], 9).graph


# ------------------------------------------------------------------------------------------------ what can be missing


def test_a_checkout_without_the_extension_does_everything_else() -> None:
    code = """
import sys
sys.modules["cellattn._C"] = None  # importing it raises ImportError
import torch, cellattn
q = torch.randn(3, 4)
graph = cellattn.MultiGraph.from_edge_index({"r": torch.tensor([[0], [1]])}, 3)
assert cellattn.attention(q, q, q)[0].shape == (3, 4)
assert cellattn.attention_kl(q, q, graph, "r").isfinite()
sets = torch.tensor([0]), torch.tensor([0, 1])
for call in (
    lambda: cellattn.khop_mask(graph, *sets, 1),
    lambda: cellattn.khop_subgraph(graph, *sets, 1),
    lambda: cellattn.perturbation_mask(graph, *sets),
    lambda: cellattn.masked_spmm(graph, "r", q, torch.ones(1, 3).bool()),
    lambda: cellattn.relational_spmm(graph, q[:1], *sets, *sets),
    lambda: cellattn.relational_degree(graph, *sets, *sets),
):
    try:
        call()
    except ImportError as error:
        assert "pip install ." in str(error) and "build_ext --inplace" in str(error), error
    else:
        raise AssertionError("no ImportError")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_an_extension_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_DEVICES", {"cpu"})
    with pytest.raises(NotImplementedError, match=r"graph: .* cuda:0, .* built without CUDA"):
        _extension.require_extension(torch.device("cuda:0"))
    with pytest.raises(NotImplementedError, match=r"graph: .* cpu and cuda, got a graph on mps"):
        _extension.require_extension(torch.device("mps"))


def test_a_mask_that_does_not_fit_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(3, 40, [60], 9)
    monkeypatch.setattr(_sets, "_WORTH_ASKING", 0)
    monkeypatch.setattr(_sets, "available_memory", lambda device: 330)
    with pytest.raises(MemoryError, match=r"360 bytes on cpu for a mask of 40 genes by 9 samples, .* 330 .*packed=True"):
        cellattn.khop_mask(*p, 1)
    assert cellattn.khop_mask(*p, 1, packed=True).shape == (40, 1)
    monkeypatch.setattr(_sets, "available_memory", lambda device: 100)
    with pytest.raises(MemoryError, match=r"320 bytes on cpu for the sets of 40 genes in 9 samples, as bits"):
        cellattn.khop_mask(*p, 1, packed=True)


def test_a_failed_allocation_says_what_to_lower() -> None:
    def fail() -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 800 bytes")

    def wrong() -> Tensor:
        raise RuntimeError("num_sets: expected another")

    with pytest.raises(MemoryError, match="cannot allocate 800 bytes on cpu for masks") as caught:
        _sets.allocating(fail, 800, torch.empty(0), lambda: "masks", "lower it")
    assert "can't allocate memory" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="num_sets: expected another"):
        _sets.allocating(wrong, 800, torch.empty(0), lambda: "masks", "lower it")
