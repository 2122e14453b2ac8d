"""Screens: sets of genes a second that a trained model's heads score, beside the floor of their products.

    python -m benchmarks.screen.speed [--rows readout sum ...] [--genes 6607] [--roster 632] [--seconds 5] [--threads 2]

Scores are first compared with the model in float64 called on the same sets. Then rounds of all rows, each round with this
machine's products of matrices beside them, so that what else runs on the machine meets all alike. Sets come in the order of
their ranks, as a screen asks for them. At last whole screens: of a model that costs nothing, which leaves what writing and
counting take, and of one by two processes of a thread each beside one process of two. Writes `screen_speed.json` and
`screen_speed.md` to `benchmarks/results/<device>/`.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellattn import MultiGraph, checkpoint
from cellattn._file import write_atomic
from cellattn.data import PERTURBATION_TYPES, synthetic_cell
from cellattn.nn import CellTransformer, Dango, PairwiseInteraction, WildtypeDifference
from cellattn.screen import Scorer, make_scorer, screen, status

from .. import options
from ..measure import environment, results_dir, table
from ..methods.peers.sets import readout_by_all_genes

DIM, NUM_HEADS, FFN_DIM, HIDDEN_DIM = 180, 9, 720, 360
NUM_TYPES = len(PERTURBATION_TYPES)
DELETED = PERTURBATION_TYPES.index("deleted")
COMPARED = 200  # sets whose scores are compared with the model's
ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 5e-2}  # largest error, as a share of how far the predictions lie apart
CALLED = 1024  # sets of a batch where the model is called
FREE_UNIT = 1 << 19  # ranks of a unit of the free model: about those of all triples of 632 genes
PROCESSES = 2  # that share a screen
PRODUCT = 2048  # rows of the square matrices whose product is this machine's rate


@dataclass(frozen=True)
class Row:
    """A head, the size of its sets, and the speed that is asked for.

    Attributes:
        products: multiplications of matrices that a set cannot do without, in floating-point operations.
        target: sets a second that are asked for; None for none.
    """

    what: str
    make: Callable[[MultiGraph], nn.Module]
    size: int
    products: Callable[[int], float]
    target: float | None = None
    dtype: torch.dtype = torch.float32


def transformer(graph: MultiGraph, **options: Any) -> CellTransformer:
    return CellTransformer(
        DIM, 1, NUM_HEADS, num_types=NUM_TYPES, num_genes=graph.num_nodes, ffn_dim=FFN_DIM, hidden_dim=HIDDEN_DIM, **options
    )


def readout(graph: MultiGraph) -> CellTransformer:
    return transformer(graph, pool="readout", pool_heads=NUM_HEADS, cross_heads=0)


def additive(cross_heads: int) -> Callable[[MultiGraph], CellTransformer]:
    return lambda graph: transformer(graph, pool="sum", cross_heads=cross_heads)


def _mlp() -> float:
    return 2 * DIM * HIDDEN_DIM + 2 * HIDDEN_DIM


def _readout_products(size: int) -> float:
    return size * 2 * 2 * DIM * FFN_DIM + _mlp()


def _cross_products(heads: int, genes: int) -> float:
    return 2 * genes * (DIM + heads) + _mlp()


def rows_of(genes: int) -> dict[str, Row]:
    """All rows by name."""
    all_pairs = genes * (genes - 1) / 2 / (7 * 60)
    one, nine = _cross_products(1, genes), _cross_products(NUM_HEADS, genes)
    relations = ("physical", "regulatory")
    return {
        "readout": Row("triples, readout", readout, 3, lambda _: _readout_products(3), 60_000),
        "sum": Row("triples, sum and cross-attention", additive(1), 3, lambda _: one, 60_000),
        "sum-9": Row("triples, sum and cross-attention of 9 heads", additive(NUM_HEADS), 3, lambda _: nine, 60_000),
        "readout-bf16": Row("triples, readout, bfloat16", readout, 3, lambda _: _readout_products(3), 150_000, torch.bfloat16),
        "sum-bf16": Row("triples, sum and cross-attention, bfloat16", additive(1), 3, lambda _: one, 150_000, torch.bfloat16),
        "sum-9-bf16": Row("triples, sum, 9 heads, bfloat16", additive(NUM_HEADS), 3, lambda _: nine, 150_000, torch.bfloat16),
        "readout-pairs": Row("pairs, readout", readout, 2, lambda _: _readout_products(2), all_pairs),
        "sum-pairs": Row("pairs, sum and cross-attention", additive(1), 2, lambda _: one, all_pairs),
        "sum-9-pairs": Row("pairs, sum and cross-attention of 9 heads", additive(NUM_HEADS), 2, lambda _: nine, all_pairs),
        "free": Row("triples, sum alone", additive(0), 3, lambda _: _mlp()),
        "hypersagnn": Row(
            "triples, hypersagnn",
            lambda graph: transformer(graph, pool="hypersagnn", pool_heads=NUM_HEADS, cross_heads=0),
            3,
            lambda _: 3 * 2 * 5 * DIM**2 + _mlp(),
        ),
        "pairwise": Row(
            "triples, PairwiseInteraction",
            lambda graph: PairwiseInteraction(DIM, num_types=NUM_TYPES, num_genes=graph.num_nodes),
            3,
            lambda _: 0,
        ),
        "dango": Row(
            "triples, Dango",
            lambda graph: Dango(64, relations=relations, num_genes=graph.num_nodes),
            3,
            lambda _: 3 * 10 * 64**2,
        ),
        "wildtype": Row(
            "triples, WildtypeDifference, one layer",
            lambda graph: WildtypeDifference(
                64, 1, relations=relations, num_types=NUM_TYPES, num_genes=graph.num_nodes, mode="delta"
            ),
            3,
            lambda _: 0,
        ),
    }


def sets_of(size: int, roster: int, genes: int, number: int) -> Tensor:
    """Sets [number, size] in the order of their ranks, from the middle of a screen: triples of a roster, or pairs of all."""
    last = roster if size == 3 else genes
    middle = int(last * 0.7)
    if size == 2:
        largest = torch.arange(middle, last).repeat_interleave(torch.arange(middle, last))[:number]
        smallest = torch.cat([torch.arange(g) for g in range(middle, min(last, middle + number // middle + 1))])[:number]
        return torch.stack([smallest[: len(largest)], largest[: len(smallest)]], 1)
    second, first = torch.tril_indices(middle, middle, -1)
    triples = torch.stack([first, second, torch.full_like(first, middle)], 1)
    return triples.roll(-len(triples) // 3, 0)[:number]


def called(model: nn.Module, graph: MultiGraph, genes: Tensor) -> Tensor:
    """What the model predicts, called on one batch."""
    ptr = torch.arange(len(genes) + 1) * genes.shape[1]
    with torch.no_grad():
        return model(graph, genes.flatten(), ptr, torch.full_like(genes, DELETED).flatten()).prediction[:, 0]


def lively(model: nn.Module) -> nn.Module:
    """A model that has never been trained, with predictions that differ about as much as they are large."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "rezero" in key:
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                parameter.mul_(2)
    return model.eval()


def compare(model: nn.Module, scorer: Scorer, graph: MultiGraph, genes: Tensor) -> float:
    """The largest error of the scores as a share of how far the predictions lie apart, in float64."""
    chosen = genes[torch.randperm(len(genes), generator=torch.Generator().manual_seed(1))[:COMPARED]]
    want = called(copy.deepcopy(model).double(), graph, chosen)
    return float((scorer.score(chosen).double() - want).abs().max() / (want.max() - want.min()))


def best_rate(f: Callable[[], int]) -> tuple[float, float]:
    """Of one call that says how many sets it did: sets a second, and sets a second of the processor."""
    start, processor = time.perf_counter(), time.process_time()
    number = f()
    return number / (time.perf_counter() - start), number / (time.process_time() - processor)


def product_rate(dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations a second of a product of large matrices: by the clock, and of the processor."""
    a = torch.randn(PRODUCT, PRODUCT, dtype=dtype)
    a @ a
    clock, processor = best_rate(lambda: 2 * (a @ a).shape[0] ** 3)
    return clock, processor


class Free(nn.Module):
    """A model that costs nothing: the sum of a number a gene."""

    def __init__(self, num_genes: int) -> None:
        super().__init__()
        self.num_genes = num_genes
        self.effect = nn.Parameter(torch.randn(num_genes, generator=torch.Generator().manual_seed(0)))

    def screening(self, graph: MultiGraph | None, *, dtype: torch.dtype, **_: Any) -> _FreeScreening:
        return _FreeScreening(self.effect.to(dtype))


class _FreeScreening:
    batch_size, num_types = 1 << 16, None

    def __init__(self, effect: Tensor) -> None:
        self.num_genes, self._effect = len(effect), effect

    def __call__(self, entries: Tensor) -> Tensor:
        return self._effect[entries % self.num_genes].sum(1)


def bookkeeping(graph: MultiGraph, roster: int, rounds: int) -> list[tuple[float, float]]:
    """Sets a second of whole screens of a free model: by the clock, and of the processor."""
    names = graph.names
    assert names is not None
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"out": folder, "genes": list(names)[:roster], "order": 3, "unit": FREE_UNIT}
            found.append(best_rate(lambda: screen(Free(len(names)), names=names, progress=False, **options).sets))
    return found


def by_processes(model: nn.Module, graph: MultiGraph, roster: int, threads: int, rounds: int) -> dict[str, list[float]]:
    """Triples a second of the command, by its manifests: one process with all threads, and several that share them."""
    names = graph.names
    assert names is not None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        graph.save(folder / "graph.safetensors")
        checkpoint.save(folder / "model.safetensors", model, graph=graph, graph_file=folder / "graph.safetensors")
        (folder / "roster.txt").write_text("\n".join(list(names)[:roster]) + "\n")

        def rate(processes: int, out: Path) -> float:
            command = [sys.executable, "-m", "cellattn.screen", str(folder / "model.safetensors"), "--order", "3", "--quiet"]
            command += ["--genes", str(folder / "roster.txt"), "--out", str(out), "--threads", str(threads // processes)]
            shards = [[*command, "--shard", f"{i}/{processes}"] for i in range(processes)]
            running = [subprocess.Popen(shard) for shard in shards]
            failed = [process.wait() for process in running]
            if any(failed):
                raise RuntimeError(f"{' '.join(command)} failed")
            found = status(out).rate
            assert found is not None
            return found

        rates: dict[str, list[float]] = {"one": [], "several": []}
        for i in range(rounds):
            for name, processes in (("one", 1), ("several", PROCESSES)):
                rates[name].append(rate(processes, folder / f"{name}{i}"))
    return rates


def run(
    names: Sequence[str] | None = None,
    *,
    genes: int = 6607,
    roster: int = 632,
    seconds: float = 5.0,
    rounds: int = 3,
    threads: int = 2,
    free_roster: int = 300,
    shared_roster: int = 160,
    out: Path | None = None,
) -> dict[str, Any]:
    """Compare and time the rows, and write the results.

    Args:
        names: of rows; all of them by default.
        seconds: of a row in each round, about.
        free_roster: genes whose triples the free model is screened on.
        shared_roster: genes whose triples are screened by one process and by several.
        out: folder of the results; that of this device if None.
    """
    torch.set_num_threads(threads)
    graph = synthetic_cell(seed=0, num_genes=genes)
    rows, scorers, measured = rows_of(genes), {}, {}
    shared: nn.Module | None = None
    for name in names or rows:
        row = rows[name]
        torch.manual_seed(0)
        model = lively(row.make(graph))
        start = time.perf_counter()
        scorer = make_scorer(model, graph, dtype=row.dtype)
        result: dict[str, Any] = {"what": row.what, "encoding": time.perf_counter() - start, "dtype": str(scorer.dtype)}
        sets = sets_of(row.size, roster, genes, 1 << 20)
        result["error"] = compare(model, scorer, graph, sets)
        if result["error"] > ALLOWED[scorer.dtype]:
            raise AssertionError(f"{row.what}: {result['error']:.1e} of the spread from the model")
        number = 4096
        scorer.score(sets[: min(len(sets), 40_000)])  # tables of these genes
        rate, _ = best_rate(lambda: len(scorer.score(sets[:number])))
        result["number"] = int(min(len(sets), max(64, rate * seconds)))
        result["products"], result["target"], result["rounds"] = row.products(row.size), row.target, []
        if name in ("readout", "sum"):
            rate, processor = best_rate(lambda: len(called(model, graph, sets[:CALLED])))
            result["called"] = {"rate": rate, "processor": processor}
        if name == "readout" and isinstance(model, CellTransformer):
            result["group"] = group_rate(model, graph, sets[:2])
        scorers[name], measured[name] = (scorer, sets), result
        if name == "readout":
            shared = copy.deepcopy(model)
    products: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, (scorer, sets) in scorers.items():
            products.setdefault(measured[name]["dtype"], []).append(product_rate(scorer.dtype))
            window = sets[: measured[name]["number"]]
            measured[name]["rounds"].append(best_rate(lambda: len(scorer.score(window))))
    free = bookkeeping(graph, min(free_roster, genes), rounds)
    processes = None
    if shared is not None and threads >= PROCESSES:
        processes = by_processes(shared, graph, min(shared_roster, genes), threads, rounds)
    result = {
        "environment": environment(),
        "genes": genes,
        "roster": roster,
        "threads": threads,
        "products": {
            dtype: dict(zip(("clock", "processor"), map(max, zip(*rates, strict=True)), strict=True))
            for dtype, rates in products.items()
        },
        "rows": measured,
        "free": free,
        "processes": processes,
    }
    folder = results_dir() if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "screen_speed.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(folder / "screen_speed.md", page(result).encode())
    return result


def group_rate(model: CellTransformer, graph: MultiGraph, sets: Tensor) -> dict[str, float]:
    """All genes attend to each set, an FFN of all of them, and the rows of the set are read; equal to the model first."""
    peer = readout_by_all_genes(model, graph)
    with torch.no_grad():
        got, want = peer(sets), called(model, graph, sets)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        rate, processor = best_rate(lambda: len(peer(sets)))
    return {"rate": rate, "processor": processor}


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    return f"# Screens\n\n{about}\n\n{section(result)}"


def section(result: dict[str, Any]) -> str:
    """What the report shows of the result."""
    threads, products = result["threads"], result["products"]
    head = [
        "what", "sets/s", f"sets/s of {threads} processors", "target", "floor, sets/s", "share of the floor", "products",
        "error", "encoded in",
    ]  # fmt: skip
    lines, notes = [], []
    for row in result["rows"].values():
        clock, processor = (statistics.median(values) for values in zip(*row["rounds"], strict=True))
        floor = threads * products[row["dtype"]]["processor"] / row["products"] if row["products"] else None
        lines.append(
            [
                row["what"],
                f"{clock:,.0f}",
                f"{threads * processor:,.0f}",
                "" if row["target"] is None else f"{row['target']:,.0f}",
                "" if floor is None else f"{floor:,.0f}",
                "" if floor is None else f"{threads * processor / floor:.0%}",
                row["dtype"].removeprefix("torch."),
                f"{row['error']:.0e}",
                f"{row['encoding']:.1f} s",
            ]
        )
        for key, how in (("called", "the model called on batches"), ("group", "all genes attend to each set, dense PyTorch")):
            if key in row:
                notes.append(
                    f"* {row['what']}: {how}, {threads * row[key]['processor']:,.2f} sets/s of {threads} processors; "
                    f"the screen's is {processor / row[key]['processor']:,.1f} times that."
                )
    notes += _whole_screens(result)
    rates = " and ".join(
        f"{rate['processor'] / 1e9:.0f} GFLOP/s in {dtype.removeprefix('torch.')}" for dtype, rate in products.items()
    )
    return f"""Medians of rounds; synthetic cell of {result["genes"]:,} genes, triples of {result["roster"]:,} of them and
pairs of all, {threads} threads; width {DIM}, {NUM_HEADS} heads, FFN {FFN_DIM}. Sets a second by the clock, and a second of the
processor's own time, which other work on the machine does not enter, times the threads. The floor: the products that a set
cannot do without, at the rate of this machine's product of two {PRODUCT} x {PRODUCT} matrices of their dtype in the same run
({rates} a processor). The error: the largest of {COMPARED} scores against the model in
float64, as a share of the spread of its predictions (largest less smallest).

{table(head, lines)}

{chr(10).join(notes)}
"""


def _whole_screens(result: dict[str, Any]) -> list[str]:
    """What is measured of whole screens, rather than of scores alone."""
    threads, rows = result["threads"], result["rows"]
    clock, processor = (statistics.median(values) for values in zip(*result["free"], strict=True))
    free = f"{clock:,.0f} sets/s, {threads * processor:,.0f} sets/s of {threads} processors"
    notes = [f"* A screen of a model that costs nothing, all that is written and counted: {free}."]
    for row in (rows[name] for name in ("readout", "sum") if name in rows):
        scored = statistics.median(rate for _, rate in row["rounds"])
        share = (1 / processor) / (1 / processor + 1 / scored)
        notes.append(f"* Writing and bookkeeping are {share:.1%} of the processor's time in a screen of {row['what']}.")
    if result["processes"] is not None:
        one, several = (statistics.median(result["processes"][name]) for name in ("one", "several"))
        notes.append(
            f"* The same triples with readout, by `python -m cellattn.screen`: one process of {threads} threads {one:,.0f} a "
            f"second, {PROCESSES} processes of {threads // PROCESSES} on a shard each {several:,.0f}."
        )
    return notes


def main() -> None:
    parser = options.parser("screen.speed", __doc__)
    names = list(rows_of(1))
    parser.add_argument("--rows", nargs="+", choices=names, default=names, help="which (default: all)")
    parser.add_argument("--genes", type=options.genes, default=6607, help="of the synthetic cell (%(default)s)")
    parser.add_argument("--roster", type=options.count, default=632, help="genes whose triples are scored (%(default)s)")
    parser.add_argument("--seconds", type=options.positive, default=5.0, help="of a row in each round, about (%(default)s)")
    parser.add_argument("--rounds", type=options.count, default=3, help="%(default)s")
    parser.add_argument("--threads", type=options.count, default=2, help="%(default)s")
    parser.add_argument("--out", type=options.results, help="folder of the results (default: that of this device)")
    given = parser.parse_args()
    if not 4 <= given.roster <= given.genes:
        parser.error(f"argument --roster: expected 4 to {given.genes}, the genes of the cell, got {given.roster}")
    chosen = vars(given)
    print(page(run(chosen.pop("rows"), **chosen)))


if __name__ == "__main__":
    main()
