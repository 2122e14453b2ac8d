"""Free, tied and masked heads in one layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cellattn import reference
from cellattn.nn import CellEncoder, CellTransformer, GraphRegularizedAttention

from ..compare import random_graph

GRAPH = random_graph(20, {"a": 60, "b": 40}, weighted=True)
MASKS = [("a", 1), ("b", 3), ("a", 3)]


def test_each_head_is_that_of_its_kind() -> None:
    """Heads 0 and 4 are free, 2 is tied, 1 and 3 see their graphs alone; head by head as the definitions have it."""
    torch.manual_seed(0)
    layer = GraphRegularizedAttention(10, 5, ties=[("b", 2)], masks=MASKS).double()
    x = torch.randn(2, 21, 10, dtype=torch.float64)
    q, k, v = layer.project(x)
    want, _ = reference.attention(q, k, v)
    want = want.detach().clone()
    own = [1, 3]
    masked, _ = reference.edge_attention(q[:, own], k[:, own], v[:, own], GRAPH, [("a", 0), ("b", 1), ("a", 1)])
    want[:, [1, 3]] = masked.detach()
    y, (loss,) = layer(x, GRAPH)
    torch.testing.assert_close(y, layer.out(want.transpose(1, 2).flatten(2)), rtol=1e-9, atol=1e-12)
    tied = reference.attention_kl(q[:, 2], k[:, 2], GRAPH, "b", num_prefix=1)
    torch.testing.assert_close(loss, tied, rtol=1e-9, atol=1e-12)


def test_dropout_is_of_every_kind_of_head() -> None:
    """In training alone: of masked heads by the first draw, of the others by the second; the losses see no dropout."""
    torch.manual_seed(0)
    layer = GraphRegularizedAttention(10, 5, ties=[("b", 2)], masks=MASKS, dropout_p=0.4).double()
    layer.out = torch.nn.Linear(10, 10, bias=False).double()
    layer.out.weight.data = torch.eye(10, dtype=torch.float64)  # heads side by side
    x = torch.randn(2, 21, 10, dtype=torch.float64)
    y, (loss,) = layer(x, GRAPH, generator=torch.Generator().manual_seed(5))
    kept, (same,) = layer.eval()(x, GRAPH)
    by_head, of_eval = (z.unflatten(-1, (5, 2)) for z in (y, kept))
    assert all(not torch.allclose(by_head[..., head, :], of_eval[..., head, :]) for head in range(5))
    generator = torch.Generator().manual_seed(5)
    masked, seeing = [1, 3], [0, 2, 4]
    q, k, v = (z[:, masked] for z in layer.project(x))
    heads = [("a", 0), ("b", 1), ("a", 1)]
    want, _ = reference.edge_attention(q, k, v, GRAPH, heads, dropout_p=0.4, generator=generator)
    torch.testing.assert_close(by_head[..., masked, :], want.transpose(1, 2), rtol=1e-9, atol=1e-12)
    q, k, v = (z[:, seeing] for z in layer.project(x))
    want, _ = reference.attention(q, k, v, dropout_p=0.4, generator=generator)
    torch.testing.assert_close(by_head[..., seeing, :], want.transpose(1, 2), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, same, rtol=1e-12, atol=0)


def test_all_heads_masked() -> None:
    layer = GraphRegularizedAttention(4, 2, masks=[("a", 0), ("b", 1)]).double()
    x = torch.randn(21, 4, dtype=torch.float64, requires_grad=True)
    y, losses = layer(x, GRAPH)
    assert losses == ()
    y.sum().backward()
    assert x.grad is not None
    with pytest.raises(TypeError, match="graph: expected a MultiGraph, since heads are tied or masked, got NoneType None"):
        layer(x)


def test_the_encoder_and_the_transformer_take_masks() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"ties": [(0, 0, "a", 1.0)], "masks": [(0, 1, "b"), (1, 0, "a")], "dropout": 0.0}
    encoder = CellEncoder(8, 2, 2, **options).double()
    x = torch.randn(20, 8, dtype=torch.float64)
    _, h, losses = encoder(x, GRAPH)
    assert list(losses) == ["kl/layer0/head0/a"]
    free = CellEncoder(8, 2, 2, ties=options["ties"], dropout=0.0).double()
    free.load_state_dict(encoder.state_dict())
    assert not torch.allclose(free(x, GRAPH)[1], h)
    model = CellTransformer(8, 2, 2, num_types=2, num_genes=20, **options)
    assert model.encoder.masks == tuple(options["masks"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ties": [("a", 1)], "masks": [("b", 1)]}, ValueError, r"masks: expected heads without a tie, got \[1\] in both"),
        ({"masks": [("a", 2)]}, ValueError, "masks: entry 0: expected a head below 2, got 2"),
        ({"masks": [("a", 0), ("a", 0)]}, ValueError, r"masks: entry 1: \('a', 0\) is listed twice"),
        ({"masks": [(3, 0)]}, TypeError, "masks: entry 0: expected a relation's name, got int 3"),
    ],
)
def test_bad_masks(options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        GraphRegularizedAttention(4, 2, **options)


def test_masks_name_a_layer_that_there_is() -> None:
    with pytest.raises(ValueError, match="masks: entry 0: expected a layer below 1, got 1"):
        CellEncoder(4, 1, 2, masks=[(1, 0, "a")])
