"""`torch.autograd.grad(..., is_grads_batched=True)`, as `jacobian(vectorize=True)` has it: one gradient after another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellattn.ops import _dense

from .registry import MODELS, OPS

BATCH = 3


@pytest.mark.parametrize("way", ["streamed", "dense"])
@pytest.mark.parametrize("name", [name for name, entry in {**OPS, **MODELS}.items() if entry.floats])
def test_are_those_of_one_after_another(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "streamed":
        monkeypatch.setattr(_dense, "LARGEST", 0)
        monkeypatch.setattr(_dense, "LARGEST_ATTENTION", 0)
    entry = {**OPS, **MODELS}[name]
    tensors = {key: x.clone().requires_grad_(key in entry.floats) for key, x in entry.tensors.items()}
    results = [x for x in entry.run(tensors, module=entry.make_module()) if x.requires_grad]
    leaves = [tensors[key] for key in entry.floats]
    g = torch.Generator().manual_seed(0)
    above = [torch.randn(BATCH, *x.shape, dtype=x.dtype, generator=g) for x in results]

    def gradients(above: list[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(results, leaves, above, is_grads_batched=batched, retain_graph=True, allow_unused=True)

    got = gradients(above, batched=True)
    for i in range(BATCH):
        for x, y in zip(got, gradients([a[i] for a in above], batched=False), strict=True):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                torch.testing.assert_close(x[i], y, rtol=1e-9, atol=1e-12)
