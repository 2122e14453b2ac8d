"""One training engine for every model: steps on one device or several, what they cost, and the largest batch that fits.

A method is a model and how it is called; `Trainer` runs its steps. The ranges of a step (NVTX, and torch.profiler's) are
"loading", "transfer", "encoder", "head", "losses", "backward", "reduction" and "optimizer".

    python -m benchmarks.engine METHOD [--genes N] [--set-size K] [--cap B]     # the largest batch, by trying
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellattn import MultiGraph
from cellattn._profiling import span
from cellattn.data import PERTURBATION_TYPES, PerturbationBatch, PerturbationDataset, batches_on, synthetic_cell
from cellattn.nn import CellOutput

from . import processes
from .cells import benchmark_graph
from .distributed import Share, shares, sum_over_ranks, world_size
from .measure import peak_memory, phase_times, resident, synchronize

Forward = Callable[[nn.Module, PerturbationBatch], CellOutput]
Loss = Callable[[Tensor, Tensor], Tensor]
AUTOCAST = {"bf16": torch.bfloat16}  # float16 would need its losses scaled


@dataclass(frozen=True)
class Method:
    """A model of a cell: what builds it, untrained, on a device, and how it is called on a batch."""

    name: str
    build: Callable[[MultiGraph, torch.device], tuple[nn.Module, Forward]]


def method_of(name: str) -> Method:
    """A method by its name in `benchmarks.methods.METHODS`, or by where it stands: "module:attribute"."""
    module, _, attribute = name.rpartition(":")
    if module:
        found: Method = getattr(importlib.import_module(module), attribute)
        return found
    from .methods import METHODS

    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, or module:attribute, got {name!r}")
    return METHODS[name]


# ------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Execution:
    """How steps are computed, which changes their speed and rounding, and nothing else.

    Attributes:
        device: "cpu", "cuda" or "cuda:1".
        autocast: "bf16", or None for the model's own dtype.
        accumulate: passes in which a rank computes its share of the batch.
        compile: a backend of torch.compile such as "inductor", or None.
        cuda_graph: replay forward and backward of full passes as one CUDA graph. Their sets are padded to as many entries
            as the largest set of the dataset would need.
    """

    device: str = "cpu"
    autocast: str | None = None
    accumulate: int = 1
    compile: str | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.autocast is not None and self.autocast not in AUTOCAST:
            raise ValueError(f"autocast: expected one of {', '.join(AUTOCAST)}, or None, got {self.autocast!r}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {self.accumulate}")
        if self.cuda_graph and torch.device(self.device).type != "cuda":
            raise ValueError(f"cuda_graph: expected device 'cuda', where CUDA graphs are, got {self.device!r}")


def mean_squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """Of predictions [B, P] against phenotypes y [B, P], or [B] where P is 1; at least float32."""
    prediction = prediction.reshape(y.shape)
    return F.mse_loss(prediction.to(torch.promote_types(prediction.dtype, y.dtype)), y)


class Trainer:
    """Steps of gradient descent on global batches, which the ranks share.

    Gradients are those of `loss + regularization` over the whole batch, however it is divided over ranks and passes: each
    pass counts by its share of the samples, and so does the regularization that it computes anew. Losses and weights are
    thereby those of one process and one pass, up to the order of sums and to the dropout of the samples.

    Args:
        model: on the device.
        forward: how the model is called.
        optimizer: of its parameters.
        execution: see `Execution`.
        clip: largest norm of the gradients, or None.
        loss: of predictions [B, P] and phenotypes, a mean over samples.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        optimizer: torch.optim.Optimizer,
        *,
        execution: Execution | None = None,
        clip: float | None = None,
        loss: Loss = mean_squared_error,
    ) -> None:
        self.model, self.forward, self.optimizer = model, forward, optimizer
        self.execution = Execution() if execution is None else execution
        self.device = torch.device(self.execution.device)
        self.clip, self.loss = clip, loss
        backend = self.execution.compile
        self._callable: Any = model if backend is None else torch.compile(model, backend=backend)
        self._captured: _Captured | None = None

    def step(self, data: PerturbationDataset, samples: Tensor, *, seed: int | None = None) -> Tensor:
        """Learn from one global batch.

        Args:
            data: the dataset.
            samples: int64, positions in it, the same on all ranks.
            seed: of the random numbers of the step. All passes of all ranks then draw the same rows and, in the encoder, the
                same masks, since they are of one cell. None: each pass goes on with the default generators.

        Returns:
            float32 [2] on the device: the loss and the regularization, of the global batch.
        """
        self.model.train()
        self.zero_grad()
        total = torch.zeros(2, device=self.device)
        for weight, batch in self.load(data, shares(samples, passes=self.execution.accumulate)):
            if self.execution.cuda_graph and self._captured is None:
                entries = len(batch) * int(data.ptr.diff().max())
                self._captured = _Captured(self._gradients, pad(batch, entries, data.num_genes), len(batch), data.num_genes)
            total += self.backward(batch, weight, seed=seed)
        if world_size() > 1:
            with span("reduction"):
                sum_over_ranks([total, *(p.grad for p in self.model.parameters() if p.grad is not None)])
        self.update()
        return total

    def load(self, data: PerturbationDataset, parts: list[Share]) -> Iterator[tuple[float, PerturbationBatch]]:
        """Gather the samples of each pass and send them to the device, where `backward` takes them."""

        def gathered() -> Iterator[PerturbationBatch]:
            for samples, _ in parts:
                with span("loading"):
                    batch = data.__getitems__(samples)
                yield batch

        yield from zip((part.weight for part in parts), batches_on(self.device, gathered()), strict=True)

    def zero_grad(self) -> None:
        """Begin a step: no gradients; a CUDA graph adds to tensors that have to stay where they are."""
        self.optimizer.zero_grad(set_to_none=self._captured is None)

    def backward(self, batch: PerturbationBatch, weight: float = 1.0, *, seed: int | None = None) -> Tensor:
        """Add the gradients of a pass, times its weight, to those of the parameters; its losses times weight, [2], detached."""
        if seed is not None:
            torch.manual_seed(seed)
        if self._captured is not None and self._captured.num_sets == len(batch):
            return self._captured(batch, weight)
        return self._gradients(batch, weight)

    def update(self) -> None:
        """Clip the gradients and take the step."""
        with span("optimizer"):
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()

    def _gradients(self, batch: PerturbationBatch, weight: float | Tensor) -> Tensor:
        dtype = AUTOCAST.get(self.execution.autocast or "")
        autocast: Any = contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
        with autocast:
            output = self.forward(self._callable, batch)
        with span("losses"):
            # a padded batch has further sets behind its own, and no phenotypes for them
            loss = self.loss(output.prediction[: len(batch.y)], batch.y)
            total = (loss + output.regularization) * weight
        with span("backward"):
            total.backward()
        return torch.stack([loss.detach(), output.regularization.detach()]) * weight


def pad(batch: PerturbationBatch, num_entries: int, num_genes: int) -> PerturbationBatch:
    """The batch with `num_entries` entries, always in as many sets: further ones behind its own take what is left.

    These hold each gene at most once, of type 1, and have no phenotype: y stays as it is.

    Raises:
        ValueError: there are more entries already.
    """
    spare = num_entries - len(batch.seeds)
    if spare < 0:
        raise ValueError(f"batch: expected at most {num_entries} entries, got {len(batch.seeds)}")
    device = batch.seeds.device
    ends = (num_genes * torch.arange(1, -(-num_entries // num_genes) + 1, device=device)).clamp(max=spare)
    return PerturbationBatch(
        torch.cat([batch.seeds, torch.arange(spare, device=device) % num_genes]),
        torch.cat([batch.ptr, len(batch.seeds) + ends]),
        torch.cat([batch.types, batch.types.new_ones(spare)]),
        batch.y,
    )


class _Captured:
    """A pass as a CUDA graph over inputs that stay where they are; gradients are added to those that the parameters have."""

    def __init__(
        self,
        gradients: Callable[[PerturbationBatch, Tensor], Tensor],
        padded: PerturbationBatch,
        num_sets: int,
        num_genes: int,
    ) -> None:
        self.inputs, self.num_sets, self.num_genes = padded, num_sets, num_genes
        self.weight = torch.zeros((), device=padded.y.device)  # so that warming up adds nothing
        self.losses, self.replay = self._capture(lambda: gradients(padded, self.weight))

    def _capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What run() returns, and how to compute it again in the same place."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = run()
        return losses, graph.replay

    def __call__(self, batch: PerturbationBatch, weight: float) -> Tensor:
        self.inputs.copy_(pad(batch, len(self.inputs.seeds), self.num_genes))
        self.weight.fill_(weight)
        self.replay()
        return self.losses.clone()


# ------------------------------------------------------------------------------------------------------- what it costs


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
    execution: Execution = Execution()

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


# ------------------------------------------------------------------------------------------------------- the largest batch


OUT_OF_MEMORY = 77  # exit status of a try


class Try(NamedTuple):
    """One batch size that was tried."""

    batch_size: int
    fits: bool
    peak_bytes: int | None  # of the device's memory, or of the resident set of the process; None where it did not fit


@dataclass(frozen=True)
class LargestBatch:
    """What `largest_batch` found: `batch_size` fits, `limit`, if there is one, does not; with all that was tried."""

    batch_size: int  # 0: not even one
    limit: int | None  # the smallest size that did not fit; None: the cap did
    peak_bytes: int | None
    tries: tuple[Try, ...]


def largest_batch(
    work: Workload,
    *,
    first: int = 1,
    cap: int,
    budget: int | None = None,
    resolution: float = 0.05,
    timeout: float = 600.0,
    threads: int | None = None,
) -> LargestBatch:
    """Measure the largest batch of which two whole steps fit: doubling, then bisection, each try a process of its own.

    What this process holds on a GPU is missing there: search before anything is on it.

    Args:
        first: the size that is tried first.
        cap: where to stop: no size above it is tried.
        budget: bytes that may be used: of the process's resident set on the CPU (needed there), of the GPU's memory else
            (default: all of it).
        resolution: bisection ends where the size that fits is within this share of one that does not.
        timeout: seconds for a try; longer is an error, as it says nothing about memory.
        threads: of a try on the CPU; as many as this process has if None.

    Raises:
        RuntimeError: a try failed in another way than by memory; the message ends with its traceback.
    """
    if budget is None and work.execution.device == "cpu":
        raise ValueError("budget: expected bytes, since a CPU's memory is the machine's, got None")
    for name, value in (("first", first), ("cap", cap)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    # One process for all tries, which imports everything, touches no GPU, and is forked for each. It computes with one thread,
    # because a forked process waits in vain for a pool of threads that OpenMP made before.
    question = {
        "work": asdict(work), "first": first, "cap": cap, "budget": budget, "resolution": resolution, "timeout": timeout,
        "threads": torch.get_num_threads() if threads is None else threads,
    }  # fmt: skip
    command = [sys.executable, "-c", "from benchmarks.engine import answer; answer()", json.dumps(question)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        ended = processes.run(command, env=env, output=output, errors=errors)
        for file in (output, errors):
            file.seek(0)
        said, complaint = output.read(), errors.read()
    if ended.status != 0:
        raise RuntimeError(f"largest batch of {work.method}: {complaint[-4000:]}")
    found = json.loads(said.splitlines()[-1])
    return LargestBatch(**{**found, "tries": tuple(Try(*one) for one in found["tries"])})


def answer() -> None:
    """What `largest_batch` starts: search as the command line asks, and print what was found."""
    processes.end_with_parent()
    question = json.loads(sys.argv[1])
    fields = question.pop("work")
    work = Workload(**{**fields, "execution": Execution(**fields["execution"])})
    importlib.import_module("torch._dynamo")  # as the first step of an optimizer would, in every try
    method_of(work.method)
    print(json.dumps(asdict(_search(work, **question))))


def _search(
    work: Workload, *, first: int, cap: int, budget: int | None, resolution: float, timeout: float, threads: int
) -> LargestBatch:
    tries: list[Try] = []

    def fits(batch_size: int) -> bool:
        tries.append(_try_apart(work, batch_size, budget, timeout, threads))
        return tries[-1].fits

    low, high = 0, min(first, cap)
    while fits(high):
        low = high
        if low == cap:
            return LargestBatch(low, None, tries[-1].peak_bytes, tuple(tries))
        high = min(2 * high, cap)
    while high - low > max(1, resolution * low):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    peak = next((one.peak_bytes for one in tries if one.batch_size == low), None)
    return LargestBatch(low, high, peak, tuple(tries))


def _try_apart(work: Workload, batch_size: int, budget: int | None, timeout: float, threads: int) -> Try:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_here, args=(work, batch_size, budget, threads, sender))
    process.start()
    sender.close()
    process.join(timeout)
    about = f"{work.method}, batch of {batch_size}"
    if process.is_alive():
        process.kill()
        process.join()
        raise RuntimeError(f"{about}: not finished after {timeout:g} s")
    if process.exitcode in (OUT_OF_MEMORY, -signal.SIGKILL):  # the latter by the system's own guard
        return Try(batch_size, False, None)
    try:
        said = receiver.recv()
    except EOFError:
        said = f"exit status {process.exitcode}"
    if isinstance(said, str):
        raise RuntimeError(f"{about}: {said}")
    return Try(batch_size, True, said)


def _try_here(work: Workload, batch_size: int, budget: int | None, threads: int, sender: Connection) -> None:
    """Take two steps on a batch and send the bytes at the peak, or the error; or end this process for want of memory."""
    try:
        torch.set_num_threads(threads)
        device = torch.device(work.execution.device)
        if device.type == "cuda" and budget is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / torch.cuda.mem_get_info(device)[1]), device)
        elif budget is not None:
            threading.Thread(target=_watch, args=(budget,), daemon=True).start()
        trainer, data = work.make(batch_size)
        for _ in range(2):
            trainer.step(data, torch.arange(batch_size))
        synchronize(device)
        sender.send(torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _peak_resident())
    except Exception as error:
        if is_out_of_memory(error):
            os._exit(OUT_OF_MEMORY)
        sender.send(traceback.format_exc()[-2000:])


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was missing, for a tensor or for what a GPU's libraries take beside PyTorch."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _watch(budget: int) -> None:
    """End this process as soon as its resident set is above the budget; PyTorch's operators let go of the interpreter lock."""
    while resident() <= budget:
        time.sleep(0.002)
    os._exit(OUT_OF_MEMORY)


def _peak_resident() -> int:
    """Bytes of the resident set at its largest, as the system counted."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `workload_of` reads."""
    parser.add_argument("method", help="a name in benchmarks.methods.METHODS, or module:attribute")
    parser.add_argument("--genes", type=int, help="of a synthetic cell (default: the real tables, or the published size)")
    parser.add_argument("--set-size", type=int, default=2, help="genes perturbed in a mutant (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--autocast", choices=AUTOCAST, help="dtype of matrix products")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="with torch.compile")
    parser.add_argument("--cuda-graph", action="store_true", help="forward and backward as one CUDA graph")


def workload_of(given: argparse.Namespace) -> Workload:
    """What the options of `add_workload_arguments` ask for."""
    execution = Execution(given.device, given.autocast, compile=given.compile, cuda_graph=given.cuda_graph)
    return Workload(given.method, given.genes, set_size=given.set_size, execution=execution)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    parser.add_argument("--cap", type=int, default=2**20, help="no larger batch is tried (%(default)s)")
    parser.add_argument("--budget", type=float, help="GB that may be used (default: all of a GPU)")
    given = parser.parse_args()
    found = largest_batch(workload_of(given), cap=given.cap, budget=given.budget and int(given.budget * 1e9))
    for one in found.tries:
        print(f"{one.batch_size:>9}  {'does not fit' if one.peak_bytes is None else f'{one.peak_bytes / 1e6:,.0f} MB'}")
    print(f"largest batch: {found.batch_size}{' (the cap)' if found.limit is None else f', {found.limit} does not fit'}")


if __name__ == "__main__":
    main()
