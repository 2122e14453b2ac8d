"""What a deletion changes in the encoded cell: h(F(G) - F(G \\ S)) with F a graph network over all relations.

Every layer of F has one form. Gene j sends m_rj along relation r, and gene i adds up what arrives to what it keeps of its own:

    t_i  = own(x_i) + sum_r c_ri sum_j A^r_ij w^r_ij m_rj          x'_i = update(t_i)

Sums run over the genes that are there: all, all but S, or a neighbourhood. So the modes of `WildtypeDifference` are one
product, `relational_spmm`, between different lists of genes.

The difference alone. Let V_l be the genes within l hops of S over any relation, against the edges: V_0 = S, and after l layers
only genes of V_l can differ between G and G \\ S. With d_rj = (message of j in G \\ S, none if j is in S) - m_rj,

    t'_i = t_i + (own(x'_i) - own(x_i)) + sum_r c'_ri sum_{j in V_(l-1)} A^r_ij w^r_ij d_rj
               + sum_r (c'_ri - c_ri) sum_j A^r_ij w^r_ij m_rj                                     for i in V_l

where the second line is there for means alone, at the genes of V_1, which lose neighbours; sums without a prime are those of G.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from .._check import count_of, counts_of, require, require_choice, require_several, unknown
from .._profiling import spanned
from ..graph import MultiGraph
from ..ops import khop_mask
from ..ops.relational_spmm import relational_degree, relational_spmm
from ..ops.set_sum import set_sum
from ._check import phenotype_of, probability_of, read_by, require_graph, require_perturbations
from ._config import keeps_config
from .relational_conv import GATConv, GINConv, RelationalConv, SAGEConv
from .screening import CalledScreening, values_dtype
from .tokens import CellOutput, GeneTokens

MODES = ("lazy", "khop", "delta")
READOUTS = ("sum", "mean")
CONVS = ("sage", "gin", "gat")


class Genes(NamedTuple):
    """A list of genes a sample, ascending: sample b has gene[ptr[b] : ptr[b + 1]]."""

    gene: Tensor  # int64 [V]
    ptr: Tensor  # int64 [B + 1]

    @classmethod
    def everyone(cls, num_sets: int, num_genes: int, device: torch.device) -> Genes:
        """All genes in every sample."""
        one = torch.arange(num_genes, device=device)
        return cls(one.repeat(num_sets), torch.arange(num_sets + 1, device=device) * num_genes)


class Subset(NamedTuple):
    """A list of genes a sample, and the mask bool [B, N] that it is made of."""

    genes: Genes
    at: Tensor  # int64 [V]: of each, among the B * N genes of all samples
    mask: Tensor

    @classmethod
    def of(cls, *masks: Tensor) -> list[Subset]:
        """The genes of each mask. How many there are is waited for twice, however many masks there are."""
        stacked = torch.stack(masks)  # [M, B, N]
        of_sample = stacked.sum(2)
        entry = stacked.flatten().nonzero().squeeze(1)
        sizes = of_sample.sum(1).tolist()
        ptr = F.pad(of_sample.cumsum(1), (1, 0))
        num_nodes, per_mask = stacked.shape[2], stacked[0].numel()
        subsets = []
        for m, (mask, found) in enumerate(zip(masks, entry.split(sizes), strict=True)):
            at = found - m * per_mask
            subsets.append(cls(Genes(at % num_nodes, ptr[m]), at, mask))
        return subsets

    def among(self, other: Subset) -> Tensor:
        """Where each of its genes stands in the list of another, of which it is a part."""
        return (other.mask.flatten().cumsum(0) - 1).index_select(0, self.at)


class Wildtype(NamedTuple):
    """F(G) layer by layer, which all samples share: `x` has one more than there are layers, the tokens first."""

    x: tuple[Tensor, ...]  # [N, dim]
    sums: tuple[Tensor, ...]  # what comes in, [N, C], or by relation where F averages, [N, K, C]
    total: tuple[Tensor, ...]  # t [N, C]
    degree: Tensor | None  # int32 [N, K], where F averages
    scale: Tensor | None  # c = 1 / degree


class _Means:
    """1 / degree of every gene in G, c, and of those of V_1 in G \\ S, c', which lose neighbours there.

    Made of degree int32 [N, K] in G and c, and, for the genes `first` of V_1, the edges lost int32 [V_1, K].
    """

    def __init__(self, degree: Tensor, scale: Tensor, first: Tensor, lost: Tensor) -> None:
        dtype = scale.dtype
        self.scale = scale  # c [N, K]
        self.scale_first = _inverse(degree[first] - lost, dtype)  # c' [V_1, K]
        row, relation = lost.nonzero(as_tuple=True)  # few: a gene next to S is so in one relation or two
        self._entry = first[row] * degree.shape[1] + relation
        self._change = (self.scale_first - self.scale[first])[row, relation].unsqueeze(-1)  # c' - c
        self._ptr = F.pad((lost > 0).sum(1).cumsum(0), (1, 0))

    def lost(self, sums: Tensor) -> Tensor:
        """sum_r (c'_ri - c_ri) s_ri [V_1, C]."""
        return set_sum(F.embedding(self._entry, sums.flatten(0, 1)) * self._change, self._ptr).to(sums.dtype)


@keeps_config
class WildtypeDifference(nn.Module):
    """Predict the phenotype of each deletion from what it changes in the encoded cell.

        z_S = sum_i (F(G)_i - [i not in S] F(G \\ S)_i)
        y_S = MLP([z_S ‖ sum_{i in S} t_(type of i)])

    F has `num_layers` layers over all relations, and no dropout inside, so that the modes agree in training too. G \\ S is the
    cell without the genes of S and their edges: every perturbation is a deletion to F, whatever its type. The type enters by
    its embedding t alone, which says what else is known. An empty set has z = 0.

    Modes, of one set of weights:
        "lazy": F on all genes but S of each sample. G is encoded once a call.
        "khop": F on the genes within `num_hops` of S and the edges between them, with S and without it, and i runs over these
            genes. They are those of `khop_subgraph`: direction "in", traversal "per_relation", over all the graph's relations.
            Other than in "lazy", no message comes in from outside, so that genes at the rim add up fewer neighbours, in both
            terms; and changes that leave the neighbourhood are not seen. Where it is everything, the modes are equal.
            F(G) is encoded on the neighbourhood too: against F(G) of the whole cell, encoded once, z would hold the edges cut
            off at the rim, which the deletion has no part in and which outnumber those it removes.
        "delta": equal to "lazy", of which it computes what can differ alone (see the module's docstring): the fastest.

    Args:
        dim: width of the genes' vectors.
        num_layers: layers of F, at least 1.
        relations: names of the relations that F reads.
        num_types: number of perturbation types (`len(cellattn.data.PERTURBATION_TYPES)`).
        conv: "sage", "gin" or "gat", see `SAGEConv`, `GINConv` and `GATConv`.
        mode: see above.
        num_hops: of mode "khop", at least 1; `num_layers` by default. Of no other mode.
        num_genes, feature_dim: see `GeneTokens`.
        num_heads: heads of "gat", a divisor of dim.
        hidden_dim: hidden width of the MLP; `2 * dim` by default.
        out_dim: phenotypes predicted.
        readout: "sum", or "mean": z divided by N, in every mode.
        dropout: probability in the hidden layer of the MLP.

    Raises:
        ValueError: a size, name or choice out of range. TypeError: one of a wrong type.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        *,
        relations: Sequence[str],
        num_types: int,
        conv: str = "sage",
        mode: str = "lazy",
        num_hops: int | None = None,
        num_genes: int | None = None,
        feature_dim: int | None = None,
        num_heads: int = 4,
        hidden_dim: int | None = None,
        out_dim: int = 1,
        readout: str = "sum",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        hidden_dim = 2 * dim if hidden_dim is None else hidden_dim
        dim, num_layers, num_types = counts_of(minimum=1, dim=dim, num_layers=num_layers, num_types=num_types)
        num_heads, hidden_dim, out_dim = counts_of(minimum=1, num_heads=num_heads, hidden_dim=hidden_dim, out_dim=out_dim)
        require_choice("conv", conv, CONVS)
        require_choice("mode", mode, MODES)
        require_choice("readout", readout, READOUTS)
        dropout = probability_of("dropout", dropout)
        if conv == "gat":
            require(dim % num_heads == 0, f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        if num_hops is not None:
            require(mode == "khop", f"num_hops: expected None in mode {mode!r}, which has no neighbourhood, got {num_hops}")
            num_hops = count_of("num_hops", num_hops, minimum=1)
        require_several("relations", relations)
        require(len(relations) > 0, "relations: expected at least one, got none")
        require(len(set(relations)) == len(relations), f"relations: expected each once, got {tuple(relations)}")
        self.relations = tuple(relations)
        self.mode, self.readout, self.num_types = mode, readout, num_types
        self.num_hops = num_layers if num_hops is None else num_hops
        self.tokens = GeneTokens(dim, num_genes=num_genes, feature_dim=feature_dim)
        self.convs = nn.ModuleList(_conv(conv, dim, len(self.relations), num_heads) for _ in range(num_layers))
        self.by_type = nn.Embedding(num_types, dim)
        nn.init.normal_(self.by_type.weight, std=dim**-0.5)
        self.mlp = nn.Sequential(nn.Linear(2 * dim, hidden_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_dim, out_dim))

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
            graph: the gene graphs of N genes, the model's relations among them.
            seeds: int64 [nnz], the perturbed genes of all sets one after another, no gene twice in a set.
            ptr: int64 [B+1], where each set begins and ends in seeds.
            types: int64 [nnz], perturbation types.
            features: [N, feature_dim], floating; expected if and only if the model has `feature_dim`.
            gene_ids: int64 [N], the row of each gene in the embedding table; 0 to N - 1 by default.
            generator: not used, nothing is sampled.

        Returns:
            `CellOutput` with no losses.

        Raises:
            ValueError: a shape, dtype, index or relation that does not fit (values are read on the CPU alone).
            TypeError: an argument of a wrong type.
            ImportError, NotImplementedError: the extension was not built, or not for the graph's device; under torch.export.
        """
        if torch.compiler.is_exporting() or isinstance(seeds, FakeTensor):
            raise NotImplementedError(
                "cellattn.nn.WildtypeDifference: torch.export and fake tensors are not supported, since the genes that a set "
                "reaches are found by value; save its state_dict, or use torch.compile, which breaks the graph there"
            )
        self._require_relations(graph)
        require_perturbations(seeds, ptr, types, graph.num_nodes, self.num_types, graph.device)
        x = self.tokens(graph.num_nodes, features, gene_ids)
        z = self._difference(graph, x, seeds, ptr)
        if self.readout == "mean":
            z = z / graph.num_nodes
        return CellOutput(self._read(z, ptr, types), {}, x.new_zeros(()))

    def encode(self, graph: MultiGraph, *, features: Tensor | None = None, gene_ids: Tensor | None = None) -> Tensor:
        """F(G), [N, dim], of the cell as it is; arguments as of `forward`."""
        self._require_relations(graph)
        x = self.tokens(graph.num_nodes, features, gene_ids)
        return self._encode(graph, x, Genes.everyone(1, graph.num_nodes, x.device))

    @torch.no_grad()
    def screening(
        self,
        graph: MultiGraph,
        *,
        phenotype: int = 0,
        dtype: torch.dtype = torch.float32,
        features: Tensor | None = None,
        gene_ids: Tensor | None = None,
    ) -> CalledScreening:
        """See `Screening`: F(G) is encoded once, and a set costs what its deletion changes. Products are float32 at least.

        Raises:
            NotImplementedError: in mode "khop", where each set has a cell of its own.
        """
        if self.mode == "khop":
            raise NotImplementedError("mode: khop shares nothing between sets")
        self._require_relations(graph)
        phenotype = phenotype_of(phenotype, [x for x in self.mlp.modules() if isinstance(x, nn.Linear)][-1].out_features)
        tokens = self.tokens(graph.num_nodes, features, gene_ids)
        # G in the dtype of G \ S: what does not differ then cancels to the bit
        model = copy.deepcopy(self).to(values_dtype(dtype))
        wildtype = model._wildtype(graph, tokens.to(values_dtype(dtype)))
        size = graph.num_nodes if self.readout == "mean" else 1

        def predict(seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
            return model._read(model._delta(graph, wildtype, seeds, ptr) / size, ptr, types)[:, phenotype]

        return CalledScreening(predict, num_genes=graph.num_nodes, num_types=self.num_types, batch_size=64)

    def _require_relations(self, graph: Any) -> None:
        require_graph(graph)
        for name in self.relations:
            if name not in graph.relations:
                unknown("graph: relation of the model", name, graph.relations)

    @spanned("encoder")
    def _difference(self, graph: MultiGraph, x: Tensor, seeds: Tensor, ptr: Tensor) -> Tensor:
        if self.mode == "delta":
            return self._delta(graph, self._wildtype(graph, x), seeds, ptr)
        return self._both(graph, x, seeds, ptr)

    @spanned("head")
    def _read(self, z: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
        # embedding: the backward of an index adds in an order that varies from run to run on several CPU threads
        by_type = set_sum(self.by_type(types), ptr)
        return self.mlp(torch.cat([read_by(by_type, z), by_type], dim=-1))

    @property
    def _layers(self) -> list[RelationalConv]:
        """Or what is wrapped around them, by checkpointing or torch.compile, which passes their methods on."""
        return cast("list[RelationalConv]", list(self.convs))

    # ------------------------------------------------------------------------------------------------ lazy and khop

    def _both(self, graph: MultiGraph, x: Tensor, seeds: Tensor, ptr: Tensor) -> Tensor:
        """z [B, dim] from F with S and without, of tokens x [N, dim]."""
        gone = khop_mask(graph, seeds, ptr, 0)
        if self.mode == "lazy":
            wildtype = self._encode(graph, x, Genes.everyone(1, graph.num_nodes, x.device))
            kept, deleted = Subset.of(~gone, gone)
            place_kept, place_deleted = kept.genes.gene, deleted.genes.gene
        else:
            there = khop_mask(graph, seeds, ptr, self.num_hops)
            cell, kept, deleted = Subset.of(there, there & ~gone, gone)
            wildtype = self._encode(graph, x, cell.genes)
            place_kept, place_deleted = kept.among(cell), deleted.among(cell)
        change = F.embedding(place_kept, wildtype).sub_(self._encode(graph, x, kept.genes))
        return _total(change, kept.genes) + _total(F.embedding(place_deleted, wildtype), deleted.genes)

    def _encode(self, graph: MultiGraph, x: Tensor, genes: Genes) -> Tensor:
        """F [V, dim] of a cell of these genes a sample, each of which starts as its token x [N, dim]."""
        scale = _inverse(self._degree(graph, genes, genes), x.dtype) if self.averages else None
        for layer, conv in enumerate(self._layers):
            shared = layer == 0  # what a gene sends and keeps is still the same in all samples
            own = F.embedding(genes.gene, conv.own(x)) if shared else conv.own(x)
            x = conv.update(own + self._product(graph, conv.send(x), genes, genes, scale=scale, shared=shared))
        return x

    # ------------------------------------------------------------------------------------------------ delta

    def _wildtype(self, graph: MultiGraph, x: Tensor) -> Wildtype:
        """F(G) of tokens x [N, dim]."""
        everyone = Genes.everyone(1, graph.num_nodes, x.device)
        degree = self._degree(graph, everyone, everyone) if self.averages else None
        scale = None if degree is None else _inverse(degree, x.dtype)
        outputs, by_layer, totals = [x], [], []
        for conv in self._layers:
            sums = self._product(graph, conv.send(x), everyone, everyone, sum_relations=scale is None, shared=True)
            total = conv.own(x) + (sums if scale is None else torch.einsum("nk,nkc->nc", scale, sums))
            x = conv.update(total)
            outputs.append(x)
            by_layer.append(sums)
            totals.append(total)
        return Wildtype(tuple(outputs), tuple(by_layer), tuple(totals), degree, scale)

    def _delta(self, graph: MultiGraph, wildtype: Wildtype, seeds: Tensor, ptr: Tensor) -> Tensor:
        """z [B, dim] from the propagated difference; V_l, t and c as in the module's docstring."""
        num_layers = len(self.convs)
        masks = [khop_mask(graph, seeds, ptr, hops, traversal="mixed") for hops in range(num_layers + 1)]
        subsets = Subset.of(*masks, *(mask & ~masks[0] for mask in masks))
        within, left = subsets[: num_layers + 1], subsets[num_layers + 1 :]  # V_l, and those of them that are in G \ S
        deleted, first = within[0].genes, left[1]
        means = None
        if wildtype.degree is not None and wildtype.scale is not None:
            lost = self._degree(graph, deleted, first.genes)
            means = _Means(wildtype.degree, wildtype.scale, first.genes.gene, lost)
        x = wildtype.x[0]
        old = new = x.new_zeros(0, x.shape[1])  # x and x' of the genes left in V_l: none in V_0
        for layer, conv in enumerate(self._layers):
            source, target, before = within[layer], left[layer + 1], left[layer]
            own_change = conv.own(new) - conv.own(old)
            old = F.embedding(source.genes.gene, x)
            new = torch.zeros_like(old).index_copy(0, before.among(source), new)
            stays = before.mask.flatten().index_select(0, source.at)
            sent_change = conv.sent_change(new, old, stays)

            in_first = first.among(target)
            scale = None if means is None else means.scale[target.genes.gene].index_copy_(0, in_first, means.scale_first)
            # from here on in place, and each place once: no order of additions to vary; not in what an op made, which selective
            # activation checkpointing may keep
            changed = F.embedding(target.genes.gene, wildtype.total[layer])
            changed.add_(self._product(graph, sent_change, source.genes, target.genes, scale=scale))
            changed.index_add_(0, before.among(target), own_change)
            if means is not None:
                changed.index_add_(0, in_first, means.lost(wildtype.sums[layer]))
            x, new = wildtype.x[layer + 1], conv.update(changed)
            old = F.embedding(target.genes.gene, x)
        return _total(old.sub_(new), target.genes) + _total(F.embedding(deleted.gene, x), deleted)

    # ------------------------------------------------------------------------------------------------ the two products

    @property
    def averages(self) -> bool:
        """Whether F averages over neighbours."""
        return any(conv.averages for conv in self.convs)

    def _degree(self, graph: MultiGraph, source: Genes, target: Genes) -> Tensor:
        """int32 [Vt, K]: the edges of each relation from targets to sources of their sample."""
        return relational_degree(graph, *source, *target, relations=self.relations)

    def _product(
        self,
        graph: MultiGraph,
        messages: Tensor,
        source: Genes,
        target: Genes,
        *,
        scale: Tensor | None = None,
        sum_relations: bool = True,
        shared: bool = False,
    ) -> Tensor:
        """Messages [Vs, K, C] (shared by all samples: [N, K, C]), times scale [Vt, K], added up: [Vt, C], or [Vt, K, C]."""
        return relational_spmm(
            graph, messages, *source, *target,
            relations=self.relations, scale=scale, sum_relations=sum_relations, shared=shared,
        )  # fmt: skip


def _conv(kind: str, dim: int, num_relations: int, num_heads: int) -> RelationalConv:
    if kind == "gat":
        return GATConv(dim, num_relations, num_heads)
    return (SAGEConv if kind == "sage" else GINConv)(dim, num_relations)


def _total(x: Tensor, genes: Genes) -> Tensor:
    """The sum [B, C] over the genes of each sample of x [V, C], in at least float32: it may run over thousands of genes."""
    return set_sum(x.to(torch.promote_types(x.dtype, torch.float32)), genes.ptr)


def _inverse(degree: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / degree, and 0 for 0."""
    return torch.where(degree > 0, degree.to(dtype).reciprocal(), 0)
