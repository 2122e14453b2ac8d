"""Measured mutants: ragged sets of perturbed genes, what was done to each gene, and the phenotype."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data._utils.collate import default_collate_fn_map

from .._check import (
    count_of,
    describe,
    plain,
    require,
    require_choice,
    require_indices,
    require_iterable,
    require_several,
    require_tensor,
    shown,
    tensor_of,
    unknown,
)
from .._modes import without_function_modes
from .._profiling import span
from ..genes import GeneList, as_names, require_same_genes
from . import hetero
from .tables import InteractionTable

PERTURBATION_TYPES = ("present", "deleted", "added", "overexpressed", "knocked_down", "mutated")
"""State of a gene, m_i; the position is the type id. All genes outside a set are "present", the unperturbed state."""


class PerturbationSample(NamedTuple):
    """One mutant: `seeds` int64 [n], `types` int64 [n], `y` float32 [] or [P], P = 0 where none was measured."""

    seeds: Tensor
    types: Tensor
    y: Tensor


@dataclass(eq=False)  # not frozen: what walks over batches, as Lightning does, sets the fields of a copy
class PerturbationBatch:
    """A batch of mutants; set b holds the entries ptr[b] to ptr[b + 1].

    Attributes:
        seeds: int64 [nnz], perturbed genes.
        ptr: int64 [B + 1].
        types: int64 [nnz], positions in `PERTURBATION_TYPES`.
        y: float32 [B] or [B, P], phenotypes; [B, 0] where none were measured.
    """

    seeds: Tensor
    ptr: Tensor
    types: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def __getitem__(self, index: int) -> PerturbationSample:
        """One mutant of the batch. Raises IndexError past the end."""
        return _sample(self, index)

    def __iter__(self) -> Iterator[PerturbationSample]:
        return (self[b] for b in range(len(self)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PerturbationBatch:
        """The batch on another device."""
        return PerturbationBatch(*(part.to(device, non_blocking=non_blocking) for part in self._parts()))

    def copy_(self, other: PerturbationBatch) -> PerturbationBatch:
        """Take the values of a batch of the same shapes, and stay where it is, as a CUDA graph needs its inputs to."""
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine.copy_(theirs, non_blocking=True)
        return self

    def pin_memory(self) -> PerturbationBatch:
        """The batch in page-locked memory; a `DataLoader` with `pin_memory=True` calls it."""
        return PerturbationBatch(*(part.pin_memory() for part in self._parts()))

    @property
    def num_bytes(self) -> int:
        """Bytes that a move to another device copies."""
        return sum(part.numel() * part.element_size() for part in self._parts())

    def to_hetero_data(self, num_genes: int, *, node_type: str = "gene", masks: bool = False, offset: bool = False) -> Any:
        """The PyG batch that a `DataLoader` with follow_batch=["perturbation_indices"] over one `HeteroData` a sample gives.

        The node type holds `perturbation_indices` int64 [nnz] with `_batch` [nnz] and `_ptr` [B + 1], `perturbation_types`
        int64 [nnz], `phenotype_values` float32 [B P] with `phenotype_type_indices` and `phenotype_sample_indices` (none of the
        three where P is 0), and `num_nodes`; to_data_list() and indexing work. Its samples, collated by PyG again, give the
        same batch: their class says that `phenotype_sample_indices` are counted up, and with `offset` `perturbation_indices`
        too.

        Args:
            num_genes: N, the genes of a sample.
            node_type: the name of the node type.
            masks: also `pert_mask` and `mask` bool [B N] (perturbed, and not) with `batch` [B N] and `ptr` [B + 1] of the
                genes. They follow from the indices, so build them, if at all, where they are used: on the device.
            offset: number the genes through, sample b's from b N on, as PyG does with a field that is counted up in
                collation; otherwise `perturbation_indices` are genes.

        Raises:
            ValueError: a gene past `num_genes`.
        """
        num_genes = count_of("num_genes", num_genes, minimum=1)
        require_indices("seeds", self.seeds, num_genes)
        return hetero.write(*self._parts(), num_genes, node_type=node_type, masks=masks, offset=offset)

    @classmethod
    def from_hetero_data(cls, data: Any, *, node_type: str = "gene", types: str = "deleted") -> PerturbationBatch:
        """Read a PyG batch, or one sample, with the fields that `to_hetero_data` describes; others are left alone.

        Sets are told apart by `perturbation_indices_ptr` or, in a batch that PyG collated, by its own books, which also
        say whether (and by how much) the indices were counted up: they come back as genes either way. In subgraphs, whose
        node type holds `n_id`, indices are positions, and become the genes that stand there. In a `HeteroData` that PyG
        did not collate, indices are genes.

        Args:
            data: `torch_geometric.data.Batch` or `HeteroData`.
            node_type: the node type of genes.
            types: what was done to the genes, a name from `PERTURBATION_TYPES`, where there are no `perturbation_types`.

        Returns:
            The batch; y is [B] where each sample has one phenotype, and [B, P] by ascending type where it has P: [B, 0]
            without `phenotype_values`, as for inference.

        Raises:
            ValueError: a node type or field that is missing, or phenotypes that not every sample has.
        """
        require_choice("types", types, PERTURBATION_TYPES[1:])
        seeds, ptr, given, y = hetero.read(data, node_type)
        if given is not None:
            require_indices(f"data: {hetero.TYPES}", given, len(PERTURBATION_TYPES), "PERTURBATION_TYPES")
        return cls(seeds, ptr, torch.full_like(seeds, PERTURBATION_TYPES.index(types)) if given is None else given, y)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.seeds, self.ptr, self.types, self.y


def batches_on(device: torch.device | str, batches: Iterable[PerturbationBatch]) -> Iterator[PerturbationBatch]:
    """Batches of a loader on a device, where only their indices, types and phenotypes have to go.

    A GPU gets each batch out of page-locked memory, so that the host does not wait for the copy: it goes on to the next batch.
    """
    device = torch.device(device)
    for batch in batches:
        if not hasattr(batch, "to"):
            raise TypeError(f"batches: expected PerturbationBatch objects, as of a DataLoader, got {describe(batch)}")
        with span("transfer"):
            moved = batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)
        yield moved


class PerturbationDataset(Dataset[PerturbationSample]):
    """Mutants stored flat, so that a batch is one gather.

    Args:
        seeds: int64 [nnz], perturbed genes of all sets, one set after the other; here and below NumPy arrays will do.
        ptr: int64 [B + 1], where each set begins; sets may be empty.
        types: int64 [nnz], positions in `PERTURBATION_TYPES`, none of them 0, "present".
        y: float [B] or [B, P], finite phenotypes, stored as float32; None for mutants to predict, [B, 0].
        num_genes: number of genes that `seeds` refers to.
        split: the name of each sample's split, B strings, or None.
        names: the genes' names, `num_genes` of them, or None. They stay with every part of the dataset; where it meets a
            graph, `cellattn.data.require_same_genes(graph.names, dataset.names)` compares them.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: shapes that do not fit, an index out of range, a phenotype that is not finite, or a gene that stands
            twice in a set (the message names the sample and the gene).

    A `DataLoader` of it, or of parts of it, gives a `PerturbationBatch` at a time; inside samples of another dataset too.
    """

    @without_function_modes
    def __init__(
        self,
        seeds: Tensor,
        ptr: Tensor,
        types: Tensor,
        y: Tensor | None = None,
        *,
        num_genes: int,
        split: Sequence[str] | None = None,
        names: GeneList | Sequence[str] | None = None,
    ) -> None:
        seeds, ptr, types, y = (tensor_of(x) for x in (seeds, ptr, types, y))
        num_genes = count_of("num_genes", num_genes)
        require_tensor("seeds", seeds, ndim=1, dtypes=(torch.int64,))
        require_tensor("ptr", ptr, ndim=1, dtypes=(torch.int64,))
        require_tensor("types", types, ndim=1, dtypes=(torch.int64,))
        y = torch.empty(max(len(ptr) - 1, 0), 0) if y is None else y
        require_tensor("y", y)
        for name, value in (("seeds", seeds), ("ptr", ptr), ("types", types), ("y", y)):
            require(value.device.type == "cpu", f"{name}: expected a tensor on the CPU, got one on {value.device}")
        _check_ptr(ptr, len(seeds))
        num_samples = len(ptr) - 1
        require(len(types) == len(seeds), f"types: expected {len(seeds)} entries as in seeds, got {len(types)}")
        require(
            y.ndim in (1, 2) and len(y) == num_samples,
            f"y: expected shape [{num_samples}] or [{num_samples}, P] for {num_samples} sets, got a {describe(y)}",
        )
        require(y.is_floating_point(), f"y: expected a floating-point tensor, got a {describe(y)}")
        require_indices("seeds", seeds, num_genes)
        require_indices("types", types, len(PERTURBATION_TYPES), "PERTURBATION_TYPES")
        y = y.float()
        if not y.isfinite().all():
            sample = int((~y.isfinite()).nonzero()[0, 0])
            raise ValueError(f"y: sample {sample} holds {y[sample].tolist()}, expected finite numbers")
        sample_of = torch.arange(num_samples).repeat_interleave(ptr.diff())
        if (types == 0).any():
            entry = int((types == 0).nonzero()[0])
            raise ValueError(
                f"types: sample {int(sample_of[entry])}, gene {int(seeds[entry])} is 'present', the unperturbed state; "
                "leave such a gene out of the set"
            )
        _check_no_repeats(seeds, sample_of, names if isinstance(names, GeneList) and len(names) == num_genes else None)

        self.seeds, self.ptr, self.types, self.y = seeds, ptr, types, y
        self.num_genes = num_genes
        self.names = as_names(names, num_genes)
        self.split_names: tuple[str, ...] = ()
        self._split = torch.zeros(num_samples, dtype=torch.int64)
        if split is not None:
            ordered = (
                isinstance(split, Iterable) and not isinstance(split, (str, Mapping, Set)) and getattr(split, "ndim", 1) > 0
            )
            named: tuple[Any, ...] = tuple(split) if ordered else ()
            if not ordered or not all(isinstance(name, str) for name in named):
                raise TypeError(f"split: expected one string a sample, got {describe(split)}")
            require(len(named) == num_samples, f"split: expected {num_samples} names, one a sample, got {len(named)}")
            code = {name: position for position, name in enumerate(dict.fromkeys(map(plain, named)))}
            self.split_names = tuple(code)
            self._split = torch.tensor([code[name] for name in named], dtype=torch.int64)

    @classmethod
    @without_function_modes
    def from_sets(
        cls,
        sets: Iterable[Sequence[int | str]],
        y: Tensor | Sequence[float] | None = None,
        *,
        types: str | Sequence[Sequence[str]] = "deleted",
        genes: GeneList | None = None,
        num_genes: int | None = None,
        split: Sequence[str] | None = None,
    ) -> PerturbationDataset:
        """Build a dataset from sets of gene indices or, with `genes`, gene names.

        Args:
            sets: B sets.
            y: phenotypes [B] or [B, P]; None for mutants to predict.
            types: names from `PERTURBATION_TYPES`: one for all genes, or one for each gene of each set.
            genes: the gene list; needed for names. The dataset carries it where it has `num_genes` names.
            num_genes: number of genes; that of `genes` when None.
            split: the name of each sample's split.

        Raises:
            TypeError, ValueError: an unknown gene or type, lengths that differ, or what the constructor refuses.
        """
        flat: list[int] = []
        ends: list[int] = [0]
        require_iterable("sets", sets, "a sequence of genes a sample")
        for sample, members in enumerate(sets):
            if isinstance(members, str) or not isinstance(members, Iterable):
                raise TypeError(f"sets: expected a sequence of genes for sample {sample}, got {describe(members)}")
            flat += [_gene_index(gene, genes, sample) for gene in members]
            ends.append(len(flat))
        if num_genes is None:
            require(genes is not None, "num_genes: expected the number of genes, or genes, got neither")
            num_genes = len(genes) if genes is not None else 0
        ptr = torch.tensor(ends)
        return cls(
            as_tensor("sets", flat, torch.int64),
            ptr,
            _type_ids(types, ptr.diff().tolist()),
            None if y is None else as_tensor("y", y, torch.float32),
            num_genes=num_genes,
            split=split,
            names=genes if genes is not None and len(genes) == num_genes else None,
        )

    @classmethod
    def from_interactions(cls, table: InteractionTable, *, perturbation: str = "deleted") -> PerturbationDataset:
        """Build a dataset from a genetic-interaction table.

        Args:
            table: what `read_interactions` or `read_sga` returns; the score becomes `y`, the split column the split.
            perturbation: what was done to all genes, a name from `PERTURBATION_TYPES`, where the table does not say.
        """
        if not isinstance(table, InteractionTable):
            raise TypeError(f"table: expected an InteractionTable, got {describe(table)}")
        require_choice("perturbation", perturbation, PERTURBATION_TYPES[1:])
        types = table.types
        types = torch.full_like(table.seeds, PERTURBATION_TYPES.index(perturbation)) if types is None else types
        genes = table.genes
        return cls(table.seeds, table.ptr, types, table.score, num_genes=len(genes), split=table.split, names=genes)

    @classmethod
    @without_function_modes
    def from_hetero_data(
        cls,
        samples: Iterable[Any],
        *,
        num_genes: int | None = None,
        node_type: str = "gene",
        types: str = "deleted",
        split: Sequence[str] | None = None,
        names: GeneList | Sequence[str] | None = None,
    ) -> PerturbationDataset:
        """Build a dataset from PyG `HeteroData`, one a sample or batches of several; see `PerturbationBatch.from_hetero_data`.

        Args:
            samples: a list or dataset of `HeteroData`.
            num_genes: number of genes; `num_nodes` of the samples' node type when None, which all have alike. Subgraphs, whose
                node type holds `n_id`, do not tell it.
            split: the name of each sample's split.
            names: the genes' names, as `MultiGraph.names` of the graph that the samples belong to.

        Raises:
            ValueError: no samples, an unknown number of genes, or what the constructor refuses.
        """
        several = isinstance(samples, Iterable) or hasattr(type(samples), "__getitem__")  # as a `Subset`, say, has alone
        if hasattr(samples, "node_types") or not several:
            raise TypeError(f"samples: expected a sequence of HeteroData, got {type(samples).__name__}")
        batches = []
        told: list[int | None] = []
        for data in samples:
            batches.append(PerturbationBatch.from_hetero_data(data, node_type=node_type, types=types))
            if num_genes is None:
                told += _genes_told(data[node_type], node_type, len(batches[-1]))
        require(len(batches) > 0, "samples: expected at least one sample, got none")
        if num_genes is None:
            sizes = {size: at for at, size in reversed([*enumerate(told)]) if size is not None}  # the first sample of each
            require(len(sizes) > 0, f"num_genes: node type {node_type!r} does not tell it, so give it here")
            num_genes, *others = reversed(sizes)
            if others:
                at = sizes[others[0]]
                raise ValueError(
                    f"num_genes: the samples are of {num_genes} genes and, sample {at}, of {others[0]}, so give it here"
                )
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), *(batch.ptr.diff() for batch in batches)]).cumsum(0)
        seeds, kinds, y = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("seeds", "types", "y"))
        return cls(seeds, ptr, kinds, y, num_genes=num_genes, split=split, names=names)

    @property
    def split(self) -> list[str] | None:
        """The name of each sample's split, or None."""
        return [self.split_names[code] for code in self._split.tolist()] if self.split_names else None

    @without_function_modes
    def subset(self, selection: str | Tensor | np.ndarray | Sequence[int]) -> PerturbationDataset:
        """The samples of a split, under a mask or at given positions.

        Args:
            selection: the name of a split or a pattern for several ("*_training"); bool [B]; or positions int64 [M].

        Raises:
            ValueError: no split of that name, a mask of another length, a position out of range.
        """
        if isinstance(selection, str):
            selection = self.split_mask(selection)
        selection = as_tensor("selection", selection)
        require_tensor("selection", selection, ndim=1, dtypes=(torch.bool, torch.int64))
        if selection.dtype == torch.bool:
            require(len(selection) == len(self), f"selection: expected a mask of {len(self)}, got {len(selection)}")
            selection = selection.nonzero()[:, 0]
        batch = self._gather(selection)
        names = self.split_names
        split = [names[code] for code in self._split[selection].tolist()] if names else None
        kept: dict[str, Any] = {"num_genes": self.num_genes, "split": split, "names": self.names}
        return PerturbationDataset(batch.seeds, batch.ptr, batch.types, batch.y, **kept)

    @without_function_modes
    def split_mask(self, pattern: str) -> Tensor:
        """Whether each sample is in a split whose name is or matches `pattern` ("*_training"), bool [B].

        Raises:
            ValueError: no split of that name.
        """
        codes = [code for code, name in enumerate(self.split_names) if fnmatchcase(name, pattern)]
        if not codes:
            unknown("split", pattern, self.split_names)
        return torch.isin(self._split, torch.tensor(codes))

    @without_function_modes
    def overlaps(self, other: PerturbationDataset) -> Tensor:
        """Whether each sample's set (genes and types, in any order) also stands in `other`, bool [B].

        Raises:
            ValueError: a dataset of other genes, or of the same in another order, as far as numbers and names tell.
        """
        if not isinstance(other, PerturbationDataset):
            raise TypeError(f"other: expected a PerturbationDataset, got {describe(other)}")
        if self.names is not None and other.names is not None:
            require_same_genes(other.names, self.names, what=("other", "dataset"))
        require(self.num_genes == other.num_genes, f"other: expected {self.num_genes} genes, got {other.num_genes}")
        held_out = set(other._keys())
        return torch.tensor([key in held_out for key in self._keys()], dtype=torch.bool)

    def _keys(self) -> Iterator[tuple[tuple[int, int], ...]]:
        entries = list(zip(self.seeds.tolist(), self.types.tolist(), strict=True))
        for begin, end in pairwise(self.ptr.tolist()):
            yield tuple(sorted(entries[begin:end]))

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @overload
    def __getitem__(self, index: int) -> PerturbationSample: ...

    @overload
    def __getitem__(self, index: slice | Tensor | np.ndarray | Sequence[int]) -> PerturbationDataset: ...

    def __getitem__(self, index: Any) -> PerturbationSample | PerturbationDataset:
        """One mutant; or those of a slice, at positions int64 or under a mask bool [B], as `subset` gives them.

        Raises:
            TypeError: an index of another kind.
            IndexError: one past the end.
            ValueError: positions out of range, a mask of another length.
        """
        if isinstance(index, slice):
            return self.subset(list(range(len(self)))[index])
        if (isinstance(index, (Tensor, np.ndarray)) and index.ndim > 0) or isinstance(index, (list, tuple, range)):
            return self.subset(index)
        return _sample(self, index)

    def __iter__(self) -> Iterator[PerturbationSample]:
        return (self[b] for b in range(len(self)))

    @without_function_modes
    def __getitems__(self, indices: Sequence[int] | Tensor) -> PerturbationBatch:
        """A whole batch in one gather; a `DataLoader` calls it in place of `__getitem__`."""
        indices = as_tensor("indices", indices)
        fractions = indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool
        whole = not fractions or indices.numel() == 0  # an empty array is of float64
        require(whole and indices.ndim == 1, f"indices: expected positions of samples, got a {describe(indices)}")
        return self._gather(indices.long())

    @without_function_modes
    def _gather(self, indices: Tensor) -> PerturbationBatch:
        require_indices("indices", indices, len(self), "samples")
        begin = self.ptr[indices]
        size = self.ptr[indices + 1] - begin
        ptr = torch.cat([size.new_zeros(1), size.cumsum(0)])
        entry = torch.arange(int(ptr[-1])) + (begin - ptr[:-1]).repeat_interleave(size)
        return PerturbationBatch(self.seeds[entry], ptr, self.types[entry], self.y[indices])

    @staticmethod
    @without_function_modes
    def collate(samples: PerturbationBatch | Sequence[PerturbationSample]) -> PerturbationBatch:
        """Join samples into a batch; what `__getitems__` gathered passes through.

        Args:
            samples: (seeds int64 [n], types int64 [n], y [] or [P]) triples, own ones or those of a dataset.

        Raises:
            ValueError: no samples, shapes that do not fit, a gene that stands twice in a set.
        """
        if isinstance(samples, PerturbationBatch):
            return samples
        require_several("samples", samples, "a sequence of samples")
        require(len(samples) > 0, "samples: expected at least one sample, got none")
        for position, sample in enumerate(samples):
            triple = isinstance(sample, (tuple, list)) and len(sample) == 3
            require(triple, lambda: f"samples[{position}]: expected (seeds, types, y), got {describe(sample)}")
            seeds, types, y = sample
            require_tensor(f"samples[{position}].seeds", seeds, ndim=1, dtypes=(torch.int64,))
            require_tensor(f"samples[{position}].types", types, ndim=1, dtypes=(torch.int64,))
            require_tensor(f"samples[{position}].y", y)
            require(
                len(types) == len(seeds),
                f"samples[{position}].types: expected {len(seeds)} entries as in seeds, got {len(types)}",
            )
            first = samples[0][2]
            require(
                y.shape == first.shape,
                f"samples[{position}].y: expected shape {list(first.shape)} as in the first, got {list(y.shape)}",
            )
        all_seeds, all_types, all_y = zip(*samples, strict=True)
        sizes = torch.tensor([len(seeds) for seeds in all_seeds])
        seeds = torch.cat(all_seeds)
        _check_no_repeats(seeds, torch.arange(len(samples)).repeat_interleave(sizes), None)
        ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return PerturbationBatch(seeds, ptr, torch.cat(all_types), torch.stack(all_y).float())

    def __repr__(self) -> str:
        splits = ", ".join(f"{name} {int((self._split == code).sum())}" for code, name in enumerate(self.split_names))
        return f"PerturbationDataset({len(self)} samples over {self.num_genes} genes{': ' if splits else ''}{splits})"


def _sample(of: PerturbationBatch | PerturbationDataset, index: Any) -> PerturbationSample:
    try:
        position = operator.index(index)  # numpy integers and tensors of one entry too
    except TypeError:
        position = None
    if position is None or isinstance(index, bool) or getattr(index, "dtype", None) == torch.bool:  # of a mask
        kinds = "an int" if isinstance(of, PerturbationBatch) else "an int, a slice, positions or a mask (subset takes splits)"
        raise TypeError(f"index: expected {kinds}, got {describe(index)}")
    if not -len(of) <= position < len(of):
        raise IndexError(f"index: expected one in [{-len(of)}, {len(of)}), got {position}")
    position %= len(of)
    begin, end = of.ptr[position], of.ptr[position + 1]
    return PerturbationSample(of.seeds[begin:end], of.types[begin:end], of.y[position])


# A `DataLoader` without `collate_fn` looks here for what it was given: samples of a dataset, alone or inside others' samples.
default_collate_fn_map[PerturbationSample] = lambda samples, *, collate_fn_map=None: PerturbationDataset.collate(samples)

# What `torch.save` wrote is read by `torch.load` with weights_only=True.
torch.serialization.add_safe_globals([PerturbationDataset, PerturbationBatch, PerturbationSample])


def as_tensor(name: str, value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The value as a tensor; an empty list is int64 where no dtype is given. A column of a data frame is gone through by its
    order, whatever its index says.
    """
    if isinstance(value, Tensor):
        return value
    if hasattr(type(value), "__array__"):
        array = tensor_of(np.asarray(value))
        if not isinstance(array, Tensor):
            raise TypeError(f"{name}: expected a tensor or numbers, got {describe(value)}")
        return array if dtype is None else array.to(dtype)
    if dtype is None and isinstance(value, Sequence) and len(value) == 0:
        dtype = torch.int64
    try:
        return torch.as_tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a tensor or numbers, got {describe(value)}") from error


def _genes_told(store: Any, node_type: str, num_samples: int) -> list[int | None]:
    """The number of genes by each sample of a `HeteroData`, or of a batch of them; None where it does not tell it."""
    if not store.can_infer_num_nodes:
        return [None] * max(num_samples, 1)
    require(
        "n_id" not in store, f"num_genes: node type {node_type!r} holds subgraphs (n_id), which do not tell it, so give it here"
    )
    if "ptr" in store:
        return [int(size) for size in store.ptr.diff()]
    return [int(store.num_nodes) // max(num_samples, 1)] * max(num_samples, 1)


def _gene_index(gene: Any, genes: GeneList | None, sample: int) -> int:
    """Index of a gene given by index or, with a gene list, by name."""
    if genes is not None and isinstance(gene, str):
        index = genes.get(gene)
        if index is None:
            raise ValueError(f"sets: sample {sample} names gene {shown(gene)}, which is not in the gene list")
        return index
    try:
        if isinstance(gene, (bool, np.bool_)) or (isinstance(gene, Tensor) and gene.dtype == torch.bool):
            raise TypeError  # a mask is no set
        return operator.index(gene)  # numpy integers too
    except TypeError:
        wanted = "an index" if genes is None else "an index or a name"
        raise TypeError(f"sets: sample {sample}: expected {wanted} for each gene, got {describe(gene)}") from None


def _type_ids(types: str | Sequence[Sequence[str]], sizes: list[int]) -> Tensor:
    """Type ids int64 [nnz] of names given for all genes or gene by gene."""
    if isinstance(types, str):
        require_choice("types", types, PERTURBATION_TYPES[1:])
        return torch.full((sum(sizes),), PERTURBATION_TYPES.index(types), dtype=torch.int64)
    if not isinstance(types, Sequence):
        raise TypeError(f"types: expected a name or one sequence of names a set, got {describe(types)}")
    require(len(types) == len(sizes), f"types: expected {len(sizes)} sequences as in sets, got {len(types)}")
    for sample, (names, size) in enumerate(zip(types, sizes, strict=True)):
        require_several("types", names, f"a sequence of names for sample {sample}")
        require(len(names) == size, f"types: sample {sample} has {size} genes, got {len(names)} types")
        for name in names:
            require_choice(f"types: sample {sample}", name, PERTURBATION_TYPES[1:])
    return torch.tensor([PERTURBATION_TYPES.index(name) for names in types for name in names], dtype=torch.int64)


def _check_ptr(ptr: Tensor, nnz: int) -> None:
    require(len(ptr) > 0, "ptr: expected B + 1 entries, got none")
    require(int(ptr[0]) == 0, f"ptr: expected to begin with 0, got {int(ptr[0])}")
    require(int(ptr[-1]) == nnz, f"ptr: expected to end with {nnz}, the number of seeds, got {int(ptr[-1])}")
    if (ptr.diff() < 0).any():
        position = int((ptr.diff() < 0).nonzero()[0])
        raise ValueError(f"ptr: falls from {int(ptr[position])} to {int(ptr[position + 1])} at position {position + 1}")


def _check_no_repeats(seeds: Tensor, sample_of: Tensor, names: GeneList | None) -> None:
    """Refuse a gene twice in a set; `sample_of` ascends."""
    order = seeds.argsort(stable=True)
    order = order[sample_of[order].argsort(stable=True)]
    same = (seeds[order].diff() == 0) & (sample_of[order].diff() == 0)
    if same.any():
        entry = int(order[same.nonzero()[0]])
        gene = int(seeds[entry])
        called = "" if names is None else f", {shown(names[gene])},"
        raise ValueError(f"seeds: sample {int(sample_of[entry])} holds gene {gene}{called} twice")
