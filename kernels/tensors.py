"""What the launchers ask of their tensors, and the shapes they give them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cellattn._check import require, require_same, require_tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DIM = 256


def check_floats(**tensors: Tensor) -> None:
    """Check the dtype and the number of features of what a kernel computes with."""
    for name, x in tensors.items():
        require_tensor(name, x, dtypes=DTYPES)
        require(x.shape[-1] <= MAX_DIM, lambda: f"{name}: expected at most {MAX_DIM} features, got shape {list(x.shape)}")
    require_same("dtype", **{name: x.dtype for name, x in tensors.items()})


def check_devices(**tensors: Tensor | None) -> None:
    """Check that all tensors are on one device."""
    require_same("device", **{name: x.device for name, x in tensors.items() if x is not None})


def padded(dim: int) -> int:
    """The next power of two, at least the 16 that a matrix instruction takes."""
    return max(16, triton.next_power_of_2(dim))


def flat(x: Tensor) -> Tensor:
    """[..., n, features] -> [L, n, features] with consecutive features; a copy only where the strides leave no other way."""
    x = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()
