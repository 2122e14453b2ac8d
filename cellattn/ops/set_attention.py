"""Attention inside the sets of a ragged batch: entries [nnz, H, D] and ptr int64 [B + 1], sets often empty.

Gathers forward and backward, so that a result is the same from run to run. The work is done on sets padded to one size,
B * size^2 scores a head: meant for sets of a few genes. The size is that of the longest set, which on a GPU has to be waited
for, or a bound that the caller gives, with which nothing is read on the host and a CUDA graph can be captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import require_ragged
from ._operator import keep_missing_grads, operator, refuse_double_backward
from .set_sum import members, set_size


@operator("set_attention", public="nn.HyperSAGNN", device=None)
def set_attention(
    q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, max_size: int | None = None, include_self: bool = False
) -> Tensor:
    """Attention of each entry to the entries of its set; zeros where there is none to attend to.

    Args:
        q, k, v: [nnz, H, D], one floating dtype.
        ptr: int64 [B+1].
        max_size: no set has more entries (checked where values may be looked at); None: found out from ptr.
        include_self: whether an entry attends to itself too, or to the others alone.

    Returns:
        [nnz, H, D].
    """
    require_ragged("q", ptr.new_empty(q.shape[0], device=q.device), ptr)  # as long as q
    p, _, _, v_pad = _probabilities(q, k, v, ptr, _size(q, ptr, max_size), include_self)
    return _ragged(p @ v_pad, ptr, v)


@set_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, max_size: int | None = None, include_self: bool = False) -> Tensor:
    return v.new_empty(v.shape)


@operator("set_attention_backward", device=None)
def _set_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, max_size: int | None, include_self: bool
) -> tuple[Tensor, Tensor, Tensor]:
    size = _size(q, ptr, max_size)
    p, q_pad, k_pad, v_pad = _probabilities(q, k, v, ptr, size, include_self)
    do = _padded(grad, ptr, size)
    dp = do @ v_pad.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return _ragged(ds @ k_pad, ptr, q), _ragged(ds.mT @ q_pad, ptr, k), _ragged(p.mT @ do, ptr, v)


@_set_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, max_size: int | None, include_self: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, max_size, include_self = inputs
    keep_missing_grads(ctx)
    ctx.save_for_backward(*tensors)
    ctx.options = max_size, include_self


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return *_set_attention_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


set_attention.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_set_attention_backward, "nn.HyperSAGNN")


def _probabilities(
    q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, size: int, include_self: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax rows [B, H, M, M] and q, k, v [B, H, M, D] on sets padded to M = size."""
    q, k, v = _padded(q, ptr, size), _padded(k, ptr, size), _padded(v, ptr, size)
    position = torch.arange(size, device=q.device)
    # [B, 1, M, M]: entry i sees entry j of its set
    inside = position < ptr.diff()[:, None]
    sees = (inside[:, :, None] & inside[:, None, :])[:, None]
    if not include_self:
        sees = sees & (position[:, None] != position)
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~sees, float("-inf"))
    # a row that sees nothing is NaN after the softmax, and 0 after the second mask
    return s.softmax(-1).masked_fill(~sees, 0), q, k, v


def _size(q: Tensor, ptr: Tensor, max_size: int | None) -> int:
    """What sets are padded to; 0 where there is no entry to pad them with."""
    return min(set_size(ptr, max_size), q.shape[0])


def _padded(x: Tensor, ptr: Tensor, size: int) -> Tensor:
    """[nnz, H, D] -> [B, H, M, D], at least float32. What pads a set is a repeated entry, never read."""
    index = ptr[:-1, None] + torch.arange(size, device=ptr.device)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x[index.clamp(max=max(x.shape[0] - 1, 0))].transpose(1, 2)


def _ragged(x: Tensor, ptr: Tensor, like: Tensor) -> Tensor:
    """[B, H, M, D] -> [nnz, H, D] in the dtype of `like`."""
    member = members(ptr, like.shape[0])
    entry = torch.arange(like.shape[0], device=ptr.device)
    return x.transpose(1, 2)[member, entry - ptr[member]].to(like.dtype)
