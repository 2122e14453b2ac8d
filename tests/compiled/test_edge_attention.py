"""Attention along edges, compiled: rows of hard masks, with what may be added to their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import cellattn
from cellattn import MultiGraph, reference

from .. import ptx
from ..compare import leaves, random_graph
from ..conftest import exhaustive
from ..ops import test_large_scores as large_scores
from .check import assert_on_chip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = ["edge_fwd_kernel", "edge_bwd_kernel_dq", "edge_bwd_kernel_dkv", "attention_bwd_kernel_delta"]
SEGMENTS = [f"{name}_segments" for name in ROWS[:3]]
HEADS = [("a", 0), ("b", 1), ("a", 1)]


def check(
    arch: int, dtype: str, graph: MultiGraph, heads: Sequence[tuple[str, int]], d: int, dv: int, lead: tuple[int, ...] = (),
    *, kernels: Sequence[str], dropout_p: float = 0.0, **options: Any,
) -> None:  # fmt: skip
    num_heads, tokens = 1 + max(head for _, head in heads), options.get("num_prefix", 1) + graph.num_nodes
    shapes = [(*lead, num_heads, tokens, width) for width in (d, d, dv)]
    given = [x.detach() for x in leaves(*shapes, dtype=DTYPES[dtype])]
    given += [x.detach() for x in leaves((len(heads),), dtype=torch.float32, seed=1)]

    def through(module: Any) -> Any:
        return lambda q, k, v, bias: module.edge_attention(
            q, k, v, graph, heads, edge_bias=bias, dropout_p=dropout_p, generator=torch.Generator().manual_seed(3), **options
        )

    assert_on_chip(arch, through(cellattn), through(reference), *given, kernels=kernels, parts=True)


CASES = [
    (80, "bf16", 20, 20),
    (90, "fp16", 64, 16),
    (80, "fp32", 7, 20),
]
MORE = [
    *((arch, "bf16", d, d) for arch in (80, 89, 90) for d in (16, 32, 64, 128, 256)),
    *((80, "fp16", d, d) for d in (20, 128)),
    *((80, "fp32", d, d) for d in (32, 128, 256)),
]


@pytest.mark.parametrize(("arch", "dtype", "d", "dv"), [*CASES, *exhaustive(*MORE)])
def test_values_and_gradients(arch: int, dtype: str, d: int, dv: int) -> None:
    graph = random_graph(25, {"a": 150, "b": 30}, weighted=True)
    check(arch, dtype, graph, HEADS, d, dv, weighted=True, kernels=[*ROWS, "attention_bwd_kernel_dkv"])


@pytest.mark.parametrize("arch", [80, *exhaustive(90)])
def test_without_prefix_and_of_leading_dimensions(arch: int) -> None:
    graph = random_graph(25, {"a": 150, "b": 30})
    check(arch, "bf16", graph, HEADS, 20, 20, (2,), num_prefix=0, kernels=ROWS)


@pytest.mark.parametrize(
    ("arch", "dtype", "d"),
    [
        (80, "bf16", 20),
        (90, "fp16", 64),
        *exhaustive((80, "fp32", 32), (89, "bf16", 128)),
    ],
)
def test_dropout(arch: int, dtype: str, d: int) -> None:
    """Behind 50 prefix tokens genes are on both sides of a group of 64."""
    graph = random_graph(25, {"a": 150, "b": 30}, weighted=True)
    kernels = [*ROWS, "attention_bwd_kernel_dkv"]
    check(arch, dtype, graph, HEADS, d, d, (2,), num_prefix=50, dropout_p=0.3, kernels=kernels)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(80, "bf16"), *exhaustive((90, "bf16"), (80, "fp32"))],
)
def test_hubs_in_segments(arch: int, dtype: str) -> None:
    """A row and a column of 1,100 entries, each of which is cut in two; the other rows see two tokens."""
    n = 1100
    everyone = torch.arange(n)
    star = {"a": torch.stack([torch.zeros_like(everyone), everyone])}
    graph = MultiGraph.from_edge_index(star, n, undirected=True, edge_weight={"a": 0.5 + everyone / n})
    check(arch, dtype, graph, [("a", 0)], 20, 20, weighted=True, self_loops=False, kernels=[*ROWS, *SEGMENTS])


@pytest.mark.exhaustive
def test_dropout_of_hubs_in_segments() -> None:
    n = 1100
    everyone = torch.arange(n)
    graph = MultiGraph.from_edge_index({"a": torch.stack([torch.zeros_like(everyone), everyone])}, n, undirected=True)
    check(80, "fp32", graph, [("a", 0)], 20, 20, self_loops=False, dropout_p=0.3, kernels=[*ROWS, *SEGMENTS])


LARGE = [(90, torch.float32, 1e8), (80, torch.float16, 1e4), (90, torch.bfloat16, 1e6)]


@pytest.mark.parametrize(
    ("arch", "dtype", "size"),
    [(80, torch.float32, 1e5), *exhaustive(*LARGE)],
    ids=str,
)
def test_large_scores(arch: int, dtype: torch.dtype, size: float) -> None:
    with ptx.device(arch) as device:
        large_scores.test_edge_attention(size, dtype)
    assert {"edge_bwd_kernel_large_dq", "edge_bwd_kernel_large_dkv"} <= set(device.launches)


@pytest.mark.parametrize(("arch", "weighted"), [(80, True), *exhaustive((90, True), (90, False))])
def test_gradients_of_scores_that_differ_in_the_last_digits(arch: int, weighted: bool) -> None:
    with ptx.device(arch) as device:
        large_scores.test_edge_attention_of_scores_that_differ_in_the_last_digits(weighted)
    assert {"edge_bwd_kernel_large_dq", "edge_bwd_kernel_large_dkv"} <= set(device.launches)


def test_large_scores_with_dropout() -> None:
    """Gradients of rows of large scores, those of a prefix beside genes on both sides of a group of 64 tokens, in 1 of 3."""
    graph = random_graph(25, {"a": 150, "b": 30}, weighted=True)
    q, k, v = (x.detach() for x in leaves(*[(2, 2, 75, d) for d in (8, 8, 6)], dtype=torch.float32))
    q[..., ::3, :] *= 3e6
    bias = torch.tensor([0.5, -2.0, 1.0])
    upstream = [torch.linspace(-1, 1, n).view(2, 2, 75, -1) for n in (2 * 2 * 75 * 6, 2 * 2 * 75)]

    def gradients(module: Any, *given: torch.Tensor) -> list[torch.Tensor]:
        leaf = [x.clone().requires_grad_() for x in given]
        out, lse = module.edge_attention(
            *leaf[:3], graph, HEADS, num_prefix=50, weighted=True, edge_bias=leaf[3], dropout_p=0.3,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        assert (lse.abs() > 710).any()
        total = (out * upstream[0].to(out.dtype)).sum() + (lse * upstream[1][..., 0].to(lse.dtype)).sum()
        return list(torch.autograd.grad(total, leaf))

    with ptx.device(80) as device:
        got = gradients(cellattn, q, k, v, bias)
    assert {"edge_bwd_kernel_large_dq", "edge_bwd_kernel_large_dkv"} <= set(device.launches)
    want = gradients(reference, *(x.double() for x in (q, k, v, bias)))
    # P is off by (8 + log2 100) roundings of float32, and dS by as much of dP and of delta
    for name, a, b in zip(("dq", "dk", "dv", "dbias"), got, want, strict=True):
        assert float((a.double() - b).abs().max()) <= 1e-5 * float(b.abs().max()), name
