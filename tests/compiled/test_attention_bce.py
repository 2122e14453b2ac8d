"""The cross-entropy of attention with a graph over every non-edge, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference

from .. import ptx
from ..compare import leaves, random_graph, with_drawn_negatives
from ..conftest import exhaustive
from ..ops import test_large_scores as large_scores
from ..ptx.subjects import cut
from .check import assert_on_chip, on_chip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def graph_of(n: int) -> MultiGraph:
    return random_graph(n, {"other": 7, "a": 5 * n}).extend(1)


CASES = [(80, "bf16", 20, "softmax"), (80, "fp32", 20, "sigmoid")]
MORE = [
    (90, "bf16", 64, "softmax"),
    *((80, "bf16", d, link) for d in (16, 32, 64, 128, 256) for link in ("softmax", "sigmoid")),
    *((80, "fp16", d, "softmax") for d in (20, 64)),
    *((80, "fp32", d, "softmax") for d in (16, 64, 128)),
    *((89, "bf16", d, "softmax") for d in (20, 64, 128)),
]


@pytest.mark.parametrize(("arch", "dtype", "d", "link"), [*CASES, *exhaustive(*MORE)])
def test_every_non_edge(arch: int, dtype: str, d: int, link: str) -> None:
    graph = graph_of(70)
    rows = torch.tensor([3, 0, 17, 17, 69, *range(20, 50)])

    def through(module: Any) -> Any:
        def f(q: Tensor, k: Tensor) -> Tensor:
            return module.attention_bce(q, k, graph, "a", rows=rows, link=link, num_prefix=1, reduction="none")

        return f

    q, k = (x.detach() for x in leaves((72, d), (72, d), dtype=DTYPES[dtype]))
    assert_on_chip(arch, through(cellattn), through(reference), q, k, kernels=["bce_rows_fwd_kernel_dense"], parts=True)


@pytest.mark.parametrize("count", [9, 2.0], ids=["a row", "a ratio"])
@pytest.mark.parametrize(
    ("arch", "dtype", "d", "link"),
    [
        (80, "bf16", 20, "softmax"),
        *exhaustive(
            (80, "bf16", 20, "sigmoid"),
            *((80, "bf16", d, "softmax") for d in (1, 32, 64, 100, 128)),
            *((80, "fp16", d, "softmax") for d in (20, 64)),
            *((80, "fp32", d, "softmax") for d in (20, 128)),
            *((89, "bf16", d, "softmax") for d in (20, 64, 128)),
            (90, "bf16", 64, "softmax"),
        ),
    ],
)
def test_drawn_negatives(arch: int, dtype: str, d: int, link: str, count: int | float) -> None:
    """The same on both sides; repeatedly drawn ones too. Scores of some 3 make rows with a sharp entry and rows without."""
    op, definition = with_drawn_negatives(graph_of(70), "a", None, count, link=link, num_prefix=1)
    q, k = (x.detach() for x in leaves((72, d), (72, d), dtype=DTYPES[dtype]))
    kernels = ["nonedges_kernel", "bce_rows_fwd_kernel_edges", "bce_rows_bwd_kernel_edges_dq", "bce_rows_bwd_kernel_edges_dk"]
    assert_on_chip(arch, op, definition, 3 * q, k, kernels=kernels, parts=True)


@pytest.mark.parametrize("rows", [[4, 4, 0, 4], [60, 2, 17]], ids=["repeated", "chosen"])
@pytest.mark.parametrize("num_prefix", [0, *exhaustive(3)])
@pytest.mark.parametrize("drawn", [False, True], ids=["dense", "drawn"])
def test_chosen_and_repeated_rows(rows: list[int], num_prefix: int, drawn: bool) -> None:
    graph, chosen = graph_of(70), torch.tensor(rows)

    def through(module: Any) -> Any:
        return lambda q, k: module.attention_bce(q, k, graph, "a", rows=chosen, num_prefix=num_prefix, reduction="none")

    op, definition = through(cellattn), through(reference)
    if drawn:
        op, definition = with_drawn_negatives(graph, "a", chosen, 5, link="softmax", num_prefix=num_prefix)
    q, k = (x.detach() for x in leaves((2, 71 + num_prefix, 20), (2, 71 + num_prefix, 20), dtype=torch.bfloat16))
    assert_on_chip(80, op, definition, q, k, kernels=["bce_rows_fwd_kernel_edges", "bce_rows_bwd_kernel_dq"], parts=True)


EDGES = [f"bce_rows_{x}" for x in ("fwd_kernel_edges", "bwd_kernel_edges_dq", "bwd_kernel_edges_dk")]
SEGMENTS = [name.replace("edges", "segments") for name in EDGES]


@pytest.mark.parametrize("longest", [*exhaustive(200), 70], ids=["whole", "segments"])
@pytest.mark.parametrize(
    ("arch", "link", "drawn"),
    [
        (80, "softmax", False),
        (80, "sigmoid", True),
        *exhaustive((90, "softmax", False), (90, "softmax", True), (80, "softmax", True), (80, "sigmoid", False)),
    ],
)
@pytest.mark.parametrize("rows", [None, *exhaustive([0, 5, 0])], ids=["every row", "chosen"])
def test_hubs(rows: list[int] | None, arch: int, link: str, drawn: bool, longest: int) -> None:
    """A row and a column that have every gene but a few, whose edges take several steps, or segments; rows without edges."""
    n = 170
    everyone = torch.arange(n)
    hub = torch.stack([torch.zeros_like(everyone), everyone])[:, :160]
    graph = cut(MultiGraph.from_edge_index({"a": hub}, n, undirected=True), longest)
    chosen = None if rows is None else torch.tensor(rows)
    options: dict[str, Any] = {"rows": chosen, "link": link, "reduction": "none"}

    def through(module: Any) -> Any:
        return lambda q, k: module.attention_bce(q, k, graph, "a", **options)

    op, definition = through(cellattn), through(reference)
    if drawn:
        op, definition = with_drawn_negatives(graph, "a", chosen, 5, link=link, num_prefix=0)
    q, k = (x.detach() for x in leaves((n, 20), (n, 20), dtype=torch.bfloat16))
    kernels = [*EDGES, *(SEGMENTS if longest < 160 else ())]
    assert_on_chip(arch, op, definition, 3 * q, k, kernels=kernels, parts=True)


@pytest.mark.parametrize("tokens", [2, *exhaustive(64, 258)])
def test_awkward_numbers_of_tokens(tokens: int) -> None:
    """As many genes and one prefix token: one gene, a tile less one, and one more than several."""
    n = tokens - 1
    graph = random_graph(n, {"a": 3 * n})

    def through(module: Any) -> Any:
        return lambda q, k: module.attention_bce(q, k, graph, "a", num_prefix=1, reduction="none")

    q, k = (x.detach() for x in leaves((tokens, 20), (tokens, 20), dtype=torch.bfloat16))
    assert_on_chip(80, through(cellattn), through(reference), q, k, kernels=["bce_rows_fwd_kernel_dense"], parts=True)


@pytest.mark.parametrize("value", [torch.nan, *exhaustive(torch.inf)])
@pytest.mark.parametrize("size", [1.0, 6.0], ids=["", "sharp"])
@pytest.mark.parametrize(("arch", "link"), [(80, "softmax"), (90, "softmax"), *exhaustive((80, "sigmoid"))])
def test_what_is_in_no_pair_leaves_no_trace(arch: int, link: str, size: float, value: float) -> None:
    """Queries of the unknown gene and of one without an edge, and where no row reads all tokens also the unknown gene's key."""
    graph, n = random_graph(70, {"a": 60}).extend(1), 71
    edgeless = (graph.rowptr("a").diff() == 0).nonzero()[:, 0]
    assert edgeless.numel() > 1
    q, k = (x.detach() for x in leaves((n, 20), (n, 20), dtype=torch.bfloat16))
    q = size * q
    lse = (20**-0.5 * q.double() @ k.double().mT).logsumexp(-1).float() + (3 if size == 1 else 0)  # with 3 no entry is sharp

    def op(q: Tensor, k: Tensor) -> Tensor:
        return cellattn.attention_bce(q, k, graph, "a", lse=lse, link=link, reduction="none")

    results = []
    for x in (0.0, value):
        q[edgeless, 3] = x
        if size == 1:
            k[n - 1, 3] = x
        results.append(on_chip(arch, op, q, k)[0])
    for zero, wild in zip(*results, strict=True):
        assert zero.isfinite().all()
        assert torch.equal(zero, wild)


LARGE = [f"bce_rows_{x}" for x in ("fwd_kernel_large", "bwd_kernel_large_dq", "bwd_kernel_large_dk")]
OF_ANY_SIZE = [  # at 1e10 the log-sum-exp itself, of the forward of attention, is NaN in some rows
    *((arch, "bce", torch.float32, size) for arch in (80, 90) for size in (1e5, 1e6, 1e8)),
    (80, "bce binary", torch.float32, 1e6), (80, "bce", torch.float16, 1e4), (90, "bce", torch.bfloat16, 1e6),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "name", "dtype", "size"), exhaustive(*OF_ANY_SIZE), ids=str)
def test_large_scores(arch: int, name: str, dtype: torch.dtype, size: float) -> None:
    with ptx.device(arch) as device:
        large_scores.test_losses(name, size, dtype)
    assert set(LARGE) <= set(device.launches)


DIGITS = [
    *((arch, torch.float32, *case) for arch in (80, 90) for case in large_scores.LAST_DIGITS),
    *((arch, dtype, 1e6, negatives, None) for arch in (80, 90) for dtype in DTYPES.values() for negatives in (None, 9)),
]
FIRST = [(80, torch.bfloat16, 1e6, None, None), (90, torch.float32, 1e8, 9, large_scores.ROWS)]


@pytest.mark.parametrize(
    ("arch", "dtype", "size", "negatives", "rows"),
    [*FIRST, *exhaustive(*(x for x in DIGITS if x not in FIRST))],
    ids=large_scores.name_of,
)
def test_scores_that_differ_in_the_last_digits(
    arch: int, dtype: torch.dtype, size: float, negatives: int | float | None, rows: tuple[int, ...] | None
) -> None:
    op, definition, q, k = large_scores.bce_in_last_digits(size, negatives, rows, dtype)
    assert_on_chip(arch, op, definition, q, k, kernels=LARGE, parts=True)
