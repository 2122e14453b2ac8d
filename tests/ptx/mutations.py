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
import functools
import hashlib
import itertools
import random
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from .planting import Mutant, digest, plant
from .subjects import SUBJECTS, Shape, Subject, family_of
from .verdicts import PAGE, RESULTS, ROOT, Verdict, page, read, write

PER_KIND = 3  # mutants of one kind in one kernel


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
