"""Sets of genes that are counted, not stored: a combination's index is its rank in the combinatorial number system."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor

from .._check import require, require_count
from ..genes import GeneList

MAX_RANKS = 2**62


class Combinations:
    """All combinations of `order` genes of a roster, counted in colexicographic order: rank = sum of C(p_i, i) of the
    positions p_1 < p_2 < ... in the roster.

    Args:
        names: of all genes.
        roster: names of the genes of which sets are made, no gene twice; None for all.
        order: genes of a set, 1 to 4.

    Raises:
        ValueError: a name that is unknown or repeated, an order out of range, or more than 2^62 sets.
    """

    def __init__(self, names: GeneList, roster: Sequence[str] | None = None, *, order: int = 2) -> None:
        require_count("order", order, minimum=1)
        require(order <= 4, f"order: expected 1 to 4 genes a set, got {order}")
        self.names, self.order = names, order
        self.roster = torch.arange(len(names)) if roster is None else names.index(GeneList(roster))
        self.total = comb(len(self.roster), order)
        # columns[i][p] = C(p, i + 1)
        self._columns = [torch.tensor([comb(p, i + 1) for p in range(len(self.roster) + 1)]) for i in range(order)]

    def block(self, begin: int, end: int) -> tuple[Tensor, Tensor, None]:
        rank = torch.arange(begin, end)
        left, places = rank, []
        for column in reversed(self._columns):
            place = torch.searchsorted(column, left, right=True) - 1  # the largest p with C(p, i) <= what is left
            left = left - column[place]
            places.append(place)
        return rank, self.roster[torch.stack(places[::-1], 1)], None

    def describe(self) -> dict[str, Any]:
        return {"roster": [self.names[gene] for gene in self.roster.tolist()], "order": self.order, "filters": None}
