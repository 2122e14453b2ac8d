"""Reading mutants out of one encoded cell: a batch of perturbation sets against the genes they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._check import count_of, counts_of, require, require_choice, require_several
from .._profiling import spanned
from ..ops import perturbation_attention
from ..ops.set_sum import set_mean, set_sum
from ._check import max_size_of, probability_of, read_by, require_features, require_perturbations
from .hypersagnn import HyperSAGNN
from .readout import PerturbedGeneReadout
from .screening import AdditivePool, HeadScreening, PairwisePool, ReadoutPool, of_all_types, require_readable

POOLS = ("mean", "sum", "hypersagnn", "pairwise", "readout", "readout_sum")
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
PRESENT = 0  # the perturbation type of every gene outside the set


class PerturbationFeatures(nn.Module):
    """phi(h, m) = W_2 gelu(W_1 [h ‖ onehot(m)] + b_1) + b_2, a gene's embedding under perturbation type m."""

    def __init__(self, dim: int, num_types: int, hidden_dim: int) -> None:
        super().__init__()
        # W_1 on a concatenation is the sum of W_1 on its parts, and W_1 on a one-hot is a row of a table
        self.by_gene = nn.Linear(dim, hidden_dim)
        self.by_type = nn.Embedding(num_types, hidden_dim)
        self.out = nn.Linear(hidden_dim, dim)
        nn.init.normal_(self.by_type.weight, std=dim**-0.5)

    def forward(self, h: Tensor, types: Tensor) -> Tensor:
        """h [n, dim] under types int64, [n] or one for all [], gives [n, dim]."""
        return self.out(F.gelu(self.by_gene(h) + self.by_type(types)))


class PairwiseSum(nn.Module):
    """Sum over pairs i < j of a set of u_i * u_j; zeros for a set of one or none, which have no pairs."""

    def forward(self, u: Tensor, ptr: Tensor) -> Tensor:
        """u [nnz, D], ptr int64 [B+1] -> [B, D], at least float32, since it is a difference of two sums."""
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        return (set_sum(u, ptr).square() - set_sum(u.square(), ptr)) / 2

    def screening(self, u: Tensor, dtype: torch.dtype) -> PairwisePool:
        """See `SetPool`."""
        return PairwisePool(u, dtype)


class SetReduce(nn.Module):
    """Sum or mean of a set's entries; zeros for an empty set."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mean = kind == "mean"  # not the function: an operator can be neither copied nor pickled

    def forward(self, u: Tensor, ptr: Tensor) -> Tensor:
        """u [nnz, D], ptr int64 [B+1] -> [B, D]."""
        return set_mean(u, ptr) if self.mean else set_sum(u, ptr)

    def screening(self, u: Tensor, dtype: torch.dtype) -> AdditivePool:
        """See `SetPool`."""
        return AdditivePool(u, dtype, mean=self.mean)


class Unread(nn.Module):
    """phi(h, m) = h: perturbation types are not read."""

    def forward(self, h: Tensor, types: Tensor) -> Tensor:
        """h [n, dim]."""
        return h


class ReadoutReduce(nn.Module):
    """Mean or sum over a set of the rows of `PerturbedGeneReadout`; zeros for an empty set."""

    def __init__(self, readout: PerturbedGeneReadout, *, mean: bool) -> None:
        super().__init__()
        self.readout, self.mean = readout, mean

    def forward(self, u: Tensor, ptr: Tensor) -> Tensor:
        """u [nnz, D], ptr int64 [B+1] -> [B, D]."""
        rows = self.readout(u, ptr)
        return set_mean(rows, ptr) if self.mean else set_sum(rows, ptr)

    def screening(self, u: Tensor, dtype: torch.dtype) -> ReadoutPool:
        """See `SetPool`."""
        return self.readout.screening(u, dtype, mean=self.mean)


def _pool(
    kind: str, dim: int, num_heads: int | None, max_size: int | None, residual: str, null_sink: float | None
) -> nn.Module:
    require_choice("pool", kind, POOLS)
    num_heads = (4 if dim % 4 == 0 else 1) if num_heads is None else num_heads
    if kind == "hypersagnn":
        return HyperSAGNN(dim, num_heads, max_size=max_size)
    if kind in ("readout", "readout_sum"):
        readout = PerturbedGeneReadout(dim, num_heads, max_size=max_size, residual=residual, null_sink=null_sink)
        return ReadoutReduce(readout, mean=kind == "readout")
    return PairwiseSum() if kind == "pairwise" else SetReduce(kind)


class PerturbationHead(nn.Module):
    """Predict the phenotype of each set S of perturbed genes from the cell encoded once.

        u_e   = phi(h_i, m_i)                      for entry e of S: gene i under perturbation type m_i
        p_S   = pool of u_e over S                 zeros for an empty set
        beta  = softmax_i(W_q p_S . W_k h_i)       over all genes, at scale 1 / sqrt(head_dim)
        z_S   = p_S + sum_i beta_i phi(h_i, m_i)   m_i is "present" outside S
        y_S   = MLP([h_CLS ‖ z_S])

    Without cross-attention z_S = p_S.

    Two published heads, and which options are theirs: the mean of h over S as one query to all genes is `pool="mean"`; all
    genes attending to S, an FFN, the rows in S pooled and MLP([h_CLS ‖ z]) is `num_types=None, num_heads=0,
    pool="readout"` (their mean) or `"readout_sum"`, `activation="relu", hidden_dim=dim`, with `readout_residual` and
    `readout_null_sink` as theirs.

    Args:
        dim: width of the encoder's output.
        num_types: number of perturbation types; type 0 is "present", the type of every gene outside the set
            (`len(cellattn.data.PERTURBATION_TYPES)`). None: types are not read, phi(h, m) = h.
        pool: "mean", "sum", "hypersagnn", "readout" or "readout_sum" (mean and sum of `PerturbedGeneReadout`) or "pairwise"
            (the sum over pairs of u_i * u_j, so that interactions of two genes are expressible; a set of one has no pairs and
            gives zeros), or several, concatenated and projected.
        num_heads: heads of the cross-attention, a divisor of dim; 0 for none of it.
        pool_heads: heads of the pools "hypersagnn" and "readout"; 4 by default where they divide dim, else 1.
        readout_residual, readout_null_sink: `residual` and `null_sink` of `PerturbedGeneReadout`, for the pools made of it.
        hidden_dim: hidden width of phi and of the MLP; `2 * dim` by default.
        activation: of the MLP, "gelu" or "relu".
        out_dim: phenotypes predicted.
        dropout: probability in the hidden layer of the MLP.
        max_size: see `HyperSAGNN`; other pools do not need it.

    Raises:
        ValueError: a size or pool out of range. TypeError: one of a wrong type.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_types: int | None,
        pool: str | Sequence[str] = "sum",
        num_heads: int = 1,
        pool_heads: int | None = None,
        readout_residual: str = "post",
        readout_null_sink: float | None = None,
        hidden_dim: int | None = None,
        activation: str = "gelu",
        out_dim: int = 1,
        dropout: float = 0.1,
        max_size: int | None = None,
    ) -> None:
        super().__init__()
        max_size = max_size_of(max_size)
        hidden_dim = 2 * dim if hidden_dim is None else hidden_dim
        dim, hidden_dim, out_dim = counts_of(minimum=1, dim=dim, hidden_dim=hidden_dim, out_dim=out_dim)
        num_types = None if num_types is None else count_of("num_types", num_types, minimum=1)
        require_choice("activation", activation, ACTIVATIONS)
        num_heads = count_of("num_heads", num_heads)
        require(num_heads == 0 or dim % num_heads == 0, f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        dropout = probability_of("dropout", dropout)
        if not isinstance(pool, str):
            require_several("pool", pool, "a name or several")
        kinds = (pool,) if isinstance(pool, str) else tuple(pool)
        require(len(kinds) > 0, "pool: expected at least one, got none")
        require(len(set(kinds)) == len(kinds), f"pool: expected each once, got {kinds}")
        self.dim, self.num_types, self.num_heads, self.out_dim = dim, num_types, num_heads, out_dim
        self.phi = Unread() if num_types is None else PerturbationFeatures(dim, num_types, hidden_dim)
        self.pools = nn.ModuleList(
            _pool(kind, dim, pool_heads, max_size, readout_residual, readout_null_sink) for kind in kinds
        )
        # no bias: an empty set stays zero
        self.mix = nn.Linear(len(kinds) * dim, dim, bias=False) if len(kinds) > 1 else nn.Identity()
        if num_heads > 0:
            self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(2 * dim, hidden_dim), ACTIVATIONS[activation](), nn.Dropout(dropout), nn.Linear(hidden_dim, out_dim)
        )

    @spanned("head")
    def forward(self, h_cls: Tensor, h: Tensor, seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
        """Predict all sets of a batch.

        Args:
            h_cls: [dim], floating, the encoded CLS token.
            h: [N, dim], floating, the encoded genes.
            seeds: int64 [nnz], gene indices of all sets one after another, no gene twice in a set.
            ptr: int64 [B+1], where each set begins and ends in seeds.
            types: int64 [nnz], perturbation types; of any number where they are not read.

        Returns:
            [B, out_dim], in the phenotype's units.

        Raises:
            ValueError: a shape, dtype, index or `ptr` that does not fit (values are read on the CPU alone).
        """
        weight = next(self.mlp.parameters(), None)  # not of a layer by its place: whatever is wrapped around it may have none
        require_features("h_cls", h_cls, self.dim, weight, ndim=1)
        require_features("h", h, self.dim, weight, ndim=2)
        require_perturbations(seeds, ptr, types, h.shape[0], self.num_types, h.device)
        # embedding: the backward of h[seeds] adds in an order that varies from run to run on several CPU threads
        u = self.phi(F.embedding(seeds, h), types)
        p = self.mix(read_by(weight, torch.cat([pool(u, ptr) for pool in self.pools], dim=-1)))
        z = p + self._cross_attention(p, h, u, seeds, ptr) if self.num_heads > 0 else p
        return self.mlp(torch.cat([h_cls.expand(z.shape[0], -1), z], dim=-1))

    @torch.no_grad()
    def screening(self, h_cls: Tensor, h: Tensor, *, phenotype: int, dtype: torch.dtype) -> HeadScreening:
        """See `Screening`: what `forward` predicts, given the same cell.

        Raises:
            NotReadableError: where that is not what its weights say.
        """

        def predict(few: Tensor, seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
            return self(h_cls, few, seeds, ptr, types)[:, 0]

        require_readable(self, h, lambda few: self._screening(h_cls, few, 0, h.dtype), predict)
        return self._screening(h_cls, h, phenotype, dtype)

    def _screening(self, h_cls: Tensor, h: Tensor, phenotype: int, dtype: torch.dtype) -> HeadScreening:
        u = of_all_types(self.phi, h, self.num_types)
        pools = [pool.screening(u, dtype) for pool in self.pools]  # type: ignore[operator]
        cross = (self.query, self.key) if self.num_heads > 0 else None
        return HeadScreening(
            h_cls, h, u, self._present(h), pools, dtype, num_types=self.num_types, mix=self.mix, cross=cross,
            num_heads=self.num_heads, layers=self.mlp, phenotype=phenotype,
        )  # fmt: skip

    def _present(self, h: Tensor) -> Tensor:
        return self.phi(h, torch.full((), PRESENT, device=h.device))

    def _cross_attention(self, p: Tensor, h: Tensor, u: Tensor, seeds: Tensor, ptr: Tensor) -> Tensor:
        query, key, value, override = map(self._heads, (self.query(p), self.key(h), self._present(h), u))
        z = perturbation_attention(query, key, value, seeds, ptr, override, scale=query.shape[-1] ** -0.5)
        return z.transpose(0, 1).flatten(1)

    def _heads(self, x: Tensor) -> Tensor:
        """[n, dim] -> [num_heads, n, dim / num_heads]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
