"""`python -m tests.kernels.record [FAMILY ...]` rewrites the running Triton's rows of kernels/resources.csv, and no others.

The rows come from the CASES of every tests/kernels/test_FAMILY_compile.py, or of the families named: then the rows of their
kernels alone are made anew. `make record` does all of it under every version on record.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import triton

from .aot import RECORD, Case, Key, Row, compile_case, read_record, write_record

FAMILIES = sorted(
    path.stem.removeprefix("test_").removesuffix("_compile") for path in Path(__file__).parent.glob("test_*_compile.py")
)


def all_cases(families: list[str] = FAMILIES) -> list[Case]:
    modules = [importlib.import_module(f"tests.kernels.test_{family}_compile") for family in families]
    return [case for module in modules for case in module.CASES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], metavar="FAMILY", help=", ".join(FAMILIES))
    families = parser.parse_args().families
    rows: dict[Key, Row] = {}
    for case in all_cases(families or FAMILIES):
        rows |= {row.key: row for row in compile_case(case)}
        print(case, flush=True)
    record = read_record()
    if families:
        made = {row.kernel for row in rows.values()}
        rows |= {key: row for key, row in record.get(triton.__version__, {}).items() if row.kernel not in made}
    write_record(record | {triton.__version__: rows})
    spilled = sum(row.local > 0 for row in rows.values())
    print(f"{len(rows)} kernels of Triton {triton.__version__} in {RECORD}, {spilled} with local memory")


if __name__ == "__main__":
    main()
