"""Splits keep their promise, sample by sample, and leakage is counted."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from cellattn.data import PerturbationDataset, leakage, split
from cellattn.data.split import KINDS, PARTS

N = 60


def triples(num: int = 4000, seed: int = 0) -> PerturbationDataset:
    """Triples of 12 query pairs and any third gene, pairs, singles and an empty set; many are there twice."""
    g = torch.Generator().manual_seed(seed)
    queries = torch.randperm(N, generator=g)[:24].view(12, 2)
    sets: list[list[int]] = [[]]
    for _ in range(num):
        size = int(torch.randint(1, 4, (1,), generator=g))
        query = queries[int(torch.randint(12, (1,), generator=g))].tolist()
        others = [gene for gene in torch.randperm(N, generator=g)[:4].tolist() if gene not in query]
        sets.append(query + others[:1] if size == 3 else others[:size])
    return PerturbationDataset.from_sets(sets, torch.zeros(len(sets)), num_genes=N)


def pairs(num: int = 5000, seed: int = 1) -> PerturbationDataset:
    g = torch.Generator().manual_seed(seed)
    sets = [torch.randperm(N, generator=g)[:2].tolist() for _ in range(num)]
    return PerturbationDataset.from_sets(sets, torch.zeros(num), num_genes=N)


def sets_of(data: PerturbationDataset, at: torch.Tensor) -> list[tuple[int, ...]]:
    ends = data.ptr.tolist()
    return [tuple(data.seeds[ends[b] : ends[b + 1]].tolist()) for b in at.tolist()]


def pairs_in(sets: list[tuple[int, ...]]) -> set[frozenset[int]]:
    return {frozenset(pair) for s in sets for pair in combinations(s, 2)}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [pairs, triples])
def test_promises(make: Any, kind: str, seed: int) -> None:
    data = make()
    parts = split(data, kind, seed=seed)
    assert tuple(parts) == PARTS
    at = torch.cat(list(parts.values()))
    assert len(at.unique()) == len(at)
    assert all((x.diff() > 0).all() for x in parts.values())
    if kind in ("random", "query-pair-disjoint"):
        assert len(at) == len(data)
    train, validation, test = (sets_of(data, parts[name]) for name in PARTS)
    for before, here in ((train, validation), (train + validation, test)):
        genes = {gene for s in before for gene in s}
        if kind == "random":
            assert not {frozenset(s) for s in before} & {frozenset(s) for s in here}
        elif kind == "query-pair-disjoint":
            assert not {frozenset(s[:2]) for s in before} & {frozenset(s[:2]) for s in here}
        elif kind == "gene-disjoint":
            assert not genes & {gene for s in here for gene in s}
        else:
            assert not pairs_in(before) & pairs_in(here)
            assert {gene for s in here for gene in s} <= {gene for s in train for gene in s}
            assert all(len(s) > 1 for s in here)


@pytest.mark.parametrize("kind", ["random", "query-pair-disjoint", "gene-disjoint", "new-combination"])
def test_sizes(kind: str) -> None:
    """Shares of what is kept, as near as a unit: here of at most 1 / 30 of the samples (2 of 60 genes, as a pair has two)."""
    for test, validation in ((0.2, 0.1), (0.5, 0.2), (0.1, 0.0)):
        parts = split(pairs(), kind, test=test, validation=validation)
        kept = sum(map(len, parts.values()))
        tolerance = 1 / 30 if kind == "gene-disjoint" else 0.005
        assert abs(len(parts["test"]) / kept - test) <= tolerance
        assert abs(len(parts["validation"]) / kept - validation) <= tolerance


@pytest.mark.parametrize("number", range(4, 14))
def test_shares_are_the_nearest(number: int) -> None:
    """Of so few samples, no two alike, one more or one less shows; validation has its share of what test leaves."""
    data = PerturbationDataset.from_sets([[gene] for gene in range(number)], torch.zeros(number), num_genes=number)
    for test, validation in ((0.2, 0.1), (0.29, 0.3), (0.5, 0.25), (0.4, 0.0)):
        if min(number * test, number * validation or 1) < 0.6:
            continue  # a part would come out empty, which is refused
        parts = {name: len(at) for name, at in split(data, "random", test=test, validation=validation).items()}
        assert sum(parts.values()) == number
        tested = min(abs(n / number - test) for n in range(number + 1))
        assert abs(parts["test"] / number - test) <= tested + 1e-12
        rest, share = number - parts["test"], validation / (1 - test)
        validated = min(abs(n / rest - share) for n in range(rest))
        assert abs(parts["validation"] / rest - share) <= validated + 1e-12


@pytest.mark.parametrize("max_seen", [1, 2])
def test_some_genes_seen(max_seen: int) -> None:
    data = triples()
    parts = split(data, "gene-disjoint", max_seen=max_seen)
    train, validation, test = (sets_of(data, parts[name]) for name in PARTS)
    for before, here in ((train, validation), (train + validation, test)):
        genes = {gene for s in before for gene in s}
        seen = [sum(gene in genes for gene in s) for s in here]
        assert max(seen) == max_seen
        assert all(number < len(s) for number, s in zip(seen, here, strict=True))


def test_seeds() -> None:
    data = pairs(500)
    for kind in KINDS:
        first, again, other = (split(data, kind, seed=seed)["test"].tolist() for seed in (3, 3, 4))
        assert first == again != other


def test_leakage() -> None:
    sets = [[0, 1, 2], [3], [], [0, 1, 4], [2, 1, 0], [3, 5], [6, 7], [6, 8], [1, 2, 9]]
    data = PerturbationDataset.from_sets(sets, torch.zeros(len(sets)), num_genes=10)
    parts = {"train": torch.tensor([0, 1]), "validation": torch.tensor([3, 4]), "test": torch.tensor([5, 6, 8])}
    assert leakage(data, parts) == {
        "train": {"samples": 2},
        "validation": {
            "samples": 2, "same set": 1, "query pair seen": 1, "some pair seen": 2, "every gene seen": 1, "no gene seen": 0
        },
        "test": {
            "samples": 3, "same set": 0, "query pair seen": 1, "some pair seen": 1, "every gene seen": 0, "no gene seen": 1
        },
        "left out": {"samples": 2},
    }  # fmt: skip


@pytest.mark.parametrize("gene", [0, 4])
def test_leakage_of_one_gene(gene: int) -> None:
    """The first gene of all is one as the others are, also beside sets of other sizes."""
    data = PerturbationDataset.from_sets([[gene, 1], [gene, 2], [2, 3], [3]], torch.zeros(4), num_genes=5)
    at = torch.arange(4)
    found = leakage(data, {"train": at[:1], "validation": at[3:], "test": at[1:3]})
    assert found["test"] == {
        "samples": 2, "same set": 0, "query pair seen": 0, "some pair seen": 0, "every gene seen": 0, "no gene seen": 0
    }  # fmt: skip
    assert found["validation"]["no gene seen"] == 1
    without = leakage(data, {"train": at[:1], "validation": at[3:3], "test": at[1:3]})
    assert (without["test"]["every gene seen"], without["test"]["no gene seen"]) == (0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_leakage_of_splits(kind: str) -> None:
    data = triples()
    counts = leakage(data, split(data, kind))
    for part in ("validation", "test"):
        found = counts[part]
        assert found["same set"] == 0
        if kind == "query-pair-disjoint":
            assert found["query pair seen"] == 0
        if kind == "gene-disjoint":
            assert found["no gene seen"] == found["samples"]
        if kind == "new-combination":
            assert found["some pair seen"] == 0
            assert found["every gene seen"] == found["samples"]
    assert sum(part["samples"] for part in counts.values()) == len(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rndom"}, "kind: .*did you mean 'random'"),
        ({"test": 0}, "test"),
        ({"test": 1.0}, "test"),
        ({"test": 0.6, "validation": 0.4}, "validation"),
        ({"validation": -0.1}, "validation"),
        ({"seed": -1}, "seed"),
        ({"max_seen": 1}, "max_seen"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(pairs(50), **{"kind": "random", **options})


def test_no_sample_left() -> None:
    star = PerturbationDataset.from_sets([[0, gene] for gene in range(1, 30)], torch.zeros(29), num_genes=30)
    with pytest.raises(ValueError, match="no sample is left"):
        split(star, "gene-disjoint")
    with pytest.raises(ValueError, match="at least one sample"):
        split(star.subset([]), "random")
    with pytest.raises(TypeError, match="dataset"):
        split([[0, 1]], "random")  # type: ignore[arg-type]


def test_parts_of_other_splitters() -> None:
    data = pairs(10)
    parts = split(data, "random", test=0.3, validation=0.2)
    expected = leakage(data, parts)
    assert leakage(data, {name: part.numpy() for name, part in parts.items()}) == expected
    assert leakage(data, {name: part.tolist() for name, part in parts.items()}) == expected
    assert leakage(data, {"train": list(range(10)), "validation": [], "test": []})["train"] == {"samples": 10}


def test_refused_parts() -> None:
    data = pairs(10)
    at = torch.arange(3)
    with pytest.raises(ValueError, match="sample 0 stands in them more than once"):
        leakage(data, {"train": at, "validation": at + 3, "test": at})
    with pytest.raises(ValueError, match="expected positions"):
        leakage(data, {"train": at, "validation": at + 3, "test": at + 8})
    with pytest.raises(ValueError, match="parts"):
        leakage(data, {"train": at})
