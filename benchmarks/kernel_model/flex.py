"""PyTorch's FlexAttention as it would be compiled for a chip: its own templates, out of the PyTorch that is installed.

PyTorch fills these templates in only where there is a GPU. Here they are filled in as it does for attention without a mask or
a score function, with the options and tiles that it takes by default, so that its machine code can be read beside ours.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jinja2
import torch
import triton
from torch._inductor.kernel import flex
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .cost import Code, read

_TEMPLATES = Path(flex.__file__).parent / "templates"
_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_HEAD = """
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice
"""


@dataclass(frozen=True)
class FlexKernel:
    """Forward, or the backward that makes dq in some CTAs and dk and dv in others."""

    code: Code
    tile: tuple[int, ...]  # BLOCK_M, BLOCK_N; backward BLOCK_M1, BLOCK_N1, BLOCK_M2, BLOCK_N2
    warps: int


def _tiles(arch: int, dim: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """What PyTorch takes unless it is told to tune."""
    with mock.patch("torch.cuda.get_device_capability", return_value=divmod(arch, 10)):
        heuristic = CUDAConfigHeuristic()
        (forward,) = heuristic.get_flex_attn_fwd_configs(dim, dtype)
        (backward,) = heuristic.get_flex_attn_bwd_configs(dim, dtype)
    return forward, backward


def _source(
    names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], options: dict[str, Any], arguments: list[str]
) -> str:
    """A module of the templates, filled in."""
    strides = {name: [_product(shape[i + 1 :]) for i in range(len(shape))] for name, shape in shapes.items()}
    constants = {name: value for name, value in options.items() if name != "INDEX_DTYPE"}
    defines = "\n".join(
        [*(f"{name} : tl.constexpr = {value!r}" for name, value in constants.items()), "INDEX_DTYPE = tl.int32"]
    )

    def def_kernel(*inputs: str) -> str:
        arguments[:] = [*(f"arg_{x}" for x in inputs), "out_ptr"]
        head = f"@triton.jit\ndef flex({', '.join(arguments)}):\n"
        body = [*defines.splitlines(), *(f"{x} = arg_{x}" for x in inputs)]
        return _HEAD + head + textwrap.indent("\n".join(body), "    ")

    def modification(subgraph_number: int, output_name: str | None, **values: Any) -> str:
        if output_name == "mask_mod_output":
            return f"{output_name} = tl.full([1], True, tl.int1)"
        if output_name is None:
            return "pass"
        return f"{output_name} = {values['grad_score_mod'] if output_name == 'grad_scores' else values['score']}"

    def store_output(indices: tuple[str, ...], value: str, where: str, indent_width: int = 4, **_: Any) -> str:
        at = " + ".join(f"{stride} * {index}" for stride, index in zip(strides["Q"], indices, strict=True))
        return f"tl.store(out_ptr + {at}, {value}, {where})"

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)  # no page is made of it
    environment.filters["indent_except_first"] = lambda text, levels: text.replace("\n", "\n" + "    " * levels)
    source = "\n".join((_TEMPLATES / f"{name}.py.jinja").read_text() for name in names)
    return environment.from_string(source).render(
        def_kernel=def_kernel,
        modification=modification,
        store_output=store_output,
        gen_argdefs=lambda: ", ".join(arguments),
        gen_defines=lambda: defines,
        size=lambda name, i: shapes[name][i],
        stride=lambda name, i=None: tuple(strides[name]) if i is None else strides[name][i],
        **constants,
    )


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _compile(source: str, arguments: list[str], pointers: dict[str, str], arch: int, warps: int, stages: int) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flex_template.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("flex_template", path)
        assert spec is not None
        assert spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        sys.modules["flex_template"] = module
        spec.loader.exec_module(module)
        signature = {name: pointers.get(name.removeprefix("arg_"), "*i32") for name in arguments}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arguments))}
        compiled = triton.compile(
            ASTSource(module.flex, signature, {}, aligned),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
    return read(compiled.asm["cubin"], compiled.metadata.num_warps, compiled.metadata.shared)


def flex_attention(arch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> tuple[FlexKernel, FlexKernel]:
    """(forward, backward), q, k, v [1, heads, tokens, dim], contiguous."""
    forward, backward = _tiles(arch, dim, dtype)
    padded = max(16, triton.next_power_of_2(dim))
    shape = (1, heads, tokens, dim)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("Q", "K", "V", "DO", "DQ", "DV"), shape)
    shapes |= dict.fromkeys(("KV_NUM_BLKS", "Q_NUM_BLKS"), (1, 1, 1)) | dict.fromkeys(("KV_IDX", "Q_IDX"), (1, 1, 1, 1))
    options = {
        "FLOAT32_PRECISION": "ieee", "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True, "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False, "IS_DIVISIBLE": tokens % 128 == 0,
        "SM_SCALE": dim**-0.5, "GQA_SHARED_HEADS": 1, "HAS_FULL_BLOCKS": False, "USE_TMA": False,
        "QK_HEAD_DIM": dim, "QK_HEAD_DIM_ROUNDED": padded, "V_HEAD_DIM": dim, "V_HEAD_DIM_ROUNDED": padded,
        "SAFE_HEAD_DIM": padded == dim, "SPARSE_Q_BLOCK_SIZE": 1 << 30, "SPARSE_KV_BLOCK_SIZE": 1 << 30,
    }  # fmt: skip
    values, sums = _POINTER[dtype], "*fp32"
    pointers = dict.fromkeys(("Q", "K", "V", "DO", "DQ", "DV", "out_ptr"), values) | dict.fromkeys(
        ("LSE", "MAX", "DELTA"), sums
    )
    arguments: list[str] = []
    source = _source(
        ("flex_attention", "utilities", "common"),
        shapes,
        options | {"BLOCK_M": forward.block_m, "BLOCK_N": forward.block_n},
        arguments,
    )
    first = _compile(source, arguments, pointers, arch, forward.num_warps, forward.num_stages)
    sizes = backward.block_m1, backward.block_n1, backward.block_m2, backward.block_n2
    names = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    source = _source(("flex_backwards", "utilities"), shapes, options | dict(zip(names, sizes, strict=True)), arguments)
    second = _compile(source, arguments, pointers, arch, backward.num_warps, backward.num_stages)
    return (
        FlexKernel(first, (forward.block_m, forward.block_n), forward.num_warps),
        FlexKernel(second, sizes, backward.num_warps),
    )
