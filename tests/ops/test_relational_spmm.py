from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference
from cellattn.data import synthetic_cell

from ..bounds import arithmetic_of, assert_within_rounding
from ..compare import RTOL, assert_same, everything, leaves, values_and_grads
from .sets import Problem, problem, problems, random_sets

N = 40
GRAPH = problem(0, N, [90, 0, 300], 0).graph  # weighted, with self-loops and a relation without edges

shared_or_not = pytest.mark.parametrize("shared", [False, True], ids=["stored", "shared"])
one_or_each = pytest.mark.parametrize("each", [False, True], ids=["one-x", "x-per-relation"])
summed_or_not = pytest.mark.parametrize("sum_relations", [True, False], ids=["summed", "per-relation"])
scaled_or_not = pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])


class Between(NamedTuple):
    source: Tensor
    source_ptr: Tensor
    target: Tensor
    target_ptr: Tensor


def subsets(num_sets: int, num_nodes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Genes of each sample, ascending, as a ragged batch; every fifth sample is empty."""
    member = torch.rand(num_sets, num_nodes, generator=torch.Generator().manual_seed(seed)) < share
    member[3::5] = False
    return member.nonzero()[:, 1].contiguous(), torch.cat([torch.zeros(1, dtype=torch.int64), member.sum(1).cumsum(0)])


def between(num_sets: int, num_nodes: int = N, *, share: float = 0.6, seed: int = 0) -> Between:
    return Between(*subsets(num_sets, num_nodes, share, seed), *subsets(num_sets, num_nodes, share, seed + 1))


def features(b: Between, graph: MultiGraph, k: int, f: int, *, each: bool, shared: bool, seed: int = 0, **dtype: Any) -> Tensor:
    places = graph.num_nodes if shared else b.source.numel()
    return leaves((places, k, f) if each else (places, f), seed=seed, **dtype)[0]


def factor(b: Between, k: int, scaled: bool) -> Tensor | None:
    if not scaled:
        return None
    return torch.randn(b.target.numel(), k, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def product(module: Any, graph: MultiGraph, b: Between, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: module.relational_spmm(graph, x, *b, **options)


def assert_is_the_reference(graph: MultiGraph, b: Between, x: Tensor, **options: Any) -> None:
    assert_same(product(cellattn, graph, b, **options), product(reference, graph, b, **options), x)


@scaled_or_not
@summed_or_not
@one_or_each
@shared_or_not
@pytest.mark.parametrize("f", [1, 3, 64, 100])
def test_values_and_gradients(f: int, shared: bool, each: bool, sum_relations: bool, scaled: bool, isa: str) -> None:
    b = between(9)
    x = features(b, GRAPH, 3, f, each=each, shared=shared)
    assert_is_the_reference(GRAPH, b, x, scale=factor(b, 3, scaled), sum_relations=sum_relations, shared=shared)


def test_any_graph_and_batch(isa: str) -> None:
    @settings(max_examples=60)
    @given(
        problems(), st.integers(1, 20), st.sampled_from([0.0, 0.1, 0.7, 1.0]), st.booleans(), st.booleans(), st.booleans(),
        st.booleans(),
    )  # fmt: skip
    def check(p: Problem, f: int, share: float, shared: bool, each: bool, sum_relations: bool, scaled: bool) -> None:
        num_sets, k = min(p.ptr.numel() - 1, 12), len(p.graph.relations)
        b = between(num_sets, p.graph.num_nodes, share=share)
        x = features(b, p.graph, k, f, each=each, shared=shared)
        options: dict[str, Any] = {"scale": factor(b, k, scaled), "sum_relations": sum_relations, "shared": shared}
        got = everything(product(cellattn, p.graph, b, **options), x)
        # nothing sends or receives: the reference has no gradient
        connected = product(reference, p.graph, b, **options)
        want = everything(lambda x: connected(x) + 0 * x.sum(), x)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=RTOL)
        assert torch.equal(cellattn.relational_degree(p.graph, *b), reference.relational_degree(p.graph, *b))

    check()


@pytest.mark.parametrize("relations", [["r2"], ["r1"], ("r2", "r0"), []], ids=lambda names: "-".join(names) or "none")
@summed_or_not
@one_or_each
def test_some_relations_in_their_own_order(relations: Sequence[str], each: bool, sum_relations: bool, isa: str) -> None:
    b, k = between(9), len(relations)
    x = features(b, GRAPH, k, 5, each=each, shared=False)
    if k:
        options: dict[str, Any] = {"relations": relations, "scale": factor(b, k, True), "sum_relations": sum_relations}
        assert_is_the_reference(GRAPH, b, x, **options)
    else:
        out, dx = everything(product(cellattn, GRAPH, b, relations=relations, sum_relations=sum_relations), x)
        assert out.shape == ((b.target.numel(), 5) if sum_relations else (b.target.numel(), 0, 5))
        assert not out.any()
        assert not dx.any()
    assert torch.equal(
        cellattn.relational_degree(GRAPH, *b, relations=relations), reference.relational_degree(GRAPH, *b, relations=relations)
    )


@summed_or_not
@one_or_each
@shared_or_not
def test_empty_batches(shared: bool, each: bool, sum_relations: bool, isa: str) -> None:
    """No sample, and samples that are all empty; no feature."""
    for num_sets, share in ((0, 1.0), (5, 0.0)):
        b = between(num_sets, share=share)
        x = features(b, GRAPH, 3, 4, each=each, shared=shared)
        out, dx = everything(product(cellattn, GRAPH, b, sum_relations=sum_relations, shared=shared), x)
        assert out.shape == ((0, 4) if sum_relations else (0, 3, 4))
        assert dx.shape == x.shape
        assert not dx.any()
        assert cellattn.relational_degree(GRAPH, *b).shape == (0, 3)
    b = between(4)
    x = features(b, GRAPH, 3, 0, each=each, shared=shared)
    assert cellattn.relational_spmm(GRAPH, x, *b, sum_relations=sum_relations, shared=shared).shape[-1] == 0


def test_one_gene_with_a_self_loop() -> None:
    graph = MultiGraph.from_edge_index({"r": torch.tensor([[0], [0]])}, 1, edge_weight={"r": torch.tensor([3.0])})
    only, ptr = torch.tensor([0, 0]), torch.tensor([0, 1, 1, 2])
    (x,) = leaves((2, 4))
    assert torch.equal(cellattn.relational_spmm(graph, x, only, ptr, only, ptr), 3 * x)
    assert cellattn.relational_degree(graph, only, ptr, only, ptr).tolist() == [[1], [1]]


def test_senders_without_receivers_and_the_other_way_round() -> None:
    """The difference of two propagations flows from few genes to their neighbours."""
    source, target = torch.tensor([3, 7, 1]), torch.tensor([0, 5, 6])
    b = Between(source, torch.tensor([0, 2, 2, 3]), target, torch.tensor([0, 0, 1, 3]))
    for shared in (False, True):
        x = features(b, GRAPH, 3, 5, each=True, shared=shared)
        assert_is_the_reference(GRAPH, b, x, shared=shared)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@one_or_each
@shared_or_not
def test_every_dtype_and_instruction_set(shared: bool, each: bool, dtype: torch.dtype, isa: str) -> None:
    """More features than a register holds, and not a multiple."""
    b = between(9)
    x = features(b, GRAPH, 3, 70, each=each, shared=shared, dtype=dtype)
    ours, dense = (product(m, GRAPH, b, scale=factor(b, 3, True), shared=shared) for m in (cellattn, reference))
    assert_within_rounding(ours, dense, x)
    assert torch.equal(cellattn.relational_degree(GRAPH, *b), reference.relational_degree(GRAPH, *b))


@summed_or_not
@shared_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_is_within_rounding(dtype: torch.dtype, shared: bool, sum_relations: bool, isa: str) -> None:
    graph = problem(2, 60, [1200, 300], 0).graph
    b = between(20, 60)
    x = features(b, graph, 2, 16, each=True, shared=shared, dtype=dtype)
    options = {"scale": factor(b, 2, True), "sum_relations": sum_relations, "shared": shared}
    ours, dense = (product(module, graph, b, **options) for module in (cellattn, reference))
    assert_within_rounding(ours, dense, x)
    assert {y.dtype for y in everything(ours, x)} == {dtype}


def test_is_masked_spmm_where_all_kept_genes_send_and_receive(isa: str) -> None:
    graph = synthetic_cell(num_genes=700)
    keep, _ = cellattn.perturbation_mask(graph, *random_sets(700, 5))
    gene, ptr = keep.nonzero()[:, 1].contiguous(), torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    (x,) = leaves((5, 700, 70), dtype=torch.float32)
    out = cellattn.relational_spmm(graph, x[keep], gene, ptr, gene, ptr, sum_relations=False)
    mean = cellattn.relational_spmm(
        graph, x[keep], gene, ptr, gene, ptr, sum_relations=False,
        scale=1 / cellattn.relational_degree(graph, gene, ptr, gene, ptr).clamp(min=1),
    )  # fmt: skip
    degree = cellattn.relational_degree(graph, gene, ptr, gene, ptr)[..., None].double()
    for r, name in enumerate(graph.relations):
        size = cellattn.masked_spmm(graph, name, x.double().abs(), keep)[keep]
        for reduce, got in (("sum", out), ("mean", mean)):
            want = cellattn.masked_spmm(graph, name, x, keep, reduce=reduce)[keep]
            n = degree[:, r]
            terms, total = (n, size) if reduce == "sum" else (n + 2, size / n.clamp(min=1))  # 1 / n, and times it
            assert ((got[:, r] - want).abs() <= 2 * arithmetic_of(torch.float32).sum(terms) * total).all()


def test_shared_features_are_features_gathered(isa: str) -> None:
    b = between(9)
    (x,) = leaves((N, 3, 33), dtype=torch.float32)
    shared = product(cellattn, GRAPH, b, shared=True)

    def gathered(x: Tensor) -> Tensor:
        return cellattn.relational_spmm(GRAPH, x[b.source], *b)

    assert torch.equal(shared(x), gathered(x))
    for f in (shared, gathered):
        assert_within_rounding(f, product(reference, GRAPH, b, shared=True), x)


def test_what_does_not_send_is_not_read() -> None:
    """NaN and infinity of shared features stay out of samples in which their gene does not send."""
    b = between(1)
    (x,) = leaves((N, 3, 5))
    silent = torch.ones(N, dtype=torch.bool).index_fill(0, b.source, False)
    assert silent.any()
    want, dwant = values_and_grads(product(cellattn, GRAPH, b, shared=True), x)
    for bad in (float("nan"), float("inf")):
        poisoned = torch.where(silent[:, None, None], bad, x.detach())
        got, dgot = values_and_grads(product(cellattn, GRAPH, b, shared=True), poisoned)
        assert torch.equal(got[0], want[0])
        assert torch.equal(dgot[0], dwant[0])
        assert not dgot[0][silent].any()


def test_a_graph_in_double_precision() -> None:
    """Its weights are used as they are in float64."""
    weight = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    graph = MultiGraph.from_edge_index({"r": torch.tensor([[0, 1], [1, 0]])}, 2, edge_weight={"r": weight})
    gene, ptr = torch.tensor([0, 1]), torch.tensor([0, 2])
    x = torch.tensor([[3.0], [5.0]], dtype=torch.float64)
    out = cellattn.relational_spmm(graph, x, gene, ptr, gene, ptr)
    assert out.flatten().tolist() == [float(weight[0] * 5), float(weight[1] * 3)]


def test_strided_arguments() -> None:
    b = between(9)
    x = leaves((5, b.source.numel(), 3))[0].permute(1, 2, 0)
    apart = Between(*(torch.stack([y, y], -1)[:, 0] for y in b))
    scale = factor(b, 3, True)
    assert scale is not None
    assert not x.is_contiguous()
    assert not apart.source.is_contiguous()
    want = cellattn.relational_spmm(GRAPH, x.contiguous(), *b, scale=scale)
    assert torch.equal(cellattn.relational_spmm(GRAPH, x, *apart, scale=scale.t().contiguous().t()), want)
    assert torch.equal(cellattn.relational_degree(GRAPH, *apart), cellattn.relational_degree(GRAPH, *b))


@scaled_or_not
@summed_or_not
@one_or_each
@shared_or_not
def test_gradcheck(shared: bool, each: bool, sum_relations: bool, scaled: bool) -> None:
    graph = problem(7, 6, [20, 5], 0).graph
    b = between(3, 6)
    x = features(b, graph, 2, 2, each=each, shared=shared)
    options: dict[str, Any] = {"scale": factor(b, 2, scaled), "sum_relations": sum_relations, "shared": shared}
    assert torch.autograd.gradcheck(product(cellattn, graph, b, **options), (x,))


def test_the_features_are_not_kept_for_the_backward() -> None:
    """They may be the largest tensor of a layer; the gradient needs none of their values."""
    b = between(3)
    x = features(b, GRAPH, 3, 4, each=True, shared=False)
    kept: list[int] = []

    def keep(y: Tensor) -> Tensor:
        kept.append(y.data_ptr())
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        cellattn.relational_spmm(GRAPH, x, *b)
    assert kept
    assert x.data_ptr() not in kept


def test_double_backward_is_refused() -> None:
    b = between(3)
    x = features(b, GRAPH, 3, 2, each=False, shared=False)
    (dx,) = torch.autograd.grad(cellattn.relational_spmm(GRAPH, x, *b).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cellattn.relational_spmm: double backward is not supported"):
        dx.sum().backward()


@shared_or_not
def test_equal_from_run_to_run(shared: bool) -> None:
    graph = problem(10, 60, [2000, 500], 0).graph
    b = between(70, 60)
    x = features(b, graph, 2, 33, each=True, shared=shared, dtype=torch.float32)
    f = product(cellattn, graph, b, shared=shared)
    for first, again in zip(everything(f, x), everything(f, x), strict=True):
        assert torch.equal(first, again)


@shared_or_not
def test_however_many_threads(shared: bool) -> None:
    """Blocks of work differ, sums do not."""
    graph = synthetic_cell(num_genes=700)
    b = between(7, 700)
    x = features(b, graph, len(graph.relations), 8, each=True, shared=shared, dtype=torch.float32)
    f = product(cellattn, graph, b, shared=shared)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 5):
            torch.set_num_threads(n)
            results.append(everything(f, x))
    finally:
        torch.set_num_threads(threads)
    for one, five in zip(*results, strict=True):
        assert torch.equal(one, five)
