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
from .attention import accumulation_dtype

_SCHEMA = "(Tensor x, Tensor words, Tensor words_by_column, Tensor? rows, Tensor? columns) -> Tensor"


@operator("bit_sum", public="attention_kl", schema=_SCHEMA, leading=("x",), linear=("x",))
def bit_sum(x: Tensor, words: Tensor, words_by_column: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """x [..., X, D], the bits of M rows and C columns -> [..., R, D].

    The result is float32, float64 for float64 inputs. Arguments are checked by the caller.

    Args:
        words, words_by_column: int64 [M, ceil(C / 64)] and [C, ceil(M / 64)].
        rows: int64 [R], or all M.
        columns: int64 [X], of which column each row of x is, in a sum of which columns left out have no part; or all C.
    """
    if columns is not None:
        x = x.new_zeros(*x.shape[:-2], words_by_column.shape[0], x.shape[-1]).index_add(-2, columns, x)
    *leading, c, d = x.shape
    num_leading = x.shape[:-2].numel()
    # leading dimensions become columns of one product
    flat = x.to(accumulation_dtype(x.dtype)).reshape(num_leading, c, d).transpose(0, 1).reshape(c, num_leading * d)
    out = torch.ops.cellattn.bit_spmm(words, None if rows is None else rows.contiguous(), flat.contiguous())
    num_rows = out.shape[0]
    return out.view(num_rows, num_leading, d).transpose(0, 1).reshape(*leading, num_rows, d).contiguous()


@bit_sum.register_fake
def _(x: Tensor, words: Tensor, words_by_column: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    num_rows = words.shape[0] if rows is None else rows.shape[0]
    return x.new_empty(*x.shape[:-2], num_rows, x.shape[-1], dtype=accumulation_dtype(x.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, words_by_column, rows, columns = inputs
    keep_missing_grads(ctx)
    ctx.save_for_backward(words, words_by_column, rows, columns)
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    words, words_by_column, rows, columns = ctx.saved_tensors
    return bit_sum(grad, words_by_column, words, columns, rows).to(ctx.dtype), *(None,) * 4


bit_sum.register_autograd(_backward, setup_context=_setup_context)


@bit_sum.register_kernel("cuda")
def _(x: Tensor, words: Tensor, words_by_column: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    from ..kernels import bit_sum as kernels  # needs Triton

    if columns is not None:  # copies of a column in a fixed order, by sorting; it does not wait for values, as index_put would
        x = x.movedim(-2, 0)
        zeros = x.new_zeros(words_by_column.shape[0], *x.shape[1:])
        x = torch.ops.aten._index_put_impl_(zeros, [columns], x, True, True).movedim(0, -2)
    return kernels.bit_sum(x, words, rows)


@fake("bit_spmm")
def _(words: Tensor, rows: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(words.shape[0] if rows is None else rows.shape[0], x.shape[1])
