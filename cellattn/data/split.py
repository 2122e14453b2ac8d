"""Splits that say how far a model generalises, and what leaks from one part into another.

All kinds are one procedure over other units. Units (sets, query pairs, genes or pairs of genes) are put in a random order,
and cut into those of test, of validation and of training. A sample is in the part that all its units are of, and left out
where they are of several.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._check import count_of, describe, number_of, require, require_choice, require_tensor, seed_of
from .._modes import without_function_modes
from .dataset import PerturbationDataset, as_tensor

KINDS = ("random", "query-pair-disjoint", "gene-disjoint", "new-combination")
PARTS = ("train", "validation", "test")


@without_function_modes
def split(
    dataset: PerturbationDataset,
    kind: str,
    *,
    test: float = 0.2,
    validation: float = 0.1,
    seed: int = 0,
    max_seen: int = 0,
) -> dict[str, Tensor]:
    """Cut a dataset into parts for training, validation and test.

    | kind | what no test set shares with those of training and validation | left out |
    |---|---|---|
    | "random" | all its genes: a set that was measured twice is in one part | none |
    | "query-pair-disjoint" | its query pair: its first two genes, in the order of the dataset, or all if it has fewer | none |
    | "gene-disjoint" | any gene, but `max_seen` | sets with genes of two parts |
    | "new-combination" | any pair of genes, though training has seen each of its genes | sets with pairs of two parts |

    Nor does a validation set share that with the training sets.

    Args:
        dataset: B samples.
        kind: one of the table.
        test: share of the test part among the samples that are not left out, above 0.
        validation: share of the validation part.
        seed: of the random order; the same seed gives the same split.
        max_seen: for "gene-disjoint", genes of a test set that may be seen, of which at least one is not.

    Returns:
        "train", "validation" and "test" to positions int64, ascending. Shares come as close as whole units let them, one step
        of which is one set, query pair, gene or pair with all its samples; "new-combination" then takes the sets that hold a
        gene which training has not seen out of test and validation. `leakage` says what they are.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an unknown kind, shares out of range, or a part that comes out empty.
    """
    _require_dataset(dataset)
    require_choice("kind", kind, KINDS)
    test, validation = number_of("test", test), number_of("validation", validation)
    require(0 < test < 1, f"test: expected a share above 0 and below 1, got {test}")
    require(0 <= validation < 1 - test, f"validation: expected a share of 0 or more, below 1 - test, got {validation}")
    seed = seed_of("seed", seed)
    max_seen = count_of("max_seen", max_seen)
    require(max_seen == 0 or kind == "gene-disjoint", f"max_seen: is for kind 'gene-disjoint', got {max_seen} for {kind!r}")

    members = _members(dataset)
    if kind == "random":
        units = _numbered(members.sort(1).values)[:, None]
    elif kind == "query-pair-disjoint":
        units = _query_pairs(members)[:, None]
    else:
        units = members if kind == "gene-disjoint" else _pairs(members, dataset.num_genes)
    known, number = units.unique(return_inverse=True)
    has_none = int(len(known) > 0 and known[0] < 0)  # -1 fills up rows
    number = number - has_none
    order = torch.randperm(len(known) - has_none, generator=torch.Generator().manual_seed(seed))
    part = _dealt(_Places.of(number, order, max_seen), len(order), test, validation)
    if kind == "new-combination":
        seen = _seen(members[part == 0], dataset.num_genes)
        part[(part > 0) & ~seen[members].all(1)] = -1
    parts = {name: (part == code).nonzero()[:, 0] for code, name in enumerate(PARTS)}
    for name, share in (("train", 1.0), ("validation", validation), ("test", test)):
        require(len(parts[name]) > 0 or share == 0, f"dataset: no sample is left for {name!r} in a split of kind {kind!r}")
    return parts


class _Places(NamedTuple):
    """Where the units of each sample stand in the random order; one past the last where it has none."""

    first: Tensor  # int64 [B]; a sample is of the training part from here on down
    enough: Tensor  # int64 [B]; of the part of the units up to here

    @classmethod
    def of(cls, number: Tensor, order: Tensor, max_seen: int) -> _Places:
        place = torch.cat([order, torch.tensor([len(order)])])[number].sort(1).values  # -1 is the last
        size = (number >= 0).sum(1)
        if place.shape[1] == 0:
            return cls(*[torch.full((len(number),), len(order))] * 2)
        return cls(place[:, 0], place.gather(1, (size - max_seen).clamp(min=1)[:, None] - 1)[:, 0])


def _dealt(places: _Places, num_units: int, test: float, validation: float) -> Tensor:
    """The part of each sample, a position in `PARTS`, or -1: by the two places at which the order is cut."""
    first, enough = places

    def below(x: Tensor) -> Tensor:
        """How many entries are below 0, 1, ..., num_units: int64 [num_units + 1]."""
        return torch.cat([x.new_zeros(1), x.bincount(minlength=num_units + 1).cumsum(0)[:-1]])

    def second_cut(cut: int) -> tuple[int, float]:
        """Given the first: where the validation units end, and the share of the test part then."""
        rest = first >= cut
        validated, trained = below(enough[rest]), int(rest.sum()) - below(first[rest])  # by where the validation units end
        share = validated / (validated + trained).clamp(min=1)
        away = (share - validation / (1 - test)).abs()
        away[:cut] = 2
        away[trained == 0] = 2
        end = max(int(away.argmin()), cut) if validation > 0 else cut
        tested = int((enough < cut).sum())
        kept = tested + int(validated[end]) + int(trained[end])
        return end, tested / max(kept, 1)

    cuts = range(num_units + 1)
    right = bisect_left(cuts, test, key=lambda cut: second_cut(cut)[1])
    cut = min((c for c in (right - 1, right) if 0 <= c <= num_units), key=lambda c: abs(second_cut(c)[1] - test))
    end, _ = second_cut(cut)
    part = torch.full_like(first, -1)
    part[(first >= cut) & (enough < end)] = 1
    part[first >= end] = 0
    part[enough < cut] = 2
    return part


@without_function_modes
def leakage(
    dataset: PerturbationDataset, parts: Mapping[str, Tensor | np.ndarray | Sequence[int]]
) -> dict[str, dict[str, int]]:
    """What validation has seen in training, and test in training and validation, in numbers of samples.

    Args:
        dataset: B samples.
        parts: as `split` returns them; or any with these names, of which no two share a sample: tensors, arrays or lists.

    Returns:
        Under "train", "validation" and "test": "samples"; for the latter two also "same set" (its genes were seen together, and
        no others with them), "query pair seen" (as the first two genes of a set), "some pair seen" (within a set), "every gene
        seen" and "no gene seen". Under "left out": "samples".

    Raises:
        TypeError, ValueError: parts that are no positions in the dataset, or share one.
    """
    _require_dataset(dataset)
    if not isinstance(parts, Mapping) or set(parts) != set(PARTS):
        raise ValueError(f"parts: expected positions for {', '.join(PARTS)}, got {describe(parts)}")
    at = {name: as_tensor(f"parts[{name!r}]", parts[name]) for name in PARTS}
    taken = torch.zeros(len(dataset), dtype=torch.int64)
    for name in PARTS:
        require_tensor(f"parts[{name!r}]", at[name], ndim=1, dtypes=(torch.int64,))
        inside = ((at[name] >= 0) & (at[name] < len(dataset))).all()
        require(bool(inside), f"parts[{name!r}]: expected positions in [0, {len(dataset)})")
        taken += at[name].bincount(minlength=len(dataset))
    require(not (taken > 1).any(), lambda: f"parts: sample {int((taken > 1).nonzero()[0])} stands in them more than once")

    members = _members(dataset)
    sets, queries, pairs = _numbered(members.sort(1).values), _query_pairs(members), _pairs(members, dataset.num_genes)
    counts = {name: {"samples": len(at[name])} for name in PARTS}
    before = at["train"]
    for name in PARTS[1:]:
        here = at[name]
        of_part = members[here]
        known = _seen(members[before], dataset.num_genes)[of_part]
        seen_pairs = torch.isin(pairs[here], pairs[before]) & (pairs[here] >= 0)
        counts[name] |= {
            "same set": int(torch.isin(sets[here], sets[before]).sum()),
            "query pair seen": int(torch.isin(queries[here], queries[before]).sum()),
            "some pair seen": int(seen_pairs.any(1).sum()),
            "every gene seen": int(known.all(1).sum()),
            "no gene seen": int((~known | (of_part < 0)).all(1).sum()),
        }
        before = torch.cat([before, here])
    return {**counts, "left out": {"samples": int((taken == 0).sum())}}


# ------------------------------------------------------------------------------------------------------- units


def _members(dataset: PerturbationDataset) -> Tensor:
    """Genes of each sample in their order, int64 [B, most genes of a set], filled up with -1."""
    sizes = dataset.ptr.diff()
    place = torch.arange(len(dataset.seeds)) - dataset.ptr[:-1].repeat_interleave(sizes)
    members = torch.full((len(sizes), int(sizes.max()) if len(sizes) else 0), -1)
    members[torch.arange(len(sizes)).repeat_interleave(sizes), place] = dataset.seeds
    return members


def _query_pairs(members: Tensor) -> Tensor:
    """A number for the first two genes of each sample: int64 [B]."""
    return _numbered(members[:, :2].sort(1).values)


def _numbered(rows: Tensor) -> Tensor:
    """A number for each row, the same for equal rows: int64 [B]."""
    number = torch.zeros(len(rows), dtype=torch.int64)
    for column in rows.unbind(1):
        number = (number * (int(rows.max()) + 2) + column + 1).unique(return_inverse=True)[1]
    return number


def _pairs(members: Tensor, num_genes: int) -> Tensor:
    """A number for every pair of genes of each sample, int64 [B, pairs], filled up with -1."""
    columns = members.unbind(1)
    codes = [
        torch.where((a >= 0) & (b >= 0), torch.minimum(a, b) * num_genes + torch.maximum(a, b), -1)
        for a, b in combinations(columns, 2)
    ]
    return torch.stack(codes, 1) if codes else members[:, :0]


def _seen(members: Tensor, num_genes: int) -> Tensor:
    """Whether each gene is in a set, bool [N + 1]: the last, which -1 asks for, always is."""
    seen = torch.zeros(num_genes + 1, dtype=torch.bool)
    seen[members.flatten()] = True
    seen[-1] = True
    return seen


def _require_dataset(dataset: Any) -> None:
    if not isinstance(dataset, PerturbationDataset):
        raise TypeError(f"dataset: expected a PerturbationDataset, got {describe(dataset)}")
    require(len(dataset) > 0, "dataset: expected at least one sample, got none")
