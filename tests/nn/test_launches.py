"""Launches of a training step on a GPU, by count; and that a step whose sizes are given waits for none of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from cellattn.nn import Dango, HyperSAGNN

from ..compare import random_graph
from ..ops.test_cuda_fake import graph_on
from .launches import launches_of, served_on_meta

NETWORKS = ("neighborhood", "fusion", "cooccurence", "coexpression", "experimental", "database")


@pytest.fixture(autouse=True)
def _served() -> Iterator[None]:
    with served_on_meta():
        yield


def test_dango() -> None:
    """Six networks, sets of at most three: 1,101 when each network went through its layers and its loss alone."""
    graph = graph_on("meta", random_graph(20, dict.fromkeys(NETWORKS, 60)))
    model = Dango(16, relations=NETWORKS, num_genes=20, max_size=3).to("meta")
    seeds, ptr = torch.empty(12, dtype=torch.int64, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")

    def step() -> None:
        out = model(graph, seeds, ptr, seeds)
        (out.prediction.sum() + out.regularization).backward()

    count = launches_of(step)
    assert count.total() <= 489, count.most_common()


def test_hypersagnn() -> None:
    model: nn.Module = HyperSAGNN(16, max_size=3).to("meta")
    x = torch.empty(12, 16, device="meta", requires_grad=True)
    ptr = torch.empty(6, dtype=torch.int64, device="meta")
    count = launches_of(lambda: model(x, ptr).sum().backward())
    assert count.total() <= 206, count.most_common()
