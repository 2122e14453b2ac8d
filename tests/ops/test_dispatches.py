"""How many operators a layer and a training step call: on a GPU each is a launch, or host time between launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cellattn
from cellattn import MultiGraph, _check
from cellattn._aligned import is_aligned
from cellattn.nn import CellTransformer

from ..compare import random_graph
from . import test_cuda_fake

N, HEADS = 30, 9
NAMES = [f"r{i}" for i in range(HEADS)]
TIES = list(zip(NAMES, range(HEADS), strict=True))
SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::_unique2"}


class Calls(TorchDispatchMode):
    """Counts what PyTorch's dispatcher is asked for, but not what operators of the library do inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def graph() -> MultiGraph:
    graph = random_graph(N, {name: 60 + 10 * i for i, name in enumerate(NAMES)}, weighted=True)
    graph.transpose()
    return graph


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are not looked at."""
    monkeypatch.setattr(_check, "values_visible", lambda x: False)


def counts(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Of a forward and of its backward, once all that is kept is made; without a sync."""
    forward().backward()
    with Calls() as there:
        loss = forward()
    with Calls() as back:
        loss.backward()
    assert not SYNCS & (set(there.count) | set(back.count))
    return there.count.total(), back.count.total()


def layer(graph: MultiGraph, ties: list[tuple[str, int]], **options: Any) -> Callable[[], Tensor]:
    q, k, v = (torch.randn(HEADS, N + 1, 20, requires_grad=True) for _ in range(3))

    def forward() -> Tensor:
        out, losses = cellattn.graph_attention(q, k, v, graph, ties, **options)
        return out.sum() + torch.stack(losses).sum()

    return forward


def test_nine_ties_cost_no_more_calls_than_one(graph: MultiGraph) -> None:
    """The nine results are unbound, and a view each, and have a gradient each; nothing else is done tie by tie."""
    (one, one_back), (nine, nine_back) = (counts(layer(graph, ties)) for ties in (TIES[4:5], TIES))
    assert nine == one + len(TIES)
    assert one <= 30
    assert nine_back <= one_back + len(TIES) <= 45


def test_any_order_of_ties(graph: MultiGraph) -> None:
    shuffled = [(NAMES[i], head) for i, head in zip((3, 1, 4, 0, 8, 5, 2, 6, 7), (2, 7, 0, 8, 1, 2, 8, 5, 3), strict=True)]
    forward, backward = counts(layer(graph, shuffled))
    assert forward <= 45
    assert backward <= 55


def test_a_training_step_of_the_published_transformer(graph: MultiGraph) -> None:
    """8 layers, 9 heads of 20, nine ties a layer: by layer no more than 80 calls forward and 105 backward."""
    torch.manual_seed(0)
    ties = [(layer, head, name, 0.1) for layer in range(8) for name, head in TIES]
    model = CellTransformer(180, 8, HEADS, num_types=4, num_genes=N, ties=ties, dropout=0.0)
    seeds, ptr, types = torch.tensor([3, 7, 1, 9]), torch.tensor([0, 2, 3, 4]), torch.tensor([1, 1, 2, 1])

    def forward() -> Tensor:
        out = model(graph, seeds, ptr, types)
        return out.prediction.square().mean() + out.regularization

    parameters = [p for p in model.parameters() if p.requires_grad]
    there, back = counts(forward)
    assert parameters
    assert there <= 8 * 80
    assert back <= 8 * 105


@pytest.mark.parametrize("loss", ["kl", "bce"])
def test_one_copy_of_unaligned_heads_serves_attention_ties_and_backward(loss: str) -> None:
    """Heads of 20 of a joint projection lie off the 16 bytes that a GPU loads at once."""

    class Operators(Calls):
        unaligned = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "cellattn":
                inputs = {x.name: value for x, value in zip(func._schema.arguments, args, strict=False)}  # no defaults
                self.unaligned += sum(not is_aligned(inputs[name]) for name in "qkv" if name in inputs)
            return super().__torch_dispatch__(func, types, args, kwargs)

    n = test_cuda_fake.N
    joint = torch.empty(n + 1, 3, 3, 20, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Operators() as calls:
        q, k, v = joint.movedim(0, 2).unbind(0)
        out, losses = cellattn.graph_attention(q, k, v, test_cuda_fake.graph_on("meta"), test_cuda_fake.TIES, loss=loss)
        assert (out.shape, out.dtype) == ((3, n + 1, 20), torch.bfloat16)
        assert calls.count["aten::constant_pad_nd"] == 3
        (grad,) = torch.autograd.grad(out.float().sum() + torch.stack(losses).sum(), joint)
    assert (grad.shape, grad.dtype) == (joint.shape, joint.dtype)
    assert calls.count["cellattn::attention_backward"] == 1
    assert calls.unaligned == 0
