"""What an implementation is held to before it is timed: the definition of its case in float64, outputs and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cases import Case
from .peers import Function
from .problems import Implementation

# Errors are relative to the largest entry, head by head. float32 sums over 6,607 genes in another order than float64 leave
# about 1e-6. In 16 bits an implementation may have twice the error of the definition in eager PyTorch of that dtype, and two
# roundings where that is exact: a mean is rounded as a sum and as a quotient.
MAX_RATIO, SMALL = 2.0, {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Of random functions the mean of some draws is compared, entry by entry, within this many standard errors: enough for the
# largest of a million normal deviates, with room for the spread being an estimate.
MAX_DEVIATION = 8.0


class Check:
    """Holds implementations of a case to its definition in float64, which is taken once, in blocks of query rows."""

    def __init__(self, case: Case, exact: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
        self._exact, self._inputs = exact, [x.detach() for x in inputs]
        self._dim, self._rows = inputs[0].ndim - 2, inputs[0].shape[-2]
        # float64 temporaries of half a gigabyte on a GPU, and of what a CPU's caches hold for the most part
        self._block = max(1, (2**26 if inputs[0].is_cuda else 2**22) // case.row_elements)
        self._definition = functools.cache(self._blocks)  # by dtype and number of outputs

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the outputs, equal for all implementations; that of a mean weighs as much as the rows it is over."""
        gradients = []
        for i, y in enumerate(outputs):
            g = torch.Generator(y.device).manual_seed(100 + i)
            # the rows' losses are O(1) as their outputs are: a tenth keeps the loss of one row from hiding the attention
            u = torch.randn(y.shape, generator=g, device=y.device) if y.ndim else torch.tensor(0.1 * self._rows)
            gradients.append(u.to(self._inputs[0].dtype).to(y))  # the same rounded values for every dtype of y
        return gradients

    def __call__(self, implementation: Implementation, f: Function) -> tuple[float, float, list[Tensor]]:
        """(error, bound) of the output or gradient where the one is largest beside the other; the outputs' gradients."""
        want = self._definition(torch.float64, implementation.num_outputs)
        draws = []
        for _ in range(implementation.num_draws):
            inputs = tuple(x.clone().requires_grad_() for x in self._inputs)
            outputs = f(*inputs)
            upstream = self.upstream(outputs)
            grads = torch.autograd.grad(outputs, inputs, upstream)
            draws.append([y.detach().double() for y in (*outputs, *grads)])
        bounds = self._bounds(implementation.num_outputs)
        pairs = []
        for i, (exact, bound) in enumerate(zip(want, bounds, strict=True)):
            drawn = torch.stack([draw[i] for draw in draws])
            if len(draws) > 1:
                bound += MAX_DEVIATION * float(drawn.std(0).max() / len(draws) ** 0.5 / exact.abs().max())
            pairs.append((relative_error(drawn.mean(0), exact), bound))
        error, bound = max(pairs, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else torch.inf)
        return error, bound, upstream

    def _bounds(self, num_outputs: int | None) -> list[float]:
        dtype = self._inputs[0].dtype
        want = self._definition(torch.float64, num_outputs)
        if dtype.itemsize > 2:
            return [SMALL[dtype]] * len(want)
        eager = self._definition(dtype, num_outputs)
        errors = [relative_error(a, b) for a, b in zip(eager, want, strict=True)]
        # eager may overflow where it makes a map: then only the small term holds
        return [max(MAX_RATIO * error if error < torch.inf else 0.0, SMALL[dtype]) for error in errors]

    def _blocks(self, dtype: torch.dtype, num_outputs: int | None) -> list[Tensor]:
        """Outputs and gradients of the definition in a dtype; sums over blocks in at least float32."""
        q, *rest = (x.to(dtype) for x in self._inputs)
        upstream: list[Tensor] = []
        parts: list[list[Tensor]] = []
        dq, sums = [], [torch.zeros_like(x, dtype=torch.promote_types(dtype, torch.float32)) for x in rest]
        for first in range(0, self._rows, self._block):
            size = min(self._block, self._rows - first)
            leaves = [x.detach().requires_grad_() for x in (q.narrow(self._dim, first, size), *rest)]
            outputs = self._exact(first, *leaves)[:num_outputs]
            if not upstream:
                upstream = self.upstream([y.new_empty(self._full(y)) for y in outputs])
            mine = [u.narrow(self._dim, first, size) if u.ndim else u for u in upstream]
            grads = torch.autograd.grad(outputs, leaves, mine)
            parts.append([y.detach() for y in outputs])
            dq.append(grads[0])
            for total, grad in zip(sums, grads[1:], strict=True):
                total += grad
        joined = [torch.cat(ys, self._dim) if ys[0].ndim else torch.stack(ys).sum(0) for ys in zip(*parts, strict=True)]
        return [*joined, torch.cat(dq, self._dim), *sums]

    def _full(self, y: Tensor) -> tuple[int, ...]:
        """The shape of an output over all rows."""
        return (*y.shape[: self._dim], self._rows, *y.shape[self._dim + 1 :]) if y.ndim else ()


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error over the largest entry: of each head of [H, T, D], of the whole otherwise. NaN where one is."""
    error, size = (got.double() - want).abs(), want.abs()
    if want.ndim >= 3:
        error, size = error.amax((-2, -1)), size.amax((-2, -1))
    return float((error.max() / size.max() if want.ndim < 3 else error / size).max())
