"""Graphs as other libraries have them: as the arguments of `MultiGraph.from_edge_index`, and back.

Each function reads what its namesake of `MultiGraph` is given, `from_scipy` and its siblings, and checks what is of that form
alone; the rest is for `from_edge_index` to check.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._check import describe, require, require_mapping, require_several, tensor_of, unknown
from .build import check_edge_index, check_has_values
from .node_types import NodeTypes

if TYPE_CHECKING:
    from .multigraph import MultiGraph

_SPARSE_LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def of_hetero_data(data: Any, node_type: str, relations: Sequence[str] | None) -> dict[str, Any]:
    require(hasattr(data, "edge_types"), f"data: expected a HeteroData, got {type(data).__name__}")
    if node_type not in data.node_types:
        ends = {end for source, _, target in data.edge_types for end in (source, target)}
        require(
            node_type not in ends,
            f"data: node type {node_type!r} has edges, but no size; set data[{node_type!r}].num_nodes",
        )
        unknown("node_type", node_type, data.node_types)
    chosen = _hetero_relations(data, node_type, relations)
    sizes = _hetero_types(data, node_type, chosen.values())
    num_nodes = sum(sizes.values())
    joins = {name: (source, target) for name, (source, _, target) in chosen.items()}
    types = NodeTypes.checked(sizes, joins, tuple(chosen), num_nodes)
    edge_index, edge_weight = {}, {}
    for r, (name, edge_type) in enumerate(chosen.items()):
        store = data[edge_type]
        instead = ", but adj_t, its transpose: undo ToSparseTensor, or set edge_index" if "adj_t" in store else ""
        require("edge_index" in store, f"data: edge type {edge_type} has no edge_index{instead}")
        edge_index[name] = _numbered(f"edge_index[{name!r}]", tensor_of(store.edge_index), types.ends(r))
        weight = _hetero_weight(store, edge_type)
        if weight is not None:
            edge_weight[name] = weight
    return {
        "edge_index": edge_index, "num_nodes": num_nodes, "edge_weight": edge_weight, "node_types": sizes, "joins": joins,
        "names": _hetero_names(data, sizes),
    }  # fmt: skip


def to_hetero_data(graph: MultiGraph) -> Any:
    """See `MultiGraph.to_hetero_data`."""
    from torch_geometric.data import HeteroData

    data = HeteroData()
    for name, at in graph.node_types.items():
        data[name].num_nodes = len(at)
        if graph.names is not None:
            data[name].names = list(graph.names.names[at.start : at.stop])
    for r, name in enumerate(graph.relations):
        source, target = graph.joins(name)
        row, col = (end - at.start for end, at in zip(graph.edge_index(name), graph.types.ends(r), strict=True))
        store = data[source, name, target]
        store.edge_index = torch.stack([row, col])
        if bool((graph.weight(name) != 1).any()):
            store.edge_weight = graph.weight(name)
    return data


def _numbered(where: str, index: Any, ends: tuple[range, range]) -> Tensor:
    """Edges as PyG has them, by positions within the two types, as edges between tokens."""
    rows, columns = ends
    row, col = check_edge_index(where, index, len(rows), len(columns))
    return torch.stack([row + rows.start, col + columns.start])


def _hetero_weight(store: Any, edge_type: tuple[str, str, str]) -> Tensor | None:
    """The weights of one edge type of a `HeteroData`, None where it has none; see `MultiGraph.from_hetero_data`."""
    num_edges = store.edge_index.shape[-1]
    others = []
    for name in ("edge_weight", "edge_attr", "weight"):
        value = store.get(name)
        if isinstance(value, list | tuple):
            with contextlib.suppress(ValueError, TypeError, RuntimeError):  # of several lengths, or on a GPU: no numbers
                value = np.asarray(value)
        value = tensor_of(value)
        if not isinstance(value, Tensor):
            if value is not None and name != "edge_attr":
                raise TypeError(f"data: {name} of edge type {edge_type}: expected a tensor of numbers, got {describe(value)}")
            continue
        if name == "edge_attr" and value.ndim == 2 and value.shape[1] != 1:
            others.append(f"{name} {list(value.shape)}")
            continue
        return _real(value)
    for name, value in store.items():
        value = tensor_of(value)
        if isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) in {(num_edges,), (num_edges, 1)}:
            others.append(f"{name} {list(value.shape)}")
    if others:
        warnings.warn(
            f"data: edge type {edge_type} has weight 1, {', '.join(others)} ignored; set edge_weight to what is meant",
            stacklevel=4,
        )
    return None


def _hetero_relations(data: Any, node_type: str, relations: Sequence[str] | None) -> dict[str, tuple[str, str, str]]:
    """The edge types of a `HeteroData` that become relations, by name: those named, or all.

    A relation is called as its edge type is, or "source__relation__target", as PyG has it in one word, where that name is
    another's: the one that joins `node_type` to itself has it before all others.
    """
    shared = Counter(name for _, name, _ in data.edge_types)
    there = {}
    for edge_type in data.edge_types:
        source, name, target = edge_type
        there[name if source == target == node_type or shared[name] == 1 else "__".join(edge_type)] = edge_type
    if relations is None:
        return there
    require_several("relations", relations)
    for name in relations:
        if name not in there:
            unknown("relations", name, there)
    return {name: there[name] for name in relations}


def _hetero_types(data: Any, node_type: str, edge_types: Iterable[tuple[str, str, str]]) -> dict[str, int]:
    """`node_type`, then the other types that the relations join, in the order of the `HeteroData`, and how many there are."""
    joined = {end for source, _, target in edge_types for end in (source, target)}
    sizes = {}
    for name in (node_type, *(other for other in data.node_types if other in joined and other != node_type)):
        num_nodes = data[name].num_nodes
        require(num_nodes is not None, f"data: node type {name!r} has no features and no num_nodes")
        sizes[name] = int(num_nodes)
    return sizes


def _hetero_names(data: Any, node_types: Iterable[str]) -> list[str] | None:
    """The names that the node types of a `HeteroData` bring along, None where one has none."""
    names: list[str] = []
    for node_type in node_types:
        fields = (data[node_type].get(field) for field in ("names", "node_ids"))
        fields = (field.tolist() if isinstance(field, np.ndarray) else field for field in fields)
        found = next((f for f in fields if isinstance(f, Sequence) and f and all(isinstance(name, str) for name in f)), None)
        if found is None:
            return None
        names += found
    return names


def of_scipy(matrices: Mapping[str, Any]) -> dict[str, Any]:
    require_mapping("matrices", matrices)
    coo: dict[str, tuple[Any, Tensor, Tensor, Tensor | None]] = {}
    for name, matrix in matrices.items():
        where = f"matrices[{name!r}]"
        require(hasattr(matrix, "tocoo"), f"{where}: expected a scipy sparse matrix, got {describe(matrix)}")
        require(matrix.ndim == 2, f"{where}: expected a matrix, got shape {matrix.shape}")
        is_real = matrix.dtype.kind in "biu" or matrix.dtype in ("float32", "float64")
        require(is_real, f"{where}: expected entries of a real dtype, float32 or float64 at most, got {matrix.dtype}")
        m = matrix.tocoo()
        index = (torch.from_numpy(x.astype("int64")) for x in (m.row, m.col))
        kind = {"b": "bool", "f": str(m.dtype)}.get(m.dtype.kind, "float32")
        coo[name] = (m.shape, *index, torch.from_numpy(m.data.astype(kind)))
    return _of_coo("matrices", coo)


def of_sparse_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    require_mapping("tensors", tensors)
    coo: dict[str, tuple[Any, Tensor, Tensor, Tensor | None]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            matrix = tensor.layout in _SPARSE_LAYOUTS and tensor.ndim == 2 and tensor.dense_dim() == 0
            require(matrix, f"tensors[{name!r}]: expected a sparse matrix, got a {describe(tensor)} and {tensor.layout}")
            check_has_values(f"tensors[{name!r}]", tensor)
            t = tensor.detach().to_sparse_coo()  # not coalesced, which would add in the tensor's dtype
            coo[name] = (tuple(t.shape), *t._indices().unbind(0), t._values())
        else:
            require(
                hasattr(tensor, "coo") and hasattr(tensor, "sizes"),
                f"tensors[{name!r}]: expected a SparseTensor, got {describe(tensor)}",
            )
            row, col, value = tensor.coo()
            coo[name] = (tuple(tensor.sizes()), row, col, value)
    return _of_coo("tensors", coo)


def _of_coo(argument: str, coo: Mapping[str, tuple[Any, Tensor, Tensor, Tensor | None]]) -> dict[str, Any]:
    """Of shape, rows, columns and values by relation."""
    require(len(coo) > 0, f"{argument}: expected at least one relation, which gives the number of nodes")
    num_nodes = next(iter(coo.values()))[0][0]
    edge_index, edge_weight = {}, {}
    for name, (shape, row, col, value) in coo.items():
        require(
            tuple(shape) == (num_nodes, num_nodes),
            f"{argument}[{name!r}]: expected shape {(num_nodes, num_nodes)}, got {tuple(shape)}",
        )
        edge_index[name] = torch.stack([row, col])
        if value is not None and value.dtype == torch.bool:
            edge_index[name] = edge_index[name][:, value]
        elif value is not None:
            edge_weight[name] = _real(value)
    return {"edge_index": edge_index, "num_nodes": num_nodes, "edge_weight": edge_weight}


def _real(value: Tensor) -> Tensor:
    """Weights [E] of any real dtype as floating ones [E]; a column [E, 1] too."""
    value = value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value
    return value if value.is_floating_point() or value.is_complex() else value.float()


def of_networkx(graphs: Mapping[str, Any], nodelist: Sequence[Any], weight: str | None) -> dict[str, Any]:
    require_mapping("graphs", graphs)
    if not isinstance(nodelist, Collection) or isinstance(nodelist, (str, set, frozenset)):  # a set has no order
        raise TypeError(f"nodelist: expected a sequence of nodes, got {describe(nodelist)}")
    try:
        index = {node: i for i, node in enumerate(nodelist)}
    except TypeError as error:
        raise TypeError(f"nodelist: expected nodes, got {describe(nodelist)}: {error}") from error
    require(len(index) == len(nodelist), f"nodelist: expected distinct nodes, got {len(nodelist) - len(index)} repeated")
    edge_index, edge_weight = {}, {}
    for name, graph in graphs.items():
        require(hasattr(graph, "is_directed"), f"graphs[{name!r}]: expected a networkx graph, got {describe(graph)}")
        for node in graph.nodes:
            require(node in index, f"graphs[{name!r}]: node {node!r} is not in nodelist")
        edges = list(graph.edges(data=True))
        ends = [(index[u], index[v]) for u, v, _ in edges]
        pairs = torch.tensor(ends, dtype=torch.int64, device="cpu").reshape(-1, 2).t()
        if weight is not None:
            _warn_of_other_attributes(name, weight, [attributes for _, _, attributes in edges])
            given = [_number(name, (u, v), attributes.get(weight, 1)) for u, v, attributes in edges]
            edge_weight[name] = torch.tensor(given, dtype=torch.float64, device="cpu").float()
        if not graph.is_directed():
            other = pairs[0] != pairs[1]
            pairs = torch.cat([pairs, pairs.flip(0)[:, other]], 1)
            if name in edge_weight:
                edge_weight[name] = torch.cat([edge_weight[name], edge_weight[name][other]])
        edge_index[name] = pairs
    return {"edge_index": edge_index, "num_nodes": len(nodelist), "edge_weight": edge_weight}


def _warn_of_other_attributes(relation: str, weight: str, attributes: Sequence[Mapping[Any, Any]]) -> None:
    if not attributes or any(weight in one for one in attributes):
        return
    numbers = [name for name, value in attributes[0].items() if isinstance(value, Real)]
    if numbers:
        warnings.warn(
            f"graphs[{relation!r}]: no edge has the attribute {weight!r}, all have weight 1; ignored: "
            f"{', '.join(map(repr, numbers))}, of which weight= takes one",
            stacklevel=4,
        )


def _number(relation: str, edge: tuple[Any, Any], weight: Any) -> float:
    try:
        if isinstance(weight, (str, bytes)):
            raise TypeError  # float would read it
        return float(weight)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"graphs[{relation!r}]: edge {edge} has weight {weight!r}, expected a number") from None
