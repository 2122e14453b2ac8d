"""The training engine on a GPU: a step replayed as a CUDA graph is the step, and batches arrive as they left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.methods.workload import Workload, random_mutants, time_steps
from benchmarks.training.engine import Execution, Trainer
from cellattn.data import PerturbationDataset, batches_on, synthetic_cell

from ..benchmarks.test_engine import transformer

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


def descend(data: PerturbationDataset, execution: Execution) -> tuple[list[list[float]], list[Tensor]]:
    """Six steps of 24 samples, the last of an epoch smaller, each from a seed of its own."""
    graph = synthetic_cell(seed=0, num_genes=200).to("cuda")
    torch.manual_seed(0)
    model, forward = transformer(graph, torch.device("cuda"), sampled_rows=0.5)
    trainer = Trainer(model, forward, torch.optim.SGD(model.parameters(), lr=0.1), execution=execution, clip=1.0)
    batches = torch.arange(len(data)).split(24) * 2
    losses = [trainer.step(data, batch, seed=step).tolist() for step, batch in enumerate(batches)]
    return losses, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(("autocast", "tolerance"), [(None, 1e-4), ("bf16", 3e-2)], ids=["float32", "bf16"])
@pytest.mark.parametrize("passes", [1, 2], ids="{}-passes".format)
def test_cuda_graph_is_the_step(passes: int, autocast: str | None, tolerance: float) -> None:
    """Sets of 0 to 3 genes, so that replays are padded; products over padded batches may be summed in another order."""
    sets = [list(range(n, n + n % 4)) for n in range(60)]
    data = PerturbationDataset.from_sets(sets, torch.randn(60), num_genes=200)
    got, want = (descend(data, Execution("cuda", autocast, passes, cuda_graph=replayed)) for replayed in (True, False))
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(want[0]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], want[1], rtol=tolerance, atol=tolerance)


def test_batches_arrive() -> None:
    data = random_mutants(50, 30, 3)
    sent = [data.__getitems__(range(n, n + 10)) for n in (0, 10, 20)]
    for batch, moved in zip(sent, batches_on("cuda", sent), strict=True):
        for name in ("seeds", "ptr", "types", "y"):
            assert getattr(moved, name).device.type == "cuda"
            assert torch.equal(getattr(moved, name).cpu(), getattr(batch, name))


@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}, {"autocast": "bf16"}], ids=str)
def test_time_steps(options: dict[str, Any]) -> None:
    trainer, data = Workload("cell-transformer", genes=200, execution=Execution("cuda", **options)).make(100)
    times = time_steps(trainer, data, 10, steps=5)
    assert 0 < times["model"]["median"] < times["step"]["median"]
    assert times["peak_bytes"] > 0
