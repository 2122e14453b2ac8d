"""A training step of the published transformer, launch by launch, and the least that a chip needs for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods.registry import METHODS
from cellattn import MultiGraph
from tests.nn.launches import Launches, served_on_meta
from tests.ops.test_cuda_fake import graph_on

from .chips import Chip
from .cost import cost_of
from .launches import on
from .subjects import PAIRS
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


def step_of(graph: MultiGraph, chip: Chip, loss: str, *, sets: int = PAIRS) -> Step:
    """Of a batch of pairs, parameters and activations in bfloat16, the optimizer's state in float32.

    Args:
        loss: of the ties, "kl" or "bce" (over every non-edge; no row has a sharp entry).
    """
    model, _ = METHODS["cell-transformer-published"].build(graph, torch.device("cpu"), loss=loss)  # type: ignore[call-arg]
    parameters = sum(p.numel() for p in model.parameters())
    model = model.to(torch.bfloat16).to("meta")
    there, tied = graph_on("meta", graph), Tied.of(graph, **_pairs(graph.num_nodes, sets))
    seeds, ptr, types = (torch.empty(n, dtype=torch.int64, device="meta") for n in (2 * sets, sets + 1, 2 * sets))
    _replace_max_size(model, 2)
    work = Work()
    with served_on_meta(), on(chip) as launched, work:
        output = model(there, seeds, ptr, types)
        (output.prediction.square().mean() + output.regularization).backward()
    seconds: dict[str, list[float]] = defaultdict(list)
    for launch in launched:
        seconds[launch.fn.__name__].append(cost_of(launch, chip, tied).predicted)
    peak = chip.tensor * chip.multiprocessors * chip.clock
    return Step(
        kernels={name: (len(times), sum(times)) for name, times in seconds.items()},
        products=sum(max(n / peak, size / chip.dram) for n, size in work.products),
        moved=sum(work.moved) / chip.dram,
        launches=len(launched) + work.count.total(),
        # AdamW: parameter, two moments read and written, gradient read, each in float32
        optimizer=parameters * 4 * 7 / chip.dram,
    )


def _pairs(num_genes: int, sets: int) -> dict[str, Tensor]:
    """Where pairs begin, and where the places of each gene among them."""
    gene = torch.randint(num_genes, (2 * sets,), generator=torch.Generator().manual_seed(0)).sort().values
    return {"ptr_ptr": 2 * torch.arange(sets + 1), "geneptr_ptr": torch.searchsorted(gene, torch.arange(num_genes + 1))}


def _replace_max_size(model: nn.Module, size: int) -> None:
    """Sets of at most so many genes, so that nothing waits for their sizes."""
    for module in model.modules():
        if hasattr(module, "max_size"):
            setattr(module, "max_size", size)  # noqa: B010  # a Module's attributes have no type of their own
