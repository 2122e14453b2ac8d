"""How good the machine and the bounds are: faults planted in every family of compiled kernels, one at a time.

    python -m tests.ptx.mutations                        plants what has no verdict yet (half an hour of one core)
    python -m tests.ptx.mutations --families row_dot     of these families alone
    python -m tests.ptx.mutations --page                 writes docs/compiled.md

Verdicts are kept in tests/ptx/mutations.csv, a row a mutant, as they come; a run goes on where another ended.

A mutant is a kernel whose PTX differs in one place. It is *reported* where the machine raises a fault, *failing* where a result
is farther from the definition than rounding explains, *surviving* where results differ within the bounds, and *equivalent*
where no byte of any output or gradient differs and nothing is reported at any of its subject's shapes, for a reason that is
found by watching what the changed instruction gives. Only instructions that these shapes execute are changed.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import hashlib
import itertools
import random
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ..bounds import as_list, ratio_to_bound, with_bounds
from . import cuda, device, machine
from .device import Device, program_of
from .machine import Fault, Machine, Mask, Program
from .memory import Global
from .parser import PtxError
from .subjects import SUBJECTS, Shape, Subject, family_of

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_suffix(".csv")
PER_KIND = 3  # mutants of one kind in one kernel
KINDS = ("barrier", "wait", "fence", "mask", "stride", "offset", "swap", "trans")

# ------------------------------------------------------------------------------------------------------------- planting

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
        for i, (step, n) in enumerate(zip(program_of(text).steps, counts, strict=True)) if n
    }  # fmt: skip
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


# -------------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Launched:
    """A launch of a kernel as it is, and what the storages of its arguments held: bytes, and which were written."""

    program: Program
    before: list[tuple[np.ndarray, np.ndarray]]
    after: list[tuple[np.ndarray, np.ndarray]]


@contextmanager
def knowing(launches: list[Launched], unless: Program | None = None) -> Iterator[None]:
    """A launch that begins as it did leaves what it left, and is not executed again, `unless` it is of this program.

    Those past the end of `launches` are added to it.
    """
    number, known = itertools.count(), len(launches)

    def contents(memory: Global) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(x.data.copy(), np.array([] if x.written is None else x.written)) for x in memory.storages]

    def same(a: list[tuple[np.ndarray, np.ndarray]], b: list[tuple[np.ndarray, np.ndarray]]) -> bool:
        return all(np.array_equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))

    def execute(program: Program, memory: Global, *arguments: Any, **options: Any) -> None:
        i, before = next(number), contents(memory)
        as_it_was = launches[i] if i < known else None
        if as_it_was and program is as_it_was.program and program is not unless and same(before, as_it_was.before):
            for storage, (data, written) in zip(memory.storages, as_it_was.after, strict=True):
                storage.data[:] = data
                if storage.written is not None:
                    storage.written[:] = written
            return
        machine.execute(program, memory, *arguments, **options)
        if i >= known:
            launches.append(Launched(program, before, contents(memory)))

    with mock.patch.object(sys.modules[Device.__module__], "execute", execute):
        yield


@dataclass
class Run:
    """A shape, what it gives, how far that may be from its definition, and the kernels that were launched for it."""

    shape: Shape
    upstream: list[Tensor]
    results: list[Tensor]
    wanted: list[Any]
    warps: dict[str, np.ndarray]  # by PTX, [instructions]
    names: dict[str, str]
    launches: list[Launched]
    steps: int  # of the batch of CTAs that took most


def results_of(
    subject: Subject, shape: Shape, upstream: list[Tensor] | None, **options: Any
) -> tuple[list[Tensor], list[Tensor], Device | cuda.Runtime]:
    """Outputs and gradients, and the upstream gradients, which are drawn where they are not given."""
    if shape.exact:
        with cuda.device(**options) as runtime:
            return as_list(shape.op()), [], runtime
    given = [x.clone().requires_grad_() for x in shape.inputs]
    with device(subject.arch, **options) as made:
        ys = as_list(shape.op(*given))
        if upstream is None:
            g = torch.Generator().manual_seed(1)
            upstream = [torch.randn(y.shape, dtype=torch.float64, generator=g).to(y.dtype) for y in ys]
        gradients = torch.autograd.grad(ys, given, upstream, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*ys, *gradients)], upstream, made


@functools.cache
def runs_of(number: int) -> list[Run]:
    """Of SUBJECTS[number] as it is."""
    subject, runs = SUBJECTS[number], []
    for make in subject.shapes:
        shape, launched, launches = make(), list[tuple[str, str]](), list[Launched]()

        def note(kernel: str, text: str, launched: list[tuple[str, str]] = launched) -> str:
            launched.append((text, kernel))
            return text

        steps, plain = [0], Machine.run

        def run(m: Machine, steps: list[int] = steps, plain: Callable[[Machine], None] = plain) -> None:
            plain(m)
            steps.append(m.done)

        with knowing(launches), mock.patch.object(Machine, "run", run):
            results, upstream, made = results_of(subject, shape, None, mutate=note, count=True)
        warps = dict[str, np.ndarray]()
        if shape.exact:
            wanted = as_list(shape.definition())
        else:
            given = () if shape.ratios else upstream
            wanted = list(with_bounds(shape.definition, shape.inputs, given, fast_exp=False))
        for (text, _), counts in zip(launched, made.counts, strict=True):
            warps[text] = warps.get(text, 0) + counts.warps
        runs.append(Run(shape, upstream, results, wanted, warps, dict(launched), launches, max(steps)))
        assert not differing(runs[-1], results), f"{subject}: the kernels as they are fail"
    return runs


def differing(run: Run, results: list[Tensor]) -> list[str]:
    """Results that are farther from the definition than rounding explains; exact ones that differ."""
    pairs = list(zip(results, run.wanted, strict=run.shape.ratios is None))
    if run.shape.exact:
        return [f"result {i} differs" for i, (got, wanted) in enumerate(pairs) if not torch.equal(got, wanted)]
    ratios = [ratio_to_bound(got, wanted, parts=run.shape.parts) for got, wanted in pairs]
    if run.shape.ratios:
        ratios += run.shape.ratios(results[len(pairs) :], run.upstream)
    return [f"result {i}: {x:.2g} bounds off" for i, x in enumerate(ratios) if not x <= 1]


def same_bytes(a: list[Tensor], b: list[Tensor]) -> bool:
    def bytes_of(x: Tensor) -> Tensor:
        return x.contiguous().flatten().view(torch.uint8)

    return all(x.shape == y.shape and torch.equal(bytes_of(x), bytes_of(y)) for x, y in zip(a, b, strict=True))


def _step_at(program: Program, line: int) -> int:
    return next(pc for pc, step in enumerate(program.steps) if step.instruction.line - 1 == line)


def watched(subject: Subject, run: Run, text: str, mutant: Mutant, mutate: Callable[[str, str], str]) -> tuple[str, bool]:
    """(a digest of all that the instruction gives to registers, whether its guard held for every thread)."""
    program = program_of(text)
    pc = _step_at(program, mutant.line)
    step, given, held = program.steps[pc], hashlib.sha256(), True
    plain, guarded = step.run, Machine._guarded

    def noting(m: Machine, mask: Mask) -> None:
        plain(m, mask)
        for register in sorted(step.writes):
            given.update(m.wide(m.registers[register])[m.full(mask)].tobytes())

    def guard(m: Machine, predicate: Any, mask: Mask) -> tuple[bool | None, Mask]:
        nonlocal held
        agreed, active = guarded(m, predicate, mask)
        if m.program is program and m.pc == pc and not agreed:
            held = False
        return agreed, active

    step.run = noting
    try:
        with mock.patch.object(Machine, "_guarded", guard), knowing(run.launches, unless=program):
            results_of(subject, run.shape, run.upstream, mutate=mutate)
    finally:
        step.run = plain
    return given.hexdigest(), held


def reason(subject: Subject, mutant: Mutant, reached: list[Run], mutate: Callable[[str, str], str]) -> str:
    """Why a mutant changes nothing."""
    if mutant.kind in ("barrier", "wait", "fence"):
        return "what it orders is ordered by others too, or touched by one thread alone"
    same = always = True
    for run in reached:
        text = next(text for text in run.names if digest(text) == mutant.code)
        given, held = watched(subject, run, text, mutant, lambda _, text: text)
        always &= held
        if mutant.kind != "mask":
            same &= watched(subject, run, mutant.of(text), mutant, mutate)[0] == given
    what = "store" if mutant.after.startswith("st") else "load"
    if mutant.kind == "mask" and mutant.before.startswith("@"):
        if always:
            return f"mask of a {what}: holds for every thread"
        if what == "store":
            return "mask of a store: the other threads write the same values there"
        return "mask of a load: nothing that is stored depends on what the other threads read"
    if mutant.kind == "mask":
        return "zeros of a copy: nothing that is stored depends on them"
    return "gives the same values" if same else "nothing that is stored depends on what it gives"


@functools.cache
def kernels_commit() -> str:
    """The last one that changed a kernel, and whether that is what is here."""
    paths = ["kernels/*.py", "csrc/cuda"]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments, "--", *paths], capture_output=True, text=True, check=True, cwd=ROOT)
        return done.stdout.strip()

    return git("log", "-1", "--format=%h") + (", changed" if git("status", "--porcelain") else "")


@dataclass(frozen=True, order=True)
class Verdict:
    """On one mutant: a row of mutations.csv, in which the first row of some code names its kernel, chip and commit."""

    kernel: str
    arch: str
    commit: str  # the last that changed a kernel then
    code: str  # digest of the kernel's as it was compiled
    instruction: str  # its number in the code, from 0
    kind: str
    change: str  # digest of what the instruction became
    verdict: str
    why: str  # of one that survived: the instruction and what it became

    @property
    def key(self) -> tuple[str, str, str]:
        return self.code, self.instruction, self.change


def judge(number: int, mutant: Mutant, *, reasons: bool = True) -> Verdict:
    """Its verdict, and why; `reasons`: of the equivalent too, which takes as long again."""
    subject = SUBJECTS[number]
    reached = [run for run in runs_of(number) if any(digest(text) == mutant.code for text in run.names)]
    verdict, why = "equivalent", ""

    def mutate(kernel: str, text: str) -> str:
        return mutant.of(text) if digest(text) == mutant.code else text

    for run in reached:
        try:
            with mock.patch.object(machine, "MAX_STEPS", 20 * run.steps + 10_000), knowing(run.launches):
                results, *_ = results_of(subject, run.shape, run.upstream, mutate=mutate)
        except Fault as fault:
            verdict, why = "reported", _detector(str(fault).splitlines()[0].partition(": ")[2])
            break
        except PtxError as error:
            verdict, why = "no PTX", str(error)
            break
        except (RuntimeError, ValueError, MemoryError) as error:  # of host code that was given wrong sizes
            message = re.sub(r"\S*/(?=csrc/)", "", str(error).splitlines()[0])  # wherever it was compiled
            verdict, why = "failing", f"{type(error).__name__}: {message}"
            break
        if same_bytes(results, run.results):
            continue
        if found := differing(run, results):
            verdict, why = "failing", found[0]
            break
        verdict, why = "surviving", f"{mutant.source}: {_plain(mutant.before)} -> {_plain(mutant.after)}"
    if verdict == "equivalent" and reasons:
        why = reason(subject, mutant, reached, mutate)
    code, instruction, change = mutant.key
    return Verdict(
        mutant.kernel, str(subject.arch), kernels_commit(), code, instruction, mutant.kind, change, verdict, why
    )  # fmt: skip


def _detector(fault: str) -> str:
    """A fault without the numbers and arguments that are of one mutant."""
    return re.sub(
        r"(argument|bytes of|values to|input) (?!(?:its|shared)\b)\w+", r"\1 ...", re.sub(r"\d+ ", "n ", fault)
    ).replace(" (n bytes)", "")


def _plain(text: str) -> str:
    return " ".join(text.split()) or "nothing"


FAMILIES = [x for x in dict.fromkeys(x.family for x in SUBJECTS) if x != "khop" or cuda.home() is not None]


def all_mutants(per_kind: int = PER_KIND, families: Collection[str] = FAMILIES) -> list[tuple[int, Mutant]]:
    """Each with the number of its subject; a kernel's code is planted in once.

    The order mixes subjects, and every kernel has one of each kind before one has two, so that a part of it is a fair sample.
    """
    found: list[tuple[int, Mutant]] = []
    seen: set[str] = set()
    for number, subject in enumerate(SUBJECTS):
        if subject.family not in families:
            continue
        texts: dict[str, list[np.ndarray]] = {}
        for run in runs_of(number):
            for text, counts in run.warps.items():
                texts.setdefault(text, []).append(counts)
        names = {text: kernel for run in runs_of(number) for text, kernel in run.names.items()}
        for text, warps in texts.items():
            if subject.owns(names[text]) and digest(text) not in seen:
                seen.add(digest(text))
                found += [(number, x) for x in plant(subject, names[text], text, np.sum(warps, 0), per_kind)]
    random.Random(0).shuffle(found)
    rounds, placed = dict[Mutant, int](), collections.Counter[tuple[str, str]]()
    for _, x in found:
        rounds[x] = placed[x.code, x.kind]
        placed[x.code, x.kind] += 1
    return sorted(found, key=lambda pair: rounds[pair[1]])


def sample(count: int, subjects: tuple[str, ...]) -> list[tuple[int, Mutant]]:
    """So many mutants of some subjects, the same each time."""
    found: list[tuple[int, Mutant]] = []
    for number, subject in enumerate(SUBJECTS):
        if str(subject) in subjects:
            run = runs_of(number)[0]
            for text, kernel in run.names.items():
                found += [(number, x) for x in plant(subject, kernel, text, run.warps[text], 1) if subject.owns(kernel)]
    random.Random(0).shuffle(found)
    return found[:count]


# ------------------------------------------------------------------------------------------------------------- the page

PAGE = ROOT / "docs" / "compiled.md"

INTRODUCTION = """# Compiled kernels, executed without a GPU

Made by `python -m tests.ptx.mutations --page`. What Triton and nvcc compile is executed on the CPU by `tests/ptx`, through the
library's own launchers, and watched as compute-sanitizer would watch it. Results are held to float64 with derived bounds, and
to each other with the blocks in two orders. None of it has run on a GPU.

`make test` runs {some} cases of `tests/compiled`, `make test-all` and CI all of the {everything}.

## Faults of the library that it found"""

PLANTED = """## How many planted faults it finds

Each mutant is a kernel with one place of its PTX changed: a barrier, wait or fence removed, the mask of a load or store
removed, a stride or an offset off by one, two operands swapped, a transposition dropped. Places are drawn among the
instructions that the shapes of `tests/ptx/subjects.py` execute. An equivalent mutant changes no byte of any output or gradient
at any of its shapes, and nothing is reported of it; the last column is the share of the others that is reported or fails.
Blocks run in one order, so that races between them are left to the machine.

A verdict is of a kernel as it was compiled then; of one that has changed since, the tool plants anew when it runs again. They
are kept one by one in `tests/ptx/mutations.csv`.
"""

SURVIVED = """### What survived

Results differ from those of the kernel as it is, and stay within the bounds at these shapes. Why, by reading the code:
"""

NONE_SURVIVED = """### What survived

None: where results differed and stayed within the bounds, bounds were made tighter, or shapes were added at which they do not.
"""

FAULTS = """
| found | mended by |
| --- | --- |
| `attention_bce`, sharp maps: the passes over all keys and over edges rounded a score differently, and a / (1 - a) multiplied \
the difference | "attention_bce is exact at any gap, values and gradients" |
| `khop_pull_kernel`: warps of many blocks set one flag with plain stores, which the memory model calls a race | "The flags of \
k-hop's hops are volatile" |
| `bce_rows_bwd_kernel_dense_dq` with drawn negatives, sm_90: a register of an operand was written while the product of the \
round before read it, for which ptxas made every product wait | "BCE of drawn negatives runs its products of sm_90 side by \
side; it is executed for that chip too" |
| `bce_rows_bwd_kernel_edges_dk` with chosen rows, D from 65 on: Triton 3.6 and 3.7 took what a loop reduces of its first step \
for all steps, so that dk lacked edges | "On a GPU dk of attention_bce with chosen rows has all its edges"; every compiled \
kernel is held to what its source depends on, `tests/kernels/dataflow.py` |
""".replace("\\\n", "")

# (the kernel's name or how it begins, kind, a part of the instruction): why no comparison can see it
EXPLAINED = {
    ("bce_rows_fwd_kernel_edges", "swap", "sub.s64 %rd10"): "the last of a hub's segments comes before the first, so that it \
walks the hub whole: the same sum in another order",
    ("bce_rows_fwd_kernel_edges", "swap", "sub.s64 %rd8"): "the degree of a row with its sign turned: the target of a row's \
only edge is its weight over its weight, rounded twice, for 1",
    ("bce_rows_bwd_kernel_segments_dk", "stride", "add.s64"): "the last edge of a segment of over 64 taken for one of the \
first row, one term of seventy: below the bound of a bfloat16 sum of that length",
    ("row_dot_fwd_kernel", "offset", "ld.global.b64"): "reads where the segments of a hub end for where they begin, so that \
it walks the hub whole: the same sum in another order",
    ("attention_fwd_kernel", "swap", "fma.rn.ftz"): "a high coefficient of the polynomial of a logarithm",
    ("bce_rows_fwd_kernel", "swap", "fma.rn.ftz"): "a coefficient of the polynomial of log(1 - a), which moves that by 3e-4 at \
most, where a is nearly 2/3, and is multiplied by its target in an edge of a hub; the bound of a row's loss is 1e-4 here",
    ("bit_sum_kernel_pieces", "swap", "sub.f32"): "the sign of a last piece of float32, of its last eight binary digits: below \
the bound of a gradient that is rounded to bfloat16",
    ("bit_sum_kernel", "swap", "mma.sync"): "rows of a last piece exchanged, of the last eight binary digits of what is added: \
below the bound of a gradient that is rounded to bfloat16",
}  # fmt: skip

EARLIER = """
## Before

Verdicts of these were not kept one by one. Of kernels as they were at 8dcd0ef, `row_dot_fwd_kernel` at ed32135:

| family | mutants | equivalent | reported by the machine | failing a comparison | surviving |
| --- | ---: | ---: | ---: | ---: | ---: |
| attention, forward | 132 | 20 | 82 | 29 | 1 |
| edge_attention | 180 | 15 | 118 | 47 | 0 |
| masked_spmm | 103 | 5 | 65 | 33 | 0 |
| perturbation_attention | 43 | 4 | 29 | 10 | 0 |
| relational_spmm | 87 | 3 | 60 | 24 | 0 |
| row_dot | 169 | 17 | 105 | 45 | 2 |
| set_sum | 15 | 1 | 11 | 3 | 0 |

Before that, of 797 mutants 130 were equivalent, 444 reported, 219 failing and 4 surviving: of attention's backward with its
forward 309, one surviving, and of `attention_bce` 216, two. Of `csrc/cuda`, which has not changed since, none of 217 survived.

Mutants that change nothing at any shape were read, and some owed that to the shapes: one tie, rows of one step, hubs of two
segments, tiles of which three keys were left. The shapes have more since, and such mutants are found. What survived then:

* `attention_bwd_kernel_dq`, few queries: two operands of a product exchanged, of a group of eight keys of the last tile for
  queries over a thousand keys. What they weigh is below the bound of a bfloat16 sum of that length; in a shape that has come
  since, the last keys weigh more, and such a mutant is found.
* `bce_rows_fwd_kernel_sharp`: the exponent's part of a logarithm of 1 to 2. It matters where the argument is above 4/3, for
  a sharp entry of 2/3 to 3/4, and is 1e-7 otherwise.
* `bce_rows_bwd_kernel_dense_dk`, drawn negatives: the sign of a score in the share that a sharp entry takes from the
  others, which is capped at 1 and multiplied by a pull below the bound of the sum that it enters.
* `row_dot_fwd_kernel`, two: the end of a hub's segments read for their beginning, so that it walks the hub whole: the same sum
  in another order.
* `attention_fwd_kernel`, masked keys: a high coefficient of the polynomial of a logarithm.
* `row_dot_bwd_kernel_dk_segments`: one edge of a hub taken for its neighbour, one term of 1,300. Hubs have 90 and 280
  entries since.
"""


def _collected(*options: str) -> int:
    """Cases of tests/compiled."""
    command = [sys.executable, "-m", "pytest", "tests/compiled", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return sum("::" in line for line in done.stdout.splitlines())


def _table(by: str, of: Callable[[Verdict], str], results: list[Verdict]) -> list[str]:
    lines = [
        f"| {by} | mutants | equivalent | reported by the machine | failing a comparison | surviving | found |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[str, list[Verdict]] = {}
    for x in results:
        groups.setdefault(of(x), []).append(x)
    order = list(KINDS) if by == "kind" else sorted(groups)
    for name in [*(x for x in order if x in groups), "all"]:
        mine = results if name == "all" else groups[name]
        equivalent, reported, failing, surviving = (
            sum(x.verdict == verdict for x in mine) for verdict in ("equivalent", "reported", "failing", "surviving")
        )
        counted = reported + failing + surviving
        share = f"{(reported + failing) / counted:.1%}" if counted else ""
        lines.append(f"| {name} | {len(mine)} | {equivalent} | {reported} | {failing} | {surviving} | {share} |")
    return lines


def _family(x: Verdict) -> str:
    return family_of(x.kernel)


def _explanation(x: Verdict) -> str:
    for (kernel, kind, part), why in EXPLAINED.items():
        if x.kernel.startswith(kernel) and x.kind == kind and part in x.why:
            return why
    return "not explained yet"


def tables(results: list[Verdict]) -> str:
    """What docs/compiled.md says of verdicts, after its introduction."""
    kernels: dict[str, set[str]] = {}
    for x in results:
        kernels.setdefault(_family(x), set()).add(x.kernel)
    reasons = collections.Counter((x.kind, x.why) for x in results if x.verdict == "equivalent")
    detectors = collections.Counter(x.why for x in results if x.verdict == "reported")
    commits = {name: sorted({x.commit for x in results if _family(x) == name}) for name in kernels}
    families = [
        f"| {x} | {', '.join(f'`{kernel}`' for kernel in sorted(kernels[x]))} | {', '.join(commits[x])} |"
        for x in sorted(kernels)
    ]
    survivors = []
    for x in sorted(x for x in results if x.verdict == "surviving"):
        source, _, change = x.why.partition(": ")
        before, _, after = change.partition(" -> ")
        survivors.append(f"| `{x.kernel}`, sm_{x.arch}, {source} | `{before}` | `{after}` | {_explanation(x)} |")
    header = [SURVIVED, "| kernel | instruction | changed to | why |", "| --- | --- | --- | --- |"]
    survived = [*header, *survivors, ""] if survivors else [NONE_SURVIVED]
    lines = [
        PLANTED, *_table("kind", lambda x: x.kind, results), "", *_table("family", _family, results), "",
        "| family | kernels | as of |", "| --- | --- | --- |", *families, "",
        "### What was reported", "", "| fault | mutants |", "| --- | ---: |",
        *(f"| {what} | {n} |" for what, n in sorted(detectors.items(), key=lambda item: (-item[1], item))), "",
        "### Why mutants are equivalent", "", "| kind | reason | mutants |", "| --- | --- | ---: |",
        *(f"| {kind} | {why} | {n} |" for (kind, why), n in sorted(reasons.items(), key=lambda item: (-item[1], item))), "",
        *survived, EARLIER.strip(),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def page(results: list[Verdict]) -> str:
    """docs/compiled.md."""
    introduction = INTRODUCTION.format(some=_collected("-m", "not exhaustive"), everything=_collected())
    return "\n".join([introduction, FAULTS, tables(results)])


_OF_CODE = "kernel", "arch", "commit"


def read(path: Path) -> list[Verdict]:
    """The latest verdict on each mutant."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    of_code = {x["code"]: {name: x[name] for name in _OF_CODE} for x in reversed(rows) if x["kernel"]}
    found = [Verdict(**{**x, **of_code[x["code"]]}) for x in rows]
    return sorted({x.key: x for x in found}.values(), key=lambda x: (x.kernel, x.arch, x.code, int(x.instruction), x))


def write(path: Path, results: Collection[Verdict], mode: str = "w") -> None:
    """Results in the order of `read`, or more of them to those that are there."""
    named = set[str]()
    with path.open(mode, newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        if mode == "w":
            rows.writerow(x.name for x in fields(Verdict))
        for x in results:
            rows.writerow("" if name in _OF_CODE and x.code in named else value for name, value in asdict(x).items())
            named.add(x.code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--per-kind", type=int, default=PER_KIND, help="mutants of one kind in one kernel")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="FAMILY", help="%(choices)s")
    parser.add_argument("--again", action="store_true", help="judge the equivalent anew too: shapes may have been added since")
    parser.add_argument("--page", action="store_true", help="write docs/compiled.md of the results, and plant nothing")
    arguments = parser.parse_args()
    results = read(arguments.results)
    if arguments.page:
        write(arguments.results, results)
        PAGE.write_text(page(results))
        return
    mutants = all_mutants(arguments.per_kind, arguments.families)
    # what is compiled otherwise now says nothing any more; shapes may have been added since, to find what survived
    unsure = {"surviving", "equivalent"} if arguments.again else {"surviving"}
    codes = {mutant.code for _, mutant in mutants}
    results = [x for x in results if x.code in codes or family_of(x.kernel) not in arguments.families]
    known = {x.key for x in results if x.verdict not in unsure}
    left = [x for x in mutants if x[1].key not in known]
    write(arguments.results, results)
    print(f"{len(mutants)} mutants, {len(left)} to plant", flush=True)
    for number, mutant in left:
        verdict = judge(number, mutant)
        if verdict.verdict != "no PTX":
            write(arguments.results, [verdict], "a")


if __name__ == "__main__":
    main()
