"""Triton kernel of `cellattn::set_sum`: sums over the sets of a ragged batch.

A program takes one set and up to MAX_BLOCK features, and ROWS entries at once: a set of three entries is one step, one of 6,000
a hundred. Every entry is read once, where it lies; nothing is added to by two programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import on_device, options
from .tensors import check_devices, grid_of, padded

MAX_BLOCK = 64  # features of a program: few and long sets are many programs
NUMBERS = 4096  # of a step


@triton.jit(do_not_specialize=["num_sets", "num_entries"])
def set_sum_kernel(
    x_ptr,  # [nnz, F]
    ptr_ptr,  # int64 [B + 1]
    out_ptr,  # [B, F]
    num_sets,  # B
    num_entries,  # nnz
    F: tl.constexpr,
    ROW: tl.constexpr,  # numbers from row to row of x
    BF: tl.constexpr,  # features of a program, a power of two
    ROWS: tl.constexpr,  # entries of a step
    SUM: tl.constexpr,  # the type of sums
):
    i_b = (tl.program_id(0) % num_sets).to(tl.int64)
    # [BF], [ROWS]
    o_f = tl.program_id(0) // num_sets * BF + tl.arange(0, BF)
    o_r = tl.arange(0, ROWS)
    m_f = o_f < F
    start = tl.maximum(tl.load(ptr_ptr + i_b), 0)
    end = tl.minimum(tl.load(ptr_ptr + i_b + 1), num_entries)
    # [ROWS, BF]
    b_sum = tl.zeros([ROWS, BF], dtype=SUM)
    for e in range(start, end, ROWS):
        p_x = x_ptr + (e + o_r)[:, None] * ROW + o_f[None, :]
        b_sum += tl.load(p_x, mask=(e + o_r < end)[:, None] & m_f[None, :], other=0.0).to(SUM)
    tl.store(out_ptr + i_b * F + o_f, tl.sum(b_sum, 0).to(out_ptr.dtype.element_ty), mask=m_f)


def set_sum(x: Tensor, ptr: Tensor) -> Tensor:
    """[B, F] of x [nnz, F] and ptr [B + 1]; the operator `cellattn::set_sum`."""
    check_devices(x=x, ptr=ptr)
    num_sets, f = ptr.shape[0] - 1, x.shape[1]
    out = torch.empty(num_sets, f, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 and x.stride(0) >= 0 else x.contiguous()
    block = min(padded(f), MAX_BLOCK)
    with on_device(x):
        set_sum_kernel[grid_of(num_sets * triton.cdiv(f, block), ptr=ptr, x=x)](
            x, ptr.contiguous(), out, num_sets, x.shape[0], F=f, ROW=x.stride(0), BF=block, ROWS=NUMBERS // block,
            SUM=tl.float64 if x.dtype == torch.float64 else tl.float32, **options(4),
        )  # fmt: skip
    return out
