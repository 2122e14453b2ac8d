from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import cellattn
from cellattn import MultiGraph, reference
from cellattn.data import synthetic_cell
from cellattn.ops import _sets

from .sets import Problem, problem, problems, random_sets
from .test_khop_mask import unpacked


@settings(max_examples=100)
@given(problems())
def test_is_the_reference(p: Problem) -> None:
    node_keep, edge_keep = cellattn.perturbation_mask(*p)
    want_nodes, want_edges = reference.perturbation_mask(*p)
    assert torch.equal(node_keep, want_nodes)
    assert list(edge_keep) == list(p.graph.relations)
    for relation in p.graph.relations:
        assert torch.equal(edge_keep[relation], want_edges[relation])


@settings(max_examples=50)
@given(problems())
def test_packed_is_the_same(p: Problem) -> None:
    num_sets = p.ptr.numel() - 1
    node_keep, edge_keep = cellattn.perturbation_mask(*p)
    node_words, edge_words = cellattn.perturbation_mask(*p, packed=True)
    assert node_words.shape == (p.graph.num_nodes, -(-num_sets // 64))
    assert torch.equal(unpacked(node_words, num_sets), node_keep)
    for relation in p.graph.relations:
        assert edge_words[relation].shape == (p.graph.num_edges(relation), -(-num_sets // 64))
        assert torch.equal(unpacked(edge_words[relation], num_sets), edge_keep[relation])


def test_the_edges_that_are_left_are_pygs_subgraph() -> None:
    utils = pytest.importorskip("torch_geometric.utils")
    p = problem(0, 60, [50, 0, 400], 20)
    node_keep, edge_keep = cellattn.perturbation_mask(*p)
    for b in range(20):
        for relation in p.graph.relations:
            index = p.graph.edge_index(relation)
            *_, mask = utils.subgraph(node_keep[b], index, num_nodes=60, return_edge_mask=True)
            assert torch.equal(edge_keep[relation][b], mask)


def test_synthetic_cell() -> None:
    graph = synthetic_cell(num_genes=900)
    sets = random_sets(900, 67)
    node_keep, edge_keep = cellattn.perturbation_mask(graph, *sets)
    want_nodes, want_edges = reference.perturbation_mask(graph, *sets)
    assert torch.equal(node_keep, want_nodes)
    assert all(torch.equal(edge_keep[relation], want_edges[relation]) for relation in graph.relations)


def test_real_tables(yeast_graph: MultiGraph) -> None:
    sets = random_sets(yeast_graph.num_nodes, 5)
    _, edge_keep = cellattn.perturbation_mask(yeast_graph, *sets)
    _, want = reference.perturbation_mask(yeast_graph, *sets)
    assert all(torch.equal(edge_keep[relation], want[relation]) for relation in yeast_graph.relations)


def test_a_mask_that_does_not_fit_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(3, 40, [600], 70)
    num_edges = p.graph.num_edges("r0")
    assert num_edges > 200
    monkeypatch.setattr(_sets, "_WORTH_ASKING", 0)
    monkeypatch.setattr(_sets, "available_memory", lambda device: 16 * num_edges)  # the words fit, 70 bytes an edge do not
    with pytest.raises(MemoryError, match=rf"{num_edges * 70:,} bytes on cpu for a mask of {num_edges} edges by 70 samples"):
        cellattn.perturbation_mask(*p)
    cellattn.perturbation_mask(*p, packed=True)
