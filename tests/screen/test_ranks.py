"""Ranks of sets: exact to 2^62, in the order of the combinatorial number system."""

from __future__ import annotations

import itertools
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cellattn.screen import rank_of, set_of
from cellattn.screen.ranks import MAX_RANKS, binomial, block_of, items_of, rank_of_items

LARGEST = {1: 2**62, 2: 3037000500, 3: 3024617, 4: 102570}
"""For each k, the most positions of which no more than 2^62 sets of k can be made."""


def colexicographic(n: int, k: int, num_types: int = 1) -> list[tuple[int, ...]]:
    """All sets of k items, no position twice, by their largest item, then the next, and so on."""
    sets = itertools.combinations(range(n * num_types), k)
    return sorted((s for s in sets if len({item // num_types for item in s}) == k), key=lambda s: s[::-1])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [4, 5, 11])
def test_all_sets_in_order(n: int, k: int) -> None:
    rank = torch.arange(comb(n, k))
    sets = set_of(rank, n, k)
    assert list(map(tuple, sets.tolist())) == colexicographic(n, k)
    assert torch.equal(rank_of(sets), rank)


@pytest.mark.parametrize("num_types", [2, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_all_sets_of_items_in_order(k: int, num_types: int) -> None:
    want = colexicographic(6, k, num_types)
    items = items_of(torch.arange(len(want)), k, num_types)
    assert list(zip(*(item.tolist() for item in items), strict=True)) == want
    assert torch.equal(rank_of_items(items, num_types), torch.arange(len(want)))


@pytest.mark.parametrize("num_types", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_blocks_are_what_ranks_say(k: int, num_types: int) -> None:
    n = 7
    total = comb(n, k) * num_types**k
    items = 100 + torch.arange(n * num_types)
    want = torch.stack(items_of(torch.arange(total), k, num_types)) + 100
    bounds = sorted({*range(0, total, max(total // 23, 1)), 1, total - 1, total})
    for begin, end in itertools.combinations_with_replacement(bounds, 2):
        assert torch.equal(torch.stack(block_of(items, k, begin, end, num_types)), want[:, begin:end]), (begin, end)


@pytest.mark.parametrize("k", LARGEST)
def test_largest(k: int) -> None:
    """The most positions there can be, and one more is refused."""
    n = LARGEST[k]
    assert comb(n, k) <= MAX_RANKS < comb(n + 1, k)
    rank = torch.tensor([0, comb(n, k) - 1])
    sets = set_of(rank, n, k)
    assert sets.tolist() == [list(range(k)), list(range(n - k, n))]
    assert torch.equal(rank_of(sets), rank)
    with pytest.raises(ValueError, match=r"2\^62"):
        set_of(rank, n + 1, k)
    with pytest.raises(ValueError, match=r"2\^62"):
        rank_of(torch.arange(n + 1 - k, n + 1)[None] + (k == 1))


@pytest.mark.parametrize("k", LARGEST)
def test_round_trip_up_to_the_largest(k: int) -> None:
    """Random ranks, and those where the largest position changes, where an estimate that is off by one would show."""
    n, generator = LARGEST[k], torch.Generator().manual_seed(k)
    total = comb(n, k)
    drawn = torch.randint(total, (20_000,), generator=generator)
    small = drawn >> torch.randint(62, (20_000,), generator=generator)
    steps = binomial(set_of(drawn, n, k)[:, -1], k)
    rank = torch.cat([drawn, small, steps, steps - 1, steps + 1]).clamp(0, total - 1)
    sets = set_of(rank, n, k)
    assert sets.min() >= 0
    assert sets.max() < n
    assert (sets.diff(dim=1) > 0).all()
    assert torch.equal(rank_of(sets), rank)


@given(st.data())
def test_round_trip_of_sets(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 4))
    members = data.draw(st.sets(st.integers(0, LARGEST[k] - 1), min_size=k, max_size=k))
    sets = torch.tensor(sorted(members))
    rank = rank_of(sets)
    assert int(rank) == sum(comb(c, i) for i, c in enumerate(sorted(members), 1))
    assert torch.equal(set_of(rank, LARGEST[k], k), sets)


@given(st.integers(0, 4_000_000), st.integers(0, 4))
def test_binomial(n: int, i: int) -> None:
    if comb(n, i) < 2**63:
        assert int(binomial(torch.tensor(n), i)) == comb(n, i)


def test_shapes() -> None:
    assert set_of(torch.tensor(5), 7, 2).shape == (2,)
    assert set_of(torch.zeros(2, 3, dtype=torch.int64), 7, 3).shape == (2, 3, 3)
    assert set_of(torch.empty(0, dtype=torch.int64), 7, 3).shape == (0, 3)
    assert rank_of(torch.empty(0, 3, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("rank", "n", "k", "message"),
    [
        (torch.tensor([10]), 5, 2, "rank: expected ranks from 0 to 9, got 10"),
        (torch.tensor([-1]), 5, 2, "rank: .* got -1"),
        (torch.tensor([0]), 5, 5, "k: expected 1 to 4"),
        (torch.tensor([0]), 5, 0, "k"),
        (torch.tensor([0.0]), 5, 2, "rank: expected dtype int64"),
        (torch.tensor([0]), 1, 2, "rank"),
    ],
)
def test_refused_ranks(rank: Tensor, n: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_of(rank, n, k)


@pytest.mark.parametrize("sets", [[[1, 1]], [[2, 1]], [[-1, 1]], [[0, 1, 2, 3, 4]], [[]]])
def test_refused_sets(sets: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="sets"):
        rank_of(torch.tensor(sets, dtype=torch.int64))
