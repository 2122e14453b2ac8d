"""Delimited files, read strictly: every line comes out, or the first that cannot is named by file, number and text.

Where no quotes are meant, a line is what stands between line ends, and its fields what stands between separators. polars
splits them: it is the fastest well-kept reader, and depends on nothing. Where quotes are meant and there are any, Python's
own `csv` reads, strictly. Neither interprets more: columns come as text, and numbers are made of it here.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import errno
import importlib
import io
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import polars as pl
import torch

from .._check import describe, listed, require, shown, unboxed

_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_MISSING = frozenset(("", "na", "nan", "n/a", "#n/a", "null", "none", "-", "."))  # in small letters
_FLOAT32_MAX = torch.finfo(torch.float32).max
ANY_NUMBER = (-_FLOAT32_MAX, _FLOAT32_MAX)  # weights and scores are stored as float32
NOT_NEGATIVE = (0.0, _FLOAT32_MAX)


class Number(NamedTuple):
    """A column of numbers within bounds."""

    column: str | int
    bounds: tuple[float, float]
    may_miss: bool = False  # whatever `missing` says of the others
    hint: str = ""  # what a message says of a number that is too small
    may_vanish: bool = True  # whether float32 may make 0 of it


class Table:
    """An open table.

    Args:
        path: the file.
        sep: one character between fields; "auto": of tab, comma and space the first that the first line has.
        runs: whether a space stands for any run of blanks, as in columns that are aligned, and those at the ends of a line
            separate nothing.
        quote: the character around fields that hold separators, line ends or, doubled, itself (RFC 4180); None where it is
            a character as any other; "auto": '"' where fields are separated by commas or semicolons, else None.
        header: whether the first line names the columns; otherwise they go by their numbers, from 0.
        comment: how lines begin that are left out, above the first line and below it. The last one above it is the header
            nevertheless where the columns asked for stand in it, with the mark or without, and not in the first line.

    Attributes:
        path: the file.
        header: the words of the header; the numbers of the columns where there is none.
        lines: int64 [rows], the line of the file in which each row that was read begins.
    """

    lines: np.ndarray

    def __init__(
        self,
        path: str | PathLike[str],
        sep: str,
        *,
        runs: bool = True,
        quote: str | None = "auto",
        header: bool = True,
        comment: str | None = None,
    ) -> None:
        if sep != "auto":
            _check_character("sep", sep)
        if quote is not None and quote != "auto":
            _check_character("quote", quote)
            require(quote != sep, f"quote: expected another character than sep, got {quote!r}")
        if not isinstance(header, bool):
            raise TypeError(f"header: expected a bool, got {describe(header)}")
        if comment is not None and (not isinstance(comment, str) or not comment):
            raise TypeError(f"comment: expected how comment lines begin, or None, got {describe(comment)}")
        if not isinstance(path, (str, PathLike)):
            raise TypeError(f"path: expected a path, got {describe(path)}")
        self.path = Path(path)
        self._mark = comment
        self._published = False
        self._named = header
        self._text = self._data = read_text(self.path)
        self._begin, self._first, above = self._first_line()
        if sep == "auto":
            first = self._data[self._begin : self._end(self._begin)].decode("utf-8", errors="replace")
            sep = next((character for character in "\t, " if character in first), "\t")
        self._sep = sep
        quote = ('"' if sep in ",;" else None) if quote == "auto" else quote
        self._quote = quote if quote is not None and self._data.find(quote.encode(), self._begin) >= 0 else None
        if runs and sep == " ":
            self._data = _without_runs(self._text, self._quote, comment)
            self._begin, self._first, above = self._first_line()
        self._above = [] if above is None else above.split(sep)
        words = next(self._quoted_records())[1] if self._quote else self._plain_fields(self._begin)
        if not words and not (header and self._above):
            raise ValueError(f"{self.path}: the file is empty, expected {'a header and ' if header else ''}lines")
        self._in_comment = not words  # where the header is
        self._num_fields = len(words)
        words = words or self._above
        self.header = words if header else [str(column) for column in range(len(words))]

    def without_header(self) -> None:
        """Take the first line for a line of the table: columns go by their numbers from now on."""
        self._named = self._in_comment = False
        self.header = [str(column) for column in range(self._num_fields)]

    # ------------------------------------------------------------------------------------------------ columns

    def require_format(self, name: str, columns: Collection[str]) -> None:
        """Check that a file of a published format has its columns: none of the caller's arguments would bring them."""
        self._published = True
        lacks = [column for column in columns if column not in self.header]
        if lacks:
            raise ValueError(f"{self.path}: not {name}: no column {shown(lacks[0])}, its columns are {listed(self.header)}")

    def require_columns(self, columns: Mapping[str, str | int]) -> None:
        """Check that columns, by argument name, are there, once, and different from each other."""
        columns = {argument: unboxed(column) for argument, column in columns.items()}
        for argument, column in columns.items():
            if isinstance(column, bool) or not isinstance(column, str if self._named else int):
                kind = "the name of a column" if self._named else "the number of a column, since header=False"
                raise TypeError(f"{argument}: expected {kind}, got {describe(column)}")
        if self._named and self._above and self._mark:
            asked = {str(column) for column in columns.values()}
            first, *others = self._above
            first = first.removeprefix(self._mark).lstrip()
            bare = [first, *others] if first or self._sep != " " else others  # blanks behind the mark are no separator
            for header in (bare, self._above):
                if asked <= set(header) and not asked <= set(self.header):
                    self.header, self._in_comment = header, True
        for argument, column in columns.items():
            found = self.header.count(str(column))
            if found == 0:
                there = listed(self.header) if self._named else f"0 to {len(self.header) - 1}"
                raise ValueError(
                    f"{argument}: {self.path} has no column {shown(column)}, its columns are {there}{self._hint(column)}"
                )
            where = f"{argument}: {self.path}" + ("" if self._in_comment else f", line {self._first}")
            require(found == 1, f"{where}: column {shown(column)} stands twice in the header {listed(self.header)}")
        for argument, column in columns.items():
            for other, same in columns.items():
                require(other == argument or same != column, f"{other}: column {column!r} is {argument} already")

    def _hint(self, column: str | int) -> str:
        """Where a header without the column may come from."""
        first = self.header[0]
        if not self._named:
            return ""
        alike = [word for word in self.header if word.strip().casefold() == str(column).strip().casefold()]
        if alike:
            return f"; did you mean {alike[0]!r}?"
        if self._published:  # what else is said is of other readers' arguments
            return self._nearest(column)
        if self._mark is None and first[:1] in ("#", "!", "%"):
            return f"; comment={first[0]!r} leaves lines out that begin so"
        if self._quote is None and first[:1] in ('"', "'"):
            return f"; quote={first[0]!r} takes the quotes off"
        if len(self.header) == 1 and any(sep in first for sep in "\t,; "):
            return f"; it was split at {self._sep!r}, is sep another?"
        return self._nearest(column) or "; where the first line is no header, header=False takes columns by their numbers"

    def _nearest(self, column: str | int) -> str:
        found = difflib.get_close_matches(str(column)[:80], self.header, n=1, cutoff=0.75)
        return f"; did you mean {found[0]!r}?" if found else ""

    # ------------------------------------------------------------------------------------------------ rows

    def read(
        self,
        names: Mapping[str, str | int],
        numbers: Mapping[str, Number] | None = None,
        *,
        optional: Collection[str] = (),
        missing: str | None = None,
    ) -> pl.DataFrame:
        """Read columns of names (String) and numbers (Float64, within their bounds), each under a name of the caller's.

        Args:
            names: name of the caller's -> column.
            numbers: name of the caller's -> column and bounds.
            optional: those of `names` that may be empty, which is null.
            missing: "drop": numbers may be missing, which is null. "error": they may not, and the message says that there
                is a choice. None: there is none.

        Raises:
            ValueError: a malformed line, with the file, the line number and the line.
        """
        rows = self._quoted_rows() if self._quote else self._plain_rows()
        result = {}
        for name, column in names.items():
            result[name] = rows[self._position(column)]
            if name not in optional and result[name].null_count() > 0:
                self.fail(int(result[name].is_null().arg_true()[0]), f"column {shown(column)} is empty")
        for name, number in (numbers or {}).items():
            text = rows[self._position(number.column)]
            result[name] = self._numbers(text, number, "drop" if number.may_miss else missing)
        return pl.DataFrame(result)

    def fail(self, row: int, problem: str) -> NoReturn:
        """Raise the `ValueError` for a row that was read."""
        self._fail(int(self.lines[row]), problem)

    def _position(self, column: str | int) -> str:
        return str(self.header.index(str(unboxed(column))))

    def _numbers(self, text: pl.Series, number: Number, missing: str | None) -> pl.Series:
        values = self._any_numbers(text, number, missing)
        if not number.may_vanish:
            zero = values.cast(pl.Float32) == 0
            if zero.any():
                lost = (zero & text.str.contains(r"^[^eE]*[1-9]")).fill_null(False)
                if lost.any():
                    row = int(lost.arg_true()[0])
                    self.fail(
                        row, f"column {shown(number.column)} is {shown(text[row])}, which is 0 in float32: use a larger unit"
                    )
        return values

    def _any_numbers(self, text: pl.Series, number: Number, missing: str | None) -> pl.Series:
        low, high = number.bounds
        values = text.cast(pl.Float64, strict=False)
        good = ((values >= low) & (values <= high)).fill_null(False)  # NaN compares above every number in polars
        if good.all():
            return values
        text = text.fill_null("")
        read: dict[str, float | None] = {}
        problems: dict[str, str] = {}
        for word in text.filter(~good).unique():
            is_missing = word.strip().lower() in _MISSING
            if is_missing and missing == "drop":
                read[word] = None
                continue
            problem = _number_problem(word, number)
            if problem is None:  # spelled in a way that polars does not know
                read[word] = float(word)
            else:
                problems[word] = problem + ("; missing='drop' leaves such lines out" if is_missing and missing else "")
        if problems:
            row = int(text.is_in(list(problems)).arg_true()[0])
            self.fail(row, f"column {shown(number.column)} is {shown(text[row])}, {problems[text[row]]}")
        others = text.replace_strict(list(read), list(read.values()), default=None, return_dtype=pl.Float64)
        return values.zip_with(good, others)

    # ------------------------------------------------------------------------------------------------ lines

    def _first_line(self) -> tuple[int, int, str | None]:
        """Where the first line begins that is neither blank nor a comment, its number, and the last comment above it."""
        begin, line, above = 0, 1, None
        while begin < len(self._data):
            end = self._end(begin)
            if self._is_comment(self._data[begin:end]):
                above = self._data[begin:end].decode("utf-8", errors="replace")
            elif end > begin:
                break
            begin, line = end + 1, line + 1
        return min(begin, len(self._data)), line, above

    def _end(self, begin: int) -> int:
        end = self._data.find(b"\n", begin)
        return len(self._data) if end < 0 else end

    def _is_comment(self, line: bytes) -> bool:
        return self._mark is not None and line.startswith(self._mark.encode())

    def _plain_fields(self, begin: int) -> list[str]:
        text = self._data[begin : self._end(begin)].decode("utf-8", errors="replace")
        return text.split(self._sep) if text else []

    def _plain_rows(self) -> pl.DataFrame:
        """Every column as text, by position."""
        begin, first = self._begin, self._first
        if self._named and not self._in_comment:
            begin, first = self._end(begin) + 1, first + 1
        body = self._data[begin:]
        num_lines = body.count(b"\n") + 1 if begin < len(self._data) else 0
        self.lines = np.arange(first, first + num_lines)
        if self._mark is not None and (self._is_comment(body) or b"\n" + self._mark.encode() in body):
            lines = body.split(b"\n")
            kept = np.array([not self._is_comment(line) for line in lines])
            last = max((row for row, line in enumerate(lines) if kept[row] and line), default=-1)
            kept[last + 1 :] = False  # blank lines above comments at the end are no lines
            self.lines = self.lines[kept]
            body = b"\n".join([line for line, keep in zip(lines, kept, strict=True) if keep])
        schema = {str(position): pl.String for position in range(len(self.header))}
        if len(self.lines) == 0:
            return pl.DataFrame(schema=schema)
        try:
            rows = pl.read_csv(body, separator=self._sep, has_header=False, quote_char=None, schema=schema)
        except (pl.exceptions.PolarsError, ValueError):  # its words name no line
            self._fail_of_shape(body)
        # It refuses surplus fields, takes missing ones for empty and blank lines for rows: count both.
        whole = rows.height == len(self.lines) and body.count(self._sep.encode()) == rows.height * (rows.width - 1)
        if not whole or b"\r" in body:
            self._fail_of_shape(body)
        return rows

    def _fail_of_shape(self, body: bytes) -> NoReturn:
        for line, text in zip(self.lines.tolist(), body.split(b"\n"), strict=True):
            if b"\r" in text:
                self._fail(line, "a carriage return inside the line")
            try:
                text.decode()
            except UnicodeDecodeError:
                self._fail(line, "not UTF-8 text")
            self._check_width(line, text.count(self._sep.encode()) + 1 if text else 0)
        raise AssertionError(f"{self.path}: lines that cannot be told apart")

    def _check_width(self, line: int, found: int) -> None:
        if found != len(self.header):
            names = f" ({listed(self.header).replace(chr(39), '')})" if self._named else ""
            self._fail(line, f"expected {len(self.header)} fields{names}, found {found}")

    def _quoted_rows(self) -> pl.DataFrame:
        """Every column as text, by position."""
        records = self._quoted_records()
        if self._named and not self._in_comment:
            next(records)
        lines, rows = [], []
        for line, fields in records:
            self._check_width(line, len(fields))
            lines.append(line)
            rows.append(fields)
        self.lines = np.array(lines, dtype=np.int64)
        columns = zip(*rows, strict=True) if rows else [()] * len(self.header)
        data = {str(position): [text or None for text in column] for position, column in enumerate(columns)}
        return pl.DataFrame(data, schema=dict.fromkeys(data, pl.String))

    def _quoted_records(self) -> Iterator[tuple[int, list[str]]]:
        """Line and fields of each record; a blank line has no field."""
        try:
            text = self._data[self._begin :].decode()
        except UnicodeDecodeError as error:
            self._fail(self._data.count(b"\n", 0, self._begin + error.start) + 1, "not UTF-8 text")
        feed = _RecordLines(text, self._first, self._mark)
        reader = csv.reader(feed, delimiter=self._sep, quotechar=self._quote, strict=True)
        while True:
            feed.between = True
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = f"quotes that do not close as they open ({error}); where they are text, quote=None reads them so"
                self._fail(feed.first, problem)
            yield feed.first, fields

    def _fail(self, line: int, problem: str) -> NoReturn:
        text = self._text.split(b"\n")[line - 1].decode("utf-8", errors="replace")
        shown = text if len(text) <= 200 else text[:197] + "..."
        raise ValueError(f"{self.path}, line {line}: {problem}: {shown!r}")


class _RecordLines:
    """Lines for `csv.reader`, without comments between records; `first` is the line where the latest record begins."""

    def __init__(self, text: str, first: int, mark: str | None) -> None:
        self._lines = enumerate((line + "\n" for line in text.split("\n")), first)
        self._mark = mark
        self.first = first
        self.between = True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for number, line in self._lines:
            if not self.between:
                return line
            if self._mark is None or not line.startswith(self._mark):
                self.first, self.between = number, False
                return line
        raise StopIteration


def _without_runs(data: bytes, quote: str | None, mark: str | None) -> bytes:
    """One space for each run of blanks within a line, none at its ends; what is between quotes, but in comments, stays."""
    if not any(run in data for run in (b"  ", b"\t", b"\n ", b" \n")) and not data.startswith(b" ") and not data.endswith(b" "):
        return data
    if quote is None:
        return re.sub(rb"(?m)^ | $", b"", re.sub(rb"[ \t]+", b" ", data)).rstrip(b"\n")
    q = re.escape(quote.encode())
    comment = rb"(?!)" if mark is None else re.escape(mark.encode()) + rb".*"
    quoted = rb"(?<![^ \t\n])%b[^%b]*(?:%b%b[^%b]*)*%b" % ((q,) * 6)
    parts = rb"(?m)^[ \t]*(?P<comment>%b)|(?P<end>^[ \t]+|[ \t]+$)|(?P<quoted>%b)|[ \t]+" % (comment, quoted)

    def told(part: re.Match[bytes]) -> bytes:
        if part["comment"]:
            return _without_runs(part["comment"], None, None)
        return part["quoted"] or (b"" if part["end"] else b" ")

    return re.sub(parts, told, data).rstrip(b"\n")


def _check_character(argument: str, value: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{argument}: expected a string, got {describe(value)}")
    if len(value.encode()) != 1 or value in "\0\r\n" or (argument == "sep" and value == '"'):
        where = "between fields" if argument == "sep" else "around fields"
        raise ValueError(f"{argument}: expected one ASCII character {where}, got {value!r}")


def may_be_number(text: str) -> bool:
    """Whether a field may stand in a column of numbers: it is one, or says that there is none."""
    return _NUMBER.fullmatch(text) is not None or text.strip().lower() in _MISSING


def _number_problem(text: str, number: Number) -> str | None:
    if not _NUMBER.fullmatch(text):
        comma = " (with a point, not a comma)" if _NUMBER.fullmatch(text.replace(",", ".")) else ""
        return f"expected a finite number{comma}"
    low, high = number.bounds
    hint = number.hint if float(text) < low else ""
    return None if low <= float(text) <= high else f"expected a number in [{low:g}, {high:g}]{hint}"


# ---------------------------------------------------------------------------------------------------- bytes

_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"} | {
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"  # UTF-32's begins with it
}  # fmt: skip
_PACKED = (
    ("gzip", "gzip", ".gz", re.compile(rb"\x1f\x8b")),
    ("bzip2", "bz2", ".bz2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")),
    ("xz", "lzma", ".xz", re.compile(rb"\xfd7zXZ\x00")),
)
_FOREIGN = {  # a table may begin with the gene PAR1
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it with `zstd -d`",
    b"\x04\x22\x4d\x18": "compressed with lz4: unpack it with `lz4 -d`",
    b"\x1f\x9d": "compressed with compress: unpack it with `uncompress`",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack the table in it",
    b"\xd0\xcf\x11\xe0": "a workbook: save its sheet as text",
    b"PAR1\x15": "a Parquet file: write it as text",
    b"ARROW1\0\0": "a Feather file: write it as text",
    b"MATLAB 5.0 MAT-file": "a file of MATLAB: write its table as text",
    b"\x89HDF": "an HDF5 file: write its table as text",
    b"\x93NUMPY": "an array of NumPy: write its table as text",
    b"\x5d\x00\x00": "compressed with lzma: unpack it with `unlzma`",
    b"%PDF": "a PDF: write its table as text",
    b"SQLite format 3": "an SQLite database: write its table as text",
    b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` brings the file",
}
_PAGE = re.compile(rb"\s*<(!doctype\s+)?html", re.IGNORECASE)
_ADDRESS = re.compile(r"(https?|ftp|s3|gs):/")  # a path has one slash there
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_TAR = b"ustar"  # at byte 257


_OF_THE_SYSTEM = re.compile(r"(^|/)(__MACOSX/|\._|\.DS_Store$)")  # what macOS puts into an archive


def read_text(path: Path) -> bytes:
    """The file, unpacked, in UTF-8, lines ending in a line feed, none blank at the end."""
    if _ADDRESS.match(str(path)) and not path.exists():
        raise FileNotFoundError(errno.ENOENT, "No such file, but an address, whose file has to be downloaded first", str(path))
    data = _unpacked(path, path.read_bytes())
    for magic, kind in _FOREIGN.items():
        require(not data.startswith(magic), f"{path}: {kind}")
    require(not data.startswith(_TAR, 257), f"{path}: a tar archive: unpack the table in it")
    require(not _PICKLE.match(data), f"{path}: a pickle: write its table as text")
    require(not _PAGE.match(data), f"{path}: a page of the web, as of a download that failed")
    packed = next((kind for kind, _, _, magic in _PACKED if magic.match(data)), None)
    require(packed is None, f"{path}: compressed twice, the second time with {packed}: unpack it once")
    for bom, encoding in _BOMS.items():
        if data.startswith(bom):
            try:
                data = data[len(bom) :] if encoding == "utf-8" else data.decode(encoding).encode()
            except UnicodeError as error:
                raise ValueError(f"{path}: begins as {encoding.upper()} text but is none: {error}") from error
            break
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n") if b"\n" in data else data.replace(b"\r", b"\n")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise ValueError(f"{path}, line {line}: a NUL character: no text, or UTF-16 without its mark, which iconv converts")
    return data.rstrip(b"\n")


def read_string(path: Path) -> str:
    """The file as `read_text` has it, for readers of other formats than tables."""
    data = read_text(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text") from error


_DECOMPRESSOR = {"bzip2": "BZ2Decompressor", "xz": "LZMADecompressor"}


def _streams(decompressor: str, packer: Any, data: bytes) -> bytes:
    """What all streams of a file hold, between which zeros may stand; parallel packers write many.

    `decompress` of Python's modules takes for the end what cannot be unpacked, and so a damaged stream and all behind it.
    """
    parts = []
    while data:
        stream = getattr(packer, decompressor)()
        parts.append(stream.decompress(data))
        if not stream.eof:
            raise EOFError("its last stream does not end")
        data = stream.unused_data.lstrip(b"\0")
    return b"".join(parts)


def _unpacked(path: Path, data: bytes) -> bytes:
    """What a gzip, bzip2, xz or zip file holds; other data as they are.

    Unpacked here rather than by polars: a truncated file is an error, its lines are not a shorter table.
    """
    for kind, module, suffix, magic in _PACKED:
        if magic.match(data):
            try:
                packer = importlib.import_module(module)  # not every Python is built with all of them
            except ImportError as error:
                raise ValueError(f"{path}: a {kind} file, which this Python cannot unpack: {error}") from error
            try:
                unpacked = packer.decompress(data) if kind == "gzip" else _streams(_DECOMPRESSOR[kind], packer, data)
            except (OSError, EOFError, ValueError, zlib.error, getattr(packer, "LZMAError", OSError)) as error:
                raise ValueError(f"{path}: a damaged {kind} file: {error}") from error
            return bytes(unpacked)
        require(path.suffix != suffix or not data, f"{path}: not a {kind} file, it begins with {data[:8]!r}")
    if not data.startswith(b"PK\x03\x04"):
        require(path.suffix != ".zip" or not data, f"{path}: not a zip file, it begins with {data[:8]!r}")
        return data
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inside = [name for name in archive.namelist() if not name.endswith("/") and not _OF_THE_SYSTEM.search(name)]
            content = {name: archive.read(name) for name in inside[:1]}
    except MemoryError:
        raise
    except Exception as error:  # of the archive, of any packer and of text: whatever a flipped bit makes
        raise ValueError(f"{path}: a damaged or locked zip file: {error}") from error
    require("[Content_Types].xml" not in inside, f"{path}: a workbook: save its sheet as text")
    require(len(inside) == 1, f"{path}: expected one file in the zip archive, got {inside[:5]}: unpack the table")
    return content[inside[0]]
