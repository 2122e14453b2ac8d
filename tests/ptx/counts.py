"""What a launch executed, by instruction: how often, and what its accesses to memory cost."""

from __future__ import annotations

import numpy as np

SECTOR = 32  # bytes: the least that moves between L1 and L2
BANKS = 32  # of four bytes each
LARGE = np.int64(1) << 48  # above every address


class Counts:
    """Arrays over the instructions of a program, in units of warps.

    A warp's access to global memory costs the sectors that its lanes touch. One to shared memory is made in waves of 128
    bytes at most (all lanes at 4 bytes, half of them at 8, a quarter at 16, which a row of a matrix for ldmatrix is too), and
    a wave is repeated for every further word that a bank is asked for.
    """

    def __init__(self, instructions: int) -> None:
        self.warps, self.sectors, self.waves, self.least_waves, self.bytes = (
            np.zeros(instructions, np.int64) for _ in range(5)
        )

    def execute(self, pc: int, warps: int) -> None:
        """An instruction, by so many warps."""
        self.warps[pc] += warps

    def global_access(self, pc: int, address: np.ndarray, size: int, thread: np.ndarray) -> None:
        """Of `size` bytes by each of these threads."""
        self.bytes[pc] += size * len(address)
        first = address.astype(np.int64) // SECTOR
        last = (address.astype(np.int64) + size - 1) // SECTOR
        both = np.concatenate([first, last]) + np.tile(thread // 32, 2) * LARGE
        self.sectors[pc] += len(np.unique(both))

    def shared_access(self, pc: int, address: np.ndarray, size: int, thread: np.ndarray) -> None:
        """Likewise; `thread` ascends."""
        if len(address) == 0:
            return
        self.bytes[pc] += size * len(address)
        words = max(size // 4, 1)
        lanes = 32 // words
        wave = thread // lanes
        word = (address.astype(np.int64) // 4)[:, None] + np.arange(words)
        asked = np.unique(word.reshape(-1) + np.repeat(wave, words) * LARGE)  # lanes that ask for one word share it
        per_bank = np.unique(asked // LARGE * BANKS + asked % LARGE % BANKS, return_counts=True)
        worst = np.zeros(int(wave.max()) + 1, np.int64)
        np.maximum.at(worst, per_bank[0] // BANKS, per_bank[1])
        self.waves[pc] += int(worst.sum())
        self.least_waves[pc] += len(np.unique(wave))
