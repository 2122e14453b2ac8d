"""The library's launchers on the machine: small Triton kernels, compiled."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests import ptx

from . import decode
from .device import Allocations


@triton.jit
def _square(x, y, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        b = tl.load(x + o, mask=o < n, other=0.0).to(tl.float32)
        tl.store(y + o, b * b + 2 * b, mask=o < n)
    else:
        b = tl.load(x + o).to(tl.float32)
        tl.store(y + o, b * b + 2 * b)


def square(x: Tensor, *, masked: bool = True, out: Tensor | None = None) -> Tensor:
    """x^2 + 2 x, of small whole numbers exact in every dtype."""
    y = torch.empty_like(x) if out is None else out
    _square[(triton.cdiv(x.numel(), 128),)](x, y, x.numel(), BLOCK=128, MASKED=masked)
    return y


def drawn(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-8, 9, (n,), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_a_kernel_runs(dtype: torch.dtype, arch: int) -> None:
    x = drawn(300, dtype)
    with ptx.device(arch) as made:
        y = square(x)
    assert torch.equal(y, x * x + 2 * x)
    assert made.launches == ["_square"]


def test_the_order_of_ctas_changes_nothing() -> None:
    x = drawn(3000)
    with ptx.device(order=1):
        assert torch.equal(square(x), x * x + 2 * x)


def test_a_mask_left_out_is_a_fault_with_all_that_finds_it(monkeypatch) -> None:
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/some.py::test[a b] (call)")
    with pytest.raises(ptx.Fault) as error, ptx.device():
        square(torch.zeros(300), masked=False)
    message = str(error.value)
    assert "_square: access outside: " in message
    assert "bytes past argument x" in message
    assert "test_device.py:" in message
    assert "of CTA 2" in message
    assert "to repeat: python -m pytest 'tests/some.py::test[a b]'" in message


def test_inputs_are_not_to_be_written() -> None:
    x = torch.zeros(128)
    with ptx.device(), pytest.raises(ptx.Fault, match="write to the input y"):
        square(x, out=torch.zeros(0).set_(x.untyped_storage()))
    with ptx.device():
        square(x, out=x.clone())  # made under the device


def test_what_nothing_wrote_is_not_to_be_read() -> None:
    with ptx.device(), pytest.raises(ptx.Fault, match="read of bytes of x that nothing wrote"):
        square(torch.empty(128))
    with ptx.device():
        x = torch.empty(2, 128)
        x[:, :100] = 0
        with pytest.raises(ptx.Fault, match="read of bytes of x that nothing wrote"):
            square(x[0])
    with ptx.device():
        x = torch.empty(2, 128)
        x[0].copy_(torch.ones(128))
        assert torch.equal(square(x[0]), torch.full((128,), 3.0))
        assert torch.equal(square(square(x[0])), torch.full((128,), 15.0))
        torch.zeros(128).add_(1)


def test_arguments_have_guards_inside_of_their_storage() -> None:
    """A view ends where its last element does, though its storage goes on."""
    x = torch.zeros(1000)
    with ptx.device(), pytest.raises(ptx.Fault, match="bytes past argument x"):
        square(x[:300], masked=False)
    with ptx.device():
        assert square(x[3:131], masked=False).shape == (128,)  # off 16 bytes too


def test_a_mutated_kernel_is_executed() -> None:
    def without_the_product(name: str, text: str) -> str:
        assert name == "_square"
        return text.replace("fma.rn.f32", "max.f32")

    x = torch.full((128,), 3.0)
    with ptx.device(mutate=without_the_product):
        assert torch.equal(square(x), torch.full((128,), 6.0))


def test_stores_by_pytorch_are_noticed_by_element() -> None:
    with Allocations() as watched:
        x = torch.empty(4, 6, dtype=torch.int16)
        x[1:3, ::2] = 5
        y = torch.empty(3)
        torch.add(torch.ones(3), 1, out=y)
        z = torch.ones(2)
    written = watched.made[x.untyped_storage().data_ptr()].written
    assert written is not None
    assert (written.reshape(4, 6, 2) == 255).all(2).tolist() == [
        [1 <= i < 3 and j % 2 == 0 for j in range(6)] for i in range(4)
    ]
    of_y, of_z = (watched.made[t.untyped_storage().data_ptr()].written for t in (y, z))
    assert of_y is not None
    assert (of_y == 255).all()
    assert of_z is None


def test_every_opcode_has_a_test() -> None:
    """By name, in the text of the tests beside this one."""
    from pathlib import Path

    from . import collectives, hopper, instructions, transfers  # noqa: F401

    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    missing = [name for name in decode.OPCODES if f"{name}." not in text and f"{name};" not in text]
    assert missing == []
    groups = (
        "Integer arithmetic", "Floating point", "Comparison and selection", "Logic and shift", "Data movement and conversion",
        "Control flow", "Synchronization and communication", "Warp level matrix", "Asynchronous warpgroup level matrix",
        "Miscellaneous",
    )  # fmt: skip
    assert all((f.__doc__ or "").startswith(groups) for f in decode.OPCODES.values())
