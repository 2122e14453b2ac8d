"""The backward of edge_attention in rows of large scores, which `deltas` of attention.py marks with an lse2 of +inf."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device functions: their arguments are described where they are declared)
from __future__ import annotations

import triton
import triton.language as tl

from .edge_attention_entries import LOG2E, SIZES, factor, gather, line_of, row_at
from .large_scores import LARGEST, is_any, power


@triton.jit
def _exactly(scale, scale_rest):
    """The scale in float64, of the two numbers in float32 that it comes in: what is added to scores may cancel them."""
    return tl.zeros([], tl.float64) + scale + scale_rest


@triton.jit
def _added_exactly(bias_ptr, tie, log_weight_ptr, o_e, m_e):
    """`added` as float64 [EDGES]."""
    b_added = tl.where(m_e, 0.0, 0.0).to(tl.float64)
    if log_weight_ptr is not None:
        b_added += tl.load(log_weight_ptr + o_e, mask=m_e, other=0.0).to(tl.float64) * LOG2E
    if bias_ptr is not None:
        b_added += tl.load(bias_ptr + tie).to(tl.float64) * LOG2E
    return b_added


@triton.jit
def _large_entries(
    b_x, b_y, b_xs, b_ys, b_added, m_e, scale2, line, copy, o_other, BY_ROW: tl.constexpr,
):  # fmt: skip
    """(score in base 2, dP, Z), each float64 [EDGES], of one entry a lane; a score of -inf where masked.

    Of a row (BY_ROW) b_x is q, b_y dOut, and b_xs, b_ys are k and v of the entries; of a column it is the other way round.
    """
    b_s = tl.sum(b_x.to(tl.float64)[None, :] * b_xs.to(tl.float64), 1) * scale2 + b_added
    b_dp = tl.sum(b_y.to(tl.float64)[None, :] * b_ys.to(tl.float64), 1)
    b_z = tl.where(m_e, 1.0, 1.0).to(tl.float64)
    if line is not None:
        b_z = factor(line, copy, o_other, BY_ROW).to(tl.float64)
    return tl.where(m_e, b_s, float("-inf")), b_dp * b_z, b_z


@triton.jit
def _large_step(
    m, total, mean, b_dq, b_db, lse2, delta, b_q, b_do, p_k, p_v, b_token, b_added, m_e, scale2, line, copy, first,
    STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """One entry a lane into the maximum, sum and mean of dP of a row; or into dq and db where KNOWN, with lse2 and delta."""
    b_k = gather(p_k, b_token, m_e, STRIDE_KT, W, D_PAD)
    b_v = gather(p_v, b_token, m_e, STRIDE_VT, WV, DV_PAD)
    b_s, b_dp, _ = _large_entries(b_q, b_do, b_k, b_v, b_added, m_e, scale2, line, copy, first + b_token, True)
    if KNOWN:
        b_ds = tl.where(m_e, power(b_s - lse2) * (b_dp - delta), 0.0)
        b_dq += b_ds[:, None] * b_k.to(tl.float64)
        b_db += b_ds
    else:
        above = tl.maximum(m, tl.max(b_s, 0))
        b_p, r = power(b_s - above), power(m - above)
        total = total * r + tl.sum(b_p, 0)
        mean = mean * r + tl.sum(tl.where(m_e, b_p * b_dp, 0.0), 0)
        m = above
    return m, total, mean, b_dq, b_db


@triton.jit(do_not_specialize=SIZES)
def edge_bwd_kernel_large_dq(
    q_ptr, k_ptr, v_ptr, bias_ptr, rowptr_ptr, col_ptr, log_weight_ptr, headptr_ptr, ties_ptr,  # as in the forward
    do_ptr, lse2_ptr, delta_ptr,  # as in dq; out: delta of the rows left out
    has_large_ptr,  # int8 [L, H, blocks of BM rows]: whether a row of the block is left out
    dlse_ptr,  # float32 [L, H, N] or None
    exact_ptr,  # out: float64 [L, H, N], LSE in base 2 of the rows left out
    dq_ptr, dbias_ptr,  # as in dq, of which the rows left out are written
    draw_ptr,  # as in the forward
    scale, scale_rest,  # what float32 leaves of the scale
    num_leading, num_genes, num_heads, num_ties, num_prefix, threshold,
    stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh, stride_dol, stride_doh,
    SELF_LOOPS: tl.constexpr,
    STRIDE_QT: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_DOT: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BM: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Blocks of BM rows of a head: every num_programs-th."""
    num_blocks = tl.cdiv(num_genes, BM)
    if not is_any(has_large_ptr, num_leading * num_heads * num_blocks):
        return
    exact_scale = _exactly(scale, scale_rest)
    scale2 = exact_scale * LOG2E
    # [EDGES], [D_PAD]
    o_e, o_d = tl.arange(0, EDGES), tl.arange(0, D_PAD)
    num_near = num_prefix + 1 if SELF_LOOPS else num_prefix
    for block in range(tl.program_id(0), num_leading * num_heads * num_blocks, tl.num_programs(0)):
        i_l = (block // num_blocks // num_heads).to(tl.int64)
        head = block // num_blocks % num_heads
        first_gene = block % num_blocks * BM
        num_rows = tl.where(tl.load(has_large_ptr + block) != 0, tl.minimum(BM, num_genes - first_gene), 0)
        p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + head.to(tl.int64) * (stride_qh // ALIGN * ALIGN)
        p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + head.to(tl.int64) * (stride_kh // ALIGN * ALIGN)
        p_v = v_ptr + i_l * (stride_vl // ALIGN * ALIGN) + head.to(tl.int64) * (stride_vh // ALIGN * ALIGN)
        p_do = do_ptr + i_l * (stride_dol // ALIGN * ALIGN) + head.to(tl.int64) * (stride_doh // ALIGN * ALIGN)
        for row in range(num_rows):
            gene = (first_gene + row).to(tl.int64)
            i_row = (i_l * num_heads + head) * num_genes + gene
            if tl.load(lse2_ptr + i_row) == float("inf"):
                # [D_PAD], [DV_PAD]
                b_q = row_at(p_q + gene * STRIDE_QT, W, D_PAD)
                b_do = row_at(p_do + gene * STRIDE_DOT, WV, DV_PAD)
                line = line_of(draw_ptr, threshold, i_l, num_heads, head, num_prefix + gene) if draw_ptr is not None else None
                m = tl.full([], -LARGEST, tl.float64)
                total = tl.zeros([], tl.float64)
                mean = tl.zeros([], tl.float64)
                lse2 = tl.zeros([], tl.float64)
                delta = tl.zeros([], tl.float64)
                # [EDGES, D_PAD], [EDGES]
                b_dq = tl.zeros([EDGES, D_PAD], tl.float64)
                b_db = tl.zeros([EDGES], tl.float64)
                for KNOWN in tl.static_range(2):
                    for n in range(0, num_near, EDGES):
                        m_e = n + o_e < num_near
                        b_token = tl.where(n + o_e < num_prefix, n + o_e, num_prefix + gene.to(tl.int32))
                        m, total, mean, b_dq, b_db = _large_step(
                            m, total, mean, b_dq, b_db, lse2, delta, b_q, b_do, p_k, p_v, b_token,
                            tl.zeros([EDGES], tl.float64), m_e, scale2, line, 0, 0,
                            STRIDE_KT, STRIDE_VT, W, WV, D_PAD, DV_PAD, KNOWN,
                        )  # fmt: skip
                    for i in range(tl.load(headptr_ptr + head), tl.load(headptr_ptr + head + 1)):
                        tie = tl.load(ties_ptr + i * 3)
                        stacked = tl.load(ties_ptr + i * 3 + 1) * num_genes + gene
                        end = tl.load(rowptr_ptr + stacked + 1)
                        b_db = tl.zeros([EDGES], tl.float64)
                        for e in range(tl.load(rowptr_ptr + stacked), end, EDGES):
                            m_e = e + o_e < end
                            b_token = tl.load(col_ptr + e + o_e, mask=m_e, other=0)
                            m, total, mean, b_dq, b_db = _large_step(
                                m, total, mean, b_dq, b_db, lse2, delta, b_q, b_do,
                                p_k + num_prefix * STRIDE_KT, p_v + num_prefix * STRIDE_VT, b_token,
                                _added_exactly(bias_ptr, tie, log_weight_ptr, e + o_e, m_e), m_e, scale2,
                                line, (1 + tie).to(tl.int32), num_prefix, STRIDE_KT, STRIDE_VT, W, WV, D_PAD, DV_PAD, KNOWN,
                            )  # fmt: skip
                        if KNOWN and dbias_ptr is not None:
                            p_db = dbias_ptr + (i_l * num_genes + gene) * num_ties + tie
                            tl.store(p_db, tl.sum(b_db, 0).to(tl.float32))
                    if not KNOWN:
                        # m is known to the last digit of a float64: what is rounded to float32 here is the log of a sum
                        lse2 = m + tl.log2(total.to(tl.float32)).to(tl.float64)
                        delta = mean / total
                        if dlse_ptr is not None:
                            delta -= tl.load(dlse_ptr + i_row).to(tl.float64)
                        tl.store(exact_ptr + i_row, lse2)
                        tl.store(delta_ptr + i_row, delta.to(tl.float32))
                b_row = (tl.sum(b_dq, 0) * exact_scale).to(tl.float32)
                tl.store(dq_ptr + i_row * D + o_d, b_row.to(dq_ptr.dtype.element_ty), mask=o_d < D)


@triton.jit
def _large_seen(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse2, p_delta, p_exact, b_row, b_added, m_e, scale2, line, copy, first,
    STRIDE_QT: tl.constexpr, STRIDE_DOT: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
):  # fmt: skip
    """`_be_seen` of edge_attention.py, in float64, by those rows alone that were left out."""
    m_e &= tl.load(p_lse2 + b_row, mask=m_e, other=0.0) == float("inf")
    if tl.max(m_e.to(tl.int32), 0) != 0:
        b_q = gather(p_q, b_row, m_e, STRIDE_QT, W, D_PAD)
        b_do = gather(p_do, b_row, m_e, STRIDE_DOT, WV, DV_PAD)
        b_lse2 = tl.load(p_exact + b_row, mask=m_e, other=0.0)
        b_delta = tl.load(p_delta + b_row, mask=m_e, other=0.0).to(tl.float64)
        b_s, b_dp, b_z = _large_entries(b_k, b_v, b_q, b_do, b_added, m_e, scale2, line, copy, first + b_row, False)
        b_p = power(b_s - b_lse2)
        b_ds = tl.where(m_e, b_p * (b_dp - b_delta), 0.0)
        b_dk += b_ds[:, None] * b_q.to(tl.float64)
        b_dv += tl.where(m_e, b_p * b_z, 0.0)[:, None] * b_do.to(tl.float64)
    return b_dk, b_dv


@triton.jit(do_not_specialize=SIZES)
def edge_bwd_kernel_large_dkv(
    q_ptr, k_ptr, v_ptr, bias_ptr, colptr_ptr, row_ptr, log_weight_ptr, headptr_ptr, ties_ptr,  # as in dkv
    do_ptr, lse2_ptr, delta_ptr, has_large_ptr, exact_ptr,  # as edge_bwd_kernel_large_dq leaves them
    dk_ptr,  # [L, H, T, D], of the other rows: those left out are added
    dv_ptr,  # [L, H, T, DV], likewise
    draw_ptr,  # as in the forward
    scale, scale_rest, num_leading, num_genes, num_heads, num_prefix, threshold,
    stride_ql, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh, stride_dol, stride_doh,
    SELF_LOOPS: tl.constexpr,
    STRIDE_QT: tl.constexpr, STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr, STRIDE_DOT: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BM: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Tokens of a head, those of the prefix too: every num_programs-th."""
    num_blocks = tl.cdiv(num_genes, BM)
    if not is_any(has_large_ptr, num_leading * num_heads * num_blocks):
        return
    exact_scale = _exactly(scale, scale_rest)
    scale2 = exact_scale * LOG2E
    # [EDGES], [D_PAD], [DV_PAD]
    o_e, o_d, o_v = tl.arange(0, EDGES), tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    num_tokens = num_prefix + num_genes
    num_all = num_leading.to(tl.int64) * num_heads * num_tokens
    for column in range(tl.program_id(0).to(tl.int64), num_all, tl.num_programs(0)):
        i_lh = column // num_tokens
        if is_any(has_large_ptr + i_lh * num_blocks, num_blocks):
            i_l = i_lh // num_heads
            head = i_lh % num_heads
            token = (column % num_tokens).to(tl.int32)
            gene = token - num_prefix
            p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + head * (stride_qh // ALIGN * ALIGN)
            p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + head * (stride_kh // ALIGN * ALIGN)
            p_v = v_ptr + i_l * (stride_vl // ALIGN * ALIGN) + head * (stride_vh // ALIGN * ALIGN)
            p_do = do_ptr + i_l * (stride_dol // ALIGN * ALIGN) + head * (stride_doh // ALIGN * ALIGN)
            o_row = i_lh * num_genes
            # [D_PAD], [DV_PAD]
            b_k = row_at(p_k + token.to(tl.int64) * STRIDE_KT, W, D_PAD)
            b_v = row_at(p_v + token.to(tl.int64) * STRIDE_VT, WV, DV_PAD)
            line = line_of(draw_ptr, threshold, i_l, num_heads, head, token) if draw_ptr is not None else None
            # [EDGES, D_PAD], [EDGES, DV_PAD]
            b_dk = tl.zeros([EDGES, D_PAD], tl.float64)
            b_dv = tl.zeros([EDGES, DV_PAD], tl.float64)
            # rows without a tie between them: all, of a token of the prefix, and the gene's own
            near = tl.where(gene < 0, 0, gene)
            num_near = tl.where(gene < 0, num_genes, 1 if SELF_LOOPS else 0)
            for n in range(0, num_near, EDGES):
                m_e = n + o_e < num_near
                b_dk, b_dv = _large_seen(
                    b_dk, b_dv, b_k, b_v, p_q, p_do, lse2_ptr + o_row, delta_ptr + o_row, exact_ptr + o_row, near + n + o_e,
                    tl.zeros([EDGES], tl.float64), m_e, scale2, line, 0, num_prefix,
                    STRIDE_QT, STRIDE_DOT, W, WV, D_PAD, DV_PAD,
                )  # fmt: skip
            if gene >= 0:
                for i in range(tl.load(headptr_ptr + head), tl.load(headptr_ptr + head + 1)):
                    tie = tl.load(ties_ptr + i * 3)
                    stacked = tl.load(ties_ptr + i * 3 + 1) * num_genes + gene
                    end = tl.load(colptr_ptr + stacked + 1)
                    for e in range(tl.load(colptr_ptr + stacked), end, EDGES):
                        m_e = e + o_e < end
                        b_row = tl.load(row_ptr + e + o_e, mask=m_e, other=0)
                        b_dk, b_dv = _large_seen(
                            b_dk, b_dv, b_k, b_v, p_q, p_do, lse2_ptr + o_row, delta_ptr + o_row, exact_ptr + o_row, b_row,
                            _added_exactly(bias_ptr, tie, log_weight_ptr, e + o_e, m_e), m_e, scale2, line,
                            (1 + tie).to(tl.int32), num_prefix, STRIDE_QT, STRIDE_DOT, W, WV, D_PAD, DV_PAD,
                        )  # fmt: skip
            p_dk, p_dv = dk_ptr + column * D + o_d, dv_ptr + column * DV + o_v
            b_sum = tl.sum(b_dk, 0) * exact_scale
            b_sum += tl.load(p_dk, mask=o_d < D, other=0.0).to(tl.float64)
            tl.store(p_dk, b_sum.to(tl.float32).to(dk_ptr.dtype.element_ty), mask=o_d < D)
            b_sum = tl.sum(b_dv, 0) + tl.load(p_dv, mask=o_v < DV, other=0.0).to(tl.float64)
            tl.store(p_dv, b_sum.to(tl.float32).to(dv_ptr.dtype.element_ty), mask=o_v < DV)
