"""kernels/resources.csv is complete, up to date in what it lists, and within the limits, for every version of Triton in it.

`make test` compiles with one version. This is what it can say about the others.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import triton

from . import aot
from .aot import RECORD, SHARED_LIMIT, Key, compile_case, launches_of, read_record, write_record
from .record import all_cases, merged

VERSIONS = sorted(read_record())


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_the_installed_version_is_on_record(constraints: str) -> None:
    """Otherwise the compile tests of `make test` or `make test-oldest` would hold the limits alone."""
    pins = re.findall(r"^triton==(\S+)$", RECORD.parents[1].joinpath(constraints).read_text(), re.MULTILINE)
    assert len(pins) == 1
    assert pins[0] in VERSIONS, f"{constraints} pins Triton {pins[0]}, which is not recorded; run make record TRITONS={pins[0]}"


def test_registers_are_compared_where_the_version_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    case = all_cases()[0]
    altered = {row.key: dataclasses.replace(row, registers=row.registers + 1) for row in compile_case(case)}
    monkeypatch.setattr(aot, "read_record", lambda: {"another version": altered})
    aot.check_case(case)
    monkeypatch.setattr(aot, "read_record", lambda: {triton.__version__: altered})
    with pytest.raises(AssertionError, match=r"run python -m tests\.kernels\.record"):
        aot.check_case(case)
    if triton.__version__ not in VERSIONS:
        pytest.skip(f"Triton {triton.__version__} is not on record: kernels are held to the limits alone")


@pytest.fixture(scope="module")
def launched() -> set[Key]:
    return {key for case in all_cases() for key in launches_of(case)}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_launched_is_recorded(version: str, launched: set[Key]) -> None:
    """A new configuration, or one that is gone, is recorded again under every version, not under one's own alone."""
    rows = set(read_record()[version])
    assert launched == rows, f"{len(launched - rows)} kernels missing, {len(rows - launched)} stale; run make record"


@pytest.mark.parametrize("version", VERSIONS)
def test_limits(version: str) -> None:
    """Shared memory on each chip, and no local memory where none is promised: 16-bit types up to D = 128."""
    rows = read_record()[version].values()
    assert [row for row in rows if row.shared > SHARED_LIMIT[row.arch]] == []
    assert [row for row in rows if row.local > 0 and row.dtype != "fp32" and row.dim <= 128] == []


def test_recording_one_version_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_record()
    monkeypatch.setattr(aot, "RECORD", tmp_path / "resources.csv")
    reread = read_record.__wrapped__  # not from the cache
    write_record(before | {VERSIONS[0]: {}})
    assert reread() == {version: before[version] for version in VERSIONS[1:]}
    write_record(before)
    assert reread() == before
    assert aot.RECORD.read_bytes() == RECORD.read_bytes()


def test_recording_one_family_keeps_what_others_launch() -> None:
    """Two kernels; of "shared" one configuration is launched by this family, one by another alone, and one by none any more."""
    row = next(iter(read_record()[VERSIONS[0]].values()))
    recorded = {
        new.key: new
        for new in (
            *(dataclasses.replace(row, kernel="shared", config=config) for config in ("mine", "theirs", "gone")),
            dataclasses.replace(row, kernel="another"),
        )
    }
    anew = dataclasses.replace(row, kernel="shared", config="mine", registers=row.registers + 1)
    theirs = {key for key in recorded if "theirs" in key}
    kept = merged(recorded, {anew.key: anew}, theirs)
    assert kept == {key: value for key, value in recorded.items() if "gone" not in key} | {anew.key: anew}
