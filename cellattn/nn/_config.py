"""The arguments that a model was made with, so that a file can hold all that makes it again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from .._check import unboxed

_Class = TypeVar("_Class", bound=type[nn.Module])


def keeps_config(cls: _Class) -> _Class:
    """Give each instance of a class `config`, a dict: the arguments of its constructor by name, defaults included."""
    init = cls.__init__
    signature = inspect.signature(init)
    options = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    @functools.wraps(init)
    def make(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        _, *arguments = given.arguments.items()
        config = {name: _unboxed(value) for name, value in arguments}
        if options is not None:
            config |= config.pop(options)
        vars(self)["config"] = config  # no part of the state

    setattr(cls, "__init__", make)  # noqa: B010
    return cls


def _unboxed(value: Any) -> Any:
    """An argument with Python's numbers in the place of NumPy's, which no file of JSON holds."""
    if isinstance(value, Mapping):
        return {key: _unboxed(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_unboxed, value))
    return unboxed(value)
