"""Modules: the cell transformer, the models it is compared with, and their parts, thin enough to read as their equations."""

from .attention import GraphLossOptions, GraphRegularizedAttention
from .dango import Dango
from .encoder import CellEncoder, Tie
from .hypersagnn import HyperSAGNN
from .pairwise import PairwiseInteraction
from .perturbation import PerturbationHead
from .readout import PerturbedGeneReadout
from .tokens import CellOutput, GeneTokens, extend_genes
from .transformer import CellTransformer
from .weights import weight_from_row_sum
from .wildtype import WildtypeDifference

__all__ = [
    "CellEncoder",
    "CellOutput",
    "CellTransformer",
    "Dango",
    "GeneTokens",
    "GraphLossOptions",
    "GraphRegularizedAttention",
    "HyperSAGNN",
    "PairwiseInteraction",
    "PerturbationHead",
    "PerturbedGeneReadout",
    "Tie",
    "WildtypeDifference",
    "extend_genes",
    "weight_from_row_sum",
]
