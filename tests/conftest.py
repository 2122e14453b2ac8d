from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def yeast_dir() -> Path:
    """The folder of real yeast tables: CELLATTN_DATA, or `../shared/data/yeast` beside the repository."""
    folder = Path(os.environ.get("CELLATTN_DATA", ROOT.parent / "shared" / "data" / "yeast"))
    if not (folder / "genes.tsv.gz").is_file():
        pytest.skip(f"no yeast tables in {folder} (set CELLATTN_DATA)")
    return folder
