"""The screens that a group would run: train, then every triple of a roster, then every pair of the genome.

    python -m benchmarks.screen [--data FOLDER] [--out FOLDER] [--roster 632] [--epochs 3] [--seeds 0 1]

Trains the cell transformer ("kl" of `benchmarks.train`) at the full cell by a short schedule, so what it predicts is worth
little: this is about screening. The roster is the genes whose pairs were measured and then those with the most edges to them.
Real tables where they are, the synthetic cell elsewhere. What is interrupted goes on when it is run again. Pages and figures go
to `benchmarks/results/<device>/`, the Parquet stays in --out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cellattn._file import write_atomic
from cellattn.screen import merge, screen

from .. import options
from ..cells import data_dir
from ..measure import environment, results_dir, table
from ..training import runs
from ..training.cell import Cell, load_cell

VARIANT = "kl"


def run(
    *,
    cell: Cell,
    out: Path,
    results: Path,
    roster: int = 632,
    epochs: int = 3,
    seeds: Sequence[int] = (0,),
    num_threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, screen triples of the roster and all pairs, merge both, and write `screen.json` and the pages into `results`."""
    check_roster(roster, cell)
    names = cell.graph.names
    assert names is not None  # of tables and synthetic cells alike
    training = runs.run(
        cell=cell, out=out / "training", results=out / "training", variants=[VARIANT], seeds=seeds, epochs=epochs
    )
    checkpoints = [out / "training" / one["folder"] / runs.CHECKPOINT for one in training["runs"]]
    screens = {}
    for name, order, genes in (("triples", 3, list(names)[:roster]), ("pairs", 2, None)):
        options: dict[str, Any] = {"num_threads": num_threads, "progress": progress}
        status = screen(list(checkpoints), out=out / name, genes=genes, order=order, **options)
        page = merge(out / name)
        folder = results / f"screen-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        for path in (page, *page.parent.glob("*.png")):
            shutil.copyfile(path, folder / path.name)
        screens[name] = {"order": order, "genes": roster if genes else len(names), "sets": status.sets, "rate": status.rate}
    result = {
        "environment": environment(),
        "source": cell.source,
        "tokens": cell.graph.num_nodes,
        "epochs": epochs,
        "models": len(checkpoints),
        "validation_pearson": [one["validation_pearson"] for one in training["runs"]],
        "screens": screens,
    }
    write_atomic(results / "screen.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def check_roster(roster: int, cell: Cell) -> None:
    """Check that there are so many genes, and triples of them."""
    if not 3 <= roster <= cell.graph.num_nodes:
        raise ValueError(f"roster: expected 3 to {cell.graph.num_nodes} genes, got {roster}")


def section(folder: Path) -> str:
    """What the report says of the last run on this device; nothing where there was none."""
    path = folder / "screen.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text())
    lines = [
        [f"[{name}](screen-{name}/page.md)", f"{one['genes']:,}", f"{one['sets']:,}", f"{one['rate']:,.0f}"]
        for name, one in result["screens"].items()
    ]
    about = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    pearson = ", ".join(f"{x:.3f}" for x in result["validation_pearson"])
    return f"""{result["models"]} model(s) of {result["source"]}, {result["tokens"]:,} gene tokens, trained for
{result["epochs"]} epochs, which is a short schedule (validation Pearson {pearson}): the pages show what a screen gives,
not what yeast does. Of the last `python -m benchmarks.screen`: {about}.

{table(["screen", "genes", "sets", "sets a second, writing included"], lines)}
"""


def main() -> None:
    parser = options.parser("screen", __doc__)
    parser.add_argument(
        "--data", type=options.folder, help="folder of the yeast tables (default: CELLATTN_DATA, ../shared/data/yeast)"
    )
    parser.add_argument("--out", type=options.results, default="runs/screen", help="folder of runs and screens (%(default)s)")
    parser.add_argument("--tokens", default="full", help="labelled, neighbours:N or full (%(default)s)")
    parser.add_argument(
        "--roster", type=options.count, default=632, metavar="GENES", help="of which all triples are made (%(default)s)"
    )
    parser.add_argument("--epochs", type=options.count, default=3, help="of training (%(default)s)")
    parser.add_argument("--seeds", type=options.seed, nargs="+", default=[0], help="a model each: several are an ensemble")
    parser.add_argument("--threads", type=options.count, metavar="N", help="on the CPU (default: all)")
    given = parser.parse_args()
    with options.told():
        cell = load_cell(given.data or data_dir(), given.tokens)
        check_roster(given.roster, cell)
        folder = results_dir()
    run(
        cell=cell,
        out=given.out,
        results=folder,
        roster=given.roster,
        epochs=given.epochs,
        seeds=given.seeds,
        num_threads=given.threads,
    )
    print(f"{section(folder)}\nwritten to {folder}")


if __name__ == "__main__":
    main()
