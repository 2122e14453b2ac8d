"""Screens from Python: begun, gone on with, shared out, merged; and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from cellattn import MultiGraph, checkpoint
from cellattn.data import GeneList, PerturbationDataset
from cellattn.nn import PairwiseInteraction
from cellattn.screen import Bins, MeasuredSets, PairFilter, ScreenError, SetSpace, merge, screen, status
from cellattn.screen.run import parse_shard, unit_size

from ..conftest import ROOT
from .examples import EDGES, GRAPH, NAMES, PAIRS, QUIET, model_of, rows_of
from .stubs import Additive, N, Pairs

pytestmark = pytest.mark.xdist_group("processes")  # they start others and watch the clock: one at a time


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


def test_support_of_other_genes_is_refused(tmp_path: Path) -> None:
    data = PerturbationDataset.from_sets([[0, 1]], [0.1], num_genes=N, genes=GeneList([*NAMES[:3], "x", *NAMES[4:]]))
    with pytest.raises(ValueError, match="got 'Y03' in the models and 'x' in the support at position 3"):
        screen(Additive(0), names=NAMES, support=data, out=tmp_path / "s", **QUIET)
    with pytest.raises(ValueError, match="unmeasured: expected support"):
        screen(Additive(0), names=NAMES, unmeasured=True, out=tmp_path / "s", **QUIET)
    sets = SetSpace.combinations(GeneList(NAMES), 2)
    with pytest.raises(ValueError, match="sets: expected no genes, types, filters or unmeasured beside it"):
        screen(Additive(0), names=NAMES, sets=sets, genes=NAMES[:3], out=tmp_path / "s", **QUIET)


def test_the_example_in_the_documentation(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/screens.md").read_text(), flags=re.S)
    monkeypatch.chdir(files[0].parents[1])
    rows: dict[str, Any] = {"roster": NAMES[:9]}
    exec(code, rows)
    assert rows["rows"].collect().shape == (84, 8)


TYPES_BY_GENE = {name: ("deleted", "added")[place % 2] for place, name in enumerate(NAMES)}
KINDS_OF_SETS: dict[str, tuple[dict[str, Any], str]] = {
    "several types": ({"types": ["deleted", "added"]}, "each deleted or added"),
    "types by gene": ({"types": TYPES_BY_GENE}, "types by gene"),
    "one type": ({"types": "added"}, "added"),
    "crossed": ({"genes": [(NAMES[:3], 1), (NAMES[5:9], 2)], "types": ["deleted", "added"]}, "crossed, 3 of 7 genes a set"),
    "listed": ({"sets": SetSpace.listed(GeneList(NAMES), torch.tensor([[0, 1], [5, 4]]))}, "2 of 4 genes a set"),
    "none": ({"filters": [PairFilter(GeneList(NAMES), [(NAMES[0], NAMES[1])], which="any")], "genes": NAMES[2:5]}, "filter: "),
    "equal thresholds": ({"thresholds": (1.0, 1.0, 0.0, -0.0)}, "deleted"),
    "names of many kinds": ({"names": [f"$\\frac_|$ {place}\N{GREEK SMALL LETTER BETA}\n" for place in range(N)]}, "deleted"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS_OF_SETS)
def test_every_kind_of_sets_has_a_page(kind: str, tmp_path: Path) -> None:
    options, told = KINDS_OF_SETS[kind]
    screen([Additive(0), Additive(1)], out=tmp_path / "s", **{"names": NAMES, **options}, **QUIET)
    page = merge(tmp_path / "s", top=5).read_text()
    assert told in next(line for line in page.splitlines() if line.startswith("| of |"))
    ranking = pl.read_parquet(tmp_path / "s/result/ranking.parquet")
    assert len(ranking) == (0 if kind == "none" else min(10, len(rows_of(tmp_path / "s"))))


def test_what_no_model_can_is_no_screen(files: list[Path], tmp_path: Path) -> None:
    """Nothing is left of it, so that the call goes where it was meant to once it is mended."""
    for models in (files, Additive(0)):
        with pytest.raises(ValueError, match=r"^phenotype: expected one below 1, which the model predicts, got 3"):
            screen(models, out=tmp_path / "s", phenotype=3, **QUIET)
        assert not (tmp_path / "s").exists()
    assert screen(files, out=tmp_path / "s", **QUIET).complete


def test_a_folder_that_another_shard_begins_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan appears between the look for it and the look for anything else; over a network that is seconds."""
    screen(Additive(0), out=tmp_path / "s", shard="0/2", unit=50, **QUIET)
    seen: list[Path] = []
    exists = Path.exists

    def later(path: Path, **options: bool) -> bool:
        if path.name == "screen.json" and len(seen) < 2:
            seen.append(path)
            return False
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", later)
    assert screen(Additive(0), out=tmp_path / "s", shard="1/2", unit=50, **QUIET).complete
    assert seen
    seen.clear()
    plan = (tmp_path / "s" / "screen.json").read_bytes()
    with pytest.raises(ScreenError, match="is the folder of another screen: total is 435 there and 4060 here"):
        screen(Additive(0), out=tmp_path / "s", order=3, **QUIET)
    assert seen
    assert (tmp_path / "s" / "screen.json").read_bytes() == plan


class Returns(Additive):
    """A model that returns something else."""

    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(0)
        self.change = change

    def forward(self, seeds: torch.Tensor, ptr: torch.Tensor, types: torch.Tensor) -> Any:
        return self.change(super().forward(seeds, ptr, types))


RETURNED: dict[str, Callable[[torch.Tensor], Any]] = {
    "a row": lambda y: y[None],
    "a scalar": torch.sum,
    "too few": lambda y: y[1:],
    "three dimensions": lambda y: y[:, None, None],
    "complex": lambda y: y + 0j,
    "a dict": lambda y: {"prediction": y},
    "an array": lambda y: y.detach().numpy(),
    "a list": torch.Tensor.tolist,
    "a list of one": lambda y: [3.0],
    "nothing": lambda y: None,
}


@pytest.mark.parametrize("kind", RETURNED)
def test_what_a_model_returns_is_looked_at(kind: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^model: expected (it to return )?predictions"):
        screen(Returns(RETURNED[kind]), out=tmp_path / "s", **QUIET)
    assert not (tmp_path / "s").exists()


def test_no_model_is_asked_for_no_sets(tmp_path: Path) -> None:
    """As filters may leave of the first ranks, or of all."""

    class Counting(Additive):
        def forward(self, seeds: torch.Tensor, ptr: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
            assert len(ptr) > 1
            return super().forward(seeds, ptr, types)

    first = PairFilter(GeneList(NAMES), [(NAMES[0], NAMES[1]), (NAMES[0], NAMES[2]), (NAMES[1], NAMES[2])])
    assert screen(Counting(0), out=tmp_path / "a", names=NAMES, filters=[first], keep="all", **QUIET).complete
    assert len(rows_of(tmp_path / "a")) == PAIRS - 3
    assert screen(Counting(0), out=tmp_path / "b", names=NAMES, filters=[first], genes=NAMES[:3], **QUIET).complete


def test_what_a_model_may_return(tmp_path: Path) -> None:
    kinds: dict[str, Callable[[torch.Tensor], Any]] = {
        "plain": lambda y: y, "tuple": lambda y: (y, None), "list": lambda y: [y], "column": lambda y: y[:, None],
        "columns": lambda y: torch.stack([y, -y], 1), "double": torch.Tensor.double,
    }  # fmt: skip
    for kind, change in kinds.items():
        screen(Returns(change), out=tmp_path / kind, keep="all", **QUIET)
        assert rows_of(tmp_path / kind).equals(rows_of(tmp_path / "plain")), kind


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "models-none": ({"models": None}, "models: expected modules and files, one or several, got None"),
    "models-dict": ({"models": {"a": Additive(0)}}, "models: expected modules and files, one or several, got dict"),
    "models-class": ({"models": Additive}, "models: expected modules and files, one or several, got type"),
    "bins": ({"bins": (-1, 1, 10)}, "bins: expected Bins, got tuple"),
    "filter": (
        {"filters": PairFilter(GeneList(NAMES), [(NAMES[0], NAMES[1])])},
        "filters: expected several filters, got PairFilter",
    ),
    "device": ({"device": 0}, "device: expected one or several, got int 0"),
    "sets": ({"sets": [NAMES[:2]]}, "sets: expected a SetSpace, got list"),
    "support": ({"support": [NAMES[:2]]}, "support: expected a PerturbationDataset, got list"),
    "genes": ({"genes": [0, 1]}, "roster: expected gene names, got int 0"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(case: str, tmp_path: Path) -> None:
    given, message = BAD_ARGUMENTS[case]
    with pytest.raises(TypeError, match=f"^{message}"):
        screen(**{"models": Additive(0), "out": tmp_path / "s", "names": NAMES, **QUIET, **given})
    assert not (tmp_path / "s").exists()


def test_devices_and_rosters_of_other_kinds(tmp_path: Path) -> None:
    screen(Additive(0), out=tmp_path / "a", genes=torch.tensor([3, 1, 2]), device="cpu", keep="all", **QUIET)
    array: Any = np.array([3, 1, 2])
    screen(Additive(0), out=tmp_path / "b", genes=array, device=torch.device("cpu"), keep="all", **QUIET)
    assert rows_of(tmp_path / "a").equals(rows_of(tmp_path / "b"))


class Scaled(Additive):
    """What it predicts is not in its weights alone."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
        return self.factor * super().forward(seeds, ptr, types)


def test_a_model_of_equal_weights_that_predicts_something_else_is_refused(tmp_path: Path) -> None:
    """It would score the units that are left, and the ranking would be of two models."""
    begun = {"out": tmp_path / "s", "unit": 50, "keep": "all", **QUIET}
    screen(Scaled(1.0), shard="0/3", **begun)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    hooked = Scaled(1.0)
    hooked.register_forward_hook(lambda module, given, out: out + 1)
    for other in (Scaled(1.5), Scaled(-1.0), hooked):
        with pytest.raises(ScreenError, match=r"models: Scaled predicts .* for \{0, 1\}, and predicted .* of equal weights"):
            screen(other, **begun)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
    # what another processor may make of it, a difference of larger numbers
    assert screen(Scaled(1.05), **begun).complete
    assert screen(Scaled(1.5), **begun).complete  # nothing is left to score


def test_a_model_of_equal_weights_as_tensors_of_16_bits(tmp_path: Path) -> None:
    model = model_of(0).bfloat16()
    screen(model, GRAPH, out=tmp_path / "s", unit=50, shard="0/3", **QUIET)
    other = model_of(0).bfloat16()
    other.register_forward_hook(lambda module, given, out: out._replace(prediction=2 * out.prediction))
    with pytest.warns(UserWarning, match="batches of sets"), pytest.raises(ScreenError, match="CellTransformer predicts"):
        screen(other, GRAPH, out=tmp_path / "s", unit=50, **QUIET)
    assert screen(model, GRAPH, out=tmp_path / "s", unit=50, **QUIET).complete


@pytest.mark.parametrize("first", [[[1.0]], [["x"]], 3, "[]"], ids=repr)
def test_damaged_predictions_of_the_first_sets(first: Any, tmp_path: Path) -> None:
    screen(Scaled(1.0), out=tmp_path / "s", unit=50, shard="0/3", **QUIET)
    plan = tmp_path / "s" / "screen.json"
    text = json.loads(plan.read_text())
    text["labels"]["first"] = first
    plan.write_text(json.dumps(text))
    with pytest.raises(ScreenError, match=r"^folder: the predictions of the first sets, which it keeps, are damaged"):
        screen(Scaled(1.0), out=tmp_path / "s", unit=50, **QUIET)


class Drawn(Additive):
    """Dropout that evaluation does not turn off."""

    def forward(self, seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
        return super().forward(seeds, ptr, types) + torch.randn(len(ptr) - 1)


def test_predictions_that_are_drawn_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"out": tmp_path / "s", "unit": 50, "num_threads": 1}
    screen([Additive(1), Drawn(0)], shard="0/3", **options)
    said = capsys.readouterr().err
    assert "Drawn predicts other values from call to call" in said
    assert "Additive predicts" not in said
    assert screen([Additive(1), Drawn(0)], **options).complete


def test_a_graph_without_some_of_the_genes_is_refused(tmp_path: Path) -> None:
    """Its genes would have the embeddings of others."""
    fewer = MultiGraph.from_edge_index(EDGES, N - 5, names=NAMES[5:])
    message = f"graph: expected all {N} genes that CellTransformer has embeddings of, .* got one of {N - 5} genes"
    for model in (model_of(0), AveragedModel(model_of(0))):
        with pytest.raises(ValueError, match=message):
            screen(model, fewer, out=tmp_path / "s", **QUIET)
    file = tmp_path / "model.safetensors"
    checkpoint.save(file, model_of(0))
    with pytest.raises(ValueError, match=f"expected all {N} genes that {file.name} has"):
        screen(file, fewer, out=tmp_path / "s", **QUIET)
    assert not (tmp_path / "s").exists()
    # the graph that the model was saved with: rows to spare
    checkpoint.save(file, model_of(0), graph=fewer)
    assert screen(file, fewer, out=tmp_path / "s", **QUIET).complete


def test_what_is_wrapped_is_the_same_screen(tmp_path: Path) -> None:
    model = model_of(0)
    compiled: Any = torch.compile(model, backend="eager")
    for shard, one in enumerate((model, AveragedModel(model), compiled)):
        found = screen(one, GRAPH, out=tmp_path / "s", unit=50, shard=(shard, 3), **QUIET)
    assert found.complete
