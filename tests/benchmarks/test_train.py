from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import train
from benchmarks.training import cell as cell_data
from benchmarks.training import runs, tables, variants
from benchmarks.training.baselines import PairMLP, fit_ridge
from benchmarks.training.checkpoint import load_checkpoint, rng_state, seed_everything, set_rng_state
from benchmarks.training.engine import PLAIN
from cellattn import MultiGraph, checkpoint
from cellattn.data import PerturbationDataset, synthetic_cell, synthetic_phenotypes
from cellattn.data.split import KINDS

from .process_tree import alive, children, soon

# they start others and watch the clock: one at a time
pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parents[2]
NAME, EPOCHS = "kl-rows", 12  # draws rows and dropout masks from the generators that a checkpoint has to keep


def tiny_cell() -> cell_data.Cell:
    """80 genes and some 1,500 training pairs: three steps an epoch."""
    graph = synthetic_cell(seed=0, num_genes=80, symmetrize=True, self_loops=False)
    return cell_data.synthetic(graph, synthetic_phenotypes(graph, 2_500, seed=0))


@pytest.fixture(scope="module")
def cell() -> cell_data.Cell:
    return tiny_cell()


def test_help_explains_seeds_variants_and_splits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    told = capsys.readouterr().out
    words = " ".join(told.split())
    assert "a run of each variant and split for each" in words
    for name, variant in variants.VARIANTS.items():
        assert f"{name} {variant.title};" in words
    for kind in ("source", *KINDS):
        assert kind in words.replace("gene- disjoint", "gene-disjoint")
    with pytest.raises(SystemExit):
        train.main(["--variants", "k"])
    assert "error: argument --variants: invalid choice: 'k' (choose from" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["random", "gene-disjoint"])
def test_split_anew(cell: cell_data.Cell, tmp_path: Path, kind: str) -> None:
    anew = cell_data.recut(cell, kind)
    parts = [part for part in (anew.train, anew.validation, anew.test) if part is not None]
    before = sum(len(part) for part in (cell.train, cell.validation, cell.test) if part is not None)
    assert sum(map(len, parts)) + anew.notes[f"left out of a {kind} split"] == before
    trained, tested = set(anew.train.seeds.tolist()), anew.test.seeds.view(-1, 2).tolist()
    seen = [sum(gene in trained for gene in pair) for pair in tested]
    assert set(seen) == ({0} if kind == "gene-disjoint" else {2})
    assert cell_data.recut(cell, kind, seed=1).test.seeds.tolist() != anew.test.seeds.tolist()


def test_splits_side_by_side(cell: cell_data.Cell, tmp_path: Path) -> None:
    names, splits = ["ridge", "mlp", "pairwise"], ["source", "random", "gene-disjoint"]
    result = train_tiny(cell, tmp_path, 1, variants=names, seeds=[0, 1], splits=splits)
    told = [(one["split"], one["variant"], one["seed"]) for one in result["runs"]]
    assert told == [(split, name, seed) for split in splits for name in names for seed in (0, 1)]
    alone = runs.train_one(
        "ridge", variants.VARIANTS["ridge"], cell_data.recut(cell, "gene-disjoint", 1), 1, tmp_path / "x", 2, print, PLAIN
    )
    (disjoint,) = (one for one in result["runs"] if told[result["runs"].index(one)] == ("gene-disjoint", "ridge", 1))
    assert disjoint["test"] == alone["test"]
    page = tables.table(result)
    assert "| model | test Pearson, source's split, of pairs | test Pearson, random | test Pearson, gene-disjoint |" in page
    for name in names:
        scores = [tables.mean_and_sd([one["test"]["pearson"] for one in tables.by_variant(result, s)[name]]) for s in splits]
        assert f"| {variants.VARIANTS[name].title} | {' | '.join(f'**{score}**' for score in scores)} |" in page
    assert "gene-disjoint: " in page
    assert "left out of a gene-disjoint split" in page
    assert len(list(csv.DictReader((tmp_path / "training.csv").open()))) == len(told)


def train_tiny(cell: cell_data.Cell, out: Path, epochs: int = EPOCHS, **options: Any) -> dict[str, Any]:
    options = {"variants": [NAME], "seeds": [0], "checkpoint_steps": 2, **options}  # two of three: in mid-epoch too
    return runs.run(cell=cell, out=out, results=out, epochs=epochs, **options)


def folder_of(out: Path) -> Path:
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder


def timeless(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if key not in ("seconds", "steps_per_second", "date")}
    return [timeless(part) for part in value] if isinstance(value, (list, tuple)) else value


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for position, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}/{position}")
    else:
        assert a == b, where


def assert_same_runs(out: Path, expected: Path) -> None:
    """Parameters, optimizer, generators and metrics of two finished runs."""
    ours, theirs = (checkpoint.load(folder_of(path) / "checkpoint.safetensors") for path in (out, expected))
    assert_same(timeless(ours.state), timeless(theirs.state))
    assert ours.digest == theirs.digest
    ours, theirs = (json.loads((folder_of(path) / "result.json").read_text()) for path in (out, expected))
    assert_same(timeless(ours), timeless(theirs))
    metrics, expected_metrics = ((folder_of(path) / "metrics.jsonl").read_text() for path in (out, expected))
    assert metrics == expected_metrics


@pytest.fixture(scope="module")
def uninterrupted(cell: cell_data.Cell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    train_tiny(cell, out)
    return out


def interrupt(cell: cell_data.Cell, out: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Stop at the end of a checkpoint's write."""

    def save_and_stop(*args: Any, **kwargs: Any) -> None:
        nonlocal writes
        checkpoint.save(*args, **kwargs)
        writes -= 1
        if writes == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(cell, out)


@pytest.mark.parametrize("writes", [1, 3, 10], ids="step{}".format)
def test_resumes_exactly(
    writes: int, cell: cell_data.Cell, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(cell, tmp_path, monkeypatch, writes)
    seed_everything(99)  # what the generators hold meanwhile does not matter
    train_tiny(cell, tmp_path)
    assert_same_runs(tmp_path, uninterrupted)


def test_parts_of_a_write_are_ignored(
    cell: cell_data.Cell, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed while it writes leaves a truncated file beside the checkpoint, and metrics ahead of it."""
    interrupt(cell, tmp_path, monkeypatch, 4)
    folder = folder_of(tmp_path)
    content = (folder / "checkpoint.safetensors").read_bytes()
    part = folder / ".checkpoint.safetensors.0123456789abcdef"
    part.write_bytes(content[: len(content) // 2])
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + json.dumps({"epoch": 2, "step": 9}) + '\n{"epoch": 3, "st')
    train_tiny(cell, tmp_path)
    assert not part.exists()
    assert_same_runs(tmp_path, uninterrupted)


def test_kill(cell: cell_data.Cell, tmp_path: Path) -> None:
    """kill -9 at a random moment, twice; then the run ends as if nothing had happened."""
    epochs = 30
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.benchmarks.test_train import tiny_cell, train_tiny\n"
        f"train_tiny(tiny_cell(), Path(sys.argv[1]), {epochs}, checkpoint_steps=4)"
    )
    killed, expected = tmp_path / "killed", tmp_path / "expected"
    delays = [random.SystemRandom().uniform(0, 0.5) for _ in range(2)]
    for delay in delays:
        before = max((path.stat().st_mtime_ns for path in killed.glob("*/checkpoint.safetensors")), default=0)
        process = subprocess.Popen([sys.executable, "-c", code, os.fspath(killed)], cwd=ROOT)
        while max((path.stat().st_mtime_ns for path in killed.glob("*/checkpoint.safetensors")), default=0) == before:
            assert process.poll() is None, "ended before its first checkpoint"
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"ended before it was killed, delays {delays}"
        for line in (folder_of(killed) / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
    train_tiny(cell, killed, epochs, checkpoint_steps=4)
    train_tiny(cell, expected, epochs, checkpoint_steps=4)
    assert_same_runs(killed, expected)


def test_metrics_are_complete_and_ordered(uninterrupted: Path) -> None:
    records = [json.loads(line) for line in (folder_of(uninterrupted) / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(EPOCHS))
    assert [record["step"] for record in records] == list(range(3, 3 * EPOCHS + 1, 3))
    assert all(len(record["graph_losses"]) == 8 for record in records)


def test_loss_goes_down(uninterrupted: Path) -> None:
    history = json.loads((folder_of(uninterrupted) / "result.json").read_text())["history"]
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    assert history[-1]["regularization"] < 0.9 * history[0]["regularization"]


def test_selects_by_validation(uninterrupted: Path) -> None:
    result = json.loads((folder_of(uninterrupted) / "result.json").read_text())
    scores = [record["validation_pearson"] for record in result["history"]]
    assert result["validation_pearson"] == max(scores)
    assert result["selected"] == f"epoch {scores.index(max(scores)) + 1}"


def test_finished_runs_are_read_back(cell: cell_data.Cell, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "fit", refuse)
    (run,) = train_tiny(cell, uninterrupted)["runs"]
    assert run == {"split": "source", **json.loads((folder_of(uninterrupted) / "result.json").read_text())}
    with pytest.raises(AssertionError, match="trained again"):  # other settings are another run
        train_tiny(cell, uninterrupted, EPOCHS + 1)
    (other,) = (path for path in uninterrupted.iterdir() if path.is_dir() and path != uninterrupted / run["folder"])
    other.rmdir()


def test_diverging_is_an_error(cell: cell_data.Cell, tmp_path: Path) -> None:
    wild = replace(variants.VARIANTS["mlp"], optimization=variants.Optimization(epochs=3, lr=1e30, decay=0.0))
    data = cell_data.split(cell, 0)
    with pytest.raises(FloatingPointError, match="seed 0: loss nan"):
        runs.fit(wild, cell, data, 0, tmp_path, checkpoint_steps=10, on_epoch=lambda record: None)


def test_every_variant(cell: cell_data.Cell, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    result = train_tiny(cell, tmp_path, 1, variants=list(variants.VARIANTS), seeds=[0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    page = tables.table(result)
    for variant in variants.VARIANTS.values():
        assert f"| {variant.title} | **" in page
    assert page.startswith("synthetic, 80 gene tokens")
    assert "nan" not in page
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    again = {(one["variant"], one["seed"], one["split"]): one.get("history") for one in tables.read(tmp_path)["runs"]}
    for one in result["runs"]:
        kept = again[one["variant"], one["seed"], one["split"]]
        assert (kept is None) == ("history" not in one)
        for record, written in zip(one.get("history", ()), kept or (), strict=True):
            assert written == {key: pytest.approx(record[key], rel=1e-5) for key in tables.CURVES}
    stored = json.loads((tmp_path / "training.json").read_text())
    assert tables.table(stored) == page
    rows = list(csv.DictReader((tmp_path / "training.csv").open()))
    assert [(row["variant"], row["seed"]) for row in rows] == [(name, seed) for name in variants.VARIANTS for seed in "01"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["kl", "no such"]}, "variants: expected some of ridge, .*, got no such"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"checkpoint_steps": 0}, "checkpoint_steps: expected at least 1, got 0"),
        ({"seeds": []}, "seeds: expected at least one, got none"),
        ({"splits": []}, "splits: expected at least one, got none"),
        ({"splits": ["genes"]}, "splits: expected some of source, random, .*, got genes"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str, cell: cell_data.Cell, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_tiny(cell, tmp_path, **options)


# ------------------------------------------------------------------------------------------------------- data


def pairs(data: PerturbationDataset) -> set[tuple[int, ...]]:
    return {tuple(pair) for pair in data.seeds.view(-1, 2).sort(1).values.tolist()}


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_disjoint(seed: int, cell: cell_data.Cell) -> None:
    parts = cell_data.split(replace(cell, validation=None), seed)
    sizes = [len(pairs(part)) for part in parts]
    assert sizes == [len(part) for part in parts]  # each pair once
    assert len(set.union(*map(pairs, parts))) == sum(sizes)
    assert len(parts.validation) == round(0.2 * len(cell.train))
    torch.testing.assert_close(parts.train.y.std(), torch.tensor(1.0))


def test_seeds_validate_on_other_pairs(cell: cell_data.Cell) -> None:
    first, second = (pairs(cell_data.split(replace(cell, validation=None), seed).validation) for seed in (0, 1))
    assert first != second


def test_planted_validation_stays(cell: cell_data.Cell) -> None:
    assert cell.validation is not None
    assert pairs(cell_data.split(cell, 3).validation) == pairs(cell.validation)


def test_distinct_pairs() -> None:
    data = PerturbationDataset.from_sets([[5, 2], [7, 5], [2, 5]], [1.0, 2.0, 4.0], num_genes=9)
    merged = cell_data.distinct_pairs(data, torch.tensor([5, 7, 2]))
    assert merged.seeds.tolist() == [0, 1, 0, 2]
    assert merged.y.tolist() == [2.0, 2.5]


def test_token_genes() -> None:
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 4, 4], [4, 1, 3]]), "b": torch.tensor([[2], [1]])}, 6)
    labelled = torch.tensor([0, 1])
    assert cell_data.token_genes(graph, labelled, "labelled").tolist() == [0, 1]
    assert cell_data.token_genes(graph, labelled, "neighbours:2").tolist() == [0, 1, 4, 2]
    assert cell_data.token_genes(graph, labelled, "full").tolist() == [0, 1, 4, 2, 3, 5]
    for wrong in ("neighbours", "neighbours:-1", "labelled:3", "all"):
        with pytest.raises(ValueError, match="tokens: expected 'labelled', 'neighbours:N' or 'full', got"):
            cell_data.token_genes(graph, labelled, wrong)
    with pytest.raises(ValueError, match="tokens: expected 'labelled' or 'full' for the synthetic cell"):
        cell_data.load_cell(None, "neighbours:3")


def test_spectral_features_rebuild_the_graph() -> None:
    """At full rank U S V^T is the normalised matrix; a directed relation needs V beside U."""
    directed = torch.tensor([[0, 0, 1, 2, 5], [1, 2, 3, 3, 4]])
    graph = MultiGraph.from_edge_index({"directed": directed, "both": directed}, 24, undirected=["both"])
    features = cell_data.spectral_features(graph, rank=100)  # held to half of the genes
    assert features.shape == (24, 12 * 3)
    a = torch.zeros(24, 24).index_put_(tuple(directed), torch.ones(5))
    normalised = a * a.sum(1).clamp_min(1).rsqrt()[:, None] * a.sum(0).clamp_min(1).rsqrt()
    left, right = features[:, :12], features[:, 12:24]
    torch.testing.assert_close(left @ right.T, normalised, atol=1e-5, rtol=0)  # float32, of norm 1


# ------------------------------------------------------------------------------------------------------- models


def test_optimizer_groups(cell: cell_data.Cell) -> None:
    """The encoder learns at its own rate; at the full rate a step takes the same share off every matrix, none off vectors."""
    model, _ = variants.build(variants.VARIANTS["features-kl"], cell)
    how = variants.Optimization()
    groups = variants.optimizer_of(model, how).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    encoder = {id(parameter) for parameter in model.get_submodule("encoder").parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == (how.encoder_lr if id(parameter) in encoder else how.lr)
            assert group["lr"] * group["weight_decay"] == pytest.approx(how.decay if parameter.ndim > 1 else 0.0)


def test_update_average() -> None:
    average, model = PairMLP(3), PairMLP(3)
    before = average.embedding.weight.clone()
    runs.update_average(average, model, 0.75)
    torch.testing.assert_close(average.embedding.weight, 0.75 * before + 0.25 * model.embedding.weight)
    runs.update_average(average, model, 0.0)
    assert_same(dict(average.state_dict()), dict(model.state_dict()))


def planted(y: Tensor, sets: Tensor, num_genes: int) -> PerturbationDataset:
    return PerturbationDataset.from_sets(sets.tolist(), y, num_genes=num_genes)


def test_ridge_recovers_additive_effects() -> None:
    generator = torch.Generator().manual_seed(0)
    sets = torch.combinations(torch.arange(20))
    effect = torch.randn(20, generator=generator)
    y = 3 + effect[sets].sum(1) + 1e-3 * torch.randn(len(sets), generator=generator)
    ridge = fit_ridge(planted(y, sets, 20), penalty=1e-6)
    # the intercept is the mean of y: effects are known up to their mean, as every set has two genes
    expected = (effect - effect.mean()).double()
    torch.testing.assert_close(ridge.effect, expected, atol=2e-3, rtol=0)  # noise 1e-3 over 19 pairs a gene
    torch.testing.assert_close(ridge.predict(planted(y, sets, 20)), y.double(), atol=5e-3, rtol=0)  # noise 1e-3


def test_pair_mlp_beats_ridge_on_products(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(60, generator=generator)
    sets = torch.combinations(torch.arange(60))[torch.randperm(60 * 59 // 2, generator=generator)]
    y = factor[sets].prod(1)
    graph = MultiGraph.from_edge_index({"none": torch.zeros(2, 0, dtype=torch.int64)}, 60)
    learn, test = (planted(y[part], sets[part], 60) for part in (slice(0, 1400), slice(1400, None)))
    cell = cell_data.Cell("planted", graph, torch.zeros(60, 0), learn, test, notes={})
    ridge, mlp = train_tiny(cell, tmp_path, 40, variants=["ridge", "mlp-tuned"])["runs"]
    assert mlp["test"]["pearson"] > ridge["test"]["pearson"] + 0.3
    assert mlp["test"]["pearson"] > 0.8


def test_rng_state_survives_a_checkpoint(tmp_path: Path) -> None:
    import numpy as np

    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002

    seed_everything(5)
    draws()
    model = PairMLP(3)
    checkpoint.save(tmp_path / "checkpoint.safetensors", model, state=rng_state())
    expected = draws()
    seed_everything(6)
    found = load_checkpoint(tmp_path / "checkpoint.safetensors", model)
    assert found is not None
    set_rng_state(found.state)
    assert draws() == expected


# ------------------------------------------------------------------------------------------------------- real tables


def test_real_tables(yeast_dir: Path, tmp_path: Path) -> None:
    cell = cell_data.load_cell(yeast_dir)
    assert cell.graph.num_nodes == 259
    assert (len(cell.train), len(cell.test)) == (13_643, 4_509)
    assert not pairs(cell.train) & pairs(cell.test)
    ridge, transformer = train_tiny(cell, tmp_path, 1, variants=["ridge", "features-kl"])["runs"]
    assert 0.22 < ridge["test"]["pearson"] < 0.26  # 0.240 with all training pairs
    assert transformer["test"]["pearson"] > 0  # after one epoch
    assert set(transformer["kl"]) == set(variants.TIED_RELATIONS)


def test_several_runs_at_a_time_are_the_same(cell: cell_data.Cell, tmp_path: Path) -> None:
    options: dict[str, Any] = {"variants": ["ridge", "pairwise", NAME], "seeds": [0, 1], "epochs": 2}
    one = train_tiny(cell, tmp_path / "one", **options)
    two = train_tiny(cell, tmp_path / "two", workers=2, **options)
    assert (one["workers"], two["workers"]) == (1, 2)
    assert_same(timeless(one["runs"]), timeless(two["runs"]))


def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.benchmarks.test_train import tiny_cell, train_tiny\n"
        "if __name__ == '__main__':\n"
        "    train_tiny(tiny_cell(), Path(sys.argv[1]), 100_000, seeds=[0, 1], workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, os.fspath(tmp_path)], cwd=ROOT)
    try:
        assert soon(lambda: len(list(tmp_path.glob("*/checkpoint.safetensors"))) == 2, 120.0)
        workers = [pid for pid in children(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    finally:
        process.kill()
        process.wait()
    assert len(workers) == 2
    assert soon(lambda: not any(alive(pid) for pid in workers))
