"""Multi-head self-attention over gene tokens, some of whose heads are tied to gene graphs, or masked by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._check import count_of, describe, require, require_choice
from ..graph import MultiGraph
from ..ops import attention, attention_bce, attention_kl, attention_kl_comembership, edge_attention, graph_attention
from ..ops._rows import OVER, REDUCTIONS
from ..ops.attention import refuse_habits
from ..ops.attention_bce import LINKS, TARGETS, check_negatives
from ..ops.graph_attention import LOSSES, check_diagonal
from ._check import entries, probability_of, require_features

Rows = Tensor | Mapping[str, Tensor]


class GraphLossOptions(TypedDict, total=False):
    """How a tied head is compared with its graph: the options of `cellattn.graph_attention` of the same names."""

    loss: str  # "kl" (default), "bce", or "kl_comembership": whom a gene shares the columns of the relation with,
    # T = D⁻¹ B W Bᵀ, W by `MultiGraph.with_column_weight`
    over: str  # "tokens" (default) or "valid"
    reduction: str  # "mean" (default), "sum" or "none"
    num_negatives: int | None  # bce: sampled non-edges a row; None: every one
    neg_sample_ratio: float | None  # bce: sampled non-edges of a graph over its edges
    target: str  # bce: "normalized" (default) or "binary"
    link: str  # bce: "softmax" (default) or "sigmoid"
    diagonal: bool  # kl_comembership: whether a gene shares its terms with itself (default: no)


_CHOICES = {"loss": LOSSES, "over": OVER, "reduction": REDUCTIONS, "target": TARGETS, "link": LINKS}


def check_loss_options(options: Mapping[str, Any]) -> None:
    """Check `GraphLossOptions` by name and value."""
    for name, value in options.items():
        if name in _CHOICES:
            require_choice(name, value, _CHOICES[name])
        elif name == "diagonal":
            check_diagonal(value)
        elif name not in ("num_negatives", "neg_sample_ratio"):
            raise TypeError(f"{name}: no such option, expected one of {', '.join(GraphLossOptions.__annotations__)}")
    check_negatives(options.get("num_negatives"), options.get("neg_sample_ratio"), None)


class GraphRegularizedAttention(nn.Module):
    """Multi-head self-attention that also returns, for each tie of a head to a graph, how far its map is from it.

    Args:
        dim: width of the tokens.
        num_heads: number of heads.
        head_dim: width of a head; `dim / num_heads` by default.
        ties: pairs (relation, head): soft, the head sees everything and has a loss.
        masks: pairs (relation, head): hard, the head sees prefix, itself and its neighbours (`edge_attention`), and has no
            loss; a head may have several, and then no tie. Heads in neither are free.
        num_prefix: tokens before the genes (CLS).
        dropout_p: probability that an entry of a map is dropped, in training alone; the losses see the map before that.
        bias: whether the projections have one.
        tie_options: for each tie the options in which its loss differs from `loss_options`.
        loss_options: see `GraphLossOptions`; of all ties.

    Raises:
        ValueError: a size, tie or option out of range. TypeError: one of a wrong type.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        ties: Sequence[tuple[str, int]] = (),
        masks: Sequence[tuple[str, int]] = (),
        num_prefix: int = 1,
        dropout_p: float = 0.0,
        bias: bool = True,
        tie_options: Sequence[Mapping[str, Any]] | None = None,
        **loss_options: Unpack[GraphLossOptions],
    ) -> None:
        super().__init__()
        dim = count_of("dim", dim, minimum=1)
        num_heads = count_of("num_heads", num_heads, minimum=1)
        num_prefix = count_of("num_prefix", num_prefix, minimum=0)
        if head_dim is None:
            require(dim % num_heads == 0, f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
            head_dim = dim // num_heads
        head_dim = count_of("head_dim", head_dim, minimum=1)
        dropout_p = probability_of("dropout_p", dropout_p)
        check_loss_options(loss_options)
        ties, masks = (entries(name, pairs, "(relation, head)", (2,)) for name, pairs in (("ties", ties), ("masks", masks)))
        for name, pairs in (("ties", ties), ("masks", masks)):
            for position, pair in enumerate(pairs):
                relation, head = pair
                if not isinstance(relation, str):
                    raise TypeError(f"{name}: entry {position}: expected a relation's name, got {describe(relation)}")
                count_of(f"{name}: entry {position}: head", head, minimum=0)
                require(head < num_heads, f"{name}: entry {position}: expected a head below {num_heads}, got {head}")
                require(pair not in pairs[:position], f"{name}: entry {position}: {pair} is listed twice")
        tied, masked = ({head for _, head in pairs} for pairs in (ties, masks))
        both = sorted(tied & masked)
        require(not both, f"masks: expected heads without a tie, got {both} in both")
        self.dim, self.num_heads, self.head_dim, self.num_prefix = dim, num_heads, head_dim, num_prefix
        self.ties, self.masks = ties, masks
        self.masked = sorted(masked)
        self.seeing = [head for head in range(num_heads) if head not in masked]  # heads that see everything
        self.loss_options = loss_options
        own = [{}] * len(ties) if tie_options is None else [dict(options) for options in tie_options]
        require(len(own) == len(ties), f"tie_options: expected {len(ties)}, one a tie, got {len(own)}")
        for options in own:
            check_loss_options({**loss_options, **options})
        self.tie_options = tuple(own)
        self.dropout_p = dropout_p
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., num_heads, T, head_dim] of tokens x [..., T, dim]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)

    def forward(
        self,
        x: Tensor,
        graph: MultiGraph | None = None,
        *,
        rows: Rows | None = None,
        generator: torch.Generator | None = None,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Attend, and measure the tied heads.

        Args:
            x: [..., T, dim], floating, T = num_prefix + graph.num_nodes.
            graph: the gene graphs; needed where there are ties or masks.
            rows: gene indices int64 whose rows enter the losses, one tensor or one a relation; all by default.
            generator: draws what dropout leaves out, of masked heads first, and the negatives of a sampled "bce", on the device
                of x.
            attn_mask, is_causal: of `nn.MultiheadAttention`, at their defaults alone: an error says what to use instead.

        Returns:
            y [..., T, dim], and the losses, one a tie in their order: scalars (with reduction "none" one value a row).

        Raises:
            ValueError: a shape, dtype or relation that does not fit.
        """
        refuse_habits(attn_mask, is_causal)
        require_features("x", x, self.dim, getattr(self.qkv, "weight", None))
        q, k, v = self.project(x)
        if (self.ties or self.masks) and not isinstance(graph, MultiGraph):
            raise TypeError(f"graph: expected a MultiGraph, since heads are tied or masked, got {describe(graph)}")
        if self.masks and isinstance(graph, MultiGraph):
            out, losses = self._attend_masked(q, k, v, graph, rows, generator)
        else:
            out, losses = self._attend(q, k, v, self.ties, graph, rows, generator)
        return self.out(out.transpose(-3, -2).flatten(-2)), losses

    @property
    def _dropped(self) -> float:
        return self.dropout_p if self.training else 0.0

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ties: Sequence[tuple[str, int]],
        graph: MultiGraph | None,
        rows: Rows | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Heads that see everything, and the losses of their ties."""
        dropout_p = self._dropped
        if graph is not None and ties and not any(self.tie_options):
            return graph_attention(
                q, k, v, graph, ties, rows=rows, num_prefix=self.num_prefix, dropout_p=dropout_p, generator=generator,
                **self.loss_options,
            )  # fmt: skip
        out, lse = attention(q, k, v, dropout_p=dropout_p, generator=generator)
        losses = tuple(
            _loss_of_tie(
                q[..., head, :, :], k[..., head, :, :], lse[..., head, :], graph, relation,
                {**self.loss_options, **options}, rows, self.num_prefix, generator,
            )
            for (relation, head), options in zip(ties, self.tie_options, strict=True)
        )  # fmt: skip
        return out, losses

    def _attend_masked(
        self, q: Tensor, k: Tensor, v: Tensor, graph: MultiGraph, rows: Rows | None, generator: torch.Generator | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All heads, of which some are masked, each kind in one call."""

        def of(heads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            qs, ks, vs = (torch.stack([x[..., head, :, :] for head in heads], -3) for x in (q, k, v))
            return qs, ks, vs

        masks = [(relation, self.masked.index(head)) for relation, head in self.masks]
        q_masked, k_masked, v_masked = of(self.masked)
        out, _ = edge_attention(
            q_masked, k_masked, v_masked, graph, masks, num_prefix=self.num_prefix, dropout_p=self._dropped, generator=generator
        )
        by_head = dict(zip(self.masked, out.unbind(-3), strict=True))
        losses: tuple[Tensor, ...] = ()
        if self.seeing:
            ties = [(relation, self.seeing.index(head)) for relation, head in self.ties]
            out, losses = self._attend(*of(self.seeing), ties, graph, rows, generator)
            by_head.update(zip(self.seeing, out.unbind(-3), strict=True))
        return torch.stack([by_head[head] for head in range(self.num_heads)], -3), losses


def _loss_of_tie(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    graph: Any,
    relation: str,
    options: Mapping[str, Any],
    rows: Rows | None,
    num_prefix: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The loss of one head, q, k [..., T, D] and lse [..., T], with options of its own."""
    chosen = rows.get(relation) if isinstance(rows, Mapping) else rows
    loss = options.get("loss", "kl")
    of_kl = {name: options[name] for name in ("over", "reduction") if name in options}
    if loss == "kl":
        return attention_kl(q, k, graph, relation, lse=lse, rows=chosen, num_prefix=num_prefix, **of_kl)
    if loss == "kl_comembership":
        shared = graph.comembership(relation, diagonal=options.get("diagonal", False))
        return attention_kl_comembership(q, k, shared, lse=lse, rows=chosen, num_prefix=num_prefix, **of_kl)
    of_bce = {name: value for name, value in options.items() if name not in ("loss", "over", "diagonal")}
    return attention_bce(q, k, graph, relation, lse=lse, rows=chosen, num_prefix=num_prefix, generator=generator, **of_bce)
