"""Training steps of whole models, each of their operators as its compiled kernels compute it.

What the operators are given is what the models make: views of joint projections as they lie in memory, saved tensors, gradients
in whatever layout autograd brings. Operators of the extension written in C++ alone (k-hop sets) stay on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cellattn import MultiGraph
from cellattn.nn import CellTransformer, Dango, WildtypeDifference

from .. import ptx
from ..bounds import arithmetic_of
from ..conftest import exhaustive

GENES = 70
RELATIONS = [f"r{i}" for i in range(9)]
SEEDS, PTR, TYPES = torch.tensor([3, 7, 1, 9, 20, 33]), torch.tensor([0, 2, 3, 6]), torch.tensor([1, 1, 2, 1, 3, 1])
ROUNDINGS = 512 * 200  # at most: terms of the longest sum, and operations from an input to a gradient one after another


def graph() -> MultiGraph:
    g = torch.Generator().manual_seed(0)
    index = {r: torch.randint(GENES, (2, 40 * (i + 1)), generator=g) for i, r in enumerate(RELATIONS)}
    return MultiGraph.from_edge_index(index, GENES, undirected=True)


def transformer(dim: int, heads: int, **options: Any) -> nn.Module:
    ties = [(0, h % heads, r, 0.1) for h, r in enumerate(RELATIONS)]
    return CellTransformer(dim, 1, heads, num_types=4, num_genes=GENES, ties=ties, dropout=0.0, **options)


def difference(dim: int, mode: str) -> nn.Module:
    return WildtypeDifference(dim, 2, relations=RELATIONS, num_types=4, num_genes=GENES, mode=mode, dropout=0.0)


ATTENTION = ["attention_fwd_kernel", "attention_bwd_kernel_dq", "attention_bwd_kernel_dkv"]
TIES = ["row_dot_fwd_kernel", "row_dot_bwd_kernel_dq", "row_dot_bwd_kernel_dk"]
BCE = ["bce_rows_fwd_kernel_dense", "bce_rows_bwd_kernel_dense_dq", "bce_rows_bwd_kernel_dense_dk"]
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "transformer": (lambda: transformer(60, 3, pool=("sum", "pairwise")), [*ATTENTION, *TIES]),
    "dango": (lambda: Dango(32, relations=dict.fromkeys(RELATIONS, 0.1), num_genes=GENES), ["relational_spmm_kernel"]),
    "difference": (lambda: difference(32, "delta"), ["relational_spmm_kernel"]),
}
MORE: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "transformer, nine heads of 20": (lambda: transformer(180, 9), [*ATTENTION, *TIES]),
    "transformer, cross-entropy": (lambda: transformer(180, 9, loss="bce"), [*ATTENTION, *BCE]),
    "dango of 64": (lambda: Dango(64, relations=dict.fromkeys(RELATIONS, 0.1), num_genes=GENES), ["relational_spmm_kernel"]),
    "difference, lazy": (lambda: difference(32, "lazy"), ["relational_spmm_kernel"]),
}


def step(make: Callable[[], nn.Module], dtype: torch.dtype) -> dict[str, Tensor]:
    """Prediction, regularisation and the gradient of every parameter."""
    torch.manual_seed(1)
    model = make().to(dtype)
    out = model(graph(), SEEDS, PTR, TYPES)
    (out.prediction.square().mean() + out.regularization).backward()
    found = {"prediction": out.prediction.detach(), "regularization": torch.as_tensor(out.regularization).detach()}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name",
    [
        "transformer",
        *exhaustive("dango", "difference"),
        *exhaustive(*MORE),
    ],
)
def test_training_step(name: str) -> None:
    """In float32 against float64 on the CPU.

    All ROUNDINGS on the way make an error of g(ROUNDINGS) of the sizes that are added up (tests/bounds.py), which for a
    gradient are its largest entry, or, where gradients cancel as those of a key's bias do, a part of the model's largest.
    """
    make, kernels = (MODELS | MORE)[name]
    want = step(make, torch.float64)
    with ptx.device(80) as device:
        got = step(make, torch.float32)
    assert set(kernels) <= set(device.launches), sorted(set(device.launches))
    assert got.keys() == want.keys()
    unit = 4 * math.sqrt(ROUNDINGS) * arithmetic_of(torch.float32).unit
    largest = max(float(x.abs().max()) for name, x in want.items() if name not in ("prediction", "regularization"))
    for (key, a), b in zip(got.items(), want.values(), strict=True):
        size = max(float(b.abs().max()), 0.0 if key in ("prediction", "regularization") else 0.01 * largest)
        error = float((a.double() - b).abs().max())
        assert error <= unit * size, f"{key}: off by {error:.2e}, which rounding explains up to {unit * size:.2e}"
