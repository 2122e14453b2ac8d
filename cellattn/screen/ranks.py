"""The combinatorial number system: sets of genes as whole numbers, exact to 2^62.

A set of positions c_1 < c_2 < ... < c_k has the rank sum of C(c_i, i), its place among all such sets in colexicographic order,
in which neighbours share their largest members; it does not depend on how many positions there are. Where each position comes
in T variants, as genes do in perturbation types, item c T + t is position c in variant t. A set of items, no position twice,
has the rank sum of C(c_i, i) T^i + t_i C(c_i, i - 1) T^(i - 1): again its place in colexicographic order, now of items.

Source: Knuth, The Art of Computer Programming 4A, 7.2.1.3, theorem L.
"""

from __future__ import annotations

from math import comb
from typing import Any

import torch
from torch import Tensor

from .._check import count_of, require, require_tensor, values_visible

MAX_ORDER = 4
MAX_RANKS = 2**62


def set_of(rank: Tensor, n: int, k: int) -> Tensor:
    """The set of k positions out of n that has this rank.

    Args:
        rank: int64 [...], 0 to C(n, k) - 1.
        n: positions to choose from.
        k: members of a set, 1 to 4.

    Returns:
        int64 [..., k] on the device of `rank`, ascending within a set, each 0 to n - 1.

    Raises:
        ValueError: a rank out of range, k out of range, or more than 2^62 sets.
    """
    require_tensor("rank", rank, dtypes=(torch.int64,))
    n = count_of("n", n)
    k = order_of("k", k)
    require_ranks("rank", rank, num_sets(n, k))
    return torch.stack(items_of(rank, k), -1)


def rank_of(sets: Tensor) -> Tensor:
    """The rank of a set, the inverse of `set_of`.

    Args:
        sets: int64 [..., k] with k of 1 to 4, ascending within a set, none negative.

    Returns:
        int64 [...] on the device of `sets`.

    Raises:
        ValueError: k out of range, or a set that does not ascend from 0 or more, or has a rank of more than 2^62.
    """
    require_tensor("sets", sets, dtypes=(torch.int64,))
    require(sets.ndim > 0, "sets: expected shape [..., k], got a single number")
    order_of("sets: last dimension", sets.shape[-1])
    if sets.numel() and values_visible(sets):
        rises = sets.diff(dim=-1, prepend=torch.full_like(sets[..., :1], -1)) > 0
        if not rises.all():
            bad = sets[(~rises).any(-1)][0] if sets.ndim > 1 else sets
            raise ValueError(f"sets: expected positions that ascend from 0 or more within a set, got {bad.tolist()}")
        num_sets(int(sets[..., -1].max()) + 1, sets.shape[-1])
    return rank_of_items(list(sets.unbind(-1)))


def num_sets(n: int, k: int, num_types: int = 1) -> int:
    """C(n, k) num_types^k, refused where it is more than 2^62."""
    total = comb(n, k) * num_types**k
    require(total <= MAX_RANKS, lambda: f"{total:,} sets of {k} out of {n:,} are more than the 2^62 that can be numbered")
    return total


def items_of(rank: Tensor, k: int, num_types: int = 1) -> list[Tensor]:
    """Items of the sets with these ranks, one tensor like `rank` for each of the k members, ascending."""
    items = []
    for i in range(k, 0, -1):
        power = num_types**i
        place = _largest(rank if power == 1 else rank // power, i)
        rank = rank - binomial(place, i) * power
        if power > 1:
            each = binomial(place, i - 1) * (power // num_types)
            kind = rank // each
            rank = rank - kind * each
            place = place * num_types + kind
        items.append(place)
    return items[::-1]


def rank_of_items(items: list[Tensor], num_types: int = 1) -> Tensor:
    """Ranks of sets of items, given as one tensor for each member, ascending."""
    return sum((starts_of(item, i, num_types) for i, item in enumerate(items, 1)), torch.zeros_like(items[0]))


def starts_of(item: Tensor, i: int, num_types: int = 1) -> Tensor:
    """The rank of the first set of i items of which this is the largest."""
    if num_types == 1:
        return binomial(item, i)
    place, kind = item // num_types, item % num_types
    return binomial(place, i) * num_types**i + kind * binomial(place, i - 1) * num_types ** (i - 1)


def block_of(items: Tensor, k: int, begin: int, end: int, num_types: int = 1) -> list[Tensor]:
    """Items of all sets with ranks begin to end, one tensor [end - begin] for each member: what `items[items_of(...)]` is.

    The sets with one largest item are a run of ranks, in which the others go through the sets of k - 1 from the first on. So
    only the first run, which may begin anywhere, and the longest of the others are made; all is copied from them.

    Args:
        items: [n num_types], what stands for each item.
        k: members of a set.
        begin: the first rank.
        end: one past the last rank.
    """
    if k == 1:
        return [items[begin:end]]
    if begin == end:
        return [items[:0]] * k
    ends = items_of(torch.tensor([begin, end - 1]), k, num_types)[-1]
    first, last = ends.tolist()
    starts = starts_of(torch.arange(first, last + 2), k, num_types).clamp(begin, end)
    counts = starts.diff()
    offset = begin - int(starts_of(ends[:1], k, num_types))
    lengths = counts.tolist()
    pieces = [block_of(items, k - 1, offset, offset + lengths[0], num_types)]
    if last > first:
        longest = block_of(items, k - 1, 0, max(lengths[1:]), num_types)
        pieces += [[column[:length] for column in longest] for length in lengths[1:]]
    largest = items[first : last + 1].repeat_interleave(counts, output_size=end - begin)
    return [*(torch.cat(column) for column in zip(*pieces, strict=True)), largest]


def binomial(n: Tensor, i: int) -> Tensor:
    """C(n, i) of int64 n, exact as long as the result is below 2^63."""
    result = torch.ones_like(n) if i == 0 else n
    for j in range(2, i + 1):  # C(n, j) = C(n, j - 1) (n - j + 1) / j: divided first, so that only the result has to fit
        whole = result.div(j, rounding_mode="floor")
        result = whole * (n - j + 1) + ((result - whole * j) * (n - j + 1)).div(j, rounding_mode="floor")
    return result


def _largest(rank: Tensor, i: int) -> Tensor:
    """The largest c with C(c, i) <= rank: solved in float64, which is right to less than 1, and then put right."""
    if i == 1:
        return rank
    r = rank.double()
    if i == 2:
        c = 0.5 + (0.25 + 2 * r).sqrt()
    elif i == 3:
        c = 1 + (6 * r).pow(1 / 3)
    else:
        c = 1.5 + (1.25 + (1 + 24 * r).sqrt()).sqrt()
    place = c.floor().long()
    place = place - (binomial(place, i) > rank).long()
    return place + (binomial(place + 1, i) <= rank).long()


def order_of(name: str, k: Any) -> int:
    """How many genes a set has, checked."""
    order = count_of(name, k, minimum=1)
    require(order <= MAX_ORDER, f"{name}: expected 1 to {MAX_ORDER} members of a set, got {k}")
    return order


def require_ranks(name: str, rank: Tensor, total: int) -> None:
    """Check that all ranks lie in [0, total), where values may be looked at."""
    if rank.numel() == 0 or not values_visible(rank):
        return
    low, high = map(int, torch.aminmax(rank))
    require(low >= 0 and high < total, lambda: f"{name}: expected ranks from 0 to {total - 1}, got {low if low < 0 else high}")
