"""The launches that are looked at, recorded on tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from cellattn.kernels import attention as attention_kernels
from cellattn.kernels import config
from cellattn.kernels import row_dot as row_dot_kernels
from tests.kernels.aot import Launch, recorded

from .chips import Chip


@contextmanager
def on(chip: Chip) -> Iterator[list[Launch]]:
    """Every launch of a Triton kernel is recorded instead of run; launchers see the chip."""
    with recorded(chip.arch) as launches, mock.patch.object(config, "num_multiprocessors", return_value=chip.multiprocessors):
        yield launches


def attention(heads: int, tokens: int, dim: int, dtype: torch.dtype, *, lse: bool) -> Callable[[], None]:
    """Forward and backward; `lse`: LSE has a gradient too, as the graph losses give it one."""

    def call() -> None:
        q, k, v = torch.empty(3, 1, heads, tokens, dim, dtype=dtype, device="meta").unbind(0)
        q, k, v = q.clone(), k.clone(), v.clone()
        out, log_sum = attention_kernels.attention(q, k, v, None, dim**-0.5)
        attention_kernels.attention_backward(
            torch.empty_like(out), torch.empty_like(log_sum) if lse else None, q, k, v, None, out, log_sum, dim**-0.5
        )

    return call


def ties(
    num_genes: int, num_edges: int, rows: list[int], columns: list[int], dim: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward and backward of the products along the edges, one tie a relation, each with a head of its own and all rows.

    Args:
        rows, columns: [K + 1], where the segments of each relation begin.
    """

    def empty(*shape: int, of: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    def call() -> None:
        count = len(rows) - 1
        q, k = (empty(1, count, num_genes + 1, dim, of=dtype) for _ in range(2))
        pointer = empty(count * num_genes + 1, of=torch.int64)
        entries = pointer, empty(num_edges, of=torch.int32), empty(num_edges, of=torch.float32)
        by_row, by_column = (
            (empty(count * num_genes + 1, of=torch.int64), empty(cut[-1], of=torch.int64), cut) for cut in (rows, columns)
        )
        tied = list(range(count)), list(range(count)), None, [num_genes] * count, 1
        y, kbar = row_dot_kernels.row_dot(q, k, *entries, *entries, *by_row, *by_column, *tied)
        row_dot_kernels.row_dot_backward(y, q, kbar, *entries, *by_column, *tied)

    return call
