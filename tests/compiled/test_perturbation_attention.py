"""The correction of each set in the perturbation head, compiled."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import reference
from cellattn.kernels import perturbation_attention as kernels

from .. import ptx
from ..bounds import assert_within, with_bounds
from ..conftest import exhaustive
from ..interpreter.test_perturbation_attention import BATCHES, SCALE, correction, inputs, ragged
from ..interpreter.test_perturbation_attention import test_beta_of_scores_that_float32_has_no_digits_for as check_beta
from ..ops import test_large_scores as large_scores
from .check import assert_on_chip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES = [
    *((80, "bf16", 20, 20, batch) for batch in ("ordinary", "empty sets", "one gene in many sets", "no entries")),
    (80, "fp32", 16, 256, "ordinary"),  # where a contracted product left lanes of a row with sums of other bits
]
MORE = [
    *((80, "bf16", d, d, "ordinary") for d in (1, 32, 64, 100, 128, 256)),
    *((80, "fp16", d, d, "every gene") for d in (20, 64)),
    *((80, "fp32", d, d, "one gene in many sets") for d in (20, 64, 128)),
    *((arch, "bf16", d, d, "one gene in many sets") for arch in (89, 90) for d in (20, 64, 128)),
]


@pytest.mark.parametrize(
    ("arch", "dtype", "d", "v", "batch"),
    [*CASES, *exhaustive(*MORE)],
)
def test_values_and_gradients(arch: int, dtype: str, d: int, v: int, batch: str) -> None:
    index, ptr = ragged(BATCHES[batch])
    tensors = inputs((2,), index, ptr, d, v, DTYPES[dtype])
    query, key, value, lse, override = tensors
    dz = torch.randn(*query.shape[:-1], v, generator=torch.Generator().manual_seed(3)).to(query.dtype)
    problem = (query, key, value, lse, index, ptr, override, SCALE)
    runs: list[list[Tensor]] = []
    for order in (None, 1):
        with ptx.device(arch, order=order):
            runs.append([kernels.perturbation_correction(*problem), *kernels.perturbation_correction_backward(dz, *problem)])
    wanted = with_bounds(functools.partial(correction, index=index, ptr=ptr), tensors, [dz], fast_exp=False)
    for name, a, again, b in zip(("z", "dquery", "dkey", "dvalue", "dlse", "doverride"), *runs, wanted, strict=True):
        assert torch.equal(a, again), f"{name} depends on the order of the CTAs"
        assert_within(a, b, name)


WITH_ENTRIES = ["empty sets", "one gene in many sets", "every gene"]


@pytest.mark.parametrize("name", ["ordinary", *exhaustive(*WITH_ENTRIES)])
@pytest.mark.parametrize("arch", [80, *exhaustive(90)])
def test_public_function(name: str, arch: int) -> None:
    """Attention and its correction, held to the sum of both.

    A value is overridden by taking out what attention put in, so that the errors of both parts are there though the result
    may be 0. So the definition here is that sum; that it equals attention of overridden values, tests/ops shows in float64.
    """
    index, ptr = ragged(BATCHES[name])
    query, key, value, _, override = inputs((2,), index, ptr, 20, 20, torch.bfloat16)

    def op(query: Tensor, key: Tensor, value: Tensor, override: Tensor) -> Tensor:
        return cellattn.perturbation_attention(query, key, value, index, ptr, override, scale=SCALE)

    def definition(query: Tensor, key: Tensor, value: Tensor, override: Tensor) -> Tensor:
        z, lse = reference.attention(query, key, value, scale=SCALE)
        return z + correction(query, key, value, lse, override, index=index, ptr=ptr)

    kernels = ["attention_fwd_kernel", "perturbation_attention_fwd_kernel", "perturbation_attention_bwd_kernel_genes"]
    assert_on_chip(arch, op, definition, query, key, value, override, kernels=kernels, parts=True)


LARGE = [(90, torch.float32, 1e8), (80, torch.float16, 1e4), (80, torch.bfloat16, 1e5)]


@pytest.mark.parametrize(
    ("arch", "dtype", "size"),
    [(80, torch.float32, 1e6), *exhaustive(*LARGE)],
    ids=str,
)
def test_large_scores(arch: int, dtype: torch.dtype, size: float) -> None:
    with ptx.device(arch) as device:
        large_scores.test_perturbation_attention(size, dtype)
    assert {"perturbation_attention_bwd_kernel_sets", "attention_bwd_kernel_large_dq"} <= set(device.launches)


@pytest.mark.parametrize("arch", [90, *exhaustive(80)])
def test_beta_of_large_scores(arch: int) -> None:
    with ptx.device(arch) as device:
        check_beta()
    assert "perturbation_attention_fwd_kernel" in device.launches
