from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cellattn.nn import HyperSAGNN
from cellattn.ops.set_attention import set_attention

from . import dense

SETS = {"mixed": [0, 2, 2, 3, 7, 10], "singles": [0, 1, 2, 3], "one": [0, 5], "empty": [0, 0, 0], "no sets": [0]}


def module(dim: int = 8, num_heads: int = 2) -> HyperSAGNN:
    torch.manual_seed(0)
    model = HyperSAGNN(dim, num_heads).double()
    torch.nn.init.constant_(model.rezero, 0.7)  # 0 at the start, where the attention has no say
    return model


def ragged(ptr: list[int], *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ptr[-1], *shape, dtype=torch.float64, generator=generator), torch.tensor(ptr)


@pytest.mark.parametrize("ptr", SETS.values(), ids=SETS)
def test_dense(ptr: list[int]) -> None:
    model = module()
    x, offsets = ragged(ptr, 8)
    expected = [dense.hypersagnn(model, x[begin:end]) for begin, end in itertools.pairwise(ptr)]
    torch.testing.assert_close(model(x, offsets), torch.stack(expected) if expected else x.new_zeros(0, 8))


def test_gradients_reach_every_parameter() -> None:
    model = module()
    x, ptr = ragged(SETS["mixed"], 8)
    model(x, ptr).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_set_of_one_gets_no_attention() -> None:
    q, ptr = ragged([0, 1, 3], 2, 4)
    out = set_attention(q, q, q, ptr)
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1], q[2])  # of two genes each sees the other alone
    torch.testing.assert_close(out[2], q[1])


@pytest.mark.parametrize("ptr", SETS.values(), ids=SETS)
def test_set_attention_gradcheck(ptr: list[int]) -> None:
    q, offsets = ragged(ptr, 2, 3)
    inputs = [(q * scale).requires_grad_() for scale in (1.0, 0.5, 2.0)]
    assert torch.autograd.gradcheck(lambda q, k, v: set_attention(q, k, v, offsets), inputs)


def test_set_attention_opcheck() -> None:
    q, ptr = ragged(SETS["mixed"], 2, 3)
    torch.library.opcheck(set_attention, (q.requires_grad_(), q, q, ptr))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_set_attention_low_precision(dtype: torch.dtype) -> None:
    q, ptr = ragged(SETS["mixed"], 2, 4)
    q = q.to(dtype)
    out = set_attention(q, q, q, ptr)
    assert out.dtype == dtype
    expected = set_attention(q.double(), q.double(), q.double(), ptr)
    # computed in float32 and rounded once: half a unit in the last place of values below 4
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_set_attention_ignores_autocast() -> None:
    q, ptr = ragged(SETS["mixed"], 2, 4)
    expected = set_attention(q.float(), q.float(), q.float(), ptr)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(set_attention(q.float(), q.float(), q.float(), ptr), expected, rtol=0, atol=0)


def test_set_attention_refuses_double_backward() -> None:
    q, ptr = ragged(SETS["mixed"], 2, 4)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(set_attention(q, q, q, ptr).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_sets_do_not_mix() -> None:
    model = module()
    x, ptr = ragged(SETS["mixed"], 8)
    changed = x.clone()
    changed[3:7] += 1.0  # the fourth set
    before, after = model(x, ptr), model(changed, ptr)
    same = torch.tensor([True, True, True, False, True])
    torch.testing.assert_close(after[same], before[same], rtol=0, atol=0)
    assert (after[3] != before[3]).all()


@pytest.mark.parametrize(
    ("x", "ptr", "message"),
    [
        (torch.zeros(3, 7), [0, 3], "x: expected a last dimension of 8"),
        (torch.zeros(8), [0, 1], "x: expected 2 dimension"),
        (torch.zeros(3, 8), [0, 2], "ptr: expected to end with 3, the length of x, got 2"),
        (torch.zeros(3, 8), [1, 3], "ptr: expected to start with 0, got 1"),
        (torch.zeros(3, 8), [0, 2, 1, 3], "ptr: expected to rise, got 1 after 2 at position 2"),
        (torch.zeros(3, 8), [], "ptr: expected"),
        (torch.zeros(3, 8), [0.0, 3.0], "ptr: expected dtype int64"),
    ],
    ids=["width", "dimensions", "end", "begin", "falls", "no ptr", "float ptr"],
)
def test_bad_input(x: torch.Tensor, ptr: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyperSAGNN(8)(x, torch.tensor(ptr))


def test_bad_heads() -> None:
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim, 8, got 3"):
        HyperSAGNN(8, 3)
