"""What torch.library and torch.compile ask of every operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import cellattn
import cellattn.nn
from cellattn import MultiGraph

from ..compare import leaves, random_graph

N = 20
OPS = torch.ops.cellattn


def graph() -> MultiGraph:
    return random_graph(N, {"a": 60, "b": 40}, weighted=True)


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    g = graph()
    q, k, v = leaves((2, 3, N + 1, 8), (2, 3, N + 1, 8), (2, 3, N + 1, 5))
    dout, dlse, lse = (x.detach() for x in leaves((2, 3, N + 1, 5), (2, 3, N + 1), (2, 3, N + 1)))
    mask = torch.arange(N + 1) % 3 > 0
    q1, k1, lse1, dloss = leaves((N + 1, 8), (N + 1, 8), (N,), (N,))
    rows, negatives = torch.arange(N), torch.arange(3 * N).reshape(N, 3) % N
    problem = (*g.stacked, *g.transpose(), g.inv_mass[:N], g.known("a"), rows)
    index, ptr = torch.tensor([1, 5, 3]), torch.tensor([0, 2, 2, 3])
    head = leaves((3, 8), (N, 8), (N, 5), (3,), (3, 5))
    sets = leaves((3, 2, 4), (3, 2, 4), (3, 2, 4))
    detached = [x.detach() for x in (q, k, v)]
    return {
        "attention": (OPS.attention, (q, k, v, None, 0.3)),
        "attention masked": (OPS.attention, (q, k, v, mask, 0.3)),
        "attention_backward": (OPS.attention_backward, (dout, dlse, *detached, None, dout, lse, 0.3)),
        "row_dot": (OPS.row_dot, (q, k, *g.stacked, *g.transpose(), [0, 1], [2, 0], None, [N, N], 1)),
        "row_dot rows": (OPS.row_dot, (q, k, *g.stacked, *g.transpose(), [0, 1], [2, 0], torch.tensor([1, 2, 0]), [2, 1], 1)),
        "row_dot_backward": (
            OPS.row_dot_backward,
            (torch.ones(2, 2 * N).double(), q.detach(), torch.ones(2, 2 * N, 8).double(), g.stacked[2], *g.transpose(),
             [0, 1], [2, 0], None, [N, N], 1),
        ),
        "bce_rows": (OPS.bce_rows, (q1, k1, lse1, *problem, None, 0, 1, 0.3, True)),
        "bce_rows sampled": (OPS.bce_rows, (q1, k1, lse1, *problem, negatives, 0, 1, 0.3, True)),
        "bce_rows sigmoid": (OPS.bce_rows, (q1, k1, None, *problem, None, 0, 1, 0.3, False)),
        "bce_rows_backward": (
            OPS.bce_rows_backward,
            (*(x.detach() for x in (dloss, q1, k1, lse1)), *problem, None, 0, 1, 0.3, True),
        ),
        "set_sum": (OPS.set_sum, (sets[0].detach().flatten(1).requires_grad_(), ptr)),
        "set_attention": (OPS.set_attention, (*sets, ptr)),
        "set_attention_backward": (
            OPS.set_attention_backward,
            (torch.ones(3, 2, 4).double(), *(x.detach() for x in sets), ptr),
        ),
        "perturbation_correction": (OPS.perturbation_correction, (*head[:4], index, ptr, head[4], 0.3)),
        "perturbation_correction_backward": (
            OPS.perturbation_correction_backward,
            (torch.ones(3, 5).double(), *(x.detach() for x in head[:4]), index, ptr, head[4].detach(), 0.3),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_opcheck(name: str) -> None:
    op, args = cases()[name]
    results = opcheck(op.default, args)
    assert set(results.values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("cellattn::")}
    assert registered == {name.split(" ")[0] for name in cases()}


def losses(q: Tensor, k: Tensor, v: Tensor, g: MultiGraph, rows: Tensor | None) -> tuple[Tensor, ...]:
    out, (kl_a, kl_b) = cellattn.graph_attention(q, k, v, g, [("a", 0), ("b", 2)], rows=rows)
    valid = cellattn.attention_kl(q[:, 1], k[:, 1], g, "b", num_prefix=1, over="valid", reduction="sum")
    bce = cellattn.attention_bce(q[:, 1], k[:, 1], g, "b", num_prefix=1, rows=rows)
    lse = cellattn.attention_logsumexp(q, k)
    return out, kl_a, kl_b, valid, bce, lse


def head(q: Tensor, k: Tensor, v: Tensor, g: MultiGraph, rows: Tensor | None) -> tuple[Tensor, ...]:
    queries, index = q[0, 0, :3], torch.tensor([1, 5, 3])
    return (cellattn.perturbation_attention(queries, k[0, 0], v[0, 0], index, torch.tensor([0, 2, 2, 3]), v[0, 1, :3]),)


@pytest.mark.parametrize("f", [losses, head], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(f: Callable[..., tuple[Tensor, ...]], dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, rows in ((20, None), (20, torch.tensor([1, 2])), (31, torch.tensor([1, 2, 5]))):
        g = random_graph(n, {"a": 60, "b": 40})
        inputs = leaves((2, 3, n + 1, 8), (2, 3, n + 1, 8), (2, 3, n + 1, 5))
        results = []
        for run in (f, compiled):
            outputs = run(*inputs, g, rows)
            total = torch.stack([(y * y).sum() for y in outputs]).sum()
            results.append([*outputs, *torch.autograd.grad(total, inputs)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


def test_random_draws_compile() -> None:
    torch._dynamo.reset()
    g = graph()
    q, k = leaves((N, 4), (N, 4))

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(q: Tensor, k: Tensor) -> Tensor:
        rows = cellattn.sample_rows(g, "a", 5)
        return cellattn.attention_bce(q, k, g, "a", rows=rows, num_negatives=4)

    loss = step(q, k)
    loss.backward()
    assert loss > 0
    assert q.grad is not None
    assert q.grad.isfinite().all()
