from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import cellattn
from cellattn import MultiGraph, reference
from cellattn.ops.attention_bce import sample_negatives

from ..compare import assert_same, everything, leaves, random_graph, values_and_grads


@pytest.mark.parametrize("rows", [None, [3, 0, 17], [], [4, 4]], ids=str)
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("target", ["normalized", "binary"])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("weighted", [False, True], ids=["binary", "weighted"])
def test_every_combination(weighted: bool, num_prefix: int, target: str, link: str, rows: list[int] | None) -> None:
    graph = random_graph(37, {"dense": 600, "sparse": 20, "empty": 0}, weighted=weighted)
    graph = graph.extend(3, {"sparse": torch.tensor([[37, 3], [5, 38]])})
    index = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    for lead, relation, reduction in itertools.product(((), (2,)), graph.relations, ("mean", "sum", "none")):
        q, k = leaves((*lead, num_prefix + 40, 8), (*lead, num_prefix + 40, 8))
        options: dict[str, Any] = {
            "rows": index,
            "num_prefix": num_prefix,
            "target": target,
            "link": link,
            "reduction": reduction,
        }
        assert_same(
            lambda q, k: cellattn.attention_bce(q, k, graph, relation, **options),
            lambda q, k: reference.attention_bce(q, k, graph, relation, **options),
            q,
            k,
        )


def test_many_row_blocks() -> None:
    """More score entries than one row block holds."""
    graph = random_graph(1000, {"a": 20_000})
    q, k = leaves((1001, 8), (1001, 8))
    assert_same(
        lambda q, k: cellattn.attention_bce(q, k, graph, "a", num_prefix=1),
        lambda q, k: reference.attention_bce(q, k, graph, "a", num_prefix=1),
        q,
        k,
    )


def test_agrees_with_torch_binary_cross_entropy() -> None:
    """The definition by another hand."""
    graph = random_graph(30, {"a": 600})
    q, k = leaves((30, 8), (30, 8))
    _, edges, _ = reference.target(graph, "a")
    assert edges.any(1).all()
    expected = F.binary_cross_entropy_with_logits(q @ k.T, edges.double(), reduction="sum")
    got = cellattn.attention_bce(q, k, graph, "a", target="binary", link="sigmoid", scale=1.0, reduction="sum")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_sampled_negatives_are_unbiased(link: str) -> None:
    """Loss and gradient, averaged over draws, within 5 standard errors of the loss over every non-edge."""
    graph = random_graph(25, {"a": 120}).extend(2)
    (q, k) = leaves((28, 4), (28, 4))
    g = torch.Generator().manual_seed(0)

    def draw(num_negatives: int | None) -> torch.Tensor:
        loss = cellattn.attention_bce(
            q, k, graph, "a", num_prefix=1, num_negatives=num_negatives, link=link, reduction="none", generator=g
        )
        dq, dk = torch.autograd.grad(loss.sum(), (q, k))
        return torch.cat([loss.detach(), dq.flatten(), dk.flatten()])

    draws = torch.stack([draw(3) for _ in range(2000)])
    error = (draws.mean(0) - draw(None)).abs()
    assert (error <= 5 * draws.std(0) / 2000**0.5 + 1e-12).all()


def test_negatives_are_uniform_over_valid_non_edges() -> None:
    graph = random_graph(12, {"a": 30}).extend(2, {"a": torch.tensor([[12], [3]])})
    _, edges, valid = reference.target(graph, "a")
    rows = torch.arange(14)
    drawn = sample_negatives(graph, "a", rows, 20_000, torch.Generator().manual_seed(0))
    counts = torch.stack([torch.bincount(row, minlength=14) for row in drawn])
    for i in range(13):  # gene 13 is unknown: its row has no valid pair
        free = valid[i] & ~edges[i]
        assert counts[i][~free].sum() == 0
        expected = 20_000 / int(free.sum())
        assert (counts[i][free] - expected).abs().max() < 6 * expected**0.5


def test_negatives_of_a_full_row() -> None:
    """A row where every valid pair is an edge has no non-edge to draw; its negatives have weight 0."""
    n = 6
    hub = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)])
    graph = MultiGraph.from_edge_index({"a": hub}, n)
    q, k = leaves((n, 4), (n, 4))
    assert_same(
        lambda q, k: cellattn.attention_bce(q, k, graph, "a", num_negatives=5),
        lambda q, k: reference.attention_bce(q, k, graph, "a"),
        q,
        k,
    )


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_more_negatives_than_pairs(link: str) -> None:
    """Regression test: edges and draws together may outnumber the entries of an [R, N] matrix."""
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 0, 0, 2], [0, 1, 2, 1]])}, 4)
    q, k = leaves((4, 3), (4, 3))
    g = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_negatives": 4000, "generator": g, "link": link, "reduction": "none"}
    (got,), grads = values_and_grads(lambda q, k: cellattn.attention_bce(q, k, graph, "a", **options), q, k)
    (want,), exact = values_and_grads(lambda q, k: reference.attention_bce(q, k, graph, "a", link=link, reduction="none"), q, k)
    # one non-edge in row 0, so its draws are exact; three in row 2, of which 4,000 draws leave about 2%
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.05)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_generator_repeats_the_draw() -> None:
    graph = random_graph(50, {"a": 200})
    q, k = leaves((50, 4), (50, 4))

    def draw(seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return cellattn.attention_bce(q, k, graph, "a", num_negatives=2, generator=g)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("gap", [1e-3, 1.0, 30.0, 300.0])
def test_log_one_minus_a_near_zero_and_one(gap: float) -> None:
    """float32 against float64, where a is near 1 in one entry and near 0 in the other."""
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 1], [1, 0]])}, 2)
    q = torch.tensor([[gap], [gap]], dtype=torch.float64)
    k = torch.tensor([[1.0], [0.0]], dtype=torch.float64)

    def run(dtype: torch.dtype):
        return values_and_grads(
            lambda q, k: cellattn.attention_bce(q, k, graph, "a", scale=1.0, reduction="none"), q.to(dtype), k.to(dtype)
        )

    (low,), low_grads = run(torch.float32)
    (high,), high_grads = run(torch.float64)
    assert low.isfinite().all()
    assert all(g.isfinite().all() for g in low_grads + high_grads)
    # Beyond a gap of -log eps, 1 - a is below the spacing of the dtype and is held there.
    if gap < 15:
        torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-6)


def test_gradcheck_and_double_backward() -> None:
    graph = random_graph(5, {"a": 9}, weighted=True)
    q, k = leaves((6, 3), (6, 3))
    for link, target in itertools.product(("softmax", "sigmoid"), ("normalized", "binary")):
        assert torch.autograd.gradcheck(
            lambda q, k: cellattn.attention_bce(q, k, graph, "a", num_prefix=1, link=link, target=target), (q, k)
        )
    (dq,) = torch.autograd.grad(cellattn.attention_bce(q, k, graph, "a", num_prefix=1), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dq.sum().backward()


@pytest.mark.parametrize("num_negatives", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision(dtype: torch.dtype, num_negatives: int | None) -> None:
    """Inputs rounded to the dtype, then only its own rounding: a few spacings of the result."""
    graph = random_graph(100, {"a": 900})
    q, k = (x.detach().to(dtype) for x in leaves((101, 20), (101, 20)))

    def run(*x):
        g = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"num_prefix": 1, "num_negatives": num_negatives, "generator": g}
        return everything(lambda q, k: cellattn.attention_bce(q, k, graph, "a", **options), *x)

    for a, w in zip(run(q, k), run(q.double(), k.double()), strict=True):
        assert float((a.double() - w).abs().max()) <= 4 * torch.finfo(a.dtype).eps * float(w.abs().max()) + 1e-5


def test_memory_of_every_non_edge_is_a_row_block(two_threads: None) -> None:
    """A [N, N] float32 tensor would take 100 MB here, and its backward several."""
    from benchmarks.measure import peak_memory

    graph = random_graph(5000, {"a": 50_000})
    q, k = leaves((5001, 8), (5001, 8), dtype=torch.float32)

    def step() -> None:
        cellattn.attention_bce(q, k, graph, "a", num_prefix=1).backward()

    step()
    assert peak_memory(step) < 40e6
