"""The documentation's guides and code blocks run, its reference names what is public, and its site builds without a warning."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cellattn import ops

from ..conftest import ROOT

DOCS = ROOT / "docs"
WITH_ARGUMENTS = {"lightning_module", "plain"}  # started as a reader starts them, in test_guides.py
GUIDES = sorted(path for path in (DOCS / "guides").glob("*.py") if path.stem not in WITH_ARGUMENTS)
PAGES = sorted(path for path in DOCS.rglob("*.md") if "```python\n" in path.read_text())


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_guides_run(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    runpy.run_path(str(path), run_name="__main__")
    torch.set_rng_state(state)


def test_every_guide_has_a_page() -> None:
    for path in (DOCS / "guides").glob("*.py"):
        assert f'--8<-- "docs/guides/{path.name}"' in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_code_blocks_run(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S) if "--8<--" not in block]
    if path.name == "screens.md":  # its block goes on from what the guide makes
        made = runpy.run_path(str(DOCS / "guides" / "screening.py"))
        for number, file in enumerate(made["files"]):
            Path(f"run{number}").mkdir()
            shutil.copy(file, f"run{number}/checkpoint.safetensors")
            shutil.copy(made["folder"] / "graph.safetensors", f"run{number}")
        blocks.insert(0, f"roster = {made['names'][:12]}")
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)


TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FILES = re.compile(r"`((?:benchmarks|cellattn|csrc|docs|kernels|tests)/[\w./-]+)`")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_that_are_named_are_there(path: Path) -> None:
    named = set(FILES.findall(path.read_text())) - {"cellattn/ops/x.py", "tests/ops/test_x.py"}  # of any op x
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_op_has_a_row_with_its_kernels() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.search(r"\| op \| kernels on a GPU \|.*\n\|[-|]+\n((?:\|.*\n)+)", text)
    assert rows is not None
    named = [name for row in rows[1].splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(ops.__all__)


def test_reference_names_what_is_public() -> None:
    """Run docs/reference/make.py where this fails."""
    pages = runpy.run_path(str(DOCS / "reference" / "make.py"))["pages"]()
    assert {path.name: path.read_text() for path in (DOCS / "reference").glob("*.md")} == pages


def test_site_builds(tmp_path: Path) -> None:
    """Warnings are errors: a link to nowhere, a page that no menu has, a name that is not there."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    assert (site / "reference" / "ops.html").read_text().count("attention_kl") > 1
    assert '<img alt="Samples a second' in (site / "measured.html").read_text()
    for page in site.rglob("*.html"):  # it reads from disk: all that a page loads is there
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]* (?:src|href)="([^"]+)"', page.read_text())
        assert loaded
        absent = [name for name in loaded if "404" not in page.name and not (page.parent / name).is_file()]
        assert not absent, f"{page.name} loads {', '.join(absent)}, which the site does not have"
