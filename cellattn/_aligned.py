"""Rows of features that a GPU loads in pieces of 16 bytes, the widest that a thread can ask for.

Rows off these boundaries load in pieces of 8, 4 or 2 bytes, past the asynchronous copies: up to eight times the instructions.
So what lies otherwise is copied once, to rows of a multiple of 16 bytes with zeros behind the features. That copy costs less
than loading it badly as soon as a row is read more than once or twice: by count, not measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 16  # bytes


def wide(dtype: torch.dtype) -> int:
    """Numbers in a piece."""
    return PIECE // dtype.itemsize


def width(features: int, dtype: torch.dtype) -> int:
    """Numbers in a row of whole pieces."""
    return -(-features // wide(dtype)) * wide(dtype)


def is_aligned(x: Tensor, storage: int = 0) -> bool:
    """Whether the rows of x [..., n, features], in memory that begins at `storage`, are whole pieces, each on a boundary."""
    step, start = wide(x.dtype), storage + x.storage_offset() * x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x.shape[-1] % step == 0 and x.stride(-1) == 1 and start % PIECE == 0 and all(s % step == 0 for s in strides)


def aligned_features(x: Tensor) -> Tensor:
    """x [..., n, features] for operators to read: as it is on a CPU, and where a GPU loads it well.

    Otherwise one copy, [..., n, width(features)] with zeros behind the features, which all operators and their backward share.
    """
    if x.is_cpu or x.dtype == torch.float64 or is_aligned(x):
        return x
    return F.pad(x, (0, width(x.shape[-1], x.dtype) - x.shape[-1])).contiguous()  # padding keeps the order of "channels last"


def first_features(x: Tensor, features: int) -> Tensor:
    """x without the zeros behind its features."""
    return x if x.shape[-1] == features else x[..., :features]
