"""KL between a graph's rows and an attention map's rows, without the map.

With t_i the row of the graph over its sum, m_i its mass (1, or 0 for a row without edges) and the log-sum-exp of the row,

    KL_i = sum_j t_ij log t_ij  -  scale * q_i . (sum_j t_ij k_j)  +  m_i LSE_i

The first term is a constant of the graph, the second is a product along its edges (`row_dot`), the third comes out of flash
attention, whose backward takes the gradient of LSE at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._aligned import aligned_features
from .._check import require_choice
from ..graph import MultiGraph
from ._dense import dense_kl, is_small
from ._rows import OVER, check_head, check_rows, logsumexp_of_ties, reduce_ties, targets_of_ties
from .attention import accumulation_dtype, with_scale
from .row_dot import row_dot


def attention_kl(
    q: Tensor,
    k: Tensor,
    graph: MultiGraph,
    relation: str,
    *,
    lse: Tensor | None = None,
    rows: Tensor | None = None,
    num_prefix: int = 0,
    scale: float | None = None,
    over: str = "tokens",
    reduction: str = "mean",
) -> Tensor:
    """KL(row of the graph ‖ row of the attention map) of one head, in nats, in O(T D + edges) memory.

    Args:
        q, k: [..., T, D], T = num_prefix + N tokens, prefix tokens first; float32, bfloat16, float16, or float64 on the CPU.
        graph: N genes, or tokens of several types; row i of the relation over its sum is the target of gene i, weights
            honoured.
        relation: its name.
        lse: [..., T], the natural log-sum-exp of all tokens as `attention` returns it (differentiable), computed here if
            None. over="valid" has a denominator of its own and does not read it.
        rows: int64 [R], the genes whose rows are compared (default: all).
        num_prefix: tokens before the genes, such as CLS.
        scale: factor of the scores, 1 / sqrt(D) if None.
        over: "tokens", the attention map as it is, prefix tokens and new genes in its denominators; or "valid",
            renormalised over the genes known in the relation (of a relation that joins two node types: over the known tokens
            of its columns' type).
        reduction: "mean" over the rows with an edge and the leading dimensions, "sum" of all, "none" for [..., R].

    Returns:
        The loss in float32 (float64 for float64 inputs). Rows without a valid edge contribute 0 and are not counted.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: on double backward.
    """
    q, k, num_prefix = check_head(q, k, graph, num_prefix, lse, reduction)
    require_choice("over", over, OVER)
    graph.relation_id(relation)
    q, scale = with_scale(q, scale)
    genes = check_rows("rows", rows, graph)
    lse = lse if over == "tokens" else None
    if is_small(q, k, lse, genes, graph.num_nodes, scale):
        return dense_kl(
            q, k, lse, graph, relation, genes, num_prefix=num_prefix, scale=scale, over=over, reduction=reduction
        )  # fmt: skip
    tie_lse = None if lse is None else lse.unsqueeze(-2)
    (loss,) = kl_of_ties(
        aligned_features(q).unsqueeze(-3), aligned_features(k).unsqueeze(-3), tie_lse, graph, [(relation, 0)],
        [genes], num_prefix=num_prefix, scale=scale, over=over, reduction=reduction,
    )  # fmt: skip
    return loss


def kl_of_ties(
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
    reduction: str,
) -> tuple[Tensor, ...]:
    """The loss of every (relation, head) of q, k [..., H, T, D] and lse [..., H, T]; arguments are checked by the caller."""
    products = row_dot(q, k, graph, ties, rows, num_prefix=num_prefix)
    lengths = [graph.num_nodes if genes is None else genes.numel() for genes in rows]
    groups = [(ties, rows, products)]
    if len(set(lengths)) > 1:  # tie by tie
        parts = products.split(lengths, -1)
        groups = [([tie], [genes], product) for tie, genes, product in zip(ties, rows, parts, strict=True)]
    losses: list[Tensor] = []
    for some, genes, product in groups:
        targets = targets_of_ties(graph, [relation for relation, _ in some], genes, accumulation_dtype(q.dtype))
        total = logsumexp_of_ties(q, k, lse, graph, some, genes, num_prefix=num_prefix, scale=scale, over=over)
        # [..., ties, R]
        product = product.unflatten(-1, targets.inv_mass.shape)
        kl = torch.addcmul(total + targets.entropy, targets.inv_mass, product, value=-scale)
        losses += reduce_ties(kl.masked_fill(targets.without_edge, 0), targets, reduction)
    return tuple(losses)
