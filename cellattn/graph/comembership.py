"""Genes that share a complex, a reaction or a term as the target of a head, without a matrix of their pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._check import require, require_tensor, tensor_of
from .build import MASS_RANGE
from .rows import unit_of

if TYPE_CHECKING:
    from .multigraph import MultiGraph

_BLOCK = 1 << 22  # entries of rows that are made together


@dataclass(frozen=True, eq=False)
class Comembership:
    """T = D⁻¹ C with C = B W Bᵀ, of a relation B from genes to terms: gene i's row is whom it shares terms with.

    C_ij = sum_e b_ie w_e b_je over the terms e, without the diagonal unless it is asked for, and D its row sums; a gene that
    shares no term has no row. Genes stand for the tokens of the rows' type, terms for those of the columns', whatever they
    are. Made by `MultiGraph.comembership`; what is kept is as long as the tokens, and the rows of T are made when asked for.

    Attributes:
        graph, relation: B, with its weights.
        weight: float64 [terms], W.
        diagonal: whether a gene shares its terms with itself.
        inv_mass: float64 [N], 1 over the row sum of C, 0 for a row of zeros.
        entropy: float64 [N], sum_j t_ij log t_ij (natural log), 0 for a row of zeros.
        loops: float64 [N], sum_e b_ie w_e b_ie of the terms that several genes have, where `diagonal` is False, else 0.
        shared_weight: float64 [N], w_e at term e, 0 at other tokens and, where `diagonal` is False, at terms of one gene.
        key_weight, term_weight: b [entries of B] and `shared_weight`, each over a power of two where some are very large or
            small, so that sums over them are neither.
        share: float64 [N], of each row what its product by these, and by the `scaled` rows of the graph, is multiplied with.
        own_share: float64 [N], `loops` times `inv_mass`.
    """

    graph: MultiGraph
    relation: str
    weight: Tensor
    diagonal: bool
    inv_mass: Tensor
    entropy: Tensor
    loops: Tensor
    shared_weight: Tensor
    key_weight: Tensor
    term_weight: Tensor
    share: Tensor
    own_share: Tensor

    @classmethod
    def of(cls, graph: MultiGraph, relation: str, weight: Any, diagonal: bool) -> Comembership:
        """See `MultiGraph.comembership`."""
        genes, terms = (graph.node_types[end] for end in graph.joins(relation))
        weight = graph.column_weight(relation) if weight is None else check_column_weight(weight, len(terms), graph.device)
        here = graph.select([relation]).to("cpu")  # constants that are the same to the last bit wherever they go
        ptr, col, b = here.rowptr(relation), here.col(relation).long(), here.weight(relation).double()
        shared = b.new_zeros(graph.num_nodes)
        shared[terms.start : terms.stop] = weight.cpu()
        loops = torch.zeros_like(shared)
        if not diagonal:  # a term of one gene is on the diagonal alone: without it, a row of such is one of exact zeros
            shared[col.bincount(minlength=graph.num_nodes) < 2] = 0
            loops = torch.segment_reduce(b * b * shared[col], "sum", offsets=ptr, initial=0)
        inv_mass, entropy = torch.zeros_like(shared), torch.zeros_like(shared)
        of_keys, of_terms = unit_of(b), unit_of(shared)
        share, own_share = torch.zeros_like(shared), torch.zeros_like(shared)
        products = (b / of_keys).to(here.weight(relation).dtype), shared / of_terms, share, own_share
        made = cls(here, relation, weight, diagonal, inv_mass, entropy, loops, shared, *products)
        step = max(_BLOCK // max(len(genes), len(terms), 1), 1)
        for begin in range(genes.start, genes.stop, step):
            rows = torch.arange(begin, min(begin + step, genes.stop), device=here.device)
            c = made._shares(rows)
            mass = c.sum(1)
            _check_mass(relation, rows, mass)
            t = c / mass.clamp_min(MASS_RANGE[0])[:, None]
            inv_mass[rows] = torch.where(mass > 0, mass.reciprocal(), 0)
            entropy[rows] = torch.xlogy(t, t).sum(1)
        unit = here.scaled.unit
        share.copy_(inv_mass * of_keys * of_terms * (1 if unit is None else unit[0]))
        own_share.copy_(inv_mass * loops)
        return cls(graph, relation, weight, diagonal, *(x.to(graph.device) for x in made.constants))

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """All that is made of the graph and the weights, as the constructor takes it."""
        return (
            self.inv_mass, self.entropy, self.loops, self.shared_weight,
            self.key_weight, self.term_weight, self.share, self.own_share,
        )  # fmt: skip

    @property
    def genes(self) -> range:
        """The tokens that have rows and columns in T."""
        return self.graph.node_types[self.graph.joins(self.relation)[0]]

    def rows(self, genes: Tensor) -> Tensor:
        """Rows of T, float64 [R, genes], of R genes by their token (int64 [R])."""
        require_tensor("genes", genes, ndim=1, dtypes=(torch.int64,))
        able = self.genes
        for gene in (int(x) for x in (genes.aminmax() if genes.numel() else ())):
            require(gene in able, f"genes: got token {gene}, expected tokens in [{able.start}, {able.stop})")
        return self._shares(genes) * self.inv_mass[genes, None]

    def _shares(self, rows: Tensor) -> Tensor:
        """Rows of C: B times the weighted terms of each, which are made dense."""
        genes, terms = (self.graph.node_types[end] for end in self.graph.joins(self.relation))
        ptr, col = self.graph.rowptr(self.relation), self.graph.col(self.relation).long()
        b = self.graph.weight(self.relation).double()
        first, degree = ptr[rows], ptr[rows + 1] - ptr[rows]
        row = torch.arange(rows.numel(), device=rows.device).repeat_interleave(degree)
        entry = torch.arange(row.numel(), device=rows.device) + (first - degree.cumsum(0) + degree)[row]
        own = b.new_zeros(len(terms), rows.numel())
        own[col[entry] - terms.start, row] = b[entry] * self.shared_weight[col[entry]]
        here, shape = ptr[genes.start : genes.stop + 1], (len(genes), len(terms))
        members = torch.sparse_csr_tensor(here, col - terms.start, b, shape, device=b.device, check_invariants=False)
        c = (members @ own).t().contiguous()
        if not self.diagonal:
            c[torch.arange(rows.numel(), device=rows.device), rows - genes.start] = 0
        return c

    def __repr__(self) -> str:
        source, target = self.graph.joins(self.relation)
        counted = int((self.inv_mass > 0).sum())
        return f"Comembership({self.relation!r}, {counted} of {len(self.genes)} {source}s share a {target})"


def check_column_weight(weight: Any, num_terms: int, device: torch.device) -> Tensor:
    """W in float64."""
    weight = tensor_of(weight)
    require_tensor("weight", weight, ndim=1)
    require(not (weight.is_complex() or weight.dtype == torch.bool), f"weight: expected numbers, got dtype {weight.dtype}")
    require(weight.numel() == num_terms, f"weight: expected {num_terms}, one a column's token, got {weight.numel()}")
    require(weight.device == device, f"weight: expected device {device} of the graph, got {weight.device}")
    weight = weight.detach().double()
    wrong = ~(torch.isfinite(weight) & (weight >= 0))
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(f"weight: position {position} holds {float(weight[position])}, expected a finite weight >= 0")
    return weight


def _check_mass(relation: str, rows: Tensor, mass: Tensor) -> None:
    low, high = MASS_RANGE
    wrong = (mass != 0) & ~((mass >= low) & (mass <= high))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        row, total = int(rows[at]), float(mass[at])
        raise ValueError(f"weight: what {relation!r} shares in row {row} adds to {total}, expected a sum in [{low}, {high}]")
