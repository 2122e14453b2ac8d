"""Batches under what Lightning does to them on the way to a model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from cellattn.data import PerturbationDataset

pytest.importorskip("lightning")


def test_batches_move_and_change_precision() -> None:
    from lightning.fabric.plugins.precision import HalfPrecision
    from lightning.fabric.utilities.apply_func import move_data_to_device
    from lightning_utilities.core.apply_func import apply_to_collection

    data = PerturbationDataset.from_sets([[0, 2], [1], []], [1.5, 2.5, 3.5], num_genes=3)
    batch = next(iter(DataLoader(data, batch_size=3)))
    moved = move_data_to_device({"mutants": batch}, torch.device("cpu"))["mutants"]
    half = HalfPrecision("bf16-true").convert_input(batch)
    doubled = apply_to_collection(batch, torch.Tensor, lambda x: 2 * x)
    for other in (moved, half, doubled):
        assert type(other) is type(batch)
        assert other is not batch
        assert len(other) == 3
    assert half.y.dtype == torch.bfloat16
    assert half.seeds.dtype == torch.int64
    assert torch.equal(doubled.seeds, 2 * batch.seeds)
    assert batch.y.dtype == torch.float32
    assert torch.equal(batch.seeds, torch.tensor([0, 2, 1]))
