"""What is kept and counted, held to its definition set by set, whatever the units."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn.data import GeneList
from cellattn.screen import Bins, SetSpace
from cellattn.screen.keep import Keep, Tables

N = 9
NAMES = GeneList([f"G{i}" for i in range(N)])
BINS = Bins(-1.0, 1.0, 8)


def scored(step: float) -> tuple[Tensor, Tensor, Tensor]:
    """All triples, means in multiples of `step`, so that many are equal, and standard deviations."""
    genes = SetSpace.combinations(NAMES, 3).block(0, 84).genes
    generator = torch.Generator().manual_seed(0)
    mean = (torch.randn(84, dtype=torch.float64, generator=generator) / step).round() * step
    return genes, mean, torch.rand(84, dtype=torch.float64, generator=generator)


def counted(genes: Tensor, mean: Tensor, sd: Tensor, size: int, unit: int) -> Tables:
    """Tables of units of `unit` sets, each counted `size` at a time, and merged."""
    merged = Tables(N, 3, BINS, (-0.5, 0.5))
    for begin in range(0, len(mean), unit):
        tables = Tables(N, 3, BINS, (-0.5, 0.5))
        for at in torch.arange(begin, min(begin + unit, len(mean))).split(size):
            tables.add(genes[at], mean[at], sd[at])
        merged.merge(tables.state())
    return merged


@pytest.mark.parametrize(("size", "unit"), [(84, 84), (1, 84), (7, 21), (5, 11), (1, 1)])
@pytest.mark.parametrize("step", [1e-6, 0.25, 100.0], ids=["distinct", "ties", "all equal"])
def test_tables(step: float, size: int, unit: int) -> None:
    genes, mean, sd = scored(step)
    tables = counted(genes, mean, sd, size, unit)
    state = tables.state()
    values, sets = mean.tolist(), genes.tolist()

    place = [min(max(int((value + 1) * 4 // 1), -1), 8) + 1 for value in values]
    assert state["histogram"].tolist() == [place.count(i) for i in range(10)]
    count, center, square, total_sd = state["moments"].tolist()
    assert count == 84
    # 84 numbers of up to 4: sums are off by less than 84 * 84 * 4 roundings of 1.1e-16
    assert abs(center - statistics.fmean(values)) < 1e-11
    assert abs(square - 84 * statistics.pvariance(values)) < 1e-11
    assert abs(total_sd - sum(sd.tolist())) < 1e-11
    assert state["range"].tolist() == [min(values), max(values)]

    for gene in range(N):
        mine = [(value, s) for value, s in zip(values, sets, strict=True) if gene in s]
        assert int(state["gene.count"][gene]) == len(mine)
        assert abs(float(state["gene.sum"][gene]) - sum(value for value, _ in mine)) < 1e-11
        beyond = [sum(value < -0.5 for value, _ in mine), sum(value > 0.5 for value, _ in mine)]
        assert state["gene.beyond"][:, gene].tolist() == beyond
        for name, best in (("gene.high", max(value for value, _ in mine)), ("gene.low", min(value for value, _ in mine))):
            assert float(state[name][gene]) == best
            assert state[name + "_set"][gene].tolist() == next(s for value, s in mine if value == best)


def test_a_bin_begins_at_its_edge() -> None:
    """And ends below the next."""
    tables = Tables(N, 1, BINS)
    edges = torch.arange(-4, 5, dtype=torch.float64) / 4
    mean = torch.cat([edges, edges - 1e-12])
    tables.add(torch.zeros(18, 1, dtype=torch.int64), mean, torch.zeros_like(mean))
    assert tables.state()["histogram"].tolist() == [1, *[2] * 8, 1]


def test_what_is_looked_at() -> None:
    """Edges of the bins that are not empty, moments in words, and each gene's figures."""
    genes = torch.tensor([[0, 1], [0, 2], [1, 2], [2, 3]])
    mean = torch.tensor([-0.3, 0.1, 0.7, -5.0], dtype=torch.float64)
    tables = Tables(N, 2, BINS, (-0.25, 0.5))
    assert tables.histogram() == ([-1.0, -0.75], [0])
    tables.add(genes[:3], mean[:3], torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64))
    edges, counts = tables.histogram()
    assert edges == [-0.5, -0.25, 0.0, 0.25, 0.5, 0.75]
    assert counts == [1, 0, 1, 0, 1]
    assert tables.moments() == [
        ("mean", f"{0.5 / 3:.6g}"),
        ("standard deviation over sets", f"{statistics.stdev(mean[:3].tolist()):.6g}"),
        ("lowest", "-0.3"),
        ("highest", "0.7"),
        ("standard deviation over models, in the mean", "0.5"),
    ]
    tables.add(genes[3:], mean[3:], torch.zeros(1, dtype=torch.float64))
    assert tables.histogram() == ([-1.25 + 0.25 * i for i in range(9)], [1, 0, 0, 1, 0, 1, 0, 1])
    frame = tables.genes(NAMES)
    words = "gene, sets, mean, below -0.25, above 0.5, highest, highest_with, lowest, lowest_with"
    assert ", ".join(frame.columns) == words
    assert frame.rows() == [
        ("G1", 2, pytest.approx(0.2), 1, 1, 0.7, "G2", -0.3, "G0"),
        ("G2", 3, pytest.approx(-1.4), 1, 1, 0.7, "G1", -5.0, "G3"),
        ("G0", 2, pytest.approx(-0.1), 1, 0, 0.1, "G2", -0.3, "G1"),
        ("G3", 1, -5.0, 1, 0, -5.0, "G2", -5.0, "G2"),
    ]


def test_equal_scores_of_many_sets() -> None:
    """The first of them is the best, however many there are and whatever the threads."""
    names = GeneList([f"G{i}" for i in range(200)])
    genes = SetSpace.combinations(names, 3).block(500_000, 600_000).genes
    first: dict[int, list[int]] = {}
    for members in genes.tolist():
        for gene in members:
            first.setdefault(gene, members)
    tables = Tables(200, 3)
    tables.add(genes, torch.ones(len(genes), dtype=torch.float64), torch.zeros(len(genes), dtype=torch.float64))
    for name in ("gene.high_set", "gene.low_set"):
        assert {gene: tables.state()[name][gene].tolist() for gene in first} == first


def test_table_of_genes() -> None:
    genes, mean, sd = scored(1e-6)
    tables = counted(genes, mean, sd, 10, 30)
    frame = tables.genes(NAMES)
    order = tables.state()["gene.high"].sort(descending=True, stable=True).indices
    assert frame["gene"].to_list() == [NAMES[gene] for gene in order.tolist()]
    best = int(mean.argmax())
    assert frame["highest"][0] == float(mean[best])
    assert {frame["gene"][0], *frame["highest_with"][0].split()} == {NAMES[g] for g in genes[best].tolist()}


@pytest.mark.parametrize("chunk", [1, 7, 84])
@pytest.mark.parametrize("step", [1e-6, 0.5, 100.0])
def test_top_of_tops_is_the_top(step: float, chunk: int) -> None:
    """Both ends, of equal scores the lower rank being the lower one: the same by parts and at once."""
    _, mean, _ = scored(step)
    keep = Keep("top:6")
    at = torch.arange(0)
    for part in torch.arange(84).split(chunk):
        at = torch.cat([at, part])
        chosen = keep.choose(mean[at])
        at = at if chosen is None else at[chosen]
    order = sorted(range(84), key=lambda i: (float(mean[i]), i))
    assert at.tolist() == sorted([*order[:6], *order[-6:]])


def test_keep() -> None:
    score = torch.tensor([-2.0, 0.5, 1.0, -1.0])
    assert Keep("all").choose(score) is None
    chosen = Keep("above:1").choose(score)
    assert chosen is not None
    assert chosen.tolist() == [0, 2, 3]
    assert Keep("top:2").choose(score) is None


@pytest.mark.parametrize("rule", ["top", "top:0", "top:-1", "top:1.5", "above:", "above:nan", "above:inf", "all:1", "best:3"])
def test_refused_rules(rule: str) -> None:
    with pytest.raises(ValueError, match="keep"):
        Keep(rule)


@pytest.mark.parametrize(
    "bins",
    [
        {"low": 1.0, "high": 1.0},
        {"low": float("nan")},
        {"number": 0},
        {"low": -1.7e308, "high": 1.7e308, "number": 1},  # a width of infinity
        {"low": 1e16, "high": 1e16 + 8, "number": 100},  # edges that round to each other
    ],
)
def test_refused_bins(bins: Any) -> None:
    with pytest.raises(ValueError, match="bins"):
        Bins(**bins)
