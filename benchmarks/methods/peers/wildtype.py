"""`WildtypeDifference` as users of PyG write it: a subgraph or masks for every sample, a batch of `HeteroData`, `HeteroConv`.

The model is ours in its parameters and its meaning, so that predictions can be compared; what differs is how it is computed.
"lazy" is the whole graph for every sample, without the edges of the deleted genes; "khop" is the neighbourhood that
`khop_peers.PyG` extracts. A message is stored for every edge: at the published size, 2,482,833 a sample. This module needs PyG.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, HeteroData
from torch_geometric.nn import GINConv, HeteroConv, SAGEConv, global_add_pool
from torch_geometric.utils import scatter, softmax

from cellattn import MultiGraph
from cellattn.data import PerturbationBatch
from cellattn.nn import WildtypeDifference, relational_conv

from ...khop import peers as khop_peers

_GENE = "gene"
EdgeIndex = dict[tuple[str, str, str], Tensor]


class PyG(nn.Module):
    """`WildtypeDifference` in mode "lazy" or "khop" by PyG, on a copy of the layers' parameters; of unweighted graphs.

        peer = PyG(model, graph)
        prediction = peer(peer.load(batch), batch)          # loading, and the model

    Args:
        model: ours; its tokens, type embeddings and MLP are shared, and its layers copied. "delta" is done as "lazy".
        graph: the gene graphs, on the model's device; edges without weights, since PyG's SAGEConv and GINConv take none.

    Raises:
        ValueError: a weight that is not 1.
    """

    def __init__(self, model: WildtypeDifference, graph: MultiGraph) -> None:
        super().__init__()
        for name in model.relations:
            if not (graph.weight(name) == 1).all():
                raise ValueError(f"graph: expected weights of 1, got others in {name!r}")
        self.model = model
        self.layers = nn.ModuleList(_layer(conv, model.relations) for conv in model.convs)
        self._num_nodes = graph.num_nodes
        self._neighbourhoods = khop_peers.PyG(graph) if model.mode == "khop" else None
        # messages go from edge_index[0] to edge_index[1], and ours from column to row
        self._edges = {name: graph.edge_index(name).flip(0) for name in model.relations}
        self._wildtype = HeteroData()
        self._wildtype[_GENE].num_nodes = graph.num_nodes
        for name, edges in self._edges.items():
            self._wildtype[_GENE, name, _GENE].edge_index = edges

    def load(self, batch: PerturbationBatch) -> Any:
        """The batch of `HeteroData`: of every gene `n_id` and `pert_mask`."""
        if self._neighbourhoods is not None:
            data = self._neighbourhoods(batch.seeds, batch.ptr, self.model.num_hops)
            for name in self.model.relations:
                data[_GENE, name, _GENE].edge_index = data[_GENE, name, _GENE].edge_index.flip(0)
            return data
        return Batch.from_data_list([self._masked(batch.seeds[i:j]) for i, j in pairwise(batch.ptr.tolist())])

    def forward(
        self, data: Any, batch: PerturbationBatch, *, features: Tensor | None = None, gene_ids: Tensor | None = None
    ) -> Tensor:
        """Predictions [B, out_dim] of what `load` gave."""
        tokens = self.model.tokens(self._num_nodes, features, gene_ids)
        genes = data[_GENE]
        kept = ~genes.pert_mask
        x = tokens[genes.n_id]
        if self._neighbourhoods is None:  # encoded once
            of_wildtype = self._encode(tokens, self._wildtype.edge_index_dict)[genes.n_id]
            deleted = self._encode(x, data.edge_index_dict)
        else:
            of_wildtype = self._encode(x, data.edge_index_dict)
            deleted = self._encode(x, {k: e[:, kept[e].all(0)] for k, e in data.edge_index_dict.items()})
        change = of_wildtype - deleted * kept.unsqueeze(-1)
        z = global_add_pool(change, genes.batch, size=len(batch))
        if self.model.readout == "mean":
            z = z / self._num_nodes
        sample = torch.arange(len(batch), device=z.device).repeat_interleave(batch.ptr.diff())
        by_type = scatter(self.model.by_type(batch.types), sample, dim_size=len(batch), reduce="sum")
        return self.model.mlp(torch.cat([z, by_type], dim=-1))

    def _masked(self, seeds: Tensor) -> HeteroData:
        """All genes, and the edges that stay when some are deleted."""
        sample = HeteroData()
        every = torch.arange(self._num_nodes, device=seeds.device)
        gone = torch.isin(every, seeds)
        sample[_GENE].n_id, sample[_GENE].num_nodes, sample[_GENE].pert_mask = every, len(every), gone
        for name, edges in self._edges.items():
            sample[_GENE, name, _GENE].edge_index = edges[:, ~gone[edges].any(0)]
        return sample

    def _encode(self, x: Tensor, edge_index: EdgeIndex) -> Tensor:
        for layer in self.layers:
            x = layer(x, {(_GENE, name, _GENE): edge_index[_GENE, name, _GENE] for name in self.model.relations})
        return x


class _SAGE(nn.Module):
    """A `SAGEConv` a relation, their sum, and what a gene keeps of its own."""

    def __init__(self, conv: relational_conv.SAGEConv, relations: Sequence[str]) -> None:
        super().__init__()
        convs = []
        for weight in _by_relation(conv, relations):
            convs.append(SAGEConv(len(weight), len(weight), aggr="mean", root_weight=False, bias=False))
            convs[-1].lin_l.weight = weight
        self.by_relation = _hetero(relations, convs)
        self.own, self.norm = copy.deepcopy(conv.own_weight), copy.deepcopy(conv.norm)

    def forward(self, x: Tensor, edge_index: EdgeIndex) -> Tensor:
        return F.relu(self.norm(self.own(x) + self.by_relation({_GENE: x}, edge_index)[_GENE]))


class _GIN(nn.Module):
    """A `GINConv` a relation, of a linear map each, and one MLP on from their sum."""

    def __init__(self, conv: relational_conv.GINConv, relations: Sequence[str]) -> None:
        super().__init__()
        convs = []
        for weight, eps in zip(_by_relation(conv, relations), conv.eps.tolist(), strict=True):
            linear = nn.Linear(len(weight), len(weight), bias=False)
            convs.append(GINConv(linear, eps=eps, train_eps=True).to(weight))  # which draws the weight anew
            linear.weight = weight
        self.by_relation = _hetero(relations, convs)
        self.bias = nn.Parameter(conv.bias.detach().clone())
        self.norm, self.out = copy.deepcopy(conv.norm), copy.deepcopy(conv.out)

    def forward(self, x: Tensor, edge_index: EdgeIndex) -> Tensor:
        return self.out(F.relu(self.norm(self.by_relation({_GENE: x}, edge_index)[_GENE] + self.bias)))


class _GAT(nn.Module):
    """`softmax` and `scatter` over the edges of all relations and a self-loop a gene; PyG has no layer that is the same."""

    def __init__(self, conv: relational_conv.GATConv, relations: Sequence[str]) -> None:
        super().__init__()
        self.relations = tuple(relations)
        self.linear = nn.ParameterList([nn.Parameter(conv.own_weight.weight.detach().clone()), *_by_relation(conv, relations)])
        self.score = nn.Parameter(torch.cat([conv.own_score, conv.score]).detach().clone())  # [1 + K, H, D]
        self.norm = copy.deepcopy(conv.norm)

    def forward(self, x: Tensor, edge_index: EdgeIndex) -> Tensor:
        every = torch.arange(len(x), device=x.device)
        edges = [torch.stack([every, every]), *(edge_index[_GENE, name, _GENE] for name in self.relations)]
        values, scores = [], []
        for (source, _), weight, score in zip(edges, self.linear, self.score, strict=True):
            y = F.linear(x, weight).unflatten(-1, score.shape)
            s = (y * score).sum(-1)
            values.append(y[source])
            scores.append((relational_conv.SCORE_CAP * torch.tanh(s / relational_conv.SCORE_CAP))[source])
        target = torch.cat([ends[1] for ends in edges])
        alpha = softmax(torch.cat(scores), target, num_nodes=len(x))
        total = scatter(alpha.unsqueeze(-1) * torch.cat(values), target, dim_size=len(x), reduce="sum")
        return F.relu(self.norm(total.flatten(1)))


def _layer(conv: nn.Module, relations: Sequence[str]) -> nn.Module:
    if isinstance(conv, relational_conv.SAGEConv):
        return _SAGE(conv, relations)
    if isinstance(conv, relational_conv.GINConv):
        return _GIN(conv, relations)
    assert isinstance(conv, relational_conv.GATConv)
    return _GAT(conv, relations)


def _by_relation(conv: nn.Module, relations: Sequence[str]) -> list[nn.Parameter]:
    """A copy of each relation's matrix."""
    return [nn.Parameter(part.detach().clone()) for part in conv.get_parameter("message.weight").chunk(len(relations))]


def _hetero(relations: Sequence[str], convs: Sequence[nn.Module]) -> HeteroConv:
    return HeteroConv({(_GENE, name, _GENE): conv for name, conv in zip(relations, convs, strict=True)}, aggr="sum")


def predict(
    model: WildtypeDifference,
    graph: MultiGraph,
    batch: PerturbationBatch,
    *,
    features: Tensor | None = None,
    gene_ids: Tensor | None = None,
) -> Tensor:
    """What `model` predicts, [B, out_dim], by PyG from beginning to end."""
    peer = PyG(model, graph)
    return peer(peer.load(batch), batch, features=features, gene_ids=gene_ids)
