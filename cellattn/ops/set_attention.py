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
    p, _, _, v_pad = _probabilities(q, k, v, ptr, _places(q, ptr, _size(q, ptr, max_size)), include_self)
    return _ragged(p @ v_pad, _own(ptr, v), v)


@set_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, max_size: int | None = None, include_self: bool = False) -> Tensor:
    return v.new_empty(v.shape)


@operator("set_attention_backward", device=None)
def _set_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, max_size: int | None, include_self: bool
) -> tuple[Tensor, Tensor, Tensor]:
    places, own = _places(q, ptr, _size(q, ptr, max_size)), _own(ptr, q)
    p, q_pad, k_pad, v_pad = _probabilities(q, k, v, ptr, places, include_self)
    do = _padded(grad, places)
    dp = do @ v_pad.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return _ragged(ds @ k_pad, own, q), _ragged(ds.mT @ q_pad, own, k), _ragged(p.mT @ do, own, v)


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
    q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, places: Tensor, include_self: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax rows [B, H, M, M] and q, k, v [B, H, M, D] on sets padded to M, the width of `places`."""
    q, k, v = _padded(q, places), _padded(k, places), _padded(v, places)
    position = torch.arange(places.shape[1], device=q.device)
    # [B, 1, M, M]: entry i sees entry j of its set
    inside = position < ptr.diff()[:, None]
    sees = (inside[:, :, None] & inside[:, None, :])[:, None]
    if not include_self:
        sees = sees & (position[:, None] != position)
    hidden = ~sees
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    # a row that sees nothing is NaN after the softmax, and 0 after the second mask
    return s.softmax(-1).masked_fill(hidden, 0), q, k, v


def _size(q: Tensor, ptr: Tensor, max_size: int | None) -> int:
    """What sets are padded to; 0 where there is no entry to pad them with."""
    return min(set_size(ptr, max_size), q.shape[0])


def _places(x: Tensor, ptr: Tensor, size: int) -> Tensor:
    """int64 [B, M]: the entries of each set. What pads a set is its own last entry: another's NaN would come in as 0 * NaN."""
    entry = ptr[:-1, None] + torch.arange(size, device=ptr.device)
    return torch.minimum(entry, ptr[1:, None] - 1).clamp(0, max(x.shape[0] - 1, 0))


def _own(ptr: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(set, place in it) of each entry, int64 [nnz]."""
    member = members(ptr, x.shape[0])
    return member, torch.arange(x.shape[0], device=ptr.device) - ptr.index_select(0, member)


def _padded(x: Tensor, places: Tensor) -> Tensor:
    """[nnz, H, D] -> [B, H, M, D], at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))[places].transpose(1, 2)


def _ragged(x: Tensor, own: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """[B, H, M, D] -> [nnz, H, D] in the dtype of `like`."""
    return x.transpose(1, 2)[own].to(like.dtype)
