"""Registers and local memory of the extension's CUDA kernels, read off the compiled file.

`python -m tests.cuda.resources` rewrites csrc/resources.csv with what this machine's nvcc made; its diff shows what a change of
a kernel did.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton

RECORD = Path(__file__).parents[2] / "csrc" / "resources.csv"
CHIPS = (80, 86, 89, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Row(NamedTuple):
    """A kernel of one chip; `local` counts bytes a thread keeps outside its registers."""

    kernel: str
    arch: int
    registers: int
    local: int


def compiled(extension: Path) -> list[Row]:
    """All kernels in the extension, those of CUB by their names alone; empty for a build without CUDA."""
    done = subprocess.run([CUOBJDUMP, "-res-usage", extension], capture_output=True, text=True, check=False)
    report = subprocess.run(
        ["c++filt"], input=re.sub(r"(_Z\w+):", r"\1", done.stdout), capture_output=True, text=True, check=True
    )
    rows, arch = [], 0
    function = r"Function (.*)\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    for found in re.finditer(rf"arch = sm_(\d+)|{function}", report.stdout):
        chip, name, registers, stack, local = found.groups()
        if chip is not None:
            arch = int(chip)
            continue
        ours = re.search(r"(\w+_kernel(?:<[^>]*>)?)\(", name)
        rows.append(Row(ours[1] if ours else name, arch, int(registers), int(stack) + int(local)))
    return sorted(set(rows))


def ours(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "::" not in row.kernel]


def compiler() -> str:
    """The version of nvcc, as 13.0: others allocate other registers."""
    nvcc = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin" / "nvcc"
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", report)
    return found[1] if found else "unknown"


def recorded() -> tuple[str, list[Row]]:
    """(the version of nvcc, rows)"""
    with RECORD.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows[0]["nvcc"], [Row(row["kernel"], *(int(row[name]) for name in Row._fields[1:])) for row in rows]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import cellattn._C

    extension = Path(cellattn._C.__file__)
    rows = ours(compiled(extension))
    if not rows:
        raise SystemExit(f"{extension} has no CUDA kernels: build it where nvcc is; {RECORD} stays as it is")
    version = compiler()
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([(*Row._fields, "nvcc"), *((*row, version) for row in rows)])
    print(f"{len(rows)} kernels in {RECORD}")


if __name__ == "__main__":
    main()
