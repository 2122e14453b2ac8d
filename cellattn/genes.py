"""The gene list: the one place where gene names become indices."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count, islice
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._check import count_of, describe, plain, require, require_indices, require_iterable, require_tensor, shown, unknown
from ._modes import without_function_modes

if TYPE_CHECKING:
    from .data._table import Table


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
        require_iterable("names", names, "several gene names")
        if isinstance(names, (set, frozenset)):  # of strings, whose order is another in each process
            raise TypeError(f"names: expected gene names in an order, got {describe(names)}")
        if getattr(names, "ndim", 1) == 2:  # a data frame would give the names of its columns
            raise TypeError(f"names: expected one column of gene names, got {type(names).__name__} of {names.shape}")  # type: ignore[attr-defined]
        self.names: tuple[str, ...] = tuple(map(plain, names))
        self._aliases: dict[str, str] = {}
        self._index: dict[str, int] = {}
        for position, name in enumerate(self.names):
            if not isinstance(name, str):
                raise TypeError(f"names: expected a string at position {position}, got {describe(name)}")
            if not name:
                raise ValueError(f"names: the name at position {position} is empty")
            if name in self._index:
                raise ValueError(f"names: {shown(name)} stands at positions {self._index[name]} and {position}")
            self._index[name] = position
        if aliases is not None and not isinstance(aliases, Mapping):
            raise TypeError(f"aliases: expected a dict from other name to name, got {describe(aliases)}")
        for alias, name in (aliases or {}).items():
            alias, name = plain(alias), plain(name)
            if not isinstance(alias, str) or not alias:
                raise ValueError(f"aliases: expected non-empty strings, got {describe(alias)} for {name!r}")
            index = self._index.get(name) if isinstance(name, str) else None
            if index is None:
                raise ValueError(f"aliases: {shown(alias)} stands for {shown(name)}, which is not in the list")
            if self._index.setdefault(alias, index) != index:
                other = self.names[self._index[alias]]
                raise ValueError(f"aliases: {shown(alias)} stands for {shown(name)} and is a name of {shown(other)}")
            if alias != name:
                self._aliases[alias] = name

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
        from .data._table import Table  # readers of tables stand above the graphs, which carry this list

        return cls._of_table(Table(path, sep, quote=quote, header=header, comment=comment), name, alias)

    @classmethod
    def _of_table(cls, table: Table, name: str | int, alias: str | int | None = None) -> GeneList:
        columns = {"name": name} if alias is None else {"name": name, "alias": alias}
        table.require_columns(columns)
        frame = table.read(columns, optional=("alias",))
        names = frame["name"].to_list()
        row_of = {gene: row for row, gene in enumerate(names)}
        if len(row_of) < len(names):
            row = next(row for row, gene in enumerate(names) if gene in names[:row])
            table.fail(row, f"gene {shown(names[row])} stands in line {table.lines[names.index(names[row])]} already")
        aliases: dict[str, str] = {}
        for row, other in enumerate([] if alias is None else frame["alias"].to_list()):
            if other is None:
                continue
            if aliases.setdefault(other, names[row]) != names[row]:
                table.fail(row, f"alias {shown(other)} stands for {shown(aliases[other])} and {shown(names[row])}")
            if row_of.get(other, row) != row:
                table.fail(row, f"alias {shown(other)} of {shown(names[row])} is the name of another gene")
        return cls(names, aliases=aliases)

    @property
    def aliases(self) -> dict[str, str]:
        """Other name -> name of the list."""
        return dict(self._aliases)

    def digest(self) -> str:
        """SHA-256, in hex, of the names in their order (of their JSON list): equal for equal names, whatever the aliases."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.names, separators=(",", ":")).encode()).hexdigest()

    def select(self, indices: Tensor) -> GeneList:
        """The list of the genes at these positions (int64 [M], distinct), in their order, with their aliases.

        Raises:
            TypeError, ValueError: no such tensor, a position out of range or one that stands twice.
        """
        require_tensor("indices", indices, ndim=1, dtypes=(torch.int64,))
        require(indices.device.type != "meta", "indices: expected a tensor that holds values, got one on device meta")
        require_indices("indices", indices.cpu(), len(self.names))
        new = object.__new__(GeneList)  # all is known to be right; graphs are cut often
        new.names = tuple(map(self.names.__getitem__, indices.tolist()))
        new._index = {name: index for index, name in enumerate(new.names)}
        if len(new._index) < len(new.names):
            first = next(position for position, name in enumerate(new.names) if new._index[name] != position)
            raise ValueError(f"indices: expected distinct genes, got {int(indices[first])} twice")
        new._aliases = {alias: name for alias, name in self._aliases.items() if name in new._index}
        new._index |= {alias: new._index[name] for alias, name in new._aliases.items()}
        return new

    def extend(self, names: Iterable[str], *, at: int | None = None) -> GeneList:
        """The list with more genes behind its own, or before the one at position `at`."""
        require_iterable("names", names, "several gene names")
        at = len(self.names) if at is None else at
        at = count_of("at", at)
        require(at <= len(self.names), f"at: expected at most {len(self.names)}, the genes of the list, got {at}")
        return GeneList([*self.names[:at], *names, *self.names[at:]], aliases=self.aliases)

    def fresh(self, num_new: int) -> list[str]:
        """Names for genes that have none, "new1", "new2", ..., as far as they are not taken."""
        return list(islice((name for i in count(1) if (name := f"new{i}") not in self), num_new))

    @without_function_modes
    def index(self, names: Iterable[str]) -> Tensor:
        """Indices of names or aliases, int64 [len(names)].

        Raises:
            TypeError: `names` is one string.
            ValueError: a name that is not in the list.
        """
        require_iterable("names", names, "several gene names")
        return torch.tensor([self._one(name) for name in names], dtype=torch.int64)

    def get(self, name: str) -> int | None:
        """Index of one name or alias, None where it is not in the list."""
        return self._index.get(name)

    def _one(self, name: str) -> int:
        index = self._index.get(name) if isinstance(name, str) else None
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
        if isinstance(index, str):
            raise TypeError(f"index: expected the index of a gene, got the name {shown(index)}; `get` gives a name's index")
        return self.names[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GeneList) and self.names == other.names and self._aliases == other._aliases

    def __hash__(self) -> int:
        return hash(self.names)

    def __repr__(self) -> str:
        first = ", ".join(name if len(name) <= 80 else shown(name) for name in self.names[:3]) + (
            ", ..." if len(self) > 3 else ""
        )
        return f"GeneList({len(self)} genes: {first})"


def as_names(names: GeneList | Sequence[str] | None, num_genes: int) -> GeneList | None:
    """The names of `num_genes` genes as a list, None where there are none; refuses another number of them."""
    if names is None:
        return None
    if not isinstance(names, GeneList):
        if not isinstance(names, Iterable):
            raise TypeError(f"names: expected a GeneList or a sequence of names, got {describe(names)}")
        names = GeneList(names)
    require(len(names) == num_genes, f"names: expected {num_genes}, one a gene, got {len(names)}")
    return names


def require_same_genes(a: GeneList | None, b: GeneList | None, *, what: tuple[str, str] = ("graph", "dataset")) -> None:
    """Check that two things numbered by genes number the same genes, by the names that they carry (`graph.names`).

    Aliases may differ. Where neither has names there is nothing to compare, and nothing is said.

    Args:
        a, b: the names of either; None where it carries none.
        what: what they belong to, for the message.

    Raises:
        ValueError: names that differ; it says at which position they first part, and both names there.

    Warns:
        UserWarning: one of them has names and the other has none, so that their indices cannot be compared.
    """
    for names, whose in zip((a, b), what, strict=True):
        if names is not None and not isinstance(names, GeneList):
            raise TypeError(f"{whose}: expected its GeneList or None, got {describe(names)}")
    if a is b:
        return
    if a is None or b is None:
        without, other = what if a is None else what[::-1]
        warnings.warn(
            f"{without}: has no gene names, so it is not checked that its genes are those of the {other}", stacklevel=3
        )
        return
    if a.names == b.names:
        return
    both = min(len(a), len(b))
    position = next((i for i in range(both) if a[i] != b[i]), both)
    here, there = (shown(names[position]) if position < len(names) else "no gene" for names in (a, b))
    raise ValueError(
        f"{what[0]}, {what[1]}: expected the same genes in the same order, got {here} in the {what[0]} and {there} in the "
        f"{what[1]} at position {position} ({len(a)} and {len(b)} genes)"
    )
