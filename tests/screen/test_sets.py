"""Which sets a screen has: every set once, counted, named, and found again."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cellattn.data import PERTURBATION_TYPES, GeneList
from cellattn.screen import SetSpace, rank_of, read_roster
from cellattn.screen.enumerations import GeneSets

N = 11
NAMES = GeneList([f"G{i}" for i in range(N)], aliases={"alpha": "G3", "beta": "G4"})
DELETED = PERTURBATION_TYPES.index("deleted")
Members = frozenset[tuple[int, int]]


def members(sets: GeneSets) -> list[Members]:
    """Each set as its genes and their types."""
    types = torch.full_like(sets.genes, DELETED) if sets.types is None else sets.types
    return [frozenset(zip(g, t, strict=True)) for g, t in zip(sets.genes.tolist(), types.tolist(), strict=True)]


def by_definition(rosters: list[tuple[set[int], int]], types: list[str]) -> set[Members]:
    """Every set that can be dealt out to the rosters, in every combination of types."""
    slots = [roster for roster, count in rosters for _ in range(count)]
    kinds = [PERTURBATION_TYPES.index(kind) for kind in types]
    return {
        frozenset(zip(genes, chosen, strict=True))
        for genes in itertools.combinations(range(N), len(slots))
        if any(all(g in roster for g, roster in zip(genes, dealt, strict=True)) for dealt in itertools.permutations(slots))
        for chosen in itertools.product(kinds, repeat=len(slots))
    }


def require_all(space: SetSpace, want: set[Members]) -> None:
    """Every set once, by rank and by block, and back from its genes in any order."""
    assert space.total == len(space) == len(want)
    rank = torch.arange(space.total)
    sets = space.set_of(rank)
    found = members(sets)
    assert len(found) == len(set(found))
    assert set(found) == want
    turned = [None if x is None else x.roll(1, 1) for x in sets]
    assert torch.equal(space.rank_of(*turned), rank)  # type: ignore[arg-type]
    for begin, end in [(0, space.total), (space.total // 3, space.total // 2), (1, space.total), (space.total, space.total)]:
        block = space.block(begin, end)
        assert torch.equal(block.rank, rank[begin:end])
        assert torch.equal(block.genes, sets.genes[begin:end])
        assert (block.types is None) == (sets.types is None)
        if block.types is not None and sets.types is not None:
            assert torch.equal(block.types, sets.types[begin:end])


@pytest.mark.parametrize("types", ["deleted", "added", ["deleted", "overexpressed"]], ids=str)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_combinations(order: int, types: str | list[str]) -> None:
    roster = ["G9", "G1", "alpha", "G7", "G4", "G10"]
    space = SetSpace.combinations(NAMES, order, roster=roster, types=types)
    genes = {9, 1, 3, 7, 4, 10}
    assert space.roster.tolist() == sorted(genes)
    require_all(space, by_definition([(genes, order)], [types] if isinstance(types, str) else types))


def test_combinations_of_all_genes_have_the_rank_of_the_number_system() -> None:
    space = SetSpace.combinations(NAMES, 3)
    assert torch.equal(rank_of(space.block(0, space.total).genes), torch.arange(space.total))


def test_one_type_for_each_gene() -> None:
    types = {"G1": "added", "alpha": "deleted", "G5": "mutated", "G0": "added"}
    space = SetSpace.combinations(NAMES, 2, roster=["G1", "G3", "G5"], types=types)
    kind = {1: "added", 3: "deleted", 5: "mutated"}
    pairs = itertools.combinations([(gene, PERTURBATION_TYPES.index(name)) for gene, name in kind.items()], 2)
    require_all(space, set(map(frozenset, pairs)))


@given(st.data())
def test_crossed_rosters(data: st.DataObject) -> None:
    """Overlapping or not: every set that can be dealt out, once."""
    counts = data.draw(st.sampled_from([[1, 1], [1, 2], [2, 1], [2, 2], [1, 1, 1], [3, 1], [1, 1, 1, 1], [2]]))
    rosters = [(data.draw(st.sets(st.integers(0, N - 1), min_size=1, max_size=6)), count) for count in counts]
    types = data.draw(st.sampled_from([["deleted"], ["added"], ["deleted", "mutated"]]))
    want = by_definition(rosters, types)
    given = [(torch.tensor(sorted(roster)), count) for roster, count in rosters]
    if want:
        require_all(SetSpace.crossed(NAMES, given, types=types), want)
    else:
        with pytest.raises(ValueError, match="make no set"):
            SetSpace.crossed(NAMES, given, types=types)


def test_crossed_rosters_without_overlap_keep_their_places() -> None:
    space = SetSpace.crossed(NAMES, [(["G8", "G9"], 1), (["G0", "G1", "G2"], 2)])
    assert space.block(0, 6).genes.tolist() == [[8, 0, 1], [9, 0, 1], [8, 0, 2], [9, 0, 2], [8, 1, 2], [9, 1, 2]]


def test_listed() -> None:
    genes = torch.tensor([[5, 2], [1, 0], [2, 7]])
    space = SetSpace.listed(NAMES, genes)
    require_all(space, {frozenset({(2, 1), (5, 1)}), frozenset({(0, 1), (1, 1)}), frozenset({(2, 1), (7, 1)})})
    assert space.rank_of(torch.tensor([[2, 5], [0, 1], [7, 2], [0, 2], [10, 9]])).tolist() == [0, 1, 2, -1, -1]
    assert space.roster.tolist() == [0, 1, 2, 5, 7]


def test_listed_with_types() -> None:
    genes, types = torch.tensor([[5, 2], [5, 2]]), torch.tensor([[1, 2], [2, 1]])
    space = SetSpace.listed(NAMES, genes, types=types)
    require_all(space, {frozenset({(5, 1), (2, 2)}), frozenset({(5, 2), (2, 1)})})
    assert SetSpace.listed(NAMES, genes[:1], types="added").block(0, 1).types is not None


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "sets.txt.gz"
    path.write_bytes(gzip.compress(b"# of last week\r\nG1\talpha\r\nG0\tG2\r\n"))
    assert SetSpace.from_file(path, NAMES).block(0, 2).genes.tolist() == [[1, 3], [0, 2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("G1\tG2\nG2\tG1\n", "line 2: holds the set of line 1 again"),
        ("# x\nG1\tG1\n", "line 2: names a gene twice"),
        ("G3\talpha\n", "line 1: names a gene twice"),
        ("G1\tG2\nG3\n", "line 2"),
        ("G1\tG22\n", r"'G22' \(nearest: 'G2'\)"),
        ("G1\t\n", "line 1"),
    ],
)
def test_malformed_files_of_sets(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sets.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        SetSpace.from_file(path, NAMES)


def test_ranks_of_other_sets() -> None:
    space = SetSpace.combinations(NAMES, 2, roster=["G0", "G1", "G2"], types=["deleted", "added"])
    genes = torch.tensor([[0, 1], [0, 3], [1, 1], [2, 1]])
    types = torch.tensor([[1, 2], [1, 1], [1, 2], [1, 3]])
    assert space.rank_of(genes, types).ge(0).tolist() == [True, False, False, False]
    assert space.rank_of(genes[:0], types[:0]).shape == (0,)


def test_no_more_than_2_to_62() -> None:
    many = GeneList([f"G{i}" for i in range(102571)])
    assert SetSpace.combinations(many, 4, roster=torch.arange(102570)).total < 2**62
    with pytest.raises(ValueError, match=r"2\^62"):
        SetSpace.combinations(many, 4)
    with pytest.raises(ValueError, match=r"2\^62"):
        SetSpace.crossed(many, [(torch.arange(50_000), 2), (torch.arange(50_000, 102_000), 2)], types=["deleted", "added"])


def test_large_spaces_by_block_and_rank() -> None:
    names = GeneList([f"G{i}" for i in range(6607)])
    for space in (
        SetSpace.combinations(names, 4),
        SetSpace.combinations(names, 3, types=["deleted", "added", "mutated"]),
        SetSpace.crossed(names, [(torch.arange(4000), 1), (torch.arange(2000, 6000), 3)]),
    ):
        for begin in [0, space.total // 7, space.total - 5000]:
            block, rank = space.block(begin, begin + 5000), torch.arange(begin, begin + 5000)
            sets = space.set_of(rank)
            assert torch.equal(block.genes, sets.genes)
            assert torch.equal(space.rank_of(*sets), rank)


def test_roster_file(tmp_path: Path) -> None:
    path = tmp_path / "roster.txt"
    path.write_bytes(b"\xef\xbb\xbf# kinases\nG1\nalpha\n# and\nG7\n\n")
    assert SetSpace.combinations(NAMES, 1, roster=read_roster(path)).roster.tolist() == [1, 3, 7]
    path.write_text("G1\nG2\nG1\n")
    with pytest.raises(ValueError, match=r"line 3.*'G1' stands in line 1"):
        read_roster(path)
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="the file is empty"):
        read_roster(path)


@pytest.mark.parametrize(
    ("roster", "message"),
    [
        (["G1", "G77", "zz"], r"roster: 2 of its names are not in the gene list: 'G77' \(nearest: 'G7'\), 'zz'"),
        (["G1", "alpa"], r"'alpa' \(nearest: 'alpha'\)"),
        (["a1", "b1", "c1", "d1", "G1"], "4 of its names .* and 1 more"),
        (["G1", "G2", "G1"], "roster: 'G1' stands more than once"),
        (["G1", "G3", "alpha"], r"'G3' stands more than once \(also as 'alpha'\)"),
        (torch.tensor([1, 1, 2]), "'G1' stands more than once"),
        (torch.tensor([1, N]), "roster: position 1"),
        (["G1"], "1 genes make no set of 2"),
    ],
)
def test_refused_rosters(roster: list[str] | Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SetSpace.combinations(NAMES, 2, roster=roster)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SetSpace.combinations(NAMES, 5), "order"),
        (lambda: SetSpace.combinations(NAMES, 2, types="presnt"), "types"),
        (lambda: SetSpace.combinations(NAMES, 2, types="present"), "types"),
        (lambda: SetSpace.combinations(NAMES, 2, types=[]), "types"),
        (lambda: SetSpace.combinations(NAMES, 2, types=["added", "added"]), "none twice"),
        (lambda: SetSpace.combinations(NAMES, 2, types={"G1": "added"}), "no type is given for 'G0', 'G2', 'G3' and 7 more"),
        (lambda: SetSpace.combinations(NAMES, 2, types={"G99": "added"}), "'G99'"),
        (lambda: SetSpace.crossed(NAMES, [(["G1"], 2), (["G2"], 3)]), "at most 4"),
        (lambda: SetSpace.crossed(NAMES, []), "rosters"),
        (lambda: SetSpace.crossed(NAMES, [(["G1"], 1), (["Gx"], 1)]), r"rosters\[1\]"),
        (lambda: SetSpace.listed(NAMES, torch.tensor([[0, N]])), "genes"),
        (lambda: SetSpace.listed(NAMES, torch.tensor([[0, 1]]), types=["added", "deleted"]), "one type a gene"),
        (lambda: SetSpace.listed(NAMES, torch.tensor([[0, 1]]), types=torch.tensor([[0, 1]])), "present"),
        (lambda: SetSpace.combinations(NAMES, 2).block(5, 4), "begin, end"),
        (lambda: SetSpace.combinations(NAMES, 2).block(0, 56), "begin, end"),
        (lambda: SetSpace.combinations(NAMES, 2).set_of(torch.tensor([55])), "rank"),
        (lambda: SetSpace.combinations(NAMES, 2).rank_of(torch.tensor([[1, 2, 3]])), "genes: expected 2"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types() -> None:
    bad: Any = "G1"
    with pytest.raises(TypeError, match="roster"):
        SetSpace.combinations(NAMES, 2, roster=bad)
    with pytest.raises(TypeError, match="names"):
        SetSpace.combinations(["G1", "G2"], 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="roster"):
        SetSpace.combinations(NAMES, 2, roster=["G1", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="filters"):
        SetSpace.combinations(NAMES, 2, filters=["G1"])  # type: ignore[list-item]


def test_description_tells_spaces_apart() -> None:
    other = GeneList([*list(NAMES)[:-1], "H"])
    crossed = [(["G1", "G2"], 1), (["G2", "G3"], 1)]
    spaces = [
        SetSpace.combinations(NAMES, 2),
        SetSpace.combinations(other, 2),
        SetSpace.combinations(NAMES, 3),
        SetSpace.combinations(NAMES, 2, types="added"),
        SetSpace.combinations(NAMES, 2, roster=["G1", "G2", "G3"]),
        SetSpace.crossed(NAMES, crossed),
        SetSpace.crossed(NAMES, [(["G1", "G2"], 1), (["G2", "G4"], 1)]),
        SetSpace.listed(NAMES, torch.tensor([[0, 1], [0, 2]])),
        SetSpace.listed(NAMES, torch.tensor([[0, 2], [0, 1]])),
        SetSpace.listed(NAMES, torch.tensor([[0, 2], [0, 1]]), types="added"),
    ]
    texts = [repr(space.describe()) for space in spaces]
    assert len(set(texts)) == len(texts)
    a, b = (SetSpace.combinations(NAMES, 2, roster=roster).describe() for roster in (["G1", "alpha"], ["G3", "G1"]))
    assert a == b
