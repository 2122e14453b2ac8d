"""The backward of `attention_bce` (see attention_bce.py)."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .attention_bce_entries import (
    LOG2E,
    SIZES,
    edge_grad,
    gather,
    grad_term,
    is_edge,
    segments_of_row,
    share,
    targets,
)
from .attention_bce_large import is_large
from .segments import add_segments, span_of_segment
from .sums import sum_of_products

IGNORED, OTHER, KNOWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # kinds of tokens in the dense backward


@triton.jit
def _has_wild(b_x):
    """Whether a row [rows, BD] holds NaN or an infinity [rows]."""
    return tl.max(tl.where(tl.abs(b_x.to(tl.float32)) < float("inf"), 0, 1), 1) > 0


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_operands(
    dloss_ptr,  # fp32 [L, R], None for the sigmoid link, as the next two
    left_ptr,  # out, fp32 [L, R]: dloss, 0 in the rows of large scores, which this leaves out
    has_large_ptr,  # out, int8 [L, blocks of BT rows]: whether one of the block is left out
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    inv_mass_ptr,  # fp32 [K * N]
    known_ptr,  # bool [N]
    rows_ptr,  # int64 [R], None for all genes
    queries_ptr,  # out [L, R, W]: q of the rows, 0 of those without an edge
    total2_ptr,  # out, fp32 [L, R]: LSE in base 2, 0 for the sigmoid link; inf without an edge, NaN where q is not finite
    keys_ptr,  # out [L, T, W]
    kind_ptr,  # out, int8 [L, T]: KNOWN gene, OTHER token, or one that was not finite and IGNORED
    stride_ql,
    stride_kl,
    num_rows,
    num_genes,
    first_row,
    num_prefix,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,  # rows, or tokens, a program
    DENSE: tl.constexpr,  # False: no pass reads all known genes
):
    """What the products of the dense backward read, of which NaN and infinities of what is in no pair of the loss are gone.

    There 0 in one operand would not hide them in the other: 0 * NaN is NaN.
    """
    num_tokens = num_prefix + num_genes
    row_blocks = tl.cdiv(num_rows, BT)
    blocks = row_blocks + tl.cdiv(num_tokens, BT)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    i_b = tl.program_id(0) % blocks
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < W
    if i_b < row_blocks:
        # [BT]
        o_m = i_b * BT + tl.arange(0, BT)
        m_m = o_m < num_rows
        o_r = i_l * num_rows + o_m
        b_gene = o_m.to(tl.int64)
        if rows_ptr is not None:
            b_gene = tl.load(rows_ptr + o_m, mask=m_m, other=0)
        m_edge = tl.load(inv_mass_ptr + first_row + b_gene, mask=m_m, other=0.0) > 0
        b_total2 = tl.zeros([BT], tl.float32)
        if lse_ptr is not None:
            b_lse = tl.load(lse_ptr + o_r, mask=m_m, other=0.0)
            b_total2 = b_lse * LOG2E
            m_large = m_edge & is_large(b_lse)
            b_dloss = tl.load(dloss_ptr + o_r, mask=m_m, other=0.0)
            tl.store(left_ptr + o_r, tl.where(m_large, 0.0, b_dloss), mask=m_m)
            tl.store(has_large_ptr + i_l * row_blocks + i_b, tl.max(m_large.to(tl.int32), 0).to(tl.int8))
        # [BT, BD]
        p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + b_gene)[:, None] * STRIDE_Q + o_d[None, :]
        b_q = tl.load(p_q, mask=m_edge[:, None] & m_d[None, :], other=0.0)
        m_wild = _has_wild(b_q)
        tl.store(total2_ptr + o_r, tl.where(m_wild, float("nan"), tl.where(m_edge, b_total2, float("inf"))), mask=m_m)
        p_out = queries_ptr + o_r[:, None] * W + o_d[None, :]
        tl.store(p_out, tl.where(m_wild[:, None], 0.0, b_q), mask=m_m[:, None] & m_d[None, :])
    else:
        o_n = (i_b - row_blocks) * BT + tl.arange(0, BT)
        m_n = o_n < num_tokens
        o_t = i_l * num_tokens + o_n
        m_known = tl.load(known_ptr + o_n - num_prefix, mask=m_n & (o_n >= num_prefix), other=0).to(tl.int1)
        p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + o_n.to(tl.int64)[:, None] * STRIDE_K + o_d[None, :]
        b_k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0)
        m_wild = _has_wild(b_k)
        if DENSE:
            m_wild = m_wild & ~m_known
        b_kind = tl.where(m_wild, IGNORED, tl.where(m_known, KNOWN, OTHER))
        tl.store(kind_ptr + o_t, b_kind.to(tl.int8), mask=m_n)
        p_out = keys_ptr + o_t[:, None] * W + o_d[None, :]
        tl.store(p_out, tl.where(m_wild[:, None], 0.0, b_k), mask=m_n[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_dense_dq(
    dloss_ptr,  # fp32 [L, R]
    queries_ptr, total2_ptr, keys_ptr, kind_ptr,  # of bce_rows_bwd_kernel_operands
    edges_ptr,  # of bce_rows_fwd_kernel_bits with a shift of num_prefix, None for the softmax link
    sharp_ptr,  # int32 [L, R], None for the sigmoid link, as the next two
    rest_ptr,  # fp32 [L, R]
    pull_ptr,  # fp32 [L, R]
    dq_ptr,  # out, fp32 [parts, L, R, D]
    dlse_ptr,  # out, fp32 [parts, L, R], None for the sigmoid link and with drawn negatives
    num_leading,
    num_rows,
    num_genes,
    num_prefix,
    num_words,
    part,  # tokens a part
    scale,
    W: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,  # False, with drawn negatives: the sharp entries alone
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program a block of rows and a part of the tokens: dq and dLSE of the dense pass, and dq of sharp entries."""
    i_p = tl.program_id(1)
    num_tokens = num_prefix + num_genes
    blocks = tl.cdiv(num_rows, BM)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    # [BM]
    o_m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_m = o_m < num_rows
    o_r = i_l * num_rows + o_m
    b_total2 = tl.load(total2_ptr + o_r, mask=m_m, other=float("inf"))
    b_sharp = tl.full([BM], -1, tl.int32)
    b_rest2 = tl.zeros([BM], tl.float32)
    b_pull = tl.zeros([BM], tl.float32)
    if not SIGMOID:
        b_sharp = tl.load(sharp_ptr + o_r, mask=m_m, other=-1)
        b_rest2 = tl.load(rest_ptr + o_r, mask=m_m, other=0.0) * LOG2E
        b_pull = tl.load(pull_ptr + o_r, mask=m_m, other=0.0)
    any_sharp = tl.max(b_sharp, 0) >= 0
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < W
    # [BM, BD]
    b_q = tl.load(queries_ptr + o_r[:, None] * W + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_k = keys_ptr + i_l * num_tokens * W
    first = i_p * part
    last = tl.minimum(first + part, num_tokens)
    b_factor = scale * tl.load(dloss_ptr + o_r, mask=m_m, other=0.0)
    if not DENSE:
        last = tl.where(any_sharp, last, first)
        b_factor *= b_pull  # of any size: a drawn negative may have a large weight
        b_pull = tl.where(b_sharp >= 0, 1.0, 0.0)
    b_ds = tl.zeros([BM], tl.float32)
    b_dq = tl.zeros([BM, BD], tl.float32)
    for n in range(first, last, BN):
        # [BN]
        o_n = n + tl.arange(0, BN)
        m_n = o_n < num_tokens
        # [BN, BD]
        b_k = tl.load(p_k + o_n.to(tl.int64)[:, None] * W + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        # [BM, BN]
        b_s2 = scale * LOG2E * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_g = tl.zeros([BM, BN], tl.float32)
        if DENSE:
            b_kind = tl.load(kind_ptr + i_l * num_tokens + o_n, mask=m_n, other=IGNORED)
            m_x = (b_kind == KNOWN)[None, :] & (o_n[None, :] != b_sharp[:, None])
            if SIGMOID:
                m_x = m_x & ~is_edge(edges_ptr, o_m, m_m, n, num_words, BN, ACROSS=False)
            b_g = tl.where(m_x, grad_term(b_s2 - b_total2[:, None], SIGMOID), 0.0)
            b_ds += tl.sum(b_g, 1)
        if not SIGMOID:  # noqa: SIM102 (known when compiled)
            # With drawn negatives there is a loop for sharp entries alone. An `if` would then start the product's operand at
            # zero, in a register that sm_90's product of the round before still reads.
            if not DENSE or any_sharp:
                b_g += share(b_s2, o_n[None, :], b_sharp[:, None], b_rest2[:, None], b_pull[:, None])
        b_dq = tl.dot(b_g.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    # What belongs to the whole row is kept out of the loop, and out of the 16-bit operand.
    o_out = (i_p.to(tl.int64) * num_leading + i_l) * num_rows + o_m
    m_out = m_m[:, None] & (o_d < D)[None, :]
    m_edge = b_total2 != float("inf")  # a row without an edge reads NaN of known genes, and keeps none of it
    b_dq = tl.where(m_edge[:, None], b_factor[:, None] * b_dq, 0.0)
    tl.store(dq_ptr + o_out[:, None] * D + o_d[None, :], b_dq, mask=m_out)
    if not SIGMOID and DENSE:
        b_dloss = tl.load(dloss_ptr + o_r, mask=m_m, other=0.0)
        tl.store(dlse_ptr + o_out, tl.where(m_edge, -b_dloss * b_ds, 0.0), mask=m_m)


@triton.jit
def _add_row(
    b_dq, b_ds, b_q, k_ptr, col_ptr, weight_ptr, start, end, inv_mass, degree, total2, sharp, num_prefix, scale2,
    STRIDE_K: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SIGMOID: tl.constexpr, DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """b_dq + g_e k_j [BE, BD] and b_ds + g_e [BE] over the edges from start to end of a row, lane by lane."""
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
        b_g = tl.where(m_e & (b_token != sharp), edge_grad(b_x2, b_t, SIGMOID, DENSE), 0.0)
        b_ds += b_g
        b_dq += b_g[:, None] * b_k
    return b_dq, b_ds


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_segments_dq(
    q_ptr, k_ptr, lse_ptr, rowptr_ptr, col_ptr, weight_ptr, inv_mass_ptr, segptr_ptr, segrow_ptr, slot_ptr,  # as in the forward
    sharp_ptr,  # int32 [L, R], None for the sigmoid link
    partial_ptr,  # out, fp32 [L, S, D], without the factors of the row
    partial_ds_ptr,  # out, fp32 [L, S], None for the sigmoid link
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    first_row,
    first_segment,
    num_segments,
    num_prefix,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """A program a segment of a row, where that is named first: dq and dLSE of its edges."""
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
        total2 = tl.load(lse_ptr + i) * LOG2E
        sharp = tl.load(sharp_ptr + i)
    # [BE, BD], [BE]
    b_dq = tl.zeros([BE, BD], tl.float32)
    b_ds = tl.zeros([BE], tl.float32)
    b_dq, b_ds = _add_row(
        b_dq, b_ds, b_q, k_ptr + i_l * (stride_kl // ALIGN * ALIGN), col_ptr, weight_ptr, start, end,
        tl.load(inv_mass_ptr + stacked), degree, total2, sharp, num_prefix, scale * LOG2E, STRIDE_K, W, BD, BE, SIGMOID, DENSE,
        NORMALIZED,
    )  # fmt: skip
    tl.store(partial_ptr + i_o * D + o_d, tl.sum(b_dq, 0), mask=o_d < D)
    if not SIGMOID:
        tl.store(partial_ds_ptr + i_o, tl.sum(b_ds, 0))


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_edges_dq(
    dloss_ptr,  # fp32 [L, R]
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    weight_ptr,  # [E]
    inv_mass_ptr,  # fp32 [K * N]
    segptr_ptr, slot_ptr, partial_ptr, partial_ds_ptr,  # as of a segment; not read unless HAS_SEGMENTS
    rows_ptr,  # int64 [R], None for all genes
    negatives_ptr,  # int64 [M], None for every valid non-edge
    negptr_ptr,  # int64 [R + 1]
    negative_weight_ptr,  # fp32 [R]
    sharp_ptr,  # int32 [L, R], None for the sigmoid link
    dense_dq_ptr,  # fp32 [parts, L, R, D]
    dense_dlse_ptr,  # fp32 [parts, L, R], None for the sigmoid link and with drawn negatives
    dq_ptr,  # out, fp32 [L, R, D]; of all genes [L, T, D] in the dtype of q
    dlse_ptr,  # out, fp32 [L, R], None for the sigmoid link
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    first_row,
    first_segment,
    num_segments,
    num_prefix,
    num_parts,
    scale,
    HAS_SEGMENTS: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """A program a row: dq and dLSE of its edges and its drawn negatives, with those of the dense pass; 0 without an edge."""
    # [BD]
    o_d = tl.arange(0, BD)
    i_o = tl.program_id(0).to(tl.int64)
    p_dq = dq_ptr + i_o * D + o_d
    if rows_ptr is None:
        i_l = i_o // (num_prefix + num_rows)
        i_r = i_o % (num_prefix + num_rows) - num_prefix
        if i_r < 0:  # a prefix token
            tl.store(p_dq, tl.zeros([BD], dq_ptr.dtype.element_ty), mask=o_d < D)
            return
        gene = i_r
    else:
        i_l = i_o // num_rows
        i_r = i_o % num_rows
        gene = tl.load(rows_ptr + i_r)
    i = i_l * num_rows + i_r
    stacked = first_row + gene
    start, end = tl.load(rowptr_ptr + stacked), tl.load(rowptr_ptr + stacked + 1)
    if start >= end:
        tl.store(p_dq, tl.zeros([BD], dq_ptr.dtype.element_ty), mask=o_d < D)
        if not SIGMOID:
            tl.store(dlse_ptr + i, 0.0)
        return
    k_ptr += i_l * (stride_kl // ALIGN * ALIGN)
    total2 = 0.0
    sharp = tl.full([], -1, tl.int32)
    if not SIGMOID:
        total2 = tl.load(lse_ptr + i) * LOG2E
        sharp = tl.load(sharp_ptr + i)
    m_d = o_d < W
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + gene) * STRIDE_Q + o_d
    b_q = tl.load(p_q, mask=m_d, other=0.0).to(tl.float32)
    # [BE], [BE, BD]: reduced once, after the loops
    b_e = tl.arange(0, BE)
    b_ds = tl.zeros([BE], tl.float32)
    b_dq = tl.zeros([BE, BD], tl.float32)
    degree = end - start
    if HAS_SEGMENTS:
        first, last = segments_of_row(segptr_ptr, slot_ptr, stacked, gene, i_r, first_segment)
        o_part = i_l * num_segments
        b_dq = add_segments(b_dq, partial_ptr + o_part * D, first, last, D, BD, BE)
        if not SIGMOID:
            for s in range(first, last, BE):
                b_ds += tl.load(partial_ds_ptr + o_part + s + b_e, mask=s + b_e < last, other=0.0)
        end = tl.where(first < last, start, end)
    b_dq, b_ds = _add_row(
        b_dq, b_ds, b_q, k_ptr, col_ptr, weight_ptr, start, end, tl.load(inv_mass_ptr + stacked), degree, total2, sharp,
        num_prefix, scale * LOG2E, STRIDE_K, W, BD, BE, SIGMOID, DENSE, NORMALIZED,
    )  # fmt: skip
    if not DENSE:
        weight = tl.load(negative_weight_ptr + i_r)
        start, end = tl.load(negptr_ptr + i_r), tl.load(negptr_ptr + i_r + 1)
        b_gene = tl.load(negatives_ptr + start + b_e, mask=start + b_e < end, other=0)
        for e in range(start, end, BE):
            o_e = e + b_e
            b_token = num_prefix + b_gene.to(tl.int32)
            m_e = o_e < end
            b_gene = tl.load(negatives_ptr + o_e + BE, mask=o_e + BE < end, other=0)
            b_k = gather(k_ptr, b_token, m_e, STRIDE_K, o_d, m_d)
            b_x2 = scale * LOG2E * sum_of_products(b_q[None, :], b_k, m_e[:, None], 1) - total2
            b_g = tl.where(m_e & (b_token != sharp), weight * grad_term(b_x2, SIGMOID), 0.0)
            b_ds += b_g
            b_dq += b_g[:, None] * b_k
    dloss = tl.load(dloss_ptr + i)
    b_out = scale * dloss * tl.sum(b_dq, 0)
    dlse = -dloss * tl.sum(b_ds, 0)
    if dense_dq_ptr is not None:
        for p in range(num_parts):
            o_p = (p * num_leading).to(tl.int64) * num_rows + i
            b_out += tl.load(dense_dq_ptr + o_p * D + o_d, mask=o_d < D, other=0.0)
            if DENSE and not SIGMOID:
                dlse += tl.load(dense_dlse_ptr + o_p)
    tl.store(p_dq, b_out.to(dq_ptr.dtype.element_ty), mask=o_d < D)
    if not SIGMOID:
        tl.store(dlse_ptr + i, dlse)


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_dense_dk(
    dloss_ptr,  # fp32 [L, R]
    peak_ptr,  # fp32 [], the largest factor of a row; None but in float16
    queries_ptr, total2_ptr, keys_ptr, kind_ptr,  # of bce_rows_bwd_kernel_operands
    edges_ptr,  # of bce_rows_fwd_kernel_bits with a shift of num_prefix, None for the softmax link
    sharp_ptr,  # int32 [L, R], None for the sigmoid link, as the next two
    rest_ptr,  # fp32 [L, R]
    pull_ptr,  # fp32 [L, R]
    dk_ptr,  # out, fp32 [parts, L, T, D], without the factor scale
    num_leading,
    num_rows,
    num_genes,
    num_prefix,
    num_words,
    part,  # rows a part
    scale,
    W: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,  # rows at a time
    BN: tl.constexpr,  # tokens a program
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,  # False, with drawn negatives: the sharp entries alone
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program a block of tokens and a part of the rows: dk of the dense pass and of sharp entries."""
    i_p = tl.program_id(1)
    num_tokens = num_prefix + num_genes
    blocks = tl.cdiv(num_tokens, BN)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    # Factors over the largest: 1 / (number of rows), of a mean, would leave little of a float16 operand.
    peak, inv_peak = 1.0, 1.0
    if peak_ptr is not None:
        peak = tl.load(peak_ptr)
        inv_peak = tl.where(peak > 0, 1 / peak, 0.0)
    # [BN]
    o_n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    m_n = o_n < num_tokens
    b_kind = tl.load(kind_ptr + i_l * num_tokens + o_n, mask=m_n, other=IGNORED)
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < W
    # [BN, BD]
    o_k = i_l * num_tokens + o_n
    b_k = tl.load(keys_ptr + o_k[:, None] * W + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
    b_dk = tl.zeros([BN, BD], tl.float32)
    p_q = queries_ptr + i_l * num_rows * W
    first = i_p * part
    for m in range(first, tl.minimum(first + part, num_rows), BM):
        # [BM]
        o_m = m + tl.arange(0, BM)
        m_m = o_m < num_rows
        o_r = i_l * num_rows + o_m
        b_dloss = tl.load(dloss_ptr + o_r, mask=m_m, other=0.0) * inv_peak
        b_sharp = tl.full([BM], -1, tl.int32)
        if not SIGMOID:
            b_sharp = tl.load(sharp_ptr + o_r, mask=m_m, other=-1)
        any_sharp = tl.max(b_sharp, 0) >= 0
        if DENSE or any_sharp:
            # [BM, BD]
            b_q = tl.load(p_q + o_m.to(tl.int64)[:, None] * W + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
            # [BN, BM]
            b_s2 = scale * LOG2E * tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
            b_g = tl.zeros([BN, BM], tl.float32)
            if DENSE:
                b_total2 = tl.load(total2_ptr + o_r, mask=m_m, other=float("inf"))
                m_edge = b_total2 != float("inf")
                m_x = m_edge[None, :] & (b_kind == KNOWN)[:, None] & (o_n[:, None] != b_sharp[None, :])
                if SIGMOID:
                    m_x = m_x & ~is_edge(edges_ptr, o_m, m_m, tl.program_id(0) % blocks * BN, num_words, BN, ACROSS=True)
                b_g = tl.where(m_x, grad_term(b_s2 - b_total2[None, :], SIGMOID) * b_dloss[None, :], 0.0)
            if not SIGMOID:  # noqa: SIM102 (known when compiled)
                if any_sharp:
                    b_rest2 = tl.load(rest_ptr + o_r, mask=m_m, other=0.0) * LOG2E
                    b_pull = tl.load(pull_ptr + o_r, mask=m_m, other=0.0) * b_dloss
                    b_g += share(b_s2, o_n[:, None], b_sharp[None, :], b_rest2[None, :], b_pull[None, :])
            b_dk = tl.dot(b_g.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    o_out = (i_p.to(tl.int64) * num_leading + i_l) * num_tokens + o_n
    m_out = m_n[:, None] & (o_d < D)[None, :]
    b_dk = tl.where((b_kind == IGNORED)[:, None], 0.0 * b_dk, b_dk)  # no share but that of a row that is NaN
    tl.store(dk_ptr + o_out[:, None] * D + o_d[None, :], peak * b_dk, mask=m_out)


@triton.jit
def _copies_of(copyptr_ptr, b_row, m_e):
    """(position of the first among the copies, how many) of each row [BE]: one of every row, its own, where all are chosen."""
    b_copy = b_row.to(tl.int64)
    b_copies = tl.where(m_e, 1, 0).to(tl.int64)
    if copyptr_ptr is not None:
        b_copy = tl.load(copyptr_ptr + b_row, mask=m_e, other=0)
        b_copies = tl.load(copyptr_ptr + b_row + 1, mask=m_e, other=0) - b_copy
    return b_copy, b_copies


@triton.jit
def _slope_of_copy(b_s2, b_t, o_r, m_r, dloss_ptr, lse_ptr, sharp_ptr, token, SIGMOID: tl.constexpr, DENSE: tl.constexpr):
    """What the edge of each of the rows o_r [BE] of [L, R] gives to its score: dloss times the slope.

    The sigmoid link's slope, which all copies of a row share, is left to be multiplied.
    """
    if SIGMOID:
        b_g = tl.load(dloss_ptr + o_r, mask=m_r, other=0.0)
    else:
        b_x2 = b_s2 - tl.load(lse_ptr + o_r, mask=m_r, other=0.0) * LOG2E
        m_r = m_r & (tl.load(sharp_ptr + o_r, mask=m_r, other=-1) != token)
        b_dloss = tl.load(dloss_ptr + o_r, mask=m_r, other=0.0)
        b_g = tl.where(m_r, b_dloss * edge_grad(b_x2, b_t, SIGMOID, DENSE), 0.0)
    return b_g


@triton.jit
def _add_column(
    b_dk, b_k, q_ptr, rowptr_ptr, row_ptr, weight_ptr, inv_mass_ptr, copy_ptr, copyptr_ptr, dloss_ptr, lse_ptr, sharp_ptr,
    token, o_lead, start, end, scale2, STRIDE_Q: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    SIGMOID: tl.constexpr, DENSE: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    """b_dk + g_e q_i [BE, BD] over the edges from start to end of a column, lane by lane; rowptr, inv_mass of the relation."""
    # [BD]
    o_d = tl.arange(0, BD)
    # [BE]: while a step gathers, the rows of the next two are on their way, and where the first of those have their copies
    b_e = tl.arange(0, BE)
    o_next = start + BE + b_e
    b_row = tl.load(row_ptr + start + b_e, mask=start + b_e < end, other=0)
    b_next = tl.load(row_ptr + o_next, mask=o_next < end, other=0)
    b_copy, b_copies = _copies_of(copyptr_ptr, b_row, start + b_e < end)
    for e in range(start, end, BE):
        o_e = e + b_e
        m_e = o_e < end
        b_inv_mass = tl.load(inv_mass_ptr + b_row, mask=m_e, other=0.0)
        b_degree = tl.load(rowptr_ptr + b_row + 1, mask=m_e, other=0) - tl.load(rowptr_ptr + b_row, mask=m_e, other=0)
        b_t = targets(weight_ptr, o_e, m_e, b_inv_mass, b_degree, NORMALIZED)
        # [BE, BD]; rows that were not chosen are not read
        b_q = gather(q_ptr, b_row, b_copies > 0, STRIDE_Q, o_d, o_d < W)
        o_next = o_e + BE
        b_next_copy, b_next_copies = _copies_of(copyptr_ptr, b_next, o_next < end)
        b_row = b_next
        b_next = tl.load(row_ptr + o_next + BE, mask=o_next + BE < end, other=0)
        # [BE]
        b_s2 = scale2 * sum_of_products(b_k[None, :], b_q, m_e[:, None], 1)
        if copy_ptr is None:
            b_g = _slope_of_copy(b_s2, b_t, o_lead + b_copy, m_e, dloss_ptr, lse_ptr, sharp_ptr, token, SIGMOID, DENSE)
        else:
            # How many is loaded anew: Triton 3.6 and 3.7 may reduce the first step's alone of what a loop carries
            _, b_counts = _copies_of(copyptr_ptr, tl.load(row_ptr + o_e, mask=m_e, other=0), m_e)
            b_g = tl.zeros([BE], tl.float32)
            for c in range(tl.max(b_counts, 0)):
                m_c = c < b_copies
                o_r = o_lead + tl.load(copy_ptr + b_copy + c, mask=m_c, other=0)
                b_g += _slope_of_copy(b_s2, b_t, o_r, m_c, dloss_ptr, lse_ptr, sharp_ptr, token, SIGMOID, DENSE)
        if SIGMOID:
            b_g = tl.where(b_copies > 0, b_g * edge_grad(b_s2, b_t, SIGMOID, DENSE), 0.0)
        b_dk += b_g[:, None] * b_q
        b_copy, b_copies = b_next_copy, b_next_copies
    return b_dk


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_segments_dk(
    dloss_ptr,  # fp32 [L, R]
    q_ptr, k_ptr, lse_ptr, rowptr_ptr,  # as in the forward
    row_ptr,  # int32 [E], by columns
    colptr_ptr,  # int64 [K * N + 1]
    weight_ptr,  # [E], by columns
    inv_mass_ptr,  # fp32 [K * N]
    segptr_ptr,  # int64 [K * N + 1]: the first segment of each stacked column
    segcol_ptr,  # int64: the stacked column of each segment
    copy_ptr,  # int64 [R]: positions in rows, gene after gene; None for all genes, as the next
    copyptr_ptr,  # int64 [N + 1]: gene i is at the positions copy[copyptr[i] : copyptr[i + 1]]
    sharp_ptr,  # int32 [L, R], None for the sigmoid link
    partial_ptr,  # out, fp32 [L, S, D], without the factor scale
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    first_row,
    first_segment,
    num_segments,
    num_prefix,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """A program a segment of a column: dk of its edges."""
    i_o = tl.program_id(0).to(tl.int64)
    i_l = i_o // num_segments
    segment = first_segment + i_o % num_segments
    stacked = tl.load(segcol_ptr + segment)
    token = num_prefix + stacked - first_row
    start, end = span_of_segment(colptr_ptr, segptr_ptr, stacked, segment)
    # [BD]
    o_d = tl.arange(0, BD)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + token * STRIDE_K + o_d
    b_k = tl.load(p_k, mask=o_d < W, other=0.0).to(tl.float32)
    # [BE, BD]
    b_dk = tl.zeros([BE, BD], tl.float32)
    b_dk = _add_column(
        b_dk, b_k, q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + num_prefix * STRIDE_Q, rowptr_ptr + first_row, row_ptr,
        weight_ptr, inv_mass_ptr + first_row, copy_ptr, copyptr_ptr, dloss_ptr, lse_ptr, sharp_ptr, token, i_l * num_rows,
        start, end, scale * LOG2E, STRIDE_Q, W, BD, BE, SIGMOID, DENSE, NORMALIZED,
    )  # fmt: skip
    tl.store(partial_ptr + i_o * D + o_d, tl.sum(b_dk, 0), mask=o_d < D)


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_edges_dk(
    dloss_ptr,  # fp32 [L, R]
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    rowptr_ptr,  # int64 [K * N + 1]
    row_ptr,  # int32 [E], by columns
    colptr_ptr,  # int64 [K * N + 1]
    weight_ptr,  # [E], by columns
    inv_mass_ptr,  # fp32 [K * N]
    segptr_ptr, partial_ptr,  # as of a segment; not read unless HAS_SEGMENTS
    rows_ptr,  # int64 [R], None for all genes
    copy_ptr, copyptr_ptr,  # as of a segment
    negrow_ptr,  # int64 [M]: the chosen rows that drew a gene, gene after gene; None for every valid non-edge, as the next two
    negative_weight_ptr,  # fp32 [R]
    drawnptr_ptr,  # int64 [N + 1]: of gene i negrow[drawnptr[i] : drawnptr[i + 1]]
    sharp_ptr,  # int32 [L, R], None for the sigmoid link
    dense_ptr,  # fp32 [parts, L, T, D]
    dk_ptr,  # out [L, T, D]
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    num_genes,
    first_row,
    first_segment,
    num_segments,
    num_prefix,
    num_parts,
    scale,
    HAS_SEGMENTS: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """A program a token: dk of its edges over the transposed graph, of the negatives that drew it, and of the dense pass."""
    i = tl.program_id(0).to(tl.int64)
    num_tokens = num_prefix + num_genes
    i_l, token = i // num_tokens, i % num_tokens
    gene = token - num_prefix
    stacked = first_row + gene
    m_gene = gene >= 0
    start = tl.load(colptr_ptr + stacked, mask=m_gene, other=0)
    end = tl.load(colptr_ptr + stacked + 1, mask=m_gene, other=0)
    filled = start < end
    if not DENSE:
        drawn_start = tl.load(drawnptr_ptr + gene, mask=m_gene, other=0)
        drawn_end = tl.load(drawnptr_ptr + gene + 1, mask=m_gene, other=0)
        filled = filled | (drawn_start < drawn_end)
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < W
    b_out = tl.zeros([BD], tl.float32)
    if filled:  # six in ten columns have no edge
        q_ptr += i_l * (stride_ql // ALIGN * ALIGN) + num_prefix * STRIDE_Q
        rowptr_ptr += first_row
        o_lead = i_l * num_rows
        p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + token * STRIDE_K + o_d
        b_k = tl.load(p_k, mask=m_d, other=0.0).to(tl.float32)
        # [BE, BD]: reduced once, after the loops
        b_e = tl.arange(0, BE)
        b_dk = tl.zeros([BE, BD], tl.float32)
        if HAS_SEGMENTS:
            first = tl.load(segptr_ptr + stacked) - first_segment
            last = tl.load(segptr_ptr + stacked + 1) - first_segment
            b_dk = add_segments(b_dk, partial_ptr + i_l * num_segments * D, first, last, D, BD, BE)
            end = tl.where(first < last, start, end)
        b_dk = _add_column(
            b_dk, b_k, q_ptr, rowptr_ptr, row_ptr, weight_ptr, inv_mass_ptr + first_row, copy_ptr, copyptr_ptr, dloss_ptr,
            lse_ptr, sharp_ptr, token, o_lead, start, end, scale * LOG2E, STRIDE_Q, W, BD, BE, SIGMOID, DENSE, NORMALIZED,
        )  # fmt: skip
        if not DENSE:
            # [BE]: while a step gathers, the rows of the next are on their way
            m_e = drawn_start + b_e < drawn_end
            b_r = tl.load(negrow_ptr + drawn_start + b_e, mask=m_e, other=0)
            for e in range(drawn_start, drawn_end, BE):
                o_e = e + b_e
                m_e = o_e < drawn_end
                o_r = o_lead + b_r
                b_row = b_r
                if rows_ptr is not None:
                    b_row = tl.load(rows_ptr + b_r, mask=m_e, other=0)
                p_row = rowptr_ptr + b_row
                m_e = m_e & (tl.load(p_row + 1, mask=m_e, other=0) > tl.load(p_row, mask=m_e, other=0))
                b_weight = tl.load(negative_weight_ptr + b_r, mask=m_e, other=0.0)
                b_r = tl.load(negrow_ptr + o_e + BE, mask=o_e + BE < drawn_end, other=0)
                b_q = gather(q_ptr, b_row, m_e, STRIDE_Q, o_d, m_d)
                b_x2 = scale * LOG2E * sum_of_products(b_k[None, :], b_q, m_e[:, None], 1)
                if not SIGMOID:
                    b_x2 -= tl.load(lse_ptr + o_r, mask=m_e, other=0.0) * LOG2E
                    m_e = m_e & (tl.load(sharp_ptr + o_r, mask=m_e, other=-1) != token)
                b_dloss = tl.load(dloss_ptr + o_r, mask=m_e, other=0.0)
                b_g = tl.where(m_e, b_dloss * b_weight * grad_term(b_x2, SIGMOID), 0.0)
                b_dk += b_g[:, None] * b_q
        b_out = tl.sum(b_dk, 0)
    if dense_ptr is not None:
        for p in range(num_parts):
            o_p = ((p * num_leading).to(tl.int64) + i_l) * num_tokens + token
            b_out += tl.load(dense_ptr + o_p * D + o_d, mask=o_d < D, other=0.0)
    tl.store(dk_ptr + i * D + o_d, scale * b_out, mask=o_d < D)


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_dq(
    rows_dq_ptr,  # fp32 [L, R, D]
    copy_ptr,  # int64 [R]
    copyptr_ptr,  # int64 [N + 1]
    dq_ptr,  # out [L, T, D]
    num_rows,
    num_genes,
    num_prefix,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,  # tokens a program
):
    """A program a block of tokens: dq of a gene is the sum over its copies in rows; else 0."""
    num_tokens = num_prefix + num_genes
    blocks = tl.cdiv(num_tokens, BT)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    # [BT]
    o_t = (tl.program_id(0) % blocks) * BT + tl.arange(0, BT)
    o_gene = o_t - num_prefix
    m_gene = (o_gene >= 0) & (o_t < num_tokens)
    b_copy = tl.load(copyptr_ptr + o_gene, mask=m_gene, other=0)
    b_copies = tl.load(copyptr_ptr + o_gene + 1, mask=m_gene, other=0) - b_copy
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    # [BT, BD]
    b_dq = tl.zeros([BT, BD], tl.float32)
    for c in range(tl.max(b_copies, 0)):
        m_c = c < b_copies
        b_r = tl.load(copy_ptr + b_copy + c, mask=m_c, other=0)
        p_row = rows_dq_ptr + (i_l * num_rows + b_r)[:, None] * D + o_d[None, :]
        b_dq += tl.load(p_row, mask=m_c[:, None] & m_d[None, :], other=0.0)
    p_out = dq_ptr + (i_l * num_tokens + o_t)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_dq, mask=(o_t < num_tokens)[:, None] & m_d[None, :])
