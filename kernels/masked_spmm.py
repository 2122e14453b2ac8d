"""Triton kernels of `cellattn::masked_spmm`, `masked_sddmm` and `masked_degree`: products with B masked copies of one graph.

With bits keep_bi of `words` and one relation's entries (i, j) of value v_ij,

    out_bi = keep_bi sum_j v_ij keep_bj x_bj ,   dv_ij = sum_b keep_bi keep_bj g_bi . x_bj ,   degree_bi = keep_bi sum_j keep_bj

A bit decides whether a row of x is read at all, so that neither NaN nor infinity in what is dropped reaches a sum, and what is
dropped costs no traffic. Nothing of size [B, E] is made, and no result is added to by two programs at once.

masked_spmm. A program takes one row i for S samples, and has R slots, each good for a row of x a step: EDGES entries for each
sample. Shapes alone decide. Samples go in order over the whole chip, so that what is gathered at one time belongs to a few of
them, which L2 holds (0.85 MB a sample at N = 6,607 and 64 features of 16 bits).

* x [B, N, F]: B E F numbers out of L2, 8.5 GB at B = 64 and a million entries, 2 ms at 4 TB/s; samples share nothing but the
  entries. EDGES is about the mean degree, and S what is left of R: where rows are long all slots are one sample's, and where
  they are short several samples' rows are in flight, and no slot is idle.
* x [N, F]: an entry that is kept by every sample of the S that keeps i adds the same to each. These are summed once, R entries
  a step, and only the rest sample by sample. A perturbation drops a few genes: with S = 8 nearly all entries are of the first
  kind, and the gather is an eighth. In the second kind the S reads of one row of x fall together, one from L2, the others from
  L1. Both parts are sums, with nothing taken away again, so no digits cancel; but which samples share a program can change a
  result in its last bits.

Hub rows are looped over, and not cut as in `row_dot`: at 64 features 3,800 entries of one sample are 120
steps of 32, hidden behind the other samples unless the last one starts them last. Steps are EDGES long where rows are short in
the mean, and where x is shared and samples drop much of a row. By count, not measured.

masked_sddmm. A program takes EDGES entries, whatever their rows, which it finds by bisection: a hub is no longer than anything
else. It walks through the samples that keep any of them. Neighbouring entries share rows of g, which come from L1; those of x
are gathered as above, but every program wants all samples. So a launch takes 128 features, and as many half words as L2 holds
the samples of, and adds to what the launches before it left. With x [N, F], x_j is read once, and multiplied by the sum of the
rows of g.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellattn._aligned import width
from cellattn._check import require, require_same, require_tensor

from .config import Gather, choose_gather, on_device, options
from .tensors import check_devices, check_dtype, grid_of, padded, rows_of

MAX_BLOCK = 128  # features of a program
MAX_SAMPLES = 32  # of a program: they lie in one half of a word
SHARING = 8  # samples that share a gathered row
MIN_EDGES = 8  # of a sample at once: a hub among short rows would take too many steps
L2_BYTES = 16 << 20  # of x that may be gathered from at one time

# --------------------------------------------------------------------------------------------------------- device code
# Sizes: B samples, N genes, E entries, F features, H halves of words: int32 [N, H], of which bit b % 32 of half b // 32 is
# sample b (int64 words are read as pairs of halves, the lower first). Rows of x are ROW numbers apart, F features and zeros up
# to W: constants, because only then does the compiler load them in pieces of 16 bytes (see `rows_of`).


@triton.jit
def span(rowptr_ptr, row, num_entries, wanted):
    """Where the entries of a row begin and end, within what there is; nowhere unless it is wanted."""
    start = tl.maximum(tl.load(rowptr_ptr + row), 0)
    end = tl.minimum(tl.load(rowptr_ptr + row + 1), num_entries)
    return start, tl.where(wanted, end, start)


@triton.jit
def entries(col_ptr, value_ptr, o_e, end, HAS_VALUE: tl.constexpr):
    """Columns and values of the entries o_e [R]; column -1 from `end` on."""
    m_e = o_e < end
    b_col = tl.load(col_ptr + o_e, mask=m_e, other=-1)
    b_value = tl.load(value_ptr + o_e, mask=m_e, other=0.0) if HAS_VALUE else m_e.to(tl.float32)
    return b_col, b_value


@triton.jit
def _halves(p_w, b_col, num_genes, num_halves):
    """The half words of genes b_col [R], 0 for what is no gene."""
    m_col = (b_col >= 0) & (b_col < num_genes)
    return tl.load(p_w + b_col.to(tl.int64) * num_halves, mask=m_col, other=0)


@triton.jit
def _sum_entries(
    x_ptr, col_ptr, value_ptr, p_w, start, end, o_e, b_first, b_bit, mine, shift, o_f, m_x, num_genes, num_halves,
    ROW: tl.constexpr, HAS_VALUE: tl.constexpr, ALL: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sums over start + o_e [R], STEP entries on and on: (sum [R, BF], how many entries [R], bits of entries left out [R]).

    ALL: of entries that every sample of `mine` keeps. Otherwise slot r is of the sample of b_bit[r], whose rows of x begin at
    b_first[r], and sums what it keeps; with REST without what ALL sums.
    """
    b_sum = tl.zeros([o_e.shape[0], o_f.shape[0]], dtype=tl.float32)
    b_count = tl.zeros([o_e.shape[0]], dtype=tl.int32)
    b_left = tl.zeros([o_e.shape[0]], dtype=tl.int32)
    # Entries lead to words and words to rows: the next two steps' are on their way, as in row_dot_bwd_kernel_dk.
    b_col, b_value = entries(col_ptr, value_ptr, start + o_e, end, HAS_VALUE)
    b_w = _halves(p_w, b_col, num_genes, num_halves)
    b_next, b_next_value = entries(col_ptr, value_ptr, start + STEP + o_e, end, HAS_VALUE)
    for e in range(start, end, STEP):
        b_last, b_last_value = entries(col_ptr, value_ptr, e + 2 * STEP + o_e, end, HAS_VALUE)
        b_next_w = _halves(p_w, b_next, num_genes, num_halves)
        b_w = (b_w >> shift) & mine
        if ALL:
            m_e = b_w == mine
        elif REST:
            m_e = ((b_w & b_bit) != 0) & (b_w != mine)
        else:
            m_e = (b_w & b_bit) != 0
        p_b = x_ptr + (b_first + b_col)[:, None] * ROW + o_f[None, :]
        b_x = tl.load(p_b, mask=m_e[:, None] & m_x[None, :], other=0.0).to(tl.float32)
        b_sum += tl.where(m_e, b_value, 0.0).to(tl.float32)[:, None] * b_x
        b_count += m_e.to(tl.int32)
        b_left |= tl.where(m_e, 0, b_w)
        b_col, b_value, b_w = b_next, b_next_value, b_next_w
        b_next, b_next_value = b_last, b_last_value
    return b_sum, b_count, b_left


@triton.jit(do_not_specialize=["num_genes", "num_entries", "num_sets", "num_halves"])
def masked_spmm_kernel(
    rowptr_ptr,  # int64 [N + 1]
    col_ptr,  # int32 [E]
    value_ptr,  # float32 [E]; not read unless HAS_VALUE
    x_ptr,  # [N, F] if SHARED, else [B, N, F]
    words_ptr,  # int32 [N, H]
    out_ptr,  # [B, N, F]
    num_genes,  # N
    num_entries,  # E
    num_sets,  # B
    num_halves,  # H
    HAS_VALUE: tl.constexpr,
    SHARED: tl.constexpr,
    MEAN: tl.constexpr,
    F: tl.constexpr,
    W: tl.constexpr,
    ROW: tl.constexpr,
    BF: tl.constexpr,  # features of a program, a power of two
    S: tl.constexpr,  # samples of a program, a power of two up to 32
    EDGES: tl.constexpr,  # entries gathered at once for each sample
):
    R: tl.constexpr = S * EDGES
    pid = tl.program_id(0)
    row = pid % num_genes
    i_f = (pid // num_genes) % tl.cdiv(F, BF)
    first = pid // num_genes // tl.cdiv(F, BF) * S
    p_w = words_ptr + first // 32
    shift = first % 32
    # Samples that keep the row. The bits past B are zeros already, if they are what they should be.
    mine = (tl.load(p_w + row.to(tl.int64) * num_halves) >> shift) & (-1 if S == 32 else (1 << S) - 1)
    left = num_sets - first
    mine &= tl.where(left < S, (1 << tl.minimum(left, 31)) - 1, -1)
    start, end = span(rowptr_ptr, row, num_entries, mine != 0)
    # [BF]
    o_f = i_f * BF + tl.arange(0, BF)
    m_f, m_x = o_f < F, o_f < W
    # [S]
    o_s = tl.arange(0, S)
    # [R]: sample by sample
    o_r = tl.arange(0, R)
    # [S, BF]
    b_out = tl.zeros([S, BF], dtype=tl.float32)
    b_n = tl.zeros([S], dtype=tl.int32)
    alone = mine != 0
    # A sample alone is a group that shares its x.
    if SHARED or S == 1:
        b_first = tl.zeros([R], dtype=tl.int64)
        if not SHARED:
            b_first += first.to(tl.int64) * num_genes
        b_sum, b_count, b_left = _sum_entries(
            x_ptr, col_ptr, value_ptr, p_w, start, end, o_r, b_first, o_r, mine, shift, o_f, m_x, num_genes, num_halves,
            ROW, HAS_VALUE, True, False, R,
        )  # fmt: skip
        b_out += tl.sum(b_sum, 0)[None, :]
        b_n += tl.sum(b_count, 0)
        alone = tl.max((b_left != 0).to(tl.int32), 0) != 0
    if S > 1:  # noqa: SIM102 - decided while compiling
        if alone:
            b_first = tl.zeros([R], dtype=tl.int64)
            if not SHARED:
                b_first += (first + o_r // EDGES).to(tl.int64) * num_genes
            b_sum, b_count, b_left = _sum_entries(
                x_ptr, col_ptr, value_ptr, p_w, start, end, o_r % EDGES, b_first, 1 << (o_r // EDGES), mine, shift, o_f, m_x,
                num_genes, num_halves, ROW, HAS_VALUE, False, SHARED, EDGES,
            )  # fmt: skip
            b_out += tl.sum(tl.reshape(b_sum, [S, EDGES, BF]), 1)
            b_n += tl.sum(tl.reshape(b_count, [S, EDGES]), 1)
    if MEAN:
        b_out = b_out / tl.maximum(b_n, 1).to(tl.float32)[:, None]
    b_out = tl.where((((mine >> o_s) & 1) != 0)[:, None], b_out, 0.0)
    p_b = out_ptr + ((first + o_s).to(tl.int64) * num_genes + row)[:, None] * F + o_f[None, :]
    tl.store(p_b, b_out.to(out_ptr.dtype.element_ty), mask=(o_s < left)[:, None] & m_f[None, :])


@triton.jit(
    do_not_specialize=[
        "num_genes", "num_entries", "num_sets", "num_halves", "num_bisections", "i_f", "first_half", "last_half", "add",
    ]
)  # fmt: skip
def masked_sddmm_kernel(
    rowptr_ptr,  # int64 [N + 1]
    col_ptr,  # int32 [E]
    g_ptr,  # [B, N, F]
    x_ptr,  # [N, F] if SHARED, else [B, N, F]
    words_ptr,  # int32 [N, H]
    out_ptr,  # float32 [E]
    num_genes,  # N
    num_entries,  # E
    num_sets,  # B
    num_halves,  # H
    num_bisections,  # that find one of N rows
    i_f,  # the features of this launch, the i_f-th BF
    first_half,
    last_half,  # and its samples
    add,  # 1: to what out holds
    SHARED: tl.constexpr,
    W: tl.constexpr,
    ROW: tl.constexpr,  # of g and, unless SHARED, of x
    SHARED_ROW: tl.constexpr,  # of x, if SHARED
    BF: tl.constexpr,
    EDGES: tl.constexpr,  # entries of a program
):
    # [EDGES]
    o_e = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)
    m_e = o_e < num_entries
    b_col = tl.load(col_ptr + o_e, mask=m_e, other=-1)
    # rowptr[b_row] <= o_e < rowptr[b_end]: the row, when they stand side by side
    b_row = tl.zeros([EDGES], dtype=tl.int32)
    b_end = tl.zeros([EDGES], dtype=tl.int32) + num_genes
    for _ in range(num_bisections):
        b_mid = (b_row + b_end) // 2
        m_up = tl.load(rowptr_ptr + b_mid, mask=m_e, other=0) <= o_e
        b_row = tl.where(m_up, b_mid, b_row)
        b_end = tl.where(m_up, b_end, b_mid)
    # [BF]
    o_f = i_f * BF + tl.arange(0, BF)
    m_x = o_f < W
    # [EDGES, BF]
    b_sum = tl.zeros([EDGES, BF], dtype=tl.float32)
    b_any = tl.zeros([EDGES], dtype=tl.int32)
    for h in range(first_half, last_half):
        b_w = _halves(words_ptr + h, b_row, num_genes, num_halves) & _halves(words_ptr + h, b_col, num_genes, num_halves)
        b_any |= b_w
        some = tl.reduce_or(b_w, 0)
        for s in range(tl.minimum(num_sets - h * 32, 32)):
            if (some >> s) & 1 != 0:  # a sample that keeps none of the entries is not waited for
                sample = tl.cast(h * 32 + s, tl.int64) * num_genes
                m_b = (((b_w >> s) & 1) != 0)[:, None] & m_x[None, :]
                p_b = g_ptr + (sample + b_row)[:, None] * ROW + o_f[None, :]
                b_g = tl.load(p_b, mask=m_b, other=0.0).to(tl.float32)
                if not SHARED:
                    p_b = x_ptr + (sample + b_col)[:, None] * ROW + o_f[None, :]
                    b_g *= tl.load(p_b, mask=m_b, other=0.0).to(tl.float32)
                b_sum += b_g
    if SHARED:
        p_b = x_ptr + b_col.to(tl.int64)[:, None] * SHARED_ROW + o_f[None, :]
        b_sum *= tl.load(p_b, mask=(b_any != 0)[:, None] & m_x[None, :], other=0.0).to(tl.float32)
    b_out = tl.sum(b_sum, 1)
    if add != 0:
        b_out += tl.load(out_ptr + o_e, mask=m_e, other=0.0)
    tl.store(out_ptr + o_e, b_out, mask=m_e)


@triton.jit(do_not_specialize=["num_genes", "num_entries", "num_sets", "num_halves"])
def masked_degree_kernel(
    rowptr_ptr,  # int64 [N + 1]
    col_ptr,  # int32 [E]
    words_ptr,  # int32 [N, H]
    out_ptr,  # int32 [B, N]
    num_genes,  # N
    num_entries,  # E
    num_sets,  # B
    num_halves,  # H
    EDGES: tl.constexpr,  # entries read at once
):
    row = tl.program_id(0) % num_genes
    half = tl.program_id(0) // num_genes
    p_w = words_ptr + half
    mine = tl.load(p_w + row.to(tl.int64) * num_halves)
    start, end = span(rowptr_ptr, row, num_entries, mine != 0)
    # [32], [EDGES]
    o_s = tl.arange(0, 32)
    o_e = tl.arange(0, EDGES)
    # [EDGES, 32]
    b_count = tl.zeros([EDGES, 32], dtype=tl.int32)
    for e in range(start, end, EDGES):
        b_col = tl.load(col_ptr + e + o_e, mask=e + o_e < end, other=-1)
        b_count += (_halves(p_w, b_col, num_genes, num_halves)[:, None] >> o_s[None, :]) & 1
    b_out = tl.sum(b_count, 0) * ((mine >> o_s) & 1)
    o_b = half * 32 + o_s
    tl.store(out_ptr + o_b.to(tl.int64) * num_genes + row, b_out, mask=o_b < num_sets)


# ----------------------------------------------------------------------------------------------------------- launchers


def masked_spmm(
    rowptr: Tensor, col: Tensor, value: Tensor | None, x: Tensor, words: Tensor, num_sets: int, mean: bool
) -> Tensor:
    """out [B, N, F] in the dtype of x; the operator `cellattn::masked_spmm`."""
    num_genes = _check_graph(rowptr, col, words, num_sets)
    _check_features(num_genes, num_sets, shared=True, x=x)
    check_devices(rowptr=rowptr, col=col, value=value, x=x, words=words)
    if value is not None:
        require_tensor("value", value, ndim=1, dtypes=(torch.float32,))
        require_same("size", col=col.shape[0], value=value.shape[0])
        value = value.contiguous()
    f, shared = x.shape[-1], x.ndim == 2
    out = torch.empty(num_sets, num_genes, f, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows, halves, block = rows_of(x), _halves_of(words), _block(f)

    def launch(tile: Gather) -> None:
        samples = _samples(tile.rows, num_sets, col.shape[0] / num_genes, num_genes * f * x.element_size(), shared)
        masked_spmm_kernel[grid_of(num_genes * triton.cdiv(f, block) * triton.cdiv(num_sets, samples), x=x, words=words)](
            rowptr.contiguous(), col.contiguous(), value, rows, halves, out, num_genes, col.shape[0], num_sets, halves.shape[1],
            HAS_VALUE=value is not None, SHARED=shared, MEAN=mean, F=f, W=width(f, x.dtype), ROW=rows.stride(0), BF=block,
            S=samples, EDGES=tile.rows // samples, **tile.options,
        )  # fmt: skip

    with on_device(x):
        choose_gather("masked_spmm_shared" if shared else "masked_spmm", x, block, launch)
    return out


def masked_sddmm(rowptr: Tensor, col: Tensor, g: Tensor, x: Tensor, words: Tensor, num_sets: int) -> Tensor:
    """[E] float32, the products of g and x along the entries; the operator `cellattn::masked_sddmm`."""
    num_genes = _check_graph(rowptr, col, words, num_sets)
    _check_features(num_genes, num_sets, shared=True, x=x)
    _check_features(num_genes, num_sets, shared=False, g=g)
    require_same("dtype", x=x.dtype, g=g.dtype)
    require_same("number of features", x=x.shape[-1], g=g.shape[-1])
    check_devices(rowptr=rowptr, col=col, x=x, g=g, words=words)
    num_entries, f, shared = col.shape[0], x.shape[-1], x.ndim == 2
    if num_entries == 0 or g.numel() == 0:
        return torch.zeros(num_entries, dtype=torch.float32, device=x.device)
    out = torch.empty(num_entries, dtype=torch.float32, device=x.device)
    rows_g, rows_x, rowptr, col = rows_of(g), rows_of(x), rowptr.contiguous(), col.contiguous()
    if not shared and rows_g.stride(0) != rows_x.stride(0):  # one lies as it came, the other was copied
        rows_g, rows_x = (rows_of(rows.contiguous()) for rows in (rows_g, rows_x))
    halves, block = _halves_of(words), _block(f)
    num_halves = triton.cdiv(num_sets, 32)
    step = num_halves if shared else max(1, L2_BYTES // (32 * num_genes * f * x.element_size()))

    def launch(tile: Gather) -> None:
        parts = product(range(triton.cdiv(f, block)), range(0, num_halves, step))
        for i, (i_f, first) in enumerate(parts):
            masked_sddmm_kernel[grid_of(triton.cdiv(num_entries, tile.rows), col=col)](
                rowptr, col, rows_g, rows_x, halves, out, num_genes, num_entries, num_sets, halves.shape[1],
                num_genes.bit_length(), i_f, first, min(first + step, num_halves), min(i, 1), SHARED=shared,
                W=width(f, x.dtype), ROW=rows_g.stride(0), SHARED_ROW=rows_x.stride(0) if shared else 0, BF=block,
                EDGES=tile.rows, **tile.options,
            )  # fmt: skip

    with on_device(x):
        choose_gather("masked_sddmm", x, block, launch)
    return out


def masked_degree(rowptr: Tensor, col: Tensor, words: Tensor, num_sets: int) -> Tensor:
    """int32 [B, N]: kept j with an entry from kept i; the operator `cellattn::masked_degree`."""
    num_genes = _check_graph(rowptr, col, words, num_sets)
    check_devices(rowptr=rowptr, col=col, words=words)
    out = torch.empty(num_sets, num_genes, dtype=torch.int32, device=words.device)
    if out.numel() == 0:
        return out
    halves = _halves_of(words)
    with on_device(words):
        masked_degree_kernel[grid_of(num_genes * triton.cdiv(num_sets, 32), words=words)](
            rowptr.contiguous(), col.contiguous(), halves, out, num_genes, col.shape[0], num_sets,
            halves.shape[1], EDGES=128, **options(4),
        )  # fmt: skip
    return out


def _check_graph(rowptr: Tensor, col: Tensor, words: Tensor, num_sets: int) -> int:
    """Check one relation's CSR and the masks; N."""
    require_tensor("rowptr", rowptr, ndim=1, dtypes=(torch.int64,))
    require_tensor("col", col, ndim=1, dtypes=(torch.int32,))
    require_tensor("words", words, ndim=2, dtypes=(torch.int64,))
    num_genes, num_words = words.shape
    require(
        rowptr.shape[0] == num_genes + 1, lambda: f"rowptr: expected {num_genes + 1} entries, got shape {list(rowptr.shape)}"
    )
    require(
        num_sets >= 0 and num_words == -(-num_sets // 64),
        lambda: f"num_sets: expected a number of sets that fills {num_words} words, got {num_sets}",
    )
    return num_genes


def _check_features(num_genes: int, num_sets: int, *, shared: bool, **tensors: Tensor) -> None:
    """Check that features are [B, N, F], or [N, F] where they may be shared by all samples."""
    for name, x in tensors.items():
        check_dtype(name, x)
        require(
            tuple(x.shape[:-1]) == (num_sets, num_genes) or (shared and tuple(x.shape[:-1]) == (num_genes,)),
            lambda: (
                f"{name}: expected shape {f'[{num_genes}, F] or ' if shared else ''}[{num_sets}, {num_genes}, F], "
                f"got {list(x.shape)}"
            ),
        )


def _halves_of(words: Tensor) -> Tensor:
    """int32 [N, 2 W], the lower half of each word first."""
    return words.contiguous().view(torch.int32)


def _block(features: int) -> int:
    return min(padded(features), MAX_BLOCK)


def _samples(rows: int, num_sets: int, degree: float, sample_bytes: int, shared: bool) -> int:
    """How many samples a program with `rows` slots takes, a power of two; `degree` is the mean of the rows."""
    edges = max(MIN_EDGES, triton.next_power_of_2(round(degree)))
    if shared:
        return min(max(SHARING, rows // edges), rows, MAX_SAMPLES, triton.next_power_of_2(num_sets))
    in_cache = max(1, L2_BYTES // sample_bytes)
    return min(max(1, rows // edges), MAX_SAMPLES, triton.next_power_of_2(num_sets), 1 << in_cache.bit_length() - 1)
