from __future__ import annotations

import pytest
import torch

from benchmarks.methods.peers.transformer import DenseCellTransformer
from cellattn import MultiGraph
from cellattn.data import PERTURBATION_TYPES, PerturbationBatch, synthetic_cell
from cellattn.nn import CellTransformer

N = 60


@pytest.fixture(scope="module")
def graph() -> MultiGraph:
    return synthetic_cell(seed=0, num_genes=N)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("cross_heads", [1, 2])
def test_dense_equals_ours(graph: MultiGraph, norm: str, cross_heads: int) -> None:
    torch.manual_seed(0)
    ties = [(0, 1, "physical", 0.5), (1, 0, "string12_database", 0.25)]
    model = CellTransformer(
        16, 2, 2, num_types=len(PERTURBATION_TYPES), num_genes=N, ties=ties, norm=norm, cross_heads=cross_heads,
        pool=("sum", "pairwise"), dropout=0.0,
    ).double()  # fmt: skip
    seeds, ptr = torch.tensor([3, 8, 1, 0, 59]), torch.tensor([0, 2, 2, 5])
    batch = PerturbationBatch(seeds, ptr, torch.tensor([1, 3, 1, 1, 2]), torch.zeros(3))
    ours, dense = model(graph, seeds, ptr, batch.types), DenseCellTransformer(model, graph).forward(batch)
    torch.testing.assert_close(dense.prediction, ours.prediction)
    torch.testing.assert_close(dense.losses, ours.losses)  # the dense targets are float32
    for out in (ours, dense):
        (out.prediction.square().sum() + out.regularization).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        if out is ours:
            expected = grads
    assert len(grads) == len(expected) > 20
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-7)
