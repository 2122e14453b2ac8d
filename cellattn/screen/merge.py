"""A finished screen made one: the ranking as Parquet, and a page with figures."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import polars as pl

from .._check import count_of
from .._file import write_atomic
from .._modes import without_function_modes
from ..genes import GeneList
from .agreement import Agreement
from .keep import Bins, Keep, Tables
from .page import write_page
from .store import ROW_GROUP, ScreenError, Status, Store, ranges

RESULT = "result"  # in the folder of the screen; files of units alone end in .parquet there, so that a reader takes them all


class Merged(NamedTuple):
    """What all units say together.

    Attributes:
        store: of the screen.
        status: of it: complete.
        high: rows with the highest scores, from the highest on.
        low: rows with the lowest scores, from the lowest on; none of "certainty", whose least certain are of no interest.
        tables: what was counted over all sets.
        genes: the table of the genes.
        agreement: of the members.
    """

    store: Store
    status: Status
    high: pl.DataFrame
    low: pl.DataFrame
    tables: Tables
    genes: pl.DataFrame
    agreement: Agreement


@without_function_modes
def merge(folder: str | os.PathLike[str], *, top: int = 10_000) -> Path:
    """Write `result/` into the folder of a screen whose units are all done: `ranking.parquet`, `genes.parquet`, and `page.md`
    with its figures, for which matplotlib has to be installed.

    Args:
        folder: of the screen.
        top: rows of either end in the ranking; no more than were kept.

    Returns:
        The page.

    Raises:
        ScreenError: units are missing or damaged; the message says which. Nothing is written then.
    """
    merged = gather(Store.read(folder), top)
    result = merged.store.folder / RESULT
    result.mkdir(exist_ok=True)
    ranking = pl.concat([merged.high, merged.low.reverse()]).unique("rank", keep="first", maintain_order=True)
    write_parquet(ranking, result / "ranking.parquet")
    write_parquet(merged.genes, result / "genes.parquet")
    return write_page(merged, ranking, result)


def gather(store: Store, top: int) -> Merged:
    """Read all units, one at a time.

    Raises:
        ScreenError: a unit is missing or damaged.
    """
    top = count_of("top", top, minimum=1)
    status = store.status()
    if not status.complete:
        raise ScreenError(f"folder: {str(store.folder)!r} is not complete: {_lacks(status)}; the same run again does the rest")
    plan = store.plan
    names = GeneList(plan["genes"])
    tables = Tables(len(names), plan["sets"]["order"], Bins(**plan["bins"]), plan["thresholds"])
    agreement = Agreement(len(store.labels["models"]))
    keep = Keep(**plan["keep"])
    score = pl.col("mean")
    if keep.by == "certainty":
        score = pl.when(score == 0).then(0.0).otherwise(score.abs() / pl.col("sd"))
    high: list[pl.DataFrame] = []
    low: list[pl.DataFrame] = []
    for number in range(store.num_units):
        state = store.tables(number)
        tables.merge(state)
        agreement.merge(state)
        rows = store.rows(number).with_columns(score.alias("score"))
        # of equal scores the lower rank is the lower one, whatever the units
        high = [pl.concat([*high, rows]).sort("score", "rank", descending=True).head(top)]
        low = [pl.concat([*low, rows]).sort("score", "rank").head(top if keep.has_low_end else 0)]
    return Merged(store, status, high[0].drop("score"), low[0].drop("score"), tables, tables.genes(names), agreement)


def _lacks(status: Status) -> str:
    """What is missing or damaged, the first of it by name."""
    wrong = [f"missing {ranges(status.missing)}"] if status.missing else []
    wrong += [f"damaged unit {number} ({reason})" for number, reason in sorted(status.damaged.items())]
    return ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")


def write_parquet(frame: pl.DataFrame, path: Path) -> None:
    """One file, whole or not at all."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd", row_group_size=ROW_GROUP, statistics=True)
    write_atomic(path, buffer.getvalue())
