"""The loops over rows of scores that `attention_bce` has on the CPU, entry by entry against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cellattn.ops._bernoulli import SHARP

OPS = torch.ops.cellattn
SIZES = [1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 259]  # vectors of every instruction set, pairs of them, and what is left


def problem(n: int, dtype: torch.dtype, normalized: bool = True) -> dict[str, Any]:
    """A row of every gene; edges in one of five places, none in the last row, one gene unknown."""
    g = torch.Generator().manual_seed(n)
    t = torch.rand(n, n, generator=g, dtype=torch.float64) * (torch.rand(n, n, generator=g) < 0.2)
    unknown = torch.tensor([n // 2] if n > 4 else [], dtype=torch.int64)
    t[-1], t[unknown], t[:, unknown] = 0, 0, 0
    row, col = t.nonzero(as_tuple=True)
    rowptr = F.pad((t > 0).sum(1).cumsum(0), (1, 0))
    weight = t[row, col].to(dtype)
    mass = torch.zeros(n, dtype=torch.float64).index_add_(0, row, weight.double())
    inv_mass = torch.where(mass > 0, 1 / mass, 0).to(dtype)
    scores = 3 * torch.randn(n, n, generator=g, dtype=torch.float64).to(dtype)
    return {
        "scores": scores, "rows": torch.arange(n), "rowptr": rowptr, "col": col.int(),
        "weight": weight if normalized else None, "inv_mass": inv_mass, "unknown": unknown,
    }  # fmt: skip


def targets(p: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(t, 1 - t of valid pairs), float64 [N, N]"""
    n = len(p["scores"])
    degree = p["rowptr"].diff()
    row = torch.arange(n).repeat_interleave(degree)
    t = torch.zeros(n, n, dtype=torch.float64)
    if p["weight"] is None:
        t[row, p["col"].long()] = 1
    else:
        t[row, p["col"].long()] = torch.where(degree[row] == 1, 1, p["weight"].double() * p["inv_mass"].double()[row])
    negative = 1 - t
    negative[:, p["unknown"]] = 0
    return t, negative


def call(p: dict[str, Any], total: Tensor | None) -> tuple[Tensor, ...]:
    rest = (p[name] for name in ("rows", "rowptr", "col", "weight", "inv_mass", "unknown"))
    return OPS.bce_map(p["scores"].clone(), total, *rest, SHARP, math.inf)


def call_backward(p: dict[str, Any], total: Tensor | None, dloss: Tensor, sharp: Tensor) -> tuple[Tensor, Tensor]:
    scores = p["scores"].clone()
    rest = (p[name] for name in ("rows", "rowptr", "col", "weight", "inv_mass", "unknown"))
    return scores, OPS.bce_map_backward(dloss, sharp, scores, total, *rest, math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "binary"])
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_losses_and_slopes(link: str, normalized: bool, dtype: torch.dtype) -> None:
    """A term has a few roundings (8 is said of exp and log(1 + x) each), and its argument one of its own size; a sum of n
    one an addition.
    """
    eps = torch.finfo(dtype).eps
    for n in SIZES:
        p = problem(n, dtype, normalized)
        positive, negative = targets(p)
        s = p["scores"].double()
        total = s.logsumexp(1).to(dtype) if link == "softmax" else None
        x = s if total is None else s - total[:, None].double()
        chosen = torch.zeros(n, n, dtype=torch.bool)
        if total is None:
            terms = positive * F.softplus(-x) + negative * F.softplus(x)
            slope = negative * x.sigmoid() - positive * (-x).sigmoid()
        else:
            chosen = (x > SHARP) & (positive + negative > 0)
            a = x.exp().masked_fill(chosen, 0.5)
            terms = (-positive * x - negative * torch.log1p(-a)).masked_fill(chosen, 0)
            slope = (negative * a / (1 - a) - positive).masked_fill(chosen, 0)
        loss, gene, t, f = call(p, total)
        dloss = torch.rand(n, dtype=dtype)
        if total is not None:
            want = torch.where(chosen.any(1), chosen.int().argmax(1), -1)
            assert gene.equal(want)
            at = gene.clamp_min(0)[:, None]
            for got, of in ((t, positive), (f, negative)):
                expected = torch.where(gene >= 0, of.gather(1, at)[:, 0], 0)
                torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=2 * eps)
        roundings = (16 + x.abs()) * eps
        bound = (roundings * (terms.abs() + (positive + negative) * 2 * eps)).sum(1) + n * eps * terms.abs().sum(1) + eps
        assert ((loss.double() - terms.sum(1)).abs() <= bound).all(), n
        ds, dtotal = call_backward(p, total, dloss, gene)
        expected = slope * dloss.double()[:, None]
        limit = (4 * roundings * dloss.double()[:, None] * (positive + negative)).clamp_min(eps * eps)
        assert ((ds.double() - expected).abs() <= limit).all(), n
        assert (ds[:, p["unknown"]] == 0).all()
        if total is not None:
            within = limit.sum(1) + n * eps * expected.abs().sum(1)
            assert ((dtotal.double() + expected.sum(1)).abs() <= within).all(), n


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "binary"])
@pytest.mark.parametrize("n", [20, 40])
def test_what_is_not_finite(n: int, normalized: bool) -> None:
    """NaN stays in its row; -inf loses nothing where there is no edge, everything where there is one."""
    p = problem(n, torch.float32, normalized)
    positive, negative = targets(p)
    rows = (positive > 0).any(1).nonzero()[:, 0]
    edge, free = ((x[rows] > 0).int().argmax(1) for x in (positive, negative * (positive == 0)))
    for value, at, wanted in ((math.nan, free, math.nan), (math.nan, edge, math.nan), (-math.inf, edge, math.inf)):
        bad = {**p, "scores": p["scores"].clone()}
        bad["scores"][rows[0], at[0]] = value
        total = p["scores"].logsumexp(1) if value != value else bad["scores"].logsumexp(1)
        loss, *_ = call(bad, total)
        torch.testing.assert_close(loss[rows[0]], torch.tensor(wanted), equal_nan=True)
        assert loss[torch.arange(n) != rows[0]].isfinite().all()
        ds, dtotal = call_backward(bad, total, torch.ones(n), torch.full((n,), -1))
        assert ds[rows[0], at[0]].isnan() == dtotal[rows[0]].isnan() == (value != value)
    bad = {**p, "scores": p["scores"].clone()}
    bad["scores"][rows[0], free[0]] = -math.inf
    total = bad["scores"].logsumexp(1)
    loss, gene, *_ = call(bad, total)
    assert loss.isfinite().all()
    ds, dtotal = call_backward(bad, total, torch.ones(n), gene)
    assert ds[rows[0], free[0]] == 0
    assert dtotal.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_log_sum_exp_of_other_scores(dtype: torch.dtype) -> None:
    """One entry is left out as sharp; a second one above 2/3, which no softmax has, is what log(1 - a) says, NaN above 1."""
    n = 32
    p = problem(n, dtype)
    p["rowptr"], p["col"], p["weight"] = torch.zeros_like(p["rowptr"]), p["col"][:0], p["weight"][:0]
    p["scores"].fill_(-5)
    p["scores"][:, :2] = torch.tensor([-0.05, -0.1], dtype=dtype)
    loss, gene, *_ = call(p, torch.zeros(n, dtype=dtype))
    assert (gene == 0).all()
    x = p["scores"].double()
    x[:, p["unknown"]] = -math.inf
    torch.testing.assert_close(loss.double(), -torch.log1p(-x[:, 1:].exp()).sum(1), rtol=100 * torch.finfo(dtype).eps, atol=0)
    p["scores"][:, :2] = 0.5
    assert call(p, torch.zeros(n, dtype=dtype))[0].isnan().all()
