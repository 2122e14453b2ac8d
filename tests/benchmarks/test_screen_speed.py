from __future__ import annotations

import json
from pathlib import Path

from benchmarks.screen import speed


def test_run(tmp_path: Path) -> None:
    names = ("readout", "sum", "readout-pairs", "free", "pairwise")
    result = speed.run(names, genes=64, roster=24, seconds=0.01, rounds=1, threads=1, out=tmp_path)
    assert list(result["rows"]) == list(names)
    assert json.loads((tmp_path / "screen.json").read_text())["rows"].keys() == result["rows"].keys()
    page = (tmp_path / "screen.md").read_text()
    for row in result["rows"].values():
        assert row["what"] in page
        assert row["error"] <= 1e-6
        assert row["rounds"][0][0] > 0
    assert result["rows"]["readout"]["group"]["rate"] > 0
