"""Message passing of many relations between chosen genes, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cellattn
from cellattn import reference

from .. import ptx
from ..compare import leaves
from ..conftest import exhaustive
from ..ops.sets import between, graph_of
from .check import assert_on_chip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


CASES = [  # chip, dtype, genes, features, samples, x of each relation, sum over relations, x shared by samples
    (80, "bf16", 20, 20, 3, True, True, False),
    (80, "bf16", 20, 20, 9, False, False, True),
    (90, "bf16", 20, 64, 3, True, False, True),
    (80, "fp32", 20, 7, 3, False, True, False),
]
MORE = [
    *((80, "bf16", 20, f, 5, True, f % 3 > 0, f % 2 > 0) for f in (1, 16, 32, 64, 100, 130, 256)),
    *((80, "fp16", 20, 32, 5, each, not each, True) for each in (False, True)),
    *((80, "fp32", 20, f, 5, False, f > 40, True) for f in (32, 64, 128)),
    *((89, "bf16", 20, f, 5, True, True, False) for f in (20, 64, 128)),
]


@pytest.mark.parametrize(
    ("arch", "dtype", "n", "f", "num_sets", "each", "sum_relations", "shared"),
    [*CASES, *exhaustive(*MORE)],
)
def test_values_and_gradients(
    arch: int, dtype: str, n: int, f: int, num_sets: int, each: bool, sum_relations: bool, shared: bool
) -> None:
    graph, ragged = graph_of(n, 3), between(num_sets, n)
    places = n if shared else ragged[0].numel()
    x = leaves((places, 3, f) if each else (places, f), dtype=DTYPES[dtype])[0].detach()
    scale = torch.rand(ragged[2].numel(), 3, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"scale": scale, "sum_relations": sum_relations, "shared": shared}

    def through(module: Any) -> Any:
        return lambda x: module.relational_spmm(graph, x, *ragged, **options)

    assert_on_chip(arch, through(cellattn), through(reference), x, kernels=["relational_spmm_kernel"])


def test_a_hub_takes_several_steps() -> None:
    graph, ragged = graph_of(150, 1), [torch.arange(150), torch.tensor([0, 150]), torch.tensor([0, 7]), torch.tensor([0, 2])]
    x = leaves((150, 3, 128), dtype=torch.bfloat16)[0].detach()

    def through(module: Any) -> Any:
        return lambda x: module.relational_spmm(graph, x, *ragged)

    assert_on_chip(80, through(cellattn), through(reference), x, kernels=["relational_spmm_kernel"])


@pytest.mark.parametrize("arch", [80, 90])
def test_degrees(arch: int) -> None:
    graph, ragged = graph_of(60, 3), between(5, 60)
    with ptx.device(arch) as device:
        degree = cellattn.relational_degree(graph, *ragged)
    assert device.launches[-1] == "relational_degree_kernel"
    assert torch.equal(degree, reference.relational_degree(graph, *ragged))
