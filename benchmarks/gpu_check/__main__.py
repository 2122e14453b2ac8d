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

import sys

import torch

from .. import options
from ..measure import environment
from ..sections import drive, ended, plan, read, summary
from .checks import run_once
from .sections import BENCHMARKS, SECTIONS, gpu


def main() -> int:
    parser = options.parser("gpu_check", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", help="folder for the results, made if missing")
    what.add_argument(
        "--plan", type=options.positive, metavar="S", help="print commands of at most S seconds that are the whole check"
    )
    what.add_argument("--once", type=options.genes, metavar="GENES", help="run each op once, as the target of other tools")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--seconds", type=options.positive, help="begin no section that could take longer than what is left of these"
    )
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
        run_once(gpu(), given.once)
        return 0
    with options.told():
        out = options.results(given.out)
    if not given.only and not given.again:
        before = read(out)
        names = [name for name in names if not ended(before, name)]
    records = drive("benchmarks.gpu_check.sections", names, out, about=environment(), seconds=given.seconds)
    print(summary(records))
    return int(not all(record.result.passed for record in records))


if __name__ == "__main__":
    sys.exit(main())
