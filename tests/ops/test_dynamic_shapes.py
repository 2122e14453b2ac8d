"""Compiled with dynamic shapes, a function is compiled once, whatever the number of sets, of their genes and of the cell's.

Where samples are bits of words it is compiled once for one word, 64 samples, and once for more: sizes of 1 are never symbolic.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import cellattn
from cellattn import MultiGraph
from cellattn.ops.set_attention import set_attention
from cellattn.ops.set_pairs import set_pairs
from cellattn.ops.set_sum import set_mean, set_sum

from ..compare import random_graph

# (genes, sets)
SIZES = [(20, 5), (31, 3), (45, 64), (25, 9)]
LARGER = [(31, 70), (52, 65), (77, 130)]
IN_WORDS = {"khop_mask", "khop_subgraph", "perturbation_mask", "masked_spmm", "masked_spmm_packed"}

Function = Callable[[MultiGraph, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def khop_mask(g: MultiGraph, x: Tensor, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    mixed = cellattn.khop_mask(g, seeds, ptr, 2, traversal="mixed", direction="both")
    return mixed, cellattn.khop_mask(g, seeds, ptr, 1, packed=True)


def khop_subgraph(g: MultiGraph, x: Tensor, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    places = ptr.shape[0] * g.num_nodes
    batch = cellattn.khop_subgraph(g, seeds, ptr, 1, max_nodes=places, max_edges=8 * places)
    return batch.node, batch.overflow, *batch.edge_index.values()


def perturbation_mask(g: MultiGraph, x: Tensor, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    keep, edge_keep = cellattn.perturbation_mask(g, seeds, ptr)
    return keep, *edge_keep.values()


def masked_spmm(g: MultiGraph, x: Tensor, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    keep, _ = cellattn.perturbation_mask(g, seeds, ptr)
    y = cellattn.masked_spmm(g, "b", x, keep)
    return (cellattn.masked_spmm(g, "a", y, keep, reduce="mean", transpose=True),)


def masked_spmm_packed(g: MultiGraph, x: Tensor, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    words = cellattn.khop_mask(g, seeds, ptr, 1, packed=True)
    weight = x.sum().expand(g.num_edges("b"))
    return (cellattn.masked_spmm(g, "b", x, words, num_sets=ptr.shape[0] - 1, edge_weight=weight),)


def relational(g: MultiGraph, x: Tensor, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    everyone = torch.arange(g.num_nodes).repeat(ptr.shape[0] - 1)
    every_ptr = torch.arange(ptr.shape[0]) * g.num_nodes
    degree = cellattn.relational_degree(g, everyone, every_ptr, seeds, ptr)
    y = cellattn.relational_spmm(g, x, everyone, every_ptr, seeds, ptr, scale=1 / degree.clamp(min=1), shared=True)
    return degree, cellattn.relational_spmm(g, y, seeds, ptr, everyone, every_ptr, sum_relations=False)


def perturbation_attention(g: MultiGraph, x: Tensor, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    query = x.sum(0).expand(ptr.shape[0] - 1, -1)
    return (cellattn.perturbation_attention(query, x, x, seeds, ptr, x.index_select(0, seeds).square(), scale=0.5),)


def sets(g: MultiGraph, x: Tensor, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    u = x.index_select(0, seeds)
    heads = u.unflatten(-1, (2, -1))
    pairs = set_pairs(ptr, seeds.shape[0], max_size=6)
    products = pairs.sum(u.index_select(0, pairs.first) * u.index_select(0, pairs.second))
    return set_sum(u, ptr), set_mean(u, ptr), set_attention(heads, heads, heads, ptr, 6), products


FUNCTIONS: list[Function] = [
    khop_mask, khop_subgraph, perturbation_mask, masked_spmm, masked_spmm_packed, relational, perturbation_attention, sets,
]  # fmt: skip


def distinct_sets(num_nodes: int, num_sets: int) -> tuple[Tensor, Tensor]:
    """Sets of up to five genes, each ascending."""
    drawn = [torch.randperm(num_nodes)[: int(torch.randint(0, 6, ()))].sort().values for _ in range(num_sets)]
    ptr = torch.tensor([0, *(len(genes) for genes in drawn)]).cumsum(0)
    return torch.cat(drawn), ptr


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_compiled_once_for_all_sizes(f: Function) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    count = {}
    for num_nodes, num_sets in SIZES + LARGER:
        g = random_graph(num_nodes, {"a": 2 * num_nodes, "b": 3 * num_nodes + 1}, weighted=True)
        x = torch.randn(num_nodes, 4, dtype=torch.float64, requires_grad=True)
        arguments = distinct_sets(num_nodes, num_sets)
        results = []
        for run in (f, compiled):
            out = run(g, x, *arguments)
            squares = [y.square().sum() for y in out if y.requires_grad]
            results.append([*out, *(torch.autograd.grad(torch.stack(squares).sum(), x) if squares else ())])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)
        count[num_sets] = counter.frame_count
    assert count[SIZES[-1][1]] == 1
    assert count[LARGER[-1][1]] == (2 if f.__name__ in IN_WORDS else 1)
