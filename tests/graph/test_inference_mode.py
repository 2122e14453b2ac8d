"""A graph that was first used in inference mode, as by Lightning's sanity check before the first epoch, and then trains."""

from __future__ import annotations

import pytest
import torch

import cellattn
from cellattn import MultiGraph, nn

from ..compare import leaves, random_graph

N = 25


def graph() -> MultiGraph:
    return random_graph(N, {"a": 120, "b": 60}, weighted=True)


@pytest.mark.parametrize("name", ["CellTransformer", "WildtypeDifference", "Dango"])
def test_models(name: str) -> None:
    model: torch.nn.Module = {
        "CellTransformer": lambda: nn.CellTransformer(
            8, 1, 2, num_types=3, num_genes=N, ties=[(0, 0, "a", 0.1, {"loss": "kl_comembership"})], masks=[(0, 1, "b")]
        ),
        "WildtypeDifference": lambda: nn.WildtypeDifference(8, 2, relations=("a", "b"), num_types=3, num_genes=N),
        "Dango": lambda: nn.Dango(8, relations=("a", "b"), num_genes=N),
    }[name]().eval()  # without dropout
    cell, batch = graph(), (torch.tensor([1, 5, 0]), torch.tensor([0, 2, 3]), torch.tensor([1, 2, 1]))
    with torch.inference_mode():
        model(cell, *batch)

    def gradients(cell: MultiGraph) -> tuple[torch.Tensor | None, ...]:
        output = model(cell, *batch)
        return torch.autograd.grad(output.prediction.sum() + output.regularization, list(model.parameters()), allow_unused=True)

    for got, want in zip(gradients(cell), gradients(graph()), strict=True):
        torch.testing.assert_close(got, want)


def test_products_along_long_maps() -> None:
    """Those of more genes than are made dense."""
    cell, unused = (random_graph(700, {"a": 3000}) for _ in range(2))
    q, k = leaves((700, 4), (700, 4), dtype=torch.float32)
    with torch.inference_mode():
        cellattn.attention_kl(q, k, cell, "a")
    got, want = (torch.autograd.grad(cellattn.attention_kl(q, k, each, "a"), (q, k)) for each in (cell, unused))
    torch.testing.assert_close(got, want)


def test_graphs_that_are_made_in_inference_mode() -> None:
    with torch.inference_mode():
        cell = graph().subgraph(torch.arange(N - 1)).extend(1).without_self_loops("a").select(["b", "a"])
        assert not any(x.is_inference() for x in cell._arrays().values())
    encoder = nn.CellEncoder(8, 1, 2, ties=[(0, 0, "a", 0.1)], masks=[(0, 1, "b")])
    encoder(torch.randn(N, 8), cell)[1].sum().backward()


class _Loss(torch.nn.Module):
    def __init__(self, cell: MultiGraph) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return cellattn.attention_kl(q, k, self.cell, "a")


def test_exported_without_gradients_first() -> None:
    """As models are exported: the fake tensors of one export are in no other, nor in the graph."""
    loss = _Loss(random_graph(700, {"a": 3000}))
    q, k = (x.detach() for x in leaves((700, 4), (700, 4), dtype=torch.float32))
    for _ in range(2):
        with torch.no_grad():
            exported = torch.export.export(loss, (q, k), strict=False).module()
        assert not loss.cell._passing
        torch.testing.assert_close(exported(q, k), loss(q, k))


def test_compiled_for_inference_first() -> None:
    """What a compiled function makes without gradients is kept apart, and made once."""
    torch._dynamo.reset()
    encoder = nn.CellEncoder(8, 1, 2, ties=[(0, 0, "a", 0.1)], masks=[(0, 1, "b")], dropout=0.0)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    cell, x = graph(), torch.randn(N, 8)
    with torch.inference_mode():
        first = compiled(x, cell)[1]
        kept = dict(cell._passing)
        assert kept
        assert torch.equal(compiled(x, cell)[1], first)
        assert all(cell._passing[name] is value for name, value in kept.items())
    h = compiled(x, cell)[1]
    h.sum().backward()
    torch.testing.assert_close(h, first.clone())
