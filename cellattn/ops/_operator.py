"""What all operators share: how they are registered, what machinery of PyTorch they run under, and what they refuse.

Beside the dispatcher, which serves plain calls, autograd, autocast and torch.compile, an operator with a gradient is a
`torch.autograd.Function`, which is how PyTorch lets Python code take part in the transforms of torch.func and in forward-mode
differentiation. `torch.func.grad`, `vjp`, `jacrev` and `vmap` then work in any order, and forward mode for what is linear; the
forward mode of others and second derivatives, for which there is no formula, are errors where the dispatcher would give zeros.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _len_torch_function_stack
from torch.autograd import forward_ad

from .._modes import is_plain, without_function_modes
from ._definition import Definition, will_be_differentiated


class Operator(Definition):
    """`cellattn::name`, with its backends, its fake and its autograd formula; called like a function.

    Args:
        name: of the operator.
        public: of the function of `cellattn` that its errors speak of.
        schema: its signature.
        implementation: what it computes.
        device: on which device, None for all.
        leading: tensors whose leading dimensions are free, in `vmap` too; with any other one batched, `vmap` is a loop.
        by_place: tensors that mean something else at another place of the leading dimensions; where one is given, `vmap` is a
            loop.
        linear: tensors in each of which the operator is linear, and in which it has a forward-mode derivative.
    """

    def __init__(
        self,
        name: str,
        public: str,
        schema: str,
        implementation: Callable[..., Any],
        device: str | None,
        leading: Collection[str],
        by_place: Collection[str],
        linear: Collection[str],
    ) -> None:
        on_cpu = inspect.unwrap(implementation) if device in (None, "cpu") else None
        super().__init__("cellattn", name, schema, implementation, on_cpu=on_cpu)
        self.register_kernel(device)(implementation)
        self.public = public
        self._arguments = tuple(self._opoverload._schema.arguments)
        self._num_arguments = len(self._arguments)
        self._leading, self._by_place, self._linear = (
            [x.name in chosen for x in self._arguments] for chosen in (leading, by_place, linear)
        )
        self._function = _function(self, _no_formula, None)

    def register_autograd(self, backward: Callable[..., Any], /, *, setup_context: Callable[..., None] | None = None) -> None:
        """Give the gradient."""
        super().register_autograd(backward, setup_context=setup_context)
        self._function = _function(self, backward, setup_context)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if transforms_active() or forward_ad._current_level >= 0:
            if torch.compiler.is_compiling():
                raise NotImplementedError(
                    f"cellattn.{self.public}: torch.func transforms and forward mode inside of a compiled function are not "
                    "supported; transform without torch.compile"
                )
            rest = (kwargs.get(x.name, x.default_value) for x in self._arguments[len(args) :])
            return self._function.apply(*args, *rest)
        run = self._on_cpu
        if run is not None and len(args) == self._num_arguments and is_plain(args) and not (_modes_active() or _is_batched()):
            try:
                return self._apply_on_cpu(*args) if will_be_differentiated(args) else run(*args)
            except RuntimeError:
                # autograd's zeros have no memory until the dispatcher makes some; to ask before would cost small problems time
                if not any(isinstance(x, Tensor) and x._is_zerotensor() for x in args):
                    raise
        return self._opoverload(*args, **kwargs)

    def jvp(self, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        """The forward-mode derivative of an operator with one output, by the product rule."""
        parts = []
        for i, (tangent, linear) in enumerate(zip(tangents, self._linear, strict=True)):
            if tangent is None:
                continue
            if not linear:
                raise NotImplementedError(
                    f"cellattn.{self.public}: forward-mode derivatives (jvp, jacfwd, hessian) are not supported; "
                    "use reverse mode: backward, torch.func.grad, vjp or jacrev"
                )
            parts.append(self(*primals[:i], tangent, *primals[i + 1 :]))
        return functools.reduce(torch.add, parts)

    def batched(self, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
        """The rule of `vmap`: (outputs, the dimension of each that is mapped over)."""
        mapped = [isinstance(dim, int) for dim in in_dims]
        anywhere = not any(by_place and x is not None for by_place, x in zip(self._by_place, args, strict=True))
        if anywhere and all(free or not is_mapped for free, is_mapped in zip(self._leading, mapped, strict=True)):
            inputs = list(args)
            for i, free in enumerate(self._leading):
                if free and args[i] is not None:
                    inputs[i] = args[i].movedim(in_dims[i], 0) if mapped[i] else args[i].expand(size, *args[i].shape)
            out = self(*inputs)
        else:
            slices = [x.unbind(dim) if here else (x,) * size for x, dim, here in zip(args, in_dims, mapped, strict=True)]
            results = [self(*one) for one in zip(*slices, strict=True)]
            out = (
                torch.stack(results) if isinstance(results[0], Tensor) else tuple(map(torch.stack, zip(*results, strict=True)))
            )
        return out, 0 if isinstance(out, Tensor) else (0,) * len(out)


def _is_batched() -> bool:
    """Whether a backward runs for many gradients at once, `torch.autograd.grad(..., is_grads_batched=True)`.

    The tensors of that are plain ones to all other questions; the dispatcher goes through them one after another.
    """
    if torch._C._current_graph_task_id() < 0:
        return False
    level = torch._C._vmapmode_increment_nesting()  # there is no other way to ask
    torch._C._vmapmode_decrement_nesting()
    return level > 1


def operator(
    name: str,
    *,
    public: str | None = None,
    schema: str | None = None,
    device: str | None = "cpu",
    leading: Collection[str] = (),
    by_place: Collection[str] = (),
    linear: Collection[str] = (),
) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function as `cellattn::name`, see `Operator`; the schema is read off its annotations.

    Autocast reaches into operators, where it would turn the products into bfloat16; the implementations choose the dtype
    of their arithmetic themselves. So does another default device, which is a mode on functions of torch.
    """

    def decorate(implementation: Callable[..., Any]) -> Operator:
        @without_function_modes
        def without_modes(*args: Any) -> Any:
            device_type = next(x.device.type for x in args if isinstance(x, Tensor))
            with torch.autocast(device_type, enabled=False):
                return implementation(*args)

        @functools.wraps(implementation)
        def plainly(*args: Any) -> Any:
            if _modes_active():
                return without_modes(*args)
            return implementation(*args)

        signature = schema or torch.library.infer_schema(implementation, mutates_args=())
        return Operator(name, public or name, signature, plainly, device, leading, by_place, linear)

    return decorate


def is_eager(*args: Any) -> bool:
    """Whether nothing but a gradient may be asked of operations on tensors of the CPU: no transform, no forward mode."""
    return is_plain(args) and not transforms_active() and forward_ad._current_level < 0


def _modes_active() -> bool:
    return torch._C._is_any_autocast_enabled() or _len_torch_function_stack() > 0


def refuse_double_backward(backward_op: Operator, name: str) -> None:
    """Make differentiating an operator's backward a clear error rather than a silent zero."""

    def raise_error(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(_twice(name))

    backward_op.public = name
    backward_op.register_autograd(raise_error)


def refuse_double_backward_through(made: Tensor, sources: Collection[Tensor], name: str) -> None:
    """The same where PyTorch has formulas, for what was made of `sources`: a small problem allows no more than a large one.

    In a backward whose gradient will have one, the gradients of the sources become that error. One hook is there to see it,
    and keeps nodes of the graph, not tensors: checkpointing lets these go.
    """
    if made.grad_fn is None:
        return
    nodes = [x.grad_fn for x in sources if x.grad_fn is not None]

    def hook(grads: tuple[Tensor | None, ...]) -> None:
        if torch.is_grad_enabled():  # backward with create_graph
            for node in nodes:
                node.register_prehook(_refusing_hook(name))

    made.grad_fn.register_prehook(hook)


@functools.cache
def _refusing_hook(name: str) -> Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...]]:
    refuse = torch._C._functions.DelayedError(_twice(name).encode(), 1)

    def hook(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grads
        return tuple(g if g is None else refuse(g if g.requires_grad else g.detach().requires_grad_()) for g in grads)

    return hook


def refuse_derivative(made: Tensor, source: Tensor, name: str) -> Tensor:
    """In a backward: what a forward made of `source` and kept, as a tensor whose derivative by it is that error, not 0."""
    if not source.requires_grad or not torch.is_grad_enabled() or not is_plain((made, source)):
        return made
    refused: tuple[Tensor, ...] = torch._C._functions.DelayedError(_twice(name).encode(), 2)(made, source)
    return refused[0]


def _twice(name: str) -> str:
    return f"cellattn.{name}: double backward is not supported; call backward without create_graph=True"


def keep_missing_grads(ctx: Any) -> None:
    """Pass None for the gradient of an output nobody used, so that its part of the backward is skipped."""
    ctx.set_materialize_grads(False)


def _no_formula(ctx: Any, *grads: Any) -> NoReturn:
    raise NotImplementedError


def _function(op: Operator, backward: Callable[..., Any], setup_context: Callable[..., None] | None) -> Any:
    """The operator as a `torch.autograd.Function`, for what the dispatcher has no place for."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.primals = inputs if any(op._linear) else ()
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        return op.jvp(ctx.primals, tangents)

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return op.batched(info.batch_size, in_dims, args)

    methods: dict[str, Any] = {
        "forward": lambda *args: op._opoverload(*args),
        "setup_context": setup,
        "backward": backward,
        "jvp": jvp,
        "vmap": vmap,
    }
    name = f"cellattn.{op.public}"
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})
