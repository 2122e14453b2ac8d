"""The synthetic cell has the published counts, and its phenotypes need the graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn import MultiGraph
from cellattn.data import synthetic_cell, synthetic_phenotypes

PUBLISHED = {
    "regulatory": (3632, 9753),
    "physical": (5721, 139463),
    "tflink": (5092, 201898),
    "string12_neighborhood": (2204, 147874),
    "string12_fusion": (3095, 11810),
    "string12_cooccurence": (2615, 11115),
    "string12_coexpression": (6503, 1002538),
    "string12_experimental": (6036, 825101),
    "string12_database": (4044, 73818),
}
DIRECTED = ("regulatory", "tflink")


@pytest.fixture(scope="module")
def cell() -> MultiGraph:
    return synthetic_cell(0)


def off_diagonal(graph: MultiGraph, relation: str) -> Tensor:
    edges = graph.edge_index(relation)
    return edges[:, edges[0] != edges[1]]


def total_degree(graph: MultiGraph, relation: str) -> Tensor:
    return torch.bincount(off_diagonal(graph, relation).reshape(-1), minlength=graph.num_nodes)


def test_counts_are_the_published_ones(cell: MultiGraph) -> None:
    assert cell.num_nodes == 6607
    assert cell.num_edges() == 2_482_833
    counts = {r: (int((total_degree(cell, r) > 0).sum()), off_diagonal(cell, r).shape[1]) for r in cell.relations}
    assert counts == PUBLISHED
    assert all(cell.num_edges(r) - edges == 6607 for r, (_, edges) in PUBLISHED.items())


def test_undirected_relations_hold_each_pair_once(cell: MultiGraph) -> None:
    for relation in set(PUBLISHED) - set(DIRECTED):
        low, high = off_diagonal(cell, relation).sort(0).values
        assert (low * 6607 + high).unique().numel() == PUBLISHED[relation][1]


def test_degrees_are_heavy_tailed_and_hubs_shared(cell: MultiGraph) -> None:
    degree = {r: total_degree(cell, r).double() for r in cell.relations}
    for relation, d in degree.items():
        d = d[d > 0]
        assert d.max() > 8 * d.mean(), relation
        # the upper tenth of an exponential tail holds 33% of all edges
        assert d.sort().values[-len(d) // 10 :].sum() > 0.4 * d.sum(), relation
    undirected = torch.stack([degree[r].log1p() for r in cell.relations if r not in DIRECTED])
    assert undirected.corrcoef().min() > 0.4  # independent relations would give 0 +- 0.02
    sources = {r: set(off_diagonal(cell, r)[0].tolist()) for r in DIRECTED}
    assert len(sources["regulatory"] & sources["tflink"]) > 0.5 * len(sources["regulatory"])


def test_equal_seeds_give_equal_cells() -> None:
    first, again, other = (synthetic_cell(seed, num_genes=300) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_symmetrize_mirrors_undirected_relations_only() -> None:
    plain, both = (synthetic_cell(1, num_genes=300, symmetrize=s, self_loops=False) for s in (False, True))
    for relation in plain.relations:
        pairs, mirrored = plain.edge_index(relation), both.edge_index(relation)
        expected = pairs if relation in DIRECTED else torch.cat([pairs, pairs.flip(0)], 1)
        assert set(map(tuple, mirrored.T.tolist())) == set(map(tuple, expected.T.tolist()))
        assert torch.equal(both.weight(relation), torch.ones(both.num_edges(relation)))


@pytest.mark.parametrize("num_genes", [32, 33, 500, 20_000], ids=lambda n: f"genes{n}")
@pytest.mark.parametrize("edge_scale", [1e-6, 0.01, 1.0], ids=lambda s: f"scale{s:g}")
def test_scaled_counts_are_exact_or_at_their_bounds(num_genes: int, edge_scale: float) -> None:
    graph = synthetic_cell(0, num_genes=num_genes, edge_scale=edge_scale, self_loops=False)
    for relation, (genes, edges) in PUBLISHED.items():
        covered = round(genes * num_genes / 6607)
        assert int((total_degree(graph, relation) > 0).sum()) == covered
        count = graph.num_edges(relation)
        assert count == round(edges * edge_scale) or count == covered or count <= covered**2 / 2
        assert (graph.edge_index(relation)[0] != graph.edge_index(relation)[1]).all()


def pearson(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def ridge(train: Tensor, y: Tensor, test: Tensor, penalty: float) -> Tensor:
    gram = train.T @ train + penalty * torch.eye(train.shape[1], dtype=train.dtype)
    return test @ torch.linalg.solve(gram, train.T @ y)


def hub_ties(graph: MultiGraph, num_hubs: int) -> Tensor:
    """What a graph tells without any label: the share of each hub among those a gene is tied to."""
    hubs = torch.stack([total_degree(graph, r) for r in graph.relations]).sum(0).argsort(descending=True, stable=True)
    ties = torch.zeros(graph.num_nodes, num_hubs, dtype=torch.float64)
    for relation in graph.relations:
        adjacency = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
        source, target = off_diagonal(graph, relation)
        adjacency[source, target] = adjacency[target, source] = 1
        tied = adjacency[:, hubs[:num_hubs]]
        ties += tied / tied.sum(1, keepdim=True).clamp(min=1)
    return ties - ties.mean(0)


def test_graphs_tell_what_an_additive_model_cannot_know() -> None:
    graph = synthetic_cell(0, num_genes=600)
    data = synthetic_phenotypes(graph, 6000, seed=1, num_hubs=12)
    members = data.seeds.reshape(-1, 2)
    additive = torch.zeros(len(data), graph.num_nodes, dtype=torch.float64).scatter_(1, members, 1.0)

    def with_ties(cell: MultiGraph) -> Tensor:
        a, b = hub_ties(cell, 12)[members].unbind(1)
        products = a[:, :, None] * b[:, None, :] + b[:, :, None] * a[:, None, :]
        return torch.cat([additive, 10 * products.flatten(1)], 1)

    train, test = data.split_mask("train"), data.split_mask("test")
    y = data.y.double()
    features = {"additive": additive, "graphs": with_ties(graph), "others": with_ties(synthetic_cell(9, num_genes=600))}
    score = {name: pearson(ridge(x[train], y[train], x[test], 5.0), y[test]) for name, x in features.items()}
    # without noise a third of the variance is additive: a Pearson of 0.56 is the most an additive model can reach
    assert score["additive"] < 0.56
    assert score["graphs"] > score["additive"] + 0.2
    assert score["others"] < score["additive"] + 0.05


def test_phenotypes_are_seeded_and_split() -> None:
    graph = synthetic_cell(0, num_genes=100)
    first, again, other = (synthetic_phenotypes(graph, 2000, seed=seed, set_size=(1, 3)) for seed in (2, 2, 3))
    assert torch.equal(first.y, again.y)
    assert torch.equal(first.seeds, again.seeds)
    assert first.split == again.split
    assert not torch.equal(first.y, other.y)
    assert first.ptr.diff().unique().tolist() == [1, 3]
    assert set(first.split_names) == {"train", "validation", "test"}
    assert 0.7 < first.split_mask("train").double().mean() < 0.9  # 100 single genes share splits, so the share is loose
    assert not first.subset("train").overlaps(first.subset("test")).any()


def test_sets_are_drawn_evenly_and_completely() -> None:
    graph = synthetic_cell(0, num_genes=32)
    data = synthetic_phenotypes(graph, 4000, set_size=31)
    counts = torch.bincount(data.seeds, minlength=32)
    # each gene is left out with probability 1 / 32: 125 of 4000 times, standard deviation 11
    assert ((4000 - counts) > 125 - 60).all()
    assert ((4000 - counts) < 125 + 60).all()


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"set_size": 0}, {"noise": 0}, {"set_size": 32}], ids=str)
def test_phenotypes_at_the_edges(options: dict[str, Any]) -> None:
    graph = synthetic_cell(0, num_genes=32)
    data = synthetic_phenotypes(graph, **{"num_samples": 5, **options})
    assert len(data) == options.get("num_samples", 5)
    assert torch.isfinite(data.y).all()


def test_phenotypes_of_a_graph_without_edges_are_additive() -> None:
    graph = MultiGraph.from_edge_index({"physical": torch.empty(2, 0, dtype=torch.int64)}, 40)
    data = synthetic_phenotypes(graph, 200, noise=0.0)
    members = torch.zeros(200, 40, dtype=torch.float64).scatter_(1, data.seeds.reshape(-1, 2), 1.0)
    fitted = members @ torch.linalg.lstsq(members, data.y.double()).solution
    torch.testing.assert_close(fitted, data.y.double(), atol=1e-6, rtol=0)  # y is float32


def phenotypes(**options: Any) -> Callable[[], object]:
    return lambda: synthetic_phenotypes(synthetic_cell(0, num_genes=32), **{"num_samples": 5, **options})


MALFORMED = [
    ("seed-negative", lambda: synthetic_cell(-1), ValueError, "seed: expected at least 0, got -1"),
    ("seed-float", lambda: synthetic_cell(0.5), TypeError, "seed: expected an int, got float 0.5"),  # type: ignore[arg-type]
    ("genes-few", lambda: synthetic_cell(num_genes=31), ValueError, "num_genes: expected at least 32, got 31"),
    ("genes-str", lambda: synthetic_cell(num_genes="9"), TypeError, "num_genes: expected an int, got str '9'"),  # type: ignore[arg-type]
    (
        "scale-zero",
        lambda: synthetic_cell(edge_scale=0),
        ValueError,
        "edge_scale: expected a finite number above 0, got 0",
    ),
    ("scale-nan", lambda: synthetic_cell(edge_scale=float("nan")), ValueError, "edge_scale: expected a finite number"),
    ("scale-str", lambda: synthetic_cell(edge_scale="2"), ValueError, "edge_scale: expected a finite number, got str"),  # type: ignore[arg-type]
    ("graph", lambda: synthetic_phenotypes({}, 5), TypeError, "graph: expected a MultiGraph, got dict {}"),  # type: ignore[arg-type]
    ("samples-negative", phenotypes(num_samples=-1), ValueError, "num_samples: expected at least 0, got -1"),
    ("samples-float", phenotypes(num_samples=2.0), TypeError, "num_samples: expected an int, got float 2.0"),
    ("size-large", phenotypes(set_size=33), ValueError, "set_size: expected at most 32, the number of genes, got 33"),
    ("size-negative", phenotypes(set_size=(2, -1)), ValueError, "set_size: expected at least 0, got -1"),
    ("size-none", phenotypes(set_size=()), ValueError, "set_size: expected at least one size, got none"),
    ("size-float", phenotypes(set_size=1.5), TypeError, "set_size: expected an int, got float 1.5"),
    ("noise-negative", phenotypes(noise=-0.1), ValueError, "noise: expected a finite number of at least 0, got -0.1"),
    ("noise-none", phenotypes(noise=None), ValueError, "noise: expected a finite number, got NoneType None"),
    ("hubs-many", phenotypes(num_hubs=33), ValueError, "num_hubs: expected at most 32, the number of genes, got 33"),
    ("factors-zero", phenotypes(num_factors=0), ValueError, "num_factors: expected at least 1, got 0"),
]


@pytest.mark.parametrize(("make", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in MALFORMED])
def test_refuses(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()
