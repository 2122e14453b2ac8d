"""These tests run the kernels' own source on the CPU: TRITON_INTERPRET=1 python -m pytest tests/interpreter"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":  # read when the kernels are imported: it needs a process of its own
    collect_ignore_glob = ["test_*.py"]
else:
    from .economy import economise

    economise()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """poison(module): what its launchers allocate with empty, empty_like and new_empty starts as NaN (integers: -1)."""

    def fill(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args, **kwargs) -> Tensor:
            x = f(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else -1)

        return filled

    def poison_module(module: ModuleType) -> None:
        class Torch:
            """torch as the module sees it."""

            empty = staticmethod(fill(torch.empty))
            empty_like = staticmethod(fill(torch.empty_like))

            def __getattr__(self, name: str):
                return getattr(torch, name)

        monkeypatch.setattr(module, "torch", Torch())
        monkeypatch.setattr(Tensor, "new_empty", fill(Tensor.new_empty))

    return poison_module
