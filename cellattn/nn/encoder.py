"""The transformer over all genes of one cell, with heads tied to gene graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._check import count_of, describe, require, require_choice
from .._profiling import spanned
from ..graph import MultiGraph
from ._check import entries, probability_of, require_features, weight_of
from .attention import GraphLossOptions, GraphRegularizedAttention, Rows, check_loss_options


class Tie(NamedTuple):
    """One head of one layer held to one graph: its loss enters the regularization times `weight` (lambda)."""

    layer: int
    head: int
    relation: str
    weight: float


class EncoderLayer(nn.Module):
    """x + Attention, then x + FFN, normalised before ("pre") or after ("post") it is added, or scaled from 0 on ("rezero")."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None,
        ties: Sequence[tuple[str, int]],
        tie_options: Sequence[Mapping[str, Any]],
        masks: Sequence[tuple[str, int]],
        norm: str,
        dropout: float,
        dropout_p: float,
        ffn_dropout: float,
        ffn_dim: int,
        **loss_options: Unpack[GraphLossOptions],
    ) -> None:
        super().__init__()
        self.pre_norm = norm != "post"
        self.attention = GraphRegularizedAttention(
            dim,
            num_heads,
            head_dim=head_dim,
            ties=ties,
            masks=masks,
            tie_options=tie_options,
            dropout_p=dropout_p,
            **loss_options,
        )
        hidden = nn.GELU() if ffn_dropout == 0 else nn.Sequential(nn.GELU(), nn.Dropout(ffn_dropout))  # at 0 nothing is drawn
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), hidden, nn.Linear(ffn_dim, dim))
        self.norm1, self.norm2 = (nn.Identity() if norm == "rezero" else nn.LayerNorm(dim) for _ in range(2))
        self.rezero = nn.Parameter(torch.zeros(2)) if norm == "rezero" else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, graph: MultiGraph | None, rows: Rows | None, generator: torch.Generator | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens [..., 1 + N, dim] to tokens of the same shape, and the losses of the layer's ties."""
        if self.pre_norm:
            by_attention, by_ffn = (1.0, 1.0) if self.rezero is None else self.rezero
            y, losses = self.attention(self.norm1(x), graph, rows=rows, generator=generator)
            x = x + by_attention * self.dropout(y)
            return x + by_ffn * self.dropout(self.ffn(self.norm2(x))), losses
        y, losses = self.attention(x, graph, rows=rows, generator=generator)
        x = self.norm1(x + self.dropout(y))
        return self.norm2(x + self.dropout(self.ffn(x))), losses


class CellEncoder(nn.Module):
    """A transformer over a CLS token and N gene tokens; a gene's identity is in its features, never in its position.

    Args:
        dim: width of the tokens.
        num_layers: number of layers, 0 or more.
        num_heads: heads a layer.
        ties: entries (layer, head, relation, weight), weight finite and at least 0, or (layer, head, relation, weight, options)
            with `GraphLossOptions` of its own, as in (0, 2, "physical", 0.1, {"loss": "bce"}): soft, the head has a loss.
        masks: entries (layer, head, relation): hard, the head sees CLS, itself and its neighbours alone, see
            `GraphRegularizedAttention`.
        head_dim: width of a head; `dim / num_heads` by default.
        norm: "pre" (with a last LayerNorm after all layers), "post" (as the published model has it) or "rezero": no norms, each
            branch times a number that is learned from 0 on (`rezero` of the layer), so that the encoder starts as x.
        dropout: probability on the residual branches.
        dropout_p: probability on the entries of the attention maps, masked ones too; the losses see the maps before it.
        ffn_dropout: probability inside the FFN, behind its GELU, where `nn.TransformerEncoderLayer` has it.
        ffn_dim: hidden width of the GELU FFN; `4 * dim` by default.
        loss_options: see `GraphLossOptions`; reduction "mean" or "sum".

    Attributes:
        ties: tuple of `Tie`.
        weights: dict from a loss's name to its weight. A name is "{loss}/layer{l}/head{h}/{relation}", such as
            "kl/layer0/head2/physical".

    Raises:
        ValueError: a size, tie or option out of range. TypeError: one of a wrong type.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        *,
        ties: Sequence[tuple[int, int, str, float] | tuple[int, int, str, float, Mapping[str, Any]]] = (),
        masks: Sequence[tuple[int, int, str]] = (),
        head_dim: int | None = None,
        norm: str = "pre",
        dropout: float = 0.1,
        dropout_p: float = 0.0,
        ffn_dropout: float = 0.0,
        ffn_dim: int | None = None,
        **loss_options: Unpack[GraphLossOptions],
    ) -> None:
        super().__init__()
        dim = count_of("dim", dim, minimum=1)
        num_layers = count_of("num_layers", num_layers, minimum=0)
        num_heads = count_of("num_heads", num_heads, minimum=1)
        require_choice("norm", norm, ("pre", "post", "rezero"))
        dropout = probability_of("dropout", dropout)
        dropout_p = probability_of("dropout_p", dropout_p)
        ffn_dropout = probability_of("ffn_dropout", ffn_dropout)
        check_loss_options(loss_options)
        require_choice("reduction", loss_options.get("reduction", "mean"), ("mean", "sum"))
        ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        ffn_dim = count_of("ffn_dim", ffn_dim, minimum=1)
        self.dim = dim
        ties = entries("ties", ties, "(layer, head, relation, weight[, options])", (4, 5))
        self.tie_options = tuple(_own_options(position, tie) for position, tie in enumerate(ties))
        self.ties = tuple(Tie(*tie[:4]) for tie in ties)
        for position, tie in enumerate(self.ties):
            count_of(f"ties: entry {position}: layer", tie.layer, minimum=0)
            require(tie.layer < num_layers, f"ties: entry {position}: expected a layer below {num_layers}, got {tie.layer}")
            count_of(f"ties: entry {position}: head", tie.head, minimum=0)
            require(tie.head < num_heads, f"ties: entry {position}: expected a head below {num_heads}, got {tie.head}")
            weight_of(f"ties: entry {position}: weight", tie.weight)
            check_loss_options(options := {**loss_options, **self.tie_options[position]})
            require_choice("reduction", options.get("reduction", "mean"), ("mean", "sum"))
            twice = tie[:3] in [other[:3] for other in self.ties[:position]]
            require(not twice, f"ties: entry {position}: layer, head and relation {tie[:3]} are listed twice")
        self.masks = entries("masks", masks, "(layer, head, relation)", (3,))
        for position, (layer, _, _) in enumerate(self.masks):
            count_of(f"masks: entry {position}: layer", layer, minimum=0)
            require(layer < num_layers, f"masks: entry {position}: expected a layer below {num_layers}, got {layer}")
        self.cls = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.layers = nn.ModuleList(
            EncoderLayer(
                dim,
                num_heads,
                head_dim=head_dim,
                ties=[(tie.relation, tie.head) for tie in self.ties if tie.layer == layer],
                tie_options=[own for tie, own in zip(self.ties, self.tie_options, strict=True) if tie.layer == layer],
                masks=[(relation, head) for at, head, relation in self.masks if at == layer],
                norm=norm,
                dropout=dropout,
                dropout_p=dropout_p,
                ffn_dropout=ffn_dropout,
                ffn_dim=ffn_dim,
                **loss_options,
            )
            for layer in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        losses = [{**loss_options, **own}.get("loss", "kl") for own in self.tie_options]
        self.weights = {
            f"{loss}/layer{tie.layer}/head{tie.head}/{tie.relation}": tie.weight
            for loss, tie in zip(losses, self.ties, strict=True)
        }

    @spanned("encoder")
    def forward(
        self,
        x: Tensor,
        graph: MultiGraph | None = None,
        *,
        rows: Rows | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Encode the cell.

        Args:
            x: [..., N, dim], floating, the genes in the order of the graph.
            graph: the gene graphs, num_nodes = N; needed where there are ties or masks.
            rows: gene indices int64 whose rows enter the losses, one tensor or one a relation; all by default.
            generator: draws what dropout leaves out of the maps and the negatives of a sampled "bce", on the device of x.

        Returns:
            h_cls [..., dim], h [..., N, dim], and the losses by name, scalars without their weights.

        Raises:
            ValueError: a shape, dtype or relation that does not fit.
        """
        require_features("x", x, self.dim, self.cls)
        x = torch.cat([self.cls.expand(*x.shape[:-2], 1, -1), x], dim=-2)
        by_layer = []
        for layer in self.layers:
            x, losses = layer(x, graph, rows, generator)
            by_layer.append(losses)
        h = self.norm(x)
        return h[..., 0, :], h[..., 1:, :], self._named(by_layer)

    def regularization(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The scalar sum of weight * loss over the ties: the one place where the weights (lambda) enter."""
        return sum((weight * losses[name] for name, weight in self.weights.items()), self.cls.new_zeros(()))

    def _named(self, by_layer: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        remaining = [iter(losses) for losses in by_layer]
        return {name: next(remaining[tie.layer]) for name, tie in zip(self.weights, self.ties, strict=True)}


def _own_options(position: int, tie: Sequence[Any]) -> dict[str, Any]:
    """The options that an entry (layer, head, relation, weight, options) has of its own."""
    options = tie[4] if len(tie) == 5 else {}
    if not isinstance(options, Mapping):
        raise TypeError(f"ties: entry {position}: expected a dict of options, got {describe(options)}")
    return dict(options)
