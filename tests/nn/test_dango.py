from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellattn import MultiGraph
from cellattn.data import synthetic_cell
from cellattn.nn import CellOutput, Dango
from cellattn.nn.dango import SAGELayer

from ..compare import cell_with_terms
from . import dense, dense_sets

N, FEATURES = 15, 5
GRAPH = dense.random_graph(N, {"fusion": 45, "database": 12})
RELATIONS = {"fusion": 0.5, "database": 2.0}
SEEDS = torch.tensor([4, 7, 1, 0, 10, 4])
TYPES = torch.ones_like(SEEDS)
PTR = torch.tensor([0, 2, 2, 3, 6])  # sets of 2, 0, 1 and 3
BATCH = (SEEDS, PTR, TYPES)
INPUTS: dict[str, dict[str, Any]] = {
    "embedding": {},
    "features": {"num_genes": None, "feature_dim": FEATURES},
    "both": {"feature_dim": FEATURES},
}


def model(**options: Any) -> Dango:
    torch.manual_seed(0)
    defaults = {"relations": RELATIONS, "num_genes": N, "num_heads": 2}
    dango = Dango(8, **{**defaults, **options}).double()
    nn.init.constant_(dango.sets.rezero, 0.7)  # 0 at the start, where the attention has no say
    return dango


def features(number: int = N) -> Tensor:
    return torch.randn(number, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(out: tuple[Tensor, dict[str, Tensor], Tensor], dango: Dango) -> tuple[Tensor, ...]:
    prediction, _, regularization = out
    return torch.autograd.grad(prediction.pow(3).sum() + regularization, list(dango.parameters()))


@pytest.mark.parametrize("zero_weight", [0.1, {"fusion": 1.0, "database": 0.3}], ids=["one", "by network"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_dense(inputs: str, zero_weight: Any) -> None:
    dango = model(zero_weight=zero_weight, out_dim=2, **INPUTS[inputs])
    x = None if inputs == "embedding" else features()
    out, expected = dango(GRAPH, *BATCH, features=x), dense_sets.dango(dango, GRAPH, SEEDS, PTR, x)
    assert isinstance(out, CellOutput)
    torch.testing.assert_close(tuple(out), expected, rtol=1e-9, atol=1e-11)  # float64, sums of a few hundred terms
    torch.testing.assert_close(gradients(out, dango), gradients(expected, dango), rtol=1e-9, atol=1e-11)


def test_unknown_pairs_are_not_reconstructed() -> None:
    graph = GRAPH.extend(2, {"fusion": torch.tensor([[15], [3]])})  # one new gene is known in one network
    dango = model(num_genes=N + 2)
    out, expected = dango(graph, *BATCH), dense_sets.dango(dango, graph, SEEDS, PTR)
    torch.testing.assert_close(tuple(out), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients(out, dango), gradients(expected, dango), rtol=1e-9, atol=1e-11)


def test_networks_of_two_types() -> None:
    """A gene's terms are reconstructed among the terms, each network by its own two types."""
    graph = cell_with_terms(11, 4)
    dango = model(relations={"annotated": 0.5, "physical": 1.0, "members": 2.0}, zero_weight=0.3)
    out, expected = dango(graph, *BATCH), dense_sets.dango(dango, graph, SEEDS, PTR)
    torch.testing.assert_close(tuple(out), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients(out, dango), gradients(expected, dango), rtol=1e-9, atol=1e-11)


def test_sage_is_pygs() -> None:
    pyg = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    layer = SAGELayer(4).double()
    conv = pyg.SAGEConv(4, 4).double()
    conv.lin_l.load_state_dict(layer.neighbours.state_dict())
    conv.lin_r.load_state_dict(layer.own.state_dict())
    x = torch.randn(N, 4, dtype=torch.float64)
    expected = F.relu(conv(x, GRAPH.edge_index("database")))  # directed, weighted, with genes without an edge
    torch.testing.assert_close(layer(x, GRAPH, "database"), expected, rtol=1e-12, atol=1e-12)


def test_published_size() -> None:
    networks = ["neighborhood", "fusion", "cooccurence", "coexpression", "experimental", "database"]
    sizes = {name: parameter.numel() for name, parameter in Dango(relations=networks, num_genes=6607).named_parameters()}
    assert sum(sizes.values()) == 3_140_254
    assert sum(size for name, size in sizes.items() if name.startswith("decoders.")) == 6 * 65 * 6607


def test_gradcheck() -> None:
    dango = model(num_genes=None, feature_dim=FEATURES, num_layers=1)
    x = features().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: (lambda out: (out[0], out[2]))(dango(GRAPH, *BATCH, features=x)), x)


def test_gradients_reach_every_parameter() -> None:
    dango = model(feature_dim=FEATURES)
    out = dango(GRAPH, *BATCH, features=features())
    (out.prediction.square().sum() + out.regularization).backward()
    for name, parameter in dango.named_parameters():
        if name == "score.2.bias":
            continue  # one number added to the scores of all networks: softmax does not see it
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_relabelled_genes() -> None:
    """Identity comes with ids and features: the same cell under other indices gives the same predictions and losses."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    dango = model(feature_dim=FEATURES)
    out = dango(GRAPH, *BATCH, features=features())
    same = dango(GRAPH.subgraph(order), order.argsort()[SEEDS], PTR, TYPES, features=features()[order], gene_ids=order)
    torch.testing.assert_close(tuple(same), tuple(out))


def test_order_within_a_set_is_free() -> None:
    order = torch.tensor([1, 0, 2, 5, 3, 4])
    dango = model()
    torch.testing.assert_close(dango(GRAPH, SEEDS[order], PTR, TYPES).prediction, dango(GRAPH, *BATCH).prediction)


@pytest.mark.parametrize("sets", [0, 1, 3])
def test_empty_sets(sets: int) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    dango = model(out_dim=2)
    out = dango(GRAPH, nothing, torch.zeros(sets + 1, dtype=torch.int64), nothing)
    torch.testing.assert_close(out.prediction, dango.out.bias.expand(sets, 2))
    (out.prediction.sum() + out.regularization).backward()


def test_pretraining_reads_no_set() -> None:
    dango = model()
    loss = dango.pretraining_loss(GRAPH)
    torch.testing.assert_close(loss, dango(GRAPH, *BATCH).regularization)
    loss.backward()
    touched = {name.split(".")[0] for name, parameter in dango.named_parameters() if parameter.grad is not None}
    assert touched == {"tokens", "encoders", "decoders"}


def test_sampled_rows_only_in_training() -> None:
    dango = model(sampled_rows=0.5)
    every = model().eval()(GRAPH, *BATCH)
    torch.testing.assert_close(tuple(dango.eval()(GRAPH, *BATCH)), tuple(every))
    dango.train()
    drawn = [dango(GRAPH, *BATCH, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    torch.testing.assert_close(drawn[0].losses, drawn[1].losses, rtol=0, atol=0)
    assert all(drawn[0].losses[name] != drawn[2].losses[name] for name in every.losses)
    torch.testing.assert_close(drawn[0].prediction, drawn[2].prediction)


def test_state_dict_round_trip() -> None:
    dango, file = model(), io.BytesIO()
    torch.save(dango.state_dict(), file)
    file.seek(0)
    other = model()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(tuple(other(GRAPH, *BATCH)), tuple(dango(GRAPH, *BATCH)), rtol=0, atol=0)


def test_equal_from_run_to_run_on_several_threads() -> None:
    torch.set_num_threads(2)
    graph = dense.random_graph(300, {"fusion": 6000, "database": 900})
    dango = model(num_genes=300).float()
    seeds = torch.stack([torch.randperm(300)[:3] for _ in range(500)]).flatten()
    batch = seeds, torch.arange(0, 1501, 3), torch.ones_like(seeds)
    first, *others = (gradients(dango(graph, *batch), dango) for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_autocast() -> None:
    dango = model(feature_dim=FEATURES).float()
    x = features().float()
    expected = dango(GRAPH, *BATCH, features=x)
    with torch.autocast("cpu", torch.bfloat16):
        out = dango(GRAPH, *BATCH, features=x)
    # 8 bits of mantissa through two layers and the sets, on values of about 1
    torch.testing.assert_close(out.prediction.float(), expected.prediction, rtol=0, atol=0.05)
    torch.testing.assert_close(out.regularization.float(), expected.regularization, rtol=0.02, atol=0)
    (out.prediction.float().sum() + out.regularization).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in dango.parameters())


@pytest.mark.exhaustive
def test_compile_training_step() -> None:
    """One graph, forward and backward, with batches of other sizes after the first."""
    torch.compiler.reset()
    dango = model(sampled_rows=0.5)
    compiled = torch.compile(dango, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (BATCH, (SEEDS[:3], torch.tensor([0, 2, 3]), TYPES[:3])):
        results = []
        for run in (dango, compiled):
            torch.manual_seed(0)  # the same rows
            out = run(GRAPH, *batch)
            results.append((tuple(out), gradients(out, dango)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)  # float64, other order of sums


def train(dango: Dango, graph: MultiGraph, batch: tuple[Tensor, ...], y: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Losses of pre-training, then of joint training, by step."""
    optimizer = torch.optim.Adam(dango.parameters(), lr=1e-2)
    losses: tuple[list[float], list[float]] = ([], [])
    for phase, history in enumerate(losses):
        for _ in range(steps):
            if phase == 0:
                loss = total = dango.pretraining_loss(graph)
            else:
                out = dango(graph, *batch)
                loss = (out.prediction[:, 0] - y).square().mean()
                total = loss + out.regularization
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            history.append(loss.item())
    return losses


def test_learns() -> None:
    """The reconstruction falls in pre-training, and phenotypes of pairs, planted as products of single effects, are fitted."""
    torch.manual_seed(0)
    graph = synthetic_cell(seed=0, num_genes=60, symmetrize=True, self_loops=False)
    pairs = torch.stack([torch.randperm(60)[:2] for _ in range(200)])
    y = torch.randn(60)[pairs].prod(1)
    batch = pairs.flatten(), torch.arange(0, 401, 2), torch.ones(400, dtype=torch.int64)
    dango = Dango(16, relations=dict.fromkeys(graph.relations[:4], 0.1), num_genes=60)
    pretraining, joint = train(dango, graph, batch, y, 80)
    assert pretraining[-1] < 0.3 * pretraining[0]
    assert joint[-1] < 0.3 * joint[0]


def test_learns_on_real_tables(labelled_cell: Any) -> None:
    """Scores of measured pairs of labelled genes, their networks reconstructed beside."""
    torch.manual_seed(0)
    graph = labelled_cell.graph
    batch = labelled_cell.train.__getitems__(list(range(512)))
    y = (batch.y - batch.y.mean()) / batch.y.std()
    networks = [name for name in ("neighborhood", "fusion", "cooccurence", "database") if graph.num_edges(name)]
    dango = Dango(relations=dict.fromkeys(networks, 0.1), num_genes=graph.num_nodes)
    pretraining, joint = train(dango, graph, (batch.seeds, batch.ptr, batch.types), y, 30)
    assert pretraining[-1] < 0.5 * pretraining[0]
    assert joint[-1] < 0.7 * joint[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_genes": None}, ValueError, "num_genes, feature_dim: expected at least one"),
        ({"relations": []}, ValueError, "relations: expected at least one, got none"),
        ({"relations": "fusion"}, TypeError, "relations: expected names of relations, or a dict to their weights, got str"),
        ({"relations": ["fusion", "fusion"]}, ValueError, "relations: expected each once"),
        ({"relations": [3]}, TypeError, "relations: expected names, got int 3"),
        ({"relations": {"fusion": -1.0}}, ValueError, r"relations\['fusion'\]: expected a finite number of at least 0, got -1"),
        ({"zero_weight": -1.0}, ValueError, "zero_weight: expected a finite number of at least 0"),
        ({"zero_weight": {"fusion": 1.0}}, ValueError, r"zero_weight: expected one a relation, got none for \['database'\]"),
        ({"zero_weight": {"fusio": 1.0}}, ValueError, "zero_weight relation: unknown value 'fusio'.*did you mean 'fusion'"),
        ({"num_heads": 3}, ValueError, "num_heads: expected a divisor of dim, 8, got 3"),
        ({"out_dim": 0}, ValueError, "out_dim: expected at least 1, got 0"),
        ({"sampled_rows": 1.5}, ValueError, r"sampled_rows: expected a fraction in \(0, 1\], got 1.5"),
    ],
    ids=str,
)
def test_bad_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(**options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"graph": {}}, TypeError, "graph: expected a MultiGraph, got dict"),
        ({"graph": GRAPH.extend(1)}, ValueError, "graph: 16 genes, but num_genes is 15"),
        ({"graph": dense.random_graph(N, {"fusion": 4})}, ValueError, "relation: unknown value 'database'"),
        ({"features": features()}, ValueError, "features: the model has feature_dim=None"),
        ({"seeds": torch.tensor([4, 4, 1, 0, 10, 4])}, ValueError, "seeds: set 0 holds gene 4 twice"),
        ({"seeds": SEEDS + 10}, ValueError, "seeds: position 1 holds 17"),
        ({"types": TYPES[1:]}, ValueError, "types: expected the length of seeds, 6, got 5"),
        ({"ptr": PTR[:-1]}, ValueError, "ptr: expected to end with 6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model()(**{"graph": GRAPH, "seeds": SEEDS, "ptr": PTR, "types": TYPES, **arguments})
