"""Attention whose heads are taught graphs: `attention` and one loss a tied head, from the same log-sum-exp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._aligned import aligned_features, first_features
from .._check import describe, describe_number, require, require_choice, unboxed
from ..graph import MultiGraph
from ._dense import dense_graph_attention, is_small_attention
from ._dropout import threshold_of
from ._rows import OVER, REDUCTIONS, check_graph, rows_of_ties
from .attention import attend, checked_heads, refuse_habits, with_scale
from .attention_bce import LINKS, TARGETS, attention_bce, check_negatives
from .attention_kl import kl_of_ties
from .attention_kl_comembership import attention_kl_comembership
from .sample_rows import check_generator

LOSSES = ("kl", "bce", "kl_comembership")


def graph_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: MultiGraph,
    ties: Sequence[tuple[str, int]],
    *,
    loss: str = "kl",
    rows: Tensor | Mapping[str, Tensor | None] | None = None,
    num_prefix: int = 1,
    scale: float | None = None,
    over: str = "tokens",
    reduction: str = "mean",
    num_negatives: int | None = None,
    neg_sample_ratio: float | None = None,
    target: str = "normalized",
    link: str = "softmax",
    diagonal: bool = False,
    dropout_p: float = 0,  # no 0.0: compiled with dynamic shapes, a float of a default is traced as an input
    generator: torch.Generator | None = None,
    attn_mask: None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention, and for each tied head how far its map is from a graph; no attention map is made.

    Args:
        q, k, v: [..., H, T, D] (v [..., H, T, Dv]) with T = num_prefix + N tokens, prefix tokens first.
        graph: N genes.
        ties: (relation, head) pairs; a head may be tied to several relations, a relation to several heads.
        loss: "kl" (see `attention_kl`), "bce" (see `attention_bce`) or "kl_comembership" (see `attention_kl_comembership`):
            the target of a tie is then whom a gene shares columns of the relation with, `graph.comembership(relation)`, with
            the columns' weights of `graph.with_column_weight`.
        rows: int64 [R], the genes whose rows are compared, for all ties; or a dict by relation (all rows of a relation that
            is not named); default: all.
        num_prefix: tokens before the genes, such as CLS.
        scale: factor of the scores, 1 / sqrt(D) if None.
        over: of the "kl" losses.
        reduction: "mean", "sum" or "none", within each tie.
        num_negatives, neg_sample_ratio, target, link: of the "bce" loss.
        diagonal: of the "kl_comembership" loss: whether a gene shares its terms with itself.
        dropout_p: see `attention`: `out` is of the dropped map, every loss of the map before that.
        generator: of the draws, first that of dropout and then the negatives of tie after tie.
        attn_mask, is_causal, enable_gqa: see `attention`.

    Returns:
        out [..., H, T, Dv], and the losses, one a tie in their order, in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: on double backward.
    """
    refuse_habits(attn_mask, is_causal, enable_gqa)
    require_choice("loss", loss, LOSSES)
    require_choice("over", over, OVER)
    require_choice("reduction", reduction, REDUCTIONS)
    require_choice("target", target, TARGETS)
    require_choice("link", link, LINKS)
    num_negatives, neg_sample_ratio = check_negatives(num_negatives, neg_sample_ratio, rows)
    check_diagonal(diagonal)
    check_generator(generator)
    q, k, v = checked_heads(q, k, v, same_tokens=True)
    require(q.ndim >= 3, lambda: f"q: expected shape [..., heads, tokens, head_dim], got {list(q.shape)}")
    num_prefix = check_graph(graph, q, num_prefix)
    ties = check_ties(ties, graph, q.shape[-3])
    relations = [relation for relation, _ in ties]
    chosen = rows_of_ties(rows, relations, graph)
    dim_v = v.shape[-1]
    q, scale = with_scale(q, scale)
    threshold = threshold_of(dropout_p)
    of_one_map = loss == "kl" and ties and not threshold and all(index is chosen[0] for index in chosen)
    if of_one_map and is_small_attention(q, k, v, scale):
        return dense_graph_attention(
            q, k, v, graph, ties, chosen[0], num_prefix=num_prefix, scale=scale, over=over, reduction=reduction
        )  # fmt: skip
    q, k, v = (aligned_features(x) for x in (q, k, v))
    out, lse = attend(q, k, v, scale, threshold, generator)
    out = first_features(out, dim_v)
    if not ties:
        return out, ()
    if loss == "kl":
        losses = kl_of_ties(
            q, k, lse, graph, ties, chosen,
            num_prefix=num_prefix, scale=scale, over=over, reduction=reduction,
        )  # fmt: skip
        return out, losses
    if loss == "kl_comembership":
        return out, tuple(
            attention_kl_comembership(
                q[..., head, :, :], k[..., head, :, :], graph.comembership(relation, diagonal=diagonal), lse=lse[..., head, :],
                rows=index, num_prefix=num_prefix, scale=scale, over=over, reduction=reduction,
            )
            for (relation, head), index in zip(ties, chosen, strict=True)
        )  # fmt: skip
    return out, tuple(
        attention_bce(
            q[..., head, :, :], k[..., head, :, :], graph, relation, lse=lse[..., head, :], rows=index,
            num_negatives=num_negatives, neg_sample_ratio=neg_sample_ratio, num_prefix=num_prefix, scale=scale, target=target,
            link=link, generator=generator, reduction=reduction,
        )
        for (relation, head), index in zip(ties, chosen, strict=True)
    )  # fmt: skip


def check_diagonal(value: Any) -> None:
    """Check that an argument is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"diagonal: expected a bool, got {describe(value)}")


def check_ties(ties: Any, graph: MultiGraph, num_heads: int, name: str = "ties") -> list[tuple[str, int]]:
    """Checked (relation, head) pairs."""
    valid = isinstance(ties, Sequence) and not isinstance(ties, str)
    require(valid, lambda: f"{name}: expected a sequence of (relation, head), got {describe(ties)}")
    checked = []
    for i, tie in enumerate(ties):
        pair = isinstance(tie, (tuple, list)) and len(tie) == 2
        require(pair, lambda: f"{name}[{i}]: expected (relation, head), got {describe(tie)}")
        relation, head = tie[0], unboxed(tie[1])
        graph.relation_id(relation)
        in_range = isinstance(head, int) and not isinstance(head, bool) and 0 <= head < num_heads
        require(in_range, lambda: f"{name}[{i}]: expected a head in [0, {num_heads}), got {describe_number(head)}")
        checked.append((relation, head))
    return checked
