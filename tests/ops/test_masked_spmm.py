from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference
from cellattn.data import synthetic_cell
from cellattn.ops.masked_spmm import REDUCES

from ..bounds import assert_within_rounding
from ..compare import RTOL, assert_same, everything, leaves, random_graph, values_and_grads
from .sets import Problem, problem, problems, random_sets


def mask(num_sets: int, num_nodes: int, seed: int = 0, share: float = 0.7) -> Tensor:
    return torch.rand(num_sets, num_nodes, generator=torch.Generator().manual_seed(seed)) < share


def product(module: Any, *args: Any, **options: Any) -> Callable[..., Tensor]:
    """masked_spmm of x and edge weights, which both get gradients."""
    graph, relation, keep = args
    return lambda x, w: module.masked_spmm(graph, relation, x, keep, edge_weight=w, **options)


@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "transpose"])
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
@pytest.mark.parametrize("features", [1, 7, 64, 100])
def test_values_and_gradients(features: int, shared: bool, reduce: str, transpose: bool, isa: str) -> None:
    p = problem(0, 40, [90, 0, 300], 0)
    keep = mask(9, 40)
    for relation in p.graph.relations:
        x, w = leaves((40, features) if shared else (9, 40, features), (p.graph.num_edges(relation),))
        args = (p.graph, relation, keep)
        options = {"reduce": reduce, "transpose": transpose}
        assert_same(product(cellattn, *args, **options), product(reference, *args, **options), x, w)


@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "transpose"])
@pytest.mark.parametrize("reduce", REDUCES)
def test_any_graph_and_batch(reduce: str, transpose: bool, isa: str) -> None:
    @settings(max_examples=60)
    @given(problems(), st.integers(1, 20), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
    def check(p: Problem, features: int, shared: bool, share: float) -> None:
        n, num_sets = p.graph.num_nodes, p.ptr.numel() - 1
        keep = mask(num_sets, n, share=share)
        (x,) = leaves((n, features) if shared else (num_sets, n, features))
        for relation in p.graph.relations:
            (w,) = leaves((p.graph.num_edges(relation),), seed=1)
            args = (p.graph, relation, keep)
            options = {"reduce": reduce, "transpose": transpose}
            assert_same(product(cellattn, *args, **options), product(reference, *args, **options), x, w)

    check()


@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
@pytest.mark.parametrize("features", [1, 3, 9, 31])
def test_long_rows(features: int, weighted: bool, isa: str) -> None:
    """Rows of every length up to 130, of which 100 and more are kept: what is left of them when several are taken at a time."""
    n = 131
    edges = torch.tril_indices(n, n, -1)
    weight = torch.rand(edges.shape[1], generator=torch.Generator().manual_seed(0)) if weighted else None
    graph = MultiGraph.from_edge_index({"a": edges}, n, edge_weight=None if weight is None else {"a": weight})
    keep = mask(3, n, share=0.9)
    keep[0] = True
    for shape in ((n, features), (3, n, features)):
        (x,) = leaves(shape)
        for reduce in REDUCES:
            f, dense = (lambda x, m=m, r=reduce: m.masked_spmm(graph, "a", x, keep, reduce=r) for m in (cellattn, reference))
            assert_same(f, dense, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_weights_of_the_graph(dtype: torch.dtype) -> None:
    """Stored in float32; used in float64 where x is."""
    p = problem(1, 40, [90, 300], 0)
    assert not (p.graph.weight("r1") == 1).all()
    keep = mask(70, 40)
    (x,) = leaves((70, 40, 5), dtype=dtype)
    f, dense = (lambda x, m=module: m.masked_spmm(p.graph, "r1", x, keep) for module in (cellattn, reference))
    assert f(x).dtype == dtype
    assert_within_rounding(f, dense, x)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_is_within_rounding(dtype: torch.dtype, shared: bool, reduce: str, isa: str) -> None:
    graph = problem(2, 60, [1200], 0).graph
    keep = mask(20, 60)
    for transpose in (False, True):
        x, w = leaves((60, 16) if shared else (20, 60, 16), (graph.num_edges("r0"),), dtype=dtype)
        options = {"reduce": reduce, "transpose": transpose}
        ours, dense = (product(module, graph, "r0", keep, **options) for module in (cellattn, reference))
        assert_within_rounding(ours, dense, x, w)
        assert {y.dtype for y in everything(ours, x, w)} == {dtype}


def test_is_message_passing_on_pygs_subgraphs(isa: str) -> None:
    """The sum and mean over each sample's induced subgraph, as PyG aggregates it."""
    utils = pytest.importorskip("torch_geometric.utils")
    graph = synthetic_cell(num_genes=700)
    keep, _ = cellattn.perturbation_mask(graph, *random_sets(700, 5))
    (x,) = leaves((700, 6))
    for relation in ("physical", "regulatory"):
        for reduce in REDUCES:
            got = cellattn.masked_spmm(graph, relation, x.detach(), keep, reduce=reduce)
            for b in range(5):
                (row, col), _ = utils.subgraph(keep[b], graph.edge_index(relation), num_nodes=700)
                want = utils.scatter(x.detach()[col], row, dim=0, dim_size=700, reduce=reduce)
                # float64 in another order
                torch.testing.assert_close(got[b], want, rtol=RTOL, atol=RTOL)


def test_real_tables(yeast_graph: MultiGraph) -> None:
    keep, _ = cellattn.perturbation_mask(yeast_graph, *random_sets(yeast_graph.num_nodes, 3))
    (x,) = leaves((yeast_graph.num_nodes, 4))
    for relation in ("physical", "motif"):
        a = torch.sparse_coo_tensor(
            yeast_graph.edge_index(relation), yeast_graph.weight(relation).double(), (yeast_graph.num_nodes,) * 2
        )
        got = cellattn.masked_spmm(yeast_graph, relation, x.detach(), keep)
        want = torch.stack([k[:, None] * (a @ (k[:, None] * x.detach())) for k in keep])
        torch.testing.assert_close(got, want, rtol=RTOL, atol=RTOL * float(want.abs().max()))


@pytest.mark.parametrize("num_sets", [0, 1, 64, 70])
def test_packed_masks(num_sets: int) -> None:
    p = problem(3, 40, [90, 300], num_sets)
    keep, _ = cellattn.perturbation_mask(*p)
    words, _ = cellattn.perturbation_mask(*p, packed=True)
    (x,) = leaves((40, 5))
    want = cellattn.masked_spmm(p.graph, "r1", x, keep)
    assert torch.equal(cellattn.masked_spmm(p.graph, "r1", x, words, num_sets=num_sets), want)
    assert torch.equal(cellattn.masked_spmm(p.graph, "r1", x, keep, num_sets=num_sets), want)


def test_what_the_mask_drops_does_not_leak() -> None:
    """0 and no gradient where a gene is not kept, NaN and infinity in its features included."""
    p = problem(4, 40, [600], 0)
    keep = mask(9, 40)
    x, w = leaves((9, 40, 5), (p.graph.num_edges("r0"),))
    for reduce in REDUCES:
        want, dwant = values_and_grads(product(cellattn, p.graph, "r0", keep, reduce=reduce), x, w)
        for bad in (float("nan"), float("inf")):
            dropped = torch.where(keep[..., None], x.detach(), bad)
            got, dgot = values_and_grads(product(cellattn, p.graph, "r0", keep, reduce=reduce), dropped, w)
            assert not got[0][~keep].any()
            assert not dgot[0][~keep].any()
            for a, b in zip([*got, *dgot], [*want, *dwant], strict=True):
                assert torch.equal(a, b)


def test_all_kept_is_the_product_with_the_graph() -> None:
    p = problem(5, 40, [300], 0)
    (x,) = leaves((40, 5))
    out = cellattn.masked_spmm(p.graph, "r0", x, torch.ones(3, 40).bool())
    want = reference.adjacency(p.graph, "r0") @ x
    torch.testing.assert_close(out, want.expand(3, 40, 5), rtol=RTOL, atol=RTOL)


def test_mean_counts_edges_and_not_weights() -> None:
    graph = MultiGraph.from_edge_index(
        {"r": torch.tensor([[0, 0, 0], [1, 2, 3]])}, 4, edge_weight={"r": torch.tensor([1.0, 2.0, 4.0])}
    )
    x = torch.ones(4, 1)
    keep = torch.tensor([[True, True, True, False], [True, False, False, False]])
    out = cellattn.masked_spmm(graph, "r", x, keep, reduce="mean")
    assert out[:, 0, 0].tolist() == [1.5, 0.0]


def test_strided_features_and_mask() -> None:
    p = problem(6, 40, [300], 0)
    keep = mask(40, 9).t()
    (x,) = leaves((40, 9, 5))
    assert not keep.is_contiguous()
    strided = x.transpose(0, 1)
    want = cellattn.masked_spmm(p.graph, "r0", strided.contiguous(), keep.contiguous())
    assert torch.equal(cellattn.masked_spmm(p.graph, "r0", strided, keep), want)


@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "transpose"])
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
def test_gradcheck(shared: bool, reduce: str, transpose: bool) -> None:
    graph = problem(7, 6, [20], 0).graph
    keep = mask(3, 6)
    inputs = leaves((6, 2) if shared else (3, 6, 2), (graph.num_edges("r0"),))
    assert torch.autograd.gradcheck(product(cellattn, graph, "r0", keep, reduce=reduce, transpose=transpose), inputs)


def test_one_gradient_without_the_other() -> None:
    graph = problem(8, 40, [300], 0).graph
    keep = mask(9, 40)
    x, w = leaves((9, 40, 5), (graph.num_edges("r0"),))
    f = product(cellattn, graph, "r0", keep)
    _, (dx, dw) = values_and_grads(f, x, w)
    g = torch.randn(9, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (alone_x,) = torch.autograd.grad((f(x, w.detach()) * g).sum(), x)
    (alone_w,) = torch.autograd.grad((f(x.detach(), w) * g).sum(), w)
    assert torch.equal(alone_x, dx)
    assert torch.equal(alone_w, dw)


def test_double_backward_is_refused() -> None:
    graph = problem(9, 6, [20], 0).graph
    (x,) = leaves((6, 2))
    (dx,) = torch.autograd.grad(cellattn.masked_spmm(graph, "r0", x, mask(3, 6)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cellattn.masked_spmm: double backward is not supported"):
        dx.sum().backward()


def test_autocast_leaves_the_dtype_of_x() -> None:
    graph = problem(9, 6, [20], 0).graph
    (x,) = leaves((6, 2), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cellattn.masked_spmm(graph, "r0", x, mask(3, 6))
    assert torch.equal(inside, cellattn.masked_spmm(graph, "r0", x, mask(3, 6)))


def test_equal_from_run_to_run() -> None:
    graph = problem(10, 60, [2000], 0).graph
    keep = mask(70, 60)
    x, w = leaves((60, 33), (graph.num_edges("r0"),), dtype=torch.float32)
    first, again = (values_and_grads(product(cellattn, graph, "r0", keep), x, w) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*again[0], *again[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "columns"])
def test_weights_and_features_of_any_strides(transpose: bool) -> None:
    g = random_graph(12, {"a": 50}, weighted=True)
    keep = (torch.rand(12, 3) < 0.7).mT
    table, x = torch.rand(g.num_edges("a"), 4, dtype=torch.float64), torch.randn(5, 12, 3, dtype=torch.float64)
    views = {
        "column": (table[:, 1], x.transpose(0, 2)),
        "from the middle": (table.flatten()[3 : 3 + g.num_edges("a")], x.flatten()[1 : 1 + 60].reshape(12, 5)),
        "expanded": (torch.rand((), dtype=torch.float64).expand(g.num_edges("a")), x[0, 0].expand(12, 3)),
        "expanded over samples": (table[:, 2], x[:1].transpose(1, 2).transpose(1, 2)[0].expand(3, 12, 3)),
    }
    for name, (weight, features) in views.items():
        results = []
        for copy in (False, True):
            w, f = (t.detach().clone(memory_format=torch.contiguous_format) if copy else t.detach() for t in (weight, features))
            w, f = w.requires_grad_(), f.requires_grad_()
            out = cellattn.masked_spmm(g, "a", f, keep.contiguous() if copy else keep, edge_weight=w, transpose=transpose)
            results.append([out, *torch.autograd.grad(out.square().sum(), (f, w))])
        for view, contiguous in zip(*results, strict=True):
            assert torch.equal(view, contiguous), name
