"""Executes a kernel: the threads of many CTAs side by side as NumPy arrays, masks where they diverge.

A register is one array over all threads, or one scalar where a value is the same for all. Threads that are at the same
instruction form a group; the group furthest behind goes first, so that those that part meet again. A group that looks for
news of others (a volatile or relaxed load) steps aside until the rest can go no further.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .counts import Counts
from .memory import AccessError, Global, Shared
from .parser import Instruction, Kernel, PtxError, Register

Array = Any
Mask = Any  # bool [threads], or None for all of them

STORED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
MAX_STEPS = 20_000_000  # instructions of one batch of CTAs: more is a loop that does not end
BATCH = 4096  # threads side by side: enough that NumPy's own overhead is small


class Fault(AssertionError):  # noqa: N818  # the sanitizers' word
    """Something that the kernel must not do, and where."""


@dataclass
class Step:
    """An instruction, ready to run: `run(machine, mask)`."""

    instruction: Instruction
    run: Callable[[Machine, Mask], None]
    kind: str = ""  # "branch", "exit", "barrier", "warp" (all lanes of a warp at once), "news" (waits for others)
    target: int = -1  # of a branch
    registers: frozenset[int] = frozenset()  # all that it names
    writes: frozenset[int] = frozenset()


@dataclass
class Program:
    """A kernel, decoded."""

    kernel: Kernel
    steps: list[Step]
    granule: int  # the smallest access to shared memory, in bytes
    cooperative: bool  # CTAs wait for each other, so all must run side by side
    async_proxy: bool  # wgmma reads shared memory
    offsets: dict[str, int]  # of shared variables
    static_shared: int
    parameters: dict[str, int]  # where each begins in the block of parameters
    parameter_bytes: int


@dataclass
class Copy:
    """cp.async under way: [n] threads, each with the number of the group that it belongs to."""

    at: np.ndarray
    data: np.ndarray
    thread: np.ndarray
    group: np.ndarray


@dataclass
class Product:
    """A wgmma under way: the CTAs that are at it, each with the group it belongs to there, the registers it holds, and the
    shared bytes it reads, with who reads them.
    """

    ctas: np.ndarray  # bool [CTAs]
    group: np.ndarray  # [CTAs]
    registers: frozenset[int]
    reads: list[tuple[np.ndarray, np.ndarray]]


class Machine:
    """One batch of CTAs of a launch."""

    def __init__(
        self, program: Program, memory: Global, parameters: np.ndarray, grid: tuple[int, int, int], threads: int,
        dynamic_shared: int, ctas: np.ndarray, counts: Counts | None = None, *, fenced_copies: bool = True,
    ) -> None:  # fmt: skip
        kernel = program.kernel
        self.program, self.memory, self.parameters, self.grid = program, memory, parameters, grid
        self.threads, self.num_ctas = threads, len(ctas)
        if threads % 32:
            raise PtxError(f"{kernel.name}: {threads} threads a CTA are not whole warps")
        self.size = threads * len(ctas)
        self.thread = np.arange(self.size, dtype=np.int64)  # in the batch
        self.tid = np.tile(np.arange(threads, dtype=np.uint32), len(ctas))
        self.cta = np.repeat(np.asarray(ctas, np.int32), threads)  # in the launch
        self.registers: list[Array] = [None] * len(kernel.widths)
        self.shared = Shared(
            len(ctas), program.static_shared + dynamic_shared, threads, program.granule,
            async_proxy=program.async_proxy, fenced_copies=fenced_copies,
        )  # fmt: skip
        self.copies: list[Copy] = []
        self.group = np.zeros(self.size, np.int64)  # cp.async groups committed
        self.products: list[Product] = []
        self.product_group = np.zeros(len(ctas), np.int64)  # wgmma groups committed by each CTA
        self.product_fence = np.full(len(ctas), -1, np.int64)  # when its last wgmma.fence came
        self.register_clock = np.zeros((len(kernel.widths), len(ctas)), np.int64)  # when it wrote each last
        self.counts = counts
        self.pc = self.done = 0
        # groups of threads by the instruction before which they stand
        self.runnable: dict[int, Mask] = {}
        self.aside: dict[int, Mask] = {}  # looking for news of others
        self.at_barrier: dict[int, Mask] = {}
        self.at_warp: dict[int, Mask] = {}  # waiting for the other lanes of a warp
        self._specials: dict[str, Array] = {}

    # ---------------------------------------------------------------------------------------------------- registers

    def special(self, name: str) -> Array:
        """Those of the chapter "Special registers" that kernels read."""
        found = self._specials.get(name)
        if found is None:
            found = self._specials[name] = self._special(name)
        return found

    def _special(self, name: str) -> Array:
        x, y, _ = self.grid
        cta = self.cta.astype(np.uint32)
        lane = self.tid & np.uint32(31)
        table: dict[str, Callable[[], Array]] = {
            "%tid.x": lambda: self.tid,
            "%tid.y": lambda: np.uint32(0),
            "%tid.z": lambda: np.uint32(0),
            "%ntid.x": lambda: np.uint32(self.threads),
            "%ntid.y": lambda: np.uint32(1),
            "%ntid.z": lambda: np.uint32(1),
            "%ctaid.x": lambda: cta % np.uint32(x),
            "%ctaid.y": lambda: cta // np.uint32(x) % np.uint32(y),
            "%ctaid.z": lambda: cta // np.uint32(x * y),
            "%nctaid.x": lambda: np.uint32(self.grid[0]),
            "%nctaid.y": lambda: np.uint32(self.grid[1]),
            "%nctaid.z": lambda: np.uint32(self.grid[2]),
            "%laneid": lambda: lane,
            "%lanemask_lt": lambda: (np.uint32(1) << lane) - np.uint32(1),
            "%lanemask_le": lambda: (np.uint32(2) << lane) - np.uint32(1),
            "%lanemask_eq": lambda: np.uint32(1) << lane,
            "%lanemask_ge": lambda: ~((np.uint32(1) << lane) - np.uint32(1)),
            "%lanemask_gt": lambda: ~((np.uint32(2) << lane) - np.uint32(1)),
        }
        if name not in table:
            raise PtxError(f"{self.program.kernel.name}: special register {name} is not known")
        return table[name]()

    def wide(self, x: Array) -> np.ndarray:
        """As an array over all threads."""
        return np.broadcast_to(x, (self.size,))

    def full(self, mask: Mask) -> np.ndarray:
        return np.ones(self.size, bool) if mask is None else mask

    # ---------------------------------------------------------------------------------------------------- faults

    def fault(self, what: str, thread: int | None = None, address: int | None = None) -> Fault:
        """The exception to raise."""
        step = self.program.steps[self.pc].instruction
        message = f"{self.program.kernel.name}: {what}\n  at {step.text!r}, line {step.line} of the PTX"
        if step.source:
            message += f", {step.source}"
        if thread is not None:
            message += f"\n  thread {thread % self.threads} of CTA {int(self.cta[thread])}"
            if address is not None:
                message += f", address {address:#x}"
        return Fault(message)

    def access_fault(self, error: AccessError, thread: np.ndarray) -> Fault:
        """Of an access by these threads."""
        first = int(np.flatnonzero(error.bad)[0])
        return self.fault(error.what, int(thread[first]), int(error.address[first]))

    # ---------------------------------------------------------------------------------------------------- cp.async

    def wait_copies(self, mask: Mask, keep: int | None) -> None:
        """All but the `keep` latest groups of each thread have arrived; None: everything, committed or not."""
        left = []
        for copy in self.copies:
            mine = np.ones(len(copy.thread), bool) if mask is None else mask[copy.thread]
            done = mine if keep is None else mine & (copy.group < self.group[copy.thread] - keep)
            if done.any():
                self.shared.end_copy(copy.at[done], copy.data[done], copy.thread[done])
            if not done.all():
                left.append(Copy(copy.at[~done], copy.data[~done], copy.thread[~done], copy.group[~done]))
        self.copies = left

    # ---------------------------------------------------------------------------------------------------- control

    def run(self) -> None:
        """To the end of all threads."""
        with np.errstate(all="ignore"):
            self.runnable[0] = None
            while True:
                if self.runnable:
                    pc = min(self.runnable)
                    self._advance(pc, self.runnable.pop(pc))
                elif self.aside:
                    self.runnable, self.aside = self.aside, {}
                else:
                    break
        self._check_nobody_waits()

    def _advance(self, pc: int, mask: Mask) -> None:
        """A group goes on until it ends, waits, jumps back, or has overtaken another."""
        steps, runnable = self.program.steps, self.runnable
        limit = min(runnable, default=len(steps))
        while pc <= limit:
            if pc == limit:
                if pc == len(steps):
                    return
                mask = self._joined(mask, runnable.pop(pc))
                limit = min(runnable, default=len(steps))
            step = steps[pc]
            self.pc = pc
            if step.kind == "warp" and pc in self.at_warp:
                mask = self._joined(mask, self.at_warp.pop(pc))
            self._count(pc, mask)
            active = mask
            if step.instruction.predicate is not None:
                agreed, active = self._guarded(step.instruction.predicate, mask)
                if agreed is False:
                    pc += 1
                    continue
                if agreed is None and step.kind in ("warp", "barrier"):
                    raise self.fault("an instruction for many threads under a predicate that they disagree on")
            if self.program.async_proxy and step.instruction.opcode != "wgmma":
                self._note_registers(step, active)
            if step.kind == "":
                step.run(self, active)
                pc += 1
            elif step.kind == "branch":
                if active is mask:
                    if step.target <= pc:
                        self._add(runnable, step.target, mask)
                        return
                    pc = step.target
                else:
                    self._add(runnable, step.target, active)
                    mask = self._without(mask, active)
                    pc += 1
                    limit = min(runnable)
            elif step.kind == "exit":
                if active is mask:
                    return
                mask = self._without(mask, active)
                pc += 1
            elif step.kind == "barrier":
                step.run(self, mask)
                if mask is not None:
                    self._add(self.at_barrier, pc, mask)
                    self._open_barriers()
                    return
                self._pass_barrier(None)
                pc += 1
            elif step.kind == "warp":
                if mask is not None:
                    lanes = mask.reshape(-1, 32)
                    ready = np.repeat(lanes.all(1), 32)
                    if (mask & ~ready).any():
                        self._add(self.at_warp, pc, mask & ~ready)
                        if not ready.any():
                            return
                        mask = ready
                step.run(self, mask)
                pc += 1
            else:  # "news"
                step.run(self, active)
                self._add(self.aside, pc + 1, mask)
                return
        self._add(runnable, pc, mask)

    def _count(self, pc: int, mask: Mask) -> None:
        self.done += 1
        self.shared.clock = self.done
        if self.done > MAX_STEPS:
            raise self.fault(f"no end after {MAX_STEPS} instructions")
        if self.counts is not None:
            self.counts.execute(pc, self.size // 32 if mask is None else int(mask.reshape(-1, 32).any(1).sum()))

    def _guarded(self, predicate: Register, mask: Mask) -> tuple[bool | None, Mask]:
        """Whether the threads of a mask agree on a predicate (None: they do not), and those for whom it holds."""
        p = self.registers[predicate.index]
        if p is None:
            raise self.fault(f"predicate {predicate.name} is read before anything wrote it")
        p = np.asarray(~p if predicate.negated else p)
        if p.ndim == 0:
            return bool(p), mask
        active = p if mask is None else p & mask
        if not active.any():
            return False, mask
        if (active if mask is None else active[mask]).all():
            return True, mask
        return None, active

    def _without(self, mask: Mask, gone: np.ndarray) -> np.ndarray:
        return ~gone if mask is None else mask & ~gone

    def _joined(self, a: Mask, b: Mask) -> Mask:
        both = self.full(a) | self.full(b)
        return None if both.all() else both

    def _add(self, groups: dict[int, Mask], pc: int, mask: Mask) -> None:
        groups[pc] = self._joined(groups[pc], mask) if pc in groups else mask

    def _pass_barrier(self, mask: Mask) -> None:
        where = slice(None) if mask is None else mask
        self.shared.epoch[where] += 1
        self.shared.step[where] += 1

    def _open_barriers(self) -> None:
        """Let the CTAs go all whose threads have come."""
        at_barrier = self.at_barrier
        here = np.zeros(self.size, bool)
        for mask in at_barrier.values():
            here |= self.full(mask)
        whole = np.repeat(here.reshape(self.num_ctas, -1).all(1), self.threads)
        if not whole.any():
            return
        for pc in list(at_barrier):
            go = self.full(at_barrier[pc]) & whole
            if not go.any():
                continue
            lanes = go.reshape(-1, 32)
            if not (lanes.all(1) == lanes.any(1)).all():
                raise self.fault("lanes of one warp meet at different barriers", int(np.flatnonzero(go)[0]))
            stay = self.full(at_barrier.pop(pc)) & ~go
            if stay.any():
                at_barrier[pc] = stay
            self._pass_barrier(go)
            self._add(self.runnable, pc + 1, None if go.all() else go)

    def _check_nobody_waits(self) -> None:
        for what, waiting in (("a barrier", self.at_barrier), ("an instruction for a whole warp", self.at_warp)):
            for pc, mask in waiting.items():
                self.pc = pc
                raise self.fault(f"{what} that not all threads reach", int(np.flatnonzero(self.full(mask))[0]))

    # ---------------------------------------------------------------------------------------------------- wgmma

    def ctas_at(self, mask: Mask) -> np.ndarray:
        """bool [CTAs]: those of which a thread is there."""
        at: np.ndarray = np.any(self.full(mask).reshape(self.num_ctas, -1), axis=1)
        return at

    def _note_registers(self, step: Step, mask: Mask) -> None:
        """Registers of a wgmma under way belong to it until its CTA has waited for it."""
        ctas = self.ctas_at(mask)
        for product in self.products:
            if product.registers & step.registers and (product.ctas & ctas).any():
                raise self.fault("a register of a wgmma under way is touched before wgmma.wait_group")
        for register in step.writes:
            self.register_clock[register, ctas] = self.done

    def check_product_fence(self, registers: frozenset[int], ctas: np.ndarray) -> None:
        """Between a register's last write and the wgmma that takes it a wgmma.fence is due ("wgmma.fence")."""
        if (self.register_clock[list(registers)][:, ctas] > self.product_fence[ctas]).any():
            raise self.fault("a register was written after the last wgmma.fence")


def execute(
    program: Program, memory: Global, parameters: np.ndarray, grid: tuple[int, int, int], threads: int,
    dynamic_shared: int = 0, *, order: np.ndarray | None = None, counts: Counts | None = None, fenced_copies: bool = True,
) -> None:  # fmt: skip
    """A launch. `order` [CTAs]: which come first; those of a batch run side by side. fenced_copies: see `Shared`."""
    total = grid[0] * grid[1] * grid[2]
    order = np.arange(total) if order is None else order
    memory.begin()
    size = total if program.cooperative else max(1, BATCH // threads)
    for begin in range(0, total, size):
        Machine(
            program, memory, parameters, grid, threads, dynamic_shared, order[begin : begin + size], counts,
            fenced_copies=fenced_copies,
        ).run()  # fmt: skip
