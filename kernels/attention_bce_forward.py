"""The forward of `attention_bce` (see attention_bce.py)."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .attention_bce_entries import (
    LN2,
    LOG2E,
    SHARP,
    SIZES,
    edge_loss,
    gather,
    is_edge,
    loss_term,
    segments_of_row,
    sigmoid,
    softplus,
    targets,
)
from .segments import span_of_segment
from .sums import sum_of_products


@triton.jit
def _in_base_2(lse):
    """NaN where it is not finite, as the losses of the row are."""
    return tl.where(tl.abs(lse) < float("inf"), lse * LOG2E, float("nan"))


@triton.jit(do_not_specialize=["num_rows", "first_row", "shift", "num_words", "steps"])
def bce_rows_fwd_kernel_bits(
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    rows_ptr,  # int64 [R], None for all genes
    edges_ptr,  # out, int32 [R, num_words]: bit j is whether the row has an edge to gene j - shift
    num_rows,
    first_row,
    shift,
    num_words,
    steps,  # of a bisection of a row
    BLOCK: tl.constexpr,
):
    """A program a row and BLOCK words."""
    i_r = (tl.program_id(0) % num_rows).to(tl.int64)
    # [BLOCK]
    o_w = tl.program_id(0) // num_rows * BLOCK + tl.arange(0, BLOCK)
    m_w = o_w < num_words
    gene = i_r
    if rows_ptr is not None:
        gene = tl.load(rows_ptr + i_r)
    start, end = tl.load(rowptr_ptr + first_row + gene), tl.load(rowptr_ptr + first_row + gene + 1)
    b_from = o_w * 32 - shift
    # the first edge that is not before the word's
    b_low = tl.where(m_w, start, end) + tl.zeros([BLOCK], tl.int64)
    b_high = end + tl.zeros([BLOCK], tl.int64)
    for _ in range(steps):
        m_open = b_low < b_high
        b_middle = (b_low + b_high) // 2
        m_before = tl.load(col_ptr + b_middle, mask=m_open, other=0) < b_from
        b_low = tl.where(m_open & m_before, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_before, b_middle, b_high)
    b_word = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(32):
        m_e = b_low + i < end
        b_bit = tl.load(col_ptr + b_low + i, mask=m_e, other=0) - b_from
        b_word |= tl.where(m_e & (b_bit < 32), 1 << (b_bit & 31), 0)
    tl.store(edges_ptr + i_r * num_words + o_w, b_word, mask=m_w)


@triton.jit(do_not_specialize=SIZES)
def bce_rows_fwd_kernel_dense(
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    inv_mass_ptr,  # fp32 [K * N]
    known_ptr,  # bool [N]
    rows_ptr,  # int64 [R], None for all genes
    edges_ptr,  # of bce_rows_fwd_kernel_bits with a shift of 0, None for the softmax link
    loss_ptr,  # out, fp32 [parts, L, R]
    sharp_ptr,  # out, int32 [parts, L, R]: the sharp token among the part's, or -1; None for the sigmoid link
    stride_ql,
    stride_kl,
    num_leading,  # L
    num_rows,  # R
    num_genes,  # N
    first_row,  # relation * N
    num_prefix,
    num_words,
    part,  # keys a part
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,  # columns that are loaded: zeros stand from D on
    BD: tl.constexpr,
    BM: tl.constexpr,  # rows a program
    BN: tl.constexpr,  # keys at a time
    SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program a block of rows and a part of the keys: sum of L over the valid pairs but the sharp one, and which that is."""
    i_p = tl.program_id(1)
    blocks = tl.cdiv(num_rows, BM)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    # [BM]
    o_m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_m = o_m < num_rows
    b_gene = o_m.to(tl.int64)
    if rows_ptr is not None:
        b_gene = tl.load(rows_ptr + o_m, mask=m_m, other=0)
    m_edge = tl.load(inv_mass_ptr + first_row + b_gene, mask=m_m, other=0.0) > 0
    b_total2 = tl.zeros([BM], tl.float32)
    if not SIGMOID:
        b_total2 = _in_base_2(tl.load(lse_ptr + i_l * num_rows + o_m, mask=m_m, other=0.0))
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < W
    # [BM, BD]
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + b_gene)[:, None] * STRIDE_Q + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + num_prefix * STRIDE_K
    first = i_p * part
    b_loss = tl.zeros([BM], tl.float32)
    b_sharp = tl.full([BM, BN], -1, tl.int32)
    for n in range(first, tl.minimum(first + part, num_genes), BN):
        # [BN]
        o_n = n + tl.arange(0, BN)
        m_n = o_n < num_genes
        b_known = tl.load(known_ptr + o_n, mask=m_n, other=0).to(tl.int1)
        # [BN, BD]
        b_k = tl.load(p_k + o_n.to(tl.int64)[:, None] * STRIDE_K + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        # [BM, BN]
        b_x2 = scale * LOG2E * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) - b_total2[:, None]
        m_x = m_edge[:, None] & b_known[None, :]
        if not SIGMOID:
            m_sharp = m_x & (b_x2 > SHARP)
            b_sharp = tl.where(m_sharp, (num_prefix + o_n)[None, :], b_sharp)
            m_x = m_x & ~m_sharp
        else:
            m_x = m_x & ~is_edge(edges_ptr, o_m, m_m, n, num_words, BN, ACROSS=False)
        b_loss += tl.sum(tl.where(m_x, loss_term(b_x2, SIGMOID), 0.0), 1)
    o_out = (i_p.to(tl.int64) * num_leading + i_l) * num_rows + o_m
    tl.store(loss_ptr + o_out, b_loss, mask=m_m)
    if not SIGMOID:
        tl.store(sharp_ptr + o_out, tl.max(b_sharp, 1), mask=m_m)


@triton.jit
def _lose_edges(
    b_loss, b_positive, b_negative, b_sharp, b_q, k_ptr, col_ptr, weight_ptr, start, end, inv_mass, degree, total2, sharp,
    num_prefix, scale2, STRIDE_K: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SIGMOID: tl.constexpr,
    DENSE: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    """Add, lane by lane [BE], what the edges from start to end of a row lose, and the weights of its sharp entry among them.

    With drawn negatives it is found here, and said in b_sharp; otherwise the dense pass knew it.
    """
    # [BD]
    o_d = tl.arange(0, BD)
    # [BE]: while a step gathers, the columns of the next are on their way
    b_e = tl.arange(0, BE)
    b_col = tl.load(col_ptr + start + b_e, mask=start + b_e < end, other=0)
    for e in range(start, end, BE):
        o_e = e + b_e
        m_e = o_e < end
        b_token = num_prefix + b_col
        b_col = tl.load(col_ptr + o_e + BE, mask=o_e + BE < end, other=0)
        b_t = targets(weight_ptr, o_e, m_e, inv_mass, degree, NORMALIZED)
        # [BE, BD]
        b_k = gather(k_ptr, b_token, m_e, STRIDE_K, o_d, o_d < W)
        # [BE]
        b_x2 = scale2 * sum_of_products(b_q[None, :], b_k, m_e[:, None], 1) - total2
        b_l = edge_loss(b_x2, b_t, SIGMOID, DENSE)
        if not SIGMOID:
            if DENSE:
                m_sharp = m_e & (b_token == sharp)
            else:
                m_sharp = m_e & (b_x2 > SHARP)
                b_sharp = tl.where(m_sharp, b_token, b_sharp)
                b_negative += tl.where(m_sharp, 1 - b_t, 0.0)
            b_positive += tl.where(m_sharp, b_t, 0.0)
            m_e = m_e & ~m_sharp
        b_loss += tl.where(m_e, b_l, 0.0)
    return b_loss, b_positive, b_negative, b_sharp


@triton.jit(do_not_specialize=SIZES)
def bce_rows_fwd_kernel_segments(
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    weight_ptr,  # [E]
    inv_mass_ptr,  # fp32 [K * N]
    segptr_ptr,  # int64 [K * N + 1]: the first segment of each stacked row
    segrow_ptr,  # int64: the stacked row of each segment
    slot_ptr,  # int64 [N]: where among the R a gene is named first, R if nowhere; None for all genes
    dense_sharp_ptr,  # int32 [parts, L, R], None with drawn negatives and for the sigmoid link
    partial_ptr,  # out, fp32 [3, L, S]: the loss without the sharp entry, and the weights of that
    partial_sharp_ptr,  # out, int32 [L, S]; None but with drawn negatives of the softmax link
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    first_row,
    first_segment,  # of the relation
    num_segments,  # S
    num_prefix,
    num_parts,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """A program a segment of a row, where that is named first: what its edges lose."""
    i_o = tl.program_id(0).to(tl.int64)
    i_l = i_o // num_segments
    segment = first_segment + i_o % num_segments
    stacked = tl.load(segrow_ptr + segment)
    gene = stacked - first_row
    i_r = gene
    if slot_ptr is not None:
        i_r = tl.load(slot_ptr + gene)
        if i_r >= num_rows:
            return
    i = i_l * num_rows + i_r
    start, end = span_of_segment(rowptr_ptr, segptr_ptr, stacked, segment)
    degree = tl.load(rowptr_ptr + stacked + 1) - tl.load(rowptr_ptr + stacked)
    # [BD]
    o_d = tl.arange(0, BD)
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + gene) * STRIDE_Q + o_d
    b_q = tl.load(p_q, mask=o_d < W, other=0.0).to(tl.float32)
    total2 = 0.0
    sharp = tl.full([], -1, tl.int32)
    if not SIGMOID:
        total2 = _in_base_2(tl.load(lse_ptr + i))
        if DENSE:
            for p in range(num_parts):
                sharp = tl.maximum(sharp, tl.load(dense_sharp_ptr + (p * num_leading).to(tl.int64) * num_rows + i))
    # [BE]
    b_zero = tl.zeros([BE], tl.float32)
    b_sharp = tl.full([BE], -1, tl.int32)
    b_loss, b_positive, b_negative, b_sharp = _lose_edges(
        b_zero, b_zero, b_zero, b_sharp, b_q, k_ptr + i_l * (stride_kl // ALIGN * ALIGN), col_ptr, weight_ptr, start, end,
        tl.load(inv_mass_ptr + stacked), degree, total2, sharp, num_prefix, scale * LOG2E, STRIDE_K, W, BD, BE, SIGMOID, DENSE,
        NORMALIZED,
    )  # fmt: skip
    tl.store(partial_ptr + i_o, tl.sum(b_loss, 0))
    if not SIGMOID:
        size = num_leading.to(tl.int64) * num_segments
        tl.store(partial_ptr + size + i_o, tl.sum(b_positive, 0))
        if not DENSE:
            tl.store(partial_ptr + 2 * size + i_o, tl.sum(b_negative, 0))
            tl.store(partial_sharp_ptr + i_o, tl.max(b_sharp, 0))


@triton.jit(do_not_specialize=SIZES)
def bce_rows_fwd_kernel_edges(
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    weight_ptr,  # [E]
    inv_mass_ptr,  # fp32 [K * N]
    segptr_ptr, slot_ptr, partial_ptr, partial_sharp_ptr,  # as of a segment; not read unless HAS_SEGMENTS
    rows_ptr,  # int64 [R], None for all genes
    negatives_ptr,  # int64 [M], None for every valid non-edge
    negptr_ptr,  # int64 [R + 1]
    negative_weight_ptr,  # fp32 [R]
    dense_loss_ptr,  # fp32 [parts, L, R], None with drawn negatives
    dense_sharp_ptr,  # int32 [parts, L, R], None with drawn negatives and for the sigmoid link
    loss_ptr,  # out, fp32 [L, R], without the sharp entry
    sharp_ptr,  # out, int32 [L, R]: the sharp token, -1 for none; None for the sigmoid link, as what follows
    entry_ptr,  # out, fp32 [3, L, R]: of the sharp entry the weights of -log a and -log(1 - a), and the score in base 2
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,  # R
    first_row,  # relation * N
    first_segment,
    num_segments,
    num_prefix,
    num_parts,
    scale,
    HAS_SEGMENTS: tl.constexpr,  # False: the relation has no hub
    STRIDE_Q: tl.constexpr,  # between tokens
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,  # D padded
    BE: tl.constexpr,  # entries at a time
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """A program a row: its edges, and its drawn negatives, or what the dense pass found. Without an edge there is nothing."""
    i = tl.program_id(0).to(tl.int64)
    i_l, i_r = i // num_rows, i % num_rows
    k_ptr += i_l * (stride_kl // ALIGN * ALIGN)
    gene = i_r
    if rows_ptr is not None:
        gene = tl.load(rows_ptr + i_r)
    stacked = first_row + gene
    start, end = tl.load(rowptr_ptr + stacked), tl.load(rowptr_ptr + stacked + 1)
    if start >= end:
        tl.store(loss_ptr + i, 0.0)
        if not SIGMOID:
            tl.store(sharp_ptr + i, -1)
        return
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < W
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + gene) * STRIDE_Q + o_d
    b_q = tl.load(p_q, mask=m_d, other=0.0).to(tl.float32)
    loss = 0.0
    sharp = tl.full([], -1, tl.int32)
    if DENSE:
        for p in range(num_parts):
            o_p = (p * num_leading).to(tl.int64) * num_rows + i
            loss += tl.load(dense_loss_ptr + o_p)
            if not SIGMOID:
                sharp = tl.maximum(sharp, tl.load(dense_sharp_ptr + o_p))
    total2 = 0.0
    if not SIGMOID:
        total2 = _in_base_2(tl.load(lse_ptr + i))
    # [BE]
    b_e = tl.arange(0, BE)
    b_loss = tl.zeros([BE], tl.float32)
    b_sharp = tl.full([BE], -1, tl.int32)
    b_positive = tl.zeros([BE], tl.float32)
    b_negative = tl.zeros([BE], tl.float32)
    degree = end - start
    if HAS_SEGMENTS:
        first, last = segments_of_row(segptr_ptr, slot_ptr, stacked, gene, i_r, first_segment)
        size = num_leading.to(tl.int64) * num_segments
        for s in range(first, last, BE):
            o_s = i_l * num_segments + s + b_e
            m_s = s + b_e < last
            b_loss += tl.load(partial_ptr + o_s, mask=m_s, other=0.0)
            if not SIGMOID:
                b_positive += tl.load(partial_ptr + size + o_s, mask=m_s, other=0.0)
                if not DENSE:
                    b_negative += tl.load(partial_ptr + 2 * size + o_s, mask=m_s, other=0.0)
                    b_sharp = tl.maximum(b_sharp, tl.load(partial_sharp_ptr + o_s, mask=m_s, other=-1))
        end = tl.where(first < last, start, end)
    b_loss, b_positive, b_negative, b_sharp = _lose_edges(
        b_loss, b_positive, b_negative, b_sharp, b_q, k_ptr, col_ptr, weight_ptr, start, end, tl.load(inv_mass_ptr + stacked),
        degree, total2, sharp, num_prefix, scale * LOG2E, STRIDE_K, W, BD, BE, SIGMOID, DENSE, NORMALIZED,
    )  # fmt: skip
    if not DENSE:
        weight = tl.load(negative_weight_ptr + i_r)
        start, end = tl.load(negptr_ptr + i_r), tl.load(negptr_ptr + i_r + 1)
        b_gene = tl.load(negatives_ptr + start + b_e, mask=start + b_e < end, other=0)
        for e in range(start, end, BE):
            o_e = e + b_e
            m_e = o_e < end
            b_token = num_prefix + b_gene.to(tl.int32)
            b_gene = tl.load(negatives_ptr + o_e + BE, mask=o_e + BE < end, other=0)
            b_k = gather(k_ptr, b_token, m_e, STRIDE_K, o_d, m_d)
            b_x2 = scale * LOG2E * sum_of_products(b_q[None, :], b_k, m_e[:, None], 1) - total2
            if not SIGMOID:
                m_sharp = m_e & (b_x2 > SHARP)
                b_sharp = tl.where(m_sharp, b_token, b_sharp)
                b_negative += tl.where(m_sharp, weight, 0.0)
                m_e = m_e & ~m_sharp
            b_loss += tl.where(m_e, weight * loss_term(b_x2, SIGMOID), 0.0)
    tl.store(loss_ptr + i, loss + tl.sum(b_loss, 0))
    if not SIGMOID:
        positive, negative = tl.sum(b_positive, 0), tl.sum(b_negative, 0)
        if DENSE:
            negative = 1 - positive
        else:
            sharp = tl.max(b_sharp, 0)
        tl.store(sharp_ptr + i, sharp)
        p_k = k_ptr + sharp.to(tl.int64) * STRIDE_K + o_d
        b_k = tl.load(p_k, mask=m_d & (sharp >= 0), other=0.0).to(tl.float32)
        size = num_leading.to(tl.int64) * num_rows
        tl.store(entry_ptr + i, positive)
        tl.store(entry_ptr + size + i, negative)
        tl.store(entry_ptr + 2 * size + i, sum_of_products(b_q, b_k, m_d & (sharp >= 0), 0) * (scale * LOG2E))


@triton.jit(do_not_specialize=SIZES)
def bce_rows_fwd_kernel_rest(
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    rows_ptr,  # int64 [R], None for all genes
    sharp_ptr,  # int32 [L, R]
    partial_ptr,  # out, fp32 [parts, 2, L, R]: the largest s2, m, and the sum of 2^(s2 - m), without the sharp token
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    num_genes,
    num_prefix,
    part,  # tokens a part
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program a block of rows and a part of the tokens; nothing is done, or written, where no row has a sharp entry."""
    i_p = tl.program_id(1)
    blocks = tl.cdiv(num_rows, BM)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    # [BM]
    o_m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_m = o_m < num_rows
    b_sharp = tl.load(sharp_ptr + i_l * num_rows + o_m, mask=m_m, other=-1)
    if tl.max(b_sharp, 0) < 0:
        return
    b_gene = o_m.to(tl.int64)
    if rows_ptr is not None:
        b_gene = tl.load(rows_ptr + o_m, mask=m_m, other=0)
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < W
    # [BM, BD]
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + b_gene)[:, None] * STRIDE_Q + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN)
    num_tokens = num_prefix + num_genes
    first = i_p * part
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for n in range(first, tl.minimum(first + part, num_tokens), BN):
        # [BN]
        o_n = n + tl.arange(0, BN)
        m_n = o_n < num_tokens
        # [BN, BD]
        b_k = tl.load(p_k + o_n.to(tl.int64)[:, None] * STRIDE_K + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        # [BM, BN]
        b_s2 = scale * LOG2E * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_s2 = tl.where(m_n[None, :] & (o_n[None, :] != b_sharp[:, None]), b_s2, float("-inf"))
        # [BM]
        b_new = tl.maximum(b_m, tl.max(b_s2, 1))
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)  # a part that is the sharp token alone
        b_l = b_l * tl.exp2(b_m - b_pivot) + tl.sum(tl.exp2(b_s2 - b_pivot[:, None]), 1)
        b_m = b_new
    p_out = partial_ptr + (i_p.to(tl.int64) * 2 * num_leading + i_l) * num_rows + o_m
    tl.store(p_out, b_m, mask=m_m)
    tl.store(p_out + num_leading.to(tl.int64) * num_rows, b_l, mask=m_m)


@triton.jit(do_not_specialize=SIZES)
def bce_rows_fwd_kernel_sharp(
    partial_ptr,  # fp32 [parts, 2, L, R]
    sharp_ptr,  # int32 [L, R]
    entry_ptr,  # fp32 [3, L, R]
    loss_ptr,  # in and out, fp32 [L, R]
    rest_ptr,  # out, fp32 [L, R]
    pull_ptr,  # out, fp32 [L, R]
    num_leading,
    num_rows,
    num_parts,
    BLOCK: tl.constexpr,
):
    """The sharp entry of each row: its loss, rest and pull."""
    size = num_leading.to(tl.int64) * num_rows
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_o = o < size
    m_sharp = tl.load(sharp_ptr + o, mask=m_o, other=-1) >= 0
    b_m = tl.full([BLOCK], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK], tl.float32)
    for p in range(num_parts):
        b_m_part = tl.load(partial_ptr + 2 * p * size + o, mask=m_sharp, other=0.0)
        b_l_part = tl.load(partial_ptr + (2 * p + 1) * size + o, mask=m_sharp, other=0.0)
        b_new = tl.maximum(b_m, b_m_part)
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_l = b_l * tl.exp2(b_m - b_pivot) + b_l_part * tl.exp2(b_m_part - b_pivot)
        b_m = b_new
    b_rest2 = b_m + tl.log2(b_l)
    b_positive = tl.load(entry_ptr + o, mask=m_sharp, other=0.0)
    b_negative = tl.load(entry_ptr + size + o, mask=m_sharp, other=0.0)
    b_gap2 = tl.load(entry_ptr + 2 * size + o, mask=m_sharp, other=0.0) - b_rest2
    b_loss = tl.load(loss_ptr + o, mask=m_sharp, other=0.0)
    b_loss += b_positive * softplus(-b_gap2) + b_negative * softplus(b_gap2)
    b_pull = b_negative * sigmoid(b_gap2) - b_positive * sigmoid(-b_gap2)
    b_pull = tl.where(tl.abs(b_rest2) < float("inf"), b_pull, float("nan"))
    tl.store(loss_ptr + o, b_loss, mask=m_sharp)
    tl.store(rest_ptr + o, tl.where(m_sharp, LN2 * b_rest2, 0.0), mask=m_o)
    tl.store(pull_ptr + o, tl.where(m_sharp, b_pull, 0.0), mask=m_o)
