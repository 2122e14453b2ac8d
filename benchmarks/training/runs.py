"""Runs: from a seed to a test score, resumed to the same bits, and all of them one after another or side by side."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cellattn import attention_kl
from cellattn._file import write_atomic
from cellattn.checkpoint import save as save_checkpoint
from cellattn.data import PerturbationDataset
from cellattn.data.split import KINDS
from cellattn.metrics import PearsonCorr, SpearmanCorr, edge_recovery, oversmoothing, record_layers
from cellattn.nn import CellTransformer, Dango, WildtypeDifference

from ..cells import data_dir
from ..measure import environment, results_dir
from ..processes import end_with_parent
from .baselines import PENALTIES, fit_ridge
from .cell import SOURCE, Cell, Splits, held_out, load_cell, recut, split, unit_of
from .checkpoint import keep_rng, load_checkpoint, rng_state, seed_everything, set_rng_state
from .distributed import from_main, is_main, shares, sum_over_ranks, world_size
from .engine import PLAIN, Execution, Forward, Trainer, mean_squared_error
from .tables import save
from .variants import VARIANTS, Variant, build, edges_alone, graph_of, keep_graph, optimizer_of, ties

CHECKPOINT = "checkpoint.safetensors"  # in the folder of each run


def fit(
    variant: Variant,
    cell: Cell,
    data: Splits,
    seed: int,
    folder: Path,
    *,
    checkpoint_steps: int,
    on_epoch: Callable[[dict[str, Any]], None],
    execution: Execution = PLAIN,
) -> tuple[nn.Module, Forward, dict[str, Any]]:
    """Train, or go on training, one model.

    Args:
        cell: on the device of `execution`.
        folder: where `checkpoint.safetensors` and `metrics.jsonl` are, written every `checkpoint_steps` steps and every epoch,
            by the main process.
        on_epoch: called with the metrics of each epoch.
        execution: how steps are computed.

    Returns:
        The averaged model of the best validation epoch, how it is called, and the last checkpoint.

    Raises:
        FloatingPointError: the loss is not finite any more.
    """
    how = variant.optimization
    steps_per_epoch = math.ceil(len(data.train) / how.batch_size)
    num_steps = how.epochs * steps_per_epoch
    seed_everything(seed)
    model, forward = build(variant, cell)
    model.to(execution.device)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = optimizer_of(model, how)
    warmup = max(1, round(how.warmup * num_steps))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    trainer = Trainer(model, forward, optimizer, execution=execution, clip=how.clip)
    # A batch in several passes draws from seed and step alone, so that it does not matter who computes which.
    divided = execution.accumulate * world_size() > 1 or execution.cuda_graph
    path = folder / CHECKPOINT
    selected = copy.deepcopy(average)  # of the best validation epoch
    about: dict[str, Any] = {
        "graph": graph_of(variant, cell),
        "graph_file": keep_graph(variant, cell, folder.parent) if is_main() else None,
        "features": cell.features if variant.features else None,
    }
    found = from_main(lambda: load_checkpoint(path, copy.deepcopy(average).cpu()))
    state: dict[str, Any] | None = None
    if found is None:
        step, history, sums, best, seconds = 0, [], torch.zeros(2, dtype=torch.float64), None, 0.0
    else:
        selected.load_state_dict(found.model.state_dict())
        state = found.state
        assert state is not None  # written below
        step, history, sums, best, seconds = (state[key] for key in ("step", "history", "sums", "best", "seconds"))
        for name, part in (("model", model), ("average", average), ("optimizer", optimizer), ("scheduler", scheduler)):
            part.load_state_dict(state[name])
        set_rng_state(state["rng"])
    sums = sums.to(execution.device)
    if is_main():
        write_jsonl(folder / "metrics.jsonl", history)
    start = time.perf_counter() - seconds

    order = torch.empty(0, dtype=torch.int64)
    while step < num_steps:
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0 or len(order) == 0:
            # the order of an epoch follows from seed and epoch: a position in it is all that a resumed run needs
            order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        chosen = order[position * how.batch_size : (position + 1) * how.batch_size]
        sums += trainer.step(data.train, chosen, seed=seed * 1_000_003 + step if divided else None).double()
        scheduler.step()
        step += 1
        update_average(average, model, min(how.ema, (1 + step) / (10 + step)))

        if step % steps_per_epoch == 0:
            train_loss, regularization = (sums / steps_per_epoch).tolist()
            if not math.isfinite(train_loss + regularization):
                raise FloatingPointError(f"{variant.title}, seed {seed}: loss {train_loss} + {regularization} in epoch {epoch}")
            score, validation_loss, losses = evaluate(average, forward, data.validation)
            if best is None or score["pearson"] > best["validation_pearson"]:
                selected.load_state_dict(average.state_dict())
                best = {"epoch": epoch, "validation_pearson": score["pearson"]}
            history.append(
                {
                    "epoch": epoch,
                    "step": step,
                    "train_loss": train_loss,
                    "regularization": regularization,
                    "validation_loss": validation_loss,
                    "validation_pearson": score["pearson"],
                    "validation_spearman": score["spearman"],
                    "graph_losses": losses,
                }
            )
            sums = torch.zeros_like(sums)
            if is_main():
                write_jsonl(folder / "metrics.jsonl", history)
            on_epoch(history[-1])
        if step % checkpoint_steps == 0 or step == num_steps:
            state = {
                "step": step,
                "history": history,
                "sums": sums,
                "best": best,
                "seconds": time.perf_counter() - start,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": rng_state(),
            }
            if is_main():
                told = {"variant": variant.title, "seed": seed, "y": unit_of(held_out(cell, seed)[0]), "validation": best}
                save_checkpoint(path, selected, metadata=told, state=state, **about)
    assert state is not None  # there is at least one step
    return selected, forward, state


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model"""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


@torch.no_grad()
def evaluate(model: nn.Module, forward: Forward, data: PerturbationDataset) -> tuple[dict[str, float], float, dict[str, float]]:
    """Correlations, MSE and the graph losses on all pairs, each rank's at once."""
    ((mine, weight),) = shares(torch.arange(len(data)))
    device = next(model.parameters()).device
    batch = data.__getitems__(mine).to(device)
    output = forward(model, batch)
    prediction = output.prediction[:, 0]
    error = mean_squared_error(prediction, batch.y) * weight
    sum_over_ranks([error])
    losses = {name: float(value) for name, value in output.losses.items()}
    return correlations(prediction, batch.y), float(error), losses


def correlations(prediction: Tensor, y: Tensor) -> dict[str, float]:
    """Pearson and Spearman, over the pairs of all ranks."""
    pearson, spearman = PearsonCorr(), SpearmanCorr()
    pearson.update(prediction, y)
    spearman.update(prediction, y)
    return {"pearson": pearson.compute(), "spearman": spearman.compute()}


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One line a record, the whole file at once: no line is ever half there, or twice after a resumption."""
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records).encode())


@torch.no_grad()
def measure_heads(model: CellTransformer, forward: Forward, cell: Cell, data: PerturbationDataset) -> dict[str, Any]:
    """What became of the graphs and the tokens: KL and edges recovered a tied head, oversmoothing a layer.

    A model without a graph term is measured on the heads that the others tie.
    """
    with record_layers(model.encoder) as layers:
        forward(model, data.__getitems__([0]).to(cell.graph.device))
    kl, recovered = {}, {}
    for layer, head, relation in ties(cell.graph):
        q, k = layers[layer].q[head], layers[layer].k[head]
        kl[relation] = float(attention_kl(q, k, cell.graph, relation, num_prefix=1))
        recovered[relation] = edge_recovery(q, k, cell.graph, relation, num_prefix=1)
    return {"kl": kl, "edge_recovery": recovered, "oversmoothing": [oversmoothing(layer.x_out) for layer in layers]}


def train_one(
    name: str,
    variant: Variant,
    cell: Cell,
    seed: int,
    out: Path,
    checkpoint_steps: int,
    on_epoch: Callable[[Any], None],
    execution: Execution,
) -> dict[str, Any]:
    """One run from start to test score, or the result of it if it has finished before."""
    data = split(cell, seed)
    settings = {**asdict(variant), "seed": seed, "torch": torch.__version__, "data": fingerprint(cell, data)}
    if execution != PLAIN or world_size() > 1:  # these round in other ways
        here = {**asdict(execution), "device": torch.device(execution.device).type}
        settings |= {"execution": here, "ranks": world_size()}
    digest = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    folder = out / f"{name}-seed{seed}-{digest:08x}"  # other settings or data are another run
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    finished: dict[str, Any] | None = from_main(lambda: _read_json(folder / "result.json"))
    if finished is not None:
        return finished
    result: dict[str, Any] = {"variant": name, "seed": seed, "folder": folder.name}
    if variant.model == "ridge":
        start = time.perf_counter()
        models = [fit_ridge(data.train, penalty) for penalty in PENALTIES]
        data = Splits(*(part.subset(shares(torch.arange(len(part)))[0].samples) for part in data))  # each rank predicts its own
        scores = [correlations(model.predict(data.validation), data.validation.y)["pearson"] for model in models]
        chosen = max(range(len(models)), key=scores.__getitem__)
        result |= {"validation_pearson": _or_none(scores[chosen]), "selected": f"penalty {PENALTIES[chosen]:g}"}
        test = correlations(models[chosen].predict(data.test), data.test.y)
        result |= {"seconds": time.perf_counter() - start}
    else:
        device = execution.device
        cell = replace(cell, graph=cell.graph.to(device), features=cell.features.to(device))
        options: dict[str, Any] = {"checkpoint_steps": checkpoint_steps, "on_epoch": on_epoch, "execution": execution}
        model, forward, state = fit(variant, cell, data, seed, folder, **options)
        best = state["best"]
        result |= {"validation_pearson": _or_none(best["validation_pearson"]), "selected": f"epoch {best['epoch'] + 1}"}
        test = evaluate(model, forward, data.test)[0]
        result |= {"seconds": state["seconds"], "steps_per_second": state["step"] / state["seconds"]}
        if isinstance(model, CellTransformer):
            result |= measure_heads(model, forward, cell, data.test)
        elif isinstance(model, Dango | WildtypeDifference):
            with torch.no_grad():
                encoded = model.encode(edges_alone(cell.graph) if isinstance(model, Dango) else cell.graph)
            by_network = torch.stack(list(encoded.values())) if isinstance(encoded, dict) else encoded
            result |= {"oversmoothing": [oversmoothing(by_network)]}  # of the last layer
        result |= {"history": state["history"]}
    result |= {"test": {name: _or_none(score) for name, score in test.items()}}
    if is_main():
        write_atomic(folder / "result.json", json.dumps(result).encode())
    return result


def _or_none(correlation: float) -> float | None:
    """None where there is none: an additive model says the same of all pairs of genes that it has not seen."""
    return correlation if math.isfinite(correlation) else None


def _read_json(path: Path) -> Any:
    """What a file holds; None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Compute on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_worker() -> None:
    end_with_parent()
    torch.set_num_threads(1)


def _say_nothing(record: dict[str, Any]) -> None:
    """What a run in another process calls after each epoch."""


def fingerprint(cell: Cell, data: Splits) -> int:
    """A checksum of all that a run reads."""
    crc = zlib.crc32(f"{cell.source} {cell.graph.digest()}".encode())
    for tensor in (x for part in data for x in (part.seeds, part.y)):
        crc = zlib.crc32(tensor.contiguous().numpy().tobytes(), crc)
    return crc


def run(
    *,
    full: bool = False,
    cell: Cell | None = None,
    out: Path | None = None,
    results: Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(VARIANTS),
    splits: Sequence[str] = (SOURCE,),
    epochs: int | None = None,
    checkpoint_steps: int = 100,
    execution: Execution = PLAIN,
    workers: int = 1,
) -> dict[str, Any]:
    """Train every variant with every seed on every split, and write `training.json`, `training.csv` and `training.png`.

    Args:
        full: every gene a token and twice the epochs.
        cell: what is trained on; the real tables where they are, else the synthetic cell.
        out: folder of the runs, from which interrupted ones go on; a temporary one if None.
        results: folder of the results; that of this device if None.
        seeds, variants: the runs.
        splits: of the pairs: "source" as they come, or kinds of `cellattn.data.split`, drawn anew for each seed.
        epochs: of each run, in place of the variant's own.
        checkpoint_steps: steps between two checkpoints.
        execution: how steps are computed; several ranks share each batch.
        workers: runs at a time, each in a process and thread of its own; more than one for a small cell alone.
    """
    if unknown := set(variants) - set(VARIANTS):
        raise ValueError(f"variants: expected some of {', '.join(VARIANTS)}, got {', '.join(sorted(unknown))}")
    for name, value in (("epochs", epochs), ("checkpoint_steps", checkpoint_steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if unknown := set(splits) - {SOURCE, *KINDS}:
        raise ValueError(f"splits: expected some of {', '.join((SOURCE, *KINDS))}, got {', '.join(sorted(unknown))}")
    for name, several in (("seeds", seeds), ("variants", variants), ("splits", splits)):
        if not several:
            raise ValueError(f"{name}: expected at least one, got none")
    start = time.perf_counter()
    cell = load_cell(data_dir(), "full" if full else "labelled") if cell is None else cell
    chosen = {name: VARIANTS[name] for name in variants}
    for name, variant in chosen.items():
        how = variant.optimization
        chosen[name] = replace(variant, optimization=replace(how, epochs=epochs or how.epochs * (2 if full else 1)))
    cells = {(kind, seed): cell if kind == SOURCE else recut(cell, kind, seed) for kind in splits for seed in seeds}
    runs = []
    # a small cell gains nothing from threads, and on a busy machine loses tenfold to waiting for them
    threads = 1 if cell.graph.num_nodes < 1_000 else torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary, keep_rng(), use_threads(threads):
        epochs_of = {name: 0 if variant.model == "ridge" else variant.optimization.epochs for name, variant in chosen.items()}
        total, folder = sum(epochs_of.values()) * len(cells), out or Path(temporary)
        kinds = [kind for kind in splits for _ in range(len(chosen) * len(seeds))]
        jobs = [
            (name, variant, cells[kind, seed], seed, folder, checkpoint_steps)
            for kind in splits
            for name, variant in chosen.items()
            for seed in seeds
        ]
        with tqdm(total=total, unit="epoch", desc="training", disable=None if is_main() else True) as bar:
            if threads == 1 and workers > 1:
                spawn = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(workers, spawn, initializer=_start_worker) as pool:
                    for job, run in zip(
                        jobs, [pool.submit(train_one, *job, _say_nothing, execution) for job in jobs], strict=True
                    ):
                        runs.append(run.result())
                        bar.update(epochs_of[job[0]])
            else:
                for job in jobs:

                    def on_epoch(record: dict[str, Any], name: str = job[0], seed: int = job[3]) -> None:
                        bar.set_postfix_str(f"{name}, seed {seed}, validation {record['validation_pearson']:.3f}")
                        bar.update()

                    runs.append(train_one(*job, on_epoch, execution))
    runs = [{"split": kind, **one} for kind, one in zip(kinds, runs, strict=True)]
    result = {
        "environment": environment(),
        "source": cell.source,
        "tokens": cell.graph.num_nodes,
        "threads": threads,
        "workers": workers if threads == 1 else 1,
        "splits": {kind: _described(cells[kind, seeds[0]], seeds[0]) for kind in splits},
        "variants": {name: asdict(variant) for name, variant in chosen.items()},
        "runs": runs,
        "seconds": time.perf_counter() - start,
    }
    if is_main():
        save(result, results_dir() if results is None else results)
    return result


def _described(cell: Cell, seed: int) -> dict[str, dict[str, int]]:
    """How many pairs each part has, and what is told of them."""
    return {"pairs": {name: len(part) for name, part in split(cell, seed)._asdict().items()}, "notes": cell.notes}
