"""Train the cell transformer on measured double mutants, beside additive ridge and a pair MLP.

    python -m benchmarks.train [--data FOLDER] [--out FOLDER] [--tokens labelled|neighbours:N|full] [--full]
    torchrun --nproc-per-node 4 -m benchmarks.train [...]     # the same batches, shared by four processes

The data are the digenic interaction scores of Costanzo et al. 2016 for two GO terms, in the source's split, over the real
graphs; where the tables are missing, a synthetic cell and planted phenotypes. A fifth of the training pairs, drawn anew
for each seed, is held out for validation; the test pairs are looked at once a run, at the epoch that validated best. With
--split all pairs are split anew, as `cellattn.data.split` does: at random, or so that no gene of a test pair was trained on.

Each run has a folder of its own under --out with `metrics.jsonl` (one line an epoch), `checkpoint.safetensors` and, once
finished, `result.json`; the graph that models are called with is beside the folders. The checkpoint holds the model of the
best validation epoch, as `cellattn.checkpoint` writes it, to screen with, and all that the run needs to go on. A run that was
interrupted goes on from its checkpoint to the same bits, one that has finished is read back.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import math
import multiprocessing
import statistics
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cellattn import MultiGraph, attention_kl
from cellattn._file import write_atomic
from cellattn.checkpoint import save as save_checkpoint
from cellattn.data import (
    PERTURBATION_TYPES,
    PerturbationDataset,
    leakage,
    load_dcell_subset,
    load_yeast,
    read_interactions,
    require_same_genes,
    synthetic_cell,
    synthetic_phenotypes,
)
from cellattn.data import split as split_dataset
from cellattn.data.split import KINDS
from cellattn.metrics import PearsonCorr, SpearmanCorr, edge_recovery, oversmoothing, record_layers
from cellattn.nn import CellTransformer, Dango, PairwiseInteraction, WildtypeDifference

from .baselines import PENALTIES, fit_ridge
from .cells import data_dir
from .checkpoint import keep_rng, load_checkpoint, rng_state, seed_everything, set_rng_state
from .distributed import distributed, from_main, is_main, shares, sum_over_ranks, world_size
from .engine import AUTOCAST, Execution, Forward, Trainer, mean_squared_error
from .measure import environment, results_dir
from .methods import pair_mlp
from .processes import end_with_parent

# The relations with the most edges among the labelled genes come first; a layer has as many ties as heads.
TIED_RELATIONS = ("physical", "database", "complex", "neighborhood", "coexpression", "cooccurence", "regulatory", "motif")
DIM, NUM_LAYERS, NUM_HEADS, FFN_DIM = 64, 2, 4, 128
SPECTRAL_RANK = 128
VALIDATION_SHARE = 0.2
CHECKPOINT = "checkpoint.safetensors"  # in the folder of each run
_PLAIN = Execution()
SYNTHETIC_SIZES = {"labelled": (200, 8_000), "full": (6607, 100_000)}  # genes and measured sets


# ------------------------------------------------------------------------------------------------------- variants


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up and cosine decay of the learning rate, MSE of standardised phenotypes."""

    epochs: int = 30
    batch_size: int = 512
    lr: float = 5e-3
    encoder_lr: float = 1e-3
    decay: float = 3e-3  # of matrices in a step at the full learning rate: lr * weight_decay
    ema: float = 0.98  # of the parameters that are evaluated
    warmup: float = 0.05  # share of the steps
    clip: float = 1.0


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    title: str
    model: str  # "ridge", "pair MLP", "pairwise interaction", "DANGO", "wildtype difference" or "cell transformer"
    loss: str | None = None  # of the tied heads
    weight: float = 0.0  # of the mean loss over the ties, or over the networks of DANGO
    layers: int = NUM_LAYERS  # of a graph network or transformer
    features: bool = False
    sampled_rows: float | None = None
    optimization: Optimization = Optimization()


_MLP = Optimization(epochs=40, batch_size=256, lr=3e-3, decay=3e-4, ema=0.0)
_TUNED = replace(_MLP, lr=1e-2, decay=1e-2)
_SETS = Optimization(epochs=20, lr=3e-3)
_FEATURES = Optimization(epochs=25)
VARIANTS = {
    "ridge": Variant("additive ridge", "ridge"),
    "mlp": Variant("pair MLP", "pair MLP", optimization=_MLP),
    "mlp-tuned": Variant("pair MLP, tuned", "pair MLP", optimization=_TUNED),
    "pairwise": Variant("pairwise interaction", "pairwise interaction", optimization=_TUNED),
    "dango": Variant("DANGO, joint training", "DANGO", weight=0.1, optimization=replace(_SETS, epochs=12)),
    "wildtype": Variant("wildtype difference, one layer", "wildtype difference", layers=1, optimization=_SETS),
    "none": Variant("cell transformer, no graph term", "cell transformer"),
    "kl": Variant("cell transformer, KL", "cell transformer", "kl", 3.0),
    "bce": Variant("cell transformer, BCE", "cell transformer", "bce", 3.0),
    "kl-rows": Variant("cell transformer, KL on a quarter of the rows", "cell transformer", "kl", 3.0, sampled_rows=0.25),
    "features-none": Variant(
        "cell transformer, spectral features, no graph term", "cell transformer", features=True, optimization=_FEATURES
    ),
    "features-kl": Variant(
        "cell transformer, spectral features, KL", "cell transformer", "kl", 0.01, features=True, optimization=_FEATURES
    ),
}


# ------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Cell:
    """Genes that are tokens, their graphs, and pairs of them that were measured."""

    source: str
    graph: MultiGraph  # among the tokens
    features: Tensor  # float32 [N, F]
    train: PerturbationDataset  # of pairs, each once, genes numbered as tokens
    test: PerturbationDataset
    notes: dict[str, int]  # counts that the report tells
    validation: PerturbationDataset | None = None  # None: drawn from train

    def __post_init__(self) -> None:
        for part in (self.train, self.test, *([] if self.validation is None else [self.validation])):
            require_same_genes(self.graph.names, part.names, what=("graph", "measured pairs"))


def load_cell(folder: Path | None, tokens: str = "labelled") -> Cell:
    """The real cell of a folder of yeast tables, or the synthetic one.

    Args:
        folder: the tables; None for a synthetic cell.
        tokens: "labelled", the genes of measured pairs; "neighbours:N", these and the N genes with the most edges to them;
            "full", all genes. The synthetic cell has 200 genes, or, at "full", the published number.
    """
    if folder is None:
        if tokens not in SYNTHETIC_SIZES:
            raise ValueError(f"tokens: expected 'labelled' or 'full' for the synthetic cell, got {tokens!r}")
        num_genes, num_samples = SYNTHETIC_SIZES[tokens]
        graph = synthetic_cell(seed=0, num_genes=num_genes, symmetrize=True, self_loops=False)
        return synthetic(graph, synthetic_phenotypes(graph, num_samples, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown gene names are counted by the loaders, and are no news here
        genes, graph = load_yeast(folder)
        data = load_dcell_subset(folder, genes)
        listed = read_interactions(folder / "costanzo2016_dcell_subset.tsv.gz", genes, split="split")
    nodes = token_genes(graph, data.seeds.unique(), tokens)
    train, test = (distinct_pairs(data.subset(split), nodes) for split in ("*_training", "*_testing"))
    notes = {
        "listed pairs": len(data),
        "training pairs removed since they are tested": len(listed.score) - len(data),
        "listed twice, averaged": len(data) - len(train) - len(test),
    }
    features = spectral_features(graph)[nodes]
    return Cell("real yeast tables", graph.subgraph(nodes), standardize(features), train, test, notes)


def synthetic(graph: MultiGraph, data: PerturbationDataset) -> Cell:
    """A cell of planted phenotypes, in the split they come with."""
    nodes = torch.arange(graph.num_nodes)
    train, validation, test = (distinct_pairs(data.subset(split), nodes) for split in ("train", "validation", "test"))
    notes = {"listed pairs": len(data), "listed twice, averaged": len(data) - len(train) - len(validation) - len(test)}
    return Cell("synthetic", graph, standardize(spectral_features(graph)), train, test, notes, validation)


def recut(cell: Cell, kind: str) -> Cell:
    """The cell with all its measured pairs split anew, by a kind of `cellattn.data.split`, the same for all seeds."""
    given = [cell.train, *([] if cell.validation is None else [cell.validation]), cell.test]
    pairs, y = torch.cat([part.seeds for part in given]).view(-1, 2), torch.cat([part.y for part in given])
    data = PerturbationDataset.from_sets(pairs.tolist(), y, num_genes=cell.graph.num_nodes, genes=cell.graph.names)
    parts = split_dataset(data, kind)
    found = leakage(data, parts)
    train, validation, test = (data.subset(parts[name]) for name in ("train", "validation", "test"))
    notes = {
        f"left out of a {kind} split": found["left out"]["samples"],
        "test pairs with both genes seen": found["test"]["every gene seen"],
        "test pairs with neither gene seen": found["test"]["no gene seen"],
    }
    return replace(cell, train=train, validation=validation, test=test, notes=cell.notes | notes)


def token_genes(graph: MultiGraph, labelled: Tensor, tokens: str) -> Tensor:
    """The genes that are tokens, int64, labelled genes first."""
    kind, _, number = tokens.partition(":")
    if kind == "labelled" and not number:
        return labelled
    counts = torch.zeros(graph.num_nodes)
    is_labelled = counts.index_fill(0, labelled, 1)
    for relation in graph.relations:
        source, target = graph.edge_index(relation)
        counts.index_add_(0, source, is_labelled[target]).index_add_(0, target, is_labelled[source])
    others = counts.index_fill_(0, labelled, -1).argsort(descending=True, stable=True)[: graph.num_nodes - len(labelled)]
    if kind == "full" and not number:
        return torch.cat([labelled, others])
    if kind == "neighbours" and number.isdecimal():
        return torch.cat([labelled, others[: int(number)]])
    raise ValueError(f"tokens: expected 'labelled', 'neighbours:N' or 'full', got {tokens!r}")


def distinct_pairs(data: PerturbationDataset, nodes: Tensor) -> PerturbationDataset:
    """Each pair once, with its mean phenotype; gene nodes[m] becomes token m."""
    token = torch.full((data.num_genes,), -1).index_put_((nodes,), torch.arange(len(nodes)))
    pairs, inverse = token[data.seeds.view(-1, 2)].sort(1).values.unique(dim=0, return_inverse=True)
    y = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, inverse, data.y.double()) / inverse.bincount()
    names = None if data.names is None else data.names.select(nodes)
    return PerturbationDataset.from_sets(pairs.tolist(), y, num_genes=len(nodes), genes=names)


def spectral_features(graph: MultiGraph, rank: int = SPECTRAL_RANK) -> Tensor:
    """Leading singular vectors of D^-1/2 A D^-1/2 of each relation, times sqrt(s): float32 [N, F].

    Left ones, and where A is not symmetric, right ones too.
    """
    n, rank = graph.num_nodes, min(rank, graph.num_nodes // 2)
    parts = []
    for relation in graph.relations:
        (i, j), w = graph.edge_index(relation), graph.weight(relation)
        out_degree, in_degree = (torch.zeros(n).index_add_(0, end, w) for end in (i, j))
        a = torch.sparse_coo_tensor(torch.stack([i, j]), w * (out_degree[i] * in_degree[j]).rsqrt(), (n, n)).coalesce()
        with keep_rng():
            seed_everything(0)
            u, s, v = torch.svd_lowrank(a, q=rank + 8, niter=6)
        scale = s[:rank].sqrt()
        parts.append(u[:, :rank] * scale)
        if not torch.equal(i * n + j, (j * n + i).sort().values):
            parts.append(v[:, :rank] * scale)
    return torch.cat(parts, 1)


def standardize(features: Tensor) -> Tensor:
    """z-scores over the tokens; a few genes carry most of a leading vector, hence clamped to +-5."""
    return ((features - features.mean(0)) / features.std(0).clamp_min(1e-6)).clamp(-5, 5)


class Splits(NamedTuple):
    """Parts of the pairs; phenotypes in standard deviations of the training part."""

    train: PerturbationDataset
    validation: PerturbationDataset
    test: PerturbationDataset


def split(cell: Cell, seed: int) -> Splits:
    """Hold out the validation pairs of a seed, and standardise by the rest."""
    train, validation = held_out(cell, seed)
    unit = unit_of(train)
    parts = (_with_y(part, (part.y - unit["mean"]) / unit["std"]) for part in (train, validation, cell.test))
    return Splits(*parts)


def unit_of(train: PerturbationDataset) -> dict[str, float]:
    """Mean and standard deviation of phenotypes as they were measured, which predictions are in."""
    return {"mean": float(train.y.mean()), "std": float(train.y.std())}


def held_out(cell: Cell, seed: int) -> tuple[PerturbationDataset, PerturbationDataset]:
    """Training and validation pairs of a seed, phenotypes as they were measured."""
    train, validation = cell.train, cell.validation
    if validation is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1000 + seed))
        size = round(VALIDATION_SHARE * len(order))
        train, validation = train.subset(order[size:]), train.subset(order[:size])
    return train, validation


def _with_y(data: PerturbationDataset, y: Tensor) -> PerturbationDataset:
    return PerturbationDataset(data.seeds, data.ptr, data.types, y, num_genes=data.num_genes, names=data.names)


# ------------------------------------------------------------------------------------------------------- models


def ties(graph: MultiGraph) -> list[tuple[int, int, str]]:
    """(layer, head, relation): one head a relation, layer by layer."""
    relations = TIED_RELATIONS if set(TIED_RELATIONS) <= set(graph.relations) else graph.relations
    relations = relations[: NUM_LAYERS * NUM_HEADS]
    return [(*divmod(position, NUM_HEADS), relation) for position, relation in enumerate(relations)]


def edges_alone(graph: MultiGraph) -> MultiGraph:
    """The graph without weights, as DANGO reconstructs it: an edge is there or not."""
    edges = {name: graph.edge_index(name) for name in graph.relations}
    return MultiGraph.from_edge_index(edges, graph.num_nodes, names=graph.names)


def graph_of(variant: Variant, cell: Cell) -> MultiGraph:
    """The graph that a variant's model is called with."""
    return edges_alone(cell.graph) if variant.model == "DANGO" else cell.graph


def keep_graph(variant: Variant, cell: Cell, out: Path) -> Path:
    """The file of `graph_of`, beside the folders of the runs; written by the first that needs it."""
    graph = graph_of(variant, cell)
    path = out / f"graph-{graph.digest()[:8]}.safetensors"
    if not path.is_file():
        graph.save(path)
    return path


def build(variant: Variant, cell: Cell) -> tuple[nn.Module, Forward]:
    """The untrained model, and how it is called."""
    graph, num_genes = graph_of(variant, cell), cell.graph.num_nodes
    if variant.model == "pair MLP":
        return pair_mlp(graph, cell.features.device)
    features = cell.features if variant.features else None
    genes: dict[str, Any] = {"num_genes": num_genes, "feature_dim": None if features is None else features.shape[1]}
    num_types = len(PERTURBATION_TYPES)
    model: nn.Module
    if variant.model == "DANGO":
        model = Dango(DIM, relations=dict.fromkeys(graph.relations, variant.weight / len(graph.relations)), **genes)
    elif variant.model == "pairwise interaction":
        model = PairwiseInteraction(DIM, num_types=num_types, **genes)
    elif variant.model == "wildtype difference":
        model = WildtypeDifference(DIM, variant.layers, relations=graph.relations, num_types=num_types, mode="delta", **genes)
    else:
        tied = ties(graph) if variant.loss else []
        model = CellTransformer(
            DIM,
            variant.layers,
            NUM_HEADS,
            num_types=num_types,
            ties=[(*tie, variant.weight / len(tied)) for tie in tied],
            ffn_dim=FFN_DIM,
            pool=("sum", "pairwise"),
            hidden_dim=DIM,
            sampled_rows=variant.sampled_rows,
            loss=variant.loss or "kl",  # without a tie there is none
            **genes,
        )
    return model, lambda model, batch: model(graph, batch.seeds, batch.ptr, batch.types, features=features)


def optimizer_of(model: nn.Module, how: Optimization) -> torch.optim.Optimizer:
    """AdamW: the encoder at its own learning rate, weight decay on matrices alone."""
    groups = []
    for in_encoder, lr in ((True, how.encoder_lr), (False, how.lr)):
        named = [p for name, p in model.named_parameters() if name.startswith("encoder.") == in_encoder]
        groups.append({"params": [p for p in named if p.ndim > 1], "lr": lr, "weight_decay": how.decay / lr})
        groups.append({"params": [p for p in named if p.ndim <= 1], "lr": lr, "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98))


# ------------------------------------------------------------------------------------------------------- training


def fit(
    variant: Variant,
    cell: Cell,
    data: Splits,
    seed: int,
    folder: Path,
    *,
    checkpoint_steps: int,
    on_epoch: Callable[[dict[str, Any]], None],
    execution: Execution = _PLAIN,
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
    if execution != _PLAIN or world_size() > 1:  # these round in other ways
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
        result |= {"validation_pearson": scores[chosen], "selected": f"penalty {PENALTIES[chosen]:g}"}
        result |= {"test": correlations(models[chosen].predict(data.test), data.test.y)}
        result |= {"seconds": time.perf_counter() - start}
    else:
        device = execution.device
        cell = replace(cell, graph=cell.graph.to(device), features=cell.features.to(device))
        options: dict[str, Any] = {"checkpoint_steps": checkpoint_steps, "on_epoch": on_epoch, "execution": execution}
        model, forward, state = fit(variant, cell, data, seed, folder, **options)
        best = state["best"]
        result |= {"validation_pearson": best["validation_pearson"], "selected": f"epoch {best['epoch'] + 1}"}
        result |= {"test": evaluate(model, forward, data.test)[0]}
        result |= {"seconds": state["seconds"], "steps_per_second": state["step"] / state["seconds"]}
        if isinstance(model, CellTransformer):
            result |= measure_heads(model, forward, cell, data.test)
        elif isinstance(model, Dango | WildtypeDifference):
            with torch.no_grad():
                encoded = model.encode(edges_alone(cell.graph) if isinstance(model, Dango) else cell.graph)
            by_network = torch.stack(list(encoded.values())) if isinstance(encoded, dict) else encoded
            result |= {"oversmoothing": [oversmoothing(by_network)]}  # of the last layer
        result |= {"history": state["history"]}
    if is_main():
        write_atomic(folder / "result.json", json.dumps(result).encode())
    return result


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
    epochs: int | None = None,
    checkpoint_steps: int = 100,
    execution: Execution = _PLAIN,
    workers: int = 1,
) -> dict[str, Any]:
    """Train every variant with every seed, and write `training.json`, `training.csv` and `training.png`.

    Args:
        full: every gene a token and twice the epochs.
        cell: what is trained on; the real tables where they are, else the synthetic cell.
        out: folder of the runs, from which interrupted ones go on; a temporary one if None.
        results: folder of the results; that of this device if None.
        seeds, variants: the runs.
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
    if not seeds or not variants:
        raise ValueError(f"{'variants' if seeds else 'seeds'}: expected at least one, got none")
    start = time.perf_counter()
    cell = load_cell(data_dir(), "full" if full else "labelled") if cell is None else cell
    chosen = {name: VARIANTS[name] for name in variants}
    for name, variant in chosen.items():
        how = variant.optimization
        chosen[name] = replace(variant, optimization=replace(how, epochs=epochs or how.epochs * (2 if full else 1)))
    runs = []
    # a small cell gains nothing from threads, and on a busy machine loses tenfold to waiting for them
    threads = 1 if cell.graph.num_nodes < 1_000 else torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary, keep_rng(), use_threads(threads):
        epochs_of = {name: 0 if variant.model == "ridge" else variant.optimization.epochs for name, variant in chosen.items()}
        total, folder = sum(epochs_of.values()) * len(seeds), out or Path(temporary)
        jobs = [(name, variant, cell, seed, folder, checkpoint_steps) for name, variant in chosen.items() for seed in seeds]
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
    example = split(cell, seeds[0])
    result = {
        "environment": environment(),
        "source": cell.source,
        "tokens": cell.graph.num_nodes,
        "threads": threads,
        "workers": workers if threads == 1 else 1,
        "pairs": {name: len(part) for name, part in example._asdict().items()},
        "notes": cell.notes,
        "variants": {name: asdict(variant) for name, variant in chosen.items()},
        "runs": runs,
        "seconds": time.perf_counter() - start,
    }
    if is_main():
        save(result, results_dir() if results is None else results)
    return result


# ------------------------------------------------------------------------------------------------------- results


def save(result: dict[str, Any], folder: Path) -> None:
    """Write the result as JSON (without the epochs), CSV (one line a run) and curves."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{key: value for key, value in one.items() if key != "history"} for one in result["runs"]]
    write_atomic(folder / "training.json", (json.dumps({**result, "runs": runs}, indent=1) + "\n").encode())
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["variant", "seed", "validation_pearson", "test_pearson", "test_spearman", "selected", "seconds"])
    for one in runs:
        test = one["test"]
        scores = [one["validation_pearson"], test["pearson"], test["spearman"]]
        lines.writerow([one["variant"], one["seed"], *scores, one["selected"], one["seconds"]])
    write_atomic(folder / "training.csv", text.getvalue().encode())
    plot(result, folder / "training.png")


def plot(result: dict[str, Any], path: Path) -> None:
    """Validation Pearson, MSE and graph term by epoch: the mean over seeds, and each seed's validation Pearson."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for colour, name in enumerate(result["variants"]):
        histories = [one["history"] for one in result["runs"] if one["variant"] == name and "history" in one]
        if not histories:
            continue
        epochs = [record["epoch"] + 1 for record in histories[0]]
        style: dict[str, Any] = {"color": f"C{colour}", "linewidth": 1.6}

        def mean(key: str) -> list[float]:
            return [statistics.fmean(record[key] for record in records) for records in zip(*histories, strict=True)]

        for history in histories:
            axes[0].plot(epochs, [record["validation_pearson"] for record in history], color=f"C{colour}", alpha=0.2)
        axes[0].plot(epochs, mean("validation_pearson"), label=result["variants"][name]["title"], **style)
        axes[1].plot(epochs, mean("train_loss"), **style)
        axes[1].plot(epochs, mean("validation_loss"), linestyle="--", **style)
        if any(mean("regularization")):
            axes[2].plot(epochs, mean("regularization"), **style)
    axes[0].set(xlabel="epoch", ylabel="validation Pearson")
    axes[1].set(xlabel="epoch", ylabel="MSE (training solid, validation dashed)")
    axes[2].set(xlabel="epoch", ylabel="graph term, weighted", yscale="log")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    plt.close(figure)
    write_atomic(path, image.getvalue())


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: scores by variant, the graphs in the tied heads, and how it was all selected."""
    by_variant = {name: [one for one in result["runs"] if one["variant"] == name] for name in result["variants"]}
    lines = [
        "| model | test Pearson | each seed | test Spearman | validation Pearson | selected | s a run | it/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in by_variant.items():
        test = [one["test"]["pearson"] for one in runs]
        speed = [one["steps_per_second"] for one in runs if "steps_per_second" in one]
        cells = [
            result["variants"][name]["title"],
            f"**{mean_and_sd(test)}**",
            ", ".join(f"{x:.3f}" for x in test),
            mean_and_sd([one["test"]["spearman"] for one in runs]),
            mean_and_sd([one["validation_pearson"] for one in runs]),
            ", ".join(one["selected"] for one in runs),
            f"{statistics.fmean(one['seconds'] for one in runs):.1f}",
            f"{statistics.fmean(speed):.3g}" if speed else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = "; ".join(f"{value:,} {name}" for name, value in result["notes"].items())
    pairs = ", ".join(f"{value:,} {name}" for name, value in result["pairs"].items())
    how = (
        "Mean ± standard deviation over seeds; a seed sets initial weights, order of the data, and, on real tables in the "
        f"source's split, the {VALIDATION_SHARE:.0%} of training pairs that validate. Epoch (ridge: penalty) by validation "
        "Pearson; the test pairs were looked at once a run. Graph-term weights, learning rates and sizes were chosen by "
        "validation on the real tables before; the cell transformer had more tries than the tuned pair MLP. While the recipe "
        "was settled, test scores of earlier settings had been seen, though none was chosen by them."
    )
    heads = graph_table({name: runs for name, runs in by_variant.items() if "kl" in runs[0]}, result["variants"])
    scope = f"{result['source']}, {result['tokens']:,} gene tokens; {pairs} ({notes})."
    time_taken = (
        f"{result['seconds']:.0f} s in all, {result['workers']} run(s) at a time, of {result['threads']} CPU thread(s)."
    )
    return "\n".join([f"{scope} {time_taken}", "", *lines, "", how, *heads])


def graph_table(runs: dict[str, list[dict[str, Any]]], variants: dict[str, Any]) -> list[str]:
    """KL and share of edges recovered of each graph in its head, means over seeds."""
    if not runs:
        return []
    relations = list(next(iter(runs.values()))[0]["kl"])
    lines = ["", "KL from graph to its head, and share of the graph's edges among the head's top entries:", ""]
    lines.append(f"| model | {' | '.join(relations)} | oversmoothing by layer |")
    lines.append("|---" * (len(relations) + 2) + "|")
    for name, seeds in runs.items():
        means = [
            f"{statistics.fmean(one['kl'][r] for one in seeds):.2f}, "
            f"{statistics.fmean(one['edge_recovery'][r] for one in seeds):.0%}"
            for r in relations
        ]
        smooth = [f"{statistics.fmean(layer):.2f}" for layer in zip(*(one["oversmoothing"] for one in seeds), strict=True)]
        lines.append(f"| {variants[name]['title']} | {' | '.join(means)} | {', '.join(smooth)} |")
    return lines


def mean_and_sd(values: Sequence[float]) -> str:
    """0.512 ± 0.010"""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the yeast tables (default: CELLATTN_DATA, ../shared/data/yeast)")
    parser.add_argument("--out", type=Path, default=Path("runs/training"), help="folder of runs and results (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--epochs", type=int, help="of every run (default: each variant's own)")
    parser.add_argument("--tokens", help="labelled (default), neighbours:N or full")
    parser.add_argument("--split", choices=KINDS, help="split all pairs anew; of gene-disjoint, no test gene was trained on")
    parser.add_argument("--full", action="store_true", help="every gene a token, twice the epochs")
    parser.add_argument("--checkpoint-steps", type=int, default=100, help="steps between two checkpoints (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, if not given")
    parser.add_argument("--autocast", choices=AUTOCAST, help="dtype of matrix products")
    parser.add_argument("--accumulate", type=int, default=1, help="passes in which a process computes its share of a batch")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="with torch.compile")
    parser.add_argument("--cuda-graph", action="store_true", help="forward and backward as one CUDA graph")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a rank waits for the others (%(default)s)")
    given = parser.parse_args()
    with distributed(given.device, timeout=given.timeout) as device:
        cell = load_cell(given.data or data_dir(), given.tokens or ("full" if given.full else "labelled"))
        cell = recut(cell, given.split) if given.split else cell
        result = run(
            full=given.full,
            cell=cell,
            out=given.out,
            results=given.out,
            seeds=given.seeds,
            variants=given.variants,
            epochs=given.epochs,
            checkpoint_steps=given.checkpoint_steps,
            execution=Execution(str(device), given.autocast, given.accumulate, given.compile, given.cuda_graph),
        )
        if is_main():
            print(f"{table(result)}\n\nwritten to {given.out}")


if __name__ == "__main__":
    main()
