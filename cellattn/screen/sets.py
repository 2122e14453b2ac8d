"""The sets of genes of a screen: counted, not stored. Each has a rank, and any range of ranks is made in no time.

Sets are combinations of one roster, of crossed rosters ("one of these with two of those"), or the lines of a list. Ranks count
all of them; filters take sets out where they are made, and leave the ranks of the others as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._check import count_of, describe, require, require_indices, require_iterable, require_tensor
from .._modes import without_function_modes
from ..data._table import Table
from ..genes import GeneList
from .enumerations import DELETED, Crossed, Enumeration, GeneSets, Listed, Types, TypesOf, require_types
from .ranks import MAX_ORDER, order_of, require_ranks
from .rosters import Roster, genes_of, refuse_unknown


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

    def __init__(self, names: GeneList, source: Enumeration, roster: Tensor, filters: Iterable[Filter]) -> None:
        self.names, self._source, self.roster = names, source, roster
        self.order, self.total = source.order, source.total
        require(self.total > 0, f"roster: {len(roster)} genes make no set of {self.order}")
        require_iterable("filters", filters, "several filters")
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
        source = Crossed.of(members, counts, TypesOf.parse(names, types, roster))
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
            kinds = TypesOf.parse(names, types, roster)
            require(kinds.number == 1, f"types: expected one type a gene for listed sets, got {types!r}")
            of_set = None if kinds.deleted else kinds.of_gene[0][genes]
        else:
            of_set = types
            require_types(of_set, genes)
            require(not (of_set == 0).any(), "types: a gene of a set is 'present', the unperturbed state")
        return cls(names, Listed(len(names), genes, of_set), roster, filters)

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
            types = torch.full_like(genes, DELETED)
        require_types(types, genes)
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


def _fail_of_repeated(table: Table, genes: Tensor) -> None:
    """Say in which line of a table a gene stands twice, or a set again, if any does."""
    seen: dict[tuple[int, ...], int] = {}
    for row, members in enumerate(genes.sort(1).values.tolist()):
        if len(set(members)) < len(members):
            table.fail(row, "names a gene twice")
        if (first := seen.setdefault(tuple(members), row)) != row:
            table.fail(row, f"holds the set of line {table.lines[first]} again")
