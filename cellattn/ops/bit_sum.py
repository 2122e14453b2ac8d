"""Sums over the neighbours in a dense relation, one bit a pair: what `row_dot` takes where a row has most genes.

With bits b_ij, out_i = sum_j b_ij x_j. The cost does not depend on how many bits are set (`csrc/cpu/bit_spmm.h`, on a GPU
`kernels/bit_sum.py`), and a relation of 6,607 genes is 5.5 MB where its CSR arrays may be 240.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._extension import fake
from ._operator import keep_missing_grads, operator
from ._rows import put_rows
from .attention import accumulation_dtype

_SCHEMA = "(Tensor x, Tensor words, Tensor words_by_column, Tensor? rows) -> Tensor"


@operator("bit_sum", public="attention_kl", schema=_SCHEMA, leading=("x",), linear=("x",))
def bit_sum(x: Tensor, words: Tensor, words_by_column: Tensor, rows: Tensor | None) -> Tensor:
    """x [..., C, D], the bits by rows int64 [M, ceil(C / 64)] and by columns, rows int64 [R] or all M -> [..., R, D].

    The result is float32, float64 for float64 inputs. Arguments are checked by the caller.
    """
    *leading, c, d = x.shape
    num_leading = x.shape[:-2].numel()
    # leading dimensions become columns of one product
    flat = x.to(accumulation_dtype(x.dtype)).reshape(num_leading, c, d).transpose(0, 1).reshape(c, num_leading * d)
    out = torch.ops.cellattn.bit_spmm(words, rows, flat.contiguous())
    num_rows = out.shape[0]
    return out.view(num_rows, num_leading, d).transpose(0, 1).reshape(*leading, num_rows, d).contiguous()


@bit_sum.register_fake
def _(x: Tensor, words: Tensor, words_by_column: Tensor, rows: Tensor | None) -> Tensor:
    num_rows = words.shape[0] if rows is None else rows.shape[0]
    return x.new_empty(*x.shape[:-2], num_rows, x.shape[-1], dtype=accumulation_dtype(x.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, words_by_column, rows = inputs
    keep_missing_grads(ctx)
    ctx.save_for_backward(words, words_by_column, rows)
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    words, words_by_column, rows = ctx.saved_tensors
    if rows is not None:  # zeros in the rows left out: the product by columns serves any subset
        grad = put_rows(grad, rows, words.shape[0])
    return bit_sum(grad, words_by_column, words, None).to(ctx.dtype), None, None, None


bit_sum.register_autograd(_backward, setup_context=_setup_context)


@bit_sum.register_kernel("cuda")
def _(x: Tensor, words: Tensor, words_by_column: Tensor, rows: Tensor | None) -> Tensor:
    from ..kernels import bit_sum as kernels  # needs Triton

    return kernels.bit_sum(x, words, rows)


@fake("bit_spmm")
def _(words: Tensor, rows: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(words.shape[0] if rows is None else rows.shape[0], x.shape[1])
