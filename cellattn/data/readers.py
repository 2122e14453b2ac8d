"""Readers for the tables that users have: STRING links files, delimited edge tables, genetic-interaction tables.

Gene names become indices through one `GeneList`. Every line of a file is in what is returned, or among the lines left out,
which it holds by their reason; or the reader stops with the file, the line and what is wrong with it. Lines that name a gene
outside the list are left out with a warning, others only where that is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
import polars as pl
import torch
from torch import Tensor

from .._check import describe, listed, number_of, require, require_choice, require_several
from .._modes import without_function_modes
from ._lookup import (
    FoundGenes,
    Rename,
    find_genes,
    genes_among,
    leave_out,
    names_twice,
    organisms_of,
    require_genes,
    require_one_organism,
    require_one_taxon,
    require_organisms,
    set_aside,
    warn_of_header,
    warn_of_unknown,
    without_taxon,
)
from ._table import ANY_NUMBER, NOT_NEGATIVE, Number, Table, may_be_number
from .genes import GeneList
from .tables import EdgeTable, InteractionTable

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
_BIOGRID_ORGANISM: tuple[dict[str, str | int], ...] = tuple(
    {f"{end}_organism": f"Organism {kind}Interactor {letter}" for end, letter in (("source", "A"), ("target", "B"))}
    for kind in ("ID ", "")  # TAB 3.0, TAB 2.0
)
_ENDS = {"source": "source", "target": "target"}


@without_function_modes
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
        ValueError: a threshold or channel that cannot be, not a STRING links file, a malformed line, proteins of several
            organisms that a list without the taxon does not tell apart.
    """
    score_threshold = number_of("score_threshold", score_threshold)
    require(
        0 <= score_threshold <= _MAX_STRING_SCORE,
        f"score_threshold: expected a score in [0, {_MAX_STRING_SCORE}], got {score_threshold}",
    )
    require_genes(genes)
    table = Table(path, " ", runs=False)
    table.require_format("a STRING links file", _STRING_PROTEINS.values())
    table.require_columns(_STRING_PROTEINS)
    if channels == "all":
        proteins = _STRING_PROTEINS.values()
        wanted = [column for column in table.header if column not in proteins and column != "combined_score"]
        require(bool(wanted), f"channels: {path} has no channel beside combined_score, its columns are {listed(table.header)}")
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
    found = find_genes(frame, _STRING_PROTEINS, genes, without_taxon(genes))
    require_one_taxon(table, [frame[end].rename("protein") for end in _STRING_PROTEINS], ~found.unknown, genes)
    tables = {}
    for channel in wanted:
        score = frame[channel].to_numpy()
        below = (score <= 0) | (score < score_threshold)
        kept, left_out = leave_out(table, {"unknown": found.unknown, "below_threshold": below})
        tables[channel] = edges_of(table, found, _STRING_PROTEINS, kept, left_out, score)
    warn_of_unknown(tables[wanted[0]], genes)
    return tables[wanted[0]] if isinstance(channels, str) and channels != "all" else tables


@without_function_modes
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
        sep: one character between fields, a space for any run of blanks; "auto": of tab, comma and space the first that the
            first line has.
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
    require_genes(genes)
    require_choice("missing", missing, ("error", "drop"))
    table = Table(path, sep, quote=quote, header=header, comment=comment)
    ends = {"source": source, "target": target}
    table.require_columns(ends if weight is None else {**ends, "weight": weight})
    edges = _edges(table, genes, ends, weight, ANY_NUMBER if signed else NOT_NEGATIVE, rename, missing)
    warn_of_header(table, ends, genes, rename)
    warn_of_unknown(edges, genes)
    return edges


@without_function_modes
def read_edge_list(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    rename: Rename | None = None,
    signed: bool = False,
    missing: str = "error",
    sep: str = "auto",
    comment: str | None = "#",
) -> EdgeTable:
    """Read a plain edge list: two genes a line and, where there is a third field, the weight. BIONIC's input is one.

    The first line is a header where it has a third field that is no number, and names no gene; of two fields it is a line as
    any other.

    Args:
        path: the file; see `read_edge_table`, also for `rename`, `signed`, `missing` and `comment`.
        genes: the gene list.
        sep: one character between fields, a space for any run of blanks; "auto": of tab, comma and space the first that the
            first line has.

    Raises:
        ValueError: another number of fields than two or three, a malformed line.

    Warns:
        UserWarning: lines that name unknown genes.
    """
    require_genes(genes)
    require_choice("missing", missing, ("error", "drop"))
    table = Table(path, sep, comment=comment)
    words = table.header
    require(len(words) in (2, 3), f"{table.path}: expected two genes and a weight a line, got the fields {listed(words)}")
    columns: list[str | int] = list(words)
    if len(words) == 2 or may_be_number(words[2]) or genes_among(words[:2], genes, rename):
        table.without_header()
        columns = list(range(len(words)))
    ends = {"source": columns[0], "target": columns[1]}
    weight = columns[2] if len(columns) == 3 else None
    table.require_columns(ends if weight is None else {**ends, "weight": weight})
    edges = _edges(table, genes, ends, weight, ANY_NUMBER if signed else NOT_NEGATIVE, rename, missing)
    warn_of_unknown(edges, genes)
    return edges


@without_function_modes
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
    require_genes(genes)
    require_choice("missing", missing, ("error", "drop"))
    require_choice("repeated", repeated, ("error", "drop"))
    require_several("gene_columns", gene_columns, "several columns")
    require(len(gene_columns) > 0, "gene_columns: expected at least one column, got none")
    table = Table(path, sep, quote=quote, header=header, comment=comment)
    members = {f"gene_columns[{position}]": column for position, column in enumerate(gene_columns)}
    others = {} if split is None else {"split": split}
    table.require_columns({**members, "score": score, **others})
    frame = table.read(
        {**members, **others}, {"score": Number(score, ANY_NUMBER)}, optional=tuple(members)[2:], missing=missing
    )
    found = find_genes(frame, members, genes, rename)
    no_score = frame["score"].is_null().to_numpy()
    interactions = sets_of(table, frame, found, genes, {"missing": no_score}, repeated)
    warn_of_header(table, members, genes, rename)
    warn_of_unknown(interactions, genes)
    return interactions


@without_function_modes
def read_biogrid(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    system_type: str | None = "physical",
    systems: Sequence[str] | None = None,
    organism: int | Sequence[int] | None = None,
) -> EdgeTable:
    """Read interactions in BioGRID's TAB 2.0 or TAB 3.0, plain or compressed.

    A gene is found by its systematic name or, where that is not in the list, by its official symbol. BioGRID writes a line for
    each experiment: edges are those of the file, in its order, interactor A to B, and a pair may come often. Files of one
    organism, too, have interactions with genes of others, whose symbols may be those of the list.

    Args:
        path: the file, with its header.
        genes: the gene list.
        system_type: lines to keep, "physical" or "genetic"; None for both.
        systems: experimental systems to keep, such as ["Affinity Capture-MS", "Two-hybrid"]; None for all of that type.
        organism: the organism of both genes, by its NCBI taxonomy id (559292 is yeast S288C, 9606 man), or several of which
            either may be; lines of others are left out. None where all genes that are found are of one, but for those of lines
            between two organisms, which are left out.

    Returns:
        Edges without weights: what BioGRID's scores mean differs from one publication to the next.

    Raises:
        ValueError: not a file in TAB 2.0 or 3.0, a malformed line, a system or an organism that is in none of its lines, or,
            without `organism`, genes of the list in lines of several organisms.

    Warns:
        UserWarning: lines that name unknown genes; without `organism`, lines between two where both genes are of the list.
    """
    require_genes(genes)
    if system_type is not None:
        require_choice("system_type", system_type, ("physical", "genetic"))
    if systems is not None:
        require_several("systems", systems, "several names or None")
    organisms = organisms_of(organism)
    table = Table(path, "\t")
    table.require_format("BioGRID's TAB 2.0 or 3.0", _BIOGRID.values())
    of_organism = next((columns for columns in _BIOGRID_ORGANISM if set(columns.values()) <= set(table.header)), {})
    require(
        organisms is None or bool(of_organism),
        f"organism: {table.path} has no columns 'Organism ID Interactor A' and B, its columns are {listed(table.header)}",
    )
    table.require_columns({**_BIOGRID, **of_organism})
    frame = table.read({**_BIOGRID, **of_organism}, optional=tuple(of_organism))
    for system in systems or ():
        require_choice(f"systems: {table.path}", system, frame["system"].unique().sort().to_list())
    asked = pl.lit(True) if system_type is None else pl.col("type") == system_type
    asked = asked if systems is None else asked & pl.col("system").is_in(list(systems))
    mine = frame.select(pl.repeat(True, pl.len()) & asked).to_series().to_numpy()
    reasons = {"other_system": ~mine}
    if organisms is not None:
        require_organisms(table, organisms, [frame[end] for end in of_organism])
        others = [~frame[end].fill_null("").is_in(organisms).to_numpy() for end in of_organism]
        reasons["other_organism"] = np.logical_or.reduce(others)
    frame, aside = set_aside(table, frame, reasons)
    known = [*genes, *genes.aliases]
    ends = []
    for end in _ENDS:
        name, symbol = pl.col(end), pl.col(f"{end}_symbol")
        by_symbol = (name == "-") | (symbol.is_in(known) & ~name.is_in(known))
        ends.append(pl.when(by_symbol).then(symbol).otherwise(name).alias(end))
    found = find_genes(frame.select(ends), _ENDS, genes, None)
    reasons = {"unknown": found.unknown}
    if organisms is None and of_organism:
        a, b = (frame[end] for end in of_organism)
        between = (a != b).fill_null(False).to_numpy()
        require_one_organism(table, [a, b], ~found.unknown & ~between)
        reasons["other_organism"] = between
    kept, left_out = leave_out(table, reasons)
    edges = edges_of(table, found, _ENDS, kept, aside | left_out)
    warn_of_unknown(edges, genes)
    if num_between := len(left_out["other_organism"]) if "other_organism" in left_out else 0:
        warnings.warn(
            f"{table.path}: {num_between} lines between two organisms left out, whose genes are called as some of the list; "
            "organism= takes the taxonomy ids of both",
            stacklevel=3,
        )
    return edges


# ------------------------------------------------------------------------------------------------- for other readers


def _edges(
    table: Table,
    genes: GeneList,
    ends: Mapping[str, str | int],
    weight: str | int | None,
    bounds: tuple[float, float],
    rename: Rename | None,
    missing: str,
) -> EdgeTable:
    hint = "; signed=True keeps negative weights" if bounds == NOT_NEGATIVE else ""
    frame = table.read(
        ends, {} if weight is None else {"weight": Number(weight, bounds, hint=hint, may_vanish=False)}, missing=missing
    )
    found = find_genes(frame, ends, genes, rename)
    no_weight = np.zeros(frame.height, dtype=bool) if weight is None else frame["weight"].is_null().to_numpy()
    kept, left_out = leave_out(table, {"unknown": found.unknown, "missing": no_weight})
    return edges_of(table, found, ends, kept, left_out, None if weight is None else frame["weight"].to_numpy())


def edges_of(
    table: Table,
    found: FoundGenes,
    ends: Mapping[str, str | int],
    kept: np.ndarray,
    left_out: Mapping[str, Tensor],
    weight: np.ndarray | None = None,
) -> EdgeTable:
    """The kept of the lines whose genes were found, as edges."""
    return EdgeTable(
        path=table.path,
        num_lines=int(kept.sum()) + sum(map(len, left_out.values())),
        left_out=left_out,
        unknown=found.unknown_names,
        by_alias=found.by_alias,
        edge_index=torch.from_numpy(np.ascontiguousarray(found.pairs(table, ends)[:, kept])),
        weight=None if weight is None else torch.from_numpy(weight[kept].astype(np.float32)),
    )


def sets_of(
    table: Table,
    frame: pl.DataFrame,
    found: FoundGenes,
    genes: GeneList,
    reasons: Mapping[str, np.ndarray],
    repeated: str,
    *,
    aside: Mapping[str, Tensor] | None = None,
    types: np.ndarray | None = None,
) -> InteractionTable:
    """The lines whose genes were found as measured sets, with the columns "score" and, where they are, "split" and "p_value".

    Args:
        reasons: for which other lines are left out, after unknown genes and before genes named twice.
        repeated: "error" or "drop".
        aside: lines that were left out before.
        types: int64 [nnz], for each gene of each line; -1 for an unknown one.
    """
    index, ptr = found.sets()
    twice = names_twice(index, ptr, len(genes))
    kept, left_out = leave_out(table, {"unknown": found.unknown, **reasons, "repeated": twice})
    if repeated == "error" and len(left_out["repeated"]):
        row = int((table.lines == int(left_out["repeated"][0])).argmax())
        members = index[ptr[row] : ptr[row + 1]].tolist()
        gene = next(gene for gene in members if members.count(gene) > 1)
        table.fail(row, f"names gene {genes[gene]!r} twice; repeated='drop' leaves such lines out")
    left_out = {**(aside or {}), **left_out}
    size = np.diff(ptr)
    columns = {name: frame[name].filter(pl.Series(kept)) for name in ("split", "p_value") if name in frame.columns}
    return InteractionTable(
        path=table.path,
        num_lines=int(kept.sum()) + sum(map(len, left_out.values())),
        left_out=left_out,
        unknown=found.unknown_names,
        by_alias=found.by_alias,
        genes=genes,
        seeds=torch.from_numpy(index[kept.repeat(size)]),
        ptr=torch.from_numpy(np.concatenate([[0], size[kept].cumsum()])),
        score=torch.from_numpy(frame["score"].to_numpy()[kept].astype(np.float32)),
        split=tuple(columns["split"]) if "split" in columns else None,
        p_value=torch.from_numpy(columns["p_value"].to_numpy().astype(np.float32)) if "p_value" in columns else None,
        types=None if types is None else torch.from_numpy(types[kept.repeat(size)]),
    )
