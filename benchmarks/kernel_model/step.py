"""A training step of the published transformer, launch by launch, and the least that a chip needs for each."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.methods import METHODS
from cellattn import MultiGraph, _extension
from tests.nn.launches import Launches
from tests.ops.test_cuda_fake import graph_on

from .chips import Chip
from .cost import Cost, cost_of
from .launches import on
from .trips import Tied

_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}  # where their two matrices stand


@dataclass
class Work(Launches):
    """What PyTorch's own operators do: multiply-adds of products of matrices, and the bytes that each reads and writes."""

    products: list[tuple[int, int]] = field(default_factory=list)  # multiply-adds, bytes
    moved: list[int] = field(default_factory=list)  # bytes, of every other operator

    def __post_init__(self) -> None:
        super().__init__()

    def launched(self, name: str, args: Any, out: Any) -> None:
        tensors = list(_tensors((args, out)))
        size = sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())
        if name in _PRODUCTS:
            a, b = (args[i] for i in _PRODUCTS[name])
            self.products.append((a.numel() * b.shape[-1], size))
        else:
            self.moved.append(size)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _tensors(x)


@dataclass(frozen=True)
class Step:
    """What a step launches and what that costs at least, in seconds."""

    kernels: dict[str, tuple[int, float]]  # of ours: how many launches, and all of them together
    products: float  # by flops or bytes, whichever takes longer
    moved: float
    launches: int
    optimizer: float

    @property
    def seconds(self) -> float:
        return sum(time for _, time in self.kernels.values()) + self.products + self.moved + self.optimizer


@contextmanager
def _served() -> Iterator[None]:
    """The extension's operators answer on "meta", and so does autocast."""
    devices = {*_extension._DEVICES, "meta"}
    with (
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(_extension, "_DEVICES", devices),
    ):
        yield


def step_of(graph: MultiGraph, chip: Chip, *, method: str = "cell-transformer-published", sets: int = 256) -> Step:
    """Of a batch of pairs, parameters and activations in bfloat16, the optimizer's state in float32.

    The head's kernels for sets have no rule for their rounds and are charged with the bytes that they move.
    """
    model, _ = METHODS[method].build(graph, torch.device("cpu"))
    parameters = sum(p.numel() for p in model.parameters())
    model = model.to(torch.bfloat16).to("meta")
    there, tied = graph_on("meta", graph), Tied.of(graph)

    class Batch:
        seeds = torch.empty(2 * sets, dtype=torch.int64, device="meta")
        ptr = torch.empty(sets + 1, dtype=torch.int64, device="meta")
        types = torch.empty(2 * sets, dtype=torch.int64, device="meta")

    _replace_max_size(model, 2)
    work = Work()
    with _served(), on(chip) as launched, work:
        output = model(there, Batch.seeds, Batch.ptr, Batch.types)
        (output.prediction.square().mean() + output.regularization).backward()
    costs: list[Cost] = []
    other: Counter[str] = Counter()
    seconds_of_other: Counter[str] = Counter()
    for launch in launched:
        try:
            costs.append(cost_of(launch, chip, tied))
        except KeyError:
            tensors = [x for x in launch.args.values() if isinstance(x, Tensor)]
            other[launch.fn.__name__] += 1
            seconds_of_other[launch.fn.__name__] += sum(x.numel() * x.element_size() for x in tensors) / chip.dram  # type: ignore[assignment]
    kernels = {name: (other[name], float(seconds_of_other[name])) for name in other}
    for name, group in itertools.groupby(sorted(costs, key=lambda cost: cost.kernel), key=lambda cost: cost.kernel):
        same = list(group)
        kernels[name] = len(same), sum(cost.predicted for cost in same)
    peak = chip.tensor * chip.multiprocessors * chip.clock
    return Step(
        kernels=kernels,
        products=sum(max(n / peak, size / chip.dram) for n, size in work.products),
        moved=sum(work.moved) / chip.dram,
        launches=len(launched) + work.count.total(),
        # AdamW: parameter, two moments read and written, gradient read, each in float32
        optimizer=parameters * 4 * 7 / chip.dram,
    )


def _replace_max_size(model: nn.Module, size: int) -> None:
    """Sets of at most so many genes, so that nothing waits for their sizes."""
    for module in model.modules():
        if hasattr(module, "max_size"):
            setattr(module, "max_size", size)  # noqa: B010  # a Module's attributes have no type of their own
