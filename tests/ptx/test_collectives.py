"""What the lanes of a warp do together, on values worked out by hand and on dense products."""

from __future__ import annotations

import numpy as np
import pytest

from . import numbers
from .harness import entry, lanes, launch

U16, U32, S32, F32, PRED = np.uint16, np.uint32, np.int32, np.float32, np.bool_
LANES = (U32, np.arange(32))


@pytest.mark.parametrize(
    ("mode", "b", "c", "source", "inside"),
    [
        ("bfly", 1, 31, lambda t: t ^ 1, lambda t: True),
        ("idx", 5, 31, lambda t: 5, lambda t: True),
        ("up", 3, 0, lambda t: t - 3, lambda t: t >= 3),
        ("down", 3, 31, lambda t: t + 3, lambda t: t < 29),
        ("idx", 2, 0x181F, lambda t: t // 8 * 8 + 2, lambda t: True),  # within 8 lanes
        ("up", 1, 0x1800, lambda t: t - 1, lambda t: t % 8 != 0),
        ("down", 1, 0x181F, lambda t: t + 1, lambda t: t % 8 != 7),
        ("idx", 9, 7, lambda t: 9, lambda t: False),  # past the clamp
    ],
)
def test_shuffles(mode, b, c, source, inside) -> None:
    a = np.arange(100, 132)
    d, p = lanes(f"shfl.sync.{mode}.b32 d|p, a, {b}, {c}, -1;", {"d": U32, "p": PRED}, a=(U32, a))
    assert p.tolist() == [inside(t) for t in range(32)]
    assert d.tolist() == [100 + source(t) if inside(t) else 100 + t for t in range(32)]


def test_votes() -> None:
    code = (
        "setp.lt.u32 %p1, a, 3; setp.lt.u32 %p2, a, 32; setp.gt.u32 %p3, a, 40; vote.sync.ballot.b32 d, %p1, -1;"
        "vote.sync.any.pred p, %p1, -1; vote.sync.all.pred q, %p1, -1; vote.sync.all.pred r, %p2, -1;"
        "vote.sync.uni.pred s, %p3, -1; vote.sync.any.pred t, !%p2, -1;"
    )
    results = {"d": U32, "p": PRED, "q": PRED, "r": PRED, "s": PRED, "t": PRED}
    found = [x[0] for x in lanes(code, results, a=LANES)]
    assert found == [7, True, False, True, True, False]


@pytest.mark.parametrize(
    ("code", "dtype", "result"),
    [
        ("add.s32", S32, sum(range(-16, 16))),
        ("max.s32", S32, 15),
        ("min.s32", S32, -16),
        ("max.u32", U32, 2**32 - 1),
        ("or.b32", U32, 2**32 - 1),
        ("and.b32", U32, 0),
        ("xor.b32", U32, 0),
    ],
)
def test_reductions(code, dtype, result) -> None:
    a = np.arange(-16, 16, dtype=S32).view(U32)
    assert lanes(f"redux.sync.{code} d, a, -1;", {"d": dtype}, a=(U32, a)).tolist() == [result] * 32


def test_special_registers() -> None:
    d = np.zeros((6, 96, 4), U32)
    code = (
        "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %laneid;"
        "mov.u32 %r6, %ntid.x; mad.lo.s32 %r7, %r3, %r4, %r2; mad.lo.s32 %r7, %r7, %r6, %r1; mad.wide.u32 %rd1, %r7, 16, d;"
        "st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r5};"
    )
    launch(entry(code, ["d"], threads=96), {"d": d}, grid=(3, 2, 1))
    at = np.arange(6)[:, None]
    assert (d[:, :, 0] == np.arange(96)).all()
    assert (d[:, :, 1] == at % 3).all()
    assert (d[:, :, 2] == at // 3).all()
    assert (d[:, :, 3] == np.arange(96) % 32).all()
    masks = lanes(
        "mov.u32 a, %lanemask_lt; mov.u32 b, %lanemask_le; mov.u32 c, %lanemask_eq; mov.u32 d, %lanemask_ge;"
        "mov.u32 e, %lanemask_gt;",
        dict.fromkeys("abcde", U32),
    )
    assert [int(x[31]) for x in masks] == [2**31 - 1, 2**32 - 1, 2**31, 2**31, 0]
    assert [int(x[0]) for x in masks] == [0, 1, 1, 2**32 - 1, 2**32 - 2]


# ------------------------------------------------------------------------------------------------------------ matrices


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True], ids=["rows", "columns"])
def test_matrices_are_loaded_in_fragments(count: int, trans: bool) -> None:
    """Matrix k, row r, column c holds 64 k + 8 r + c; lane l has row l / 4, columns 2 (l % 4) and the next."""
    x, d = np.arange(256, dtype=U16), np.zeros((count, 32, 2), U16)
    names = ", ".join(f"%r{10 + k}" for k in range(count))
    code = (
        "mov.u32 %r1, %tid.x; mad.wide.u32 %rd1, %r1, 16, x; shl.b32 %r2, %r1, 4;"
        "ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1]; st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6}; bar.sync 0;"
        f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16 {{{names}}}, [%r2];"
        "mad.wide.u32 %rd2, %r1, 4, d;"
    ) + "".join(f"st.global.b32 [%rd2+{128 * k}], %r{10 + k};" for k in range(count))
    launch(entry(code, ["x", "d"]), {"x": x, "d": d}, shared=512)
    for k in range(count):
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            want = [64 * k + 8 * row + c if not trans else 64 * k + 8 * c + row for c in (column, column + 1)]
            assert d[k, lane].tolist() == want


@pytest.mark.parametrize("trans", [False, True], ids=["rows", "columns"])
def test_matrices_are_stored_from_fragments(trans: bool) -> None:
    d = np.zeros((4, 8, 8), U16)
    t = ".trans" if trans else ""
    code = (
        "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4;"
        + "".join(f"mul.lo.s32 %r9, %r1, 2; add.s32 %r9, %r9, {64 * k}; shl.b32 %r8, %r9, 16; add.s32 %r8, %r8, 65536;"
                  f"or.b32 %r{10 + k}, %r9, %r8;" for k in range(4))
        + f"stmatrix.sync.aligned.m8n8.x4{t}.shared.b16 [%r2], {{%r10, %r11, %r12, %r13}}; bar.sync 0;"
        "ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2]; mad.wide.u32 %rd1, %r1, 16, d;"
        "st.global.v4.b32 [%rd1], {%r3, %r4, %r5, %r6};"
    )  # fmt: skip
    launch(entry(code, ["d"]), {"d": d}, shared=512)
    want = np.arange(256).reshape(4, 8, 8)
    assert (d == (want.transpose(0, 2, 1) if trans else want)).all()


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_products_of_fragments(kind: str) -> None:
    """The fragments' places as the ISA's figures give them, lane by lane."""
    rng = np.random.default_rng(0)
    depth, per = (8, 1) if kind == "tf32" else (16, 2)
    A, B = (rng.integers(-8, 9, shape).astype(F32) for shape in ((16, depth), (depth, 8)))  # exact in every kind
    C = rng.standard_normal((16, 8)).astype(F32)

    def word(values: list[float]) -> int:
        x = np.asarray(values, F32)
        if kind == "tf32":
            return int(x.view(U32)[0]) | 0x1FFF  # bits that are not read
        bits = numbers.bfloat16_bits(x) if kind == "bf16" else numbers.float16_bits(x)
        return int(bits[0]) | int(bits[1]) << 16

    sources: dict[str, tuple] = {}
    for k in range(4):
        row, column = 8 * (k % 2), (4 if per == 1 else 8) * (k // 2)
        sources[f"a{k}"] = (U32, [word(list(A[row + t // 4, column + per * (t % 4) :][:per])) for t in range(32)])
    for k in range(2):
        row = (4 if per == 1 else 8) * k
        sources[f"b{k}"] = (U32, [word(list(B[row + per * (t % 4) :, t // 4][:per])) for t in range(32)])
    for k in range(4):
        sources[f"c{k}"] = (F32, [C[8 * (k // 2) + t // 4, t % 4 * 2 + k % 2] for t in range(32)])
    types = f"m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    code = f"mma.sync.aligned.{types} {{d0, d1, d2, d3}}, {{a0, a1, a2, a3}}, {{b0, b1}}, {{c0, c1, c2, c3}};"
    got = lanes(code, {f"d{k}": F32 for k in range(4)}, **sources)
    want = A.astype(np.float64) @ B + C
    for k in range(4):
        for t in range(32):
            assert got[k][t] == F32(want[8 * (k // 2) + t // 4, t % 4 * 2 + k % 2])
