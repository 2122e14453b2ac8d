"""What must hold for any graph and any scores."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cellattn
from cellattn import MultiGraph, reference

from ..compare import leaves


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A weighted graph with new genes, prefix tokens, scores of any size, and a choice of rows."""
    n = draw(st.integers(1, 12))
    pair = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1), st.floats(1e-3, 1e3))
    edges = draw(st.lists(pair, max_size=40))
    index = torch.tensor([(i, j) for i, j, _ in edges], dtype=torch.int64).reshape(-1, 2).t()
    weight = torch.tensor([w for *_, w in edges], dtype=torch.float64)
    graph = MultiGraph.from_edge_index({"r": index}, n, edge_weight={"r": weight}).extend(draw(st.integers(0, 3)))
    num_prefix = draw(st.integers(0, 2))
    t, d = num_prefix + graph.num_nodes, draw(st.integers(1, 5))
    size = draw(st.sampled_from([0.0, 1.0, 30.0]))
    q, k = (size * x.detach() for x in leaves((t, d), (t, d), seed=draw(st.integers(0, 99))))
    rows = draw(st.none() | st.lists(st.integers(0, graph.num_nodes - 1), max_size=6))
    return {
        "graph": graph,
        "q": q,
        "k": k,
        "num_prefix": num_prefix,
        "rows": None if rows is None else torch.tensor(rows, dtype=torch.int64),
    }


def kl(p: dict[str, Any], **options: Any) -> torch.Tensor:
    arguments = {"num_prefix": p["num_prefix"], "rows": p["rows"], "reduction": "none", **options}
    return cellattn.attention_kl(p["q"], p["k"], p["graph"], "r", **arguments)


@settings(max_examples=80)
@given(problems(), st.sampled_from(["tokens", "valid"]))
def test_kl_is_the_reference_and_not_negative(p: dict[str, Any], over: str) -> None:
    got = kl(p, over=over)
    options = {"num_prefix": p["num_prefix"], "rows": p["rows"], "reduction": "none", "over": over}
    want = reference.attention_kl(p["q"], p["k"], p["graph"], "r", **options)
    scale = 1 + float(want.abs().max()) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * scale)
    assert (got >= -1e-10 * scale).all()  # Gibbs; the rest of the softmax only adds to it


@settings(max_examples=80)
@given(problems(), st.sampled_from(["normalized", "binary"]), st.sampled_from(["softmax", "sigmoid"]))
def test_bce_is_the_reference_and_not_negative(p: dict[str, Any], target: str, link: str) -> None:
    options = {"num_prefix": p["num_prefix"], "rows": p["rows"], "reduction": "none", "target": target, "link": link}
    got = cellattn.attention_bce(p["q"], p["k"], p["graph"], "r", **options)
    want = reference.attention_bce(p["q"], p["k"], p["graph"], "r", **options)
    assert got.isfinite().all()
    assert (got >= -1e-9).all()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@settings(max_examples=50)
@given(problems())
def test_rows_are_a_selection(p: dict[str, Any]) -> None:
    every = kl({**p, "rows": None})
    rows = torch.arange(p["graph"].num_nodes) if p["rows"] is None else p["rows"]
    torch.testing.assert_close(kl(p), every[rows], rtol=1e-9, atol=1e-9)


@settings(max_examples=50)
@given(problems(), st.floats(1e-3, 1e3))
def test_scale_of_the_weights_does_not_matter(p: dict[str, Any], factor: float) -> None:
    graph = p["graph"]
    heavier = MultiGraph.from_edge_index(
        {"r": graph.edge_index("r")},
        graph.num_nodes,
        edge_weight={"r": graph.weight("r") * factor},
        known={"r": graph.known("r")},
    )
    torch.testing.assert_close(kl({**p, "graph": heavier}), kl(p), rtol=1e-8, atol=1e-8)


@settings(max_examples=50)
@given(problems())
def test_valid_is_never_farther_than_tokens(p: dict[str, Any]) -> None:
    """Renormalising over fewer columns can only raise the attention on the edges."""
    assert (kl(p, over="valid") <= kl(p, over="tokens") + 1e-9 * (1 + kl(p).abs())).all()
