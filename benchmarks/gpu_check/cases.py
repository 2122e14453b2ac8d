"""Every op, gradients included, at the size of a cell, with its definition beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference
from cellattn.graph import SEGMENT
from cellattn.nn.wildtype import Subset

from ..attention.problems import SharedTerms

GENES = 6607
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """An op on `inputs` (shapes); `exact` is the same op of `cellattn.reference`, None where it draws at random."""

    name: str
    inputs: tuple[tuple[int, ...], ...]
    ours: Callable[..., tuple[Tensor, ...]]
    exact: Callable[..., tuple[Tensor, ...]] | None


def cell(num_nodes: int, *, device: torch.device, seed: int = 0) -> MultiGraph:
    """Two relations whose degrees are heavy-tailed, each with rows that have no edge: 60 and 2 edges a gene in the mean.

    Of 6,607 genes the "dense" one has 27 rows and 26 columns that `row_dot` cuts.
    """
    g = torch.Generator().manual_seed(seed)
    popularity = torch.rand(num_nodes, generator=g).add(1e-3).reciprocal()
    popularity[torch.randperm(num_nodes, generator=g)[: num_nodes // 10]] = 0
    edges = {
        name: torch.multinomial(popularity, 2 * mean * num_nodes, replacement=True, generator=g).reshape(2, -1)
        for name, mean in (("dense", 60), ("sparse", 2))
    }
    return MultiGraph.from_edge_index(edges, num_nodes).to(device)


def both(name: str, *inputs: tuple[int, ...], f: Callable[..., Any]) -> Case:
    """f(module, *inputs) of `cellattn` and of `cellattn.reference`."""

    def of(module: Any) -> Callable[..., tuple[Tensor, ...]]:
        def run(*x: Tensor) -> tuple[Tensor, ...]:
            y = f(module, *x)
            return y if isinstance(y, tuple) else (y,)

        return run

    return Case(name, inputs, of(cellattn), of(reference))


def cases(graph: MultiGraph) -> Iterator[Case]:
    """Every op, at the graph's size."""
    n, device = graph.num_nodes, graph.device
    t = n + 1
    rows = torch.arange(0, n, 10, device=device)
    ties = [("dense", 0), ("sparse", 1), ("dense", 1)]

    for d in (20, 64):
        head = ((2, t, d),) * 2
        yield both(f"attention D{d}", *head, (2, t, d), f=lambda m, q, k, v: m.attention(q, k, v))
        yield both(f"attention_logsumexp D{d}", *head, f=lambda m, q, k: m.attention_logsumexp(q, k))
    yield both("attention D20, dropout", *((2, t, 20),) * 3, f=lambda m, q, k, v: m.attention(q, k, v, dropout_p=0.25))
    pair = ((t, 20),) * 2
    yield both("attention D100 Dv30", (1, t, 100), (1, t, 100), (1, t, 30), f=lambda m, q, k, v: m.attention(q, k, v))
    yield both("attention_kl", *pair, f=lambda m, q, k: m.attention_kl(q, k, graph, "dense", num_prefix=1))
    yield both("attention_kl rows", *pair, f=lambda m, q, k: m.attention_kl(q, k, graph, "sparse", num_prefix=1, rows=rows))
    hubs = torch.cat([graph.degree("dense").argsort(descending=True, stable=True)[:40], rows])
    yield both(
        "attention_kl rows, hubs first", *pair,
        f=lambda m, q, k: m.attention_kl(q, k, graph, "dense", num_prefix=1, rows=hubs),
    )  # fmt: skip
    yield both("attention_kl valid", *pair, f=lambda m, q, k: m.attention_kl(q, k, graph, "dense", num_prefix=1, over="valid"))
    shared = SharedTerms.draw(max(n // 2, 1), device).target
    typed = shared.graph  # half as many genes, and their terms as tokens
    wide = ((typed.num_nodes + 1, 20),) * 2
    yield both(
        "attention_kl from genes to terms", *wide,
        f=lambda m, q, k: m.attention_kl(q, k, typed, "has", num_prefix=1, over="valid"),
    )  # fmt: skip
    yield both(
        "attention_bce from genes to terms", *wide, f=lambda m, q, k: m.attention_bce(q, k, typed, "has", num_prefix=1)
    )  # fmt: skip
    yield both(
        "attention_kl_comembership", *wide, f=lambda m, q, k: m.attention_kl_comembership(q, k, shared, num_prefix=1)
    )  # fmt: skip
    of_sparse: dict[str, Any] = {"graph": graph, "relation": "sparse", "num_prefix": 1, "scale": 0.25}
    for link, target in (("softmax", "normalized"), ("softmax", "binary"), ("sigmoid", "binary")):
        yield both(
            f"attention_bce {link} {target}", *pair,
            f=lambda m, q, k, link=link, target=target: m.attention_bce(
                q, k, graph, "dense", num_prefix=1, link=link, target=target
            ),
        )  # fmt: skip
    yield Case(
        "attention_bce, scores of 2^18",
        pair,
        lambda q, k: (cellattn.attention_bce(F.pad(q, (0, 1), value=1024), F.pad(k, (0, 1), value=1024), **of_sparse),),
        lambda q, k: (reference.attention_bce(q, k, **of_sparse),),  # the same added to all of a row changes nothing
    )
    yield both("attention_bce rows", *pair, f=lambda m, q, k: m.attention_bce(q, k, graph, "sparse", num_prefix=1, rows=rows))
    yield Case(
        "attention_bce drawn",
        pair,
        lambda q, k: (cellattn.attention_bce(q, k, graph, "dense", num_prefix=1, num_negatives=20),),
        None,
    )
    yield both(
        "graph_attention, three ties", *((2, t, 20),) * 3,
        f=lambda m, q, k, v: (lambda out, losses: (out, *losses))(*m.graph_attention(q, k, v, graph, ties)),
    )  # fmt: skip
    sets, size = 64, 3
    g = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(n, generator=g)[:size] for _ in range(sets)]).flatten().to(device)
    ptr = size * torch.arange(sets + 1, device=device)
    yield both(
        "perturbation_attention", (sets, 64), (n, 64), (n, 64), (sets * size, 64),
        f=lambda m, q, k, v, u: m.perturbation_attention(q, k, v, index, ptr, u, scale=0.125),
    )  # fmt: skip

    keep = torch.rand(sets, n, generator=g).to(device) < 0.6
    for reduce, shape in (("sum", (n, 64)), ("mean", (sets, n, 20))):
        yield both(
            f"masked_spmm {reduce}", shape,
            f=lambda m, x, reduce=reduce: m.masked_spmm(graph, "dense", x, keep, reduce=reduce),
        )  # fmt: skip
    few = torch.zeros_like(keep[:4])
    few[torch.arange(len(index), device=device) % len(few), index] = True
    between = tuple(x for subset in Subset.of(few, keep[: len(few)]) for x in subset.genes)
    places = int(few.sum())
    scale = torch.rand(int(keep[: len(few)].sum()), 2, generator=g).to(device)
    yield both(
        "relational_spmm", (places, 2, 20),
        f=lambda m, x: m.relational_spmm(graph, x, *between, scale=scale),
    )  # fmt: skip
    yield both(
        "relational_spmm, shared, by relation", (n, 64),
        f=lambda m, x: m.relational_spmm(graph, x, *between, sum_relations=False, shared=True),
    )  # fmt: skip
    yield both(
        "network_mse", (n, 64), (n, 64), (n,),
        f=lambda m, z, weight, bias: m.network_mse(z, weight, bias, graph, "dense"),
    )  # fmt: skip


def hub_cases(device: torch.device) -> Iterator[Case]:
    """A row and a column just long enough to be cut, in a small graph; of losses the row chosen, left out, with all."""
    everyone = torch.arange(SEGMENT + 1)
    hub = torch.stack([torch.zeros_like(everyone), everyone])
    graph = MultiGraph.from_edge_index({"hub": hub}, everyone.numel(), undirected=True).to(device)
    pair = ((everyone.numel() + 1, 20),) * 2
    for name, chosen in (("chosen", torch.tensor([3, 0, 0])), ("left out", torch.tensor([3, 4])), ("with all", None)):
        rows = None if chosen is None else chosen.to(device)
        yield both(
            f"attention_kl, a hub {name}", *pair,
            f=lambda m, q, k, rows=rows: m.attention_kl(q, k, graph, "hub", num_prefix=1, rows=rows),
        )  # fmt: skip
    # few values: the definition holds those of all pairs
    one = tuple((1, everyone.numel() + 1, width) for width in (20, 20, 2))
    for name, dropout_p in (("edge_attention, a hub", 0.0), ("edge_attention, a hub, dropout", 0.25)):
        yield both(
            name, *one, (1,),
            f=lambda m, q, k, v, bias, dropout_p=dropout_p: m.edge_attention(
                q, k, v, graph, [("hub", 0)], edge_bias=bias, weighted=True, dropout_p=dropout_p
            ),
        )  # fmt: skip


def packed_cases(device: torch.device) -> Iterator[Case]:
    """A quarter of all pairs, which are bits; rows that none, one and three of the chosen are."""
    n = 1000
    index = (torch.rand(n, n, generator=torch.Generator().manual_seed(3)) < 0.25).nonzero().t()
    graph = MultiGraph.from_edge_index({"packed": index}, n).to(device)
    pair = ((2, n + 1, 20),) * 2
    for name, rows in (("all rows", None), ("chosen rows", torch.tensor([3, 0, 0, 999, 0], device=device))):
        yield both(
            f"attention_kl over bits, {name}", *pair,
            f=lambda m, q, k, rows=rows: m.attention_kl(q, k, graph, "packed", num_prefix=1, rows=rows),
        )  # fmt: skip


def all_cases(graph: MultiGraph) -> list[Case]:
    return [*cases(graph), *hub_cases(graph.device), *packed_cases(graph.device)]


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=g).to(device, dtype) for shape in case.inputs]
