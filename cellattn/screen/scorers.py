"""Scores of very many sets of genes with one trained model, whose cell is encoded once.

A model says what its sets share by a method `screening` (`cellattn.nn.screening`). One without is called on batches.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._check import describe, require, require_count, require_indices, require_tensor, values_visible
from ..data.dataset import PERTURBATION_TYPES
from ..graph import MultiGraph

DELETED = PERTURBATION_TYPES.index("deleted")
BATCH = 4096  # sets of one call of a model that shares nothing
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Scorer(Protocol):
    """Scores sets of genes.

    Attributes:
        num_genes: genes are 0 to num_genes - 1.
        num_types: perturbation types are 0 to num_types - 1.
        dtype: of the products.
    """

    num_genes: int
    num_types: int
    dtype: torch.dtype

    def score(self, genes: Tensor, types: Tensor | None = None) -> Tensor:
        """One prediction a set.

        Args:
            genes: int64 [B, k], the genes of each set, no gene twice in a set.
            types: int64 [B, k], their perturbation types; None: "deleted".

        Returns:
            float [B], in the phenotype's units: float64 where the products are, else float32.

        Raises:
            ValueError: a shape, gene or type that does not fit. TypeError: an argument of a wrong type.
        """
        ...


def make_scorer(
    model: nn.Module,
    graph: MultiGraph | None = None,
    *,
    phenotype: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    num_threads: int | None = None,
    features: Tensor | None = None,
    gene_ids: Tensor | None = None,
) -> Scorer:
    """Get a trained model ready to score sets of genes: in evaluation, on a copy, the cell encoded once.

    Args:
        model: of `cellattn.nn`; or any module that is called as `model(graph, seeds, ptr, types)`, or `model(seeds, ptr,
            types)` without a graph, and returns predictions [B], [B, out_dim], or a tuple that starts with them. That one has
            attributes `num_genes`, if there is no graph, and `num_types`, if not those of `PERTURBATION_TYPES`.
        graph: the gene graphs of N genes.
        phenotype: which of the model's predictions.
        dtype: of the products: float32, bfloat16 or float64; the model's by default.
        device: where to score; that of the graph, or else of the model, by default.
        num_threads: of PyTorch, on the CPU, while scoring; unchanged by default.
        features, gene_ids: as the model's `forward` takes them.

    Raises:
        ValueError: an argument out of range. TypeError: one of a wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {describe(model)}")
    if graph is not None and not isinstance(graph, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph or None, got {describe(graph)}")
    require_count("phenotype", phenotype)
    if num_threads is not None:
        require_count("num_threads", num_threads, minimum=1)
    require(dtype is None or dtype in DTYPES, lambda: f"dtype: expected one of {DTYPES}, got {dtype}")
    first = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    if device is None:
        device = first.device if graph is None else graph.device
    device = torch.device(device)
    dtype = first.dtype if dtype is None else dtype
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model = model.to(device=device, dtype=torch.float64 if dtype == torch.float64 else None)
    graph = None if graph is None else graph.to(device)
    inputs = {"features": features, "gene_ids": gene_ids}
    given = {name: x.to(device) for name, x in inputs.items() if x is not None}
    return _Calls(model, graph, given, phenotype, dtype, device, num_threads)


class _Calls:
    """A model called on batches of sets."""

    def __init__(
        self,
        model: nn.Module,
        graph: MultiGraph | None,
        inputs: dict[str, Tensor],
        phenotype: int,
        dtype: torch.dtype,
        device: torch.device,
        num_threads: int | None,
    ) -> None:
        num_genes = getattr(model, "num_genes", None) if graph is None else graph.num_nodes
        if not isinstance(num_genes, int):
            raise TypeError("graph: expected a MultiGraph, since the model has no attribute num_genes; got None")
        self.num_genes = num_genes
        self.num_types = int(getattr(model, "num_types", len(PERTURBATION_TYPES)))
        self.dtype, self._phenotype, self._device, self._num_threads = dtype, phenotype, device, num_threads
        self._call = lambda *sets: model(*(() if graph is None else (graph,)), *sets, **inputs)

    def score(self, genes: Tensor, types: Tensor | None = None) -> Tensor:
        genes, types = _checked(self, genes, types, self._device)
        with torch.no_grad(), _threads(self._num_threads):
            parts = [self._batch(*part) for part in zip(genes.split(BATCH), types.split(BATCH), strict=True)]
        return torch.cat(parts)

    def _batch(self, genes: Tensor, types: Tensor) -> Tensor:
        size, k = genes.shape
        ptr = torch.arange(size + 1, device=genes.device) * k
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out: Any = self._call(genes.flatten(), ptr, types.flatten())
        prediction = out if isinstance(out, Tensor) else out[0]
        prediction = prediction.unsqueeze(-1) if prediction.ndim == 1 else prediction
        require(
            self._phenotype < prediction.shape[1],
            lambda: f"phenotype: expected one below {prediction.shape[1]}, which the model predicts, got {self._phenotype}",
        )
        return prediction[:, self._phenotype].to(torch.promote_types(prediction.dtype, torch.float32))


def _checked(scorer: Scorer, genes: Any, types: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Genes and types int64 [B, k] on a device."""
    require_tensor("genes", genes, ndim=2, dtypes=(torch.int64,))
    if types is not None:
        require_tensor("types", types, ndim=2, dtypes=(torch.int64,))
        require(types.shape == genes.shape, lambda: f"types: expected shape {list(genes.shape)}, got {list(types.shape)}")
        require_indices("types", types, scorer.num_types, "perturbation types")
    require_indices("genes", genes, scorer.num_genes)
    if values_visible(genes):
        twice = torch.zeros(len(genes), dtype=torch.bool)
        for a, b in itertools.combinations(genes.unbind(1), 2):
            twice |= a == b
        if twice.any():
            row = int(twice.nonzero()[0])
            raise ValueError(f"genes: expected distinct genes in a set, row {row} is {genes[row].tolist()}")
    if types is None:
        types = torch.full_like(genes, min(DELETED, scorer.num_types - 1))
    return genes.to(device), types.to(device)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """PyTorch on this many threads."""
    before = torch.get_num_threads()
    if number is not None and number != before:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
