"""How far models agree, held to its definition over all sets, whatever the parts they were counted in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellattn.screen.agreement import Agreement
from cellattn.screen.keep import Tables

SETS = 60


@pytest.mark.parametrize("far", [0.0, 1e6])
@pytest.mark.parametrize(("size", "unit"), [(60, 60), (1, 60), (1, 1), (7, 21), (5, 11)])
def test_agreement(size: int, unit: int, far: float) -> None:
    """Parts differ in their means, by which most of the co-moments of the whole come from between them."""
    g = torch.Generator().manual_seed(0)
    drift = torch.linspace(0, 3, SETS, dtype=torch.float64) * torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    scores = torch.randn(3, SETS, dtype=torch.float64, generator=g) + drift + far
    whole = Agreement(3)
    for part in scores.split(unit, 1):
        one = Agreement(3)
        for some in part.split(size, 1):
            one.add(some)
        whole.merge(one.state())
    assert whole.count == SETS
    # scores up to `far` + 10 are known to 1.2e-16 of it, and so is each step to the next mean
    apart = SETS * 1.2e-16 * (far + 10)
    assert np.abs(whole.mean.numpy() - scores.numpy().mean(1)).max() <= apart
    want = np.cov(scores.numpy() - far) * (SETS - 1)
    assert np.abs(whole.comoment.numpy() - want).max() <= 4 * SETS * 10 * apart
    assert np.abs(whole.correlation.numpy() - np.corrcoef(scores.numpy() - far)).max() <= 4 * SETS * 10 * apart


def test_one_prediction_for_all() -> None:
    agreement = Agreement(2)
    agreement.merge(Agreement(2).state())  # of no sets
    agreement.add(torch.stack([torch.full((4,), 0.1), torch.arange(4.0)]).double())
    assert agreement.correlation.isnan().tolist() == [[True, True], [True, False]]
    assert float(agreement.correlation[1, 1]) == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("number", [3, 29, 435, 1841])
def test_models_of_one_prediction_each_do_not_agree(number: int) -> None:
    """Sums of equal numbers of 53 bits are rounded, and what is left of two such would agree fully."""
    g = torch.Generator().manual_seed(number)
    for value in torch.randn(20, 2, dtype=torch.float64, generator=g):
        agreement, tables = Agreement(2), Tables(1, 1)
        for _ in range(3):
            agreement.add(value[:, None].expand(2, number).contiguous())
            tables.add(torch.zeros(number, 1, dtype=torch.int64), value[0].repeat(number), torch.zeros(number).double())
        assert agreement.correlation.isnan().all()
        assert dict(tables.moments())["standard deviation over sets"] == "0"
