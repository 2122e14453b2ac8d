"""What is asked of each op and model on a GPU: generators of results, each held to float64, to the CPU or to itself."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, SubgraphBatch
from cellattn.data import synthetic_cell
from tests.bounds import ratio_to_bound, with_bounds

from ..methods.registry import METHODS
from ..methods.workload import random_mutants
from ..processes import end_with_parent
from ..sections import Result
from .cases import DTYPES, GENES, Case, all_cases, cell, inputs_of

_T = TypeVar("_T")

MODEL_SMALL = 1e-4  # of a model's largest prediction, or a parameter's largest gradient, through several layers in float32
KHOP = Case("k-hop ops", (), lambda: (), None)  # what a check that raises is reported under


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
    exact = case.exact
    if exact is None:
        return
    for name, dtype in DTYPES.items():
        inputs = inputs_of(case, dtype, device)
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = seeded(lambda: case.ours(*leaves))
        g = torch.Generator().manual_seed(1)
        upstream = [torch.randn(y.shape, generator=g).to(y) for y in outputs]
        got = [y.detach() for y in (*outputs, *torch.autograd.grad(outputs, leaves, upstream))]
        want = seeded(lambda: with_bounds(exact, inputs, upstream))
        shares = [ratio_to_bound(a, b, parts=True) for a, b in zip(got, want, strict=True)]
        errors = relative_errors(got, [b.value for b in want])
        detail = ", ".join(f"{error:.1e} ({share:.2f} of its bound)" for error, share in zip(errors, shares, strict=True))
        yield Result("accuracy", f"{case.name}, {name}", all(share <= 1 for share in shares), detail)


def seeded(f: Callable[[], _T]) -> _T:
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


def models(device: torch.device, num_genes: int = 2000, num_sets: int = 6, first: int = 0) -> Iterator[Result]:
    """Every method of the report, predictions and gradients, against itself in float64 on the CPU; and once more, bit-equal.

    From number `first` on; one that takes the device along takes none of the others.
    """
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

    names = list(METHODS)
    for i, name in enumerate(names[first:], first):
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
        if lost(device):
            yield Result("device", name, False, "lost to this process: the models after it run in another")
            if i + 1 < len(names):
                yield from elsewhere(models, device, num_genes, num_sets, i + 1)
            return


def guarded(check: Callable[..., Iterator[Result]], name: str, case: Case, device: torch.device) -> Iterator[Result]:
    """A check that raises has failed, and the others go on."""
    try:
        yield from check(case, device)
    except Exception:
        yield Result(name, case.name, False, traceback.format_exc(limit=-3))
    with suppress(RuntimeError):  # of a device that is lost
        torch.cuda.empty_cache()


def lost(device: torch.device) -> bool:
    """Whether a kernel went so wrong (an access out of bounds) that this process can no longer use its GPU."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def elsewhere(f: Callable[..., Iterator[Result]], *arguments: Any) -> Iterator[Result]:
    """What f(*arguments) yields, from a process of its own, which has the device anew."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_tell, args=(theirs, f, *arguments))
    process.start()
    theirs.close()
    with suppress(EOFError):
        while True:
            yield ours.recv()
    process.join()
    if process.exitcode:
        yield Result("process", f.__name__, False, f"ended with {process.exitcode} before its end")


def _tell(to: Connection, f: Callable[..., Iterator[Result]], *arguments: Any) -> None:
    end_with_parent()
    for result in f(*arguments):
        to.send(result)


def ops(names: Sequence[str], device: torch.device, num_nodes: int = GENES, first: int = 0) -> Iterator[Result]:
    """Accuracy, repeats and capture of the cases whose names begin with one of `names`, from number `first` on.

    A case that takes the device along takes none of the others.
    """
    chosen = [case for case in all_cases(cell(num_nodes, device=device)) if case.name.startswith(tuple(names))]
    for i, case in enumerate(chosen[first:], first):
        for name, check in (("accuracy", accuracy), ("repeats", repeats), ("cuda graph", capture)):
            yield from guarded(check, name, case, device)
        if lost(device):
            yield Result("device", case.name, False, "lost to this process: the cases after it run in another")
            if i + 1 < len(chosen):
                yield from elsewhere(ops, names, device, num_nodes, i + 1)
            return


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
    arguments = i, dtype, device, num_nodes
    *_, result = elsewhere(_compiled, *arguments) if lost(device) else _compiled(*arguments)
    return result


def _compiled(i: int, dtype: str, device: torch.device, num_nodes: int) -> Iterator[Result]:
    case = _cases_here(device, num_nodes)[i]
    begun = time.monotonic()
    try:
        step(case.ours, inputs_of(case, DTYPES[dtype], device))
        yield Result("compiled", f"{case.name}, {dtype}", True, f"{time.monotonic() - begun:.1f} s")
    except Exception:
        yield Result("compiled", f"{case.name}, {dtype}", False, traceback.format_exc(limit=-3))


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
