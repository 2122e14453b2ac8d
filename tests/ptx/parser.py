"""PTX as text to PTX as data: the entries of a module, their parameters, registers, shared variables and instructions.

What is named here and beside the instructions are groups and sections of NVIDIA's "Parallel Thread Execution ISA".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class PtxError(Exception):
    """PTX that the machine does not know: never guessed at."""


# ------------------------------------------------------------------------------------------------------------ operands


@dataclass(frozen=True)
class Register:
    name: str
    index: int
    width: int  # bits; 1 for a predicate
    negated: bool = False  # of a predicate: !%p1


@dataclass(frozen=True)
class Immediate:
    """A constant's bits: an integer of any width, or the bits of a float (0f..., 0d...)."""

    value: int


@dataclass(frozen=True)
class Special:
    """A special register, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, by its name."""

    name: str


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """d|p: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True)
class Sink:
    """_: a destination that nobody reads."""


Operand = Register | Immediate | Special | Symbol | Vector | Pair | Address | Sink


# -------------------------------------------------------------------------------------------------------- declarations


@dataclass(frozen=True)
class Variable:
    name: str
    size: int  # bytes
    align: int
    initial: bytes = b""


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str  # "u64", "f32", or "b8" for bytes
    size: int
    align: int


@dataclass
class Instruction:
    opcode: str  # "add", the first word
    modifiers: tuple[str, ...]  # ("s32",)
    operands: tuple[Operand, ...]
    predicate: Register | None
    text: str
    line: int  # in the PTX
    source: str  # "attention.py:93", as the compiler's .loc says


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter] = field(default_factory=list)
    threads: int | None = None  # a CTA: .reqntid, or .maxntid
    widths: list[int] = field(default_factory=list)  # of each register, in bits
    shared: list[Variable] = field(default_factory=list)  # of a size that is known
    dynamic_shared: str | None = None  # the extern array, whose size the launch says
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class Module:
    kernels: dict[str, Kernel]
    globals: list[Variable]


SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
SIZES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}

_VARIABLE = re.compile(
    r"(?P<extern>\.extern\s+)?\.(?P<space>shared|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?P<name>[\w$%]+)(?P<array>\[(?P<count>\d*)\])?\s*(?:=\s*\{(?P<initial>[^}]*)\})?$"
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$%]+)(?:\[(?P<count>\d+)\])?$"
)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"(?:\s+"([^"]+)")?', re.MULTILINE)
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")


def parse(text: str) -> Module:
    """All entries of a PTX module."""
    files = {int(number): (second or first).rsplit("/", 1)[-1] for number, first, second in _FILE.findall(text)}
    lines = [line.split("//")[0].rstrip() for line in text.splitlines()]
    module = Module({}, [])
    shared: list[Variable] = []
    dynamic: str | None = None
    i = 0
    while i < len(lines):
        line = lines[i].strip()
        if ".entry" in line:
            i, kernel = _entry(lines, i, files, dynamic)
            kernel.shared = shared + kernel.shared
            module.kernels[kernel.name] = kernel
            continue
        if re.match(r"\.(visible\s+|weak\s+)?\.?func\b", line):
            raise PtxError(f"line {i + 1}: functions are not known: {line}")
        variable = _VARIABLE.match(line.rstrip(";").removeprefix(".visible ").removeprefix(".weak "))
        if variable:
            if variable["extern"]:
                dynamic = variable["name"]
            else:
                (shared if variable["space"] == "shared" else module.globals).append(_variable(variable))
        i += 1
    return module


def _variable(match: re.Match[str]) -> Variable:
    item = SIZES[match["type"]]
    count = int(match["count"] or 1) if match["array"] else 1
    initial = b""
    if match["initial"]:
        initial = b"".join(int(x, 0).to_bytes(item, "little", signed=int(x, 0) < 0) for x in match["initial"].split(","))
    return Variable(match["name"], item * count, int(match["align"] or item), initial)


def _entry(lines: list[str], i: int, files: dict[int, str], dynamic: str | None) -> tuple[int, Kernel]:
    """The entry that begins at line i, and the line after it."""
    head = lines[i]
    while lines[i].strip() != "{":
        i += 1
        if lines[i].strip() != "{":
            head += " " + lines[i].strip()
    name, _, rest = head[head.index(".entry") + 6 :].partition("(")
    kernel = Kernel(name.strip(), dynamic_shared=dynamic)
    inside, _, after = rest.rpartition(")")
    for piece in filter(None, (x.strip() for x in inside.split(","))):
        match = _PARAMETER.match(piece)
        if match is None or match["type"] not in SIZES:
            raise PtxError(f"{kernel.name}: parameter {piece!r} is not known")
        size = SIZES[match["type"]] * int(match["count"] or 1)
        kernel.parameters.append(Parameter(match["name"], match["type"], size, int(match["align"] or SIZES[match["type"]])))
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", after)
    if threads:
        kernel.threads = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
    end = i + 1
    while lines[end] != "}":
        end += 1
    _Body(kernel, files).read(lines, i + 1, end)
    return end + 1, kernel


class _Body:
    """Reads an entry's statements. Registers of a nested scope hide those of the same name outside."""

    def __init__(self, kernel: Kernel, files: dict[int, str]) -> None:
        self.kernel, self.files = kernel, files
        self.scopes: list[dict[str, tuple[int, int]]] = [{}]  # name -> index, width
        self.source = ""

    def read(self, lines: list[str], begin: int, end: int) -> None:
        # Registers first: the index of one is known only once it is declared, which is at the top of its scope.
        for statement, number in self._statements(lines, begin, end):
            if statement == "{":
                self.scopes.append({})
            elif statement == "}":
                self.scopes.pop()
            elif loc := _LOC.match(statement):
                self.source = f"{self.files.get(int(loc[1]), loc[1])}:{loc[2]}"
            elif statement.startswith(".reg"):
                self._declare(statement)
            elif statement.startswith((".shared", ".local", ".const", ".global")):
                match = _VARIABLE.match(statement)
                if match is None or match["space"] != "shared":
                    raise PtxError(f"line {number}: {statement}: only shared variables are known inside an entry")
                self.kernel.shared.append(_variable(match))
            elif statement.startswith("."):
                if not statement.startswith((".pragma", ".file", ".section")):
                    raise PtxError(f"line {number}: directive {statement!r} is not known")
            elif statement.endswith(":"):
                self.kernel.labels[statement[:-1]] = len(self.kernel.instructions)
            else:
                self.kernel.instructions.append(self._instruction(statement, number))

    @staticmethod
    def _statements(lines: list[str], begin: int, end: int) -> Iterator[tuple[str, int]]:
        """Statements with the line each begins on: those that end in ";", labels, .loc, and braces that open a scope."""
        pending, first = "", 0
        for number in range(begin, end):
            line = lines[number].strip()
            if not pending and re.match(r"\.(loc|file)\s", line):
                yield line, number + 1
                continue
            for piece in re.split(r"(?<=[;{}])|(?<=[\w$]:)(?=\s|$)", line):
                piece = piece.strip()
                if not piece:
                    continue
                if not pending:
                    first = number + 1
                    if piece in "{}" or piece.endswith(":"):
                        yield piece, first
                        continue
                pending = f"{pending} {piece}" if pending else piece
                if piece.endswith(";"):
                    yield pending[:-1].strip(), first
                    pending = ""
        if pending:
            raise PtxError(f"line {first}: a statement that does not end: {pending}")

    def _declare(self, statement: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement)
        if match is None:
            raise PtxError(f"declaration {statement!r} is not known")
        width = 1 if match[1] == "pred" else 8 * SIZES[match[1]]
        for name in match[2].split(","):
            many = re.match(r"([\w$%]+)<(\d+)>$", name.strip())
            for one in [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [name.strip()]:
                self.scopes[-1][one] = len(self.kernel.widths), width
                self.kernel.widths.append(width)

    def _instruction(self, statement: str, number: int) -> Instruction:
        predicate, rest = None, statement
        if rest.startswith("@"):
            guard, rest = rest[1:].split(None, 1)
            found = self._operand(guard)
            if not isinstance(found, Register) or found.width != 1:
                raise PtxError(f"line {number}: {guard!r} is no predicate: {statement}")
            predicate = found
        words = rest.split(None, 1)
        # "shared::cta" and the like are one modifier
        opcode, *modifiers = words[0].split(".")
        operands = tuple(self._operand(x) for x in _split(words[1])) if len(words) > 1 else ()
        return Instruction(opcode, tuple(modifiers), operands, predicate, re.sub(r"\s+", " ", statement), number, self.source)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operand(x) for x in _split(text[1:-1])))
        if text.startswith("["):
            match = re.match(r"(.*?)\s*(?:\+\s*(-?\d+))?$", text[1:-1].strip())
            if match is None:
                raise PtxError(f"address {text!r} is not known")
            return Address(self._operand(match[1]), int(match[2] or 0))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if text == "_":
            return Sink()
        if text.startswith("!"):
            inner = self._operand(text[1:])
            if not isinstance(inner, Register) or inner.width != 1:
                raise PtxError(f"operand {text!r} is not known")
            return Register(inner.name, inner.index, 1, not inner.negated)
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0) if not re.match(r"-?0\d", text) else int(text.rstrip("U"), 8))
        if re.match(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16))
        for scope in reversed(self.scopes):
            if text in scope:
                return Register(text, *scope[text])
        if text.startswith("%"):
            return Special(text)
        if re.match(r"[\w$]+$", text):
            return Symbol(text)
        raise PtxError(f"operand {text!r} is not known")


def _split(text: str) -> list[str]:
    """At the commas that stand outside of brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    if current.strip():
        parts.append(current.strip())
    return parts
