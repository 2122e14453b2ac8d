"""`WildtypeDifference` against itself as plain dense PyTorch: one sample after another, deleted rows and columns cut out."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.cell import Cell, load_cell, split, synthetic
from cellattn import MultiGraph, khop_mask
from cellattn.data import synthetic_cell, synthetic_phenotypes
from cellattn.nn import CellOutput, WildtypeDifference
from cellattn.nn.relational_conv import SCORE_CAP, GATConv, GINConv, SAGEConv
from tests.ops.sets import problem, ragged

from ..compare import cell_with_terms
from . import dense

CONVS, MODES = ("sage", "gin", "gat"), ("lazy", "khop", "delta")
N, DIM, TYPES, FEATURES = 14, 8, 3, 5
# gene 0 has no edge; "none" has no edges at all
GRAPH = dense.random_graph(N, {"physical": 26, "regulatory": 12, "none": 0})
SEEDS, PTR = ragged([[4, 7], [], [1], [0, 10, 4], [0]])
KINDS = torch.tensor([1, 2, 1, 1, 1, 2, 1])
BATCH = (SEEDS, PTR, KINDS)


def model(**options: Any) -> WildtypeDifference:
    torch.manual_seed(0)
    defaults = {"relations": GRAPH.relations, "num_types": TYPES, "num_genes": N, "num_heads": 2, "dropout": 0.0}
    cell = WildtypeDifference(DIM, options.pop("num_layers", 2), **{**defaults, **options}).double()
    for name, parameter in cell.named_parameters():
        if name.endswith(("eps", "bias")):  # at 0 to begin with
            nn.init.normal_(parameter, std=0.5)
    return cell


def assert_equal(got: Any, want: Any) -> None:
    """In float64 on both sides what is left is the rounding of two orders of summation."""
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def outcome(cell: WildtypeDifference, prediction: Tensor) -> tuple[Tensor, ...]:
    """The prediction and the gradient of each parameter, zeros where there is none."""
    loss = (prediction.pow(3) + prediction).sum()
    grads = torch.autograd.grad(loss, list(cell.parameters()), materialize_grads=True, allow_unused=True)
    return prediction, *grads


# ------------------------------------------------------------------------------------------------- dense and obvious


def dense_layer(conv: nn.Module, adjacency: dict[str, Tensor], x: Tensor) -> Tensor:
    """One layer on the genes of x [n, dim], adjacency [n, n] by relation."""
    size, matrices = x.shape[1], list(adjacency.values())
    weights = conv.get_parameter("message.weight").split(size)
    if isinstance(conv, SAGEConv):
        total = conv.own_weight(x)
        for a, w in zip(matrices, weights, strict=True):
            total = total + a @ (x @ w.T) / (a > 0).sum(1, keepdim=True).clamp(min=1)
        return conv.norm(total).relu()
    if isinstance(conv, GINConv):
        total = conv.bias
        for a, w, eps in zip(matrices, weights, conv.eps, strict=True):
            total = total + ((1 + eps) * x + a @ x) @ w.T
        return conv.out(conv.norm(total).relu())
    assert isinstance(conv, GATConv)
    matrices = [torch.eye(len(x), dtype=x.dtype), *matrices]
    weights = [conv.own_weight.weight, *weights]
    scores = [*conv.own_score, *conv.score]
    heads = []
    for head, part in enumerate(torch.arange(size).chunk(conv.num_heads)):
        values = [x @ w[part].T for w in weights]
        e = [SCORE_CAP * torch.tanh(y @ score[head] / SCORE_CAP) for y, score in zip(values, scores, strict=True)]
        logits = torch.cat([a.log() + row for a, row in zip(matrices, e, strict=True)], 1)
        heads.append(logits.softmax(1) @ torch.cat(values))
    return conv.norm(torch.cat(heads, 1)).relu()


def dense_encode(cell: WildtypeDifference, graph: MultiGraph, x: Tensor, genes: Tensor) -> Tensor:
    """F [N, dim] of the cell of some genes, zeros for the others."""
    adjacency = {name: dense.adjacency(graph, name)[genes][:, genes] for name in cell.relations}
    h = x[genes]
    for conv in cell.convs:
        h = dense_layer(conv, adjacency, h)
    return torch.zeros_like(x).index_put((genes,), h)


def dense_predict(
    cell: WildtypeDifference, graph: MultiGraph, seeds: Tensor, ptr: Tensor, types: Tensor, x: Tensor | None = None
) -> Tensor:
    if x is None:
        assert cell.tokens.embedding is not None
        x = cell.tokens.embedding.weight
    out = []
    for begin, end in itertools.pairwise(ptr.tolist()):
        genes, kinds = seeds[begin:end], types[begin:end]
        there = torch.ones(graph.num_nodes, dtype=torch.bool)
        if cell.mode == "khop":
            there = khop_mask(graph, genes, torch.tensor([0, len(genes)]), cell.num_hops)[0]
        kept = there.index_fill(0, genes, False)
        z = (dense_encode(cell, graph, x, there.nonzero()[:, 0]) - dense_encode(cell, graph, x, kept.nonzero()[:, 0])).sum(0)
        z = z / (graph.num_nodes if cell.readout == "mean" else 1)
        out.append(cell.mlp(torch.cat([z, cell.by_type(kinds).sum(0)])))
    return torch.stack(out)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv", CONVS)
def test_dense(conv: str, mode: str, num_layers: int) -> None:
    cell = model(conv=conv, mode=mode, num_layers=num_layers, out_dim=2, readout="mean" if num_layers == 2 else "sum")
    out = cell(GRAPH, *BATCH)
    assert isinstance(out, CellOutput)
    assert (out.losses, float(out.regularization)) == ({}, 0.0)
    assert_equal(outcome(cell, out.prediction), outcome(cell, dense_predict(cell, GRAPH, *BATCH)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv", CONVS)
def test_dense_of_genes_and_terms(conv: str, mode: str) -> None:
    """Without a gene its terms have one message less, and so do the genes of these terms."""
    graph = cell_with_terms(11, N - 11)
    cell = model(conv=conv, mode=mode, relations=("annotated", "members", "physical"))
    got, want = cell(graph, *BATCH).prediction, dense_predict(cell, graph, *BATCH)
    assert_equal(outcome(cell, got), outcome(cell, want))


@pytest.mark.parametrize("num_hops", [1, 2, 3])
@pytest.mark.parametrize("conv", CONVS)
def test_dense_khop(conv: str, num_hops: int) -> None:
    cell = model(conv=conv, mode="khop", num_hops=num_hops)
    got, want = cell(GRAPH, *BATCH).prediction, dense_predict(cell, GRAPH, *BATCH)
    assert_equal(outcome(cell, got), outcome(cell, want))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv", CONVS)
def test_gradcheck(conv: str, mode: str) -> None:
    graph = dense.random_graph(5, {"physical": 8, "regulatory": 3})
    torch.manual_seed(0)
    cell = WildtypeDifference(
        2, 2, relations=graph.relations, num_types=2, conv=conv, mode=mode, num_genes=5, num_heads=1, hidden_dim=2, dropout=0.0
    ).double()
    seeds, ptr = ragged([[1], [2, 3], []])
    names = [name for name, _ in cell.named_parameters()]

    def predict(*values: Tensor) -> Tensor:
        inputs = (graph, seeds, ptr, torch.ones_like(seeds))
        return torch.func.functional_call(cell, dict(zip(names, values, strict=True)), inputs).prediction

    # the norm of two entries has values of +-1 wherever they are apart: a small epsilon would hide all gradients
    for module in cell.convs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5
    assert torch.autograd.gradcheck(predict, tuple(cell.parameters()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv", CONVS)
def test_gradients_reach_every_parameter(conv: str, mode: str) -> None:
    cell = model(conv=conv, mode=mode)
    cell(GRAPH, *BATCH).prediction.square().sum().backward()
    for name, parameter in cell.named_parameters():
        if name == "convs.1.out.bias":
            continue  # of the last layer: it is in F(G) and F(G \ S) alike, but for the genes deleted
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


# ------------------------------------------------------------------------------------------------- modes of one model


def of_modes(*modes: str, num_hops: Any = None, **options: Any) -> list[WildtypeDifference]:
    """One model in several modes, with the same weights."""
    return [model(**{**options, "mode": mode, "num_hops": num_hops if mode == "khop" else None}) for mode in modes]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("conv", CONVS)
def test_delta_is_lazy(conv: str, num_layers: int) -> None:
    """Hubs, rows without edges, three relations, sets of 0 to 4 genes."""
    graph, seeds, ptr = problem(seed=3, num_nodes=60, edges=(150, 40, 0), num_sets=20)
    sets = [seeds[begin:end].unique().tolist() for begin, end in itertools.pairwise(ptr.tolist())]
    seeds, ptr = ragged(sets)
    options = {"conv": conv, "num_layers": num_layers, "relations": graph.relations, "num_genes": 60}
    lazy, delta = (
        outcome(cell, cell(graph, seeds, ptr, torch.ones_like(seeds)).prediction)
        for cell in of_modes("lazy", "delta", **options)
    )
    assert_equal(delta, lazy)


@pytest.mark.parametrize("conv", CONVS)
def test_khop_of_everything_is_lazy(conv: str) -> None:
    """In a ring every gene reaches every other, so that the neighbourhood of a set is the cell."""
    ring = torch.stack([torch.arange(N), (torch.arange(N) + 1) % N])
    physical = GRAPH.edge_index("physical")
    graph = MultiGraph.from_edge_index({"ring": ring, "physical": physical}, N, undirected=("ring",))
    seeds, ptr = ragged([[3], [1, 5, 6], [0, 2]])  # an empty set has no neighbourhood, nor has it a difference
    lazy, khop, near = (
        outcome(cell, cell(graph, seeds, ptr, torch.ones_like(seeds)).prediction)
        for mode, hops in (("lazy", None), ("khop", N // 2), ("khop", 1))
        for cell in of_modes(mode, num_hops=hops, conv=conv, relations=graph.relations)
    )
    assert_equal(khop, lazy)
    assert not torch.allclose(near[0], lazy[0])


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_outside_the_encoder(mode: str) -> None:
    """In training, what the MLP is given does not vary, so that the modes agree there too."""
    cell = model(mode=mode, dropout=0.5)
    seen: list[Tensor] = []
    cell.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    first, second = (cell.train()(GRAPH, *BATCH).prediction for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(*seen)


def test_modes_share_their_weights() -> None:
    lazy, khop, delta = of_modes(*MODES)
    assert khop.load_state_dict(lazy.state_dict()).missing_keys == []
    assert delta.load_state_dict(khop.state_dict()).missing_keys == []


# ------------------------------------------------------------------------------------------------- genes and sets


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv", CONVS)
def test_relabelled_genes(conv: str, mode: str) -> None:
    """Identity comes with ids and features: the same cell under other indices gives the same predictions."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    x = torch.randn(N, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cell = model(conv=conv, mode=mode, feature_dim=FEATURES)
    out = cell(GRAPH, *BATCH, features=x)
    same = cell(GRAPH.subgraph(order), order.argsort()[SEEDS], PTR, KINDS, features=x[order], gene_ids=order)
    assert_equal(outcome(cell, same.prediction), outcome(cell, out.prediction))


@pytest.mark.parametrize("mode", MODES)
def test_number_of_genes_changes_between_calls(mode: str) -> None:
    cell = model(mode=mode, num_genes=None, feature_dim=FEATURES)
    assert cell.tokens.project_features is not None
    for number in (N, N + 4, 11):
        graph = GRAPH.extend(number - N) if number >= N else GRAPH.subgraph(torch.arange(number))
        x = torch.randn(number, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        out = cell(graph, *BATCH, features=x).prediction
        want = dense_predict(cell, graph, *BATCH, x=cell.tokens.project_features(x))
        assert_equal(out, want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv", CONVS)
def test_empty_sets(conv: str, mode: str) -> None:
    """Nothing deleted, nothing different: the prediction is that of no difference."""
    cell = model(conv=conv, mode=mode)
    nothing = torch.zeros(0, dtype=torch.int64)
    for sets in (0, 1, 3):
        out = cell(GRAPH, nothing, torch.zeros(sets + 1, dtype=torch.int64), nothing).prediction
        assert_equal(out, cell.mlp(torch.zeros(sets, 2 * DIM, dtype=torch.float64)))
        outcome(cell, out)  # has a backward


def neighbourhood(gene: int) -> list[int]:
    return khop_mask(GRAPH, torch.tensor([gene]), torch.tensor([0, 1]), 1, direction="both")[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv", CONVS)
def test_awkward_sets(conv: str, mode: str) -> None:
    """A gene without edges, a gene with all its neighbours, all neighbours without the gene, all genes but one, all genes."""
    hub = max(range(N), key=lambda gene: len(neighbourhood(gene)))
    others = [gene for gene in neighbourhood(hub) if gene != hub]
    assert len(others) > 3
    seeds, ptr = ragged([[0], neighbourhood(hub), others, list(range(1, N)), list(range(N))])
    cell = model(conv=conv, mode=mode)
    inputs = GRAPH, seeds, ptr, torch.ones_like(seeds)
    assert_equal(outcome(cell, cell(*inputs).prediction), outcome(cell, dense_predict(cell, *inputs)))


@pytest.mark.parametrize("mode", MODES)
def test_order_within_a_set(mode: str) -> None:
    cell = model(mode=mode)
    (seeds, ptr), back = ragged([[9, 2, 5], [7, 4]]), torch.tensor([2, 1, 0, 4, 3])
    kinds = torch.tensor([1, 2, 1, 2, 1])
    out, same = cell(GRAPH, seeds, ptr, kinds), cell(GRAPH, seeds[back], ptr, kinds[back])
    assert_equal(same.prediction, out.prediction)


@pytest.mark.parametrize("mode", MODES)
def test_relations_of_the_graph_that_the_model_does_not_read(mode: str) -> None:
    cell = model(mode=mode, relations=("regulatory", "physical"))  # in another order too
    assert_equal(cell(GRAPH, *BATCH).prediction, dense_predict(cell, GRAPH, *BATCH))


# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv", CONVS)
def test_large_scores_and_weights(conv: str, mode: str) -> None:
    """Scores far beyond what exp takes in float32, and sums that outweigh what is left by a hundred: all stays finite."""
    cell = model(conv=conv, mode=mode).float()
    for name, parameter in cell.named_parameters():
        if "score" in name or "message" in name:
            nn.init.normal_(parameter, std=100.0)
    values = outcome(cell, cell(GRAPH, *BATCH).prediction)
    assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv", CONVS)
def test_autocast(conv: str, mode: str) -> None:
    cell = model(conv=conv, mode=mode).float()
    expected = cell(GRAPH, *BATCH).prediction
    with torch.autocast("cpu", torch.bfloat16):
        out = cell(GRAPH, *BATCH).prediction
    # 8 bits of mantissa through two layers, and differences of nearly equal values
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)
    out.float().sum().backward()
    for name, parameter in cell.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv", CONVS)
def test_bit_equal_from_run_to_run(conv: str, mode: str) -> None:
    """On several threads too, over genes that many samples share."""
    graph = synthetic_cell(seed=0, num_genes=200)
    seeds, ptr = ragged([[gene, gene + 1] for gene in range(0, 60, 2)])
    cell = model(conv=conv, mode=mode, relations=graph.relations, num_genes=200).float()
    torch.set_num_threads(4)  # `one_thread` sets it back
    runs = [outcome(cell, cell(graph, seeds, ptr, torch.ones_like(seeds)).prediction) for _ in range(5)]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


def test_copies() -> None:
    cell = model()
    assert torch.equal(copy.deepcopy(cell)(GRAPH, *BATCH).prediction, cell(GRAPH, *BATCH).prediction)


# ------------------------------------------------------------------------------------------------- training


def train_a_little(data: Cell, steps: int, **options: Any) -> tuple[float, float]:
    """Mean squared errors, of standardised phenotypes, of the first and the last ten steps on batches of 64 pairs."""
    torch.manual_seed(0)
    pairs = split(data, seed=0).train
    cell = WildtypeDifference(
        16, 2, relations=data.graph.relations, num_types=TYPES, num_genes=data.graph.num_nodes, dropout=0.0, **options
    )
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(steps):
        batch = pairs.collate([pairs[int(i)] for i in order.roll(-64 * step)[:64]])
        loss = F.mse_loss(cell(data.graph, batch.seeds, batch.ptr, batch.types).prediction[:, 0], batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


@pytest.mark.parametrize("conv", CONVS)
def test_learns_a_synthetic_cell(conv: str) -> None:
    graph = synthetic_cell(seed=0, num_genes=60, symmetrize=True, self_loops=False)
    cell = synthetic(graph, synthetic_phenotypes(graph, 2_000, seed=0))
    first, last = train_a_little(cell, 60, conv=conv, mode="delta")
    assert last < 0.75 * first


@pytest.fixture(scope="module")
def yeast(yeast_dir: Path) -> Cell:
    return load_cell(yeast_dir)


@pytest.mark.parametrize("mode", MODES)
def test_learns_real_data(mode: str, yeast: Cell) -> None:
    first, last = train_a_little(yeast, 60, mode=mode)
    assert last < 0.75 * first


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"conv": "gcn"}, ValueError, "conv: unknown value 'gcn', expected one of 'sage', 'gin', 'gat'"),
        ({"mode": "eager"}, ValueError, "mode: unknown value 'eager', expected one of 'lazy', 'khop', 'delta'"),
        ({"readout": "max"}, ValueError, "readout: unknown value 'max'"),
        ({"num_layers": 0}, ValueError, "num_layers: expected at least 1, got 0"),
        ({"num_hops": 2}, ValueError, "num_hops: expected None in mode 'lazy', which has no neighbourhood, got 2"),
        ({"num_hops": 0, "mode": "khop"}, ValueError, "num_hops: expected at least 1, got 0"),
        ({"conv": "gat", "num_heads": 3}, ValueError, "num_heads: expected a divisor of dim, 8, got 3"),
        ({"relations": "physical"}, TypeError, "relations: expected a sequence of names, got str 'physical'"),
        ({"relations": ()}, ValueError, "relations: expected at least one, got none"),
        ({"relations": ("a", "a")}, ValueError, r"relations: expected each once, got \('a', 'a'\)"),
        ({"num_genes": None}, ValueError, "num_genes, feature_dim: expected at least one"),
        ({"dropout": 1}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1"),
        ({"out_dim": "1"}, TypeError, "out_dim: expected an int, got str '1'"),
    ],
    ids=str,
)
def test_bad_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": SEEDS.clone().index_fill(0, torch.tensor([1]), 4)}, "seeds: set 0 holds gene 4 twice"),
        ({"seeds": SEEDS + 10}, r"seeds: position 0 holds 14, expected an index in \[0, 14\)"),
        ({"ptr": PTR[:-1]}, "ptr: expected to end with 7"),
        ({"types": KINDS + 1}, r"types: position 1 holds 3, expected an index in \[0, 3\)"),
        ({"graph": GRAPH.subgraph(torch.arange(N)).extend(2)}, "graph: 16 genes, but num_genes is 14"),
        ({"features": torch.zeros(N, 2)}, "features: the model has feature_dim=None"),
        (
            {"graph": dense.random_graph(N, {"physical": 3, "regulatry": 3, "none": 1})},
            "graph: relation of the model: unknown value 'regulatory', .*did you mean 'regulatry'",
        ),
    ],
    ids=["repeated gene", "gene", "ptr", "type", "genes", "features", "relation"],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {"graph": GRAPH, "seeds": SEEDS, "ptr": PTR, "types": KINDS, **change}
    with pytest.raises(ValueError, match=message):
        model()(**given)


def test_wrong_graph() -> None:
    with pytest.raises(TypeError, match="graph: expected a MultiGraph, got dict"):
        model()({}, *BATCH)


@pytest.mark.parametrize("conv", CONVS)
def test_encode_is_the_cell_as_it_is(conv: str) -> None:
    cell = model(conv=conv)
    tokens = cell.tokens(N)
    assert_equal(cell.encode(GRAPH), dense_encode(cell, GRAPH, tokens, torch.arange(N)))
