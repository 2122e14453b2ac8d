"""The cross-entropy of attention with a graph over every non-edge, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference

from ..compare import leaves, random_graph
from .check import assert_on_chip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def graph_of(n: int) -> MultiGraph:
    return random_graph(n, {"other": 7, "a": 5 * n}).extend(1)


CASES = [(80, "bf16", 20, "softmax")]
MORE = [
    (90, "bf16", 64, "softmax"),
    (80, "fp32", 20, "sigmoid"),
    *((80, "bf16", d, link) for d in (16, 32, 64, 128, 256) for link in ("softmax", "sigmoid")),
    *((80, "fp16", d, "softmax") for d in (20, 64)),
    *((80, "fp32", d, "softmax") for d in (16, 64, 128)),
    *((89, "bf16", d, "softmax") for d in (20, 64, 128)),
]


@pytest.mark.parametrize(
    ("arch", "dtype", "d", "link"), [*CASES, *(pytest.param(*case, marks=pytest.mark.tile(i)) for i, case in enumerate(MORE))]
)
def test_every_non_edge(arch: int, dtype: str, d: int, link: str) -> None:
    graph = graph_of(70)
    rows = torch.tensor([3, 0, 17, 17, 69, *range(20, 50)])

    def through(module: Any) -> Any:
        def f(q: Tensor, k: Tensor) -> Tensor:
            return module.attention_bce(q, k, graph, "a", rows=rows, link=link, num_prefix=1, reduction="none")

        return f

    q, k = (x.detach() for x in leaves((72, d), (72, d), dtype=DTYPES[dtype]))
    assert_on_chip(arch, through(cellattn), through(reference), q, k, kernels=["bce_rows_fwd_kernel_dense"], parts=True)
