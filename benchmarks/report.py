"""The report: every method as a model, the ops under them beside plain PyTorch and other libraries, and what is learnt here.

    python -m benchmarks.report [--full] [--only khop | methods]

Writes `benchmarks/results/<device>/report.md` with its figures; `--only khop` the whole k-hop benchmark instead, `khop.md`, of
which the report holds a short version, and `--only methods` the table of methods alone. `--full` is the published setting, made
for a GPU: 10,000 samples, 100 steps, batches of 64 and 28. Uses the real yeast tables where they are (CELLATTN_DATA, or
`../shared/data/yeast` beside the repository) and a synthetic cell of the published size everywhere else; the report says which.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .attention import bench as attention
from .khop import bench as khop_bench
from .khop import plan as khop_plan
from .khop import tables as khop_tables
from .measure import environment, results_dir
from .methods import bench as method_steps
from .screen import full as screen
from .screen import speed as screen_speed
from .training import runs, tables
from .training.cell import SOURCE

TRAINED_MODELS = Path("runs/bench")  # stay, to screen with
# Methods of the table, and the variants of `train` that tell what they learn.
TRAINED = {"dango": "dango", "lazy": "wildtype", "delta": "wildtype", "pairwise": "pairwise", "cell-transformer": "kl"}
_COLOURS = {"ours": "#1b6ca8", "dense eager": "#b0b0b0", "dense compiled": "#6f6f6f"}
_LABELS = {"ours": "cellattn", "dense eager": "dense eager", "dense compiled": "dense, torch.compile"}


def draw_ops(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and peak memory of every row, ours beside dense PyTorch, on logarithmic axes."""
    checked = [row for row in rows if row["suite"] == "ops" and attention.figure(row, "ours", "both") is not None]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.9 + 0.75 * len(checked)), sharey=True, layout="constrained")
    for axis, (key, unit, title) in zip(
        axes, (("both", 1e3, "forward + backward, ms"), ("bytes", 1e-6, "peak memory above the inputs, MB")), strict=True
    ):
        for offset, name in enumerate(_COLOURS):
            found = [(i, attention.figure(row, name, key)) for i, row in enumerate(checked)]
            values = {i + 0.26 * (offset - 1): value * unit for i, value in found if value is not None}
            bars = axis.barh(list(values), list(values.values()), height=0.24, color=_COLOURS[name], label=_LABELS[name])
            axis.bar_label(bars, fmt=lambda x: f"{x:,.0f}", padding=2, fontsize=7)
        axis.set(xscale="log", xlabel=title)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(checked)), [row["name"].replace(", ", "\n", 1) for row in checked], fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def scores(training: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """(test Pearson, oversmoothing by layer) of the methods that were trained, means over seeds, as the table shows them."""
    found = {}
    for method, variant in TRAINED.items():
        runs = [run for run in training["runs"] if (run["split"], run["variant"]) == (SOURCE, variant)]
        if not runs:
            continue
        smooth = [
            f"{statistics.fmean(layer):.2f}" for layer in zip(*(run.get("oversmoothing", ()) for run in runs), strict=True)
        ]
        found[method] = tables.mean_and_sd([run["test"]["pearson"] for run in runs]), ", ".join(smooth)
    return found


def write(
    methods: dict[str, Any], ops: dict[str, Any], khop: dict[str, Any], training: dict[str, Any], screening: dict[str, Any]
) -> Path:
    """Put all results into one page."""
    folder = results_dir()
    draw_ops(ops["rows"], folder / "ops.png")
    about = ", ".join(f"{key} {value}" for key, value in environment().items())
    tokens = next(row["tokens"] for row in ops["rows"] if row["suite"] == "ops")
    batch = min(khop["plan"]["set_counts"])
    page = f"""# Report

{about}

## Methods

{method_steps.sections(methods, scores(training))}

![methods](methods.png)

Test Pearson and oversmoothing (by layer, how far genes are from being all alike: 0 where they are equal, at most 1) are of the
training below, where cells and models are smaller; one run of "wildtype difference" stands for its two exact modes.

## The ops

T = {tokens:,} tokens, {ops["graph"]}, {ops["dtype"]}, forward and backward in one process; medians after a warm-up. Every
figure was first held to a dense float64 computation: `error` is the largest relative error of outputs and gradients, of those
beside its bound. Plain SDPA computes no loss: it is the floor. Memory is the peak above the inputs. The suite "length" is on
the synthetic cell.

{attention.table(ops["rows"])}

![time and memory](ops.png)

![time and memory over T](length.png)

## k-hop

{khop["graph"]}, B = {batch}: medians of ms a batch, of implementations that each ran in a process of its own and returned equal
genes and edges. The whole page is [{khop["name"]}.md]({khop["name"]}.md); `--only khop` measures larger batches and both heaps.

{khop_tables.extract_table(khop["rows"], batch)}

{khop_tables.target_table(khop)}

![k-hop]({khop["name"]}.png)

## Training

{tables.table(training)}

![curves](training.png)

## Sets that a trained model scores

{screen_speed.section(screening)}
{screen.section(folder)}
## Not confirmed here

Nothing on this page was measured on a GPU unless the line at the top names one.
"""
    path = folder / "report.md"
    path.write_text(page)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the published setting, more repeats, every gene a token")
    parser.add_argument("--only", choices=("khop", "methods"), help="one benchmark, whole")
    given = parser.parse_args()
    full = given.full
    if given.only == "khop":
        print(khop_tables.page(khop_bench.run()))
        return
    methods = method_steps.run(method_steps.Plan(budget=method_steps.budget()) if full else None)
    if given.only == "methods":
        print(method_steps.page(methods))
        return
    ops = attention.run(attention.plan_for(attention.DEVICE, repeats=10 if full else 3))
    khop = khop_bench.run() if full else khop_bench.run(khop_plan.short_plan(), name="khop_short")
    shutil.rmtree(TRAINED_MODELS, ignore_errors=True)  # what is measured is trained anew
    splits, threads = (SOURCE, "gene-disjoint"), os.cpu_count() or 1
    training = runs.run(full=full, out=TRAINED_MODELS, results=results_dir(), splits=splits, workers=threads)
    screening = screen_speed.run(seconds=5.0 if full else 2.0, rounds=3 if full else 1, threads=threads)
    path = write(methods, ops, khop, training, screening)
    print(f"\n{path.read_text()}\nwritten to {path}")


if __name__ == "__main__":
    main()
