from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["native", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths of the CPU code: the processor's own, and the one that every processor runs."""
    if request.param == "portable":
        monkeypatch.setenv("CELLATTN_ISA", "portable")
    else:
        monkeypatch.delenv("CELLATTN_ISA", raising=False)
    return request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For limits on memory: kernels take buffers for every thread, and machines have up to hundreds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
