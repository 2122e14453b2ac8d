"""Sums over dense relations as bits, compiled, and the loss that takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference
from cellattn.graph import multigraph
from cellattn.ops.bit_sum import bit_sum

from .. import ptx
from ..compare import leaves, random_graph
from ..conftest import exhaustive
from .check import assert_on_chip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = ["bit_sum_kernel_pieces", "bit_sum_kernel"]


@pytest.fixture(autouse=True)
def _packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relations are packed however small and sparse they are."""
    monkeypatch.setattr(multigraph, "_MIN_PACKED", 0)
    monkeypatch.setattr(multigraph, "_DENSE", 0)


def graph_of(n: int) -> MultiGraph:
    """Half of all pairs; row 0 has every gene, row 1 has one and row 2 none."""
    a = torch.rand(n, n, generator=torch.Generator().manual_seed(n)) < 0.5
    a[0], a[1:3] = True, False
    a[1, n - 1] = True
    return MultiGraph.from_edge_index({"a": a.nonzero().t()}, n)


def kl(module: Any, graph: MultiGraph, **options: Any) -> Any:
    return lambda q, k, lse: module.attention_kl(q, k, graph, "a", lse=lse, reduction="none", **options)


def check(arch: int, dtype: str, lead: tuple[int, ...], n: int, d: int, **options: Any) -> None:
    graph = graph_of(n)
    assert graph.bits("a") is not None
    q, k = (x.detach() for x in leaves((*lead, n + 1, d), (*lead, n + 1, d), dtype=DTYPES[dtype]))
    lse = leaves((*lead, n + 1), dtype=torch.float32)[0].detach()
    options = {"num_prefix": 1, **options}
    assert_on_chip(
        arch, kl(cellattn, graph, **options), kl(reference, graph, **options), q, k, lse, kernels=KERNELS, parts=True
    )


@pytest.mark.parametrize(
    ("arch", "dtype", "d"),
    [
        (80, "bf16", 20),
        (90, "bf16", 64),
        (80, "fp32", 16),
        *exhaustive(
            *((80, "bf16", d) for d in (1, 16, 32, 64, 128, 256)),
            *((80, "fp16", d) for d in (20, 64)),
            *((80, "fp32", d) for d in (20, 64, 100)),
            *((89, "bf16", d) for d in (16, 32, 64)),
            *((90, "bf16", d) for d in (16, 20, 128)),
            *((90, "fp32", d) for d in (16, 20, 64)),
        ),
    ],
)
def test_values_and_gradients(arch: int, dtype: str, d: int) -> None:
    check(arch, dtype, (), 69, d)


@pytest.mark.parametrize("arch", [80, 90])
def test_leading_dimensions_and_many_blocks(arch: int) -> None:
    """Three of 20 columns are one block of 64; rows of a second block, and columns in parts."""
    check(arch, "bf16", (3,), 260, 20)


@pytest.mark.parametrize("rows", [[3, 0, 17], [4, 4, 0, 4]], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_chosen_and_repeated_rows(arch: int, rows: list[int]) -> None:
    check(arch, "bf16", (), 69, 20, rows=torch.tensor(rows))


@pytest.mark.parametrize("arch", [80, 90])
def test_every_digit_of_float32_is_kept(arch: int) -> None:
    """Of one neighbour, whatever its size: nothing is rounded."""
    n, g = 150, torch.Generator().manual_seed(0)
    graph = MultiGraph.from_edge_index({"a": torch.stack([torch.arange(n), torch.randperm(n, generator=g)])}, n)
    bits = graph.bits("a")
    assert bits is not None
    x = torch.randn(n, 20, generator=g) * 2.0 ** torch.randint(-60, 60, (n, 20), generator=g)
    x[0], x[1] = torch.finfo(x.dtype).max, -torch.finfo(x.dtype).max
    with ptx.device(arch):
        got = bit_sum(x, *bits, None, None)
    assert torch.equal(got, x[graph.col("a").long()])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90])
def test_what_is_not_set_is_not_read(arch: int, dtype: str) -> None:
    """A NaN or an infinity reaches the rows that have its column, and no other."""
    graph = random_graph(150, {"a": 9000})
    bits = graph.bits("a")
    assert bits is not None
    a = graph["a"].to_sparse_csr().to_dense() > 0
    x = torch.ones(2, 150, 20, dtype=DTYPES[dtype])
    x[0, 3], x[0, 64], x[1, 149, 7] = torch.nan, torch.inf, -torch.inf
    with ptx.device(arch):
        got = bit_sum(x, *bits, None, None)
    expected = torch.stack([torch.stack([y[row].float().sum(0) for row in a]) for y in x])
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(nan=0), expected.nan_to_num(nan=0))


def test_ties_of_both_kinds_in_one_call() -> None:
    """A weighted relation stays CSR; its ties are one launch, and each dense one another."""
    n = 40
    dense = graph_of(n)
    index = torch.randint(n, (2, 90), generator=torch.Generator().manual_seed(0))
    edges = {"a": dense["a"].edge_index, "weighted": index}
    graph = MultiGraph.from_edge_index(edges, n, edge_weight={"weighted": torch.rand(90) + 0.1})
    ties = [("a", 0), ("weighted", 1), ("a", 2), ("weighted", 0)]

    def losses(module: Any) -> Any:
        def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            out, of_ties = module.graph_attention(q, k, v, graph, ties)
            return (out, *of_ties)

        return f

    qkv = [x.detach() for x in leaves(*[(3, n + 1, 20)] * 3, dtype=torch.bfloat16)]
    assert_on_chip(80, losses(cellattn), losses(reference), *qkv, kernels=[*KERNELS, "row_dot_fwd_kernel"], parts=True)
