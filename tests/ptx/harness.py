"""Small kernels for the machine's own tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .counts import Counts
from .decode import decode
from .machine import Program, execute
from .memory import Global, Storage, Window
from .parser import parse

_KINDS = {
    np.uint16: "b16", np.int16: "b16", np.uint32: "b32", np.int32: "b32", np.float32: "b32", np.uint64: "b64",
    np.int64: "b64", np.float64: "b64", np.bool_: "pred",
}  # fmt: skip


def entry(body: str, pointers: Sequence[str], *, threads: int = 32, head: str = "") -> Program:
    """A kernel whose parameters are pointers, each in a register of its name."""
    parameters = ",\n".join(f".param .u64 p_{name}" for name in pointers)
    loads = "\n".join(f".reg .b64 {name}; ld.param.b64 {name}, [p_{name}];" for name in pointers)
    text = (
        f".version 8.7\n.target sm_90a\n.address_size 64\n{head}\n.visible .entry test(\n{parameters}\n)\n"
        f".reqntid {threads}\n{{\n.reg .pred %p<40>;\n.reg .b16 %h<40>;\n.reg .b32 %r<200>;\n.reg .b64 %rd<40>;\n"
        f"{loads}\n{body}\nret;\n}}\n"
    )
    return decode(parse(text).kernels["test"])


def launch(
    program: Program, arrays: Mapping[str, np.ndarray], *, inputs: Sequence[str] = (), unwritten: Sequence[str] = (),
    grid: tuple[int, int, int] = (1, 1, 1), shared: int = 0, order: Sequence[int] | None = None,
    counts: Counts | None = None,
) -> None:  # fmt: skip
    """Run it on arrays, which it changes in place."""
    memory, parameters = Global(), np.zeros(program.parameter_bytes, np.uint8)
    for name, array in arrays.items():
        data = array.reshape(-1).view(np.uint8)
        written = np.zeros(data.size, np.uint8) if name in unwritten else None
        base = memory.add(Window(name, Storage(data, name in inputs, written), 0, data.size), 0)
        at = program.parameters[f"p_{name}"]
        parameters[at : at + 8] = np.array([base], np.uint64).view(np.uint8)
    assert program.kernel.threads is not None
    execute(
        program, memory, parameters, grid, program.kernel.threads, shared,
        order=None if order is None else np.asarray(order), counts=counts,
    )  # fmt: skip


def lanes(code: str, results: Mapping[str, Any], **sources: Any) -> Any:
    """Run code over the lanes of a warp, lane t with the t-th value of each source (repeated).

    Sources and results are names of registers, with their types: lanes("add.s32 d, a, b;", {"d": np.int32}, a=(np.int32, [1]),
    b=(np.int32, [2])). The result, or a tuple of them, is as long as the longest source.
    """
    arrays: dict[str, np.ndarray] = {}
    body = ["mov.u32 %r0, %tid.x;"]
    length = max((len(values) for _, values in sources.values()), default=32)
    for name, (dtype, values) in sources.items():
        kind = _KINDS[dtype]
        stored = np.uint16 if dtype is np.bool_ else dtype
        arrays[f"in_{name}"] = np.resize(np.asarray(values, stored), 32)
        size = np.dtype(stored).itemsize
        body.append(f".reg .{kind} {name}; mad.wide.u32 %rd0, %r0, {size}, in_{name};")
        if dtype is np.bool_:
            body.append(f"ld.global.b16 %h0, [%rd0]; setp.ne.b16 {name}, %h0, 0;")
        else:
            body.append(f"ld.global.{kind} {name}, [%rd0];")
    for name, dtype in results.items():
        arrays[f"out_{name}"] = np.zeros(32, np.uint16 if dtype is np.bool_ else dtype)
        if name not in sources:
            body.append(f".reg .{_KINDS[dtype]} {name};")
    body.append(code)
    for name, dtype in results.items():
        size = np.dtype(np.uint16 if dtype is np.bool_ else dtype).itemsize
        body.append(f"mad.wide.u32 %rd0, %r0, {size}, out_{name};")
        if dtype is np.bool_:
            body.append(f"selp.b16 %h0, 1, 0, {name}; st.global.b16 [%rd0], %h0;")
        else:
            body.append(f"st.global.{_KINDS[dtype]} [%rd0], {name};")
    launch(entry("\n".join(body), list(arrays)), arrays)
    found = tuple(
        arrays[f"out_{name}"][:length].astype(bool) if dtype is np.bool_ else arrays[f"out_{name}"][:length]
        for name, dtype in results.items()
    )
    return found[0] if len(found) == 1 else found
