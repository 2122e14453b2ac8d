"""A prior's weight in the units of a dense sum over rows: losses and gradients of a model of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cellattn import MultiGraph, reference
from cellattn.nn import CellEncoder, weight_from_row_sum

from ..compare import random_graph

N, LAMBDA = 30, 0.7


def graph() -> MultiGraph:
    return random_graph(N, {"a": 90, "b": 7}, weighted=True)


def dense_term(encoder: CellEncoder, g: MultiGraph, relation: str, head: int, x: torch.Tensor, rows: Any = None) -> Any:
    """A sum over rows, as `batchmean` of a batch of one gives it, divided by the edges a gene."""
    layer: Any = encoder.layers[0]
    tokens = torch.cat([encoder.cls[None], x])
    q, k, _ = layer.attention.project(layer.norm1(tokens))
    alpha = (q[head] @ k[head].T * q.shape[-1] ** -0.5).softmax(-1)[1:, 1:]
    target = reference.target(g, relation)[0]
    if rows is not None:
        alpha, target = alpha[rows], target[rows]
    total = F.kl_div(alpha.log()[None], target[None], reduction="batchmean")
    return LAMBDA * total / (g.num_edges(relation) / g.num_nodes)


@pytest.mark.parametrize("sampled", [False, True], ids=["all-rows", "sampled"])
def test_losses_and_gradients_are_equal(sampled: bool) -> None:
    torch.manual_seed(0)
    g = graph()
    rows = {name: (g.degree(name) > 0).nonzero()[:3, 0] for name in g} if sampled else None
    ties = [
        (0, head, name, weight_from_row_sum(LAMBDA, g, name, num_rows=3 if sampled else None)) for head, name in enumerate(g)
    ]
    encoder = CellEncoder(16, 1, 2, ties=ties, dropout=0.0).double()
    x = torch.randn(N, 16, dtype=torch.float64, requires_grad=True)
    ours = encoder.regularization(encoder(x, g, rows=rows)[2])
    theirs = sum(dense_term(encoder, g, name, head, x, None if rows is None else rows[name]) for head, name in enumerate(g))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    inputs = [x, *encoder.layers[0].attention.qkv.parameters()]  # type: ignore[union-attr]
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-12)


def test_other_counts_of_edges() -> None:
    g = graph()
    for num_edges in (1, 60):
        assert weight_from_row_sum(2.0, g, "a", num_rows=4, num_edges=num_edges) == 2.0 * 4 * N / num_edges


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": -1.0}, "weight: expected a finite number of at least 0"),
        ({"relation": "c"}, "relation: unknown value 'c'"),
        ({"num_rows": 0}, "num_rows: expected at least 1"),
        ({"num_rows": N + 1}, "num_rows: expected at most"),
        ({"num_edges": 0}, "num_edges: expected at least one edge"),
    ],
)
def test_bad_input(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        weight_from_row_sum(**{"weight": 1.0, "graph": graph(), "relation": "a", **options})
