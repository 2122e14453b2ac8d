from __future__ import annotations

from typing import Any

import pytest
import torch

from cellattn import graph_attention
from cellattn.nn import GraphRegularizedAttention

from .dense import kl, random_graph

N = 12
GRAPH = random_graph(N, {"physical": 30, "regulatory": 9})
TIES = (("physical", 1), ("regulatory", 0), ("regulatory", 1))


def module(**options: Any) -> GraphRegularizedAttention:
    torch.manual_seed(0)
    return GraphRegularizedAttention(8, 2, **options).double()


@pytest.mark.parametrize("lead", [(), (3,), (2, 1)], ids=str)
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("head_dim", [None, 5], ids=["even", "wide"])
def test_dense(lead: tuple[int, ...], num_prefix: int, head_dim: int | None) -> None:
    attention = module(ties=TIES, num_prefix=num_prefix, head_dim=head_dim)
    x = torch.randn(*lead, num_prefix + N, 8, dtype=torch.float64)
    y, losses = attention(x, GRAPH)
    q, k, v = (part.unflatten(-1, (2, -1)).movedim(-2, 0) for part in attention.qkv(x).chunk(3, dim=-1))
    alpha = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # [H, ..., T, T]
    torch.testing.assert_close(y, attention.out((alpha @ v).movedim(0, -2).flatten(-2)))
    for (relation, head), loss in zip(TIES, losses, strict=True):
        maps = alpha[head, ..., num_prefix:, num_prefix:].reshape(-1, N, N)
        torch.testing.assert_close(loss, torch.stack([kl(one, GRAPH, relation) for one in maps]).mean())


def test_without_ties_needs_no_graph() -> None:
    attention = module()
    x = torch.randn(1 + N, 8, dtype=torch.float64)
    y, losses = attention(x)
    assert losses == ()
    tied = module(ties=TIES)
    torch.testing.assert_close(y, tied(x, GRAPH)[0], rtol=1e-12, atol=1e-12)  # ties add losses, never change y


def test_gradients_reach_every_parameter() -> None:
    attention = module(ties=TIES)
    _, losses = attention(torch.randn(1 + N, 8, dtype=torch.float64), GRAPH)
    sum(losses).backward()
    assert attention.qkv.weight.grad is not None
    head_rows = attention.qkv.weight.grad.unflatten(0, (3, 2, 4)).abs().sum((-1, -2))
    assert (head_rows[:2] > 0).all()  # queries and keys of both tied heads
    assert (head_rows[2] == 0).all()  # a graph loss says nothing about the values


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "kl", "over": "valid"},
        {"loss": "kl", "reduction": "sum"},
        {"loss": "kl", "reduction": "none"},
        {"loss": "bce", "target": "binary", "link": "sigmoid"},
        {"loss": "bce", "num_negatives": 2},
    ],
    ids=str,
)
def test_options_reach_the_op(options: dict[str, Any]) -> None:
    attention = module(ties=TIES, **options)
    x = torch.randn(1 + N, 8, dtype=torch.float64)
    rows = {"physical": torch.tensor([3, 4]), "regulatory": torch.tensor([7])}
    _, losses = attention(x, GRAPH, rows=rows, generator=torch.Generator().manual_seed(1))
    _, expected = graph_attention(
        *attention.project(x), GRAPH, TIES, rows=rows, generator=torch.Generator().manual_seed(1), **options
    )
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: expected at least 1, got 0"),
        ({"dim": 8.0}, TypeError, "dim: expected an int, got float 8.0"),
        ({"num_heads": 3}, ValueError, "num_heads: expected a divisor of dim, 8, got 3"),
        ({"head_dim": 0}, ValueError, "head_dim: expected at least 1, got 0"),
        ({"num_prefix": -1}, ValueError, "num_prefix: expected at least 0, got -1"),
        ({"ties": [("physical", 2)]}, ValueError, "ties: entry 0: expected a head below 2, got 2"),
        ({"ties": [("physical", -1)]}, ValueError, "ties: entry 0: head: expected at least 0, got -1"),
        ({"ties": [("physical", 0), ("physical", 0)]}, ValueError, "ties: entry 1.*listed twice"),
        ({"ties": [(0, 1)]}, TypeError, "ties: entry 0: expected a relation's name, got int 0"),
        ({"loss": "kld"}, ValueError, "loss: unknown value 'kld'.*did you mean 'kl'"),
        ({"over": "token"}, ValueError, "over: unknown value 'token'.*did you mean 'tokens'"),
        ({"num_negatives": 0}, ValueError, "num_negatives: expected at least 1, got 0"),
        ({"drop": 0.1}, TypeError, "drop: no such option"),
    ],
    ids=str,
)
def test_bad_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GraphRegularizedAttention(**{"dim": 8, "num_heads": 2, **options})


def test_bad_input() -> None:
    attention = module(ties=[("physicl", 0)])
    x = torch.randn(1 + N, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"physicl.*did you mean 'physical'"):
        attention(x, GRAPH)
    with pytest.raises(TypeError, match="graph: expected a MultiGraph"):
        attention(x)
    with pytest.raises(ValueError, match=r"x: expected a last dimension of 8, got a float64 tensor of shape \[13, 7\]"):
        attention(x[:, :7], GRAPH)
    with pytest.raises(ValueError, match=r"x: expected at least 2 dimensions, got a float64 tensor of shape \[8\]"):
        attention(x[0], GRAPH)
    with pytest.raises(ValueError, match=r"x: expected the dtype of module, torch\.float64, got torch\.float32"):
        attention(x.float(), GRAPH)
    with pytest.raises(ValueError, match="x: expected dtype"):
        attention(x.long(), GRAPH)
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        attention([1.0], GRAPH)
    with pytest.raises(ValueError, match="12"):  # tokens that do not fit the graph's 12 genes
        module(ties=TIES)(x[1:], GRAPH)
