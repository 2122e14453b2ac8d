"""Rows of large scores, which are made again in float64, row by row: in the backward, of `attention_bce` in the forward too.

Where |LSE| is large, float32 leaves little of P in the backward: LSE has a spacing of 2^-24 of itself, and a score that is made
again in another order is off by as much. The rows of LARGE, a factor of 2^-14, are few in any model that trains: the backward
leaves them out, and kernels of their own make them again in float64, LSE and delta as well. A mark a block of rows says where
there are any. Nearly always there is none, so these launches are of two programs a multiprocessor, which read all marks and
return.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device functions: their arguments are described where they are declared)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import config

LARGEST = tl.constexpr(3.4028234663852886e38)  # the largest float32, as a pivot
LARGE = tl.constexpr(2.0**10)  # of |LSE| in base 2
ROWS = 32  # of a head, that share a mark


@triton.jit
def is_any(marks, count):
    """Whether one of `count` is not 0."""
    o = tl.arange(0, 4096)
    b_any = tl.zeros([4096], tl.int8)
    for first in range(0, count, 4096):
        b_any |= tl.load(marks + first + o, mask=first + o < count, other=0)
    return tl.max(b_any.to(tl.int32), 0) != 0


@triton.jit
def power(b_x):
    """2 ** x as float64, of a float64 that is no larger than 0 by much: to the digits of float32."""
    return tl.exp2(b_x.to(tl.float32)).to(tl.float64)


def num_programs(count: int, device: torch.device) -> int:
    """Of a launch that has so many blocks or tokens to look at."""
    return min(2 * config.num_multiprocessors(device), count)


def exactly(width: int) -> tuple[int, dict[str, Any]]:
    """(how many keys or entries of so many features are taken at once, how kernels in float64 are compiled)"""
    # every product and sum is rounded by itself: a score has the same digits wherever it is made
    return max(8, 1024 // width), config.options(8, registers=240) | {"enable_fp_fusion": False}
