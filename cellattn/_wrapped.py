"""What PyTorch wraps around a model."""

from __future__ import annotations

import sys
from itertools import chain

from torch import nn
from torch.nn.parameter import is_lazy

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
}


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """What is wrapped around a model, the outermost first."""
    found: list[nn.Module] = []
    while type(model).__module__.startswith("torch.") and type(model).__name__ in _WRAPPERS:
        found.append(model)
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within what PyTorch wraps around it (`torch.compile`, data-parallel training, averages of weights).

    Raises:
        ValueError: weights without values (on meta, or of a lazy module that was never called), or ones that `fully_shard` has
            dealt out, which can be neither copied nor written.
    """
    if around := wrappers_of(model):
        model = getattr(around[-1], _WRAPPERS[type(around[-1]).__name__])
    sharded = sys.modules.get("torch.distributed.tensor")  # not loaded for the sake of this question
    for name, x in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(x) or x.is_meta:
            found = "one of a lazy module that was never called" if is_lazy(x) else "one on device meta"
            raise ValueError(f"model.{name}: expected a tensor that holds values, got {found}")
        if sharded is not None and isinstance(x, sharded.DTensor):
            raise ValueError(
                f"model: expected whole weights, got {name} dealt out to processes, as by fully_shard; gather them on all of "
                "these by get_model_state_dict of torch.distributed.checkpoint.state_dict with "
                "options=StateDictOptions(full_state_dict=True), and load them into a model made anew"
            )
    return model
