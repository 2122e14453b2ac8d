"""Attention under graph priors: a differentiable log-sum-exp, graph losses without attention maps, perturbation heads."""

from __future__ import annotations

from ._version import __version__
from .graph import MultiGraph
from .ops import (
    attention,
    attention_bce,
    attention_kl,
    attention_logsumexp,
    graph_attention,
    perturbation_attention,
    sample_rows,
)

__all__ = [
    "MultiGraph",
    "__version__",
    "attention",
    "attention_bce",
    "attention_kl",
    "attention_logsumexp",
    "graph_attention",
    "perturbation_attention",
    "sample_rows",
]
