"""A graph on a GPU: everything that it keeps goes with it."""

from __future__ import annotations

import pytest
import torch

from ..graph.samples import weighted

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


def test_to_another_device_and_back() -> None:
    graph = weighted()
    graph.stacked_by_column()
    moved = graph.to("cuda")
    kept = (*moved.stacked_by_column(), moved.segments[1].ptr)
    assert {x.device.type for x in kept} == {moved.device.type} == {"cuda"}
    assert moved.to("cpu") == graph
