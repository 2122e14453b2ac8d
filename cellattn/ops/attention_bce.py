"""Binary cross-entropy between a graph and an attention map, without the map.

Over the valid pairs of row i, with t the target and a the attention entry,

    BCE_i = - sum_j [ t_ij log a_ij + (1 - t_ij) log(1 - a_ij) ]

For the softmax link log a = s - LSE. Where a is not near 1, log1p(-a) is log(1 - a), and with

    d BCE / d log a_ij = - t_ij + (1 - t_ij) a_ij / (1 - a_ij)

the scores get that value, and LSE_i minus its sum. Near 1 the LSE, in which there is little to see but the entry itself, does
not say what 1 - a is. A row has one entry above 2/3 at most: its *sharp* entry j. With rest the log-sum-exp of all others,
exact at any gap,

    -log(1 - a_ij) = softplus(s_ij - rest_i) ,   -log a_ij = softplus(rest_i - s_ij) ,
    d BCE / d s_ij = pull_i = (1 - t_ij) sigmoid(s_ij - rest_i) - t_ij sigmoid(rest_i - s_ij)

and every other token k gets -pull_i exp(s_ik - rest_i): none of it goes through LSE. Which token is sharp, rest and pull are
found once, in the forward, and kept: the backward makes scores again, rounded in other orders, and compares indices alone.

For the sigmoid link the entry is t softplus(-s) + (1 - t) softplus(s), whose terms do not cancel. Scores are made row block by
row block, or for the edges and the drawn non-edges alone, and made again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._check import count_of, number_of, require, require_choice
from .._extension import fake, require_extension
from ..graph import MultiGraph
from ._bernoulli import SHARP, cross_entropy, cross_entropy_slope, weighted
from ._csr import sddmm, spmm, take_rows
from ._dense import dense_bce, is_small
from ._negatives import sample_negatives, sample_negatives_of_graph
from ._operator import keep_missing_grads, operator, refuse_double_backward
from ._rows import check_head, check_rows, reduced, row_logsumexp, take
from .attention import accumulation_dtype, rounding_of, unrounded, with_scale
from .sample_rows import check_generator

TARGETS = ("normalized", "binary")
LINKS = ("softmax", "sigmoid")

_MAX_ENTRIES = 2**31 - 1  # edges and drawn non-edges, which the sparse kernels count in int32
_BLOCK = 2**18  # score entries of a row block: it stays in a core's cache, and is large enough for a product


def attention_bce(
    q: Tensor,
    k: Tensor,
    graph: MultiGraph,
    relation: str,
    *,
    lse: Tensor | None = None,
    rows: Tensor | None = None,
    num_negatives: int | None = None,
    neg_sample_ratio: float | None = None,
    num_prefix: int = 0,
    scale: float | None = None,
    target: str = "normalized",
    link: str = "softmax",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy, in nats, between a graph's rows and the attention map of one head.

    Args:
        q, k: [..., T, D], T = num_prefix + N tokens, prefix tokens first; float32, bfloat16, float16, or float64 on the CPU.
        graph, relation: N genes, or tokens of several types, and the relation whose rows are the target.
        lse: [..., T], the natural log-sum-exp of all tokens as `attention` returns it (differentiable), computed here if
            None. The sigmoid link does not read it; of a row's entry above 2/3, where LSE hides what is left, the denominator
            is made of q and k.
        rows: int64 [R], the genes whose rows are compared (default: all).
        num_negatives: None for every valid non-edge of a row; otherwise that many are drawn a row, uniformly and with
            replacement, each weighted by (valid non-edges / num_negatives), so that the loss is estimated without bias.
        neg_sample_ratio: the negatives of SuperGAT (Kim & Oh 2021) in the place of num_negatives: int(ratio * edges) are drawn
            for the whole graph, uniformly among the valid non-edges of rows with an edge and with replacement, each of weight
            1. Then "mean" is over the samples, edges and negatives, and `rows` has to be None.
        num_prefix: tokens before the genes, such as CLS.
        scale: factor of the scores, 1 / sqrt(D) if None.
        target: "normalized", the row over its sum; or "binary", 1 for an edge.
        link: "softmax", a is the entry of the attention map over all tokens; or "sigmoid", a = sigmoid(s).
        generator: a `torch.Generator` for the negatives. Activation checkpointing draws the same again (see `sample_rows`).
        reduction: "mean" over the rows with an edge and the leading dimensions, "sum" of all, "none" for [..., R]. A row's
            value is its sum over valid pairs.

    Returns:
        The loss in float32 (float64 for float64 inputs). Pairs with an unknown gene enter neither side, nor do those of other
        node types than the relation joins; rows without a valid edge contribute 0 and are not counted. Values and gradients are
        exact however sharp the map is: -log(1 - a) of an entry above 2/3 is made of the log-sum-exp of the row's other tokens.
        A row whose sum is beyond the dtype of the loss is infinite, and so is a mean with it, whatever others are.
        On a GPU too rows with |lse| >= 710 are made of scores in float64 and of their LSE, unless the given one differs from it
        by more than rounding explains; from 1.4e9 on what `attention` says of its own.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: on double backward. ImportError: on a CPU, with every non-edge of many genes, without the extension.
    """
    q, k, num_prefix = check_head(q, k, graph, num_prefix, lse, reduction)
    require_choice("target", target, TARGETS)
    require_choice("link", link, LINKS)
    check_generator(generator)
    relation_id = graph.relation_id(relation)
    genes = check_rows("rows", rows, graph)
    num_negatives, neg_sample_ratio = check_negatives(num_negatives, neg_sample_ratio, rows)
    q, scale = with_scale(q, scale)
    every = num_negatives is None and neg_sample_ratio is None
    # a single token has a = 1, and nothing that says what 1 - a is
    if every and (q.shape[-2] > 1 or link == "sigmoid") and is_small(q, k, lse, genes, graph.num_nodes, scale):
        return dense_bce(
            q, k, lse, graph, relation, genes, num_prefix=num_prefix, scale=scale, link=link,
            normalized=target == "normalized", reduction=reduction,
        )  # fmt: skip
    total = None
    if link == "softmax":
        known = graph.known_columns(relation)
        total = row_logsumexp(q, k, lse, known, genes, num_prefix=num_prefix, scale=scale, over="tokens")
    inv_mass = graph.targets(accumulation_dtype(q.dtype)).inv_mass.flatten()
    negatives = None
    if num_negatives is not None:
        num_rows = graph.num_nodes if genes is None else genes.shape[0]
        most = _MAX_ENTRIES // max(num_rows, 1) - graph.max_degree(relation)
        require(num_negatives <= most, lambda: f"num_negatives: expected at most {most} a row, got {num_negatives}")
        negatives = sample_negatives(graph, relation, genes, num_negatives, generator, inv_mass.dtype)
    elif neg_sample_ratio is not None:
        most_ratio = _MAX_ENTRIES / max(graph.num_edges(relation), 1) - 1
        require(
            neg_sample_ratio <= most_ratio,
            lambda: f"neg_sample_ratio: expected at most {most_ratio:.6g}, got {neg_sample_ratio}",
        )
        negatives = sample_negatives_of_graph(graph, relation, neg_sample_ratio, generator, inv_mass.dtype)
    by_row, by_column = graph.segments
    loss, *_ = _bce_rows(
        q, k, total, *graph.stacked, *graph.stacked_by_column(), *by_row, *by_column, inv_mass, graph.known_columns(relation),
        genes, *(negatives or (None,) * 4), relation_id, num_prefix, scale, target == "normalized",
    )  # fmt: skip
    if negatives is not None and neg_sample_ratio is not None and reduction == "mean":
        return (loss / max((graph.num_edges(relation) + negatives.gene.shape[0]) * loss.shape[:-1].numel(), 1)).sum()
    return reduced(loss, graph, relation, genes, reduction)


def check_negatives(num_negatives: Any, neg_sample_ratio: Any, rows: Any) -> tuple[int | None, float | None]:
    """Check how negatives are to be drawn; gives both as Python's numbers."""
    if num_negatives is not None:
        num_negatives = count_of("num_negatives", num_negatives, minimum=1)
    if neg_sample_ratio is not None:
        neg_sample_ratio = number_of("neg_sample_ratio", neg_sample_ratio)
        require(neg_sample_ratio >= 0, lambda: f"neg_sample_ratio: expected at least 0, got {neg_sample_ratio}")
        require(num_negatives is None, lambda: f"num_negatives: expected None beside neg_sample_ratio, got {num_negatives}")
        require(rows is None, "rows: expected None beside neg_sample_ratio, which draws for the whole graph")
    return num_negatives, neg_sample_ratio


# ------------------------------------------------------------------------------------------------------- operators


# q, k [..., T, D]; lse [..., R], None for the sigmoid link; the stacked graph by rows and by columns, and where long ones are
# cut, which the CPU does not read; inv_mass [K * N], 0 for a row without edges; known bool [N]; rows [R] genes, None for all;
# the `Negatives`, None for every valid non-edge.
_PROBLEM = (
    "Tensor q, Tensor k, Tensor? lse, Tensor rowptr, Tensor col, Tensor weight, "
    "Tensor colptr, Tensor row, Tensor weight_by_column, "
    "Tensor row_segptr, Tensor segment_row, int[] row_segments, Tensor col_segptr, Tensor segment_col, int[] col_segments, "
    "Tensor inv_mass, Tensor known, Tensor? rows, "
    "Tensor? negatives, Tensor? negrow, Tensor? negptr, Tensor? negative_weight, "
    "int relation, int num_prefix, float scale, bool normalized"
)


@operator("bce_rows", public="attention_bce", schema=f"({_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor)")
def _bce_rows(q: Tensor, k: Tensor, lse: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [..., R]; the sharp token, int32, -1 for none, rest and pull [..., R], empty for the sigmoid link)"""
    rows, num_prefix, scale = problem[14], problem[20], problem[21]
    queries, keys, totals = _flat(q, k, lse, rows, num_prefix, scale)
    num_leading, num_rows = queries.shape[:2]
    loss, rest, pull, positive, negative = (queries.new_zeros(num_leading, num_rows) for _ in range(5))
    sharp = torch.full((num_leading, num_rows), -1, dtype=torch.int64)
    # A single token has a = 1, the target of its only pair if that is an edge: nothing to lose.
    nothing = lse is not None and keys.shape[1] == 1
    genes, bounds = _known_keys(keys, problem[13], num_prefix), _bounds(queries, keys)
    for block in [] if nothing else _blocks(*problem, dtype=keys.dtype):
        for lead in range(num_leading):
            s = block.scores(queries[lead], genes[lead])
            if totals is None:
                loss[lead, block.rows] = block.sigmoid_losses(s)
                continue
            loss[lead, block.rows], gene, t, f = block.losses(s, totals[lead, block.rows], *bounds)
            sharp[lead, block.rows] = torch.where(gene >= 0, num_prefix + gene, -1)
            positive[lead, block.rows], negative[lead, block.rows] = t, f
    for lead, here, token, s in _sharp_rows(sharp, queries, keys):
        score = s.gather(1, token).squeeze(1)
        rest[lead, here] = s.scatter_(1, token, -torch.inf).logsumexp(1)
        gap = score - rest[lead, here]
        t, f = positive[lead, here], negative[lead, here]
        loss[lead, here] += cross_entropy(gap, t, f)
        pull[lead, here] = cross_entropy_slope(gap, t, f)
    shape, dtype = (*q.shape[:-2], num_rows), accumulation_dtype(q.dtype)
    loss, rest, pull = (x.to(dtype).reshape(shape) for x in (loss, rest, pull))
    if totals is None:
        return loss, sharp.new_zeros(0, dtype=torch.int32), loss.new_zeros(0), loss.new_zeros(0)
    return loss, sharp.int().reshape(shape), rest, pull


@_bce_rows.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known, rows = problem[13:15]
    num_rows = known.shape[0] if rows is None else rows.shape[0]
    loss = q.new_empty(*q.shape[:-2], num_rows, dtype=accumulation_dtype(q.dtype))
    kept = loss.shape if lse is not None else 0
    return loss, loss.new_empty(kept, dtype=torch.int32), loss.new_empty(kept), loss.new_empty(kept)


@operator(
    "bce_rows_backward",
    schema=f"(Tensor dloss, Tensor sharp, Tensor rest, Tensor pull, {_PROBLEM}) -> (Tensor, Tensor, Tensor)",
)
def _bce_rows_backward(
    dloss: Tensor, sharp: Tensor, rest: Tensor, pull: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, *problem: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk [..., T, D], dlse [..., R], empty for the sigmoid link)"""
    rows, num_prefix, scale = problem[14], problem[20], problem[21]
    queries, keys, totals = _flat(q, k, lse, rows, num_prefix, scale)
    num_leading, num_rows = queries.shape[:2]
    dtype, dloss = dloss.dtype, dloss.reshape(num_leading, num_rows).to(keys.dtype)
    dqueries, dkeys = queries.new_zeros(queries.shape), keys.new_zeros(keys.shape)  # contiguous, as compiled code is told
    dlse = torch.zeros_like(dloss) if totals is not None else dloss.new_zeros(0)
    shape = (num_leading, num_rows if totals is not None else 0)
    sharp, pull = (x.reshape(shape) for x in (sharp, pull))
    nothing = lse is not None and keys.shape[1] == 1
    genes, bounds = _known_keys(keys, problem[13], num_prefix), _bounds(queries, keys)
    for block in [] if nothing else _blocks(*problem, dtype=keys.dtype):
        for lead in range(num_leading):
            s, above = block.scores(queries[lead], genes[lead]), dloss[lead, block.rows]
            if totals is None:
                ds = block.sigmoid_slopes(s, above)
            else:
                gene = (sharp[lead, block.rows] - num_prefix).clamp_min_(-1).long()
                ds, dlse[lead, block.rows] = block.slopes(s, totals[lead, block.rows], bounds[1], gene, above)
            dqueries[lead, block.rows] = block.times_keys(ds, genes[lead])
            dkeys[lead, num_prefix:] += block.times_queries(ds, queries[lead]).masked_fill_(~problem[13][:, None], 0)
    for lead, here, token, s in _sharp_rows(sharp, queries, keys):
        # exp(s - rest), and -1 in the place of the sharp entry, which gets pull where others get their share of -pull; none has
        # one where rest is -inf
        s.scatter_(1, token, -torch.inf)
        share = s.sub_(s.logsumexp(1, keepdim=True).clamp_min_(torch.finfo(s.dtype).min)).exp_().scatter_(1, token, -1)
        ds = share.mul_(-(dloss * pull)[lead, here, None])
        dqueries[lead, here] += ds @ keys[lead]
        dkeys[lead] += ds.mT @ queries[lead, here]
    dq = torch.zeros(num_leading, *q.shape[-2:], dtype=queries.dtype)
    if rows is None:
        dq[:, num_prefix:] = dqueries.mul_(scale)
    else:
        dq[:, num_prefix:].index_add_(1, rows, dqueries.mul_(scale))
    if totals is not None:
        dlse = dlse.to(dtype).reshape(*q.shape[:-2], num_rows)
    return dq.reshape(q.shape).to(q.dtype), dkeys.reshape(k.shape).to(k.dtype), dlse


@_bce_rows_backward.register_fake
def _(
    dloss: Tensor, sharp: Tensor, rest: Tensor, pull: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, *problem: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), dloss.new_empty(dloss.shape if lse is not None else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    keep_missing_grads(ctx)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *inputs[:11], *inputs[12:14], *inputs[15:22])
    ctx.segments, ctx.constants = (inputs[11], inputs[14]), inputs[22:]


def _backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 26
    saved = ctx.saved_tensors  # once: checkpointing hands each out a single time
    by_row, by_column = ctx.segments
    dq, dk, dlse = _bce_rows_backward(dloss, *saved[:14], by_row, *saved[14:16], by_column, *saved[16:], *ctx.constants)
    return dq, dk, None if saved[5] is None else dlse, *(None,) * 23


_bce_rows.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_bce_rows_backward, "attention_bce")

# ------------------------------------------------------------------------------------------------------------ CUDA


@_bce_rows.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import attention_bce as kernels

    return kernels.bce_rows(*arguments)


@_bce_rows_backward.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import attention_bce as kernels

    return kernels.bce_rows_backward(*arguments)


# ------------------------------------------------------------------------------------------------------------- CPU


@fake("bce_map")
def _(scores: Tensor, total: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, kept = scores.new_empty(scores.shape[0]), scores.new_empty(0 if total is None else total.shape[0])
    return loss, torch.empty_like(kept, dtype=torch.int64), torch.empty_like(kept), torch.empty_like(kept)


@fake("bce_map_backward")
def _(dloss: Tensor, sharp: Tensor, scores: Tensor, total: Tensor | None, *rest: Any) -> Tensor:
    return scores.new_empty(0 if total is None else total.shape[0])


def _flat(
    q: Tensor, k: Tensor, lse: Tensor | None, rows: Tensor | None, num_prefix: int, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(queries [L, R, D] times the scale, keys [L, T, D], log-sum-exps [L, R]) in the dtype of the arithmetic."""
    num_leading = q.shape[:-2].numel()
    queries, keys = (x.reshape(num_leading, *x.shape[-2:]) for x in (take(q, -2, rows, num_prefix), k))
    if lse is not None:
        queries, keys, lse = unrounded(queries, keys, lse.reshape(queries.shape[:-1]), scale)
        return scale * queries, keys, lse
    dtype = accumulation_dtype(q.dtype)
    return scale * queries.to(dtype), keys.to(dtype), None


def _bounds(queries: Tensor, keys: Tensor) -> tuple[float, float]:
    """(log a above which a row's largest entry is sharp, the largest log a of all others)

    What is said of the sharp entry holds for any one entry of a row. Where scores are so large that their roundings move log a,
    each row's largest entry that may be above 2/3 is taken for it, and no other is above 1/2.
    """
    rounding = rounding_of(queries, keys, 1.0)
    return (SHARP - 2 * rounding, log(1 / 2)) if rounding else (SHARP, torch.inf)


def _known_keys(keys: Tensor, known: Tensor, num_prefix: int) -> Tensor:
    """[L, N, D], zeros for unknown genes: they are in no pair of the loss, and may hold anything."""
    return keys[:, num_prefix:].masked_fill(~known[:, None], 0)


def _sharp_rows(sharp: Tensor, queries: Tensor, keys: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Blocks of the rows with a sharp entry: (leading index, rows [b], the sharp token [b, 1], all scores [b, T])."""
    for lead, tokens in enumerate(sharp):
        rows = (tokens >= 0).nonzero()[:, 0]
        for here in rows.split(max(1, _BLOCK // keys.shape[1])) if rows.numel() else ():
            yield lead, here, tokens[here, None].long(), queries[lead, here] @ keys[lead].mT


def _blocks(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    colptr: Tensor,
    row: Tensor,
    weight_by_column: Tensor,
    row_segptr: Tensor,
    segment_row: Tensor,
    row_segments: list[int],
    col_segptr: Tensor,
    segment_col: Tensor,
    col_segments: list[int],
    inv_mass: Tensor,
    known: Tensor,
    rows: Tensor | None,
    negatives: Tensor | None,
    negrow: Tensor | None,
    negptr: Tensor | None,
    negative_weight: Tensor | None,
    relation: int,
    num_prefix: int,
    scale: float,
    normalized: bool,
    *,
    dtype: torch.dtype,
) -> Iterator[_DenseRows | _SparseRows]:
    """What the loss compares: blocks of rows with all genes, or edges and drawn non-edges at once."""
    n = known.numel()
    rows = torch.arange(n) if rows is None else rows
    inv_mass = inv_mass[relation * n : (relation + 1) * n].to(dtype)
    filled = (inv_mass[rows] > 0).nonzero()[:, 0]  # rows without an edge contribute nothing
    if negatives is None or negptr is None or negative_weight is None:
        require_extension(known.device)
        rowptr, unknown = rowptr[relation * n : (relation + 1) * n + 1], (~known).nonzero()[:, 0]
        graph = rowptr, col, weight.to(dtype) if normalized else None, inv_mass, unknown
        for here in filled.split(max(1, _BLOCK // n)):
            yield _DenseRows(here, rows[here], graph)
        return
    ptr, entry = take_rows(rowptr, relation * n + rows[filled])
    local = torch.arange(ptr.numel() - 1).repeat_interleave(ptr.diff())
    t = torch.ones(entry.numel(), dtype=dtype)
    if normalized:  # the only edge of a row has 1 to the last bit
        t = torch.where(ptr.diff()[local] > 1, weight[entry].to(dtype) * inv_mass[rows[filled]][local], t)
    negptr, drawn = take_rows(negptr, filled)
    yield _sparse_rows(filled, ptr, local, col[entry], t, negatives[drawn], negptr, negative_weight[filled], n)


class _DenseRows(NamedTuple):
    """A block of rows against every gene: scores [b, N], which the extension reads once and writes over."""

    rows: Tensor  # positions [b] among the chosen rows
    genes: Tensor  # [b], whose rows they are
    graph: tuple[Tensor | None, ...]  # the relation, its targets, and the genes that are in no pair

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        return queries[self.rows] @ keys.mT

    def sigmoid_losses(self, s: Tensor) -> Tensor:
        """[b]"""
        return torch.ops.cellattn.bce_map(s, None, self.genes, *self.graph, SHARP, torch.inf)[0]

    def losses(self, s: Tensor, total: Tensor, least: float, most: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss without the sharp entry, its gene or -1, its t and 1 - t), each [b]"""
        return torch.ops.cellattn.bce_map(s, total, self.genes, *self.graph, least, most)

    def sigmoid_slopes(self, s: Tensor, dloss: Tensor) -> Tensor:
        """d loss / d score [b, N]"""
        torch.ops.cellattn.bce_map_backward(dloss, self.genes[:0], s, None, self.genes, *self.graph, torch.inf)
        return s

    def slopes(self, s: Tensor, total: Tensor, most: float, gene: Tensor, dloss: Tensor) -> tuple[Tensor, Tensor]:
        """(d loss / d log a [b, N], 0 for the sharp entry; d loss / d log-sum-exp [b])"""
        return s, torch.ops.cellattn.bce_map_backward(dloss, gene, s, total, self.genes, *self.graph, most)

    def times_keys(self, ds: Tensor, keys: Tensor) -> Tensor:
        return ds @ keys

    def times_queries(self, ds: Tensor, queries: Tensor) -> Tensor:
        return ds.mT @ queries[self.rows]


class _SparseRows(NamedTuple):
    """The edges and the drawn non-edges of all rows: entries [E], a CSR matrix and its transpose."""

    rows: Tensor
    positive: Tensor  # t, 0 for non-edges
    negative: Tensor  # 1 - t for edges, the weight of what was drawn
    ptr: Tensor
    col: Tensor
    colptr: Tensor
    row: Tensor
    order: Tensor  # entries by column
    local: Tensor  # the row of each entry

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        return sddmm(self.ptr, self.col, queries[self.rows], keys)

    def sigmoid_losses(self, s: Tensor) -> Tensor:
        return self._sum(cross_entropy(s, self.positive, self.negative))

    def losses(self, s: Tensor, total: Tensor, least: float, most: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_a = s.sub_(total[self.local])
        numbers = log_a.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        top = log_a.new_full(self.rows.shape, least).scatter_reduce_(0, self.local, numbers, "amax")
        # a gene that was drawn twice stands there twice
        high = ((log_a > least) & (log_a == top[self.local])).nonzero()[:, 0]
        gene = torch.full_like(self.rows, -1).scatter_reduce_(0, self.local[high], self.col[high].long(), "amax")
        at = self._at(gene)
        log_a[at] = SHARP  # a number of no meaning
        log_a.clamp_max_(most)
        others = torch.log1p(-log_a.exp())
        entries = weighted(self.positive, log_a).add_(weighted(self.negative, others)).neg_()
        entries[at] = 0
        t, f = (x.new_zeros(gene.numel()).index_add_(0, self.local[at], x[at]) for x in (self.positive, self.negative))
        return self._sum(entries), gene, t, f

    def sigmoid_slopes(self, s: Tensor, dloss: Tensor) -> Tensor:
        return cross_entropy_slope(s, self.positive, self.negative).mul_(dloss[self.local])

    def slopes(self, s: Tensor, total: Tensor, most: float, gene: Tensor, dloss: Tensor) -> tuple[Tensor, Tensor]:
        a = s.sub_(total[self.local]).clamp_max_(most).exp_()
        ds = (self.negative * a).div_(1 - a).sub_(self.positive)
        ds[self._at(gene)] = 0
        ds *= dloss[self.local]
        return ds, -self._sum(ds)

    def times_keys(self, ds: Tensor, keys: Tensor) -> Tensor:
        return spmm(self.ptr, self.col, ds, keys.shape[0], keys)

    def times_queries(self, ds: Tensor, queries: Tensor) -> Tensor:
        return spmm(self.colptr, self.row, ds[self.order], self.rows.numel(), queries[self.rows])

    def _at(self, gene: Tensor) -> Tensor:
        """Where the entries of the rows' genes [b] (-1: none) stand."""
        return (self.col == gene[self.local]).nonzero()[:, 0]

    def _sum(self, entries: Tensor) -> Tensor:
        return torch.segment_reduce(entries, "sum", offsets=self.ptr, initial=0)


def _sparse_rows(
    here: Tensor, ptr: Tensor, local: Tensor, col: Tensor, t: Tensor, drawn: Tensor, negptr: Tensor, weight: Tensor, n: int
) -> _SparseRows:
    num_rows, total = here.numel(), col.numel() + drawn.numel()
    drawn_local = torch.arange(num_rows).repeat_interleave(negptr.diff())
    # Each row's edges are followed by its drawn non-edges.
    edge_at = torch.arange(col.numel()) + negptr[local]
    drawn_at = torch.arange(drawn.numel()) + ptr[1:][drawn_local]
    all_col = torch.empty(total, dtype=col.dtype)
    all_col[edge_at], all_col[drawn_at] = col, drawn.to(col.dtype)
    positive, negative = t.new_zeros(total), t.new_zeros(total)
    positive[edge_at], negative[edge_at] = t, 1 - t
    negative[drawn_at] = weight.to(t.dtype)[drawn_local]
    all_ptr = ptr + negptr
    order = torch.argsort(all_col, stable=True)
    colptr = torch.zeros(n + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(all_col, minlength=n), 0, out=colptr[1:])
    all_local = torch.arange(num_rows).repeat_interleave(all_ptr.diff())
    row = all_local[order].to(col.dtype)
    return _SparseRows(here, positive, negative, all_ptr, all_col, colptr, row, order, all_local)
