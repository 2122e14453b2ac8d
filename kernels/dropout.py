"""Which entries of an attention map are dropped, as `cellattn/ops/_dropout.py` has it: the same bits on every device.

A tile makes its bits where it needs them, forward and backward, and stores none. Eight entries in columns 8 apart share a
counter of Philox, as they share a thread in the layout of a matrix unit's results: forward and dq exchange nothing. Seed and
offset are read from memory by the kernel, so that a captured CUDA graph, which draws them anew at each replay, drops anew.

By count, not measured: 8 to 9 instructions an entry, 5 of them the rounds of Philox, beside 8 to 10 of attention itself.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_draw(draw, threshold):
    """(seed, offset, threshold) for `entries_kept` and `single_kept`."""
    return tl.load(draw), tl.load(draw + 1).to(tl.int32), threshold


@triton.jit
def share_kept(threshold):
    """1 - p, exactly."""
    return 1 - threshold * 2.0**-16


@triton.jit
def entries_kept(draw, value, i_l, o_rows, column, COLUMNS: tl.constexpr, ACROSS: tl.constexpr):
    """float32 [rows, COLUMNS]: value where an entry of head i_l stays, else 0.

    COLUMNS is a power of two, and column, the first one, a multiple of it. ACROSS: what this is for lies across, a warp to 16
    columns, so that four warps need the same counters. Then each makes a fourth of them, and they exchange a byte for eight
    entries: the compiler makes the numbers again in every layout that needs them, but not a sum.
    """
    seed, offset, threshold = draw
    GROUPS: tl.constexpr = (COLUMNS + 63) // 64  # of 64 columns, which are 8 counters
    PLACES: tl.constexpr = COLUMNS // 8 // GROUPS  # of a counter's 8 places, those of these columns
    # [rows, 8 GROUPS]
    o_counter = column // 64 * 8 + tl.arange(0, 8 * GROUPS)
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_counter[None, :], o_rows[:, None], i_l.to(tl.int32), offset)
    least = threshold.to(tl.uint32) << 16
    b_lower = _two_places(b_0, least, 0) | _two_places(b_1, least, 2)
    b_upper = _two_places(b_2, least, 4) | _two_places(b_3, least, 6)
    b_bits = tl.sum(tl.join(b_lower, b_upper), 2) if ACROSS else b_lower | b_upper
    # [rows, GROUPS, PLACES, 8]
    b_bits = tl.reshape(b_bits, [o_rows.shape[0], GROUPS, 1, 8])
    first = 0 if PLACES == 8 else column // 8 % 8
    b_place = 1 << (first + tl.arange(0, PLACES))
    b_kept = tl.where(b_bits & b_place[None, None, :, None] != 0, value, 0.0)
    return tl.reshape(b_kept, [o_rows.shape[0], COLUMNS])


@triton.jit
def single_kept(draw, copy, i_l, o_row, o_column, value):
    """float32, of int32 rows and columns that broadcast: value where copy `copy` of the entry of head i_l stays, else 0.

    Each entry has a counter to itself, seven eighths of which are not needed: entries that are gathered share none.
    """
    seed, offset, threshold = draw
    offset = tl.add(offset, copy, sanitize_overflow=False)
    o_counter = o_column // 64 * 8 + o_column % 8
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_counter, o_row, i_l.to(tl.int32), offset)
    b_word = tl.where(o_column & 32 != 0, tl.where(o_column & 16 != 0, b_3, b_2), tl.where(o_column & 16 != 0, b_1, b_0))
    b_bits = tl.where(o_column & 8 != 0, b_word >> 16, b_word & 0xFFFF)
    return tl.where(b_bits >= threshold.to(tl.uint32), value, 0.0)


@triton.jit
def _two_places(b_word, least, PLACE: tl.constexpr):
    """Bits PLACE and PLACE + 1: whether the lower and the upper half of a word reach the threshold."""
    return tl.where(b_word << 16 >= least, 1 << PLACE, 0) | tl.where(b_word >= least, 2 << PLACE, 0)
