"""From code that you have: scaled_dot_product_attention, a dense graph term, a read-out in a loop, and PyG's batches."""

import torch
import torch_geometric
from torch.nn import functional as F

import cellattn
from cellattn.data import PerturbationBatch, PerturbationDataset, synthetic_cell
from cellattn.nn import CellTransformer, PerturbedGeneReadout, weight_from_row_sum

torch.manual_seed(0)
graph = synthetic_cell(num_genes=200)

# 1. F.scaled_dot_product_attention(q, k, v) -> cellattn.attention(q, k, v), which gives LSE too. Any leading dimensions.
q, k, v = (torch.randn(1, 4, 201, 16) for _ in range(3))
out, lse = cellattn.attention(q, k, v)
torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)

# 2. A key padding mask is `key_mask` of attention_logsumexp, False for keys to leave out; attention takes the keys that stay.
mask = torch.ones(201, dtype=torch.bool)
mask[-10:] = False
lse = cellattn.attention_logsumexp(q, k, key_mask=mask)
out, same = cellattn.attention(q, k[..., mask, :], v[..., mask, :])
torch.testing.assert_close(same, lse)

# 3. A map compared with a graph: softmax, slicing off CLS, F.kl_div -> one call, no map.
loss = cellattn.attention_kl(q[0, 0], k[0, 0], graph, "physical", num_prefix=1)

# 4. Its weight: theirs is of a sum over rows, divided by the edges a gene; ours of a mean over the rows with an edge.
theirs = 0.1
weight = weight_from_row_sum(theirs, graph, "physical")
total = cellattn.attention_kl(q[0, 0], k[0, 0], graph, "physical", num_prefix=1, reduction="sum")
torch.testing.assert_close(weight * loss, theirs * total / (graph.num_edges("physical") / graph.num_nodes))

# 5. for each sample: nn.MultiheadAttention(h, h[S], h[S]), FFN, the rows in S -> the rows in S of all samples at once.
h, seeds, ptr = torch.randn(200, 32), torch.tensor([17, 140, 9]), torch.tensor([0, 2, 3])
attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
readout = PerturbedGeneReadout(32, 4)  # residual="rezero" and null_sink=0.0 as the code that you have
readout.qkv.load_state_dict({"weight": attention.in_proj_weight, "bias": attention.in_proj_bias})
readout.out.load_state_dict(attention.out_proj.state_dict())
rows = readout(h[seeds], ptr)  # [3, 32]
every_gene = readout(h[seeds], ptr, genes=h)  # [2, 200, 32], where all are read, or some: genes=h[measured]
members = h[None, seeds[:2]]
y = readout.norm1(h + attention(h[None], members, members)[0][0])
y = readout.norm2(y + readout.ffn(y))
torch.testing.assert_close(every_gene[0], y, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(rows[:2], y[seeds[:2]], rtol=1e-4, atol=1e-5)

# 6. All of it: dropout of the maps, a weight a graph, hard masks (of a graph without self-loops: each gene sees itself anyway).
cell = graph.without_self_loops(None)
model = CellTransformer(
    32, num_layers=2, num_heads=4, num_genes=200, num_types=None, norm="post", dropout=0.1, dropout_p=0.1,
    ties=[(0, 0, "physical", weight), (0, 1, "regulatory", 0.3, {"loss": "bce"})], masks=[(1, 2, "tflink")],
    pool="readout_sum", pool_heads=4, cross_heads=0, activation="relu", hidden_dim=32,
)  # fmt: skip
prediction, losses, regularization = model(cell, seeds, ptr, torch.zeros_like(seeds))
assert list(losses) == ["kl/layer0/head0/physical", "bce/layer0/head1/regulatory"]  # to be logged as they are
(prediction.square().mean() + regularization).backward()

# 7. Batches of PyG's HeteroData with the fields perturbation_indices, perturbation_indices_batch, phenotype_values, ...
data = PerturbationDataset.from_sets([[17, 140], [9], [3, 5, 8]], [0.1, -0.3, 0.2], num_genes=200)
batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
hetero = batch.to_hetero_data(200)
again = PerturbationBatch.from_hetero_data(hetero)
assert torch.equal(again.seeds, batch.seeds)

# 8. A cell_graph of HeteroData with (gene, relation, gene) edge types is a MultiGraph.
cell_graph = torch_geometric.data.HeteroData()
cell_graph["gene"].num_nodes = 200
for name in graph.relations:
    row = torch.arange(200).repeat_interleave(graph.rowptr(name).diff())
    cell_graph["gene", name, "gene"].edge_index = torch.stack([row, graph.col(name).long()])
assert cellattn.MultiGraph.from_hetero_data(cell_graph).num_edges("physical") == graph.num_edges("physical")
