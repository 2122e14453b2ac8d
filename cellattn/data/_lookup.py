"""Names of a file become genes: each distinct field is looked up once, and every line is told apart by whether it could be."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from .._check import count_of, describe, listed, require, require_several, shown
from ._table import Table
from .genes import GeneList
from .tables import Lines

Rename = Callable[[str], str | Sequence[str]]

_TAXON = re.compile(r"^\d+\.")
_MONTH = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_DATE = re.compile(rf"[0-9]{{1,2}}-({_MONTH})|({_MONTH})-[0-9]{{2}}|[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}( 00:00:00)?")
UNKNOWN = -1


class FoundGenes(NamedTuple):
    """The genes that the fields of a table name: the i-th of F distinct ones gene[begin[i] : begin[i] + size[i]]."""

    field: tuple[np.ndarray, ...]  # a column int64 [lines]
    gene: np.ndarray  # int64 [names], UNKNOWN for a name outside the list
    begin: np.ndarray  # int64 [F]
    size: np.ndarray  # int64 [F]
    unknown: np.ndarray  # bool [lines], a gene of the line is unknown
    unknown_names: dict[str, int]  # -> lines that name it
    by_alias: dict[str, str]  # alias in the file -> gene

    def pairs(self, table: Table, columns: Mapping[str, str | int]) -> np.ndarray:
        """int64 [2, lines], of fields that each name one gene."""
        if (self.size[:-1] != 1).any():
            for field, column in zip(self.field, columns.values(), strict=True):
                if (wrong := self.size[field] != 1).any():
                    row = int(wrong.argmax())
                    table.fail(row, f"column {column!r} names {self.size[field[row]]} genes, expected one end of an edge")
        return np.stack([self.gene[self.begin[field]] for field in self.field])

    def sets(self) -> tuple[np.ndarray, np.ndarray]:
        """The genes of each line, column by column: int64 [nnz], and int64 [lines + 1] where each line's begin."""
        field = np.stack(self.field, axis=1)
        size = self.size[field]
        ptr = np.concatenate([[0], size.sum(1).cumsum()])
        return self.gene[each_from(self.begin[field].reshape(-1), size.reshape(-1))], ptr

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values [lines, columns] of fields for each of their genes: [nnz], as in `sets`."""
        return values.reshape(-1).repeat(self.size[np.stack(self.field, axis=1)].reshape(-1))


def each_from(begin: np.ndarray, size: np.ndarray) -> np.ndarray:
    """begin[0], begin[0] + 1, ... of which there are size[0], and so on: int64 [sum of size]."""
    first = begin - (size.cumsum() - size)
    return np.arange(size.sum()) + first.repeat(size)


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """Names with the most lines first, then by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def names_twice(index: np.ndarray, ptr: np.ndarray, num_genes: int) -> np.ndarray:
    """bool [lines], a gene stands twice in the line."""
    key = np.sort(np.arange(len(ptr) - 1).repeat(np.diff(ptr)) * (num_genes + 1) + (index - UNKNOWN))
    twice = np.zeros(len(ptr) - 1, dtype=bool)
    twice[key[1:][key[1:] == key[:-1]] // (num_genes + 1)] = True
    return twice


def find_genes(frame: pl.DataFrame, columns: Mapping[str, str | int], genes: GeneList, rename: Rename | None) -> FoundGenes:
    # each distinct field is renamed and looked up once: there are thousands of them in millions of lines
    distinct = pl.concat([frame[column].rename("field") for column in columns]).unique().drop_nulls()
    fields = distinct.to_list()
    names = [(field,) for field in fields] if rename is None else [renamed(rename, field) for field in fields]
    index = [genes.get(name) for name in chain.from_iterable(names)]
    gene = np.array([UNKNOWN if i is None else i for i in index], dtype=np.int64)
    listed = {name: genes[i] for name, i in zip(chain.from_iterable(names), gene.tolist(), strict=True) if i != UNKNOWN}
    size = np.array([*map(len, names), 0], dtype=np.int64)  # the last one is the empty field
    of_field = np.arange(len(size)).repeat(size)
    no_gene = np.bincount(of_field[gene == UNKNOWN], minlength=len(size)) > 0
    lookup = pl.DataFrame({"field": distinct, "id": np.arange(len(fields))}, schema={"field": pl.String, "id": pl.Int64})
    field_id = []
    for column in columns:
        joined = frame.select(field=column).join(lookup, on="field", how="left", maintain_order="left")
        field_id.append(joined["id"].fill_null(len(fields)).to_numpy())
    unknown = np.logical_or.reduce([no_gene[column] for column in field_id])

    counts: dict[str, int] = {}
    for row in np.stack(field_id, axis=1)[unknown].tolist():
        for name in {name for i in row if no_gene[i] for name in names[i] if name not in genes}:
            counts[name] = counts.get(name, 0) + 1
    return FoundGenes(
        field=tuple(field_id),
        gene=gene,
        begin=size.cumsum() - size,
        size=size,
        unknown=unknown,
        unknown_names=most_first(counts),
        by_alias={name: gene for name, gene in sorted(listed.items()) if name != gene},
    )


def renamed(rename: Rename, text: str) -> Sequence[str]:
    """The names that `rename` gives for a field."""
    if not callable(rename):
        raise TypeError(f"rename: expected a function of a name, got {describe(rename)}")
    given = rename(text)
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"rename: expected a name or a sequence of names for {text!r}, got {describe(given)}")
    return given


def leave_out(table: Table, reasons: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Which rows no reason holds for, bool [rows], and for each reason the lines that it is the first to hold for."""
    kept = np.ones(len(table.lines), dtype=bool)
    left_out = {}
    for reason, holds in reasons.items():
        left_out[reason] = torch.from_numpy(table.lines[kept & holds])
        kept &= ~holds
    return kept, left_out


def set_aside(table: Table, frame: pl.DataFrame, reasons: Mapping[str, np.ndarray]) -> tuple[pl.DataFrame, dict[str, Tensor]]:
    """The rows that no reason holds for, whose names are looked up; from now on `table.lines` are theirs."""
    kept, left_out = leave_out(table, reasons)
    table.lines = table.lines[kept]
    return frame.filter(pl.Series(kept)), left_out


def require_genes(genes: GeneList) -> None:
    """Check that an argument is the gene list."""
    if not isinstance(genes, GeneList):
        raise TypeError(f"genes: expected a GeneList, got {describe(genes)}")


def organisms_of(organism: int | Sequence[int] | None) -> list[str] | None:
    """Taxonomy ids as files have them; None where none was asked for."""
    if organism is None:
        return None
    if isinstance(organism, Iterable):
        require_several("organism", organism, "a taxonomy id or several")
        require(len(organism) > 0, "organism: expected at least one taxonomy id, got none")
    several = organism if isinstance(organism, Iterable) else [organism]
    return [str(count_of("organism", one, minimum=1)) for one in several]


def require_organisms(table: Table, organisms: Sequence[str], there: Sequence[pl.Series]) -> None:
    """Refuse ids that no line of a file has: yeast is 4932 in one and 559292 in another."""
    found = pl.concat(column.rename("organism") for column in there).value_counts(sort=True)["organism"].drop_nulls()
    if len(found) and not found.is_in(organisms).any():
        expected = listed(found.to_list(), 5)
        raise ValueError(f"organism: {table.path}: no line is of {listed(organisms, 5)}, expected one of {expected}")


def require_one_organism(
    table: Table,
    organisms: Sequence[pl.Series],
    found: np.ndarray,
    hint: str = "organism= takes the taxonomy id of those to keep, or several",
) -> None:
    """Refuse lines of several organisms where nobody said of which: symbols are the same in many.

    Args:
        table: whose lines they are.
        organisms: of each line, for each of the genes that it names.
        found: bool [lines], the genes of the line were found.
        hint: what to do.
    """
    first: dict[str, int] = {}
    for organism in organisms:
        of_found, lines = organism.filter(pl.Series(found)), table.lines[found]
        for one in of_found.unique().drop_nulls().sort():
            line = int(lines[int((of_found == one).arg_true()[0])])
            first[one] = min(line, first.get(one, line))
    if len(first) > 1:
        told = listed([f"{one} (line {line})" for one, line in sorted(first.items(), key=lambda item: item[1])], 5)
        raise ValueError(f"{table.path}: genes of the list are found in lines of several organisms, {told}; {hint}")


def require_one_taxon(table: Table, names: Sequence[pl.Series], found: np.ndarray, genes: GeneList) -> None:
    """`require_one_organism` of names that the list does not have as they stand, but without the taxon in front."""
    taxa: dict[str, str] = {}
    for name in pl.concat(names).unique():
        if name not in genes and (taxon := _TAXON.match(name)) and _TAXON.sub("", name) in genes:
            taxa[name] = taxon[0].removesuffix(".")
    if len(set(taxa.values())) > 1:
        old, new = list(taxa), list(taxa.values())
        organisms = [name.replace_strict(old, new, default=None, return_dtype=pl.String) for name in names]
        hint = "a list whose names have the taxon in front, as '4932.YAL001C', tells them apart"
        require_one_organism(table, organisms, found, hint)


def without_taxon(genes: GeneList) -> Callable[[str], str]:
    """Names as the list has them, whether the taxon stands in front of them there, in the file, in both or in neither.

    A name without, that the list has with several, is none of them.
    """
    listed: dict[str, str] | None = None  # name without the taxon -> as it is in the list

    def rename(name: str) -> str:
        nonlocal listed
        if name in genes:
            return name
        bare = _TAXON.sub("", name)
        if bare != name:
            return bare
        if listed is None:  # seldom needed: STRING's files have it
            times = Counter(_TAXON.sub("", gene) for gene in genes)
            listed = {bare: gene for gene in genes if times[bare := _TAXON.sub("", gene)] == 1}
        return listed.get(name, name)

    return rename


def genes_among(words: Iterable[object], genes: GeneList, rename: Rename | None) -> list[str]:
    """Those of a line's words that name genes: with one of them it is hardly a header."""
    found = []
    for word in words:
        if isinstance(word, str):
            names: list[str] = [word]
            with suppress(Exception):  # rename need not take what is no gene
                names += [] if rename is None else renamed(rename, word)
            found += [word] if any(name in genes for name in names) else []
    return found


def warn_of_header(table: Table, columns: Mapping[str, str | int], genes: GeneList, rename: Rename | None) -> None:
    """Say where a header's words are genes: it is the first line of a file that has none."""
    found = genes_among(columns.values(), genes, rename)
    if found:
        warnings.warn(
            f"{table.path}: the header names genes of the list ({listed(found, 5)}); where a file has none, header=False "
            "reads its first line, and takes columns by their numbers",
            stacklevel=4,  # a reader is called by what takes other default devices away
        )


def _but_for_case(table: Lines, genes: GeneList) -> str:
    """What to say where unknown names are known ones, in other letters or with spaces around."""
    alike = {name.strip().casefold(): name for name in (*genes.aliases, *genes)}
    found = [(name, alike[key]) for name in table.unknown if (key := name.strip().casefold()) in alike]
    if not found:
        return ""
    (name, gene), number = found[0], len(found)
    are = "of them is in the list" if number == 1 else "of them are in the list"
    return f"; {number} {are} but for case or spaces, {shown(name)} as {shown(gene)}, for which rename may see to it"


def warn_of_unknown(table: Lines, genes: GeneList) -> None:
    """Warn the caller of a reader of names that are not in the list."""
    if table.unknown:
        hint = _but_for_case(table, genes)
        if table.num_unknown_lines == table.num_lines:
            bare = {_TAXON.sub("", name) for name in genes}
            taxon = not bare.isdisjoint(_TAXON.sub("", name) for name in table.unknown)
            hint = "; names differ by the taxon in front, cut it off the list or by rename" if taxon else hint
        dates = [name for name in table.unknown if _DATE.fullmatch(name)]
        hint += f"; {shown(dates[0])} looks like the date that a spreadsheet makes of a name such as MAR1" if dates else ""
        warnings.warn(table.report() + hint, stacklevel=4)
