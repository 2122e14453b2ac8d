"""Dropout of the attention map: the same entries on every path, of the right rate, drawn anew a call, and gone at p = 0."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cellattn
from cellattn import nn as models
from cellattn import reference
from cellattn.ops._dropout import STEPS, multiplier, philox, threshold_of

from ..bounds import assert_within_rounding
from ..compare import assert_same, everything, least_memory, leaves, random_graph, values_and_grads
from ..conftest import exhaustive
from .test_attention import shapes

BACKENDS = ["extension", "dense"]
MODULE = importlib.import_module("cellattn.ops.attention")  # the function has its name


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_seed(f: Callable[..., Any], dropout_p: float, seed: int = 3, **options: Any) -> Callable[..., Any]:
    return lambda *x: f(*x, dropout_p=dropout_p, generator=generator(seed), **options)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loops of the extension, and the formula in blocks of rows that serves without it and where scores are large."""
    if request.param == "dense":
        monkeypatch.setattr(MODULE, "AVAILABLE", False)
    return request.param


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_has_the_published_values(counter: tuple[int, ...], seed: int, words: tuple[int, ...]) -> None:
    """The known answers that its authors publish beside it."""
    got = philox(torch.tensor(seed), tuple(torch.tensor(c) for c in counter))
    assert tuple(int(x) for x in got) == words


@shapes
@pytest.mark.parametrize("dropout_p", [0.1, 0.9])
def test_values_and_gradients(lead, tq, tk, d, dv, dropout_p: float, backend: str) -> None:
    qkv = leaves((*lead, tq, d), (*lead, tk, d), (*lead, tk, dv))
    f, g = (with_seed(x.attention, dropout_p, scale=0.4) for x in (cellattn, reference))
    assert_same(f, g, *qkv)
    if tk > 1:  # else the gradients of q and k are 0, a difference of two numbers that are rounded apart
        assert_same(lambda *x: f(*x)[0], lambda *x: g(*x)[0], *qkv)
    assert_same(lambda *x: f(*x)[1], lambda *x: g(*x)[1], *qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_precisions_are_within_rounding(dtype: torch.dtype, backend: str) -> None:
    f, g = (with_seed(x.attention, 0.2) for x in (cellattn, reference))
    assert_within_rounding(f, g, *leaves(*[(2, 300, 20)] * 3, dtype=dtype))


def kept(
    f: Callable[..., Any], lead: tuple[int, ...], tq: int, tk: int, p: float, seed: int = 3, dtype=torch.float64
) -> Tensor:
    """The multipliers of a map [..., Tq, Tk] of equal entries, read off an identity as values."""
    q, k = torch.zeros(*lead, tq, 1, dtype=dtype), torch.zeros(*lead, tk, 1, dtype=dtype)
    v = torch.eye(tk, dtype=dtype).expand(*lead, tk, tk)
    return f(q, k, v, dropout_p=p, generator=generator(seed))[0] * tk


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_entries_are_those_of_the_definition(dtype: torch.dtype, backend: str) -> None:
    """Bit for bit: which entries of 3 heads, 70 rows and 131 columns stay."""
    want = reference.dropout_multiplier((3, 70, 131), 0.3, generator())
    got = kept(cellattn.attention, (3,), 70, 131, 0.3, dtype=dtype)
    assert torch.equal(got != 0, want != 0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("isa", ["", "portable", *exhaustive("avx2")])
def test_entries_do_not_depend_on_threads_or_instructions(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLATTN_ISA", isa)
    want = reference.dropout_multiplier((2, 300, 70), 0.3, generator()) != 0
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(kept(cellattn.attention, (2,), 300, 70, 0.3) != 0, want)
            f, g = (with_seed(x.attention, 0.5) for x in (cellattn, reference))
            assert_same(f, g, *leaves((1, 1025, 7), (1, 33, 7), (1, 33, 5)))
    finally:
        torch.set_num_threads(before)


def test_an_entry_keeps_its_bits_in_a_larger_map() -> None:
    """It is a function of head, row and column: not of how many there are, nor of what is computed at once."""
    large, small = (reference.dropout_multiplier(shape, 0.4, generator()) for shape in ((5, 90, 200), (3, 33, 131)))
    assert torch.equal(large[:3, :33, :131], small)
    draw = torch.randint(2**63 - 1, (2,), dtype=torch.int64, generator=generator())
    blocks = [multiplier(draw, threshold_of(0.4), torch.empty(3, 11, 131).double(), first) for first in (0, 11, 22)]
    assert torch.equal(torch.cat(blocks, 1), small)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    """Of a million entries, whose number that are kept is within 5 standard deviations of a binomial; the mean stays 1."""
    z = reference.dropout_multiplier((4, 512, 512), p, generator(0))
    share, deviation = float((z == 0).double().mean()), (p * (1 - p) / z.numel()) ** 0.5
    assert abs(share - threshold_of(p) / STEPS) < 5 * deviation
    assert abs(threshold_of(p) / STEPS - p) <= 0.5 / STEPS
    # each row and column of its own
    for dim in (0, 1, 2):
        shares = (z == 0).double().mean([other for other in range(3) if other != dim])
        n = z.numel() // z.shape[dim]
        assert float((shares - p).abs().max()) < 6 * (p * (1 - p) / n) ** 0.5 + 1 / STEPS


def agreement(a: Tensor, b: Tensor) -> float:
    """The correlation of two sets of dropped entries, in standard deviations of independent ones."""
    a, b = ((x == 0).double().flatten() for x in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm())) * a.numel() ** 0.5


def test_heads_rows_columns_and_calls_are_independent() -> None:
    g = generator(0)
    one, other = (reference.dropout_multiplier((3, 256, 512), 0.3, g) for _ in range(2))
    pairs = {
        "calls": (one, other),
        "heads": (one[0], one[1]),
        "rows": (one[:, :-1], one[:, 1:]),
        **{f"columns {shift} apart": (one[..., :-shift], one[..., shift:]) for shift in (1, 7, 8, 16, 32, 64)},
        "transposed": (one[0, :256, :256], one[0, :256, :256].mT),
    }
    for name, (a, b) in pairs.items():
        assert abs(agreement(a, b)) < 5, name


def test_layers_drop_other_entries() -> None:
    """Every call draws: two layers, or two steps, never drop the same."""
    torch.manual_seed(0)
    qkv = leaves((4, 100, 8), (4, 100, 8), (4, 100, 8))
    a, b = (cellattn.attention(*qkv, dropout_p=0.5)[0] for _ in range(2))
    assert not torch.equal(a, b)
    torch.manual_seed(0)
    assert torch.equal(cellattn.attention(*qkv, dropout_p=0.5)[0], a)


@pytest.mark.parametrize("p", [0, 0.0, 1e-6])
def test_no_dropout_is_bit_equal_and_draws_nothing(p: float) -> None:
    qkv = leaves((2, 100, 8), (2, 100, 8), (2, 100, 8), dtype=torch.float32)
    g = generator()
    state = g.get_state()
    got = everything(lambda *x: cellattn.attention(*x, dropout_p=p, generator=g), *qkv)
    assert all(torch.equal(a, b) for a, b in zip(got, everything(cellattn.attention, *qkv), strict=True))
    assert torch.equal(g.get_state(), state)


def test_almost_everything_dropped_is_finite() -> None:
    qkv = leaves((2, 100, 8), (2, 100, 8), (2, 100, 8))
    f, g = (with_seed(x.attention, 1 - 1e-9) for x in (cellattn, reference))
    assert_same(f, g, *qkv)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 1}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got int 1"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got float -0.1"),
        ({"dropout_p": float("nan")}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got float nan"),
        ({"dropout_p": True}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got bool True"),
        ({"dropout_p": torch.tensor([0.1])}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got float32 tensor"),
        ({"dropout_p": 0.1, "generator": 3}, TypeError, r"generator: expected a torch.Generator or None, got int 3"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    q = torch.zeros(2, 8, 4)
    graph = random_graph(7, {"a": 10})
    with pytest.raises(error, match=message):
        cellattn.attention(q, q, q, **options)
    with pytest.raises(error, match=message):
        cellattn.graph_attention(q, q, q, graph, [("a", 0)], **options)


def test_special_values_are_those_of_the_formula() -> None:
    """A NaN is not dropped, and a row whose LSE is not finite stays NaN: 0 * NaN is NaN."""
    for name, value in (("q", float("nan")), ("k", float("inf")), ("v", float("inf")), ("v", float("nan"))):
        inputs = dict(zip("qkv", (x.detach() for x in leaves(*[(2, 70, 4)] * 3)), strict=True))
        inputs[name][0, 1, 2] = value
        got, want = ([y.detach() for y in with_seed(x.attention, 0.5)(*inputs.values())] for x in (cellattn, reference))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("loss", ["kl", "bce"])
def test_losses_see_the_map_before_dropout(loss: str) -> None:
    graph = random_graph(60, {"a": 300, "b": 200}, weighted=True)
    ties = [("a", 0), ("b", 2), ("a", 2)]
    qkv = leaves(*[(2, 3, 61, 8)] * 3)

    def run(m: Any, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
        def f(*x: Tensor) -> tuple[Tensor, ...]:
            if options:
                options["generator"] = generator()
            out, losses = m.graph_attention(*x, graph, ties, loss=loss, **options)
            return out, *losses

        return f

    assert_same(run(cellattn, dropout_p=0.4), run(reference, dropout_p=0.4), *qkv)
    dropped, whole = (values_and_grads(f, *qkv)[0] for f in (run(cellattn, dropout_p=0.4), run(cellattn)))
    assert not torch.equal(dropped[0], whole[0])
    for a, b in zip(dropped[1:], whole[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_gradcheck() -> None:
    q, k, v = leaves((2, 5, 3), (2, 4, 3), (2, 4, 2))
    assert torch.autograd.gradcheck(with_seed(cellattn.attention, 0.3), (q, k, v))


@pytest.mark.parametrize("own", [False, True], ids=["default generator", "own generator"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_again(own: bool, reentrant: bool) -> None:
    qkv = leaves(*[(2, 50, 8)] * 3)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        g = generator() if own else None

        def f(*x: Tensor, g: torch.Generator | None = g) -> Tensor:
            out, lse = cellattn.attention(*x, dropout_p=0.5, generator=g)
            return cellattn.attention(out, x[1], x[2], dropout_p=0.5, generator=g)[0] + lse.unsqueeze(-1)

        inputs = [x.detach().clone().requires_grad_() for x in qkv]
        y = checkpoint(f, *inputs, use_reentrant=reentrant) if checkpointed else f(*inputs)
        y.square().sum().backward()
        results.append([y.detach(), *(x.grad for x in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dynamic", [*exhaustive(False), True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    """And draws what it draws uncompiled, from the default generator."""
    torch._dynamo.reset()

    def f(*x: Tensor) -> tuple[Tensor, Tensor]:
        return cellattn.attention(*x, dropout_p=0.5)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 31):
        qkv = leaves(*[(2, n, 8)] * 3)
        results = []
        for run in (f, compiled):
            torch.manual_seed(1)
            results.append(everything(run, *qkv))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_vmap_draws_as_it_is_told() -> None:
    q, k, v = (x.detach() for x in leaves(*[(3, 2, 20, 8)] * 3))

    def f(*x: Tensor) -> Tensor:
        return cellattn.attention(*x, dropout_p=0.5)[0]

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(f)(q, k, v)
    a, b = (torch.vmap(f, randomness=how)(*(x[:1].expand_as(x) for x in (q, k, v))) for how in ("same", "different"))
    assert a.shape == b.shape == q.shape
    assert not torch.equal(b[0], b[1])


def test_memory_is_linear_in_tokens(two_threads: None) -> None:
    """A [T, T] float32 tensor would take 400 MB here."""
    q, k, v = leaves(*[(10_000, 8)] * 3, dtype=torch.float32)

    def step() -> None:
        out, lse = cellattn.attention(q, k, v, dropout_p=0.1)
        (out.sum() + lse.sum()).backward()

    assert least_memory(step, 40e6) < 40e6


def test_modules_drop_in_training_alone() -> None:
    graph = random_graph(30, {"a": 100})
    x = torch.randn(30, 8, dtype=torch.float64, generator=generator())
    torch.manual_seed(0)
    dropping, plain = (
        models.CellEncoder(8, 2, 2, ties=[(0, 1, "a", 1.0)], dropout=0.0, dropout_p=p).double() for p in (0.5, 0.0)
    )
    plain.load_state_dict(dropping.state_dict())
    a, b = (dropping(x, graph, generator=generator(seed)) for seed in (1, 2))
    assert not torch.equal(a[1], b[1])
    assert torch.equal(dropping(x, graph, generator=generator(1))[1], a[1])
    (name,) = a[2]  # of the first layer, before which nothing was dropped
    torch.testing.assert_close(a[2][name], plain(x, graph)[2][name], rtol=1e-12, atol=0)
    dropping.eval()
    assert all(torch.equal(y, z) for y, z in zip(dropping(x, graph)[:2], plain(x, graph)[:2], strict=True))
    untied = models.GraphRegularizedAttention(8, 2, dropout_p=0.5).double()
    tokens = x[None]
    assert not torch.equal(untied(tokens)[0], untied.eval()(tokens)[0])
    for make in (
        lambda: models.CellEncoder(8, 1, 2, dropout_p=1.0),
        lambda: models.GraphRegularizedAttention(8, 2, dropout_p=1.0),
        lambda: models.CellTransformer(8, 1, 2, num_types=2, dropout_p=1.0),
    ):
        with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\), got 1.0"):
            make()
