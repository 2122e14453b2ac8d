"""sm_90: products of a warpgroup, by descriptor and by register, and what must lie around them."""

from __future__ import annotations

import numpy as np
import pytest

from . import numbers
from .harness import entry, launch
from .machine import Fault

F32, U16, U32 = np.float32, np.uint16, np.uint32
CODE = {0: 0, 128: 1, 64: 2, 32: 3}  # of a swizzle in the descriptor


def placed(matrix: np.ndarray, swizzle: int, by_rows: bool) -> tuple[np.ndarray, int]:
    """A matrix [rows, 16] of bfloat16 bits laid out in shared memory, and its descriptor without a start.

    Written element by element: rows of `swizzle` bytes in patterns of eight, in which the pieces of 16 bytes of a row change
    places by the number of the 128 bytes they lie in.
    """
    rows, depth = matrix.shape
    width = swizzle or 16
    if by_rows:
        leading, stride = (0, 8 * width) if swizzle else (8 * 16 * rows // 8, 8 * 16)
    elif swizzle:
        stride = 8 * width  # to the next 8 of k
        leading = 2 * stride  # to the next rows
    else:
        leading, stride = 128, 256
    data = np.zeros(1 << 13, U16)
    for r in range(rows):
        for k in range(depth):
            if by_rows:
                at = r // 8 * stride + r % 8 * width + (2 * k if swizzle else k // 8 * leading + 2 * (k % 8))
            else:
                a_row = width // 2
                at = k // 8 * (stride if swizzle else leading) + r // a_row * (leading if swizzle else stride)
                at += k % 8 * width + r % a_row * 2
            piece, line = at // 16, at // 128
            if swizzle:
                piece ^= line % (swizzle // 16)
            data[piece * 8 + at % 16 // 2] = matrix[r, k]
    return data, leading >> 4 << 16 | stride >> 4 << 32 | CODE[swizzle] << 62


BODY = """
    mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; mad.wide.u32 %rd1, %r1, 16, x;
    {copies}
    {zero}
    bar.sync 0;
    fence.proxy.async.shared::cta;
    mov.b64 %rd10, {a}; mov.b64 %rd11, {b}; mov.b32 %r100, {ones}; mov.b32 %r101, 0; mov.b32 %r102, {ones}; mov.b32 %r103, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{d}}}, {left}, %rd11, {keep}, 1, 1, {trans};
    wgmma.commit_group.sync.aligned;
    {between}
    wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %rd2, %r1, {bytes}, d;
    {stores}
"""


def kernel(
    n: int, a: int, b: int, *, trans: tuple[int, ...] = (0, 0), keep: int = 0, between: str = "", from_registers: bool = False,
    pieces: int = 16, changed: tuple[str, str] | None = None,
):  # fmt: skip
    names = [f"%r{10 + k}" for k in range(n // 2)]
    text = BODY.format(
        copies="\n".join(
            f"ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd1+{2048 * k}];"
            f"st.shared.v4.b32 [%r2+{2048 * k}], {{%r3, %r4, %r5, %r6}};"
            for k in range(pieces)
        ),
        zero=" ".join(f"mov.b32 {name}, 0f40000000;" for name in names),
        a=a, b=b, n=n, d=", ".join(names), keep=keep, between=between, ones=0x3F803F80,
        left="{%r100, %r101, %r102, %r103}" if from_registers else "%rd10",
        trans=", ".join(map(str, trans)), bytes=4 * len(names),
        stores=" ".join(f"st.global.b32 [%rd2+{4 * k}], {name};" for k, name in enumerate(names)),
    )  # fmt: skip
    if changed is not None:
        assert changed[0] in text
        text = text.replace(*changed)
    return entry(text, ["x", "d"], threads=128)


def result(d: np.ndarray, n: int) -> np.ndarray:
    """[64, n]: warp w has rows 16 w to 16 w + 15.

    Register k of lane l is in row l / 4 + 8 (k / 2 % 2) of them, column 8 (k / 4) + 2 (l % 4) + k % 2.
    """
    out = np.zeros((64, n), F32)
    for thread in range(128):
        for k in range(n // 2):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (k // 2 % 2)
            out[row, 8 * (k // 4) + thread % 4 * 2 + k % 2] = d[thread, k]
    return out


def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.integers(-8, 9, (64, 16)).astype(F32), rng.integers(-8, 9, (n, 16)).astype(F32)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("major", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=["KK", "KN", "MK", "MN"])
@pytest.mark.parametrize("n", [8, 64, 128])
def test_products_by_descriptor(swizzle: int, major: tuple[int, int], n: int) -> None:
    if major[1] and swizzle // 2 > n:
        pytest.skip("fewer columns than a row of the pattern has")
    A, B = drawn(n)
    places = [placed(numbers.bfloat16_bits(x), swizzle, not t) for x, t in zip((A, B), major, strict=True)]
    x = np.concatenate([data for data, _ in places])
    a, b = places[0][1], places[1][1] | (1 << 14) >> 4
    d = np.zeros((128, n // 2), F32)
    launch(kernel(n, a, b, trans=major), {"x": x, "d": d}, shared=1 << 15)
    assert (result(d, n) == A @ B.T).all()
    launch(kernel(n, a, b, trans=major, keep=1), {"x": x, "d": d}, shared=1 << 15)
    assert (result(d, n) == A @ B.T + 2).all()


def test_a_start_inside_of_the_pattern() -> None:
    """The second 16 of k begin 32 bytes on; pieces change places by their address, not by the distance from the start."""
    rng = np.random.default_rng(0)
    whole = rng.integers(-8, 9, (64, 64)).astype(F32)
    data = np.zeros(1 << 14, U16)
    for r in range(64):
        for k in range(64):
            at = r // 8 * 1024 + r % 8 * 128 + 2 * k
            data[(at // 16 ^ r % 8) * 8 + k % 8] = numbers.bfloat16_bits(whole[r, k])
    d = np.zeros((128, 32), F32)
    for step in range(4):
        descriptor = (32 * step) >> 4 | 1024 >> 4 << 32 | 1 << 62
        launch(kernel(64, descriptor, descriptor), {"x": data, "d": d}, shared=1 << 15)
        part = whole[:, 16 * step : 16 * step + 16]
        assert (result(d, 64) == part @ part.T).all()


def test_products_with_a_matrix_in_registers() -> None:
    """Ones in rows g of the first and second half of k, zeros in rows g + 8."""
    _, B = drawn(8)
    data, b = placed(numbers.bfloat16_bits(B), 0, True)
    d = np.zeros((128, 4), F32)
    launch(kernel(8, 0, b, trans=(0,), from_registers=True), {"x": np.resize(data, 1 << 14), "d": d}, shared=1 << 15)
    want = np.zeros((64, 8), F32)
    want[np.arange(64) % 16 < 8] = B.sum(1)
    assert (result(d, 8) == want).all()


def faulty(message: str, *, between: str = "", changed: tuple[str, str] | None = None, n: int = 8) -> None:
    A, B = drawn(n)
    places = [placed(numbers.bfloat16_bits(x), 0, True) for x in (A, B)]
    x, d = np.concatenate([data for data, _ in places]), np.zeros((128, n // 2), F32)
    program = kernel(n, places[0][1], places[1][1] | (1 << 14) >> 4, between=between, changed=changed)
    with pytest.raises(Fault, match=message):
        launch(program, {"x": x, "d": d}, shared=1 << 15)


def test_a_proxy_fence_that_is_missing() -> None:
    faulty("no fence.proxy.async after their write", changed=("fence.proxy.async.shared::cta;", ""))


def test_a_proxy_fence_that_comes_too_early() -> None:
    """Before the barrier it shows only the thread's own writes: of others it must come after, or they make it themselves."""
    swapped = (
        "bar.sync 0;\n    fence.proxy.async.shared::cta;",
        "setp.lt.u32 %p1, %r1, 1; @%p1 fence.proxy.async; bar.sync 0;",
    )
    faulty("no fence.proxy.async after their write", changed=swapped)
    A, B = drawn(8)
    places = [placed(numbers.bfloat16_bits(x), 0, True) for x in (A, B)]
    x, d = np.concatenate([data for data, _ in places]), np.zeros((128, 4), F32)
    each = ("bar.sync 0;\n    fence.proxy.async.shared::cta;", "fence.proxy.async; bar.sync 0;")
    program = kernel(8, places[0][1], places[1][1] | (1 << 14) >> 4, changed=each)
    launch(program, {"x": x, "d": d}, shared=1 << 15)
    assert (result(d, 8) == A @ B.T).all()


def test_a_barrier_that_is_missing() -> None:
    faulty("race: wgmma reads a shared byte that another thread wrote", changed=("bar.sync 0;", ""))


def test_registers_of_a_product_under_way() -> None:
    faulty("a register of a wgmma under way", between="add.f32 %r10, %r10, %r10;")
    faulty("a register of a wgmma under way", changed=("wgmma.wait_group.sync.aligned 0;", ""))
    faulty("a register of a wgmma under way", changed=("wgmma.commit_group.sync.aligned;", ""))
    faulty("a register of a wgmma under way", changed=("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"))


def parted(leaver: str, other: str) -> np.ndarray:
    """The first CTA goes another way, whose code runs while the other's product is under way, and ends there."""
    A, B = drawn(8)
    places = [placed(numbers.bfloat16_bits(x), 0, True) for x in (A, B)]
    x, d = np.concatenate([data for data, _ in places]), np.zeros((128, 4), F32)
    fence = "wgmma.fence.sync.aligned;"
    program = kernel(
        8, places[0][1], places[1][1] | (1 << 14) >> 4, between=f"bra.uni $IN;\n$OUT:\n{leaver} ret;\n$IN:\n{other}",
        changed=(fence, f"mov.u32 %r9, %ctaid.x; setp.eq.u32 %p1, %r9, 0; @%p1 bra $OUT; {fence}"),
    )  # fmt: skip
    launch(program, {"x": x, "d": d}, shared=1 << 15, grid=(2, 1, 1))
    assert (result(d, 8) == A @ B.T).all()
    return d


def test_products_of_ctas_that_part() -> None:
    """Each CTA has registers and groups of its own: what one touches, and waits for, is not the other's."""
    touch, wait = "add.f32 %r10, %r10, %r10;", "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    parted(touch, "")
    parted(touch + wait, "")
    with pytest.raises(Fault, match="a register of a wgmma under way"):
        parted(wait, touch)


def test_registers_written_after_the_fence() -> None:
    faulty("written after the last wgmma.fence", changed=("wgmma.fence.sync.aligned;", ""))
    faulty("written after the last wgmma.fence", changed=("wgmma.mma_async", "mov.b32 %r10, 0; wgmma.mma_async"))


def test_shared_bytes_of_a_product_under_way() -> None:
    faulty("write to shared bytes that a wgmma under way reads", between="st.shared.b32 [%r2], %r1;")
    late = "wgmma.wait_group.sync.aligned 0; st.shared.b32 [%r2], %r1;"
    faulty("race: write to a shared byte that another thread read", changed=("wgmma.wait_group.sync.aligned 0;", late))


def test_descriptors_that_point_outside() -> None:
    faulty("shared access outside", changed=("mov.b64 %rd10, ", "mov.b64 %rd10, 2047; mov.b64 %rd12, "))


def test_forms_that_are_not_known() -> None:
    from .parser import PtxError

    for text in ("m64n8k8.f32.tf32.tf32", "m64n12k16.f32.bf16.bf16", "m64n8k16.f16.f16.f16"):
        with pytest.raises(PtxError):
            kernel(8, 0, 0, changed=("m64n8k16.f32.bf16.bf16", text))
    with pytest.raises(PtxError, match="negated"):
        kernel(8, 0, 0, changed=(", 1, 1, 0, 0;", ", -1, 1, 0, 0;"))
