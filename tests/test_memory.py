"""How much memory is left, from files as Linux writes them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cellattn._memory import available_memory, host_memory

MIB = 2**20
UNLIMITED_V1 = 2**63 - 4096

Version = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """1,000 MiB available, no control groups."""
    write(tmp_path, "proc/meminfo", f"MemTotal:  {2000 * 1024} kB\nMemAvailable:  {1000 * 1024} kB\n")
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def v1(root: Path, group: str, *, limit: int, used: int, cache: int) -> None:
    write(root, "proc/self/cgroup", f"5:cpu,cpuacct:/elsewhere\n4:memory:/{group}\n")
    folder = f"sys/fs/cgroup/memory/{group}"
    write(root, f"{folder}/memory.limit_in_bytes", f"{limit}\n")
    write(root, f"{folder}/memory.usage_in_bytes", f"{used}\n")
    write(root, f"{folder}/memory.stat", f"cache 9\ninactive_file 1\ntotal_inactive_file {cache}\n")


def v2(root: Path, group: str, *, limit: int | str, used: int, cache: int, mount: str = "sys/fs/cgroup") -> None:
    write(root, "proc/self/cgroup", f"0::/{group}\n")
    write(root, f"{mount}/{group}/memory.max", f"{limit}\n")
    write(root, f"{mount}/{group}/memory.current", f"{used}\n")
    write(root, f"{mount}/{group}/memory.stat", f"anon 5\ninactive_file {cache}\n")


@pytest.mark.parametrize("version", [v1, v2])
def test_the_lower_of_machine_and_group(machine: Path, version: Version) -> None:
    version(machine, "a/b", limit=500 * MIB, used=300 * MIB, cache=50 * MIB)
    assert host_memory(machine) == 250 * MIB
    version(machine, "a/b", limit=5000 * MIB, used=300 * MIB, cache=50 * MIB)
    assert host_memory(machine) == 1000 * MIB


@pytest.mark.parametrize(("version", "limit"), [(v1, UNLIMITED_V1), (v2, "max")], ids=["v1", "v2"])
def test_a_group_without_a_limit(machine: Path, version: Version, limit: int | str) -> None:
    version(machine, "a", limit=limit, used=300 * MIB, cache=0)
    assert host_memory(machine) == 1000 * MIB


@pytest.mark.parametrize("version", [v1, v2])
def test_the_limit_of_a_group_around_it(machine: Path, version: Version) -> None:
    version(machine, "a", limit=400 * MIB, used=350 * MIB, cache=0)
    version(machine, "a/b", limit=500 * MIB, used=300 * MIB, cache=0)
    assert host_memory(machine) == 50 * MIB


@pytest.mark.parametrize("version", [v1, v2])
def test_a_container_that_sees_its_own_group_as_the_top(machine: Path, version: Version) -> None:
    version(machine, "", limit=500 * MIB, used=300 * MIB, cache=0)
    write(machine, "proc/self/cgroup", "0::/docker/0123\n" if version is v2 else "4:memory:/docker/0123\n")
    assert host_memory(machine) == 200 * MIB


def test_both_versions_side_by_side(machine: Path) -> None:
    v2(machine, "new", limit=200 * MIB, used=0, cache=0, mount="sys/fs/cgroup/unified")
    v1(machine, "old", limit=300 * MIB, used=0, cache=0)
    assert host_memory(machine) == 300 * MIB
    write(machine, "proc/self/cgroup", "4:memory:/old\n0::/new\n")
    assert host_memory(machine) == 200 * MIB


def test_a_group_past_its_limit_has_nothing_left(machine: Path) -> None:
    v2(machine, "a", limit=100 * MIB, used=101 * MIB, cache=0)
    assert host_memory(machine) == 0


def test_nothing_is_told(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_what_this_machine_says_is_plausible() -> None:
    available = available_memory(torch.device("cpu"))
    assert available is not None
    assert 2**20 < available < 2**50
