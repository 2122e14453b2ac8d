from __future__ import annotations

import functools

import pytest
import torch

from cellattn.kernels import masked_spmm as kernels

from .aot import ARCHS, Case, check_case, parameters

N, SETS = 6607, 70
DENSE, SPARSE = 1_002_538, 16_360  # entries: co-expression's rows fill a program, the regulatory graph's 2.5 leave room


def on_meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def graph(entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    return on_meta(N + 1, dtype=torch.int64), on_meta(entries, dtype=torch.int32)


def launch(dtype: torch.dtype, f: int, weighted: bool) -> None:
    """Both products over a dense and a sparse relation, with features of each sample and with shared ones."""
    words = on_meta(N, 2, dtype=torch.int64)
    shared, own = on_meta(N, f, dtype=dtype), on_meta(SETS, N, f, dtype=dtype)
    for entries in (DENSE, SPARSE):
        value = on_meta(entries, dtype=torch.float32) if weighted else None
        for x in (shared, own):
            kernels.masked_spmm(*graph(entries), value, x, words, SETS, not weighted)
    for x in (shared, own):
        kernels.masked_sddmm(*graph(DENSE), own, x, words, SETS)


def launch_degree() -> None:
    kernels.masked_degree(*graph(DENSE), on_meta(N, 2, dtype=torch.int64), SETS)


# Every width once for sm_80 and sm_90, elsewhere one; 20 features load in 8 bytes, 64 in 16; 200 are two programs' work.
WIDTHS = {80: (1, 20, 64, 128), 90: (1, 20, 64, 128, 200)}
CASES = (
    [
        Case(arch, "bf16", f, functools.partial(launch, torch.bfloat16, f, weighted), "" if weighted else "mean")
        for arch in ARCHS
        for f in WIDTHS.get(arch, (64,))
        for weighted in ((True, False) if f == 64 else (True,))
    ]
    + [
        Case(90, name, f, functools.partial(launch, dtype, f, True))
        for name, dtype, f in (("fp16", torch.float16, 64), ("fp32", torch.float32, 64), ("fp32", torch.float32, 128))
    ]
    + [Case(arch, "int32", 1, launch_degree, "degree") for arch in ARCHS]
)


@pytest.mark.parametrize("case", parameters(CASES))
def test_compiles_without_spills_as_recorded(case: Case) -> None:
    check_case(case)
