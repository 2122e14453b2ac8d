"""What machinery of PyTorch is on: whether there is any; and how what is made beside a user's tensors is where they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch.nn import Parameter
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


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on where x is; on meta PyTorch would raise."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def is_plain(args: Iterable[Any]) -> bool:
    """Whether the dispatcher would come to the CPU's implementation with nothing to do on the way but the gradient.

    So it is in eager mode, for tensors of no subclass but parameters.
    """
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
        return False
    for x in args:  # not by a generator, which takes longer: small problems are all calls
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if not x.is_cpu:
                return False
        elif kind not in _NO_TENSORS and isinstance(x, Tensor):
            return False
    return True


_NO_TENSORS = (NoneType, int, float, bool)  # of which isinstance would ask in Python
