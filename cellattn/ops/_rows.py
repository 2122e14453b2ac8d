"""What the losses share: which rows they run over, the log-sum-exp of a row, and how row values are reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._check import describe, require, require_choice, require_count, require_indices, require_same, require_tensor
from ..graph import MultiGraph
from .attention import accumulation_dtype, attention_logsumexp, check_qk

OVER = ("tokens", "valid")
REDUCTIONS = ("mean", "sum", "none")


def check_graph(graph: Any, q: Tensor, num_prefix: int) -> None:
    """Check that the tokens of q are num_prefix prefix tokens and the graph's genes."""
    if not isinstance(graph, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph, got {describe(graph)}")
    require_same("device", q=q.device, graph=graph.device)
    require_count("num_prefix", num_prefix)
    require(
        q.shape[-2] == num_prefix + graph.num_nodes,
        lambda: (
            f"q: expected {num_prefix} prefix tokens + {graph.num_nodes} genes = {num_prefix + graph.num_nodes} tokens, "
            f"got shape {list(q.shape)}"
        ),
    )


def check_head(q: Tensor, k: Tensor, graph: Any, num_prefix: int, lse: Tensor | None, reduction: str) -> None:
    """Check what a loss of one head takes: q and k [..., T, D] over the same tokens, lse [..., T]."""
    check_qk(q, k)
    require(q.shape == k.shape, lambda: f"k: expected the shape of q, {list(q.shape)}, got {list(k.shape)}")
    check_graph(graph, q, num_prefix)
    require_choice("reduction", reduction, REDUCTIONS)
    if lse is not None:
        require_tensor("lse", lse, dtypes=(accumulation_dtype(q.dtype),))
        require_same("device", q=q.device, lse=lse.device)
        require(lse.shape == q.shape[:-1], lambda: f"lse: expected shape {list(q.shape[:-1])}, got {list(lse.shape)}")


def check_rows(name: str, rows: Any, graph: MultiGraph) -> Tensor | None:
    """A checked int64 index of genes; None stands for all of them in order."""
    if rows is None:
        return None
    require_tensor(name, rows, ndim=1, dtypes=(torch.int64, torch.int32))
    require_same("device", graph=graph.device, **{name: rows.device})
    require_indices(name, rows, graph.num_nodes)
    return rows.long()


def rows_of_ties(
    rows: Tensor | Mapping[str, Tensor | None] | None, relations: Sequence[str], graph: MultiGraph
) -> list[Tensor | None]:
    """The rows of each tie: one index for all, or one by relation (all rows for a relation that is not named)."""
    if not isinstance(rows, Mapping):
        return [check_rows("rows", rows, graph)] * len(relations)
    for name in rows:
        graph.relation_id(name)
    checked = {name: check_rows(f"rows[{name!r}]", value, graph) for name, value in rows.items()}
    return [checked.get(name) for name in relations]


def take(x: Tensor, dim: int, rows: Tensor | None, num_prefix: int) -> Tensor:
    """The genes `rows` (all if None) along a dimension of tokens."""
    genes = x.narrow(dim, num_prefix, x.shape[dim] - num_prefix)
    return genes if rows is None else genes.index_select(dim, rows)


def row_logsumexp(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    known: Tensor,
    rows: Tensor | None,
    *,
    num_prefix: int,
    scale: float,
    over: str,
) -> Tensor:
    """Log of the denominators of the chosen rows: over all tokens, or over the known genes; q, k [..., T, D] -> [..., R]."""
    if over == "tokens" and lse is not None:
        return take(lse, -1, rows, num_prefix)
    queries = take(q, -2, rows, num_prefix)
    if over == "tokens":
        return attention_logsumexp(queries, k, scale=scale)
    return attention_logsumexp(queries, take(k, -2, None, num_prefix), key_mask=known, scale=scale)


def row_constants(graph: MultiGraph, relation: str, rows: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(1 / mass, sum_j t_ij log t_ij, whether the row has an edge) of the chosen rows, each [R]."""
    first = graph.relation_id(relation) * graph.num_nodes
    inv_mass = take(graph.inv_mass.narrow(0, first, graph.num_nodes), 0, rows, 0)
    entropy = take(graph.entropy.narrow(0, first, graph.num_nodes), 0, rows, 0)
    return inv_mass.to(dtype), entropy.to(dtype), inv_mass > 0


def reduce_rows(loss: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Reduce loss [..., R]; "mean" is over the counted rows (bool [R]) and the leading dimensions, 0 where there is none."""
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    num_leading = loss.shape[:-1].numel()
    return total / (counted.sum() * num_leading).clamp_min(1)
