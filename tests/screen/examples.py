"""Genes, a graph, models and options of tests of whole screens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import torch

from cellattn import MultiGraph
from cellattn.nn import CellTransformer

from .stubs import N

NAMES = [f"Y{i:02d}" for i in range(N)]
EDGES = {"a": torch.tensor([[0, 1, 2], [1, 2, 3]])}
GRAPH = MultiGraph.from_edge_index(EDGES, N, names=NAMES)
QUIET: dict[str, Any] = {"progress": False, "num_threads": 1}
PAIRS = N * (N - 1) // 2  # 435


def model_of(seed: int) -> CellTransformer:
    torch.manual_seed(seed)
    return CellTransformer(8, 1, 2, num_types=6, num_genes=N)


def rows_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "*.parquet").sort("rank")
