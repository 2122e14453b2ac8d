"""Triton kernels of `cellattn::relational_spmm` and `relational_degree`: products with several graphs between gene subsets.

For the place t of gene i in target_b, over the entries (i, j) of each relation r whose gene j sends, p its place in source_b,

    out_tr = target_scale_tr sum_j v^r_ij source_scale_pr x_pr

A table [B, N] says which place a gene has, -1 for one that does not send: a row of x is read only where there is one. It is
made for as many samples at a time as TABLE_BYTES hold; samples of places are found by bisection: nothing waits for the device.

relational_spmm. A program takes one place t, for all relations where they are summed and for one where they are not, and EDGES
entries at once, as in `row_dot`, whose docstring counts the steps. Relations follow each other and then places, in order over
the whole chip, so that what is gathered at one time belongs to few samples, which L2 holds (7.6 MB a sample at N = 6,607, nine
relations and 64 features of 16 bits). Scales are factors of the entries: one sum is kept over all relations.

Features that all samples share have a gradient summed over samples. A program then takes a gene for a part of the batch,
sample after sample, and the parts are added at the end, in order: PARTS of them, so that a hub's row is not walked B times
by one program while the others have finished; fewer where they would take more than PART_BYTES. By count, not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellattn._aligned import width
from cellattn._check import require, require_same, require_tensor

from .config import Gather, choose_gather, on_device, options
from .masked_spmm import MAX_BLOCK, entries, span
from .segments import device_ints
from .tensors import check_devices, check_dtype, grid_of, padded, rows_of

PARTS = 8  # of the batch, where samples are summed
PART_BYTES = 64 << 20  # of all parts together
TABLE_BYTES = 64 << 20  # of a table of places: 2,500 samples at N = 6,607
INT32_MAX = 2**31 - 1

# --------------------------------------------------------------------------------------------------------- device code
# Sizes: B samples, N genes, E entries, K relations, F features, Vs and Vt places that send and receive; a launch is for the
# samples `first` to `first + count`, which tables have rows for. Rows of x are ROW numbers apart, F features and zeros up to W:
# constants, because only then does the compiler load them in pieces of 16 bytes (see `rows_of`).


@triton.jit
def _sample(ptr_ptr, place, num_sets, num_bisections):
    """The sample of each place, whatever ptr holds a number in [0, num_sets)."""
    low = place * 0
    high = low + num_sets  # ptr[low] <= place < ptr[high]
    for _ in range(num_bisections):
        mid = (low + high) // 2
        up = tl.load(ptr_ptr + mid) <= place
        low = tl.where(up, mid, low)
        high = tl.where(up, high, mid)
    return low


@triton.jit(do_not_specialize=["num_places", "num_sets", "num_genes", "first", "count", "num_bisections"])
def place_table_kernel(
    gene_ptr,  # int64 [V]
    ptr_ptr,  # int64 [B + 1]
    table_ptr,  # int32 [count, N], out: the place of each gene there is
    num_places,  # V
    num_sets,  # B
    num_genes,  # N
    first,
    count,
    num_bisections,
    SHARED: tl.constexpr,  # a gene is its own place
    BLOCK: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < num_places
    b_gene = tl.load(gene_ptr + o_p, mask=m_p, other=-1)
    b_sample = _sample(ptr_ptr, o_p, num_sets, num_bisections) - first
    m_p &= (b_gene >= 0) & (b_gene < num_genes) & (b_sample >= 0) & (b_sample < count)
    b_place = b_gene if SHARED else o_p
    tl.store(table_ptr + b_sample * num_genes + b_gene, b_place.to(tl.int32), mask=m_p)


@triton.jit
def _places(p_place, b_col, num_genes):
    """The places of genes b_col [EDGES], -1 for what does not send or is no gene."""
    return tl.load(p_place + b_col, mask=(b_col >= 0) & (b_col < num_genes), other=-1)


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_genes", "num_entries", "num_relations", "num_sets", "part", "first", "count", "num_bisections",
    ]
)  # fmt: skip
def relational_spmm_kernel(
    rowptr_ptr,  # int64, of the stack
    col_ptr,  # int32 [E]
    value_ptr,  # float32 [E]
    x_ptr,  # [Vs, K, F] if X_EACH, else [Vs, F]; N in place of Vs where samples share it
    place_ptr,  # int32 [count, N]: rows of x
    target_ptr,  # int64 [Vt]; not read if SUM_SAMPLES
    targetptr_ptr,  # int64 [B + 1]; not read if SUM_SAMPLES
    receive_ptr,  # int32 [count, N]: places among the Vt; not read unless SUM_SAMPLES
    relations_ptr,  # int64 [K], of the stack
    source_scale_ptr,  # float32, a row of K for each of x; not read unless SOURCE_SCALE
    target_scale_ptr,  # float32 [Vt, K]; not read unless TARGET_SCALE
    out_ptr,  # [Vt, K, F], or [Vt, F] if SUM_RELATIONS; float32 [parts, N, ...] if SUM_SAMPLES
    num_rows,  # Vt, or N if SUM_SAMPLES
    num_genes,  # N
    num_entries,  # E
    num_relations,  # K
    num_sets,  # B
    part,  # samples of a program
    first,
    count,
    num_bisections,
    X_EACH: tl.constexpr,
    SUM_RELATIONS: tl.constexpr,
    SUM_SAMPLES: tl.constexpr,
    SOURCE_SCALE: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    F: tl.constexpr,
    W: tl.constexpr,
    ROW: tl.constexpr,
    BF: tl.constexpr,  # features of a program, a power of two
    EDGES: tl.constexpr,  # entries gathered at once
):
    pid = tl.program_id(0)
    r_first = 0
    r_last = num_relations
    if not SUM_RELATIONS:
        r_first = pid % num_relations
        r_last = r_first + 1
        pid = pid // num_relations
    row = pid % num_rows
    i_f = (pid // num_rows) % tl.cdiv(F, BF)
    i_p = pid // num_rows // tl.cdiv(F, BF)
    if SUM_SAMPLES:
        gene = row.to(tl.int64)
        begin = (i_p * part).to(tl.int64)
        stop = tl.minimum(begin + part, count)
    else:
        gene = tl.load(target_ptr + row)
        begin = _sample(targetptr_ptr, row.to(tl.int64), num_sets, num_bisections) - first
        stop = tl.where((begin >= 0) & (begin < count), begin + 1, begin)
    is_gene = (gene >= 0) & (gene < num_genes)
    # [BF]
    o_f = i_f * BF + tl.arange(0, BF)
    m_f, m_x = o_f < F, o_f < W
    # [EDGES]
    o_e = tl.arange(0, EDGES)
    # [EDGES, BF]
    b_sum = tl.zeros([EDGES, BF], dtype=tl.float32)
    for sample in range(begin, stop):
        t = row
        if SUM_SAMPLES:
            t = tl.load(receive_ptr + sample * num_genes + gene)
        wanted = is_gene & (t >= 0)
        p_place = place_ptr + sample * num_genes
        for r in range(r_first, r_last):
            o_row = tl.load(relations_ptr + r) * num_genes + tl.where(is_gene, gene, 0)
            start, end = span(rowptr_ptr, o_row, num_entries, wanted)
            scale = 1.0
            if TARGET_SCALE:
                scale = tl.load(target_scale_ptr + t.to(tl.int64) * num_relations + r, mask=wanted, other=0.0)
            # Entries lead to places and places to rows: the next steps' are on their way, as in row_dot_bwd_kernel_dk.
            b_col, b_value = entries(col_ptr, value_ptr, start + o_e, end, True)
            b_p = _places(p_place, b_col, num_genes)
            b_next, b_next_value = entries(col_ptr, value_ptr, start + EDGES + o_e, end, True)
            for e in range(start, end, EDGES):
                b_last, b_last_value = entries(col_ptr, value_ptr, e + 2 * EDGES + o_e, end, True)
                b_next_p = _places(p_place, b_next, num_genes)
                m_e = b_p >= 0
                b_w = tl.where(m_e, b_value, 0.0).to(tl.float32) * scale
                o_p = b_p.to(tl.int64)
                if SOURCE_SCALE:
                    b_w *= tl.load(source_scale_ptr + o_p * num_relations + r, mask=m_e, other=0.0)
                if X_EACH:
                    o_p = o_p * num_relations + r
                p_b = x_ptr + o_p[:, None] * ROW + o_f[None, :]
                b_x = tl.load(p_b, mask=m_e[:, None] & m_x[None, :], other=0.0).to(tl.float32)
                b_sum += b_w[:, None] * b_x
                b_p, b_value = b_next_p, b_next_value
                b_next, b_next_value = b_last, b_last_value
    o_out = i_p.to(tl.int64) * num_rows + row
    if not SUM_RELATIONS:
        o_out = o_out * num_relations + r_first
    m_f &= SUM_SAMPLES or stop > begin  # a place of another launch's sample is not written
    tl.store(out_ptr + o_out * F + o_f, tl.sum(b_sum, 0).to(out_ptr.dtype.element_ty), mask=m_f)


@triton.jit(do_not_specialize=["num_genes", "num_entries", "num_relations", "num_sets", "first", "count", "num_bisections"])
def relational_degree_kernel(
    rowptr_ptr,  # int64, of the stack
    col_ptr,  # int32 [E]
    place_ptr,  # int32 [count, N]
    target_ptr,  # int64 [Vt]
    targetptr_ptr,  # int64 [B + 1]
    relations_ptr,  # int64 [K], of the stack
    out_ptr,  # int32 [Vt, K]
    num_genes,  # N
    num_entries,  # E
    num_relations,  # K
    num_sets,  # B
    first,
    count,
    num_bisections,
    EDGES: tl.constexpr,  # entries read at once
):
    pid = tl.program_id(0).to(tl.int64)
    t = pid // num_relations
    gene = tl.load(target_ptr + t)
    sample = _sample(targetptr_ptr, t, num_sets, num_bisections) - first
    mine = (sample >= 0) & (sample < count)
    is_gene = mine & (gene >= 0) & (gene < num_genes)
    p_place = place_ptr + sample * num_genes
    o_row = tl.load(relations_ptr + pid % num_relations) * num_genes + tl.where(is_gene, gene, 0)
    start, end = span(rowptr_ptr, o_row, num_entries, is_gene)
    # [EDGES]
    o_e = tl.arange(0, EDGES)
    b_count = tl.zeros([EDGES], dtype=tl.int32)
    for e in range(start, end, EDGES):
        b_col = tl.load(col_ptr + e + o_e, mask=e + o_e < end, other=-1)
        b_count += (_places(p_place, b_col, num_genes) >= 0).to(tl.int32)
    tl.store(out_ptr + pid, tl.sum(b_count, 0), mask=mine)


# ----------------------------------------------------------------------------------------------------------- launchers


def relational_spmm(
    rowptr: Tensor,
    col: Tensor,
    value: Tensor,
    x: Tensor,
    source: Tensor,
    source_ptr: Tensor,
    target: Tensor,
    target_ptr: Tensor,
    source_scale: Tensor | None,
    target_scale: Tensor | None,
    relations: Sequence[int],
    num_nodes: int,
    shared: bool,
    sum_relations: bool,
    sum_samples: bool,
) -> Tensor:
    """out [Vt, (K,) F] in the dtype of x, [N, (K,) F] with `sum_samples`; the operator `cellattn::relational_spmm`."""
    num_sets = _check_between(rowptr, col, source, source_ptr, target, target_ptr, relations, num_nodes)
    k, senders, receivers = len(relations), num_nodes if shared else source.shape[0], target.shape[0]
    check_dtype("x", x)
    require(
        x.ndim in (2, 3) and x.shape[0] == senders and (x.ndim == 2 or x.shape[1] == k),
        lambda: f"x: expected shape [{senders}, {k}, F] or [{senders}, F], got {list(x.shape)}",
    )
    require_tensor("value", value, ndim=1, dtypes=(torch.float32,))
    require_same("size", col=col.shape[0], value=value.shape[0])
    for name, scale, size in (("source_scale", source_scale, senders), ("target_scale", target_scale, receivers)):
        if scale is not None:
            require_tensor(name, scale, ndim=2, dtypes=(torch.float32,))
            require_same("shape", **{"places and relations": (size, k), name: tuple(scale.shape)})
    check_devices(rowptr=rowptr, value=value, x=x, source_scale=source_scale, target_scale=target_scale)
    f, num_rows = x.shape[-1], num_nodes if sum_samples else receivers
    shape = (num_rows, f) if sum_relations else (num_rows, k, f)
    if 0 in shape or k == 0 or num_sets == 0:
        return torch.zeros(shape, dtype=x.dtype, device=x.device)
    rows, block = rows_of(x), min(padded(f), MAX_BLOCK)
    ids = device_ints(tuple(relations), x.device)
    scales = [None if scale is None else scale.contiguous() for scale in (source_scale, target_scale)]
    graph = rowptr.contiguous(), col.contiguous(), value.contiguous()
    source, source_ptr, target, target_ptr = (t.contiguous() for t in (source, source_ptr, target, target_ptr))
    programs = triton.cdiv(f, block) * num_rows * (1 if sum_relations else k)
    num_parts = max(1, min(PARTS, PART_BYTES // (4 * prod(shape)))) if sum_samples else 1
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    total = None  # of the launches so far
    for first, count in _launches(num_sets, num_nodes):
        place = _table(source, source_ptr, num_nodes, first, count, shared=shared)
        receive = _table(target, target_ptr, num_nodes, first, count, shared=False) if sum_samples else None
        part = triton.cdiv(count, num_parts)
        parts = triton.cdiv(count, part) if sum_samples else 1
        sums = torch.empty(parts, *shape, dtype=torch.float32, device=x.device) if sum_samples else out

        def launch(tile: Gather) -> None:
            relational_spmm_kernel[grid_of(parts * programs, x=x, target=target)](
                *graph, rows, place, target, target_ptr, receive, ids, *scales, sums,
                num_rows, num_nodes, col.shape[0], k, num_sets, part, first, count, num_sets.bit_length(),
                X_EACH=x.ndim == 3, SUM_RELATIONS=sum_relations, SUM_SAMPLES=sum_samples,
                SOURCE_SCALE=source_scale is not None, TARGET_SCALE=target_scale is not None, F=f, W=width(f, x.dtype),
                ROW=rows.stride(0), BF=block, EDGES=tile.rows, **tile.options,
            )  # fmt: skip

        with on_device(x):
            choose_gather("relational_spmm", x, block, launch)
        if sum_samples:
            total = sums.sum(0) if total is None else total.add_(sums.sum(0))
    return out if total is None else total.to(x.dtype)


def relational_degree(
    rowptr: Tensor,
    col: Tensor,
    source: Tensor,
    source_ptr: Tensor,
    target: Tensor,
    target_ptr: Tensor,
    relations: Sequence[int],
    num_nodes: int,
) -> Tensor:
    """int32 [Vt, K]; the operator `cellattn::relational_degree`."""
    num_sets = _check_between(rowptr, col, source, source_ptr, target, target_ptr, relations, num_nodes)
    out = torch.empty(target.shape[0], len(relations), dtype=torch.int32, device=target.device)
    if out.numel() == 0:
        return out
    grid = grid_of(out.numel(), degrees=out)
    source, source_ptr, target, target_ptr = (t.contiguous() for t in (source, source_ptr, target, target_ptr))
    for first, count in _launches(num_sets, num_nodes):
        place = _table(source, source_ptr, num_nodes, first, count, shared=False)
        with on_device(target):
            relational_degree_kernel[grid](
                rowptr.contiguous(), col.contiguous(), place, target, target_ptr,
                device_ints(tuple(relations), target.device), out, num_nodes, col.shape[0], len(relations), num_sets,
                first, count, num_sets.bit_length(), EDGES=64, **options(1),
            )  # fmt: skip
    return out


def _check_between(
    rowptr: Tensor, col: Tensor, source: Tensor, source_ptr: Tensor, target: Tensor, target_ptr: Tensor,
    relations: Sequence[int], num_nodes: int,
) -> int:  # fmt: skip
    """Check the stack, the relations and the shapes of the batches; B."""
    require_tensor("rowptr", rowptr, ndim=1, dtypes=(torch.int64,))
    require_tensor("col", col, ndim=1, dtypes=(torch.int32,))
    require(1 <= num_nodes <= INT32_MAX, lambda: f"num_nodes: expected 1 to {INT32_MAX} genes, got {num_nodes}")
    stacked = (rowptr.shape[0] - 1) // num_nodes
    require(
        rowptr.shape[0] == stacked * num_nodes + 1,
        lambda: f"rowptr: expected a multiple of {num_nodes} entries and one more, got {rowptr.shape[0]}",
    )
    outside = [r for r in relations if not 0 <= r < stacked]
    require(not outside, lambda: f"relations: expected indices in [0, {stacked}), got {outside[0]}")
    for name, genes, ptr in (("source", source, source_ptr), ("target", target, target_ptr)):
        require_tensor(name, genes, ndim=1, dtypes=(torch.int64,))
        require_tensor(f"{name}_ptr", ptr, ndim=1, dtypes=(torch.int64,))
        require(ptr.shape[0] >= 1, f"{name}_ptr: expected at least one entry, got none")
        require(
            ptr.shape[0] > 1 or genes.shape[0] == 0, lambda: f"{name}_ptr: expected to end with {genes.shape[0]}, got one entry"
        )
        require(genes.shape[0] <= INT32_MAX, lambda: f"{name}: expected at most {INT32_MAX} places, got {genes.shape[0]}")
    require_same("size", source_ptr=source_ptr.shape[0], target_ptr=target_ptr.shape[0])
    check_devices(rowptr=rowptr, col=col, source=source, source_ptr=source_ptr, target=target, target_ptr=target_ptr)
    return source_ptr.shape[0] - 1


def _launches(num_sets: int, num_nodes: int) -> list[tuple[int, int]]:
    """(first sample, number of samples) of each launch, whose tables of places are of bounded size."""
    most = max(1, TABLE_BYTES // (4 * num_nodes))
    return [(first, min(most, num_sets - first)) for first in range(0, num_sets, most)]


def _table(genes: Tensor, ptr: Tensor, num_nodes: int, first: int, count: int, *, shared: bool) -> Tensor:
    """int32 [count, N]: the place of each gene, or itself where features are shared; -1 where it is not in the sample."""
    table = torch.full((count, num_nodes), -1, dtype=torch.int32, device=genes.device)
    num_sets, num_places = ptr.shape[0] - 1, genes.shape[0]
    if num_places > 0:
        with on_device(genes):
            place_table_kernel[grid_of(triton.cdiv(num_places, 256), genes=genes)](
                genes, ptr, table, num_places, num_sets, num_nodes, first, count, num_sets.bit_length(), SHARED=shared,
                BLOCK=256, **options(4),
            )  # fmt: skip
    return table
