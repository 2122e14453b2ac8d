"""Every pair, triple or quadruple of genes, scored with trained models: resumable, on one machine or many.

python -m cellattn.screen CHECKPOINT... --out FOLDER [--genes roster.txt] [--order 3]      # the same again goes on
python -m cellattn.screen status FOLDER
python -m cellattn.screen merge FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .engines import ENGINES
from .keep import BY, Bins
from .members import Model, function_of
from .merge import merge
from .run import screen, status
from .scorers import DTYPES

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command line says; returns the exit status: 1 for an error, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in ("run", "status", "merge", "-h", "--help"):
        words.insert(0, "run")
    given = _parser().parse_args(words or ["--help"])
    try:
        return int(given.call(given))
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace) -> int:
    models: list[Model] = list(given.checkpoints)
    if given.model is not None:
        make = function_of(given.model)
        models = [make(path) for path in given.checkpoints] if given.checkpoints else [make()]
    found = screen(
        models,
        given.graph,
        out=given.out,
        genes=None if given.genes is None else read_names(given.genes),
        order=given.order,
        keep=given.keep,
        by=given.by,
        bins=None if given.bins is None else _bins(given.bins),
        thresholds=given.thresholds,
        unit=given.unit,
        shard=given.shard,
        engine=given.engine,
        names=None if given.names is None else read_names(given.names),
        phenotype=given.phenotype,
        dtype=None if given.dtype is None else _DTYPES[given.dtype],
        device=given.device.split(","),
        num_threads=given.threads,
        progress=not given.quiet,
    )
    if not given.quiet:
        print(found)
        if found.complete:
            print(f"python -m cellattn.screen merge {given.out}   # makes the ranking and its page")
    return 0


def _status(given: argparse.Namespace) -> int:
    found = status(given.folder)
    print(found)
    return 0 if found.complete else 3


def _merge(given: argparse.Namespace) -> int:
    print(merge(given.folder, top=given.top))
    return 0


def read_names(path: Path) -> list[str]:
    """Gene names, one a line; what follows a tab or a # is not read, nor are empty lines."""
    names = [line.split("#")[0].split("\t")[0].strip() for line in path.read_text().splitlines()]
    return [name for name in names if name]


def _bins(text: str) -> Bins:
    try:
        low, high, number = text.split(":")
        return Bins(float(low), float(high), int(number))
    except ValueError as error:
        raise ValueError(f"bins: expected low:high:number, such as -8:8:1600, got {text!r} ({error})") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cellattn.screen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{run,status,merge}")
    run = commands.add_parser("run", help="screen, or go on with it (the word may be left out)")
    run.set_defaults(call=_run)
    add = run.add_argument
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="files of cellattn.checkpoint; several are an ensemble")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the screen; one that is there is gone on with")
    add("--genes", type=Path, metavar="FILE", help="the roster: names, one a line (default: all genes of the model)")
    add("--order", type=int, default=2, metavar="K", help="genes of a set, 1 to 4 (%(default)s)")
    add("--graph", type=Path, metavar="FILE", help="of MultiGraph.save (default: the one that a checkpoint names)")
    add("--names", type=Path, metavar="FILE", help="of all genes of the model, one a line, where no other file has them")
    add("--model", metavar="MODULE:FUNCTION", help="makes your own module, called with each CHECKPOINT, or once without")
    add("--keep", default="top:10000", metavar="RULE", help="rows: all, top:K (at either end) or above:x (%(default)s)")
    add("--by", choices=BY, default="mean", help="what top and above go by: the mean over models, or mean / sd (%(default)s)")
    add("--bins", metavar="LOW:HIGH:N", help="of the histogram (-8:8:1600)")
    add("--thresholds", type=float, nargs="+", default=(-1.0, 1.0), metavar="X", help="count a gene's sets beyond (-1 1)")
    add("--unit", type=int, metavar="RANKS", help="done, written and lost as a whole (a hundredth, at most 1,000,000)")
    add("--shard", metavar="I/N", help="the I-th of N parts alone, from 0: for the array of a scheduler")
    add("--engine", choices=ENGINES, default="local", help="this process, or a Ray cluster (%(default)s)")
    add("--phenotype", type=int, default=0, metavar="P", help="which of the model's predictions (%(default)s)")
    add("--dtype", choices=_DTYPES, help="of products (default: the model's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="or several: cuda:0,cuda:1 (%(default)s)")
    add("--threads", type=int, metavar="N", help="on the CPU (default: all)")
    add("--quiet", action="store_true", help="no bar, no words")
    see = commands.add_parser("status", help="what is done, missing and damaged; exit status 3 where not all is done")
    see.add_argument("folder", type=Path)
    see.set_defaults(call=_status)
    join = commands.add_parser("merge", help="write the ranking and a page with figures, once all is done")
    join.add_argument("folder", type=Path)
    join.add_argument("--top", type=int, default=10_000, metavar="K", help="rows of either end in the ranking (%(default)s)")
    join.set_defaults(call=_merge)
    return parser


if __name__ == "__main__":
    sys.exit(main())
