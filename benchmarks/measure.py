"""Measuring time and memory, and saying on what."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def median_time(f: Callable[[], Any], *, repeats: int = 5, warmup: int = 1) -> dict[str, float]:
    """Seconds of wall time of f(): median, 20% and 80% quantiles of `repeats` runs after `warmup` unmeasured ones."""
    times = []
    for i in range(warmup + repeats):
        _synchronize()
        start = time.perf_counter()
        f()
        _synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - start)
    low, mid, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
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
    before = _resident()
    with _PeakResident() as peak:
        f()
    return peak.value - before


def device_name() -> str:
    """The GPU's name, or the processor's with its core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model} ({torch.get_num_threads()} threads)"


def results_dir() -> Path:
    """`benchmarks/results/<device>/`, made if missing."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    folder = Path(__file__).parent / "results" / slug
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment() -> dict[str, str]:
    """Device, versions and commit that a figure belongs to."""
    describe = ["git", "-C", os.fspath(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _trim_heap() -> None:
    """Give freed pages back, so that memory kept by the allocator does not hide what f takes."""
    with contextlib.suppress(OSError):  # not glibc: the figure is then a lower bound
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _PeakResident:
    """Samples the resident set every millisecond from a thread; PyTorch's operators let go of the interpreter lock."""

    def __enter__(self) -> _PeakResident:
        self.value = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.value = max(self.value, _resident())

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.value = max(self.value, _resident())
