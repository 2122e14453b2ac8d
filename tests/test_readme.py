"""The README's code runs as it stands there."""

from __future__ import annotations

import re

from .conftest import ROOT


def test_python_blocks_run_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert "prediction" in namespace
