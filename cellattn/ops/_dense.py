"""Small maps, where a few operations on all entries cost less than finding the few that count; and losses of one head on them.

With s the scores of the chosen rows, t their targets and w = 1 - t on valid pairs (0 on others),

    KL_i  = sum_j t_ij log t_ij + m_i LSE_i - sum_j t_ij s_ij ,   m_i = sum_j t_ij
    BCE_i = - sum_j [ t_ij log a_ij + w_ij log(1 - a_ij) ]

as in `attention_kl.py` and `attention_bce.py`, but in one operator that makes s, LSE and the gradient of both at once: the
streamed way is as fast from about 500 genes, and the only one for what is not finite or so large that float32 is not enough.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch.utils.weak import WeakIdKeyDictionary

from ..graph import MultiGraph
from ..graph.rows import of_any_mode
from ._bernoulli import SHARP, cross_entropy, cross_entropy_slope
from ._definition import is_plain
from ._operator import Operator, keep_missing_grads, operator, refuse_double_backward
from ._rows import take
from .attention import accumulation_dtype, is_ordinary

# Entries of a map up to which the dense way is the faster one, forward and backward: measured on an AMD EPYC, one and two
# threads, where the two cross between 400 and 600 genes.
LARGEST = 2**18


def fits_dense(device: torch.device, num_entries: int) -> bool:
    """Whether a map of so many entries is to be made."""
    return device.type == "cpu" and 0 < num_entries <= LARGEST


def is_small(q: Tensor, k: Tensor, lse: Tensor | None, rows: Tensor | None, num_genes: int, scale: float) -> bool:
    """Whether the map of q, k [..., T, D] is to be made: on a CPU, not in a compiled function, with nothing special in it."""
    num_entries = q.shape[:-1].numel() * (num_genes if rows is None else rows.shape[0])
    if not fits_dense(q.device, num_entries) or not is_plain((q, k, lse)) or transforms_active():
        return False
    return is_ordinary(q.detach(), k.detach(), (q[:0] if lse is None else lse).detach(), scale)


class DenseTargets(NamedTuple):
    """A relation's rows as dense matrices, in float32 or float64; all is 0 in rows without an edge."""

    positive: Tensor  # [N, N]: t
    negative: Tensor  # [N, N]: 1 - t on valid pairs
    mass: Tensor  # [N]: 1
    entropy: Tensor  # [N]: sum_j t_ij log t_ij


_kept = WeakIdKeyDictionary()  # by graph, by what tells the targets apart


def dense_targets(graph: MultiGraph, relation: str, dtype: torch.dtype, normalized: bool = True) -> DenseTargets:
    """Made once a graph: a small one's are a few times its edges."""
    kept = _kept.setdefault(graph, {})
    key = relation, dtype, normalized
    if key not in kept:
        kept[key] = _make_targets(graph, relation, dtype, normalized)
    return kept[key]


@of_any_mode
@torch.no_grad()
def _make_targets(graph: MultiGraph, relation: str, dtype: torch.dtype, normalized: bool) -> DenseTargets:
    rows = graph.targets(dtype)
    inv_mass, entropy = rows.inv_mass[graph.relation_id(relation)], rows.entropy[graph.relation_id(relation)]
    row, col = graph.edge_index(relation)
    t = torch.ones(row.numel(), dtype=dtype)
    if normalized:  # the only edge of a row has 1 to the last bit
        degree = graph.rowptr(relation).diff()
        t = torch.where(degree[row] > 1, graph.weight(relation).to(dtype) * inv_mass[row], t)
    positive = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=dtype).index_put_((row, col), t)
    valid = (inv_mass > 0)[:, None] & graph.known_columns(relation)
    return DenseTargets(positive, valid.to(dtype) - positive, (inv_mass > 0).to(dtype), entropy)


# ------------------------------------------------------------------------------------------------------- operators


# q, k [..., T, D]; lse [..., T] of the caller's, None to make it; `DenseTargets`, without `negative` for KL; known bool [N];
# rows [R]; factor of the sum of all rows, None for the rows themselves. `over`: "tokens", "valid", or "" for the sigmoid link.
_PROBLEM = (
    "Tensor q, Tensor k, Tensor? lse, Tensor positive, Tensor? negative, Tensor mass, Tensor entropy, Tensor known, "
    "Tensor? rows, int num_prefix, float scale, str over, float? factor"
)


def _loss_operator(public: str) -> Operator:
    """The operator of a loss, whose errors speak of the public function; log a (scores, for the sigmoid link) is kept."""
    name = public.replace("attention", "dense")

    @operator(name, public=public, schema=f"({_PROBLEM}) -> (Tensor, Tensor)")
    def loss(*problem: Any) -> tuple[Tensor, Tensor]:
        return _loss(_Map.of(*problem))

    @loss.register_fake
    def _(q: Tensor, k: Tensor, lse: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        known, rows, factor = rest[4], rest[5], rest[-1]
        dtype, num_rows = accumulation_dtype(q.dtype), (known if rows is None else rows).shape[0]
        log_a = q.new_empty(q.shape[:-2].numel(), num_rows, q.shape[-2], dtype=dtype)
        return q.new_empty((*q.shape[:-2], num_rows) if factor is None else (), dtype=dtype), log_a

    @operator(f"{name}_backward", schema=f"(Tensor dloss, Tensor log_a, {_PROBLEM}) -> (Tensor, Tensor, Tensor)")
    def loss_backward(dloss: Tensor, log_a: Tensor, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _loss_backward(dloss, log_a, _Map.of(*problem))

    @loss_backward.register_fake
    def _(dloss: Tensor, log_a: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return q.new_empty(q.shape), k.new_empty(k.shape), dloss.new_empty(0 if lse is None else lse.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        keep_missing_grads(ctx)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *inputs[:9])
        ctx.options = inputs[9:]

    def backward(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 13
        saved = ctx.saved_tensors
        dq, dk, dlse = loss_backward(dloss, *saved, *ctx.options)
        return dq, dk, None if saved[3] is None else dlse, *(None,) * 10

    loss.register_autograd(backward, setup_context=setup_context)
    refuse_double_backward(loss_backward, public)
    return loss


dense_kl = _loss_operator("attention_kl")
dense_bce = _loss_operator("attention_bce")


class _Map(NamedTuple):
    """The chosen rows, leading dimensions as one, and what their entries are compared with."""

    q: Tensor
    k: Tensor
    lse: Tensor | None
    positive: Tensor  # [R, N]
    negative: Tensor | None
    mass: Tensor  # [R]
    entropy: Tensor
    known: Tensor
    rows: Tensor | None
    num_prefix: int
    scale: float
    over: str
    factor: float | None
    queries: Tensor  # [L, R, D], times scale
    keys: Tensor  # [L, T, D]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, lse: Tensor | None, *rest: Any) -> _Map:
        positive, negative, mass, entropy, known, rows, num_prefix, scale, over, factor = rest
        if rows is not None:
            positive, mass, entropy = (x.index_select(0, rows) for x in (positive, mass, entropy))
            negative = None if negative is None else negative.index_select(0, rows)
        dtype = accumulation_dtype(q.dtype)
        queries, keys = take(q, -2, rows, num_prefix).to(dtype).mul(scale), k.to(dtype)
        queries, keys = (x.reshape(-1, *x.shape[-2:]) for x in (queries, keys))
        return cls(
            q, k, lse, positive, negative, mass, entropy, known, rows, num_prefix, scale, over, factor, queries, keys
        )  # fmt: skip

    def log_a(self) -> Tensor:
        """[L, R, T]; over valid genes -inf for all others; scores for the sigmoid link."""
        s = torch.bmm(self.queries, self.keys.mT)
        if self.over == "valid":
            s.masked_fill_(F.pad(~self.known, (self.num_prefix, 0), value=True), -torch.inf)
        if self.over and self.lse is None:
            return s.log_softmax(-1)
        if self.lse is None:
            return s
        s -= take(self.lse, -1, self.rows, self.num_prefix).reshape(*s.shape[:-1], 1)
        # a key that is in no pair may not be among those of the caller's log-sum-exp
        return s.masked_fill_(F.pad(~self.known, (self.num_prefix, 0)), SHARP)

    def sharp(self, genes: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """(leading index, row, gene) of the sharp entries among log a [L, R, N]; None where there is none."""
        if float(genes.max()) <= SHARP:
            return None
        top, gene = genes.max(-1)
        lead, row = (top > SHARP).nonzero(as_tuple=True)
        return lead, row, gene[lead, row]

    def gap(self, log_a: Tensor, sharp: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(s - rest [S], t [S], w [S], share [S, T] of the others) of the sharp entries: see `attention_bce.py`."""
        lead, row, gene = sharp
        assert self.negative is not None
        token = (self.num_prefix + gene)[:, None]
        s = log_a[lead, row]
        if self.lse is not None:  # scores of all keys
            s = torch.bmm(self.queries[lead, row, None], self.keys[lead].mT).squeeze(1)
        rest = s.scatter(1, token, -torch.inf).log_softmax(1)
        other = torch.where(token.squeeze(1) == 0, 1, 0)[:, None]
        gap = s.gather(1, token) - (s.gather(1, other) - rest.gather(1, other))
        return gap.squeeze(1), self.positive[row, gene], self.negative[row, gene], rest.exp_()


def _loss(m: _Map) -> tuple[Tensor, Tensor]:
    log_a = m.log_a()
    genes = log_a[..., m.num_prefix :]
    if m.negative is None:
        if m.over == "valid":
            genes = genes.masked_fill(~m.known, 0)
        loss = m.entropy - (m.positive * genes).sum(-1)
    elif not m.over:
        loss = cross_entropy(genes, m.positive, m.negative).sum(-1)
    else:
        sharp = m.sharp(genes)
        if sharp is not None:
            genes = genes.index_put(sharp, genes.new_tensor(SHARP))  # a number of no meaning
        entries = (m.positive * genes).addcmul_(m.negative, genes.exp().neg_().log1p_())
        if sharp is not None:
            entries[sharp] = cross_entropy(*m.gap(log_a, sharp)[:3]).neg_()
        loss = entries.sum(-1).neg_()
    loss = loss.view(*m.q.shape[:-2], loss.shape[-1]) if m.factor is None else loss.sum().mul_(m.factor)
    return loss, log_a


def _loss_backward(dloss: Tensor, log_a: Tensor, m: _Map) -> tuple[Tensor, Tensor, Tensor]:
    g = dloss.reshape(*log_a.shape[:-1], 1) if m.factor is None else dloss * m.factor
    genes = log_a[..., m.num_prefix :]
    of_row = None
    if m.negative is None:
        ds = m.positive * -g
        dtotal = m.mass[:, None] * g
    elif not m.over:
        ds = cross_entropy_slope(genes, m.positive, m.negative) * g
        dtotal = None
    else:
        a = genes.exp()
        sharp = m.sharp(genes)
        if sharp is not None:
            a[sharp] = 0
        ds = (m.negative * a).div_(1 - a).sub_(m.positive)
        if sharp is not None:
            ds[sharp] = 0
            gap, t, w, share = m.gap(log_a, sharp)
            pull = (cross_entropy_slope(gap, t, w) * (g[sharp[:2]].squeeze(-1) if m.factor is None else g))[:, None]
            of_row = *sharp[:2], share.mul_(-pull).scatter_(1, (m.num_prefix + sharp[2])[:, None], pull)
        ds.mul_(g)
        dtotal = -ds.sum(-1, keepdim=True)
    dlse = ds.new_zeros(0)
    if dtotal is not None and m.lse is None:
        whole = log_a.exp().mul_(dtotal)
    else:
        whole = torch.zeros_like(log_a)
        if dtotal is not None and m.lse is not None:
            dlse = _scatter(dtotal.expand(*log_a.shape[:-1], 1), m.lse.unsqueeze(-1), m).squeeze(-1)
    whole[..., m.num_prefix :] += ds
    if of_row is not None:
        lead, row, change = of_row
        whole[lead, row] += change
    dk = torch.bmm(whole.mT, m.queries).to(m.k.dtype).view(m.k.shape)
    return _scatter(torch.bmm(whole, m.keys).mul_(m.scale), m.q, m), dk, dlse


def _scatter(x: Tensor, like: Tensor, m: _Map) -> Tensor:
    """The chosen rows [L, R, D] in their places, zeros in others: [..., T, D]."""
    if m.rows is None:
        x = F.pad(x, (0, 0, m.num_prefix, 0))
    else:
        x = x.new_zeros(x.shape[0], like.shape[-2], x.shape[-1]).index_add_(1, m.num_prefix + m.rows, x)
    return x.to(like.dtype).view(like.shape)


def dense_loss(
    loss: Operator, q: Tensor, k: Tensor, lse: Tensor | None, graph: MultiGraph, relation: str, rows: Tensor | None, *,
    num_prefix: int, scale: float, over: str, reduction: str, normalized: bool = True,
) -> Tensor:  # fmt: skip
    """The loss of `dense_kl` or `dense_bce`, reduced."""
    targets = dense_targets(graph, relation, accumulation_dtype(q.dtype), normalized)
    factor = None
    if reduction != "none":
        factor = 1.0
        if reduction == "mean":
            counted = graph.num_rows_with_edges(relation) if rows is None else int(targets.mass.index_select(0, rows).sum())
            factor = 1 / max(counted * q.shape[:-2].numel(), 1)
    return loss(
        q, k, lse, targets.positive, targets.negative if loss is dense_bce else None, targets.mass, targets.entropy,
        graph.known_columns(relation), rows, num_prefix, scale, over, factor,
    )[0]  # fmt: skip
