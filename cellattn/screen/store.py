"""The folder of a screen: what it is a screen of, and its units, each whole or not there.

    screen.json              what the screen is (`Store.plan`), the same for all who work on it
    unit-00000012.parquet    the rows that unit 12 keeps
    unit-00000012.tables     safetensors: what is counted over all of its sets, kept or not
    unit-00000012.json       its manifest, written last: ranks, rows, checksums, digests, versions

A file is written under another name in the folder, synced, and renamed. A unit is done where its manifest stands and both files
have its checksums. So a process may be killed, a disk may fill and two may write the same unit at any moment: a unit is then
done, or missing, or damaged and computed again, never wrong.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from .._check import describe, require
from .._file import write_atomic
from .._version import __version__

FORMAT = "cellattn.screen/1"
PLAN = "screen.json"
ROW_GROUP = 1 << 17  # rows that a reader skips or reads together
ABANDONED = 600.0  # seconds after which the part of a file is one of a writer that was killed


class ScreenError(ValueError):
    """A folder that is not what it is asked to be."""


@dataclass(frozen=True)
class Unit:
    """A range of ranks, the work that is done, written and lost as a whole."""

    number: int
    begin: int
    end: int

    @property
    def name(self) -> str:
        """Of its files, without what they end in."""
        return f"unit-{self.number:08d}"


@dataclass(frozen=True)
class Status:
    """How far a screen is.

    Attributes:
        folder: of the screen.
        total: ranks of the whole screen.
        units: of the whole screen.
        done: units that are whole.
        missing: numbers of units that are not there.
        damaged: number of a unit to what is wrong with it.
        ranks: of the units that are done.
        sets: that were scored in them; filters leave fewer than there are ranks.
        rows: kept of these.
        rate: ranks a second of all workers together, from the times in the manifests; None before a unit is done.
        versions: of cellattn and torch that units were computed with.
    """

    folder: Path
    total: int
    units: int
    done: int
    missing: tuple[int, ...]
    damaged: Mapping[int, str] = field(default_factory=dict)
    ranks: int = 0
    sets: int = 0
    rows: int = 0
    rate: float | None = None
    versions: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every unit is done."""
        return self.done == self.units

    @property
    def seconds_left(self) -> float | None:
        """At `rate`; None where that is not known."""
        return None if self.rate is None else (self.total - self.ranks) / self.rate

    def __str__(self) -> str:
        share = self.ranks / self.total if self.total else 1.0
        lines = [f"{self.folder}: {self.done:,} of {self.units:,} units done, {share:.1%} of {self.total:,} ranks"]
        lines.append(f"  {self.sets:,} sets scored, {self.rows:,} rows kept")
        if self.missing:
            lines.append(f"  missing: {ranges(self.missing)}")
        lines.extend(f"  damaged: unit {number}, {reason}" for number, reason in sorted(self.damaged.items()))
        if self.rate is not None:
            left = "" if self.complete else f", {duration(self.seconds_left)} left at that rate"
            lines.append(f"  {self.rate:,.0f} ranks a second{left}")
        if len(self.versions) > 1:
            lines.append(f"  computed with more than one version: {'; '.join(self.versions)}")
        return "\n".join(lines)


class Store:
    """The folder of one screen. Made by `open` or `read`."""

    def __init__(self, folder: Path, plan: Mapping[str, Any], labels: Mapping[str, Any]) -> None:
        self.folder, self.plan, self.labels = folder, plan, labels
        self.total, self.unit_size = int(plan["total"]), int(plan["unit"])
        self.num_units = -(-self.total // self.unit_size)
        self.digest = digest(plan)

    # ------------------------------------------------------------------------------------------------ the screen

    @classmethod
    def open(cls, folder: str | os.PathLike[str], plan: Mapping[str, Any], labels: Mapping[str, Any] | None = None) -> Store:
        """The folder to work on: an empty or missing one becomes that of this plan, another has to have it already.

        Args:
            folder: of the screen.
            plan: plain values of JSON that say what the screen is; "total" ranks in units of "unit". Two plans with equal
                values are one screen.
            labels: what to call things, and what models predict of the first sets; the first to open the folder says it.

        Raises:
            ScreenError: the folder is one of another screen, or holds other things. Nothing in it is changed.
        """
        folder = Path(folder)
        plan = json.loads(json.dumps(plan))  # as it is read back
        if not (folder / PLAN).exists():
            require_free(folder)
            folder.mkdir(parents=True, exist_ok=True)
            content = {"format": FORMAT, "digest": digest(plan), "plan": plan, "labels": dict(labels or {})}
            write_atomic(folder / PLAN, json.dumps(content, indent=1).encode(), keep=True)  # who comes first begins it
        store = cls.read(folder)
        if store.digest != digest(plan):
            raise ScreenError(f"out: {str(folder)!r} is the folder of another screen: {difference(store.plan, plan)}")
        return store

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Store:
        """The folder of a screen that is there. Raises ScreenError where it is none, or its plan was damaged."""
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"folder: expected a path, got {describe(folder)}")
        folder = Path(folder)
        path = folder / PLAN
        if not path.is_file():
            raise ScreenError(f"folder: {str(folder)!r} is no screen: there is no {PLAN}")
        try:
            content = json.loads(path.read_text())
            require(content["format"] == FORMAT, f"expected format {FORMAT!r}, got {content['format']!r}")
            require(content["digest"] == digest(content["plan"]), "its digest does not fit: it was edited")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ScreenError(f"folder: {str(path)!r} is damaged: {error}") from error
        return cls(folder, content["plan"], content.get("labels", {}))

    def unit(self, number: int) -> Unit:
        """The ranks of a unit."""
        begin = number * self.unit_size
        return Unit(number, begin, min(begin + self.unit_size, self.total))

    # ------------------------------------------------------------------------------------------------ units

    def write(self, unit: Unit, rows: pl.DataFrame, tables: Mapping[str, Tensor], *, sets: int, seconds: float) -> None:
        """Put a unit into the folder. One that is whole already stays as it is: whoever computed it found the same.

        Args:
            unit: which.
            rows: kept; with a column "rank" that ascends.
            tables: what is counted over all of its sets.
            sets: how many these are.
            seconds: that it took.

        Raises:
            OSError: it cannot be written. Nothing of it is left but, at most, files without a manifest.
        """
        from safetensors.torch import save

        if self.problem(unit.number) is None:
            return
        buffer = io.BytesIO()
        rows.write_parquet(buffer, compression="zstd", row_group_size=ROW_GROUP, statistics=True)
        files = {f"{unit.name}.parquet": buffer.getvalue(), f"{unit.name}.tables": save(dict(tables))}
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "screen": self.digest,
            "unit": unit.number,
            "ranks": [unit.begin, unit.end],
            "sets": sets,
            "rows": len(rows),
            "files": {name: {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"} for name, content in files.items()},
            "digests": self.plan.get("digests", {}),
            "filters": self.plan.get("sets", {}).get("filters"),
            "versions": {"cellattn": __version__, "torch": torch.__version__},
            "seconds": round(seconds, 6),
            "finished": round(time.time(), 3),
        }
        manifest["crc32"] = _crc_of(manifest)
        for name, content in files.items():
            write_atomic(self.folder / name, content)
        write_atomic(self.folder / f"{unit.name}.json", json.dumps(manifest, indent=1).encode())

    def problem(self, number: int) -> str | None:
        """What is wrong with a unit: None if it is whole, "missing" if it has no manifest, else how it is damaged."""
        path = self.folder / f"{self.unit(number).name}.json"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return "missing"
        try:
            manifest = json.loads(text)
            if manifest["crc32"] != _crc_of(manifest):
                return "its manifest was edited"
            if manifest["screen"] != self.digest:
                return "it belongs to another screen"
            unit = self.unit(number)
            if manifest["unit"] != number or manifest["ranks"] != [unit.begin, unit.end]:
                return "its manifest is that of another unit"
            for name, expected in manifest["files"].items():
                reason = _differs(self.folder / name, expected["bytes"], expected["crc32"])
                if reason is not None:
                    return reason
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return "its manifest is not readable"
        return None

    def manifest(self, number: int) -> dict[str, Any]:
        """Of a unit that is whole."""
        found: dict[str, Any] = json.loads((self.folder / f"{self.unit(number).name}.json").read_bytes())
        return found

    def rows(self, number: int) -> pl.DataFrame:
        """Kept by a unit that is whole."""
        return pl.read_parquet(self.folder / f"{self.unit(number).name}.parquet", glob=False)

    def tables(self, number: int) -> dict[str, Tensor]:
        """Counted over a unit that is whole."""
        from safetensors.torch import load

        found: dict[str, Tensor] = load((self.folder / f"{self.unit(number).name}.tables").read_bytes())
        return found

    # ------------------------------------------------------------------------------------------------ all of them

    def status(self, numbers: Iterable[int] | None = None) -> Status:
        """Read every unit once (of those with these numbers), and say what is there."""
        numbers = range(self.num_units) if numbers is None else numbers
        missing: list[int] = []
        damaged: dict[int, str] = {}
        manifests = []
        units = 0
        for number in numbers:
            units += 1
            reason = self.problem(number)
            if reason is None:
                manifests.append(self.manifest(number))
            elif reason == "missing":
                missing.append(number)
            else:
                damaged[number] = reason
        return Status(
            folder=self.folder,
            total=self.total,
            units=units,
            done=len(manifests),
            missing=tuple(missing),
            damaged=damaged,
            ranks=sum(found["ranks"][1] - found["ranks"][0] for found in manifests),
            sets=sum(found["sets"] for found in manifests),
            rows=sum(found["rows"] for found in manifests),
            rate=_rate(manifests),
            versions=tuple(sorted({", ".join(f"{k} {v}" for k, v in found["versions"].items()) for found in manifests})),
        )

    def clear_parts(self) -> None:
        """Remove what writers left that were killed while they wrote."""
        for part in self.folder.glob(".*"):
            try:
                if part.name.startswith((".unit-", f".{PLAN}.")) and time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()
            except FileNotFoundError:  # another process did
                pass


def require_free(folder: Path) -> None:
    """Check that a folder without a plan may become that of a screen: it is missing, or empty.

    Raises:
        ScreenError: it is a file, or holds other things.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ScreenError(f"out: expected a folder, {str(folder)!r} is a file")
    strangers = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if strangers and PLAN not in strangers:  # which another shard may have written in the meantime
        raise ScreenError(f"out: {str(folder)!r} is no screen and not empty: it holds {strangers[0]!r}")


def digest(plan: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of plain values."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def difference(there: Any, here: Any, name: str = "") -> str:
    """The first value in which two plans differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*here, *there]):
            if there.get(key) != here.get(key):
                return difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    if isinstance(there, list) and isinstance(here, list):
        for position, (a, b) in enumerate(zip(there, here, strict=False)):
            if a != b:
                return difference(a, b, f"{name}[{position}]")
        return f"{name} has {len(there)} entries there and {len(here)} here"
    return f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _crc_of(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says but this."""
    said = {key: value for key, value in manifest.items() if key != "crc32"}
    return f"{zlib.crc32(json.dumps(said, sort_keys=True).encode()):08x}"


def _differs(path: Path, size: int, crc32: str) -> str | None:
    """How a file is not what its manifest says."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return f"{path.name} has {os.fstat(file.fileno()).st_size:,} bytes in place of {size:,}"
            crc = 0
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
    except FileNotFoundError:
        return f"{path.name} is gone"
    return None if f"{crc:08x}" == crc32 else f"the checksum of {path.name} does not fit"


def _rate(manifests: Sequence[Mapping[str, Any]]) -> float | None:
    """Ranks a second of all workers, over the last 64 units or so: what was done in the time in which it was done."""
    last = sorted(manifests, key=lambda found: float(found["finished"]))[-64:]
    # what lies between two runs is no time of work: a unit counts for no longer than it took
    spans = sorted((found["finished"] - found["seconds"], found["finished"]) for found in last)
    busy, until = 0.0, float("-inf")
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    ranks = sum(found["ranks"][1] - found["ranks"][0] for found in last)
    return ranks / busy if busy > 0 else None


def ranges(numbers: Sequence[int], most: int = 8) -> str:
    """0-3, 7, 9-12 and 5 more"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts[:most])
    rest = sum(b - a + 1 for a, b in parts[most:])
    return f"unit{'s' if len(numbers) > 1 else ''} {shown}" + (f" and {rest} more" if rest else "")


def duration(seconds: float | None) -> str:
    """2 h 05 min, 3 min 10 s or 12 s"""
    if seconds is None:
        return "an unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def shard_of(numbers: int, shard: tuple[int, int] | None) -> Iterator[int]:
    """The units of shard i of n: every n-th from i on, so that each shard is as far through the ranks as the others."""
    index, count = shard or (0, 1)
    return iter(range(index, numbers, count))
