"""What launchers make of the tensors that they are given."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn._aligned import is_aligned, width
from cellattn.kernels import segments, tensors
from cellattn.kernels.tensors import aligned, check_floats, grid_of, precision

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BACKENDS: Any = torch.backends  # newer attributes than its types
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _poisoned(poison) -> None:
    poison(tensors)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).to(dtype)


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    joint = numbers(2, 7, 3, 4, 20, dtype=dtype).permute(2, 0, 3, 1, 4)
    return {
        "contiguous": numbers(2, 4, 7, 24, dtype=dtype),
        "heads of 20": numbers(2, 4, 7, 20, dtype=dtype),
        "odd": numbers(2, 4, 7, 3, dtype=dtype),
        "q of a joint projection": joint[0],
        "k of a joint projection": joint[1],
        "first token left out": numbers(2, 4, 8, 180, dtype=dtype)[:, :, 1:],
        "one feature left out": numbers(2, 4, 7, 17, dtype=dtype)[..., 1:],
        "features far apart": numbers(2, 4, 24, 7, dtype=dtype).mT,
        "every other feature": numbers(2, 4, 7, 48, dtype=dtype)[..., ::2],
        "every other token": numbers(2, 4, 14, 24, dtype=dtype)[:, :, ::2],
        "one head, expanded": numbers(2, 1, 7, 24, dtype=dtype).expand(2, 4, 7, 24),
        "one token, expanded": numbers(2, 4, 1, 24, dtype=dtype).expand(2, 4, 7, 24),
        "one number, expanded": numbers(1, dtype=dtype).expand(2, 4, 7, 24),
        "no token": numbers(2, 4, 0, 24, dtype=dtype),
        "three leading dimensions, permuted": numbers(3, 2, 4, 7, 24, dtype=dtype).transpose(0, 1),
        "no leading dimension": numbers(7, 24, dtype=dtype),
    }


@dtypes
@pytest.mark.parametrize("lead", [1, 2])
@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_rows_are_whole_pieces_of_16_bytes(layout: str, lead: int, dtype: torch.dtype) -> None:
    x = layouts(dtype)[layout]
    rows = aligned(x, lead)
    assert rows.ndim == lead + 2
    assert torch.equal(rows.reshape(x.shape), x)
    whole = torch.as_strided(rows, (*rows.shape[:-1], width(x.shape[-1], dtype)), rows.stride(), rows.storage_offset())
    assert is_aligned(whole, whole.untyped_storage().data_ptr())
    assert not whole[..., x.shape[-1] :].any()  # zeros, not what was there


@pytest.mark.parametrize("layout", ["contiguous", "every other token", "one head, expanded", "one token, expanded"])
def test_rows_that_fit_are_not_copied(layout: str) -> None:
    x = layouts(torch.float16)[layout]
    assert aligned(x, 2).data_ptr() == x.data_ptr()


def test_rows_far_apart_are_copied_where_those_before_the_genes_would_not_be_skipped_in_32_bits() -> None:
    stride = 2**22
    x = torch.empty_strided((2, 8), (stride, 1), dtype=torch.float16).copy_(numbers(2, 8, dtype=torch.float16))
    assert aligned(x, 1, num_prefix=2**9 - 1).stride(1) == stride
    rows = aligned(x, 1, num_prefix=2**9)  # 2^31 numbers
    assert rows.stride(1) == 8
    assert torch.equal(rows[0], x)


def test_numbers_for_good_are_allocated_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a CUDA graph that is being warmed up is that of the thread that calls. What one reads is kept for good."""
    made: list[tuple[int, torch.device]] = []
    capturing = False

    def tensor(values: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append((threading.get_ident(), device))
        return torch.zeros(len(values), dtype=dtype)

    device = torch.device("cuda", 7)  # of no test beside this one: what is made is kept
    with monkeypatch.context() as patched, torch.inference_mode():
        patched.setattr(torch, "tensor", tensor)
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        first, again = (segments.device_ints((3, 1), device) for _ in range(2))
        assert not segments._CAPTURED
        capturing = True
        segments.device_ints((3, 1), device)
        assert segments._CAPTURED.pop(((3, 1), device)) is first
    assert first is again
    assert not first.is_inference()
    assert made == [(made[0][0], device)]
    assert made[0][0] != threading.get_ident()


def test_memory_of_others_may_begin_anywhere() -> None:
    memory = torch.zeros(4 * 24 * 2 + 2, dtype=torch.uint8)
    x = torch.frombuffer(memory.numpy(), dtype=torch.float16, offset=2, count=4 * 24).reshape(4, 24)
    assert x.data_ptr() % 16
    assert x.storage_offset() == 0
    assert aligned(x, 1).data_ptr() % 16 == 0


@pytest.fixture
def settings() -> Iterator[None]:
    """What a user sets is put back."""
    before = torch.backends.cuda.matmul.fp32_precision, BACKENDS.fp32_precision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of the older setting
        yield
        torch.backends.cuda.matmul.fp32_precision, BACKENDS.fp32_precision = before


def _older(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


def _matmul(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def _everywhere(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = "none"
    BACKENDS.fp32_precision = value


@pytest.mark.parametrize(
    ("change", "value", "expected"),
    [
        (_older, True, "tf32"),
        (_older, False, "ieee"),
        (torch.set_float32_matmul_precision, "high", "tf32"),
        (torch.set_float32_matmul_precision, "highest", "ieee"),
        (_matmul, "tf32", "tf32"),
        (_matmul, "ieee", "ieee"),
        (_everywhere, "tf32", "tf32"),
        (_everywhere, "ieee", "ieee"),
    ],
)
def test_precision_is_pytorchs_by_any_of_its_settings(change, value, expected: str, settings: None) -> None:
    change(value)
    assert precision() == expected


def test_a_grid_that_no_launch_may_have_is_refused() -> None:
    q = torch.empty(2**20, 2**12, 1, device="meta")
    assert grid_of(2**31 - 1, q=q) == (2**31 - 1,)
    with pytest.raises(ValueError, match=r"q: expected a problem of at most 2147483647 programs .*got 2147483648, of q \["):
        grid_of(2**31, q=q)


def test_float64_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"q: expected dtype float16 or bfloat16 or float32 on a GPU.*q\.float\(\)"):
        check_floats(q=torch.zeros(3, 4, dtype=torch.float64))
