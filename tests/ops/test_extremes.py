"""Weights of edges, scales and losses of any size: in float32 what is finite in float64, and what it has, infinity.

Scores of 1e36 are in float32's range, and so are weights of 1e29, but not every product of two such numbers on the way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference
from cellattn.ops import _dense

from ..compare import typed_graph, values_and_grads

N, D = 7, 4
EDGES = torch.tensor([[0, 0, 1, 3, 3, 4, 5, 5, 5], [1, 4, 1, 0, 5, 2, 2, 0, 6]])
VALUE = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
WEIGHT = 0.5 + torch.arange(EDGES.shape[1], dtype=torch.float64) / 8
INDEX, PTR = torch.tensor([3, 5, 1, 0]), torch.tensor([0, 2, 3, 3, 4, 4, 4, 4])
# Roundings of a float32 in a sum over 7 tokens of sums over 4 features, and what a factor and its power of two add: 30 at most,
# of the largest term. A formula that is off by one part in 10,000 is off by 800.
ROUNDINGS = 30 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, params=["streamed", "dense"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "streamed":
        monkeypatch.setattr(_dense, "LARGEST", 0)


def graph_of(size: float) -> MultiGraph:
    return MultiGraph.from_edge_index({"a": EDGES}, N, edge_weight={"a": (size * WEIGHT).float()})


def draw(*sizes: float) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [size * torch.randn(N, D, generator=g) for size in sizes]


def assert_as_in_float64(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: Tensor, score: float) -> None:
    """Values, off by the roundings of a score, and gradients, by those of their largest entry."""
    got, want = values_and_grads(ours, *inputs), values_and_grads(theirs, *(x.double() for x in inputs))
    for ours_, exact in zip(got[0], want[0], strict=True):
        assert float((ours_ - exact).abs().max()) <= ROUNDINGS * max(score, float(exact.abs().max()))
    for ours_, exact in zip(got[1], want[1], strict=True):
        assert float((ours_ - exact).abs().max()) <= ROUNDINGS * max(1.0, min(score, 1e3)) * float(exact.abs().max())


def score_of(q: Tensor, k: Tensor, scale: float) -> float:
    return abs(scale) * float((q.double().abs() @ k.double().abs().mT).max())


@pytest.mark.parametrize("over", ["tokens", "valid"])
@pytest.mark.parametrize("size", [1e-29, 1e-12, 1.0, 1e12, 1e19, 1e29])
def test_kl_of_weights_of_any_size(size: float, over: str) -> None:
    graph = graph_of(size)
    for of_q, reduction in itertools.product((1.0, 1e5, 1e10, 1e18), ("mean", "none")):
        q, k = draw(of_q, of_q)
        options: dict[str, Any] = {"over": over, "reduction": reduction}
        assert_as_in_float64(
            lambda q, k, o=options: cellattn.attention_kl(q, k, graph, "a", **o),
            lambda q, k, o=options: reference.attention_kl(q, k, graph, "a", **o),
            q, k, score=score_of(q, k, D**-0.5),
        )  # fmt: skip


def test_rows_of_one_graph_may_differ_by_all_that_is_allowed() -> None:
    weight = torch.where(EDGES[0] < 3, 1e-28, torch.where(EDGES[0] == 5, 1e28, 1.0)) * WEIGHT
    graph = MultiGraph.from_edge_index({"a": EDGES, "b": EDGES.flip(0)}, N, edge_weight={"a": weight.float()})
    assert graph.scaled.unit is not None
    assert graph.scaled.unit[1].eq(1).all()
    mantissa = torch.frexp(graph.scaled.unit)[0]
    assert mantissa.eq(0.5).all(), "a power of two, so that nothing is rounded"
    q, k = draw(1e9, 1e9)
    for rows in (None, torch.tensor([5, 0, 3, 5])):

        def ours(q: Tensor, k: Tensor, rows: Tensor | None = rows) -> Any:
            ties = [("a", 0), ("b", 0)]
            return cellattn.graph_attention(q[None], k[None], k[None], graph, ties, rows=rows, num_prefix=0)[1]

        def theirs(q: Tensor, k: Tensor, rows: Tensor | None = rows) -> Any:
            return tuple(reference.attention_kl(q, k, graph, name, rows=rows) for name in "ab")

        assert_as_in_float64(ours, theirs, q, k, score=score_of(q, k, D**-0.5))


def test_weights_of_usual_size_are_not_copied() -> None:
    graph = graph_of(1.0)
    assert graph.scaled.unit is None
    assert graph.scaled.by_row is graph.stacked[2]
    assert graph.scaled.by_column is graph.stacked_by_column()[2]


@pytest.mark.parametrize("diagonal", [False, True], ids=["off", "diagonal"])
@pytest.mark.parametrize(
    ("of_edges", "of_terms"), [(1e10, 1.0), (1e14, 1.0), (1e-14, 1.0), (1.0, 1e25), (1e14, 1e-25), (1e-14, 1e25), (1e20, 1e-30)]
)
def test_kl_of_comembership_of_weights_of_any_size(of_edges: float, of_terms: float, diagonal: bool) -> None:
    graph = typed_graph({"gene": N, "term": 4}, {"of": ("gene", "term", 14)})
    weight = {"of": (of_edges * graph.weight("of").double()).float()}
    graph = MultiGraph.from_edge_index(
        {"of": graph.edge_index("of")}, graph.num_nodes, edge_weight=weight, node_types={"gene": N, "term": 4},
        joins={"of": ("gene", "term")},
    )  # fmt: skip
    target = graph.comembership("of", weight=of_terms * torch.tensor([0.5, 1.0, 2.0, 1.5]).double(), diagonal=diagonal)
    for of_q in (1.0, 1e9, 1e18):
        q, k = draw(of_q, of_q)
        assert_as_in_float64(
            lambda q, k: cellattn.attention_kl_comembership(q, k, target, reduction="none"),
            lambda q, k: reference.attention_kl_comembership(q, k, target, reduction="none"),
            q, k, score=4 * score_of(q, k, D**-0.5),  # what is taken off the sums is of the size of what stays
        )  # fmt: skip


@pytest.mark.parametrize(
    ("of_edges", "of_terms"), [(1.0, 1e10), (1.0, 1e28), (1e10, 1.0), (1e10, 1e8), (1e14, 1.0), (1e-10, 1e28)]
)
def test_kl_of_comembership_of_light_rows_beside_heavy_ones(of_edges: float, of_terms: float) -> None:
    """Genes 0 to 2 share terms that weigh much, genes 3 to 5 others that weigh little: neither counts for the other."""
    genes = torch.arange(6).repeat_interleave(2)
    terms = 6 + torch.arange(4).view(2, 2).repeat_interleave(3, 0).flatten()
    size = torch.tensor([of_edges, 1 / of_edges]).repeat_interleave(6) * (1 + torch.arange(12) / 8)
    graph = MultiGraph.from_edge_index(
        {"of": torch.stack([genes, terms])}, 10, edge_weight={"of": size.float()}, node_types={"gene": 6, "term": 4},
        joins={"of": ("gene", "term")},
    )  # fmt: skip
    weight = torch.tensor([of_terms, of_terms, 1 / of_terms, 1 / of_terms], dtype=torch.float64)
    target = graph.comembership("of", weight=weight)
    q, k = (x.repeat(2, 1)[:10] for x in draw(1.0, 1.0))
    assert_as_in_float64(
        lambda q, k: cellattn.attention_kl_comembership(q, k, target, reduction="none"),
        lambda q, k: reference.attention_kl_comembership(q, k, target, reduction="none"),
        q, k, score=4 * score_of(q, k, D**-0.5),
    )  # fmt: skip


Call = Callable[[Any, Tensor, Tensor, float], Any]
OF_SCALE: dict[str, Call] = {
    "attention": lambda module, q, k, scale: module.attention(q, k, VALUE.to(q), scale=scale),
    "attention_kl": lambda module, q, k, scale: module.attention_kl(q, k, graph_of(1.0), "a", scale=scale),
    "attention_kl valid": lambda module, q, k, scale: module.attention_kl(q, k, graph_of(1.0), "a", scale=scale, over="valid"),
    "attention_bce": lambda module, q, k, scale: module.attention_bce(q, k, graph_of(1.0), "a", scale=scale),
    "attention_bce sigmoid": lambda module, q, k, scale: module.attention_bce(
        q, k, graph_of(1.0), "a", scale=scale, link="sigmoid"
    ),
    "edge_attention": lambda module, q, k, scale: module.edge_attention(
        q[None], k[None], VALUE.to(q)[None], graph_of(1.0), [("a", 0)], num_prefix=0, scale=scale
    ),
    "perturbation_attention": lambda module, q, k, scale: module.perturbation_attention(
        q, k, VALUE.to(q), INDEX, PTR, VALUE[:4].to(q) / 2, scale=scale
    ),
}


@pytest.mark.parametrize("name", OF_SCALE)
@pytest.mark.parametrize(
    ("of_q", "of_k", "scale"),
    [
        (1e20, 1e20, 1e-40), (1e30, 1.0, -1e-30), (1e25, 1e13, 3e-39),
        (1e-20, 1e-20, 1e40), (1e-30, 1.0, 1e30), (1e-25, 1e-25, -1e50),
    ],
)  # fmt: skip
def test_scales_of_any_size(name: str, of_q: float, of_k: float, scale: float) -> None:
    """Ordinary scores of products that float32 does not hold."""
    call, (q, k) = OF_SCALE[name], draw(of_q, of_k)
    assert_as_in_float64(
        lambda q, k: call(cellattn, q, k, scale), lambda q, k: call(reference, q, k, scale), q, k, score=score_of(q, k, scale)
    )


def test_a_scale_that_float16_has_no_room_for_is_refused() -> None:
    q = torch.ones(3, 2, dtype=torch.float16)
    assert cellattn.attention(q, q, q, scale=1e-30)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"scale: expected at most 3\.40282e\+38 in size beside float16, got 1e\+39"):
        cellattn.attention(q, q, q, scale=1e39)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_a_row_of_bce_beyond_float32_is_infinite_and_so_is_a_mean_of_it(link: str) -> None:
    """Each pair's loss is below 2^128, the sum of a row is not; in float64 it is."""
    q, k = torch.full((N, 1), 1e19), torch.full((N, 1), -1.5e19)
    k[2] *= -1  # all rows are at gene 2, whose edges cost nothing
    options: dict[str, Any] = {"link": link, "target": "binary", "scale": 1.0}
    graph = graph_of(1.0)
    exact = reference.attention_bce(q.double(), k.double(), graph, "a", reduction="none", **options)
    beyond = exact > torch.finfo(torch.float32).max
    rows = cellattn.attention_bce(q, k, graph, "a", reduction="none", **options)
    assert beyond.any()
    assert not beyond.all()
    assert torch.equal(rows.isinf(), beyond)
    for reduction in ("mean", "sum"):
        assert cellattn.attention_bce(q, k, graph, "a", reduction=reduction, **options) == torch.inf
