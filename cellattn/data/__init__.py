"""Data in: gene lists, table readers, datasets of perturbed cells, and synthetic cells."""

from cellattn.data.dataset import (
    PERTURBATION_TYPES,
    PerturbationBatch,
    PerturbationDataset,
    PerturbationSample,
)
from cellattn.data.genes import GeneList
from cellattn.data.readers import EdgeTable, InteractionTable, read_edge_table, read_interactions, read_string_links
from cellattn.data.synthetic import synthetic_cell, synthetic_phenotypes
from cellattn.data.yeast import load_dcell_subset, load_yeast

__all__ = [
    "PERTURBATION_TYPES",
    "EdgeTable",
    "GeneList",
    "InteractionTable",
    "PerturbationBatch",
    "PerturbationDataset",
    "PerturbationSample",
    "load_dcell_subset",
    "load_yeast",
    "read_edge_table",
    "read_interactions",
    "read_string_links",
    "synthetic_cell",
    "synthetic_phenotypes",
]
