"""The README's code runs as it stands there."""

from __future__ import annotations

import re
import sys

import pytest

from .conftest import ROOT

EXTRAS = ("torch_geometric", "lightning", "matplotlib", "scipy", "networkx", "cobra", "ray")


def test_python_blocks_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXTRAS:  # a bare installation has none of them
        monkeypatch.setitem(sys.modules, name, None)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert "prediction" in namespace
