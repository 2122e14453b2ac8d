"""The methods as they are written without this library, on the parameters of our models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from cellattn import MultiGraph
from cellattn.data import PerturbationBatch
from cellattn.nn import CellOutput

from .transformer_peers import DenseCellTransformer


class Peer(Protocol):
    """A method on the parameters of one of our models, and on one graph."""

    copies_graph: bool  # whether every sample of a batch holds (a part of) the graph

    def collate(self, batch: PerturbationBatch) -> Any:
        """What the loader makes of a batch."""
        ...

    def forward(self, data: Any) -> CellOutput:
        """What our model returns for the batch, within rounding."""
        ...


PEERS: dict[str, dict[str, Callable[[Any, MultiGraph], Peer]]] = {
    "cell-transformer": {"dense PyTorch": DenseCellTransformer},
}
