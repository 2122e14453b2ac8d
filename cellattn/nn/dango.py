"""DANGO (Zhang et al. 2020): embeddings that reconstruct networks, fused by attention, read out of each set by HyperSAGNN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._check import count_of, describe, require, unknown
from .._profiling import spanned
from ..graph import MultiGraph
from ..ops._rows import separate
from ..ops.network_mse import network_mses
from ..ops.relational_spmm import relational_spmm
from ._check import read_directly, require_graph, require_perturbations, weight_of
from ._config import keeps_config
from ._rows import draw_rows, sampled_rows_of
from .hypersagnn import HyperSAGNN
from .screening import PooledScreening, require_readable
from .tokens import CellOutput, GeneTokens


class Incoming:
    """The edges of K networks that come in to each gene, to average over; weights of edges are not read."""

    def __init__(self, graph: MultiGraph, relations: Sequence[str], dtype: torch.dtype) -> None:
        n = graph.num_nodes
        self.graph, self.relations = graph, tuple(relations)
        self.everyone = torch.arange(n, device=graph.device), torch.arange(2, device=graph.device) * n
        degree = graph.transpose().colptr.diff().unflatten(0, (-1, n))  # [all relations, N]
        ids = [graph.relation_id(relation) for relation in relations]
        self.scale = torch.stack([degree[r] for r in ids], 1).clamp(min=1).to(dtype).reciprocal()  # [N, K]

    def mean(self, x: Tensor) -> Tensor:
        """[N, K, dim] of x [N, dim], the same in all networks, or [N, K, dim]; zeros for a gene without neighbours."""
        return relational_spmm(
            self.graph, x, *self.everyone, *self.everyone, relations=self.relations, scale=self.scale, sum_relations=False,
            shared=True, transpose=True, weighted=False,
        )  # fmt: skip


class SAGELayer(nn.Module):
    """relu(W_1 mean_j x_j + W_2 x_i + b), the mean over the genes j with an edge to i (GraphSAGE, Hamilton et al. 2017)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.neighbours = nn.Linear(dim, dim)
        self.own = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, graph: MultiGraph, relation: str) -> Tensor:
        """x [N, dim] to [N, dim]; zeros are the mean of a gene without neighbours, and weights of edges are not read."""
        return sage([self], x, Incoming(graph, [relation], x.dtype))[:, 0]


def sage(layers: Sequence[SAGELayer], x: Tensor, incoming: Incoming) -> Tensor:
    """One layer over each of K networks, all at once: x [N, dim] or [N, K, dim] to [N, K, dim]."""
    # [K, dim, dim], [K, 1, dim]
    to_neighbours = [read_directly("neighbours", layer.neighbours) for layer in layers]
    neighbours = torch.stack([layer.weight for layer in to_neighbours])
    own = torch.stack([read_directly("own", layer.own).weight for layer in layers])
    bias = torch.stack([layer.bias for layer in to_neighbours]).unsqueeze(1)
    by_network = x.transpose(0, 1) if x.ndim == 3 else x
    z = torch.baddbmm(bias, incoming.mean(x).transpose(0, 1), neighbours.mT) + by_network @ own.mT
    return F.relu(z).transpose(0, 1)


class NetworkEncoder(nn.Module):
    """Two SAGE layers over one network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SAGELayer(dim) for _ in range(2))


class Decoder(GeneTokens):
    """[w_j ‖ b_j] of every gene j, whose products with [z_i ‖ 1] reconstruct row i of a network.

    They are tokens of the genes: with an embedding table alone, the rows of `nn.Linear(dim, N)`; with features, a function of
    the gene, so that a decoder serves cells of another size too.
    """

    def __init__(self, dim: int, *, num_genes: int | None, feature_dim: int | None) -> None:
        super().__init__(dim + 1, num_genes=num_genes, feature_dim=feature_dim)
        if self.embedding is not None:
            nn.init.zeros_(self.embedding.weight[:, -1].detach())  # biases


@keeps_config
class Dango(nn.Module):
    """Predict sets of perturbed genes from embeddings that are held to gene networks.

        x_i          token of gene i (`GeneTokens`), shared by all networks
        z_i^r        two SAGE layers over network r
        R_r          MSE of w_j^r . z_i^r + b_j^r against A_ij^r over all pairs, zeros weighted by `zero_weight`
        e_i          sum_r softmax_r(MLP(z_i^r)) z_i^r
        y_S          W HyperSAGNN(e_i, i in S) + b

    Pre-training minimises `pretraining_loss` alone. In joint training R_r enters the regularization times its network's weight.
    A_ij is the weight of an edge as the graph has it, so scores of up to 1000 are better scaled, or left out, beforehand.

    With the published size, 64 wide on six networks of 6,607 genes, there are 3.14 million parameters: six decoders of
    65 x 6,607 (2.58 million), the table of 64 x 6,607 (0.42 million), and 0.14 million in all layers together.

    Args:
        dim: width of embeddings and layers.
        relations: the networks, each with the weight of its reconstruction (lambda), finite and at least 0; or their names
            alone, for weights of 1.
        num_genes, feature_dim: see `GeneTokens`; of the tokens and of every decoder.
        zero_weight: what a pair without an edge counts in the reconstruction, where one with an edge counts 1; one number or
            one a network. DANGO has 0.1 where a network gained edges between releases of STRING (neighborhood, coexpression,
            experimental), and 1 elsewhere.
        num_heads, num_layers, max_size: see `HyperSAGNN`.
        out_dim: phenotypes predicted.
        sampled_rows: rows of each network that enter its reconstruction in a training step, drawn anew in each among those with
            an edge: a number, or a fraction in (0, 1] of them. None, and always in evaluation: all rows, which cost about the
            same (`cellattn.network_mse`).

    Attributes:
        weights: dict from a loss's name, "reconstruction/{relation}", to its weight.

    Raises:
        ValueError: a size or weight out of range. TypeError: one of a wrong type.
    """

    def __init__(
        self,
        dim: int = 64,
        *,
        relations: Mapping[str, float] | Sequence[str],
        num_genes: int | None = None,
        feature_dim: int | None = None,
        zero_weight: float | Mapping[str, float] = 0.1,
        num_heads: int = 4,
        num_layers: int = 2,
        out_dim: int = 1,
        max_size: int | None = None,
        sampled_rows: int | float | None = None,
    ) -> None:
        super().__init__()
        dim = count_of("dim", dim, minimum=1)
        out_dim = count_of("out_dim", out_dim, minimum=1)
        sampled_rows = sampled_rows_of(sampled_rows)
        weights = _weights(relations)
        self.relations = tuple(weights)
        self.weights = {f"reconstruction/{relation}": weight for relation, weight in weights.items()}
        self.zero_weight = _zero_weights(zero_weight, self.relations)
        self.sampled_rows = sampled_rows
        self.tokens = GeneTokens(dim, num_genes=num_genes, feature_dim=feature_dim)
        self.encoders = nn.ModuleList(NetworkEncoder(dim) for _ in self.relations)
        self.decoders = nn.ModuleList(Decoder(dim, num_genes=num_genes, feature_dim=feature_dim) for _ in self.relations)
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))
        self.sets = HyperSAGNN(dim, num_heads, num_layers, max_size=max_size)
        self.out = nn.Linear(dim, out_dim)

    @spanned("encoder")
    def encode(self, graph: MultiGraph, *, features: Tensor | None = None, gene_ids: Tensor | None = None) -> dict[str, Tensor]:
        """z^r by network, each [N, dim]; arguments as of `forward`."""
        require_graph(graph)
        x = self.tokens(graph.num_nodes, features, gene_ids)
        incoming = Incoming(graph, self.relations, x.dtype)
        for layers in zip(*(encoder.layers for encoder in self.encoders), strict=True):  # the same layer of all networks
            x = sage(layers, x, incoming)
        return dict(zip(self.relations, x.unbind(1), strict=True))

    def reconstruction(
        self,
        z: Mapping[str, Tensor],
        graph: MultiGraph,
        *,
        features: Tensor | None = None,
        gene_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The losses R_r of what `encode` gave, by their names, without their weights."""
        rows = None
        if self.sampled_rows is not None and self.training:
            rows = list(draw_rows(graph, self.relations, self.sampled_rows, generator).values())
        by_gene = torch.stack([decoder(graph.num_nodes, features, gene_ids) for decoder in self.decoders])  # [K, N, dim + 1]
        losses = network_mses(
            torch.stack([z[relation] for relation in self.relations]).to(by_gene.dtype), by_gene[..., :-1], by_gene[..., -1],
            graph, self.relations, zero_weight=[self.zero_weight[relation] for relation in self.relations], rows=rows,
        )  # fmt: skip
        return dict(zip(self.weights, separate(losses, 0), strict=True))

    def regularization(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The scalar sum of weight * loss: the one place where the weights (lambda) enter."""
        return sum((weight * losses[name] for name, weight in self.weights.items()), next(self.parameters()).new_zeros(()))

    def pretraining_loss(
        self,
        graph: MultiGraph,
        *,
        features: Tensor | None = None,
        gene_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The scalar that pre-training minimises: the weighted reconstruction, no set read; arguments as of `forward`."""
        z = self.encode(graph, features=features, gene_ids=gene_ids)
        losses = self.reconstruction(z, graph, features=features, gene_ids=gene_ids, generator=generator)
        return self.regularization(losses)

    def forward(
        self,
        graph: MultiGraph,
        seeds: Tensor,
        ptr: Tensor,
        types: Tensor,
        *,
        features: Tensor | None = None,
        gene_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> CellOutput:
        """Predict a batch of mutants.

        Args:
            graph: the networks of N genes.
            seeds: int64 [nnz], the perturbed genes of all sets one after another, no gene twice in a set.
            ptr: int64 [B+1], where each set begins and ends in seeds.
            types: int64 [nnz], perturbation types; DANGO knows a set of genes alone, and does not read them.
            features: [N, feature_dim], floating; expected if and only if the model has `feature_dim`.
            gene_ids: int64 [N], the row of each gene in the embedding tables; 0 to N - 1 by default.
            generator: draws the sampled rows.

        Returns:
            `CellOutput`; an empty set is predicted as the bias of the last layer.

        Raises:
            ValueError: a shape, dtype, index or relation that does not fit (values are read on the CPU alone).
        """
        require_graph(graph)
        require_perturbations(seeds, ptr, types, graph.num_nodes, None, graph.device)
        z = self.encode(graph, features=features, gene_ids=gene_ids)
        losses = self.reconstruction(z, graph, features=features, gene_ids=gene_ids, generator=generator)
        return CellOutput(self._read(z, seeds, ptr), losses, self.regularization(losses))

    @torch.no_grad()
    def screening(
        self,
        graph: MultiGraph,
        *,
        phenotype: int = 0,
        dtype: torch.dtype = torch.float32,
        features: Tensor | None = None,
        gene_ids: Tensor | None = None,
    ) -> PooledScreening:
        """The networks encoded once, ready to score sets: see `Screening`. Any type may be given: none is read."""
        z = self.encode(graph, features=features, gene_ids=gene_ids)
        fused = self._fuse(torch.stack(tuple(z.values())))
        require_readable(self, fused, lambda few: self._screening(few, 0, few.dtype), self._predict)
        return self._screening(fused, phenotype, dtype)

    def _screening(self, fused: Tensor, phenotype: int, dtype: torch.dtype) -> PooledScreening:
        return PooledScreening(
            self.sets.screening(fused, dtype), dtype, num_genes=len(fused), out=self.out, phenotype=phenotype
        )

    def _predict(self, fused: Tensor, seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
        return self.out(self.sets(fused[seeds], ptr))[:, 0]

    @spanned("head")
    def _read(self, z: Mapping[str, Tensor], seeds: Tensor, ptr: Tensor) -> Tensor:
        """Predictions [B, out_dim] out of z^r of all networks."""
        # the genes of the sets alone; embedding: the backward of x[seeds] adds in an order that varies from run to run
        of_genes = torch.stack(tuple(z.values()), 1)  # [N, K, dim]
        rows = F.embedding(seeds, of_genes.flatten(1)).unflatten(1, of_genes.shape[1:])
        e = self._fuse(rows.transpose(0, 1))
        return self.out(self.sets(e, ptr))

    def _fuse(self, z: Tensor) -> Tensor:
        """z [K, n, dim] of all networks to one embedding a gene, [n, dim]."""
        return (self.score(z).softmax(0) * z).sum(0)


def _weights(relations: Mapping[str, float] | Sequence[str]) -> dict[str, float]:
    """The weight of each network."""
    if isinstance(relations, str) or not isinstance(relations, Mapping | Sequence):
        raise TypeError(f"relations: expected names of relations, or a dict to their weights, got {describe(relations)}")
    weights = dict(relations) if isinstance(relations, Mapping) else dict.fromkeys(relations, 1.0)
    require(len(weights) > 0, "relations: expected at least one, got none")
    require(len(weights) == len(relations), f"relations: expected each once, got {list(relations)}")
    for relation in weights:
        if not isinstance(relation, str):
            raise TypeError(f"relations: expected names, got {describe(relation)}")
    return {relation: weight_of(f"relations[{relation!r}]", weight) for relation, weight in weights.items()}


def _zero_weights(zero_weight: float | Mapping[str, float], relations: Sequence[str]) -> dict[str, float]:
    """The weight of the zeros of each network."""
    if not isinstance(zero_weight, Mapping):
        return dict.fromkeys(relations, weight_of("zero_weight", zero_weight))
    for relation in zero_weight:
        if relation not in relations:
            unknown("zero_weight relation", relation, relations)
    weights = {relation: weight_of(f"zero_weight[{relation!r}]", weight) for relation, weight in zero_weight.items()}
    missing = [relation for relation in relations if relation not in weights]
    require(not missing, f"zero_weight: expected one a relation, got none for {missing}")
    return weights
