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

Where |LSE| is large, float32 leaves little of log a, as of P (see large_scores.py). Rows of LARGE, by the softmax link, are
made again in float64 by kernels of their own: the forward writes over what the others made of them, the backward leaves them
out by a dloss of 0, then writes their dq and dLSE and adds their dk. The sigmoid link needs nothing: it has no log-sum-exp, and
its terms are as exact, of themselves, as a score is of scale sum_d |q_d| |k_d|.

Here are the launchers; the kernels are in attention_bce_forward.py, attention_bce_backward.py and, those for large scores,
attention_bce_large.py, and what all of them make of an entry in attention_bce_entries.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from cellattn._aligned import wide, width

from .attention_bce_backward import (
    bce_rows_bwd_kernel_dense_dk,
    bce_rows_bwd_kernel_dense_dq,
    bce_rows_bwd_kernel_dq,
    bce_rows_bwd_kernel_edges_dk,
    bce_rows_bwd_kernel_edges_dq,
    bce_rows_bwd_kernel_operands,
    bce_rows_bwd_kernel_segments_dk,
    bce_rows_bwd_kernel_segments_dq,
)
from .attention_bce_forward import (
    bce_rows_fwd_kernel_bits,
    bce_rows_fwd_kernel_dense,
    bce_rows_fwd_kernel_edges,
    bce_rows_fwd_kernel_rest,
    bce_rows_fwd_kernel_segments,
    bce_rows_fwd_kernel_sharp,
)
from .attention_bce_large import bce_rows_bwd_kernel_large_dk, bce_rows_bwd_kernel_large_dq, bce_rows_fwd_kernel_large
from .config import Gather, Tile, choose, choose_gather, on_device, options, parts_for
from .large_scores import exactly, num_programs
from .segments import Segments
from .tensors import aligned, check_devices, check_floats, grid_of, lead_strides, padded, precision


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
        return aligned(self.q, 1, num_prefix=self.num_prefix), aligned(self.k, 1, num_prefix=self.num_prefix)

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

    @property
    def block(self) -> int:
        """Rows, or tokens, that a program copies for the dense backward; a block of them has a mark for large scores."""
        return min(64, max(8, 2048 // padded(self.q.shape[-1])))

    @property
    def of_large(self) -> tuple[Tensor | None, ...]:
        """What the passes over rows of large scores take of the graph and of the choice of pairs."""
        return self.rowptr, self.col, self.weight, self.inv_mass, self.known, *self.chosen

    def by_large(self) -> tuple[dict[str, Any], tuple[int], tuple[int]]:
        """... and what else they take, and the grids by rows and by tokens."""
        BN, compiled = exactly(padded(self.q.shape[-1]))
        constants = self.constants() | {
            "num_genes": self.num_genes, "first_row": self.relation * self.num_genes, "steps": self.num_genes.bit_length(),
            "BM": self.block, "BN": BN, "BE": 32, "DENSE": self.dense, "NORMALIZED": self.normalized, **compiled,
        }  # fmt: skip
        blocks = (self.num_leading * triton.cdiv(*x) for x in ((self.num_rows, self.block), (self.num_tokens, BN)))
        by_rows, by_tokens = (grid_of(num_programs(count, self.q.device), q=self.q) for count in blocks)
        return constants, by_rows, by_tokens

    def operands(self, dloss: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """(dloss, 0 in the rows of large scores; which blocks of rows have one, int8 [L, blocks], None for the sigmoid link;
        queries [L, R, W], LSE in base 2 [L, R], keys [L, T, W], kinds of tokens [L, T]) for the dense backward."""
        q, k = self.heads
        constants = self.constants()
        lead, w, blocks = self.num_leading, constants["W"], triton.cdiv(self.num_rows, self.block)
        softmax = self.lse is not None
        left = torch.empty_like(dloss) if softmax else dloss
        has_large = torch.empty(lead, blocks, dtype=torch.int8, device=q.device) if softmax else None
        queries = torch.empty(lead, self.num_rows, w, dtype=q.dtype, device=q.device)
        total2 = torch.empty(lead, self.num_rows, dtype=torch.float32, device=q.device)
        keys = torch.empty(lead, self.num_tokens, w, dtype=k.dtype, device=k.device)
        kind = torch.empty(lead, self.num_tokens, dtype=torch.int8, device=k.device)
        del constants["num_leading"], constants["scale"]
        programs = lead * (blocks + triton.cdiv(self.num_tokens, self.block))
        marks = (dloss, left, has_large) if softmax else (None,) * 3
        with on_device(q):
            bce_rows_bwd_kernel_operands[grid_of(programs, q=self.q)](
                *marks, q, k, self.lse, self.inv_mass, self.known, self.rows, queries, total2, keys, kind, **constants,
                num_genes=self.num_genes, first_row=self.relation * self.num_genes, BT=self.block, DENSE=self.dense,
                **options(4),
            )  # fmt: skip
        return left, has_large, (queries, total2, keys, kind)

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

    def launch_large() -> None:
        constants, by_rows, _ = p.by_large()
        bce_rows_fwd_kernel_large[by_rows](
            q, k, p.lse, *p.of_large, loss, sharp, rest, pull, PRECISION=precision(), **constants
        )

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
            launch_large()
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
    whole, has_large = g, None
    operands: tuple[Tensor | None, ...] = ()
    if over_tokens:
        g, has_large, copied = p.operands(whole)
        operands = (*copied, edges)

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

    def launch_large() -> None:
        constants, by_rows, by_tokens = p.by_large()
        exact = torch.empty(2, lead, num_rows, dtype=torch.float64, device=q.device)
        inputs = whole, q, k, p.lse, *p.of_large, *known_sharp[::2], has_large, exact
        bce_rows_bwd_kernel_large_dq[by_rows](*inputs, rows_dq, dlse, D=d, PRECISION=precision(), **constants)
        bce_rows_bwd_kernel_large_dk[by_tokens](*inputs, dk, D=d, **constants)

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
        if softmax:
            launch_large()
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
