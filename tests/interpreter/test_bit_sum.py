from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cellattn.kernels import bit_sum as kernels
from cellattn.kernels import config, tensors
from cellattn.kernels.config import Tile

DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 1, 1), (7, 63, 3), (64, 64, 20), (130, 65, 16), (5, 129, 33), (3, 200, 100), (129, 257, 7)]


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products of bfloat16 are wrong; float32 holds each piece of a number as well."""
    for module in (kernels, tensors):
        poison(module)
    monkeypatch.setattr(kernels, "PIECE", torch.float32)


def packed(mask: Tensor) -> Tensor:
    """bool [M, C] -> int64 [M, ceil(C / 64)]"""
    m, c = mask.shape
    bits = torch.zeros(m, -(-c // 64) * 64, dtype=torch.int64)
    bits[:, :c] = mask
    return (bits.view(m, -(-c // 64), 64) << torch.arange(64)).sum(-1)


def drawn(m: int, c: int, density: float = 0.4) -> Tensor:
    return torch.rand(m, c, generator=torch.Generator().manual_seed(m + c)) < density


def check(x: Tensor, mask: Tensor, rows: Tensor | None = None) -> None:
    """Within the bound of a sum in float32 in any order, (n - 1) u sum |x|, of up to three pieces a number."""
    got = kernels.bit_sum(x, packed(mask), rows)
    chosen = mask.double() if rows is None else mask.double()[rows]
    assert (got.dtype, got.shape) == (torch.float32, (*x.shape[:-2], len(chosen), x.shape[-1]))
    bound = 3 * mask.shape[1] * torch.finfo(torch.float32).eps / 2 * (chosen @ x.double().abs())
    assert ((got.double() - chosen @ x.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "c", "d"), SHAPES, ids=str)
def test_sums(m: int, c: int, d: int, dtype: torch.dtype) -> None:
    x = torch.randn(c, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    for density in (0.4, 1.0):
        check(x, drawn(m, c, density))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_digit_is_kept(dtype: torch.dtype) -> None:
    """Of one number, whatever its size: nothing is rounded."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(70, 20, generator=g) * 2.0 ** torch.randint(-14, 15, (70, 20), generator=g)
    x[0], x[1], x[2] = torch.finfo(dtype).max, -torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * (1 + 2**-7)
    x = x.to(dtype)
    each = torch.eye(70, dtype=torch.bool)
    assert torch.equal(kernels.bit_sum(x, packed(each), None), x.float())


@pytest.mark.parametrize("lead", [(3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leading_dimensions_and_strides(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    """Features that do not follow each other, heads inside tokens, and one x for all."""
    x = torch.randn(*lead, 100, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = drawn(67, 100)
    tokens_first = x.transpose(0, -2).contiguous().transpose(0, -2)
    for view in (x, x.mT.contiguous().mT, tokens_first, x[..., :7], x.sum(0).to(dtype).expand(3, *x.shape[1:])):
        check(view, mask)


@pytest.mark.parametrize("rows", [[], [5], [3, 0, 66, 3, 3], list(range(66, -1, -1)) * 2], ids=["none", "one", "some", "twice"])
def test_rows(rows: list[int]) -> None:
    x = torch.randn(2, 100, 20, generator=torch.Generator().manual_seed(2))
    check(x, drawn(67, 100), torch.tensor(rows, dtype=torch.int64))


@pytest.mark.parametrize(("m", "c", "d"), [(0, 70, 3), (3, 0, 3), (3, 70, 0)], ids=str)
def test_nothing_to_add(m: int, c: int, d: int) -> None:
    assert torch.equal(kernels.bit_sum(torch.ones(2, c, d), packed(drawn(m, c)), None), torch.zeros(2, m, d))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_set_is_not_read(dtype: torch.dtype) -> None:
    """A NaN or an infinity reaches the rows that have its column, and no other; both signs of infinity make NaN."""
    x = torch.ones(2, 300, 20, dtype=dtype)
    x[0, 3], x[0, 64], x[0, 299, 7], x[1, 299] = torch.nan, torch.inf, -torch.inf, torch.inf
    mask = drawn(150, 300)
    mask[7], mask[8] = False, torch.arange(300) == 3
    got = kernels.bit_sum(x, packed(mask), None)
    expected = torch.stack([torch.stack([y[row].float().sum(0) for row in mask]) for y in x])
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(nan=0), expected.nan_to_num(nan=0))


def test_parts_of_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts, the last of which is short; an infinity is added by the one that has it."""
    monkeypatch.setattr(config, "num_multiprocessors", lambda device: 1000)
    monkeypatch.setattr(config, "MIN_BLOCKS_A_PART", 1)
    x, mask = torch.randn(2, 300, 20, generator=torch.Generator().manual_seed(3)), drawn(20, 300)
    check(x, mask)
    x[1, 200] = torch.inf
    got = kernels.bit_sum(x, packed(mask), None)
    assert torch.equal(got.isinf(), torch.stack([torch.zeros(20, dtype=torch.bool), mask[:, 200]])[..., None].expand(2, 20, 20))


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (32, 32)], ids=str)
def test_other_tiles(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "tile_for", lambda *args, **options: Tile(rows, columns, 1, 1))
    check(torch.randn(2, 130, 40, generator=torch.Generator().manual_seed(4)), drawn(70, 130))


def test_what_triton_compiles_wrongly_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four warps on sm_90, where `search` leaves a tile out that raises this."""
    monkeypatch.setattr(config, "tile_for", lambda *args, **options: Tile(64, 32, 4, 3))
    x, words = torch.ones(100, 3), torch.zeros(5, 2, dtype=torch.int64)
    kernels.bit_sum(x, words, None)
    monkeypatch.setattr(config, "capability", lambda device: 90)
    with pytest.raises(RuntimeError, match="at most 2 warps on sm_90, got Tile"):
        kernels.bit_sum(x, words, None)


def test_bad_input() -> None:
    x, words = torch.ones(100, 3), torch.zeros(5, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="words"):
        kernels.bit_sum(torch.ones(200, 3), words, None)
    with pytest.raises(ValueError, match="words: expected dtype int64"):
        kernels.bit_sum(x, words.int(), None)
    with pytest.raises(ValueError, match="rows: expected dtype int64"):
        kernels.bit_sum(x, words, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match="k: expected dtype"):
        kernels.bit_sum(x.double(), words, None)
