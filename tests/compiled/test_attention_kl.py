"""Products along the rows of graphs (row_dot), compiled, through the loss that is made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference

from ..compare import leaves
from ..conftest import exhaustive
from .check import assert_on_chip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = ["row_dot_fwd_kernel", "row_dot_bwd_kernel_dq", "row_dot_bwd_kernel_dk"]


def graph_of(n: int) -> MultiGraph:
    """Weighted: row 0 has every gene, row 1 has one, row 2 none, others three in the mean; a second relation without edges."""
    g = torch.Generator().manual_seed(n)
    rest = torch.randint(n, (2, 3 * n), generator=g)
    rest = rest[:, rest[0] > 2]
    index = torch.cat([torch.stack([torch.zeros(n).long(), torch.arange(n)]), torch.tensor([[1], [n - 1]]), rest], 1)
    weight = torch.rand(index.shape[1], generator=g) + 0.1
    none = torch.empty(2, 0, dtype=torch.int64)
    return MultiGraph.from_edge_index({"a": index, "none": none}, n, edge_weight={"a": weight, "none": torch.empty(0)})


def through(module: Any, graph: MultiGraph, **options: Any) -> Any:
    return lambda q, k, lse: module.attention_kl(q, k, graph, "a", lse=lse, reduction="none", **options)


def inputs(dtype: str, lead: tuple[int, ...], tokens: int, d: int) -> list[Tensor]:
    q, k = leaves((*lead, tokens, d), (*lead, tokens, d), dtype=DTYPES[dtype])
    (lse,) = leaves((*lead, tokens), dtype=torch.float32)
    return [x.detach() for x in (q, k, lse)]


@pytest.mark.parametrize(
    ("arch", "dtype", "d"),
    [
        (80, "bf16", 20),
        (80, "fp32", 1),
        (90, "bf16", 64),
        *exhaustive(
            *((80, "bf16", d) for d in (16, 32, 64, 100, 128, 256)),
            *((80, "fp16", d) for d in (20, 64)),
            *((80, "fp32", d) for d in (32, 128, 256)),
            *((89, "bf16", d) for d in (16, 32, 64, 128)),
            *((90, "bf16", d) for d in (20, 128)),
        ),
    ],
)
def test_values_and_gradients(arch: int, dtype: str, d: int) -> None:
    graph, p = graph_of(63), 2
    options: dict[str, Any] = {"num_prefix": p}
    assert_on_chip(
        arch, through(cellattn, graph, **options), through(reference, graph, **options), *inputs(dtype, (2,), 63 + p, d),
        kernels=KERNELS, parts=True,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [[3, 0, 17], [4, 4, 0, 4]], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_chosen_and_repeated_rows(arch: int, rows: list[int]) -> None:
    graph = graph_of(63)
    options: dict[str, Any] = {"rows": torch.tensor(rows), "num_prefix": 1}
    assert_on_chip(
        arch, through(cellattn, graph, **options), through(reference, graph, **options), *inputs("bf16", (), 64, 20),
        kernels=KERNELS, parts=True,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [None, [0, 5, 0]], ids=["every row", "chosen"])
def test_hubs_in_segments(rows: list[int] | None) -> None:
    """A row and a column of 1,100 entries, each of which is cut in two."""
    n = 1100
    everyone = torch.arange(n)
    graph = MultiGraph.from_edge_index({"a": torch.stack([torch.zeros_like(everyone), everyone])}, n, undirected=True)
    options: dict[str, Any] = {} if rows is None else {"rows": torch.tensor(rows)}
    segments = ["row_dot_fwd_kernel_segments", "row_dot_bwd_kernel_dk_segments"]
    assert_on_chip(
        80, through(cellattn, graph, **options), through(reference, graph, **options), *inputs("bf16", (), n, 20),
        kernels=[*KERNELS, *segments], parts=True,
    )  # fmt: skip


def test_ties_of_one_layer() -> None:
    """Several of one head, one without edges, and a head without a tie, in one launch."""
    graph, ties = graph_of(40), [("a", 0), ("none", 1), ("a", 2), ("a", 0)]

    def losses(module: Any) -> Any:
        def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            out, of_ties = module.graph_attention(q, k, v, graph, ties)
            return (out, *(x for x, (relation, _) in zip(of_ties, ties, strict=True) if relation == "a"))

        return f

    qkv = [x.detach() for x in leaves(*[(4, 41, 20)] * 3, dtype=torch.bfloat16)]
    assert_on_chip(80, losses(cellattn), losses(reference), *qkv, kernels=[*KERNELS, "attention_fwd_kernel"], parts=True)
