"""Samples that PyG collates with the numbering of this library's own batches. Imported only where PyG is used.

In collation PyG counts up what has "index" in its name, and leaves "indices" as they are: unless the sample's class says
otherwise. So a batch that is taken apart and collated again, whole or in part, is what it was.
"""

from __future__ import annotations

from typing import Any

from torch_geometric.data import HeteroData


class MutantData(HeteroData):
    """A mutant whose `phenotype_sample_indices` say which sample of a batch they belong to; its genes keep their numbers."""

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        return 1 if key == "phenotype_sample_indices" else super().__inc__(key, value, *args, **kwargs)


class NumberedMutantData(MutantData):
    """A mutant whose `perturbation_indices` are numbered through in a batch, as its nodes are."""

    def __inc__(self, key: str, value: Any, store: Any = None, *args: Any, **kwargs: Any) -> Any:
        return store.num_nodes if key == "perturbation_indices" else super().__inc__(key, value, store, *args, **kwargs)
