"""The record of registers stays as it is where there is nothing to record."""

from __future__ import annotations

import sys

import pytest

from . import resources


def test_an_extension_without_cuda_leaves_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resources.RECORD.read_bytes()
    monkeypatch.setattr(sys, "argv", ["resources"])
    monkeypatch.setattr(resources, "compiled", lambda extension: [])
    with pytest.raises(SystemExit, match="has no CUDA kernels"):
        resources.main()
    assert resources.RECORD.read_bytes() == before


def test_the_record_has_every_kernel_of_every_chip() -> None:
    _, rows = resources.recorded()
    kernels = [{row.kernel for row in rows if row.arch == chip} for chip in resources.CHIPS]
    assert kernels[0]
    assert all(names == kernels[0] for names in kernels)
