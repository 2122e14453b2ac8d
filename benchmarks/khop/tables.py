"""The rows for a reader: tables, the page that holds them, and the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..figures import OURS, factor, finding, look, plain_numbers, save, span
from ..measure import table, target_table
from .peers import PEERS, PRODUCTS
from .plan import HEAPS, SET_SIZE, Row, hops_label
from .targets import best_fill, find, reason

# What the methods' authors counted, of their cell and measured mutants: hops -> (nodes a sample, edges a sample).
PUBLISHED = {1: (697.0, 196_445.6), 2: (3_758.9, 1_878_158.4), 3: (4_508.1, 2_166_602.5)}


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
        if not any(cell[:1].isdigit() for cell in cells):  # no figure: see `missing`
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


def missing(rows: Sequence[Row]) -> str:
    """What has no figure, and why, in one paragraph."""
    stopped: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "measured":
            verdict = "" if row["status"] == "cannot run" else f"{row['status']}: "
            stopped.setdefault(verdict + row["reason"].rstrip("."), []).append(row["implementation"])
    return "; ".join(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in stopped.items())


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
    """Nodes and edges a sample beside what was published."""
    hops = sorted({row["hops"] for row in rows if row["kind"] == "counts"})
    published = [f"{nodes:,.1f} nodes, {edges:,.1f} edges" for nodes, edges in (PUBLISHED[h] for h in hops if h in PUBLISHED)]
    lines = [["published: a real cell, measured mutants", *published]] if len(published) == len(hops) else []
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
    counts = f"\n{_counts(rows, samples)}" if samples else ""
    return f"""# k-hop

{about}

{result["graph"]}; sets of {SET_SIZE} genes, direction "in", per relation. Every implementation ran in a process of its own, and
what it returned was held to the definition before it was timed: the genes of every sample, the number of its edges in every
relation, and as pairs of genes the edges of {compared} samples. Medians of ms a batch, 20% to 80%
quantile behind; freeing what was returned is not timed. The heap "kept" is glibc's with {kept}.

## Targets

{target_table(result["targets"])}

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

## What has no figure

{missing(rows) or "Nothing: all could run."}
{counts}"""


def _counts(rows: Sequence[Row], samples: int) -> str:
    return f"""## Nodes and edges a sample

Means over {samples:,} sets, beside what the methods' authors published of their cell.

{count_table(rows)}

The figures differ for three reasons. The synthetic cell shares its hubs between all relations, so that one hop more reaches
most genes where real relations lead to different ones. Its sets are drawn evenly from all genes; the published ones are
measured mutants, of one to three genes. And undirected relations are stored in one direction, which halves what a hop follows;
symmetrised, every such edge is counted twice.
"""


SHOWN = ("ours, int64 COO, fresh", "ours, int64 COO, reused", "ours, int32 COO, reused", "ours, int32 CSR, reused")
_HATCHES = dict(zip(SHOWN, ("", "//", "xx", "++"), strict=True))


def draw(result: dict[str, Any], path: Path) -> None:
    """Extraction by hops, a bar an implementation; and the cost of traversal a sample over B and, where it was run, over N."""
    rows = result["rows"]
    batch = min((row["sets"] for row in rows if row["kind"] == "extract"), default=0)
    extracted = [row for row in rows if row["kind"] == "extract" and row["status"] == "measured" and row["sets"] == batch]
    heap = "kept" if any(row["heap"] == "kept" for row in extracted) else "default"
    extracted = [row for row in extracted if row["heap"] == heap]
    curve = [row for row in rows if row["kind"] == "curve" and row["status"] == "measured"]
    panels = [
        panel for panel in (("sets", "genes", "samples a batch (B)", "{:,} genes"), ("genes", "sets", "genes (N)", "B = {:,}"))
        if len({row[panel[0]] for row in curve}) > 1
    ]  # fmt: skip
    drawn, axes = plt.subplots(
        1, 1 + len(panels), figsize=(7.5 + 4.2 * len(panels), 5.6), layout="constrained", squeeze=False,
        width_ratios=(1.7, *[1.0] * len(panels)),
    )  # fmt: skip
    _draw_extraction(axes[0, 0], extracted, batch, heap)
    for axis, (over, by, xlabel, title) in zip(axes[0, 1:], panels, strict=True):
        ticks: set[int] = set()
        costs: list[float] = []
        for k, fixed in enumerate(sorted({row[by] for row in curve})):
            line = sorted((row for row in curve if row[by] == fixed), key=lambda row: row[over])
            if len(line) < 2:
                continue
            ticks |= {row[over] for row in line}
            x, y = [row[over] for row in line], [row["seconds_a_sample"] * 1e6 for row in line]
            costs = costs or y
            style = {**look("ours").line(), "marker": "osD"[k % 3], "linestyle": ("-", "--", ":")[k % 3]}
            axis.plot(x, y, **style)
            end, side = (0, (4, 6, "left")) if y[0] > y[-1] else (-1, (-8, 1, "right"))
            axis.annotate(
                title.format(fixed), (x[end], y[end]), side[:2], textcoords="offset points", ha=side[2], fontsize=8, color=OURS
            )
        size = max(ticks) / min(ticks)
        text = (
            f"A sample is {factor(costs[0] / min(costs))} times cheaper\nin larger batches" if over == "sets"
            else f"{factor(size)} times the genes:\n{factor(max(costs) / min(costs))} times the cost a sample"
        )  # fmt: skip
        finding(axis, text, xscale="log", yscale="log", xlabel=xlabel, ylabel="traversal, microseconds a sample")
        axis.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)], fontsize=7, rotation=30)
        axis.set_xticks([], minor=True)
        plain_numbers(axis.yaxis)
    save(drawn, path, result["environment"])


def _draw_extraction(axis: Axes, rows: Sequence[Row], batch: int, heap: str) -> None:
    """Time a batch of peers and of the main ways to call ours, in groups of hops."""
    names = [name for name in dict.fromkeys(row["implementation"] for row in rows) if not name.startswith("ours")]
    peers = tuple(names)
    names += [name for name in SHOWN if any(row["implementation"] == name for row in rows)]
    hops = sorted({row["hops"] for row in rows})
    ratios = []
    for k, name in enumerate(names):
        mine = {row["hops"]: row["seconds"]["median"] for row in rows if row["implementation"] == name}
        places = [hops.index(h) + 0.11 * (k - (len(names) - 1) / 2) for h in mine]
        style = {**look(name).bar(), **({"hatch": _HATCHES[name]} if name in _HATCHES else {})}
        said = name.replace("ours, ", "khop_subgraph, ").replace("fresh", "new arrays").replace("reused", "out=")
        bars = axis.barh(places, [seconds * 1e3 for seconds in mine.values()], height=0.1, label=said, **style)
        axis.bar_label(bars, fmt=lambda x: _ms(x / 1e3), padding=2, fontsize=7, fontweight="bold" if name in SHOWN else None)
    for h in hops:
        at = [row for row in rows if row["hops"] == h]
        theirs = min((row["seconds"]["median"] for row in at if row["implementation"] in peers), default=None)
        ours = [row["seconds"]["median"] for row in at if row["implementation"] in SHOWN]
        ratios += [theirs / seconds for seconds in (max(ours), min(ours))] if theirs and ours else []
    text = f"{span(ratios)} times as fast as the fastest peer" if ratios else "extraction"
    finding(axis, text, xscale="log", xlabel=f"ms a batch of {batch}, {heap} heap")
    axis.set_yticks(range(len(hops)), [hops_label(h) for h in hops])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    plain_numbers(axis.xaxis)
    if hops:
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.11), ncols=3)
