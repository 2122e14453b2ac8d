"""An op as its compiled kernels compute it, held to its definition."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ptx
from ..bounds import assert_within, with_bounds


def on_chip(
    arch: int, op: Callable[..., Any], *inputs: Tensor, without: Collection[int] = ()
) -> tuple[list[Tensor], list[Tensor | None], set[str]]:
    """(outputs and gradients, upstream gradients, kernels launched), equal bit for bit with the CTAs in two orders.

    Args:
        without: outputs that nothing is made of; they have no upstream gradient.
    """
    runs = []
    for order in (None, 1):
        given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        leaves = [x for x in given if x.requires_grad]
        with ptx.device(arch, order=order) as device:
            result = op(*given)
            outputs = list(result) if isinstance(result, tuple) else [result]
            g = torch.Generator().manual_seed(1)
            upstream: list[Tensor | None] = [
                None if i in without else torch.randn(y.shape, dtype=torch.float64, generator=g).to(y.dtype)
                for i, y in enumerate(outputs)
            ]
            chosen = [(y, dy) for y, dy in zip(outputs, upstream, strict=True) if dy is not None]
            ys, dys = zip(*chosen, strict=True)
            gradients = torch.autograd.grad(ys, leaves, dys, allow_unused=True, materialize_grads=True)
        runs.append([y.detach() for y in (*outputs, *gradients)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(_bits(a), _bits(b)), "results depend on the order of the CTAs"
    return runs[0], upstream, set(device.launches)


def assert_on_chip(
    arch: int, op: Callable[..., Any], reference: Callable[..., Any], *inputs: Tensor, kernels: Sequence[str],
    without: Collection[int] = (), parts: bool = False,
) -> None:  # fmt: skip
    """Outputs and gradients are as near to the reference's in float64 as rounding lets them be, see tests/bounds.py.

    Args:
        kernels: what has to be launched: a test of a kernel that is not reached tests nothing.
        parts: results are sums of parts that were rounded to their dtype one by one, as gradients of a composition of ops are.
    """
    got, upstream, launched = on_chip(arch, op, *inputs, without=without)
    assert set(kernels) <= launched, f"launched {sorted(launched)}"
    outputs = [f"output {i}" for i in range(len(upstream))]
    names = [*outputs, *(f"gradient {i}" for i in range(len(got) - len(outputs)))]
    for name, a, b in zip(names, got, with_bounds(reference, inputs, upstream, fast_exp=False), strict=True):
        assert_within(a, b, name, parts=parts)


def _bits(x: Tensor) -> Tensor:
    """NaN equal to NaN, 0 unequal to -0."""
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
