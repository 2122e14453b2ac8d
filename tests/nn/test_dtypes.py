"""Models in pure bfloat16, float16 and float64: `model.bfloat16()`, `model.half()`, `model.double()`, without autocast."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from cellattn.nn import CellTransformer, WildtypeDifference
from cellattn.nn.perturbation import POOLS
from cellattn.nn.wildtype import CONVS, MODES

from ..registry import MODELS, NUM_TYPES, RELATIONS, outputs


def transformer(pool: str) -> nn.Module:
    ties = [(0, 0, "a", 0.1), (0, 1, "b", 0.2)]
    return CellTransformer(8, 1, 2, num_types=NUM_TYPES, num_genes=5, feature_dim=3, pool=pool, ties=ties)


def wildtype(mode: str, conv: str) -> nn.Module:
    return WildtypeDifference(8, 2, relations=RELATIONS, num_types=NUM_TYPES, feature_dim=3, mode=mode, conv=conv)


OPTIONS = ("CellTransformer", "WildtypeDifference")  # models of which all options are tried, not the registered ones alone
MAKE: dict[str, tuple[str, Callable[[], nn.Module | None]]] = {
    **{f"CellTransformer {pool}": ("CellTransformer sum", functools.partial(transformer, pool)) for pool in POOLS},
    **{
        f"WildtypeDifference {mode} {conv}": ("WildtypeDifference lazy sage", functools.partial(wildtype, mode, conv))
        for mode, conv in product(MODES, CONVS)
    },
    **{name: (name, MODELS[name].make_module) for name in MODELS if name.split()[0] not in OPTIONS},
}


def run(name: str, module: nn.Module, dtype: torch.dtype, rounded: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of all parameters and inputs, in `dtype` on values that `rounded` can hold."""
    entry = MODELS[name]
    tensors = {key: x.detach().clone() for key, x in entry.tensors.items()}
    tensors = {key: x.to(rounded).to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}
    leaves = [tensors[key].requires_grad_() for key in entry.floats] + list(module.parameters())
    out = outputs(entry.call(module, **tensors))
    total = [(x * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum().double() for x in out if x.requires_grad]
    grads = torch.autograd.grad(torch.stack(total).sum(), leaves, allow_unused=True, materialize_grads=True)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.dtype == leaf.dtype
    return [x.detach() for x in out], list(grads)


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    a, b = (torch.cat([x.double().flatten() for x in side]) for side in (got, want))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_pure_dtype(name: str, dtype: torch.dtype) -> None:
    """Near float64 on the same parameters: a path has about 32 layers and their derivatives, each rounding by eps / 2."""
    registered, make = MAKE[name]
    torch.manual_seed(0)
    module = make()
    assert module is not None
    module = module.to(dtype).eval()
    want = run(registered, copy.deepcopy(module).double(), torch.float64, dtype)
    got = run(registered, module, dtype, dtype)
    for ours, exact in zip(got, want, strict=True):
        assert relative_error(ours, exact) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "name", ["HyperSAGNN", "PerturbedGeneReadout", "PerturbationHead", "PerturbationHead published", "CellEncoder"]
)
def test_on_meta_there_are_shapes(name: str) -> None:
    """Of what reads no graph, forward and backward; a graph has values, and is refused by name."""
    entry = MODELS[name]
    module = entry.make_module()
    assert module is not None
    want = entry.run(dict(entry.tensors), module)
    module.to("meta")
    tensors = {key: x.to("meta").requires_grad_(key in entry.floats) for key, x in entry.tensors.items()}
    if name == "CellEncoder":
        with pytest.raises(ValueError, match="graph: expected the device of q, meta, got cpu"):
            entry.run(tensors, module)
        return
    out = entry.run(tensors, module)
    assert [(x.shape, x.dtype) for x in out] == [(x.shape, x.dtype) for x in want]
    assert all(x.is_meta for x in out)
    sum(x.sum() for x in out).backward()  # type: ignore[union-attr]
    assert all(tensors[key].grad is not None for key in entry.floats)
