"""What a step asks of a GPU, counted without one: the CUDA branch of every operator on tensors of the device "meta".

Each operator that computes something is a launch at least, each Triton kernel is one, and what belongs to the extension counts
as one. On "meta" no value can be read, so a step that runs there waits for nothing.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cellattn.kernels
import cellattn.ops
from cellattn import _extension
from cellattn.ops._operator import Operator

from ..kernels.aot import recorded

# New views and empty memory.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided",
    "expand", "is_same_size", "new_empty", "new_empty_strided", "permute", "promote_types", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip


def _bodies() -> dict[str, Callable[..., Any]]:
    """What runs for CUDA tensors, of every operator whose body is Python."""
    bodies: dict[str, Callable[..., Any]] = {}
    for package in (cellattn.kernels, cellattn.ops):  # launchers have the names of the extension's operators
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for name, value in vars(importlib.import_module(info.name)).items():
                if isinstance(value, Operator):
                    bodies[value._name] = value._backend_fns.get("cuda") or value._init_fn
                elif package is cellattn.kernels and callable(value):
                    bodies.setdefault(name, value)
    return bodies


class Launches(TorchDispatchMode):
    """Counts by operator and kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self._bodies = _bodies()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        body = self._bodies.get(name) if func.namespace == "cellattn" else None
        if body is not None:
            with self:
                return inspect.unwrap(body)(*args, **(kwargs or {}))
        with self:  # inside of a body, what is made of other operators comes as it was called
            made = func.decompose(*args, **(kwargs or {}))
        if made is not NotImplemented:
            return made
        out = func(*args, **(kwargs or {}))
        if name not in FREE:
            self.count[name] += 1
            self.launched(name, args, out)
        return out

    def launched(self, name: str, args: Any, out: Any) -> None:
        """An operator that counts as a launch has run."""


@contextmanager
def served_on_meta() -> Iterator[None]:
    """The extension's operators answer on "meta", and so does autocast."""
    with (
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(_extension, "_DEVICES", {*_extension._DEVICES, "meta"}),
    ):
        yield


def launches_of(step: Callable[[], object]) -> Counter[str]:
    """Of one step, forward and backward."""
    with recorded(80) as triton, Launches() as found:
        step()
    return found.count + Counter(launch.fn.__name__ for launch in triton)
