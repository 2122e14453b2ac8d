from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn import MultiGraph
from cellattn.kernels import masked_spmm as kernels
from cellattn.kernels.config import Gather

from ..bounds import assert_within, with_bounds
from ..compare import leaves, random_graph
from ..conftest import exhaustive

# Shares of genes that samples keep: an ordinary row then has entries that all samples keep, that some do, and that none does.
SHARES = {"all": 1.0, "all but a few": 0.95, "half": 0.5, "few": 0.1, "none": 0.0}


def shapes_graph(n: int, degree: int) -> MultiGraph:
    """Row 0 has every gene, row 1 has one, row 2 none, the others `degree` in the mean."""
    g = torch.Generator().manual_seed(n)
    hub = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)])
    rest = torch.randint(n, (2, n * degree), generator=g)
    index = torch.cat([hub, torch.tensor([[1], [n - 1]]), rest[:, rest[0] > 2]], 1)
    return MultiGraph.from_edge_index({"r": index}, n, edge_weight={"r": torch.rand(index.shape[1], generator=g) + 0.1})


def mask(num_sets: int, n: int, share: float) -> Tensor:
    return torch.rand(num_sets, n, generator=torch.Generator().manual_seed(num_sets)) < share


def pack(keep: Tensor) -> Tensor:
    """bool [B, N] -> int64 [N, W]"""
    num_sets, n = keep.shape
    words = torch.zeros(n, -(-num_sets // 64), dtype=torch.int64)
    for b in range(num_sets):
        words[:, b // 64] |= keep[b].long() << b % 64
    return words


def csr(graph: MultiGraph) -> tuple[Tensor, Tensor]:
    return graph.rowptr("r"), graph.col("r")


def reference(graph: MultiGraph, value: Tensor, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """(sums [B, N, F], degree [B, N]) of the dense matrix, masked for each sample."""
    n = graph.num_nodes
    row, col = graph.edge_index("r")
    edges = torch.zeros(n, n, dtype=torch.float64)
    edges[row, col] = 1.0
    pairs = keep[:, :, None] & keep[:, None, :]
    a = value.new_zeros(n, n).index_put((row, col), value)
    return (a * pairs) @ x, (edges * pairs).sum(-1)


def check(graph: MultiGraph, keep: Tensor, f: int, dtype: torch.dtype, *, shared: bool, weighted: bool = True) -> None:
    """Sum, mean, degree and the gradient of the values against float64, within rounding."""
    num_sets, n = keep.shape
    x, g = (t.detach() for t in leaves((n, f) if shared else (num_sets, n, f), (num_sets, n, f), dtype=dtype))
    value = graph.weight("r") if weighted else None
    inputs, words = (torch.ones(graph.num_edges("r")) if value is None else value, x), pack(keep)
    want, dvalue, _ = with_bounds(lambda value, x: reference(graph, value, x, keep)[0], inputs, [g], dtype=dtype)
    degree = reference(graph, inputs[0].double(), x.double(), keep)[1]

    def averages(value: Tensor, x: Tensor) -> Tensor:
        return reference(graph, value, x, keep)[0] / degree.clamp(min=1)[..., None]

    out = kernels.masked_spmm(*csr(graph), value, x, words, num_sets, False)
    mean = kernels.masked_spmm(*csr(graph), value, x, words, num_sets, True)
    assert out.dtype == mean.dtype == dtype
    assert_within(out, want)
    assert_within(mean, with_bounds(averages, inputs, dtype=dtype)[0])
    got = kernels.masked_degree(*csr(graph), words, num_sets)
    assert got.dtype == torch.int32
    assert torch.equal(got.double(), degree)
    got = kernels.masked_sddmm(*csr(graph), g, x, words, num_sets)
    assert got.dtype == torch.float32
    assert_within(got, dvalue)


SHAPES = [(6, 1, 28, 2), (5, 7, 65, 2), (20, 20, 3, 9), (6, 64, 28, 2), (20, 100, 2, 15), (6, 130, 3, 2), (1, 5, 1, 0)]


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable) -> None:
    poison(kernels)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
@pytest.mark.parametrize(
    ("n", "f", "num_sets", "degree", "dtype"),
    [
        *((*shape, torch.float32) for shape in SHAPES),
        (6, 7, 9, 2, torch.float16),
        *exhaustive(*((*shape, torch.float16) for shape in SHAPES)),
    ],
    ids=str,
)
def test_values_and_gradients(n: int, f: int, num_sets: int, degree: int, dtype: torch.dtype, shared: bool) -> None:
    graph = shapes_graph(n, degree) if n > 3 else random_graph(n, {"r": 3})
    check(graph, mask(num_sets, n, 0.8), f, dtype, shared=shared, weighted=dtype == torch.float32)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
@pytest.mark.parametrize("share", SHARES)
def test_masks(share: str, shared: bool) -> None:
    check(shapes_graph(20, 6), mask(9, 20, SHARES[share]), 8, torch.float32, shared=shared)


def test_neighbourhoods_that_share_little() -> None:
    """As k-hop masks are: a sample keeps a run of genes of its own, and words differ in nearly every bit."""
    keep = ((torch.arange(30) - 3 * torch.arange(10)[:, None]) % 30) < 8
    for shared in (True, False):
        check(shapes_graph(30, 12), keep, 8, torch.float32, shared=shared)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
@pytest.mark.parametrize("num_sets", [1, 31, 32, 33, 64])
def test_ends_of_words(num_sets: int, shared: bool) -> None:
    """The last sample of a half, of a word and of the batch; 32 samples a program where x is shared and rows are short."""
    check(shapes_graph(6, 1), mask(num_sets, 6, 0.7), 3, torch.float32, shared=shared)


def test_thirty_two_samples_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits of a half, that of the sign included."""
    wide = Gather(256, 4)
    assert kernels._samples(wide.rows, 40, 1.0, 1 << 10, True) == 32
    assert kernels._samples(wide.rows, 40, 1.0, 1 << 10, False) == 32
    monkeypatch.setattr(kernels, "choose_gather", lambda kernel, x, dim, launch: launch(wide))
    for shared in (True, False):
        for share in (0.6, 1.0):
            check(shapes_graph(7, 1), mask(40, 7, share), 3, torch.float32, shared=shared)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
def test_hub_rows_take_several_steps(shared: bool) -> None:
    """Degree 100: at 128 features a program gathers 16 or 32 rows at once, shared by up to eight samples."""
    n = 100
    everyone, hub = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    graph = MultiGraph.from_edge_index({"r": torch.stack([hub, everyone])}, n, undirected=True)
    keep = mask(2, n, 0.9)
    keep[:, 0] = True
    check(graph, keep, 128, torch.float32, shared=shared)


def test_sddmm_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of more than the L2 holds: the second launch adds to what the first left."""
    graph, keep = shapes_graph(12, 4), mask(70, 12, 0.7)
    words = pack(keep)
    x, g = (t.detach() for t in leaves((70, 12, 8), (70, 12, 8), dtype=torch.float32))
    _, dvalue, _ = with_bounds(lambda value, x: reference(graph, value, x, keep)[0], (graph.weight("r"), x), [g])
    monkeypatch.setattr(kernels, "L2_BYTES", 1)
    assert_within(kernels.masked_sddmm(*csr(graph), g, x, words, 70), dvalue)


@pytest.mark.parametrize("bad", [float("nan"), *exhaustive(float("inf"))], ids=["nan", "inf"])
def test_what_the_mask_drops_does_not_leak(bad: float) -> None:
    """Features and values that are not numbers, of genes that no sample or not this sample keeps."""
    n, num_sets = 14, 9
    graph, keep = shapes_graph(n, 5), mask(num_sets, n, 0.8)
    keep[:, 5] = False
    words = pack(keep)
    row, col = graph.edge_index("r")
    value = graph.weight("r")
    bad_value = torch.where((row == 5) | (col == 5), bad, value)
    x, g = (t.detach() for t in leaves((num_sets, n, 8), (num_sets, n, 8), dtype=torch.float32))
    bad_x, bad_g = (torch.where(keep[..., None], t, bad) for t in (x, g))
    shared = x[0].clone()
    bad_shared = shared.clone()
    bad_shared[5] = bad
    for mean in (False, True):
        for clean, dropped in ((x, bad_x), (shared, bad_shared)):
            want = kernels.masked_spmm(*csr(graph), value, clean, words, num_sets, mean)
            assert torch.equal(kernels.masked_spmm(*csr(graph), bad_value, dropped, words, num_sets, mean), want)
    for clean, dropped in ((x, bad_x), (shared, bad_shared)):
        want = kernels.masked_sddmm(*csr(graph), g, clean, words, num_sets)
        assert torch.equal(kernels.masked_sddmm(*csr(graph), bad_g, dropped, words, num_sets), want)

    # A gene of shared features that some samples keep: it spoils theirs alone.
    bad_shared[7] = bad
    got = kernels.masked_spmm(*csr(graph), value, bad_shared, words, num_sets, False)
    want = kernels.masked_spmm(*csr(graph), value, shared, words, num_sets, False)
    neighbours = torch.zeros(n, dtype=torch.bool)
    neighbours[row[col == 7]] = True
    spoilt = keep & keep[:, 7:8] & neighbours
    assert spoilt.any()
    assert (keep & neighbours & ~spoilt).any()
    assert not got[spoilt].isfinite().any()
    assert torch.equal(got[~spoilt], want[~spoilt])


def test_no_edges_no_samples_no_features() -> None:
    graph = random_graph(5, {"r": 0})
    check(graph, mask(3, 5, 0.8), 4, torch.float32, shared=True)
    check(graph, mask(3, 5, 0.8), 4, torch.float32, shared=False)
    graph = shapes_graph(6, 2)
    for num_sets, f in ((0, 4), (3, 0)):
        words = pack(mask(num_sets, 6, 0.8))
        x = torch.ones(num_sets, 6, f)
        assert kernels.masked_spmm(*csr(graph), None, x, words, num_sets, False).shape == (num_sets, 6, f)
        assert kernels.masked_degree(*csr(graph), words, num_sets).shape == (num_sets, 6)
        assert torch.equal(kernels.masked_sddmm(*csr(graph), x, x, words, num_sets), torch.zeros(graph.num_edges("r")))


def test_strided_features() -> None:
    graph, keep = shapes_graph(10, 3), mask(5, 10, 0.8)
    x = leaves((10, 5, 6), dtype=torch.float32)[0].detach().transpose(0, 1)
    args = (pack(keep), 5)
    want = kernels.masked_spmm(*csr(graph), None, x.contiguous(), *args, False)
    assert torch.equal(kernels.masked_spmm(*csr(graph), None, x, *args, False), want)
    want = kernels.masked_sddmm(*csr(graph), x.contiguous(), x.contiguous(), *args)
    assert torch.equal(kernels.masked_sddmm(*csr(graph), x, x, *args), want)


def test_indices_out_of_range_are_not_read() -> None:
    """Columns that are no genes count as dropped, and rows that end past the entries end there."""
    rowptr = torch.tensor([0, 2, 4, 9])
    col = torch.tensor([0, 3, -1, 1, 2], dtype=torch.int32)
    x, words = torch.tensor([[1.0], [2.0], [4.0]]), torch.ones(3, 1, dtype=torch.int64)
    for features in (x, x[None]):
        assert kernels.masked_spmm(rowptr, col, None, features, words, 1, False).flatten().tolist() == [1.0, 2.0, 4.0]
        assert kernels.masked_sddmm(rowptr, col, x[None], features, words, 1).tolist() == [1.0, 0.0, 0.0, 4.0, 16.0]
    assert kernels.masked_degree(rowptr, col, words, 1).tolist() == [[1, 1, 1]]


def test_stray_bits_are_no_samples() -> None:
    """Bits past the last sample, which should be 0, change nothing and are not written for."""
    graph, keep = shapes_graph(6, 2), mask(3, 6, 0.7)
    words = pack(keep)
    stray = words | -1 << 3
    x = leaves((3, 6, 4), dtype=torch.float32)[0].detach()
    for features in (x, x[0]):
        for f, args in ((kernels.masked_spmm, (None, features)), (kernels.masked_sddmm, (x, features))):
            last = (3, True) if f is kernels.masked_spmm else (3,)
            assert torch.equal(f(*csr(graph), *args, stray, *last), f(*csr(graph), *args, words, *last))
    assert torch.equal(kernels.masked_degree(*csr(graph), stray, 3), kernels.masked_degree(*csr(graph), words, 3))


def test_repeats_bit_for_bit() -> None:
    graph, keep = shapes_graph(12, 8), mask(10, 12, 0.7)
    words = pack(keep)
    x, g = (t.detach() for t in leaves((10, 12, 12), (10, 12, 12), dtype=torch.float32))
    for features in (x, x[0]):
        runs = [
            (
                kernels.masked_spmm(*csr(graph), graph.weight("r"), features, words, 10, True),
                kernels.masked_sddmm(*csr(graph), g, features, words, 10),
            )
            for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(5, 4).double()}, "x: expected dtype float16 or bfloat16 or float32"),
        ({"x": torch.ones(6, 4)}, r"x: expected shape \[5, F\] or \[3, 5, F\], got \[6, 4\]"),
        ({"x": torch.ones(2, 5, 4)}, r"x: expected shape \[5, F\] or \[3, 5, F\], got \[2, 5, 4\]"),
        ({"x": torch.ones(5, 4, device="meta")}, "x: expected the device of rowptr"),
        ({"value": torch.ones(7)}, "value: expected the size of col"),
        ({"value": torch.ones(8).double()}, "value: expected dtype float32"),
        ({"rowptr": torch.zeros(5, dtype=torch.int64)}, "rowptr: expected 6 entries"),
        ({"col": torch.zeros(8, dtype=torch.int64)}, "col: expected dtype int32"),
        ({"words": torch.ones(5, 1, dtype=torch.int32)}, "words: expected dtype int64"),
        ({"num_sets": 65}, "num_sets: expected a number of sets that fills 1 words, got 65"),
        ({"num_sets": -1}, "num_sets: expected a number of sets that fills 1 words, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_raises_before_any_launch(change: dict[str, Tensor | int], message: str) -> None:
    arguments: dict[str, Any] = {
        "rowptr": torch.zeros(6, dtype=torch.int64), "col": torch.zeros(8, dtype=torch.int32), "value": torch.ones(8),
        "x": torch.ones(5, 4), "words": torch.ones(5, 1, dtype=torch.int64), "num_sets": 3,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        kernels.masked_spmm(**arguments, mean=False)
    del arguments["value"]
    if "value" in change:
        return
    with pytest.raises(ValueError, match=message):
        kernels.masked_sddmm(**arguments, g=torch.ones(3, 5, 4, dtype=arguments["x"].dtype))
    del arguments["x"]
    if "x" not in change:
        with pytest.raises(ValueError, match=message):
            kernels.masked_degree(**arguments)


@pytest.mark.parametrize(
    ("g", "message"),
    [
        (torch.ones(5, 4), r"g: expected shape \[3, 5, F\], got \[5, 4\]"),
        (torch.ones(3, 5, 3), "g: expected the number of features of x"),
        (torch.ones(3, 5, 4).half(), "g: expected the dtype of x"),
    ],
    ids=["shared", "features", "dtype"],
)
def test_bad_gradients_raise_before_any_launch(g: Tensor, message: str) -> None:
    rowptr, col = torch.zeros(6, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        kernels.masked_sddmm(rowptr, col, g, torch.ones(5, 4), torch.ones(5, 1, dtype=torch.int64), 3)
