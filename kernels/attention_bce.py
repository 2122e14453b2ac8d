"""Binary cross-entropy between graph rows and an attention map that is never stored: `bce_rows` and its backward.

With L = -log(1 - a) for the softmax link and softplus(s) for the sigmoid link, and t the target of an edge, every row is cut
into a dense pass, the same for every pair that it takes, and a pass over its edges:

    row_i = sum_{j valid} L_ij  +  sum_{j edge} (-t_ij log a_ij - t_ij L_ij)          (softmax)
    row_i = sum_{j valid, no edge} L_ij  +  sum_{j edge} (L_ij - t_ij s_ij)           (sigmoid)

The softmax link's edge pass takes back what the dense pass added. Their two roundings of a score differ, and dL / d log a =
a / (1 - a) multiplies the difference; as long as a stays below SHARP, where that factor is 2, this is harmless. The *sharp*
entry of a row, of which it has one at most, is left out by both, and counted by itself (see ops/attention_bce.py): with rest
the log-sum-exp of all other tokens, and p and n its weights of -log a and -log(1 - a),

    p softplus(rest - s) + n softplus(s - rest) ,     pull = n sigmoid(s - rest) - p sigmoid(rest - s)

so that no rounding of LSE comes into it. Which token is sharp is decided once, by the dense pass (with drawn negatives: by the
pass over the entries); rest and pull are made once; forward and backward read them, and know the entry by its index. Scores
that are made again, rounded in another order, thus never decide anything.

The sigmoid link has no sharp entries. Of a certain pair it leaves e^-s, and nothing may be taken back: its dense pass knows the
edges, a bit a pair, and passes over them. A tile reads a word or two for each of its rows. Each call makes the bits, once for
all leading dimensions: of all rows 5.5 MB at 6,607 genes, 1.25 GB at 100,000.

With drawn negatives nothing is dense: edges count in full, and a drawn pair adds its weight times L. Blocks of rows with a
sharp entry, and they alone, then walk over all tokens for rest, and in the backward for its gradient.

The backward makes the scores again. With G = dL / ds, which is a / (1 - a) or sigmoid(s), in the place of L,

    d row_i / d s_ij = (the weights above) G_ij - t_ij ,     d row_i / d LSE_i = -sum_j d row_i / d s_ij

for all but the sharp entry, which gives pull_i to its own score and -pull_i exp(s_ik - rest_i) to that of every other token k.

Its dense passes are products on the matrix unit, in which a factor of 0 does not hide NaN. So they read copies of q and k, made
once, with zeros in the place of what is in no pair of the loss and not finite: a gene that the relation does not know, a prefix
token, the row of a gene without an edge. A row that has one of these among the tokens of its sharp entry is NaN by its rest.

dq and dLSE by rows; dk by keys in the dense pass, over the transposed graph for edges, over the drawn pairs sorted by gene for
those. Passes, and parts of passes, write partial sums to places of their own, added up in a fixed order: no atomics. `rows` may
name a gene twice: dq gathers its copies. Grids follow from shapes and the graph's number of segments; nothing is read back.

Edges are walked as in row_dot.py: one warp a row (in dk a column), which returns where there is none, and before that segments
of the long ones, each in a program of its own. A segment leaves what the row adds: losses, the weights of the sharp entry if it
is among the edges, sums of G and of G k (G q). A gene that `rows` names twice has two LSEs: its segments are those of the row
where it is named first, and its copies walk.

Scores inside are in base 2: x2 = log2 a, or s log2 e for the sigmoid link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellattn._aligned import wide, width

from .config import Gather, Tile, choose, choose_gather, on_device, options, parts_for
from .segments import Segments, add_segments, span_of_segment
from .sums import sum_of_products
from .tensors import aligned, check_devices, check_floats, grid_of, lead_strides, padded, precision

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# log2 of the least a of a sharp entry: far enough above 1/2 that no two of a row are, however scores and LSE are rounded.
SHARP = tl.constexpr(log2(2 / 3))
IGNORED, OTHER, KNOWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # kinds of tokens in the dense backward

# Not specialised on their values, so that a new length compiles nothing: all that the loads need to know of leading strides is
# in ALIGN, which divides them.
SIZES = ["num_leading", "num_rows", "num_genes", "num_prefix", "num_parts", "first_row", "part"]
SIZES += ["first_segment", "num_segments", "stride_ql", "stride_kl"]

# ----------------------------------------------------------------------------------------------------- one entry


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
def _softplus(x2):
    """log(1 + 2^x2): with e = 2^-|x2|, log(1 + e) = 2 atanh(e / (2 + e))."""
    e = tl.exp2(-tl.abs(x2))
    return LN2 * tl.maximum(x2, 0.0) + _twice_atanh(e / (2 + e))


@triton.jit
def _sigmoid(x2):
    e = tl.exp2(-tl.abs(x2))
    return tl.where(x2 >= 0, 1.0, e) / (1 + e)


@triton.jit
def _not_sharp(x2):
    """a of an entry that is not the sharp one: at most 2/3, however a score of any size was rounded when it was made again."""
    return tl.exp2(tl.minimum(x2, SHARP, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _loss_term(x2, SIGMOID: tl.constexpr):
    """L: softplus(s), or -log(1 - a). log(1 - a) = -2 atanh(a / (2 - a)) keeps the digits of a small a."""
    if SIGMOID:
        loss = _softplus(x2)
    else:
        a = _not_sharp(x2)
        loss = tl.where(a > 0.5, -tl.log(1 - a), _twice_atanh(a / (2 - a)))
    return loss


@triton.jit
def _grad_term(x2, SIGMOID: tl.constexpr):
    """G = dL / ds (with LSE fixed): sigmoid(s), or a / (1 - a)."""
    if SIGMOID:
        grad = _sigmoid(x2)
    else:
        a = _not_sharp(x2)
        grad = a / (1 - a)
    return grad


@triton.jit
def _share(s2, token, sharp, rest2, pull):
    """What the sharp entry of a row gives to the score of each token: pull to its own, a share of -pull to the others."""
    share = tl.exp2(tl.minimum(s2 - rest2, 0.0))
    return tl.where(sharp >= 0, pull * tl.where(token == sharp, 1.0, -share), 0.0)


@triton.jit
def _in_base_2(lse):
    """NaN where it is not finite, as the losses of the row are."""
    return tl.where(tl.abs(lse) < float("inf"), lse * LOG2E, float("nan"))


@triton.jit
def _gather(x_ptr, o_row, m_row, STRIDE: tl.constexpr, o_d, m_d):
    """Rows of x [*, D] as float32 [rows, BD], zeros where masked."""
    p = x_ptr + o_row.to(tl.int64)[:, None] * STRIDE + o_d[None, :]
    return tl.load(p, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)


@triton.jit
def _targets(weight_ptr, o_e, m_e, inv_mass, degree, NORMALIZED: tl.constexpr):
    """t of edges: the weight over the row's sum, 1 to the last bit for a row's only edge; or 1."""
    t = tl.where(m_e, 1.0, 0.0)
    if NORMALIZED:
        weight = tl.load(weight_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)
        t = tl.where(degree == 1, t, weight * inv_mass)
    return t


@triton.jit
def _edge_loss(x2, t, SIGMOID: tl.constexpr, DENSE: tl.constexpr):
    """Of an edge's entry, less the L that the softmax link's dense pass has added. The sigmoid link's knows the edges."""
    # an edge of target 1 loses nothing by an infinite score
    loss = t * _softplus(-x2) + tl.where(t == 1, 0.0, (1 - t) * _softplus(x2)) if SIGMOID else -LN2 * t * x2
    if not SIGMOID:
        weight = -t if DENSE else 1 - t
        loss += weight * _loss_term(x2, SIGMOID)
    return loss


@triton.jit
def _edge_grad(x2, t, SIGMOID: tl.constexpr, DENSE: tl.constexpr):
    """Its derivative in the score, with LSE fixed."""
    grad = (1 - t) * _sigmoid(x2) - t * _sigmoid(-x2) if SIGMOID else -t
    if not SIGMOID:
        weight = -t if DENSE else 1 - t
        grad += weight * _grad_term(x2, SIGMOID)
    return grad


@triton.jit
def _is_edge(edges_ptr, o_r, m_r, first, num_words, COUNT: tl.constexpr, ACROSS: tl.constexpr):
    """Whether the rows o_r [BM] have edges to the COUNT entries of the map from `first` on, a multiple of COUNT.

    [BM, COUNT], or with ACROSS [COUNT, BM].
    """
    tl.static_assert(COUNT == 16 or COUNT == 32 or COUNT == 64)
    # [COUNT], [BM]
    o_bit = first % 32 + tl.arange(0, COUNT)
    p_word = edges_ptr + o_r.to(tl.int64) * num_words + first // 32
    b_word = tl.load(p_word, mask=m_r, other=0)
    if COUNT == 64:
        b_upper = tl.load(p_word + 1, mask=m_r, other=0)
    if ACROSS:
        b_words = b_word[None, :]
        if COUNT == 64:
            b_words = tl.where((o_bit < 32)[:, None], b_words, b_upper[None, :])
        b_bits = b_words >> (o_bit % 32)[:, None]
    else:
        b_words = b_word[:, None]
        if COUNT == 64:
            b_words = tl.where((o_bit < 32)[None, :], b_words, b_upper[:, None])
        b_bits = b_words >> (o_bit % 32)[None, :]
    return b_bits & 1 != 0


# ------------------------------------------------------------------------------------------------------- forward


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
            m_x = m_x & ~_is_edge(edges_ptr, o_m, m_m, n, num_words, BN, ACROSS=False)
        b_loss += tl.sum(tl.where(m_x, _loss_term(b_x2, SIGMOID), 0.0), 1)
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
        b_t = _targets(weight_ptr, o_e, m_e, inv_mass, degree, NORMALIZED)
        # [BE, BD]
        b_k = _gather(k_ptr, b_token, m_e, STRIDE_K, o_d, o_d < W)
        # [BE]
        b_x2 = scale2 * sum_of_products(b_q[None, :], b_k, m_e[:, None], 1) - total2
        b_l = _edge_loss(b_x2, b_t, SIGMOID, DENSE)
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


@triton.jit
def _segments_of_row(segptr_ptr, slot_ptr, stacked, gene, i_r, first_segment):
    """(first, last) of the segments whose sums the row i_r adds, among those of the relation: none if it walks its edges."""
    first = tl.load(segptr_ptr + stacked) - first_segment
    last = tl.load(segptr_ptr + stacked + 1) - first_segment
    if slot_ptr is not None:
        last = tl.where(tl.load(slot_ptr + gene) == i_r, last, first)
    return first, last


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
        first, last = _segments_of_row(segptr_ptr, slot_ptr, stacked, gene, i_r, first_segment)
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
            b_k = _gather(k_ptr, b_token, m_e, STRIDE_K, o_d, m_d)
            b_x2 = scale * LOG2E * sum_of_products(b_q[None, :], b_k, m_e[:, None], 1) - total2
            if not SIGMOID:
                m_sharp = m_e & (b_x2 > SHARP)
                b_sharp = tl.where(m_sharp, b_token, b_sharp)
                b_negative += tl.where(m_sharp, weight, 0.0)
                m_e = m_e & ~m_sharp
            b_loss += tl.where(m_e, weight * _loss_term(b_x2, SIGMOID), 0.0)
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
    b_loss += b_positive * _softplus(-b_gap2) + b_negative * _softplus(b_gap2)
    b_pull = b_negative * _sigmoid(b_gap2) - b_positive * _sigmoid(-b_gap2)
    b_pull = tl.where(tl.abs(b_rest2) < float("inf"), b_pull, float("nan"))
    tl.store(loss_ptr + o, b_loss, mask=m_sharp)
    tl.store(rest_ptr + o, tl.where(m_sharp, LN2 * b_rest2, 0.0), mask=m_o)
    tl.store(pull_ptr + o, tl.where(m_sharp, b_pull, 0.0), mask=m_o)


# ------------------------------------------------------------------------------------------------------ backward


@triton.jit
def _has_wild(b_x):
    """Whether a row [rows, BD] holds NaN or an infinity [rows]."""
    return tl.max(tl.where(tl.abs(b_x.to(tl.float32)) < float("inf"), 0, 1), 1) > 0


@triton.jit(do_not_specialize=SIZES)
def bce_rows_bwd_kernel_operands(
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
            b_total2 = tl.load(lse_ptr + o_r, mask=m_m, other=0.0) * LOG2E
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
                m_x = m_x & ~_is_edge(edges_ptr, o_m, m_m, n, num_words, BN, ACROSS=False)
            b_g = tl.where(m_x, _grad_term(b_s2 - b_total2[:, None], SIGMOID), 0.0)
            b_ds += tl.sum(b_g, 1)
        if not SIGMOID:  # noqa: SIM102 (known when compiled)
            # With drawn negatives there is a loop for sharp entries alone. An `if` would then start the product's operand at
            # zero, in a register that sm_90's product of the round before still reads.
            if not DENSE or any_sharp:
                b_g += _share(b_s2, o_n[None, :], b_sharp[:, None], b_rest2[:, None], b_pull[:, None])
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
        b_t = _targets(weight_ptr, o_e, m_e, inv_mass, degree, NORMALIZED)
        # [BE, BD]
        b_k = _gather(k_ptr, b_token, m_e, STRIDE_K, o_d, o_d < W)
        # [BE]
        b_x2 = scale2 * sum_of_products(b_q[None, :], b_k, m_e[:, None], 1) - total2
        b_g = tl.where(m_e & (b_token != sharp), _edge_grad(b_x2, b_t, SIGMOID, DENSE), 0.0)
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
        first, last = _segments_of_row(segptr_ptr, slot_ptr, stacked, gene, i_r, first_segment)
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
            b_k = _gather(k_ptr, b_token, m_e, STRIDE_K, o_d, m_d)
            b_x2 = scale * LOG2E * sum_of_products(b_q[None, :], b_k, m_e[:, None], 1) - total2
            b_g = tl.where(m_e & (b_token != sharp), weight * _grad_term(b_x2, SIGMOID), 0.0)
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
                    m_x = m_x & ~_is_edge(edges_ptr, o_m, m_m, tl.program_id(0) % blocks * BN, num_words, BN, ACROSS=True)
                b_g = tl.where(m_x, _grad_term(b_s2 - b_total2[None, :], SIGMOID) * b_dloss[None, :], 0.0)
            if not SIGMOID:  # noqa: SIM102 (known when compiled)
                if any_sharp:
                    b_rest2 = tl.load(rest_ptr + o_r, mask=m_m, other=0.0) * LOG2E
                    b_pull = tl.load(pull_ptr + o_r, mask=m_m, other=0.0) * b_dloss
                    b_g += _share(b_s2, o_n[:, None], b_sharp[None, :], b_rest2[None, :], b_pull[None, :])
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
        b_g = tl.where(m_r, b_dloss * _edge_grad(b_x2, b_t, SIGMOID, DENSE), 0.0)
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
        b_t = _targets(weight_ptr, o_e, m_e, b_inv_mass, b_degree, NORMALIZED)
        # [BE, BD]; rows that were not chosen are not read
        b_q = _gather(q_ptr, b_row, b_copies > 0, STRIDE_Q, o_d, o_d < W)
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
            b_g = tl.where(b_copies > 0, b_g * _edge_grad(b_s2, b_t, SIGMOID, DENSE), 0.0)
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
                b_q = _gather(q_ptr, b_row, m_e, STRIDE_Q, o_d, m_d)
                b_x2 = scale * LOG2E * sum_of_products(b_k[None, :], b_q, m_e[:, None], 1)
                if not SIGMOID:
                    b_x2 -= tl.load(lse_ptr + o_r, mask=m_e, other=0.0) * LOG2E
                    m_e = m_e & (tl.load(sharp_ptr + o_r, mask=m_e, other=-1) != token)
                b_dloss = tl.load(dloss_ptr + o_r, mask=m_e, other=0.0)
                b_g = tl.where(m_e, b_dloss * b_weight * _grad_term(b_x2, SIGMOID), 0.0)
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
    row_segptr: Tensor
    segment_row: Tensor
    row_segments: Sequence[int]
    col_segptr: Tensor
    segment_col: Tensor
    col_segments: Sequence[int]
    inv_mass: Tensor
    known: Tensor
    rows: Tensor | None
    negatives: Tensor | None
    negrow: Tensor | None
    negptr: Tensor | None
    negative_weight: Tensor | None
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
        """q, k as [L, T, D]."""
        return aligned(self.q, 1), aligned(self.k, 1)

    @property
    def dense(self) -> bool:
        return self.negatives is None

    @property
    def num_leading(self) -> int:
        return self.q.shape[:-2].numel()

    @property
    def num_rows(self) -> int:
        return self.num_genes if self.rows is None else self.rows.shape[0]

    @property
    def num_genes(self) -> int:
        return self.known.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_genes

    @property
    def nothing(self) -> bool:
        """No row; or one token, whose entry is 1, and so is its target if it is an edge."""
        return self.num_leading * self.num_rows == 0 or (self.lse is not None and self.num_tokens == 1)

    @property
    def graph(self) -> tuple[Tensor, ...]:
        """What the passes over edges by rows take of the graph."""
        return self.rowptr, self.col, self.weight, self.inv_mass, self.row_segptr

    @property
    def chosen(self) -> tuple[Tensor | None, ...]:
        """What the passes over rows take of the choice of pairs."""
        return self.rows, self.negatives, self.negptr, self.negative_weight

    @cached_property
    def by_row(self) -> Segments:
        return Segments.of_ties([self.relation], self.row_segments)

    @cached_property
    def by_column(self) -> Segments:
        return Segments.of_ties([self.relation], self.col_segments)

    @cached_property
    def slot(self) -> Tensor | None:
        """int64 [N]: where in rows each gene stands first, R if nowhere: there its segments are added, its copies walk."""
        if self.rows is None or self.by_row.total == 0:
            return None
        slot = torch.full((self.num_genes,), self.num_rows, dtype=torch.int64, device=self.q.device)
        return slot.scatter_reduce_(0, self.rows, torch.arange(self.num_rows, device=self.q.device), "amin")

    def constants(self) -> dict[str, Any]:
        """What every kernel that reads q and k takes."""
        q, k = self.heads
        (stride_ql,), (stride_kl,) = lead_strides(q), lead_strides(k)
        d = q.shape[-1]
        return {
            "num_leading": self.num_leading, "num_rows": self.num_rows, "num_prefix": self.num_prefix, "stride_ql": stride_ql,
            "stride_kl": stride_kl, "scale": self.scale, "STRIDE_Q": q.stride(1), "STRIDE_K": k.stride(1),
            "ALIGN": wide(q.dtype), "W": width(d, q.dtype), "BD": padded(d),
        }  # fmt: skip

    def by_entries(self, tile: Gather, cut: Segments) -> dict[str, Any]:
        """... and every kernel over edges and drawn pairs, and over segments of edges."""
        return self.constants() | {
            "first_row": self.relation * self.num_genes, "first_segment": cut.first[0], "num_segments": cut.total,
            "SIGMOID": self.lse is None, "DENSE": self.dense, "NORMALIZED": self.normalized, "BE": tile.rows, **tile.options,
        }  # fmt: skip

    def by_tiles(self, tile: Tile, across: int) -> tuple[dict[str, Any], tuple[int, int]]:
        """... and every forward kernel over rows and keys (`across` of them), and its grid, (programs, parts)."""
        tiles, grid = self._tiles(tile, across)
        return self.constants() | {"num_genes": self.num_genes, **tiles}, grid

    def by_operands(self, tile: Tile, *, by_keys: bool = False) -> tuple[dict[str, Any], tuple[int, int]]:
        """What the dense backward takes beside `operands`, and its grid."""
        tiles, grid = self._tiles(tile, self.num_tokens, by_keys=by_keys)
        sizes = {name: getattr(self, name) for name in ("num_leading", "num_rows", "num_genes", "num_prefix")}
        d = self.q.shape[-1]
        return {**sizes, "scale": self.scale, "W": width(d, self.q.dtype), "BD": padded(d), **tiles}, grid

    def _tiles(self, tile: Tile, across: int, *, by_keys: bool = False) -> tuple[dict[str, Any], tuple[int, int]]:
        lengths = (across, tile.BN), (self.num_rows, tile.BM)
        (length, block), (other, step) = lengths if by_keys else reversed(lengths)
        programs = triton.cdiv(length, block) * self.num_leading
        parts, part = parts_for(programs, other, step, self.q.device)
        return {"BM": tile.BM, "BN": tile.BN, "part": part, "PRECISION": precision(), **tile.options}, (programs, parts)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(queries [L, R, W], LSE in base 2 [L, R], keys [L, T, W], kinds of tokens [L, T]) for the dense backward."""
        q, k = self.heads
        constants = self.constants()
        lead, w, block = self.num_leading, constants["W"], min(64, max(8, 2048 // constants["BD"]))
        queries = torch.empty(lead, self.num_rows, w, dtype=q.dtype, device=q.device)
        total2 = torch.empty(lead, self.num_rows, dtype=torch.float32, device=q.device)
        keys = torch.empty(lead, self.num_tokens, w, dtype=k.dtype, device=k.device)
        kind = torch.empty(lead, self.num_tokens, dtype=torch.int8, device=k.device)
        del constants["num_leading"], constants["scale"]
        programs = lead * (triton.cdiv(self.num_rows, block) + triton.cdiv(self.num_tokens, block))
        with on_device(q):
            bce_rows_bwd_kernel_operands[grid_of(programs, q=self.q)](
                q, k, self.lse, self.inv_mass, self.known, self.rows, queries, total2, keys, kind, **constants,
                num_genes=self.num_genes, first_row=self.relation * self.num_genes, BT=block, DENSE=self.dense, **options(4),
            )  # fmt: skip
        return queries, total2, keys, kind

    def edges(self, shift: int) -> Tensor:
        """int32 [R, words]: bit j of a row is whether it has an edge to gene j - shift."""
        words, block = 2 * triton.cdiv(shift + self.num_genes, 64), 256  # a tile of 64 keys reads two
        bits = torch.empty(self.num_rows, words, dtype=torch.int32, device=self.q.device)
        with on_device(self.q):
            bce_rows_fwd_kernel_bits[grid_of(self.num_rows * triton.cdiv(words, block), q=self.q)](
                self.rowptr, self.col, self.rows, bits, self.num_rows, self.relation * self.num_genes, shift, words,
                self.num_genes.bit_length(), BLOCK=block, **options(4),
            )  # fmt: skip
        return bits


def bce_rows(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cellattn::bce_rows` on a GPU: (loss, sharp, rest, pull), [..., R].

    Raises:
        ValueError: for a dtype, head dimension or device that the kernels do not take.
    """
    p = _Problem.of(*arguments)
    lead, num_rows = p.num_leading, p.num_rows
    q, k = p.q, p.k
    shape = (*q.shape[:-2], num_rows)
    kept = shape if p.lse is not None else (0,)
    if p.nothing:
        loss, rest, pull = (q.new_zeros(x, dtype=torch.float32) for x in (shape, kept, kept))
        return loss, q.new_full(kept, -1, dtype=torch.int32), rest, pull
    q, k = p.heads
    BD = padded(q.shape[-1])

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*sizes, dtype=dtype, device=q.device)

    softmax = p.lse is not None
    loss = empty(*shape)
    sharp, rest, pull = empty(*kept, dtype=torch.int32), empty(*kept), empty(*kept)
    entry = empty(3, lead, num_rows) if softmax else None
    dense_loss = dense_sharp = partial = of_segments = sharp_of_segments = None
    num_parts, cut = 0, p.by_row
    if cut.total > 0:
        of_segments = empty(3, lead, cut.total)
        sharp_of_segments = empty(lead, cut.total, dtype=torch.int32) if softmax and not p.dense else None

    edges = p.edges(0) if p.dense and not softmax else None

    def launch_dense(tile: Tile) -> None:
        nonlocal dense_loss, dense_sharp, num_parts
        constants, grid = p.by_tiles(tile, p.num_genes)
        num_parts = grid[1]
        dense_loss = empty(num_parts, lead, num_rows)
        dense_sharp = empty(num_parts, lead, num_rows, dtype=torch.int32) if softmax else None
        bce_rows_fwd_kernel_dense[grid](
            q, k, p.lse, p.inv_mass, p.known, p.rows, edges, dense_loss, dense_sharp, first_row=p.relation * p.num_genes,
            num_words=0 if edges is None else edges.shape[1], SIGMOID=not softmax, **constants,
        )  # fmt: skip

    def launch_segments(tile: Gather) -> None:
        bce_rows_fwd_kernel_segments[grid_of(lead * cut.total, q=p.q)](
            q, k, p.lse, *p.graph, p.segment_row, p.slot, dense_sharp, of_segments, sharp_of_segments, num_parts=num_parts,
            **p.by_entries(tile, cut),
        )  # fmt: skip

    def launch_edges(tile: Gather) -> None:
        bce_rows_fwd_kernel_edges[grid_of(lead * num_rows, q=p.q)](
            q, k, p.lse, *p.graph, p.slot, of_segments, sharp_of_segments, *p.chosen, dense_loss, dense_sharp, loss,
            sharp if softmax else None, entry, num_parts=num_parts, HAS_SEGMENTS=cut.total > 0, **p.by_entries(tile, cut),
        )  # fmt: skip

    def launch_rest(tile: Tile) -> None:
        nonlocal partial
        constants, grid = p.by_tiles(tile, p.num_tokens)
        partial = empty(grid[1], 2, lead, num_rows)
        bce_rows_fwd_kernel_rest[grid](q, k, p.rows, sharp, partial, **constants)

    with on_device(q):
        if p.dense:
            choose("bce_dense_fwd" if softmax else "bce_dense_fwd_sigmoid", q, BD, launch_dense)
        if cut.total > 0:
            choose_gather("bce_edges_fwd_segments", q, BD, launch_segments)
        choose_gather("bce_edges_fwd", q, BD, launch_edges)
        if softmax:
            choose("bce_dense_fwd_rest", q, BD, launch_rest)
            assert partial is not None
            block = 128
            bce_rows_fwd_kernel_sharp[(triton.cdiv(lead * num_rows, block),)](
                partial, sharp, entry, loss, rest, pull, lead, num_rows, partial.shape[0], BLOCK=block, **options(4)
            )
    return loss, sharp, rest, pull


def bce_rows_backward(
    dloss: Tensor, sharp: Tensor, rest: Tensor, pull: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`cellattn::bce_rows_backward` on a GPU: dq, dk [..., T, D] and dlse float32 [..., R], empty for the sigmoid link.

    Raises:
        ValueError: for a dtype, head dimension or device that the kernels do not take.
    """
    p = _Problem.of(*arguments)
    check_devices(q=p.q, dloss=dloss, sharp=sharp, rest=rest, pull=pull)
    lead, num_rows, softmax = p.num_leading, p.num_rows, p.lse is not None
    if p.nothing:
        return p.q.new_zeros(p.q.shape), p.k.new_zeros(p.k.shape), dloss.new_zeros(dloss.shape if softmax else 0)
    q, k = p.heads
    d = q.shape[-1]
    BD = padded(d)
    g = dloss.contiguous()
    known_sharp = tuple(x.contiguous() if softmax else None for x in (sharp, rest, pull))
    dlse = torch.empty(dloss.shape if softmax else 0, dtype=torch.float32, device=q.device)
    dq = torch.empty(p.q.shape, dtype=p.q.dtype, device=q.device)
    dk = torch.empty(p.k.shape, dtype=p.k.dtype, device=q.device)
    rows_dq = dq
    copies: tuple[Tensor | None, ...] = (None, None)
    drawn: tuple[Tensor | None, ...] = (None, None, None)
    by_row, by_column = p.by_row, p.by_column
    part_dq, part_dk, part_ds = by_row.partial_sums(q), by_column.partial_sums(k), None
    if by_row.total > 0 and softmax:
        part_ds = torch.empty(lead, by_row.total, dtype=torch.float32, device=q.device)
    if p.rows is not None:
        rows_dq = torch.empty(lead, num_rows, d, dtype=torch.float32, device=q.device)
        copies = _by_gene(p.rows, p.num_genes)
    # What each part of the passes over all tokens adds: the dense pass, and sharp entries.
    over_tokens = p.dense or softmax
    dense_dq = dense_dlse = dense_dk = peak = None
    edges = p.edges(p.num_prefix) if p.dense and not softmax else None
    num_words = 0 if edges is None else edges.shape[1]
    operands = (*p.operands(), edges) if over_tokens else ()

    def launch_dense_dq(tile: Tile) -> None:
        nonlocal dense_dq, dense_dlse
        constants, grid = p.by_operands(tile)
        dense_dq = torch.empty(grid[1], lead, num_rows, d, dtype=torch.float32, device=q.device)
        if softmax and p.dense:
            dense_dlse = torch.empty(grid[1], lead, num_rows, dtype=torch.float32, device=q.device)
        bce_rows_bwd_kernel_dense_dq[grid](
            g, *operands, *known_sharp, dense_dq, dense_dlse, D=d, SIGMOID=not softmax, DENSE=p.dense, num_words=num_words,
            **constants,
        )  # fmt: skip

    def launch_segments_dq(tile: Gather) -> None:
        bce_rows_bwd_kernel_segments_dq[grid_of(lead * by_row.total, q=p.q)](
            q, k, p.lse, *p.graph, p.segment_row, p.slot, known_sharp[0], part_dq, part_ds, D=d, **p.by_entries(tile, by_row)
        )

    def launch_edges_dq(tile: Gather) -> None:
        programs = lead * (p.num_tokens if p.rows is None else num_rows)
        bce_rows_bwd_kernel_edges_dq[grid_of(programs, q=p.q)](
            g, q, k, p.lse, *p.graph, p.slot, part_dq, part_ds, *p.chosen, known_sharp[0], dense_dq, dense_dlse, rows_dq,
            dlse if softmax else None, num_parts=0 if dense_dq is None else dense_dq.shape[0], D=d,
            HAS_SEGMENTS=by_row.total > 0, **p.by_entries(tile, by_row),
        )  # fmt: skip

    def launch_dense_dk(tile: Tile) -> None:
        nonlocal dense_dk
        constants, grid = p.by_operands(tile, by_keys=True)
        dense_dk = torch.empty(grid[1], lead, p.num_tokens, d, dtype=torch.float32, device=q.device)
        bce_rows_bwd_kernel_dense_dk[grid](
            g, peak, *operands, *known_sharp, dense_dk, D=d, SIGMOID=not softmax, DENSE=p.dense, num_words=num_words,
            **constants,
        )  # fmt: skip

    by_columns = p.rowptr, p.row, p.colptr, p.weight_by_column, p.inv_mass, p.col_segptr

    def launch_segments_dk(tile: Gather) -> None:
        bce_rows_bwd_kernel_segments_dk[grid_of(lead * by_column.total, k=p.k)](
            g, q, k, p.lse, *by_columns, p.segment_col, *copies, known_sharp[0], part_dk, D=d,
            **p.by_entries(tile, by_column),
        )  # fmt: skip

    def launch_edges_dk(tile: Gather) -> None:
        bce_rows_bwd_kernel_edges_dk[grid_of(lead * p.num_tokens, k=p.k)](
            g, q, k, p.lse, *by_columns, part_dk, p.rows, *copies, *drawn, known_sharp[0], dense_dk, dk,
            num_genes=p.num_genes, num_parts=0 if dense_dk is None else dense_dk.shape[0], D=d,
            HAS_SEGMENTS=by_column.total > 0, **p.by_entries(tile, by_column),
        )  # fmt: skip

    with on_device(q):
        if over_tokens:
            choose("bce_dense_bwd_dq" if softmax else "bce_dense_bwd_dq_sigmoid", q, BD, launch_dense_dq)
        if by_row.total > 0:
            choose_gather("bce_edges_bwd_dq_segments", q, BD, launch_segments_dq)
        choose_gather("bce_edges_bwd_dq", q, BD, launch_edges_dq)
        if over_tokens:
            if q.dtype == torch.float16:
                peak = (g if p.dense else g * pull).abs().nan_to_num(0, 0).amax()
            choose("bce_dense_bwd_dk" if softmax else "bce_dense_bwd_dk_sigmoid", q, BD, launch_dense_dk)
        if p.negatives is not None:
            assert p.negrow is not None
            order, drawnptr = _by_gene(p.negatives, p.num_genes)
            drawn = p.negrow[order], p.negative_weight, drawnptr
        if by_column.total > 0:
            choose_gather("bce_edges_bwd_dk_segments", q, BD, launch_segments_dk)
        choose_gather("bce_edges_bwd_dk", q, BD, launch_edges_dk)
        if p.rows is not None:
            tokens = min(16, max(4, 512 // BD))  # Triton 3.6 and 3.7 do not compile the gather below for 32 tokens and more
            bce_rows_bwd_kernel_dq[(triton.cdiv(p.num_tokens, tokens) * lead,)](
                rows_dq, *copies, dq, num_rows, p.num_genes, p.num_prefix, D=d, BD=BD, BT=tokens, **options(4, registers=128)
            )
    return dq, dk, dlse


def _by_gene(index: Tensor, num_genes: int) -> tuple[Tensor, Tensor]:
    """(positions of index in a stable order by gene, where each of the N genes' positions begin [N + 1]), without a sync."""
    sorted_index, position = torch.sort(index, stable=True)
    return position, torch.searchsorted(sorted_index, torch.arange(num_genes + 1, device=index.device))
