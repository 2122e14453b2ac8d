"""The entries of a row or a column of a hard mask: how they are read, what their scores get, and which of them stay."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device functions: their arguments are described where they are declared)
from __future__ import annotations

import triton
import triton.language as tl

from .dropout import read_draw, share_kept, single_kept

LOG2E = tl.constexpr(1.4426950408889634)

# Sizes: L leading dimensions as one, H heads, N genes, T = num_prefix + N tokens, K relations, E entries, S segments. Strides
# of rows are constants of the kernel, and those of heads are multiples of ALIGN, as in row_dot.py.

SIZES = ["num_leading", "num_genes", "num_heads", "num_ties", "max_segments", "num_segments", "num_prefix", "threshold"]
SIZES += [f"stride_{x}{dim}" for x in ("q", "k", "v", "do") for dim in "lh"]


@triton.jit
def gather(p_x, b_row, m_e, STRIDE: tl.constexpr, W: tl.constexpr, PAD: tl.constexpr):
    """Rows of x as float32 [EDGES, PAD], zeros where masked."""
    # [PAD]
    o_x = tl.arange(0, PAD)
    p_b = p_x + b_row.to(tl.int64)[:, None] * STRIDE + o_x[None, :]
    return tl.load(p_b, mask=m_e[:, None] & (o_x < W)[None, :], other=0.0).to(tl.float32)


@triton.jit
def row_at(p_x, W: tl.constexpr, PAD: tl.constexpr):
    """One row as float32 [PAD]."""
    o_x = tl.arange(0, PAD)
    return tl.load(p_x + o_x, mask=o_x < W, other=0.0).to(tl.float32)


@triton.jit
def added(log_weight_ptr, bias2, o_e, m_e):
    """What the scores of entries get, in base 2: the logarithm of the weight, and the bias of the tie."""
    b_added = tl.where(m_e, bias2, 0.0)
    if log_weight_ptr is not None:
        b_added += tl.load(log_weight_ptr + o_e, mask=m_e, other=0.0) * LOG2E
    return b_added


@triton.jit
def bias_of(bias_ptr, tie):
    bias2 = 0.0
    if bias_ptr is not None:
        bias2 = tl.load(bias_ptr + tie) * LOG2E
    return bias2


@triton.jit
def line_of(draw_ptr, threshold, i_l, num_heads, head, token):
    """Of a row or a column of the map of a head, what `factor` takes."""
    return read_draw(draw_ptr, threshold), i_l * num_heads + head, token.to(tl.int32)


@triton.jit
def factor(line, copy, o_other, BY_ROW: tl.constexpr):
    """Z [EDGES] of entries in a row (BY_ROW) or a column, at the tokens o_other [EDGES] along it: 0 or 1 / (1 - p)."""
    draw, i_lh, token = line
    o_other = o_other.to(tl.int32)
    value = 1 / share_kept(draw[2])
    if BY_ROW:
        return single_kept(draw, copy, i_lh, token, o_other, value)
    return single_kept(draw, copy, i_lh, o_other, token, value)
