"""The public operators: one file an op, each from its docstring through its checks and operator to its backends."""

from __future__ import annotations

from .attention import attention, attention_logsumexp
from .attention_bce import attention_bce
from .attention_kl import attention_kl
from .attention_kl_comembership import attention_kl_comembership
from .edge_attention import edge_attention
from .graph_attention import graph_attention
from .khop_mask import khop_mask
from .khop_subgraph import khop_subgraph
from .masked_spmm import masked_spmm
from .network_mse import network_mse
from .perturbation_attention import perturbation_attention
from .perturbation_mask import perturbation_mask
from .relational_spmm import relational_degree, relational_spmm
from .sample_rows import sample_rows

__all__ = [
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
