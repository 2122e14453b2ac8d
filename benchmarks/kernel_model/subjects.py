"""What is predicted: the kernels of a layer, FlexAttention at the same shape, and what published times are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cellattn import MultiGraph
from tests import ptx
from tests.kernels.aot import Launch

from .chips import Chip
from .cost import Cost, by_kernel, cost_of, counts_of
from .flex import FlexKernel, flex_attention
from .launches import attention, bce, edges, masked, on, perturbation, relational, ties, with_values
from .trips import Tied, Trips

HEADS, TOKENS, DIM = 9, 6608, 20  # of the published layer
PAIRS = 256  # of a batch of the published model
SETS, FEATURES = 28, 64  # of a batch of a graph network, and of its layers


@dataclass(frozen=True)
class Anchor:
    """A published speed of flash attention, 16-bit, heads of 64, T = 8,192, 16 heads."""

    chip: str
    what: str
    forward: float  # TFLOP/s, counting 4 T^2 D a head
    backward: float | None  # likewise, counting 10 T^2 D


ANCHORS = (
    Anchor("A100", "Triton's tutorial, fp16", 162, None),
    Anchor("A5000", "FlashAttention 2", 82, 77),
    Anchor("H100 SXM", "FlashAttention 3, bf16", 514, None),
)
ANCHOR_HEADS, ANCHOR_TOKENS, ANCHOR_DIM = 16, 8192, 64


@dataclass(frozen=True)
class Row:
    """One kernel of one subject on one chip."""

    subject: str
    cost: Cost


def costs_of_attention(chip: Chip, heads: int, tokens: int, dim: int, *, lse: bool) -> list[Cost]:
    conflicts = conflicts_of(chip, attention(1, 257, dim, torch.bfloat16, lse=lse, device="cpu"))
    with on(chip) as launches:
        attention(heads, tokens, dim, torch.bfloat16, lse=lse)()
    return [replace(cost_of(launch, chip), conflicts=conflicts[name_of(launch)]) for launch in launches]


def name_of(launch: Launch) -> str:
    """Of its machine code."""
    return f"{launch.fn.__name__} {launch.config}"


def conflicts_of(chip: Chip, call: Callable[[], None]) -> dict[str, float]:
    """Of the loops of each kernel that a small problem launches, as they are executed."""
    found = {}
    with ptx.device(chip.arch, count=True) as device:
        call()
    for one in device.counted:
        counts = one.counts
        inside = counts.warps > counts.warps.max() // 2
        least = int(counts.least_waves[inside].sum())
        found[name_of(one.launch)] = int(counts.waves[inside].sum()) / least if least else 1.0
    return found


def costs_of_ties(chip: Chip, graph: MultiGraph, tied: Tied, dim: int) -> list[Cost]:
    by_row, by_column = graph.segments
    edges = sum(graph.num_edges(name) for name in graph.relations)
    with on(chip) as launches:
        ties(graph.num_nodes, edges, list(by_row.offset), list(by_column.offset), dim, torch.bfloat16)()
    return [cost_of(launch, chip, tied) for launch in launches]


def calls_on(graph: MultiGraph) -> dict[str, Callable[[], None]]:
    """By subject; each is recorded with values, and all launches of a kernel are one row."""
    return {
        "BCE": bce(graph, DIM, torch.bfloat16, None),
        "BCE, drawn": bce(graph, DIM, torch.bfloat16, 1.0),
        "edge_attention": edges(graph, DIM, torch.bfloat16),
        "masked_spmm": masked(graph, SETS, FEATURES, torch.bfloat16),
        "relational_spmm": relational(graph, SETS, FEATURES, torch.bfloat16),
        "perturbation_attention": perturbation(graph.num_nodes, PAIRS, HEADS, DIM, torch.bfloat16),
    }


def costs_of_call(chip: Chip, call: Callable[[], None]) -> list[Cost]:
    with with_values(chip) as launches:
        call()
    return by_kernel(cost_of(launch, chip) for launch in launches)


def costs_of_flex(chip: Chip, heads: int, tokens: int, dim: int) -> list[Cost]:
    """Without its preprocessing of delta, and q, k, v read as they lie."""
    forward, backward = flex_attention(chip.arch, heads, tokens, dim, torch.bfloat16)

    def steps(block: int) -> int:
        return -(-tokens // block)

    def cost(name: str, kernel: FlexKernel, ctas: int, loops: list[int], tensors: int) -> Cost:
        size = tensors * heads * tokens * dim * 2
        return Cost(name, chip, kernel.code, ctas, counts_of(kernel.code, Trips(ctas, loops)), size)

    rows, columns = forward.tile
    queries, keys, by_row, by_column = backward.tile
    first = heads * steps(rows)
    second, third = heads * steps(by_row), heads * steps(keys)
    return [
        cost("flex_attention", forward, first, [first * steps(columns)], 4),
        cost("flex_attention_backward", backward, second + third, [second * steps(by_column), third * steps(queries)], 7),
    ]
