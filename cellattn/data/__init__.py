"""Data in: gene lists, table readers, datasets of perturbed cells, and synthetic cells."""

from .dataset import (
    PERTURBATION_TYPES,
    PerturbationBatch,
    PerturbationDataset,
    PerturbationSample,
    batches_on,
)
from .genes import GeneList, require_same_genes
from .readers import EdgeTable, InteractionTable, read_biogrid, read_edge_table, read_interactions, read_string_links
from .split import leakage, split
from .synthetic import synthetic_cell, synthetic_phenotypes
from .yeast import load_dcell_subset, load_yeast

__all__ = [
    "PERTURBATION_TYPES",
    "EdgeTable",
    "GeneList",
    "InteractionTable",
    "PerturbationBatch",
    "PerturbationDataset",
    "PerturbationSample",
    "batches_on",
    "leakage",
    "load_dcell_subset",
    "load_yeast",
    "read_biogrid",
    "read_edge_table",
    "read_interactions",
    "read_string_links",
    "require_same_genes",
    "split",
    "synthetic_cell",
    "synthetic_phenotypes",
]
