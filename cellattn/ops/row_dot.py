"""Products along CSR rows: the second of the library's two primitives.

For a tie of a head to a relation with weights w,

    kbar_i = sum_j w_ij k_j ,   y_i = q_i . kbar_i

touches edges only. Its gradient for q is dy_i kbar_i, with kbar kept from the forward, and for k it is the product of the
transposed graph with dy_i q_i: gathers both ways, no scatter, equal from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph import Bits, MultiGraph
from ._csr import spmm, take_rows
from ._operator import keep_missing_grads, operator, refuse_derivative, refuse_double_backward
from ._rows import take
from .attention import accumulation_dtype
from .bit_sum import bit_sum


def row_dot(
    q: Tensor,
    k: Tensor,
    graph: MultiGraph,
    ties: Sequence[tuple[str, int]],
    rows: Sequence[Tensor | None],
    *,
    num_prefix: int,
) -> Tensor:
    """y_i = q_i . sum_j w_ij k_j for the chosen rows of every tie, in one operator for all ties; w is `graph.scaled`.

    Args:
        q, k: [..., H, T, D] with T = num_prefix + N.
        ties: (relation, head) pairs.
        rows: for each tie int64 [R_t] genes, or None for all.

    Returns:
        y [..., M], the rows of tie after tie, float32 (float64 for float64 inputs). Arguments are checked by the caller.
    """
    dense = [graph.bits(relation) for relation, _ in ties]
    if not any(dense):
        return row_dot_csr(q, k, graph, ties, rows, num_prefix=num_prefix)
    sparse = [i for i, bits in enumerate(dense) if bits is None]
    parts: dict[int, Tensor] = {}
    if sparse:  # one launch for all
        chosen = [rows[i] for i in sparse]
        y = row_dot_csr(q, k, graph, [ties[i] for i in sparse], chosen, num_prefix=num_prefix)
        parts = dict(zip(sparse, y.split(_lengths(chosen, graph), -1), strict=True))
    for i, ((_, head), genes, bits) in enumerate(zip(ties, rows, dense, strict=True)):
        if bits is not None:
            parts[i] = _row_dot_bits(q[..., head, :, :], k[..., head, :, :], bits, genes, num_prefix)
    return torch.cat([parts[i] for i in range(len(ties))], -1)


def _lengths(rows: Sequence[Tensor | None], graph: MultiGraph) -> list[int]:
    return [graph.num_nodes if genes is None else genes.numel() for genes in rows]


def _row_dot_bits(q: Tensor, k: Tensor, bits: Bits, genes: Tensor | None, num_prefix: int) -> Tensor:
    """q, k [..., T, D] of one head -> [..., R]"""
    kbar = bit_sum(take(k, -2, None, num_prefix), *bits, genes, None)
    return (take(q, -2, genes, num_prefix).to(kbar.dtype) * kbar).sum(-1)


def row_dot_csr(
    q: Tensor,
    k: Tensor,
    graph: MultiGraph,
    ties: Sequence[tuple[str, int]],
    rows: Sequence[Tensor | None],
    *,
    num_prefix: int,
) -> Tensor:
    """`row_dot` along the CSR rows, of any density."""
    relations = [graph.relation_id(relation) for relation, _ in ties]
    heads = [head for _, head in ties]
    lengths = _lengths(rows, graph)
    genes = None
    if any(index is not None for index in rows):
        everyone = torch.arange(graph.num_nodes, device=graph.device)
        genes = torch.cat([everyone if index is None else index for index in rows])
    by_row, by_column = graph.segments
    weight = graph.scaled
    y, _ = _row_dot(
        q, k, *graph.stacked[:2], weight.by_row, *graph.transpose()[:2], weight.by_column, *by_row, *by_column,
        relations, heads, genes, lengths, num_prefix,
    )  # fmt: skip
    return y


# ------------------------------------------------------------------------------------------------------- operators


# q, k [..., H, T, D]; the stacked graph by rows and by columns, and where its long rows and columns are cut, which the CPU does
# not read; relation and head of every tie; rows int64 [M], the genes of tie after tie, None for all N of every tie; lengths,
# the rows of every tie.
_TIES = "int[] relations, int[] heads, Tensor? rows, int[] lengths, int num_prefix"
_BY_ROW = "Tensor rowptr, Tensor col, Tensor weight"
_BY_COLUMN = "Tensor colptr, Tensor row, Tensor weight_by_column"
_ROW_SEGMENTS = "Tensor row_segptr, Tensor segment_row, int[] row_segments"
_COLUMN_SEGMENTS = "Tensor col_segptr, Tensor segment_col, int[] col_segments"


@operator(
    "row_dot",
    public="attention_kl",
    leading=("q", "k"),
    schema=f"(Tensor q, Tensor k, {_BY_ROW}, {_BY_COLUMN}, {_ROW_SEGMENTS}, {_COLUMN_SEGMENTS}, {_TIES}) -> (Tensor, Tensor)",
)
def _row_dot(q: Tensor, k: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(y [..., M], kbar [..., M, D])"""
    *_, relations, heads, rows, lengths, num_prefix = rest
    dtype = accumulation_dtype(q.dtype)
    n = q.shape[-2] - num_prefix
    y = torch.empty(*q.shape[:-3], sum(lengths), dtype=dtype)
    kbar = torch.empty(*y.shape, q.shape[-1], dtype=dtype)
    for relation, head, here in _each_tie(relations, heads, lengths):
        genes = None if rows is None else rows[here]
        ptr, entry = _span(rowptr, relation, n) if genes is None else take_rows(rowptr, relation * n + genes)
        keys = k[..., head, num_prefix:, :].to(dtype)
        kbar[..., here, :] = _spmm_leading(ptr, col[entry], weight[entry].to(dtype), n, keys)
        queries = take(q[..., head, :, :], -2, genes, num_prefix).to(dtype)
        y[..., here] = (queries * kbar[..., here, :]).sum(-1)
    return y, kbar


@_row_dot.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lengths = rest[-2]
    y = q.new_empty(*q.shape[:-3], sum(lengths), dtype=accumulation_dtype(q.dtype))
    return y, y.new_empty(*y.shape, q.shape[-1])


@operator(
    "row_dot_backward",
    leading=("dy", "q", "kbar"),
    schema=f"(Tensor dy, Tensor q, Tensor kbar, {_BY_COLUMN}, {_COLUMN_SEGMENTS}, {_TIES}) -> (Tensor, Tensor)",
)
def _row_dot_backward(
    dy: Tensor, q: Tensor, kbar: Tensor, colptr: Tensor, row: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, relations, heads, rows, lengths, num_prefix = rest
    n = q.shape[-2] - num_prefix
    dq, dk = (torch.zeros(q.shape, dtype=kbar.dtype) for _ in range(2))
    for relation, head, here in _each_tie(relations, heads, lengths):
        g = dy[..., here, None]
        queries = q[..., head, num_prefix:, :].to(kbar.dtype)
        if rows is None:
            dq[..., head, num_prefix:, :] += g * kbar[..., here, :]
            weighted = g * queries
        else:
            genes = rows[here]
            dq[..., head, num_prefix:, :].index_add_(-2, genes, g * kbar[..., here, :])
            # Zeros in the rows left out: the transposed product then serves any subset of rows.
            weighted = torch.zeros_like(queries).index_add_(-2, genes, g * queries.index_select(-2, genes))
        ptr, entry = _span(colptr, relation, n)
        dk[..., head, num_prefix:, :] += _spmm_leading(ptr, row[entry], weight[entry].to(kbar.dtype), n, weighted)
    return dq.to(q.dtype), dk.to(q.dtype)


@_row_dot_backward.register_fake
def _(dy: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, _, _, _, colptr, row, weight, _, _, _, segptr, segment_col, segments, relations, heads, rows, *rest = inputs
    keep_missing_grads(ctx)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(k, q, output[1], colptr, row, weight, segptr, segment_col, rows)
    ctx.segments, ctx.ties, ctx.rest = segments, (relations, heads), rest


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 19
    k, q, kbar, *tensors, rows = ctx.saved_tensors
    kbar = refuse_derivative(kbar, k, "attention_kl")  # which is made of k, and dq of it
    dq, dk = _row_dot_backward(dy, q, kbar, *tensors, ctx.segments, *ctx.ties, rows, *ctx.rest)
    return dq, dk, *(None,) * 17


_row_dot.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_row_dot_backward, "attention_kl")

# ------------------------------------------------------------------------------------------------------------ CUDA


@_row_dot.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import row_dot as kernels  # needs Triton

    return kernels.row_dot(*args)


@_row_dot_backward.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import row_dot as kernels

    return kernels.row_dot_backward(*args)


# ------------------------------------------------------------------------------------------------------------- CPU


def _each_tie(relations: Sequence[int], heads: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, int, slice]]:
    """(relation, head, where its rows stand among the M of all ties)"""
    first = 0
    for relation, head, length in zip(relations, heads, lengths, strict=True):
        yield relation, head, slice(first, first + length)
        first += length


def _span(ptr: Tensor, relation: int, n: int) -> tuple[Tensor, slice]:
    """A whole relation's part of the stacked arrays."""
    mine = ptr[relation * n : (relation + 1) * n + 1]
    return mine - mine[0], slice(int(mine[0]), int(mine[-1]))


def _spmm_leading(ptr: Tensor, col: Tensor, value: Tensor, num_cols: int, x: Tensor) -> Tensor:
    """CSR [R, C] times x [..., C, D] -> [..., R, D]: leading dimensions become columns of one product."""
    num_rows, num_leading, d = ptr.numel() - 1, x.shape[:-2].numel(), x.shape[-1]
    flat = x.reshape(num_leading, num_cols, d).transpose(0, 1).reshape(num_cols, num_leading * d)
    out = spmm(ptr, col, value, num_cols, flat).reshape(num_rows, num_leading, d)
    return out.transpose(0, 1).reshape(*x.shape[:-2], num_rows, d)
