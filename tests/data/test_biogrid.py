"""BioGRID's tables, of both forms: every line is an edge or left out with its reason."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from cellattn.data import GeneList, read_biogrid

GENES = GeneList(["YAL001C", "YBL002W", "YCR003C"], aliases={"TFC3": "YAL001C", "HTB2": "YBL002W", "MRP": "YCR003C"})
COLUMNS = [
    "#BioGRID Interaction ID",
    "Systematic Name Interactor A",
    "Systematic Name Interactor B",
    "Official Symbol Interactor A",
    "Official Symbol Interactor B",
    "Synonyms Interactor A",
    "Experimental System",
    "Experimental System Type",
    "Score",
]
TAB3 = ["SWISS-PROT Accessions Interactor A"]
LINES = [
    ["YAL001C", "YBL002W", "TFC3", "HTB2", 'a "quoted" one', "Two-hybrid", "physical", "-"],
    ["YBL002W", "YAL001C", "HTB2", "TFC3", "-", "Affinity Capture-MS", "physical", "1.5E-3"],
    ["YAL001C", "YCR003C", "TFC3", "MRP", "-", "Negative Genetic", "genetic", "-0.2"],
    ["-", "YCR003C", "HTB2", "MRP", "-", "Two-hybrid", "physical", "-"],
    ["YXX999W", "YCR003C", "XX", "MRP", "-", "Two-hybrid", "physical", "-"],
    ["-", "YCR003C", "lost", "MRP", "-", "Two-hybrid", "physical", "-"],
    ["old", "YCR003C", "TFC3", "MRP", "-", "Dosage Rescue", "genetic", "-"],
    ["YAL001C", "YAL001C", "TFC3", "TFC3", "-", "Two-hybrid", "physical", "-"],
]


def write(path: Path, lines: list[list[str]] = LINES, more: list[str] = TAB3, end: str = "\n", columns: Any = COLUMNS) -> Path:
    rows = [[*columns, *more], *([str(row), *line, *["-"] * len(more)] for row, line in enumerate(lines))]
    data = end.join("\t".join(row) for row in [*rows, []]).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("more", [[], TAB3], ids=["tab2", "tab3"])
@pytest.mark.parametrize("name", ["b.txt", "b.txt.gz"])
def test_physical(tmp_path: Path, name: str, more: list[str], end: str) -> None:
    with pytest.warns(UserWarning, match=r"2 lines left out that name 2 unknown genes: YXX999W \(1\), lost \(1\)"):
        table = read_biogrid(write(tmp_path / name, more=more, end=end), GENES)
    assert table.edge_index.tolist() == [[0, 1, 1, 0], [1, 0, 2, 0]]
    assert table.weight is None
    assert table.num_lines == len(LINES)
    assert {reason: lines.tolist() for reason, lines in table.left_out.items()} == {"other_system": [4, 8], "unknown": [6, 7]}
    assert "2 lines left out of other experimental systems [lines 4, 8]" in table.report()


def test_genetic_and_both(tmp_path: Path) -> None:
    path = write(tmp_path / "b.txt")
    assert read_biogrid(path, GENES, system_type="genetic").edge_index.tolist() == [[0, 0], [2, 2]]
    with pytest.warns(UserWarning, match="YXX999W"):
        assert read_biogrid(path, GENES, system_type=None).edge_index.shape == (2, 6)


def test_systems(tmp_path: Path) -> None:
    path = write(tmp_path / "b.txt")
    assert read_biogrid(path, GENES, systems=["Affinity Capture-MS"]).edge_index.tolist() == [[1], [0]]
    with pytest.raises(ValueError, match=r"systems: .*did you mean 'Two-hybrid'"):
        read_biogrid(path, GENES, systems=["Two hybrid"])
    with pytest.raises(TypeError, match="systems"):
        read_biogrid(path, GENES, systems="Two-hybrid")
    with pytest.raises(ValueError, match="system_type"):
        read_biogrid(path, GENES, system_type="chemical")


def test_no_lines(tmp_path: Path) -> None:
    assert read_biogrid(write(tmp_path / "b.txt", []), GENES).edge_index.shape == (2, 0)


def test_malformed(tmp_path: Path) -> None:
    short = [*LINES[:2], LINES[2][:-1]]
    with pytest.raises(ValueError, match="line 4: expected 10 fields"):
        read_biogrid(write(tmp_path / "short.txt", short), GENES)
    with pytest.raises(ValueError, match="line 3: column 'Systematic Name Interactor B' is empty"):
        read_biogrid(write(tmp_path / "empty.txt", [LINES[0], ["YAL001C", "", *LINES[1][2:]]]), GENES)
    with pytest.raises(ValueError, match="no column 'Experimental System Type'"):
        read_biogrid(write(tmp_path / "columns.txt", columns=[c.replace("System Type", "Kind") for c in COLUMNS]), GENES)
    (tmp_path / "none.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        read_biogrid(tmp_path / "none.txt", GENES)
    whole = write(tmp_path / "whole.txt.gz").read_bytes()
    (tmp_path / "cut.txt.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="damaged gzip"):
        read_biogrid(tmp_path / "cut.txt.gz", GENES)


@pytest.mark.parametrize("columns", ["Organism ID Interactor {}", "Organism Interactor {}"], ids=["tab3", "tab2"])
def test_symbols_of_other_organisms_are_no_genes(tmp_path: Path, columns: str) -> None:
    """A file of yeast has interactions with human genes, some of which are called as yeast's are."""
    lines = [
        ["YAL001C", "YBL002W", "TFC3", "HTB2", "-", "Two-hybrid", "physical", "-", "559292", "559292"],
        ["YAL001C", "-", "TFC3", "TP53", "-", "Two-hybrid", "physical", "-", "559292", "9606"],
        ["-", "YCR003C", "HTB2", "MRP", "-", "Two-hybrid", "physical", "-", "9606", "559292"],
        ["YBL002W", "-", "HTB2", "MRP", "-", "Negative Genetic", "genetic", "-", "559292", "10090"],
        ["-", "-", "TFC3", "MRP", "-", "Two-hybrid", "physical", "-", "9606", "9606"],
    ]
    path = write(tmp_path / "b.txt", lines, [], columns=[*COLUMNS, *map(columns.format, "AB")])
    told = (
        r"b\.txt: genes of the list are found in lines of several organisms, '559292 \(line 2\)', '9606 \(line 6\)'; organism="
    )
    with pytest.raises(ValueError, match=told):
        read_biogrid(path, GENES)
    table = read_biogrid(path, GENES, organism=559292)
    assert table.edge_index.tolist() == [[0], [1]]
    assert {reason: lines.tolist() for reason, lines in table.left_out.items() if len(lines)} == {
        "other_system": [5], "other_organism": [3, 4, 6],
    }  # fmt: skip
    assert "3 lines left out of other organisms [lines 3, 4, 6]" in table.report()
    assert read_biogrid(path, GENES, system_type="genetic", organism=[559292, 10090]).edge_index.tolist() == [[1], [2]]
    assert read_biogrid(path, GENES, organism=9606).edge_index.tolist() == [[0], [2]]
    with pytest.raises(
        ValueError, match=r"^organism: .*b\.txt: no line is of '4932', expected one of '559292', '9606', '10090'"
    ):
        read_biogrid(path, GENES, organism=4932)  # as STRING has yeast
    with pytest.warns(UserWarning, match="1 unknown gene: TP53"):
        assert read_biogrid(path, GENES, organism=(559292, 9606)).edge_index.tolist() == [[0, 1, 0], [1, 2, 2]]
    # the lines of both organisms, as in the file of one
    with pytest.warns(UserWarning, match=r"one\.txt: 1 lines between two organisms left out, whose genes are called"):
        table = read_biogrid(write(tmp_path / "one.txt", lines[:4], [], columns=[*COLUMNS, *map(columns.format, "AB")]), GENES)
    assert table.edge_index.tolist() == [[0], [1]]
    assert {reason: lines.tolist() for reason, lines in table.left_out.items() if len(lines)} == {
        "other_system": [5], "unknown": [3], "other_organism": [4],
    }  # fmt: skip
    yeast = GeneList(["YAL001C", "YBL002W", "YCR003C"])  # no name of which is another organism's
    with pytest.warns(UserWarning, match="unknown"):
        assert read_biogrid(path, yeast).edge_index.tolist() == [[0], [1]]


def test_organisms_that_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"^organism: .*b\.txt has no columns 'Organism ID Interactor A' and B"):
        read_biogrid(path, GENES, organism=559292)
    organisms: list[tuple[Any, type[Exception]]] = [("559292", TypeError), ([], ValueError), (0, ValueError), (1.5, TypeError)]
    for organism, error in organisms:
        with pytest.raises(error, match=r"^organism: expected "):
            read_biogrid(path, GENES, organism=organism)
