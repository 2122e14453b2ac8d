"""Several graphs over the same genes, as one stack of CSR matrices: `MultiGraph`, and the parts that kernels are given."""

from .comembership import Comembership
from .multigraph import MultiGraph
from .rows import SEGMENT, Bits, Relation, Segments, Targets, Transpose, cut_rows

__all__ = ["SEGMENT", "Bits", "Comembership", "MultiGraph", "Relation", "Segments", "Targets", "Transpose", "cut_rows"]
