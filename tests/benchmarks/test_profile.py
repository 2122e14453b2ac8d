"""The profiler's command line, in a process of its own as a user runs it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.methods.registry import METHODS
from benchmarks.methods.workload import Workload
from benchmarks.profile import command_lines, profile

pytestmark = pytest.mark.xdist_group("processes")  # they start others and watch the clock: one at a time

ROOT = Path(__file__).parents[2]
RANGES = ("step", "loading", "transfer", "losses", "backward", "optimizer")


def test_command_line(tmp_path: Path) -> None:
    arguments = shlex.split("cell-transformer --device cpu --genes 60 --batch-size 8 --steps 2 --autocast bf16")
    command = [sys.executable, "-m", "benchmarks.profile", *arguments, "--torch", "--out", os.fspath(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("cell transformer, 2 steps of 8 mutants\n")
    assert (tmp_path / "cell-transformer.txt").read_text() in done.stdout
    events = json.loads((tmp_path / "cell-transformer.trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    for name in (*RANGES, "encoder", "head"):
        assert names.count(name) == 2, name
    nsight = f"python -m benchmarks.profile {' '.join(arguments)} --out {tmp_path}"
    assert done.stdout.count(nsight) == 3  # nsys, and ncu twice
    for tool in ("nsys profile ", "nsys stats ", "ncu "):
        assert tool in done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, tmp_path: Path) -> None:
    page = profile(Workload(method, genes=60), 4, steps=1, warmup=1, out=tmp_path)
    assert page is not None
    assert page.startswith(f"{METHODS[method].name}, 1 steps of 4 mutants")
    assert all(name in page for name in RANGES)
    assert {path.name for path in tmp_path.iterdir()} == {f"{method}.trace.json", f"{method}.txt"}


def test_ranges_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For Nsight: nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert profile(Workload("pair-mlp", genes=60), 4, steps=1, warmup=0) is None
    assert not list(tmp_path.iterdir())


def test_help_has_the_command_lines() -> None:
    lines = command_lines()
    assert "nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi" in lines
    assert 'ncu --set full --profile-from-start off --nvtx --nvtx-include "cellattn@encoder/"' in lines
    assert lines.count("python -m benchmarks.profile METHOD") == 3
