"""What is predicted: the kernels of a layer, FlexAttention at the same shape, and what published times are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cellattn import MultiGraph

from .chips import Chip
from .cost import Cost, cost_of, counts_of
from .flex import FlexKernel, flex_attention
from .launches import attention, on, ties
from .trips import Tied, Trips

HEADS, TOKENS, DIM = 9, 6608, 20  # of the published layer


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
    with on(chip) as launches:
        attention(heads, tokens, dim, torch.bfloat16, lse=lse)()
    return [cost_of(launch, chip) for launch in launches]


def costs_of_ties(chip: Chip, graph: MultiGraph, tied: Tied, dim: int) -> list[Cost]:
    by_row, by_column = graph.segments
    edges = sum(graph.num_edges(name) for name in graph.relations)
    with on(chip) as launches:
        ties(graph.num_nodes, edges, list(by_row.offset), list(by_column.offset), dim, torch.bfloat16)()
    return [cost_of(launch, chip, tied) for launch in launches]


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
