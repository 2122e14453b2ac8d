"""What is compared: each model with its sizes, its graph term and how it is optimised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cellattn import MultiGraph
from cellattn.data import (
    PERTURBATION_TYPES,
)
from cellattn.nn import CellTransformer, Dango, PairwiseInteraction, WildtypeDifference

from .baselines import pair_mlp
from .cell import Cell
from .engine import Forward

# The relations with the most edges among the labelled genes come first; a layer has as many ties as heads.
TIED_RELATIONS = ("physical", "database", "complex", "neighborhood", "coexpression", "cooccurence", "regulatory", "motif")
DIM, NUM_LAYERS, NUM_HEADS, FFN_DIM = 64, 2, 4, 128


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up and cosine decay of the learning rate, MSE of standardised phenotypes."""

    epochs: int = 30
    batch_size: int = 512
    lr: float = 5e-3
    encoder_lr: float = 1e-3
    decay: float = 3e-3  # of matrices in a step at the full learning rate: lr * weight_decay
    ema: float = 0.98  # of the parameters that are evaluated
    warmup: float = 0.05  # share of the steps
    clip: float = 1.0


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    title: str
    model: str  # "ridge", "pair MLP", "pairwise interaction", "DANGO", "wildtype difference" or "cell transformer"
    loss: str | None = None  # of the tied heads
    weight: float = 0.0  # of the mean loss over the ties, or over the networks of DANGO
    layers: int = NUM_LAYERS  # of a graph network or transformer
    features: bool = False
    sampled_rows: float | None = None
    optimization: Optimization = Optimization()


_MLP = Optimization(epochs=40, batch_size=256, lr=3e-3, decay=3e-4, ema=0.0)
_TUNED = replace(_MLP, lr=1e-2, decay=1e-2)
_SETS = Optimization(epochs=20, lr=3e-3)
_FEATURES = Optimization(epochs=25)
VARIANTS = {
    "ridge": Variant("additive ridge", "ridge"),
    "mlp": Variant("pair MLP", "pair MLP", optimization=_MLP),
    "mlp-tuned": Variant("pair MLP, tuned", "pair MLP", optimization=_TUNED),
    "pairwise": Variant("pairwise interaction", "pairwise interaction", optimization=_TUNED),
    "dango": Variant("DANGO, joint training", "DANGO", weight=0.1, optimization=replace(_SETS, epochs=12)),
    "wildtype": Variant("wildtype difference, one layer", "wildtype difference", layers=1, optimization=_SETS),
    "none": Variant("cell transformer, no graph term", "cell transformer"),
    "kl": Variant("cell transformer, KL", "cell transformer", "kl", 3.0),
    "bce": Variant("cell transformer, BCE", "cell transformer", "bce", 3.0),
    "kl-rows": Variant("cell transformer, KL on a quarter of the rows", "cell transformer", "kl", 3.0, sampled_rows=0.25),
    "features-none": Variant(
        "cell transformer, spectral features, no graph term", "cell transformer", features=True, optimization=_FEATURES
    ),
    "features-kl": Variant(
        "cell transformer, spectral features, KL", "cell transformer", "kl", 0.01, features=True, optimization=_FEATURES
    ),
}


def ties(graph: MultiGraph) -> list[tuple[int, int, str]]:
    """(layer, head, relation): one head a relation, layer by layer."""
    relations = TIED_RELATIONS if set(TIED_RELATIONS) <= set(graph.relations) else graph.relations
    relations = relations[: NUM_LAYERS * NUM_HEADS]
    return [(*divmod(position, NUM_HEADS), relation) for position, relation in enumerate(relations)]


def edges_alone(graph: MultiGraph) -> MultiGraph:
    """The graph without weights, as DANGO reconstructs it: an edge is there or not."""
    edges = {name: graph.edge_index(name) for name in graph.relations}
    return MultiGraph.from_edge_index(edges, graph.num_nodes, names=graph.names)


def graph_of(variant: Variant, cell: Cell) -> MultiGraph:
    """The graph that a variant's model is called with."""
    return edges_alone(cell.graph) if variant.model == "DANGO" else cell.graph


def keep_graph(variant: Variant, cell: Cell, out: Path) -> Path:
    """The file of `graph_of`, beside the folders of the runs; written by the first that needs it."""
    graph = graph_of(variant, cell)
    path = out / f"graph-{graph.digest()[:8]}.safetensors"
    if not path.is_file():
        graph.save(path)
    return path


def build(variant: Variant, cell: Cell) -> tuple[nn.Module, Forward]:
    """The untrained model, and how it is called."""
    graph, num_genes = graph_of(variant, cell), cell.graph.num_nodes
    if variant.model == "pair MLP":
        return pair_mlp(graph, cell.features.device)
    features = cell.features if variant.features else None
    genes: dict[str, Any] = {"num_genes": num_genes, "feature_dim": None if features is None else features.shape[1]}
    num_types = len(PERTURBATION_TYPES)
    model: nn.Module
    if variant.model == "DANGO":
        model = Dango(DIM, relations=dict.fromkeys(graph.relations, variant.weight / len(graph.relations)), **genes)
    elif variant.model == "pairwise interaction":
        model = PairwiseInteraction(DIM, num_types=num_types, **genes)
    elif variant.model == "wildtype difference":
        model = WildtypeDifference(DIM, variant.layers, relations=graph.relations, num_types=num_types, mode="delta", **genes)
    else:
        tied = ties(graph) if variant.loss else []
        model = CellTransformer(
            DIM,
            variant.layers,
            NUM_HEADS,
            num_types=num_types,
            ties=[(*tie, variant.weight / len(tied)) for tie in tied],
            ffn_dim=FFN_DIM,
            pool=("sum", "pairwise"),
            hidden_dim=DIM,
            sampled_rows=variant.sampled_rows,
            loss=variant.loss or "kl",  # without a tie there is none
            **genes,
        )
    return model, lambda model, batch: model(graph, batch.seeds, batch.ptr, batch.types, features=features)


def optimizer_of(model: nn.Module, how: Optimization) -> torch.optim.Optimizer:
    """AdamW: the encoder at its own learning rate, weight decay on matrices alone."""
    groups = []
    for in_encoder, lr in ((True, how.encoder_lr), (False, how.lr)):
        named = [p for name, p in model.named_parameters() if name.startswith("encoder.") == in_encoder]
        groups.append({"params": [p for p in named if p.ndim > 1], "lr": lr, "weight_decay": how.decay / lr})
        groups.append({"params": [p for p in named if p.ndim <= 1], "lr": lr, "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98))
