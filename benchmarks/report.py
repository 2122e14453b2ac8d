"""The report: every method as a model, the ops under them beside plain PyTorch and other libraries, and what is learnt here.

    python -m benchmarks.report [--full] [--only khop | methods] [--redraw [FOLDER]]

Writes `benchmarks/results/<device>/report.md` with its figures; `--only khop` the whole k-hop benchmark instead, `khop.md`, of
which the report holds a short version, and `--only methods` the table of methods alone. `--full` is the published setting, made
for a GPU: 10,000 samples, 100 steps, batches of 64 and 28. Uses the real yeast tables where they are (CELLATTN_DATA, or
`../shared/data/yeast` beside the repository) and a synthetic cell of the published size everywhere else; the report says which.
`--redraw` measures nothing: it makes pages and figures anew from the results in a folder.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import options
from .attention import bench as attention
from .attention import tables as ops_tables
from .figures import factor, span
from .khop import bench as khop_bench
from .khop import plan as khop_plan
from .khop import tables as khop_tables
from .measure import results_dir, target_table
from .methods import bench as method_steps
from .methods import tables as method_tables
from .screen import full as screen
from .screen import speed as screen_speed
from .training import runs, tables
from .training.cell import SOURCE

Result = dict[str, Any]

TRAINED_MODELS = Path("runs/bench")  # stay, to screen with
# Methods of the table, and the variants of `train` that tell what they learn.
TRAINED = {"dango": "dango", "lazy": "wildtype", "delta": "wildtype", "pairwise": "pairwise", "cell-transformer": "kl"}


def scores(training: Result) -> dict[str, tuple[str, str]]:
    """(test Pearson, oversmoothing by layer) of the methods that were trained, means over seeds, as the table shows them."""
    found = {}
    for method, variant in TRAINED.items():
        runs = [run for run in training["runs"] if (run["split"], run["variant"]) == (SOURCE, variant)]
        if not runs:
            continue
        smooth = [
            f"{statistics.fmean(layer):.2f}" for layer in zip(*(run.get("oversmoothing", ()) for run in runs), strict=True)
        ]
        found[method] = tables.mean_and_sd([run["test"]["pearson"] for run in runs]), ", ".join(smooth)
    return found


@dataclass(frozen=True)
class Results:
    """What there is to report of a device; None or "" where it was not measured there."""

    methods: Result | None = None
    ops: Result | None = None
    khop: Result | None = None
    training: Result | None = None
    screening: Result | None = None
    screens: str = ""  # of `screen.section`

    def environments(self) -> str:
        """Device, versions and commit: a line where all have the same, else a line each with what it is of."""
        named = (
            ("methods", self.methods), ("ops", self.ops), ("k-hop", self.khop), ("training", self.training),
            ("screens", self.screening),
        )  # fmt: skip
        found: dict[str, list[str]] = {}
        for name, result in named:
            if result is not None:
                about = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
                found.setdefault(about, []).append(name)
        if len(found) == 1:
            return next(iter(found))
        return "\n".join(f"* {', '.join(names)}: {about}" for about, names in found.items())


def findings(results: Results) -> Iterator[str]:
    """What the results say, a paragraph each, with its picture; what is missed is said beside what is met."""
    if results.methods is not None:
        yield from _found_of_methods(results.methods["rows"])
    if results.ops is not None:
        yield from _found_of_ops(results.ops["rows"])
    if results.khop is not None:
        met = [entry["met"] for entry in results.khop["targets"] if entry["met"] is not None]
        text = "**k-hop.** Neighbourhoods of a whole batch in all relations at once; "
        text += f"{sum(met)} of {len(met)} targets are met here."
        yield f"{text}\n\n![k-hop: time by hops, and over batches]({results.khop['name']}.png)"
    if results.training is not None:
        by_variant = {name: values for name, values in tables.by_variant(results.training, SOURCE).items() if values}
        learnt = {name: tables.mean_and_sd([run["test"]["pearson"] for run in values]) for name, values in by_variant.items()}
        if learnt:
            titles = results.training["variants"]
            said = ", ".join(f"{titles[name]['title']} {learnt[name]}" for name in ("none", "kl", "bce") if name in learnt)
            text = f"**Training** on measured double mutants, test Pearson: {said}." if said else "**Training.**"
            yield f"{text}\n\n![Training: test scores, and curves where they were kept](training.png)"
    if results.screening is not None:
        best = max(statistics.median(clock for clock, _ in row["rounds"]) for row in results.screening["rows"].values())
        yield f"**Screens.** Trained models score up to {best:,.0f} sets a second."


def _found_of_methods(rows: list[Result]) -> Iterator[str]:
    ratios = {row["method"]: method_tables.over_peer(rows, row["method"]) for row in rows if "samples_per_second" in row}
    times = [float(part) for text in ratios.values() for part in text.split(", ") if part]
    largest = method_tables.find(rows, "cell-transformer").get("largest")
    if times:
        text = f"**Methods.** A training step does {span(times)} times as many samples a second as the same method written "
        text += "with PyG and dense PyTorch."
        if isinstance(largest, dict) and largest["samples_per_second"]:
            text += f" The transformer encodes the cell once a batch: in batches of {largest['batch_size']:,} it trains "
            text += f"{largest['samples_per_second']:,.0f} samples a second."
        yield f"{text}\n\n![Methods: samples a second, memory, and what was published](methods.png)"


def _found_of_ops(rows: list[Result]) -> Iterator[str]:
    measured = [row for row in rows if row["suite"] == "ops"]
    eager, dense = (ops_tables.over_dense(measured, "both", names) for names in (("dense eager",), ops_tables.DENSE))
    memory = ops_tables.over_dense(measured, "bytes")
    if dense:
        slower = [row["name"] for row in measured if any(ratio < 1 for ratio in ops_tables.over_dense([row], "both"))]
        text = f"**Ops.** {measured[0]['tokens']:,} tokens, forward and backward: {span(eager)} times as fast as dense PyTorch"
        text += f", {span(dense)} times as the faster of it and `torch.compile`"
        text += f" (slower: {', '.join(slower)})" if slower else ""
        text += f", with {span(memory)} times less memory than the smaller of them." if memory else "."
        yield f"{text}\n\n![Ops: time and memory](ops.png)"
    longest = [row for row in rows if row["suite"] == "length" and ops_tables.over_dense([row], "both")]
    if longest:
        (ratio,) = ops_tables.over_dense([longest[-1]], "both")
        text = "**Length.** No map is made, so memory grows with the number of tokens T and not with its square: at "
        text += f"{longest[-1]['tokens']:,} tokens attention with its losses takes 1/{factor(ratio)} of the time of "
        text += "dense PyTorch."
        yield f"{text}\n\n![Time and memory over T](length.png)"


def folded(title: str, text: str) -> str:
    """A part that opens when it is asked for."""
    return f"<details>\n<summary>{title}</summary>\n\n{text.strip()}\n\n</details>"


def _topics(results: Results) -> Iterator[tuple[str, str]]:
    """Every table with its title."""
    methods, ops, khop = results.methods, results.ops, results.khop
    if methods is not None:
        known = scores(results.training) if results.training is not None else {}
        how = method_tables.setting(methods)
        for i, (title, text) in enumerate(method_tables.sections(methods, known).items()):
            of_training = """

Test Pearson and oversmoothing (by layer, how far genes are from being all alike: 0 where they are equal, at most 1) are of the
training below, where cells and models are smaller; one run of "wildtype difference" stands for its two exact modes."""
            text = f"{how} {text}{of_training if known else ''}" if i == 0 else text
            yield f"Methods: {title[0].lower()}{title[1:]}", text
    if ops is not None:
        tokens = next((f"T = {row['tokens']:,} tokens" for row in ops["rows"] if row["suite"] == "ops"), "Time over T")
        yield (
            "The ops, and time over T",
            f"""{tokens}, {ops["graph"]}, {ops["dtype"]}, forward and backward in one
process; medians after a warm-up. Every figure was first held to a dense float64 computation: `error` is the largest error of an
output or gradient, as a share of its largest entry. Where negatives are drawn, "drawn": how far the mean of eight draws is from
what they estimate, and the bound from their own spread, which is large since each gradient of a row rests on a few draws. Plain
SDPA computes no loss: it is the floor. Memory is the peak above the inputs. The suite "length" is on the synthetic cell.

{ops_tables.table(ops["rows"])}""",
        )
        yield "The ops: targets", target_table(ops["targets"])
    if khop is not None:
        batch = min(khop["plan"]["set_counts"])
        yield (
            "k-hop",
            f"""{khop["graph"]}, B = {batch}: medians of ms a batch, of implementations that each ran in a process
of its own and returned equal genes and edges. The whole page is [{khop["name"]}.md]({khop["name"]}.md); `--only khop` measures
larger batches and both heaps.

{khop_tables.extract_table(khop["rows"], batch)}""",
        )
        yield "k-hop: targets", target_table(khop["targets"])
    if results.training is not None:
        yield "Training", tables.table(results.training)
    if results.screening is not None:
        yield "Sets that a trained model scores", screen_speed.section(results.screening)
    if results.screens:
        yield "Whole screens", results.screens


def write(results: Results, folder: Path) -> Path:
    """Put all results into one page: what was found, then every table, folded by topic, then what could not run."""
    if results.ops is not None and any(row["suite"] == "ops" for row in results.ops["rows"]):
        ops_tables.draw_ops(results.ops, folder / "ops.png")
    absent = (
        module.missing(result["rows"])
        for module, result in ((method_tables, results.methods), (ops_tables, results.ops), (khop_tables, results.khop))
        if result is not None
    )
    page = f"""# Report

{results.environments()}

{chr(10).join(f"{found}{chr(10)}" for found in findings(results))}
Nothing on this page was measured on a GPU unless a line at the top names one.

## The tables

{chr(10).join(folded(title, text) + chr(10) for title, text in _topics(results))}
## What has no figure here

{"; ".join(filter(None, absent)) or "Nothing: all could run"}.
"""
    path = folder / "report.md"
    path.write_text(page)
    return path


def read_results(folder: Path) -> Results:
    """What earlier runs left in a folder.

    Raises:
        ValueError: there is nothing.
    """

    def read(name: str) -> Result | None:
        path = folder / name
        return json.loads(path.read_text()) if path.is_file() else None

    results = Results(
        methods=read("methods.json"),
        ops=read("attention.json"),
        khop=read("khop_short.json") or read("khop.json"),
        training=tables.read(folder) if (folder / "training.json").is_file() else None,
        screening=read("screen_speed.json"),
        screens=screen.section(folder),
    )
    if results == Results():
        raise ValueError(f"expected a folder with the results of a benchmark, got {folder}")
    return results


def redraw(results: Results, folder: Path) -> Path:
    """Pages and figures of what `read_results` found in a folder, made anew: the path of the report."""
    if results.methods is not None:
        method_tables.save(results.methods, folder)
    if results.ops is not None:
        ops_tables.draw_lengths(results.ops, folder / "length.png")
    if results.training is not None:
        tables.plot(results.training, folder / "training.png")
    if results.screening is not None:
        (folder / "screen_speed.md").write_text(screen_speed.page(results.screening))
    for path in folder.glob("khop*.json"):
        khop = json.loads(path.read_text())
        khop_tables.draw(khop, path.with_suffix(".png"))
        path.with_suffix(".md").write_text(khop_tables.page(khop))
    return write(results, folder)


def main() -> None:
    parser = options.parser("report", __doc__)
    parser.add_argument("--full", action="store_true", help="the published setting, more repeats, every gene a token")
    parser.add_argument("--only", choices=("khop", "methods"), help="one benchmark, whole")
    parser.add_argument(
        "--redraw",
        type=options.folder,
        nargs="?",
        const="",
        metavar="FOLDER",
        help="of results (default: that of this device)",
    )
    given = parser.parse_args()
    full = given.full
    if given.redraw is not None:
        folder = given.redraw or results_dir()
        with options.told():
            results = read_results(folder)
        print(f"written to {redraw(results, folder)}")
        return
    if given.only == "khop":
        print(khop_tables.page(khop_bench.run()))
        return
    methods = method_steps.run(method_steps.Plan(budget=method_steps.budget()) if full else None)
    if given.only == "methods":
        print(method_tables.page(methods))
        return
    ops = attention.run(attention.plan_for(attention.DEVICE, repeats=10 if full else 3))
    khop = khop_bench.run() if full else khop_bench.run(khop_plan.short_plan(), name="khop_short")
    shutil.rmtree(TRAINED_MODELS, ignore_errors=True)  # what is measured is trained anew
    splits, threads = (SOURCE, "gene-disjoint"), os.cpu_count() or 1
    training = runs.run(full=full, out=TRAINED_MODELS, results=results_dir(), splits=splits, workers=threads)
    screening = screen_speed.run(seconds=5.0 if full else 2.0, rounds=3 if full else 1, threads=threads)
    folder = results_dir()
    path = write(Results(methods, ops, khop, training, screening, screen.section(folder)), folder)
    print(f"\n{path.read_text()}\nwritten to {path}")


if __name__ == "__main__":
    main()
