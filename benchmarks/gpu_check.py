"""What only a GPU can say about the kernels, in one command that needs no network and no git.

    python -m benchmarks.gpu_check --out FOLDER [--only SECTION ...] [--seconds S] [--full]
    python -m benchmarks.gpu_check --plan S

The check is in sections, in the order in which a short time with a GPU is best spent: all kernels compiled, several at a time;
every op, its gradients included, against float64 at the size of a cell, within bounds on what rounding explains
(`tests/bounds.py`), bit-equal repeats, and a CUDA graph that replays bit-equal to eager; the k-hop ops bit for bit against the
CPU, captured too; every model of the report against float64; the tests in `tests/cuda`; `benchmarks.attention`,
`methods` and `khop`; compute-sanitizer on small shapes; and a search for faster tiles. Each section is a process
of its own that ends when its time is up, at most nine minutes, and takes none of the others along. `--plan` says how to deal
them out where a command may take S seconds; with `--seconds` sections are begun only where there is time for them, and the
same command again does what is left. `--full` puts `benchmarks.report --full`, however long it takes, in the place of the
benchmarks.

FOLDER gets each result as soon as there is one, in `results.jsonl` (`benchmarks.sections`), and what the benchmarks and tests
wrote. Exit status: 0 if every check passed, 1 if one failed or did not end, 2 without a GPU. CELLATTN_COMMIT says of which
commit the files are where git does not. The k-hop ops and some models need the extension: `python setup.py build_ext
--inplace`, here or, with nvcc, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, SubgraphBatch, reference
from cellattn.data import synthetic_cell
from cellattn.graph import SEGMENT
from cellattn.nn.wildtype import Subset
from tests.bounds import ratio_to_bound, with_bounds

from .attention.peers import SharedTerms
from .measure import environment
from .methods.registry import METHODS
from .methods.workload import random_mutants
from .processes import end_with_parent
from .sections import Record, Result, Section, command, drive, ended, plan, read

GENES = 6607
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MODEL_SMALL = 1e-4  # of a model's largest prediction, or a parameter's largest gradient, through several layers in float32


@dataclass(frozen=True)
class Case:
    """An op on `inputs` (shapes); `exact` is the same op of `cellattn.reference`, None where it draws at random."""

    name: str
    inputs: tuple[tuple[int, ...], ...]
    ours: Callable[..., tuple[Tensor, ...]]
    exact: Callable[..., tuple[Tensor, ...]] | None


KHOP = Case("k-hop ops", (), lambda: (), None)  # what a check that raises is reported under


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
    typed = SharedTerms.draw(max(n // 2, 1), device).target.graph  # half as many genes, and their terms as tokens
    wide = ((typed.num_nodes + 1, 20),) * 2
    yield both(
        "attention_kl from genes to terms", *wide,
        f=lambda m, q, k: m.attention_kl(q, k, typed, "has", num_prefix=1, over="valid"),
    )  # fmt: skip
    yield both(
        "attention_bce from genes to terms", *wide, f=lambda m, q, k: m.attention_bce(q, k, typed, "has", num_prefix=1)
    )  # fmt: skip
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
    between = tuple(x for subset in Subset.of(few, keep[: len(few)]) for x in subset.genes)
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
    """A row and a column just long enough to be cut, in a small graph; of losses the row chosen, left out, with all."""
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
    # few values: the definition holds those of all pairs
    one = tuple((1, everyone.numel() + 1, width) for width in (20, 20, 2))
    yield both(
        "edge_attention, a hub", *one, (1,),
        f=lambda m, q, k, v, bias: m.edge_attention(q, k, v, graph, [("hub", 0)], edge_bias=bias, weighted=True),
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


def relative_errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Of each tensor its largest error over its largest entry; NaN for one that holds NaN."""
    return [float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(got, want, strict=True)]


def accuracy(case: Case, device: torch.device) -> Iterator[Result]:
    """Each entry of outputs and gradients is as near to float64 as rounding explains."""
    if case.exact is None:
        return
    for name, dtype in DTYPES.items():
        inputs = inputs_of(case, dtype, device)
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = case.ours(*leaves)
        g = torch.Generator().manual_seed(1)
        upstream = [torch.randn(y.shape, generator=g).to(y) for y in outputs]
        got = [y.detach() for y in (*outputs, *torch.autograd.grad(outputs, leaves, upstream))]
        want = with_bounds(case.exact, inputs, upstream)
        shares = [ratio_to_bound(a, b, parts=True) for a, b in zip(got, want, strict=True)]
        errors = relative_errors(got, [b.value for b in want])
        detail = ", ".join(f"{error:.1e} ({share:.2f} of its bound)" for error, share in zip(errors, shares, strict=True))
        yield Result("accuracy", f"{case.name}, {name}", all(share <= 1 for share in shares), detail)


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


def ops(names: Sequence[str], device: torch.device, num_nodes: int = GENES) -> Iterator[Result]:
    """Accuracy, repeats and capture of the cases whose names begin with one of `names`."""
    for case in all_cases(cell(num_nodes, device=device)):
        if case.name.startswith(tuple(names)):
            for name, check in (("accuracy", accuracy), ("repeats", repeats), ("cuda graph", capture)):
                yield from guarded(check, name, case, device)


def all_cases(graph: MultiGraph) -> list[Case]:
    return [*cases(graph), *hub_cases(graph.device)]


def khop_ops(device: torch.device, num_nodes: int = GENES) -> Iterator[Result]:
    graph = cell(num_nodes, device=device)
    for name, several in (("k-hop", khop), ("cuda graph", khop_capture)):
        yield from guarded(lambda *_, several=several: several(graph), name, KHOP, device)


def compiled(device: torch.device, num_nodes: int = GENES) -> Iterator[Result]:
    """Every case once in every dtype, several processes at a time: what they compile, Triton's cache holds for the others."""
    jobs = [(i, dtype) for i in range(len(all_cases(cell(2, device=torch.device("cpu"))))) for dtype in DTYPES]
    workers = min(8, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=end_with_parent) as pool:
        for done in [pool.submit(_compile, i, dtype, device, num_nodes) for i, dtype in jobs]:
            yield done.result()


@functools.cache
def _cases_here(device: torch.device, num_nodes: int) -> list[Case]:
    return all_cases(cell(num_nodes, device=device))


def _compile(i: int, dtype: str, device: torch.device, num_nodes: int) -> Result:
    case = _cases_here(device, num_nodes)[i]
    begun = time.monotonic()
    try:
        step(case.ours, inputs_of(case, DTYPES[dtype], device))
        return Result("compiled", f"{case.name}, {dtype}", True, f"{time.monotonic() - begun:.1f} s")
    except Exception:
        return Result("compiled", f"{case.name}, {dtype}", False, traceback.format_exc(limit=-3))


def run_once(device: torch.device, num_nodes: int) -> None:
    """Each op once, forward and backward, for compute-sanitizer and for the search for tiles."""
    graph = cell(num_nodes, device=device)
    for case in all_cases(graph):
        for dtype in (torch.float16, torch.bfloat16) if num_nodes == GENES else (torch.float16,):
            step(case.ours, inputs_of(case, dtype, device))
    if num_nodes < GENES:
        for result in khop(graph):
            print(result)
    if device.type == "cuda":
        torch.cuda.synchronize()


def sanitizer(tool: str, out: Path) -> Iterator[Result]:
    """Each op once at a small size under a tool of compute-sanitizer."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    program = next((place for place in places if place and Path(place).is_file()), None)
    if program is None:
        yield Result("command", tool, None, "compute-sanitizer is not installed here")
        return
    # Without PyTorch's pool an access past the end of a tensor leaves its allocation, and is seen.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = [sys.executable, "-m", "benchmarks.gpu_check", "--once", "70"]
    yield command([program, "--tool", tool, "--error-exitcode", "1", *small], out / f"{tool}.txt", env=env)


def gpu_tests(out: Path) -> Iterator[Result]:
    """Those that want a GPU."""
    if importlib.util.find_spec("pytest") is None:
        yield Result("command", "tests", None, "pytest is not installed here")
        return
    yield command([sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/cuda"], out / "tests.txt")


def benchmark(name: str, out: Path, *arguments: str) -> Iterator[Result]:
    """`benchmarks.<name>`: its table and figures go to the folder, row by row."""
    env = {**os.environ, "CELLATTN_RESULTS": os.fspath(out)}
    yield command([sys.executable, "-m", f"benchmarks.{name}", *arguments], out / f"{name}.txt", env=env)


def tuning(out: Path) -> Iterator[Result]:
    """The fastest tile beside each on record: lines for `kernels/config.py`."""
    env = {**os.environ, "CELLATTN_AUTOTUNE": "1", "PYTHONUNBUFFERED": "1"}
    yield command([sys.executable, "-m", "benchmarks.gpu_check", "--once", str(GENES)], out / "tuning.txt", env=env)


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _measured(name: str, seconds: float, what: str) -> Section:
    """A benchmark that stops by itself in time to write what it has."""
    most = str(int(seconds - 40))
    return Section(seconds, lambda out: benchmark(name, out, "--device", "cuda", "--seconds", most), what)


LOSSES = ("attention_kl", "attention_bce", "graph_attention", "network_mse")
ATTENTION = ("attention D", "attention_logsumexp", "edge_attention", "perturbation_attention")
PRODUCTS = ("masked_spmm", "relational_spmm")
# In the order of their worth; the first seven fit nine minutes twice, all but the last three fit it three times.
SECTIONS: dict[str, Section] = {
    "compile": Section(120, lambda out: compiled(_gpu()), "every kernel of every op, several at a time"),
    "attention": Section(110, lambda out: ops(ATTENTION, _gpu()), "accuracy, repeats, CUDA graphs of attention"),
    "losses": Section(200, lambda out: ops(LOSSES, _gpu()), "likewise of the losses, hubs included"),
    "products": Section(100, lambda out: ops(PRODUCTS, _gpu()), "likewise of products with the graph"),
    "khop": Section(80, lambda out: khop_ops(_gpu()), "k-hop against the CPU, bit for bit"),
    "models": Section(120, lambda out: models(_gpu()), "every model against float64"),
    "tests": Section(90, gpu_tests, "tests/cuda"),
    "attention-speed": _measured("attention", 240, "the attention ops against their peers"),
    "methods-speed": _measured("methods", 270, "every method's training step"),
    "khop-speed": _measured("khop", 130, "k-hop against its peers"),
    "memcheck": Section(130, lambda out: sanitizer("memcheck", out), "accesses out of bounds"),
    "racecheck": Section(130, lambda out: sanitizer("racecheck", out), "races in shared memory"),
    "initcheck": Section(130, lambda out: sanitizer("initcheck", out), "reads of memory that nothing wrote"),
    "tuning": Section(270, tuning, "faster tiles, for kernels/config.py"),
    "report": Section(math.inf, lambda out: benchmark("report", out, "--full"), "the whole report"),
}
BENCHMARKS = {"attention-speed", "methods-speed", "khop-speed"}


def summary(records: Sequence[Record]) -> str:
    """Counts, and each line that did not pass."""
    lines = [str(record) for record in records if not record.result.passed]
    failed = sum(record.result.passed is False for record in records)
    skipped = sum(record.result.passed is None for record in records)
    counts = f"{len(records) - failed - skipped} passed, {failed} failed, {skipped} not looked at or not finished"
    return "\n".join([*lines, counts])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for the results, made if missing")
    what.add_argument("--plan", type=float, metavar="S", help="print commands of at most S seconds that are the whole check")
    what.add_argument("--once", type=int, metavar="GENES", help="run each op once, as the target of other tools")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, help="begin no section that could take longer than what is left of these")
    parser.add_argument("--again", action="store_true", help="sections too that the folder holds the end of")
    parser.add_argument("--full", action="store_true", help="the whole report in the place of the benchmarks")
    given = parser.parse_args()
    left_out = BENCHMARKS if given.full else {"report"}
    names = given.only or [name for name in SECTIONS if name not in left_out]
    if given.plan is not None:
        for part in plan({name: SECTIONS[name] for name in names}, given.plan):
            print(f"python -m benchmarks.gpu_check --out FOLDER --only {' '.join(part)}")
        return 0
    if not torch.cuda.is_available():
        print("gpu_check: no GPU that this PyTorch can use; nothing was checked")
        return 2
    if given.once is not None:
        run_once(_gpu(), given.once)
        return 0
    if not given.only and not given.again:
        before = read(given.out)
        names = [name for name in names if not ended(before, name)]
    records = drive("benchmarks.gpu_check", names, given.out, about=environment(), seconds=given.seconds)
    print(summary(records))
    return int(not all(record.result.passed for record in records))


if __name__ == "__main__":
    sys.exit(main())
