"""What the lanes of a warp do together: shuffles, votes, reductions and matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import numbers
from .decode import TYPES, Decoding, Get, Run, opcode
from .machine import Machine, Mask
from .memory import AccessError
from .parser import Pair

Array = Any


def _whole(m: Machine, lanes: Get) -> None:
    if (np.asarray(lanes(m)) != 0xFFFFFFFF).any():
        raise m.fault("an instruction for a part of a warp is not known")


def _warps(m: Machine, x: Array) -> np.ndarray:
    return m.wide(x).reshape(-1, 32)


@opcode("shfl")
def shfl(i: Decoding) -> Run:
    """Data movement and conversion: a lane reads another's a.

    c holds the clamp and, from bit 8 on, the bits of the lane that stay.

    Out of range a lane keeps its own a, and p is false.
    """
    i.type("b32")
    i.require("sync")
    mode = i.choice("up", "down", "bfly", "idx")
    where = i.operand(0)
    put = i.target(where.first if isinstance(where, Pair) else where, 32)
    put_p = i.target(where.second, 1) if isinstance(where, Pair) else None
    a, b, c, lanes = (i.source(k, np.uint32) for k in (1, 2, 3, 4))
    i.finish(5)
    i.kind = "warp"

    def run(m: Machine, mask: Mask) -> None:
        _whole(m, lanes)
        x = _warps(m, a(m))
        bval = (_warps(m, b(m)) & np.uint32(31)).astype(np.int64)
        cval = _warps(m, c(m)).astype(np.int64)
        clamp, stay = cval & 31, (cval >> 8) & 31
        lane = np.arange(32)[None, :]
        limit = (lane & stay) | (clamp & ~stay)
        least = lane & stay
        if mode == "up":
            j = lane - bval
            ok = j >= limit
        elif mode == "down":
            j = lane + bval
            ok = j <= limit
        elif mode == "bfly":
            j = lane ^ bval
            ok = j <= limit
        else:
            j = least | (bval & ~stay)
            ok = j <= limit
        y = np.where(ok, np.take_along_axis(x, np.where(ok, j, lane), 1), x)
        put(m, y.reshape(-1), mask)
        if put_p is not None:
            put_p(m, ok.reshape(-1), mask)

    return run


@opcode("vote")
def vote(i: Decoding) -> Run:
    """Synchronization and communication."""
    kind = i.type("pred", "b32")
    i.require("sync")
    mode = i.choice(*(("ballot",) if kind == "b32" else ("all", "any", "uni")))
    put, p, lanes = i.target(0, 32 if kind == "b32" else 1), i.source(1, np.bool_), i.source(2, np.uint32)
    i.finish(3)
    i.kind = "warp"

    def run(m: Machine, mask: Mask) -> None:
        _whole(m, lanes)
        x = _warps(m, p(m))
        if mode == "ballot":
            y: Array = (x.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
        else:
            y = {"all": x.all(1), "any": x.any(1), "uni": x.all(1) | ~x.any(1)}[mode]
        put(m, np.repeat(y, 32), mask)

    return run


@opcode("redux")
def redux(i: Decoding) -> Run:
    """Synchronization and communication: of integers."""
    dtype = TYPES[i.type("b32", "u32", "s32")]
    i.require("sync")
    names = ("and", "or", "xor") if dtype is np.uint32 and "b32" in i.instruction.modifiers else ("add", "min", "max")
    f: Any = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "add": np.add, "min": np.minimum, "max": np.maximum,
    }[i.choice(*names)]  # fmt: skip
    put, a, lanes = i.target(0, 32), i.source(1, dtype), i.source(2, np.uint32)
    i.finish(3)
    i.kind = "warp"

    def run(m: Machine, mask: Mask) -> None:
        _whole(m, lanes)
        put(m, np.repeat(f.reduce(_warps(m, a(m)), axis=1, dtype=dtype), 32), mask)

    return run


# ------------------------------------------------------------------------------------------------------------ matrices


@opcode("ldmatrix")
def ldmatrix(i: Decoding) -> Run:
    """Warp level matrix: 8 x 8 matrices of 16 bits. Lane 8 k + r has the address of row r of matrix k.

    Lane l gets elements 2 (l % 4) and the next of row l / 4, of the transposed matrix with .trans.
    """
    i.type("b16")
    i.require("sync", "aligned", "m8n8")
    if not (i.flag("shared") or i.flag("shared::cta")):
        raise i.error(".shared is expected")
    count = int(i.choice("x1", "x2", "x4")[1])
    trans = i.flag("trans")
    puts = [i.target(x, 32) for x in i.parts(0)]
    if len(puts) != count:
        raise i.error(f"{count} destinations are expected")
    address = i.address(1)
    i.finish(2)
    i.kind = "warp"
    i.touches_shared(16)

    def run(m: Machine, mask: Mask) -> None:
        where = m.wide(address(m))
        giving = (m.thread & 31) < 8 * count
        thread = np.flatnonzero(giving if mask is None else giving & mask)
        if m.counts is not None:
            m.counts.shared_access(m.pc, where[thread], 16, thread)
        try:
            got = m.shared.load(where[thread], 2, 8, thread)
        except AccessError as error:
            raise m.access_fault(error, thread) from None
        tiles = got.reshape(-1, count, 8, 8)
        if trans:
            tiles = tiles.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(tiles).view(np.uint32).reshape(-1, count, 32)
        for k, put in enumerate(puts):
            column = np.ascontiguousarray(words[:, k]).reshape(-1)
            if mask is not None:
                whole = np.zeros(m.size, np.uint32)
                whole[mask] = column
                column = whole
            put(m, column, mask)

    return run


@opcode("stmatrix")
def stmatrix(i: Decoding) -> Run:
    """Warp level matrix: the reverse of ldmatrix."""
    i.type("b16")
    i.require("sync", "aligned", "m8n8")
    if not (i.flag("shared") or i.flag("shared::cta")):
        raise i.error(".shared is expected")
    count = int(i.choice("x1", "x2", "x4")[1])
    trans = i.flag("trans")
    address = i.address(0)
    sources = [i.source(x, np.uint32) for x in i.parts(1)]
    if len(sources) != count:
        raise i.error(f"{count} sources are expected")
    i.finish(2)
    i.kind = "warp"
    i.touches_shared(16)

    def run(m: Machine, mask: Mask) -> None:
        where = m.wide(address(m))
        giving = (m.thread & 31) < 8 * count
        thread = np.flatnonzero(giving if mask is None else giving & mask)
        words = np.stack([_warps(m, get(m)) for get in sources], 1)  # [warps, count, 32]
        tiles = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            tiles = tiles.transpose(0, 1, 3, 2)
        rows = np.zeros((len(tiles), 32, 8), np.uint16)
        rows[:, : 8 * count] = tiles.reshape(-1, 8 * count, 8)
        if m.counts is not None:
            m.counts.shared_access(m.pc, where[thread], 16, thread)
        try:
            m.shared.store(where[thread], rows.reshape(-1, 8)[thread], thread)
        except AccessError as error:
            raise m.access_fault(error, thread) from None

    return run


_HALVES = {"bf16": numbers.from_bfloat16, "f16": numbers.from_float16}


def halves(m: Machine, get: Get, kind: str) -> np.ndarray:
    """[warps, 8, 8] float32: the pairs of 16 bits that lane 4 g + t holds, in row g and columns 2 t and 2 t + 1."""
    pairs = np.ascontiguousarray(m.wide(get(m))).view(np.uint16)
    out: np.ndarray = _HALVES[kind](pairs).reshape(-1, 8, 8)
    return out


def accumulators(m: Machine, gets: list[Get]) -> np.ndarray:
    """[warps, 16, 4 len(gets) / 2]: c0, c1 in row g and columns 2 t, 2 t + 1, c2, c3 in row g + 8, then 8 columns on."""
    out = np.empty((m.size // 32, 16, 2 * len(gets)), np.float32)
    for k, get in enumerate(gets):
        row, column = 8 * (k // 2 % 2), 8 * (k // 4) + k % 2
        out[:, row : row + 8, column : column + 8 : 2] = m.wide(get(m)).reshape(-1, 8, 4)
    return out


def fragments(d: np.ndarray) -> list[np.ndarray]:
    """The reverse of `accumulators`: a register each, over all threads."""
    columns = []
    for k in range(d.shape[2] // 2):
        row, column = 8 * (k // 2 % 2), 8 * (k // 4) + k % 2
        columns.append(np.ascontiguousarray(d[:, row : row + 8, column : column + 8 : 2]).reshape(-1))
    return columns


@opcode("mma")
def mma(i: Decoding) -> Run:
    """Warp level matrix, m16n8k16 (bf16 and f16) and m16n8k8 (tf32): D = A B + C, accumulated in float32.

    The order of the sum is the hardware's own. Here it is exact but for one rounding.
    """
    shape = i.choice("m16n8k16", "m16n8k8")
    i.require("sync", "aligned", "row", "col")
    c_kind, b_kind, a_kind = i.left.pop(), i.left.pop(), i.left.pop()
    d_kind = i.left.pop() if i.left else ""
    kinds = ("bf16", "f16") if shape == "m16n8k16" else ("tf32",)
    if a_kind not in kinds or a_kind != b_kind or c_kind != "f32" or d_kind != "f32":
        raise i.error("these types are not known")
    puts = [i.target(x, 32) for x in i.parts(0)]
    a, b = ([i.source(x, np.uint32) for x in i.parts(k)] for k in (1, 2))
    c = [i.source(x, np.float32) for x in i.parts(3)]
    if [len(puts), len(a), len(b), len(c)] != [4, 4, 2, 4]:
        raise i.error("4, 4, 2 and 4 registers are expected")
    i.finish(4)
    i.kind = "warp"

    def block(m: Machine, get: Get) -> np.ndarray:
        if a_kind != "tf32":
            return halves(m, get, a_kind)
        words: np.ndarray = numbers.to_tf32(np.ascontiguousarray(m.wide(get(m))).view(np.float32)).reshape(-1, 8, 4)
        return words

    def run(m: Machine, mask: Mask) -> None:
        # a0..a3: rows g and g + 8, then the second half of k; b0, b1: both halves of k
        a_blocks, b_blocks = [block(m, get) for get in a], [block(m, get) for get in b]
        left = np.concatenate([np.concatenate(a_blocks[0:2], 1), np.concatenate(a_blocks[2:4], 1)], 2)  # [warps, 16, k]
        right = np.concatenate(b_blocks, 2).transpose(0, 2, 1)  # [warps, k, 8]
        d = (np.matmul(left, right, dtype=np.float64) + accumulators(m, c)).astype(np.float32)
        for put, column in zip(puts, fragments(d), strict=True):
            put(m, column, mask)

    return run
