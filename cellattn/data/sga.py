"""Genetic interactions measured on synthetic genetic arrays, as their authors publish them.

Layouts are told apart by their header, in which case and what stands in brackets do not count:

| table | query, array | interaction | fitness | p-value | else |
|---|---|---|---|---|---|
| Costanzo et al. 2010, 7 or 13 columns, with the header or without | Query ORF, Array ORF | Genetic interaction score (ε) | Double mutant fitness | p-value | |
| Costanzo et al. 2016, raw | Query Strain ID, Array Strain ID | Genetic interaction score (ε) | Double mutant fitness | P-value | |
| Kuzmin et al. 2018 and 2020 | Query strain ID, Array strain ID | Adjusted genetic interaction score (epsilon or tau) | Double/triple mutant fitness | P-value | Combined mutant type |

A strain is its gene and its allele, YAL001C_tsq508, or two genes, YAL015C+YDL227C_tm461; without an allele it is a deletion.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np
import polars as pl
from torch import Tensor

from .._check import listed, number_of, require, require_choice, require_several, shown
from .._modes import without_function_modes
from ._lookup import find_genes, require_genes, set_aside, warn_of_unknown
from ._table import ANY_NUMBER, Number, Table
from .dataset import PERTURBATION_TYPES
from .genes import GeneList
from .readers import sets_of
from .tables import InteractionTable

_HEADERS = {
    "query": ("query strain id", "query orf"),
    "array": ("array strain id", "array orf"),
    "interaction": ("adjusted genetic interaction score", "genetic interaction score"),
    "fitness": ("double mutant fitness", "double/triple mutant fitness"),
    "p_value": ("p-value",),
    "mutants": ("combined mutant type",),
}
_WITHOUT_HEADER: dict[str, str | int] = {"query": 0, "array": 2, "interaction": 4, "p_value": 6}  # Costanzo et al. 2010
_WITH_FITNESS: dict[str, str | int] = {**_WITHOUT_HEADER, "fitness": 11}
_STRAINS = ("query", "array")
# How names of alleles begin: deletions in queries (sn), arrays (dma) and pairs (tm), temperature-sensitive alleles, decreased
# abundance by mRNA perturbation. Another allele is a mutation.
_ALLELES = {"": "deleted", "sn": "deleted", "dma": "deleted", "tm": "deleted", "damp": "knocked_down"}
_OTHER_ALLELE = PERTURBATION_TYPES.index("mutated")


@without_function_modes
def read_sga(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    phenotype: str = "interaction",
    mutants: str | None = None,
    max_p_value: float | None = None,
    controls: Sequence[str] = ("YDL227C",),
    missing: str = "drop",
    repeated: str = "drop",
) -> InteractionTable:
    """Read genetic interactions of SGA screens: Costanzo et al. 2010 and 2016, Kuzmin et al. 2018 and 2020 (trigenic).

    Names of alleles tell what was done to a gene: sn, dma, tm and none are deletions, damp is "knocked_down", all others,
    temperature-sensitive ones among them, "mutated"; both genes of a strain of two count as deleted. Every line that is kept
    is a set: two alleles of a gene against the same array, or a pair in both roles, are two.

    Args:
        path: the file, tab-separated; see `read_edge_table`.
        genes: the gene list, by systematic name or alias.
        phenotype: what becomes the score: "interaction" (ε, of three genes τ) or "fitness" (of the double or triple mutant).
        mutants: "digenic" or "trigenic" keeps these lines of a trigenic table alone; None all.
        max_p_value: lines with a larger p-value, or with none, are left out.
        controls: genes that are no perturbation in a strain of two, as the neutral deletion of HO.
        missing: "drop" leaves lines out whose score is missing, "error" refuses them.
        repeated: "drop" leaves lines out that cross a gene with itself, "error" refuses them.

    Returns:
        Measured sets with p-values and perturbation types.

    Raises:
        ValueError: none of these layouts, a malformed line, a phenotype that the table does not have.

    Warns:
        UserWarning: lines that name unknown genes.
    """
    require_genes(genes)
    require_choice("phenotype", phenotype, ("interaction", "fitness"))
    require_choice("missing", missing, ("error", "drop"))
    require_choice("repeated", repeated, ("error", "drop"))
    if mutants is not None:
        require_choice("mutants", mutants, ("digenic", "trigenic"))
    if max_p_value is not None:
        max_p_value = number_of("max_p_value", max_p_value)
        require(0 <= max_p_value <= 1, f"max_p_value: expected a p-value in [0, 1], got {max_p_value}")
    require_several("controls", controls, "several gene names")
    table = Table(path, "\t", comment="#")
    columns = _columns(table)
    require(
        phenotype in columns, f"phenotype: {table.path} has no column for {phenotype!r}, its columns are {listed(table.header)}"
    )
    require(mutants is None or "mutants" in columns, f"mutants: {table.path} has no column 'Combined mutant type'")
    names = {name: columns[name] for name in (*_STRAINS, "mutants") if name in columns}
    numbers = {"score": Number(columns[phenotype], ANY_NUMBER)}
    if "p_value" in columns:
        numbers["p_value"] = Number(columns["p_value"], (0.0, 1.0), may_miss=True)
    require(max_p_value is None or "p_value" in columns, f"max_p_value: {table.path} has no column of p-values")
    table.require_columns({name: column for name, column in columns.items() if name in names or name in (phenotype, "p_value")})

    frame = table.read(names, numbers, missing=missing)
    aside: dict[str, Tensor] = {}
    if mutants is not None:
        kind = frame["mutants"].str.to_lowercase()
        for other in kind.unique():
            if other not in ("digenic", "trigenic"):
                table.fail(
                    int((kind == other).arg_true()[0]),
                    f"column {columns['mutants']!r} is {shown(other)}, expected a known kind",
                )
        frame, aside = set_aside(table, frame, {"other_mutants": (kind != mutants).to_numpy()})
    neutral = frozenset(controls)

    def genes_of(strain: str) -> list[str]:
        names = strain.partition("_")[0].split("+")
        return [name for name in names if len(names) == 1 or name not in neutral]

    found = find_genes(frame, dict.fromkeys(_STRAINS, ""), genes, genes_of)
    reasons = {"missing": frame["score"].is_null().to_numpy()}
    if max_p_value is not None:
        reasons["above_p_value"] = ~(frame["p_value"] <= max_p_value).fill_null(False).to_numpy()
    types = found.spread(np.stack([_types(frame[name]) for name in _STRAINS], axis=1))
    interactions = sets_of(table, frame, found, genes, reasons, repeated, aside=aside, types=types)
    warn_of_unknown(interactions, genes)
    return interactions


def _columns(table: Table) -> dict[str, str | int]:
    """What the table has of `_HEADERS`, by the names that its header gives them."""
    bare = {word.casefold().partition("(")[0].strip().lstrip("#").lstrip(): word for word in reversed(table.header)}
    columns: dict[str, str | int] = {
        name: next(bare[word] for word in words if word in bare)
        for name, words in _HEADERS.items()
        if any(word in bare for word in words)
    }
    if not columns and len(table.header) in (7, 13):
        table.without_header()
        return _WITHOUT_HEADER if len(table.header) == 7 else _WITH_FITNESS
    for name in (*_STRAINS, "interaction"):
        require(
            name in columns,
            f"{table.path}: none of the published layouts of SGA tables: no column {' or '.join(map(repr, _HEADERS[name]))}, "
            f"its columns are {table.header}",
        )
    return columns


def _types(strains: pl.Series) -> np.ndarray:
    """int64 [lines], positions in `PERTURBATION_TYPES`."""
    allele = strains.str.extract(r"_([A-Za-z]*)", 1).fill_null("").str.to_lowercase()
    codes = {word: PERTURBATION_TYPES.index(kind) for word, kind in _ALLELES.items()}
    types = allele.replace_strict(codes, default=_OTHER_ALLELE, return_dtype=pl.Int64).to_numpy()
    return np.where(strains.str.contains("+", literal=True).to_numpy(), PERTURBATION_TYPES.index("deleted"), types)
