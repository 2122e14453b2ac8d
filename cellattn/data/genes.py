"""Gene names: the list itself stands below the graphs, which carry it."""

from ..genes import GeneList, require_same_genes

__all__ = ["GeneList", "require_same_genes"]
