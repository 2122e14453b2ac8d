"""The cell transformer as it is written without this library, on the parameters of ours.

Every layer makes its attention maps [heads, 1 + N, 1 + N], compares the tied ones with dense row-normalised adjacencies by
`F.kl_div`, and the head makes the values of all genes under every set, [B, N, dim].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cellattn import MultiGraph
from cellattn.data import PerturbationBatch
from cellattn.nn import CellOutput, CellTransformer, PerturbationHead
from cellattn.nn.encoder import EncoderLayer


class DenseCellTransformer:
    """A `CellTransformer` without dropout, sampled rows and losses other than KL over all tokens (see `method_peers.Peer`)."""

    copies_graph = False

    def __init__(self, model: CellTransformer, graph: MultiGraph) -> None:
        self._model, self._graph = model, graph
        n = graph.num_nodes
        self._targets, self._counted = {}, {}
        for relation in dict.fromkeys(tie.relation for tie in model.encoder.ties):
            row, col = graph.edge_index(relation)
            a = torch.zeros(n, n, device=graph.device)
            a[row, col] = graph.weight(relation).float()
            self._targets[relation] = a / a.sum(1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
            self._counted[relation] = max(graph.num_rows_with_edges(relation), 1)

    def collate(self, batch: PerturbationBatch) -> PerturbationBatch:
        """The batch as it is."""
        return batch

    def forward(self, batch: PerturbationBatch) -> CellOutput:
        """What `model(graph, batch.seeds, batch.ptr, batch.types)` returns, within rounding."""
        encoder = self._model.encoder
        tokens = self._model.tokens(self._graph.num_nodes)
        x = torch.cat([encoder.cls[None], tokens])
        losses = dict.fromkeys(encoder.weights, x.new_zeros(()))
        names = iter(encoder.weights)
        by_tie = {tie: next(names) for tie in encoder.ties}
        for position, layer in enumerate(encoder.layers):
            assert isinstance(layer, EncoderLayer)
            y, alpha = self._attend(layer, layer.norm1(x) if layer.pre_norm else x)
            for tie in encoder.ties:
                if tie.layer == position:
                    losses[by_tie[tie]] = self._kl(alpha[tie.head, 1:, 1:], tie.relation)
            if layer.pre_norm:
                x = x + y
                x = x + layer.ffn(layer.norm2(x))
            else:
                x = layer.norm1(x + y)
                x = layer.norm2(x + layer.ffn(x))
        h = encoder.norm(x)
        prediction = _dense_head(self._model.head, h[0], h[1:], batch)
        return CellOutput(prediction, losses, encoder.regularization(losses))

    def _attend(self, layer: EncoderLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """(attended tokens [T, dim], maps [heads, T, T])"""
        q, k, v = layer.attention.project(x)
        alpha = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return layer.attention.out((alpha @ v).transpose(0, 1).flatten(1)), alpha

    def _kl(self, alpha: Tensor, relation: str) -> Tensor:
        # epsilon as in users' code; without one, an entry that underflows where there is no edge makes 0 * -inf
        return F.kl_div((alpha + 1e-30).log(), self._targets[relation], reduction="sum") / self._counted[relation]


def _dense_head(head: PerturbationHead, h_cls: Tensor, h: Tensor, batch: PerturbationBatch) -> Tensor:
    num_sets = len(batch)
    member = torch.arange(num_sets, device=h.device).repeat_interleave(batch.ptr.diff())
    state = torch.zeros(num_sets, h.shape[0], dtype=torch.int64, device=h.device)
    state[member, batch.seeds] = batch.types
    values = head.phi(h.expand(num_sets, -1, -1), state)  # [B, N, dim]
    u = values[member, batch.seeds]
    p = head.mix(torch.cat([pool(u, batch.ptr) for pool in head.pools], -1))
    query, key = (x.unflatten(-1, (head.num_heads, -1)).transpose(0, 1) for x in (head.query(p), head.key(h)))
    beta = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)  # [heads, B, N]
    z = p + torch.einsum("hbn,bnhd->bhd", beta, values.unflatten(-1, (head.num_heads, -1))).flatten(1)
    return head.mlp(torch.cat([h_cls.expand(num_sets, -1), z], -1))
