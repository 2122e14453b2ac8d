"""Screens from the command line: begun, interrupted, gone on with; what it says, and what it refuses."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from benchmarks import train
from cellattn import MultiGraph, checkpoint
from cellattn.data import GeneList
from cellattn.screen import ScreenError, read_roster, screen, status
from cellattn.screen.__main__ import main, read_measured
from cellattn.screen.store import Store

from ..conftest import ROOT
from .examples import EDGES, NAMES, PAIRS, QUIET, model_of, rows_of
from .stubs import Additive, N

pytestmark = pytest.mark.xdist_group("processes")  # they start others and watch the clock: one at a time


def cli(*words: str | Path) -> int:
    return main([str(word) for word in words])


def test_three_lines(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roster = tmp_path / "roster.txt"
    roster.write_text("# my genes\n" + "".join(f"{name}\n" for name in NAMES[:12]))
    out = tmp_path / "s"
    assert cli(files[0], files[1], "--genes", roster, "--order", "3", "--out", out, "--unit", "50", "--shard", "0/2") == 0
    assert cli("status", out) == 3
    assert "3 of 5 units done" in capsys.readouterr().out
    assert cli("merge", out) == 1
    assert "is not complete: missing units 1, 3; the same run again does the rest" in capsys.readouterr().err
    assert not (out / "result").exists()
    assert cli("run", files[0], files[1], "--genes", roster, "--order", "3", "--out", out, "--unit", "50") == 0
    said = capsys.readouterr()
    assert "3 of 5 units are there already" in said.err
    assert "5 of 5 units done" in said.out
    assert cli("status", out) == 0
    assert cli("merge", out) == 0
    assert capsys.readouterr().out.endswith(f"{out / 'result' / 'page.md'}\n")


def test_ctrl_c_and_on(tmp_path: Path) -> None:
    """A real one: the current unit is dropped, the way to go on said, and what was done is not done again."""
    code = (
        "import sys, time\n"
        "from tests.screen.stubs import Additive\n"
        "from cellattn.screen.__main__ import main\n"
        "plain = Additive.forward\n"
        "def forward(self, *sets):\n"
        "    time.sleep(0.1)\n"
        "    return plain(self, *sets)\n"
        "Additive.forward = forward\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["--model", "tests.screen.stubs:Additive", "--out", str(tmp_path / "s"), "--unit", "20"]
    command = [sys.executable, "-c", code, *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(list((tmp_path / "s").glob("unit-*.json"))) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in said
    found = status(tmp_path / "s")
    assert 3 <= found.done < 22
    assert not found.damaged
    assert f"interrupted: {found.done} of 22 units are done; the same command, or the same call, goes on from here" in said
    assert not [path.name for path in (tmp_path / "s").iterdir() if path.name.startswith(".")]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("unit-*")}
    assert cli(*words) == 0
    assert {name: (tmp_path / "s" / name).stat().st_mtime_ns for name in before} == before
    assert status(tmp_path / "s").complete


def test_damage_is_said_and_mended(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[str | Path] = [files[0], "--out", tmp_path / "s", "--unit", "100"]
    assert cli(*words) == 0
    data = tmp_path / "s/unit-00000002.parquet"
    data.write_bytes(data.read_bytes()[:-3])
    capsys.readouterr()
    assert cli("merge", tmp_path / "s") == 1
    assert "damaged unit 2 (unit-00000002.parquet has " in capsys.readouterr().err
    assert cli(*words) == 0
    assert "unit 2 is damaged and is computed again: unit-00000002.parquet has" in capsys.readouterr().err
    assert cli("merge", tmp_path / "s") == 0


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[str | Path] = ["--model", "tests.screen.stubs:Additive", "--out", tmp_path / "s", "--unit", "100"]
    real, left = os.fsync, 12

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert cli(*words) == 1
    said = capsys.readouterr().err
    wanted = r"error: .*no room for '.*s': No space left on device; 1 of 5 units are done; make room, and the same command"
    assert re.search(wanted, said)
    assert cli(*words) == 0
    assert status(tmp_path / "s").complete


def test_a_graph_without_names_works_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = MultiGraph.from_edge_index(EDGES, N)
    checkpoint.save(tmp_path / "m", model_of(0), genes=NAMES, graph=bare)
    bare.save(tmp_path / "g")
    assert cli(tmp_path / "m", "--graph", tmp_path / "g", "--out", tmp_path / "s", "--keep", "all") == 0
    assert "graph of m: has no gene names, so it is not checked that its genes are those of the m" in capsys.readouterr().err
    assert rows_of(tmp_path / "s")["gene1"].dtype == pl.Enum(NAMES)
    assert cli("--model", "tests.screen.stubs:Additive", "--out", tmp_path / "t") == 0
    assert "no gene names anywhere: genes are called by their index" in capsys.readouterr().err


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("status", tmp_path) == 1
    assert "is no screen: there is no screen.json" in capsys.readouterr().err
    assert cli("--model", "tests.screen.stubs", "--out", tmp_path / "s") == 1
    assert "model: expected package.module:function, got 'tests.screen.stubs'" in capsys.readouterr().err
    assert cli("--model", "tests.screen.stubs:Nothing", "--out", tmp_path / "s") == 1
    assert "model: 'tests.screen.stubs:Nothing' is not found" in capsys.readouterr().err
    assert cli("--model", "tests.screen.stubs:Additive", "--out", tmp_path / "s", "--bins", "1:2") == 1
    assert "bins: expected low:high:number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli("--help")
    assert "go" in capsys.readouterr().out


def test_numbers_that_begin_with_a_minus(tmp_path: Path) -> None:
    """As the help has them, without "=" between."""
    words: list[str | Path] = ["--model", "tests.screen.stubs:Additive", "--quiet", "--out", tmp_path / "s"]
    assert cli(*words, "--bins", "-4:4:100", "--thresholds", "-1e-3", "-.5", "2") == 0
    plan = Store.read(tmp_path / "s").plan
    assert plan["bins"] == {"low": -4.0, "high": 4.0, "number": 100}
    assert plan["thresholds"] == [-1e-3, -0.5, 2.0]


@pytest.mark.parametrize("option", ["--genes", "--names"])
def test_a_roster_has_one_name_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    """Of a line with two the second would be lost."""
    (roster := tmp_path / "roster").write_text("".join(f"{a}\t{b}\n" for a, b in zip(NAMES[::2], NAMES[1::2], strict=True)))
    assert cli("--model", "tests.screen.stubs:Additive", option, roster, "--out", tmp_path / "s", "--quiet") == 1
    assert f"{roster}: expected one name a line, got 2 columns" in capsys.readouterr().err
    roster.write_text("Y00\t\nY01\t\n")
    assert list(read_roster(roster)) == ["Y00", "Y01"]


def test_files_of_pairs_labels_and_measured_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A # within a label is one of its characters; a file without lines is no filter; gene_id is no member of a set."""
    (names := tmp_path / "names").write_text("\n".join(NAMES) + "\n")
    (empty := tmp_path / "empty").write_text("# nothing\n")
    words: list[str | Path] = ["--model", "tests.screen.stubs:Additive", "--names", names, "--keep", "all", "--quiet"]
    assert cli(*words, "--apart", empty, "--out", tmp_path / "all") == 0  # no pairs are to be left out
    (apart := tmp_path / "apart").write_text("Y00\tY01 #together\nY00\tY02#x\nY01\tY02\t# also\n")
    assert cli(*words, "--apart", apart, "--out", tmp_path / "but three") == 0
    assert len(rows_of(tmp_path / "all")) - len(rows_of(tmp_path / "but three")) == 3
    for option in ("--together", "--labels", "--positions"):
        assert cli(*words, option, empty, "--out", tmp_path / "none") == 1
        assert f"{empty}: the file is empty, expected lines of " in capsys.readouterr().err
    labels, told = (
        tmp_path / "labels",
        ["Y00\tcomplex #1", "Y01\tcomplex #2\t# not the first", "  # Y02\tx", "Y02\tcomplex #1 # so"],
    )
    labels.write_text("\n".join(told) + "\n")
    (few := tmp_path / "few").write_text("Y00\nY01\nY02\n")
    assert cli(*words, "--genes", few, "--labels", labels, "--out", tmp_path / "a") == 0
    rows = rows_of(tmp_path / "a").select(pl.col("^gene.$").cast(pl.String)).rows()
    assert sorted(rows) == [("Y00", "Y01"), ("Y01", "Y02")]
    table = tmp_path / "measured.tsv"
    table.write_text("gene_a\tgene_b\tgene_id\tscore\nY00\tY01\t851\t-1.0\n")
    assert cli(*words, "--genes", few, "--support", table, "--unmeasured", "--out", tmp_path / "b") == 0
    assert len(rows_of(tmp_path / "b")) == 2
    assert "unknown" not in capsys.readouterr().err
    pairs = ("gene_A\tgeneB", "gene1\tgene_2", "gene\tgene_partner", "gene_query\tgene_array")
    for header, members in (*((pair, "Y00\tY01") for pair in pairs), ("gene", "Y00")):
        table.write_text(f"{header}\tgene_id\tscore\n{members}\t851\t-1.0\n")
        measured = read_measured(table, GeneList(NAMES))
        assert measured.y is not None
        assert (measured.seeds.tolist(), measured.y.tolist()) == (list(range(len(members.split()))), [-1.0])


def test_crossed_rosters_types_and_filters(tmp_path: Path) -> None:
    """What the command line makes is what the same sets from Python give."""

    def write(name: str, *lines: str) -> Path:
        (tmp_path / name).write_text("\n".join(["# a comment", *lines]) + "\n")
        return tmp_path / name

    few, many, names = write("few", *NAMES[:4]), write("many", *NAMES[4:12]), write("names", *NAMES)
    apart = write("apart", "Y00\tY04", "Y01\tY05")
    labels = write("labels", *(f"{name}\tarm {i % 5}" for i, name in enumerate(NAMES)))
    positions = write("positions", *(f"{name}\tI\t{1000 * i}" for i, name in enumerate(NAMES)))
    words: list[str | Path] = ["--model", "tests.screen.stubs:Additive", "--names", names, "--keep", "all", "--quiet"]
    crossed = ["--genes", f"{few}:1", "--genes", f"{many}:2"]
    assert cli(*words, *crossed, "--apart", apart, "--labels", labels, "--out", tmp_path / "a") == 0
    sets = {tuple(sorted((a, b, c))) for a in NAMES[:4] for b in NAMES[4:12] for c in NAMES[4:12] if b < c}
    stay = {
        s
        for s in sets
        if not {"Y00", "Y04"} <= set(s) and not {"Y01", "Y05"} <= set(s) and len({NAMES.index(x) % 5 for x in s}) == 3
    }
    rows = rows_of(tmp_path / "a").select(pl.col("^gene.$").cast(pl.String))
    assert {tuple(sorted(row)) for row in rows.iter_rows()} == stay
    assert len(rows) == len(stay) < len(sets)
    words += ["--genes", few, "--types", "deleted", "overexpressed", "--positions", positions, "--distance", "1500"]
    assert cli(*words, "--together", apart, "--out", tmp_path / "none") == 0
    assert rows_of(tmp_path / "none").columns == ["rank", "gene1", "gene2", "type1", "type2", "mean", "sd"]
    assert cli(*words, "--out", tmp_path / "b") == 0
    typed = rows_of(tmp_path / "b").select(pl.col("^(gene|type).$").cast(pl.String))
    assert len(typed) == 4 * 3  # of each of Y00 Y02, Y00 Y03, Y01 Y03
    assert set(typed["type1"]) == {"deleted", "overexpressed"}
    listed = write("sets", "Y03\tY01", "Y20\tY29")
    assert cli(*words[:7], "--sets", listed, "--out", tmp_path / "c") == 0
    assert rows_of(tmp_path / "c").select(pl.col("^gene.$").cast(pl.String)).rows() == [("Y01", "Y03"), ("Y20", "Y29")]


def test_support(tmp_path: Path) -> None:
    table = tmp_path / "measured.tsv"
    table.write_text("gene_a\tgene_b\tscore\nY00\tY01\t-1.0\nY01\tY02\t0.5\nY05\tY06\t\n")
    (tmp_path / "names").write_text("\n".join(NAMES) + "\n")
    words: list[str | Path] = ["--model", "tests.screen.stubs:Additive", "--names", tmp_path / "names", "--support", table]
    words += ["--keep", "all", "--unit", "100", "--quiet"]
    assert cli(*words, "--out", tmp_path / "all") == 0
    rows = rows_of(tmp_path / "all")
    measured = [{"Y00", "Y01"}, {"Y01", "Y02"}]
    for row in rows.with_columns(pl.col("^gene.$").cast(pl.String)).iter_rows(named=True):
        shared = [len({row["gene1"], row["gene2"]} & other) for other in measured]
        assert (row["share1"], row["share2"]) == (shared.count(1), shared.count(2))
        assert row["outside"] == (not -1.0 <= row["mean"] <= 0.5)
    assert cli(*words, "--unmeasured", "--out", tmp_path / "rest") == 0
    assert rows_of(tmp_path / "rest").equals(rows.filter(pl.col("share2") == 0))
    with pytest.raises(ScreenError, match="is the folder of another screen"):
        screen(Additive(0), names=NAMES, out=tmp_path / "all", keep="all", unit=100, **QUIET)


def test_the_sbatch_file_as_it_is(files: list[Path], tmp_path: Path) -> None:
    """Run as Slurm would run the second of three tasks."""
    words = [str(files[0]), "--out", str(tmp_path / "s"), "--unit", "100", "--quiet"]
    slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_CPUS_PER_TASK": "1", "PYTHON": sys.executable}
    subprocess.run(["bash", ROOT / "docs/screen.sbatch", *words], cwd=ROOT, env={**os.environ, **slurm}, check=True)
    assert status(tmp_path / "s").missing == (0, 2, 3)


FILES: dict[str, bytes] = {
    "pairs": b"\xef\xbb\xbfY01\tY02\r\n",  # as spreadsheets write them
    "latin": "Y01\tY02\n# caf\xe9\n".encode("latin-1"),
    "spaces": b"# two genes\nY01 Y02\n",
    "wide": "Y01\tY02\n".encode("utf-16"),
    "base": b"Y01\tI\t1,000\n",
    "header": b"gene\tchromosome\tbase\nY01\tI\t1000\n",
    "huge": b"Y01\tI\t99999999999999999999\n",
    "twice": b"Y01\tI\t1000\nY02\tI\t5\nY01\tI\t9\n",
    "places": b"Y01\tI\t1000\n",
    "sets": b"Y01\tY02\n",
}
BESIDE = "sets: the sets of a file are screened as they are, expected none of "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--apart latin", "latin, line 2: not UTF-8 text"),
        ("--apart spaces", "spaces, line 2: expected 2 columns with tabs between them, got 'Y01 Y02'"),
        ("--positions base", "base, line 1: expected a base as a whole number, got '1,000'"),
        ("--positions header", "header, line 1: expected a base as a whole number, got 'base'"),
        ("--positions huge", "huge, line 1: expected a base as a whole number, got '99999999999999999999'"),
        ("--positions twice", "twice, line 3: gene 'Y01' stands at ('I', 1000) already, got ('I', 9)"),
        ("--distance 5", "distance: expected --positions, which says where genes are, got none"),
        ("--sets sets --apart pairs", BESIDE + "--apart"),
        ("--sets sets --genes pairs --order 2", BESIDE + "--genes, --order"),
        ("--sets sets --positions places --labels pairs", BESIDE + "--labels, --positions"),
        ("--sets sets --together pairs --unmeasured", BESIDE + "--together, --unmeasured"),
        ("--sets sets --types deleted added", BESIDE + "--types of more than one word"),
        ("--bins=-1e308:1e308:10", "bins: expected ends that float64 tells apart"),
        ("--bins 1:1.0000000000000002:10", "bins: expected ends that float64 tells apart"),
        ("--bins=-8:8:10000001", "bins: expected a number of them from 1 to 10,000,000, got 10000001"),
        ("--device gpu", "device: expected a device, got str 'gpu'"),
        ("--model math:sqrt", "model: math:sqrt() raised TypeError: math.sqrt() takes exactly one argument (0 given)"),
        ("--model os:getpid", "model: expected a module of os:getpid(), got int "),
    ],
)
def test_files_and_words_that_do_not_fit(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None is taken for something else, or left aside: each ends in one line, and before there is a folder."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    Path("names").write_text("\n".join(NAMES))
    model = [] if "--model" in words else ["--model", "tests.screen.stubs:Additive"]
    assert cli(*model, "--names", "names", "--out", "s", *words.split()) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert not Path("s").exists()


@pytest.mark.parametrize("name", ["pairs", "wide"])
def test_files_of_pairs_as_other_programs_write_them(name: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("\n".join(NAMES))
    (tmp_path / name).write_bytes(FILES[name])
    words: list[str | Path] = ["--model", "tests.screen.stubs:Additive", "--names", tmp_path / "names", "--keep", "all"]
    assert cli(*words, "--apart", tmp_path / name, "--out", tmp_path / "s", "--quiet") == 0
    assert len(rows_of(tmp_path / "s")) == PAIRS - 1


def test_no_folder_is_not_this_folder(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of `--out "$OUT"` where nobody has set it."""
    monkeypatch.chdir(tmp_path)
    for call in (main, train.main):
        with pytest.raises(SystemExit):
            call([str(files[0]), "--out", ""] if call is main else ["--out", ""])
        assert "argument --out: expected a folder, got ''" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_command_that_is_spelled_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("statsu", "s") == 2
    assert "error: unknown command 'statsu', did you mean 'status'?" in capsys.readouterr().err
