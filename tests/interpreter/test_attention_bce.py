"""The BCE kernels against the dense float64 definition: values, and the gradients of q, k and lse."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cellattn import MultiGraph, reference
from cellattn.graph import SEGMENT
from cellattn.kernels import attention_bce as kernels
from cellattn.kernels import attention_bce_entries, config, segments
from cellattn.kernels.attention import attention
from cellattn.kernels.negatives import nonedges
from cellattn.ops._negatives import Negatives, sample_negatives, sample_negatives_of_graph

from ..compare import cell_with_terms, leaves, random_graph
from ..conftest import exhaustive
from .test_row_dot import cut

# Relative to the largest entry. float32: scores of up to 20 are rounded to 2e-6, and a / (1 - a) multiplies that. float16:
# inputs are rounded before both sides, so that what is left is the 11 bits of a product's operand and of the result.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable[[ModuleType], None]) -> None:
    for module in (kernels, segments):
        poison(module)


def dense(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    graph: MultiGraph,
    relation: str,
    rows: Tensor,
    negatives: Negatives | None,
    *,
    num_prefix: int,
    scale: float,
    normalized: bool,
) -> Tensor:
    """[..., R]; lse [..., R] is an input of its own, None for the sigmoid link."""
    t, edges, valid = reference.target(graph, relation)
    t, edges, valid = (x[rows] for x in ((t if normalized else edges.double()), edges, valid))
    s = scale * (q[..., num_prefix + rows, :] @ k.mT)
    if lse is None:
        log_a, log_1ma = F.logsigmoid(s), F.logsigmoid(-s)
    else:
        log_a, log_1ma = reference.log_softmax_and_complement(s, lse)
    log_a, log_1ma = (x[..., num_prefix:] for x in (log_a, log_1ma))
    weight = (valid & ~edges).double()
    if negatives is not None:
        weight = torch.zeros_like(weight).index_put_(
            (negatives.row, negatives.gene), negatives.weight[negatives.row], accumulate=True
        )
    weight = torch.where(edges, 1 - t, weight)
    bce = torch.where(edges, t * log_a, 0) + torch.where(weight > 0, weight * log_1ma, 0)
    return torch.where(edges.any(1), -bce.sum(-1), 0)


def problem_of(
    graph: MultiGraph,
    relation: str,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    rows: Tensor | None = None,
    negatives: Negatives | None = None,
    *,
    num_prefix: int = 0,
    scale: float = 1.0,
    normalized: bool = True,
    longest: int = SEGMENT,
) -> tuple[Any, ...]:
    """The arguments of the launchers, with rows and columns of more than `longest` edges cut."""
    drawn: tuple[Tensor | None, ...] = (None,) * 4
    if negatives is not None:
        drawn = (*negatives[:3], negatives.weight.float())
    return (
        q, k, lse, *cut(graph, longest), graph.inv_mass.float(), graph.known_columns(relation), rows, *drawn,
        graph.relation_id(relation), num_prefix, scale, normalized,
    )  # fmt: skip


def check(
    graph: MultiGraph,
    relation: str,
    q: Tensor,
    k: Tensor,
    *,
    rows: Tensor | None = None,
    num_negatives: int | None = None,
    ratio: float | None = None,
    num_prefix: int = 1,
    link: str = "softmax",
    normalized: bool = True,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    floor: float = 1e-3,
    longest: int = SEGMENT,
) -> None:
    """Compare the launchers with autograd through `dense`, inputs rounded to the dtype; errors relative to `floor` at least."""
    n = graph.num_nodes
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = torch.arange(n) if rows is None else rows
    q, k = q.detach().to(dtype), k.detach().to(dtype)
    q64, k64 = q.double().requires_grad_(), k.double().requires_grad_()
    g = torch.Generator().manual_seed(3)
    negatives = None
    if num_negatives is not None:
        negatives = sample_negatives(graph, relation, rows, num_negatives, g)
    elif ratio is not None:
        negatives = sample_negatives_of_graph(graph, relation, ratio, g)
    lse64 = None
    if link == "softmax":
        scores = scale * (q64 @ k64.mT).detach()
        lse64 = scores.logsumexp(-1)[..., num_prefix:][..., chosen].requires_grad_()
    want = dense(
        q64, k64, lse64, graph, relation, chosen, negatives, num_prefix=num_prefix, scale=scale, normalized=normalized
    )  # fmt: skip
    dloss = torch.randn(want.shape, dtype=torch.float64, generator=g)
    inputs = [x for x in (q64, k64, lse64) if x is not None]
    want_grads = torch.autograd.grad((want * dloss).sum(), inputs)

    problem = problem_of(
        graph, relation, q, k, None if lse64 is None else lse64.detach().float(), rows, negatives,
        num_prefix=num_prefix, scale=scale, normalized=normalized, longest=longest,
    )  # fmt: skip
    got, *sharp = kernels.bce_rows(*problem)
    dq, dk, dlse = kernels.bce_rows_backward(dloss.float(), *sharp, *problem)
    assert got.dtype == dlse.dtype == torch.float32
    assert dq.dtype == dk.dtype == dtype
    if lse64 is None:
        assert dlse.numel() == 0
    for name, a, b in zip(("loss", "dq", "dk", "dlse"), (got, dq, dk, dlse), (want, *want_grads), strict=False):
        assert a.shape == b.shape, name
        assert a.isfinite().all(), name
        # Rounded to the dtype by the kernel, as any implementation would have to.
        tolerance = TOLERANCE[dtype if name in ("dq", "dk") else torch.float32]
        if dtype == torch.float16 and name == "dlse":
            tolerance = 2e-4
        scale_of_b = max(float(b.detach().abs().max()), floor) if b.numel() else 1.0
        error = float((a.double() - b.detach()).abs().max()) / scale_of_b if b.numel() else 0.0
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def mixed(n: int, *, weighted: bool = False) -> MultiGraph:
    """Rows without edges, with one, with all; duplicates; a gene that the relation does not know."""
    if n == 1:
        return MultiGraph.from_edge_index({"a": torch.zeros(2, 1, dtype=torch.int64)}, 1)
    graph = random_graph(n - 1, {"other": 7, "a": 5 * n}, weighted=weighted)
    index = graph.edge_index("a")
    index = index[:, (index[0] != 0) & (index[0] % 5 != 3)]
    full = torch.stack([torch.zeros(n - 1, dtype=torch.int64), torch.arange(n - 1)])
    one = torch.tensor([[3], [2]])
    weight = torch.rand(index.shape[1] + n, generator=torch.Generator().manual_seed(2)) + 0.1
    edges = {"other": graph.edge_index("other"), "a": torch.cat([index, full, one], 1)}
    weights = {"a": weight} if weighted else None
    return MultiGraph.from_edge_index(edges, n - 1, edge_weight=weights).extend(1)


@pytest.mark.parametrize("dtype", [torch.float32, *exhaustive(torch.float16)], ids=str)
@pytest.mark.parametrize("num_negatives", [None, 5], ids=["dense", "drawn"])
@pytest.mark.parametrize(
    ("t", "d", "link", "normalized", "step"),
    [
        (2, 8, "softmax", False, 1),
        (20, 1, "softmax", True, 1),
        (63, 20, "softmax", False, 2),
        (36, 20, "sigmoid", True, 1),
        (129, 64, "softmax", True, 8),
        (20, 100, "sigmoid", False, 1),
        (20, 128, "softmax", True, 1),
        (20, 200, "softmax", True, 4),
    ],
    ids=str,
)
def test_shapes(t: int, d: int, link: str, normalized: bool, step: int, num_negatives: int | None, dtype: torch.dtype) -> None:
    """T tokens, every step-th row."""
    q, k = leaves((t, d), (t, d))
    rows = None if step == 1 else torch.arange(0, t - 1, step)
    check(mixed(t - 1), "a", q, k, rows=rows, link=link, normalized=normalized, num_negatives=num_negatives, dtype=dtype)


@pytest.mark.parametrize("num_negatives", [None, 3], ids=["dense", "drawn"])
@pytest.mark.parametrize("rows", [[3, 0, 17], [4, 4, 0, 4], [0], []], ids=str)
def test_rows(rows: list[int], num_negatives: int | None) -> None:
    """Subsets, repeated genes, none; weights; leading dimensions; three prefix tokens."""
    q, k = leaves((2, 1, 36, 12), (2, 1, 36, 12))
    index = torch.tensor(rows, dtype=torch.int64)
    check(mixed(33, weighted=True), "a", q, k, rows=index, num_prefix=3, num_negatives=num_negatives)


@pytest.mark.parametrize("negatives", [{}, {"num_negatives": 5}, {"ratio": 1.5}], ids=["dense", "drawn", "ratio"])
@pytest.mark.parametrize(("relation", "link"), [("annotated", "softmax"), ("members", "sigmoid")], ids=str)
def test_relations_that_join_two_types(relation: str, link: str, negatives: dict[str, Any]) -> None:
    """Rows are tokens of one type, valid pairs end at those of the other, of which one is unknown."""
    q, k = leaves((2, 33, 12), (2, 33, 12))
    check(cell_with_terms(), relation, q, k, link=link, **negatives)


# Segments of at most 8 edges. Relation a has rows and columns of 8 (whole), 9, 30 and all 61; b, which is first, has both too.
LONGEST, HUB_GENES = 8, 61


def hubs_graph() -> MultiGraph:
    """Rows and columns without an edge too; a gene that the relations do not know."""
    g = torch.Generator().manual_seed(4)

    def star(gene: int, degree: int) -> Tensor:
        return torch.stack([torch.full((degree,), gene), torch.randperm(HUB_GENES, generator=g)[:degree]])

    rows = [star(gene, degree) for gene, degree in ((3, 8), (5, 9), (20, 30), (7, HUB_GENES), (1, 1), (60, 2))]
    columns = [star(gene, degree).flip(0) for gene, degree in ((4, 9), (0, 40), (20, 17))]
    edges = {"b": torch.cat([star(9, 50), star(2, 40).flip(0)], 1), "a": torch.cat([*rows, *columns], 1)}
    weight = {name: torch.rand(index.shape[1], generator=g) + 0.1 for name, index in edges.items()}
    return MultiGraph.from_edge_index(edges, HUB_GENES, edge_weight=weight).extend(1)


@pytest.mark.parametrize("negatives", [{}, {"num_negatives": 5}, {"ratio": 1.5}], ids=["dense", "drawn", "ratio"])
@pytest.mark.parametrize("rows", [None, [20, 7, 3, 20, 11, 20, 5], [3, 0]], ids=["all rows", "repeated", "no hub"])
@pytest.mark.parametrize(
    ("link", "size"), [("softmax", 1.0), ("softmax", 12.0), ("sigmoid", 1.0)], ids=["", "sharp", "sigmoid"]
)
def test_hubs_in_segments(link: str, size: float, rows: list[int] | None, negatives: dict[str, Any]) -> None:
    if rows is not None and "ratio" in negatives:
        pytest.skip("a ratio draws for the whole graph")
    q, k = leaves((2, HUB_GENES + 3, 20), (2, HUB_GENES + 3, 20))
    index = None if rows is None else torch.tensor(rows)
    options = {"rows": index, "num_prefix": 2, "link": link, "longest": LONGEST, **negatives}
    check(hubs_graph(), "a", size * q, k, floor=1e-3 if size == 1 else 10 * size**2, **options)


@pytest.mark.parametrize("longest", [180, 100, 10], ids=["whole", "two segments", "18 segments"])
@pytest.mark.parametrize("d", [20, 128])
def test_hubs_take_several_steps(d: int, longest: int) -> None:
    """Degree 180 both ways: at D = 128 a row takes 4 edges at once, or 4 segments."""
    n = 180
    everyone = torch.arange(n)
    hub = torch.stack([torch.zeros_like(everyone), everyone])
    q, k = leaves((n, d), (n, d))
    check(MultiGraph.from_edge_index({"a": hub}, n, undirected=True), "a", q, k, num_prefix=0, longest=longest)


@pytest.mark.parametrize("num_negatives", [None, 3], ids=["dense", "drawn"])
def test_a_row_named_repeatedly_is_cut_where_it_is_named_first(num_negatives: int | None) -> None:
    """Its copies have other LSE and upstream gradients; each equals the row alone, where it is cut."""
    graph, rows, p = hubs_graph(), torch.tensor([7, 20, 7, 1, 7]), 1
    q, k = (x.detach().float() for x in leaves((HUB_GENES + 2, 8), (HUB_GENES + 2, 8)))
    lse, dloss = 6 + torch.arange(5.0) / 4, torch.linspace(-1, 1, 5)
    negatives = None
    if num_negatives is not None:
        negatives = sample_negatives(graph, "a", rows, num_negatives, torch.Generator().manual_seed(0))

    def run(rows: Tensor, here: Tensor) -> list[Tensor]:
        drawn = None
        if negatives is not None and num_negatives is not None:
            gene = negatives.gene.view(-1, num_negatives)[here].flatten()
            row = torch.arange(here.numel()).repeat_interleave(num_negatives)
            drawn = Negatives(gene, row, num_negatives * torch.arange(here.numel() + 1), negatives.weight[here])
        problem = problem_of(graph, "a", q, k, lse[here], rows, drawn, num_prefix=p, scale=0.3, longest=LONGEST)
        loss, *sharp = kernels.bce_rows(*problem)
        dq, dk, dlse = kernels.bce_rows_backward(dloss[here], *sharp, *problem)
        return [loss, dlse, dq, dk]

    loss, dlse, dq, dk = run(rows, torch.arange(5))
    alone = [run(rows[i : i + 1], torch.tensor([i])) for i in range(5)]
    # sums of at most 61 terms, of which the largest is below 10, in two orders
    got = loss, dlse, dq, dk
    want = (torch.cat([x[i] for x in alone]) if i < 2 else torch.stack([x[i] for x in alone]).sum(0) for i in range(4))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("relation", "longest", "is_cut"),
    [("a", LONGEST, True), ("c", LONGEST, False), ("a", HUB_GENES, False)],
    ids=["hubs", "hubs in other relations", "a hub of exactly the length"],
)
def test_segments_are_launched_where_the_relation_has_some(
    relation: str, longest: int, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    choose_gather = kernels.choose_gather

    def noted(name: str, *rest: Any) -> None:
        names.append(name)
        choose_gather(name, *rest)

    monkeypatch.setattr(kernels, "choose_gather", noted)
    hubs = hubs_graph()
    edges = {name: hubs.edge_index(name) for name in ("b", "a")} | {"c": torch.tensor([[1, 2], [2, 9]])}
    q, k = leaves((HUB_GENES + 1, 8), (HUB_GENES + 1, 8))
    check(MultiGraph.from_edge_index(edges, HUB_GENES + 1), relation, q, k, num_prefix=0, longest=longest)
    of_segments = ["bce_edges_fwd_segments", "bce_edges_bwd_dq_segments", "bce_edges_bwd_dk_segments"]
    assert [name in names for name in of_segments] == [is_cut] * 3


def test_strided_heads_without_prefix() -> None:
    """One head of [T, H, D] storage, and features that are not consecutive."""
    q, k = leaves((34, 3, 10), (10, 34))
    check(mixed(34), "a", q[:, 1], k.mT, num_prefix=0)


@pytest.mark.parametrize("gap", [4.0, 8.0, 14.0])
@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "binary"])
def test_well_learnt_edges_leave_no_noise(normalized: bool, gap: float) -> None:
    """a near 1 on an edge with t = 1: the dense pass and the edge pass must not cancel.

    The loss and its gradient are small there, and known to the rounding of the scores: errors are held to that, not to them.
    """
    n = 35
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    graph = MultiGraph.from_edge_index({"a": ring}, n)
    q = torch.eye(n, dtype=torch.float64)
    check(graph, "a", q, gap * q.roll(-1, 0).mT, num_prefix=0, scale=1.0, normalized=normalized, floor=1.0)


@pytest.mark.parametrize("num_negatives", [None, 40], ids=["dense", "drawn"])
def test_sharp_non_edges(num_negatives: int | None) -> None:
    """a near 1 on a pair that is no edge: its term dominates, and is counted."""
    n = 35
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    graph = MultiGraph.from_edge_index({"a": ring}, n)
    q = torch.eye(n, dtype=torch.float64)
    check(graph, "a", q, 7 * q, num_prefix=0, scale=1.0, num_negatives=num_negatives)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("most", "ulps"),
    [(10_000.0, 0), (10_000.0, -2), (10_000.0, 2), (40.0, 0), *exhaustive((40.0, -2), (40.0, 2))],
    ids=lambda x: {0: "lse", -2: "lse low", 2: "lse high"}.get(x, str(x)),
)
def test_entries_within_rounding_of_one(most: float, ulps: int, dtype: torch.dtype) -> None:
    """1 - a from 3e-5 to e^-40, and to e^-10,000, with the LSE of the attention kernel, rounded otherwise than scores here.

    The entry near 1 is in turn the row's only edge, one of its two edges, and no edge. Keys are unit vectors: dq has the
    gradient of each score in a place of its own. Errors are held to the rounding of scores and LSE, which the derivatives of
    weights at most 2 hand on; dk to what dq means.
    """
    n, scale, eps = 33, 0.37, torch.finfo(torch.float32).eps
    gene = torch.arange(n)
    one, two = gene[gene % 3 == 0], gene[gene % 3 == 1]
    edges = [(gene, (gene + 2) % n), (two, (two + 1) % n), (one, (one + 1) % n)]
    index = torch.cat([torch.stack(pair) for pair in edges], 1)
    index = index[:, ~((index[0] % 3 == 0) & (index[1] == (index[0] + 2) % n))]
    graph = MultiGraph.from_edge_index({"a": index}, n)
    q = torch.randn(n, n, generator=torch.Generator().manual_seed(5))
    q[gene, (gene + 1) % n] = (torch.linspace(14, most, n) / scale)[
        torch.randperm(n, generator=torch.Generator().manual_seed(6))
    ]
    q, k = q.to(dtype), torch.eye(n).to(dtype)
    lse = attention(q, k, k.new_empty(n, 0), None, scale)[1]
    lse = (lse.view(torch.int32) + ulps).view(torch.float32)
    assert ulps > 0 or (scale * q.float() >= lse[:, None]).any()  # the case that this is about

    q64, k64 = q.double().requires_grad_(), k.double()
    lse64 = (scale * q64 @ k64.mT).logsumexp(-1).detach().requires_grad_()
    want = dense(q64, k64, lse64, graph, "a", gene, None, num_prefix=0, scale=scale, normalized=True)
    dq_want, dlse_want = torch.autograd.grad(want.sum(), (q64, lse64))
    problem = problem_of(graph, "a", q, k, lse, scale=scale)
    loss, *sharp = kernels.bce_rows(*problem)
    dq, dk, dlse = (x.double() for x in kernels.bce_rows_backward(torch.ones(n), *sharp, *problem))
    for x in (loss, dq, dk, dlse):
        assert x.isfinite().all()
    slack = 2 * (6 + abs(ulps)) * eps * scale * q.double().abs().amax(1)
    # Relative: sums of 33 terms in float32, and results (dq, dk) or operands rounded to the dtype.
    rtol = 4e-6 if dtype == torch.float32 else 2e-3
    assert ((loss.double() - want).abs() <= 2 * slack + 4e-6 * want).all()
    assert ((dq - dq_want).abs() / scale <= slack[:, None] + rtol * (1 + dq_want.abs() / scale)).all()
    assert ((dlse - dlse_want).abs() <= n * slack + rtol * n).all()
    meant = dq.mT @ q.double()  # sum_i scale ds_ij q_i
    assert float((dk - meant).abs().max()) <= rtol * float((dq.abs().mT @ q.double().abs()).max())


@pytest.mark.parametrize("size", [3.0, 30.0])
@pytest.mark.parametrize("negatives", [{}, {"num_negatives": 40}, {"ratio": 3.0}], ids=["dense", "drawn", "ratio"])
def test_sharp_maps(negatives: dict[str, Any], size: float) -> None:
    """Rows with a sharp entry and rows without: on edges, on others, on a prefix token and an unknown gene; drawn repeatedly.

    Scores are of up to some 5 `size`, and what float32 leaves of them shows in the gradients.
    """
    q, k = leaves((40, 8), (40, 8))
    check(mixed(38, weighted=True), "a", size * q, k, num_prefix=2, floor=10 * size**2, **negatives)


@pytest.mark.parametrize("rows", [None, [5, 30, 5, 0]], ids=["all rows", "some rows"])
@pytest.mark.parametrize("num_negatives", [None, 4], ids=["dense", "drawn"])
@pytest.mark.parametrize("size", [5, 20, 50, 10_000])
def test_sigmoid_link_keeps_every_digit_of_certain_pairs(size: int, num_negatives: int | None, rows: list[int] | None) -> None:
    """Scores of edges are `size`, of all others -size, exactly; of 67 genes, so that rows of bits have more than a word."""
    n, num_prefix = 67, 2
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    graph = MultiGraph.from_edge_index({"b": ring.flip(0)[:, :9], "a": ring}, n)
    q = torch.cat([torch.eye(n), torch.ones(n, 1)], 1)
    k = torch.cat([2 * size * torch.eye(n).roll(1, 0), torch.full((n, 1), -size)], 1).float()
    assert (q @ k.mT)[ring[0], ring[1]].unique().tolist() == [size]
    q, k = (torch.cat([torch.ones(num_prefix, n + 1), x]) for x in (q, k))
    q64, k64 = q.double().requires_grad_(), k.double().requires_grad_()
    index = None if rows is None else torch.tensor(rows)
    negatives = None
    if num_negatives is not None:
        negatives = sample_negatives(graph, "a", index, num_negatives, torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_prefix": num_prefix, "scale": 1.0, "normalized": False}
    want = dense(q64, k64, None, graph, "a", torch.arange(n) if index is None else index, negatives, **options)
    gradients = torch.autograd.grad(want.sum(), (q64, k64))
    problem = problem_of(graph, "a", q, k, None, index, negatives, **options)
    loss, *sharp = kernels.bce_rows(*problem)
    dq, dk, _ = kernels.bce_rows_backward(torch.ones(loss.shape), *sharp, *problem)
    for name, a, b in zip(("loss", "dq", "dk"), (loss, dq, dk), (want.detach(), *gradients), strict=True):
        # relative, entry by entry: sums of terms of one sign, or of two of dk's; float32's least number
        assert ((a.double() - b).abs() <= 1e-5 * b.abs().amax(-1, keepdim=True) + 1e-37).all(), name


@pytest.mark.parametrize("num_negatives", [None, 40], ids=["dense", "drawn"])
@pytest.mark.parametrize("size", [1e4, 1e6, 1e8, 1e10])
def test_scores_that_rounding_moves_past_one_leave_no_large_gradient(size: float, num_negatives: int | None) -> None:
    """Keys in nearly equal pairs. No weight of an entry is above 2, so no gradient is above 2 a row and 2 an edge."""
    n = 39
    graph, rows = mixed(n), torch.arange(n)
    q, k = (x.detach().float() for x in leaves((n, 8), (n, 8)))
    q, k = size**0.5 * q, size**0.5 * (k.repeat_interleave(2, 0)[:n] + 1e-7 * k)
    negatives = None
    if num_negatives is not None:
        negatives = sample_negatives(graph, "a", rows, num_negatives, torch.Generator().manual_seed(0), torch.float32)
        negatives = negatives._replace(weight=negatives.weight.clamp(max=1))
    lse = (0.3 * q.double() @ k.double().mT).logsumexp(-1).float()
    problem = problem_of(graph, "a", q, k, lse, None, negatives, scale=0.3)
    loss, *sharp = kernels.bce_rows(*problem)
    dq, dk, dlse = kernels.bce_rows_backward(torch.ones(n), *sharp, *problem)
    entries = graph.rowptr("a").diff() + 2 * (n + (num_negatives or 0))
    assert loss.isfinite().all()
    assert (dlse.abs() <= entries).all()
    assert (dq.abs() <= 0.3 * entries[:, None] * k.abs().max()).all()
    assert (dk.abs() <= 0.3 * entries.sum() * q.abs().max()).all()


@pytest.mark.parametrize("num_negatives", [None, 5], ids=["dense", "drawn"])
def test_large_log_sum_exps_of_other_keys_are_kept(num_negatives: int | None) -> None:
    """They differ from those of these keys by more than rounding explains: 3 at scores of 9e4, or these are infinite."""
    graph, d = mixed(33), 8
    q, k = (x.detach().float() for x in leaves((2, 33, d), (2, 33, d)))
    q[..., 0], k[..., 0] = 0, 512
    q[:, ::2, 0] = 512
    scale, genes = d**-0.5, torch.arange(33)
    q64, k64 = q.double().requires_grad_(), k.double().requires_grad_()
    lse = ((scale * q64 @ k64.mT).logsumexp(-1) + 3).detach().float()
    lse64 = lse.double().requires_grad_()
    negatives = None
    if num_negatives is not None:
        negatives = sample_negatives(graph, "a", None, num_negatives, torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_prefix": 0, "scale": scale, "normalized": False}
    want = dense(q64, k64, lse64, graph, "a", genes, negatives, **options)
    gradients = torch.autograd.grad(want.sum(), (q64, k64, lse64))
    assert not graph.known_columns("a")[32]
    for value in (None, torch.inf, torch.nan):
        if value is not None:
            k[:, 32, 3] = value  # in no pair
        problem = problem_of(graph, "a", q, k, lse, None, negatives, **options)
        loss, *sharp = kernels.bce_rows(*problem)
        results = loss, *kernels.bce_rows_backward(torch.ones_like(loss), *sharp, *problem)
        assert (sharp[0] == -1).all()
        for name, a, b in zip(("loss", "dq", "dk", "dlse"), results, (want.detach(), *gradients), strict=True):
            # x2 is of float64; in ordinary rows scores of up to 20 are rounded
            assert float((a - b).abs().max()) <= 5e-5 * float(b.abs().max()), name


def test_nonedges_are_those_of_the_cpu() -> None:
    for graph, relation in ((mixed(60, weighted=True), "a"), (cell_with_terms(), "annotated"), (cell_with_terms(), "members")):
        n = graph.num_nodes
        gene = torch.arange(n).repeat_interleave(n + 1)
        free = graph.num_free(relation)[gene]
        rank = (torch.arange(n + 1).repeat(n) * free) // (n + 1)  # every rank of every row, and the empty ones of full rows
        arguments = (*graph.stacked[:2], *graph.known_ranks(relation), gene, rank, graph.relation_id(relation))
        assert torch.equal(nonedges(*arguments), torch.ops.cellattn.nonedges(*arguments))


def test_autotuned_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kernel with a tile of its own is timed, and goes on with the tile that won: here the lowest."""
    monkeypatch.setenv("CELLATTN_AUTOTUNE", "1")
    monkeypatch.setattr(config, "_tuned", {})
    monkeypatch.setattr(config, "milliseconds", lambda launch, tile: float(tile[0]))
    q, k = leaves((36, 8), (36, 8))
    check(mixed(35), "a", q, k, longest=4)
    assert {kernel: tile for (kernel, *_), tile in config._tuned.items()} == {
        "bce_edges_fwd": config.Gather(16, 1),
        "bce_edges_fwd_segments": config.Gather(32, 1),
        "bce_dense_fwd": config.Tile(32, 32, 2, 1, tail=None),
        "bce_dense_fwd_rest": config.Tile(32, 32, 2, 1, tail=None),
        "bce_edges_bwd_dq": config.Gather(16, 1),
        "bce_edges_bwd_dq_segments": config.Gather(32, 1),
        "bce_dense_bwd_dq": config.Tile(32, 32, 2, 1, tail=None),
        "bce_dense_bwd_dk": config.Tile(16, 64, 2, 1, tail=None),
        "bce_edges_bwd_dk": config.Gather(16, 1),
        "bce_edges_bwd_dk_segments": config.Gather(32, 1),
    }
    assert f"cellattn: bce_edges_fwd, sm_80, torch.float32: 16: {config.Gather(16, 1)}," in capsys.readouterr().out


def test_links_are_tuned_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 keys, more than the words of edges that the sigmoid link reads, may win for the softmax link."""
    wide = config.Tile(32, 128, 4, 1, tail=None)
    names = "bce_dense_fwd", "bce_dense_bwd_dq", "bce_dense_bwd_dk"
    monkeypatch.setattr(config, "_tuned", {(name, 80, torch.float32, 16, False): wide for name in names})
    for link in ("softmax", "sigmoid"):
        q, k = leaves((36, 8), (36, 8))
        check(mixed(35), "a", q, k, link=link)


def test_parts_of_both_passes() -> None:
    """Loops cut into parts, the last one short: over the keys, and (each gene named many times) over the rows."""
    n = 290
    q, k = leaves((n, 8), (n, 8))
    graph = random_graph(n, {"a": 400})
    assert kernels.parts_for(1, n, 32, q.device)[0] > 1
    check(graph, "a", q, k, rows=torch.arange(n)[::7], num_prefix=0)
    q, k = leaves((4, 8), (4, 8))
    check(random_graph(4, {"a": 5}), "a", q, k, rows=torch.arange(290) % 4, num_prefix=0)


def test_small_and_large_probabilities_are_exact() -> None:
    """L and G against float64, over the range of log a that float32 holds."""
    import triton
    import triton.language as tl

    @triton.jit
    def entries_kernel(x_ptr, loss_ptr, grad_ptr, N: tl.constexpr, SIGMOID: tl.constexpr):
        o = tl.arange(0, N)
        x = tl.load(x_ptr + o)
        tl.store(loss_ptr + o, attention_bce_entries.loss_term(x, SIGMOID))
        tl.store(grad_ptr + o, attention_bce_entries.grad_term(x, SIGMOID))

    x = -torch.logspace(-0.2, 1.9, 512).float()  # up to a = 0.65
    loss, grad = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    entries_kernel[(1,)](x, loss, grad, N=512, SIGMOID=False)
    log_a = x.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
    want = -torch.log1p(-log_a.exp())
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(grad.double(), 1 / torch.expm1(-log_a), rtol=2e-6, atol=1e-30)
    x = torch.cat([x[::2], -x[::2]])
    entries_kernel[(1,)](x, loss, grad, N=512, SIGMOID=True)
    s = x.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(loss.double(), F.softplus(s), rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(grad.double(), s.sigmoid(), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("longest", [SEGMENT, 5], ids=["whole rows", "segments"])
@pytest.mark.parametrize("num_negatives", [None, 3], ids=["dense", "drawn"])
def test_repeats_bit_for_bit(num_negatives: int | None, longest: int) -> None:
    q, k = (x.detach().float() for x in leaves((50, 8), (50, 8)))
    graph = random_graph(49, {"a": 300})
    rows, lse = torch.tensor([4, 4, 9, 30]), torch.full((4,), 6.0)
    negatives = None
    if num_negatives is not None:
        negatives = sample_negatives(graph, "a", rows, num_negatives, torch.Generator().manual_seed(0))
    problem = problem_of(graph, "a", q, k, lse, rows, negatives, num_prefix=1, scale=0.3, longest=longest)
    runs = []
    for _ in range(2):
        loss, *sharp = kernels.bce_rows(*problem)
        runs.append((loss, *sharp, *kernels.bce_rows_backward(torch.ones(4), *sharp, *problem)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(10, 8).double(), "k": torch.zeros(10, 8).double()}, "expected dtype float16 or bfloat16 or float32"),
        ({"q": torch.zeros(10, 257), "k": torch.zeros(10, 257)}, "q: expected at most 256 features"),
        ({"k": torch.zeros(10, 8).half()}, "k: expected the dtype of q"),
        ({"k": torch.zeros(10, 8, device="meta")}, "k: expected the device of q"),
        ({"rows": torch.arange(9, device="meta")}, "rows: expected the device of q"),
        ({"negatives": Negatives(*(torch.zeros(9, device="meta") for _ in range(4)))}, "negatives: expected the device of q"),
    ],
    ids=["float64", "257 features", "dtypes", "k elsewhere", "rows elsewhere", "negatives elsewhere"],
)
def test_bad_input_raises_before_any_launch(change: dict[str, Tensor], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(9, {"a": 20})
    right: dict[str, Any] = {"q": torch.zeros(10, 8), "k": torch.zeros(10, 8), "rows": torch.arange(9), "negatives": None}
    x = right | change
    problem = problem_of(graph, "a", x["q"], x["k"], torch.zeros(9), x["rows"], x["negatives"], num_prefix=1)
    monkeypatch.setattr(kernels, "choose_gather", lambda *_: pytest.fail("a kernel was launched"))
    with pytest.raises(ValueError, match=message):
        kernels.bce_rows(*problem)
    with pytest.raises(ValueError, match=message):
        kernels.bce_rows_backward(torch.zeros(9), torch.zeros(9, dtype=torch.int32), torch.zeros(9), torch.zeros(9), *problem)
