"""The sets of genes of a screen: counted, not stored. Each has a rank, and any range of ranks is made in no time.

Sets are combinations of one roster, of crossed rosters ("one of these with two of those"), or the lines of a list. Ranks count
all of them; filters take sets out where they are made, and leave the ranks of the others as they are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from os import PathLike
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._check import count_of, describe, listed, require, require_choice, require_indices, require_same, require_tensor
from .._modes import without_function_modes
from ..data._table import Table
from ..data.dataset import PERTURBATION_TYPES
from ..genes import GeneList
from .ranks import MAX_ORDER, MAX_RANKS, block_of, items_of, num_sets, order_of, rank_of_items, require_ranks
from .rosters import Roster, genes_of, refuse_unknown

Types = str | Sequence[str] | Mapping[str, str]

_TYPE_BITS = 3  # a gene and its type in one number


class GeneSets(NamedTuple):
    """Sets of k genes.

    Attributes:
        genes: int64 [B, k].
        types: int64 [B, k], positions in `PERTURBATION_TYPES`; None: all are deleted.
    """

    genes: Tensor
    types: Tensor | None


class Block(NamedTuple):
    """The sets of a range of ranks that filters leave.

    Attributes:
        rank: int64 [B], ascending.
        genes: int64 [B, k].
        types: int64 [B, k], positions in `PERTURBATION_TYPES`; None: all are deleted.
    """

    rank: Tensor
    genes: Tensor
    types: Tensor | None


class Filter(Protocol):
    """Says which sets stay; see `cellattn.screen.filters`."""

    def __call__(self, genes: Tensor, types: Tensor | None) -> Tensor:
        """genes int64 [B, k], types int64 [B, k] or None (all deleted) to bool [B], True where the set stays."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values that say what it is, and a digest of what it was made of."""
        ...


class SetSpace:
    """All sets of a screen, numbered from 0 to `total` - 1, and filters that take some of them out.

    Made by `combinations`, `crossed` and `listed`. Genes of a set ascend in the order of the gene list; sets come in
    colexicographic order, so that neighbours share their largest genes. In sets of crossed rosters the genes that are in the
    first roster alone come first, and so on.

    Attributes:
        names: the names of all genes.
        order: k, genes of a set.
        total: number of ranks, which is that of the sets before filters.
        roster: int64 [R], genes that are in a set, ascending.
        filters: which sets stay: those that pass all of them.
    """

    names: GeneList
    order: int
    total: int
    roster: Tensor
    filters: tuple[Filter, ...]

    def __init__(self, names: GeneList, source: _Source, roster: Tensor, filters: Iterable[Filter]) -> None:
        self.names, self._source, self.roster = names, source, roster
        self.order, self.total = source.order, source.total
        require(self.total > 0, f"roster: {len(roster)} genes make no set of {self.order}")
        self.filters = tuple(filters)
        for f in self.filters:
            if not callable(f) or not hasattr(f, "describe"):
                raise TypeError(f"filters: expected filters of cellattn.screen.filters, or their like, got {describe(f)}")

    @classmethod
    @without_function_modes
    def combinations(
        cls,
        names: GeneList,
        order: int,
        *,
        roster: Roster | None = None,
        types: Types = "deleted",
        filters: Iterable[Filter] = (),
    ) -> SetSpace:
        """All combinations of `order` genes.

        Args:
            names: the names of all genes, by which genes are numbered.
            order: genes of a set, 1 to 4.
            roster: names or aliases of the genes to combine, or their indices int64 [R]; None for all. Its order says nothing.
            types: what is done to genes, names from `PERTURBATION_TYPES`: one for all; several, of which a set is made in every
                combination; or a dict by gene, for every gene of the roster.
            filters: which sets stay.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: names that are unknown or stand twice, an unknown type, or more than 2^62 sets.
        """
        order = order_of("order", order)
        everything = torch.arange(len(names)) if roster is None else roster
        return cls.crossed(names, [(everything, order)], types=types, filters=filters)

    @classmethod
    @without_function_modes
    def crossed(
        cls,
        names: GeneList,
        rosters: Sequence[tuple[Roster, int]],
        *,
        types: Types = "deleted",
        filters: Iterable[Filter] = (),
    ) -> SetSpace:
        """So many genes of each roster in every set: [(kinases, 1), (phosphatases, 2)].

        Rosters may overlap. A set is one that can be dealt out to the rosters in some way, each gene to one that holds it; it
        comes once, in however many ways that can be done.

        Args:
            names, types, filters: as for `combinations`.
            rosters: names or indices of genes, and how many of them are in a set; 1 to 4 genes a set in all.

        Raises:
            TypeError, ValueError: as for `combinations`.
        """
        if not isinstance(names, GeneList):
            raise TypeError(f"names: expected a GeneList, got {describe(names)}")
        require(len(rosters) > 0, "rosters: expected at least one, got none")
        several = len(rosters) > 1
        members, counts = [], []
        for position, pair in enumerate(rosters):
            if not (isinstance(pair, Sequence) and len(pair) == 2):
                raise TypeError(f"rosters[{position}]: expected (roster, count), got {describe(pair)}")
            argument = f"rosters[{position}]" if several else "roster"
            counts.append(count_of(f"{argument}: count", pair[1], minimum=1))
            members.append(genes_of(names, pair[0], argument))
        require(sum(counts) <= MAX_ORDER, f"rosters: expected at most {MAX_ORDER} genes a set, got {sum(counts)}")
        roster = torch.cat(members).unique()
        source = _Crossed.of(members, counts, _TypesOf.parse(names, types, roster))
        return cls(names, source, roster, filters)

    @classmethod
    @without_function_modes
    def listed(
        cls, names: GeneList, genes: Tensor, *, types: Tensor | Types = "deleted", filters: Iterable[Filter] = ()
    ) -> SetSpace:
        """The sets of a list; the rank of a set is its row.

        Args:
            names, filters: as for `combinations`.
            genes: int64 [M, k], k of 1 to 4, in any order within a set; none twice in a set, no set twice.
            types: int64 [M, k], positions in `PERTURBATION_TYPES`; a name for all, or a dict by gene.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: a shape or index that does not fit, a gene twice in a set, or a set twice.
        """
        require_tensor("genes", genes, ndim=2, dtypes=(torch.int64,))
        order_of("genes: last dimension", genes.shape[1])
        require_indices("genes", genes, len(names))
        roster = genes.unique()
        of_set: Tensor | None
        if not isinstance(types, Tensor):
            kinds = _TypesOf.parse(names, types, roster)
            require(kinds.number == 1, f"types: expected one type a gene for listed sets, got {types!r}")
            of_set = None if kinds.deleted else kinds.of_gene[0][genes]
        else:
            of_set = types
            _require_types(of_set, genes)
            require(not (of_set == 0).any(), "types: a gene of a set is 'present', the unperturbed state")
        return cls(names, _Listed(len(names), genes, of_set), roster, filters)

    @classmethod
    @without_function_modes
    def from_file(
        cls,
        path: str | PathLike[str],
        names: GeneList,
        *,
        sep: str = "\t",
        types: Types = "deleted",
        filters: Iterable[Filter] = (),
    ) -> SetSpace:
        """The sets of a text file, a line each: names or aliases, as many in each line, with `sep` between. Lines from # on are
        comments. The file may be compressed.

        Raises:
            ValueError: a malformed line, a name that is unknown or stands twice in a set, or a set that stands twice.
        """
        table = Table(path, sep, header=False, comment="#")
        columns = {f"gene{place + 1}": place for place in range(len(table.header))}
        frame = table.read(columns)
        texts = [frame[column].to_list() for column in columns]
        refuse_unknown(names, {text for column in texts for text in column}, str(path))
        genes = torch.stack([names.index(column) for column in texts], 1)
        try:
            return cls.listed(names, genes, types=types, filters=filters)
        except ValueError:
            _fail_of_repeated(table, genes)
            raise

    def __len__(self) -> int:
        return self.total

    @without_function_modes
    def set_of(self, rank: Tensor) -> GeneSets:
        """The sets with these ranks, whether filters leave them or not.

        Args:
            rank: int64 [B], on any device.

        Returns:
            Genes int64 [B, k] and types, on the device of `rank`.

        Raises:
            ValueError: a rank out of range.
        """
        require_tensor("rank", rank, ndim=1, dtypes=(torch.int64,))
        require_ranks("rank", rank, self.total)
        return self._source.set_of(rank)

    def rank_of(self, genes: Tensor, types: Tensor | None = None) -> Tensor:
        """The ranks of sets, given in any order within a set, whether filters leave them or not.

        Args:
            genes: int64 [B, k], on any device.
            types: int64 [B, k]; None: all are deleted.

        Returns:
            int64 [B] on the device of `genes`; -1 for a set that is none of these.

        Raises:
            ValueError: another number of genes a set, or an index out of range.
        """
        require_tensor("genes", genes, ndim=2, dtypes=(torch.int64,))
        require(genes.shape[1] == self.order, lambda: f"genes: expected {self.order} a set, got a {describe(genes)}")
        require_indices("genes", genes, len(self.names))
        if types is None:
            types = torch.full_like(genes, _DELETED)
        _require_types(types, genes)
        return self._source.rank_of(genes, types)

    @without_function_modes
    def block(self, begin: int, end: int) -> Block:
        """The sets with ranks begin to end that filters leave, by far faster than by `set_of`.

        Returns:
            Ranks, genes and types on the CPU; the genes of a place in the sets, genes[:, i], are contiguous.

        Raises:
            ValueError: a range that is not one of this space.
        """
        begin = count_of("begin", begin)
        end = count_of("end", end)
        require(begin <= end <= self.total, f"begin, end: expected a range of ranks within {self.total}, got {begin} to {end}")
        rank = torch.arange(begin, end)
        genes, types = self._source.block(begin, end)
        if not self.filters:
            return Block(rank, genes, types)
        stays = torch.ones(end - begin, dtype=torch.bool)
        for f in self.filters:
            stays &= f(genes, types)
        at = stays.nonzero()[:, 0]
        return Block(rank[at], *(None if x is None else x.T.index_select(1, at).T for x in (genes, types)))  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        """Plain values that say which sets these are: equal for equal spaces, and no others."""
        return {
            "order": self.order,
            "total": self.total,
            "genes": self.names.digest(),
            "roster": [self.names[gene] for gene in self.roster.tolist()],
            **self._source.describe(),
            "filters": [f.describe() for f in self.filters],
        }


def digest(*values: Tensor) -> str:
    """SHA-256, in hex, of whole numbers and their shapes."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(list(value.shape)).encode())
        digest.update(value.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- types

_DELETED = PERTURBATION_TYPES.index("deleted")


def _fail_of_repeated(table: Table, genes: Tensor) -> None:
    """Say in which line of a table a gene stands twice, or a set again, if any does."""
    seen: dict[tuple[int, ...], int] = {}
    for row, members in enumerate(genes.sort(1).values.tolist()):
        if len(set(members)) < len(members):
            table.fail(row, "names a gene twice")
        if (first := seen.setdefault(tuple(members), row)) != row:
            table.fail(row, f"holds the set of line {table.lines[first]} again")


def _require_types(types: Any, genes: Tensor) -> None:
    """Check types int64 [B, k] beside genes [B, k]."""
    require_tensor("types", types, ndim=2, dtypes=(torch.int64,))
    require_same("shape", genes=list(genes.shape), types=list(types.shape))
    require_indices("types", types, len(PERTURBATION_TYPES), "PERTURBATION_TYPES")


class _TypesOf(NamedTuple):
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
    def parse(cls, names: GeneList, types: Types, roster: Tensor) -> _TypesOf:
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


class _Source(Protocol):
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


class _Crossed:
    """Sets of crossed rosters, of which one roster alone is the simplest case.

    The genes are told apart by the rosters that they are in: genes of the same rosters are a cell. How many genes of each cell
    are in a set tells sets apart in turn: those with the same numbers are a stratum, in which every combination from one cell
    goes with every one from another. A stratum is there if its cells can be dealt out to the rosters; as strata and cells are
    disjoint, no set comes twice. The first cell goes round fastest.
    """

    def __init__(self, rosters: list[Tensor], counts: list[int], cells: list[Tensor], strata: list[list[int]], types: _TypesOf):
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
    def of(cls, rosters: list[Tensor], counts: list[int], types: _TypesOf) -> _Crossed:
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


class _Listed:
    """Sets that were given one by one."""

    def __init__(self, num_genes: int, genes: Tensor, types: Tensor | None) -> None:
        self.total, self.order = genes.shape
        self._num_genes = num_genes
        genes = genes.cpu()
        genes, order = genes.sort(1)
        kinds = torch.full_like(genes, _DELETED) if types is None else types.cpu().gather(1, order)
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
        kinds = self._types if self._types is not None else torch.full_like(self._genes, _DELETED)
        return {"kind": "listed", "sets": digest(self._genes, kinds)}
