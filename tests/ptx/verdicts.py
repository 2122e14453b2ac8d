"""Verdicts on planted faults: how they are kept, and docs/compiled.md, the page that is made of them."""

from __future__ import annotations

import collections
import csv
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .planting import KINDS
from .subjects import family_of

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("mutations.csv")


@dataclass(frozen=True, order=True)
class Verdict:
    """On one mutant: a row of mutations.csv, in which the first row of some code names its kernel, chip and commit."""

    kernel: str
    arch: str
    commit: str  # the last that changed a kernel then
    code: str  # digest of the kernel's as it was compiled
    instruction: str  # its number in the code, from 0
    kind: str
    change: str  # digest of what the instruction became
    verdict: str
    why: str  # of one that survived: the instruction and what it became

    @property
    def key(self) -> tuple[str, str, str]:
        return self.code, self.instruction, self.change


_OF_CODE = "kernel", "arch", "commit"


def read(path: Path) -> list[Verdict]:
    """The latest verdict on each mutant."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    of_code = {x["code"]: {name: x[name] for name in _OF_CODE} for x in reversed(rows) if x["kernel"]}
    found = [Verdict(**{**x, **of_code[x["code"]]}) for x in rows]
    return sorted({x.key: x for x in found}.values(), key=lambda x: (x.kernel, x.arch, x.code, int(x.instruction), x))


def write(path: Path, results: Collection[Verdict], mode: str = "w") -> None:
    """Results in the order of `read`, or more of them to those that are there."""
    named = set[str]()
    with path.open(mode, newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        if mode == "w":
            rows.writerow(x.name for x in fields(Verdict))
        for x in results:
            rows.writerow("" if name in _OF_CODE and x.code in named else value for name, value in asdict(x).items())
            named.add(x.code)


# ------------------------------------------------------------------------------------------------------------- the page

PAGE = ROOT / "docs" / "compiled.md"

INTRODUCTION = """# Compiled kernels, executed without a GPU

Made by `python -m tests.ptx.mutations --page`. What Triton and nvcc compile is executed on the CPU by `tests/ptx`, through the
library's own launchers, and watched as compute-sanitizer would watch it. Results are held to float64 with derived bounds, and
to each other with the blocks in two orders. None of it has run on a GPU.

`make test` runs {some} cases of `tests/compiled`, `make test-all` and CI all of the {everything}.

## Faults of the library that it found"""

PLANTED = """## How many planted faults it finds

Each mutant is a kernel with one place of its PTX changed: a barrier, wait or fence removed, the mask of a load or store
removed, a stride or an offset off by one, two operands swapped, a transposition dropped. Places are drawn among the
instructions that the shapes of `tests/ptx/subjects.py` execute; of kernels with dropout, among those of Philox, of the rule
what stays, and of its share. An equivalent mutant changes no byte of any output or gradient
at any of its shapes, and nothing is reported of it; the last column is the share of the others that is reported or fails.
Blocks run in one order, so that races between them are left to the machine.

A verdict is of a kernel as it was compiled then; of one that has changed since, the tool plants anew when it runs again. They
are kept one by one in `tests/ptx/mutations.csv`.
"""

SURVIVED = """### What survived

Results differ from those of the kernel as it is, and stay within the bounds at these shapes. Why, by reading the code:
"""

NONE_SURVIVED = """### What survived

None: where results differed and stayed within the bounds, bounds were made tighter, or shapes were added at which they do not.
"""

FAULTS = """
| found | mended by |
| --- | --- |
| `attention_bce`, sharp maps: the passes over all keys and over edges rounded a score differently, and a / (1 - a) multiplied \
the difference | "attention_bce is exact at any gap, values and gradients" |
| `khop_pull_kernel`: warps of many blocks set one flag with plain stores, which the memory model calls a race | "The flags of \
k-hop's hops are volatile" |
| `bce_rows_bwd_kernel_dense_dq` with drawn negatives, sm_90: a register of an operand was written while the product of the \
round before read it, for which ptxas made every product wait | "BCE of drawn negatives runs its products of sm_90 side by \
side; it is executed for that chip too" |
| `bce_rows_bwd_kernel_edges_dk` with chosen rows, D from 65 on: Triton 3.6 and 3.7 took what a loop reduces of its first step \
for all steps, so that dk lacked edges | "On a GPU dk of attention_bce with chosen rows has all its edges"; every compiled \
kernel is held to what its source depends on, `tests/kernels/dataflow.py` |
""".replace("\\\n", "")

# (the kernel's name or how it begins, kind, a part of the instruction): why no comparison can see it
EXPLAINED = {
    ("bce_rows_fwd_kernel_edges", "swap", "sub.s64 %rd10"): "the last of a hub's segments comes before the first, so that it \
walks the hub whole: the same sum in another order",
    ("bce_rows_fwd_kernel_edges", "swap", "sub.s64 %rd8"): "the degree of a row with its sign turned: the target of a row's \
only edge is its weight over its weight, rounded twice, for 1",
    ("bce_rows_bwd_kernel_segments_dk", "stride", "add.s64"): "the last edge of a segment of over 64 taken for one of the \
first row, one term of seventy: below the bound of a bfloat16 sum of that length",
    ("bce_rows_bwd_kernel_segments_dq", "stride", "add.s64"): "edges past the first 32 of a segment take the weights of their \
neighbours, and the last is left out, one term of eighty: below the bound of a bfloat16 sum of that length",
    ("bce_rows_fwd_kernel_edges", "swap", "setp.gt"): "log(1 - a) as such where a is small, off by a spacing of 1, and by its \
series where a is between 1/2 and 2/3, off by 4e-6 there: both within the bound of a row's loss",
    ("row_dot_fwd_kernel", "offset", "ld.global.b64"): "reads where the segments of a hub end for where they begin, so that \
it walks the hub whole: the same sum in another order",
    ("attention_fwd_kernel", "swap", "fma.rn.ftz"): "a high coefficient of the polynomial of a logarithm",
    ("bce_rows_fwd_kernel_large", "swap", "fma.rn.ftz"): "a coefficient of the polynomial of the logarithm of a row's sum",
    ("bce_rows_fwd_kernel", "swap", "fma.rn.ftz"): "a coefficient of the polynomial of log(1 - a), which moves that by 3e-4 at \
most, where a is nearly 2/3, and is multiplied by its target in an edge of a hub; the bound of a row's loss is 1e-4 here",
    ("bit_sum_kernel_pieces", "swap", "sub.f32"): "the sign of a last piece of float32, of its last eight binary digits: below \
the bound of a gradient that is rounded to bfloat16",
    ("bit_sum_kernel", "swap", "mma.sync"): "rows of a last piece exchanged, of the last eight binary digits of what is added: \
below the bound of a gradient that is rounded to bfloat16",
}  # fmt: skip

EARLIER = """
## Before

Verdicts of these were not kept one by one. Of kernels as they were at 8dcd0ef, `row_dot_fwd_kernel` at ed32135:

| family | mutants | equivalent | reported by the machine | failing a comparison | surviving |
| --- | ---: | ---: | ---: | ---: | ---: |
| attention, forward | 132 | 20 | 82 | 29 | 1 |
| edge_attention | 180 | 15 | 118 | 47 | 0 |
| masked_spmm | 103 | 5 | 65 | 33 | 0 |
| perturbation_attention | 43 | 4 | 29 | 10 | 0 |
| relational_spmm | 87 | 3 | 60 | 24 | 0 |
| row_dot | 169 | 17 | 105 | 45 | 2 |
| set_sum | 15 | 1 | 11 | 3 | 0 |

Before that, of 797 mutants 130 were equivalent, 444 reported, 219 failing and 4 surviving: of attention's backward with its
forward 309, one surviving, and of `attention_bce` 216, two. Of `csrc/cuda`, which has not changed since, none of 217 survived.

Mutants that change nothing at any shape were read, and some owed that to the shapes: one tie, rows of one step, hubs of two
segments, tiles of which three keys were left. The shapes have more since, and such mutants are found. What survived then:

* `attention_bwd_kernel_dq`, few queries: two operands of a product exchanged, of a group of eight keys of the last tile for
  queries over a thousand keys. What they weigh is below the bound of a bfloat16 sum of that length; in a shape that has come
  since, the last keys weigh more, and such a mutant is found.
* `bce_rows_fwd_kernel_sharp`: the exponent's part of a logarithm of 1 to 2. It matters where the argument is above 4/3, for
  a sharp entry of 2/3 to 3/4, and is 1e-7 otherwise.
* `bce_rows_bwd_kernel_dense_dk`, drawn negatives: the sign of a score in the share that a sharp entry takes from the
  others, which is capped at 1 and multiplied by a pull below the bound of the sum that it enters.
* `row_dot_fwd_kernel`, two: the end of a hub's segments read for their beginning, so that it walks the hub whole: the same sum
  in another order.
* `attention_fwd_kernel`, masked keys: a high coefficient of the polynomial of a logarithm.
* `row_dot_bwd_kernel_dk_segments`: one edge of a hub taken for its neighbour, one term of 1,300. Hubs have 90 and 280
  entries since.
"""


def _collected(*options: str) -> int:
    """Cases of tests/compiled."""
    command = [sys.executable, "-m", "pytest", "tests/compiled", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return sum("::" in line for line in done.stdout.splitlines())


def _table(by: str, of: Callable[[Verdict], str], results: list[Verdict]) -> list[str]:
    lines = [
        f"| {by} | mutants | equivalent | reported by the machine | failing a comparison | surviving | found |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[str, list[Verdict]] = {}
    for x in results:
        groups.setdefault(of(x), []).append(x)
    order = list(KINDS) if by == "kind" else sorted(groups)
    for name in [*(x for x in order if x in groups), "all"]:
        mine = results if name == "all" else groups[name]
        equivalent, reported, failing, surviving = (
            sum(x.verdict == verdict for x in mine) for verdict in ("equivalent", "reported", "failing", "surviving")
        )
        counted = reported + failing + surviving
        share = f"{(reported + failing) / counted:.1%}" if counted else ""
        lines.append(f"| {name} | {len(mine)} | {equivalent} | {reported} | {failing} | {surviving} | {share} |")
    return lines


def _family(x: Verdict) -> str:
    return family_of(x.kernel)


def _explanation(x: Verdict) -> str:
    for (kernel, kind, part), why in EXPLAINED.items():
        if x.kernel.startswith(kernel) and x.kind == kind and part in x.why:
            return why
    return "not explained yet"


def tables(results: list[Verdict]) -> str:
    """What docs/compiled.md says of verdicts, after its introduction."""
    kernels: dict[str, set[str]] = {}
    for x in results:
        kernels.setdefault(_family(x), set()).add(x.kernel)
    reasons = collections.Counter((x.kind, x.why) for x in results if x.verdict == "equivalent")
    detectors = collections.Counter(x.why for x in results if x.verdict == "reported")
    commits = {name: sorted({x.commit for x in results if _family(x) == name}) for name in kernels}
    families = [
        f"| {x} | {', '.join(f'`{kernel}`' for kernel in sorted(kernels[x]))} | {', '.join(commits[x])} |"
        for x in sorted(kernels)
    ]
    survivors = []
    for x in sorted(x for x in results if x.verdict == "surviving"):
        source, _, change = x.why.partition(": ")
        before, _, after = change.partition(" -> ")
        survivors.append(f"| `{x.kernel}`, sm_{x.arch}, {source} | `{before}` | `{after}` | {_explanation(x)} |")
    header = [SURVIVED, "| kernel | instruction | changed to | why |", "| --- | --- | --- | --- |"]
    survived = [*header, *survivors, ""] if survivors else [NONE_SURVIVED]
    lines = [
        PLANTED, *_table("kind", lambda x: x.kind, results), "", *_table("family", _family, results), "",
        "| family | kernels | as of |", "| --- | --- | --- |", *families, "",
        "### What was reported", "", "| fault | mutants |", "| --- | ---: |",
        *(f"| {what} | {n} |" for what, n in sorted(detectors.items(), key=lambda item: (-item[1], item))), "",
        "### Why mutants are equivalent", "", "| kind | reason | mutants |", "| --- | --- | ---: |",
        *(f"| {kind} | {why} | {n} |" for (kind, why), n in sorted(reasons.items(), key=lambda item: (-item[1], item))), "",
        *survived, EARLIER.strip(),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def page(results: list[Verdict]) -> str:
    """docs/compiled.md."""
    introduction = INTRODUCTION.format(some=_collected("-m", "not exhaustive"), everything=_collected())
    return "\n".join([introduction, FAULTS, tables(results)])
