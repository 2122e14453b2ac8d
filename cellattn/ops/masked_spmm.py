"""Message passing over B masked copies of one graph, with no copied edge and no [B, E] tensor.

With keep_b in {0, 1}^N and weights w of one relation,

    out_bi = keep_bi sum_j A_ij w_ij keep_bj x_bj

so with g the gradient of out, that of x is the same product over the transposed graph,

    dx_bj = keep_bj sum_i A_ij w_ij keep_bi g_bi

summed over b where x is shared, and that of a weight is dw_ij = sum_b keep_bi keep_bj g_bi . x_bj: gathers both ways. The
mean divides row i of sample b by its number of kept neighbours, and its gradient divides g by the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import FLOAT_DTYPES, count_of, describe, require, require_choice, require_same, require_tensor
from .._extension import cuda_kernel, fake
from ..graph import MultiGraph
from ._csr import both_ways
from ._operator import keep_missing_grads, operator, refuse_double_backward
from ._sets import allocating, check_graph
from .attention import accumulation_dtype, as_dtype
from .khop_mask import num_words

REDUCES = ("sum", "mean")


def masked_spmm(
    graph: MultiGraph,
    relation: str,
    x: Tensor,
    keep: Tensor,
    *,
    reduce: str = "sum",
    transpose: bool = False,
    edge_weight: Tensor | None = None,
    num_sets: int | None = None,
) -> Tensor:
    """Sum or average the features of kept neighbours, for every sample's mask of one relation.

    Args:
        graph: the relations.
        relation: over the edges of which relation.
        x: [N, F], shared by all samples, or [B, N, F]; float32, bfloat16, float16, or float64 on the CPU.
        keep: bool [B, N], the genes of each sample; or int64 [N, ceil(B / 64)], the same as words (`packed=True` of
            `khop_mask` and `perturbation_mask`), with `num_sets`.
        reduce: "sum", or "mean": divided by the number of kept neighbours with an edge, which counts edges, not weights.
        transpose: sum over the edges A[j, i] instead of A[i, j].
        edge_weight: floating [E], in the order of `graph.col(relation)`; `graph.weight(relation)` if None.
        num_sets: B, with packed `keep`.

    Returns:
        out [B, N, F] in the dtype of x: out[b, i] = keep[b, i] * sum_j A[i, j] w[i, j] keep[b, j] x[b, j]. Differentiable in x
        and `edge_weight`. Sums are taken in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: on double backward.
        MemoryError, torch.OutOfMemoryError: on the CPU, on a GPU: the result does not fit.
        ImportError, NotImplementedError: the extension was not built, or not for the graph's device.
    """
    check_graph(graph)
    r = graph.relation_id(relation)
    require_tensor("x", x, dtypes=FLOAT_DTYPES)
    if x.device != graph.device:
        require_same("device", graph=graph.device, x=x.device)
    words, num_sets = _packed(keep, num_sets, graph)
    of_all = x.ndim == 2 or (x.ndim == 3 and x.shape[0] == num_sets)
    require(
        of_all and x.shape[-2] == graph.num_nodes,
        lambda: f"x: expected shape [{graph.num_nodes}, F] or [{num_sets}, {graph.num_nodes}, F], got {list(x.shape)}",
    )
    require_choice("reduce", reduce, REDUCES)
    if not isinstance(transpose, bool):
        raise TypeError(f"transpose: expected a bool, got {describe(transpose)}")
    weight = graph.weight(relation) if edge_weight is None else edge_weight
    if edge_weight is not None:
        require_tensor("edge_weight", edge_weight, ndim=1, dtypes=FLOAT_DTYPES)
        require_same("device", graph=graph.device, edge_weight=edge_weight.device)
        count = graph.num_edges(relation)
        require(
            edge_weight.shape[0] == count,
            lambda: f"edge_weight: expected {count} weights, one an edge, got {edge_weight.shape[0]}",
        )
    value = as_dtype(weight, accumulation_dtype(x.dtype))
    num_nodes, num_features = x.shape[-2:]
    return allocating(
        lambda: _masked_sum(x, value, words, *both_ways(graph, r), num_sets, reduce == "mean", transpose),
        num_sets * num_nodes * num_features * x.element_size(),
        x,
        lambda: f"sums of {num_features:,} features of {num_nodes:,} genes in {num_sets:,} samples",
        "lower the number of samples",
    )


def _packed(keep: Any, num_sets: Any, graph: MultiGraph) -> tuple[Tensor, int]:
    """(words [N, W], B) from either form of the mask."""
    require_tensor("keep", keep, ndim=2, dtypes=(torch.bool, torch.int64))
    if keep.device != graph.device:
        require_same("device", graph=graph.device, keep=keep.device)
    n = graph.num_nodes
    if keep.dtype == torch.bool:
        require(keep.shape[1] == n, lambda: f"keep: expected shape [B, {n}], got {list(keep.shape)}")
        if num_sets is not None:
            require(
                num_sets == keep.shape[0],
                lambda: f"num_sets: expected None or {keep.shape[0]}, the rows of keep, got {describe(num_sets)}",
            )
        return torch.ops.cellattn.pack_words(keep.contiguous()), keep.shape[0]
    require(num_sets is not None, "num_sets: expected the number of samples of packed keep, got None")
    num_sets = count_of("num_sets", num_sets)
    expected = [n, num_words(num_sets)]
    require(
        list(keep.shape) == expected,
        lambda: f"keep: expected shape {expected} for {num_sets} packed samples, got {list(keep.shape)}",
    )
    return keep.contiguous(), num_sets


# ------------------------------------------------------------------------------------------------------- operators


# x [N, F] or [B, N, F]; value float32 or float64 [E]; words [N, W]; the relation by rows and by columns, entry p by columns
# being CSR entry edge[p].
_PRODUCT = (
    "Tensor x, Tensor value, Tensor words, Tensor rowptr, Tensor col, Tensor colptr, Tensor row, Tensor edge, "
    "SymInt num_sets, bool mean, bool transpose"
)


@operator("masked_sum", public="masked_spmm", schema=f"({_PRODUCT}) -> Tensor", device=None, linear=("x", "value"))
def _masked_sum(x: Tensor, value: Tensor, words: Tensor, *graph: Any) -> Tensor:
    """out [B, N, F]"""
    *by, num_sets, mean, transpose = graph
    pointer, index, weight = _oriented(value, *by, transpose=transpose)
    return torch.ops.cellattn.masked_spmm(pointer, index, weight, x.contiguous(), words, num_sets, mean)


@_masked_sum.register_fake
def _(x: Tensor, value: Tensor, words: Tensor, *graph: Any) -> Tensor:
    return x.new_empty(graph[-3], *x.shape[-2:])


@operator(
    "masked_sum_backward", schema=f"(Tensor g, {_PRODUCT}, bool need_x, bool need_value) -> (Tensor, Tensor)", device=None
)
def _masked_sum_backward(g: Tensor, x: Tensor, value: Tensor, words: Tensor, *graph: Any) -> tuple[Tensor, Tensor]:
    """(dx, dvalue), each empty where it is not needed"""
    *by, num_sets, mean, transpose, need_x, need_value = graph
    pointer, index = by[2:4] if transpose else by[:2]
    wide = accumulation_dtype(g.dtype)
    if mean:
        degree = torch.ops.cellattn.masked_degree(pointer, index, words, num_sets)
        g = (g.to(wide) / degree.clamp(min=1).unsqueeze(-1)).to(g.dtype)
    g = g.contiguous()
    dx, dvalue = x.new_empty(0), value.new_empty(0)
    if need_x:
        back = _oriented(value, *by, transpose=not transpose)
        # what is summed over the batch is rounded once, at the end
        g_x = as_dtype(g, wide) if x.ndim == 2 else g
        dx = torch.ops.cellattn.masked_spmm(*back, g_x, words, num_sets, False)
        if x.ndim == 2:
            dx = as_dtype(dx.squeeze(0) if num_sets == 1 else dx.sum(0), x.dtype)
    if need_value:
        dvalue = torch.ops.cellattn.masked_sddmm(pointer, index, g, x.contiguous(), words, num_sets).to(value.dtype)
        if transpose:  # as the columns have them
            dvalue = torch.empty_like(dvalue).index_copy_(0, by[4], dvalue)
    return dx, dvalue


@_masked_sum_backward.register_fake
def _(g: Tensor, x: Tensor, value: Tensor, words: Tensor, *graph: Any) -> tuple[Tensor, Tensor]:
    *_, need_x, need_value = graph
    return x.new_empty(x.shape if need_x else 0), value.new_empty(value.shape if need_value else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, num_sets, mean, transpose = inputs
    keep_missing_grads(ctx)
    ctx.save_for_backward(*tensors)
    ctx.options = num_sets, mean, transpose


def _backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 11
    need_x, need_value = ctx.needs_input_grad[:2]
    dx, dvalue = _masked_sum_backward(g, *ctx.saved_tensors, *ctx.options, need_x, need_value)
    return dx if need_x else None, dvalue if need_value else None, *(None,) * 9


_masked_sum.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_masked_sum_backward, "masked_spmm")


@fake("pack_words")
def _(keep: Tensor) -> Tensor:
    return keep.new_empty(keep.shape[1], num_words(keep.shape[0]), dtype=torch.int64)


@fake("masked_spmm")
def _(rowptr: Tensor, col: Tensor, value: Tensor | None, x: Tensor, words: Tensor, num_sets: int, mean: bool) -> Tensor:
    return x.new_empty(num_sets, *x.shape[-2:])


@fake("masked_sddmm")
def _(rowptr: Tensor, col: Tensor, g: Tensor, x: Tensor, words: Tensor, num_sets: int) -> Tensor:
    return x.new_empty(col.shape[0], dtype=accumulation_dtype(x.dtype))


@fake("masked_degree")
def _(rowptr: Tensor, col: Tensor, words: Tensor, num_sets: int) -> Tensor:
    return words.new_empty(num_sets, words.shape[0], dtype=torch.int32)


def _oriented(
    value: Tensor, rowptr: Tensor, col: Tensor, colptr: Tensor, row: Tensor, edge: Tensor, *, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(pointers, indices, values) of the product, by columns if transposed."""
    return (colptr, row, value.index_select(0, edge)) if transpose else (rowptr, col, value.contiguous())


# ------------------------------------------------------------------------------------------------------------ CUDA


@cuda_kernel("masked_spmm")
def _(*args: Any) -> Tensor:
    from ..kernels import masked_spmm as kernels  # needs Triton

    return kernels.masked_spmm(*args)


@cuda_kernel("masked_sddmm")
def _(*args: Any) -> Tensor:
    from ..kernels import masked_spmm as kernels

    return kernels.masked_sddmm(*args)


@cuda_kernel("masked_degree")
def _(*args: Any) -> Tensor:
    from ..kernels import masked_spmm as kernels

    return kernels.masked_degree(*args)
