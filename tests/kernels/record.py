"""`python -m tests.kernels.record [FAMILY ...]` rewrites the running Triton's rows of kernels/resources.csv, and no others.

The rows come from the CASES of every tests/kernels/test_FAMILY_compile.py, or of the families named. Then the rows of their
kernels are made anew, but for those that another family alone launches. `make record` does all of it under every version on
record.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import triton

from .aot import RECORD, Case, Key, Row, compile_case, launches_of, read_record, write_record

FAMILIES = sorted(
    path.stem.removeprefix("test_").removesuffix("_compile") for path in Path(__file__).parent.glob("test_*_compile.py")
)


def all_cases(families: list[str] = FAMILIES) -> list[Case]:
    modules = [importlib.import_module(f"tests.kernels.test_{family}_compile") for family in families]
    return [case for module in modules for case in module.CASES]


def merged(recorded: dict[Key, Row], made: dict[Key, Row], others: set[Key]) -> dict[Key, Row]:
    """`recorded` with the rows of some families made anew; of their kernels, a row stays if other families launch it."""
    kernels = {row.kernel for row in made.values()}
    return {key: row for key, row in recorded.items() if row.kernel not in kernels or key in others} | made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], metavar="FAMILY", help=", ".join(FAMILIES))
    families = parser.parse_args().families
    made: dict[Key, Row] = {}
    for case in all_cases(families or FAMILIES):
        made |= {row.key: row for row in compile_case(case)}
        print(case, flush=True)
    record = read_record()
    others = {key for case in all_cases([x for x in FAMILIES if families and x not in families]) for key in launches_of(case)}
    rows = merged(record.get(triton.__version__, {}), made, others) if families else made
    write_record(record | {triton.__version__: rows})
    spilled = sum(row.local > 0 for row in rows.values())
    print(f"{len(rows)} kernels of Triton {triton.__version__} in {RECORD}, {spilled} with local memory")


if __name__ == "__main__":
    main()
