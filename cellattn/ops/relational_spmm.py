"""Message passing over several relations at once, between gene subsets whose features alone are stored.

Sample b has genes that send, source_b, and genes that receive, target_b. A gene's place is its position in the ragged
batch, and features are stored by place. With weights w^r of relation r, and p the place of gene j in source_b,

    out_tr = scale_tr sum_{j in source_b} A^r_ij w^r_ij x_pr          for the place t of gene i in target_b

so with g the gradient of out, that of x is the same product over the transposed graphs, with source and target exchanged
and the factor on the sending side,

    dx_pr = sum_{i in target_b} A^r_ij w^r_ij scale_tr g_tr

summed over r where x is one for all relations; g is one for all relations where out was summed over them. Features that
all samples share are stored by gene, and their gradient is summed over the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._check import (
    FLOAT_DTYPES,
    describe,
    require,
    require_same,
    require_sets,
    require_tensor,
)
from .._extension import cuda_kernel, fake
from ..graph import MultiGraph
from ._operator import keep_missing_grads, operator, refuse_double_backward
from ._sets import allocating, check_graph
from .attention import accumulation_dtype, as_dtype


def relational_spmm(
    graph: MultiGraph,
    x: Tensor,
    source: Tensor,
    source_ptr: Tensor,
    target: Tensor,
    target_ptr: Tensor,
    *,
    relations: Sequence[str] | None = None,
    scale: Tensor | None = None,
    sum_relations: bool = True,
    shared: bool = False,
    transpose: bool = False,
    weighted: bool = True,
) -> Tensor:
    """Sum the features of each sample's sending neighbours, for its receiving genes, over several relations in one call.

    Args:
        graph: the relations.
        x: [Vs, K, F], features of each sender for each relation; or [Vs, F], the same for all. With `shared`, [N, K, F] or
            [N, F]. float32, bfloat16, float16, or float64 on the CPU.
        source, source_ptr: int64 [Vs] and [B + 1]: the genes that send in each sample, ascending within it, each once.
        target, target_ptr: int64 [Vt] and [B + 1], likewise: the genes that receive.
        relations: K names, in the order of x's dimension K; all of the graph's if None.
        scale: floating [Vt, K], a factor of each sum; a constant. 1 / `relational_degree` makes means of sums.
        sum_relations: whether the K sums of a gene are added.
        shared: gene i sends x[i] in every sample in which it sends.
        transpose: sum over the edges A^r[j, i] instead of A^r[i, j].
        weighted: whether the weights of edges are read, or each edge counts 1.

    Returns:
        out [Vt, F], or [Vt, K, F] without `sum_relations`, in the dtype of x: out[t, r] = scale[t, r] * sum of
        A^r[i, j] w^r[i, j] x[p, r] over the genes j of source_b, with i = target[t] in sample b and p the place of j in it.
        Differentiable in x. Sums are taken in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: on double backward.
        MemoryError, torch.OutOfMemoryError: on the CPU, on a GPU: the result does not fit.
        ImportError, NotImplementedError: the extension was not built, or not for the graph's device.
    """
    check_graph(graph)
    ids = _relation_ids(graph, relations)
    require_tensor("x", x, dtypes=FLOAT_DTYPES)
    if x.device != graph.device:
        require_same("device", graph=graph.device, x=x.device)
    _check_between(graph, source, source_ptr, target, target_ptr)
    flags = {"sum_relations": sum_relations, "shared": shared, "transpose": transpose, "weighted": weighted}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {describe(value)}")
    k, senders = len(ids), graph.num_nodes if shared else source.shape[0]
    require(
        x.ndim in (2, 3) and x.shape[0] == senders and (x.ndim == 2 or x.shape[1] == k),
        lambda: f"x: expected shape [{senders}, {k}, F] or [{senders}, F], got {list(x.shape)}",
    )
    wide = accumulation_dtype(x.dtype)
    if scale is not None:
        _check_scale(scale, graph, target.shape[0], k)
        scale = scale.to(wide)
    batch = source.contiguous(), source_ptr.contiguous(), target.contiguous(), target_ptr.contiguous()
    by_row, by_column = _weights(graph.stacked, wide, weighted), _weights(graph.stacked_by_column(), wide, weighted)
    stack = (*by_column, *by_row) if transpose else (*by_row, *by_column)
    places, each = target.shape[0], x.shape[-1] * (1 if sum_relations else k)
    return allocating(
        lambda: _relational_sum(x, scale, *batch, *stack, ids, graph.num_nodes, sum_relations, shared),
        places * each * x.element_size(),
        x,
        lambda: f"sums of {each:,} features of {places:,} genes in all samples",
        "lower the number of samples or of genes that receive",
    )


def relational_degree(
    graph: MultiGraph,
    source: Tensor,
    source_ptr: Tensor,
    target: Tensor,
    target_ptr: Tensor,
    *,
    relations: Sequence[str] | None = None,
) -> Tensor:
    """Count, for each receiving gene, its neighbours that send.

    Args:
        graph, source, source_ptr, target, target_ptr, relations: as `relational_spmm` takes them.

    Returns:
        int32 [Vt, K]: the edges of relation r from gene target[t] to genes of its sample's source; edges, not weights.

    Raises:
        ValueError, TypeError: naming the argument.
        MemoryError, torch.OutOfMemoryError: on the CPU, on a GPU: the result does not fit.
        ImportError, NotImplementedError: the extension was not built, or not for the graph's device.
    """
    check_graph(graph)
    ids = _relation_ids(graph, relations)
    _check_between(graph, source, source_ptr, target, target_ptr)
    rowptr, col, _ = graph.stacked
    batch = source.contiguous(), source_ptr.contiguous(), target.contiguous(), target_ptr.contiguous()
    return allocating(
        lambda: torch.ops.cellattn.relational_degree(rowptr, col, *batch, ids, graph.num_nodes),
        4 * target.shape[0] * len(ids),
        target,
        lambda: f"degrees of {target.shape[0]:,} genes in {len(ids)} relations",
        "lower the number of samples or of genes that receive",
    )


def _relation_ids(graph: MultiGraph, relations: Any) -> list[int]:
    """Positions in the stack."""
    if relations is None:
        return list(range(len(graph.relations)))
    if not isinstance(relations, Sequence) or isinstance(relations, str):
        raise TypeError(f"relations: expected a sequence of names, got {describe(relations)}")
    return [graph.relation_id(name) for name in relations]


def _weights(stack: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A stack with its weights in a dtype, or with ones for them."""
    ptr, index, weight = stack
    return ptr, index, as_dtype(weight, dtype) if weighted else torch.ones_like(weight, dtype=dtype)


def _check_between(graph: MultiGraph, source: Any, source_ptr: Any, target: Any, target_ptr: Any) -> None:
    num_sets = None
    pairs = [("source", source, source_ptr), ("target", target, target_ptr)]
    if not torch.compiler.is_compiling() and target is source and target_ptr is source_ptr:
        del pairs[1]  # checked once
    for name, index, ptr in pairs:
        require_sets(name, index, ptr, graph.num_nodes, num_sets=num_sets, ptr_name=f"{name}_ptr", ascending=True)
        if not index.device == ptr.device == graph.device:
            require_same("device", **{"graph": graph.device, name: index.device, f"{name}_ptr": ptr.device})
        num_sets = ptr.numel() - 1


def _check_scale(scale: Any, graph: MultiGraph, num_targets: int, num_relations: int) -> None:
    require_tensor("scale", scale, ndim=2, dtypes=FLOAT_DTYPES)
    require_same("device", graph=graph.device, scale=scale.device)
    require(
        scale.shape[0] == num_targets and scale.shape[1] == num_relations,
        lambda: f"scale: expected shape [{num_targets}, {num_relations}], got {list(scale.shape)}",
    )
    require(not scale.requires_grad, "scale: expected a constant, got a tensor that requires a gradient; detach it")


# ------------------------------------------------------------------------------------------------------- operators


# scale and values of one dtype, float32 or float64; the stack by rows and by columns.
_BETWEEN = (
    "Tensor? scale, Tensor source, Tensor source_ptr, Tensor target, Tensor target_ptr, "
    "Tensor rowptr, Tensor col, Tensor value, Tensor colptr, Tensor row, Tensor value_by_column, "
    "int[] relations, SymInt num_nodes, bool sum_relations, bool shared"
)


@operator("relational_sum", public="relational_spmm", schema=f"(Tensor x, {_BETWEEN}) -> Tensor", device=None, linear=("x",))
def _relational_sum(
    x: Tensor, scale: Tensor | None, source: Tensor, source_ptr: Tensor, target: Tensor, target_ptr: Tensor, *graph: Any
) -> Tensor:
    """out [Vt, (K,) F]"""
    rowptr, col, value, _, _, _, relations, num_nodes, sum_relations, shared = graph
    batch = source, source_ptr, target, target_ptr
    options = relations, num_nodes, shared, sum_relations, False
    scale = None if scale is None else scale.contiguous()
    return torch.ops.cellattn.relational_spmm(rowptr, col, value, x.contiguous(), *batch, None, scale, *options)


@_relational_sum.register_fake
def _(x: Tensor, scale: Tensor | None, source: Tensor, source_ptr: Tensor, target: Tensor, *graph: Any) -> Tensor:
    *_, relations, _, sum_relations, _ = graph
    return _new_like(x, target.shape[0], relations, sum_relations)


# g is of the dtype of x; what else was x's is told by flags, so that it need not be kept.
@operator("relational_sum_backward", schema=f"(Tensor g, {_BETWEEN}, bool per_relation) -> Tensor", device=None)
def _relational_sum_backward(
    g: Tensor, scale: Tensor | None, source: Tensor, source_ptr: Tensor, target: Tensor, target_ptr: Tensor, *graph: Any
) -> Tensor:
    """dx [Vs, (K,) F], or [N, (K,) F] of shared features"""
    _, _, _, colptr, row, value, relations, num_nodes, _, shared, per_relation = graph
    exchanged = target, target_ptr, source, source_ptr
    options = relations, num_nodes, False, not per_relation, shared
    scale = None if scale is None else scale.contiguous()
    return torch.ops.cellattn.relational_spmm(colptr, row, value, g.contiguous(), *exchanged, scale, None, *options)


@_relational_sum_backward.register_fake
def _(g: Tensor, scale: Tensor | None, source: Tensor, *graph: Any) -> Tensor:
    *_, relations, num_nodes, _, shared, per_relation = graph
    return _new_like(g, num_nodes if shared else source.shape[0], relations, not per_relation)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *tensors = inputs[:12]
    keep_missing_grads(ctx)
    ctx.save_for_backward(*tensors)
    ctx.options = *inputs[12:], x.ndim == 3


def _backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = None if g is None else _relational_sum_backward(g, *ctx.saved_tensors, *ctx.options)
    return dx, *(None,) * 15


_relational_sum.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_relational_sum_backward, "relational_spmm")


def _new_like(x: Tensor, places: int, relations: Sequence[int], sum_relations: bool) -> Tensor:
    return x.new_empty((places, x.shape[-1]) if sum_relations else (places, len(relations), x.shape[-1]))


@fake("relational_spmm")
def _(
    rowptr: Tensor, col: Tensor, value: Tensor, x: Tensor, source: Tensor, source_ptr: Tensor, target: Tensor,
    target_ptr: Tensor, source_scale: Tensor | None, target_scale: Tensor | None, relations: Sequence[int], num_nodes: int,
    shared: bool, sum_relations: bool, sum_samples: bool,
) -> Tensor:  # fmt: skip
    return _new_like(x, num_nodes if sum_samples else target.shape[0], relations, sum_relations)


@fake("relational_degree")
def _(
    rowptr: Tensor, col: Tensor, source: Tensor, source_ptr: Tensor, target: Tensor, target_ptr: Tensor,
    relations: Sequence[int], num_nodes: int,
) -> Tensor:  # fmt: skip
    return target.new_empty(target.shape[0], len(relations), dtype=torch.int32)


# ------------------------------------------------------------------------------------------------------------ CUDA


@cuda_kernel("relational_spmm")
def _(*args: Any) -> Tensor:
    from ..kernels import relational_spmm as kernels  # needs Triton

    return kernels.relational_spmm(*args)


@cuda_kernel("relational_degree")
def _(*args: Any) -> Tensor:
    from ..kernels import relational_spmm as kernels

    return kernels.relational_degree(*args)
