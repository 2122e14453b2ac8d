"""The cell that a benchmark runs on: real tables where they are, the synthetic cell everywhere else."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from cellattn import MultiGraph
from cellattn.data import load_yeast, synthetic_cell


def data_dir() -> Path | None:
    """The folder of real yeast tables: CELLATTN_DATA, or `../shared/data/yeast` beside the repository; None if missing."""
    default = Path(__file__).parents[2] / "shared" / "data" / "yeast"
    folder = Path(os.environ.get("CELLATTN_DATA", default))
    return folder if (folder / "genes.tsv.gz").is_file() else None


def benchmark_graph() -> tuple[str, MultiGraph]:
    """(what it is, the graph)"""
    folder = data_dir()
    if folder is None:
        return "synthetic cell", synthetic_cell(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown gene names are reported where the tables are the subject
        return "real yeast tables", load_yeast(folder)[1]
