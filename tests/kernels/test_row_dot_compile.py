from __future__ import annotations

import functools

import pytest
import torch

from cellattn.kernels import row_dot as kernels

from .aot import ARCHS, Case, check_case, parameters

N, TIES, LEAD = 6607, 9, 2


def launch(dtype: torch.dtype, d: int, rows: bool) -> None:
    """Forward and backward of nine ties of a layer of the yeast cell, all rows or 660 of each tie, and were it without hubs."""
    entries, length = 2_482_833, 660 if rows else N

    def on_meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k = (on_meta(LEAD, TIES, N + 1, d, dtype=dtype) for _ in range(2))
    rowptr = on_meta(TIES * N + 1, dtype=torch.int64)
    col = on_meta(entries, dtype=torch.int32)
    weight = on_meta(entries, dtype=torch.float32)
    chosen = on_meta(TIES * length, dtype=torch.int64) if rows else None
    ties = list(range(TIES)), list(range(TIES)), chosen, [length] * TIES, 1
    for offset in ([0, 0, 0, 158, 158, 158, 158, 346, 462, 462], [0] * (TIES + 1)):
        cut = rowptr, on_meta(offset[-1], dtype=torch.int64), offset
        y, kbar = kernels.row_dot(q, k, rowptr, col, weight, rowptr, col, weight, *cut, *cut, *ties)
        kernels.row_dot_backward(y, q, kbar, rowptr, col, weight, *cut, *ties)


# D = 20 loads in 8 bytes, 32 in 16. Every width once for sm_80 and sm_90; elsewhere the one the yeast models use.
DIMS = {80: (16, 20, 32, 64, 128), 90: (16, 20, 32, 64, 128)}
CASES = [
    Case(arch, "bf16", d, functools.partial(launch, torch.bfloat16, d, rows), "rows" if rows else "")
    for arch in ARCHS
    for d in DIMS.get(arch, (20, 128))
    for rows in ((False, True) if d == 20 else (False,))
] + [
    Case(90, name, d, functools.partial(launch, dtype, d, False))
    for name, dtype, d in (("fp16", torch.float16, 32), ("fp32", torch.float32, 32), ("fp32", torch.float32, 256))
]


@pytest.mark.parametrize("case", parameters(CASES))
def test_compiles_without_spills_as_recorded(case: Case) -> None:
    check_case(case)
