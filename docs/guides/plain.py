"""The same training in plain PyTorch: what `lightning_module.py` beside this file leaves to Lightning is the loop below.

python docs/guides/plain.py
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader

from cellattn.data import PERTURBATION_TYPES, batches_on, require_same_genes, synthetic_cell, synthetic_phenotypes
from cellattn.metrics import PearsonCorr
from cellattn.nn import CellTransformer

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    graph = synthetic_cell(num_genes=200, symmetrize=True)
    data = synthetic_phenotypes(graph, 2_000)
    require_same_genes(graph.names, data.names)
    graph = graph.to(device)
    model = CellTransformer(
        32, num_layers=2, num_heads=2, num_types=len(PERTURBATION_TYPES), num_genes=graph.num_nodes,
        ties=[(0, 0, "physical", 0.1)],
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    train, test = (DataLoader(data.subset(split), batch_size=32, shuffle=split == "train") for split in ("train", "test"))
    step = 0
    while step < given.steps:
        for batch in batches_on(device, train):
            prediction, losses, regularization = model(graph, batch.seeds, batch.ptr, batch.types)
            loss = torch.nn.functional.mse_loss(prediction[:, 0], batch.y) + regularization
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == given.steps:
                break
    model.eval()
    pearson = PearsonCorr()
    with torch.no_grad():
        for batch in batches_on(device, test):
            pearson.update(model(graph, batch.seeds, batch.ptr, batch.types).prediction[:, 0], batch.y)
    ties = ", ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
    print(f"steps {step}, loss {loss.item():.3f} ({ties}), test Pearson {pearson.compute():.3f}")
