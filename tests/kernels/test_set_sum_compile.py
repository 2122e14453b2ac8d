from __future__ import annotations

import functools

import pytest
import torch

from cellattn.kernels import set_sum as kernels

from .aot import ARCHS, Case, check_case, parameters


def launch(dtype: torch.dtype, f: int) -> None:
    x, ptr = torch.empty(180_000, f, dtype=dtype, device="meta"), torch.empty(29, dtype=torch.int64, device="meta")
    kernels.set_sum(x, ptr)


CASES = [
    Case(arch, name, f, functools.partial(launch, dtype, f))
    for arch in ARCHS
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for f in ((20, 64) if arch in (80, 90) else (64,))
]


@pytest.mark.parametrize("case", parameters(CASES))
def test_compiles_without_spills_as_recorded(case: Case) -> None:
    check_case(case)
