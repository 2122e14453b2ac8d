"""How faults are planted: a line of a kernel's PTX becomes another, among the lines that a subject's shapes execute."""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .device import program_of
from .subjects import Subject

KINDS = ("barrier", "wait", "fence", "mask", "stride", "offset", "swap", "trans")

_GUARDED = re.compile(r"@!?(%p\d+)\s+((?:ld|st|cp)\.(?!param).*)$")
_COPY_SIZE = re.compile(r"(cp\.async\.\S+ .*, 0x(\w+)), %r\d+;$")
_ADDRESS = re.compile(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+)\s*)?\]")
_STRIDE = re.compile(r"((?:mul\.(?:lo|wide)|mad\.(?:lo|wide)|shl|add)\.[subd]\d+\s.*, )(\d+)((?:, %\w+)?;)$")
_ORDERED = re.compile(r"((?:sub|setp\.(?:lt|le|gt|ge)|selp|div|cvt\.rn\.(?:bf|f)16x2)\.\S+\s+[^,]+), ([^,]+), ([^,;]+)(.*)$")
_SUMMAND = re.compile(r"((?:fma|mad)\.\S+\s+[^,]+, [^,]+), (%\w+), (%\w+);$")
_VECTOR = re.compile(r"\{\s*(%\w+),\s*(%\w+)(.*?)\}")
_WIDTHS = re.compile(r"(?:\.v(\d))?\.[busf](\d+)\s")


def _size(text: str) -> int:
    """Bytes of an access."""
    if text.startswith("cp.async"):
        return int(re.findall(r"0x(\w+)", text)[0], 16)
    if text.startswith("ldmatrix"):
        return 16
    found = _WIDTHS.search(text)
    assert found is not None, text
    return int(found[1] or 1) * int(found[2]) // 8


def mutants_of_line(line: str, always: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(kind, what stands in its place); `always`: predicates that are constants."""
    text = line.strip()
    if text.startswith(("bar.sync", "bar.warp.sync")):
        yield "barrier", ""
    elif text.startswith(("cp.async.wait", "wgmma.wait_group")):
        yield "wait", ""
    elif text.startswith(("fence.", "wgmma.fence")):
        yield "fence", ""
    plain = text
    if guarded := _GUARDED.match(text):
        plain = guarded[2]
        if guarded[1] not in always:
            yield "mask", plain
    guard = text[: len(text) - len(plain)]
    if size := _COPY_SIZE.match(plain):
        yield "mask", f"{guard}{size[1]}, {int(size[2], 16)};"
    if stride := _STRIDE.match(plain):
        yield "stride", f"{guard}{stride[1]}{int(stride[2]) + 1}{stride[3]}"
    if re.match(r"(ld|st)\.(?!param)|ldmatrix|cp\.async\.c", plain):
        for place in _ADDRESS.finditer(plain):
            moved = f"[{place[1]}+{int(place[2] or 0) + _size(plain)}]"
            yield "offset", guard + plain[: place.start()] + moved + plain[place.end() :]
    if (ordered := _ORDERED.match(plain)) and ordered[2].strip() != ordered[3].strip():
        yield "swap", f"{guard}{ordered[1]}, {ordered[3].strip()}, {ordered[2]}{ordered[4]}"
    if (summand := _SUMMAND.match(plain)) and summand[2] != summand[3] and ".wide" not in plain:
        yield "swap", f"{guard}{summand[1]}, {summand[3]}, {summand[2]};"
    if plain.startswith(("ld", "st", "mma")):
        vectors = list(_VECTOR.finditer(plain))
        for vector in vectors[1:3] if plain.startswith("mma") else vectors[:1]:  # a and b of a product
            if vector[1] != vector[2]:
                swapped = f"{{{vector[2]}, {vector[1]}{vector[3]}}}"
                yield "swap", guard + plain[: vector.start()] + swapped + plain[vector.end() :]
    if ".trans." in plain:
        yield "trans", guard + plain.replace(".trans", "")
    if plain.startswith("wgmma.mma_async") and plain.endswith("1;"):
        yield "trans", guard + plain[:-2] + "0;"


@dataclass(frozen=True)
class Mutant:
    """One changed line of one kernel's PTX."""

    subject: str
    kernel: str
    code: str  # digest of the kernel's
    instruction: int  # from 0
    line: int  # of the PTX, from 0
    kind: str
    before: str
    after: str
    source: str  # the line of Triton that it comes from

    @property
    def key(self) -> tuple[str, str, str]:
        return self.code, str(self.instruction), _digest(self.after)[:6]

    def of(self, text: str) -> str:
        """The mutated PTX."""
        lines = text.splitlines()
        lines[self.line] = self.after
        return "\n".join(lines)


def _digest(code: str) -> str:
    """Of some code, in which the names that nvcc makes of a file's place do not count."""
    return hashlib.sha256(re.sub(r"_Z\w+?(?=_param_\d|\b)", "", code).encode()).hexdigest()[:8]


@functools.cache
def digest(text: str) -> str:
    """Of the instructions of PTX: where its source lies, and on which lines, does not count."""
    kernel = program_of(text).kernel
    labels = [f"{name} {at}" for name, at in kernel.labels.items() if not name.startswith(("$L__tmp", "$L__func"))]
    return _digest("\n".join([*(x.text for x in kernel.instructions), *labels, str(kernel.threads)]))


def always_true(text: str) -> frozenset[str]:
    """Predicates that are set once, to a constant."""
    constant = set(re.findall(r"mov\.pred\s+(%p\d+), -1;", text))
    written = re.findall(r"(?:setp\S*|\w+\.pred)\s+(%p\d+)[,|]", text)
    return frozenset(p for p in constant if written.count(p) == 1)


def plant(subject: Subject, kernel: str, text: str, counts: np.ndarray, per_kind: int) -> list[Mutant]:
    """Of each kind so many, drawn by the kernel's code, among the instructions that were executed; one of each kind first."""
    executed = {
        step.instruction.line - 1: (i, step.instruction)
        for i, (step, n) in enumerate(zip(program_of(text).steps, counts, strict=True))
        if n and (not subject.files or step.instruction.source.partition(":")[0] in subject.files)
    }
    constant, found = always_true(text), dict[str, list[Mutant]]()
    for number, line in enumerate(text.splitlines()):
        if number in executed:
            for kind, after in mutants_of_line(line, constant):
                i, instruction = executed[number]
                mutant = Mutant(
                    str(subject), kernel, digest(text), i, number, kind, line.strip(), after, instruction.source
                )  # fmt: skip
                found.setdefault(kind, []).append(mutant)
    draw = random.Random(digest(text))
    for mutants in found.values():
        draw.shuffle(mutants)
    return [x for i in range(per_kind) for kind in KINDS for x in found.get(kind, [])[i : i + 1]]
