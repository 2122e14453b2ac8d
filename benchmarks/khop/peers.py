"""Ours and everybody it is measured against in k-hop extraction and in message passing over masks of one graph.

An extractor takes a batch of perturbation sets to a batch of subgraphs in its own form, and says how that reads as one
disjoint union (`Collated`), which `Definition` holds to the sets themselves. A product builds what it needs of a batch of
masks, then multiplies. A peer imports what it needs when it is made: whatever it raises is the reason why it cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph, SubgraphBatch

_GENE = "gene"


class Collated(NamedTuple):
    """A batch of subgraphs as one disjoint union: places node_ptr[b] to node_ptr[b + 1] are sample b's."""

    node: Tensor  # [V], genes
    node_ptr: Tensor  # [B + 1]
    edge_index: dict[str, Tensor]  # [2, E], places
    edge_ptr: dict[str, Tensor]  # [B + 1]


class Extractor(Protocol):
    def __call__(self, seeds: Tensor, ptr: Tensor, num_hops: int) -> Any:
        """The batch as this implementation's users get it."""

    def collated(self, result: Any) -> Collated:
        """The same batch to be compared; not timed."""

    def reset(self) -> None:
        """Let go of what is kept from one batch to the next."""


class Product(Protocol):
    def build(self, keep: Tensor, backward: bool) -> Any:
        """What the masks bool [B, N] need before the product, and before its gradient."""

    def product(self, state: Any, x: Tensor) -> Tensor:
        """out [B, N, F] of x [N, F]: out[b, i] = keep[b, i] * sum_j A[i, j] keep[b, j] x[j]."""

    def num_bytes(self, num_edges: int, num_features: int, backward: bool) -> int:
        """That the product is known to need at least, for so many edges of all samples together."""


# --------------------------------------------------------------------------------------------------------- the definition


class Definition:
    """What batches must hold, from the edge lists: directions "in", traversal "per_relation"."""

    def __init__(self, graph: MultiGraph) -> None:
        self._num_nodes = graph.num_nodes
        self._edges = {name: graph.edge_index(name).cpu().numpy() for name in graph.relations}
        self._key = {name: row * graph.num_nodes + col for name, (row, col) in self._edges.items()}  # ascending
        self._matrix = {name: scipy_matrix(graph, name, np.float32) for name in graph.relations}

    def keep(self, seeds: Tensor, ptr: Tensor, num_hops: int) -> Tensor:
        """bool [B, N], the genes of each sample; float32 sums of edges between genes are exact up to 2^24."""
        seeds, ptr = seeds.cpu(), ptr.cpu()
        start = np.zeros((self._num_nodes, len(ptr) - 1), dtype=np.float32)
        start[seeds.numpy(), np.repeat(np.arange(len(ptr) - 1), ptr.diff().numpy())] = 1
        united = start > 0
        for matrix in self._matrix.values():
            visited = start
            for _ in range(num_hops):
                visited = ((visited + matrix @ visited) > 0).astype(np.float32)
            united |= visited > 0
        return torch.from_numpy(np.ascontiguousarray(united.T))

    def num_edges(self, keep: Tensor) -> Tensor:
        """int64 [B, K]: the edges between the genes of each sample, sum_ij keep_i A_ij keep_j, exact as long as float64 is."""
        columns = np.ascontiguousarray(keep.numpy().T.astype(np.float32))
        counts = [np.einsum("nb,nb->b", columns, matrix @ columns, dtype=np.float64) for matrix in self._matrix.values()]
        return torch.from_numpy(np.stack(counts, 1)).long() if counts else torch.empty(len(keep), 0, dtype=torch.int64)

    def difference(self, keep: Tensor, num_edges: Tensor, got: Collated, pairs_of: Sequence[int]) -> str | None:
        """What is wrong with a batch for the samples `keep` with `num_edges`, None if nothing.

        Genes and numbers of edges are compared of every sample and relation, and of the samples `pairs_of` the edges
        themselves, as sorted pairs of genes.
        """
        num_sets, n = keep.shape
        node, node_ptr = got.node.cpu().long(), got.node_ptr.cpu().long()
        if node_ptr.tolist() != [0, *keep.sum(1).cumsum(0).tolist()]:
            return f"node_ptr: {node_ptr.tolist()[:4]}... where the samples have {keep.sum(1).tolist()[:3]}... genes"
        sample = torch.arange(num_sets).repeat_interleave(node_ptr.diff())
        genes, kept = node.numpy(), keep.numpy()
        if not _equal_sets((sample * n + node).numpy(), kept.reshape(-1).nonzero()[0]):
            return "node: other genes"
        for (name, (row, col)), counts in zip(self._edges.items(), num_edges.T, strict=True):
            edge_ptr, edges = got.edge_ptr[name].cpu().long(), got.edge_index[name]
            if edge_ptr.tolist() != [0, *counts.cumsum(0).tolist()] or edges.shape[1] != int(counts.sum()):
                return f"{name}: {edge_ptr.diff().tolist()[:3]}... edges where the samples have {counts.tolist()[:3]}..."
            for b in pairs_of:
                mine = edges[:, edge_ptr[b] : edge_ptr[b + 1]].cpu().numpy()
                if mine.size and not node_ptr[b] <= mine.min() <= mine.max() < node_ptr[b + 1]:
                    return f"{name}: an edge of sample {b} leaves it"
                induced = kept[b][row] & kept[b][col]
                if not _equal_sets(genes[mine[0]] * n + genes[mine[1]], self._key[name][induced]):
                    return f"{name}: other edges in sample {b}"
        return None


def _equal_sets(got: np.ndarray, ascending: np.ndarray) -> bool:
    """Whether `got` holds the same numbers, in whatever order; most implementations keep the graph's."""
    return np.array_equal(got, ascending) or (got.shape == ascending.shape and np.array_equal(np.sort(got), ascending))


def exact_product(graph: MultiGraph, relation: str, keep: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, N, F], dx [N, F]) in float64: dx_j = sum_b keep_bj sum_i A_ij keep_bi g_bi."""
    a = scipy_matrix(graph, relation, np.float64)
    mask = keep.cpu().double().unsqueeze(-1)
    (num_sets, n), f = keep.shape, x.shape[-1]

    def times(matrix: Any, y: Tensor) -> Tensor:  # [B, N, F]
        columns = (mask * y).transpose(0, 1).reshape(n, num_sets * f).numpy()
        return mask * torch.from_numpy(matrix @ columns).reshape(n, num_sets, f).transpose(0, 1)

    return times(a, x.detach().cpu().double().expand(num_sets, n, f)), times(a.T.tocsr(), g.cpu().double()).sum(0)


def scipy_matrix(graph: MultiGraph, relation: str, dtype: Any) -> Any:
    """A relation without its weights, int32 indices."""
    rowptr, col = graph.rowptr(relation).cpu().int().numpy(), graph.col(relation).cpu().numpy()
    return scipy.sparse.csr_array((np.ones(len(col), dtype), col, rowptr), shape=(graph.num_nodes,) * 2)


# ------------------------------------------------------------------------------------------------------------- extraction


@dataclass
class Ours:
    """`khop_subgraph` with a format; `reuse` hands it the previous batch as `out`."""

    graph: MultiGraph
    index_dtype: torch.dtype = torch.int64
    layout: str = "coo"
    edge_id: bool = False
    reuse: bool = False
    _last: SubgraphBatch | None = field(default=None, init=False)

    def __call__(self, seeds: Tensor, ptr: Tensor, num_hops: int) -> SubgraphBatch:
        batch = cellattn.khop_subgraph(
            self.graph, seeds, ptr, num_hops,
            index_dtype=self.index_dtype, layout=self.layout, return_edge_id=self.edge_id, out=self._last,
        )  # fmt: skip
        self._last = batch if self.reuse else None
        return batch

    def collated(self, result: SubgraphBatch) -> Collated:
        if result.layout == "coo":
            return Collated(result.node, result.node_ptr, result.edge_index, result.edge_ptr)
        edge_index = {
            name: _coo(result.rowptr[name][: result.num_nodes + 1], result.col[name]) for name in result.relations
        }  # fmt: skip
        return Collated(result.node, result.node_ptr, edge_index, result.edge_ptr)

    def reset(self) -> None:
        self._last = None

    def num_bytes(self, batch: SubgraphBatch) -> int:
        """Of the arrays that an extraction writes once for every node and edge."""
        edges = list((batch.edge_index if batch.layout == "coo" else {**batch.col}).values())
        edges += list(batch.rowptr.values()) if batch.layout == "csr" else []
        edges += list(batch.edge_id.values()) if batch.edge_id is not None else []
        return sum(x.numel() * x.element_size() for x in (batch.node, batch.seed_mask, *edges))


class _Collating:
    """An extractor whose results are collated as they are."""

    def collated(self, result: Collated) -> Collated:
        return result

    def reset(self) -> None:
        return None


class PyG:
    """By sample: `k_hop_subgraph` in every relation, `subgraph` of every relation on the union, `HeteroData`; then `Batch`."""

    def __init__(self, graph: MultiGraph) -> None:
        self._utils, self._data = import_module("torch_geometric.utils"), import_module("torch_geometric.data")
        self._num_nodes = graph.num_nodes
        self._edges = {name: graph.edge_index(name) for name in graph.relations}

    def __call__(self, seeds: Tensor, ptr: Tensor, num_hops: int) -> Any:
        bounds = ptr.tolist()
        samples = [self._sample(seeds[i:j], num_hops) for i, j in pairwise(bounds)]
        return self._data.Batch.from_data_list(samples)

    def _sample(self, seeds: Tensor, num_hops: int) -> Any:
        n, hops = self._num_nodes, self._utils.k_hop_subgraph
        found = [hops(seeds, num_hops, edges, num_nodes=n)[0] for edges in self._edges.values()]
        nodes = torch.cat([seeds, *found]).unique()
        sample = self._data.HeteroData()
        sample[_GENE].n_id, sample[_GENE].num_nodes = nodes, len(nodes)
        sample[_GENE].pert_mask = torch.isin(nodes, seeds)
        for name, edges in self._edges.items():
            induced, _ = self._utils.subgraph(nodes, edges, relabel_nodes=True, num_nodes=n)
            sample[_GENE, name, _GENE].edge_index = induced
        return sample

    def collated(self, result: Any) -> Collated:
        genes, slices = result[_GENE], result._slice_dict
        of = {name: (_GENE, name, _GENE) for name in self._edges}
        edge_ptr = {name: torch.as_tensor(slices[edge_type]["edge_index"]) for name, edge_type in of.items()}
        return Collated(genes.n_id, genes.ptr, {name: result[edge_type].edge_index for name, edge_type in of.items()}, edge_ptr)

    def reset(self) -> None:
        return None


class TorchSparse(_Collating):
    """`SparseTensor` products for the frontiers of all samples, `saint_subgraph` of every sample and relation."""

    def __init__(self, graph: MultiGraph) -> None:
        sparse_tensor = import_module("torch_sparse").SparseTensor
        self._num_nodes = graph.num_nodes
        self._adjacency = {}
        for name in graph.relations:
            row, col = graph.edge_index(name)
            adjacency = sparse_tensor(row=row, col=col, sparse_sizes=(graph.num_nodes,) * 2, is_sorted=True)
            adjacency.storage.rowptr()
            self._adjacency[name] = adjacency

    def __call__(self, seeds: Tensor, ptr: Tensor, num_hops: int) -> Collated:
        products = {name: adjacency.matmul for name, adjacency in self._adjacency.items()}
        nodes = _dense_frontiers(products.values(), seeds, ptr, num_hops, self._num_nodes)

        def induced(name: str, genes: Tensor) -> tuple[Tensor, Tensor]:
            part, _ = self._adjacency[name].saint_subgraph(genes)
            row, col, _ = part.coo()
            return row, col

        return _collate(nodes, list(products), induced)


class PyGLib(_Collating):
    """Sparse products of PyTorch for the frontiers, `pyg_lib.sampler.subgraph` of every sample and relation, to COO."""

    def __init__(self, graph: MultiGraph) -> None:
        self._subgraph = import_module("pyg_lib").sampler.subgraph
        self._num_nodes = graph.num_nodes
        self._csr = {name: (graph.rowptr(name), graph.col(name).long()) for name in graph.relations}
        self._matrix = {name: _torch_matrix(*csr, graph.num_nodes) for name, csr in self._csr.items()}

    def __call__(self, seeds: Tensor, ptr: Tensor, num_hops: int) -> Collated:
        products = [matrix.matmul for matrix in self._matrix.values()]
        nodes = _dense_frontiers(products, seeds, ptr, num_hops, self._num_nodes)

        def induced(name: str, genes: Tensor) -> tuple[Tensor, Tensor]:
            rowptr, col, _ = self._subgraph(*self._csr[name], genes, False)
            row, col = _coo(rowptr, col)
            return row, col

        return _collate(nodes, list(self._csr), induced)


class DGL(_Collating):
    """`khop_in_subgraph` in every relation, `node_subgraph` of every relation on the union, put one after the other."""

    def __init__(self, graph: MultiGraph) -> None:
        self._dgl = import_module("dgl")
        make = self._dgl.graph
        self._graphs = {name: make(tuple(graph.edge_index(name)), num_nodes=graph.num_nodes) for name in graph.relations}

    def __call__(self, seeds: Tensor, ptr: Tensor, num_hops: int) -> Collated:
        bounds, nodes = ptr.tolist(), []
        for i, j in pairwise(bounds):
            own = seeds[i:j].unique()
            parts = [self._dgl.khop_in_subgraph(g, own, num_hops)[0].ndata[self._dgl.NID] for g in self._graphs.values()]
            nodes.append(torch.cat([own, *parts]).unique())
        return _collate(
            nodes, list(self._graphs), lambda name, genes: self._dgl.node_subgraph(self._graphs[name], genes).edges(order="eid")
        )  # fmt: skip


class Scipy(_Collating):
    """Boolean sparse products for the frontiers of all samples, A[nodes][:, nodes] of every sample and relation; int32."""

    def __init__(self, graph: MultiGraph) -> None:
        if graph.device.type != "cpu":
            raise NotImplementedError("scipy works on the CPU alone")
        self._matrix = {name: scipy_matrix(graph, name, np.bool_) for name in graph.relations}
        self._num_nodes = graph.num_nodes

    def __call__(self, seeds: Tensor, ptr: Tensor, num_hops: int) -> Collated:
        num_sets = len(ptr) - 1
        start = scipy.sparse.csc_array(
            (np.ones(len(seeds), np.bool_), seeds.numpy().astype(np.int32), ptr.numpy().astype(np.int32)),
            shape=(self._num_nodes, num_sets),
        ).tocsr()
        united = start
        for matrix in self._matrix.values():
            visited = start
            for _ in range(num_hops):
                visited = visited + matrix @ visited
            united = united + visited
        columns = united.tocsc()
        columns.sort_indices()
        bounds = columns.indptr
        nodes = [columns.indices[bounds[b] : bounds[b + 1]] for b in range(num_sets)]
        edges: dict[str, Tensor] = {}
        edge_ptr: dict[str, Tensor] = {}
        for name, matrix in self._matrix.items():
            parts = [matrix[genes][:, genes].tocoo() for genes in nodes]
            pieces = [(part.row + first, part.col + first) for part, first in zip(parts, bounds, strict=False)]
            joined = np.stack([np.concatenate(ends) for ends in zip(*pieces, strict=True)]) if parts else np.empty((2, 0))
            edges[name] = torch.from_numpy(joined.astype(np.int32, copy=False))
            edge_ptr[name] = torch.tensor([0, *(part.nnz for part in parts)]).cumsum(0)
        return Collated(torch.from_numpy(columns.indices), torch.from_numpy(bounds), edges, edge_ptr)


def _dense_frontiers(products: Any, seeds: Tensor, ptr: Tensor, num_hops: int, num_nodes: int) -> list[Tensor]:
    """The genes of each sample by products of every relation's matrix with the visited genes, float32 [N, B]."""
    num_sets = ptr.shape[0] - 1
    sample = torch.arange(num_sets, device=ptr.device).repeat_interleave(ptr.diff())
    start = torch.zeros(num_nodes, num_sets, device=seeds.device)
    start[seeds, sample] = 1
    united = start > 0
    for product in products:
        visited = start
        for _ in range(num_hops):
            visited = (visited + product(visited) > 0).float()
        united |= visited > 0
    return [column.nonzero()[:, 0] for column in united.T]


def _collate(nodes: list[Tensor], relations: list[str], induced: Callable[[str, Tensor], tuple[Tensor, Tensor]]) -> Collated:
    """One disjoint union of the subgraphs that induced(relation, genes) gives as (row, col) of local numbers."""
    like = nodes[0] if nodes else torch.empty(0, dtype=torch.int64)
    first = [0, *torch.tensor([len(genes) for genes in nodes]).cumsum(0).tolist()]
    edge_index, edge_ptr = {}, {}
    for name in relations:
        parts = [torch.stack(induced(name, genes)) + begin for genes, begin in zip(nodes, first, strict=False)]
        edge_index[name] = torch.cat([like.new_empty(2, 0), *parts], 1)
        edge_ptr[name] = torch.tensor([0, *(part.shape[1] for part in parts)]).cumsum(0)
    return Collated(torch.cat([like[:0], *nodes]), torch.tensor(first), edge_index, edge_ptr)


def _coo(rowptr: Tensor, col: Tensor) -> Tensor:
    rows = torch.arange(len(rowptr) - 1, device=col.device, dtype=col.dtype).repeat_interleave(rowptr.diff())
    return torch.stack([rows, col])


def _torch_matrix(rowptr: Tensor, col: Tensor, num_nodes: int) -> Tensor:
    ones = torch.ones(len(col), device=col.device)
    return torch.sparse_csr_tensor(rowptr, col, ones, (num_nodes, num_nodes), check_invariants=False)


PEERS: dict[str, Callable[[MultiGraph], Extractor]] = {
    "PyG": PyG,
    "torch-sparse": TorchSparse,
    "scipy": Scipy,
    "pyg-lib": PyGLib,
    "DGL": DGL,
}
PACKAGES = {"PyG": "torch_geometric", "torch-sparse": "torch_sparse", "scipy": "scipy", "pyg-lib": "pyg_lib", "DGL": "dgl"}
INDEX = {"PyG": "int64", "torch-sparse": "int64", "scipy": "int32", "pyg-lib": "int64", "DGL": "int64"}

_FORMATS = {
    "int64 COO": {"index_dtype": torch.int64, "layout": "coo"},
    "int32 COO": {"index_dtype": torch.int32, "layout": "coo"},
    "int32 CSR": {"index_dtype": torch.int32, "layout": "csr"},
}


class Variant(NamedTuple):
    """A way to call ours: (options of `Ours`, whether the portable loops are asked for)."""

    options: dict[str, Any]
    portable: bool = False


def variants() -> dict[str, Variant]:
    """The ways to call ours, by the names they have in the results."""
    found = {}
    for name in ("int64 COO", "int32 COO"):
        found[f"ours, {name}, fresh"] = Variant(_FORMATS[name])
    found["ours, int64 COO, edge ids, fresh"] = Variant({**_FORMATS["int64 COO"], "edge_id": True})
    for name, options in _FORMATS.items():
        found[f"ours, {name}, reused"] = Variant({**options, "reuse": True})
        found[f"ours, {name}, edge ids, reused"] = Variant({**options, "reuse": True, "edge_id": True})
    for name in ("int64 COO", "int32 CSR"):
        found[f"ours, {name}, reused, portable"] = Variant({**_FORMATS[name], "reuse": True}, portable=True)
    return found


# -------------------------------------------------------------------------------------------------------- message passing


class OurProduct:
    """`masked_spmm`: nothing to build."""

    def __init__(self, graph: MultiGraph, relation: str) -> None:
        self._graph, self._relation = graph, relation

    def build(self, keep: Tensor, backward: bool) -> Tensor:
        return keep

    def product(self, state: Tensor, x: Tensor) -> Tensor:
        return cellattn.masked_spmm(self._graph, self._relation, x, state)

    def num_bytes(self, num_edges: int, num_features: int, backward: bool) -> int:
        return 0


class _Union:
    """Edges of all samples with numbers of their own: gene i of sample b is b * N + i."""

    def __init__(self, graph: MultiGraph, relation: str) -> None:
        self._row, self._col = graph.edge_index(relation)

    def _edges(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols = [], []
        for b, mask in enumerate(keep):
            kept = mask[self._row] & mask[self._col]
            rows.append(self._row[kept] + b * keep.shape[1])
            cols.append(self._col[kept] + b * keep.shape[1])
        return torch.cat(rows), torch.cat(cols)

    def num_bytes(self, num_edges: int, num_features: int, backward: bool) -> int:
        return 16 * num_edges


class SparseTensorUnion(_Union):
    """The product of torch-sparse over the disjoint union."""

    def __init__(self, graph: MultiGraph, relation: str) -> None:
        super().__init__(graph, relation)
        self._type = import_module("torch_sparse").SparseTensor

    def build(self, keep: Tensor, backward: bool) -> Any:
        row, col = self._edges(keep)
        adjacency = self._type(row=row, col=col, sparse_sizes=(keep.numel(),) * 2, is_sorted=True, trust_data=True)
        adjacency.storage.rowptr()
        if backward:  # what it would otherwise sort in the first backward
            adjacency.storage.colptr()
            adjacency.storage.csr2csc()
        return adjacency, keep.shape[0]

    def product(self, state: Any, x: Tensor) -> Tensor:
        adjacency, num_sets = state
        return adjacency.matmul(x.repeat(num_sets, 1)).view(num_sets, *x.shape)


class MessagePassing(_Union):
    """PyG's gather and scatter over a batched `edge_index`."""

    def __init__(self, graph: MultiGraph, relation: str) -> None:
        super().__init__(graph, relation)
        self._conv = import_module("torch_geometric.nn").SimpleConv(aggr="sum")  # the plain sum of what neighbours send

    def build(self, keep: Tensor, backward: bool) -> Any:
        row, col = self._edges(keep)
        return torch.stack([col, row]), keep.shape[0]  # messages go from column to row

    def product(self, state: Any, x: Tensor) -> Tensor:
        edge_index, num_sets = state
        return self._conv(x.repeat(num_sets, 1), edge_index).view(num_sets, *x.shape)

    def num_bytes(self, num_edges: int, num_features: int, backward: bool) -> int:
        return (16 + 4 * num_features * (2 if backward else 1)) * num_edges  # a message an edge, and its gradient


class SampleBySample:
    """`torch.sparse.mm` with a CSR matrix of each sample."""

    def __init__(self, graph: MultiGraph, relation: str) -> None:
        self._row, self._col = graph.edge_index(relation)

    def build(self, keep: Tensor, backward: bool) -> list[Tensor]:
        matrices = []
        for mask in keep:
            kept = mask[self._row] & mask[self._col]
            counts = torch.bincount(self._row[kept], minlength=len(mask))
            rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            matrices.append(_torch_matrix(rowptr, self._col[kept], len(mask)))
        return matrices

    def product(self, state: list[Tensor], x: Tensor) -> Tensor:
        return torch.stack([torch.sparse.mm(matrix, x) for matrix in state])

    def num_bytes(self, num_edges: int, num_features: int, backward: bool) -> int:
        return 12 * num_edges


PRODUCTS: dict[str, Callable[[MultiGraph, str], Product]] = {
    "ours": OurProduct,
    "SparseTensor of the union": SparseTensorUnion,
    "PyG MessagePassing": MessagePassing,
    "torch.sparse.mm, sample by sample": SampleBySample,
}
