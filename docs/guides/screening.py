"""Every pair of a roster with an ensemble of two models: run, stopped or not, merged, and read without this library."""

import tempfile
from pathlib import Path

import polars
import torch

from cellattn import checkpoint
from cellattn.data import PERTURBATION_TYPES, synthetic_cell
from cellattn.nn import CellTransformer
from cellattn.screen import merge, screen, status

folder = Path(tempfile.mkdtemp())
names = [f"gene{i}" for i in range(60)]
graph = synthetic_cell(num_genes=60)
graph.save(folder / "graph.safetensors")

# Two models, as training leaves them: one file each, with the names of its genes and the graph that it belongs to.
files = []
for seed in range(2):
    torch.manual_seed(seed)
    model = CellTransformer(16, num_layers=1, num_heads=2, num_types=len(PERTURBATION_TYPES), num_genes=60)
    files.append(folder / f"model{seed}.safetensors")
    checkpoint.save(files[-1], model, genes=names, graph=graph, graph_file=folder / "graph.safetensors")

# All pairs of the first forty genes. The same call again does what is missing, if anything is.
screen(files, out=folder / "pairs", genes=names[:40], order=2, keep="all", progress=False)
print(status(folder / "pairs"))
merge(folder / "pairs")  # pairs/result: the ranking, tables of the genes, and a page with figures

rows = polars.scan_parquet(folder / "pairs" / "unit-*.parquet").sort("mean").collect()
assert len(rows) == 40 * 39 // 2
print(rows.head(3))
