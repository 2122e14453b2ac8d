"""What was learnt, as files, curves and Markdown."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cellattn._file import write_atomic

from .cell import VALIDATION_SHARE


def save(result: dict[str, Any], folder: Path) -> None:
    """Write the result as JSON (without the epochs), CSV (one line a run) and curves."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{key: value for key, value in one.items() if key != "history"} for one in result["runs"]]
    write_atomic(folder / "training.json", (json.dumps({**result, "runs": runs}, indent=1) + "\n").encode())
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["variant", "seed", "validation_pearson", "test_pearson", "test_spearman", "selected", "seconds"])
    for one in runs:
        test = one["test"]
        scores = [one["validation_pearson"], test["pearson"], test["spearman"]]
        lines.writerow([one["variant"], one["seed"], *scores, one["selected"], one["seconds"]])
    write_atomic(folder / "training.csv", text.getvalue().encode())
    plot(result, folder / "training.png")


def plot(result: dict[str, Any], path: Path) -> None:
    """Validation Pearson, MSE and graph term by epoch: the mean over seeds, and each seed's validation Pearson."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for colour, name in enumerate(result["variants"]):
        histories = [one["history"] for one in result["runs"] if one["variant"] == name and "history" in one]
        if not histories:
            continue
        epochs = [record["epoch"] + 1 for record in histories[0]]
        style: dict[str, Any] = {"color": f"C{colour}", "linewidth": 1.6}

        def mean(key: str) -> list[float]:
            return [statistics.fmean(record[key] for record in records) for records in zip(*histories, strict=True)]

        for history in histories:
            axes[0].plot(epochs, [record["validation_pearson"] for record in history], color=f"C{colour}", alpha=0.2)
        axes[0].plot(epochs, mean("validation_pearson"), label=result["variants"][name]["title"], **style)
        axes[1].plot(epochs, mean("train_loss"), **style)
        axes[1].plot(epochs, mean("validation_loss"), linestyle="--", **style)
        if any(mean("regularization")):
            axes[2].plot(epochs, mean("regularization"), **style)
    axes[0].set(xlabel="epoch", ylabel="validation Pearson")
    axes[1].set(xlabel="epoch", ylabel="MSE (training solid, validation dashed)")
    axes[2].set(xlabel="epoch", ylabel="graph term, weighted", yscale="log")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    plt.close(figure)
    write_atomic(path, image.getvalue())


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: scores by variant, the graphs in the tied heads, and how it was all selected."""
    by_variant = {name: [one for one in result["runs"] if one["variant"] == name] for name in result["variants"]}
    lines = [
        "| model | test Pearson | each seed | test Spearman | validation Pearson | selected | s a run | it/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in by_variant.items():
        test = [one["test"]["pearson"] for one in runs]
        speed = [one["steps_per_second"] for one in runs if "steps_per_second" in one]
        cells = [
            result["variants"][name]["title"],
            f"**{mean_and_sd(test)}**",
            ", ".join(f"{x:.3f}" for x in test),
            mean_and_sd([one["test"]["spearman"] for one in runs]),
            mean_and_sd([one["validation_pearson"] for one in runs]),
            ", ".join(one["selected"] for one in runs),
            f"{statistics.fmean(one['seconds'] for one in runs):.1f}",
            f"{statistics.fmean(speed):.3g}" if speed else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = "; ".join(f"{value:,} {name}" for name, value in result["notes"].items())
    pairs = ", ".join(f"{value:,} {name}" for name, value in result["pairs"].items())
    how = (
        "Mean ± standard deviation over seeds; a seed sets initial weights, order of the data, and, on real tables in the "
        f"source's split, the {VALIDATION_SHARE:.0%} of training pairs that validate. Epoch (ridge: penalty) by validation "
        "Pearson; the test pairs were looked at once a run. Graph-term weights, learning rates and sizes were chosen by "
        "validation on the real tables before; the cell transformer had more tries than the tuned pair MLP. While the recipe "
        "was settled, test scores of earlier settings had been seen, though none was chosen by them."
    )
    heads = graph_table({name: runs for name, runs in by_variant.items() if "kl" in runs[0]}, result["variants"])
    scope = f"{result['source']}, {result['tokens']:,} gene tokens; {pairs} ({notes})."
    time_taken = (
        f"{result['seconds']:.0f} s in all, {result['workers']} run(s) at a time, of {result['threads']} CPU thread(s)."
    )
    return "\n".join([f"{scope} {time_taken}", "", *lines, "", how, *heads])


def graph_table(runs: dict[str, list[dict[str, Any]]], variants: dict[str, Any]) -> list[str]:
    """KL and share of edges recovered of each graph in its head, means over seeds."""
    if not runs:
        return []
    relations = list(next(iter(runs.values()))[0]["kl"])
    lines = ["", "KL from graph to its head, and share of the graph's edges among the head's top entries:", ""]
    lines.append(f"| model | {' | '.join(relations)} | oversmoothing by layer |")
    lines.append("|---" * (len(relations) + 2) + "|")
    for name, seeds in runs.items():
        means = [
            f"{statistics.fmean(one['kl'][r] for one in seeds):.2f}, "
            f"{statistics.fmean(one['edge_recovery'][r] for one in seeds):.0%}"
            for r in relations
        ]
        smooth = [f"{statistics.fmean(layer):.2f}" for layer in zip(*(one["oversmoothing"] for one in seeds), strict=True)]
        lines.append(f"| {variants[name]['title']} | {' | '.join(means)} | {', '.join(smooth)} |")
    return lines


def mean_and_sd(values: Sequence[float]) -> str:
    """0.512 ± 0.010"""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"
