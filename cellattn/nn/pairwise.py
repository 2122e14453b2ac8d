"""The pairwise interaction model: single effects of the perturbed genes, and one term for every pair of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._check import counts_of
from ..graph import MultiGraph
from ..ops.set_pairs import set_pairs
from ..ops.set_sum import set_sum
from ._check import max_size_of, probability_of, require_graph, require_perturbations
from ._config import keeps_config
from .perturbation import PerturbationFeatures
from .screening import PairwiseScreening, of_all_types, require_readable
from .tokens import CellOutput, GeneTokens


class PairSum(nn.Module):
    """Sum over the pairs i < j of a set of MLP([u_i + u_j ‖ u_i * u_j]), which is symmetric; zeros where there is no pair."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int, *, dropout: float = 0.0, max_size: int | None = None) -> None:
        super().__init__()
        self.max_size = max_size
        self.mlp = nn.Sequential(nn.Linear(2 * dim, hidden_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_dim, out_dim))

    def forward(self, u: Tensor, ptr: Tensor) -> Tensor:
        """u [nnz, dim], ptr int64 [B+1] -> [B, out_dim], at least float32."""
        pairs = set_pairs(ptr, u.shape[0], self.max_size)
        # embedding: the backward of u[first] adds in an order that varies from run to run
        first, second = F.embedding(pairs.first, u), F.embedding(pairs.second, u)
        return pairs.sum(_at_least_float32(self.mlp(torch.cat([first + second, first * second], dim=-1))))


@keeps_config
class PairwiseInteraction(nn.Module):
    """Predict sets of perturbed genes as single effects and pairwise interactions of the genes' latents; graphs are not read.

        u_e   = phi(x_i, m_i)                 for entry e of S: token x_i of gene i (`GeneTokens`) under perturbation type m_i
        y_S   = b + sum_e w . u_e + sum_{e < f} MLP([u_e + u_f ‖ u_e * u_f])

    with phi of `PerturbationHead`. A set of one gene has no pairs, and an empty one is predicted as b.

    Args:
        dim: width of tokens and latents.
        num_types: number of perturbation types.
        num_genes, feature_dim: see `GeneTokens`.
        hidden_dim: hidden width of phi and of the MLP; `2 * dim` by default.
        out_dim: phenotypes predicted.
        dropout: probability in the hidden layer of the MLP.
        max_size: no set has more genes. Without, every call on a GPU waits until the number of pairs is known, and the model
            can neither be compiled as one graph nor captured in a CUDA graph.

    Raises:
        ValueError: a size out of range. TypeError: one of a wrong type.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_types: int,
        num_genes: int | None = None,
        feature_dim: int | None = None,
        hidden_dim: int | None = None,
        out_dim: int = 1,
        dropout: float = 0.1,
        max_size: int | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = 2 * dim if hidden_dim is None else hidden_dim
        dim, num_types, hidden_dim, out_dim = counts_of(
            minimum=1, dim=dim, num_types=num_types, hidden_dim=hidden_dim, out_dim=out_dim
        )
        dropout = probability_of("dropout", dropout)
        max_size = max_size_of(max_size)
        self.num_types = num_types
        self.tokens = GeneTokens(dim, num_genes=num_genes, feature_dim=feature_dim)
        self.phi = PerturbationFeatures(dim, num_types, hidden_dim)
        self.single = nn.Linear(dim, out_dim, bias=False)
        self.pair = PairSum(dim, hidden_dim, out_dim, dropout=dropout, max_size=max_size)
        self.bias = nn.Parameter(torch.zeros(out_dim))

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
            graph: of N genes; its edges are not read.
            seeds: int64 [nnz], the perturbed genes of all sets one after another, no gene twice in a set.
            ptr: int64 [B+1], where each set begins and ends in seeds.
            types: int64 [nnz], perturbation types.
            features: [N, feature_dim], floating; expected if and only if the model has `feature_dim`.
            gene_ids: int64 [N], the row of each gene in the embedding table; 0 to N - 1 by default.
            generator: not read: nothing is drawn.

        Returns:
            `CellOutput`, without losses.

        Raises:
            ValueError: a shape, dtype or index that does not fit, or a set of more than `max_size` genes (values are read on
                the CPU alone).
        """
        require_graph(graph)
        require_perturbations(seeds, ptr, types, graph.num_nodes, self.num_types, graph.device)
        x = self.tokens(graph.num_nodes, features, gene_ids)
        return CellOutput(self._read(x, seeds, ptr, types), {}, self.bias.new_zeros(()))

    def _read(self, x: Tensor, seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
        u = self.phi(F.embedding(seeds, x), types)
        single = set_sum(_at_least_float32(self.single(u)), ptr)
        return self.bias + single + self.pair(u, ptr)

    @torch.no_grad()
    def screening(
        self,
        graph: MultiGraph,
        *,
        phenotype: int = 0,
        dtype: torch.dtype = torch.float32,
        features: Tensor | None = None,
        gene_ids: Tensor | None = None,
    ) -> PairwiseScreening:
        """Ready to score sets: see `Screening`."""
        require_graph(graph)
        x = self.tokens(graph.num_nodes, features, gene_ids)
        require_readable(self, x, lambda few: self._screening(few, 0, x.dtype), lambda *given: self._read(*given)[:, 0])
        return self._screening(x, phenotype, dtype)

    def _screening(self, x: Tensor, phenotype: int, dtype: torch.dtype) -> PairwiseScreening:
        u = of_all_types(self.phi, x, self.num_types)
        return PairwiseScreening(
            u, dtype, num_genes=len(x), num_types=self.num_types, single=self.single.weight, bias=self.bias,
            layers=self.pair.mlp, phenotype=phenotype,
        )  # fmt: skip


def _at_least_float32(x: Tensor) -> Tensor:
    """For sums that 16 bits would round at every step."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
