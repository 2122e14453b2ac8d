from __future__ import annotations

import pytest


@pytest.fixture(params=["native", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths of the CPU code: the processor's own, and the one that every processor runs."""
    if request.param == "portable":
        monkeypatch.setenv("CELLATTN_ISA", "portable")
    else:
        monkeypatch.delenv("CELLATTN_ISA", raising=False)
    return request.param
