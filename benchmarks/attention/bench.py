"""The attention family against what else a user could run: time of forward and backward, peak memory and error in one run.

    python -m benchmarks.attention [--device cuda] [--suite cell length head ops] [--seconds 280]

Every implementation is first held to float64, outputs and gradients; one that is wrong is listed without a speed, one that
cannot run here with the reason. What is compared is in `problems.py`. Writes `attention.json` and `length.png` beside it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nvtx
import torch
from torch import Tensor
from tqdm import tqdm

from cellattn._file import write_atomic

from .. import options
from ..measure import cache_bytes, environment, first_line, memory_limit, peak_memory, phase_times, results_dir, target_table
from .cases import SUITES, Case, Plan, any_cell
from .checks import Check
from .peers import NAMES, Function
from .problems import Implementation
from .tables import PHASES, draw_lengths, table, targets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

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
    graph = any_cell(plan.genes, plan.device)[0] if "ops" in suites else "synthetic cell"
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
    parser.add_argument("--only", choices=NAMES, metavar="NAME", help="one implementation, such as ours; writes no results")
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
