"""`python -m tests.kernels.record` rewrites the running Triton's rows of kernels/resources.csv, and no others.

The rows come from the CASES of every tests/kernels/test_*_compile.py. `make record` does it under every version on record.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import triton

from .aot import RECORD, Case, Key, Row, compile_case, read_record, write_record


def all_cases() -> list[Case]:
    modules = sorted(path.stem for path in Path(__file__).parent.glob("test_*_compile.py"))
    return [case for module in modules for case in importlib.import_module(f"tests.kernels.{module}").CASES]


def main() -> None:
    rows: dict[Key, Row] = {}
    for case in all_cases():
        rows |= {row.key: row for row in compile_case(case)}
        print(case, flush=True)
    write_record(read_record() | {triton.__version__: rows})
    spilled = sum(row.local > 0 for row in rows.values())
    print(f"{len(rows)} kernels of Triton {triton.__version__} in {RECORD}, {spilled} with local memory")


if __name__ == "__main__":
    main()
