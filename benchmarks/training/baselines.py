"""What a cell transformer has to beat: additive ridge regression and an MLP on pairs of gene embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cellattn import MultiGraph
from cellattn.data import PerturbationDataset
from cellattn.nn import CellOutput

from .engine import Forward

PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Ridge(NamedTuple):
    """y_S = intercept + sum of the effects of the genes of S."""

    effect: Tensor  # float64 [num_genes]
    intercept: float

    def predict(self, data: PerturbationDataset) -> Tensor:
        """float64 [B]"""
        return _design(data) @ self.effect + self.intercept


def fit_ridge(data: PerturbationDataset, penalty: float) -> Ridge:
    """Minimise |y - X effect - intercept|^2 + penalty |effect|^2 in closed form; the intercept is the mean of y."""
    x, y = _design(data), data.y.double()
    intercept = y.mean()
    gram = x.T @ x + penalty * torch.eye(data.num_genes, dtype=torch.float64)
    return Ridge(torch.linalg.solve(gram, x.T @ (y - intercept)), float(intercept))


def _design(data: PerturbationDataset) -> Tensor:
    """1 where a gene is in a set: float64 [B, num_genes]."""
    x = torch.zeros(len(data), data.num_genes, dtype=torch.float64)
    x[torch.arange(len(data)).repeat_interleave(data.ptr.diff()), data.seeds] = 1
    return x


class PairMLP(nn.Module):
    """MLP([e_a + e_b ‖ e_a * e_b]) of a pair of gene embeddings, two hidden layers."""

    def __init__(self, num_genes: int, dim: int = 32, hidden_dim: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_genes, dim)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.mlp = nn.Sequential(
            nn.Linear(2 * dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, 1),
        )

    def forward(self, pairs: Tensor) -> Tensor:
        """Pairs of genes int64 [B, 2] to phenotypes [B, 1]."""
        a, b = self.embedding(pairs).unbind(1)
        return self.mlp(torch.cat([a + b, a * b], 1))


def pair_mlp(graph: MultiGraph, device: torch.device) -> tuple[nn.Module, Forward]:
    """The baseline without graphs; sets of two alone."""
    nothing = torch.zeros((), device=device)
    model = PairMLP(graph.num_nodes).to(device)
    return model, lambda model, batch: CellOutput(model(batch.seeds.view(-1, 2)), {}, nothing)
