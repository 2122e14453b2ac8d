"""The guides run as they stand, each in a process of its own, as a reader starts them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ..conftest import ROOT


def run(guide: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "docs" / "guides" / guide), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_plain_pytorch() -> None:
    assert "steps 3, loss " in run("plain.py", "--steps", "3")


@pytest.mark.parametrize("devices", [1, 2])
def test_lightning(devices: int) -> None:
    pytest.importorskip("lightning")
    out = run("lightning_module.py", "--steps", "3", "--devices", str(devices))
    assert f"steps 3, ranks {devices}" in out
    assert "pearson" in out
