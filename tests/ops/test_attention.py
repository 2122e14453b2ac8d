from __future__ import annotations

import pytest
import torch

import cellattn
from cellattn import reference

from ..compare import assert_same, everything, leaves, values_and_grads

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


def test_unused_lse_is_bit_equal_to_plain_attention() -> None:
    q, k, v = leaves((1, 4, 200, 16), (1, 4, 300, 16), (1, 4, 300, 16), dtype=torch.float32)
    outputs, grads = values_and_grads(lambda *x: cellattn.attention(*x)[0], q, k, v)
    expected, expected_grads = values_and_grads(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(outputs + grads, expected + expected_grads, strict=True))


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


def test_no_queries() -> None:
    q, k, v = leaves((2, 0, 8), (2, 5, 8), (2, 5, 3))
    (out, lse), grads = values_and_grads(cellattn.attention, q, k, v)
    assert out.shape == (2, 0, 3)
    assert lse.shape == (2, 0)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_strided_inputs() -> None:
    (x,) = leaves((40, 3, 4, 8))  # tokens, (q, k, v), heads, D: the layout of a fused projection

    def split(f):
        return lambda x: f(*x.permute(1, 2, 0, 3).unbind(0))

    assert_same(split(cellattn.attention), split(reference.attention), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_no_worse_than_eager(dtype: torch.dtype) -> None:
    """At most twice the error of the same formula in eager PyTorch at that dtype, plus one spacing of the dtype."""
    exact = leaves((2, 300, 20), (2, 300, 20), (2, 300, 20))
    rounded = [x.detach().to(dtype) for x in exact]
    want = everything(reference.attention, *(x.double() for x in rounded))
    ours = everything(cellattn.attention, *rounded)
    eager = everything(reference.attention, *rounded)
    for a, e, w in zip(ours, eager, want, strict=True):
        scale = float(w.abs().max())
        assert float((a.double() - w).abs().max()) <= 2 * float((e.double() - w).abs().max()) + torch.finfo(a.dtype).eps * scale


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


def test_memory_is_linear_in_tokens() -> None:
    """A [T, T] float32 tensor would take 400 MB here."""
    from benchmarks.measure import peak_memory

    q, k, v = leaves((10_000, 8), (10_000, 8), (10_000, 8), dtype=torch.float32)

    def step() -> None:
        out, lse = cellattn.attention(q, k, v)
        (out.sum() + lse.sum()).backward()

    step()
    assert peak_memory(step) < 40e6
