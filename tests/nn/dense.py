"""The model again, as plain dense PyTorch and Python loops over sets, on the parameters of the modules."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellattn import MultiGraph
from cellattn.nn import CellEncoder, HyperSAGNN, PerturbationHead, PerturbedGeneReadout
from cellattn.nn.encoder import EncoderLayer
from cellattn.nn.perturbation import PairwiseSum, PerturbationFeatures, ReadoutReduce, SetReduce, Unread


def random_graph(num_nodes: int, edges: dict[str, int], seed: int = 0) -> MultiGraph:
    """Weighted float64 graphs in which the first gene has no edge."""
    generator = torch.Generator().manual_seed(seed)
    return MultiGraph.from_edge_index(
        {name: torch.randint(1, num_nodes, (2, number), generator=generator) for name, number in edges.items()},
        num_nodes,
        edge_weight={
            name: torch.rand(number, generator=generator, dtype=torch.float64) + 0.1 for name, number in edges.items()
        },
    )


def adjacency(graph: MultiGraph, relation: str) -> Tensor:
    """Weights as a dense float64 [N, N]."""
    a = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    source, target = graph.edge_index(relation)
    a[source, target] = graph.weight(relation).double()
    return a


def kl(alpha: Tensor, graph: MultiGraph, relation: str) -> Tensor:
    """Mean over rows with edges of KL(graph row ‖ alpha row), alpha [N, N]."""
    a = adjacency(graph, relation)
    rows = a.sum(1) > 0
    t = a[rows] / a[rows].sum(1, keepdim=True)
    return F.kl_div(alpha[rows].log(), t, reduction="batchmean")


def comembership(graph: MultiGraph, relation: str, diagonal: bool) -> MultiGraph:
    """Who shares columns with whom as a relation of its own: C = B W Bᵀ."""
    b = adjacency(graph, relation)[:, list(graph.node_types[graph.joins(relation)[1]])]
    c = b * graph.column_weight(relation) @ b.T
    c = c if diagonal else c.fill_diagonal_(0)
    index = c.nonzero().T
    return MultiGraph.from_edge_index({relation: index}, graph.num_nodes, edge_weight={relation: c[tuple(index)]})


def encode(encoder: CellEncoder, x: Tensor, graph: MultiGraph) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`CellEncoder` in evaluation on x [N, dim] by `nn.TransformerEncoderLayer` on the same parameters."""
    x = torch.cat([encoder.cls[None], x])
    losses = {}
    for index, layer in enumerate(encoder.layers):
        assert isinstance(layer, EncoderLayer)
        parameters = dict(layer.named_parameters())
        dense = nn.TransformerEncoderLayer(
            encoder.dim,
            layer.attention.num_heads,
            len(parameters["ffn.0.bias"]),
            dropout=0.0,
            activation="gelu",
            norm_first=layer.pre_norm,
            dtype=x.dtype,
        )
        names = {
            "self_attn.in_proj_weight": "attention.qkv.weight",
            "self_attn.in_proj_bias": "attention.qkv.bias",
            "self_attn.out_proj.weight": "attention.out.weight",
            "self_attn.out_proj.bias": "attention.out.bias",
            "linear1.weight": "ffn.0.weight",
            "linear1.bias": "ffn.0.bias",
            "linear2.weight": "ffn.2.weight",
            "linear2.bias": "ffn.2.bias",
            "norm1.weight": "norm1.weight",
            "norm1.bias": "norm1.bias",
            "norm2.weight": "norm2.weight",
            "norm2.bias": "norm2.bias",
        }
        mine: dict[str, Tensor] = {name: parameters[other] for name, other in names.items()}
        attended = layer.norm1(x) if layer.pre_norm else x
        attention = {name.removeprefix("self_attn."): value for name, value in mine.items() if "self_attn" in name}
        _, alpha = torch.func.functional_call(
            dense.self_attn, attention, (attended, attended, attended), {"average_attn_weights": False}
        )
        for tie, own in zip(encoder.ties, encoder.tie_options, strict=True):
            if tie.layer == index:
                options = {**layer.attention.loss_options, **own}
                loss = options.get("loss", "kl")
                shared = loss == "kl_comembership"
                target = comembership(graph, tie.relation, options.get("diagonal", False)) if shared else graph
                losses[f"{loss}/layer{index}/head{tie.head}/{tie.relation}"] = kl(alpha[tie.head, 1:, 1:], target, tie.relation)
        x = torch.func.functional_call(dense, mine, (x,))
    h = encoder.norm(x)
    return h[0], h[1:], losses


def phi(module: PerturbationFeatures | Unread, h: Tensor, types: Tensor) -> Tensor:
    """`PerturbationFeatures` by its equation, h [n, dim] -> [n, dim]; h where types are not read."""
    if isinstance(module, Unread):
        return h
    one_hot = F.one_hot(types, len(module.by_type.weight)).to(h.dtype)
    w_1 = torch.cat([module.by_gene.weight, module.by_type.weight.T], 1)
    return module.out(F.gelu(F.linear(torch.cat([h, one_hot], 1), w_1, module.by_gene.bias)))


def hypersagnn(module: HyperSAGNN, x: Tensor) -> Tensor:
    """One set, x [n, dim] -> [dim]."""
    n, heads = x.shape[0], module.num_heads
    if n == 0:
        return x.new_zeros(module.dim)
    d = x
    for layer in range(len(module.rezero)):
        q, k, v = module.qkv[layer](d).chunk(3, dim=1)
        out = torch.zeros_like(d)
        for i, head in itertools.product(range(n), range(heads)):
            others = [j for j in range(n) if j != i]
            part = slice(head * module.dim // heads, (head + 1) * module.dim // heads)
            if others:
                p = (k[others, part] @ q[i, part] / (module.dim // heads) ** 0.5).softmax(0)
                out[i, part] = p @ v[others, part]
        d = d + module.rezero[layer] * module.out[layer](out)
    return (d - module.static(x)).square().mean(0)


def readout(module: PerturbedGeneReadout, h: Tensor, members: Tensor) -> Tensor:
    """All genes h [N, dim] attend to those of one set, members [n, dim], by `nn.MultiheadAttention`, and go through the FFN.

    A null sink is a row of zeros among the members, and a column of the mask that is added to the scores.
    """
    attended = torch.zeros_like(h)
    if len(members):
        attention = nn.MultiheadAttention(module.dim, module.num_heads, batch_first=True, dtype=h.dtype)
        parameters = {"in_proj_weight": module.qkv.weight, "in_proj_bias": module.qkv.bias}
        parameters |= {"out_proj.weight": module.out.weight, "out_proj.bias": module.out.bias}
        mask = None
        if module.null_bias is not None:
            mask = torch.cat([module.null_bias.expand(len(h), 1), h.new_zeros(len(h), len(members))], 1)
            members = torch.cat([torch.zeros_like(members[:1]), members])
        attended, _ = torch.func.functional_call(attention, parameters, (h, members, members), {"attn_mask": mask})
    if module.rezero is not None:
        y = h + module.rezero[0] * attended
        return y + module.rezero[1] * module.ffn(y)
    y = module.norm1(h + attended)
    return module.norm2(y + module.ffn(y))


def _pool(module: nn.Module, u: Tensor) -> Tensor:
    if isinstance(module, HyperSAGNN):
        return hypersagnn(module, u)
    if isinstance(module, PairwiseSum):
        return sum((u[i] * u[j] for i, j in itertools.combinations(range(len(u)), 2)), torch.zeros_like(u[0:1].sum(0)))
    if isinstance(module, ReadoutReduce):
        return readout(module.readout, u, u).sum(0) / (max(len(u), 1) if module.mean else 1)
    assert isinstance(module, SetReduce)
    is_mean = module(u.new_ones(2, 1), torch.tensor([0, 2])).item() == 1
    return u.sum(0) / (max(len(u), 1) if is_mean else 1)


def predict(head: PerturbationHead, h_cls: Tensor, h: Tensor, seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
    """`PerturbationHead` in evaluation, one set after another."""
    out = []
    for begin, end in itertools.pairwise(ptr.tolist()):
        genes, kinds = seeds[begin:end], types[begin:end]
        m = torch.zeros(len(h), dtype=torch.int64)
        m[genes] = kinds
        u, values = phi(head.phi, h[genes], kinds), phi(head.phi, h, m)
        p = head.mix(torch.cat([_pool(pool, u) for pool in head.pools]))
        z = p
        if head.num_heads > 0:
            query, key = head.query(p), head.key(h)
            parts = []
            for part in torch.arange(head.dim).chunk(head.num_heads):
                beta = (key[:, part] @ query[part] / len(part) ** 0.5).softmax(0)
                parts.append(beta @ values[:, part])
            z = p + torch.cat(parts)
        out.append(head.mlp(torch.cat([h_cls, z])))
    return torch.stack(out) if out else h.new_zeros(0, head.out_dim)
