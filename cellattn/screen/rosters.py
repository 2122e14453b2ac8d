"""Genes that a screen is asked for: rosters of names or indices, and what is said of names that do not fit."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .._check import describe, listed, require, require_indices, require_tensor, shown, tensor_of
from ..data._table import Table
from ..genes import GeneList

Roster = GeneList | Sequence[str] | Tensor

_LISTED = 3  # names that a message lists


def read_roster(path: str | PathLike[str]) -> GeneList:
    """The names in a text file, one a line; lines from # on are comments. The file may be compressed.

    Raises:
        ValueError: a name that stands twice, an empty line, a file without names, or a table of several columns.
    """
    table = Table(path, "\t", header=False, comment="#")
    width = len(table.header)
    beside = {str(column): column for column in range(1, width)}  # of no names, behind a tab at the end of each line
    empty = not beside or all(column.is_null().all() for column in table.read(beside, optional=tuple(beside)))
    require(empty, f"{table.path}: expected one name a line, got {width} columns: of a table, cut out that of the names")
    return GeneList._of_table(table, 0)


def gene_indices(names: GeneList, given: Iterable[str], argument: str) -> Tensor:
    """Indices of names or aliases, int64; refuses those that are not in the list, with the nearest that are."""
    if not isinstance(names, GeneList):
        raise TypeError(f"names: expected a GeneList, got {describe(names)}")
    texts = list(given)
    refuse_unknown(names, texts, argument)
    return names.index(texts)


def genes_of(names: GeneList, roster: Roster, argument: str) -> Tensor:
    """Genes of a roster, int64 [R], ascending."""
    roster = tensor_of(roster)
    if isinstance(roster, Tensor):
        require_tensor(argument, roster, ndim=1, dtypes=(torch.int64,))
        require_indices(argument, roster, len(names))
        found = roster.cpu()
        texts = [names[gene] for gene in found.tolist()]
    else:
        if isinstance(roster, str) or not isinstance(roster, Iterable):
            raise TypeError(f"{argument}: expected several gene names or an int64 tensor, got {describe(roster)}")
        texts = list(roster)
        found = gene_indices(names, texts, argument)
    if len(found.unique()) < len(found):
        counts = Counter(found.tolist())
        again = [names[gene] for gene, count in counts.items() if count > 1]
        given = {text for text, gene in zip(texts, found.tolist(), strict=True) if counts[gene] > 1} - set(again)
        also = f" (also as {listed(sorted(given), _LISTED)})" if given else ""
        raise ValueError(
            f"{argument}: {listed(again, _LISTED)} {'stands' if len(again) == 1 else 'stand'} more than once{also}"
        )
    return found.sort().values


def refuse_unknown(names: GeneList, texts: Iterable[Any], argument: str) -> None:
    """Refuse names that are not in the list, naming them with the nearest that are."""
    for text in (unknown := sorted({text for text in texts if text not in names}, key=str)):
        if not isinstance(text, str):
            raise TypeError(f"{argument}: expected gene names, got {describe(text)}")
    if unknown:
        known = [*names, *names.aliases]
        near = [(text, difflib.get_close_matches(text[:80], known, n=1, cutoff=0.4)) for text in unknown[:_LISTED]]
        told = ", ".join(shown(text) + (f" (nearest: {found[0]!r})" if found else "") for text, found in near)
        more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
        raise ValueError(f"{argument}: {len(unknown)} of its names are not in the gene list: {told}{more}")
