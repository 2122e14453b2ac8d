"""Sums over dense relations as bits, and the losses that take them, against dense matrices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference
from cellattn.graph import multigraph, rows
from cellattn.ops import _dense, _rows
from cellattn.ops.bit_sum import bit_sum
from cellattn.ops.row_dot import row_dot, row_dot_csr

from ..bounds import assert_within_rounding
from ..compare import assert_same, leaves, random_graph

OPS = torch.ops.cellattn


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relations are packed however small and sparse they are."""
    monkeypatch.setattr(multigraph, "_MIN_PACKED", 0)
    monkeypatch.setattr(multigraph, "_DENSE", 0)


def packed_words(mask: Tensor) -> Tensor:
    return OPS.pack_words(mask.t().contiguous())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("m", "c"), [(1, 1), (7, 63), (64, 64), (600, 65), (40, 1000), (3, 0), (0, 70)], ids=str)
def test_every_width(m: int, c: int, dtype: torch.dtype) -> None:
    """Widths around those of all vectors; integers, so that every order of summation gives the same bits."""
    generator = torch.Generator().manual_seed(m + c)
    mask = torch.rand(m, c, generator=generator) < 0.4
    words = packed_words(mask)
    for f in (0, 1, 3, 4, 7, 8, 9, 16, 17, 20, 24, 31, 32, 33, 64, 100):
        x = torch.randint(-8, 9, (c, f), generator=generator).to(dtype)
        assert torch.equal(OPS.bit_spmm(words, None, x), mask.to(dtype) @ x)
        if m:
            chosen = torch.tensor([m - 1, 0, m - 1])
            assert torch.equal(OPS.bit_spmm(words, chosen, x), (mask.to(dtype) @ x)[chosen])
    assert OPS.bit_spmm(words, torch.empty(0, dtype=torch.int64), torch.ones(c, 5, dtype=dtype)).shape == (0, 5)


@pytest.mark.usefixtures("isa")
def test_what_is_not_set_is_not_read() -> None:
    """A NaN or an infinity reaches the rows that have its column, and no other."""
    mask = torch.rand(50, 130, generator=torch.Generator().manual_seed(0)) < 0.5
    x = torch.ones(130, 20)
    x[3], x[64], x[129, 7] = torch.nan, torch.inf, -torch.inf
    out = OPS.bit_spmm(packed_words(mask), None, x)
    expected = torch.stack([x[row].sum(0) if row.any() else x.new_zeros(20) for row in mask])
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(200, 3)}, "words, for the columns of x: expected size 4, got 2"),
        ({"x": torch.ones(100)}, "x: expected 2 dimension"),
        ({"x": torch.ones(100, 3, dtype=torch.float16)}, "x: got a dtype"),
        ({"words": torch.ones(5, 2)}, "words: got a dtype"),
        ({"rows": torch.tensor([0, 5])}, r"rows: position 1 holds 5, expected a row in \[0, 5\)"),
        ({"rows": torch.tensor([-1])}, "rows: position 0 holds -1"),
        ({"rows": torch.tensor([0.0])}, "rows: got a dtype"),
    ],
)
def test_bad_input(change: dict[str, Tensor], words: str) -> None:
    arguments: dict[str, Any] = {"words": torch.zeros(5, 2, dtype=torch.int64), "rows": None, "x": torch.ones(100, 3), **change}
    with pytest.raises(RuntimeError, match=words):
        OPS.bit_spmm(*arguments.values())


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("block", [1 << 22, 5], ids=["one-block", "many-blocks"])
def test_bits_are_the_graph(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_PACKED", block)
    graph = random_graph(70, {"a": 900, "empty": 0}).extend(3)
    for relation in graph.relations:
        bits = graph.bits(relation)
        assert bits is not None
        a = graph[relation].to_sparse_csr().to_dense() > 0
        assert torch.equal(bits.by_row, packed_words(a))
        assert torch.equal(bits.by_column, packed_words(a.t()))


def test_which_relations_are_packed() -> None:
    n = multigraph._MIN_PACKED
    many = torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < 1.1 * multigraph._DENSE
    edges = {"dense": many.nonzero().t(), "weighted": many.nonzero().t(), "sparse": torch.tensor([[0], [1]])}
    weight = {"weighted": torch.full((edges["weighted"].shape[1],), 2.0)}
    graph = MultiGraph.from_edge_index(edges, n, edge_weight=weight)
    assert [graph.bits(name) is not None for name in graph] == [True, False, False]
    assert graph.subgraph(torch.arange(n - 1)).bits("dense") is None, "small"
    assert graph.hops("sparse", 3).bits("sparse") is None
    hub = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)])
    assert MultiGraph.from_edge_index({"hub": hub}, n, undirected=True).hops("hub", 2).bits("hub") is not None


@pytest.mark.usefixtures("packed")
def test_bits_go_where_the_graph_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To another device, for which "meta" stands, and back; on a CPU without the extension, which sums them, it is CSR."""
    graph = random_graph(20, {"a": 100})
    torch.save(graph, tmp_path / "graph.pt")
    here, there = (torch.load(tmp_path / "graph.pt", map_location=device) for device in ("cpu", "meta"))
    for read, device in ((here, "cpu"), (there, "meta")):
        assert {x.device.type for x in read.bits("a")} == {device}
    monkeypatch.setattr(multigraph, "AVAILABLE", False)
    assert here.bits("a") is None
    assert random_graph(20, {"a": 100}).bits("a") is None
    assert there.bits("a") is not None


@pytest.mark.parametrize("dim", [-2, 1])
def test_rows_in_the_order_of_a_gpu(dim: int) -> None:
    """What is done there in the place of index_select, values and gradients."""
    rows = torch.tensor([3, 0, 3, 3])
    (x,) = leaves((2, 3, 5, 4))
    assert_same(lambda x: _rows._in_order(x, dim, rows.clamp_max(2)), lambda x: x.index_select(dim, rows.clamp_max(2)), x)
    assert _rows._in_order(x, dim, rows.clamp_max(2)).is_contiguous()


@pytest.mark.usefixtures("packed")
def test_chosen_columns() -> None:
    """x has some columns, one of them three times; the gradient is the transposed product, and its gradient the product."""
    graph = random_graph(20, {"a": 200})
    bits, rows, columns = graph.bits("a"), torch.tensor([4, 0, 4]), torch.tensor([7, 3, 7, 7, 19])
    assert bits is not None
    a = graph["a"].to_sparse_csr().to_dense().double()[rows][:, columns]
    (x,) = leaves((2, 5, 3))
    assert_same(lambda x: bit_sum(x, *bits, rows, columns), lambda x: a @ x, x)
    torch.autograd.gradgradcheck(lambda x: bit_sum(x, *bits, rows, columns), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_a_row_that_is_named_often_are_rounded_once(dtype: torch.dtype) -> None:
    """A thousand numbers of one sign, summed in float32: to half a spacing of the dtype, and 1,000 roundings of float32."""
    x = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
    upstream = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    (got,) = torch.autograd.grad(_rows._in_order(x, -2, torch.full((1000,), 2)), x, upstream)
    want = upstream.double().sum(0)
    share = torch.finfo(dtype).eps / 2 + 1000 * torch.finfo(torch.float32).eps
    assert ((got[2].double() - want).abs() <= share * want).all()


def both_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[MultiGraph]:
    """The same graph, as bits and as CSR; unknown genes, rows without edges, a relation that has weights."""
    edges = {"dense": torch.rand(37, 37).lt(0.5).nonzero().t(), "sparse": torch.tensor([[0, 3, 3], [4, 3, 1]])}
    edges["weighted"] = edges["sparse"]
    for limit in (0, 2):
        monkeypatch.setattr(multigraph, "_MIN_PACKED", 0)
        monkeypatch.setattr(multigraph, "_DENSE", limit)
        weight = {"weighted": torch.tensor([0.5, 2.0, 1.0])}
        yield MultiGraph.from_edge_index(edges, 37, edge_weight=weight).extend(3, {"sparse": torch.tensor([[37, 3], [5, 38]])})


@pytest.mark.parametrize("index", [None, [3, 0, 17, 3], [5], []], ids=["all", "some", "one", "none"])
@pytest.mark.parametrize("over", ["tokens", "valid"])
@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_kl_of_every_combination(
    lead: tuple[int, ...], over: str, index: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    as_bits, as_csr = both_graphs(monkeypatch)
    chosen = None if index is None else torch.tensor(index, dtype=torch.int64)
    q, k = leaves((*lead, 41, 8), (*lead, 41, 8))
    assert [as_bits.bits(name) is not None for name in as_bits] == [True, True, False]
    assert not any(as_csr.bits(name) for name in as_csr)
    for relation, reduction in itertools.product(as_bits, ("mean", "sum", "none")):
        options: dict[str, Any] = {"rows": chosen, "over": over, "num_prefix": 1, "reduction": reduction}
        assert_same(
            lambda q, k: cellattn.attention_kl(q, k, as_bits, relation, **options),
            lambda q, k: reference.attention_kl(q, k, as_csr, relation, **options),
            q,
            k,
        )


def test_ties_of_both_kinds_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    as_bits, as_csr = both_graphs(monkeypatch)
    q, k, v = leaves((2, 3, 41, 8), (2, 3, 41, 8), (2, 3, 41, 5))
    ties = [("sparse", 2), ("weighted", 0), ("dense", 0), ("dense", 2)]
    for loss in ("kl", "bce"):
        options: dict[str, Any] = {"loss": loss, "rows": {"dense": torch.tensor([1, 5]), "weighted": torch.tensor([3])}}
        assert_same(
            lambda q, k, v: torch.stack(cellattn.graph_attention(q, k, v, as_bits, ties, **options)[1]),
            lambda q, k, v: torch.stack(cellattn.graph_attention(q, k, v, as_csr, ties, **options)[1]),
            q,
            k,
            v,
        )


def test_chosen_rows_of_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all losses that take sums over bits: a column of a table of indices, and one gene for all."""
    torch.manual_seed(0)
    as_bits, as_csr = both_graphs(monkeypatch)
    table = torch.tensor([[3, 77], [0, 77], [17, 77], [3, 77]])
    q, k, v = leaves((2, 41, 8), (2, 41, 8), (2, 41, 5))

    def losses(graph: MultiGraph, genes: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"rows": genes, "num_prefix": 1, "reduction": "none"}
        shared = graph.comembership("dense")
        return [
            cellattn.attention_kl(q[0], k[0], graph, "dense", over="valid", **options),
            *cellattn.graph_attention(q, k, v, graph, [("dense", 1), ("sparse", 0)], dropout_p=0.1, **options)[1],
            cellattn.attention_kl_comembership(q[0], k[0], shared, **options),
            cellattn.attention_bce(q[0], k[0], graph, "dense", **options),
        ]

    monkeypatch.setattr(_dense, "LARGEST", 0)  # streamed, as large maps are
    for genes in (table[:, 0], table[:1, 0].expand(4), table.int()[:, 0]):
        got, want = losses(as_bits, genes), losses(as_csr, genes.clone(memory_format=torch.contiguous_format))
        grads = [torch.autograd.grad(torch.stack(x).sum(), (q, k)) for x in (got, want)]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    as_bits, _ = both_graphs(monkeypatch)
    q, k = [x.detach().to(dtype) for x in leaves((2, 41, 20), (2, 41, 20))]
    assert_within_rounding(
        lambda q, k: cellattn.attention_kl(q, k, as_bits, "dense", num_prefix=1, reduction="none"),
        lambda q, k: reference.attention_kl(q, k, as_bits, "dense", num_prefix=1, reduction="none"),
        q,
        k,
    )


@pytest.mark.usefixtures("packed")
def test_a_wrong_bit_is_found() -> None:
    """The comparison with CSR is one: without one of 600 edges the products differ by far more than rounding."""
    graph = random_graph(40, {"a": 600})
    bits = graph.bits("a")
    assert bits is not None
    q, k = (x.detach() for x in leaves((1, 40, 8), (1, 40, 8)))
    args: Any = (graph, [("a", 0)], [None])
    torch.testing.assert_close(row_dot(q, k, *args, num_prefix=0), row_dot_csr(q, k, *args, num_prefix=0))
    bits.by_row[int(graph.degree("a").argmax()), 0] &= bits.by_row[int(graph.degree("a").argmax()), 0] - 1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(row_dot(q, k, *args, num_prefix=0), row_dot_csr(q, k, *args, num_prefix=0))


@pytest.mark.usefixtures("packed")
def test_under_compile_vmap_and_forward_mode() -> None:
    graph = random_graph(40, {"a": 600})
    bits = graph.bits("a")
    assert bits is not None
    q, k = leaves((3, 41, 8), (3, 41, 8))

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return cellattn.attention_kl(q, k, graph, "a", num_prefix=1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), loss(q, k))
    by_vmap = torch.func.vmap(loss)(q.detach(), k.detach())
    torch.testing.assert_close(by_vmap, torch.stack([loss(*pair) for pair in zip(q, k, strict=True)]))
    x, tangent = (y.detach()[:, 1:] for y in (q, k))
    out = torch.func.jvp(lambda x: bit_sum(x, *bits, None, None), (x,), (tangent,))[1]
    torch.testing.assert_close(out, bit_sum(tangent, *bits, None, None))


@pytest.mark.usefixtures("packed")
def test_copies_keep_the_bits() -> None:
    import pickle

    graph = random_graph(40, {"a": 600})
    mine, other = graph.bits("a"), pickle.loads(pickle.dumps(graph)).bits("a")
    assert mine is not None
    assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))
