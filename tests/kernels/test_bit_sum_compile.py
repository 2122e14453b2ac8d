from __future__ import annotations

import functools

import pytest
import torch

from cellattn.kernels import bit_sum as kernels

from .aot import ARCHS, Case, check_case, parameters

N, LEAD = 6607, 2


def launch(dtype: torch.dtype, d: int, rows: bool) -> None:
    """The sums of a dense relation of the yeast cell, all rows or 660 of them."""
    x = torch.empty(LEAD, N, d, dtype=dtype, device="meta")
    words = torch.empty(N, -(-N // 64), dtype=torch.int64, device="meta")
    kernels.bit_sum(x, words, torch.empty(660, dtype=torch.int64, device="meta") if rows else None)


# Two of D = 7 are 16 columns, of 16 are 32, and of 20 one block of 64.
DIMS = {80: (7, 16, 20, 32, 128), 90: (7, 16, 20, 32, 128)}
CASES = [
    Case(arch, name, d, functools.partial(launch, dtype, d, rows), "rows" if rows else "")
    for arch in ARCHS
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for d in DIMS.get(arch, (7, 16, 20))
    for rows in ((False, True) if d == 20 else (False,))
] + [Case(90, "fp16", 20, functools.partial(launch, torch.float16, 20, False))]


@pytest.mark.parametrize("case", parameters(CASES))
def test_compiles_without_spills_as_recorded(case: Case) -> None:
    check_case(case)
