from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.screen import speed
from cellattn.data import synthetic_cell


def test_run(tmp_path: Path) -> None:
    names = ("readout", "sum", "readout-pairs", "free", "pairwise")
    folder = tmp_path / "made" / "of it"
    sizes = {"genes": 64, "roster": 24, "free_roster": 12}
    result = speed.run(names, **sizes, seconds=0.01, rounds=1, threads=1, out=folder)
    assert list(result["rows"]) == list(names)
    assert json.loads((folder / "screen_speed.json").read_text())["rows"].keys() == result["rows"].keys()
    page = (folder / "screen_speed.md").read_text()
    for row in result["rows"].values():
        assert row["what"] in page
        assert row["error"] <= 1e-6
        assert row["rounds"][0][0] > 0
    assert result["rows"]["readout"]["group"]["rate"] > 0
    assert "Writing and bookkeeping are" in page
    assert result["processes"] is None  # one thread cannot be shared


@pytest.mark.exhaustive
def test_processes() -> None:
    graph = synthetic_cell(seed=0, num_genes=64)
    rates = speed.by_processes(speed.readout(graph), graph, roster=12, threads=2, rounds=1)
    assert rates.keys() == {"one", "several"}
    assert all(rate > 0 for found in rates.values() for rate in found)
