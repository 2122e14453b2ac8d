"""The CUDA half of the extension on the machine: its own host code, with a CUDA runtime that launches nothing on a GPU.

    with cuda.device(arch=80):
        cellattn.khop_mask(...)  # of tensors on the CPU

nvcc compiles csrc/cuda to host code and PTX; the host code is linked to runtime/ in the place of CUDA's runtime. So grids,
arguments, scratch memory and the order of launches are what a GPU would get. Kernels see addresses of the host.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import cpp_extension

from .counts import Counts
from .device import Allocations, bytes_at, program_of
from .machine import execute
from .memory import Flat, Storage, Window
from .parser import parse

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "runtime"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as setup.py has it
ARCH = 80


def home() -> Path | None:
    """The CUDA toolkit that holds nvcc, if there is one."""
    place = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    return place if (place / "bin" / "nvcc").is_file() else None


def run(command: list[Any]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def build() -> Path:
    """The folder with the library and the PTX, made once for what csrc/ and the compiler are."""
    place = home()
    assert place is not None, "no nvcc"
    nvcc = place / "bin" / "nvcc"
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "stand_in.cpp"]
    read = [*(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").glob("*.h"), *HERE.rglob("*.h"), Path(__file__), *sources]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(read)))
    state.update(subprocess.run([nvcc, "--version"], check=True, capture_output=True).stdout + torch.__version__.encode())
    made = ROOT / "build" / "ptx" / state.hexdigest()[:16]
    made.mkdir(parents=True, exist_ok=True)
    with (made / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of a test run come at once
        if not (made / "machine.so").exists():
            _build(made, nvcc, sources)
    return made


def _build(made: Path, nvcc: Path, sources: list[Path]) -> None:
    place = nvcc.parents[1]
    includes = [f"-I{path}" for path in (HERE, *cpp_extension.include_paths(), place / "include")]
    # what the extension allocates goes through the dispatcher, where it is watched
    watched = "-Daoti_torch_empty_strided=machine_empty_strided"
    options = ["-std=c++17", "-O3", "-DUSE_CUDA", watched, TORCH_TARGET, "-Xcompiler", "-fPIC", *includes]
    code = ["-gencode", f"arch=compute_{ARCH},code=compute_{ARCH}", "--keep", "--keep-dir"]

    def compile_(source: Path) -> Path:
        kept, target = made / source.stem, made / f"{source.stem}.o"
        kept.mkdir(exist_ok=True)
        run([nvcc, "-c", source, "-o", target, *options, *code, kept])
        for path in kept.iterdir():
            if path.suffix != ".ptx":
                path.unlink()
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_, sources))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    unfinished = made / f"machine.{os.getpid()}.so"
    # bound to the runtime in it, before one that a torch for CUDA has loaded
    link = ["c++", "-shared", "-Wl,-Bsymbolic", "-o", unfinished, *objects, *libraries, "-ltorch_cpu", "-lc10"]
    run(link)
    unfinished.rename(made / "machine.so")


@functools.cache
def programs() -> dict[str, str]:
    """PTX by the name of its kernel."""
    return {name: str(path) for path in build().rglob("*.ptx") for name in parse(path.read_text()).kernels}


@functools.cache
def text_of(kernel: str) -> str:
    """Its module with the other entries left blank, line by line."""
    lines, keep = Path(programs()[kernel]).read_text().splitlines(), True
    for i, line in enumerate(lines):
        if (entry := re.search(r"\.entry\s+(\w+)", line)) is not None:
            keep = entry[1] == kernel
        end = line.startswith("}")
        if not keep:
            lines[i] = ""
        keep |= end
    return "\n".join(lines)


def short(kernel: str) -> str:
    """Its name in the source, as far as it is one of the library's."""
    found = re.search(r"\d([a-z_]+_kernel)[A-Z]", kernel)
    return kernel if found is None else found[1]


_LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t
)
_FILLED = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)


@functools.cache
def library() -> ctypes.CDLL:
    """Loaded for good: it registers the operators' CUDA implementations."""
    return ctypes.CDLL(str(build() / "machine.so"))


class Calls(Allocations):
    """Takes operators of the extension to their CUDA implementation too, and knows which tensors a call was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[int, tuple[str, Tensor, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if func.namespace == "cellattn" and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            for argument, value in zip(func._schema.arguments, args, strict=False):
                for x in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(x, Tensor) and x.numel():
                        written = argument.alias_info is not None and argument.alias_info.is_write
                        self.given[x.untyped_storage().data_ptr()] = (argument.name, x, written)
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class Runtime:
    """What `device` gives: the kernels that were launched, and of how many blocks."""

    def __init__(self, order: int | None, mutate: Callable[[str, str], str] | None, count: bool) -> None:
        self.order, self.mutate, self.count, self.calls = order, mutate, count, Calls()
        self.counts: list[Counts] = []
        self.launches: list[str] = []
        self.blocks: list[int] = []
        self.fault: BaseException | None = None

    def memory(self) -> Flat:
        """All that a kernel may touch: what the operator was given, and what was made under the device."""
        found, storages = Flat(), self.calls.made
        for pointer, made in storages.items():
            size = made.storage.nbytes()
            found.put(Window(f"made ({size} bytes)", Storage(bytes_at(pointer, size), False, made.written), 0, size), pointer)
        for pointer, (name, x, written) in self.calls.given.items():
            if pointer not in storages:
                size = x.untyped_storage().nbytes()
                found.put(Window(name, Storage(bytes_at(pointer, size), not written), 0, size), pointer)
        return found

    def launched(self, kernel: bytes, sizes: Any, arguments: Any, shared: int) -> int:
        """A launch; a fault is kept and raised when the operator comes back."""
        try:
            name = kernel.decode()
            text = text_of(name)
            program = program_of(text if self.mutate is None else self.mutate(short(name), text))
            self.launches.append(name)
            grid, (threads, *others) = (sizes[0], sizes[1], sizes[2]), sizes[3:6]
            assert others == [1, 1], "blocks have one dimension"
            parameters = np.zeros(program.parameter_bytes, np.uint8)
            for k, parameter in enumerate(program.kernel.parameters):
                at = program.parameters[parameter.name]
                parameters[at : at + parameter.size] = bytes_at(arguments[k], parameter.size)
            total = grid[0] * grid[1] * grid[2]
            self.blocks.append(total)
            order = None if self.order is None else np.random.default_rng(self.order).permutation(total)
            counts = Counts(len(program.steps)) if self.count else None
            if counts is not None:
                self.counts.append(counts)
            execute(program, self.memory(), parameters, grid, threads, shared, order=order, counts=counts)
        except BaseException as error:  # it cannot pass through C
            self.fault = self.fault or error
            return 1
        return 0

    def filled(self, data: int, size: int) -> None:
        """cudaMemset wrote."""
        for pointer, made in self.calls.made.items():
            if made.written is not None and pointer <= data < pointer + made.storage.nbytes():
                made.written[data - pointer : data - pointer + size] = 255


@contextmanager
def device(
    *, order: int | None = None, mutate: Callable[[str, str], str] | None = None, count: bool = False
) -> Iterator[Runtime]:
    """Operators of the extension run their CUDA implementation, on tensors of the CPU.

    Args:
        order, mutate, count: as of tests.ptx.device; a kernel goes by its name in the source.

    Raises:
        Fault, PtxError: as tests.ptx.device.
    """
    made = Runtime(order, mutate, count)
    callbacks = _LAUNCHED(made.launched), _FILLED(made.filled)
    library().machine_connect(*callbacks, ARCH)
    try:
        with made.calls:
            yield made
    except Exception:
        if made.fault is None:
            raise
    finally:
        library().machine_connect(None, None, ARCH)
    if made.fault is not None:
        raise made.fault
