"""Every way to feed perturbations to a model, as a model of ours beside the same method written with PyG and dense PyTorch.

    python -m benchmarks.methods [--methods lazy delta ...] [--full] [--seconds 540] [--device cuda]

Steps of training on random mutants of the synthetic cell (6,607 genes, nine relations, 2.48 million entries). Each row is a
process of its own; a peer runs on the parameters of our model and is held to its predictions before it is timed. `--full`
has the published setting, 10,000 samples, 100 steps and batches of 64 and 28, made for a GPU; without it, on a CPU, steps are
few and batches of peers that copy the graph small, and the page says so. Writes `methods.json`, `.csv`, `.md` and `.png`.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cellattn import MultiGraph
from cellattn._file import write_atomic
from cellattn._profiling import span
from cellattn.data import PerturbationBatch, PerturbationDataset, synthetic_cell

from .. import options
from ..measure import environment, first_line, results_dir
from ..processes import end_with_parent
from ..training.distributed import Share
from ..training.engine import Execution, Trainer
from .largest import largest_batch
from .peers import PEERS, Peer
from .registry import METHODS, nodes_and_edges
from .tables import Row, find, page, save
from .workload import SET_SIZE, Workload, time_steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of predictions, as a share of the largest: float32 sums in another order through a model of several layers, and where a
# prediction is a small difference of large sums; products of bfloat16 are rounded to 8 bits.
MAX_ERROR, MAX_ERROR_AUTOCAST = 1e-3, 5e-2
NOT_TIMED = ("pair-mlp",)  # takes sets of two alone: a baseline of what is learnt


@dataclass(frozen=True)
class Plan:
    """What a run measures and for how long."""

    device: str = DEVICE
    autocast: str | None = None
    genes: int = 6607
    methods: tuple[str, ...] = tuple(name for name in METHODS if name not in NOT_TIMED)
    samples: int = 10_000
    steps: int = 100
    least_steps: int = 3  # however long they take
    copies: int = 28  # of the graph that a batch of a peer may hold: where a sample has its own, the samples of a batch
    cap: int = 65_536  # of the search for the largest batch; 0: none
    budget: int | None = None  # bytes that a batch may take; None: a GPU's memory
    resolution: float = 0.1
    seconds: float = 1500.0
    seconds_each: float = 20.0  # of a measurement of a row

    def batch_size(self, method: str) -> int:
        """The published one."""
        return 64 if method == "dango" else 28

    def execution(self, method: str) -> Execution:
        """Where and in which precision; the transformer of the published size is trained in bfloat16 on a GPU, as published."""
        as_published = "bf16" if self.device == "cuda" and method.endswith("published") else None
        return Execution(self.device, self.autocast or as_published)

    @property
    def searches(self) -> int:
        """For the largest batch, at a time: memory is measured there, not time, and on a CPU each process has its own."""
        return 1 if self.device == "cuda" else min(torch.get_num_threads(), 2)


def short_plan(**given: Any) -> Plan:
    """What a CPU has the time and the memory for."""
    small = Plan(
        methods=tuple(name for name in Plan.methods if not name.endswith("published")),
        steps=5, least_steps=2, copies=2, cap=512, budget=budget("cpu"), resolution=0.5, seconds=540.0, seconds_each=2.0,
    )  # fmt: skip
    return replace(small, **given)


def budget(device: str = DEVICE) -> int | None:
    """Bytes that a batch may take: of a GPU all there are, and of a CPU's memory, which others use too, a part."""
    return None if device == "cuda" else 15 * 10**8


# ------------------------------------------------------------------------------------------------------- a row


class PeerTrainer(Trainer):
    """Steps of a peer, which makes an input of its own from each batch while it is loaded."""

    def __init__(self, peer: Peer, of_ours: Trainer) -> None:
        super().__init__(
            of_ours.model,
            lambda model, batch: peer.forward(self._input),
            of_ours.optimizer,
            execution=of_ours.execution,
            clip=of_ours.clip,
        )
        self._peer, self._input = peer, None

    def load(self, data: PerturbationDataset, parts: list[Share]) -> Iterator[tuple[float, PerturbationBatch]]:
        """The same batches; the peer's input of each is made before it is yielded."""
        for weight, batch in super().load(data, parts):
            with span("loading"):
                self._input = self._peer.collate(batch)
            yield weight, batch


def measure(plan: Plan, method: str, peer: str | None, file: str, batch_size: int | None = None) -> Row:
    """Check and time one implementation of a method in this process, at the published batch size if none is given."""
    work = Workload(method, file=file, set_size=SET_SIZE, execution=plan.execution(method))
    trainer, data = work.make(plan.samples)
    graph = MultiGraph.load(file).to(plan.device)
    batch_size = plan.batch_size(method) if batch_size is None else batch_size
    row: Row = {"method": method, "implementation": peer or "ours"}
    if peer is None:
        few = data.__getitems__(range(min(plan.batch_size(method), len(data)))).to(plan.device)
        nodes, edges = nodes_and_edges(method, graph, few)
        row |= {"nodes": nodes, "edges": edges, "parameters": sum(p.numel() for p in trainer.model.parameters())}
    else:
        other = PEERS[method][peer](trainer.model, graph)
        if other.copies_graph:
            batch_size = min(batch_size, plan.copies)
        row["error"] = error = difference(trainer, other, data.__getitems__(range(batch_size)).to(plan.device))
        bound = MAX_ERROR if work.execution.autocast is None else MAX_ERROR_AUTOCAST
        if not error <= bound:
            raise ArithmeticError(f"predictions differ from ours by {error:.1e}, more than the {bound:.0e} of rounding")
        trainer = PeerTrainer(other, trainer)
    # a peer has made its predictions already, which is all the warming up that slow ones have the time for
    warmup = 3 if plan.steps >= 50 else int(peer is None)
    times = time_steps(
        trainer, data, batch_size, steps=plan.steps, least=plan.least_steps, warmup=warmup, seconds=plan.seconds_each
    )
    return {**row, "batch_size": batch_size, **times}


@torch.no_grad()
def difference(trainer: Trainer, peer: Peer, batch: PerturbationBatch) -> float:
    """The largest of a peer's predictions from ours, as a share of the largest prediction."""
    model = trainer.model.eval()
    ours = trainer.forward(model, batch).prediction.double()
    theirs = peer.forward(peer.collate(batch)).prediction.double()
    return float((theirs - ours).abs().max() / ours.abs().max())


def _work(sender: Connection, *arguments: Any) -> None:
    end_with_parent()
    try:
        sender.send(measure(*arguments))
    except Exception as error:
        traceback.print_exc()
        sender.send(first_line(error))


def measure_elsewhere(
    plan: Plan, method: str, peer: str | None, file: str, seconds: float, batch_size: int | None = None
) -> Row:
    """`measure` in a process of its own; one that is wrong, cannot run or dies is a row with the reason."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, plan, method, peer, file, batch_size))
    process.start()
    sender.close()
    try:
        answer: Row | str = receiver.recv() if receiver.poll(seconds) else f"not finished after {seconds:.0f} s"
    except EOFError:  # it died without a word
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        answer = "killed, most likely for want of memory" if killed else f"ended with status {process.exitcode}"
    process.kill()
    process.join()
    return {"method": method, "implementation": peer or "ours", "reason": answer} if isinstance(answer, str) else answer


# ------------------------------------------------------------------------------------------------------- a run


def run(plan: Plan | None = None, *, out: Path | None = None) -> dict[str, Any]:
    """Measure every method and its peers, then the largest batch of each of ours, and write the results.

    Args:
        plan: see `Plan`; the short one on a CPU if None.
        out: folder of the results; that of this device if None.
    """
    if plan is None:
        plan = Plan() if DEVICE == "cuda" else short_plan()
    start = time.perf_counter()
    graph = synthetic_cell(seed=0, num_genes=plan.genes)
    jobs = [(method, peer) for method in plan.methods for peer in (None, *PEERS.get(method, ()))]
    rows: list[Row] = []
    about = {
        "environment": environment(),
        "plan": asdict(plan),
        "graph": f"synthetic cell: {graph.num_nodes:,} genes, {graph.num_edges():,} entries, {len(graph.relations)} relations",
        "threads": torch.get_num_threads(),
    }
    results = results_dir() if out is None else out
    results.mkdir(parents=True, exist_ok=True)

    def keep() -> dict[str, Any]:
        """Write what there is so far."""
        result = {**about, "rows": rows, "seconds": time.perf_counter() - start}
        write_atomic(results / "methods.json", (json.dumps(result, indent=1) + "\n").encode())
        return result

    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(jobs) + len(plan.methods), desc="methods", disable=None) as bar,
    ):
        file = str(Path(folder) / "cell.safetensors")
        graph.save(file)

        def left() -> float:
            return plan.seconds - (time.perf_counter() - start)

        for method, peer in jobs:
            bar.set_postfix_str(f"{method}, {peer or 'ours'}")
            rows.append(measure_elsewhere(plan, method, peer, file, max(left(), 30.0)))
            if peer is not None:
                in_equal_batches(plan, rows, file, max(left(), 30.0))
            keep()
            bar.update()
        bar.set_postfix_str("largest batches")
        runnable = [method for method in plan.methods if "reason" not in find(rows, method) and plan.cap > 0]
        with ThreadPoolExecutor(plan.searches) as pool:
            searches = pool.map(lambda method: search(plan, method, file, left), runnable)
            for method, largest in zip(runnable, searches, strict=True):
                find(rows, method)["largest"] = largest
                keep()
                bar.update()
        for method in runnable:
            bar.set_postfix_str(f"{method}, its largest batch")
            largest = find(rows, method)["largest"]
            if isinstance(largest, dict):
                largest["samples_per_second"] = rate_at(plan, method, file, largest["batch_size"], max(left(), 60.0))
                keep()
    result = keep()
    save(result, results)
    return result


def in_equal_batches(plan: Plan, rows: Sequence[Row], file: str, seconds: float) -> None:
    """Measure the memory of ours in batches of the last peer's size too, where that is smaller."""
    peer = rows[-1]
    ours = find(rows, peer["method"])
    if "reason" in peer or "reason" in ours or peer["batch_size"] == ours["batch_size"]:
        return
    short = replace(plan, steps=1, least_steps=1)
    row = measure_elsewhere(short, peer["method"], None, file, seconds, peer["batch_size"])
    if "reason" not in row:
        ours["alike"] = {name: row[name] for name in ("batch_size", "peak_bytes")}


def search(plan: Plan, method: str, file: str, left: Callable[[], float]) -> dict[str, Any] | str:
    """The largest batch of a method, or why it is not known."""
    if left() <= 0:
        return "the time for the run was over"
    work = Workload(method, file=file, set_size=SET_SIZE, execution=plan.execution(method))
    try:
        found = largest_batch(
            work, first=plan.batch_size(method), cap=plan.cap, budget=plan.budget, resolution=plan.resolution, timeout=120.0,
            threads=max(torch.get_num_threads() // plan.searches, 1),
        )  # fmt: skip
    except RuntimeError as error:
        return first_line(error)
    return {"batch_size": found.batch_size, "limit": found.limit, "peak_bytes": found.peak_bytes}


def rate_at(plan: Plan, method: str, file: str, batch_size: int, seconds: float) -> float | None:
    """Samples a second in larger batches; None where they are hardly larger than the published ones, or do not run."""
    if batch_size < 2 * plan.batch_size(method):
        return None
    few = replace(plan, steps=min(plan.steps, 10))
    rate: float | None = measure_elsewhere(few, method, None, file, seconds, batch_size).get("samples_per_second")
    return rate


def main() -> None:
    parser = options.parser("methods", __doc__)
    parser.add_argument("--methods", nargs="+", choices=Plan.methods, help="default: all")
    parser.add_argument("--full", action="store_true", help="the published setting, whatever the device")
    parser.add_argument("--device", type=options.device, default=DEVICE, choices=("cpu", "cuda"), help="%(default)s")
    parser.add_argument("--autocast", choices=("bf16",), help="dtype of matrix products")
    parser.add_argument("--seconds", type=options.positive, help="after which nothing more is begun")
    parser.add_argument("--out", type=options.results, help="folder of the results (default: that of this device)")
    given = parser.parse_args()
    plan = Plan() if given.full or given.device == "cuda" else short_plan()
    asked = {"methods": given.methods and tuple(given.methods), "seconds": given.seconds, "autocast": given.autocast}
    plan = replace(plan, device=given.device, **{name: value for name, value in asked.items() if value is not None})
    plan = replace(plan, budget=budget(given.device))
    print(page(run(plan, out=given.out)))


if __name__ == "__main__":
    main()
