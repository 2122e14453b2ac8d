"""Sums over the sets of a ragged batch: entries [nnz, D] and ptr int64 [B + 1], sets often empty.

A segment sum forward and a gather backward, so that a result is the same from run to run.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._check import count_of, require, require_ragged, values_visible
from ._operator import operator

LONG = 1024  # entries of a set, in the mean, from which on it is worth a call of its own


def set_mean(x: Tensor, ptr: Tensor) -> Tensor:
    """Mean of the entries of each set: x [nnz, D], ptr int64 [B + 1] -> [B, D], zeros for an empty set."""
    return set_sum(x, ptr) / ptr.diff().clamp(min=1).unsqueeze(-1).to(x.dtype)


@operator("set_sum", linear=("x",))
def set_sum(x: Tensor, ptr: Tensor) -> Tensor:
    """Sum of the entries of each set: x [nnz, D], ptr int64 [B + 1] -> [B, D], zeros for an empty set."""
    require_ragged("x", ptr.new_empty(x.shape[0], device=x.device), ptr)  # as long as x; what follows reads where ptr points
    if x.shape[0] < LONG * (ptr.shape[0] - 1):
        return torch.segment_reduce(x, "sum", offsets=ptr, axis=0)
    # one thread walks a set there; few and long ones are shared out among all threads, set by set
    out = x.new_empty(ptr.shape[0] - 1, x.shape[1])
    for b, (begin, end) in enumerate(pairwise(ptr.tolist())):
        torch.sum(x[begin:end], 0, out=out[b])
    return out


@set_sum.register_fake
def _(x: Tensor, ptr: Tensor) -> Tensor:
    return x.new_empty(ptr.shape[0] - 1, x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, ptr = inputs
    ctx.save_for_backward(ptr)
    ctx.num_entries = x.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (ptr,) = ctx.saved_tensors
    return grad.index_select(0, members(ptr, ctx.num_entries)), None


set_sum.register_autograd(_backward, setup_context=_setup_context)


@set_sum.register_kernel("cuda")
def _(x: Tensor, ptr: Tensor) -> Tensor:
    from ..kernels import set_sum as kernels  # needs Triton

    require_ragged("x", ptr.new_empty(x.shape[0], device=x.device), ptr)
    return kernels.set_sum(x, ptr)


def members(ptr: Tensor, num_entries: int) -> Tensor:
    """The set of each entry, int64 [nnz]."""
    return torch.searchsorted(ptr.contiguous(), torch.arange(num_entries, device=ptr.device), right=True) - 1


def set_size(ptr: Tensor, max_size: int | None) -> int:
    """The bound on the entries of a set that a caller gives, checked where values may be looked at; None: the longest set's."""
    if max_size is None:
        require(not ptr.is_meta, "max_size: expected a number for tensors on meta, whose sets have no sizes; got None")
        if torch.compiler.is_exporting() or isinstance(ptr, FakeTensor):
            raise NotImplementedError(
                "cellattn.nn: max_size: expected a number under torch.export and with fake tensors, whose sets have no sizes; "
                "got None"
            )
        return int(ptr.diff().max()) if ptr.numel() > 1 else 0
    max_size = count_of("max_size", max_size)
    if ptr.numel() > 1 and values_visible(ptr):
        longest, sample = (int(x) for x in ptr.diff().max(0))
        require(longest <= max_size, f"max_size: expected at least {longest}, the entries of set {sample}, got {max_size}")
    return max_size
