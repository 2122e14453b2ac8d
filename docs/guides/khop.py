"""Neighbourhoods of a batch of gene sets in all relations, as a PyG loader gives them, without a loop over samples."""

import torch

import cellattn
from cellattn.data import synthetic_cell

graph = synthetic_cell(num_genes=500)
seeds = torch.tensor([17, 402, 9, 33, 250])  # two sets, {17, 402} and {9, 33, 250}
ptr = torch.tensor([0, 2, 5])

# Before: for sample in batch: for relation in graph: k_hop_subgraph(...), subgraph(...); Batch.from_data_list(...)
batch = cellattn.khop_subgraph(graph, seeds, ptr, 2)
print(batch)  # nodes and edges, in total and a sample

# Genes within two hops as a mask, where a model needs no edges of its own.
keep = cellattn.khop_mask(graph, seeds, ptr, 2)  # bool [2, 500]
assert int(keep.sum()) == batch.num_nodes

# The perturbed genes left out of their own neighbourhood, and the next batch in the memory of the last.
batch = cellattn.khop_subgraph(graph, seeds, ptr, 1, drop_seeds=True, out=batch)

# Message passing over the graph without each set: one graph, B samples, no copied edge.
node_keep, _ = cellattn.perturbation_mask(graph, seeds, ptr)
x = torch.randn(500, 16, requires_grad=True)
h = cellattn.masked_spmm(graph, "physical", x, node_keep, reduce="mean")  # [2, 500, 16]
h.square().mean().backward()
assert x.grad is not None
