from __future__ import annotations

import functools

import pytest
import torch

from cellattn.kernels import perturbation_attention as kernels

from .aot import ARCHS, Case, check_case, parameters

N, SETS, HEADS = 6607, 1024, 4


def launch(dtype: torch.dtype, d: int, v: int) -> None:
    """Forward and backward of 1,024 sets of two genes, four heads."""

    def on_meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    query, key, value = on_meta(HEADS, SETS, d), on_meta(HEADS, N, d), on_meta(HEADS, N, v)
    index, ptr = on_meta(2 * SETS, dtype=torch.int64), on_meta(SETS + 1, dtype=torch.int64)
    lse, override = on_meta(HEADS, SETS, dtype=torch.float32), on_meta(HEADS, 2 * SETS, v)
    inputs = (query, key, value, lse, index, ptr, override, 0.25)
    dz = kernels.perturbation_correction(*inputs)
    kernels.perturbation_correction_backward(dz, *inputs)


WIDTHS = {80: ((16, 16), (20, 20), (64, 64), (128, 128)), 90: ((16, 16), (20, 20), (64, 64), (64, 128), (128, 128))}
CASES = [
    Case(arch, "bf16", d, functools.partial(launch, torch.bfloat16, d, v), "" if v == d else f"V{v}")
    for arch in ARCHS
    for d, v in WIDTHS.get(arch, ((64, 64), (128, 128)))
] + [
    Case(90, name, d, functools.partial(launch, dtype, d, d))
    for name, dtype, d in (("fp16", torch.float16, 64), ("fp32", torch.float32, 64), ("fp32", torch.float32, 256))
]


@pytest.mark.parametrize("case", parameters(CASES))
def test_compiles_without_spills_as_recorded(case: Case) -> None:
    check_case(case)
