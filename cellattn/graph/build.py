"""What stands between the edges that a user has and sorted, merged, checked arrays."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .._check import describe, require, require_tensor, unknown

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
