"""The rows for a reader: tables, what the library is held to, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ..figures import factor, finding, label, look, name_lines, plain_numbers, save, span
from .peers import CONV, FLOORS, SDPA_MASK

CELL_SHAPES = ((9, 20), (8, 64))  # heads, head dimension, of the suite "cell"
PHASES = ("forward", "backward")
# Of bounds: rounding stays far below, the spread of a mean over a few random draws far above.
DRAWN = 0.1
DENSE = ("dense eager", "dense compiled")


def figure(row: dict[str, Any] | None, name: str, key: str) -> float | None:
    """Median seconds of a phase, or bytes, of an implementation in a row; None where it was not measured.

    A CPU's process may take pages so few, or so few new ones, that its memory does not show.
    """
    outcome = row["implementations"].get(name, {}) if row else {}
    if outcome.get("status") != "measured":
        return None
    value = float(outcome["bytes"] if key == "bytes" else outcome[key]["median"])
    return value if value > 0 else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, a line an implementation that was measured; times are medians."""
    lines = [
        "| row | implementation | forward | backward | both (20% to 80%) | of ours | memory | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = figure(row, "ours", "both")
        measured = {name: one for name, one in row["implementations"].items() if one["status"] == "measured"}
        for i, (name, outcome) in enumerate(measured.items()):
            both = outcome["both"]
            cells = [
                f"{row['suite']}: {row['name']}" if i == 0 else "",
                name,
                *(_time(outcome[phase]["median"]) for phase in PHASES),
                f"{_time(both['median'])} ({_time(both['q20'])} to {_time(both['q80'])})",
                f"{both['median'] / ours:.2f} x" if ours else "",
                f"{outcome['bytes'] / 1e6:,.0f} MB",
                _error(outcome),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _error(outcome: dict[str, Any]) -> str:
    """An error, and where it is the deviation of a mean over random draws, its own bound, which is no rounding's."""
    drawn = outcome["bound"] > DRAWN
    return f"{outcome['error']:.0e}" + (f" of {outcome['bound']:.1f}, drawn" if drawn else "")


def missing(rows: Sequence[dict[str, Any]]) -> str:
    """What has no figure, in one paragraph: what is wrong first, then each reason with the implementations it stopped."""
    stopped: dict[str, list[str]] = {}
    for row in rows:
        for name, outcome in row["implementations"].items():
            if outcome["status"] != "measured":
                reason = "WRONG in " + row["name"] + ": " if outcome["status"] == "wrong" else ""
                stopped.setdefault(reason + outcome["reason"].rstrip("."), []).append(name)
    lines = sorted(stopped.items(), key=lambda one: not one[0].startswith("WRONG"))
    return "; ".join(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the library is held to: a ratio a line, whether it is within its bound, or why it was not measured."""
    found: list[dict[str, Any]] = []

    def row_of(suite: str, **facts: Any) -> dict[str, Any] | None:
        return next((r for r in rows if r["suite"] == suite and all(r.get(k) == v for k, v in facts.items())), None)

    def add(
        name: str,
        over: tuple[dict[str, Any] | None, Sequence[str]],
        under: tuple[dict[str, Any] | None, Sequence[str]],
        *,
        most: float | None = None,
        least: float | None = None,
        key: str = "both",
    ) -> None:
        """The fastest of some implementations in a row over the fastest of some in another."""
        values, missing = [], []
        for row, names in (over, under):
            known = {n: value for n in names if (value := figure(row, n, key)) is not None}
            values.append(min(known.values(), default=None))
            if not known:
                missing.append(_why_missing(row, names))
        top, bottom = values
        ratio = None if top is None or bottom is None else top / bottom
        entry: dict[str, Any] = {"target": name, "value": ratio, **({"most": most} if least is None else {"least": least})}
        if ratio is None:
            entry |= {"met": None, "reason": f"not measured: {'; '.join(dict.fromkeys(missing))}"}
        else:
            entry["met"] = ratio <= most if most is not None else ratio >= (least or 0.0)
        found.append(entry)

    ours = ("ours",)
    for heads, dim in CELL_SHAPES:
        shape = {"heads": heads, "head_dim": dim, "rows": 1.0}
        tied, bare = row_of("cell", ties=9, **shape), row_of("cell", ties=0, **shape)
        of = f"{heads} heads of {dim}, 9 ties"
        add(f"graph_attention over the fastest plain attention, {of}", (tied, ours), (tied, FLOORS), most=1.15)
        for peer, least in (("FlexAttention + gather", 1.5), ("FlashAttention 4 + gather", 1.0), ("dense eager", 10.0)):
            add(f"{peer} over graph_attention, {of}", (tied, (peer,)), (tied, ours), least=least)
        add(f"memory of graph_attention over dense eager, {of}", (tied, ours), (tied, ("dense eager",)), most=0.05, key="bytes")
        add(f"graph_attention over our attention without ties, {of}", (tied, ours), (bare, ours), most=1.10)
    pair = (row_of("ops", name="attention_logsumexp"), ours), (row_of("ops", name="attention with lse"), ours)
    add("attention_logsumexp over attention, forward", *pair, most=0.7, key="forward")
    dropped = row_of("ops", name="attention with lse, dropout 0.1")
    add("attention with dropout over attention", (dropped, ours), (pair[1][0], ours), most=1.25)
    edges = row_of("ops", name="edge_attention")
    for peer, least in ((SDPA_MASK, 10.0), (CONV, 3.0)):
        add(f"{peer} over edge_attention", (edges, (peer,)), (edges, ours), least=least)
        add(f"memory of edge_attention over {peer}", (edges, ours), (edges, (peer,)), most=0.05, key="bytes")
    return found


def _why_missing(row: dict[str, Any] | None, names: Sequence[str]) -> str:
    if row is None:
        return "its row was not run"
    outcomes = ((name, row["implementations"].get(name)) for name in names)
    return "; ".join(
        f"{name}: {outcome.get('reason', 'too little to be seen') if outcome else 'not in this run'}"
        for name, outcome in outcomes
    )


def fastest(row: dict[str, Any], names: Sequence[str], key: str) -> float | None:
    """The least seconds, or bytes, of some implementations in a row."""
    return min((value for name in names if (value := figure(row, name, key)) is not None), default=None)


def over_dense(rows: Sequence[dict[str, Any]], key: str, names: Sequence[str] = DENSE) -> list[float]:
    """What the best of some dense implementations takes over what ours does, for each row that has both."""
    pairs = [(fastest(row, names, key), figure(row, "ours", key)) for row in rows]
    return [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]


def draw_ops(result: dict[str, Any], path: Path) -> None:
    """Time and peak memory of every op, ours beside dense PyTorch and, of hard masks, PyG, on logarithmic axes."""
    checked = [row for row in result["rows"] if row["suite"] == "ops" and figure(row, "ours", "both") is not None]
    drawn, axes = plt.subplots(1, 2, figsize=(11.5, 1.4 + 0.75 * len(checked)), sharey=True, layout="constrained")
    times, sizes = over_dense(checked, "both"), over_dense(checked, "bytes")
    panels = (
        ("both", 1e3, f"{span(times)} times as fast as the faster dense one" if times else "time", "forward + backward, ms"),
        ("bytes", 1e-6, f"{span(sizes)} times less memory" if sizes else "memory", "peak above the inputs, MB"),
    )
    for axis, (key, unit, title, xlabel) in zip(axes, panels, strict=True):
        bars_of: dict[str, dict[float, float]] = {}
        for i, row in enumerate(checked):
            found = {name: value for name in ("ours", *DENSE, SDPA_MASK, CONV) if (value := figure(row, name, key)) is not None}
            for offset, (name, value) in enumerate(found.items()):
                bars_of.setdefault(name, {})[i + 0.26 * (offset - 1)] = value * unit
        for name, values in bars_of.items():
            bars = axis.barh(list(values), list(values.values()), height=0.24, label=label(name), **look(name).bar())
            axis.bar_label(
                bars, fmt=lambda x: f"{x:,.0f}", padding=2, fontsize=7, fontweight="bold" if name == "ours" else None
            )
        finding(axis, title, xscale="log", xlabel=xlabel)
        plain_numbers(axis.xaxis)
        axis.margins(x=0.12)
    axes[0].set_yticks(range(len(checked)), [row["name"].replace(", ", "\n", 1) for row in checked], fontsize=8)
    axes[0].invert_yaxis()
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(drawn, path, result["environment"])


def draw_lengths(result: dict[str, Any], path: Path) -> None:
    """Time and peak memory over T, a line an implementation with its name at the end, on logarithmic axes."""
    rows = [row for row in result["rows"] if row["suite"] == "length"]
    rows = [row for row in rows if any(figure(row, name, "both") is not None for name in row["implementations"])]
    names = list(dict.fromkeys(name for row in rows for name in row["implementations"]))
    panels = (("both", 1e3, "time", "forward + backward, ms"), ("bytes", 1e-6, "memory", "peak above the inputs, MB"))
    drawn, axes = plt.subplots(1, 2, figsize=(13, 5.0), layout="constrained")
    for axis, (key, unit, what, ylabel) in zip(axes, panels, strict=True):
        ends = []
        for name in names:
            points = [(row["tokens"], value * unit) for row in rows if (value := figure(row, name, key)) is not None]
            if not points:
                continue
            axis.plot(*zip(*points, strict=True), zorder=3 if name == "ours" else 2, **look(name).line())
            ends.append((points[-1], label(name), look(name).colour))
        finding(axis, _over_length(rows, key, what), xscale="log", yscale="log", xlabel="tokens", ylabel=ylabel)
        axis.set_xticks([row["tokens"] for row in rows], [f"{row['tokens']:,}" for row in rows], fontsize=8)
        axis.minorticks_off()
        plain_numbers(axis.yaxis)
        name_lines(axis, ends)
    save(drawn, path, result["environment"])


def _over_length(rows: Sequence[dict[str, Any]], key: str, what: str) -> str:
    """The finding of a panel over T: at the longest, ours against what makes the map, and what has no loss."""
    both = [row for row in rows if over_dense([row], key)]
    if not both:
        return what
    last = both[-1]
    (dense,) = over_dense([last], key)
    text = f"At {last['tokens']:,} tokens: 1/{factor(dense)} of dense PyTorch's {what}"
    floor, ours = fastest(last, FLOORS, key), figure(last, "ours", key)
    return text if floor is None or ours is None else f"{text},\n{factor(ours / floor)} times that of attention without a loss"
