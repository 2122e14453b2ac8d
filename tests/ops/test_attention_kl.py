from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import cellattn
from cellattn import MultiGraph, reference
from cellattn.ops import _dense

from ..bounds import assert_within_rounding
from ..compare import assert_same, everything, leaves, random_graph

ROWS = {"all": None, "some": [3, 0, 17], "one": [5], "none": [], "twice": [4, 4, 9]}


@pytest.fixture(autouse=True, params=["streamed", "dense"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small map is made, a large one is streamed."""
    if request.param == "streamed":
        monkeypatch.setattr(_dense, "LARGEST", 0)


def graphs(weighted: bool) -> MultiGraph:
    """Dense, sparse and empty relations over 37 genes, and three new genes of which two are known in one relation."""
    graph = random_graph(37, {"dense": 600, "sparse": 20, "empty": 0}, weighted=weighted)
    return graph.extend(3, {"sparse": torch.tensor([[37, 3], [5, 38]])})


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("over", ["tokens", "valid"])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["binary", "weighted"])
def test_every_combination(weighted: bool, lead: tuple[int, ...], num_prefix: int, over: str, rows: str) -> None:
    graph = graphs(weighted)
    index = None if ROWS[rows] is None else torch.tensor(ROWS[rows], dtype=torch.int64)
    q, k = leaves((*lead, num_prefix + 40, 8), (*lead, num_prefix + 40, 8))
    for relation, reduction in itertools.product(graph.relations, ("mean", "sum", "none")):
        options: dict[str, Any] = {"rows": index, "over": over, "num_prefix": num_prefix, "reduction": reduction}
        assert_same(
            lambda q, k: cellattn.attention_kl(q, k, graph, relation, **options),
            lambda q, k: reference.attention_kl(q, k, graph, relation, **options),
            q,
            k,
        )


@pytest.mark.parametrize("n", [1, 63, 129, 1000], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("d", [1, 20, 100, 128], ids=lambda d: f"D{d}")
def test_awkward_shapes(n: int, d: int) -> None:
    """Among the rows: one with every gene, and (beyond N = 1) some with none."""
    hub = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)])
    some = torch.randint(n, (2, n), generator=torch.Generator().manual_seed(0))
    graph = MultiGraph.from_edge_index({"hub": torch.cat([some, hub], 1)}, n)
    q, k = leaves((n + 1, d), (n + 1, d))
    assert_same(
        lambda q, k: cellattn.attention_kl(q, k, graph, "hub", num_prefix=1, scale=0.3),
        lambda q, k: reference.attention_kl(q, k, graph, "hub", num_prefix=1, scale=0.3),
        q,
        k,
    )


def test_agrees_with_torch_kl_div() -> None:
    """The definition once more, by another hand: F.kl_div against the dense row-normalised adjacency."""
    graph = random_graph(30, {"a": 900}, weighted=True)
    q, k = leaves((31, 8), (31, 8))
    t, edges, _ = reference.target(graph, "a")
    assert edges.any(1).all()
    alpha = (q @ k.T / 8**0.5).softmax(-1)[1:, 1:]
    expected = F.kl_div(alpha.log(), t, reduction="batchmean")
    torch.testing.assert_close(cellattn.attention_kl(q, k, graph, "a", num_prefix=1), expected, rtol=1e-10, atol=0)


def test_given_lse_is_used_and_differentiated() -> None:
    graph = random_graph(30, {"a": 90})
    q, k, v = leaves((31, 8), (31, 8), (31, 4))

    def with_lse(q, k, v):
        out, lse = cellattn.attention(q, k, v)
        return out, cellattn.attention_kl(q, k, graph, "a", lse=lse, num_prefix=1)

    def without(q, k, v):
        return reference.attention(q, k, v)[0], reference.attention_kl(q, k, graph, "a", num_prefix=1)

    assert_same(with_lse, without, q, k, v)
    shifted = cellattn.attention(q, k, v)[1] + 1
    plain = cellattn.attention_kl(q, k, graph, "a", num_prefix=1, reduction="none")
    moved = cellattn.attention_kl(q, k, graph, "a", num_prefix=1, lse=shifted, reduction="none")
    torch.testing.assert_close(moved - plain, (graph.degree("a") > 0).double())


def test_kl_is_zero_where_attention_is_the_graph() -> None:
    """The natural logarithm throughout: a base-2 log-sum-exp would leave (1 - ln 2) LSE."""
    graph = random_graph(6, {"a": 300}, weighted=True)
    t, edges, _ = reference.target(graph, "a")
    q = torch.where(edges, t, 1).log()  # scores = q @ I
    assert edges.all()
    kl = cellattn.attention_kl(q, torch.eye(6, dtype=torch.float64), graph, "a", scale=1.0, reduction="none")
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-12)


def test_small_alpha_keeps_its_gradient() -> None:
    """An epsilon inside the logarithm would flatten it: alpha here is near 1e-20."""
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0], [1]])}, 2)
    q = torch.tensor([[46.0], [1.0]], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    loss = cellattn.attention_kl(q, k, graph, "a", scale=1.0, reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(46.0, dtype=torch.float64))
    assert q.grad is not None
    torch.testing.assert_close(q.grad[0, 0], torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("over", ["tokens", "valid"])
@pytest.mark.parametrize("rows", [None, [3, 0, 17]], ids=["all", "some"])
@pytest.mark.parametrize("where", ["query with edges", "query without", "query of an unknown gene", "unknown key"])
def test_special_values(where: str, rows: list[int] | None, over: str, value: float) -> None:
    """NaN in the losses of the row and in no other; without an edge 0; an unknown gene is not seen by over="valid"."""
    graph = MultiGraph.from_edge_index(
        {"a": torch.tensor([[0, 0, 3, 3, 17, 5], [1, 2, 9, 0, 17, 3]])},
        20,
        known={"a": torch.arange(20) != 19},
    )
    row = {"query with edges": 3, "query without": 4, "query of an unknown gene": 19, "unknown key": 19}[where]
    q, k = (x.detach() for x in leaves((21, 8), (21, 8)))
    (k if where == "unknown key" else q)[1 + row, 2] = value
    index = None if rows is None else torch.tensor(rows)
    options: dict[str, Any] = {"rows": index, "over": over, "num_prefix": 1, "reduction": "none"}
    got = cellattn.attention_kl(q, k, graph, "a", **options)
    if over == "valid" and where == "unknown key":
        want = cellattn.attention_kl(q, k.index_fill(0, torch.tensor([20]), 0), graph, "a", **options)
        assert want.isfinite().all()
    else:
        want = reference.attention_kl(q, k, graph, "a", **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("over", ["tokens", "valid"])
def test_low_precision_is_within_rounding(over: str, dtype: torch.dtype) -> None:
    graph = random_graph(200, {"a": 4000}, weighted=True)

    def run(module: Any) -> Callable[..., torch.Tensor]:
        return lambda q, k: module.attention_kl(q, k, graph, "a", num_prefix=1, over=over)

    # gradients of the log-sum-exp and of the product with the graph, each rounded to the dtype
    assert_within_rounding(run(cellattn), run(reference), *leaves((201, 20), (201, 20), dtype=dtype), parts=True)


def test_gradcheck_and_double_backward() -> None:
    graph = random_graph(5, {"a": 9}, weighted=True)
    q, k = leaves((2, 6, 3), (2, 6, 3))
    assert torch.autograd.gradcheck(lambda q, k: cellattn.attention_kl(q, k, graph, "a", num_prefix=1), (q, k))
    (dq,) = torch.autograd.grad(cellattn.attention_kl(q, k, graph, "a", num_prefix=1), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dq.sum().backward()


@pytest.mark.parametrize("num_genes", [40, 600])
def test_no_double_backward_beside_a_given_lse(num_genes: int) -> None:
    """dq is a product with k, however it is made: an error, not a derivative of 0."""
    graph = random_graph(num_genes, {"a": 200})
    q, k = leaves((num_genes, 3), (num_genes, 3), dtype=torch.float32)
    lse = torch.full((num_genes,), 4.0)
    (dq,) = torch.autograd.grad(cellattn.attention_kl(q, k, graph, "a", lse=lse), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_kl: double backward is not supported"):
        torch.autograd.grad(dq.sum(), k, allow_unused=True)


@pytest.mark.parametrize("over", ["tokens", "valid"])
def test_no_upstream_gradient_of_a_row_without_an_edge(over: str) -> None:
    """Such as the NaN of a division by its degree, left out by `where` afterwards."""
    graph = random_graph(30, {"a": 20})
    degree = graph["a"].degree
    assert (degree == 0).any()
    q, k = leaves((31, 8), (31, 8))
    loss = cellattn.attention_kl(q, k, graph, "a", num_prefix=1, over=over, reduction="none")
    got = torch.autograd.grad(torch.where(degree > 0, loss / degree, 0).sum(), (q, k), retain_graph=True)
    want = torch.autograd.grad((loss / degree.clamp_min(1)).sum(), (q, k))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", [cellattn.attention_kl, cellattn.attention_bce], ids=lambda loss: loss.__name__)
def test_a_few_rows_of_many_genes_need_no_square_of_them(loss: Callable[..., torch.Tensor]) -> None:
    """One row of 200,000 is a small map, and the targets of all of them are 160 GB."""
    n = 200_000
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[5, 5, 7], [1, 9, n - 1]])}, n)
    q, k = torch.ones(n, 1), torch.zeros(n, 1)
    value = loss(q, k, graph, "a", rows=torch.tensor([5]))
    if loss is cellattn.attention_kl:
        torch.testing.assert_close(value, torch.tensor(n / 2).log())


def test_bit_equal_from_run_to_run() -> None:
    graph = random_graph(500, {"a": 20_000}, weighted=True)
    q, k = leaves((4, 501, 20), (4, 501, 20), dtype=torch.float32)
    runs = [everything(lambda q, k: cellattn.attention_kl(q, k, graph, "a", num_prefix=1), q, k) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
