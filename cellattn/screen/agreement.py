"""How far the models of an ensemble agree: exact moments of their predictions over all sets, added up unit by unit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIX = "members."


class Agreement:
    """Count, means and co-moments of M predictions a set, in float64.

    Two parts are joined as in Chan, Golub and LeVeque (1979): no digits are lost where the means are far from 0.
    """

    def __init__(self, num_members: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(num_members, dtype=torch.float64)
        self.comoment = torch.zeros(num_members, num_members, dtype=torch.float64)  # sum of (a - mean a)(b - mean b)

    def add(self, scores: Tensor) -> None:
        """Scores float64 [M, B], B > 0."""
        first = scores[:, :1]
        rest = scores - first  # so that equal scores have exactly no variance
        mean = rest.mean(1)
        rest = rest - mean[:, None]
        mean = mean + first[:, 0]
        self._join(torch.tensor(float(scores.shape[1]), dtype=torch.float64), mean, rest @ rest.T)

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Join with what `state` gave."""
        count, mean, comoment = (state[_PREFIX + name] for name in ("count", "mean", "comoment"))
        if count > 0:
            self._join(count, mean, comoment)

    def _join(self, count: Tensor, mean: Tensor, comoment: Tensor) -> None:
        total = self.count + count
        step = mean - self.mean
        self.comoment = self.comoment + comoment + torch.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    def state(self) -> dict[str, Tensor]:
        """All of it, by names of its own."""
        return {_PREFIX + name: getattr(self, name) for name in ("count", "mean", "comoment")}

    @property
    def correlation(self) -> Tensor:
        """Pearson, [M, M]; NaN where a member predicts one value for all."""
        scale = self.comoment.diagonal().sqrt()
        return self.comoment / torch.outer(scale, scale)
