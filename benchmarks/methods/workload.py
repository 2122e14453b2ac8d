"""A method on random mutants, by names and numbers alone, and what its steps cost."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cellattn import MultiGraph
from cellattn.data import PERTURBATION_TYPES, PerturbationDataset, synthetic_cell

from .. import options
from ..cells import benchmark_graph
from ..measure import peak_memory, phase_times, synchronize
from ..training.distributed import shares
from ..training.engine import AUTOCAST, PLAIN, Execution, Trainer
from .registry import method_of

SET_SIZE = 3  # genes of a set in the tables, the most that were published


@dataclass(frozen=True)
class Workload:
    """A method on random mutants of a cell, by names and numbers alone, so that another process can make it again.

    Attributes:
        method: see `method_of`.
        genes: of a synthetic cell; None for the cell of `benchmark_graph`.
        file: of a graph that `MultiGraph.save` wrote, in the place of either.
        set_size: genes perturbed in a mutant.
        execution: how its steps are computed.
    """

    method: str
    genes: int | None = None
    file: str | None = None
    set_size: int = 2
    execution: Execution = PLAIN

    def make(self, num_samples: int) -> tuple[Trainer, PerturbationDataset]:
        """The untrained model under AdamW, and that many mutants."""
        if self.file is not None:
            graph = MultiGraph.load(self.file)
        else:
            graph = benchmark_graph()[1] if self.genes is None else synthetic_cell(seed=0, num_genes=self.genes)
        device = torch.device(self.execution.device)
        torch.manual_seed(0)
        model, forward = method_of(self.method).build(graph.to(device), device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        mutants = random_mutants(graph.num_nodes, num_samples, self.set_size)
        return Trainer(model, forward, optimizer, execution=self.execution, clip=1.0), mutants


def random_mutants(num_genes: int, num_samples: int, set_size: int, *, seed: int = 0) -> PerturbationDataset:
    """Sets of `set_size` distinct genes, deleted, with phenotypes from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(num_genes, (num_samples, 1), generator=generator)
    # distinct steps around the circle of genes: no draw is repeated, however large the sets
    stride = torch.randint(1, max(num_genes // max(set_size, 1), 2), (num_samples, 1), generator=generator)
    seeds = ((first + stride * torch.arange(set_size)) % num_genes).flatten()
    ptr = set_size * torch.arange(num_samples + 1)
    types = torch.full_like(seeds, PERTURBATION_TYPES.index("deleted"))
    y = torch.randn(num_samples, generator=generator)
    return PerturbationDataset(seeds, ptr, types, y, num_genes=num_genes)


def time_steps(
    trainer: Trainer,
    data: PerturbationDataset,
    batch_size: int,
    *,
    steps: int = 20,
    least: int = 3,
    warmup: int = 3,
    seconds: float = 60.0,
) -> dict[str, Any]:
    """What steps cost on this process, each on the next `batch_size` samples in a random order.

    Each phase alone, the device idle before it; on a GPU, whose work overlaps with loading, then as many steps in a row.
    Warm-up comes first.

    Args:
        steps: in each measurement, at most.
        least: phase by phase, however long they take; in a row, one.
        seconds: after which a measurement ends.

    Returns:
        "loading" (gathering a batch and sending it to the device), "model" (forward and backward), "optimizer" and "step"
        (all three): median, q20 and q80 in seconds; "steps_per_second" and "samples_per_second", in a row on a GPU and of the
        median step elsewhere; "batch_bytes" that cross the bus; "peak_bytes" of a step above what was there before.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    batches = order.repeat(-(-batch_size * (steps + 1) // len(data))).split(batch_size)

    def phases(step: int, mark: Callable[[], None]) -> None:
        trainer.zero_grad()
        mark()
        parts = list(trainer.load(data, shares(batches[step % steps], passes=trainer.execution.accumulate)))
        mark()
        for weight, batch in parts:
            trainer.backward(batch, weight)
        mark()
        trainer.update()
        mark()

    for step in range(warmup):
        trainer.step(data, batches[step % steps])
    times = phase_times(phases, ("loading", "model", "optimizer"), trainer.device, seconds=seconds, repeats=steps, least=least)
    times["step"] = times.pop("both")
    rate = 1 / times["step"]["median"]
    if trainer.device.type == "cuda":
        synchronize(trainer.device)
        start, done = time.perf_counter(), 0
        while done == 0 or (done < steps and time.perf_counter() - start < seconds):
            trainer.step(data, batches[done % steps])
            done += 1
        synchronize(trainer.device)
        rate = done / (time.perf_counter() - start)
    return {
        **times,
        "steps_per_second": rate,
        "samples_per_second": rate * batch_size,
        "batch_bytes": data.__getitems__(batches[0]).num_bytes,
        "peak_bytes": peak_memory(lambda: trainer.step(data, batches[0])),
    }


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `workload_of` reads."""
    parser.add_argument("method", help="a name in benchmarks.methods.registry.METHODS, or module:attribute")
    parser.add_argument(
        "--genes", type=options.genes, help="of a synthetic cell (default: the real tables, or the published size)"
    )
    parser.add_argument("--set-size", type=options.count, default=2, help="genes perturbed in a mutant (%(default)s)")
    parser.add_argument(
        "--device",
        type=options.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (%(default)s)",
    )
    parser.add_argument("--autocast", choices=AUTOCAST, help="dtype of matrix products")
    parser.add_argument(
        "--compile", type=options.backend, nargs="?", const="inductor", metavar="BACKEND", help="with torch.compile"
    )
    parser.add_argument("--cuda-graph", action="store_true", help="forward and backward as one CUDA graph")


def workload_of(given: argparse.Namespace) -> Workload:
    """What the options of `add_workload_arguments` ask for; raises ValueError and what an import of the method raises."""
    method_of(given.method)
    execution = Execution(given.device, given.autocast, compile=given.compile, cuda_graph=given.cuda_graph)
    return Workload(given.method, given.genes, set_size=given.set_size, execution=execution)
