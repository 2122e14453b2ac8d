"""How the kernels of attention read rows, and what they are compiled for (see attention.py)."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device functions: their arguments are described where they are declared)
from __future__ import annotations

import triton
import triton.language as tl

# Integers are not specialised on their values, so that a new length or batch compiles nothing: all that the loads need to
# know of the strides is in ALIGN. Rows are loaded up to the column W >= D (of v and do, WV >= DV), a multiple of ALIGN, zeros
# from D on.
STRIDES = [*(f"s_{x}{dim}" for x in ("q", "k", "v", "do") for dim in "bht"), "s_mb", "s_mh"]
SIZES = ["threshold", "L", "H", "Tq", "Tk", "NS", "part", *STRIDES]


@triton.jit
def load_tile(p, m_rows, o_cols, COLS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK] at p, 0 in the columns past COLS and, where MASKED, in the rows outside m_rows."""
    if MASKED and COLS < BLOCK:
        b = tl.load(p, mask=m_rows[:, None] & (o_cols[None, :] < COLS), other=0.0)
    elif MASKED:
        b = tl.load(p, mask=m_rows[:, None], other=0.0)
    elif COLS < BLOCK:
        b = tl.load(p, mask=o_cols[None, :] < COLS, other=0.0)
    else:
        b = tl.load(p)
    return b
