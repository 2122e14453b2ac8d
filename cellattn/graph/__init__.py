"""Several graphs over the same genes, as one stack of CSR matrices: `MultiGraph`, and the parts that kernels are given."""

from .multigraph import MultiGraph
from .rows import SEGMENT, Segments, Targets, Transpose, cut_rows

__all__ = ["SEGMENT", "MultiGraph", "Segments", "Targets", "Transpose", "cut_rows"]
