"""What a launch depends on besides its tensors: the chip, its tiles, and how many programs fill it.

The tiles compile without local memory for 16-bit types up to D = 128, and within the chip's shared memory (see resources.csv
beside this file). None was timed. `CELLATTN_AUTOTUNE=1` times the neighbours of a tile at the first call of each kernel and
head dimension, goes on with the fastest, and prints the line to put here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from cellattn._check import require


class Tile(NamedTuple):
    """Shape of a program.

    Its own side (BM, in dk and dv BN) should be 16 rows a warp at least: below, warps repeat each other's work on the matrix
    unit. Only at D = 256, and in float32, which does not use it, a smaller one spills less.
    """

    BM: int  # queries
    BN: int  # keys
    warps: int
    stages: int
    tail: bool = True  # an unmasked loop and a masked tail; False: one masked loop, where the other form spills

    @property
    def options(self) -> dict[str, int | bool]:
        return options(self.warps, self.stages)


def options(warps: int, stages: int = 1) -> dict[str, int | bool]:
    """Launch options. Fused multiply-adds are asked for by name: later versions of Triton leave them out by default."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


# 16-bit types, by (kernel, chip): head dimension -> tile. sm_89 has the shared memory and the instructions of sm_86.
TILES: dict[tuple[str, int], dict[int, Tile]] = {
    ("attention_fwd", 80): {
        16: Tile(128, 64, 8, 2),
        32: Tile(128, 64, 8, 2),
        64: Tile(128, 64, 8, 2),
        128: Tile(128, 64, 8, 2, tail=False),
        256: Tile(64, 16, 4, 1, tail=False),
    },
    ("attention_fwd", 86): {
        16: Tile(128, 64, 8, 3),
        32: Tile(128, 64, 8, 2),
        64: Tile(128, 64, 8, 2),
        128: Tile(128, 32, 8, 3),
        256: Tile(64, 16, 4, 1, tail=False),
    },
    ("attention_fwd", 90): {
        16: Tile(128, 64, 8, 2),
        32: Tile(128, 64, 8, 2),
        64: Tile(128, 64, 8, 1),
        128: Tile(128, 64, 8, 1),
        256: Tile(128, 64, 8, 1, tail=False),
    },
    ("attention_fwd", 120): {
        16: Tile(128, 64, 8, 2),
        32: Tile(128, 64, 8, 2),
        64: Tile(128, 64, 8, 2),
        128: Tile(128, 32, 8, 3),
        256: Tile(64, 16, 4, 1, tail=False),
    },
    ("attention_bwd_dq", 80): {
        16: Tile(128, 64, 8, 3),
        32: Tile(128, 64, 8, 2),
        64: Tile(128, 32, 8, 2, tail=False),
        128: Tile(128, 32, 8, 2, tail=False),
        256: Tile(64, 16, 4, 1, tail=False),
    },
    ("attention_bwd_dq", 86): {
        16: Tile(128, 64, 8, 3),
        32: Tile(128, 64, 8, 2),
        64: Tile(128, 32, 8, 2, tail=False),
        128: Tile(128, 32, 8, 2, tail=False),
        256: Tile(64, 16, 4, 1, tail=False),
    },
    ("attention_bwd_dq", 90): {
        16: Tile(128, 64, 8, 2),
        32: Tile(128, 64, 8, 2),
        64: Tile(128, 64, 8, 1),
        128: Tile(128, 64, 8, 2),
        256: Tile(64, 16, 4, 1, tail=False),
    },
    ("attention_bwd_dq", 120): {
        16: Tile(128, 64, 8, 2),
        32: Tile(128, 64, 8, 2),
        64: Tile(128, 32, 8, 2, tail=False),
        128: Tile(128, 32, 8, 2, tail=False),
        256: Tile(64, 16, 4, 1, tail=False),
    },
    ("attention_bwd_dkv", 80): {
        16: Tile(64, 128, 8, 2),
        32: Tile(64, 128, 8, 2),
        64: Tile(32, 128, 8, 2, tail=False),
        128: Tile(16, 64, 4, 1, tail=False),
        256: Tile(16, 64, 8, 1, tail=False),
    },
    ("attention_bwd_dkv", 86): {
        16: Tile(64, 128, 8, 2),
        32: Tile(64, 128, 8, 3),
        64: Tile(32, 128, 8, 2, tail=False),
        128: Tile(16, 128, 8, 1, tail=False),
        256: Tile(16, 64, 8, 1, tail=False),
    },
    ("attention_bwd_dkv", 90): {
        16: Tile(64, 128, 8, 2),
        32: Tile(64, 128, 8, 2),
        64: Tile(64, 128, 8, 1, tail=False),
        128: Tile(32, 128, 8, 1),
        256: Tile(16, 64, 8, 1, tail=False),
    },
    ("attention_bwd_dkv", 120): {
        16: Tile(64, 128, 8, 2),
        32: Tile(32, 128, 8, 2),
        64: Tile(32, 128, 8, 2, tail=False),
        128: Tile(16, 128, 8, 1, tail=False),
        256: Tile(16, 64, 8, 1, tail=False),
    },
}

# float32, every chip. Products in full precision use no matrix unit, and operands take twice the registers.
TILES_FLOAT32: dict[str, dict[int, Tile]] = {
    "attention_fwd": {
        16: Tile(64, 32, 4, 1),
        32: Tile(64, 32, 4, 1),
        64: Tile(64, 32, 8, 1),
        128: Tile(32, 32, 8, 1, tail=False),
        256: Tile(32, 16, 8, 1, tail=False),
    },
    "attention_bwd_dq": {
        16: Tile(64, 32, 4, 1),
        32: Tile(64, 32, 4, 1),
        64: Tile(64, 16, 8, 1, tail=False),
        128: Tile(32, 16, 8, 1, tail=False),
        256: Tile(16, 16, 8, 1, tail=False),
    },
    "attention_bwd_dkv": {
        16: Tile(32, 64, 8, 1),
        32: Tile(32, 64, 8, 1),
        64: Tile(16, 64, 8, 1),
        128: Tile(16, 32, 8, 1, tail=False),
        256: Tile(16, 16, 8, 1, tail=False),
    },
}

# At most 32 queries (a small batch of the perturbation head): a tall tile would work on rows that are not there.
TILES_FEW: dict[int, Tile] = {
    16: Tile(32, 64, 2, 2),
    32: Tile(32, 64, 2, 2),
    64: Tile(32, 32, 2, 2),
    128: Tile(32, 16, 2, 1, tail=False),
    256: Tile(32, 16, 4, 1, tail=False),
}

MIN_BLOCKS_A_PART = 4  # of a loop that is cut into parts: shorter parts cost more to add up than they save

_tuned: dict[tuple[str, int, torch.dtype, int, bool], Tile] = {}


def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for sm_90; sm_80 stands in where there is no GPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_multiprocessors(device: torch.device) -> int:
    """Of an A100 where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current GPU; this makes it the one that holds x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def parts_for(programs: int, length: int, block: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts to cut a loop of `length` so that two programs a multiprocessor run, and the length of a part.

    One part where the programs fill the chip already. Shapes alone decide: results stay bit-equal from run to run.
    """
    wanted = num_multiprocessors(device)
    if programs >= wanted:
        return 1, length
    blocks = triton.cdiv(length, block)
    parts = max(1, min(2 * wanted // programs, blocks // MIN_BLOCKS_A_PART))
    part = triton.cdiv(blocks, parts) * block
    return triton.cdiv(length, part), part


def tile_for(kernel: str, chip: int, dtype: torch.dtype, dim: int, *, few: bool = False) -> Tile:
    """The tile of a kernel at a padded head dimension; of the nearest older chip where this one has no table."""
    require(chip >= 80, lambda: f"device: expected compute capability 8.0 or later, got {chip // 10}.{chip % 10}")
    if dtype == torch.float32:
        return TILES_FLOAT32[kernel][dim]
    if few:
        return TILES_FEW[dim]
    known = max(arch for name, arch in TILES if name == kernel and arch <= chip)
    return TILES[kernel, known][dim]


def choose(kernel: str, x: Tensor, dim: int, launch: Callable[[Tile], None], *, few: bool = False) -> None:
    """Launch with the tile for the chip and dtype of x, or with the fastest one under CELLATTN_AUTOTUNE=1."""
    chip = capability(x.device)
    key = (kernel, chip, x.dtype, dim, few)
    tile = _tuned.get(key) or tile_for(kernel, chip, x.dtype, dim, few=few)
    if os.environ.get("CELLATTN_AUTOTUNE") == "1" and key not in _tuned:
        tile = _tuned[key] = search(tile, launch)
        print(f"cellattn: {kernel}, sm_{chip}, {x.dtype}{', few queries' if few else ''}: {dim}: {tile!r},", flush=True)
    launch(tile)


def search(tile: Tile, launch: Callable[[Tile], None]) -> Tile:
    """The fastest of a tile and its neighbours: sides halved and doubled, other warps, stages and loop form."""
    times = {tile: milliseconds(launch, tile)} | {near: milliseconds(launch, near) for near in neighbours(tile)}
    return min(times, key=times.__getitem__)


def neighbours(tile: Tile) -> list[Tile]:
    sides = [
        (tile.BM, tile.BN),
        (2 * tile.BM, tile.BN),
        (tile.BM, 2 * tile.BN),
        (tile.BM // 2, tile.BN),
        (tile.BM, tile.BN // 2),
    ]
    found = [
        Tile(BM, BN, warps, stages, tail)
        for (BM, BN), warps, stages, tail in product(sides, (2, 4, 8), (1, 2, 3), (True, False))
        if 16 <= BM <= 128 and 16 <= BN <= 128 and 16 * warps <= max(BM, BN)
    ]
    return [near for near in found if near != tile]


def milliseconds(launch: Callable[[Tile], None], tile: Tile) -> float:
    """Median time of a launch; infinite where the chip has too little shared memory or registers for it."""
    try:
        return float(triton.testing.do_bench(functools.partial(launch, tile), return_mode="median"))
    except OutOfResources:
        return float("inf")
