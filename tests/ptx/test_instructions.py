"""Each arithmetic opcode on values worked out by hand."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from . import numbers
from .harness import lanes
from .parser import PtxError

S16, S32, S64, U16, U32, U64, F32, F64, PRED = (
    np.int16, np.int32, np.int64, np.uint16, np.uint32, np.uint64, np.float32, np.float64, np.bool_,
)  # fmt: skip
INF, NAN = np.inf, np.nan
TINY = 2.0**-149  # the smallest subnormal float32


def of(code: str, result: Any, **sources: Any) -> list[Any]:
    """The results as Python numbers."""
    found: list[Any] = lanes(code, {"d": result}, **sources).tolist()
    return found


def same(a: Any, b: Any) -> None:
    """Equal, NaN to NaN, and zeros of one sign."""
    a, b = np.asarray(a, F32), np.asarray(b, F32)
    assert (np.isnan(a) == np.isnan(b)).all()
    assert (np.where(np.isnan(a), 0, a.view(U32)) == np.where(np.isnan(b), 0, b.view(U32))).all(), f"{a} and {b}"


# ------------------------------------------------------------------------------------------------------------ integers


@pytest.mark.parametrize(
    ("code", "dtype", "a", "b", "d"),
    [
        ("add.s32", S32, [1, 2**31 - 1], [2, 1], [3, -(2**31)]),
        ("add.s64", S64, [2**63 - 1], [1], [-(2**63)]),
        ("add.s16", S16, [32767], [1], [-32768]),
        ("sub.s32", S32, [1, -(2**31)], [2, 1], [-1, 2**31 - 1]),
        ("mul.lo.s32", S32, [-3, 65536], [7, 65536], [-21, 0]),
        ("mul.lo.s64", S64, [2**32], [2**31], [-(2**63)]),
        ("mul.hi.s32", S32, [-(2**31), 2**30], [2, 8], [-1, 2]),
        ("mul.hi.u32", U32, [2**31, 2**32 - 1], [2, 2**32 - 1], [1, 2**32 - 2]),
        ("div.s32", S32, [7, -7, 7, -7], [2, 2, -2, -2], [3, -3, -3, 3]),
        ("div.u32", U32, [2**32 - 1], [2], [2**31 - 1]),
        ("div.s64", S64, [-(10**12) - 1], [10], [-(10**11)]),
        ("rem.s32", S32, [7, -7, 7, -7], [4, 4, -4, -4], [3, -3, 3, -3]),
        ("rem.u32", U32, [2**32 - 1], [10], [5]),
        ("min.s32", S32, [-1, 5], [1, 3], [-1, 3]),
        ("max.s32", S32, [-1, 5], [1, 3], [1, 5]),
        ("min.u32", U32, [2**32 - 1], [1], [1]),
        ("max.s64", S64, [-(2**40)], [3], [3]),
        ("and.b32", U32, [0b1100], [0b1010], [0b1000]),
        ("or.b32", U32, [0b1100], [0b1010], [0b1110]),
        ("xor.b32", U32, [0b1100], [0b1010], [0b0110]),
        ("xor.b64", U64, [2**63 | 1], [1], [2**63]),
    ],
)
def test_integers_of_two(code: str, dtype: Any, a: Any, b: Any, d: Any) -> None:
    assert of(f"{code} d, a, b;", dtype, a=(dtype, a), b=(dtype, b)) == d


@pytest.mark.parametrize(
    ("code", "dtype", "a", "d"),
    [
        ("neg.s32", S32, [5, -(2**31)], [-5, -(2**31)]),
        ("abs.s32", S32, [-5, 5], [5, 5]),
        ("not.b32", U32, [0], [2**32 - 1]),
        ("not.b16", U16, [0xFF00], [0x00FF]),
        ("brev.b32", U32, [1, 0b1011], [2**31, 0b1101 << 28]),
        ("brev.b64", U64, [1], [2**63]),
        ("cvta.to.global.u64", U64, [123], [123]),
    ],
)
def test_integers_of_one(code: str, dtype: Any, a: Any, d: Any) -> None:
    assert of(f"{code} d, a;", dtype, a=(dtype, a)) == d


@pytest.mark.parametrize(
    ("code", "dtype", "a", "d"),
    [
        ("popc.b32", U32, [0, 0xFF0F], [0, 12]),
        ("popc.b64", U64, [2**64 - 1], [64]),
        ("clz.b32", U32, [0, 1, 2**31], [32, 31, 0]),
        ("clz.b64", U64, [1], [63]),
        ("bfind.u32", U32, [0, 1, 2**31], [2**32 - 1, 0, 31]),
        ("bfind.shiftamt.u32", U32, [0, 1, 2**31], [2**32 - 1, 31, 0]),
        ("bfind.u64", U64, [2**40], [40]),
    ],
)
def test_bits_are_counted(code: str, dtype: Any, a: Any, d: Any) -> None:
    assert of(f"{code} d, a;", U32, a=(dtype, a)) == d


def test_wide_products() -> None:
    assert of("mul.wide.s32 d, a, b;", S64, a=(S32, [-(2**31)]), b=(S32, [2])) == [-(2**32)]
    assert of("mul.wide.u32 d, a, b;", U64, a=(U32, [2**32 - 1]), b=(U32, [2])) == [2**33 - 2]
    assert of("mul.wide.s16 d, a, b;", S32, a=(S16, [-(2**15)]), b=(S16, [2])) == [-(2**16)]
    assert of("mad.wide.s32 d, a, b, c;", S64, a=(S32, [-3]), b=(S32, [5]), c=(S64, [2**40])) == [2**40 - 15]
    assert of("mad.lo.s32 d, a, b, c;", S32, a=(S32, [3]), b=(S32, [5]), c=(S32, [-20])) == [-5]
    assert of("mad.lo.s64 d, a, b, c;", S64, a=(S64, [3]), b=(S64, [5]), c=(S64, [-20])) == [-5]
    assert of("mad.hi.u32 d, a, b, c;", U32, a=(U32, [2**31]), b=(U32, [6]), c=(U32, [1])) == [4]


def test_shifts_clamp_at_the_width() -> None:
    by = (U32, [0, 1, 31, 32, 33, 2**32 - 1])
    assert of("shl.b32 d, a, b;", U32, a=(U32, [3]), b=by) == [3, 6, 2**31, 0, 0, 0]
    assert of("shr.u32 d, a, b;", U32, a=(U32, [2**31]), b=by) == [2**31, 2**30, 1, 0, 0, 0]
    assert of("shr.s32 d, a, b;", S32, a=(S32, [-8]), b=by) == [-8, -4, -1, -1, -1, -1]
    assert of("shl.b64 d, a, b;", U64, a=(U64, [1]), b=(U32, [63, 64])) == [2**63, 0]
    assert of("shr.s64 d, a, b;", S64, a=(S64, [-(2**63)]), b=(U32, [62, 64])) == [-2, -1]
    assert of("shl.b16 d, a, b;", U16, a=(U16, [1]), b=(U32, [15, 16])) == [2**15, 0]


def test_bit_fields() -> None:
    fields = {"b": (U32, [4, 4, 28, 0, 40, 4]), "c": (U32, [8, 0, 8, 32, 3, 200])}
    assert of("bfe.u32 d, a, b, c;", U32, a=(U32, [0xF2345FA8]), **fields) == [0xFA, 0, 0xF, 0xF2345FA8, 0, 0x0F2345FA]
    assert of("bfe.s32 d, a, b, c;", S32, a=(U32, [0xF2345FA8]), **fields) == [-6, 0, -1, -0x0DCBA058, -1, -0x00DCBA06]
    assert of("bfe.u64 d, a, b, c;", U64, a=(U64, [0xAB << 40]), b=(U32, [40]), c=(U32, [8])) == [0xAB]
    assert of("bfi.b32 d, a, b, 8, 4;", U32, a=(U32, [0xAB]), b=(U32, [0xFFFFFFFF])) == [0xFFFFFBFF]
    assert of("bfi.b64 d, a, b, 32, 32;", U64, a=(U64, [7]), b=(U64, [5])) == [7 * 2**32 + 5]


def test_bytes_are_permuted() -> None:
    a, b = (U32, [0x33221180]), (U32, [0x77665544])
    assert of("prmt.b32 d, a, b, 0x7531;", U32, a=a, b=b) == [0x77553311]
    assert of("prmt.b32 d, a, b, 0x5410;", U32, a=a, b=b) == [0x55441180]
    assert of("prmt.b32 d, a, b, 0x4898;", U32, a=a, b=b) == [0x44FF00FF]  # bit 3: the sign of 0x80, and of 0x11


@pytest.mark.parametrize("code", ["div.s32", "rem.u32"])
def test_division_by_zero_is_a_fault(code: str) -> None:
    with pytest.raises(AssertionError, match="division by zero"):
        of(f"{code} d, a, b;", S32, a=(S32, [1]), b=(S32, [1, 0]))


# -------------------------------------------------------------------------------------------------------------- floats


def test_float_arithmetic_rounds_to_even() -> None:
    eps = 2.0**-24
    same(of("add.f32 d, a, b;", F32, a=(F32, [1, 1 + 2 * eps]), b=(F32, [eps, eps])), [1, 1 + 4 * eps])
    same(of("add.rn.f32 d, a, b;", F32, a=(F32, [INF]), b=(F32, [-INF])), [NAN])
    same(of("sub.f32 d, a, b;", F32, a=(F32, [1]), b=(F32, [3])), [-2])
    same(of("mul.f32 d, a, b;", F32, a=(F32, [2.0**-100, 0]), b=(F32, [2.0**-49, INF])), [TINY, NAN])
    same(of("neg.f32 d, a;", F32, a=(F32, [0, -1])), [-0.0, 1])
    same(of("abs.f32 d, a;", F32, a=(F32, [-0.0, -1])), [0, 1])


def test_subnormals_are_flushed_only_with_ftz() -> None:
    a, b = (F32, [2.0**-126, -TINY]), (F32, [-(2.0**-127), 0])
    same(of("add.f32 d, a, b;", F32, a=a, b=b), [2.0**-127, -TINY])
    same(of("add.ftz.f32 d, a, b;", F32, a=a, b=b), [2.0**-126, 0])  # the operands first
    same(of("mul.ftz.f32 d, a, b;", F32, a=(F32, [2.0**-100, -(2.0**-100)]), b=(F32, [2.0**-40])), [0, -0.0])
    same(of("neg.ftz.f32 d, a;", F32, a=(F32, [TINY])), [-0.0])


def test_saturation() -> None:
    same(of("add.sat.f32 d, a, b;", F32, a=(F32, [0.25, 3, -3, NAN]), b=(F32, [0.25, 0, 0, 0])), [0.5, 1, 0, 0])


def nearest(x: Fraction) -> np.float32:
    """The float32 nearest to a number, ties to even, by comparing the candidates."""
    guess = F32(float(x))
    around = [guess, np.nextafter(guess, F32(INF)), np.nextafter(guess, F32(-INF))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - x), int(f.view(U32)) & 1))


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    # the summand near a tie of the product: what a rounding in float64 before would get wrong
    a = (1 + rng.integers(0, 2**12, 4000) * 2.0**-12).astype(F32)
    b = (1 + rng.integers(0, 2**12, 4000) * 2.0**-12).astype(F32)
    c = (rng.choice([-1, 1], 4000) * 2.0 ** rng.integers(-80, 3, 4000)).astype(F32)
    want = [nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)]
    same(numbers.fma(a, b, c), want)
    tiny = (2.0**-126 * rng.random(500)).astype(F32)  # and near the subnormal numbers
    x, y = (2.0**-63 * (1 + rng.random(500))).astype(F32), (2.0**-75 * (1 + rng.random(500))).astype(F32)
    same(
        numbers.fma(x, y, tiny),
        [nearest(Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r))) for p, q, r in zip(x, y, tiny, strict=True)],
    )
    one = 1 + 2.0**-12
    same(of("fma.rn.f32 d, a, b, c;", F32, a=(F32, [one]), b=(F32, [one]), c=(F32, [-1])), [2.0**-11 + 2.0**-24])
    same(of("fma.rn.ftz.f32 d, a, b, c;", F32, a=(F32, [TINY]), b=(F32, [2.0**100]), c=(F32, [0])), [0])
    same(of("fma.rn.f32 d, a, b, c;", F32, a=(F32, [INF, 1]), b=(F32, [0, INF]), c=(F32, [1, -INF])), [NAN, NAN])


def test_fma_of_float64_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a, b = (1 + rng.random(4000) for _ in range(2))
    c = rng.choice([-1, 1], 4000) * 2.0 ** rng.integers(-110, 3, 4000)
    half = a[:2000] * b[:2000]
    c[:2000] = -half * (1 + rng.choice([0, 2.0**-52, -(2.0**-52)], 2000))  # what is left of the product
    a[3000:3500] *= 2.0**-700  # and what is smaller or larger than its halves may be
    b[3000:3250] *= 2.0**-360
    b[3250:3500] *= 2.0**690
    a[3500:] *= 2.0**900
    b[3500:3750] *= 2.0**121
    want = [float(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)]
    assert numbers.fma64(a, b, c).tolist() == want
    assert (a * b + c != want).mean() > 0.3  # twice rounded
    same(
        of(
            "fma.rn.f64 d, a, b, c;", F64, a=(F64, [INF, 0, NAN, 2.0**1000, 0, 1 + 2.0**-52]),
            b=(F64, [0, 5, 1, 2.0**1000, -1, 1 + 2.0**-52]), c=(F64, [1, -3, 1, 0.5, -0.0, -1 - 2.0**-51]),
        ),
        [NAN, -3, NAN, INF, -0.0, 2.0**-104],
    )  # fmt: skip


def test_division_and_roots() -> None:
    same(of("div.full.f32 d, a, b;", F32, a=(F32, [1, 0, 1]), b=(F32, [3, 0, 0])), [F32(1) / F32(3), NAN, INF])
    same(of("div.rn.f32 d, a, b;", F32, a=(F32, [1]), b=(F32, [-INF])), [-0.0])
    same(of("rcp.approx.ftz.f32 d, a;", F32, a=(F32, [4, -0.0, TINY])), [0.25, -INF, INF])
    same(of("sqrt.rn.f32 d, a;", F32, a=(F32, [9, -0.0, -1])), [3, -0.0, NAN])


def test_exponential_and_logarithm() -> None:
    same(of("ex2.approx.ftz.f32 d, a;", F32, a=(F32, [3, -INF, INF, TINY, -140])), [8, 0, INF, 1, 0])
    same(of("ex2.approx.f32 d, a;", F32, a=(F32, [-140, NAN])), [2.0**-140, NAN])
    same(of("lg2.approx.f32 d, a;", F32, a=(F32, [8, 0, -1, INF])), [3, -INF, NAN, INF])


def test_least_and_largest_drop_nan() -> None:
    a, b = (F32, [1, NAN, NAN, -0.0, 0]), (F32, [2, 2, NAN, 0, -0.0])
    same(of("max.f32 d, a, b;", F32, a=a, b=b), [2, 2, NAN, 0, 0])
    same(of("min.f32 d, a, b;", F32, a=a, b=b), [1, 2, NAN, -0.0, -0.0])
    same(of("max.NaN.f32 d, a, b;", F32, a=a, b=b), [2, NAN, NAN, 0, 0])
    same(of("min.NaN.f32 d, a, b;", F32, a=a, b=b), [1, NAN, NAN, -0.0, -0.0])
    same(of("max.f32 d, a, b, 0f40400000;", F32, a=(F32, [1, NAN]), b=(F32, [4, NAN])), [4, 3])
    assert of("max.NaN.f32 d, a, a;", U32, a=(U32, [0xFFC00001])) == [0x7FFFFFFF]  # the canonical NaN


# --------------------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize(
    ("code", "dtype", "a", "b", "d"),
    [
        ("setp.lt.s32", S32, [-1, 1, 1], [1, -1, 1], [True, False, False]),
        ("setp.lt.u32", U32, [2**32 - 1, 1], [1, 2], [False, True]),
        ("setp.lo.u32", U32, [1], [2], [True]),
        ("setp.hs.u32", U32, [2, 1], [2, 2], [True, False]),
        ("setp.le.s64", S64, [-(2**40), 2, 3], [2, 2, 2], [True, True, False]),
        ("setp.ge.s32", S32, [2, 1], [2, 2], [True, False]),
        ("setp.gt.s64", S64, [3, 2], [2, 2], [True, False]),
        ("setp.eq.b16", U16, [3, 2], [2, 2], [False, True]),
        ("setp.ne.b64", U64, [3, 2], [2, 2], [True, False]),
        ("setp.lt.f32", F32, [1, NAN, -0.0], [2, 2, 0], [True, False, False]),
        ("setp.eq.f32", F32, [NAN, -0.0], [NAN, 0], [False, True]),
        ("setp.ne.f32", F32, [NAN, 1], [1, 2], [False, True]),
        ("setp.neu.f32", F32, [NAN, 1], [1, 1], [True, False]),
        ("setp.equ.f32", F32, [NAN, 1], [1, 2], [True, False]),
        ("setp.leu.f32", F32, [NAN, 3], [1, 2], [True, False]),
        ("setp.gtu.f32", F32, [NAN, 1], [1, 2], [True, False]),
        ("setp.num.f32", F32, [NAN, 1], [1, 2], [False, True]),
        ("setp.nan.f32", F32, [NAN, 1], [1, 2], [True, False]),
        ("setp.gt.ftz.f32", F32, [TINY], [0], [False]),
    ],
)
def test_comparisons(code: str, dtype: Any, a: Any, b: Any, d: Any) -> None:
    assert of(f"{code} d, a, b;", PRED, a=(dtype, a), b=(dtype, b)) == d


def test_comparisons_join_a_predicate() -> None:
    sources = {"a": (S32, [1, 1, 3, 3]), "b": (S32, [2]), "c": (PRED, [True, False, True, False])}
    p, q = lanes("setp.lt.and.s32 p|q, a, b, c;", {"p": PRED, "q": PRED}, **sources)
    assert (p.tolist(), q.tolist()) == ([True, False, False, False], [False, False, True, False])
    assert of("setp.lt.or.s32 d, a, b, !c;", PRED, **sources) == [True, True, False, True]


def test_selection() -> None:
    p = (PRED, [True, False])
    assert of("selp.b32 d, a, b, p;", U32, a=(U32, [1]), b=(U32, [2]), p=p) == [1, 2]
    assert of("selp.f32 d, a, 0f3F800000, !p;", F32, a=(F32, [5]), p=p) == [1, 5]
    assert of("and.pred d, p, q;", PRED, p=p, q=(PRED, [True])) == [True, False]
    assert of("not.pred d, p;", PRED, p=p) == [False, True]


# --------------------------------------------------------------------------------------------------------- conversions


def test_moves_pack_and_unpack() -> None:
    assert of("mov.b32 d, {a, b};", U32, a=(U16, [0x1111]), b=(U16, [0x2222])) == [0x22221111]
    lo, hi = lanes("mov.b64 {lo, hi}, a;", {"lo": U32, "hi": U32}, a=(U64, [0x0000000200000001]))
    assert (lo[0], hi[0]) == (1, 2)
    assert of("mov.b32 {_, d}, a;", U16, a=(U32, [0x22221111])) == [0x2222]
    assert of("mov.pred %p1, -1; selp.b32 d, 7, 8, %p1;", U32) == [7] * 32


@pytest.mark.parametrize(
    ("code", "source", "target", "a", "d"),
    [
        ("cvt.s64.s32", S32, S64, [-1], [-1]),
        ("cvt.u64.u32", U32, U64, [2**32 - 1], [2**32 - 1]),
        ("cvt.u32.u64", U64, U32, [2**40 + 5], [5]),
        ("cvt.u16.u32", U32, U16, [0x12345], [0x2345]),
        ("cvt.s32.s16", S16, S32, [-2], [-2]),
        ("cvt.u32.u16", U16, U32, [0xFFFF], [0xFFFF]),
        ("cvt.s32.s8", U32, S32, [0x1FF], [-1]),
        ("cvt.rn.f32.s32", S32, F32, [-3, 2**24 + 1], [-3.0, 2.0**24]),
        ("cvt.rn.f32.u32", U32, F32, [2**32 - 1], [2.0**32]),
        ("cvt.rzi.s32.f32", F32, S32, [-1.7, 1.7, 3e9, -3e9, NAN], [-1, 1, 2**31 - 1, -(2**31), 0]),
        ("cvt.rni.s32.f32", F32, S32, [0.5, 1.5, -2.5], [0, 2, -2]),
        ("cvt.rmi.s32.f32", F32, S32, [-0.5], [-1]),
        ("cvt.rpi.s32.f32", F32, S32, [0.5], [1]),
        ("cvt.rzi.u32.f32", F32, U32, [-1.0, 5e9], [0, 2**32 - 1]),
        ("cvt.rzi.s64.f32", F32, S64, [NAN, 1e30, 2.0**40], [-(2**63), 2**63 - 1, 2**40]),
        ("cvt.f32.bf16", U16, F32, [0x3FC0], [1.5]),
        ("cvt.f32.f16", U16, F32, [0x3E00, 0x0001], [1.5, 2.0**-24]),
        ("cvt.rn.bf16.f32", F32, U16, [1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, NAN], [0x3F80, 0x3F82, 0x7F80, 0x7FFF]),
        ("cvt.rn.f16.f32", F32, U16, [1 + 2.0**-11, 1 + 3 * 2.0**-11, 65520, NAN], [0x3C00, 0x3C02, 0x7C00, 0x7FFF]),
    ],
)
def test_conversions(code: str, source: Any, target: Any, a: Any, d: Any) -> None:
    assert of(f"{code} d, a;", target, a=(source, a)) == d


def test_the_first_source_is_the_high_half() -> None:
    assert of("cvt.rn.bf16x2.f32 d, a, b;", U32, a=(F32, [1]), b=(F32, [2])) == [0x3F804000]
    assert of("cvt.rn.f16x2.f32 d, a, b;", U32, a=(F32, [1]), b=(F32, [2])) == [0x3C004000]


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_arithmetic_of_16_bits_is_that_of_pytorch(kind: str, dtype: torch.dtype) -> None:
    """Two numbers a register, and one; a product with -1 and a sum, which a negative scale becomes."""
    a, b = (torch.randn(32, generator=torch.Generator().manual_seed(i)).mul(2.0 ** (3 * i)).to(dtype) for i in range(2))
    bits = [x.view(torch.uint16).numpy() for x in (a, b)]
    pairs = [x.view(U32) for x in bits]
    wanted = (a - b).view(torch.uint16).numpy()
    assert of(f"sub.{kind} d, a, b;", U16, a=(U16, bits[0]), b=(U16, bits[1])) == wanted.tolist()
    assert of(f"sub.{kind}x2 d, a, b;", U32, a=(U32, pairs[0]), b=(U32, pairs[1])) == wanted.view(U32).tolist()
    minus = torch.full((32,), -1.0, dtype=dtype).view(torch.uint16).numpy().view(U32)
    sources = {"a": (U32, pairs[0]), "b": (U32, pairs[1]), "c": (U32, minus)}
    assert of(f"fma.rn.{kind}x2 d, b, c, a;", U32, **sources) == wanted.view(U32).tolist()


def test_low_precision_rounds_as_pytorch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=U32)
    x = bits.view(F32)
    x = x[~np.isnan(x)]
    for dtype, to_bits, from_bits in (
        (torch.bfloat16, numbers.bfloat16_bits, numbers.from_bfloat16),
        (torch.float16, numbers.float16_bits, numbers.from_float16),
    ):
        want = torch.from_numpy(x).to(dtype)
        with np.errstate(over="ignore"):
            got = to_bits(x)
        assert (got == want.view(torch.int16).numpy().view(U16)).all()
        assert (from_bits(got) == want.float().numpy()).all()


# ------------------------------------------------------------------------------------------------- what is not guessed


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", "opcode frobnicate"),
        ("add.rz.f32 %r1, %r2, %r3;", r"modifier \.rz"),
        ("add.s32.wrong %r1, %r2, %r3;", "a type of"),
        ("fma.rz.f32 %r1, %r2, %r3, %r4;", r"\.rn is the only"),
        ("add.s32 %r1, %r2;", "3 operands"),
        ("add.s32 %r1, %r2, %r3, %r4;", "3 operands"),
        ("add.s32 %r1, %rd2, %r3;", "64 bits, 32 are expected"),
        ("mov.u32 %r1, %clock;", "special register %clock"),
        ("bra $nowhere;", "label"),
        ("mov.u32 %r1, nowhere;", "variable nowhere"),
        ("cvt.f32.u64.x %r1, %rd1;", "a type of"),
        ("ld.local.b32 %r1, [%rd1];", r"modifier \.local"),
    ],
)
def test_the_unknown_is_an_error_that_names_it(code: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        lanes(code, {"d": U32})


def test_a_register_that_nothing_wrote_is_a_fault() -> None:
    with pytest.raises(AssertionError, match=r"register %r5 is read before anything wrote it"):
        lanes("add.s32 %r1, %r5, 1;", {})


def test_trap_and_nanosleep() -> None:
    assert of("nanosleep.u32 100; mov.b32 d, 1;", U32) == [1] * 32
    with pytest.raises(AssertionError, match=r"trap(.|\n)*thread 3 of CTA 0"):
        lanes("setp.eq.u32 %p1, %r0, 3; @%p1 trap;", {})
