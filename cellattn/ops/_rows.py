"""What the losses share: which rows they run over, the log-sum-exp of a row, and how row values are reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._check import count_of, describe, require, require_choice, require_indices, require_same, require_tensor
from ..graph import MultiGraph, Targets
from ._definition import as_no_view
from ._operator import is_eager
from .attention import accumulation_dtype, attention_logsumexp, checked_heads

OVER = ("tokens", "valid")
REDUCTIONS = ("mean", "sum", "none")


def check_graph(graph: Any, q: Tensor, num_prefix: Any) -> int:
    """Check that the tokens of q are num_prefix prefix tokens and the graph's genes; gives num_prefix as Python's number."""
    if not isinstance(graph, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph, got {describe(graph)}")
    graph.require_unwritten()
    if q.device != graph.device:
        require_same("device", q=q.device, graph=graph.device)
    num_prefix = count_of("num_prefix", num_prefix)
    require(
        q.shape[-2] == num_prefix + graph.num_nodes,
        lambda: (
            f"q: expected {num_prefix} prefix tokens + {graph.num_nodes} genes = {num_prefix + graph.num_nodes} tokens, "
            f"got shape {list(q.shape)}"
        ),
    )
    return num_prefix


def check_head(
    q: Tensor, k: Tensor, graph: Any, num_prefix: Any, lse: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, int]:
    """`check_graph`, and what a loss of one head takes: q and k [..., T, D] over the same tokens, lse [..., T].

    Gives q and k of one dtype, and num_prefix as Python's number.
    """
    q, k = check_pair(q, k, lse, reduction)
    return q, k, check_graph(graph, q, num_prefix)


def check_pair(q: Tensor, k: Tensor, lse: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """The same, of any tokens."""
    q, k = checked_heads(q, k, same_tokens=True)
    require_choice("reduction", reduction, REDUCTIONS)
    if lse is not None:
        require_tensor("lse", lse, dtypes=(accumulation_dtype(q.dtype),))
        require_same("device", q=q.device, lse=lse.device)
        require(lse.shape == q.shape[:-1], lambda: f"lse: expected shape {list(q.shape[:-1])}, got {list(lse.shape)}")
    return q, k


def check_rows(name: str, rows: Any, graph: MultiGraph, num_tokens: int | None = None) -> Tensor | None:
    """A checked int64 index of genes, of all N or the first `num_tokens`; None stands for all of them in order."""
    if rows is None:
        return None
    require_tensor(name, rows, ndim=1, dtypes=(torch.int64, torch.int32))
    require_same("device", graph=graph.device, **{name: rows.device})
    require_indices(name, rows, graph.num_nodes if num_tokens is None else num_tokens)
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
    genes = x.narrow(dim, num_prefix, x.shape[dim] - num_prefix) if num_prefix else x
    if rows is None:
        return genes
    return genes.index_select(dim, rows) if genes.is_cpu else _in_order(genes, dim, rows)


def _in_order(x: Tensor, dim: int, rows: Tensor) -> Tensor:
    """index_select, whose gradient, as that of gather, adds up copies of a row by atomics on a GPU, where this one sorts."""
    unrounded = x.float() if x.dtype.itemsize == 2 else x  # a sum of 16 bits would be rounded after each copy
    return unrounded[(slice(None),) * (dim % x.ndim) + (rows,)].to(x.dtype)


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


def targets_of_ties(graph: MultiGraph, relations: Sequence[str], rows: Sequence[Tensor | None], dtype: torch.dtype) -> Targets:
    """The constants of the chosen rows of every tie, all of as many rows: [ties, R], and [ties]; for products of `row_dot`."""
    ids = [graph.relation_id(relation) for relation in relations]
    known, unit = graph.targets(dtype), graph.scaled.unit
    if unit is not None:
        known = known._replace(inv_mass=(graph.targets(torch.float64).inv_mass * unit).to(dtype))
    inv_mass, entropy, without_edge = (_rows_of_each(at(x, ids), rows) for x in known[:3])
    if rows[0] is None:
        return Targets(inv_mass, entropy, without_edge, at(known.num_counted, ids))
    return Targets(inv_mass, entropy, without_edge, without_edge.logical_not().sum(1).clamp_min(1))


def logsumexp_of_ties(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    graph: MultiGraph,
    ties: Sequence[tuple[str, int]],
    rows: Sequence[Tensor | None],
    *,
    num_prefix: int,
    scale: float,
    over: str,
) -> Tensor:
    """`row_logsumexp` of every tie, all of as many rows: q, k [..., H, T, D] -> [..., ties, R]."""
    if over == "tokens" and lse is not None:
        genes = take(lse, -1, None, num_prefix).movedim(-2, 0)
        return _rows_of_each(at(genes, [head for _, head in ties]), rows).movedim(0, -2)
    return torch.stack(
        [
            row_logsumexp(
                q[..., head, :, :], k[..., head, :, :], None, graph.known_columns(relation), index,
                num_prefix=num_prefix, scale=scale, over=over,
            )
            for (relation, head), index in zip(ties, rows, strict=True)
        ],
        -2,
    )  # fmt: skip


def at(x: Tensor, index: Sequence[int], dim: int = 0) -> Tensor:
    """x[index] along a dimension: a view where the index counts up, never by a tensor, which would come from the host."""
    if list(index) == list(range(index[0], index[0] + len(index))):
        return x.narrow(dim, index[0], len(index))
    parts = x.unbind(dim)
    return torch.stack([parts[i] for i in index], dim)


def _rows_of_each(x: Tensor, rows: Sequence[Tensor | None]) -> Tensor:
    """The chosen rows of each tie: x [ties, ..., N] -> [ties, ..., R], x itself where no tie has a choice."""
    first = rows[0]
    if all(index is first for index in rows):
        return take(x, -1, first, 0)
    if x.requires_grad and not x.is_cpu:
        return torch.stack([take(one, -1, index, 0) for one, index in zip(x.unbind(0), rows, strict=True)])
    everyone = torch.arange(x.shape[-1], device=x.device)
    index = torch.stack([everyone if index is None else index for index in rows])
    index = index.view(index.shape[0], *[1] * (x.ndim - 2), -1)
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def reduce_ties(loss: Tensor, targets: Targets, reduction: str) -> list[Tensor]:
    """`reduced` of every tie: loss [..., ties, R], one result a tie."""
    if reduction == "none":
        return separate(loss, -2)
    if reduction == "mean":  # divided first: a sum of what is finite may not be
        loss = loss / (targets.num_counted * max(loss.shape[:-2].numel(), 1))[:, None]
    return separate(loss.sum([d for d in range(loss.ndim) if d != loss.ndim - 2]), 0)


def separate(x: Tensor, dim: int) -> list[Tensor]:
    """x.unbind(dim) for a user, who may write to each (`loss /= 4`), as to no view of several; x is nobody's from then on."""
    if x.shape[dim] == 1:
        return [x.squeeze(dim)]
    parts: tuple[Tensor, ...] = _apart(x, dim) if is_eager(x) else _Separate.apply(x, dim)
    return list(parts)


def _apart(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    return tuple(map(as_no_view, x.unbind(dim)))


class _Separate(torch.autograd.Function):
    """`_apart` where there is more than the gradient; without a derivative in forward mode, which no loss has."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> tuple[Tensor, ...]:
        return _apart(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, ...]) -> None:
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.stack(grads, ctx.dim), None


def reduced(loss: Tensor, graph: MultiGraph, relation: str, rows: Tensor | None, reduction: str) -> Tensor:
    """loss [..., R] of the chosen rows; the mean is over those with an edge, divided first, as in `reduce_ties`."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    num_leading = loss.shape[:-1].numel()
    if rows is None:
        return (loss / max(graph.num_rows_with_edges(relation) * num_leading, 1)).sum()
    without_edge = graph.targets(loss.dtype).without_edge[graph.relation_id(relation)].index_select(0, rows)
    return (loss / (without_edge.logical_not().sum() * num_leading).clamp_min(1)).sum()
