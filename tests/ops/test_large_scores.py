"""Scores from 100 to 1e10: every function of scores keeps its values and gradients, in every dtype.

A float32 score of 1e6 is off by a tenth, whoever adds it up; P would be off by as much, and where the score and its log-sum-exp
are rounded apart, P is not even a probability. So on the CPU such scores are made in float64. What may be left, relative to the
sizes of a sum's terms: the roundings of a score, d + 2 of d |q| |k|, in the arithmetic that is used, and a few of the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import reference
from cellattn.ops.attention import _LARGEST_ERROR, _largest_rounding

from ..bounds import assert_attention_gradients, assert_within_rounding
from ..compare import everything, of_large_scores, random_graph, values_and_grads, with_drawn_negatives

D, PREFIX = 8, 1
GRAPH = random_graph(37, {"a": 200}, weighted=True).extend(2)
TOKENS = GRAPH.num_nodes + PREFIX
INDEX, PTR = torch.tensor([3, 8, 1, 0, 5]), torch.tensor([0, 2, 3, 3, 5])
UPSTREAM = 4.0  # larger than any of the few normal deviates that gradients are weighed with


def loss(name: str, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def of(module: Any) -> Callable[..., Tensor]:
        return lambda q, k: getattr(module, name)(q, k, GRAPH, "a", num_prefix=PREFIX, reduction="none", **options)

    return of(cellattn), of(reference)


LOSSES = {
    "kl": loss("attention_kl"),
    "kl valid": loss("attention_kl", over="valid"),
    "bce": loss("attention_bce"),
    "bce binary": loss("attention_bce", target="binary"),
    "bce sigmoid": loss("attention_bce", link="sigmoid"),
    "bce sigmoid binary": loss("attention_bce", link="sigmoid", target="binary"),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [1e2, 1e4, 1e5, 1e6, 1e8, 1e10]  # no float16 is large enough for the last
sizes = pytest.mark.parametrize(
    ("size", "dtype"), [(size, dtype) for dtype in DTYPES for size in SIZES[: 4 if dtype == torch.float16 else None]]
)


def draw(size: float, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [(size**0.5 * torch.randn(shape, dtype=torch.float64, generator=g)).to(dtype) for shape in shapes]


def left(q: Tensor, k: Tensor, scale: float = D**-0.5) -> float:
    """Of a sum of terms weighed with P, by their size."""
    rounding = _largest_rounding(q, k, scale)
    if rounding > _LARGEST_ERROR:
        rounding = _largest_rounding(q.double(), k.double(), scale)
    return 8 * rounding + 8 * torch.finfo(q.dtype).eps


def assert_near(got: Tensor, want: Tensor, size: float, share: float, name: str) -> None:
    fits = want.abs() <= torch.finfo(got.dtype).max
    got = got.double()
    near = torch.where(fits, (got - want).abs() <= share * size, got.isinf())
    assert near.all(), f"{name}: off by {float((got - want).abs().max() / size):.1e} of its size, {share:.1e} is explained"


@sizes
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, size: float, dtype: torch.dtype) -> None:
    ours, theirs = LOSSES[name]
    q, k = draw(size, dtype, (TOKENS, D), (TOKENS, D))
    (got,), grads = values_and_grads(ours, q, k)
    (want,), exact = values_and_grads(theirs, q.double(), k.double())
    score = max(1.0, float((q.double() @ k.double().mT).abs().max()) * D**-0.5)
    terms = 1 if name.startswith("kl") else GRAPH.num_nodes  # those of KL have weights that add up to 1
    assert_near(got, want, terms * score, 8 * torch.finfo(got.dtype).eps, "loss")
    largest_k, largest_q = (UPSTREAM * D**-0.5 * float(x.abs().max()) for x in (k, q))
    assert_near(grads[0], exact[0], 2 * largest_k, left(q, k), "dq")
    assert_near(grads[1], exact[1], TOKENS * largest_q, left(q, k), "dk")


@pytest.mark.parametrize("score", [20.0, 25.0, 36.0, 500.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_link_keeps_what_is_left_of_a_certain_pair(score: float, dtype: torch.dtype) -> None:
    """-log sigmoid(s) = log(1 + e^-s) is e^-s to the last digits, and so is its derivative: neither is s - s or 1 - 1."""
    graph = cellattn.MultiGraph.from_edge_index({"a": torch.tensor([[0], [0]])}, 1)
    q, k = torch.ones(1, 1, dtype=dtype), torch.full((1, 1), score, dtype=dtype)
    for target in ("binary", "normalized"):
        options: dict[str, Any] = {"link": "sigmoid", "target": target, "scale": 1.0, "reduction": "sum"}
        (got,), (dq, dk) = values_and_grads(lambda q, k: cellattn.attention_bce(q, k, graph, "a", **options), q, k)
        (want,), exact = values_and_grads(lambda q, k: torch.exp(-(q * k).sum()).log1p(), q.double(), k.double())
        floor = torch.finfo(got.dtype).smallest_normal
        torch.testing.assert_close(got.double(), want, rtol=8 * torch.finfo(got.dtype).eps, atol=floor)
        least = torch.finfo(dtype).smallest_normal if dtype != torch.float16 else 2.0**-24
        for a, b in zip((dq, dk), exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=8 * torch.finfo(dtype).eps, atol=least)


@sizes
def test_attention(size: float, dtype: torch.dtype) -> None:
    q, k, v = draw(size, dtype, (40, D), (50, D), (50, 6))
    v = (v.double() / size**0.5).to(dtype)
    (out, lse), grads = values_and_grads(cellattn.attention, q, k, v)
    (out_want, lse_want), exact = values_and_grads(reference.attention, q.double(), k.double(), v.double())
    share, value = left(q, k), float(v.abs().max())
    assert_near(out, out_want, value, share, "out")
    assert_near(lse, lse_want, max(1.0, float(lse_want.abs().max())), 8 * torch.finfo(lse.dtype).eps, "lse")
    above = UPSTREAM * D**-0.5 * (1 + 2 * v.shape[-1] * value)
    assert_near(grads[0], exact[0], above * float(k.abs().max()), share, "dq")
    assert_near(grads[1], exact[1], 40 * above * float(q.abs().max()), share, "dk")
    assert_near(grads[2], exact[2], 40 * UPSTREAM, share, "dv")


@sizes
def test_edge_attention(size: float, dtype: torch.dtype) -> None:
    q, k, v = draw(size, dtype, (2, TOKENS, D), (2, TOKENS, D), (2, TOKENS, 6))
    v = (v.double() / size**0.5).to(dtype)
    bias = torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    heads = [("a", 0), ("a", 1)]

    def of(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda q, k, v, bias: module.edge_attention(
            q, k, v, GRAPH, heads, num_prefix=PREFIX, weighted=True, edge_bias=bias
        )

    (out, lse), grads = values_and_grads(of(cellattn), q, k, v, bias)
    (out_want, lse_want), exact = values_and_grads(of(reference), *(x.double() for x in (q, k, v, bias)))
    share, value = left(q, k), float(v.abs().max())
    assert_near(out, out_want, value, share, "out")
    assert_near(lse, lse_want, max(1.0, float(lse_want.abs().max())), 8 * torch.finfo(lse.dtype).eps, "lse")
    above = UPSTREAM * D**-0.5 * (1 + 2 * v.shape[-1] * value)
    assert_near(grads[0], exact[0], above * float(k.abs().max()), share, "dq")
    assert_near(grads[1], exact[1], TOKENS * above * float(q.abs().max()), share, "dk")
    assert_near(grads[2], exact[2], TOKENS * UPSTREAM, share, "dv")
    assert_near(grads[3], exact[3], TOKENS * above * D**0.5, share, "edge_bias")


@pytest.mark.parametrize("bias", [1e6, -1e8])
def test_edge_bias_that_leaves_float32_no_digits_of_scores(bias: float) -> None:
    """The same for every edge, it changes nothing of the map."""
    n = GRAPH.num_nodes
    x = draw(1.0, torch.float32, (1, n, D), (1, n, D), (1, n, 6))

    def of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        added = torch.tensor([bias], dtype=q.dtype)
        out, _ = cellattn.edge_attention(q, k, v, GRAPH, [("a", 0)], num_prefix=0, self_loops=False, edge_bias=added)
        return out

    got, want = everything(of, *x), everything(of, *(y.double() for y in x))
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b).norm()) <= 8 * torch.finfo(torch.float32).eps * float(b.norm())


@pytest.mark.parametrize("weighted", [True, False])
def test_edge_attention_of_scores_that_differ_in_the_last_digits(weighted: bool) -> None:
    """Of rows with scores of 2 and 7 million, a spacing of 1/2 apart in float32, and of rows with small ones."""
    n, dv, prefix = 37, 6, 2
    row, col = (torch.rand(n, n, generator=torch.Generator().manual_seed(2)) < 0.2).fill_diagonal_(False).nonzero().T
    weight = torch.rand(row.numel(), generator=torch.Generator().manual_seed(3)) + 0.5
    graph = cellattn.MultiGraph.from_edge_index({"a": torch.stack([row, col])}, n, edge_weight={"a": weight})
    q, k, v = draw(1.0, torch.float32, (2, n + prefix, D), (2, n + prefix, D), (2, n + prefix, dv))
    q, k = ((1e3 + x.double()).float() for x in (100 * q, 1e-3 * k))
    q[1] *= 1.5
    q[:, ::3] *= 1e-6
    bias = torch.tensor([0.5, -1e3])
    given = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    heads = [("a", 0), ("a", 1)]
    options: dict[str, Any] = {"num_prefix": prefix, "weighted": weighted, "edge_bias": given[3]}
    result = cellattn.edge_attention(given[0], given[1], given[2], graph, heads, **options)
    dout, dlse = draw(1.0, torch.float32, *(y.shape for y in result))
    got = torch.autograd.grad(result, given, (dout, dlse))

    added = torch.full((2, n + prefix, n + prefix), -torch.inf, dtype=torch.float64)
    added[:, :prefix] = added[:, :, :prefix] = 0
    added.diagonal(dim1=1, dim2=2).zero_()
    added[:, prefix + row, prefix + col] = bias.double()[:, None] + (graph.weight("a").double().log() if weighted else 0)
    scores = q.double() @ k.double().mT * D**-0.5
    assert scores[:, 1::3].min() > 2e6
    assert scores[:, ::3].max() < 10
    assert_attention_gradients(got[:3], q, k, v, dout, dlse, D**-0.5, added=added)
    p = (scores + added).softmax(-1)
    dp = dout.double() @ v.double().mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True) + dlse.double()[..., None])
    size = p * (2 * v.shape[-1] * float(v.abs().max() * dout.abs().max()) + dlse.abs().double()[..., None])
    want, size = (x[:, prefix + row, prefix + col].sum(-1) for x in (ds, size))
    assert ((got[3].double() - want).abs() <= 64 * torch.finfo(torch.float32).eps * size).all()


ROWS = (3, 1, 8, 3, 3, *range(10, 34))
LAST_DIGITS = [  # size, negatives, rows
    *((size, negatives, ROWS) for size in (1e5, 1e6, 1e8, 1e10) for negatives in (None, 9)),
    (1e6, None, None), (1e6, 2.0, None),
]  # fmt: skip


def bce_in_last_digits(
    size: float, negatives: int | float | None, rows: tuple[int, ...] | None, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """(op, definition, q, k): rows with a sharp entry and rows without, of large scores and of small ones."""
    chosen, scale = None if rows is None else torch.tensor(rows), D**-0.5
    q, k = draw(1.0, dtype, (2, TOKENS, D), (2, TOKENS, D))
    q[:, ::2] *= 8
    if negatives is not None:
        op, definition = with_drawn_negatives(GRAPH, "a", chosen, negatives, link="softmax", num_prefix=PREFIX, scale=scale)
        return of_large_scores(op, size, scale), definition, q, k

    def of(module: Any) -> Callable[..., Tensor]:
        return lambda q, k: module.attention_bce(
            q, k, GRAPH, "a", rows=chosen, num_prefix=PREFIX, scale=scale, reduction="none"
        )

    return of_large_scores(of(cellattn), size, scale), of(reference), q, k


def name_of(x: Any) -> str:
    return "some rows" if isinstance(x, tuple) else "all" if x is None else str(x)


@pytest.mark.parametrize(("size", "negatives", "rows"), LAST_DIGITS, ids=name_of)
def test_bce_of_scores_that_differ_in_the_last_digits(
    size: float, negatives: int | float | None, rows: tuple[int, ...] | None
) -> None:
    assert_within_rounding(*bce_in_last_digits(size, negatives, rows), parts=True)


@sizes
def test_perturbation_attention(size: float, dtype: torch.dtype) -> None:
    """Queries that single out a gene of the set, one of none, and others."""
    query, key, value, override = draw(size, dtype, (4, D), (12, D), (12, 6), (5, 6))
    query[0], query[1], query[3] = key[3], key[1], key[7]
    value, override = ((x.double() / size**0.5).to(dtype) for x in (value, override))
    inputs = query, key, value, override
    (z,), grads = values_and_grads(lambda q, k, v, u: cellattn.perturbation_attention(q, k, v, INDEX, PTR, u), *inputs)
    (want,), exact = values_and_grads(
        lambda q, k, v, u: reference.perturbation_attention(q, k, v, INDEX, PTR, u), *(x.double() for x in inputs)
    )
    share, most = left(query, key, 1.0), float(max(value.abs().max(), override.abs().max()))
    assert_near(z, want, 4 * most, share, "z")
    above = 8 * UPSTREAM * 6 * most
    for name, a, b, factor in zip(
        ("dquery", "dkey", "dvalue", "doverride"), grads, exact,
        (above * float(key.abs().max()), 4 * above * float(query.abs().max()), 8 * UPSTREAM, UPSTREAM), strict=True,
    ):  # fmt: skip
        assert_near(a, b, factor, share, name)


@pytest.mark.parametrize(("z_size", "w_size"), [(1e18, 1e-18), (1e18, 1e18), (1e-20, 1e-20), (1e-20, 1e20), (1e10, 1e10)])
def test_network_mse(z_size: float, w_size: float) -> None:
    """float32 of any size: what is infinite is larger than float32 can hold, and nothing is NaN."""
    n = GRAPH.num_nodes
    g = torch.Generator().manual_seed(0)
    z, w, b = (
        (x * torch.randn(shape, generator=g, dtype=torch.float64)).float()
        for x, shape in ((z_size, (n, D)), (w_size, (n, D)), (1.0, (n,)))
    )
    got = everything(lambda z, w, b: cellattn.network_mse(z, w, b, GRAPH, "a"), z, w, b)
    want = everything(lambda z, w, b: reference.network_mse(z, w, b, GRAPH, "a"), z.double(), w.double(), b.double())
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_near(x, y, float(y.abs().max()), 64 * torch.finfo(torch.float32).eps, f"result {i}")


MEANS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("attention_kl", {}),
    "kl valid": ("attention_kl", {"over": "valid"}),
    "bce": ("attention_bce", {}),
    "bce sigmoid": ("attention_bce", {"link": "sigmoid", "num_negatives": 2}),
    "bce of a graph": ("attention_bce", {"neg_sample_ratio": 2.0}),
}


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 3, 3, 5])], ids=["all", "some"])
@pytest.mark.parametrize("name", MEANS)
def test_a_mean_is_finite_where_the_sum_is_not(name: str, rows: Tensor | None) -> None:
    function, options = MEANS[name]
    if "neg_sample_ratio" in options and rows is not None:
        pytest.skip("draws for the whole graph")
    size = 2e36 if rows is None else 4e36 if "sigmoid" in name else 1.6e37
    q, k = draw(size, torch.float32, (3, TOKENS, D), (3, TOKENS, D))

    def of(reduction: str, q: Tensor, k: Tensor) -> Tensor:
        own = torch.Generator().manual_seed(0)
        negatives = {"generator": own} if function == "attention_bce" else {}
        f = getattr(cellattn, function)
        loss: Tensor = f(q, k, GRAPH, "a", num_prefix=PREFIX, rows=rows, reduction=reduction, **options, **negatives)
        return loss

    (got,), grads = values_and_grads(lambda q, k: of("mean", q, k), q, k)
    (want,), exact = values_and_grads(lambda q, k: of("mean", q, k), q.double(), k.double())
    assert of("sum", q, k).isinf()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    for x, y in zip(grads, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5 * float(y.abs().max()))


def test_the_mean_of_squared_errors_is_finite_where_the_sum_of_a_row_is_not() -> None:
    z, weight, bias = draw(2e18, torch.float32, (GRAPH.num_nodes, D), (GRAPH.num_nodes, D), (GRAPH.num_nodes,))
    for rows in (None, torch.tensor([1, 3])):
        got = cellattn.network_mse(z, weight, bias, GRAPH, "a", rows=rows)
        exact = reference.network_mse(z.double(), weight.double(), bias.double(), GRAPH, "a", rows=rows)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)
        assert cellattn.network_mse(z, weight, bias, GRAPH, "a", rows=rows, reduction="none").isinf().any()
