"""The extension's loops over blocks of sets, held to the same in float64, which PyTorch computes.

All factors are positive, so that each sum of n products errs by at most about n units in the last place of its own value, and
operands that are rounded to bfloat16 move it by at most half a unit of theirs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellattn.ops.screening import CrossTables, cross_attention, mlp

UNIT = 2.0**-24
HALVES = int(2.0**-9 / UNIT)  # of a rounding to bfloat16
DTYPES = (torch.float32, torch.bfloat16)  # of products

pytestmark = pytest.mark.usefixtures("isa")


def assert_close(got: Tensor, want: Tensor, roundings: int) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=roundings * UNIT, atol=0)


def assert_cross_attention(sets: Tensor, entries: int, heads: int, genes: int, head_dim: int, dtype: torch.dtype) -> None:
    dim, size = heads * head_dim, sets.shape[1]
    w, value, bias = torch.rand(entries, heads, genes), torch.rand(heads, genes, head_dim + 1), torch.rand(heads, genes)
    tables = CrossTables(w, value.to(dtype), bias, torch.rand(entries, dim), torch.rand(entries, dim))
    z, total = cross_attention(sets, sets, sets, tables)
    exact, exact_total = cross_attention(sets, sets, sets, CrossTables(*(x.double() for x in tables)))
    roundings = genes + size + HALVES * (dtype == torch.bfloat16)
    assert_close(total, exact_total, roundings)
    assert_close(z, exact, 2 * roundings + 16)  # a quotient of two sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [3, 20, 36])  # strips of one width and of two
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_cross_attention(size: int, head_dim: int, dtype: torch.dtype) -> None:
    """More sets than a block and more genes, an odd number, than are multiplied at a time; sets in any order."""
    torch.manual_seed(size)
    sets = torch.stack([torch.randperm(60)[:size] for _ in range(450)])
    assert_cross_attention(sets, 60, 2, 301, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("entries", [13, 37, 53])  # 13 are a group of their own; 5 are left of 37 and of 53
def test_sets_that_differ_in_their_first_gene(entries: int, size: int, dtype: torch.dtype) -> None:
    """As a screen asks for them: whole groups share all their other genes."""
    torch.manual_seed(size)
    first, second = torch.meshgrid(torch.arange(entries), torch.arange(entries, entries + 9), indexing="ij")
    sets = torch.stack([first.T.flatten(), second.T.flatten(), torch.full((first.numel(),), entries + 9)][:size], 1)
    assert_cross_attention(sets, entries + 10, 2, 300, 20, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [8, 24, 40, 264, 360])  # 264: three vectors of AVX2 that no tile may take together
@pytest.mark.parametrize("dim", [70, 75])
def test_mlp(hidden: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(hidden)
    x, up, bias, down = torch.rand(200, dim), torch.rand(hidden, dim).to(dtype), torch.rand(hidden), torch.rand(hidden)
    exact = mlp(x.to(dtype).double(), up.double(), bias.double(), down.double())
    assert_close(mlp(x, up, bias, down), exact, dim + hidden + 32)
