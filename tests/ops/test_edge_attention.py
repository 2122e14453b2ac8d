"""Attention along edges: which entries a row sees, values and gradients against the dense definition, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference

from ..bounds import assert_within_rounding
from ..compare import assert_same, everything, least_memory, leaves, random_graph
from ..conftest import exhaustive

# genes, edges of a and b, head_dim, Dv: without an edge, with all, a hub, rows without any, and values of no features
PROBLEMS = [
    (1, 0, 0, 1, 1),
    (1, 1, 0, 8, 3),
    (20, 60, 40, 8, 5),
    (20, 60, 40, 8, 0),
    (63, 0, 300, 20, 20),
    (40, 1600, 1600, 7, 64),
    (129, 900, 9, 100, 8),
]
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=str)
HEADS = [("a", 0), ("b", 1), ("a", 2), ("b", 2), ("a", 2)]


def bound(f: Callable[..., Any], graph: MultiGraph, heads: Sequence[tuple[str, int]] = HEADS, **options: Any):
    """f of q, k, v and, where given, the bias."""
    return lambda q, k, v, *bias: f(q, k, v, graph, heads, **options, **({"edge_bias": bias[0]} if bias else {}))


def inputs(n: int, num_prefix: int, d: int, dv: int, lead: Sequence[int] = (2,), dtype=torch.float64) -> list[Tensor]:
    t = num_prefix + n
    return leaves((*lead, 3, t, d), (*lead, 3, t, d), (*lead, 3, t, dv), (len(HEADS),), dtype=dtype)


@problems
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients(problem, num_prefix: int, self_loops: bool, weighted: bool) -> None:
    n, edges_a, edges_b, d, dv = problem
    graph = random_graph(n, {"a": edges_a, "b": edges_b}, weighted=True)
    options: dict[str, Any] = {"num_prefix": num_prefix, "self_loops": self_loops, "weighted": weighted, "scale": 0.4}
    ours, theirs = (bound(m.edge_attention, graph, **options) for m in (cellattn, reference))
    if num_prefix == 0 and not self_loops:  # rows that see nothing: lse is -inf there, and not finite to be compared
        ours, theirs = ((lambda *x, f=f: _finite(f(*x))) for f in (ours, theirs))
    x = inputs(n, num_prefix, d, dv)
    assert_same(ours, theirs, *x)
    if n > 1 and (num_prefix or self_loops):  # else a bias that all entries of a row gain has a gradient of 0, and of rounding
        assert_same(lambda *x: ours(*x)[0], lambda *x: theirs(*x)[0], *x)
        assert_same(lambda *x: ours(*x)[1], lambda *x: theirs(*x)[1], *x)


def _finite(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = outputs
    return out, lse.masked_fill(lse == -torch.inf, 0)


@pytest.mark.parametrize("isa", ["", "portable", *exhaustive("avx2")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_precisions_are_within_rounding(dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLATTN_ISA", isa)
    graph = random_graph(60, {"a": 400, "b": 90}, weighted=True)
    ours, theirs = (bound(m.edge_attention, graph, weighted=True) for m in (cellattn, reference))
    assert_within_rounding(ours, theirs, *inputs(60, 1, 20, 20, (), dtype)[:3], parts=True)


@pytest.mark.parametrize("isa", ["", "portable", *exhaustive("avx2")])
def test_instructions(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLATTN_ISA", isa)
    graph = random_graph(60, {"a": 400, "b": 90}, weighted=True)
    ours, theirs = (bound(m.edge_attention, graph, weighted=True, num_prefix=2) for m in (cellattn, reference))
    assert_same(ours, theirs, *inputs(60, 2, 20, 7))


def test_threads_change_nothing() -> None:
    graph = random_graph(700, {"a": 4000, "b": 900})
    x = inputs(700, 1, 8, 8, ())
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(everything(lambda *y: tuple(z[..., 1:, :] if z.ndim == 3 else z[..., 1:] for z in bound(
                cellattn.edge_attention, graph)(*y)), *x))  # rows of the prefix are those of attention  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_sees_its_neighbours_and_nothing_else() -> None:
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 0, 2], [1, 2, 2]])}, 4)
    q = torch.zeros(1, 5, 1, dtype=torch.float64)
    v = torch.eye(5, dtype=torch.float64)[None]
    out, lse = cellattn.edge_attention(q, q, v, graph, [("a", 0)])
    third, half = 1 / 3, 1 / 2
    want = [
        [0.2] * 5,  # the prefix sees everything
        [0.25, 0.25, 0.25, 0.25, 0.0],
        [half, 0.0, half, 0.0, 0.0],  # no edge: prefix and itself
        [third, 0.0, 0.0, 2 * third, 0.0],  # its self-loop in the graph is an entry beside its own
        [half, 0.0, 0.0, 0.0, half],
    ]
    torch.testing.assert_close(out[0], torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(lse[0].exp(), torch.tensor([5.0, 4, 2, 3, 2], dtype=torch.float64))
    out, lse = cellattn.edge_attention(q[:, 1:], q[:, 1:], v[:, 1:, 1:], graph, [("a", 0)], num_prefix=0, self_loops=False)
    assert lse[0].tolist()[1::2] == [-torch.inf] * 2
    assert torch.equal(out[0, 1::2], torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("self_loops", [True, False])
def test_gradcheck(self_loops: bool) -> None:
    graph = random_graph(5, {"a": 9, "b": 6}, weighted=True)
    x = inputs(5, 1, 3, 2, ())
    assert torch.autograd.gradcheck(bound(cellattn.edge_attention, graph, weighted=True, self_loops=self_loops), x)


SPECIAL = [float("nan"), float("inf"), -float("inf"), 1e300]


def with_special(name: str, value: float) -> tuple[MultiGraph, dict[str, Tensor]]:
    """A graph, and q, k, v of which one has this value in one token."""
    given = dict(zip(("q", "k", "v"), (x.detach() for x in inputs(30, 1, 4, 4, ())[:3]), strict=True))
    given[name][0, 4, 1] = value
    return random_graph(30, {"a": 60, "b": 40}), given


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_special_values(name: str, value: float) -> None:
    """Of rows that see what is not finite alone; the others are as without it."""
    graph, given = with_special(name, value)

    def run(f: Callable[..., Any]) -> list[Tensor]:
        x = [y.clone().requires_grad_() for y in given.values()]
        out, lse = bound(f, graph)(*x)
        return [out.detach(), lse.detach()]

    for a, b in zip(run(cellattn.edge_attention), run(reference.edge_attention), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_double_backward_is_a_clear_error() -> None:
    graph = random_graph(5, {"a": 9, "b": 6})
    q, k, v, _ = inputs(5, 0, 3, 2, ())
    out, _ = bound(cellattn.edge_attention, graph, num_prefix=0)(q, k, v)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"edge_attention: double backward is not supported"):
        dq.sum().backward()


GRAPH = random_graph(6, {"a": 9, "b": 6})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": [("a", 0)]}, ValueError, r"heads: expected each of the 2 heads once at least, got none of \[1\]"),
        ({"heads": [("a", 0), ("a", 2)]}, ValueError, r"heads\[1\]: expected a head in \[0, 2\), got int 2"),
        ({"heads": [("a", 0), ("c", 1)]}, ValueError, r"'c'"),
        ({"heads": "a"}, ValueError, r"heads: expected a sequence of \(relation, head\), got str 'a'"),
        ({"num_prefix": 2}, ValueError, r"q: expected 2 prefix tokens \+ 6 genes"),
        ({"edge_bias": torch.zeros(3)}, ValueError, r"edge_bias: expected shape \[2\].*got \[3\]"),
        ({"edge_bias": torch.zeros(2, dtype=torch.int64)}, ValueError, r"edge_bias: expected dtype float32"),
        ({"weighted": 1}, TypeError, r"weighted: expected a bool, got int 1"),
        ({"self_loops": None}, TypeError, r"self_loops: expected a bool, got NoneType None"),
        ({"scale": float("nan")}, ValueError, r"scale: expected a finite number"),
        ({"k": torch.zeros(2, 6, 4)}, ValueError, r"k: expected the shape of q, \[2, 7, 4\], got \[2, 6, 4\]"),
        ({"v": torch.zeros(2, 6, 4)}, ValueError, r"v: expected shape \[2, 7, 'Dv'\], as k has, got \[2, 6, 4\]"),
        ({"graph": None}, TypeError, r"graph: expected a MultiGraph, got NoneType None"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.zeros(2, 7, 4)
    given = {"q": x, "k": x, "v": x, "graph": GRAPH, "heads": [("a", 0), ("b", 1)], **options}
    with pytest.raises(error, match=message):
        cellattn.edge_attention(**given)


def test_negative_scale_and_no_leading_dimension() -> None:
    ours, theirs = (bound(m.edge_attention, GRAPH, scale=-1.5) for m in (cellattn, reference))
    assert_same(ours, theirs, *inputs(6, 1, 4, 4, ()))
    assert_same(ours, theirs, *inputs(6, 1, 4, 4, (2, 1)))


@pytest.mark.parametrize("dynamic", [*exhaustive(False), True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, graph: MultiGraph) -> tuple[Tensor, Tensor]:
        return cellattn.edge_attention(q, k, v, graph, HEADS, weighted=True, edge_bias=bias)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 31):
        graph = random_graph(n, {"a": 60, "b": 40}, weighted=True)
        assert_same(partial(compiled, graph=graph), partial(f, graph=graph), *inputs(n, 1, 8, 5))


def test_memory_is_of_tokens_not_of_pairs(two_threads: None) -> None:
    """A [T, T] float32 tensor would take 400 MB here."""
    graph = random_graph(10_000, {"a": 50_000, "b": 10_000})
    q, k, v, bias = inputs(10_000, 1, 8, 8, (), torch.float32)

    def step() -> None:
        out, lse = bound(cellattn.edge_attention, graph)(q, k, v, bias)
        (out.sum() + lse.sum()).backward()

    assert least_memory(step, 40e6) < 40e6


@pytest.mark.parametrize(("dim", "most"), [(16, 15), (20, 18)], ids=["whole vectors", "copied"])
def test_memory_in_tensors(dim: int, most: int, two_threads: None) -> None:
    """Of the size of q: results, gradients, and what the operator copies. A copy of every tensor more would be seven."""
    tokens = 20_000
    graph = random_graph(tokens - 1, {"a": 50_000})
    q, k, v = leaves(*((4, tokens, dim),) * 3, dtype=torch.float32)

    def step() -> None:
        out, _ = cellattn.edge_attention(q, k, v, graph, [("a", head) for head in range(4)])
        torch.autograd.grad(out.sum(), (q, k, v))

    least = least_memory(step, most * q.nbytes)
    assert least < most * q.nbytes, least / q.nbytes


def dense_graph(n: int = 600, share: float = 0.4) -> MultiGraph:
    """d is made in blocks, s is not: one row of d is empty, one full with its loop, and no row of d sees gene 7."""
    g = torch.Generator().manual_seed(0)
    d, s = torch.rand(n, n, generator=g) < share, torch.rand(n, n, generator=g) < 0.01
    d[5] = False
    d[9] = True
    d[:, 7] = False
    return MultiGraph.from_edge_index({"d": d.nonzero().T, "s": s.nonzero().T}, n)


DENSE = dense_graph()


@pytest.mark.parametrize(("num_prefix", "self_loops"), [(0, False), (1, True), (3, False), (70, True)], ids=str)
@pytest.mark.parametrize("d", [5, 16])
def test_dense_relations(num_prefix: int, self_loops: bool, d: int) -> None:
    """Beside a head that is not dense, and in one with a second relation, which goes along the entries."""
    options: dict[str, Any] = {"num_prefix": num_prefix, "self_loops": self_loops}
    heads = [("d", 0), ("s", 1), ("d", 2), ("s", 2)]
    ours, theirs = (bound(m.edge_attention, DENSE, heads, **options) for m in (cellattn, reference))
    if num_prefix == 0 and not self_loops:
        ours, theirs = ((lambda *x, f=f: _finite(f(*x))) for f in (ours, theirs))
    t = num_prefix + 600
    assert_same(ours, theirs, *leaves((3, t, d), (3, t, d), (3, t, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_relations_are_within_rounding(dtype: torch.dtype) -> None:
    graph = dense_graph(520)
    x = leaves((2, 1, 521, 8), (2, 1, 521, 8), (2, 1, 521, 4), dtype=dtype)
    ours, theirs = (bound(m.edge_attention, graph, [("d", 0)], self_loops=False) for m in (cellattn, reference))
    exact = [y.double() for y in everything(theirs, *(z.double() for z in x))]
    got = everything(ours, *x)
    eps = torch.finfo(dtype).eps
    for ours_, want in zip(got, exact, strict=True):
        # the longest path: a score of 8 products, an exponential of it, a sum of 521 of them and one of their products
        assert float((ours_.double() - want).norm()) <= 8 * eps * float(want.norm())


def test_dense_relations_are_made_in_blocks() -> None:
    """In another order than along the entries, which those with weights, all of them 1, are summed in."""
    x = leaves((2, 601, 16), (2, 601, 16), (2, 601, 16), dtype=torch.float32)
    heads = [("d", 0), ("d", 1)]
    blocks, entries = (
        everything(bound(cellattn.edge_attention, DENSE, heads, weighted=weighted), *x) for weighted in (False, True)
    )
    assert not torch.equal(blocks[0], entries[0])
    for a, b in zip(blocks, entries, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())
    again = everything(bound(cellattn.edge_attention, DENSE, heads), *x)
    assert all(torch.equal(a, b) for a, b in zip(blocks, again, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25], ids=str)
def test_what_a_dense_relation_does_not_see_leaves_no_trace(value: float) -> None:
    """Gene 7 is in no row: values that blocks of products would spread go along the entries instead."""
    q, k, v = (x.detach() for x in leaves((1, 600, 4), (1, 600, 4), (1, 600, 4), dtype=torch.float32))
    call = partial(cellattn.edge_attention, graph=DENSE, heads=[("d", 0)], num_prefix=0, self_loops=False)
    want = everything(lambda q, k, v: _finite(call(q, k, v)), q, k, v)
    odd = [x.index_fill(1, torch.tensor([7]), value) for x in (k, v)]
    got = everything(lambda q, k, v: _finite(call(q, k, v)), q, *odd)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


def test_unseen_values_whose_products_overflow_leave_no_trace() -> None:
    """dOut . v of a pair that is in no sum is infinite in float32."""
    q, k, v = (x.detach() for x in leaves((1, 600, 4), (1, 600, 4), (1, 600, 4), dtype=torch.float32))
    odd = v.index_fill(1, torch.tensor([7]), 1e38).requires_grad_()
    out, _ = cellattn.edge_attention(
        q.requires_grad_(), k.requires_grad_(), odd, DENSE, [("d", 0)], num_prefix=0, self_loops=False
    )
    assert all(x.isfinite().all() for x in torch.autograd.grad(out, (q, k, odd), torch.full_like(out, 100.0)))


def test_no_heads() -> None:
    graph = random_graph(5, {"a": 9})
    x, bias = torch.zeros(0, 5, 4, requires_grad=True), torch.zeros(0, requires_grad=True)
    out, _ = cellattn.edge_attention(x, x, x, graph, [], edge_bias=bias, num_prefix=0)
    out.sum().backward()
    assert bias.grad is not None
    assert bias.grad.shape == (0,)
