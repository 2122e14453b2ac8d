"""Binary cross-entropy between a graph and an attention map, without the map.

Over the valid pairs of row i, with t the target and a the attention entry,

    BCE_i = - sum_j [ t_ij log a_ij + (1 - t_ij) log(1 - a_ij) ]

For the softmax link log a = s - LSE, and log(1 - a) is taken from log a by the branch of log1mexp that is exact for it. With

    d BCE / d log a_ij = - t_ij + (1 - t_ij) a_ij / (1 - a_ij),   a / (1 - a) = 1 / expm1(-log a)

the scores get that value, and LSE_i minus its sum. For the sigmoid link the entry is softplus(s) - t s. Scores are made
row block by row block, or for the edges and the drawn non-edges alone, and made again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import require, require_choice, require_count
from ..graph import MultiGraph
from ._csr import sddmm, spmm, take_rows
from ._operator import keep_missing_grads, operator, refuse_double_backward
from ._rows import check_head, check_rows, reduce_rows, row_constants, row_logsumexp, take
from .attention import accumulation_dtype, resolve_scale
from .sample_rows import check_generator

TARGETS = ("normalized", "binary")
LINKS = ("softmax", "sigmoid")

_MAX_ENTRIES = 2**31 - 1  # edges and drawn non-edges, which the sparse kernels count in int32
_BLOCK = 2**18  # score entries of a row block: a few temporaries of this size stay in a core's cache


def attention_bce(
    q: Tensor,
    k: Tensor,
    graph: MultiGraph,
    relation: str,
    *,
    lse: Tensor | None = None,
    rows: Tensor | None = None,
    num_negatives: int | None = None,
    num_prefix: int = 0,
    scale: float | None = None,
    target: str = "normalized",
    link: str = "softmax",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy, in nats, between a graph's rows and the attention map of one head.

    Args:
        q, k: [..., T, D] with T = num_prefix + N tokens, prefix tokens first; float64, float32, bfloat16 or float16.
        graph, relation: N genes and the relation whose rows are the target.
        lse: [..., T], the natural log-sum-exp of all tokens as `attention` returns it (differentiable), computed here if
            None. The sigmoid link does not read it.
        rows: int64 [R], the genes whose rows are compared (default: all).
        num_negatives: None for every valid non-edge of a row; otherwise that many are drawn a row, uniformly and with
            replacement, each weighted by (valid non-edges / num_negatives), so that the loss is estimated without bias.
        num_prefix: tokens before the genes, such as CLS.
        scale: factor of the scores, 1 / sqrt(D) if None.
        target: "normalized", the row over its sum; or "binary", 1 for an edge.
        link: "softmax", a is the entry of the attention map over all tokens; or "sigmoid", a = sigmoid(s).
        generator: a `torch.Generator` for the negatives.
        reduction: "mean" over the rows with an edge and the leading dimensions, "sum" of all, "none" for [..., R]. A row's
            value is its sum over valid pairs.

    Returns:
        The loss in float32 (float64 for float64 inputs). Pairs with an unknown gene enter neither side; rows without a
        valid edge contribute 0 and are not counted. 1 - a is held at or above the spacing of the dtype, so the loss is finite.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: on double backward.
    """
    check_head(q, k, graph, num_prefix, lse, reduction)
    require_choice("target", target, TARGETS)
    require_choice("link", link, LINKS)
    check_generator(generator)
    relation_id = graph.relation_id(relation)
    genes = check_rows("rows", rows, graph)
    scale = resolve_scale(scale, q.shape[-1])
    total = None
    if link == "softmax":
        known = graph.known(relation)
        total = row_logsumexp(q, k, lse, known, genes, num_prefix=num_prefix, scale=scale, over="tokens")
    inv_mass, _, counted = row_constants(graph, relation, genes, accumulation_dtype(q.dtype))
    if genes is None:
        genes = torch.arange(graph.num_nodes, device=graph.device)
    negatives = None
    if num_negatives is not None:
        require_count("num_negatives", num_negatives, minimum=1)
        most = _MAX_ENTRIES // max(genes.shape[0], 1) - graph.max_degree(relation)
        require(num_negatives <= most, lambda: f"num_negatives: expected at most {most} a row, got {num_negatives}")
        negatives = sample_negatives(graph, relation, genes, num_negatives, generator)
    loss = _bce_rows(
        q, k, total, *graph.stacked, *graph.stacked_by_column(), inv_mass, graph.known(relation), genes, negatives,
        relation_id, num_prefix, scale, target == "normalized",
    )  # fmt: skip
    return reduce_rows(loss, counted, reduction)


def sample_negatives(
    graph: MultiGraph, relation: str, rows: Tensor, num_negatives: int, generator: torch.Generator | None
) -> Tensor:
    """Draw valid non-edges, uniformly with replacement: int64 [R, num_negatives] genes.

    Of a row with the columns c_0 < c_1 < ..., counted among the known genes, the r-th non-edge is r + e with e the number
    of edges that stand before it: the smallest e with c_e - e > r, found by bisection. Rows where every valid pair is an
    edge get entries of no meaning, which their weight 0 removes.
    """
    known = graph.known(relation)
    by_rank = torch.argsort(~known, stable=True)  # known genes first, ascending
    rank = known.cumsum(0) - 1
    degree = graph.degree(relation)[rows]
    first = graph.rowptr(relation)[rows, None]
    num_free = known.sum() - degree
    uniform = torch.empty(rows.shape[0], num_negatives, dtype=torch.float64, device=rows.device)
    wanted = (uniform.uniform_(generator=generator) * num_free[:, None]).long()
    low, high = torch.zeros_like(wanted), degree[:, None].expand_as(wanted)
    col = graph.col(relation)
    for _ in range(graph.max_degree(relation).bit_length()):
        open_ = low < high
        middle = (low + high) // 2
        before = rank[col[(first + middle).clamp_max(col.numel() - 1)].long()] - middle <= wanted
        low = torch.where(open_ & before, middle + 1, low)
        high = torch.where(open_ & ~before, middle, high)
    return by_rank[(wanted + low).clamp_max(graph.num_nodes - 1)]


# ------------------------------------------------------------------------------------------------------- operators

# q, k [..., T, D]; lse [..., R], None for the sigmoid link; the stacked graph by rows and by columns; inv_mass [R], 0 for a
# row without edges; known bool [N]; rows [R] genes; negatives [R, n] genes, None for every valid non-edge.
_PROBLEM = (
    "Tensor q, Tensor k, Tensor? lse, Tensor rowptr, Tensor col, Tensor weight, "
    "Tensor colptr, Tensor row, Tensor weight_by_column, "
    "Tensor inv_mass, Tensor known, Tensor rows, Tensor? negatives, int relation, int num_prefix, float scale, bool normalized"
)


@operator("bce_rows", public="attention_bce", schema=f"({_PROBLEM}) -> Tensor")
def _bce_rows(q: Tensor, k: Tensor, lse: Tensor | None, *problem: Any) -> Tensor:
    """[..., R]"""
    rows, num_prefix, scale = problem[8], problem[11], problem[12]
    queries, keys, totals = _flat(q, k, lse, rows, num_prefix)
    loss = queries.new_zeros(queries.shape[:2])
    for block in _blocks(*problem, dtype=keys.dtype):
        for lead in range(queries.shape[0]):
            s = scale * block.scores(queries[lead], keys[lead])
            total = None if totals is None else block.spread(totals[lead])
            loss[lead, block.rows] = block.sum(_entries(s, total, block.positive, block.negative))
    return loss.reshape(*q.shape[:-2], rows.numel())


@_bce_rows.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor | None, *problem: Any) -> Tensor:
    rows = problem[8]
    return q.new_empty(*q.shape[:-2], rows.shape[0], dtype=accumulation_dtype(q.dtype))


@operator("bce_rows_backward", schema=f"(Tensor dloss, {_PROBLEM}) -> (Tensor, Tensor, Tensor)")
def _bce_rows_backward(dloss: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk [..., T, D], dlse [..., R], empty for the sigmoid link)"""
    rows, num_prefix, scale = problem[8], problem[11], problem[12]
    queries, keys, totals = _flat(q, k, lse, rows, num_prefix)
    dloss = dloss.reshape(queries.shape[:2])
    dqueries, dkeys = torch.zeros_like(queries), torch.zeros_like(keys)
    dlse = torch.zeros_like(dloss) if totals is not None else dloss.new_zeros(0)
    for block in _blocks(*problem, dtype=keys.dtype):
        for lead in range(queries.shape[0]):
            s = scale * block.scores(queries[lead], keys[lead])
            total = None if totals is None else block.spread(totals[lead])
            ds = _entry_grads(s, total, block.positive, block.negative) * block.spread(dloss[lead])
            if totals is not None:
                dlse[lead, block.rows] = -block.sum(ds)
            dqueries[lead, block.rows] = scale * block.times_keys(ds, keys[lead])
            dkeys[lead] += scale * block.times_queries(ds, queries[lead])
    dq = torch.zeros(queries.shape[0], *q.shape[-2:], dtype=queries.dtype)
    dq[:, num_prefix:].index_add_(1, rows, dqueries)
    dk = F.pad(dkeys, (0, 0, num_prefix, 0))
    if totals is not None:
        dlse = dlse.reshape(*q.shape[:-2], rows.numel())
    return dq.reshape(q.shape).to(q.dtype), dk.reshape(k.shape).to(k.dtype), dlse


@_bce_rows_backward.register_fake
def _(dloss: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), dloss.new_empty(dloss.shape if lse is not None else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, relation, num_prefix, scale, normalized = inputs
    keep_missing_grads(ctx)
    ctx.save_for_backward(*tensors)
    ctx.constants = relation, num_prefix, scale, normalized


def _backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 17
    lse = ctx.saved_tensors[2]
    dq, dk, dlse = _bce_rows_backward(dloss, *ctx.saved_tensors, *ctx.constants)
    return dq, dk, None if lse is None else dlse, *(None,) * 14


_bce_rows.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_bce_rows_backward, "attention_bce")

# ------------------------------------------------------------------------------------------------------------ CUDA


@_bce_rows.register_kernel("cuda")
def _(*arguments: Any) -> Tensor:
    from ..kernels import attention_bce as kernels

    return kernels.bce_rows(*arguments)


@_bce_rows_backward.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import attention_bce as kernels

    return kernels.bce_rows_backward(*arguments)


# ------------------------------------------------------------------------------------------------------------- CPU


def _entries(s: Tensor, total: Tensor | None, positive: Tensor, negative: Tensor) -> Tensor:
    """-(positive log a + negative log(1 - a)); `total` is the log-sum-exp of the row, None for the sigmoid link."""
    if total is None:
        return (positive + negative) * F.softplus(s) - positive * s
    log_a = _log_a(s, total)
    # log(1 - e^x): this branch keeps the digits of a near 0, the other those of 1 - a near 0, of which a row has at most one.
    log_1ma = torch.log1p(-log_a.exp())
    near_one = log_a > -0.6931
    log_1ma[near_one] = (-torch.expm1(log_a[near_one])).log()
    return -(positive * log_a + negative * log_1ma)


def _entry_grads(s: Tensor, total: Tensor | None, positive: Tensor, negative: Tensor) -> Tensor:
    """Derivative of `_entries` by s; that by `total` is its negative."""
    if total is None:
        return (positive + negative) * s.sigmoid() - positive
    return negative / torch.expm1(-_log_a(s, total)) - positive


def _log_a(s: Tensor, total: Tensor) -> Tensor:
    """Rounding may lift s - LSE to 0 and above; the largest a below 1 keeps log(1 - a) finite."""
    return (s - total).clamp_max(-torch.finfo(s.dtype).eps)


def _flat(q: Tensor, k: Tensor, lse: Tensor | None, rows: Tensor, num_prefix: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(queries [L, R, D], keys [L, N, D], log-sum-exps [L, R]) in the dtype of the arithmetic."""
    dtype = accumulation_dtype(q.dtype)
    queries = take(q, -2, rows, num_prefix).to(dtype)
    keys = take(k, -2, None, num_prefix).to(dtype)
    num_leading = q.shape[:-2].numel()
    totals = None if lse is None else lse.reshape(num_leading, rows.numel())
    queries, keys = (x.reshape(num_leading, *x.shape[-2:]) for x in (queries, keys))
    return queries, keys, totals


def _blocks(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    colptr: Tensor,
    row: Tensor,
    weight_by_column: Tensor,
    inv_mass: Tensor,
    known: Tensor,
    rows: Tensor,
    negatives: Tensor | None,
    relation: int,
    num_prefix: int,
    scale: float,
    normalized: bool,
    *,
    dtype: torch.dtype,
) -> Iterator[_DenseRows | _SparseRows]:
    """The entries of the loss with their targets: row blocks against all genes, or edges and drawn non-edges at once."""
    n = known.numel()
    filled = (inv_mass > 0).nonzero()[:, 0]  # rows without an edge contribute nothing
    for here in [filled] if negatives is not None else filled.split(max(1, _BLOCK // n)):
        ptr, entry = take_rows(rowptr, relation * n + rows[here])
        local = torch.arange(ptr.numel() - 1).repeat_interleave(ptr.diff())
        t = weight[entry].to(dtype) * inv_mass[here][local] if normalized else torch.ones(entry.numel(), dtype=dtype)
        if negatives is None:
            positive = torch.zeros(ptr.numel() - 1, n, dtype=dtype)
            positive[local, col[entry].long()] = t
            yield _DenseRows(here, positive, known.to(dtype) - positive)
        else:
            yield _sparse_rows(here, ptr, local, col[entry], t, negatives[here], known)


class _DenseRows(NamedTuple):
    """A block of rows against every gene: entries [b, N]."""

    rows: Tensor  # positions [b] among the chosen rows
    positive: Tensor  # t, 0 for non-edges
    negative: Tensor  # 1 - t for valid pairs, 0 for others

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        return queries[self.rows] @ keys.mT

    def spread(self, x: Tensor) -> Tensor:
        return x[self.rows, None]

    def sum(self, entries: Tensor) -> Tensor:
        return entries.sum(1)

    def times_keys(self, ds: Tensor, keys: Tensor) -> Tensor:
        return ds @ keys

    def times_queries(self, ds: Tensor, queries: Tensor) -> Tensor:
        return ds.mT @ queries[self.rows]


class _SparseRows(NamedTuple):
    """The edges and the drawn non-edges of all rows: entries [E], a CSR matrix and its transpose."""

    rows: Tensor
    positive: Tensor
    negative: Tensor
    ptr: Tensor
    col: Tensor
    colptr: Tensor
    row: Tensor
    order: Tensor  # entries by column

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        return sddmm(self.ptr, self.col, queries[self.rows], keys)

    def spread(self, x: Tensor) -> Tensor:
        return x[self.rows].repeat_interleave(self.ptr.diff())

    def sum(self, entries: Tensor) -> Tensor:
        return torch.segment_reduce(entries, "sum", offsets=self.ptr, initial=0)

    def times_keys(self, ds: Tensor, keys: Tensor) -> Tensor:
        return spmm(self.ptr, self.col, ds, keys.shape[0], keys)

    def times_queries(self, ds: Tensor, queries: Tensor) -> Tensor:
        return spmm(self.colptr, self.row, ds[self.order], self.rows.numel(), queries[self.rows])


def _sparse_rows(
    here: Tensor, ptr: Tensor, local: Tensor, col: Tensor, t: Tensor, negatives: Tensor, known: Tensor
) -> _SparseRows:
    num_rows, n = negatives.shape
    degree = ptr.diff()
    # Entry e of row r moves to e + r * n: each row's edges are followed by its n drawn non-edges.
    edge_at = torch.arange(local.numel()) + local * n
    drawn_at = (ptr[1:] + torch.arange(num_rows) * n)[:, None] + torch.arange(n)
    total = local.numel() + negatives.numel()
    all_col = torch.empty(total, dtype=col.dtype)
    all_col[edge_at], all_col[drawn_at] = col, negatives.to(col.dtype)
    positive, negative = t.new_zeros(total), t.new_zeros(total)
    positive[edge_at], negative[edge_at] = t, 1 - t
    free = known.sum() - degree
    negative[drawn_at] = (free.to(t.dtype) / n)[:, None].expand(-1, n)
    all_ptr = ptr + torch.arange(num_rows + 1) * n
    order = torch.argsort(all_col, stable=True)
    colptr = torch.zeros(known.numel() + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(all_col, minlength=known.numel()), 0, out=colptr[1:])
    row = torch.arange(num_rows, dtype=col.dtype).repeat_interleave(all_ptr.diff())[order]
    return _SparseRows(here, positive, negative, all_ptr, all_col, colptr, row, order)
