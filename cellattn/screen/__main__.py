"""Every pair, triple or quadruple of genes, scored with trained models: resumable, on one machine or many.

python -m cellattn.screen CHECKPOINT... --out FOLDER [--genes roster.txt] [--order 3]      # the same again goes on
python -m cellattn.screen status FOLDER
python -m cellattn.screen merge FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data._table import Table
from ..data.dataset import PerturbationDataset
from ..data.readers import read_interactions
from ..genes import GeneList
from .engines import ENGINES
from .filters import DistanceFilter, LabelFilter, PairFilter
from .keep import BY, Bins
from .members import Model, function_of, members_of, names_of
from .merge import merge
from .rosters import read_roster
from .run import screen, status
from .scorers import DTYPES
from .sets import Filter, SetSpace

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
    members = members_of(models, given.graph)
    told = None if given.names is None else read_roster(given.names)
    names, _ = names_of(members, told)
    sets = None if given.sets is None else SetSpace.from_file(given.sets, names, types=given.types[0])
    found = screen(
        members,
        out=given.out,
        sets=sets,
        **({} if sets is not None else _combined(given, names)),
        support=None if given.support is None else read_measured(given.support, names),
        keep=given.keep,
        by=given.by,
        bins=None if given.bins is None else _bins(given.bins),
        thresholds=given.thresholds,
        unit=given.unit,
        shard=given.shard,
        engine=given.engine,
        names=told,
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


def _combined(given: argparse.Namespace, names: GeneList) -> dict[str, Any]:
    """Arguments of `screen` that say which combinations, and which of them stay."""
    rosters = []
    for text in given.genes or ():
        path, colon, count = text.rpartition(":")
        crossed = bool(colon) and count.isdecimal()
        rosters.append((list(read_roster(path if crossed else text)), int(count) if crossed else None))
    if len(rosters) > 1 and any(count is None for _, count in rosters):
        raise ValueError("genes: expected FILE:N for each of several rosters, N of its genes in a set")
    filters: list[Filter] = [
        PairFilter(names, [(a, b) for a, b in _fields(path, 2)], which=which)
        for which, paths in (("none", given.apart), ("any", given.together))
        for path in paths
    ]
    if given.labels is not None:
        labels: dict[str, list[str]] = {}
        for gene, label in _fields(given.labels, 2):
            labels.setdefault(gene, []).append(label)
        filters.append(LabelFilter(names, labels))
    if given.positions is not None:
        places = {gene: (chromosome, int(at)) for gene, chromosome, at in _fields(given.positions, 3)}
        filters.append(DistanceFilter(names, places, distance=given.distance))
    only = rosters[0][0] if len(rosters) == 1 and rosters[0][1] is None else rosters or None
    types = given.types[0] if len(given.types) == 1 else given.types
    return {"genes": only, "order": given.order, "types": types, "filters": filters, "unmeasured": given.unmeasured}


def _fields(path: Path, number: int) -> Iterator[list[str]]:
    """The lines of a file of so many columns, tabs between them; # begins a comment."""
    for place, line in enumerate(path.read_text().splitlines(), 1):
        fields = [field.strip() for field in line.split("#")[0].rstrip().split("\t")]
        if fields != [""]:
            if len(fields) != number:
                raise ValueError(f"{path}:{place}: expected {number} columns with tabs between them, got {line!r}")
            yield fields


def read_measured(path: Path, names: GeneList) -> PerturbationDataset:
    """Measured sets of a table (gene_a, gene_b, ..., score); lines without a score, or with a gene twice, are out."""
    header = Table(path, "\t").header
    genes = [column for column in header if column.startswith("gene")]
    table = read_interactions(path, names, gene_columns=genes or ("gene_a", "gene_b"), missing="drop", repeated="drop")
    return PerturbationDataset.from_interactions(table)


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
    add("--genes", action="append", metavar="FILE[:N]", help="the roster, a name a line (default: all); or several, N of each")
    add("--order", type=int, default=2, metavar="K", help="genes of a set, 1 to 4 (%(default)s)")
    add("--sets", type=Path, metavar="FILE", help="the sets themselves, a line each, tabs between the names")
    add("--types", nargs="+", default=["deleted"], metavar="T", help="what is done to a gene; of several, each (%(default)s)")
    add("--apart", type=Path, action="append", default=[], metavar="FILE", help="pairs of which no set may hold one")
    add("--together", type=Path, action="append", default=[], metavar="FILE", help="pairs of which a set has to hold one")
    add("--labels", type=Path, metavar="FILE", help="gene, label: no two genes of a set share one (a complex, an arm)")
    add("--positions", type=Path, metavar="FILE", help="gene, chromosome, base: no two genes are closer than --distance")
    add("--distance", type=float, default=20_000, metavar="BASES", help="see --positions (%(default)s)")
    add(
        "--support",
        type=Path,
        metavar="TABLE",
        help="measured sets (gene_a, gene_b, ..., score): how many share its genes",
    )
    add("--unmeasured", action="store_true", help="leave out sets that --support has measured")
    add("--graph", type=Path, metavar="FILE", help="of MultiGraph.save (default: the one that a checkpoint names)")
    add("--names", type=Path, metavar="FILE", help="of all genes of the model, one a line, where no other file has them")
    add("--model", metavar="MODULE:FUNCTION", help="makes your own module, called with each CHECKPOINT, or once without")
    add(
        "--keep",
        default="top:10000",
        metavar="RULE",
        help="rows: all, top:K (at either end of means) or above:x (%(default)s)",
    )
    add("--by", choices=BY, default="mean", help="what top and above go by: the mean over models, or |mean| / sd (%(default)s)")
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
