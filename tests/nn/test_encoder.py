from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cellattn.nn import CellEncoder
from cellattn.nn.encoder import EncoderLayer

from ..compare import cell_with_terms
from . import dense

N, DIM = 14, 8
GRAPH = dense.random_graph(N, {"physical": 40, "regulatory": 11})
TIES = ((0, 1, "physical", 0.1), (1, 0, "regulatory", 0.02), (0, 0, "physical", 0.0), (1, 0, "physical", 3.0))


def encoder(num_layers: int = 2, **options: Any) -> CellEncoder:
    torch.manual_seed(0)
    return CellEncoder(DIM, num_layers, 2, **{"ties": TIES, **options}).double()


def tokens(*lead: int) -> torch.Tensor:
    return torch.randn(*lead, N, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_dense(norm: str) -> None:
    model = encoder(norm=norm).eval()
    x = tokens().requires_grad_()
    results = []
    for h_cls, h, losses in (model(x, GRAPH), dense.encode(model, x, GRAPH)):
        total = h_cls.square().sum() + h.pow(3).sum() + model.regularization(losses)
        grads = torch.autograd.grad(total, [x, *model.parameters()])
        results.append((h_cls, h, losses, grads))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)  # float64, sums of about 1e3 terms


def test_tokens_of_several_types() -> None:
    """Terms are tokens behind the genes: a head is tied from genes to terms as another is between genes."""
    graph = cell_with_terms(9, 5)
    kinds = (("annotated", 0), ("members", 1), ("physical", 1), ("is_a", 0))
    model = encoder(ties=[(layer, head, relation, 0.1) for layer in (0, 1) for relation, head in kinds]).eval()
    results = []
    for h_cls, h, losses in (model(tokens(), graph), dense.encode(model, tokens(), graph)):
        total = h_cls.square().sum() + h.pow(3).sum() + model.regularization(losses)
        results.append((h_cls, h, losses, torch.autograd.grad(total, list(model.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    order = torch.cat([torch.randperm(9), 9 + torch.randperm(5)])  # each type within itself
    masked = encoder(ties=[(0, 0, "annotated", 1.0)], masks=[(0, 1, "members"), (1, 0, "annotated")]).eval()
    _, h, losses = masked(tokens(), graph)
    _, other_h, other_losses = masked(tokens()[order], graph.subgraph(order))
    torch.testing.assert_close((other_h, other_losses), (h[order], losses))


SHARED = {"loss": "kl_comembership"}
MIXED = [  # genes by their terms, terms by their genes, and edges
    (0, 0, "annotated", 0.1, SHARED),
    (0, 1, "physical", 0.3),
    (1, 0, "members", 2.0, {**SHARED, "diagonal": True}),
    (1, 1, "annotated", 0.2, SHARED),
    (0, 1, "annotated", 0.4, {"loss": "kl"}),
]


@pytest.mark.parametrize(
    "options", [{"ties": MIXED}, {"ties": [tie[:4] for tie in MIXED[2:4]], **SHARED}], ids=["own options", "of all ties"]
)
def test_comembership_as_a_tie(options: dict[str, Any]) -> None:
    """By name beside other ties, against dense maps and a dense target: values and all gradients."""
    graph = cell_with_terms(9, 5)
    model = encoder(**options).eval()
    x = tokens().requires_grad_()
    results = []
    for h_cls, h, losses in (model(x, graph), dense.encode(model, x, graph)):
        total = h_cls.square().sum() + h.pow(3).sum() + model.regularization(losses)
        results.append((h_cls, h, losses, torch.autograd.grad(total, [x, *model.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    assert next(iter(results[0][2])) == next(iter(model.weights))
    assert "kl_comembership/layer1/head1/annotated" in model.weights


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradients_reach_every_parameter(norm: str) -> None:
    model = encoder(norm=norm)
    h_cls, h, losses = model(tokens(), GRAPH)
    (h_cls.pow(3).sum() + h.pow(3).sum() + model.regularization(losses)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_shapes(num_layers: int, lead: tuple[int, ...]) -> None:
    ties = [tie for tie in TIES if tie[0] < num_layers]
    h_cls, h, losses = encoder(num_layers, ties=ties)(tokens(*lead), GRAPH)
    assert h_cls.shape == (*lead, DIM)
    assert h.shape == (*lead, N, DIM)
    assert list(losses) == [f"kl/layer{layer}/head{head}/{relation}" for layer, head, relation, _ in ties]
    assert all(loss.shape == () for loss in losses.values())


def test_lambda_enters_once() -> None:
    model = encoder(dropout=0.0)
    _, _, losses = model(tokens(), GRAPH)
    assert model.weights == {
        "kl/layer0/head1/physical": 0.1,
        "kl/layer1/head0/regulatory": 0.02,
        "kl/layer0/head0/physical": 0.0,
        "kl/layer1/head0/physical": 3.0,
    }
    expected = sum(model.weights[name] * loss.item() for name, loss in losses.items())
    assert model.regularization(losses).item() == pytest.approx(expected, rel=1e-12)
    # the losses do not depend on the weights, and one weight scales its own term alone
    doubled = encoder(dropout=0.0, ties=[(*tie[:3], 2 * tie[3]) for tie in TIES])
    _, _, same = doubled(tokens(), GRAPH)
    torch.testing.assert_close(losses, same, rtol=0, atol=0)
    assert doubled.regularization(same).item() == pytest.approx(2 * expected, rel=1e-12)


def test_without_ties() -> None:
    model = encoder(ties=())
    _, _, losses = model(tokens())
    assert losses == {}
    assert model.regularization(losses).shape == ()
    assert float(model.regularization(losses)) == 0.0


def test_dropout_is_outside_the_attention_map() -> None:
    model = encoder(1, ties=[(0, 0, "physical", 1.0)], dropout=0.5)
    losses = [model(tokens(), GRAPH)[2]["kl/layer0/head0/physical"] for _ in range(2)]
    outputs = [model(tokens(), GRAPH)[1] for _ in range(2)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert not torch.equal(outputs[0], outputs[1])


def test_dropout_inside_the_ffn() -> None:
    model = encoder(1, ties=[], dropout=0.0, ffn_dropout=0.25)
    layer = model.layers[0]
    assert isinstance(layer, EncoderLayer)
    first, _, second = layer.ffn
    x = tokens()
    torch.manual_seed(0)
    got = layer.ffn(x)
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(torch.ones(N, 4 * DIM, dtype=x.dtype), 0.25)
    assert 0.1 < (kept == 0).double().mean() < 0.4
    want = second(torch.nn.functional.gelu(first(x)) * kept)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    without = encoder(1, ties=[], dropout=0.0)
    without.load_state_dict(model.state_dict())
    before = torch.get_rng_state()
    torch.testing.assert_close(without(x)[1], model.eval()(x)[1], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_identity_does_not_come_from_position() -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    model = encoder().eval()
    h_cls, h, losses = model(tokens(), GRAPH)
    other_cls, other_h, other_losses = model(tokens()[order], GRAPH.subgraph(order))
    torch.testing.assert_close((other_cls, other_h, other_losses), (h_cls, h[order], losses))


def test_bce() -> None:
    model = encoder(loss="bce", target="binary", link="sigmoid")
    _, _, losses = model(tokens(), GRAPH)
    assert next(iter(losses)) == "bce/layer0/head1/physical"
    assert all(loss.item() > 0 for loss in losses.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_layers": -1}, ValueError, "num_layers: expected at least 0, got -1"),
        ({"norm": "mid"}, ValueError, "norm: unknown value 'mid'"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"ffn_dropout": 1.5}, ValueError, r"ffn_dropout: expected a probability in \[0, 1\), got 1.5"),
        ({"dropout": None}, TypeError, "dropout: expected a number, got NoneType None"),
        ({"ffn_dim": 0}, ValueError, "ffn_dim: expected at least 1, got 0"),
        ({"num_prefix": 2}, TypeError, "num_prefix: no such option"),
        ({"reduction": "none"}, ValueError, "reduction: unknown value 'none'"),
        ({"diagonal": 1}, TypeError, "diagonal: expected a bool, got int 1"),
        ({"ties": [(2, 0, "physical", 1.0)]}, ValueError, "ties: entry 0: expected a layer below 2, got 2"),
        ({"ties": [(0, 2, "physical", 1.0)]}, ValueError, "ties: entry 0: expected a head below 2, got 2"),
        ({"ties": [(0, 0, "physical", -1.0)]}, ValueError, "ties: entry 0: weight: expected a finite number.*got -1.0"),
        ({"ties": [(0, 0, "physical", math.nan)]}, ValueError, "ties: entry 0: weight: expected a finite.*got nan"),
        ({"ties": [(0, 0, "physical", "1")]}, TypeError, "ties: entry 0: weight: expected a number, got str '1'"),
        ({"ties": [(0, 0, "a", 1.0), (0, 0, "a", 2.0)]}, ValueError, r"ties: entry 1:.*\(0, 0, 'a'\) are listed twice"),
    ],
    ids=str,
)
def test_bad_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CellEncoder(**{"dim": DIM, "num_layers": 2, "num_heads": 2, **options})


def test_unknown_relation() -> None:
    with pytest.raises(ValueError, match=r"'regulatoy'.*did you mean 'regulatory'"):
        encoder(ties=[(1, 0, "regulatoy", 1.0)])(tokens(), GRAPH)


def test_ties_with_options_of_their_own() -> None:
    """Each tie's loss is what an encoder gives whose ties all have its options; the names say which loss it is."""
    torch.manual_seed(0)
    graph = dense.random_graph(20, {"a": 60, "b": 40})
    plain: list[tuple[int, int, str, float]] = [(0, 0, "a", 1.0), (0, 1, "b", 2.0), (1, 1, "a", 3.0)]
    own: list[dict[str, Any]] = [{}, {"loss": "bce", "target": "binary", "reduction": "sum"}, {"over": "valid"}]
    ties = [(*tie, options) for tie, options in zip(plain, own, strict=True)]
    encoder = CellEncoder(16, 2, 2, ties=ties, dropout=0.0).double()
    x = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    rows = {"a": torch.tensor([3, 1])}
    *hidden, losses = encoder(x, graph, rows=rows)
    assert list(losses) == ["kl/layer0/head0/a", "bce/layer0/head1/b", "kl/layer1/head1/a"]
    assert list(encoder.weights.values()) == [1.0, 2.0, 3.0]
    for position, (name, options) in enumerate(zip(losses, own, strict=True)):
        other = CellEncoder(16, 2, 2, ties=plain, dropout=0.0, **options).double()
        other.load_state_dict(encoder.state_dict())
        *other_hidden, all_losses = other(x, graph, rows=rows)
        expected = list(all_losses.values())[position]
        torch.testing.assert_close(losses[name], expected, rtol=1e-9, atol=0)
        for mine, others in zip(hidden, other_hidden, strict=True):
            torch.testing.assert_close(mine, others, rtol=1e-9, atol=1e-12)
        (mine,), (others,) = (torch.autograd.grad(y, x, retain_graph=True) for y in (losses[name], expected))
        torch.testing.assert_close(mine, others, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("tie", "error", "words"),
    [
        ((0, 0, "a"), ValueError, r"ties: entry 0: expected \(layer, head, relation, weight"),
        ((0, 0, "a", 1.0, "bce"), TypeError, "ties: entry 0: expected a dict of options, got str 'bce'"),
        ((0, 0, "a", 1.0, {"loss": "mse"}), ValueError, "loss: unknown value 'mse'"),
        ((0, 0, "a", 1.0, {"reduction": "none"}), ValueError, "reduction: unknown value 'none'"),
        ((0, 0, "a", 1.0, {"lambda": 1}), TypeError, "lambda: no such option"),
    ],
)
def test_options_that_are_none(tie: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CellEncoder(16, 1, 2, ties=[tie])


def test_rezero() -> None:
    """Layers without norms, of branches that are scaled: the sum written out, and x at the start."""
    layer_norm = CellEncoder(DIM, 2, 2, norm="rezero", dropout=0.0, ties=[(1, 0, "physical", 0.5)]).double()
    assert not any("norm" in name for name, _ in layer_norm.named_parameters())
    x = tokens()
    h_cls, h, _ = layer_norm(x, GRAPH)
    assert torch.equal(h, x)
    assert torch.equal(h_cls, layer_norm.cls)
    want = torch.cat([h_cls[None], x])
    for layer, scales in zip(layer_norm.layers, ((0.3, -0.7), (1.5, 0.2)), strict=True):
        assert isinstance(layer, EncoderLayer)
        assert layer.rezero is not None
        layer.rezero.data = torch.tensor(scales, dtype=torch.float64)
        want = want + scales[0] * layer.attention(want, GRAPH)[0]
        want = want + scales[1] * layer.ffn(want)
    h_cls, h, losses = layer_norm(x, GRAPH)
    torch.testing.assert_close(torch.cat([h_cls[None], h]), want, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(h.square().sum() + sum(losses.values()), list(layer_norm.parameters()))
    assert all(g.isfinite().all() for g in grads)
