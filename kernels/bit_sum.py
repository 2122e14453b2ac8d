"""Triton kernels of `cellattn::bit_sum`: sums over the neighbours in a dense relation, one bit a pair.

With bits b_ij, out_i = sum_j b_ij x_j is a product with a matrix of zeros and ones: a program unpacks words of its rows in
registers and multiplies on the matrix unit, whatever the number of edges. All leading dimensions are columns of one product, so
that a word is unpacked once for up to MAX_BLOCK of them.

Zeros and ones are exact in every type, and a float32 is the sum of three bfloat16 (24 = 8 + 8 + 8 digits), so that three
products in bfloat16, summed in float32, make what full precision would: an A100 has 312 TFLOP/s for them and 19.5 for float32.
Whether TF32 is allowed does not matter. The backward, whose gradients are float32, is such a sum, of the bits by column.

The pieces are made once, as columns lie in the product, and with zeros for what is not finite: a factor of 0 would not hide it.
Blocks of rows of x that hold a NaN or an infinity are marked, and each program that meets a mark adds them by itself, where
their bits are set. So a result is not finite only where a neighbour is not.

The rows of x are cut into parts where there are too few programs, and the partial sums added in order: no atomics.

Predicted from machine code, not measured (benchmarks/kernel_model): of 6,607 genes, in bfloat16 at D = 20, forward and backward
are 64 us of an A100, bound by shared memory, through which unpacked bits go. Along the edges (row_dot.py) one pair in 16 takes
as long, one in eight twice and one in four five times as long. Relations are bits from one in eight on, as on a CPU, where that
was measured.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellattn._check import require, require_same, require_tensor

from . import config
from .config import Tile, choose, on_device, options, parts_for
from .tensors import check_devices, check_dtype, grid_of, padded

MAX_BLOCK = 64  # columns of the product that a program makes
ROWS = tl.constexpr(64)  # of x that share a mark
PIECE = torch.bfloat16  # of a float32
WARPS = 8  # of which two programs fill a multiprocessor: smaller ones count in part

# Sizes: L leading dimensions, M rows of words, R of them chosen, C rows of x, whole blocks of them in C_PAD, F = L * D columns
# of the product, whole blocks of them in F_PAD.


@triton.jit
def _unpacked(b_word, ONE: tl.constexpr):
    """Bits of words [BM] as zeros and ones of a type [BM, 32], made across: lanes have rows, and read a word once."""
    b_bits = b_word[None, :] & (1 << tl.arange(0, 32))[:, None]
    return tl.trans(tl.where(b_bits != 0, 1.0, 0.0).to(ONE))


@triton.jit(do_not_specialize=["num_rows", "num_columns", "stride_l", "stride_c", "stride_d"])
def bit_sum_kernel_pieces(
    x_ptr,  # [L, C, D]
    pieces_ptr,  # out [PIECES, C_PAD, F_PAD]
    wild_ptr,  # out, int32 [F_PAD / BF, C_PAD / ROWS]: 1 if a block of x holds what is not finite
    num_rows,  # C
    num_columns,  # F
    stride_l,
    stride_c,
    stride_d,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    BF: tl.constexpr,
):
    """A program a block of x: what the products read of it."""
    blocks = tl.cdiv(num_rows, ROWS)
    column_blocks = tl.cdiv(num_columns, BF)
    i_c, i_f = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    # [ROWS], [BF]
    o_c = (i_c * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_f = (i_f * BF + tl.arange(0, BF)).to(tl.int64)
    # [ROWS, BF]
    p_x = x_ptr + o_c[:, None] * stride_c + (o_f // D * stride_l + o_f % D * stride_d)[None, :]
    b_x = tl.load(p_x, mask=(o_c < num_rows)[:, None] & (o_f < num_columns)[None, :], other=0.0).to(tl.float32)
    m_wild = ~(tl.abs(b_x) < float("inf"))
    tl.store(wild_ptr + i_f * blocks + i_c, tl.max(tl.max(m_wild.to(tl.int32), 1), 0))
    b_rest = tl.where(m_wild, 0.0, b_x)
    p_piece = pieces_ptr + o_c[:, None] * (column_blocks * BF) + o_f[None, :]
    for i in tl.static_range(PIECES):
        b_piece = b_rest
        if i + 1 < PIECES:  # the upper eight digits, not rounded: the largest number has no next one
            b_piece = (b_rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        tl.store(p_piece, b_piece.to(pieces_ptr.dtype.element_ty))
        p_piece += (blocks * ROWS).to(tl.int64) * (column_blocks * BF)
        b_rest -= b_piece


@triton.jit(
    do_not_specialize=[
        "num_chosen", "num_rows", "num_columns", "num_leading", "num_words", "part", "stride_l", "stride_c", "stride_d",
    ]
)  # fmt: skip
def bit_sum_kernel(
    pieces_ptr,  # of bit_sum_kernel_pieces
    wild_ptr,  # likewise
    x_ptr,  # [L, C, D], where it is marked
    words_ptr,  # int32 [M, num_words]
    rows_ptr,  # int64 [R], None for all M
    out_ptr,  # out, float32 [parts, L, R, D]
    num_chosen,  # R
    num_rows,  # C
    num_columns,  # F
    num_leading,  # L
    num_words,
    part,  # rows of x a part, whole blocks but for the last
    stride_l,
    stride_c,
    stride_d,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    BF: tl.constexpr,
    BM: tl.constexpr,  # rows a program
    BN: tl.constexpr,  # rows of x at a time, 32 or 64
):
    """A program a block of rows, a block of columns and a part of the rows of x."""
    tl.static_assert(BN % 32 == 0 and BN <= ROWS)  # whole words, of which there are enough for whole blocks
    i_p = tl.program_id(1)
    row_blocks, blocks, column_blocks = tl.cdiv(num_chosen, BM), tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, BF)
    i_f = tl.program_id(0) // row_blocks
    # [BM]
    o_m = tl.program_id(0) % row_blocks * BM + tl.arange(0, BM)
    m_m = o_m < num_chosen
    b_row = o_m.to(tl.int64)
    if rows_ptr is not None:
        b_row = tl.load(rows_ptr + o_m, mask=m_m, other=0)
    p_word = words_ptr + b_row * num_words
    # [BF]
    o_f = i_f * BF + tl.arange(0, BF)
    row = column_blocks * BF
    p_wild = wild_ptr + i_f * blocks
    first = i_p * part
    last = tl.minimum(first + part, num_rows)
    some = 0
    # [BM, BF]
    b_out = tl.zeros([BM, BF], tl.float32)
    for n in range(first, last, BN):
        some |= tl.load(p_wild + n // ROWS)
        for i_w in tl.static_range(BN // 32):
            # [BM, 32]
            b_edge = _unpacked(tl.load(p_word + n // 32 + i_w, mask=m_m, other=0), pieces_ptr.dtype.element_ty)
            # [32, BF]: of whole blocks, so that nothing is masked
            o_n = (n + 32 * i_w + tl.arange(0, 32)).to(tl.int64)
            p_piece = pieces_ptr + o_n[:, None] * row + o_f[None, :]
            for i in tl.static_range(PIECES):
                b_out = tl.dot(b_edge, tl.load(p_piece + i * (blocks * ROWS).to(tl.int64) * row), b_out)
    o_f = o_f.to(tl.int64)
    m_f = o_f < num_columns
    o_l, o_d = o_f // D, o_f % D
    if some != 0:
        for n in range(first, last, ROWS):
            if tl.load(p_wild + n // ROWS) != 0:
                for j in range(n, tl.minimum(n + ROWS, last)):
                    b_x = tl.load(
                        x_ptr + tl.cast(j, tl.int64) * stride_c + o_l * stride_l + o_d * stride_d, mask=m_f, other=0.0
                    )
                    b_wild = tl.where(tl.abs(b_x.to(tl.float32)) < float("inf"), 0.0, b_x.to(tl.float32))
                    b_word = tl.load(p_word + j // 32, mask=m_m, other=0)
                    m_j = (b_word >> (j % 32)) & 1 != 0
                    b_out += tl.where(m_j[:, None], b_wild[None, :], 0.0)
    p_out = out_ptr + ((i_p.to(tl.int64) * num_leading + o_l) * num_chosen * D + o_d)[None, :] + o_m.to(tl.int64)[:, None] * D
    tl.store(p_out, b_out, mask=m_m[:, None] & m_f[None, :])


# ----------------------------------------------------------------------------------------------------------- launchers


def bit_sum(x: Tensor, words: Tensor, rows: Tensor | None) -> Tensor:
    """x [..., C, D], words int64 [M, ceil(C / 64)], rows int64 [R] or all M -> float32 [..., R, D]; `cellattn::bit_sum`."""
    check_dtype("k", x)  # of the loss whose keys these are; gradients are float32
    require_tensor("words", words, ndim=2, dtypes=(torch.int64,))
    check_devices(x=x, words=words, rows=rows)
    *lead, c, d = x.shape
    require_same("size", **{"words for the rows of x": -(-c // 64), "words": words.shape[1]})
    num_chosen = words.shape[0] if rows is None else rows.shape[0]
    if rows is not None:
        require_tensor("rows", rows, ndim=1, dtypes=(torch.int64,))
        require(words.shape[0] > 0 or num_chosen == 0, lambda: f"rows: expected none of no words, got {num_chosen}")
        rows = rows.contiguous()
    flat = x.reshape(-1, c, d) if x.numel() > 0 else x.new_empty(0, c, d)
    num_leading = flat.shape[0]
    if flat.numel() == 0 or num_chosen == 0:
        return torch.zeros(*lead, num_chosen, d, dtype=torch.float32, device=x.device)
    num_columns, halves = num_leading * d, words.contiguous().view(torch.int32)
    block, num_pieces = min(padded(num_columns), MAX_BLOCK), 3 if x.dtype == torch.float32 else 1
    blocks, column_blocks = triton.cdiv(c, ROWS.value), triton.cdiv(num_columns, block)
    piece = PIECE if x.dtype == torch.float32 else x.dtype
    pieces = torch.empty(num_pieces, blocks * ROWS.value, column_blocks * block, dtype=piece, device=x.device)
    wild = torch.empty(column_blocks, blocks, dtype=torch.int32, device=x.device)
    shape = {"D": d, "PIECES": num_pieces, "BF": block}
    out: list[Tensor] = []

    def launch(tile: Tile) -> None:
        if config.capability(x.device) // 10 == 9 and tile.warps > 2:  # whatever a search proposes, see config.py
            raise RuntimeError(f"bit_sum: expected at most 2 warps on sm_90, got {tile!r}")
        programs = triton.cdiv(num_chosen, tile.BM) * column_blocks
        parts, part = parts_for(triton.cdiv(programs * tile.warps, WARPS), c, ROWS.value, x.device)
        out[:] = [torch.empty(parts, num_leading, num_chosen, d, dtype=torch.float32, device=x.device)]
        (count,) = grid_of(programs, words=words, x=x)
        bit_sum_kernel[(count, parts)](
            pieces, wild, flat, halves, rows, *out, num_chosen, c, num_columns, num_leading, halves.shape[1], part,
            *flat.stride(), **shape, BM=tile.BM, BN=tile.BN, **tile.options,
        )  # fmt: skip

    with on_device(x):
        bit_sum_kernel_pieces[grid_of(blocks * column_blocks, x=x)](
            flat, pieces, wild, c, num_columns, *flat.stride(), **shape, **options(4)
        )
        choose("bit_sum", x, block, launch)
    total = out[0][0] if out[0].shape[0] == 1 else out[0].sum(0)
    return total.view(*lead, num_chosen, d)
