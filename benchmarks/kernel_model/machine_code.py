"""A kernel's machine code: its instructions by the pipe that executes them, and its loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.kernels.aot import cuobjdump

# Opcodes by pipe; what is in none of these is integer work ("alu") unless it begins with U (the uniform datapath, "uniform").
_PIPES = {
    "tensor": ("HMMA", "HGMMA", "IMMA", "QGMMA"),
    "special": ("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV"),
    "fp32": ("FFMA", "FMUL", "FADD", "FFMA32I", "FMUL32I", "FADD32I", "HFMA2", "HADD2", "HMUL2"),
    "imad": ("IMAD", "IMUL"),
    "shared": ("LDS", "LDSM", "STS", "STSM", "ATOMS", "SHFL"),
    "global": ("LDG", "STG", "LDGSTS", "RED", "ATOM", "ATOMG", "LD", "ST", "UBLKCP", "UTMALDG"),
    "local": ("LDL", "STL"),
    "sync": (
        "BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "SYNCS", "FENCE", "MEMBAR", "ERRBAR", "WARPGROUP", "BSYNC", "BSSY",
        "NANOSLEEP", "ARRIVES", "CCTL",
    ),
    "control": ("BRA", "EXIT", "RET", "CALL", "NOP", "BRX", "JMP", "BPT", "BREAK", "KILL", "YIELD"),
    "constant": ("LDC", "LDCU", "S2R", "S2UR", "CS2R", "R2UR", "R2P", "P2R", "VOTEU", "VOTE", "REDUX", "ELECT"),
}  # fmt: skip
_PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes}
PIPES = (*_PIPES, "alu", "uniform")

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: "HMMA.16816.F32.BF16"
    operands: str
    predicate: str  # "" if there is none

    @property
    def pipe(self) -> str:
        head = self.opcode.split(".")[0]
        return _PIPE_OF.get(head) or ("uniform" if head.startswith("U") else "alu")

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.opcode.split(".")[0] == "BRA" else None
        return int(found.group(1), 16) if found else None

    @property
    def ends(self) -> bool:
        """Whether what follows is reached by branches alone."""
        always = self.predicate == "" and "," not in self.operands  # a branch may have a second predicate among its operands
        return (
            always
            and self.opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP")
            and not self.opcode.startswith("BRA.DIV")
        )

    @property
    def products(self) -> int:
        """Multiply-adds of a matrix instruction."""
        parts = self.opcode.split(".")
        if parts[0] == "HMMA":
            return {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}[parts[1]]
        if parts[0] == "HGMMA":
            m, n, k = (int(x) for x in parts[1].split("x"))
            return m * n * k // 4  # of a warp group of four warps
        return 0

    @property
    def waves(self) -> int:
        """Of 128 bytes that a warp's access to shared memory takes, banks permitting; a shuffle is one."""
        parts = self.opcode.split(".")
        if parts[0] == "LDSM":
            return int(parts[-1]) if parts[-1].isdigit() else 1
        if parts[0] in ("LDS", "STS", "STSM"):
            return {"64": 2, "128": 4}.get(next((x for x in parts if x in ("64", "128")), ""), 1)
        if parts[0] == "LDGSTS":  # writes shared memory when the bytes arrive
            return {"64": 2, "128": 4}.get(next((x for x in parts if x in ("64", "128")), ""), 1)
        return 1 if parts[0] in ("SHFL", "ATOMS") else 0


@dataclass(frozen=True)
class Loop:
    first: int  # indices of its first and last instruction
    last: int

    def __contains__(self, i: int) -> bool:
        return self.first <= i <= self.last


def disassemble(cubin: bytes) -> list[Instruction]:
    """Of one kernel."""
    found = [_LINE.match(line) for line in cuobjdump("-sass", cubin).splitlines()]
    return [Instruction(int(m[1], 16), m[3], m[4], m[2] or "") for m in found if m is not None]


def loops_of(code: Sequence[Instruction]) -> list[Loop]:
    """By the branches that lead back, in order of their first instruction; the trap after the end is none.

    A branch leads back if there is no way to it but through where it leads: what is done for a warp whose lanes have parted
    stands behind the kernel's end, and comes back without being a loop. Several branches to one place (a loop that is left in
    the middle, or `continue`) are one loop.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    after: list[list[int]] = [[] for _ in code]
    for i, instruction in enumerate(code):
        if not instruction.ends and i + 1 < len(code):
            after[i].append(i + 1)
        if instruction.target is not None and instruction.target in at:
            after[i].append(at[instruction.target])
    last: dict[int, int] = {}
    for i, instruction in enumerate(code):
        target = at.get(instruction.target, i) if instruction.target is not None else i
        if target < i and i not in reached(after, without=target):
            last[target] = max(last.get(target, 0), i)
    return [Loop(first, end) for first, end in sorted(last.items())]


def reached(after: Sequence[Sequence[int]], *, without: int, start: int = 0) -> set[int]:
    """Indices on a way from the first, that one too, that does not lead through one of them."""
    found, left = {without}, [start]
    while left:
        i = left.pop()
        if i not in found:
            found.add(i)
            left += after[i]
    return found - {without}


def bodies(code: Sequence[Instruction], loops: Sequence[Loop]) -> list[list[Instruction]]:
    """What is outside of all loops, then what each loop executes itself, without the loops inside it."""
    found: list[list[Instruction]] = [[] for _ in range(len(loops) + 1)]
    for i, instruction in enumerate(code):
        inside = [n for n, loop in enumerate(loops) if i in loop]
        innermost = min(inside, key=lambda n: loops[n].last - loops[n].first, default=-1)
        found[innermost + 1].append(instruction)
    return found


def jumps(code: Sequence[Instruction], loops: Sequence[Loop]) -> list[list[Instruction]]:
    """What the longest branch forward passes over, behind all loops, and in each of them without the loops inside it."""
    end = max((loop.last + 1 for loop in loops), default=0)
    return [_jump(code, Loop(end, len(code) - 1), []), *(_jump(code, loop, loops) for loop in loops)]


def _jump(code: Sequence[Instruction], loop: Loop, loops: Sequence[Loop]) -> list[Instruction]:
    at = {instruction.address: i for i, instruction in enumerate(code)}
    longest = range(0)
    for i in range(loop.first, loop.last):
        target = at.get(code[i].target or 0, -1)
        if target in loop and target - i > len(longest):
            longest = range(i + 1, target)
    inside = [x for x in loops if x.first in loop and x != loop]
    return [code[i] for i in longest if not any(i in x for x in inside)]


def returned(code: Sequence[Instruction], loops: Sequence[Loop]) -> list[Instruction]:
    """What is executed where a kernel returns before its loops."""
    first = loops[0].first if loops else 0
    return list(code[: max((i + 1 for i in range(first) if code[i].opcode == "EXIT"), default=0)])


def by_pipe(code: Sequence[Instruction]) -> Counter[str]:
    """Instructions a pipe, all of them as "issue", and multiply-adds and waves of shared memory, for one warp."""
    count: Counter[str] = Counter(instruction.pipe for instruction in code)
    count["issue"] = len(code)
    count["products"] = sum(instruction.products for instruction in code)
    count["waves"] = sum(instruction.waves for instruction in code)
    return count
