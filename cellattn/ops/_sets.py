"""What the k-hop ops share: their checks, and allocations that say what did not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._check import describe, require, require_same, require_sets
from .._extension import AVAILABLE, require_extension
from .._memory import available_memory
from ..graph import MultiGraph

T = TypeVar("T")

INT32_MAX = 2**31 - 1
_WORTH_ASKING = 1 << 28  # bytes; below, reading how much memory is left would take longer than it saves


def check_graph(graph: Any) -> None:
    """Check that an argument is a graph that the extension's operators take."""
    if not isinstance(graph, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph, got {describe(graph)}")
    graph.require_unwritten()
    require(graph.num_nodes <= INT32_MAX, lambda: f"graph: expected at most {INT32_MAX} genes, got {graph.num_nodes}")
    if not (AVAILABLE and graph.stacked[0].is_cpu):
        require_extension(graph.device)


def check_sets(graph: Any, seeds: Any, ptr: Any) -> None:
    """Check a graph and a ragged batch of its genes."""
    check_graph(graph)
    require_sets("seeds", seeds, ptr, graph.num_nodes)
    require_same("device", graph=graph.device, seeds=seeds.device, ptr=ptr.device)


def allocating(make: Callable[[], T], num_bytes: int, like: Tensor, what: Callable[[], str], lower: str) -> T:
    """make(), which takes `num_bytes` on the device of `like`, or an error that says what did not fit and what to lower.

    Linux promises more memory than there is, and ends the process when it is touched; so on the CPU a large request is
    held against what is available before it is made.

    Raises:
        MemoryError: on the CPU.
        torch.OutOfMemoryError: on a GPU.
    """
    if torch.compiler.is_compiling() or isinstance(like, FakeTensor):
        return make()
    if num_bytes >= _WORTH_ASKING and like.is_cpu:
        available = available_memory(like.device)
        if available is not None and num_bytes > available:
            raise _out_of_memory(num_bytes, like.device, what(), lower)
    try:
        return make()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error):
            raise _out_of_memory(num_bytes, like.device, what(), lower) from error
        raise


def _out_of_memory(num_bytes: int, device: torch.device, what: str, lower: str) -> Exception:
    available = available_memory(device)
    there = "" if available is None else f", of which {available:,} are available"
    message = f"cannot allocate {num_bytes:,} bytes on {device} for {what}{there}; {lower}"
    return torch.OutOfMemoryError(message) if device.type == "cuda" else MemoryError(message)
