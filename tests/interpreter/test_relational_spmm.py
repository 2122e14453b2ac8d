from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn import MultiGraph, reference
from cellattn.kernels import relational_spmm as kernels

from ..bounds import assert_within, with_bounds
from ..compare import leaves
from ..conftest import exhaustive
from ..ops.sets import Between, between, graph_of

x_or_each = pytest.mark.parametrize("each", [False, True], ids=["one-x", "x-per-relation"])
summed_or_not = pytest.mark.parametrize("sum_relations", [True, False], ids=["summed", "per-relation"])


def forward(graph: MultiGraph, b: Between, x: Tensor, scale: Tensor | None, names: list[str], **options: bool) -> Tensor:
    ids = [graph.relation_id(name) for name in names]
    flags = options["shared"], options["sum_relations"], False
    return kernels.relational_spmm(*graph.stacked, x, *b, None, scale, ids, graph.num_nodes, *flags)


def backward(graph: MultiGraph, b: Between, g: Tensor, scale: Tensor | None, names: list[str], **options: bool) -> Tensor:
    ids = [graph.relation_id(name) for name in names]
    exchanged = b.target, b.target_ptr, b.source, b.source_ptr
    flags = False, not options["each"], options["shared"]
    return kernels.relational_spmm(*graph.stacked_by_column(), g, *exchanged, scale, None, ids, graph.num_nodes, *flags)


def check(graph: MultiGraph, b: Between, f: int, dtype: torch.dtype, *, scaled: bool = True, **options: bool) -> None:
    """Output, gradient and degree against float64, within rounding."""
    names = ["loops", "hub", "none"]
    places = graph.num_nodes if options["shared"] else b.source.numel()
    x = leaves((places, 3, f) if options["each"] else (places, f), dtype=dtype)[0].detach()
    scale = torch.rand(b.target.numel(), 3, generator=torch.Generator().manual_seed(0)) if scaled else None

    def dense(x: Tensor) -> Tensor:
        return reference.relational_spmm(
            graph, x, *b, relations=names, scale=scale, sum_relations=options["sum_relations"], shared=options["shared"]
        )

    g = leaves(tuple(dense(x.double()).shape), dtype=dtype, seed=1)[0].detach()
    want, dx = with_bounds(dense, (x,), [g])
    got, dgot = forward(graph, b, x, scale, names, **options), backward(graph, b, g, scale, names, **options)
    assert got.dtype == dgot.dtype == dtype
    assert_within(got, want)
    assert_within(dgot, dx)
    degree = kernels.relational_degree(*graph.stacked[:2], *b, [graph.relation_id(name) for name in names], graph.num_nodes)
    assert torch.equal(degree, reference.relational_degree(graph, *b, relations=names))


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable) -> None:
    poison(kernels)


@x_or_each
@summed_or_not
@pytest.mark.parametrize("shared", [False, True], ids=["stored", "shared"])
@pytest.mark.parametrize("dtype", [torch.float16, *exhaustive(torch.float32)], ids=str)
def test_values_and_gradients(dtype: torch.dtype, shared: bool, sum_relations: bool, each: bool) -> None:
    check(graph_of(9, 2), between(3, 9), 20, dtype, shared=shared, sum_relations=sum_relations, each=each)


@pytest.mark.parametrize(
    ("each", "sum_relations"),
    [(True, False), (False, True), *exhaustive((True, True), (False, False))],
    ids=["each alone", "one x, summed", "each summed", "one x, not summed"],
)
@pytest.mark.parametrize(("n", "f", "num_sets", "degree"), [(3, 1, 9, 2), (5, 7, 3, 2), (8, 64, 2, 3), (4, 130, 2, 2)], ids=str)
def test_sizes(n: int, f: int, num_sets: int, degree: int, sum_relations: bool, each: bool) -> None:
    """One feature, and more than a program has; fewer samples than parts of the batch, and more."""
    graph, b = graph_of(n, degree), between(num_sets, n)
    for shared in (False, True):
        check(graph, b, f, torch.float32, shared=shared, sum_relations=sum_relations, each=each, scaled=False)


def test_hub_rows_take_several_steps() -> None:
    """Degree 100: at 128 features a program gathers 16 rows at once."""
    b = Between(torch.arange(100), torch.tensor([0, 100]), torch.tensor([0, 7]), torch.tensor([0, 2]))
    check(graph_of(100, 1), b, 128, torch.float32, shared=False, sum_relations=True, each=True)


def test_no_samples_no_places_no_features_no_relations() -> None:
    graph, options = graph_of(5, 2), {"shared": False, "sum_relations": True, "each": False}
    for b, f in ((between(0, 5), 4), (between(3, 5, 0.0), 4), (between(3, 5), 0)):
        check(graph, b, f, torch.float32, **options)
        check(graph, b, f, torch.float32, **{**options, "shared": True, "sum_relations": False})
    b = between(3, 5)
    out = forward(graph, b, torch.ones(b.source.numel(), 4), None, [], **options)
    assert torch.equal(out, torch.zeros(b.target.numel(), 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_does_not_send_does_not_leak(bad: float) -> None:
    """Features and weights that are not numbers, of genes that no sample sends."""
    graph, b = graph_of(8, 3), between(3, 8)
    x = leaves((8, 3, 8), dtype=torch.float32)[0].detach()
    silent = torch.ones(8, dtype=torch.bool).index_fill(0, b.source, False)
    silent[5] = True
    sends = b.source != 5
    sample = torch.arange(3).repeat_interleave(b.source_ptr.diff())
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(sample[sends], minlength=3).cumsum(0)])
    b = Between(b.source[sends], ptr, b.target, b.target_ptr)
    rowptr, col, value = graph.stacked
    bad_value = torch.where(silent[col.long()], bad, value)
    assert not bad_value.isfinite().all()
    for sum_relations in (True, False):
        last = (*b, None, None, [0, 1, 2], 8, True, sum_relations, False)
        want = kernels.relational_spmm(rowptr, col, value, x, *last)
        got = kernels.relational_spmm(rowptr, col, bad_value, torch.where(silent[:, None, None], bad, x), *last)
        assert torch.equal(got, want)


def test_indices_out_of_range_are_not_read() -> None:
    """Columns and genes that are none count as absent, rows that end past the entries end there, pointers are held to the
    batch."""
    rowptr, col = torch.tensor([0, 2, 4, 9]), torch.tensor([0, 3, -1, 1, 2], dtype=torch.int32)
    x, value = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]]), torch.ones(5)
    genes = torch.tensor([0, 1, 2, 7, -3])
    args = (genes, torch.tensor([0, 5]), genes, torch.tensor([0, 5]))
    out = kernels.relational_spmm(rowptr, col, value, x, *args, None, None, [0], 3, False, True, False)
    assert out.flatten().tolist() == [1.0, 2.0, 4.0, 0.0, 0.0]
    out = kernels.relational_spmm(rowptr, col, value, x, *args, None, None, [0], 3, False, True, True)
    assert out.flatten().tolist() == [1.0, 2.0, 4.0]
    assert kernels.relational_degree(rowptr, col, *args, [0], 3).flatten().tolist() == [1, 1, 1, 0, 0]
    wild = torch.tensor([9, -4, 7])
    out = kernels.relational_spmm(rowptr, col, value, x, genes, wild, genes, wild, None, None, [0], 3, False, True, False)
    assert out.shape == (5, 1)


def test_repeats_bit_for_bit() -> None:
    graph, b = graph_of(7, 4), between(4, 7)
    x = leaves((7, 3, 12), dtype=torch.float32)[0].detach()
    g = leaves((b.target.numel(), 12), dtype=torch.float32)[0].detach()
    names, options = list(graph.relations), {"shared": True, "sum_relations": True, "each": True}
    runs = [
        (forward(graph, b, x, None, names, **options), backward(graph, b, g, None, names, **options)) for _ in range(2)
    ]  # fmt: skip
    assert all(torch.equal(a, c) for a, c in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 4).double()}, "x: expected dtype float16 or bfloat16 or float32"),
        ({"x": torch.ones(5, 4)}, r"x: expected shape \[3, 2, F\] or \[3, F\], got \[5, 4\]"),
        ({"x": torch.ones(3, 3, 4)}, r"x: expected shape \[3, 2, F\] or \[3, F\], got \[3, 3, 4\]"),
        ({"x": torch.ones(3, 4, device="meta")}, "x: expected the device of rowptr"),
        ({"value": torch.ones(7)}, "value: expected the size of col"),
        ({"value": torch.ones(8).double()}, "value: expected dtype float32"),
        ({"source_scale": torch.ones(4, 2)}, "source_scale: expected the shape of places and relations"),
        ({"target_scale": torch.ones(4)}, "target_scale: expected 2 dimension"),
        ({"rowptr": torch.zeros(10, dtype=torch.int64)}, "rowptr: expected a multiple of 5 entries and one more, got 10"),
        ({"col": torch.zeros(8, dtype=torch.int64)}, "col: expected dtype int32"),
        ({"source": torch.zeros(3, dtype=torch.int32)}, "source: expected dtype int64"),
        ({"source_ptr": torch.zeros(0, dtype=torch.int64)}, "source_ptr: expected at least one entry"),
        ({"source_ptr": torch.zeros(1, dtype=torch.int64)}, "source_ptr: expected to end with 3, got one entry"),
        ({"target_ptr": torch.zeros(2, dtype=torch.int64)}, "target_ptr: expected the size of source_ptr"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, "target: expected the device of rowptr"),
        ({"relations": [0, 2]}, r"relations: expected indices in \[0, 2\), got 2"),
        ({"num_nodes": 0}, "num_nodes: expected 1 to 2147483647 genes, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_raises_before_any_launch(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "rowptr": torch.zeros(11, dtype=torch.int64), "col": torch.zeros(8, dtype=torch.int32), "value": torch.ones(8),
        "x": torch.ones(3, 4), "source": torch.zeros(3, dtype=torch.int64), "source_ptr": torch.tensor([0, 1, 3]),
        "target": torch.zeros(4, dtype=torch.int64), "target_ptr": torch.tensor([0, 1, 4]), "source_scale": None,
        "target_scale": None, "relations": [0, 1], "num_nodes": 5,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        kernels.relational_spmm(**arguments, shared=False, sum_relations=True, sum_samples=False)
