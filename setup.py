"""What `pyproject.toml` cannot say: `kernels/` is installed as `cellattn.kernels`, and `csrc/` is compiled to `cellattn._C`.

The extension keeps to LibTorch's stable ABI and Python's limited API: one file serves Python >= 3.10 and torch >= 2.11, with
CUDA and without. Read from the environment:

    CUDA_HOME              the CUDA toolkit (else /usr/local/cuda); without an nvcc there, the CPU half alone is built
    CELLATTN_CUDA=0        the CPU half alone, whatever is there
    TORCH_CUDA_ARCH_LIST   chips to compile for
    CELLATTN_SANITIZE      names for -fsanitize, as in address,undefined
    CELLATTN_GLIBC         the oldest glibc to run on, as in 2.28, whatever is here; `make wheel` sets it, and needs ziglang
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from torch.utils import cpp_extension

TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that loads the extension
CUDA_ARCHS = "8.0;8.6;8.9;9.0+PTX"


GLIBC = os.environ.get("CELLATTN_GLIBC")


def cuda_home() -> Path | str:
    """The CUDA toolkit that holds nvcc, or why there is none."""
    if os.environ.get("CELLATTN_CUDA") == "0":
        return "CELLATTN_CUDA=0"
    place = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    return place if (place / "bin" / "nvcc").is_file() else f"no CUDA compiler in {place} (CUDA_HOME)"


def files(pattern: str) -> list[str]:
    return sorted(os.fspath(path) for path in Path("csrc").rglob(pattern))


def extension() -> Extension:
    sources, libraries, library_dirs = files("*.cpp"), [], []
    define = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    sanitize = os.environ.get("CELLATTN_SANITIZE")
    extra = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else []
    compile_args = {"cxx": ["-O3", "-std=c++17", "-Wall", "-fvisibility=hidden", define, *extra]}
    link_args = extra or ["-Wl,--strip-debug"]
    if GLIBC is None:
        sources.remove("csrc/glibc.cpp")
    home = cuda_home()
    if isinstance(home, str):
        print(f"cellattn: the graph operators are built for the CPU alone: {home}", file=sys.stderr)
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)  # torch would look for a GPU
        chips = os.environ["TORCH_CUDA_ARCH_LIST"]
        print(f"cellattn: the graph operators are built for the CPU and for CUDA {chips}", file=sys.stderr)
        cpp_extension.CUDA_HOME = os.fspath(home)  # None in a torch without CUDA
        sources += files("*.cu")
        compile_args["nvcc"] = ["-O3", "-std=c++17", "-DUSE_CUDA", define]
        libraries, library_dirs = ["cudart_static", "rt", "dl", "pthread"], [os.fspath(home / "lib64")]
        link_args += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]  # for libtorch_cuda; zig knows no --push-state
    return cpp_extension.CppExtension(
        "cellattn._C",
        sources,
        depends=[*files("*.h"), *files("*.cuh")],
        libraries=libraries,
        library_dirs=library_dirs,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        py_limited_api=True,
    )


class BuildExtension(cpp_extension.BuildExtension):
    """Where CELLATTN_GLIBC is given, links against the symbols of that glibc, which zig has of every version."""

    def build_extensions(self) -> None:
        if GLIBC is not None:
            self.compiler.link = functools.partial(self._link, self.compiler.link)
        super().build_extensions()

    def _link(self, link: Callable[..., None], *args: Any, **options: Any) -> None:
        import ziglang

        zig = os.fspath(Path(ziglang.__file__).with_name("zig"))
        self.compiler.compiler_cxx = [zig]
        self.compiler.linker_so_cxx = [zig, "cc", "-target", f"{platform.machine()}-linux-gnu.{GLIBC}", "-shared"]
        # zig would bring a C++ library of its own, and exceptions pass through LibTorch
        for name in ("libstdc++.so", "libgcc_s.so.1"):
            found = subprocess.check_output(["c++", f"-print-file-name={name}"], text=True)
            self.compiler.add_link_object(found.strip())
        link(*args, **options)


setup(
    package_dir={"cellattn": "cellattn", "cellattn.kernels": "kernels"},
    packages=[*find_packages(include=["cellattn", "cellattn.*"]), "cellattn.kernels"],
    package_data={"cellattn": ["py.typed"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
