"""Ways to fill memory: what a rate of writing is held against."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..measure import first_line

# 512-bit stores past the caches where the processor has them, 128-bit ones otherwise.
_STREAM = """
#include <immintrin.h>
#include <stddef.h>
#include <string.h>
__attribute__((target("avx512f"))) static void wide(char* p, size_t n) {
  const __m512i x = _mm512_set1_epi64(7);
  for (size_t i = 0; i < n; i += 64) _mm512_stream_si512((void*)(p + i), x);
}
static void narrow(char* p, size_t n) {
  const __m128i x = _mm_set1_epi32(7);
  for (size_t i = 0; i < n; i += 16) _mm_stream_si128((__m128i*)(p + i), x);
}
void stream_fill(char* p, size_t n) { /* p and n multiples of 64 */
  if (__builtin_cpu_supports("avx512f")) wide(p, n); else narrow(p, n);
  _mm_sfence();
}
"""


def fill_of(name: str, num_bytes: int, device: str) -> tuple[Callable[[], Any], int]:
    """A way of `khop_plan.fills_of`, and the bytes that a call moves; a copy counts what it reads and what it writes."""
    x = torch.zeros(num_bytes // 8, dtype=torch.int64, device=device)
    if name == "torch fill_":
        return functools.partial(x.fill_, 7), num_bytes
    if name == "torch copy_":
        return functools.partial(torch.zeros_like(x).copy_, x), 2 * num_bytes
    if name == "numpy fill, one thread":
        return functools.partial(x.numpy().fill, 7), num_bytes
    return _threaded((lambda p, n: ctypes.memset(p, 7, n)) if name == "memset, all threads" else _stream_fill(), x), num_bytes


def _threaded(fill: Callable[[int, int], Any], x: Tensor) -> Callable[[], None]:
    """Calls of C, which let go of the interpreter lock, over as many parts as PyTorch has threads."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    size = x.numel() * x.element_size() // threads // 64 * 64
    return lambda: [*pool.map(lambda i: fill(x.data_ptr() + i * size, size), range(threads))].clear()


def _stream_fill() -> Callable[[int, int], Any]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "stream.c", Path(folder) / "stream.so"
        source.write_text(_STREAM)
        done = subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", source, "-o", library], capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{compiler}: {first_line(done.stderr)}")
        f = ctypes.CDLL(os.fspath(library)).stream_fill
    f.argtypes, f.restype = (ctypes.c_void_p, ctypes.c_size_t), None
    return f
