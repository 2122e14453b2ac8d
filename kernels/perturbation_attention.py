"""Triton kernels of `cellattn::perturbation_correction` and its backward: what a set's own genes change in its attention.

Entry e of set b holds gene i(e), with U_e in the place of V_i(e). With beta_e = exp(scale * query_b . key_i(e) - LSE_b),

    z_b = sum_{e in b} beta_e (U_e - V_i(e))

and backward, with ds_e = beta_e dz_b . (U_e - V_i(e)) the gradient of scale * query_b . key_i(e),

    dU_e     = beta_e dz_b                                      by entries
    dquery_b = scale sum_{e in b} ds_e key_i(e) ,   dLSE_b = -sum_{e in b} ds_e        by sets
    dkey_i   = scale sum_{e: i(e) = i} ds_e query_b(e) ,   dV_i = -sum_{e: i(e) = i} beta_e dz_b(e)        by genes

The first pass runs over sets and keeps beta_e and ds_e; a stable sort of the entries by gene makes the last line a sum along
rows as well, so that nothing is scattered and every result is written once, in a fixed order.

Sets hold one to three genes: a program takes a block of sets and walks through all of them at once, entry by entry, as many
steps as the fullest holds. A gene may be in every set of a batch (one partner of a whole screen): a program takes one gene, and
gathers EDGES of its entries at once, as `row_dot` does.

Where |LSE_b| is large, float32 leaves little of beta_e, see attention.py: sets of LARGE have scores and LSE made again in
float64, the LSE by a walk over all genes. Programs without such a set branch around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellattn._aligned import wide, width

from .config import Gather, choose_gather, on_device
from .large_scores import LARGE, LARGEST
from .sums import sum_of_products
from .tensors import aligned, check_devices, check_floats, grid_of, lead_strides, padded

LOG2E = tl.constexpr(1.4426950408889634)

# --------------------------------------------------------------------------------------------------------- device code
# Sizes: L leading dimensions as one, B sets, N genes, nnz entries, D features of queries and keys, V of values; a "_PAD" is the
# next power of two, a "_W" a whole number of pieces of 16 bytes, in which rows are loaded: behind their features are zeros
# (see `aligned`). Strides of rows are constants of the kernel, leading ones are counted in such pieces of ALIGN numbers.


@triton.jit
def _large(b_lse):
    """Which sets have an LSE that float32 leaves little of beta beside, [BS]."""
    b_size = tl.abs(b_lse) * LOG2E
    return (b_size >= LARGE) & (b_size < float("inf"))


@triton.jit
def _exact_scores(b_q, b_k, m_b, scale):
    """Scores in base 2 as float64 [BS], where m_b."""
    return sum_of_products(b_q.to(tl.float64) * (scale * LOG2E), b_k.to(tl.float64), m_b[:, None], 1)


@triton.jit
def _exact_lse(b_q, p_k, num_genes, m_b, m_d, o_d, scale, STRIDE_KN: tl.constexpr, BS: tl.constexpr):
    """LSE over all genes in base 2, float64 [BS]: gene by gene, as it is made for few."""
    b_m = tl.full([BS], -LARGEST, tl.float64)
    b_l = tl.zeros([BS], tl.float32)
    # [BS, D_PAD]: the row for each of the sets, laid out as their own are
    o_k = tl.zeros([BS], tl.int32)[:, None] + o_d[None, :]
    m_k = m_b[:, None] & m_d[None, :]
    for _ in range(num_genes):
        b_s = _exact_scores(b_q, tl.load(p_k + o_k, mask=m_k, other=0.0), m_b, scale)
        b_above = tl.maximum(b_m, b_s)
        b_l = b_l * tl.exp2((b_m - b_above).to(tl.float32)) + tl.exp2((b_s - b_above).to(tl.float32))
        b_m = b_above
        p_k += STRIDE_KN
    return b_m + tl.log2(b_l).to(tl.float64)


@triton.jit
def _entry(
    b_q, p_k, p_v, p_u, b_lse, b_exact, any_large, b_gene, b_e, m_e, m_d, m_c, o_d, o_c, scale,
    STRIDE_KN: tl.constexpr, STRIDE_VN: tl.constexpr, STRIDE_UE: tl.constexpr,
):  # fmt: skip
    """(key [BS, D_PAD], beta [BS], U - V [BS, V_PAD]) of one entry of each set of a block; zeros where m_e is False.

    b_exact: `_exact_lse` of the sets that are `_large`; not read unless any_large.
    V is 0 where it is not finite, as in the sum over all genes.
    """
    b_k = tl.load(p_k + b_gene[:, None] * STRIDE_KN + o_d[None, :], mask=m_e[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_s = scale * sum_of_products(b_q, b_k, m_e[:, None], 1)
    b_x2 = (b_s - b_lse) * LOG2E
    if any_large:
        b_x2 = tl.where(_large(b_lse), (_exact_scores(b_q, b_k, m_e, scale) - b_exact).to(tl.float32), b_x2)
    b_beta = tl.where(m_e, tl.exp2(b_x2), 0.0)
    m_u = m_e[:, None] & m_c[None, :]
    b_u = tl.load(p_u + b_e[:, None] * STRIDE_UE + o_c[None, :], mask=m_u, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + b_gene[:, None] * STRIDE_VN + o_c[None, :], mask=m_u, other=0.0).to(tl.float32)
    return b_k, b_beta, b_u - tl.where(tl.abs(b_v) < float("inf"), b_v, 0.0)


@triton.jit(do_not_specialize=["num_sets", "num_genes"])
def perturbation_attention_fwd_kernel(
    query_ptr,  # [L, B, D]
    key_ptr,  # [L, N, D]
    value_ptr,  # [L, N, V]
    lse_ptr,  # float32 [L, B], natural log
    index_ptr,  # int64 [nnz]: genes of set after set
    ptr_ptr,  # int64 [B + 1]
    override_ptr,  # [L, nnz, V]
    z_ptr,  # [L, B, V]
    scale,
    num_sets,  # B
    num_genes,  # N
    stride_ql,
    stride_kl,
    stride_vl,
    stride_ul,
    STRIDE_QB: tl.constexpr,
    STRIDE_KN: tl.constexpr,
    STRIDE_VN: tl.constexpr,
    STRIDE_UE: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_W: tl.constexpr,
    D_PAD: tl.constexpr,
    V: tl.constexpr,
    V_W: tl.constexpr,
    V_PAD: tl.constexpr,
    BS: tl.constexpr,  # sets of a program
):
    num_blocks = tl.cdiv(num_sets, BS)
    i_l = (tl.program_id(0) // num_blocks).to(tl.int64)
    # [D_PAD], [V_PAD]
    o_d, o_c = tl.arange(0, D_PAD), tl.arange(0, V_PAD)
    m_d, m_c = o_d < D_W, o_c < V_W
    # [BS]
    o_b = (tl.program_id(0) % num_blocks).to(tl.int64) * BS + tl.arange(0, BS)
    m_b = o_b < num_sets
    b_start = tl.load(ptr_ptr + o_b, mask=m_b, other=0)
    b_count = tl.load(ptr_ptr + o_b + 1, mask=m_b, other=0) - b_start
    b_lse = tl.load(lse_ptr + i_l * num_sets + o_b, mask=m_b, other=0.0)
    p_k = key_ptr + i_l * (stride_kl * ALIGN)
    p_v = value_ptr + i_l * (stride_vl * ALIGN)
    p_u = override_ptr + i_l * (stride_ul * ALIGN)
    # [BS, D_PAD]
    p_q = query_ptr + i_l * (stride_ql * ALIGN) + o_b[:, None] * STRIDE_QB + o_d[None, :]
    b_q = tl.load(p_q, mask=m_b[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    # [BS, V_PAD]
    b_z = tl.zeros([BS, V_PAD], dtype=tl.float32)
    b_exact = tl.zeros([BS], tl.float64)
    any_large = tl.max((_large(b_lse) & (b_count > 0)).to(tl.int32), 0) != 0
    if any_large:
        b_exact = _exact_lse(b_q, p_k, num_genes, m_b, m_d, o_d, scale, STRIDE_KN, BS)
    for i in range(tl.max(b_count, 0)):
        m_e = i < b_count
        b_e = b_start + i
        b_gene = tl.load(index_ptr + b_e, mask=m_e, other=0)
        _, b_beta, b_diff = _entry(
            b_q, p_k, p_v, p_u, b_lse, b_exact, any_large, b_gene, b_e, m_e, m_d, m_c, o_d, o_c, scale,
            STRIDE_KN, STRIDE_VN, STRIDE_UE,
        )  # fmt: skip
        b_z += b_beta[:, None] * b_diff
    p_z = z_ptr + (i_l * num_sets + o_b)[:, None] * V + o_c[None, :]
    tl.store(p_z, b_z.to(z_ptr.dtype.element_ty), mask=m_b[:, None] & (o_c < V)[None, :])


@triton.jit(do_not_specialize=["num_sets", "num_genes", "num_entries"])
def perturbation_attention_bwd_kernel_sets(
    dz_ptr,  # [L, B, V]
    query_ptr,  # [L, B, D]
    key_ptr,  # [L, N, D]
    value_ptr,  # [L, N, V]
    lse_ptr,  # float32 [L, B]
    index_ptr,  # int64 [nnz]
    ptr_ptr,  # int64 [B + 1]
    override_ptr,  # [L, nnz, V]
    beta_ptr,  # float32 [L, nnz], out
    ds_ptr,  # float32 [L, nnz], out
    doverride_ptr,  # [L, nnz, V], out
    dquery_ptr,  # [L, B, D], out
    dlse_ptr,  # float32 [L, B], out
    scale,
    num_sets,  # B
    num_genes,  # N
    num_entries,  # nnz
    stride_ql,
    stride_kl,
    stride_vl,
    stride_ul,
    stride_zl,
    STRIDE_QB: tl.constexpr,
    STRIDE_KN: tl.constexpr,
    STRIDE_VN: tl.constexpr,
    STRIDE_UE: tl.constexpr,
    STRIDE_ZB: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_W: tl.constexpr,
    D_PAD: tl.constexpr,
    V: tl.constexpr,
    V_W: tl.constexpr,
    V_PAD: tl.constexpr,
    BS: tl.constexpr,
):
    num_blocks = tl.cdiv(num_sets, BS)
    i_l = (tl.program_id(0) // num_blocks).to(tl.int64)
    # [D_PAD], [V_PAD]
    o_d, o_c = tl.arange(0, D_PAD), tl.arange(0, V_PAD)
    m_d, m_c = o_d < D_W, o_c < V_W
    # [BS]
    o_b = (tl.program_id(0) % num_blocks).to(tl.int64) * BS + tl.arange(0, BS)
    m_b = o_b < num_sets
    b_start = tl.load(ptr_ptr + o_b, mask=m_b, other=0)
    b_count = tl.load(ptr_ptr + o_b + 1, mask=m_b, other=0) - b_start
    b_lse = tl.load(lse_ptr + i_l * num_sets + o_b, mask=m_b, other=0.0)
    p_k = key_ptr + i_l * (stride_kl * ALIGN)
    p_v = value_ptr + i_l * (stride_vl * ALIGN)
    p_u = override_ptr + i_l * (stride_ul * ALIGN)
    # [BS, V_PAD]
    p_z = dz_ptr + i_l * (stride_zl * ALIGN) + o_b[:, None] * STRIDE_ZB + o_c[None, :]
    b_dz = tl.load(p_z, mask=m_b[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    # [BS, D_PAD]
    p_q = query_ptr + i_l * (stride_ql * ALIGN) + o_b[:, None] * STRIDE_QB + o_d[None, :]
    b_q = tl.load(p_q, mask=m_b[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_dq = tl.zeros([BS, D_PAD], dtype=tl.float32)
    b_dlse = tl.zeros([BS], dtype=tl.float32)
    b_exact = tl.zeros([BS], tl.float64)
    any_large = tl.max((_large(b_lse) & (b_count > 0)).to(tl.int32), 0) != 0
    if any_large:
        b_exact = _exact_lse(b_q, p_k, num_genes, m_b, m_d, o_d, scale, STRIDE_KN, BS)
    for i in range(tl.max(b_count, 0)):
        m_e = i < b_count
        b_e = b_start + i
        b_gene = tl.load(index_ptr + b_e, mask=m_e, other=0)
        b_k, b_beta, b_diff = _entry(
            b_q, p_k, p_v, p_u, b_lse, b_exact, any_large, b_gene, b_e, m_e, m_d, m_c, o_d, o_c, scale,
            STRIDE_KN, STRIDE_VN, STRIDE_UE,
        )  # fmt: skip
        # [BS, V_PAD]
        b_du = b_beta[:, None] * b_dz
        # [BS]
        b_ds = sum_of_products(b_du, b_diff, m_e[:, None], 1)
        o_e = i_l * num_entries + b_e
        tl.store(beta_ptr + o_e, b_beta, mask=m_e)
        tl.store(ds_ptr + o_e, b_ds, mask=m_e)
        p_du = doverride_ptr + o_e[:, None] * V + o_c[None, :]
        tl.store(p_du, b_du.to(doverride_ptr.dtype.element_ty), mask=m_e[:, None] & (o_c < V)[None, :])
        b_dq += b_ds[:, None] * b_k
        b_dlse -= b_ds
    p_dq = dquery_ptr + (i_l * num_sets + o_b)[:, None] * D + o_d[None, :]
    tl.store(p_dq, (scale * b_dq).to(dquery_ptr.dtype.element_ty), mask=m_b[:, None] & (o_d < D)[None, :])
    tl.store(dlse_ptr + i_l * num_sets + o_b, b_dlse, mask=m_b)


@triton.jit(do_not_specialize=["num_genes", "num_entries"])
def perturbation_attention_bwd_kernel_genes(
    dz_ptr,  # [L, B, V]
    query_ptr,  # [L, B, D]
    beta_ptr,  # float32 [L, nnz]
    ds_ptr,  # float32 [L, nnz]
    order_ptr,  # int64 [nnz]: entries by gene
    sample_ptr,  # int64 [nnz]: the set of each of them, by gene
    geneptr_ptr,  # int64 [N + 1]: where the entries of each gene begin
    dkey_ptr,  # [L, N, D], out
    dvalue_ptr,  # [L, N, V], out
    scale,
    num_genes,  # N
    num_entries,  # nnz
    stride_ql,
    stride_zl,
    STRIDE_QB: tl.constexpr,
    STRIDE_ZB: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_W: tl.constexpr,
    D_PAD: tl.constexpr,
    V: tl.constexpr,
    V_W: tl.constexpr,
    V_PAD: tl.constexpr,
    EDGES: tl.constexpr,  # entries gathered at once
):
    o_n = tl.program_id(0).to(tl.int64)
    i_l = o_n // num_genes
    gene = o_n % num_genes
    # [D_PAD], [V_PAD]
    o_d, o_c = tl.arange(0, D_PAD), tl.arange(0, V_PAD)
    m_d, m_c = o_d < D_W, o_c < V_W
    first, end = tl.load(geneptr_ptr + gene), tl.load(geneptr_ptr + gene + 1)
    if first >= end:  # in no set, as nearly all genes
        tl.store(dkey_ptr + o_n * D + o_d, tl.zeros([D_PAD], dkey_ptr.dtype.element_ty), mask=o_d < D)
        tl.store(dvalue_ptr + o_n * V + o_c, tl.zeros([V_PAD], dvalue_ptr.dtype.element_ty), mask=o_c < V)
        return
    # [EDGES, D_PAD], [EDGES, V_PAD]
    b_dk = tl.zeros([EDGES, D_PAD], dtype=tl.float32)
    b_dv = tl.zeros([EDGES, V_PAD], dtype=tl.float32)
    for start in range(first, end, EDGES):
        # [EDGES]
        o_p = start + tl.arange(0, EDGES)
        m_p = o_p < end
        o_e = i_l * num_entries + tl.load(order_ptr + o_p, mask=m_p, other=0)
        b_sample = tl.load(sample_ptr + o_p, mask=m_p, other=0)
        b_ds = tl.load(ds_ptr + o_e, mask=m_p, other=0.0)
        b_beta = tl.load(beta_ptr + o_e, mask=m_p, other=0.0)
        p_q = query_ptr + i_l * (stride_ql * ALIGN) + b_sample[:, None] * STRIDE_QB + o_d[None, :]
        p_z = dz_ptr + i_l * (stride_zl * ALIGN) + b_sample[:, None] * STRIDE_ZB + o_c[None, :]
        b_dk += b_ds[:, None] * tl.load(p_q, mask=m_p[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_dv -= b_beta[:, None] * tl.load(p_z, mask=m_p[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    tl.store(dkey_ptr + o_n * D + o_d, (scale * tl.sum(b_dk, 0)).to(dkey_ptr.dtype.element_ty), mask=o_d < D)
    tl.store(dvalue_ptr + o_n * V + o_c, tl.sum(b_dv, 0).to(dvalue_ptr.dtype.element_ty), mask=o_c < V)


# ----------------------------------------------------------------------------------------------------------- launchers


def perturbation_correction(
    query: Tensor, key: Tensor, value: Tensor, lse: Tensor, index: Tensor, ptr: Tensor, override: Tensor, scale: float
) -> Tensor:
    """z [..., B, V] in the dtype of query; the operator `cellattn::perturbation_correction`."""
    _check(query=query, key=key, value=value, override=override, lse=lse, index=index, ptr=ptr)
    num_sets, d = query.shape[-2:]
    v = value.shape[-1]
    z = torch.empty(*query.shape[:-1], v, dtype=query.dtype, device=query.device)
    if z.numel() == 0:
        return z
    rows = [aligned(x, 1) for x in (query, key, value, override)]
    sets = lse.contiguous(), index.contiguous(), ptr.contiguous()

    def launch(tile: Gather) -> None:
        perturbation_attention_fwd_kernel[grid_of(rows[0].shape[0] * triton.cdiv(num_sets, tile.rows), query=query)](
            *rows[:3],
            *sets,
            rows[3],
            z,
            scale,
            num_sets,
            key.shape[-2],
            *_strides(rows),
            **_widths(d, v, query.dtype),
            BS=tile.rows,
            **tile.options,
        )

    with on_device(query):
        choose_gather("perturbation_fwd", query, padded(max(d, v)), launch)
    return z


def perturbation_correction_backward(
    dz: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    index: Tensor,
    ptr: Tensor,
    override: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue, dlse, doverride); the operator `cellattn::perturbation_correction_backward`."""
    _check(dz=dz, query=query, key=key, value=value, override=override, lse=lse, index=index, ptr=ptr)
    (num_sets, d), (num_genes, v), num_entries, device = query.shape[-2:], value.shape[-2:], index.numel(), query.device
    if dz.numel() == 0 or num_entries == 0:
        return tuple(x.new_zeros(x.shape) for x in (query, key, value, lse, override))  # type: ignore[return-value]
    dquery, dkey, dvalue, dlse, doverride = (
        torch.empty(x.shape, dtype=x.dtype, device=device) for x in (query, key, value, lse, override)
    )
    beta = torch.empty(*lse.shape[:-1], num_entries, dtype=torch.float32, device=device)
    ds = torch.empty(*lse.shape[:-1], num_entries, dtype=torch.float32, device=device)
    by_gene, order = torch.sort(index, stable=True)
    geneptr = torch.searchsorted(by_gene, torch.arange(num_genes + 1, device=device))
    sample = torch.searchsorted(ptr, order, right=True) - 1
    rows = [aligned(x, 1) for x in (query, key, value, override, dz)]
    num_leading = rows[0].shape[0]
    sets = lse.contiguous(), index.contiguous(), ptr.contiguous()

    def launch_sets(tile: Gather) -> None:
        perturbation_attention_bwd_kernel_sets[grid_of(num_leading * triton.cdiv(num_sets, tile.rows), query=query)](
            rows[4], *rows[:3], *sets, rows[3], beta, ds, doverride, dquery, dlse, scale, num_sets, num_genes,
            num_entries,
            *_strides(rows), **_widths(d, v, query.dtype), BS=tile.rows, **tile.options,
        )  # fmt: skip

    def launch_genes(tile: Gather) -> None:
        perturbation_attention_bwd_kernel_genes[grid_of(num_leading * num_genes, key=key)](
            rows[4], rows[0], beta, ds, order, sample, geneptr, dkey, dvalue, scale, num_genes, num_entries,
            *_strides([rows[0], rows[4]]), **_widths(d, v, query.dtype), EDGES=tile.rows, **tile.options,
        )  # fmt: skip

    with on_device(query):
        choose_gather("perturbation_bwd_sets", query, padded(max(d, v)), launch_sets)
        choose_gather("perturbation_bwd_genes", query, padded(max(d, v)), launch_genes)
    return dquery, dkey, dvalue, dlse, doverride


def _check(*, index: Tensor, ptr: Tensor, lse: Tensor, **floats: Tensor) -> None:
    check_floats(**floats)
    check_devices(**floats, lse=lse, index=index, ptr=ptr)


def _strides(rows: list[Tensor]) -> list[int]:
    """Leading strides in pieces of 16 bytes, row strides of all matrices, and the numbers in a piece."""
    align = wide(rows[0].dtype)
    return [*(stride // align for x in rows for stride in lead_strides(x)), *(x.stride(1) for x in rows), align]


def _widths(d: int, v: int, dtype: torch.dtype) -> dict[str, int]:
    return {
        "D": d, "D_W": width(d, dtype), "D_PAD": padded(d), "V": v, "V_W": width(v, dtype), "V_PAD": padded(v),
    }  # fmt: skip
