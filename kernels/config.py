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
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

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
    tail: bool | None = True  # an unmasked loop and a masked tail; False: one masked loop; None: the kernel has but one form
    registers: int | None = None  # a thread's most; ptxas left to choose takes too few for some, and spills

    @property
    def options(self) -> dict[str, int | bool | None]:
        return options(self.warps, self.stages, self.registers)

    @property
    def neighbours(self) -> list[Tile]:
        """Sides halved and doubled, other warps, stages and loop form."""
        BM, BN = self.BM, self.BN
        found = [
            Tile(rows, keys, warps, stages, tail)
            for (rows, keys), warps, stages, tail in product(
                ((BM, BN), (2 * BM, BN), (BM, 2 * BN), (BM // 2, BN), (BM, BN // 2)),
                (2, 4, 8),
                (1, 2, 3),
                (None,) if self.tail is None else (True, False),
            )
            if 16 <= rows <= 128 and 16 <= keys <= 128 and 16 * warps <= max(rows, keys)
        ]
        return [near for near in found if near != self]


class Gather(NamedTuple):
    """Rows of a matrix that a program reads at once, wherever they lie, and its warps.

    16 numbers a thread are two loads of 16 bytes in a 16-bit type; a program that holds several matrices takes fewer of each.
    """

    rows: int
    warps: int
    registers: int | None = None  # as of a Tile

    @property
    def options(self) -> dict[str, int | bool | None]:
        return options(self.warps, registers=self.registers)

    @property
    def neighbours(self) -> list[Gather]:
        """Rows halved and doubled, other warps."""
        found = [Gather(rows, warps) for rows in (self.rows // 2, self.rows, 2 * self.rows) for warps in (1, 2, 4, 8)]
        return [near for near in found if near != self and near.rows >= 1]


Shape = TypeVar("Shape", Tile, Gather)


def options(warps: int, stages: int = 1, registers: int | None = None) -> dict[str, int | bool | None]:
    """Launch options. Fused multiply-adds are asked for by name: later versions of Triton leave them out by default."""
    return {"num_warps": warps, "num_stages": stages, "maxnreg": registers, "enable_fp_fusion": True}


# Forward and dq of the dense BCE pass walk alike over the keys of a block of rows.
_BCE_BY_ROWS = {
    16: Tile(64, 32, 4, 2, tail=None),
    32: Tile(64, 32, 4, 2, tail=None),
    64: Tile(64, 64, 4, 2, tail=None),
    128: Tile(64, 32, 4, 2, tail=None),
    256: Tile(64, 32, 8, 1, tail=None),
}
_BCE_FWD = _BCE_BY_ROWS | {32: Tile(64, 32, 4, 2, tail=None, registers=128)}
_BCE_DK = {
    16: Tile(32, 64, 4, 2, tail=None),
    32: Tile(32, 64, 4, 2, tail=None),
    64: Tile(32, 64, 4, 3, tail=None),
    128: Tile(32, 64, 4, 3, tail=None),
    256: Tile(32, 64, 8, 1, tail=None),
}
_BCE_BY_ROWS_FLOAT32 = {
    16: Tile(64, 32, 4, 2, tail=None),
    32: Tile(64, 32, 4, 2, tail=None),
    64: Tile(32, 32, 4, 1, tail=None),
    128: Tile(32, 32, 4, 1, tail=None),
    256: Tile(16, 16, 4, 1, tail=None),
}

# A lane unpacks a word of two rows at a time. Two warps are too few for the products that sm_90 alone has: their operand would
# be registers, which Triton fills again while the product reads them.
_BIT_SUM = {dim: Tile(64, 32, 2, 3, tail=None) for dim in (16, 32, 64)}
_BIT_SUM_FLOAT32 = {dim: tile._replace(stages=2) for dim, tile in _BIT_SUM.items()}

# 16-bit types, by (kernel, chip): head dimension -> tile. sm_89 has the shared memory and the instructions of sm_86. A kernel
# with one table needs little shared memory, and its tiles fit every chip.
TILES: dict[tuple[str, int], dict[int, Tile]] = {
    ("attention_fwd", 80): {
        16: Tile(128, 64, 8, 2),
        32: Tile(128, 64, 4, 2),
        64: Tile(128, 64, 8, 2),
        128: Tile(128, 64, 8, 2, tail=False),
        256: Tile(64, 16, 4, 1, tail=False),
    },
    ("attention_fwd", 86): {
        16: Tile(128, 64, 8, 3),
        32: Tile(128, 64, 8, 2, registers=128),
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
        32: Tile(128, 32, 4, 2),
        64: Tile(128, 32, 8, 2, tail=False),
        128: Tile(128, 32, 8, 2, tail=False),
        256: Tile(64, 16, 4, 1, tail=False),
    },
    ("attention_bwd_dq", 86): {
        16: Tile(128, 64, 8, 3),
        32: Tile(128, 32, 4, 2),
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
        32: Tile(32, 128, 4, 2),
        64: Tile(32, 128, 8, 2, tail=False),
        128: Tile(16, 64, 4, 1, tail=False),
        256: Tile(16, 64, 8, 1, tail=False),
    },
    ("attention_bwd_dkv", 86): {
        16: Tile(64, 128, 8, 2),
        32: Tile(32, 128, 4, 2),
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
    ("bce_dense_fwd", 80): _BCE_FWD,
    ("bce_dense_fwd_rest", 80): _BCE_FWD,
    ("bce_dense_bwd_dq", 80): _BCE_BY_ROWS,
    ("bce_dense_bwd_dk", 80): _BCE_DK | {32: Tile(32, 64, 4, 2, tail=None, registers=128)},
    ("bce_dense_bwd_dk", 90): _BCE_DK,
    ("bit_sum", 80): _BIT_SUM,
    # The sigmoid link's, tuned apart: it reads words of edges, of 64 keys at most.
    ("bce_dense_fwd_sigmoid", 80): _BCE_FWD,
    ("bce_dense_bwd_dq_sigmoid", 80): _BCE_BY_ROWS,
    ("bce_dense_bwd_dk_sigmoid", 80): _BCE_DK,  # words of edges beside all else do not fit 128 registers under Triton 3.6
}

# With dropout, where the tile is another one than without: 64 keys, of which no random number is made twice, and no spills.
_DROPOUT: dict[tuple[str, int], dict[int, Tile]] = {
    ("attention_fwd", 86): {16: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2, tail=False)},
    ("attention_bwd_dq", 80): {32: Tile(128, 64, 8, 2), 64: Tile(128, 64, 8, 2, tail=False)},
    ("attention_bwd_dq", 86): {32: Tile(128, 64, 8, 2), 64: Tile(128, 64, 8, 2, tail=False)},
    ("attention_bwd_dq", 120): {64: Tile(128, 64, 8, 2, tail=False)},
    ("attention_bwd_dkv", 80): {16: Tile(32, 128, 4, 2), 128: Tile(16, 64, 8, 1, tail=False)},
    ("attention_bwd_dkv", 86): {64: Tile(32, 64, 4, 1, tail=False), 128: Tile(16, 64, 8, 1, tail=False)},
    ("attention_bwd_dkv", 90): {128: Tile(16, 64, 8, 1, tail=False)},
    ("attention_bwd_dkv", 120): {64: Tile(32, 64, 4, 1, tail=False), 128: Tile(16, 64, 8, 1, tail=False)},
}
TILES |= {
    (f"{kernel}_dropout", arch): tiles | _DROPOUT.get((kernel, arch), {})
    for (kernel, arch), tiles in TILES.items()
    if kernel.startswith("attention")
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
    "bce_dense_fwd": _BCE_BY_ROWS_FLOAT32,
    "bce_dense_fwd_rest": _BCE_BY_ROWS_FLOAT32,
    "bce_dense_bwd_dq": _BCE_BY_ROWS_FLOAT32,
    "bce_dense_bwd_dk": {
        16: Tile(32, 64, 4, 2, tail=None),
        32: Tile(32, 64, 4, 2, tail=None),
        64: Tile(32, 32, 4, 1, tail=None),
        128: Tile(32, 32, 4, 1, tail=None),
        256: Tile(16, 16, 4, 1, tail=None),
    },
    "bit_sum": _BIT_SUM_FLOAT32,
}

TILES_FLOAT32 |= {f"bce_dense_{x}_sigmoid": TILES_FLOAT32[f"bce_dense_{x}"] for x in ("fwd", "bwd_dq", "bwd_dk")}
TILES_FLOAT32 |= {f"{kernel}_dropout": tiles for kernel, tiles in TILES_FLOAT32.items() if kernel.startswith("attention")}

# Kernels that gather rows, likewise; float32 takes the same, but where it would spill.
_ROWS = {16: Gather(128, 4), 32: Gather(64, 4), 64: Gather(32, 4), 128: Gather(16, 4), 256: Gather(8, 4)}
# A row that one warp takes whole: four of them would do four times what is done once a row, for 42 entries in the mean. Twice
# the entries a step would take the places of the next step's rows through shared memory.
_ROW_OF_A_WARP = {16: Gather(32, 1), 32: Gather(16, 1), 64: Gather(8, 1), 128: Gather(4, 1), 256: Gather(2, 1)}
_EDGES = {16: Gather(32, 4), 32: Gather(32, 4), 64: Gather(32, 4, 128), 128: Gather(16, 4), 256: Gather(8, 4)}
_EDGES_OF_HUBS = _EDGES | {16: Gather(64, 4)}
# Few sets, so that none waits long for the fullest. Triton 3.6 does not compile the forward for 32 sets and more.
_SETS = {16: Gather(16, 1), 32: Gather(16, 2), 64: Gather(16, 4), 128: Gather(8, 4), 256: Gather(4, 4)}
# Keys and values: one piece of 16 bytes a thread of each.
_HUB_SEGMENT = {16: Gather(64, 4), 32: Gather(32, 4), 64: Gather(16, 4), 128: Gather(8, 4), 256: Gather(4, 4)}
GATHERS: dict[tuple[str, int], dict[int, Gather]] = {
    ("row_dot_fwd", 80): _ROW_OF_A_WARP,
    ("row_dot_fwd_segments", 80): _ROWS | {32: Gather(64, 4, 128)},
    ("row_dot_bwd_dq", 80): _ROWS,
    ("row_dot_bwd_dk", 80): _ROW_OF_A_WARP,
    ("row_dot_bwd_dk_segments", 80): _ROWS,
    ("edge_fwd", 80): _ROW_OF_A_WARP,
    # without weights or a bias ptxas left to choose takes too few registers for these
    ("edge_fwd_segments", 80): _HUB_SEGMENT | {128: Gather(8, 4, 128)},
    ("edge_bwd_dq", 80): _ROW_OF_A_WARP | {16: Gather(32, 1, 96), 64: Gather(8, 1, 96)},
    ("edge_bwd_dq_segments", 80): _HUB_SEGMENT | {32: Gather(32, 4, 128), 64: Gather(16, 4, 128)},
    ("edge_bwd_dkv", 80): _ROW_OF_A_WARP,
    ("edge_bwd_dkv_segments", 80): _HUB_SEGMENT | {16: Gather(64, 4, 128), 32: Gather(32, 4, 128), 64: Gather(16, 4, 128)},
    ("bce_edges_fwd", 80): _ROW_OF_A_WARP,
    ("bce_edges_fwd_segments", 80): _EDGES_OF_HUBS,
    ("bce_edges_bwd_dq", 80): _ROW_OF_A_WARP,
    ("bce_edges_bwd_dq_segments", 80): _EDGES_OF_HUBS,
    ("bce_edges_bwd_dk", 80): _ROW_OF_A_WARP,
    ("bce_edges_bwd_dk_segments", 80): _EDGES_OF_HUBS | {32: Gather(32, 4, 128)},
    ("perturbation_fwd", 80): _SETS | {32: Gather(16, 2, 96)},
    ("perturbation_bwd_sets", 80): _SETS,
    ("perturbation_bwd_genes", 80): _ROWS,
    ("masked_spmm", 80): _ROWS,
    # samples that share x divide a program among them, which is larger for it
    ("masked_spmm_shared", 80): {16: Gather(128, 4), 32: Gather(64, 4), 64: Gather(64, 8), 128: Gather(32, 8)},
    ("masked_sddmm", 80): _EDGES,
    ("relational_spmm", 80): _ROWS | {16: Gather(64, 4), 64: Gather(32, 4, 128), 128: Gather(16, 4, 128)},
}
# With dropout, where others are than without: no spills.
_EDGE_DROPOUT: dict[tuple[str, int], dict[int, Gather]] = {
    ("edge_fwd", 80): {64: Gather(8, 1, 128)},
    ("edge_fwd_segments", 80): {32: Gather(32, 4, 128), 64: Gather(16, 4, 128)},
    ("edge_bwd_dq", 80): {32: Gather(16, 1, 96), 128: Gather(4, 1, 96), 256: Gather(2, 1, 128)},
    ("edge_bwd_dkv", 80): {32: Gather(16, 1, 168), 64: Gather(8, 1, 168), 128: Gather(4, 1, 168)},
}
GATHERS |= {
    (f"{kernel}_dropout", arch): gathers | _EDGE_DROPOUT.get((kernel, arch), {})
    for (kernel, arch), gathers in GATHERS.items()
    if kernel.startswith("edge")
}
GATHERS_FLOAT32: dict[str, dict[int, Gather]] = {
    "edge_bwd_dq_dropout": {width: row._replace(registers=128) for width, row in _ROW_OF_A_WARP.items()},
    "masked_sddmm": {**_EDGES, 64: Gather(16, 4), 128: Gather(8, 4)},
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

_tuned: dict[tuple[str, int, torch.dtype, int, bool], Tile | Gather] = {}


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

    As near to two as whole parts come: 104 programs on 84 or 108 multiprocessors make two parts, 113 on 84 one. Shapes
    alone decide: results stay bit-equal from run to run.
    """
    blocks = triton.cdiv(length, block)
    parts = max(1, min(round(2 * num_multiprocessors(device) / programs), blocks // MIN_BLOCKS_A_PART))
    if parts == 1:
        return 1, length
    part = triton.cdiv(blocks, parts) * block
    return triton.cdiv(length, part), part


def tile_for(kernel: str, chip: int, dtype: torch.dtype, dim: int, *, few: bool = False) -> Tile:
    """The tile of a kernel at a padded head dimension; of the nearest older chip where this one has no table."""
    if dtype == torch.float32:
        _require_chip(chip)
        return TILES_FLOAT32[kernel][dim]
    if few:
        _require_chip(chip)
        return TILES_FEW[dim]
    return _of_chip(TILES, kernel, chip)[dim]


def gather_for(kernel: str, chip: int, dtype: torch.dtype, dim: int) -> Gather:
    """As `tile_for`, of a kernel that gathers rows."""
    if dtype == torch.float32 and kernel in GATHERS_FLOAT32:
        _require_chip(chip)
        return GATHERS_FLOAT32[kernel][dim]
    return _of_chip(GATHERS, kernel, chip)[dim]


def _of_chip(tables: dict[tuple[str, int], dict[int, Shape]], kernel: str, chip: int) -> dict[int, Shape]:
    _require_chip(chip)
    return tables[kernel, max(arch for name, arch in tables if name == kernel and arch <= chip)]


def _require_chip(chip: int) -> None:
    require(chip >= 80, lambda: f"device: expected compute capability 8.0 or later, got {chip // 10}.{chip % 10}")


def choose(kernel: str, x: Tensor, dim: int, launch: Callable[[Tile], None], *, few: bool = False) -> None:
    """Launch with the tile for the chip and dtype of x, or with the fastest one under CELLATTN_AUTOTUNE=1."""
    tile = tile_for(kernel, capability(x.device), x.dtype, dim, few=few)
    launch(_tuned_or(tile, kernel, x, dim, launch, few=few))


def choose_gather(kernel: str, x: Tensor, dim: int, launch: Callable[[Gather], None]) -> None:
    """As `choose`, of a kernel that gathers rows."""
    launch(_tuned_or(gather_for(kernel, capability(x.device), x.dtype, dim), kernel, x, dim, launch))


def _tuned_or(tile: Shape, kernel: str, x: Tensor, dim: int, launch: Callable[[Shape], None], *, few: bool = False) -> Shape:
    """`tile`, or what was found to be the fastest in its place."""
    chip = capability(x.device)
    key = (kernel, chip, x.dtype, dim, few)
    if key in _tuned:
        return _tuned[key]  # type: ignore[return-value]  # of the kernel's own kind
    if os.environ.get("CELLATTN_AUTOTUNE") == "1":
        tile = _tuned[key] = search(tile, launch)
        print(f"cellattn: {kernel}, sm_{chip}, {x.dtype}{', few queries' if few else ''}: {dim}: {tile!r},", flush=True)
    return tile


def search(tile: Shape, launch: Callable[[Shape], None]) -> Shape:
    """The fastest of a tile and its neighbours; what the first refused one raised, if none can be launched."""
    candidates: list[Shape] = [tile, *tile.neighbours]
    times: dict[Shape, float] = {}
    errors: list[Exception] = []
    for near in candidates:
        try:
            times[near] = milliseconds(launch, near)
        except (TritonError, RuntimeError) as error:  # ptxas or a pass of Triton refuses it, or the chip has no room for it
            errors.append(error)
            print(f"cellattn: {near!r} is left out: {type(error).__name__}: {str(error).strip()[:200]}", flush=True)
    if not times:
        raise errors[0]
    return min(times, key=times.__getitem__)


def milliseconds(launch: Callable[[Shape], None], tile: Shape) -> float:
    """Median time of a launch."""
    return float(triton.testing.do_bench(functools.partial(launch, tile), return_mode="median"))
