"""Which sets of a screen stay: each filter looks at the genes of many sets at once. Of several, all have to be passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .._check import describe, integer_of, number_of, require, require_choice, require_indices, require_tensor
from .._modes import without_function_modes
from ..genes import GeneList
from .enumerations import digest
from .measured import MeasuredSets
from .rosters import gene_indices

WHICH = ("none", "any", "all", "bound")
_DENSE = 1 << 13  # genes named in pairs, up to which a table of all pairs of them is kept


class PairFilter:
    """Sets by the pairs of genes that are in a list.

    Args:
        names: the names of all genes.
        pairs: int64 [P, 2] or pairs of names; order and repeats say nothing.
        which: what stays. "none": sets without a pair of the list. "any": sets with at least one. "all": sets of which every
            pair is in the list, such as triangles of a graph; sets of one gene stay. "bound": sets that hold both genes of a
            pair or neither.

    Raises:
        TypeError, ValueError: names that are unknown, an index out of range, a gene paired with itself.
    """

    @without_function_modes
    def __init__(self, names: GeneList, pairs: Tensor | Sequence[tuple[str, str]], *, which: str = "none") -> None:
        require_choice("which", which, WHICH)
        if not isinstance(pairs, Tensor):
            if not all(isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 for pair in pairs):
                raise TypeError(f"pairs: expected pairs of gene names, got {describe(pairs)}")
            pairs = gene_indices(names, [name for pair in pairs for name in pair], "pairs").view(-1, 2)
        require_tensor("pairs", pairs, ndim=2, dtypes=(torch.int64,))
        require(pairs.shape[1] == 2, lambda: f"pairs: expected shape [P, 2], got a {describe(pairs)}")
        require_indices("pairs", pairs, len(names))
        same = pairs[:, 0] == pairs[:, 1]
        require(not same.any(), lambda: f"pairs: {names[int(pairs[same][0, 0])]!r} is paired with itself")
        self.which = which
        self._num_genes = len(names)
        self._code = (pairs.cpu().sort(1).values @ torch.tensor([len(names), 1])).unique()
        low, high = self._code // len(names), self._code % len(names)
        named = torch.cat([low, high]).unique()
        self._degree = torch.cat([low, high]).bincount(minlength=len(names))
        self._dense: Tensor | None = None
        if len(named) <= _DENSE:  # the last row and column are for genes that are in no pair
            self._place = torch.full((len(names),), len(named)).index_put_((named,), torch.arange(len(named)))
            self._dense = torch.zeros(len(named) + 1, len(named) + 1, dtype=torch.bool)
            a, b = self._place[low], self._place[high]
            self._dense[a, b] = self._dense[b, a] = True

    def __call__(self, genes: Tensor, types: Tensor | None = None) -> Tensor:
        """genes int64 [B, k] to bool [B], True where the set stays."""
        columns = list(genes.unbind(1))
        pairs = list(combinations(range(len(columns)), 2))
        found = self._listed(columns, pairs)
        nothing = torch.zeros(len(genes), dtype=torch.bool, device=genes.device)
        if self.which in ("none", "any"):
            some = nothing
            for x in found:
                some = some | x
            return some if self.which == "any" else ~some
        if self.which == "all":
            missing = nothing
            for x in found:
                missing = missing | ~x
            return ~missing
        degree, broken = self._degree.to(genes.device), nothing
        for place, gene in enumerate(columns):
            inside = torch.zeros_like(gene)
            for x, pair in zip(found, pairs, strict=True):
                if place in pair:
                    inside = inside + x
            broken = broken | (inside < degree[gene])
        return ~broken

    def _listed(self, columns: list[Tensor], pairs: list[tuple[int, int]]) -> list[Tensor]:
        """Whether each pair of columns is in the list."""
        device = columns[0].device
        if self._dense is not None:
            table, size = self._dense.flatten().to(device), len(self._dense)
            places = [self._place.to(device)[column] for column in columns]
            return [table[places[i] * size + places[j]] for i, j in pairs]
        code = self._code.to(device)
        wanted = [
            torch.minimum(columns[i], columns[j]) * self._num_genes + torch.maximum(columns[i], columns[j]) for i, j in pairs
        ]
        return [code[torch.searchsorted(code, x).clamp(max=len(code) - 1)] == x for x in wanted]

    def describe(self) -> dict[str, Any]:
        return {"filter": "pairs", "which": self.which, "pairs": len(self._code), "digest": digest(self._code)}


class LabelFilter:
    """Sets of which no two genes share a label: a complex, a chromosome arm, a pathway.

    Args:
        names: the names of all genes.
        labels: label by gene, or several; genes without one are with all others. Names that are not in the list are refused.

    Raises:
        TypeError, ValueError: names that are unknown, labels that are no strings.
    """

    @without_function_modes
    def __init__(self, names: GeneList, labels: Mapping[str, str | Sequence[str]]) -> None:
        if not isinstance(labels, Mapping):
            raise TypeError(f"labels: expected a dict by gene, got {describe(labels)}")
        of_gene: dict[int, set[str]] = {}
        for gene, given in zip(gene_indices(names, labels, "labels").tolist(), labels.values(), strict=True):
            several = [given] if isinstance(given, str) else given
            if not (isinstance(several, Sequence) and all(isinstance(label, str) for label in several)):
                raise TypeError(f"labels: expected a string or several for {names[gene]!r}, got {describe(given)}")
            of_gene.setdefault(gene, set()).update(several)
        known = sorted(set().union(*of_gene.values()))
        number = {label: position for position, label in enumerate(known)}
        most = max(map(len, of_gene.values()), default=0)
        self._labels = torch.full((most, len(names)), -1)
        for gene, texts in of_gene.items():
            for row, text in enumerate(sorted(texts)):
                self._labels[row, gene] = number[text]
        self._num_labels = len(known)

    def __call__(self, genes: Tensor, types: Tensor | None = None) -> Tensor:
        """genes int64 [B, k] to bool [B], True where the set stays."""
        table = self._labels.to(genes.device)
        of_place = [[row[gene] for row in table] for gene in genes.unbind(1)]
        shared = torch.zeros(len(genes), dtype=torch.bool, device=genes.device)
        for a, b in combinations(of_place, 2):
            for x in a:
                for y in b:
                    shared |= (x == y) & (x >= 0)
        return ~shared

    def describe(self) -> dict[str, Any]:
        return {"filter": "labels", "labels": self._num_labels, "digest": digest(self._labels)}


class DistanceFilter:
    """Sets of which no two genes lie closer together on a chromosome.

    Args:
        names: the names of all genes.
        position: (chromosome, position in bases) by gene; genes without one are with all others.
        distance: the least number of bases between two genes of a chromosome.

    Raises:
        TypeError, ValueError: names that are unknown, positions that are no numbers, a negative distance.
    """

    @without_function_modes
    def __init__(self, names: GeneList, position: Mapping[str, tuple[str, int]], *, distance: float) -> None:
        if not isinstance(position, Mapping):
            raise TypeError(f"position: expected a dict by gene, got {describe(position)}")
        distance = number_of("distance", distance)
        require(distance >= 0, f"distance: expected 0 or more, got {distance}")
        bases = []
        for gene, place in position.items():
            if not (isinstance(place, Sequence) and len(place) == 2 and isinstance(place[0], str)):
                raise TypeError(f"position: expected (chromosome, bases) for {gene!r}, got {describe(place)}")
            bases.append(integer_of(f"position: bases of {gene!r}", place[1]))
        index = gene_indices(names, position, "position")
        number = {chromosome: i for i, chromosome in enumerate(sorted({place[0] for place in position.values()}))}
        self._chromosome, self._position = torch.full((len(names),), -1), torch.zeros(len(names), dtype=torch.int64)
        self._chromosome[index] = torch.tensor([number[place[0]] for place in position.values()], dtype=torch.int64)
        self._position[index] = torch.tensor(bases, dtype=torch.int64)
        self.distance = distance

    def __call__(self, genes: Tensor, types: Tensor | None = None) -> Tensor:
        """genes int64 [B, k] to bool [B], True where the set stays."""
        chromosome, position = self._chromosome.to(genes.device), self._position.to(genes.device)
        places = [(chromosome[gene], position[gene]) for gene in genes.unbind(1)]
        close = torch.zeros(len(genes), dtype=torch.bool, device=genes.device)
        for (a, at), (b, other) in combinations(places, 2):
            close |= (a == b) & (a >= 0) & ((at - other).abs() < self.distance)
        return ~close

    def describe(self) -> dict[str, Any]:
        content = digest(self._chromosome, self._position)
        return {"filter": "distance", "distance": self.distance, "digest": content}


class UnmeasuredFilter:
    """Sets that nobody measured.

    Args:
        measured: those that were, as the genes of the same numbers; what was done to their genes says nothing.
    """

    def __init__(self, measured: MeasuredSets) -> None:
        if not isinstance(measured, MeasuredSets):
            raise TypeError(f"measured: expected MeasuredSets, got {describe(measured)}")
        self._measured = measured

    def __call__(self, genes: Tensor, types: Tensor | None = None) -> Tensor:
        """genes int64 [B, k] to bool [B], True where the set stays."""
        return ~self._measured.holds(genes)

    def describe(self) -> dict[str, Any]:
        return {"filter": "unmeasured", "sets": len(self._measured), "digest": self._measured.digest()}
