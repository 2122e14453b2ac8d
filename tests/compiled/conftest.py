"""`make test` executes every kernel at some of its sizes and tiles, `make test-compiled` at all of them.

Of what is left out, every commit takes one part in PARTS as well, another one than its neighbours: a case belongs to the part
that the CRC of its name says, and a commit takes the part that its hash says. So a commit runs the same cases wherever it is
tested, and a checkout without git none of them.
"""

from __future__ import annotations

import os
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PARTS = 50


def part_of_commit() -> int | None:
    """Of the cases that are left out; None outside of a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return int(done.stdout, 16) % PARTS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Rows of the tables are left out, but for the commit's, those asked for by name, or all with CELLATTN_COMPILED=all."""
    if os.environ.get("CELLATTN_COMPILED") == "all" or any("::" in argument for argument in config.args):
        return
    part = part_of_commit()
    dropped = {
        item
        for item in items
        if item.get_closest_marker("tile") is not None and zlib.crc32(item.nodeid.encode()) % PARTS != part
    }
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        report.sections.append(("to repeat", f"python -m pytest '{item.nodeid}'"))  # type: ignore[attr-defined]
    return report
