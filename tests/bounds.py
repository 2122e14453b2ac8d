"""How far rounding alone may take a result from its definition: running error analysis of the dense reference.

A `Bounded` tensor holds exact values (computed in float64), their sizes (the same expression of absolute values: what is added
up before anything cancels) and bounds on the errors that arithmetic of unit roundoff u makes in them. Every operation of the
reference, forward and backward, hands the errors of its arguments on through its derivative and adds roundings of its own:

                  size           error, to first order in u
    a + b         |a| + |b|      e_a + e_b + u size
    a b           |a| |b|        |a| e_b + |b| e_a + u size
    sum_j a_j     sum_j |a_j|    sum_j e_j + g(n) size
    A B           |A| |B|        e_A |B| + |A| e_B + g(n) size
    f(a)          |f(a)|         |f'(a)| e_a + 2u size           two units where a function is not rounded correctly

g(n) = min(n, 4 sqrt(n)) u holds for n terms added in any order, in blocks, with or without fused multiply-adds, by any number
of threads: n u always, and 4 sqrt(n) u with a probability above 0.999 even where every partial sum is as large as the size
(Higham and Mary, A new approach to probabilistic rounding error analysis, 2019). Roundings are counted by sizes, which are
the same however the terms are arranged. Nothing here is measured, so nothing depends on the machine that runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# An implementation rounds what the definition does not: a scale folded into q, a softmax rescaled block by block, delta from
# dOut and Out instead of from P and dP. Each repeats a rounding that is counted here once.
SLACK = 2.0


class Arithmetic(NamedTuple):
    """Unit roundoffs: of sums, of what is computed and then multiplied as a matrix, and of exponentials."""

    unit: float
    operand: float
    least: float  # the least positive operand
    exp: float

    def sum(self, n: Tensor) -> Tensor:
        """g(n) of n terms that are not 0."""
        return torch.minimum(n, 4 * n.sqrt()) * self.unit


# PyTorch's attention for half precision on a CPU takes 2^x for 1 + x plus a cubic, which is off by up to 1.07e-4.
FAST_EXP = 2.0**-13


def arithmetic_of(dtype: torch.dtype, *, fast_exp: bool = True) -> Arithmetic:
    """Sums in float32 (float64 for float64); what is computed on the way may be rounded to the dtype to be multiplied."""
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    fast = fast_exp and dtype in (torch.float16, torch.bfloat16)
    return Arithmetic(unit, torch.finfo(dtype).eps / 2, least(dtype), FAST_EXP if fast else 2 * unit)


def least(dtype: torch.dtype) -> float:
    """The least positive number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


# ----------------------------------------------------------------------------------------------------------- comparing


def assert_within_rounding(op: Callable[..., Any], reference: Callable[..., Any], *inputs: Tensor, parts: bool = False) -> None:
    """Every entry of every output and gradient of the op is as near to the reference's as rounding lets it be.

    Inputs are exact in their dtype, which is that of the results or narrower; gradients are of a random linear function of
    all outputs.

    Args:
        parts: results are sums of parts that were rounded to their dtype one by one, as gradients of a composition of ops are.
    """
    given = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = as_list(op(*given))
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, dtype=torch.float64, generator=g).to(y.dtype) for y in outputs]
    got = [*outputs, *gradients(outputs, given, upstream)]
    names = [f"output {i}" for i in range(len(outputs))] + [f"gradient {i}" for i in range(len(inputs))]
    for name, a, b in zip(names, got, with_bounds(reference, inputs, upstream), strict=True):
        assert_within(a, b, name, parts=parts)


def with_bounds(
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None] = (),
    dtype: torch.dtype | None = None,
    fast_exp: bool = True,
) -> list[Bounded]:
    """Outputs of the reference and, with an upstream gradient (or None) for each, the gradients of the inputs.

    Args:
        dtype: of the arithmetic's operands, that of the first input if None.
        fast_exp: whether exponentials of half precision may be FAST_EXP off, which a GPU's are not.
    """
    arithmetic = arithmetic_of(inputs[0].dtype if dtype is None else dtype, fast_exp=fast_exp)
    exact = [Bounded.exact(x.detach().double(), arithmetic).requires_grad_() for x in inputs]
    results = as_list(reference(*exact))
    if upstream:
        given = [None if dy is None else Bounded.exact(dy.detach().double(), arithmetic) for dy in upstream]
        results += gradients(results, exact, given)
    results = [y.detach() for y in results]
    return [y if isinstance(y, Bounded) else Bounded.exact(y, arithmetic) for y in results]


def assert_within(got: Tensor, want: Bounded, name: str = "result", *, parts: bool = False) -> None:
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    ratio = ratio_to_bound(got, want, parts=parts)
    assert ratio <= 1, f"{name}: {ratio:.2f} times as far from the reference as rounding explains"


def ratio_to_bound(got: Tensor, want: Bounded, *, parts: bool = False) -> float:
    """The largest error of an entry as a share of its bound; infinite for one that is not finite where it should be."""
    eps = torch.finfo(got.dtype).eps
    # Rounded to nearest, to half a spacing, and as much again to spare.
    stored = eps * want.value.abs() + (eps / 2 * want.magnitude if parts else 0)
    # What is below the smallest normal number may be flushed to 0, though not in half precision, where that is large.
    floor = torch.finfo(got.dtype).smallest_normal if got.dtype.itemsize > 2 else least(got.dtype)
    bound = SLACK * want.error + stored + floor
    got = got.detach().double()
    ratio = torch.where(got == want.value, 0, (got - want.value).abs() / bound).nan_to_num(nan=torch.inf)
    return float(ratio.max()) if ratio.numel() else 0.0


def assert_attention_gradients(
    got: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, scale: float,
    mask: Tensor | None = None, multiplier: Tensor | float = 1.0, added: Tensor | None = None,
) -> None:  # fmt: skip
    """As near to their definition as rounding explains, see `attention_gradient_ratios`."""
    for name, ratio in attention_gradient_ratios(got, q, k, v, dout, dlse, scale, mask, multiplier, added).items():
        assert ratio <= 1, f"{name}: {ratio:.2f} times as far from its definition as rounding explains"


def attention_gradient_ratios(
    got: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, scale: float,
    mask: Tensor | None = None, multiplier: Tensor | float = 1.0, added: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """dq, dk and dv of attention where rows whose |LSE| is 2^10 and more, in base 2, have their scores made in float64: the
    largest error of an entry of each as a share of its bound, infinite for one that is not finite.

    There P = 2^x is off by the roundings of two sums of d products in float64, and in float32 of x, of 2^x and of the logarithm
    of a sum of as many P as there are keys; all else is computed in more digits than those. In the other rows P is off by the
    roundings of the two sums and of LSE in float32, and every term of a sum by a few spacings of the dtype. To their sums, in
    the dtype, those of the first are added. What is below the least number of the dtype may come out as 0.

    Args:
        added: float64, what the scores get beside q . k, -inf where there is none.
    """
    kind, eps, single = q.dtype, torch.finfo(q.dtype).eps, torch.finfo(torch.float32)
    q, k, v, dout, dlse = (x.detach().double() for x in (q, k, v, dout, dlse))
    scores, size = scale * q @ k.mT, abs(scale) * q.abs() @ k.mT.abs()
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-2), -torch.inf)
    if added is not None:
        scores, size = scores + added, size + added.abs().nan_to_num(posinf=0)
    p, lse = scores.softmax(-1), scores.logsumexp(-1, keepdim=True).abs()
    is_large, of_score = lse >= 2**10 * math.log(2), 2 * (q.shape[-1] + 2) * (size + lse)
    of_large = p * (of_score * torch.finfo(torch.float64).eps + (8 + math.log2(k.shape[-2])) * single.eps)
    of_large += 2 * single.eps * torch.special.entr(p) + single.smallest_normal  # P |x|, and P that is flushed to 0
    off = torch.where(is_large, of_large, p * (8 * eps + of_score * single.eps))
    dp, dp_size = (dout @ v.mT) * multiplier, (dout.abs() @ v.mT.abs()) * multiplier
    delta, delta_size = ((p * x).sum(-1, keepdim=True) for x in (dp, dp_size))
    ds, ds_off = p * (dp - delta + dlse[..., None]), off * (dp_size + delta_size + dlse.abs()[..., None])
    ds_off += p * (off * dp_size).sum(-1, keepdim=True)
    sums = {
        "dq": (scale * ds @ k, abs(scale) * ds_off @ k.abs(), k),
        "dk": (scale * ds.mT @ q, abs(scale) * ds_off.mT @ q.abs(), q),
        "dv": ((p * multiplier).mT @ dout, (off * multiplier).mT @ dout.abs(), dout),
    }
    ratios = {}
    for (name, (want, bound, others)), found in zip(sums.items(), got, strict=True):
        floor = least(kind) * others.abs().sum(-2).amax() if kind.itemsize == 2 else torch.finfo(kind).smallest_normal
        bound = bound + eps * want.abs() + floor
        ratios[name] = float(((found.double() - want).abs() / bound).nan_to_num(nan=torch.inf).max())
    return ratios


def as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor | None]) -> list[Tensor]:
    chosen = [(y, dy) for y, dy in zip(outputs, upstream, strict=True) if dy is not None and y.requires_grad]
    if not chosen:
        return [torch.zeros_like(x) for x in inputs]
    ys, dys = zip(*chosen, strict=True)
    return list(torch.autograd.grad(ys, inputs, dys, allow_unused=True, materialize_grads=True))


# ------------------------------------------------------------------------------------------------------- error analysis


class Bounded(Tensor):
    """Exact values, their sizes, and a bound on the error of each."""

    def __new__(cls, value: Tensor, *_: Any) -> Bounded:
        return Tensor._make_wrapper_subclass(cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device)

    def __init__(self, value: Tensor, magnitude: Tensor, error: Tensor, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.value, self.magnitude, self.error, self.arithmetic = value, magnitude, error, arithmetic

    @staticmethod
    def exact(value: Tensor, arithmetic: Arithmetic) -> Bounded:
        return Bounded(value, value.abs(), torch.zeros_like(value), arithmetic)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Bounded({self.value}, error={self.error})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        arithmetic = next(x.arithmetic for x in tree_leaves((args, kwargs)) if isinstance(x, Bounded))
        packet = func.overloadpacket
        if packet in RULES:
            return RULES[packet](arithmetic, *args, **kwargs)
        if packet in LINEAR or packet in SCATTERING:
            results = [func(*tree_map(f, args), **tree_map(f, kwargs)) for f in (value_of, magnitude_of, error_of)]
            if packet in SCATTERING:  # as many terms as come together in one place
                count = func(*tree_map(count_of, args), **tree_map(count_of, kwargs))
                results[2] += arithmetic.sum(count) * results[1]
            return tree_map(lambda v, m, e: Bounded(v, m, e, arithmetic), *results)
        if func in decomposition_table and packet not in CONSTANT:
            return decomposition_table[func](*args, **kwargs)
        if (composed := func.decompose(*args, **kwargs)) is not NotImplemented:
            return composed
        out = func(*tree_map(value_of, args), **tree_map(value_of, kwargs))
        if packet in CONSTANT and out.is_floating_point():
            return Bounded.exact(out, arithmetic)
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(out)):
            raise NotImplementedError(f"no rule for the error of {func}")
        return out


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Bounded) else x


def magnitude_of(x: Any) -> Any:
    if isinstance(x, Bounded):
        return x.magnitude
    return x.abs() if isinstance(x, Tensor) and x.is_floating_point() else x


def error_of(x: Any) -> Any:
    """0 of a tensor without bounds; indices, masks and numbers stay what they are."""
    if isinstance(x, Bounded):
        return x.error
    return torch.zeros_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x


def count_of(x: Any) -> Any:
    """1 of every entry that is not 0."""
    return (value_of(x) != 0).double() if isinstance(x, Tensor) and x.is_floating_point() else x


def fields(x: Any, arithmetic: Arithmetic) -> tuple[Any, Any, Any]:
    """Value, size and error of an operand. A constant, a number or a tensor without bounds, has been rounded once."""
    if isinstance(x, Bounded):
        return x.value, x.magnitude, x.error
    if isinstance(x, Tensor) and not x.is_floating_point():
        x = x.double()
        return x, x.abs(), torch.zeros_like(x)
    return x, abs(x), arithmetic.unit * abs(x)


def rounded(value: Tensor, magnitude: Tensor, error: Tensor, arithmetic: Arithmetic, unit: float | None = None) -> Bounded:
    """The result of an operation that rounds, by default once; an infinite one is exact."""
    error = error + (arithmetic.unit if unit is None else unit) * magnitude
    return Bounded(value, magnitude, torch.where(value.isfinite(), error, 0), arithmetic)


# What moves entries and rounds nothing: the same operation on values, sizes and errors.
LINEAR = {
    aten._reshape_alias, aten._to_copy, aten._unsafe_view, aten.alias, aten.as_strided, aten.cat, aten.clone,
    aten.constant_pad_nd, aten.copy_, aten.detach, aten.diagonal, aten.expand, aten.flip, aten.gather, aten.index,
    aten.index_copy, aten.index_select, aten.permute, aten.repeat, aten.select, aten.select_backward, aten.slice,
    aten.slice_backward, aten.split, aten.squeeze, aten.stack, aten.t, aten.transpose, aten.unbind, aten.unsqueeze, aten.view,
    aten.where,
}  # fmt: skip

# What adds to places that indices name.
SCATTERING = {aten.index_add, aten.index_put, aten.scatter_add}

# What is made from a shape.
CONSTANT = {
    aten.empty_like, aten.full_like, aten.new_empty, aten.new_empty_strided, aten.new_full, aten.new_ones, aten.new_zeros,
    aten.ones_like, aten.zeros_like,
}  # fmt: skip

RULES: dict[Any, Callable[..., Any]] = {}


def rule(*packets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(packets, f))
        return f

    return register


# Of x and f(x), the absolute value of the derivative.
SLOPES: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    aten.exp: lambda x, y: y,
    aten.expm1: lambda x, y: y + 1,
    aten.log: lambda x, y: 1 / x.abs(),
    aten.log1p: lambda x, y: 1 / (1 + x),
    aten.reciprocal: lambda x, y: y.square(),
    aten.rsqrt: lambda x, y: 0.5 * y**3,
    aten.sigmoid: lambda x, y: y * (1 - y),
    aten.sqrt: lambda x, y: 0.5 / y,
    aten.tanh: lambda x, y: 1 - y.square(),
}


def function(f: Callable[[Tensor], Tensor], slope: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Bounded]:
    def bounded(arithmetic: Arithmetic, x: Bounded) -> Bounded:
        y = f(x.value)
        error = torch.where(x.error > 0, slope(x.value, y) * x.error, 0)
        return rounded(y, y.abs(), error, arithmetic, arithmetic.exp if f is aten.exp else 2 * arithmetic.unit)

    return bounded


RULES.update({f: function(f, slope) for f, slope in SLOPES.items()})


@rule(aten.neg)
def _(arithmetic: Arithmetic, x: Bounded) -> Bounded:
    return Bounded(-x.value, x.magnitude, x.error, arithmetic)


@rule(aten.abs)
def _(arithmetic: Arithmetic, x: Bounded) -> Bounded:
    return Bounded(x.value.abs(), x.magnitude, x.error, arithmetic)


@rule(aten.add)
def _add(arithmetic: Arithmetic, a: Any, b: Any, alpha: float = 1) -> Bounded:
    (a, size_a, error_a), (b, size_b, error_b) = fields(a, arithmetic), fields(b, arithmetic)
    return rounded(a + alpha * b, size_a + abs(alpha) * size_b, error_a + abs(alpha) * error_b, arithmetic)


@rule(aten.sub)
def _(arithmetic: Arithmetic, a: Any, b: Any, alpha: float = 1) -> Bounded:
    return _add(arithmetic, a, b, -alpha)


@rule(aten.rsub)
def _(arithmetic: Arithmetic, a: Any, b: Any, alpha: float = 1) -> Bounded:
    return _add(arithmetic, b, a, -alpha)


@rule(aten.mul)
def _mul(arithmetic: Arithmetic, a: Any, b: Any) -> Bounded:
    (a, size_a, error_a), (b, size_b, error_b) = fields(a, arithmetic), fields(b, arithmetic)
    return rounded(a * b, size_a * size_b, abs(a) * error_b + abs(b) * error_a, arithmetic)


@rule(aten.div)
def _(arithmetic: Arithmetic, a: Any, b: Any) -> Bounded:
    (a, size, error_a), (b, _, error_b) = fields(a, arithmetic), fields(b, arithmetic)
    return rounded(a / b, size / abs(b), (error_a + abs(a / b) * error_b) / abs(b), arithmetic)


@rule(aten.pow)
def _(arithmetic: Arithmetic, x: Bounded, power: float) -> Bounded:
    error = abs(power) * x.value.abs() ** (power - 1) * x.error
    return rounded(x.value**power, x.magnitude**power, error, arithmetic, 2 * arithmetic.unit)


@rule(aten.minimum)
def _(arithmetic: Arithmetic, a: Any, b: Any) -> Bounded:
    (a, size_a, error_a), (b, size_b, error_b) = fields(a, arithmetic), fields(b, arithmetic)
    return Bounded(torch.minimum(a, b), torch.where(a < b, size_a, size_b), torch.maximum(error_a, error_b), arithmetic)


@rule(aten.masked_fill)
def _(arithmetic: Arithmetic, x: Bounded, mask: Tensor, number: float) -> Bounded:
    error = x.error.masked_fill(mask, 0)
    return Bounded(x.value.masked_fill(mask, number), x.magnitude.masked_fill(mask, abs(number)), error, arithmetic)


@rule(aten.clamp, aten.clamp_min)
def _(arithmetic: Arithmetic, x: Bounded, *args: Any, **kwargs: Any) -> Bounded:
    return Bounded(x.value.clamp(*args, **kwargs), x.magnitude, x.error, arithmetic)


@rule(aten.sum)
def _sum(arithmetic: Arithmetic, x: Bounded, *args: Any, **kwargs: Any) -> Bounded:
    value, magnitude, error, n = (aten.sum(y, *args, **kwargs) for y in (x.value, x.magnitude, x.error, count_of(x)))
    return Bounded(value, magnitude, error + arithmetic.sum(n) * magnitude, arithmetic)


@rule(aten.mm, aten.bmm)
def _(arithmetic: Arithmetic, a: Any, b: Any) -> Bounded:
    n = count_of(a) @ count_of(b)
    (a, size_a, error_a), (b, size_b, error_b) = _operand(a, arithmetic), _operand(b, arithmetic)
    magnitude = size_a @ size_b
    return Bounded(a @ b, magnitude, error_a @ b.abs() + a.abs() @ error_b + arithmetic.sum(n) * magnitude, arithmetic)


def _operand(x: Any, arithmetic: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
    """What has been computed is rounded to the dtype in which it is multiplied; inputs are in it."""
    value, magnitude, error = fields(x, arithmetic)
    computed = isinstance(x, Bounded) and error > 0
    return value, magnitude, error + computed * (arithmetic.operand * magnitude + arithmetic.least)


@rule(aten.addmm)
def _(arithmetic: Arithmetic, x: Any, a: Any, b: Any) -> Tensor:
    return x + a @ b


@rule(aten._softmax)
def _(arithmetic: Arithmetic, x: Bounded, dim: int, _: bool) -> Tensor:
    e = (x - _shift(x, dim)).exp()
    return e / e.sum(dim, keepdim=True)


@rule(aten.logsumexp)
def _(arithmetic: Arithmetic, x: Bounded, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    shift, dims = _shift(x, dim), tuple(dim)
    total = (x - shift).exp().sum(dims, keepdim=True).log() + shift
    return total if keepdim else total.squeeze(dims)


def _shift(x: Bounded, dim: Any) -> Bounded:
    """The largest entry: exact, since any other shift would do."""
    top = x.value.amax(dim, keepdim=True)
    return Bounded.exact(top.masked_fill(top == -torch.inf, 0), x.arithmetic)


@rule(aten._softmax_backward_data)
def _(arithmetic: Arithmetic, dy: Bounded, y: Bounded, dim: int, _: torch.dtype) -> Bounded:
    """y (dy - delta), delta = sum(y dy), which flash attention takes from an output that is rounded to its dtype."""
    delta = _sum(arithmetic, _mul(arithmetic, y, dy), [dim], keepdim=True)
    delta = Bounded(delta.value, delta.magnitude, delta.error + arithmetic.operand * delta.magnitude, arithmetic)
    return _mul(arithmetic, y, dy - delta)
