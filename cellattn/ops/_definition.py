"""How operators stand in PyTorch's dispatcher: as `torch.library.custom_op` puts them there; and the short way past it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import _C, Tensor
from torch._compile import _disable_dynamo
from torch._library.custom_ops import CustomOpDef


class Definition(CustomOpDef):
    """`torch.library.custom_op` less what is done at every call: a search for outputs that are inputs, and a wrapper or two.

    `opcheck` finds such outputs in the tests. Small problems are all calls.
    """

    def __init__(self, *args: Any, on_cpu: Callable[..., Any] | None = None) -> None:
        super().__init__(*args)
        self._on_cpu = on_cpu
        self._set_formula(_no_formula(self._opoverload), None)

    def register_autograd(self, backward: Callable[..., Any], /, *, setup_context: Callable[..., None] | None = None) -> None:
        super().register_autograd(backward, setup_context=setup_context)
        self._set_formula(backward, setup_context)

    def _set_formula(self, backward: Callable[..., Any], setup_context: Callable[..., None] | None) -> None:
        op = self._opoverload
        self._formula = _autograd_function(op, backward, setup_context, None)
        if self._on_cpu is not None:
            # `apply` less what it does for transforms of torch.func: where it is called, none is active
            formula = _autograd_function(op, backward, setup_context, self._on_cpu)
            self._apply_on_cpu: Callable[..., Any] = super(torch.autograd.Function, formula).apply  # type: ignore[misc]

    def register_kernel(self, device_types: str | None, fn: Callable[..., Any] | None = None, /) -> Callable[..., Any]:  # type: ignore[override]
        """Register an implementation for a device, or for all (None)."""

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            key = "CompositeExplicitAutograd" if device_types is None else _C._dispatch_key_for_device(device_types)
            self._lib.impl(self._name, _disable_dynamo(fn), key)
            self._backend_fns[device_types] = fn
            return fn

        return register if fn is None else register(fn)

    def _register_autograd_dispatcher_impl(self) -> None:
        # a torch older than this method has a registration of its own, as right and slower
        op = self._opoverload
        arguments = op._schema.arguments

        def autograd(keyset: Any, *args: Any) -> Any:
            def below(*args: Any) -> Any:
                with _C._AutoDispatchBelowAutograd():
                    return op.redispatch(keyset & _C._after_autograd_keyset, *args)

            # the dispatcher leaves out what equals its default
            args = *args, *(x.default_value for x in arguments[len(args) :])
            return self._formula.apply(*args, below) if will_be_differentiated(args) else below(*args)

        self._lib.impl(self._name, autograd, "Autograd", with_keyset=True)


def will_be_differentiated(args: tuple[Any, ...]) -> bool:
    """Whether a gradient of what is made of them may be asked for."""
    return _C.is_grad_enabled() and _C._any_requires_grad(*args)


def _autograd_function(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None, run: Callable[..., Any] | None
) -> Any:
    """The formula of an operator, as a function that `run` computes, or without it one argument more, the last.

    It is made with its name, by which PyTorch's errors and `grad_fn` speak of it.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        inputs, compute = (args[:-1], args[-1]) if run is None else (args, run)
        result = compute(*inputs)
        result = tuple(map(_as_its_own, result)) if isinstance(result, tuple) else _as_its_own(result)
        if setup_context is not None:
            setup_context(ctx, inputs, result)
        return result

    def with_one_more(ctx: Any, *grads: Tensor | None) -> Any:
        result = backward(ctx, *grads)
        return (*result, None) if isinstance(result, tuple) else (result, None)

    formula = with_one_more if run is None else backward
    name = op._opname.title().replace("_", "")
    methods = {"forward": staticmethod(forward), "backward": staticmethod(formula)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    function._backward_cls.apply = formula  # what the engine calls, less a search for it at every call
    return function


def _no_formula(op: Any) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(f"{op}: no autograd formula was registered")

    return backward


def _as_its_own(result: Any) -> Any:
    """A result that is a view of what its implementation made, as no view: PyTorch lets nobody write to one of a function."""
    return as_no_view(result) if isinstance(result, Tensor) and result._is_view() else result


def as_no_view(x: Tensor) -> Tensor:
    """x, to whose memory nobody else has a claim, as a tensor of its own to autograd."""
    own: Tensor = torch.ops.aten._unsafe_view.default(x, x.shape)
    return own
