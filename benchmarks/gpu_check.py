"""What only a GPU can say about the kernels, in one command that needs no network.

    python -m benchmarks.gpu_check --out FOLDER [--full]

In this order: every op, its gradients included, against float64 at the size of a cell, with at most twice the error of eager
PyTorch of the same dtype; bit-equal repeats; a CUDA graph that replays bit-equal to eager; the k-hop ops bit for bit against
the CPU, captured too; every model of the report against float64; the tests in `tests/cuda`, where pytest is installed;
compute-sanitizer on small shapes, where that is; then `benchmarks.bench_attention`, `benchmarks.bench_methods` and
`benchmarks.bench_khop`, each in its share of nine minutes in all, or with `--full`, however long it takes,
`benchmarks.report --full`. FOLDER gets `gpu_check.json`, `gpu_check.txt`, and what the benchmarks wrote. Exit status: 0 if
every check passed, 1 if one failed, 2 without a GPU. The k-hop ops and some models need the extension:
`python setup.py build_ext --inplace`, here or, with nvcc, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, SubgraphBatch, reference
from cellattn.data import synthetic_cell
from cellattn.graph import SEGMENT
from cellattn.nn.wildtype import Genes

from .engine import random_mutants
from .measure import environment, results_dir
from .methods import METHODS

ROOT = Path(__file__).parents[1]
SECONDS = 9 * 60  # without --full
TESTS_SECONDS = 120
SANITIZER_SECONDS = 60  # a tool
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Ours may have twice the error of eager PyTorch of the same dtype, and this much of the largest entry where eager is exact.
MAX_RATIO, SMALL = 2.0, {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

MODEL_SMALL = 1e-4  # of a model's largest prediction, or a parameter's largest gradient, through several layers in float32


@dataclass(frozen=True)
class Case:
    """An op on `inputs` (shapes); `exact` is the same op of `cellattn.reference`, None where it draws at random."""

    name: str
    inputs: tuple[tuple[int, ...], ...]
    ours: Callable[..., tuple[Tensor, ...]]
    exact: Callable[..., tuple[Tensor, ...]] | None


KHOP = Case("k-hop ops", (), lambda: (), None)  # what a check that raises is reported under


@dataclass(frozen=True)
class Result:
    """One line of the report; `passed` is None for what could not be looked at here."""

    check: str
    case: str
    passed: bool | None
    detail: str


def cell(num_nodes: int, *, device: torch.device, seed: int = 0) -> MultiGraph:
    """Two relations whose degrees are heavy-tailed, each with rows that have no edge: 60 and 2 edges a gene in the mean.

    Of 6,607 genes the "dense" one has 27 rows and 26 columns that `row_dot` cuts.
    """
    g = torch.Generator().manual_seed(seed)
    popularity = torch.rand(num_nodes, generator=g).add(1e-3).reciprocal()
    popularity[torch.randperm(num_nodes, generator=g)[: num_nodes // 10]] = 0
    edges = {
        name: torch.multinomial(popularity, 2 * mean * num_nodes, replacement=True, generator=g).reshape(2, -1)
        for name, mean in (("dense", 60), ("sparse", 2))
    }
    return MultiGraph.from_edge_index(edges, num_nodes).to(device)


def both(name: str, *inputs: tuple[int, ...], f: Callable[..., Any]) -> Case:
    """f(module, *inputs) of `cellattn` and of `cellattn.reference`."""

    def of(module: Any) -> Callable[..., tuple[Tensor, ...]]:
        def run(*x: Tensor) -> tuple[Tensor, ...]:
            y = f(module, *x)
            return y if isinstance(y, tuple) else (y,)

        return run

    return Case(name, inputs, of(cellattn), of(reference))


def cases(graph: MultiGraph) -> Iterator[Case]:
    """Every op, at the graph's size."""
    n, device = graph.num_nodes, graph.device
    t = n + 1
    rows = torch.arange(0, n, 10, device=device)
    ties = [("dense", 0), ("sparse", 1), ("dense", 1)]

    for d in (20, 64):
        head = ((2, t, d),) * 2
        yield both(f"attention D{d}", *head, (2, t, d), f=lambda m, q, k, v: m.attention(q, k, v))
        yield both(f"attention_logsumexp D{d}", *head, f=lambda m, q, k: m.attention_logsumexp(q, k))
    pair = ((t, 20),) * 2
    yield both("attention D100 Dv30", (1, t, 100), (1, t, 100), (1, t, 30), f=lambda m, q, k, v: m.attention(q, k, v))
    yield both("attention_kl", *pair, f=lambda m, q, k: m.attention_kl(q, k, graph, "dense", num_prefix=1))
    yield both("attention_kl rows", *pair, f=lambda m, q, k: m.attention_kl(q, k, graph, "sparse", num_prefix=1, rows=rows))
    hubs = torch.cat([graph.degree("dense").argsort(descending=True, stable=True)[:40], rows])
    yield both(
        "attention_kl rows, hubs first", *pair,
        f=lambda m, q, k: m.attention_kl(q, k, graph, "dense", num_prefix=1, rows=hubs),
    )  # fmt: skip
    yield both("attention_kl valid", *pair, f=lambda m, q, k: m.attention_kl(q, k, graph, "dense", num_prefix=1, over="valid"))
    for link, target in (("softmax", "normalized"), ("softmax", "binary"), ("sigmoid", "binary")):
        yield both(
            f"attention_bce {link} {target}", *pair,
            f=lambda m, q, k, link=link, target=target: m.attention_bce(
                q, k, graph, "dense", num_prefix=1, link=link, target=target
            ),
        )  # fmt: skip
    yield both("attention_bce rows", *pair, f=lambda m, q, k: m.attention_bce(q, k, graph, "sparse", num_prefix=1, rows=rows))
    yield Case(
        "attention_bce drawn",
        pair,
        lambda q, k: (cellattn.attention_bce(q, k, graph, "dense", num_prefix=1, num_negatives=20),),
        None,
    )
    yield both(
        "graph_attention, three ties", *((2, t, 20),) * 3,
        f=lambda m, q, k, v: (lambda out, losses: (out, *losses))(*m.graph_attention(q, k, v, graph, ties)),
    )  # fmt: skip
    sets, size = 64, 3
    g = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(n, generator=g)[:size] for _ in range(sets)]).flatten().to(device)
    ptr = size * torch.arange(sets + 1, device=device)
    yield both(
        "perturbation_attention", (sets, 64), (n, 64), (n, 64), (sets * size, 64),
        f=lambda m, q, k, v, u: m.perturbation_attention(q, k, v, index, ptr, u, scale=0.125),
    )  # fmt: skip

    keep = torch.rand(sets, n, generator=g).to(device) < 0.6
    for reduce, shape in (("sum", (n, 64)), ("mean", (sets, n, 20))):
        yield both(
            f"masked_spmm {reduce}", shape,
            f=lambda m, x, reduce=reduce: m.masked_spmm(graph, "dense", x, keep, reduce=reduce),
        )  # fmt: skip
    few = torch.zeros_like(keep[:4])
    few[torch.arange(len(index), device=device) % len(few), index] = True
    between = (*Genes.of(few), *Genes.of(keep[: len(few)]))
    places = int(few.sum())
    scale = torch.rand(int(keep[: len(few)].sum()), 2, generator=g).to(device)
    yield both(
        "relational_spmm", (places, 2, 20),
        f=lambda m, x: m.relational_spmm(graph, x, *between, scale=scale),
    )  # fmt: skip
    yield both(
        "relational_spmm, shared, by relation", (n, 64),
        f=lambda m, x: m.relational_spmm(graph, x, *between, sum_relations=False, shared=True),
    )  # fmt: skip
    yield both(
        "network_mse", (n, 64), (n, 64), (n,),
        f=lambda m, z, weight, bias: m.network_mse(z, weight, bias, graph, "dense"),
    )  # fmt: skip


def hub_cases(device: torch.device) -> Iterator[Case]:
    """A row and a column just long enough to be cut, in a small graph: the row chosen, left out, and with all others."""
    everyone = torch.arange(SEGMENT + 1)
    hub = torch.stack([torch.zeros_like(everyone), everyone])
    graph = MultiGraph.from_edge_index({"hub": hub}, everyone.numel(), undirected=True).to(device)
    pair = ((everyone.numel() + 1, 20),) * 2
    for name, chosen in (("chosen", torch.tensor([3, 0, 0])), ("left out", torch.tensor([3, 4])), ("with all", None)):
        rows = None if chosen is None else chosen.to(device)
        yield both(
            f"attention_kl, a hub {name}", *pair,
            f=lambda m, q, k, rows=rows: m.attention_kl(q, k, graph, "hub", num_prefix=1, rows=rows),
        )  # fmt: skip


def random_sets(num_sets: int, num_nodes: int, *, device: torch.device | str, seed: int = 3) -> tuple[Tensor, Tensor]:
    """(seeds, ptr) of sets of 0 to 4 genes, some twice in a set."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 5, (num_sets,), generator=g)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return torch.randint(num_nodes, (int(ptr[-1]),), generator=g).to(device), ptr.to(device)


def tensors_of(batch: SubgraphBatch) -> list[Tensor]:
    """All that a batch holds, in a fixed order."""
    by_relation = [batch.edge_index] if batch.layout == "coo" else [batch.rowptr, batch.col]
    by_relation += [batch.edge_ptr, *([] if batch.edge_id is None else [batch.edge_id])]
    named = [x for each in by_relation for x in each.values()]
    return [x.cpu() for x in (batch.node, batch.node_ptr, batch.seed_mask, batch.overflow, *named)]


def khop(graph: MultiGraph) -> Iterator[Result]:
    """Masks and subgraphs on the GPU against those of the CPU, bit for bit."""
    on_cpu = graph.to("cpu")
    for num_sets in (1, 28, 65, 300):
        here, there = (random_sets(num_sets, graph.num_nodes, device=x.device) for x in (graph, on_cpu))
        for hops, traversal, direction in ((1, "per_relation", "in"), (2, "mixed", "out"), (3, "per_relation", "both")):
            how: dict[str, Any] = {"traversal": traversal, "direction": direction}
            masks = [cellattn.khop_mask(x, *sets, hops, **how).cpu() for x, sets in ((graph, here), (on_cpu, there))]
            name = f"{num_sets} sets, {hops} hops, {traversal}, {direction}"
            yield Result("k-hop", f"khop_mask, {name}", torch.equal(*masks), f"{int(masks[1].sum())} genes")
            if num_sets > 65:
                continue  # their subgraphs would not fit the CPU's memory
            for layout, dtype in (("coo", torch.int64), ("csr", torch.int32)):
                options = {**how, "layout": layout, "index_dtype": dtype, "drop_seeds": layout == "csr"}
                a, b = (cellattn.khop_subgraph(x, *sets, hops, **options) for x, sets in ((graph, here), (on_cpu, there)))
                same = equal(tensors_of(a), tensors_of(b))
                yield Result("k-hop", f"khop_subgraph, {name}, {layout}, {dtype}", same, f"{b.num_edges()} edges")
        pairs = [cellattn.perturbation_mask(x, *sets) for x, sets in ((graph, here), (on_cpu, there))]
        on_gpu, wanted = ([nodes.cpu(), *(edges[r].cpu() for r in graph.relations)] for nodes, edges in pairs)
        same = equal(on_gpu, wanted)
        yield Result("k-hop", f"perturbation_mask, {num_sets} sets", same, "nodes and edges")


def khop_capture(graph: MultiGraph) -> Iterator[Result]:
    """Extraction with capacities as a CUDA graph, replayed on other sets, once with too little room."""
    draws = [random_sets(28, graph.num_nodes, device=graph.device, seed=seed) for seed in (4, 5)]
    most = max(sets[0].numel() for sets in draws)
    seeds, ptr = torch.zeros(most, dtype=torch.int64, device=graph.device), torch.zeros_like(draws[0][1])

    def load(sets: tuple[Tensor, Tensor]) -> None:
        """The last set takes the padding too: gene 0, several times, which counts once."""
        seeds.zero_()[: sets[0].numel()] = sets[0]
        ptr.copy_(sets[1])
        ptr[-1] = most

    sizes = []
    for sets in draws:
        load(sets)
        batch = cellattn.khop_subgraph(graph, seeds, ptr, 1)
        sizes.append((batch.num_nodes, max(batch.num_edges(relation) for relation in graph.relations)))
    enough = [max(size) for size in zip(*sizes, strict=True)]
    for name, (nodes, edges) in (("room for all", enough), ("too little room", (enough[0] // 2, enough[1] // 2))):
        extract = functools.partial(cellattn.khop_subgraph, graph, seeds, ptr, 1, max_nodes=nodes, max_edges=edges)
        load(draws[0])
        extract()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            batch = extract()
        same, overflow = [], []
        for sets in (draws[1], draws[0]):
            load(sets)
            captured.replay()
            overflow.append(bool(batch.overflow))
            want = extract()
            same.append(equal(tensors_of(batch), tensors_of(want)))
        right = overflow == [name == "too little room"] * 2
        yield Result("cuda graph", f"khop_subgraph, {name}", all(same) and right, f"overflow {overflow}, equal {same}")


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=g).to(device, dtype) for shape in case.inputs]


def step(f: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of their weighted sum."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = f(*inputs)
    total = torch.stack([(i + 1) * y.float().square().sum() for i, y in enumerate(outputs)]).sum()
    return [*(y.detach() for y in outputs), *torch.autograd.grad(total, inputs)]


def exact_step(f: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """`step` in float64, its weighted sum included."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    outputs = f(*leaves)
    total = torch.stack([(i + 1) * y.square().sum() for i, y in enumerate(outputs)]).sum()
    return [*(y.detach() for y in outputs), *torch.autograd.grad(total, leaves)]


def relative_errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Of each tensor its largest error over its largest entry; NaN for one that holds NaN."""
    return [float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(got, want, strict=True)]


def accuracy(case: Case, device: torch.device) -> Iterator[Result]:
    if case.exact is None:
        return
    for name, dtype in DTYPES.items():
        inputs = inputs_of(case, dtype, device)
        want = exact_step(case.exact, inputs)
        ours, eager = (relative_errors(step(f, inputs), want) for f in (case.ours, case.exact))
        # Eager may overflow where it materialises a map: then only the small term holds.
        passed = all(
            a <= max(MAX_RATIO * b if b == b else 0.0, SMALL[dtype]) for a, b in zip(ours, eager, strict=True)
        )  # fmt: skip
        detail = ", ".join(f"{a:.1e} (eager {b:.1e})" for a, b in zip(ours, eager, strict=True))
        yield Result("accuracy", f"{case.name}, {name}", passed, detail)


def seeded(f: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Random draws, where there are any, are the same in every run."""
    torch.manual_seed(0)
    return f()


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def repeats(case: Case, device: torch.device) -> Iterator[Result]:
    inputs = inputs_of(case, torch.bfloat16, device)
    first = seeded(lambda: step(case.ours, inputs))
    same = [equal(first, seeded(lambda: step(case.ours, inputs))) for _ in range(3)]
    yield Result("repeats", case.name, all(same), f"{sum(same)} of {len(same)} runs bit-equal to the first")


def capture(case: Case, device: torch.device) -> Iterator[Result]:
    """Three steps of gradient descent, captured as one graph and replayed, against the same three in eager."""
    start = [x.float() for x in inputs_of(case, torch.bfloat16, device)]

    def descend(parameters: list[Tensor]) -> None:
        grads = step(case.ours, [x.bfloat16() for x in parameters])[-len(parameters) :]
        for x, grad in zip(parameters, grads, strict=True):
            x.sub_(grad, alpha=1e-3)

    def trained(advance: Callable[[], None], parameters: list[Tensor]) -> list[Tensor]:
        for x, x0 in zip(parameters, start, strict=True):
            x.copy_(x0)
        for _ in range(3):
            advance()
        return [x.clone() for x in parameters]

    parameters = [x.clone() for x in start]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = seeded(lambda: trained(lambda: descend(parameters), parameters))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        descend(parameters)
    replayed = seeded(lambda: trained(graph.replay, parameters))
    moved = not equal(eager, start)
    yield Result(
        "cuda graph", case.name, moved and equal(eager, replayed), "three steps, replayed and eager compared bit by bit"
    )


def sanitizer(small: list[str]) -> Iterator[Result]:
    """Each op once at a small size, in a process of its own under memcheck, racecheck and initcheck."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    tool = next((place for place in places if place and Path(place).is_file()), None)
    for name in ("memcheck", "racecheck", "initcheck"):
        if tool is None:
            yield Result("sanitizer", name, None, "compute-sanitizer is not installed here")
            continue
        # Without PyTorch's pool an access past the end of a tensor leaves its allocation, and is seen.
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [tool, "--tool", name, "--error-exitcode", "1", *small]
        yield elsewhere("sanitizer", name, command, SANITIZER_SECONDS, env=env)[0]


def gpu_tests() -> Result:
    """Those that want a GPU."""
    folder = "tests/cuda"
    if importlib.util.find_spec("pytest") is None:
        return Result("tests", folder, None, "pytest is not installed here")
    return elsewhere("tests", folder, [sys.executable, "-m", "pytest", "-q", folder], TESTS_SECONDS)[0]


def benchmark(name: str, out: Path, *arguments: str, seconds: float | None = None) -> Result:
    """`benchmarks.<name>`, its table, figures and pictures copied to the folder."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    before = time.time()
    result, said = elsewhere("benchmark", name, command, seconds)
    (out / f"{name}.txt").write_text(said)
    for path in results_dir().iterdir():
        if path.stat().st_mtime >= before:
            shutil.copy(path, out / path.name)
    return result


def elsewhere(
    check: str, case: str, command: list[str], seconds: float | None, env: dict[str, str] | None = None
) -> tuple[Result, str]:
    """A command in a process of its own, which passes with exit status 0, and all that it said; killed after `seconds`."""
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as late:
        parts = [part for part in (late.stdout, late.stderr) if part]  # bytes, in most versions of Python
        said = "".join(part.decode(errors="replace") if isinstance(part, bytes) else part for part in parts)
        return Result(check, case, None, f"not finished after {late.timeout:.0f} s"), said
    said = done.stdout + done.stderr
    last = [line.strip()[:200] for line in said.splitlines() if line.strip()][-3:]
    return Result(check, case, done.returncode == 0, f"exit status {done.returncode}: {' / '.join(last)}"), said


def models(device: torch.device, num_genes: int = 2000, num_sets: int = 6) -> Iterator[Result]:
    """Every method of the report, predictions and gradients, against itself in float64 on the CPU; and once more, bit-equal."""
    graph = synthetic_cell(seed=0, num_genes=num_genes)
    data = random_mutants(num_genes, num_sets, 2)
    batch = data.__getitems__(range(num_sets))

    def step(name: str, place: torch.device, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        model, forward = METHODS[name].build(graph.to(place), place)
        model = model.to(dtype).eval()
        output = forward(model, batch.to(place))
        (output.prediction.square().sum() + output.regularization).backward()
        return [x.detach().cpu() for x in (output.prediction, *(p.grad for p in model.parameters() if p.grad is not None))]

    for name in METHODS:
        try:
            want = step(name, torch.device("cpu"), torch.float64)
            ours, again = (step(name, device, torch.float32) for _ in range(2))
            eager = relative_errors(step(name, torch.device("cpu"), torch.float32), want)
            # gradients of softmaxes that cancel to nearly nothing have no digits in float32 anywhere
            errors = list(zip(relative_errors(ours, want), eager, strict=True))
            passed = all(a <= max(10 * b, MODEL_SMALL) for a, b in errors)
            worst, beside = max(errors)
            yield Result("model", name, passed, f"{len(errors)} tensors, worst {worst:.1e} (float32 on the CPU {beside:.1e})")
            yield Result("model repeats", name, equal(ours, again), "predictions and gradients")
        except Exception:
            yield Result("model", name, False, traceback.format_exc(limit=-3))


def guarded(check: Callable[..., Iterator[Result]], name: str, case: Case, device: torch.device) -> Iterator[Result]:
    """A check that raises has failed, and the others go on."""
    try:
        yield from check(case, device)
    except Exception:
        yield Result(name, case.name, False, traceback.format_exc(limit=-3))
    torch.cuda.empty_cache()


def run_small(device: torch.device) -> None:
    """Each op once, forward and backward, for the sanitizer."""
    graph = cell(70, device=device)
    for case in (*cases(graph), *hub_cases(device)):
        step(case.ours, inputs_of(case, torch.float16, device))
    for result in khop(graph):
        print(result)
    torch.cuda.synchronize()


def run(out: Path, *, device: torch.device, full: bool = False) -> list[Result]:
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    about = environment()
    results: list[Result] = []
    with (out / "gpu_check.txt").open("w") as text:

        def report(line: str) -> None:
            print(line, flush=True)
            print(line, file=text, flush=True)

        def add(result: Result) -> None:
            verdict = {True: "pass", False: "FAIL", None: "----"}[result.passed]
            report(f"{verdict}  {result.check}  {result.case}: {result.detail}")
            results.append(result)

        report(", ".join(f"{key} {value}" for key, value in about.items()))
        graph = cell(6607, device=device)
        for case in (*cases(graph), *hub_cases(device)):
            for name, check in (("accuracy", accuracy), ("repeats", repeats), ("cuda graph", capture)):
                for result in guarded(check, name, case, device):
                    add(result)
        for name, several in (("k-hop", khop), ("cuda graph", khop_capture)):
            for result in guarded(lambda *_, several=several: several(graph), name, KHOP, device):
                add(result)
        for result in models(device):
            add(result)
        add(gpu_tests())
        for result in sanitizer([sys.executable, "-m", "benchmarks.gpu_check", "--small"]):
            add(result)
        if full:
            add(benchmark("report", out, "--full"))
        else:
            for name, share in (("bench_attention", 0.45), ("bench_methods", 0.6), ("bench_khop", 1.0)):
                seconds = max(share * (SECONDS - (time.monotonic() - started)), 1.0)
                most = str(int(max(seconds - 40, 1)))
                add(benchmark(name, out, "--device", "cuda", "--seconds", most, seconds=seconds))
        failed = sum(result.passed is False for result in results)
        skipped = sum(result.passed is None for result in results)
        took = time.monotonic() - started
        report(f"{len(results) - failed - skipped} passed, {failed} failed, {skipped} could not be looked at, in {took:.0f} s")
    document = {"environment": about, "seconds": took, "results": [asdict(result) for result in results]}
    (out / "gpu_check.json").write_text(json.dumps(document, indent=1) + "\n")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for the results, made if missing")
    what.add_argument("--small", action="store_true", help="run each op once at a small size, as the sanitizer's target")
    parser.add_argument("--full", action="store_true", help="the whole report in the place of what nine minutes have room for")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: no GPU that this PyTorch can use; nothing was checked")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if arguments.small:
        run_small(device)
        return 0
    return int(any(result.passed is False for result in run(arguments.out, device=device, full=arguments.full)))


if __name__ == "__main__":
    sys.exit(main())
