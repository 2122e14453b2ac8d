"""KL between who shares terms with whom and an attention map's rows, with neither matrix made.

Of a relation B from genes to terms, weights W of the terms and the row sums D of C = B W Bᵀ, the target is T = D⁻¹ C, and

    KL_i = sum_j t_ij log t_ij  -  (scale / d_i) q_i . (sum_e b_ie w_e (sum_j b_je k_j))  +  m_i LSE_i

The first term is a constant (`Comembership.entropy`). The second is two products with B: the keys of each term's genes are
added up once (`masked_spmm` of Bᵀ), and of these sums, times w_e, each gene takes its own (`row_dot`). Without the diagonal of
C, q_i . k_i sum_e w_e b_ie^2 is taken off: a NaN in a gene's own key is one in its row. Memory and time are those of B's
entries, of which C may have thousands of times as many.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._aligned import aligned_features
from .._check import count_of, describe, require, require_choice, require_same
from ..graph import Comembership, Targets
from ._rows import OVER, check_pair, check_rows, reduce_ties, row_logsumexp, take
from .attention import accumulation_dtype, with_scale
from .masked_spmm import masked_spmm
from .row_dot import row_dot


def attention_kl_comembership(
    q: Tensor,
    k: Tensor,
    target: Comembership,
    *,
    lse: Tensor | None = None,
    rows: Tensor | None = None,
    num_prefix: int = 0,
    scale: float | None = None,
    over: str = "tokens",
    reduction: str = "mean",
) -> Tensor:
    """KL(row of T ‖ row of the attention map) of one head, in nats, T = D⁻¹ B W Bᵀ: who shares terms with whom.

    What `attention_kl` gives for a relation that joins every two genes of a term, with weight C_ij = sum_e b_ie w_e b_je, in
    O(T D + entries of B) memory.

    Args:
        q, k: [..., T, D], prefix tokens first, then all tokens of the graph, or the genes alone where they stand first in
            it: T = num_prefix + N, or num_prefix + genes. float32, bfloat16, float16, or float64 on the CPU.
        target: `graph.comembership(relation)`, made once; it says which weights, and whether the diagonal is in.
        lse: [..., T], the natural log-sum-exp of all tokens as `attention` returns it (differentiable), computed here if
            None. over="valid" has a denominator of its own and does not read it.
        rows: int64 [R], the tokens whose rows are compared (default: all).
        num_prefix: tokens before the genes, such as CLS.
        scale: factor of the scores, 1 / sqrt(D) if None.
        over: "tokens", the attention map as it is; or "valid", renormalised over the genes known in the relation.
        reduction: "mean" over the genes that share a term and the leading dimensions, "sum" of all, "none" for [..., R].

    Returns:
        The loss in float32 (float64 for float64 inputs). Rows of genes that share no term, and of other tokens, contribute 0
        and are not counted.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
        RuntimeError: on double backward.
        ImportError, NotImplementedError: the extension was not built, or not for the graph's device.
    """
    if not isinstance(target, Comembership):
        raise TypeError(f"target: expected a Comembership, as graph.comembership(relation) is, got {describe(target)}")
    q, k = check_pair(q, k, lse, reduction)
    graph, genes = target.graph, target.genes
    graph.require_unwritten()
    require_same("device", q=q.device, target=graph.device)
    num_prefix = count_of("num_prefix", num_prefix)
    num_tokens = q.shape[-2] - num_prefix
    alone = genes.start == 0 and num_tokens == genes.stop
    require(alone or num_tokens == graph.num_nodes, lambda: _expected(q, target, num_prefix))
    require_choice("over", over, OVER)
    chosen = check_rows("rows", rows, graph, num_tokens)
    q, scale = with_scale(q, scale)
    dtype = accumulation_dtype(q.dtype)

    known = graph.known_rows(target.relation)[:num_tokens]
    total = row_logsumexp(
        q, k, lse if over == "tokens" else None, known, chosen, num_prefix=num_prefix, scale=scale, over=over
    )  # fmt: skip
    mean = _means(q, k, target, num_prefix, chosen)[..., : total.shape[-1]]
    constants = (take(x[:num_tokens], 0, chosen, 0) for x in (target.inv_mass, target.entropy))
    inv_mass, entropy = (x.to(dtype) for x in constants)
    without = inv_mass == 0
    kl = torch.sub(total + entropy, mean, alpha=scale).masked_fill(without, 0)
    counted = without.logical_not().sum().clamp_min(1)
    targets = Targets(*(x.unsqueeze(0) for x in (inv_mass, entropy, without, counted)))
    return reduce_ties(kl.unsqueeze(-2), targets, reduction)[0]


def _means(q: Tensor, k: Tensor, target: Comembership, num_prefix: int, rows: Tensor | None) -> Tensor:
    """q_i . sum_j t_ij k_j, [..., R], of all N tokens where `rows` is None; genes that share nothing may hold anything."""
    graph, genes = target.graph, target.genes
    dtype = accumulation_dtype(q.dtype)
    without = (target.inv_mass == 0)[genes.start : genes.stop, None]

    def all_tokens(x: Tensor) -> Tensor:
        """Those of the genes, and zeros: [..., N, D]"""
        x = x[..., num_prefix + genes.start : num_prefix + genes.stop, :].to(dtype).masked_fill(without, 0)
        return F.pad(x, (0, 0, genes.start, graph.num_nodes - genes.stop))

    queries, keys = all_tokens(q), all_tokens(k)
    num_leading = keys.shape[:-2].numel()
    everyone = torch.ones(num_leading, graph.num_nodes, dtype=torch.bool, device=keys.device)
    flat = keys.reshape(num_leading, *keys.shape[-2:])
    terms = masked_spmm(graph, target.relation, flat, everyone, transpose=True, edge_weight=target.key_weight)
    terms = terms.view(keys.shape) * target.term_weight.to(dtype)[:, None]
    q_1, k_1 = (aligned_features(x).unsqueeze(-3) for x in (queries, terms))  # one head
    product = row_dot(q_1, k_1, graph, [(target.relation, 0)], [rows], num_prefix=0)
    share, own_share = (take(x.to(dtype), 0, rows, 0) for x in (target.share, target.own_share))
    if target.diagonal:
        return share * product
    own = (take(queries, -2, rows, 0) * take(keys, -2, rows, 0)).sum(-1)
    return share * product - own_share * own


def _expected(q: Tensor, target: Comembership, num_prefix: int) -> str:
    n, genes = target.graph.num_nodes, target.genes
    alone = f", or {num_prefix} + {genes.stop} genes" if genes.start == 0 and genes.stop < n else ""
    return f"q: expected {num_prefix} prefix tokens + {n} tokens of the graph{alone}, got shape {list(q.shape)}"
