from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn import MultiGraph
from cellattn.graph import SEGMENT, cut_rows
from cellattn.kernels import config, segments, tensors
from cellattn.kernels import row_dot as kernels

from ..bounds import assert_within, with_bounds
from ..compare import cell_with_terms, leaves, random_graph
from ..conftest import exhaustive

TIES = [("a", 0), ("b", 2), ("b", 0)]  # two relations share head 0, head 1 has none


def shapes_graph(n: int) -> MultiGraph:
    """Relation a: row 0 has every gene, row 1 has one, other rows 3 in the mean and some none, with duplicates; b: sparse."""
    g = torch.Generator().manual_seed(n)
    first = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)])
    rest = torch.randint(1, n, (2, 3 * n), generator=g) if n > 2 else torch.empty(2, 0, dtype=torch.int64)
    rest = rest[:, rest[0] > 1]
    one = torch.tensor([[min(1, n - 1)], [n - 1]])
    index = {"a": torch.cat([rest, first, one, rest[:, :5]], 1), "b": torch.randint(n, (2, n), generator=g)}
    return MultiGraph.from_edge_index(
        index, n, edge_weight={r: torch.rand(e.shape[1], generator=g) + 0.1 for r, e in index.items()}
    )


def star_graph(n: int) -> MultiGraph:
    """Row 0 has every gene, and so has column 0; the others have gene 0."""
    everyone = torch.arange(n)
    return MultiGraph.from_edge_index({"a": torch.stack([torch.zeros_like(everyone), everyone])}, n, undirected=True)


def dense(graph: MultiGraph, relation: str) -> Tensor:
    n = graph.num_nodes
    matrix = torch.zeros(n, n, dtype=torch.float64)
    row, col = graph.edge_index(relation)
    matrix[row, col] = graph.weight(relation).double()
    return matrix


def reference(
    q: Tensor, k: Tensor, graph: MultiGraph, ties: Sequence[tuple[str, int]], rows: Sequence[Tensor | None], p: int
) -> Tensor:
    """y_i = q_i . sum_j w_ij k_j of all ties, one after the other."""
    parts = []
    for (relation, head), index in zip(ties, rows, strict=True):
        y = (q[..., head, p:, :] * (dense(graph, relation) @ k[..., head, p:, :])).sum(-1)
        parts.append(y if index is None else y[..., index])
    return torch.cat(parts, -1)


def cut(graph: MultiGraph, longest: int) -> tuple[Any, ...]:
    """What the launchers take of a graph whose rows and columns of more than `longest` entries are cut."""
    by_column = graph.stacked_by_column()
    cuts = (cut_rows(ptr.diff(), graph.num_nodes, longest) for ptr in (graph.stacked[0], by_column[0]))
    return (*graph.stacked, *by_column, *(x for segments in cuts for x in segments))


def check(
    q: Tensor,
    k: Tensor,
    graph: MultiGraph,
    ties: Sequence[tuple[str, int]],
    rows: Sequence[Tensor | None],
    p: int,
    longest: int = SEGMENT,
) -> None:
    """y, dq and dk of the launchers against autograd in float64, within rounding."""
    lengths = [graph.num_nodes if index is None else index.numel() for index in rows]
    chosen = None
    if any(index is not None for index in rows):
        chosen = torch.cat([torch.arange(graph.num_nodes) if index is None else index for index in rows])
    of_ties = [graph.relation_id(relation) for relation, _ in ties], [head for _, head in ties], chosen, lengths, p
    dy = torch.randn(*q.shape[:-3], sum(lengths), generator=torch.Generator().manual_seed(3))
    wanted = with_bounds(lambda q, k: reference(q, k, graph, ties, rows, p), (q, k), [dy])

    of_graph = cut(graph, longest)
    y, kbar = kernels.row_dot(q, k, *of_graph, *of_ties)
    got = [y, *kernels.row_dot_backward(dy, q, kbar, *of_graph[3:6], *of_graph[9:], *of_ties)]
    assert [x.dtype for x in got] == [torch.float32, q.dtype, q.dtype]
    for name, a, b in zip(("y", "dq", "dk"), got, wanted, strict=True):
        assert_within(a, b, name)


SHAPES = [(1, 8), (33, 1), (65, 20), (33, 64), (33, 100), (33, 128), (17, 256)]


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable) -> None:
    for module in (kernels, segments, tensors):
        poison(module)


@pytest.mark.parametrize(
    ("tokens", "d", "dtype"),
    [
        *((tokens, d, torch.float32) for tokens, d in SHAPES),
        (33, 64, torch.float16),
        *exhaustive(*((tokens, d, torch.float16) for tokens, d in SHAPES if d != 64)),
    ],
    ids=str,
)
def test_values_and_gradients(tokens: int, d: int, dtype: torch.dtype) -> None:
    p = int(tokens > 1)
    q, k = (x.detach() for x in leaves((3, tokens, d), (3, tokens, d), dtype=dtype))
    check(q, k, shapes_graph(tokens - p), TIES, [None] * 3, p)


@pytest.mark.parametrize("lead", [(2,), (2, 2)], ids=str)
def test_leading_dimensions_and_strides(lead: tuple[int, ...]) -> None:
    """q as a projection leaves it, heads inside tokens; k with features that do not follow each other."""
    (q,) = leaves((*lead, 13, 3, 20), dtype=torch.float32)
    (k,) = leaves((*lead, 3, 20, 13), dtype=torch.float32)
    check(q.detach().transpose(-3, -2), k.detach().mT, shapes_graph(12), TIES, [None] * 3, 1)


@pytest.mark.parametrize(
    "rows",
    [
        [[3, 0, 17], None, [5]],
        [[3, 3, 0, 3], [], [0, 19, 19]],
        [[], [], []],
        [list(range(19, -1, -1)), [1], list(range(20)) * 2],
    ],
    ids=["subsets and all", "repeated", "none", "every row, reversed and twice"],
)
def test_rows(rows: list[list[int] | None]) -> None:
    q, k = (x.detach() for x in leaves((2, 3, 22, 8), (2, 3, 22, 8), dtype=torch.float32))
    check(
        q, k, shapes_graph(20), TIES, [None if index is None else torch.tensor(index, dtype=torch.int64) for index in rows], 2
    )


def test_relations_that_join_two_types() -> None:
    q, k = (x.detach() for x in leaves((2, 33, 12), (2, 33, 12), dtype=torch.float32))
    ties = [("annotated", 0), ("members", 1), ("physical", 0), ("is_a", 1)]
    check(q, k, cell_with_terms(), ties, [None, torch.tensor([30, 2, 25]), None, torch.tensor([31])], 1)


@pytest.mark.parametrize("longest", [180, 100, 10], ids=["whole", "two segments", "18 segments"])
def test_hub_rows_take_several_steps(longest: int) -> None:
    """Degree 180 both ways: at D = 128 a loop takes 16 entries at once, or 16 segments."""
    q, k = (x.detach() for x in leaves((1, 180, 128), (1, 180, 128), dtype=torch.float32))
    check(q, k, star_graph(180), [("a", 0)], [None], 0, longest)


# Segments of at most 8 entries. Relation a has rows and columns of 8 (whole), 9 and 60; b of 8 at most; c of 17 and 33.
LONGEST, HUB_GENES = 8, 61
HUB_TIES = [("a", 0), ("b", 2), ("c", 0), ("c", 1), ("a", 1)]  # heads of two hub relations, and of none


def hubs_graph() -> MultiGraph:
    """Rows and columns of given degrees, the neighbours drawn without replacement, each with a weight."""
    g = torch.Generator().manual_seed(5)

    def star(gene: int, degree: int) -> Tensor:
        return torch.stack([torch.full((degree,), gene), torch.randperm(HUB_GENES, generator=g)[:degree]])

    index = {
        "a": [star(3, 8), star(7, 9), star(20, 60), star(5, 8).flip(0), star(9, 9).flip(0), star(30, 60).flip(0)],
        "b": [star(gene, gene % 9) for gene in range(0, HUB_GENES, 4)],
        "c": [star(1, 17), star(60, 33).flip(0)],
    }
    edges = {name: torch.cat(parts, 1) for name, parts in index.items()}
    weight = {name: torch.rand(e.shape[1], generator=g) + 0.1 for name, e in edges.items()}
    return MultiGraph.from_edge_index(edges, HUB_GENES, edge_weight=weight)


HUB_ROWS: dict[str, list[list[int] | None]] = {
    "all": [None] * 5,
    "hubs": [[20, 3, 7], [4], [1], [1, 0], [20]],
    "no hub": [[0, 3, 2], [4, 8], [2, 60], [5], [4]],
    "repeated": [[20, 20, 7, 0, 20], [8, 8], [1, 1], [0], [3, 3]],
    "a tie with none, and one with all": [[], None, [1, 2], None, [20, 19]],
}


@pytest.mark.parametrize("dtype", [torch.float32, *exhaustive(torch.float16)], ids=str)
@pytest.mark.parametrize("rows", HUB_ROWS.values(), ids=HUB_ROWS)
def test_rows_and_columns_cut_into_segments(rows: list[list[int] | None], dtype: torch.dtype) -> None:
    q, k = (x.detach() for x in leaves((3, HUB_GENES + 1, 20), (3, HUB_GENES + 1, 20), dtype=dtype))
    chosen = [None if index is None else torch.tensor(index, dtype=torch.int64) for index in rows]
    check(q, k, hubs_graph(), HUB_TIES, chosen, 1, LONGEST)


def test_segments_of_leading_dimensions() -> None:
    q, k = (x.detach() for x in leaves((2, 2, HUB_GENES, 8), (2, 2, HUB_GENES, 8), dtype=torch.float32))
    check(q, k, hubs_graph(), [("c", 1), ("a", 0)], [torch.tensor([1, 0]), torch.tensor([20, 7])], 0, LONGEST)


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels, as they are launched."""
    names: list[str] = []

    def choose(kernel: str, *rest: Any) -> None:
        names.append(kernel)
        config.choose_gather(kernel, *rest)

    monkeypatch.setattr(kernels, "choose_gather", choose)
    return names


@pytest.mark.parametrize(
    ("ties", "longest", "cut_ways"),
    [(HUB_TIES, LONGEST, True), ([("b", 0)], LONGEST, False), (HUB_TIES, 60, False)],
    ids=["hubs", "hubs in other relations", "a hub of exactly the length"],
)
def test_segments_are_launched_where_a_tie_has_some(
    ties: list[tuple[str, int]], longest: int, cut_ways: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = (x.detach() for x in leaves((3, HUB_GENES, 8), (3, HUB_GENES, 8), dtype=torch.float32))
    names = launched(monkeypatch)
    check(q, k, hubs_graph(), ties, [None] * len(ties), 0, longest)
    assert ("row_dot_fwd_segments" in names, "row_dot_bwd_dk_segments" in names) == (cut_ways, cut_ways)
    assert {"row_dot_fwd", "row_dot_bwd_dq", "row_dot_bwd_dk"} <= set(names)


def test_segments_of_rows_left_out_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = []
    partial_sums = segments.Segments.partial_sums

    def kept(self: Any, x: Tensor) -> Tensor | None:
        allocated.append(partial_sums(self, x))
        return allocated[-1]

    monkeypatch.setattr(segments.Segments, "partial_sums", kept)
    graph = hubs_graph()
    q, k = (x.detach() for x in leaves((1, HUB_GENES, 8), (1, HUB_GENES, 8), dtype=torch.float32))
    check(q, k, graph, [("a", 0)], [torch.tensor([7, 4])], 0, LONGEST)
    computed = allocated[0][0].any(-1)
    of_graph = cut_rows(graph.stacked[0].diff(), HUB_GENES, LONGEST)
    assert torch.equal(computed, of_graph.row[: of_graph.offset[1]] == 7)


def test_autotuned_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kernel is timed, and goes on with the tile that won: here the lowest, on more rows than it holds."""
    monkeypatch.setenv("CELLATTN_AUTOTUNE", "1")
    monkeypatch.setattr(config, "_tuned", {})
    monkeypatch.setattr(config, "milliseconds", lambda launch, tile: float(tile.rows))
    q, k = (x.detach() for x in leaves((3, 101, 20), (3, 101, 20), dtype=torch.float32))
    check(q, k, star_graph(100), [("a", 0), ("a", 2)], [None] * 2, 1, 40)
    won = {kernel: tile for (kernel, *_), tile in config._tuned.items()}
    wide, narrow = config.Gather(32, 1), config.Gather(8, 1)
    assert won == {
        **dict.fromkeys(("row_dot_fwd_segments", "row_dot_bwd_dq", "row_dot_bwd_dk_segments"), wide),
        **dict.fromkeys(("row_dot_fwd", "row_dot_bwd_dk"), narrow),
    }
    assert f"cellattn: row_dot_fwd, sm_80, torch.float32: 32: {narrow}," in capsys.readouterr().out


def test_graph_without_edges_gives_zeros() -> None:
    q, k = (x.detach() for x in leaves((1, 9, 8), (1, 9, 8), dtype=torch.float32))
    check(q, k, random_graph(8, {"a": 0}), [("a", 0)], [None], 1)


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (torch.ones(1, 5, 8).double(), torch.ones(1, 5, 8).double(), "q: expected dtype float16 or bfloat16 or float32"),
        (torch.ones(1, 5, 257), torch.ones(1, 5, 257), "q: expected at most 256 features"),
        (torch.ones(1, 5, 8), torch.ones(1, 5, 8).half(), "k: expected the dtype of q"),
        (torch.ones(1, 5, 8), torch.ones(1, 5, 8, device="meta"), "k: expected the device of q"),
    ],
    ids=["float64", "257 features", "dtypes", "devices"],
)
def test_bad_input_raises_before_any_launch(q: Tensor, k: Tensor, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(5, {"a": 4})
    monkeypatch.setattr(kernels, "choose_gather", lambda *_: pytest.fail("a kernel was launched"))
    with pytest.raises(ValueError, match=message):
        kernels.row_dot(q, k, *cut(graph, SEGMENT), [0], [0], None, [5], 0)


def test_mixed_devices_raise_before_any_launch_of_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(5, {"a": 4})
    q, dy, kbar = torch.ones(1, 5, 8), torch.ones(5), torch.ones(5, 8, device="meta")
    monkeypatch.setattr(kernels, "choose_gather", lambda *_: pytest.fail("a kernel was launched"))
    with pytest.raises(ValueError, match="kbar: expected the device of q"):
        kernels.row_dot_backward(dy, q, kbar, *cut(graph, SEGMENT)[3:6], *cut(graph, SEGMENT)[9:], [0], [0], None, [5], 0)
