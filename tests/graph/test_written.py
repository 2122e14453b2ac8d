"""Tensors of a graph are its own memory: who writes to them is told so by the next op, and never gets a wrong number."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import cellattn
from cellattn import MultiGraph

N = 600  # dense, so that bits are kept too


def graph(dense: bool = False) -> MultiGraph:
    g = torch.Generator().manual_seed(0)
    edges = torch.randint(N, (2, N * N // 2 if dense else 900), generator=g)
    made = MultiGraph.from_edge_index({"a": edges, "b": edges[:, :7]}, N)
    made.stacked_by_column()
    return made


OWN: dict[str, Callable[[MultiGraph], Tensor]] = {
    "weight": lambda g: g.weight("a"),
    "col": lambda g: g.col("a"),
    "known": lambda g: g.known("a"),
    "known_rows": lambda g: g.known_rows("a"),
    "known_columns": lambda g: g.known_columns("a"),
    "known_ranks": lambda g: g.known_ranks("a")[0],
    "num_free": lambda g: g.num_free("a"),
    "free_ends": lambda g: g.free_ends("a"),
    "inv_mass": lambda g: g.inv_mass,
    "entropy": lambda g: g.entropy,
    "targets": lambda g: g.targets(torch.float32).inv_mass,
    "stacked": lambda g: g.stacked[0],
    "transpose": lambda g: g.transpose().row,
    "stacked_by_column": lambda g: g.stacked_by_column()[2],
    "segments": lambda g: g.segments[0].ptr,
    "graph[...]": lambda g: g["a"].weight,
}
Q = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
SEEDS, PTR = torch.tensor([1, 2]), torch.arange(3)
USES: dict[str, Callable[[MultiGraph], Any]] = {
    "attention_kl": lambda g: cellattn.attention_kl(Q, Q, g, "a"),
    "attention_bce": lambda g: cellattn.attention_bce(Q, Q, g, "b", num_negatives=2),
    "graph_attention": lambda g: cellattn.graph_attention(Q[None], Q[None], Q[None], g, [("b", 0)], num_prefix=0),
    "edge_attention": lambda g: cellattn.edge_attention(Q[None], Q[None], Q[None], g, [("b", 0)], num_prefix=0),
    "network_mse": lambda g: cellattn.network_mse(Q, Q, Q[:, 0], g, "a"),
    "sample_rows": lambda g: cellattn.sample_rows(g, "b", 2),
    "khop_mask": lambda g: cellattn.khop_mask(g, SEEDS, PTR, 1),
    "khop_subgraph": lambda g: cellattn.khop_subgraph(g, SEEDS, PTR, 1),
    "perturbation_mask": lambda g: cellattn.perturbation_mask(g, SEEDS, PTR),
    "masked_spmm": lambda g: cellattn.masked_spmm(g, "a", Q, torch.ones(1, N, dtype=torch.bool)),
    "relational_spmm": lambda g: cellattn.relational_spmm(g, Q, SEEDS, PTR, SEEDS, PTR, shared=True),
    "relational_degree": lambda g: cellattn.relational_degree(g, SEEDS, PTR, SEEDS, PTR),
    "subgraph": lambda g: g.subgraph(torch.arange(9)),
    "select": lambda g: g.select(["b"]),
    "extend": lambda g: g.extend(1),
    "symmetrized": lambda g: g.symmetrized("a"),
    "digest": lambda g: g.digest(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "==": lambda g: g == graph(),
}


@pytest.mark.parametrize("name", OWN)
def test_what_was_written_to_is_named(name: str) -> None:
    own = graph()
    cellattn.attention_kl(Q, Q, own, "a")
    OWN[name](own)[0] = 0
    for use in USES.values():
        with pytest.raises(RuntimeError, match=r"^graph: its tensor \w+ was written to"):
            use(own)


def test_bits_too() -> None:
    own = graph(dense=True)
    bits = own.bits("a")
    assert bits is not None
    bits.by_row.zero_()
    with pytest.raises(RuntimeError, match=r"^graph: its tensor bits was written to"):
        cellattn.attention_kl(Q, Q, own, "a")


@pytest.mark.parametrize("name", USES)
def test_what_was_read_is_not(name: str, tmp_path: Path) -> None:
    own = graph()
    USES[name](own)
    for of in OWN.values():
        of(own).clone().zero_()
    USES[name](own)
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own)), own.subgraph(torch.arange(N))):
        USES[name](other)
    torch.save(own, tmp_path / "graph.pt")
    with torch.inference_mode():
        USES[name](torch.load(tmp_path / "graph.pt"))


def test_copies_are_written_to_on_their_own() -> None:
    own = graph()
    other = copy.deepcopy(own)
    other.weight("a").zero_()
    cellattn.attention_kl(Q, Q, own, "a")
    with pytest.raises(RuntimeError, match=r"its tensor weight was written to"):
        cellattn.attention_kl(Q, Q, other, "a")


def test_modes_are_not_asked() -> None:
    """Another default device is one: it would be called for each tensor of a graph, by each op."""

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(function)

    own = graph()
    with Mode():
        own.require_unwritten()


def test_what_is_made_anew_is_the_callers() -> None:
    own = graph()
    want = cellattn.attention_kl(Q, Q, own, "a")
    for x in (own.rowptr("a"), own.degree("a"), own.edge_index("a"), own["a"].edge_index):
        x.zero_()
    assert torch.equal(cellattn.attention_kl(Q, Q, own, "a"), want)


def test_what_a_graph_is_made_of_stays_the_callers() -> None:
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    weight, known = torch.tensor([0.5, 1.0, 2.0]), torch.ones(4, dtype=torch.bool)
    own = MultiGraph.from_edge_index({"a": edges}, 4, edge_weight={"a": weight}, known={"a": known})
    want = own.digest()
    for x in (edges, weight, known):
        x.zero_()
    same = MultiGraph.from_edge_index(
        {"a": torch.tensor([[0, 1, 2], [1, 2, 3]])}, 4, edge_weight={"a": torch.tensor([0.5, 1.0, 2.0])}
    )
    assert own == same
    assert own.digest() == want == same.digest()
