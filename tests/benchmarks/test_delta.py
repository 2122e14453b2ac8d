from __future__ import annotations

import json
from pathlib import Path

from benchmarks.methods import delta


def test_run(tmp_path: Path) -> None:
    result = delta.run(("sage", "gat"), (1, 2), genes=64, batch_size=3, steps=3, seconds=0.01, out=tmp_path)
    assert [(row["conv"], row["layers"]) for row in result["rows"]] == [("sage", 1), ("sage", 2), ("gat", 1), ("gat", 2)]
    assert all(row["error"] < 1e-9 for row in result["rows"])  # float64, and a difference of nearly equal sums
    assert all(row[mode]["model"]["median"] > 0 for row in result["rows"] for mode in ("lazy", "delta"))
    assert json.loads((tmp_path / "delta.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "delta.md").read_text().count("gat") == 2
