"""Everybody that ours is measured against: dense PyTorch as users write it, and attention of other houses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..measure import first_line

# Inputs to outputs.
Function = Callable[..., tuple[Tensor, ...]]
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

SDPA_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
FLOORS = (*SDPA_BACKENDS, "FlashAttention 2")
SDPA_MASK, CONV = "dense SDPA, bool mask", "PyG TransformerConv"
# Of all implementations, as `--only` takes them.
NAMES = (
    "ours", "dense eager", "dense compiled", "FlexAttention + gather", "FlexAttention, block mask", "FlashAttention 4 + gather",
    *FLOORS, SDPA_MASK, CONV, "along its edges", "pairs as a relation",
)  # fmt: skip

# ----------------------------------------------------------------------------------------------- dense, as users write it


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: Tensor | None,
    targets: list[Tensor],
    counts: list[int],
    heads: list[int],
    with_lse: bool,
) -> tuple[Tensor, ...]:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    alpha = scores.softmax(-1)
    losses = []
    for head, target, count in zip(heads, targets, counts, strict=True):
        block = alpha[head, 1:, 1:] if rows is None else alpha[head, 1 + rows, 1:]
        losses.append(F.kl_div(block.log(), target, reduction="sum") / max(count, 1))
    return alpha @ v, *((scores.logsumexp(-1),) if with_lse else ()), *losses


def dense_loss(q: Tensor, k: Tensor, *, target: Tensor, counted: Tensor, kind: str) -> tuple[Tensor, ...]:
    alpha = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[1:, 1:]
    if kind == "kl":
        return (F.kl_div(alpha.log(), target, reduction="sum") / len(counted),)
    return (F.binary_cross_entropy(alpha[counted], target[counted], reduction="sum") / len(counted),)


def dense_logsumexp(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return ((q @ k.mT * q.shape[-1] ** -0.5).logsumexp(-1),)


def dense_head(query: Tensor, key: Tensor, value: Tensor, override: Tensor, *, index: Tensor) -> tuple[Tensor, ...]:
    values = value.expand(len(query), -1, -1).clone()
    values[torch.arange(len(query), device=query.device).repeat_interleave(2), index] = override
    beta = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return (torch.einsum("bn,bnd->bd", beta, values),)


def generator_of(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def compile_one(f: Callable[..., Any], *, dynamic: bool = False) -> Callable[..., Any]:
    """`torch.compile` for one shape at a time; `dynamic` compiles once for a whole curve."""
    torch._dynamo.config.recompile_limit = 64  # past it a function silently goes on in eager; one run has some 20 shapes
    return torch.compile(f, dynamic=dynamic)


# ---------------------------------------------------------------------------------------------- attention of other houses


def flex_attention_with_lse() -> Attend:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    compiled = compile_one(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = compiled(q[None], k[None], v[None], return_aux=AuxRequest(lse=True))
        return out[0], aux.lse[0]  # natural log

    return attend


def flash_attention_4() -> Attend:
    flash_attn_func = import_module("flash_attn.cute").flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        padded = (_tokens_first(_pad(x, 8)) for x in (q, k, v))
        out, lse = flash_attn_func(*padded, softmax_scale=q.shape[-1] ** -0.5, return_lse=True)
        return _heads_first(out)[..., : v.shape[-1]], lse[0]

    return attend


def flash_attention_2(*inputs: Tensor) -> Function:
    flash_attn_func = import_module("flash_attn").flash_attn_func

    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        padded = (_tokens_first(_pad(x, 8)) for x in (q, k, v))
        out = flash_attn_func(*padded, softmax_scale=q.shape[-1] ** -0.5)
        return (_heads_first(out)[..., : v.shape[-1]],)

    return f


def sdpa(backend: SDPBackend, *inputs: Tensor) -> Function:
    """Plain SDPA by one backend, its head dimension padded with zeros only where it refuses the one it gets."""

    def padded(multiple: int) -> Function:
        def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (_pad(x, multiple)[None] for x in (q, k, v))
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, scale=inputs[0].shape[-1] ** -0.5)
            return (out[0, ..., : inputs[2].shape[-1]],)

        return f

    with warnings.catch_warnings(record=True) as caught:  # it says there why a backend refuses
        warnings.simplefilter("always")
        for f in (padded(1), padded(8)):
            try:
                f(*inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                refusal = error
            else:
                return f
    why = "; ".join(dict.fromkeys(first_line(warning.message) for warning in caught))
    raise RuntimeError(why or first_line(refusal))


def _pad(x: Tensor, multiple: int) -> Tensor:
    width = -x.shape[-1] % multiple
    return F.pad(x, (0, width)) if width else x


def _tokens_first(x: Tensor) -> Tensor:
    """[H, T, D] to [1, T, H, D]"""
    return x.transpose(0, 1)[None]


def _heads_first(x: Tensor) -> Tensor:
    """[1, T, H, D] to [H, T, D]"""
    return x[0].transpose(0, 1)
