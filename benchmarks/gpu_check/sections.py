"""The sections of the check: what each runs, and how long it may take."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..sections import Result, Section, command
from .cases import GENES
from .checks import compiled, khop_ops, models, ops


def sanitizer(tool: str, out: Path) -> Iterator[Result]:
    """Each op once at a small size under a tool of compute-sanitizer."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    program = next((place for place in places if place and Path(place).is_file()), None)
    if program is None:
        yield Result("command", tool, None, "compute-sanitizer is not installed here")
        return
    # Without PyTorch's pool an access past the end of a tensor leaves its allocation, and is seen.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = [sys.executable, "-m", "benchmarks.gpu_check", "--once", "70"]
    yield command([program, "--tool", tool, "--error-exitcode", "1", *small], out / f"{tool}.txt", env=env)


def gpu_tests(out: Path) -> Iterator[Result]:
    """Those that want a GPU."""
    if importlib.util.find_spec("pytest") is None:
        yield Result("command", "tests", None, "pytest is not installed here")
        return
    yield command([sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/cuda"], out / "tests.txt")


def benchmark(name: str, out: Path, *arguments: str) -> Iterator[Result]:
    """`benchmarks.<name>`: its table and figures go to the folder, row by row."""
    env = {**os.environ, "CELLATTN_RESULTS": os.fspath(out)}
    yield command([sys.executable, "-m", f"benchmarks.{name}", *arguments], out / f"{name}.txt", env=env)


def tuning(out: Path) -> Iterator[Result]:
    """The fastest tile beside each on record: lines for `kernels/config.py`."""
    env = {**os.environ, "CELLATTN_AUTOTUNE": "1", "PYTHONUNBUFFERED": "1"}
    yield command([sys.executable, "-m", "benchmarks.gpu_check", "--once", str(GENES)], out / "tuning.txt", env=env)


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _measured(name: str, seconds: float, what: str) -> Section:
    """A benchmark that stops by itself in time to write what it has."""
    most = str(int(seconds - 40))
    return Section(seconds, lambda out: benchmark(name, out, "--device", "cuda", "--seconds", most), what)


LOSSES = ("attention_kl", "attention_bce", "graph_attention", "network_mse")
ATTENTION = ("attention D", "attention_logsumexp", "edge_attention", "perturbation_attention")
PRODUCTS = ("masked_spmm", "relational_spmm")
# In the order of their worth; the first seven fit nine minutes twice, all but the last three fit it three times.
SECTIONS: dict[str, Section] = {
    "compile": Section(120, lambda out: compiled(gpu()), "every kernel of every op, several at a time"),
    "attention": Section(110, lambda out: ops(ATTENTION, gpu()), "accuracy, repeats, CUDA graphs of attention"),
    "losses": Section(200, lambda out: ops(LOSSES, gpu()), "likewise of the losses, hubs included"),
    "products": Section(100, lambda out: ops(PRODUCTS, gpu()), "likewise of products with the graph"),
    "khop": Section(80, lambda out: khop_ops(gpu()), "k-hop against the CPU, bit for bit"),
    "models": Section(120, lambda out: models(gpu()), "every model against float64"),
    "tests": Section(90, gpu_tests, "tests/cuda"),
    "attention-speed": _measured("attention", 240, "the attention ops against their peers"),
    "methods-speed": _measured("methods", 270, "every method's training step"),
    "khop-speed": _measured("khop", 130, "k-hop against its peers"),
    "memcheck": Section(130, lambda out: sanitizer("memcheck", out), "accesses out of bounds"),
    "racecheck": Section(130, lambda out: sanitizer("racecheck", out), "races in shared memory"),
    "initcheck": Section(130, lambda out: sanitizer("initcheck", out), "reads of memory that nothing wrote"),
    "tuning": Section(270, tuning, "faster tiles, for kernels/config.py"),
    "report": Section(math.inf, lambda out: benchmark("report", out, "--full"), "the whole report"),
}
BENCHMARKS = {"attention-speed", "methods-speed", "khop-speed"}
