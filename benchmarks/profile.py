"""A few steady steps of a method, for a profiler to look at.

    python -m benchmarks.profile METHOD [--torch --out FOLDER] [--batch-size B] [--steps N] [--genes N] [--autocast bf16]

The steps come after a warm-up, between cudaProfilerStart and cudaProfilerStop, each in a range "step" that holds the ranges
"loading", "transfer", "encoder", "head", "losses", "backward" and "optimizer" (NVTX, domain "cellattn"). Nsight needs a GPU;
with --torch, which also works on a CPU, PyTorch's own profiler writes a Chrome trace and tables of what took longest.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cellattn._profiling import span

from . import options
from .measure import environment, synchronize
from .methods.registry import METHODS, method_of
from .methods.workload import Workload, add_workload_arguments, workload_of

ROWS = 30  # of operators
_NSIGHT = """\
  # a timeline: which range and kernel ran when, and what waited
  nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop -o {name} \\
    {command}
  # time by range and by kernel, from the timeline
  nsys stats --report nvtx_pushpop_sum,nvtx_gpu_proj_sum,cuda_gpu_kern_sum {name}.nsys-rep
  # each kernel of the encoder's forward, with what limits it
  ncu --set full --profile-from-start off --nvtx --nvtx-include "cellattn@encoder/" -o {name}-encoder \\
    {command}
  # each kernel of ours: the backward is launched from a thread of its own, outside the ranges
  ncu --set full --profile-from-start off -k "regex:(fwd|bwd|spmm|sddmm)_kernel" -o {name}-kernels \\
    {command}"""


def command_lines(arguments: str = "METHOD", name: str = "profile") -> str:
    """What to type for Nsight Systems and Nsight Compute, given what comes behind `benchmarks.profile`."""
    return _NSIGHT.format(command=f"python -m benchmarks.profile {arguments}", name=name)


def profile(work: Workload, batch_size: int, *, steps: int = 3, warmup: int = 3, out: Path | None = None) -> str | None:
    """Run steady steps, under torch.profiler if there is a folder for what it writes, else for Nsight.

    Args:
        batch_size: mutants in a batch.
        steps, warmup: steps that are looked at, and steps before them.
        out: where `<method>.trace.json` (for chrome://tracing or Perfetto) and `<method>.txt` go.

    Returns:
        Tables of the ranges, and of the operators (on a GPU, with kernels) that took longest themselves; None without `out`.
    """
    trainer, data = work.make(batch_size * (steps + warmup))
    batches = torch.arange(len(data)).split(batch_size)
    on_gpu = trainer.device.type == "cuda"
    for batch in batches[:warmup]:
        trainer.step(data, batch)
    synchronize(trainer.device)
    kinds = torch.profiler.ProfilerActivity
    seen = None if out is None else torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])])
    with _cuda_profiler(trainer.device) if seen is None else seen:
        for batch in batches[warmup:]:
            with span("step"):
                trainer.step(data, batch)
        synchronize(trainer.device)
    if seen is None or out is None:
        return None
    out.mkdir(parents=True, exist_ok=True)
    name = _slug(work.method)
    seen.export_chrome_trace(str(out / f"{name}.trace.json"))
    about = ", ".join(f"{key} {value}" for key, value in environment().items())
    averages = seen.key_averages()
    clocks = {"host": "cpu_time_total", **({"GPU": "device_time_total"} if on_gpu else {})}
    ranges = [f"{'range':<16}{'a step':>8}" + "".join(f"{f'{name} ms a step':>18}" for name in clocks)]
    for event in averages:
        if event.is_user_annotation and event.device_type.name == "CPU" and "#" not in event.key:  # those are PyTorch's own
            times = "".join(f"{getattr(event, clock) / 1e3 / steps:>18.3f}" for clock in clocks.values())
            ranges.append(f"{event.key:<16}{event.count / steps:>8.1f}{times}")
    longest = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    operators = averages.table(sort_by=longest, row_limit=ROWS, max_name_column_width=60)
    lines = [f"{method_of(work.method).name}, {steps} steps of {batch_size} mutants", about, "", *ranges, "", operators]
    page = "\n".join(lines)
    (out / f"{name}.txt").write_text(page)
    return page


@contextmanager
def _cuda_profiler(device: torch.device) -> Iterator[None]:
    """cudaProfilerStart and Stop; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.profiler.start()
    yield
    torch.cuda.profiler.stop()


def _slug(method: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", method).strip("-")


def main() -> None:
    parser = options.parser(
        "profile", __doc__, epilog=f"Methods: {', '.join(METHODS)}, or module:attribute.\n\nWith Nsight:\n{command_lines()}"
    )
    add_workload_arguments(parser)
    parser.add_argument("--batch-size", type=options.count, default=256, help="mutants in a batch (%(default)s)")
    parser.add_argument("--steps", type=options.count, default=3, help="that are looked at (%(default)s)")
    parser.add_argument("--warmup", type=options.seed, default=3, help="steps before them (%(default)s)")
    parser.add_argument("--torch", action="store_true", help="with torch.profiler, which needs no Nsight")
    parser.add_argument("--out", default="runs/profile", help="folder for what --torch writes (%(default)s)")
    given = parser.parse_args()
    with options.told(ImportError, AttributeError, TypeError):  # of a function that is named
        work, out = workload_of(given), options.results(given.out) if given.torch else None
    page = profile(work, given.batch_size, steps=given.steps, warmup=given.warmup, out=out)
    if page is not None:
        print(f"{page}\nwritten to {given.out}")
    elif work.execution.device == "cpu":
        print("Ran on the CPU, where Nsight has nothing to see; --torch profiles there too.")
    arguments = shlex.join(argument for argument in sys.argv[1:] if argument != "--torch")
    print(f"\nWith Nsight:\n{command_lines(arguments, _slug(given.method))}")


if __name__ == "__main__":
    main()
