"""The README's code runs as it stands there, and what is said of the package is of one version."""

from __future__ import annotations

import re
import sys

import pytest

import cellattn

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


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {cellattn.__version__}\n" in citation
    for field, listed in (("license", 'license = "{}"'), ("  - name", 'authors = [{{ name = "{}" }}]')):
        (value,) = re.findall(rf"^{field}: (.+)$", citation, flags=re.M)
        assert listed.format(value) in project
