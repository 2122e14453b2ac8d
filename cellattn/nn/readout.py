"""Genes that attend to a perturbation set: those of the set itself, or any others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._check import counts_of, number_of, require, require_choice, require_ragged
from ..ops.set_attention import set_attention
from ..ops.set_sum import set_size
from ._check import max_size_of, probability_of, read_directly, require_features
from .screening import ReadoutPool

RESIDUALS = ("post", "rezero")


class PerturbedGeneReadout(nn.Module):
    """Cross-attention of each gene of a set to its set, itself included, then an FFN, each with a residual.

        post:    y_e = norm_1(x_e + c_e) ,  z_e = norm_2(y_e + FFN(y_e))        c_e = W_o sum_f p_ef W_v x_f + b_o
        rezero:  y_e = x_e + a_1 c_e ,      z_e = y_e + a_2 FFN(y_e)            a_1 and a_2 start at 0

        p_ef = exp(s_ef) / (sum_g exp(s_eg)  [+ exp(s_e0)]) ,   s_ef = (W_q x_e) . (W_k x_f) / sqrt(head_dim) ,   f, g in S
        s_e0 = (W_q x_e) . b_k / sqrt(head_dim) + b                              of a null sink, whose value is b_v

    These are the rows of the set in the published read-out from genes to the set: all N genes attend to S
    (`nn.MultiheadAttention`, the genes as queries, those of S as keys and values), an FFN runs on [B, N, dim] and only the rows
    in S are read. An entry asks for nothing but its own set, so the others are never made, and the cost is that of sum |S|.
    Where others are read too, such as the expression of each gene, they are asked for as `genes`.

    The published null sink is a row of zeros beside those of S, to be projected as they are, whose score has a learned number b
    added to it, the same in all heads: an entry may look away from its set. Without one the weight of a gene alone in its set
    is 1, and W_q and W_k have no gradient.

    Args:
        dim: width of the embeddings.
        num_heads: heads of the attention, a divisor of dim.
        ffn_dim: hidden width of the GELU FFN; `4 * dim` by default.
        dropout: probability on the residual branches.
        max_size: see `HyperSAGNN`.
        residual: "post" (a LayerNorm after each) or "rezero" (none).
        null_sink: b at the start, such as 0.0; None for no sink. `null_bias.requires_grad_(False)` keeps it there.

    Raises:
        ValueError: a size or choice out of range. TypeError: one of a wrong type.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        ffn_dim: int | None = None,
        dropout: float = 0.0,
        max_size: int | None = None,
        residual: str = "post",
        null_sink: float | None = None,
    ) -> None:
        super().__init__()
        ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        dim, num_heads, ffn_dim = counts_of(minimum=1, dim=dim, num_heads=num_heads, ffn_dim=ffn_dim)
        require(dim % num_heads == 0, f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        dropout = probability_of("dropout", dropout)
        max_size = max_size_of(max_size)
        require_choice("residual", residual, RESIDUALS)
        if null_sink is not None:
            null_sink = number_of("null_sink", null_sink)
        self.dim, self.num_heads, self.max_size = dim, num_heads, max_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        norms = residual == "post"
        self.norm1, self.norm2 = (nn.LayerNorm(dim) if norms else nn.Identity() for _ in range(2))
        self.rezero = None if norms else nn.Parameter(torch.zeros(2))
        self.null_bias = None if null_sink is None else nn.Parameter(torch.tensor([float(null_sink)]))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, ptr: Tensor, *, genes: Tensor | None = None) -> Tensor:
        """Read the perturbed genes, or any genes, beside each set.

        Args:
            x: [nnz, dim], floating, the genes of all sets one after another: `F.embedding(seeds, h)` of encoded genes h.
            ptr: int64 [B+1], where each set begins and ends in x.
            genes: [G, dim], of one dtype with x: h itself for all, or some of its rows. Each attends to each set; beside an
                empty one c is 0, and so it is with a sink.

        Returns:
            [nnz, dim], one row a gene of a set; of `genes` [B, G, dim].

        Raises:
            ValueError: a shape, dtype or `ptr` that does not fit, or a set of more than `max_size` genes.
        """
        require_features("x", x, self.dim, getattr(self.out, "weight", None), ndim=2)
        require_ragged("x", torch.empty(x.shape[0], dtype=torch.int64, device=x.device), ptr)  # as long as x
        q, k, v = self._heads(self.qkv(x))
        if genes is None:
            null_score, null_value = self._null(q)
            attended = set_attention(q, k, v, ptr, self.max_size, True, null_score, null_value)
            return self._add(x, self.out(attended.flatten(1)))
        require_features("genes", genes, self.dim, getattr(self.out, "weight", None), ndim=2)
        qkv = read_directly("qkv", self.qkv)
        weight, bias = qkv.weight[: self.dim], qkv.bias[: self.dim]
        queries = F.linear(genes, weight, bias).unflatten(-1, (self.num_heads, -1))
        attended = self.out(self._attend_to_all(queries, k, v, ptr).flatten(2))
        return self._add(genes, attended.masked_fill((ptr.diff() == 0)[:, None, None], 0))

    def screening(self, x: Tensor, dtype: torch.dtype, *, mean: bool) -> ReadoutPool:
        """The mean or sum over sets of entries, whose embeddings x are [M, dim]: see `SetPool`."""
        q, k, v = self._heads(self.qkv(x))
        return ReadoutPool(
            x, dtype, q, k, v, out=self.out, ffn=self.ffn, norms=(self.norm1, self.norm2), rezero=self.rezero,
            null=self._null(q), mean=mean,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        name = f"{prefix}null_bias"
        if name in state_dict and state_dict[name].ndim == 0:  # as it was saved before `fully_shard` could take it
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *more)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, 3 dim] -> q, k and v [n, H, D]."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        return q, k, v

    def _null(self, q: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Score s_e0 [n, H] of queries [n, H, D], and value [H, D], of the null sink: what a row of zeros is projected to."""
        if self.null_bias is None:
            return None, None
        _, key, value = self.qkv.bias.unflatten(0, (3, self.num_heads, -1))
        return (q * key).sum(-1) * q.shape[-1] ** -0.5 + self.null_bias, value

    def _attend_to_all(self, q: Tensor, k: Tensor, v: Tensor, ptr: Tensor) -> Tensor:
        """Queries [G, H, D] to each set of k, v [nnz, H, D]: [B, G, H, D], anything of an empty one."""
        size = min(set_size(ptr, self.max_size), k.shape[0])
        entry = ptr[:-1, None] + torch.arange(size, device=ptr.device)
        inside = entry < ptr[1:, None]
        entry = entry.where(inside, 0)
        inside = inside | (ptr.diff() == 0)[:, None]  # whatever an empty set gives is not read, and may not be NaN
        # embedding: the backward of an index adds in an order that varies from run to run on several CPU threads
        key, value = (F.embedding(entry, x.flatten(1)).unflatten(-1, x.shape[1:]) for x in (k, v))  # [B, M, H, D]
        score = torch.einsum("ghd,bmhd->bghm", q, key) * q.shape[-1] ** -0.5
        score = score.masked_fill(~inside[:, None, None], -torch.inf)
        null_score, null_value = self._null(q)
        if null_score is not None and null_value is not None:
            score = torch.cat([score, null_score.to(score.dtype).expand(score.shape[0], -1, -1)[..., None]], -1)
            null_value = null_value.to(value.dtype).expand(value.shape[0], 1, -1, -1)
            value = torch.cat([value, null_value], 1)
        return torch.einsum("bghm,bmhd->bghd", score.softmax(-1).to(value.dtype), value)

    def _add(self, x: Tensor, c: Tensor) -> Tensor:
        """z of x [..., dim] and what attention gave [..., dim]."""
        if self.rezero is None:
            y = self.norm1(x + self.dropout(c))
            return self.norm2(y + self.dropout(self.ffn(y)))
        y = x + self.rezero[0] * self.dropout(c)
        return y + self.rezero[1] * self.dropout(self.ffn(y))
