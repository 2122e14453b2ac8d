"""Filters and what data say of a set, held to their definitions set by set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from cellattn.data import GeneList, PerturbationDataset
from cellattn.screen import (
    DistanceFilter,
    LabelFilter,
    MeasuredSets,
    PairFilter,
    SetSpace,
    UnmeasuredFilter,
    filters,
    support,
)
from cellattn.screen.sets import Filter

N = 10
NAMES = GeneList([f"G{i}" for i in range(N)], aliases={"alpha": "G3"})
PAIRS = torch.tensor([[0, 1], [3, 1], [0, 3], [5, 4], [4, 5], [8, 2], [2, 9], [8, 9], [0, 9], [7, 1]])
LISTED = {frozenset(pair) for pair in PAIRS.tolist()}
LABELS = {"G0": "a", "G1": ["a", "b"], "alpha": "b", "G4": "c", "G5": ["d", "c", "a"], "G6": "e", "G9": []}
POSITION = {"G0": ("I", 100), "G1": ("I", 160), "G2": ("II", 100), "alpha": ("I", 220), "G5": ("II", 10), "G6": ("II", 101)}
MEASURED = [[0, 1], [1, 0], [2, 5, 7], [3], [4, 8, 9, 1], [], [1, 2, 3, 4, 5, 6], [9], [7, 2], [0, 1, 2]]


def data(sets: Sequence[Sequence[int]] = MEASURED) -> PerturbationDataset:
    y = torch.linspace(-1, 2, len(sets))
    return PerturbationDataset.from_sets(sets, torch.stack([y, 10 * y], 1), num_genes=N)


def pairs_of(s: Sequence[int]) -> list[frozenset[int]]:
    return [frozenset(pair) for pair in itertools.combinations(s, 2)]


def bound(s: Sequence[int]) -> bool:
    return all(pair <= set(s) or not pair & set(s) for pair in LISTED)


def labels_of(gene: int) -> set[str]:
    given: Any = {NAMES.get(name): label for name, label in LABELS.items()}.get(gene, [])
    return {given} if isinstance(given, str) else set(given)


def far(a: int, b: int) -> bool:
    of = {NAMES.get(name): place for name, place in POSITION.items()}
    return a not in of or b not in of or of[a][0] != of[b][0] or abs(of[a][1] - of[b][1]) >= 60


FILTERS: dict[str, tuple[Callable[[], Filter], Callable[[tuple[int, ...]], bool]]] = {
    "none": (lambda: PairFilter(NAMES, PAIRS), lambda s: not any(p in LISTED for p in pairs_of(s))),
    "any": (lambda: PairFilter(NAMES, PAIRS, which="any"), lambda s: any(p in LISTED for p in pairs_of(s))),
    "all": (lambda: PairFilter(NAMES, PAIRS, which="all"), lambda s: all(p in LISTED for p in pairs_of(s))),
    "bound": (lambda: PairFilter(NAMES, PAIRS, which="bound"), bound),
    "no pair": (lambda: PairFilter(NAMES, PAIRS[:0]), lambda s: True),
    "labels": (
        lambda: LabelFilter(NAMES, LABELS),
        lambda s: not any(labels_of(a) & labels_of(b) for a, b in itertools.combinations(s, 2)),
    ),
    "no labels": (lambda: LabelFilter(NAMES, {}), lambda s: True),
    "distance": (
        lambda: DistanceFilter(NAMES, POSITION, distance=60),
        lambda s: all(far(a, b) for a, b in itertools.combinations(s, 2)),
    ),
    "unmeasured": (
        lambda: UnmeasuredFilter(MeasuredSets.of(data())),
        lambda s: set(s) not in [set(members) for members in MEASURED],
    ),
}


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("name", FILTERS)
def test_filters(name: str, order: int) -> None:
    make, stays = FILTERS[name]
    f = make()
    want = [s for s in itertools.combinations(range(N), order) if stays(s)]
    space = SetSpace.combinations(NAMES, order, filters=[f])
    block = space.block(0, space.total)
    assert sorted(map(tuple, block.genes.tolist())) == want
    assert torch.equal(space.rank_of(block.genes), block.rank)
    turned = torch.tensor(list(itertools.permutations(range(N), order)))  # genes of a set in any order
    got = f(turned, None)
    assert got.dtype == torch.bool
    assert got.tolist() == [stays(tuple(s)) for s in turned.tolist()]


def test_without_a_table_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    genes = torch.tensor(list(itertools.permutations(range(N), 3)))
    for which, pairs in itertools.product(filters.WHICH, (PAIRS, PAIRS[:5])):  # of the last genes, and none of them
        want = PairFilter(NAMES, pairs, which=which)(genes)
        with monkeypatch.context() as patch:
            patch.setattr(filters, "_DENSE", 0)
            assert torch.equal(PairFilter(NAMES, pairs, which=which)(genes), want), which


def test_filters_together_and_by_ranges() -> None:
    space = SetSpace.combinations(
        NAMES, 3, types=["deleted", "added"], filters=[PairFilter(NAMES, PAIRS), LabelFilter(NAMES, LABELS)]
    )
    whole = space.block(0, space.total)
    assert 0 < len(whole.rank) < space.total
    sets = space.set_of(whole.rank)
    assert whole.types is not None
    assert sets.types is not None
    assert torch.equal(whole.genes, sets.genes)
    assert torch.equal(whole.types, sets.types)
    parts = [space.block(begin, min(begin + 97, space.total)) for begin in range(0, space.total, 97)]
    for place in range(3):
        columns = [part[place] for part in parts]
        assert torch.equal(torch.cat(columns), whole[place])  # type: ignore[arg-type]
    genes = {frozenset(s) for s in whole.genes.tolist()}
    alone = [SetSpace.combinations(NAMES, 3, filters=[f]).block(0, 120).genes.tolist() for f in space.filters]
    assert genes == set(map(frozenset, alone[0])) & set(map(frozenset, alone[1]))


def test_descriptions_tell_filters_apart() -> None:
    made = [
        *(make() for make, _ in FILTERS.values()),
        PairFilter(NAMES, PAIRS[1:]),
        LabelFilter(NAMES, {"G0": "a"}),
        DistanceFilter(NAMES, POSITION, distance=61),
        DistanceFilter(NAMES, {**POSITION, "G2": ("II", 99)}, distance=60),
        UnmeasuredFilter(MeasuredSets.of(data(MEASURED[2:]))),
    ]
    texts = [repr(f.describe()) for f in made]
    assert len(set(texts)) == len(texts)
    assert PairFilter(NAMES, PAIRS.flip(0, 1)).describe() == PairFilter(NAMES, PAIRS).describe()
    by_name = [(NAMES[a], NAMES[b]) for a, b in PAIRS.tolist()]
    assert PairFilter(NAMES, by_name).describe() == PairFilter(NAMES, PAIRS).describe()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairFilter(NAMES, [("G1", "G1")]), "'G1' is paired with itself"),
        (lambda: PairFilter(NAMES, [("G1", "G11")]), r"'G11' \(nearest: 'G1'\)"),
        (lambda: PairFilter(NAMES, torch.tensor([[0, N]])), "pairs"),
        (lambda: PairFilter(NAMES, torch.tensor([[0, 1, 2]])), "pairs"),
        (lambda: PairFilter(NAMES, PAIRS, which="some"), "which"),
        (lambda: LabelFilter(NAMES, {"alfa": "x"}), r"'alfa' \(nearest: 'alpha'\)"),
        (lambda: DistanceFilter(NAMES, POSITION, distance=-1), "distance"),
        (lambda: DistanceFilter(NAMES, {"H": ("I", 1)}, distance=1), "position"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelFilter(NAMES, {"G1": 3}), "labels"),  # type: ignore[dict-item]
        (lambda: LabelFilter(NAMES, ["G1"]), "labels"),  # type: ignore[arg-type]
        (lambda: DistanceFilter(NAMES, {"G1": ("I", 1.5)}, distance=1), "position"),  # type: ignore[dict-item]
        (lambda: PairFilter(NAMES, ["G1"]), "pairs"),  # type: ignore[list-item]
        (lambda: UnmeasuredFilter(data()), "measured"),  # type: ignore[arg-type]
    ],
)
def test_wrong_types(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_support(order: int) -> None:
    genes = torch.tensor(list(itertools.permutations(range(N), order)))
    want = [[sum(len(set(s) & set(m)) == j for m in MEASURED) for j in range(1, order + 1)] for s in genes.tolist()]
    got = support(genes, data())
    assert got.dtype == torch.int64
    assert got.tolist() == want
    assert support(genes[:0], MeasuredSets.of(data())).shape == (0, order)
    assert support(genes, data([[]])).tolist() == [[0] * order] * len(genes)


def test_measured() -> None:
    measured = MeasuredSets.of(data())
    assert len(measured) == len(MEASURED)
    assert measured.holds(torch.tensor([[1, 0], [0, 1], [0, 2], [7, 2]])).tolist() == [True, True, False, True]
    assert measured.holds(torch.tensor([[3], [4]])).tolist() == [True, False]
    assert measured.outside(torch.tensor([-1.01, -1, 2, 2.01])).tolist() == [True, False, False, True]
    assert measured.outside(torch.tensor([-1.01, 2.01, 20.1]), phenotype=1).tolist() == [False, False, True]


def test_measured_among_many_genes() -> None:
    """As many as are taken: a set is told from one that differs by one place in its first gene, or its last."""
    n = int(2 ** (63 / 4))
    ends = [0, 1, n // 2, n // 2 + 1, n - 4, n - 3, n - 2, n - 1]
    for k in range(1, 5):
        sets = list(itertools.combinations(ends, k))
        held = sets[::2]
        seeds, ptr = torch.tensor(held).flatten(), torch.arange(len(held) + 1) * k
        measured = MeasuredSets(seeds, ptr, num_genes=n)
        genes = torch.tensor(sets)
        assert measured.holds(genes).tolist() == [s in held for s in sets]
        shared = [[sum(len(set(s) & set(m)) == j for m in held) for j in range(1, k + 1)] for s in sets]
        assert measured.support(genes).tolist() == shared
    with pytest.raises(ValueError, match=f"num_genes: expected at most {n}"):
        MeasuredSets(torch.tensor([0]), torch.tensor([0, 1]), num_genes=n + 1)


def test_refused_measured() -> None:
    measured = MeasuredSets.of(data())
    with pytest.raises(ValueError, match="genes"):
        measured.support(torch.tensor([[0, N]]))
    with pytest.raises(ValueError, match="phenotype"):
        measured.outside(torch.zeros(1), phenotype=2)
    with pytest.raises(ValueError, match="no measured values"):
        MeasuredSets.of(data(), phenotypes=False).outside(torch.zeros(1))
    seeds, ptr = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3])
    for y in (torch.zeros(3), torch.zeros(1)):
        with pytest.raises(ValueError, match="y: expected a value for each of 2 sets"):
            MeasuredSets(seeds, ptr, num_genes=N, y=y)
    with pytest.raises(ValueError, match="twice"):
        MeasuredSets(torch.tensor([1, 1]), torch.tensor([0, 2]), num_genes=3)
    with pytest.raises(TypeError, match="dataset"):
        MeasuredSets.of("data")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="too many subsets"):
        MeasuredSets(torch.arange(40), torch.tensor([0, 40]), num_genes=40)
