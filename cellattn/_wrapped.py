"""What PyTorch wraps around a model."""

from __future__ import annotations

from torch import nn

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within what PyTorch wraps around it (`torch.compile`, data-parallel training, averages of weights)."""
    while type(model).__module__.startswith("torch.") and type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model
