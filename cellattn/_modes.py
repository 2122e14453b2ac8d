"""What is made beside a user's tensors is where they are, whatever `torch.set_default_device` says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch._C import _len_torch_function_stack
from typing_extensions import ParamSpec

_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_function_modes(f: Callable[_P, _R]) -> Callable[_P, _R]:
    """f without the modes that are on functions of torch: another default device is one, under which a tensor that f makes for
    its own arithmetic on the CPU would be elsewhere, or on meta, which is silent garbage.
    """

    @functools.wraps(f)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_dynamo_compiling() or not _len_torch_function_stack():
            return f(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return f(*args, **kwargs)

    return call
