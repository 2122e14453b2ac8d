"""Readers: what the file holds comes out, and what is malformed is named by file, line and value."""

from __future__ import annotations

import gzip
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cellattn.data import EdgeTable, GeneList, read_edge_table, read_interactions, read_string_links

GENES = GeneList(["A", "B", "C", "D"], aliases={"ALPHA": "A"})
LINKS = "protein1 protein2 combined_score\n4932.A 4932.B 900\n4932.B 4932.A 900\n4932.C 4932.A 200\n"
DETAILED = (
    "protein1 protein2 neighborhood coexpression combined_score\n"
    "4932.A 4932.B 0 300 320\n4932.B 4932.A 0 300 320\n4932.C 4932.D 150 0 150\n"
)
EDGES = "source\ttarget\tvalue\tnote\nA\tB\t0.5\tx\nALPHA\tC\t2\t\n"
PAIRS = "gene_a\tgene_b\tscore\tsplit\nA\tB\t-0.25\ttrain\nC\tA\t0.5\ttest\n"


def write(folder: Path, text: str | bytes, name: str = "table.txt") -> Path:
    path = folder / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def links(path: Path, **options: Any) -> Any:
    return read_string_links(path, GENES, **options)


def edges(path: Path, **options: Any) -> EdgeTable:
    return read_edge_table(path, GENES, **{"source": "source", "target": "target", "weight": "value", **options})


def pairs(path: Path, **options: Any) -> Any:
    return read_interactions(path, GENES, **options)


@pytest.mark.parametrize("name", ["links.txt", "links.txt.gz"], ids=["plain", "gzip"])
def test_string_links_holds_the_lines_of_the_file(tmp_path: Path, name: str) -> None:
    table = links(write(tmp_path, LINKS, name))
    assert table.edge_index.tolist() == [[0, 1, 2], [1, 0, 0]]
    assert table.edge_index.dtype == torch.int64
    assert table.weight.tolist() == [900, 900, 200]
    assert table.weight.dtype == torch.float32
    assert (table.num_lines, table.num_unknown_lines, table.num_below_threshold) == (3, 0, 0)


def test_string_links_threshold_keeps_equal_scores(tmp_path: Path) -> None:
    path = write(tmp_path, LINKS)
    assert links(path, score_threshold=900).edge_index.tolist() == [[0, 1], [1, 0]]
    assert links(path, score_threshold=901).edge_index.shape == (2, 0)
    table = links(path, score_threshold=900)
    assert "1 below the threshold [line 4]" in table.report()
    assert table.left_out["below_threshold"].tolist() == [4]


def test_string_detailed_gives_one_channel_some_or_all(tmp_path: Path) -> None:
    path = write(tmp_path, DETAILED)
    assert links(path, channels="coexpression").weight.tolist() == [300, 300]
    assert list(links(path, channels=["combined_score", "neighborhood"])) == ["combined_score", "neighborhood"]
    every = links(path, channels="all")
    assert list(every) == ["neighborhood", "coexpression"]
    assert every["neighborhood"].edge_index.tolist() == [[2], [3]]  # a score of 0 is no edge
    assert every["neighborhood"].num_below_threshold == 2


def test_edge_table_reads_named_columns_and_aliases(tmp_path: Path) -> None:
    path = write(tmp_path, EDGES)
    table = edges(path)
    assert table.edge_index.tolist() == [[0, 0], [1, 2]]
    assert table.weight is not None
    assert table.weight.tolist() == [0.5, 2]
    assert edges(path, weight=None).weight is None
    assert edges(path, source="target", target="source").edge_index.tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        pytest.param(EDGES.replace("\n", "\r\n"), {}, id="crlf"),
        pytest.param(EDGES.rstrip("\n"), {}, id="no-last-line-end"),
        pytest.param(EDGES + "\n\n", {}, id="blank-lines-at-the-end"),
        pytest.param("\ufeff" + EDGES, {}, id="byte-order-mark"),
        pytest.param(EDGES.replace("\t", ","), {"sep": ","}, id="comma"),
        pytest.param(EDGES.replace("\t", ",").replace("x", '"x, y"'), {"sep": ","}, id="separator-in-quotes"),
        pytest.param(EDGES.replace("A", "A-1").replace("\tB", "\tB-2"), {"rename": lambda n: n.split("-")[0]}, id="rename"),
    ],
)
def test_edge_table_accepts(tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    if "rename" in options:
        text = text.replace("A-1LPHA-1", "ALPHA-3")
    assert edges(write(tmp_path, text), **options).edge_index.tolist() == [[0, 0], [1, 2]]


def test_edge_table_signed_keeps_negative_weights(tmp_path: Path) -> None:
    table = edges(write(tmp_path, EDGES.replace("0.5", "-0.5")), signed=True)
    assert table.weight is not None
    assert table.weight.tolist() == [-0.5, 2]
    with pytest.raises(ValueError, match=r"line 2: .*'-0\.5', expected .*; signed=True keeps negative weights"):
        edges(write(tmp_path, EDGES.replace("0.5", "-0.5")))
    with pytest.raises(ValueError, match=r"line 2: .*'1e39', expected a number in \[0, 3\.40282e\+38\]: "):
        edges(write(tmp_path, EDGES.replace("0.5", "1e39")))


def test_interactions_reads_pairs_triples_and_split(tmp_path: Path) -> None:
    table = pairs(write(tmp_path, PAIRS), split="split")
    assert table.seeds.tolist() == [0, 1, 2, 0]
    assert table.ptr.tolist() == [0, 2, 4]
    assert table.score.tolist() == [-0.25, 0.5]
    assert table.split == ("train", "test")
    triples = write(tmp_path, "a,b,c,score\nA,B,,1\nA,C,D,2\n", "triples.csv")
    table = pairs(triples, gene_columns=("a", "b", "c"), sep=",")
    assert table.seeds.tolist() == [0, 1, 0, 2, 3]
    assert table.ptr.tolist() == [0, 2, 5]
    assert table.split is None


@pytest.mark.parametrize(
    ("read", "header"),
    [(links, LINKS), (edges, EDGES), (pairs, PAIRS)],
    ids=["links", "edges", "interactions"],
)
def test_header_alone_is_an_empty_table(tmp_path: Path, read: Callable[..., Any], header: str) -> None:
    table = read(write(tmp_path, header.partition("\n")[0] + "\n"))
    assert table.num_lines == 0


def test_unknown_names_are_counted_warned_about_and_kept(tmp_path: Path) -> None:
    path = write(tmp_path, LINKS + "4932.X 4932.A 500\n4932.X 4932.X 500\n4932.A 4932.Y 500\n4932.X 4932.Y 500\n")
    with pytest.warns(UserWarning, match=re.escape("4 lines left out that name 2 unknown genes: X (3), Y (2)")) as caught:
        table = links(path)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the warning points at the caller
    assert dict(table.unknown) == {"X": 3, "Y": 2}
    assert (table.num_lines, table.num_unknown_lines, table.edge_index.shape[1]) == (7, 4, 3)


def test_unknown_names_in_interactions_leave_the_other_lines_whole(tmp_path: Path) -> None:
    path = write(tmp_path, PAIRS.replace("A\tB", "A\tX"))
    with pytest.warns(UserWarning, match="1 lines left out that name 1 unknown gene: X"):
        table = pairs(path, split="split")
    assert table.seeds.tolist() == [2, 0]
    assert table.score.tolist() == [0.5]
    assert table.split == ("test",)


def test_no_warning_without_unknown_names(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        links(write(tmp_path, LINKS))


def links_line(line: str) -> str:
    return LINKS + line + "\n"


MALFORMED_LINES = [
    pytest.param(links, links_line("4932.A 4932.B"), 5, "expected 3 fields", id="links-field-missing"),
    pytest.param(links, links_line("4932.A 4932.B 1 2"), 5, "found 4", id="links-field-too-many"),
    pytest.param(links, links_line("4932.A 4932.B") + "4932.A 4932.B 1 2\n", 5, "found 2", id="links-fields-even-out"),
    pytest.param(links, links_line("4932.A  400"), 5, "column 'protein2' is empty", id="links-name-empty"),
    pytest.param(links, links_line("4932.A 4932.B high"), 5, "is 'high', expected a finite number", id="links-text"),
    pytest.param(links, links_line("4932.A 4932.B nan"), 5, "is 'nan', expected a finite number", id="links-nan"),
    pytest.param(links, links_line("4932.A 4932.B inf"), 5, "is 'inf', expected a finite number", id="links-inf"),
    pytest.param(links, links_line("4932.A 4932.B -1"), 5, "is '-1', expected a number in [0, 1000]", id="links-negative"),
    pytest.param(links, links_line("4932.A 4932.B 1001"), 5, "is '1001', expected a number in", id="links-above-1000"),
    pytest.param(links, links_line("4932.A 4932.B "), 5, "is '', expected a finite number", id="links-score-empty"),
    pytest.param(links, links_line("\n4932.A 4932.B 7"), 5, "found 0", id="links-blank-line"),
    pytest.param(links, links_line("4932.A\t4932.B\t7"), 5, "found 1", id="links-tabs"),
    pytest.param(links, LINKS.replace("B 900", "B 0x9", 1), 2, "is '0x9'", id="links-first-line"),
    pytest.param(links, (LINKS + "4932.\udcff 4932.A 1\n").encode(errors="surrogateescape"), 5, "UTF-8", id="links-bytes"),
    pytest.param(edges, EDGES + "A\tB\n", 4, "expected 4 fields", id="edges-fields-missing"),
    pytest.param(edges, EDGES + "A\tB\t1\n", 4, "found 3", id="edges-unused-field-missing"),
    pytest.param(edges, EDGES + "A\tB\t-1\tx\n", 4, "is '-1', expected a number in [0,", id="edges-negative"),
    pytest.param(edges, EDGES + "A\tB\t1e39\tx\n", 4, "is '1e39', expected a number in", id="edges-above-float32"),
    pytest.param(edges, EDGES + "A\tB\t1,5\tx\n", 4, "with a point, not a comma", id="edges-decimal-comma"),
    pytest.param(edges, EDGES + "\tB\t1\tx\n", 4, "column 'source' is empty", id="edges-source-empty"),
    pytest.param(pairs, PAIRS + "A\tB\tNA\ttrain\n", 4, "missing='drop' leaves such lines out", id="interactions-na"),
    pytest.param(pairs, PAIRS + "A\tALPHA\t1\ttrain\n", 4, "names gene 'A' twice; repeated='drop'", id="interactions-repeated"),
    pytest.param(pairs, PAIRS + "A\t\t1\ttrain\n", 4, "column 'gene_b' is empty", id="interactions-gene-empty"),
    pytest.param(pairs, "gene_a\tgene_b\tscore\tscore\n", 1, "column 'score' stands twice", id="header-repeated"),
]


@pytest.mark.parametrize(("read", "text", "line", "message"), MALFORMED_LINES)
@pytest.mark.parametrize("name", ["bad.txt", "bad.txt.gz"], ids=["plain", "gzip"])
def test_malformed_line_is_named(
    tmp_path: Path, read: Callable[..., Any], text: str | bytes, line: int, message: str, name: str
) -> None:
    path = write(tmp_path, text, name)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(path)
    assert f"{path}, line {line}: " in str(caught.value)
    raw = text if isinstance(text, bytes) else text.encode()
    shown = raw.split(b"\n")[line - 1].decode(errors="replace")
    assert repr(shown) in str(caught.value) or line == 1


BAD_ARGUMENTS = [
    pytest.param(links, LINKS, {"score_threshold": -1}, ValueError, "score_threshold: expected", "-1", id="threshold-low"),
    pytest.param(links, LINKS, {"score_threshold": 0.4j}, ValueError, "score_threshold: expected", "0.4j", id="threshold-type"),
    pytest.param(
        links,
        LINKS,
        {"score_threshold": float("nan")},
        ValueError,
        "score_threshold: expected",
        "nan",
        id="threshold-nan",
    ),
    pytest.param(links, LINKS, {"channels": "fusion"}, ValueError, "channels: ", "'fusion'", id="channel-missing"),
    pytest.param(links, LINKS, {"channels": ["fusion"]}, ValueError, "its columns are", "'fusion'", id="channel-listed"),
    pytest.param(links, LINKS, {"channels": []}, ValueError, "channels: expected at least one", "none", id="channels-none"),
    pytest.param(links, LINKS, {"channels": 3}, TypeError, "channels: expected", "int 3", id="channels-type"),
    pytest.param(links, LINKS, {"channels": "all"}, ValueError, "channels: ", "no channel beside", id="channels-all"),
    pytest.param(links, LINKS, {"channels": "protein1"}, ValueError, "channels: ", "'protein1'", id="channel-protein"),
    pytest.param(
        links, DETAILED, {"channels": ["coexpression"] * 2}, ValueError, "channels: ", "named twice", id="channel-twice"
    ),
    pytest.param(links, EDGES, {}, ValueError, "not a STRING links file: ", "no column 'protein1'", id="links-other-table"),
    pytest.param(edges, EDGES, {"source": "tf"}, ValueError, "source: ", "'source', 'target', 'value'", id="no-column"),
    pytest.param(edges, EDGES, {"target": "source"}, ValueError, "target: ", "'source' is source", id="column-twice"),
    pytest.param(edges, EDGES, {"weight": 2}, TypeError, "weight: expected", "int 2", id="column-type"),
    pytest.param(edges, EDGES, {"sep": "::"}, ValueError, "sep: expected", "'::'", id="sep-long"),
    pytest.param(edges, EDGES, {"sep": 9}, TypeError, "sep: expected", "int 9", id="sep-type"),
    pytest.param(edges, EDGES, {"sep": ","}, ValueError, "source: ", "its columns are", id="sep-other"),
    pytest.param(edges, "", {}, ValueError, "the file is empty", "table.txt", id="empty"),
    pytest.param(edges, "\n\n", {}, ValueError, "the file is empty", "table.txt", id="blank"),
    pytest.param(pairs, PAIRS, {"score": "eps"}, ValueError, "score: ", "no column 'eps'", id="score-missing"),
    pytest.param(pairs, PAIRS, {"split": "fold"}, ValueError, "split: ", "no column 'fold'", id="split-missing"),
    pytest.param(pairs, PAIRS, {"gene_columns": "gene_a"}, TypeError, "gene_columns: expected", "'gene_a'", id="genes-str"),
    pytest.param(pairs, PAIRS, {"gene_columns": ()}, ValueError, "gene_columns: expected", "none", id="genes-none"),
    pytest.param(pairs, PAIRS, {"missing": "skip"}, ValueError, "missing: unknown value", "'drop'", id="missing"),
    pytest.param(pairs, PAIRS, {"repeated": True}, ValueError, "repeated: unknown value", "'drop'", id="repeated"),
    pytest.param(pairs, PAIRS, {"header": "no"}, TypeError, "header: expected a bool", "'no'", id="header"),
    pytest.param(pairs, PAIRS, {"comment": ""}, TypeError, "comment: expected", "''", id="comment"),
    pytest.param(pairs, PAIRS, {"quote": "''"}, ValueError, "quote: expected one ASCII character", "\"''\"", id="quote"),
    pytest.param(
        pairs, PAIRS, {"quote": "\t"}, ValueError, "quote: expected another character than sep", "'\\t'", id="quote-sep"
    ),
    pytest.param(pairs, PAIRS, {"header": False}, TypeError, "gene_columns[0]: expected the number", "'gene_a'", id="numbers"),
    pytest.param(
        edges, EDGES, {"header": False, "source": 0, "target": 4, "weight": None}, ValueError, "target: ", "0 to 3", id="number"
    ),
    pytest.param(
        pairs, PAIRS, {"rename": lambda name: None}, TypeError, "rename: expected a name or", "None", id="rename-none"
    ),
    pytest.param(
        pairs, PAIRS, {"rename": lambda name: [1]}, TypeError, "rename: expected a name or a sequence", "[1]", id="rename-int"
    ),
    pytest.param(pairs, PAIRS, {"gene_columns": ("gene_a", "g")}, ValueError, "gene_columns[1]: ", "'g'", id="genes-missing"),
]


@pytest.mark.parametrize(("read", "text", "options", "error", "argument", "value"), BAD_ARGUMENTS)
def test_bad_argument_is_named(
    tmp_path: Path,
    read: Callable[..., Any],
    text: str,
    options: dict[str, Any],
    error: type[Exception],
    argument: str,
    value: str,
) -> None:
    with pytest.raises(error, match=re.escape(argument)) as caught:
        read(write(tmp_path, text), **options)
    assert value in str(caught.value)


def test_gzip_name_on_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "plain.gz").write_text(LINKS)
    with pytest.raises(ValueError, match=r"plain\.gz: not a gzip file"):
        links(tmp_path / "plain.gz")


def test_truncated_gzip(tmp_path: Path) -> None:
    (tmp_path / "cut.gz").write_bytes(gzip.compress(LINKS.encode())[:-9])
    with pytest.raises(ValueError, match=r"cut\.gz: a damaged gzip file"):
        links(tmp_path / "cut.gz")


def test_missing_file_and_wrong_types(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        links(tmp_path / "nowhere.txt")
    with pytest.raises(TypeError, match="path: expected a path, got int 3"):
        read_string_links(3, GENES)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="genes: expected a GeneList, got list"):
        read_string_links(tmp_path / "x", ["A"])  # type: ignore[arg-type]
