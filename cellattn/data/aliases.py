"""Gene names by systematic name, standard name and alias, from the tables that databases publish them in.

One rule says what an alias stands for: a name of the list stands for itself; otherwise a standard name goes before an alias;
and what two genes claim alike stands for none of them. Every clash is in `ambiguous`, or refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import NamedTuple, NoReturn

import numpy as np
import polars as pl
from torch import Tensor

from .._check import require, require_choice, require_several, shown
from ._lookup import (
    leave_out,
    most_first,
    require_genes,
    require_one_taxon,
    set_aside,
    without_taxon,
)
from ._table import Table
from .genes import GeneList
from .tables import Lines

_SYSTEMATIC = re.compile(r"Y[A-P][LR]\d{3}[CW](-[A-Z])?|Q\d{4}|R\d{4}[CW]")  # of yeast
_SGD = {"type": 1, "qualifier": 2, "name": 3, "standard": 4, "aliases": 5}
_SGD_COLUMNS = 16


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneNames(Lines):
    """A gene list with the aliases that a file gives it.

    Attributes:
        path: the file.
        genes: the list.
        ambiguous: alias -> the genes that it is said to stand for, of which at most the first has it.
        retired: alias that was a systematic name of yeast (YAR002C-A) -> the gene that has it now.
        num_lines: lines of the file, without comments.
        left_out: reason -> int64, the lines that were left out for it: "other_type" and "other_source" where they are of
            features or sources that were not asked for, "unknown" where the gene is not in the list.
        unknown: gene outside the list -> lines that name it.
    """

    genes: GeneList
    ambiguous: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    retired: Mapping[str, str] = field(default_factory=dict)

    def _found(self) -> str:
        return (
            f"{len(self.genes)} genes, {len(self.genes.aliases)} aliases ({len(self.retired)} of them retired systematic "
            f"names), {len(self.ambiguous)} ambiguous names"
        )


class _Claim(NamedTuple):
    alias: str
    gene: str
    rank: int  # 0: a standard name
    row: int


def read_sgd_features(
    path: str | PathLike[str],
    *,
    types: Sequence[str] = ("ORF",),
    qualifiers: Sequence[str] | None = None,
    ambiguous: str = "drop",
) -> GeneNames:
    """Read the gene list of yeast from SGD's `SGD_features.tab`: systematic names, with standard names and aliases.

    Args:
        path: the file: 16 columns between tabs, without a header; see `read_edge_table`.
        types: feature types to keep, such as "ORF" and "tRNA_gene".
        qualifiers: qualifiers to keep, such as ["Verified", "Uncharacterized"], without "Dubious"; None for all.
        ambiguous: "drop" counts names that stand for two genes, "error" refuses them.

    Returns:
        Genes in the order of the file. Secondary SGD ids and features of other types are no genes of it.

    Raises:
        ValueError: another table, a malformed line, a type that is in none of its lines, a name that stands twice.
    """
    for argument, value in (("types", types), ("qualifiers", qualifiers)):
        if value is not None or argument == "types":
            require_several(argument, value, "several names")
    require_choice("ambiguous", ambiguous, ("error", "drop"))
    table = Table(path, "\t", header=False, comment="!")
    require(
        len(table.header) == _SGD_COLUMNS,
        f"{table.path}: expected the {_SGD_COLUMNS} columns of SGD_features.tab, got {len(table.header)}",
    )
    frame = table.read(_SGD, optional=("qualifier", "name", "standard", "aliases"))
    num_lines = frame.height
    for kind in types:
        require_choice(f"types: {table.path}", kind, frame["type"].unique().sort().to_list())
    other = ~frame["type"].is_in(list(types))
    if qualifiers is not None:
        other |= ~frame["qualifier"].fill_null("").is_in(list(qualifiers))
    frame, left_out = set_aside(table, frame, {"other_type": other.to_numpy()})
    names = frame["name"].to_list()
    line_of: dict[str, int] = {}
    for row, name in enumerate(names):
        if name is None:
            table.fail(row, "a feature without its name")
        if line_of.setdefault(name, row) != row:
            table.fail(row, f"gene {shown(name)} stands in line {table.lines[line_of[name]]} already")
    claims = [_Claim(alias, names[row], 0, row) for row, alias in enumerate(frame["standard"]) if alias]
    claims += [
        _Claim(alias, names[row], 1, row)
        for row, text in enumerate(frame["aliases"])
        for alias in (text or "").split("|")
        if alias
    ]
    return _named(table, names, claims, ambiguous, num_lines, left_out, {})


def read_string_aliases(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    sources: Sequence[str] | None = None,
    ambiguous: str = "drop",
) -> GeneNames:
    """Give a gene list the aliases of STRING's `protein.aliases` file, v9 to v12.

    Args:
        path: the file, between tabs: protein, alias, source; in v9 with the taxon in a column of its own in front.
        genes: the gene list, with or without the taxon in front of its names. Its own aliases go before those of the file.
        sources: sources to keep, such as ["SGD_locus_tag", "UniProt_GN"], of which a line needs one; None for all.
        ambiguous: "drop" counts names that stand for two genes, "error" refuses them.

    Raises:
        ValueError: another table, a malformed line, a source that is in none of its lines, proteins of several organisms that a
            list without the taxon does not tell apart.
    """
    require_genes(genes)
    if sources is not None:
        require_several("sources", sources, "several names or None")
    require_choice("ambiguous", ambiguous, ("error", "drop"))
    table = Table(path, "\t", header=False, comment="#")
    width = len(table.header)
    require(width in (3, 4), f"{table.path}: expected protein, alias and source between tabs, got {width} columns")
    columns = {"protein": width - 3, "alias": width - 2, "source": width - 1}
    frame = table.read(columns if width == 3 else {**columns, "taxon": 0})
    num_lines = frame.height
    left_out: dict[str, Tensor] = {}
    if sources is not None:
        of_line = frame["source"].str.split(" ")  # up to v11 a line has all of its sources
        there = of_line.explode().unique().drop_nulls().sort().to_list()
        for source in sources:
            require_choice(f"sources: {table.path}", source, there)
        asked = np.array([not set(sources).isdisjoint(words) for words in of_line.to_list()], dtype=bool)
        frame, left_out = set_aside(table, frame, {"other_source": ~asked})
    if width == 4:
        whole = frame["protein"].str.starts_with(frame["taxon"] + ".")
        frame = frame.with_columns(
            protein=pl.when(whole).then("protein").otherwise(pl.concat_str("taxon", "protein", separator="."))
        )
    listed_as = without_taxon(genes)
    proteins = [listed_as(protein) for protein in frame["protein"]]
    is_unknown = np.array([protein not in genes for protein in proteins], dtype=bool)
    require_one_taxon(table, [frame["protein"]], ~is_unknown, genes)
    unknown = most_first(Counter(protein for protein in proteins if protein not in genes))
    left_out |= leave_out(table, {"unknown": is_unknown})[1]
    claims = [_Claim(alias, name, 0, -1) for alias, name in genes.aliases.items()]
    for row, (alias, protein) in enumerate(zip(frame["alias"], proteins, strict=True)):
        if (index := genes.get(protein)) is not None:
            claims.append(_Claim(alias, genes[index], 1, row))
    return _named(table, genes.names, claims, ambiguous, num_lines, left_out, unknown)


def _named(
    table: Table,
    names: Sequence[str],
    claims: Iterable[_Claim],
    ambiguous: str,
    num_lines: int,
    left_out: Mapping[str, Tensor],
    unknown: Mapping[str, int],
) -> GeneNames:
    """The list with the aliases that stand for one gene; the rule is the module's."""
    listed = set(names)
    claimed: dict[str, dict[str, _Claim]] = {}  # alias -> gene -> its first and strongest claim
    for claim in claims:
        of_alias = claimed.setdefault(claim.alias, {})
        if claim.gene not in of_alias or claim.rank < of_alias[claim.gene].rank:
            of_alias[claim.gene] = claim
    aliases: dict[str, str] = {}
    clashes: dict[str, tuple[str, ...]] = {}
    for alias, of_alias in claimed.items():
        others = [claim for claim in of_alias.values() if claim.gene != alias]
        if alias in listed:
            if others:
                clashes[alias] = (alias, *(claim.gene for claim in others))
        else:
            strongest = min(claim.rank for claim in others)
            first = [claim.gene for claim in others if claim.rank == strongest]
            if len(first) == 1:
                aliases[alias] = first[0]
            if len(others) > 1:
                clashes[alias] = (*first, *(claim.gene for claim in others if claim.rank > strongest))
        if ambiguous == "error" and alias in clashes:
            _refuse(table, alias, clashes[alias], max(claim.row for claim in others))
    return GeneNames(
        path=table.path,
        num_lines=num_lines,
        left_out=left_out,
        unknown=unknown,
        genes=GeneList(names, aliases=aliases),
        ambiguous=dict(sorted(clashes.items())),
        retired={alias: gene for alias, gene in sorted(aliases.items()) if _SYSTEMATIC.fullmatch(alias)},
    )


def _refuse(table: Table, alias: str, genes: Sequence[str], row: int) -> NoReturn:
    problem = f"name {shown(alias)} stands for {' and '.join(map(shown, genes))}; ambiguous='drop' counts such names"
    if row < 0:
        raise ValueError(f"{table.path}: {problem}")
    table.fail(row, problem)
