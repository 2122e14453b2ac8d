"""Which entries of an attention map are dropped: a function of a draw, the head, the row and the column, on every device.

Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) turns a counter of 128 bits, under a key of 64,
into 128 random bits. With (seed, offset) drawn a call, entry (row, column) of head h, counted over all leading dimensions, has

    key      seed, 64 bits
    counter  (column // 64 * 8 + column % 8, row, h, offset), 32 bits each
    bits     half column // 8 % 2, the lower first, of word column // 16 % 4 of the result

16 bits u of its own: eight entries, in columns 8 apart, share the 40 products of a counter, so that a group of eight counters
is 64 columns in order. The entry stays where u >= threshold, of probability 1 - threshold / 65536.

Where several entries are of one row and column, as along the edges of several relations, copy c of them has offset + c in place
of offset, modulo 2^32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import describe_number, require, unboxed
from .sample_rows import check_generator, generator_of_draw

STEPS = 2**16  # of a probability

_LOW = 2**32 - 1
_FACTORS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def threshold_of(dropout_p: Any) -> int:
    """A probability of dropout, in [0, 1), in steps of 2^-16, rounded; below 1 whatever the rounding."""
    if type(dropout_p) in (int, float) and dropout_p == 0:  # at once: small problems are all calls
        return 0
    p = unboxed(dropout_p)
    valid = isinstance(p, (int, float)) and not isinstance(p, bool) and 0 <= p < 1
    require(valid, lambda: f"dropout_p: expected a probability in [0, 1), got {describe_number(dropout_p)}")
    return min(round(p * STEPS), STEPS - 1)


def draw_dropout(threshold: int, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
    """(seed, offset), int64 [2] on the device, which nothing waits for; None where nothing is dropped."""
    check_generator(generator)
    if threshold == 0:
        return None
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator_of_draw(generator))


def multiplier(draw: Tensor, threshold: int, like: Tensor, first_row: int = 0) -> Tensor:
    """0 where an entry is dropped, else 1 / (1 - p), for the rows of a map [..., R, Tk] from `first_row` on."""
    num_rows, num_columns = like.shape[-2:]
    heads = torch.arange(like.shape[:-2].numel(), device=like.device)
    rows = torch.arange(first_row, first_row + num_rows, device=like.device)
    columns = torch.arange(num_columns, device=like.device)
    counter = torch.arange(-(-num_columns // 64) * 8, device=like.device)
    words = torch.stack(philox(draw[0], (counter, rows[:, None], heads[:, None, None], draw[1])), -1)
    # [L, R, counters, 4]
    word = words[..., columns // 64 * 8 + columns % 8, columns // 16 % 4]
    bits = (word >> (columns // 8 % 2 * 16)) & (STEPS - 1)
    kept = (bits >= threshold).view(like.shape)
    return kept.to(like.dtype) * (STEPS / (STEPS - threshold))


def philox(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four 32-bit numbers that broadcast, under a key of 64 bits; four 32-bit numbers, int64."""
    x = [c & _LOW for c in torch.broadcast_tensors(*counter)]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(_ROUNDS):
        a, b = x[0] * _FACTORS[0], x[2] * _FACTORS[1]  # the lower 64 bits, whatever the sign
        x = [((b >> 32) & _LOW) ^ x[1] ^ key[0], b & _LOW, ((a >> 32) & _LOW) ^ x[3] ^ key[1], a & _LOW]
        key = [(part + weyl) & _LOW for part, weyl in zip(key, _WEYL, strict=True)]
    return tuple(x)
