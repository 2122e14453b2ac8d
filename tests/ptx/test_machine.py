"""Threads that part and meet again, CTAs that wait for each other, counts, and what the parser makes of odd text."""

from __future__ import annotations

import numpy as np
import pytest

from .counts import Counts
from .harness import entry, launch
from .parser import Immediate, Pair, PtxError, Register, Vector, parse

U32 = np.uint32
PLACES = (
    "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.s32 %r3, %r2, 64, %r1;mul.wide.u32 %rd1, %r3, 4; add.s64 %rd1, %rd1, d;"
)


def run(code: str, *, ctas: int = 1, order=None, counts=None, shared: int = 16) -> np.ndarray:
    d = np.zeros(64 * ctas, U32)
    program = entry(PLACES + code, ["d"], threads=64)
    launch(program, {"d": d}, grid=(ctas, 1, 1), order=order, counts=counts, shared=shared)
    return d


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
    return steps


def test_loops_of_different_lengths_with_branches() -> None:
    code = """
        add.s32 %r4, %r3, 1; mov.u32 %r5, 0;
        $again: setp.eq.u32 %p1, %r4, 1; @%p1 bra $end;
        add.s32 %r5, %r5, 1; and.b32 %r6, %r4, 1; setp.eq.u32 %p2, %r6, 0;
        @%p2 bra $even;
        mad.lo.s32 %r4, %r4, 3, 1; bra.uni $again;
        $even: shr.u32 %r4, %r4, 1; bra.uni $again;
        $end: st.global.b32 [%rd1], %r5;
    """
    assert run(code, ctas=3).tolist() == [collatz(n) for n in range(1, 193)]


def test_threads_meet_again_after_a_branch() -> None:
    """The shuffle after the branch finds all lanes, whichever way they came."""
    code = (
        "setp.lt.u32 %p1, %r1, 5; mov.u32 %r4, 1; @%p1 bra $less; mov.u32 %r4, 2; bra $on; $less: mov.u32 %r4, 3; $on: "
        "shfl.sync.bfly.b32 %r5, %r4, 31, 31, -1; st.global.b32 [%rd1], %r5;"
    )
    assert run(code).tolist() == [2] * 27 + [3] * 5 + [2] * 32


def test_warps_meet_at_a_barrier_in_a_loop() -> None:
    """Warp 1 makes twice as many rounds before it comes to the last barrier."""
    code = """
        shr.u32 %r4, %r1, 5; add.s32 %r5, %r4, 1; mov.u32 %r6, 0;
        $again: add.s32 %r6, %r6, 1; setp.lt.u32 %p1, %r6, %r5; @%p1 bra $again;
        shl.b32 %r7, %r4, 2; and.b32 %r8, %r1, 31; setp.eq.u32 %p2, %r8, 0; @%p2 st.shared.b32 [%r7], %r6;
        bar.sync 0; xor.b32 %r7, %r7, 4; ld.shared.b32 %r9, [%r7]; st.global.b32 [%rd1], %r9;
    """
    assert run(code).tolist() == [2] * 32 + [1] * 32


def test_threads_may_end_early() -> None:
    code = "setp.lt.u32 %p1, %r1, 10; @%p1 ret; st.global.b32 [%rd1], 1;"
    assert run(code).tolist() == [0] * 10 + [1] * 54
    assert run(code.replace("ret;", "exit;")).tolist() == [0] * 10 + [1] * 54


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]], ids=str)
def test_ctas_that_wait_for_the_one_before(order: list[int]) -> None:
    """A look-back chain: CTA b waits for the flag of CTA b - 1, which may stand behind it."""
    code = """
        setp.ne.u32 %p1, %r1, 0; @%p1 ret;
        mul.wide.u32 %rd2, %r2, 256; add.s64 %rd2, %rd2, d; setp.eq.u32 %p2, %r2, 0; mov.u32 %r5, 0; @%p2 bra $mine;
        $again: nanosleep.u32 20; ld.relaxed.gpu.global.b32 %r5, [%rd2+-256]; setp.eq.u32 %p3, %r5, 0; @%p3 bra $again;
        $mine: add.s32 %r6, %r5, 10; st.relaxed.gpu.global.b32 [%rd2], %r6;
    """
    assert run(code, ctas=3, order=order)[::64].tolist() == [10, 20, 30]


def test_the_order_of_the_ctas_is_free() -> None:
    code = "add.s32 %r4, %r3, 7; st.global.b32 [%rd1], %r4;"
    assert (run(code, ctas=150) == run(code, ctas=150, order=np.random.default_rng(0).permutation(150))).all()


def test_counts_are_of_warps() -> None:
    code = "setp.lt.u32 %p1, %r1, 40; @%p1 bra $end; add.s32 %r4, %r1, 1; $end: bar.sync 0; mov.u32 %r5, 1;"
    program = entry(PLACES + code, ["d"], threads=64)
    counts = Counts(len(program.steps))
    launch(program, {"d": np.zeros(192, U32)}, grid=(3, 1, 1), counts=counts)
    found = {step.instruction.text: int(n) for step, n in zip(program.steps, counts.warps, strict=True)}
    assert (found["add.s32 %r4, %r1, 1"], found["bar.sync 0"], found["mov.u32 %r5, 1"]) == (3, 6, 6)


@pytest.mark.parametrize(
    ("stride", "width", "sectors"),
    [(4, 1, 4), (8, 1, 8), (32, 1, 32), (0, 1, 1), (16, 4, 16), (64, 4, 32), (28, 1, 28)],
)
def test_counts_sectors(stride: int, width: int, sectors: int) -> None:
    """Lane l of a warp reads `width` words at `stride` l bytes."""
    registers = ", ".join(f"%r{10 + i}" for i in range(width))
    load = f"ld.global.v{width}.b32 {{{registers}}}" if width > 1 else "ld.global.b32 %r10"
    program = entry(f"mov.u32 %r0, %tid.x; mad.wide.u32 %rd0, %r0, {stride}, d; {load}, [%rd0];", ["d"])
    counts = Counts(len(program.steps))
    launch(program, {"d": np.zeros(1024, U32)}, counts=counts)
    assert counts.sectors.sum() == sectors
    assert counts.bytes.sum() == 128 * width


@pytest.mark.parametrize(
    ("stride", "width", "waves"),
    [(4, 1, 1), (8, 1, 2), (12, 1, 1), (128, 1, 32), (0, 1, 1), (8, 2, 2), (16, 4, 4), (32, 4, 8), (144, 4, 4), (128, 4, 32)],
)
def test_counts_waves_of_shared_memory(stride: int, width: int, waves: int) -> None:
    """Odd strides meet no bank twice, powers of two do; lanes that store to one word share it."""
    registers = ", ".join(["%r1"] * width)
    store = f"st.shared.v{width}.b32 [%r2], {{{registers}}}" if width > 1 else "st.shared.b32 [%r2], %r1"
    code = f"mov.u32 %r0, %tid.x; mov.u32 %r1, 0; mul.lo.u32 %r2, %r0, {stride}; {store};"
    program = entry(code, ["d"])
    counts = Counts(len(program.steps))
    launch(program, {"d": np.zeros(32, U32)}, shared=8192, counts=counts)
    assert counts.waves.sum() == waves
    assert counts.least_waves.sum() == width


# -------------------------------------------------------------------------------------------------------------- parser


def parsed(body: str):
    return parse(f".entry f(\n)\n{{\n.reg .b32 %r<4>;\n.reg .pred p;\n.reg .b64 %rd<2>;\n{body}\n}}\n").kernels["f"]


def test_operands() -> None:
    kernel = parsed("@!p fma.rn.f32 {%r0, _}, [%rd1 + 8], -0x10, 0f3F800000;\nsetp.x %r1|p, !p, 010, 7U;")
    first, second = kernel.instructions
    assert (first.opcode, first.modifiers) == ("fma", ("rn", "f32"))
    assert first.predicate is not None
    assert (first.predicate.name, first.predicate.negated) == ("p", True)
    assert isinstance(first.operands[0], Vector)
    assert [x.offset for x in first.operands if hasattr(x, "offset")] == [8]
    assert first.operands[2:] == (Immediate(-16), Immediate(0x3F800000))
    assert isinstance(second.operands[0], Pair)
    assert isinstance(second.operands[1], Register)
    assert second.operands[1].negated
    assert second.operands[2:] == (Immediate(8), Immediate(7))


def test_statements_over_lines_and_scopes() -> None:
    kernel = parsed(
        "mov.b32\n %r0,\n 1;\n{ .reg .b32 %r0; mov.b32 %r0, 2;\n mov.b32 %r1, %r0; }\n$L1: mov.b32 %r2, %r0; // end"
    )
    targets = [x.operands[0] for x in kernel.instructions]
    assert [x.name for x in targets if isinstance(x, Register)] == ["%r0", "%r0", "%r1", "%r2"]
    assert targets[0] != targets[1]  # the inner one hides the outer
    assert kernel.instructions[3].operands[1] == targets[0]
    assert kernel.labels == {"$L1": 3}
    assert [x.line for x in kernel.instructions] == [7, 10, 11, 12]


def test_source_lines() -> None:
    text = (
        ".entry f(\n.param .u64 .ptr .global .align 16 a,\n.param .align 8 .b8 s[24]\n)\n.maxntid 64, 2, 1\n{\n"
        ".reg .b32 %r<2>;\n"
        ".loc 1 93 7 // attention.py:93:7\nmov.b32 %r0, 1;\n"
        ".loc\t2 5 0, function_name $x, inlined_at 1 2 3\nmov.b32 %r1, 1;\n}\n"
        '.file 1 "/somewhere" "attention.py"\n.file 2 "/there/bits.h"\n'
    )
    kernel = parse(text).kernels["f"]
    assert [x.source for x in kernel.instructions] == ["attention.py:93", "bits.h:5"]
    assert kernel.threads == 128
    assert [(p.name, p.kind, p.size, p.align) for p in kernel.parameters] == [("a", "u64", 8, 8), ("s", "b8", 24, 8)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (".local .b32 x;", "only shared variables"),
        (".strange x;", "directive '.strange x'"),
        ("mov.b32 %r0, 1", "does not end"),
        ("@%r0 mov.b32 %r1, 1;", "is no predicate"),
        ("mov.b32 %r0, a&b;", "operand 'a&b'"),
        (".reg .b32;", "declaration"),
    ],
)
def test_what_is_not_known_is_an_error(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        parsed(body)


def test_functions_and_odd_parameters_are_errors() -> None:
    with pytest.raises(PtxError, match="functions are not known"):
        parse(".visible .func f()\n{\n}\n")
    with pytest.raises(PtxError, match="parameter"):
        parse(".entry f(\n.param .texref t\n)\n{\n}\n")
