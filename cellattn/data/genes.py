"""The gene list: the one place where gene names become indices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike

import torch
from torch import Tensor

from .._check import describe, unknown
from ._table import Table


class GeneList:
    """Ordered unique gene names; the position of a name is the index of the gene everywhere in the library.

    Args:
        names: gene names, none empty and none twice.
        aliases: other name -> name of the list, e.g. standard names. An alias may not be the name of another gene.

    Raises:
        TypeError: a name is not a string, or `names` is one string.
        ValueError: an empty or repeated name, an alias of an unlisted gene or one that stands for two genes.
    """

    def __init__(self, names: Iterable[str], *, aliases: Mapping[str, str] | None = None) -> None:
        if isinstance(names, str):
            raise TypeError(f"names: expected several gene names, got the one string {names!r}")
        self.names: tuple[str, ...] = tuple(names)
        self._index: dict[str, int] = {}
        for position, name in enumerate(self.names):
            if not isinstance(name, str):
                raise TypeError(f"names: expected a string at position {position}, got {describe(name)}")
            if not name:
                raise ValueError(f"names: the name at position {position} is empty")
            if name in self._index:
                raise ValueError(f"names: {name!r} stands at positions {self._index[name]} and {position}")
            self._index[name] = position
        for alias, name in (aliases or {}).items():
            if not isinstance(alias, str) or not alias:
                raise ValueError(f"aliases: expected non-empty strings, got {describe(alias)} for {name!r}")
            index = self._index.get(name)
            if index is None:
                raise ValueError(f"aliases: {alias!r} stands for {name!r}, which is not in the list")
            if self._index.setdefault(alias, index) != index:
                raise ValueError(f"aliases: {alias!r} stands for {name!r} and is a name of {self.names[self._index[alias]]!r}")

    @classmethod
    def from_table(
        cls,
        path: str | PathLike[str],
        *,
        name: str | int = "name",
        alias: str | int | None = None,
        sep: str = "\t",
        quote: str | None = "auto",
        header: bool = True,
        comment: str | None = None,
    ) -> GeneList:
        """Read the list from two columns of a delimited file.

        Args:
            path: the file; see `read_edge_table`, also for `sep`, `quote`, `header` and `comment`.
            name: column with the names, in the order of the indices.
            alias: column with one other name for each gene; empty where there is none.

        Raises:
            ValueError: a missing column, a malformed line or what `GeneList` refuses.
        """
        table = Table(path, sep, quote=quote, header=header, comment=comment)
        columns = {"name": name} if alias is None else {"name": name, "alias": alias}
        table.require_columns(columns)
        frame = table.read(columns, optional=("alias",))
        names = frame["name"].to_list()
        row_of = {gene: row for row, gene in enumerate(names)}
        if len(row_of) < len(names):
            row = next(row for row, gene in enumerate(names) if gene in names[:row])
            table.fail(row, f"gene {names[row]!r} stands in line {table.lines[names.index(names[row])]} already")
        aliases: dict[str, str] = {}
        for row, other in enumerate([] if alias is None else frame["alias"].to_list()):
            if other is None:
                continue
            if aliases.setdefault(other, names[row]) != names[row]:
                table.fail(row, f"alias {other!r} stands for {aliases[other]!r} and {names[row]!r}")
            if row_of.get(other, row) != row:
                table.fail(row, f"alias {other!r} of {names[row]!r} is the name of another gene")
        return cls(names, aliases=aliases)

    def index(self, names: Iterable[str]) -> Tensor:
        """Indices of names or aliases, int64 [len(names)].

        Raises:
            TypeError: `names` is one string.
            ValueError: a name that is not in the list.
        """
        if isinstance(names, str):
            raise TypeError(f"names: expected several gene names, got the one string {names!r}")
        return torch.tensor([self._one(name) for name in names], dtype=torch.int64)

    def get(self, name: str) -> int | None:
        """Index of one name or alias, None where it is not in the list."""
        return self._index.get(name)

    def _one(self, name: str) -> int:
        index = self._index.get(name)
        if index is None:
            unknown("names", name, self.names)
        return index

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __getitem__(self, index: int) -> str:
        return self.names[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GeneList) and self.names == other.names and self._index == other._index

    def __hash__(self) -> int:
        return hash(self.names)

    def __repr__(self) -> str:
        first = ", ".join(self.names[:3]) + (", ..." if len(self) > 3 else "")
        return f"GeneList({len(self)} genes: {first})"
