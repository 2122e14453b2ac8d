"""Attention with a differentiable log-sum-exp: the first of the library's two primitives.

With s_ij = scale * q_i . k_j, LSE_i = log sum_j exp(s_ij) and P_ij = exp(s_ij - LSE_i), the gradient of the scores is

    dS_ij = P_ij (dP_ij - D_i) + P_ij dLSE_i = P_ij (dP_ij - (D_i - dLSE_i)),   D_i = sum_c dOut_ic Out_ic

so flash attention's backward gives it unchanged once its delta D is replaced by D - dLSE.

NaN and infinities come out where the dense formula has them, softmax(scale * q kᵀ) v and its gradient, on every device and in
every op made of this one:

    in                                          lse of row i   out of row i     gradient
    ------------------------------------------  -------------  ---------------  --------------------------------------------
    s_ij is NaN for some j (NaN in q_i or k_j)  NaN            NaN              of the row: NaN
    s_ij is +inf for some j, none is NaN        +inf           NaN              of the row: NaN
    s_ij is -inf, another s_ij is finite        without j      without j        that of a weight of 0
    s_ij is -inf for all j                      -inf           NaN              of the row: NaN
    no key is left by key_mask                  -inf           (has none)       0, whatever comes from above
    NaN or infinities in a key of the mask      no trace       (has none)       no trace; of that key exactly 0
    v_jc is NaN                                 no trace       NaN in column c  NaN in dq of every row and in dk of every key
    v_jc is infinite                            no trace       P_ij v_jc there  as 0 * inf = NaN and inf - inf = NaN have it
    upstream gradient of row i is NaN           -              -                of the row: NaN

"of the row": in dq_i, and in dk_j and dv_j of all keys j of the row, dv only where there is a gradient of out. A row that is
NaN stays so in the gradient where its upstream gradient is 0, since 0 * NaN is NaN: leave rows out of q, not out of the sum.
Other rows are as if the row were not there: no NaN of a row reaches lse, out, dq or a loss of another. So a row's losses
(`attention_kl`, `attention_bce`) are NaN where its lse is NaN, and NaN or infinite where that is infinite; they are 0 where it
has no edge. A score of -inf beside finite ones is a pair with P_ij = 0: it costs nothing where there is no edge, and +inf where
there is one; with the sigmoid link of `attention_bce`, on the CPU, +inf does the opposite. Dropout multiplies P_ij by 0 or
1 / (1 - p), and 0 * NaN is NaN: the table is the same, but that out has NaN where a dropped P_ij meets an infinite v_jc.

On the CPU the extension's loops do the work (`csrc/cpu/attention_rows_impl.h`). Without them, and where the processor
multiplies matrices of 16 bits, PyTorch's flash attention does. It computes D inside, as rowsum(dOut * Out), so there the
replacement is folded into the inputs: q, k, v get one column of zeros, Out a column of ones and dOut the column -dLSE. Then
rowsum(dOut * Out) = D - dLSE, and dP = dOut Vᵀ is unchanged because V's new column is zero. Either hides some of the table's
NaN, and PyTorch's backward rounds scores otherwise than its forward, so that P <= 1 is lost where scores are large. Inputs
that could show it are found beforehand, and go to the dense formula, in float64 and in blocks of rows, instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import frexp, sqrt
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._aligned import aligned_features, first_features
from .._check import FLOAT_DTYPES, number_of, require, require_same, require_tensor
from .._extension import AVAILABLE, fake
from .._modes import is_autocast, is_plain
from ._dropout import draw_dropout, multiplier, threshold_of
from ._operator import keep_missing_grads, operator, refuse_double_backward

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
if AVAILABLE:
    _attention_rows = torch.ops.cellattn.attention_rows.default
    _attention_rows_backward = torch.ops.cellattn.attention_rows_backward.default
    _is_ordinary = torch.ops.cellattn.is_ordinary.default
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_HAS_LOOPS = AVAILABLE and torch.cpu._is_avx2_supported()
_EXTENSION_DTYPES = torch.float32, torch.float64

_T = TypeVar("_T")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0,  # no 0.0: compiled with dynamic shapes, a float of a default is traced as an input
    generator: torch.Generator | None = None,
    attn_mask: None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention that also returns its log-sum-exp, both differentiable; no [Tq, Tk] tensor is made.

    Args:
        q: [..., H, Tq, D], float32, bfloat16, float16, or float64 on the CPU; any leading dimensions, or none.
        k: [..., H, Tk, D], Tk >= 1.
        v: [..., H, Tk, Dv].
        scale: factor of the scores, 1 / sqrt(D) if None. Beyond 2^32 or below 2^-32 in size q takes its power of two in the
            dtype of q, which is to have room for it, unless that is float16 or float64.
        dropout_p: probability in [0, 1) that an entry of the map is 0 in `out`; the others are divided by 1 - dropout_p, and
            lse is of the whole map. It is taken to the nearest 2^-16, in the division too, so that out is without bias. Which
            entries stay depends on the draw, the head, the row and the column alone, on every device.
        generator: a `torch.Generator` on the device of q for that draw, two numbers a call; the default one if None. Activation
            checkpointing draws the same again (see `sample_rows`). Without dropout nothing is drawn.
        attn_mask, is_causal, enable_gqa: of `scaled_dot_product_attention`, at their defaults alone: an error says what to use
            instead.

    Returns:
        out [..., H, Tq, Dv] in the dtype of q, and lse [..., H, Tq], the natural log of the softmax denominators, in
        float32 (float64 for float64 inputs). On the CPU large scores are made in float64. On a GPU out is of scores in float32:
        a score and its LSE are off by up to D + 2 roundings, of 2^-24 each, of S = scale sum_d |q_d| |k_d| (more where TF32 is
        allowed), and an entry of the map by up to 2^-23 (D + 2) S of itself; gradients of rows with |lse| >= 710 are of scores
        in float64 there too. From |lse| = 1.4e9 on (2^31 in base 2) a row may be NaN on a GPU: half a spacing of its largest
        score is then more than exp2 can take.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, naming the argument.
        RuntimeError: on double backward.
    """
    refuse_habits(attn_mask, is_causal, enable_gqa)
    q, k, v = checked_heads(q, k, v)
    threshold = threshold_of(dropout_p)
    q, scale = with_scale(q, scale)
    if q.is_cpu:
        return attend(q, k, v, scale, threshold, generator)
    out, lse = attend(aligned_features(q), aligned_features(k), aligned_features(v), scale, threshold, generator)
    return first_features(out, v.shape[-1]), lse


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, threshold: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """`attention` of checked heads, as the operators read them."""
    return _attention(q, k, v, None, scale, draw_dropout(threshold, generator, q.device), threshold)


def attention_logsumexp(q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Natural log of attention's softmax denominators, differentiable in q and k.

    Args:
        q: [..., Tq, D], float32, bfloat16, float16, or float64 on the CPU.
        k: [..., Tk, D].
        key_mask: bool [Tk] or [..., Tk] (broadcast over the leading dimensions), False for keys to leave out.
        scale: factor of the scores, 1 / sqrt(D) if None.

    Returns:
        lse [..., Tq], float32 (float64 for float64 inputs); -inf, with no gradient, where the mask keeps no key.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    q, k = checked_heads(q, k)
    if key_mask is not None:
        require_tensor("key_mask", key_mask, dtypes=(torch.bool,))
        require_same("device", q=q.device, key_mask=key_mask.device)
        fits = 1 <= key_mask.ndim < k.ndim and all(
            have in (want, 1) for have, want in zip(reversed(key_mask.shape), reversed(k.shape[:-1]), strict=False)
        )
        require(
            fits and key_mask.shape[-1] == k.shape[-2],
            lambda: (
                f"key_mask: expected shape [{k.shape[-2]}] or one that broadcasts to {list(k.shape[:-1])}, "
                f"got {list(key_mask.shape)}"
            ),
        )
    q, scale = with_scale(q, scale)
    return _attention(aligned_features(q), aligned_features(k), k.new_empty(*k.shape[:-1], 0), key_mask, scale, None, 0)[1]


def of_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, tensors of several dtypes in its own, as it has them for a product: q of a Linear, k of a norm."""
    if len({x.dtype for x in tensors if isinstance(x, Tensor)}) == 1:
        return tensors
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors):
        return tensors
    if not is_autocast(tensors[0]) or any(x.dtype == torch.float64 for x in tensors):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(tensors[0].device.type)) for x in tensors)


def refuse_habits(attn_mask: Any = None, is_causal: Any = False, enable_gqa: Any = False) -> None:
    """Refuse what `scaled_dot_product_attention` has and nothing here does, with what to use instead."""
    require(
        attn_mask is None,
        "attn_mask: expected None; `edge_attention` has heads that see their graph alone (masks= of the models), "
        "`graph_attention` and `attention_kl` draw heads to a graph softly, and `attention_logsumexp` has a key_mask",
    )
    require(not is_causal, "is_causal: expected False; genes have no order, a graph that has one is a mask of `edge_attention`")
    require(not enable_gqa, "enable_gqa: expected False; each head has keys of its own: k.repeat_interleave(groups, -3), v too")


def _grouped(x: Tensor, q: Tensor) -> str:
    """What to do with x of fewer heads than q, if it is that."""
    if x.ndim != q.ndim or x.ndim < 3 or x.shape[:-3] != q.shape[:-3] or not 0 < x.shape[-3] < q.shape[-3]:
        return ""
    groups, rest = divmod(q.shape[-3], x.shape[-3])
    return "" if rest else f"; grouped heads are spread out by .repeat_interleave({groups}, -3)"


def checked_heads(*tensors: Tensor, same_tokens: bool = False) -> tuple[Tensor, ...]:
    """(q [..., Tq, D], k [..., Tk, D]) or (q, k, v [..., Tk, Dv]), of one dtype, checked to fit each other.

    With `same_tokens` the shape of k is to be that of q.
    """
    if _are_heads(tensors, same_tokens):
        return tensors
    tensors = of_one_dtype(*tensors)
    q, k = tensors[:2]
    _check_qk(q, k)
    if same_tokens:
        require(k.shape == q.shape, lambda: f"k: expected the shape of q, {list(q.shape)}, got {list(k.shape)}")
    for v in tensors[2:]:
        _check_v(v, q, k)
    return tensors


def _are_heads(tensors: tuple[Any, ...], same_tokens: bool) -> bool:
    """Whether there is nothing to say, of plain tensors on the CPU, in a third of the time of checks that can name a fault."""
    if not is_plain(tensors):
        return False
    for x in tensors:
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
            return False
    q, k, *of_keys = tensors
    dtype, of_q, of_k = q.dtype, q.shape, k.shape
    if dtype not in FLOAT_DTYPES or k.dtype is not dtype:
        return False
    if len(of_q) < 2 or len(of_k) != len(of_q) or not (of_q[-1] and of_k[-2]):
        return False
    if of_q != of_k and (same_tokens or of_q[:-2] != of_k[:-2] or of_q[-1] != of_k[-1]):
        return False
    if not of_keys:
        return True
    of_v = of_keys[0].shape
    return of_keys[0].dtype is dtype and (of_v == of_k or of_v[:-1] == of_k[:-1])


def _check_qk(q: Tensor, k: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        require_tensor(name, x, dtypes=FLOAT_DTYPES)
        require(x.ndim >= 2, lambda: f"{name}: expected shape [..., tokens, head_dim], got {list(x.shape)}")
    require_same("dtype", q=q.dtype, k=k.dtype)
    require_same("device", q=q.device, k=k.device)
    require(q.shape[-1] >= 1, lambda: f"q: expected a head_dim >= 1, got shape {list(q.shape)}")
    require(
        q.shape[:-2] == k.shape[:-2] and q.shape[-1] == k.shape[-1],
        lambda: f"k: expected shape {[*q.shape[:-2], 'Tk', q.shape[-1]]}, to fit q, got {list(k.shape)}{_grouped(k, q)}",
    )
    require(k.shape[-2] >= 1, lambda: f"k: expected at least one token, got shape {list(k.shape)}")


def _check_v(v: Tensor, q: Tensor, k: Tensor) -> None:
    require_tensor("v", v, dtypes=FLOAT_DTYPES)
    require_same("dtype", q=q.dtype, v=v.dtype)
    require_same("device", q=q.device, v=v.device)
    require(
        v.shape[:-1] == k.shape[:-1],
        lambda: f"v: expected shape {[*k.shape[:-1], 'Dv']}, as k has, got {list(v.shape)}{_grouped(v, k)}",
    )


def with_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """(queries, factor) of the scores: 1 / sqrt(head_dim) for None, otherwise a finite number.

    Of a number that is very small or large q takes the power of two: the products q . k are summed in float32 before the
    factor, where they may be infinite or 0 though the scores are not.
    """
    if scale is None:
        return q, 1 / sqrt(q.shape[-1])
    scale = float(number_of("scale", scale))
    # no names for these: compiled with dynamic shapes, a float of a module is traced as an input
    if scale == 0 or 2.0**-32 <= abs(scale) <= 2.0**32 or q.dtype == torch.float64:
        return q, scale
    if q.dtype == torch.float16:  # the products of which float32 holds, and q might not take more
        most = torch.finfo(torch.float32).max
        require(abs(scale) <= most, lambda: f"scale: expected at most {most:.6g} in size beside float16, got {scale}")
        return q, scale
    scale, exponent = frexp(scale)
    while exponent:  # float32 holds no power of two beyond 2^127
        step = max(-100, min(exponent, 100))
        q, exponent = q * 2.0**step, exponent - step
    return q, scale


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of log-sum-exps, losses and CPU arithmetic: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------- operators


@operator("attention", leading=("q", "k", "v"), by_place=("draw",))
def _attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, draw: Tensor | None = None, threshold: int = 0
) -> tuple[Tensor, Tensor]:
    if not q.numel() and 0 in q.shape[:-1]:  # PyTorch's kernel divides by the number of queries
        return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
    keep = None
    if key_mask is not None:
        require(draw is None, "key_mask: expected None beside dropout")
        k, keep = _without_masked(k, key_mask)
    out, lse = _run((_rows, _flash, _dense), q, k, v, keep, scale, draw, threshold)
    return as_dtype(out, q.dtype), lse


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, draw: Tensor | None = None, threshold: int = 0
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


@operator("attention_backward", leading=("dout", "dlse", "q", "k", "v", "out", "lse"), by_place=("draw",))
def _attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    draw: Tensor | None = None,
    threshold: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    if not lse.numel() or (dout is None and dlse is None):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    if dout is None:  # the log-sum-exp is of the whole map
        draw, threshold = None, 0
    keep = None
    if key_mask is not None:
        k, keep = _without_masked(k, key_mask)
        if dlse is not None:
            dlse = dlse.masked_fill(~keep.any(-1, keepdim=True), 0)
    kernels = _rows_backward, _flash_backward, _dense_backward
    dq, dk, dv = _run(kernels, q, k, v, keep, scale, draw, threshold, dout, dlse, out, lse)
    if keep is not None:
        dk = dk.masked_fill_(~keep.unsqueeze(-1), 0)
    return (dq, dk, dv) if dq.dtype is q.dtype else (dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype))


@_attention_backward.register_fake
def _(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    draw: Tensor | None = None,
    threshold: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, scale, draw, threshold = inputs
    keep_missing_grads(ctx)
    ctx.save_for_backward(q, k, v, key_mask, *output, draw)
    ctx.scale, ctx.threshold = scale, threshold


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, draw = ctx.saved_tensors
    return *_attention_backward(dout, dlse, *tensors, ctx.scale, draw, ctx.threshold), None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_attention_backward, "attention")

# ------------------------------------------------------------------------------------------------------------ CUDA


@_attention.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import attention as kernels  # needs Triton

    return kernels.attention(*args)


@_attention_backward.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import attention as kernels

    return kernels.attention_backward(*args)


# ------------------------------------------------------------------------------------------------------------- CPU


# How much P may be off, relative to itself, because lse is rounded, and PyTorch's kernel sums a score in two orders: at most.
# Each is off by D + 2 spacings of D |q| |k|, and in practice by far less.
_LARGEST_ERROR = 1 / 32

# A rounding of the arithmetic.
_EPS = {dtype: torch.finfo(accumulation_dtype(dtype)).eps for dtype in FLOAT_DTYPES}

# Scores held at once by the dense formula.
_BLOCK = 2**20


def is_ordinary(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether the kernels are right: no value is NaN or infinite, and no score can be larger than rounding allows."""
    share = _share(q, scale)
    # not by way of autograd, nor of what makes memory for zeros that have none
    if AVAILABLE and q.dtype in _EXTENSION_DTYPES and not (q._is_zerotensor() or k._is_zerotensor() or v._is_zerotensor()):
        return bool(_is_ordinary.redispatch(_CPU, q.contiguous(), k.contiguous(), v.contiguous(), share))
    of_q, of_k, of_v = _largest(q, k, v)
    return share * (of_q * of_k) <= 1 and of_v < torch.inf


def _largest_rounding(q: Tensor, k: Tensor, scale: float) -> float:
    """By how much two sums of one score may differ at most; NaN if an entry is."""
    of_q, of_k = _largest(q, k)
    return _rounding(q, scale, of_q * of_k)


def _finite_rounding(q: Tensor, k: Tensor, scale: float) -> float:
    """`_largest_rounding` of the finite entries: an infinity somewhere says nothing of the rows and keys that have none."""
    rounding = _largest_rounding(q, k, scale)
    return rounding if rounding < torch.inf else _largest_rounding(_finite(q), _finite(k), scale)


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def _rounding(q: Tensor, scale: float, product: float) -> float:
    """`_largest_rounding` for the largest |q| |k|."""
    return _LARGEST_ERROR * _share(q, scale) * product


def _share(q: Tensor, scale: float) -> float:
    """Of the rounding that is allowed, what each |q| |k| takes."""
    d = q.shape[-1]
    return 2 * (d + 2) * d * _EPS[q.dtype] * abs(scale) / _LARGEST_ERROR


def rounding_of(q: Tensor, k: Tensor, scale: float) -> float:
    """By how much two sums of a score may differ, where P <= 1 has no room for it; 0 elsewhere and where that is infinite."""
    rounding = _finite_rounding(q, k, scale)
    return rounding if _LARGEST_ERROR < rounding < torch.inf else 0.0


def score_dtype(q: Tensor, k: Tensor, scale: float, added: Tensor | None = None) -> torch.dtype:
    """dtype in which scores, with what is added to them, are to be made: float64 where float32 would leave little of P."""
    if accumulation_dtype(q.dtype) == torch.float64:
        return torch.float64
    rounding = _largest_rounding(q, k, scale)
    if added is not None:  # a sum and its log-sum-exp are off by half a spacing each
        rounding += 2 * _EPS[q.dtype] * _largest(added)[0]
    return torch.float32 if rounding <= _LARGEST_ERROR else torch.float64


def unrounded(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, lse [..., Tq]) in the dtype of lse; in float64 where scores are so large that float32 leaves little of P.

    There lse is made again, to be of the same scores, unless rounding does not explain how it differs: then it is not that of
    these keys, but of others, which the caller had a mind to.
    """
    rounding = _finite_rounding(q, k, scale)
    if lse.dtype == torch.float64 or rounding <= _LARGEST_ERROR:
        return q.to(lse.dtype), k.to(lse.dtype), lse
    q, k, lse = q.double(), k.double(), lse.double()
    exact = [(scale * rows @ k.mT).logsumexp(-1) for rows in _row_blocks(q, k)]
    total = torch.cat(exact, -1) if exact else lse
    return q, k, torch.where((total - lse).abs() <= rounding, total, lse)


def _largest(*tensors: Tensor) -> tuple[float, ...]:
    """The largest absolute value of each; NaN if there is one, 0 of none."""
    pairs = (x.detach().aminmax() if x.numel() else (0.0, 0.0) for x in tensors)
    return tuple(max(-float(low), float(high)) for low, high in pairs)


def _run(
    kernels: tuple[Callable[..., _T | None], Callable[..., _T], Callable[..., _T]],
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, draw: Tensor | None, threshold: int, *rest: Any,
) -> _T:  # fmt: skip
    """The extension's kernel, PyTorch's or the dense formula of the other arguments.

    Where the processor has vectors that the extension knows and no matrices of 16 bits, the extension's is the faster one. It
    looks at the values itself.
    """
    rows, flash, dense = kernels
    dtype = q.dtype
    if dtype not in _IN_LOOPS:
        require_tensor("q", q, dtypes=FLOAT_DTYPES)
    if _IN_LOOPS[dtype] if draw is None else AVAILABLE:
        if dtype not in _EXTENSION_DTYPES:
            q, k, v = q.float(), k.float(), v.float()
        result = rows(q.contiguous(), k.contiguous(), v.contiguous(), keep, scale, draw, threshold, *rest)
        if result is not None:
            return result
    elif draw is None and is_ordinary(q, k, v, scale):
        return flash(q, k, v, keep, scale, draw, threshold, *rest)
    return dense(q, k, v, keep, scale, draw, threshold, *rest)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes longer to find that there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype PyTorch's kernel runs in: 16 bits only where the processor multiplies matrices of them (AMX).

    With AVX512-BF16 alone float32 is 2.4 times faster at 64 tokens and 1.2 times slower at 4,096; without instructions for
    float16 (an EPYC with AVX-512) it is 2.6 to 4.7 times faster.
    """
    native = {torch.bfloat16: torch.cpu._is_amx_tile_supported, torch.float16: torch.cpu._is_amx_fp16_supported}
    return torch.float32 if dtype in native and not native[dtype]() else dtype


def _in_loops() -> dict[torch.dtype, bool]:
    """Whether the extension's loops are the faster ones, without dropout."""
    return {dtype: _HAS_LOOPS and _kernel_dtype(dtype).itemsize > 2 for dtype in FLOAT_DTYPES}


_IN_LOOPS = _in_loops()


def _without_masked(k: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(k with zeros where the mask leaves a key out, the mask as [..., Tk])"""
    keep = key_mask.expand(k.shape[:-1])
    return k.masked_fill(~keep.unsqueeze(-1), 0), keep


def _flash(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, draw: None, threshold: int
) -> tuple[Tensor, Tensor]:
    dim_v = v.shape[-1]
    width = max(q.shape[-1], dim_v)
    mask = None if keep is None else _additive_mask(keep, q, accumulation_dtype(q.dtype))
    heads = (_heads(x, width, _kernel_dtype(q.dtype)) for x in (q, k, v))
    out, lse = _FLASH(*heads, attn_mask=mask, scale=scale)
    lse = lse.contiguous().view(q.shape[:-1])
    if keep is not None:
        lse = lse.masked_fill_(~keep.any(-1, keepdim=True), -torch.inf)
    return _unpad(out, dim_v, (*q.shape[:-1], dim_v), q.dtype), lse


def _flash_backward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, draw: None, threshold: int,
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # A gradient of lse keeps the range and precision of float32.
    dtype = _kernel_dtype(q.dtype) if dlse is None else lse.dtype
    dim, dim_v = q.shape[-1], v.shape[-1]
    width = max(dim, dim_v + (dlse is not None))
    if dout is None:
        dout = torch.zeros_like(out)
    # [B, H, T, width]
    q4, k4, v4, out4, dout4 = (_heads(x, width, dtype) for x in (q, k, v, out, dout))
    lse4 = lse.reshape(q4.shape[:-1])
    if dlse is not None:
        out4[..., dim_v] = 1
        torch.neg(dlse.reshape(lse4.shape), out=dout4[..., dim_v])
    mask = None
    if keep is not None:
        mask = _additive_mask(keep, q, lse.dtype)
        lse4 = lse4.masked_fill(lse4 == -torch.inf, 0)  # rows without a key: what the kernel itself returned for them
    parts = _query_parts(q4.shape[0] * q4.shape[1], q4.shape[2])
    if parts > 1:
        q4, out4, dout4 = (_split_queries(x, parts) for x in (q4, out4, dout4))
        lse4 = _split_queries(lse4.unsqueeze(-1), parts).squeeze(-1)
        k4, v4 = (x.flatten(0, 1).expand(parts, -1, -1, -1) for x in (k4, v4))
        if mask is not None:
            mask = mask[:, :, :1].flatten(0, 1).expand(parts, -1, q4.shape[2], -1)
    dq, dk, dv = _FLASH_BACKWARD(dout4, q4, k4, v4, out4, lse4, 0.0, False, attn_mask=mask, scale=scale)
    if parts > 1:
        dq = dq.transpose(0, 1).flatten(1, 2)[:, : q.shape[-2]]
        dk, dv = dk.sum(0), dv.sum(0)
    return _unpad(dq, dim, q.shape, q.dtype), _unpad(dk, dim, k.shape, k.dtype), _unpad(dv, dim_v, v.shape, v.dtype)


@fake("attention_rows")
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, draw: Tensor | None, scale: float, threshold: int, rounding: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])


@fake("attention_rows_backward")
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@fake("is_ordinary")
def _(q: Tensor, k: Tensor, v: Tensor, rounding: float) -> Tensor:
    return q.new_empty((), dtype=torch.bool)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, draw: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor] | None:
    """None, as of the backward, for values with which the loops are not right: see `is_ordinary`."""
    mask = None if keep is None else keep.contiguous()
    out, lse = _attention_rows(q, k, v, mask, draw, scale, threshold, _share(q, scale))
    return (out, lse) if lse.numel() else None


def _rows_backward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, draw: Tensor | None, threshold: int,
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    given_v = v
    mask = None if keep is None else keep.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    if dout is None:  # nor is anything of the dropped map
        dout = out = q.new_empty(*q.shape[:-1], 0)
        v = v.new_empty(*v.shape[:-1], 0)
        draw, threshold = None, 0
    elif dout.dtype is not lse.dtype:
        dout, out = dout.to(lse.dtype), out.to(lse.dtype)
    dq, dk, dv = _attention_rows_backward(
        dout.contiguous(), dlse, q, k, v, mask, out.contiguous(), lse.contiguous(), draw, scale, threshold, _share(q, scale)
    )
    if not dq.numel():
        return None
    return dq, dk, dv if v is given_v else torch.zeros_like(given_v)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, draw: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor]:
    out, lse = [], []
    dtype = accumulation_dtype(q.dtype)
    k, v = k.double(), v.double()
    first = 0
    for rows in _row_blocks(q, k):
        scores = _scores(rows, k, keep, scale)
        lse.append(scores.logsumexp(-1).to(dtype))
        p = scores.softmax(-1)
        if draw is not None:
            p = p * multiplier(draw, threshold, p, first)
        out.append((p @ v).to(q.dtype))
        first += rows.shape[-2]
    return torch.cat(out, -2), torch.cat(lse, -1)


def _dense_backward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, draw: Tensor | None, threshold: int,
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keys, values = k.double(), v.double()
    dq, dk, dv = [], keys.new_zeros(keys.shape), values.new_zeros(values.shape)  # contiguous, as compiled code is told
    first = 0
    for queries in _row_blocks(q, k):
        here = slice(first, first := first + queries.shape[-2])
        p = _scores(queries, keys, keep, scale).softmax(-1)
        if keep is not None:
            p = p.masked_fill_(~keep.unsqueeze(-2), 0)
        ds = p.new_zeros(())
        if dout is not None:
            z = 1.0 if draw is None else multiplier(draw, threshold, p, here.start)
            above = dout[..., here, :].double()
            dv += (p * z).mT @ above
            dp = (above @ values.mT) * z
            ds = dp - (p * dp).sum(-1, keepdim=True)
        if dlse is not None:
            ds = ds + dlse[..., here, None]
        ds = scale * p * ds
        dq.append((ds @ keys).to(q.dtype))
        dk += ds.mT @ queries.double()
    return torch.cat(dq, -2), dk.to(k.dtype), dv.to(v.dtype)


def _row_blocks(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return q.split(max(1, _BLOCK // (k.shape[:-1].numel())), -2)


def _scores(q: Tensor, k: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """scale * q kᵀ in the dtype of k, -inf where a key is left out."""
    scores = (scale * q.to(k.dtype)) @ k.mT
    return scores if keep is None else scores.masked_fill_(~keep.unsqueeze(-2), -torch.inf)


def _heads(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[..., T, D] -> [B, H, T, width], zeros on the right; rows are contiguous and apart, which PyTorch's kernel relies on."""
    if x.dtype != dtype:
        x = x.to(dtype)
    if x._is_zerotensor():  # of which the dispatcher makes one number for all places
        x = torch.zeros(x.shape, dtype=dtype)
    if x.ndim > 4:
        x = x.flatten(0, -4)
    while x.ndim < 4:
        x = x.unsqueeze(0)
    if x.shape[-1] < width:  # a tensor whose heads are innermost ("channels last") is padded to one of such strides
        return F.pad(x, (0, width - x.shape[-1])).contiguous()
    *_, row_stride, stride = x.stride()
    return x if stride == 1 and row_stride >= width else x.contiguous()


def _unpad(x: Tensor, width: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The first columns of the kernel's result, in the shape and dtype of an input, contiguous."""
    if x.shape[-1] > width:
        x = x[..., :width]
    if x.dtype != dtype:
        x = x.to(dtype)
    x = x.contiguous()
    return x if x.shape == shape else x.view(shape)


def _additive_mask(keep: Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, Tq, Tk] of 0 and -inf, as a view of one row a head."""
    mask = torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, -torch.inf)
    mask = _heads(mask.unsqueeze(-2), 0, dtype)
    return mask.expand(-1, -1, q.shape[-2], -1)


def _query_parts(num_heads: int, num_queries: int) -> int:
    """Into how many parts to cut the queries: PyTorch's CPU backward runs one thread a head, and few heads leave cores idle."""
    wanted = -(-torch.get_num_threads() // num_heads)
    return max(1, min(wanted, num_queries // 256))


def _split_queries(x: Tensor, parts: int) -> Tensor:
    """[B, H, T, d] -> [parts, B H, ceil(T / parts), d]; rows of zeros fill the last part and add nothing to any gradient."""
    length = -(-x.shape[2] // parts)
    x = F.pad(x, (0, 0, 0, parts * length - x.shape[2]))
    return x.reshape(-1, parts, length, x.shape[3]).transpose(0, 1).contiguous()
