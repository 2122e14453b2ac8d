"""The subgraphs that a batch of perturbation sets sees: k-hop neighbourhoods with every relation's edges induced on them.

The genes of all samples are words of bits (see `khop_mask`), and a gene's local number is the count of bits before its own,
so there is no table of B x N labels. Edges are counted, their places added up, and written once, in final order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from .._check import count_of, describe, refuse_recorded, require, require_choice, tensor_of
from .._extension import fake
from ..graph import MultiGraph
from ..subgraph import Buffers, SubgraphBatch
from ._sets import INT32_MAX, allocating, check_graph
from .khop_mask import khop_words
from .perturbation_mask import set_words

LAYOUTS = ("coo", "csr")
INDEX_DTYPES = (torch.int64, torch.int32)


def khop_subgraph(
    graph: MultiGraph,
    seeds: Tensor,
    ptr: Tensor,
    num_hops: int,
    *,
    traversal: str = "per_relation",
    direction: str = "in",
    drop_seeds: bool = False,
    index_dtype: torch.dtype = torch.int64,
    layout: str = "coo",
    return_edge_id: bool = True,
    out: SubgraphBatch | None = None,
    max_nodes: int | None = None,
    max_edges: int | Mapping[str, int] | None = None,
    relations: Sequence[str] | None = None,
) -> SubgraphBatch:
    """Extract the genes within `num_hops` hops of each perturbation set, and all edges of all relations between them.

    Nodes are ascending by gene within a sample, edges in order of (sample, source, target), equal on CPU and GPU. The sizes
    of the result are waited for once; with `max_nodes` and `max_edges` nothing is waited for and all shapes are fixed, which
    makes the call fit for CUDA graphs and `torch.compile`.

    Args:
        graph: the relations; edge weights are not used.
        seeds: int64 [nnz], the genes of set after set; a gene may stand in a set twice.
        ptr: int64 [B + 1]: set b holds entries ptr[b] to ptr[b + 1] of `seeds`; sets may be empty.
        num_hops: >= 0.
        traversal, direction: as in `khop_mask`.
        drop_seeds: leave out the perturbed genes and their edges; the neighbourhood is still that of the set in the graph.
        index_dtype: torch.int64 or torch.int32, of nodes, edges and edge ids.
        layout: "coo", `edge_index` [2, E]; or "csr", `rowptr` [V + 1] and `col` [E].
        return_edge_id: write each edge's position in the graph; otherwise neither made nor written.
        out: an earlier batch whose arrays are used again where they are on the graph's device, of this dtype and large
            enough; others are made anew, with a quarter more room. The earlier batch must not be used afterwards: its
            arrays hold the new one.
        max_nodes: places for genes, of all samples together.
        max_edges: places for edges, of all samples together: a number for each relation, or one by relation.
        relations: those along which to go, and whose edges are in the result, in this order; all by default.

    Returns:
        A `SubgraphBatch`. With `max_nodes` and `max_edges` its arrays have those lengths, 0 and False past the end, and its
        `overflow`, a bool tensor, says whether something did not fit; the batch is then incomplete and not to be used.

    Raises:
        ValueError, TypeError: naming the argument. Values of `seeds` and `ptr` are looked at on the CPU; on other devices,
            where looking would force a sync, under CELLATTN_CHECKS=1.
        MemoryError, torch.OutOfMemoryError: on the CPU, on a GPU: the batch does not fit; nodes, edges and bytes are named.
        ImportError, NotImplementedError: the extension was not built, or not for the graph's device.
    """
    require_choice("layout", layout, LAYOUTS)
    known = index_dtype in INDEX_DTYPES
    require(known, lambda: f"index_dtype: expected torch.int64 or torch.int32, got {describe(index_dtype)}")
    for name, flag in (("drop_seeds", drop_seeds), ("return_edge_id", return_edge_id)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {describe(flag)}")
    if out is not None and not isinstance(out, SubgraphBatch):
        raise TypeError(f"out: expected a SubgraphBatch or None, got {describe(out)}")
    seeds, ptr = tensor_of(seeds), tensor_of(ptr)
    if relations is not None:
        check_graph(graph)
        graph = graph.select(relations)
    words = khop_words(graph, seeds, ptr, num_hops, traversal=traversal, direction=direction)
    capacity = _check_capacity(graph, max_nodes, max_edges)
    seed_words = set_words(seeds, ptr, graph.num_nodes)
    if drop_seeds:
        words = words & ~seed_words
    rowptr, col, _ = graph.stacked
    num_sets = ptr.shape[0] - 1
    node_ptr, edge_ptr, offsets = allocating(
        lambda: torch.ops.cellattn.induced_sizes(rowptr, col, words, num_sets),
        8 * num_sets * len(graph.relations),
        words,
        lambda: f"the numbers of edges of {len(graph.relations)} relations in {num_sets:,} samples",
        "lower the number of samples",
    )
    if capacity is None:
        refuse_recorded("cellattn.ops: khop_subgraph", node_ptr, "give max_nodes and max_edges")
        try:
            num_nodes, *num_edges = torch.cat([node_ptr[-1:], edge_ptr[:, -1]]).tolist()  # the one wait for a GPU
        except DataDependentOutputException as error:
            raise NotImplementedError(
                "cellattn.ops: khop_subgraph: sizes are found out by value, which fake tensors have not: give max_nodes and "
                "max_edges"
            ) from error
        overflow = torch.zeros((), dtype=torch.bool, device=graph.device)
    else:
        num_nodes, num_edges = capacity
        over = [edge_ptr[r, -1] > size for r, size in enumerate(num_edges)]  # numbers travel with the kernels, no copy waits
        overflow = torch.stack([node_ptr[-1] > num_nodes, *over]).any()
    check_index_range(index_dtype, layout, num_nodes, num_edges)
    lengths = _lengths(num_nodes, num_edges, layout, return_edge_id)
    buffers = _allocate(lengths, num_sets, index_dtype, words, None if out is None else out._buffers, capacity is not None)
    torch.ops.cellattn.induced_write(
        rowptr, col, words, seed_words, node_ptr, edge_ptr, offsets,
        *(None if x is None else x[:length] for x, length in zip(buffers, lengths, strict=True)), num_edges,
    )  # fmt: skip
    return SubgraphBatch(graph.relations, buffers, num_nodes, num_edges, node_ptr, edge_ptr, overflow, graph.types)


def _check_capacity(graph: MultiGraph, max_nodes: Any, max_edges: Any) -> tuple[int, list[int]] | None:
    """(places for genes, places for edges of each relation), or None where sizes are to be found out."""
    if max_nodes is None and max_edges is None:
        return None
    missing = "max_nodes" if max_nodes is None else "max_edges" if max_edges is None else None
    require(missing is None, lambda: f"{missing}: expected max_nodes and max_edges together, or neither; got None")
    max_nodes = count_of("max_nodes", max_nodes)
    if not isinstance(max_edges, Mapping):
        max_edges = count_of("max_edges", max_edges)
        return max_nodes, [max_edges for _ in graph.relations]
    for name in max_edges:
        graph.relation_id(name)
    for name in graph.relations:
        require(name in max_edges, lambda: f"max_edges: expected a number for every relation, got none for {name!r}")
    return max_nodes, [count_of(f"max_edges[{name!r}]", max_edges[name]) for name in graph.relations]


def check_index_range(index_dtype: torch.dtype, layout: str, num_nodes: int, num_edges: Sequence[int]) -> None:
    """Check that positions fit the index dtype: those of nodes, and in CSR those of edges."""
    if index_dtype == torch.int64:
        return
    require(
        num_nodes <= INT32_MAX,
        lambda: f"index_dtype: expected torch.int64 for {num_nodes} nodes, int32 numbers at most {INT32_MAX}",
    )
    for count in num_edges if layout == "csr" else ():
        require(
            count <= INT32_MAX,
            lambda: (
                f"index_dtype: expected torch.int64 for {count} edges of a relation in layout='csr', "
                f"int32 numbers at most {INT32_MAX}"
            ),
        )


def _lengths(num_nodes: int, num_edges: Sequence[int], layout: str, edge_id: bool) -> tuple[int | None, ...]:
    """Entries of each of `Buffers`, None for those not asked for."""
    total = sum(num_edges)
    csr = layout == "csr"
    rowptr = len(num_edges) * (num_nodes + 1) if csr else None
    return num_nodes, num_nodes, total if csr else 2 * total, total if edge_id else None, rowptr


def _allocate(
    lengths: Sequence[int | None], num_sets: int, index_dtype: torch.dtype, like: Tensor, old: Buffers | None, zero: bool
) -> Buffers:
    """Buffers of at least these lengths, old ones where they fit."""
    dtypes = [torch.bool if name == "seed_mask" else index_dtype for name in Buffers._fields]
    reused: list[Tensor | None] = [None] * len(lengths)
    missing = [0 if length is None else length for length in lengths]
    if old is not None:
        for i, (x, dtype) in enumerate(zip(old, dtypes, strict=True)):
            if x is not None and x.dtype == dtype and x.device == like.device and x.shape[0] >= missing[i]:
                reused[i], missing[i] = x, 0
            else:
                missing[i] += missing[i] // 4  # the next batch may be larger
    num_bytes = sum(count * dtype.itemsize for count, dtype in zip(missing, dtypes, strict=True))

    def make() -> Buffers:
        made: list[Tensor | None] = []
        for length, count, dtype, x in zip(lengths, missing, dtypes, reused, strict=True):
            if length is None:
                made.append(None)
            elif x is None:
                made.append((torch.zeros if zero else torch.empty)(count, dtype=dtype, device=like.device))
            else:
                made.append(x[:length].zero_() if zero else x)
        return Buffers(*made)  # type: ignore[arg-type]

    def what() -> str:
        num_nodes, _, edge, _, rowptr = lengths
        assert num_nodes is not None
        assert edge is not None
        return f"{num_nodes:,} nodes and {edge // (2 if rowptr is None else 1):,} edges of {num_sets:,} samples"

    lower = (
        "lower the number of samples, num_hops, or max_nodes and max_edges; or take index_dtype=torch.int32, layout='csr', "
        "return_edge_id=False"
    )
    return allocating(make, num_bytes, like, what, lower)


# ------------------------------------------------------------------------------------------------------- operators


@fake("induced_sizes")
def _(rowptr: Tensor, col: Tensor, words: Tensor, num_sets: int) -> tuple[Tensor, Tensor, Tensor]:
    num_relations = (rowptr.shape[0] - 1) // words.shape[0]
    num_chunks: int | torch.SymInt
    try:
        num_chunks = torch.library.get_ctx().new_dynamic_size()  # the backend's own
    except DynamicOutputShapeException:  # outside of a compilation; nothing that is returned depends on it
        num_chunks = 1
    return (
        words.new_empty(num_sets + 1),
        words.new_empty(num_relations, num_sets + 1),
        words.new_empty(num_chunks, num_sets),
    )


@fake("induced_write")
def _(*args: Any) -> None:
    return None
