"""KL to who shares terms with whom: against the dense definition, and against the same matrix as a graph of its own."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import Comembership, MultiGraph, reference
from cellattn.graph import comembership

from ..bounds import assert_within_rounding
from ..compare import assert_same, cell_with_terms, everything, leaves, typed_graph
from .test_network_mse import Largest

N, TERMS = 23, 9
ROWS = {"all": None, "some": [3, 0, 17, 1], "one": [5], "none": [], "twice": [4, 4, 9]}


def cell(seed: int = 0) -> MultiGraph:
    """Genes 0 to 19 have terms, gene 20 one that nobody else has, 21 an unknown, 22 none; the edges of the last one weigh 0."""
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randint(20, (60,), generator=g), N + torch.randint(TERMS - 2, (60,), generator=g)])
    index = torch.cat([index, torch.tensor([[20, 3], [N + TERMS - 2, N + TERMS - 1]])], 1)
    known = torch.ones(N + TERMS, dtype=torch.bool)
    known[21] = False
    weight = torch.rand(index.shape[1], generator=g) + 0.1
    weight[-1] = 0
    return MultiGraph.from_edge_index(
        {"of": index, "physical": torch.randint(N, (2, 30), generator=g)}, N + TERMS, edge_weight={"of": weight},
        known={"of": known}, node_types={"gene": N, "term": TERMS}, joins={"of": ("gene", "term")},
    )  # fmt: skip


def some_weights() -> Tensor:
    weight = torch.rand(TERMS, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.2
    weight[1] = 0
    return weight


def same(target: Comembership, *inputs: Tensor, **options: Any) -> None:
    assert_same(
        lambda q, k: cellattn.attention_kl_comembership(q, k, target, **options),
        lambda q, k: reference.attention_kl_comembership(q, k, target, **options),
        *inputs,
    )


def as_graph(target: Comembership, num_nodes: int) -> MultiGraph:
    """C as weighted edges, summed gene pair by gene pair and term by term."""
    graph, relation = target.graph, target.relation
    first = graph.node_types[graph.joins(relation)[1]].start
    of_term: dict[int, list[tuple[int, float]]] = {}
    for (i, e), b in zip(graph.edge_index(relation).t().tolist(), graph.weight(relation).tolist(), strict=True):
        of_term.setdefault(e, []).append((i, b))
    pairs = [
        (i, j, b_i * float(target.weight[e - first]) * b_j)
        for e, members in of_term.items()
        for (i, b_i), (j, b_j) in itertools.product(members, members)
        if i != j or target.diagonal
    ]
    index = torch.tensor([pair[:2] for pair in pairs]).reshape(-1, 2).t()
    weight = torch.tensor([pair[2] for pair in pairs], dtype=torch.float64)
    known = graph.known_rows(relation)[:num_nodes]
    return MultiGraph.from_edge_index({"c": index}, num_nodes, edge_weight={"c": weight}, known={"c": known})


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tokens", ["genes", "all"])
@pytest.mark.parametrize("diagonal", [False, True], ids=["off", "diagonal"])
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
def test_every_combination(weighted: bool, diagonal: bool, tokens: str, rows: str) -> None:
    target = cell().comembership("of", weight=some_weights() if weighted else None, diagonal=diagonal)
    index = None if ROWS[rows] is None else torch.tensor(ROWS[rows], dtype=torch.int64)
    n = N if tokens == "genes" else N + TERMS
    for lead, num_prefix in itertools.product(((), (2,), (2, 3)), (0, 2)):
        q, k = leaves((*lead, num_prefix + n, 8), (*lead, num_prefix + n, 8))
        for over, reduction in itertools.product(("tokens", "valid"), ("mean", "sum", "none")):
            same(target, q, k, rows=index, over=over, num_prefix=num_prefix, reduction=reduction)


@pytest.mark.parametrize("over", ["tokens", "valid"])
@pytest.mark.parametrize("diagonal", [False, True], ids=["off", "diagonal"])
def test_is_attention_kl_of_the_graph_of_pairs(diagonal: bool, over: str) -> None:
    target = cell().comembership("of", weight=some_weights(), diagonal=diagonal)
    q, k = leaves((2, 1 + N, 8), (2, 1 + N, 8))
    options: dict[str, Any] = {"num_prefix": 1, "over": over}
    pairs = as_graph(target, N)
    for rows in (None, torch.tensor([3, 20, 5, 3])):
        assert_same(
            lambda q, k, rows=rows: cellattn.attention_kl_comembership(q, k, target, rows=rows, **options),
            lambda q, k, rows=rows: cellattn.attention_kl(q, k, pairs, "c", rows=rows, **options),
            q,
            k,
        )


def test_rows_of_the_target() -> None:
    for diagonal in (False, True):
        target = cell().comembership("of", weight=some_weights(), diagonal=diagonal)
        rows = target.rows(torch.arange(N))
        torch.testing.assert_close(rows, reference.comembership(target)[:N, :N], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(rows, reference.target(as_graph(target, N), "c")[0], rtol=1e-12, atol=1e-15)
        assert torch.equal(rows.sum(1) > 0, target.inv_mass[:N] > 0)
    assert not rows[[21, 22]].any()
    assert rows[20, 20] == 1
    assert rows.is_contiguous()
    target = cell().comembership("of")
    assert not target.rows(torch.tensor([20])).any(), "a term of one gene is shared with nobody"
    assert target.inv_mass[20] == target.loops[20] == 0
    assert not target.rows(torch.arange(N)).diagonal().any()
    assert repr(target) == "Comembership('of', 19 of 23 genes share a term)"
    with pytest.raises(ValueError, match=r"genes: got token 23, expected tokens in \[0, 23\)"):
        target.rows(torch.tensor([3, 23]))


def test_a_term_is_the_same_part_of_each_row_by_its_size() -> None:
    """w = 1 / (genes - 1), as the docstring has it."""
    index = torch.tensor([[0, 1, 0, 2, 3, 4, 5], [6, 6, 7, 7, 7, 7, 7]])
    graph = MultiGraph.from_edge_index(
        {"of": index}, 8, node_types={"gene": 6, "term": 2}, joins={"of": ("gene", "term")}
    )  # fmt: skip
    size = graph.edge_index("of")[1].bincount(minlength=8)[6:]
    row = graph.comembership("of", weight=1 / (size - 1)).rows(torch.tensor([0]))
    torch.testing.assert_close(row, torch.tensor([[0, 1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 8]], dtype=torch.float64))


@pytest.mark.parametrize("block", [1, 60, 1 << 22])
def test_constants_do_not_depend_on_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    want = reference.comembership(cell().comembership("of"))
    monkeypatch.setattr(comembership, "_BLOCK", block)
    target = cell().comembership("of")
    torch.testing.assert_close(target.entropy, torch.xlogy(want, want).sum(1), rtol=1e-12, atol=1e-14)
    assert torch.equal(target.entropy == 0, target.inv_mass == 0)


@pytest.mark.parametrize("relation", ["members", "is_a", "physical"])
def test_other_types_and_relations_within_one(relation: str) -> None:
    """Terms by their genes, which stand before them; and tokens of one type by neighbours of their own type."""
    graph = cell_with_terms()
    q, k = leaves((1 + graph.num_nodes, 8), (1 + graph.num_nodes, 8))
    for diagonal, over in itertools.product((False, True), ("tokens", "valid")):
        same(graph.comembership(relation, diagonal=diagonal), q, k, num_prefix=1, over=over)
    genes = MultiGraph.from_edge_index({"a": graph.subgraph(torch.arange(23)).edge_index("physical")}, 23)
    same(genes.comembership("a"), *leaves((24, 8), (24, 8)), num_prefix=1)


@pytest.mark.parametrize("size", [2.0**-40, 0.3, 2.0**40])
def test_weighted_members(size: float) -> None:
    """The relation's own weights, whatever they are in units of."""
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randint(high, (90,), generator=generator) for high in (31, 9)]) + torch.tensor([[0], [31]])
    graph = MultiGraph.from_edge_index(
        {"of": index}, 40, node_types={"gene": 31, "term": 9}, joins={"of": ("gene", "term")},
        edge_weight={"of": size * (0.5 + torch.rand(90, generator=generator))},
    )  # fmt: skip
    for diagonal in (False, True):
        same(graph.comembership("of", diagonal=diagonal), *leaves((32, 8), (32, 8)), num_prefix=1)


@pytest.mark.parametrize("d", [1, 20, 100])
@pytest.mark.parametrize(("genes", "terms", "edges"), [(1, 1, 1), (1, 1, 0), (63, 5, 200), (129, 300, 500)], ids=str)
def test_awkward_shapes(genes: int, terms: int, edges: int, d: int) -> None:
    index = torch.stack([torch.randint(genes, (edges,)), genes + torch.randint(terms, (edges,))])
    graph = MultiGraph.from_edge_index(
        {"of": index}, genes + terms, node_types={"gene": genes, "term": terms}, joins={"of": ("gene", "term")}
    )  # fmt: skip
    for diagonal in (False, True):
        same(graph.comembership("of", diagonal=diagonal), *leaves((1 + genes, d), (1 + genes, d)), num_prefix=1, scale=0.3)


def test_no_token_without_a_leading_dimension() -> None:
    target = cell().comembership("of")
    q, k = leaves((0, N, 4), (0, N, 4))
    loss = cellattn.attention_kl_comembership(q, k, target)
    assert loss == 0
    assert cellattn.attention_kl_comembership(q, k, target, reduction="none").shape == (0, N)


def test_given_lse_is_used_and_differentiated() -> None:
    target = cell().comembership("of")
    q, k, v = leaves((1 + N, 8), (1 + N, 8), (1 + N, 4))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = cellattn.attention(q, k, v)
        return out, cellattn.attention_kl_comembership(q, k, target, lse=lse, num_prefix=1)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference.attention(q, k, v)[0], reference.attention_kl_comembership(q, k, target, num_prefix=1)

    assert_same(ours, theirs, q, k, v)
    shifted = cellattn.attention(q, k, v)[1] + 1
    plain = cellattn.attention_kl_comembership(q, k, target, num_prefix=1, reduction="none")
    moved = cellattn.attention_kl_comembership(q, k, target, num_prefix=1, lse=shifted, reduction="none")
    torch.testing.assert_close(moved - plain, (target.inv_mass[:N] > 0).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("diagonal", [False, True], ids=["off", "diagonal"])
def test_other_precisions_are_within_rounding(diagonal: bool, dtype: torch.dtype) -> None:
    """Without weights: what is taken off the sums is no larger than what stays, beside a term's own gene."""
    graph = typed_graph({"gene": 60, "term": 12}, {"of": ("gene", "term", 150)})
    target = graph.comembership("of", diagonal=diagonal)
    assert_within_rounding(
        lambda q, k: cellattn.attention_kl_comembership(q, k, target, num_prefix=1, reduction="none"),
        lambda q, k: by_sums(q, k, target, num_prefix=1),
        *leaves((61, 8), (61, 8), dtype=dtype),
        parts=True,
    )


def by_sums(q: Tensor, k: Tensor, target: Comembership, *, num_prefix: int, reduction: str = "none") -> Tensor:
    """The definition with its second term as it is computed, whose sums have the sizes that rounding goes by; row by row."""
    n = q.shape[-2] - num_prefix
    b = reference.adjacency(target.graph, target.relation)[:n].to(q.dtype)
    constants = target.term_weight, target.share[:n], target.own_share[:n], target.entropy[:n]
    weight, share, own_share, entropy = (x.to(q.dtype) for x in constants)
    scale = q.shape[-1] ** -0.5
    queries, keys = q[num_prefix:], k[num_prefix:]
    mean = share * (queries * (b @ (weight[:, None] * (b.T @ keys)))).sum(-1) - own_share * (queries * keys).sum(-1)
    lse = (scale * (q @ k.T)).logsumexp(-1)[num_prefix:]
    kl = entropy + lse - scale * mean
    return torch.where(share > 0, kl, torch.zeros_like(kl))


def test_sums_are_the_definition() -> None:
    """What the bounds above are made of."""
    for diagonal in (False, True):
        target = cell().comembership("of", weight=some_weights(), diagonal=diagonal)
        assert_same(
            lambda q, k, t=target: by_sums(q, k, t, num_prefix=1),
            lambda q, k, t=target: reference.attention_kl_comembership(q, k, t, num_prefix=1, reduction="none"),
            *leaves((1 + N, 8), (1 + N, 8)),
        )


def test_gradcheck_and_double_backward() -> None:
    target = typed_graph({"gene": 6, "term": 3}, {"of": ("gene", "term", 12)}).comembership("of")
    inputs = leaves((7, 3), (7, 3))
    for rows in (None, torch.tensor([1, 1, 3])):
        torch.autograd.gradcheck(
            lambda q, k, rows=rows: cellattn.attention_kl_comembership(q, k, target, rows=rows, num_prefix=1), inputs
        )
    q, k = inputs
    loss = cellattn.attention_kl_comembership(q, k, target, num_prefix=1)
    dq, dk = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(dq.square().sum() + dk.square().sum(), inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_genes_that_share_nothing_may_hold_anything(value: float) -> None:
    """Over valid genes an unknown one, and with the log-sum-exp given any that shares no term."""
    target = cell().comembership("of")
    q, k = (x.detach() for x in leaves((N, 4), (N, 4)))
    lse = cellattn.attention(q, k, k)[1]
    outside = torch.tensor([20, 21, 22])
    f = partial(cellattn.attention_kl_comembership, target=target, lse=lse, reduction="none")
    results = [everything(f, *pair) for pair in ((q, k), tuple(x.index_fill(0, outside, value) for x in (q, k)))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    other = k.index_fill(0, outside[1:2], value)
    pair = [everything(lambda k: cellattn.attention_kl_comembership(q, k, target, over="valid"), y) for y in (k, other)]
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def test_what_is_made_is_as_long_as_the_tokens() -> None:
    """Neither the constants nor the loss make a matrix of pairs; 400 terms of 50 genes have a million pairs."""
    n, terms, size, d = 2000, 400, 50, 8
    g = torch.Generator().manual_seed(0)
    genes = torch.cat([torch.randperm(n, generator=g)[:size] for _ in range(terms)])
    index = torch.stack([genes, n + torch.arange(terms).repeat_interleave(size)])
    graph = MultiGraph.from_edge_index(
        {"of": index}, n + terms, node_types={"gene": n, "term": terms}, joins={"of": ("gene", "term")}
    )  # fmt: skip
    q, k = leaves((n, d), (n, d), dtype=torch.float32)
    lse = cellattn.attention(q, k, k)[1].detach()
    target = graph.comembership("of")
    with Largest() as seen:
        torch.autograd.grad(cellattn.attention_kl_comembership(q, k, target, lse=lse), (q, k))
    assert seen.numel <= max((n + terms) * d, terms * size)
    with pytest.MonkeyPatch.context() as patch, Largest() as seen:
        patch.setattr(comembership, "_BLOCK", 50 * n)
        graph.comembership("of")
    assert seen.numel <= 50 * n


def test_genes_of_one_regulator_in_real_tables(yeast_graph: MultiGraph) -> None:
    """Targets by their regulators, which are genes too: the relation from regulator to target, reversed."""
    n, index = yeast_graph.num_nodes, yeast_graph.edge_index("regulatory")
    graph = MultiGraph.from_edge_index({"regulators": index.flip(0)}, n)
    regulators = index[0].unique()
    size = torch.zeros(n).index_add_(0, index[0], torch.ones(index.shape[1]))
    weight = 1 / (size - 1).clamp_min(1)
    target = graph.comembership("regulators", weight=weight)
    rows = torch.cat([regulators[:20], index[1, ::997]])
    q, k = leaves((n, 8), (n, 8))
    b = torch.zeros(n, n, dtype=torch.float64).index_put_((index[1], index[0]), torch.ones(index.shape[1]).double())[
        :, regulators
    ]
    c = (b[rows] * weight[regulators]) @ b.T
    c[torch.arange(len(rows)), rows] = 0
    t = torch.where(c.sum(1, keepdim=True) > 0, c / c.sum(1, keepdim=True), 0)
    torch.testing.assert_close(target.rows(rows), t, rtol=1e-12, atol=1e-15)

    def dense(q: Tensor, k: Tensor) -> Tensor:
        log_a = (q[rows] @ k.T / 8**0.5).log_softmax(1)
        return (torch.xlogy(t, t) - t * log_a).sum(1)

    assert_same(lambda q, k: cellattn.attention_kl_comembership(q, k, target, rows=rows, reduction="none"), dense, q, k)
    assert int((t.sum(1) > 0).sum()) > 10


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["static", "dynamic"])
def test_compiled_equals_eager(dynamic: bool) -> None:
    def step(q: Tensor, k: Tensor, target: Comembership, rows: Tensor | None) -> Tensor:
        return cellattn.attention_kl_comembership(q, k, target, rows=rows, num_prefix=1)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for genes, rows in ((20, None), (20, torch.tensor([1, 2])), (31, torch.tensor([1, 2, 5]))):
        target = typed_graph({"gene": genes, "term": 7}, {"of": ("gene", "term", 60)}).comembership("of")
        pair = leaves((genes + 1, 4), (genes + 1, 4))
        results = [everything(lambda q, k, f=f, t=target, r=rows: f(q, k, t, r), *pair) for f in (step, compiled)]
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


def test_constants_are_made_outside_of_compiled_functions() -> None:
    """At a graph break, once; where none may be, an error that says what to do before."""

    def step(q: Tensor, k: Tensor) -> Tensor:
        return cellattn.attention_kl_comembership(q, k, graph.comembership("of"))

    torch._dynamo.reset()
    graph = typed_graph({"gene": N, "term": 7}, {"of": ("gene", "term", 60)})
    q, k = leaves((N, 4), (N, 4))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call graph\.comembership\(relation\) once before"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(q, k)
    got = torch.compile(step, backend="aot_eager")(q, k)
    torch._dynamo.reset()
    for result in (got, torch.compile(step, fullgraph=True, backend="aot_eager")(q, k)):
        torch.testing.assert_close(result, step(q, k))


def test_files_and_copies(tmp_path: Path) -> None:
    target = cell().comembership("of", weight=some_weights())
    torch.save(target, tmp_path / "target.pt")
    q, k = leaves((N, 4), (N, 4))
    want = cellattn.attention_kl_comembership(q, k, target)
    for other in (torch.load(tmp_path / "target.pt"), copy.deepcopy(target)):
        assert torch.equal(cellattn.attention_kl_comembership(q, k, other), want)


def test_repeats_bit_for_bit() -> None:
    target = cell().comembership("of", weight=some_weights())
    q, k = leaves((2, N, 20), (2, N, 20), dtype=torch.float32)
    first, again = (everything(lambda q, k: cellattn.attention_kl_comembership(q, k, target), q, k) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda g: g.comembership("off"), ValueError, "relation: unknown value 'off'"),
        (lambda g: g.comembership("of", diagonal=1), TypeError, "diagonal: expected a bool, got int 1"),
        (lambda g: g.comembership("of", weight=[1.0] * TERMS), TypeError, "weight: expected a tensor, got list"),
        (lambda g: g.comembership("of", weight=torch.ones(N)), ValueError, "weight: expected 9, one a column's token, got 23"),
        (lambda g: g.comembership("of", weight=-torch.ones(TERMS)), ValueError, "weight: position 0 holds -1.0, expected a"),
        (lambda g: g.comembership("of", weight=torch.full((TERMS,), torch.nan)), ValueError, "weight: position 0 holds nan"),
        (lambda g: g.comembership("of", weight=torch.ones(TERMS).bool()), ValueError, "weight: expected numbers, got dtype"),
        (lambda g: g.comembership("of", weight=torch.full((TERMS,), 1e35)), ValueError, "weight: what 'of' shares in row 0"),
        (lambda g: loss(g, graph=g), TypeError, r"target: expected a Comembership, as graph.comembership\(relation\) is, got "),
        (lambda g: loss(g, tokens=N + 1), ValueError, r"q: expected 1 prefix tokens \+ 32 tokens of the graph, or 1 \+ 23"),
        (lambda g: loss(g, over="all"), ValueError, "over: unknown value 'all'"),
        (lambda g: loss(g, reduction="max"), ValueError, "reduction: unknown value 'max'"),
        (lambda g: loss(g, num_prefix=-1), ValueError, "num_prefix: expected at least 0"),
        (lambda g: loss(g, rows=torch.tensor([N])), ValueError, r"rows: position 0 holds 23, expected an index in \[0, 23\)"),
        (lambda g: loss(g, lse=torch.ones(3)), ValueError, "lse: expected"),
    ],
)  # fmt: skip
def test_bad_input(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(cell())


def loss(g: MultiGraph, graph: Any = None, tokens: int = N, num_prefix: int = 1, **options: Any) -> Tensor:
    q, k = torch.ones(1 + tokens, 4), torch.ones(1 + tokens, 4)
    target = g.comembership("of") if graph is None else graph
    return cellattn.attention_kl_comembership(q, k, target, num_prefix=num_prefix, **options)
