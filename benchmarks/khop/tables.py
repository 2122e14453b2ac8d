"""The rows for a reader: tables, the page that holds them, and the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..measure import table
from .peers import PEERS, PRODUCTS
from .plan import HEAPS, SET_SIZE, Row, hops_label
from .targets import best_fill, find, reason

# What the group counted and measured: hops -> (nodes a sample, edges a sample).
GROUP = {1: (697.0, 196_445.6), 2: (3_758.9, 1_878_158.4), 3: (4_508.1, 2_166_602.5)}


def target_table(result: dict[str, Any]) -> str:
    lines = []
    for entry in result["targets"]:
        least = "least" in entry
        bound = f">= {entry['least']:.3g}" if least else f"<= {entry['most']:.3g}"
        if entry["met"] is None:
            lines.append([entry["target"], bound, entry["reason"], ""])
            continue
        value = entry["value"]
        by = entry["least"] / value if least and value > 0 else value / entry["most"] if not least else math.inf
        lines.append([entry["target"], bound, f"{value:.3g}", "met" if entry["met"] else f"MISSED by {by:.2f} x"])
    return table(("target", "bound", "measured", ""), lines)


def extract_table(rows: Sequence[Row], num_sets: int) -> str:
    """Median ms a batch by heap and hops; peak and output at the most hops of 2 and fewer that were run."""
    mine = [row for row in rows if row["kind"] == "extract" and row["sets"] == num_sets]
    columns = list(dict.fromkeys((row["heap"], row["hops"]) for row in mine))
    columns.sort(key=lambda column: (column[0] != "kept", column[1]))
    names = list(dict.fromkeys(row["implementation"] for row in mine))
    names.sort(key=lambda name: name.startswith("ours"))
    shown = max((h for _, h in columns if h <= 2), default=max((h for _, h in columns), default=0))
    head = ["implementation", *(f"{hops_label(h)}, {heap}" for heap, h in columns)]
    head += [f"{what}, {hops_label(shown)}" for what in ("peak MiB", "output MiB", "GB/s")]
    lines = []
    for name in names:
        cells = [_cell(find(mine, "extract", name, heap=heap, hops=h)) for heap, h in columns]
        if len(set(cells)) == 1 and not cells[0][:1].isdigit():  # one reason for all of them
            lines.append([name, cells[0], *[""] * (len(columns) + 2)])
            continue
        sizes = [
            row for heap in HEAPS for row in mine
            if (row["implementation"], row["heap"], row["hops"], row["status"]) == (name, heap, shown, "measured")
        ]  # fmt: skip
        last = sizes[0] if sizes else {}
        for key in ("bytes", "output_bytes"):
            cells.append(f"{last[key] / 2**20:,.0f}" if key in last else "")
        cells.append(f"{sizes[-1]['rate'] / 1e9:.1f}" if sizes and "rate" in sizes[-1] else "")
        lines.append([name, *cells])
    return table(head, lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "not run"
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    t = row["seconds"]
    return f"{_ms(t['median'])} ({_ms(t['q20'])} to {_ms(t['q80'])})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def part_table(rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row["kind"] in ("part", "fill")]
    lines = [
        [
            row["implementation"], row["heap"], str(row.get("sets", "")), str(row.get("hops", row.get("when", ""))),
            _cell(row), f"{row['rate'] / 1e9:.1f}" if "rate" in row else "",
        ]
        for row in mine
    ]  # fmt: skip
    return table(("part", "heap", "B", "hops", "ms", "GB/s"), lines)


def product_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["kind"] != "product":
            continue
        passes = "forward + backward" if row["backward"] else "forward"
        where = [row["implementation"], row["relation"], row["mask"], passes, row["heap"]]
        if row["status"] != "measured":
            lines.append([*where, f"{row['status']}: {row['reason']}", *[""] * 4])
            continue
        cells = [_ms(row[phase]["median"]) for phase in ("build", "product", "both")]
        lines.append([*where, *cells, f"{row['bytes'] / 2**20:,.0f}", f"{row['error']:.1e}"])
    lines.sort(key=lambda line: (line[1], line[2], line[3], line[4]))
    head = ("implementation", "relation", "mask", "passes", "heap", "build ms", "product ms", "both ms", "peak MiB", "error")
    return table(head, lines)


def curve_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["kind"] == "curve":
            done = row["status"] == "measured"
            cost = f"{row['seconds_a_sample'] * 1e6:.3g}" if done else ""
            lines.append([f"{row['genes']:,}", f"{row['edges']:,}" if done else "", f"{row['sets']:,}", _cell(row), cost])
    return table(("genes", "entries", "B", "ms a batch", "us a sample"), lines)


def count_table(rows: Sequence[Row]) -> str:
    """Nodes and edges a sample beside the group's."""
    hops = sorted({row["hops"] for row in rows if row["kind"] == "counts"})
    group = [f"{nodes:,.1f} nodes, {edges:,.1f} edges" for nodes, edges in (GROUP[h] for h in hops if h in GROUP)]
    lines = [["the group's cell and measured mutants", *group]] if len(group) == len(hops) else []
    for graph, size in dict.fromkeys((row["graph"], row["size"]) for row in rows if row["kind"] == "counts"):
        cells = []
        for h in hops:
            row = find(rows, "counts", "khop_subgraph", graph=graph, size=size, hops=h)
            right = row is not None and row["status"] == "measured"
            cells.append(f"{row['nodes']:,.1f} nodes, {row['edges']:,.1f} edges" if row and right else reason([row]))
        lines.append([f"synthetic cell {graph}, sets of {size}", *cells])
    return table(("", *(hops_label(h) for h in hops)), lines)


def _described(implementations: Mapping[str, Callable[..., Any]]) -> str:
    return "\n".join(f"* {name}: {(made.__doc__ or '').splitlines()[0]}" for name, made in implementations.items())


def page(result: dict[str, Any]) -> str:
    """Everything as Markdown."""
    rows, about = result["rows"], ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    loops = "AVX-512" if result["avx512"] else "themselves: this processor lacks AVX-512 with VBMI2"
    fill = best_fill(rows)
    fastest = "" if fill is None else f" The fastest was {fill['implementation']}: {fill['rate'] / 1e9:.1f} GB/s."
    sets = sorted({row["sets"] for row in rows if row["kind"] == "extract"})
    measured = [row for row in rows if row["kind"] == "extract" and row["status"] == "measured"]
    firsts = [next(row for row in measured if row["sets"] == b) for b in sorted({row["sets"] for row in measured})]
    batches = "\n\n".join(f"B = {b}:\n\n{extract_table(rows, b)}" for b in sets)
    compared = ", ".join(f"{row['compared']} of {row['sets']}" for row in firsts)
    kept = ", ".join(f"{key}={value}" for key, value in HEAPS["kept"].items())
    samples = next((row["samples"] for row in rows if row["kind"] == "counts" and row["status"] == "measured"), 0)
    return f"""# k-hop

{about}

{result["graph"]}; sets of {SET_SIZE} genes, direction "in", per relation. Every implementation ran in a process of its own, and
what it returned was held to the definition before it was timed: the genes of every sample, the number of its edges in every
relation, and as pairs of genes the edges of {compared} samples. Medians of ms a batch, 20% to 80%
quantile behind; freeing what was returned is not timed. The heap "kept" is glibc's with {kept}.

## Targets

{target_table(result)}

## Extraction

"fresh" makes its arrays in every batch, as the peers do; "reused" is `out=` the batch before. The peak is above graph and sets,
with the arrays that are reused, under the default heap where it was run. GB/s is output over time of the whole call, under the
kept heap. "portable" is CELLATTN_ISA=portable, the loops that every processor runs, beside {loops}.

{_described(PEERS)}

{batches}

## Its parts, and how fast memory fills

Fills are of {result["plan"]["fill_bytes"] / 2**20:,.0f} MiB that were touched before.{fastest}

{part_table(rows)}

## Message passing

B = {min(result["plan"]["set_counts"])}, {result["plan"]["features"]} features, float32, x shared by the samples; `error` is the
largest against float64, output and gradient, over the largest entry. `masked_spmm` has nothing to build. Unions number the
genes of all samples.

{_described(PRODUCTS)}

{product_table(rows)}

## Traversal over B and N

{curve_table(rows)}

![cost]({result["name"]}.png)

## Nodes and edges a sample

Means over {samples:,} sets, beside the group's report of its cell.

{count_table(rows)}

The figures differ for three reasons. The synthetic cell shares its hubs between all relations, so that one hop more reaches
most genes where real relations lead to different ones. Its sets are drawn evenly from all genes; the group's are measured
mutants, of one to three genes. And undirected relations are stored in one direction, which halves what a hop follows;
symmetrised, every such edge is counted twice.
"""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Extraction by implementation, and the cost of traversal a sample over B and over N."""
    drawn, axes = plt.subplots(1, 3, figsize=(16, 5.6), layout="constrained", width_ratios=(1.5, 1, 1))
    batch = min((row["sets"] for row in rows if row["kind"] == "extract"), default=0)
    extracted = [row for row in rows if row["kind"] == "extract" and row["status"] == "measured" and row["sets"] == batch]
    heap = "kept" if any(row["heap"] == "kept" for row in extracted) else "default"
    extracted = [row for row in extracted if row["heap"] == heap]
    names = list(dict.fromkeys(row["implementation"] for row in extracted))
    names.sort(key=lambda name: name.startswith("ours"))
    hops = sorted({row["hops"] for row in extracted})
    for k, h in enumerate(hops):
        mine = [row for row in extracted if row["hops"] == h]
        places = [names.index(row["implementation"]) + 0.27 * (k - 1) for row in mine]
        values = [row["seconds"]["median"] * 1e3 for row in mine]
        bars = axes[0].barh(places, values, height=0.25, color=f"C{k}", label=hops_label(h))
        axes[0].bar_label(bars, fmt=lambda x: _ms(x / 1e3), padding=2, fontsize=6)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set(xscale="log", xlabel=f"ms a batch, B = {batch}, {heap} heap", title="extraction")
    axes[0].margins(x=0.15)
    if hops:
        axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    curve = [row for row in rows if row["kind"] == "curve" and row["status"] == "measured"]
    panels = (
        (axes[1], "sets", "genes", "samples a batch (B)", "{:,} genes"),
        (axes[2], "genes", "sets", "genes (N)", "B = {:,}"),
    )
    for axis, over, by, label, title in panels:
        ticks: set[int] = set()
        for k, fixed in enumerate(sorted({row[by] for row in curve})):
            line = sorted((row for row in curve if row[by] == fixed), key=lambda row: row[over])
            if len(line) < 2:
                continue
            ticks |= {row[over] for row in line}
            x, y = [row[over] for row in line], [row["seconds_a_sample"] * 1e6 for row in line]
            axis.plot(x, y, marker="o", markersize=4, color=f"C{k}", label=title.format(fixed))
        axis.set(xscale="log", yscale="log", xlabel=label, title="traversal, us a sample")
        axis.set_visible(bool(ticks))
        if ticks:
            axis.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)], fontsize=7, rotation=30)
            axis.legend(frameon=False, fontsize=8)
            axis.set_xticks([], minor=True)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
