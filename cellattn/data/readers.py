"""Readers for the tables that users have: STRING links files, delimited edge tables, genetic-interaction tables.

Gene names become indices through one `GeneList`. Lines that name a gene outside the list are left out; how many, and
which names, is warned about once a table and kept on the result.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from .._check import describe, require
from ._table import ANY_NUMBER, NOT_NEGATIVE, Table
from .genes import GeneList

_MAX_STRING_SCORE = 1000
_STRING_PROTEINS = {"source": "protein1", "target": "protein2"}
_TAXON = re.compile(r"^\d+\.")


@dataclass(frozen=True, eq=False)
class EdgeTable:
    """Edges of one relation, as the file holds them.

    Attributes:
        path: the file.
        edge_index: int64 [2, E], sources and targets.
        weight: float32 [E], or None for a table without weights.
        num_lines: lines of the file, without the header.
        num_unknown_lines: lines left out since they name a gene outside the list.
        num_below_threshold: lines left out since their score is under the threshold, or 0 in this channel.
        unknown: name outside the list -> lines that name it, most frequent first.
    """

    path: Path
    edge_index: Tensor
    weight: Tensor | None
    num_lines: int
    num_unknown_lines: int = 0
    num_below_threshold: int = 0
    unknown: Mapping[str, int] = field(default_factory=dict)

    def report(self) -> str:
        """Counts of lines and edges, and the first unknown names, on one line."""
        below = f", {self.num_below_threshold} below the threshold" if self.num_below_threshold else ""
        return f"{self.path}: {self.num_lines} lines, {self.edge_index.shape[1]} edges{below}{_unknown_text(self)}"


@dataclass(frozen=True, eq=False)
class InteractionTable:
    """Measured sets of perturbed genes, as the file holds them.

    Attributes:
        path: the file.
        genes: the gene list that the indices refer to.
        seeds: int64 [nnz], genes of all sets, one set after the other.
        ptr: int64 [B + 1], where each set begins in `seeds`.
        score: float32 [B].
        split: the split column, one string a set, or None.
        num_lines: lines of the file, without the header.
        num_unknown_lines: lines left out since they name a gene outside the list.
        unknown: name outside the list -> lines that name it, most frequent first.
    """

    path: Path
    genes: GeneList
    seeds: Tensor
    ptr: Tensor
    score: Tensor
    split: tuple[str, ...] | None
    num_lines: int
    num_unknown_lines: int = 0
    unknown: Mapping[str, int] = field(default_factory=dict)

    def report(self) -> str:
        """Counts of lines and sets, and the first unknown names, on one line."""
        return f"{self.path}: {self.num_lines} lines, {len(self.score)} sets{_unknown_text(self)}"


def read_string_links(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    score_threshold: float = 0,
    channels: str | Sequence[str] = "combined_score",
) -> EdgeTable | dict[str, EdgeTable]:
    """Read a STRING links file (`.links`, `.links.detailed`, `.links.full`, physical or not), plain or gzip.

    STRING writes each pair in both directions: the edges are those of the file, in its order. The taxon prefix of
    protein names (`4932.`) is removed.

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
            table.require_columns({**_STRING_PROTEINS, "channels": channel})
    else:
        raise TypeError(f"channels: expected a column name or several, got {describe(channels)}")

    bounds = dict.fromkeys(wanted, (0.0, float(_MAX_STRING_SCORE)))
    frame = table.read(names=tuple(_STRING_PROTEINS.values()), numbers=bounds)
    found = _find_genes(frame, tuple(_STRING_PROTEINS.values()), genes, lambda name: _TAXON.sub("", name))
    tables = {}
    for channel in wanted:
        score = frame[channel].to_numpy()
        tables[channel] = found.edge_table(table.path, score, (score > 0) & (score >= score_threshold))
    _warn_unknown(tables[wanted[0]])
    return tables[wanted[0]] if isinstance(channels, str) and channels != "all" else tables


def read_edge_table(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    source: str,
    target: str,
    weight: str | None = None,
    sep: str = "\t",
    signed: bool = False,
    rename: Callable[[str], str] | None = None,
) -> EdgeTable:
    """Read a delimited edge table with a header, plain or gzip.

    Args:
        path: the file.
        genes: the gene list.
        source: column with the source genes.
        target: column with the target genes.
        weight: column with the weights; None for an unweighted table.
        sep: one character between fields.
        signed: allow negative weights, kept as they are; otherwise they are refused.
        rename: applied to each name of the file before it is looked up, e.g. to cut a suffix.

    Raises:
        ValueError: a missing column (its message names those that are there) or a malformed line.
    """
    _require_genes(genes)
    table = Table(path, sep)
    weights = {} if weight is None else {"weight": weight}
    table.require_columns({"source": source, "target": target, **weights})
    bounds = dict.fromkeys(weights.values(), ANY_NUMBER if signed else NOT_NEGATIVE)
    frame = table.read(names=(source, target), numbers=bounds)
    found = _find_genes(frame, (source, target), genes, rename)
    edges = found.edge_table(table.path, None if weight is None else frame[weight].to_numpy())
    _warn_unknown(edges)
    return edges


def read_interactions(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    gene_columns: Sequence[str] = ("gene_a", "gene_b"),
    score: str = "score",
    split: str | None = None,
    sep: str = "\t",
    rename: Callable[[str], str] | None = None,
) -> InteractionTable:
    """Read a genetic-interaction table: the genes perturbed together, a signed score, optionally a split column.

    Args:
        path: the file, with a header, plain or gzip.
        genes: the gene list.
        gene_columns: columns with the genes of a set. From the third on a field may be empty, so that pairs and triples
            share a table.
        score: column with the score.
        split: column with the name of the split.
        sep: one character between fields.
        rename: applied to each name of the file before it is looked up, e.g. to cut the allele off a strain name.

    Raises:
        ValueError: a missing column (its message names those that are there) or a malformed line.
    """
    _require_genes(genes)
    if isinstance(gene_columns, str) or not isinstance(gene_columns, Sequence):
        raise TypeError(f"gene_columns: expected several column names, got {describe(gene_columns)}")
    require(len(gene_columns) > 0, "gene_columns: expected at least one column, got none")
    table = Table(path, sep)
    splits = {} if split is None else {"split": split}
    members = {f"gene_columns[{position}]": column for position, column in enumerate(gene_columns)}
    table.require_columns({**members, "score": score, **splits})
    frame = table.read(names=(*gene_columns, *splits.values()), numbers={score: ANY_NUMBER}, optional=tuple(gene_columns)[2:])
    found = _find_genes(frame, gene_columns, genes, rename)
    index = found.index[found.known]
    present = index != _NO_GENE
    interactions = InteractionTable(
        path=table.path,
        genes=genes,
        seeds=torch.from_numpy(index[present]),
        ptr=torch.from_numpy(np.concatenate([[0], np.cumsum(present.sum(1), dtype=np.int64)])),
        score=torch.from_numpy(frame[score].to_numpy()[found.known].astype(np.float32)),
        split=None if split is None else tuple(frame[split].filter(pl.Series(found.known))),
        num_lines=frame.height,
        num_unknown_lines=int((~found.known).sum()),
        unknown=found.unknown,
    )
    _warn_unknown(interactions)
    return interactions


_UNKNOWN = -1
_NO_GENE = -2  # an empty field


@dataclass(frozen=True)
class _FoundGenes:
    index: np.ndarray  # int64 [lines, columns]: gene index, _UNKNOWN or _NO_GENE
    known: np.ndarray  # bool [lines]: no gene of the line is unknown
    unknown: dict[str, int]

    def edge_table(self, path: Path, weight: np.ndarray | None, above: np.ndarray | None = None) -> EdgeTable:
        kept = self.known if above is None else self.known & above
        return EdgeTable(
            path=path,
            edge_index=torch.from_numpy(np.ascontiguousarray(self.index[kept].T)),
            weight=None if weight is None else torch.from_numpy(weight[kept].astype(np.float32)),
            num_lines=len(self.known),
            num_unknown_lines=int((~self.known).sum()),
            num_below_threshold=int((self.known & ~kept).sum()),
            unknown=self.unknown,
        )


def _require_genes(genes: GeneList) -> None:
    if not isinstance(genes, GeneList):
        raise TypeError(f"genes: expected a GeneList, got {describe(genes)}")


def _find_genes(
    frame: pl.DataFrame, columns: Sequence[str], genes: GeneList, rename: Callable[[str], str] | None
) -> _FoundGenes:
    # each distinct name is renamed and looked up once: there are thousands of them in millions of lines
    distinct = pl.concat([frame[column].rename("name") for column in columns]).unique().drop_nulls()
    renamed = [rename(name) if rename else name for name in distinct]
    index = [genes.get(name) for name in renamed]
    lookup = pl.DataFrame(
        {"name": distinct, "index": [_UNKNOWN if i is None else i for i in index]},
        schema={"name": pl.String, "index": pl.Int64},
    )
    found = np.empty((frame.height, len(columns)), dtype=np.int64)
    for position, column in enumerate(columns):
        joined = frame.select(name=column).join(lookup, on="name", how="left", maintain_order="left")
        found[:, position] = joined["index"].fill_null(_NO_GENE).to_numpy()
    known = (found != _UNKNOWN).all(1)

    original = dict(zip(distinct, renamed, strict=True))
    counts: dict[str, int] = {}
    for row in frame.filter(pl.Series(~known)).select(columns).iter_rows():
        for name in {original[name] for name in row if name is not None}:
            if name not in genes:
                counts[name] = counts.get(name, 0) + 1
    unknown = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return _FoundGenes(found, known, unknown)


def _unknown_text(table: EdgeTable | InteractionTable) -> str:
    if not table.unknown:
        return ""
    first = ", ".join(f"{name} ({count})" for name, count in list(table.unknown.items())[:5])
    more = ", ..." if len(table.unknown) > 5 else ""
    return (
        f"; {table.num_unknown_lines} lines left out that name {len(table.unknown)} unknown "
        f"{'gene' if len(table.unknown) == 1 else 'genes'}: {first}{more}"
    )


def _warn_unknown(table: EdgeTable | InteractionTable) -> None:
    if table.unknown:
        warnings.warn(table.report(), stacklevel=3)
