from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # read when torch is imported, which nothing has done yet
    # Workers share the cores. Two threads at least: on one, loops that several share would prove nothing. They wait asleep.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, (os.cpu_count() or 1) // int(workers))))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist the tests of a file share a worker, for its fixtures, where nothing else groups them."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def yeast_dir() -> Path:
    """The folder of real yeast tables: CELLATTN_DATA, or `../shared/data/yeast` beside the repository."""
    folder = Path(os.environ.get("CELLATTN_DATA", ROOT.parent / "shared" / "data" / "yeast"))
    if not (folder / "genes.tsv.gz").is_file():
        pytest.skip(f"no yeast tables in {folder} (set CELLATTN_DATA)")
    return folder
