"""The compiled extension `cellattn._C`: operators in C++ and CUDA, to which the ops add their fakes.

Without it, as in a checkout that was not built, all works on a CPU but the k-hop ops, `edge_attention`, and `attention_bce`
with every non-edge of more than some 500 genes.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch  # before the extension, which finds LibTorch already loaded

_problem: ImportError | None = None
try:
    importlib.import_module("cellattn._C")
except ImportError as error:
    _problem = error

AVAILABLE = _problem is None
_DEVICES = {
    device
    for device in ("cpu", "cuda")
    if AVAILABLE and torch._C._dispatch_has_kernel_for_dispatch_key("cellattn::khop_words", device.upper())
}


def require_extension(device: torch.device) -> None:
    """Check that the extension is there, and serves tensors of a device.

    Raises:
        ImportError: it was not built, or does not load.
        NotImplementedError: it was built without CUDA, or the device is neither a CPU nor a CUDA GPU.
    """
    if not AVAILABLE:
        raise ImportError(
            "cellattn: operators in C++ need the compiled extension cellattn._C: `pip install .`, or "
            f"`python setup.py build_ext --inplace` in a checkout, builds it ({_problem})"
        ) from _problem
    if device.type in _DEVICES:
        return
    if device.type == "cuda":
        raise NotImplementedError(
            f"graph: its tensors are on {device}, but the extension cellattn._C was built without CUDA; install it again "
            "where CUDA_HOME names a CUDA toolkit, or move the graph to the CPU"
        )
    raise NotImplementedError(f"graph: the k-hop operators run on cpu and cuda, got a graph on {device}")


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the fake of one of the extension's operators; nothing where the extension is not there.

    Raises:
        ImportError: the extension is of other sources: it has no such operator, or one of other arguments.
    """
    if not AVAILABLE:
        return lambda f: f
    if not torch._C._dispatch_has_kernel(f"cellattn::{name}"):
        raise _of_other_sources(f"has no operator cellattn::{name}")

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(f).parameters.values()
        takes = len(torch._C._get_schema(f"cellattn::{name}", "").arguments)
        if all(p.kind is not p.VAR_POSITIONAL for p in parameters) and len(parameters) != takes:
            raise _of_other_sources(f"has an operator cellattn::{name} of {takes} arguments, expected {len(parameters)}")
        return torch.library.register_fake(f"cellattn::{name}")(f)

    return register


def _of_other_sources(what: str) -> ImportError:
    return ImportError(
        f"cellattn: the extension cellattn._C {what}: it was built from other sources; build it again: `pip install .`, or "
        "`python setup.py build_ext --inplace` in a checkout"
    )


def cuda_kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the CUDA implementation, in Python, of one of the extension's operators; nothing where it is not there."""
    return torch.library.register_kernel(f"cellattn::{name}", "cuda") if AVAILABLE else lambda f: f
