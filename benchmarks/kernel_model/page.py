"""The page, the table and the figure of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.ptx.mutations import kernels_commit

from .chips import CHIPS
from .step import Step
from .subjects import (
    ANCHOR_DIM,
    ANCHOR_HEADS,
    ANCHOR_TOKENS,
    ANCHORS,
    DIM,
    FEATURES,
    HEADS,
    PAIRS,
    SETS,
    TOKENS,
    Row,
)

PIPES = ("issue", "tensor", "exponentials", "fp32", "integer", "shared", "dram")
COUNTED = ("issue", "tensor", "products", "special", "fp32", "alu", "imad", "shared", "waves", "global", "sync", "local")
_GOALS = {"H100 SXM": 7.3, "A100": 15.0, "A40": 15.0}  # ms of a step
_SUBJECTS = {
    "attention": "attention of a layer, forward and backward, with the gradient of LSE",
    "ties": "nine ties of a layer by KL, forward and backward",
    "BCE": "nine ties of a layer by BCE with every non-edge, forward and backward",
    "BCE, drawn": "nine ties of a layer by BCE with as many drawn negatives as edges, forward and backward",
    "edge_attention": "attention along edges, a relation a head as its hard mask, a prefix token and self-loops, forward and "
    "backward",
    "masked_spmm": f"means of masked_spmm by nine relations, {SETS} cells without three genes each, {FEATURES} features and "
    "weights of edges, forward and backward",
    "relational_spmm": f"sums of relational_spmm by nine relations from the genes next to {SETS} sets of three to those within "
    f"two hops, {FEATURES} features, forward and backward",
    "perturbation_attention": f"the own genes of {PAIRS} pairs in perturbation_attention, {HEADS} heads of {DIM}, forward and "
    "backward",
    "FlexAttention": "FlexAttention at the shape of the first, without a gradient of LSE",
}


def records(rows: Sequence[Row]) -> Iterator[list[Any]]:
    """kernels/model.csv; counts are of warp instructions, `products` of multiply-adds, `waves` of 128 shared bytes."""
    yield [
        "subject", "chip", "arch", "kernel", "launches", "ctas", "warps", "registers", "shared_bytes", "resident", *COUNTED,
        "tensor_bytes", "conflicts", *(f"{pipe}_us" for pipe in PIPES), "binds", "uneven", "predicted_us",
    ]  # fmt: skip
    for row in rows:
        c = row.cost
        yield [
            row.subject, c.chip.name, c.chip.arch, c.kernel, c.launches, c.ctas, c.code.warps, c.code.registers, c.code.shared,
            c.resident, *(c.counts[name] for name in COUNTED), c.bytes, "" if c.conflicts is None else f"{c.conflicts:.3f}",
            *(f"{1e6 * c.seconds[pipe]:.2f}" for pipe in PIPES), c.binds,
            f"{c.uneven:.3f}", f"{1e6 * c.predicted:.1f}",
        ]  # fmt: skip


def written(rows: Sequence[Row], steps: Mapping[tuple[str, str], Step], cell: str) -> str:
    """The page as Markdown."""
    parts = [_HEAD, *_anchors(rows), "## What was compiled\n"]
    parts += [f"Kernels as of {kernels_commit()}. Ties: {cell}.\n"]
    for subject, title in _SUBJECTS.items():
        parts += [f"### {title[0].upper()}{title[1:]}\n", *_table(rows, subject)]
    parts += [*_ratios(rows), *_steps(steps)]
    return "\n".join(parts)


_HEAD = """# What the kernels will cost: a prediction, no GPU

<!-- made by python -m benchmarks.kernel_model -->

**Predicted, no GPU.** Nothing on this page was measured. Each kernel of a layer of the published transformer (T = 6,608, 9
heads of 20, bfloat16) is compiled for each chip, its machine code is read, and how often each part of it runs is multiplied
in: by rules that `tests/benchmarks/test_kernel_model.py` holds to what an execution of the compiled code counts. Divided by
the rate that the vendor's documents give for each pipe (`benchmarks/kernel_model/chips.py`), that is the least time of each
pipe; the largest binds. "Predicted" is that time on the multiprocessor that gets most CTAs. "Conflicts" are the waves that
accesses to shared memory take over what they would take if no two lanes met in a bank, of the loops, counted in an execution;
they are in the time of shared memory. They are not counted where there is no number, nor are the operands that sm_90's
products read. Launches of one kernel are added up. Latency, caches and
clocks below boost are no part of it, so that a prediction is a floor. How far below the truth it lies is in the first table.

![Time by pipe](kernel_model.png)
"""


def _anchors(rows: Sequence[Row]) -> Iterator[str]:
    yield "## How far off it is\n"
    yield (
        f"Our attention at heads of {ANCHOR_DIM} is a plain flash attention. Its predicted speed (T = {ANCHOR_TOKENS:,}, "
        f"{ANCHOR_HEADS} heads) beside published ones of other implementations on the same chip, in TFLOP/s. A share below 1 "
        "is both what the model leaves out and how the implementations differ.\n"
    )
    yield "| chip | pass | predicted of ours | published | published / predicted | whose |"
    yield "|---|---|---|---|---|---|"
    flops = ANCHOR_HEADS * ANCHOR_TOKENS**2 * ANCHOR_DIM
    for anchor in ANCHORS:
        costs = [row.cost for row in rows if row.subject == "anchor" and row.cost.chip.name == anchor.chip]
        if not costs:
            continue
        forward = 4 * flops / sum(c.predicted for c in costs if "_fwd_" in c.kernel) / 1e12
        backward = 10 * flops / sum(c.predicted for c in costs if "_bwd_" in c.kernel) / 1e12
        for name, own, theirs in (("forward", forward, anchor.forward), ("backward", backward, anchor.backward)):
            if theirs is not None:
                yield f"| {anchor.chip} | {name} | {own:.0f} | {theirs:.0f} | {theirs / own:.2f} | {anchor.what} |"
    yield ""


def _table(rows: Sequence[Row], subject: str) -> Iterator[str]:
    yield (
        "| chip | kernel | launches | CTAs, resident | registers | "
        + " | ".join(f"{pipe}, us" for pipe in PIPES)
        + " | conflicts | binds | uneven | predicted, us |"
    )
    yield "|---" * (len(PIPES) + 9) + "|"
    for row in rows:
        if row.subject != subject:
            continue
        c = row.cost
        times = " | ".join(f"{1e6 * c.seconds[pipe]:.0f}" for pipe in PIPES)
        yield (
            f"| {c.chip.name} | `{c.kernel}` | {c.launches} | {c.ctas:,}, {c.resident} | {c.code.registers} | {times} | "
            f"{'' if c.conflicts is None else f'{c.conflicts:.2f}'} | {c.binds} | {c.uneven:.2f} | {1e6 * c.predicted:.0f} |"
        )
    yield ""


def _total(rows: Sequence[Row], subject: str, chip: str, part: str = "") -> float:
    return sum(r.cost.predicted for r in rows if r.subject == subject and r.cost.chip.name == chip and part in r.cost.kernel)


def _chips_of(rows: Sequence[Row]) -> list[str]:
    return [name for name in CHIPS if any(row.subject == "attention" and row.cost.chip.name == name for row in rows)]


def _ratios(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Ratios that are goals\n"
    yield "All predicted. FlexAttention has no gradient of LSE there, and makes nothing of the graph.\n"
    yield (
        "| chip | (attention + ties) / attention, goal 1.10 | with BCE | FlexAttention / ours, forward | backward "
        "| instructions a score, forward: ours | FlexAttention |"
    )
    yield "|---|---|---|---|---|---|---|"
    for chip in _chips_of(rows):
        own, tied, bce = (_total(rows, subject, chip) for subject in ("attention", "ties", "BCE"))
        forward = _total(rows, "FlexAttention", chip) - _total(rows, "FlexAttention", chip, "backward")
        backward = _total(rows, "FlexAttention", chip, "backward")
        ours_forward, ours_backward = _total(rows, "attention", chip, "_fwd_"), _total(rows, "attention", chip, "_bwd_")
        scores = HEADS * TOKENS**2 / 32  # of a lane
        counts = [
            next(r.cost.counts["issue"] for r in rows if r.cost.chip.name == chip and r.subject == s and r.cost.kernel == k)
            / scores
            for s, k in (("attention", "attention_fwd_kernel"), ("FlexAttention", "flex_attention"))
        ]
        yield (
            f"| {chip} | {(own + tied) / own:.2f} | {(own + bce) / own:.2f} | {forward / ours_forward:.2f} | "
            f"{backward / ours_backward:.2f} | {counts[0]:.1f} | {counts[1]:.1f} |"
        )
    yield ""


def _steps(steps: Mapping[tuple[str, str], Step]) -> Iterator[str]:
    yield "## A training step of the published transformer\n"
    yield (
        f"8 layers, nine ties, {PAIRS} pairs, bfloat16. Our kernels as above; products of matrices by flops or bytes, "
        "whichever takes longer; every other operator by the bytes that it reads and writes, as if none stayed in the L2 "
        "cache. Launches are counted; what the host needs for each is no part of the sum.\n"
    )
    yield "| chip | ties | attention, ms | ties | products | other operators | optimizer | sum | goal | launches |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for (name, loss), step in steps.items():
        own = sum(time for kernel, (_, time) in step.kernels.items() if kernel.startswith("attention"))
        tied = sum(time for kernel, (_, time) in step.kernels.items() if kernel.startswith(("row_dot", "bce_rows")))
        rest = sum(time for _, time in step.kernels.values()) - own - tied + step.moved
        times = " | ".join(f"{1e3 * x:.2f}" for x in (own, tied, step.products, rest, step.optimizer, step.seconds))
        goal = f"{_GOALS[name]:g}" if name in _GOALS and loss == "kl" else ""
        yield f"| {name} | {loss.upper()} | {times} | {goal} | {step.launches} |"
    yield ""


_COLOURS = ("#1b6ca8", "#e07b39", "#4f9d69", "#b0b0b0", "#8a6fb0", "#c44e52", "#6f6f6f")
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def _draws(kernel: str) -> bool:
    """Not of those that take a few us."""
    return not any(part in kernel for part in ("delta", "large"))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Each pipe's time of each kernel of a layer's attention, a chip a panel."""
    chips = _chips_of(rows)
    figure, axes = plt.subplots(1, len(chips), figsize=(3.2 * len(chips), 3.6), sharey=True, layout="constrained")
    for axis, chip in zip(axes, chips, strict=True):
        costs = [r.cost for r in rows if r.subject == "attention" and r.cost.chip.name == chip and _draws(r.cost.kernel)]
        for i, (pipe, colour, hatch) in enumerate(zip(PIPES, _COLOURS, _HATCHES, strict=True)):
            at = [n + 0.12 * (i - 3) for n in range(len(costs))]
            axis.bar(at, [1e6 * c.seconds[pipe] for c in costs], 0.11, color=colour, hatch=hatch, edgecolor="white", label=pipe)
        axis.set_xticks(
            range(len(costs)),
            [c.kernel.split("_kernel")[0].removeprefix("attention_") + c.kernel.split("_kernel")[1] for c in costs],
        )
        axis.set_title(f"{chip}: {max(costs, key=lambda c: c.predicted).binds} binds most", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("predicted time of a layer, us")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PIPES), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
