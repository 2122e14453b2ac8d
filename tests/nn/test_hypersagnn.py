from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch

from cellattn import reference
from cellattn.nn import HyperSAGNN
from cellattn.ops.set_attention import set_attention

from ..bounds import assert_within_rounding
from ..compare import assert_same, everything
from . import dense

SETS = {"mixed": [0, 2, 2, 3, 7, 10], "singles": [0, 1, 2, 3], "one": [0, 5], "empty": [0, 0, 0], "no sets": [0]}


def module(dim: int = 8, num_heads: int = 2, max_size: int | None = None) -> HyperSAGNN:
    torch.manual_seed(0)
    model = HyperSAGNN(dim, num_heads, max_size=max_size).double()
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


def block_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ptr: torch.Tensor, include_self: bool) -> torch.Tensor:
    """One [nnz, nnz] softmax a head, entries of other sets masked."""
    member = torch.arange(len(ptr) - 1).repeat_interleave(ptr.diff())
    sees = member[:, None] == member
    if not include_self:
        sees = sees & ~torch.eye(len(member), dtype=torch.bool)
    s = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    s = torch.where(sees.any(1, keepdim=True), s.masked_fill(~sees, -torch.inf), 0)  # no softmax over nothing
    return torch.einsum("hij,jhd->ihd", s.softmax(-1) * sees, v)


@pytest.mark.parametrize("include_self", [False, True], ids=["others", "self too"])
@pytest.mark.parametrize("ptr", SETS.values(), ids=SETS)
def test_set_attention_is_a_block_mask(ptr: list[int], include_self: bool) -> None:
    q, offsets = ragged(ptr, 2, 3)
    inputs = [q * scale for scale in (1.0, 0.5, 2.0)]
    assert_same(
        lambda q, k, v: set_attention(q, k, v, offsets, include_self=include_self),
        lambda q, k, v: block_mask(q, k, v, offsets, include_self),
        *inputs,
    )


@pytest.mark.parametrize("include_self", [False, True], ids=["others", "self too"])
@pytest.mark.parametrize("ptr", SETS.values(), ids=SETS)
def test_set_attention_gradcheck(ptr: list[int], include_self: bool) -> None:
    q, offsets = ragged(ptr, 2, 3)
    inputs = [(q * scale).requires_grad_() for scale in (1.0, 0.5, 2.0)]
    assert torch.autograd.gradcheck(lambda *x: set_attention(*x, offsets, None, include_self), inputs)


@pytest.mark.parametrize("max_size", [None, 5])
@pytest.mark.parametrize("ptr", SETS.values(), ids=SETS)
def test_set_attention_with_a_null_sink(ptr: list[int], max_size: int | None) -> None:
    q, offsets = ragged(ptr, 2, 3)
    inputs = [q, 0.5 * q, 2 * q, q[..., 0], torch.randn(2, 3, dtype=torch.float64)]
    assert_same(
        lambda q, k, v, *null: set_attention(q, k, v, offsets, max_size, True, *null),
        lambda q, k, v, score, value: reference.set_attention(q, k, v, offsets, null_score=score, null_value=value),
        *inputs,
    )


@pytest.mark.parametrize("max_size", [None, 4, 5])
def test_set_attention_opcheck(max_size: int | None) -> None:
    q, ptr = ragged(SETS["mixed"], 2, 3)
    torch.library.opcheck(set_attention, (q.requires_grad_(), q, q, ptr, max_size, True))


@pytest.mark.parametrize("ptr", SETS.values(), ids=SETS)
def test_a_bound_on_the_sets_changes_nothing(ptr: list[int]) -> None:
    q, offsets = ragged(ptr, 2, 3)
    inputs = [q, 0.5 * q, 2 * q]
    want = everything(lambda *x: set_attention(*x, offsets), *inputs)
    for max_size in (5, 8):
        got = everything(lambda *x, size=max_size: set_attention(*x, offsets, size), *inputs)
        # a padded softmax sums in another order
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_bound_leaves_nothing_to_wait_for() -> None:
    """No value of ptr is read on the host: on "meta" there is none. Without a bound the longest set has to be known."""
    q, ptr = torch.empty(10, 2, 3, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    body = inspect.unwrap(set_attention._init_fn)
    assert body(q, q, q, ptr, 3).shape == (10, 2, 3)
    with pytest.raises(ValueError, match="max_size: expected a number for tensors on meta"):
        body(q, q, q, ptr)


def test_sets_beyond_the_bound() -> None:
    q, ptr = ragged(SETS["mixed"], 2, 3)
    with pytest.raises(ValueError, match="max_size: expected at least 4, the entries of set 3, got 3"):
        set_attention(q, q, q, ptr, 3)
    x, ptr = ragged(SETS["mixed"], 8)
    with pytest.raises(ValueError, match="max_size: expected at least 4"):
        HyperSAGNN(8, max_size=3).double()(x, ptr)
    torch.testing.assert_close(module(max_size=4)(x, ptr), module()(x, ptr))
    with pytest.raises(ValueError, match="max_size: expected at least 1, got 0"):
        HyperSAGNN(8, max_size=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_set_attention_low_precision(dtype: torch.dtype) -> None:
    q, ptr = ragged(SETS["mixed"], 2, 4)
    inputs = [(q * scale).to(dtype) for scale in (1.0, 0.5, 2.0)]
    assert set_attention(*inputs, ptr).dtype == dtype
    assert_within_rounding(
        lambda q, k, v: set_attention(q, k, v, ptr), lambda q, k, v: block_mask(q, k, v, ptr, False), *inputs
    )


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


@pytest.mark.parametrize("include_self", [False, True])
def test_nan_stays_in_its_set(include_self: bool) -> None:
    """Values and gradients of every other set, longer and shorter ones beside it, are those without the NaN."""
    ptr = torch.tensor([0, 1, 3, 3, 7, 8])
    for wrong in (0, 2, 6, 7):
        sample = int(torch.searchsorted(ptr, wrong, right=True)) - 1
        others = [e for e in range(8) if not ptr[sample] <= e < ptr[sample + 1]]
        results = []
        for bad in (0.5, float("nan"), float("inf")):
            x = torch.randn(3, 8, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            x[:, wrong] = bad
            x.requires_grad_()
            out = set_attention(*x.unbind(), ptr, 4, include_self)
            (dx,) = torch.autograd.grad(out[others].square().sum(), x)
            results.append((out[others], dx[:, others]))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)
