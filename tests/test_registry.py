"""The registry knows every public name."""

from __future__ import annotations

import pytest
import torch

import cellattn
import cellattn.data
import cellattn.metrics
import cellattn.nn
import cellattn.screen

from .registry import ENTRIES, EXCEPTIONS


def public_names() -> set[str]:
    modules = {
        "": cellattn,
        "nn.": cellattn.nn,
        "metrics.": cellattn.metrics,
        "data.": cellattn.data,
        "screen.": cellattn.screen,
    }
    return {prefix + name for prefix, module in modules.items() for name in module.__all__}


def test_every_public_name_is_registered_or_explained() -> None:
    covered = {name for entry in ENTRIES.values() for name in entry.covers}
    assert covered.isdisjoint(EXCEPTIONS)
    assert covered | set(EXCEPTIONS) == public_names()


@pytest.mark.parametrize("name", ENTRIES)
def test_every_tensor_is_read(name: str) -> None:
    """Each differentiable tensor has a gradient that is not 0, without which the tests on gradients would say nothing."""
    entry = ENTRIES[name]
    tensors = {key: x.clone().requires_grad_(key in entry.floats) for key, x in entry.tensors.items()}
    out = entry.run(tensors)
    assert out
    if entry.floats:
        total = torch.stack([x.double().square().sum() for x in out if x.requires_grad]).sum()
        for key, grad in zip(entry.floats, torch.autograd.grad(total, [tensors[key] for key in entry.floats]), strict=True):
            assert grad.abs().max() > 0, key
