"""The checkpoint that a run goes on from, and the states of the random generators that belong in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cellattn.checkpoint import Checkpoint, load


def load_checkpoint(path: Path, model: nn.Module) -> Checkpoint | None:
    """What `cellattn.checkpoint.save` wrote of such a model; None where there is none. Parts of a write that was killed are
    removed."""
    for part in path.parent.glob(f".{path.name}.*"):
        part.unlink()
    return load(path, model=model) if path.is_file() else None


def rng_state() -> dict[str, Any]:
    """States of the default generators of torch, numpy and Python, in types that a checkpoint may hold."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (others may draw from it)
    return {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])


def seed_everything(seed: int) -> None:
    """Seed the default generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


@contextmanager
def keep_rng() -> Iterator[None]:
    """Leave the default generators as they were found."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
