"""Attention along the edges of graphs: a head of hard masks, which scores and sums nothing but the pairs that it sees.

The entries e = (i, j) of row i are the prefix tokens, itself, and its neighbours in the relations of its head. With the scores
s_e = scale * q_i . k_j (+ log w_ij) (+ b_t of the tie t of e), LSE_i = log sum_e exp(s_e) and P_e = exp(s_e - LSE_i),

    out_i = sum_e Z_e P_e v_j
    dV_j  = sum_e Z_e P_e dOut_i ,   dS_e = P_e (Z_e dOut_i . v_j - D_i + dLSE_i) ,   D_i = dOut_i . out_i
    dQ_i  = scale sum_e dS_e k_j ,   dK_j = scale sum_e dS_e q_i ,   db_t = sum of dS_e over the entries of t

where Z_e is 1, or with dropout 0 or 1 / (1 - p), a function of the draw, the head, the tokens i and j and the copy of the pair
(`_dropout`): entries of prefix tokens and of a gene itself are copy 0, as those of the rows of prefix tokens, and the edges of
tie t of `heads` are copy 1 + t.

dQ and db go by rows, dK and dV by columns over the transposed graph: gathers, in a fixed order, no scatter. Scores are made
again rather than kept. Rows of prefix tokens see everything: they are `attention`.

On a CPU a head of one relation of 512 genes or more and a fifth of all pairs or more, without weights or a bias, is made in
blocks of the map with a bit a pair, which costs what attention without a mask does. On a GPU the edges of any are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._aligned import aligned_features, first_features
from .._check import require, require_same, require_tensor
from .._extension import fake, require_extension
from ..graph import MultiGraph
from ._dropout import draw_dropout, threshold_of
from ._operator import keep_missing_grads, operator, refuse_double_backward
from ._rows import check_graph
from .attention import (
    _attention,
    accumulation_dtype,
    checked_heads,
    refuse_habits,
    score_dtype,
    with_scale,
)  # fmt: skip
from .graph_attention import check_ties


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: MultiGraph,
    heads: Sequence[tuple[str, int]],
    *,
    num_prefix: int = 1,
    self_loops: bool = True,
    weighted: bool = False,
    edge_bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0,  # no 0.0: compiled with dynamic shapes, a float of a default is traced as an input
    generator: torch.Generator | None = None,
    attn_mask: None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which a gene sees its neighbours alone, in O(edges d) time and memory.

    Args:
        q, k, v: [..., H, T, D] (v [..., H, T, Dv]) with T = num_prefix + N tokens, prefix tokens first; float32, bfloat16,
            float16, or float64 on the CPU.
        graph: N genes.
        heads: (relation, head) pairs, each of the H heads in one of them at least. Gene i of a head sees the prefix tokens,
            itself where `self_loops`, and each j with an edge (i, j) in a relation of the head. An edge in two of them is two
            entries, and so is a self-loop of a relation beside `self_loops`. Prefix tokens see everything, once.
        num_prefix: tokens before the genes, such as CLS.
        self_loops: whether each gene sees itself.
        weighted: whether the score of an edge gains log w_ij: its exponential is multiplied by the weight.
        edge_bias: [len(heads)], in the dtype of q or float32, differentiable: what the scores of each pair's edges gain.
        scale: factor of the scores, 1 / sqrt(D) if None.
        dropout_p: see `attention`: a probability that an entry is 0 in `out`, the others divided by 1 - dropout_p, and lse that
            of the whole map. An edge in two relations is two entries, dropped independently. Which entries stay depends on the
            draw, the head, the two tokens and the place of the pair in `heads` alone.
        generator: of that draw, see `attention`.
        attn_mask, is_causal, enable_gqa: see `attention`.

    Returns:
        out [..., H, T, Dv] in the dtype of q, and lse [..., H, T], the natural log of the softmax denominators, in float32
        (float64 for float64 inputs). A row that sees nothing (no prefix, no self-loop, no edge) is 0, its lse -inf. Both are
        differentiable and equal from run to run. Of large scores they are, and their gradients, what `attention` says.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: on double backward. ImportError: on a CPU without the compiled extension.
    """
    refuse_habits(attn_mask, is_causal, enable_gqa)
    q, k, v = checked_heads(q, k, v, same_tokens=True)
    require(q.ndim >= 3, lambda: f"q: expected shape [..., heads, tokens, head_dim], got {list(q.shape)}")
    num_prefix = check_graph(graph, q, num_prefix)
    num_heads = q.shape[-3]
    ties = check_ties(heads, graph, num_heads, "heads")
    missing = sorted(set(range(num_heads)) - {head for _, head in ties})
    require(not missing, lambda: f"heads: expected each of the {num_heads} heads once at least, got none of {missing}")
    for name, flag in (("self_loops", self_loops), ("weighted", weighted)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__} {flag!r}")
    dtype = accumulation_dtype(q.dtype)
    bias = None
    if edge_bias is not None:
        require_tensor("edge_bias", edge_bias, ndim=1, dtypes={q.dtype, dtype})
        require_same("device", q=q.device, edge_bias=edge_bias.device)
        got = edge_bias.shape[0]
        require(got == len(ties), lambda: f"edge_bias: expected shape [{len(ties)}], a number a pair of heads, got [{got}]")
        bias = edge_bias.to(dtype).contiguous()
    if q.device.type == "cpu":
        require_extension(q.device)
    threshold = threshold_of(dropout_p)
    draw = draw_dropout(threshold, generator, q.device)
    dim_v = v.shape[-1]
    q, scale = with_scale(q, scale)
    q, k, v = (aligned_features(x) for x in (q, k, v))
    by_row, by_column = graph.stacked, graph.stacked_by_column()
    logs = (by_row[2].to(dtype).log(), by_column[2].to(dtype).log()) if weighted else (None, None)
    cut_rows, cut_columns = graph.segments
    out, lse = _edge_attention(
        q[..., num_prefix:, :], k, v, bias, *by_row[:2], logs[0], *by_column[:2], logs[1], *cut_rows, *cut_columns,
        [graph.relation_id(relation) for relation, _ in ties], [head for _, head in ties], num_prefix, self_loops, scale,
        draw, threshold,
    )  # fmt: skip
    if num_prefix > 0:
        prefix_out, prefix_lse = _attention(q[..., :num_prefix, :], k, v, None, scale, draw, threshold)
        out, lse = torch.cat([prefix_out, out], -2), torch.cat([prefix_lse, lse], -1)
    return first_features(out, dim_v), lse


# ------------------------------------------------------------------------------------------------------- operators


# q [..., H, N, D]; k, v [..., H, P + N, D]; the stacked graph by rows and by columns, with logs of its weights, and where its
# long rows and columns are cut, which the CPU does not read; of each tie its relation and head.
_GRAPH = (
    "Tensor rowptr, Tensor col, Tensor? log_weight, Tensor colptr, Tensor row, Tensor? log_weight_by_column, "
    "Tensor row_segptr, Tensor segment_row, int[] row_segments, Tensor col_segptr, Tensor segment_col, int[] col_segments"
)
_TIES = "int[] relations, int[] heads, int num_prefix, bool self_loops, float scale, Tensor? draw, int threshold"


@operator(
    "edge_attention",
    leading=("q", "k", "v"),
    by_place=("draw",),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? edge_bias, {_GRAPH}, {_TIES}) -> (Tensor, Tensor)",
)
def _edge_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = score_dtype(q, k, rest[16], bias)
    queries, keys, values = (_flat(x, dtype) for x in (q, k, v))
    out, lse = _edge_rows(queries, keys, values, bias, rest)
    return out.to(q.dtype).view(*q.shape[:-1], v.shape[-1]), lse.to(accumulation_dtype(q.dtype)).view(q.shape[:-1])


@_edge_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


@operator(
    "edge_attention_backward",
    leading=("dout", "dlse", "out", "lse", "q", "k", "v"),
    by_place=("draw",),
    schema=f"(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor? edge_bias, {_GRAPH}, "
    f"{_TIES}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _edge_attention_backward(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, and of the bias one a leading dimension and gene: [..., N, ties]."""
    dtype = score_dtype(q, k, rest[16], bias)
    if dout is None:  # the log-sum-exp is of the whole map
        rest = (*rest[:17], None, 0)
    above = torch.zeros_like(out) if dout is None else dout
    above, out, queries, keys, values = (_flat(x, dtype) for x in (above, out, q, k, v))
    if dtype == lse.dtype:
        lse = lse.reshape(out.shape[:-1])
    else:  # what float32 kept of them is not of these scores
        out, lse = _edge_rows(queries, keys, values, bias, rest)
    delta = (above * out).sum(-1)
    if dlse is not None:
        delta = delta - dlse.reshape(delta.shape)
    lse = lse.masked_fill(lse.isinf(), torch.nan).contiguous()  # all of such a row is NaN
    (rowptr, col, log_weight, colptr, row, log_weight_by_column), ties = rest[:6], rest[12:]
    bias, log_weight, log_weight_by_column = _each_in(dtype, bias, log_weight, log_weight_by_column)
    grads = torch.ops.cellattn.edge_rows_backward(
        above, delta, lse, queries, keys, values, bias, rowptr, col, log_weight, colptr, row, log_weight_by_column, *ties
    )
    dq, dk, dv = (dx.to(x.dtype).view(x.shape) for dx, x in zip(grads[:3], (q, k, v), strict=True))
    if dout is None:
        dv = torch.zeros_like(dv)
    dbias = grads[3].to(accumulation_dtype(q.dtype))
    return dq, dk, dv, dbias.view(*q.shape[:-3], *dbias.shape[1:])


@_edge_attention_backward.register_fake
def _(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    heads = rest[13]
    dbias = lse.new_empty(*q.shape[:-3], q.shape[-2], 0 if bias is None else len(heads))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    keep_missing_grads(ctx)
    row_segments, col_segments = inputs[12], inputs[15]
    *ties, draw, threshold = inputs[16:]
    ctx.save_for_backward(*output, *inputs[:12], *inputs[13:15], draw)
    ctx.segments, ctx.ties, ctx.threshold = (row_segments, col_segments), ties, threshold


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 23
    *tensors, col_segptr, segment_col, draw = ctx.saved_tensors
    row_segments, col_segments = ctx.segments
    dq, dk, dv, dbias = _edge_attention_backward(
        dout, dlse, *tensors, row_segments, col_segptr, segment_col, col_segments, *ctx.ties, draw, ctx.threshold
    )
    bias = tensors[5]
    return dq, dk, dv, None if bias is None else dbias.sum(list(range(dbias.ndim - 1))), *(None,) * 19


_edge_attention.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_edge_attention_backward, "edge_attention")

# ------------------------------------------------------------------------------------------------------------ CUDA


@_edge_attention.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import edge_attention as kernels  # needs Triton

    return kernels.edge_attention(*args)


@_edge_attention_backward.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import edge_attention as kernels

    return kernels.edge_attention_backward(*args)


# ------------------------------------------------------------------------------------------------------------- CPU


@fake("edge_rows")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])


@fake("edge_rows_backward")
def _(
    dout: Tensor, delta: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, edge_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = rest[7]
    dbias = q.new_empty(q.shape[0], q.shape[2], 0 if edge_bias is None else len(heads))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


def _edge_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rest: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of q, k, v [B, H, n, d] in their dtype; `rest` as the operator has it."""
    (rowptr, col, log_weight), ties = rest[:3], rest[12:]
    bias, log_weight = _each_in(q.dtype, bias, log_weight)
    return torch.ops.cellattn.edge_rows(q, k, v, bias, rowptr, col, log_weight, *ties)


def _each_in(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype).contiguous() for x in tensors]


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., H, n, d] -> [B, H, n, d], contiguous."""
    return x.to(dtype).reshape(x.shape[:-3].numel(), *x.shape[-3:]).contiguous()
