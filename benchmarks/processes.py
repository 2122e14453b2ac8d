"""Processes that leave nothing behind: they end when their time is up, and when the process that started them ends.

A benchmark's process that outlives its parent holds a GPU, or a core, that the next measurement is told is free.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """How a command ended: its exit status, negative for a signal, None where its time was up."""

    status: int | None
    seconds: float | None

    def __str__(self) -> str:
        if self.status is None:
            return f"not finished after {self.seconds:.0f} s"
        if self.status < 0:
            known = -self.status in set(signal.Signals)
            return f"killed by {signal.Signals(-self.status).name if known else f'signal {-self.status}'}"
        return f"exit status {self.status}"


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    seconds: float | None = None,
    env: Mapping[str, str] | None = None,
    output: IO[str] | None = None,
    errors: IO[str] | None = None,
) -> Ended:
    """Run a command from the repository's root in a group of processes of its own, and kill what is left of it at the end.

    The command finds a pipe at its standard input that closes when this process ends: one that calls `end_with_parent`
    then takes its whole group along.

    Args:
        command: the program and its arguments.
        seconds: after which it is killed.
        env: its environment; this process's if None.
        output, errors: open files for what it says; this process's own, and that of `output`, if None.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=output, text=True, start_new_session=True,
        stderr=subprocess.STDOUT if errors is None else errors,
    )  # fmt: skip
    try:
        return Ended(process.wait(seconds), seconds)
    except subprocess.TimeoutExpired:
        return Ended(None, seconds)
    finally:
        with suppress(ProcessLookupError):  # the group lives on as long as a process in it does
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def end_with_parent() -> None:
    """From now on this process ends when its parent does, however that ends: of `run`, with all that it started itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        _watch(parent.join, lambda: os._exit(1))
    elif os.getpgrp() == os.getpid() and stat.S_ISFIFO(os.fstat(0).st_mode):  # by hand, standard input is a person's
        _watch(lambda: os.read(0, 1), lambda: os.killpg(0, signal.SIGKILL))


def _watch(wait: Callable[[], object], end: Callable[[], object]) -> None:
    def watch() -> None:
        wait()
        end()

    threading.Thread(target=watch, daemon=True, name="end with parent").start()
