"""`python -m tests.kernels.record` rewrites kernels/resources.csv from the CASES of every tests/kernels/test_*_compile.py."""

from __future__ import annotations

import csv
import dataclasses
import importlib
from pathlib import Path

from .aot import RECORD, Row, compile_case


def main() -> None:
    rows: dict[tuple[object, ...], Row] = {}
    for path in sorted(Path(__file__).parent.glob("test_*_compile.py")):
        for case in importlib.import_module(f"tests.kernels.{path.stem}").CASES:
            rows |= {row.key: row for row in compile_case(case)}
            print(case, flush=True)
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Row))
        writer.writerows(dataclasses.astuple(rows[key]) for key in sorted(rows, key=str))
    print(f"{len(rows)} kernels in {RECORD}")


if __name__ == "__main__":
    main()
