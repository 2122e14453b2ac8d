"""Attention of perturbation sets over all genes, where a set's own genes have values of their own.

With beta_bi = exp(scale * query_b . key_i - LSE_b), values V_i shared by the whole batch and overrides U_e for the genes
i(e) of each set,

    z_b = sum_i beta_bi V_i  +  sum_{e in b} beta_b,i(e) (U_e - V_i(e))

attention of B queries over N shared keys, and one correction a perturbed gene that needs only LSE and its gradient: no
[B, N, d] tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import (
    FLOAT_DTYPES,
    number_of,
    require,
    require_same,
    require_sets,
    require_tensor,
)
from ._operator import keep_missing_grads, operator, refuse_double_backward
from .attention import attention, unrounded, with_scale
from .set_sum import members, set_sum


def perturbation_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, ptr: Tensor, override: Tensor, *, scale: float = 1.0
) -> Tensor:
    """One attention query a perturbation set over all genes, with values overridden at the set's genes.

    The read-out from sets to genes. The other one, in which genes attend to their set, is `cellattn.nn.PerturbedGeneReadout`. A
    null sink here is one more row, the last of key and value, which no index names.

    Args:
        query: [..., B, D], one a set; float32, bfloat16, float16, or float64 on the CPU.
        key: [..., N, D], value: [..., N, Dv]: every gene as present, shared by all sets.
        index: int64 [nnz], the genes of set after set.
        ptr: int64 [B + 1]: set b holds entries ptr[b] to ptr[b + 1] of `index`; sets may be empty.
        override: [..., nnz, Dv]: the value of gene index[e] in its own set.
        scale: factor of the scores.

    Returns:
        z [..., B, Dv] in the dtype of query. A value that is NaN or infinite does not reach the sets that override it; any
        other set it does, as sum_i beta_i V_i would have it. Since a set's own values are taken out of a sum over all genes,
        z is as accurate as that sum: its error is up to a few roundings of the largest beta_i |V_i|, overridden or not, and on
        a GPU what `attention` says there of large scores. Beta of a set's own genes, and all gradients, are of scores in
        float64 where |LSE| >= 710.

    Raises:
        ValueError, TypeError: naming the argument. A gene twice in a set, ptr that does not rise from 0 to nnz and indices
            out of range are found on the CPU; on other devices, where looking would force a sync, under CELLATTN_CHECKS=1.
        RuntimeError: on double backward.
    """
    for name, x in (("query", query), ("key", key), ("value", value), ("override", override)):
        require_tensor(name, x, dtypes=FLOAT_DTYPES)
        require(x.ndim >= 2, lambda: f"{name}: expected shape [..., rows, features], got {list(x.shape)}")
    require_tensor("index", index, ndim=1)
    require_tensor("ptr", ptr, ndim=1)
    require_same("dtype", query=query.dtype, key=key.dtype, value=value.dtype, override=override.dtype)
    require_same(
        "device", query=query.device, key=key.device, value=value.device, index=index.device, ptr=ptr.device,
        override=override.device,
    )  # fmt: skip
    lead = query.shape[:-2]
    for name, x, expected in (
        ("key", key, (*lead, key.shape[-2], query.shape[-1])),
        ("value", value, (*lead, key.shape[-2], value.shape[-1])),
        ("override", override, (*lead, index.shape[0], value.shape[-1])),
    ):
        require(tuple(x.shape) == expected, lambda: f"{name}: expected shape {list(expected)}, got {list(x.shape)}")
    require(query.shape[-1] >= 1, lambda: f"query: expected at least one feature, got shape {list(query.shape)}")
    require(key.shape[-2] >= 1, lambda: f"key: expected at least one gene, got shape {list(key.shape)}")
    _check_sets(index, ptr, query.shape[-2], key.shape[-2])
    query, scale = with_scale(query, number_of("scale", scale))
    out, lse = attention(query, key, _finite(value), scale=scale)
    return out + _correction(query, key, value, lse, index, ptr, override, scale)


def _check_sets(index: Tensor, ptr: Tensor, num_sets: int, num_genes: int) -> None:
    require_sets("index", index, ptr, num_genes, num_sets=num_sets, distinct=True)


# ------------------------------------------------------------------------------------------------------- operators


# As the public function has them, and lse [..., B] of its queries over all genes.
_SETS = "Tensor query, Tensor key, Tensor value, Tensor lse, Tensor index, Tensor ptr, Tensor override, float scale"


@operator(
    "perturbation_correction",
    public="perturbation_attention",
    schema=f"({_SETS}) -> Tensor",
    leading=("query", "key", "value", "lse", "override"),
)
def _correction(query: Tensor, key: Tensor, value: Tensor, lse: Tensor, index: Tensor, ptr: Tensor, *rest: Any) -> Tensor:
    """sum_{e in b} beta_e (U_e - V_i(e)), [..., B, Dv], and what values that are not finite add."""
    _check_sets(index, ptr, query.shape[-2], key.shape[-2])  # the public function sees no values while it is compiled
    sample, _, _, beta, difference = _entries(query, key, value, lse, index, ptr, *rest)
    z = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=beta.dtype)
    z.index_add_(-2, sample, beta[..., None] * difference)
    if not value.sum(-2).isfinite().all():
        z += _not_overridden(value, index, ptr)
    return z.to(query.dtype)


@_correction.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@operator(
    "perturbation_correction_backward",
    schema=f"(Tensor dz, {_SETS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    leading=("dz", "query", "key", "value", "lse", "override"),
)
def _correction_backward(
    dz: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    index: Tensor,
    ptr: Tensor,
    override: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue, dlse, doverride)"""
    sample, queries, keys, beta, difference = _entries(query, key, value, lse, index, ptr, override, scale)
    weighted = beta[..., None] * dz.to(beta.dtype).index_select(-2, sample)  # the gradient of U_e - V_i(e)
    ds = (weighted * difference).sum(-1, keepdim=True)  # beta dbeta, the gradient of scale * q . k
    dquery, dkey, dvalue = (torch.zeros(x.shape, dtype=beta.dtype) for x in (query, key, value))
    dquery.index_add_(-2, sample, scale * ds * keys)
    dkey.index_add_(-2, index, scale * ds * queries)
    dvalue.index_add_(-2, index, weighted.neg().where(value.index_select(-2, index).isfinite(), 0))
    dlse = torch.zeros(lse.shape, dtype=beta.dtype).index_add_(-1, sample, -ds.squeeze(-1))
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype), dlse.to(lse.dtype), weighted.to(override.dtype)


@_correction_backward.register_fake
def _(dz: Tensor, *sets: Any) -> tuple[Tensor, ...]:
    query, key, value, lse, _, _, override, _ = sets
    return tuple(x.new_empty(x.shape) for x in (query, key, value, lse, override))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scale = inputs
    keep_missing_grads(ctx)
    ctx.save_for_backward(*tensors)
    ctx.scale = scale


def _backward(ctx: Any, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    if dz is None:
        return (None,) * 8
    dquery, dkey, dvalue, dlse, doverride = _correction_backward(dz, *ctx.saved_tensors, ctx.scale)
    return dquery, dkey, dvalue, dlse, None, None, doverride, None


_correction.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_correction_backward, "perturbation_attention")

# ------------------------------------------------------------------------------------------------------------ CUDA


@_correction.register_kernel("cuda")
def _(*args: Any) -> Tensor:
    from ..kernels import perturbation_attention as kernels  # needs Triton

    _, _, value, _, index, ptr, _, _ = args
    return kernels.perturbation_correction(*args) + _not_overridden(value, index, ptr)


@_correction_backward.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import perturbation_attention as kernels

    dquery, dkey, dvalue, dlse, doverride = kernels.perturbation_correction_backward(*args)
    return dquery, dkey, dvalue.where(args[3].isfinite(), 0), dlse, doverride


# ------------------------------------------------------------------------------------------------------------- CPU


def _entries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    index: Tensor,
    ptr: Tensor,
    override: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of every entry: its sample [nnz], query and key [..., nnz, D], beta [..., nnz], and U - V [..., nnz, Dv]."""
    sample = members(ptr, index.numel())
    query, key, lse = unrounded(query, key, lse, scale)
    queries, keys = query.index_select(-2, sample), key.index_select(-2, index)
    beta = (scale * (queries * keys).sum(-1) - lse.index_select(-1, sample)).exp()
    difference = override.to(beta.dtype) - _finite(value.index_select(-2, index)).to(beta.dtype)
    return sample, queries, keys, beta, difference


# ------------------------------------------------------------------------------------------- values that are not finite


def _finite(value: Tensor) -> Tensor:
    """0 in the place of NaN and infinities: 0 * NaN would bring them into every sum."""
    return value.nan_to_num(0.0, 0.0, 0.0)


def _not_overridden(value: Tensor, index: Tensor, ptr: Tensor) -> Tensor:
    """What values that are not finite add to each set, [..., B, Dv]: 0 where all of them are overridden there."""
    wrong = ~value.isfinite()
    num_wrong = wrong.sum(-2, keepdim=True)
    # [nnz, all leading dimensions and features]
    own = wrong.index_select(-2, index).movedim(-2, 0)
    num_own = set_sum(own.flatten(1).float(), ptr).unflatten(1, own.shape[1:]).movedim(0, -2)
    total = value.where(wrong, 0).sum(-2, keepdim=True)
    return total.where(num_wrong > num_own, 0)
