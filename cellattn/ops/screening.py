"""What scores very many sets of genes out of tables of what each gene brings: forward alone, nothing is learned here.

A set is a row of *entries*, int64 [B, k], places in the tables. Products are in the dtype of their weights, all else in that of
the tables. On a CPU, of tables in float32 and weights in that or bfloat16, the extension takes a block of sets of up to 4 genes
through all steps while it is in the cache; anything else is the same in PyTorch's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._extension import AVAILABLE, fake

MAX_SIZE = 4  # genes of a set that the extension takes
WIDTH = 16  # its rows are padded to a multiple of this


def padded(x: Tensor) -> Tensor:
    """x [..., D] with zeros behind it, as the extension reads rows."""
    return F.pad(x, (0, -x.shape[-1] % WIDTH)).contiguous()


class ReadoutTables(NamedTuple):
    """Of M entries: y_e = norm_1(x_e + sum_fh p_efh value_fh), z_e = norm_2(y_e + FFN(y_e)); p by softmax over f in the set.

    Rows of query, key, value, x, norms and down_bias are `padded`. Without norms weights and biases are None. A null sink is
    one more f.
    """

    query: Tensor  # [M, D / H, H padded], times the scale
    key: Tensor  # [M, D / H, H padded]
    value: Tensor  # [M, H, W], through the output projection
    x: Tensor  # [M, W], and the output projection's bias
    weight1: Tensor | None  # [W]
    bias1: Tensor | None  # [W]
    eps1: float
    up: Tensor  # [hidden, D]
    up_bias: Tensor  # [hidden]
    down: Tensor  # [D, hidden]
    down_bias: Tensor  # [W]
    weight2: Tensor | None  # [W]
    bias2: Tensor | None  # [W]
    eps2: float
    null_score: Tensor | None = None  # [M, H]
    null_value: Tensor | None = None  # [H, W], through the output projection


def readout_mean(entries: Tensor, tables: ReadoutTables) -> Tensor:
    """Mean over each set of z_e: [B, D]."""
    t, dim = tables, tables.up.shape[1]
    plain = t.weight1 is not None and t.null_score is None
    if plain and _extension_takes(entries, t.up, t.x):
        return torch.ops.cellattn.screen_readout(entries.contiguous(), *t[: t._fields.index("null_score")])
    score = torch.einsum("bedh,bfdh->bhef", t.query[entries], t.key[entries])[:, : t.value.shape[1]]
    value = t.value[entries].transpose(1, 2).flatten(0, 1)  # [B H, k, W]
    if t.null_score is not None and t.null_value is not None:
        score = torch.cat([score, t.null_score[entries].transpose(1, 2)[..., None]], -1)
        value = torch.cat([value, t.null_value.repeat(len(entries), 1)[:, None]], 1)
    attended = (score.softmax(-1).flatten(0, 1) @ value).unflatten(0, (len(entries), -1)).sum(1)
    y = _norm((t.x[entries] + attended)[..., :dim], t.weight1, t.bias1, t.eps1)
    z = y + linear(F.gelu(linear(y, t.up, t.up_bias)), t.down, t.down_bias[:dim])
    return _norm(z, t.weight2, t.bias2, t.eps2).mean(1)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """A LayerNorm with `padded` weights, or nothing."""
    if weight is None or bias is None:
        return x
    dim = x.shape[-1]
    return F.layer_norm(x, (dim,), weight[:dim], bias[:dim], eps)


class CrossTables(NamedTuple):
    """Of R entries and N genes, whose scores s add up over a set: w = exp(s - max_n s), so that prod_e w_en are its weights."""

    w: Tensor  # [R, H, N]
    value: Tensor  # [H, N, D / H + 1]: of a gene that is present, times `bias`, and `bias`
    bias: Tensor  # [H, N], what all sets have in their weights
    add: Tensor  # [M, D]: its sum over the set is added to the result
    change: Tensor  # [M, D]: the value of an entry's gene in its set, less that of the gene as it is present


def cross_attention(entries: Tensor, rows: Tensor, genes: Tensor, tables: CrossTables) -> tuple[Tensor, Tensor]:
    """Weighted means over all genes, each set's own with their values in it, and what the weights add up to.

    Args:
        entries, rows, genes: int64 [B, k], places in M, R and N.

    Returns:
        [B, D], and [B, H], which is small where the weights underflowed.
    """
    t = tables
    if _extension_takes(entries, t.value, t.add):
        sets = (x.contiguous() for x in (entries, rows, genes))
        return torch.ops.cellattn.screen_cross_attention(*sets, *t)
    w = t.w[rows].prod(1).transpose(0, 1)  # [H, B, N]
    sums = (w.to(t.value.dtype) @ t.value).to(t.add.dtype)
    beta = (w * t.bias[:, None]).gather(2, genes.expand(len(w), -1, -1))  # [H, B, k]
    change = t.change[entries].unflatten(-1, (len(w), -1))  # [B, k, H, D / H]
    mean = (sums[..., :-1] + torch.einsum("hbk,bkhd->hbd", beta, change)) / sums[..., -1:]
    return t.add[entries].sum(1) + mean.transpose(0, 1).flatten(1), sums[..., -1].T


def mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    """down . activation(up x + up_bias): x [B, D], up [hidden, D], up_bias and down [hidden] -> [B]."""
    if activation is F.gelu and _extension_multiplies(up, x):
        return torch.ops.cellattn.screen_mlp(x.contiguous(), up.contiguous(), up_bias, down)
    return activation(linear(x, up, up_bias)) @ down


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, the product in the dtype of the weight, the result in that of x."""
    y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return y if bias is None else y + bias


def _extension_takes(entries: Tensor, weight: Tensor, table: Tensor) -> bool:
    return 1 <= entries.shape[1] <= MAX_SIZE and _extension_multiplies(weight, table)


def _extension_multiplies(weight: Tensor, x: Tensor) -> bool:
    return AVAILABLE and x.device.type == "cpu" and x.dtype == torch.float32 and weight.dtype in (torch.float32, torch.bfloat16)


@fake("screen_readout")
def _(sets: Tensor, query: Tensor, key: Tensor, value: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(sets.shape[0], rest[3].shape[1])


@fake("screen_cross_attention")
def _(sets: Tensor, rows: Tensor, genes: Tensor, w: Tensor, value: Tensor, bias: Tensor, add: Tensor, change: Tensor) -> Any:
    return add.new_empty(sets.shape[0], add.shape[1]), add.new_empty(sets.shape[0], w.shape[1])


@fake("screen_mlp")
def _(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape[0])
