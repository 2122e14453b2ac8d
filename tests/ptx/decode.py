"""Instructions as functions. Each opcode has a decoder, which takes every modifier it knows and refuses what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import STORED, Machine, Mask, Program, Step
from .parser import Address, Immediate, Instruction, Kernel, Operand, Pair, PtxError, Register, Sink, Special, Symbol, Vector

Array = Any
Get = Callable[[Machine], Array]
Put = Callable[[Machine, Array, Mask], None]
Run = Callable[[Machine, Mask], None]

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f32": np.float32, "f64": np.float64,
}  # fmt: skip


class Decoding:
    """An instruction while it is decoded."""

    def __init__(self, instruction: Instruction, program: Program) -> None:
        self.instruction, self.program = instruction, program
        self.left = list(instruction.modifiers)
        self.kind = ""

    def error(self, what: str) -> PtxError:
        i = self.instruction
        return PtxError(f"{self.program.kernel.name}, line {i.line}: {what}: {i.text!r}")

    # ------------------------------------------------------------------------------------------------ modifiers

    def flag(self, name: str) -> bool:
        if name in self.left:
            self.left.remove(name)
            return True
        return False

    def choice(self, *names: str, default: str | None = None) -> str:
        """The one of the names that stands there."""
        for name in names:
            if self.flag(name):
                return name
        if default is None:
            raise self.error(f"one of .{', .'.join(names)} is expected")
        return default

    def type(self, *names: str) -> str:
        """The last modifier, a type."""
        if not self.left or self.left[-1] not in names:
            raise self.error(f"a type of .{', .'.join(names)} is expected last")
        return self.left.pop()

    def require(self, *names: str) -> None:
        for name in names:
            if not self.flag(name):
                raise self.error(f".{name} is expected")

    def finish(self, operands: int) -> None:
        """Nothing may be left."""
        if self.left:
            raise self.error(f"modifier .{self.left[0]} is not known")
        if len(self.instruction.operands) != operands:
            raise self.error(f"{operands} operands are expected")

    # ------------------------------------------------------------------------------------------------ operands

    def operand(self, k: int) -> Operand:
        if k >= len(self.instruction.operands):
            raise self.error(f"{k + 1} operands are expected at least")
        return self.instruction.operands[k]

    def parts(self, k: int) -> tuple[Operand, ...]:
        """Of a vector, or the operand alone."""
        found = self.operand(k)
        return found.parts if isinstance(found, Vector) else (found,)

    def constant(self, k: int) -> int:
        found = self.operand(k)
        if not isinstance(found, Immediate):
            raise self.error(f"operand {k} is expected to be a constant")
        return found.value

    def source(self, operand: int | Operand, dtype: Any, *, wider: bool = False) -> Get:
        """Reads an operand as `dtype`; `wider`: of a wider register its low bits ("Operand size exceeding type size")."""
        if isinstance(operand, int):
            operand = self.operand(operand)
        bits = np.dtype(dtype).itemsize * 8 if dtype is not np.bool_ else 1
        if isinstance(operand, Immediate):
            if dtype is np.bool_:
                value: Array = np.bool_(operand.value != 0)
            else:
                value = STORED[bits](operand.value & ((1 << bits) - 1)).view(dtype)
            return lambda m: value
        if isinstance(operand, Symbol):
            place = self.program.offsets.get(operand.name, self.program.parameters.get(operand.name))
            if place is None:
                if operand.name != self.program.kernel.dynamic_shared:
                    raise self.error(f"variable {operand.name} is not known")
                place = self.program.static_shared
            at = dtype(place)
            return lambda m: at
        if isinstance(operand, Special):
            name = operand.name
            return lambda m: m.special(name).view(dtype)
        if not isinstance(operand, Register):
            raise self.error("an operand of another form is expected")
        return self._register(operand, dtype, bits, wider)

    def _register(self, register: Register, dtype: Any, bits: int, wider: bool) -> Get:
        index, name = register.index, register.name
        if register.width != bits and not (wider and register.width > bits > 1):
            raise self.error(f"{name} has {register.width} bits, {bits} are expected")
        narrow = register.width != bits
        stored, small = STORED[register.width], STORED[bits]
        negated = register.negated

        def get(m: Machine) -> Array:
            x = m.registers[index]
            if x is None:
                raise m.fault(f"register {name} is read before anything wrote it")
            if negated:
                return ~x
            if narrow:
                return x.astype(small).view(dtype)
            return x if stored is dtype else x.view(dtype)

        return get

    def target(self, operand: int | Operand, bits: int, *, wider: bool = False) -> Put:
        """Writes an operand of so many bits; `wider`: a wider register too, which the value is extended to by its sign."""
        if isinstance(operand, int):
            operand = self.operand(operand)
        if isinstance(operand, Sink):
            return lambda m, value, mask: None
        if not isinstance(operand, Register) or operand.negated:
            raise self.error("a register is expected to be written")
        if operand.width != bits and not (wider and operand.width > bits > 1):
            raise self.error(f"{operand.name} has {operand.width} bits, {bits} are expected")
        index, stored, extend = operand.index, STORED[operand.width], operand.width != bits
        signed = np.dtype(f"int{max(operand.width, 8)}")

        def put(m: Machine, value: Array, mask: Mask) -> None:
            if extend:
                value = value.astype(signed if np.issubdtype(value.dtype, np.signedinteger) else stored)
            if value.dtype != stored:
                value = value.view(stored)
            if mask is not None:
                old = m.registers[index]
                value = np.where(mask, value, stored(~stored(0)) if old is None else old)
            m.registers[index] = value

        return put

    def address(self, k: int) -> Get:
        """int64 [threads] or one for all."""
        found = self.operand(k)
        if not isinstance(found, Address):
            raise self.error(f"operand {k} is expected to be an address")
        offset = np.int64(found.offset)
        if isinstance(found.base, Register) and found.base.width == 32:
            narrow = self.source(found.base, np.uint32)
            return lambda m: narrow(m).astype(np.int64) + offset
        base = self.source(found.base, np.int64)
        return lambda m: base(m) + offset

    def touches_shared(self, size: int) -> None:
        self.program.granule = min(self.program.granule, size)


Decoder = Callable[[Decoding], Run]
OPCODES: dict[str, Decoder] = {}


def opcode(*names: str) -> Callable[[Decoder], Decoder]:
    """Registers a decoder; its docstring begins with the group of instructions in the ISA."""

    def register(decoder: Decoder) -> Decoder:
        for name in names:
            assert name not in OPCODES
            OPCODES[name] = decoder
        return decoder

    return register


def nothing(m: Machine, mask: Mask) -> None:
    """What a control instruction does by itself."""


def decode(kernel: Kernel) -> Program:
    """Every instruction of a kernel; an opcode, modifier or type that is not known is an error that names it."""
    from . import collectives, hopper, instructions, transfers  # noqa: F401  # they fill OPCODES

    offsets, shared = {}, 0
    for variable in kernel.shared:
        shared = -(-shared // variable.align) * variable.align
        offsets[variable.name] = shared
        shared += variable.size
    parameters, total = {}, 0
    for parameter in kernel.parameters:
        total = -(-total // parameter.align) * parameter.align
        parameters[parameter.name] = total
        total += parameter.size
    program = Program(kernel, [], 16, False, False, offsets, -(-shared // 16) * 16, parameters, total)
    for instruction in kernel.instructions:
        decoding = Decoding(instruction, program)
        if instruction.opcode not in OPCODES:
            raise decoding.error(f"opcode {instruction.opcode} is not known")
        run = OPCODES[instruction.opcode](decoding)
        writes = instruction.operands[:1] if instruction.opcode not in ("st", "red", "bra", "bar") else ()
        step = Step(instruction, run, decoding.kind, -1, _registers(instruction.operands), _registers(writes))
        if step.kind == "branch":
            label = instruction.operands[0]
            if not isinstance(label, Symbol) or label.name not in kernel.labels:
                raise decoding.error("a label is expected")
            step.target = kernel.labels[label.name]
        program.steps.append(step)
    return program


def _registers(operands: tuple[Operand, ...]) -> frozenset[int]:
    """All that they name."""
    found: set[int] = set()
    left = list(operands)
    while left:
        x = left.pop()
        if isinstance(x, Register):
            found.add(x.index)
        elif isinstance(x, Vector):
            left += x.parts
        elif isinstance(x, Pair):
            left += (x.first, x.second)
        elif isinstance(x, Address):
            left.append(x.base)
    return frozenset(found)
