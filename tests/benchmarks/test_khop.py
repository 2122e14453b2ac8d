"""The harness of the k-hop benchmark at tiny sizes: what is wrong, dies or cannot run is a line without a speed."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import cellattn
from benchmarks import measure, report
from benchmarks.khop import bench, fill, peers, tables, targets, workers
from benchmarks.khop import plan as plans
from benchmarks.khop.peers import Collated, Definition, Ours
from benchmarks.khop.plan import Row
from benchmarks.methods import bench as method_steps
from benchmarks.screen import speed as screen_speed
from benchmarks.training import tables as training_tables
from cellattn import MultiGraph, reference
from cellattn.data import synthetic_cell

from ..compare import random_graph

N, B = 60, 5
GRAPH = random_graph(N, {"a": 40, "b": 130, "none": 0})
SEEDS, PTR = workers.draw_sets(N, B)
PLAN = plans.Plan(
    device="cpu", genes=40, set_counts=(4, 9), hops=(1, 2, 3), compared=3, heaps=("kept",), relations=("physical",), features=3,
    curve_sets=(4, 70), curve_genes=(32,), curve_small_sets=(4, 66), count_sets=11, count_sizes=(1, 3), fill_bytes=2**14,
    seconds=300.0, seconds_each=0.0, repeats=3,
)  # fmt: skip


def importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except Exception:  # not there, or built for another torch
        return False
    return True


INSTALLED = [name for name in peers.PEERS if importable(peers.PACKAGES[name])]


def bench_of(graph: MultiGraph = GRAPH, **changes: Any) -> workers.Bench:
    return workers.Bench(replace(PLAN, **changes), graph, "default")


def row_of(**facts: Any) -> Row:
    return {"kind": "extract", "implementation": "peer", "heap": "default", "sets": 4, "hops": 1, **facts}


# ----------------------------------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize("num_hops", [0, 1, 2, 3])
def test_definition_is_the_reference(num_hops: int) -> None:
    definition = Definition(GRAPH)
    keep = definition.keep(SEEDS, PTR, num_hops)
    assert torch.equal(keep, reference.khop_mask(GRAPH, SEEDS, PTR, num_hops))
    samples = reference.khop_subgraph(GRAPH, SEEDS, PTR, num_hops)
    counts = [[sample["edge_index"][name].shape[1] for name in GRAPH.relations] for sample in samples]
    assert definition.num_edges(keep).tolist() == counts


def test_exact_product_is_the_reference() -> None:
    keep = Definition(GRAPH).keep(SEEDS, PTR, 1)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=g, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(B, N, 3, generator=g, dtype=torch.float64)
    want = reference.masked_spmm(GRAPH, "b", x, keep)
    out, dx = peers.exact_product(GRAPH, "b", keep, x, upstream)
    torch.testing.assert_close(out, want.detach())
    torch.testing.assert_close(dx, torch.autograd.grad(want, x, upstream)[0])


@pytest.mark.parametrize("size", [1, 3, 7])
def test_drawn_sets_hold_different_genes(size: int) -> None:
    seeds, ptr = workers.draw_sets(8, 50, size=size)
    assert ptr.diff().tolist() == [size] * 50
    assert all(len(set(genes)) == size for genes in seeds.view(50, size).tolist())
    assert not torch.equal(seeds, workers.draw_sets(8, 50, size=size, seed=1)[0])


def test_words_are_unpacked_as_the_operator_does() -> None:
    seeds, ptr = workers.draw_sets(N, 70)
    words = cellattn.khop_mask(GRAPH, seeds, ptr, 1, packed=True)
    mask = cellattn.khop_mask(GRAPH, seeds, ptr, 1)
    assert torch.equal(workers.unpacked(words, 70), mask)
    assert torch.equal(workers.unpacked(words, 70, [69, 63, 64]), mask[[69, 63, 64]])


# ----------------------------------------------------------------------------------------------------------------- peers


def difference(num_hops: int, got: Collated, pairs_of: Any = range(B)) -> str | None:
    definition = Definition(GRAPH)
    keep = definition.keep(SEEDS, PTR, num_hops)
    return definition.difference(keep, definition.num_edges(keep), got, pairs_of)


@pytest.mark.parametrize("num_hops", [0, 1, 3])
@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_return_equal_sets(name: str, num_hops: int) -> None:
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed")
    peer = peers.PEERS[name](GRAPH)
    got = peer.collated(peer(SEEDS, PTR, num_hops))
    assert difference(num_hops, got) is None
    assert str(got.edge_index["b"].dtype) == f"torch.{peers.INDEX[name]}"


@pytest.mark.parametrize("name", peers.variants())
def test_variants_return_equal_sets(name: str) -> None:
    options, portable = peers.variants()[name]
    ours = Ours(GRAPH, **options)
    with workers.portable_loops(portable):
        ours(SEEDS, PTR, 3)
        batch = ours(SEEDS, PTR, 2)
    assert difference(2, ours.collated(batch)) is None
    assert (batch.edge_id is not None) == ("edge ids" in name)
    assert (batch.layout, str(batch.node.dtype)) == (name.split()[2].rstrip(",").lower(), f"torch.{name.split()[1]}")
    assert (ours._last is batch) == ("reused" in name)


def test_output_bytes_are_those_of_the_arrays() -> None:
    ours = Ours(GRAPH, torch.int32, "csr", True)
    batch = ours(SEEDS, PTR, 2)
    v, e, k = batch.num_nodes, batch.num_edges(), len(GRAPH.relations)
    assert ours.num_bytes(batch) == 5 * v + 4 * (e + e + k * (v + 1))
    batch = Ours(GRAPH)(SEEDS, PTR, 2)
    assert ours.num_bytes(batch) == 9 * v + 16 * e


def right(num_hops: int = 1) -> Collated:
    ours = Ours(GRAPH)
    got = ours.collated(ours(SEEDS, PTR, num_hops))
    return got._replace(edge_index={name: edges.clone() for name, edges in got.edge_index.items()}, node=got.node.clone())


def other_gene(got: Collated) -> None:
    got.node[0] = next(gene for gene in range(N) if gene not in got.node[: got.node_ptr[1]])


def gene_elsewhere(got: Collated) -> None:
    got.node_ptr[1] += 1


def other_edge(got: Collated) -> None:
    """Of the same sample, of which the other edges are as they should be."""
    edges = got.edge_index["b"]
    present = set(map(tuple, edges.T.tolist()))
    first, last = got.node_ptr[:2].tolist()
    edges[:, 0] = torch.tensor(
        next((i, j) for i in range(first, last) for j in range(first, last) if (i, j) not in present)
    )  # fmt: skip


def leaving_edge(got: Collated) -> None:
    got.edge_index["b"][1, 0] = got.node_ptr[1]


def turned_edges(got: Collated) -> None:
    got.edge_index["b"] = got.edge_index["b"].flip(0)


def edge_short(got: Collated) -> None:
    got.edge_index["b"] = got.edge_index["b"][:, :-1]


def edge_of_the_next(got: Collated) -> None:
    got.edge_ptr["b"][1] -= 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_gene, "node: other genes"),
        (gene_elsewhere, "node_ptr"),
        (other_edge, "b: other edges in sample 0"),
        (leaving_edge, "b: an edge of sample 0 leaves it"),
        (turned_edges, "b: other edges in sample"),
        (edge_short, "b: .* edges where the samples have"),
        (edge_of_the_next, "b: .* edges where the samples have"),
    ],
)
def test_a_wrong_batch_is_found(spoil: Any, message: str) -> None:
    got = right()
    assert difference(1, got) is None
    spoil(got)
    found = difference(1, got)
    assert found is not None
    assert re.match(message, found), found


def test_the_order_of_edges_is_free() -> None:
    got = right()
    for name in GRAPH.relations:
        ptr = got.edge_ptr[name].tolist()
        parts = [got.edge_index[name][:, i:j].flip(1) for i, j in pairwise(ptr)]
        got.edge_index[name] = torch.cat(parts, 1)
    assert difference(1, got) is None


# ------------------------------------------------------------------------------------------------------------- outcomes


class Spoiled(Ours):
    def collated(self, result: Any) -> Collated:
        got = super().collated(result)
        return got._replace(node=got.node.flip(0))


def test_a_wrong_result_gets_no_speed() -> None:
    outcome = workers.measure_extraction(bench_of(), row_of(), lambda: Spoiled(GRAPH))
    assert outcome == {"status": "wrong", "reason": "node: other genes"}


def test_what_does_not_fit_is_left_out_with_its_bytes() -> None:
    b = bench_of()
    b.peaks["peer", 1] = 4, 10**15
    outcome = workers.measure_extraction(b, row_of(sets=8), lambda: Ours(GRAPH))
    assert outcome["status"] == "left out"
    assert "needs about 2,000,000.0 GB" in outcome["reason"]


def test_a_right_result_is_timed() -> None:
    outcome = workers.measure_extraction(bench_of(compared=2), row_of(), lambda: Ours(GRAPH, reuse=True))
    assert outcome["status"] == "measured"
    assert outcome["compared"] == 2
    assert 0 < outcome["seconds"]["q20"] <= outcome["seconds"]["median"] <= outcome["seconds"]["q80"]
    assert outcome["rate"] == outcome["output_bytes"] / outcome["seconds"]["median"]


def product_row(name: str, *, backward: bool) -> Row:
    facts = {"relation": "b", "mask": "all but 3 genes", "sets": 4, "features": 3, "backward": backward}
    return {"kind": "product", "implementation": name, "heap": "default", **facts}


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_product_gets_no_speed(monkeypatch: pytest.MonkeyPatch, factor: float, backward: bool) -> None:
    class Wrong(peers.OurProduct):
        def product(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return super().product(state, factor * x if backward else x) * (1 if backward else factor)

    monkeypatch.setitem(peers.PRODUCTS, "peer", Wrong)
    outcome = workers.measure_product(bench_of(), product_row("peer", backward=backward))
    assert outcome["status"] == "wrong"
    assert not outcome.keys() & {"build", "product", "both", "bytes"}


def test_a_product_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(peers.OurProduct):
        def num_bytes(self, num_edges: int, num_features: int, backward: bool) -> int:
            assert num_edges > 0
            return 10**15

    monkeypatch.setitem(peers.PRODUCTS, "peer", Large)
    outcome = workers.measure_product(bench_of(), product_row("peer", backward=False))
    assert outcome["status"] == "left out"
    assert "1,000,000.0 GB" in outcome["reason"]


def test_the_portable_loops_are_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLATTN_ISA", "before")
    with workers.portable_loops(True):
        assert os.environ["CELLATTN_ISA"] == "portable"
    with workers.portable_loops(False):
        assert "CELLATTN_ISA" not in os.environ
    assert os.environ["CELLATTN_ISA"] == "before"


def test_streaming_stores_reach_every_byte() -> None:
    x = torch.zeros(2**12, dtype=torch.int64)
    fill._threaded(fill._stream_fill(), x)()
    assert x.all()


# ------------------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    synthetic_cell(0, num_genes=PLAN.genes).save(tmp_path / "graph")
    return tmp_path / "graph"


def interpreter(path: Path, lines: str) -> str:
    """A program in the place of Python, with the name of the file for rows in $out."""
    path.write_text(f'#!/bin/sh\nwhile [ "$1" != --out ]; do shift; done\nout="$2"\n{lines}\n')
    path.chmod(0o755)
    return os.fspath(path)


ROWS = [row_of(hops=h) for h in (1, 2, 3)]


def started(path: Path, **given: Any) -> list[Row]:
    return bench.start_worker("extract PyG", "default", PLAN, path, **{"seconds": 60.0, "rows": ROWS, **given})


def test_a_process_that_dies_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.dumps({**ROWS[0], "status": "measured"})
    program = interpreter(tmp_path / "python", f"echo '{first}' > $out\nprintf '{{\"half\": ' >> $out\nkill -9 $$")
    monkeypatch.setattr(sys, "executable", program)
    rows = started(tmp_path)
    assert [row["status"] for row in rows] == ["measured", "died", "not reached"]
    assert [row["hops"] for row in rows] == [1, 2, 3]
    assert rows[1]["reason"] == "killed by SIGKILL"
    assert rows[2]["reason"] == "its process had ended: killed by SIGKILL"


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    rows = started(tmp_path / "no such graph")
    assert [row["status"] for row in rows] == ["died", "not reached", "not reached"]
    assert rows[0]["reason"].startswith("exit status 1: ")
    assert "no such graph" in rows[0]["reason"]


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", "exec sleep 600"))
    monkeypatch.setattr(bench, "GRACE", 0.2)
    rows = started(tmp_path, seconds=0.1)
    assert rows[0]["status"] == "died"
    assert rows[0]["reason"] == bench.NO_TIME


def test_heaps_are_set_for_the_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", "env > ${0%python}env"))
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    for heap, there in (("default", False), ("kept", True)):
        bench.start_worker("counts", heap, PLAN, tmp_path, seconds=60.0, rows=ROWS)
        seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
        for key, value in plans.HEAPS["kept"].items():
            assert (seen.get(key) == value) == there
            assert there or key not in seen


def test_what_is_not_installed_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PACKAGES, "PyG", "no_such_package")
    rows = started(tmp_path)
    assert {(row["status"], row["reason"]) for row in rows} == {("cannot run", "No module named 'no_such_package'")}


def test_what_fails_to_import_is_listed(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: MultiGraph) -> Any:
        raise OSError("libdgl.so: undefined symbol")

    monkeypatch.setitem(peers.PEERS, "PyG", broken)
    bench.run_worker("extract PyG", "kept", replace(PLAN, hops=(1,), set_counts=(4,)), saved, tmp_path / "rows")
    (row,) = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert (row["status"], row["reason"]) == ("cannot run", "OSError: libdgl.so: undefined symbol")


def test_no_time_is_said(tmp_path: Path, saved: Path) -> None:
    assert {row["status"] for row in started(tmp_path, seconds=0.0)} == {"not reached"}
    bench.run_worker("counts", "kept", replace(PLAN, seconds=-1.0), saved, tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["reason"] for row in rows] == [bench.NO_TIME] * len(plans.count_rows(PLAN, "kept"))


def test_a_plan_survives_json() -> None:
    assert plans.plan_from(json.loads(json.dumps(asdict(PLAN)))) == PLAN


# ------------------------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """All rows: those of "counts" from a process as in a run, the others in this one."""
    out = tmp_path_factory.mktemp("results")
    start = bench.start_worker

    def here(name: str, heap: str, plan: plans.Plan, graph: Path, *, seconds: float, rows: list[Row]) -> list[Row]:
        if name == "counts":
            return start(name, heap, plan, graph, seconds=seconds, rows=rows)
        if peers.PACKAGES.get(name.removeprefix("extract ")) and name.removeprefix("extract ") not in INSTALLED:
            return start(name, heap, plan, graph, seconds=seconds, rows=rows)
        path = out.parent / "rows"
        path.unlink(missing_ok=True)
        bench.run_worker(name, heap, plan, graph, path)
        return [json.loads(line) for line in path.read_text().splitlines()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "start_worker", here)
        yield bench.run(PLAN, out=out), out


def test_every_row_has_a_verdict(whole: tuple[dict[str, Any], Path]) -> None:
    rows = whole[0]["rows"]
    expected = [row for _, _, rows in plans.tasks(PLAN) for row in rows]
    assert [{key: row[key] for key in want} for row, want in zip(rows, expected, strict=True)] == expected
    for row in rows:
        absent = row["implementation"] in peers.PACKAGES and row["implementation"] not in INSTALLED
        needed = {"SparseTensor of the union": "torch-sparse", "PyG MessagePassing": "PyG"}.get(row["implementation"], "scipy")
        assert row["status"] == ("cannot run" if absent or needed not in INSTALLED else "measured"), row
        assert row["status"] == "measured" or row["reason"]
    ours = {row["implementation"] for row in rows if row["kind"] == "extract"}
    assert ours == {*peers.variants(), *peers.PEERS}


def test_results_are_written_as_returned(whole: tuple[dict[str, Any], Path]) -> None:
    result, out = whole
    assert json.loads((out / "khop.json").read_text()) == json.loads(json.dumps(result))
    assert {"name", "environment", "graph", "avx512", "plan", "rows", "seconds", "targets"} == result.keys()
    assert (out / "khop.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "khop.md").read_text()
    assert text == tables.page(result)
    stopped = tables.missing(result["rows"])  # peers that are not installed
    assert stopped in text
    for name in (*peers.variants(), *peers.PEERS, *peers.PRODUCTS, *plans.FILLS, *plans.PARTS):
        assert f"| {name} |" in text or (name in peers.PEERS and name in stopped), name
    assert "697.0 nodes, 196,445.6 edges" in text


def test_counts_are_those_of_the_subgraphs(whole: tuple[dict[str, Any], Path]) -> None:
    graph = synthetic_cell(0, num_genes=PLAN.genes, symmetrize=True)
    seeds, ptr = workers.draw_sets(graph.num_nodes, PLAN.count_sets)
    batch = cellattn.khop_subgraph(graph, seeds, ptr, 2)
    row = targets.find(whole[0]["rows"], "counts", "khop_subgraph", graph="symmetrised", size=3, hops=2)
    assert row is not None
    assert (row["nodes"], row["edges"]) == (batch.num_nodes / PLAN.count_sets, batch.num_edges() / PLAN.count_sets)
    assert row["entries"] == graph.num_edges()


def test_other_heaps_show_extraction_alone() -> None:
    plan = replace(PLAN, heaps=("default", "kept"))
    kinds: dict[str, set[str]] = {heap: set() for heap in plan.heaps}
    for _, heap, rows in plans.tasks(plan):
        kinds[heap] |= {row["kind"] for row in rows}
    assert kinds == {"kept": {"extract", "part", "fill", "counts", "curve", "product"}, "default": {"extract"}}
    assert {heap for _, heap, _ in plans.tasks(replace(plan, device="cuda"))} == {"default"}


def test_the_short_plan_keeps_to_one_heap_and_batch() -> None:
    plan = plans.short_plan(genes=40)
    assert (plan.genes, plan.set_counts, plan.heaps) == (40, (28,), ("kept",))
    formats = {f"ours, {name}, {way}" for name in ("int64 COO", "int32 COO") for way in ("fresh", "reused")}
    assert set(plan.ways) == formats | {"ours, int32 CSR, reused"}


# --------------------------------------------------------------------------------------------------------------- targets


def timed(seconds: float, **facts: Any) -> dict[str, Any]:
    return {"status": "measured", "seconds": dict.fromkeys(("median", "q20", "q80"), seconds), **facts}


def product(both: float, product: float, num_bytes: int) -> dict[str, Any]:
    times = {"build": both - product, "product": product, "both": both}
    phases = {name: dict.fromkeys(("median", "q20", "q80"), t) for name, t in times.items()}
    return {"status": "measured", "error": 1e-7, "bytes": num_bytes, **phases}


def test_targets_of_a_synthetic_result() -> None:
    def extracted(name: str, hops: int, outcome: dict[str, Any]) -> Row:
        return {**row_of(implementation=name, heap="kept", sets=28, hops=hops), **outcome}

    absent = {"status": "cannot run", "reason": "No module named 'dgl'"}
    wrong = {"status": "wrong", "reason": "node: other genes"}
    case = {"heap": "kept", "relation": "r", "mask": "2 hops", "backward": True, "kind": "product"}
    curve = {"kind": "curve", "implementation": "khop_mask, packed", "heap": "kept", "genes": 10, "status": "measured"}
    rows: list[Row] = [
        {"kind": "fill", "implementation": "torch fill_", "heap": "kept", **timed(1.0, rate=20e9)},
        {"kind": "fill", "implementation": "memset, all threads", "heap": "kept", **timed(1.0, rate=40e9)},
        extracted("PyG", 2, timed(0.9)),
        extracted("torch-sparse", 2, timed(0.3)),
        extracted("DGL", 2, absent),
        extracted("scipy", 2, wrong),
        extracted("ours, int64 COO, fresh", 2, timed(0.05, rate=20e9)),
        extracted("ours, int32 COO, fresh", 2, timed(0.03, rate=20e9)),
        extracted("ours, int64 COO, reused", 2, timed(0.03, rate=30e9)),
        extracted("ours, int32 COO, reused", 2, timed(0.03, rate=20e9)),
        extracted("PyG", 3, timed(1.0)),
        {**extracted("khop_mask", 3, timed(0.004)), "kind": "part"},
        {**case, "implementation": "ours", **product(1.0, 1.0, 10)},
        {**case, "implementation": "SparseTensor of the union", **product(6.0, 3.0, 150)},
        {**case, "implementation": "PyG MessagePassing", **product(20.0, 18.0, 90)},
        {**curve, "sets": 28, "seconds_a_sample": 2.0},
        {**curve, "sets": 100, "seconds_a_sample": 1.0},
    ]
    found = {entry["target"]: entry for entry in targets.targets(rows)}
    of = "r, 2 hops, forward + backward"
    values = {
        "PyG over khop_subgraph, int64 COO, fresh, 2 hops, kept heap": (18.0, False),
        "PyG over khop_subgraph, int64 COO, reused, 2 hops, kept heap": (30.0, True),
        "fastest int64 peer over khop_subgraph, int64 COO, fresh, 2 hops, kept heap": (6.0, False),
        "write rate over fill bandwidth, int64 COO, reused, 2 hops": (0.75, True),
        "write rate over fill bandwidth, int32 COO, reused, 2 hops": (0.5, False),
        "khop_mask, 3 hops, ms (2, or 1/200 of PyG)": (4.0, True),  # 1/250 of PyG's second
        f"fastest union over masked_spmm, build and product, {of}": (6.0, True),
        f"fastest union over masked_spmm, product alone, {of}": (3.0, False),
        f"memory of masked_spmm over the smallest union, {of}": (1 / 9, False),
        "traversal a sample, 10 genes, B = 100 over B = 28": (0.5, True),
    }
    for name, (value, met) in values.items():
        assert found[name]["value"] == pytest.approx(value), name
        assert found[name]["met"] is met, name
    int32 = found["fastest int32 peer over khop_subgraph, int32 COO, fresh, 2 hops, kept heap"]
    assert (int32["met"], int32["reason"]) == (None, "not measured: scipy: node: other genes")
    assert {name for name, entry in found.items() if entry["met"] is not None} == set(values)
    assert all("not measured" in entry["reason"] for entry in found.values() if entry["met"] is None)
    text = measure.target_table(list(found.values()))
    assert text.count("| met |") == 5
    assert text.count("MISSED by") == 5
    assert "| 18 | MISSED by 1.11 x |" in text
    assert "| 0.111 | MISSED by 1.11 x |" in text


def test_targets_of_a_gpu() -> None:
    facts = {"kind": "extract", "implementation": "ours, int64 COO, reused", "heap": "default", "sets": 28, "hops": 3}
    rows = [
        {**facts, **timed(0.0008, rate=600e9)},
        {"kind": "fill", "implementation": "torch copy_", "heap": "default", **timed(1.0, rate=1000e9)},
        {"kind": "fill", "implementation": "torch fill_", "heap": "default", **timed(1.0, rate=2000e9)},
    ]
    found = {entry["target"]: entry for entry in targets.targets(rows, on_gpu=True)}
    rate = found["write rate over copy bandwidth, int64 COO, reused, 3 hops"]
    assert (rate["value"], rate["least"], rate["met"]) == (pytest.approx(0.6), 0.5, True)
    assert found["khop_subgraph on a GPU, 3 hops, ms"]["met"] is True


# ------------------------------------------------------------------------------------------------------------- the report

MACHINE = {"device": "a machine", "torch": "2", "date": "today"}


def test_the_report_runs_the_whole_of_it_alone(
    whole: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[Any] = []

    def run(*given: Any, **options: Any) -> dict[str, Any]:
        plans.append((given, options))
        return whole[0]

    monkeypatch.setattr(sys, "argv", ["report", "--only", "khop"])
    monkeypatch.setattr(bench, "run", run)
    report.main()
    assert plans == [((), {})]  # the plan that is not short
    assert capsys.readouterr().out == tables.page(whole[0]) + "\n"


def test_the_report_holds_the_short_version(
    whole: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = dict.fromkeys(("median", "q20", "q80"), 1.0)
    measured = {
        "status": "measured",
        "forward": phase,
        "backward": phase,
        "both": phase,
        "bytes": 1,
        "error": 0.0,
        "bound": 2e-5,
    }
    stopped = {"status": "cannot run", "reason": "not installed"}
    op = {"suite": "ops", "name": "an op, of a kind", "tokens": 5, "implementations": {"ours": measured, "theirs": stopped}}
    monkeypatch.setattr(report, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(training_tables, "table", lambda training: "| trained |")
    monkeypatch.setattr(screen_speed, "section", lambda screening: "| scored |")
    methods = {"rows": [], "environment": MACHINE, "graph": "a cell", "plan": asdict(method_steps.short_plan())}
    ops = {"rows": [op], "targets": [], "graph": "a graph", "dtype": "float32", "environment": MACHINE}
    training = {"runs": [], "splits": {"source": {}}, "variants": {}, "environment": MACHINE}
    scored = {"rows": {"a": {"rounds": [[7.0, 3.0]]}}, "environment": {**MACHINE, "commit": "another"}}
    results = report.Results(methods, ops, {**whole[0], "name": "khop_short"}, training, scored)
    path = report.write(results, tmp_path)
    text = path.read_text()
    for part in (
        "[khop_short.md](khop_short.md)",
        "](khop_short.png)",
        measure.target_table(whole[0]["targets"]),
        "| trained |",
        "| scored |",
        "* methods, ops, training: device a machine, torch 2, date today\n* k-hop: ",
    ):
        assert part in text
    assert tables.extract_table(whole[0]["rows"], min(PLAN.set_counts)) in text
    findings, tail = text.index("](khop_short.png)"), text.index("## What has no figure here")
    assert findings < text.index("<details>") < text.index("| trained |") < tail < text.index("theirs: not installed")
    assert text.count("<details>") == text.count("</details>") > 4
    (tmp_path / "ops.png").unlink()
    lengths = report.Results(ops={**ops, "rows": [{**op, "suite": "length"}]})
    assert "Time over T, a graph, float32" in report.write(lengths, tmp_path).read_text()
    assert not (tmp_path / "ops.png").exists()


def test_results_that_are_not_whole_are_drawn_anew(whole: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    for suffix in ("json", "png", "md"):
        (tmp_path / f"khop.{suffix}").write_bytes((whole[1] / f"khop.{suffix}").read_bytes() if suffix == "json" else b"")
    text = report.redraw(report.read_results(tmp_path), tmp_path).read_text()
    assert "## The tables" in text
    assert tables.extract_table(whole[0]["rows"], min(PLAN.set_counts)) in text
    assert "**Ops.**" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["khop.json", "khop.md", "khop.png", "report.md"]
    assert (tmp_path / "khop.md").read_text() == (whole[1] / "khop.md").read_text()
    assert (tmp_path / "khop.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_results_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "--redraw", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"results of a benchmark, got {tmp_path}"):
        report.main()
