"""Command lines of the benchmarks: an option that cannot be is one line, before anything is begun."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
from pathlib import Path

import pytest

DOORS = {
    "train": "--epochs 0|--epochs x|--data /nope|--data ''|--out /proc/x|--out ''|--seeds -1|--checkpoint-steps 0"
    "|--out OUT --epochs 0|--accumulate 0|--device cuda:9|--compile nope|--timeout -1|--tokens x --out OUT|--variants nope"
    "|--device cpu --cuda-graph --out OUT|--split nope|--data OUT --out OUT",
    "attention.bench": "--device nope|--genes 0|--genes x|--seconds -1|--seconds nan|--repeats 0|--lengths 0|--suite nope"
    "|--suite length --case nope|--only nope|--suite length --lengths 8 --genes 32 --only 'PyG TransformerConv'",
    "khop.bench": "--device nope|--sets 0|--hops 0|--genes 3|--relations nope|--seconds inf|--seconds-each 0|--repeats 0"
    "|--heaps nope",
    "methods.bench": "--device nope|--seconds -1|--out OUT/a/b --seconds -1|--out /proc/x|--methods nope",
    "methods.delta": "--layers 0|--out OUT --layers 0|--genes 1|--batch-size 0|--out /proc/x|--convs nope",
    "methods.largest": "nope|nope:f|torch:nope|dango --cap 0|dango --budget 0|dango --genes 0|dango --set-size 0"
    "|dango --device nope|dango --device cpu --cuda-graph|dango --compile nope",
    "screen.full": "--data /nope|--out OUT --epochs 0"
    "|--roster 0|--roster 201 --tokens labelled --out OUT|--epochs 0|--threads 0|--seeds -1"
    "|--tokens x --out OUT",
    "screen.speed": "--genes 0|--out OUT --genes 0"
    "|--roster 0|--roster 7000|--rounds 0|--threads 0|--seconds 0|--out /proc/x|--rows nope",
    "profile": "nope|dango --torch --out OUT --batch-size 0|nope --torch --out OUT"
    "|nope:f|torch:nope|dango --batch-size 0|dango --steps 0|dango --warmup -1|dango --torch --out /proc/x"
    "|dango --torch --out ''",
    "quick": "--out OUT --nope|--out /proc/x|--out ''|--out NAME",
    "report": "--redraw /nope|--only nope",
    "gpu_check.__main__": "--plan -1|--plan nan|--once 0|--only nope --plan 9|",
    "kernel_model.__main__": "--chips nope",
}
CASES = [(door, line) for door, lines in DOORS.items() for line in lines.split("|")]


@pytest.mark.parametrize(("door", "line"), CASES, ids=[f"{door} {line}" for door, line in CASES])
def test_one_line(
    door: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CELLATTN_DATA", str(tmp_path))  # none there
    words = [word.replace("OUT", str(tmp_path / "out")).replace("NAME", "n" * 300) for word in shlex.split(line)]
    if "--data" in words and str(tmp_path / "out") in words:
        (tmp_path / "out").mkdir()
    monkeypatch.setattr("sys.argv", [door, *words])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{door}").main()
    assert end.value.code not in (0, None)
    told = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert "error: " in told
    assert "\n" not in told
    assert not [path for path in tmp_path.rglob("*") if path != tmp_path / "out" or "--data" not in words], "left behind"


@pytest.mark.parametrize("door", DOORS)
def test_help_names_the_command(door: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [door, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{door}").main()
    assert end.value.code == 0
    command = door.removesuffix(".__main__").removesuffix(".bench").removesuffix(".full")
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks.{command} [")
    found = importlib.util.find_spec(f"benchmarks.{command}")
    assert found is not None
    assert found.submodule_search_locations is None or importlib.util.find_spec(f"benchmarks.{command}.__main__") is not None
