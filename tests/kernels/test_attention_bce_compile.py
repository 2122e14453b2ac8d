"""Every BCE kernel, compiled ahead of time for each chip: legal, without spills where that is promised, and as recorded."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from cellattn.kernels import attention_bce as kernels
from cellattn.kernels.negatives import nonedges

from .aot import ARCHS, Case, check_case, compile_for, launches_of, parameters, serialised

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
N, EDGES, RELATIONS = 6607, 50_000, 2


def launch(dtype: torch.dtype, dim: int, link: str, num_negatives: int | None, subset: bool) -> None:
    """Forward and backward of one head in storage [T, D], with hubs and without."""

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    stacked = meta(RELATIONS * N + 1), meta(EDGES, dtype=torch.int32), meta(EDGES, dtype=torch.float32)
    q = meta(N + 1, dim, dtype=dtype)
    row = meta(N, dtype=torch.float32)
    drawn: tuple[torch.Tensor | None, ...] = (None, None, None, None)
    if num_negatives is not None:
        draws = N * num_negatives
        drawn = meta(draws), meta(draws), meta(N + 1), meta(N, dtype=torch.float32)
        nonedges(*stacked[:2], meta(N), meta(N), meta(draws), meta(draws), 1)
    for offset in ([0, 30, 188], [0, 30, 30]):
        cut = stacked[0], meta(offset[-1]), offset
        problem = (
            q, q, row if link == "softmax" else None, *stacked, *stacked, *cut, *cut, meta(RELATIONS * N, dtype=torch.float32),
            meta(N, dtype=torch.bool), meta(N) if subset else None, *drawn, 1, 1, dim**-0.5, True,
        )  # fmt: skip
        _, *sharp = kernels.bce_rows(*problem)
        kernels.bce_rows_backward(row, *sharp, *problem)


def case(
    arch: int, dtype: str, dim: int, link: str = "softmax", num_negatives: int | None = None, *, subset: bool = False
) -> Case:
    note = link + ("" if num_negatives is None else "-drawn") + ("-rows" if subset else "")
    return Case(arch, dtype, dim, functools.partial(launch, DTYPES[dtype], dim, link, num_negatives, subset), note)


# Head dimensions: the group's 20, and one of every tile above it.
CASES = [
    *(case(arch, "bf16", dim) for arch in ARCHS for dim in (20, 64, 128)),
    *(case(arch, "bf16", 256) for arch in (80, 90)),
    case(80, "fp16", 16),
    case(80, "fp32", 20),
    case(90, "fp32", 128),
    case(80, "bf16", 20, "sigmoid"),
    case(80, "bf16", 20, subset=True),
    case(89, "bf16", 128, "softmax", 5, subset=True),
    case(80, "bf16", 20, "softmax", 5),
    case(90, "fp16", 64, "sigmoid", 5),
]


@pytest.mark.parametrize("case", parameters(CASES))
def test_compiles(case: Case) -> None:
    check_case(case, spills=case.dtype == "fp32" or case.dim > 128)


def test_products_that_wait_for_each_other_are_noticed() -> None:
    """A sum's register that is written while a product under way adds to it."""
    launches = launches_of(case(90, "bf16", 64, "softmax", 5)).values()
    (launch,) = (launch for launch in launches if launch.fn.__name__ == "bce_rows_bwd_kernel_dense_dq")
    ptx = compile_for(launch, 90).asm["ptx"]
    assert not serialised(ptx)
    last = list(re.finditer(r"wgmma\.mma_async\S+ \{(%r\d+),.*\s*// end inline asm\s*wgmma\.commit_group\S+;", ptx))[-1]
    assert serialised(f"{ptx[: last.end()]} add.f32 {last[1]}, {last[1]}, 0f3F800000; {ptx[last.end() :]}")
