"""All pairs inside the sets of a ragged batch: ptr int64 [B + 1], sets often empty.

Pair r of a set is entry r of the lower triangle, row by row: (0, 1), (0, 2), (1, 2), (0, 3), ... An entry of that list does not
depend on the size of the set, so one table of the largest size serves all sets, and pair p of the batch is found by where the
pairs of its set begin: no loop over sets, and no matrix over all entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .set_sum import set_size, set_sum


class SetPairs(NamedTuple):
    """P pairs of entries, set by set, and then, where the number of pairs was not known, some that count for nothing."""

    first: Tensor  # int64 [P], positions among the nnz entries
    second: Tensor  # int64 [P], after `first` in the same set
    ptr: Tensor  # int64 [B + 2], where the pairs of each set begin; those that count for nothing are a last set

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the pairs of each set: x [P, D] -> [B, D], zeros for a set of one entry or none."""
        return set_sum(x, self.ptr)[:-1]


def set_pairs(ptr: Tensor, num_entries: int, max_size: int | None = None) -> SetPairs:
    """Enumerate the pairs of each set.

    Args:
        ptr: int64 [B + 1], checked by the caller.
        num_entries: nnz, the last of ptr.
        max_size: no set has more entries (checked where values may be looked at). With it P is nnz (max_size - 1) / 2, the most
            pairs there can be, and as many as there are where all sets are of that size; no value is read on the host. Without
            it P is their number, which on a GPU has to be waited for.
    """
    size = set_size(ptr, max_size)
    entries = ptr.diff()
    pair_ptr = F.pad((entries * (entries - 1) // 2).cumsum(0), (1, 0))
    num_pairs = int(pair_ptr[-1]) if max_size is None else num_entries * (size - 1) // 2
    pair = torch.arange(num_pairs, device=ptr.device)
    # the set of each pair; pairs beyond the last set's belong to none, and are entry 0 twice
    member = torch.searchsorted(pair_ptr, pair, right=True) - 1
    real = pair < pair_ptr[-1]
    place = torch.where(real, pair - pair_ptr[member], 0)
    begin = ptr[member]
    second, first = torch.tril_indices(size, size, -1, device=ptr.device)
    first, second = (torch.where(real, begin + offset[place], 0) for offset in (first, second))
    return SetPairs(first, second, torch.cat([pair_ptr, pair_ptr.new_full((1,), num_pairs)]))
