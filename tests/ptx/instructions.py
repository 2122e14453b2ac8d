"""Arithmetic, comparison, selection, conversion and control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import numbers
from .decode import TYPES, Decoding, Get, Run, nothing, opcode
from .machine import Machine, Mask
from .parser import Pair, Vector

Array = Any

SIGNED = ("s16", "s32", "s64")
UNSIGNED = ("u16", "u32", "u64")
BITS = ("b16", "b32", "b64")
DOUBLED = {np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}


def _width(dtype: Any) -> int:
    return 1 if dtype is np.bool_ else np.dtype(dtype).itemsize * 8


def _apply(i: Decoding, f: Callable[..., Array], dtype: Any, count: int, result: Any = None) -> Run:
    """d = f(sources), all of one type."""
    put = i.target(0, _width(result or dtype))
    sources = [i.source(k, dtype) for k in range(1, count + 1)]
    i.finish(count + 1)
    if count == 1:
        (one,) = sources
        return lambda m, mask: put(m, f(one(m)), mask)
    if count == 2:
        first, second = sources
        return lambda m, mask: put(m, f(first(m), second(m)), mask)
    return lambda m, mask: put(m, f(*(get(m) for get in sources)), mask)


def _float(i: Decoding, f: Callable[..., Array], count: int, *, rounds: bool = True) -> Run:
    """float32, to nearest even (the only rounding known), with .ftz and .sat ("Floating point instructions"); or float64."""
    if i.type("f32", "f64") == "f64":
        i.flag("rn")
        return _apply(i, f, np.float64, count)
    if rounds:
        i.flag("rn")
    ftz, sat = i.flag("ftz"), i.flag("sat")

    def g(*xs: Array) -> Array:
        y = f(*(numbers.flushed(x) for x in xs)) if ftz else f(*xs)
        if sat:
            y = np.where(np.isnan(y), np.float32(0), np.clip(y, np.float32(0), np.float32(1)))
        return numbers.flushed(y) if ftz else y

    return _apply(i, g if ftz or sat else f, np.float32, count)


def _is_float(i: Decoding) -> bool:
    return i.left[-1:] in (["f32"], ["f64"])


_HALVES = "f16", "bf16", "f16x2", "bf16x2"


def _is_half(i: Decoding) -> bool:
    return bool(i.left) and i.left[-1] in _HALVES


def _half(i: Decoding, f: Callable[..., Array], count: int) -> Run:
    """Numbers of 16 bits, one or two a register: f in float64, rounded to nearest even."""
    kind = i.type(*_HALVES)
    i.flag("rn")
    to_bits, from_bits = _TO_BITS[kind.removesuffix("x2")], _FROM_BITS[kind.removesuffix("x2")]

    def one(*xs: Array) -> Array:
        return to_bits(numbers.to_odd(f(*(from_bits(x.astype(np.uint16)).astype(np.float64) for x in xs))))

    def two(*xs: Array) -> Array:
        low, high = one(*xs), one(*(x >> np.uint32(16) for x in xs))
        return (high.astype(np.uint32) << np.uint32(16)) | low.astype(np.uint32)

    return _apply(i, two, np.uint32, count) if kind.endswith("x2") else _apply(i, one, np.uint16, count)


# ---------------------------------------------------------------------------------------------------------- arithmetic


@opcode("add")
def add(i: Decoding) -> Run:
    """Integer arithmetic and floating point: integers wrap around."""
    return _float(i, np.add, 2) if _is_float(i) else _apply(i, np.add, TYPES[i.type(*SIGNED, *UNSIGNED)], 2)


@opcode("sub")
def sub(i: Decoding) -> Run:
    """Integer arithmetic and floating point, of 16 bits too."""
    if _is_half(i):
        return _half(i, np.subtract, 2)
    return _float(i, np.subtract, 2) if _is_float(i) else _apply(i, np.subtract, TYPES[i.type(*SIGNED, *UNSIGNED)], 2)


def _product(i: Decoding, dtype: Any, part: str) -> tuple[Callable[[Array, Array], Array], Any]:
    """The low or high half of a product, or all of it, and its type."""
    if part == "lo":
        return np.multiply, dtype
    if dtype not in DOUBLED:
        raise i.error("a product of 128 bits is not known")
    wide, bits = DOUBLED[dtype], _width(dtype)
    if part == "wide":
        return (lambda a, b: a.astype(wide) * b.astype(wide)), wide
    return (lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(dtype)), dtype


@opcode("mul")
def mul(i: Decoding) -> Run:
    """Integer arithmetic and floating point."""
    if _is_float(i):
        return _float(i, np.multiply, 2)
    dtype = TYPES[i.type(*SIGNED, *UNSIGNED)]
    f, result = _product(i, dtype, i.choice("lo", "hi", "wide"))
    return _apply(i, f, dtype, 2, result)


@opcode("mad")
def mad(i: Decoding) -> Run:
    """Integer arithmetic. The summand is as wide as the result."""
    dtype = TYPES[i.type(*SIGNED, *UNSIGNED)]
    f, result = _product(i, dtype, i.choice("lo", "hi", "wide"))
    put = i.target(0, _width(result))
    a, b, c = i.source(1, dtype), i.source(2, dtype), i.source(3, result)
    i.finish(4)
    return lambda m, mask: put(m, f(a(m), b(m)) + c(m), mask)


@opcode("fma")
def fma(i: Decoding) -> Run:
    """Floating point, of 16 bits too: rounded once."""
    if _is_half(i):
        return _half(i, lambda a, b, c: a * b + c, 3)
    if "rn" not in i.left:
        raise i.error(".rn is the only rounding known")
    return _float(i, numbers.fma64 if "f64" in i.left else numbers.fma, 3)


def _quotient(m: Machine, mask: Mask, a: Array, b: Array, remainder: bool) -> Array:
    """Toward zero. By zero it is unspecified, so no kernel should."""
    zero = m.full(mask) & (m.wide(b) == 0)
    if zero.any():
        raise m.fault("division by zero", int(np.flatnonzero(zero)[0]))
    b = np.where(b == 0, b.dtype.type(1), b)
    if remainder:
        return np.fmod(a, b)
    q = np.floor_divide(a, b)
    if np.issubdtype(b.dtype, np.signedinteger):
        q = q + ((q < 0) & (q * b != a)).astype(q.dtype)  # floor to truncation
    return q


@opcode("div")
def div(i: Decoding) -> Run:
    """Integer arithmetic and floating point: .full and .approx are allowed 2 ulp, of which correct rounding makes none."""
    if _is_float(i):
        i.choice("rn", "full", "approx")
        return _float(i, np.divide, 2, rounds=False)
    return _division(i, remainder=False)


@opcode("rem")
def rem(i: Decoding) -> Run:
    """Integer arithmetic: the sign of the dividend."""
    return _division(i, remainder=True)


def _division(i: Decoding, *, remainder: bool) -> Run:
    dtype = TYPES[i.type(*SIGNED, *UNSIGNED)]
    put, a, b = i.target(0, _width(dtype)), i.source(1, dtype), i.source(2, dtype)
    i.finish(3)
    return lambda m, mask: put(m, _quotient(m, mask, np.asarray(a(m)), np.asarray(b(m)), remainder), mask)


@opcode("neg")
def neg(i: Decoding) -> Run:
    """Integer arithmetic and floating point."""
    if _is_float(i):
        return _float(i, np.negative, 1, rounds=False)
    return _apply(i, np.negative, TYPES[i.type(*SIGNED)], 1)


@opcode("abs")
def abs_(i: Decoding) -> Run:
    """Integer arithmetic and floating point."""
    return _float(i, np.abs, 1, rounds=False) if _is_float(i) else _apply(i, np.abs, TYPES[i.type(*SIGNED)], 1)


@opcode("min", "max")
def min_max(i: Decoding) -> Run:
    """Integer arithmetic and floating point: of a number and NaN the number, unless .NaN; +0 is above -0."""
    largest = i.instruction.opcode == "max"
    if not _is_float(i):
        return _apply(i, np.maximum if largest else np.minimum, TYPES[i.type(*SIGNED, *UNSIGNED)], 2)
    nan = i.flag("NaN")
    f = numbers.maximum if largest else numbers.minimum
    if len(i.instruction.operands) == 4:
        return _float(i, lambda a, b, c: f(f(a, b, nan=nan), c, nan=nan), 3, rounds=False)
    return _float(i, lambda a, b: f(a, b, nan=nan), 2, rounds=False)


@opcode("ex2")
def ex2(i: Decoding) -> Run:
    """Floating point: 2^a within 2 ulp, here the nearest number; 2^-inf = +0."""
    i.require("approx")
    return _float(i, lambda a: np.exp2(a, dtype=np.float64).astype(np.float32), 1, rounds=False)


@opcode("lg2")
def lg2(i: Decoding) -> Run:
    """Floating point: within 2^-22 of log2, here the nearest number; NaN below 0, -inf at 0."""
    i.require("approx")
    return _float(i, lambda a: np.log2(a, dtype=np.float64).astype(np.float32), 1, rounds=False)


@opcode("rcp")
def rcp(i: Decoding) -> Run:
    """Floating point: .approx is allowed 1 ulp, of which correct rounding makes none."""
    i.choice("approx", "rn")
    return _float(i, lambda a: np.float32(1) / a, 1, rounds=False)


@opcode("sqrt")
def sqrt(i: Decoding) -> Run:
    """Floating point: likewise."""
    i.choice("approx", "rn")
    return _float(i, np.sqrt, 1, rounds=False)


# ---------------------------------------------------------------------------------------------------------------- bits


@opcode("and", "or", "xor")
def logic(i: Decoding) -> Run:
    """Logic and shift."""
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.instruction.opcode]
    return _apply(i, f, TYPES[i.type("pred", *BITS)], 2)


@opcode("not")
def not_(i: Decoding) -> Run:
    """Logic and shift."""
    return _apply(i, np.invert, TYPES[i.type("pred", *BITS)], 1)


@opcode("shl", "shr")
def shift(i: Decoding) -> Run:
    """Logic and shift: by an unsigned number of 32 bits, clamped at the width; .s types fill with the sign."""
    left = i.instruction.opcode == "shl"
    dtype = TYPES[i.type(*BITS, *(() if left else (*SIGNED, *UNSIGNED)))]
    bits = _width(dtype)
    put, a, b = i.target(0, bits), i.source(1, dtype), i.source(2, np.uint32)
    i.finish(3)
    signed = np.issubdtype(dtype, np.signedinteger)
    operator = np.left_shift if left else np.right_shift

    def run(m: Machine, mask: Mask) -> None:
        x, n = a(m), b(m)
        y = operator(x, np.minimum(n, np.uint32(bits - 1)).astype(dtype))
        if not signed and np.any(n >= bits):
            y = np.where(n >= bits, dtype(0), y)
        put(m, y, mask)

    return run


@opcode("bfe")
def bfe(i: Decoding) -> Run:
    """Integer arithmetic: a field of so many bits from a position.

    .s extends by its top bit, or by the sign bit past the end.
    """
    name = i.type("s32", "u32", "s64", "u64")
    dtype = TYPES[name]
    bits = _width(dtype)
    unsigned = np.uint32 if bits == 32 else np.uint64
    put, a = i.target(0, bits), i.source(1, unsigned)
    b, c = i.source(2, np.uint32), i.source(3, np.uint32)
    i.finish(4)

    def run(m: Machine, mask: Mask) -> None:
        x, position, length = a(m), b(m) & np.uint32(255), c(m) & np.uint32(255)
        n = np.minimum(length, np.uint32(bits))
        ones = np.where(n == 0, unsigned(0), unsigned(2**bits - 1) >> (bits - np.maximum(n, 1)).astype(unsigned))
        inside = position < bits
        y = np.where(inside, x >> np.minimum(position, bits - 1).astype(unsigned), unsigned(0)) & ones
        if name[0] == "s":
            top = np.minimum(position.astype(np.int64) + length - 1, bits - 1)
            sign = (length > 0) & ((x >> np.maximum(top, 0).astype(unsigned)) & unsigned(1) != 0)
            kept = np.where(inside, np.minimum(n, bits - np.minimum(position, bits).astype(np.int64)), 0)
            above = np.where(kept >= bits, unsigned(0), unsigned(2**bits - 1) << np.minimum(kept, bits - 1).astype(unsigned))
            y = np.where(sign, y | above, y)
        put(m, y.astype(unsigned), mask)

    return run


@opcode("bfi")
def bfi(i: Decoding) -> Run:
    """Integer arithmetic: the low bits of a, so many, put into b from a position on."""
    unsigned = TYPES[i.type("b32", "b64")]
    bits = _width(unsigned)
    put, a, b = i.target(0, bits), i.source(1, unsigned), i.source(2, unsigned)
    c, d = i.source(3, np.uint32), i.source(4, np.uint32)
    i.finish(5)

    def run(m: Machine, mask: Mask) -> None:
        position, length = c(m) & np.uint32(255), np.minimum(d(m) & np.uint32(255), np.uint32(bits))
        ones = np.where(length == 0, unsigned(0), unsigned(2**bits - 1) >> (bits - np.maximum(length, 1)).astype(unsigned))
        at = np.minimum(position, bits - 1).astype(unsigned)
        field = np.where(position < bits, ones << at, unsigned(0))
        put(m, (b(m) & ~field) | ((a(m) << at) & field), mask)

    return run


def _count_ones(x: Array) -> Array:
    shifts = np.arange(x.dtype.itemsize * 8, dtype=x.dtype)
    return ((np.asarray(x)[..., None] >> shifts) & x.dtype.type(1)).sum(-1).astype(np.uint32)


def _top_bit(x: Array) -> Array:
    """Position of the highest one, -1 in zero."""
    y = np.asarray(x).copy()
    bits = y.dtype.itemsize * 8
    width = 1
    while width < bits:
        y |= y >> y.dtype.type(width)
        width *= 2
    return _count_ones(y).astype(np.int32) - 1


@opcode("popc")
def popc(i: Decoding) -> Run:
    """Integer arithmetic."""
    return _apply(i, _count_ones, TYPES[i.type("b32", "b64")], 1, np.uint32)


@opcode("clz")
def clz(i: Decoding) -> Run:
    """Integer arithmetic."""
    dtype = TYPES[i.type("b32", "b64")]
    bits = _width(dtype)
    return _apply(i, lambda x: (bits - 1 - _top_bit(x)).astype(np.uint32), dtype, 1, np.uint32)


@opcode("bfind")
def bfind(i: Decoding) -> Run:
    """Integer arithmetic, unsigned: the highest one, ~0 without any; .shiftamt: its distance from the top."""
    dtype = TYPES[i.type("u32", "u64")]
    shift_amount, bits = i.flag("shiftamt"), _width(dtype)

    def f(x: Array) -> Array:
        top = _top_bit(x)
        return np.where(top < 0, top, bits - 1 - top if shift_amount else top).astype(np.int32).view(np.uint32)

    return _apply(i, f, dtype, 1, np.uint32)


@opcode("brev")
def brev(i: Decoding) -> Run:
    """Integer arithmetic."""
    dtype = TYPES[i.type("b32", "b64")]
    bits = _width(dtype)

    def f(x: Array) -> Array:
        at = np.arange(bits, dtype=dtype)
        ones = (np.asarray(x)[..., None] >> at) & dtype(1)
        return np.bitwise_or.reduce(ones << (dtype(bits - 1) - at), axis=-1)

    return _apply(i, f, dtype, 1)


@opcode("prmt")
def prmt(i: Decoding) -> Run:
    """Data movement and conversion, the mode without a name: four bytes of the eight of {b, a}.

    Bit 3 of a selector copies the byte's sign.
    """
    i.type("b32")

    def f(a: Array, b: Array, selector: Array) -> Array:
        both = np.asarray(a).astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
        out = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
        for k in range(4):
            nibble = (selector >> np.uint32(4 * k)) & np.uint32(15)
            byte = ((both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            out = out | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * k))
        return out

    return _apply(i, f, np.uint32, 3)


# ---------------------------------------------------------------------------------------------- comparison, selection

_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _compare_floats(name: str) -> Callable[[Array, Array], Array]:
    """Ordered comparisons are false with a NaN (ne too), unordered ones true."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    f = _COMPARE[name[:2]]
    if name.endswith("u"):
        return lambda a, b: f(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return f


@opcode("setp")
def setp(i: Decoding) -> Run:
    """Comparison and selection: p = (a cmp b) op c, and q = !(a cmp b) op c."""
    if _is_float(i):
        dtype: Any = TYPES[i.type("f32", "f64")]
        ftz = i.flag("ftz")
        plain = _compare_floats(i.choice(*_COMPARE, *(name + "u" for name in _COMPARE), "num", "nan"))
        compare = (lambda a, b: plain(numbers.flushed(a), numbers.flushed(b))) if ftz else plain
    else:
        name = i.type(*SIGNED, *UNSIGNED, *BITS)
        dtype = TYPES[name]
        known = {"s": (*_COMPARE,), "u": (*_COMPARE, *_UNSIGNED_COMPARE), "b": ("eq", "ne")}[name[0]]
        relation = i.choice(*known)
        compare = _COMPARE[_UNSIGNED_COMPARE.get(relation, relation)]
    joins = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    join = i.choice(*joins, default="")
    where = i.operand(0)
    puts = [i.target(x, 1) for x in ((where.first, where.second) if isinstance(where, Pair) else (where,))]
    a, b = i.source(1, dtype), i.source(2, dtype)
    c: Get | None = i.source(3, np.bool_) if join else None
    i.finish(4 if join else 3)

    def run(m: Machine, mask: Mask) -> None:
        p = compare(a(m), b(m))
        results = [p, ~p] if len(puts) == 2 else [p]
        if c is not None:
            third = c(m)
            results = [joins[join](x, third) for x in results]
        for put, x in zip(puts, results, strict=True):
            put(m, x, mask)

    return run


@opcode("selp")
def selp(i: Decoding) -> Run:
    """Comparison and selection: p ? a : b."""
    dtype = TYPES[i.type(*BITS, *SIGNED, *UNSIGNED, "f32", "f64")]
    put, a, b, p = i.target(0, _width(dtype)), i.source(1, dtype), i.source(2, dtype), i.source(3, np.bool_)
    i.finish(4)
    return lambda m, mask: put(m, np.where(p(m), a(m), b(m)), mask)


# ------------------------------------------------------------------------------------------------- moves, conversions


@opcode("mov")
def mov(i: Decoding) -> Run:
    """Data movement and conversion: also packs a vector into a scalar and unpacks it, the first part lowest."""
    dtype = TYPES[i.type("pred", *BITS, *SIGNED, *UNSIGNED, "f32", "f64")]
    bits = _width(dtype)
    target, source = i.operand(0), i.operand(1)
    i.finish(2)
    if isinstance(target, Vector):
        part = TYPES[f"b{bits // len(target.parts)}"]
        get, puts = i.source(1, dtype), [i.target(x, bits // len(target.parts)) for x in target.parts]

        def unpack(m: Machine, mask: Mask) -> None:
            x = get(m)
            for k, put in enumerate(puts):
                put(m, (x >> dtype(k * bits // len(puts))).astype(part), mask)

        return unpack
    if isinstance(source, Vector):
        part = TYPES[f"b{bits // len(source.parts)}"]
        pieces = [i.source(x, part) for x in source.parts]
        place = i.target(0, bits)

        def pack(m: Machine, mask: Mask) -> None:
            total = dtype(0)
            for k, piece in enumerate(pieces):
                total = total | (piece(m).astype(dtype) << dtype(k * bits // len(pieces)))
            place(m, total, mask)

        return pack
    one, to = i.source(1, dtype), i.target(0, bits)
    return lambda m, mask: to(m, one(m), mask)


@opcode("cvta")
def cvta(i: Decoding) -> Run:
    """Data movement and conversion: an address of global memory is the same in the generic space."""
    i.flag("to")
    i.require("global")
    return _apply(i, lambda x: x, TYPES[i.type("u64")], 1)


_INTEGERS = ("s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64")
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_TO_BITS = {"bf16": numbers.bfloat16_bits, "f16": numbers.float16_bits}
_FROM_BITS = {"bf16": numbers.from_bfloat16, "f16": numbers.from_float16}


@opcode("cvt")
def cvt(i: Decoding) -> Run:
    """Data movement and conversion: between integers, float32, bfloat16 and float16; float64 and float32.

    In cvt.rn.bf16x2.f32 d, a, b the high half is a.
    """
    source = i.type(*_INTEGERS, "f32", "f64", "f16", "bf16")
    target = i.type(*_INTEGERS, "f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
    if target in ("f16x2", "bf16x2") and source == "f32":
        i.require("rn")
        f = _TO_BITS[target[:-2]]
        return _apply(
            i, lambda a, b: (f(a).astype(np.uint32) << np.uint32(16)) | f(b).astype(np.uint32), np.float32, 2, np.uint32
        )
    if target in _TO_BITS and source == "f32":
        i.require("rn")
        return _apply(i, _TO_BITS[target], np.float32, 1, np.uint16)
    if target in ("f32", "f64") and source in _FROM_BITS:
        wide, from_bits = TYPES[target], _FROM_BITS[source]
        return _apply(i, lambda a: from_bits(a).astype(wide), np.uint16, 1, wide)
    if target == "f64" and source == "f32":
        return _apply(i, lambda a: a.astype(np.float64), np.float32, 1, np.float64)
    if target == "f32" and source == "f64":
        i.require("rn")
        return _apply(i, lambda a: a.astype(np.float32), np.float64, 1, np.float32)
    if target == "f32" and source in _INTEGERS:
        i.require("rn")
        put, get = i.target(0, 32), i.source(1, TYPES[source], wider=True)
        i.finish(2)
        return lambda m, mask: put(m, get(m).astype(np.float32), mask)
    if target in _INTEGERS and source == "f32":
        dtype, rounded = TYPES[target], _ROUND[i.choice(*_ROUND)]
        i.flag("sat")  # integers saturate anyway
        if rounded in (np.rint, np.trunc):
            i.flag("ftz")  # a subnormal number becomes 0 anyway
        info = np.iinfo(dtype)
        of_nan = np.array(1 << 63, np.uint64).view(dtype) if info.bits == 64 else dtype(0)
        put, get = i.target(0, _width(dtype), wider=True), i.source(1, np.float32)
        i.finish(2)

        def to_integer(m: Machine, mask: Mask) -> None:
            x = rounded(np.asarray(get(m), np.float64))
            low, high = x <= info.min, x >= info.max
            y = np.where(low | high | np.isnan(x), 0, x).astype(dtype)
            y = np.where(low, dtype(info.min), np.where(high, dtype(info.max), y))
            put(m, np.where(np.isnan(x), of_nan, y), mask)

        return to_integer
    if target in _INTEGERS and source in _INTEGERS:
        wide, narrow = TYPES[target], TYPES[source]
        put, get = i.target(0, _width(wide), wider=True), i.source(1, narrow, wider=True)
        i.finish(2)
        return lambda m, mask: put(m, get(m).astype(wide), mask)
    raise i.error(f"a conversion from .{source} to .{target} is not known")


# ------------------------------------------------------------------------------------------------------------- control


@opcode("bra")
def bra(i: Decoding) -> Run:
    """Control flow."""
    i.flag("uni")
    i.finish(1)
    i.kind = "branch"
    return nothing


@opcode("ret", "exit")
def ret(i: Decoding) -> Run:
    """Control flow: of an entry both end the thread."""
    i.flag("uni")
    i.finish(0)
    i.kind = "exit"
    return nothing


@opcode("nanosleep")
def nanosleep(i: Decoding) -> Run:
    """Miscellaneous: others go first."""
    i.type("u32")
    i.finish(1)
    i.kind = "news"
    return nothing


@opcode("trap")
def trap(i: Decoding) -> Run:
    """Miscellaneous."""
    i.finish(0)

    def run(m: Machine, mask: Mask) -> None:
        raise m.fault("trap", int(np.flatnonzero(m.full(mask))[0]))

    return run
