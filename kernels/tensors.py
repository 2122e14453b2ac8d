"""What the launchers ask of their tensors, and the shapes they give them."""

from __future__ import annotations

from math import prod

import torch
import triton
from torch import Tensor

from cellattn._aligned import is_aligned, width
from cellattn._check import require, require_same, require_tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DIM = 256
MAX_SPAN = 2**31  # numbers: a block of BLOCK_ROWS rows, and rows of tokens before the genes, are addressed in 32 bits
BLOCK_ROWS = 128
MAX_GRID = 2**31 - 1  # programs of a launch


def check_floats(**tensors: Tensor) -> None:
    """Check the dtype and the number of features of what a kernel computes with."""
    for name, x in tensors.items():
        check_dtype(name, x)
        require(x.shape[-1] <= MAX_DIM, lambda: f"{name}: expected at most {MAX_DIM} features, got shape {list(x.shape)}")
    require_same("dtype", **{name: x.dtype for name, x in tensors.items()})


def check_dtype(name: str, x: Tensor) -> None:
    """Check that a kernel takes the dtype of x."""
    require(
        not isinstance(x, Tensor) or x.dtype != torch.float64,
        f"{name}: expected dtype float16 or bfloat16 or float32 on a GPU, got float64; "
        f"convert it with {name}.float(), or compute in float64 on the CPU",
    )
    require_tensor(name, x, dtypes=DTYPES)


def check_devices(**tensors: Tensor | None) -> None:
    """Check that all tensors are on one device."""
    require_same("device", **{name: x.device for name, x in tensors.items() if x is not None})


def check_draw(draw: Tensor | None, threshold: int) -> None:
    """Check seed and offset, int64 [2], and a probability in steps of 2^-16; 0 without a draw."""
    if draw is not None:
        require_tensor("draw", draw, ndim=1, dtypes=(torch.int64,))
        require(draw.shape[0] == 2, lambda: f"draw: expected size 2, got {draw.shape[0]}")
    right = threshold == 0 if draw is None else 1 <= threshold <= 65535
    require(right, lambda: f"threshold: expected 1 to 65535, or 0 without a draw, got {threshold}")


def grid_of(programs: int, **shapes: Tensor) -> tuple[int]:
    """The grid of a launch, if a launch may have as many programs; they come from the shapes of the named tensors."""
    require(
        programs <= MAX_GRID,
        lambda: (
            f"{next(iter(shapes))}: expected a problem of at most {MAX_GRID} programs of a GPU, got {programs}, of "
            + ", ".join(f"{name} {list(x.shape)}" for name, x in shapes.items())
        ),
    )
    return (programs,)


def padded(dim: int) -> int:
    """The next power of two, at least the 16 that a matrix instruction takes."""
    return max(16, triton.next_power_of_2(dim))


def aligned(x: Tensor, lead: int, *, num_prefix: int = 0) -> Tensor:
    """[..., n, features] -> [L, n, features] (`lead` 1) or [L, heads, n, features] (`lead` 2) that loads in pieces of 16 bytes.

    A view where the strides allow it, else a copy. Every row is followed by zeros up to `width(features)`, so that a kernel
    masks its columns there: a mask in the middle of a piece would split it. Strides are multiples of `wide(dtype)`, and rows
    so near to each other that a kernel may skip `num_prefix` of them in 32 bits.
    """
    *others, n, features = x.shape
    others = [1] * (lead - len(others)) + others
    shape = (prod(others[: len(others) + 1 - lead]), *others[len(others) + 1 - lead :], n, features)
    if is_aligned(x, x.untyped_storage().data_ptr()) and x.stride(-2) * max(BLOCK_ROWS, num_prefix) < MAX_SPAN:
        try:
            return x.view(shape)
        except RuntimeError:  # leading dimensions that do not follow each other
            pass
    rows = x.new_empty(*x.shape[:-1], width(features, x.dtype))
    rows[..., features:] = 0
    rows[..., :features].copy_(x)
    return rows.view(*shape[:-1], rows.shape[-1])[..., :features]


def rows_of(x: Tensor) -> Tensor:
    """[..., features] -> [R, features], the rows of all leading dimensions one after another, `aligned`."""
    return aligned(x.reshape(-1, x.shape[-1]), 1)[0]


def lead_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last two, 0 for a dimension of one, whose stride means nothing."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride()[:-2], x.shape[:-2], strict=True))


def precision() -> str:
    """Of products of float32 on the matrix unit: as PyTorch's own, whichever of its two settings was used."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
