"""From code that you have: scaled_dot_product_attention, PyG's batches, and loops over samples, line by line."""

import torch
import torch_geometric
from torch.nn import functional as F

import cellattn
from cellattn.data import PerturbationBatch, PerturbationDataset, synthetic_cell

torch.manual_seed(0)
graph = synthetic_cell(num_genes=200)

# 1. F.scaled_dot_product_attention(q, k, v) -> cellattn.attention(q, k, v), which gives LSE too. Any leading dimensions.
q, k, v = (torch.randn(1, 4, 201, 16) for _ in range(3))
out, lse = cellattn.attention(q, k, v)
torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)

# 2. A key padding mask is `key_mask` of attention_logsumexp and attention: False for keys to leave out.
mask = torch.ones(201, dtype=torch.bool)
mask[-10:] = False
lse = cellattn.attention_logsumexp(q, k, key_mask=mask)

# 3. A map compared with a graph: softmax, slicing off CLS, F.kl_div -> one call, no map.
loss = cellattn.attention_kl(q[0, 0], k[0, 0], graph, "physical", num_prefix=1)

# 4. Batches of PyG's HeteroData with the fields perturbation_indices, perturbation_indices_batch, phenotype_values, ...
data = PerturbationDataset.from_sets([[17, 140], [9], [3, 5, 8]], [0.1, -0.3, 0.2], num_genes=200)
batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
hetero = batch.to_hetero_data(200)
again = PerturbationBatch.from_hetero_data(hetero)
assert torch.equal(again.seeds, batch.seeds)

# 5. A cell_graph of HeteroData with (gene, relation, gene) edge types is a MultiGraph.
cell_graph = torch_geometric.data.HeteroData()
cell_graph["gene"].num_nodes = 200
for name in graph.relations:
    row = torch.arange(200).repeat_interleave(graph.rowptr(name).diff())
    cell_graph["gene", name, "gene"].edge_index = torch.stack([row, graph.col(name).long()])
assert cellattn.MultiGraph.from_hetero_data(cell_graph).num_edges("physical") == graph.num_edges("physical")
