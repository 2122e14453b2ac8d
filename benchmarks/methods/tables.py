"""The rows for a reader: tables beside what was published, the page that holds them, and the picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from cellattn._file import write_atomic

from ..figures import INK, finding, label, look, plain_numbers, short, span
from ..figures import save as save_picture
from ..measure import table
from .peers import PEERS
from .registry import METHODS
from .workload import SET_SIZE

Row = dict[str, Any]
OFF = 0.2  # of a bar from the middle of its method
TITLES = {name: METHODS[name].name for name in METHODS}


@dataclass(frozen=True)
class Published:
    """What the authors of the methods measured on one GPU, on 10,000 samples in 100 steps."""

    steps_per_second: float
    samples_per_second: float
    megabytes: float  # a batch, on the GPU
    nodes: str  # a sample
    edges: float


PUBLISHED = {
    "dango": Published(545.120, 34_887.7, 4.0, "(103.2)", 0),  # 6,607 over the batch of 64; a set has 1 to 3 genes
    "lazy": Published(1.433, 40.1, 1_155.4, "6,607", 2_527_683),
    "khop-1": Published(6.798, 190.3, 88.7, "697.0", 196_445.6),
    "khop-2": Published(2.499, 70.0, 808.7, "3,758.9", 1_878_158.4),
    "khop-3": Published(2.136, 59.8, 932.2, "4,508.1", 2_166_602.5),
}


def find(rows: Sequence[Row], method: str, implementation: str = "ours") -> Row:
    """The row of an implementation; {} if there is none."""
    return next((row for row in rows if (row["method"], row["implementation"]) == (method, implementation)), {})


COLUMNS = (
    "method", "implementation", "batch_size", "steps_per_second", "samples_per_second", "batch_bytes", "peak_bytes", "nodes",
    "edges", "parameters", "error", "reason",
)  # fmt: skip


def save(result: dict[str, Any], folder: Path) -> None:
    """Write the result as CSV (one line a row), Markdown and a picture."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*COLUMNS, "loading_ms", "model_ms", "optimizer_ms", "largest_batch", "samples_per_second_there"])
    for row in result["rows"]:
        phases = [1e3 * row[name]["median"] if name in row else "" for name in ("loading", "model", "optimizer")]
        largest = row.get("largest")
        found = [largest["batch_size"], largest["samples_per_second"]] if isinstance(largest, dict) else ["", ""]
        lines.writerow([*(row.get(name, "") for name in COLUMNS), *phases, *found])
    write_atomic(folder / "methods.csv", text.getvalue().encode())
    write_atomic(folder / "methods.md", page(result).encode())
    draw(result, folder / "methods.png")


def times_table(rows: Sequence[Row]) -> str:
    """What a step of each implementation costs."""
    head = [
        "method", "implementation", "batch", "loading, ms", "forward + backward, ms", "optimizer, ms", "it/s", "samples/s",
        "ours over it", "peak MB of a step", "error",
    ]  # fmt: skip
    lines = []
    for row in rows:
        ours = row["implementation"] == "ours"
        start = [f"**{TITLES[row['method']]}**" if ours else "", row["implementation"]]
        if "reason" in row:
            lines.append([*start, f"no figure: {row['reason']}", *[""] * (len(head) - 3)])
            continue
        base = find(rows, row["method"])
        ratio = "" if ours or "reason" in base else f"{base['samples_per_second'] / row['samples_per_second']:.3g} x"
        phases = [short(1e3 * row[name]["median"]) for name in ("loading", "model", "optimizer")]
        rates = [f"{row['steps_per_second']:.3g}", short(row["samples_per_second"]), ratio]
        error = f"{row['error']:.0e}" if "error" in row else ""
        alike = f" ({row['alike']['peak_bytes'] / 1e6:,.0f})" if "alike" in row else ""
        lines.append([*start, str(row["batch_size"]), *phases, *rates, f"{row['peak_bytes'] / 1e6:,.0f}{alike}", error])
    return table(head, lines)


def methods_table(rows: Sequence[Row], scores: dict[str, tuple[str, str]] | None = None) -> str:
    """Each method of ours: how fast, in which batches, how large, and what it learns.

    Args:
        scores: (test Pearson, oversmoothing) of a method by its name, as the table shows them.
    """
    head = [
        "method",
        "samples/s",
        "times its peer",
        "largest batch",
        "samples/s there",
        "parameters",
        "test Pearson",
        "oversmoothing",
    ]
    lines = []
    for row in _measured(rows):
        method = row["method"]
        about = [f"{row['parameters'] / 1e6:.2f} M", *(scores or {}).get(method, ("", ""))]
        rate = [short(row["samples_per_second"]), over_peer(rows, method)]
        lines.append([TITLES[method], *rate, *largest_text(row.get("largest")), *about])
    return table(head, lines)


def published_table(rows: Sequence[Row]) -> str:
    """Each method of ours beside what its authors published of it, of one GPU."""
    head = [
        "method", "it/s", "published", "samples/s", "published", "MB a batch over the bus", "published",
        "genes a sample", "published", "edges a sample", "published",
    ]  # fmt: skip
    lines = []
    for row in _measured(rows):
        theirs = PUBLISHED.get(row["method"])
        ours = (
            f"{row['steps_per_second']:.3g}", short(row["samples_per_second"]), f"{row['batch_bytes'] / 1e6:.3g}",
            f"{row['nodes']:,.1f}", f"{row['edges']:,.0f}",
        )  # fmt: skip
        published = (
            (f"{theirs.steps_per_second:g}", f"{theirs.samples_per_second:,.1f}", f"{theirs.megabytes:,.1f}", theirs.nodes,
             f"{theirs.edges:,.0f}")
            if theirs else ("",) * len(ours)
        )  # fmt: skip
        lines.append([TITLES[row["method"]], *(cell for pair in zip(ours, published, strict=True) for cell in pair)])
    return table(head, lines)


def _measured(rows: Sequence[Row]) -> list[Row]:
    """Ours, of each method that has figures."""
    ours = (find(rows, method) for method in dict.fromkeys(row["method"] for row in rows))
    return [row for row in ours if row and "reason" not in row]


def missing(rows: Sequence[Row]) -> str:
    """What has no figure, and why, in one paragraph."""
    return "; ".join(f"{TITLES[row['method']]}, {row['implementation']}: {row['reason']}" for row in rows if "reason" in row)


def over_peer(rows: Sequence[Row], method: str) -> str:
    """Samples a second over those of the method's peer; "delta" is exact, so that the peers of "lazy" are its own."""
    peers = {
        name: find(rows, of, name) for of in (method, "lazy" if method == "delta" else method) for name in PEERS.get(of, ())
    }
    ours = find(rows, method)["samples_per_second"]
    return ", ".join(f"{ours / row['samples_per_second']:.3g}" for row in peers.values() if "samples_per_second" in row)


def largest_text(largest: dict[str, Any] | str | None) -> tuple[str, str]:
    """The largest batch that was found to fit, with its peak and whether the search stopped there; samples a second there."""
    if not isinstance(largest, dict):
        return largest or "", ""
    peak = f", {largest['peak_bytes'] / 1e9:.1f} GB" if largest["peak_bytes"] else ""
    end = " (the cap)" if largest["limit"] is None else f" ({largest['limit']:,} does not fit)"
    rate = largest["samples_per_second"]
    return f"{largest['batch_size']:,}{peak}{end}", short(rate) if rate else ""


def page(result: dict[str, Any], scores: dict[str, tuple[str, str]] | None = None) -> str:
    """The whole page of results."""
    about = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    parts = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections(result, scores).items())
    return f"""# Methods

{about}

{setting(result)}

![methods](methods.png)

{parts}
"""


def setting(result: dict[str, Any]) -> str:
    """What was run, where and how."""
    plan = result["plan"]
    text = f"{plan['samples']:,} random sets of {SET_SIZE} genes, {plan['least_steps']} to {plan['steps']} steps a row"
    precision = plan["autocast"] or "float32"
    if plan["device"] == "cuda":
        precision += ", the transformer of the published size in bfloat16"
    scaled = (
        " **A scaled setting, for a CPU**: fewer steps than the published 100. The published figures are from a GPU, so that "
        "beside ours they compare sizes, not speeds."
    )
    return f"{result['graph']}; {text}, {plan['device']}, {precision}.{scaled if plan['steps'] < 100 else ''}"


def sections(result: dict[str, Any], scores: dict[str, tuple[str, str]] | None = None) -> dict[str, str]:
    """The tables by their titles, each with how it was made."""
    plan, rows = result["plan"], result["rows"]
    rate = "steps in a row" if plan["device"] == "cuda" else "the median step"
    budget = f"{plan['budget'] / 1e9:.1f} GB of the process" if plan["budget"] else "the GPU's memory"
    alike = result.get("alike_environment")
    elsewhere = f" The memory in equal batches is of {alike['device']}, commit {alike['commit']}." if alike else ""
    return {
        "Speed, size and score": f"""The largest batch was measured: two training steps in a process of its own
within {budget}, doubling and then bisection to {plan["resolution"]:.0%}, up to {plan["cap"]:,}.

{methods_table(rows, scores)}""",
        "Beside what was published": f"""Published: what the authors of these methods reported, on one GPU; their nodes a
sample of DANGO are an artefact of dividing all genes by the batch. Genes and edges a sample are those that a sample has to
itself: DANGO, the pairwise model and the transformer encode one cell for the whole batch. Only indices, types and phenotypes
cross the bus.

{published_table(rows)}""",
        "What a step costs": f"""Medians; it/s are of {rate}. A peer is the same method on the same parameters, as
it is written with PyG and dense PyTorch, its graph processing and collation counted as loading; `error` is the largest
difference of its predictions from ours, as a share of the largest. Where each of its samples holds a copy of the graph, its
batch is smaller, and the ratio is of samples a second; in brackets: a step of ours in batches of that size.{elsewhere}

{times_table(rows)}""",
    }


def peak_beside(rows: Sequence[Row], method: str, peer: Row) -> float | None:
    """Bytes that our step takes in batches of the size that a peer's had; None where that was not measured."""
    ours = find(rows, method)
    if ours.get("batch_size") == peer["batch_size"]:
        return float(ours["peak_bytes"])
    alike = ours.get("alike", {})
    return float(alike["peak_bytes"]) if alike.get("batch_size") == peer["batch_size"] else None


def draw(result: dict[str, Any], path: Path) -> None:
    """Samples a second, peak memory in equal batches, and apart from both what was published; logarithmic axes."""
    rows = result["rows"]
    timed = [row for row in rows if "reason" not in row]
    methods = list(dict.fromkeys(row["method"] for row in timed))
    place = {method: i for i, method in enumerate(methods)}
    published = {place[method]: PUBLISHED[method].samples_per_second for method in methods if method in PUBLISHED}
    panels = 3 if published else 2
    figure, axes = plt.subplots(
        1, panels, figsize=(14, 1.5 + 0.55 * max(len(methods), 1)), sharey=True, layout="constrained",
        width_ratios=(1.25, 1, 0.7)[:panels],
    )  # fmt: skip
    rates: dict[str, dict[float, float]] = {}
    peaks: dict[str, dict[float, float]] = {}
    faster, smaller, said = [], [], {}
    for row in timed:
        name, at = row["implementation"], place[row["method"]]
        offset = -OFF if name == "ours" else OFF
        rates.setdefault(name, {})[at + offset] = row["samples_per_second"]
        if name == "ours":
            continue
        base = find(rows, row["method"])
        if "samples_per_second" in base:
            faster.append(base["samples_per_second"] / row["samples_per_second"])
        ours = peak_beside(rows, row["method"], row)
        if ours is not None:
            peaks.setdefault("ours", {})[at - OFF] = ours / 1e6
            peaks.setdefault(name, {})[at + OFF] = row["peak_bytes"] / 1e6
            smaller.append(row["peak_bytes"] / ours)
            said[at] = f"batches of {row['batch_size']}"
    alike = result.get("alike_environment")
    of = f"\non {alike['device']}, {alike['date']}" if alike else ""
    shown = (
        (
            axes[0],
            rates,
            f"{span(faster)} times as many samples a second" if faster else "samples a second",
            "samples a second",
        ),
        (
            axes[1],
            peaks,
            f"{span(smaller)} times less memory" if smaller else "memory",
            f"peak of a step in equal batches, MB{of}",
        ),
    )
    for axis, bars_of, title, xlabel in shown:
        for name, values in bars_of.items():
            bars = axis.barh(list(values), list(values.values()), height=0.36, label=label(name), **look(name).bar())
            texts = [
                short(x) + (f"  {said[round(y + OFF)]}" if axis is axes[1] and name == "ours" else "")
                for y, x in values.items()
            ]
            axis.bar_label(bars, texts, padding=2, fontsize=7, fontweight="bold" if name == "ours" else None)
        finding(axis, title, xscale="log", xlabel=xlabel)
    for method, at in place.items():
        if at not in said:
            known = "not measured in equal batches" if PEERS.get(method) else "no peer of its own"
            axes[1].annotate(known, (0.02, at), xycoords=("axes fraction", "data"), fontsize=7, va="center", color=INK)
    if published:
        bars = axes[2].barh(list(published), list(published.values()), height=0.36, color="white", edgecolor=INK, hatch="//")
        axes[2].bar_label(bars, fmt=short, padding=2, fontsize=7)
        finding(axes[2], "Published, on one GPU,\nmost likely of loading alone", xscale="log", xlabel="samples a second")
    for axis in axes:
        axis.margins(x=0.16)
        plain_numbers(axis.xaxis)
    axes[0].set_yticks(list(place.values()), [TITLES[method] for method in place], fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    save_picture(figure, path, result["environment"])
