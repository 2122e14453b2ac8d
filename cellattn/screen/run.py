"""A screen from Python: `screen` begins one or goes on with it, `status` says how far it is, `merge` makes the ranking."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .._check import count_of, describe, device_of, integer_of, require, require_choice, require_iterable
from .._modes import without_function_modes
from ..data.dataset import PerturbationDataset
from ..genes import GeneList
from ..graph import MultiGraph
from .engines import ENGINES, compute
from .enumerations import Types
from .filters import UnmeasuredFilter
from .job import Job
from .keep import Bins, Keep, Tables, check_thresholds
from .measured import MeasuredSets
from .members import Model, Path_, compare, members_of, names_of
from .rosters import Roster
from .scorers import DTYPES, multiplies_bfloat16
from .sets import Filter, SetSpace
from .store import PLAN, Status, Store, require_free, shard_of

_SMALLEST, _LARGEST = 1 << 12, 1_000_000  # ranks of a unit, if not said otherwise


@without_function_modes
def screen(
    models: Model | Sequence[Model],
    graph: MultiGraph | Path_ | None = None,
    *,
    out: str | os.PathLike[str],
    genes: Roster | Sequence[tuple[Roster, int]] | None = None,
    order: int = 2,
    types: Types = "deleted",
    filters: Sequence[Filter] = (),
    sets: SetSpace | None = None,
    support: PerturbationDataset | None = None,
    unmeasured: bool = False,
    keep: str = "top:10000",
    by: str = "mean",
    bins: Bins | None = None,
    thresholds: Sequence[float] = (-1.0, 1.0),
    unit: int | None = None,
    shard: str | tuple[int, int] | None = None,
    engine: str = "local",
    names: GeneList | Sequence[str] | None = None,
    phenotype: int = 0,
    dtype: torch.dtype | None = None,
    device: str | torch.device | Sequence[str | torch.device] = "cpu",
    num_threads: int | None = None,
    progress: bool = True,
) -> Status:
    """Score every set of a screen with every model, or what is left to do of it.

    Args:
        models: files that `cellattn.checkpoint.save` wrote, and modules; several are an ensemble.
        graph: what the models are called with, or its file; None: each with the graph that its file names.
        out: the folder. One that is there has to be of the same screen; what is whole in it stays as it is.
        genes: the roster: names of the genes of which sets are made; None: all. Or several rosters, each with the number of its
            genes in a set: [(kinases, 1), (phosphatases, 2)].
        order: genes of a set, 1 to 4; that of several rosters follows from them.
        types: what is done to genes, see `SetSpace.combinations`.
        filters: which sets stay, see `cellattn.screen.PairFilter` and its like.
        sets: all of that, made beforehand, in its place; such as the lines of a file.
        support: measured sets. Kept rows say how many of them share exactly 1, 2, ... of their genes ("share1", ...), and
            whether their mean is "outside" the measured values, which have to be in the units of the predictions.
        unmeasured: leave out sets that `support` has measured.
        keep: rows: "all"; "top:K", K at either end (by "certainty" the K highest); "above:x", those with |score| of at least x.
        by: what that score is, and what the ranking is by: "mean" over the models, or "certainty", |mean| / sd.
        bins: of the histogram of means; 1,600 from -8 to 8 by default, as for phenotypes in standard deviations.
        thresholds: sets of each gene with a mean below each negative one, above each other one, are counted.
        unit: ranks that are done, written and lost as a whole; by default a hundredth of the screen, at most 1,000,000.
        shard: "i/n", or (i, n): do the i-th of n parts of the units alone, i from 0. Shards need nothing in common but `out`.
        engine: "local", or "ray": actors on a Ray cluster.
        names: of all genes of the models, where neither the models' files nor the graphs have them.
        phenotype, dtype: see `make_scorer`.
        device: or several, "cuda:0" and "cuda:1", that work at a time.
        num_threads: of PyTorch, on the CPU; unchanged by default.
        progress: show a bar, and say what there is to say, on standard error.

    Returns:
        What is there now, of all shards.

    Raises:
        ScreenError: the folder is that of another screen, or a model of equal weights predicts something else than when it was
            begun. ValueError: an argument out of range, names that do not fit, a file that is damaged. OSError: a unit cannot
            be written; those before it are whole. KeyboardInterrupt: Ctrl-C; the same.
    """
    if not isinstance(out, str | os.PathLike):
        raise TypeError(f"out: expected a folder, got {describe(out)}")
    chosen = parse_shard(shard)
    require(dtype is None or dtype in DTYPES, lambda: f"dtype: expected one of {DTYPES}, got {dtype}")
    require_choice("engine", engine, ENGINES)
    if not isinstance(device, str | torch.device):
        require_iterable("device", device, "one or several")
    devices = [str(device)] if isinstance(device, str | torch.device) else list(map(str, device))
    require(len(devices) > 0, "device: expected at least one, got none")
    for one in devices:
        device_of("device", one, present=engine == "local")  # those of a cluster are elsewhere
    num_threads, unit = (
        None if value is None else count_of(name, value, minimum=1)
        for name, value in (("num_threads", num_threads), ("unit", unit))
    )
    phenotype = count_of("phenotype", phenotype)
    if bins is not None and not isinstance(bins, Bins):
        raise TypeError(f"bins: expected Bins, got {describe(bins)}")
    require_iterable("filters", filters, "several filters")
    if sets is not None and not isinstance(sets, SetSpace):
        raise TypeError(f"sets: expected a SetSpace, got {describe(sets)}")
    if support is not None and not isinstance(support, PerturbationDataset):
        raise TypeError(f"support: expected a PerturbationDataset, got {describe(support)}")
    rule, bins, thresholds = Keep(keep, by), bins or Bins(), check_thresholds(thresholds)
    members = members_of(models, graph)
    require(by == "mean" or len(members) > 1, "by: expected 'mean' for a single model, whose predictions have no spread")
    agreed, notes = names_of(members, names)
    measured = None
    if support is not None:
        notes += compare(agreed, support.names, ("models", "support"))
        measured = MeasuredSets.of(support)
        sizes = measured.num_genes, len(agreed)
        require(sizes[0] == sizes[1], f"support: expected sets of the models' {sizes[1]} genes, got of {sizes[0]}")
    else:
        require(not unmeasured, "unmeasured: expected support, which says what was measured, got None")
    if sets is None:
        more = [] if not unmeasured or measured is None else [UnmeasuredFilter(measured)]
        sets = space_of(agreed, genes, order, types, [*filters, *more])
    else:
        alone = genes is None and not filters and not unmeasured and types == "deleted"
        require(alone, "sets: expected no genes, types, filters or unmeasured beside it")
        compare(agreed, sets.names, ("models", "sets"))
    plan = {
        "total": sets.total,
        "unit": unit or unit_size(sets.total),
        "sets": sets.describe(),
        "digests": {
            "models": [member.digest for member in members],
            "graphs": [None if member.graph is None else member.graph.digest() for member in members],
            "genes": agreed.digest(),
        },
        "keep": asdict(rule),
        "bins": asdict(bins),
        "thresholds": thresholds,
        "phenotype": phenotype,
        "dtype": "of the model" if dtype is None else str(dtype).removeprefix("torch."),
        "support": None if measured is None else _describe(measured),
        "genes": list(agreed),
    }
    if dtype == torch.bfloat16 and not all(multiplies_bfloat16(torch.device(name)) for name in devices):
        notes = [*notes, "this processor has no instructions for bfloat16: products are in float32"]
    options = {"phenotype": phenotype, "dtype": dtype, "device": devices[0], "num_threads": num_threads}
    tables = partial(Tables, len(agreed), sets.order, bins, thresholds)
    job = Job(sets, members, agreed, sets.roster, rule, tables, options, measured)
    first: list[list[float]] | None = None
    if engine == "local" and not (Path(out) / PLAN).exists():
        require_free(Path(out))
        once, again = job.try_first(), job.try_first()
        if once is not None and again is not None:
            varies = (~job.agree(once, again)).any(1).nonzero()[:, 0].tolist()
            notes += [f"{members[member].name} predicts other values from call to call: it draws some" for member in varies]
            first = None if varies else once.tolist()
    store = Store.open(out, plan, labels={"models": [member.name for member in members], "first": first})
    say = _Speaker(progress)
    for note in notes:
        say(note)
    _work(store, job, engine, list(shard_of(store.num_units, chosen)), devices, say)
    return store.status()


def space_of(
    names: GeneList, genes: Roster | Sequence[tuple[Roster, int]] | None, order: int, types: Types, filters: Sequence[Filter]
) -> SetSpace:
    """Combinations of one roster, or of several crossed ones."""
    if isinstance(genes, Sequence) and genes and isinstance(genes[0], tuple):
        return SetSpace.crossed(names, genes, types=types, filters=filters)  # type: ignore[arg-type]
    return SetSpace.combinations(names, order, roster=genes, types=types, filters=filters)  # type: ignore[arg-type]


def _describe(measured: MeasuredSets) -> dict[str, Any]:
    return {**measured.describe(), "range": None if measured.range is None else measured.range.tolist()}


class _Speaker:
    """Says things on standard error, if anybody listens."""

    def __init__(self, listens: bool) -> None:
        self.listens = listens

    def __call__(self, text: str) -> None:
        if self.listens:
            tqdm.write(text, file=sys.stderr)


def _work(store: Store, job: Job, engine: str, mine: Sequence[int], devices: Sequence[str], say: _Speaker) -> None:
    """Do what is left of these units, with a bar, and say what there was and how to go on where it ends early."""
    store.clear_parts()
    before = store.status(mine)
    todo = sorted([*before.missing, *before.damaged])
    if todo and engine == "local":
        job.require_predictions(store.labels.get("first"))
    if before.done or before.damaged:
        say(f"{store.folder}: {before.done:,} of {before.units:,} units are there already")
    for number, reason in sorted(before.damaged.items()):
        say(f"unit {number} is damaged and is computed again: {reason}")
    ranks = sum(unit.end - unit.begin for unit in map(store.unit, mine))
    done = ranks - sum(unit.end - unit.begin for unit in map(store.unit, todo))
    bar = tqdm(total=ranks, initial=done, unit="set", unit_scale=True, desc=store.folder.name, disable=not say.listens)
    how = "the same command, or the same call, goes on from here"
    try:
        with bar:
            compute(engine, store, job, todo, devices, bar.update)
    except KeyboardInterrupt:
        left = store.status(mine)
        say(f"interrupted: {left.done:,} of {left.units:,} units are done; {how}")
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        left = store.status(mine)
        whole = f"{left.done:,} of {left.units:,} units are done"
        text = f"no room for {str(store.folder)!r}: {os.strerror(error.errno)}; {whole}; make room, and {how}"
        raise OSError(error.errno, text) from error


@without_function_modes
def status(folder: str | os.PathLike[str]) -> Status:
    """How far a screen is; every file of it is read once and held to its checksum.

    Raises:
        ScreenError: the folder is none of a screen.
    """
    return Store.read(folder).status()


def parse_shard(shard: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """(i, n) of "i/n", 0 <= i < n.

    Raises:
        ValueError: n < 1, or i out of range. TypeError: neither.
    """
    if shard is None:
        return None
    if isinstance(shard, str):
        index_text, slash, count_text = shard.partition("/")
        numbers = bool(slash) and all(text.strip().removeprefix("-").isdecimal() for text in (index_text, count_text))
        require(numbers, f"shard: expected i/n, such as 0/4, got {shard!r}")
        index, count = int(index_text), int(count_text)
    else:
        if not (isinstance(shard, tuple | list) and len(shard) == 2):
            raise TypeError(f"shard: expected 'i/n' or (i, n), got {describe(shard)}")
        index, count = (integer_of("shard", x) for x in shard)
    require(count >= 1, f"shard: expected n of at least 1 in i/n, got {index}/{count}")
    require(0 <= index < count, f"shard: expected i from 0 to {count - 1} in i/{count}, got {index}")
    return index, count


def unit_size(total: int) -> int:
    """Ranks of a unit where nobody asked for another number: a hundredth of the screen, within bounds."""
    return min(max(-(-total // 100), _SMALLEST), _LARGEST)
