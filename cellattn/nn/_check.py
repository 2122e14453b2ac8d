"""Checks that the modules share."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .._check import (
    FLOAT_DTYPES,
    count_of,
    describe,
    describe_number,
    require,
    require_indices,
    require_same,
    require_sets,
    require_several,
    require_tensor,
    unboxed,
)
from .._modes import is_autocast
from ..graph import MultiGraph


def probability_of(name: str, value: Any) -> float:
    """An argument that is a number in [0, 1), as Python's."""
    number = _number(name, value)
    require(0 <= number < 1, f"{name}: expected a probability in [0, 1), got {value}")
    return number


def weight_of(name: str, value: Any) -> float:
    """An argument that is a finite number of at least 0, as Python's."""
    number = _number(name, value)
    require(0 <= number <= sys.float_info.max, f"{name}: expected a finite number of at least 0, got {value}")
    return number


def _number(name: str, value: Any) -> float:
    number = unboxed(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name}: expected a number, got {describe_number(value)}")
    return number


def entries(name: str, value: Any, kind: str, sizes: tuple[int, ...]) -> tuple[tuple[Any, ...], ...]:
    """An argument that is several tuples of a number of parts, as a tuple of them."""
    require_several(name, value, f"a sequence of entries {kind}")
    for position, entry in enumerate(value):
        whole = isinstance(entry, (tuple, list)) and len(entry) in sizes
        require(whole, lambda: f"{name}: entry {position}: expected {kind}, got {describe(entry)}")
    return tuple(tuple(map(unboxed, entry)) for entry in value)


def max_size_of(value: Any) -> int | None:
    """A bound on the genes of a set: None, or at least 1."""
    return None if value is None else count_of("max_size", value, minimum=1)


def phenotype_of(value: Any, out_dim: int) -> int:
    """Which of a model's predictions is asked for."""
    phenotype = count_of("phenotype", value)
    require(phenotype < out_dim, f"phenotype: expected one below {out_dim}, which the model predicts, got {value}")
    return phenotype


def require_graph(value: Any) -> None:
    """Check that an argument is a `MultiGraph`, into which nobody has written."""
    if not isinstance(value, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph, got {describe(value)}")
    value.require_unwritten()


def require_features(name: str, value: Any, dim: int, parameter: Any, *, ndim: int | None = None) -> None:
    """Check that an argument is [..., n, dim], or of `ndim` dimensions, with the device and dtype of a module's parameter.

    Under autocast, which casts inputs, any floating dtype will do, and for a quantized layer, whose weight is no tensor.
    """
    require_tensor(name, value, ndim=ndim, dtypes=FLOAT_DTYPES)
    if ndim is None and value.ndim < 2:
        raise ValueError(f"{name}: expected at least 2 dimensions, got a {describe(value)}")
    if value.shape[-1] != dim:
        raise ValueError(f"{name}: expected a last dimension of {dim}, got a {describe(value)}")
    if not isinstance(parameter, Tensor):
        return
    require_same("device", module=parameter.device, **{name: value.device})
    if not is_autocast(value):
        require_same("dtype", module=parameter.dtype, **{name: value.dtype})


def read_directly(name: str, layer: nn.Module) -> nn.Linear:
    """A linear layer whose weight is read, beside those of others, without a call of it.

    Pruning and the older norms of PyTorch make the weight in a call, so it is made here. What checkpointing or torch.compile
    wrap around the layer changes nothing, and is taken off.

    Raises:
        TypeError: a layer that computes something else, such as an adapter, which would be left out without a word.
    """
    layer = getattr(layer, "_checkpoint_wrapped_module", getattr(layer, "_orig_mod", layer))
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise TypeError(
            f"{name}: expected a Linear, whose weight is read and which is not called, got {type(layer).__name__}, "
            "which would be left out; what it adds can be a parametrization of the weight"
        )
    for hook in layer._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(layer, ())
    return layer


def read_by(weight: Any, x: Tensor) -> Tensor:
    """Sums, which are taken in float32 at least, as a layer of this weight reads them; autocast sees to that itself."""
    return x if is_autocast(x) or not isinstance(weight, Tensor) else x.to(weight.dtype)


def require_perturbations(
    seeds: Any, ptr: Any, types: Any, num_genes: int, num_types: int | None, device: torch.device
) -> None:
    """Check a ragged batch of perturbation sets on a device: gene indices, distinct within a set, their types, and `ptr`.

    Types of any number (`num_types` None) are checked by shape alone.
    """
    require_sets("seeds", seeds, ptr, num_genes, distinct=True)
    require_tensor("types", types, ndim=1, dtypes=(torch.int64,))
    require_same("length", seeds=seeds.shape[0], types=types.shape[0])  # `len` would fix the length of an exported model
    require_same("device", module=device, seeds=seeds.device, types=types.device)
    if num_types is not None:
        require_indices("types", types, num_types, "perturbation types")
