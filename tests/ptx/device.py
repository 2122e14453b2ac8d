"""The library on the machine: `with ptx.device(arch=80): cellattn.attention(q, k, v)`, tensors on the CPU.

Ops, their gradients too, take the way that they take on a GPU, through the launchers in kernels/. Launches are compiled as
the just-in-time compiler would compile them for the chip, and executed instead of sent to it.
What launchers allocate starts as bytes that nothing wrote; tensors from outside are inputs, which no kernel may write.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from cellattn.kernels import config
from tests.kernels.aot import Launch, compile_for, specialise

from .counts import Counts
from .decode import decode
from .machine import Fault, Program, execute
from .memory import Global, Storage, Window
from .parser import parse

# On sm_90 Triton 3.6 takes a fence out of a loop whose copies into shared memory need it too: docs/install.md
FENCED_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
# Where an operator of the library may have an implementation in Python, and how it is called; CUDA comes first.
_IN_PYTHON = {"CUDA": DispatchKey.CUDA, "CPU": DispatchKey.CPU, "CompositeExplicitAutograd": DispatchKey.CPU}


def bytes_at(pointer: int, size: int) -> np.ndarray:
    """Memory as an array that does not own it."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


@dataclass
class Made:
    """A storage made under the device."""

    storage: torch.UntypedStorage  # held, so that its address stays its own
    written: np.ndarray | None  # uint8, 255 where something wrote; None: everything


class Allocations(TorchDispatchMode):
    """Watches which storages are made, and which of their bytes PyTorch itself writes; takes ops of the library to CUDA.

    An operator whose CUDA implementation is in Python is called with it, on the CPU tensors that are there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Made] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for implemented, key in _IN_PYTHON.items() if func.namespace == "cellattn" else ():
            if f"{func._schema.name.replace('::', '/')}/{implemented}" in torch.library._impls:
                with self:
                    return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        out = func(*args, **kwargs)
        given = list(zip(func._schema.arguments, args, strict=False))
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        tensors = [(a, x) for a, value in given for x in (value if isinstance(value, (list, tuple)) else [value])]
        theirs = {x.untyped_storage().data_ptr() for _, x in tensors if isinstance(x, Tensor)}
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, Tensor) and x.device.type == "cpu":
                storage = x.untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in theirs and storage.data_ptr() not in self.made:
                    written = None
                    if func in _EMPTY:
                        bytes_at(storage.data_ptr(), storage.nbytes())[:] = 0xFF
                        written = np.zeros(storage.nbytes(), np.uint8)
                    self.made[storage.data_ptr()] = Made(storage, written)
        for argument, x in tensors:
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(x, Tensor):
                self._mark(x)
        return out

    def _mark(self, x: Tensor) -> None:
        """PyTorch wrote x."""
        made = self.made.get(x.untyped_storage().data_ptr())
        if made is None or made.written is None or x.numel() == 0:
            return
        item = x.element_size()
        shadow = made.written[x.storage_offset() * item :]
        strides = [s * item for s in x.stride()]
        np.lib.stride_tricks.as_strided(shadow, (*x.shape, item), (*strides, 1))[...] = 255


@dataclass(frozen=True)
class Compiled:
    ptx: str
    threads: int
    shared: int  # bytes


_compiled: dict[Any, Compiled] = {}


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Triton's PTX of a launch, once for all that it depends on."""
    source = specialise(launch)
    key = (
        launch.fn, arch, tuple(source.signature.items()), repr(sorted(source.constants.items(), key=repr)),
        repr(sorted(source.attrs.items())), repr(sorted(launch.options.items())),
    )  # fmt: skip
    if key not in _compiled:
        made = compile_for(launch, arch)
        _compiled[key] = Compiled(made.asm["ptx"], made.metadata.num_warps * 32, made.metadata.shared)
    return _compiled[key]


@functools.lru_cache(maxsize=1024)  # mutants come and go; those of a file of tests go with it
def program_of(ptx: str) -> Program:
    """Of PTX with one entry."""
    (kernel,) = parse(ptx).kernels.values()
    return decode(kernel)


@dataclass(frozen=True)
class Counted:
    """A launch that was executed, and what it cost."""

    launch: Launch
    program: Program
    counts: Counts


class Device:
    """What `device` gives: knobs and a record of what ran."""

    def __init__(self, arch: int, order: int | None, mutate: Callable[[str, str], str] | None, count: bool) -> None:
        self.arch, self.order, self.mutate, self.count = arch, order, mutate, count
        self.launches: list[str] = []
        self.counted: list[Counted] = []
        self.allocations = Allocations()

    @property
    def counts(self) -> list[Counts]:
        """Of each launch."""
        return [one.counts for one in self.counted]

    def launch(self, launch: Launch) -> None:
        """Execute one."""
        compiled = compile_launch(launch, self.arch)
        name = launch.fn.__name__
        ptx = compiled.ptx if self.mutate is None else self.mutate(name, compiled.ptx)
        program = program_of(ptx)
        self.launches.append(name)
        memory, parameters = self._arguments(launch, program)
        x, y, z = (*(int(g) for g in launch.grid), 1, 1)[:3]
        order = None if self.order is None else np.random.default_rng(self.order).permutation(x * y * z)
        counts = Counts(len(program.steps)) if self.count else None
        if counts is not None:
            self.counted.append(Counted(launch, program, counts))
        try:
            execute(
                program, memory, parameters, (x, y, z), compiled.threads, compiled.shared,
                order=order, counts=counts, fenced_copies=FENCED_COPIES,
            )  # fmt: skip
        except Fault as fault:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
            raise Fault(f"{fault}\n  on sm_{self.arch}" + (f"; to repeat: python -m pytest '{test}'" if test else "")) from None

    def _arguments(self, launch: Launch, program: Program) -> tuple[Global, np.ndarray]:
        memory, parameters = Global(), np.zeros(program.parameter_bytes, np.uint8)
        signature = specialise(launch).signature
        values = [(p.name, launch.args[p.name]) for p in launch.fn.params if signature[p.name] != "constexpr"]
        storages: dict[int, Storage] = {}
        # parameters past those are scratch that Triton itself would bring: null here
        for (name, value), parameter in zip(values, program.kernel.parameters, strict=False):
            at = program.parameters[parameter.name]
            if isinstance(value, Tensor):
                number: np.ndarray = np.array([self._pointer(name, value, memory, storages)], np.uint64)
            elif parameter.kind == "f32":
                number = np.array([value], np.float32)
            else:
                number = np.array([int(value)], f"i{parameter.size}")
            parameters[at : at + parameter.size] = number.view(np.uint8)
        return memory, parameters

    def _pointer(self, name: str, x: Tensor, memory: Global, storages: dict[int, Storage]) -> int:
        storage = x.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer not in storages:
            made = self.allocations.made.get(pointer)
            data = bytes_at(pointer, size) if size else np.zeros(0, np.uint8)
            storages[pointer] = Storage(data, made is None, None if made is None else made.written)
        low = x.data_ptr() - pointer if x.numel() else 0
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
        # rows may be stored in whole pieces of 16 bytes, and read so
        high = min(size, -(-(low + last * x.element_size()) // 16) * 16)
        base = memory.add(Window(name, storages[pointer], low, high), pointer)
        return base + (x.data_ptr() - pointer if x.numel() else 0)


@contextmanager
def device(
    arch: int = 80, *, order: int | None = None, mutate: Callable[[str, str], str] | None = None, count: bool = False
) -> Iterator[Device]:
    """Launches of Triton kernels are executed as compiled for the chip `arch`; ops take their CUDA way, and see that chip.

    Args:
        order: seed of the order of the CTAs; None: ascending.
        mutate: (kernel, PTX) -> the PTX to execute in its place.
        count: keep what each launch cost, in `counted`.

    Raises:
        Fault: where a kernel does what it must not, at once.
        PtxError: for PTX that the machine does not know.
    """
    made = Device(arch, order, mutate, count)

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made.launch(Launch.of(self, args, grid, kwargs))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(config, "capability", return_value=arch),
        made.allocations,
    ):
        yield made
