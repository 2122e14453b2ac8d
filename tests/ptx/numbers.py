"""Floating-point numbers as bits, rounded as PTX says ("Alternate floating-point data formats")."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # a NumPy array, or a NumPy scalar where a value is one for all threads

SMALLEST_NORMAL = np.float32(2.0**-126)
CANONICAL_NAN = np.uint32(0x7FFFFFFF)
CANONICAL_NAN_64 = np.uint64(0x7FFFFFFFFFFFFFFF)


def bfloat16_bits(x: Array) -> Array:
    """float32 -> bits of the nearest bfloat16, ties to even; NaN becomes the canonical one."""
    u = np.asarray(x, np.float32).view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_bfloat16(bits: Array) -> Array:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float16_bits(x: Array) -> Array:
    """float32 -> bits of the nearest float16, ties to even, beyond the largest to infinity."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), np.asarray(x, np.float32).astype(np.float16).view(np.uint16))


def from_float16(bits: Array) -> Array:
    return np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)


def to_tf32(x: Array) -> Array:
    """What a matrix unit reads of a float32 operand declared tf32: its 10 leading bits of fraction."""
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def flushed(x: Array) -> Array:
    """.ftz: subnormal numbers become zeros of their sign."""
    small = np.abs(x) < SMALLEST_NORMAL
    return np.where(small, np.copysign(np.float32(0), x), x) if np.any(small) else x


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float32, rounded once.

    The product is exact in float64. The sum there may be rounded, and where it then lies on a tie of float32 (or in its
    subnormal range, where ties lie elsewhere) a second rounding could go wrong: there it is rounded to odd first.
    """
    p = np.multiply(a, b, dtype=np.float64)
    d = np.asarray(c, np.float64)
    s = np.asarray(p + d)
    risky = (s.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    risky |= np.abs(s) < 2.0**-125
    if risky.any():
        t = s - p
        error = (p - (s - t)) + (d - t)  # exact: Knuth's two-sum
        odd = (s.view(np.uint64) & np.uint64(1)) == 1
        inexact = risky & (error != 0) & ~odd & np.isfinite(s)
        s = np.where(inexact, np.nextafter(s, np.where(error > 0, np.inf, -np.inf)), s)
    return s.astype(np.float32)


def maximum(a: Array, b: Array, *, nan: bool) -> Array:
    """The larger one; a number beats NaN unless `nan`; +0 is above -0; NaN is the canonical one."""
    return _extreme(np.fmax, np.maximum, np.bitwise_and, a, b, nan)


def minimum(a: Array, b: Array, *, nan: bool) -> Array:
    return _extreme(np.fmin, np.minimum, np.bitwise_or, a, b, nan)


def _extreme(drop: Any, keep: Any, zeros: Any, a: Array, b: Array, nan: bool) -> Array:
    y = np.asarray((keep if nan else drop)(a, b))
    zero = y == 0
    if zero.any():
        both = zero & (np.asarray(a) == 0) & (np.asarray(b) == 0)
        bits, dtype = {4: (np.uint32, np.float32), 8: (np.uint64, np.float64)}[y.dtype.itemsize]
        sign = zeros(np.asarray(a).view(bits), np.asarray(b).view(bits)).view(dtype)
        y = np.where(both, sign, y)
    lost = np.isnan(y)
    if not lost.any():
        return y
    return np.where(lost, CANONICAL_NAN.view(np.float32) if y.dtype == np.float32 else CANONICAL_NAN_64.view(np.float64), y)
