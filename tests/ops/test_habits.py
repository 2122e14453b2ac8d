"""What `scaled_dot_product_attention` and `nn.MultiheadAttention` take and nothing here does is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import cellattn
from cellattn.nn import GraphRegularizedAttention

from ..compare import random_graph

GRAPH = random_graph(6, {"a": 9})
X = torch.ones(2, 7, 4)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "attention": cellattn.attention,
    "graph_attention": lambda q, k, v, **x: cellattn.graph_attention(q, k, v, GRAPH, [("a", 0)], **x),
    "edge_attention": lambda q, k, v, **x: cellattn.edge_attention(q, k, v, GRAPH, [("a", 0), ("a", 1)], **x),
}
functions = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)


LAYER = GraphRegularizedAttention(4, 2, ties=[("a", 0)])


@functions
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attn_mask": torch.ones(7, 7)}, r"attn_mask: expected None; `edge_attention` has heads that see their graph alone"),
        ({"is_causal": True}, r"is_causal: expected False; genes have no order"),
        ({"enable_gqa": True}, r"enable_gqa: expected False; each head has keys of its own: k\.repeat_interleave"),
    ],
    ids=["attn_mask", "is_causal", "enable_gqa"],
)
def test_options_are_refused(f: Callable[..., Any], option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        f(X, X, X, **option)
    if "enable_gqa" not in option:
        with pytest.raises(ValueError, match=message):
            LAYER(X[0], GRAPH, **option)


@functions
def test_their_defaults_change_nothing(f: Callable[..., Any]) -> None:
    for want, got in (
        (f(X, X, X), f(X, X, X, attn_mask=None, is_causal=False, enable_gqa=False)),
        (LAYER(X[0], GRAPH), LAYER(X[0], GRAPH, attn_mask=None, is_causal=False)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(want), tree_leaves(got), strict=True))


@functions
def test_grouped_heads_are_refused_with_a_way_out(f: Callable[..., Any]) -> None:
    q, few = torch.ones(3, 4, 7, 4), torch.ones(3, 2, 7, 4)
    with pytest.raises(ValueError, match=r"k: expected shape .* \[3, 2, 7, 4\]; grouped heads .* \.repeat_interleave\(2, -3\)"):
        f(q, few, few)
    with pytest.raises(ValueError, match=r"v: expected shape .*; grouped heads are spread out by \.repeat_interleave\(2, -3\)"):
        cellattn.attention(q, q, few)
    with pytest.raises(ValueError, match=r"k: expected shape .* got \[3, 3, 7, 4\]$"):
        f(q, few[:, :1].expand(3, 3, 7, 4), q)
