"""Facts of the stacked rows that a graph keeps: its transpose, where long rows are cut, and the constants of the targets."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import ParamSpec

from .._check import require
from .._extension import AVAILABLE, fake
from .._modes import without_function_modes

_P = ParamSpec("_P")
_R = TypeVar("_R")

_PACKED = 1 << 22  # entries that are turned into bits together, at most
USUAL_MASS = 2.0**24  # of a row's weights, and its inverse: beyond, sums over them are scaled
_EXPONENT = -1 << 52  # of a float64, of which the lower 52 bits are the fraction
SEGMENT = 1024  # entries of a row or column that one GPU program walks at most; why so many stands in kernels/row_dot.py


def of_any_mode(make: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make what a graph keeps outside of the modes that are on.

    What is first asked for in inference mode serves training too; what is first asked for under fake tensors or by torch.export
    holds values; what is made under another default device is where the graph is; what is first asked for within a transform of
    torch.func is none of its tensors, which have no storage once it ends.
    """

    @without_function_modes
    @functools.wraps(make)
    def outside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_dynamo_compiling():
            return make(*args, **kwargs)
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if torch._C._len_torch_dispatch_stack():
                stack.enter_context(_disable_current_modes())
            if transforms_active():
                stack.enter_context(temporarily_clear_interpreter_stack())
            return make(*args, **kwargs)

    return outside


class Transpose(NamedTuple):
    """The stacked graph by columns: entry p of stacked column r * N + j is relation r's edge (row[p], j), CSR entry edge[p]."""

    colptr: Tensor  # int64 [K * N + 1]
    row: Tensor  # int32 [E]
    edge: Tensor  # int64 [E]


@dataclass(frozen=True, eq=False)
class Relation:
    """One relation of a graph, `graph["physical"]`: the graph's own arrays, not copies.

    Attributes:
        name: of the relation.
        rowptr, col, weight: CSR, int64 [N + 1], int32 [E] (columns ascending within a row) and float [E].
        known: bool [N], genes measured in the relation.
    """

    name: str
    rowptr: Tensor
    col: Tensor
    weight: Tensor
    known: Tensor

    @property
    def num_edges(self) -> int:
        """Stored entries."""
        return self.col.numel()

    @property
    def degree(self) -> Tensor:
        """int64 [N]: entries of each row."""
        return self.rowptr.diff()

    @property
    def edge_index(self) -> Tensor:
        """int64 [2, E], sorted by row, then column; the order of `weight`."""
        rows = torch.arange(self.known.numel(), device=self.col.device).repeat_interleave(self.degree)
        return torch.stack([rows, self.col.long()])

    def to_sparse_csr(self) -> Tensor:
        """A as a sparse CSR tensor [N, N]."""
        n = self.known.numel()
        return torch.sparse_csr_tensor(self.rowptr, self.col.long(), self.weight, (n, n), device=self.col.device)

    def __repr__(self) -> str:
        return f"Relation({self.name!r}, num_nodes={self.known.numel()}, num_edges={self.num_edges}, device={self.col.device})"


class Segments(NamedTuple):
    """Where long rows of the stacked graph are cut: row i into ptr[i + 1] - ptr[i] segments, none if it is left whole.

    They are as even as can be: the s-th of n segments of a row with d entries holds its entries s * d // n to (s + 1) * d // n.
    """

    ptr: Tensor  # int64 [K * N + 1]
    row: Tensor  # int64 [S], the stacked row of each segment
    offset: tuple[int, ...]  # [K + 1], on the host: relation r has the segments offset[r] to offset[r + 1]


class Bits(NamedTuple):
    """A relation as one bit a pair: bit j % 64 of by_row[i, j // 64] is A[i, j] > 0; by_column is the same of Aᵀ."""

    by_row: Tensor  # int64 [N, ceil(N / 64)]
    by_column: Tensor


class Targets(NamedTuple):
    """Constants of the rows t_ij = w_ij / sum_j w_ij."""

    inv_mass: Tensor  # [K, N]: 1 / sum_j w_ij, 0 for a row without edges
    entropy: Tensor  # [K, N]: sum_j t_ij log t_ij (natural log), 0 for a row without edges
    without_edge: Tensor  # bool [K, N]
    num_counted: Tensor  # int64 [K]: rows with an edge, at least 1


class Scaled(NamedTuple):
    """Weights w_ij / u_i: u_i is 1, or of a row of unusual mass a power of two, by which that is in [1, 2)."""

    by_row: Tensor  # [E], as the stack has them
    by_column: Tensor
    unit: Tensor | None  # u, float64 [K, N]; None where all are 1


def unit_of(weight: Tensor) -> float:
    """1, or where the largest or smallest of some weights but zeros is very large or small, a power of two midway between.

    Midway, since of rows that are much lighter than others nothing is left beside the heaviest in float32.
    """
    some = weight[weight > 0]
    smallest, largest = (float(x) for x in some.aminmax()) if some.numel() else (1.0, 1.0)
    if smallest >= 1 / USUAL_MASS and largest <= USUAL_MASS:
        return 1.0
    return 2.0 ** ((math.frexp(smallest)[1] + math.frexp(largest)[1]) // 2 - 1)


def scaled_weights(rowptr: Tensor, weight: Tensor, edge: Tensor, num_nodes: int) -> Scaled:
    """`Scaled` of the stack, whose entry p by columns is entry edge[p] by rows; exact where weights are normal numbers."""
    mass = torch.segment_reduce(weight.double(), "sum", offsets=rowptr, initial=0)
    usual = (mass == 0) | ((mass >= 1 / USUAL_MASS) & (mass <= USUAL_MASS))
    unit = (mass.view(torch.int64) & _EXPONENT).view(torch.float64).masked_fill_(usual, 1)  # 2^floor(log2(mass))
    each = unit.repeat_interleave(rowptr.diff(), output_size=weight.shape[0])
    by_row = (weight / each).to(weight.dtype)
    return Scaled(by_row, by_row.index_select(0, edge), unit.view(-1, num_nodes))


def cut_rows(degree: Tensor, num_nodes: int, longest: int = SEGMENT) -> Segments:
    """Cut each row of more than `longest` entries into the fewest segments of no more; degree int64 [K * N]."""
    count = torch.where(degree > longest, (degree + longest - 1).div(longest, rounding_mode="floor"), 0)
    ptr = count.new_zeros(count.numel() + 1)
    torch.cumsum(count, 0, out=ptr[1:])
    row = torch.arange(count.numel(), device=count.device).repeat_interleave(count)
    return Segments(ptr, row, tuple(ptr[::num_nodes].tolist()))


def bits_of(rowptr: Tensor, col: Tensor, num_nodes: int) -> Bits:
    """Pack the entries of one relation, some rows at a time: there may be as many as pairs."""
    words = [torch.zeros(num_nodes * ((num_nodes + 63) // 64), dtype=torch.int64, device=col.device) for _ in range(2)]
    step = max(_PACKED // num_nodes, 1)
    for begin in range(0, num_nodes, step):
        ptr = rowptr[begin : begin + step + 1]
        target = col[int(ptr[0]) : int(ptr[-1])].long()
        source = torch.arange(begin, begin + ptr.numel() - 1, device=col.device).repeat_interleave(ptr.diff())
        for out, i, j in ((words[0], source, target), (words[1], target, source)):
            place = i * (out.numel() // num_nodes) + (j >> 6)
            out.index_add_(0, place, torch.ones_like(j) << (j & 63))  # each bit once, so adding sets it
    return Bits(*(x.view(num_nodes, -1) for x in words))


def subgraph_rows(rowptr: Tensor, col: Tensor, nodes: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rowptr, col, edge) of the stack induced on `nodes`: nodes[m] becomes m, and entry p was entry edge[p].

    Raises:
        ValueError: the nodes are not distinct genes.
    """
    if AVAILABLE and rowptr.is_cpu and col.dtype == torch.int32 and nodes.is_contiguous():
        rows: tuple[Tensor, Tensor, Tensor] = torch.ops.cellattn.subgraph_rows.default(rowptr, col, nodes, num_nodes)
        if rows[0].numel():  # else there is something to say of the nodes
            return rows
    low, high = (int(x) for x in torch.aminmax(nodes))
    require(low >= 0 and high < num_nodes, f"nodes: got indices {low} to {high}, expected [0, {num_nodes})")
    new = torch.arange(nodes.numel(), dtype=col.dtype, device=col.device)
    label = new.new_full((num_nodes,), -1).index_copy_(0, nodes, new)
    if not torch.equal(label.index_select(0, nodes), new):
        gene, count = nodes.unique(return_counts=True)
        raise ValueError(f"nodes: expected distinct genes, got {int(gene[count > 1][0])} twice")
    # The entries of the rows that stay, one after the other, and which of them keep their column.
    shape = -1, num_nodes
    begin = rowptr[:-1].view(shape).index_select(1, nodes).view(-1)
    degree = rowptr[1:].view(shape).index_select(1, nodes).view(-1) - begin
    rowptr = F.pad(degree.cumsum(0), (1, 0))
    edge = (begin - rowptr[:-1]).repeat_interleave(degree) + torch.arange(int(rowptr[-1]), device=col.device)
    col = label.index_select(0, col.index_select(0, edge))
    kept = (col >= 0).nonzero().view(-1)
    col, edge = col.index_select(0, kept), edge.index_select(0, kept)
    rowptr = torch.searchsorted(kept, rowptr)
    # Columns are in the order of their old numbers.
    row = torch.arange(begin.numel(), device=col.device).repeat_interleave(rowptr.diff())
    order = (row * nodes.numel() + col).argsort()
    return rowptr, col.index_select(0, order), edge.index_select(0, order)


def row_targets(rowptr: Tensor, weight: Tensor, num_nodes: int) -> Targets:
    """sum_j t_ij log t_ij = (sum_j w_ij log w_ij) / mass - log mass. In float64."""
    w = weight.double()
    mass = torch.segment_reduce(w, "sum", offsets=rowptr, initial=0)
    w_log_w = torch.segment_reduce(torch.xlogy(w, w), "sum", offsets=rowptr, initial=0)
    without_edge = mass == 0
    inv_mass = mass.reciprocal().masked_fill_(without_edge, 0)
    entropy = w_log_w.mul_(inv_mass).sub_(mass.log_()).masked_fill_(without_edge, 0)
    inv_mass, entropy, without_edge = (x.view(-1, num_nodes) for x in (inv_mass, entropy, without_edge))
    return Targets(inv_mass, entropy, without_edge, (~without_edge).sum(1).clamp_min(1))


def transpose_of(rowptr: Tensor, col: Tensor, num_nodes: int) -> Transpose:
    """No shape in here depends on values, so that it can be built inside a compiled region too."""
    stacked = torch.arange(rowptr.numel(), device=rowptr.device)
    stacked_row = stacked[:-1].repeat_interleave(rowptr.diff(), output_size=col.numel())
    row = stacked_row % num_nodes
    stacked_col, edge = torch.sort(stacked_row - row + col, stable=True)  # rows stay ascending within a column
    return Transpose(torch.searchsorted(stacked_col, stacked), row[edge].to(col.dtype), edge)


@fake("subgraph_rows")
def _(rowptr: Tensor, col: Tensor, nodes: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    num_relations = (rowptr.shape[0] - 1) // num_nodes
    return rowptr.new_empty(num_relations * nodes.shape[0] + 1), col.new_empty(size), rowptr.new_empty(size)
