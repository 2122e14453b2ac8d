"""The definition: every op as dense, obvious PyTorch.

Same names and arguments as the public functions, materialising whatever reads best. Made for tests and for readers, in
float64; autograd gives the gradients. Shapes and meaning are documented where the public functions are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import Comembership, MultiGraph


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, its map dropped and rescaled, and its natural log-sum-exp."""
    scores = _scores(q, k, scale)
    p = scores.softmax(-1)
    if dropout_p > 0:
        p = p * dropout_multiplier(p.shape, dropout_p, generator, device=q.device).to(p.dtype)
    return p @ v, scores.logsumexp(-1)


def dropout_multiplier(
    shape: Sequence[int],
    dropout_p: float,
    generator: torch.Generator | None = None,
    *,
    device: torch.device | None = None,
    copies: Sequence[int] | None = None,
) -> Tensor:
    """What an attention map [..., Tq, Tk] is multiplied by: 0, or 1 / (1 - p) with p in steps of 2^-16; float64.

    Draws as `attention` does, so that equal states of the generator give equal entries. Entry (h, i, j) has 16 bits of its own
    of Philox4x32-10: those of place j // 8 % 8 in the result of counter (j // 64 * 8 + j % 8, i, h, offset) under the key seed.
    With `copies` several entries of each pair, [copies, ..., Tq, Tk]: copy c has the bits of offset + c.
    """
    steps, low = 2**16, 2**32 - 1
    threshold = min(round(dropout_p * steps), steps - 1)
    if threshold == 0:
        return torch.ones(*shape if copies is None else (len(copies), *shape), dtype=torch.float64, device=device)
    seed, offset = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator).tolist()
    c = torch.tensor([0] if copies is None else list(copies), device=device)
    *lead, num_rows, num_columns = shape
    h, i, j = (torch.arange(n, device=device) for n in (prod(lead), num_rows, num_columns))
    c, h, i, j = torch.meshgrid(c, h, i, j, indexing="ij")
    x0, x1, x2, x3 = j // 64 * 8 + j % 8, i, h, (offset & low) + c & low
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # the lower 64 bits of the products
        x0, x1, x2, x3 = b >> 32 & low ^ x1 ^ k0, b & low, a >> 32 & low ^ x3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    halves = torch.stack([x >> shift & 0xFFFF for x in (x0, x1, x2, x3) for shift in (0, 16)])
    bits = halves.gather(0, (j // 8 % 8)[None])[0].view(c.shape[0], *shape)
    z = (bits >= threshold).double() * steps / (steps - threshold)
    return z[0] if copies is None else z


def attention_logsumexp(q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """log sum_j exp(s_ij) over the keys that the mask keeps."""
    if key_mask is None:
        return _scores(q, k, scale).logsumexp(-1)
    scores = _scores(q, k.masked_fill(~key_mask.unsqueeze(-1), 0), scale)  # nothing behind the mask is seen
    return scores.masked_fill(~key_mask.unsqueeze(-2), -torch.inf).logsumexp(-1)


def target(graph: MultiGraph, relation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(t [N, N], the row-normalised graph; edges, bool [N, N]; R, bool [N, N]: valid pairs)."""
    row, col = graph.edge_index(relation)
    a = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64, device=graph.device)
    a[row, col] = graph.weight(relation).double()
    valid = graph.known_rows(relation)[:, None] & graph.known_columns(relation)[None, :]
    a = a * valid
    mass = a.sum(1, keepdim=True)
    return torch.where(mass > 0, a / mass, 0), a > 0, valid


def attention_kl(
    q: Tensor,
    k: Tensor,
    graph: MultiGraph,
    relation: str,
    *,
    lse: Tensor | None = None,
    rows: Tensor | None = None,
    num_prefix: int = 0,
    scale: float | None = None,
    over: str = "tokens",
    reduction: str = "mean",
) -> Tensor:
    """KL(row of the graph ‖ row of the attention map)."""
    return _kl(q, k, *target(graph, relation), lse, rows, num_prefix, scale, over, reduction)


def _kl(
    q: Tensor,
    k: Tensor,
    t: Tensor,
    edges: Tensor,
    valid: Tensor,
    lse: Tensor | None,
    rows: Tensor | None,
    num_prefix: int,
    scale: float | None,
    over: str,
    reduction: str,
) -> Tensor:
    """KL(row of t ‖ row of the attention map), over the pairs of `edges`."""
    rows = torch.arange(len(t), device=q.device) if rows is None else rows
    t, edges, valid = t[rows], edges[rows], valid[rows]
    scores = _scores(q[..., num_prefix:, :][..., rows, :], k, scale)
    genes = scores[..., num_prefix:]
    if over == "tokens":
        total = scores.logsumexp(-1) if lse is None else lse[..., num_prefix:][..., rows]
    else:
        total = genes.masked_fill(~valid, -torch.inf).logsumexp(-1)
    log_alpha = genes - total[..., None]
    t = t.to(q.dtype)
    kl = torch.where(edges, t * (t.clamp_min(torch.finfo(t.dtype).tiny).log() - log_alpha), 0).sum(-1)
    return _reduce(kl, edges.any(-1), None, reduction)


def comembership(target: Comembership) -> Tensor:
    """T [N, N]: C = B W Bᵀ over its row sums, without its diagonal unless that is in."""
    graph, relation = target.graph, target.relation
    b = adjacency(graph, relation)
    terms = graph.node_types[graph.joins(relation)[1]]
    c = b[:, terms.start : terms.stop] @ torch.diag(target.weight) @ b[:, terms.start : terms.stop].T
    if not target.diagonal:
        c = c - torch.diag(c.diag())
    mass = c.sum(1, keepdim=True)
    return torch.where(mass > 0, c / mass, 0)


def attention_kl_comembership(
    q: Tensor,
    k: Tensor,
    target: Comembership,
    *,
    lse: Tensor | None = None,
    rows: Tensor | None = None,
    num_prefix: int = 0,
    scale: float | None = None,
    over: str = "tokens",
    reduction: str = "mean",
) -> Tensor:
    """KL(row of T ‖ row of the attention map), of all tokens or of the first, the genes."""
    n = q.shape[-2] - num_prefix
    t, known = comembership(target)[:n, :n], target.graph.known_rows(target.relation)[:n]
    valid = known[:, None] & known[None, :]
    return _kl(q, k, t, t > 0, valid, lse, rows, num_prefix, scale, over, reduction)


def attention_bce(
    q: Tensor,
    k: Tensor,
    graph: MultiGraph,
    relation: str,
    *,
    lse: Tensor | None = None,
    rows: Tensor | None = None,
    num_prefix: int = 0,
    scale: float | None = None,
    target: str = "normalized",
    link: str = "softmax",
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy between a graph and an attention map over all valid pairs."""
    t, edges, valid = globals()["target"](graph, relation)
    t = (edges if target == "binary" else t).to(q.dtype)
    scores = _scores(q, k, scale)
    genes = scores[..., num_prefix:, num_prefix:]
    if link == "sigmoid":
        log_a, log_1ma = F.logsigmoid(genes), F.logsigmoid(-genes)
    else:
        log_a, log_1ma = (x[..., num_prefix:, num_prefix:] for x in log_softmax_and_complement(scores, lse))
    # A log may be -inf where its weight is 0: of 1 - a where a row has one token, of a where a score is -inf.
    entries = torch.where(t > 0, t * log_a, 0) + torch.where(t < 1, (1 - t) * log_1ma, 0)
    bce = -torch.where(valid, entries, 0).sum(-1)
    counted = edges.any(-1)
    return _reduce(torch.where(counted, bce, 0), counted, rows, reduction)


def log_softmax_and_complement(scores: Tensor, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(log a, log(1 - a)) of a = softmax(scores), exact at any gap.

    Of the entry above 2/3, if a row has one, both are made of the log-sum-exp of the others; those take the row's `lse`.
    """
    total = scores.logsumexp(-1) if lse is None else lse
    log_a = scores - total[..., None]
    top = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argmax(-1, keepdim=True), True)
    sharp = top & (log_a > log(2 / 3))
    gap = scores - scores.masked_fill(top, -torch.inf).logsumexp(-1, keepdim=True)
    others = torch.log1p(-log_a.masked_fill(sharp, -1).exp())
    return torch.where(sharp, F.logsigmoid(gap), log_a), torch.where(sharp, F.logsigmoid(-gap), others)


def graph_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: MultiGraph,
    ties: Sequence[tuple[str, int]],
    *,
    loss: str = "kl",
    rows: Tensor | Mapping[str, Tensor] | None = None,
    num_prefix: int = 1,
    scale: float | None = None,
    over: str = "tokens",
    reduction: str = "mean",
    target: str = "normalized",
    link: str = "softmax",
    diagonal: bool = False,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention, and the loss of every tied (relation, head), of the map before dropout."""
    losses = []
    for relation, head in ties:
        chosen = rows.get(relation) if isinstance(rows, Mapping) else rows
        pair = q[..., head, :, :], k[..., head, :, :]
        if loss == "kl":
            value = attention_kl(
                *pair, graph, relation, rows=chosen, num_prefix=num_prefix, scale=scale, over=over, reduction=reduction
            )
        elif loss == "kl_comembership":
            shared = graph.comembership(relation, diagonal=diagonal)
            value = attention_kl_comembership(
                *pair, shared, rows=chosen, num_prefix=num_prefix, scale=scale, over=over, reduction=reduction
            )
        else:
            value = attention_bce(
                *pair, graph, relation, rows=chosen, num_prefix=num_prefix, scale=scale, target=target, link=link,
                reduction=reduction,
            )  # fmt: skip
        losses.append(value)
    return attention(q, k, v, scale=scale, dropout_p=dropout_p, generator=generator)[0], tuple(losses)


def perturbation_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, ptr: Tensor, override: Tensor, *, scale: float = 1.0
) -> Tensor:
    """One query a set over all genes, where the genes of the set have values of their own: loops over the sets."""
    z = []
    for b in range(ptr.numel() - 1):
        mine = slice(int(ptr[b]), int(ptr[b + 1]))
        values = value.index_copy(-2, index[mine], override[..., mine, :])
        z.append(attention(query[..., b : b + 1, :], key, values, scale=scale)[0])
    return torch.cat(z, -2) if z else query.new_zeros(*query.shape[:-1], value.shape[-1])


def set_attention(
    q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, *, null_score: Tensor | None = None, null_value: Tensor | None = None
) -> Tensor:
    """Entries [nnz, H, D] attend to those of their set; a null sink, of scores [nnz, H] and value [H, D], is one more."""
    out = []
    for b in range(ptr.numel() - 1):
        mine = slice(int(ptr[b]), int(ptr[b + 1]))
        scores = torch.einsum("ihd,jhd->hij", q[mine], k[mine]) / sqrt(q.shape[-1])
        values = v[mine].transpose(0, 1)
        if null_score is not None and null_value is not None:
            scores = torch.cat([scores, null_score[mine].t()[..., None]], -1)
            values = torch.cat([values, null_value[:, None]], 1)
        out.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat([v[:0], *out])


def khop_mask(
    graph: MultiGraph,
    seeds: Tensor,
    ptr: Tensor,
    num_hops: int,
    *,
    traversal: str = "per_relation",
    direction: str = "in",
) -> Tensor:
    """bool [B, N]: the genes within num_hops hops of each set, one dense product a hop."""
    steps = []
    for relation in graph.relations:
        a = adjacency(graph, relation) > 0
        # [from, to]: "in" goes from the target j of an edge A[i, j] to its source i
        steps.append({"in": a.t(), "out": a, "both": a | a.t()}[direction])
    if traversal == "mixed" and steps:
        steps = [torch.stack(steps).any(0)]
    start = ~_kept(graph, seeds, ptr)
    mask = start
    for step in steps:
        reached = start
        for _ in range(num_hops):
            reached = reached | (reached.double() @ step.double() > 0)
        mask = mask | reached
    return mask


def khop_subgraph(
    graph: MultiGraph,
    seeds: Tensor,
    ptr: Tensor,
    num_hops: int,
    *,
    traversal: str = "per_relation",
    direction: str = "in",
    drop_seeds: bool = False,
) -> list[dict[str, Any]]:
    """One dict a sample: node [V] and seed_mask [V]; edge_index [2, E] (positions in node) and edge_id [E] by relation."""
    mask = khop_mask(graph, seeds, ptr, num_hops, traversal=traversal, direction=direction)
    kept = _kept(graph, seeds, ptr)
    samples = []
    for b in range(ptr.numel() - 1):
        chosen = mask[b] & kept[b] if drop_seeds else mask[b]
        node = chosen.nonzero().flatten()
        edge_index, edge_id = {}, {}
        for relation in graph.relations:
            index = graph.edge_index(relation)
            edge_id[relation] = chosen[index].all(0).nonzero().flatten()
            edge_index[relation] = torch.searchsorted(node, index[:, edge_id[relation]])
        samples.append({"node": node, "seed_mask": ~kept[b][node], "edge_index": edge_index, "edge_id": edge_id})
    return samples


def perturbation_mask(graph: MultiGraph, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(node_keep bool [B, N], edge_keep bool [B, E] by relation)"""
    keep = _kept(graph, seeds, ptr)
    return keep, {relation: keep[:, graph.edge_index(relation)].all(1) for relation in graph.relations}


def masked_spmm(
    graph: MultiGraph,
    relation: str,
    x: Tensor,
    keep: Tensor,
    *,
    reduce: str = "sum",
    transpose: bool = False,
    edge_weight: Tensor | None = None,
) -> Tensor:
    """The dense adjacency matrix, masked for each sample, times x."""
    edges = adjacency(graph, relation) > 0
    a = adjacency(graph, relation, edge_weight).to(x.dtype)
    if transpose:
        edges, a = edges.t(), a.t()
    pairs = keep[:, :, None] & keep[:, None, :]  # [B, N, N]
    out = (a * pairs) @ x
    if reduce == "mean":
        out = out / (edges & pairs).sum(-1, keepdim=True).clamp(min=1).to(x.dtype)
    return out


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: MultiGraph,
    heads: Sequence[tuple[str, int]],
    *,
    num_prefix: int = 1,
    self_loops: bool = True,
    weighted: bool = False,
    edge_bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the entries that each head sees: every set of entries is a copy of the scores, -inf outside of it.

    With dropout each is dropped by itself, see `dropout_multiplier`: what a token sees as prefix or as itself, and rows of the
    prefix, as copy 0, which is that of `attention`; the edges of pair t of `heads` as copy 1 + t.
    """
    scores = _scores(q, k, scale)
    n, num_tokens = graph.num_nodes, q.shape[-2]
    everything = torch.zeros(num_tokens, num_tokens, dtype=torch.bool, device=q.device)
    everything[:, :num_prefix] = everything[:num_prefix] = True
    diagonal = torch.zeros_like(everything)
    if self_loops:
        diagonal[num_prefix:, num_prefix:] = torch.eye(n, dtype=torch.bool, device=q.device)
    # [1 + pairs, ..., H, T, T]
    kept = dropout_multiplier(scores.shape, dropout_p, generator, device=q.device, copies=range(1 + len(heads))).to(q.dtype)
    outs, totals = [], []
    for head in range(q.shape[-3]):
        entries = [(seen, scores[..., head, :, :], kept[0][..., head, :, :]) for seen in (everything, diagonal)]
        for t, (relation, mine) in enumerate(heads):
            if mine == head:
                row, col = graph.edge_index(relation)
                seen, added = torch.zeros_like(everything), torch.zeros_like(everything, dtype=torch.float64)
                seen[num_prefix + row, num_prefix + col] = True
                if weighted:
                    added[num_prefix + row, num_prefix + col] = graph.weight(relation).double().log()
                s = scores[..., head, :, :] + added.to(scores.dtype)
                entries.append((seen, s if edge_bias is None else s + edge_bias[t], kept[1 + t][..., head, :, :]))
        seen = torch.cat([seen for seen, *_ in entries], -1)
        nothing = ~seen.any(-1)
        s = torch.cat([s for _, s, _ in entries], -1).masked_fill(~seen, -torch.inf).masked_fill(nothing[:, None], 0)
        values = torch.cat([v[..., head, :, :]] * len(entries), -2)
        seen = seen & ~nothing[:, None]
        p = s.softmax(-1) * torch.cat([z for *_, z in entries], -1)
        outs.append(torch.where(seen[..., None], p[..., None] * values[..., None, :, :], 0).sum(-2))
        totals.append(s.logsumexp(-1).masked_fill(nothing, -torch.inf))
    return torch.stack(outs, -3), torch.stack(totals, -2)


def network_mse(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    graph: MultiGraph,
    relation: str,
    *,
    zero_weight: float = 0.1,
    rows: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Weighted squared error of the dense reconstruction z W' + b against the dense adjacency matrix."""
    a = adjacency(graph, relation)
    valid = graph.known_rows(relation)[:, None] & graph.known_columns(relation)[None, :]
    pairs = torch.full_like(a, zero_weight).masked_fill(a > 0, 1).masked_fill(~valid, 0)
    loss = (pairs.to(z.dtype) * (F.linear(z, weight, bias) - a.to(z.dtype)).square()).sum(-1)
    if rows is not None:
        loss, valid = loss[rows], valid[rows]
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(int(valid.sum()), 1)


def relational_spmm(
    graph: MultiGraph,
    x: Tensor,
    source: Tensor,
    source_ptr: Tensor,
    target: Tensor,
    target_ptr: Tensor,
    *,
    relations: Sequence[str] | None = None,
    scale: Tensor | None = None,
    sum_relations: bool = True,
    shared: bool = False,
) -> Tensor:
    """Each sample's block of each dense adjacency matrix, times what its genes send."""
    names = graph.relations if relations is None else relations
    matrices = [adjacency(graph, name).to(x.dtype) for name in names]
    out = x.new_zeros(target.numel(), len(names), x.shape[-1])
    for b in range(source_ptr.numel() - 1):
        sends = slice(int(source_ptr[b]), int(source_ptr[b + 1]))
        receives = slice(int(target_ptr[b]), int(target_ptr[b + 1]))
        sent = x[source[sends]] if shared else x[sends]
        for r, a in enumerate(matrices):
            block = a[target[receives]][:, source[sends]]
            out[receives, r] = block @ (sent if sent.ndim == 2 else sent[:, r])
    if scale is not None:
        out = out * scale.unsqueeze(-1).to(x.dtype)
    return out.sum(1) if sum_relations else out


def relational_degree(
    graph: MultiGraph,
    source: Tensor,
    source_ptr: Tensor,
    target: Tensor,
    target_ptr: Tensor,
    *,
    relations: Sequence[str] | None = None,
) -> Tensor:
    """The same product of ones and zeros."""
    names = graph.relations if relations is None else relations
    edges = [adjacency(graph, name) > 0 for name in names]
    degree = torch.zeros(target.numel(), len(names), dtype=torch.int32, device=graph.device)
    for b in range(source_ptr.numel() - 1):
        genes = source[source_ptr[b] : source_ptr[b + 1]]
        receives = slice(int(target_ptr[b]), int(target_ptr[b + 1]))
        for r, a in enumerate(edges):
            degree[receives, r] = a[target[receives]][:, genes].sum(1, dtype=torch.int32)
    return degree


def adjacency(graph: MultiGraph, relation: str, weight: Tensor | None = None) -> Tensor:
    """[N, N], the weights of the edges: the graph's, in float64, or others [E]."""
    weight = graph.weight(relation).double() if weight is None else weight
    zeros = weight.new_zeros(graph.num_nodes, graph.num_nodes)
    return zeros.index_put(tuple(graph.edge_index(relation)), weight)


def _kept(graph: MultiGraph, seeds: Tensor, ptr: Tensor) -> Tensor:
    """bool [B, N]: genes outside each set."""
    keep = torch.ones(ptr.numel() - 1, graph.num_nodes, dtype=torch.bool, device=graph.device)
    for b in range(ptr.numel() - 1):
        keep[b, seeds[int(ptr[b]) : int(ptr[b + 1])]] = False
    return keep


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return (1 / sqrt(q.shape[-1]) if scale is None else scale) * (q @ k.mT)


def _reduce(loss: Tensor, counted: Tensor, rows: Tensor | None, reduction: str) -> Tensor:
    """loss [..., N], counted bool [N]."""
    if rows is not None:
        loss, counted = loss[..., rows], counted[rows]
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / max(int(counted.sum()) * loss[..., 0:1].sum(-1).numel(), 1)
