"""Triton kernels of `cellattn::edge_attention` and its backward: softmax over the entries that a row of a hard mask has.

The entries e = (i, j) of row i of a head are the prefix tokens, itself (SELF_LOOPS), and its neighbours in the relations tied
to the head. With the scores s_e = scale q_i . k_j (+ log w_ij) (+ b_t of the tie t of e), LSE_i = log sum_e exp(s_e) and
P_e = exp(s_e - LSE_i),

    out_i = sum_e Z_e P_e v_j ,   delta_i = dOut_i . out_i - dLSE_i ,   dS_e = P_e (Z_e dOut_i . v_j - delta_i)
    dQ_i = scale sum_e dS_e k_j ,   dK_j = scale sum_e dS_e q_i ,   dV_j = sum_e Z_e P_e dOut_i ,   db_t = sum_{e of t} dS_e

where Z_e is 1, or with dropout 0 or 1 / (1 - p), made where it is needed (dropout.py): of copy 0 for prefix tokens and the gene
itself, of copy 1 + t for the edges of tie t.

One program, of one warp, takes one row (in dk and dv one column, along the transposed graph) and gathers EDGES entries at once.
Each lane has a running maximum, sum and output of its own, brought together once after the last entry, so that in the loop
nothing but the D products of a score goes across lanes. Scores are made again in the backward rather than kept. No atomics:
every result is written once, and equal from run to run.

Hub rows. A row (column) of more than SEGMENT entries is cut as in row_dot.py, where the counts stand. A launch before takes
each segment in a program of its own, of four warps. In the forward a segment leaves its log-sum-exp and its mean of values,
which to the row are one entry more, a score and a value. In the backward it leaves partial sums, since LSE is known by then.

Prefix tokens are few keys that every row sees: to a row entries like others, while what all rows give to them is a product of
dense matrices, dk and dv of `attention` (kernels/attention.py) over these keys, with the LSE and delta of all entries.

Rows of large scores. As in attention.py: rows whose |LSE| is LARGE have a P of 0 in the backward, and two launches more make
them in float64, one after the other, each whole: LSE and delta, dq and what goes to the bias; then what they give to columns.
Programs of these look for a mark and return where there is none (edge_attention_large.py).

NaN and infinities come out where the dense formula has them, see `cellattn/ops/attention.py`: instructions for a maximum drop a
NaN, so it is the running sum that carries it; pivots are held finite; P is NaN in rows whose LSE is not finite.

Scores inside are in base 2.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device functions: their arguments are described where they are declared)
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cellattn._aligned import wide, width

from . import attention
from .config import Gather, choose_gather, on_device
from .edge_attention_entries import SIZES, added, bias_of, factor, gather, line_of, row_at
from .edge_attention_large import edge_bwd_kernel_large_dkv, edge_bwd_kernel_large_dq
from .large_scores import LARGEST, ROWS, exactly, num_programs
from .segments import Segments, add_segments, device_ints, rows_of_ints, span_of_segment
from .sums import sum_of_products
from .tensors import aligned, check_devices, check_draw, check_floats, grid_of, lead_strides, padded

LN2 = tl.constexpr(0.6931471805599453)

# --------------------------------------------------------------------------------------------------------- device code


@triton.jit
def _attend(b_m, b_l, b_o, b_s, b_v, b_z):
    """Take one entry a lane, scores b_s [EDGES] and values b_v [EDGES, DV_PAD], into the running maximum, sum and output.

    b_z [EDGES]: Z, or None.
    """
    b_mn = tl.maximum(b_m, b_s)
    b_pivot = tl.minimum(b_mn, LARGEST)
    b_r, b_p = tl.exp2(b_m - b_pivot), tl.exp2(b_s - b_pivot)
    b_l = b_l * b_r + b_p
    if b_z is not None:
        b_p *= b_z
    return b_mn, b_l, b_o * b_r[:, None] + b_p[:, None] * b_v


@triton.jit
def _across(b_m, b_l, b_o):
    """The lanes' maximum, sum and output [DV_PAD] as one of each."""
    m = tl.max(b_m, 0)
    b_r = tl.exp2(b_m - tl.minimum(m, LARGEST))
    every = (b_m < -LARGEST) == 0  # of NaN too
    return m, sum_of_products(b_l, b_r, every, 0), sum_of_products(b_o, b_r[:, None], every[:, None], 0)


@triton.jit
def _see(
    b_m, b_l, b_o, b_q, p_k, p_v, b_token, b_added, m_e, scale2, line, copy, first,
    STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
):  # fmt: skip
    """One entry a lane, of the tokens b_token [EDGES], into the running maximum, sum and output of the row b_q [D_PAD].

    line: of the row, or None; entries are `copy` of the tokens first + b_token.
    """
    # [EDGES, D_PAD], [EDGES, DV_PAD]
    b_k = gather(p_k, b_token, m_e, STRIDE_KT, W, D_PAD)
    b_v = gather(p_v, b_token, m_e, STRIDE_VT, WV, DV_PAD)
    # [EDGES]
    b_s = scale2 * sum_of_products(b_q[None, :], b_k, m_e[:, None], 1) + b_added
    b_z = factor(line, copy, first + b_token, True) if line is not None else None
    return _attend(b_m, b_l, b_o, tl.where(m_e, b_s, float("-inf")), b_v, b_z)


@triton.jit
def _see_edges(
    b_m, b_l, b_o, b_q, p_k, p_v, col_ptr, log_weight_ptr, bias2, start, end, scale2, line, copy, first,
    STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """`_see` of the entries from start to end of a row."""
    # [EDGES]: while a step gathers, the entries of the next are on their way
    o_e = tl.arange(0, EDGES)
    b_col = tl.load(col_ptr + start + o_e, mask=start + o_e < end, other=0)
    for e in range(start, end, EDGES):
        m_e = e + o_e < end
        b_token = b_col
        b_added = added(log_weight_ptr, bias2, e + o_e, m_e)
        b_col = tl.load(col_ptr + e + EDGES + o_e, mask=e + EDGES + o_e < end, other=0)
        b_m, b_l, b_o = _see(
            b_m, b_l, b_o, b_q, p_k, p_v, b_token, b_added, m_e, scale2, line, copy, first,
            STRIDE_KT, STRIDE_VT, W, WV, D_PAD, DV_PAD,
        )  # fmt: skip
    return b_m, b_l, b_o


@triton.jit(do_not_specialize=SIZES)
def edge_fwd_kernel_segments(
    q_ptr,  # [L, H, N, D]
    k_ptr,  # [L, H, T, D]
    v_ptr,  # [L, H, T, DV]
    bias_ptr,  # float32 [num_ties] or None
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    log_weight_ptr,  # float32 [E] or None
    segptr_ptr,  # int64 [K * N + 1]: the first segment of each stacked row
    segrow_ptr,  # int64 [S]: the stacked row of each segment
    ties_ptr,  # int64 [num_ties, 4]: head, first segment of the relation, how many, what leads from them to their results
    lse2_ptr,  # float32 [L, num_segments], base 2
    out_ptr,  # float32 [L, num_segments, DV]
    draw_ptr,  # int64 [2], seed and offset, or None
    scale2,
    num_genes,  # N
    num_heads,
    num_ties,
    max_segments,  # of the tie that has most
    num_segments,  # of all ties
    num_prefix,
    threshold,  # p * 2^16, or None
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    STRIDE_QT: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    W: tl.constexpr,  # columns of q and k that are loaded: zeros stand from D on
    WV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):
    """One segment of a row by itself: its log-sum-exp, and the mean of its values."""
    pid = tl.program_id(0)
    i_t = (pid // max_segments) % num_ties
    i_l = (pid // max_segments // num_ties).to(tl.int64)
    p_t = ties_ptr + i_t * 4
    if pid % max_segments >= tl.load(p_t + 2):
        return
    i_s = tl.load(p_t + 1) + pid % max_segments
    head = tl.load(p_t)
    stacked = tl.load(segrow_ptr + i_s)
    start, end = span_of_segment(rowptr_ptr, segptr_ptr, stacked, i_s)
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + head * (stride_qh // ALIGN * ALIGN)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + head * (stride_kh // ALIGN * ALIGN) + num_prefix * STRIDE_KT
    p_v = v_ptr + i_l * (stride_vl // ALIGN * ALIGN) + head * (stride_vh // ALIGN * ALIGN) + num_prefix * STRIDE_VT
    gene = stacked % num_genes
    line = line_of(draw_ptr, threshold, i_l, num_heads, head, num_prefix + gene) if draw_ptr is not None else None
    # [D_PAD]
    b_q = row_at(p_q + gene * STRIDE_QT, W, D_PAD)
    # [EDGES], [EDGES, DV_PAD]
    b_m = tl.full([EDGES], -LARGEST, tl.float32)
    b_l = tl.zeros([EDGES], tl.float32)
    b_o = tl.zeros([EDGES, DV_PAD], tl.float32)
    b_m, b_l, b_o = _see_edges(
        b_m, b_l, b_o, b_q, p_k, p_v, col_ptr, log_weight_ptr, bias_of(bias_ptr, i_t), start, end, scale2,
        line, 1 + i_t, num_prefix, STRIDE_KT, STRIDE_VT, W, WV, D_PAD, DV_PAD, EDGES,
    )  # fmt: skip
    m, total, b_out = _across(b_m, b_l, b_o)
    # [DV_PAD]
    o_v = tl.arange(0, DV_PAD)
    o_s = i_l * num_segments + i_s + tl.load(p_t + 3)
    tl.store(lse2_ptr + o_s, m + tl.log2(total))
    tl.store(out_ptr + o_s * DV + o_v, b_out / tl.where(total == 0, 1.0, total), mask=o_v < DV)


@triton.jit(do_not_specialize=SIZES)
def edge_fwd_kernel(
    q_ptr,  # [L, H, N, D]
    k_ptr,  # [L, H, T, D]
    v_ptr,  # [L, H, T, DV]
    bias_ptr,  # float32 [num_ties] or None
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    log_weight_ptr,  # float32 [E] or None
    segptr_ptr,  # int64 [K * N + 1]; not read unless HAS_SEGMENTS, as what follows
    part_lse2_ptr,  # float32 [L, num_segments]
    part_out_ptr,  # float32 [L, num_segments, DV]
    headptr_ptr,  # int64 [H + 1]: where the ties of each head begin
    ties_ptr,  # int64 [num_ties, 3]: tie, relation, and what leads from segments to their results; by head
    out_ptr,  # [L, H, N, DV]
    lse_ptr,  # float32 [L, H, N], natural log
    draw_ptr,  # int64 [2], seed and offset, or None
    scale2,
    num_genes,
    num_heads,
    num_segments,
    num_prefix,
    threshold,
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    SELF_LOOPS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,  # False: no tie has a hub
    STRIDE_QT: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    STRIDE_VT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    W: tl.constexpr,
    WV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):
    """One row of a head."""
    i_row = tl.program_id(0).to(tl.int64)
    i_l = i_row // num_genes // num_heads
    head = i_row // num_genes % num_heads
    gene = i_row % num_genes
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + head * (stride_qh // ALIGN * ALIGN)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + head * (stride_kh // ALIGN * ALIGN)
    p_v = v_ptr + i_l * (stride_vl // ALIGN * ALIGN) + head * (stride_vh // ALIGN * ALIGN)
    # [D_PAD]
    b_q = row_at(p_q + gene * STRIDE_QT, W, D_PAD)
    # [EDGES], [EDGES, DV_PAD]
    o_e = tl.arange(0, EDGES)
    b_m = tl.full([EDGES], -LARGEST, tl.float32)
    b_l = tl.zeros([EDGES], tl.float32)
    b_o = tl.zeros([EDGES, DV_PAD], tl.float32)
    line = line_of(draw_ptr, threshold, i_l, num_heads, head, num_prefix + gene) if draw_ptr is not None else None
    num_near = num_prefix + 1 if SELF_LOOPS else num_prefix
    num_seen = num_near.to(tl.int64)
    for n in range(0, num_near, EDGES):
        m_e = n + o_e < num_near
        b_token = tl.where(n + o_e < num_prefix, n + o_e, num_prefix + gene.to(tl.int32))
        b_m, b_l, b_o = _see(
            b_m, b_l, b_o, b_q, p_k, p_v, b_token, 0.0, m_e, scale2, line, 0, 0, STRIDE_KT, STRIDE_VT, W, WV, D_PAD, DV_PAD
        )
    for i in range(tl.load(headptr_ptr + head), tl.load(headptr_ptr + head + 1)):
        p_t = ties_ptr + i * 3
        tie = tl.load(p_t)
        bias2 = bias_of(bias_ptr, tie)
        stacked = tl.load(p_t + 1) * num_genes + gene
        start = tl.load(rowptr_ptr + stacked)
        end = tl.load(rowptr_ptr + stacked + 1)
        num_seen += end - start
        if HAS_SEGMENTS:
            first = tl.load(segptr_ptr + stacked)
            last = tl.load(segptr_ptr + stacked + 1)
            o_part = i_l * num_segments + tl.load(p_t + 2)
            for s in range(first, last, EDGES):
                m_s = s + o_e < last
                b_s = tl.load(part_lse2_ptr + o_part + s + o_e, mask=m_s, other=float("-inf"))
                b_v = gather(part_out_ptr + o_part * DV, s + o_e, m_s, DV, DV, DV_PAD)
                b_m, b_l, b_o = _attend(b_m, b_l, b_o, b_s, b_v, None)
            end = tl.where(first < last, start, end)
        b_m, b_l, b_o = _see_edges(
            b_m, b_l, b_o, b_q, p_k + num_prefix * STRIDE_KT, p_v + num_prefix * STRIDE_VT, col_ptr, log_weight_ptr, bias2,
            start, end, scale2, line, (1 + tie).to(tl.int32), num_prefix, STRIDE_KT, STRIDE_VT, W, WV, D_PAD, DV_PAD, EDGES,
        )  # fmt: skip
    m, total, b_out = _across(b_m, b_l, b_o)
    # [DV_PAD]
    o_v = tl.arange(0, DV_PAD)
    tl.store(lse_ptr + i_row, (m + tl.log2(total)) * LN2)
    b_out = b_out / tl.where(num_seen == 0, 1.0, total)
    tl.store(out_ptr + i_row * DV + o_v, b_out.to(out_ptr.dtype.element_ty), mask=o_v < DV)


# -------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _slopes(
    b_q, b_do, lse2, delta, p_k, p_v, b_token, b_added, m_e, scale2, line, copy, first,
    STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
):  # fmt: skip
    """(dS [EDGES], k [EDGES, D_PAD]) of one entry a lane of a row."""
    b_k = gather(p_k, b_token, m_e, STRIDE_KT, W, D_PAD)
    b_v = gather(p_v, b_token, m_e, STRIDE_VT, WV, DV_PAD)
    b_s = scale2 * sum_of_products(b_q[None, :], b_k, m_e[:, None], 1) + b_added
    b_dp = sum_of_products(b_do[None, :], b_v, m_e[:, None], 1)
    if line is not None:
        b_dp *= factor(line, copy, first + b_token, True)
    return tl.where(m_e, tl.exp2(b_s - lse2) * (b_dp - delta), 0.0), b_k


@triton.jit
def _add_row(
    b_dq, b_db, b_q, b_do, lse2, delta, p_k, p_v, col_ptr, log_weight_ptr, bias2, start, end, scale2, line, copy, first,
    STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """b_dq + dS_e k_j [EDGES, D_PAD] and b_db + dS_e [EDGES] over the entries from start to end of a row, lane by lane."""
    o_e = tl.arange(0, EDGES)
    b_col = tl.load(col_ptr + start + o_e, mask=start + o_e < end, other=0)
    for e in range(start, end, EDGES):
        m_e = e + o_e < end
        b_token = b_col
        b_added = added(log_weight_ptr, bias2, e + o_e, m_e)
        b_col = tl.load(col_ptr + e + EDGES + o_e, mask=e + EDGES + o_e < end, other=0)
        b_ds, b_k = _slopes(
            b_q, b_do, lse2, delta, p_k, p_v, b_token, b_added, m_e, scale2, line, copy, first,
            STRIDE_KT, STRIDE_VT, W, WV, D_PAD, DV_PAD,
        )  # fmt: skip
        b_dq += b_ds[:, None] * b_k
        b_db += b_ds
    return b_dq, b_db


@triton.jit(do_not_specialize=SIZES)
def edge_bwd_kernel_dq_segments(
    q_ptr, k_ptr, v_ptr, bias_ptr, rowptr_ptr, col_ptr, log_weight_ptr, segptr_ptr, segrow_ptr, ties_ptr,  # as in the forward
    do_ptr,  # [L, H, N, DV]
    lse2_ptr,  # float32 [L, H, N], base 2, NaN where it is infinite
    delta_ptr,  # float32 [L, H, N]
    dq_ptr,  # float32 [L, num_segments, D], without the scale
    dbias_ptr,  # float32 [L, num_segments] or None
    draw_ptr,  # as in the forward
    scale2, num_genes, num_heads, num_ties, max_segments, num_segments, num_prefix, threshold,
    stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh, stride_dol, stride_doh,
    STRIDE_QT: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_DOT: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """dq of one segment of a row, and what its entries give to the bias."""
    pid = tl.program_id(0)
    i_t = (pid // max_segments) % num_ties
    i_l = (pid // max_segments // num_ties).to(tl.int64)
    p_t = ties_ptr + i_t * 4
    if pid % max_segments >= tl.load(p_t + 2):
        return
    i_s = tl.load(p_t + 1) + pid % max_segments
    head = tl.load(p_t)
    stacked = tl.load(segrow_ptr + i_s)
    start, end = span_of_segment(rowptr_ptr, segptr_ptr, stacked, i_s)
    gene = stacked % num_genes
    i_row = (i_l * num_heads + head) * num_genes + gene
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + head * (stride_qh // ALIGN * ALIGN)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + head * (stride_kh // ALIGN * ALIGN) + num_prefix * STRIDE_KT
    p_v = v_ptr + i_l * (stride_vl // ALIGN * ALIGN) + head * (stride_vh // ALIGN * ALIGN) + num_prefix * STRIDE_VT
    p_do = do_ptr + i_l * (stride_dol // ALIGN * ALIGN) + head * (stride_doh // ALIGN * ALIGN)
    # [D_PAD], [DV_PAD]
    b_q = row_at(p_q + gene * STRIDE_QT, W, D_PAD)
    b_do = row_at(p_do + gene * STRIDE_DOT, WV, DV_PAD)
    line = line_of(draw_ptr, threshold, i_l, num_heads, head, num_prefix + gene) if draw_ptr is not None else None
    # [EDGES, D_PAD], [EDGES]
    b_dq = tl.zeros([EDGES, D_PAD], tl.float32)
    b_db = tl.zeros([EDGES], tl.float32)
    b_dq, b_db = _add_row(
        b_dq, b_db, b_q, b_do, tl.load(lse2_ptr + i_row), tl.load(delta_ptr + i_row), p_k, p_v, col_ptr, log_weight_ptr,
        bias_of(bias_ptr, i_t), start, end, scale2, line, 1 + i_t, num_prefix,
        STRIDE_KT, STRIDE_VT, W, WV, D_PAD, DV_PAD, EDGES,
    )  # fmt: skip
    # [D_PAD]
    o_d = tl.arange(0, D_PAD)
    o_s = i_l * num_segments + i_s + tl.load(p_t + 3)
    tl.store(dq_ptr + o_s * D + o_d, tl.sum(b_dq, 0), mask=o_d < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + o_s, tl.sum(b_db, 0))


@triton.jit(do_not_specialize=SIZES)
def edge_bwd_kernel_dq(
    q_ptr, k_ptr, v_ptr, bias_ptr, rowptr_ptr, col_ptr, log_weight_ptr, segptr_ptr,  # as in the forward
    part_dq_ptr, part_dbias_ptr,  # of the segments; not read unless HAS_SEGMENTS, nor is segptr
    headptr_ptr, ties_ptr,  # as in the forward
    do_ptr, lse2_ptr, delta_ptr,  # as of a segment
    dq_ptr,  # [L, H, N, D]
    dbias_ptr,  # float32 [L, N, num_ties] or None
    draw_ptr,  # as in the forward
    scale, scale2, num_genes, num_heads, num_ties, num_segments, num_prefix, threshold,
    stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh, stride_dol, stride_doh,
    SELF_LOOPS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    STRIDE_QT: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_DOT: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """dq of one row of a head, and what each tie's entries of it give to the bias."""
    i_row = tl.program_id(0).to(tl.int64)
    i_l = i_row // num_genes // num_heads
    head = i_row // num_genes % num_heads
    gene = i_row % num_genes
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + head * (stride_qh // ALIGN * ALIGN)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + head * (stride_kh // ALIGN * ALIGN)
    p_v = v_ptr + i_l * (stride_vl // ALIGN * ALIGN) + head * (stride_vh // ALIGN * ALIGN)
    p_do = do_ptr + i_l * (stride_dol // ALIGN * ALIGN) + head * (stride_doh // ALIGN * ALIGN)
    # [D_PAD], [DV_PAD]
    b_q = row_at(p_q + gene * STRIDE_QT, W, D_PAD)
    b_do = row_at(p_do + gene * STRIDE_DOT, WV, DV_PAD)
    lse2, delta = tl.load(lse2_ptr + i_row), tl.load(delta_ptr + i_row)
    line = line_of(draw_ptr, threshold, i_l, num_heads, head, num_prefix + gene) if draw_ptr is not None else None
    # [EDGES], [EDGES, D_PAD]
    o_e = tl.arange(0, EDGES)
    b_dq = tl.zeros([EDGES, D_PAD], tl.float32)
    num_near = num_prefix + 1 if SELF_LOOPS else num_prefix
    for n in range(0, num_near, EDGES):
        m_e = n + o_e < num_near
        b_token = tl.where(n + o_e < num_prefix, n + o_e, num_prefix + gene.to(tl.int32))
        b_ds, b_k = _slopes(
            b_q, b_do, lse2, delta, p_k, p_v, b_token, 0.0, m_e, scale2, line, 0, 0,
            STRIDE_KT, STRIDE_VT, W, WV, D_PAD, DV_PAD,
        )  # fmt: skip
        b_dq += b_ds[:, None] * b_k
    for i in range(tl.load(headptr_ptr + head), tl.load(headptr_ptr + head + 1)):
        p_t = ties_ptr + i * 3
        tie = tl.load(p_t)
        stacked = tl.load(p_t + 1) * num_genes + gene
        start = tl.load(rowptr_ptr + stacked)
        end = tl.load(rowptr_ptr + stacked + 1)
        b_db = tl.zeros([EDGES], tl.float32)
        if HAS_SEGMENTS:
            first = tl.load(segptr_ptr + stacked)
            last = tl.load(segptr_ptr + stacked + 1)
            o_part = i_l * num_segments + tl.load(p_t + 2)
            b_dq = add_segments(b_dq, part_dq_ptr + o_part * D, first, last, D, D_PAD, EDGES)
            if dbias_ptr is not None:
                for s in range(first, last, EDGES):
                    b_db += tl.load(part_dbias_ptr + o_part + s + o_e, mask=s + o_e < last, other=0.0)
            end = tl.where(first < last, start, end)
        b_dq, b_db = _add_row(
            b_dq, b_db, b_q, b_do, lse2, delta, p_k + num_prefix * STRIDE_KT, p_v + num_prefix * STRIDE_VT, col_ptr,
            log_weight_ptr, bias_of(bias_ptr, tie), start, end, scale2, line, (1 + tie).to(tl.int32), num_prefix,
            STRIDE_KT, STRIDE_VT, W, WV, D_PAD, DV_PAD, EDGES,
        )  # fmt: skip
        if dbias_ptr is not None:
            tl.store(dbias_ptr + (i_l * num_genes + gene) * num_ties + tie, tl.sum(b_db, 0))
    # [D_PAD]
    o_d = tl.arange(0, D_PAD)
    tl.store(dq_ptr + i_row * D + o_d, (tl.sum(b_dq, 0) * scale).to(dq_ptr.dtype.element_ty), mask=o_d < D)


@triton.jit
def _be_seen(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse2, p_delta, b_row, b_added, m_e, scale2, line, copy, first,
    STRIDE_QT: tl.constexpr, STRIDE_DOT: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
):  # fmt: skip
    """Add dS_e q_i to b_dk [EDGES, D_PAD] and Z_e P_e dOut_i to b_dv [EDGES, DV_PAD], of one row a lane that sees the column.

    line: of the column, or None; entries are `copy` of the tokens first + b_row.
    """
    b_q = gather(p_q, b_row, m_e, STRIDE_QT, W, D_PAD)
    b_do = gather(p_do, b_row, m_e, STRIDE_DOT, WV, DV_PAD)
    b_lse2 = tl.load(p_lse2 + b_row, mask=m_e, other=0.0)
    b_delta = tl.load(p_delta + b_row, mask=m_e, other=0.0)
    b_s = scale2 * sum_of_products(b_k[None, :], b_q, m_e[:, None], 1) + b_added
    b_dp = sum_of_products(b_v[None, :], b_do, m_e[:, None], 1)
    b_p = tl.where(m_e, tl.exp2(b_s - b_lse2), 0.0)
    b_zp = b_p
    if line is not None:
        b_z = factor(line, copy, first + b_row, False)
        b_dp *= b_z
        b_zp *= b_z
    return b_dk + (b_p * (b_dp - b_delta))[:, None] * b_q, b_dv + b_zp[:, None] * b_do


@triton.jit
def _add_column(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse2, p_delta, row_ptr, log_weight_ptr, bias2, start, end, scale2, line, copy, first,
    STRIDE_QT: tl.constexpr, STRIDE_DOT: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """`_be_seen` by the entries from start to end of a column."""
    o_e = tl.arange(0, EDGES)
    b_row = tl.load(row_ptr + start + o_e, mask=start + o_e < end, other=0)
    for e in range(start, end, EDGES):
        m_e = e + o_e < end
        b_token = b_row
        b_added = added(log_weight_ptr, bias2, e + o_e, m_e)
        b_row = tl.load(row_ptr + e + EDGES + o_e, mask=e + EDGES + o_e < end, other=0)
        b_dk, b_dv = _be_seen(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse2, p_delta, b_token, b_added, m_e, scale2, line, copy, first,
            STRIDE_QT, STRIDE_DOT, W, WV, D_PAD, DV_PAD,
        )  # fmt: skip
    return b_dk, b_dv


@triton.jit(do_not_specialize=SIZES)
def edge_bwd_kernel_dkv_segments(
    q_ptr, k_ptr, v_ptr, bias_ptr,  # as in the forward
    colptr_ptr,  # int64 [K * N + 1]
    row_ptr,  # int32 [E], by column
    log_weight_ptr,  # float32 [E], by column, or None
    segptr_ptr,  # int64 [K * N + 1]: the first segment of each stacked column
    segcol_ptr,  # int64 [S]: the stacked column of each segment
    ties_ptr,  # int64 [num_ties, 4]: as in the forward
    do_ptr, lse2_ptr, delta_ptr,  # as in dq
    dk_ptr,  # float32 [L, num_segments, D], without the scale
    dv_ptr,  # float32 [L, num_segments, DV]
    draw_ptr,  # as in the forward
    scale2, num_genes, num_heads, num_ties, max_segments, num_segments, num_prefix, threshold,
    stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh, stride_dol, stride_doh,
    STRIDE_QT: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_DOT: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one segment of a column."""
    pid = tl.program_id(0)
    i_t = (pid // max_segments) % num_ties
    i_l = (pid // max_segments // num_ties).to(tl.int64)
    p_t = ties_ptr + i_t * 4
    if pid % max_segments >= tl.load(p_t + 2):
        return
    i_s = tl.load(p_t + 1) + pid % max_segments
    head = tl.load(p_t)
    stacked = tl.load(segcol_ptr + i_s)
    start, end = span_of_segment(colptr_ptr, segptr_ptr, stacked, i_s)
    gene = stacked % num_genes
    o_row = (i_l * num_heads + head) * num_genes
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + head * (stride_qh // ALIGN * ALIGN)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + head * (stride_kh // ALIGN * ALIGN)
    p_v = v_ptr + i_l * (stride_vl // ALIGN * ALIGN) + head * (stride_vh // ALIGN * ALIGN)
    p_do = do_ptr + i_l * (stride_dol // ALIGN * ALIGN) + head * (stride_doh // ALIGN * ALIGN)
    # [D_PAD], [DV_PAD]
    b_k = row_at(p_k + (num_prefix + gene) * STRIDE_KT, W, D_PAD)
    b_v = row_at(p_v + (num_prefix + gene) * STRIDE_VT, WV, DV_PAD)
    line = line_of(draw_ptr, threshold, i_l, num_heads, head, num_prefix + gene) if draw_ptr is not None else None
    # [EDGES, D_PAD], [EDGES, DV_PAD]
    b_dk = tl.zeros([EDGES, D_PAD], tl.float32)
    b_dv = tl.zeros([EDGES, DV_PAD], tl.float32)
    b_dk, b_dv = _add_column(
        b_dk, b_dv, b_k, b_v, p_q, p_do, lse2_ptr + o_row, delta_ptr + o_row, row_ptr, log_weight_ptr, bias_of(bias_ptr, i_t),
        start, end, scale2, line, 1 + i_t, num_prefix, STRIDE_QT, STRIDE_DOT, W, WV, D_PAD, DV_PAD, EDGES,
    )  # fmt: skip
    # [D_PAD], [DV_PAD]
    o_d, o_v = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    o_s = i_l * num_segments + i_s + tl.load(p_t + 3)
    tl.store(dk_ptr + o_s * D + o_d, tl.sum(b_dk, 0), mask=o_d < D)
    tl.store(dv_ptr + o_s * DV + o_v, tl.sum(b_dv, 0), mask=o_v < DV)


@triton.jit(do_not_specialize=SIZES)
def edge_bwd_kernel_dkv(
    q_ptr, k_ptr, v_ptr, bias_ptr, colptr_ptr, row_ptr, log_weight_ptr, segptr_ptr,  # as of a segment
    part_dk_ptr, part_dv_ptr,  # of the segments; not read unless HAS_SEGMENTS, nor is segptr
    headptr_ptr, ties_ptr,  # as in the forward
    do_ptr, lse2_ptr, delta_ptr,  # as in dq
    dk_ptr,  # [L, H, T, D], of which the rows of prefix tokens are not written
    dv_ptr,  # [L, H, T, DV], likewise
    draw_ptr,  # as in the forward
    scale, scale2, num_genes, num_heads, num_segments, num_prefix, threshold,
    stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh, stride_dol, stride_doh,
    SELF_LOOPS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    STRIDE_QT: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_DOT: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one gene of a head."""
    i_col = tl.program_id(0).to(tl.int64)
    i_lh = i_col // num_genes
    i_l = i_lh // num_heads
    head = i_lh % num_heads
    gene = i_col % num_genes
    o_row = i_lh * num_genes
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + head * (stride_qh // ALIGN * ALIGN)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + head * (stride_kh // ALIGN * ALIGN)
    p_v = v_ptr + i_l * (stride_vl // ALIGN * ALIGN) + head * (stride_vh // ALIGN * ALIGN)
    p_do = do_ptr + i_l * (stride_dol // ALIGN * ALIGN) + head * (stride_doh // ALIGN * ALIGN)
    # [D_PAD], [DV_PAD]
    b_k = row_at(p_k + (num_prefix + gene) * STRIDE_KT, W, D_PAD)
    b_v = row_at(p_v + (num_prefix + gene) * STRIDE_VT, WV, DV_PAD)
    # [EDGES], [EDGES, D_PAD], [EDGES, DV_PAD]
    o_e = tl.arange(0, EDGES)
    b_dk = tl.zeros([EDGES, D_PAD], tl.float32)
    b_dv = tl.zeros([EDGES, DV_PAD], tl.float32)
    line = line_of(draw_ptr, threshold, i_l, num_heads, head, num_prefix + gene) if draw_ptr is not None else None
    if SELF_LOOPS:
        b_dk, b_dv = _be_seen(
            b_dk, b_dv, b_k, b_v, p_q, p_do, lse2_ptr + o_row, delta_ptr + o_row, gene + o_e * 0, 0.0, o_e < 1, scale2,
            line, 0, num_prefix, STRIDE_QT, STRIDE_DOT, W, WV, D_PAD, DV_PAD,
        )  # fmt: skip
    for i in range(tl.load(headptr_ptr + head), tl.load(headptr_ptr + head + 1)):
        p_t = ties_ptr + i * 3
        tie = tl.load(p_t)
        bias2 = bias_of(bias_ptr, tie)
        stacked = tl.load(p_t + 1) * num_genes + gene
        start = tl.load(colptr_ptr + stacked)
        end = tl.load(colptr_ptr + stacked + 1)
        if HAS_SEGMENTS:
            first = tl.load(segptr_ptr + stacked)
            last = tl.load(segptr_ptr + stacked + 1)
            o_part = i_l * num_segments + tl.load(p_t + 2)
            b_dk = add_segments(b_dk, part_dk_ptr + o_part * D, first, last, D, D_PAD, EDGES)
            b_dv = add_segments(b_dv, part_dv_ptr + o_part * DV, first, last, DV, DV_PAD, EDGES)
            end = tl.where(first < last, start, end)
        b_dk, b_dv = _add_column(
            b_dk, b_dv, b_k, b_v, p_q, p_do, lse2_ptr + o_row, delta_ptr + o_row, row_ptr, log_weight_ptr, bias2, start, end,
            scale2, line, (1 + tie).to(tl.int32), num_prefix, STRIDE_QT, STRIDE_DOT, W, WV, D_PAD, DV_PAD, EDGES,
        )  # fmt: skip
    # [D_PAD], [DV_PAD]
    o_d, o_v = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    o_out = i_lh * (num_prefix + num_genes) + num_prefix + gene
    tl.store(dk_ptr + o_out * D + o_d, (tl.sum(b_dk, 0) * scale).to(dk_ptr.dtype.element_ty), mask=o_d < D)
    tl.store(dv_ptr + o_out * DV + o_v, tl.sum(b_dv, 0).to(dv_ptr.dtype.element_ty), mask=o_v < DV)


# ----------------------------------------------------------------------------------------------------------- launchers


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rowptr: Tensor,
    col: Tensor,
    log_weight: Tensor | None,
    colptr: Tensor,
    row: Tensor,
    log_weight_by_column: Tensor | None,
    row_segptr: Tensor,
    segment_row: Tensor,
    row_segments: Sequence[int],
    col_segptr: Tensor,
    segment_col: Tensor,
    col_segments: Sequence[int],
    relations: Sequence[int],
    heads: Sequence[int],
    num_prefix: int,
    self_loops: bool,
    scale: float,
    draw: Tensor | None = None,
    threshold: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out [..., H, N, DV] in the dtype of q, lse [..., H, N] float32); the operator `cellattn::edge_attention`."""
    check_floats(q=q, k=k, v=v)
    check_devices(
        q=q, k=k, v=v, edge_bias=bias, rowptr=rowptr, col=col, log_weight=log_weight, row_segptr=row_segptr,
        segment_row=segment_row, draw=draw,
    )  # fmt: skip
    check_draw(draw, threshold)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    num_heads, num_genes = q.shape[-3:-1]
    cut = Segments.of_ties(relations, row_segments)
    steps, suffix = (None, "") if draw is None else (threshold, "_dropout")
    q, k, v = (aligned(x, 2, num_prefix=num_prefix) for x in (q, k, v))
    shape, lead = _shape(q, k, v)
    tile_dim = max(shape["D_PAD"], shape["DV_PAD"])
    part_lse2 = q.new_empty(q.shape[0], cut.total, dtype=torch.float32) if cut.total else None
    part_out = cut.partial_sums(v)

    def launch_segments(tile: Gather) -> None:
        edge_fwd_kernel_segments[grid_of(q.shape[0] * len(heads) * cut.most, q=q)](
            q, k, v, bias, rowptr, col, log_weight, row_segptr, segment_row, cut.table(heads, q.device), part_lse2, part_out,
            draw, scale * attention.LOG2E, num_genes, num_heads, len(heads), cut.most, cut.total, num_prefix, steps, *lead,
            **shape, EDGES=tile.rows, **tile.options,
        )  # fmt: skip

    def launch(tile: Gather) -> None:
        edge_fwd_kernel[grid_of(q.shape[0] * num_heads * num_genes, q=q)](
            q, k, v, bias, rowptr, col, log_weight, row_segptr, part_lse2, part_out,
            *_by_head(relations, heads, num_heads, cut, q.device), out, lse,
            draw, scale * attention.LOG2E, num_genes, num_heads, cut.total, num_prefix, steps, *lead,
            SELF_LOOPS=self_loops, HAS_SEGMENTS=cut.total > 0, **shape, EDGES=tile.rows, **tile.options,
        )  # fmt: skip

    with on_device(q):
        if cut.total > 0:
            choose_gather("edge_fwd_segments" + suffix, q, tile_dim, launch_segments)
        choose_gather("edge_fwd" + suffix, q, tile_dim, launch)
    return out, lse


def edge_attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rowptr: Tensor,
    col: Tensor,
    log_weight: Tensor | None,
    colptr: Tensor,
    row: Tensor,
    log_weight_by_column: Tensor | None,
    row_segptr: Tensor,
    segment_row: Tensor,
    row_segments: Sequence[int],
    col_segptr: Tensor,
    segment_col: Tensor,
    col_segments: Sequence[int],
    relations: Sequence[int],
    heads: Sequence[int],
    num_prefix: int,
    self_loops: bool,
    scale: float,
    draw: Tensor | None = None,
    threshold: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, and float32 [..., N, ties], what each row gives to the bias); `cellattn::edge_attention_backward`."""
    check_floats(q=q, k=k, v=v)
    check_devices(
        q=q, k=k, v=v, dout=dout, dlse=dlse, out=out, lse=lse, edge_bias=bias, rowptr=rowptr, col=col, log_weight=log_weight,
        colptr=colptr, row=row, log_weight_by_column=log_weight_by_column, row_segptr=row_segptr, segment_row=segment_row,
        col_segptr=col_segptr, segment_col=segment_col, draw=draw,
    )  # fmt: skip
    check_draw(draw, threshold)
    if dout is None:  # the log-sum-exp is of the whole map
        draw = None
    steps, suffix = (None, "") if draw is None else (threshold, "_dropout")
    (num_heads, num_genes), num_ties = q.shape[-3:-1], len(heads)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dbias = lse.new_empty(*q.shape[:-3], num_genes, 0 if bias is None else num_ties)
    if lse.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), dbias
    by_row, by_column = (Segments.of_ties(relations, offset) for offset in (row_segments, col_segments))
    above = torch.zeros_like(out) if dout is None else dout
    q, k, v, do = (aligned(x, 2, num_prefix=num_prefix) for x in (q, k, v, above))
    rows = attention.deltas(do, dlse, out, lse)
    of_rows = do, rows.lse2, rows.delta
    shape, lead = _shape(q, k, v, do)
    tile_dim = max(shape["D_PAD"], shape["DV_PAD"])
    part_dq, part_dk, part_dv = by_row.partial_sums(q), by_column.partial_sums(k), by_column.partial_sums(v)
    part_dbias = None
    if by_row.total and bias is not None:
        part_dbias = lse.new_empty(q.shape[0], by_row.total)
    graph_by_row, graph_by_column = (rowptr, col, log_weight, row_segptr), (colptr, row, log_weight_by_column, col_segptr)
    numbers = scale, scale * attention.LOG2E, num_genes, num_heads

    def launch_dq_segments(tile: Gather) -> None:
        edge_bwd_kernel_dq_segments[grid_of(q.shape[0] * num_ties * by_row.most, q=q)](
            q, k, v, bias, *graph_by_row, segment_row, by_row.table(heads, q.device), *of_rows, part_dq, part_dbias,
            draw, *numbers[1:], num_ties, by_row.most, by_row.total, num_prefix, steps, *lead, **shape, EDGES=tile.rows,
            **tile.options,
        )  # fmt: skip

    def launch_dq(tile: Gather) -> None:
        edge_bwd_kernel_dq[grid_of(q.shape[0] * num_heads * num_genes, q=q)](
            q, k, v, bias, *graph_by_row, part_dq, part_dbias, *_by_head(relations, heads, num_heads, by_row, q.device),
            *of_rows, dq, None if bias is None else dbias, draw, *numbers, num_ties, by_row.total, num_prefix, steps, *lead,
            SELF_LOOPS=self_loops, HAS_SEGMENTS=by_row.total > 0, **shape, EDGES=tile.rows, **tile.options,
        )  # fmt: skip

    def launch_dkv_segments(tile: Gather) -> None:
        edge_bwd_kernel_dkv_segments[grid_of(q.shape[0] * num_ties * by_column.most, q=q)](
            q, k, v, bias, *graph_by_column, segment_col, by_column.table(heads, q.device), *of_rows, part_dk, part_dv,
            draw, *numbers[1:], num_ties, by_column.most, by_column.total, num_prefix, steps, *lead, **shape, EDGES=tile.rows,
            **tile.options,
        )  # fmt: skip

    def launch_dkv(tile: Gather) -> None:
        edge_bwd_kernel_dkv[grid_of(q.shape[0] * num_heads * num_genes, q=q)](
            q, k, v, bias, *graph_by_column, part_dk, part_dv, *_by_head(relations, heads, num_heads, by_column, q.device),
            *of_rows, dk, dv, draw, *numbers, by_column.total, num_prefix, steps, *lead,
            SELF_LOOPS=self_loops, HAS_SEGMENTS=by_column.total > 0, **shape, EDGES=tile.rows, **tile.options,
        )  # fmt: skip

    def launch_large() -> None:
        assert rows.has_large is not None
        exact = torch.empty_like(rows.lse2, dtype=torch.float64)
        scale_single = torch.tensor(scale, dtype=torch.float32).item()
        scales, sizes = (scale_single, scale - scale_single), (q.shape[0], num_genes, num_heads)
        EDGES, compiled = exactly(tile_dim)
        constants = {**shape, "SELF_LOOPS": self_loops, "BM": ROWS, "EDGES": EDGES, **compiled}
        edge_bwd_kernel_large_dq[grid_of(num_programs(rows.has_large.numel(), q.device), q=q)](
            q, k, v, bias, *graph_by_row[:3], *_by_head(relations, heads, num_heads, by_row, q.device), *of_rows,
            rows.has_large, rows.dlse, exact, dq, None if bias is None else dbias, draw, *scales, *sizes, num_ties,
            num_prefix, steps, *lead, **constants,
        )  # fmt: skip
        edge_bwd_kernel_large_dkv[grid_of(num_programs(q.shape[0] * num_heads * k.shape[-2], k.device), k=k)](
            q, k, v, bias, *graph_by_column[:3], *_by_head(relations, heads, num_heads, by_column, q.device), *of_rows,
            rows.has_large, exact, dk, dv, draw, *scales, *sizes, num_prefix, steps, *lead, **constants,
        )  # fmt: skip

    with on_device(q):
        if by_row.total > 0:
            choose_gather("edge_bwd_dq_segments" + suffix, q, tile_dim, launch_dq_segments)
        choose_gather("edge_bwd_dq" + suffix, q, tile_dim, launch_dq)
        if by_column.total > 0:
            choose_gather("edge_bwd_dkv_segments" + suffix, q, tile_dim, launch_dkv_segments)
        choose_gather("edge_bwd_dkv" + suffix, q, tile_dim, launch_dkv)
    if num_prefix > 0:
        seen = k[..., :num_prefix, :], v[..., :num_prefix, :]
        of_prefix = k.new_empty(*k.shape[:-2], num_prefix, dk.shape[-1]), v.new_empty(*v.shape[:-2], num_prefix, dv.shape[-1])
        of_all, from_all = q, rows._replace(has_large=None)
        if draw is not None:  # where dropout counts the rows of genes from: rows of zeros, which add nothing
            do, of_all = (aligned(F.pad(x, (0, 0, num_prefix, 0)), 2) for x in (do, q))
            lse2, delta = (F.pad(x, (num_prefix, 0)) for x in (rows.lse2, rows.delta))
            from_all = from_all._replace(lse2=lse2, delta=delta)
        attention.backward(do, from_all, of_all, *seen, None, scale, draw, threshold, None, *of_prefix)
        for whole, part in zip((dk, dv), of_prefix, strict=True):
            whole[..., :num_prefix, :] = part.view(*whole.shape[:-2], num_prefix, -1)
    with on_device(q):
        launch_large()
    if dout is None:
        dv.zero_()
    return dq, dk, dv, dbias


def _shape(q: Tensor, k: Tensor, v: Tensor, *do: Tensor) -> tuple[dict[str, int], list[int]]:
    """(what kernels are compiled for, strides of leading dimensions and heads)"""
    (d, dv), dtype = (q.shape[-1], v.shape[-1]), q.dtype
    rows = {f"STRIDE_{name}T": x.stride(-2) for name, x in zip(("Q", "K", "V", "DO"), (q, k, v, *do), strict=False)}
    widths = {"D": d, "DV": dv, "W": width(d, dtype), "WV": width(dv, dtype), "D_PAD": padded(d), "DV_PAD": padded(dv)}
    return {**rows, "ALIGN": wide(dtype), **widths}, [stride for x in (q, k, v, *do) for stride in lead_strides(x)]


def _by_head(
    relations: Sequence[int], heads: Sequence[int], num_heads: int, cut: Segments, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(int64 [H + 1], int64 [ties, 3]): where the ties of each head begin; tie, relation and shift of segments, by head."""
    order = sorted(range(len(heads)), key=lambda tie: heads[tie])
    headptr = device_ints(tuple(sum(head < h for head in heads) for h in range(num_heads + 1)), device)
    return headptr, rows_of_ints(((tie, relations[tie], cut.shifts[tie]) for tie in order), device)
