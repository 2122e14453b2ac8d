from __future__ import annotations

import functools

import pytest
import torch

from cellattn.kernels import edge_attention as kernels

from .aot import ARCHS, Case, check_case, parameters

N, TIES, LEAD = 6607, 9, 32  # enough programs that the loop over what sees a prefix is not cut into parts


def launch(dtype: torch.dtype, d: int, added: bool, near: bool, dropout: bool = False) -> None:
    """Forward and backward of nine masks of a layer of the yeast cell, with what may be `added` to the scores, a prefix and
    self-loops (`near`) and dropout or without; of the width that the yeast models use also as were it without hubs."""
    entries = 2_482_833

    def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v = (on_meta(LEAD, TIES, N + i, d, dtype=dtype) for i in (0, 1, 1))
    ptr = on_meta(TIES * N + 1, dtype=torch.int64)
    weight, bias = (on_meta(entries), on_meta(TIES)) if added else (None, None)
    graph = (ptr, on_meta(entries, dtype=torch.int32), weight) * 2
    draw = (on_meta(2, dtype=torch.int64), 6554) if dropout else ()
    for offset in ([0, 0, 0, 158, 158, 158, 158, 346, 462, 462], [0] * (TIES + 1))[: 2 if d == 20 else 1]:
        cut = ptr, on_meta(offset[-1], dtype=torch.int64), offset
        problem = (
            q, k, v, bias, *graph, *cut, *cut, list(range(TIES)), list(range(TIES)), 1 if near else 0, near, 0.3, *draw,
        )  # fmt: skip
        out, lse = kernels.edge_attention(*problem)
        kernels.edge_attention_backward(out, lse, out, lse, *problem)


# D = 20 loads in 8 bytes, 32 in 16. Every width once for sm_80 and sm_90; elsewhere the one the yeast models use.
DIMS = {80: (16, 20, 32, 64, 128), 90: (16, 20, 32, 64, 128)}
CASES = (
    [
        Case(arch, "bf16", d, functools.partial(launch, torch.bfloat16, d, not plain, not plain), "plain" if plain else "")
        for arch in ARCHS
        for d in DIMS.get(arch, (20, 128))
        for plain in ((False, True) if d == 20 and arch in DIMS else (False,))
    ]
    + [
        Case(90, name, d, functools.partial(launch, dtype, d, True, True))
        for name, dtype, d in (("fp16", torch.float16, 32), ("fp32", torch.float32, 32), ("fp32", torch.float32, 256))
    ]
    + [
        Case(arch, name, d, functools.partial(launch, dtype, d, True, True, True), "dropout")
        for arch, name, dtype, d in (
            (80, "bf16", torch.bfloat16, 20),
            (90, "bf16", torch.bfloat16, 20),
            (90, "bf16", torch.bfloat16, 128),
            (80, "fp32", torch.float32, 32),
            (90, "fp32", torch.float32, 256),
        )
    ]
    # as models launch it, for which ptxas takes fewer registers
    + [
        Case(arch, name, d, functools.partial(launch, dtype, d, False, True, dropout), "dropout alone" if dropout else "alone")
        for arch, name, dtype, d, dropout in (
            (80, "bf16", torch.bfloat16, 64, True),
            (80, "bf16", torch.bfloat16, 128, True),
            (80, "fp32", torch.float32, 64, True),
            (90, "fp32", torch.float32, 32, True),
            (80, "bf16", torch.bfloat16, 16, False),
            (80, "bf16", torch.bfloat16, 64, False),
            (80, "fp32", torch.float32, 64, False),
        )
    ]
)


@pytest.mark.parametrize("case", parameters(CASES))
def test_compiles_without_spills_as_recorded(case: Case) -> None:
    check_case(case)
