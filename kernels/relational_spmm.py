"""Triton kernels of `cellattn::relational_spmm` and `relational_degree`: products with several graphs between gene subsets.

For the place t of gene i in target_b, over the entries (i, j) of each relation r whose gene j sends, p its place in source_b,

    out_tr = target_scale_tr sum_j v^r_ij source_scale_pr x_pr

A table [B, N] says which place a gene has, -1 for one that does not send: a row of x is read only where there is one. The
table is written by a scatter to distinct positions, samples of places are found by bisection: nothing waits for the device.

relational_spmm. A program takes one place t, for all relations where they are summed and for one where they are not, and EDGES
entries at once, as in `row_dot`, whose docstring counts the steps. Relations follow each other and then places, in order over
the whole chip, so that what is gathered at one time belongs to few samples, which L2 holds (7.6 MB a sample at N = 6,607, nine
relations and 64 features of 16 bits). Scales are factors of the entries: one sum is kept over all relations.

Features that all samples share have a gradient summed over samples. A program then takes a gene for a part of the batch,
sample after sample, and the parts are added at the end, in order: PARTS of them, so that a hub's row is not walked B times
by one program while the others have finished. By count, not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellattn._check import require, require_same, require_tensor

from .config import Gather, choose_gather, on_device, options
from .masked_spmm import MAX_BLOCK, entries, span
from .row_dot import device_ints
from .tensors import DTYPES, check_devices, padded

PARTS = 8  # of the batch, where samples are summed
INT32_MAX = 2**31 - 1

# --------------------------------------------------------------------------------------------------------- device code
# Sizes: B samples, N genes, E entries, K relations, F features, Vs and Vt places that send and receive. Rows of x have F
# features, a constant, because only then does the compiler load them in wide pieces.


@triton.jit
def _places(p_place, b_col, num_genes):
    """The places of genes b_col [EDGES], -1 for what does not send or is no gene."""
    return tl.load(p_place + b_col, mask=(b_col >= 0) & (b_col < num_genes), other=-1)


@triton.jit(do_not_specialize=["num_rows", "num_genes", "num_entries", "num_relations", "num_sets", "part"])
def relational_spmm_kernel(
    rowptr_ptr,  # int64, of the stack
    col_ptr,  # int32 [E]
    value_ptr,  # float32 [E]
    x_ptr,  # [Vs, K, F] if X_EACH, else [Vs, F]; N in place of Vs where samples share it
    place_ptr,  # int32 [B, N]: rows of x
    target_ptr,  # int64 [Vt]; not read if SUM_SAMPLES
    sample_ptr,  # int64 [Vt]; not read if SUM_SAMPLES
    receive_ptr,  # int32 [B, N]: places among the Vt; not read unless SUM_SAMPLES
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
    X_EACH: tl.constexpr,
    SUM_RELATIONS: tl.constexpr,
    SUM_SAMPLES: tl.constexpr,
    SOURCE_SCALE: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,  # features of a program, a power of two
    EDGES: tl.constexpr,  # entries gathered at once
):
    pid = tl.program_id(0)
    first = 0
    last = num_relations
    if not SUM_RELATIONS:
        first = pid % num_relations
        last = first + 1
        pid = pid // num_relations
    row = pid % num_rows
    i_f = (pid // num_rows) % tl.cdiv(F, BF)
    i_p = pid // num_rows // tl.cdiv(F, BF)
    if SUM_SAMPLES:
        gene = row.to(tl.int64)
        begin = (i_p * part).to(tl.int64)
        stop = tl.minimum(begin + part, num_sets)
    else:
        gene = tl.load(target_ptr + row)
        begin = tl.load(sample_ptr + row)
        stop = begin + 1
    is_gene = (gene >= 0) & (gene < num_genes)
    # [BF]
    o_f = i_f * BF + tl.arange(0, BF)
    m_f = o_f < F
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
        for r in range(first, last):
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
                p_b = x_ptr + o_p[:, None] * F + o_f[None, :]
                b_x = tl.load(p_b, mask=m_e[:, None] & m_f[None, :], other=0.0).to(tl.float32)
                b_sum += b_w[:, None] * b_x
                b_p, b_value = b_next_p, b_next_value
                b_next, b_next_value = b_last, b_last_value
    o_out = i_p.to(tl.int64) * num_rows + row
    if not SUM_RELATIONS:
        o_out = o_out * num_relations + first
    tl.store(out_ptr + o_out * F + o_f, tl.sum(b_sum, 0).to(out_ptr.dtype.element_ty), mask=m_f)


@triton.jit(do_not_specialize=["num_genes", "num_entries", "num_relations"])
def relational_degree_kernel(
    rowptr_ptr,  # int64, of the stack
    col_ptr,  # int32 [E]
    place_ptr,  # int32 [B, N]
    target_ptr,  # int64 [Vt]
    sample_ptr,  # int64 [Vt]
    relations_ptr,  # int64 [K], of the stack
    out_ptr,  # int32 [Vt, K]
    num_genes,  # N
    num_entries,  # E
    num_relations,  # K
    EDGES: tl.constexpr,  # entries read at once
):
    pid = tl.program_id(0).to(tl.int64)
    t = pid // num_relations
    gene = tl.load(target_ptr + t)
    is_gene = (gene >= 0) & (gene < num_genes)
    p_place = place_ptr + tl.load(sample_ptr + t) * num_genes
    o_row = tl.load(relations_ptr + pid % num_relations) * num_genes + tl.where(is_gene, gene, 0)
    start, end = span(rowptr_ptr, o_row, num_entries, is_gene)
    # [EDGES]
    o_e = tl.arange(0, EDGES)
    b_count = tl.zeros([EDGES], dtype=tl.int32)
    for e in range(start, end, EDGES):
        b_col = tl.load(col_ptr + e + o_e, mask=e + o_e < end, other=-1)
        b_count += (_places(p_place, b_col, num_genes) >= 0).to(tl.int32)
    tl.store(out_ptr + pid, tl.sum(b_count, 0))


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
    require_tensor("x", x, dtypes=DTYPES)
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
    part = triton.cdiv(num_sets, PARTS) if sum_samples else num_sets
    parts = triton.cdiv(num_sets, part)
    out = torch.empty(parts, *shape, dtype=torch.float32 if sum_samples else x.dtype, device=x.device)
    sample = _sample_of(target_ptr, receivers)
    place = _table(source, _sample_of(source_ptr, source.shape[0]), num_sets, num_nodes, shared=shared)
    receive = _table(target, sample, num_sets, num_nodes, shared=False) if sum_samples else None
    ids = device_ints(tuple(relations), x.device)
    scales = [None if scale is None else scale.contiguous() for scale in (source_scale, target_scale)]
    graph = rowptr.contiguous(), col.contiguous(), value.contiguous()
    x, target, block = x.contiguous(), target.contiguous(), min(padded(f), MAX_BLOCK)

    def launch(tile: Gather) -> None:
        relational_spmm_kernel[(parts * triton.cdiv(f, block) * num_rows * (1 if sum_relations else k),)](
            *graph, x, place, target, sample, receive, ids, *scales, out,
            num_rows, num_nodes, col.shape[0], k, num_sets, part,
            X_EACH=x.ndim == 3, SUM_RELATIONS=sum_relations, SUM_SAMPLES=sum_samples, SOURCE_SCALE=source_scale is not None,
            TARGET_SCALE=target_scale is not None, F=f, BF=block, EDGES=tile.rows, **tile.options,
        )  # fmt: skip

    with on_device(x):
        choose_gather("relational_spmm", x, block, launch)
    return out.sum(0).to(x.dtype) if sum_samples else out[0]


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
    place = _table(source, _sample_of(source_ptr, source.shape[0]), num_sets, num_nodes, shared=False)
    with on_device(target):
        relational_degree_kernel[(out.numel(),)](
            rowptr.contiguous(), col.contiguous(), place, target.contiguous(), _sample_of(target_ptr, target.shape[0]),
            device_ints(tuple(relations), target.device), out, num_nodes, col.shape[0], len(relations), EDGES=64, **options(1),
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


def _sample_of(ptr: Tensor, num_places: int) -> Tensor:
    """int64 [V]: the sample of each place."""
    place = torch.arange(num_places, device=ptr.device)
    return (torch.searchsorted(ptr.contiguous(), place, right=True) - 1).clamp(0, max(ptr.shape[0] - 2, 0))


def _table(genes: Tensor, sample: Tensor, num_sets: int, num_nodes: int, *, shared: bool) -> Tensor:
    """int32 [B, N]: the place of each gene, or itself where features are shared; -1 where it is not in the sample.

    What is no gene is written past the end.
    """
    table = torch.full((num_sets * num_nodes + 1,), -1, dtype=torch.int32, device=genes.device)
    at = torch.where((genes >= 0) & (genes < num_nodes), sample * num_nodes + genes, num_sets * num_nodes)
    own = genes if shared else torch.arange(genes.shape[0], device=genes.device)
    return table.scatter_(0, at, own.to(torch.int32))
