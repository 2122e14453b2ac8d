"""Scores of very many sets of genes with one trained model, whose cell is encoded once.

A model says what its sets share by a method `screening` (`cellattn.nn.screening`). One without is called on batches.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._check import count_of, describe, device_of, require, require_indices, require_same, require_tensor, values_visible
from .._modes import without_function_modes
from .._wrapped import require_values, unwrapped
from ..data.dataset import PERTURBATION_TYPES
from ..graph import MultiGraph
from ..nn._check import phenotype_of
from ..nn.screening import NotReadableError, Screening, is_altered, values_dtype

DELETED = PERTURBATION_TYPES.index("deleted")
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


@without_function_modes
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
    force: bool = False,
) -> Scorer:
    """Get a trained model ready to score sets of genes: in evaluation, on a copy, the cell encoded once.

    Args:
        model: of `cellattn.nn`; or any module that is called as `model(graph, seeds, ptr, types)`, or `model(seeds, ptr,
            types)` without a graph, and returns predictions [B], [B, out_dim], or a tuple that starts with them. That one has
            attributes `num_genes`, if there is no graph, and `num_types`, if not those of `PERTURBATION_TYPES`. One with a
            method `screening` is asked for a `cellattn.nn.screening.Screening` instead, unless a subclass or a hook changes
            what a call is, or layers were replaced by others: a warning says so.
        graph: the gene graphs of N genes.
        phenotype: which of the model's predictions.
        dtype: of the products: float32, bfloat16 or float64; the model's by default. bfloat16 is float32 on a CPU without
            instructions for it, as the scorer's `dtype` says.
        device: where to score; that of the graph, or else of the model, by default.
        num_threads: of PyTorch, on the CPU, while scoring; unchanged by default.
        features, gene_ids: as the model's `forward` takes them.
        force: products in bfloat16 on any CPU: rounded alike, and slower than float32.

    Raises:
        ValueError: an argument out of range. TypeError: one of a wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {describe(model)}")
    if graph is not None and not isinstance(graph, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph or None, got {describe(graph)}")
    phenotype = count_of("phenotype", phenotype)
    if num_threads is not None:
        num_threads = count_of("num_threads", num_threads, minimum=1)
    require(dtype is None or dtype in DTYPES, lambda: f"dtype: expected one of {DTYPES}, got {dtype}")
    first = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    if device is None:
        device = first.device if graph is None else graph.device
    device = device_of("device", device, present=True)
    wanted = first.dtype if dtype is None else dtype
    products = torch.float32 if wanted == torch.bfloat16 and not force and not multiplies_bfloat16(device) else wanted
    graph = None if graph is None else graph.to(device)
    # a screen's tables are rounded once
    inner, wrappers = unwrapped(model)
    require_values(inner)
    hooked = [wrapper for wrapper in wrappers if wrapper._forward_hooks or wrapper._forward_pre_hooks]
    if any(hasattr(wrapper, "_orig_mod") for wrapper in hooked):
        raise ValueError("model: expected its hooks on the model itself: PyTorch copies none of what torch.compile made of it")
    shares = hasattr(inner, "screening") and getattr(inner, "mode", None) != "khop"
    given = {name: None if x is None else x.to(device) for name, x in {"features": features, "gene_ids": gene_ids}.items()}
    screening: Screening | None = None
    if shares and _is_quantised(inner):
        shares = False
        warnings.warn("model: layers are quantised, so that it is called on batches of sets, which is slower", stacklevel=3)
    if shares:
        ready = _ready(inner, device, torch.float64)
        x = given["features"]
        doubled = {**given, "features": None if x is None else x.double()}
        try:
            if hooked or is_altered(ready):
                raise NotReadableError(f"{type(ready).__name__}: a call is more than what its `screening` belongs to")
            with _by_itself(device, num_threads):
                screening = ready.screening(graph, phenotype=phenotype, dtype=products, **doubled)  # type: ignore[operator]
        except NotReadableError as error:
            warnings.warn(f"model: {error}; it is called on batches of sets instead, which is slower", stacklevel=3)
    if screening is None:
        called = model if hooked or hasattr(model, "_orig_mod") else inner  # what torch.compile made is as fast as it is
        ready = _ready(called, device, torch.float64 if products == torch.float64 else None)
        screening = _Calls(ready, graph, given, phenotype, products)
    return _Scorer(screening, products, device, num_threads)


def _ready(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """A copy in evaluation.

    Pruning and the older weight and spectral norms keep what they made of a weight, with its gradient's graph, which PyTorch
    does not copy; they make it anew in each call.
    """
    with torch.inference_mode(False):  # of a model that was made in that mode, too
        made = [x for part in model.modules() for x in vars(part).values() if isinstance(x, Tensor) and not x.is_leaf]
        kept: dict[int, Any] = {id(x): x.detach().to(device=device, dtype=dtype, copy=True) for x in made}
        return copy.deepcopy(model, kept).eval().requires_grad_(False).to(device=device, dtype=dtype)


def _is_quantised(model: nn.Module) -> bool:
    """Whether layers are of integers, which cannot be taken to float64."""
    return any(".quantized." in type(part).__module__ for part in model.modules())


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there than in float32."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _Scorer:
    """A `Scorer` of a `Screening`: checks, and batches as large as that asks for."""

    def __init__(self, screening: Screening, dtype: torch.dtype, device: torch.device, num_threads: int | None) -> None:
        self.num_genes, self.dtype = screening.num_genes, dtype
        self.num_types = len(PERTURBATION_TYPES) if screening.num_types is None else screening.num_types
        self._screening, self._device, self._num_threads = screening, device, num_threads

    def score(self, genes: Tensor, types: Tensor | None = None) -> Tensor:
        entries = self._entries(genes, types).to(self._device).contiguous()  # results do not depend on the layout
        dtype = values_dtype(self.dtype)
        with _by_itself(self._device, self._num_threads):
            parts = [self._screening(part).to(dtype) for part in entries.split(self._screening.batch_size)]
        return torch.cat(parts)

    @without_function_modes
    def _entries(self, genes: Any, types: Any) -> Tensor:
        """type * N + gene, int64 [B, k]."""
        require_tensor("genes", genes, ndim=2, dtypes=(torch.int64,))
        require(genes.shape[1] >= 1, lambda: f"genes: expected sets of at least one gene, got shape {list(genes.shape)}")
        require_indices("genes", genes, self.num_genes)
        if values_visible(genes):
            twice = torch.zeros(len(genes), dtype=torch.bool)
            for a, b in itertools.combinations(genes.unbind(1), 2):
                twice |= a == b
            if twice.any():
                row = int(twice.nonzero()[0])
                raise ValueError(f"genes: expected distinct genes in a set, row {row} is {genes[row].tolist()}")
        if types is None:
            return genes + min(DELETED, self.num_types - 1) * self.num_genes
        require_tensor("types", types, ndim=2, dtypes=(torch.int64,))
        require(types.shape == genes.shape, lambda: f"types: expected shape {list(genes.shape)}, got {list(types.shape)}")
        require_same("device", genes=genes.device, types=types.device)
        require_indices("types", types, self.num_types, "perturbation types")
        return types * self.num_genes + genes


class _Calls:
    """A model called on batches of sets."""

    batch_size = 4096

    def __init__(
        self,
        model: nn.Module,
        graph: MultiGraph | None,
        inputs: dict[str, Tensor | None],
        phenotype: int,
        dtype: torch.dtype,
    ) -> None:
        inner, _ = unwrapped(model)
        num_genes = getattr(inner, "num_genes", None) if graph is None else graph.num_nodes
        if not isinstance(num_genes, int):
            raise TypeError("graph: expected a MultiGraph, since the model has no attribute num_genes; got None")
        self.num_genes, self.num_types = num_genes, getattr(inner, "num_types", None)
        self._model, self._inputs, self._phenotype, self._dtype = model, inputs, phenotype, dtype
        self._graph = () if graph is None else (graph,)

    def __call__(self, entries: Tensor) -> Tensor:
        size, k = entries.shape
        ptr = torch.arange(size + 1, device=entries.device) * k
        sets = entries.flatten() % self.num_genes, ptr, entries.flatten() // self.num_genes
        given = {name: x for name, x in self._inputs.items() if x is not None}
        with torch.autocast(entries.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            out: Any = self._model(*self._graph, *sets, **given)
        prediction = out
        if not isinstance(out, Tensor):
            with contextlib.suppress(TypeError, LookupError):  # what starts with them
                prediction = out[0]
        if not isinstance(prediction, Tensor):
            raise TypeError(f"model: expected it to return predictions, or a tuple that starts with them, got {describe(out)}")
        fits = prediction.ndim in (1, 2) and len(prediction) == size and not prediction.is_complex()
        require(
            fits,
            lambda: f"model: expected predictions [{size}] or [{size}, out_dim] of {size} sets, got a {describe(prediction)}",
        )
        prediction = prediction.unsqueeze(-1) if prediction.ndim == 1 else prediction
        return prediction[:, phenotype_of(self._phenotype, prediction.shape[1])]


@contextlib.contextmanager
def _by_itself(device: torch.device, num_threads: int | None) -> Iterator[None]:
    """Without gradients, and the same whoever asks: autocast around it would round products that were asked for in another
    dtype, and tables made in inference mode could not be added to outside of it.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), on_threads(num_threads):
        yield


@contextlib.contextmanager
def on_threads(number: int | None) -> Iterator[None]:
    """PyTorch on this many threads; on as many as before for None."""
    before = torch.get_num_threads()
    if number is not None and number != before:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
