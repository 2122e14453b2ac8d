"""Binary cross-entropy of one entry by its logit, exact at any."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

SHARP = log(2 / 3)  # log of the least a of a sharp entry: above 1/2 by more than roundings of the log-sum-exp make up


def cross_entropy(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """positive softplus(-s) + negative softplus(s), to the last digits of either: softplus(s) = max(s, 0) + log(1 + e^-|s|).

    A term of weight 0 is 0, where s is infinite too.
    """
    both = (positive + negative) * s.abs().neg_().exp_().log1p_()
    return both.add_(weighted(negative, s.relu())).add_(weighted(positive, s.neg().relu_()))


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, 0 where the weight is: a certain entry (infinite x) of the other kind loses nothing. x is written over."""
    return x.masked_fill_(weight == 0, 0).mul_(weight)


def cross_entropy_slope(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Its derivative, negative sigmoid(s) - positive sigmoid(-s)."""
    e = s.abs().neg_().exp_()
    return torch.where(s < 0, negative * e - positive, negative - positive * e).div_(1 + e)
