"""Models under tools that wrap or replace layers: activation checkpointing, torch.compile of a part, dynamic quantisation."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.export import Dim
from torch.nn.utils import prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cellattn import checkpoint as checkpoint_file
from cellattn.nn import CellTransformer, Dango, PairwiseInteraction, WildtypeDifference
from cellattn.screen import make_scorer, screen

from .. import registry
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


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_dealt_out_weights_are_gathered_before_they_are_copied_or_written(tmp_path: Path) -> None:
    def made() -> CellTransformer:
        torch.manual_seed(0)
        return CellTransformer(8, 1, 2, num_types=6, num_genes=registry.GRAPH.num_nodes)

    model: Any = made()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for call in (
        lambda: checkpoint_file.save(tmp_path / "model", model),
        lambda: make_scorer(model, registry.GRAPH),
        lambda: screen(model, registry.GRAPH, out=tmp_path / "screen", progress=False),
    ):
        with pytest.raises(ValueError, match=r"model: expected whole weights, got encoder\.cls dealt .*get_model_state_dict"):
            call()
    assert not (tmp_path / "model").exists()
    # as the message has it
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    plain = made()
    plain.load_state_dict(whole)
    checkpoint_file.save(tmp_path / "model", plain)
    written = checkpoint_file.load(tmp_path / "model").model.state_dict()
    assert all(torch.equal(value, written[name]) for name, value in made().state_dict().items())


EXPORTED: dict[str, dict[str, Any]] = {
    "sum": {},
    "pairwise": {"pool": "pairwise"},
    "hypersagnn": {"pool": "hypersagnn", "max_size": 4},
    "readout": {"pool": "readout", "max_size": 4},
    "published": {
        "num_types": None, "norm": "post", "pool": "readout_sum", "cross_heads": 0, "readout_residual": "rezero",
        "readout_null_sink": 0.3, "activation": "relu", "max_size": 4,
    },
}  # fmt: skip
GENES = registry.GRAPH.num_nodes
OF_CELLS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: functools.partial(CellTransformer, 8, 1, 2, **{"num_genes": GENES, "num_types": 6, **options})
        for name, options in EXPORTED.items()
    },
    "Dango": lambda: Dango(8, relations=registry.GRAPH.relations, num_genes=GENES, max_size=4),
    "PairwiseInteraction": lambda: PairwiseInteraction(8, num_genes=GENES, num_types=6, max_size=4),
}


class _OfGraph(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, seeds: torch.Tensor, ptr: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = self.model(registry.GRAPH, seeds, ptr, types).prediction
        return prediction


def _mutants(number: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(number)
    seeds = torch.stack([torch.randperm(GENES, generator=g)[:size] for _ in range(number)])
    return seeds.flatten(), torch.arange(number + 1) * size, torch.randint(1, 6, (number * size,), generator=g)


@pytest.mark.parametrize("name", OF_CELLS)
def test_an_exported_model_takes_any_number_of_mutants(name: str) -> None:
    """The genes of all sets, and the sets, are dimensions of their own."""
    torch.manual_seed(0)
    model = _OfGraph(OF_CELLS[name]()).eval()
    entries, ends = Dim("entries", min=2, max=1 << 20), Dim("ends", min=3, max=1 << 20)
    exported = torch.export.export(
        model, _mutants(20, 2), dynamic_shapes=({0: entries}, {0: ends}, {0: entries}), strict=False
    ).module()
    for number, size in ((20, 2), (7, 3), (50, 1)):
        given = _mutants(number, size)
        torch.testing.assert_close(exported(*given), model(*given), rtol=1e-5, atol=1e-6)


def _lazy() -> nn.Module:
    model = OF_CELLS["sum"]()
    model.get_submodule("head")._modules["mlp"] = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 1))
    return model


WITHOUT_VALUES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (
        lambda: OF_CELLS["sum"]().to("meta"),
        r"model\.encoder\.cls: expected a tensor that holds values, .* meta",
    ),
    "lazy": (_lazy, r"model\.head\.mlp\.0\.weight: expected a tensor that holds values, .* lazy module that was never called"),
}


@pytest.mark.parametrize("kind", WITHOUT_VALUES)
def test_weights_without_values_are_named(kind: str, tmp_path: Path) -> None:
    make, message = WITHOUT_VALUES[kind]
    for call in (
        lambda: checkpoint_file.save(tmp_path / "model", make()),
        lambda: make_scorer(make(), registry.GRAPH),
        lambda: screen(make(), registry.GRAPH, out=tmp_path / "screen", progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------- layers that are made, wrapped or replaced


class _LoRA(nn.Module):
    """A layer and what is added to it, with the weight of the layer for whoever asks, as adapters have it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.layer(x) + self.up(self.down(x))
        return added


CELLS: dict[str, Callable[[], nn.Module]] = {
    **OF_CELLS,
    **{
        f"wildtype {conv}": functools.partial(
            WildtypeDifference, 8, 2, relations=registry.GRAPH.relations, num_genes=GENES, num_types=6, conv=conv
        )
        for conv in ("sage", "gin", "gat")
    },
}


def _layers_of(name: str) -> list[str]:
    return [path for path, layer in CELLS[name]().named_modules() if type(layer) is nn.Linear]


def _replaced(name: str, path: str, make: Callable[[nn.Linear], nn.Module]) -> _OfGraph:
    torch.manual_seed(0)
    model = CELLS[name]().double()
    with torch.no_grad():
        for key, x in model.named_parameters():
            if "rezero" in key:
                x.fill_(0.5)  # at its first value, 0, what is behind it has no gradient
    parent, _, child = path.rpartition(".")
    layer: Any = model.get_submodule(path)
    model.get_submodule(parent)._modules[child] = make(layer)
    return _OfGraph(model).double().eval()


@pytest.mark.parametrize("name", CELLS)
def test_an_adapter_of_any_layer_is_trained_or_refused(name: str) -> None:
    """None is left out without a word."""
    for path in _layers_of(name):
        model = _replaced(name, path, _LoRA)
        adapter: Any = model.model.get_submodule(path)
        try:
            model(*_mutants(7, 3)).square().sum().backward()
        except TypeError as error:
            assert "expected a Linear, whose weight is read and which is not called, got _LoRA" in str(error)  # noqa: PT017
            continue
        found = adapter.get_submodule("up").weight.grad
        assert found is not None, path
        assert float(found.abs().max()) > 0, path


@pytest.mark.parametrize("how", ["pruned", "weight norm"])
@pytest.mark.parametrize("name", CELLS)
def test_layers_whose_weight_is_made_in_a_call_are_trained(name: str, how: str) -> None:
    """Two steps, of which the second is of the weights that the first left."""

    def make(layer: nn.Linear) -> nn.Module:
        if how == "pruned":
            return prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.utils.weight_norm(layer)

    for path in _layers_of(name):
        made, plain = _replaced(name, path, make), _replaced(name, path, lambda layer: layer)
        for _ in range(2):
            torch.testing.assert_close(made(*_mutants(7, 3)), plain(*_mutants(7, 3)), rtol=1e-9, atol=1e-12)
            made.zero_grad()
            made(*_mutants(7, 3)).square().sum().backward()
            with torch.no_grad():
                for x in made.parameters():
                    x.sub_(0 if x.grad is None else 1e-2 * x.grad.sign())
                state = {key: x for key, x in made.state_dict().items() if "weight_" not in key}
                layer: Any = made.model.get_submodule(path)
                state[f"model.{path}.weight"] = (
                    layer.weight_orig if how == "pruned" else torch._weight_norm(layer.weight_v, layer.weight_g, 0)
                )
                plain.load_state_dict(state)


@pytest.mark.parametrize("how", WRAPS)
@pytest.mark.parametrize("part", ["head.mlp", "head", "mlp"])
def test_a_last_layer_may_be_wrapped(part: str, how: str) -> None:
    name = "wildtype sage" if part == "mlp" else "sum"
    plain = _replaced(name, part, lambda layer: layer)
    wrapped = _replaced(name, part, WRAPS[how])
    given = _mutants(7, 3)
    want = plain(*given).detach()
    torch.testing.assert_close(wrapped(*given).detach(), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is called on batches of sets
        scorer = make_scorer(wrapped.model, registry.GRAPH)
    torch.testing.assert_close(scorer.score(given[0].view(7, 3), given[2].view(7, 3)), want[:, 0])


def test_quantised_layers_are_scored_by_calls() -> None:
    model = _replaced("sum", "head", lambda layer: layer).model.float()
    given = _mutants(7, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.warns(UserWarning, match="model: layers are quantised, so that it is called on batches of sets"):
        scorer = make_scorer(quantised, registry.GRAPH)
    want = quantised(registry.GRAPH, *given).prediction[:, 0].detach()
    torch.testing.assert_close(scorer.score(given[0].view(7, 3), given[2].view(7, 3)), want)
