"""The methods as they are written without this library, on the parameters of our models, under one interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from cellattn import MultiGraph
from cellattn.data import PerturbationBatch
from cellattn.nn import CellOutput, Dango, PairwiseInteraction, WildtypeDifference

from .sets import Predict, dango_peer, pairwise_peer
from .transformer import DenseCellTransformer


class Peer(Protocol):
    """A method on the parameters of one of our models, and on one graph."""

    copies_graph: bool  # whether every sample of a batch holds (a part of) the graph

    def collate(self, batch: PerturbationBatch) -> Any:
        """What the loader makes of a batch."""
        ...

    def forward(self, data: Any) -> CellOutput:
        """What our model returns for the batch, within rounding."""
        ...


class _OfBatches:
    """A peer that takes batches as ours does."""

    copies_graph = False

    def __init__(self, predict: Predict) -> None:
        self.forward = predict

    def collate(self, batch: PerturbationBatch) -> PerturbationBatch:
        return batch


class _PyGDifference:
    """`wildtype.PyG`: `HeteroData` a sample, one `Batch`."""

    copies_graph = True

    def __init__(self, model: WildtypeDifference, graph: MultiGraph) -> None:
        from .wildtype import PyG  # needs torch_geometric

        self._peer = PyG(model, graph)

    def collate(self, batch: PerturbationBatch) -> tuple[Any, PerturbationBatch]:
        return self._peer.load(batch), batch

    def forward(self, data: tuple[Any, PerturbationBatch]) -> CellOutput:
        prediction = self._peer(*data)
        return CellOutput(prediction, {}, prediction.new_zeros(()))


def _dango(model: Dango, graph: MultiGraph) -> Peer:
    return _OfBatches(dango_peer(model, graph))


def _pairwise(model: PairwiseInteraction, graph: MultiGraph) -> Peer:
    return _OfBatches(pairwise_peer(model, graph))


# "delta" is exact, so that its peers are those of "lazy"
PEERS: dict[str, dict[str, Callable[[Any, MultiGraph], Peer]]] = {
    "dango": {"PyG and dense reconstructions": _dango},
    "lazy": {"PyG": _PyGDifference},
    "khop-1": {"PyG": _PyGDifference},
    "khop-2": {"PyG": _PyGDifference},
    "khop-3": {"PyG": _PyGDifference},
    "pairwise": {"loop over sets": _pairwise},
    "cell-transformer": {"dense PyTorch": DenseCellTransformer},
}
