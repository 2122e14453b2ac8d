from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.training.cell import distinct_pairs
from cellattn import MultiGraph
from cellattn.data import PerturbationDataset, load_dcell_subset, load_yeast


class LabelledCell(NamedTuple):
    """The genes of measured pairs in the real tables."""

    graph: MultiGraph
    train: PerturbationDataset


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> None:
    """Of all tests of models."""


@pytest.fixture(scope="session")
def labelled_cell(yeast_dir: Path) -> LabelledCell:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown gene names are reported where the tables are the subject
        genes, graph = load_yeast(yeast_dir)
        data = load_dcell_subset(yeast_dir, genes)
    nodes = data.seeds.unique()
    return LabelledCell(graph.subgraph(nodes), distinct_pairs(data.subset("*_training"), nodes))
