from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cellattn.kernels import set_sum as kernels

SIZES = {
    "ordinary": [2, 1, 3],
    "empty": [0, 4, 0, 0],
    "long": [1000, 3],
    "no entries": [0, 0],
    "no sets": [],
}


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable) -> None:
    poison(kernels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 20, 100])
@pytest.mark.parametrize("name", SIZES)
def test_sums(name: str, width: int, dtype: torch.dtype) -> None:
    """Held to the bound of a sum of n numbers in any order, (n - 1) u sum |x|, and one rounding of the result."""
    sizes = torch.tensor(SIZES[name], dtype=torch.int64)
    ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": lambda x: x,
        "without the first row": lambda x: torch.cat([x[:1], x])[1:],
        "features far apart": lambda x: x.mT.contiguous().mT,
        "part of a row": lambda x: torch.cat([x, x], 1)[:, width:],
    }
    x = torch.randn(int(ptr[-1]), width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    exact = torch.segment_reduce(x.double(), "sum", offsets=ptr, axis=0, initial=0)
    magnitude = torch.segment_reduce(x.double().abs(), "sum", offsets=ptr, axis=0, initial=0)
    of_sum = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps / 2
    bound = max(SIZES[name], default=0) * of_sum * magnitude * 1.01 + torch.finfo(dtype).eps / 2 * magnitude
    for view in views.values():
        got = kernels.set_sum(view(x), ptr)
        assert got.dtype == dtype
        assert ((got.double() - exact).abs() <= bound).all()
