from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference
from cellattn.graph import SEGMENT, cut_rows
from cellattn.kernels import attention, config, segments, tensors
from cellattn.kernels import edge_attention as kernels
from cellattn.ops._dropout import draw_dropout, threshold_of

from ..bounds import assert_within, with_bounds
from ..compare import leaves, random_graph
from ..conftest import exhaustive
from .test_row_dot import star_graph

HEADS = [("a", 0), ("b", 1), ("a", 1), ("a", 1)]  # one relation; two, one of them twice


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable) -> None:
    for module in (attention, kernels, segments, tensors):
        poison(module)


def problem(
    graph: MultiGraph, heads: Sequence[tuple[str, int]], weighted: bool, longest: int, *options: Any
) -> tuple[Any, ...]:
    """What the launchers take after the bias, of a graph whose rows and columns of more than `longest` entries are cut."""
    both = graph.stacked, graph.stacked_by_column()
    arrays = [x for ptr, other, weight in both for x in (ptr, other, weight.log() if weighted else None)]
    cuts = [x for ptr, *_ in both for x in cut_rows(ptr.diff(), graph.num_nodes, longest)]
    return *arrays, *cuts, [graph.relation_id(relation) for relation, _ in heads], [head for _, head in heads], *options


def check(
    graph: MultiGraph, heads: Sequence[tuple[str, int]], qkv: list[Tensor], bias: Tensor | None = None, *,
    num_prefix: int = 1, self_loops: bool = True, weighted: bool = False, scale: float = 0.4, longest: int = SEGMENT,
    without: int | None = None, dropout_p: float = 0.0,
) -> list[Tensor]:  # fmt: skip
    """out, lse and the gradients of the launchers against the dense definition in float64, within rounding.

    Args:
        qkv: q [..., H, N, D] of genes alone, k and v of all tokens.
        without: an output that has no gradient from above.
    """
    options: dict[str, Any] = {"num_prefix": num_prefix, "self_loops": self_loops, "weighted": weighted, "scale": scale}
    given = [x.detach() for x in (*qkv, bias) if x is not None]
    lead, dtype = qkv[0].shape[:-3], qkv[0].dtype

    def dense(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([k[..., :num_prefix, :], q], -2)  # rows of the prefix are those of `attention`
        edge_bias = bias[0] if bias else None
        dropout: dict[str, Any] = {"dropout_p": dropout_p, "generator": torch.Generator().manual_seed(3)}
        out, lse = reference.edge_attention(tokens, k, v, graph, heads, edge_bias=edge_bias, **dropout, **options)
        return out[..., num_prefix:, :], lse[..., num_prefix:]

    threshold = threshold_of(dropout_p)
    draw = draw_dropout(threshold, torch.Generator().manual_seed(3), torch.device("cpu"))
    rest = problem(graph, heads, weighted, longest, num_prefix, self_loops, scale, draw, threshold)
    out, lse = kernels.edge_attention(*given[:3], given[3] if bias is not None else None, *rest)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    g = torch.Generator().manual_seed(3)
    upstream: list[Tensor | None] = [torch.randn(x.shape, generator=g).to(x.dtype) for x in (out, lse)]
    if without is not None:
        upstream[without] = None
    *grads, dbias = kernels.edge_attention_backward(
        *upstream, out, lse, *given[:3], given[3] if bias is not None else None, *rest
    )
    got = [out, lse, *grads]
    if bias is None:
        assert dbias.shape == (*lead, graph.num_nodes, 0)
    else:
        assert dbias.shape == (*lead, graph.num_nodes, len(heads))
        got.append(dbias.flatten(0, -2).sum(0))
    names = ("out", "lse", "dq", "dk", "dv", "dbias")
    for name, a, b in zip(names, got, with_bounds(dense, given, upstream), strict=False):
        assert_within(a, b, name)
    return got


def inputs(
    n: int, num_prefix: int, d: int, dv: int, lead: tuple[int, ...] = (), heads: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    t = num_prefix + n
    return [x.detach() for x in leaves((*lead, heads, n, d), (*lead, heads, t, d), (*lead, heads, t, dv), dtype=dtype)]


def bias_of(heads: Sequence[tuple[str, int]]) -> Tensor:
    return leaves((len(heads),), dtype=torch.float32, seed=5)[0].detach()


@pytest.mark.parametrize(
    ("n", "d", "dv", "dtype"),
    [
        *((n, d, dv, torch.float32) for n, d, dv in ((1, 8, 3), (9, 1, 20), (5, 64, 7), (4, 256, 256))),
        *((n, d, dv, torch.float16) for n, d, dv in ((7, 20, 20), (5, 100, 128))),
    ],
    ids=str,
)
def test_values_and_gradients(n: int, d: int, dv: int, dtype: torch.dtype) -> None:
    graph = random_graph(n, {"a": min(4 * n, n * n), "b": n // 2}, weighted=True)
    check(graph, HEADS, inputs(n, 1, d, dv, dtype=dtype), bias_of(HEADS), weighted=True)


@pytest.mark.parametrize(
    ("weighted", "with_bias"), [(False, False), (True, False), (False, True)], ids=["", "weighted", "bias"]
)
@pytest.mark.parametrize(("num_prefix", "self_loops"), [(0, True), (2, False)], ids=str)
def test_options(num_prefix: int, self_loops: bool, weighted: bool, with_bias: bool) -> None:
    graph = random_graph(5, {"a": 12, "b": 6}, weighted=True)
    check(
        graph, HEADS, inputs(5, num_prefix, 8, 5), bias_of(HEADS) if with_bias else None,
        num_prefix=num_prefix, self_loops=self_loops, weighted=weighted,
    )  # fmt: skip


def test_prefix_of_several_steps() -> None:
    """17 prefix tokens and itself, where a step of D = 32 takes 16."""
    check(random_graph(5, {"a": 12, "b": 6}), HEADS, inputs(5, 17, 32, 5), num_prefix=17)


def test_rows_that_see_nothing() -> None:
    graph = MultiGraph.from_edge_index({"a": torch.tensor([[0, 0, 2], [1, 2, 2]])}, 4)
    q, k, v = inputs(4, 0, 8, 8, heads=1)
    rest = problem(graph, [("a", 0)], False, SEGMENT, 0, False, 0.3)
    out, lse = kernels.edge_attention(q, k, v, None, *rest)
    assert lse[0].tolist()[1::2] == [-torch.inf] * 2
    assert torch.equal(out[0, 1::2], torch.zeros(2, 8))
    dq, dk, dv, _ = kernels.edge_attention_backward(torch.ones_like(out), torch.ones_like(lse), out, lse, q, k, v, None, *rest)
    assert torch.equal(dq[0, 1::2], torch.zeros(2, 8))
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))
    assert torch.equal(dk[0, [0, 3]], torch.zeros(2, 8))  # seen by nobody
    assert torch.equal(dv[0, [0, 3]], torch.zeros(2, 8))


@pytest.mark.parametrize("without", [0, 1], ids=["lse alone", "out alone"])
def test_one_output_alone_has_a_gradient(without: int) -> None:
    graph = random_graph(5, {"a": 12, "b": 6}, weighted=True)
    got = check(graph, HEADS, inputs(5, 2, 8, 5), bias_of(HEADS), num_prefix=2, without=without)
    assert (without == 0) == (not got[4].any())


@pytest.mark.parametrize("lead", [(2,), (2, 2)], ids=str)
def test_leading_dimensions_and_strides(lead: tuple[int, ...]) -> None:
    """q as a projection leaves it, heads inside tokens; k and v with features that do not follow each other."""
    graph = random_graph(5, {"a": 12, "b": 6})
    q, k, v = leaves((*lead, 5, 2, 20), (*lead, 2, 20, 6), (*lead, 2, 8, 6), dtype=torch.float32)
    check(graph, HEADS, [q.transpose(-3, -2), k.mT, v.mT], bias_of(HEADS))


def test_negative_scale() -> None:
    check(random_graph(5, {"a": 12, "b": 6}), HEADS, inputs(5, 1, 8, 5), scale=-1.5)


# Segments of at most 3 entries. Relation a has rows and columns of fewer, of a few more, and of all 10; b of 3 at most.
LONGEST, HUB_GENES = 3, 10
HUB_HEADS = [("b", 1), ("a", 0), ("a", 1)]


def hubs_graph() -> MultiGraph:
    g = torch.Generator().manual_seed(5)

    def star(gene: int, degree: int) -> Tensor:
        return torch.stack([torch.full((degree,), gene), torch.randperm(HUB_GENES, generator=g)[:degree]])

    a = [star(3, 3), star(7, 4), star(0, 10)]
    edges = {
        "a": torch.cat([*a, *(x.flip(0) for x in a)], 1),
        "b": torch.cat([star(gene, gene % 4) for gene in (0, 2, 3, 9)], 1),
    }
    weight = {name: torch.rand(e.shape[1], generator=g) + 0.1 for name, e in edges.items()}
    return MultiGraph.from_edge_index(edges, HUB_GENES, edge_weight=weight)


@pytest.mark.parametrize("dtype", [torch.float32, *exhaustive(torch.float16)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted and bias"])
def test_rows_and_columns_cut_into_segments(weighted: bool, dtype: torch.dtype) -> None:
    bias = bias_of(HUB_HEADS) if weighted else None
    check(hubs_graph(), HUB_HEADS, inputs(HUB_GENES, 1, 20, 12, dtype=dtype), bias, weighted=weighted, longest=LONGEST)


def test_segments_of_leading_dimensions() -> None:
    heads = [("a", 0)]
    check(hubs_graph(), heads, inputs(HUB_GENES, 0, 8, 8, (2,), 1), bias_of(heads), num_prefix=0, longest=LONGEST)


@pytest.mark.parametrize("longest", [12, 6, 1], ids=["whole", "two segments", "12 segments"])
def test_hubs_take_several_steps(longest: int) -> None:
    """Degree 12 both ways: at D = 128 a row takes 4 entries at once, or 4 segments."""
    check(star_graph(12), [("a", 0)], inputs(12, 1, 128, 128, heads=1), longest=longest)


@pytest.mark.parametrize(
    ("heads", "longest", "is_cut"),
    [([("a", 0)], LONGEST, True), ([("b", 0)], LONGEST, False), ([("a", 0)], 10, False)],
    ids=["hubs", "hubs in other relations", "a hub of exactly the length"],
)
def test_segments_are_launched_where_a_tie_has_some(
    heads: list[tuple[str, int]], longest: int, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def choose(kernel: str, *rest: Any) -> None:
        names.append(kernel)
        config.choose_gather(kernel, *rest)

    monkeypatch.setattr(kernels, "choose_gather", choose)
    check(hubs_graph(), heads, inputs(HUB_GENES, 0, 8, 8, heads=1), num_prefix=0, longest=longest)
    of_segments = ["edge_fwd_segments", "edge_bwd_dq_segments", "edge_bwd_dkv_segments"]
    assert [name in names for name in of_segments] == [is_cut] * 3
    assert {"edge_fwd", "edge_bwd_dq", "edge_bwd_dkv"} <= set(names)


@pytest.mark.parametrize(
    ("num_prefix", "self_loops", "dtype"),
    [(0, True, torch.float16), (2, False, torch.float32), (61, True, torch.float32)],
    ids=str,
)
def test_dropout(num_prefix: int, self_loops: bool, dtype: torch.dtype) -> None:
    """Pairs in two relations, and twice in one; behind 61 prefix tokens genes are on both sides of a group of 64."""
    n = 8
    graph = random_graph(n, {"a": 30, "b": 20}, weighted=True)
    check(
        graph, HEADS, inputs(n, num_prefix, 8, 5, (2,), dtype=dtype), bias_of(HEADS), num_prefix=num_prefix,
        self_loops=self_loops, weighted=True, dropout_p=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_dropout_of_segments(num_prefix: int) -> None:
    qkv = inputs(HUB_GENES, num_prefix, 20, 12, (2,))
    check(hubs_graph(), HUB_HEADS, qkv, bias_of(HUB_HEADS), num_prefix=num_prefix, longest=LONGEST, dropout_p=0.4)


@pytest.mark.parametrize("without", [0, 1], ids=["lse alone", "out alone"])
def test_dropout_where_one_output_alone_has_a_gradient(without: int) -> None:
    graph = random_graph(5, {"a": 12, "b": 6}, weighted=True)
    check(graph, HEADS, inputs(5, 2, 8, 5), bias_of(HEADS), num_prefix=2, without=without, dropout_p=0.4)


def test_entries_dropped_are_those_of_the_cpu() -> None:
    """Bit for bit, read off an identity as values."""
    graph = random_graph(70, {"a": 1500, "b": 900}).without_self_loops(None)
    q, k, v = torch.zeros(2, 70, 8), torch.zeros(2, 72, 8), torch.eye(72).expand(2, 72, 72)
    p, threshold = 0.3, threshold_of(0.3)
    draw = draw_dropout(threshold, torch.Generator().manual_seed(3), torch.device("cpu"))
    rest = problem(graph, HEADS[:2], False, 10, 2, True, 0.3, draw, threshold)
    out, _ = kernels.edge_attention(q, k, v, None, *rest)
    whole = torch.cat([k[..., :2, :], q], -2)
    generator = torch.Generator().manual_seed(3)
    want, _ = cellattn.edge_attention(whole, k, v, graph, HEADS[:2], num_prefix=2, dropout_p=p, generator=generator)
    assert torch.equal(out != 0, want[:, 2:] != 0)


def test_repeats_bit_for_bit() -> None:
    graph, qkv = random_graph(5, {"a": 12, "b": 6}), inputs(5, 2, 8, 8)
    runs = [check(graph, HEADS, qkv, bias_of(HEADS), num_prefix=2, longest=3) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autotuned_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kernel is timed, and goes on with the tile that won: here the lowest, on more entries than it holds."""
    monkeypatch.setenv("CELLATTN_AUTOTUNE", "1")
    monkeypatch.setattr(config, "_tuned", {})
    monkeypatch.setattr(config, "milliseconds", lambda launch, tile: float(tile.rows))
    check(star_graph(18), [("a", 0)], inputs(18, 0, 20, 20, heads=1), num_prefix=0, longest=17)
    won = {kernel: tile for (kernel, *_), tile in config._tuned.items() if kernel.startswith("edge")}
    passes = ("edge_fwd", "edge_bwd_dq", "edge_bwd_dkv")
    narrow, segment = config.Gather(8, 1), config.Gather(16, 1)
    assert won == {**dict.fromkeys(passes, narrow), **dict.fromkeys((f"{x}_segments" for x in passes), segment)}
    assert f"cellattn: edge_fwd, sm_80, torch.float32: 32: {narrow}," in capsys.readouterr().out


def test_graph_without_edges() -> None:
    check(random_graph(3, {"a": 0, "b": 0}), HEADS, inputs(3, 1, 8, 8), bias_of(HEADS))


def test_no_problem_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose_gather", lambda *_: pytest.fail("a kernel was launched"))
    graph = random_graph(5, {"a": 4})
    q, k, v = inputs(5, 1, 8, 4, (0,), 1)
    rest = problem(graph, [("a", 0)], False, SEGMENT, 1, True, 0.3)
    out, lse = kernels.edge_attention(q, k, v, None, *rest)
    grads = kernels.edge_attention_backward(out, lse, out, lse, q, k, v, None, *rest)
    assert [tuple(x.shape) for x in (out, lse, *grads)] == [
        (0, 1, 5, 4), (0, 1, 5), (0, 1, 5, 8), (0, 1, 6, 8), (0, 1, 6, 4), (0, 5, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(1, 5, 8).double()}, "q: expected dtype float16 or bfloat16 or float32"),
        ({"q": torch.ones(1, 5, 257)}, "q: expected at most 256 features"),
        ({"v": torch.ones(1, 6, 300)}, "v: expected at most 256 features"),
        ({"k": torch.ones(1, 6, 8).half()}, "k: expected the dtype of q"),
        ({"v": torch.ones(1, 6, 8, device="meta")}, "v: expected the device of q"),
        ({"bias": torch.ones(1, device="meta")}, "edge_bias: expected the device of q"),
    ],
    ids=["float64", "257 features", "300 values", "dtypes", "devices", "bias"],
)
def test_bad_input_raises_before_any_launch(change: dict[str, Tensor], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose_gather", lambda *_: pytest.fail("a kernel was launched"))
    given = {"q": torch.ones(1, 5, 8), "k": torch.ones(1, 6, 8), "v": torch.ones(1, 6, 8), "bias": None, **change}
    rest = problem(random_graph(5, {"a": 4}), [("a", 0)], False, SEGMENT, 1, True, 0.3)
    out, lse = torch.ones(1, 5, 8), torch.ones(1, 5)
    with pytest.raises(ValueError, match=message):
        kernels.edge_attention(*given.values(), *rest)
    with pytest.raises(ValueError, match=message):
        kernels.edge_attention_backward(out, lse, out, lse, *given.values(), *rest)
