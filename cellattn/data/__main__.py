"""A cell made of files in one command, with a report of what was matched and what was not.

python -m cellattn.data build CONFIG.toml --out cell.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .._file import say_in_any_encoding
from .build import build_cell, check_out
from .report import NO_FIGURE


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command line says; returns the exit status: 1 for an error."""
    say_in_any_encoding()
    given = _parser().parse_args(arguments)
    try:
        check_out(given.out)
        cell = build_cell(given.config)
        written = cell.save(given.out)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(cell.report())
    if len(written) < 3:
        print(NO_FIGURE)
    print(f"written: {', '.join(map(str, written))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cellattn.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="make a graph of the tables that a TOML file names")
    build.add_argument("config", type=Path, help="TOML: [genes], [[aliases]], [relations.NAME], each with path and reader")
    build.add_argument(
        "--out", type=Path, required=True, help="the file to write, .safetensors; report and figure go beside it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
