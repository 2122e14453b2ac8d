from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cellattn
from cellattn import MultiGraph, reference
from cellattn.ops._csr import both_ways
from cellattn.ops._rows import REDUCTIONS
from cellattn.ops.network_mse import _at_once, _network_mse, _network_mse_backward, network_mses

from ..bounds import arithmetic_of, assert_within_rounding
from ..compare import assert_same, everything, leaves, random_graph, values_and_grads
from ..conftest import exhaustive

ROWS = {"all": None, "some": [3, 0, 17], "one": [5], "none": [], "twice": [4, 4, 9], "unknown": [37, 39, 2]}


def graphs(weighted: bool) -> MultiGraph:
    """Dense, sparse and empty relations over 37 genes, and three new genes of which two are known in one relation."""
    graph = random_graph(37, {"dense": 600, "sparse": 20, "empty": 0}, weighted=weighted)
    return graph.extend(3, {"sparse": torch.tensor([[37, 3], [5, 38]])})


def loss(module: Any, graph: MultiGraph, relation: str, **options: Any) -> Callable[..., Tensor]:
    return lambda z, w, b: module.network_mse(z, w, b, graph, relation, **options)


def decoder(n: int, d: int, **options: Any) -> list[Tensor]:
    return leaves((n, d), (n, d), (n,), **options)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("zero_weight", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["binary", "weighted"])
def test_every_combination(weighted: bool, zero_weight: float, rows: str) -> None:
    graph = graphs(weighted)
    index = None if ROWS[rows] is None else torch.tensor(ROWS[rows], dtype=torch.int64)
    for relation, reduction in itertools.product(graph.relations, REDUCTIONS):
        options = {"rows": index, "zero_weight": zero_weight, "reduction": reduction}
        ours, dense = (loss(module, graph, relation, **options) for module in (cellattn, reference))
        assert_same(ours, dense, *decoder(40, 8))


@pytest.mark.parametrize("n", [1, 63, 129, 1000], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("d", [1, 20, 64, 100], ids=lambda d: f"D{d}")
def test_awkward_shapes(n: int, d: int) -> None:
    """Among the rows: one with every gene, and (beyond N = 1) some with none."""
    hub = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)])
    some = torch.randint(n, (2, n), generator=torch.Generator().manual_seed(0))
    graph = MultiGraph.from_edge_index({"hub": torch.cat([some, hub], 1)}, n)
    assert_same(loss(cellattn, graph, "hub"), loss(reference, graph, "hub"), *decoder(n, d))


@pytest.mark.parametrize("relations", [("dense", "sparse", "empty"), ("empty", "dense"), ("sparse",)])
@pytest.mark.parametrize("rows", [None, [[3, 0, 17], [4, 4, 9], []]], ids=["all", "some"])
@pytest.mark.parametrize("zero_weight", [[0.5, 0.5, 0.5], [0.1, 1.0, 0.0]], ids=["one weight", "weights"])
def test_networks_at_once(zero_weight: list[float], rows: list[list[int]] | None, relations: tuple[str, ...]) -> None:
    """As a GPU takes them, and as a CPU does: each by its own definition, in the order that is asked for."""
    graph, k = graphs(True), len(relations)
    chosen = None if rows is None else [torch.tensor(x, dtype=torch.int64) for x in rows[:k]]

    def in_turn(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.stack(
            [
                reference.network_mse(
                    z[i], w[i], b[i], graph, name, zero_weight=zero_weight[i], rows=None if chosen is None else chosen[i]
                )
                for i, name in enumerate(relations)
            ]
        )

    for op in (network_mses, _at_once):
        assert_same(
            lambda *x, op=op: op(*x, graph, relations, zero_weight=zero_weight[:k], rows=chosen), in_turn,
            *leaves((k, 40, 8), (k, 40, 8), (k, 40)),
        )  # fmt: skip


def test_agrees_with_torch_mse() -> None:
    """The definition once more, by another hand: every pair counts 1."""
    graph = random_graph(30, {"a": 200}, weighted=True)
    z, w, b = decoder(30, 8)
    expected = F.mse_loss(F.linear(z, w, b), reference.adjacency(graph, "a"))
    got = cellattn.network_mse(z, w, b, graph, "a", zero_weight=1.0)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_rows_are_a_selection() -> None:
    graph = random_graph(30, {"a": 200})
    inputs = decoder(30, 8)
    rows = cellattn.sample_rows(graph, "a", 7, generator=torch.Generator().manual_seed(0))
    every = loss(cellattn, graph, "a", reduction="none")(*inputs)
    torch.testing.assert_close(loss(cellattn, graph, "a", reduction="none", rows=rows)(*inputs), every[rows])


def test_gradcheck_and_double_backward() -> None:
    graph = random_graph(5, {"a": 9}, weighted=True)
    inputs = decoder(5, 3)
    for rows in (None, torch.tensor([1, 1, 3])):
        assert torch.autograd.gradcheck(loss(cellattn, graph, "a", rows=rows), inputs)
    (dz,) = torch.autograd.grad(loss(cellattn, graph, "a")(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"cellattn.network_mse: double backward is not supported"):
        dz.sum().backward()


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["coarse", "fine"])
@pytest.mark.parametrize("zero_weight", [0.1, 1.0])
def test_float32_where_the_fit_is_good(zero_weight: float, scale: float) -> None:
    """A reconstruction that is all but exact: the loss is a small difference of large terms, scale^2 of the edges' size."""
    n, d = 3000, 16
    g = torch.Generator().manual_seed(0)
    block = torch.randint(d, (n,), generator=g)  # every gene is joined to those of its block: a network of rank d
    graph = MultiGraph.from_edge_index({"a": (block[:, None] == block).nonzero().t()}, n)
    z = F.one_hot(block, d).double()
    noise = scale * torch.randn(2 * n, d, dtype=torch.float64, generator=g)
    inputs = [x.float() for x in (z + noise[:n], z + noise[n:], torch.zeros(n, dtype=torch.float64))]
    f = loss(cellattn, graph, "a", zero_weight=zero_weight, reduction="sum")
    got, want = everything(f, *inputs), everything(f, *(x.double() for x in inputs))
    # A reconstruction of d products is near 1 on the edges, where it is off by g(d) at most, which counts 2 |(1 - lambda) - A|
    # times; the rounding of the result comes on top
    arithmetic = arithmetic_of(torch.float32)
    off = float(arithmetic.sum(torch.tensor(2.0 * d)))
    bound = off * 2 * (zero_weight + 4 * scale) * graph.num_edges("a") + torch.finfo(torch.float32).eps * float(want[0])
    assert float((got[0].double() - want[0]).abs()) <= bound
    assert float(want[0]) < 4 * d * scale**2 * n**2
    for a, b in zip(got[1:], want[1:], strict=True):
        # sums of n / d terms of size 2, each off by `off`
        bound = 2 * n / d * (off + float(arithmetic.sum(torch.tensor(n / d)))) + torch.finfo(torch.float32).eps * float(
            b.abs().max()
        )
        assert float((a.double() - b).abs().max()) <= bound


def test_float32_over_many_genes(isa: str) -> None:
    graph = random_graph(1500, {"a": 30_000}, weighted=True)
    ours, dense = (loss(module, graph, "a") for module in (cellattn, reference))
    assert_within_rounding(ours, dense, *decoder(1500, 64, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_is_within_rounding(dtype: torch.dtype) -> None:
    graph = random_graph(200, {"a": 4000}, weighted=True)
    ours, dense = (loss(module, graph, "a") for module in (cellattn, reference))
    inputs = decoder(200, 20, dtype=dtype)
    assert ours(*inputs).dtype == torch.float32
    assert_within_rounding(ours, dense, *inputs)


def test_autocast_changes_nothing() -> None:
    graph = random_graph(30, {"a": 200})
    inputs = [x.detach().float() for x in decoder(30, 8)]
    f = loss(cellattn, graph, "a", rows=torch.tensor([3, 4]))

    def cast(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return f(*x)

    assert all(torch.equal(a, b) for a, b in zip(everything(f, *inputs), everything(cast, *inputs), strict=True))


def test_unknown_genes_do_not_leak() -> None:
    """NaN and infinity of a gene that is unknown in the relation reach no loss and no gradient."""
    graph = random_graph(20, {"a": 90}).extend(2)
    z, w, b = (x.detach() for x in decoder(22, 4))
    f = loss(cellattn, graph, "a")
    want, dwant = values_and_grads(f, z, w, b)
    for bad in (float("nan"), float("inf")):
        known = graph.known("a")
        poisoned = [torch.where(known.view(-1, *(1,) * (x.ndim - 1)), x, bad) for x in (z, w, b)]
        got, dgot = values_and_grads(f, *poisoned)
        assert all(torch.equal(a, c) for a, c in zip([*got, *dgot], [*want, *dwant], strict=True))
        assert not any(x[20:].any() for x in dgot)


def test_equal_from_run_to_run() -> None:
    graph = random_graph(500, {"a": 20_000}, weighted=True)
    inputs = [x.detach().float() for x in decoder(500, 33)]
    for rows in (None, torch.arange(0, 500, 3), torch.tensor([4, 4, 4, 9])):
        f = loss(cellattn, graph, "a", rows=rows, reduction="none")
        first, again = everything(f, *inputs), everything(f, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strided_inputs() -> None:
    graph = random_graph(30, {"a": 200})
    z, w, b = (x.detach() for x in leaves((8, 30), (8, 30), (30, 2)))
    strided = z.t(), w.t(), b[:, 0]
    f = loss(cellattn, graph, "a")
    for a, want in zip(everything(f, *strided), everything(f, *(x.contiguous() for x in strided)), strict=True):
        torch.testing.assert_close(a, want)


@pytest.mark.parametrize("dynamic", [*exhaustive(False), True], ids=["static", "dynamic"])
def test_compiled_equals_eager(dynamic: bool) -> None:
    def step(z: Tensor, w: Tensor, b: Tensor, graph: MultiGraph, rows: Tensor | None) -> Tensor:
        return cellattn.network_mse(z, w, b, graph, "a", rows=rows) + cellattn.network_mse(z, w, b, graph, "b")

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, rows in ((20, None), (20, torch.tensor([1, 2])), (31, torch.tensor([1, 2, 5]))):
        graph = random_graph(n, {"a": 60, "b": 40}, weighted=True)
        inputs = decoder(n, 4)
        results = [everything(lambda *x, f=f, g=graph, r=rows: f(*x, g, r), *inputs) for f in (step, compiled)]
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        dense = (x for x in tree_leaves(out) if isinstance(x, Tensor) and x.layout == torch.strided)
        self.numel = max([self.numel, *(x.numel() for x in dense)])
        return out


def test_no_dense_matrix() -> None:
    """What the operators make on their way, forward and backward, is as long as the edges or as z, and never N x N."""
    n, d = 2000, 8
    graph = random_graph(n, {"a": 5000})
    target = graph.weight("a")
    known = graph.known_rows("a")[None], graph.known_columns("a")[None]
    args = (*(x.detach().float()[None] for x in decoder(n, d)), target, *known, *both_ways(graph, 0), [0.1])
    forward, backward = (inspect.unwrap(op._init_fn) for op in (_network_mse, _network_mse_backward))
    with Largest() as seen:
        loss, on_edges = forward(*args)
        backward(torch.ones_like(loss), on_edges, *args)
    assert seen.numel == max(n * (d + 1), graph.num_edges("a"))


def test_real_tables(yeast_graph: MultiGraph) -> None:
    inputs = [x.detach() for x in decoder(yeast_graph.num_nodes, 4)]
    rows = cellattn.sample_rows(yeast_graph, "database", 50, generator=torch.Generator().manual_seed(0))
    got = loss(cellattn, yeast_graph, "database", rows=rows)(*inputs)
    z, w, b = inputs
    a = torch.zeros(yeast_graph.num_nodes, yeast_graph.num_nodes, dtype=torch.float64)
    a[tuple(yeast_graph.edge_index("database"))] = yeast_graph.weight("database").double()
    d = F.linear(z[rows], w, b)
    want = ((0.1 + 0.9 * (a[rows] > 0).double()) * (d - a[rows]).square()).mean()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("argument", [0, 1, 2], ids=["z", "weight", "bias"])
def test_what_is_infinite_is_not_hidden(argument: int) -> None:
    """NaN or infinity in each row that reads it, and in no other; the definition has infinity."""
    graph = random_graph(9, {"a": 20}, weighted=True)
    for value in (torch.inf, -torch.inf, torch.nan):
        inputs = decoder(9, 4)
        inputs[argument].data.view(-1)[5] = value
        rows = loss(cellattn, graph, "a", reduction="none")(*inputs)
        exact = loss(reference, graph, "a", reduction="none")(*inputs)
        assert not exact.isfinite().all()
        assert torch.equal(rows.isfinite(), exact.isfinite())
        for reduction in ("mean", "sum"):
            assert not loss(cellattn, graph, "a", reduction=reduction)(*inputs).isfinite()
        rows.sum().backward()
        grad = inputs[argument].grad
        assert grad is not None
        assert not grad.view(-1)[5].isfinite()
