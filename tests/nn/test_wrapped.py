"""Models under tools that wrap or replace layers: activation checkpointing, torch.compile of a part, dynamic quantisation."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cellattn.nn import WildtypeDifference

from ..registry import MODELS

WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpoint": checkpoint_wrapper,
    "compile": lambda module: torch.compile(module, backend="eager"),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("how", WRAPS)
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("WildtypeDifference")])
def test_layers_may_be_wrapped(name: str, how: str) -> None:
    entry = MODELS[name]
    model = entry.make_module()
    wrapped = copy.deepcopy(model)
    assert isinstance(wrapped, WildtypeDifference)
    for i, conv in enumerate(wrapped.convs):
        wrapped.convs[i] = WRAPS[how](conv)
    for got, want in zip(entry.run(dict(entry.tensors), wrapped), entry.run(dict(entry.tensors), model), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["CellTransformer sum", "CellTransformer readout", "CellEncoder", "PerturbationHead"])
def test_linear_layers_may_be_quantised(name: str) -> None:
    """To 8 bits a weight, and a product's input: off by a few parts in a hundred."""
    entry = MODELS[name]
    model = entry.make_module()
    assert model is not None
    model.float()
    tensors = {key: x.float() if x.is_floating_point() else x for key, x in entry.tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for got, want in zip(entry.run(dict(tensors), quantised), entry.run(dict(tensors), model), strict=True):
        assert not torch.equal(got, want)
        assert float((got - want).detach().abs().max()) <= 0.1 * max(1.0, float(want.detach().abs().max()))


def _keep_what_ops_make(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if "cellattn" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("name", MODELS)
def test_selective_checkpointing(name: str) -> None:
    entry = MODELS[name]
    module = entry.make_module()
    names = list(entry.tensors)

    def gradients(selective: bool) -> list[torch.Tensor]:
        tensors = {key: x.clone().requires_grad_(key in entry.floats) for key, x in entry.tensors.items()}

        def call(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(entry.run(dict(zip(names, values, strict=True)), module))

        contexts = functools.partial(create_selective_checkpoint_contexts, _keep_what_ops_make)
        args = tuple(tensors.values())
        out = checkpoint(call, *args, use_reentrant=False, context_fn=contexts) if selective else call(*args)
        total = torch.stack([x.square().sum() for x in out if x.requires_grad]).sum()
        leaves = [tensors[key] for key in entry.floats]
        return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_can_be_sharded(name: str) -> None:
    """`fully_shard` takes no parameter without dimensions."""
    module = MODELS[name].make_module()
    assert module is not None
    assert [key for key, p in module.named_parameters() if p.ndim == 0] == []
