"""Operators choose the dtype of their arithmetic: autocast around them changes no result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import cellattn

from ..compare import everything, leaves, random_graph


def test_autocast_does_not_reach_into_operators() -> None:
    graph = random_graph(30, {"a": 200, "b": 90}, weighted=True)
    inputs = leaves((2, 31, 8), (2, 31, 8), (2, 31, 8), dtype=torch.float32)
    index, ptr = torch.tensor([1, 5, 3]), torch.tensor([0, 2, 3])

    def step(q, k, v):
        out, kl = cellattn.graph_attention(q, k, v, graph, [("a", 0), ("b", 1)])
        _, bce = cellattn.graph_attention(q, k, v, graph, [("a", 0)], loss="bce")
        z = cellattn.perturbation_attention(q[:, :2], k, v, index, ptr, v[:, :3])
        sent = cellattn.relational_spmm(graph, k[0, 1:], index, ptr, index, ptr, scale=torch.ones(3, 2), shared=True)
        return out, *kl, *bce, z, sent

    def cast(*x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(*x)

    for a, b in zip(everything(step, *inputs), everything(cast, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", [cellattn.attention_kl, cellattn.attention_bce], ids=lambda loss: loss.__name__)
def test_a_backward_that_is_called_under_it(loss: Callable[..., torch.Tensor]) -> None:
    """Of a map that is made of PyTorch's own operations."""
    graph = random_graph(30, {"a": 200})
    q, k = leaves((31, 8), (31, 8), dtype=torch.float32)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(q, k, graph, "a", num_prefix=1), (q, k))

    want = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_queries_of_a_linear_and_keys_of_a_norm() -> None:
    """Under autocast one is bfloat16 and one float32: both become what autocast has for a product."""
    graph = random_graph(20, {"a": 60})
    x = torch.randn(2, 21, 8, requires_grad=True)
    linear, norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

    def call(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        losses = [loss(q[0], k[0], graph, "a", num_prefix=1) for loss in (cellattn.attention_kl, cellattn.attention_bce)]
        return [
            *cellattn.attention(q, k, k), cellattn.attention_logsumexp(q, k), *losses,
            cellattn.graph_attention(q, k, k, graph, [("a", 1)])[0],
            cellattn.edge_attention(q, k, k, graph, [("a", 0), ("a", 1)])[0],
        ]  # fmt: skip

    with torch.autocast("cpu", torch.bfloat16):
        q, k = linear(x), norm(x)
        assert (q.dtype, k.dtype) == (torch.bfloat16, torch.float32)
        got = call(q, k)
    for mine, want in zip(got, call(q, k.bfloat16()), strict=True):
        assert torch.equal(mine, want)
    torch.stack([y.float().sum() for y in got]).sum().backward()
    assert norm.weight.grad is not None
    with pytest.raises(ValueError, match="k: expected the dtype of q"):
        cellattn.attention(q, k, k)
