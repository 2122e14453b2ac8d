"""One entry of `attention_bce`, and what else both of its directions make of it (see attention_bce.py)."""

# mypy: allow-untyped-defs
from __future__ import annotations

from math import log2

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# log2 of the least a of a sharp entry: far enough above 1/2 that no two of a row are, however scores and LSE are rounded.
SHARP = tl.constexpr(log2(2 / 3))

# Not specialised on their values, so that a new length compiles nothing: all that the loads need to know of leading strides is
# in ALIGN, which divides them.
SIZES = ["num_leading", "num_rows", "num_genes", "num_prefix", "num_parts", "first_row", "part"]
SIZES += ["first_segment", "num_segments", "stride_ql", "stride_kl"]


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
def softplus(x2):
    """log(1 + 2^x2): with e = 2^-|x2|, log(1 + e) = 2 atanh(e / (2 + e))."""
    e = tl.exp2(-tl.abs(x2))
    return LN2 * tl.maximum(x2, 0.0) + _twice_atanh(e / (2 + e))


@triton.jit
def sigmoid(x2):
    e = tl.exp2(-tl.abs(x2))
    return tl.where(x2 >= 0, 1.0, e) / (1 + e)


@triton.jit
def _not_sharp(x2):
    """a of an entry that is not the sharp one: at most 2/3, however a score of any size was rounded when it was made again."""
    return tl.exp2(tl.minimum(x2, SHARP, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def loss_term(x2, SIGMOID: tl.constexpr):
    """L: softplus(s), or -log(1 - a). log(1 - a) = -2 atanh(a / (2 - a)) keeps the digits of a small a."""
    if SIGMOID:
        loss = softplus(x2)
    else:
        a = _not_sharp(x2)
        loss = tl.where(a > 0.5, -tl.log(1 - a), _twice_atanh(a / (2 - a)))
    return loss


@triton.jit
def grad_term(x2, SIGMOID: tl.constexpr):
    """G = dL / ds (with LSE fixed): sigmoid(s), or a / (1 - a)."""
    if SIGMOID:
        grad = sigmoid(x2)
    else:
        a = _not_sharp(x2)
        grad = a / (1 - a)
    return grad


@triton.jit
def gather(x_ptr, o_row, m_row, STRIDE: tl.constexpr, o_d, m_d):
    """Rows of x [*, D] as float32 [rows, BD], zeros where masked."""
    p = x_ptr + o_row.to(tl.int64)[:, None] * STRIDE + o_d[None, :]
    return tl.load(p, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)


@triton.jit
def targets(weight_ptr, o_e, m_e, inv_mass, degree, NORMALIZED: tl.constexpr):
    """t of edges: the weight over the row's sum, 1 to the last bit for a row's only edge; or 1."""
    t = tl.where(m_e, 1.0, 0.0)
    if NORMALIZED:
        weight = tl.load(weight_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)
        t = tl.where(degree == 1, t, weight * inv_mass)
    return t


@triton.jit
def edge_loss(x2, t, SIGMOID: tl.constexpr, DENSE: tl.constexpr):
    """Of an edge's entry, less the L that the softmax link's dense pass has added. The sigmoid link's knows the edges."""
    # an edge of target 1 loses nothing by an infinite score
    loss = t * softplus(-x2) + tl.where(t == 1, 0.0, (1 - t) * softplus(x2)) if SIGMOID else -LN2 * t * x2
    if not SIGMOID:
        weight = -t if DENSE else 1 - t
        loss += weight * loss_term(x2, SIGMOID)
    return loss


@triton.jit
def edge_grad(x2, t, SIGMOID: tl.constexpr, DENSE: tl.constexpr):
    """Its derivative in the score, with LSE fixed."""
    grad = (1 - t) * sigmoid(x2) - t * sigmoid(-x2) if SIGMOID else -t
    if not SIGMOID:
        weight = -t if DENSE else 1 - t
        grad += weight * grad_term(x2, SIGMOID)
    return grad


@triton.jit
def is_edge(edges_ptr, o_r, m_r, first, num_words, COUNT: tl.constexpr, ACROSS: tl.constexpr):
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


@triton.jit
def segments_of_row(segptr_ptr, slot_ptr, stacked, gene, i_r, first_segment):
    """(first, last) of the segments whose sums the row i_r adds, among those of the relation: none if it walks its edges."""
    first = tl.load(segptr_ptr + stacked) - first_segment
    last = tl.load(segptr_ptr + stacked + 1) - first_segment
    if slot_ptr is not None:
        last = tl.where(tl.load(slot_ptr + gene) == i_r, last, first)
    return first, last


@triton.jit
def share(s2, token, sharp, rest2, pull):
    """What the sharp entry of a row gives to the score of each token: pull to its own, a share of -pull to the others."""
    share = tl.exp2(tl.minimum(s2 - rest2, 0.0))
    return tl.where(sharp >= 0, pull * tl.where(token == sharp, 1.0, -share), 0.0)
