"""`make test` executes every kernel at some of its sizes and tiles, `make test-compiled` at all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tile(number): one row of the tile tables, for make test-compiled")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Rows of the tables are left out, but for those that are asked for by name, or all with CELLATTN_COMPILED=all."""
    if os.environ.get("CELLATTN_COMPILED") == "all" or any("::" in argument for argument in config.args):
        return
    dropped = [item for item in items if item.get_closest_marker("tile") is not None]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        report.sections.append(("to repeat", f"python -m pytest '{item.nodeid}'"))  # type: ignore[attr-defined]
    return report
