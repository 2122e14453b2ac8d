"""CSR: a relation by rows and by columns; on the CPU, row subsets and products through PyTorch's sparse kernels."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph import MultiGraph

with warnings.catch_warnings():  # PyTorch says once that its CSR support is in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))


def both_ways(graph: MultiGraph, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rowptr, col, colptr, row, edge) of one relation alone: entry p by columns is entry edge[p] by rows."""
    if torch.compiler.is_compiling():
        return _both_ways(graph, r)
    return graph.once(("both ways", r), lambda: _both_ways(graph, r))


def _both_ways(graph: MultiGraph, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    name, n = graph.relations[r], graph.num_nodes
    first = sum(graph.num_edges(other) for other in graph.relations[:r])
    here = slice(first, first + graph.num_edges(name))
    colptr, row, edge = graph.transpose()
    return graph.rowptr(name), graph.col(name), colptr[r * n : (r + 1) * n + 1] - first, row[here], edge[here] - first


def block_diagonal(graph: MultiGraph, relations: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rowptr, col, colptr, row, edge) of K relations as one matrix of K blocks of N x N."""
    n, ids = graph.num_nodes, [graph.relation_id(relation) for relation in relations]
    rowptr, col, _ = graph.stacked
    colptr, row, edge = graph.transpose()
    starts = list(itertools.accumulate((graph.num_edges(relation) for relation in graph.relations), initial=0))
    parts = [slice(starts[r], starts[r + 1]) for r in ids]
    size = sum(part.stop - part.start for part in parts)
    if ids != list(range(len(graph.relations))):  # else they are stacked as they are
        rowptr, colptr = (_stacked([ptr[r * n : (r + 1) * n + 1] for r in ids]) for ptr in (rowptr, colptr))
    first = rowptr[::n]  # [K + 1]
    num_edges = first.diff()
    block = torch.arange(0, len(ids) * n, n, dtype=col.dtype, device=col.device)
    shift = first[:-1] - torch.stack([graph.stacked[0][r * n] for r in ids])
    block, shift = (x.repeat_interleave(num_edges, output_size=size) for x in (block, shift))
    col, row, edge = (torch.cat([x[part] for part in parts]) for x in (col, row, edge))
    return rowptr, col + block, colptr, row + block, edge + shift


def _stacked(pointers: Sequence[Tensor]) -> Tensor:
    """Of CSR matrices one below the other."""
    degree = torch.cat([ptr.diff() for ptr in pointers])
    return F.pad(degree.cumsum(0), (1, 0))


def take_rows(rowptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(ptr [R + 1] of the chosen rows put one below the other, entry [E_R]: their entries in the whole graph)."""
    start = rowptr[rows]
    degree = rowptr[rows + 1] - start
    ptr = torch.zeros(rows.numel() + 1, dtype=torch.int64)
    torch.cumsum(degree, 0, out=ptr[1:])
    entry = torch.arange(int(ptr[-1])) + (start - ptr[:-1]).repeat_interleave(degree)
    return ptr, entry


def spmm(ptr: Tensor, col: Tensor, value: Tensor, num_cols: int, x: Tensor) -> Tensor:
    """CSR [R, num_cols] times x [num_cols, F], row by row in a fixed order, so equal from run to run."""
    return _csr(ptr, col, value, num_cols) @ x


def sddmm(ptr: Tensor, col: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One value an entry: a[row] . b[col], with a [R, D], b [C, D] -> [E]; an entry may stand several times."""
    if col.numel() > a.shape[0] * b.shape[0]:  # PyTorch refuses more entries than a matrix of this shape can hold
        row = torch.arange(a.shape[0]).repeat_interleave(ptr.diff())
        return (a @ b.mT)[row, col.long()]
    zeros = _csr(ptr, col, a.new_zeros(col.numel()), b.shape[0])
    return torch.sparse.sampled_addmm(zeros, a.contiguous(), b.t(), beta=0.0).values()


def _csr(ptr: Tensor, col: Tensor, value: Tensor, num_cols: int) -> Tensor:
    shape = (ptr.numel() - 1, num_cols)
    return torch.sparse_csr_tensor(ptr.to(col.dtype), col, value, shape, check_invariants=False)
