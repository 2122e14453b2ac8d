"""What the library is held to in k-hop extraction and message passing, and whether a run met it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .peers import INDEX, PEERS
from .plan import Row, hops_label


def find(rows: Sequence[Row], kind: str, implementation: str, **facts: Any) -> Row | None:
    """The row of an implementation with these facts, measured or not."""
    for row in rows:
        mine = row["kind"] == kind and row["implementation"] == implementation
        if mine and all(row.get(key) == value for key, value in facts.items()):
            return row
    return None


def median(row: Row | None, phase: str = "seconds") -> float | None:
    """Seconds; None where it was not measured."""
    return float(row[phase]["median"]) if row is not None and row["status"] == "measured" else None


def best_fill(rows: Sequence[Row]) -> Row | None:
    """The fastest way to fill memory that was seen in the run; on a GPU the copy."""
    fills = [row for row in rows if row["kind"] == "fill" and row["status"] == "measured"]
    copies = [row for row in fills if row["implementation"] == "torch copy_"]
    return max(copies or fills, key=lambda row: row["rate"], default=None)


def targets(rows: Sequence[Row], *, on_gpu: bool = False) -> list[dict[str, Any]]:
    """What the library is held to: a value a line, its bound, whether it is met, or why it was not measured."""
    found: list[dict[str, Any]] = []
    batch = min((row["sets"] for row in rows if row["kind"] == "extract"), default=28)

    def add(name: str, value: float | None, *parts: Row | None, least: float | None = None, most: float | None = None) -> None:
        bound = {"least": least} if least is not None else {"most": most}
        entry: dict[str, Any] = {"target": name, "value": value, **bound}
        if value is None:
            entry |= {"met": None, "reason": f"not measured: {reason(parts)}"}
        else:
            entry["met"] = value >= least if least is not None else most is not None and value <= most
        found.append(entry)

    def ratio(over: float | None, under: float | None) -> float | None:
        return None if over is None or under is None or under <= 0 else over / under

    heaps = [heap for heap in ("kept", "default") if any(row["heap"] == heap for row in rows)]
    peers_heap = heaps[0] if heaps else "kept"
    for h in (1, 2, 3):
        at = {"heap": peers_heap, "sets": batch, "hops": h}
        pyg = find(rows, "extract", "PyG", **at)
        for way in ("fresh", "reused"):
            ours = find(rows, "extract", f"ours, int64 COO, {way}", **at)
            name = f"PyG over khop_subgraph, int64 COO, {way}, {hops_label(h)}, {peers_heap} heap"
            add(name, ratio(median(pyg), median(ours)), ours, pyg, least=20)
    for heap in heaps:
        for h in (1, 2, 3):
            at = {"heap": heap, "sets": batch, "hops": h}
            for index in ("int64", "int32"):
                ours = find(rows, "extract", f"ours, {index} COO, fresh", **at)
                peers = [find(rows, "extract", name, **at) for name in PEERS if INDEX[name] == index]
                times = [t for t in map(median, peers) if t is not None]
                name = f"fastest {index} peer over khop_subgraph, {index} COO, fresh, {hops_label(h)}, {heap} heap"
                add(name, ratio(min(times, default=None), median(ours)), ours, *peers, least=8)
    fill = best_fill(rows)
    for h in (2, 3):
        for form in ("int64 COO", "int32 COO", "int32 CSR"):
            ours = find(rows, "extract", f"ours, {form}, reused", heap=peers_heap, sets=batch, hops=h)
            rate = ours["rate"] if ours is not None and ours["status"] == "measured" else None
            of = "copy bandwidth" if on_gpu else "fill bandwidth"
            add(
                f"write rate over {of}, {form}, reused, {h} hops", ratio(rate, fill["rate"] if fill else None), ours, fill,
                least=0.5 if on_gpu else 0.7,
            )  # fmt: skip
            alone = find(rows, "part", f"writing, {form}", heap=peers_heap, sets=batch, hops=h)
            if alone is not None and alone["status"] == "measured":  # the call without traversal and counting
                name = f"the same, without finding out what to write, {form}, {h} hops"
                add(name, ratio(alone["rate"], fill["rate"] if fill else None), alone, fill, least=0.5 if on_gpu else 0.7)
    at = {"heap": peers_heap, "sets": batch, "hops": 3}
    mask, pyg = find(rows, "part", "khop_mask", **at), find(rows, "extract", "PyG", **at)
    seconds, slowest = median(mask), median(pyg)
    allowed = max(2.0, slowest * 1e3 / 200 if slowest is not None else 0.0)
    add("khop_mask, 3 hops, ms (2, or 1/200 of PyG)", None if seconds is None else seconds * 1e3, mask, most=allowed)
    _product_targets(rows, add, ratio)
    curve = [row for row in rows if row["kind"] == "curve" and row["status"] == "measured"]
    for n in sorted({row["genes"] for row in rows if row["kind"] == "curve"}):
        mine = sorted((row for row in curve if row["genes"] == n), key=lambda row: row["sets"])
        value = ratio(mine[-1]["seconds_a_sample"], mine[0]["seconds_a_sample"]) if len(mine) > 1 else None
        ends = f"B = {mine[-1]['sets']:,} over B = {mine[0]['sets']:,}" if len(mine) > 1 else "largest B over smallest"
        missed = next((r for r in rows if r["kind"] == "curve" and r["genes"] == n and r["status"] != "measured"), None)
        add(f"traversal a sample, {n:,} genes, {ends}", value, missed, most=1.0)
    if on_gpu:
        ours = find(rows, "extract", "ours, int64 COO, reused", **at)
        milliseconds = median(ours)
        add("khop_subgraph on a GPU, 3 hops, ms", None if milliseconds is None else milliseconds * 1e3, ours, most=1.0)
    else:
        for name, least in (("extraction on a GPU over its copy bandwidth", 0.5), ("1 ms over 3 hops on a GPU, B = 28", 1.0)):
            found.append(
                {"target": name, "value": None, "least": least, "met": None, "reason": "not measured: run on a CPU"}
            )  # fmt: skip
    return found


def _product_targets(
    rows: Sequence[Row], add: Callable[..., None], ratio: Callable[[float | None, float | None], float | None]
) -> None:  # fmt: skip
    unions = ("SparseTensor of the union", "PyG MessagePassing")
    cases = dict.fromkeys(
        (row["heap"], row["relation"], row["mask"], row["backward"]) for row in rows if row["kind"] == "product"
    )  # fmt: skip
    heap = "kept" if any(case[0] == "kept" for case in cases) else "default"
    for case in cases:
        if case[0] != heap:
            continue
        at = dict(zip(("heap", "relation", "mask", "backward"), case, strict=True))
        ours = find(rows, "product", "ours", **at)
        peers = [find(rows, "product", name, **at) for name in unions]
        what = f"{at['relation']}, {at['mask']}, forward{' + backward' if at['backward'] else ''}"
        for phase, title in (("both", "build and product"), ("product", "product alone")):
            times = [t for t in (median(peer, phase) for peer in peers) if t is not None]
            add(
                f"fastest union over masked_spmm, {title}, {what}", ratio(min(times, default=None), median(ours, "both")),
                ours, *peers, least=5,
            )  # fmt: skip
        sizes = [row["bytes"] for row in peers if row is not None and row["status"] == "measured"]
        mine = ours["bytes"] if ours is not None and ours["status"] == "measured" else None
        smallest = min(sizes, default=None)
        add(f"memory of masked_spmm over the smallest union, {what}", ratio(mine, smallest), ours, *peers, most=0.1)


def reason(parts: Sequence[Row | None]) -> str:
    """Why a value is missing, from the rows that it is made of."""
    reasons = [
        "its row was not run" if row is None else f"{row['implementation']}: {row['reason']}"
        for row in parts if row is None or row["status"] != "measured"
    ]  # fmt: skip
    return "; ".join(dict.fromkeys(reasons)) or "too little to be seen"
