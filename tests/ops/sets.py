"""Multigraphs and ragged batches of sets of genes, awkward on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from cellattn import MultiGraph


class Problem(NamedTuple):
    graph: MultiGraph
    seeds: Tensor
    ptr: Tensor


def problem(seed: int, num_nodes: int, edges: Sequence[int], num_sets: int) -> Problem:
    """A relation of each number of edges, drawn with repetition, self-loops and hubs; sets of 0 to 4 genes, drawn likewise."""
    g = torch.Generator().manual_seed(seed)
    index = {}
    for r, count in enumerate(edges):
        skewed = (torch.rand(2, count, generator=g) ** 2 * num_nodes).long()
        index[f"r{r}"] = skewed.clamp(max=num_nodes - 1)
    sizes = torch.randint(5, (num_sets,), generator=g)
    seeds = torch.randint(num_nodes, (int(sizes.sum()),), generator=g)
    weight = {name: torch.rand(i.shape[1], generator=g) + 0.1 for name, i in index.items()}
    graph = MultiGraph.from_edge_index(index, num_nodes, edge_weight=weight)
    return Problem(graph, seeds, torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """One gene and up; no relation, relations without edges and almost full ones; batches around multiples of a word."""
    num_nodes = draw(st.sampled_from([1, 2, 3, 7, 17, 40]))
    edges = draw(st.lists(st.sampled_from([0, 1, 5, num_nodes, num_nodes**2]), max_size=3))
    num_sets = draw(st.sampled_from([0, 1, 2, 5, 63, 64, 65, 130, 515]))
    return problem(draw(st.integers(0, 99)), num_nodes, edges, num_sets)


def ragged(sets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(seeds, ptr) of sets of genes."""
    seeds = torch.tensor([gene for genes in sets for gene in genes], dtype=torch.int64)
    return seeds, torch.tensor([0, *(len(genes) for genes in sets)]).cumsum(0)


def random_sets(num_nodes: int, num_sets: int, size: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(seeds, ptr) of sets of `size` genes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(num_nodes, (num_sets * size,), generator=g), torch.arange(num_sets + 1) * size


def assert_kept_past_the_ends(p: Problem, index_dtype: torch.dtype, layout: str, within: AbstractContextManager[Any]) -> None:
    """Write a batch into parts of larger arrays, with too little room: what surrounds the parts keeps its poison.

    Args:
        within: where the operators run, such as the machine for PTX.
    """
    rowptr, col, _ = p.graph.stacked
    device, csr = p.seeds.device, layout == "csr"
    with within:
        words = torch.ops.cellattn.set_words(p.seeds, p.ptr, 64, True)
        node_ptr, edge_ptr, offsets = torch.ops.cellattn.induced_sizes(rowptr, col, words, len(p.ptr) - 1)
        places, room = int(node_ptr[-1]) // 2, [int(size) // 2 for size in edge_ptr[:, -1]]
        total, around, poison = sum(room), 64, -77
        lengths = [places, places, total if csr else 2 * total, total, 3 * (places + 1)]
        whole = [torch.full((length + 2 * around,), poison, dtype=index_dtype, device=device) for length in lengths]
        whole[1] = torch.ones(places + 2 * around, dtype=torch.bool, device=device)
        node, seed_mask, edge_index, edge_id, csr_rowptr = (x[around:-around] for x in whole)
        torch.ops.cellattn.induced_write(
            rowptr, col, words, ~words, node_ptr, edge_ptr, offsets, node, seed_mask, edge_index, edge_id,
            csr_rowptr if csr else None, room,
        )  # fmt: skip
    assert (node != poison).all()
    assert (edge_id != poison).all()
    for x in whole:
        kept = True if x.dtype == torch.bool else poison
        assert (torch.cat([x[:around], x[-around:]]) == kept).all()


def graph_of(n: int, degree: int) -> MultiGraph:
    """Weighted relations: "hub", in which row 0 has every gene and row 2 none; "none", without edges; "loops"."""
    g = torch.Generator().manual_seed(n)
    hub = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)])
    rest = torch.randint(n, (2, n * degree), generator=g)
    index = {
        "hub": torch.cat([hub, rest[:, rest[0] != 2]], 1),
        "none": torch.empty(2, 0, dtype=torch.int64),
        "loops": torch.cat([torch.arange(n).expand(2, n), rest[:, : n // 2]], 1),
    }
    weight = {name: torch.rand(i.shape[1], generator=g) + 0.1 for name, i in index.items()}
    return MultiGraph.from_edge_index(index, n, edge_weight=weight)


class Between(NamedTuple):
    """Genes of some samples, one sample after another: those that messages come from, and those that get them."""

    source: Tensor
    source_ptr: Tensor
    target: Tensor
    target_ptr: Tensor


def between(num_sets: int, n: int, share: float = 0.7) -> Between:
    """Drawn for some samples, the share of all genes in each; every fourth sample has none."""
    g = torch.Generator().manual_seed(num_sets)
    ragged = []
    for _ in range(2):
        member = torch.rand(num_sets, n, generator=g) < share
        member[1::4] = False
        ragged += [member.nonzero()[:, 1].contiguous(), torch.cat([torch.zeros(1, dtype=torch.int64), member.sum(1).cumsum(0)])]
    return Between(*ragged)
