from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn import reference
from cellattn.kernels import attention as kernels
from cellattn.kernels import config, tensors
from cellattn.kernels.attention import attention, attention_backward
from cellattn.ops._dropout import multiplier

from ..bounds import Bounded, assert_attention_gradients, assert_within, with_bounds

# bfloat16 is not here: Triton's interpreter computes it wrong without a word.
DTYPES = [torch.float32, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# (leading, Tq, Tk, D, Dv)
SHAPES = [
    ((), 1, 1, 1, 1),
    ((2,), 63, 129, 8, 20),
    ((2, 1), 129, 63, 20, 8),
    ((1, 2), 64, 64, 64, 64),
    ((), 5, 1000, 100, 3),
    ((), 129, 1, 128, 128),
    ((3,), 77, 77, 20, 20),
    ((), 33, 70, 256, 200),
    ((2, 3, 2), 3, 20, 7, 16),
]
ids = ["x".join(map(str, lead)) + f"-Tq{tq}-Tk{tk}-D{d}-Dv{dv}" for lead, tq, tk, d, dv in SHAPES]
shapes = pytest.mark.parametrize(("lead", "tq", "tk", "d", "dv"), SHAPES, ids=ids)


@pytest.fixture(autouse=True)
def _poisoned(poison) -> None:
    poison(kernels)
    poison(tensors)


def draw(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]


def expected(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dout: Tensor | None, dlse: Tensor | None, *drawn: Any
) -> list[Bounded]:
    """out, lse, dq, dk, dv of the dense definition in float64."""
    any_key = torch.ones(()).bool() if mask is None else mask.any(-1)[..., None]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        lse = reference.attention_logsumexp(q, k, key_mask=mask, scale=scale)
        if drawn:
            p = (scale * q @ k.mT).softmax(-1)
            return (p * multiplier(drawn[0], drawn[1], torch.empty(p.shape, dtype=torch.float64))) @ v, lse
        if mask is None:
            return reference.attention(q, k, v, scale=scale)[0], lse
        scores = (scale * q @ k.mT).masked_fill(~mask.unsqueeze(-2), -torch.inf)
        return (torch.where(any_key[..., None], scores, 0).softmax(-1) * any_key[..., None]) @ v, lse

    return with_bounds(dense, (q, k, v), (dout, None if dlse is None else torch.where(any_key, dlse, 0)))


def assert_close(got: list[Tensor], want: list[Bounded], dtype: torch.dtype) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert a.is_contiguous(), name
        assert a.dtype == (torch.float32 if name == "lse" else dtype), name
        assert_within(a, b, name)


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dout: Tensor | None, dlse: Tensor | None, *drawn: Any
) -> list[Tensor]:
    out, lse = attention(q, k, v, mask, scale, *drawn)
    grads = attention_backward(dout, dlse, q, k, v, mask, out, lse, scale, *drawn)
    got = [out, lse, *grads]
    assert_close(got, expected(q, k, v, mask, scale, dout, dlse, *drawn), q.dtype)
    return got


def problem(lead: tuple[int, ...], tq: int, tk: int, d: int, dv: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, dout, dlse"""
    *qkvo, dlse = draw((*lead, tq, d), (*lead, tk, d), (*lead, tk, dv), (*lead, tq, dv), (*lead, tq), dtype=torch.float32)
    return *(x.to(dtype) for x in qkvo), dlse


@dtypes
@shapes
def test_both_gradients(lead, tq, tk, d, dv, dtype) -> None:
    q, k, v, dout, dlse = problem(lead, tq, tk, d, dv, dtype)
    check(q, k, v, None, d**-0.5, dout, dlse)


@dtypes
@pytest.mark.parametrize("with_values", [True, False], ids=["values", "lse only"])
def test_lse_gradient_alone_leaves_v_exactly_zero(with_values, dtype) -> None:
    q, k, v, _, dlse = problem((2,), 63, 129, 20, 20 if with_values else 0, dtype)
    *_, dv = check(q, k, v, None, 0.3, None, dlse)
    assert torch.equal(dv, torch.zeros_like(v))


@dtypes
def test_out_gradient_alone(dtype) -> None:
    q, k, v, dout, _ = problem((2,), 63, 129, 20, 20, dtype)
    check(q, k, v, None, 0.3, dout, None)


@dtypes
def test_no_gradient_at_all(dtype) -> None:
    q, k, v, _, _ = problem((2,), 3, 5, 20, 20, dtype)
    out, lse = attention(q, k, v, None, 0.3)
    for x, dx in zip((q, k, v), attention_backward(None, None, q, k, v, None, out, lse, 0.3), strict=True):
        assert torch.equal(dx, torch.zeros_like(x))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-40, 3.0])
@pytest.mark.parametrize("masked", [False, True], ids=["every key", "masked"])
def test_any_scale(scale: float, masked: bool) -> None:
    q, k, v, dout, dlse = problem((), 33, 70, 8, 8, torch.float32)
    check(q, k, v, torch.arange(70) % 3 > 0 if masked else None, scale, dout, dlse)


@dtypes
@pytest.mark.parametrize("shape", [(70,), (3, 70), (1, 70), (2, 1, 70), (2, 3, 70)], ids=str)
def test_key_mask(shape: tuple[int, ...], dtype) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    q, k, v, dout, dlse = problem((2, 3), 20, 70, 8, 5, dtype)
    check(q, k, v, mask, 0.3, dout, dlse)


@dtypes
def test_rows_without_a_key(dtype) -> None:
    """lse = -inf, out = 0 and no gradient, also where the dropped keys' scores would overflow."""
    q, k, v, dout, dlse = problem((3,), 20, 200, 8, 5, dtype)
    k[:, ::2] *= 1e4
    mask = torch.stack([torch.zeros(200).bool(), torch.arange(200) == 7, torch.arange(200) % 2 == 1])
    out, lse, dq, dk, dv = check(q, k, v, mask, 0.3, dout, dlse)
    assert (lse[0] == -torch.inf).all()
    assert not any(x[0].any() for x in (out, dq, dk, dv))


@dtypes
@pytest.mark.parametrize(("tq", "tk"), [(1, 1500), (28, 1100), (1100, 20)], ids=["one query", "few queries", "few keys"])
@pytest.mark.parametrize("masked", [False, True], ids=["every key", "masked"])
def test_loops_cut_into_parts(tq, tk, masked, dtype) -> None:
    tile = config.tile_for("attention_fwd", 80, dtype, 32)
    assert config.parts_for(1, max(tq, tk), tile.BN, torch.device("cpu"))[0] > 1
    q, k, v, dout, dlse = problem((), tq, tk, 20, 20, dtype)
    mask = None
    if masked:  # whole parts without a key
        mask = torch.arange(tk) % 5 == 0
        mask[: tk // 2] = False
    check(q, k, v, mask, 0.3, dout, dlse)


DRAW = torch.tensor([2**63 - 5, -(2**40) + 7])


@dtypes
@pytest.mark.parametrize("shape", [0, 1, 2, 5, 8], ids=lambda i: ids[i])
def test_dropout(shape: int, dtype) -> None:
    lead, tq, tk, d, dv = SHAPES[shape]
    q, k, v, dout, dlse = problem(lead, tq, tk, d, dv, dtype)
    check(q, k, v, None, d**-0.5, dout, dlse, DRAW, 6554)


@dtypes
def test_dropout_of_almost_all(dtype) -> None:
    """Multiplied by 2^16, which float16 has not: what is left has to fit, not what it is made of."""
    q, k, v, dout, dlse = problem((2,), 20, 20, 8, 8, dtype)
    check(q, k, v / 8, None, 0.3, dout / 8, dlse, DRAW, 65535)


@dtypes
@pytest.mark.parametrize(("tq", "tk"), [(28, 1100), (1100, 20)], ids=["few queries", "few keys"])
def test_dropout_of_parts(tq, tk, dtype) -> None:
    q, k, v, dout, dlse = problem((), tq, tk, 20, 20, dtype)
    check(q, k, v, None, 0.3, dout, dlse, DRAW, 20_000)


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (64, 32), (16, 64), (64, 128)])
def test_dropped_entries_are_those_of_the_definition_in_any_tile(queries: int, keys: int, monkeypatch) -> None:
    """Read off the forward with an identity for values, off dq with one for keys, and off dv with one for dout."""
    tile = config.Tile(queries, keys, 4, 1)
    monkeypatch.setattr(config, "tile_for", lambda *_, **__: tile)
    lead, n = (2,), 140
    zero, one = torch.zeros(*lead, n, n), torch.eye(n).expand(*lead, n, n)
    want = multiplier(DRAW, 20_000, torch.empty(*lead, n, n, dtype=torch.float64)) != 0
    out, lse = attention(zero, zero, one, None, 1.0, DRAW, 20_000)
    assert torch.equal(out != 0, want)
    dv = attention_backward(one, None, zero, zero, zero, None, zero, lse, 1.0, DRAW, 20_000)[2]
    assert torch.equal(dv.mT != 0, want)
    everywhere = torch.ones(*lead, n, 1)  # dP = Z, of which delta = 0 takes nothing
    dq, _, _ = attention_backward(everywhere, None, zero, one, everywhere, None, zero[..., :1], lse, 1.0, DRAW, 20_000)
    assert torch.equal(dq != 0, want)
    _, dk, _ = attention_backward(everywhere, None, one, zero, everywhere, None, zero[..., :1], lse, 1.0, DRAW, 20_000)
    assert torch.equal(dk.mT != 0, want)


def test_dropout_leaves_lse_and_its_gradient_as_they_are() -> None:
    q, k, v, dout, dlse = problem((2,), 63, 129, 20, 20, torch.float16)
    (_, lse), (_, whole) = attention(q, k, v, None, 0.3, DRAW, 20_000), attention(q, k, v, None, 0.3)
    assert torch.equal(lse, whole)
    with_, without = (attention_backward(None, dlse, q, k, v, None, dout, lse, 0.3, *drawn) for drawn in ((DRAW, 20_000), ()))
    assert all(torch.equal(a, b) for a, b in zip(with_, without, strict=True))


@pytest.mark.parametrize("programs", [1, 53, 107, 108, 5000])
@pytest.mark.parametrize("length", [1, 64, 255, 256, 6607, 100_000])
def test_parts_cover_the_loop(programs: int, length: int) -> None:
    parts, part = config.parts_for(programs, length, 64, torch.device("cpu"))
    assert (parts - 1) * part < length <= parts * part
    assert parts == 1 or part % 64 == 0


@dtypes
def test_strided_inputs(dtype) -> None:
    """Heads of a fused projection, an expanded gradient, a transposed key."""
    (x,) = draw((2, 40, 3, 4, 24), dtype=dtype)  # batch, tokens, (q, k, v), heads, D
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
    dout = torch.ones((), dtype=dtype).expand(q.shape)
    check(q, k.mT.contiguous().mT, v, None, 0.3, dout, torch.ones(()).expand(2, 4, 40))


@dtypes
def test_misaligned_heads(dtype) -> None:
    (x,) = draw((2, 40, 3, 3, 7), dtype=dtype)
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
    check(q, k, v, None, 0.3, v, None)


@dtypes
def test_no_queries(dtype) -> None:
    q, k, v, dout, dlse = problem((2,), 0, 5, 8, 3, dtype)
    out, lse, *grads = check(q, k, v, None, 0.3, dout, dlse)
    assert (out.shape, lse.shape) == ((2, 0, 3), (2, 0))
    assert not any(g.any() for g in grads)


def test_runs_are_bit_equal() -> None:
    q, k, v, dout, dlse = problem((2,), 20, 1100, 20, 20, torch.float16)
    first, second = (check(q, k, v, None, 0.3, dout, dlse) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unused_lse_changes_no_bit() -> None:
    q, k, v, dout, dlse = problem((2,), 20, 130, 20, 20, torch.float32)
    without, zero = (check(q, k, v, None, 0.3, dout, g) for g in (None, torch.zeros_like(dlse)))
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dout: Tensor, dlse: Tensor, *drawn: Any
) -> list[Tensor]:
    """out, lse, dq, dk, dv of softmax(scale q kᵀ) v in float64, NaN and infinities where they come out."""
    q, k, v, dout, dlse = (x.double() for x in (q, k, v, dout, dlse))
    keep = torch.ones(k.shape[:-1]).bool() if mask is None else mask.expand(k.shape[:-1])
    k, v = (x.masked_fill(~keep[..., None], 0) for x in (k, v))
    scores = (scale * q @ k.mT).masked_fill(~keep[..., None, :], -torch.inf)
    p = scores.softmax(-1)
    z = multiplier(drawn[0], drawn[1], p) if drawn else torch.ones(())
    out, lse = (p * z) @ v, scores.logsumexp(-1)
    dp = (dout @ v.mT) * z
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True) + dlse[..., None])
    ds, p = (x.masked_fill(~keep[..., None, :], 0) for x in (ds, p * z))
    dq, dk, dv = ds @ k, (ds.mT @ q).masked_fill(~keep[..., None], 0), (p.mT @ dout).masked_fill(~keep[..., None], 0)
    if mask is not None:  # no function gives out beside a mask
        out = out.masked_fill((lse == -torch.inf)[..., None], 0)
    return [out, lse, dq, dk, dv]


def _special(name: str, lead: tuple[int, ...], tq: int, tk: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """q, k, v, mask, dout, dlse with NaN or infinities in the second row or key."""
    q, k, v, dout, dlse = problem(lead, tq, tk, 8, 5, dtype)
    mask: Any = None
    row, key = (..., min(1, tq - 1), slice(None)), (..., min(1, tk - 1), slice(None))
    first, of_key = (*row[:2], 0), (*key[:2], 0)
    if name.startswith("masked"):
        mask = torch.arange(tk) % 3 != min(1, tk - 1) % 3
    if name.endswith("NaN query"):
        q[row] = torch.nan
    elif name.endswith("NaN key"):
        k[key] = torch.nan
    elif name == "masked NaN and inf":
        k[..., ~mask, :], v[..., ~mask, :] = torch.nan, torch.inf
    elif name.endswith("score of +inf"):
        k[..., 0] = -k[..., 0].abs()
        k[of_key] = 2
        q[first] = torch.inf  # -inf for other keys
    elif name.endswith("scores of -inf"):
        k[..., 0] = k[..., 0].abs() + 0.1
        q[first] = -torch.inf
    elif name == "half of the scores -inf":  # and the others +inf
        q[first] = torch.inf
    elif name == "an infinite key":  # -inf in rows below 0, +inf in those above
        k[of_key] = torch.inf
    elif name == "NaN value":
        v[of_key] = torch.nan
    elif name == "infinite value":
        v[of_key] = torch.inf
    elif name == "NaN from above":
        dout[row], dlse[row[:2]] = torch.nan, torch.nan
    elif name == "masked all, NaN from above":
        mask = torch.zeros(tk).bool()
        dout[row], dlse[row[:2]] = torch.nan, torch.nan
    return q, k, v, mask, dout, dlse


SPECIAL = [
    "NaN query", "NaN key", "score of +inf", "scores of -inf", "half of the scores -inf", "an infinite key", "NaN value",
    "infinite value", "NaN from above", "masked NaN query", "masked NaN and inf", "masked score of +inf",
    "masked scores of -inf", "masked all, NaN from above",
]  # fmt: skip


@dtypes
@pytest.mark.parametrize(("lead", "tq", "tk"), [((2,), 40, 70), ((), 3, 1100)], ids=["tiles", "parts"])
@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        *((name, ()) for name in SPECIAL),
        *(
            pytest.param(name, (DRAW, 32_768), marks=pytest.mark.exhaustive)
            for name in SPECIAL
            if not name.startswith("masked")
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "dropout" if x else "",
)
def test_nan_and_infinities(name: str, drawn: Any, lead: tuple[int, ...], tq: int, tk: int, dtype) -> None:
    """As the table in `cellattn/ops/attention.py` has them: where the dense formula has them, and nowhere else."""
    q, k, v, mask, dout, dlse = _special(name, lead, tq, tk, dtype)
    out, lse = attention(q, k, v, mask, 0.3, *drawn)
    got = [out, lse, *attention_backward(dout, dlse, q, k, v, mask, out, lse, 0.3, *drawn)]
    want = dense(q, k, v, mask, 0.3, dout, dlse, *drawn)
    for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(a), kind(b)), (
                f"{what}: {kind.__name__} {kind(a).nonzero()[:4]}, expected {kind(b).nonzero()[:4]}"
            )
        # The rest is untouched; how exact it is, is the matter of the tests above.
        near, expected_near = (torch.where(b.isfinite(), x, 0) for x in (a.double(), b))
        largest = max(float(expected_near.abs().max()), 1.0)
        torch.testing.assert_close(near, expected_near, rtol=0, atol=largest * (1e-4 if dtype == torch.float32 else 1e-2))


def test_large_scores_stay_finite() -> None:
    q, k, v, dout, dlse = problem((), 40, 150, 8, 8, torch.float32)
    out, lse = attention(100 * q, 100 * k, v, None, 1.0)
    assert (lse > 1e4).any()
    for x in (out, lse, *attention_backward(dout, dlse, 100 * q, 100 * k, v, None, out, lse, 1.0)):
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "q: expected dtype float16 or bfloat16 or float32"),
        ({"d": 257}, "q: expected at most 256 features"),
        ({"dv": 300}, "v: expected at most 256 features"),
    ],
    ids=["float64", "wide heads", "wide values"],
)
def test_refused_before_any_launch(change, message) -> None:
    shape = {"d": 8, "dv": 8, "dtype": torch.float32} | change
    q, k, v = draw((4, shape["d"]), (5, shape["d"]), (5, shape["dv"]), dtype=shape["dtype"])
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, None, 1.0)


def test_mixed_devices_and_dtypes_are_refused(monkeypatch) -> None:
    q, k, v = draw((4, 8), (5, 8), (5, 8), dtype=torch.float32)
    out, lse = attention(q, k, v, None, 1.0)
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: pytest.fail("a kernel was launched"))
    monkeypatch.setattr(kernels, "options", lambda *_: pytest.fail("a kernel was launched"))
    for other, message in ((k.to("meta"), "k: expected the device of q"), (k.half(), "k: expected the dtype of q")):
        with pytest.raises(ValueError, match=message):
            attention(q, other, v, None, 1.0)
        with pytest.raises(ValueError, match=message):
            attention_backward(out, lse, q, other, v, None, out, lse, 1.0)
    with pytest.raises(ValueError, match="dout: expected the device of q"):
        attention_backward(out.to("meta"), lse, q, k, v, None, out, lse, 1.0)


def test_autotune_keeps_the_fastest_and_prints_it(monkeypatch, capsys) -> None:
    q, k, v, _, _ = problem((), 70, 70, 8, 8, torch.float16)
    slow = config.tile_for("attention_fwd", 80, torch.float16, 16)
    fast = slow.neighbours[3]
    monkeypatch.setenv("CELLATTN_AUTOTUNE", "1")
    monkeypatch.setattr(config, "_tuned", {})
    monkeypatch.setattr(config, "milliseconds", lambda launch, tile: 1.0 if tile == fast else 2.0)
    out, _ = attention(q, k, v, None, 0.3)
    assert config._tuned == {("attention_fwd", 80, torch.float16, 16, False): fast}
    assert f"16: {fast!r}," in capsys.readouterr().out
    torch.testing.assert_close(
        out, reference.attention(q.double(), k.double(), v.double(), scale=0.3)[0].half(), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "size"),
    [
        *(("every key", torch.float32, size) for size in (1e3, 1e4, 1e5, 1e6, 1e8, 1e10)),
        *(("every key", torch.float16, size) for size in (1e4, 1e7)),
        *(("masked", torch.float32, size) for size in (1e3, 1e4)),
        ("dropout", torch.float32, 1e6),
        ("dropout", torch.float16, 1e5),
    ],
    ids=str,
)
def test_large_scores(kind: str, dtype: torch.dtype, size: float) -> None:
    """Of two queries in three; those of the others are small. Gradients are those of scores in float64."""
    (b, h, tq, tk, d, dv), scale = (1, 2, 37, 70, 8, 6), 0.3
    q, k, v, dout, dlse = problem((b, h), tq, tk, d, dv, dtype)
    q, k = ((x.double() * size**0.5).to(dtype) for x in (q, k))
    q[..., ::3, :] = (q[..., ::3, :].double() / size).to(dtype)
    mask, multiplied = None, torch.ones((), dtype=torch.float64)
    drawn: tuple[Any, ...] = ()
    if kind == "masked":
        mask = torch.arange(tk) % torch.tensor([3, 2])[:, None] > 0
        mask[1] &= torch.arange(tk) > 60
        k[..., 0, :] = torch.nan  # left out by both
    elif kind == "dropout":
        drawn = torch.tensor([5, 9]), 6554
        multiplied = multiplier(torch.tensor([5, 9]), 6554, torch.empty(b, h, tq, tk, dtype=torch.float64))
    out, lse = attention(q, k, v, mask, scale, *drawn)
    got = attention_backward(dout, dlse, q, k, v, mask, out, lse, scale, *drawn)
    assert (lse.abs() > 1e3 * size / 1e4).any(), "no row has a large score"
    assert_attention_gradients(got, q, k.nan_to_num(), v, dout, dlse, scale, mask, multiplied)


def test_an_infinite_gradient_of_lse_in_rows_of_large_scores() -> None:
    """Infinite where float64 has infinities, and NaN nowhere: every P is positive."""
    q, k, v, dout, dlse = problem((), 8, 12, 8, 6, torch.float32)
    q[:, 0], k[:, 0] = 100, 130
    dlse[3] = torch.inf
    out, lse = attention(q, k, v, None, 0.3)
    assert (lse.abs() > 1e3).all()
    got = attention_backward(dout, dlse, q, k, v, None, out, lse, 0.3)
    given = [x.double().requires_grad_() for x in (q, k, v)]
    s = 0.3 * given[0] @ given[1].mT
    want = torch.autograd.grad((s.softmax(-1) @ given[2], s.logsumexp(-1)), given, (dout.double(), dlse.double()))
    for name, a, b in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert a.isnan().equal(b.isnan()), name
        assert a.isinf().equal(b.isinf()), name


def test_large_scores_without_values() -> None:
    q, k, v, dout, dlse = problem((), 45, 70, 8, 6, torch.float32)
    q, k = 1e3 * q, 1e3 * k
    _, lse = attention(q, k, v[:, :0], None, 0.3)
    dq, dk, _ = attention_backward(None, dlse, q, k, v[:, :0], None, v.new_empty(45, 0), lse, 0.3)
    dv = torch.zeros_like(v)
    assert_attention_gradients((dq, dk, dv), q, k, v, torch.zeros_like(dout), dlse, 0.3)
