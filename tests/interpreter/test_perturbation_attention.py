from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cellattn.kernels import config
from cellattn.kernels import perturbation_attention as kernels

from ..bounds import assert_within, with_bounds
from ..compare import leaves

SCALE = 0.4
N = 30
BATCHES: dict[str, list[list[int]]] = {
    "ordinary": [[1, 5], [0], [29, 3, 7]],
    "empty sets": [[], [4], [], []],
    "one gene in many sets": [[2, i] for i in range(3, N)] * 6,
    "every gene": [list(range(N)), []],
    "no entries": [[], []],
    "no sets": [],
}


def ragged(sets: list[list[int]]) -> tuple[Tensor, Tensor]:
    index = torch.tensor([gene for genes in sets for gene in genes], dtype=torch.int64)
    return index, torch.tensor([0, *(len(genes) for genes in sets)]).cumsum(0)


def correction(
    query: Tensor, key: Tensor, value: Tensor, lse: Tensor, override: Tensor, *, index: Tensor, ptr: Tensor
) -> Tensor:
    """sum_{e in b} beta_e (U_e - V_i(e)), as the definition has it."""
    sample = torch.arange(ptr.numel() - 1).repeat_interleave(ptr.diff())
    score = SCALE * (query[..., sample, :] * key[..., index, :]).sum(-1)
    beta = (score - lse[..., sample]).exp()
    z = query.new_zeros(*query.shape[:-1], value.shape[-1])
    return z.index_add(-2, sample, beta[..., None] * (override - value[..., index, :]))


def check(tensors: list[Tensor], index: Tensor, ptr: Tensor) -> None:
    """z and all gradients of the launchers against autograd in float64, within rounding."""
    query, key, value, lse, override = tensors
    dz = torch.randn(*query.shape[:-1], value.shape[-1], generator=torch.Generator().manual_seed(3)).to(query.dtype)
    wanted = with_bounds(functools.partial(correction, index=index, ptr=ptr), tensors, [dz])

    problem = (query, key, value, lse, index, ptr, override, SCALE)
    got = [kernels.perturbation_correction(*problem), *kernels.perturbation_correction_backward(dz, *problem)]
    assert [x.dtype for x in got] == [query.dtype, *(x.dtype for x in tensors)]
    for name, a, b in zip(("z", "dquery", "dkey", "dvalue", "dlse", "doverride"), got, wanted, strict=True):
        assert_within(a, b, name)


def inputs(lead: tuple[int, ...], index: Tensor, ptr: Tensor, d: int, v: int, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value, lse, override; an LSE of 2 and more keeps beta at about 1 and below, as a softmax would."""
    b, nnz = ptr.numel() - 1, index.numel()
    query, key, value, lse, override = (
        x.detach() for x in leaves((*lead, b, d), (*lead, N, d), (*lead, N, v), (*lead, b), (*lead, nnz, v))
    )
    lse = (2 + 0.3 * d**0.5 + lse.abs()).float()
    return [query.to(dtype), key.to(dtype), value.to(dtype), lse, override.to(dtype)]


@pytest.fixture(autouse=True)
def _poisoned(poison: Callable) -> None:
    poison(kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_values_and_gradients(batch: str, dtype: torch.dtype) -> None:
    index, ptr = ragged(BATCHES[batch])
    check(inputs((), index, ptr, 8, 5, dtype), index, ptr)


@pytest.mark.parametrize(("d", "v"), [(1, 1), (20, 20), (64, 100), (100, 8), (128, 128), (16, 256)], ids=str)
def test_widths(d: int, v: int) -> None:
    index, ptr = ragged(BATCHES["ordinary"])
    check(inputs((2,), index, ptr, d, v, torch.float32), index, ptr)


@pytest.mark.parametrize("batch", ["ordinary", "no entries"])
def test_leading_dimensions_and_strides(batch: str) -> None:
    """Matrices as projections leave them, heads inside rows; one value for all leading dimensions; transposed keys."""
    index, ptr = ragged(BATCHES[batch])
    query, key, value, lse, override = inputs((2, 3), index, ptr, 20, 8, torch.float32)
    query, override = (x.transpose(0, -2).contiguous().transpose(0, -2) for x in (query, override))
    check([query, key.mT.contiguous().mT, value[0, 0].expand_as(value), lse, override], index, ptr)


def test_autotuned_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kernel is timed, and goes on with the tile that won: here the lowest."""
    monkeypatch.setenv("CELLATTN_AUTOTUNE", "1")
    monkeypatch.setattr(config, "_tuned", {})
    monkeypatch.setattr(config, "milliseconds", lambda launch, tile: float(tile.rows))
    index, ptr = ragged(BATCHES["one gene in many sets"])
    check(inputs((), index, ptr, 20, 5, torch.float32), index, ptr)
    assert {kernel: tile for (kernel, *_), tile in config._tuned.items()} == {
        "perturbation_fwd": config.Gather(8, 1),
        "perturbation_bwd_sets": config.Gather(8, 1),
        "perturbation_bwd_genes": config.Gather(32, 1),
    }
    assert f"cellattn: perturbation_fwd, sm_80, torch.float32: 32: {config.Gather(8, 1)}," in capsys.readouterr().out


def test_bad_input_raises_before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose_gather", lambda *_: pytest.fail("a kernel was launched"))
    index, ptr = ragged(BATCHES["ordinary"])
    query, key, value, lse, override = inputs((), index, ptr, 8, 5, torch.float32)
    for tensors, message in (
        (
            (query.double(), key.double(), value.double(), lse, index, ptr, override.double()),
            "(query|dz): expected dtype float16",
        ),
        ((query, key.half(), value, lse, index, ptr, override), "key: expected the dtype of (query|dz)"),
        ((query, key, torch.ones(N, 257), lse, index, ptr, torch.ones(6, 257)), "(value|dz): expected at most 256 features"),
        ((query, key, value, lse, index.to("meta"), ptr, override), "index: expected the device of (query|dz)"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.perturbation_correction(*tensors, SCALE)
        with pytest.raises(ValueError, match=message):
            kernels.perturbation_correction_backward(tensors[2].new_zeros(3, tensors[2].shape[1]), *tensors, SCALE)


def test_beta_of_scores_that_float32_has_no_digits_for() -> None:
    """Of scores of 7 million that differ by a few: beta is that of float64, though LSE comes rounded to 1/2.

    Its relative error is then that of 2^x of a float32 x; to it come the V products of a ds and the terms of a sum.
    """
    index, ptr = ragged([[1, 5], [], [29, 3, 7], [4]])
    d, v = 20, 6
    query, key, value, _, override = (x.double() for x in inputs((2,), index, ptr, d, v, torch.float32))
    query, key = ((1e3 + x).float().double() for x in (300 * query, 1e-3 * key))
    scores = SCALE * query @ key.mT
    lse, sample = scores.logsumexp(-1), torch.arange(4).repeat_interleave(ptr.diff())
    x = scores[:, sample, index] - lse[:, sample]
    assert scores.min() > 6e6
    assert -10 < x.min() < x.max() < -1
    dz = torch.randn(2, 4, v, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).float().double()
    given = [y.requires_grad_() for y in (query, key, value, lse, override)]
    z = correction(*given, index=index, ptr=ptr)
    want = [z.detach(), *torch.autograd.grad(z, given, dz)]

    tensors = [y.detach().float() for y in given]
    problem = (*tensors[:4], index, ptr, tensors[4], SCALE)
    got = [kernels.perturbation_correction(*problem), *kernels.perturbation_correction_backward(dz.float(), *problem)]

    query, key, value, _, override = (y.detach() for y in given)
    beta = x.detach().exp()[..., None]
    of_dz, difference = beta * dz[:, sample].abs(), override.abs() + value[:, index].abs()
    ds = (of_dz * difference).sum(-1, keepdim=True)
    sizes = [
        torch.zeros_like(z).index_add(-2, sample, beta * difference),
        torch.zeros_like(query).index_add(-2, sample, SCALE * ds * key[:, index]),
        torch.zeros_like(key).index_add(-2, index, SCALE * ds * query[:, sample]),
        torch.zeros_like(value).index_add(-2, index, of_dz),
        torch.zeros_like(lse).index_add(-1, sample, ds[..., 0]),
        of_dz,
    ]
    share = (v + 8 + float(x.abs().max())) * torch.finfo(torch.float32).eps
    for name, a, b, size in zip(("z", "dquery", "dkey", "dvalue", "dlse", "doverride"), got, want, sizes, strict=True):
        assert ((a.double() - b).abs() <= share * size).all(), name
