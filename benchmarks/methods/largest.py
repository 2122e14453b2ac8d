"""The largest batch of a method that fits, by trying.

python -m benchmarks.methods.largest METHOD [--genes N] [--set-size K] [--cap B]
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from .. import options, processes
from ..measure import resident, synchronize
from ..training.engine import Execution
from .registry import method_of
from .workload import Workload, add_workload_arguments, workload_of

OUT_OF_MEMORY = 77  # exit status of a try


class Try(NamedTuple):
    """One batch size that was tried."""

    batch_size: int
    fits: bool
    peak_bytes: int | None  # of the device's memory, or of the resident set of the process; None where it did not fit


@dataclass(frozen=True)
class LargestBatch:
    """What `largest_batch` found: `batch_size` fits, `limit`, if there is one, does not; with all that was tried."""

    batch_size: int  # 0: not even one
    limit: int | None  # the smallest size that did not fit; None: the cap did
    peak_bytes: int | None
    tries: tuple[Try, ...]


def largest_batch(
    work: Workload,
    *,
    first: int = 1,
    cap: int,
    budget: int | None = None,
    resolution: float = 0.05,
    timeout: float = 600.0,
    threads: int | None = None,
) -> LargestBatch:
    """Measure the largest batch of which two whole steps fit: doubling, then bisection, each try a process of its own.

    What this process holds on a GPU is missing there: search before anything is on it.

    Args:
        first: the size that is tried first.
        cap: where to stop: no size above it is tried.
        budget: bytes that may be used: of the process's resident set on the CPU (needed there), of the GPU's memory else
            (default: all of it).
        resolution: bisection ends where the size that fits is within this share of one that does not.
        timeout: seconds for a try; longer is an error, as it says nothing about memory.
        threads: of a try on the CPU; as many as this process has if None.

    Raises:
        RuntimeError: a try failed in another way than by memory; the message ends with its traceback.
    """
    if budget is None and work.execution.device == "cpu":
        raise ValueError("budget: expected bytes, since a CPU's memory is the machine's, got None")
    for name, value in (("first", first), ("cap", cap)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    # One process for all tries, which imports everything, touches no GPU, and is forked for each. It computes with one thread,
    # because a forked process waits in vain for a pool of threads that OpenMP made before.
    question = {
        "work": asdict(work), "first": first, "cap": cap, "budget": budget, "resolution": resolution, "timeout": timeout,
        "threads": torch.get_num_threads() if threads is None else threads,
    }  # fmt: skip
    command = [sys.executable, "-c", "from benchmarks.methods.largest import answer; answer()", json.dumps(question)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        ended = processes.run(command, env=env, output=output, errors=errors)
        for file in (output, errors):
            file.seek(0)
        said, complaint = output.read(), errors.read()
    if ended.status != 0:
        raise RuntimeError(f"largest batch of {work.method}: {complaint[-4000:]}")
    found = json.loads(said.splitlines()[-1])
    return LargestBatch(**{**found, "tries": tuple(Try(*one) for one in found["tries"])})


def answer() -> None:
    """What `largest_batch` starts: search as the command line asks, and print what was found."""
    processes.end_with_parent()
    question = json.loads(sys.argv[1])
    fields = question.pop("work")
    work = Workload(**{**fields, "execution": Execution(**fields["execution"])})
    importlib.import_module("torch._dynamo")  # as the first step of an optimizer would, in every try
    method_of(work.method)
    print(json.dumps(asdict(_search(work, **question))))


def _search(
    work: Workload, *, first: int, cap: int, budget: int | None, resolution: float, timeout: float, threads: int
) -> LargestBatch:
    tries: list[Try] = []

    def fits(batch_size: int) -> bool:
        tries.append(_try_apart(work, batch_size, budget, timeout, threads))
        return tries[-1].fits

    low, high = 0, min(first, cap)
    while fits(high):
        low = high
        if low == cap:
            return LargestBatch(low, None, tries[-1].peak_bytes, tuple(tries))
        high = min(2 * high, cap)
    while high - low > max(1, resolution * low):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    peak = next((one.peak_bytes for one in tries if one.batch_size == low), None)
    return LargestBatch(low, high, peak, tuple(tries))


def _try_apart(work: Workload, batch_size: int, budget: int | None, timeout: float, threads: int) -> Try:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_here, args=(work, batch_size, budget, threads, sender))
    process.start()
    sender.close()
    process.join(timeout)
    about = f"{work.method}, batch of {batch_size}"
    if process.is_alive():
        process.kill()
        process.join()
        raise RuntimeError(f"{about}: not finished after {timeout:g} s")
    if process.exitcode in (OUT_OF_MEMORY, -signal.SIGKILL):  # the latter by the system's own guard
        return Try(batch_size, False, None)
    try:
        said = receiver.recv()
    except EOFError:
        said = f"exit status {process.exitcode}"
    if isinstance(said, str):
        raise RuntimeError(f"{about}: {said}")
    return Try(batch_size, True, said)


def _try_here(work: Workload, batch_size: int, budget: int | None, threads: int, sender: Connection) -> None:
    """Take two steps on a batch and send the bytes at the peak, or the error; or end this process for want of memory."""
    try:
        torch.set_num_threads(threads)
        device = torch.device(work.execution.device)
        if device.type == "cuda" and budget is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / torch.cuda.mem_get_info(device)[1]), device)
        elif budget is not None:
            threading.Thread(target=_watch, args=(budget,), daemon=True).start()
        trainer, data = work.make(batch_size)
        for _ in range(2):
            trainer.step(data, torch.arange(batch_size))
        synchronize(device)
        sender.send(torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _peak_resident())
    except Exception as error:
        if is_out_of_memory(error):
            os._exit(OUT_OF_MEMORY)
        sender.send(traceback.format_exc()[-2000:])


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was missing, for a tensor or for what a GPU's libraries take beside PyTorch."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _watch(budget: int) -> None:
    """End this process as soon as its resident set is above the budget; PyTorch's operators let go of the interpreter lock."""
    while resident() <= budget:
        time.sleep(0.002)
    os._exit(OUT_OF_MEMORY)


def _peak_resident() -> int:
    """Bytes of the resident set at its largest, as the system counted."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = options.parser("methods.largest", __doc__)
    add_workload_arguments(parser)
    parser.add_argument("--cap", type=options.count, default=2**20, help="no larger batch is tried (%(default)s)")
    parser.add_argument("--budget", type=options.positive, help="GB that may be used (default: all of a GPU)")
    given = parser.parse_args()
    with options.told(ImportError, AttributeError, TypeError):  # of a function that is named
        work = workload_of(given)
    found = largest_batch(work, cap=given.cap, budget=given.budget and int(given.budget * 1e9))
    for one in found.tries:
        print(f"{one.batch_size:>9}  {'does not fit' if one.peak_bytes is None else f'{one.peak_bytes / 1e6:,.0f} MB'}")
    print(f"largest batch: {found.batch_size}{' (the cap)' if found.limit is None else f', {found.limit} does not fit'}")


if __name__ == "__main__":
    main()
