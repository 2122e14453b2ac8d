"""Long rows of a stacked graph in segments: which a launch sums first, each in a program of its own (see row_dot.py)."""

# mypy: allow-untyped-defs
from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def span_of_segment(ptr_ptr, segptr_ptr, stacked, i_s):
    """(start, end): the entries of segment i_s, which is of the stacked row (or column)."""
    first = tl.load(segptr_ptr + stacked)
    num_segments = tl.load(segptr_ptr + stacked + 1) - first
    start = tl.load(ptr_ptr + stacked)
    degree = tl.load(ptr_ptr + stacked + 1) - start
    rank = i_s - first
    return start + degree * rank // num_segments, start + degree * (rank + 1) // num_segments


@triton.jit
def add_segments(b_sum, p_partial, first, last, D: tl.constexpr, D_PAD: tl.constexpr, EDGES: tl.constexpr):
    """b_sum + the partial sums of the segments from first to last, lane by lane [EDGES, D_PAD]."""
    # [D_PAD]
    o_d = tl.arange(0, D_PAD)
    # [EDGES]
    o_e = tl.arange(0, EDGES)
    for s in range(first, last, EDGES):
        m_b = (s + o_e < last)[:, None] & (o_d < D)[None, :]
        b_sum += tl.load(p_partial + (s + o_e)[:, None] * D + o_d[None, :], mask=m_b, other=0.0)
    return b_sum


@dataclass(frozen=True)
class Segments:
    """The segments of the relation of each tie. Their partial sums stand tie after tie, segment s of tie t at s + shifts[t]."""

    first: tuple[int, ...]
    count: tuple[int, ...]

    @classmethod
    def of_ties(cls, relations: Sequence[int], offset: Sequence[int]) -> Segments:
        return cls(tuple(offset[r] for r in relations), tuple(offset[r + 1] - offset[r] for r in relations))

    @property
    def total(self) -> int:
        return sum(self.count)

    @property
    def most(self) -> int:
        return max(self.count)

    @property
    def shifts(self) -> list[int]:
        return [sum(self.count[:tie]) - first for tie, first in enumerate(self.first)]

    def table(self, heads: Sequence[int], device: torch.device) -> Tensor:
        """int64 [ties, 4]: head, first segment, how many, shift."""
        return rows_of_ints(zip(heads, self.first, self.count, self.shifts, strict=True), device)

    def partial_sums(self, x: Tensor) -> Tensor | None:
        """float32 [L, total, D] beside x [L, H, T, D], None if there are none."""
        return torch.empty(x.shape[0], self.total, x.shape[-1], dtype=torch.float32, device=x.device) if self.total else None


_CAPTURED: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}  # for good: a CUDA graph reads them again at every replay


def device_ints(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A short list of numbers as int64 on the device, kept: a copy from the host would force a sync at every launch."""
    made = _device_ints(values, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED[values, device] = made
    return made


@functools.lru_cache(4096)  # chosen rows differ in number from step to step; far fewer launches wait on a device
def _device_ints(values: tuple[int, ...], device: torch.device) -> Tensor:
    """On a GPU by a thread of its own.

    Where `torch.compile` warms up for a CUDA graph, what a thread allocates is in the memory of that graph, which others write
    again, and PyTorch raises for what outlives the call.
    """
    make = functools.partial(torch.tensor, values, dtype=torch.int64, device=device)
    if device.type != "cuda":
        return make()
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(make).result()


def rows_of_ints(rows: Iterable[tuple[int, ...]], device: torch.device) -> Tensor:
    """A small table, row after row, likewise."""
    return device_ints(tuple(x for row in rows for x in row), device)
