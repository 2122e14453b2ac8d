from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from benchmarks.screen import full as screen

from .test_train import tiny_cell


def test_small(tmp_path: Path) -> None:
    """Trains, screens triples of a roster and all pairs with both models, and the report has a section of it."""
    assert screen.section(tmp_path) == ""
    options = {"cell": tiny_cell(), "out": tmp_path / "out", "results": tmp_path, "roster": 8, "epochs": 1, "seeds": (0, 1)}
    result = screen.run(**options, num_threads=1, progress=False)  # type: ignore[arg-type]
    assert {name: one["sets"] for name, one in result["screens"].items()} == {"triples": 56, "pairs": 80 * 79 // 2}
    text = screen.section(tmp_path)
    assert "| [triples](screen-triples/page.md) | 8 | 56 |" in text
    for name, order in (("triples", 3), ("pairs", 2)):
        page = (tmp_path / f"screen-{name}" / "page.md").read_text()
        assert "agreement.png" in page
        assert (tmp_path / f"screen-{name}" / "agreement.png").is_file()
        rows = pl.read_parquet(tmp_path / "out" / name / "*.parquet")
        assert f"gene{order}" in rows.columns
        assert rows["sd"].min() > 0  # type: ignore[operator]
    again = screen.run(**options, num_threads=1, progress=False)  # type: ignore[arg-type]
    assert again["screens"] == result["screens"]  # read back, rates and all: nothing was computed again


def test_rosters_have_a_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="roster: expected 3 to 80 genes, got 81"):
        screen.run(cell=tiny_cell(), out=tmp_path, results=tmp_path, roster=81)
