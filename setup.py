"""What `pyproject.toml` cannot say: `kernels/` is installed as `cellattn.kernels`, and `csrc/` is compiled to `cellattn._C`.

The extension keeps to LibTorch's stable ABI and Python's limited API: one file serves Python >= 3.10 and torch >= 2.11, with
CUDA and without. Read from the environment:

    CUDA_HOME              the CUDA toolkit (else /usr/local/cuda); without an nvcc there, the CPU half alone is built
    CELLATTN_CUDA=0        the CPU half alone, whatever is there
    TORCH_CUDA_ARCH_LIST   chips to compile for
    CELLATTN_SANITIZE      names for -fsanitize, as in address,undefined
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from torch.utils import cpp_extension

TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that loads the extension
CUDA_ARCHS = "8.0;8.6;8.9;9.0+PTX"


def cuda_home() -> Path | None:
    """The CUDA toolkit that holds nvcc, if there is one and it is wanted."""
    if os.environ.get("CELLATTN_CUDA") == "0":
        return None
    place = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    return place if (place / "bin" / "nvcc").is_file() else None


def files(pattern: str) -> list[str]:
    return sorted(os.fspath(path) for path in Path("csrc").rglob(pattern))


def extension() -> Extension:
    sources, libraries, library_dirs = files("*.cpp"), [], []
    define = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    sanitize = os.environ.get("CELLATTN_SANITIZE")
    extra = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else []
    compile_args = {"cxx": ["-O3", "-std=c++17", "-Wall", "-fvisibility=hidden", define, *extra]}
    link_args = extra or ["-Wl,--strip-debug"]
    home = cuda_home()
    if home is None:
        print("cellattn: the graph operators are built for the CPU alone: no CUDA compiler (CUDA_HOME)", file=sys.stderr)
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)  # torch would look for a GPU
        chips = os.environ["TORCH_CUDA_ARCH_LIST"]
        print(f"cellattn: the graph operators are built for the CPU and for CUDA {chips}", file=sys.stderr)
        cpp_extension.CUDA_HOME = os.fspath(home)  # None in a torch without CUDA
        sources += files("*.cu")
        compile_args["nvcc"] = ["-O3", "-std=c++17", "-DUSE_CUDA", define]
        libraries, library_dirs = ["cudart_static", "rt", "dl", "pthread"], [os.fspath(home / "lib64")]
        link_args += ["-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"]  # for libtorch_cuda
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


setup(
    package_dir={"cellattn": "cellattn", "cellattn.kernels": "kernels"},
    packages=[*find_packages(include=["cellattn", "cellattn.*"]), "cellattn.kernels"],
    package_data={"cellattn": ["py.typed"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
