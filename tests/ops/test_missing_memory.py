"""Where memory ends: a MemoryError in words of ours, whichever operator asked for it and from which thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import exhaustive

pytestmark = pytest.mark.xdist_group("processes")  # they start others and watch the clock: one at a time

# In a process of its own with 64 MiB left, room for what the checks make. Everything that is made once is made before.
LIMITED = """
import resource, sys
import torch
import cellattn as c

n, b = 200_000, 1000
g = c.MultiGraph.from_edge_index({"a": torch.randint(n, (2, 400_000))}, n)
seeds, ptr = torch.randint(n, (b,)), torch.arange(b + 1)
x = torch.rand(n, 256)
one, one_ptr = seeds[:1], torch.arange(2)
everyone, every_ptr = torch.arange(n).repeat(3), torch.arange(4) * n
words = c.khop_mask(g, seeds, ptr, 1, packed=True)
keep = c.khop_mask(g, one, one_ptr, 1)
calls = {
    "khop_mask": (lambda s, p: c.khop_mask(g, s, p, 2)),
    "khop_subgraph": (lambda s, p: c.khop_subgraph(g, s, p, 30)),
    "perturbation_mask": (lambda s, p: c.perturbation_mask(g, s, p)),
    "masked_spmm": (lambda s, p: c.masked_spmm(g, "a", x, words if len(p) > 2 else keep, num_sets=b if len(p) > 2 else None)),
    "relational_spmm": (
        lambda s, p: c.relational_spmm(g, x, *((everyone, every_ptr) * 2 if len(p) > 2 else (s, p) * 2), shared=True)
    ),
    "relational_degree": (
        lambda s, p: c.relational_degree(
            g, *((everyone, every_ptr) * 2 if len(p) > 2 else (s, p) * 2), relations=["a"] * (400 if len(p) > 2 else 1)
        )
    ),
}
call = calls[sys.argv[1]]
call(one, one_ptr)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
try:
    call(seeds, ptr)
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux how much memory a process has")
@pytest.mark.parametrize(
    "name",
    ["khop_subgraph", "masked_spmm", "relational_spmm", *exhaustive("khop_mask", "perturbation_mask", "relational_degree")],
)
def test_limited_process(name: str) -> None:
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}  # the stack of every thread counts
    done = subprocess.run([sys.executable, "-c", LIMITED, name], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "nothing was refused"
    assert "API call failed" not in done.stdout
