"""Relations made from a relation: what else a head may be taught, and random graphs to compare with.

Each function gives the rows of the new relation, sorted, without duplicates, to `MultiGraph.replaced`. Relations may be dense:
rows are made some millions of entries at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .node_types import require_one_type

if TYPE_CHECKING:
    from .multigraph import MultiGraph

_BLOCK = 1 << 22  # entries, or pairs of genes, that are looked at together
_SWAPS = 10  # of which each edge has part in on average, before a graph counts as drawn anew
_MADE = 0.8  # of the swaps that could be
_MAX_ROUNDS = 100  # where most swaps are refused, as in a graph with nearly all edges
GIVE_REVERSE = "give its reverse as a relation of its own"


class Rows(NamedTuple):
    """The rows of one relation."""

    degree: Tensor  # int64 [N]
    col: Tensor  # [E], ascending within a row
    weight: Tensor  # [E]
    known: Tensor  # bool [N]
    column_weight: Tensor | None = None  # float64 [N], W of `comembership`, 1 at tokens that are no columns


def rows_of(graph: MultiGraph, relation: str) -> Rows:
    """A relation as it is."""
    return Rows(
        graph.degree(relation), graph.col(relation), graph.weight(relation), graph.known(relation),
        graph._all_column_weights(relation),
    )  # fmt: skip


def hops(graph: MultiGraph, relation: str, k: int) -> Rows:
    """The neighbours of i, and what is reached from them along k - 1 edges more: `khop_mask` with the rows as its sets."""
    from ..ops import khop_mask  # the ops stand above the graph

    if k > 1:
        instead = "a walk along it has one edge, k = 1; `comembership` is of those that share"
        require_one_type("relation", relation, graph.joins(relation), instead)
    old, n = rows_of(graph, relation), graph.num_nodes
    rowptr = graph.rowptr(relation)
    alone = graph.select([relation])
    step = max(_BLOCK // n, 1)
    blocks = []
    for begin in range(0, n, step):
        ptr = rowptr[begin : begin + step + 1]
        seeds = old.col[int(ptr[0]) : int(ptr[-1])].long()
        reached = khop_mask(alone, seeds, ptr - ptr[0], k - 1, direction="out")
        blocks.append((reached.sum(1), reached.nonzero()[:, 1].to(old.col.dtype)))
    degree, col = (torch.cat(part) for part in zip(*blocks, strict=True))
    return old._replace(degree=degree, col=col, weight=old.weight.new_ones(col.numel()))


def symmetrized(graph: MultiGraph, relation: str) -> Rows:
    """max(A, Aᵀ)."""
    require_one_type("relation", relation, graph.joins(relation), GIVE_REVERSE)
    return _from_blocks(graph, relation, _with_reverse(graph.select([relation]), relation))


def with_self_loops(graph: MultiGraph, relation: str) -> Rows:
    """A loop of weight 1 at each known gene that has none."""
    require_one_type("relation", relation, graph.joins(relation), "`edge_attention` lets each token see itself without")

    def blocks() -> Iterator[_Entries]:
        known = graph.known(relation)
        for begin, end, (row, col, weight) in _by_rows(graph, relation):
            without = known[begin:end].clone()
            without[row[row == col] - begin] = False
            gene = without.nonzero()[:, 0] + begin
            yield _Entries(torch.cat([row, gene]), torch.cat([col, gene]), torch.cat([weight, weight.new_ones(gene.numel())]))

    return _from_blocks(graph, relation, blocks())


def without_self_loops(graph: MultiGraph, relation: str) -> Rows:
    """All edges but those from a gene to itself."""
    blocks = (_Entries(*(x[row != col] for x in (row, col, w))) for _, _, (row, col, w) in _by_rows(graph, relation))
    return _from_blocks(graph, relation, blocks)


class _Entries(NamedTuple):
    row: Tensor  # int64
    col: Tensor  # int64
    weight: Tensor


def _by_rows(graph: MultiGraph, relation: str) -> Iterator[tuple[int, int, _Entries]]:
    """(first row, past the last, their entries), some rows at a time."""
    rowptr, col, weight = graph.rowptr(relation), graph.col(relation), graph.weight(relation)
    for begin, end in _row_blocks(rowptr):
        at = slice(int(rowptr[begin]), int(rowptr[end]))
        row = torch.arange(begin, end, device=col.device).repeat_interleave(rowptr[begin : end + 1].diff())
        yield begin, end, _Entries(row, col[at].long(), weight[at])


def _with_reverse(graph: MultiGraph, relation: str) -> Iterator[_Entries]:
    """The rows of A and of Aᵀ together, of a graph of this relation alone."""
    (rowptr, col, weight), (colptr, row, reverse) = graph.stacked, graph.stacked_by_column()
    for begin, end in _row_blocks(rowptr + colptr):
        parts = []
        for ptr, other, w in ((rowptr, col, weight), (colptr, row, reverse)):
            at = slice(int(ptr[begin]), int(ptr[end]))
            mine = torch.arange(begin, end, device=col.device).repeat_interleave(ptr[begin : end + 1].diff())
            parts.append((mine, other[at].long(), w[at]))
        yield _Entries(*(torch.cat(pair) for pair in zip(*parts, strict=True)))


def _row_blocks(ptr: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `_BLOCK` entries, and at least one row."""
    n, begin = ptr.numel() - 1, 0
    while begin < n:
        end = int(torch.searchsorted(ptr, ptr[begin] + _BLOCK, right=True)) - 1
        end = min(max(end, begin + 1), n)
        yield begin, end
        begin = end


def _from_blocks(graph: MultiGraph, relation: str, blocks: Iterable[_Entries]) -> Rows:
    """Sort the entries of each block; of several at one place the heaviest stays."""
    old, n = rows_of(graph, relation), graph.num_nodes
    degree, cols, weights = torch.zeros_like(old.degree), [old.col[:0]], [old.weight[:0]]
    for row, col, weight in blocks:
        key, place = torch.unique(row * n + col, return_inverse=True)
        degree += torch.div(key, n, rounding_mode="floor").bincount(minlength=n)
        cols.append((key % n).to(old.col.dtype))
        weights.append(weight.new_zeros(key.numel()).scatter_reduce_(0, place, weight, reduce="amax"))
    return old._replace(degree=degree, col=torch.cat(cols), weight=torch.cat(weights))


# ------------------------------------------------------------------------------------------------------------ controls


def permuted(graph: MultiGraph, relation: str, seed: int) -> Rows:
    """Known tokens of a type take each other's places: the same in all relations in which the same ones are known."""
    old = rows_of(graph, relation)
    known = old.known.cpu().nonzero()[:, 0].numpy()
    draw = np.random.default_rng(seed).random(graph.num_nodes)  # of all tokens, so that relations agree
    place = np.arange(graph.num_nodes)
    for at in graph.node_types.values():
        mine = known[(known >= at.start) & (known < at.stop)]
        place[mine] = mine[np.argsort(draw[mine], kind="stable")]
    source, target = place[graph.edge_index(relation).cpu().numpy()]
    made = _from_edges(graph, relation, source, target, old.weight.cpu().numpy())
    if old.column_weight is None:
        return made
    there = torch.from_numpy(place).to(old.column_weight.device)
    return made._replace(column_weight=torch.empty_like(old.column_weight).index_copy_(0, there, old.column_weight))


def rewired(graph: MultiGraph, relation: str, seed: int) -> Rows:
    """Edges swap targets until each has taken part in `_SWAPS` swaps on average (Maslov and Sneppen 2002).

    Two edges a -> b and c -> d become a -> d and c -> b, unless one of these is there, is proposed twice or is a loop: so no
    degree changes. A symmetric relation swaps pairs, {a, b} and {c, d}. Loops stay where they are.
    """
    rng = np.random.default_rng([seed, zlib.crc32(relation.encode())])
    alone = graph.select([relation])
    row, col = alone.edge_index(relation).cpu().numpy()
    weight = alone.weight(relation).cpu().numpy()
    colptr, by_column, reverse = (x.cpu() for x in alone.stacked_by_column())
    is_symmetric = torch.equal(colptr, alone.stacked[0].cpu()) and torch.equal(by_column, alone.stacked[1].cpu())
    moves = (row < col) if is_symmetric else (row != col)
    source, target = _swapped(row[moves], col[moves], graph.num_nodes, is_symmetric, rng)
    dealt = rng.permutation(len(source))
    ends = [(source, target, weight[moves][dealt])]
    if is_symmetric:
        ends.append((target, source, reverse.numpy()[moves][dealt]))
    loops = row == col
    ends.append((row[loops], col[loops], weight[loops]))
    return _from_edges(graph, relation, *(np.concatenate(part) for part in zip(*ends, strict=True)))


def _swapped(
    source: np.ndarray, target: np.ndarray, num_nodes: int, is_symmetric: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Edges after random swaps, proposed in rounds in which each edge has a partner; of a symmetric relation, one of both ways.

    Rounds go on until there were enough swaps, and as many again: where a draw ends must not depend on what was drawn. For the
    same reason a swap that could be made is left out now and then. Without that, the number of swaps would give the sign of a
    permutation away.
    """
    source, target = source.copy(), target.copy()
    num_edges, num_swaps, num_rounds = len(source), 0, 0
    while num_edges > 1 and 4 * num_swaps < _SWAPS * num_edges and num_rounds < _MAX_ROUNDS // 2:
        num_swaps += _swap_round(source, target, num_nodes, is_symmetric, rng)
        num_rounds += 1
    for _ in range(num_rounds):
        _swap_round(source, target, num_nodes, is_symmetric, rng)
    return source, target


def _swap_round(source: np.ndarray, target: np.ndarray, num_nodes: int, is_symmetric: bool, rng: np.random.Generator) -> int:
    """One round, in place; how many swaps were made."""

    def key_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.minimum(a, b) * num_nodes + np.maximum(a, b) if is_symmetric else a * num_nodes + b

    half = len(source) // 2
    order = rng.permutation(len(source))
    first, second = order[:half], order[half : 2 * half]
    if is_symmetric:  # either end of a pair may be the one that moves
        turned = first[rng.random(half) < 0.5]
        source[turned], target[turned] = target[turned], source[turned]
    a, b, c, d = source[first], target[first], source[second], target[second]
    there = np.sort(key_of(source, target))
    made = np.concatenate([key_of(a, d), key_of(c, b)])
    by_key = np.argsort(made)
    made = made[by_key]
    taken = there[np.minimum(np.searchsorted(there, made), len(there) - 1)] == made
    again = made[1:] == made[:-1]
    taken[1:] |= again
    taken[:-1] |= again
    refused = np.empty_like(taken)
    refused[by_key] = taken
    fine = ~(refused[:half] | refused[half:] | (a == d) | (c == b)) & (rng.random(half) < _MADE)
    target[first[fine]], target[second[fine]] = d[fine], b[fine]
    return int(fine.sum())


def _from_edges(graph: MultiGraph, relation: str, source: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Rows:
    """Distinct edges in any order, on the host, as the rows of the relation that they replace."""
    old = rows_of(graph, relation)
    order = np.argsort(source * graph.num_nodes + target)
    degree = torch.from_numpy(np.bincount(source, minlength=graph.num_nodes))
    col, dealt = torch.from_numpy(target[order]), torch.from_numpy(weight[order])
    return old._replace(degree=degree.to(old.degree), col=col.to(old.col), weight=dealt.to(old.weight))
