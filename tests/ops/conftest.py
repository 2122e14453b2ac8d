from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ..conftest import exhaustive


@pytest.fixture(params=["native", "portable", *exhaustive("avx2")])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path of the CPU code: the processor's own, the one that every processor runs, and that of one without AVX-512."""
    if request.param == "native":
        monkeypatch.delenv("CELLATTN_ISA", raising=False)
    else:
        monkeypatch.setenv("CELLATTN_ISA", request.param)
    return request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For limits on memory: kernels take buffers for every thread, and machines have up to hundreds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
