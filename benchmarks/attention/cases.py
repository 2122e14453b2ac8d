"""The rows of the report: problems at the sizes at which they are measured, in suites."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cellattn import MultiGraph
from cellattn.data import synthetic_cell

from ..cells import benchmark_graph
from .problems import DroppedAttention, EdgeAttention, GraphLoss, LogSumExp, PerturbationHead, SharedTerms, TiedAttention
from .tables import CELL_SHAPES


@dataclass(frozen=True)
class Case:
    """A row: inputs of these shapes, queries first, and one of `problems.py`, which is made when its turn comes.

    `facts` go into the results as they are. A row of queries takes `row_elements` entries of the largest tensor.
    """

    suite: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    facts: dict[str, Any]
    row_elements: int
    problem: Callable[[], Any]
    peers: dict[str, Any]  # options of the problem's `peers`


@dataclass(frozen=True)
class Plan:
    """What a run measures and for how long."""

    device: torch.device
    dtype: torch.dtype
    genes: int | None = None  # of the cell; None: as published
    lengths: tuple[int, ...] = ()
    set_counts: tuple[int, ...] = (28, 256, 2048, 16384)
    seconds: float = 280.0
    seconds_each: float = 0.25  # of measured steps
    repeats: int = 50
    only: str | None = None  # the name of one implementation
    profile: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def cell(self) -> MultiGraph:
        return synthetic(self.genes or 6607, self.device)


@functools.lru_cache(maxsize=2)
def synthetic(num_genes: int, device: torch.device) -> MultiGraph:
    # Mean degrees stay those of the cell up to twice its edges; more take longer to draw than a run has.
    return synthetic_cell(0, num_genes=num_genes, edge_scale=min(num_genes / 6607, 2.0)).to(device)


@functools.cache
def any_cell(genes: int | None, device: torch.device) -> tuple[str, MultiGraph]:
    """(what it is, the graph of the suite "ops")"""
    if genes is not None:
        return f"synthetic cell of {genes:,} genes", synthetic(genes, device)
    name, graph = benchmark_graph()
    return name, graph.to(device)


# ---------------------------------------------------------------------------------------------------------------- cases


def attention_case(
    suite: str,
    name: str,
    graph: Callable[[], MultiGraph],
    tokens: int,
    shape: tuple[int, int],
    num_ties: int,
    *,
    share: float = 1.0,
    lse: bool = False,
    **peers: Any,
) -> Case:
    """Heads tied to the first relations in turn, the loss over a share of the rows."""
    heads, dim = shape

    def problem() -> TiedAttention:
        cell = graph()
        ties = tuple((relation, i % heads) for i, relation in enumerate(cell.relations[:num_ties]))
        chosen = torch.randperm(cell.num_nodes, generator=torch.Generator().manual_seed(0))[: round(share * cell.num_nodes)]
        return TiedAttention(cell, ties, None if share == 1 else chosen.sort().values.to(cell.device), lse)

    facts = {"tokens": tokens, "heads": heads, "head_dim": dim, "ties": num_ties, "rows": share}
    return Case(suite, name, ((heads, tokens, dim),) * 3, facts, heads * tokens, problem, peers)


def head_case(suite: str, name: str, num_sets: int, num_genes: int, device: torch.device, **peers: Any) -> Case:
    d = 64
    shapes = (num_sets, d), (num_genes, d), (num_genes, d), (2 * num_sets, d)
    facts = {"tokens": num_genes, "sets": num_sets, "head_dim": d}
    return Case(
        suite, name, shapes, facts, num_genes * d, lambda: PerturbationHead.draw(num_sets, num_genes, device), peers
    )  # fmt: skip


def cell_suite(plan: Plan) -> Iterator[Case]:
    """Nine relations of a cell; the rows that the targets are made of come first."""
    tokens = (plan.genes or 6607) + 1
    for shape in CELL_SHAPES:
        for ties, share in ((9, 1.0), (0, 1.0), (4, 1.0), (1, 1.0), (9, 0.1)):
            name = f"{shape[0]} heads of {shape[1]}, {ties} ties" + ("" if share == 1 else f", {share:.0%} of the rows")
            yield attention_case(
                "cell", name, plan.cell, tokens, shape, ties,
                share=share, full=ties in (0, 9), compiled=ties == 9 and share == 1,
            )  # fmt: skip


def length_suite(plan: Plan) -> Iterator[Case]:
    """Time over T. On a CPU a smaller problem, and no compilation, which would take longer than the rows."""
    shape, ties = ((9, 20), 9) if plan.on_gpu else ((2, 16), 2)
    lengths = plan.lengths or tuple(4**i for i in range(3, 9 if plan.on_gpu else 8))  # 64 to 65,536 or 16,384
    for tokens in lengths:
        graph = functools.partial(synthetic, tokens - 1, plan.device)
        name = f"T {tokens:,}, {shape[0]} heads of {shape[1]}, {ties} ties"
        yield attention_case("length", name, graph, tokens, shape, ties, compiled=plan.on_gpu, dynamic=True)


def head_suite(plan: Plan) -> Iterator[Case]:
    genes = plan.genes or 6607
    for b in plan.set_counts:
        yield head_case("head", f"{b:,} sets of 2, width 64", b, genes, plan.device, compiled=b == 256)


def ops_suite(plan: Plan) -> Iterator[Case]:
    """Every op once; the log-sum-exp is compared with the attention row."""
    heads, dim = (9, 20) if plan.on_gpu else (4, 16)
    graph = any_cell(plan.genes, plan.device)[1]
    tokens, relation = graph.num_nodes + 1, graph.relations[0]
    facts = {"tokens": tokens, "heads": heads, "head_dim": dim}
    ties = min(heads, len(graph.relations))
    yield attention_case("ops", "graph_attention", lambda: graph, tokens, (heads, dim), ties)
    yield attention_case("ops", "attention with lse", lambda: graph, tokens, (heads, dim), 0, lse=True, floors=False)
    yield Case(
        "ops", "attention_logsumexp", ((heads, tokens, dim),) * 2, facts, heads * tokens, LogSumExp, {"compiled": plan.on_gpu}
    )
    three = ((heads, tokens, dim),) * 3
    yield Case(
        "ops", "attention with lse, dropout 0.1", three, facts, heads * tokens, lambda: DroppedAttention(0.1), {}
    )  # fmt: skip
    masked = {**facts, "relation": relation}
    yield Case(
        "ops", "edge_attention", three, masked, heads * tokens,
        lambda: EdgeAttention(graph.without_self_loops(relation), relation), {"compiled": plan.on_gpu},
    )  # fmt: skip
    pair, one = ((tokens, dim),) * 2, {**facts, "heads": 1, "relation": relation}
    for name, problem in (
        ("attention_kl", GraphLoss(graph, relation, "kl")),
        ("attention_bce, every non-edge", GraphLoss(graph, relation, "bce")),
        ("attention_bce, 32 non-edges a row", GraphLoss(graph, relation, "bce", num_negatives=32)),
    ):
        yield Case("ops", name, pair, one, tokens, lambda problem=problem: problem, {})  # type: ignore[misc]
    yield Case(
        "ops", "attention_kl, a quarter of all pairs", pair, {**facts, "heads": 1}, tokens,
        lambda: GraphLoss.of_pairs(graph.num_nodes, 0.25, plan.device), {},
    )  # fmt: skip
    yield Case(
        "ops", "attention_kl_comembership", pair, {**facts, "heads": 1}, tokens,
        lambda: SharedTerms.draw(graph.num_nodes, plan.device), {},
    )  # fmt: skip
    yield head_case("ops", "perturbation_attention", 256, graph.num_nodes, plan.device)


SUITES = {"cell": cell_suite, "head": head_suite, "ops": ops_suite, "length": length_suite}
