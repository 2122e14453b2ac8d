"""Whole ops at scores of any size: what `tests/ops/test_large_scores.py` holds the CPU to, with Triton's kernels in its place.

Ops take the way that they take on a GPU, through the launchers in kernels/, on tensors of the CPU and in the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode

from ..conftest import exhaustive
from ..ops import test_large_scores as on_the_cpu
from ..registry import ENTRIES, Entry


class _Launchers(TorchDispatchMode):
    """Operators whose CUDA implementation is in Python are called with it."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.replace("::", "/")
        if func.namespace == "cellattn":
            for implemented, key in (("CUDA", DispatchKey.CUDA), ("CompositeExplicitAutograd", DispatchKey.CPU)):
                if f"{name}/{implemented}" in torch.library._impls:
                    self.called.add(name)
                    with self:
                        return func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def triton() -> Iterator[None]:
    with _Launchers() as launchers:
        yield
    assert launchers.called


# (1e2, 1e5) of float32 and 1e4 of float16 stand for all of them in `make test`.
SHORT = [(1e2, torch.float32), (1e5, torch.float32), (1e4, torch.float16)]
SIZES = [*((size, torch.float32) for size in (1e2, 1e4, 1e5, 1e6, 1e8, 1e10)), (1e4, torch.float16), (1e6, torch.float16)]


def cases(*names: str) -> list[Any]:
    found = [(name, *of) for name in names for of in SIZES]
    short = [case for case in found if case[1:] in SHORT]
    return [*short, *exhaustive(*(case for case in found if case not in short))]


@pytest.mark.parametrize(("name", "size", "dtype"), cases(*on_the_cpu.LOSSES), ids=str)
def test_losses(name: str, size: float, dtype: torch.dtype) -> None:
    with triton():
        on_the_cpu.test_losses(name, size, dtype)


@pytest.mark.parametrize(
    ("size", "negatives", "rows"),
    [*on_the_cpu.LAST_DIGITS[2:4], *exhaustive(*on_the_cpu.LAST_DIGITS[:2], *on_the_cpu.LAST_DIGITS[4:])],
    ids=on_the_cpu.name_of,
)
def test_bce_of_scores_that_differ_in_the_last_digits(
    size: float, negatives: int | float | None, rows: tuple[int, ...] | None
) -> None:
    with triton():
        on_the_cpu.test_bce_of_scores_that_differ_in_the_last_digits(size, negatives, rows)


@pytest.mark.parametrize(("name", "size", "dtype"), cases("attention"), ids=str)
def test_attention(name: str, size: float, dtype: torch.dtype) -> None:
    with triton():
        on_the_cpu.test_attention(size, dtype)


@pytest.mark.parametrize(("name", "size", "dtype"), cases("edge_attention"), ids=str)
def test_edge_attention(name: str, size: float, dtype: torch.dtype) -> None:
    with triton():
        on_the_cpu.test_edge_attention(size, dtype)


@pytest.mark.parametrize("weighted", [True, *exhaustive(False)])
def test_edge_attention_of_scores_that_differ_in_the_last_digits(weighted: bool) -> None:
    with triton():
        on_the_cpu.test_edge_attention_of_scores_that_differ_in_the_last_digits(weighted)


@pytest.mark.parametrize(("name", "size", "dtype"), cases("perturbation_attention"), ids=str)
def test_perturbation_attention(name: str, size: float, dtype: torch.dtype) -> None:
    with triton():
        on_the_cpu.test_perturbation_attention(size, dtype)


@pytest.mark.parametrize(("z_size", "w_size"), [(1e18, 1e-18), (1e18, 1e18), (1e-20, 1e-20), (1e-20, 1e20), (1e10, 1e10)])
def test_network_mse(z_size: float, w_size: float) -> None:
    with triton():
        on_the_cpu.test_network_mse(z_size, w_size)


NAMES = [
    "attention_kl", "attention_kl valid", "attention_kl_comembership", "attention_kl_comembership valid", "attention_bce",
    "attention_bce drawn", "attention_bce sigmoid", "edge_attention", "graph_attention", "graph_attention bce",
    "perturbation_attention", "masked_spmm", "relational_spmm", "relational_spmm shared", "network_mse",
    "WildtypeDifference lazy gat", "WildtypeDifference delta gat",
]  # fmt: skip


def results(entry: Entry, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, and gradients of a sum of them."""
    given = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    given = {name: x.clone().requires_grad_(name in entry.floats) for name, x in given.items()}
    module = entry.make_module()
    out = entry.run(given, None if module is None else module.float())
    total = torch.stack([x.sum() for x in out if x.requires_grad]).sum()
    leaves = [given[name] for name in entry.floats]
    return [x.detach() for x in (*out, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))]


# Of attention_bce and perturbation_attention, which the CPU computes otherwise, 0 * inf is not everywhere NaN in both.
INFINITE = [
    "attention_kl", "attention_kl valid", "edge_attention", "graph_attention", "masked_spmm", "relational_spmm shared",
    "network_mse",
]  # fmt: skip
ALWAYS = ("attention_kl valid", "network_mse", "WildtypeDifference delta gat")  # in `make test`
# A factor of a sum without a term, which the CPU does not make.
NOT_READ = {("relational_spmm", "scale")}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, torch.nan) for name in ALWAYS),
        *exhaustive(*((name, torch.nan) for name in NAMES if name not in ALWAYS)),
        *exhaustive(*((name, value) for name in INFINITE for value in (torch.inf, -torch.inf))),
        *exhaustive(*((name, 1e8) for name in ("attention_kl", "attention_kl valid"))),
    ],
    ids=str,
)
def test_one_entry(name: str, value: float) -> None:
    """Of each argument the first, one in the middle and the last: NaN and infinities come out where the CPU has them."""
    entry = ENTRIES[name]
    for argument in (*entry.floats, *entry.constants):
        if (name, argument) in NOT_READ:
            continue
        x = entry.tensors[argument]
        for position in {0, x.numel() // 2, x.numel() - 1}:
            tensors = {**entry.tensors, argument: x.clone(memory_format=torch.contiguous_format)}
            tensors[argument].view(-1)[position] = value
            want = results(entry, tensors)
            with triton():
                got = results(entry, tensors)
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                where = f"{argument} {position}: result {i}"
                for what in (torch.isnan, torch.isinf):
                    at, expected = (what(y).nonzero().tolist() for y in (a, b))
                    assert at == expected, f"{where}: {what.__name__} at {at}, the CPU's at {expected}"
                finite = b.isfinite()
                largest = max(1.0, float(b[finite].abs().max())) if finite.any() else 1.0
                # float32 sums of fewer than 20 products of numbers around 1
                assert ((a - b)[finite].abs() <= 1e-5 * largest).all(), where
