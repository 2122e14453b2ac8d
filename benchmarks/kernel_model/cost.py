"""What a launch costs on a chip: its machine code times how often each part of it runs, against the rate of each pipe."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from tests.kernels.aot import Launch, compile_for, resources

from .chips import SCHEDULERS, Chip
from .machine_code import bodies, by_pipe, disassemble, jumps, loops_of, returned
from .trips import Tied, Trips, trips_of

COUNTING = 8  # instructions of a loop that does nothing else


@dataclass(frozen=True)
class Code:
    """A compiled kernel: what one warp executes of each pipe, outside of its loops and in one round of each."""

    parts: list[Counter[str]]
    jumps: list[Counter[str]]  # of each part, what its longest branch forward passes over
    returned: Counter[str]  # where it returns before its loops
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
    loops = loops_of(instructions)
    parts = [by_pipe(body) for body in bodies(instructions, loops)]
    passed = [by_pipe(x) for x in jumps(instructions, loops)]
    return Code(parts, passed, by_pipe(returned(instructions, loops)), warps, resources(cubin)["REG"], shared)


@dataclass(frozen=True)
class Cost:
    """Of one launch, or of several of one kernel."""

    kernel: str
    chip: Chip
    code: Code
    ctas: int
    counts: Counter[str]  # of all warps
    bytes: int  # of its tensors: what has to come from DRAM, or go there, at least once
    launches: int = 1
    busiest: int = 0  # CTAs of the multiprocessor that gets most of each launch; 0: of one launch
    conflicts: float | None = (
        None  # waves of shared memory over what they were if no two lanes met in a bank; None: not counted
    )

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
            "shared": n["waves"] * (self.conflicts or 1.0),  # a multiprocessor moves 128 bytes a clock, one wave
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
        """The busiest multiprocessor's CTAs over the mean: what the last waves add, were all CTAs alike."""
        mean = self.ctas / self.chip.multiprocessors
        return (self.busiest or math.ceil(mean)) / mean

    def __add__(self, other: Cost) -> Cost:
        """Of both, one after the other."""
        busiest = [c.busiest or math.ceil(c.ctas / c.chip.multiprocessors) for c in (self, other)]
        return Cost(
            self.kernel, self.chip, self.code, self.ctas + other.ctas, self.counts + other.counts, self.bytes + other.bytes,
            self.launches + other.launches, sum(busiest), self.conflicts,
        )  # fmt: skip

    @property
    def predicted(self) -> float:
        """Seconds: the pipe that binds, on the busiest multiprocessor. Latencies are no part of it."""
        return self.floor * (1.0 if self.binds == "dram" else self.uneven)


def rounds_of(code: Code, trips: Trips) -> list[int]:
    """Rounds of each loop of the machine code.

    The assembler makes two loops of some short ones, four rounds at a time and what is left, which is taken to be alike in all
    CTAs; the first reads four times as much. It also keeps loops that do nothing but count. Where the rule has no round of any
    loop but the first, there may be any number of others.

    Raises:
        ValueError: where the rule has other loops than the machine code.
    """
    parts, left = code.parts[1:], list(trips.loops)
    rounds = [0] * len(parts)
    loops = [i for i, part in enumerate(parts) if part["issue"] > COUNTING]
    while loops and left:
        i, total = loops.pop(0), left.pop(0)
        rounds[i] = total
        if len(loops) > len(left) and parts[i]["global"] == 4 * parts[loops[0]]["global"] > 0:
            rounds[i] = trips.ctas * (total // max(trips.ctas, 1) // 4)
            rounds[loops.pop(0)] = total - 4 * rounds[i]
    unentered = len(trips.loops) > 1 and not any(trips.loops[1:])
    if any(left) or (loops and not unentered):
        raise ValueError(f"the machine code has {len(parts)} loops, its rule {len(trips.loops)}")
    return rounds


def counts_of(code: Code, trips: Trips, returned: int = 0) -> Counter[str]:
    """Instructions of all warps. A branch of which the rule does not speak is counted as executed.

    Args:
        returned: CTAs that return at once.
    """
    total: Counter[str] = Counter()
    rounds = [trips.ctas, *rounds_of(code, trips), returned]
    passed = [-trips.jumps.get(i, 0) for i in range(len(code.parts))]
    for part, times in zip([*code.parts, code.returned, *code.jumps], [*rounds, *passed], strict=True):
        for pipe, count in part.items():
            total[pipe] += count * times * code.warps
    return total


def cost_of(launch: Launch, chip: Chip, tied: Tied | None = None) -> Cost:
    """Of a launch."""
    code, trips = code_of(launch, chip.arch), trips_of(launch, tied)
    tensors = {
        (x.untyped_storage()._cdata, x.storage_offset()): (name, x) for name, x in launch.args.items() if isinstance(x, Tensor)
    }
    moved = sum(int(x.numel() * x.element_size() * trips.share.get(name, 1)) for name, x in tensors.values())
    return Cost(launch.fn.__name__, chip, code, launch.ctas, counts_of(code, trips, launch.ctas - trips.ctas), moved)


def by_kernel(costs: Iterable[Cost]) -> list[Cost]:
    """Those of one kernel as one, in the order in which they are first launched."""
    found: dict[tuple[str, int], Cost] = {}
    for cost in costs:
        key = cost.kernel, id(cost.code)
        found[key] = found[key] + cost if key in found else cost
    return list(found.values())
