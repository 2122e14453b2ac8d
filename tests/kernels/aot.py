"""Compiling, without a GPU, exactly what a launcher would launch on a given chip.

A launcher is called on tensors of the device "meta" while every launch is recorded instead of run. Each recorded launch is
specialised as Triton would specialise it, compiled ahead of time, and its registers, stack and shared memory are read back.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from cellattn.kernels import config

from .dataflow import lost_dependences

ARCHS = (80, 86, 89, 90, 120)
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a block may have
RECORD = Path(config.__file__).with_name("resources.csv")

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Case:
    """A launcher's call on tensors of the device "meta", on one chip."""

    arch: int
    dtype: str  # "bf16", "fp16" or "fp32", as it stands in the record
    dim: int  # head dimension
    call: Callable[[], object]
    note: str = ""  # tells apart two cases that are otherwise the same

    def __str__(self) -> str:
        return f"sm{self.arch}-{self.dtype}-D{self.dim}" + (f"-{self.note}" if self.note else "")


@dataclass(frozen=True)
class Launch:
    fn: JITFunction
    args: dict[str, Any]
    options: dict[str, Any]  # num_warps and the like
    grid: tuple[int, ...] = (1,)

    @classmethod
    def of(cls, fn: JITFunction, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> Launch:
        """Of a call of `JITFunction.run`."""
        options = {"num_warps": 4, "num_stages": 3}  # Triton's defaults
        options |= {name: value for name, value in kwargs.items() if name not in fn.signature.parameters}
        bound = fn.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in fn.signature.parameters})
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        return cls(fn, arguments, options, tuple(grid(arguments) if callable(grid) else grid))

    @property
    def ctas(self) -> int:
        return math.prod(self.grid)

    @property
    def config(self) -> str:
        """The compile-time arguments by name, as they stand in the record; of tensors those that are not there."""
        values = [f"{p.name}={self.args[p.name]}" for p in self.fn.params if p.is_constexpr or self.args[p.name] is None]
        return " ".join([*values, f"warps={self.options['num_warps']}", f"stages={self.options['num_stages']}"])


Key = tuple[str, int, str, int, str]  # kernel, arch, dtype, dim, config: what is compiled, by whatever Triton


@dataclass(frozen=True)
class Row:
    """One kernel as one version of Triton compiled it."""

    kernel: str
    arch: int
    dtype: str
    dim: int
    config: str
    registers: int
    shared: int  # bytes
    local: int  # bytes of STACK and LOCAL: 0 unless registers were spilled
    triton: str  # the version that compiled it: another one allocates other registers

    @property
    def key(self) -> Key:
        return self.kernel, self.arch, self.dtype, self.dim, self.config


@contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Every launch of a Triton kernel is recorded instead of run; launchers see the chip `arch`."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch.of(self, args, grid, kwargs))

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(config, "capability", return_value=arch):
        yield launches


def specialise(launch: Launch) -> ASTSource:
    """Types, constants and alignments as the just-in-time compiler derives them from the arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.fn.params):
        name, value = parameter.name, launch.args[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None:
            kind = "constexpr"
        elif isinstance(value, Tensor):
            kind, aligned = (
                POINTERS[value.dtype],
                value.storage_offset() * value.element_size() % 16 == 0,
            )  # "meta" has no address
        elif isinstance(value, bool):
            kind = "u1"
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not parameter.do_not_specialize:
                kind, aligned = ("constexpr" if value == 1 else kind), value % 16 == 0
        else:
            kind = "fp32"
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif aligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.fn, signature, constants, attrs)


def compile_for(launch: Launch, arch: int) -> CompiledKernel:
    """Compile one launch for a chip; what Triton makes of it still depends on all that the source says."""
    compiled = triton.compile(specialise(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)
    missing = lost_dependences(compiled.asm["ttir"], compiled.asm["ttgir"])
    assert not missing, f"miscompiled, {launch.fn.__name__} on sm_{arch}, {launch.config}: what is computed at {missing}"
    return compiled


def cuobjdump(option: str, cubin: bytes) -> str:
    """What the tool that comes with Triton says of compiled code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """REG a thread, STACK and LOCAL in bytes."""
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", cuobjdump("-res-usage", cubin))}


def serialised(ptx: str) -> list[str]:
    """Why the assembler makes products of sm_90 wait for each other: PTX that touches registers of one under way."""
    if "wgmma" not in ptx:
        return []
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        command = [str(tool), "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
    return re.findall("wgmma.mma_async instructions are serialized.*", told.stdout + told.stderr)


def row_of(launch: Launch, compiled: CompiledKernel, case: Case) -> Row:
    """One launch of a case, compiled for its chip."""
    used = resources(compiled.asm["cubin"])
    return Row(
        launch.fn.__name__, case.arch, case.dtype, case.dim, launch.config,
        used["REG"], compiled.metadata.shared, used["STACK"] + used["LOCAL"], triton.__version__,
    )  # fmt: skip


def launches_of(case: Case) -> dict[Key, Launch]:
    """Everything the case launches, each kernel and configuration once."""
    with recorded(case.arch) as launches:
        case.call()
    assert launches, f"{case}: nothing was launched"
    return {(launch.fn.__name__, case.arch, case.dtype, case.dim, launch.config): launch for launch in launches}


def compile_case(case: Case) -> list[Row]:
    """Everything the case launches, compiled."""
    return [row_of(launch, compile_for(launch, case.arch), case) for launch in launches_of(case).values()]


def parameters(cases: Iterable[Case]) -> list[Any]:
    """For parametrize: every dtype, head dimension and note once on sm_80 or sm_90, or on the first chip that has it.

    The other combinations are `exhaustive`.
    """
    seen: set[object] = set()
    chosen = []
    for case in cases:
        new = {case.dtype, case.dim, case.note, *({f"{case.dtype} on {case.arch}"} if case.arch in (80, 90) else ())} - seen
        seen |= new
        chosen.append(pytest.param(case, id=str(case), marks=() if new else pytest.mark.exhaustive))
    return chosen


def check_case(case: Case, *, spills: bool = False) -> None:
    """Legal on the chip, without local memory unless `spills`, its products of sm_90 beside each other, and as recorded if
    this version of Triton is on record.

    A version that is not is held to the limits alone. They are what a kernel needs to run well; registers are compared to see
    what a change of ours does to them, and another Triton's numbers say nothing about that. So no new release of Triton fails
    the tests of somebody who changed nothing. What `make test` installs is on record: test_record.py sees to it.
    """
    record = read_record().get(triton.__version__)
    for launch in launches_of(case).values():
        compiled = compile_for(launch, case.arch)
        row = row_of(launch, compiled, case)
        where = f"{row.kernel} on sm_{row.arch}, {row.config}"
        assert row.shared <= SHARED_LIMIT[row.arch], f"{where}: {row.shared} bytes of shared memory"
        assert spills or row.local == 0, f"{where}: {row.local} bytes of local memory, {row.registers} registers"
        if record is not None:
            known = record.get(row.key)
            assert row == known, f"{where}: got {row}, the record has {known}; run python -m tests.kernels.record"
        assert case.arch != 90 or not (why := serialised(compiled.asm["ptx"])), f"{where}: {why}"


@functools.cache
def read_record() -> dict[str, dict[Key, Row]]:
    """kernels/resources.csv by version of Triton."""
    record: dict[str, dict[Key, Row]] = {}
    with RECORD.open(newline="") as file:
        for r in csv.DictReader(file):
            row = Row(
                r["kernel"], int(r["arch"]), r["dtype"], int(r["dim"]), r["config"], int(r["registers"]), int(r["shared"]),
                int(r["local"]), r["triton"],
            )  # fmt: skip
            record.setdefault(row.triton, {})[row.key] = row
    return record


def write_record(record: dict[str, dict[Key, Row]]) -> None:
    """One kernel's rows stand together, a version each."""
    rows = [row for version in record.values() for row in version.values()]
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Row))
        writer.writerows(dataclasses.astuple(row) for row in sorted(rows, key=lambda row: (str(row.key), row.triton)))
