"""`network_mse` as a GPU computes it: its operators by the launchers, of all networks at once."""

from __future__ import annotations

import pytest
import torch

from cellattn import reference
from cellattn.kernels import masked_spmm as kernels
from cellattn.ops.network_mse import _at_once

from ..compare import random_graph

N, D = 9, 8
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("zero_weight", [[0.5, 0.5], [0.1, 1.0]], ids=["one weight", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_by_launchers(dtype: torch.dtype, zero_weight: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("masked_spmm", "masked_sddmm"):
        monkeypatch.setattr(torch.ops.cellattn, name, getattr(kernels, name))
    graph = random_graph(N, {"a": 30, "b": 12}, weighted=True)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, *shape, generator=g).to(dtype).requires_grad_() for shape in ((N, D), (N, D), (N,))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = _at_once(inputs[0], inputs[1], inputs[2], graph, ["a", "b"], zero_weight, None)
    want = torch.stack(
        [
            reference.network_mse(exact[0][i], exact[1][i], exact[2][i], graph, name, zero_weight=zero_weight[i])
            for i, name in enumerate(graph.relations)
        ]
    )
    assert got.dtype == torch.float32
    got.sum().backward()
    want.sum().backward()
    # sums of at most 30 edges of D products, each of which is below the largest loss by much
    assert float((got - want).detach().abs().max()) <= 100 * EPS * float(want.detach().max())
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.dtype == dtype
        bound = 100 * EPS + torch.finfo(dtype).eps
        assert float((x.grad - y.grad).abs().max()) <= bound * float(y.grad.abs().max())
