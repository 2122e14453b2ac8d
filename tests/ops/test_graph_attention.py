from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch

import cellattn
from cellattn import Comembership, MultiGraph, reference
from cellattn.ops import _dense

from ..compare import assert_same, cell_with_terms, everything, least_memory, leaves, random_graph, values_and_grads

TIES = [("a", 0), ("b", 2), ("a", 2), ("empty", 1)]


def flat(module, graph, ties=TIES, **options):
    def run(q, k, v):
        out, losses = module.graph_attention(q, k, v, graph, ties, **options)
        return (out, *losses)

    return run


@pytest.mark.parametrize("rows", [None, [3, 0, 17], {"a": [1, 4]}, {"a": [], "b": None}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", ["kl", "kl streamed", "bce", "kl_comembership"])
@pytest.mark.parametrize("over", ["tokens", "valid"])
@pytest.mark.parametrize(("lead", "num_prefix"), [((), 1), ((2,), 0), ((1, 2), 3)], ids=str)
def test_every_combination(lead, num_prefix, over, loss, reduction, rows, monkeypatch) -> None:
    if loss == "kl streamed":
        monkeypatch.setattr(_dense, "LARGEST_ATTENTION", 0)
        loss = "kl"
    graph = random_graph(25, {"a": 120, "b": 30, "empty": 0}, weighted=True).extend(2, {"b": torch.tensor([[25], [3]])})
    if isinstance(rows, dict):
        rows = {name: None if r is None else torch.tensor(r, dtype=torch.int64) for name, r in rows.items()}
    elif rows is not None:
        rows = torch.tensor(rows)
    t = num_prefix + 27
    q, k, v = leaves((*lead, 3, t, 8), (*lead, 3, t, 8), (*lead, 3, t, 5))
    options: dict[str, Any] = {"loss": loss, "rows": rows, "num_prefix": num_prefix, "over": over, "reduction": reduction}
    assert_same(flat(cellattn, graph, **options), flat(reference, graph, **options), q, k, v)


@pytest.mark.parametrize("diagonal", [False, True], ids=["off", "diagonal"])
def test_comembership_of_relations_that_join_two_types(diagonal: bool) -> None:
    graph = cell_with_terms()
    ties = [("annotated", 1), ("members", 0), ("is_a", 1)]
    t = 1 + graph.num_nodes
    q, k, v = leaves((2, t, 8), (2, t, 8), (2, t, 5))
    options: dict[str, Any] = {"loss": "kl_comembership", "diagonal": diagonal}
    assert_same(flat(cellattn, graph, ties, **options), flat(reference, graph, ties, **options), q, k, v)
    with pytest.raises(TypeError, match="diagonal: expected a bool, got str 'in'"):
        cellattn.graph_attention(q, k, v, graph, ties, loss="kl_comembership", diagonal="in")  # type: ignore[arg-type]


def test_constants_of_comembership_are_kept_once_and_free_of_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is first asked for without gradients serves training; copies and files have it; another device's is moved."""
    graph = cell_with_terms()
    q, k, v = leaves((2, 1 + graph.num_nodes, 8), (2, 1 + graph.num_nodes, 8), (2, 1 + graph.num_nodes, 5))
    with torch.inference_mode():
        cellattn.graph_attention(q, k, v, graph, [("annotated", 0)], loss="kl_comembership")
    other = copy.deepcopy(graph)
    assert other == graph
    monkeypatch.setattr(Comembership, "of", None)
    for one in (graph, other, pickle.loads(pickle.dumps(graph))):
        _, (loss,) = cellattn.graph_attention(q, k, v, one, [("annotated", 0)], loss="kl_comembership")
        torch.autograd.grad(loss, (q, k))
    with pytest.raises(TypeError):
        graph.comembership("annotated", diagonal=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("ties", [TIES, [("a", 0), ("b", 1)], [("b", 1)]], ids=["any", "in order", "one"])
def test_small_and_large_maps_agree(ties, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(25, {"a": 120, "b": 30, "empty": 0}, weighted=True)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in leaves((2, 3, 26, 8), (2, 3, 26, 8), (2, 3, 26, 5)))
    small = everything(flat(cellattn, graph, ties), q, k, v)
    monkeypatch.setattr(_dense, "LARGEST_ATTENTION", 0)
    for a, b in zip(small, everything(flat(cellattn, graph, ties), q, k, v), strict=True):
        assert a.dtype == b.dtype
        # a gradient is two parts of 16 bits and their sum there, one here: half a spacing each; in float64 sums of few terms
        spacing = torch.finfo(a.dtype).eps * float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=(4 if a.dtype == torch.bfloat16 else 256) * spacing)


@pytest.mark.parametrize("way", ["one map", "streamed"])
@pytest.mark.parametrize("given", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("result", [0, 1], ids=["out", "loss"])
def test_double_backward_is_refused(result: int, given: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "streamed":
        monkeypatch.setattr(_dense, "LARGEST_ATTENTION", 0)
    if (result, given) == (1, 2):
        pytest.skip("the losses are none of v")
    graph = random_graph(25, {"a": 120})
    q, k, v = inputs = leaves((2, 26, 8), (2, 26, 8), (2, 26, 5))
    out, (loss,) = cellattn.graph_attention(q, k, v, graph, [("a", 1)])
    (grad,) = torch.autograd.grad((out.sin(), loss)[result].sum(), inputs[given], create_graph=True)
    for x in inputs[: 2 if result else 3]:
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(grad.sum(), x, retain_graph=True)
    torch.autograd.grad((out.sum(), loss)[result], inputs[given])


def test_lists_of_ties_that_change_from_step_to_step_take_no_more_and_more_memory() -> None:
    names = [f"r{i}" for i in range(10)]
    graph = random_graph(5, dict.fromkeys(names, 6))
    q, k, v = leaves((1, 5, 4), (1, 5, 4), (1, 5, 4))
    for pair in itertools.permutations(names, 2):
        cellattn.graph_attention(q, k, v, graph, [(name, 0) for name in pair], num_prefix=0)
    kept = graph.once(("targets of ties", torch.float64), dict[Any, Any])
    assert 0 < len(kept) <= _dense.MOST_TIES


def test_without_ties_it_is_attention() -> None:
    graph = random_graph(25, {"a": 120})
    q, k, v = leaves((3, 26, 8), (3, 26, 8), (3, 26, 8))
    out, losses = cellattn.graph_attention(q, k, v, graph, [])
    assert losses == ()
    assert torch.equal(out, cellattn.attention(q, k, v)[0])


def test_losses_alone_leave_v_without_gradient() -> None:
    graph = random_graph(25, {"a": 120})
    q, k, v = leaves((3, 26, 8), (3, 26, 8), (3, 26, 8))
    _, (dq, dk, dv) = values_and_grads(lambda q, k, v: cellattn.graph_attention(q, k, v, graph, [("a", 1)])[1], q, k, v)
    assert torch.equal(dv, torch.zeros_like(dv))
    assert dq[1].abs().max() > 0
    assert dk[1].abs().max() > 0
    assert not dq[[0, 2]].any()


def test_sampled_negatives_reach_every_tie() -> None:
    graph = random_graph(25, {"a": 120, "b": 60})
    q, k, v = leaves((3, 26, 8), (3, 26, 8), (3, 26, 8))
    options: dict[str, Any] = {"loss": "bce", "num_negatives": 4, "target": "binary", "link": "sigmoid"}
    g = torch.Generator().manual_seed(0)
    _, losses = cellattn.graph_attention(q, k, v, graph, [("a", 1), ("b", 0)], generator=g, **options)
    g.manual_seed(0)
    for (relation, head), loss in zip([("a", 1), ("b", 0)], losses, strict=True):
        alone = cellattn.attention_bce(
            q[head], k[head], graph, relation, num_prefix=1, generator=g, num_negatives=4, target="binary", link="sigmoid"
        )
        assert torch.equal(loss, alone)


def test_permuting_genes_permutes_the_result() -> None:
    graph = random_graph(25, {"a": 120}, weighted=True)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    q, k, v = leaves((3, 26, 8), (3, 26, 8), (3, 26, 8))
    out, (loss,) = cellattn.graph_attention(q, k, v, graph, [("a", 1)])
    moved, (moved_loss,) = cellattn.graph_attention(q[:, tokens], k[:, tokens], v[:, tokens], graph.subgraph(order), [("a", 1)])
    torch.testing.assert_close(moved, out[:, tokens])
    torch.testing.assert_close(moved_loss, loss)


def test_memory_and_real_graphs(yeast_graph: MultiGraph, two_threads: None) -> None:
    """Real tables, 4 heads of 16: forward and backward within 300 MB above the inputs, losses as the dense formula gives."""
    t = yeast_graph.num_nodes + 1
    q, k, v = leaves((4, t, 16), (4, t, 16), (4, t, 16), dtype=torch.float32)
    ties = [("physical", 0), ("neighborhood", 1), ("regulatory", 2), ("coexpression", 3)]

    def step() -> None:
        out, losses = cellattn.graph_attention(q, k, v, yeast_graph, ties)
        torch.autograd.grad(out.sum() + sum(losses), (q, k, v))

    assert least_memory(step, 300e6) < 300e6
    _, losses = cellattn.graph_attention(q, k, v, yeast_graph, ties)
    with torch.no_grad():  # of the largest graph
        dense = reference.attention_kl(q[3].double(), k[3].double(), yeast_graph, "coexpression", num_prefix=1)
    # A score is off by at most 18 spacings of sum_c |q_c k_c| scale < 10, twice; the sum of 6,608 exponentials by g(6608),
    # or 163 spacings: 6e-5 together, of losses of 4 and more.
    torch.testing.assert_close(losses[3].double(), dense, rtol=1.5e-5, atol=0)
