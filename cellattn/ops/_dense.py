"""Small maps, where a few operations on all entries cost less than finding the few that count: losses of heads on them.

With s the scores of the chosen rows, t their targets and w = 1 - t on valid pairs (0 on others),

    KL_i  = sum_j t_ij log t_ij - sum_j t_ij log a_ij
    BCE_i = - sum_j [ t_ij log a_ij + w_ij log(1 - a_ij) ]

as in `attention_kl.py` and `attention_bce.py`, written in operations whose gradient PyTorch knows: it walks them back with no
Python but hooks that refuse a second derivative, and at these sizes Python is what a call costs. The streamed way is the faster
one from some 500 genes, and the only one for what is not finite or so large that float32 is not enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph import MultiGraph
from ..graph.rows import of_any_mode
from ._bernoulli import SHARP
from ._operator import is_eager, refuse_double_backward_through
from ._rows import at, separate, take
from .attention import accumulation_dtype, as_dtype, is_ordinary

# Entries of a map up to which the dense way is the faster one, forward and backward: measured on an AMD EPYC, one and two
# threads, where the two cross between 400 and 600 genes.
LARGEST = 2**18
LARGEST_ATTENTION = 2**15  # of all heads, where the output is made of their map too: 4 heads of 90 tokens
MOST_TIES = 32  # lists of relations of which a graph keeps what is read for ties: a training may draw others at each step
MOST_KEPT = 2**20  # pairs of genes of which a graph keeps the targets, for a few rows too: 8 MB a relation


def is_small(q: Tensor, k: Tensor, lse: Tensor | None, rows: Tensor | None, num_genes: int, scale: float) -> bool:
    """Whether the map of q, k [..., T, D] is to be made: on a CPU, not in a compiled function, with nothing special in it."""
    if not is_eager(q, k, lse) or num_genes**2 > MOST_KEPT:
        return False
    num_entries = q.numel() // q.shape[-1] * (num_genes if rows is None else rows.shape[0])
    return 0 < num_entries <= LARGEST and is_ordinary(q, k, q if lse is None else lse, scale)


def is_small_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """The same of the maps of all heads of q, k, v [..., H, T, D], where the output is made of them too."""
    if not is_eager(q, k, v):
        return False
    return 0 < q.numel() // q.shape[-1] * k.shape[-2] <= LARGEST_ATTENTION and is_ordinary(q, k, v, scale)


class DenseTargets(NamedTuple):
    """Rows of a relation as dense matrices, in float32 or float64; all is 0 in rows without an edge."""

    positive: Tensor  # [R, N]: t
    negative: Tensor  # [R, N]: 1 - t on valid pairs
    entropy: Tensor  # [R]: sum_j t_ij log t_ij
    without_edge: Tensor  # bool [R]
    total_entropy: float
    num_counted: int  # rows with an edge

    @classmethod
    def of(cls, positive: Tensor, negative: Tensor, entropy: Tensor, without_edge: Tensor) -> DenseTargets:
        total, num_counted = entropy.sum(dtype=torch.float64), without_edge.numel() - without_edge.sum()
        return cls(positive, negative, entropy, without_edge, float(total), int(num_counted))

    def each(self, loss: Tensor) -> Tensor:
        """loss [..., R] with exactly 0 in rows without an edge, and nothing of their upstream gradient, NaN or not."""
        return loss.masked_fill(self.without_edge, 0) if self.num_counted < self.without_edge.shape[0] else loss


def dense_targets(
    graph: MultiGraph, relation: str, dtype: torch.dtype, rows: Tensor | None = None, normalized: bool = True
) -> DenseTargets:
    """Those of all rows are made once a graph, whichever are asked for."""
    key = "dense targets", relation, dtype, normalized
    targets = graph.once(key, lambda: _make_targets(graph, relation, dtype, normalized))
    return targets if rows is None else DenseTargets.of(*(x.index_select(0, rows) for x in targets[:4]))


@torch.no_grad()
def _make_targets(graph: MultiGraph, relation: str, dtype: torch.dtype, normalized: bool) -> DenseTargets:
    inv_mass, entropy, without_edge = (x[graph.relation_id(relation)] for x in graph.targets(dtype)[:3])
    row, col = graph.edge_index(relation)
    t = torch.ones(row.numel(), dtype=dtype)
    if normalized:  # the only edge of a row has 1 to the last bit
        degree = graph.rowptr(relation).diff()
        t = torch.where(degree[row] > 1, graph.weight(relation).to(dtype) * inv_mass[row], t)
    positive = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=dtype).index_put_((row, col), t)
    valid = ~without_edge[:, None] & graph.known_columns(relation)
    return DenseTargets.of(positive, valid.to(dtype) - positive, entropy, without_edge)


class TieTargets(NamedTuple):
    """What `dense_graph_attention` reads of the relations of ties, in float32 or float64."""

    positive: Tensor  # [ties, R, N]
    entropy: Tensor  # [ties, R]
    without_edge: Tensor  # bool [ties, R]
    unknown: Tensor | None  # bool [ties, 1, N], None where all genes are known
    total_entropy: Tensor  # [ties], in float64 until it was added up
    mean_entropy: Tensor  # [ties], over the rows with an edge
    num_counted: Tensor  # [ties], rows with an edge, at least 1

    @classmethod
    @of_any_mode
    @torch.no_grad()
    def of(cls, graph: MultiGraph, relations: Sequence[str], dtype: torch.dtype) -> TieTargets:
        each = [dense_targets(graph, relation, dtype) for relation in relations]
        unknown = ~torch.stack([graph.known_columns(relation) for relation in relations]).unsqueeze(1)
        rows = zip(*((one.positive, one.entropy, one.without_edge) for one in each), strict=True)
        positive, entropy, without_edge = map(torch.stack, rows)
        return cls._summed(positive, entropy, without_edge, unknown if bool(unknown.any()) else None)

    def of_rows(self, rows: Tensor) -> TieTargets:
        """Those of the chosen rows."""
        positive, entropy, without_edge = (x.index_select(1, rows) for x in self[:3])
        return self._summed(positive, entropy, without_edge, self.unknown)

    @classmethod
    def _summed(cls, positive: Tensor, entropy: Tensor, without_edge: Tensor, unknown: Tensor | None) -> TieTargets:
        total = entropy.sum(1, dtype=torch.float64)
        counted = without_edge.logical_not().sum(1).clamp_min(1)
        sums = (x.to(entropy.dtype) for x in (total, total / counted, counted))
        return cls(positive, entropy, without_edge, unknown, *sums)


def _tie_targets(graph: MultiGraph, relations: tuple[str, ...], dtype: torch.dtype) -> TieTargets:
    """Those of all rows are kept, of a few lists of relations."""
    kept = graph.once(("targets of ties", dtype), dict[tuple[str, ...], TieTargets])
    targets = kept.get(relations)
    if targets is None:
        targets = TieTargets.of(graph, relations, dtype)
        if len(kept) >= MOST_TIES:
            kept.clear()
        kept[relations] = targets
    return targets


def dense_kl(
    q: Tensor, k: Tensor, lse: Tensor | None, graph: MultiGraph, relation: str, rows: Tensor | None, *,
    num_prefix: int, scale: float, over: str, reduction: str,
) -> Tensor:  # fmt: skip
    """`attention_kl` of checked arguments."""
    targets = dense_targets(graph, relation, accumulation_dtype(q.dtype), rows)
    if over == "valid":
        s = _scores(q, take(k, -2, None, num_prefix), rows, num_prefix, scale, "attention_kl")
        if graph.num_known(relation) < graph.num_nodes:  # finite, so that t log a = 0 where t is
            s = s.masked_fill(~graph.known_columns(relation), torch.finfo(s.dtype).min)
        log_a = s.log_softmax(-1)
    else:
        s = _scores(q, k, rows, num_prefix, scale, "attention_kl")
        log_a = take(_log_of_map(s, lse, rows, num_prefix, "attention_kl"), -1, None, num_prefix)
    if reduction == "none":
        return targets.each(targets.entropy - (targets.positive * log_a).sum(-1))
    # not a dot product, of which BLAS makes few long sums: the entropy cancels most of what comes out
    total = (targets.positive * log_a).sum()
    factor = _factor(targets, q, reduction)
    return torch.rsub(total, factor * targets.total_entropy * q.shape[:-2].numel(), alpha=factor)


def dense_graph_attention(
    q: Tensor, k: Tensor, v: Tensor, graph: MultiGraph, ties: Sequence[tuple[str, int]], rows: Tensor | None, *,
    num_prefix: int, scale: float, over: str, reduction: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """`graph_attention` with KL of checked arguments, all ties of the same rows: everything is made of one map."""
    public, dtype = "graph_attention", accumulation_dtype(q.dtype)
    relations, heads = tuple(relation for relation, _ in ties), [head for _, head in ties]
    targets = _tie_targets(graph, relations, dtype)
    if rows is not None:
        targets = targets.of_rows(rows)
    s = _scores(q, k, None, 0, scale, public)
    log_a = s.log_softmax(-1)
    values = as_dtype(v, dtype).view_as(v)  # a node of its own, for the hook
    out = _product(log_a.exp(), values)
    refuse_double_backward_through(out, (values,), public)
    # [..., ties, R, N]
    tied = take(at(log_a if over == "tokens" else s, heads, -3), -2, rows, num_prefix)
    tied = take(tied, -1, None, num_prefix)
    if over == "valid":
        if targets.unknown is not None:  # finite, so that t log a = 0 where t is
            tied = tied.masked_fill(targets.unknown, torch.finfo(dtype).min)
        tied = tied.log_softmax(-1)
    return as_dtype(out, q.dtype), _kl_of_ties(tied, targets, reduction)


def _kl_of_ties(log_a: Tensor, targets: TieTargets, reduction: str) -> tuple[Tensor, ...]:
    if reduction == "none":
        each = targets.entropy - (targets.positive * log_a).sum(-1)
        return tuple(separate(each.masked_fill(targets.without_edge, 0), -2))
    total = (targets.positive * log_a).sum([d for d in range(log_a.ndim) if d != log_a.ndim - 3])
    num_leading = log_a.shape[:-3].numel()
    if reduction == "sum":
        loss = torch.rsub(total, targets.total_entropy * num_leading)
    else:
        loss = torch.addcdiv(targets.mean_entropy, total, targets.num_counted, value=-1 / num_leading)
    return tuple(separate(loss, 0))


def dense_bce(
    q: Tensor, k: Tensor, lse: Tensor | None, graph: MultiGraph, relation: str, rows: Tensor | None, *,
    num_prefix: int, scale: float, link: str, normalized: bool, reduction: str,
) -> Tensor:  # fmt: skip
    """`attention_bce`, with every non-edge, of checked arguments."""
    targets = dense_targets(graph, relation, accumulation_dtype(q.dtype), rows, normalized)
    s = _scores(q, k, rows, num_prefix, scale, "attention_bce")
    if link == "sigmoid":
        entries = _log_likelihood(take(s, -1, None, num_prefix), targets.positive, targets.negative)
    else:
        log_a = take(_log_of_map(s, lse, rows, num_prefix, "attention_bce"), -1, None, num_prefix)
        if lse is not None and graph.num_known(relation) < graph.num_nodes:
            # a key that is in no pair may not be among those of the caller's log-sum-exp
            log_a = log_a.masked_fill(~graph.known_columns(relation), SHARP)
        entries = _softmax_entries(log_a, s, targets, num_prefix)
    if reduction == "none":
        return targets.each(entries.sum(-1).neg())
    return entries.sum() * -_factor(targets, q, reduction)


def _scores(q: Tensor, k: Tensor, rows: Tensor | None, num_prefix: int, scale: float, public: str) -> Tensor:
    """[..., R, keys]"""
    dtype = accumulation_dtype(q.dtype)
    # rows are chosen in the dtype of the arithmetic, in which the gradients of one that is named twice are added
    queries, keys = take(as_dtype(q, dtype), -2, rows, num_prefix) * scale, as_dtype(k, dtype).mT
    scores = _product(queries, keys)
    refuse_double_backward_through(scores, (queries, keys), public)
    return scores


def _product(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = _Product.apply(a, b) if torch.is_autocast_enabled("cpu") else a @ b
    return product


class _Product(torch.autograd.Function):
    """a @ b under autocast, which of all that is done here would turn this and its gradient into bfloat16."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with torch.autocast("cpu", enabled=False):
            return a @ b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            # in the order in which PyTorch has it of one map, and of several
            return g @ b.mT, (g.mT @ a).mT if g.ndim == 2 else a.mT @ g


def _log_of_map(s: Tensor, lse: Tensor | None, rows: Tensor | None, num_prefix: int, public: str) -> Tensor:
    if lse is None:
        return s.log_softmax(-1)
    total = take(lse, -1, rows, num_prefix).unsqueeze(-1)
    log_a = s - total
    refuse_double_backward_through(log_a, (total,), public)
    return log_a


def _factor(targets: DenseTargets, q: Tensor, reduction: str) -> float:
    """Of the sum over all rows."""
    return 1.0 if reduction == "sum" else 1 / max(targets.num_counted * q.shape[:-2].numel(), 1)


def _log_likelihood(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """positive log sigmoid(s) + negative log sigmoid(-s), to the last digits of either."""
    return positive * F.logsigmoid(s) + negative * F.logsigmoid(-s)


def _softmax_entries(log_a: Tensor, s: Tensor, targets: DenseTargets, num_prefix: int) -> Tensor:
    """t log a + w log(1 - a) of log a [..., R, N]; s [..., R, T] of all tokens.

    A sharp entry, of which the others of its row alone say what 1 - a is, is taken by itself: see `attention_bce.py`.
    """
    if float(log_a.detach().max()) <= SHARP:
        return targets.positive * log_a + targets.negative * log_a.exp().neg().log1p()
    top, gene = log_a.detach().max(-1)
    index = (top > SHARP).nonzero(as_tuple=True)
    gene = gene[index]
    sharp = *index, gene
    log_a = log_a.index_put(sharp, log_a.new_tensor(SHARP))  # a number of no meaning
    entries = targets.positive * log_a + targets.negative * log_a.exp().neg().log1p()
    token = (num_prefix + gene)[:, None]
    of_rows = s[index]
    gap = of_rows.gather(1, token).squeeze(1) - of_rows.scatter(1, token, -torch.inf).logsumexp(1)
    t, w = (x[index[-1], gene] for x in targets[:2])
    return entries.index_put(sharp, _log_likelihood(gap, t, w))
