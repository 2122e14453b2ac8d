"""Each detector, on a small kernel that is clean and on the same with a fault planted: that it fires, and that it is silent."""

from __future__ import annotations

import numpy as np
import pytest

from .harness import entry, launch
from .machine import Fault
from .memory import AccessError, Flat, Storage, Window

U32 = np.uint32

PLACES = "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.s32 %r3, %r2, 64, %r1; mul.wide.u32 %rd1, %r3, 4;"


def run(code: str, *, ctas: int = 1, threads: int = 64, shared: int = 256, inputs=("x",), unwritten=()) -> np.ndarray:
    x, d = np.arange(threads * ctas, dtype=U32), np.zeros(threads * ctas, U32)
    program = entry(PLACES + code, ["x", "d"], threads=threads)
    launch(program, {"x": x, "d": d}, grid=(ctas, 1, 1), shared=shared, inputs=inputs, unwritten=unwritten)
    return d


def caught(code: str, message: str, **options) -> str:
    with pytest.raises(Fault, match=message) as error:
        run(code, **options)
    return str(error.value)


def both(clean: str, faulty: str, message: str, **options) -> str:
    run(clean, **options)
    return caught(faulty, message, **options)


# ------------------------------------------------------------------------------------------------------- global memory

LOAD = "add.s64 %rd2, %rd1, x; ld.global.b32 %r4, [%rd2{offset}]; add.s64 %rd3, %rd1, d; st.global.b32 [%rd3], %r4;"
STORE = "add.s64 %rd2, %rd1, x; ld.global.b32 %r4, [%rd2]; add.s64 %rd3, %rd1, {to}; {guard}st.global.b32 [%rd3{offset}], %r4;"


def test_loads_outside() -> None:
    message = both(LOAD.format(offset=""), LOAD.format(offset="+4"), "access outside: 4 bytes past argument x")
    assert "'ld.global.b32 %r4, [%rd2+4]', line 17 of the PTX" in message
    assert "thread 63 of CTA 0, address 0x1000010fc" not in message  # 4 bytes on
    assert "thread 63 of CTA 0, address 0x100001100" in message
    caught(LOAD.format(offset="+-4"), "access outside: 4 bytes before argument x")
    caught("mov.b64 %rd2, 64; ld.global.b32 %r4, [%rd2];", "access outside of every argument")


def test_stores_outside() -> None:
    both(STORE.format(to="d", offset="", guard=""), STORE.format(to="d", offset="+4", guard=""), "4 bytes past argument d")


def test_a_mask_that_is_dropped() -> None:
    clean = "setp.lt.u32 %p1, %r1, 63;" + STORE.format(to="d", offset="+4", guard="@%p1 ")
    both(clean, clean.replace("@%p1 ", ""), "4 bytes past argument d")


def test_misaligned_accesses() -> None:
    wide = (
        "mul.wide.u32 %rd1, %r1, 8; setp.lt.u32 %p1, %r1, 16; add.s64 %rd2, %rd1, x;"
        "@%p1 ld.global.v2.b32 {{%r4, %r5}}, [%rd2+{}];"
    )
    both(wide.format(0), wide.format(4), "misaligned access of 8 bytes")
    shared = "shl.b32 %r4, %r1, 2; st.shared.b32 [%r4+{}], %r1;"
    both(
        shared.format(0), "setp.lt.u32 %p1, %r1, 9; @%p1 " + shared.format(2).split("; ")[1].replace("%r4", "%r1"), "misaligned"
    )


def test_writes_to_inputs() -> None:
    store = STORE.format(to="x", offset="", guard="")
    run(store, inputs=())
    caught(store, "write to the input x")


def test_reads_of_what_nothing_wrote() -> None:
    read = "add.s64 %rd3, %rd1, d; {write} ld.global.b32 %r4, [%rd3];"
    both(
        read.format(write="st.global.b32 [%rd3], 1;"), read.format(write="st.global.b16 [%rd3], 1;"),
        "read of bytes of d that nothing wrote", unwritten=("d",),
    )  # fmt: skip
    caught(read.format(write=""), "read of bytes of d that nothing wrote", unwritten=("d",))


def test_two_ctas_that_write_the_same_bytes() -> None:
    own = "add.s64 %rd3, %rd1, d; st.global.b32 [%rd3], 1;"
    both(own, own.replace("%rd1, d", "0, d"), "two CTAs write the same bytes of d without an atomic", ctas=2)
    run("red.global.add.u32 [d], 1;", ctas=2)  # an atomic may
    # also where the CTAs do not run side by side
    caught(own.replace("%rd1, d", "0, d"), "two CTAs write the same bytes", ctas=200)


def test_ctas_that_read_what_another_writes() -> None:
    own = "add.s64 %rd3, %rd1, d; st.global.b32 [%rd3], 1; ld.global.b32 %r4, [%rd3];"
    both(own, own + "ld.global.b32 %r4, [d+256];", "another CTA writes in the same launch", ctas=2)
    caught(
        "setp.eq.u32 %p1, %r2, 0; @%p1 ld.global.b32 %r4, [d+256];" + own, "that another CTA reads in the same launch", ctas=2
    )


def test_threads_that_write_different_values() -> None:
    both("st.global.b32 [d], 1;", "st.global.b32 [d], %r1;", "two threads wrote different values to d")


def test_atomics_beside_plain_writes() -> None:
    caught("st.global.b32 [d], 1; red.global.add.u32 [d], 1;", "atomic on bytes of d written in the same launch")


# ------------------------------------------------------------------------------------------------------- shared memory

EXCHANGE = (
    "shl.b32 %r4, %r1, 2; st.shared.b32 [%r4], %r1; {barrier} xor.b32 %r5, %r4, {other}; ld.shared.b32 %r6, [%r5]; {after}"
)


def test_shared_memory_has_a_size() -> None:
    code = EXCHANGE.format(barrier="bar.sync 0;", other=252, after="")
    both(code, code.replace("[%r4]", "[%r4+4]"), "shared access outside of its 256 bytes")


def test_shared_bytes_that_nothing_wrote() -> None:
    code = EXCHANGE.format(barrier="bar.sync 0;", other=4, after="")
    both(code, code.replace("st.shared", "setp.ne.u32 %p1, %r1, 7; @%p1 st.shared"), "shared bytes that nothing wrote")


@pytest.mark.parametrize(("other", "what"), [(252, "warps"), (4, "lanes of a warp")])
def test_reads_race_with_writes(other: int, what: str) -> None:
    code = EXCHANGE.format(barrier="bar.sync 0;", other=other, after="")
    both(code, code.replace("bar.sync 0;", ""), "race: read of a shared byte that another thread wrote")


def test_a_barrier_of_the_warp_orders_its_lanes_alone() -> None:
    lanes = EXCHANGE.format(barrier="bar.warp.sync 0xffffffff;", other=4, after="")
    both(lanes, lanes.replace("%r4, 4;", "%r4, 252;"), "race: read of a shared byte that another thread wrote")


@pytest.mark.parametrize("other", [252, 4], ids=["warps", "lanes of a warp"])
def test_writes_race_with_reads(other: int) -> None:
    code = EXCHANGE.format(barrier="bar.sync 0;", other=other, after="bar.sync 0; st.shared.b32 [%r4], 1;")
    faulty = EXCHANGE.format(barrier="bar.sync 0;", other=other, after="st.shared.b32 [%r4], 1;")
    both(code, faulty, "race: write to a shared byte that another thread read")


def test_one_of_many_readers_that_writes() -> None:
    """All have read the byte, the writer too: the others are not forgotten."""
    code = (
        "setp.eq.u32 %p1, %r1, {writer}; @%p1 st.shared.b32 [0], 1; bar.sync 0; ld.shared.b32 %r6, [0]; {barrier}"
        "@%p1 st.shared.b32 [0], 2;"
    )
    for writer in (0, 5, 31, 32, 63):
        both(
            code.format(writer=writer, barrier="bar.sync 0;"), code.format(writer=writer, barrier=""),
            "race: write to a shared byte that another thread read",
        )  # fmt: skip
    one_warp = "setp.lt.u32 %p2, %r1, 32; @!%p2 bra $end; " + code.format(writer=3, barrier="bar.warp.sync -1;")
    one_warp = one_warp.replace("bar.sync 0;", "bar.warp.sync -1;", 1) + "$end:"
    both(one_warp, one_warp.replace("bar.warp.sync -1;", "", 2).replace("ld.", "bar.warp.sync -1; ld.", 1), "race: write")


def test_writes_race_with_writes() -> None:
    code = "st.shared.b32 [0], {value};"
    both(code.format(value=1), code.format(value="%r1"), "race: two threads write different values to a shared byte at once")
    twice = "setp.eq.u32 %p1, %r1, 40; setp.eq.u32 %p2, %r1, 3; @%p1 st.shared.b32 [0], 1; {} @%p2 st.shared.b32 [0], 2;"
    both(twice.format("bar.sync 0;"), twice.format(""), "race: two threads write a shared byte, no barrier between")


COPY = (
    "shl.b32 %r4, %r1, 2; add.s64 %rd2, %rd1, x; cp.async.ca.shared.global [%r4], [%rd2], 4; cp.async.commit_group;"
    "cp.async.wait_group 0; bar.sync 0; xor.b32 %r5, %r4, 252; ld.shared.b32 %r6, [%r5]; bar.sync 0;"
    "cp.async.ca.shared.global [%r4], [%rd2], 4; cp.async.wait_all;"
)


def test_copies_that_are_not_waited_for() -> None:
    both(COPY, COPY.replace("wait_group 0", "wait_group 1"), "cp.async has not been waited for")
    caught(COPY.replace("cp.async.wait_group 0;", ""), "cp.async has not been waited for")
    caught(COPY.replace("cp.async.commit_group;", ""), "cp.async has not been waited for")


def test_copies_that_are_not_seen_before_a_barrier() -> None:
    caught(COPY.replace("bar.sync 0;", "", 1), "race: read of a shared byte that another thread wrote")


def test_copies_into_a_buffer_still_in_use() -> None:
    parts = COPY.rpartition("bar.sync 0;")
    caught(parts[0] + parts[2], "race: write to a shared byte that another thread read")
    twice = "shl.b32 %r4, %r1, 2; add.s64 %rd2, %rd1, x;" + "cp.async.ca.shared.global [%r4], [%rd2], 4;" * 2
    caught(twice, "write to shared bytes that a cp.async under way also writes")


def test_copies_from_outside() -> None:
    caught(COPY.replace("[%rd2], 4", "[%rd2+4], 4", 1), "4 bytes past argument x")


def test_matrices_are_watched_too() -> None:
    code = (
        "shl.b32 %r4, %r1, 4; st.shared.v4.b32 [%r4], {%r1, %r1, %r1, %r1}; bar.sync 0; xor.b32 %r5, %r4, 512;"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r5];"
    )
    both(code, code.replace("bar.sync 0;", ""), "race: read of a shared byte that another thread wrote", shared=1024)
    caught(code.replace("[%r5]", "[%r5+8]"), "misaligned shared access of 16 bytes", shared=2048)


# ------------------------------------------------------------------------------------------------------------- barriers


def test_barriers_that_not_all_threads_reach() -> None:
    code = "setp.lt.u32 %p1, %r1, {count}; @%p1 bra $on; {out}; $on: bar.sync 0;"
    both(
        code.format(count=64, out="ret"),
        code.format(count=32, out="ret"),
        "a barrier that not all threads reach.*\n.*'bar.sync 0'",
    )
    caught(code.format(count=31, out="ret"), "a barrier that not all threads reach")
    caught("setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;", "under a predicate that they disagree on")


def test_lanes_that_meet_at_different_barriers() -> None:
    code = "setp.lt.u32 %p1, %r1, {}; @%p1 bra $other; bar.sync 0; ret; $other: bar.sync 0;"
    run(code.format(32))  # warps may
    caught(code.format(31), "lanes of one warp meet at different barriers")


def test_shuffles_that_not_all_lanes_reach() -> None:
    code = "setp.lt.u32 %p1, %r1, {}; @%p1 bra $end; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; $end:"
    both(code.format(32), code.format(31), "an instruction for a whole warp that not all threads reach")
    caught("shfl.sync.bfly.b32 %r4, %r1, 1, 31, 255;", "a part of a warp is not known")


def test_loops_without_end(monkeypatch) -> None:
    from . import machine

    monkeypatch.setattr(machine, "MAX_STEPS", 1000)
    caught("$again: bra $again;", "no end after 1000 instructions")


def test_storages_at_the_addresses_of_the_host() -> None:
    """Each access finds its storage by address, and has to stay inside of it."""
    memory, arrays = Flat(), [np.arange(k, k + 8, dtype=np.uint32) for k in (10, 20)]
    places = [0x2000, 0x1000]
    for name, array, place in zip("ab", arrays, places, strict=True):
        memory.put(Window(name, Storage(array.view(np.uint8), is_input=name == "a"), 0, 32), place)
    memory.begin()
    cta = np.zeros(2, np.int32)
    got = memory.load(np.array([0x2004, 0x1008]), 4, 1, cta)
    assert got[:, 0].tolist() == [11, 22]
    memory.store(np.array([0x1000]), np.array([[7]], np.uint32), cta[:1])
    assert arrays[1][0] == 7
    for address, what in ((0x2020, "4 bytes past argument a"), (0x1FFC, "bytes past argument b"), (0xFFC, "outside of every")):
        with pytest.raises(AccessError, match=what):
            memory.load(np.array([address]), 4, 1, cta[:1])
    with pytest.raises(AccessError, match="write to the input a"):
        memory.store(np.array([0x2000]), np.array([[7]], np.uint32), cta[:1])
