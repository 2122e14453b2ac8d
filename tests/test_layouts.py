"""Any layout in memory: strided, permuted, shifted, expanded and negated views give what contiguous copies of them give.

For every entry of the registry, values and gradients, as it is and compiled. A tensor that is read as if it were contiguous
comes out as wrong numbers, not as an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from .registry import ENTRIES, OPS, Entry

# In float64 what is left is another order of addition, of sums of a few hundred terms of about 1; in float32 the same.
RTOL = {torch.float64: 1e-12, torch.float32: 1e-4}


def innermost(x: Tensor) -> Tensor:
    """The last dimension is the slowest in memory, as after a transpose or a Conv1d, or in "t (d h)"."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def reversed_order(x: Tensor) -> Tensor:
    """All dimensions in the other order."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def every_other(x: Tensor) -> Tensor:
    """Every second entry of a tensor twice as wide."""
    return torch.stack([x, torch.full_like(x, 77)], -1)[..., 0]


def wide_rows(x: Tensor) -> Tensor:
    """A slice of wider rows, as the heads of a joint projection are."""
    return torch.cat([torch.full_like(x, 77), x, x[..., :1]], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


def shifted(x: Tensor) -> Tensor:
    """One entry into its storage, so aligned to an entry alone."""
    return torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape)


def expanded_first(x: Tensor) -> Tensor:
    """One row for all."""
    return x[:1].expand_as(x) if x.is_floating_point() or x.dtype == torch.bool else every_other(x)


def expanded_last(x: Tensor) -> Tensor:
    """One column for all."""
    return x[..., :1].expand_as(x) if x.is_floating_point() or x.dtype == torch.bool else shifted(x)


def negated(x: Tensor) -> Tensor:
    """A view that negates when it is read."""
    return torch._neg_view(-x) if x.is_floating_point() else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (innermost, wide_rows, expanded_first, negated, reversed_order, every_other, shifted, expanded_last)
}
OF_MODELS = ("innermost", "wide_rows", "expanded_first", "negated")  # which pass what they get through linear layers first


def in_dtype(entry: Entry, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in entry.tensors.items()}


def values_and_grads(entry: Entry, tensors: Mapping[str, Tensor], run: Callable[..., list[Tensor]]) -> list[Tensor]:
    """What comes out, and the gradient of each of the differentiable inputs, which stay as they lie in memory."""
    tensors = {name: x.detach().requires_grad_(name in entry.floats) for name, x in tensors.items()}
    out = run(tensors)
    if not entry.floats:
        return out
    parts = [(x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in out if x.requires_grad]
    total = torch.stack([part.double() for part in parts]).sum()
    grads = torch.autograd.grad(total, [tensors[name] for name in entry.floats], materialize_grads=True)
    return [x.detach() for x in out] + list(grads)


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        finite = theirs[theirs.isfinite()].double().abs()
        scale = max(float(finite.max()), 1.0) if finite.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=RTOL.get(theirs.dtype, 0) * scale, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ENTRIES)
def test_layouts(name: str, dtype: torch.dtype) -> None:
    entry = ENTRIES[name]
    if dtype == torch.float32 and name not in OPS:
        return  # the ops in them are tested by themselves
    module = entry.make_module()
    contiguous = in_dtype(entry, dtype)
    run = functools.partial(entry.run, module=module)
    same = values_and_grads(entry, contiguous, run)
    for layout in LAYOUTS if module is None else OF_MODELS:
        tensors = {key: LAYOUTS[layout](x) for key, x in contiguous.items()}
        copies = {key: x.clone(memory_format=torch.contiguous_format).resolve_neg() for key, x in tensors.items()}
        equal = all(torch.equal(copies[key], contiguous[key]) for key in copies)
        want = same if equal else values_and_grads(entry, copies, run)
        try:
            assert_equal(values_and_grads(entry, tensors, run), want)
        except Exception as error:
            raise AssertionError(f"{name}, {layout}: {error}") from error


IN_SHORT = ("attention_kl", "attention_bce", "masked_spmm", "khop_subgraph")  # of each kind one; to compile takes a while


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.exhaustive) for name in OPS]
)
def test_layouts_compiled(name: str) -> None:
    torch._dynamo.reset()
    entry = ENTRIES[name]
    compiled = torch.compile(lambda x: entry.run(x), fullgraph=entry.fullgraph, dynamic=True, backend="aot_eager")
    want = values_and_grads(entry, entry.tensors, entry.run)
    assert_equal(values_and_grads(entry, {key: innermost(every_other(x)) for key, x in entry.tensors.items()}, compiled), want)


def test_layouts_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    entries = [ENTRIES[name] for name in ("attention_kl", "masked_spmm")]
    together = Entry(
        [],
        lambda **x: [entry.run({key: x[f"{i}{key}"] for key in entry.tensors}) for i, entry in enumerate(entries)],
        {f"{i}{key}": x for i, entry in enumerate(entries) for key, x in entry.floats.items()},
        {f"{i}{key}": x for i, entry in enumerate(entries) for key, x in entry.constants.items()},
        {f"{i}{key}": x for i, entry in enumerate(entries) for key, x in entry.indices.items()},
    )
    compiled = torch.compile(lambda x: together.run(x), fullgraph=True)
    want = values_and_grads(together, together.tensors, together.run)
    assert_equal(values_and_grads(together, {key: innermost(x) for key, x in together.tensors.items()}, compiled), want)
