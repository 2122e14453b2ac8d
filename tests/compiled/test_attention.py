"""Attention's kernels, compiled: every tile of the tables, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import reference

from .. import ptx
from ..bounds import assert_attention_gradients
from ..compare import leaves
from ..conftest import exhaustive
from .check import assert_on_chip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = ["attention_fwd_kernel", *(f"attention_bwd_kernel_{part}" for part in ("delta", "dq", "dkv"))]

# (chip, dtype, leading, Tq, Tk, D, DV)
SHAPES = [
    (80, "bf16", (), 1, 1, 1, 1),
    (80, "bf16", (2,), 63, 129, 20, 32),
    (90, "bf16", (), 129, 63, 20, 20),
    (80, "fp32", (), 63, 70, 20, 1),
]
MORE_SHAPES = [
    *(
        (80, dtype, (), t, t, d, d)
        for dtype in ("bf16", "fp16")
        for t, d in ((1, 128), (63, 100), (129, 64), (257, 32), (257, 1))
    ),
    *((arch, "fp16", (), 63, 129, 20, 20) for arch in (89, 90)),
    (90, "bf16", (), 1, 257, 100, 100),
    (80, "bf16", (), 257, 129, 64, 64),
    (89, "bf16", (2,), 129, 257, 20, 20),
    (89, "bf16", (), 100, 63, 100, 128),
    (90, "bf16", (2,), 129, 257, 20, 20),
    (90, "bf16", (), 257, 63, 64, 32),
    (80, "fp16", (), 129, 100, 32, 20),
]


def heads(dtype: str, lead: tuple[int, ...], tq: int, tk: int, d: int, dv: int) -> list[Tensor]:
    return [x.detach() for x in leaves((*lead, tq, d), (*lead, tk, d), (*lead, tk, dv), dtype=DTYPES[dtype])]


@pytest.mark.parametrize(
    ("arch", "dtype", "lead", "tq", "tk", "d", "dv"),
    [*SHAPES, *exhaustive(*MORE_SHAPES)],
    ids=lambda x: str(x).replace(" ", "").replace("()", ""),
)
def test_shapes(arch: int, dtype: str, lead: tuple[int, ...], tq: int, tk: int, d: int, dv: int) -> None:
    qkv = heads(dtype, lead, tq, tk, d, dv)
    assert_on_chip(arch, cellattn.attention, reference.attention, *qkv, kernels=KERNELS)


TILES = [
    *((arch, "bf16", dim) for arch in (80, 89, 90) for dim in (16, 32, 64, 128, 256)),
    *((80, dtype, dim) for dtype in ("fp16", "fp32") for dim in (16, 32, 64, 128, 256)),
]


@pytest.mark.parametrize(("arch", "dtype", "dim"), exhaustive(*TILES))
def test_tiles(arch: int, dtype: str, dim: int) -> None:
    """More queries and keys than a tile has, and no multiple of it."""
    qkv = heads(dtype, (), 150, 140, dim, dim)
    assert_on_chip(arch, cellattn.attention, reference.attention, *qkv, kernels=KERNELS)


@pytest.mark.parametrize("dim", [16, *exhaustive(32, 64, 128, 256)])
@pytest.mark.parametrize("masked", [False, True], ids=["every key", "masked"])
def test_few_queries_split_the_keys(dim: int, masked: bool) -> None:
    """Parts of the keys side by side, some without a key that the mask keeps, and their combination."""
    q, k, _ = heads("bf16", (), 28, 1100, dim, dim)
    mask = (torch.arange(1100) > 600) & (torch.arange(1100) % 3 > 0) if masked else None

    def through(module: Any) -> Any:
        if masked:
            return lambda q, k: module.attention_logsumexp(q, k, key_mask=mask)
        return lambda q, k: module.attention(q, k, k)

    kernels = [KERNELS[0], "attention_fwd_kernel_combine", *KERNELS[1:]]
    assert_on_chip(80, through(cellattn), through(reference), q, k, kernels=kernels)


@pytest.mark.parametrize("arch", [80, 90])
def test_key_masks_and_rows_without_a_key(arch: int) -> None:
    q, k, _ = heads("bf16", (3,), 70, 129, 20, 1)
    mask = torch.stack([torch.zeros(129).bool(), torch.arange(129) == 7, torch.arange(129) % 2 == 1])

    def through(module: Any) -> Any:
        return lambda q, k: torch.where(
            torch.tensor([False, True, True])[:, None], module.attention_logsumexp(q, k, key_mask=mask), 0
        )

    assert_on_chip(arch, through(cellattn), through(reference), q, k, kernels=KERNELS)


@pytest.mark.parametrize(("arch", "dtype"), [(80, "bf16"), (90, "bf16"), *exhaustive((80, "fp16"), (80, "fp32"), (89, "fp16"))])
def test_negative_scales(arch: int, dtype: str) -> None:
    """Queries are turned round, in 16 bits."""

    def through(module: Any) -> Any:
        return lambda *qkv: module.attention(*qkv, scale=-0.3)

    assert_on_chip(arch, through(cellattn), through(reference), *heads(dtype, (2,), 31, 17, 33, 20), kernels=KERNELS)


@pytest.mark.parametrize("gradient", [0, 1], ids=["of lse alone", "of out alone"])
def test_one_gradient(gradient: int) -> None:
    qkv = heads("bf16", (), 63, 70, 20, 20)
    assert_on_chip(80, cellattn.attention, reference.attention, *qkv, kernels=KERNELS, without=[gradient])


def with_dropout(module: Any) -> Any:
    return lambda *qkv: module.attention(*qkv, dropout_p=0.3, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("arch", "dtype", "d"),
    [
        (80, "bf16", 20),
        (90, "bf16", 20),
        *exhaustive(
            *((arch, "bf16", d) for arch in (80, 89, 90) for d in (16, 64, 128)),
            *((80, dtype, d) for dtype in ("fp16", "fp32") for d in (32, 128, 256)),
        ),
    ],
)
def test_dropout(arch: int, dtype: str, d: int) -> None:
    """Values and gradients with the mask of the definition, and exactly its entries in the forward."""
    qkv = heads(dtype, (2,), 70, 140, d, d)
    assert_on_chip(arch, with_dropout(cellattn), with_dropout(reference), *qkv, kernels=KERNELS)


@pytest.mark.parametrize("queries", [140, 28], ids=["whole", "parts"])
def test_dropped_entries_are_those_of_the_definition(queries: int) -> None:
    """Read off an identity as values."""
    tokens = 1100 if queries == 28 else 100
    zero, one = torch.zeros(2, tokens, 16, dtype=torch.bfloat16), torch.eye(tokens, 100, dtype=torch.bfloat16).expand(2, -1, -1)
    with ptx.device(80):
        out, _ = with_dropout(cellattn)(zero[:, :queries], zero, one)
    shape = 2, min(queries, tokens), tokens
    want = reference.dropout_multiplier(shape, 0.3, torch.Generator().manual_seed(3))[..., :100]
    assert torch.equal(out != 0, want != 0)


@pytest.mark.parametrize("arch", [80, 89])
def test_heads_of_a_joint_projection(arch: int) -> None:
    """As they lie in memory: rows of 3 x 3 x 20, the second token first, so that no head starts at 16 bytes."""
    (x,) = (x.detach() for x in leaves((74, 180), dtype=torch.bfloat16))

    def through(module: Any) -> Any:
        def f(x: Tensor) -> Any:
            q, k, v = x[1:].unflatten(-1, (3, 3, 20)).movedim(0, -2).unbind(0)
            return module.attention(q, k, v)

        return f

    assert_on_chip(arch, through(cellattn), through(reference), x, kernels=KERNELS, parts=True)


@pytest.mark.parametrize(
    ("arch", "dtype", "size"),
    [(80, "fp32", 1e6), (90, "bf16", 1e7), *exhaustive((80, "fp16", 1e4))],
    ids=str,
)
def test_large_scores(arch: int, dtype: str, size: float) -> None:
    """Of two queries in three; those of the others are small. Gradients are those of scores in float64."""
    q, k, v = heads(dtype, (2,), 45, 70, 8, 6)
    q, k = ((x.double() * size**0.5).to(x.dtype) for x in (q, k))
    q[:, ::3] = (q[:, ::3].double() / size).to(q.dtype)
    with ptx.device(arch) as device:
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        result = cellattn.attention(*given)
        dout, dlse = (torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) for y in result)
        got = torch.autograd.grad(result, given, (dout, dlse))
    assert (result[1].abs() >= 710).any(), "no row has a large score"  # 2^10 in base 2
    assert {f"attention_bwd_kernel_large_{part}" for part in ("dq", "dkv")} <= set(device.launches)
    assert_attention_gradients(got, q, k, v, dout, dlse, 8**-0.5)
