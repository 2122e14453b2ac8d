"""The drawn non-edges of a graph: `nonedges`, by bisection (see ops/_negatives.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import on_device, options
from .tensors import check_devices


@triton.jit(do_not_specialize=["num_genes", "first_row", "num_draws", "steps"])
def nonedges_kernel(
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    by_rank_ptr,  # int64 [N]: the known genes, ascending, then others
    rank_of_ptr,  # int64 [N]: of each known gene among them
    gene_ptr,  # int64 [M]
    rank_ptr,  # int64 [M]
    out_ptr,  # out, int64 [M]
    num_genes,
    first_row,
    num_draws,  # M
    steps,  # of a bisection of a row
    BLOCK: tl.constexpr,
):
    """The non-edges of the given ranks, a draw a lane."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_o = o < num_draws
    p_row = rowptr_ptr + first_row + tl.load(gene_ptr + o, mask=m_o, other=0)
    b_rank = tl.load(rank_ptr + o, mask=m_o, other=0)
    b_first = tl.load(p_row, mask=m_o, other=0)
    b_low = tl.zeros([BLOCK], tl.int64)
    b_high = tl.load(p_row + 1, mask=m_o, other=0) - b_first
    for _ in range(steps):
        m_open = b_low < b_high
        b_middle = (b_low + b_high) // 2
        b_col = tl.load(col_ptr + b_first + b_middle, mask=m_open, other=0)
        m_before = tl.load(rank_of_ptr + b_col, mask=m_open, other=0) - b_middle <= b_rank
        b_low = tl.where(m_open & m_before, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_before, b_middle, b_high)
    b_out = tl.load(by_rank_ptr + tl.minimum(b_rank + b_low, num_genes - 1), mask=m_o, other=0)
    tl.store(out_ptr + o, b_out, mask=m_o)


def nonedges(
    rowptr: Tensor, col: Tensor, by_rank: Tensor, rank_of: Tensor, gene: Tensor, rank: Tensor, relation: int
) -> Tensor:
    """`cellattn::nonedges` on a GPU: int64 [M]."""
    check_devices(rowptr=rowptr, col=col, by_rank=by_rank, rank_of=rank_of, gene=gene, rank=rank)
    num_genes, num_draws, block = by_rank.shape[0], rank.shape[0], 256
    out = torch.empty_like(rank)
    if num_draws > 0:
        with on_device(rank):
            nonedges_kernel[(triton.cdiv(num_draws, block),)](
                rowptr, col, by_rank, rank_of, gene.contiguous(), rank.contiguous(), out, num_genes, relation * num_genes,
                num_draws, num_genes.bit_length(), BLOCK=block, **options(4),
            )  # fmt: skip
    return out
