from __future__ import annotations

import pytest
import torch

import cellattn

from ..compare import leaves, random_graph


def test_without_replacement_among_rows_with_an_edge() -> None:
    graph = random_graph(50, {"a": 60})
    has_edge = (graph.degree("a") > 0).nonzero().flatten()
    assert 0 < has_edge.numel() < 50
    rows = cellattn.sample_rows(graph, "a", 10, generator=torch.Generator().manual_seed(0))
    assert rows.dtype == torch.int64
    assert rows.unique().numel() == 10
    assert torch.isin(rows, has_edge).all()
    assert torch.equal(cellattn.sample_rows(graph, "a", has_edge.numel()), has_edge)
    assert cellattn.sample_rows(graph, "a", 0).numel() == 0


def test_uniform() -> None:
    graph = random_graph(20, {"a": 30})
    g = torch.Generator().manual_seed(0)
    draws = [cellattn.sample_rows(graph, "a", 4, generator=g) for _ in range(4000)]
    counts = torch.bincount(torch.cat(draws), minlength=20)
    has_edge = graph.degree("a") > 0
    expected = 4000 * 4 / int(has_edge.sum())
    assert counts[~has_edge].sum() == 0
    assert (counts[has_edge] - expected).abs().max() < 5 * expected**0.5


def test_generator_repeats_the_draw() -> None:
    graph = random_graph(500, {"a": 900})
    first, again, other = (
        cellattn.sample_rows(graph, "a", 50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scaled_sum_over_sampled_rows_is_unbiased() -> None:
    graph = random_graph(30, {"a": 60})
    q, k = (x.detach() for x in leaves((30, 4), (30, 4)))
    g = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            cellattn.attention_kl(q, k, graph, "a", rows=cellattn.sample_rows(graph, "a", 5, generator=g), reduction="mean")
            for _ in range(2000)
        ]
    )
    error = (draws.mean() - cellattn.attention_kl(q, k, graph, "a", reduction="mean")).abs()
    assert error < 5 * draws.std() / 2000**0.5


def test_more_rows_than_there_are() -> None:
    graph = random_graph(50, {"a": 60, "empty": 0})
    with pytest.raises(ValueError, match=r"num_rows: expected an int in \[0, 0\].*'empty'.*got int 1"):
        cellattn.sample_rows(graph, "empty", 1)
