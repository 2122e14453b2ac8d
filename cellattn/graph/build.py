"""What stands between the edges that a user has and sorted, merged, checked arrays."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._check import describe, require, require_several, require_tensor, unknown

MASS_RANGE = (1e-30, 1e30)  # of a row's weights: the losses divide by their sum, in float32 too


def undirected_set(undirected: bool | Collection[str], relations: tuple[str, ...]) -> set[str]:
    if isinstance(undirected, bool):
        return set(relations) if undirected else set()
    if not isinstance(undirected, Collection) or isinstance(undirected, Mapping):
        raise TypeError(f"undirected: expected a bool or names of relations, got {describe(undirected)}")
    named = (undirected,) if isinstance(undirected, str) else tuple(undirected)
    for name in named:
        if name not in relations:
            unknown("undirected relation", name, relations)
    return set(named)


def check_edge_index(where: str, index: Any, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    require_tensor(where, index, ndim=2, dtypes=(torch.int64, torch.int32))
    require(index.shape[0] == 2, f"{where}: expected shape [2, E], got {list(index.shape)}")
    check_has_values(where, index)
    for end, size in enumerate((num_rows, num_columns)):
        wrong = (index[end] < 0) | (index[end] >= size)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"{where}: position [{end}, {at}] holds {int(index[end, at])}, expected an index in [0, {size})"
            )  # fmt: skip
    return index[0].long(), index[1].long()


def check_has_values(where: str, x: Tensor) -> None:
    require(x.device.type != "meta", f"{where}: expected a tensor that holds values, got one on device {x.device}")


def real(value: Tensor) -> Tensor:
    """Weights [E] of any real dtype as floating ones [E]; a column [E, 1] too."""
    value = value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value
    return value if value.is_floating_point() or value.is_complex() else value.float()


def numbered(where: str, index: Any, ends: tuple[range, range]) -> Tensor:
    """Edges as PyG has them, by positions within the two types, as edges between tokens."""
    rows, columns = ends
    row, col = check_edge_index(where, index, len(rows), len(columns))
    return torch.stack([row + rows.start, col + columns.start])


def hetero_weight(store: Any, edge_type: tuple[str, str, str]) -> Tensor | None:
    """The weights of one edge type of a `HeteroData`, None where it has none; see `MultiGraph.from_hetero_data`."""
    num_edges = store.edge_index.shape[-1]
    others = []
    for name in ("edge_weight", "edge_attr", "weight"):
        value = store.get(name)
        if not isinstance(value, Tensor):
            continue
        if name == "edge_attr" and value.ndim == 2 and value.shape[1] != 1:
            others.append(f"{name} {list(value.shape)}")
            continue
        return real(value)
    for name, value in store.items():
        if isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) in {(num_edges,), (num_edges, 1)}:
            others.append(f"{name} {list(value.shape)}")
    if others:
        warnings.warn(
            f"data: edge type {edge_type} has weight 1, {', '.join(others)} ignored; set edge_weight to what is meant",
            stacklevel=3,
        )
    return None


def hetero_relations(data: Any, node_type: str, relations: Sequence[str] | None) -> dict[str, tuple[str, str, str]]:
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


def hetero_types(data: Any, node_type: str, edge_types: Iterable[tuple[str, str, str]]) -> dict[str, int]:
    """`node_type`, then the other types that the relations join, in the order of the `HeteroData`, and how many there are."""
    joined = {end for source, _, target in edge_types for end in (source, target)}
    sizes = {}
    for name in (node_type, *(other for other in data.node_types if other in joined and other != node_type)):
        num_nodes = data[name].num_nodes
        require(num_nodes is not None, f"data: node type {name!r} has no features and no num_nodes")
        sizes[name] = int(num_nodes)
    return sizes


def hetero_names(data: Any, node_types: Iterable[str]) -> list[str] | None:
    """The names that the node types of a `HeteroData` bring along, None where one has none."""
    names: list[str] = []
    for node_type in node_types:
        fields = (data[node_type].get(field) for field in ("names", "node_ids"))
        found = next((f for f in fields if isinstance(f, Sequence) and f and all(isinstance(name, str) for name in f)), None)
        if found is None:
            return None
        names += found
    return names


def warn_of_other_attributes(relation: str, weight: str, attributes: Sequence[Mapping[Any, Any]]) -> None:
    if not attributes or any(weight in one for one in attributes):
        return
    numbers = [name for name, value in attributes[0].items() if isinstance(value, Real)]
    if numbers:
        warnings.warn(
            f"graphs[{relation!r}]: no edge has the attribute {weight!r}, all have weight 1; ignored: "
            f"{', '.join(map(repr, numbers))}, of which weight= takes one",
            stacklevel=3,
        )


def number(relation: str, edge: tuple[Any, Any], weight: Any) -> float:
    try:
        if isinstance(weight, (str, bytes)):
            raise TypeError  # float would read it
        return float(weight)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"graphs[{relation!r}]: edge {edge} has weight {weight!r}, expected a number") from None


def is_float64(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.dtype == torch.float64


def check_weight(relation: str, weight: Any, num_edges: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Checked weights in the graph's dtype, or None where the relation has none."""
    if weight is None:
        return None
    where = f"edge_weight[{relation!r}]"
    require_tensor(where, weight, ndim=1)
    require(weight.dtype.is_floating_point, f"{where}: expected a floating dtype, got a {describe(weight)}")
    require(weight.numel() == num_edges, f"{where}: expected {num_edges} weights, one an edge, got {weight.numel()}")
    require(weight.device == device, f"{where}: expected device {device} of edge_index, got {weight.device}")
    weight = weight.detach().to(dtype)
    wrong = ~(torch.isfinite(weight) & (weight >= 0))
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(f"{where}: position {position} holds {float(weight[position])}, expected a finite weight >= 0")
    return weight


def check_known(relation: str, known: Any, num_nodes: int, ends: tuple[range, range], device: torch.device) -> Tensor:
    """The known tokens among those of the types that the relation joins."""
    able = torch.zeros(num_nodes, dtype=torch.bool, device=device)
    for at in ends:
        able[at.start : at.stop] = True
    if known is None:
        return able
    where = f"known[{relation!r}]"
    require_tensor(where, known, ndim=1, dtypes=(torch.bool,))
    require(known.numel() == num_nodes, f"{where}: expected {num_nodes} entries, one a gene, got {known.numel()}")
    require(known.device == device, f"{where}: expected device {device} of edge_index, got {known.device}")
    return known & able


def check_edges_known(where: str, row: Tensor, col: Tensor, known: Tensor) -> None:
    wrong = ~(known[row] & known[col])
    if wrong.any():
        position = int(wrong.nonzero()[0])
        pair = [int(row[position]), int(col[position])]
        raise ValueError(f"{where}: position {position} holds the edge {pair}, of which `known` marks a gene as unknown")


def check_mass(relations: tuple[str, ...], rowptr: Tensor, weight: Tensor, num_nodes: int) -> None:
    mass = torch.segment_reduce(weight.double(), "sum", offsets=rowptr, initial=0)
    low, high = MASS_RANGE
    wrong = (mass != 0) & ~((mass >= low) & (mass <= high))
    if wrong.any():
        relation, row = divmod(int(wrong.nonzero()[0]), num_nodes)
        total = float(mass[relation * num_nodes + row])
        raise ValueError(
            f"edge_weight[{relations[relation]!r}]: the weights of row {row} add to {total}, expected a sum in [{low}, {high}]"
        )


def coalesce(
    row: Tensor, col: Tensor, weight: Tensor | None, num_nodes: int, symmetric: str | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort by (row, col), merge duplicates (weights add), drop weight 0, and join both directions by their "max" or "sum"."""
    key, inverse = torch.unique(row * num_nodes + col, return_inverse=True)
    if weight is None:
        merged = torch.ones(key.numel(), dtype=dtype, device=key.device)
    else:
        # Summed in float64 so that the order of a file's lines does not show in the last bit of a float32 weight.
        total = torch.zeros(key.numel(), dtype=torch.float64, device=key.device).index_add_(0, inverse, weight.double())
        merged = total.to(dtype)
    keep = merged > 0
    key, merged = key[keep], merged[keep]
    if symmetric is not None:
        flipped = key % num_nodes * num_nodes + torch.div(key, num_nodes, rounding_mode="floor")
        key, inverse = torch.unique(torch.cat([key, flipped]), return_inverse=True)
        reduce = "sum" if symmetric == "sum" and weight is not None else "amax"
        zeros = torch.zeros(key.numel(), dtype=dtype, device=key.device)
        merged = zeros.scatter_reduce_(0, inverse, merged.repeat(2), reduce=reduce)
    return torch.div(key, num_nodes, rounding_mode="floor"), key % num_nodes, merged
