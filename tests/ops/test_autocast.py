"""Operators choose the dtype of their arithmetic: autocast around them changes no result."""

from __future__ import annotations

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
