"""What all operators share: how they are registered, and what their autograd formulas have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def operator(
    name: str, *, schema: str | None = None, device: str | None = "cpu"
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a function as `cellattn::name` on a device (None: on all); the schema is read off its annotations.

    Autocast reaches into operators, where it would turn the products into bfloat16; the implementations choose the dtype
    of their arithmetic themselves.
    """

    def decorate(implementation: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(implementation)
        def without_autocast(*args: Any) -> Any:
            with torch.autocast(next(x.device.type for x in args if isinstance(x, Tensor)), enabled=False):
                return implementation(*args)

        return torch.library.custom_op(
            f"cellattn::{name}",
            without_autocast,
            mutates_args=(),
            device_types=device,
            schema=schema or torch.library.infer_schema(implementation, mutates_args=()),
        )

    return decorate


def refuse_double_backward(backward_op: CustomOpDef, name: str) -> None:
    """Make differentiating an operator's backward a clear error rather than a silent zero."""

    def raise_error(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"cellattn.{name}: double backward is not supported; call backward without create_graph=True")

    backward_op.register_autograd(raise_error)


def keep_missing_grads(ctx: Any) -> None:
    """Pass None for the gradient of an output nobody used, so that its part of the backward is skipped."""
    ctx.set_materialize_grads(False)
