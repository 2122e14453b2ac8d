"""The models of sets again, as plain dense PyTorch and Python loops over sets, on the parameters of the modules."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from cellattn import MultiGraph
from cellattn.nn import Dango, GeneTokens, PairwiseInteraction
from cellattn.nn.dango import Decoder, NetworkEncoder, SAGELayer

from .dense import adjacency, hypersagnn, phi


def tokens(module: GeneTokens, ids: Tensor, features: Tensor | None) -> Tensor:
    """One-hot ids times the table, plus projected features."""
    parts = []
    if module.embedding is not None:
        table = module.embedding.weight
        parts.append(F.one_hot(ids, len(table)).to(table.dtype) @ table)
    if module.project_features is not None:
        assert features is not None
        parts.append(features @ module.project_features.weight.T + module.project_features.bias)
    return torch.stack(parts).sum(0)


def dango(
    model: Dango, graph: MultiGraph, seeds: Tensor, ptr: Tensor, features: Tensor | None = None, gene_ids: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(prediction, losses, regularization) of `Dango` on all rows, with N x N adjacencies and reconstructions."""
    ids = torch.arange(graph.num_nodes) if gene_ids is None else gene_ids
    x = tokens(model.tokens, ids, features)
    losses, embeddings = {}, []
    for relation, encoder, decoder in zip(model.relations, model.encoders, model.decoders, strict=True):
        assert isinstance(encoder, NetworkEncoder)
        assert isinstance(decoder, Decoder)
        a = adjacency(graph, relation)
        incoming = (a.T > 0).double()
        z = x
        for layer in encoder.layers:
            assert isinstance(layer, SAGELayer)
            mean = incoming @ z / incoming.sum(1, keepdim=True).clamp(min=1)
            z = (layer.neighbours(mean) + layer.own(z)).clamp(min=0)
        embeddings.append(z)
        by_gene = tokens(decoder, ids, features)
        error = (z @ by_gene[:, :-1].T + by_gene[:, -1] - a).square()
        weight = torch.where(a > 0, a.new_tensor(1), a.new_tensor(model.zero_weight[relation]))
        rows, columns = graph.known_rows(relation), graph.known_columns(relation)
        losses[f"reconstruction/{relation}"] = (weight * error)[rows][:, columns].mean()
    e = []
    for gene in range(graph.num_nodes):
        mine = torch.stack([z[gene] for z in embeddings])
        e.append(model.score(mine).flatten().softmax(0) @ mine)
    out = [model.out(hypersagnn(model.sets, torch.stack(e)[seeds[a:b]])) for a, b in itertools.pairwise(ptr.tolist())]
    total = torch.stack([model.weights[name] * loss for name, loss in losses.items()]).sum()
    return torch.stack(out) if out else x.new_zeros(0, model.out.out_features), losses, total


def pairwise(
    model: PairwiseInteraction,
    graph: MultiGraph,
    seeds: Tensor,
    ptr: Tensor,
    types: Tensor,
    features: Tensor | None = None,
    gene_ids: Tensor | None = None,
) -> Tensor:
    """Predictions of `PairwiseInteraction` in evaluation, one pair after another."""
    ids = torch.arange(graph.num_nodes) if gene_ids is None else gene_ids
    x = tokens(model.tokens, ids, features)
    out = []
    for begin, end in itertools.pairwise(ptr.tolist()):
        u = phi(model.phi, x[seeds[begin:end]], types[begin:end])
        y = model.bias + sum(model.single(one) for one in u)
        for i, j in itertools.combinations(range(end - begin), 2):
            y = y + model.pair.mlp(torch.cat([u[i] + u[j], u[i] * u[j]]))
        out.append(y)
    return torch.stack(out) if out else x.new_zeros(0, len(model.bias))
