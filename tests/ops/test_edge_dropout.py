"""Dropout of hard masks: the same entries along edges and in blocks, two for a pair that is seen twice, and gone at p = 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cellattn
from cellattn import MultiGraph, reference

from ..bounds import assert_within_rounding
from ..compare import assert_same, everything, least_memory, leaves, random_graph
from ..conftest import exhaustive
from .test_dropout import agreement, generator
from .test_edge_attention import DENSE, HEADS, SPECIAL, _finite, bound, dense_graph, inputs, problems, with_special

GRAPH = random_graph(60, {"a": 400, "b": 90}, weighted=True)


def dropped(module: Any, graph: MultiGraph, dropout_p: float = 0.3, heads: Any = HEADS, **options: Any) -> Callable[..., Any]:
    """The op of a module, which draws the same at every call; a log-sum-exp of nothing is 0, to be compared."""
    return lambda *x: _finite(
        bound(module.edge_attention, graph, heads, dropout_p=dropout_p, generator=generator(), **options)(*x)
    )


def both(graph: MultiGraph, dropout_p: float = 0.3, **options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return dropped(cellattn, graph, dropout_p, **options), dropped(reference, graph, dropout_p, **options)


@problems
@pytest.mark.parametrize(("num_prefix", "self_loops"), [(0, False), (1, True), (3, False)], ids=str)
@pytest.mark.parametrize("weighted", [True, *exhaustive(False)])
def test_values_and_gradients(problem, num_prefix: int, self_loops: bool, weighted: bool) -> None:
    n, edges_a, edges_b, d, dv = problem
    graph = random_graph(n, {"a": edges_a, "b": edges_b}, weighted=True)
    ours, theirs = both(graph, num_prefix=num_prefix, self_loops=self_loops, weighted=weighted, scale=0.4)
    x = inputs(n, num_prefix, d, dv)
    assert_same(ours, theirs, *x)
    if n > 1 and (num_prefix or self_loops):  # else a bias that all entries of a row gain has a gradient of 0, and of rounding
        assert_same(lambda *x: ours(*x)[0], lambda *x: theirs(*x)[0], *x)
        assert_same(lambda *x: ours(*x)[1], lambda *x: theirs(*x)[1], *x)


@pytest.mark.parametrize(("num_prefix", "self_loops"), [(0, False), (0, True), (1, True), (3, False), (70, True)], ids=str)
@pytest.mark.parametrize("p", [0.3, *exhaustive(0.9)])
def test_dense_relations(num_prefix: int, self_loops: bool, p: float) -> None:
    """In blocks, beside a head that goes along the entries; some genes see themselves twice."""
    heads = [("s", 1), ("d", 0)]
    ours, theirs = both(DENSE, p, heads=heads, num_prefix=num_prefix, self_loops=self_loops)
    t = num_prefix + 600
    assert_same(ours, theirs, *leaves((2, t, 5), (2, t, 5), (2, t, 3)))


@pytest.mark.parametrize("isa", ["", "portable", *exhaustive("avx2")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_precisions_are_within_rounding(dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLATTN_ISA", isa)

    def of(module: Any) -> Callable[..., Any]:
        return lambda *x: module.edge_attention(*x, GRAPH, HEADS, weighted=True, dropout_p=0.3, generator=generator())

    assert_within_rounding(of(cellattn), of(reference), *inputs(60, 1, 20, 20, (), dtype)[:3], parts=True)


def kept(
    graph: MultiGraph,
    heads: Any,
    p: float = 0.3,
    dtype: torch.dtype = torch.float64,
    lead: tuple[int, ...] = (),
    **options: Any,
) -> Tensor:
    """bool [*lead, H, T, T]: whether anything that a token sees of another stays, read off an identity as values."""
    num_heads, t = 1 + max(head for _, head in heads), graph.num_nodes + options.get("num_prefix", 1)
    q = torch.zeros(*lead, num_heads, t, 1, dtype=dtype)
    v = torch.eye(t, dtype=dtype).expand(*lead, num_heads, t, t)
    return cellattn.edge_attention(q, q, v, graph, heads, dropout_p=p, generator=generator(), **options)[0] != 0


@pytest.mark.parametrize("isa", ["", "portable", *exhaustive("avx2")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_entries_are_those_of_the_definition(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix, own and edge entries of 4 pairs, bit for bit, whatever the instructions and threads."""
    monkeypatch.setenv("CELLATTN_ISA", isa)
    n, num_prefix = 150, 3
    graph = random_graph(n, {"a": 3000, "b": 500}).without_self_loops(None)
    heads, t = [("b", 1), ("a", 0), ("a", 2), ("b", 2)], n + num_prefix
    own, *edges = reference.dropout_multiplier((3, t, t), 0.3, generator(), copies=range(5))
    tokens = torch.arange(t)
    near = (tokens[:, None] < num_prefix) | (tokens[None, :] < num_prefix) | (tokens[:, None] == tokens[None, :])
    want = (own != 0) & near
    for copy, (relation, head) in zip(edges, heads, strict=True):
        row, col = graph.edge_index(relation) + num_prefix
        want[head, row, col] |= copy[head, row, col] != 0
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(kept(graph, heads, dtype=dtype, num_prefix=num_prefix), want)
    finally:
        torch.set_num_threads(before)


def test_rows_and_entries_of_the_prefix_are_those_of_attention() -> None:
    """So is what a gene without an edge sees: the prefix and itself."""
    graph = MultiGraph.from_edge_index({"a": torch.empty(2, 0, dtype=torch.int64)}, 40)
    z = reference.dropout_multiplier((2, 45, 45), 0.3, generator()) != 0
    got = kept(graph, [("a", 0), ("a", 1)], num_prefix=5)
    assert torch.equal(got[:, :5], z[:, :5])
    assert torch.equal(got[:, 5:, :5], z[:, 5:, :5])
    assert torch.equal(got.diagonal(0, 1, 2), z.diagonal(0, 1, 2))


def test_blocks_and_entries_drop_the_same() -> None:
    """Weights, all of them 1, go along the entries. Heads are counted over leading dimensions too."""
    blocks, entries = (
        kept(DENSE, [("d", 0), ("d", 1)], weighted=weighted, dtype=torch.float32, lead=(2,)) for weighted in (False, True)
    )
    assert torch.equal(blocks, entries)
    assert not torch.equal(blocks[0], blocks[1])
    blocks = blocks[0]
    assert 0.6 < float(blocks.float().sum() / kept(DENSE, [("d", 0), ("d", 1)], 0.0).sum()) < 0.8


def test_rate_and_independence() -> None:
    """The share of 100,000 entries that is kept, and of one relation's and another's with the same pairs."""
    n = 330
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    graph = MultiGraph.from_edge_index({"a": pairs, "b": pairs}, n)
    options: dict[str, Any] = {"num_prefix": 0, "self_loops": False}
    one = kept(graph, [("a", 0), ("b", 1)], **options)
    share = float(one[0].double().mean())
    assert abs(share - 0.7) < 5 * (0.21 / n**2) ** 0.5 + 2**-16
    assert abs(agreement(one[0], one[1])) < 5  # heads
    copies = reference.dropout_multiplier((1, n, n), 0.3, generator(), copies=range(4))
    for i, j in ((0, 1), (1, 2), (1, 3)):
        assert abs(agreement(copies[i], copies[j])) < 5
    # an edge in two relations of a head is gone where both entries are: 0.3 squared
    two = kept(graph, [("a", 0), ("b", 0)], **options)
    assert abs(float(two.double().mean()) - 0.91) < 5 * (0.09 * 0.91 / n**2) ** 0.5 + 2**-15


@pytest.mark.parametrize("graph", [GRAPH, DENSE], ids=["entries", "blocks"])
@pytest.mark.parametrize("p", [0, 0.0, 1e-6])
def test_no_dropout_is_bit_equal_and_draws_nothing(p: float, graph: MultiGraph) -> None:
    heads = [(graph.relations[0], 0), (graph.relations[1], 1)]
    x = leaves(*[(2, graph.num_nodes + 1, 8)] * 3, dtype=torch.float32)
    g = generator()
    state = g.get_state()
    got = everything(bound(cellattn.edge_attention, graph, heads, dropout_p=p, generator=g), *x)
    want = everything(bound(cellattn.edge_attention, graph, heads), *x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(g.get_state(), state)


def test_lse_sees_the_whole_map() -> None:
    x = [y.detach() for y in inputs(60, 1, 8, 8)]
    whole = bound(cellattn.edge_attention, GRAPH)(*x)
    got = dropped(cellattn, GRAPH, 0.5)(*x)
    assert torch.equal(got[1], whole[1])
    assert not torch.equal(got[0], whole[0])


def test_almost_everything_dropped_is_finite() -> None:
    for graph, n in ((GRAPH, 60), (DENSE, 600)):
        heads = [(graph.relations[0], 0)]
        assert_same(*both(graph, 1 - 1e-9, heads=heads), *leaves(*[(1, n + 1, 6)] * 3))


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_special_values(name: str, value: float) -> None:
    graph, given = with_special(name, value)
    for a, b in zip(*(f(*given.values()) for f in both(graph, 0.5)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_gradcheck() -> None:
    graph = random_graph(5, {"a": 9, "b": 6}, weighted=True)
    assert torch.autograd.gradcheck(dropped(cellattn, graph, weighted=True), inputs(5, 1, 3, 2, ()))


@pytest.mark.parametrize("own", [False, True], ids=["default generator", "own generator"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_again(own: bool, reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        g = generator() if own else None

        def f(*x: Tensor, g: torch.Generator | None = g) -> Tensor:
            out, lse = bound(cellattn.edge_attention, GRAPH, dropout_p=0.5, generator=g)(*x)
            return bound(cellattn.edge_attention, GRAPH, dropout_p=0.5, generator=g)(out, *x[1:])[0] + lse.unsqueeze(-1)

        x = [y.detach().clone().requires_grad_() for y in inputs(60, 1, 8, 8)]
        y = checkpoint(f, *x, use_reentrant=reentrant) if checkpointed else f(*x)
        y.square().sum().backward()
        results.append([y.detach(), *(z.grad for z in x)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dynamic", [*exhaustive(False), True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    """And draws what it draws uncompiled, from the default generator."""
    torch._dynamo.reset()

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, graph: MultiGraph) -> tuple[Tensor, Tensor]:
        return cellattn.edge_attention(q, k, v, graph, HEADS, edge_bias=bias, dropout_p=0.5)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 31):
        graph, results = random_graph(n, {"a": 60, "b": 40}), []
        for run in (f, compiled):
            torch.manual_seed(1)
            results.append(everything(lambda *x, run=run: run(*x, graph), *inputs(n, 1, 8, 5)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_vmap_draws_as_it_is_told() -> None:
    x = [y.detach() for y in inputs(20, 1, 8, 8, (3,))[:3]]
    graph = random_graph(20, {"a": 60, "b": 40})

    def f(*x: Tensor) -> Tensor:
        return bound(cellattn.edge_attention, graph, dropout_p=0.5)(*x)[0]

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(f)(*x)
    a, b = (torch.vmap(f, randomness=how)(*(y[:1].expand_as(y) for y in x)) for how in ("same", "different"))
    assert a.shape == b.shape == x[0].shape
    assert torch.equal(a[0], a[1])
    assert not torch.equal(b[0], b[1])


@pytest.mark.parametrize(
    "graph", [random_graph(10_000, {"a": 50_000, "b": 10_000}), dense_graph(2000)], ids=["entries", "blocks"]
)
def test_memory_is_of_tokens_not_of_pairs(graph: MultiGraph, two_threads: None) -> None:
    """A float32 tensor of all pairs would take 400 MB and 16 MB here."""
    n, heads = graph.num_nodes, [(graph.relations[0], 0)]
    x = leaves(*[(1, n + 1, 8)] * 3, dtype=torch.float32)

    def step(p: float) -> None:
        out, lse = bound(cellattn.edge_attention, graph, heads, dropout_p=p)(*x)
        (out.sum() + lse.sum()).backward()

    most = least_memory(lambda: step(0.0), times=2) + 4e6
    assert least_memory(lambda: step(0.1), most) < most


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 1}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got int 1"),
        ({"dropout_p": True}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got bool True"),
        ({"dropout_p": 0.1, "generator": 3}, TypeError, r"generator: expected a torch.Generator or None, got int 3"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    q = torch.zeros(1, 61, 4)
    with pytest.raises(error, match=message):
        cellattn.edge_attention(q, q, q, GRAPH, [("a", 0)], **options)
