"""`make test` executes every kernel at some of its sizes and tiles, `make test-all` and CI at all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        report.sections.append(("to repeat", f"python -m pytest '{item.nodeid}'"))  # type: ignore[attr-defined]
    return report
