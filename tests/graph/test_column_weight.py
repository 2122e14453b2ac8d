"""Weights W of a relation's columns, T = D⁻¹ B W Bᵀ: in the ties of a graph, in what is made from it, in files and copies."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, checkpoint, reference
from cellattn.nn import CellEncoder

from ..compare import assert_same, cell_with_terms, leaves
from ..nn import dense

GENES, TERMS = 23, 9
W = {"annotated": TERMS, "members": GENES, "is_a": TERMS, "physical": GENES}  # by how many columns there are


def weights(relation: str) -> Tensor:
    """float64, one of them 0."""
    weight = 0.2 + torch.rand(W[relation], dtype=torch.float64, generator=torch.Generator().manual_seed(len(relation)))
    weight[1] = 0
    return weight


def weighted(*relations: str) -> MultiGraph:
    graph = cell_with_terms(GENES, TERMS)
    for relation in relations:
        graph = graph.with_column_weight(relation, weights(relation))
    return graph


def pairs(graph: MultiGraph, relation: str, weight: Tensor, diagonal: bool) -> MultiGraph:
    """C = B W Bᵀ as a relation of its own, summed edge by edge; weights count from the first column of their type."""
    first = graph.node_types[graph.joins(relation)[1]].start
    c = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    edges = list(zip(*graph.edge_index(relation).tolist(), graph.weight(relation).tolist(), strict=True))
    for i, e, b_i in edges:
        for j, other, b_j in edges:
            if e == other and (i != j or diagonal):
                c[i, j] += b_i * weight[e - first] * b_j
    index = c.nonzero().T
    return MultiGraph.from_edge_index({relation: index}, graph.num_nodes, edge_weight={relation: c[tuple(index)]})


@pytest.mark.parametrize("diagonal", [False, True], ids=["off", "diagonal"])
@pytest.mark.parametrize("relation", list(W))
def test_a_tie_has_the_weights(relation: str, diagonal: bool) -> None:
    """Against pairs with weights, and against the definition; other relations of the graph keep weight 1."""
    graph = weighted(relation)
    t = 1 + graph.num_nodes
    q, k, v = leaves((2, t, 8), (2, t, 8), (2, t, 5))
    options: dict[str, Any] = {"loss": "kl_comembership", "diagonal": diagonal}

    def loss(module: Any, q: Tensor, k: Tensor, v: Tensor, graph: MultiGraph, **options: Any) -> Tensor:
        return module.graph_attention(q, k, v, graph, [(relation, 1)], **options)[1][0]

    ours = partial(loss, cellattn, graph=graph, **options)
    assert_same(ours, partial(loss, reference, graph=graph, **options), q, k, v)
    assert_same(ours, partial(loss, reference, graph=pairs(graph, relation, weights(relation), diagonal)), q, k, v)
    explicit = cell_with_terms(GENES, TERMS).comembership(relation, weight=weights(relation), diagonal=diagonal)
    assert torch.equal(graph.comembership(relation, diagonal=diagonal).inv_mass, explicit.inv_mass)
    ones = torch.ones(W[relation], dtype=torch.float64)
    for other in W.keys() - {relation}:
        assert torch.equal(graph.column_weight(other), torch.ones(W[other], dtype=torch.float64))
    assert torch.equal(graph.column_weight(relation), weights(relation))
    assert torch.equal(graph.comembership(relation, weight=ones).weight, ones)  # given for once


def test_in_the_encoder() -> None:
    """Beside other ties, against dense maps and a dense target: values and all gradients."""
    shared = {"loss": "kl_comembership"}
    ties: list[Any] = [
        (0, 0, "annotated", 0.1, shared),
        (1, 1, "members", 0.3, {**shared, "diagonal": True}),
        (1, 0, "annotated", 0.2),
    ]
    graph = weighted("annotated", "members")
    torch.manual_seed(0)
    model = CellEncoder(16, 2, 2, ties=ties).double().eval()
    x = torch.randn(graph.num_nodes, 16, dtype=torch.float64).requires_grad_()
    results = []
    for _, h, losses in (model(x, graph), dense.encode(model, x, graph)):
        total = h.pow(3).sum() + model.regularization(losses)
        results.append((h, losses, torch.autograd.grad(total, [x, *model.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    plain = model(x, cell_with_terms(GENES, TERMS))[2]
    changed = {name for name, value in results[0][1].items() if not torch.equal(value, plain[name])}
    assert changed == {name for name in plain if name.startswith("kl_comembership")}  # and no other loss reads them


def test_graphs_made_from_it_have_them() -> None:
    graph, annotated, members = weighted("annotated", "members"), weights("annotated"), weights("members")
    for same in (
        graph.select(["members", "annotated"]), graph.rewired("annotated", 3), graph.symmetrized("physical"),
        graph.hops("physical", 2), graph.with_self_loops("is_a"), graph.without_self_loops("physical"), graph.to("cpu"),
        copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)),
    ):  # fmt: skip
        assert torch.equal(same.column_weight("annotated"), annotated)
        assert torch.equal(same.column_weight("members"), members)
    nodes = torch.tensor([5, 0, 7, GENES + 4, GENES + 1])
    part = graph.subgraph(nodes)
    assert torch.equal(part.column_weight("annotated"), annotated[[4, 1]])
    assert torch.equal(part.column_weight("members"), members[[5, 0, 7]])
    for kind, longer, other in (("gene", "members", "annotated"), ("term", "annotated", "members")):
        grown = graph.extend(2, node_type=kind)
        assert torch.equal(grown.column_weight(other), weights(other))
        assert torch.equal(grown.column_weight(longer), torch.cat([weights(longer), torch.ones(2).double()]))


@pytest.mark.parametrize("relation", ["annotated", "members"])
def test_renamed_columns_take_their_weights_along(relation: str) -> None:
    """T of genes renamed at random is T with its rows and columns moved: the sorted values of its rows stay."""
    graph = weighted(relation)
    renamed = graph.permuted(relation, seed=4)
    assert not torch.equal(renamed.column_weight(relation), graph.column_weight(relation))
    before, after = (reference.comembership(g.comembership(relation)).sort(1).values for g in (graph, renamed))
    # rows in an order of their own: by their values
    before, after = (torch.tensor(sorted(t.tolist())) for t in (before, after))
    torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-15)


def test_files_and_digests(tmp_path: Path) -> None:
    graph, plain, path = weighted("annotated"), cell_with_terms(GENES, TERMS), tmp_path / "cell.safetensors"
    assert graph != plain
    assert plain != graph
    assert graph.digest() != plain.digest()
    assert graph.digest() != graph.with_column_weight("annotated", 2 * weights("annotated")).digest()
    genes = MultiGraph.from_edge_index({"a": torch.tensor([[0, 1, 2], [3, 3, 0]])}, 4)
    for written in (graph, genes.with_column_weight("a", torch.arange(4.0))):
        written.save(path)
        read = MultiGraph.load(path)
        assert read == written
        assert read.digest() == written.digest()
        for relation in written:
            assert torch.equal(read.column_weight(relation), written.column_weight(relation))
        assert b"cellattn.MultiGraph/4" in path.read_bytes()
    torch.save(graph, tmp_path / "graph.pt")
    assert torch.load(tmp_path / "graph.pt", weights_only=True) == graph


def test_weights_of_1_are_none(tmp_path: Path) -> None:
    """A graph is the same whether it was told of them, lost its others, or never had any."""
    graph, plain, path = weighted("annotated"), cell_with_terms(GENES, TERMS), tmp_path / "cell.safetensors"
    ones = torch.ones(TERMS)
    for same, want in (
        (plain.with_column_weight("annotated", ones), plain),
        (graph.with_column_weight("annotated", ones), plain),
        (graph.select(["physical"]), plain.select(["physical"])),
        (graph.subgraph(torch.arange(GENES)), plain.subgraph(torch.arange(GENES))),
    ):
        assert same == want
        assert same.digest() == want.digest()
        same.save(path)
        assert b"cellattn.MultiGraph/3" in path.read_bytes()


def test_a_file_that_is_read_in_inference_mode(tmp_path: Path) -> None:
    weighted("annotated").save(tmp_path / "g")
    with torch.inference_mode():
        read = MultiGraph.load(tmp_path / "g")
    assert not any(x.is_inference() for x in read._arrays().values())


def test_a_model_in_a_file_knows_its_graph(tmp_path: Path) -> None:
    graph, path = weighted("annotated"), tmp_path / "model.safetensors"
    torch.manual_seed(0)
    tie = (0, 0, "annotated", 0.1, {"loss": "kl_comembership"})
    model = cellattn.nn.CellTransformer(8, 1, 2, num_types=3, num_genes=graph.num_nodes, ties=[tie]).eval()
    graph.save(tmp_path / "cell.safetensors")
    checkpoint.save(path, model, graph=graph, graph_file=tmp_path / "cell.safetensors")
    found = checkpoint.load(path)
    assert found.graph_file is not None
    read = MultiGraph.load(found.graph_file)
    assert found.graph_digest == read.digest() != cell_with_terms(GENES, TERMS).digest()
    seeds, ptr, types = torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([1, 1])
    first, again = (m(g, seeds, ptr, types)[1:] for m, g in ((model, graph), (found.model, read)))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_of_arrays_and_of_the_users_tensor() -> None:
    """NumPy arrays and integers are taken, in float64; the user's tensor stays the user's."""
    graph, weight = cell_with_terms(GENES, TERMS), weights("annotated")
    made = graph.with_column_weight("annotated", weight)
    weight += 1
    assert torch.equal(made.column_weight("annotated"), weights("annotated"))
    numbers = torch.arange(TERMS)
    kinds: list[Any] = [numbers.numpy(), numbers, numbers.half()]
    for given in kinds:
        assert torch.equal(graph.with_column_weight("annotated", given).column_weight("annotated"), numbers.double())
    assert graph.column_weight("annotated").eq(1).all()


def test_a_pickle_from_before_there_were_weights() -> None:
    state = cell_with_terms(GENES, TERMS).__getstate__()
    del state["_column_weight"]
    old = MultiGraph.__new__(MultiGraph)
    old.__setstate__(state)
    assert old == cell_with_terms(GENES, TERMS)
    assert old.column_weight("annotated").eq(1).all()


def test_a_pickle_from_before_weights_were_scaled() -> None:
    graph = cell_with_terms(GENES, TERMS)
    graph.comembership("annotated")
    state = graph.__getstate__()
    del state["_has_unusual_mass"], state["_scaled"]
    state["_shared"] = {key: constants[:5] for key, constants in state["_shared"].items()}
    old = MultiGraph.__new__(MultiGraph)
    old.__setstate__(state)
    assert old == graph
    assert torch.equal(old.comembership("annotated").share, graph.comembership("annotated").share)


@pytest.mark.parametrize(
    ("relation", "weight", "error", "words"),
    [
        ("off", torch.ones(TERMS), ValueError, "relation: unknown value 'off'"),
        ("annotated", None, TypeError, "weight: expected a tensor, got None"),
        ("annotated", torch.ones(GENES), ValueError, "weight: expected 9, one a column's token, got 23"),
        ("members", torch.ones(TERMS), ValueError, "weight: expected 23, one a column's token, got 9"),
        ("annotated", torch.full((TERMS,), -1.0), ValueError, "weight: position 0 holds -1.0, expected a finite weight >= 0"),
        ("annotated", torch.full((TERMS,), torch.inf), ValueError, "weight: position 0 holds inf"),
        ("annotated", torch.ones(TERMS, 1), ValueError, "weight: expected"),
        ("annotated", torch.ones(TERMS).bool(), ValueError, "weight: expected numbers, got dtype torch.bool"),
    ],
)
def test_bad_input(relation: str, weight: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cell_with_terms(GENES, TERMS).with_column_weight(relation, weight)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (torch.ones(4, 31, dtype=torch.float64), r"column_weight: expected \[4, 32\], got \[4, 31\]"),
        (torch.ones(4, 32), "column_weight: expected dtype"),
        (torch.full((4, 32), -1.0, dtype=torch.float64), "weight: position 0 holds -1.0"),
    ],
    ids=["shape", "float32", "negative"],
)
def test_a_file_with_impossible_weights(tmp_path: Path, array: Tensor, words: str) -> None:
    graph = weighted("annotated")
    graph._column_weight = array
    graph.save(tmp_path / "g")
    with pytest.raises(ValueError, match=f"holds no valid MultiGraph: .*{words}"):
        MultiGraph.load(tmp_path / "g")
