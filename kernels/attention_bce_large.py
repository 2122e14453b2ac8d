"""Rows of large scores of `attention_bce`, in float64 and one by one (see attention_bce.py).

Such a row is made whole, loss and gradients, of its q, all keys and the list of its edges, in which each token is looked for;
what was drawn is counted. With p and n the weights of -log a and -log(1 - a), both 0 of a token that is in no pair,

    row_i = sum_j p_ij (-log a_ij) + n_ij L_ij ,     d row_i / d s_ij = n_ij G_ij - p_ij

for all but the sharp entry. Nothing is taken back, there are neither segments nor copies, and one loop over tokens is the whole
of each pass. LSE is made again, unless rounding does not explain how the given one differs: then it is not that of these keys,
but of others, which the caller had a mind to.

Nearly always there is no such row: these launches are of two programs a multiprocessor, which look and return.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .attention_bce_entries import LN2, LOG2E, SHARP, SIZES, grad_term, loss_term, share, sigmoid, softplus, targets
from .large_scores import LARGE, LARGEST, is_any, power

SIZES_LARGE = [*SIZES, "steps"]


@triton.jit
def is_large(lse):
    """Whether float32 leaves a row little of log a = s - LSE: both have a spacing of 2^-24 of themselves."""
    return (tl.abs(lse) * LOG2E >= LARGE) & (tl.abs(lse) < float("inf"))


@triton.jit
def _scores(b_q, p_k, o_t, m_t, scale2, STRIDE_K: tl.constexpr, W: tl.constexpr, BD: tl.constexpr):
    """(k [BN, BD], scores in base 2 [BN], their sizes scale sum_d |q_d| |k_d| [BN]), float64, of the tokens o_t."""
    # [BD], [BN, BD]
    o_d = tl.arange(0, BD)
    p = p_k + o_t.to(tl.int64)[:, None] * STRIDE_K + o_d[None, :]
    b_k = tl.load(p, mask=m_t[:, None] & (o_d < W)[None, :], other=0.0).to(tl.float64)
    b_x = b_q[None, :] * b_k
    return b_k, tl.sum(b_x, 1) * scale2, tl.sum(tl.abs(b_x), 1) * tl.abs(scale2)


@triton.jit
def _logsumexp(
    b_q, p_k, skipped, num_tokens, scale2, STRIDE_K: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):
    """(log2 of the sum of 2^s over all tokens but the one that is skipped, the largest s, its token, the largest size of an s).

    The largest s is known to the last digit of a float64: what is rounded to float32 here is the log of a sum.
    """
    most = tl.full([], -LARGEST, tl.float64)
    total = tl.zeros([], tl.float64)
    size = tl.zeros([], tl.float64)
    top = tl.full([], -1, tl.int32)
    for n in range(0, num_tokens, BN):
        o_t = n + tl.arange(0, BN)
        m_t = o_t < num_tokens
        _, b_s, b_size = _scores(b_q, p_k, o_t, m_t, scale2, STRIDE_K, W, BD)
        b_s = tl.where(m_t & (o_t != skipped), b_s, float("-inf"))
        above = tl.maximum(most, tl.max(b_s, 0))
        total = total * power(most - above) + tl.sum(power(b_s - above), 0)
        found = tl.max(tl.where(b_s == above, o_t, -1), 0)
        top = tl.where(found >= 0, found, top)
        most = above
        size = tl.maximum(size, tl.max(tl.where(b_s > float("-inf"), b_size, 0.0), 0))
    return most + tl.log2(total.to(tl.float32)).to(tl.float64), most, top, size


@triton.jit
def _weights(
    o_gene, m_gene, col_ptr, weight_ptr, known_ptr, negatives_ptr, negptr_ptr, negative_weight_ptr, i_r, start, end, inv_mass,
    steps, BN: tl.constexpr, BE: tl.constexpr, DENSE: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    """(p, n), float32 [BN], of a row i_r with the edges from start to end, and the genes o_gene, where m_gene."""
    # where the gene is in the row, or would be
    b_low = start + tl.zeros([BN], tl.int64)
    b_high = end + tl.zeros([BN], tl.int64)
    for _ in range(steps):
        m_open = m_gene & (b_low < b_high)
        b_middle = (b_low + b_high) // 2
        m_before = tl.load(col_ptr + b_middle, mask=m_open, other=0) < o_gene
        b_low = tl.where(m_open & m_before, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_before, b_middle, b_high)
    m_edge = m_gene & (b_low < end)
    m_edge = m_edge & (tl.load(col_ptr + b_low, mask=m_edge, other=0) == o_gene)
    b_p = targets(weight_ptr, b_low, m_edge, inv_mass, end - start, NORMALIZED)
    if DENSE:
        b_n = tl.where(tl.load(known_ptr + o_gene, mask=m_gene, other=0).to(tl.int1), 1.0, 0.0)
    else:
        o_e = tl.arange(0, BE)
        last = tl.load(negptr_ptr + i_r + 1)
        b_n = tl.zeros([BN], tl.float32)
        for e in range(tl.load(negptr_ptr + i_r), last, BE):
            b_drawn = tl.load(negatives_ptr + e + o_e, mask=e + o_e < last, other=-1)
            b_n += tl.sum(tl.where((b_drawn[:, None] == o_gene[None, :]) & m_gene[None, :], 1.0, 0.0), 0)
        b_n *= tl.load(negative_weight_ptr + i_r)
    return b_p, tl.where(m_edge, 1 - b_p, b_n)


@triton.jit
def _slopes(b_s, o_t, b_p, b_n, total2, rest2, sharp, pull):
    """(d row / d s but for the sharp entry and what it gives, d row / d s), float32 [BN]; s, total2 and rest2 float64."""
    b_g = tl.where(b_n == 0, 0.0, b_n * grad_term((b_s - total2).to(tl.float32), False)) - b_p
    b_g = tl.where(o_t == sharp, 0.0, b_g)
    return b_g, b_g + share((b_s - rest2).to(tl.float32), o_t, sharp, 0.0, pull)


@triton.jit
def _times(b_g, b_x):
    """b_g b_x in float64; 0 where b_g is: what is in no pair may hold anything."""
    return tl.where(b_g == 0, 0.0, b_g.to(tl.float64) * b_x)


@triton.jit
def _row(
    q_ptr, rowptr_ptr, rows_ptr, i_l, i_r, first_row, num_prefix, stride_ql, STRIDE_Q: tl.constexpr, ALIGN: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """(q as float64 [BD], the stacked row of its gene, and where its edges begin and end)."""
    gene = tl.zeros([], tl.int64) + i_r
    if rows_ptr is not None:
        gene = tl.load(rows_ptr + i_r)
    o_d = tl.arange(0, BD)
    p_q = q_ptr + i_l * (stride_ql // ALIGN * ALIGN) + (num_prefix + gene) * STRIDE_Q + o_d
    stacked = first_row + gene
    start, end = tl.load(rowptr_ptr + stacked), tl.load(rowptr_ptr + stacked + 1)
    return tl.load(p_q, mask=o_d < W, other=0.0).to(tl.float64), stacked, start, end


@triton.jit
def _exact_or_given(total2, size, lse, W: tl.constexpr, PRECISION: tl.constexpr):
    """LSE in base 2. A given one is off by W + 4 roundings, towards 0, of the largest size of a score, two of 2^-10 by TF32."""
    given = lse.to(tl.float64) * LOG2E
    rounding = (W + 4) * 2.0**-23 + (2.0**-9 if PRECISION == "tf32" else 0.0)
    return tl.where(tl.abs(total2 - given) <= rounding * size, total2, given)


@triton.jit(do_not_specialize=SIZES_LARGE)
def bce_rows_fwd_kernel_large(
    q_ptr,  # [L, T, D]
    k_ptr,  # [L, T, D]
    lse_ptr,  # fp32 [L, R]
    rowptr_ptr,  # int64 [K * N + 1]
    col_ptr,  # int32 [E]
    weight_ptr,  # [E]
    inv_mass_ptr,  # fp32 [K * N]
    known_ptr,  # bool [N]
    rows_ptr,  # int64 [R], None for all genes
    negatives_ptr,  # int64 [M], None for every valid non-edge
    negptr_ptr,  # int64 [R + 1]
    negative_weight_ptr,  # fp32 [R]
    loss_ptr,  # out, fp32 [L, R], of which the rows of large scores are written, as of what follows
    sharp_ptr,  # out, int32 [L, R]
    rest_ptr,  # out, fp32 [L, R]
    pull_ptr,  # out, fp32 [L, R]
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    num_genes,
    first_row,
    num_prefix,
    steps,  # of a bisection of a row
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Blocks of BM rows, every num_programs-th."""
    scale2 = tl.zeros([], tl.float64) + scale * LOG2E
    blocks = tl.cdiv(num_rows, BM)
    num_tokens = num_prefix + num_genes
    for block in range(tl.program_id(0), num_leading * blocks, tl.num_programs(0)):
        i_l = (block // blocks).to(tl.int64)
        first = block % blocks * BM
        # [BM]
        o_m = first + tl.arange(0, BM)
        b_lse = tl.load(lse_ptr + i_l * num_rows + o_m, mask=o_m < num_rows, other=0.0)
        any_large = tl.max(is_large(b_lse).to(tl.int32), 0) != 0
        for row in range(first, tl.where(any_large, tl.minimum(first + BM, num_rows), first)):
            i = i_l * num_rows + row
            lse = tl.load(lse_ptr + i)
            b_q, stacked, start, end = _row(
                q_ptr, rowptr_ptr, rows_ptr, i_l, row, first_row, num_prefix, stride_ql, STRIDE_Q, ALIGN, W, BD
            )
            if is_large(lse) & (start < end):
                p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN)
                total2, most, top, size = _logsumexp(b_q, p_k, -1, num_tokens, scale2, STRIDE_K, W, BD, BN)
                total2 = _exact_or_given(total2, size, lse, W, PRECISION)
                top = tl.where(most - total2 > SHARP, top, -1)
                inv_mass = tl.load(inv_mass_ptr + stacked)
                loss = tl.zeros([], tl.float64)
                positive = tl.zeros([], tl.float32)
                negative = tl.zeros([], tl.float32)
                for n in range(0, num_tokens, BN):
                    # [BN]
                    o_t = n + tl.arange(0, BN)
                    m_t = o_t < num_tokens
                    _, b_s, _ = _scores(b_q, p_k, o_t, m_t, scale2, STRIDE_K, W, BD)
                    b_p, b_n = _weights(
                        o_t - num_prefix, m_t & (o_t >= num_prefix), col_ptr, weight_ptr, known_ptr, negatives_ptr, negptr_ptr,
                        negative_weight_ptr, row, start, end, inv_mass, steps, BN, BE, DENSE, NORMALIZED,
                    )  # fmt: skip
                    b_x2 = (b_s - total2).to(tl.float32)
                    b_loss = tl.where(b_p == 0, 0.0, -LN2 * b_p * b_x2)
                    b_loss += tl.where(b_n == 0, 0.0, b_n * loss_term(b_x2, False))
                    m_top = o_t == top
                    loss += tl.sum(tl.where(m_top, 0.0, b_loss).to(tl.float64), 0)
                    positive += tl.sum(tl.where(m_top, b_p, 0.0), 0)
                    negative += tl.sum(tl.where(m_top, b_n, 0.0), 0)
                sharp = tl.where((positive != 0) | (negative != 0), top, -1)
                rest2 = tl.zeros([], tl.float64)
                pull = tl.zeros([], tl.float32)
                if sharp >= 0:
                    rest2 = _logsumexp(b_q, p_k, sharp, num_tokens, scale2, STRIDE_K, W, BD, BN)[0]
                    gap2 = (most - rest2).to(tl.float32)
                    loss += (positive * softplus(-gap2) + negative * softplus(gap2)).to(tl.float64)
                    pull = negative * sigmoid(gap2) - positive * sigmoid(-gap2)
                    pull = tl.where(tl.abs(rest2) < float("inf"), pull, float("nan"))
                tl.store(loss_ptr + i, loss.to(tl.float32))
                tl.store(sharp_ptr + i, sharp)
                tl.store(rest_ptr + i, (rest2 * LN2).to(tl.float32))
                tl.store(pull_ptr + i, pull)


@triton.jit(do_not_specialize=SIZES_LARGE)
def bce_rows_bwd_kernel_large_dq(
    dloss_ptr,  # fp32 [L, R]
    q_ptr, k_ptr, lse_ptr, rowptr_ptr, col_ptr, weight_ptr, inv_mass_ptr, known_ptr, rows_ptr, negatives_ptr, negptr_ptr,
    negative_weight_ptr,  # as in the forward
    sharp_ptr,  # int32 [L, R]
    pull_ptr,  # fp32 [L, R]
    has_large_ptr,  # int8 [L, blocks of BM rows], of bce_rows_bwd_kernel_operands: whether a row of the block is left out
    exact_ptr,  # out, fp64 [2, L, R]: LSE in base 2 of the rows left out, and of their tokens but the sharp one
    dq_ptr,  # out, fp32 [L, R, D], of all genes [L, T, D] in the dtype of q, of which the rows left out are written
    dlse_ptr,  # out, fp32 [L, R], likewise
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    num_genes,
    first_row,
    num_prefix,
    steps,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks of BM rows, every num_programs-th."""
    scale2 = tl.zeros([], tl.float64) + scale * LOG2E
    blocks = tl.cdiv(num_rows, BM)
    num_tokens = num_prefix + num_genes
    # [BD]
    o_d = tl.arange(0, BD)
    for block in range(tl.program_id(0), num_leading * blocks, tl.num_programs(0)):
        i_l = (block // blocks).to(tl.int64)
        first = block % blocks * BM
        for row in range(first, tl.where(tl.load(has_large_ptr + block) != 0, tl.minimum(first + BM, num_rows), first)):
            i = i_l * num_rows + row
            lse = tl.load(lse_ptr + i)
            b_q, stacked, start, end = _row(
                q_ptr, rowptr_ptr, rows_ptr, i_l, row, first_row, num_prefix, stride_ql, STRIDE_Q, ALIGN, W, BD
            )
            if is_large(lse) & (start < end):
                p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN)
                sharp = tl.load(sharp_ptr + i)
                pull = tl.load(pull_ptr + i)
                total2, _most, _top, size = _logsumexp(b_q, p_k, -1, num_tokens, scale2, STRIDE_K, W, BD, BN)
                total2 = _exact_or_given(total2, size, lse, W, PRECISION)
                rest2 = tl.zeros([], tl.float64)
                if sharp >= 0:
                    rest2 = _logsumexp(b_q, p_k, sharp, num_tokens, scale2, STRIDE_K, W, BD, BN)[0]
                tl.store(exact_ptr + i, total2)
                tl.store(exact_ptr + num_leading.to(tl.int64) * num_rows + i, rest2)
                inv_mass = tl.load(inv_mass_ptr + stacked)
                # [BN], [BN, BD]
                b_ds = tl.zeros([BN], tl.float64)
                b_dq = tl.zeros([BN, BD], tl.float64)
                for n in range(0, num_tokens, BN):
                    o_t = n + tl.arange(0, BN)
                    m_t = o_t < num_tokens
                    b_k, b_s, _ = _scores(b_q, p_k, o_t, m_t, scale2, STRIDE_K, W, BD)
                    b_p, b_n = _weights(
                        o_t - num_prefix, m_t & (o_t >= num_prefix), col_ptr, weight_ptr, known_ptr, negatives_ptr, negptr_ptr,
                        negative_weight_ptr, row, start, end, inv_mass, steps, BN, BE, DENSE, NORMALIZED,
                    )  # fmt: skip
                    b_own, b_g = _slopes(b_s, o_t, b_p, b_n, total2, rest2, sharp, pull)
                    b_ds += b_own.to(tl.float64)
                    b_dq += _times(tl.where(m_t, b_g, 0.0)[:, None], b_k)
                dloss = tl.load(dloss_ptr + i).to(tl.float64)
                tl.store(dlse_ptr + i, (-dloss * tl.sum(b_ds, 0)).to(tl.float32))
                b_out = (tl.sum(b_dq, 0) * dloss * scale).to(tl.float32)
                o_out = i
                if rows_ptr is None:
                    o_out = i_l * num_tokens + num_prefix + row
                tl.store(dq_ptr + o_out * D + o_d, b_out.to(dq_ptr.dtype.element_ty), mask=o_d < D)


@triton.jit(do_not_specialize=SIZES_LARGE)
def bce_rows_bwd_kernel_large_dk(
    dloss_ptr, q_ptr, k_ptr, lse_ptr, rowptr_ptr, col_ptr, weight_ptr, inv_mass_ptr, known_ptr, rows_ptr, negatives_ptr,
    negptr_ptr, negative_weight_ptr, sharp_ptr, pull_ptr, has_large_ptr, exact_ptr,  # as in dq, which leaves the last
    dk_ptr,  # [L, T, D], of the other rows: those left out are added
    stride_ql,
    stride_kl,
    num_leading,
    num_rows,
    num_genes,
    first_row,
    num_prefix,
    steps,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    DENSE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """Blocks of BN tokens, every num_programs-th."""
    row_blocks = tl.cdiv(num_rows, BM)
    if not is_any(has_large_ptr, num_leading * row_blocks):
        return
    scale2 = tl.zeros([], tl.float64) + scale * LOG2E
    num_tokens = num_prefix + num_genes
    blocks = tl.cdiv(num_tokens, BN)
    # [BD]
    o_d = tl.arange(0, BD)
    for block in range(tl.program_id(0), num_leading * blocks, tl.num_programs(0)):
        i_l = (block // blocks).to(tl.int64)
        p_large = has_large_ptr + i_l * row_blocks
        if is_any(p_large, row_blocks):
            # [BN]
            o_t = block % blocks * BN + tl.arange(0, BN)
            m_t = o_t < num_tokens
            p_k = k_ptr + i_l * (stride_kl // ALIGN * ALIGN)
            # [BN, BD]
            b_dk = tl.zeros([BN, BD], tl.float64)
            for i_m in range(row_blocks):
                first = i_m * BM
                for row in range(first, tl.where(tl.load(p_large + i_m) != 0, tl.minimum(first + BM, num_rows), first)):
                    i = i_l * num_rows + row
                    b_q, stacked, start, end = _row(
                        q_ptr, rowptr_ptr, rows_ptr, i_l, row, first_row, num_prefix, stride_ql, STRIDE_Q, ALIGN, W, BD
                    )
                    if is_large(tl.load(lse_ptr + i)) & (start < end):
                        _, b_s, _ = _scores(b_q, p_k, o_t, m_t, scale2, STRIDE_K, W, BD)
                        b_p, b_n = _weights(
                            o_t - num_prefix, m_t & (o_t >= num_prefix), col_ptr, weight_ptr, known_ptr, negatives_ptr,
                            negptr_ptr, negative_weight_ptr, row, start, end, tl.load(inv_mass_ptr + stacked), steps, BN, BE,
                            DENSE, NORMALIZED,
                        )  # fmt: skip
                        total2 = tl.load(exact_ptr + i)
                        rest2 = tl.load(exact_ptr + num_leading.to(tl.int64) * num_rows + i)
                        _, b_g = _slopes(
                            b_s, o_t, b_p, b_n, total2, rest2, tl.load(sharp_ptr + i), tl.load(pull_ptr + i)
                        )  # fmt: skip
                        dloss = tl.load(dloss_ptr + i).to(tl.float64)
                        b_dk += _times(tl.where(m_t, b_g, 0.0)[:, None], (dloss * b_q)[None, :])
            p_dk = dk_ptr + (i_l * num_tokens + o_t.to(tl.int64))[:, None] * D + o_d[None, :]
            m_dk = m_t[:, None] & (o_d < D)[None, :]
            b_dk = tl.load(p_dk, mask=m_dk, other=0.0).to(tl.float64) + b_dk * scale
            tl.store(p_dk, b_dk.to(tl.float32).to(dk_ptr.dtype.element_ty), mask=m_dk)
