"""The cell transformer: the cell is encoded once a call, and every mutant is read out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..graph import MultiGraph
from ._check import require_graph
from ._config import keeps_config
from ._rows import draw_rows, sampled_rows_of
from .attention import GraphLossOptions, Rows
from .encoder import CellEncoder
from .perturbation import PerturbationHead
from .screening import HeadScreening
from .tokens import CellOutput, GeneTokens


@keeps_config
class CellTransformer(nn.Module):
    """Gene features, a graph-regularised encoder over all genes, and a perturbation head for a batch of mutants.

    A gene's input is its token (`GeneTokens`). Its position carries nothing, so that the number and order of genes may change
    between calls.

    Args:
        dim, num_layers, num_heads, ties, masks, head_dim, norm, dropout, dropout_p, ffn_dropout, ffn_dim: see `CellEncoder`.
        num_types, pool, pool_heads, readout_residual, readout_null_sink, hidden_dim, activation, out_dim, max_size: see
            `PerturbationHead`, whose dropout is the same.
        cross_heads: heads of the head's cross-attention; 0 for none of it.
        num_genes, feature_dim: see `GeneTokens`.
        sampled_rows: rows of each graph that enter its loss in a training step, drawn anew in each: a number, or a
            fraction in (0, 1] of the rows with a valid edge. None, and always in evaluation: all rows.
        loss_options: see `GraphLossOptions`; reduction "mean" or "sum".

    Raises:
        ValueError: a size, tie or option out of range. TypeError: one of a wrong type.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        *,
        num_types: int | None,
        num_genes: int | None = None,
        feature_dim: int | None = None,
        ties: Sequence[tuple[int, int, str, float] | tuple[int, int, str, float, Mapping[str, Any]]] = (),
        masks: Sequence[tuple[int, int, str]] = (),
        head_dim: int | None = None,
        norm: str = "pre",
        dropout: float = 0.1,
        dropout_p: float = 0.0,
        ffn_dropout: float = 0.0,
        ffn_dim: int | None = None,
        pool: str | Sequence[str] = "sum",
        cross_heads: int = 1,
        pool_heads: int | None = None,
        readout_residual: str = "post",
        readout_null_sink: float | None = None,
        hidden_dim: int | None = None,
        activation: str = "gelu",
        out_dim: int = 1,
        max_size: int | None = None,
        sampled_rows: int | float | None = None,
        **loss_options: Unpack[GraphLossOptions],
    ) -> None:
        super().__init__()
        sampled_rows = sampled_rows_of(sampled_rows)
        self.encoder = CellEncoder(
            dim,
            num_layers,
            num_heads,
            ties=ties,
            masks=masks,
            head_dim=head_dim,
            norm=norm,
            dropout=dropout,
            dropout_p=dropout_p,
            ffn_dropout=ffn_dropout,
            ffn_dim=ffn_dim,
            **loss_options,
        )
        self.head = PerturbationHead(
            dim,
            num_types=num_types,
            pool=pool,
            num_heads=cross_heads,
            pool_heads=pool_heads,
            readout_residual=readout_residual,
            readout_null_sink=readout_null_sink,
            hidden_dim=hidden_dim,
            activation=activation,
            out_dim=out_dim,
            dropout=dropout,
            max_size=max_size,
        )
        self.tokens = GeneTokens(dim, num_genes=num_genes, feature_dim=feature_dim)
        self.num_types, self.sampled_rows = num_types, sampled_rows

    def forward(
        self,
        graph: MultiGraph,
        seeds: Tensor,
        ptr: Tensor,
        types: Tensor,
        *,
        features: Tensor | None = None,
        gene_ids: Tensor | None = None,
        rows: Rows | None = None,
        generator: torch.Generator | None = None,
    ) -> CellOutput:
        """Predict a batch of mutants.

        Args:
            graph: the gene graphs of N genes.
            seeds: int64 [nnz], the perturbed genes of all sets one after another, no gene twice in a set.
            ptr: int64 [B+1], where each set begins and ends in seeds.
            types: int64 [nnz], perturbation types.
            features: [N, feature_dim], floating; expected if and only if the model has `feature_dim`.
            gene_ids: int64 [N], the row of each gene in the embedding table; 0 to N - 1 by default.
            rows: gene indices int64 whose rows enter the graph losses, one tensor or one a relation, in place of
                `sampled_rows`.
            generator: draws the sampled rows, what dropout leaves out of the maps, and negatives.

        Returns:
            `CellOutput`.

        Raises:
            ValueError: a shape, dtype, index or relation that does not fit (values are read on the CPU alone).
        """
        require_graph(graph)
        x = self.tokens(graph.num_nodes, features, gene_ids)
        if rows is None and self.sampled_rows is not None and self.training:
            rows = draw_rows(graph, [tie.relation for tie in self.encoder.ties], self.sampled_rows, generator)
        h_cls, h, losses = self.encoder(x, graph, rows=rows, generator=generator)
        prediction = self.head(h_cls, h, seeds, ptr, types)
        return CellOutput(prediction, losses, self.encoder.regularization(losses))

    @torch.no_grad()
    def screening(
        self,
        graph: MultiGraph,
        *,
        phenotype: int = 0,
        dtype: torch.dtype = torch.float32,
        features: Tensor | None = None,
        gene_ids: Tensor | None = None,
    ) -> HeadScreening:
        """The cell encoded once, ready to score sets: see `Screening`."""
        require_graph(graph)
        x = self.tokens(graph.num_nodes, features, gene_ids)
        no_rows = torch.empty(0, dtype=torch.int64, device=graph.device)
        h_cls, h, _ = self.encoder(x, graph, rows=no_rows)
        return self.head.screening(h_cls, h, phenotype=phenotype, dtype=dtype)
