"""Loads, stores, asynchronous copies, atomics and barriers, on bytes worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from .decode import decode
from .harness import entry, launch
from .machine import Fault, execute
from .memory import Global, Storage, Window
from .parser import parse

U8, U16, U32, U64, S32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32


def test_small_types_fill_a_register_by_their_sign() -> None:
    x = np.array([0x80, 0x7F, 1, 2], U8)
    d = np.zeros(8, U32)
    launch(
        entry(
            "ld.global.s8 %r1, [x]; ld.global.u8 %r2, [x]; ld.global.b8 %h1, [x+1]; cvt.u32.u16 %r3, %h1;"
            "ld.global.s16 %r4, [x+0]; ld.global.u16 %r5, [x+2];"
            "st.global.v4.b32 [d], {%r1, %r2, %r3, %r4}; st.global.b32 [d+16], %r5; st.global.b8 [d+20], %r1;",
            ["x", "d"],
        ),
        {"x": x, "d": d},
    )
    assert d.tolist() == [0xFFFFFF80, 0x80, 0x7F, 0x7F80, 0x0201, 0x80, 0, 0]


def test_vectors() -> None:
    x, d = np.arange(16, dtype=U32), np.zeros(16, U32)
    code = (
        "mov.u32 %r9, %tid.x; setp.lt.u32 %p1, %r9, 4; mad.wide.u32 %rd1, %r9, 16, x; mad.wide.u32 %rd2, %r9, 16, d;"
        "@%p1 ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd1]; @%p1 st.global.v4.b32 [%rd2], {%r3, %r2, %r1, %r0};"
    )
    launch(entry(code, ["x", "d"]), {"x": x, "d": d}, inputs=["x"])
    assert (d.reshape(4, 4) == x.reshape(4, 4)[:, ::-1]).all()
    d[:] = 0
    code = "ld.global.v2.u64 {%rd1, %rd2}, [x]; st.global.v2.u64 [d+16], {%rd2, %rd1};"
    launch(entry(code, ["x", "d"]), {"x": x, "d": d})
    assert d[4:8].tolist() == [2, 3, 0, 1]


def test_an_inactive_lane_keeps_its_register() -> None:
    x, d = np.arange(32, dtype=U32), np.zeros(32, U32)
    code = (
        "mov.u32 %r1, %tid.x; mad.wide.u32 %rd1, %r1, 4, x; mad.wide.u32 %rd2, %r1, 4, d; setp.lt.u32 %p1, %r1, 2;"
        "mov.u32 %r2, 99; @%p1 ld.global.b32 %r2, [%rd1]; st.global.b32 [%rd2], %r2;"
    )
    launch(entry(code, ["x", "d"]), {"x": x, "d": d})
    assert d.tolist() == [0, 1] + [99] * 30


def test_an_inactive_lane_may_have_any_address() -> None:
    d = np.zeros(1, U32)
    launch(entry("setp.ne.u32 %p1, 0, 0; @%p1 ld.global.b32 %r1, [d+4000]; @!%p1 st.global.b32 [d], 7;", ["d"]), {"d": d})
    assert d.tolist() == [7]


def test_a_parameter_s_address_may_differ_between_threads() -> None:
    text = (
        ".version 8.7\n.target sm_80\n.address_size 64\n"
        ".entry f(\n.param .align 4 .b8 s[128],\n.param .u64 d\n)\n.reqntid 32\n{\n"
        ".reg .b32 %r<4>; .reg .b64 %rd<5>; mov.u32 %r0, %tid.x; mov.b64 %rd1, s; mad.wide.u32 %rd1, %r0, 4, %rd1;\n"
        "ld.param.u32 %r1, [%rd1];\n"
        "ld.param.u64 %rd3, [d]; mad.wide.u32 %rd3, %r0, 4, %rd3; st.global.b32 [%rd3], %r1; ret;\n}\n"
    )
    program = decode(parse(text).kernels["f"])
    out, memory = np.zeros(32, U32), Global()
    base = memory.add(Window("d", Storage(out.view(np.uint8)), 0, 128), 0)
    given = np.arange(32, dtype=U32) * 3
    execute(program, memory, np.concatenate([given.view(np.uint8), np.array([base], U64).view(np.uint8)]), (1, 1, 1), 32)
    assert out.tolist() == given.tolist()
    with pytest.raises(Fault, match="load outside of the parameters"):
        execute(
            decode(parse(text.replace("%r0, 4, %rd1", "%r0, 5, %rd1")).kernels["f"]),
            memory,
            np.zeros(136, np.uint8),
            (1, 1, 1),
            32,
        )


def test_parameters_are_bytes() -> None:
    """Structures by value, also through an address in a register."""

    text = (
        ".entry f(\n.param .align 8 .b8 s[24],\n.param .u64 d\n)\n.reqntid 32\n{\n"
        ".reg .b64 %rd<9>; .reg .b32 %r<9>; .reg .b16 %h<9>;\n"
        "mov.b64 %rd1, s; ld.param.u64 %rd2, [%rd1+8]; ld.param.u32 %r1, [s+4];"
        "ld.param.v4.u8 {%h1, %h2, %h3, %h4}, [s+16];\n"
        "ld.param.u64 %rd3, [d]; st.global.b64 [%rd3], %rd2; st.global.b32 [%rd3+8], %r1;"
        "st.global.b16 [%rd3+12], %h3;\nret;\n}\n"
    )
    program = decode(parse(text).kernels["f"])
    d = np.zeros(2, U64)
    memory = Global()
    base = memory.add(Window("d", Storage(d.view(U8)), 0, 16), 0)
    parameters = np.concatenate([np.arange(24, dtype=U8), np.array([base], U64).view(U8)])
    execute(program, memory, parameters, (1, 1, 1), 32)
    assert d.view(U8).tolist() == [*range(8, 16), *range(4, 8), 18, 0, 0, 0]


def test_shared_memory_is_a_ctas_own() -> None:
    d = np.zeros(128, U32)
    code = (
        "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; shl.b32 %r3, %r1, 2; mad.lo.s32 %r4, %r2, 64, %r1;"
        "st.shared.b32 [%r3], %r4; bar.sync 0; xor.b32 %r5, %r3, 252; ld.shared.b32 %r6, [%r5];"
        "mad.wide.u32 %rd1, %r4, 4, d; st.global.b32 [%rd1], %r6;"
    )
    launch(entry(code, ["d"], threads=64), {"d": d}, grid=(2, 1, 1), shared=256)
    assert d.tolist() == [*range(63, -1, -1), *range(127, 63, -1)]


def test_static_shared_variables_lie_side_by_side() -> None:
    head = ".shared .align 16 .b8 first[20];\n.shared .align 4 .b32 second;\n.extern .shared .align 16 .b8 rest[];"
    d = np.zeros(3, U32)
    code = (
        "mov.u32 %r1, first; mov.u32 %r2, second; mov.u32 %r3, rest;st.global.v2.b32 [d], {%r1, %r2}; st.global.b32 [d+8], %r3;"
    )
    launch(entry(code, ["d"], head=head), {"d": d}, shared=16)
    assert d.tolist() == [0, 20, 32]


COPY = (
    "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; mad.wide.u32 %rd1, %r1, 16, x; mad.wide.u32 %rd2, %r1, 16, d;"
    "{copy} ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2]; st.global.v4.b32 [%rd2], {{%r4, %r5, %r6, %r7}};"
)


@pytest.mark.parametrize(
    "wait", ["cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"], ids=["of a group", "for all"]
)
def test_an_asynchronous_copy_arrives_when_waited_for(wait: str) -> None:
    x, d = np.arange(128, dtype=U32), np.zeros(128, U32)
    code = COPY.format(copy="cp.async.cg.shared.global [%r2], [%rd1], 16;" + wait)
    launch(entry(code, ["x", "d"]), {"x": x, "d": d}, inputs=["x"], shared=512)
    assert (d == x).all()


def test_a_copy_of_nothing_fills_zeros_and_reads_nothing() -> None:
    x, d = np.arange(1, 129, dtype=U32), np.ones(128, U32)
    copy = (
        "setp.lt.u32 %p1, %r1, 3; selp.b32 %r3, 16, 0, %p1; selp.b64 %rd1, %rd1, 0, %p1;"
        "cp.async.cg.shared.global [%r2], [%rd1], 16, %r3; cp.async.wait_all;"
    )
    launch(entry(COPY.format(copy=copy), ["x", "d"]), {"x": x, "d": d}, shared=512)
    assert d.tolist() == [*range(1, 13), *[0] * 116]


def test_groups_are_waited_for_in_their_order() -> None:
    x, d = np.arange(128, dtype=U32), np.zeros(128, U32)
    first = "cp.async.ca.shared.global [%r2], [%rd1], 16; cp.async.commit_group;"
    second = "cp.async.ca.shared.global [%r2+512], [%rd1], 4; cp.async.commit_group;"
    code = COPY.format(copy=first + second + "cp.async.wait_group 1;")
    launch(entry(code, ["x", "d"]), {"x": x, "d": d}, shared=1024)
    assert (d == x).all()
    code = COPY.format(copy=first + second + "cp.async.wait_group 2;")
    with pytest.raises(Fault, match="has not been waited for"):
        launch(entry(code, ["x", "d"]), {"x": x, "d": d}, shared=1024)


@pytest.mark.parametrize(
    ("operation", "before", "after", "olds"),
    [
        ("add.u32", 5, 5 + sum(range(32)), [5, 5, 6, 8]),
        ("or.b32", 64, 64 | 31, [64, 64, 65, 67]),
        ("and.b32", 31, 0, [31, 0, 0, 0]),
        ("xor.b32", 0, 0, [0, 0, 1, 3]),
        ("max.s32", 2, 31, [2, 2, 2, 2]),
        ("min.u32", 7, 0, [7, 0, 0, 0]),
        ("exch.b32", 9, 31, [9, 0, 1, 2]),
    ],
)
def test_atomics(operation: str, before: int, after: int, olds: list[int]) -> None:
    x, d = np.array([before], U32), np.zeros(32, U32)
    code = (
        f"mov.u32 %r1, %tid.x; atom.global.{operation} %r2, [x], %r1; mad.wide.u32 %rd1, %r1, 4, d;st.global.b32 [%rd1], %r2;"
    )
    launch(entry(code, ["x", "d"]), {"x": x, "d": d})
    assert (x.tolist(), d[:4].tolist()) == ([after], olds)
    x[0] = before
    launch(entry(f"mov.u32 %r1, %tid.x; red.global.{operation} [x], %r1;", ["x"]), {"x": x})
    assert x.tolist() == [after]


def test_compare_and_swap() -> None:
    x = np.array([3], U32)
    launch(entry("mov.u32 %r1, %tid.x; add.s32 %r2, %r1, 1; atom.global.cas.b32 %r3, [x], %r1, %r2;", ["x"]), {"x": x})
    assert x.tolist() == [32]  # 3 becomes 4, which becomes 5, ...


def test_fences_and_barriers_of_a_warp() -> None:
    d = np.zeros(32, U32)
    code = (
        "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], %r1; membar.cta; fence.acq_rel.gpu; bar.warp.sync -1;"
        "xor.b32 %r3, %r2, 124; ld.shared.b32 %r4, [%r3]; mad.wide.u32 %rd1, %r1, 4, d; st.global.b32 [%rd1], %r4;"
    )
    launch(entry(code, ["d"]), {"d": d}, shared=128)
    assert d.tolist() == list(range(31, -1, -1))


def test_strong_accesses_of_shared_memory_are_no_race() -> None:
    launch(entry("st.volatile.shared.u32 [0], 1; ld.volatile.shared.u32 %r1, [0];", []), {}, shared=16)
