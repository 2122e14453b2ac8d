from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from cellattn import MultiGraph
from cellattn.nn import CellOutput, CellTransformer

from ..compare import cell_with_terms
from . import dense

N, F = 15, 5
GRAPH = dense.random_graph(N, {"physical": 45, "regulatory": 12})
TIES = ((0, 1, "physical", 0.5), (1, 0, "regulatory", 0.25))
SEEDS = torch.tensor([4, 7, 1, 0, 10, 4])
KINDS = torch.tensor([1, 2, 1, 1, 1, 2])
PTR = torch.tensor([0, 2, 2, 3, 6])
BATCH = (SEEDS, PTR, KINDS)


def model(**options: Any) -> CellTransformer:
    torch.manual_seed(0)
    defaults = {"num_types": 3, "num_genes": N, "feature_dim": F, "ties": TIES, "dropout": 0.0}
    return CellTransformer(8, 2, 2, **{**defaults, **options}).double()


def features(number: int = N) -> torch.Tensor:
    return torch.randn(number, F, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inputs", ["embedding", "features", "both"])
def test_dense(inputs: str) -> None:
    options: dict[str, Any] = {"embedding": {"feature_dim": None}, "features": {"num_genes": None}, "both": {}}[inputs]
    cell = model(pool=("sum", "pairwise"), **options)
    x = features() if inputs != "embedding" else None
    out = cell(GRAPH, *BATCH, features=x)
    assert isinstance(out, CellOutput)
    tokens = torch.zeros(N, 8, dtype=torch.float64)
    if cell.tokens.embedding is not None:
        tokens = tokens + cell.tokens.embedding.weight
    if cell.tokens.project_features is not None:
        tokens = tokens + cell.tokens.project_features(features())
    h_cls, h, losses = dense.encode(cell.encoder, tokens, GRAPH)
    torch.testing.assert_close(out.prediction, dense.predict(cell.head, h_cls, h, *BATCH))
    torch.testing.assert_close(out.losses, losses)
    expected = 0.5 * losses["kl/layer0/head1/physical"] + 0.25 * losses["kl/layer1/head0/regulatory"]
    torch.testing.assert_close(out.regularization, expected)


def test_dense_of_genes_and_terms() -> None:
    graph = cell_with_terms(11, N - 11)
    cell = model(feature_dim=None, ties=[(0, 0, "annotated", 0.5), (0, 1, "members", 0.3), (1, 0, "physical", 0.2)])
    out = cell(graph, *BATCH)
    assert cell.tokens.embedding is not None
    h_cls, h, losses = dense.encode(cell.encoder, cell.tokens.embedding.weight, graph)
    torch.testing.assert_close(out.prediction, dense.predict(cell.head, h_cls, h, *BATCH))
    torch.testing.assert_close(out.losses, losses)


def test_gradients_reach_every_parameter() -> None:
    cell = model(pool=("sum", "pairwise"))
    out = cell(GRAPH, *BATCH, features=features())
    (out.prediction.square().sum() + out.regularization).backward()
    for name, parameter in cell.named_parameters():
        if name == "head.key.bias":
            continue  # one number added to all scores of a query: softmax does not see it
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_relabelled_genes() -> None:
    """Identity comes with ids and features: the same cell under other indices gives the same predictions."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    place = order.argsort()
    cell = model().eval()
    out = cell(GRAPH, *BATCH, features=features())
    same = cell(GRAPH.subgraph(order), place[SEEDS], PTR, KINDS, features=features()[order], gene_ids=order)
    torch.testing.assert_close(tuple(same), tuple(out))


def test_number_of_genes_changes_between_calls() -> None:
    cell = model(num_genes=None).eval()
    assert cell.tokens.project_features is not None
    for number in (N, N + 4, 11):
        graph = GRAPH.extend(number - N) if number >= N else GRAPH.subgraph(torch.arange(number))
        out = cell(graph, *BATCH, features=features(number))
        h_cls, h, _ = dense.encode(cell.encoder, cell.tokens.project_features(features(number)), graph)
        torch.testing.assert_close(out.prediction, dense.predict(cell.head, h_cls, h, *BATCH))


def test_sampled_rows_only_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = model(sampled_rows=3)
    x = features()
    every = model().eval()(GRAPH, *BATCH, features=x).losses
    torch.testing.assert_close(cell.eval()(GRAPH, *BATCH, features=x).losses, every)
    cell.train()
    drawn = [cell(GRAPH, *BATCH, features=x, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    torch.testing.assert_close(drawn[0].losses, drawn[1].losses, rtol=0, atol=0)
    assert all(drawn[0].losses[name] != drawn[2].losses[name] for name in every)
    torch.testing.assert_close(drawn[0].prediction, drawn[2].prediction)


@pytest.mark.parametrize(("sampled_rows", "share"), [(2, None), (0.5, 0.5), (1.0, 1.0), (0.001, None)], ids=str)
def test_number_of_sampled_rows(sampled_rows: float, share: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = model(sampled_rows=sampled_rows)
    seen = {}
    encode = cell.encoder.forward

    def watch(x: torch.Tensor, graph: MultiGraph, *, rows: Any, generator: Any) -> Any:
        seen.update(rows)
        return encode(x, graph, rows=rows, generator=generator)

    monkeypatch.setattr(cell.encoder, "forward", watch)
    cell(GRAPH, *BATCH, features=features())
    assert set(seen) == {"physical", "regulatory"}
    for relation, rows in seen.items():
        with_edges = int((GRAPH.degree(relation) > 0).sum())
        expected = round(share * with_edges) if share else (sampled_rows if sampled_rows >= 1 else 1)
        assert len(rows) == len(rows.unique()) == expected


def test_a_fraction_of_no_rows() -> None:
    """A graph without edges is a graph."""
    bare = MultiGraph.from_edge_index({name: torch.empty(2, 0, dtype=torch.int64) for name in GRAPH.relations}, N)
    out = model(sampled_rows=0.5)(bare, *BATCH, features=features())
    assert all(loss == 0 for loss in out.losses.values())
    assert out.losses


def test_more_sampled_rows_than_rows() -> None:
    with pytest.raises(ValueError, match="num_rows"):
        model(sampled_rows=N)(GRAPH, *BATCH, features=features())  # the first gene has no edge


@pytest.mark.parametrize("seeds", [[], [3]], ids=["no sets", "one set"])
def test_small_batches(seeds: list[int]) -> None:
    index = torch.tensor(seeds, dtype=torch.int64)
    out = model()(GRAPH, index, torch.arange(len(seeds) + 1), torch.ones_like(index), features=features())
    assert out.prediction.shape == (len(seeds), 1)
    (out.prediction.sum() + out.regularization).backward()


def test_state_dict_round_trip() -> None:
    cell = model(pool=("mean", "hypersagnn"))
    file = io.BytesIO()
    torch.save(cell.state_dict(), file)
    file.seek(0)
    other = model(pool=("mean", "hypersagnn"))
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(
        tuple(other(GRAPH, *BATCH, features=features())),
        tuple(cell(GRAPH, *BATCH, features=features())),
        rtol=0,
        atol=0,
    )


def test_learns() -> None:
    """The phenotype of pairs is a product of single effects: a few steps fit it."""
    torch.manual_seed(0)
    effect = torch.randn(N)
    pairs = torch.combinations(torch.arange(N))
    y = effect[pairs].prod(1, keepdim=True)
    batch = pairs.flatten(), torch.arange(0, 2 * len(pairs) + 1, 2), torch.ones(2 * len(pairs), dtype=torch.int64)
    cell = model(feature_dim=None, pool=("sum", "pairwise")).float()
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        out = cell(GRAPH, *batch)
        loss = (out.prediction - y).square().mean()
        optimizer.zero_grad()
        (loss + 1e-3 * out.regularization).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_autocast() -> None:
    cell = model(pool=("sum", "pairwise", "hypersagnn")).float()
    x = features().float()
    expected = cell(GRAPH, *BATCH, features=x)
    with torch.autocast("cpu", torch.bfloat16):
        out = cell(GRAPH, *BATCH, features=x)
    # 8 bits of mantissa through two layers and the head, on values of about 1
    torch.testing.assert_close(out.prediction.float(), expected.prediction, rtol=0, atol=0.05)
    torch.testing.assert_close(out.regularization.float(), expected.regularization, rtol=0.02, atol=0)
    (out.prediction.float().sum() + out.regularization).backward()
    for name, parameter in cell.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compile_training_step(backend: str) -> None:
    """One graph, forward and backward; the fast backend also with batches of other sizes after the first."""
    torch.compiler.reset()
    cell = model(pool=("sum", "pairwise", "hypersagnn"))
    x = features()
    batches = [BATCH, (SEEDS[:3], torch.tensor([0, 2, 3]), KINDS[:3]), (SEEDS[:0], torch.tensor([0, 0]), KINDS[:0])]
    if backend == "inductor":  # compiling its kernels takes a while
        batches = batches[:1]
    compiled = torch.compile(cell, fullgraph=True, dynamic=backend == "aot_eager", backend=backend)
    for batch in batches:
        results = []
        for run in (cell, compiled):
            out = run(GRAPH, *batch, features=x)
            loss = out.prediction.square().sum() + out.regularization
            results.append((tuple(out), torch.autograd.grad(loss, list(cell.parameters()))))
        torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)  # float64, other order of sums


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_genes": None, "feature_dim": None}, ValueError, "num_genes, feature_dim: expected at least one"),
        ({"num_genes": 0}, ValueError, "num_genes: expected at least 1, got 0"),
        ({"feature_dim": "5"}, TypeError, "feature_dim: expected an int, got str '5'"),
        ({"sampled_rows": 0}, ValueError, "sampled_rows: expected at least 1, got 0"),
        ({"sampled_rows": 1.5}, ValueError, r"sampled_rows: expected a fraction in \(0, 1\], got 1.5"),
        ({"sampled_rows": True}, TypeError, "sampled_rows: expected an int, got bool True"),
        ({"num_types": 0}, ValueError, "num_types: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(**options)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {}, "features: the model has feature_dim=5, got NoneType None"),
        ({"feature_dim": None}, {"features": features()}, "features: the model has feature_dim=None"),
        ({}, {"features": features()[:, :3]}, "features: expected a last dimension of 5"),
        ({}, {"features": features(N + 1)}, "features: expected 15 rows, one a gene, got 16"),
        ({"num_genes": N - 1, "feature_dim": None}, {}, "graph: 15 genes, but num_genes is 14"),
        ({"feature_dim": None}, {"gene_ids": torch.arange(3)}, "gene_ids: expected 15, one a gene, got 3"),
        ({"feature_dim": None}, {"gene_ids": torch.arange(N) + 1}, "gene_ids: position 14 holds 15"),
        ({"num_genes": None}, {"gene_ids": torch.arange(N), "features": features()}, "gene_ids: the model has no"),
    ],
    ids=["no features", "features", "width", "rows", "table", "ids", "id", "no table"],
)
def test_bad_input(options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**options)(GRAPH, *BATCH, **arguments)


def test_wrong_graph() -> None:
    with pytest.raises(TypeError, match="graph: expected a MultiGraph, got dict"):
        model()({}, *BATCH, features=features())
