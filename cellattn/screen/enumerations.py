"""The sets of a screen numbered: of crossed rosters in every combination, or one by one as they are listed.

A rank says which genes a set holds and in which types they come, and the reverse; any range of ranks is made in no time.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._check import describe, listed, require, require_choice, require_indices, require_same, require_tensor
from ..data.dataset import PERTURBATION_TYPES
from ..genes import GeneList
from .ranks import MAX_RANKS, block_of, items_of, num_sets, rank_of_items
from .rosters import refuse_unknown

Types = str | Sequence[str] | Mapping[str, str]

DELETED = PERTURBATION_TYPES.index("deleted")
_TYPE_BITS = 3  # a gene and its type in one number


class GeneSets(NamedTuple):
    """Sets of k genes.

    Attributes:
        genes: int64 [B, k].
        types: int64 [B, k], positions in `PERTURBATION_TYPES`; None: all are deleted.
    """

    genes: Tensor
    types: Tensor | None


def digest(*values: Tensor) -> str:
    """SHA-256, in hex, of whole numbers and their shapes."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(list(value.shape)).encode())
        digest.update(value.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def require_types(types: Any, genes: Tensor) -> None:
    """Check types int64 [B, k] beside genes [B, k]."""
    require_tensor("types", types, ndim=2, dtypes=(torch.int64,))
    require_same("shape", genes=list(genes.shape), types=list(types.shape))
    require_indices("types", types, len(PERTURBATION_TYPES), "PERTURBATION_TYPES")


class TypesOf(NamedTuple):
    """The types in which each gene comes: as many for every gene."""

    of_gene: Tensor  # int64 [number, genes]
    text: str | list[str] | dict[str, str]  # as the manifest says it

    @property
    def number(self) -> int:
        return len(self.of_gene)

    @property
    def deleted(self) -> bool:
        """Whether all genes are only ever deleted."""
        return self.text == "deleted"

    @classmethod
    def parse(cls, names: GeneList, types: Types, roster: Tensor) -> TypesOf:
        if isinstance(types, Mapping):
            refuse_unknown(names, types, "types")
            of_gene = torch.full((1, len(names)), -1)
            for name, kind in types.items():
                require_choice(f"types: {name}", kind, PERTURBATION_TYPES[1:])
                of_gene[0, names.index([name])] = PERTURBATION_TYPES.index(kind)
            without = roster[of_gene[0, roster] < 0].tolist()
            require(not without, lambda: f"types: no type is given for {listed([names[gene] for gene in without], 3)}")
            kinds = of_gene[0, roster].tolist()
            if len(set(kinds)) == 1:  # said as one
                return cls(of_gene, PERTURBATION_TYPES[kinds[0]])
            given = zip(roster.tolist(), kinds, strict=True)
            return cls(of_gene, {names[gene]: PERTURBATION_TYPES[kind] for gene, kind in given})
        several = [types] if isinstance(types, str) else types
        if not isinstance(several, Sequence):
            raise TypeError(f"types: expected a name, several, or a dict by gene, got {describe(types)}")
        for kind in several:
            require_choice("types", kind, PERTURBATION_TYPES[1:])
        require(0 < len(several) == len(set(several)), f"types: expected one or several, none twice, got {types!r}")
        ids = sorted(PERTURBATION_TYPES.index(kind) for kind in several)
        text = [PERTURBATION_TYPES[kind] for kind in ids]
        return cls(torch.tensor(ids)[:, None].expand(-1, len(names)), text[0] if len(text) == 1 else text)


# --------------------------------------------------------------------------------------------------------- sources


class Enumeration(Protocol):
    """Where sets come from."""

    order: int
    total: int

    def set_of(self, rank: Tensor) -> GeneSets: ...

    def rank_of(self, genes: Tensor, types: Tensor) -> Tensor: ...

    def block(self, begin: int, end: int) -> GeneSets: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class _Factor:
    """`count` items out of those of a cell, in every combination."""

    cell: int
    items: Tensor  # int64 [genes of the cell x types], a gene and its type in one number; genes where all are deleted
    count: int
    size: int


class Crossed:
    """Sets of crossed rosters, of which one roster alone is the simplest case.

    The genes are told apart by the rosters that they are in: genes of the same rosters are a cell. How many genes of each cell
    are in a set tells sets apart in turn: those with the same numbers are a stratum, in which every combination from one cell
    goes with every one from another. A stratum is there if its cells can be dealt out to the rosters; as strata and cells are
    disjoint, no set comes twice. The first cell goes round fastest.
    """

    def __init__(self, rosters: list[Tensor], counts: list[int], cells: list[Tensor], strata: list[list[int]], types: TypesOf):
        self.order = sum(counts)
        self._rosters, self._counts, self._types = rosters, counts, types
        num_types = types.number
        self._strata: list[list[_Factor]] = []
        for stratum in strata:
            factors = []
            for cell, count in Counter(stratum).items():
                of_cell = cells[cell]
                items = of_cell if types.deleted else ((of_cell[:, None] << _TYPE_BITS) | types.of_gene[:, of_cell].T).flatten()
                factors.append(_Factor(cell, items, count, num_sets(len(of_cell), count, num_types)))
            self._strata.append(factors)
        sizes = [prod(factor.size for factor in factors) for factors in self._strata]
        self._begin = [0, *itertools.accumulate(sizes)]
        self.total = self._begin[-1]
        require(self.total <= MAX_RANKS, f"rosters: {self.total:,} sets are more than the 2^62 that can be numbered")
        num_genes = types.of_gene.shape[1]
        self._cell = torch.full((num_genes,), -1)
        self._place = torch.zeros(num_genes, dtype=torch.int64)
        for number, members in enumerate(cells):
            self._cell[members], self._place[members] = number, torch.arange(len(members))

    @classmethod
    def of(cls, rosters: list[Tensor], counts: list[int], types: TypesOf) -> Crossed:
        member = torch.zeros(len(rosters), types.of_gene.shape[1], dtype=torch.bool)
        for row, roster in zip(member, rosters, strict=True):
            row[roster] = True
        signature = (member.long() << torch.arange(len(rosters))[:, None]).sum(0)
        signatures = [s for s in signature.unique().tolist() if s]
        signatures.sort(key=lambda s: (s & -s, s))  # by the first roster that holds the genes
        cells = [(signature == s).nonzero()[:, 0] for s in signatures]
        slots = [roster for roster, count in enumerate(counts) for _ in range(count)]
        strata = [
            list(chosen)
            for chosen in itertools.combinations_with_replacement(range(len(cells)), len(slots))
            if all(len(cells[cell]) >= count for cell, count in Counter(chosen).items())
            and any(
                all(signatures[cell] >> slot & 1 for cell, slot in zip(chosen, dealt, strict=True))
                for dealt in itertools.permutations(slots)
            )
        ]
        return cls(rosters, counts, cells, strata, types)

    def set_of(self, rank: Tensor) -> GeneSets:
        sets = rank.new_empty(self.order, len(rank))
        for factors, begin, end in zip(self._strata, self._begin, self._begin[1:], strict=False):
            at = ((rank >= begin) & (rank < end)).nonzero()[:, 0]
            left, columns = rank[at] - begin, []
            for factor in factors:
                items = items_of(left % factor.size, factor.count, self._types.number)
                columns += [factor.items.to(rank.device)[item] for item in items]
                left = left // factor.size
            sets[:, at] = torch.stack(columns)
        return self._unpacked(sets)

    def rank_of(self, genes: Tensor, types: Tensor) -> Tensor:
        cell_of, place_of, of_gene = (x.to(genes.device) for x in (self._cell, self._place, self._types.of_gene))
        found = of_gene[:, genes] == types  # [types, B, k]
        item = place_of[genes] * self._types.number + found.long().argmax(0)
        cell = cell_of[genes]
        by_cell = (cell * (len(cell_of) * self._types.number) + item).argsort(1)
        item, ordered = item.gather(1, by_cell), cell.gather(1, by_cell)
        place = item // self._types.number
        valid = found.any(0).all(1) & (cell >= 0).all(1)
        valid &= ~((place.diff(dim=1) == 0) & (ordered.diff(dim=1) == 0)).any(1)  # a gene twice
        rank = torch.full_like(genes[:, 0], -1)
        for factors, begin in zip(self._strata, self._begin, strict=False):
            pattern = torch.tensor([factor.cell for factor in factors for _ in range(factor.count)], device=genes.device)
            at = (valid & (ordered == pattern).all(1)).nonzero()[:, 0]
            columns, size = list(item[at].unbind(1)), 1
            total = torch.full_like(at, begin)
            for factor in factors:
                mine, columns = columns[: factor.count], columns[factor.count :]
                total += rank_of_items(mine, self._types.number) * size
                size *= factor.size
            rank[at] = total
        return rank

    def block(self, begin: int, end: int) -> GeneSets:
        pieces = []
        for factors, first, past in zip(self._strata, self._begin, self._begin[1:], strict=False):
            low, high = max(begin, first), min(end, past)
            if low < high:
                pieces.append(torch.stack(self._product(factors, low - first, high - first)))
        if len(pieces) == 1:
            return self._unpacked(pieces[0])
        return self._unpacked(torch.cat([torch.empty(self.order, 0, dtype=torch.int64), *pieces], 1))

    def _product(self, factors: list[_Factor], begin: int, end: int) -> list[Tensor]:
        """Items of the sets begin to end of a stratum: its first cells go round once for each set of the last cell."""
        *inner, last = factors
        if not inner:
            return block_of(last.items, last.count, begin, end, self._types.number)
        size = prod(factor.size for factor in inner)
        first, final = begin // size, (end - 1) // size
        rounds = final - first + 1
        low, high = begin - first * size, end - final * size
        outer = block_of(last.items, last.count, first, final + 1, self._types.number)
        if rounds == 1:
            return self._product(inner, low, high) + [column.expand(end - begin) for column in outer]
        counts = torch.full((rounds,), size)
        counts[0], counts[-1] = size - low, high
        start, stop = self._product(inner, low, size), self._product(inner, 0, high)
        if rounds == 2:
            middle = [column[:0] for column in start]
        else:
            middle = [column.repeat(rounds - 2) for column in self._product(inner, 0, size)]
        columns = [torch.cat(parts) for parts in zip(start, middle, stop, strict=True)]
        return columns + [column.repeat_interleave(counts, output_size=end - begin) for column in outer]

    def _unpacked(self, sets: Tensor) -> GeneSets:
        """Of [k, B] to [B, k]."""
        if self._types.deleted:
            return GeneSets(sets.T, None)
        return GeneSets((sets >> _TYPE_BITS).T, (sets & ((1 << _TYPE_BITS) - 1)).T)

    def describe(self) -> dict[str, Any]:
        kinds = {"types": self._types.text}
        if len(self._rosters) == 1:
            return {"kind": "combinations", **kinds}
        members = [{"count": count, "digest": digest(x)} for x, count in zip(self._rosters, self._counts, strict=True)]
        return {"kind": "crossed", "rosters": members, **kinds}


class Listed:
    """Sets that were given one by one."""

    def __init__(self, num_genes: int, genes: Tensor, types: Tensor | None) -> None:
        self.total, self.order = genes.shape
        self._num_genes = num_genes
        genes = genes.cpu()
        genes, order = genes.sort(1)
        kinds = torch.full_like(genes, DELETED) if types is None else types.cpu().gather(1, order)
        if (twice := (genes.diff(dim=1) == 0).any(1)).any():
            row = int(twice.nonzero()[0])
            raise ValueError(f"genes: row {row} holds a gene twice, {genes[row].tolist()}")
        self._genes, self._types = genes.T.contiguous().T, None if types is None else kinds.T.contiguous().T
        self._code, self._row = self._codes(genes, kinds).sort(stable=True)
        if (again := self._code.diff() == 0).any():
            at = int(again.nonzero()[0])
            raise ValueError(f"genes: rows {int(self._row[at])} and {int(self._row[at + 1])} hold one set")

    def _codes(self, genes: Tensor, types: Tensor) -> Tensor:
        """One number a set, of sorted genes."""
        base = self._num_genes << _TYPE_BITS
        require(base**self.order <= 2**63, f"names: {self._num_genes} genes are too many for sets of {self.order} to be listed")
        code = torch.zeros_like(genes[:, 0])
        for gene, kind in zip(genes.unbind(1), types.unbind(1), strict=True):
            code = code * base + ((gene << _TYPE_BITS) | kind)
        return code

    def set_of(self, rank: Tensor) -> GeneSets:
        at = rank.cpu()
        genes, types = (None if x is None else x[at].to(rank.device) for x in (self._genes, self._types))
        assert genes is not None
        return GeneSets(genes, types)

    def rank_of(self, genes: Tensor, types: Tensor) -> Tensor:
        device = genes.device
        genes, order = genes.cpu().sort(1)
        code = self._codes(genes, types.cpu().gather(1, order))
        at = torch.searchsorted(self._code, code).clamp(max=self.total - 1)
        return torch.where(self._code[at] == code, self._row[at], -1).to(device)

    def block(self, begin: int, end: int) -> GeneSets:
        return GeneSets(self._genes[begin:end], None if self._types is None else self._types[begin:end])

    def describe(self) -> dict[str, Any]:
        kinds = self._types if self._types is not None else torch.full_like(self._genes, DELETED)
        return {"kind": "listed", "sets": digest(self._genes, kinds)}
