"""What comes out may be written to, as `loss /= 4` does: the gradient is that of what was written, or PyTorch's own refusal.

PyTorch refuses, in a backward, what a formula needs and somebody wrote to. Results that are views of each other, or of what an
operator made inside, would be refused at once.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellattn.ops import _dense

from .compare import RTOL
from .registry import MODELS, OPS

KEPT = {  # out and lse are what the gradient of a softmax is made of, as in PyTorch's own
    "attention", "attention dropout", "attention_logsumexp", "attention_logsumexp key_mask", "graph_attention",
    "graph_attention dropout", "graph_attention bce",
}  # fmt: skip
NAMES = [name for name, entry in {**OPS, **MODELS}.items() if entry.floats]


@pytest.mark.parametrize("way", ["streamed", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_results_may_be_written_to(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "streamed":
        monkeypatch.setattr(_dense, "LARGEST", 0)
        monkeypatch.setattr(_dense, "LARGEST_ATTENTION", 0)
    entry = {**OPS, **MODELS}[name]
    module = entry.make_module()

    def gradients(written: bool) -> list[Tensor]:
        tensors = {key: x.clone().requires_grad_(key in entry.floats) for key, x in entry.tensors.items()}
        results = [x for x in entry.run(tensors, module=module) if x.requires_grad]
        total = sum(((x.mul_(3) if written else 3 * x) * torch.linspace(1, 2, x.numel()).view(x.shape)).sum() for x in results)
        assert isinstance(total, Tensor)
        leaves = [tensors[key] for key in entry.floats]
        return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))

    want = gradients(written=False)
    if name in KEPT and (name, way) != ("graph_attention", "dense"):  # which is made of the map
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*is output \d of [A-Z]"):
            gradients(written=True)
        return
    for got, exact in zip(gradients(written=True), want, strict=True):
        assert float((got - exact).abs().max()) <= RTOL * max(float(exact.abs().max()), 1e-6)
