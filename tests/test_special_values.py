"""NaN comes out of every function exactly where its definition reads what is NaN.

Which entries of a result read an entry of an argument is found by putting other numbers there: those that change read it.
Each of them, and none beside, is to be NaN where the entry is; of models each of them, since a difference of two equal
numbers, of which lazy models make many, is NaN where they are. What nothing reads (a gene that is not kept or not known, a row
that is not chosen or has no edge, a key behind a mask, a value that is overridden) may hold anything: no value and no gradient
shows it, and its own gradient is 0. Infinities and whole rows of attention are in `tests/ops/test_attention.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .registry import ENTRIES, GRAPHS, MODELS, Entry

MOST = 16  # entries of a tensor that are tried
OTHER_NUMBERS = (0.37, -1.3, 2.9, -6.1)  # several, since one may leave a ReLU as it is
RTOL = 1e-9  # what changes by less has not read the number: float64 rounds sums of it otherwise
REFUSE = {*GRAPHS, "PerturbationDataset"}
READERS = [name for name, entry in ENTRIES.items() if (entry.floats or entry.constants) and name not in REFUSE]

# Read where other numbers may not show it: a factor of sums that are 0; a value that is dropped; a row without an edge, whose
# log-sum-exp is made; what is put in order.
FACTORS = {("relational_spmm", "scale"), *((f"{op} dropout", "v") for op in ("attention", "edge_attention", "graph_attention"))}
ROWS = {("attention_kl valid", "q"), ("attention_kl_comembership valid", "q"), ("attention_bce drawn", "q")}
TAKEN_OFF = {("attention_kl_comembership", "k")}  # a gene's own key, out of the sums over its terms
ORDERS = {"edge_recovery", "record_layers"}

Run = Callable[[dict[str, Tensor]], list[Tensor]]


def run_of(entry: Entry) -> Run:
    return functools.partial(entry.run, module=entry.make_module())


def with_entry(entry: Entry, name: str, position: int, value: float) -> dict[str, Tensor]:
    tensors = {key: x.clone(memory_format=torch.contiguous_format) for key, x in entry.tensors.items()}
    tensors[name].view(-1)[position] = value
    return tensors


def positions(x: Tensor) -> list[int]:
    """All, or evenly spread ones with the first and the last."""
    return sorted(set(torch.linspace(0, x.numel() - 1, min(MOST, x.numel())).long().tolist()))


def reads(entry: Entry, run: Run, name: str, position: int) -> list[Tensor]:
    """Which entries of each result change with an entry of an argument."""
    before = run(dict(entry.tensors))
    changed = [torch.zeros(x.shape, dtype=torch.bool) for x in before]
    for value in OTHER_NUMBERS:
        for seen, x, y in zip(changed, before, run(with_entry(entry, name, position, value)), strict=True):
            seen |= ~torch.isclose(x.double(), y.double(), rtol=RTOL, atol=RTOL, equal_nan=True)
    return changed


def gradients(entry: Entry, run: Run, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {key: x.requires_grad_(key in entry.floats) for key, x in tensors.items()}
    parts = [x.double().square().sum() for x in run(tensors) if x.requires_grad]
    leaves = [tensors[key] for key in entry.floats]
    grads = torch.autograd.grad(torch.stack(parts).sum(), leaves, allow_unused=True, materialize_grads=True)
    return dict(zip(entry.floats, grads, strict=True))


@pytest.mark.parametrize("name", READERS)
def test_nan_comes_out_where_it_is_read(name: str) -> None:
    entry = ENTRIES[name]
    run = run_of(entry)
    for argument in (*entry.floats, *entry.constants):
        for position in positions(entry.tensors[argument]):
            where = f"{name}: NaN at {position} of {argument}"
            wanted = reads(entry, run, argument, position)
            got = run(with_entry(entry, argument, position, torch.nan))
            for i, (x, read) in enumerate(zip(got, wanted, strict=True)):
                nan = x.isnan() if x.is_floating_point() else torch.zeros_like(read)
                if x.is_floating_point():
                    assert not (read & ~nan).any(), f"{where}: result {i} hides it"
                if name not in {*MODELS, *ORDERS} and (name, argument) not in FACTORS | TAKEN_OFF:
                    assert not (nan & ~read).any(), f"{where}: result {i} has it where it is not read"


@pytest.mark.parametrize("name", [name for name in READERS if ENTRIES[name].floats])
def test_what_is_not_read_is_in_no_gradient(name: str) -> None:
    entry = ENTRIES[name]
    run = run_of(entry)
    for argument in (*entry.floats, *entry.constants):
        for position in positions(entry.tensors[argument]):
            if (name, argument) in FACTORS | ROWS or any(x.any() for x in reads(entry, run, argument, position)):
                continue
            want = gradients(entry, run, with_entry(entry, argument, position, 0.0))
            for value in (torch.nan, torch.inf, -torch.inf):
                where = f"{name}: {value} at {position} of {argument}"
                got = gradients(entry, run, with_entry(entry, argument, position, value))
                for key, grad in got.items():
                    error = float((grad - want[key]).abs().max())
                    assert error <= RTOL * float(want[key].abs().max()), f"{where}: d{key}"
                if argument in got:
                    assert got[argument].view(-1)[position] == 0, where
