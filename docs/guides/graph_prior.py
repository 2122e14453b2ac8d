"""A graph prior on the attention that you have: the map is no longer made, and the loss is the same to the last digits."""

import torch
from torch import nn

import cellattn

torch.manual_seed(0)
num_genes, dim = 400, 32
edges = torch.randint(num_genes, (2, 3000))  # your graph: row 0 the row of A, row 1 its column
graph = cellattn.MultiGraph.from_edge_index({"physical": edges}, num_genes, undirected=True)


class TiedAttention(nn.Module):
    """Head 2 of four is held to the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # x [1 + N, dim], CLS first
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(1, 2, 0, 3)  # [heads, 1 + N, head_dim]
        out, (kl,) = cellattn.graph_attention(q, k, v, graph, [("physical", 2)])
        return self.out(out.transpose(0, 1).flatten(1)), kl


layer, x = TiedAttention(), torch.randn(1 + num_genes, dim)
y, kl = layer(x)
(y.square().mean() + 0.1 * kl).backward()

# What the loss is, with the map: KL of each row of the graph from the genes' part of the row of attention, in the mean over
# rows that have an edge.
with torch.no_grad():
    q, k, _ = layer.qkv(x).unflatten(-1, (3, 4, -1)).permute(1, 2, 0, 3).double()
    log_alpha = (q[2] @ k[2].mT * 8**-0.5).log_softmax(-1)[1:, 1:]
    target = torch.zeros(num_genes, num_genes, dtype=torch.float64)
    row = torch.arange(num_genes).repeat_interleave(graph.rowptr("physical").diff())
    target[row, graph.col("physical").long()] = 1.0
    some = target.sum(1) > 0
    target = target[some] / target[some].sum(1, keepdim=True)
    dense = (torch.xlogy(target, target) - target * log_alpha[some]).sum(1).mean()
torch.testing.assert_close(kl.detach().double(), dense, rtol=1e-5, atol=0)
