from __future__ import annotations

import pytest
import torch

import cellattn
from cellattn import reference

from ..bounds import assert_within_rounding
from ..compare import assert_same, least_memory, leaves

# sets as lists of genes
BATCHES = {
    "ordinary": [[1, 5], [0], [29, 3, 7]],
    "empty sets": [[], [4], [], []],
    "same gene in many sets": [[2], [2, 3], [2]],
    "every gene": [list(range(30))],
    "no sets": [],
}


def ragged(sets: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.tensor([gene for genes in sets for gene in genes], dtype=torch.int64)
    ptr = torch.tensor([0, *(len(genes) for genes in sets)]).cumsum(0)
    return index, ptr


def attention_and_correction(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, ptr: torch.Tensor, u: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Of no leading dimensions, the definition as the sum of two parts, each of which may be rounded."""
    sample = torch.arange(ptr.numel() - 1).repeat_interleave(ptr.diff())
    out, lse = reference.attention(q, k, v, scale=scale)
    beta = (scale * (q[sample] * k[index]).sum(-1) - lse[sample]).exp()
    return out + torch.zeros_like(out).index_add(0, sample, beta[:, None] * (u - v[index]))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_values_and_gradients(batch: str, lead: tuple[int, ...]) -> None:
    index, ptr = ragged(BATCHES[batch])
    b, nnz = ptr.numel() - 1, index.numel()
    inputs = leaves((*lead, b, 8), (*lead, 30, 8), (*lead, 30, 5), (*lead, nnz, 5))
    assert_same(
        lambda q, k, v, u: cellattn.perturbation_attention(q, k, v, index, ptr, u, scale=0.4),
        lambda q, k, v, u: reference.perturbation_attention(q, k, v, index, ptr, u, scale=0.4) + 0 * (q.sum() + u.sum()),
        *inputs,
    )


def test_override_by_the_values_changes_nothing() -> None:
    index, ptr = ragged(BATCHES["ordinary"])
    q, k, v = leaves((3, 8), (30, 8), (30, 5))
    z = cellattn.perturbation_attention(q, k, v, index, ptr, v[index])
    torch.testing.assert_close(z, cellattn.attention(q, k, v, scale=1.0)[0])


def test_a_gene_twice_in_a_set_is_refused() -> None:
    q, k, v, u = leaves((2, 8), (30, 8), (30, 5), (4, 5))
    with pytest.raises(ValueError, match="index: set 1 holds gene 7 twice"):
        cellattn.perturbation_attention(q, k, v, torch.tensor([7, 3, 7, 7]), torch.tensor([0, 1, 4]), u)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_is_within_rounding(dtype: torch.dtype) -> None:
    index, ptr = ragged([[i, i + 1] for i in range(0, 60, 2)])
    inputs = leaves((30, 16), (300, 16), (300, 16), (60, 16), dtype=dtype)
    f, exact, in_parts = (
        lambda q, k, v, u, f=f: f(q, k, v, index, ptr, u, scale=0.25)
        for f in (cellattn.perturbation_attention, reference.perturbation_attention, attention_and_correction)
    )
    assert_same(in_parts, exact, *(x.detach().double() for x in inputs))
    assert_within_rounding(f, in_parts, *inputs, parts=True)


def test_gradcheck_and_double_backward() -> None:
    index, ptr = ragged([[1, 4], [], [0]])
    inputs = leaves((3, 2), (5, 2), (5, 3), (3, 3))

    def f(q, k, v, u):
        return cellattn.perturbation_attention(q, k, v, index, ptr, u)

    assert torch.autograd.gradcheck(f, inputs)
    (dq,) = torch.autograd.grad(f(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dq.sum().backward()


def test_thousands_of_sets_without_a_set_by_gene_by_feature_tensor(two_threads: None) -> None:
    """[B, N, Dv] would take 8 GB."""
    b, n, d = 4096, 8000, 64
    index = torch.randint(n // 2, (b, 2)) + torch.tensor([0, n // 2])
    ptr = torch.arange(b + 1) * 2
    inputs = leaves((b, d), (n, d), (n, d), (2 * b, d), dtype=torch.float32)

    def step() -> None:
        q, k, v, u = inputs
        cellattn.perturbation_attention(q, k, v, index.flatten(), ptr, u, scale=0.1).sum().backward()

    assert least_memory(step, 100e6) < 100e6


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_overridden_does_not_leak(lead: tuple[int, ...], bad: float) -> None:
    """Values that are not finite reach the sets that do not override them, and no other; gradients likewise."""
    index, ptr = ragged([[2, 5], [5], [2], [], [5, 2, 9]])
    q, k, v, u = leaves((*lead, 5, 8), (*lead, 30, 8), (*lead, 30, 4), (*lead, 7, 4))
    with torch.no_grad():
        v[..., 5, 1] = bad
        v[..., 2, 3] = bad
    z = cellattn.perturbation_attention(q, k, v, index, ptr, u, scale=0.4)
    want = reference.perturbation_attention(q, k, v, index, ptr, u, scale=0.4)
    torch.testing.assert_close(z, want, equal_nan=True)
    assert z[..., [0, 4], :].isfinite().all()
    assert z[..., 1, 1].isfinite().all()
    assert not z[..., 3, 1].isfinite().any()
    # the sets that override both, alone
    clean, entries = [0, 4], [0, 1, 4, 5, 6]
    want = reference.perturbation_attention(q[..., clean, :], k, v, *ragged([[2, 5], [5, 2, 9]]), u[..., entries, :], scale=0.4)
    got = torch.autograd.grad(z[..., clean, :].square().sum(), (q, k, v, u))
    expected = torch.autograd.grad(want.square().sum(), (q, k, v, u))
    for name, a, b in zip("qkvu", got, expected, strict=True):
        assert a.isfinite().all(), name
        if name != "k":  # the definition has 0 * NaN in it where a weight has no gradient
            torch.testing.assert_close(a, b, msg=name)


def test_error_of_a_large_value_that_is_overridden() -> None:
    """A value taken out of the sum leaves the rounding of what it was there: at most four roundings of beta |V|."""
    index, ptr = ragged([[3]])
    q, k, v, u = (x.detach() for x in leaves((1, 8), (30, 8), (30, 4), (1, 4)))
    v[3] = 1e8
    want = reference.perturbation_attention(q, k, v, index, ptr, u)
    beta = (q @ k.T).softmax(-1)[0, 3]
    got = cellattn.perturbation_attention(q.float(), k.float(), v.float(), index, ptr, u.float())
    # 31 terms are added up, of scores that are rounded too
    assert ((got - want).abs() <= 64 * torch.finfo(torch.float32).eps * beta * 1e8).all()
