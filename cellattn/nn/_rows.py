"""Rows of the graphs that enter a training step's losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._check import count_of, require, unboxed
from ..graph import MultiGraph
from ..ops import sample_rows


def sampled_rows_of(value: Any) -> int | float | None:
    """How many rows are drawn: None, a number, or a fraction (float) in (0, 1]."""
    number = unboxed(value)
    if isinstance(number, float):
        require(0 < number <= 1, f"sampled_rows: expected a fraction in (0, 1], got {value}")
        return number
    return None if number is None else count_of("sampled_rows", number, minimum=1)


def draw_rows(
    graph: MultiGraph, relations: Iterable[str], number: int | float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Rows with a valid edge of each relation, drawn anew: a number of them, or a fraction (float) of those there are."""
    rows = {}
    for relation in dict.fromkeys(relations):
        available = graph.num_rows_with_edges(relation)
        wanted = min(max(1, round(number * available)), available) if isinstance(number, float) else number
        rows[relation] = sample_rows(graph, relation, wanted, generator=generator)
    return rows
