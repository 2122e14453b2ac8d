"""Flash attention with a differentiable log-sum-exp: one forward, one backward, for every use of attention in the library.

With s_ij = scale * q_i . k_j over the keys j that the mask keeps,

    LSE_i = log sum_j exp(s_ij),   P_ij = exp(s_ij - LSE_i),   out_i = sum_j P_ij v_j

No [Tq, Tk] map is stored: the forward keeps a running maximum and sum a row, the backward recomputes P from LSE. Natural
logarithms at the interface, base 2 inside: exp2 is one instruction, and its factor log2 e is folded into the scale.

Where there are few queries and many keys (or few keys and many queries, in dk and dv), the loop is cut into parts that run
side by side; each part writes a float32 result of its own, and a second pass adds them in a fixed order.
No atomics anywhere: results are bit-equal from run to run.

NaN and infinities come out as the table in `cellattn/ops/attention.py` says. Instructions for a maximum drop a NaN, so that it
is the running sum that carries it; a pivot is held finite, so that a score of +inf makes that sum +inf, and a row of -inf
alone leaves it at 0. The backward makes P of NaN in rows whose LSE is not finite. What a key mask leaves out is not read.

Where |LSE| is LARGE, float32 leaves little of P in the backward: these rows are left out, and made again in float64
(large_scores.py, attention_large.py).

With dropout P_ij is multiplied in out by Z_ij, 0 or 1 / (1 - p), and LSE is that of the whole map. A dropped NaN stays one: it
is multiplied by 0. Where P_ij Z_ij is an operand, 1 / (1 - p) comes in after the sum, lest it overflow in float16.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (device functions: their arguments are described where they are declared)
from __future__ import annotations

from functools import partial
from math import log, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellattn._aligned import wide, width
from cellattn._check import require

from .attention_large import attention_bwd_kernel_large_dkv, attention_bwd_kernel_large_dq
from .attention_tiles import SIZES, load_tile
from .config import Tile, choose, on_device, options, parts_for
from .dropout import entries_kept, read_draw, share_kept
from .large_scores import LARGE, LARGEST, ROWS, exactly, num_programs
from .sums import sum_of_products
from .tensors import aligned, check_devices, check_draw, check_floats, grid_of, padded, precision

LOG2E = 1 / log(2)
TINY = 2.0**-126  # stands in for a scale of 0, with which a masked score would be -inf * 0 = NaN


# --------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _fwd_loop(
    b_o, b_m, b_l, b_q, p_k, p_v, p_mask, scale, lo, hi, s_kt, s_vt, draw, i_l, o_m,
    W: tl.constexpr, WV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    HAS_V: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys lo to hi into b_o [BM, BV], the running maximum b_m [BM] and the running sum b_l [BM]."""
    o_d, o_v, o_n = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BN)
    for n in range(lo, hi, BN):
        # [BN]
        m_n = n + o_n < hi
        if HAS_MASK:
            m_n = m_n & (tl.load(p_mask + n + o_n, mask=m_n, other=0) != 0)
        # [BN, BD]
        p = p_k + n * s_kt.to(tl.int64) + (o_n[:, None] * s_kt + o_d[None, :])
        b_k = load_tile(p, m_n, o_d, W, BD, MASKED)
        # [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if MASKED:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        # scale > 0, so the maximum of the products is the product of the maximum: one FFMA an element below
        # [BM]
        b_mn = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        b_pivot = tl.minimum(b_mn, LARGEST)
        b_r = tl.exp2(b_m - b_pivot)
        # [BM, BN]
        b_p = tl.exp2(b_s * scale - b_pivot[:, None])
        b_l = b_l * b_r + tl.sum(b_p, 1)
        b_m = b_mn
        if HAS_V:
            # [BN, BV]
            p = p_v + n * s_vt.to(tl.int64) + (o_n[:, None] * s_vt + o_v[None, :])
            b_v = load_tile(p, m_n, o_v, WV, BV, MASKED)
            if HAS_DROPOUT:
                b_p *= entries_kept(draw, 1.0, i_l, o_m, n, BN, ACROSS=False)
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_r[:, None], input_precision=PRECISION)
    return b_o, b_m, b_l


@triton.jit(do_not_specialize=SIZES)
def attention_fwd_kernel(
    q,  # [B, H, Tq, D], strides s_qb, s_qh, s_qt, 1 in units of ALIGN elements, as those of k and v
    k,  # [B, H, Tk, D]
    v,  # [B, H, Tk, DV]; unused without HAS_V
    mask,  # uint8 [B, H, Tk], strides s_mb, s_mh, 1; unused without HAS_MASK
    draw,  # int64 [2], seed and offset; unused without HAS_DROPOUT, as threshold
    o,  # [B, H, NS, Tq, DV], contiguous; float32 where NS > 1
    lse,  # [B, H, NS, Tq], contiguous, float32, natural log
    scale,  # |scale| * log2 e, > 0
    threshold,  # p * 2^16
    H, Tq, Tk,
    NS,  # parts of the keys
    part,  # keys a part
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_mb, s_mh,
    ALIGN: tl.constexpr,  # elements in 16 bytes
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    HAS_V: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr,  # the scale's sign
    TAIL: tl.constexpr,  # an unmasked loop and a masked tail, rather than one masked loop
    PRECISION: tl.constexpr,  # of float32 products
):  # fmt: skip
    """BM queries of one head against one part of the keys."""
    NM = tl.cdiv(Tq, BM)
    i_m, i_s, i_part = tl.program_id(0) % NM, tl.program_id(0) // NM % NS, (tl.program_id(0) // NM).to(tl.int64)
    i_l = i_part // NS
    i_b, i_h = i_l // H, i_l % H
    # [BM], [BD], [BV]
    o_m, o_d, o_v = i_m * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    m_m = o_m < Tq
    # [BM, BD]
    p_q = q + (i_b * s_qb + i_h * s_qh) * ALIGN + o_m[:, None].to(tl.int64) * (s_qt * ALIGN) + o_d[None, :]
    b_q = load_tile(p_q, m_m, o_d, W, BD, True)
    if NEGATIVE:
        b_q = -b_q
    p_k = k + (i_b * s_kb + i_h * s_kh) * ALIGN
    p_v = v + (i_b * s_vb + i_h * s_vh) * ALIGN
    p_mask = mask + (i_b * s_mb + i_h * s_mh)
    b_o = tl.zeros([BM, BV], tl.float32)
    b_m = tl.full([BM], -LARGEST, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_draw = read_draw(draw, threshold) if HAS_DROPOUT else None
    lo = i_s * part
    hi = tl.minimum(lo + part, Tk)
    if TAIL:
        mid = lo + (hi - lo) // BN * BN
        b_o, b_m, b_l = _fwd_loop(
            b_o, b_m, b_l, b_q, p_k, p_v, p_mask, scale, lo, mid, s_kt * ALIGN, s_vt * ALIGN, b_draw, i_l, o_m,
            W, WV, BD, BV, BN, HAS_V, False, HAS_DROPOUT, False, PRECISION,
        )  # fmt: skip
        lo = mid
    b_o, b_m, b_l = _fwd_loop(
        b_o, b_m, b_l, b_q, p_k, p_v, p_mask, scale, lo, hi, s_kt * ALIGN, s_vt * ALIGN, b_draw, i_l, o_m,
        W, WV, BD, BV, BN, HAS_V, HAS_MASK, HAS_DROPOUT, True, PRECISION,
    )  # fmt: skip
    tl.store(lse + i_part * Tq + o_m, (b_m + tl.log2(b_l)) * 0.6931471805599453, mask=m_m)
    if HAS_V:
        # a part may have no key, or none that counts
        b_l = tl.where((b_l == 0) & ((NS > 1) | HAS_MASK), 1.0, b_l)
        if HAS_DROPOUT:
            b_l *= share_kept(threshold)
        b_o = b_o / b_l[:, None]
        p_o = o + (i_part * Tq + o_m[:, None]) * DV + o_v[None, :]
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_m[:, None] & (o_v[None, :] < DV))


@triton.jit(do_not_specialize=SIZES)
def attention_fwd_kernel_combine(
    o_part,  # [L, NS, Tq, DV], float32
    lse_part,  # [L, NS, Tq], float32
    o,  # [L, Tq, DV]
    lse,  # [L, Tq], float32
    Tq, NS,
    DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, HAS_V: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """LSE = log sum_s exp(LSE_s) and out = sum_s exp(LSE_s - LSE) out_s over the parts s, in their order."""
    NM = tl.cdiv(Tq, BM)
    i_m, i_l = tl.program_id(0) % NM, (tl.program_id(0) // NM).to(tl.int64)
    # [BM], [BV]
    o_m, o_v = i_m * BM + tl.arange(0, BM), tl.arange(0, BV)
    m_m = o_m < Tq
    m_v = m_m[:, None] & (o_v[None, :] < DV)
    b_m = tl.full([BM], -LARGEST, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BV], tl.float32)
    for s in range(NS):
        b_s = tl.load(lse_part + (i_l * NS + s) * Tq + o_m, mask=m_m, other=float("-inf")) * 1.4426950408889634
        b_mn = tl.maximum(b_m, b_s)
        b_pivot = tl.minimum(b_mn, LARGEST)
        b_r, b_p = tl.exp2(b_m - b_pivot), tl.exp2(b_s - b_pivot)
        b_l = b_l * b_r + b_p
        b_m = b_mn
        if HAS_V:
            # [BM, BV]
            b_os = tl.load(o_part + ((i_l * NS + s) * Tq + o_m[:, None]) * DV + o_v[None, :], mask=m_v, other=0.0)
            b_o = b_o * b_r[:, None] + b_os * b_p[:, None]
    tl.store(lse + i_l * Tq + o_m, (b_m + tl.log2(b_l)) * 0.6931471805599453, mask=m_m)
    if HAS_V:
        if HAS_MASK:
            b_l = tl.where(b_l == 0, 1.0, b_l)
        b_o = b_o / b_l[:, None]
        tl.store(o + (i_l * Tq + o_m[:, None]) * DV + o_v[None, :], b_o.to(o.dtype.element_ty), mask=m_v)


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, draw: Tensor | None = None, threshold: int = 0
) -> tuple[Tensor, Tensor]:
    """`cellattn::attention` on a GPU.

    Args:
        q: [..., Tq, D], float16, bfloat16 or float32, any strides; D from 1 to 256.
        k: [..., Tk, D].
        v: [..., Tk, DV]; with DV = 0 only lse is computed.
        key_mask: bool, broadcasts to [..., Tk]; False for keys to leave out.
        scale: factor of the scores, any sign.
        draw: int64 [2], the seed and offset of dropout, whose probability is threshold / 65536; None without. It takes no mask.

    Returns:
        out [..., Tq, DV] in the dtype of q, and lse [..., Tq], float32, natural log; 0 and -inf where the mask leaves no key.

    Raises:
        ValueError: for a dtype, head dimension or device that the kernels do not take.
    """
    check_floats(q=q, k=k, v=v)
    check_devices(q=q, k=k, v=v, key_mask=key_mask, draw=draw)
    check_draw(draw, threshold)
    require(draw is None or key_mask is None, "key_mask: expected None beside dropout")
    (Tq, D), (Tk, DV) = q.shape[-2:], v.shape[-2:]
    out = q.new_empty(*q.shape[:-1], DV)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    mask = _mask(key_mask, k)
    q, k = aligned(q, 2), aligned(k, 2)
    v = aligned(v, 2) if DV else k
    B, H = q.shape[:2]
    widths = _widths(D, DV, q.dtype)
    BD, BV = widths["BD"], widths["BV"]
    dropout = draw is not None and DV > 0
    suffix = "_dropout" if dropout else ""

    def launch(tile: Tile) -> None:
        NM = triton.cdiv(Tq, tile.BM)
        NS, part = parts_for(B * H * NM, Tk, tile.BN, q.device)
        out_parts = out if NS == 1 else q.new_empty(B, H, NS, Tq, DV, dtype=torch.float32)
        lse_parts = lse if NS == 1 else q.new_empty(B, H, NS, Tq, dtype=torch.float32)
        attention_fwd_kernel[grid_of(B * H * NS * NM, q=q, k=k)](
            q, k, v, q if mask is None else mask, q if draw is None else draw, out_parts, lse_parts,
            max(abs(scale) * LOG2E, TINY), threshold, H, Tq, Tk, NS, part,
            *_strides(q, k, v), *(mask.stride()[:2] if mask is not None else (0, 0)), **widths,
            BM=tile.BM, BN=tile.BN,
            HAS_V=DV > 0, HAS_MASK=mask is not None, HAS_DROPOUT=dropout, NEGATIVE=scale < 0, TAIL=tile.tail and mask is None,
            PRECISION=precision(), **tile.options,
        )  # fmt: skip
        if NS > 1:
            attention_fwd_kernel_combine[grid_of(B * H * triton.cdiv(Tq, 16), q=q)](
                out_parts,
                lse_parts,
                out,
                lse,
                Tq,
                NS,
                DV=DV,
                BV=BV,
                BM=16,
                HAS_V=DV > 0,
                HAS_MASK=mask is not None,
                **options(4),
            )

    with on_device(q):
        choose("attention_fwd" + suffix, q, max(BD, BV), launch, few=Tq <= 32)
    return out, lse


# -------------------------------------------------------------------------------------------------------- backward
#
# With upstream gradients dOut and dLSE,
#
#     dV_j  = sum_i P_ij dOut_i
#     dP_ij = dOut_i . v_j
#     dS_ij = P_ij (dP_ij - sum_j' P_ij' dP_ij') + P_ij dLSE_i = P_ij (dP_ij - delta_i),   delta_i = dOut_i . out_i - dLSE_i
#     dQ_i  = scale sum_j dS_ij k_j
#     dK_j  = scale sum_i dS_ij q_i
#
# so that the gradient of LSE costs nothing beyond the pass that makes delta. Without dOut, dS_ij = P_ij dLSE_i, dV = 0, and
# v is not read.
#
# With dropout, Z_ij stands before P_ij in dV_j and before dOut_i . v_j in dP_ij, and delta is what it was.


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_kernel_delta(
    o,  # [L, Tq, DV], contiguous; unused without HAS_DO
    do,  # [B, H, Tq, DV], strides in units of ALIGN elements; unused without HAS_DO
    lse,  # [L, Tq]
    dlse,  # [L, Tq]; unused without HAS_DLSE
    delta,  # [L, Tq], float32: dOut . out - dLSE
    lse2,  # [L, Tq], float32: lse in base 2, NaN where it is not finite, +inf in rows to leave out, where P comes out as 0
    has_large,  # [L, blocks of BM rows], int8: whether a row of the block is left out
    H, Tq, s_dob, s_doh, s_dot,
    ALIGN: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """BM rows of one head."""
    NM = tl.cdiv(Tq, BM)
    i_m, i_l = tl.program_id(0) % NM, (tl.program_id(0) // NM).to(tl.int64)
    # [BM], [BV]
    o_m, o_v = i_m * BM + tl.arange(0, BM), tl.arange(0, BV)
    m_m = o_m < Tq
    b_delta = tl.zeros([BM], tl.float32)
    if HAS_DO:
        # [BM, BV]
        m_v = m_m[:, None] & (o_v[None, :] < DV)
        p_do = do + (i_l // H * s_dob + i_l % H * s_doh) * ALIGN + o_m[:, None].to(tl.int64) * (s_dot * ALIGN) + o_v[None, :]
        b_do = load_tile(p_do, m_m, o_v, WV, BV, True).to(tl.float32)
        b_o = tl.load(o + (i_l * Tq + o_m[:, None]) * DV + o_v[None, :], mask=m_v, other=0.0).to(tl.float32)
        b_delta = sum_of_products(b_do, b_o, m_m[:, None], 1)
    if HAS_DLSE:
        b_delta -= tl.load(dlse + i_l * Tq + o_m, mask=m_m, other=0.0)
    b_lse = tl.load(lse + i_l * Tq + o_m, mask=m_m, other=0.0)
    b_lse = tl.where(tl.abs(b_lse) == float("inf"), float("nan"), b_lse * 1.4426950408889634)
    b_large = tl.abs(b_lse) >= LARGE
    b_lse = tl.where(b_large, float("inf"), b_lse)
    b_delta = tl.where(b_large, 0.0, b_delta)  # which P = 0 meets: lest 0 * inf be NaN
    tl.store(has_large + tl.program_id(0), tl.max(b_large.to(tl.int32), 0).to(tl.int8))
    tl.store(delta + i_l * Tq + o_m, b_delta, mask=m_m)
    tl.store(lse2 + i_l * Tq + o_m, b_lse, mask=m_m)


@triton.jit
def _dq_loop(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_mask, scale, lo, hi, s_kt, s_vt, draw, i_l, o_m,
    W: tl.constexpr, WV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add sum_j dS_ij k_j over the keys lo to hi to b_dq [BM, BD]."""
    o_d, o_v, o_n = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BN)
    for n in range(lo, hi, BN):
        # [BN]
        m_n = n + o_n < hi
        if HAS_MASK:
            m_n = m_n & (tl.load(p_mask + n + o_n, mask=m_n, other=0) != 0)
        # [BN, BD]
        p = p_k + n * s_kt.to(tl.int64) + (o_n[:, None] * s_kt + o_d[None, :])
        b_k = load_tile(p, m_n, o_d, W, BD, MASKED)
        # [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        if HAS_DO:
            # [BN, BV]
            p = p_v + n * s_vt.to(tl.int64) + (o_n[:, None] * s_vt + o_v[None, :])
            b_v = load_tile(p, m_n, o_v, WV, BV, MASKED)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            if HAS_DROPOUT:
                b_dp *= entries_kept(draw, 1 / share_kept(draw[2]), i_l, o_m, n, BN, ACROSS=False)
            b_ds = b_p * (b_dp - b_delta[:, None])
        else:
            b_ds = b_p * -b_delta[:, None]
        if MASKED:  # P of a key left out is anything
            b_ds = tl.where(m_n[None, :], b_ds, 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_kernel_dq(
    q, k, v, mask, draw,  # as in the forward
    do,  # [B, H, Tq, DV], strides in units of ALIGN elements; v and do are unused without HAS_DO
    lse2, delta,  # [B, H, Tq], of attention_bwd_kernel_delta
    dq,  # [B, H, NS, Tq, D], contiguous; float32 where NS > 1
    scale,
    scale2,  # scale * log2 e
    threshold,
    H, Tq, Tk, NS, part,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_dob, s_doh, s_dot, s_mb, s_mh,
    ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM queries of one head against one part of the keys."""
    NM = tl.cdiv(Tq, BM)
    i_m, i_s, i_part = tl.program_id(0) % NM, tl.program_id(0) // NM % NS, (tl.program_id(0) // NM).to(tl.int64)
    i_l = i_part // NS
    i_b, i_h = i_l // H, i_l % H
    # [BM], [BD], [BV]
    o_m, o_d, o_v = i_m * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    m_m = o_m < Tq
    # [BM, BD]
    m_d = m_m[:, None] & (o_d[None, :] < D)
    p_q = q + (i_b * s_qb + i_h * s_qh) * ALIGN + o_m[:, None].to(tl.int64) * (s_qt * ALIGN) + o_d[None, :]
    b_q = load_tile(p_q, m_m, o_d, W, BD, True)
    # [BM, BV]
    b_do = b_q
    if HAS_DO:
        p_do = do + (i_b * s_dob + i_h * s_doh) * ALIGN + o_m[:, None].to(tl.int64) * (s_dot * ALIGN) + o_v[None, :]
        b_do = load_tile(p_do, m_m, o_v, WV, BV, True)
    # [BM]
    b_lse = tl.load(lse2 + i_l * Tq + o_m, mask=m_m, other=float("inf"))
    b_delta = tl.load(delta + i_l * Tq + o_m, mask=m_m, other=0.0)
    p_k = k + (i_b * s_kb + i_h * s_kh) * ALIGN
    p_v = v + (i_b * s_vb + i_h * s_vh) * ALIGN
    p_mask = mask + (i_b * s_mb + i_h * s_mh)
    b_dq = tl.zeros([BM, BD], tl.float32)
    b_draw = read_draw(draw, threshold) if HAS_DROPOUT else None
    lo = i_s * part
    hi = tl.minimum(lo + part, Tk)
    if TAIL:
        mid = lo + (hi - lo) // BN * BN
        b_dq = _dq_loop(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_mask, scale2, lo, mid, s_kt * ALIGN, s_vt * ALIGN, b_draw, i_l, o_m,
            W, WV, BD, BV, BN, HAS_DO, False, HAS_DROPOUT, False, PRECISION,
        )  # fmt: skip
        lo = mid
    b_dq = _dq_loop(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_mask, scale2, lo, hi, s_kt * ALIGN, s_vt * ALIGN, b_draw, i_l, o_m,
        W, WV, BD, BV, BN, HAS_DO, HAS_MASK, HAS_DROPOUT, True, PRECISION,
    )  # fmt: skip
    p_dq = dq + (i_part * Tq + o_m[:, None]) * D + o_d[None, :]
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_d)


@triton.jit
def _dkv_loop(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, scale, lo, hi, s_qt, s_dot, draw, i_l, column,
    W: tl.constexpr, WV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DROPOUT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add sum_i dS_ij q_i to b_dk [BN, BD] and sum_i P_ij dOut_i to b_dv [BN, BV] over the queries lo to hi."""
    o_d, o_v, o_m = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BM)
    for m in range(lo, hi, BM):
        # [BM]: P = exp2(-inf) = 0 in the rows past the end
        m_m = m + o_m < hi
        if MASKED:
            b_lse = tl.load(p_lse + m + o_m, mask=m_m, other=float("inf"))
            b_delta = tl.load(p_delta + m + o_m, mask=m_m, other=0.0)
        else:
            b_lse = tl.load(p_lse + m + o_m)
            b_delta = tl.load(p_delta + m + o_m)
        # [BM, BD]
        p = p_q + m * s_qt.to(tl.int64) + (o_m[:, None] * s_qt + o_d[None, :])
        b_q = load_tile(p, m_m, o_d, W, BD, MASKED)
        # [BN, BM]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale - b_lse[None, :])
        if HAS_DO:
            # [BM, BV]
            p = p_do + m * s_dot.to(tl.int64) + (o_m[:, None] * s_dot + o_v[None, :])
            b_do = load_tile(p, m_m, o_v, WV, BV, MASKED)
            b_pz = b_p
            if HAS_DROPOUT:
                kept = share_kept(draw[2])
                b_z = tl.trans(entries_kept(draw, 1 / kept, i_l, m + o_m, column, BN, ACROSS=True))
                b_pz *= b_z * kept
            b_dv = tl.dot(b_pz.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            if HAS_DROPOUT:
                b_dp *= b_z
            b_ds = b_p * (b_dp - b_delta[None, :])
        else:
            b_ds = b_p * -b_delta[None, :]
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_kernel_dkv(
    q, k, v, mask, draw, do, lse2, delta,  # as in attention_bwd_kernel_dq
    dk,  # [B, H, NS, Tk, D], contiguous; float32 where NS > 1
    dv,  # [B, H, NS, Tk, DV], likewise; unused without HAS_DO
    scale, scale2, threshold,  # likewise
    H, Tq, Tk,
    NS,  # parts of the queries
    part,  # queries a part
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_dob, s_doh, s_dot, s_mb, s_mh,
    ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BN keys of one head against one part of the queries."""
    NN = tl.cdiv(Tk, BN)
    i_n, i_s, i_part = tl.program_id(0) % NN, tl.program_id(0) // NN % NS, (tl.program_id(0) // NN).to(tl.int64)
    i_l = i_part // NS
    i_b, i_h = i_l // H, i_l % H
    # [BN], [BD], [BV]
    o_n, o_d, o_v = i_n * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BV)
    m_n = o_n < Tk
    # [BN, BD]
    m_d = m_n[:, None] & (o_d[None, :] < D)
    p_k = k + (i_b * s_kb + i_h * s_kh) * ALIGN + o_n[:, None].to(tl.int64) * (s_kt * ALIGN) + o_d[None, :]
    b_k = load_tile(p_k, m_n, o_d, W, BD, True)
    # [BN, BV]
    m_v = m_n[:, None] & (o_v[None, :] < DV)
    b_v = b_k
    if HAS_DO:
        p_v = v + (i_b * s_vb + i_h * s_vh) * ALIGN + o_n[:, None].to(tl.int64) * (s_vt * ALIGN) + o_v[None, :]
        b_v = load_tile(p_v, m_n, o_v, WV, BV, True)
    p_q = q + (i_b * s_qb + i_h * s_qh) * ALIGN
    p_do = do + (i_b * s_dob + i_h * s_doh) * ALIGN
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BV], tl.float32)
    b_draw = read_draw(draw, threshold) if HAS_DROPOUT else None
    lo = i_s * part
    hi = tl.minimum(lo + part, Tq)
    if TAIL:
        mid = lo + (hi - lo) // BM * BM
        b_dk, b_dv = _dkv_loop(
            b_dk, b_dv, b_k, b_v, p_q, p_do, lse2 + i_l * Tq, delta + i_l * Tq, scale2, lo, mid, s_qt * ALIGN, s_dot * ALIGN,
            b_draw, i_l, i_n * BN, W, WV, BD, BV, BM, BN, HAS_DO, HAS_DROPOUT, False, PRECISION,
        )  # fmt: skip
        lo = mid
    b_dk, b_dv = _dkv_loop(
        b_dk, b_dv, b_k, b_v, p_q, p_do, lse2 + i_l * Tq, delta + i_l * Tq, scale2, lo, hi, s_qt * ALIGN, s_dot * ALIGN,
        b_draw, i_l, i_n * BN, W, WV, BD, BV, BM, BN, HAS_DO, HAS_DROPOUT, True, PRECISION,
    )  # fmt: skip
    b_dk = b_dk * scale
    if HAS_DROPOUT:
        b_dv = b_dv / share_kept(threshold)
    if HAS_MASK:
        # a key left out spoiled no row but its own, and gets nothing from rows without a key
        b_keep = tl.load(mask + (i_b * s_mb + i_h * s_mh) + o_n, mask=m_n, other=0)[:, None] != 0
        b_dk = tl.where(b_keep, b_dk, 0.0)
        b_dv = tl.where(b_keep, b_dv, 0.0)
    tl.store(dk + (i_part * Tk + o_n[:, None]) * D + o_d[None, :], b_dk.to(dk.dtype.element_ty), mask=m_d)
    if HAS_DO:
        tl.store(dv + (i_part * Tk + o_n[:, None]) * DV + o_v[None, :], b_dv.to(dv.dtype.element_ty), mask=m_v)


def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    draw: Tensor | None = None,
    threshold: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cellattn::attention_backward` on a GPU.

    Args:
        dout: [..., Tq, DV] in the dtype of q; dlse: [..., Tq], float32; None where an output was not used.
        q, k, v, key_mask, scale, draw, threshold: the inputs of `attention`; out, lse: its results.

    Returns:
        dq, dk and dv in the shapes of q, k and v, contiguous; dv exactly 0 where dout is None.

    Raises:
        ValueError: for a dtype, head dimension or device that the kernels do not take.
    """
    check_floats(q=q, k=k, v=v)
    check_devices(q=q, k=k, v=v, key_mask=key_mask, dout=dout, dlse=dlse, out=out, lse=lse, draw=draw)
    check_draw(draw, threshold)
    require(draw is None or key_mask is None, "key_mask: expected None beside dropout")
    has_do = dout is not None and v.shape[-1] > 0
    if lse.numel() == 0 or not (has_do or dlse is not None):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dv = v.new_empty(v.shape) if has_do else v.new_zeros(v.shape)
    mask = _mask(key_mask, k)
    q, k = aligned(q, 2), aligned(k, 2)
    v = aligned(v, 2) if has_do else k
    do = aligned(dout, 2) if has_do and dout is not None else q
    rows = deltas(do if has_do else None, dlse, out, lse)
    draw = draw if has_do else None  # nothing of the dropped map is left without dOut
    backward(do if has_do else None, rows, q, k, v, mask, scale, draw, threshold, dq, dk, dv)
    return dq, dk, dv


def backward(
    dout: Tensor | None,
    rows: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    draw: Tensor | None,
    threshold: int,
    dq: Tensor | None,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dq (unless it is None), dk and, where there is a dout, dv.

    Args:
        dout, q, k, v: as `aligned` gives them; without dout v is not read.
        rows: `deltas` of each query, over these keys or over more, of which these are a part.
        mask: of `_mask`. draw: None without dropout.
    """
    (Tq, D), (Tk, DV) = q.shape[-2:], v.shape[-2:]
    B, H = q.shape[:2]
    has_do = dout is not None
    do = q if dout is None else dout
    widths = _widths(D, DV if has_do else 0, q.dtype)
    BD, BV = widths["BD"], widths["BV"]
    strides = (*_strides(q, k, v, do), *(mask.stride()[:2] if mask is not None else (0, 0)))
    dropout = draw is not None
    suffix = "_dropout" if dropout else ""
    constants = {**widths, "HAS_DO": has_do, "HAS_DROPOUT": dropout, "PRECISION": precision()}
    inputs = (q, k, v, q if mask is None else mask, q if draw is None else draw, do, rows.lse2, rows.delta)
    numbers = scale, scale * LOG2E, threshold

    def launch_dq(dq: Tensor, tile: Tile) -> None:
        NM = triton.cdiv(Tq, tile.BM)
        NS, part = parts_for(B * H * NM, Tk, tile.BN, q.device)
        parts = dq if NS == 1 else q.new_empty(B, H, NS, Tq, D, dtype=torch.float32)
        attention_bwd_kernel_dq[grid_of(B * H * NS * NM, q=q, k=k)](
            *inputs, parts, *numbers, H, Tq, Tk, NS, part, *strides, **constants, BM=tile.BM, BN=tile.BN,
            HAS_MASK=mask is not None, TAIL=tile.tail and mask is None, **tile.options,
        )  # fmt: skip
        _add_parts(dq, parts)

    def launch_dkv(tile: Tile) -> None:
        NN = triton.cdiv(Tk, tile.BN)
        NS, part = parts_for(B * H * NN, Tq, tile.BM, q.device)
        k_parts = dk if NS == 1 else q.new_empty(B, H, NS, Tk, D, dtype=torch.float32)
        v_parts = dv if NS == 1 or not has_do else q.new_empty(B, H, NS, Tk, DV, dtype=torch.float32)
        attention_bwd_kernel_dkv[grid_of(B * H * NS * NN, q=q, k=k)](
            *inputs, k_parts, v_parts if has_do else k_parts, *numbers, H, Tq, Tk, NS, part, *strides, **constants,
            BM=tile.BM, BN=tile.BN, HAS_MASK=mask is not None, TAIL=tile.tail, **tile.options,
        )  # fmt: skip
        _add_parts(dk, k_parts)
        _add_parts(dv, v_parts)

    def launch_large(dq: Tensor) -> None:
        exact = torch.empty_like(rows.lse2, dtype=torch.float64)
        whole = {name: value for name, value in constants.items() if name != "PRECISION"}
        BN, compiled = exactly(max(BD, BV))
        whole |= {"BM": ROWS, "BN": BN, "HAS_MASK": mask is not None, **compiled}
        sizes = B * H, H, Tq, Tk
        attention_bwd_kernel_large_dq[grid_of(num_programs(B * H * triton.cdiv(Tq, ROWS), q.device), q=q)](
            *inputs, rows.has_large, rows.delta if rows.dlse is None else rows.dlse, exact, dq, *numbers, *sizes, *strides,
            HAS_DLSE=rows.dlse is not None, **whole,
        )  # fmt: skip
        attention_bwd_kernel_large_dkv[grid_of(num_programs(B * H * triton.cdiv(Tk, BN), k.device), k=k)](
            *inputs, rows.has_large, exact, dk, dv if has_do else dk, *numbers, *sizes, *strides, **whole
        )

    with on_device(q):
        if dq is not None:
            choose("attention_bwd_dq" + suffix, q, max(BD, BV), partial(launch_dq, dq), few=Tq <= 32)
        choose("attention_bwd_dkv" + suffix, q, max(BD, BV), launch_dkv)
        if rows.has_large is not None:
            assert dq is not None, "rows that are left out are made with dq"
            launch_large(dq)


class Rows(NamedTuple):
    """What the backward reads of each row, in the shape of lse and contiguous."""

    lse2: Tensor  # float32: LSE in base 2, NaN where it is infinite, +inf in rows that are left out for their large scores
    delta: Tensor  # float32
    has_large: Tensor | None  # int8, of each block of ROWS rows of a head: whether one is left out; None: others make them
    dlse: Tensor | None  # float32


def deltas(dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor) -> Rows:
    """delta of each row, and whether it is left out."""
    lse2, delta = lse.new_empty(2, *lse.shape)
    (Tq, DV), dtype = out.shape[-2:], out.dtype
    blocks = lse.numel() // Tq * triton.cdiv(Tq, ROWS)
    has_large = lse.new_empty(blocks, dtype=torch.int8)
    if dlse is not None:
        dlse = dlse.float().contiguous()
    read = 0 if dout is None else DV
    do = lse.reshape(1, 1, 1, -1) if dout is None else aligned(dout, 2)  # without dOut it is not read
    with on_device(out):
        attention_bwd_kernel_delta[grid_of(blocks, q=out)](
            out.contiguous(), do, lse.contiguous(), lse if dlse is None else dlse, delta, lse2, has_large,
            do.shape[1], Tq, *_strides(do), ALIGN=wide(dtype), DV=DV, WV=width(read, dtype), BV=padded(read), BM=ROWS,
            HAS_DO=dout is not None, HAS_DLSE=dlse is not None, **options(4),
        )  # fmt: skip
    return Rows(lse2, delta, has_large, dlse)


# ------------------------------------------------------------------------------------------------ what both passes need


def _widths(D: int, DV: int, dtype: torch.dtype) -> dict[str, int]:
    return {
        "ALIGN": wide(dtype), "D": D, "DV": DV, "W": width(D, dtype), "WV": width(DV, dtype), "BD": padded(D), "BV": padded(DV),
    }  # fmt: skip


def _strides(*xs: Tensor) -> tuple[int, ...]:
    """Of batch, head and row of each aligned tensor, in units of 16 bytes."""
    return tuple(stride // wide(x.dtype) for x in xs for stride in x.stride()[:-1])


def _mask(key_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """uint8 [B, H, Tk], last stride 1; a view where the broadcast allows it."""
    if key_mask is None:
        return None
    mask = key_mask.contiguous().view(torch.uint8).expand(k.shape[:-1])
    return mask.reshape(prod(k.shape[:-3]), k.shape[-3] if k.ndim > 2 else 1, k.shape[-2])


def _add_parts(result: Tensor, parts: Tensor) -> None:
    """Add float32 parts [B, H, NS, T, D] into result [..., T, D] in the order that torch.sum fixes for a shape."""
    if parts is not result:
        result.copy_(parts.sum(2).view(result.shape))
