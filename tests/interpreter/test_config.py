"""Choosing a tile by time, with launches that only pretend."""

from __future__ import annotations

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from cellattn.kernels import config
from cellattn.kernels.config import Gather, Tile

REFUSALS = [
    PTXASError("too many registers"),
    OutOfResources(200_000, 100_000, "shared memory"),
    RuntimeError("PassManager::run failed"),
]
REFUSALS += [CompilationError("", None, "no such instruction")]


def timed(launch, tile) -> float:
    launch(tile)
    return float(tile.warps)


@pytest.mark.parametrize("tile", [Tile(64, 64, 4, 2), Gather(32, 8)], ids=["tile", "gather"])
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_candidate_that_is_refused_is_left_out_by_name(
    tile: Tile | Gather, refusal: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "milliseconds", timed)
    fewest = min(near.warps for near in tile.neighbours)

    def launch(near: Tile | Gather) -> None:
        if near.warps == fewest:
            raise refusal

    won = config.search(tile, launch)
    assert won.warps == min(near.warps for near in tile.neighbours if near.warps > fewest)
    assert f"is left out: {type(refusal).__name__}" in capsys.readouterr().out


def test_that_every_candidate_is_refused_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "milliseconds", timed)

    def launch(near: Tile) -> None:
        raise PTXASError(f"{near.BM}")

    with pytest.raises(PTXASError, match="64"):
        config.search(Tile(64, 64, 4, 2), launch)


def test_what_is_no_refusal_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "milliseconds", timed)

    def launch(near: Tile) -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        config.search(Tile(64, 64, 4, 2), launch)


@pytest.mark.parametrize(
    ("multiprocessors", "programs", "parts"),
    [(84, 104, 2), (108, 104, 2), (84, 126, 1), (132, 468, 1), (108, 1, 26), (108, 20, 11)],
)
def test_parts_bring_the_programs_near_to_two_a_multiprocessor(
    multiprocessors: int, programs: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "num_multiprocessors", lambda device: multiprocessors)
    assert config.parts_for(programs, 6607, 64, torch.device("cpu"))[0] == parts
