"""The training engine on one process: passes, autocast, compilation, costs, and the largest batch."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.methods import largest
from benchmarks.methods.largest import Try, is_out_of_memory, largest_batch
from benchmarks.methods.registry import METHODS, Method, method_of
from benchmarks.methods.workload import Workload, random_mutants, time_steps
from benchmarks.training.baselines import pair_mlp
from benchmarks.training.engine import Execution, Forward, Trainer, _Captured, mean_squared_error, pad
from cellattn import MultiGraph
from cellattn.data import PERTURBATION_TYPES, PerturbationDataset, synthetic_cell
from cellattn.nn import CellOutput, CellTransformer

GRAPH = synthetic_cell(seed=0, num_genes=60, symmetrize=True, self_loops=False)
SAMPLES = torch.arange(12)

pytestmark = pytest.mark.usefixtures("one_thread")


def transformer(graph: MultiGraph, device: torch.device, **options: Any) -> tuple[nn.Module, Forward]:
    """One layer, four ties, no dropout unless asked for."""
    ties = [(0, head, relation, 0.5) for head, relation in enumerate(graph.relations[:4])]
    options = {"dropout": 0.0, "ffn_dim": 16, "ties": ties, **options}
    model = CellTransformer(16, 1, 4, num_types=len(PERTURBATION_TYPES), num_genes=graph.num_nodes, **options)
    return model.to(device), lambda model, batch: model(graph, batch.seeds, batch.ptr, batch.types)


def mlp(graph: MultiGraph, device: torch.device) -> tuple[nn.Module, Forward]:
    model, forward = pair_mlp(graph, device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, forward


BUILDERS: dict[str, Callable[..., tuple[nn.Module, Forward]]] = {"cell-transformer": transformer, "pair-mlp": mlp}
by_model = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


def mutants(num_samples: int = 40) -> PerturbationDataset:
    return random_mutants(GRAPH.num_nodes, num_samples, 2)


def trained(
    build: Callable[..., tuple[nn.Module, Forward]] = transformer,
    steps: int = 3,
    seed: int | None = None,
    samples: Tensor = SAMPLES,
    **options: Any,
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Losses of each step, and the parameters after the last."""
    torch.manual_seed(0)
    model, forward = build(GRAPH, torch.device("cpu"))
    # plain descent: a step is as exact as its gradient
    trainer = Trainer(model, forward, torch.optim.SGD(model.parameters(), lr=0.1), clip=1.0, **options)
    data = mutants()
    losses = [trainer.step(data, samples + step, seed=None if seed is None else seed + step).tolist() for step in range(steps)]
    return losses, {name: value.detach() for name, value in model.named_parameters()}


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Float32 sums in another order: 1e-5 is 170 roundings, of three steps of at most 0.1 each (a clipped gradient)."""
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(want[0]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], want[1], rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------- steps


@by_model
def test_step_is_a_step_of_descent(build: Any) -> None:
    """Against the loop anybody would write, bit for bit."""
    losses, parameters = trained(build)
    torch.manual_seed(0)
    model, forward = build(GRAPH, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, (loss, regularization) in enumerate(losses):
        batch = mutants().__getitems__((SAMPLES + step).tolist())
        output = forward(model, batch)
        error = (output.prediction[:, 0] - batch.y).square().mean()
        assert (error.item(), output.regularization.item()) == pytest.approx((loss, regularization), rel=1e-6)
        optimizer.zero_grad()
        nn.functional.mse_loss(output.prediction[:, 0], batch.y).add(output.regularization).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, value in model.named_parameters():
        assert torch.equal(parameters[name], value), name


@by_model
@pytest.mark.parametrize("passes", [2, 5, 20], ids="{}-passes".format)
def test_accumulation_is_one_batch(passes: int, build: Any) -> None:
    """12 samples in passes of 6, of 3 and 2, or of 1."""
    assert_close(trained(build, execution=Execution(accumulate=passes)), trained(build))


def test_accumulation_draws_the_same_rows() -> None:
    """Rows are of the cell, encoded once a step: with a seed they do not depend on the number of passes."""

    def build(graph: MultiGraph, device: torch.device) -> tuple[nn.Module, Forward]:
        return transformer(graph, device, sampled_rows=0.3)

    whole = trained(build, seed=7)
    assert_close(trained(build, seed=7, execution=Execution(accumulate=3)), whole)
    assert trained(build, seed=8)[0] != whole[0]
    assert trained(build, seed=7)[0] == whole[0]


@by_model
def test_autocast(build: Any) -> None:
    got, want = trained(build, execution=Execution(autocast="bf16")), trained(build)
    assert got[0] != want[0]
    assert_close(got, want, tolerance=0.03)  # a few steps, products in bfloat16: 2^-8 each
    assert all(value.dtype == torch.float32 for value in got[1].values())


def test_compile() -> None:
    torch.compiler.reset()
    assert_close(trained(execution=Execution(compile="aot_eager")), trained())


def test_several_phenotypes() -> None:
    y = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert float(mean_squared_error(torch.zeros(2, 2), y)) == (1 + 4 + 9 + 25) / 4
    assert mean_squared_error(torch.zeros(2, 1, dtype=torch.bfloat16), y[:, 0]).dtype == torch.float32
    with pytest.raises(RuntimeError, match="shape"):
        mean_squared_error(torch.zeros(2, 1), y)


def test_ranges() -> None:
    """The names by which a step is read in a profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        trained(steps=1)
    names = {event.key for event in profiled.key_averages()}
    assert names >= {"loading", "transfer", "encoder", "head", "losses", "backward", "optimizer"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph: expected device 'cuda', where CUDA graphs are, got 'cpu'"),
        ({"autocast": "fp16"}, "autocast: expected one of bf16, or None, got 'fp16'"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
    ],
    ids=["cuda graph on a CPU", "fp16", "no pass"],
)
def test_bad_execution(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Execution(**options)


@pytest.mark.parametrize("num_entries", [24, 40, 24 + 3 * 60 + 1], ids="{}-entries".format)
def test_padding_changes_nothing(num_entries: int) -> None:
    """What a CUDA graph computes on: further sets behind the batch's own, as many for every batch of a size."""
    model, forward = transformer(GRAPH, torch.device("cpu"))
    data = PerturbationDataset.from_sets([[3, 5]] * 6 + [[1], [], [2, 4, 6]] * 4, torch.zeros(18), num_genes=60)
    batches = [data.__getitems__(range(n, n + 12)) for n in (0, 6)]
    for batch in batches:
        padded = pad(batch, num_entries, GRAPH.num_nodes)
        assert len(padded.seeds) == len(padded.types) == int(padded.ptr[-1]) == num_entries
        assert len(padded) == 12 + -(-num_entries // GRAPH.num_nodes)
        got, want = forward(model, padded), forward(model, batch)
        # sums over the same numbers, in blocks of another size
        torch.testing.assert_close(got.prediction[:12], want.prediction, rtol=1e-5, atol=1e-6)
        assert torch.equal(got.regularization, want.regularization)
    with pytest.raises(ValueError, match="batch: expected at most 9 entries, got 20"):
        pad(batches[0], 9, GRAPH.num_nodes)


@pytest.mark.parametrize("passes", [1, 2], ids="{}-passes".format)
def test_replayed_passes_are_passes(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a captured step but its capture, which needs a GPU: inputs, weights and gradients that stay where they are."""

    def stand_in(self: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        run()
        losses = run()
        return losses, lambda: replays.append(losses.copy_(run()))

    monkeypatch.setattr(_Captured, "_capture", stand_in)
    replays: list[Tensor] = []
    graphs, eager = (Execution(accumulate=passes) for _ in range(2))
    object.__setattr__(graphs, "cuda_graph", True)  # which it refuses on a CPU
    sizes = [6 * passes, 6 * passes, 5 * passes, 6 * passes]  # a pass of 5 is not replayed
    sets = [[gene % 60 for gene in range(n, n + n % 4)] for n in range(len(SAMPLES) * 4)]
    data = PerturbationDataset.from_sets(sets, torch.randn(len(sets)), num_genes=60)
    results = []
    for execution in (graphs, eager):
        torch.manual_seed(0)
        model, forward = transformer(GRAPH, torch.device("cpu"), sampled_rows=0.5)
        trainer = Trainer(model, forward, torch.optim.SGD(model.parameters(), lr=0.1), execution=execution, clip=1.0)
        losses = [trainer.step(data, torch.arange(size) + step, seed=step).tolist() for step, size in enumerate(sizes)]
        results.append((losses, {name: value.detach() for name, value in model.named_parameters()}))
    assert len(replays) == 3 * passes
    assert_close(results[0], results[1])


# ------------------------------------------------------------------------------------------------------- what it costs


def test_methods() -> None:
    for name, method in METHODS.items():
        assert method_of(name) is method
    assert method_of("tests.benchmarks.test_engine:HUNGRY") is not None
    with pytest.raises(ValueError, match=r"method: expected one of .*, cell-transformer, .*, got 'no such'"):
        method_of("no such")


@pytest.mark.parametrize("set_size", [0, 1, 2, 60], ids="{}-genes".format)
def test_random_mutants(set_size: int) -> None:
    data = random_mutants(60, 50, set_size)  # which refuses a gene twice in a set
    assert data.ptr.diff().tolist() == [set_size] * 50
    assert len(set(map(tuple, data.seeds.view(50, set_size).tolist()))) > 25 or set_size in (0, 60)


@pytest.mark.parametrize("method", ["cell-transformer", "pair-mlp"])
def test_time_steps(method: str) -> None:
    trainer, data = Workload(method, genes=60).make(30)
    before = copy.deepcopy(trainer.model.state_dict())
    times = time_steps(trainer, data, 8, steps=4, warmup=1)
    for phase in ("loading", "model", "optimizer", "step"):
        assert 0 < times[phase]["q20"] <= times[phase]["median"] <= times[phase]["q80"]
    assert times["model"]["median"] < times["step"]["median"]
    assert times["samples_per_second"] == pytest.approx(8 * times["steps_per_second"])
    assert times["batch_bytes"] == 8 * (16 + 9 + 16) + 4 * 8  # seeds, ptr and types; y
    assert times["peak_bytes"] >= 0
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


class _Hungry(nn.Module):
    """Takes 200 MB a sample, or fails in another way."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails, self.weight = fails, nn.Parameter(torch.zeros(()))

    def forward(self, num_sets: int) -> CellOutput:
        if self.fails:
            raise KeyError("no food")
        held = torch.ones(num_sets, 50 * 2**20)
        return CellOutput(held[:, :1] * self.weight, {}, torch.zeros(()))


HUNGRY = Method("hungry", lambda graph, device: (_Hungry(False), lambda model, batch: model(len(batch))))
FAILING = Method("failing", lambda graph, device: (_Hungry(True), lambda model, batch: model(len(batch))))


def test_largest_batch() -> None:
    """A process takes 0.3 to 0.4 GB before its first sample, and 0.2 GB a sample: 1.1 GB are enough for 3, or nearly so."""
    found = largest_batch(Workload("tests.benchmarks.test_engine:HUNGRY", genes=60), cap=64, budget=1_100_000_000)
    assert found.batch_size in (2, 3)
    assert found.limit == found.batch_size + 1
    assert [one.batch_size for one in found.tries] == [1, 2, 4, 3]
    assert [one.batch_size for one in found.tries if one.fits] == list(range(1, found.batch_size + 1))
    assert found.peak_bytes is not None
    assert found.batch_size * 200 * 2**20 < found.peak_bytes <= 1_200_000_000  # watched every 2 ms


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (KeyError("out of memory"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_is_out_of_memory(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) is memory


@pytest.mark.parametrize(
    ("room", "first", "cap", "resolution", "found", "limit", "tried"),
    [
        (10**9, 1, 1, 0.05, 1, None, [1]),
        (10**9, 1, 6, 0.05, 6, None, [1, 2, 4, 6]),
        (0, 1, 64, 0.05, 0, 1, [1]),
        (11, 1, 64, 0.05, 11, 12, [1, 2, 4, 8, 16, 12, 10, 11]),
        (11, 1, 64, 0.5, 8, 12, [1, 2, 4, 8, 16, 12]),
        (11, 1, 12, 0.05, 11, 12, [1, 2, 4, 8, 12, 10, 11]),
        (11, 5, 64, 0.05, 11, 12, [5, 10, 20, 15, 12, 11]),
        (11, 28, 64, 0.05, 11, 12, [28, 14, 7, 10, 12, 11]),
        (11, 28, 8, 0.05, 8, None, [8]),
    ],
    ids=["cap 1", "cap 6", "nothing fits", "11", "11 roughly", "cap above", "from 5", "from above", "cap below first"],
)
def test_search(
    room: int,
    first: int,
    cap: int,
    resolution: float,
    found: int,
    limit: int | None,
    tried: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attempt(work: Workload, batch_size: int, *rest: Any) -> Try:
        return Try(batch_size, batch_size <= room, 100 * batch_size if batch_size <= room else None)

    monkeypatch.setattr(largest, "_try_apart", attempt)
    result = largest._search(
        Workload("pair-mlp"), first=first, cap=cap, budget=None, resolution=resolution, timeout=1, threads=1
    )
    assert (result.batch_size, result.limit) == (found, limit)
    assert result.peak_bytes == (100 * found or None)
    assert [one.batch_size for one in result.tries] == tried


def test_other_failures_are_errors() -> None:
    work = Workload("tests.benchmarks.test_engine:FAILING", genes=60)
    with pytest.raises(RuntimeError, match=r"FAILING, batch of 1: Traceback(.|\n)*KeyError: 'no food'"):
        largest_batch(work, cap=4, budget=2_000_000_000)
    with pytest.raises(ValueError, match="budget: expected bytes, since a CPU's memory is the machine's, got None"):
        largest_batch(work, cap=4)
    with pytest.raises(ValueError, match="cap: expected at least 1, got 0"):
        largest_batch(work, cap=0, budget=1)
