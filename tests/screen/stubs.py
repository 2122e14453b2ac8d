"""A model, sets and tables that are small and obvious, for tests of what is done with them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

N = 30


class Pairs:
    """All combinations of a roster, in the order of their rank, from a list of them."""

    def __init__(self, roster: Tensor, order: int = 2) -> None:
        self.roster, self.order = roster, order
        found = sorted(itertools.combinations(range(len(roster)), order), key=lambda s: s[::-1])
        self.genes = roster[torch.tensor(found, dtype=torch.int64).view(-1, order)]
        self.total = len(found)

    def block(self, begin: int, end: int) -> tuple[Tensor, Tensor, None]:
        return torch.arange(begin, end), self.genes[begin:end], None

    def describe(self) -> dict[str, Any]:
        return {"roster": self.roster.tolist(), "order": self.order}


class Additive(nn.Module):
    """The sum of a number a gene, and a little of the pair, so that no two sets are equal."""

    def __init__(self, seed: int = 0, num_genes: int = N) -> None:
        super().__init__()
        self.num_genes, self.num_types = num_genes, 6
        generator = torch.Generator().manual_seed(seed)
        self.effect = nn.Parameter(torch.randn(num_genes, generator=generator))

    def forward(self, seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
        k = int(ptr[1]) if len(ptr) > 1 else 1
        of_set = self.effect[seeds].view(-1, k)
        return of_set.sum(1) + 0.01 * of_set.prod(1)


class Count:
    """How many sets hold each gene."""

    def __init__(self) -> None:
        self.by_gene = torch.zeros(N, dtype=torch.int64)

    def add(self, genes: Tensor, mean: Tensor, sd: Tensor) -> None:
        self.by_gene += genes.flatten().bincount(minlength=N)

    def state(self) -> dict[str, Tensor]:
        return {"by_gene": self.by_gene}
