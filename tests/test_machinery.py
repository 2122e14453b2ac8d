"""Every op and model under other machinery of PyTorch: right, with the values that it has without, or an error of its own.

The table in docs/machinery.md is what these tests find: `python -m tests.test_machinery` writes it.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import functools
import io
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from . import registry
from .registry import MODELS, OPS, Entry

DOC = Path(__file__).parents[1] / "docs" / "machinery.md"
ROWS = {name: entry for name, entry in {**OPS, **MODELS}.items() if entry.floats}

WORKS, REFUSED, NONE = "works", "error", "-"


@dataclass(frozen=True)
class Case:
    """One entry of the registry as a function of its differentiable tensors."""

    entry: Entry
    module: nn.Module | None

    @property
    def name(self) -> str:
        return next(name for name, entry in ROWS.items() if entry is self.entry)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(x.detach().clone() for x in self.entry.floats.values())

    def outputs(self, *floats: Tensor, module: nn.Module | None = None) -> tuple[Tensor, ...]:
        """The floating outputs."""
        given = dict(zip(self.entry.floats, floats, strict=True))
        rest = {
            name: x.to(floats[0].dtype) if x.is_floating_point() else x
            for name, x in {**self.entry.constants, **self.entry.indices}.items()
        }
        return tuple(x for x in self.entry.run({**given, **rest}, module or self.module) if x.is_floating_point())

    def total(self, *floats: Tensor) -> Tensor:
        """One number, in which each entry of the outputs has a weight of its own."""
        return self.of(self.outputs(*floats))

    @staticmethod
    def of(out: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([(x.double() * _weights(x).view(x.shape)).sum() for x in out]).sum()

    def grads(self) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in self.inputs]
        return torch.autograd.grad(self.total(*leaves), leaves, materialize_grads=True)


def _weights(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64, device=x.device)


def close(got: tuple[Tensor, ...] | list[Tensor], want: tuple[Tensor, ...] | list[Tensor], eps: float = 1e-12) -> None:
    """float64 in another order of addition, unless another error is given; relative to the largest entry, as norms."""
    a, b = (torch.cat([x.detach().double().flatten() for x in side]) for side in (got, want))
    assert (a - b).norm() <= eps * max(float(b.norm()), 1.0)


def _checkpoint(case: Case, reentrant: bool) -> None:
    leaves = [x.requires_grad_() for x in case.inputs]
    Case.of(checkpoint(case.outputs, *leaves, use_reentrant=reentrant)).backward()
    close([x.grad for x in leaves if x.grad is not None], case.grads())
    if case.module is not None:
        case.module.zero_grad()


def _hooks(case: Case) -> None:
    """Full ones of every module inside, which make of its inputs and outputs views that nothing may change."""
    assert case.module is not None
    module = copy.deepcopy(case.module)
    calls = []
    for inner in module.modules():
        inner.register_forward_pre_hook(lambda *given: None)
        inner.register_forward_hook(lambda *given: calls.append(given))
        inner.register_full_backward_pre_hook(lambda *given: None)
        inner.register_full_backward_hook(lambda *given: calls.append(given))
    leaves = [x.requires_grad_() for x in case.inputs]
    close(torch.autograd.grad(case.of(case.outputs(*leaves, module=module)), leaves, materialize_grads=True), case.grads())
    assert calls


def _default_dtype(case: Case) -> None:
    """With a graph that was not used before, float64 for whatever is made without a dtype."""
    before = registry.GRAPH
    registry.GRAPH = registry._graph()
    module = None if case.module is None else copy.deepcopy(case.module).float()
    given = [x.float() for x in case.inputs]
    torch.set_default_dtype(torch.float64)
    try:
        got = case.outputs(*given, module=module)
    finally:
        torch.set_default_dtype(torch.float32)
        registry.GRAPH = before
    want = case.outputs(*given, module=module)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    close(got, want, 16 * torch.finfo(torch.float32).eps)


def _vmap(case: Case) -> None:
    batch = [torch.stack([x, 0.5 * x]) for x in case.inputs]
    got = torch.func.vmap(case.outputs, randomness="same")(*batch)
    for i in range(2):
        close([x[i] for x in got], case.outputs(*(x[i] for x in batch)))


def _vmap_grad(case: Case) -> None:
    batch = [torch.stack([x, 0.5 * x]) for x in case.inputs]
    got = torch.func.vmap(torch.func.grad(case.total, argnums=_all(case)), randomness="same")(*batch)
    for i, factor in enumerate((1.0, 0.5)):
        close([x[i] for x in got], Case.grads(_scaled(case, factor)))


def _scaled(case: Case, factor: float) -> Case:
    entry = Entry([], case.entry.call, {name: factor * x for name, x in case.entry.floats.items()}, case.entry.constants,
                  case.entry.indices, case.entry.module)  # fmt: skip
    return Case(entry, case.module)


def _all(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.inputs)))


def _jvp(case: Case) -> None:
    tangents = tuple(x.cos() for x in case.inputs)
    (_, got) = torch.func.jvp(case.total, case.inputs, tangents)[:2]
    close([got], [torch.stack([(g * t).sum() for g, t in zip(case.grads(), tangents, strict=True)]).sum()])


def _jacrev(case: Case) -> None:
    jacobians = torch.func.jacrev(case.outputs, argnums=_all(case))(*case.inputs)
    out = case.outputs(*case.inputs)
    got = [torch.zeros_like(x) for x in case.inputs]
    for y, by_input in zip(out, jacobians, strict=True):
        for i, jacobian in enumerate(by_input):
            got[i] = got[i] + torch.tensordot(_weights(y), jacobian.double().reshape(y.numel(), *case.inputs[i].shape), 1)
    close(got, case.grads())


def _double_backward(case: Case) -> None:
    leaves = [x.requires_grad_() for x in case.inputs]
    grads = torch.autograd.grad(case.total(*leaves).square(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((g.square().sum() for g in grads), torch.zeros(())), leaves)
    h = 1e-6
    shifted = []
    for sign in (1, -1):
        moved = [(x + sign * h * x.detach().cos()).detach().requires_grad_() for x in leaves]
        shifted.append(sum(float(g.square().sum()) for g in torch.autograd.grad(case.total(*moved).square(), moved)))
    slope = sum(float((s * x.detach().cos()).sum()) for s, x in zip(second, leaves, strict=True))
    assert abs((shifted[0] - shifted[1]) / (2 * h) - slope) <= 1e-5 * max(1.0, abs(slope), abs(shifted[0]))


def _functional_call(case: Case) -> None:
    assert case.module is not None
    names = dict(case.module.named_parameters())
    (x, *rest) = case.inputs

    def total(parameters: dict[str, Tensor]) -> Tensor:
        assert case.module is not None
        given = {**case.entry.tensors, **dict(zip(case.entry.floats, (x, *rest), strict=True))}
        holder = _Call(case.entry, case.module)
        inner = {f"module.{name}": value for name, value in parameters.items()}
        return Case.of(torch.func.functional_call(holder, inner, (given,)))

    got = torch.func.grad(total)({name: value.detach() for name, value in names.items()})
    want = torch.autograd.grad(case.total(x, *rest), list(names.values()), materialize_grads=True, allow_unused=True)
    close(list(got.values()), want)


class _Call(nn.Module):
    def __init__(self, entry: Entry, module: nn.Module | None) -> None:
        super().__init__()
        self.entry, self.module = entry, module

    def forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(x for x in self.entry.run(tensors, self.module) if x.is_floating_point())


def _in_dtype(case: Case, dtype: torch.dtype) -> None:
    # a log-sum-exp is never of 16 bits
    kept = {"lse": torch.promote_types(dtype, torch.float32)}
    rounded = tuple(x.to(kept.get(name, dtype)) for name, x in case.entry.floats.items())
    module = copy.deepcopy(case.module)
    narrow = None if module is None else module.to(dtype)
    wide = None if narrow is None else copy.deepcopy(narrow).double()
    got = case.outputs(*rounded, module=narrow)
    # each of a few tens of steps rounds its result by half a spacing
    close(got, case.outputs(*(x.double() for x in rounded), module=wide), 16 * torch.finfo(dtype).eps)


def _autocast(case: Case) -> None:
    module = None if case.module is None else copy.deepcopy(case.module).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = case.outputs(*(x.float() for x in case.inputs), module=module)
    close(got, case.outputs(*case.inputs), 16 * torch.finfo(torch.bfloat16).eps)


def _without_grad(case: Case, mode: Callable[[], torch.no_grad | torch.inference_mode]) -> None:
    with mode():
        got = case.outputs(*case.inputs)
    close(got, case.outputs(*case.inputs))  # PyTorch's products are of other shapes where something requires a gradient


def _copied(case: Case, copied: Callable[[nn.Module], nn.Module]) -> None:
    assert case.module is not None
    other = copied(case.module)
    assert other is not case.module
    close(case.outputs(*case.inputs, module=other), case.outputs(*case.inputs))


def _state_dict(case: Case) -> None:
    def reloaded(module: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        assert case.entry.module is not None
        other = case.entry.module().double().eval()
        other.load_state_dict(torch.load(file))
        return other

    _copied(case, reloaded)


def _vmap_of_indices(case: Case) -> None:
    """Over each index and mask: right, or refused. One that is refused is the entry's word."""
    refused = []
    for name, index in case.entry.indices.items():

        def call(x: Tensor, name: str = name) -> tuple[Tensor, ...]:
            return tuple(case.entry.run({**case.entry.tensors, name: x}, case.module))

        try:
            got = torch.func.vmap(call, randomness="same")(torch.stack([index, index]))
        except NotImplementedError as error:
            refused.append(error)
        else:
            for i in range(2):
                close([x[i] for x in got], call(index))
    if refused:
        raise refused[0]


def _export(case: Case) -> None:
    """With a graph that was not used before, and is as good as new afterwards."""
    before = registry.GRAPH
    registry.GRAPH = registry._graph()
    try:
        holder = _Call(case.entry, case.module)
        given = dict(case.entry.tensors)
        try:
            exported = torch.export.export(holder, (given,), strict=False).module()(given)
        except NotImplementedError as error:
            if "torch._C.Generator" not in str(error) or not torch.__version__.startswith("2.11."):
                raise
            return  # as the page says
        close(exported, holder(given))
        assert not any(isinstance(x, FakeTensor) for x in holder(given))
    finally:
        registry.GRAPH = before


def _fake(case: Case) -> None:
    """Shapes and dtypes, and then numbers from the same graph."""
    before = registry.GRAPH
    registry.GRAPH = registry._graph()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            shapes = case.entry.run({name: mode.from_tensor(x) for name, x in case.entry.tensors.items()}, case.module)
        got = case.entry.run(case.entry.tensors, case.module)
    finally:
        registry.GRAPH = before
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in got]
    close([x for x in got if x.is_floating_point()], case.outputs(*case.inputs))


def _default_device(case: Case) -> None:
    """With a graph that was not used before. On meta, since what goes there by mistake is lost on any machine."""
    before = registry.GRAPH
    registry.GRAPH = registry._graph()
    try:
        with torch.device("meta"):
            got, grads = case.outputs(*case.inputs), case.grads()
    finally:
        registry.GRAPH = before
    close(got, case.outputs(*case.inputs))
    close(grads, case.grads())


@functools.cache
def _worker() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    atexit.register(pool.shutdown)
    return pool


def _outputs_of(name: str, module: nn.Module | None, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.detach() for x in Case(ROWS[name], module).outputs(*inputs)]


def _spawn(case: Case) -> None:
    """In a process that shares nothing, of this module and these tensors."""
    got = _worker().submit(_outputs_of, case.name, case.module, case.inputs).result(timeout=300)
    close(got, case.outputs(*case.inputs))


COLUMNS: dict[str, Callable[[Case], None]] = {
    "checkpoint": lambda case: _checkpoint(case, False),
    "reentrant": lambda case: _checkpoint(case, True),
    "grad": lambda case: close(torch.func.grad(case.total, argnums=_all(case))(*case.inputs), case.grads()),
    "vjp": lambda case: close(torch.func.vjp(case.total, *case.inputs)[1](torch.ones((), dtype=torch.float64)), case.grads()),
    "jacrev": _jacrev,
    "vmap": _vmap,
    "vmap of grad": _vmap_grad,
    "vmap of indices": _vmap_of_indices,
    "jvp": _jvp,
    "double backward": _double_backward,
    "functional_call": _functional_call,
    "no_grad": lambda case: _without_grad(case, torch.no_grad),
    "inference_mode": lambda case: _without_grad(case, torch.inference_mode),
    "export": _export,
    "fake tensors": _fake,
    "default device": _default_device,
    "default dtype": _default_dtype,
    "hooks": _hooks,
    "spawn": _spawn,
    "autocast": _autocast,
    "float32": lambda case: _in_dtype(case, torch.float32),
    "bfloat16": lambda case: _in_dtype(case, torch.bfloat16),
    "float16": lambda case: _in_dtype(case, torch.float16),
    "deepcopy": lambda case: _copied(case, copy.deepcopy),
    "pickle": lambda case: _copied(case, lambda module: pickle.loads(pickle.dumps(module))),
    "state_dict": _state_dict,
}
# The columns of the table; under all others everything works, as the page says.
EXCEPT = ("jvp", "double backward", "vmap of indices", "export", "fake tensors")
OF_MODULES = ("functional_call", "hooks", "deepcopy", "pickle", "state_dict")


def found(name: str) -> list[str]:
    """One word a column; what is neither right nor an error of ours is raised."""
    entry = ROWS[name]
    case = Case(entry, entry.make_module())
    words = []
    for column, check in COLUMNS.items():
        if (case.module is None and column in OF_MODULES) or (column == "vmap of indices" and not entry.indices):
            words.append(NONE)
            continue
        try:
            check(case)
        except (RuntimeError, ValueError) as error:
            if not str(error).startswith("cellattn."):
                raise AssertionError(f"{name} under {column}: {error}") from error
            words.append(REFUSED)
        except AssertionError as error:
            raise AssertionError(f"{name} under {column}: {error}") from error
        else:
            words.append(WORKS)
    return words


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def row_of(name: str) -> str:
    """A row of the table, of one for which all else works."""
    words = dict(zip(COLUMNS, found(name), strict=True))
    refused = [column for column, word in words.items() if word == REFUSED and column not in EXCEPT]
    assert not refused, f"{name}: {', '.join(refused)} became an error, which the page says works"
    return line([name, *(words[column] for column in EXCEPT)])


@pytest.mark.parametrize("name", ROWS)
def test_row_of_the_table(name: str) -> None:
    assert row_of(name) in DOC.read_text().splitlines()


def test_the_table_has_no_other_rows() -> None:
    table = [row for row in DOC.read_text().splitlines() if row.startswith("| ")]
    assert table[0] == line(["", *EXCEPT])
    assert [row.split(" | ")[0].removeprefix("| ") for row in table[1:]] == list(ROWS)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    head = DOC.read_text().split("\n| ")[0]
    table = [line(["", *EXCEPT]), "|---" * (len(EXCEPT) + 1) + "|", *(row_of(name) for name in ROWS)]
    DOC.write_text(head + "\n" + "\n".join(table) + "\n")
