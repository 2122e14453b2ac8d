"""Ops on relations that join two types of tokens: against the dense reference, and against the block of the two types alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference
from cellattn.metrics import edge_recovery
from cellattn.ops import _dense
from cellattn.ops._negatives import sample_negatives, sample_negatives_of_graph
from cellattn.ops.network_mse import _at_once, network_mses

from ..compare import assert_same, cell_with_terms, leaves

NUM_GENES, NUM_TERMS = 23, 9
N = NUM_GENES + NUM_TERMS
GRAPH = cell_with_terms(NUM_GENES, NUM_TERMS)
ROWS = {"all": None, "some": [3, 25, 0, 1, 31, 7], "none": [], "twice": [4, 24, 4]}


both_ways = pytest.mark.usefixtures("_both_ways")


@pytest.fixture(params=["streamed", "dense"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small map is made, a large one is streamed."""
    if request.param == "streamed":
        monkeypatch.setattr(_dense, "LARGEST", 0)
        monkeypatch.setattr(_dense, "LARGEST_ATTENTION", 0)


def index_of(rows: str) -> Tensor | None:
    return None if ROWS[rows] is None else torch.tensor(ROWS[rows], dtype=torch.int64)


def same(name: str, *inputs: Tensor, graph: MultiGraph = GRAPH, relation: str, **options: Any) -> None:
    ours, theirs = (getattr(module, name) for module in (cellattn, reference))
    assert_same(lambda *x: ours(*x, graph, relation, **options), lambda *x: theirs(*x, graph, relation, **options), *inputs)


@both_ways
@pytest.mark.parametrize("relation", GRAPH.relations)
@pytest.mark.parametrize("rows", ROWS)
def test_losses_agree_with_the_reference(rows: str, relation: str) -> None:
    for lead, num_prefix, reduction in itertools.product(((), (2,)), (0, 2), ("mean", "sum", "none")):
        q, k = leaves((*lead, num_prefix + N, 8), (*lead, num_prefix + N, 8))
        options: dict[str, Any] = {"rows": index_of(rows), "num_prefix": num_prefix, "reduction": reduction}
        for over in ("tokens", "valid"):
            same("attention_kl", q, k, relation=relation, over=over, **options)
        for target, link in itertools.product(("normalized", "binary"), ("softmax", "sigmoid")):
            same("attention_bce", q, k, relation=relation, target=target, link=link, **options)
    for reduction in ("mean", "sum", "none"):
        same("network_mse", *leaves((N, 8), (N, 8), (N,)), relation=relation, rows=index_of(rows), reduction=reduction)


class Block:
    """A relation as the matrix between the tokens of its two types alone, those that are unknown left out."""

    def __init__(self, relation: str) -> None:
        self.rows, self.columns = (mask(relation).nonzero()[:, 0] for mask in (GRAPH.known_rows, GRAPH.known_columns))
        source, target = GRAPH.joins(relation)
        assert all(int(i) in GRAPH.node_types[source] for i in self.rows)
        assert all(int(j) in GRAPH.node_types[target] for j in self.columns)
        self.a = reference.adjacency(GRAPH, relation)[self.rows][:, self.columns]
        assert self.a.sum() == GRAPH.weight(relation).double().sum(), "no edge is anywhere else"
        self.t = torch.where(self.a > 0, self.a / self.a.sum(1, keepdim=True), 0)
        self.counted = self.a.sum(1) > 0
        assert not bool(self.counted.all()) or relation == "physical" or int(self.counted.sum()) > 5


@both_ways
@pytest.mark.parametrize("relation", GRAPH.relations)
def test_over_valid_is_attention_between_two_types(relation: str) -> None:
    """As if queries were those of the one type and keys those of the other, and there were no more."""
    q, k = leaves((1 + N, 8), (1 + N, 8))
    block = Block(relation)
    log_a = (q[1 + block.rows] @ k[1 + block.columns].T / 8**0.5).log_softmax(-1)
    kl = F.kl_div(log_a[block.counted], block.t[block.counted], reduction="batchmean")
    got = cellattn.attention_kl(q, k, GRAPH, relation, over="valid", num_prefix=1)
    torch.testing.assert_close(got, kl, rtol=1e-10, atol=0)


@both_ways
@pytest.mark.parametrize("relation", GRAPH.relations)
def test_bce_of_all_valid_pairs_is_that_of_the_block(relation: str) -> None:
    q, k = leaves((N, 8), (N, 8))
    block = Block(relation)
    scores = (q[block.rows] @ k[block.columns].T)[block.counted]
    expected = F.binary_cross_entropy_with_logits(scores, (block.a[block.counted] > 0).double(), reduction="sum")
    got = cellattn.attention_bce(q, k, GRAPH, relation, target="binary", link="sigmoid", scale=1.0, reduction="sum")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("relation", GRAPH.relations)
def test_network_mse_is_that_of_the_block(relation: str) -> None:
    z, w, b = leaves((N, 8), (N, 8), (N,))
    block = Block(relation)
    made = F.linear(z[block.rows], w[block.columns], b[block.columns])
    got = cellattn.network_mse(z, w, b, GRAPH, relation, zero_weight=1.0)
    torch.testing.assert_close(got, F.mse_loss(made, block.a), rtol=1e-10, atol=0)


def test_networks_at_once() -> None:
    inputs = leaves((4, N, 8), (4, N, 8), (4, N))
    rows = [torch.tensor([3, 25, 0, 1, 31, 7]), torch.tensor([5, 1]), torch.tensor([24, 30, 24]), torch.tensor([31])]

    def in_turn(z: Tensor, w: Tensor, b: Tensor, chosen: list[Tensor] | None) -> Tensor:
        return torch.stack(
            [
                reference.network_mse(z[i], w[i], b[i], GRAPH, name, rows=None if chosen is None else chosen[i])
                for i, name in enumerate(GRAPH.relations)
            ]
        )

    for op, chosen in itertools.product((network_mses, _at_once), (None, rows)):
        assert_same(
            lambda *x, op=op, chosen=chosen: op(*x, GRAPH, GRAPH.relations, zero_weight=[0.1] * 4, rows=chosen),
            lambda z, w, b, chosen=chosen: in_turn(z, w, b, chosen),
            *inputs,
        )


@pytest.mark.parametrize("relation", GRAPH.relations)
def test_negatives_are_uniform_over_valid_non_edges(relation: str) -> None:
    _, edges, valid = reference.target(GRAPH, relation)
    free = valid & ~edges
    g = torch.Generator().manual_seed(0)
    drawn = sample_negatives(GRAPH, relation, None, 20_000, g).gene.reshape(N, 20_000)
    for i in edges.any(1).nonzero()[:, 0].tolist():
        counts, expected = drawn[i].bincount(minlength=N), 20_000 / int(free[i].sum())
        assert counts[~free[i]].sum() == 0
        assert (counts[free[i]] - expected).abs().max() < 6 * expected**0.5
    of_graph = sample_negatives_of_graph(GRAPH, relation, 2000, g)
    counts = torch.zeros(N, N, dtype=torch.int64).index_put_(
        (of_graph.row, of_graph.gene), torch.ones_like(of_graph.row), accumulate=True
    )
    able = free & edges.any(1, keepdim=True)
    expected = len(of_graph.gene) / int(able.sum())
    assert counts[~able].sum() == 0
    assert (counts[able] - expected).abs().max() < 6 * expected**0.5


@pytest.mark.parametrize("options", [{"num_negatives": 3}, {"neg_sample_ratio": 1.0}], ids=str)
def test_drawn_negatives_are_unbiased(options: dict[str, Any]) -> None:
    """Loss and gradient, averaged over draws, within 5 standard errors of the loss over every non-edge, or that many of it."""
    q, k = leaves((1 + N, 4), (1 + N, 4))
    g = torch.Generator().manual_seed(0)

    def draw(**options: Any) -> Tensor:
        loss = cellattn.attention_bce(
            q, k, GRAPH, "annotated", num_prefix=1, target="binary", reduction="none", generator=g, **options
        )  # fmt: skip
        return torch.cat([loss.detach(), *(x.flatten() for x in torch.autograd.grad(loss.sum(), (q, k)))])

    draws = torch.stack([draw(**options) for _ in range(300)])
    want = draw()
    if "neg_sample_ratio" in options:  # each negative has weight 1: so many of all non-edges on average
        edges = draw(neg_sample_ratio=0.0)
        _, is_edge, valid = reference.target(GRAPH, "annotated")
        num_free = int((valid & ~is_edge & is_edge.any(1, keepdim=True)).sum())
        want = edges + (want - edges) * GRAPH.num_edges("annotated") / num_free
    assert ((draws.mean(0) - want).abs() <= 5 * draws.std(0) / 300**0.5 + 1e-12).all()


@pytest.mark.parametrize("loss", ["kl", "bce"])
def test_heads_tied_to_all_kinds_of_relations(loss: str) -> None:
    ties = [(name, head) for head, name in enumerate(GRAPH.relations)]
    rows = {name: GRAPH.degree(name).nonzero()[:4, 0] for name in GRAPH.relations}
    for chosen in (None, rows):
        assert_same(
            lambda q, k, v, chosen=chosen: flat(cellattn.graph_attention(q, k, v, GRAPH, ties, loss=loss, rows=chosen)),
            lambda q, k, v, chosen=chosen: flat(reference.graph_attention(q, k, v, GRAPH, ties, loss=loss, rows=chosen)),
            *leaves((2, 4, 1 + N, 8), (2, 4, 1 + N, 8), (2, 4, 1 + N, 5)),
        )


def flat(outputs: tuple[Tensor, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return outputs[0], *outputs[1]


@pytest.mark.parametrize("self_loops", [True, False])
def test_masks_of_two_types(self_loops: bool) -> None:
    """A gene sees its terms, a term nothing but the prefix and itself."""
    heads = [("annotated", 0), ("members", 1), ("physical", 1)]
    options: dict[str, Any] = {"num_prefix": 1, "self_loops": self_loops, "weighted": True}
    x = leaves((2, 1 + N, 8), (2, 1 + N, 8), (2, 1 + N, 5))
    assert_same(
        lambda q, k, v: cellattn.edge_attention(q, k, v, GRAPH, heads, **options),
        lambda q, k, v: reference.edge_attention(q, k, v, GRAPH, heads, **options),
        *x,
    )
    q, k, v = (y.detach() for y in x)
    out, _ = cellattn.edge_attention(q, k, v, GRAPH, heads, num_prefix=1, self_loops=self_loops)
    terms = 1 + torch.arange(NUM_GENES, N)
    seen = torch.stack([torch.zeros_like(terms), terms], 1)[:, : 2 if self_loops else 1]
    scores = torch.einsum("td,tsd->ts", q[0, terms], k[0, seen]) / 8**0.5
    torch.testing.assert_close(out[0, terms], torch.einsum("ts,tsd->td", scores.softmax(-1), v[0, seen]))


@both_ways
def test_unknown_tokens_and_other_types_may_hold_anything() -> None:
    """Nothing that is not a valid column gets into a loss over valid pairs, nor into its gradients."""
    relation, (q, k) = "annotated", leaves((N, 8), (N, 8))
    outside = ~GRAPH.known_columns(relation)
    noise = k.detach().masked_fill(outside[:, None], 1e30)
    for f in (
        lambda k: cellattn.attention_kl(q, k, GRAPH, relation, over="valid"),
        lambda k: cellattn.attention_bce(q, k, GRAPH, relation, link="sigmoid", target="binary"),
    ):
        results = []
        for keys in (k.detach(), noise):
            keys = keys.clone().requires_grad_()
            loss = f(keys)
            results.append([loss, *torch.autograd.grad(loss, (q, keys))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert not results[0][2][outside].any()


@pytest.mark.parametrize("relation", GRAPH.relations)
def test_edge_recovery(relation: str) -> None:
    """Scores that are the relation itself find every edge, though other tokens score higher."""
    a = reference.adjacency(GRAPH, relation)
    q = torch.cat([a, torch.ones(N, 1)], 1).float()
    k = torch.cat([torch.eye(N), 100 * (~GRAPH.known_columns(relation)).float()[:, None]], 1)
    assert edge_recovery(q, k, GRAPH, relation) == 1
    block = Block(relation)
    random = []
    for seed in range(40):
        q, k = (x.detach() for x in leaves((N, 8), (N, 8), seed=seed))
        random.append(edge_recovery(q, k, GRAPH, relation))
    degree = (block.a > 0).sum(1).double()
    by_chance = float(degree.square().sum() / degree.sum()) / len(block.columns)
    assert abs(sum(random) / 40 - by_chance) < 0.05, "of the valid columns alone"


@pytest.mark.parametrize("direction", ["in", "out", "both"])
@pytest.mark.parametrize("traversal", ["per_relation", "mixed"])
def test_hops_across_types(traversal: str, direction: str) -> None:
    """Along all relations a walk goes from genes to terms and back."""
    seeds, ptr = torch.tensor([0, 5, 26, 30]), torch.tensor([0, 1, 1, 3, 4])
    for hops in range(4):
        options: dict[str, Any] = {"traversal": traversal, "direction": direction}
        got, want = (m.khop_mask(GRAPH, seeds, ptr, hops, **options) for m in (cellattn, reference))
        assert torch.equal(got, want)


def spmm_problem() -> tuple[Tensor, ...]:
    genes, everyone = torch.arange(NUM_GENES), torch.arange(N)
    return everyone, torch.tensor([0, N]), genes, torch.tensor([0, NUM_GENES])


def same_product(relation: str, keep: Tensor, **options: Any) -> None:
    assert_same(
        lambda x: cellattn.masked_spmm(GRAPH, relation, x, keep, **options),
        lambda x: reference.masked_spmm(GRAPH, relation, x, keep, **options),
        *leaves((N, 6)),
    )


def test_messages_from_terms_to_genes() -> None:
    assert_same(
        lambda x: cellattn.relational_spmm(GRAPH, x, *spmm_problem()),
        lambda x: reference.relational_spmm(GRAPH, x, *spmm_problem()),
        *leaves((N, 6)),
    )
    keep = torch.rand(3, N, generator=torch.Generator().manual_seed(0)) < 0.7
    for relation, transpose in itertools.product(GRAPH.relations, (False, True)):
        same_product(relation, keep, transpose=transpose)
