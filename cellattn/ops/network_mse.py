"""Weighted squared error between a low-rank reconstruction of a network and the network itself, over all pairs, in O(E + N D).

With the reconstruction d_ij = z_i . w_j + b_j of A, and pairs without an edge weighted lambda, the loss of row i is

    L_i = sum_{j in E_i} (d_ij - A_ij)^2 + lambda sum_{j not in E_i} d_ij^2

The zeros are all pairs but the edges, and all pairs are a quadratic form: with y_i = [z_i ‖ 1] and u_j = [w_j ‖ b_j],

    sum_j d_ij^2 = y_i' G y_i ,  G = sum_j u_j u_j'
    L_i = lambda y_i' G y_i + sum_{j in E_i} [(d_ij - A_ij)^2 - lambda d_ij^2]

O(N D^2) and O(E D) instead of O(N^2 D). With g_i the gradient of L_i and c_ij = 2 g_i [(1 - lambda) d_ij - A_ij] on the edges,

    dy_i = 2 lambda g_i G y_i + sum_j c_ij u_j
    du_j = 2 lambda H u_j + sum_i c_ij y_i ,  H = sum_i g_i y_i y_i'

where the sums over edges are gathers along the rows of A and of its transpose.

Rounding. The two terms cancel where the fit is good, so G, H, both quadratic forms and the sum over a row's edges are taken in
float64, on copies of z and w and one number an edge. What is left is the rounding of d_ij on the edges, which are products in
the accumulation dtype: an error e_ij there is one of 2 [(1 - lambda) d_ij - A_ij] e_ij in the loss. So the error is relative to
the size of the edges, however many zeros there are: about eps sqrt(D) sum_E |(1 - lambda) d_ij - A_ij| |d_ij| at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import FLOAT_DTYPES, number_of, require, require_choice, require_same, require_tensor
from ..graph import MultiGraph
from ._csr import block_diagonal, both_ways
from ._operator import keep_missing_grads, operator, refuse_double_backward
from ._rows import REDUCTIONS, check_rows
from ._sets import check_graph
from .attention import accumulation_dtype


def network_mse(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    graph: MultiGraph,
    relation: str,
    *,
    zero_weight: float = 0.1,
    rows: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Weighted squared error of z_i . weight_j + bias_j as a reconstruction of a network, over all pairs, with nothing N x N.

    Args:
        z: [N, D], one embedding a gene; float64, float32, bfloat16 or float16.
        weight, bias: [N, D] and [N], the decoder: that of `torch.nn.Linear(D, N)`.
        graph: N genes; the target of a pair is the weight of its edge, 0 where there is none.
        relation: its name.
        zero_weight: lambda, at least 0: what a pair without an edge counts, where one with an edge counts 1.
        rows: int64 [R], the genes whose rows are compared (default: all). A few cost about what all do, since no row costs
            more than its edges.
        reduction: "mean" over the valid pairs of the rows, "sum" over them, "none" for the sum of each row, [R].

    Returns:
        The loss in float32 (float64 for float64 inputs). Pairs with a gene that is unknown in the relation are not valid, nor
        are those of other node types than it joins: they contribute 0 and are not counted. Differentiable in z, weight and
        bias; equal from run to run. What is NaN gives NaN to the rows that read it, and what is infinite NaN or infinity, in
        loss and gradients alike: the sums over all pairs that no pair is made for have terms of both signs.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: on double backward.
        ImportError, NotImplementedError: the extension was not built, or not for the graph's device.

    The decoder and the weighting are those of DANGO (Zhang et al. 2020).
    """
    check_graph(graph)
    r = graph.relation_id(relation)
    n = graph.num_nodes
    require_tensor("z", z, ndim=2, dtypes=FLOAT_DTYPES)
    require(z.shape[0] == n and z.shape[1] >= 1, lambda: f"z: expected shape [{n}, D], got {list(z.shape)}")
    for name, x, shape in (("weight", weight, z.shape), ("bias", bias, z.shape[:1])):
        require_tensor(name, x, dtypes=FLOAT_DTYPES)
        require_same("dtype", z=z.dtype, **{name: x.dtype})
        require(x.shape == shape, lambda: f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    require_same("device", graph=graph.device, z=z.device, weight=weight.device, bias=bias.device)
    zero_weight = _zero_weight_of(zero_weight)
    genes = check_rows("rows", rows, graph)
    require_choice("reduction", reduction, REDUCTIONS)

    known = graph.known_rows(relation), graph.known_columns(relation)
    target = graph.weight(relation).to(accumulation_dtype(z.dtype))
    if genes is not None:  # other rows may hold anything
        z = _alone(z, genes)
    loss = _network_mse(
        z[None], weight[None], bias[None], target, *(x[None] for x in known), *both_ways(graph, r), [float(zero_weight)]
    )[0][0]  # fmt: skip
    rows_known = known[0]
    if genes is not None:
        loss, rows_known = _chosen(loss, genes), rows_known[genes]
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (rows_known.sum() * known[1].sum()).clamp_min(1)
    return loss.to(target.dtype)


def network_mses(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    graph: MultiGraph,
    relations: Sequence[str],
    *,
    zero_weight: Sequence[float],
    rows: Sequence[Tensor] | None = None,
) -> Tensor:
    """`network_mse` of K networks, [K] means: z, weight [K, N, D] and bias [K, N], zero weights and rows one a network.

    All at once, in as many launches as one takes, about; on a CPU one after another, each of which its cache holds.
    """
    if z.device.type != "cpu":
        return _at_once(z, weight, bias, graph, relations, zero_weight, rows)
    losses = [
        network_mse(
            z[i], weight[i], bias[i], graph, relation, zero_weight=zero_weight[i], rows=None if rows is None else rows[i]
        )
        for i, relation in enumerate(relations)
    ]  # fmt: skip
    return torch.stack(losses)


def _at_once(
    z: Tensor, weight: Tensor, bias: Tensor, graph: MultiGraph, relations: Sequence[str], zero_weight: Sequence[float],
    rows: Sequence[Tensor] | None,
) -> Tensor:  # fmt: skip
    n = graph.num_nodes
    known_rows = torch.stack([graph.known_rows(relation) for relation in relations])
    known_columns = torch.stack([graph.known_columns(relation) for relation in relations])
    target = torch.cat([graph.weight(relation) for relation in relations]).to(accumulation_dtype(z.dtype))
    problem = target, known_rows, known_columns, *block_diagonal(graph, relations), list(zero_weight)
    if rows is None:
        total = _network_mse(z, weight, bias, *problem)[0].sum(1)
        num_rows = known_rows.sum(1)
    else:
        genes = torch.cat([r * n + chosen for r, chosen in enumerate(rows)])
        sizes = [chosen.shape[0] for chosen in rows]
        loss, _ = _network_mse(_alone(z.flatten(0, 1), genes).view(z.shape), weight, bias, *problem)
        total, num_rows = (
            torch.stack([part.sum() for part in x.split(sizes)])
            for x in (_chosen(loss.flatten(), genes), known_rows.flatten()[genes])
        )
    return (total / (num_rows * known_columns.sum(1)).clamp_min(1)).to(target.dtype)


def _alone(z: Tensor, genes: Tensor) -> Tensor:
    """z [n, D] with zeros in all other rows."""
    others = torch.ones(z.shape[0], 1, dtype=torch.bool, device=z.device).index_fill(0, genes, False)
    return z.masked_fill(others, 0)


def _chosen(loss: Tensor, genes: Tensor) -> Tensor:
    """loss [n] of some rows; embedding: its backward adds the gradients of a gene that stands twice in a fixed order."""
    return F.embedding(genes, loss[:, None])[:, 0]


def _zero_weight_of(value: Any) -> float:
    number = number_of("zero_weight", value)
    require(torch.compiler.is_compiling() or number >= 0, lambda: f"zero_weight: expected at least 0, got {value}")
    return number


# ------------------------------------------------------------------------------------------------------- operators


# z, weight [K, N, D]; bias [K, N]; target [E], in the accumulation dtype; known rows and columns, bool [K, N]; the networks as
# one matrix of K blocks by rows and by columns, entry p by columns being CSR entry edge[p]; a zero weight a network.
_PROBLEM = (
    "Tensor z, Tensor weight, Tensor bias, Tensor target, Tensor known_rows, Tensor known_columns, "
    "Tensor rowptr, Tensor col, Tensor colptr, Tensor row, Tensor edge, float[] zero_weight"
)


@operator("network_mse", schema=f"({_PROBLEM}) -> (Tensor, Tensor)", device=None)
def _network_mse(z: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(L [K, N], 0 for unknown genes, in float64: a mean of what float32 does not hold may be one that it does; d [E])"""
    known_rows, known_columns, rowptr, col, _, _, _, zero_weight = rest
    x, w = z.reshape(1, -1, z.shape[-1]).contiguous(), weight.flatten(0, 1).contiguous()
    d = torch.ops.cellattn.masked_sddmm(rowptr, col, x, w, _all(w), 1)
    d += bias.flatten().index_select(0, col)
    y, u = _augmented(z, None, known_rows), _augmented(weight, bias, known_columns)
    every_pair = (y @ (u.mT @ u)).mul_(y).sum(-1)
    # (d - a)^2 - lambda d^2 = d ((1 - lambda) d - 2 a) + a^2
    d_64, a_64 = d.double(), target.double()
    zeros, edge_weight = _zero_weights(zero_weight, every_pair, rowptr, col, d_64.dtype)
    edges = d_64.mul(edge_weight).sub_(a_64, alpha=2).mul_(d_64).addcmul_(a_64, a_64)
    loss = zeros * every_pair + torch.segment_reduce(edges, "sum", offsets=rowptr, initial=0).view(known_rows.shape)
    return loss, d


@_network_mse.register_fake
def _(z: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return target.new_empty(z.shape[:2], dtype=torch.float64), torch.empty_like(target)


@operator("network_mse_backward", schema=f"(Tensor g, Tensor d, {_PROBLEM}) -> (Tensor, Tensor, Tensor)", device=None)
def _network_mse_backward(
    g: Tensor, d: Tensor, z: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    known_rows, known_columns, rowptr, col, colptr, row, edge, zero_weight = rest
    g = torch.where(known_rows, 2 * g, 0)
    zeros, edge_weight = _zero_weights(zero_weight, g, rowptr, col, d.dtype)
    c = d.mul(edge_weight).sub_(target).mul_(g.flatten().repeat_interleave(rowptr.diff(), output_size=col.shape[0]))
    c_t = c.index_select(0, edge)  # as the columns have them
    x, w = (a.to(c.dtype).flatten(0, 1).contiguous() for a in (z, weight))
    scale = _scale(c, x, w)
    dz = torch.ops.cellattn.masked_spmm(rowptr, col, c / scale, w, _all(w), 1, False)[0].view(z.shape) * scale
    dw = torch.ops.cellattn.masked_spmm(colptr, row, c_t / scale, x, _all(x), 1, False)[0].view(weight.shape) * scale
    db = torch.segment_reduce(c_t.double(), "sum", offsets=colptr, initial=0).view(bias.shape)
    y, u = _augmented(z, None, known_rows), _augmented(weight, bias, known_columns)
    gy = (zeros * g)[..., None] * y
    du = u @ (gy.mT @ y)
    dz += (gy @ (u.mT @ u))[..., :-1]
    dw += du[..., :-1]
    db += du[..., -1]
    return dz.to(z.dtype), dw.to(z.dtype), db.to(z.dtype)


def _scale(c: Tensor, x: Tensor, w: Tensor) -> Tensor | float:
    """The least power of two with which no sum of c / scale times x or w is infinite in their dtype; at least 1.

    A sum of products that are infinite may be NaN where signs differ, as the processor adds them. Where an entry is infinite
    or NaN: 1.
    """
    if c.numel() == 0:
        return 1.0
    of_c, of_x, of_w = (torch.linalg.vector_norm(y, torch.inf) for y in (c, x, w))
    exponent = of_c.log2() + torch.maximum(of_x, of_w).log2()
    most = math.frexp(torch.finfo(c.dtype).max)[1] - 1
    return exponent.add_(c.numel().bit_length() - most).ceil_().nan_to_num_(0, 0, 0).clamp_(0, most).exp2_()


@_network_mse_backward.register_fake
def _(g: Tensor, d: Tensor, z: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(weight.shape), z.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, zero_weight = inputs
    keep_missing_grads(ctx)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)
    ctx.options = (zero_weight,)


def _backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 12
    return *_network_mse_backward(g, *ctx.saved_tensors, *ctx.options), *(None,) * 9


_network_mse.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_network_mse_backward, "network_mse")


def _zero_weights(values: list[float], rows: Tensor, rowptr: Tensor, col: Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    """Lambda of rows [K, N], in their dtype, and 1 - lambda of edges [E], in `dtype`: one number each where all are the same,
    else [K, 1] and [E].
    """
    if len(set(values)) == 1:
        return values[0], 1 - values[0]
    each = rows.new_empty(len(values), 1)
    for one, value in zip(each, values, strict=True):  # no copy from the host, which a CUDA graph could not capture
        one.fill_(value)
    per_row = each.expand_as(rows).flatten()
    return each, (1 - per_row).to(dtype).repeat_interleave(rowptr.diff(), output_size=col.shape[0])


def _augmented(x: Tensor, last: Tensor | None, known: Tensor) -> Tensor:
    """float64 [K, N, D + 1]: x with `last` (None: ones) as one more column, zeros for unknown genes."""
    out = torch.ones(*x.shape[:-1], x.shape[-1] + 1, dtype=torch.float64, device=x.device)
    out[..., :-1] = x
    if last is not None:
        out[..., -1] = last
    return out.masked_fill_(~known[..., None], 0)


def _all(like: Tensor) -> Tensor:
    """int64 [n, 1], the mask of one sample that keeps every gene."""
    return torch.ones(like.shape[0], 1, dtype=torch.int64, device=like.device)
