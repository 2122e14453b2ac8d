"""Every attention kernel in every configuration of the tables, compiled for every chip."""

from __future__ import annotations

import functools

import pytest
import torch

from cellattn.kernels.attention import attention, attention_backward

from .aot import ARCHS, Case, check_case, parameters

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (16, 32, 64, 128, 256)


def both_passes(
    dtype: str, dim: int, *, value_dim: int | None = None, tq: int = 1000, dlse_only: bool = False, mask: bool = False,
    dropout: bool = False,
):  # fmt: skip
    """One forward and one backward; without values only LSE has a gradient."""
    lead, tk = (64, 8) if tq > 32 else (1,), 1000  # enough programs that no loop is cut into parts, or so few that each is
    dtype_ = DTYPES[dtype]
    q = torch.empty(*lead, tq, dim, dtype=dtype_, device="meta")
    k = torch.empty(*lead, tk, dim, dtype=dtype_, device="meta")
    v = torch.empty(*lead, tk, dim if value_dim is None else value_dim, dtype=dtype_, device="meta")
    key_mask = torch.empty(tk, dtype=torch.bool, device="meta") if mask else None
    drawn = (torch.empty(2, dtype=torch.int64, device="meta"), 6554) if dropout else ()
    out, lse = attention(q, k, v, key_mask, 0.3, *drawn)
    attention_backward(None if dlse_only else out, lse, q, k, v, key_mask, out, lse, 0.3, *drawn)


def case(arch: int, dtype: str, dim: int, note: str = "", **options) -> Case:
    return Case(arch, dtype, dim, functools.partial(both_passes, dtype, dim, **options), note)


CASES = [
    *(case(arch, "bf16", dim) for arch in ARCHS for dim in DIMS),
    *(case(arch, "bf16", 20, "unpadded heads") for arch in ARCHS),
    *(case(arch, "bf16", 32, "lse alone, masked", value_dim=0, dlse_only=True, mask=True) for arch in ARCHS),
    *(case(arch, "bf16", dim, "few queries", tq=28) for arch in (86, 90) for dim in DIMS),
    *(case(arch, "bf16", dim, "dropout", dropout=True) for arch in ARCHS for dim in DIMS),
    case(80, "bf16", 20, "dropout, unpadded heads", dropout=True),
    case(86, "bf16", 32, "dropout, few queries", dropout=True, tq=28),
    case(86, "fp32", 32, "dropout", dropout=True),
    case(80, "fp16", 64),
    case(80, "bf16", 64, "masked", mask=True),
    *(case(86, "fp32", dim) for dim in DIMS),
    case(90, "fp32", 32),
]


@pytest.mark.parametrize("case", parameters(CASES))
def test_compiles_as_recorded(case: Case) -> None:
    check_case(case, spills=case.dtype == "fp32" or case.dim > 128)
