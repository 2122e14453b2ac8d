"""The models of sets as their users write them today, on the parameters of ours, so that both can be checked and timed.

A peer is built once for a model and a graph, whose conversion is not timed with it, and then called with batches like the model
itself. It shares the model's parameters: what it is trained with, or their gradients, are the model's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellattn import MultiGraph
from cellattn.data import PERTURBATION_TYPES, PerturbationBatch
from cellattn.nn import CellOutput, CellTransformer, Dango, HyperSAGNN, PairwiseInteraction
from cellattn.nn.dango import NetworkEncoder, SAGELayer
from cellattn.nn.perturbation import PRESENT, ReadoutReduce

DELETED = PERTURBATION_TYPES.index("deleted")
Predict = Callable[[PerturbationBatch], CellOutput]


def ours(model: nn.Module, graph: MultiGraph, *, features: Tensor | None = None) -> Predict:
    """A model of ours, called with batches."""
    return lambda batch: model(graph, batch.seeds, batch.ptr, batch.types, features=features)


def dango_peer(model: Dango, graph: MultiGraph, *, features: Tensor | None = None) -> Predict:
    """`Dango` with PyG's `SAGEConv`, an N x N reconstruction a network, and one [sum |S|, sum |S|] mask for the sets.

    Raises:
        ValueError: rows are sampled, or genes of a network unknown: the dense loss is over all pairs.
    """
    from torch_geometric.utils import scatter

    if model.sampled_rows is not None:
        raise ValueError(f"model: the dense loss has all rows, got sampled_rows={model.sampled_rows}")
    for relation in model.relations:
        if not graph.known(relation).all():
            raise ValueError(f"graph: the dense loss has all pairs, but genes are unknown in {relation!r}")
    convs = [_sage(encoder) for encoder in model.encoders]
    edges = [graph.edge_index(relation) for relation in model.relations]
    targets = [
        torch.zeros(graph.num_nodes, graph.num_nodes, dtype=model.out.weight.dtype, device=graph.device).index_put(
            tuple(edge_index), graph.weight(relation).to(model.out.weight.dtype)
        )
        for relation, edge_index in zip(model.relations, edges, strict=True)
    ]

    def predict(batch: PerturbationBatch) -> CellOutput:
        x = model.tokens(graph.num_nodes, features)
        embeddings, losses = [], {}
        for name, relation, layers, decoder, edge_index, target in zip(
            model.weights, model.relations, convs, model.decoders, edges, targets, strict=True
        ):
            z = x
            for conv in layers:
                z = F.relu(conv(z, edge_index))
            embeddings.append(z)
            by_gene = decoder(graph.num_nodes, features)
            reconstruction = F.linear(z, by_gene[:, :-1], by_gene[:, -1])  # [N, N]
            weight = torch.full_like(target, model.zero_weight[relation]).masked_fill(target > 0, 1)
            losses[name] = (weight * (reconstruction - target).square()).mean()
        stacked = torch.stack(embeddings, 1)  # [N, K, dim]
        fused = (model.score(stacked).softmax(1) * stacked).sum(1)
        member = torch.arange(len(batch), device=graph.device).repeat_interleave(batch.ptr.diff())
        squared = _block_attention(model.sets, fused[batch.seeds], member)
        pooled = scatter(squared, member, dim=0, dim_size=len(batch), reduce="mean")
        return CellOutput(model.out(pooled), losses, model.regularization(losses))

    return predict


def pairwise_peer(model: PairwiseInteraction, graph: MultiGraph, *, features: Tensor | None = None) -> Predict:
    """`PairwiseInteraction` in a Python loop over the sets of a batch, and over the pairs of a set."""

    def predict(batch: PerturbationBatch) -> CellOutput:
        x = model.tokens(graph.num_nodes, features)
        out = []
        for begin, end in itertools.pairwise(batch.ptr.tolist()):
            u = model.phi(x[batch.seeds[begin:end]], batch.types[begin:end])
            y = model.bias + model.single(u).sum(0)
            for i, j in itertools.combinations(range(end - begin), 2):
                y = y + model.pair.mlp(torch.cat([u[i] + u[j], u[i] * u[j]]))
            out.append(y)
        prediction = torch.stack(out) if out else x.new_zeros(0, len(model.bias))
        return CellOutput(prediction, {}, x.new_zeros(()))

    return predict


def _sage(encoder: nn.Module) -> list[nn.Module]:
    """PyG's layers with the parameters of ours."""
    from torch_geometric.nn import SAGEConv

    assert isinstance(encoder, NetworkEncoder)
    convs = []
    for layer in encoder.layers:
        assert isinstance(layer, SAGELayer)
        conv = SAGEConv(layer.own.in_features, layer.own.out_features)
        conv.lin_l.weight, conv.lin_l.bias = layer.neighbours.weight, layer.neighbours.bias
        conv.lin_r.weight = layer.own.weight
        convs.append(conv)
    return convs


def _block_attention(module: HyperSAGNN, x: Tensor, member: Tensor) -> Tensor:
    """(d - s)^2 of `HyperSAGNN` on x [nnz, dim], entries of all sets in one attention whose mask keeps them apart."""
    same_set = member[:, None] == member
    sees = same_set & ~torch.eye(len(x), dtype=torch.bool, device=x.device)  # [nnz, nnz]
    d = x
    for qkv, out, a in zip(module.qkv, module.out, module.rezero, strict=True):
        q, k, v = qkv(d).unflatten(-1, (3, module.num_heads, -1)).permute(1, 2, 0, 3)  # [heads, nnz, head_dim]
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~sees, -torch.inf)
        alpha = scores.softmax(-1).nan_to_num()  # zeros where a gene has no other to attend to
        d = d + a * out((alpha @ v).transpose(0, 1).flatten(1))
    return (d - module.static(x)).square()


def readout_by_all_genes(model: CellTransformer, graph: MultiGraph) -> Callable[[Tensor], Tensor]:
    """The pool "readout" over all genes: every gene attends to a set, an FFN runs on all of them, the set's rows are read.

    A function of sets of deleted genes [B, k], to the first prediction of each; the cell is encoded here, once.
    """
    head = model.head
    (pool,) = head.pools
    if not isinstance(pool, ReadoutReduce) or not pool.mean or head.num_heads > 0:
        raise ValueError('model: expected the pool "readout" alone, and no cross-attention')
    readout = pool.readout
    with torch.no_grad():
        h_cls, h, _ = model.encoder(model.tokens(graph.num_nodes), graph)
        present, deleted = (head.phi(h, torch.tensor(kind)) for kind in (PRESENT, DELETED))

    def predict(sets: Tensor) -> Tensor:
        b, k = sets.shape
        member = torch.arange(b)[:, None].expand(b, k)
        x = present.expand(b, -1, -1).index_put((member, sets), deleted[sets])  # [B, N, dim]
        q, key, value = readout.qkv(x).unflatten(-1, (3, readout.num_heads, -1)).unbind(2)  # [B, N, H, D]
        key, value = (t[member, sets] for t in (key, value))  # [B, k, H, D]
        weight = (torch.einsum("bnhd,bkhd->bhnk", q, key) * q.shape[-1] ** -0.5).softmax(-1)
        y = readout.norm1(x + readout.out(torch.einsum("bhnk,bkhd->bnhd", weight, value).flatten(2)))
        z = readout.norm2(y + readout.ffn(y))[member, sets].mean(1)
        return head.mlp(torch.cat([h_cls.expand(b, -1), z], -1))[:, 0]

    return predict
