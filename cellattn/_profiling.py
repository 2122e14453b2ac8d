"""Named ranges for profilers: NVTX for Nsight, `record_function` for torch.profiler; next to nothing where neither looks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import nvtx
import torch
from typing_extensions import ParamSpec

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def span(name: str) -> Iterator[None]:
    """A range around what is done inside, in the NVTX domain "cellattn"."""
    with nvtx.annotate(name, domain="cellattn"), torch.profiler.record_function(name):
        yield


def spanned(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Put every call of a function into a range; calls that are being compiled have none."""

    def decorate(f: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(f)
        def ranged(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return f(*args, **kwargs)
            with span(name):
                return f(*args, **kwargs)

        return ranged

    return decorate
