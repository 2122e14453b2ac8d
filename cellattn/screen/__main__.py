"""Every pair, triple or quadruple of genes, scored with trained models: resumable, on one machine or many.

python -m cellattn.screen CHECKPOINT... --out FOLDER [--genes roster.txt] [--order 3]      # the same again goes on
python -m cellattn.screen status FOLDER
python -m cellattn.screen merge FOLDER
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .._check import describe, listed
from .._file import out_folder, say_in_any_encoding
from ..data._table import Table, read_string
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

_COMMENT = re.compile(r"#.*")
_COMMENT_BESIDE_LABELS = re.compile(r"(^\s*#|\t#|\s#(?=\s|$)).*")  # "complex #1" is a label
_NO_MEMBER = re.compile(r"_?(id|name|symbol)s?$", re.IGNORECASE)  # gene_id and gene_a_name are of no other gene


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command line says; returns the exit status: 1 for an error, 130 for Ctrl-C."""
    say_in_any_encoding()
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = ("run", "status", "merge")
    if words and words[0] not in (*commands, "-h", "--help"):
        near = difflib.get_close_matches(words[0], commands, n=1, cutoff=0.75)
        if near and not Path(words[0]).exists():
            print(f"error: unknown command {words[0]!r}, did you mean {near[0]!r}?", file=sys.stderr)
            return 2
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
        models = [_made(given.model, make, path) for path in given.checkpoints] or [_made(given.model, make)]
    members = members_of(models, given.graph)
    told = None if given.names is None else read_roster(given.names)
    names, _ = names_of(members, told)
    sets = None
    if given.sets is not None:
        beside = {
            "--genes": given.genes,
            "--order": given.order is not None,
            "--types of more than one word": len(given.types) > 1,
            "--apart": given.apart,
            "--together": given.together,
            "--labels": given.labels,
            "--positions": given.positions,
            "--unmeasured": given.unmeasured,
        }
        more = [option for option, value in beside.items() if value]
        if more:  # as `screen` does
            raise ValueError(f"sets: the sets of a file are screened as they are, expected none of {', '.join(more)}")
        sets = SetSpace.from_file(given.sets, names, types=given.types[0])
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


def _made(name: str, make: Callable[..., Any], *path: Path) -> torch.nn.Module:
    """The module that a function of the user's makes."""
    call = f"{name}({', '.join(map(repr, map(str, path)))})"
    try:
        made = make(*path)
    except Exception as error:
        raise ValueError(f"model: {call} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, torch.nn.Module):
        raise TypeError(f"model: expected a module of {call}, got {describe(made)}")
    return made


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
        PairFilter(names, [(a, b) for a, b in _fields(path, 2, may_be_empty=which == "none")], which=which)
        for which, paths in (("none", given.apart), ("any", given.together))
        for path in paths
    ]
    if given.labels is not None:
        labels: dict[str, list[str]] = {}
        for gene, label in _fields(given.labels, 2, comment=_COMMENT_BESIDE_LABELS):
            labels.setdefault(gene, []).append(label)
        filters.append(LabelFilter(names, labels))
    if given.positions is not None:
        distance = 20_000 if given.distance is None else given.distance
        filters.append(DistanceFilter(names, _positions(given.positions), distance=distance))
    elif given.distance is not None:
        raise ValueError("distance: expected --positions, which says where genes are, got none")
    only = rosters[0][0] if len(rosters) == 1 and rosters[0][1] is None else rosters or None
    types = given.types[0] if len(given.types) == 1 else given.types
    order = 2 if given.order is None else given.order
    return {"genes": only, "order": order, "types": types, "filters": filters, "unmeasured": given.unmeasured}


def _positions(path: Path) -> dict[str, tuple[str, int]]:
    """Chromosome and base by gene."""
    places: dict[str, tuple[str, int]] = {}
    for line, (gene, chromosome, base) in _lines(path, 3):
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", base):
            raise ValueError(f"{path}, line {line}: expected a base as a whole number, got {base!r}")
        place = chromosome, int(base)
        if places.setdefault(gene, place) != place:
            raise ValueError(f"{path}, line {line}: gene {gene!r} stands at {places[gene]} already, got {place}")
    return places


def _fields(path: Path, number: int, **options: Any) -> Iterator[list[str]]:
    """The fields of `_lines`."""
    return (fields for _, fields in _lines(path, number, **options))


def _lines(
    path: Path, number: int, *, comment: re.Pattern[str] = _COMMENT, may_be_empty: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """The lines of a file, which may be compressed, of so many columns, tabs between them, without comments."""
    found = may_be_empty
    for place, line in enumerate(read_string(path).split("\n"), 1):
        fields = [field.strip() for field in comment.sub("", line).rstrip().split("\t")]
        if fields != [""]:
            if len(fields) != number:
                raise ValueError(f"{path}, line {place}: expected {number} columns with tabs between them, got {line!r}")
            found = True
            yield place, fields
    if not found:
        raise ValueError(f"{path}: the file is empty, expected lines of {number} columns")


def read_measured(path: Path, names: GeneList) -> PerturbationDataset:
    """Measured sets of a table (gene_a, gene_b, ..., score); lines without a score, or with a gene twice, are out."""
    header = Table(path, "\t").header
    genes = [column for column in header if column.startswith("gene") and not _NO_MEMBER.search(column)]
    if not genes or "score" not in header:
        raise ValueError(f"support: {path}: expected the columns gene_a, gene_b, ... and score, got {listed(header)}")
    table = read_interactions(path, names, gene_columns=genes, missing="drop", repeated="drop")
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
    run._negative_number_matcher = re.compile(r"-\.?[0-9]")  # by itself it takes -8:8:1600 and -1e-3 for options
    add = run.add_argument
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="files of cellattn.checkpoint; several are an ensemble")
    add("--out", type=out_folder, required=True, metavar="FOLDER", help="of the screen; one that is there is gone on with")
    add("--genes", action="append", metavar="FILE[:N]", help="the roster, a name a line (default: all); or several, N of each")
    add("--order", type=int, metavar="K", help="genes of a set, 1 to 4 (2)")
    add("--sets", type=Path, metavar="FILE", help="the sets themselves, a line each, tabs between the names")
    add("--types", nargs="+", default=["deleted"], metavar="T", help="what is done to a gene; of several, each (%(default)s)")
    add("--apart", type=Path, action="append", default=[], metavar="FILE", help="pairs of which no set may hold one")
    add("--together", type=Path, action="append", default=[], metavar="FILE", help="pairs of which a set has to hold one")
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="gene, label: no two genes of a set share one (a complex, an arm); blanks stand around the # of a comment",
    )
    add("--positions", type=Path, metavar="FILE", help="gene, chromosome, base: no two genes are closer than --distance")
    add("--distance", type=float, metavar="BASES", help="see --positions (20,000)")
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
