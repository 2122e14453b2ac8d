"""Data in: gene lists, table readers, datasets of perturbed cells, and synthetic cells."""

from .aliases import GeneNames, read_sgd_features, read_string_aliases
from .build import Cell, build_cell, read_sources
from .dataset import (
    PERTURBATION_TYPES,
    PerturbationBatch,
    PerturbationDataset,
    PerturbationSample,
    batches_on,
)
from .genes import GeneList, require_same_genes
from .go import Ontology, read_go_annotations, read_obo
from .metabolic import MetabolicModel, read_metabolic_model
from .readers import read_biogrid, read_edge_list, read_edge_table, read_interactions, read_string_links
from .sga import read_sga
from .split import leakage, split
from .synthetic import synthetic_cell, synthetic_phenotypes
from .tables import EdgeTable, InteractionTable, MembershipTable
from .yeast import load_dcell_subset, load_yeast

__all__ = [
    "PERTURBATION_TYPES",
    "Cell",
    "EdgeTable",
    "GeneList",
    "GeneNames",
    "InteractionTable",
    "MembershipTable",
    "MetabolicModel",
    "Ontology",
    "PerturbationBatch",
    "PerturbationDataset",
    "PerturbationSample",
    "batches_on",
    "build_cell",
    "leakage",
    "load_dcell_subset",
    "load_yeast",
    "read_biogrid",
    "read_edge_list",
    "read_edge_table",
    "read_go_annotations",
    "read_interactions",
    "read_metabolic_model",
    "read_obo",
    "read_sga",
    "read_sgd_features",
    "read_sources",
    "read_string_aliases",
    "read_string_links",
    "require_same_genes",
    "split",
    "synthetic_cell",
    "synthetic_phenotypes",
]
