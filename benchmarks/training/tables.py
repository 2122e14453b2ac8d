"""What was learnt, as files, curves and Markdown."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from cellattn._file import write_atomic

from ..figures import INK, finding, name_lines, plain_numbers, span
from ..figures import save as save_picture
from .cell import SOURCE, VALIDATION_SHARE

_TITLES = {SOURCE: "source's split, of pairs"}


CURVES = ("epoch", "validation_pearson", "train_loss", "validation_loss", "regularization")
# Variants of a model are near in colour, and all are of their own lightness or dashes.
_STYLES: dict[str, tuple[str, Any]] = {
    "ridge": ("#b4b4b4", "-"),
    "mlp": ("#b4b4b4", "--"),
    "mlp-tuned": ("#6f6f6f", "-"),
    "pairwise": ("#4f9d69", (0, (1, 1))),
    "dango": ("#e07b39", (0, (5, 1))),
    "wildtype": ("#c44e52", (0, (3, 1, 1, 1))),
    "none": ("#8ec1e8", "--"),
    "kl": ("#1b6ca8", "-"),
    "bce": ("#123a5c", "-."),
    "kl-rows": ("#4a98d0", ":"),
    "features-none": ("#b79ad6", "--"),
    "features-kl": ("#5b3f8c", (0, (8, 1))),
}


def save(result: dict[str, Any], folder: Path) -> None:
    """Write the result as JSON, scores (one line a run) and epochs (one line each) as CSV, and a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{key: value for key, value in one.items() if key != "history"} for one in result["runs"]]
    write_atomic(folder / "training.json", (json.dumps({**result, "runs": runs}, indent=1) + "\n").encode())
    scores, curves = io.StringIO(), io.StringIO()
    lines = csv.writer(scores, lineterminator="\n")
    lines.writerow(["split", "variant", "seed", "validation_pearson", "test_pearson", "test_spearman", "selected", "seconds"])
    points = csv.writer(curves, lineterminator="\n")
    points.writerow(["split", "variant", "seed", *CURVES])
    for one in result["runs"]:
        test, which = one["test"], [one["split"], one["variant"], one["seed"]]
        lines.writerow([*which, one["validation_pearson"], test["pearson"], test["spearman"], one["selected"], one["seconds"]])
        for record in one.get("history", ()):
            points.writerow([*which, *(f"{record[key]:.6g}" for key in CURVES)])
    write_atomic(folder / "training.csv", scores.getvalue().encode())
    write_atomic(folder / "training_curves.csv", curves.getvalue().encode())
    plot(result, folder / "training.png")


def read(folder: Path) -> dict[str, Any]:
    """What `save` wrote; runs have a history where the curves were kept."""
    result: dict[str, Any] = json.loads((folder / "training.json").read_text())
    kept = folder / "training_curves.csv"
    histories: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    if kept.is_file():
        for line in csv.DictReader(io.StringIO(kept.read_text())):
            record = {key: int(line[key]) if key == "epoch" else float(line[key]) for key in CURVES}
            histories.setdefault((line["split"], line["variant"], line["seed"]), []).append(record)
    for one in result["runs"]:
        history = histories.get((one["split"], one["variant"], str(one["seed"])))
        if history:
            one["history"] = history
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    """Test Pearson of every model, and by epoch validation Pearson and the graph term, means over seeds; of the first split."""
    runs = {name: mine for name, mine in by_variant(result, next(iter(result["splits"]))).items() if mine}
    curves = {name: [one["history"] for one in mine if one.get("history")] for name, mine in runs.items()}
    curves = {name: histories for name, histories in curves.items() if histories}
    panels = 3 if curves else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(18, 5.2) if curves else (11, 4.4), layout="constrained", squeeze=False,
        width_ratios=(1.0, 1.15, 0.75)[:panels],
    )  # fmt: skip
    _draw_scores(axes[0, 0], runs, result["variants"])
    if curves:
        _draw_curves(axes[0, 1], axes[0, 2], curves, result["variants"])
    save_picture(figure, path, result["environment"])


def _style(name: str) -> tuple[str, Any]:
    return _STYLES.get(name, ("#404040", (0, (1, 2))))


def _draw_scores(axis: Axes, runs: dict[str, list[dict[str, Any]]], variants: dict[str, Any]) -> None:
    """A bar a model, the mean over seeds, and a point a seed."""
    known = {name: [one["test"]["pearson"] for one in mine] for name, mine in runs.items()}
    known = {name: values for name, values in known.items() if None not in values}
    known = dict(sorted(known.items(), key=lambda one: -statistics.fmean(one[1])))
    for place, (name, values) in enumerate(known.items()):
        colour, _ = _style(name)
        mean = statistics.fmean(values)
        axis.barh(place, mean, height=0.7, color=colour)
        axis.plot(values, [place] * len(values), "o", color="white", markeredgecolor=INK, markersize=4, linestyle="none")
        axis.annotate(
            f"{mean:.3f}", (max(mean, *values, 0.0), place), (6, 0), textcoords="offset points", fontsize=8, va="center"
        )
    axis.set_yticks(range(len(known)), [variants[name]["title"] for name in known], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    best = next(iter(known), None)
    title = f"Best on test pairs:\n{variants[best]['title']}" if best and len(known) > 1 else "Test pairs"
    finding(axis, title, xlabel="test Pearson correlation; points are seeds")


def _draw_curves(axis: Axes, graph_axis: Axes, curves: dict[str, list[list[dict[str, Any]]]], variants: dict[str, Any]) -> None:
    """Validation Pearson by epoch, and the graph term as a share of what it was after the first."""
    ends, graph_ends, fallen = [], [], []
    for name, histories in curves.items():
        colour, dashes = _style(name)
        style: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 1.8}
        epochs = [record["epoch"] + 1 for record in histories[0]]

        def mean(key: str, histories: list[list[dict[str, Any]]] = histories) -> list[float]:
            return [statistics.fmean(record[key] for record in records) for records in zip(*histories, strict=True)]

        scores, graph = mean("validation_pearson"), mean("regularization")
        axis.plot(epochs, scores, **style)
        ends.append(((epochs[-1], scores[-1]), variants[name]["title"], colour))
        if graph[0] > 0:
            shares = [value / graph[0] for value in graph]
            graph_axis.plot(epochs, shares, **style)
            graph_ends.append(((epochs[-1], shares[-1]), variants[name]["title"], colour))
            fallen.append(1 / shares[-1])
    (_, best, _) = max(ends, key=lambda end: end[0][1])
    finding(axis, f"Highest at its end:\n{best}", xlabel="epoch", ylabel="validation Pearson correlation")
    title = f"The graph term falls {span(fallen)} times" if fallen else "No model has a graph term"
    finding(graph_axis, title, xlabel="epoch", ylabel="graph term, share of the first epoch's")
    if fallen:
        graph_axis.set_yscale("log")
        plain_numbers(graph_axis.yaxis)
    name_lines(axis, ends)
    name_lines(graph_axis, graph_ends)


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
