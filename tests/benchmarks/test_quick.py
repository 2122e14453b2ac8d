"""The small run of the main job: parts that are done are not done again, and what it says while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import quick


def test_what_was_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def part(name: str, fails: bool = False) -> Any:
        def do(out: Path) -> dict[str, Any]:
            calls.append(name)
            if fails:
                raise KeyboardInterrupt
            return {"name": name}

        return do

    monkeypatch.setattr(quick, "page", lambda found, seconds: " ".join(found[name]["name"] for name in quick.PARTS))
    monkeypatch.setattr(quick, "PARTS", {"a": part("a"), "b": part("b", fails=True), "c": part("c")})
    out = tmp_path / "bench"
    with pytest.raises(KeyboardInterrupt):
        quick.run(out)
    assert [name for name in quick.PARTS if quick.part_file(out, name).is_file()] == ["a"]
    assert not (out / quick.PAGE).is_file()
    monkeypatch.setitem(quick.PARTS, "b", part("b"))
    assert quick.run(out).read_text() == "a b c"
    assert calls == ["a", "b", "b", "c"]
    said = capsys.readouterr().err
    assert "[1/3] a: done before" in said
    assert "[3/3] c: begins" in said
    # a run that ended is made anew
    quick.run(out)
    assert calls == ["a", "b", "b", "c", "a", "b", "c"]


def test_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with quick.said("ops", 2, 4, every=0.01):
        import time

        time.sleep(0.1)
    assert "[2/4] ops: running, 0 s" in capsys.readouterr().err
