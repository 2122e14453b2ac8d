"""Delimited files with a header, plain or gzip, read strictly.

polars parses: it is the fastest well-kept CSV reader, and it depends on nothing. Its errors name no line: only when
something is wrong, the file is walked again, line by line, for the message.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import polars as pl
import torch

from .._check import describe

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_FLOAT32_MAX = torch.finfo(torch.float32).max
ANY_NUMBER = (-_FLOAT32_MAX, _FLOAT32_MAX)  # weights and scores are stored as float32
NOT_NEGATIVE = (0.0, _FLOAT32_MAX)


class Table:
    """An open table: its path, its bytes (decompressed) and its header."""

    def __init__(self, path: str | PathLike[str], sep: str) -> None:
        if not isinstance(sep, str):
            raise TypeError(f"sep: expected a string, got {describe(sep)}")
        if len(sep.encode()) != 1 or sep in '"\r\n':
            raise ValueError(f"sep: expected one ASCII character between fields, got {sep!r}")
        if not isinstance(path, (str, PathLike)):
            raise TypeError(f"path: expected a path, got {describe(path)}")
        self.path = Path(path)
        self.sep = sep
        # line ends after the last line are not lines
        self._data = _read_bytes(self.path).removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
        if not self._data:
            raise ValueError(f"{self.path}: the file is empty, expected a header and lines")
        _, _, self.header = next(self._lines(self._data.partition(b"\n")[0]))
        for position, column in enumerate(self.header):
            if column in self.header[:position]:
                raise ValueError(f"{self.path}, line 1: column {column!r} stands twice in the header {self.header}")

    def require_columns(self, columns: Mapping[str, str]) -> None:
        """Check that columns, by argument name, are strings, different from each other and in the header."""
        for argument, column in columns.items():
            if not isinstance(column, str):
                raise TypeError(f"{argument}: expected the name of a column, got {describe(column)}")
            if column not in self.header:
                there = ", ".join(map(repr, self.header))
                raise ValueError(f"{argument}: {self.path} has no column {column!r}, its columns are {there}")
        for argument, column in columns.items():
            for other, same in columns.items():
                if other != argument and same == column:
                    raise ValueError(f"{other}: column {column!r} is {argument} already")

    def read(
        self,
        *,
        names: Sequence[str],
        numbers: Mapping[str, tuple[float, float]] | None = None,
        optional: Collection[str] = (),
    ) -> pl.DataFrame:
        """Read columns of names (String, empty only where `optional`) and numbers (Float64, within their bounds).

        Raises:
            ValueError: a malformed line, with the file, the line number and the line.
        """
        numbers = numbers or {}
        num_lines = self._data.count(b"\n")
        # every column is read, since polars overlooks surplus fields when it is asked for some columns only
        schema = {column: pl.Float64 if column in numbers else pl.String for column in self.header}
        error = None
        try:
            table = pl.read_csv(self._data, separator=self.sep, schema=schema)
        except (pl.exceptions.PolarsError, ValueError) as caught:
            error = caught
        else:
            required = [column for column in names if column not in optional]
            bad = [table[column].null_count() > 0 for column in required]
            bad += [not _within(table[column], bounds) for column, bounds in numbers.items()]
            # polars fills missing fields with nulls and takes blank lines for rows: count both
            bad += [
                table.height != num_lines,
                self._data.count(self.sep.encode()) != (len(schema) - 1) * (num_lines + 1),
            ]
            if not any(bad):
                return table.select(*names, *numbers)
        self._find_bad_line(names, numbers, optional)
        if error is not None:
            raise ValueError(f"{self.path}: cannot be read as a table: {str(error).splitlines()[0]}") from error
        return table.select(*names, *numbers)  # the counts differ because of separators inside quotes

    def _lines(self, data: bytes) -> Iterator[tuple[int, str, list[str]]]:
        """Number, text and fields of each line."""
        text = list(io.StringIO(data.decode("utf-8", errors="replace"), newline="\n"))
        reader = csv.reader(text, delimiter=self.sep, strict=True)
        while True:
            first = reader.line_num
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                line = text[min(first, len(text) - 1)]
                raise ValueError(f"{self.path}, line {first + 1}: {error}: {_shown(line)}") from error
            yield first + 1, text[first], fields

    def _find_bad_line(
        self, names: Sequence[str], numbers: Mapping[str, tuple[float, float]], optional: Collection[str]
    ) -> None:
        for number, line, fields in self._lines(self._data):
            problem = None
            if "\N{REPLACEMENT CHARACTER}" in line:
                problem = "not UTF-8 text"
            elif len(fields) != len(self.header):
                problem = f"expected {len(self.header)} fields ({', '.join(self.header)}), found {len(fields)}"
            elif number > 1:
                row = dict(zip(self.header, fields, strict=True))
                problem = next(
                    (f"column {column!r} is empty" for column in names if not row[column] and column not in optional),
                    None,
                )
                for column, bounds in numbers.items():
                    problem = problem or _number_problem(column, row[column], bounds)
            if problem:
                raise ValueError(f"{self.path}, line {number}: {problem}: {_shown(line)}")


def _shown(line: str) -> str:
    line = line.rstrip("\r\n")
    return repr(line if len(line) <= 200 else line[:197] + "...")


def _within(column: pl.Series, bounds: tuple[float, float]) -> bool:
    """Whether all entries are numbers within the bounds; NaN compares above every number in polars."""
    low, high = bounds
    return column.null_count() == 0 and bool(((column >= low) & (column <= high)).all())


def _number_problem(column: str, text: str, bounds: tuple[float, float]) -> str | None:
    if not _NUMBER.fullmatch(text):
        return f"column {column!r} is {text!r}, expected a finite number"
    low, high = bounds
    if not low <= float(text) <= high:
        return f"column {column!r} is {text!r}, expected a number in [{low:g}, {high:g}]"
    return None


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            # read here rather than by polars: a truncated file is an error, its lines are not a shorter table
            return gzip.GzipFile(fileobj=io.BytesIO(data)).read()
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: a damaged gzip file: {error}") from error
    if path.suffix == ".gz" and data:
        raise ValueError(f"{path}: not a gzip file, it begins with {data[:8]!r}")
    return data
