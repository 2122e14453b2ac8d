"""What each kernel will cost on each chip, predicted from its machine code: no GPU is asked, and none has confirmed it.

    python -m benchmarks.kernel_model

Compiles the kernels of a layer of the published transformer for every chip, multiplies the instructions of each part of their
machine code by how often it runs, and divides by the rate of each pipe. Beside them stands FlexAttention, compiled from
PyTorch's own templates, and published times of flash attention, which say how far off the model is. Writes
`kernels/model.csv`, `docs/kernel_model.md` and its figure. A minute or two a chip.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cells import benchmark_graph
from cellattn import MultiGraph

from . import page
from .chips import CHIPS, Chip
from .cost import Cost, cost_of, counts_of
from .flex import FlexKernel, flex_attention
from .launches import attention, on, ties
from .step import Step, step_of
from .trips import Tied, Trips

ROOT = Path(__file__).parents[2]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(CHIPS), help="some of them, by name: %(default)s; nothing is written then")
    chosen = [CHIPS[name] for name in parser.parse_args().chips.split(",")]
    cell, graph = benchmark_graph()
    tied = Tied.of(graph)
    rows: list[Row] = []
    steps: dict[str, Step] = {}
    for chip in chosen:
        print(f"{chip.name}: compiling", flush=True)
        if any(anchor.chip == chip.name for anchor in ANCHORS):
            costs = costs_of_attention(chip, ANCHOR_HEADS, ANCHOR_TOKENS, ANCHOR_DIM, lse=False)
            rows += [Row("anchor", cost) for cost in costs]
        if chip.name == "A5000":
            continue
        rows += [Row("attention", cost) for cost in costs_of_attention(chip, HEADS, TOKENS, DIM, lse=True)]
        rows += [Row("ties", cost) for cost in costs_of_ties(chip, graph, tied, DIM)]
        rows += [Row("FlexAttention", cost) for cost in costs_of_flex(chip, HEADS, TOKENS, DIM)]
        steps[chip.name] = step_of(graph, chip)
    text = page.written(rows, steps, cell)
    if len(chosen) < len(CHIPS):
        print(text)
        return
    with (ROOT / "kernels" / "model.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(page.records(rows))
    (ROOT / "docs" / "kernel_model.md").write_text(text)
    page.draw(rows, ROOT / "docs" / "kernel_model.png")
    print("wrote kernels/model.csv, docs/kernel_model.md and docs/kernel_model.png")


if __name__ == "__main__":
    main()
