"""Floating-point numbers as bits, rounded as PTX says ("Alternate floating-point data formats")."""

from __future__ import annotations

from fractions import Fraction
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


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """(a + b rounded, what that leaves out), exactly: Knuth's."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """(a * b rounded, what that leaves out), exactly where nothing over- or underflows: Dekker's, of halves of 26 bits."""
    halves = []
    for x in (a, b):
        t = (2.0**27 + 1) * x
        high = t - (t - x)
        halves += [high, x - high]
    p = a * b
    a0, a1, b0, b1 = halves
    return p, a1 * b1 - (((p - a0 * b0) - a1 * b0) - a0 * b1)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64, rounded once.

    By sums without error, the last but one rounded to odd (Boldo and Melquiond, Emulation of FMA and correctly rounded sums,
    2008); in fractions where one of them might over- or underflow.
    """
    shape = np.broadcast_shapes(*(np.shape(x) for x in (a, b, c)))
    a, b, c = (np.broadcast_to(np.asarray(x, np.float64), shape).reshape(-1) for x in (a, b, c))
    with np.errstate(all="ignore"):
        plain = a * b + c
        high, low = _two_product(a, b)
        middle, left = _two_sum(c, low)
        high, low = _two_sum(high, middle)
        rest, error = _two_sum(left, low)
        even = (rest.view(np.uint64) & np.uint64(1)) == 0
        rest = np.where((error != 0) & even, np.nextafter(rest, np.where(error > 0, np.inf, -np.inf)), rest)
        result = high + rest
        exact = (a == 0) | (b == 0) | (c == 0) | ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(c)
        safe = np.all([(np.abs(x) > 2.0**-400) & (np.abs(x) < 2.0**400) for x in (a, b, c)], axis=0)
    result = np.where(exact, plain, result)
    for at in np.flatnonzero(~exact & ~safe):
        total = Fraction(float(a[at])) * Fraction(float(b[at])) + Fraction(float(c[at]))
        try:
            result[at] = float(total)
        except OverflowError:
            result[at] = np.inf if total > 0 else -np.inf
    return result.reshape(shape)


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


def to_odd(x: Array) -> Array:
    """float64 -> float32 whose last digit says whether something was cut off: rounded once more, it is rounded once."""
    y = np.asarray(x, np.float32)
    bits = y.view(np.uint32)
    cut = np.where(np.abs(y.astype(np.float64)) > np.abs(x), bits - np.uint32(1), bits) | np.uint32(1)
    return np.where(np.isnan(x) | (y.astype(np.float64) == x), bits, cut).view(np.float32)
