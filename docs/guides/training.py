"""A training loop in plain PyTorch: the cell is encoded once a step, whatever the batch."""

import torch

from cellattn.data import PERTURBATION_TYPES, synthetic_cell, synthetic_phenotypes
from cellattn.metrics import PearsonCorr
from cellattn.nn import CellTransformer

torch.manual_seed(0)
graph = synthetic_cell(num_genes=200)
data = synthetic_phenotypes(graph, 1024)
train, test = torch.utils.data.random_split(data, [0.8, 0.2])
loader = torch.utils.data.DataLoader(train, batch_size=128, shuffle=True)

model = CellTransformer(
    32, num_layers=1, num_heads=4, num_types=len(PERTURBATION_TYPES), num_genes=200,
    ties=[(0, head, relation, 0.1) for head, relation in enumerate(graph.relations[:4])],
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(3):
    for batch in loader:
        output = model(graph, batch.seeds, batch.ptr, batch.types)
        error = (output.prediction.squeeze(-1) - batch.y).square().mean()
        optimizer.zero_grad()
        (error + output.regularization).backward()
        optimizer.step()
    print(f"squared error {error.detach():.3f}, KL of each tie {[round(float(x.detach()), 2) for x in output.losses.values()]}")

model.eval()
with torch.no_grad():
    batch = next(iter(torch.utils.data.DataLoader(test, batch_size=len(test))))
    prediction = model(graph, batch.seeds, batch.ptr, batch.types).prediction.squeeze(-1)
correlation = PearsonCorr()
correlation.update(prediction, batch.y)
print(f"test Pearson {float(correlation.compute()):.3f}")
