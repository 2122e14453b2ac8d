"""Message passing on masked graphs, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cellattn
from cellattn import MultiGraph, reference

from ..compare import leaves
from ..conftest import exhaustive
from .check import assert_on_chip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def graph_of(n: int, degree: int) -> MultiGraph:
    """Row 0 has every gene, row 1 has one, row 2 none, the others `degree` in the mean."""
    g = torch.Generator().manual_seed(n)
    hub = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)])
    rest = torch.randint(n, (2, n * degree), generator=g)
    return MultiGraph.from_edge_index({"r": torch.cat([hub, torch.tensor([[1], [n - 1]]), rest[:, rest[0] > 2]], 1)}, n)


def through(module: Any, *args: Any, **options: Any) -> Any:
    graph, keep = args
    return lambda x, w: module.masked_spmm(graph, "r", x, keep, edge_weight=w, **options)


CASES = [  # chip, dtype, genes, features, samples, shared
    (80, "bf16", 20, 20, 28, False),
    (80, "bf16", 20, 64, 65, True),
    (90, "bf16", 20, 20, 28, True),
    (80, "fp32", 20, 7, 33, False),
]
MORE = [
    *((80, "bf16", 20, f, 9, shared) for f in (1, 16, 100, 130) for shared in (False, True)),
    *((80, "fp16", 20, 32, 9, shared) for shared in (False, True)),
    *((80, "fp32", 20, f, 9, shared) for f in (32, 64, 128) for shared in (False, True)),
    *((89, "bf16", 20, f, 31, False) for f in (20, 64, 128)),
]


@pytest.mark.parametrize(
    ("arch", "dtype", "n", "f", "num_sets", "shared"),
    [*CASES, *exhaustive(*MORE)],
)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_values_and_gradients(arch: int, dtype: str, n: int, f: int, num_sets: int, shared: bool, reduce: str) -> None:
    graph, keep = graph_of(n, 6), torch.rand(num_sets, n, generator=torch.Generator().manual_seed(0)) < 0.8
    x, w = (t.detach() for t in leaves((n, f) if shared else (num_sets, n, f), (graph.num_edges("r"),), dtype=DTYPES[dtype]))
    assert_on_chip(
        arch, through(cellattn, graph, keep, reduce=reduce), through(reference, graph, keep, reduce=reduce), x, w,
        kernels=["masked_spmm_kernel", "masked_sddmm_kernel"],
    )  # fmt: skip


@pytest.mark.parametrize("share", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "transposed"])
def test_masks(share: float, transpose: bool) -> None:
    """Entries that all samples keep, that few do, and that none does; a hub of 100 entries takes several steps."""
    graph, keep = graph_of(100, 2), torch.rand(9, 100, generator=torch.Generator().manual_seed(1)) < share
    x, w = (t.detach() for t in leaves((100, 20), (graph.num_edges("r"),), dtype=torch.bfloat16))
    options = {"transpose": transpose}
    assert_on_chip(
        80, through(cellattn, graph, keep, **options), through(reference, graph, keep, **options), x, w,
        kernels=["masked_spmm_kernel", "masked_sddmm_kernel"],
    )  # fmt: skip
