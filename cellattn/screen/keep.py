"""What is kept of a screen: which rows, and what is counted over all sets whether their rows are kept or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from .._check import describe, number_of, require, require_choice, require_several, unboxed
from ..genes import GeneList

BY = ("mean", "certainty")  # certainty: |mean| / sd
_MOST_BINS = 10_000_000  # int64, of each unit


def score_of(mean: Tensor, sd: Tensor, by: str) -> Tensor:
    """What sets are ranked by: the mean over the models, or |mean| / sd (infinite where all models agree to the last bit)."""
    return mean if by == "mean" else torch.where(mean == 0, 0.0, mean.abs() / sd)


@dataclass(frozen=True)
class Keep:
    """Which rows of a unit are kept.

    Attributes:
        rule: "all"; "top:K", K at either end of "mean", the K highest of "certainty"; or "above:x", those with |score| of at
            least x.
        by: what the score is, "mean" or "certainty".
    """

    rule: str = "top:10000"
    by: str = "mean"

    def __post_init__(self) -> None:
        require_choice("by", self.by, BY)
        if not isinstance(self.rule, str):
            raise TypeError(f"keep: expected a string, got {describe(self.rule)}")
        kind, _, number = self.rule.partition(":")
        valid = {"all": number == "", "top": number.isdecimal() and int(number) > 0, "above": _is_number(number)}
        require(valid.get(kind, False), f"keep: expected 'all', 'top:K' (K at least 1) or 'above:x', got {self.rule!r}")

    @property
    def size(self) -> int | None:
        """K of "top:K"."""
        kind, _, number = self.rule.partition(":")
        return int(number) if kind == "top" else None

    @property
    def has_low_end(self) -> bool:
        """Whether the lowest scores are of interest too."""
        return self.by == "mean"

    def choose(self, score: Tensor) -> Tensor | None:
        """Positions int64, ascending, of float64 [B] scores; None for all."""
        kind, _, number = self.rule.partition(":")
        if kind == "above":
            return (score.abs() >= float(number)).nonzero()[:, 0]
        size = self.size
        if size is None or len(score) <= size * (1 + self.has_low_end):
            return None
        # of equal scores, the lowest ranks are the lowest end: the same everywhere
        high = float(score.kthvalue(len(score) - size + 1).values)
        above, at_high = (score > high).nonzero()[:, 0], (score == high).nonzero()[:, 0]
        ends = [above, at_high[len(above) - size :]]
        if self.has_low_end:
            low = float(score.kthvalue(size).values)
            below, at_low = (score < low).nonzero()[:, 0], (score == low).nonzero()[:, 0]
            ends += [below, at_low[: size - len(below)]]
        return torch.cat(ends).sort().values


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


@dataclass(frozen=True)
class Bins:
    """Bins of equal width from low to high; what lies outside is counted in two more.

    Attributes:
        low, high: ends of the histogram, in the units of the predictions.
        number: of bins between them.

    Raises:
        TypeError, ValueError: low is not below high, number not a whole one from 1 to 10,000,000, or bins too wide or narrow.
    """

    low: float = -8.0
    high: float = 8.0
    number: int = 1600

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, number_of(f"bins: {name}", getattr(self, name)))
        object.__setattr__(self, "number", unboxed(self.number))
        require(self.low < self.high, f"bins: expected low < high, got {self.low} and {self.high}")
        whole = type(self.number) is int and 0 < self.number <= _MOST_BINS
        require(whole, f"bins: expected a number of them from 1 to {_MOST_BINS:,}, got {self.number!r}")
        width = (self.high - self.low) / self.number
        apart = width < float("inf") and self.low < self.low + width and self.high - width < self.high
        require(apart, f"bins: expected ends that float64 tells apart, got {self.number} from {self.low} to {self.high}")


def check_thresholds(thresholds: Any) -> tuple[float, ...]:
    """Finite numbers."""
    thresholds = thresholds.tolist() if isinstance(thresholds, np.ndarray | torch.Tensor) else thresholds
    require_several("thresholds", thresholds, "a sequence of numbers")
    return tuple(number_of(f"thresholds[{position}]", value) for position, value in enumerate(thresholds))


class Tables:
    """Histogram, moments and a table of the genes, over means (of the models) of all sets; sums in float64.

    Args:
        num_genes: of the model.
        order: genes of a set.
        bins: of the histogram.
        thresholds: a gene's sets with a mean below each negative one, and above each other one, are counted.
    """

    def __init__(self, num_genes: int, order: int, bins: Bins | None = None, thresholds: Sequence[float] = (-1.0, 1.0)) -> None:
        self.bins, self.thresholds = bins or Bins(), tuple(thresholds)
        whole = torch.int64
        self._state = {
            "histogram": torch.zeros(self.bins.number + 2, dtype=whole),
            "moments": torch.zeros(4, dtype=torch.float64),  # count, mean, sum of squares about it, sum of sd
            "range": torch.tensor([float("inf"), float("-inf")], dtype=torch.float64),
            "gene.count": torch.zeros(num_genes, dtype=whole),
            "gene.sum": torch.zeros(num_genes, dtype=torch.float64),
            "gene.beyond": torch.zeros(len(self.thresholds), num_genes, dtype=whole),
            "gene.high": torch.full((num_genes,), float("-inf"), dtype=torch.float64),
            "gene.high_set": torch.full((num_genes, order), -1, dtype=whole),
            "gene.low": torch.full((num_genes,), float("inf"), dtype=torch.float64),
            "gene.low_set": torch.full((num_genes, order), -1, dtype=whole),
        }

    def state(self) -> dict[str, Tensor]:
        """All of it."""
        return dict(self._state)

    def add(self, genes: Tensor, mean: Tensor, sd: Tensor) -> None:
        """Count sets, by ascending rank: genes int64 [B, k], mean and sd float64 [B], B > 0."""
        s, bins = self._state, self.bins
        place = ((mean - bins.low) * (bins.number / (bins.high - bins.low))).floor_().clamp_(-1, bins.number).long().add_(1)
        s["histogram"] += place.bincount(minlength=bins.number + 2)
        rest = mean - mean[0]  # so that equal means have exactly no variance
        center = rest.mean()
        own = torch.stack([torch.tensor(float(len(mean))), center + mean[0], (rest - center).square().sum(), sd.sum()])
        s["moments"] = _join(s["moments"], own.double())
        s["range"] = torch.stack([torch.minimum(s["range"][0], mean.min()), torch.maximum(s["range"][1], mean.max())])
        num_genes = len(s["gene.count"])
        beyond = [mean < x if x < 0 else mean > x for x in self.thresholds]
        for gene in genes.unbind(1):
            s["gene.count"] += gene.bincount(minlength=num_genes)
            s["gene.sum"] += gene.bincount(mean, minlength=num_genes)
            for row, is_beyond in zip(s["gene.beyond"], beyond, strict=True):
                row += gene[is_beyond].bincount(minlength=num_genes)
        for end, name in (("amax", "gene.high"), ("amin", "gene.low")):
            old = s[name]
            # few, once there have been some sets: all else is done for these alone
            better = [(mean > old[gene] if end == "amax" else mean < old[gene]).nonzero()[:, 0] for gene in genes.unbind(1)]
            at = torch.cat(better)
            if len(at):
                found = torch.cat([gene[places] for gene, places in zip(genes.unbind(1), better, strict=True)])
                best = old.scatter_reduce(0, found, mean[at], end)
                equal = mean[at] == best[found]
                first = torch.full_like(s["gene.count"], len(mean)).scatter_reduce(0, found[equal], at[equal], "amin")
                new = (first < len(mean)).nonzero()[:, 0]
                s[name] = best
                s[name + "_set"][new] = genes[first[new]]

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what the tables of later ranks have counted."""
        s = self._state
        for name in ("histogram", "gene.count", "gene.sum", "gene.beyond"):
            s[name] = s[name] + state[name]
        s["moments"] = _join(s["moments"], state["moments"])
        s["range"] = torch.stack(
            [torch.minimum(s["range"][0], state["range"][0]), torch.maximum(s["range"][1], state["range"][1])]
        )
        higher, lower = state["gene.high"] > s["gene.high"], state["gene.low"] < s["gene.low"]
        for name, better in (("gene.high", higher), ("gene.low", lower)):
            s[name] = torch.where(better, state[name], s[name])
            s[name + "_set"] = torch.where(better[:, None], state[name + "_set"], s[name + "_set"])

    # ------------------------------------------------------------------------------------------------ to look at

    def histogram(self) -> tuple[list[float], list[int]]:
        """Edges, and counts of the bins from the first to the last that is not empty; what lies outside is at the ends."""
        counts, bins = self._state["histogram"], self.bins
        step = (bins.high - bins.low) / bins.number
        used = counts.nonzero()[:, 0].tolist() or [1]
        first, last = used[0], used[-1]
        edges = [bins.low + (place - 1) * step for place in range(first, last + 2)]
        return edges, counts[first : last + 1].tolist()

    def moments(self) -> list[tuple[str, str]]:
        """What they are called, and what they are."""
        count, mean, square, sd = self._state["moments"].tolist()
        low, high = self._state["range"].tolist()
        values = {
            "mean": mean,
            "standard deviation over sets": (square / max(count - 1, 1)) ** 0.5,
            "lowest": low,
            "highest": high,
            "standard deviation over models, in the mean": sd / max(count, 1),
        }
        return [(name, f"{value:.6g}") for name, value in values.items()]

    def genes(self, names: GeneList) -> pl.DataFrame:
        """A row a gene that is in a set, by its highest set: mean, sets beyond thresholds, best sets and their other genes."""
        s = self._state
        at = s["gene.count"].nonzero()[:, 0]
        at = at[s["gene.high"][at].sort(descending=True, stable=True).indices]
        columns: dict[str, Any] = {
            "gene": [names[gene] for gene in at.tolist()],
            "sets": s["gene.count"][at].numpy(),
            "mean": (s["gene.sum"][at] / s["gene.count"][at]).numpy(),
        }
        for threshold, row in zip(self.thresholds, s["gene.beyond"], strict=True):
            columns[f"{'below' if threshold < 0 else 'above'} {threshold:g}"] = row[at].numpy()
        for end, partner in (("high", "highest_with"), ("low", "lowest_with")):
            columns[f"{end}est"] = s[f"gene.{end}"][at].numpy()
            columns[partner] = [
                " ".join(names[other] for other in members if other != gene)
                for gene, members in zip(at.tolist(), s[f"gene.{end}_set"][at].tolist(), strict=True)
            ]
        return pl.DataFrame(columns)


def _join(a: Tensor, b: Tensor) -> Tensor:
    """Moments of two parts as those of both (Chan, Golub and LeVeque 1979)."""
    count = a[0] + b[0]
    if count == 0:
        return a
    step = b[1] - a[1]
    return torch.stack([count, a[1] + step * (b[0] / count), a[2] + b[2] + step.square() * (a[0] * b[0] / count), a[3] + b[3]])
