"""A long check in sections: each runs alone, in a process and a time of its own, and what it finds is on disk at once.

A section that hangs, dies or takes the GPU down costs its own results after that moment and no others. Results are lines of
JSON, appended and flushed one by one, so that a kill at any moment, of a section or of everything, leaves all that was found.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .processes import ROOT, end_with_parent, run

RESULTS = "results.jsonl"  # a line a result
COMMIT = "CELLATTN_COMMIT"


@dataclass(frozen=True)
class Result:
    """One line of the report; `passed` is None for what could not be looked at here."""

    check: str
    case: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Section:
    """Checks that belong together: run(out) yields their results, within `seconds`; out is a folder for further files."""

    seconds: float
    run: Callable[[Path], Iterator[Result]]
    what: str


@dataclass(frozen=True)
class Record:
    """A result in the file: which section found it. `Result("section", ...)` is how a section ended."""

    section: str
    result: Result

    def write(self, out: Path) -> None:
        with (out / RESULTS).open("a") as file:
            file.write(json.dumps({"section": self.section, **asdict(self.result)}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def __str__(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "----"}[self.result.passed]
        return f"{verdict}  {self.result.check}  {self.result.case}: {self.result.detail}"


def read(out: Path) -> list[Record]:
    """What the folder holds, of each section its last run alone."""
    records: list[Record] = []
    path = out / RESULTS
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):  # a line that was being written when everything was killed
            fields = json.loads(line)
            record = Record(fields.pop("section"), Result(**fields))
            if record.result.check == "begin":
                records = [each for each in records if each.section != record.section]
            records.append(record)
    return [record for record in records if record.result.check != "begin"]


def ended(records: Sequence[Record], section: str) -> bool:
    """Whether a section ran to its end."""
    return any(each.section == section and each.result.check == "section" and each.result.passed for each in records)


def summary(records: Sequence[Record]) -> str:
    """Counts, and each line that did not pass."""
    lines = [str(record) for record in records if not record.result.passed]
    failed = sum(record.result.passed is False for record in records)
    skipped = sum(record.result.passed is None for record in records)
    counts = f"{len(records) - failed - skipped} passed, {failed} failed, {skipped} not looked at or not finished"
    return "\n".join([*lines, counts])


def plan(sections: Mapping[str, Section], seconds: float) -> list[list[str]]:
    """The sections, in their order, in as few runs of at most `seconds` as that order allows."""
    runs: list[list[str]] = []
    left = 0.0
    for name, section in sections.items():
        if section.seconds > left or not runs:
            runs.append([])
            left = seconds
        runs[-1].append(name)
        left -= section.seconds
    return runs


def drive(
    module: str, names: Collection[str], out: Path, *, about: Mapping[str, str], seconds: float | None = None
) -> list[Record]:
    """Run the named sections of `module`.SECTIONS one after the other.

    Args:
        module: where the sections stand; each process imports it anew.
        names: which of them, in the order of SECTIONS.
        out: folder of the results, made if missing; results of an earlier run stay, but for sections that run again.
        about: what the results belong to (`measure.environment`).
        seconds: for all of them: a section is not begun where less is left than it may take, and stays for the next run.

    Returns:
        All that `out` now holds.
    """
    sections: Mapping[str, Section] = importlib.import_module(module).SECTIONS
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, COMMIT: about.get("commit", "unknown")}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    for name in (name for name in sections if name in names):
        section = sections[name]
        left = float("inf") if seconds is None else seconds - (time.monotonic() - started)
        if left < section.seconds:
            left = max(left, 0.0)
            print(f"----  section  {name}: may take {section.seconds:.0f} s, and {left:.0f} s are left", flush=True)
            continue
        Record(name, Result("begin", name, None, json.dumps(dict(about)))).write(out)
        begun = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.sections", module, name, os.fspath(out.resolve())]
        how = run(command, seconds=section.seconds, env=env)
        took = time.monotonic() - begun
        passed = None if how.status is None else how.status == 0
        ending = Record(name, Result("section", name, passed, f"{how}, {took:.0f} s"))
        ending.write(out)
        print(ending, flush=True)
    return read(out)


def command(argv: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None) -> Result:
    """A command as the whole of a section, which passes with exit status 0; what it says goes to `log` as it says it."""
    with log.open("w") as file:  # in the section's own group, which ends with its time
        done = subprocess.run(
            argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False
        )  # fmt: skip
    last = [line.strip()[:200] for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
    return Result("command", log.stem, done.returncode == 0, f"exit status {done.returncode}: {' / '.join(last)}")


def main() -> int:
    """One section, as `drive` starts it."""
    end_with_parent()
    module, name, folder = sys.argv[1:]
    out = Path(folder)
    try:
        for result in importlib.import_module(module).SECTIONS[name].run(out):
            record = Record(name, result)
            record.write(out)
            print(record, flush=True)
    except Exception:
        record = Record(name, Result("error", name, False, traceback.format_exc(limit=-3)))
        record.write(out)
        print(record, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
