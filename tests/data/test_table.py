"""Every line of a file is in the result, in the lines left out, or in an error that names file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import pickle
import re
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellattn.data import EdgeTable, GeneList, read_edge_list, read_edge_table, read_interactions

GENES = GeneList(["G1", "G2", "G3"], aliases={"A1": "G1", '"Q': "G2"})
TEXT = "a\tb\tw\nG1\tG2\t0.5\nG3\tA1\t2\n"
EDGES = [[0, 2], [1, 0]]


def edges(path: Path, **options: Any) -> EdgeTable:
    return read_edge_table(path, GENES, **{"source": "a", "target": "b", "weight": "w", **options})


def write(folder: Path, content: bytes, name: str = "table") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------------------- quotes


@pytest.mark.parametrize("note", ['a 3" pipe', '"heat shock" gene', 'the "x" gene', '"', '""', '"open', 'a "b', "it's"])
def test_quotes_are_text_between_tabs(tmp_path: Path, note: str) -> None:
    path = write(tmp_path, f"a\tb\tnote\tw\nG1\tG2\t{note}\t0.5\nG3\tA1\t{note}\t2\n".encode())
    assert edges(path).edge_index.tolist() == EDGES
    assert edges(write(tmp_path, f"a b note w\nG1 G2 {note.replace(' ', '')} 1\n".encode()), sep=" ").edge_index.tolist() == [
        [0],
        [1],
    ]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ('"a","b","w"\n"G1","G2","0.5"\n"G3","A1","2"\n', {"sep": ","}),
        ('a,b,note,w\nG1,G2,"x, ""y""\nz",0.5\n"G3",A1,,2\n', {"sep": ","}),
        ('a;b;w\n"G1";G2;0.5\nG3;"A1";2', {"sep": ";"}),
        ("a|b|w\n'G1'|G2|0.5\nG3|A1|2", {"sep": "|", "quote": "'"}),
        ('"a"\t"b"\t"w"\n"G1"\t"G2"\t0.5\n"G3"\t"A1"\t2\n', {"quote": '"'}),
        ('a,b,note,w\nG1,G2,3" pipe,0.5\nG3,A1,"x",2', {"sep": ",", "quote": None}),
        ('# "open\na,b,note,w\n#"\nG1,G2,"\n# in a field\n",0.5\n# "\nG3,A1,"x",2\n#"', {"sep": ",", "comment": "#"}),
    ],
    ids=["all", "separator-and-line-end", "semicolon", "other", "tabs-on-demand", "commas-without", "comments"],
)
def test_quotes_around_fields(tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    path = write(tmp_path, text.encode())
    table = edges(path, **options)
    assert (table.edge_index.tolist(), table.num_lines) == (EDGES, 2)


def test_lines_of_quoted_fields_are_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, b'#\na,b,w,note\nG1,G2,1,"x\ny\nz"\n#\nG1,X,1,"x\ny"\nG2,G3,,"x"\nG1,X,2,""\n')
    with pytest.warns(UserWarning, match="1 unknown gene: X"):
        table = edges(path, sep=",", comment="#", missing="drop")
    assert table.edge_index.tolist() == [[0], [1]]
    assert {reason: lines.tolist() for reason, lines in table.left_out.items()} == {"unknown": [7, 10], "missing": [9]}


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ('G1,"G2,1\nG3,A1,2', 2),
        ('G1,G2,1\n"G3" x,A1,2', 3),
        ('G1,G2,1\nG3,A1,"2\n3', 3),
        ('"G1",G2\nG1,G2,1', 2),
        ('"G1",G2,1\n\nG3,G1,1', 3),
    ],
    ids=["unclosed", "after-the-quote", "at-the-end", "field-missing", "blank"],
)
def test_quotes_that_do_not_close(tmp_path: Path, body: str, line: int) -> None:
    path = write(tmp_path, f"a,b,w\n{body}\n".encode())
    with pytest.raises(ValueError, match=re.escape(f"{path}, line {line}: ")):
        edges(path, sep=",")


def test_a_quoted_header_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, b'"a"\t"b"\nG1\tG2\n')
    with pytest.raises(ValueError, match=re.escape("""its columns are '"a"', '"b"'; quote='"' takes the quotes off""")):
        edges(path, weight=None)


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        ("# made by hand", "comment='#' leaves lines out that begin so"),
        ("a,b", "it was split at '\\t', is sep another?"),
        ("G1\tG2", "header=False takes columns by their numbers"),
    ],
    ids=["comment", "sep", "no-header"],
)
def test_a_header_that_is_none_says_what_to_do(tmp_path: Path, header: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint)):
        edges(write(tmp_path, f"{header}\nG1\tG2\n".encode()), weight=None)


def test_a_repeated_column_is_refused_only_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, b"a\tb\tn\tw\tn\t\t\nG1\tG2\t1\t0.5\t2\t\t\n")
    assert edges(path).weight is not None
    with pytest.raises(ValueError, match="line 1: column 'n' stands twice in the header"):
        edges(path, weight="n")


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E+2", 100), ("+.5", 0.5), ("5.", 5), (" 1.5 ", 1.5), ("-0", 0), ("007", 7),
        ("0e-400", 0), (".00E9", 0), ("1e-45", 1e-45),
        ("1" * 30, 1.1e29),
    ],
)  # fmt: skip
def test_numbers(tmp_path: Path, text: str, value: float) -> None:
    table = edges(write(tmp_path, f"{TEXT}G1\tG3\t{text}\n".encode()))
    assert table.weight is not None
    assert table.weight[2] == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("text", ["1e-50", "1e-400", "0." + "0" * 60 + "1", " 7E-46 ", "-1e-60"])
def test_a_weight_that_float32_makes_0_of_is_refused(tmp_path: Path, text: str) -> None:
    """It would be no edge; a score of 0 is near enough."""
    path = write(tmp_path, f"{TEXT}G1\tG3\t{text}\n".encode())
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 4: column 'w' is {text!r}, which is 0 in float32")):
        edges(path, signed=True)
    scores = read_interactions(path, GENES, gene_columns=("a", "b"), score="w")
    assert scores.score[2] == 0


NO_NUMBERS = [
    "inf",
    "-inf",
    "Infinity",
    "1e400",
    "1e39",
    "1,5",
    "1.234,5",
    "0x10",
    "1_000",
    "1d5",
    "one",
    "1 2",
    "--1",
    "١",
    "1e",
    "True",
]


@pytest.mark.parametrize("text", NO_NUMBERS)
@pytest.mark.parametrize("missing", ["error", "drop"])
def test_what_is_no_number_is_refused(tmp_path: Path, text: str, missing: str) -> None:
    path = write(tmp_path, f"{TEXT}G1\tG3\t{text}\n".encode())
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 4: column 'w' is {text!r}, expected a ")):
        edges(path, missing=missing)


@pytest.mark.parametrize("text", ["", "NA", "NaN", "nan", "N/A", "#N/A", "null", "None", "-", ".", " NA "])
def test_missing_numbers(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, f"a\tb\tw\nG1\tG2\t{text}\nG3\tA1\t2\nG1\tX\t{text}\n".encode())
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: column 'w' is {text!r}, ") + ".*missing='drop' leaves"):
        edges(path)
    with pytest.warns(UserWarning, match="1 unknown gene: X") as caught:
        table = edges(path, missing="drop")
    assert "1 lines left out whose number is missing [line 2]" in str(caught[0].message)
    assert table.edge_index.tolist() == [[2], [0]]
    # a line stands under one reason
    assert {reason: lines.tolist() for reason, lines in table.left_out.items()} == {"unknown": [4], "missing": [2]}


# ---------------------------------------------------------------------------------------------------- bytes


def zipped(data: bytes, *names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, data)
    return content.getvalue()


def tarred(data: bytes) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        member = tarfile.TarInfo("t.tsv")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "gzip-parts": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zip": lambda data: zipped(data, "folder/table.tsv"),
}
ENCODE: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-8-mark": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16-be": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "cr": lambda text: text.replace("\n", "\r").encode(),
    "mixed-lf-crlf": lambda text: text.replace("\n", "\r\n", 1).encode(),
    "no-end": lambda text: text.rstrip("\n").encode(),
    "blank-lines": lambda text: f"\n\n{text}\n\n".encode(),
}


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("encode", ENCODE)
def test_files_as_they_come(tmp_path: Path, pack: str, encode: str) -> None:
    path = write(tmp_path, PACK[pack](ENCODE[encode](TEXT)))
    table = edges(path)
    assert table.edge_index.tolist() == EDGES
    first = 5 if encode == "blank-lines" else 3
    with pytest.raises(ValueError, match=rf"{path}, line {first}: column 'w' is '2x'"):
        edges(write(tmp_path, PACK[pack](ENCODE[encode](TEXT.replace("\t2", "\t2x")))))


def test_what_an_archive_of_macos_holds_beside_the_table(tmp_path: Path) -> None:
    content = zipped(TEXT.encode(), "t.tsv", "__MACOSX/._t.tsv", ".DS_Store", "a/._t.tsv")
    assert edges(write(tmp_path, content)).edge_index.tolist() == EDGES


@pytest.mark.parametrize("pack", [name for name in PACK if name != "plain"])
def test_a_damaged_archive_is_no_shorter_table(tmp_path: Path, pack: str) -> None:
    text = "a\tb\tw\n" + "".join(f"G1\tG2\t{i}\n" for i in range(300))
    content = PACK[pack](text.encode())
    for length in {len(content) - 1, len(content) - 9, len(content) // 2, 12}:
        path = write(tmp_path, content[:length])
        with pytest.raises(ValueError, match=f"{path}: a damaged "):
            edges(path)


STREAMS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("pack", STREAMS)
@pytest.mark.parametrize("between", [b"", b"\0" * 4], ids=["", "padded"])
def test_every_stream_of_a_file_is_read(tmp_path: Path, pack: str, between: bytes) -> None:
    """Parallel packers write many, and so does who appends."""
    lines = TEXT.encode().splitlines(keepends=True)
    content = between.join(STREAMS[pack](line) for line in lines) + between
    assert edges(write(tmp_path, content)).edge_index.tolist() == EDGES


@pytest.mark.parametrize("pack", [*STREAMS, "zip"])
def test_a_flipped_bit_is_no_shorter_table(tmp_path: Path, pack: str) -> None:
    """A stream that cannot be unpacked is not the end of the file."""
    parts = TEXT.encode().splitlines(keepends=True)
    whole = PACK["zip"](TEXT.encode()) if pack == "zip" else b"".join(map(STREAMS[pack], parts))
    damaged = [whole + b"garbage"] if pack != "zip" else []
    damaged += [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(4, len(whole))]
    refused = 0
    for content in damaged:
        path = write(tmp_path, content)
        try:
            found, told = edges(path).edge_index.tolist(), f"{path}"
        except ValueError as error:
            found, told = EDGES, str(error)
            refused += 1
        assert told.startswith(f"{path}")
        assert found == EDGES  # nobody reads the time in a header
    assert refused > len(damaged) // 2


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "t", "the file is empty, expected a header and lines"),
        (b"\n\r\n", "t", "the file is empty"),
        (b"\x28\xb5\x2f\xfd1234", "t.zst", "compressed with zstd: unpack it"),
        (TEXT.encode(), "t.gz", "not a gzip file, it begins with"),
        (TEXT.encode(), "t.bz2", "not a bzip2 file"),
        (TEXT.encode(), "t.xz", "not a xz file"),
        (TEXT.encode(), "t.zip", "not a zip file"),
        (zipped(TEXT.encode(), "a", "b"), "t", r"expected one file in the zip archive, got \['a', 'b'\]"),
        (zipped(b"", "[Content_Types].xml", "b"), "t.xlsx", "a workbook: save its sheet as text"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "t.xls", "a workbook: save its sheet as text"),
        (gzip.compress(gzip.compress(TEXT.encode())), "t.gz", "compressed twice, the second time with gzip: unpack it once"),
        (zipped(bz2.compress(TEXT.encode()), "a.bz2"), "t.zip", "compressed twice, the second time with bzip2"),
        (gzip.compress(tarred(TEXT.encode())), "t.tar.gz", "a tar archive: unpack the table in it"),
        (lzma.compress(TEXT.encode(), format=lzma.FORMAT_ALONE), "t.lzma", "compressed with lzma: unpack it with `unlzma`"),
        (pickle.dumps({"a": [TEXT]}), "t.pkl", "a pickle: write its table as text"),
        (b"PAR1\x15\x04\x15\x10", "t.parquet", "a Parquet file: write it as text"),
        (b"ARROW1\x00\x00", "t.feather", "a Feather file: write it as text"),
        (b"MATLAB 5.0 MAT-file, Platform: GLNXA64\x00", "t.mat", "a file of MATLAB: write its table as text"),
        (b"\x93NUMPY\x01\x00v\x00", "t.npy", "an array of NumPy: write its table as text"),
        (b"\n<!DOCTYPE html>\n<title>404</title>\n", "t.tsv", "a page of the web, as of a download that failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "t.tsv", "a pointer of Git LFS: `git lfs pull`"),
        (TEXT.encode("utf-16-le"), "t", "t, line 1: a NUL character"),
        (TEXT.replace("A1", "A\0").encode(), "t", "t, line 3: a NUL character"),
        (b"\xff\xfe" + TEXT.encode("utf-16-le")[:-1], "t", "begins as UTF-16 text but is none"),
        (TEXT.replace("A1", "\xb5").encode("latin-1"), "t", "t, line 3: not UTF-8 text"),
        (TEXT.replace("A1", "A\r1").encode(), "t", "t, line 3: a carriage return inside the line"),
        (TEXT.replace("G3", "\r\r\nG3").encode(), "t", "t, line 3: a carriage return inside the line"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, content: bytes, name: str, message: str) -> None:
    path = write(tmp_path, content, name)
    with pytest.raises(ValueError, match=message):
        edges(path)


def test_a_table_may_begin_with_the_letters_of_another_format(tmp_path: Path) -> None:
    """PAR1 is a gene of yeast, and of man."""
    genes = GeneList(["PAR1", "ARROW1"])
    found = read_edge_list(write(tmp_path, b"PAR1\tARROW1\n"), genes)
    assert found.edge_index.tolist() == [[0], [1]]
    assert read_edge_list(write(tmp_path, b"ARROW1\tPAR1\n"), genes).edge_index.tolist() == [[1], [0]]


# ---------------------------------------------------------------------------------------------------- every line


FIELDS = [
    "G1",
    "G2",
    "A1",
    "X",
    "",
    "1",
    "0.5",
    "NaN",
    '"',
    '"G1"',
    'G1"',
    '"Q',
    "#",
    "#G1",
    " G2",
    "G\u20282",
    "\x0b",
    "\u00e9",
    "-1",
]
HEADER = ["a", "b", "w"]


def expected(text: str, sep: str, quote: str | None, comment: str | None) -> list[tuple[int, list[str]]] | None:
    """(line, fields) of every record as Python's csv module reads it; None where it refuses."""
    lines = [line + "\n" for line in text.rstrip("\n").split("\n")] if text.strip("\n") else []
    number = 0

    def feed() -> Any:
        nonlocal number
        for line in lines:
            number += 1
            yield line

    options: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if quote is None else {"quotechar": quote}
    if comment is not None and quote is None:
        kept = [(i, line) for i, line in enumerate(lines, 1) if not line.startswith(comment)]
        while kept and kept[-1][1] == "\n":
            kept.pop()
        return [(i, next(csv.reader([line], delimiter=sep, strict=True, **options))) for i, line in kept]
    reader = csv.reader(feed(), delimiter=sep, strict=True, **options)
    records: list[tuple[int, list[str]]] = []
    while True:
        first = number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return records
        except csv.Error:
            return None
        records.append((first, fields))


def is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", text))


def is_good(fields: list[str], width: int) -> bool:
    """Whether a record is one of a table of so many fields, its score possibly missing."""
    whole = len(fields) == width and "" not in fields[:2]
    return whole and (is_number(fields[2]) or fields[2].strip() in ("", "NaN"))


def check(text: str, sep: str, quote: str | None, comment: str | None, header: bool, missing: str) -> None:
    """Read a table of pairs, and hold the result, what was left out, or the error to what Python's csv module reads."""
    records = expected(text, sep, quote, comment)
    while records and not records[0][1]:
        records.pop(0)  # blank lines above the table
    error = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "table"
        path.write_text(text, encoding="utf-8", newline="")
        columns: list[Any] = HEADER if header else [0, 1, 2]
        options: dict[str, Any] = {"sep": sep, "quote": quote, "comment": comment, "header": header, "missing": missing}
        try:
            table = read_interactions(path, GENES, gene_columns=columns[:2], score=columns[2], repeated="drop", **options)
        except ValueError as caught:
            error = str(caught)
    if error is not None:
        assert str(path) in error
        if "the file is empty" in error:
            assert not records
        elif "no column" in error:
            assert records
            assert len(records[0][1]) < 3
        else:
            named = re.search(r", line (\d+): ", error)
            assert named is not None, error
            if records is not None:
                fields = dict(records)[int(named[1])]
                assert not is_good(fields, len(records[0][1])) or (missing == "error" and not is_number(fields[2])), error
        return
    assert records is not None
    body = records[1:] if header else records
    assert table.num_lines == len(body)
    reasons = {line: reason for reason, lines in table.left_out.items() for line in lines.tolist()}
    assert sum(map(len, table.left_out.values())) == len(reasons)
    kept = []
    for line, fields in body:
        assert is_good(fields, len(records[0][1]))
        genes = [GENES.get(name) for name in fields[:2]]
        if None in genes:
            assert reasons.pop(line) == "unknown"
        elif not is_number(fields[2]):
            assert missing == "drop"
            assert reasons.pop(line) == "missing"
        elif genes[0] == genes[1]:
            assert reasons.pop(line) == "repeated"
        else:
            kept.append((genes, float(fields[2])))
    assert not reasons
    assert table.seeds.view(-1, 2).tolist() == [genes for genes, _ in kept]
    assert table.score.tolist() == pytest.approx([score for _, score in kept], rel=1e-6)  # float32


@given(
    rows=st.lists(
        st.one_of(
            st.tuples(
                st.sampled_from(["G1", "G2", "A1", "X", '"Q']),
                st.sampled_from(["G1", "G3", "X"]),
                st.sampled_from(["1", "NaN", "x"]),
            ),
            st.tuples(
                st.sampled_from(["G1", "G2", '"Q']), st.sampled_from(["G3", "A1"]), st.sampled_from(["1", "-2e-3", " 4"])
            ),
            st.lists(st.sampled_from(FIELDS), min_size=0, max_size=4),
        ),
        max_size=8,
    ),
    comment=st.sampled_from([None, "#"]),
    header=st.booleans(),
    missing=st.sampled_from(["error", "drop"]),
    last=st.sampled_from(["", "\n", "\n\n"]),
)
@settings(max_examples=150)
def test_every_line_between_tabs(rows: list[Any], comment: str | None, header: bool, missing: str, last: str) -> None:
    lines = (["a\tb\tw"] if header else []) + ["\t".join(row) for row in rows]
    check("\n".join(lines) + last, "\t", None, comment, header, missing)


@given(
    rows=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["G1", "G2", "X"]), st.sampled_from(["G3", "A1"]), st.sampled_from(["1", "NaN"])),
            st.tuples(st.sampled_from(["G1", "A\n1", "X,1", 'X"']), st.sampled_from(["G3", "A1"]), st.sampled_from(["1", "2"])),
        ),
        max_size=6,
    ),
    header=st.booleans(),
    missing=st.sampled_from(["error", "drop"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@settings(max_examples=100)
def test_every_line_of_csv(rows: list[Any], header: bool, missing: str, quoting: Any) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=quoting, lineterminator="\n").writerows([HEADER, *rows] if header else rows)
    check(text.getvalue(), ",", '"', None, header, missing)


@given(
    text=st.lists(st.sampled_from(["G1", "G2", "A1", ",", ",", ",1", '"', '""', "\n", "\n", "#", "x", " "]), max_size=30).map(
        "".join
    )
)
@settings(max_examples=200)
def test_any_text_as_csv(text: str) -> None:
    check("a,b,w\n" + text, ",", '"', None, True, "drop")
    check("a,b,w\n" + text, ",", None, "#", True, "drop")
