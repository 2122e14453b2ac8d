"""Modules: the cell transformer and its parts, each thin enough to read as its equations."""

from .attention import GraphLossOptions, GraphRegularizedAttention
from .encoder import CellEncoder, Tie
from .hypersagnn import HyperSAGNN
from .perturbation import PerturbationHead
from .tokens import CellOutput, GeneTokens
from .transformer import CellTransformer
from .wildtype import WildtypeDifference

__all__ = [
    "CellEncoder",
    "CellOutput",
    "CellTransformer",
    "GeneTokens",
    "GraphLossOptions",
    "GraphRegularizedAttention",
    "HyperSAGNN",
    "PerturbationHead",
    "Tie",
    "WildtypeDifference",
]
