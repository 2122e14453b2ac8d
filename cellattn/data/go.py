"""Gene Ontology: its terms from an OBO file, and the genes annotated with them from a GAF file (2.0 to 2.2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import polars as pl
import torch

from .._check import count_of, describe, require, require_choice, require_several, shown
from .._modes import without_function_modes
from ._lookup import (
    each_from,
    find_genes,
    leave_out,
    organisms_of,
    require_genes,
    require_one_organism,
    require_organisms,
    set_aside,
    warn_of_unknown,
)
from ._table import Table, read_string
from .genes import GeneList
from .tables import MembershipTable

_GAF = {"id": 1, "symbol": 2, "qualifier": 3, "term": 4, "evidence": 6, "aspect": 8, "synonyms": 10, "taxon": 12}
_GAF_COLUMNS = 17
_ASPECTS = ("P", "F", "C")
_RELATIONS = ("is_a", "part_of")
_AFTER_VALUE = re.compile(r"\s+(\{.*\}\s*)?(!.*)?$")  # modifiers and a comment
_EVIDENCE = (
    *("EXP", "IDA", "IPI", "IMP", "IGI", "IEP", "HTP", "HDA", "HMP", "HGI", "HEP", "IBA", "IBD", "IKR", "IRD"),
    *("ISS", "ISO", "ISA", "ISM", "IGC", "RCA", "TAS", "NAS", "IC", "ND", "IEA"),
)


@dataclass(frozen=True, eq=False)
class Ontology:
    """Terms and what they are part of.

    Attributes:
        path: the file.
        terms: term -> its title, obsolete ones left out.
        parents: "is_a" or "part_of" -> term -> its parents.
        replaced: other id of a term -> the term; not where the id is one of `terms` itself, or two terms have it.
        obsolete: obsolete terms.
    """

    path: Path
    terms: Mapping[str, str]
    parents: Mapping[str, Mapping[str, tuple[str, ...]]]
    replaced: Mapping[str, str]
    obsolete: frozenset[str]

    def ancestors(self, relations: Collection[str] = ("is_a",)) -> dict[str, frozenset[str]]:
        """Each term with all terms above it, itself among them.

        Args:
            relations: which edges lead up, of "is_a" and "part_of".

        Raises:
            ValueError: an unknown relation, or a circle of terms.
        """
        for relation in relations:
            require_choice("relations", relation, _RELATIONS)
        above: dict[str, frozenset[str]] = {}
        for term in self.terms:
            stack = [term]
            inside: dict[str, None] = {}  # from the term that was asked for to the one on top of the stack
            while stack:
                top = stack[-1]
                parents = [parent for relation in relations for parent in self.parents[relation].get(top, ())]
                missing = [parent for parent in parents if parent not in above]
                if top in above:
                    stack.pop()
                elif missing:
                    inside[top] = None
                    circle = [parent for parent in missing if parent in inside]
                    require(not circle, lambda: f"{self.path}: term {shown(circle[0])} is above itself")
                    stack += missing
                else:
                    above[top] = frozenset([top]).union(*(above[parent] for parent in parents))
                    inside.pop(top, None)
                    stack.pop()
        return above


def read_obo(path: str | PathLike[str]) -> Ontology:
    """Read the terms of an ontology in OBO format 1.2 or 1.4, as `go-basic.obo`.

    Of a [Term] the tags id, name, is_a, relationship (part_of), alt_id and is_obsolete are read, of other stanzas nothing.

    Raises:
        ValueError: no OBO file, a malformed line, a term that stands twice, a parent that is no term.
    """
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"path: expected a path, got {describe(path)}")
    path = Path(path)
    lines = read_string(path).split("\n")
    require(bool(lines[0].strip()), f"{path}: the file is empty, expected an ontology in OBO format")
    titles: dict[str, str] = {}
    parents: dict[str, dict[str, tuple[str, ...]]] = {relation: {} for relation in _RELATIONS}
    above: list[tuple[int, str, str, str]] = []  # line, term, relation, parent
    claims: dict[str, dict[str, None]] = {}  # other id -> the terms that have it
    obsolete: set[str] = set()

    def fail(number: int, problem: str) -> None:
        raise ValueError(f"{path}, line {number}: {problem}: {lines[number - 1][:200]!r}")

    stanza, term = "", None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("!"):
            continue
        if text.startswith("["):
            stanza, term = text.partition("]")[0].casefold(), None  # a comment may follow
            continue
        tag, colon, value = text.partition(":")
        if not colon:
            fail(number, "expected 'tag: value'")
        tag = tag.strip()
        value = value.strip() if tag == "name" else _AFTER_VALUE.sub("", value.strip())
        if stanza == "" and number == 1 and tag != "format-version":
            fail(number, "expected an ontology in OBO format, which begins with 'format-version'")
        if stanza != "[term":
            continue
        if tag == "id":
            if term is not None:
                fail(number, f"a second id of term {shown(term)}")
            term = value
            if term in titles:
                fail(number, f"term {shown(term)} stands twice")
            titles[term] = ""
        elif term is None:
            fail(number, "expected the id of the term first")
        elif tag == "name":
            titles[term] = value
        elif tag == "alt_id":
            claims.setdefault(value, {})[term] = None
        elif tag == "is_obsolete":
            if value.casefold() not in ("true", "false"):
                fail(number, "expected true or false")
            if value.casefold() == "true":
                obsolete.add(term)
        elif tag == "is_a":
            above.append((number, term, "is_a", value))
        elif tag == "relationship" and value.split()[:1] == ["part_of"]:
            above.append((number, term, "part_of", value.removeprefix("part_of").strip()))
    require(bool(titles), f"{path}: no [Term] in it, expected an ontology in OBO format")
    for number, term, relation, parent in above:
        if parent not in titles:
            fail(number, f"{shown(parent)} is no term")
        parents[relation][term] = (*parents[relation].get(term, ()), parent)
    terms = {term: title for term, title in titles.items() if term not in obsolete}
    replaced = {other: next(iter(of)) for other, of in claims.items() if len(of) == 1 and other not in terms}
    return Ontology(path, terms, parents, replaced, frozenset(obsolete))


@without_function_modes
def read_go_annotations(
    path: str | PathLike[str],
    genes: GeneList,
    *,
    ontology: Ontology | str | PathLike[str] | None = None,
    relations: Sequence[str] = ("is_a",),
    aspects: Sequence[str] = _ASPECTS,
    evidence: Sequence[str] | None = None,
    without_evidence: Sequence[str] = (),
    min_genes: int = 1,
    max_genes: int | None = None,
    organism: int | Sequence[int] | None = None,
) -> MembershipTable:
    """Read which genes have which terms from a GAF file, 2.0 to 2.2, and of all terms above them.

    A gene is found by its symbol, its id or a synonym, in this order, names of the list before aliases. Lines whose qualifier
    says NOT are left out.

    Args:
        path: the file, 17 columns between tabs; see `read_edge_table`.
        genes: the gene list.
        ontology: what `read_obo` returns, or the file: a gene then has every term above its own too, and ids that were
            replaced are. None takes the terms as they stand in the file.
        relations: which edges of the ontology lead up: "is_a", "part_of" or both.
        aspects: of "P" (biological process), "F" (molecular function) and "C" (cellular component).
        evidence: evidence codes to keep, such as ["EXP", "IDA", "IPI", "IMP", "IGI", "IEP"]; None for all.
        without_evidence: evidence codes to leave out, such as ["IEA", "ND", "IGI"]; the latter stands on genetic
            interactions, which may be what is to be predicted.
        min_genes, max_genes: terms with fewer genes or more are no columns.
        organism: the organism of the gene, by its NCBI taxonomy id (559292 is yeast S288C, 9606 man), or several; lines of
            others are left out. None where all genes that are found are of one.

    Returns:
        Pairs of gene and term; `names` are the terms, ascending, `titles` theirs in the ontology. Left out by reason:
        "negated", "other_evidence", "other_aspect", "other_organism", "obsolete", "unknown_term", "unknown", and "other_size"
        where neither the term nor any above it is a column.

    Raises:
        ValueError: no GAF file, a malformed line, an aspect or code that cannot be, an organism that is in none of its lines,
            or, without `organism`, genes of the list in lines of several.

    Warns:
        UserWarning: lines that name unknown genes.
    """
    require_genes(genes)
    for argument, given, known in (
        ("aspects", aspects, _ASPECTS),
        ("evidence", () if evidence is None else evidence, _EVIDENCE),
        ("without_evidence", without_evidence, _EVIDENCE),
        ("relations", relations, _RELATIONS),
    ):
        require_several(argument, given, f"several of {', '.join(known)}")
        for word in given:
            require_choice(argument, word, known)
    min_genes = count_of("min_genes", min_genes, minimum=1)
    if max_genes is not None:
        max_genes = count_of("max_genes", max_genes, minimum=min_genes)
    if ontology is not None and not isinstance(ontology, Ontology):
        ontology = read_obo(ontology)
    organisms = organisms_of(organism)
    table = Table(path, "\t", header=False, comment="!")
    require(
        len(table.header) == _GAF_COLUMNS,
        f"{table.path}: expected the {_GAF_COLUMNS} columns of a GAF file, got {len(table.header)}",
    )
    frame = table.read(_GAF, optional=("qualifier", "synonyms", "taxon"))
    num_lines = frame.height
    negated = frame["qualifier"].fill_null("").str.to_uppercase().str.split("|").list.contains("NOT").to_numpy()
    other = frame["evidence"].is_in(list(without_evidence))
    if evidence is not None:
        other |= ~frame["evidence"].is_in(list(evidence))
    reasons = {
        "negated": negated,
        "other_evidence": other.to_numpy(),
        "other_aspect": ~frame["aspect"].is_in(list(aspects)).to_numpy(),
    }
    taxon = frame["taxon"].str.extract(r"^taxon:(\d+)", 1)  # a second one is of a host or the like
    if organisms is not None:
        require_organisms(table, organisms, [taxon])
        reasons["other_organism"] = ~taxon.fill_null("").is_in(organisms).to_numpy()
    terms = frame["term"]
    if ontology is not None:
        terms = terms.replace(dict(ontology.replaced))
        reasons["obsolete"] = terms.is_in(list(ontology.obsolete)).to_numpy()
        reasons["unknown_term"] = ~terms.is_in(list(ontology.terms)).to_numpy()
    names = pl.concat_str("symbol", "id", "synonyms", separator="|", ignore_nulls=True)
    frame, aside = set_aside(table, frame.select(gene=names, term=terms, taxon=taxon), reasons)
    found = find_genes(frame, {"gene": ""}, genes, _first_listed(genes))
    named = ~found.unknown
    if organisms is None:
        require_one_organism(table, [frame["taxon"]], named)
    edge_index, columns, held = _memberships(
        found.sets()[0][named],  # one a line
        frame["term"].filter(pl.Series(named)),
        None if ontology is None else ontology.ancestors(relations),
        min_genes,
        max_genes,
    )
    other_size = np.zeros(len(named), dtype=bool)
    other_size[named] = ~held
    _, left_out = leave_out(table, {"unknown": found.unknown, "other_size": other_size})
    members = MembershipTable(
        path=table.path,
        num_lines=num_lines,
        left_out={**aside, **left_out},
        unknown=found.unknown_names,
        by_alias=found.by_alias,
        edge_index=torch.from_numpy(edge_index),
        names=columns,
        titles=None if ontology is None else tuple(ontology.terms.get(term, "") for term in columns),
    )
    warn_of_unknown(members, genes)
    return members


def _first_listed(genes: GeneList) -> Callable[[str], str]:
    """Of the names of a gene between "|" the one to look up: the first in the list, an alias only where there is no name."""
    aliases = genes.aliases

    def rename(text: str) -> str:
        names = text.split("|")
        listed = [name for name in names if name in genes]
        return next((name for name in listed if name not in aliases), (*listed, names[0])[0])

    return rename


def _memberships(
    gene: np.ndarray,
    terms: pl.Series,
    above: Mapping[str, frozenset[str]] | None,
    min_genes: int,
    max_genes: int | None,
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Pairs of gene and term int64 [2, E], each once, ascending; the terms; and which lines are in a pair, bool [lines].

    Args:
        gene: int64 [lines].
        terms: of each line.
        above: term -> itself and those above it; None for itself alone.
    """
    own = terms.unique().to_list()
    of_own = [frozenset([term]) if above is None else above[term] for term in own]
    columns = sorted(frozenset().union(*of_own))
    position = {term: column for column, term in enumerate(columns)}
    size = np.array([*map(len, of_own), 0], dtype=np.int64)
    begin = size.cumsum() - size
    flat = np.array([position[term] for several in of_own for term in sorted(several)], dtype=np.int64)
    number = {term: i for i, term in enumerate(own)}
    line = np.array([number[term] for term in terms.to_list()], dtype=np.int64)
    count = size[line]
    column = flat[each_from(begin[line], count)]
    num_columns = max(len(columns), 1)
    pairs = np.stack(np.divmod(np.unique(gene.repeat(count) * num_columns + column), num_columns))
    num_genes = np.bincount(pairs[1], minlength=len(columns))
    kept = (num_genes >= min_genes) & (num_genes <= (num_genes.max(initial=0) if max_genes is None else max_genes))
    pairs = pairs[:, kept[pairs[1]]]
    held = np.bincount(np.arange(len(line)).repeat(count), weights=kept[column], minlength=len(line)) > 0
    names = tuple(term for term, keep in zip(columns, kept.tolist(), strict=True) if keep)
    return np.stack([pairs[0], (kept.cumsum() - 1)[pairs[1]]]), names, held
