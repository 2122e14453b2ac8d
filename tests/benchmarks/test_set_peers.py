from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.methods.peers.sets import Predict, dango_peer, ours, pairwise_peer
from cellattn import MultiGraph
from cellattn.data import PerturbationBatch, synthetic_cell
from cellattn.nn import Dango, PairwiseInteraction

N, FEATURES = 80, 6
GRAPH = synthetic_cell(seed=0, num_genes=N, symmetrize=True, self_loops=False)
RELATIONS = GRAPH.relations[:3]
BATCHES: dict[str, list[list[int]]] = {
    "mixed": [[4, 7], [], [1], [0, 10, 4], [3, 2, 9, 14]],
    "pairs": [[i, i + 1] for i in range(40)],
    "empty": [[], []],
}


def batch_of(sets: list[list[int]]) -> PerturbationBatch:
    seeds = torch.tensor([gene for genes in sets for gene in genes], dtype=torch.int64)
    ptr = torch.tensor([0, *(len(genes) for genes in sets)]).cumsum(0)
    return PerturbationBatch(seeds, ptr, torch.ones_like(seeds), torch.zeros(len(sets)))


def features(with_features: bool, dtype: torch.dtype) -> Tensor | None:
    x = torch.randn(N, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.to(dtype) if with_features else None


def outputs(model: nn.Module, predict: Predict, batch: PerturbationBatch) -> tuple[Any, ...]:
    """Predictions, losses, and the gradients of the model's parameters, which a peer shares."""
    out = predict(batch)
    total = out.prediction.pow(3).sum() + out.regularization
    parameters = list(model.parameters())
    grads = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return out.prediction, out.losses, out.regularization, grads


def dango(**options: Any) -> Dango:
    torch.manual_seed(0)
    model = Dango(16, relations=dict(zip(RELATIONS, (0.5, 1.0, 2.0), strict=True)), **options)
    nn.init.constant_(model.sets.rezero, 0.7)
    return model


@pytest.mark.parametrize("with_features", [False, True], ids=["embedding", "features"])
@pytest.mark.parametrize("sets", BATCHES.values(), ids=BATCHES)
def test_dango(sets: list[list[int]], with_features: bool) -> None:
    model = dango(num_genes=N, feature_dim=FEATURES if with_features else None).double()
    x = features(with_features, torch.float64)
    got, want = (outputs(model, make(model, GRAPH, features=x), batch_of(sets)) for make in (ours, dango_peer))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)  # float64, in another order of summation


@pytest.mark.parametrize("with_features", [False, True], ids=["embedding", "features"])
@pytest.mark.parametrize("sets", BATCHES.values(), ids=BATCHES)
def test_pairwise(sets: list[list[int]], with_features: bool) -> None:
    torch.manual_seed(0)
    feature_dim = FEATURES if with_features else None
    model = PairwiseInteraction(16, num_types=3, num_genes=N, feature_dim=feature_dim, dropout=0.0, max_size=4).double()
    x = features(with_features, torch.float64)
    got, want = (outputs(model, make(model, GRAPH, features=x), batch_of(sets)) for make in (ours, pairwise_peer))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_float32_as_it_is_timed() -> None:
    model = dango(num_genes=N)
    got, want = (outputs(model, make(model, GRAPH), batch_of(BATCHES["pairs"])) for make in (ours, dango_peer))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # sums of N^2 squares in float32 on the peer's side


@pytest.mark.parametrize(
    ("graph", "options", "message"),
    [
        (GRAPH, {"sampled_rows": 3, "num_genes": N}, "model: the dense loss has all rows, got sampled_rows=3"),
        (GRAPH.extend(1), {"num_genes": N + 1}, "graph: the dense loss has all pairs, but genes are unknown in"),
    ],
    ids=["sampled rows", "unknown genes"],
)
def test_what_the_dense_loss_is_not_written_for(graph: MultiGraph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dango_peer(dango(**options), graph)
