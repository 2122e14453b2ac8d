"""What faults are planted in: every family of kernels, at shapes whose launches share their PTX.

Sizes are data, so that one compilation serves several shapes; they are ragged, so that every mask is false somewhere, and
longer than a tile, so that loops go round and their asynchronous copies follow each other. What is left of a tile is little in
one shape and nearly all of it in another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference
from cellattn.graph import cut_rows
from cellattn.ops.row_dot import row_dot_csr

from ..bounds import attention_gradient_ratios
from ..compare import leaves, of_large_scores, random_graph, with_drawn_negatives
from ..ops.sets import between

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DROPOUT = "dropout.py", "random.py"  # which entries stay, and Triton's Philox


@dataclass(frozen=True)
class Shape:
    """An op on inputs, and its definition."""

    op: Callable[..., Any]
    definition: Callable[..., Any]
    inputs: list[Tensor]
    parts: bool = False  # as in bounds.assert_within
    exact: bool = False  # of the extension: the definition is its CPU half, bit by bit
    # of gradients, given them and the upstream ones: errors as shares of their bounds; None: as bounds.with_bounds has them
    ratios: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[float]] | None = None


@dataclass(frozen=True)
class Subject:
    """Kernels of one family as compiled for one chip."""

    family: str
    name: str
    arch: int
    shapes: Sequence[Callable[[], Shape]]  # the quickest first
    files: Sequence[str] = ()  # of the sources of the instructions that faults are planted in; none: of all

    def __str__(self) -> str:
        return f"{self.family}, {self.name}, sm_{self.arch}"

    def owns(self, kernel: str) -> bool:
        """Whether a kernel that is launched is one of the family."""
        return family_of(kernel) == self.family


_BEGINNINGS = {
    "attention_": "attention",
    "bit_sum_": "bit_sum",
    "bce_rows_": "attention_bce",
    "nonedges_": "attention_bce",
    "edge_bwd_": "edge_attention",
    "edge_fwd_": "edge_attention",
    "masked_": "masked_spmm",
    "perturbation_attention_": "perturbation_attention",
    "place_table_": "relational_spmm",
    "relational_": "relational_spmm",
    "row_dot_": "row_dot",
    "set_sum_": "set_sum",
}


def family_of(kernel: str) -> str:
    """Of a kernel's name; those of csrc/cuda have the others, and none is that of a library's."""
    others = "khop" if kernel.endswith("_kernel") else ""
    return next((family for beginning, family in _BEGINNINGS.items() if kernel.startswith(beginning)), others)


def drawn(dtype: torch.dtype, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    return [x.detach() for x in leaves(*shapes, dtype=dtype, seed=seed)]


def both(of: Callable[[Any], Callable[..., Any]], inputs: list[Tensor], *, parts: bool = False) -> Shape:
    return Shape(of(cellattn), of(reference), inputs, parts)


# ----------------------------------------------------------------------------------------------------------- attention


def _attention(
    dtype: torch.dtype, lead: tuple[int, ...], tq: int, tk: int, d: int, dv: int, size: float = 1, *, heavy: int = 0,
    dropped: bool = False,
) -> Shape:  # fmt: skip
    """`heavy`: so many keys, the last, have nearly all of the weight. With a size of 0 all keys have the same."""
    q, k, v = drawn(dtype, (*lead, tq, d), (*lead, tk, d), (*lead, tk, dv))
    if heavy:
        q[..., 0], k[..., -heavy:, 0] = 4, 8
    return _attention_of([size * q, k, v], dropped)


def _attention_of(inputs: list[Tensor], dropped: bool) -> Shape:
    return both(lambda module: lambda q, k, v: module.attention(q, k, v, **dropout() if dropped else {}), inputs)


def dropout() -> dict[str, Any]:
    """The same draw each time."""
    return {"dropout_p": 0.3, "generator": torch.Generator().manual_seed(3)}


def _large(
    dtype: torch.dtype, lead: tuple[int, ...], tq: int, tk: int, d: int, dv: int, *, masked: bool = False, dropped: bool = False
) -> Shape:
    """Every 20th row has scores of 900 or -900 and what makes them differ, as many have scores that differ by hundreds."""
    q, k, v = drawn(dtype, (*lead, tq, d), (*lead, tk, d), (*lead, tk, dv))
    q[..., 0], k[..., 0] = 0, 64
    large = torch.arange(3, tq, 20)
    q[..., large, 0] = (900 / 64 * d**0.5 * (-1) ** torch.arange(large.numel())).to(dtype)
    q[..., 7::20, :] *= 300
    keep = torch.rand(*lead, tk, generator=torch.Generator().manual_seed(5)) < 0.6 if masked else None
    multiplier = reference.dropout_multiplier((*lead, tq, tk), *dropout().values()) if dropped else 1.0

    def ratios(got: Sequence[Tensor], upstream: Sequence[Tensor]) -> Sequence[float]:
        *of_out, dlse = upstream
        dout = of_out[0] if of_out else v.new_zeros(*lead, tq, dv)
        found = [*got, torch.zeros_like(v)][:3]  # of logsumexp there is no dv
        return list(attention_gradient_ratios(found, q, k, v, dout, dlse, d**-0.5, keep, multiplier).values())[: len(got)]

    if not masked:
        return replace(_attention_of([q, k, v], dropped), ratios=ratios)

    def of(module: Any) -> Callable[..., Any]:
        return lambda q, k: module.attention_logsumexp(q, k, key_mask=keep)

    return Shape(of(cellattn), of(reference), [q, k], ratios=ratios)


def _masked(dtype: torch.dtype, lead: tuple[int, ...], tq: int, tk: int, d: int) -> Shape:
    keep = torch.rand(*lead, tk, generator=torch.Generator().manual_seed(5)) < 0.6
    return both(
        lambda module: lambda q, k: module.attention_logsumexp(q, k, key_mask=keep),
        drawn(dtype, (*lead, tq, d), (*lead, tk, d)),
    )


# ------------------------------------------------------------------------------------------------------- rows of graphs


def _weighted(n: int, degree: int, hub: int) -> MultiGraph:
    """Row 0 and column 0 have so many genes, row 1 has one more, row 2 none, and column 3 is in many rows."""
    g = torch.Generator().manual_seed(n)
    rest = torch.randint(n, (2, degree * n), generator=g)
    rest = rest[:, rest[0] > 2]
    rest[1, ::4] = 3
    hubs = torch.stack([torch.zeros(hub).long(), torch.arange(hub)])
    index = torch.cat([hubs, hubs.flip(0)[:, 3:], torch.tensor([[1], [n - 1]]), rest], 1)
    weight = torch.rand(index.shape[1], generator=g) + 0.1
    none = torch.empty(2, 0, dtype=torch.int64)
    return MultiGraph.from_edge_index({"a": index, "none": none}, n, edge_weight={"a": weight, "none": torch.empty(0)})


def _three(n: int, degree: int = 5) -> MultiGraph:
    """`_weighted`, and a relation of as many entries as genes."""
    first, g = _weighted(n, degree, n), torch.Generator().manual_seed(n)
    index = {name: first.edge_index(name) for name in first.relations} | {"b": torch.randint(n, (2, n), generator=g)}
    weight = {name: first.weight(name) for name in first.relations} | {"b": torch.rand(n, generator=g) + 0.1}
    return MultiGraph.from_edge_index(index, n, edge_weight=weight)


def cut(graph: MultiGraph, longest: int) -> MultiGraph:
    """Its rows and columns in segments of so many entries, far fewer than a GPU gets."""
    by_row, by_column = (
        cut_rows(ptr.diff(), graph.num_nodes, longest) for ptr in (graph.stacked[0], graph.stacked_by_column()[0])
    )
    graph._segments = by_row, by_column
    return graph


def _ties(dtype: torch.dtype, lead: tuple[int, ...], graph: MultiGraph, d: int, rows: list[list[int] | None] | None) -> Shape:
    """Three ties of two heads, the middle one of all rows."""
    from ..interpreter.test_row_dot import reference as definition

    ties, chosen = [("a", 1), ("b", 0), ("a", 0)], [None if x is None else torch.tensor(x) for x in rows or [None] * 3]
    inputs = drawn(dtype, *((*lead, 2, graph.num_nodes + 1, d) for _ in range(2)))
    return Shape(
        lambda q, k: row_dot_csr(q, k, graph, ties, chosen, num_prefix=1),
        lambda q, k: definition(q, k, graph, ties, chosen, 1),
        inputs,
        parts=True,
    )


def _kl(dtype: torch.dtype, lead: tuple[int, ...], n: int, d: int, rows: list[int] | None, hub: int) -> Shape:
    graph = _weighted(n, 3, hub)
    options: dict[str, Any] = {"num_prefix": 1, "reduction": "none", "rows": None if rows is None else torch.tensor(rows)}
    q, k = drawn(dtype, (*lead, n + 1, d), (*lead, n + 1, d))
    (lse,) = drawn(FP32, (*lead, n + 1))
    return both(
        lambda module: lambda q, k, lse: module.attention_kl(q, k, graph, "a", lse=lse, **options), [q, k, lse], parts=True
    )


def _bit_sum(
    dtype: torch.dtype, lead: tuple[int, ...], n: int, d: int, rows: list[int] | None, *, wild: bool = False, one: bool = False
) -> Shape:
    """Half of all pairs, or `one` edge a row and column, so that every digit of a number shows.

    `wild`: the second half of x holds numbers that are not finite, which are in no pair.
    """
    from ..interpreter.test_bit_sum import drawn as mask_of
    from ..interpreter.test_bit_sum import packed

    mask, chosen = mask_of(n, n), None if rows is None else torch.tensor(rows)
    if one:
        mask = torch.eye(n, dtype=torch.bool).roll(n // 3, 0)
    (x,) = drawn(dtype, (*lead, n, d))
    if wild:
        mask[:, n // 2 :] = False
        x[..., n // 2 :: 3, :], x[..., n - 1, :] = torch.inf, torch.nan
    words, across, dense = packed(mask), packed(mask.t()), mask if chosen is None else mask[chosen]

    def definition(x: Tensor) -> Tensor:
        return dense.to(x.dtype) @ (torch.cat([x[..., : n // 2, :], 0 * x[..., : n - n // 2, :]], -2) if wild else x)

    return Shape(lambda x: torch.ops.cellattn.bit_sum(x, words, across, chosen, None), definition, [x])


def _hubs(n: int, degree: int, longest: int) -> MultiGraph:
    """`_weighted` cut, behind a relation that is cut too; the last gene is unknown."""
    graph = _weighted(n, degree, n)
    star = torch.stack([torch.full((n,), 4), torch.arange(n)])
    edges = {"other": torch.cat([star, star.flip(0)[:, 5:]], 1), "a": graph.edge_index("a")}
    return cut(MultiGraph.from_edge_index(edges, n, edge_weight={"a": graph.weight("a")}).extend(1), longest)


def _bce(
    dtype: torch.dtype, lead: tuple[int, ...], n: int, d: int, rows: list[int] | None, link: str, size: float = 1,
    graph: MultiGraph | None = None, *, heavy: float = 0,
) -> Shape:  # fmt: skip
    """`heavy`: how much of each row is with the first gene: of 70 genes a quarter, more or less, with 8, and half with 11."""
    graph = graph or random_graph(n, {"other": 7, "a": 4 * n}, weighted=True).extend(1)
    options: dict[str, Any] = {"num_prefix": 1, "reduction": "none", "link": link}
    options["rows"] = None if rows is None else torch.tensor(rows)
    q, k = drawn(dtype, (*lead, n + 2, d), (*lead, n + 2, d))
    if heavy:
        q[..., 0], k[..., 1, 0] = 2, heavy
    return both(lambda module: lambda q, k: module.attention_bce(q, k, graph, "a", **options), [size * q, k], parts=True)


def _large_bce(
    dtype: torch.dtype, lead: tuple[int, ...], n: int, d: int, rows: list[int] | None, negatives: int | None, size: float = 3
) -> Shape:  # fmt: skip
    """Rows of scores of 2^20 and what makes them differ, some of them sharp, with hubs among them; and rows of small scores."""
    graph, scale = _hubs(n, 2, 30), d**-0.5
    options: dict[str, Any] = {"rows": None if rows is None else torch.tensor(rows), "num_prefix": 1}
    q, k = drawn(dtype, (*lead, n + 2, d), (*lead, n + 2, d))
    q[..., 1::2, :] *= size

    def of(module: Any) -> Callable[..., Any]:
        return lambda q, k: module.attention_bce(q, k, graph, "a", scale=scale, reduction="none", **options)

    op, definition = of(cellattn), of(reference)
    if negatives is not None:
        op, definition = with_drawn_negatives(graph, "a", options["rows"], negatives, link="softmax", num_prefix=1, scale=scale)
    return Shape(of_large_scores(op, 2.0**20, scale), definition, [q, k], parts=True)


def _hubs_bce(dtype: torch.dtype, lead: tuple[int, ...], n: int, d: int, size: float = 1) -> Shape:
    """Every row by the sigmoid link, of which the first has every gene."""
    graph = _weighted(n, 3, n).extend(1)
    options: dict[str, Any] = {"num_prefix": 1, "reduction": "none", "link": "sigmoid"}
    q, k = drawn(dtype, (*lead, n + 2, d), (*lead, n + 2, d))
    return both(lambda module: lambda q, k: module.attention_bce(q, k, graph, "a", **options), [size * q, k], parts=True)


def _edges_as_bits(n: int, rows: list[int] | None, shift: int) -> Shape:
    """More words than a program of the kernel makes, which take more genes than a dense map has room for."""
    from cellattn.kernels.attention_bce import _Problem

    graph, chosen = _weighted(n, 1, n - 40), None if rows is None else torch.tensor(rows)
    (x,) = drawn(FP32, (1,))
    rowptr, col = graph.rowptr("a"), graph.col("a")
    kept = torch.arange(3) if chosen is None else chosen  # of all rows, the first: one program makes words of one

    def dense(x: Tensor) -> Tensor:
        bits = x.new_zeros(kept.numel(), 64 * ((shift + n + 63) // 64))
        for i, gene in enumerate(kept.tolist()):
            bits[i, shift + col[rowptr[gene] : rowptr[gene + 1]].long()] = 1
        return bits + x

    def op(x: Tensor) -> Tensor:
        problem = SimpleNamespace(q=x, rowptr=rowptr, col=col, rows=chosen, relation=0, num_rows=kept.numel(), num_genes=n)
        words = _Problem.edges(cast(_Problem, problem), shift)
        return (words[..., None] >> torch.arange(32) & 1).flatten(1).to(x.dtype) + x

    return Shape(op, dense, [x])


def _drawn_bce(
    dtype: torch.dtype, n: int, d: int, count: int, link: str, size: float = 1, rows: list[int] | None = None,
    graph: MultiGraph | None = None,
) -> Shape:  # fmt: skip
    graph = graph or random_graph(n, {"other": 7, "a": 4 * n}, weighted=True).extend(1)
    q, k = drawn(dtype, (n + 2, d), (n + 2, d))
    chosen = None if rows is None else torch.tensor(rows)
    op, definition = with_drawn_negatives(graph, "a", chosen, count, link=link, num_prefix=1)
    return Shape(op, definition, [size * q, k], parts=True)


def _two_relations(n: int) -> MultiGraph:
    return random_graph(n, {"a": 8 * n, "b": n}, weighted=True)


def _edge_attention(
    dtype: torch.dtype, lead: tuple[int, ...], graph: MultiGraph, d: int, dv: int, size: float = 1, *, biased: bool = True,
    dropped: bool = False, **options: Any,
) -> Shape:  # fmt: skip
    """Two heads, the second of which two ties share; the first tie is of the graph's first relation."""
    first, second = graph.relations
    heads, tokens = [(first, 0), (second, 1), (first, 1)], options["num_prefix"] + graph.num_nodes
    q, k, v = drawn(dtype, (*lead, 2, tokens, d), (*lead, 2, tokens, d), (*lead, 2, tokens, dv))
    inputs = [size * q, k, v, *(drawn(FP32, (3,), seed=1) if biased else ())]

    def of(module: Any) -> Callable[..., Any]:
        return lambda q, k, v, bias=None: module.edge_attention(
            q, k, v, graph, heads, edge_bias=bias, **options, **dropout() if dropped else {}
        )

    return both(of, inputs, parts=True)


def _large_edges(lead: tuple[int, ...], graph: MultiGraph, d: int, dv: int, **options: Any) -> Shape:
    """As `_edge_attention`, in float32; every third row has scores of millions, which its gradients are made again for."""
    shape = _edge_attention(FP32, lead, graph, d, dv, **options)
    shape.inputs[0][..., ::3, :] *= 3e6

    def ratios(got: Sequence[Tensor], upstream: Sequence[Tensor]) -> Sequence[float]:
        """Of (8 + log2 100) roundings of P, and as many of dP and of delta, against the largest gradient."""
        given = [x.double().requires_grad_() for x in shape.inputs]
        outputs = shape.definition(*given)
        want = torch.autograd.grad(outputs, given, [x.double() for x in upstream])
        return [float((a.double() - b).abs().max() / (2e-6 * b.abs().max())) for a, b in zip(got, want, strict=True)]

    return replace(shape, ratios=ratios)


# --------------------------------------------------------------------------------------------------------- whole graphs


def _masked_spmm(dtype: torch.dtype, n: int, f: int, num_sets: int, shared: bool, share: float) -> Shape:
    graph, g = _weighted(n, 5, n), torch.Generator().manual_seed(1)
    keep = torch.rand(num_sets, n, generator=g) < share
    x, w = drawn(dtype, (n, f) if shared else (num_sets, n, f), (graph.num_edges("a"),))
    return both(lambda module: lambda x, w: module.masked_spmm(graph, "a", x, keep, edge_weight=w, reduce="mean"), [x, w])


def _relational_spmm(dtype: torch.dtype, n: int, f: int, num_sets: int, each: bool, total: bool) -> Shape:
    graph, ragged = _three(n, 3), [x.clone() for x in between(num_sets, n)]
    (x,) = drawn(dtype, (ragged[0].numel(), 3, f) if each else (ragged[0].numel(), f))
    scale = torch.rand(ragged[2].numel(), 3, generator=torch.Generator().manual_seed(0))
    return both(lambda m: lambda x: m.relational_spmm(graph, x, *ragged, scale=scale, sum_relations=total, shared=False), [x])


def _relational_degree(n: int, num_sets: int) -> Shape:
    graph, ragged = _three(n, 3), [x.clone() for x in between(num_sets, n)]
    (x,) = drawn(FP32, (1,))
    return both(lambda module: lambda x: module.relational_degree(graph, *ragged).to(x.dtype) + x, [x])


def _perturbation(dtype: torch.dtype, lead: tuple[int, ...], sets: list[list[int]], n: int, d: int, dv: int) -> Shape:
    from ..interpreter.test_perturbation_attention import correction, ragged

    index, ptr = ragged(sets)
    b, nnz = ptr.numel() - 1, index.numel()
    query, key, value, override = drawn(dtype, (*lead, b, d), (*lead, n, d), (*lead, n, dv), (*lead, nnz, dv))
    (lse,) = drawn(FP32, (*lead, b))
    lse = 2 + 0.3 * d**0.5 + lse.abs()

    def op(query: Tensor, key: Tensor, value: Tensor, lse: Tensor, override: Tensor) -> Tensor:
        z: Tensor = torch.ops.cellattn.perturbation_correction(query, key, value, lse, index, ptr, override, 0.4)
        return z

    return Shape(op, functools.partial(correction, index=index, ptr=ptr), [query, key, value, lse, override])


def _set_sum(dtype: torch.dtype, sizes: list[int], width: int) -> Shape:
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    (x,) = drawn(dtype, (int(ptr[-1]), width))
    sample = torch.arange(len(sizes)).repeat_interleave(ptr.diff())
    return Shape(
        lambda x: torch.ops.cellattn.set_sum(x, ptr),
        lambda x: x.new_zeros(len(sizes), width).index_add(0, sample, x),
        [x],
    )


def _khop(op: Callable[..., Any], seed: int, edges: list[int], n: int, num_sets: int, *arguments: Any, **options: Any) -> Shape:
    """Of the extension: a graph, sets of its genes, and what comes behind them."""
    from ..compiled.test_khop import tensors_of
    from ..ops.sets import problem

    p = problem(seed, n, edges, num_sets)

    def call() -> list[Tensor]:
        return tensors_of(op(*p, *arguments, **options))

    return Shape(call, call, [], exact=True)


def _mask_and_words(num_sets: int, n: int) -> Shape:
    keep = torch.rand(num_sets, n, generator=torch.Generator().manual_seed(0)) < 0.3

    def call() -> list[Tensor]:
        words = torch.ops.cellattn.pack_words(keep)
        return [words, torch.ops.cellattn.unpack_words(words, num_sets)]

    return Shape(call, call, [], exact=True)


_SETS = [[[1, 5], [0], [29, 3, 7]], [[2, i] for i in range(3, 30)], [[], list(range(30)), [4]]]

SUBJECTS = [
    Subject("attention", "bf16, D 32", 80, [
        lambda: _attention(BF16, (), 70, 195, 32, 32), lambda: _attention(BF16, (2,), 195, 67, 32, 32),
        lambda: _attention(BF16, (), 59, 188, 32, 32), lambda: _large(BF16, (2,), 75, 138, 32, 32),
    ]),
    Subject("attention", "bf16, D 20, DV 36", 80, [
        lambda: _attention(BF16, (), 70, 195, 20, 36), lambda: _attention(BF16, (2,), 195, 67, 20, 36),
        lambda: _attention(BF16, (), 59, 188, 20, 36), lambda: _large(BF16, (2,), 75, 138, 20, 36),
    ]),
    Subject("attention", "bf16, D 64", 90, [
        lambda: _attention(BF16, (), 70, 195, 64, 64), lambda: _attention(BF16, (2,), 195, 67, 64, 64),
        lambda: _attention(BF16, (), 59, 188, 64, 64), lambda: _large(BF16, (2,), 75, 138, 64, 64),
    ]),
    Subject("attention", "fp32, D 20", 80, [
        lambda: _attention(FP32, (), 70, 101, 20, 20), lambda: _attention(FP32, (2,), 94, 62, 20, 20),
        lambda: _large(FP32, (2,), 75, 138, 20, 20),
    ]),
    Subject("attention", "few queries, bf16, D 20", 80, [
        lambda: _attention(BF16, (), 28, 1100, 20, 20), lambda: _attention(BF16, (3,), 12, 700, 20, 20),
        lambda: _attention(BF16, (5,), 24, 604, 20, 20, 5), lambda: _large(BF16, (3,), 12, 604, 20, 20),
        lambda: _attention(BF16, (3,), 12, 700, 20, 20, heavy=24),
    ]),
    Subject("attention", "masked keys, bf16, D 20", 80, [
        lambda: _masked(BF16, (2,), 70, 198, 20), lambda: _masked(BF16, (2,), 198, 66, 20),
        lambda: _masked(BF16, (2,), 60, 188, 20), lambda: _large(BF16, (2,), 75, 138, 20, 1, masked=True),
    ]),
    Subject("attention", "dropout, bf16, D 20", 80, [
        lambda: _attention(BF16, (), 70, 195, 20, 20, dropped=True),
        lambda: _attention(BF16, (2,), 195, 67, 20, 20, 0, dropped=True),
        lambda: _attention(BF16, (), 59, 188, 20, 20, 3, dropped=True),
        lambda: _attention(BF16, (), 59, 60, 20, 20, 0, dropped=True),
        lambda: _large(BF16, (2,), 75, 138, 20, 20, dropped=True),
    ], DROPOUT),
    Subject("attention", "dropout, fp32, D 20", 80, [
        lambda: _attention(FP32, (), 70, 101, 20, 20, dropped=True),
        lambda: _attention(FP32, (2,), 94, 62, 20, 20, 0, dropped=True),
        lambda: _large(FP32, (2,), 75, 138, 20, 20, dropped=True),
    ], DROPOUT),
    Subject("attention", "dropout, bf16, D 64", 90, [
        lambda: _attention(BF16, (), 70, 195, 64, 64, dropped=True),
        lambda: _attention(BF16, (2,), 195, 67, 64, 64, 0, dropped=True),
        lambda: _large(BF16, (2,), 75, 138, 64, 64, dropped=True),
    ], DROPOUT),
    Subject("row_dot", "bf16, D 20", 80, [
        lambda: _kl(BF16, (2,), 63, 20, None, 63), lambda: _kl(BF16, (), 150, 20, None, 7),
        lambda: _ties(BF16, (2,), _three(70, 20), 20, None), lambda: _ties(BF16, (2,), cut(_three(90), 5), 20, None),
        lambda: _ties(BF16, (), cut(_three(280), 150), 20, None),
    ]),
    Subject("row_dot", "chosen rows, bf16, D 20", 80, [
        lambda: _kl(BF16, (2,), 63, 20, [4, 4, 0, 4, 60, 2], 63),
        lambda: _ties(BF16, (2,), _three(70, 20), 20, [[9, 9, 0], None, [69, 2, 0, 9]]),
        lambda: _ties(BF16, (2,), cut(_three(90), 5), 20, [[0, 5, 0], None, [9, 0, 3]]),
        lambda: _ties(BF16, (), cut(_three(280), 150), 20, [[5, 0, 9, 9], None, [0]]),
    ]),
    Subject("bit_sum", "bf16, D 20", 80, [
        lambda: _bit_sum(BF16, (), 63, 20, None), lambda: _bit_sum(BF16, (), 140, 20, None),
        lambda: _bit_sum(BF16, (), 600, 20, None), lambda: _bit_sum(BF16, (), 140, 20, None, wild=True),
    ]),
    Subject("bit_sum", "chosen rows, fp32, D 20", 80, [
        lambda: _bit_sum(FP32, (3,), 70, 20, [69, 0, 3, 3]), lambda: _bit_sum(FP32, (3,), 300, 20, [*range(200), 5, 299]),
        lambda: _bit_sum(FP32, (3,), 70, 20, [69, 0, 3, 3], wild=True),
        lambda: _bit_sum(FP32, (3,), 150, 20, [*range(149, -1, -1)], one=True),
    ]),
    Subject("attention_bce", "bf16, D 20, softmax", 80, [
        lambda: _bce(BF16, (), 70, 20, None, "softmax", 3), lambda: _bce(BF16, (2,), 150, 20, None, "softmax"),
        lambda: _bce(BF16, (), 133, 20, None, "softmax", 20),
        lambda: _bce(BF16, (3,), 70, 20, None, "softmax", 6),
        lambda: _bce(BF16, (2,), 70, 20, None, "softmax", 1, _weighted(70, 1, 70).extend(1), heavy=8),
        lambda: _bce(BF16, (2,), 70, 20, None, "softmax", 1, _weighted(70, 1, 70).extend(1), heavy=11),
    ]),
    Subject("attention_bce", "chosen rows, bf16, D 32, sigmoid", 80, [
        lambda: _bce(BF16, (), 70, 32, [3, 0, 17, 17, 69], "sigmoid"),
        lambda: _bce(BF16, (2,), 133, 32, [5] * 3 + [*range(70)], "sigmoid"),
        lambda: _edges_as_bits(8300, [2, 0, 8299, 1], 1), lambda: _edges_as_bits(16500, [2, 0, 8299], 0),
    ]),
    Subject("attention_bce", "hubs, fp32, D 20, sigmoid", 80, [
        lambda: _hubs_bce(FP32, (), 70, 20), lambda: _hubs_bce(FP32, (2,), 133, 20, 6),
        lambda: _edges_as_bits(8300, None, 1), lambda: _edges_as_bits(16500, None, 0),
    ]),
    Subject("attention_bce", "drawn negatives, bf16, D 20", 80, [
        lambda: _drawn_bce(BF16, 151, 20, 9, "softmax", 3), lambda: _drawn_bce(BF16, 133, 20, 37, "softmax", 20),
    ]),
    Subject("attention_bce", "hubs, bf16, D 20, softmax", 80, [
        lambda: _bce(BF16, (2,), 90, 20, None, "softmax", 3, _hubs(90, 9, 5)),
        lambda: _bce(BF16, (), 150, 20, None, "softmax", 6, _hubs(150, 5, 80)),
        lambda: _bce(BF16, (), 140, 20, None, "softmax", 3, _hubs(140, 1, 80)),
        lambda: _bce(BF16, (6,), 70, 20, None, "softmax", 1, _hubs(70, 3, 5), heavy=11),
    ]),
    Subject("attention_bce", "hubs, fp32, D 20, softmax", 80, [
        lambda: _bce(FP32, (2,), 90, 20, None, "softmax", 3, _hubs(90, 9, 5)),
        lambda: _bce(FP32, (), 140, 20, None, "softmax", 6, _hubs(140, 1, 80)),
        lambda: _bce(FP32, (6,), 70, 20, None, "softmax", 1, _hubs(70, 3, 5), heavy=11),
    ]),
    Subject("attention_bce", "hubs, chosen rows, drawn negatives, bf16, D 20", 80, [
        lambda: _drawn_bce(BF16, 90, 20, 9, "softmax", 3, [5, 0, 2, 0, 89, 7], _hubs(90, 9, 5)),
        lambda: _drawn_bce(BF16, 150, 20, 3, "softmax", 6, [1, 1, *range(140, 2, -1), 0, 4], _hubs(150, 5, 80)),
        lambda: _drawn_bce(BF16, 140, 20, 3, "softmax", 1, [*range(139, -1, -1)], _hubs(140, 1, 80)),
    ]),
    Subject("attention_bce", "large scores, fp32, D 19", 80, [
        lambda: _large_bce(FP32, (2,), 45, 19, None, None), lambda: _large_bce(FP32, (), 77, 19, None, None, 1),
    ]),
    Subject("attention_bce", "large scores, chosen rows, drawn negatives, fp32, D 19", 80, [
        lambda: _large_bce(FP32, (2,), 45, 19, [5, 0, 2, 0, 44, *range(6, 20)], 40),
        lambda: _large_bce(FP32, (), 45, 19, [*range(44, 0, -1), *range(30)], 9, 1),
    ]),
    Subject("edge_attention", "bf16, D 20, DV 36", 80, [
        lambda: _edge_attention(BF16, (), _two_relations(25), 20, 36, 3, num_prefix=1, weighted=True),
        lambda: _edge_attention(BF16, (2,), _two_relations(40), 20, 36, num_prefix=19, weighted=True),
        lambda: _edge_attention(BF16, (), _weighted(50, 3, 50), 20, 36, 3, num_prefix=0, weighted=True),
    ]),
    Subject("edge_attention", "alone, fp32, D 7", 80, [
        lambda: _edge_attention(FP32, (), _weighted(75, 3, 75), 7, 7, 3, biased=False, num_prefix=1, self_loops=False),
        lambda: _edge_attention(FP32, (2,), _two_relations(40), 7, 7, biased=False, num_prefix=35, self_loops=False),
        lambda: _large_edges((2,), _two_relations(25), 7, 7, biased=False, num_prefix=50, self_loops=False),
        lambda: _large_edges((), _weighted(75, 3, 75), 7, 7, biased=False, num_prefix=1, self_loops=False),
    ]),
    Subject("edge_attention", "hubs, bf16, D 20", 80, [
        lambda: _edge_attention(BF16, (), cut(_weighted(100, 30, 100), 40), 20, 20, 3, num_prefix=1, weighted=True),
        lambda: _edge_attention(BF16, (2,), cut(_weighted(90, 9, 90), 5), 20, 20, num_prefix=2, weighted=True),
    ]),
    Subject("edge_attention", "dropout, bf16, D 20", 80, [
        lambda: _edge_attention(BF16, (), _two_relations(25), 20, 20, 3, dropped=True, num_prefix=1, weighted=True),
        lambda: _edge_attention(BF16, (2,), _two_relations(40), 20, 20, dropped=True, num_prefix=19, weighted=True),
        lambda: _edge_attention(BF16, (), _weighted(75, 3, 75), 20, 20, 0, dropped=True, num_prefix=0, weighted=True),
    ], DROPOUT),
    Subject("edge_attention", "dropout, hubs, fp32, D 7", 80, [
        lambda: _edge_attention(FP32, (), cut(_weighted(100, 30, 100), 40), 7, 7, 3, dropped=True, num_prefix=1),
        lambda: _edge_attention(FP32, (2,), cut(_weighted(90, 9, 90), 5), 7, 7, dropped=True, num_prefix=35),
        lambda: _edge_attention(FP32, (2,), _two_relations(40), 7, 7, dropped=True, num_prefix=2),
        lambda: _large_edges((2,), _two_relations(25), 7, 7, dropped=True, num_prefix=50),
        lambda: _large_edges((), _weighted(75, 3, 75), 7, 7, dropped=True, num_prefix=1),
    ], DROPOUT),
    Subject("masked_spmm", "bf16, F 20", 80, [
        lambda: _masked_spmm(BF16, 20, 20, 28, False, 0.8), lambda: _masked_spmm(BF16, 150, 20, 33, False, 0.3),
    ]),
    Subject("masked_spmm", "shared x, bf16, F 20", 80, [
        lambda: _masked_spmm(BF16, 20, 20, 28, True, 0.8), lambda: _masked_spmm(BF16, 150, 20, 65, True, 0.3),
    ]),
    Subject("relational_spmm", "bf16, F 20", 80, [
        lambda: _relational_spmm(BF16, 150, 20, 4, True, True), lambda: _relational_spmm(BF16, 75, 20, 5, True, True),
    ]),
    Subject("relational_spmm", "one x, each relation, bf16, F 64", 80, [
        lambda: _relational_spmm(BF16, 101, 64, 4, False, False), lambda: _relational_spmm(BF16, 75, 64, 5, False, False),
    ]),
    Subject("relational_spmm", "degree", 80, [lambda: _relational_degree(150, 4), lambda: _relational_degree(75, 5)]),
    Subject("perturbation_attention", "bf16, D 20", 80, [
        *(functools.partial(_perturbation, BF16, (2,), sets, 30, 20, 20) for sets in _SETS),
    ]),
    Subject("set_sum", "bf16, F 20", 80, [
        lambda: _set_sum(BF16, [2, 1, 3], 20), lambda: _set_sum(BF16, [0, 41, 0, 7], 20), lambda: _set_sum(BF16, [300, 3], 20),
    ]),
    Subject("khop", "masks", 80, [
        lambda: _mask_and_words(65, 101), lambda: _khop(cellattn.perturbation_mask, 2, [127, 0, 200], 40, 65, packed=True),
        lambda: _khop(cellattn.khop_mask, 1, [127, 0, 200], 40, 28, 2, traversal="mixed"),
        lambda: _khop(cellattn.khop_mask, 1, [5, 9000], 64, 130, 5, packed=True),
    ]),
    Subject("khop", "int64, COO", 80, [
        lambda: _khop(cellattn.khop_subgraph, 3, [127, 0, 200], 40, 28, 2, return_edge_id=True),
        lambda: _khop(cellattn.khop_subgraph, 3, [127, 0, 200], 40, 65, 1, drop_seeds=True),
    ]),
    Subject("khop", "int32, CSR", 80, [
        lambda: _khop(cellattn.khop_subgraph, 3, [127, 0, 200], 40, 28, 2, index_dtype=torch.int32, layout="csr"),
        lambda: _khop(
            cellattn.khop_subgraph, 6, [500, 0, 2000], 64, 65, 1, index_dtype=torch.int32, layout="csr", return_edge_id=True
        ),
    ]),
]  # fmt: skip
