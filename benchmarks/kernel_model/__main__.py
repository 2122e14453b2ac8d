"""What each kernel will cost on each chip, predicted from its machine code: no GPU is asked, and none has confirmed it.

    python -m benchmarks.kernel_model

Compiles the kernels of a layer of the published transformer for every chip, multiplies the instructions of each part of their
machine code by how often it runs, and divides by the rate of each pipe. Beside them stands FlexAttention, compiled from
PyTorch's own templates, and published times of flash attention, which say how far off the model is. Writes
`kernels/model.csv`, `docs/kernel_model.md` and its figure. A minute or two a chip.
"""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks import options
from benchmarks.cells import benchmark_graph

from . import page
from .chips import CHIPS
from .step import Step, step_of
from .subjects import (
    ANCHOR_DIM,
    ANCHOR_HEADS,
    ANCHOR_TOKENS,
    ANCHORS,
    DIM,
    HEADS,
    TOKENS,
    Row,
    calls_on,
    costs_of_attention,
    costs_of_call,
    costs_of_flex,
    costs_of_ties,
)  # fmt: skip
from .trips import Tied

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = options.parser("kernel_model", __doc__)
    parser.add_argument("--chips", default=",".join(CHIPS), help="some of them, by name: %(default)s; nothing is written then")
    names = parser.parse_args().chips.split(",")
    for name in names:
        if name not in CHIPS:
            parser.error(f"argument --chips: expected some of {','.join(CHIPS)}, got {name!r}")
    chosen = [CHIPS[name] for name in names]
    cell, graph = benchmark_graph()
    tied = Tied.of(graph)
    rows: list[Row] = []
    steps: dict[tuple[str, str], Step] = {}
    calls = calls_on(graph)
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
        for subject, call in calls.items():
            rows += [Row(subject, cost) for cost in costs_of_call(chip, call)]
        steps |= {(chip.name, loss): step_of(graph, chip, loss) for loss in ("kl", "bce")}
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
