"""Every reader, by one table: what files of its format have in common with all others is read, counted or refused alike."""

from __future__ import annotations

import csv
import gzip
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellattn.data import (
    EdgeTable,
    GeneList,
    InteractionTable,
    read_biogrid,
    read_edge_list,
    read_edge_table,
    read_go_annotations,
    read_interactions,
    read_metabolic_model,
    read_obo,
    read_sga,
    read_sgd_features,
    read_string_aliases,
    read_string_links,
)

from .examples import GENES, MODEL, OBO, TRIGENIC, TRIGENIC_LINES, gaf, rows, sgd, values

SGA_2010 = ["YAL001C_tsq5", "TFC3", "YAL015C", "NTG1", "-0.125", "0.1", "0.01"]
SGA_2016 = [
    "Query Strain ID", "Query allele name", "Array Strain ID", "Array allele name", "Arraytype/Temp",
    "Genetic interaction score (ε)", "P-value", "Query single mutant fitness (SMF)", "Array SMF", "Double mutant fitness",
    "Double mutant fitness standard deviation",
]  # fmt: skip
BIOGRID = [
    "#BioGRID Interaction ID", "Systematic Name Interactor A", "Systematic Name Interactor B", "Official Symbol Interactor A",
    "Official Symbol Interactor B", "Experimental System", "Experimental System Type", "Score",
]  # fmt: skip
STRING = "protein1 protein2 combined_score"


@dataclass(frozen=True)
class Format:
    """A reader and a file of its, good in all of its lines."""

    read: Callable[[Path], Any]
    text: str
    header: int = 1  # lines above the first of the table
    sep: str | None = "\t"  # None: no table of fields
    comment: str | None = None  # how lines begin that are none
    number: str | None = None  # a number of the text, 0.125 or 125
    missing: str | None = None  # "error", "drop" or "null" where it is missing
    gene: str | None = "YAL015C"  # a gene, in one line


FORMATS = {
    "string": Format(
        lambda p: read_string_links(p, GENES),
        rows([STRING], ["4932.YAL001C 4932.YAL015C 125"], ["4932.YBL007C 4932.YAL001C 200"]),
        sep=" ",
        number="125",
        missing="error",
    ),
    "biogrid": Format(
        lambda p: read_biogrid(p, GENES),
        rows(
            BIOGRID,
            ["1", "YAL001C", "YAL015C", "TFC3", "NTG1", 'two "hybrid', "physical", "0.125"],
            ["2", "-", "YBL007C", "TFC3", "SLA1", "MS", "physical", "-"],
        ),
    ),
    "table": Format(
        lambda p: read_edge_table(p, GENES, source="a", target="b", weight="w", comment="#"),
        rows(["a", "b", "w"], ["TFC3", "YAL015C", "0.125"], ["YBL007C", "YAL001C", "2"]),
        comment="#",
        number="0.125",
        missing="error",
    ),
    "edge-list": Format(
        lambda p: read_edge_list(p, GENES),
        rows(["TFC3", "YAL015C", "0.125"], ["YBL007C", "YAL001C", "2"]),
        header=0,
        comment="#",
        number="0.125",
        missing="error",
    ),
    "edge-list-spaces": Format(
        lambda p: read_edge_list(p, GENES),
        rows(["x", "y", "weight"], ["TFC3", "YAL015C", "0.125"], sep=" "),
        sep=" ",
        comment="#",
        number="0.125",
        missing="error",
    ),
    "interactions": Format(
        lambda p: read_interactions(p, GENES, comment="#", missing="drop"),
        rows(["gene_a", "gene_b", "score"], ["TFC3", "YAL015C", "0.125"], ["YBL007C", "YAL001C", "-2"]),
        comment="#",
        number="0.125",
        missing="drop",
    ),
    "sga-2010": Format(
        lambda p: read_sga(p, GENES),
        rows(SGA_2010, ["YBL007C", "", "YAL001C", "", "0.5", "0.1", "1e-9"]),
        header=0,
        comment="#",
        number="0.125",
        missing="drop",
    ),
    "sga-2010-whole": Format(
        lambda p: read_sga(p, GENES),
        rows(
            [*SGA_2010, "1", "0", "1", "0", "0.9", "0"],
            ["YBL007C", "", "YAL001C", "", "0.5", "0.1", "", "", "", "", "", "0.8", ""],
        ),
        header=0,
        comment="#",
        number="0.125",
        missing="drop",
    ),
    "sga-2016": Format(
        lambda p: read_sga(p, GENES),
        rows(
            SGA_2016,
            ["YAL001C_tsq508", 'tfc3 "a"', "YAL015C_dma1", "ntg1", "DMA30", "-0.125", "0.005", "0.8", "1", "0.8", "0"],
            ["YBL007C_damp", "", "YAL001C_tsa1", "", "TSA30", "0.5", "", "", "", "", ""],
        ),
        comment="#",
        number="0.125",
        missing="drop",
    ),
    "trigenic": Format(
        lambda p: read_sga(p, GENES),
        rows(TRIGENIC, TRIGENIC_LINES[0], [line.replace("YAL015C", "YAL001C") for line in TRIGENIC_LINES[1]]),
        comment="#",
        number="0.125",
        missing="drop",
    ),
    "gaf": Format(
        lambda p: read_go_annotations(p, GENES),
        rows(["!gaf-version: 2.2"], gaf("TFC3", "YAL001C|TSV115", "involved_in", "GO:1"), gaf("NTG1", "YAL015C", "", "GO:2")),
        comment="!",
    ),
    "sgd": Format(
        lambda p: read_sgd_features(p),
        rows(sgd("ORF", "YAL001C", "TFC3", "TSV115|YAL999C"), sgd("ORF", "YAL015C", "NTG1"), sgd("CDS", "")),
        header=0,
        comment="!",
        gene=None,
    ),
    "string-aliases": Format(
        lambda p: read_string_aliases(p, GENES),
        rows(
            ["#string_protein_id", "alias", "source"], ["4932.YAL001C", "TSV115", "SGD"], ["4932.YAL015C", 'NTG "1"', "UniProt"]
        ),
        comment="#",
    ),
    "obo": Format(lambda p: read_obo(p), OBO, sep=None, comment="!", gene=None),
    "model": Format(lambda p: read_metabolic_model(p, GENES), MODEL, sep=None, number="0.125", gene="YAL015C"),
}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def read(form: Format, content: str | bytes, name: str = "file.txt") -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return form.read(path)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.rstrip("\n").encode(),
        lambda text: gzip.compress(text.encode()),
    ],
    ids=["byte-order-mark", "utf-16", "crlf", "no-last-line-end", "gzip"],
)
def test_files_as_they_come(form: Format, change: Callable[[str], bytes]) -> None:
    assert values(read(form, change(form.text))) == values(read(form, form.text))


@pytest.mark.parametrize("form", [f for f in FORMATS.values() if f.comment], ids=[n for n, f in FORMATS.items() if f.comment])
def test_comments(form: Format) -> None:
    lines = form.text.splitlines(keepends=True)
    between = f'{form.comment} said "so"\n'
    start = form.header if form.sep else 4
    text = "".join([*lines[:start], between, *lines[start:], between])
    assert values(read(form, text)) == values(read(form, form.text))


@pytest.mark.parametrize("form", [f for f in FORMATS.values() if f.number], ids=[n for n, f in FORMATS.items() if f.number])
def test_numbers(form: Format) -> None:
    number = str(form.number)
    assert form.text.count(number) == 1
    for other in (f"{float(number):.3e}", f"{float(number):.4f}0"):
        assert values(read(form, form.text.replace(number, other))) == values(read(form, form.text))
    sign = "-" if f"-{number}" in form.text else ""
    for bad in ("inf", "0x1", "1,5", "1e999"):
        if bad == "inf" or form.sep:  # JSON has words of its own for what it reads
            with pytest.raises(ValueError, match=r"file\.txt"):
                read(form, form.text.replace(sign + number, bad))


@pytest.mark.parametrize("form", [f for f in FORMATS.values() if f.missing], ids=[n for n, f in FORMATS.items() if f.missing])
@pytest.mark.parametrize("word", ["NA", "NaN", "", "-"])
def test_missing_numbers(form: Format, word: str) -> None:
    sign = "-" if f"-{form.number}" in form.text else ""
    text = form.text.replace(f"{sign}{form.number}", word)
    line = 1 + form.text[: form.text.index(str(form.number))].count("\n")
    if form.missing == "error":
        blank = word == "" and form is FORMATS["edge-list-spaces"]  # no field, where runs of blanks separate
        expected = "expected 3 fields" if blank else "expected a finite number"
        with pytest.raises(ValueError, match=rf"file\.txt, line {line}: .*{expected}"):
            read(form, text)
        return
    found = read(form, text)
    assert found.left_out["missing"].tolist() == [line]
    assert len(found.score) == found.num_lines - 1


@pytest.mark.parametrize("form", [f for f in FORMATS.values() if f.gene], ids=[n for n, f in FORMATS.items() if f.gene])
def test_unknown_genes(form: Format) -> None:
    line = 1 + form.text[: form.text.index(str(form.gene))].count("\n")
    assert form.text.count(str(form.gene)) == 1
    text = form.text.replace(str(form.gene), "YZZ999W")
    if form is FORMATS["string-aliases"]:  # says so in what it returns: STRING has proteins that no list has
        found = read(form, text)
    else:
        with pytest.warns(UserWarning, match=r"1 unknown gene: (YZZ999W|NTG1) \(1\)"):
            found = read(form, text)
    found = getattr(found, "gene_reaction", found)
    assert found.num_unknown_lines == 1
    assert found.left_out["unknown"].tolist() == [line if form.sep else 2]
    assert list(found.unknown) == ["NTG1" if form is FORMATS["gaf"] else "YZZ999W"]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", bytes(range(256)), b"\x89PNG\r\n\x1a\n\0\0", b"one\ttwo\nthree\tfour\n", "é\t".encode("latin-1") * 9],
    ids=["empty", "blank", "bytes", "image", "other-table", "latin-1"],
)
def test_files_that_are_none(form: Format, content: bytes) -> None:
    if content.startswith(b"one") and form in (FORMATS["edge-list"], FORMATS["edge-list-spaces"]):
        with pytest.warns(UserWarning, match="2 lines left out that name 4 unknown genes"):
            assert read(form, content).edge_index.shape == (2, 0)
        return
    with pytest.raises(ValueError, match=r"file\.txt"):
        read(form, content)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_other_encodings(form: Format) -> None:
    lines = form.text.split("\n")
    at = next(number for number, line in enumerate(lines) if number >= form.header and line)
    lines[at] = lines[at][:-1] + "\udce9" + lines[at][-1]
    with pytest.raises(ValueError, match=rf"file\.txt, line {at + 1}: not UTF-8 text"):
        read(form, "\n".join(lines).encode(errors="surrogateescape"))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_truncated(form: Format) -> None:
    packed = gzip.compress(form.text.encode())
    for length in (len(packed) - 1, len(packed) // 2, 12):
        with pytest.raises(ValueError, match=r"file\.txt: a damaged gzip file"):
            read(form, packed[:length])
    cut = form.text.rstrip("\n")
    cut = cut[: cut.rindex(form.sep)] if form.sep else cut[: len(cut) // 2]
    if form is FORMATS["obo"]:
        return  # half an ontology is one
    with pytest.raises(ValueError, match=r"file\.txt" + (rf", line {cut.count(chr(10)) + 1}: expected" if form.sep else "")):
        read(form, cut)


@pytest.mark.parametrize("form", [f for f in FORMATS.values() if f.sep], ids=[n for n, f in FORMATS.items() if f.sep])
def test_repeated_lines_with_other_numbers(form: Format) -> None:
    """Tables of edges and of sets keep both lines; pairs of a gene and a term stand once."""
    text, other = form.text, form.text.splitlines(keepends=True)[form.header]
    if form.number:
        other = other.replace(form.number, str(float(form.number) / 2))
    first = read(form, text)
    if form is FORMATS["sgd"]:
        with pytest.raises(ValueError, match=r"line 4: gene 'YAL001C' stands in line 1 already"):
            read(form, text + other)
        return
    again = read(form, text + other)
    assert again.num_lines == first.num_lines + 1
    if isinstance(first, EdgeTable):
        assert again.edge_index.shape[1] == first.edge_index.shape[1] + 1
        assert again.edge_index[:, -1].tolist() == first.edge_index[:, 0].tolist()
    elif isinstance(first, InteractionTable):
        assert len(again.score) == len(first.score) + 1
        assert float(again.score[-1]) == float(first.score[0]) / 2
    else:
        assert values(again) == values(first)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.sep])
@given(data=st.data())
@settings(max_examples=40)
def test_no_line_is_lost_whatever_happens_to_a_file(name: str, data: Any) -> None:
    """A file with damages has all of its lines, as Python's csv module counts them, or is refused by name."""
    form = FORMATS[name]
    text = form.text
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        piece = data.draw(st.sampled_from(['"', "'", "\t", " ", "\n", "#", "!", "x", "-", "1", "\u2028", "", "NaN", "|", ","]))
        text = text[:at] + piece + text[at + data.draw(st.integers(0, 3)) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read(form, text)
        except ValueError as error:
            found = str(error)
    if isinstance(found, str):
        assert "file.txt" in found
        return
    if form is FORMATS["edge-list-spaces"]:  # blanks at the ends of a line are nothing
        text = "\n".join(line.strip(" \t") for line in text.split("\n"))
    lines = text.rstrip("\n").split("\n")
    while lines and not lines[0]:
        lines.pop(0)
    records = list(csv.reader((line + "\n" for line in lines), delimiter=str(form.sep), quoting=csv.QUOTE_NONE))
    kept = [line for line, record in zip(lines, records, strict=True) if not (form.comment and line.startswith(form.comment))]
    while kept and not kept[-1]:
        kept.pop()  # above comments at the end
    table = next(iter(found.values())) if isinstance(found, dict) else found
    header = {0: (0, 1), 1: (0, 1) if form.comment else (1,)}[form.header]
    assert len(kept) - table.num_lines in header
    out = [line for left in table.left_out.values() for line in left.tolist()]
    assert len(out) == len(set(out)) <= table.num_lines
    if isinstance(table, EdgeTable):
        assert table.edge_index.shape[1] + len(out) == table.num_lines
    if isinstance(table, InteractionTable):
        assert len(table.score) + len(out) == table.num_lines


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"a\tb\tw\n{LONG}\tG2\t1\n", "'xxx"),
        (f"a\tb\tw\nG1\tG2\t{LONG}\n", "column 'w' is 'xxx"),
        (f"{LONG}\tb\tw\nG1\tG2\t1\n", "no column 'a', its columns are 'xxx"),
        ("\t".join(["b", "w", *(f"c{i}" for i in range(5000))]) + "\n", "no column 'a', its columns are 'b', 'w', 'c0'"),
        (f"a\tb\tw\tc{LONG}\nG1\tG2\n", "expected 4 fields"),
        ("a\tb\tw" + "\tc" * 5000 + "\nG1\tG2\n", "expected 5003 fields"),
    ],
)
def test_messages_stay_short(text: str, words: str, tmp_path: Path) -> None:
    """Whatever a file has: a warning or an error is to be read."""
    path = tmp_path / "t.tsv"
    path.write_text(text)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            read_edge_table(path, GeneList(["G1", "G2"]), source="a", target="b", weight="w")
            (said,) = (str(warning.message) for warning in seen)
        except ValueError as error:
            said = str(error)
    assert words in said
    assert len(said) < 1000 + len(str(path))


@pytest.mark.parametrize(
    ("reader", "what"), [(read_string_links, "a STRING links file"), (read_biogrid, "BioGRID's TAB 2.0 or 3.0")]
)
def test_another_table_than_a_format(reader: Callable[..., Any], what: str, tmp_path: Path) -> None:
    """No option of the reader is offered that it does not have."""
    path = tmp_path / "t.tsv"
    path.write_text("a\tb\nG1\tG2\n")
    with pytest.raises(ValueError, match=rf"^{path}: not {what}: no column '\w[\w ]*', its columns are '[ab\\t', ]+'$"):
        reader(path, GeneList(["G1", "G2"]))


@pytest.mark.parametrize("header", ["Gene_A\tb", " gene_a \tb", "gene_a\r\tb"])
def test_columns_that_nearly_fit(header: str, tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text(f"{header}\nG1\tG2\n", newline="")
    with pytest.raises(ValueError, match=r"has no column 'gene_a', its columns are .*; did you mean '.*'\?$"):
        read_edge_table(path, GeneList(["G1", "G2"]), source="gene_a", target="b")


def test_rename_is_a_function(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("a\tb\nG1\tG2\n")
    with pytest.raises(TypeError, match=r"rename: expected a function of a name, got dict \{'G1': 'G2'\}"):
        read_edge_table(path, GeneList(["G1", "G2"]), source="a", target="b", rename={"G1": "G2"})  # type: ignore[arg-type]


def test_names_that_nearly_fit_are_told(tmp_path: Path) -> None:
    """Unknown but for the case of letters or spaces around, which are seen."""
    path = tmp_path / "t.tsv"
    path.write_text("a\tb\nyal001c\tYBR002W\nYAL001C\tYBR002W \nZZ\tYAL001C\ntfc3\tYAL001C\n")
    genes = GeneList(["YAL001C", "YBR002W"], aliases={"TFC3": "YAL001C"})
    but = "3 of them are in the list but for case or spaces, 'YBR002W ' as 'YBR002W', for which rename may see to it"
    with pytest.warns(UserWarning, match=rf"'YBR002W ' \(1\), ZZ \(1\), .*; {but}$"):
        table = read_edge_table(path, genes, source="a", target="b")
    assert table.edge_index.shape[1] == 0
    path.write_text(path.read_text().replace("ZZ", "TFC3"))
    whole = read_edge_table(path, genes, source="a", target="b", rename=lambda name: name.strip().upper())
    assert whole.edge_index.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]


# ------------------------------------------------------------------------------------------------- runs of blanks


@pytest.mark.parametrize(
    "text",
    [
        "YAL001C   YAL015C   0.5\nYAL015C YBL007C      1.25\n",
        "   YAL001C YAL015C  0.5\n   YAL015C YBL007C 1.25   \n\n   \n",
        "from    to       weight\nYAL001C YAL015C  0.5\nYAL015C YBL007C  1.25",
        "# from    to     weight\nYAL001C YAL015C  0.5\nYAL015C\t YBL007C 1.25\n",
        "  # made by hand\nYAL001C YAL015C  0.5\n   # still\nYAL015C YBL007C 1.25\n",
    ],
    ids=["runs", "at the ends", "aligned under a header", "tabs among them", "before comments"],
)
def test_runs_of_blanks_are_one_separator(text: str, tmp_path: Path) -> None:
    path = tmp_path / "edges.txt"
    path.write_text(text)
    table = read_edge_list(path, GENES)
    assert table.edge_index.tolist() == [[0, 1], [1, 2]]
    assert table.weight is not None
    assert table.weight.tolist() == [0.5, 1.25]


@pytest.mark.parametrize("quote", [None, '"'])
def test_runs_of_blanks_in_the_other_readers(quote: str | None, tmp_path: Path) -> None:
    mark = quote or ""
    (tmp_path / "table").write_text(f"a   b  w\n{mark}YAL001C{mark}   YAL015C  0.5  \n YAL015C {mark}YBL007C{mark} 1.25\n")
    table = read_edge_table(tmp_path / "table", GENES, source="a", target="b", weight="w", sep=" ", quote=quote)
    assert table.edge_index.tolist() == [[0, 1], [1, 2]]
    sets = read_interactions(tmp_path / "table", GENES, gene_columns=("a", "b"), score="w", sep=" ", quote=quote)
    assert sets.seeds.tolist() == [0, 1, 1, 2]


def test_runs_of_blanks_hide_no_line_that_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "edges.txt"
    path.write_text("YAL001C   YAL015C   0.5\nYAL015C   1.25\n")
    with pytest.raises(ValueError, match=r"edges\.txt, line 2: expected 3 fields, found 2: 'YAL015C   1\.25'"):
        read_edge_list(path, GENES)


@pytest.mark.parametrize(
    "text",
    [
        'a b  w\n"YAL001C"\t YAL015C 0.5 \t\n   \t"YAL015C"   YBL007C ""',
        '  \n# a   b  w \n"YAL001C"   "YAL015C"  0.5\n\t# "a note\n  YAL015C YBL007C ""  \n  \n',
    ],
    ids=["tabs", "blank lines and comments"],
)
def test_runs_of_blanks_beside_quotes(text: str, tmp_path: Path) -> None:
    """As without them; what stands between two, be it nothing, is a field."""
    (tmp_path / "table").write_text(text)
    options: dict[str, Any] = {"sep": " ", "quote": '"', "comment": "#", "missing": "drop"}
    table = read_edge_table(tmp_path / "table", GENES, source="a", target="b", weight="w", **options)
    assert table.edge_index.tolist() == [[0], [1]]


def test_blanks_within_quotes_stay(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text('a  b\n"the  first"   YAL015C  \n')
    genes = GeneList(["the  first", "YAL015C"])
    assert read_edge_table(path, genes, source="a", target="b", sep=" ", quote='"').edge_index.tolist() == [[0], [1]]


def test_addresses_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for form in FORMATS.values():
        for address in ("https://string-db.org/a.txt.gz", "ftp://x.org/b", "s3://bucket/c"):
            with pytest.raises(FileNotFoundError, match="an address, whose file has to be downloaded first"):
                form.read(Path(address))
    (tmp_path / "s3:").mkdir()
    (tmp_path / "s3:" / "c").write_text("G1 G2")
    assert read_edge_list(Path("s3:/c"), GeneList(["G1", "G2"])).edge_index.tolist() == [[0], [1]]
