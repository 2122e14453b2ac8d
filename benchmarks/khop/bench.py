"""k-hop extraction and message passing over masked graphs against what else a user could run: time, peak memory, write rate.

    python -m benchmarks.khop [--sets 28 256] [--hops 1 2 3] [--heaps default kept] [--seconds 2700] [--short]

Every implementation runs in a process of its own, because a heap's settings are read at the start of one: "default", and
"kept", where freed pages stay with the process. What it returns is first held to the definition in `peers.py`; one that
is wrong, cannot run or dies is a line without a speed. Writes `khop.json`, `khop.md` and `khop.png`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nvtx
import torch
from tqdm import tqdm

from cellattn import MultiGraph
from cellattn._file import write_atomic
from cellattn.data import synthetic_cell
from cellattn.data.synthetic import RELATIONS

from .. import options
from ..measure import environment, first_line, peak_memory, results_dir, synchronize
from ..processes import Ended, end_with_parent
from ..processes import run as run_process
from .peers import PACKAGES
from .plan import HEAPS, Plan, Row, plan_from, short_plan, tasks
from .tables import draw, page
from .targets import targets
from .workers import Bench, work

SHARE = 0.4  # of a run's time that one process may take, so that a slow peer leaves the others some
GRACE = 120.0  # seconds that a process may take for the row which it began last
NO_TIME = "the time for the run, or for one process, was over"


def run_worker(name: str, heap: str, plan: Plan, graph: Path, out: Path) -> None:
    """Measure the rows of one process and append each to `out`; failures are the reason why a row has no figure."""
    start = time.monotonic()
    bench = Bench(plan, MultiGraph.load(graph).to(plan.device), heap)
    bench.graph.transpose()  # built once a graph, not once a batch
    gc.collect()
    gc.freeze()  # collections would go through all of PyTorch again and again
    with open(out, "a") as file:
        for row, measure in work(name, bench):
            if time.monotonic() - start > plan.seconds:
                outcome: Row = {"status": "not reached", "reason": NO_TIME}
            else:
                try:
                    with nvtx.annotate(f"{name}: {row}", domain="cellattn"):
                        outcome = measure()
                except Exception as failure:
                    outcome = {"status": "cannot run", "reason": first_line(failure)}
            synchronize(plan.torch_device)
            peak_memory(lambda: None)  # collects garbage and gives the pages back that the next row may need
            print(json.dumps(row | outcome), file=file, flush=True)


def start_worker(name: str, heap: str, plan: Plan, graph: Path, *, seconds: float, rows: list[Row]) -> list[Row]:
    """`rows` with what became of each in a process of its own."""
    package = PACKAGES.get(name.removeprefix("extract "))
    if package is not None and importlib.util.find_spec(package) is None:
        return [{**row, "status": "cannot run", "reason": f"No module named {package!r}"} for row in rows]
    if seconds <= 0:
        return [{**row, "status": "not reached", "reason": NO_TIME} for row in rows]
    others = {key: value for key, value in os.environ.items() if key not in HEAPS["kept"]}
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "rows", Path(folder) / "errors"
        command = [
            sys.executable, "-m", "benchmarks.khop", "--worker", name, "--heap", heap, "--graph", os.fspath(graph),
            "--out", os.fspath(out), "--plan", json.dumps(asdict(replace(plan, seconds=seconds))),
        ]  # fmt: skip
        with open(errors, "w") as stderr, open(os.devnull, "w") as nothing:
            ended = run_process(
                command, env={**others, **HEAPS[heap]}, seconds=seconds + GRACE, output=nothing, errors=stderr
            )  # fmt: skip
        ending = NO_TIME if ended.status is None else _ending(ended, errors.read_text(errors="replace"))
        done = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")] if out.exists() else []
    missing = rows[len(done) :]
    for i, row in enumerate(missing):
        reason = ending if i == 0 else f"its process had ended: {ending}"
        done.append({**row, "status": "died" if i == 0 else "not reached", "reason": reason})
    return done


def _ending(ended: Ended, errors: str) -> str:
    """How a process ended, and the last line it wrote."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"{ended}: {lines[-1]}" if lines and ended.status and ended.status > 0 else str(ended)


def run(plan: Plan | None = None, *, out: Path | None = None, name: str = "khop") -> dict[str, Any]:
    """Measure everything of a plan.

    Args:
        plan: what and how long; the whole benchmark if None.
        out: folder that gets `<name>.json`, process by process, `<name>.md` and `<name>.png`; the device's if None.
        name: of the files.

    Returns:
        What the JSON file holds.
    """
    plan = Plan() if plan is None else plan
    folder = results_dir() if out is None else out
    start = time.monotonic()
    graph = synthetic_cell(0, num_genes=plan.genes)
    rows: list[Row] = []
    result: dict[str, Any] = {
        "name": name,
        "environment": environment(),
        "graph": f"synthetic cell of {graph.num_nodes:,} genes, {graph.num_edges():,} entries",
        "avx512": torch.ops.cellattn.induced_avx512(graph.num_nodes),
        "plan": asdict(plan),
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph"
        graph.save(path)
        del graph
        with tqdm(tasks(plan), desc="khop", unit="process", disable=None) as bar:
            for worker, heap, expected in bar:
                bar.set_postfix_str(f"{worker}, {heap} heap")
                left = min(plan.seconds - (time.monotonic() - start), SHARE * plan.seconds)
                rows += start_worker(worker, heap, plan, path, seconds=left, rows=expected)
                result["seconds"] = time.monotonic() - start
                result["targets"] = targets(rows, on_gpu=plan.torch_device.type == "cuda")
                write_atomic(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    draw(result, folder / f"{name}.png")
    write_atomic(folder / f"{name}.md", page(result).encode())
    return result


def main() -> None:
    parser = options.parser("khop", __doc__)
    parser.add_argument("--device", type=options.device, help="cpu or cuda")
    parser.add_argument("--short", action="store_true", help="what `make bench` runs: B = 28; writes khop_short.json instead")
    parser.add_argument("--sets", type=options.count, nargs="+", dest="set_counts", help="samples a batch")
    parser.add_argument("--hops", type=options.count, nargs="+")
    parser.add_argument("--heaps", nargs="+", choices=HEAPS)
    parser.add_argument("--genes", type=options.genes, help="of the cell (as published)")
    parser.add_argument("--relations", nargs="+", choices=RELATIONS, metavar="RELATION", help="of message passing")
    parser.add_argument("--seconds", type=options.positive, help="no row is begun after so many")
    parser.add_argument("--seconds-each", type=options.positive, help="of measured steps a row")
    parser.add_argument("--repeats", type=options.count, help="most measured steps a row")
    for name in ("--worker", "--heap", "--graph", "--out", "--plan"):  # how a run starts its processes
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    worker, heap, graph, out, plan, short = (given.pop(k) for k in ("worker", "heap", "graph", "out", "plan", "short"))
    if worker is not None:
        end_with_parent()
        run_worker(worker, heap, plan_from(json.loads(plan)), Path(graph), Path(out))
        return
    chosen: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if value is not None
    }
    result = run(short_plan(**chosen) if short else Plan(**chosen), name="khop_short" if short else "khop")
    print(page(result))


if __name__ == "__main__":
    main()
