"""Triton kernels of `cellattn::row_dot` and its backward: products along CSR rows, all ties of a layer in one launch.

For a tie of a head to a relation with weights w, over the chosen rows i,

    kbar_i = sum_j w_ij k_j ,   y_i = q_i . kbar_i

and backward, with g_i the sum of dy over the places where row i was chosen (0 where it was not),

    dq_i = sum_ties g_i kbar_i ,   dk_j = sum_ties sum_i w_ij g_i q_i

the second along the rows of the transposed graph. Both sums over ties run inside the program that owns the output row, so
that dq and dk are written once, in a fixed order, without atomics.

One program takes one row, and one warp does: a row has 42 entries in the mean of the yeast graphs, and what is done once a row
(its place, its end, the sum of lanes) costs as much as several steps, on each warp that has a part in it. It gathers EDGES rows
of k at once, keeps EDGES partial sums [EDGES, D] and adds them up once after its loop, so that nothing inside the loop waits
for another lane. At D = 32 that is 16 entries a step. The loop is a pipeline: while a step gathers, the entries of the next are
on their way (in dk, where entries lead to g and g to rows, those of the next two as well), so that a step waits for one load,
not for two (three) one after the other.

Hub rows. A row (in dk, a column) of more than SEGMENT = 1,024 entries is cut into segments, alike to within one entry. A launch
before sums each segment in a program of its own, of four warps, and the program that owns the row adds these partial sums,
EDGES at once, where it would have walked the entries. Which rows are cut, and how many segments a relation has, are constants
of the graph (`MultiGraph.segments`), the second known to the host: no grid and no size depends on anything that only the device
knows, and where no tie has a hub there is no such launch.

By count, not measured: an A100 has 28 us of instructions to issue for the 60,000 rows of nine ties, of which seven in ten have
no entry, where four warps a row had 170 (docs/kernel_model.md). At 0.7 us a load, the fullest row that is not cut, 1,024
entries, is 64 steps or 45 us, and a segment 16 of its wider steps, 11 us. Of the rows 215 are cut, into 462 segments with an
eighth of all entries: fewer programs than an A100 holds at once, so that their launch is as long as one of them. With twice the
length 52 segments would take twice as long and leave the chip idle. CELLATTN_AUTOTUNE=1 tries EDGES and the warps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellattn._aligned import wide, width

from .config import Gather, choose_gather, on_device, options
from .segments import Segments, add_segments, device_ints, rows_of_ints, span_of_segment
from .sums import sum_of_products
from .tensors import aligned, check_devices, check_floats, grid_of, lead_strides, padded

# --------------------------------------------------------------------------------------------------------- device code
# Sizes: L leading dimensions as one, H heads, T = num_prefix + N tokens, N genes, K relations, E entries, S segments, M chosen
# rows of all ties. Strides of rows are constants of the kernel, and those of heads are known to be multiples of ALIGN, because
# only then does the compiler load a row of 20 or 24 numbers in wide pieces.


@triton.jit
def _add_row(
    b_sum, p_k, col_ptr, weight_ptr, start, end, STRIDE_KT: tl.constexpr, W: tl.constexpr, D_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """b_sum + w_ij k_j over the entries from start to end of a row, lane by lane [EDGES, D_PAD]."""
    # [D_PAD]
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < W
    # [EDGES]
    o_e = tl.arange(0, EDGES)
    b_col = tl.load(col_ptr + start + o_e, mask=start + o_e < end, other=0)
    for e in range(start, end, EDGES):
        m_e = e + o_e < end
        b_w = tl.load(weight_ptr + e + o_e, mask=m_e, other=0.0).to(tl.float32)
        p_b = p_k + b_col.to(tl.int64)[:, None] * STRIDE_KT + o_d[None, :]
        b_k = tl.load(p_b, mask=m_e[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        o_next = e + EDGES + o_e
        b_col = tl.load(col_ptr + o_next, mask=o_next < end, other=0)
        b_sum += b_w[:, None] * b_k
    return b_sum


@triton.jit
def _add_column(
    b_sum, p_q, p_g, row_ptr, weight_ptr, start, end, STRIDE_QT: tl.constexpr, W: tl.constexpr, D_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """b_sum + w_ij g_i q_i over the entries from start to end of a column, lane by lane [EDGES, D_PAD]."""
    # [D_PAD]
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < W
    # [EDGES]
    o_e = tl.arange(0, EDGES)
    o_next = start + EDGES + o_e
    b_row = tl.load(row_ptr + start + o_e, mask=start + o_e < end, other=0)
    b_next = tl.load(row_ptr + o_next, mask=o_next < end, other=0)
    b_g = tl.load(p_g + b_row, mask=start + o_e < end, other=0.0)
    for e in range(start, end, EDGES):
        m_g = b_g != 0  # rows that were not chosen are not read
        b_w = tl.load(weight_ptr + e + o_e, mask=e + o_e < end, other=0.0).to(tl.float32)
        p_b = p_q + b_row.to(tl.int64)[:, None] * STRIDE_QT + o_d[None, :]
        b_q = tl.load(p_b, mask=m_g[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        o_next = e + EDGES + o_e
        b_row = b_next
        b_next_g = tl.load(p_g + b_row, mask=o_next < end, other=0.0)
        b_next = tl.load(row_ptr + o_next + EDGES, mask=o_next + EDGES < end, other=0)
        b_sum += (b_w * b_g)[:, None] * b_q
        b_g = b_next_g
    return b_sum


@triton.jit(do_not_specialize=["num_genes", "num_ties", "max_segments", "num_segments", "num_prefix"])
def row_dot_fwd_kernel_segments(
    k_ptr,  # [L, H, T, D]
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    weight_ptr,  # float32 or float64 [E]
    segptr_ptr,  # int64 [K * N + 1]: the first segment of each stacked row
    segrow_ptr,  # int64 [S]: the stacked row of each segment
    ties_ptr,  # int64 [num_ties, 4]: head, first segment of the relation, how many, what leads from them to their partial sums
    chosen_ptr,  # bool [num_ties * N]; not read unless HAS_ROWS
    partial_ptr,  # float32 [L, num_segments, D]
    num_genes,
    num_ties,
    max_segments,  # of the tie that has most
    num_segments,  # of all ties
    num_prefix,
    stride_kl,
    stride_kh,
    HAS_ROWS: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    D_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):
    """kbar of one segment of a row, if it was chosen."""
    pid = tl.program_id(0)
    i_t = (pid // max_segments) % num_ties
    i_l = (pid // max_segments // num_ties).to(tl.int64)
    p_t = ties_ptr + i_t * 4
    if pid % max_segments >= tl.load(p_t + 2):
        return
    i_s = tl.load(p_t + 1) + pid % max_segments
    stacked = tl.load(segrow_ptr + i_s)
    start, end = span_of_segment(rowptr_ptr, segptr_ptr, stacked, i_s)
    if HAS_ROWS:  # of a row that was not chosen nothing is read
        end = tl.where(tl.load(chosen_ptr + i_t * num_genes + stacked % num_genes), end, start)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + tl.load(p_t) * (stride_kh // ALIGN * ALIGN) + num_prefix * STRIDE_KT
    # [EDGES, D_PAD]
    b_sum = tl.zeros([EDGES, D_PAD], dtype=tl.float32)
    b_sum = _add_row(b_sum, p_k, col_ptr, weight_ptr, start, end, STRIDE_KT, W, D_PAD, EDGES)
    # [D_PAD]
    o_d = tl.arange(0, D_PAD)
    o_s = i_l * num_segments + i_s + tl.load(p_t + 3)
    tl.store(partial_ptr + o_s * D + o_d, tl.sum(b_sum, 0), mask=o_d < D)


@triton.jit(do_not_specialize=["num_genes", "num_ties", "max_length", "num_rows", "num_segments", "num_prefix"])
def row_dot_fwd_kernel(
    q_ptr,  # [L, H, T, D]
    k_ptr,  # [L, H, T, D]
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    weight_ptr,  # float32 or float64 [E]
    segptr_ptr,  # int64 [K * N + 1]
    partial_ptr,  # float32 [L, num_segments, D]; not read unless HAS_SEGMENTS, nor is segptr
    ties_ptr,  # int64 [num_ties, 5]: relation, head, first row among the M, how many, from segments to their partial sums
    rows_ptr,  # int64 [M]: genes; not read unless HAS_ROWS
    y_ptr,  # float32 [L, M]
    kbar_ptr,  # float32 [L, M, D]
    num_genes,  # N
    num_ties,
    max_length,  # rows of the tie that has most
    num_rows,  # M
    num_segments,
    num_prefix,
    stride_ql,
    stride_qh,
    stride_kl,
    stride_kh,
    HAS_ROWS: tl.constexpr,  # False: every tie has all N rows
    HAS_SEGMENTS: tl.constexpr,  # False: no tie has a hub
    STRIDE_QT: tl.constexpr,
    STRIDE_KT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,  # columns of q and k that are loaded: zeros stand from D on
    D_PAD: tl.constexpr,  # a power of two >= D
    EDGES: tl.constexpr,  # entries gathered at once
):
    pid = tl.program_id(0)
    i_r = pid % max_length
    i_t = (pid // max_length) % num_ties
    i_l = (pid // max_length // num_ties).to(tl.int64)
    p_t = ties_ptr + i_t * 5
    if i_r >= tl.load(p_t + 3):
        return
    head = tl.load(p_t + 1)
    i_m = tl.load(p_t + 2) + i_r
    gene = i_r.to(tl.int64)
    if HAS_ROWS:
        gene = tl.load(rows_ptr + i_m)
    stacked = tl.load(p_t) * num_genes + gene
    start = tl.load(rowptr_ptr + stacked)
    end = tl.load(rowptr_ptr + stacked + 1)
    # [D_PAD]
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    o_m = i_l * num_rows + i_m
    p_q = q_ptr + i_l * stride_ql + head * stride_qh + (num_prefix + gene) * STRIDE_QT
    b_q = tl.load(p_q + o_d, mask=m_d, other=0.0).to(tl.float32)
    m_sum = m_d & (i_m < num_rows)  # for every lane, so that all have one sum: i_m is a row
    if start >= end:  # no entry, as of most rows
        b_kbar = tl.zeros([D_PAD], tl.float32)
        tl.store(kbar_ptr + o_m * D + o_d, b_kbar, mask=m_d)
        tl.store(y_ptr + o_m, sum_of_products(b_q, b_kbar, m_sum, 0))  # NaN where q is
        return
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + head * (stride_kh // ALIGN * ALIGN) + num_prefix * STRIDE_KT
    # [EDGES, D_PAD]
    b_sum = tl.zeros([EDGES, D_PAD], dtype=tl.float32)
    if HAS_SEGMENTS:
        first = tl.load(segptr_ptr + stacked)
        last = tl.load(segptr_ptr + stacked + 1)
        p_partial = partial_ptr + (i_l * num_segments + tl.load(p_t + 4)) * D
        b_sum = add_segments(b_sum, p_partial, first, last, D, D_PAD, EDGES)
        end = tl.where(first < last, start, end)
    b_sum = _add_row(b_sum, p_k, col_ptr, weight_ptr, start, end, STRIDE_KT, W, D_PAD, EDGES)
    # [D_PAD]
    b_kbar = tl.sum(b_sum, 0)
    tl.store(kbar_ptr + o_m * D + o_d, b_kbar, mask=m_d)
    tl.store(y_ptr + o_m, sum_of_products(b_q, b_kbar, m_sum, 0))


@triton.jit(do_not_specialize=["num_keys", "num_rows"])
def row_dot_bwd_kernel_g(
    dy_ptr,  # float32 [L, M]
    order_ptr,  # int64 [M]: chosen rows by (tie, gene)
    ptr_ptr,  # int64 [num_ties * N + 1]: where those of each (tie, gene) begin
    g_ptr,  # float32 [L, num_ties * N]
    num_keys,  # num_ties * N
    num_rows,  # M
    BLOCK: tl.constexpr,
):
    """g_i: the sum of dy over the places where a row was chosen, mostly none or one."""
    num_blocks = tl.cdiv(num_keys, BLOCK)
    i_l = (tl.program_id(0) // num_blocks).to(tl.int64)
    # [BLOCK]
    o_n = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < num_keys
    b_start = tl.load(ptr_ptr + o_n, mask=m_n, other=0)
    b_count = tl.load(ptr_ptr + o_n + 1, mask=m_n, other=0) - b_start
    b_g = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(tl.max(b_count, 0)):
        m_i = i < b_count
        b_m = tl.load(order_ptr + b_start + i, mask=m_i, other=0)
        b_g += tl.load(dy_ptr + i_l * num_rows + b_m, mask=m_i, other=0.0)
    tl.store(g_ptr + i_l * num_keys + o_n, b_g, mask=m_n)


@triton.jit(do_not_specialize=["num_genes", "num_ties", "num_rows", "num_prefix", "num_heads"])
def row_dot_bwd_kernel_dq(
    g_ptr,  # float32 [L, num_ties * N]
    kbar_ptr,  # float32 [L, M, D]
    slot_ptr,  # int64 [num_ties * N]: where among the M a row was chosen; not read unless HAS_ROWS
    headptr_ptr,  # int64 [H + 1]: where the ties of each head begin
    ties_ptr,  # int64 [num_ties, 3]: tie and relation, by head; the third is for dk
    dq_ptr,  # [L, H, T, D]
    num_genes,
    num_ties,
    num_rows,
    num_prefix,
    num_heads,
    HAS_ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BT: tl.constexpr,
):
    num_tokens = num_prefix + num_genes
    num_blocks = tl.cdiv(num_tokens, BT)
    i_lh = (tl.program_id(0) // num_blocks).to(tl.int64)
    i_l = i_lh // num_heads
    head = i_lh % num_heads
    # [D_PAD]
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    # [BT]
    o_t = (tl.program_id(0) % num_blocks) * BT + tl.arange(0, BT)
    m_t = o_t < num_tokens
    m_n = m_t & (o_t >= num_prefix)
    # [BT, D_PAD]
    b_dq = tl.zeros([BT, D_PAD], dtype=tl.float32)
    for i in range(tl.load(headptr_ptr + head), tl.load(headptr_ptr + head + 1)):
        o_n = tl.load(ties_ptr + i * 3) * num_genes + o_t - num_prefix
        b_g = tl.load(g_ptr + i_l * num_ties * num_genes + o_n, mask=m_n, other=0.0)
        m_g = m_n & (b_g != 0)
        b_m = o_n
        if HAS_ROWS:
            b_m = tl.load(slot_ptr + o_n, mask=m_g, other=0)
        p_b = kbar_ptr + (i_l * num_rows + b_m)[:, None] * D + o_d[None, :]
        b_dq += b_g[:, None] * tl.load(p_b, mask=m_g[:, None] & m_d[None, :], other=0.0)
    p_b = dq_ptr + (i_lh * num_tokens + o_t)[:, None] * D + o_d[None, :]
    tl.store(p_b, b_dq.to(dq_ptr.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["num_genes", "num_ties", "max_segments", "num_segments", "num_prefix"])
def row_dot_bwd_kernel_dk_segments(
    g_ptr,  # float32 [L, num_ties * N]
    q_ptr,  # [L, H, T, D]
    colptr_ptr,  # int64 [K * N + 1]
    row_ptr,  # int32 [E], by column
    weight_ptr,  # float32 or float64 [E], by column
    segptr_ptr,  # int64 [K * N + 1]: the first segment of each stacked column
    segcol_ptr,  # int64 [S]: the stacked column of each segment
    ties_ptr,  # int64 [num_ties, 4]: as in the forward
    partial_ptr,  # float32 [L, num_segments, D]
    num_genes,
    num_ties,
    max_segments,
    num_segments,
    num_prefix,
    stride_ql,
    stride_qh,
    STRIDE_QT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    D_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):
    """dk of one segment of a column."""
    pid = tl.program_id(0)
    i_t = (pid // max_segments) % num_ties
    i_l = (pid // max_segments // num_ties).to(tl.int64)
    p_t = ties_ptr + i_t * 4
    if pid % max_segments >= tl.load(p_t + 2):
        return
    i_s = tl.load(p_t + 1) + pid % max_segments
    start, end = span_of_segment(colptr_ptr, segptr_ptr, tl.load(segcol_ptr + i_s), i_s)
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + tl.load(p_t) * (stride_qh // ALIGN * ALIGN) + num_prefix * STRIDE_QT
    p_g = g_ptr + (i_l * num_ties + i_t) * num_genes
    # [EDGES, D_PAD]
    b_sum = tl.zeros([EDGES, D_PAD], dtype=tl.float32)
    b_sum = _add_column(b_sum, p_q, p_g, row_ptr, weight_ptr, start, end, STRIDE_QT, W, D_PAD, EDGES)
    # [D_PAD]
    o_d = tl.arange(0, D_PAD)
    o_s = i_l * num_segments + i_s + tl.load(p_t + 3)
    tl.store(partial_ptr + o_s * D + o_d, tl.sum(b_sum, 0), mask=o_d < D)


@triton.jit(do_not_specialize=["num_genes", "num_ties", "num_segments", "num_prefix", "num_heads"])
def row_dot_bwd_kernel_dk(
    g_ptr,  # float32 [L, num_ties * N]
    q_ptr,  # [L, H, T, D]
    colptr_ptr,  # int64 [K * N + 1]
    row_ptr,  # int32 [E], by column
    weight_ptr,  # float32 or float64 [E], by column
    segptr_ptr,  # int64 [K * N + 1]
    partial_ptr,  # float32 [L, num_segments, D]; not read unless HAS_SEGMENTS, nor is segptr
    headptr_ptr,  # int64 [H + 1]
    ties_ptr,  # int64 [num_ties, 3]: tie, relation, and what leads from segments to their partial sums; by head
    dk_ptr,  # [L, H, T, D]
    num_genes,
    num_ties,
    num_segments,
    num_prefix,
    num_heads,
    stride_ql,
    stride_qh,
    HAS_SEGMENTS: tl.constexpr,
    STRIDE_QT: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    D_PAD: tl.constexpr,
    EDGES: tl.constexpr,
):
    num_tokens = num_prefix + num_genes
    o_t = tl.program_id(0).to(tl.int64)
    i_lh = o_t // num_tokens
    i_l = i_lh // num_heads
    head = i_lh % num_heads
    gene = o_t % num_tokens - num_prefix
    first = tl.load(headptr_ptr + head)
    last = tl.where(gene >= 0, tl.load(headptr_ptr + head + 1), first)  # a prefix token has no edges
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + head * (stride_qh // ALIGN * ALIGN) + num_prefix * STRIDE_QT
    # [EDGES, D_PAD]
    b_sum = tl.zeros([EDGES, D_PAD], dtype=tl.float32)
    filled = 0
    for i in range(first, last):
        p_t = ties_ptr + i * 3
        p_g = g_ptr + (i_l * num_ties + tl.load(p_t)) * num_genes
        stacked = tl.load(p_t + 1) * num_genes + gene
        start = tl.load(colptr_ptr + stacked)
        end = tl.load(colptr_ptr + stacked + 1)
        if start < end:  # half of the columns have no entry
            filled = 1
            if HAS_SEGMENTS:
                first_segment = tl.load(segptr_ptr + stacked)
                last_segment = tl.load(segptr_ptr + stacked + 1)
                p_partial = partial_ptr + (i_l * num_segments + tl.load(p_t + 2)) * D
                b_sum = add_segments(b_sum, p_partial, first_segment, last_segment, D, D_PAD, EDGES)
                end = tl.where(first_segment < last_segment, start, end)
            b_sum = _add_column(b_sum, p_q, p_g, row_ptr, weight_ptr, start, end, STRIDE_QT, W, D_PAD, EDGES)
    # [D_PAD]
    o_d = tl.arange(0, D_PAD)
    b_dk = tl.zeros([D_PAD], tl.float32)
    if filled != 0:
        b_dk = tl.sum(b_sum, 0)
    tl.store(dk_ptr + o_t * D + o_d, b_dk.to(dk_ptr.dtype.element_ty), mask=o_d < D)


# ----------------------------------------------------------------------------------------------------------- launchers


def row_dot(
    q: Tensor,
    k: Tensor,
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    colptr: Tensor,
    row: Tensor,
    weight_by_column: Tensor,
    row_segptr: Tensor,
    segment_row: Tensor,
    row_segments: Sequence[int],
    col_segptr: Tensor,
    segment_col: Tensor,
    col_segments: Sequence[int],
    relations: Sequence[int],
    heads: Sequence[int],
    rows: Tensor | None,
    lengths: Sequence[int],
    num_prefix: int,
) -> tuple[Tensor, Tensor]:
    """(y [..., M], kbar [..., M, D]), float32; the operator `cellattn::row_dot`."""
    check_floats(q=q, k=k)
    check_devices(
        q=q, k=k, rowptr=rowptr, col=col, weight=weight, row_segptr=row_segptr, segment_row=segment_row, rows=rows
    )  # fmt: skip
    *lead, _, num_tokens, d = q.shape
    num_genes, num_ties, num_rows = num_tokens - num_prefix, len(lengths), sum(lengths)
    y = torch.empty(*lead, num_rows, dtype=torch.float32, device=q.device)
    kbar = torch.empty(*lead, num_rows, d, dtype=torch.float32, device=q.device)
    if y.numel() == 0:
        return y, kbar
    cut = Segments.of_ties(relations, row_segments)
    first = [sum(lengths[:i]) for i in range(num_ties)]
    ties = rows_of_ints(zip(relations, heads, first, lengths, cut.shifts, strict=True), q.device)
    q4, k4 = (aligned(x, 2, num_prefix=num_prefix) for x in (q, k))
    (stride_ql, stride_qh), (stride_kl, stride_kh) = lead_strides(q4), lead_strides(k4)
    genes = None if rows is None else rows.contiguous()
    partial, d_pad = cut.partial_sums(q4), padded(d)
    chosen = _chosen(rows, lengths, num_genes) if rows is not None and cut.total > 0 else None
    shape = {"STRIDE_KT": k4.stride(2), **_widths(d, q.dtype)}

    def launch_segments(tile: Gather) -> None:
        row_dot_fwd_kernel_segments[grid_of(q4.shape[0] * num_ties * cut.most, q=q)](
            k4, rowptr, col, weight, row_segptr, segment_row, cut.table(heads, q.device), chosen, partial,
            num_genes, num_ties, cut.most, cut.total, num_prefix, stride_kl, stride_kh,
            HAS_ROWS=rows is not None, **shape, EDGES=tile.rows, **tile.options,
        )  # fmt: skip

    def launch(tile: Gather) -> None:
        row_dot_fwd_kernel[grid_of(q4.shape[0] * num_ties * max(lengths), q=q)](
            q4, k4, rowptr, col, weight, row_segptr, partial, ties, genes, y, kbar,
            num_genes, num_ties, max(lengths), num_rows, cut.total, num_prefix, stride_ql, stride_qh, stride_kl, stride_kh,
            HAS_ROWS=rows is not None, HAS_SEGMENTS=cut.total > 0, STRIDE_QT=q4.stride(2), **shape, EDGES=tile.rows,
            **tile.options,
        )  # fmt: skip

    with on_device(q):
        if cut.total > 0:
            choose_gather("row_dot_fwd_segments", q, d_pad, launch_segments)
        choose_gather("row_dot_fwd", q, d_pad, launch)
    return y, kbar


def row_dot_backward(
    dy: Tensor,
    q: Tensor,
    kbar: Tensor,
    colptr: Tensor,
    row: Tensor,
    weight: Tensor,
    segptr: Tensor,
    segment_col: Tensor,
    segments: Sequence[int],
    relations: Sequence[int],
    heads: Sequence[int],
    rows: Tensor | None,
    lengths: Sequence[int],
    num_prefix: int,
) -> tuple[Tensor, Tensor]:
    """(dq, dk) [..., H, T, D] in the dtype of q; the operator `cellattn::row_dot_backward`."""
    check_floats(q=q)
    check_devices(
        q=q, dy=dy, kbar=kbar, colptr=colptr, row=row, weight=weight, segptr=segptr, segment_col=segment_col, rows=rows
    )  # fmt: skip
    num_heads, num_tokens, d = q.shape[-3:]
    num_genes, num_ties, num_rows = num_tokens - num_prefix, len(lengths), sum(lengths)
    if dy.numel() == 0 or q.numel() == 0:
        return q.new_zeros(q.shape), q.new_zeros(q.shape)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cut = Segments.of_ties(relations, segments)
    by_head = sorted(range(num_ties), key=lambda tie: heads[tie])
    headptr = device_ints(tuple(sum(head < h for head in heads) for h in range(num_heads + 1)), q.device)
    ties = rows_of_ints(((tie, relations[tie], cut.shifts[tie]) for tie in by_head), q.device)
    q4 = aligned(q, 2, num_prefix=num_prefix)
    g, slot = dy.contiguous(), None
    if rows is not None:
        g, slot = _by_gene(g, rows, lengths, num_genes)
    kbar, d_pad = kbar.contiguous(), padded(d)
    stride_ql, stride_qh = lead_strides(q4)
    partial = cut.partial_sums(q4)
    shape = {"STRIDE_QT": q4.stride(2), **_widths(d, q.dtype)}

    def launch_dq(tile: Gather) -> None:
        row_dot_bwd_kernel_dq[grid_of(q4.shape[0] * num_heads * triton.cdiv(num_tokens, tile.rows), q=q)](
            g, kbar, slot, headptr, ties, dq, num_genes, num_ties, num_rows, num_prefix, num_heads,
            HAS_ROWS=rows is not None, D=d, D_PAD=d_pad, BT=tile.rows, **tile.options,
        )  # fmt: skip

    def launch_dk_segments(tile: Gather) -> None:
        row_dot_bwd_kernel_dk_segments[grid_of(q4.shape[0] * num_ties * cut.most, q=q)](
            g, q4, colptr, row, weight, segptr, segment_col, cut.table(heads, q.device), partial,
            num_genes, num_ties, cut.most, cut.total, num_prefix, stride_ql, stride_qh,
            **shape, EDGES=tile.rows, **tile.options,
        )  # fmt: skip

    def launch_dk(tile: Gather) -> None:
        row_dot_bwd_kernel_dk[grid_of(q4.shape[0] * num_heads * num_tokens, q=q)](
            g, q4, colptr, row, weight, segptr, partial, headptr, ties, dk,
            num_genes, num_ties, cut.total, num_prefix, num_heads, stride_ql, stride_qh,
            HAS_SEGMENTS=cut.total > 0, **shape, EDGES=tile.rows, **tile.options,
        )  # fmt: skip

    with on_device(q):
        choose_gather("row_dot_bwd_dq", q, d_pad, launch_dq)
        if cut.total > 0:
            choose_gather("row_dot_bwd_dk_segments", q, d_pad, launch_dk_segments)
        choose_gather("row_dot_bwd_dk", q, d_pad, launch_dk)
    return dq, dk


def _keys(rows: Tensor, lengths: Sequence[int], num_genes: int) -> Tensor:
    """int64 [M]: tie * N + gene of each chosen row."""
    first = device_ints(tuple(sum(lengths[:i]) for i in range(1, len(lengths))), rows.device)
    tie = torch.bucketize(torch.arange(rows.numel(), device=rows.device), first, right=True)
    return tie * num_genes + rows


def _widths(d: int, dtype: torch.dtype) -> dict[str, int]:
    return {"ALIGN": wide(dtype), "D": d, "W": width(d, dtype), "D_PAD": padded(d)}


def _chosen(rows: Tensor, lengths: Sequence[int], num_genes: int) -> Tensor:
    """bool [ties * N]: whether a row was chosen."""
    chosen = torch.zeros(len(lengths) * num_genes, dtype=torch.bool, device=rows.device)
    return chosen.index_fill_(0, _keys(rows, lengths, num_genes), True)


def _by_gene(dy: Tensor, rows: Tensor, lengths: Sequence[int], num_genes: int) -> tuple[Tensor, Tensor]:
    """(g [L, ties * N], slot [ties * N]) of dy [..., M]; a row chosen twice has one kbar, so that any of its slots will do."""
    num_rows, num_keys, device = rows.numel(), len(lengths) * num_genes, dy.device
    keys, order = torch.sort(_keys(rows, lengths, num_genes), stable=True)
    ptr = torch.searchsorted(keys, torch.arange(num_keys + 1, device=device))
    g = torch.empty(dy.numel() // num_rows, num_keys, dtype=torch.float32, device=device)
    block = 128
    with on_device(dy):
        row_dot_bwd_kernel_g[grid_of(g.shape[0] * triton.cdiv(num_keys, block), dy=dy)](
            dy, order, ptr, g, num_keys, num_rows, BLOCK=block, **options(4)
        )
    return g, order[ptr[:-1].clamp_max(num_rows - 1)]
