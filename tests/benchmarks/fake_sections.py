"""Sections that end in every way there is, in the place of those that want a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.processes import end_with_parent
from benchmarks.sections import Result, Section


def fine(out: Path) -> Iterator[Result]:
    for i in range(3):
        yield Result("fine", str(i), True, "as it should be")


def slow(out: Path) -> Iterator[Result]:
    """Says what it found, starts a process that would outlive it, and hangs."""
    yield Result("slow", "first", True, "found in time")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "grandchild").write_text(str(child.pid))
    time.sleep(600)
    yield Result("slow", "second", True, "found too late")


def killed(out: Path) -> Iterator[Result]:
    yield Result("killed", "first", True, "found in time")
    os.kill(os.getpid(), signal.SIGKILL)


def raises(out: Path) -> Iterator[Result]:
    yield Result("raises", "first", False, "a check that failed")
    raise ArithmeticError("no such kernel")


def endless(out: Path) -> Iterator[Result]:
    for i in range(1_000_000):
        yield Result("endless", str(i), True, "one more")


def sleep_until_the_end(path: str) -> None:
    """What a worker of a benchmark does, without the work."""
    end_with_parent()
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


SECTIONS = {
    "fine": Section(30, fine, "ends"),
    "slow": Section(6, slow, "hangs"),
    "killed": Section(30, killed, "dies"),
    "raises": Section(30, raises, "raises"),
    "late": Section(30, fine, "comes after all that"),
    "endless": Section(30, endless, "never ends"),
}
