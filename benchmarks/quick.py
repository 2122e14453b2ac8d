"""The main job, small: one method of each kind, the ops at the real size, a training on mutants, and a screen with its model.

    python -m benchmarks.quick [--out runs/bench]

Five minutes on two cores. Says what runs as it goes, also into a file or a pipe, and ends with its tables and the path of its
page. What is interrupted goes on where it was; a run that ended is made anew. The whole report is `benchmarks.report`.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellattn._file import write_atomic
from cellattn.screen import merge, screen

from . import options
from .attention import bench as attention
from .attention.peers import CONV, SDPA_MASK
from .attention.tables import figure
from .measure import environment, table
from .methods import bench as method_steps
from .methods.tables import TITLES
from .training import runs, tables

METHODS = ("dango", "delta", "pairwise", "cell-transformer")
VARIANT = "kl"
PAGE = "bench.md"


@contextmanager
def said(name: str, position: int, of: int, every: float = 5.0) -> Iterator[None]:
    """A line when a part begins, every few seconds while it runs, and when it ends."""
    start, stop = time.monotonic(), threading.Event()

    def say(what: str) -> None:
        print(f"[{position}/{of}] {name}: {what}", file=sys.stderr, flush=True)

    def beat() -> None:
        while not stop.wait(every):
            say(f"running, {time.monotonic() - start:.0f} s")

    say("begins")
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    say(f"done after {time.monotonic() - start:.0f} s")


def methods(out: Path) -> dict[str, Any]:
    """Ours and the same method with PyG and dense PyTorch, predictions compared first; no search for the largest batch."""
    plan = method_steps.short_plan(
        methods=METHODS, steps=2, least_steps=1, copies=1, cap=0, seconds=90.0, seconds_each=0.5, samples=1_000
    )
    return method_steps.run(plan, out=out)


def ops(out: Path) -> dict[str, Any]:
    """Each op at the real size beside dense PyTorch, held to float64 first."""
    plan = attention.plan_for(attention.DEVICE, repeats=2, seconds=90.0, seconds_each=0.1)
    return attention.run(plan, suites=("ops",), out=out)


def training(out: Path) -> dict[str, Any]:
    """The transformer with KL, one seed, on the cell of measured genes."""
    return runs.run(out=out, results=out, variants=(VARIANT,), seeds=(0,))


def screening(out: Path) -> dict[str, Any]:
    """All pairs of that cell with the model just trained."""
    (run,) = json.loads((out / "training.json").read_text())["runs"]
    checkpoint = out / run["folder"] / runs.CHECKPOINT
    status = screen([checkpoint], out=out / "pairs", order=2, progress=False)
    return {"sets": status.sets, "rate": status.rate, "page": str(merge(out / "pairs"))}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "methods": methods, "ops": ops, "training": training, "screen": screening,
}  # fmt: skip


def _methods_table(result: dict[str, Any]) -> str:
    rows, ours = [["method", "whose", "samples/s", "of ours"]], 0.0
    for row in result["rows"]:
        if row["implementation"] == "ours":
            ours = row.get("samples_per_second", 0.0)
        rate = row.get("samples_per_second")
        title = TITLES[row["method"]]
        shown = ["", row.get("reason", "")] if rate is None else [f"{rate:,.3g}", f"{rate / ours:.3f}" if ours else ""]
        rows.append([title, row["implementation"], *shown])
    return table(rows[0], rows[1:])


def _ops_table(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        for name in ("ours", "dense eager", "dense compiled", SDPA_MASK, CONV):
            seconds, size = (figure(row, name, key) for key in ("both", "bytes"))
            if seconds is not None:
                rows.append([row["name"], name, f"{seconds * 1e3:,.0f}", "" if size is None else f"{size / 1e6:,.0f}"])
    return table(["op, forward and backward", "whose", "ms", "MB"], rows)


def page(found: dict[str, dict[str, Any]], seconds: float) -> str:
    """What was found, as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in environment().items())
    screened = found["screen"]
    return f"""# The main job, small

{about}; {seconds:.0f} s. Few repeats: the report of `make bench-full` is the one to quote.

## Methods: training steps, the same method with PyG and dense PyTorch beside ours

{_methods_table(found["methods"])}

## Ops at the real size, each held to float64 first

{_ops_table(found["ops"])}

## Training on double mutants, and a screen with its model

{tables.table(found["training"])}

![curves](training.png)

All {screened["sets"]:,} pairs were scored at {screened["rate"]:,.0f} a second; the ranking and its figures are in
[pairs]({Path(screened["page"]).relative_to(Path(screened["page"]).parents[2])}).
"""


def run(out: Path) -> Path:
    """Every part that has no file yet; the path of the page, with which a run ends. After one that ended all is made anew."""
    path = out / PAGE
    if path.is_file():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    seconds = 0.0
    for position, (name, part) in enumerate(PARTS.items(), 1):
        file = part_file(out, name)
        if file.is_file():
            print(f"[{position}/{len(PARTS)}] {name}: done before", file=sys.stderr, flush=True)
        else:
            start = time.monotonic()
            with said(name, position, len(PARTS)):
                result = part(out)
            write_atomic(file, json.dumps({"seconds": time.monotonic() - start, "result": result}).encode())
        kept = json.loads(file.read_text())
        found[name] = kept["result"]
        seconds += kept["seconds"]
    write_atomic(path, page(found, seconds).encode())
    return path


def part_file(out: Path, name: str) -> Path:
    """Where a part that is done keeps its result and the seconds that it took."""
    return out / f"part-{name}.json"


def main() -> None:
    parser = options.parser("quick", __doc__)
    parser.add_argument("--out", type=options.results, default="runs/bench", help="folder of everything it writes: %(default)s")
    path = run(parser.parse_args().out)
    print(f"\n{path.read_text()}\nwritten to {path}")


if __name__ == "__main__":
    main()
