"""Any layout in memory: strided, permuted, shifted, expanded and negated views give what contiguous copies of them give.

For every entry of the registry, values and gradients, as it is and compiled. A tensor that is read as if it were contiguous
comes out as wrong numbers, not as an error. Likewise indices of 32 bits, which are taken or refused by name, and sizes of 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import cellattn
from cellattn import MultiGraph, reference

from . import registry
from .registry import ENTRIES, GRAPHS, OPS, Entry, N

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
    if not parts:  # a result of nothing
        return [*(x.detach() for x in out), *(torch.zeros_like(tensors[name]) for name in entry.floats)]
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


@pytest.mark.parametrize("name", [name for name, entry in OPS.items() if entry.floats])
def test_zeros_without_memory(name: str) -> None:
    """What autograd makes of a gradient that is 0: in the place of each input, and of what comes from above."""
    entry = OPS[name]

    def zeros(x: Tensor) -> Tensor:
        return torch._efficientzerotensor(x.shape, dtype=x.dtype)

    for key, x in entry.floats.items():
        got = entry.run({**entry.tensors, key: zeros(x)})
        assert_equal(got, entry.run({**entry.tensors, key: torch.zeros_like(x)}))
    leaves = {key: x.clone().requires_grad_() for key, x in entry.floats.items()}
    out = [x for x in entry.run({**entry.tensors, **leaves}) if x.requires_grad]
    for grad in torch.autograd.grad(out, list(leaves.values()), list(map(zeros, out)), materialize_grads=True):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", [name for name, entry in OPS.items() if entry.floats])
def test_saved_tensors_come_back_in_another_order(name: str) -> None:
    """What hooks that offload or compress give back has the values of what was saved, and may have other strides."""
    entry = OPS[name]
    run = entry.run
    want = values_and_grads(entry, entry.tensors, run)

    def hooked(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: innermost(x) if x.ndim else x, lambda x: x):
            return run(tensors)

    assert_equal(values_and_grads(entry, entry.tensors, hooked), want)


class Calls(TorchDispatchMode):
    """Keeps the calls of this library's operators, and what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.of_ours: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op.namespace == "cellattn":
            self.of_ours.append((op, args, kwargs or {}, out))
        return out


def strides(x: Tensor) -> list[int]:
    """Those that mean something."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("largest", [1.0, 1e20])
@pytest.mark.parametrize("name", [name for name, entry in OPS.items() if entry.floats])
def test_results_lie_in_memory_as_compiled_code_is_told(name: str, largest: float) -> None:
    """Code that `torch.compile` makes holds operators to it; of large scores other formulas are taken."""
    entry = OPS[name]
    for layout in (innermost, reversed_order):
        tensors = {
            key: layout(x * largest if key in ("q", "query") else x) for key, x in in_dtype(entry, torch.float32).items()
        }
        with Calls() as calls:
            values_and_grads(entry, tensors, entry.run)
        for op, args, kwargs, out in calls.of_ours:
            with FakeTensorMode() as mode:
                given = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
                told = op(*given[0], **given[1])
            for x, fake in zip(tree_leaves(out), tree_leaves(told), strict=True):
                if isinstance(x, Tensor) and x.numel() and x.shape == fake.shape:
                    assert strides(x) == strides(fake), f"{op}, {layout.__name__}"


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.indices])
def test_indices_of_32_bits(name: str) -> None:
    """One at a time and all at once: the same result, or an error that names the argument and both dtypes."""
    entry = ENTRIES[name]
    run = functools.partial(entry.run, module=entry.make_module())
    want = run(entry.tensors)
    indices = [key for key, x in entry.indices.items() if x.dtype == torch.int64]
    for chosen in (*([key] for key in indices), indices):
        try:
            got = run({key: x.int() if key in chosen else x for key, x in entry.tensors.items()})
        except ValueError as error:
            said = str(error)
            assert said.split(":")[0] in chosen, said
            assert "int64, got a int32 tensor" in said, said
        else:
            assert_equal(got, want)


def of_sets(num_sets: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sets of no genes, any number of them, none included."""
    given = dict(tensors)
    for key, x in tensors.items():
        if key in ("ptr", "source_ptr", "target_ptr"):
            given[key] = x.new_zeros(num_sets + 1)
        elif key in ("seeds", "types", "index", "source", "target", "scale", "selection"):
            given[key] = x[:0]
        elif key == "override":
            given[key] = x[..., :0, :]
        elif key == "query":
            given[key] = x[..., :1, :].repeat(1, num_sets, 1)
        elif key == "y":
            given[key] = x.new_zeros(num_sets, 2)
        elif key == "x" and x.shape[0] != N:  # one a gene of a set
            given[key] = x[:0]
    return given


SETS = {"ptr", "source_ptr"}
SIZES: dict[str, tuple[Callable[[Entry], bool], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]] = {
    "no sets": (lambda entry: bool(SETS & set(entry.indices)), functools.partial(of_sets, 0)),
    "empty sets": (lambda entry: bool(SETS & set(entry.indices)), functools.partial(of_sets, 3)),
    "no rows": (lambda entry: "rows" in entry.indices, lambda tensors: {**tensors, "rows": tensors["rows"][:0]}),
    "no samples": (
        lambda entry: "keep" in entry.indices and entry.floats["x"].ndim == 3,
        lambda tensors: {**tensors, "x": tensors["x"][:0], "keep": tensors["keep"][:0]},
    ),
    "no leading": (
        lambda entry: "q" in entry.floats and "edge_bias" not in entry.floats,
        lambda tensors: {key: x if key == "rows" else x[:0] for key, x in tensors.items()},
    ),
    "no edges": (
        lambda entry: True,
        lambda tensors: {key: x[:0] if key == "edge_weight" else x for key, x in tensors.items()},
    ),
}
# None of its own: sizes that stand in the entry, not in its tensors; draws; a result of another form.
SHARES = ("edge_recovery", "record_layers")  # of edges
NO_REFERENCE = ("drawn", "dropout", "packed", "khop_subgraph")


@contextmanager
def by_the_reference() -> Iterator[dict[Callable[..., object], Callable[..., object]]]:
    """The public functions are their definitions meanwhile."""
    names = [name for name in cellattn.__all__ if callable(getattr(reference, name, None)) and not name[0].isupper()]
    ours = {name: getattr(cellattn, name) for name in names}
    for name in names:
        setattr(cellattn, name, getattr(reference, name))
    try:
        yield {function: getattr(reference, name) for name, function in ours.items()}
    finally:
        for name, function in ours.items():
            setattr(cellattn, name, function)


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in {*GRAPHS, "split"}])
def test_sizes_of_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference says, values and gradients, which are finite; of models and others, that they are."""
    entry = ENTRIES[name]
    for size, (has, shrunk) in SIZES.items():
        if not has(entry):
            continue
        tensors = shrunk(entry.tensors)
        if size == "no edges":
            none = {relation: torch.zeros(2, 0, dtype=torch.int64) for relation in registry.RELATIONS}
            monkeypatch.setattr(registry, "GRAPH", MultiGraph.from_edge_index(none, N))
        try:
            got = values_and_grads(entry, tensors, functools.partial(entry.run, module=entry.make_module()))
            assert (size == "no edges" and name in SHARES) or all(x.isfinite().all() for x in got)
            if name in OPS and not any(part in name for part in NO_REFERENCE):
                with by_the_reference() as definition:
                    call = definition.get(entry.call, entry.call)
                    exact = Entry([], call, entry.floats, entry.constants, entry.indices)
                    assert_equal(got, values_and_grads(exact, tensors, exact.run))
        except Exception as error:
            raise AssertionError(f"{name}, {size}: {error}") from error


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
