"""The CUDA half of the extension compiles for every chip, within registers. Skipped where it was built for the CPU alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import cellattn._C
from cellattn import _extension

from . import resources

pytestmark = pytest.mark.skipif("cuda" not in _extension._DEVICES, reason="the extension was built without CUDA")


@pytest.fixture(scope="module")
def rows() -> list[resources.Row]:
    return resources.compiled(Path(cellattn._C.__file__))


def test_no_kernel_keeps_anything_outside_registers(rows: list[resources.Row]) -> None:
    assert {row.arch for row in rows} >= set(resources.CHIPS)
    assert [row for row in rows if row.local > 0] == []


def test_registers_are_those_on_record(rows: list[resources.Row]) -> None:
    """A change shows in review: `python -m tests.cuda.resources` rewrites the record."""
    version, wanted = resources.recorded()
    if resources.compiler() != version:
        pytest.skip(f"registers are on record for nvcc {version}, this is {resources.compiler()}")
    assert resources.ours(rows) == wanted
