"""The extension's loops over blocks of sets, held to the same in float64, which PyTorch computes.

All factors are positive, so that each sum of n products errs by at most about n units in the last place of its own value.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellattn.ops.screening import CrossTables, cross_attention, mlp

UNIT = 2.0**-24


def assert_close(got: Tensor, want: Tensor, roundings: int) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=roundings * UNIT, atol=0)


@pytest.mark.parametrize("head_dim", [5, 20, 36])  # 1, 3 and 5 vectors of AVX2: a tile of each width
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_cross_attention(size: int, head_dim: int) -> None:
    """More sets than a block and more genes than are multiplied at a time, sets in any order."""
    num_sets, entries, heads, genes = 450, 60, 2, 300
    torch.manual_seed(size)
    dim = heads * head_dim
    sets = torch.stack([torch.randperm(entries)[:size] for _ in range(num_sets)])
    w, value, bias = torch.rand(entries, heads, genes), torch.rand(heads, genes, head_dim + 1), torch.rand(heads, genes)
    tables = CrossTables(w, value, bias, torch.rand(entries, dim), torch.rand(entries, dim))
    z, total = cross_attention(sets, sets, sets, tables)
    exact, exact_total = cross_attention(sets, sets, sets, CrossTables(*(x.double() for x in tables)))
    assert_close(total, exact_total, genes + size)
    assert_close(z, exact, 2 * (genes + size) + 16)  # a quotient of two sums


@pytest.mark.parametrize("hidden", [8, 24, 40, 264, 360])  # 264: three vectors of AVX2 that no tile may take together
def test_mlp(hidden: int) -> None:
    torch.manual_seed(hidden)
    x, up, bias, down = torch.rand(200, 70), torch.rand(hidden, 70), torch.rand(hidden), torch.rand(hidden)
    exact = mlp(x.double(), up.double(), bias.double(), down.double())
    assert_close(mlp(x, up, bias, down), exact, 70 + hidden + 32)
