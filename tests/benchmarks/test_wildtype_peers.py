from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn import MultiGraph
from cellattn.data import PerturbationBatch, synthetic_cell
from cellattn.nn import WildtypeDifference

wildtype_peers = pytest.importorskip("benchmarks.methods.peers.wildtype")  # needs PyG
GRAPH = synthetic_cell(seed=0, num_genes=40)
SEEDS, PTR = torch.tensor([4, 7, 1, 0, 10, 4]), torch.tensor([0, 2, 3, 3, 6])
BATCH = PerturbationBatch(SEEDS, PTR, torch.tensor([1, 2, 1, 1, 2, 1]), torch.zeros(4))
CASES = [("lazy", None), ("khop", 1), ("khop", 2), ("delta", None)]


def model(**options: Any) -> WildtypeDifference:
    torch.manual_seed(0)
    defaults = {"relations": GRAPH.relations, "num_types": 3, "num_genes": 40, "dropout": 0.0}
    cell = WildtypeDifference(16, 2, **{**defaults, **options})
    for name, parameter in cell.named_parameters():
        if name.endswith(("eps", "bias")):  # at 0 to begin with
            torch.nn.init.normal_(parameter, std=0.5)
    return cell.double()


@pytest.mark.parametrize("conv", ["sage", "gin", "gat"])
@pytest.mark.parametrize(("mode", "num_hops"), CASES, ids=str)
def test_predictions_are_the_same(conv: str, mode: str, num_hops: int | None) -> None:
    cell = model(conv=conv, mode=mode, num_hops=num_hops)
    ours = cell(GRAPH, BATCH.seeds, BATCH.ptr, BATCH.types).prediction
    theirs = wildtype_peers.predict(cell, GRAPH, BATCH)
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    assert ours.std() > 1e-2  # that they are told apart


def test_features_ids_and_mean() -> None:
    x, ids = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(40).flip(0)
    cell = model(feature_dim=5, relations=GRAPH.relations[2:5], readout="mean", out_dim=2)
    ours = cell(GRAPH, BATCH.seeds, BATCH.ptr, BATCH.types, features=x, gene_ids=ids).prediction
    theirs = wildtype_peers.predict(cell, GRAPH, BATCH, features=x, gene_ids=ids)
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("conv", ["sage", "gin", "gat"])
def test_gradients_are_the_same(conv: str) -> None:
    """A step costs what ours costs: every parameter of the copy has a gradient, and the shared ones have ours."""
    cell = model(conv=conv)
    peer = wildtype_peers.PyG(cell, GRAPH)
    shared = [*cell.tokens.parameters(), *cell.mlp.parameters(), cell.by_type.weight]
    grads: list[tuple[Tensor, ...]] = []
    for prediction in (cell(GRAPH, SEEDS, PTR, BATCH.types).prediction, peer(peer.load(BATCH), BATCH)):
        grads.append(torch.autograd.grad(prediction.square().sum(), shared, retain_graph=True))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    prediction.square().sum().backward()
    without = [name for name, parameter in peer.layers.named_parameters() if parameter.grad is None]
    assert without == []


def test_weights_are_refused() -> None:
    weight = {"a": torch.tensor([1.0, 2.0])}
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 1], [1, 2]])}, 3, edge_weight=weight)
    with pytest.raises(ValueError, match="graph: expected weights of 1, got others in 'a'"):
        wildtype_peers.PyG(model(relations=("a",), num_genes=3), graph)


def test_masked_samples_are_the_cell_without_the_deleted() -> None:
    loaded = wildtype_peers.PyG(model(), GRAPH).load(BATCH)
    for sample, (begin, end) in enumerate(itertools.pairwise(PTR.tolist())):
        one, gone = loaded[sample], SEEDS[begin:end]
        assert one["gene"].pert_mask.nonzero()[:, 0].tolist() == sorted(gone.tolist())
        for name in GRAPH.relations:
            row, col = GRAPH.edge_index(name)
            kept = ~(torch.isin(row, gone) | torch.isin(col, gone))
            assert torch.equal(one["gene", name, "gene"].edge_index, torch.stack([col[kept], row[kept]]))
