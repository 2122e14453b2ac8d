"""Hyper-SAGNN over sets of genes (Zhang, Zou, Ma 2020), in the ReZero form that DANGO uses (Zhang et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._check import count_of, require, require_ragged
from ..ops.set_attention import set_attention
from ..ops.set_sum import set_mean
from ._check import max_size_of, require_features
from .screening import HyperSAGNNPool, linears


class HyperSAGNN(nn.Module):
    """Pool a set by how far the others of the set move each of its genes: the mean over the set of (d_i - s_i)^2.

    The static embedding s_i = W_s x_i knows gene i alone. The dynamic embedding starts at d_i = x_i and runs through
    layers d_i + a_l W_o Attention_i(d), where a gene attends to the others of its set and never to itself, so that for
    a set of one the attention is zero. a_l starts at 0 (ReZero).

    Args:
        dim: width of the embeddings.
        num_heads: heads of the attention, a divisor of dim.
        num_layers: attention layers.
        max_size: no set has more genes. Without, every call on a GPU waits until the longest set is known, and cannot be
            captured in a CUDA graph.

    Raises:
        ValueError: a size out of range. TypeError: one of a wrong type.
    """

    def __init__(self, dim: int, num_heads: int = 4, num_layers: int = 2, *, max_size: int | None = None) -> None:
        super().__init__()
        dim = count_of("dim", dim, minimum=1)
        num_heads = count_of("num_heads", num_heads, minimum=1)
        num_layers = count_of("num_layers", num_layers, minimum=1)
        require(dim % num_heads == 0, f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        max_size = max_size_of(max_size)
        self.dim, self.num_heads, self.max_size = dim, num_heads, max_size
        self.static = nn.Linear(dim, dim)
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(num_layers))
        self.out = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(num_layers))
        self.rezero = nn.Parameter(torch.zeros(num_layers))

    def forward(self, x: Tensor, ptr: Tensor) -> Tensor:
        """Pool the sets.

        Args:
            x: [nnz, dim], floating, the genes of all sets one after another.
            ptr: int64 [B+1], where each set begins and ends in x.

        Returns:
            [B, dim], zeros for an empty set.

        Raises:
            ValueError: a shape, dtype or `ptr` that does not fit, or a set of more than `max_size` genes.
        """
        require_features("x", x, self.dim, self.rezero, ndim=2)
        require_ragged("x", torch.empty(x.shape[0], dtype=torch.int64, device=x.device), ptr)  # as long as x
        d = x
        for qkv, out, a in zip(self.qkv, self.out, self.rezero, strict=True):
            q, k, v = qkv(d).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
            d = d + a * out(set_attention(q, k, v, ptr, self.max_size).flatten(1))
        return set_mean((d - self.static(x)).square(), ptr)

    def screening(self, x: Tensor, dtype: torch.dtype) -> HyperSAGNNPool:
        """Pools sets of entries, whose embeddings x are [M, dim]: see `SetPool`."""
        return HyperSAGNNPool(
            x, dtype, num_heads=self.num_heads, static=self.static, qkv=linears(self.qkv), out=linears(self.out),
            rezero=self.rezero,
        )  # fmt: skip
