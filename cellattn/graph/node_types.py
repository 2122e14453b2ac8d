"""Tokens of several types, one type after another, and which two types a relation joins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._check import count_of, describe, plain, require, require_choice, require_mapping, unknown

GENE = "gene"  # the type of a graph that was told of none


class NodeTypes(NamedTuple):
    """The types of a graph's tokens, and those that each relation joins: (type of its rows, type of its columns)."""

    names: tuple[str, ...]  # in the order in which their tokens stand
    sizes: tuple[int, ...]
    joins: tuple[tuple[str, str], ...]

    @classmethod
    def of_genes(cls, num_nodes: int, num_relations: int) -> NodeTypes:
        """One type, which every relation joins to itself."""
        return cls((GENE,), (num_nodes,), ((GENE, GENE),) * num_relations)

    @classmethod
    def checked(cls, node_types: Any, joins: Any, relations: tuple[str, ...], num_nodes: int) -> NodeTypes:
        """See `MultiGraph.from_edge_index`."""
        if node_types is None:
            node_types = {GENE: num_nodes}
        if not isinstance(node_types, Mapping):
            raise TypeError(f"node_types: expected a dict from type to number of tokens, got {describe(node_types)}")
        require(len(node_types) > 0, "node_types: expected at least one type")
        for name in node_types:
            require(isinstance(name, str) and name != "", f"node_types: expected non-empty str names, got {describe(name)}")
        names = tuple(map(plain, node_types))
        sizes = tuple(count_of(f"node_types[{name!r}]", size) for name, size in node_types.items())
        require(sum(sizes) == num_nodes, f"node_types: expected num_nodes = {num_nodes} tokens, got {sum(sizes)} of {names}")
        given: dict[str, tuple[str, str]] = {}
        if joins is not None:
            require_mapping("joins", joins)
        for name, ends in (joins or {}).items():
            if name not in relations:
                unknown("joins relation", name, relations)
            if not isinstance(ends, Sequence) or isinstance(ends, str) or len(ends) != 2:
                raise TypeError(f"joins[{name!r}]: expected two types, of its rows and its columns, got {describe(ends)}")
            for end in ends:
                require_choice(f"joins[{name!r}]", end, names)
            given[name] = plain(ends[0]), plain(ends[1])
        return cls(names, sizes, tuple(given.get(name, (names[0], names[0])) for name in relations))

    @property
    def ranges(self) -> dict[str, range]:
        """The tokens of each type."""
        ends = accumulate(self.sizes)
        return {name: range(end - size, end) for name, size, end in zip(self.names, self.sizes, ends, strict=True)}

    @property
    def are_genes(self) -> bool:
        """One type, called as it is where nobody says otherwise."""
        return self.names == (GENE,)

    def ends(self, r: int) -> tuple[range, range]:
        """The tokens that rows, and columns, of relation r may be."""
        ranges = self.ranges
        source, target = self.joins[r]
        return ranges[source], ranges[target]

    def masks(self, known: Tensor) -> tuple[Tensor, Tensor]:
        """known [K, N] of rows, and of columns: `known` itself where there is one type."""
        if len(self.names) == 1:
            return known, known
        within = torch.zeros(2, *known.shape, dtype=torch.bool, device=known.device)
        for r in range(len(self.joins)):
            for of_end, at in zip(within, self.ends(r), strict=True):
                of_end[r, at.start : at.stop] = True
        return within[0] & known, within[1] & known

    def _type_of(self, nodes: Tensor) -> Tensor:
        """int64: the position of each token's type."""
        ends = torch.tensor(list(accumulate(self.sizes)), device=nodes.device)
        return torch.searchsorted(ends, nodes, right=True)

    def check_edges(self, where: str, r: int, row: Tensor, col: Tensor) -> None:
        """Refuse an edge that begins or ends at a token of another type."""
        if len(self.names) == 1:
            return
        rows, cols = self.ends(r)
        wrong = (row < rows.start) | (row >= rows.stop) | (col < cols.start) | (col >= cols.stop)
        if wrong.any():
            position = int(wrong.nonzero()[0])
            source, target = self.joins[r]
            raise ValueError(
                f"{where}: position {position} holds the edge {[int(row[position]), int(col[position])]}, expected one from a "
                f"{source!r} in [{rows.start}, {rows.stop}) to a {target!r} in [{cols.start}, {cols.stop})"
            )

    def select(self, ids: Sequence[int]) -> NodeTypes:
        """Of some relations."""
        return self._replace(joins=tuple(self.joins[r] for r in ids))

    def subset(self, nodes: Tensor) -> NodeTypes:
        """Of some tokens, which have to stand in the order of their types."""
        if len(self.names) == 1:
            return self._replace(sizes=(nodes.numel(),))
        kind, names = self._type_of(nodes), self.names
        falls = (kind.diff() < 0).nonzero()
        if falls.numel():
            at = int(falls[0]) + 1
            raise ValueError(
                f"nodes: expected tokens of one type after another, in the order {', '.join(names)}, got "
                f"{names[int(kind[at])]!r} {int(nodes[at])} after {names[int(kind[at - 1])]!r} {int(nodes[at - 1])}"
            )
        return self._replace(sizes=tuple(kind.bincount(minlength=len(names)).tolist()))


def require_one_type(what: str, relation: str, joins: tuple[str, str], instead: str) -> None:
    """Refuse a relation that joins two types where that has no meaning."""
    source, target = joins
    require(source == target, lambda: f"{what}: {relation!r} joins {source!r} to {target!r}; {instead}")
