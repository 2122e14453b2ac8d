"""The weight of a graph prior, from the units of other training code."""

from __future__ import annotations

from .._check import count_of, require
from ..graph import MultiGraph
from ._check import require_graph, weight_of


def weight_from_row_sum(
    weight: float, graph: MultiGraph, relation: str, *, num_rows: int | None = None, num_edges: int | None = None
) -> float:
    """The weight of a tie (a mean over rows) that is the weight of a sum over rows divided by the edges a gene.

    Code that writes the KL densely as `F.kl_div(log_alpha[None], target[None], reduction="batchmean")`, a batch of one, has the
    sum over all rows, and divides it by E / N so that graphs of any size weigh the same. Ours, reduction="mean", is the sum
    over R counted rows divided by R. So

        λ sum_i KL_i / (E / N)  =  w (1 / R) sum_i KL_i   where   w = λ R N / E

    and the loss and its gradients are equal, not only their size.

    Args:
        weight: λ, of the sum over rows.
        graph: N genes.
        relation: its name.
        num_rows: R, the rows that are drawn in a step, among those with an edge; by default all of these.
        num_edges: E, what the other code divides by; by default the edges of the relation as they are stored here, self-loops
            and both directions included. Give the number itself where it counts otherwise (one direction, all graphs together).

    Returns:
        w, for `ties=[(layer, head, relation, w)]`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    weight = weight_of("weight", weight)
    require_graph(graph)
    counted = graph.num_rows_with_edges(relation)
    if num_rows is not None:
        num_rows = count_of("num_rows", num_rows, minimum=1)
        require(num_rows <= counted, f"num_rows: expected at most {counted}, the rows with an edge, got {num_rows}")
        counted = num_rows
    edges = graph.num_edges(relation) if num_edges is None else count_of("num_edges", num_edges)
    require(edges >= 1, f"num_edges: expected at least one edge, got none in {relation!r}")
    return weight * counted * graph.num_nodes / edges
