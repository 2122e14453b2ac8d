"""The perturbed genes of a set beside each other: the rows of a read-out over all genes that are read, and no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._check import require, require_count, require_ragged
from ..ops.set_attention import set_attention
from ._check import require_features, require_max_size, require_probability
from .screening import ReadoutPool


class PerturbedGeneReadout(nn.Module):
    """Cross-attention of each gene of a set to its set, itself included, then an FFN, each residual and normalised.

        y_e = norm_1(x_e + W_o Attention(W_q x_e; W_k x_f, W_v x_f for f in S))
        z_e = norm_2(y_e + FFN(y_e))

    The rows of the set in a read-out where all N genes attend to S, an FFN runs on [B, N, dim] and only the rows in S are read:
    an entry asks for nothing but its own set, so the others are never made, and the cost is that of sum |S|.

    Args:
        dim: width of the embeddings.
        num_heads: heads of the attention, a divisor of dim.
        ffn_dim: hidden width of the GELU FFN; `4 * dim` by default.
        dropout: probability on the residual branches.
        max_size: see `HyperSAGNN`.

    Raises:
        ValueError: a size out of range. TypeError: one of a wrong type.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        ffn_dim: int | None = None,
        dropout: float = 0.0,
        max_size: int | None = None,
    ) -> None:
        super().__init__()
        ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        for name, value in {"dim": dim, "num_heads": num_heads, "ffn_dim": ffn_dim}.items():
            require_count(name, value, minimum=1)
        require(dim % num_heads == 0, f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        require_probability("dropout", dropout)
        require_max_size(max_size)
        self.dim, self.num_heads, self.max_size = dim, num_heads, max_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, ptr: Tensor) -> Tensor:
        """Read the perturbed genes.

        Args:
            x: [nnz, dim], floating, the genes of all sets one after another: `F.embedding(seeds, h)` of encoded genes h.
            ptr: int64 [B+1], where each set begins and ends in x.

        Returns:
            [nnz, dim], one row a gene of a set.

        Raises:
            ValueError: a shape, dtype or `ptr` that does not fit, or a set of more than `max_size` genes.
        """
        require_features("x", x, self.dim, self.out.weight, ndim=2)
        require_ragged("x", torch.empty(len(x), dtype=torch.int64, device=x.device), ptr)  # as long as x
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        attended = set_attention(q, k, v, ptr, self.max_size, include_self=True).flatten(1)
        y = self.norm1(x + self.dropout(self.out(attended)))
        return self.norm2(y + self.dropout(self.ffn(y)))

    def screening(self, x: Tensor, dtype: torch.dtype) -> ReadoutPool:
        """The mean over sets of entries, whose embeddings x are [M, dim]: see `SetPool`."""
        return ReadoutPool(
            x, dtype, num_heads=self.num_heads, qkv=self.qkv, out=self.out, ffn=self.ffn, norms=(self.norm1, self.norm2)
        )
