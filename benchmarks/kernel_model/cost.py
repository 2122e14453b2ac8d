"""What a launch costs on a chip: its machine code times how often each part of it runs, against the rate of each pipe."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from tests.kernels.aot import Launch, compile_for, resources

from .chips import SCHEDULERS, Chip
from .machine_code import bodies, by_pipe, disassemble, loops_of
from .trips import Tied, Trips, trips_of


@dataclass(frozen=True)
class Code:
    """A compiled kernel: what one warp executes of each pipe, outside of its loops and in one round of each."""

    parts: list[Counter[str]]
    warps: int
    registers: int
    shared: int  # bytes


_codes: dict[tuple[str, int, str], Code] = {}


def code_of(launch: Launch, arch: int) -> Code:
    """Compiled and read once."""
    key = launch.fn.__name__, arch, f"{launch.config} {[str(x.dtype) for x in launch.args.values() if isinstance(x, Tensor)]}"
    if key not in _codes:
        compiled = compile_for(launch, arch)
        _codes[key] = read(compiled.asm["cubin"], compiled.metadata.num_warps, compiled.metadata.shared)
    return _codes[key]


def read(cubin: bytes, warps: int, shared: int) -> Code:
    instructions = disassemble(cubin)
    parts = [by_pipe(body) for body in bodies(instructions, loops_of(instructions))]
    return Code(parts, warps, resources(cubin)["REG"], shared)


@dataclass(frozen=True)
class Cost:
    """Of one launch."""

    kernel: str
    chip: Chip
    code: Code
    ctas: int
    counts: Counter[str]  # of all warps
    bytes: int  # of its tensors: what has to come from DRAM, or go there, at least once

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """The least that each pipe takes, were the work dealt out evenly; of DRAM, were nothing read twice."""
        chip, n = self.chip, self.counts
        clocks = {
            "issue": n["issue"] / SCHEDULERS,
            "tensor": n["products"] / chip.tensor,
            "exponentials": n["special"] * 32 / chip.special,
            "fp32": n["fp32"] * 32 / chip.fp32,
            "integer": (n["alu"] + n["imad"]) * 32 / (2 * chip.integer),  # two pipes: one adds and compares, one multiplies
            "shared": float(n["waves"]),  # a multiprocessor moves 128 bytes a clock, one wave
        }
        return {
            **{pipe: value / (chip.multiprocessors * chip.clock) for pipe, value in clocks.items()},
            "dram": self.bytes / chip.dram,
        }

    @property
    def binds(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def floor(self) -> float:
        """Seconds of the pipe that binds."""
        return self.seconds[self.binds]

    @property
    def resident(self) -> int:
        """CTAs of it that a multiprocessor holds at once."""
        return self.chip.resident(self.code.registers, self.code.shared, self.code.warps)

    @property
    def uneven(self) -> float:
        """The busiest multiprocessor's CTAs over the mean: what the last wave adds, were all CTAs alike."""
        mean = self.ctas / self.chip.multiprocessors
        return math.ceil(mean) / mean

    @property
    def predicted(self) -> float:
        """Seconds: the pipe that binds, on the busiest multiprocessor. Latencies are no part of it."""
        return self.floor * (1.0 if self.binds == "dram" else self.uneven)


def counts_of(code: Code, trips: Trips) -> Counter[str]:
    """Instructions of all warps. A branch within a part is counted as executed: an upper bound where it is not."""
    rounds = [trips.ctas, *trips.loops]
    if len(rounds) != len(code.parts):
        raise ValueError(f"the machine code has {len(code.parts) - 1} loops, its rule {len(trips.loops)}")
    total: Counter[str] = Counter()
    for part, times in zip(code.parts, rounds, strict=True):
        for pipe, count in part.items():
            total[pipe] += count * times * code.warps
    return total


def cost_of(launch: Launch, chip: Chip, tied: Tied | None = None) -> Cost:
    """Of a launch."""
    code = code_of(launch, chip.arch)
    tensors = {x.untyped_storage()._cdata: x for x in launch.args.values() if isinstance(x, Tensor)}
    moved = sum(x.untyped_storage().nbytes() for x in tensors.values())
    return Cost(launch.fn.__name__, chip, code, launch.ctas, counts_of(code, trips_of(launch, tied)), moved)
