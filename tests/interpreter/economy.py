"""What Triton's interpreter does again for every step of every program and need not: results are the same without."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def economise() -> None:
    """Once, before the first launch."""
    _patch_the_language_once_a_launch()
    _remember_dtypes()
    # whether each integer sum overflows is computed, and looked at under `debug` alone
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_the_language_once_a_launch() -> None:
    """A device function patches what the kernel that calls it has patched."""
    patch = interpreter._patch_lang
    patched: set[int] = set()

    class Scope:
        """Of a launch."""

        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            patched.clear()
            self.scope.restore()

    def patch_once(fn: Any) -> Scope | None:
        modules = {id(module) for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())}
        if patched and modules <= patched:
            return None
        patched.update(modules)
        return Scope(patch(fn))

    interpreter._patch_lang = patch_once


def _remember_dtypes() -> None:
    of_scalar = functools.cache(interpreter._get_np_dtype)
    pointers = np.dtype(np.uint64)

    def np_dtype(dtype: Any) -> np.dtype:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return pointers if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    interpreter._get_np_dtype = np_dtype
