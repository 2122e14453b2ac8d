"""The backward of attention in rows of large scores, which `attention_bwd_kernel_delta` marks with an lse2 of +inf."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device functions: their arguments are described where they are declared)
from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import SIZES, load_tile
from .dropout import entries_kept, read_draw, share_kept
from .large_scores import LARGEST, is_any, power


@triton.jit
def _large_row(
    b_q, b_do, b_k, b_v, m_n, scale2, draw, i_l, row, column, BN: tl.constexpr, HAS_DO: tl.constexpr, HAS_DROPOUT: tl.constexpr
):
    """(s, dP, Z), each float64 [BN], of one row b_q [BD], b_do [BV] and the keys b_k [BN, BD], b_v [BN, BV]; s in base 2."""
    b_s = tl.sum(b_q[None, :] * b_k.to(tl.float64), 1) * scale2
    b_z = tl.full([BN], 1.0, tl.float64)
    b_dp = tl.zeros([BN], tl.float64)
    if HAS_DO:
        b_dp = tl.sum(b_do[None, :] * b_v.to(tl.float64), 1)
        if HAS_DROPOUT:
            o_row = row + tl.arange(0, 1)
            b_z = tl.sum(entries_kept(draw, 1 / share_kept(draw[2]), i_l, o_row, column, BN, ACROSS=False), 0).to(tl.float64)
            b_dp *= b_z
    return tl.where(m_n, b_s, float("-inf")), b_dp, b_z


@triton.jit
def _keys(p_k, p_v, p_mask, n, s_kt, s_vt, Tk, W: tl.constexpr, WV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
          BN: tl.constexpr, HAS_DO: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """(which count, k, v) of the BN keys from n on."""
    o_d, o_v, o_n = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BN)
    m_n = n + o_n < Tk
    if HAS_MASK:
        m_n = m_n & (tl.load(p_mask + n + o_n, mask=m_n, other=0) != 0)
    b_k = load_tile(p_k + n * s_kt.to(tl.int64) + (o_n[:, None] * s_kt + o_d[None, :]), m_n, o_d, W, BD, True)
    b_v = b_k
    if HAS_DO:
        b_v = load_tile(p_v + n * s_vt.to(tl.int64) + (o_n[:, None] * s_vt + o_v[None, :]), m_n, o_v, WV, BV, True)
    return m_n, b_k, b_v


@triton.jit
def _row_of(p, row, stride, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """One row as float64 [BLOCK]."""
    o = tl.arange(0, BLOCK)
    return tl.load(p + row * stride.to(tl.int64) + o, mask=o < COLS, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_kernel_large_dq(
    q, k, v, mask, draw, do,  # as in attention_bwd_kernel_dq
    lse2, delta, has_large,  # of attention_bwd_kernel_delta; out: delta of the rows left out, made again
    dlse,  # [L, Tq]; unused without HAS_DLSE
    exact,  # out: [L, Tq], float64, LSE in base 2 of the rows left out
    dq,  # out: [L, Tq, D], contiguous, of which the rows left out are written
    scale, scale2, threshold, L, H, Tq, Tk,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_dob, s_doh, s_dot, s_mb, s_mh,
    ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr,  # that of attention_bwd_kernel_delta
    BN: tl.constexpr, HAS_DO: tl.constexpr, HAS_DLSE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Blocks of BM queries of one head: every num_programs-th."""
    NM = tl.cdiv(Tq, BM)
    if not is_any(has_large, L * NM):
        return
    b_draw = read_draw(draw, threshold) if HAS_DROPOUT else None
    o_d = tl.arange(0, BD)
    for block in range(tl.program_id(0), L * NM, tl.num_programs(0)):
        i_l = (block // NM).to(tl.int64)
        i_b, i_h = i_l // H, i_l % H
        first = block % NM * BM
        last = tl.where(tl.load(has_large + block) != 0, tl.minimum(first + BM, Tq), first)
        p_q = q + (i_b * s_qb + i_h * s_qh) * ALIGN
        p_k = k + (i_b * s_kb + i_h * s_kh) * ALIGN
        p_v = v + (i_b * s_vb + i_h * s_vh) * ALIGN
        p_do = do + (i_b * s_dob + i_h * s_doh) * ALIGN
        p_mask = mask + (i_b * s_mb + i_h * s_mh)
        for row in range(first, last):
            i_row = i_l * Tq + row
            if tl.load(lse2 + i_row) == float("inf"):
                # [BD], [BV]
                b_q = _row_of(p_q, row, s_qt * ALIGN, W, BD)
                b_do = b_q
                if HAS_DO:
                    b_do = _row_of(p_do, row, s_dot * ALIGN, WV, BV)
                # LSE, and delta = sum_j P_ij dP_ij - dLSE_i: not from out, whose P was of rounded scores
                m = tl.full([], -LARGEST, tl.float64)
                total = tl.zeros([], tl.float64)
                mean = tl.zeros([], tl.float64)
                for n in range(0, Tk, BN):
                    m_n, b_k, b_v = _keys(
                        p_k, p_v, p_mask, n, s_kt * ALIGN, s_vt * ALIGN, Tk, W, WV, BD, BV, BN, HAS_DO, HAS_MASK
                    )
                    b_s, b_dp, _ = _large_row(b_q, b_do, b_k, b_v, m_n, scale2, b_draw, i_l, row, n, BN, HAS_DO, HAS_DROPOUT)
                    above = tl.maximum(m, tl.max(b_s, 0))
                    b_p, r = power(b_s - above), power(m - above)
                    total = total * r + tl.sum(b_p, 0)
                    mean = mean * r + tl.sum(b_p * b_dp, 0)
                    m = above
                # m is known to the last digit of a float64, so that what is rounded to float32 here is less than 2^-20
                b_lse = m + tl.log2(total.to(tl.float32)).to(tl.float64)
                b_delta = mean / total
                if HAS_DLSE:
                    b_delta -= tl.load(dlse + i_row).to(tl.float64)
                tl.store(exact + i_row, b_lse)
                tl.store(delta + i_row, b_delta.to(tl.float32))
                # [BN, BD]
                b_dq = tl.zeros([BN, BD], tl.float64)
                for n in range(0, Tk, BN):
                    m_n, b_k, b_v = _keys(
                        p_k, p_v, p_mask, n, s_kt * ALIGN, s_vt * ALIGN, Tk, W, WV, BD, BV, BN, HAS_DO, HAS_MASK
                    )
                    b_s, b_dp, _ = _large_row(b_q, b_do, b_k, b_v, m_n, scale2, b_draw, i_l, row, n, BN, HAS_DO, HAS_DROPOUT)
                    b_ds = tl.where(m_n, power(b_s - b_lse) * (b_dp - b_delta), 0.0)
                    b_dq += b_ds[:, None] * b_k.to(tl.float64)
                b_row = (tl.sum(b_dq, 0) * scale).to(tl.float32)
                tl.store(dq + i_row * D + o_d, b_row.to(dq.dtype.element_ty), mask=o_d < D)


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_kernel_large_dkv(
    q, k, v, mask, draw, do, lse2, delta, has_large, exact,  # as attention_bwd_kernel_large_dq leaves them
    dk,  # [L, Tk, D], contiguous, of the other rows: those left out are added
    dv,  # [L, Tk, DV], likewise; unused without HAS_DO
    scale, scale2, threshold, L, H, Tq, Tk,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_dob, s_doh, s_dot, s_mb, s_mh,
    ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_DO: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Blocks of BN keys of one head: every num_programs-th."""
    NN, NM = tl.cdiv(Tk, BN), tl.cdiv(Tq, BM)
    if not is_any(has_large, L * NM):
        return
    b_draw = read_draw(draw, threshold) if HAS_DROPOUT else None
    for block in range(tl.program_id(0), L * NN, tl.num_programs(0)):
        i_l = (block // NN).to(tl.int64)
        p_large = has_large + i_l * NM
        if is_any(p_large, NM):
            i_b, i_h = i_l // H, i_l % H
            p_q = q + (i_b * s_qb + i_h * s_qh) * ALIGN
            p_k = k + (i_b * s_kb + i_h * s_kh) * ALIGN
            p_v = v + (i_b * s_vb + i_h * s_vh) * ALIGN
            p_do = do + (i_b * s_dob + i_h * s_doh) * ALIGN
            p_mask = mask + (i_b * s_mb + i_h * s_mh)
            key = block % NN * BN
            m_n, b_k, b_v = _keys(p_k, p_v, p_mask, key, s_kt * ALIGN, s_vt * ALIGN, Tk, W, WV, BD, BV, BN, HAS_DO, HAS_MASK)
            # [BN, BD], [BN, BV]
            b_dk = tl.zeros([BN, BD], tl.float64)
            b_dv = tl.zeros([BN, BV], tl.float64)
            for i_m in range(NM):
                first = i_m * BM
                last = tl.where(tl.load(p_large + i_m) != 0, tl.minimum(first + BM, Tq), first)
                for row in range(first, last):
                    i_row = i_l * Tq + row
                    if tl.load(lse2 + i_row) == float("inf"):
                        # [BD], [BV]
                        b_q = _row_of(p_q, row, s_qt * ALIGN, W, BD)
                        b_do = b_q
                        if HAS_DO:
                            b_do = _row_of(p_do, row, s_dot * ALIGN, WV, BV)
                        b_s, b_dp, b_z = _large_row(
                            b_q, b_do, b_k, b_v, m_n, scale2, b_draw, i_l, row, key, BN, HAS_DO, HAS_DROPOUT
                        )
                        b_p = power(b_s - tl.load(exact + i_row))
                        b_ds = tl.where(m_n, b_p * (b_dp - tl.load(delta + i_row)), 0.0)
                        b_dk += b_ds[:, None] * b_q[None, :]
                        if HAS_DO:
                            b_dv += (b_p * b_z)[:, None] * b_do[None, :]
            o_n, o_d, o_v = key + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BV)
            p_dk = dk + (i_l * Tk + o_n[:, None]) * D + o_d[None, :]
            m_d = m_n[:, None] & (o_d[None, :] < D)
            b_dk = tl.load(p_dk, mask=m_d, other=0.0).to(tl.float64) + b_dk * scale
            tl.store(p_dk, b_dk.to(tl.float32).to(dk.dtype.element_ty), mask=m_d)
            if HAS_DO:
                p_dv = dv + (i_l * Tk + o_n[:, None]) * DV + o_v[None, :]
                m_v = m_n[:, None] & (o_v[None, :] < DV)
                b_dv = tl.load(p_dv, mask=m_v, other=0.0).to(tl.float64) + b_dv
                tl.store(p_dv, b_dv.to(tl.float32).to(dv.dtype.element_ty), mask=m_v)
