"""Binary cross-entropy between graph rows and an attention map that is never stored: `bce_rows` and its backward.

Every row is cut into a dense pass, the same for every valid pair and blind to the graph, and a pass over its edges. With
L = -log(1 - a) for the softmax link and softplus(s) for the sigmoid link, and t the target of an edge,

    row_i = sum_{j valid} L_ij  +  sum_{j edge} (-t_ij log a_ij - t_ij L_ij)          (softmax)
    row_i = sum_{j valid} L_ij  -  sum_{j edge} t_ij s_ij                             (sigmoid)

The edge pass takes back what the dense pass added; their two roundings of a score differ, and dL / d log a = a / (1 - a)
multiplies the difference. Up to a = 3/4 that factor is 3, harmless. Near a = 1 it grows to 1 / eps: an edge with t = 1 that
attention has learnt well would leave noise where the truth is 0, in its gradient above all. So an edge above 3/4 is *sharp*:
the edge pass counts it in full, and the dense pass leaves out, in that row, what lies above 1/2. A row of a softmax sums to 1
at most: beside its sharp edge no entry reaches 1/4. From 1/4 over 1/2 to 3/4 is wide enough for two orders of summation to
agree on which entry is meant, so that neither pass looks a column up. (It takes the row's own LSE for that.) The sigmoid
link needs no such care: its factor, sigmoid(s), is at most 1.

With drawn negatives nothing is dense: edges count in full, and a drawn pair adds its weight times L.

The backward makes the scores again. With G = dL / ds, which is a / (1 - a) or sigmoid(s), in the place of L,

    d row_i / d s_ij = (the weights above) G_ij - t_ij ,     d row_i / d LSE_i = -sum_j d row_i / d s_ij

dq and dLSE by rows; dk by keys in the dense pass, over the transposed graph for edges, over the drawn pairs sorted by gene for
those. Passes, and parts of passes, write partial sums to places of their own, added up in a fixed order: no atomics. `rows` may
name a gene twice: dq gathers its copies. Grids and sizes follow from shapes alone, and nothing is read back to the host.

Scores inside are in base 2: x2 = log2 a, or s log2 e for the sigmoid link.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Gather, Tile, choose, choose_gather, on_device, options, parts_for
from .tensors import check_devices, check_floats, flat, padded, precision

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIGHEST = tl.constexpr(-1.1920928955078125e-07 * 1.4426950408889634)  # log2 of the largest a: rounding may lift s - LSE to 0
SHARP = tl.constexpr(log2(0.75))
LEFT_OUT = tl.constexpr(-1.0)  # log2 of 1/2
MAX_ODDS_FP16 = tl.constexpr(60000.0)  # a / (1 - a) as an operand of a dot is held within float16

# What a row is to the dense pass.
NO_EDGE = tl.constexpr(0)
PLAIN = tl.constexpr(1)
HAS_SHARP = tl.constexpr(2)

# Not specialised on their values, so that a new length compiles nothing: all that the loads need to know of leading strides is
# in ALIGN, which divides them.
SIZES = ["num_leading", "num_rows", "num_genes", "num_prefix", "num_negatives", "num_parts", "first_row", "part"]
SIZES += ["stride_ql", "stride_kl"]

# ----------------------------------------------------------------------------------------------------- one entry


@triton.jit
def _log2_entry(s2, total2, SIGMOID: tl.constexpr):
    """x2 of scores in base 2; `total2` is LSE log2 e, unread for the sigmoid link. NaN stays NaN."""
    if SIGMOID:
        x2 = s2
    else:
        x2 = s2 - total2
        x2 = tl.where(x2 > HIGHEST, HIGHEST, x2)
    return x2


@triton.jit
def _twice_atanh(z):
    """log((1 + z) / (1 - z)) for 0 <= z <= 1/3: the series to z^13 leaves 1.4e-8 of it."""
    y = z * z
    p = y * (1.0 / 13) + (1.0 / 11)
    p = p * y + (1.0 / 9)
    p = p * y + (1.0 / 7)
    p = p * y + (1.0 / 5)
    p = p * y + (1.0 / 3)
    return 2 * z * (p * y + 1)


@triton.jit
def _one_minus(x2):
    """1 - a: the series of 1 - exp(-u) below u = 1/8, where a subtraction would lose digits."""
    u = -LN2 * x2
    series = u * (1 - u * (1.0 / 2) * (1 - u * (1.0 / 3) * (1 - u * (1.0 / 4) * (1 - u * (1.0 / 5)))))
    return tl.where(u < 0.125, series, 1 - tl.exp2(x2))


@triton.jit
def _loss_term(x2, SIGMOID: tl.constexpr):
    """L: -log(1 - a), or softplus(s). log(1 - a) = -2 atanh(a / (2 - a)) keeps the digits of a small a, and
    log(1 + e) = 2 atanh(e / (2 + e))."""
    if SIGMOID:
        e = tl.exp2(-tl.abs(x2))
        loss = LN2 * tl.maximum(x2, 0.0) + _twice_atanh(e / (2 + e))
    else:
        a = tl.exp2(x2)
        loss = tl.where(a > 0.5, -tl.log(_one_minus(x2)), _twice_atanh(a / (2 - a)))
    return loss


@triton.jit
def _grad_term(x2, SIGMOID: tl.constexpr):
    """G = dL / ds (with LSE fixed): a / (1 - a), or sigmoid(s)."""
    if SIGMOID:
        e = tl.exp2(-tl.abs(x2))
        grad = tl.where(x2 >= 0, 1.0, e) / (1 + e)
    else:
        grad = tl.exp2(x2) / _one_minus(x2)
    return grad


@triton.jit
def _edge_weight(x2, t, SIGMOID: tl.constexpr, DENSE: tl.constexpr):
    """By what the edge pass multiplies L (and G); see the module's docstring."""
    if SIGMOID:
        weight = tl.zeros_like(x2) if DENSE else tl.zeros_like(x2) + 1
    else:
        weight = tl.where(x2 > SHARP, 1 - t, -t) if DENSE else 1 - t
    return weight


@triton.jit
def _gather(x_ptr, o_row, m_row, STRIDE: tl.constexpr, o_d, m_d):
    """Rows of x [*, D] as float32 [rows, BD], zeros where masked."""
    p = x_ptr + o_row.to(tl.int64)[:, None] * STRIDE + o_d[None, :]
    return tl.load(p, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)


@triton.jit
def _targets(weight_ptr, o_e, m_e, inv_mass, NORMALIZED: tl.constexpr):
    """t of edges: the weight over the row's sum, or 1."""
    t = tl.where(m_e, 1.0, 0.0)
    if NORMALIZED:
        t = tl.load(weight_ptr + o_e, mask=m_e, other=0.0).to(tl.float32) * inv_mass
    return t


# ------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=SIZES)
def bce_rows_fwd_kernel_edges(
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    weight_ptr,  # [E]
    inv_mass_ptr,  # fp32 [R]
    num_known_ptr,  # int64 [], known genes
    rows_ptr,  # int64 [R]
    negatives_ptr,  # int64 [R, num_negatives], None for every valid non-edge
    loss_ptr,  # out, fp32 [L, R]
    state_ptr,  # out, int8 [L, R]: NO_EDGE, PLAIN or HAS_SHARP
    stride_ql,
    stride_kl,
    num_rows,  # R
    first_row,  # relation * N
    num_prefix,
    num_negatives,
    scale,
    STRIDE_Q: tl.constexpr,  # between tokens
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,  # D padded
    BE: tl.constexpr,  # entries at a time
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """A program a row: its edges, and its drawn negatives."""
    i = tl.program_id(0).to(tl.int64)
    i_l, i_r = i // num_rows, i % num_rows
    k_ptr += i_l * (stride_kl // ALIGN * ALIGN) + num_prefix * STRIDE_K
    gene = tl.load(rows_ptr + i_r)
    first, last = tl.load(rowptr_ptr + first_row + gene), tl.load(rowptr_ptr + first_row + gene + 1)
    inv_mass = tl.load(inv_mass_ptr + i_r)
    total2 = 0.0
    if not SIGMOID:
        total2 = tl.load(lse_ptr + i) * LOG2E
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + gene) * STRIDE_Q + o_d
    b_q = tl.load(p_q, mask=m_d, other=0.0).to(tl.float32)
    # [BE]
    b_loss = tl.zeros([BE], tl.float32)
    b_sharp = tl.zeros([BE], tl.int32)
    for e in range(first, last, BE):
        o_e = e + tl.arange(0, BE)
        m_e = o_e < last
        # [BE, BD]
        b_k = _gather(k_ptr, tl.load(col_ptr + o_e, mask=m_e, other=0), m_e, STRIDE_K, o_d, m_d)
        # [BE]
        b_x2 = _log2_entry(scale * LOG2E * tl.sum(b_q[None, :] * b_k, 1), total2, SIGMOID)
        b_t = _targets(weight_ptr, o_e, m_e, inv_mass, NORMALIZED)
        b_l = -LN2 * b_t * b_x2
        if not (SIGMOID and DENSE):
            b_l += _edge_weight(b_x2, b_t, SIGMOID, DENSE) * _loss_term(b_x2, SIGMOID)
        b_loss += tl.where(m_e, b_l, 0.0)
        b_sharp = tl.where(m_e & (b_x2 > SHARP), 1, b_sharp)
    loss = tl.sum(b_loss, 0)
    if not DENSE:
        free = tl.load(num_known_ptr) - (last - first)
        b_loss = tl.zeros([BE], tl.float32)
        for e in range(0, num_negatives, BE):
            o_e = e + tl.arange(0, BE)
            m_e = o_e < num_negatives
            b_j = tl.load(negatives_ptr + i_r * num_negatives + o_e, mask=m_e, other=0)
            b_k = _gather(k_ptr, b_j, m_e, STRIDE_K, o_d, m_d)
            b_x2 = _log2_entry(scale * LOG2E * tl.sum(b_q[None, :] * b_k, 1), total2, SIGMOID)
            b_loss += tl.where(m_e, _loss_term(b_x2, SIGMOID), 0.0)
        loss += tl.sum(b_loss, 0) * (free.to(tl.float32) / num_negatives)
    has_edge = last > first
    tl.store(loss_ptr + i, tl.where(has_edge, loss, 0.0))
    state = PLAIN
    if not SIGMOID:
        state = tl.where(tl.sum(b_sharp, 0) > 0, HAS_SHARP, PLAIN)
    tl.store(state_ptr + i, tl.where(has_edge, state, NO_EDGE).to(tl.int8))


@triton.jit(do_not_specialize=SIZES)
def bce_rows_fwd_kernel_dense(
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    known_ptr,  # bool [N]
    rows_ptr,  # int64 [R]
    state_ptr,  # int8 [L, R]
    loss_ptr,  # out, fp32 [parts, L, R]
    stride_ql,
    stride_kl,
    num_leading,  # L
    num_rows,  # R
    num_genes,  # N
    num_prefix,
    part,  # keys a part
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,  # rows a program
    BN: tl.constexpr,  # keys at a time
    SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program a block of rows and a part of the keys: sum of L over the valid pairs."""
    i_p = tl.program_id(1)
    blocks = tl.cdiv(num_rows, BM)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    # [BM]
    o_m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_m = o_m < num_rows
    b_gene = tl.load(rows_ptr + o_m, mask=m_m, other=0)
    b_state = tl.load(state_ptr + i_l * num_rows + o_m, mask=m_m, other=NO_EDGE)
    b_total2 = tl.zeros([BM], tl.float32)
    if not SIGMOID:
        b_total2 = tl.load(lse_ptr + i_l * num_rows + o_m, mask=m_m, other=0.0) * LOG2E
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    # [BM, BD]
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + b_gene)[:, None] * STRIDE_Q + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + num_prefix * STRIDE_K
    first = i_p * part
    b_loss = tl.zeros([BM], tl.float32)
    for n in range(first, tl.minimum(first + part, num_genes), BN):
        # [BN]
        o_n = n + tl.arange(0, BN)
        m_n = o_n < num_genes
        b_known = tl.load(known_ptr + o_n, mask=m_n, other=0).to(tl.int1)
        # [BN, BD]
        b_k = tl.load(p_k + o_n.to(tl.int64)[:, None] * STRIDE_K + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        # [BM, BN]
        b_s2 = scale * LOG2E * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_x2 = _log2_entry(b_s2, b_total2[:, None], SIGMOID)
        m_x = (b_state != NO_EDGE)[:, None] & b_known[None, :]
        if not SIGMOID:
            m_x = m_x & ~((b_state == HAS_SHARP)[:, None] & (b_x2 > LEFT_OUT))
        b_loss += tl.sum(tl.where(m_x, _loss_term(b_x2, SIGMOID), 0.0), 1)
    tl.store(loss_ptr + (i_p.to(tl.int64) * num_leading + i_l) * num_rows + o_m, b_loss, mask=m_m)


# ------------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_edges_dq(
    dloss_ptr,  # fp32 [L, R]
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    weight_ptr,  # [E]
    inv_mass_ptr,  # fp32 [R]
    num_known_ptr,  # int64 []
    rows_ptr,  # int64 [R]
    negatives_ptr,  # int64 [R, num_negatives], None for every valid non-edge
    dq_ptr,  # out, fp32 [L, R, D]
    dlse_ptr,  # out, fp32 [L, R], None for the sigmoid link
    state_ptr,  # out, int8 [L, R]
    stride_ql,
    stride_kl,
    num_rows,
    first_row,
    num_prefix,
    num_negatives,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """A program a row: dq and dLSE of its edges and its drawn negatives."""
    i = tl.program_id(0).to(tl.int64)
    i_l, i_r = i // num_rows, i % num_rows
    k_ptr += i_l * (stride_kl // ALIGN * ALIGN) + num_prefix * STRIDE_K
    gene = tl.load(rows_ptr + i_r)
    first, last = tl.load(rowptr_ptr + first_row + gene), tl.load(rowptr_ptr + first_row + gene + 1)
    inv_mass = tl.load(inv_mass_ptr + i_r)
    total2 = 0.0
    if not SIGMOID:
        total2 = tl.load(lse_ptr + i) * LOG2E
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + gene) * STRIDE_Q + o_d
    b_q = tl.load(p_q, mask=m_d, other=0.0).to(tl.float32)
    # [BE], [BE, BD]: reduced once, after the loops
    b_ds = tl.zeros([BE], tl.float32)
    b_dq = tl.zeros([BE, BD], tl.float32)
    b_sharp = tl.zeros([BE], tl.int32)
    for e in range(first, last, BE):
        o_e = e + tl.arange(0, BE)
        m_e = o_e < last
        b_k = _gather(k_ptr, tl.load(col_ptr + o_e, mask=m_e, other=0), m_e, STRIDE_K, o_d, m_d)
        b_x2 = _log2_entry(scale * LOG2E * tl.sum(b_q[None, :] * b_k, 1), total2, SIGMOID)
        b_t = _targets(weight_ptr, o_e, m_e, inv_mass, NORMALIZED)
        b_g = -b_t
        if not (SIGMOID and DENSE):
            b_g += _edge_weight(b_x2, b_t, SIGMOID, DENSE) * _grad_term(b_x2, SIGMOID)
        b_g = tl.where(m_e, b_g, 0.0)
        b_ds += b_g
        b_dq += b_g[:, None] * b_k
        b_sharp = tl.where(m_e & (b_x2 > SHARP), 1, b_sharp)
    has_edge = last > first
    if not DENSE:
        free = tl.load(num_known_ptr) - (last - first)
        weight = tl.where(has_edge, free.to(tl.float32) / num_negatives, 0.0)
        for e in range(0, num_negatives, BE):
            o_e = e + tl.arange(0, BE)
            m_e = o_e < num_negatives
            b_j = tl.load(negatives_ptr + i_r * num_negatives + o_e, mask=m_e, other=0)
            b_k = _gather(k_ptr, b_j, m_e, STRIDE_K, o_d, m_d)
            b_x2 = _log2_entry(scale * LOG2E * tl.sum(b_q[None, :] * b_k, 1), total2, SIGMOID)
            b_g = tl.where(m_e, weight * _grad_term(b_x2, SIGMOID), 0.0)
            b_ds += b_g
            b_dq += b_g[:, None] * b_k
    dloss = tl.load(dloss_ptr + i)
    tl.store(dq_ptr + i * D + o_d, scale * dloss * tl.sum(b_dq, 0), mask=m_d)
    state = PLAIN
    if not SIGMOID:
        tl.store(dlse_ptr + i, -dloss * tl.sum(b_ds, 0))
        state = tl.where(tl.sum(b_sharp, 0) > 0, HAS_SHARP, PLAIN)
    tl.store(state_ptr + i, tl.where(has_edge, state, NO_EDGE).to(tl.int8))


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_dense_dq(
    dloss_ptr,  # fp32 [L, R]
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    known_ptr,  # bool [N]
    rows_ptr,  # int64 [R]
    state_ptr,  # int8 [L, R]
    dq_ptr,  # out, fp32 [parts, L, R, D]
    dlse_ptr,  # out, fp32 [parts, L, R], None for the sigmoid link
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    num_genes,
    num_prefix,
    part,  # keys a part
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program a block of rows and a part of the keys: dq and dLSE of the dense pass."""
    i_p = tl.program_id(1)
    blocks = tl.cdiv(num_rows, BM)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    # [BM]
    o_m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_m = o_m < num_rows
    b_gene = tl.load(rows_ptr + o_m, mask=m_m, other=0)
    b_state = tl.load(state_ptr + i_l * num_rows + o_m, mask=m_m, other=NO_EDGE)
    b_total2 = tl.zeros([BM], tl.float32)
    if not SIGMOID:
        b_total2 = tl.load(lse_ptr + i_l * num_rows + o_m, mask=m_m, other=0.0) * LOG2E
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    # [BM, BD]
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + b_gene)[:, None] * STRIDE_Q + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + num_prefix * STRIDE_K
    first = i_p * part
    b_ds = tl.zeros([BM], tl.float32)
    b_dq = tl.zeros([BM, BD], tl.float32)
    for n in range(first, tl.minimum(first + part, num_genes), BN):
        # [BN]
        o_n = n + tl.arange(0, BN)
        m_n = o_n < num_genes
        b_known = tl.load(known_ptr + o_n, mask=m_n, other=0).to(tl.int1)
        # [BN, BD]
        b_k = tl.load(p_k + o_n.to(tl.int64)[:, None] * STRIDE_K + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        # [BM, BN]
        b_s2 = scale * LOG2E * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_x2 = _log2_entry(b_s2, b_total2[:, None], SIGMOID)
        m_x = (b_state != NO_EDGE)[:, None] & b_known[None, :]
        if not SIGMOID:
            m_x = m_x & ~((b_state == HAS_SHARP)[:, None] & (b_x2 > LEFT_OUT))
        b_g = tl.where(m_x, _grad_term(b_x2, SIGMOID), 0.0)
        if b_k.dtype == tl.float16:
            b_g = tl.where(b_g > MAX_ODDS_FP16, MAX_ODDS_FP16, b_g)
        b_ds += tl.sum(b_g, 1)
        b_dq = tl.dot(b_g.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    # dloss is a factor of the whole row: kept out of the loop, and out of the 16-bit operand.
    b_dloss = tl.load(dloss_ptr + i_l * num_rows + o_m, mask=m_m, other=0.0)
    o_out = (i_p.to(tl.int64) * num_leading + i_l) * num_rows + o_m
    tl.store(dq_ptr + o_out[:, None] * D + o_d[None, :], (scale * b_dloss)[:, None] * b_dq, mask=m_m[:, None] & m_d[None, :])
    if not SIGMOID:
        tl.store(dlse_ptr + o_out, -b_dloss * b_ds, mask=m_m)


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_dense_dk(
    dloss_ptr,  # fp32 [L, R]
    peak_ptr,  # fp32 [], the largest |dloss|
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    known_ptr,  # bool [N]
    rows_ptr,  # int64 [R]
    state_ptr,  # int8 [L, R]
    dk_ptr,  # out, fp32 [parts, L, N, D], without the factor scale
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    num_genes,
    num_prefix,
    part,  # rows a part
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,  # rows at a time
    BN: tl.constexpr,  # keys a program
    SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program a block of keys and a part of the rows: dk of the dense pass."""
    i_p = tl.program_id(1)
    blocks = tl.cdiv(num_genes, BN)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    # dloss over its largest entry: 1 / (number of rows), of a mean, would leave little of a 16-bit operand.
    peak = tl.load(peak_ptr)
    inv_peak = tl.where(peak > 0, 1 / peak, 0.0)
    # [BN]
    o_n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    m_n = o_n < num_genes
    b_known = tl.load(known_ptr + o_n, mask=m_n, other=0).to(tl.int1)
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    # [BN, BD]
    p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + (num_prefix + o_n).to(tl.int64)[:, None] * STRIDE_K + o_d[None, :]
    b_k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0)
    b_dk = tl.zeros([BN, BD], tl.float32)
    first = i_p * part
    for m in range(first, tl.minimum(first + part, num_rows), BM):
        # [BM]
        o_m = m + tl.arange(0, BM)
        m_m = o_m < num_rows
        b_gene = tl.load(rows_ptr + o_m, mask=m_m, other=0)
        b_state = tl.load(state_ptr + i_l * num_rows + o_m, mask=m_m, other=NO_EDGE)
        b_dloss = tl.load(dloss_ptr + i_l * num_rows + o_m, mask=m_m, other=0.0) * inv_peak
        b_total2 = tl.zeros([BM], tl.float32)
        if not SIGMOID:
            b_total2 = tl.load(lse_ptr + i_l * num_rows + o_m, mask=m_m, other=0.0) * LOG2E
        # [BM, BD]
        p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + b_gene)[:, None] * STRIDE_Q + o_d[None, :]
        b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
        # [BN, BM]
        b_s2 = scale * LOG2E * tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_x2 = _log2_entry(b_s2, b_total2[None, :], SIGMOID)
        m_x = (b_state != NO_EDGE)[None, :] & b_known[:, None]
        if not SIGMOID:
            m_x = m_x & ~((b_state == HAS_SHARP)[None, :] & (b_x2 > LEFT_OUT))
        b_g = tl.where(m_x, _grad_term(b_x2, SIGMOID), 0.0)
        if b_q.dtype == tl.float16:
            b_g = tl.where(b_g > MAX_ODDS_FP16, MAX_ODDS_FP16, b_g)
        b_dk = tl.dot((b_g * b_dloss[None, :]).to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    o_out = (i_p.to(tl.int64) * num_leading + i_l) * num_genes + o_n
    tl.store(dk_ptr + o_out[:, None] * D + o_d[None, :], peak * b_dk, mask=m_n[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_edges_dk(
    dloss_ptr,  # fp32 [L, R]
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R], None for the sigmoid link
    rowptr_ptr,  # int64 [K * N + 1]
    colptr_ptr,  # int64 [K * N + 1]
    row_ptr,  # int32 [E], by columns
    weight_ptr,  # [E], by columns
    inv_mass_ptr,  # fp32 [R]
    num_known_ptr,  # int64 []
    rows_ptr,  # int64 [R]
    copy_ptr,  # int64 [R]: positions in rows, gene after gene
    copyptr_ptr,  # int64 [N + 1]: gene i is at the positions copy[copyptr[i] : copyptr[i + 1]]
    drawn_ptr,  # int64 [R * num_negatives]: positions in negatives, gene after gene; None for every valid non-edge
    drawnptr_ptr,  # int64 [N + 1]
    dense_ptr,  # fp32 [parts, L, N, D], None with drawn negatives
    dk_ptr,  # out [L, T, D]
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    num_genes,
    first_row,
    num_prefix,
    num_negatives,
    num_parts,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    SIGMOID: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """A program a token: dk of its edges over the transposed graph, of the negatives that drew it, and of the dense pass."""
    i = tl.program_id(0).to(tl.int64)
    num_tokens = num_prefix + num_genes
    i_l, gene = i // num_tokens, i % num_tokens - num_prefix
    # [BD]
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_out = tl.zeros([BD], tl.float32)
    if gene >= 0:
        q_ptr += i_l * (stride_ql // ALIGN * ALIGN) + num_prefix * STRIDE_Q
        p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN) + (num_prefix + gene) * STRIDE_K + o_d
        b_k = tl.load(p_k, mask=m_d, other=0.0).to(tl.float32)
        # [BE, BD]: reduced once, after the loops
        b_dk = tl.zeros([BE, BD], tl.float32)
        first, last = tl.load(colptr_ptr + first_row + gene), tl.load(colptr_ptr + first_row + gene + 1)
        for e in range(first, last, BE):
            # [BE]
            o_e = e + tl.arange(0, BE)
            m_e = o_e < last
            b_row = tl.load(row_ptr + o_e, mask=m_e, other=0)
            b_copy = tl.load(copyptr_ptr + b_row, mask=m_e, other=0)
            b_copies = tl.load(copyptr_ptr + b_row + 1, mask=m_e, other=0) - b_copy
            # [BE, BD]; rows that were not chosen are not read
            b_q = _gather(q_ptr, b_row, m_e & (b_copies > 0), STRIDE_Q, o_d, m_d)
            b_s2 = scale * LOG2E * tl.sum(b_k[None, :] * b_q, 1)
            b_g = tl.zeros([BE], tl.float32)
            for c in range(tl.max(b_copies, 0)):
                m_c = m_e & (c < b_copies)
                b_r = tl.load(copy_ptr + b_copy + c, mask=m_c, other=0)
                b_total2 = tl.zeros([BE], tl.float32)
                if not SIGMOID:
                    b_total2 = tl.load(lse_ptr + i_l * num_rows + b_r, mask=m_c, other=0.0) * LOG2E
                b_x2 = _log2_entry(b_s2, b_total2, SIGMOID)
                b_t = _targets(weight_ptr, o_e, m_c, tl.load(inv_mass_ptr + b_r, mask=m_c, other=0.0), NORMALIZED)
                b_c = -b_t
                if not (SIGMOID and DENSE):
                    b_c += _edge_weight(b_x2, b_t, SIGMOID, DENSE) * _grad_term(b_x2, SIGMOID)
                b_dloss = tl.load(dloss_ptr + i_l * num_rows + b_r, mask=m_c, other=0.0)
                b_g += tl.where(m_c, b_dloss * b_c, 0.0)
            b_dk += b_g[:, None] * b_q
        if not DENSE:
            num_known = tl.load(num_known_ptr)
            first, last = tl.load(drawnptr_ptr + gene), tl.load(drawnptr_ptr + gene + 1)
            for e in range(first, last, BE):
                o_e = e + tl.arange(0, BE)
                m_e = o_e < last
                b_r = tl.load(drawn_ptr + o_e, mask=m_e, other=0) // num_negatives
                b_row = tl.load(rows_ptr + b_r, mask=m_e, other=0)
                p_row = rowptr_ptr + first_row + b_row
                b_degree = tl.load(p_row + 1, mask=m_e, other=0) - tl.load(p_row, mask=m_e, other=0)
                b_weight = (num_known - b_degree).to(tl.float32) / num_negatives
                b_q = _gather(q_ptr, b_row, m_e, STRIDE_Q, o_d, m_d)
                b_total2 = tl.zeros([BE], tl.float32)
                if not SIGMOID:
                    b_total2 = tl.load(lse_ptr + i_l * num_rows + b_r, mask=m_e, other=0.0) * LOG2E
                b_x2 = _log2_entry(scale * LOG2E * tl.sum(b_k[None, :] * b_q, 1), b_total2, SIGMOID)
                b_dloss = tl.load(dloss_ptr + i_l * num_rows + b_r, mask=m_e, other=0.0)
                b_g = tl.where(m_e & (b_degree > 0), b_dloss * b_weight * _grad_term(b_x2, SIGMOID), 0.0)
                b_dk += b_g[:, None] * b_q
        b_out = tl.sum(b_dk, 0)
        if DENSE:
            for p in range(num_parts):
                b_out += tl.load(dense_ptr + ((p * num_leading + i_l) * num_genes + gene) * D + o_d, mask=m_d, other=0.0)
    tl.store(dk_ptr + i * D + o_d, scale * b_out, mask=m_d)


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_dq(
    entries_ptr,  # fp32 [L, R, D]
    dense_ptr,  # fp32 [parts, L, R, D], None with drawn negatives
    copy_ptr,  # int64 [R]
    copyptr_ptr,  # int64 [N + 1]
    dq_ptr,  # out [L, T, D]
    num_leading,
    num_rows,
    num_genes,
    num_prefix,
    num_parts,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,  # tokens a program
    DENSE: tl.constexpr,
):
    """A program a block of tokens: dq of a gene is the sum over its copies in rows, and over the parts; else 0."""
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
        m_row = m_c[:, None] & m_d[None, :]
        o_row = b_r[:, None] * D + o_d[None, :]
        b_dq += tl.load(entries_ptr + i_l * num_rows * D + o_row, mask=m_row, other=0.0)
        if DENSE:
            p_row = dense_ptr + o_row
            for p in range(num_parts):
                b_dq += tl.load(p_row + (p * num_leading + i_l) * num_rows * D, mask=m_row, other=0.0)
    p_out = dq_ptr + (i_l * num_tokens + o_t)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_dq, mask=(o_t < num_tokens)[:, None] & m_d[None, :])


# ----------------------------------------------------------------------------------------------------- launchers


@dataclass(frozen=True)
class _Problem:
    """The operator's arguments, and what the launches derive from them."""

    q: Tensor
    k: Tensor
    lse: Tensor | None
    rowptr: Tensor
    col: Tensor
    weight: Tensor
    colptr: Tensor
    row: Tensor
    weight_by_column: Tensor
    inv_mass: Tensor
    known: Tensor
    rows: Tensor
    negatives: Tensor | None
    relation: int
    num_prefix: int
    scale: float
    normalized: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, *others: Any) -> _Problem:
        """Checked, and all but q and k contiguous."""
        contiguous: list[Any] = [x.contiguous() if isinstance(x, Tensor) else x for x in others]
        p = cls(q, k, *contiguous)
        check_devices(**{name: x for name, x in vars(p).items() if isinstance(x, Tensor)})
        check_floats(q=q, k=k)
        return p

    @cached_property
    def heads(self) -> tuple[Tensor, Tensor]:
        """q, k as [L, T, D]; copied if they begin at an odd address, as a head of [H, T, D] may: rows would load in 2 bytes."""
        q, k = flat(self.q), flat(self.k)
        q, k = (x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format) for x in (q, k))
        return q, k

    @cached_property
    def num_known(self) -> Tensor:
        return self.known.sum()

    @property
    def num_leading(self) -> int:
        return self.q.shape[:-2].numel()

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def num_genes(self) -> int:
        return self.known.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_genes

    @property
    def num_negatives(self) -> int:
        return 0 if self.negatives is None else self.negatives.shape[1]

    def constants(self) -> dict[str, Any]:
        """What every kernel that reads q and k takes."""
        q, k = self.heads
        d = q.shape[-1]
        stride_ql, stride_kl = (x.stride(0) if x.shape[0] > 1 else 0 for x in (q, k))
        return {
            "num_rows": self.num_rows, "num_prefix": self.num_prefix, "stride_ql": stride_ql, "stride_kl": stride_kl,
            "scale": self.scale, "STRIDE_Q": q.stride(1), "STRIDE_K": k.stride(1), "ALIGN": gcd(stride_ql, stride_kl, 8),
            "D": d, "BD": padded(d), "SIGMOID": self.lse is None,
        }  # fmt: skip

    def by_entries(self, tile: Gather) -> dict[str, Any]:
        """... and every kernel over edges and drawn pairs."""
        return self.constants() | {
            "first_row": self.relation * self.num_genes, "num_negatives": self.num_negatives, "DENSE": self.negatives is None,
            "NORMALIZED": self.normalized, "BE": tile.rows, **tile.options,
        }  # fmt: skip

    def by_tiles(self, tile: Tile, *, by_keys: bool) -> tuple[dict[str, Any], tuple[int, int]]:
        """... and every dense kernel, and its grid, (programs, parts)."""
        lengths = (self.num_genes, tile.BN), (self.num_rows, tile.BM)
        (length, block), (across, step) = lengths if by_keys else reversed(lengths)
        programs = triton.cdiv(length, block) * self.num_leading
        parts, part = parts_for(programs, across, step, self.q.device)
        arguments = self.constants() | {
            "num_leading": self.num_leading, "num_genes": self.num_genes, "BM": tile.BM, "BN": tile.BN, "part": part,
            "PRECISION": precision(), **tile.options,
        }  # fmt: skip
        return arguments, (programs, parts)


def bce_rows(*arguments: Any) -> Tensor:
    """`cellattn::bce_rows` on a GPU: the loss, float32 [..., R].

    Raises:
        ValueError: for a dtype, head dimension or device that the kernels do not take.
    """
    p = _Problem.of(*arguments)
    lead, num_rows = p.num_leading, p.num_rows
    if lead * num_rows == 0:
        return p.q.new_zeros(*p.q.shape[:-2], num_rows, dtype=torch.float32)
    q, k = p.heads
    loss = torch.empty(lead, num_rows, dtype=torch.float32, device=q.device)
    state = torch.empty(lead, num_rows, dtype=torch.int8, device=q.device)
    # [parts, L, R]: what each part of the dense pass adds
    dense = loss.new_zeros(0, lead, num_rows)

    def launch_edges(tile: Gather) -> None:
        bce_rows_fwd_kernel_edges[(lead * num_rows,)](
            q, k, p.lse, p.rowptr, p.col, p.weight, p.inv_mass, p.num_known, p.rows, p.negatives, loss, state,
            **p.by_entries(tile),
        )  # fmt: skip

    def launch_dense(tile: Tile) -> None:
        nonlocal dense
        constants, grid = p.by_tiles(tile, by_keys=False)
        dense = torch.empty(grid[1], lead, num_rows, dtype=torch.float32, device=q.device)
        bce_rows_fwd_kernel_dense[grid](q, k, p.lse, p.known, p.rows, state, dense, **constants)

    with on_device(q):
        choose_gather("bce_edges_fwd", q, padded(q.shape[-1]), launch_edges)
        if p.negatives is None:
            choose("bce_dense_fwd", q, padded(q.shape[-1]), launch_dense)
    return (loss + dense.sum(0)).view(*p.q.shape[:-2], num_rows)


def bce_rows_backward(dloss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`cellattn::bce_rows_backward` on a GPU: dq, dk [..., T, D] and dlse float32 [..., R], empty for the sigmoid link.

    Raises:
        ValueError: for a dtype, head dimension or device that the kernels do not take.
    """
    p = _Problem.of(*arguments)
    check_devices(q=p.q, dloss=dloss)
    lead, num_rows = p.num_leading, p.num_rows
    if lead * num_rows == 0:
        return p.q.new_zeros(p.q.shape), p.k.new_zeros(p.k.shape), dloss.new_zeros(0 if p.lse is None else dloss.shape)
    q, k = p.heads
    d = q.shape[-1]
    g = dloss.reshape(lead, num_rows).contiguous()
    # What entries add, then what each part of the dense pass adds.
    dq_edges = torch.empty(lead, num_rows, d, dtype=torch.float32, device=q.device)
    dlse_edges = None if p.lse is None else torch.empty(lead, num_rows, dtype=torch.float32, device=q.device)
    dq_dense = dlse_dense = dk_dense = drawn = drawnptr = None
    state = torch.empty(lead, num_rows, dtype=torch.int8, device=q.device)
    copy, copyptr = _by_gene(p.rows, p.num_genes)
    dq = torch.empty(p.q.shape, dtype=p.q.dtype, device=q.device)
    dk = torch.empty(p.k.shape, dtype=p.k.dtype, device=q.device)

    def launch_edges_dq(tile: Gather) -> None:
        bce_rows_bwd_kernel_edges_dq[(lead * num_rows,)](
            g, q, k, p.lse, p.rowptr, p.col, p.weight, p.inv_mass, p.num_known, p.rows, p.negatives, dq_edges, dlse_edges,
            state, **p.by_entries(tile),
        )  # fmt: skip

    def launch_dense_dq(tile: Tile) -> None:
        nonlocal dq_dense, dlse_dense
        constants, grid = p.by_tiles(tile, by_keys=False)
        dq_dense = torch.empty(grid[1], lead, num_rows, d, dtype=torch.float32, device=q.device)
        if p.lse is not None:
            dlse_dense = torch.empty(grid[1], lead, num_rows, dtype=torch.float32, device=q.device)
        bce_rows_bwd_kernel_dense_dq[grid](g, q, k, p.lse, p.known, p.rows, state, dq_dense, dlse_dense, **constants)

    def launch_dense_dk(tile: Tile) -> None:
        nonlocal dk_dense
        constants, grid = p.by_tiles(tile, by_keys=True)
        dk_dense = torch.empty(grid[1], lead, p.num_genes, d, dtype=torch.float32, device=q.device)
        bce_rows_bwd_kernel_dense_dk[grid](g, peak, q, k, p.lse, p.known, p.rows, state, dk_dense, **constants)

    def launch_edges_dk(tile: Gather) -> None:
        bce_rows_bwd_kernel_edges_dk[(lead * p.num_tokens,)](
            g, q, k, p.lse, p.rowptr, p.colptr, p.row, p.weight_by_column, p.inv_mass, p.num_known, p.rows, copy, copyptr,
            drawn, drawnptr, dk_dense, dk, num_leading=lead, num_genes=p.num_genes,
            num_parts=0 if dk_dense is None else dk_dense.shape[0], **p.by_entries(tile),
        )  # fmt: skip

    BD = padded(d)
    tokens = min(16, max(4, 512 // BD))  # Triton 3.6 and 3.7 do not compile the gather below for 32 tokens and more
    with on_device(q):
        choose_gather("bce_edges_bwd_dq", q, BD, launch_edges_dq)
        if p.negatives is None:
            peak = g.abs().amax()
            choose("bce_dense_bwd_dq", q, BD, launch_dense_dq)
            choose("bce_dense_bwd_dk", q, BD, launch_dense_dk)
        else:
            drawn, drawnptr = _by_gene(p.negatives.flatten(), p.num_genes)
        choose_gather("bce_edges_bwd_dk", q, BD, launch_edges_dk)
        bce_rows_bwd_kernel_dq[(triton.cdiv(p.num_tokens, tokens) * lead,)](
            dq_edges, dq_dense, copy, copyptr, dq, lead, num_rows, p.num_genes, p.num_prefix,
            0 if dq_dense is None else dq_dense.shape[0], D=d, BD=BD, BT=tokens, DENSE=p.negatives is None,
            **options(4, registers=128),
        )  # fmt: skip
    if dlse_edges is None:
        return dq, dk, g.new_empty(0)
    dlse = dlse_edges if dlse_dense is None else dlse_edges + dlse_dense.sum(0)
    return dq, dk, dlse.view(dloss.shape)


def _by_gene(index: Tensor, num_genes: int) -> tuple[Tensor, Tensor]:
    """(positions of index in a stable order by gene, where each of the N genes' positions begin [N + 1]), without a sync."""
    sorted_index, position = torch.sort(index, stable=True)
    return position, torch.searchsorted(sorted_index, torch.arange(num_genes + 1, device=index.device))
