"""Attention with a differentiable log-sum-exp: the first of the library's two primitives.

With s_ij = scale * q_i . k_j, LSE_i = log sum_j exp(s_ij) and P_ij = exp(s_ij - LSE_i), the gradient of the scores is

    dS_ij = P_ij (dP_ij - D_i) + P_ij dLSE_i = P_ij (dP_ij - (D_i - dLSE_i)),   D_i = sum_c dOut_ic Out_ic

so flash attention's backward gives it unchanged once its delta D is replaced by D - dLSE.

PyTorch's flash attention for CPU computes D inside, as rowsum(dOut * Out). There the replacement is folded into the inputs:
q, k, v get one column of zeros, Out a column of ones and dOut the column -dLSE. Then rowsum(dOut * Out) = D - dLSE, and
dP = dOut Vᵀ is unchanged because V's new column is zero.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import FLOAT_DTYPES, require, require_number, require_same, require_tensor
from ._operator import keep_missing_grads, operator, refuse_double_backward


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention that also returns its log-sum-exp, both differentiable; no [Tq, Tk] tensor is made.

    Args:
        q: [..., H, Tq, D], float64, float32, bfloat16 or float16; any leading dimensions, or none.
        k: [..., H, Tk, D], Tk >= 1.
        v: [..., H, Tk, Dv].
        scale: factor of the scores, 1 / sqrt(D) if None.

    Returns:
        out [..., H, Tq, Dv] in the dtype of q, and lse [..., H, Tq], the natural log of the softmax denominators, in
        float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, naming the argument.
        RuntimeError: on double backward.
    """
    check_qk(q, k)
    require_tensor("v", v, dtypes=FLOAT_DTYPES)
    require_same("dtype", q=q.dtype, v=v.dtype)
    require_same("device", q=q.device, v=v.device)
    require(
        v.shape[:-1] == k.shape[:-1],
        lambda: f"v: expected shape {[*k.shape[:-1], 'Dv']}, as k has, got {list(v.shape)}",
    )
    return _attention(q, k, v, None, resolve_scale(scale, q.shape[-1]))


def attention_logsumexp(q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Natural log of attention's softmax denominators, differentiable in q and k.

    Args:
        q: [..., Tq, D], float64, float32, bfloat16 or float16.
        k: [..., Tk, D].
        key_mask: bool [Tk] or [..., Tk] (broadcast over the leading dimensions), False for keys to leave out.
        scale: factor of the scores, 1 / sqrt(D) if None.

    Returns:
        lse [..., Tq], float32 (float64 for float64 inputs); -inf, with no gradient, where the mask keeps no key.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    check_qk(q, k)
    if key_mask is not None:
        require_tensor("key_mask", key_mask, dtypes=(torch.bool,))
        require_same("device", q=q.device, key_mask=key_mask.device)
        fits = 1 <= key_mask.ndim < k.ndim and all(
            have in (want, 1) for have, want in zip(reversed(key_mask.shape), reversed(k.shape[:-1]), strict=False)
        )
        require(
            fits and key_mask.shape[-1] == k.shape[-2],
            lambda: (
                f"key_mask: expected shape [{k.shape[-2]}] or one that broadcasts to {list(k.shape[:-1])}, "
                f"got {list(key_mask.shape)}"
            ),
        )
    return _attention(q, k, k.new_empty(*k.shape[:-1], 0), key_mask, resolve_scale(scale, q.shape[-1]))[1]


def check_qk(q: Tensor, k: Tensor) -> None:
    """Check that q [..., Tq, D] and k [..., Tk, D] fit each other."""
    for name, x in (("q", q), ("k", k)):
        require_tensor(name, x, dtypes=FLOAT_DTYPES)
        require(x.ndim >= 2, lambda: f"{name}: expected shape [..., tokens, head_dim], got {list(x.shape)}")
    require_same("dtype", q=q.dtype, k=k.dtype)
    require_same("device", q=q.device, k=k.device)
    require(q.shape[-1] >= 1, lambda: f"q: expected a head_dim >= 1, got shape {list(q.shape)}")
    require(
        q.shape[:-2] == k.shape[:-2] and q.shape[-1] == k.shape[-1],
        lambda: f"k: expected shape {[*q.shape[:-2], 'Tk', q.shape[-1]]}, to fit q, got {list(k.shape)}",
    )
    require(k.shape[-2] >= 1, lambda: f"k: expected at least one token, got shape {list(k.shape)}")


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """1 / sqrt(head_dim) for None; otherwise a finite number."""
    if scale is None:
        return 1 / sqrt(head_dim)
    require_number("scale", scale)
    return float(scale)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of log-sum-exps, losses and CPU arithmetic: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------- operators


@operator("attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = torch.zeros(q.shape[:-1], dtype=dtype, device=q.device)
    if lse.numel() == 0:  # PyTorch's kernel divides by the number of queries
        return out, lse
    width = max(q.shape[-1], v.shape[-1])
    heads = [_heads(x, width, dtype) for x in (q, k, v)]
    mask = None if key_mask is None else _additive_mask(key_mask, q, k, dtype)
    o, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, attn_mask=mask, scale=scale)
    out = o[..., : v.shape[-1]].reshape(out.shape).to(q.dtype).contiguous()
    lse = log_sum.reshape(lse.shape).contiguous()
    if key_mask is not None:
        lse = lse.masked_fill(~key_mask.any(-1, keepdim=True), -torch.inf)
    return out, lse


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


@operator("attention_backward")
def _attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if lse.numel() == 0 or (dout is None and dlse is None):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dtype = lse.dtype
    dim, dim_v = q.shape[-1], v.shape[-1]
    width = max(dim, dim_v + (dlse is not None))
    if dout is None:
        dout = torch.zeros_like(out)
    # [1, L, T, width]
    q4, k4, v4, out4, dout4 = (_heads(x, width, dtype) for x in (q, k, v, out, dout))
    lse3 = lse.reshape(q4.shape[:-1])
    if dlse is not None:
        out4[..., dim_v] = 1
        dout4[..., dim_v] = -dlse.reshape(lse3.shape)
    mask = None
    if key_mask is not None:
        mask = _additive_mask(key_mask, q, k, dtype)
        lse3 = lse3.masked_fill(lse3 == -torch.inf, 0)  # rows without a key: what the kernel itself returned for them
    parts = _query_parts(q4.shape[1], q4.shape[2])
    q4, out4, dout4 = (_split_queries(x, parts) for x in (q4, out4, dout4))
    lse3 = _split_queries(lse3.unsqueeze(-1), parts).squeeze(-1)
    k4, v4 = (x.expand(parts, -1, -1, -1) for x in (k4, v4))
    if mask is not None:
        mask = mask[:, :, :1].expand(parts, -1, q4.shape[2], -1)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout4, q4, k4, v4, out4, lse3, 0.0, False, attn_mask=mask, scale=scale
    )
    dq = dq.transpose(0, 1).flatten(1, 2)[:, : q.shape[-2], :dim]
    return (
        dq.reshape(q.shape).to(q.dtype).contiguous(),
        dk.sum(0)[..., :dim].reshape(k.shape).to(k.dtype).contiguous(),
        dv.sum(0)[..., :dim_v].reshape(v.shape).to(v.dtype).contiguous(),
    )


@_attention_backward.register_fake
def _(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, scale = inputs
    keep_missing_grads(ctx)
    ctx.save_for_backward(q, k, v, key_mask, *output)
    ctx.scale = scale


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(dout, dlse, *ctx.saved_tensors, ctx.scale), None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_attention_backward, "attention")

# ------------------------------------------------------------------------------------------------------------ CUDA


@_attention.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import attention as kernels  # needs Triton

    return kernels.attention(*args)


@_attention_backward.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import attention as kernels

    return kernels.attention_backward(*args)


# ------------------------------------------------------------------------------------------------------------- CPU


def _heads(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[..., T, D] -> [1, L, T, width], zeros on the right, in the dtype of the arithmetic."""
    x = x.to(dtype).reshape(1, x.shape[:-2].numel(), *x.shape[-2:])
    return F.pad(x, (0, width - x.shape[-1]))


def _additive_mask(key_mask: Tensor, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, L, Tq, Tk] of 0 and -inf, as a view of [L, Tk] values."""
    mask = torch.zeros(k.shape[:-1], dtype=dtype, device=k.device).masked_fill_(~key_mask, -torch.inf)
    return mask.reshape(1, -1, 1, k.shape[-2]).expand(-1, -1, q.shape[-2], -1)


def _query_parts(num_heads: int, num_queries: int) -> int:
    """Into how many parts to cut the queries: PyTorch's CPU backward runs one thread a head, and few heads leave cores idle."""
    wanted = -(-torch.get_num_threads() // num_heads)
    return max(1, min(wanted, num_queries // 256))


def _split_queries(x: Tensor, parts: int) -> Tensor:
    """[1, L, T, d] -> [parts, L, ceil(T / parts), d]; rows of zeros fill the last part and add nothing to any gradient."""
    if parts == 1:
        return x
    length = -(-x.shape[2] // parts)
    x = F.pad(x, (0, 0, 0, parts * length - x.shape[2]))
    return x.reshape(x.shape[1], parts, length, x.shape[3]).transpose(0, 1).contiguous()
