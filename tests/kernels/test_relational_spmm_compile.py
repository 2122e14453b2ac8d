from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import product

import pytest
import torch

from cellattn.kernels import relational_spmm as kernels

from .aot import ARCHS, Case, check_case, parameters

Form = tuple[bool, bool, bool, bool]  # one x a relation, summed over relations, backward, summed over samples

N, SETS, PLACES, RELATIONS, ENTRIES = 6607, 28, 180_000, 9, 2_482_833

FORMS: list[Form] = [
    (each, sum_relations, *rest)
    for each, sum_relations in product((False, True), repeat=2)
    for rest in ((False, False), (True, False), (True, True))
]
# A layer whose features are projected for each relation and summed, and the gradients of both, stored and shared.
LAYER: list[Form] = [(True, True, False, False), (False, False, True, False), (False, False, True, True)]


def on_meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def between() -> tuple[torch.Tensor, ...]:
    ragged = on_meta(PLACES, dtype=torch.int64), on_meta(SETS + 1, dtype=torch.int64)
    return *ragged, *ragged


def stack() -> tuple[torch.Tensor, torch.Tensor]:
    return on_meta(RELATIONS * N + 1, dtype=torch.int64), on_meta(ENTRIES, dtype=torch.int32)


def launch(dtype: torch.dtype, f: int, scaled: bool, forms: Iterable[Form]) -> None:
    """Forward and backward of some forms; the sum over samples is the backward of shared features."""
    value, ids = on_meta(ENTRIES, dtype=torch.float32), list(range(RELATIONS))
    scale = on_meta(PLACES, RELATIONS, dtype=torch.float32) if scaled else None
    for each, sum_relations, backward, sum_samples in forms:
        x = on_meta(PLACES, *([RELATIONS] if each else []), f, dtype=dtype)
        scales = (scale, None) if backward else (None, scale)
        kernels.relational_spmm(*stack(), value, x, *between(), *scales, ids, N, False, sum_relations, sum_samples)


def launch_degree() -> None:
    kernels.relational_degree(*stack(), *between(), list(range(RELATIONS)), N)


# Every width once for sm_80 and sm_90, elsewhere one; 20 features load in 8 bytes, 64 in 16; 200 are two programs' work.
WIDTHS = {80: (1, 20, 128), 90: (1, 20, 128, 200)}
CASES = (
    [Case(arch, "bf16", 64, functools.partial(launch, torch.bfloat16, 64, True, FORMS), "scaled") for arch in ARCHS]
    + [Case(arch, "bf16", 64, functools.partial(launch, torch.bfloat16, 64, False, FORMS)) for arch in (80, 90)]
    + [
        Case(arch, "bf16", f, functools.partial(launch, torch.bfloat16, f, True, LAYER), "scaled")
        for arch, widths in WIDTHS.items()
        for f in widths
    ]
    + [
        Case(90, name, f, functools.partial(launch, dtype, f, True, LAYER), "scaled")
        for name, dtype, f in (("fp16", torch.float16, 64), ("fp32", torch.float32, 64), ("fp32", torch.float32, 128))
    ]
    + [Case(arch, "int32", 1, launch_degree, "degree") for arch in ARCHS]
)


@pytest.mark.parametrize("case", parameters(CASES))
def test_compiles_without_spills_as_recorded(case: Case) -> None:
    check_case(case)
