"""Comparing an op with its dense reference, values and gradients at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cellattn
from cellattn import MultiGraph, reference
from cellattn.ops._negatives import sample_negatives, sample_negatives_of_graph

# float64 on both sides: what is left is the rounding of two orders of summation. 9 million roundings of the largest entry, more
# than any sum here has on any machine, and 100,000 times less than a formula that is wrong by one part in 10,000.
RTOL = 1e-9


def random_graph(num_nodes: int, edges: dict[str, int], *, weighted: bool = False, seed: int = 0) -> MultiGraph:
    """Unsorted, duplicated, with self-loops and rows without edges, as `edges` entries a relation are drawn at random."""
    g = torch.Generator().manual_seed(seed)
    index = {name: torch.randint(num_nodes, (2, count), generator=g) for name, count in edges.items()}
    weight = {name: torch.rand(count, generator=g) + 0.1 for name, count in edges.items()}
    return MultiGraph.from_edge_index(index, num_nodes, edge_weight=weight if weighted else None)


def typed_graph(sizes: dict[str, int], edges: dict[str, tuple[str, str, int]], *, seed: int = 0) -> MultiGraph:
    """Tokens of several types, and as many random weighted edges between two of them as a relation is given.

    In each relation that joins two types, one token of either is unknown.
    """
    g = torch.Generator().manual_seed(seed)
    ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
    at = {name: range(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
    index, weight, known = {}, {}, {}
    for name, (source, target, count) in edges.items():
        hidden = [at[source][1], at[target][-1]] if source != target else []
        known[name] = torch.ones(ends[-1], dtype=torch.bool)
        known[name][hidden] = False
        pairs = torch.stack([torch.randint(at[end].start, at[end].stop, (count,), generator=g) for end in (source, target)])
        index[name] = pairs[:, known[name][pairs].all(0)]
        weight[name] = torch.rand(index[name].shape[1], generator=g) + 0.1
    return MultiGraph.from_edge_index(
        index, ends[-1], edge_weight=weight, known=known, node_types=sizes,
        joins={name: (source, target) for name, (source, target, _) in edges.items()},
    )  # fmt: skip


def cell_with_terms(num_genes: int = 23, num_terms: int = 9) -> MultiGraph:
    """Genes and terms: edges between genes, from genes to terms, from terms to genes, and between terms."""
    return typed_graph(
        {"gene": num_genes, "term": num_terms},
        {
            "physical": ("gene", "gene", 4 * num_genes),
            "annotated": ("gene", "term", 3 * num_genes),
            "members": ("term", "gene", 3 * num_genes),
            "is_a": ("term", "term", num_terms),
        },
    )


def leaves(*shapes: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=g).to(dtype).requires_grad_() for shape in shapes]


def of_large_scores(op: Callable[..., Any], size: float, scale: float) -> Callable[..., Any]:
    """The op of q and k [..., T, D] with a column more: of six rows one gets `size` added to all of its scores, or nearly so,
    and another as much taken off. Nothing of a softmax changes.

    Exact in every dtype that holds the root of size / scale.
    """
    column = 2.0 ** round(log2(size / scale) / 2)

    def f(q: Tensor, k: Tensor) -> Any:
        sign = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, -1.0], dtype=q.dtype, device=q.device).repeat(q.shape[-2])[: q.shape[-2]]
        of_q = (column * sign)[:, None].expand(*q.shape[:-1], 1)
        return op(torch.cat([q, of_q], -1), F.pad(k, (0, 1), value=column))

    return f


def with_drawn_negatives(
    graph: MultiGraph,
    relation: str,
    rows: Tensor | None,
    count: int | float,
    *,
    link: str,
    num_prefix: int,
    scale: float | None = None,
) -> tuple[Any, Any]:
    """The op with negatives drawn, so many a row or (a float) an edge, and its definition with the same ones."""
    ratio = isinstance(count, float)
    options: dict[str, Any] = {"rows": rows, "neg_sample_ratio" if ratio else "num_negatives": count}

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    def op(q: Tensor, k: Tensor) -> Tensor:
        return cellattn.attention_bce(
            q,
            k,
            graph,
            relation,
            link=link,
            num_prefix=num_prefix,
            scale=scale,
            generator=generator(),
            reduction="none",
            **options,
        )

    genes = torch.arange(graph.num_nodes) if rows is None else rows
    if ratio:
        negatives = sample_negatives_of_graph(graph, relation, count, generator(), torch.float32)
    else:
        negatives = sample_negatives(graph, relation, rows, int(count), generator(), torch.float32)

    def definition(q: Tensor, k: Tensor) -> Tensor:
        t, edges, _ = (x[genes] for x in reference.target(graph, relation))
        scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if link == "sigmoid":
            log_a, log_1ma = F.logsigmoid(scores), F.logsigmoid(-scores)
        else:
            log_a, log_1ma = reference.log_softmax_and_complement(scores)
        log_a, log_1ma = (x[..., num_prefix:, num_prefix:][..., genes, :] for x in (log_a, log_1ma))
        weight = torch.zeros_like(t).index_put_(
            (negatives.row, negatives.gene), negatives.weight.double()[negatives.row], accumulate=True
        )
        weight = torch.where(edges, 1 - t, weight)
        bce = torch.where(edges, t * log_a, 0) + torch.where(weight > 0, weight * log_1ma, 0)
        return torch.where(edges.any(-1), -bce.sum(-1), 0)

    return op, definition


def values_and_grads(f: Callable[..., Any], *inputs: Tensor, seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of f, and the gradients of a random linear function of all outputs."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out = f(*inputs)
    outputs = list(out) if isinstance(out, tuple) else [out]
    g = torch.Generator().manual_seed(seed)
    total = sum((y.double() * torch.randn(y.shape, dtype=torch.float64, generator=g)).sum() for y in outputs if y.requires_grad)
    assert isinstance(total, Tensor), "no output requires a gradient"
    grads = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return [y.detach() for y in outputs], list(grads)


def everything(f: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Outputs and gradients in one list."""
    outputs, grads = values_and_grads(f, *inputs)
    return [*outputs, *grads]


def least_memory(f: Callable[[], Any], enough: float = 0, times: int = 5) -> int:
    """Bytes that f() takes at its peak, after a first time: the first that is below `enough`, or the least of `times`.

    A process grows beside what is measured.
    """
    from benchmarks.measure import peak_memory

    f()
    least = peak_memory(f)
    for _ in range(times - 1):
        if least < enough:
            break
        least = min(least, peak_memory(f))
    return least


def assert_same(op: Callable[..., Any], reference: Callable[..., Any], *inputs: Tensor, rtol: float = RTOL) -> None:
    """Each output and each gradient agrees, relative to its largest entry."""
    got, want = values_and_grads(op, *inputs), values_and_grads(reference, *inputs)
    for kind, ours, theirs in zip(("output", "gradient"), got, want, strict=True):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.shape == b.shape, f"{kind} {i}: shape {list(a.shape)}, expected {list(b.shape)}"
            assert a.isfinite().all(), f"{kind} {i} is not finite"
            if a.numel():
                error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-6)
                assert error <= rtol, f"{kind} {i}: relative error {error:.2e}"
