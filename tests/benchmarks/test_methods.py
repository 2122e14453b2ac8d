from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.methods import bench, tables
from benchmarks.methods.peers import PEERS
from benchmarks.methods.peers.transformer import DenseCellTransformer
from benchmarks.methods.registry import METHODS, nodes_and_edges
from cellattn import MultiGraph, khop_mask, khop_subgraph
from cellattn.data import PerturbationBatch, synthetic_cell
from cellattn.nn import CellOutput

GENES = 64
SEEDS, PTR = torch.tensor([3, 8, 1, 0, 59]), torch.tensor([0, 2, 2, 5])
BATCH = PerturbationBatch(SEEDS, PTR, torch.ones_like(SEEDS), torch.zeros(3))


class Wrong(DenseCellTransformer):
    """A peer that computes something else."""

    def forward(self, batch: PerturbationBatch) -> CellOutput:
        output = super().forward(batch)
        return output._replace(prediction=output.prediction + 1)


@pytest.fixture(scope="module")
def graph() -> MultiGraph:
    return synthetic_cell(seed=0, num_genes=GENES)


def plan(**given: Any) -> bench.Plan:
    small = {"genes": GENES, "samples": 40, "steps": 3, "seconds_each": 0.01, "cap": 0, "device": "cpu"}
    return bench.short_plan(**{**small, **given})


def test_run(tmp_path: Path) -> None:
    result = bench.run(plan(methods=("cell-transformer",), cap=64, budget=4 * 10**9), out=tmp_path)
    rows = {(row["method"], row["implementation"]): row for row in result["rows"]}
    assert [row for row in rows.values() if "reason" in row] == []
    ours, dense = rows["cell-transformer", "ours"], rows["cell-transformer", "dense PyTorch"]
    assert dense["error"] < 1e-5  # both in float32
    assert ours["batch_size"] == 28
    assert ours["batch_bytes"] == 28 * (8 + 4 + 3 * 16) + 8  # ptr, y, and seeds and types of three genes
    assert ours["largest"]["batch_size"] == 64
    assert ours["largest"]["limit"] is None
    assert ours["largest"]["samples_per_second"] > 0
    written = json.loads((tmp_path / "methods.json").read_text())
    assert written["rows"] == result["rows"]
    lines = list(csv.DictReader((tmp_path / "methods.csv").open()))
    assert [line["method"] for line in lines] == [row["method"] for row in result["rows"]]
    assert all(float(line["model_ms"]) > 0 for line in lines)
    page = (tmp_path / "methods.md").read_text()
    assert "A scaled setting" in page
    assert "(the cap)" in page
    assert (tmp_path / "methods.png").stat().st_size > 1000


def test_memory_is_compared_in_equal_batches(tmp_path: Path, graph: MultiGraph) -> None:
    file = str(tmp_path / "cell.safetensors")
    graph.save(file)
    small = plan(methods=("khop-1",))
    rows: list[dict[str, Any]] = [
        {"method": "khop-1", "implementation": "ours", "batch_size": 28, "peak_bytes": 9},
        {"method": "khop-1", "implementation": "PyG", "batch_size": 2, "peak_bytes": 7},
    ]
    assert tables.peak_beside(rows, "khop-1", rows[1]) is None
    bench.in_equal_batches(small, rows, file, 120.0)
    assert rows[0]["alike"]["batch_size"] == 2
    assert tables.peak_beside(rows, "khop-1", rows[1]) == rows[0]["alike"]["peak_bytes"]
    assert tables.peak_beside(rows, "khop-1", {"batch_size": 28}) == 9


def measure_peer(peer: type[DenseCellTransformer], tmp_path: Path, graph: MultiGraph, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(PEERS["cell-transformer"], "other", peer)
    graph.save(tmp_path / "cell.safetensors")
    return bench.measure(plan(), "cell-transformer", "other", str(tmp_path / "cell.safetensors"))


def test_a_peer_that_is_wrong_gets_no_speed(tmp_path: Path, graph: MultiGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArithmeticError, match="predictions differ from ours"):
        measure_peer(Wrong, tmp_path, graph, monkeypatch)


def test_a_process_that_dies_is_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_work", _die)
    row = bench.measure_elsewhere(plan(), "pairwise", None, str(tmp_path), 60.0)
    assert row == {"method": "pairwise", "implementation": "ours", "reason": "killed, most likely for want of memory"}


def _die(sender: Any, *arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_failure_is_a_row_with_the_reason(tmp_path: Path) -> None:
    row = bench.measure_elsewhere(plan(), "pairwise", None, str(tmp_path / "absent"), 60.0)
    assert "absent" in row["reason"]
    text = tables.times_table([row])
    assert "no figure" in text


@pytest.mark.parametrize("method", ["lazy", "khop-1", "khop-2"])
def test_genes_and_edges_a_sample(graph: MultiGraph, method: str) -> None:
    nodes, edges = nodes_and_edges(method, graph, BATCH)
    if method == "lazy":
        assert (nodes, edges) == (GENES, graph.num_edges())
        return
    subgraphs = khop_subgraph(graph, SEEDS, PTR, int(method[-1]))
    assert nodes == pytest.approx(subgraphs.num_nodes / 3)
    assert edges == pytest.approx(subgraphs.num_edges() / 3)


def test_edges_along_which_a_difference_is_sent(graph: MultiGraph) -> None:
    first, second, third = (khop_mask(graph, SEEDS, PTR, hops, traversal="mixed") for hops in range(3))
    edges = 0
    for relation in graph.relations:
        row, col = graph.edge_index(relation)
        for source, target in ((first, second), (second, third)):
            edges += int((target[:, row] & source[:, col]).sum())
    nodes, counted = nodes_and_edges("delta", graph, BATCH)
    assert nodes == pytest.approx(int(third.sum()) / 3)
    assert counted == pytest.approx(edges / 3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_predicts(graph: MultiGraph, method: str) -> None:
    torch.manual_seed(0)
    model, forward = METHODS[method].build(graph, torch.device("cpu"))
    two = PerturbationBatch(
        torch.tensor([3, 8, 1, 0]), torch.tensor([0, 2, 4]), torch.ones(4, dtype=torch.int64), torch.zeros(2)
    )
    output = forward(model, two)
    assert output.prediction.shape == (2, 1)
    (output.prediction.sum() + output.regularization).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("device", "method", "autocast"),
    [("cpu", "cell-transformer-published", None), ("cuda", "cell-transformer-published", "bf16"), ("cuda", "lazy", None)],
)
def test_precision(device: str, method: str, autocast: str | None) -> None:
    assert plan(device=device).execution(method).autocast == autocast
    assert plan(device=device, autocast="bf16").execution(method).autocast == "bf16"
