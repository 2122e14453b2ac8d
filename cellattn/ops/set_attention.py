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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ptr: Tensor,
    max_size: int | None = None,
    include_self: bool = False,
    null_score: Tensor | None = None,
    null_value: Tensor | None = None,
) -> Tensor:
    """Attention of each entry to the entries of its set; zeros where there is none to attend to.

    With a null sink, out_e = (exp(s_e0) v_0 + sum_f exp(s_ef) v_f) / (exp(s_e0) + sum_f exp(s_ef)).

    Args:
        q, k, v: [nnz, H, D], one floating dtype.
        ptr: int64 [B+1].
        max_size: no set has more entries (checked where values may be looked at); None: found out from ptr.
        include_self: whether an entry attends to itself too, or to the others alone.
        null_score, null_value: s_e0 [nnz, H], of what each entry may attend to instead, and v_0 [H, D] of that; both or none.

    Returns:
        [nnz, H, D].
    """
    require_ragged("q", ptr.new_empty(q.shape[0], device=q.device), ptr)  # as long as q
    places = _places(q, ptr, _size(q, ptr, max_size))
    p, p_null, _, _, v_pad = _probabilities(q, k, v, ptr, places, include_self, null_score)
    out = p @ v_pad
    if null_value is not None:
        out = out + p_null * null_value[:, None]
    return _ragged(out, _own(ptr, v), v)


@set_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty(v.shape)


@operator("set_attention_backward", device=None)
def _set_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ptr: Tensor,
    max_size: int | None,
    include_self: bool,
    null_score: Tensor | None,
    null_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dnull_score, dnull_value), the last two empty without a null sink."""
    places, own = _places(q, ptr, _size(q, ptr, max_size)), _own(ptr, q)
    p, p_null, q_pad, k_pad, v_pad = _probabilities(q, k, v, ptr, places, include_self, null_score)
    do = _padded(grad, places)
    dp = do @ v_pad.mT
    delta = (p * dp).sum(-1, keepdim=True)
    dnull_score, dnull_value = q.new_empty(0), q.new_empty(0)
    if null_score is not None and null_value is not None:
        dp_null = do @ null_value.to(do.dtype)[..., None]
        delta = delta + p_null * dp_null
        dnull_score = _ragged(p_null * (dp_null - delta), own, null_score).squeeze(-1)
        dnull_value = (p_null * do).sum((0, 2)).to(null_value.dtype)
    ds = p * (dp - delta) * q.shape[-1] ** -0.5
    return (
        _ragged(ds @ k_pad, own, q), _ragged(ds.mT @ q_pad, own, k), _ragged(p.mT @ do, own, v), dnull_score, dnull_value,
    )  # fmt: skip


@_set_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dnull_score, dnull_value = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in rest[-2:])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dnull_score, dnull_value


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ptr, max_size, include_self, *null = inputs
    keep_missing_grads(ctx)
    ctx.save_for_backward(q, k, v, ptr, *null)
    ctx.options = max_size, include_self


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    *tensors, null_score, null_value = ctx.saved_tensors
    dq, dk, dv, *dnull = _set_attention_backward(grad, *tensors, *ctx.options, null_score, null_value)
    return dq, dk, dv, None, None, None, *(dnull if null_score is not None else (None, None))


set_attention.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_set_attention_backward, "nn.HyperSAGNN")


def _probabilities(
    q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, places: Tensor, include_self: bool, null_score: Tensor | None
) -> tuple[Tensor, Tensor | float, Tensor, Tensor, Tensor]:
    """Softmax rows [B, H, M, M], the share [B, H, M, 1] of a null sink, and q, k, v [B, H, M, D], of sets padded to M.

    M is the width of `places`.
    """
    q, k, v = _padded(q, places), _padded(k, places), _padded(v, places)
    position = torch.arange(places.shape[1], device=q.device)
    # [B, 1, M, M]: entry i sees entry j of its set
    inside = position < ptr.diff()[:, None]
    sees = (inside[:, :, None] & inside[:, None, :])[:, None]
    if not include_self:
        sees = sees & (position[:, None] != position)
    hidden = ~sees
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    if null_score is None:
        # a row that sees nothing is NaN after the softmax, and 0 after the second mask
        return s.softmax(-1).masked_fill(hidden, 0), 0.0, q, k, v
    p = torch.cat([s, _padded(null_score.unsqueeze(-1), places)], -1).softmax(-1)
    return p[..., :-1], p[..., -1:].masked_fill(~inside[:, None, :, None], 0), q, k, v


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
