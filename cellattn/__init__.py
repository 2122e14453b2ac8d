"""Attention under graph priors: a differentiable log-sum-exp, graph losses without attention maps, perturbation heads."""

from __future__ import annotations

from pathlib import Path

from ._version import __version__
from .graph import Comembership, MultiGraph
from .ops import (
    attention,
    attention_bce,
    attention_kl,
    attention_kl_comembership,
    attention_logsumexp,
    edge_attention,
    graph_attention,
    khop_mask,
    khop_subgraph,
    masked_spmm,
    network_mse,
    perturbation_attention,
    perturbation_mask,
    relational_degree,
    relational_spmm,
    sample_rows,
)
from .subgraph import SubgraphBatch

# A bare checkout: `kernels/` stands beside this folder, where an installation maps it to `cellattn.kernels`.
_root = Path(__file__).parents[1]
if not (_root / "cellattn" / "kernels").is_dir() and (_root / "kernels" / "attention_bce.py").is_file():
    __path__.append(str(_root))

__all__ = [
    "Comembership",
    "MultiGraph",
    "SubgraphBatch",
    "__version__",
    "attention",
    "attention_bce",
    "attention_kl",
    "attention_kl_comembership",
    "attention_logsumexp",
    "edge_attention",
    "graph_attention",
    "khop_mask",
    "khop_subgraph",
    "masked_spmm",
    "network_mse",
    "perturbation_attention",
    "perturbation_mask",
    "relational_degree",
    "relational_spmm",
    "sample_rows",
]
