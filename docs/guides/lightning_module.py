"""Training in Lightning: the cell transformer on double mutants, in one process or, with `--devices 2`, in several.

    python docs/guides/lightning_module.py --devices 2

Batches, graph and losses are what they are in plain PyTorch (`plain.py` beside this file); Lightning moves the batches, since
they have a `.to`, and the graph goes where the model is in `on_fit_start`.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cellattn.data import PERTURBATION_TYPES, PerturbationBatch, require_same_genes, synthetic_cell, synthetic_phenotypes
from cellattn.metrics import PearsonCorr
from cellattn.nn import CellTransformer


class MutantModel(lightning.LightningModule):
    """Predicts a phenotype from the perturbed genes; one head learns the physical network."""

    def __init__(self, num_genes: int, graph: Any, lr: float = 1e-3) -> None:
        super().__init__()
        self.model = CellTransformer(
            32, num_layers=2, num_heads=2, num_types=len(PERTURBATION_TYPES), num_genes=num_genes,
            ties=[(0, 0, "physical", 0.1)],
        )  # fmt: skip
        self.graph, self.lr, self.pearson = graph, lr, PearsonCorr()

    def on_fit_start(self) -> None:
        self.graph = self.graph.to(self.device)

    def loss(self, batch: PerturbationBatch) -> tuple[Tensor, Tensor]:
        """The step's loss, and the predictions."""
        prediction, _, regularization = self.model(self.graph, batch.seeds, batch.ptr, batch.types)
        return torch.nn.functional.mse_loss(prediction[:, 0], batch.y) + regularization, prediction[:, 0]

    def training_step(self, batch: PerturbationBatch, _: int) -> Tensor:
        loss, _prediction = self.loss(batch)
        self.log("loss", loss, batch_size=len(batch), prog_bar=True)
        return loss

    def validation_step(self, batch: PerturbationBatch, _: int) -> None:
        self.pearson.update(self.loss(batch)[1].float(), batch.y.float())

    def on_validation_epoch_end(self) -> None:
        self.log("pearson", self.pearson.compute(), sync_dist=True)  # of several ranks: the mean of theirs
        self.pearson = PearsonCorr()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    graph = synthetic_cell(num_genes=200, symmetrize=True)
    data = synthetic_phenotypes(graph, 2_000)
    require_same_genes(graph.names, data.names)
    trainer = lightning.Trainer(
        max_steps=given.steps, devices=given.devices, accelerator="auto" if torch.cuda.is_available() else "cpu",
        strategy="ddp" if given.devices > 1 else "auto", logger=False, enable_checkpointing=False,
    )  # fmt: skip
    loaders = (DataLoader(data.subset(split), batch_size=32, shuffle=split == "train") for split in ("train", "validation"))
    trainer.fit(MutantModel(graph.num_nodes, graph), *loaders)
    trainer.validate(dataloaders=DataLoader(data.subset("test"), batch_size=32), model=trainer.lightning_module)
    if trainer.is_global_zero:
        print(f"steps {trainer.global_step}, ranks {trainer.world_size}")
