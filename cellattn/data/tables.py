"""What readers return: edges, pairs of a gene and something else, measured sets; and what of the file is not among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .._check import require_choice, shown
from .genes import GeneList

_WHY = {
    "unknown": "lines left out that name {genes}: {names}",
    "missing": "lines left out whose number is missing",
    "repeated": "lines left out that name a gene twice",
    "below_threshold": "below the threshold",
    "other_system": "lines left out of other experimental systems",
    "other_organism": "lines left out of other organisms",
    "other_mutants": "lines left out of other mutants",
    "above_p_value": "lines left out above the p-value",
    "negated": "lines left out that say NOT",
    "other_evidence": "lines left out of other evidence",
    "other_aspect": "lines left out of other aspects",
    "unknown_term": "lines left out whose term is not in the ontology",
    "obsolete": "lines left out whose term is obsolete",
    "other_size": "lines left out whose terms have too few genes or too many",
    "other_type": "lines left out of other features",
    "other_source": "lines left out of other sources",
}


def _bare(name: str) -> str:
    """A name without quotes, but for one that is long, or has spaces around that nobody would see."""
    text = shown(name)
    return name if name and text == repr(name) and name.isprintable() and name == name.strip() else text


@dataclass(frozen=True, eq=False, kw_only=True)
class Lines:
    """Which lines of a file were left out of a table, and why."""

    path: Path
    num_lines: int
    left_out: Mapping[str, Tensor] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)
    by_alias: Mapping[str, str] = field(default_factory=dict)

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

    def _found(self) -> str:
        """What is in the table, in a few words."""
        raise NotImplementedError

    def report(self) -> str:
        """Counts of lines, of what was found in them, and of the lines left out, with the first of them, on one line."""
        names = [f"{_bare(name)} ({count})" for name, count in list(self.unknown.items())[:5]]
        names += ["..."] if len(self.unknown) > 5 else []
        genes = f"{len(self.unknown)} unknown {'gene' if len(self.unknown) == 1 else 'genes'}"
        parts = [f"{self.path}: {self.num_lines} lines, {self._found()}"]
        for reason, lines in self.left_out.items():
            if len(lines):
                first = ", ".join(map(str, lines[:3].tolist())) + (", ..." if len(lines) > 3 else "")
                why = _WHY[reason].format(genes=genes, names=", ".join(names))
                parts.append(f"{len(lines)} {why} [{'line' if len(lines) == 1 else 'lines'} {first}]")
        return "; ".join(parts)


@dataclass(frozen=True, eq=False, kw_only=True)
class EdgeTable(Lines):
    """Edges of one relation, as the file holds them.

    Attributes:
        path: the file.
        edge_index: int64 [2, E], sources and targets.
        weight: float32 [E], or None for a table without weights.
        num_lines: lines of the file, without the header and comments: E and those left out.
        left_out: reason -> int64, the lines of the file that were left out for it, counted from 1, ascending: "unknown"
            where they name a gene outside the list, "missing" where they have no weight, "below_threshold" where their score
            is under the threshold, or 0 in this channel, "other_system" and "other_organism" where they are of an experimental
            system or an organism that was not asked for. A line stands under the first reason alone.
        unknown: name outside the list -> lines that name it, most frequent first.
        by_alias: other name in the file -> the gene of the list that it was taken for.
    """

    edge_index: Tensor
    weight: Tensor | None

    @property
    def num_below_threshold(self) -> int:
        """Lines left out since their score is under the threshold, or 0 in this channel."""
        return self._count("below_threshold")

    def merged(self, duplicates: str) -> tuple[Tensor, Tensor | None, int]:
        """Each edge once, where lines repeat it; A to B and B to A are two.

        Args:
            duplicates: what becomes of the weights of a repeated pair: "max", "mean" or "sum"; or "error", which refuses a pair
                whose lines differ in weight.

        Returns:
            edge_index int64 [2, E'], ascending; weight float32 [E'], or None; how many edges were there before.

        Raises:
            ValueError: an unknown word, or "error" and a pair with two weights.
        """
        require_choice("duplicates", duplicates, ("max", "mean", "sum", "error"))
        pairs, inverse = self.edge_index.unique(dim=1, return_inverse=True)
        num_repeated = self.edge_index.shape[1] - pairs.shape[1]
        if self.weight is None:
            return pairs, None, num_repeated
        weight = self.weight.double()
        highest, lowest = (
            torch.zeros(pairs.shape[1], dtype=torch.float64).scatter_reduce_(0, inverse, weight, how, include_self=False)
            for how in ("amax", "amin")
        )
        if duplicates == "error":
            differ = (highest != lowest).nonzero()
            if len(differ):
                at = int(differ[0])
                raise ValueError(
                    f"{self.path}: {len(differ)} pairs have lines with different weights, genes {tuple(pairs[:, at].tolist())} "
                    f"from {float(lowest[at]):g} to {float(highest[at]):g}"
                )
        if duplicates in ("max", "error"):
            return pairs, highest.float(), num_repeated
        total = torch.zeros_like(highest).index_add_(0, inverse, weight)  # in float64: no order of lines shows
        total = total / inverse.bincount(minlength=len(total)) if duplicates == "mean" else total
        return pairs, total.float(), num_repeated

    def _found(self) -> str:
        return f"{self.edge_index.shape[1]} edges"


@dataclass(frozen=True, eq=False, kw_only=True)
class MembershipTable(Lines):
    """Pairs of a gene and something that genes belong to: a term, a complex, a reaction; or of a reaction and its metabolite.

    Attributes:
        path: the file.
        edge_index: int64 [2, E], genes (or positions in `rows`) and positions in `names`; each pair once, ascending.
        names: M names, of terms, reactions or metabolites.
        rows: the names of what has them, where that is no gene; or None.
        weight: float32 [E], not negative, or None.
        titles: M titles to show, where the file has them, or None.
        num_lines: lines of the file, without comments; of a metabolic model, the genes of its rules.
        left_out: reason -> int64, the lines that were left out for it, as in `EdgeTable`; the reader names the reasons.
        unknown: name outside the list -> lines that name it, most frequent first.
        by_alias: other name in the file -> the gene of the list that it was taken for.
    """

    edge_index: Tensor
    names: tuple[str, ...]
    titles: tuple[str, ...] | None = None
    rows: tuple[str, ...] | None = None
    weight: Tensor | None = None

    def _found(self) -> str:
        num_rows, kind = self.edge_index[0].unique().numel(), "genes" if self.rows is None else "rows"
        return f"{self.edge_index.shape[1]} pairs of {num_rows} {kind} and {len(self.names)} others"


@dataclass(frozen=True, eq=False, kw_only=True)
class InteractionTable(Lines):
    """Measured sets of perturbed genes, as the file holds them: a set that was measured twice stands twice.

    Attributes:
        path: the file.
        genes: the gene list that the indices refer to.
        seeds: int64 [nnz], genes of all sets, one set after the other.
        ptr: int64 [B + 1], where each set begins in `seeds`.
        score: float32 [B].
        split: the split column, one string a set, or None.
        p_value: float32 [B], NaN where there is none, or None for a table without.
        types: int64 [nnz], what was done to each gene, positions in `PERTURBATION_TYPES`, or None where the file does not say.
        num_lines: lines of the file, without the header and comments: B and those left out.
        left_out: reason -> int64, the lines of the file that were left out for it, counted from 1, ascending: "unknown"
            where they name a gene outside the list, "missing" where they have no score, "repeated" where they name a gene
            twice, "other_mutants" and "above_p_value" where those were asked for. A line stands under the first reason alone.
        unknown: name outside the list -> lines that name it, most frequent first.
        by_alias: other name in the file -> the gene of the list that it was taken for.
    """

    genes: GeneList
    seeds: Tensor
    ptr: Tensor
    score: Tensor
    split: tuple[str, ...] | None
    p_value: Tensor | None = None
    types: Tensor | None = None

    @property
    def num_repeated_lines(self) -> int:
        """Lines left out since they name a gene twice."""
        return self._count("repeated")

    def _found(self) -> str:
        return f"{len(self.score)} sets"
