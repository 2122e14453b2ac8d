"""What the operators' autograd formulas share."""

from __future__ import annotations

from typing import Any, NoReturn

from torch._library.custom_ops import CustomOpDef


def refuse_double_backward(backward_op: CustomOpDef, name: str) -> None:
    """Make differentiating an operator's backward a clear error rather than a silent zero."""

    def raise_error(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"cellattn.{name}: double backward is not supported; call backward without create_graph=True")

    backward_op.register_autograd(raise_error)


def keep_missing_grads(ctx: Any) -> None:
    """Pass None for the gradient of an output nobody used, so that its part of the backward is skipped."""
    ctx.set_materialize_grads(False)
