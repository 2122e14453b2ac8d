"""Two ranks on one global batch, over gloo: the same losses as one process, and what happens when one of them is lost."""

from __future__ import annotations

import csv
import functools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.training import runs
from benchmarks.training.cell import load_cell
from benchmarks.training.distributed import distributed, from_main, is_main, shares, sum_over_ranks
from benchmarks.training.engine import Execution, Forward
from cellattn import MultiGraph, checkpoint

from .test_engine import assert_close, mlp, trained, transformer
from .test_train import EPOCHS, assert_same_runs, folder_of, tiny_cell, train_tiny

pytestmark = pytest.mark.xdist_group("processes")  # they start others and watch the clock: one at a time

ROOT = Path(__file__).parents[2]
LOSS_SECONDS = 30  # in which the others of a lost rank have to end, however busy the machine is

if not dist.is_gloo_available():
    pytest.skip("needs PyTorch with gloo", allow_module_level=True)


def launch(f: Callable[..., None], *args: Any, folder: Path, timeout: float = 60) -> list[ForkServerProcess]:
    """f(*args) on two ranks, as torchrun would start them; rank r that fails leaves `error{r}` in the folder."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.training.runs", "torch._dynamo"])
    ranks = [context.Process(target=_rank, args=(r, port, f, args, folder, timeout), daemon=True) for r in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def _rank(rank: int, port: int, f: Callable[..., None], args: tuple[Any, ...], folder: Path, timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with distributed("cpu", timeout=timeout):
            f(*args)
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)


def run_two(f: Callable[..., None], *args: Any, folder: Path) -> None:
    ranks = launch(f, *args, folder=folder)
    for rank in ranks:
        rank.join(120)
        rank.kill()
    errors = "\n".join(path.read_text() for path in folder.glob("error*"))
    assert [rank.exitcode for rank in ranks] == [0, 0], errors


# ------------------------------------------------------------------------------------------------------- the same losses


def rows(graph: MultiGraph, device: torch.device) -> tuple[nn.Module, Forward]:
    """Draws rows of the graphs, which all ranks have to agree on."""
    return transformer(graph, device, sampled_rows=0.3)


RUNS: dict[str, Callable[[], Any]] = {
    "transformer": trained,
    "pair MLP": functools.partial(trained, mlp),
    "unequal shares": functools.partial(trained, samples=torch.arange(11)),
    "a rank without samples": functools.partial(trained, samples=torch.arange(1)),
    "sampled rows": functools.partial(trained, rows, seed=3),
    "passes": functools.partial(trained, rows, seed=3, samples=torch.arange(11), execution=Execution(accumulate=2)),
}


def exchange() -> None:
    rank = dist.get_rank()
    values = [torch.full((3,), 1.0 + rank), torch.tensor(2.0 + rank, dtype=torch.float64), torch.tensor([[4.0 * rank]])]
    sum_over_ranks(values)
    assert [value.tolist() for value in values] == [[3.0, 3.0, 3.0], 5.0, [[4.0]]]
    assert from_main(lambda: {"rank": rank}) == {"rank": 0}
    assert is_main() == (rank == 0)
    ((mine, weight),) = shares(torch.arange(5))
    assert (mine.tolist(), weight) == [([0, 1, 2], 0.6), ([3, 4], 0.4)][rank]


def train_all(folder: Path) -> None:
    exchange()
    for name, run in RUNS.items():
        torch.save(run(), folder / f"{name} {dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_two(train_all, folder, folder=folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_one_process(name: str, results: Path) -> None:
    first, second = (torch.load(results / f"{name} {rank}.pt", weights_only=True) for rank in range(2))
    assert first[0] == second[0]  # both know the losses of the whole batch
    for key, value in first[1].items():
        assert torch.equal(value, second[1][key]), key  # and have the same weights, to the last bit
    assert_close(first, RUNS[name]())


def test_one_process_is_one_rank() -> None:
    with distributed("cpu") as device:
        assert device == torch.device("cpu")
        value = torch.ones(2)
        sum_over_ranks([value])
        assert value.tolist() == [1, 1]
        assert is_main()
        assert [share.samples.tolist() for share in shares(torch.arange(5), passes=2)] == [[0, 1, 2], [3, 4]]
        assert [share.weight for share in shares(torch.arange(1), passes=2)] == [1.0]


# ------------------------------------------------------------------------------------------------------- a lost rank


def train_each(*outs: Path) -> None:
    for out in outs:
        train_tiny(tiny_cell(), out)


def train_and_kill(out: Path) -> None:
    """As `train_each`, but rank 0 kills rank 1 once it has written three checkpoints."""
    pids = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    written = 0

    def save_and_kill(*args: Any, **kwargs: Any) -> None:
        nonlocal written
        checkpoint.save(*args, **kwargs)
        written += 1
        if written == 3:
            os.kill(pids[1], signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", save_and_kill)
        train_each(out)


@pytest.mark.exhaustive  # test_train.py kills one process, and the next test a rank that hangs
def test_kill(tmp_path: Path) -> None:
    """kill -9 of one rank: the other says so and ends; started again, both end as if nothing had happened."""
    killed, expected = tmp_path / "killed", tmp_path / "expected"
    ranks = launch(train_and_kill, killed, folder=tmp_path / "errors")
    ranks[1].join(120)
    assert ranks[1].exitcode == -signal.SIGKILL
    ranks[0].join(LOSS_SECONDS)
    assert ranks[0].exitcode == 1, "still waiting for a rank that is gone"
    error = (tmp_path / "errors" / "error0").read_text()
    assert "rank 0 of 2: another rank has ended or did not answer in time" in error
    assert "the run goes on from its last checkpoint" in error
    assert not (folder_of(killed) / "result.json").exists()
    run_two(train_each, killed, expected, folder=tmp_path / "again")
    assert_same_runs(killed, expected)
    assert len((folder_of(killed) / "metrics.jsonl").read_text().splitlines()) == EPOCHS


def add_up(folder: Path) -> None:
    value: Tensor = torch.ones(1)
    while True:
        sum_over_ranks([value])
        (folder / "going").touch()


def test_a_rank_that_hangs_is_noticed(tmp_path: Path) -> None:
    ranks = launch(add_up, tmp_path, folder=tmp_path, timeout=2)
    while not (tmp_path / "going").exists():
        assert all(rank.is_alive() for rank in ranks), "ended too early"
        time.sleep(0.01)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGSTOP)
    ranks[0].join(LOSS_SECONDS)
    ranks[1].kill()
    assert ranks[0].exitcode == 1
    assert "another rank has ended or did not answer in time" in (tmp_path / "error0").read_text()


# ------------------------------------------------------------------------------------------------------- torchrun


def test_torchrun(tmp_path: Path) -> None:
    """The command line on two ranks: one set of results, the ridge's those of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks.train", "--device", "cpu", "--out", os.fspath(tmp_path / "two"), "--seeds", "0"]
    command += ["--variants", "ridge", "mlp", "--split", "source", "--epochs", "1", "--accumulate", "2", "--autocast", "bf16"]
    env = {**os.environ, "CELLATTN_DATA": os.fspath(tmp_path), "OMP_NUM_THREADS": "1"}  # no tables there: the synthetic cell
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| additive ridge |") == 1  # one rank speaks
    two = {row["variant"]: row for row in csv.DictReader((tmp_path / "two" / "training.csv").open())}
    cell = load_cell(None)
    (one,) = runs.run(cell=cell, out=tmp_path / "one", results=tmp_path, seeds=[0], variants=["ridge"])["runs"]
    assert float(two["ridge"]["test_pearson"]) == pytest.approx(one["test"]["pearson"], rel=1e-9)
    assert float(two["mlp"]["test_pearson"]) > 0
    (path,) = (tmp_path / "two").glob("mlp-*/metrics.jsonl")
    assert json.loads(path.read_text())["step"] == -(-len(cell.train) // 256)
