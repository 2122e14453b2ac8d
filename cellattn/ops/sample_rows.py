"""Rows of a graph, drawn without replacement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import describe, require
from ..graph import MultiGraph


def sample_rows(graph: MultiGraph, relation: str, num_rows: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw genes uniformly, without replacement, among those with a valid edge in a relation.

    Args:
        num_rows: how many, at most `graph.num_rows_with_edges(relation)`.
        generator: a `torch.Generator` on the graph's device, the default one if None.

    Returns:
        int64 [num_rows], ascending, on the graph's device. The sum of a loss over these rows times
        num_rows_with_edges / num_rows estimates the sum over all rows without bias.

    Raises:
        ValueError: if fewer rows have an edge than were asked for.
    """
    if not isinstance(graph, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph, got {describe(graph)}")
    first = graph.relation_id(relation) * graph.num_nodes
    available = graph.num_rows_with_edges(relation)
    valid = isinstance(num_rows, int) and not isinstance(num_rows, bool) and 0 <= num_rows <= available
    require(
        valid,
        lambda: (
            f"num_rows: expected an int in [0, {available}], the rows of {relation!r} with an edge, got {describe(num_rows)}"
        ),
    )
    check_generator(generator)
    has_edge = graph.inv_mass.narrow(0, first, graph.num_nodes) > 0
    # The smallest of independent uniform keys are a uniform draw, of a size that is known without looking at the data.
    key = torch.empty(graph.num_nodes, dtype=torch.float64, device=graph.device).uniform_(generator=generator)
    return key.masked_fill(~has_edge, 2.0).topk(num_rows, largest=False).indices.sort().values


def check_generator(generator: Any) -> None:
    """Check an optional `torch.Generator`."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {describe(generator)}")
