"""One training engine for every model: steps on one device or several.

The ranges of a step (NVTX, and torch.profiler's) are
"loading", "transfer", "encoder", "head", "losses", "backward", "reduction" and "optimizer".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellattn._profiling import span
from cellattn.data import PerturbationBatch, PerturbationDataset, batches_on
from cellattn.nn import CellOutput

from .distributed import Share, shares, sum_over_ranks, world_size

Forward = Callable[[nn.Module, PerturbationBatch], CellOutput]
Loss = Callable[[Tensor, Tensor], Tensor]
AUTOCAST = {"bf16": torch.bfloat16}  # float16 would need its losses scaled


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


PLAIN = Execution()


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
