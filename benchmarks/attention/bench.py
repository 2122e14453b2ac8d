"""The attention family against what else a user could run: time of forward and backward, peak memory and error in one run.

    python -m benchmarks.attention [--device cuda] [--suite cell length head ops] [--seconds 280]

Every implementation is first held to float64, outputs and gradients; one that is wrong is listed without a speed, one that
cannot run here with the reason. Peers are described in `peers.py`. Writes `attention.json` and `length.png` beside it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nvtx
import torch
from torch import Tensor
from tqdm import tqdm

from cellattn import MultiGraph
from cellattn._file import write_atomic
from cellattn.data import synthetic_cell

from .. import options
from ..cells import benchmark_graph
from ..measure import cache_bytes, environment, first_line, memory_limit, peak_memory, phase_times, results_dir, target_table
from .peers import (
    DroppedAttention,
    EdgeAttention,
    Function,
    GraphLoss,
    Implementation,
    LogSumExp,
    PerturbationHead,
    SharedTerms,
    TiedAttention,
)  # fmt: skip
from .tables import CELL_SHAPES, PHASES, draw_lengths, table, targets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Errors are relative to the largest entry, head by head. float32 sums over 6,607 genes in another order than float64 leave
# about 1e-6. In 16 bits an implementation may have twice the error of the definition in eager PyTorch of that dtype, and two
# roundings where that is exact: a mean is rounded as a sum and as a quotient.
MAX_RATIO, SMALL = 2.0, {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Of random functions the mean of some draws is compared, entry by entry, within this many standard errors: enough for the
# largest of a million normal deviates, with room for the spread being an estimate.
MAX_DEVIATION = 8.0

NO_TIME = "the time for the run was over"

# Each of our kernels by the start of its name, as `ncu -k` takes it, with the case that runs it.
KERNELS = {
    "attention_fwd_kernel": "attention with lse",
    "attention_bwd_kernel_delta": "attention with lse",
    "attention_bwd_kernel_dq": "attention with lse",
    "attention_bwd_kernel_dkv": "attention with lse",
    "attention_bwd_kernel_large": "attention with lse",
    "edge_fwd_kernel": "edge_attention",
    "edge_bwd_kernel": "edge_attention",
    "row_dot_fwd_kernel": "attention_kl",
    "bit_sum_kernel": "attention_kl, a quarter of all pairs",
    "row_dot_bwd_kernel": "attention_kl",
    "bce_rows_fwd_kernel": "attention_bce, every non-edge",
    "bce_rows_bwd_kernel": "attention_bce, every non-edge",
    "nonedges_kernel": "attention_bce, 32 non-edges a row",
    "perturbation_attention_fwd_kernel": "perturbation_attention",
    "perturbation_attention_bwd_kernel": "perturbation_attention",
}


@dataclass(frozen=True)
class Case:
    """A row: inputs of these shapes, queries first, and a problem of `peers.py`, which is made when its turn comes.

    `facts` go into the results as they are. A row of queries takes `row_elements` entries of the largest tensor.
    """

    suite: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    facts: dict[str, Any]
    row_elements: int
    problem: Callable[[], Any]
    peers: dict[str, Any]  # options of the problem's `peers`


@dataclass(frozen=True)
class Plan:
    """What a run measures and for how long."""

    device: torch.device
    dtype: torch.dtype
    genes: int | None = None  # of the cell; None: as published
    lengths: tuple[int, ...] = ()
    set_counts: tuple[int, ...] = (28, 256, 2048, 16384)
    seconds: float = 280.0
    seconds_each: float = 0.25  # of measured steps
    repeats: int = 50
    only: str | None = None  # the name of one implementation
    profile: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def cell(self) -> MultiGraph:
        return _synthetic(self.genes or 6607, self.device)


@functools.lru_cache(maxsize=2)
def _synthetic(num_genes: int, device: torch.device) -> MultiGraph:
    # Mean degrees stay those of the cell up to twice its edges; more take longer to draw than a run has.
    return synthetic_cell(0, num_genes=num_genes, edge_scale=min(num_genes / 6607, 2.0)).to(device)


@functools.cache
def _any_cell(genes: int | None, device: torch.device) -> tuple[str, MultiGraph]:
    """(what it is, the graph of the suite "ops")"""
    if genes is not None:
        return f"synthetic cell of {genes:,} genes", _synthetic(genes, device)
    name, graph = benchmark_graph()
    return name, graph.to(device)


# ---------------------------------------------------------------------------------------------------------------- cases


def attention_case(
    suite: str,
    name: str,
    graph: Callable[[], MultiGraph],
    tokens: int,
    shape: tuple[int, int],
    num_ties: int,
    *,
    share: float = 1.0,
    lse: bool = False,
    **peers: Any,
) -> Case:
    """Heads tied to the first relations in turn, the loss over a share of the rows."""
    heads, dim = shape

    def problem() -> TiedAttention:
        cell = graph()
        ties = tuple((relation, i % heads) for i, relation in enumerate(cell.relations[:num_ties]))
        chosen = torch.randperm(cell.num_nodes, generator=torch.Generator().manual_seed(0))[: round(share * cell.num_nodes)]
        return TiedAttention(cell, ties, None if share == 1 else chosen.sort().values.to(cell.device), lse)

    facts = {"tokens": tokens, "heads": heads, "head_dim": dim, "ties": num_ties, "rows": share}
    return Case(suite, name, ((heads, tokens, dim),) * 3, facts, heads * tokens, problem, peers)


def head_case(suite: str, name: str, num_sets: int, num_genes: int, device: torch.device, **peers: Any) -> Case:
    d = 64
    shapes = (num_sets, d), (num_genes, d), (num_genes, d), (2 * num_sets, d)
    facts = {"tokens": num_genes, "sets": num_sets, "head_dim": d}
    return Case(
        suite, name, shapes, facts, num_genes * d, lambda: PerturbationHead.draw(num_sets, num_genes, device), peers
    )  # fmt: skip


def cell_suite(plan: Plan) -> Iterator[Case]:
    """Nine relations of a cell; the rows that the targets are made of come first."""
    tokens = (plan.genes or 6607) + 1
    for shape in CELL_SHAPES:
        for ties, share in ((9, 1.0), (0, 1.0), (4, 1.0), (1, 1.0), (9, 0.1)):
            name = f"{shape[0]} heads of {shape[1]}, {ties} ties" + ("" if share == 1 else f", {share:.0%} of the rows")
            yield attention_case(
                "cell", name, plan.cell, tokens, shape, ties,
                share=share, full=ties in (0, 9), compiled=ties == 9 and share == 1,
            )  # fmt: skip


def length_suite(plan: Plan) -> Iterator[Case]:
    """Time over T. On a CPU a smaller problem, and no compilation, which would take longer than the rows."""
    shape, ties = ((9, 20), 9) if plan.on_gpu else ((2, 16), 2)
    lengths = plan.lengths or tuple(4**i for i in range(3, 9 if plan.on_gpu else 8))  # 64 to 65,536 or 16,384
    for tokens in lengths:
        graph = functools.partial(_synthetic, tokens - 1, plan.device)
        name = f"T {tokens:,}, {shape[0]} heads of {shape[1]}, {ties} ties"
        yield attention_case("length", name, graph, tokens, shape, ties, compiled=plan.on_gpu, dynamic=True)


def head_suite(plan: Plan) -> Iterator[Case]:
    genes = plan.genes or 6607
    for b in plan.set_counts:
        yield head_case("head", f"{b:,} sets of 2, width 64", b, genes, plan.device, compiled=b == 256)


def ops_suite(plan: Plan) -> Iterator[Case]:
    """Every op once; the log-sum-exp is compared with the attention row."""
    heads, dim = (9, 20) if plan.on_gpu else (4, 16)
    graph = _any_cell(plan.genes, plan.device)[1]
    tokens, relation = graph.num_nodes + 1, graph.relations[0]
    facts = {"tokens": tokens, "heads": heads, "head_dim": dim}
    ties = min(heads, len(graph.relations))
    yield attention_case("ops", "graph_attention", lambda: graph, tokens, (heads, dim), ties)
    yield attention_case("ops", "attention with lse", lambda: graph, tokens, (heads, dim), 0, lse=True, floors=False)
    yield Case(
        "ops", "attention_logsumexp", ((heads, tokens, dim),) * 2, facts, heads * tokens, LogSumExp, {"compiled": plan.on_gpu}
    )
    three = ((heads, tokens, dim),) * 3
    yield Case(
        "ops", "attention with lse, dropout 0.1", three, facts, heads * tokens, lambda: DroppedAttention(0.1), {}
    )  # fmt: skip
    masked = {**facts, "relation": relation}
    yield Case(
        "ops", "edge_attention", three, masked, heads * tokens,
        lambda: EdgeAttention(graph.without_self_loops(relation), relation), {"compiled": plan.on_gpu},
    )  # fmt: skip
    pair, one = ((tokens, dim),) * 2, {**facts, "heads": 1, "relation": relation}
    for name, problem in (
        ("attention_kl", GraphLoss(graph, relation, "kl")),
        ("attention_bce, every non-edge", GraphLoss(graph, relation, "bce")),
        ("attention_bce, 32 non-edges a row", GraphLoss(graph, relation, "bce", num_negatives=32)),
    ):
        yield Case("ops", name, pair, one, tokens, lambda problem=problem: problem, {})  # type: ignore[misc]
    yield Case(
        "ops", "attention_kl, a quarter of all pairs", pair, {**facts, "heads": 1}, tokens,
        lambda: GraphLoss.of_pairs(graph.num_nodes, 0.25, plan.device), {},
    )  # fmt: skip
    yield Case(
        "ops", "attention_kl_comembership", pair, {**facts, "heads": 1}, tokens,
        lambda: SharedTerms.draw(graph.num_nodes, plan.device), {},
    )  # fmt: skip
    yield head_case("ops", "perturbation_attention", 256, graph.num_nodes, plan.device)


SUITES = {"cell": cell_suite, "head": head_suite, "ops": ops_suite, "length": length_suite}


# ------------------------------------------------------------------------------------------------------------ correctness


class Check:
    """Holds implementations of a case to its definition in float64, which is taken once, in blocks of query rows."""

    def __init__(self, case: Case, exact: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
        self._exact, self._inputs = exact, [x.detach() for x in inputs]
        self._dim, self._rows = inputs[0].ndim - 2, inputs[0].shape[-2]
        # float64 temporaries of half a gigabyte on a GPU, and of what a CPU's caches hold for the most part
        self._block = max(1, (2**26 if inputs[0].is_cuda else 2**22) // case.row_elements)
        self._definition = functools.cache(self._blocks)  # by dtype and number of outputs

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the outputs, equal for all implementations; that of a mean weighs as much as the rows it is over."""
        gradients = []
        for i, y in enumerate(outputs):
            g = torch.Generator(y.device).manual_seed(100 + i)
            # the rows' losses are O(1) as their outputs are: a tenth keeps the loss of one row from hiding the attention
            u = torch.randn(y.shape, generator=g, device=y.device) if y.ndim else torch.tensor(0.1 * self._rows)
            gradients.append(u.to(self._inputs[0].dtype).to(y))  # the same rounded values for every dtype of y
        return gradients

    def __call__(self, implementation: Implementation, f: Function) -> tuple[float, float, list[Tensor]]:
        """(error, bound) of the output or gradient where the one is largest beside the other; the outputs' gradients."""
        want = self._definition(torch.float64, implementation.num_outputs)
        draws = []
        for _ in range(implementation.num_draws):
            inputs = tuple(x.clone().requires_grad_() for x in self._inputs)
            outputs = f(*inputs)
            upstream = self.upstream(outputs)
            grads = torch.autograd.grad(outputs, inputs, upstream)
            draws.append([y.detach().double() for y in (*outputs, *grads)])
        bounds = self._bounds(implementation.num_outputs)
        pairs = []
        for i, (exact, bound) in enumerate(zip(want, bounds, strict=True)):
            drawn = torch.stack([draw[i] for draw in draws])
            if len(draws) > 1:
                bound += MAX_DEVIATION * float(drawn.std(0).max() / len(draws) ** 0.5 / exact.abs().max())
            pairs.append((relative_error(drawn.mean(0), exact), bound))
        error, bound = max(pairs, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else torch.inf)
        return error, bound, upstream

    def _bounds(self, num_outputs: int | None) -> list[float]:
        dtype = self._inputs[0].dtype
        want = self._definition(torch.float64, num_outputs)
        if dtype.itemsize > 2:
            return [SMALL[dtype]] * len(want)
        eager = self._definition(dtype, num_outputs)
        errors = [relative_error(a, b) for a, b in zip(eager, want, strict=True)]
        # eager may overflow where it makes a map: then only the small term holds
        return [max(MAX_RATIO * error if error < torch.inf else 0.0, SMALL[dtype]) for error in errors]

    def _blocks(self, dtype: torch.dtype, num_outputs: int | None) -> list[Tensor]:
        """Outputs and gradients of the definition in a dtype; sums over blocks in at least float32."""
        q, *rest = (x.to(dtype) for x in self._inputs)
        upstream: list[Tensor] = []
        parts: list[list[Tensor]] = []
        dq, sums = [], [torch.zeros_like(x, dtype=torch.promote_types(dtype, torch.float32)) for x in rest]
        for first in range(0, self._rows, self._block):
            size = min(self._block, self._rows - first)
            leaves = [x.detach().requires_grad_() for x in (q.narrow(self._dim, first, size), *rest)]
            outputs = self._exact(first, *leaves)[:num_outputs]
            if not upstream:
                upstream = self.upstream([y.new_empty(self._full(y)) for y in outputs])
            mine = [u.narrow(self._dim, first, size) if u.ndim else u for u in upstream]
            grads = torch.autograd.grad(outputs, leaves, mine)
            parts.append([y.detach() for y in outputs])
            dq.append(grads[0])
            for total, grad in zip(sums, grads[1:], strict=True):
                total += grad
        joined = [torch.cat(ys, self._dim) if ys[0].ndim else torch.stack(ys).sum(0) for ys in zip(*parts, strict=True)]
        return [*joined, torch.cat(dq, self._dim), *sums]

    def _full(self, y: Tensor) -> tuple[int, ...]:
        """The shape of an output over all rows."""
        return (*y.shape[: self._dim], self._rows, *y.shape[self._dim + 1 :]) if y.ndim else ()


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error over the largest entry: of each head of [H, T, D], of the whole otherwise. NaN where one is."""
    error, size = (got.double() - want).abs(), want.abs()
    if want.ndim >= 3:
        error, size = error.amax((-2, -1)), size.amax((-2, -1))
    return float((error.max() / size.max() if want.ndim < 3 else error / size).max())


# -------------------------------------------------------------------------------------------------------------- measuring


def step(f: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor], mark: Callable[[], None]) -> None:
    """Forward and backward, marked."""
    mark()
    with nvtx.annotate("forward", domain="cellattn"):
        outputs = f(*inputs)
    mark()
    with nvtx.annotate("backward", domain="cellattn"):
        torch.autograd.grad(outputs, inputs, upstream)
    mark()


def input_sets(case: Case, plan: Plan) -> list[tuple[Tensor, ...]]:
    """At least two sets, and so many that the GPU's cache does not hold the one whose turn comes."""
    num_bytes = sum(torch.Size(shape).numel() for shape in case.shapes) * plan.dtype.itemsize
    count = min(max(2, 1 + -(-cache_bytes(plan.device) // num_bytes)), 32)
    g = torch.Generator(plan.device).manual_seed(0)
    return [
        tuple(torch.randn(shape, generator=g, device=plan.device).to(plan.dtype).requires_grad_() for shape in case.shapes)
        for _ in range(count)
    ]


def measure(implementation: Implementation, check: Check, sets: list[tuple[Tensor, ...]], plan: Plan) -> dict[str, Any]:
    """Check, then peak memory, then time; whatever is raised is the reason why there is none."""
    try:
        limit = memory_limit(plan.device)
        if implementation.num_bytes > limit:
            reason = f"needs about {implementation.num_bytes / 1e9:,.0f} GB, where {limit / 1e9:,.0f} GB can be had"
            return {"status": "left out", "reason": reason}
        f = implementation.build(*sets[0])
        error, bound, upstream = check(implementation, f)
        outcome = {"error": error if math.isfinite(error) else None, "bound": bound}
        if not error <= bound:
            return {"status": "wrong", "reason": f"error {error:.1e}, at most {bound:.1e} expected", **outcome}
        advance = functools.partial(step, f, upstream=upstream)
        num_bytes = peak_memory(lambda: advance(sets[-1], mark=lambda: None))
        for i in range(3 if plan.on_gpu else 0):  # on a CPU the check and the measure of memory have warmed it up
            advance(sets[i % len(sets)], mark=lambda: None)
        with cuda_profile() if plan.profile and plan.on_gpu else contextlib.nullcontext():
            times = phase_times(
                lambda i, mark: advance(sets[i % len(sets)], mark=mark), PHASES, plan.device,
                seconds=plan.seconds_each, repeats=plan.repeats,
            )  # fmt: skip
        return {"status": "measured", **outcome, **times, "bytes": num_bytes}
    except Exception as failure:
        return {"status": "cannot run", "reason": first_line(failure)}


@contextlib.contextmanager
def cuda_profile() -> Iterator[None]:
    """What `nsys profile --capture-range=cudaProfilerApi` records."""
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def measure_case(case: Case, plan: Plan, *, deadline: float, progress: Callable[[str], None]) -> dict[str, Any]:
    """The row of a case: what became of every implementation."""
    outcomes: dict[str, Any] = {}
    row = {"suite": case.suite, "name": case.name, **case.facts, "implementations": outcomes}
    with nvtx.annotate(case.name, domain="cellattn"):
        try:
            progress(f"{case.name}: graph and inputs")
            problem, sets = case.problem(), input_sets(case, plan)
        except Exception as failure:
            outcomes["every implementation"] = {"status": "cannot run", "reason": first_line(failure)}
            return row
        check = Check(case, problem.exact, sets[0])
        for implementation in problem.peers(case.shapes, plan.dtype, **case.peers):
            name = implementation.name
            if plan.only not in (None, name):
                continue
            if time.monotonic() >= deadline:
                outcomes[name] = {"status": "not reached", "reason": NO_TIME}
                continue
            progress(f"{case.name}: {name}")
            with nvtx.annotate(name, domain="cellattn"):
                outcomes[name] = measure(implementation, check, sets, plan)
            gc.collect()
            if plan.on_gpu:
                with contextlib.suppress(RuntimeError):  # after a fault of the GPU each of the others says so itself
                    torch.cuda.empty_cache()
    return row


class NoRowError(ValueError):
    """There is no row of that name."""


def run(
    plan: Plan | None = None,
    *,
    suites: Sequence[str] | None = None,
    case: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure the rows of some suites.

    Args:
        plan: what and how long; that of this device if None.
        suites: their names; on a GPU all, elsewhere "ops" and "length", if None.
        case: the name of one row, or the start of it.
        out: folder that gets `attention.json`, row by row, and `length.png`; the device's if None. A run of one row or one
            implementation writes nothing.

    Returns:
        What `attention.json` holds.
    """
    plan = plan_for(DEVICE) if plan is None else plan
    suites = (tuple(SUITES) if plan.on_gpu else ("ops", "length")) if suites is None else suites
    started = time.monotonic()
    deadline = started + plan.seconds
    graph = _any_cell(plan.genes, plan.device)[0] if "ops" in suites else "synthetic cell"
    chosen = [row for suite in suites for row in SUITES[suite](plan)]
    if case is not None:
        exactly = [row for row in chosen if row.name == case]
        chosen = exactly or [row for row in chosen if row.name.startswith(case)]
    if not chosen:
        raise NoRowError(f"case: no row of {', '.join(suites)} starts with {case!r}")
    whole = case is None and plan.only is None
    folder = results_dir() if whole and out is None else out
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "environment": environment(),
        "graph": graph,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "suites": list(suites),
        "rows": rows,
    }
    with quick_collections(), tqdm(chosen, desc="attention", unit="row", disable=None) as bar:
        for row in bar:
            if time.monotonic() < deadline:
                rows.append(measure_case(row, plan, deadline=deadline, progress=bar.set_postfix_str))
            result["not_reached"] = [later.name for later in chosen[len(rows) :]]
            result["seconds"] = time.monotonic() - started
            result["targets"] = targets(rows)
            if whole and folder is not None:
                write_atomic(folder / "attention.json", (json.dumps(result, indent=1) + "\n").encode())
    if whole and folder is not None and any(row["suite"] == "length" for row in rows):
        draw_lengths(result, folder / "length.png")
    return result


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Garbage collections that leave out what was there before: all of PyTorch takes them longer than a row its steps."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def plan_for(device: str, **given: Any) -> Plan:
    """The plan of a device, where nothing else is given."""
    on_gpu = device.startswith("cuda")
    usual: dict[str, Any] = {"dtype": torch.bfloat16} if on_gpu else {"dtype": torch.float32, "seconds": 600.0, "repeats": 10}
    return Plan(torch.device(device), **{**usual, **{key: value for key, value in given.items() if value is not None}})


def epilog() -> str:
    """Command lines of the profilers."""
    command = "python -m benchmarks.attention --device cuda --only ours --profile"
    lines = [
        "A timeline of the measured steps of one row (NVTX: row, implementation, forward, backward):",
        "  nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop -o timeline \\",
        f'    {command} --suite cell --case "9 heads of 20, 9 ties"',
        "",
        "Each kernel in the measured steps, by name: the backward is launched from a thread of its own, outside the ranges:",
    ]
    for kernel, row in KERNELS.items():
        lines.append(f"  ncu --set full --profile-from-start off -k regex:^{kernel} -o {kernel} \\")
        lines.append(f'    {command} --repeats 3 --suite ops --case "{row}"')
    return "\n".join(lines)


def main() -> None:
    parser = options.parser("attention", __doc__, epilog=epilog())
    parser.add_argument("--device", type=options.device, default=DEVICE, help="cpu or cuda (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 elsewhere, if not given")
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="all on a GPU, ops and length elsewhere, if not given")
    parser.add_argument(
        "--seconds", type=options.positive, help="no implementation is begun after so many (280 on a GPU, 600 elsewhere)"
    )
    parser.add_argument(
        "--repeats", type=options.count, help="most measured steps of an implementation (50 on a GPU, 10 elsewhere)"
    )
    parser.add_argument("--genes", type=options.genes, help="of the cell (as published)")
    parser.add_argument("--lengths", type=options.count, nargs="+", help="tokens of the suite length")
    parser.add_argument("--case", help="one row: its name or the start of it; writes no results")
    parser.add_argument("--only", help="one implementation by its name, such as ours; writes no results")
    parser.add_argument("--profile", action="store_true", help="cudaProfilerStart and Stop around the measured steps")
    given = vars(parser.parse_args())
    suites, case, device = given.pop("suite"), given.pop("case"), given.pop("device")
    given["dtype"] = DTYPES.get(given["dtype"])
    given["lengths"] = tuple(given["lengths"]) if given["lengths"] else None
    try:
        result = run(plan_for(device, **given), suites=suites, case=case)
    except NoRowError as error:
        parser.error(str(error))
    if given["only"] is not None and not any(given["only"] in row["implementations"] for row in result["rows"]):
        parser.error(f"argument --only: no implementation of these rows is called {given['only']!r}")
    print(f"{result['graph']}, {result['dtype']}, {result['seconds']:.0f} s\n\n{table(result['rows'])}")
    if result["not_reached"]:
        print(f"\nNot reached in {result['seconds']:.0f} s: {'; '.join(result['not_reached'])}")
    print(f"\n{target_table(result['targets'])}")


if __name__ == "__main__":
    main()
