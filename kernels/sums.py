"""Sums along an axis of which every lane is to hold the same bits."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_products(a, b, mask, axis: tl.constexpr):
    """sum a * b along an axis, over what the mask keeps.

    The choice keeps the product from being contracted with the first addition across lanes, a b + shuffled(a b): of two lanes
    one would add its own product unrounded, the other that of its neighbour, and what they hold and store to one place would
    differ in the last bit.
    """
    return tl.sum(tl.where(mask, a * b, 0.0), axis)
