"""The methods that are compared: each by its name, for the report, the profiler and the search for the largest batch."""

from __future__ import annotations

import torch
from torch import nn

from cellattn import MultiGraph
from cellattn.data import PERTURBATION_TYPES
from cellattn.nn import CellOutput, CellTransformer

from .baselines import PairMLP
from .engine import Forward, Method


def cell_transformer(graph: MultiGraph, device: torch.device) -> tuple[nn.Module, Forward]:
    """Two layers of width 64, four heads, as many ties as there are heads."""
    model = CellTransformer(
        64,
        2,
        4,
        num_types=len(PERTURBATION_TYPES),
        num_genes=graph.num_nodes,
        ties=[(*divmod(position, 4), relation, 0.1) for position, relation in enumerate(graph.relations[:8])],
        ffn_dim=128,
        pool=("sum", "pairwise"),
        hidden_dim=64,
    )
    return model.to(device), lambda model, batch: model(graph, batch.seeds, batch.ptr, batch.types)


def pair_mlp(graph: MultiGraph, device: torch.device) -> tuple[nn.Module, Forward]:
    """The baseline without graphs; sets of two alone."""
    nothing = torch.zeros((), device=device)
    model = PairMLP(graph.num_nodes).to(device)
    return model, lambda model, batch: CellOutput(model(batch.seeds.view(-1, 2)), {}, nothing)


METHODS = {
    "cell-transformer": Method("cell transformer", cell_transformer),
    "pair-mlp": Method("pair MLP", pair_mlp),
}
