"""What data say of a predicted set: how many measured sets share some of its genes, and how far measured values reach."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor

from .._check import count_of, describe, require, require_indices, require_sets, require_tensor
from .._modes import without_function_modes
from ..data.dataset import PerturbationDataset
from .enumerations import digest
from .ranks import MAX_ORDER, order_of


class MeasuredSets:
    """Measured sets of genes, ready to be counted; what was done to their genes says nothing.

    The measured sets that share exactly j genes with a set S follow from those that hold all of a subset of S. Let n_i be the
    number of measured sets that hold a subset T, summed over the T of i genes: one that shares j genes is counted C(j, i) times
    in it. So those that share exactly j are the sum over i >= j of (-1)^(i - j) C(i, j) n_i.

    Args:
        seeds: int64 [nnz], genes of all measured sets, one set after the other, none twice in a set.
        ptr: int64 [M + 1], where each set begins.
        num_genes: genes are 0 to num_genes - 1.
        y: float [M] or [M, P], measured values, if `outside` is to be asked for.

    Raises:
        TypeError, ValueError: shapes or indices that do not fit.
    """

    @without_function_modes
    def __init__(self, seeds: Tensor, ptr: Tensor, *, num_genes: int, y: Tensor | None = None) -> None:
        num_genes = count_of("num_genes", num_genes, minimum=1)
        require_sets("seeds", seeds, ptr, num_genes)
        require(num_genes**MAX_ORDER <= 2**63, f"num_genes: expected at most {int(2 ** (63 / MAX_ORDER))}, got {num_genes}")
        self.num_genes = num_genes
        seeds, ptr = seeds.cpu(), ptr.cpu()
        sizes = ptr.diff()
        self._num_sets = len(sizes)
        self.range: Tensor | None = None
        if y is not None:
            require_tensor("y", y)
            require(
                len(y) == len(sizes) > 0, f"y: expected a value for each of {len(sizes)} sets, at least one, got {describe(y)}"
            )
            values = y.reshape(len(y), -1).double()
            self.range = torch.stack([values.amin(0), values.amax(0)])  # [2, P]
        self._whole: dict[int, Tensor] = {}  # size -> codes of the sets of that size, ascending
        parts: dict[int, list[Tensor]] = {order: [] for order in range(1, MAX_ORDER + 1)}
        for size in sizes.unique().tolist():
            if size == 0:
                continue
            members = seeds[ptr[:-1][sizes == size][:, None] + torch.arange(size)].sort(1).values
            require(size == 1 or bool((members.diff(dim=1) > 0).all()), "seeds: a set holds a gene twice")
            if size <= MAX_ORDER:
                self._whole[size] = self._code(list(members.unbind(1))).unique()
            for order in range(1, min(size, MAX_ORDER) + 1):
                require(
                    comb(size, order) <= 1 << 14, f"ptr: sets of {size} genes have too many subsets of {order} to be counted"
                )
                parts[order] += [self._code([members[:, i] for i in chosen]) for chosen in combinations(range(size), order)]
        self._subsets: dict[int, tuple[Tensor, Tensor]] = {}  # order -> codes, ascending, and how many sets hold each
        for order, codes in parts.items():
            code = torch.cat(codes) if codes else torch.empty(0, dtype=torch.int64)
            self._subsets[order] = code.unique(return_counts=True)

    @classmethod
    def of(cls, dataset: PerturbationDataset, *, phenotypes: bool = True) -> MeasuredSets:
        """Those of a dataset, with its phenotypes for `outside`."""
        if not isinstance(dataset, PerturbationDataset):
            raise TypeError(f"dataset: expected a PerturbationDataset, got {describe(dataset)}")
        y = dataset.y if phenotypes and len(dataset) > 0 else None
        return cls(dataset.seeds, dataset.ptr, num_genes=dataset.num_genes, y=y)

    def __len__(self) -> int:
        return self._num_sets

    @without_function_modes
    def holds(self, genes: Tensor) -> Tensor:
        """Whether these very sets were measured: int64 [B, k], in any order within a set, to bool [B]."""
        columns = _ascending(self._columns(genes))
        codes = self._whole.get(len(columns), torch.empty(0, dtype=torch.int64)).to(genes.device)
        return _counts(codes, None, self._code(columns)) > 0

    @without_function_modes
    def support(self, genes: Tensor) -> Tensor:
        """How many measured sets share exactly 1, 2, ..., k genes with each set.

        Args:
            genes: int64 [B, k], k of 1 to 4, in any order within a set.

        Returns:
            int64 [B, k]: column j - 1 counts those that share j. Repeated measurements of a set count each.

        Raises:
            ValueError: a shape or index that does not fit.
        """
        columns = _ascending(self._columns(genes))
        k = len(columns)
        held = []  # n_1 to n_k
        for order in range(1, k + 1):
            codes, counts = (x.to(genes.device) for x in self._subsets[order])
            found = [_counts(codes, counts, self._code(list(chosen))) for chosen in combinations(columns, order)]
            held.append(torch.stack(found).sum(0))
        exactly = [
            sum(((-1) ** (i - j) * comb(i, j)) * held[i - 1] for i in range(j, k + 1)) + torch.zeros_like(held[0])
            for j in range(1, k + 1)
        ]
        return torch.stack(exactly, 1)

    @without_function_modes
    def outside(self, prediction: Tensor, *, phenotype: int = 0) -> Tensor:
        """Whether predictions are below all measured values or above: float [B] to bool [B], in the phenotype's units.

        Raises:
            ValueError: no values were given, or there is no such phenotype.
        """
        require_tensor("prediction", prediction, ndim=1)
        phenotype = count_of("phenotype", phenotype)
        require(self.range is not None, "y: no measured values were given, so their range is not known")
        assert self.range is not None
        require(phenotype < self.range.shape[1], f"phenotype: expected less than {self.range.shape[1]}, got {phenotype}")
        low, high = self.range[:, phenotype].tolist()
        return (prediction < low) | (prediction > high)

    def digest(self) -> str:
        """SHA-256, in hex, of which sets were measured, of 1 to 4 genes."""
        sizes = sorted(self._whole)
        return digest(torch.tensor([self.num_genes, *sizes], device="cpu"), *(self._whole[size] for size in sizes))

    def describe(self) -> dict[str, Any]:
        """Plain values that say what was measured."""
        return {"sets": len(self), "digest": self.digest()}

    def _columns(self, genes: Tensor) -> list[Tensor]:
        require_tensor("genes", genes, ndim=2, dtypes=(torch.int64,))
        order_of("genes: last dimension", genes.shape[1])
        require_indices("genes", genes, self.num_genes)
        return list(genes.unbind(1))

    def _code(self, columns: list[Tensor]) -> Tensor:
        """One number a set, of its genes ascending."""
        code = columns[-1]
        for column in columns[-2::-1]:
            code = code * self.num_genes + column
        return code


@without_function_modes
def support(genes: Tensor, measured: PerturbationDataset | MeasuredSets) -> Tensor:
    """How many measured sets share exactly 1, 2, ..., k genes with each set; see `MeasuredSets.support`.

    Args:
        genes: int64 [B, k], k of 1 to 4.
        measured: a dataset, or its sets made ready once for many calls.

    Returns:
        int64 [B, k].

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    ready = measured if isinstance(measured, MeasuredSets) else MeasuredSets.of(measured)
    return ready.support(genes)


def _ascending(columns: list[Tensor]) -> list[Tensor]:
    """The columns, sorted within each row: a network, as they are few."""
    columns = list(columns)
    for last in range(len(columns) - 1, 0, -1):
        for i in range(last):
            a, b = columns[i], columns[i + 1]
            columns[i], columns[i + 1] = torch.minimum(a, b), torch.maximum(a, b)
    return columns


def _counts(codes: Tensor, counts: Tensor | None, wanted: Tensor) -> Tensor:
    """How often each wanted code occurs among `codes`, which ascend, none twice; 1 where there are no counts."""
    if len(codes) == 0:
        return torch.zeros_like(wanted)
    at = torch.searchsorted(codes, wanted).clamp(max=len(codes) - 1)
    return torch.where(codes[at] == wanted, 1 if counts is None else counts[at], 0)
