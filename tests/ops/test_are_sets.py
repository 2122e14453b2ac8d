"""One look at a ragged batch says whether the checks that name an argument would find something."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellattn._check import require_ascending, require_distinct, require_indices, require_ragged

ORDERS = {"any": (False, False), "ascending": (True, False), "distinct": (False, True)}


def named(index: Tensor, ptr: Tensor, size: int, ascending: bool, distinct: bool) -> bool:
    """What the checks say."""
    try:
        require_ragged("index", index, ptr)
        require_indices("index", index, size)
        if ascending:
            require_ascending("index", index, ptr)
        if distinct:
            require_distinct("index", index, ptr)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("order", ORDERS)
def test_agrees_with_the_checks(order: str) -> None:
    g, said = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        num_sets, length, size = (int(torch.randint(low, 7, (), generator=g)) for low in (0, 0, 1))
        index = torch.randint(-1, 7, (length,), generator=g) if length % 2 else torch.arange(length)
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(-1, 7, (num_sets,), generator=g)])
        ptr = ptr.sort().values if length != 3 else ptr
        if num_sets and size % 2:
            ptr[-1] = length
        verdict = named(index, ptr, size, *ORDERS[order])
        assert bool(torch.ops.cellattn.are_sets(index, ptr, size, *ORDERS[order])) == verdict
        said.append(verdict)
    assert set(said) == {False, True}


@pytest.mark.parametrize("order", ORDERS)
def test_each_fault(order: str) -> None:
    index, ptr = torch.tensor([1, 3, 0, 2]), torch.tensor([0, 2, 2, 4])

    def sound(index: Tensor, ptr: Tensor, size: int = 4) -> bool:
        return bool(torch.ops.cellattn.are_sets(index, ptr, size, *ORDERS[order]))

    assert sound(index, ptr)
    assert not sound(index, ptr, 3)
    assert not sound(-index, ptr)
    assert not sound(index, ptr[1:])
    assert not sound(index, ptr[:-1])
    assert not sound(index, ptr[:0])
    assert not sound(index, torch.tensor([0, 3, 2, 4]))
    assert not sound(index, torch.tensor([0, 2**62, -(2**62), 4]))
    assert sound(index.flip(0), ptr) == (order != "ascending")
    assert sound(torch.tensor([1, 3, 2, 2]), ptr) == (order == "any")
    assert sound(torch.tensor([1, 3, 1, 3]), ptr)
    assert sound(index[:0], ptr[:1])
