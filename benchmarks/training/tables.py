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

from .cell import SOURCE, VALIDATION_SHARE

_TITLES = {SOURCE: "source's split, of pairs"}


def save(result: dict[str, Any], folder: Path) -> None:
    """Write the result as JSON (without the epochs), CSV (one line a run) and curves."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{key: value for key, value in one.items() if key != "history"} for one in result["runs"]]
    write_atomic(folder / "training.json", (json.dumps({**result, "runs": runs}, indent=1) + "\n").encode())
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["split", "variant", "seed", "validation_pearson", "test_pearson", "test_spearman", "selected", "seconds"])
    for one in runs:
        test = one["test"]
        scores = [one["validation_pearson"], test["pearson"], test["spearman"]]
        lines.writerow([one["split"], one["variant"], one["seed"], *scores, one["selected"], one["seconds"]])
    write_atomic(folder / "training.csv", text.getvalue().encode())
    plot(result, folder / "training.png")


def plot(result: dict[str, Any], path: Path) -> None:
    """Validation Pearson, MSE and graph term by epoch, of the first split: the mean over seeds, and each seed's Pearson."""
    runs = by_variant(result, next(iter(result["splits"])))
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for colour, name in enumerate(result["variants"]):
        histories = [one["history"] for one in runs[name] if "history" in one]
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


def by_variant(result: dict[str, Any], split: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of a split, a seed each."""
    return {
        name: [one for one in result["runs"] if (one["split"], one["variant"]) == (split, name)] for name in result["variants"]
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: test scores by variant, the splits side by side; the rest of the first; how it was selected."""
    first, *others = result["splits"]
    found = {split: by_variant(result, split) for split in result["splits"]}
    columns = [_TITLES.get(split, split) for split in found] if others else []
    scored = [f"test Pearson, {title}" for title in columns] or ["test Pearson"]
    lines = [
        f"| model | {' | '.join(scored)} | each seed | test Spearman | validation Pearson | selected | s a run | it/s |",
        "|---" * (len(scored) + 7) + "|",
    ]
    for name, runs in found[first].items():
        speed = [one["steps_per_second"] for one in runs if "steps_per_second" in one]
        cells = [
            result["variants"][name]["title"],
            *(f"**{mean_and_sd([one['test']['pearson'] for one in found[split][name]])}**" for split in found),
            ", ".join(mean_and_sd([one["test"]["pearson"]]) for one in runs),
            mean_and_sd([one["test"]["spearman"] for one in runs]),
            mean_and_sd([one["validation_pearson"] for one in runs]),
            ", ".join(one["selected"] for one in runs),
            f"{statistics.fmean(one['seconds'] for one in runs):.1f}",
            f"{statistics.fmean(speed):.3g}" if speed else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    scopes = []
    for split, described in result["splits"].items():
        parts = ", ".join(f"{value:,} {name}" for name, value in described["pairs"].items())
        notes = "; ".join(f"{value:,} {name}" for name, value in described["notes"].items())
        scopes.append(f"{f'{split}: ' if others else ''}{parts} ({notes})")
    how = (
        "Mean ± standard deviation over seeds; a seed sets initial weights, order of the data, and, on real tables in the "
        f"source's split, the {VALIDATION_SHARE:.0%} of training pairs that validate. Epoch (ridge: penalty) by validation "
        "Pearson; the test pairs were looked at once a run. Graph-term weights, learning rates and sizes were chosen by "
        "validation on the real tables before; the cell transformer had more tries than the tuned pair MLP. While the recipe "
        "was settled, test scores of earlier settings had been seen, though none was chosen by them."
    )
    if others:
        how += (
            f" Other columns and tables than test Pearson are of the split {first!r}; splits but the source's differ by seed."
        )
    heads = graph_table({name: runs for name, runs in found[first].items() if "kl" in runs[0]}, result["variants"])
    scope = f"{result['source']}, {result['tokens']:,} gene tokens; {'; '.join(scopes)}."
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


def mean_and_sd(values: Sequence[float | None]) -> str:
    """0.512 ± 0.010; "undefined" where a correlation is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "undefined"
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3f}{spread}"
