"""Scores of very many sets of genes in one cell: what depends on one gene is worked out once, a set costs what only it knows.

A model with a method `screening(graph, *, phenotype, dtype, features, gene_ids)` that returns a `Screening` is screened through
it (`cellattn.screen`); a pool says what it can share by `screening(u, dtype)`, of the features u [M, D] of all entries.

An *entry* is a gene under a perturbation type, type * N + gene, of M = num_types * N. Tables of entries are made in the dtype
of the module, which is float64 in a screen, and rounded once: to float32, or kept in float64 where products are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._memory import available_memory
from ..ops import perturbation_attention
from ..ops.screening import CrossTables, ReadoutTables, cross_attention, linear, mlp, padded, readout_mean
from ._check import phenotype_of

BATCH = 16384  # sets that are scored at a time where they need little room
LEAST_TOTAL = 1e-25  # of weights: below, too much of them has underflowed in float32 (to 0 below 1e-38)


class Screening(Protocol):
    """A model's predictions of one phenotype, as a function of sets.

    Attributes:
        num_genes: N.
        num_types: perturbation types; None where they are not read.
        batch_size: sets to ask for at a time, for the room that they need.
    """

    num_genes: int
    num_types: int | None
    batch_size: int

    def __call__(self, entries: Tensor) -> Tensor:
        """int64 [B, k], no gene twice in a set -> [B]."""
        ...


class SetPool(Protocol):
    """What a pool makes of sets of entries."""

    def __call__(self, entries: Tensor) -> Tensor:
        """int64 [B, k] -> [B, D]."""
        ...


class NotReadableError(Exception):
    """A model computes something else than a screening makes of its weights: of layers that were replaced or wrapped, say."""


@torch.no_grad()
def require_readable(
    module: nn.Module,
    h: Tensor,
    make: Callable[[Tensor], Screening],
    predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> None:
    """Hold a screening to its module in a cell of a few genes; in float64 alone, as in a screen, and in evaluation.

    Args:
        module: what has the weights.
        h: [N, ...], the genes of the cell.
        make: the screening of phenotype 0 in a cell of those genes.
        predict: the module's own predictions [B] of (genes, seeds, ptr, types).

    Raises:
        NotReadableError: if they differ, or there is no screening.
    """
    few = h[:8]
    k = min(2, len(few))
    if module.training or h.dtype != torch.float64 or k == 0:
        return
    sets = torch.arange(len(few), device=h.device).unfold(0, k, 1)
    ptr = torch.arange(len(sets) + 1, device=h.device) * k
    name = type(module).__name__
    try:
        made = make(few)
        types = torch.arange(sets.numel(), device=h.device) % (made.num_types or 1)
        got = made(types.view_as(sets) * len(few) + sets)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise NotReadableError(f"{name}: a layer is not as it was made: {error}") from error
    want = predict(few, sets.flatten(), ptr, types)
    off = float((got - want).abs().max())
    if off > 1e-6 * float(want.abs().max()) + 1e-12:
        raise NotReadableError(f"{name}: it predicts what its weights do not say (off by {off:.3g})")


def is_altered(module: nn.Module) -> bool:
    """Whether a call is more than its class's own `forward` that belongs to its `screening`."""

    def of(name: str) -> type:
        return next((cls for cls in type(module).__mro__ if name in vars(cls)), object)

    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module) or not issubclass(of("screening"), of("forward"))


def values_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of everything but the products of a dtype."""
    return torch.promote_types(dtype, torch.float32)


def linears(layers: nn.Module) -> list[nn.Linear]:
    """The linear layers among some."""
    return [layer for layer in layers.children() if isinstance(layer, nn.Linear)]


def by_chunks(f: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype, size: int = 2048) -> Tensor:
    """f(x) in a dtype, f of some rows at a time."""
    return torch.cat([f(part).to(dtype) for part in x.split(size)])


def of_all_types(f: Callable[[Tensor, Tensor], Tensor], h: Tensor, num_types: int | None) -> Tensor:
    """f(h, type) of every type: [M, D]; of one where types are not read."""
    num_types = 1 if num_types is None else num_types
    return torch.cat([f(h, torch.full((), kind, device=h.device)) for kind in range(num_types)])


# -------------------------------------------------------------------------------------------------------------- pools


class AdditivePool:
    """The sum over a set of a table [M, D], for each number of genes a set."""

    def __init__(self, u: Tensor, dtype: torch.dtype, *, mean: bool) -> None:
        self._u, self._dtype, self._mean = u, values_dtype(dtype), mean
        self._rounded = u.to(self._dtype)

    def table(self, k: int) -> Tensor:
        """What is added up, before it is rounded."""
        return self._u / k if self._mean else self._u

    def __call__(self, entries: Tensor) -> Tensor:
        rows = self._rounded[entries]
        return rows.mean(1) if self._mean else rows.sum(1)


class PairwisePool:
    """The sum over pairs of u_i * u_j."""

    def __init__(self, u: Tensor, dtype: torch.dtype) -> None:
        self._u = u.to(values_dtype(dtype))

    def __call__(self, entries: Tensor) -> Tensor:
        before = self._u[entries[:, 0]]
        p = torch.zeros_like(before)
        for column in entries[:, 1:].unbind(1):
            row = self._u[column]
            p.addcmul_(before, row)
            before = before + row
        return p


class ReadoutPool:
    """The mean or sum of `PerturbedGeneReadout`: projections are tables, and the FFN is what a set costs."""

    def __init__(
        self,
        u: Tensor,
        dtype: torch.dtype,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        out: nn.Linear,
        ffn: nn.Sequential,
        norms: tuple[nn.Module, nn.Module],
        rezero: Tensor | None,
        null: tuple[Tensor | None, Tensor | None],
        mean: bool,
    ) -> None:
        """q, k, v [M, H, D / H]; norms are identities beside `rezero`; score [M, H] and value [H, D / H] of a null sink."""
        values, self._mean = values_dtype(dtype), mean
        by_attention, by_ffn = (1.0, 1.0) if rezero is None else rezero.tolist()
        through_out = by_attention * out.weight.unflatten(1, q.shape[1:])
        up, down = linears(ffn)
        null_score, null_value = null

        def row(x: Tensor) -> Tensor:
            return padded(x.to(values))

        def value(v: Tensor) -> Tensor:
            return padded(torch.einsum("...hd,ohd->...ho", v, through_out))

        def norm(layer: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
            return (row(layer.weight), row(layer.bias), layer.eps) if isinstance(layer, nn.LayerNorm) else (None, None, 0.0)

        (weight1, bias1, eps1), (weight2, bias2, eps2) = map(norm, norms)
        self._tables = ReadoutTables(
            query=row((q * q.shape[-1] ** -0.5).mT),
            key=row(k.mT),
            value=by_chunks(value, v, values),
            x=row(u + by_attention * out.bias),
            weight1=weight1, bias1=bias1, eps1=eps1,
            up=up.weight.to(dtype), up_bias=up.bias.to(values),
            down=(by_ffn * down.weight).to(dtype), down_bias=row(by_ffn * down.bias),
            weight2=weight2, bias2=bias2, eps2=eps2,
            null_score=None if null_score is None else null_score.to(values),
            null_value=None if null_value is None else value(null_value).to(values),
        )  # fmt: skip

    def __call__(self, entries: Tensor) -> Tensor:
        mean = readout_mean(entries, self._tables)
        return mean if self._mean else mean * entries.shape[1]


class HyperSAGNNPool:
    """`HyperSAGNN`: the first layer's projections are tables."""

    def __init__(
        self, u: Tensor, dtype: torch.dtype, *, num_heads: int, static: nn.Linear, qkv: Sequence[nn.Linear],
        out: Sequence[nn.Linear], rezero: Tensor,
    ) -> None:  # fmt: skip
        values = values_dtype(dtype)
        self._num_heads = num_heads
        self._x, self._static, self._first = (x.to(values) for x in (u, static(u), qkv[0](u)))
        self._qkv = [(layer.weight.to(dtype), layer.bias.to(values)) for layer in qkv[1:]]
        self._out = [(a * layer.weight).to(dtype) for layer, a in zip(out, rezero, strict=True)]

    def __call__(self, entries: Tensor) -> Tensor:
        d, qkv = self._x[entries], self._first[entries]
        for layer, out in enumerate(self._out):
            if layer > 0:
                qkv = linear(d, *self._qkv[layer - 1])
            d = d + linear(self._attend(qkv), out, None)
        return (d - self._static[entries]).square_().mean(1)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Of each to the others of its set, [B, k, 3 D] -> [B, k, D]; entries one by one, since they are few."""
        q, k, v = qkv.unflatten(-1, (3, self._num_heads, -1)).unbind(2)  # [B, k, H, D / H]
        size, scale = q.shape[1], q.shape[-1] ** -0.5
        if size == 1:
            return torch.zeros_like(v).flatten(2)
        attended = []
        for e in range(size):
            others = [f for f in range(size) if f != e]
            weight = torch.stack([(q[:, e] * k[:, f]).sum(-1, keepdim=True) for f in others], -1).mul_(scale).softmax(-1)
            attended.append(sum(weight[..., i] * v[:, f] for i, f in enumerate(others)))
        return torch.stack(attended, 1).flatten(2)


# --------------------------------------------------------------------------------------------------------- the heads


class ScoreRows:
    """Weights w = exp(s - max_n s) [R, H, N] of the entries that were asked for, made when they first are."""

    def __init__(self, make: Callable[[Tensor], Tensor], num_entries: int, least: int, like: Tensor) -> None:
        """make(entries [R]) -> w [R, H, N]; room for as many rows as half the memory holds, and at least `least`."""
        self._make = make
        example = make(torch.zeros(1, dtype=torch.int64, device=like.device))
        row_bytes = example.numel() * like.element_size()
        available = available_memory(like.device)
        room = num_entries if available is None else available // (2 * row_bytes)
        self._w = torch.empty(min(num_entries, max(room, least)), *example.shape[1:], dtype=like.dtype, device=like.device)
        self._row = torch.full((num_entries,), -1, device=like.device)
        self._count = 0

    def of(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Rows int64 of the entries in a table, and the table."""
        rows = self._row[entries]
        if (rows < 0).any():
            missing = entries[rows < 0].unique()
            if self._count + len(missing) > len(self._w):  # start over with these
                self._row.fill_(-1)
                self._count, missing = 0, entries.unique()
            for part in missing.split(64):
                to = torch.arange(self._count, self._count + len(part), device=part.device)
                self._w[to] = self._make(part).to(self._w.dtype)
                self._row[part] = to
                self._count += len(part)
            rows = self._row[entries]
        return rows, self._w


class HeadScreening:
    """`PerturbationHead` on an encoded cell.

    Where all pools are additive, so are the queries: the weight of gene n in a set's cross-attention is the product of its
    genes' weights, exp of a sum being the product of the exps, and what a batch costs is one product with the values. Each
    entry's weights are divided by their largest. A set whose weights lie so far apart that they underflow together is done
    again as the head does it, and so are sets of other pools: attention of their queries over all genes.
    """

    def __init__(
        self,
        h_cls: Tensor,
        h: Tensor,
        u: Tensor,
        present: Tensor,
        pools: Sequence[SetPool],
        dtype: torch.dtype,
        *,
        num_types: int | None,
        mix: nn.Module,
        cross: tuple[nn.Linear, nn.Linear] | None,
        num_heads: int,
        layers: nn.Sequential,
        phenotype: int,
    ) -> None:
        self.num_genes, self.num_types, self.batch_size = len(h), num_types, BATCH
        self._pools, self._mix, self._dtype, self._values = pools, mix, dtype, values_dtype(dtype)
        first, last = linears(layers)
        self._activation = F.relu if isinstance(layers[1], nn.ReLU) else F.gelu
        phenotype = phenotype_of(phenotype, last.out_features)
        by_cls, by_set = first.weight.split(len(h_cls), dim=1)
        self._up = by_set.to(dtype)
        self._up_bias = (first.bias + by_cls @ h_cls).to(self._values)
        self._down, self._offset = last.weight[phenotype].to(self._values), last.bias[phenotype]
        self._mix_weight = mix.weight.to(dtype) if isinstance(mix, nn.Linear) else None
        self._query: nn.Linear | None = None
        if cross is None:
            return
        self._query, key = cross
        self._num_heads, self._scale = num_heads, (u.shape[1] // num_heads) ** -0.5
        self._query_weight, self._query_bias = self._query.weight.to(dtype), self._query.bias.to(self._values)
        # [H, N, D / H], and of all entries [M, D]
        self._exact_key, self._exact_present = self._heads(key(h)), self._heads(present)
        self._key, self._present = self._exact_key.to(dtype), self._exact_present.to(dtype)
        self._u, self._change = u.to(dtype), (u - present.repeat(len(u) // len(h), 1)).to(self._values)
        # a query's bias is in the weights of all sets
        common = self._scale * (self._exact_key @ self._heads(self._query.bias[None]).mT).squeeze(-1)  # [H, N]
        self._common = (common - common.amax(1, keepdim=True)).exp()
        self._tables: dict[int, tuple[ScoreRows, CrossTables]] = {}

    def __call__(self, entries: Tensor) -> Tensor:
        if self.num_types is None:
            entries = entries % self.num_genes
        if self._query is None:
            z = self._pooled(entries)
        elif all(isinstance(pool, AdditivePool) for pool in self._pools):
            z = self._factored(entries)
        else:
            z = self._attended(entries)
        return mlp(z, self._up, self._up_bias, self._down, self._activation) + self._offset

    def _pooled(self, entries: Tensor) -> Tensor:
        """p [B, D]."""
        p = torch.cat([pool(entries) for pool in self._pools], -1)
        return p if self._mix_weight is None else linear(p, self._mix_weight, None)

    def _factored(self, entries: Tensor) -> Tensor:
        """z [B, D] where p is a sum."""
        k = entries.shape[1]
        if k not in self._tables:
            self._tables = {k: self._additive(k)}  # of one size at a time, for the room
        rows, tables = self._tables[k]
        at, w = rows.of(entries)
        z, total = cross_attention(entries, at, entries % self.num_genes, tables._replace(w=w))
        again = (total < LEAST_TOTAL).any(1).nonzero().squeeze(1)
        return z if len(again) == 0 else z.index_copy(0, again, self._attended(entries[again]))

    def _additive(self, k: int) -> tuple[ScoreRows, CrossTables]:
        """Tables for sets of k genes."""
        assert self._query is not None
        query = self._query
        p = self._mix(torch.cat([pool.table(k) for pool in self._pools if isinstance(pool, AdditivePool)], -1))
        values = torch.cat([self._exact_present, torch.ones_like(self._exact_present[..., :1])], -1)

        def weights(entries: Tensor) -> Tensor:
            """[R, H, N]"""
            s = self._scale * (self._heads(p[entries] @ query.weight.mT) @ self._exact_key.mT)
            return (s - s.amax(-1, keepdim=True)).exp_().transpose(0, 1)

        rows = ScoreRows(weights, len(p), k * self.batch_size, self._change)
        tables = CrossTables(
            w=self._change,  # of a batch
            value=(values * self._common[..., None]).to(self._dtype).contiguous(),
            bias=self._common.to(self._values),
            add=p.to(self._values),
            change=self._change,
        )
        return rows, tables

    def _attended(self, entries: Tensor) -> Tensor:
        """z [B, D] as the head makes it, some sets at a time."""
        return torch.cat([self._attended_batch(part) for part in entries.split(4096)])

    def _attended_batch(self, entries: Tensor) -> Tensor:
        p = self._pooled(entries)
        q = self._heads(linear(p, self._query_weight, self._query_bias)).to(self._dtype)
        ptr = torch.arange(len(entries) + 1, device=entries.device) * entries.shape[1]
        override = self._heads(self._u[entries.flatten()])
        index = entries.flatten() % self.num_genes
        z = perturbation_attention(q, self._key, self._present, index, ptr, override, scale=self._scale)
        return p + z.to(self._values).transpose(0, 1).flatten(1)

    def _heads(self, x: Tensor) -> Tensor:
        """[n, D] -> [H, n, D / H]."""
        return x.unflatten(-1, (self._num_heads, -1)).transpose(0, 1)


class PairwiseScreening:
    """`PairwiseInteraction`: single effects and the interactions of pairs are numbers.

    Pairs of sets of three and more come again and again: their interactions are kept where there is room for all pairs.
    """

    def __init__(
        self,
        u: Tensor,
        dtype: torch.dtype,
        *,
        num_genes: int,
        num_types: int,
        single: Tensor,
        bias: Tensor,
        layers: nn.Sequential,
        phenotype: int,
    ) -> None:
        self.num_genes, self.batch_size = num_genes, BATCH
        self.num_types: int | None = num_types
        values = values_dtype(dtype)
        first, last = linears(layers)
        phenotype = phenotype_of(phenotype, last.out_features)
        self._u, self._single, self._bias = u.to(values), u @ single[phenotype], bias[phenotype]
        self._up, self._up_bias = first.weight.to(dtype), first.bias.to(values)
        self._down, self._offset = last.weight[phenotype].to(values), last.bias[phenotype]
        available = available_memory(u.device)
        self._known: Tensor | None = None
        self._room = available is None or len(u) ** 2 * self._u.element_size() <= available // 4

    def __call__(self, entries: Tensor) -> Tensor:
        size = entries.shape[1]
        y = self._bias + self._single[entries].sum(1)
        if size == 2:
            return y + self._interaction(entries)
        pairs = [entries[:, [e, f]] for f in range(size) for e in range(f)]
        return y if not pairs else y + self._looked_up(torch.stack(pairs, 1))

    def _looked_up(self, pairs: Tensor) -> Tensor:
        """Sum of the interactions of pairs [B, P, 2]: [B]."""
        if not self._room:
            return self._interaction(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2]).sum(1)
        if self._known is None:
            self._known = self._u.new_full((len(self._u) ** 2,), torch.nan)
        place = pairs.amin(2) * len(self._u) + pairs.amax(2)
        found = self._known[place]
        unknown = found.isnan()
        if unknown.any():
            new = place[unknown].unique()
            both = torch.stack([new // len(self._u), new % len(self._u)], 1)
            self._known[new] = self._interaction(both).to(self._known.dtype)
            found = self._known[place]
        return found.double().sum(1)

    def _interaction(self, pairs: Tensor) -> Tensor:
        """Of pairs [P, 2] of entries: [P]."""
        parts = []
        for part in pairs.split(BATCH):
            first, second = self._u[part[:, 0]], self._u[part[:, 1]]
            x = torch.cat([first + second, first * second], 1)
            parts.append(mlp(x, self._up, self._up_bias, self._down) + self._offset)
        return torch.cat(parts) if parts else self._u.new_empty(0)


class PooledScreening:
    """A pool and a linear layer: `Dango`."""

    def __init__(self, pool: SetPool, dtype: torch.dtype, *, num_genes: int, out: nn.Linear, phenotype: int) -> None:
        self.num_genes, self.batch_size = num_genes, 4096
        self.num_types: int | None = None
        phenotype = phenotype_of(phenotype, out.out_features)
        self._pool = pool
        self._weight, self._bias = out.weight[phenotype].to(values_dtype(dtype)), out.bias[phenotype]

    def __call__(self, entries: Tensor) -> Tensor:
        return self._pool(entries % self.num_genes) @ self._weight + self._bias  # DANGO reads no types


class CalledScreening:
    """A function of ragged batches of sets: `WildtypeDifference`, given the cell encoded."""

    def __init__(
        self, call: Callable[[Tensor, Tensor, Tensor], Tensor], *, num_genes: int, num_types: int, batch_size: int
    ) -> None:
        self.num_genes, self.num_types, self.batch_size = num_genes, num_types, batch_size
        self._call = call

    def __call__(self, entries: Tensor) -> Tensor:
        ptr = torch.arange(len(entries) + 1, device=entries.device) * entries.shape[1]
        return self._call(entries.flatten() % self.num_genes, ptr, entries.flatten() // self.num_genes)
