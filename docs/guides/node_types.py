"""Reactions, metabolites and terms beside genes: as tokens of their own, or as who shares them with whom."""

import json
import tempfile
from pathlib import Path

import torch

import cellattn
from cellattn import MultiGraph, nn
from cellattn.data import GeneList, read_metabolic_model

torch.manual_seed(0)

# A model of three reactions; put iMM904.json or Yeast8 in its place.
genes = GeneList(["YCR012W", "YKL060C", "YGR192C", "YJR009C", "YLR044C", "YDL227C"])
reactions = [
    {"id": "FBA", "gene_reaction_rule": "YKL060C", "metabolites": {"fdp": -1.0, "dhap": 1.0, "g3p": 1.0}},
    {"id": "GAPD", "gene_reaction_rule": "YGR192C or YJR009C", "metabolites": {"g3p": -1.0, "13dpg": 1.0}},
    {"id": "PGK", "gene_reaction_rule": "YCR012W", "metabolites": {"13dpg": -1.0, "3pg": 1.0}},
]
metabolites = [{"id": name} for name in ("fdp", "dhap", "g3p", "13dpg", "3pg")]
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.json"
    path.write_text(json.dumps({"reactions": reactions, "metabolites": metabolites}))
    model = read_metabolic_model(path, genes)

# Tokens of three types, one after another. Readers count within a type; the graph counts through all of them.
sizes = {"gene": len(genes), "reaction": len(model.reactions), "metabolite": len(model.metabolites)}
first_reaction, first_metabolite = sizes["gene"], sizes["gene"] + sizes["reaction"]
catalyses = model.gene_reaction.edge_index + torch.tensor([[0], [first_reaction]])
changes = model.reaction_metabolite + torch.tensor([[first_reaction], [first_metabolite]])
graph = MultiGraph.from_edge_index(
    {
        "physical": torch.tensor([[0, 2, 2], [2, 3, 4]]),  # between genes, as ever
        "catalyses": catalyses,
        "catalysed_by": catalyses.flip(0),
        "changes": changes,
    },
    sum(sizes.values()),
    node_types=sizes,
    joins={
        "catalyses": ("gene", "reaction"),
        "catalysed_by": ("reaction", "gene"),
        "changes": ("reaction", "metabolite"),
    },
    undirected=["physical"],
    names=[*genes, *model.reactions, *model.metabolites],
)
print(graph)
assert graph.node_types["reaction"] == range(6, 9)

# A head is tied or masked to a relation between two types as to any other. Rows are tokens of the first type, and valid columns
# those of the second: over="valid" is attention from genes to reactions alone.
encoder = nn.CellEncoder(
    32,
    2,
    4,
    ties=[(0, 0, "physical", 0.1), (0, 1, "catalyses", 0.1, {"over": "valid"}), (1, 1, "changes", 0.1)],
    masks=[(1, 2, "catalysed_by")],
)
tokens = torch.nn.Embedding(graph.num_nodes, 32)
h_cls, h, losses = encoder(tokens.weight, graph)
encoder.regularization(losses).backward()
at = graph.node_types["gene"]
h_genes = h[at.start : at.stop]  # what a perturbation head reads, whose sets are of genes
assert h_genes.shape == (6, 32)

# Genes that share a reaction, as the target of a head, with no token for reactions and no matrix of pairs: T = D⁻¹ B W Bᵀ.
# With weights 1 / (genes - 1) a large reaction is no larger part of a gene's row than a small one.
size = torch.bincount(model.gene_reaction.edge_index[1], minlength=len(model.reactions))
weight = 1 / (size - 1).clamp(min=1)
shared = graph.comembership("catalyses", weight=weight)
q, k, v = torch.randn(3, 1 + len(genes), 8).unbind(0)  # CLS and the genes
out, lse = cellattn.attention(q, k, v)
kl = cellattn.attention_kl_comembership(q, k, shared, lse=lse, num_prefix=1)
print(shared, f"{float(kl):.3f} nats")

# A head of the encoder is tied to it by its loss, and finds the weights in the graph.
tie = (0, 0, "catalyses", 0.1, {"loss": "kl_comembership"})
_, _, losses = nn.CellEncoder(32, 1, 4, ties=[tie])(tokens.weight, graph.with_column_weight("catalyses", weight))
assert list(losses) == ["kl_comembership/layer0/head0/catalyses"]

# Terms and complexes likewise: `read_go_annotations(...).edge_index`, or a table of two columns. With PyG,
# `MultiGraph.from_hetero_data(data)` takes all node types that its edge types join; `graph.to_hetero_data()` gives them back.
