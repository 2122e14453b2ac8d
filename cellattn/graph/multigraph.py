"""Several graphs over the same genes, as one stack of CSR matrices.

Relation r of K owns the rows r * N to (r + 1) * N of a [K * N, N] matrix in CSR form: the *stacked* rows. One set of
arrays serves any number of relations, so an operator that reads nine graphs takes as many arguments as one that reads one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .._check import (
    count_of,
    describe,
    device_of,
    plain,
    require,
    require_choice,
    require_mapping,
    require_several,
    require_tensor,
    seed_of,
    tensor_of,
    unknown,
)
from .._extension import AVAILABLE
from .._modes import without_function_modes
from ..genes import GeneList, as_names
from . import derive, file, foreign
from .build import (
    MASS_RANGE,
    check_edge_index,
    check_edges_known,
    check_has_values,
    check_known,
    check_mass,
    check_weight,
    coalesce,
    is_float64,
    undirected_set,
)
from .comembership import Comembership, check_column_weight
from .derive import Rows
from .node_types import NodeTypes, require_one_type
from .rows import (
    SEGMENT,
    USUAL_MASS,
    Bits,
    Relation,
    Scaled,
    Segments,
    Targets,
    Transpose,
    bits_of,
    cut_rows,
    of_any_mode,
    row_targets,
    scaled_weights,
    subgraph_rows,
    transpose_of,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")

_INT32_MAX = 2**31 - 1
_MAX_NODES = isqrt(2**63 - 1)  # an edge is sorted by the key i * N + j, in int64
_FIRST = ("rowptr", "col", "weight", "known", "known_rows", "known_columns", "column_weight", "segments", "bits")
_LATER = ("targets", "ranks", "free", "transpose", "weight_by_column", "scaled")  # kept from when they are first needed
_MIN_PACKED, _DENSE = 512, 1 / 8  # genes, and edges over pairs, from which on sums over bits are faster than along CSR rows


class MultiGraph:
    """Directed, weighted graphs (relations) over one set of nodes.

    `A[i, j] = w` for an edge from i = edge_index[0] to j = edge_index[1]. Columns are sorted within a row. Instances are
    built by `from_edge_index` and its siblings, which check everything, and are not changed afterwards. Where tensors go in,
    NumPy arrays do too. As a mapping it is one of names to relations: `graph["physical"]`, `"physical" in graph`, `len(graph)`.

    Tensors that come out (`weight`, `col`, `known`, ...) are the graph's own memory, to be read; clone what is to be written
    to. Much is kept that follows from them, so that a graph into which PyTorch has written is refused with a `RuntimeError`
    by the next op; within a compiled function nobody looks.

    The nodes are genes, or tokens of several types, one type after another: genes, then reactions, complexes, terms. A
    relation then joins two types, or one to itself: its rows are of the first, its columns of the second (`joins`), and of
    all pairs of tokens these alone are valid.

    Attributes:
        relations: names of the relations, in the order of their stacking.
        num_nodes: N, the genes, or the tokens of all types.
        names: the genes' names, or None. They travel with the graph: into graphs made from it, files and copies. Where
            it meets a dataset, `cellattn.data.require_same_genes` compares them (with several types, `names_of("gene")`).
    """

    names: GeneList | None = None  # of a graph that was pickled before there were any, too

    @of_any_mode
    def __init__(
        self,
        relations: tuple[str, ...],
        rowptr: Tensor,
        col: Tensor,
        weight: Tensor,
        known: Tensor,
        names: GeneList | None = None,
        types: NodeTypes | None = None,
        column_weight: Tensor | None = None,
    ) -> None:
        """Take sorted, merged arrays as they are; `from_edge_index` is the constructor that checks and sorts."""
        self.relations = relations
        self.num_nodes = known.shape[1]
        self.names = names
        self._relation_id = {name: i for i, name in enumerate(relations)}
        self._rowptr = rowptr  # int64 [K * N + 1]
        self._col = col  # int32 [E], int64 if N needs it
        self._weight = weight  # float32 or float64 [E], > 0
        self._known = known  # bool [K, N]
        weighted = column_weight is not None and bool((column_weight != 1).any())
        self._column_weight = column_weight if weighted else None  # float64 [K, N], or None where all are 1
        self.types = NodeTypes.of_genes(self.num_nodes, len(relations)) if types is None else types
        self._known_rows, self._known_columns = self.types.masks(known)  # `known` itself where there is one type
        self._offset: list[int] = rowptr[:: self.num_nodes].tolist()
        degree = rowptr.diff()
        by_relation = degree.view(known.shape)
        # Numbers are not made when first needed, as tensors are: a compiled region cannot look at values.
        num_known = self._known_columns.sum(1)
        counts = torch.stack([by_relation.amax(1), by_relation.count_nonzero(1), num_known])
        self._max_degree, self._rows_with_edges, self._num_known = counts.tolist()
        self._targets: tuple[Targets, Targets] | None = None  # in float64, in float32
        self._ranks: tuple[Tensor, Tensor] | None = None
        self._free: tuple[Tensor, Tensor] | None = None
        self._segments = self._cut(degree)
        self._transpose: Transpose | None = None
        self._bits = tuple(self._pack(name) for name in relations)
        self._selected: dict[tuple[str, ...], MultiGraph] = {}
        self._shared: dict[tuple[str, bool], tuple[Tensor, ...]] = {}
        self._weight_by_column: Tensor | None = None
        self._scaled: Scaled | None = None
        self._has_unusual_mass = self._find_unusual_mass()
        self._passing: dict[str, Any] = {}
        self._made: dict[Hashable, Any] = {}
        self._watch_all()

    def _watch_all(self) -> None:
        """`_watch` what is kept already."""
        self._versions: list[tuple[str, Tensor, int]] = []
        for name in (*_FIRST, *_LATER):
            kept = getattr(self, f"_{name}")
            if kept is not None:
                self._watch(name, kept)
        for constants in self._shared.values():
            self._watch("comembership", constants)

    def _watch(self, name: str, kept: Any) -> None:
        """Remember how often tensors that are kept were written to, which is nobody's to do from now on."""
        if isinstance(kept, tuple):
            for part in kept:
                self._watch(name, part)
        elif isinstance(kept, Tensor) and not kept.is_inference():  # which counts no writes
            self._versions.append((name, kept, kept._version))

    @without_function_modes  # each of which is asked about each version
    def require_unwritten(self) -> None:
        """Raise `RuntimeError` if somebody has written to the graph's tensors since they were made."""
        if torch.compiler.is_compiling():
            return
        for name, x, version in self._versions:
            if x._version != version:
                raise RuntimeError(
                    f"graph: its tensor {name} was written to in place, so that what is kept beside it no longer fits; make "
                    "another graph of the new values (MultiGraph.from_edge_index), and write to a clone next time"
                )

    def _pack(self, relation: str) -> Bits | None:
        """The bits of a relation, where they are what its sums are faster with: it is dense, and has no weight but 1."""
        pairs = self.num_nodes**2
        if self.num_nodes < _MIN_PACKED:
            return None
        if self.num_edges(relation) < _DENSE * pairs or not bool((self.weight(relation) == 1).all()):
            return None
        return bits_of(self.rowptr(relation), self.col(relation), self.num_nodes)

    def _find_unusual_mass(self) -> bool:
        """Whether a row may add to so little or so much that `scaled` has weights of its own."""
        if not self._weight.numel():
            return False
        low, high = torch.stack(self._weight.aminmax()).tolist()
        return low < 1 / USUAL_MASS or high * max(self._max_degree) > USUAL_MASS

    @cached_property
    def _lightest(self) -> float:
        """The smallest weight."""
        return float(self._weight.min()) if self._weight.numel() else 1.0

    def _cut(self, degree: Tensor) -> tuple[Segments, Segments]:
        """`cut_rows` of the rows and of the columns, which are not counted where none can be long."""
        num_relations, n = len(self.relations), self.num_nodes
        whole = Segments(degree.new_zeros(num_relations * n + 1), degree.new_empty(0), (0,) * (num_relations + 1))
        by_row = cut_rows(degree, n) if max(self._max_degree, default=0) > SEGMENT else whole
        most = max((self.num_edges(name) for name in self.relations), default=0)
        if min(n, most) <= SEGMENT:
            return by_row, whole
        return by_row, cut_rows(torch.cat([self.col(name).bincount(minlength=n) for name in self.relations]), n)

    # ------------------------------------------------------------------------------------------------ constructors

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Mapping[str, Tensor],
        num_nodes: int,
        *,
        edge_weight: Mapping[str, Tensor] | None = None,
        undirected: bool | Collection[str] = False,
        undirected_reduce: str = "max",
        known: Mapping[str, Tensor] | None = None,
        names: GeneList | Sequence[str] | None = None,
        node_types: Mapping[str, int] | None = None,
        joins: Mapping[str, tuple[str, str]] | None = None,
    ) -> Self:
        """Build from one COO edge list a relation.

        Args:
            edge_index: relation -> integer tensor [2, E]; row 0 holds the rows i of `A`, row 1 the columns j.
            num_nodes: N >= 1, of all types together.
            edge_weight: relation -> floating tensor [E], finite and not negative; relations left out have weight 1.
                An entry of weight 0 is no edge and is dropped. The weights of a duplicate edge are added, duplicates
                without weights count once. The weights of a row add to between 1e-30 and 1e30.
            undirected: True, or the names of the relations to symmetrise.
            undirected_reduce: "max": A <- max(A, Aᵀ), as for a table that may hold a pair in both directions; "sum": A + Aᵀ,
                as PyG's `to_undirected` does by default, where a self-loop counts twice. Relations without weights keep
                weight 1 either way.
            known: relation -> bool [N], the genes whose pairs were measured (default: all). Unmeasured pairs enter no
                loss, so an edge at an unknown gene is refused. Tokens of types that a relation does not join are not known
                in it, whatever is given.
            names: the genes' names, N of them, or None.
            node_types: type -> number of its tokens, in the order in which they stand: {"gene": 6607, "reaction": 2000}
                makes tokens 6607 to 8606 reactions. One type, "gene", by default.
            joins: relation -> (type of its rows, type of its columns); relations left out join the first type to itself.
                Edges are pairs of tokens all the same, of the N. One that joins two types cannot be undirected.

        Raises:
            ValueError: with the relation, the position and the value of the first fault.
            TypeError: for an argument of another Python type.
        """
        require_mapping("edge_index", edge_index)
        num_nodes = count_of("num_nodes", num_nodes, minimum=1)
        require(num_nodes <= _MAX_NODES, f"num_nodes: expected at most {_MAX_NODES}, got {num_nodes}")
        names = as_names(names, num_nodes)
        edge_index = {plain(name): tensor_of(index) for name, index in edge_index.items()}
        relations = tuple(edge_index)
        for name in relations:
            require(isinstance(name, str) and name != "", f"edge_index: expected non-empty str names, got {describe(name)}")
        weights, knowns = (_by_relation(*given, relations) for given in (("edge_weight", edge_weight), ("known", known)))
        require_choice("undirected_reduce", undirected_reduce, ("max", "sum"))
        symmetric = undirected_set(undirected, relations)
        types = NodeTypes.checked(node_types, joins, relations, num_nodes)
        devices = {name: index.device for name, index in edge_index.items() if isinstance(index, Tensor)}
        require(len(set(devices.values())) <= 1, f"edge_index: expected all relations on one device, got {devices}")
        device = next(iter(devices.values()), torch.device("cpu"))

        dtype = torch.float64 if any(is_float64(w) for w in weights.values()) else torch.float32
        parts = []
        for r, name in enumerate(relations):
            where = f"edge_index[{name!r}]"
            row, col = check_edge_index(where, edge_index[name], num_nodes, num_nodes)
            weight = check_weight(name, weights.get(name), row.numel(), device, dtype)
            mask = check_known(name, knowns.get(name), num_nodes, types.ends(r), device)
            types.check_edges(where, r, row, col)
            check_edges_known(where, row, col, mask)
            if name in symmetric:
                require_one_type("undirected", name, types.joins[r], derive.GIVE_REVERSE)
            reduce = undirected_reduce if name in symmetric else None
            row, col, weight = coalesce(row, col, weight, num_nodes, reduce, dtype)
            parts.append(Rows(row.bincount(minlength=num_nodes), col, weight, mask))
        return cls._stack(relations, parts, num_nodes, device, dtype, names, types)

    @classmethod
    @of_any_mode
    def _stack(
        cls,
        relations: tuple[str, ...],
        parts: Sequence[Rows],
        num_nodes: int,
        device: torch.device,
        dtype: torch.dtype,
        names: GeneList | None,
        types: NodeTypes,
    ) -> Self:
        """Stack relations, each sorted by (row, col) and free of duplicates."""
        rowptr = torch.zeros(len(parts) * num_nodes + 1, dtype=torch.int64, device=device)
        col_dtype = torch.int32 if num_nodes <= _INT32_MAX else torch.int64
        col = torch.empty(0, dtype=col_dtype, device=device)
        weight = torch.empty(0, dtype=dtype, device=device)
        known = torch.ones(0, num_nodes, dtype=torch.bool, device=device)
        column_weight = None
        if parts:
            torch.cumsum(torch.cat([part.degree for part in parts]), 0, out=rowptr[1:])
            col = torch.cat([part.col.to(col_dtype) for part in parts])
            weight = torch.cat([part.weight for part in parts])
            known = torch.stack([part.known for part in parts])
            given = [part.column_weight for part in parts]
            if any(w is not None for w in given):
                ones = torch.ones(num_nodes, dtype=torch.float64, device=device)
                column_weight = torch.stack([ones if w is None else w for w in given])
        check_mass(relations, rowptr, weight, num_nodes)
        return cls(relations, rowptr, col, weight, known, names, types, column_weight)

    @classmethod
    def from_hetero_data(
        cls,
        data: Any,
        node_type: str = "gene",
        *,
        undirected: bool | Collection[str] = False,
        undirected_reduce: str = "max",
        names: GeneList | Sequence[str] | None = None,
        relations: Sequence[str] | None = None,
    ) -> Self:
        """Build from a PyG `HeteroData`: every edge type becomes a relation from its source type (rows) to its target type.

        Tokens are those of `node_type`, then those of the other types that relations join, in the order of the data; types
        that none joins are left out. A relation is called as its edge type; where several are called alike,
        "source__name__target", but for the one that joins `node_type` to itself.

        The first of `edge_weight`, `edge_attr` and `weight` that an edge type has as [E] or [E, 1] gives the weights, other
        names do not. Unless `names` are given, the lists of strings that all node types have as `names` or `node_ids` are
        taken. Of the edge types, `relations` names those that are meant, in this order. Other arguments are those of
        `from_edge_index`.

        Raises:
            ValueError: a missing node type or relation, and everything that `from_edge_index` refuses.

        Warns:
            UserWarning: weights stay 1 although an edge type has attributes that may be meant, as `edge_attr` [E, k].
        """
        given = foreign.of_hetero_data(data, node_type, relations)
        if names is not None:
            given["names"] = names
        return cls.from_edge_index(**given, undirected=undirected, undirected_reduce=undirected_reduce)

    @classmethod
    def from_scipy(
        cls,
        matrices: Mapping[str, Any],
        *,
        undirected: bool | Collection[str] = False,
        undirected_reduce: str = "max",
        names: GeneList | Sequence[str] | None = None,
    ) -> Self:
        """Build from square scipy sparse matrices of one size, relation -> matrix.

        Their entries are the weights, added where a place has several; those of a bool matrix have no weights. Other
        arguments are those of `from_edge_index`.
        """
        given = foreign.of_scipy(matrices)
        return cls.from_edge_index(**given, undirected=undirected, undirected_reduce=undirected_reduce, names=names)

    @classmethod
    def from_sparse_tensor(
        cls,
        tensors: Mapping[str, Any],
        *,
        undirected: bool | Collection[str] = False,
        undirected_reduce: str = "max",
        names: GeneList | Sequence[str] | None = None,
    ) -> Self:
        """Build from square `torch_sparse.SparseTensor` or sparse `torch.Tensor` objects of one size, relation -> tensor.

        Their entries are the weights, added where a place has several; those of a bool tensor, as those of a SparseTensor
        without values, have no weights. Other arguments are those of `from_edge_index`.
        """
        given = foreign.of_sparse_tensors(tensors)
        return cls.from_edge_index(**given, undirected=undirected, undirected_reduce=undirected_reduce, names=names)

    @classmethod
    def from_networkx(
        cls,
        graphs: Mapping[str, Any],
        nodelist: Sequence[Any],
        *,
        weight: str | None = "weight",
        undirected: bool | Collection[str] = False,
        undirected_reduce: str = "max",
        names: GeneList | Sequence[str] | None = None,
    ) -> Self:
        """Build from networkx graphs, relation -> graph.

        Edges of an undirected graph are stored both ways; the weights of parallel edges add.

        Args:
            graphs: relation -> graph.
            nodelist: every node, in the order of their indices.
            weight: the edge attribute that is the weight, 1 where an edge has none; None for a graph without weights.
            undirected, undirected_reduce, names: as in `from_edge_index`.

        Warns:
            UserWarning: no edge of a graph has this attribute, but the first one has another that is a number.
        """
        given = foreign.of_networkx(graphs, nodelist, weight)
        return cls.from_edge_index(**given, undirected=undirected, undirected_reduce=undirected_reduce, names=names)

    # ------------------------------------------------------------------------------------------------ what it holds

    def relation_id(self, relation: str) -> int:
        """Position of a relation in the stack. Raises ValueError, with the nearest name, if there is no such relation."""
        index = self._relation_id.get(relation) if isinstance(relation, str) else None
        if index is None:
            unknown("relation", relation, self.relations)
        return index

    def num_edges(self, relation: str | None = None) -> int:
        """Stored entries of a relation, or of all."""
        if relation is None:
            return self._offset[-1]
        r = self.relation_id(relation)
        return self._offset[r + 1] - self._offset[r]

    def rowptr(self, relation: str) -> Tensor:
        """int64 [N + 1]: the entries of row i are rowptr[i] to rowptr[i + 1] of `col` and `weight`."""
        r, n = self.relation_id(relation), self.num_nodes
        return self._rowptr[r * n : (r + 1) * n + 1] - self._offset[r]

    def col(self, relation: str) -> Tensor:
        """int32 [E] columns (int64 only where N exceeds int32), ascending within a row."""
        r = self.relation_id(relation)
        return self._col[self._offset[r] : self._offset[r + 1]]

    def weight(self, relation: str) -> Tensor:
        """float [E] weights, 1 where none were given."""
        r = self.relation_id(relation)
        return self._weight[self._offset[r] : self._offset[r + 1]]

    def column_weight(self, relation: str) -> Tensor:
        """float64 [tokens of the columns' type]: what each column weighs in `comembership`, 1 unless `with_column_weight`."""
        terms = self.node_types[self.joins(relation)[1]]
        weight = self._all_column_weights(relation)
        if weight is None:
            return torch.ones(len(terms), dtype=torch.float64, device=self.device)
        return weight[terms.start : terms.stop]

    def _all_column_weights(self, relation: str) -> Tensor | None:
        """`column_weight` of all tokens, 1 at those of other types, float64 [N]; None where no relation has any but 1."""
        return None if self._column_weight is None else self._column_weight[self.relation_id(relation)]

    @property
    def node_types(self) -> dict[str, range]:
        """The tokens of each type: `len(graph.node_types["gene"])` genes, the first of which is `.start`."""
        return self.types.ranges

    def joins(self, relation: str) -> tuple[str, str]:
        """(type of the rows, type of the columns) of a relation."""
        return self.types.joins[self.relation_id(relation)]

    def names_of(self, node_type: str) -> GeneList | None:
        """The names of one type's tokens; None where the graph has none. Raises ValueError for a type that is not there."""
        require_choice("node_type", node_type, self.types.names)
        at = self.node_types[node_type]
        return None if self.names is None else self.names.select(torch.arange(at.start, at.stop, device="cpu"))

    def known(self, relation: str) -> Tensor:
        """bool [N]: tokens measured in the relation. A pair (i, j) is valid where i is known and of the type of the rows, j
        known and of that of the columns; in a graph of genes alone, where both are known.
        """
        return self._known[self.relation_id(relation)]

    def known_rows(self, relation: str) -> Tensor:
        """bool [N]: known tokens of the type of the relation's rows; `known` in a graph of genes alone."""
        return self._known_rows[self.relation_id(relation)]

    def known_columns(self, relation: str) -> Tensor:
        """bool [N]: known tokens of the type of the relation's columns; `known` in a graph of genes alone."""
        return self._known_columns[self.relation_id(relation)]

    def num_known(self, relation: str) -> int:
        """How many tokens are known as columns of the relation."""
        return self._num_known[self.relation_id(relation)]

    def known_ranks(self, relation: str) -> tuple[Tensor, Tensor]:
        """(the tokens, known columns first, ascending; the rank of each known column among them), int64 [N]."""
        r = self.relation_id(relation)
        by_rank, rank_of = self._kept("_ranks", self._make_ranks)
        return by_rank[r], rank_of[r]

    def num_free(self, relation: str) -> Tensor:
        """int64 [N]: known columns to which each row has no edge."""
        return self._kept("_free", self._make_free)[0][self.relation_id(relation)]

    def free_ends(self, relation: str) -> Tensor:
        """int64 [N]: where the valid non-edges of each row end, in a list of those of all rows with an edge."""
        return self._kept("_free", self._make_free)[1][self.relation_id(relation)]

    def degree(self, relation: str) -> Tensor:
        """int64 [N]: entries of each row."""
        return self.rowptr(relation).diff()

    def edge_index(self, relation: str) -> Tensor:
        """int64 [2, E], sorted by row, then column."""
        rows = torch.arange(self.num_nodes, device=self.device).repeat_interleave(self.degree(relation))
        return torch.stack([rows, self.col(relation).long()])

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self._rowptr.device

    @property
    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rowptr int64 [K * N + 1], col int32 [E], weight float [E]) of all relations, one below the other."""
        return self._rowptr, self._col, self._weight

    @property
    def inv_mass(self) -> Tensor:
        """float64 [K * N]: 1 / (sum of the row's weights), 0 for a row without edges."""
        return self.targets(torch.float64).inv_mass.view(-1)

    @property
    def entropy(self) -> Tensor:
        """float64 [K * N]: sum_j t_ij log t_ij (natural log) of the row t_ij = w_ij / sum_j w_ij, 0 for a row without edges."""
        return self.targets(torch.float64).entropy.view(-1)

    def targets(self, dtype: torch.dtype) -> Targets:
        """What the losses need to know of every row, in float32 or float64."""
        # not indexed by a bool, which Dynamo of torch 2.11 does not know
        double, single = self._kept("_targets", self._make_targets)
        return single if dtype == torch.float32 else double

    def num_rows_with_edges(self, relation: str) -> int:
        """Rows with at least one entry."""
        return self._rows_with_edges[self.relation_id(relation)]

    def max_degree(self, relation: str) -> int:
        """Entries of the fullest row."""
        return self._max_degree[self.relation_id(relation)]

    def transpose(self) -> Transpose:
        """All relations by columns. Built when first needed, then kept."""
        return self._kept("_transpose", lambda: transpose_of(self._rowptr, self._col, self.num_nodes))

    def stacked_by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """`stacked` by columns: (colptr int64 [K * N + 1], row int32 [E], weight float [E]). Built when needed, then kept."""
        colptr, row, edge = self.transpose()
        return colptr, row, self._kept("_weight_by_column", lambda: self._weight.index_select(0, edge))

    @property
    def scaled(self) -> Scaled:
        """Weights by rows and by columns with which no sum w_ij x_j is much larger or smaller than the largest x_j."""
        by_column = self.stacked_by_column()[2]
        if not self._has_unusual_mass:
            return Scaled(self._weight, by_column, None)
        edge = self.transpose().edge
        return self._kept("_scaled", lambda: scaled_weights(self._rowptr, self._weight, edge, self.num_nodes))

    def _make_targets(self) -> tuple[Targets, Targets]:
        double = row_targets(self._rowptr, self._weight, self.num_nodes)
        inv_mass, entropy, without_edge, num_counted = double
        # not by _replace, of which Dynamo of torch 2.11 cannot keep what comes
        return double, Targets(inv_mass.float(), entropy.float(), without_edge, num_counted)

    def _make_ranks(self) -> tuple[Tensor, Tensor]:
        known = self._known_columns
        return torch.argsort(~known, stable=True), known.cumsum(1) - 1

    def _make_free(self) -> tuple[Tensor, Tensor]:
        degree = self._rowptr.diff().view(self._known.shape)
        num_free = self._known_columns.sum(1, keepdim=True) - degree
        return num_free, num_free.masked_fill(degree == 0, 0).cumsum(1)

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What is made when first needed. A function compiled for inference keeps it apart: no training may find it."""
        kept = getattr(self, name)
        if kept is not None:
            return kept
        if torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled():
            if name not in self._passing:
                self._passing[name] = make()
            return self._passing[name]
        kept = of_any_mode(make)()
        setattr(self, name, kept)
        if not torch.compiler.is_compiling():
            self._watch(name.removeprefix("_"), kept)
        return kept

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What an op makes of the graph, outside of the modes that are on: kept under a key as long as the graph lives."""
        if key not in self._made:
            self._made[key] = of_any_mode(make)()
        made: _T = self._made[key]
        return made

    def bits(self, relation: str) -> Bits | None:
        """The relation as one bit a pair, where it is dense and without weights; None where it is used as CSR alone."""
        bits = self._bits[self.relation_id(relation)]
        return bits if AVAILABLE or self.device.type != "cpu" else None  # sums over them are the extension's there

    @property
    def segments(self) -> tuple[Segments, Segments]:
        """Where rows, and columns, of more than `SEGMENT` entries are cut."""
        return self._segments

    # ------------------------------------------------------------------------------------------------ new from old

    def extend(
        self,
        num_new: int,
        edge_index: Mapping[str, Tensor] | None = None,
        *,
        edge_weight: Mapping[str, Tensor] | None = None,
        undirected: bool | Collection[str] = False,
        undirected_reduce: str = "max",
        names: Sequence[str] | None = None,
        node_type: str | None = None,
    ) -> MultiGraph:
        """Append genes N .. N + num_new - 1, unknown in every relation but those in which they are given an edge.

        In a graph of several node types new tokens stand behind the last of their type, and those of the types behind it move
        up by num_new: of 6,607 genes and 2,000 reactions one new gene is token 6607, and the first reaction token 6608. What
        has a row a token moves with them: features, and embeddings by `nn.extend_genes(model, num_new, at=6607)`.

        Args:
            num_new: number of new genes, >= 0.
            edge_index: relation -> integer tensor [2, E] of tokens of the new graph; each edge has a new gene at an end, and
                makes both its ends known in that relation.
            edge_weight, undirected, undirected_reduce: as in `from_edge_index`.
            names: the new genes' names, where the graph has names; "new1", "new2", ... by default.
            node_type: the type of the new tokens, the first of the graph (genes) by default.
        """
        self.require_unwritten()
        num_new = count_of("num_new", num_new)
        kind = self.types.names[0] if node_type is None else node_type
        require_choice("node_type", kind, self.types.names)
        require(names is None or self.names is not None, "names: the graph has none for the genes that are there")
        new_names = as_names(names, num_new)
        added = {} if edge_index is None else edge_index
        require_mapping("edge_index", added)
        added = {name: tensor_of(index) for name, index in added.items()}
        for name in added:
            self.relation_id(name)
        total, first = self.num_nodes + num_new, self.node_types[kind].stop
        here = torch.arange(self.num_nodes, device=self.device)
        here = here + num_new * (here >= first)  # where each old token stands in the new graph
        sizes = [size + num_new * (name == kind) for name, size in zip(self.types.names, self.types.sizes, strict=True)]
        types = self.types._replace(sizes=tuple(sizes))
        new = MultiGraph.from_edge_index(
            {name: added.get(name, self._col.new_empty(2, 0, dtype=torch.int64)) for name in self.relations},
            total,
            edge_weight=edge_weight,
            undirected=undirected,
            undirected_reduce=undirected_reduce,
            node_types=dict(zip(types.names, types.sizes, strict=True)),
            joins=dict(zip(self.relations, types.joins, strict=True)),
        )
        require(
            new.device == self.device or not added,
            f"edge_index: expected device {self.device} of the graph, got {new.device}",
        )
        dtype = torch.promote_types(self._weight.dtype, new._weight.dtype)
        parts = []
        for name in self.relations:
            fresh = new.edge_index(name)
            old_pair = ((fresh < first) | (fresh >= first + num_new)).all(0)
            if old_pair.any():
                pair = fresh[:, old_pair][:, 0].tolist()
                told = f"N = {self.num_nodes}" if self.types.are_genes else f"new are {kind!r} {first} to {first + num_new - 1}"
                raise ValueError(f"edge_index[{name!r}]: edge {pair} joins two genes that are not new ({told})")
            known = torch.zeros(total, dtype=torch.bool, device=self.device)
            known[here] = self.known(name)
            known[fresh.reshape(-1)] = True
            column_weight = self._all_column_weights(name)
            if column_weight is not None:
                column_weight = column_weight.new_ones(total).index_copy_(0, here, column_weight)
            row, col = torch.cat([here[self.edge_index(name)], fresh], 1).unbind(0)
            weight = torch.cat([self.weight(name).to(dtype), new.weight(name).to(dtype)])
            row, col, weight = coalesce(row, col, weight, total, None, dtype)
            parts.append(Rows(row.bincount(minlength=total), col, weight, known, column_weight))
        everyone = None if self.names is None else self.names.extend(new_names or self.names.fresh(num_new), at=first)
        return MultiGraph._stack(self.relations, parts, total, self.device, dtype, everyone, types)

    @of_any_mode
    def subgraph(self, nodes: Tensor) -> MultiGraph:
        """The graph induced on `nodes` (int64 [M], distinct), relabelled: nodes[m] becomes m.

        Of a graph of several node types they stand in the order of their types.
        """
        self.require_unwritten()
        nodes = tensor_of(nodes)
        require_tensor("nodes", nodes, ndim=1, dtypes=(torch.int64,))
        require(nodes.numel() > 0, "nodes: expected at least one gene, got none")
        check_has_values("nodes", nodes)
        nodes = nodes.to(self.device)
        rowptr, col, edge = subgraph_rows(self._rowptr, self._col, nodes, self.num_nodes)
        types = self.types.subset(nodes)
        weight, known = self._weight.index_select(0, edge), self._known.index_select(1, nodes)
        if self._lightest < MASS_RANGE[0]:  # a heavier edge alone may have borne the row
            check_mass(self.relations, rowptr, weight, nodes.numel())
        names = None if self.names is None else self.names.select(nodes)
        column_weight = None if self._column_weight is None else self._column_weight.index_select(1, nodes)
        return MultiGraph(self.relations, rowptr, col, weight, known, names, types, column_weight)

    def select(self, relations: Sequence[str]) -> MultiGraph:
        """The graph of these relations alone, in this order. It is kept, so that asking again costs nothing.

        Raises:
            ValueError: a name that is no relation's, or stands twice.
        """
        self.require_unwritten()
        require_several("relations", relations)
        ids = [self.relation_id(name) for name in relations]
        require(len(set(ids)) == len(ids), f"relations: expected distinct names, got {list(relations)}")
        chosen = tuple(self.relations[r] for r in ids)
        if chosen == self.relations:
            return self
        if chosen not in self._selected:
            parts = [derive.rows_of(self, name) for name in chosen]
            types = self.types.select(ids)
            dtype = self._weight.dtype
            self._selected[chosen] = MultiGraph._stack(chosen, parts, self.num_nodes, self.device, dtype, self.names, types)
        return self._selected[chosen]

    def hops(self, relation: str | Sequence[str] | None, k: int) -> MultiGraph:
        """Join i to every j that is reached along 1 to k edges, with weight 1; i itself only where a cycle leads back to it.

        Args:
            relation: the relation, several, or None for all; the others stay as they are. The same holds below.
            k: >= 1 edges.

        Raises:
            ValueError: k > 1 of a relation that joins two node types, where no edge begins where another ends.
            ImportError, NotImplementedError: the extension was not built, or not for the graph's device.
        """
        k = count_of("k", k, minimum=1)
        return self._replaced(relation, lambda name: derive.hops(self, name, k))

    def symmetrized(self, relation: str | Sequence[str] | None) -> MultiGraph:
        """max(A, Aᵀ): an edge in both directions wherever there is one in either, with the larger of two weights.

        A relation that joins two node types is refused, here and in `with_self_loops`.
        """
        return self._replaced(relation, lambda name: derive.symmetrized(self, name))

    def with_self_loops(self, relation: str | Sequence[str] | None) -> MultiGraph:
        """A loop at each known gene: those that are there keep their weight, new ones have weight 1."""
        return self._replaced(relation, lambda name: derive.with_self_loops(self, name))

    def without_self_loops(self, relation: str | Sequence[str] | None) -> MultiGraph:
        """No edge from a gene to itself."""
        return self._replaced(relation, lambda name: derive.without_self_loops(self, name))

    def comembership(self, relation: str, *, weight: Tensor | None = None, diagonal: bool = False) -> Comembership:
        """Whom each token of the relation's rows shares columns with: genes of one complex, reaction or term.

        T = D⁻¹ C with C_ij = sum_e b_ie w_e b_je over the tokens e of the columns' type, b the relation's weights, and D the
        row sums: a target for `attention_kl_comembership`, and for ties with loss="kl_comembership", of which no matrix is
        made. Its constants take (entries of the relation) x (tokens of its rows' type) operations, once: those of the graph's
        own weights are kept. A function compiled with fullgraph=True finds them where this was called before.

        Args:
            relation: B, from genes to terms.
            weight: [tokens of the columns' type], w_e, finite and not negative; by default the graph's `column_weight`: 1, or
                what `with_column_weight` gave, as it has to for ties.
            diagonal: whether a gene shares its terms with itself. Without it, what it shares with itself is taken off again: a
                row whose own b_ii^2 w is r times what it shares with others has r times the rounding.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        self.require_unwritten()
        relation = self.relations[self.relation_id(relation)]
        if not isinstance(diagonal, bool):
            raise TypeError(f"diagonal: expected a bool, got {describe(diagonal)}")
        if weight is not None:
            return Comembership.of(self, relation, weight, diagonal)
        key = relation, diagonal
        if key not in self._shared:
            if torch.compiler.is_dynamo_compiling():
                torch._dynamo.graph_break(msg="call graph.comembership(relation) once before: it is made of values")
            self._share(relation, diagonal)
        weight, *constants = self._shared[key]
        return Comembership(self, relation, weight.clone(), diagonal, *constants)  # what is kept is nobody's to change

    def with_column_weight(self, relation: str, weight: Tensor) -> MultiGraph:
        """The graph with weights w_e of a relation's columns, the diagonal of W in the T = D⁻¹ B W Bᵀ of `comembership`.

        Ties with loss="kl_comembership" have them, and no other loss. They go along into files, copies and the graphs made from
        this one, in which a new token weighs 1. With w_e = 1 / (genes of e - 1) every term of a gene, large or small, is an
        equal part of its row.

        Args:
            relation: B, from genes to terms.
            weight: [tokens of the columns' type], finite and not negative; kept in float64.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        terms = self.node_types[self.joins(relation)[1]]
        everyone = torch.ones(self.num_nodes, dtype=torch.float64, device=self.device)
        everyone[terms.start : terms.stop] = check_column_weight(weight, len(terms), self.device)
        return self._replaced(relation, lambda name: derive.rows_of(self, name)._replace(column_weight=everyone))

    @_disable_dynamo  # torch.compiler.disable would load Dynamo here, which takes longer than all else that is imported
    def _share(self, relation: str, diagonal: bool) -> None:
        """Make the constants of `comembership`; they are kept without their graph, which would hold itself."""
        made = of_any_mode(Comembership.of)(self, relation, None, diagonal)
        constants = made.weight, *made.constants
        self._shared[relation, diagonal] = constants
        self._watch("comembership", constants)

    def rewired(self, relation: str | Sequence[str] | None, seed: int = 0) -> MultiGraph:
        """A random graph with the degrees of this one, to compare a prior with: edges swap ends (Maslov and Sneppen 2002).

        Each gene keeps its number of outgoing and of incoming edges. No edge stands twice, loops stay as they are and none
        is made, a symmetric relation stays symmetric, weights are dealt out anew among the edges that are no loops (in a
        symmetric relation among its pairs, both weights of a pair together). Each edge takes part in ten swaps on average, in
        as far as a graph so full allows: in one that joins nearly all pairs little can move.

        Args:
            relation: the relation, several, or None for all.
            seed: equal seeds give equal graphs, on any device; a relation's does not depend on which others are chosen.
        """
        seed = seed_of("seed", seed)
        return self._replaced(relation, lambda name: derive.rewired(self, name, seed))

    def permuted(self, relation: str | Sequence[str] | None, seed: int = 0) -> MultiGraph:
        """The same graph with its genes renamed at random, to compare a prior with: all of its structure, at other genes.

        Genes that are known in the relation change places among themselves, as tokens of every other type do: in the same way
        in all relations in which the same ones are known. `names` stay with their positions.

        Args:
            relation: the relation, several, or None for all.
            seed: equal seeds give equal graphs, on any device.
        """
        seed = seed_of("seed", seed)
        return self._replaced(relation, lambda name: derive.permuted(self, name, seed))

    @of_any_mode
    def _replaced(self, relation: str | Sequence[str] | None, make: Callable[[str], Rows]) -> MultiGraph:
        """The graph with some relations made anew."""
        self.require_unwritten()
        chosen = self.relations if relation is None else (relation,) if isinstance(relation, str) else relation
        if not isinstance(chosen, Sequence):
            raise TypeError(f"relation: expected a name, several or None, got {describe(relation)}")
        for name in chosen:
            self.relation_id(name)
        parts = [make(name) if name in chosen else derive.rows_of(self, name) for name in self.relations]
        return self._stack(self.relations, parts, self.num_nodes, self.device, self._weight.dtype, self.names, self.types)

    @of_any_mode
    def to(self, device: torch.device | str) -> MultiGraph:
        """The same graph on another device; `self` if it is there already. Raises ValueError for what is none, or not there."""
        target = device_of("device", device, present=True)
        if target == self.device:
            return self
        arrays = {name: x.to(device) for name, x in self._arrays().items()}
        graph = MultiGraph(self.relations, names=self.names, types=self.types, **arrays)
        if self._transpose is not None:
            graph._transpose = Transpose(*(x.to(device) for x in self._transpose))
        if self._weight_by_column is not None:
            graph._weight_by_column = self._weight_by_column.to(device)
        graph._shared = {key: tuple(x.to(device) for x in constants) for key, constants in self._shared.items()}
        graph._watch_all()
        return graph

    def to_hetero_data(self) -> Any:
        """A PyG `HeteroData`, which `from_hetero_data` reads back, but for what is known, weights of columns, aliases of names,
        and types that no relation joins.

        Each node type holds `num_nodes` and, where the graph has names, `names`; each edge type `edge_index` int64 [2, E], by
        positions within its two types, and `edge_weight` [E] unless all are 1.
        """
        return foreign.to_hetero_data(self)

    # ------------------------------------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str], *, notes: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file. It appears whole or not at all; a link stays one, a file that is there keeps its mode.

        Args:
            path: the file.
            notes: texts to keep in the file's metadata, by name; `load` leaves them alone.
        """
        file.write(path, self.relations, self.names, self.types, self._arrays(), notes or {})

    @classmethod
    @of_any_mode
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by `save`, checking all that the constructors check. Raises ValueError with the path."""
        given, column_weight = file.read(path)
        with file.of_file(path):
            graph = cls.from_edge_index(**given)
        if column_weight is None:
            return graph
        return cls(graph.relations, names=graph.names, types=graph.types, **graph._arrays(), column_weight=column_weight)

    # ------------------------------------------------------------------------------------------------ Python's own

    def __getitem__(self, relation: str) -> Relation:
        """One relation, with `edge_index`, `weight` and the like; `select` gives a graph of some of them."""
        arrays = (of(relation) for of in (self.rowptr, self.col, self.weight, self.known))
        return Relation(plain(relation), *arrays)

    def __contains__(self, relation: object) -> bool:
        return relation in self.relations

    def __iter__(self) -> Iterator[str]:
        """The names of the relations."""
        return iter(self.relations)

    def __len__(self) -> int:
        """The number of relations."""
        return len(self.relations)

    def __bool__(self) -> bool:
        """A graph is there, with or without relations."""
        return True

    def __getstate__(self) -> dict[str, Any]:
        self.require_unwritten()  # a copy could not tell
        return {**self.__dict__, "_selected": {}, "_passing": {}, "_made": {}, "_versions": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = dict.fromkeys(("_targets", "_ranks", "_free", "_column_weight", "_weight_by_column", "_scaled"))
        bits = (None,) * len(state["relations"])
        since: dict[str, Any] = {**kept, "_selected": {}, "_passing": {}, "_made": {}, "_shared": {}, "_bits": bits}
        if "types" not in state:
            since["types"] = NodeTypes.of_genes(state["num_nodes"], len(state["relations"]))
            since["_known_rows"] = since["_known_columns"] = state["_known"]
        self.__dict__.update({**since, **state})
        if "_has_unusual_mass" not in state:
            self._has_unusual_mass = self._find_unusual_mass()
            self._shared = {}  # had fewer constants
        self._watch_all()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MultiGraph):
            return NotImplemented
        return (
            self.relations == other.relations
            and self.names == other.names
            and self.types == other.types
            and self.device == other.device
            and self._known.shape == other._known.shape
            and self._arrays().keys() == other._arrays().keys()
            and all(torch.equal(array, other._arrays()[name]) for name, array in self._arrays().items())
        )

    __hash__ = None  # type: ignore[assignment]

    def digest(self) -> str:
        """SHA-256, in hex, of all that the graph is: relations, edges, weights, known genes, names and types, on any device.

        Equal graphs have equal digests; it depends on no version of Python or PyTorch.
        """
        self.require_unwritten()
        return self._digest

    @cached_property
    def _digest(self) -> str:
        names = None if self.names is None else self.names.digest()
        types = [] if self.types.are_genes else [self.types]
        hashed = hashlib.sha256(json.dumps([list(self.relations), self.num_nodes, names, *types]).encode())
        for x in self._arrays().values():
            hashed.update(f"{x.dtype} {list(x.shape)}".encode())
            hashed.update(x.cpu().contiguous().numpy().data)
        return hashed.hexdigest()

    def _arrays(self) -> dict[str, Tensor]:
        """Those that make the graph again, by the constructor's names."""
        self.require_unwritten()
        arrays = {"rowptr": self._rowptr, "col": self._col, "weight": self._weight, "known": self._known}
        return arrays if self._column_weight is None else {**arrays, "column_weight": self._column_weight}

    def __repr__(self) -> str:
        named = "" if self.names is None else f", names={self.names}"
        counts = ", ".join(f"{name}: {size}" for name, size in zip(self.types.names, self.types.sizes, strict=True))
        typed = "" if self.types.are_genes else f", node_types={{{counts}}}"
        head = f"MultiGraph(num_nodes={self.num_nodes}, num_edges={self.num_edges()}, device={self.device}{typed}{named})"
        width = max(map(len, ("relation", *self.relations)))
        count = "genes" if self.types.are_genes else "nodes"
        header = f"  {'relation':<{width}} {count:>7} {'edges':>9} {'mean deg':>9} {'max deg':>8} {'unknown':>8}"
        lines = [head, header] if self.relations else [head]
        for r, name in enumerate(self.relations):
            rows, cols = self.edge_index(name)
            nodes = torch.cat([rows, cols]).unique().numel()
            mean = self.num_edges(name) / max(self.num_rows_with_edges(name), 1)
            unmeasured = sum(map(len, set(self.types.ends(r)))) - int(self.known(name).sum())
            row = f"{nodes:>7} {self.num_edges(name):>9} {mean:>9.1f} {self.max_degree(name):>8} {unmeasured:>8}"
            joined = "" if len(self.types.names) == 1 else "  {} -> {}".format(*self.joins(name))
            lines.append(f"  {name:<{width}} {row}{joined}")
        return "\n".join(lines)


def _by_relation(argument: str, given: Any, relations: tuple[str, ...]) -> dict[str, Any]:
    """A dict by relation, each of which there is; empty where nothing was given."""
    if given is None:
        return {}
    require_mapping(argument, given)
    for name in given:
        if name not in relations:
            unknown(f"{argument} relation", name, relations)
    return {name: tensor_of(value) for name, value in given.items()}


# A graph that `torch.save` wrote is read by `torch.load` with weights_only=True.
torch.serialization.add_safe_globals(
    [MultiGraph, Comembership, GeneList, NodeTypes, Relation, Transpose, Segments, Targets, Bits]
)
