"""A batch of induced subgraphs of one multigraph, as one disjoint union: what `khop_subgraph` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ._check import integer_of, require, unknown
from .graph.node_types import NodeTypes


class Buffers(NamedTuple):
    """The flat arrays of a batch, each at least as long as it needs."""

    node: Tensor
    seed_mask: Tensor
    edge: Tensor  # relation after relation; COO: sources, then targets; CSR: targets
    edge_id: Tensor | None
    rowptr: Tensor | None  # CSR alone


class _OfType(NamedTuple):
    """Part of a batch: the tokens of one node type."""

    n_id: Tensor  # [V], counted within the type
    seed_mask: Tensor
    sample: Tensor
    ptr: Tensor  # [B + 1]
    position: Tensor | None  # of each place of the whole batch among them; None where they are all


class SubgraphBatch:
    """Subgraphs of B samples over the same relations, numbered through: places ptr[b] to ptr[b + 1] belong to sample b.

    Extracted with `max_nodes` and `max_edges`, arrays have those lengths: places past `node_ptr[-1]` and
    `edge_ptr[relation][-1]` hold 0 and False, and where `overflow` is True the batch is incomplete and not to be used.

    Attributes:
        relations: names of the relations, in the order of the graph.
        layout: "coo" or "csr".
        node: [V], the gene at each place, ascending within a sample; int64 or int32, as all indices below.
        node_ptr: int64 [B + 1].
        seed_mask: bool [V], genes that are in their sample's perturbation set.
        edge_index: relation -> [2, E], sources and targets as positions in `node`, by (sample, source, target); layout
            "coo" alone.
        rowptr, col: relation -> [V + 1] and [E], the same edges by source; layout "csr" alone.
        edge_ptr: relation -> int64 [B + 1], the edges of each sample.
        edge_id: relation -> [E], position of each edge in `graph.col(relation)` and `graph.weight(relation)`; None if it
            was not asked for.
        overflow: bool [], something did not fit `max_nodes` or `max_edges`.
    """

    edge_index: dict[str, Tensor]
    rowptr: dict[str, Tensor]
    col: dict[str, Tensor]
    edge_id: dict[str, Tensor] | None

    def __init__(
        self,
        relations: tuple[str, ...],
        buffers: Buffers,
        num_nodes: int,
        num_edges: Sequence[int],
        node_ptr: Tensor,
        edge_ptr: Tensor,
        overflow: Tensor,
        types: NodeTypes,
    ) -> None:
        """Take arrays as they are: `num_nodes` places, `num_edges` a relation, edge_ptr [K, B + 1]; made by `khop_subgraph`."""
        self.relations = relations
        self.layout = "coo" if buffers.rowptr is None else "csr"
        self.node = buffers.node[:num_nodes]
        self.seed_mask = buffers.seed_mask[:num_nodes]
        self.node_ptr = node_ptr
        self.edge_ptr = {name: edge_ptr[r] for r, name in enumerate(relations)}
        self.overflow = overflow
        self._buffers = buffers
        self._num_edges = tuple(num_edges)
        self._edge_ptr = edge_ptr
        self._types = types
        first = list(accumulate(num_edges, initial=0))
        span = {name: (first[r], first[r + 1]) for r, name in enumerate(relations)}
        if buffers.rowptr is None:
            self.edge_index = {n: buffers.edge[2 * begin : 2 * end].view(2, end - begin) for n, (begin, end) in span.items()}
        else:
            places = num_nodes + 1
            self.rowptr = {name: buffers.rowptr[r * places : (r + 1) * places] for r, name in enumerate(relations)}
            self.col = {name: buffers.edge[begin:end] for name, (begin, end) in span.items()}
        ids = buffers.edge_id
        self.edge_id = None if ids is None else {name: ids[begin:end] for name, (begin, end) in span.items()}

    def __getattr__(self, name: str) -> NoReturn:
        """Called for attributes that are not there alone: those of the other layout say why."""
        if name in ("edge_index", "rowptr", "col"):
            layout, there = ("csr", "rowptr and col") if name == "edge_index" else ("coo", "edge_index")
            raise AttributeError(f"{name}: a batch with layout={layout!r} holds {there}; extract with the other layout")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ------------------------------------------------------------------------------------------------ what it holds

    @property
    def num_nodes(self) -> int:
        """V, the places for genes: the genes of all samples, or `max_nodes`."""
        return self.node.shape[0]

    def num_edges(self, relation: str | None = None) -> int:
        """E, the places for edges of a relation, or of all: the edges of all samples, or `max_edges`."""
        if relation is None:
            return sum(self._num_edges)
        if relation not in self.relations:
            unknown("relation", relation, self.relations)
        return self._num_edges[self.relations.index(relation)]

    @property
    def sample(self) -> Tensor:
        """int64 [V]: the sample of each place, PyG's `batch` vector; B past the last gene."""
        place = torch.arange(self.num_nodes, device=self.node.device)
        return torch.searchsorted(self.node_ptr, place, right=True) - 1

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.node.device

    def __len__(self) -> int:
        return self.node_ptr.shape[0] - 1

    def __getitem__(self, b: int) -> SubgraphBatch:
        """One sample as a batch of its own, of which positions start with 0. Raises IndexError past the end."""
        b = integer_of("b", b)
        if not -len(self) <= b < len(self):
            raise IndexError(f"b: expected a sample in [{-len(self)}, {len(self)}), got {b}")
        b %= len(self)
        self._require_complete()
        begin, end = self.node_ptr[b : b + 2].tolist()
        spans = self._edge_ptr[:, b : b + 2].tolist()
        edges, ids, rowptrs = [self._buffers.edge[:0]], [], []  # a graph may have no relation
        for name, (low, high) in zip(self.relations, spans, strict=True):
            edges.append((self._edges(name)[..., low:high] - begin).reshape(-1))
            if self.edge_id is not None:
                ids.append(self.edge_id[name][low:high])
            if self.layout == "csr":
                rowptrs.append(self.rowptr[name][begin : end + 1] - low)
        buffers = Buffers(
            self.node[begin:end].clone(),  # of its own, so that `out=` takes it as any other
            self.seed_mask[begin:end].clone(),
            torch.cat(edges),
            None if self.edge_id is None else torch.cat([self._buffers.edge[:0], *ids]),
            torch.cat([self._buffers.edge[:0], *rowptrs]) if self.layout == "csr" else None,
        )
        num_edges = [high - low for low, high in spans]
        ptr = self.node_ptr[b : b + 2] - begin
        edge_ptr = self._edge_ptr[:, b : b + 2] - self._edge_ptr[:, b : b + 1]
        return SubgraphBatch(self.relations, buffers, end - begin, num_edges, ptr, edge_ptr, self.overflow, self._types)

    def __iter__(self) -> Iterator[SubgraphBatch]:
        return (self[b] for b in range(len(self)))

    def __repr__(self) -> str:
        samples = max(len(self), 1)
        num_nodes, counts = int(self.node_ptr[-1]), self._edge_ptr[:, -1].tolist()
        num_bytes = sum(x.numel() * x.element_size() for x in self._used() if x is not None)
        index = str(self.node.dtype).removeprefix("torch.")
        head = (
            f"SubgraphBatch(num_samples={len(self)}, num_nodes={num_nodes}, num_edges={sum(counts)}, layout={self.layout!r}, "
            f"index_dtype={index}, {num_bytes / 2**20:.1f} MiB, device={self.device}{', overflow' if self.overflow else ''})"
        )
        width = max(8, *(len(name) for name in self.relations)) if self.relations else 8
        lines = [head, f"  {'':<{width}} {'total':>12} {'a sample':>12}"]
        for name, count in (("nodes", num_nodes), *zip(self.relations, counts, strict=True)):
            lines.append(f"  {name:<{width}} {count:>12} {count / samples:>12.1f}")
        return "\n".join(lines)

    # ------------------------------------------------------------------------------------------------ elsewhere

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SubgraphBatch:
        """The batch on another device; `self` if it is there already."""
        moved = self._map(lambda x: x.to(device, non_blocking=non_blocking))
        return self if moved.device == self.device else moved

    def pin_memory(self) -> SubgraphBatch:
        """The batch in page-locked memory; a `DataLoader` with `pin_memory=True` calls it."""
        return self._map(lambda x: x.pin_memory())

    def to_hetero_data(self, node_type: str | None = None, *, offset: bool = True) -> Any:
        """The PyG batch that a `DataLoader` over one `HeteroData` a sample would give, to_data_list() and indexing included.

        Each node type holds `n_id` int64 [V] (genes), `pert_mask` and `mask` bool [V] (perturbed, and not),
        `perturbation_indices` int64 (positions of the perturbed genes) with `_batch` and `_ptr`, `num_nodes`,
        `batch` and `ptr`; each edge type (source type, relation, target type) holds `edge_index` int64 [2, E], and `e_id` where
        edge ids were asked for. Numbers are counted within a node type. Of a graph of genes alone, arrays that are int64 here
        already are shared, not copied. The batch's samples, collated by PyG again, give the same batch.

        Args:
            node_type: a name for the node type, where there is one; the graph's own by default, "gene" as a rule.
            offset: `perturbation_indices` are positions in the batch, rows of features [V, F], as of samples whose `__inc__`
                counts them up; otherwise positions in their sample, as PyG leaves what has no "index" in its name.

        Raises:
            ValueError: the batch overflowed, or has several node types, which keep their names.
        """
        from torch_geometric.data import Batch

        from ._pyg import MutantData, NumberedMutantData

        self._require_complete()
        names = self._types.names
        require(
            node_type is None or len(names) == 1,
            lambda: f"node_type: expected None of a graph of several node types ({', '.join(names)}), got {node_type!r}",
        )
        called = dict.fromkeys(names, node_type) if node_type is not None else dict(zip(names, names, strict=True))
        num_sets, num_nodes = len(self), int(self.node_ptr[-1])
        nothing = torch.zeros(num_sets, dtype=torch.int64)
        data = Batch(_base_cls=NumberedMutantData if offset else MutantData)
        # What PyG separates a batch by: where each sample's entries begin, and what was added to them.
        slices: dict[Any, dict[str, Tensor]] = {}
        added: dict[Any, dict[str, Tensor]] = {}
        parts = {name: self._of_type(at, num_nodes) for name, at in self._types.ranges.items()}
        for name, part in parts.items():
            genes, ptr = data[called[name]], part.ptr
            perturbed = part.seed_mask.nonzero().flatten()
            perturbed_ptr = torch.searchsorted(perturbed, ptr)
            genes.n_id = part.n_id
            genes.pert_mask, genes.mask = part.seed_mask, ~part.seed_mask
            genes.perturbation_indices = perturbed if offset else perturbed - ptr[part.sample[perturbed]]
            genes.perturbation_indices_batch, genes.perturbation_indices_ptr = part.sample[perturbed], perturbed_ptr
            genes.num_nodes, genes._num_nodes = part.n_id.numel(), ptr.diff().tolist()
            genes.batch, genes.ptr = part.sample, ptr
            slices[called[name]] = dict.fromkeys(("n_id", "pert_mask", "mask"), ptr.cpu())
            added[called[name]] = dict.fromkeys(("n_id", "pert_mask", "mask"), nothing)
            slices[called[name]]["perturbation_indices"] = perturbed_ptr.cpu()
            added[called[name]]["perturbation_indices"] = ptr[:-1].cpu() if offset else nothing
        for r, name in enumerate(self.relations):
            source, target = (parts[end] for end in self._types.joins[r])
            edge_type = called[self._types.joins[r][0]], name, called[self._types.joins[r][1]]
            num_edges = int(self.edge_ptr[name][-1])
            slices[edge_type] = {"edge_index": self.edge_ptr[name].cpu()}
            first = torch.stack([end.ptr[:-1].cpu() for end in (source, target)], 1)
            added[edge_type] = {"edge_index": first.unsqueeze(-1)}
            edges = self._coo(name, num_nodes, num_edges)
            if source.position is not None and target.position is not None:
                edges = torch.stack([source.position[edges[0]], target.position[edges[1]]])
            data[edge_type].edge_index = edges
            if self.edge_id is not None:
                data[edge_type].e_id = self.edge_id[name][:num_edges].long()
                slices[edge_type]["e_id"], added[edge_type]["e_id"] = slices[edge_type]["edge_index"], nothing
        data._num_graphs, data._slice_dict, data._inc_dict = num_sets, slices, added
        return data

    # ------------------------------------------------------------------------------------------------ shared by the above

    def _of_type(self, at: range, num_nodes: int) -> _OfType:
        """The tokens of one node type; of a batch with one, all of them as they are."""
        node, seed_mask, sample = self.node[:num_nodes].long(), self.seed_mask[:num_nodes], self.sample[:num_nodes]
        if len(self._types.names) == 1:
            return _OfType(node, seed_mask, sample, self.node_ptr, None)
        here = ((node >= at.start) & (node < at.stop)).nonzero().flatten()
        position = torch.zeros_like(node).index_copy_(0, here, torch.arange(here.numel(), device=here.device))
        return _OfType(
            node[here] - at.start, seed_mask[here], sample[here], torch.searchsorted(here, self.node_ptr), position
        )  # fmt: skip

    def _edges(self, relation: str) -> Tensor:
        return self.edge_index[relation] if self.layout == "coo" else self.col[relation]

    def _coo(self, relation: str, num_nodes: int, num_edges: int) -> Tensor:
        """int64 [2, num_edges] from either layout."""
        if self.layout == "coo":
            return self.edge_index[relation][:, :num_edges].long()
        place = torch.arange(num_nodes, device=self.device)
        degree = self.rowptr[relation][: num_nodes + 1].diff().long()
        return torch.stack([place.repeat_interleave(degree), self.col[relation][:num_edges].long()])

    def _used(self) -> Buffers:
        """The buffers without the room that a later batch may use."""
        num_nodes, num_edges, b = self.num_nodes, sum(self._num_edges), self._buffers
        return Buffers(
            self.node,
            self.seed_mask,
            b.edge[: num_edges if self.layout == "csr" else 2 * num_edges],
            None if b.edge_id is None else b.edge_id[:num_edges],
            None if b.rowptr is None else b.rowptr[: len(self.relations) * (num_nodes + 1)],
        )

    def _map(self, f: Callable[[Tensor], Tensor]) -> SubgraphBatch:
        buffers = Buffers(*(None if x is None else f(x) for x in self._used()))  # type: ignore[arg-type]
        rest = f(self.node_ptr), f(self._edge_ptr), f(self.overflow)
        return SubgraphBatch(self.relations, buffers, self.num_nodes, self._num_edges, *rest, self._types)

    def _require_complete(self) -> None:
        require(
            not self.overflow,
            lambda: (
                f"overflow: {int(self.node_ptr[-1])} nodes and {self._edge_ptr[:, -1].tolist()} edges by relation did not fit "
                f"max_nodes={self.num_nodes} and max_edges={list(self._num_edges)}; extract again with more room"
            ),
        )


# What `torch.save` wrote is read by `torch.load` with weights_only=True.
torch.serialization.add_safe_globals([SubgraphBatch, Buffers])
