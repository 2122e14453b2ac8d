"""What the models share: how genes become tokens, and what a model returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._check import count_of, describe, require, require_indices, require_same, require_tensor
from ._check import require_features


class CellOutput(NamedTuple):
    """What every model of a cell returns for a batch of mutants.

    Attributes:
        prediction: [B, out_dim].
        losses: scalars beside the phenotype's loss, such as one a tie, by name, without their weights.
        regularization: scalar: the sum of weight * loss, to be added to the loss of the phenotype as it is.
    """

    prediction: Tensor
    losses: dict[str, Tensor]
    regularization: Tensor


class GeneTokens(nn.Module):
    """A gene's token: the sum of a learned embedding and a projection of its features, whichever there are.

    Args:
        dim: width of the tokens.
        num_genes: size of the embedding table, or None for no embeddings.
        feature_dim: width of the genes' features, or None for no features.

    Raises:
        ValueError: neither is given, or a size out of range. TypeError: one of a wrong type.
    """

    def __init__(self, dim: int, *, num_genes: int | None = None, feature_dim: int | None = None) -> None:
        super().__init__()
        require(
            num_genes is not None or feature_dim is not None,
            "num_genes, feature_dim: expected at least one of them, got None for both",
        )
        dim = count_of("dim", dim, minimum=1)
        num_genes = None if num_genes is None else count_of("num_genes", num_genes, minimum=1)
        feature_dim = None if feature_dim is None else count_of("feature_dim", feature_dim, minimum=1)
        self.num_genes, self.feature_dim = num_genes, feature_dim
        self.embedding: nn.Embedding | None = None
        self.project_features: nn.Linear | None = None
        if num_genes is not None:
            self.embedding = nn.Embedding(num_genes, dim)
            nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        if feature_dim is not None:
            self.project_features = nn.Linear(feature_dim, dim)

    def forward(self, num_nodes: int, features: Tensor | None = None, gene_ids: Tensor | None = None) -> Tensor:
        """Tokens of a graph's genes.

        Args:
            num_nodes: N, the genes of the graph.
            features: [N, feature_dim], floating; expected if and only if there is a `feature_dim`.
            gene_ids: int64 [N], the row of each gene in the embedding table; 0 to N - 1 by default.

        Returns:
            [N, dim].

        Raises:
            ValueError: a shape, dtype or index that does not fit.
        """
        if (features is None) != (self.project_features is None):
            raise ValueError(f"features: the model has feature_dim={self.feature_dim}, got {describe(features)}")
        if gene_ids is not None and self.embedding is None:
            raise ValueError(f"gene_ids: the model has no embeddings (num_genes=None), got a {describe(gene_ids)}")
        parts = []
        if self.embedding is not None:
            if gene_ids is None:
                if num_nodes > len(self.embedding.weight):
                    raise ValueError(f"graph: {num_nodes} genes, but num_genes is {self.num_genes}; give gene_ids")
                parts.append(self.embedding.weight[:num_nodes])
            else:
                require_tensor("gene_ids", gene_ids, ndim=1, dtypes=(torch.int64,))
                if len(gene_ids) != num_nodes:
                    raise ValueError(f"gene_ids: expected {num_nodes}, one a gene, got {len(gene_ids)}")
                require_same("device", module=self.embedding.weight.device, gene_ids=gene_ids.device)
                require_indices("gene_ids", gene_ids, len(self.embedding.weight), "embeddings")
                parts.append(self.embedding(gene_ids))
        if self.project_features is not None and features is not None:
            weight = self.project_features.weight
            require_features("features", features, self.project_features.in_features, weight, ndim=2)
            if len(features) != num_nodes:
                raise ValueError(f"features: expected {num_nodes} rows, one a gene, got {len(features)}")
            parts.append(self.project_features(features))
        return sum(parts[1:], parts[0])

    @torch.no_grad()
    def extend(self, num_new: int, *, init: Tensor | None = None, at: int | None = None) -> None:
        """Add genes to the embedding table, in place, behind its own; without a table there is nothing to add to.

        The rows of the old genes are kept to the bit. The table is a new parameter: an optimizer made before holds the old one,
        so make another. Its state for the old genes, where that matters, is their rows of the new one's (for AdamW `exp_avg`
        and `exp_avg_sq`), zeros in those of the new genes.

        Args:
            num_new: number of new genes, >= 0.
            init: [num_new, dim], their rows, such as those of homologues (`embedding.weight[homologues]`); by default the mean
                of the table, a gene of which nothing is known.
            at: the row before which they come; the end of the table by default.

        Raises:
            ValueError: a number or shape out of range, or an `init` without a table. TypeError: one of a wrong type.
        """
        num_new = count_of("num_new", num_new)
        if self.embedding is None:
            require(init is None, "init: the model has no embeddings (num_genes=None)")
            return
        old = self.embedding.weight
        at = len(old) if at is None else at
        at = count_of("at", at)
        require(at <= len(old), f"at: expected at most {len(old)}, the rows of the table, got {at}")
        if init is None:
            init = old.mean(0).expand(num_new, -1)
        else:
            require_features("init", init, old.shape[1], old, ndim=2)
            require(len(init) == num_new, f"init: expected {num_new} rows, one a new gene, got {len(init)}")
        self.num_genes = len(old) + num_new
        self.embedding = nn.Embedding.from_pretrained(torch.cat([old[:at], init, old[at:]]), freeze=not old.requires_grad)


def extend_genes(model: nn.Module, num_new: int, *, at: int | None = None) -> None:
    """Add genes to every embedding table of a trained model, in place, as `MultiGraph.extend` adds them to a graph.

    In a graph of several node types it puts them behind the last of their type, and `at` has to say where that is: for genes
    `graph.node_types["gene"].stop` of the graph as it was. At the end of the table all tokens behind would have others' rows.

    A gene of which features are known needs none of this where the model has features alone: it is one more row of them. Nor
    does one that may share the token of an old gene: `gene_ids` names the row.

    Args:
        model: any model with `GeneTokens`. Each table gets a row a gene, the mean of the table (`GeneTokens.extend`, which also
            takes other rows and says what becomes of an optimizer).
        num_new: number of new genes, >= 0.
        at: the row before which they come; the end of the tables by default.

    Raises:
        ValueError: a number out of range, or a model without `GeneTokens`. TypeError: an argument of a wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {describe(model)}")
    tables = [module for module in model.modules() if isinstance(module, GeneTokens)]
    require(len(tables) > 0, lambda: f"model: expected one with GeneTokens, got a {type(model).__name__} without")
    for table in tables:
        table.extend(num_new, at=at)
