"""Measuring time and memory, saying on what, and showing it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellattn._memory import available_memory


class Stopwatch:
    """Marks points in time: events on a GPU's stream, the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        synchronize(device)

    def mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """From each mark to the next; waits for the last."""
        pairs = itertools.pairwise(self._marks)
        if not self._on_gpu:
            return [b - a for a, b in pairs]
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def phase_times(
    step: Callable[[int, Callable[[], None]], Any],
    phases: Sequence[str],
    device: torch.device,
    *,
    seconds: float,
    repeats: int,
    least: int = 3,
) -> dict[str, dict[str, float]]:
    """Time the phases of step(i, mark), which calls `mark` before each and after the last.

    Steps i = 0, 1, ... are run for `seconds`, at least `least` times and at most `repeats`; warm-up is the caller's.
    Returns median, 20% and 80% quantile in seconds of every phase, and of "both": of all of them together.
    """
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < least or (len(times) < repeats and time.perf_counter() - start < seconds):
        watch = Stopwatch(device)
        step(len(times), watch.mark)
        times.append(watch.seconds())
    columns = torch.tensor(times, dtype=torch.float64)  # [repeats, phases]
    named = {**dict(zip(phases, columns.unbind(1), strict=True)), "both": columns.sum(1)}
    return {name: _quantiles(column) for name, column in named.items()}


def _quantiles(times: Tensor) -> dict[str, float]:
    low, mid, high = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=times.dtype)).tolist()
    return {"median": mid, "q20": low, "q80": high}


def peak_memory(f: Callable[[], Any]) -> int:
    """Bytes that f() takes at its peak above what the process (or the GPU's allocator) held before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    _trim_heap()
    before = resident()
    with _PeakResident() as peak:
        f()
    return peak.value - before


def device_name() -> str:
    """The GPU's name, or the processor's with its core count and vectors, since virtual ones of several kinds share a name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    threads = torch.get_num_threads()
    return f"{model} ({threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()})"


def results_dir() -> Path:
    """The folder that CELLATTN_RESULTS names, `benchmarks/results/<device>/` without; made if missing."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    folder = Path(os.environ.get("CELLATTN_RESULTS", Path(__file__).parent / "results" / slug))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment() -> dict[str, str]:
    """Device, versions and commit that a figure belongs to: git's, or of CELLATTN_COMMIT where the files came without git."""
    # a run writes its results one after the other: those are no change of what is measured
    code_changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    commit = _git("rev-parse", "--short", "HEAD") + ("-dirty" if code_changed else "")
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or os.environ.get("CELLATTN_COMMIT", "unknown"),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Results as Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def target_table(targets: Sequence[Mapping[str, Any]]) -> str:
    """What the library is held to, as Markdown: what was measured a line each, then the rest in a line a reason."""
    lines: list[list[str]] = []
    absent: dict[str, list[str]] = {}
    for entry in targets:
        least, value = "least" in entry, entry["value"]
        if entry["met"] is None:
            absent.setdefault(entry["reason"].removeprefix("not measured: "), []).append(entry["target"])
            continue
        by = entry["least"] / value if least and value > 0 else math.inf if least else value / entry["most"]
        bound = f">= {entry['least']:.3g}" if least else f"<= {entry['most']:.3g}"
        lines.append([entry["target"], bound, f"{value:.3g}", "met" if entry["met"] else f"MISSED by {by:.2f} x"])
    parts = [table(("target", "bound", "measured", ""), lines)] if lines else []
    parts += [f"Not measured ({reason}): {'; '.join(names)}." for reason, names in absent.items()]
    return "\n\n".join(parts)


def _git(*arguments: str) -> str:
    """What git says of this repository; nothing where there is no repository, or no git."""
    command = ["git", "-C", os.fspath(Path(__file__).parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_limit(device: torch.device) -> int:
    """Bytes that a computation may hope for: nine tenths of a GPU, or of what the machine has left for this process."""
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else available_memory(device)
    if total is None:
        raise RuntimeError("this system does not tell how much memory is left")
    return total * 9 // 10


def cache_bytes(device: torch.device) -> int:
    """Of a GPU's last-level cache; 0 elsewhere."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def _trim_heap() -> None:
    """Give freed pages back, so that memory kept by the allocator does not hide what f takes."""
    with contextlib.suppress(OSError):  # not glibc: the figure is then a lower bound
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _PeakResident:
    """Samples the resident set every millisecond from a thread; PyTorch's operators let go of the interpreter lock."""

    def __enter__(self) -> _PeakResident:
        self.value = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.value = max(self.value, resident())

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.value = max(self.value, resident())


def first_line(error: object) -> str:
    """The first line of what an exception or warning says, with its type where that says more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])  # "backend='inductor' raised:" says nothing yet
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text}"
    return text if isinstance(error, (RuntimeError, Warning)) and text else f"{type(error).__name__}: {text}"
