"""Screens from Python and from the command line: begun, interrupted, gone on with, shared out, merged; and what is refused."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from benchmarks import train
from cellattn import MultiGraph, checkpoint
from cellattn.data import GeneList, PerturbationDataset
from cellattn.nn import CellTransformer, PairwiseInteraction
from cellattn.screen import Bins, MeasuredSets, PairFilter, ScreenError, SetSpace, merge, screen, status
from cellattn.screen.__main__ import main
from cellattn.screen.run import parse_shard, unit_size

from ..conftest import ROOT
from .stubs import Additive, N, Pairs

pytestmark = pytest.mark.xdist_group("processes")  # they start others and watch the clock: one at a time

NAMES = [f"Y{i:02d}" for i in range(N)]
EDGES = {"a": torch.tensor([[0, 1, 2], [1, 2, 3]])}
GRAPH = MultiGraph.from_edge_index(EDGES, N, names=NAMES)
QUIET: dict[str, Any] = {"progress": False, "num_threads": 1}
PAIRS = N * (N - 1) // 2  # 435


def model_of(seed: int) -> CellTransformer:
    torch.manual_seed(seed)
    return CellTransformer(8, 1, 2, num_types=6, num_genes=N)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints, each with its graph."""
    folder = tmp_path_factory.mktemp("models")
    GRAPH.save(folder / "graph.safetensors")
    found = [folder / f"run{seed}" / "checkpoint.safetensors" for seed in range(2)]
    for seed, file in enumerate(found):
        file.parent.mkdir()
        checkpoint.save(file, model_of(seed), graph=GRAPH, graph_file=folder / "graph.safetensors")
    return found


def rows_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "*.parquet").sort("rank")


# ------------------------------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize("order", [1, 2, 3])
def test_scores_are_those_of_the_models(order: int, files: list[Path], tmp_path: Path) -> None:
    roster = NAMES[3:20:2]
    found = screen(files, out=tmp_path / "s", genes=roster, order=order, keep="all", unit=20, **QUIET)
    assert found.complete
    assert found == status(tmp_path / "s")
    rows = rows_of(tmp_path / "s")
    sets = Pairs(torch.tensor([NAMES.index(name) for name in roster]), order)
    assert found.sets == len(rows) == sets.total
    for place in range(order):
        names = [NAMES[gene] for gene in sets.genes[:, place].tolist()]
        assert rows[f"gene{place + 1}"].cast(pl.String).to_list() == names
    ptr, types = torch.arange(sets.total + 1) * order, torch.ones(sets.total * order, dtype=torch.int64)
    with torch.no_grad():
        models = [model_of(seed).double().eval() for seed in range(2)]
        scores = torch.stack([model(GRAPH, sets.genes.flatten(), ptr, types).prediction[:, 0] for model in models])
    spread = float(scores.std())
    for name, expected in (("mean", scores.mean(0)), ("sd", scores.std(0)), ("min", scores.amin(0)), ("max", scores.amax(0))):
        error = (torch.tensor(rows[name].to_list(), dtype=torch.float64) - expected).abs().max()
        assert error < 1e-5 * max(spread, float(scores.abs().max())), name  # float32 models, a few roundings


def test_modules_need_no_file(tmp_path: Path) -> None:
    found = screen([Additive(0), Additive(1)], out=tmp_path / "s", order=2, keep="all", **QUIET)
    assert found.sets == PAIRS
    assert rows_of(tmp_path / "s")["gene1"].dtype == pl.Enum([str(i) for i in range(N)])
    named = screen(Additive(0), out=tmp_path / "named", names=NAMES, genes=NAMES[:3], keep="all", **QUIET)
    assert named.sets == 3
    assert rows_of(tmp_path / "named")["gene2"].cast(pl.String).to_list() == ["Y01", "Y02", "Y02"]


def test_shards_make_the_whole(files: list[Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": "top:7", "unit": 50, **QUIET}
    screen(files, out=tmp_path / "whole", **options)
    for index in (2, 0, 1):
        found = screen(files, out=tmp_path / "shards", shard=f"{index}/3", **options)
    assert found.complete
    for path in (tmp_path / "whole").glob("unit-*.parquet"):
        assert path.read_bytes() == (tmp_path / "shards" / path.name).read_bytes()


def test_top_is_the_top_of_all(tmp_path: Path) -> None:
    """What units keep and merge chooses is what a sort of everything gives."""
    for name, keep in (("all", "all"), ("top", "top:9"), ("above", "above:1.5")):
        screen([Additive(0), Additive(1)], out=tmp_path / name, names=NAMES, order=3, keep=keep, unit=301, **QUIET)
    everything = rows_of(tmp_path / "all").sort("mean", "rank")
    merge(tmp_path / "top", top=9)
    ranking = pl.read_parquet(tmp_path / "top/result/ranking.parquet")
    assert ranking.equals(pl.concat([everything.head(9), everything.tail(9)]).reverse())
    above = rows_of(tmp_path / "above")
    assert above.equals(everything.filter(pl.col("mean").cast(pl.Float64).abs() >= 1.5).sort("rank"))
    assert 0 < len(above) < len(everything)


def test_certainty(tmp_path: Path) -> None:
    models = [Additive(seed) for seed in range(3)]
    screen(models, out=tmp_path / "all", keep="all", **QUIET)
    screen(models, out=tmp_path / "top", keep="top:5", by="certainty", unit=100, **QUIET)
    page = merge(tmp_path / "top", top=5).read_text()
    everything = rows_of(tmp_path / "all").sort(pl.col("mean").abs() / pl.col("sd"), "rank")
    ranking = pl.read_parquet(tmp_path / "top/result/ranking.parquet")
    assert ranking.equals(everything.tail(5).reverse())
    assert 0 < len(ranking.filter(pl.col("mean") < 0)) < 5  # either sign
    assert "## Most certain" in page
    assert "## Lowest" not in page


def test_float32_in_place_of_bfloat16_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a processor has no instructions for bfloat16: on standard error, and on the page."""
    for multiplies in (True, False):
        out = tmp_path / str(multiplies)
        monkeypatch.setattr("cellattn.screen.run.multiplies_bfloat16", lambda device, multiplies=multiplies: multiplies)
        screen(Additive(0), out=out, dtype=torch.bfloat16)
        assert ("no instructions for bfloat16" in capsys.readouterr().err) is not multiplies
        assert "bfloat16, or float32" in merge(out).read_text()


def test_certainty_needs_several_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="by: expected 'mean' for a single model"):
        screen(Additive(0), out=tmp_path / "s", by="certainty", **QUIET)


def test_tables_are_those_of_all_rows(tmp_path: Path) -> None:
    models = [Additive(seed) for seed in range(2)]
    screen(models, out=tmp_path / "s", names=NAMES, order=3, keep="all", unit=333, thresholds=(-2, 1.5), **QUIET)
    merge(tmp_path / "s")
    rows = rows_of(tmp_path / "s").with_columns(pl.col("^gene.$").cast(pl.String))
    genes = pl.read_parquet(tmp_path / "s/result/genes.parquet")
    assert genes["highest"].to_list() == sorted(genes["highest"], reverse=True)
    assert sorted(genes["gene"]) == NAMES
    for gene, sets, mean, below, above, highest, highest_with, lowest, lowest_with in genes.iter_rows():
        own = rows.filter((pl.col("gene1") == gene) | (pl.col("gene2") == gene) | (pl.col("gene3") == gene))
        assert sets == len(own)
        assert mean == pytest.approx(own["mean"].cast(pl.Float64).mean(), rel=1e-5, abs=1e-6)
        assert below == (own["mean"] < -2).sum()
        assert above == (own["mean"] > 1.5).sum()
        for value, others, row in (
            (highest, highest_with, own.row(int(own["mean"].arg_max() or 0), named=True)),
            (lowest, lowest_with, own.row(int(own["mean"].arg_min() or 0), named=True)),
        ):
            assert value == pytest.approx(row["mean"], rel=1e-6)
            assert sorted([gene, *others.split()]) == [row["gene1"], row["gene2"], row["gene3"]]


def test_page(files: list[Path], tmp_path: Path) -> None:
    screen(files, out=tmp_path / "s", bins=Bins(-1.0, 1.0, 200), unit=100, **QUIET)
    page = merge(tmp_path / "s")
    text = page.read_text()
    assert page.name == "page.md"
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert figures == ["histogram.png", "top.png", "genes.png", "agreement.png"]
    for figure in figures:
        assert (page.parent / figure).read_bytes().startswith(b"\x89PNG")
    assert "| sets scored | 435 |" in text
    assert "run0/checkpoint.safetensors, run1/checkpoint.safetensors" in text
    rows = rows_of(tmp_path / "s")
    best = rows.sort("mean").row(-1, named=True)
    assert f"| {best['rank']:,} | {best['gene1']} | {best['gene2']} | {best['mean']:.4g} |" in text
    assert "nan" not in text
    assert rows_of(tmp_path / "s").shape == rows.shape  # the result is no unit


# ------------------------------------------------------------------------------------------------------- the command line


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


# ------------------------------------------------------------------------------------------------------- names and graphs


def test_names_have_to_agree(files: list[Path], tmp_path: Path) -> None:
    shifted = [*NAMES[:7], "new", *NAMES[7:-1]]
    with pytest.raises(ValueError, match=r"got 'new' in the names and 'Y07' in the run0/checkpoint\.safetensors at position 7"):
        screen(files, out=tmp_path / "s", names=shifted, **QUIET)
    other = MultiGraph.from_edge_index(EDGES, N, names=shifted)
    with pytest.raises(ValueError, match=r"got 'Y07' in the checkpoint\.safetensors and 'new' in the graph at position 7"):
        screen(files[0], other, out=tmp_path / "s", **QUIET)
    other.save(tmp_path / "g")
    checkpoint.save(tmp_path / "m", model_of(2), graph=other, graph_file=tmp_path / "g")
    with pytest.raises(ValueError, match=r"got 'Y07' in the checkpoint\.safetensors and 'new' in the m at position 7"):
        screen([files[0], tmp_path / "m"], out=tmp_path / "s", **QUIET)
    assert not (tmp_path / "s").exists()


def test_a_graph_without_names_works_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = MultiGraph.from_edge_index(EDGES, N)
    checkpoint.save(tmp_path / "m", model_of(0), genes=NAMES, graph=bare)
    bare.save(tmp_path / "g")
    assert cli(tmp_path / "m", "--graph", tmp_path / "g", "--out", tmp_path / "s", "--keep", "all") == 0
    assert "graph of m: has no gene names, so it is not checked that its genes are those of the m" in capsys.readouterr().err
    assert rows_of(tmp_path / "s")["gene1"].dtype == pl.Enum(NAMES)
    assert cli("--model", "tests.screen.stubs:Additive", "--out", tmp_path / "t") == 0
    assert "no gene names anywhere: genes are called by their index" in capsys.readouterr().err


def test_support_of_another_number_of_genes_is_refused(files: list[Path], tmp_path: Path) -> None:
    support = PerturbationDataset.from_sets([[0, 1]], [0.5], num_genes=3)
    with pytest.raises(ValueError, match=rf"^support: expected sets of the models' {N} genes, got of 3"):
        screen(files[0], out=tmp_path / "s", support=support, **QUIET)
    with pytest.raises(TypeError, match=r"^out: expected a folder, got NoneType None"):
        screen(files[0], out=None, **QUIET)  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


def test_another_graph_is_refused(files: list[Path], tmp_path: Path) -> None:
    other = MultiGraph.from_edge_index({"a": torch.tensor([[0, 1], [1, 2]])}, N, names=NAMES)
    with pytest.raises(ValueError, match=r"belongs to a graph with digest [0-9a-f]{12}, got one with [0-9a-f]{12}"):
        screen(files[0], other, out=tmp_path / "s", **QUIET)
    checkpoint.save(tmp_path / "m", model_of(0), graph=GRAPH)
    with pytest.raises(ValueError, match=r"graph: expected one for '.*m': it names none"):
        screen(tmp_path / "m", out=tmp_path / "s", **QUIET)
    GRAPH.save(tmp_path / "gone")
    checkpoint.save(tmp_path / "m", model_of(0), graph=GRAPH, graph_file=tmp_path / "gone")
    (tmp_path / "gone").unlink()
    with pytest.raises(ValueError, match=r"graph: expected one for '.*m': '.*gone', which it names, is not there"):
        screen(tmp_path / "m", out=tmp_path / "s", **QUIET)


def test_another_default_device_changes_nothing(files: list[Path], tmp_path: Path) -> None:
    """On meta, since what goes there by mistake is lost on any machine."""
    support = PerturbationDataset.from_sets([["Y01", "Y02"]], [0.5], genes=GeneList(NAMES))
    pair = torch.tensor([[1, 2]])
    (tmp_path / "sets").write_text("Y03\tY04\nY05\tY06\n")
    screens: dict[str, dict[str, Any]] = {
        "pairs": {"order": 2, "support": support, "unmeasured": True},
        "crossed": {"genes": [(NAMES[:4], 1), (NAMES[4:9], 1)], "keep": "all"},
    }
    for name, options in screens.items():
        screen(files, out=tmp_path / name, **QUIET, **options)
        merge(tmp_path / name)
        with torch.device("meta"):
            filters = [PairFilter(GeneList(NAMES), [("Y07", "Y08")])]
            assert (
                SetSpace.from_file(tmp_path / "sets", GeneList(NAMES), filters=filters).block(0, 2).genes.device.type == "cpu"
            )
            measured = MeasuredSets.of(support)
            assert measured.digest() == MeasuredSets.of(support).digest()
            assert measured.holds(pair).tolist() == [True]
            assert measured.support(pair).tolist() == [[0, 1]]
            assert screen(files, out=tmp_path / f"{name}-meta", **QUIET, **options).complete
            assert status(tmp_path / f"{name}-meta").complete
            merge(tmp_path / f"{name}-meta")
        for file in ("unit-00000000.parquet", "result/ranking.parquet", "result/genes.parquet"):
            assert pl.read_parquet(tmp_path / name / file).equals(pl.read_parquet(tmp_path / f"{name}-meta" / file))


def test_a_model_that_reads_no_graph_needs_none(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", PairwiseInteraction(8, num_types=6, num_genes=N), genes=NAMES)
    assert screen(tmp_path / "m", out=tmp_path / "s", **QUIET).sets == PAIRS


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"genes": ["Y01", "Y2"]}, "roster: 1 of its names .* not in the gene list: 'Y2' .nearest: 'Y", id="unknown gene"
        ),
        pytest.param({"genes": ["Y01", "Y02", "Y01"]}, "roster: 'Y01' stands more than once", id="repeated gene"),
        pytest.param({"order": 0}, "order: expected at least 1, got 0", id="order 0"),
        pytest.param({"order": 5}, "order: expected", id="order 5"),
        pytest.param({"shard": "0/0"}, "shard: expected n of at least 1 in i/n, got 0/0", id="no shards"),
        pytest.param({"shard": "4/4"}, "shard: expected i from 0 to 3 in i/4, got 4", id="shard out of range"),
        pytest.param({"shard": "-1/4"}, "shard: expected i from 0 to 3 in i/4, got -1", id="negative shard"),
        pytest.param({"shard": "half"}, "shard: expected i/n, such as 0/4, got 'half'", id="no shard"),
        pytest.param({"keep": "best:5"}, "keep: expected", id="keep"),
        pytest.param({"keep": "top:0"}, "keep: expected", id="top 0"),
        pytest.param({"keep": "above:high"}, "keep: expected", id="above what"),
        pytest.param({"unit": 0}, "unit: expected at least 1, got 0", id="unit"),
        pytest.param({"engine": "slurm"}, "engine: unknown value 'slurm', expected one of 'local', 'ray'", id="engine"),
        pytest.param({"dtype": torch.int8}, "dtype: expected one of", id="dtype"),
        pytest.param({"device": []}, "device: expected at least one, got none", id="device"),
        pytest.param({"device": "gpu"}, "device: expected a device, got str 'gpu'", id="no device"),
        pytest.param({"device": ["cpu", "meta"]}, "device: expected one that holds values, got 'meta'", id="meta"),
        pytest.param({"device": "cuda:99"}, "device: 'cuda:99' is not there: ", id="absent device"),
        pytest.param(
            {"thresholds": (0.5, float("nan"))}, r"thresholds\[1\]: expected a finite number, got float nan", id="nan"
        ),
        pytest.param({"phenotype": 1}, "phenotype: ", id="phenotype"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        screen(files, out=tmp_path / "s", **{**QUIET, **options})
    assert not list(tmp_path.glob("s/unit-*"))


def test_bad_models(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="models: expected at least one, got none"):
        screen([], out=tmp_path / "s", **QUIET)
    with pytest.raises(FileNotFoundError):
        screen(tmp_path / "none", out=tmp_path / "s", **QUIET)
    with pytest.raises(ValueError, match=r"run0/checkpoint\.safetensors 2 is the same model as run0/checkpoint\.safetensors 1"):
        screen([files[0], files[0]], out=tmp_path / "s", **QUIET)
    with pytest.raises(ValueError, match="models: expected equal numbers of genes, got"):
        screen([Additive(0), Additive(0, N + 1)], out=tmp_path / "s", **QUIET)
    with pytest.raises(TypeError, match="models: expected modules and files, got int 3"):
        screen([3], out=tmp_path / "s", **QUIET)  # type: ignore[list-item]
    (tmp_path / "torn").write_bytes(files[0].read_bytes()[:-10])
    with pytest.raises(ValueError, match="torn' is not a complete safetensors file"):
        screen(tmp_path / "torn", out=tmp_path / "s", **QUIET)
    assert not (tmp_path / "s").exists()


def test_predictions_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = Additive(0)
    model.effect.data[5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"Additive predicts nan for \{Y00, Y05\}"):
        screen(model, out=tmp_path / "s", names=NAMES, **QUIET)


def test_the_folder_of_another_screen_is_refused(files: list[Path], tmp_path: Path) -> None:
    screen(files, out=tmp_path / "s", unit=100, **QUIET)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    for options, message in (
        ({"order": 3}, "total is 435 there and 4060 here"),
        ({"genes": NAMES[1:]}, "total is 435 there and 406 here"),
        ({"types": "added"}, r"sets\.types is 'deleted' there and 'added' here"),
        ({"keep": "all"}, r"keep\.rule is 'top:10000' there and 'all' here"),
    ):
        with pytest.raises(ScreenError, match=f"is the folder of another screen: .*{message}"):
            screen(files, out=tmp_path / "s", **{"unit": 100, **QUIET, **options})
    with pytest.raises(ScreenError, match=r"is the folder of another screen: digests\.models"):
        screen(files[::-1], out=tmp_path / "s", unit=100, **QUIET)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before


def test_shards_in_words() -> None:
    assert parse_shard(None) is None
    assert parse_shard("1/4") == parse_shard((1, 4)) == (1, 4)
    with pytest.raises(TypeError, match=r"shard: expected 'i/n' or \(i, n\), got float 0.5"):
        parse_shard(0.5)  # type: ignore[arg-type]


def test_units_are_a_hundredth_within_bounds() -> None:
    assert [unit_size(total) for total in (1, 10**6, 41_873_160, 48_000_000_000)] == [4096, 10_000, 418_732, 1_000_000]


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


def test_support_of_other_genes_is_refused(tmp_path: Path) -> None:
    data = PerturbationDataset.from_sets([[0, 1]], [0.1], num_genes=N, genes=GeneList([*NAMES[:3], "x", *NAMES[4:]]))
    with pytest.raises(ValueError, match="got 'Y03' in the models and 'x' in the support at position 3"):
        screen(Additive(0), names=NAMES, support=data, out=tmp_path / "s", **QUIET)
    with pytest.raises(ValueError, match="unmeasured: expected support"):
        screen(Additive(0), names=NAMES, unmeasured=True, out=tmp_path / "s", **QUIET)
    sets = SetSpace.combinations(GeneList(NAMES), 2)
    with pytest.raises(ValueError, match="sets: expected no genes, types, filters or unmeasured beside it"):
        screen(Additive(0), names=NAMES, sets=sets, genes=NAMES[:3], out=tmp_path / "s", **QUIET)


# ------------------------------------------------------------------------------------------------------- what is documented


def test_the_sbatch_file_as_it_is(files: list[Path], tmp_path: Path) -> None:
    """Run as Slurm would run the second of three tasks."""
    words = [str(files[0]), "--out", str(tmp_path / "s"), "--unit", "100", "--quiet"]
    slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_CPUS_PER_TASK": "1", "PYTHON": sys.executable}
    subprocess.run(["bash", ROOT / "docs/screen.sbatch", *words], cwd=ROOT, env={**os.environ, **slurm}, check=True)
    assert status(tmp_path / "s").missing == (0, 2, 3)


def test_the_example_in_the_documentation(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/screens.md").read_text(), flags=re.S)
    monkeypatch.chdir(files[0].parents[1])
    rows: dict[str, Any] = {"roster": NAMES[:9]}
    exec(code, rows)
    assert rows["rows"].collect().shape == (84, 8)


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
