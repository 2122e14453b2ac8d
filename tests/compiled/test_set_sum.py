"""Sums over ragged sets, compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellattn.ops.set_sum import set_sum

from ..compare import leaves
from ..conftest import exhaustive
from .check import assert_on_chip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {"ordinary": [2, 1, 3], "empty": [0, 4, 0, 0], "long": [1000, 3]}
CASES = [(80, "bf16", 20, "ordinary"), (80, "bf16", 1, "empty"), (90, "bf16", 100, "long"), (80, "fp32", 20, "long")]
MORE = [
    *((80, "bf16", f, name) for f in (1, 32, 64, 128) for name in SIZES),
    *((arch, "fp16", 20, "long") for arch in (80, 89, 90)),
]


@pytest.mark.parametrize(
    ("arch", "dtype", "width", "name"),
    [*CASES, *exhaustive(*MORE)],
)
def test_values_and_gradients(arch: int, dtype: str, width: int, name: str) -> None:
    sizes = torch.tensor(SIZES[name])
    ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    member = torch.arange(len(sizes)).repeat_interleave(sizes)

    def definition(x: Tensor) -> Tensor:
        return x.new_zeros(len(sizes), width).index_add(0, member, x)

    (x,) = (x.detach() for x in leaves((int(ptr[-1]), width), dtype=DTYPES[dtype]))
    assert_on_chip(arch, lambda x: set_sum(x, ptr), definition, x, kernels=["set_sum_kernel"])
