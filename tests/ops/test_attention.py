from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import reference

from ..bounds import assert_within_rounding
from ..compare import assert_same, least_memory, leaves, values_and_grads

MODULE = importlib.import_module("cellattn.ops.attention")  # the function has its name

# (leading, Tq, Tk, D, Dv)
SHAPES = [
    ((), 1, 1, 1, 1),
    ((3,), 63, 129, 8, 20),
    ((2, 3), 129, 63, 20, 8),
    ((1, 4), 64, 64, 64, 64),
    ((2,), 5, 1000, 100, 3),
    ((), 1000, 5, 128, 128),
    ((9,), 77, 77, 20, 20),
]
ids = ["x".join(map(str, lead)) + f"-Tq{tq}-Tk{tk}-D{d}-Dv{dv}" for lead, tq, tk, d, dv in SHAPES]
shapes = pytest.mark.parametrize(("lead", "tq", "tk", "d", "dv"), SHAPES, ids=ids)


@pytest.fixture(params=["extension", "pytorch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose kernel a CPU takes: PyTorch's is that of processors which multiply matrices of 16 bits, or have no vectors."""
    if request.param == "pytorch":
        monkeypatch.setattr(MODULE, "_IN_LOOPS", dict.fromkeys(MODULE._IN_LOOPS, False))


@shapes
@pytest.mark.parametrize("scale", [None, 0.37])
def test_out_and_lse_together(lead, tq, tk, d, dv, scale) -> None:
    qkv = leaves((*lead, tq, d), (*lead, tk, d), (*lead, tk, dv))
    assert_same(
        lambda q, k, v: cellattn.attention(q, k, v, scale=scale),
        lambda q, k, v: reference.attention(q, k, v, scale=scale),
        *qkv,
    )


@shapes
def test_lse_alone_leaves_v_without_gradient(lead, tq, tk, d, dv) -> None:
    qkv = leaves((*lead, tq, d), (*lead, tk, d), (*lead, tk, dv))
    assert_same(lambda q, k, v: cellattn.attention(q, k, v)[1], lambda q, k, v: reference.attention(q, k, v)[1], *qkv)
    _, (_, _, dv_grad) = values_and_grads(lambda q, k, v: cellattn.attention(q, k, v)[1], *qkv)
    assert torch.equal(dv_grad, torch.zeros_like(dv_grad))


def test_unused_lse_is_bit_equal_to_one_with_a_gradient_of_zeros() -> None:
    qkv = leaves((1, 4, 200, 16), (1, 4, 300, 16), (1, 4, 300, 16), dtype=torch.float32)
    out, lse = cellattn.attention(*qkv)
    upstream = torch.randn_like(out)
    unused = torch.autograd.grad(out, qkv, upstream, retain_graph=True)
    zeros = torch.autograd.grad([out, lse], qkv, [upstream, torch.zeros_like(lse)])
    assert all(torch.equal(a, b) for a, b in zip(unused, zeros, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_queries_split_over_threads(heads: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        qkv = leaves((heads, 1025, 7), (heads, 33, 7), (heads, 33, 5))
        assert_same(cellattn.attention, reference.attention, *qkv)
        assert_same(cellattn.attention_logsumexp, reference.attention_logsumexp, *qkv[:2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(50,), (3, 50), (1, 50), (2, 1, 50), (2, 3, 50)], ids=str)
def test_key_mask(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    q, k = leaves((2, 3, 20, 8), (2, 3, 50, 8))
    assert_same(
        lambda q, k: cellattn.attention_logsumexp(q, k, key_mask=mask),
        lambda q, k: reference.attention_logsumexp(q, k, key_mask=mask),
        q,
        k,
    )


def test_key_mask_that_keeps_nothing() -> None:
    q, k = leaves((2, 20, 8), (2, 50, 8))
    mask = torch.stack([torch.zeros(50, dtype=torch.bool), torch.ones(50, dtype=torch.bool)])
    lse = cellattn.attention_logsumexp(q, k, key_mask=mask)
    assert (lse[0] == -torch.inf).all()
    assert torch.equal(lse[1], cellattn.attention_logsumexp(q[1], k[1]))
    lse.masked_fill(lse == -torch.inf, 0).sum().backward()
    assert q.grad is not None
    assert torch.equal(q.grad[0], torch.zeros_like(q.grad[0]))
    assert q.grad[1].abs().max() > 0


def test_the_operator_without_features_is_a_mean() -> None:
    q, v = torch.ones(3, 0), torch.tensor([[1.0], [2.0], [6.0]])
    out, lse = torch.ops.cellattn.attention(q, q, v, None, 1.0, None, 0)
    torch.testing.assert_close(out, torch.full((3, 1), 3.0))
    torch.testing.assert_close(lse, torch.full((3,), 3.0).log())


def test_no_queries() -> None:
    q, k, v = leaves((2, 0, 8), (2, 5, 8), (2, 5, 3))
    (out, lse), grads = values_and_grads(cellattn.attention, q, k, v)
    assert out.shape == (2, 0, 3)
    assert lse.shape == (2, 0)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


# The same values, or some of them, as a view that is not contiguous; each is differentiable.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows innermost": lambda x: x.mT.contiguous().mT,
    "heads innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "every second row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    "one row": lambda x: x[..., :1, :].expand(x.shape),
    "one column": lambda x: x[..., :1].expand(x.shape),
    "one head": lambda x: x[:1].expand(x.shape),
    "one number": lambda x: x[:1, :1, :1].expand(x.shape),
    "overlapping rows": lambda x: x.flatten()[: x.shape[1] + x.shape[2] - 1].unfold(0, x.shape[2], 1).expand(x.shape),
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in LAYOUTS), ("rows innermost", True), ("overlapping rows", True)]
)
def test_any_strides(name: str, compiled: bool) -> None:
    """Of the inputs and of the gradients of the outputs; a product with a transposed view makes those of its strides."""

    layout = LAYOUTS[name]

    def through(attention):
        def f(q, k, v):
            out, lse = attention(layout(q), layout(k), layout(v))
            return layout(out), lse.mT, out.sum(), lse.sum()

        return f

    ours = through(cellattn.attention)
    if compiled:
        torch._dynamo.reset()
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(ours, through(reference.attention), *leaves((3, 9, 8), (3, 11, 8), (3, 11, 8)))
    assert_same(ours, through(reference.attention), *leaves((3, 9, 4), (3, 11, 4), (3, 11, 7)))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("dim_v", [8, 3])
def test_channels_last(dim_v: int, which: str) -> None:
    """Heads innermost in a batch, an order of dimensions that PyTorch's own functions keep where they make another tensor."""
    shapes = {"q": (2, 3, 9, 8), "k": (2, 3, 11, 8), "v": (2, 3, 11, dim_v)}

    def through(attention):
        def f(*tensors):
            named = zip(shapes, tensors, strict=True)
            return attention(*(x.to(memory_format=torch.channels_last) if name in which else x for name, x in named))

        return f

    assert_same(through(cellattn.attention), through(reference.attention), *leaves(*shapes.values()))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["q", "k", "v", "above"])
def test_zeros_without_memory(name: str) -> None:
    """The dispatcher makes one number of them for all places, behind which a kernel that asks for no strides reads on."""
    shapes = {"q": (2, 3, 9, 64), "k": (2, 3, 11, 64), "v": (2, 3, 11, 64), "above": (2, 3, 9, 64)}

    def grads(zeros: Callable[[Tensor], Tensor]) -> list[Tensor]:
        tensors = dict(zip(shapes, leaves(*shapes.values()), strict=True))
        tensors[name] = zeros(tensors[name])
        *qkv, above = tensors.values()
        out, lse = cellattn.attention(*qkv)
        wanted = [x for x in qkv if x.requires_grad]
        # of the output alone: with the log-sum-exp's gradient, rows are padded, into memory
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, wanted, above)]

    got = grads(lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype))
    for ours, want in zip(got, grads(torch.zeros_like), strict=True):
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)  # of sums of about a hundred terms of about 1


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides_of_lse_alone(layout: Callable[[Tensor], Tensor]) -> None:
    mask = (torch.arange(22) % 3 > 0)[::2].expand(3, 11)

    def through(logsumexp):
        return lambda q, k: logsumexp(layout(q), layout(k), key_mask=mask).mT

    assert_same(through(cellattn.attention_logsumexp), through(reference.attention_logsumexp), *leaves((3, 9, 8), (3, 11, 8)))


# What stands in one place of q, k or v [2, 5, 4] before the op: the table of the module's docstring, row by row. Large numbers
# are finite and their products are not.
NAN, INF = float("nan"), float("inf")
SPECIAL: dict[str, list[tuple[str, tuple[int | slice, ...], float]]] = {
    "NaN in q": [("q", (0, 1, 2), NAN)],
    "NaN in k": [("k", (0, 1, 2), NAN)],
    "inf in q": [("q", (0, 1, 2), INF)],
    "-inf in k": [("k", (0, 1, 2), -INF)],
    "all of q inf": [("q", (0, 1, slice(None)), INF)],
    "score inf": [("q", (0, 1), 1e300), ("k", (0, 3), 1e300)],
    "score -inf": [("q", (0, 1), 1e300), ("k", (0, 3), -1e300)],
    "every score -inf": [("q", (0, slice(None), 0), 0.0), ("q", (0, 1, 0), 1e300), ("k", (0, slice(None), 0), -1e300)],
    "every score inf": [("q", (0, slice(None), 0), 0.0), ("q", (0, 1, 0), 1e300), ("k", (0, slice(None), 0), 1e300)],
    "NaN in v": [("v", (0, 1, 2), NAN)],
    "inf in v": [("v", (0, 1, 2), INF)],
    "inf and -inf in v": [("v", (0, 1, 2), INF), ("v", (0, 3, 2), -INF)],
    "inf in v of weight 0": [("v", (0, 1, 2), INF), ("q", (0, 1), 1e300), ("k", (0, 1), -1e300)],
    "nothing": [],
}


def same_with_special_values(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        message = functools.partial("tensor {}: {}".format, i)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True, msg=message)


@pytest.mark.parametrize("upstream", ["ones", "zero at the row", "NaN at the row"])
@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL)
def test_special_values(special, tokens: int, upstream: str) -> None:
    """NaN and infinities where the dense formula has them, and everything else as without them."""
    inputs = dict(zip("qkv", (x.detach() for x in leaves((2, tokens, 4), (2, tokens, 4), (2, tokens, 4))), strict=True))
    for name, where, value in special:
        inputs[name][where] = value
    weight = torch.ones(tokens, dtype=torch.float64)
    weight[1] = {"ones": 1.0, "zero at the row": 0.0, "NaN at the row": NAN}[upstream]

    def run(attention, q, k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves)
        # both outputs in one sum: for a row of lse = inf the dense gradient of lse alone is 0 for the other keys
        grads = torch.autograd.grad((out, lse), leaves, (weight[:, None].expand_as(out), weight.expand_as(lse)))
        return [out, lse, *grads]

    ours, theirs = run(cellattn.attention, *inputs.values()), run(reference.attention, *inputs.values())
    same_with_special_values([x.detach() for x in ours], [x.detach() for x in theirs])


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e300])
def test_nothing_behind_the_mask_is_seen(value: float, tokens: int) -> None:
    q, k = (x.detach() for x in leaves((2, tokens, 4), (2, tokens, 4)))
    mask = torch.arange(tokens) % 3 > 0
    hidden = k.masked_fill(~mask[:, None], value)

    def run(k):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        lse = cellattn.attention_logsumexp(*leaves, key_mask=mask)
        return [lse.detach(), *torch.autograd.grad(lse.sum(), leaves)]

    got, want = run(hidden), run(k)
    same_with_special_values(got, want)
    assert torch.equal(got[2][:, ~mask], torch.zeros_like(got[2][:, ~mask]))
    assert all(torch.equal(a, b) for a, b in zip(got, run(k.masked_fill(~mask[:, None], 0)), strict=True))


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("spoilt", [False, True], ids=["", "NaN in another head"])
def test_row_without_a_key_has_no_gradient_whatever_comes_from_above(spoilt: bool, tokens: int) -> None:
    q, k = leaves((2, tokens, 4), (2, tokens, 4))
    if spoilt:
        q = q.detach().clone().index_fill_(0, torch.tensor([1]), NAN).requires_grad_()
    mask = torch.zeros(2, tokens, dtype=torch.bool)
    mask[1] = True
    lse = cellattn.attention_logsumexp(q, k, key_mask=mask)
    assert (lse[0] == -INF).all()
    dq, dk = torch.autograd.grad(lse, (q, k), torch.full_like(lse, NAN))
    for grad in (dq, dk):
        assert torch.equal(grad[0], torch.zeros_like(grad[0]))
        assert grad[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e5, 1e6, 1e7, 1e8, 1e10, 1e12])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_rows_sum_to_one_where_scores_are_large(size: float, scale: float | None, dtype: torch.dtype) -> None:
    """Which of two nearly equal scores is larger may be lost in rounding, but not that a row of P sums to 1.

    A score is a sum of D products, in each order of it off by D + 2 spacings of D |q| |k|; so is P, relative to itself, if
    score and lse are of two orders. Where that could be more than 1/32, they have to be of one.
    """
    q, k = (size**0.5 * x.detach().to(dtype) for x in leaves((41, 8), (41, 8)))
    k[:, 0] = 1.0  # the gradient of q in this column is scale * sum_j P_ij
    q.requires_grad_()
    (dq,) = torch.autograd.grad(cellattn.attention_logsumexp(q, k, scale=scale).sum(), q)
    factor, eps = 8**-0.5 if scale is None else scale, torch.finfo(dtype).eps
    largest = 8 * factor * float(q.detach().abs().max() * k.abs().max())
    sums = dq[:, 0] / factor
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=min(2 * 10 * eps * largest, 1 / 32) + 64 * eps)


@pytest.mark.parametrize("native", [False, True], ids=["in float32", "in 16 bits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_is_within_rounding(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor that multiplies 16 bits, and on one that does not; with and without a gradient of lse."""
    for name in ("_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    monkeypatch.setattr(MODULE, "_IN_LOOPS", MODULE._in_loops())
    if native and dtype != torch.float32:
        monkeypatch.setattr(MODULE, "_rows", lambda *_: pytest.fail("the loops multiply no matrices of 16 bits"))
    assert_within_rounding(cellattn.attention, reference.attention, *leaves(*[(2, 300, 20)] * 3, dtype=dtype))
    assert_within_rounding(
        lambda q, k, v: cellattn.attention(q, k, v)[0],
        lambda q, k, v: reference.attention(q, k, v)[0],
        *leaves(*[(2, 300, 20)] * 3, dtype=dtype),
    )


def test_dtypes_of_results() -> None:
    for dtype, lse_dtype in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ]:
        out, lse = cellattn.attention(*leaves((5, 8), (6, 8), (6, 3), dtype=dtype))
        assert (out.dtype, lse.dtype) == (dtype, lse_dtype)


def test_large_scores_stay_finite() -> None:
    q, k, v = leaves((40, 8), (50, 8), (50, 8), dtype=torch.float32)
    outputs, grads = values_and_grads(lambda q, k, v: cellattn.attention(100 * q, 100 * k, v), q, k, v)
    assert all(x.isfinite().all() for x in outputs + grads)
    assert (outputs[1] > 1e4).any()


def test_gradcheck() -> None:
    q, k, v = leaves((2, 5, 3), (2, 4, 3), (2, 4, 2))
    assert torch.autograd.gradcheck(cellattn.attention, (q, k, v))
    assert torch.autograd.gradcheck(cellattn.attention_logsumexp, (q, k))


def test_double_backward_is_a_clear_error() -> None:
    q, k, v = leaves((5, 3), (4, 3), (4, 2))
    out, lse = cellattn.attention(q, k, v)
    (dq,) = torch.autograd.grad(out.sum() + lse.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention: double backward is not supported"):
        dq.sum().backward()


def test_memory_is_linear_in_tokens(two_threads: None) -> None:
    """A [T, T] float32 tensor would take 400 MB here."""
    q, k, v = leaves((10_000, 8), (10_000, 8), (10_000, 8), dtype=torch.float32)

    def step() -> None:
        out, lse = cellattn.attention(q, k, v)
        (out.sum() + lse.sum()).backward()

    assert least_memory(step, 40e6) < 40e6
