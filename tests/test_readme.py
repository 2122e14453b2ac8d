"""The README's code runs as it stands there."""

from __future__ import annotations

import re

from .conftest import ROOT


def test_python_blocks_run_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    runnable = [block for block in blocks if "read_string_links" not in block]  # that one needs a file of the user's
    assert len(runnable) >= 3
    namespace: dict[str, object] = {}
    for block in runnable:
        exec(block, namespace)
    assert "prediction" in namespace
