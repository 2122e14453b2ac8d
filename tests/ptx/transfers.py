"""Loads, stores, asynchronous copies, atomics, barriers and fences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .decode import TYPES, Decoding, Get, Run, nothing, opcode
from .machine import Copy, Machine, Mask
from .memory import UNITS, AccessError
from .parser import SIZES, Immediate

Array = Any

_TYPES = tuple(SIZES.keys() - {"f64", "f16"})
_STRONG = ("relaxed", "acquire", "release", "volatile")
_SCOPES = ("cta", "cluster", "gpu", "sys")


def _vector(i: Decoding) -> tuple[Any, int]:
    """The type and how many of it."""
    dtype = TYPES[i.type(*_TYPES)]
    return dtype, int(i.choice("v2", "v4", "v8", default="v1")[1])


def _strong(i: Decoding) -> str:
    """Whether an access is meant to meet those of other threads ("Operation types"), and how; "" if it is not."""
    found = i.choice(*_STRONG, default="none")
    if found in ("relaxed", "acquire", "release"):
        i.choice(*_SCOPES)
    i.flag("weak")
    return "" if found == "none" else found


def _hints(i: Decoding) -> None:
    """Cache hints change no value ("Cache operators")."""
    i.choice("ca", "cg", "cs", "cv", "lu", "wb", "wt", default="none")
    for hint in [x for x in i.left if x.startswith(("L1::", "L2::"))]:
        i.flag(hint)


def _spread(m: Machine, active: np.ndarray | None, column: np.ndarray) -> np.ndarray:
    """Values of the active threads among all."""
    if active is None:
        return column
    out = np.zeros(m.size, column.dtype)
    out[active] = column
    return out


def _active(m: Machine, mask: Mask, address: Array) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Which threads (None: all), their numbers, and their addresses."""
    where = m.wide(address)
    if mask is None:
        return None, m.thread, where
    active = np.flatnonzero(mask)
    return active, active, where[active]


def _count(m: Machine, space: str, where: np.ndarray, size: int, thread: np.ndarray) -> None:
    if m.counts is not None:
        count = m.counts.global_access if space == "global" else m.counts.shared_access
        count(m.pc, where, size, thread)


@opcode("ld")
def ld(i: Decoding) -> Run:
    """Data movement and conversion: a wider register is filled with the sign of .s types, else with zeros."""
    dtype, count = _vector(i)
    space = i.choice("param", "shared", "shared::cta", "global", default="global")  # a generic address is one of global memory
    strong = _strong(i)
    i.flag("nc")
    _hints(i)
    unit = np.dtype(dtype).itemsize
    parts = i.parts(0)
    if len(parts) != count:
        raise i.error(f"{count} destinations are expected")
    puts = [i.target(x, 8 * unit, wider=True) for x in parts]
    address = i.address(1)
    i.finish(2)
    if space == "param":

        def from_parameters(m: Machine, mask: Mask) -> None:
            at = np.asarray(address(m))
            outside = (at < 0) | (at > len(m.parameters) - unit * count)
            if np.any(outside & m.full(mask)):
                raise m.fault("load outside of the parameters", int(np.flatnonzero(m.wide(outside) & m.full(mask))[0]))
            at = np.where(outside, 0, at)
            for k, put in enumerate(puts):
                data = m.parameters[at[..., None] + np.arange(k * unit, (k + 1) * unit)]
                put(m, np.ascontiguousarray(data).view(dtype)[..., 0], mask)

        return from_parameters
    if space != "global":
        i.touches_shared(unit)
    if strong:
        i.kind = "news"

    def run(m: Machine, mask: Mask) -> None:
        active, thread, where = _active(m, mask, address(m))
        _count(m, space, where, unit * count, thread)
        try:
            if space == "global":
                cta = m.cta if active is None else m.cta[active]
                got = m.memory.load(where, unit, count, cta, strong=bool(strong))
            else:
                got = m.shared.load(where, unit, count, thread, strong=bool(strong))
        except AccessError as error:
            raise m.access_fault(error, thread) from None
        for k, put in enumerate(puts):
            put(m, _spread(m, active, np.ascontiguousarray(got[:, k])).view(dtype), mask)

    return run


@opcode("st")
def st(i: Decoding) -> Run:
    """Data movement and conversion."""
    dtype, count = _vector(i)
    space = i.choice("shared", "shared::cta", "global", default="global")
    strong = _strong(i)
    _hints(i)
    unit = np.dtype(dtype).itemsize
    address = i.address(0)
    parts = i.parts(1)
    if len(parts) != count:
        raise i.error(f"{count} sources are expected")
    sources = [i.source(x, UNITS[unit], wider=True) for x in parts]
    i.finish(2)
    if space != "global":
        i.touches_shared(unit)

    def run(m: Machine, mask: Mask) -> None:
        active, thread, where = _active(m, mask, address(m))
        columns = [m.wide(get(m)) for get in sources]
        value = np.stack(columns if active is None else [x[active] for x in columns], 1)
        _count(m, space, where, unit * count, thread)
        try:
            if space == "global":
                m.memory.store(where, value, m.cta if active is None else m.cta[active], strong=bool(strong))
            else:
                m.shared.store(where, value, thread, strong=bool(strong))
        except AccessError as error:
            raise m.access_fault(error, thread) from None

    return run


@opcode("cp")
def cp(i: Decoding) -> Run:
    """Data movement and conversion: cp.async and its groups. Bytes arrive when waited for; what src-size leaves out is 0."""
    i.require("async")
    if i.flag("commit_group"):
        i.finish(0)

        def commit(m: Machine, mask: Mask) -> None:
            m.group[slice(None) if mask is None else mask] += 1

        return commit
    if i.flag("wait_all"):
        i.finish(0)
        return lambda m, mask: m.wait_copies(mask, None)
    if i.flag("wait_group"):
        keep = i.constant(0)
        i.finish(1)
        return lambda m, mask: m.wait_copies(mask, keep)
    way = i.choice("ca", "cg")
    if not (i.flag("shared") or i.flag("shared::cta")):
        raise i.error(".shared is expected")
    i.require("global")
    _hints(i)
    size = i.constant(2)
    if size not in ((16,) if way == "cg" else (4, 8, 16)):
        raise i.error(f"{size} bytes cannot be copied")
    target, source = i.address(0), i.address(1)
    given: Get | None = i.source(3, np.uint32) if len(i.instruction.operands) == 4 else None
    i.finish(3 if given is None else 4)
    i.touches_shared(size)

    def run(m: Machine, mask: Mask) -> None:
        _, thread, where = _active(m, mask, target(m))
        origin = m.wide(source(m))[thread]
        bytes_ = np.full(len(thread), size) if given is None else m.wide(given(m))[thread].astype(np.int64)
        data = np.zeros((len(thread), size), np.uint8)
        # a copy of no bytes reads none, so that its address may be any
        read = np.flatnonzero(bytes_ > 0)
        if (bytes_ > size).any():
            raise m.fault(f"a copy of more than its {size} bytes", int(thread[np.flatnonzero(bytes_ > size)[0]]))
        if ((bytes_ != 0) & (bytes_ != size)).any():
            raise m.fault("a copy of a part of its bytes is not known", int(thread[read[0]]))
        try:
            if len(read):
                _count(m, "global", origin[read], size, thread[read])
                unit = min(size, 8)
                got = m.memory.load(origin[read], unit, size // unit, m.cta[thread[read]])
                data[read] = np.ascontiguousarray(got).view(np.uint8)
        except AccessError as error:
            raise m.access_fault(error, thread[read]) from None
        _count(m, "shared", where, size, thread)
        try:
            at = m.shared.begin_copy(where, size, thread)
        except AccessError as error:
            raise m.access_fault(error, thread) from None
        m.copies.append(Copy(at, data, thread, m.group[thread]))

    return run


_ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "add": np.add, "min": np.minimum, "max": np.maximum,
    "exch": lambda old, new: new,
}  # fmt: skip


@opcode("atom", "red")
def atom(i: Decoding) -> Run:
    """Synchronization and communication: on integers in global memory, one thread after another."""
    dtype = TYPES[i.type("b32", "b64", "u32", "u64", "s32", "s64")]
    i.flag("global")
    i.choice("relaxed", "acquire", "release", "acq_rel", default="relaxed")
    i.choice(*_SCOPES, default="gpu")
    operation = i.choice(*_ATOMIC, "cas")
    gives = i.instruction.opcode == "atom"
    first = 1 if gives else 0
    put = i.target(0, np.dtype(dtype).itemsize * 8) if gives else None
    address, b = i.address(first), i.source(first + 1, dtype)
    c = i.source(first + 2, dtype) if operation == "cas" else None
    i.finish(first + (3 if c else 2))

    def run(m: Machine, mask: Mask) -> None:
        active, thread, where = _active(m, mask, address(m))
        new = m.wide(b(m))[thread]
        swap = None if c is None else m.wide(c(m))[thread]

        def change(k: int, old: Array) -> Array:
            if swap is not None:
                return swap[k] if old == new[k] else old
            return _ATOMIC[operation](old, new[k])

        try:
            old = m.memory.atomic(where, change, np.dtype(dtype).itemsize, dtype)
        except AccessError as error:
            raise m.access_fault(error, thread) from None
        if put is not None:
            put(m, _spread(m, active, old), mask)

    return run


@opcode("bar")
def bar(i: Decoding) -> Run:
    """Synchronization and communication: bar.sync of a CTA, bar.warp.sync of a warp, all of it."""
    if i.flag("warp"):
        i.require("sync")
        lanes = i.source(0, np.uint32)
        i.finish(1)
        i.kind = "warp"

        def run(m: Machine, mask: Mask) -> None:
            if (np.asarray(lanes(m)) != 0xFFFFFFFF).any():
                raise m.fault("a barrier of a part of a warp is not known")
            m.shared.step[slice(None) if mask is None else mask] += 1

        return run
    i.require("sync")
    operand = i.operand(0)
    if not isinstance(operand, Immediate):
        raise i.error("a barrier of constant number is expected")
    i.finish(1)
    i.kind = "barrier"
    return nothing


@opcode("membar")
def membar(i: Decoding) -> Run:
    """Synchronization and communication: memory is one for all here, in order."""
    i.choice("cta", "gl", "sys")
    i.finish(0)
    return nothing
