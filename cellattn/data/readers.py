"""Readers for the tables that users have: STRING links files, delimited edge tables, genetic-interaction tables.

Gene names become indices through one `GeneList`. Every line of a file is in what is returned, or among the lines left out,
which it holds by their reason; or the reader stops with the file, the line and what is wrong with it. Lines that name a gene
outside the list are left out with a warning, others only where that is asked for.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from .._check import describe, require, require_choice
from ._table import ANY_NUMBER, NOT_NEGATIVE, Number, Table
from .genes import GeneList

Rename = Callable[[str], str | Sequence[str]]

_MAX_STRING_SCORE = 1000
_STRING_PROTEINS = {"source": "protein1", "target": "protein2"}
_BIOGRID = {
    "source": "Systematic Name Interactor A",
    "target": "Systematic Name Interactor B",
    "source_symbol": "Official Symbol Interactor A",
    "target_symbol": "Official Symbol Interactor B",
    "system": "Experimental System",
    "type": "Experimental System Type",
}
_ENDS = {"source": "source", "target": "target"}
_TAXON = re.compile(r"^\d+\.")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Lines:
    """Which lines of a file were left out of a table, and why."""

    path: Path
    num_lines: int
    left_out: Mapping[str, Tensor] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_unknown_lines(self) -> int:
        """Lines left out since they name a gene outside the list."""
        return self._count("unknown")

    @property
    def num_missing_lines(self) -> int:
        """Lines left out since their number is missing."""
        return self._count("missing")

    def _count(self, reason: str) -> int:
        return len(self.left_out.get(reason, ()))

    def _report(self, found: str) -> str:
        names = [f"{name} ({count})" for name, count in list(self.unknown.items())[:5]]
        names += ["..."] if len(self.unknown) > 5 else []
        genes = f"{len(self.unknown)} unknown {'gene' if len(self.unknown) == 1 else 'genes'}"
        why = {
            "unknown": f"lines left out that name {genes}: {', '.join(names)}",
            "missing": "lines left out whose number is missing",
            "repeated": "lines left out that name a gene twice",
            "below_threshold": "below the threshold",
            "other_system": "lines left out of other experimental systems",
        }
        parts = [f"{self.path}: {self.num_lines} lines, {found}"]
        for reason, lines in self.left_out.items():
            if len(lines):
                first = ", ".join(map(str, lines[:3].tolist())) + (", ..." if len(lines) > 3 else "")
                parts.append(f"{len(lines)} {why[reason]} [{'line' if len(lines) == 1 else 'lines'} {first}]")
        return "; ".join(parts)


@dataclass(frozen=True, eq=False, kw_only=True)
class EdgeTable(_Lines):
    """Edges of one relation, as the file holds them.

    Attributes:
        path: the file.
        edge_index: int64 [2, E], sources and targets.
        weight: float32 [E], or None for a table without weights.
        num_lines: lines of the file, without the header and comments: E and those left out.
        left_out: reason -> int64, the lines of the file that were left out for it, counted from 1, ascending: "unknown"
            where they name a gene outside the list, "missing" where they have no weight, "below_threshold" where their score
            is under the threshold, or 0 in this channel, "other_system" where they are of an experimental system that was
            not asked for. A line stands under the first reason alone.
        unknown: name outside the list -> lines that name it, most frequent first.
    """

    edge_index: Tensor
    weight: Tensor | None

    @property
    def num_below_threshold(self) -> int:
        """Lines left out since their score is under the threshold, or 0 in this channel."""
        return self._count("below_threshold")

    def report(self) -> str:
        """Counts of lines, edges and lines left out, with the first of them, on one line."""
        return self._report(f"{self.edge_index.shape[1]} edges")


@dataclass(frozen=True, eq=False, kw_only=True)
class InteractionTable(_Lines):
    """Measured sets of perturbed genes, as the file holds them.

    Attributes:
        path: the file.
        genes: the gene list that the indices refer to.
        seeds: int64 [nnz], genes of all sets, one set after the other.
        ptr: int64 [B + 1], where each set begins in `seeds`.
        score: float32 [B].
        split: the split column, one string a set, or None.
        num_lines: lines of the file, without the header and comments: B and those left out.
        left_out: reason -> int64, the lines of the file that were left out for it, counted from 1, ascending: "unknown"
            where they name a gene outside the list, "missing" where they have no score, "repeated" where they name a gene
            twice. A line stands under the first reason alone.
        unknown: name outside the list -> lines that name it, most frequent first.
    """

    genes: GeneList
    seeds: Tensor
    ptr: Tensor
    score: Tensor
    split: tuple[str, ...] | None

    @property
    def num_repeated_lines(self) -> int:
        """Lines left out since they name a gene twice."""
        return self._count("repeated")

    def report(self) -> str:
        """Counts of lines, sets and lines left out, with the first of them, on one line."""
        return self._report(f"{len(self.score)} sets")


def read_string_links(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    score_threshold: float = 0,
    channels: str | Sequence[str] = "combined_score",
) -> EdgeTable | dict[str, EdgeTable]:
    """Read a STRING links file (`.links`, `.links.detailed`, `.links.full`, physical or not), plain or compressed.

    STRING writes each pair in both directions: the edges are those of the file, in its order. Protein names have their taxon
    in front (`4932.`): in the gene list, as of a protein.info file, it may stand or not.

    Args:
        path: the file, fields separated by one space.
        genes: the gene list.
        score_threshold: smallest score kept, in STRING's units, 0 to 1000. A score of 0 in a channel is never an edge.
        channels: one score column, which gives an `EdgeTable`; several, which give a dict by channel; or "all", a dict
            with every score column but `combined_score`.

    Returns:
        Edges with their scores as weights, in STRING's units, 0 to 1000.

    Raises:
        ValueError: a threshold or channel that cannot be, not a STRING links file, a malformed line.
    """
    if isinstance(score_threshold, bool) or not isinstance(score_threshold, (int, float)):
        raise TypeError(f"score_threshold: expected a number, got {describe(score_threshold)}")
    require(
        0 <= score_threshold <= _MAX_STRING_SCORE,
        f"score_threshold: expected a score in [0, {_MAX_STRING_SCORE}], got {score_threshold}",
    )
    _require_genes(genes)
    table = Table(path, " ")
    table.require_columns(_STRING_PROTEINS)
    if channels == "all":
        proteins = _STRING_PROTEINS.values()
        wanted = [column for column in table.header if column not in proteins and column != "combined_score"]
        require(bool(wanted), f"channels: {path} has no channel beside combined_score, its columns are {table.header}")
    elif isinstance(channels, (str, Sequence)):
        wanted = [channels] if isinstance(channels, str) else list(channels)
        require(bool(wanted), "channels: expected at least one channel, got none")
        for position, channel in enumerate(wanted):
            require(channel not in wanted[:position], f"channels: {channel!r} is named twice")
    else:
        raise TypeError(f"channels: expected a column name or several, got {describe(channels)}")
    for channel in wanted:
        table.require_columns({**_STRING_PROTEINS, "channels": channel})

    bounds = (0.0, float(_MAX_STRING_SCORE))
    frame = table.read(_STRING_PROTEINS, {channel: Number(channel, bounds) for channel in wanted})
    found = _find_genes(frame, _STRING_PROTEINS, genes, _without_taxon(genes))
    edge_index = found.pairs(table, _STRING_PROTEINS)
    tables = {}
    for channel in wanted:
        score = frame[channel].to_numpy()
        below = (score <= 0) | (score < score_threshold)
        kept, left_out = _leave_out(table, {"unknown": found.unknown, "below_threshold": below})
        tables[channel] = EdgeTable(
            path=table.path,
            edge_index=torch.from_numpy(np.ascontiguousarray(edge_index[:, kept])),
            weight=torch.from_numpy(score[kept].astype(np.float32)),
            num_lines=frame.height,
            left_out=left_out,
            unknown=found.unknown_names,
        )
    _warn_of_unknown(tables[wanted[0]], genes)
    return tables[wanted[0]] if isinstance(channels, str) and channels != "all" else tables


def read_edge_table(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    source: str | int,
    target: str | int,
    weight: str | int | None = None,
    sep: str = "\t",
    signed: bool = False,
    rename: Rename | None = None,
    missing: str = "error",
    quote: str | None = "auto",
    header: bool = True,
    comment: str | None = None,
) -> EdgeTable:
    """Read a delimited edge table.

    Args:
        path: the file: plain, gzip, bzip2, xz, or alone in a zip archive; UTF-8, or UTF-16 with its mark; lines may end in
            LF, CRLF or CR.
        genes: the gene list.
        source: column with the source genes.
        target: column with the target genes.
        weight: column with the weights; None for an unweighted table.
        sep: one character between fields.
        signed: allow negative weights, kept as they are; otherwise they are refused.
        rename: applied to each name of the file before it is looked up, e.g. to cut a suffix.
        missing: "error" refuses a weight that is missing (empty, NA, NaN, null, none, - or .), "drop" leaves its line out.
        quote: the character around fields that hold separators or line ends, doubled where it is part of one (RFC 4180);
            None where quotes are text; "auto": '"' where `sep` is a comma or semicolon, otherwise None.
        header: whether the first line names the columns. Where it does not, give columns by their numbers, from 0.
        comment: how lines begin that are no lines of the table. Such a line just above the table is its header where the
            columns asked for stand in it, as in "# gene_a gene_b".

    Raises:
        ValueError: a missing column (its message names those that are there) or a malformed line.

    Warns:
        UserWarning: lines that name unknown genes, or a header that names genes, and so may be none.
    """
    _require_genes(genes)
    require_choice("missing", missing, ("error", "drop"))
    table = Table(path, sep, quote=quote, header=header, comment=comment)
    ends = {"source": source, "target": target}
    table.require_columns(ends if weight is None else {**ends, "weight": weight})
    bounds = ANY_NUMBER if signed else NOT_NEGATIVE
    frame = table.read(ends, {} if weight is None else {"weight": Number(weight, bounds)}, missing=missing)
    found = _find_genes(frame, ends, genes, rename)
    no_weight = np.zeros(frame.height, dtype=bool) if weight is None else frame["weight"].is_null().to_numpy()
    kept, left_out = _leave_out(table, {"unknown": found.unknown, "missing": no_weight})
    edges = EdgeTable(
        path=table.path,
        edge_index=torch.from_numpy(np.ascontiguousarray(found.pairs(table, ends)[:, kept])),
        weight=None if weight is None else torch.from_numpy(frame["weight"].to_numpy()[kept].astype(np.float32)),
        num_lines=frame.height,
        left_out=left_out,
        unknown=found.unknown_names,
    )
    _warn_of_header(table, ends, genes, rename)
    _warn_of_unknown(edges, genes)
    return edges


def read_interactions(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    gene_columns: Sequence[str | int] = ("gene_a", "gene_b"),
    score: str | int = "score",
    split: str | int | None = None,
    sep: str = "\t",
    rename: Rename | None = None,
    missing: str = "error",
    repeated: str = "error",
    quote: str | None = "auto",
    header: bool = True,
    comment: str | None = None,
) -> InteractionTable:
    """Read a genetic-interaction table: the genes perturbed together, a signed score, optionally a split column.

    Args:
        path: the file; see `read_edge_table`, also for `sep`, `quote`, `header` and `comment`.
        genes: the gene list.
        gene_columns: columns with the genes of a set. From the third on a field may be empty, so that pairs and triples
            share a table.
        score: column with the score.
        split: column with the name of the split.
        rename: applied to each field before it is looked up; it gives the gene's name, e.g. without the allele of a strain,
            or the names of several, none for a control: `lambda strain: strain.partition("_")[0].split("+")` reads the three
            genes of YAL015C+YDL227C_tm461 and YBL007C_dma91.
        missing: "error" refuses a score that is missing (empty, NA, NaN, null, none, - or .), "drop" leaves its line out.
        repeated: "error" refuses a line that names a gene twice (two alleles, or a name and its alias), "drop" leaves it out.

    Raises:
        ValueError: a missing column (its message names those that are there) or a malformed line.

    Warns:
        UserWarning: lines that name unknown genes, or a header that names genes, and so may be none.
    """
    _require_genes(genes)
    require_choice("missing", missing, ("error", "drop"))
    require_choice("repeated", repeated, ("error", "drop"))
    if isinstance(gene_columns, str) or not isinstance(gene_columns, Sequence):
        raise TypeError(f"gene_columns: expected several columns, got {describe(gene_columns)}")
    require(len(gene_columns) > 0, "gene_columns: expected at least one column, got none")
    table = Table(path, sep, quote=quote, header=header, comment=comment)
    members = {f"gene_columns[{position}]": column for position, column in enumerate(gene_columns)}
    others = {} if split is None else {"split": split}
    table.require_columns({**members, "score": score, **others})
    frame = table.read(
        {**members, **others}, {"score": Number(score, ANY_NUMBER)}, optional=tuple(members)[2:], missing=missing
    )
    found = _find_genes(frame, members, genes, rename)
    index, ptr = found.sets()
    no_score, twice = frame["score"].is_null().to_numpy(), _repeated(index, ptr, len(genes))
    if repeated == "error" and (bad := twice & ~found.unknown & ~no_score).any():
        row = int(bad.argmax())
        members_of_row = index[ptr[row] : ptr[row + 1]].tolist()
        gene = next(gene for gene in members_of_row if members_of_row.count(gene) > 1)
        table.fail(row, f"names gene {genes[gene]!r} twice; repeated='drop' leaves such lines out")
    kept, left_out = _leave_out(table, {"unknown": found.unknown, "missing": no_score, "repeated": twice})
    size = np.diff(ptr)
    interactions = InteractionTable(
        path=table.path,
        genes=genes,
        seeds=torch.from_numpy(index[kept.repeat(size)]),
        ptr=torch.from_numpy(np.concatenate([[0], size[kept].cumsum()])),
        score=torch.from_numpy(frame["score"].to_numpy()[kept].astype(np.float32)),
        split=None if split is None else tuple(frame["split"].filter(pl.Series(kept))),
        num_lines=frame.height,
        left_out=left_out,
        unknown=found.unknown_names,
    )
    _warn_of_header(table, members, genes, rename)
    _warn_of_unknown(interactions, genes)
    return interactions


def read_biogrid(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    system_type: str | None = "physical",
    systems: Sequence[str] | None = None,
) -> EdgeTable:
    """Read interactions in BioGRID's TAB 2.0 or TAB 3.0, plain or compressed.

    A gene is found by its systematic name or, where that is not in the list, by its official symbol. BioGRID writes a line for
    each experiment: edges are those of the file, in its order, interactor A to B, and a pair may come often.

    Args:
        path: the file, with its header.
        genes: the gene list.
        system_type: lines to keep, "physical" or "genetic"; None for both.
        systems: experimental systems to keep, such as ["Affinity Capture-MS", "Two-hybrid"]; None for all of that type.

    Returns:
        Edges without weights: what BioGRID's scores mean differs from one publication to the next.

    Raises:
        ValueError: not a file in TAB 2.0 or 3.0, a malformed line, or a system that is in none of its lines.

    Warns:
        UserWarning: lines that name unknown genes.
    """
    _require_genes(genes)
    if system_type is not None:
        require_choice("system_type", system_type, ("physical", "genetic"))
    if isinstance(systems, str) or not isinstance(systems, Sequence | None):
        raise TypeError(f"systems: expected several names or None, got {describe(systems)}")
    table = Table(path, "\t")
    table.require_columns(_BIOGRID)
    frame = table.read(_BIOGRID)
    for system in systems or ():
        require_choice("systems", system, frame["system"].unique().sort().to_list())
    asked = pl.lit(True) if system_type is None else pl.col("type") == system_type
    asked = asked if systems is None else asked & pl.col("system").is_in(list(systems))
    mine = frame.select(pl.repeat(True, pl.len()) & asked).to_series().to_numpy()
    known = [*genes, *genes.aliases]
    ends = []
    for end in _ENDS:
        name, symbol = pl.col(end), pl.col(f"{end}_symbol")
        by_symbol = (name == "-") | (symbol.is_in(known) & ~name.is_in(known))
        ends.append(pl.when(by_symbol).then(symbol).otherwise(name).alias(end))
    found = _find_genes(frame.filter(pl.Series(mine)).select(ends), _ENDS, genes, None)
    unknown = np.zeros(frame.height, dtype=bool)
    unknown[mine] = found.unknown
    _, left_out = _leave_out(table, {"other_system": ~mine, "unknown": unknown})
    edges = EdgeTable(
        path=table.path,
        edge_index=torch.from_numpy(np.ascontiguousarray(found.pairs(table, _ENDS)[:, ~found.unknown])),
        weight=None,
        num_lines=frame.height,
        left_out=left_out,
        unknown=found.unknown_names,
    )
    _warn_of_unknown(edges, genes)
    return edges


_UNKNOWN = -1


class _FoundGenes(NamedTuple):
    """The genes that the fields of a table name: the i-th of F distinct ones gene[begin[i] : begin[i] + size[i]]."""

    field: tuple[np.ndarray, ...]  # a column int64 [lines]
    gene: np.ndarray  # int64 [names], _UNKNOWN for a name outside the list
    begin: np.ndarray  # int64 [F]
    size: np.ndarray  # int64 [F]
    unknown: np.ndarray  # bool [lines], a gene of the line is unknown
    unknown_names: dict[str, int]  # -> lines that name it

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
        size = size.reshape(-1)
        first = self.begin[field].reshape(-1) - (size.cumsum() - size)
        return self.gene[np.arange(ptr[-1]) + first.repeat(size)], ptr


def _repeated(index: np.ndarray, ptr: np.ndarray, num_genes: int) -> np.ndarray:
    """bool [lines], a gene stands twice in the line."""
    key = np.sort(np.arange(len(ptr) - 1).repeat(np.diff(ptr)) * (num_genes + 1) + (index - _UNKNOWN))
    twice = np.zeros(len(ptr) - 1, dtype=bool)
    twice[key[1:][key[1:] == key[:-1]] // (num_genes + 1)] = True
    return twice


def _find_genes(frame: pl.DataFrame, columns: Mapping[str, str | int], genes: GeneList, rename: Rename | None) -> _FoundGenes:
    # each distinct field is renamed and looked up once: there are thousands of them in millions of lines
    distinct = pl.concat([frame[column].rename("field") for column in columns]).unique().drop_nulls()
    fields = distinct.to_list()
    names = [(field,) for field in fields] if rename is None else [_renamed(rename, field) for field in fields]
    index = map(genes.get, chain.from_iterable(names))
    gene = np.array([_UNKNOWN if i is None else i for i in index], dtype=np.int64)
    size = np.array([*map(len, names), 0], dtype=np.int64)  # the last one is the empty field
    of_field = np.arange(len(size)).repeat(size)
    no_gene = np.bincount(of_field[gene == _UNKNOWN], minlength=len(size)) > 0
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
    return _FoundGenes(
        field=tuple(field_id),
        gene=gene,
        begin=size.cumsum() - size,
        size=size,
        unknown=unknown,
        unknown_names=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    )


def _renamed(rename: Rename, text: str) -> Sequence[str]:
    given = rename(text)
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"rename: expected a name or a sequence of names for {text!r}, got {describe(given)}")
    return given


def _leave_out(table: Table, reasons: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Which rows no reason holds for, bool [rows], and for each reason the lines that it is the first to hold for."""
    kept = np.ones(len(table.lines), dtype=bool)
    left_out = {}
    for reason, holds in reasons.items():
        left_out[reason] = torch.from_numpy(table.lines[kept & holds])
        kept &= ~holds
    return kept, left_out


def _require_genes(genes: GeneList) -> None:
    if not isinstance(genes, GeneList):
        raise TypeError(f"genes: expected a GeneList, got {describe(genes)}")


def _without_taxon(genes: GeneList) -> Callable[[str], str]:
    """Names as the list has them, whether the taxon stands in front of them there, in the file, in both or in neither."""
    listed: dict[str, str] = {}  # name without the taxon -> as it is in the list

    def rename(name: str) -> str:
        if name in genes:
            return name
        bare = _TAXON.sub("", name)
        if bare != name:
            return bare
        if not listed:  # seldom needed: STRING's files have it
            listed.update((_TAXON.sub("", gene), gene) for gene in reversed(genes.names))
        return listed.get(name, name)

    return rename


def _warn_of_header(table: Table, columns: Mapping[str, str | int], genes: GeneList, rename: Rename | None) -> None:
    """Say where a header's words are genes: it is the first line of a file that has none."""
    found = []
    for word in columns.values():
        if isinstance(word, str):
            names: list[str] = [word]
            with suppress(Exception):  # rename need not take what is no gene
                names += [] if rename is None else _renamed(rename, word)
            found += [word] if any(name in genes for name in names) else []
    if found:
        warnings.warn(
            f"{table.path}: the header names genes of the list ({', '.join(found)}); where a file has none, header=False "
            "reads its first line, and takes columns by their numbers",
            stacklevel=3,
        )


def _warn_of_unknown(table: EdgeTable | InteractionTable, genes: GeneList) -> None:
    if table.unknown:
        hint = ""
        if table.num_unknown_lines == table.num_lines:
            bare = {_TAXON.sub("", name) for name in genes}
            taxon = not bare.isdisjoint(_TAXON.sub("", name) for name in table.unknown)
            hint = "; names differ by the taxon in front, cut it off the list or by rename" if taxon else ""
        warnings.warn(table.report() + hint, stacklevel=3)
