from __future__ import annotations

from pathlib import Path

import pytest

from cellattn import checkpoint

from .examples import GRAPH, model_of


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints, each with its graph."""
    folder = tmp_path_factory.mktemp("models")
    GRAPH.save(folder / "graph.safetensors")
    found = [folder / f"run{seed}" / "checkpoint.safetensors" for seed in range(2)]
    for seed, file in enumerate(found):
        file.parent.mkdir()
        checkpoint.save(file, model_of(seed), graph=GRAPH, graph_file=folder / "graph.safetensors")
    return found
