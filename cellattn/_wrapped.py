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


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The module within what PyTorch wraps around it (`torch.compile`, data-parallel training, averages of weights), and what
    that is, the outermost first.
    """
    wrappers: list[nn.Module] = []
    while type(model).__module__.startswith("torch.") and type(model).__name__ in _WRAPPERS:
        wrappers.append(model)
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model, wrappers


def require_values(model: nn.Module) -> None:
    """Refuse what can be neither copied nor written.

    Raises:
        ValueError: weights without values (on meta, or of a lazy module that was never called), or ones that `fully_shard` has
            dealt out.
    """
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
