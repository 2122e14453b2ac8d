"""How much memory can still be allocated."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Of the hierarchy that controls memory: its controllers in /proc/self/cgroup, where it is mounted, and its files' names for the
# limit, for what is used, and for the part of that which is given up first.
_VERSIONS = (
    ("", ("", "unified"), "memory.max", "memory.current", "inactive_file"),
    ("memory", ("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_memory() if sys.platform.startswith("linux") else None


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that Linux says are available: to the machine, or what a control group (v1 or v2) leaves of them."""
    machine = _entry(root / "proc/meminfo", "MemAvailable:")
    found = [*_left_by_groups(root), *([] if machine is None else [1024 * machine])]
    return min(found, default=None)


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each control group around the process leaves it. In a container, those above its own are not to be seen."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller, mounts, limit, usage, cache in _VERSIONS:
            if controller not in controllers.split(","):
                continue
            for mount in mounts:
                top = root / "sys/fs/cgroup" / mount
                mine = top / path.lstrip("/")
                for group in (mine, *(parent for parent in mine.parents if parent.is_relative_to(top))):
                    most, used = _read(group / limit).strip(), _read(group / usage).strip()
                    if most.isdigit() and used.isdigit():  # "max" is no limit
                        yield max(0, int(most) - int(used) + (_entry(group / "memory.stat", cache) or 0))


def _entry(path: Path, key: str) -> int | None:
    """The number behind a key, in a file of such lines."""
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value.split()[0])
    return None


def _read(path: Path) -> str:
    """The text of a file, empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
