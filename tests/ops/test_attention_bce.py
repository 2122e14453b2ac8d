from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cellattn
from cellattn import MultiGraph, reference
from cellattn.ops import _dense
from cellattn.ops._negatives import Negatives, sample_negatives, sample_negatives_of_graph

from ..compare import assert_same, everything, least_memory, leaves, random_graph, values_and_grads


@pytest.fixture(autouse=True, params=["streamed", "dense"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small map is made, a large one is streamed."""
    if request.param == "streamed":
        monkeypatch.setattr(_dense, "LARGEST", 0)


@pytest.mark.parametrize("rows", [None, [3, 0, 17], [], [4, 4]], ids=str)
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("target", ["normalized", "binary"])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("weighted", [False, True], ids=["binary", "weighted"])
def test_every_combination(weighted: bool, num_prefix: int, target: str, link: str, rows: list[int] | None) -> None:
    graph = random_graph(37, {"dense": 600, "sparse": 20, "empty": 0}, weighted=weighted)
    graph = graph.extend(3, {"sparse": torch.tensor([[37, 3], [5, 38]])})
    index = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    for lead, relation, reduction in itertools.product(((), (2,)), graph.relations, ("mean", "sum", "none")):
        q, k = leaves((*lead, num_prefix + 40, 8), (*lead, num_prefix + 40, 8))
        options: dict[str, Any] = {
            "rows": index,
            "num_prefix": num_prefix,
            "target": target,
            "link": link,
            "reduction": reduction,
        }
        assert_same(
            lambda q, k: cellattn.attention_bce(q, k, graph, relation, **options),
            lambda q, k: reference.attention_bce(q, k, graph, relation, **options),
            q,
            k,
        )


def test_many_row_blocks() -> None:
    """More score entries than one row block holds."""
    graph = random_graph(1000, {"a": 20_000})
    q, k = leaves((1001, 8), (1001, 8))
    assert_same(
        lambda q, k: cellattn.attention_bce(q, k, graph, "a", num_prefix=1),
        lambda q, k: reference.attention_bce(q, k, graph, "a", num_prefix=1),
        q,
        k,
    )


def test_agrees_with_torch_binary_cross_entropy() -> None:
    """The definition by another hand."""
    graph = random_graph(30, {"a": 600})
    q, k = leaves((30, 8), (30, 8))
    _, edges, _ = reference.target(graph, "a")
    assert edges.any(1).all()
    expected = F.binary_cross_entropy_with_logits(q @ k.T, edges.double(), reduction="sum")
    got = cellattn.attention_bce(q, k, graph, "a", target="binary", link="sigmoid", scale=1.0, reduction="sum")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_sampled_negatives_are_unbiased(link: str) -> None:
    """Loss and gradient, averaged over draws, within 5 standard errors of the loss over every non-edge."""
    graph = random_graph(25, {"a": 120}).extend(2)
    (q, k) = leaves((28, 4), (28, 4))
    g = torch.Generator().manual_seed(0)

    def draw(num_negatives: int | None) -> torch.Tensor:
        loss = cellattn.attention_bce(
            q, k, graph, "a", num_prefix=1, num_negatives=num_negatives, link=link, reduction="none", generator=g
        )
        dq, dk = torch.autograd.grad(loss.sum(), (q, k))
        return torch.cat([loss.detach(), dq.flatten(), dk.flatten()])

    draws = torch.stack([draw(3) for _ in range(300)])
    error = (draws.mean(0) - draw(None)).abs()
    assert (error <= 5 * draws.std(0) / 300**0.5 + 1e-12).all()


def test_negatives_are_uniform_over_valid_non_edges() -> None:
    graph = random_graph(12, {"a": 30}).extend(2, {"a": torch.tensor([[12], [3]])})
    _, edges, valid = reference.target(graph, "a")
    rows = torch.arange(14)
    drawn = sample_negatives(graph, "a", rows, 20_000, torch.Generator().manual_seed(0)).gene.reshape(14, 20_000)
    counts = torch.stack([torch.bincount(row, minlength=14) for row in drawn])
    for i in range(13):  # gene 13 is unknown: its row has no valid pair
        free = valid[i] & ~edges[i]
        assert counts[i][~free].sum() == 0
        expected = 20_000 / int(free.sum())
        assert (counts[i][free] - expected).abs().max() < 6 * expected**0.5


def test_negatives_of_a_full_row() -> None:
    """A row where every valid pair is an edge has no non-edge to draw; its negatives have weight 0."""
    n = 6
    hub = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)])
    graph = MultiGraph.from_edge_index({"a": hub}, n)
    q, k = leaves((n, 4), (n, 4))
    assert_same(
        lambda q, k: cellattn.attention_bce(q, k, graph, "a", num_negatives=5),
        lambda q, k: reference.attention_bce(q, k, graph, "a"),
        q,
        k,
    )


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_more_negatives_than_pairs(link: str) -> None:
    """Regression test: edges and draws together may outnumber the entries of an [R, N] matrix."""
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 0, 0, 2], [0, 1, 2, 1]])}, 4)
    q, k = leaves((4, 3), (4, 3))
    g = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_negatives": 4000, "generator": g, "link": link, "reduction": "none"}
    (got,), grads = values_and_grads(lambda q, k: cellattn.attention_bce(q, k, graph, "a", **options), q, k)
    (want,), exact = values_and_grads(lambda q, k: reference.attention_bce(q, k, graph, "a", link=link, reduction="none"), q, k)
    # one non-edge in row 0, so its draws are exact; three in row 2, of which 4,000 draws leave about 2%
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.05)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_generator_repeats_the_draw() -> None:
    graph = random_graph(50, {"a": 200})
    q, k = leaves((50, 4), (50, 4))

    def draw(seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return cellattn.attention_bce(q, k, graph, "a", num_negatives=2, generator=g)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


WHERE = {  # a row's sharp token, of five genes after two prefix tokens: 0 and 1 are edges, 2 and 3 are none, 4 is unknown
    "edge": 2,
    "non-edge": 4,
    "unknown": 6,
    "prefix": 1,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gap", [-3.0, 1.0, 16.0, 40.0, 1000.0, 10_000.0])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("mode", ["normalized", "binary", "drawn"])
def test_any_gap(mode: str, where: str, gap: float, dtype: torch.dtype) -> None:
    """One token's score stands `gap` above the others': loss and gradients are those of the float64 definition.

    q is the unit matrix and scale 1, so that scores are the entries of k, without rounding. What is left: log-sum-exps of up to
    `gap` round by eps * gap; a row adds 7 terms; no weight of a term, and no derivative of a gradient by a log-sum-exp, is
    above 4. dq is a sum over 7 tokens of gradients times scores. Gradients come in two parts, that through the log-sum-exp and
    the rest, which are rounded to the dtype, and so is their sum.
    """
    n, num_prefix = 5, 2
    edges = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 0, 2, 3]])
    graph = MultiGraph.from_edge_index({"a": edges}, n - 1).extend(1)
    scores = torch.linspace(-0.5, 0.5, 49, dtype=torch.float64).view(7, 7)[
        :, torch.randperm(7, generator=torch.Generator().manual_seed(0))
    ]
    scores[num_prefix] = 0.25 * scores[num_prefix].round(decimals=1)
    scores[num_prefix, WHERE[where]] += gap
    q, k = torch.eye(7, dtype=dtype), scores.mT.contiguous().to(dtype)
    options: dict[str, Any] = {"num_prefix": num_prefix, "scale": 1.0, "reduction": "none"}
    options["target"] = "binary" if mode == "binary" else "normalized"
    drawn: dict[str, Any] = {"num_negatives": 8, "generator": torch.Generator().manual_seed(1)} if mode == "drawn" else {}
    (loss,), (dq, dk) = values_and_grads(lambda q, k: cellattn.attention_bce(q, k, graph, "a", **options, **drawn), q, k)
    if mode == "drawn":
        negatives = sample_negatives(graph, "a", torch.arange(n), 8, torch.Generator().manual_seed(1))
        exact = functools.partial(with_negatives, graph, negatives, num_prefix)
    else:
        exact = functools.partial(reference.attention_bce, graph=graph, relation="a", **options)
    (want,), (dq_want, dk_want) = values_and_grads(lambda q, k: exact(q, k), q.double(), k.double())
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    noise = 16 * eps * (7 + max(gap, 1))
    assert ((loss.double() - want).abs() <= noise + 4 * eps * want.abs()).all()
    for got, exact_grad, factor in ((dk, dk_want, 1.0), (dq, dq_want, float(k.abs().sum(0).max()))):
        rounding = 2 * torch.finfo(dtype).eps * (4 * factor + exact_grad.abs()) + torch.finfo(dtype).smallest_normal
        assert ((got.double() - exact_grad).abs() <= noise * factor + rounding).all()


def with_negatives(graph: MultiGraph, negatives: Negatives, num_prefix: int, q: Tensor, k: Tensor) -> Tensor:
    """[N]: edges in full and each drawn non-edge with its weight, scale 1."""
    t, edges, _ = reference.target(graph, "a")
    log_a, log_1ma = (x[num_prefix:, num_prefix:] for x in reference.log_softmax_and_complement(q @ k.mT))
    row = torch.arange(graph.num_nodes).repeat_interleave(negatives.ptr.diff())
    weight = torch.where(edges, 1 - t, 0).index_put((row, negatives.gene), negatives.weight[row], accumulate=True)
    bce = -(torch.where(edges, t * log_a, 0) + torch.where(weight > 0, weight * log_1ma, 0)).sum(-1)
    return torch.where(edges.any(-1), bce, 0)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_negatives", [None, 30])
@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_maps_of_any_sharpness(size: float, num_negatives: int | None, link: str) -> None:
    """Scores of standard deviation `size` in float32, where many rows have an entry near 1, against float64.

    A score is rounded to 8 eps |q| |k| scale at most, in each of two places, and a log-sum-exp likewise. The weights of terms,
    and of what they give to each score, are below 2, or 2 N for a drawn one; gradients are sums of N of these.
    """
    n = 30
    graph = random_graph(n, {"a": 150}, weighted=True).extend(1)
    q, k = leaves((2, n + 2, 8), (2, n + 2, 8), dtype=torch.float32)
    q, k = size * q.detach(), k.detach()
    _, lse = cellattn.attention(q, k, k)
    assert link == "sigmoid" or size == 1 or ((q @ k.mT / 8**0.5 - lse[..., None]).amax(-1) > -1e-6).any()

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"num_prefix": 1, "num_negatives": num_negatives, "generator": g, "link": link}
        (loss,), grads = values_and_grads(
            lambda q, k: cellattn.attention_bce(q, k, graph, "a", reduction="none", **options), *x
        )
        return loss, *grads

    noise = 24 * torch.finfo(torch.float32).eps * float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / 8**0.5
    weight = 2.0 if num_negatives is None else 2.0 * n
    largest = (1.0, float(k.abs().max()), float(q.abs().max()))
    for got, want, factor in zip(run(q, k), run(q.double(), k.double()), largest, strict=True):
        assert got.isfinite().all()
        assert float((got - want).abs().max()) <= noise * weight * factor


@pytest.mark.parametrize("num_negatives", [None, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e7, 1e10, 1e15])
def test_scores_past_the_digits_of_float64(size: float, dtype: torch.dtype, num_negatives: int | None) -> None:
    """Scores up to 1e30, of which a log-sum-exp made elsewhere is off by more than 1: a row's loss is still that of its gaps.

    Against float64, whose own roundings are a few spacings of the largest score.
    """
    n = 30
    graph = random_graph(n, {"a": 150}, weighted=True).extend(1)
    q, k = (size * x.detach() for x in leaves((2, n + 2, 8), (2, n + 2, 8), dtype=dtype))
    options: dict[str, Any] = {"num_prefix": 1, "reduction": "none"}
    if num_negatives is None:
        exact = reference.attention_bce(q.double(), k.double(), graph, "a", **options)
    else:
        negatives = sample_negatives(graph, "a", None, num_negatives, torch.Generator().manual_seed(0))
        scores = [x / 8**0.25 for x in (q.double(), k.double())]
        exact = torch.stack([with_negatives(graph, negatives, 1, *pair) for pair in zip(*scores, strict=True)])
        options |= {"num_negatives": num_negatives, "generator": torch.Generator().manual_seed(0)}
    (loss,), grads = values_and_grads(lambda q, k: cellattn.attention_bce(q, k, graph, "a", **options), q, k)
    assert all(x.isfinite().all() for x in (loss, *grads))
    largest = float((q.double() @ k.double().mT).abs().max()) * n
    assert float((loss.double() - exact).abs().max()) <= 8 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_is_drawn_in_a_row_without_a_non_edge_weighs_nothing(dtype: torch.dtype) -> None:
    """Nor is it an unknown gene, which holds anything, and which a score of 0 would make the row's sharp entry here."""
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    graph = MultiGraph.from_edge_index({"a": pairs}, 3, edge_weight={"a": torch.arange(1.0, 10.0)}).extend(2)
    q, k = torch.ones(5, 1, dtype=dtype), torch.tensor([[-90.0], [-60.0], [-95.0], [-99.0], [-99.0]], dtype=dtype)
    drawn, every = (
        values_and_grads(lambda q, k, n=n: cellattn.attention_bce(q, k, graph, "a", num_negatives=n), q, k) for n in (4, None)
    )
    for got, want in zip((*drawn[0], *drawn[1]), (*every[0], *every[1]), strict=True):
        # roundings of a score of 99 each
        assert float((got - want).norm()) <= 16 * 99 * torch.finfo(dtype).eps * float(want.norm())


def test_given_lse_is_the_one_made_here() -> None:
    """Values and gradients, where some entries are above 1/2 and some are not."""
    graph = random_graph(20, {"a": 80})
    q, k = leaves((21, 8), (21, 8))

    def given(q: Tensor, k: Tensor) -> Tensor:
        lse = cellattn.attention_logsumexp(q, k)
        return cellattn.attention_bce(q, k, graph, "a", num_prefix=1, lse=lse, reduction="none")

    def made(q: Tensor, k: Tensor) -> Tensor:
        return cellattn.attention_bce(q, k, graph, "a", num_prefix=1, reduction="none")

    assert_same(given, made, 3 * q, k)
    assert_same(made, lambda q, k: reference.attention_bce(q, k, graph, "a", num_prefix=1, reduction="none"), 3 * q, k)


@pytest.mark.parametrize("num_negatives", [None, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_unknown_genes_hold_anything_beside_a_log_sum_exp_of_the_others(value: float, num_negatives: int | None) -> None:
    """In rows without a sharp entry, whose denominator is of all keys."""
    graph = random_graph(20, {"a": 80}).extend(2)
    q, k = (x.detach() for x in leaves((22, 8), (22, 8), dtype=torch.float32))
    lse = cellattn.attention_logsumexp(q, k, key_mask=graph.known("a"))

    def loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        drawn: dict[str, Any] = {"num_negatives": num_negatives, "generator": torch.Generator().manual_seed(0)}
        return cellattn.attention_bce(q, k, graph, "a", lse=lse, **drawn)

    odd = k.clone()
    odd[-1, 0] = value
    got, want = (values_and_grads(loss, q, keys) for keys in (odd, k))
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # the other is a small map's, in another order


@pytest.mark.parametrize("num_negatives", [None, 40], ids=["all", "drawn"])
@pytest.mark.parametrize("target", ["normalized", "binary"])
@pytest.mark.parametrize(
    ("link", "keys"),
    [
        ("softmax", [0.3, -0.2, 1.0, -torch.inf, 0.7, -torch.inf]),
        ("softmax", [-torch.inf, -torch.inf, 1.0, -torch.inf, -torch.inf, -torch.inf]),  # one score is left: a = 1
        ("sigmoid", [0.3, torch.inf, 1.0, -torch.inf, 0.7, torch.inf]),
    ],
    ids=["softmax", "softmax, one score", "sigmoid"],
)
def test_infinite_scores(link: str, keys: list[float], target: str, num_negatives: int | None) -> None:
    """A pair that is certain loses 0 where the graph says so too, and inf where it says the opposite; never 0 * inf."""
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 0, 1, 2, 2, 4], [1, 2, 3, 2, 3, 1]])}, 5)
    q = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)[:, None]
    k = torch.tensor(keys, dtype=torch.float64)[:, None]
    options: dict[str, Any] = {"num_prefix": 1, "target": target, "link": link, "reduction": "none"}
    drawn: dict[str, Any] = {"num_negatives": num_negatives, "generator": torch.Generator().manual_seed(0)}
    (got,), (dq, dk) = values_and_grads(lambda q, k: cellattn.attention_bce(q, k, graph, "a", **options, **drawn), q, k)
    (want,), (dq_want, dk_want) = values_and_grads(lambda q, k: reference.attention_bce(q, k, graph, "a", **options), q, k)
    assert not got.isnan().any()
    assert torch.equal(got.isinf(), want.isinf())
    if num_negatives is None:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        if dk_want.isfinite().all():  # autograd has no gradient of a log-sum-exp of -inf alone
            torch.testing.assert_close(dk, dk_want, rtol=1e-12, atol=1e-12)
        assert dk.isfinite().all()
        with_edges = torch.tensor([1, 2, 3, 5])
        torch.testing.assert_close(dq[with_edges], dq_want[with_edges], rtol=1e-12, atol=1e-12, equal_nan=True)  # 0 * inf


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_checkpointing_repeats_the_draw(layers: int, use_reentrant: bool) -> None:
    """Loss and gradient, with the caller's generator, several draws a part and several parts, which go backwards."""
    graph = random_graph(12, {"a": 30})
    q, k = (x.detach() for x in leaves((12, 4), (12, 4)))

    def layer(x: Tensor, g: torch.Generator) -> Tensor:
        for ratio in (None, 1.5):
            negatives = {"num_negatives": 3} if ratio is None else {"neg_sample_ratio": ratio}
            rows = cellattn.sample_rows(graph, "a", 6, generator=g) if ratio is None else None
            x = x * (1 + cellattn.attention_bce(x, k, graph, "a", rows=rows, generator=g, **negatives))
        return x.sin()

    def run(wrap: bool) -> list[Tensor]:
        x, g = q.clone().requires_grad_(), torch.Generator().manual_seed(3)
        out = x
        for _ in range(layers):
            out = checkpoint(layer, out, g, use_reentrant=use_reentrant) if wrap else layer(out, g)
        out.sum().backward()
        assert x.grad is not None
        return [out.detach(), x.grad, torch.rand(3, generator=g)]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_that_cannot_tell_two_draws_apart_warns(use_reentrant: bool) -> None:
    """The default generator is seeded alike before two forwards, the caller's goes on; each by itself is repeated silently."""
    graph = random_graph(12, {"a": 30})
    q, k = (x.detach() for x in leaves((12, 4), (12, 4)))

    def step(x: Tensor, g: torch.Generator, *, wrap: bool) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return cellattn.attention_bce(x, k, graph, "a", num_negatives=2, generator=g)

        with torch.random.fork_rng():
            torch.manual_seed(7 + wrap)
            return checkpoint(loss, x, use_reentrant=use_reentrant) if wrap else loss(x)

    def grads(wrap: bool) -> list[Tensor]:
        x, g = q.clone().requires_grad_(), torch.Generator().manual_seed(3)
        found: list[Tensor] = []
        for _ in range(3):
            x.grad = None
            step(x, g, wrap=wrap).backward()
            assert x.grad is not None
            found.append(x.grad)
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(torch.equal(a, b) for a, b in zip(grads(False), grads(True), strict=True))
    x, g = q.clone().requires_grad_(), torch.Generator().manual_seed(3)
    both = step(x, g, wrap=True) + step(x, g, wrap=True)
    with pytest.warns(UserWarning, match="generator: activation checkpointing repeats one of two draws"):
        both.backward()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 3.0])
def test_neg_sample_ratio(ratio: float) -> None:
    """The mean of torch's binary cross-entropy over the edges and the drawn non-edges, as many as asked for."""
    graph = random_graph(15, {"a": 60}).extend(2)
    q, k = leaves((17, 4), (17, 4))
    n, num_edges = graph.num_nodes, graph.num_edges("a")
    negatives = sample_negatives_of_graph(graph, "a", ratio, torch.Generator().manual_seed(5))
    row = torch.arange(n).repeat_interleave(negatives.ptr.diff())
    edges = reference.target(graph, "a")[1]
    assert negatives.gene.numel() == int(ratio * num_edges)
    assert not edges[row, negatives.gene].any()
    assert graph.known("a")[negatives.gene].all()
    assert (graph.degree("a")[row] > 0).all()

    def ours(q: Tensor, k: Tensor) -> Tensor:
        options: dict[str, Any] = {"target": "binary", "link": "sigmoid", "generator": torch.Generator().manual_seed(5)}
        return cellattn.attention_bce(q, k, graph, "a", neg_sample_ratio=ratio, scale=1.0, **options)

    def theirs(q: Tensor, k: Tensor) -> Tensor:
        i = torch.cat([graph.edge_index("a"), torch.stack([row, negatives.gene])], 1)
        is_edge = (torch.arange(i.shape[1]) < num_edges).double()
        return F.binary_cross_entropy_with_logits((q[i[0]] * k[i[1]]).sum(1), is_edge)

    assert_same(ours, theirs, q, k)


def test_neg_sample_ratio_is_uniform() -> None:
    graph = random_graph(8, {"a": 20}).extend(1)
    negatives = sample_negatives_of_graph(graph, "a", 2000.0, torch.Generator().manual_seed(0))
    row = torch.arange(9).repeat_interleave(negatives.ptr.diff())
    _, edges, valid = reference.target(graph, "a")
    free = valid & ~edges & edges.any(1, keepdim=True)
    counts = torch.bincount(9 * row + negatives.gene, minlength=81).view(9, 9)
    assert counts[~free].sum() == 0
    expected = row.numel() / int(free.sum())
    assert (counts[free] - expected).abs().max() < 6 * expected**0.5


def test_one_token() -> None:
    """The only entry is 1, and so is its target."""
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0], [0]])}, 1, edge_weight={"a": torch.tensor([49.0])})
    (loss,), grads = values_and_grads(lambda q, k: cellattn.attention_bce(q, k, graph, "a"), *leaves((1, 3), (1, 3)))
    assert loss == 0
    assert all((x == 0).all() for x in grads)


def test_gradcheck_and_double_backward() -> None:
    graph = random_graph(5, {"a": 9}, weighted=True)
    q, k = leaves((6, 3), (6, 3))
    for link, target in itertools.product(("softmax", "sigmoid"), ("normalized", "binary")):
        assert torch.autograd.gradcheck(
            lambda q, k: cellattn.attention_bce(q, k, graph, "a", num_prefix=1, link=link, target=target), (q, k)
        )
    (dq,) = torch.autograd.grad(cellattn.attention_bce(q, k, graph, "a", num_prefix=1), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dq.sum().backward()
    lse = cellattn.attention_logsumexp(q, k).detach().requires_grad_()
    (dlse,) = torch.autograd.grad(
        cellattn.attention_bce(q, k, graph, "a", lse=lse, num_prefix=1), lse, create_graph=True
    )  # fmt: skip
    for x in (q, k, lse):
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(dlse.sum(), x, retain_graph=True)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_no_upstream_gradient_of_a_row_without_an_edge(link: str) -> None:
    """Such as the NaN of a division by its degree, left out by `where` afterwards."""
    graph = random_graph(30, {"a": 20})
    degree = graph["a"].degree
    assert (degree == 0).any()
    q, k = leaves((31, 8), (31, 8))
    loss = cellattn.attention_bce(q, k, graph, "a", num_prefix=1, link=link, reduction="none")
    got = torch.autograd.grad(torch.where(degree > 0, loss / degree, 0).sum(), (q, k), retain_graph=True)
    want = torch.autograd.grad((loss / degree.clamp_min(1)).sum(), (q, k))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_a_row_that_is_named_often_are_rounded_once(dtype: torch.dtype) -> None:
    """Added in their own 8 bits, 500 equal ones would be those of 256."""
    graph = random_graph(100, {"a": 900})
    q, k = (x.detach().to(dtype).requires_grad_() for x in leaves((2, 101, 8), (2, 101, 8)))
    rows, lse = graph.edge_index("a")[0, :1].expand(500), cellattn.attention_logsumexp(q, k).detach()

    def gradient(rows: Tensor, factor: int) -> Tensor:
        loss = cellattn.attention_bce(q, k, graph, "a", lse=lse, rows=rows, num_prefix=1, reduction="sum")
        return factor * torch.autograd.grad(loss, q)[0].float()

    # twice half a spacing of the dtype, and the sum of 500 in float32
    torch.testing.assert_close(gradient(rows, 1), gradient(rows[:1], 500), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("num_negatives", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision(dtype: torch.dtype, num_negatives: int | None) -> None:
    """Inputs rounded to the dtype, then only its own rounding: a few spacings of the result."""
    graph = random_graph(100, {"a": 900})
    q, k = (x.detach().to(dtype) for x in leaves((101, 20), (101, 20)))

    def run(*x):
        g = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"num_prefix": 1, "num_negatives": num_negatives, "generator": g}
        return everything(lambda q, k: cellattn.attention_bce(q, k, graph, "a", **options), *x)

    for a, w in zip(run(q, k), run(q.double(), k.double()), strict=True):
        assert float((a.double() - w).abs().max()) <= 4 * torch.finfo(a.dtype).eps * float(w.abs().max()) + 1e-5


def test_memory_of_every_non_edge_is_a_row_block(two_threads: None) -> None:
    """A [N, N] float32 tensor would take 25 MB here, and its backward several."""
    graph = random_graph(2500, {"a": 25_000})
    q, k = leaves((2501, 8), (2501, 8), dtype=torch.float32)

    def step() -> None:
        cellattn.attention_bce(q, k, graph, "a", num_prefix=1).backward()

    assert least_memory(step, 15e6) < 15e6
