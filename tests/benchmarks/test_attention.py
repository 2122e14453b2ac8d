"""The harness of the attention benchmark at tiny sizes: what is wrong or cannot run is said, and never timed."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import measure
from benchmarks.attention import bench, cases, checks, peers, tables
from benchmarks.attention.peers import CONV, SDPA_MASK
from benchmarks.attention.problems import (
    DroppedAttention,
    EdgeAttention,
    GraphLoss,
    Implementation,
    LogSumExp,
    PerturbationHead,
    SharedTerms,
    TiedAttention,
)  # fmt: skip
from cellattn import MultiGraph, reference

from ..compare import RTOL, random_graph
from ..conftest import ROOT

CPU = torch.device("cpu")
PLAN = bench.plan_for("cpu", genes=40, lengths=(33, 48), set_counts=(3, 5), seconds_each=0.0, repeats=3)
N, T, H, D = 40, 41, 2, 5
GRAPH = random_graph(N, {"a": 60, "b": 300, "none": 0}, weighted=True)
ROWS = torch.tensor([0, 3, 39, 17])
TIES = (("a", 1), ("b", 0), ("none", 1), ("b", 1))
THREE, TWO, PAIR = ((H, T, D),) * 3, ((H, T, D),) * 2, ((T, D),) * 2
HEAD = PerturbationHead.draw(6, N, CPU)
SHARED = SharedTerms.draw(N, CPU)
MASKED = EdgeAttention(GRAPH.without_self_loops("b"), "b")


def tied(graph: MultiGraph, rows: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, losses = reference.graph_attention(q, k, v, graph, TIES, rows=rows)
        return out, *losses

    return f


PROBLEMS: dict[str, tuple[Any, tuple[tuple[int, ...], ...], Callable[..., tuple[Tensor, ...]]]] = {
    "graph_attention": (TiedAttention(GRAPH, TIES), THREE, tied(GRAPH, None)),
    "some rows": (TiedAttention(GRAPH, TIES, ROWS), THREE, tied(GRAPH, ROWS)),
    "attention with lse": (TiedAttention(GRAPH, lse=True), THREE, reference.attention),
    "dropout": (
        DroppedAttention(0.3),
        THREE,
        lambda q, k, v: reference.attention(q, k, v, dropout_p=0.3, generator=torch.Generator().manual_seed(0)),
    ),
    "edges": (MASKED, THREE, lambda q, k, v: (reference.edge_attention(q, k, v, MASKED.graph, [("b", 0), ("b", 1)])[0],)),
    "logsumexp": (LogSumExp(), TWO, lambda q, k: (reference.attention_logsumexp(q, k),)),
    "kl": (GraphLoss(GRAPH, "a", "kl"), PAIR, lambda q, k: (reference.attention_kl(q, k, GRAPH, "a", num_prefix=1),)),
    "bce": (GraphLoss(GRAPH, "a", "bce"), PAIR, lambda q, k: (reference.attention_bce(q, k, GRAPH, "a", num_prefix=1),)),
    "shared terms": (SHARED, PAIR, lambda q, k: (reference.attention_kl_comembership(q, k, SHARED.target, num_prefix=1),)),
    "head": (
        HEAD,
        ((6, D), (N, D), (N, D), (12, D)),
        lambda q, k, v, u: (reference.perturbation_attention(q, k, v, HEAD.index, HEAD.ptr, u, scale=D**-0.5),),
    ),
}


def case_of(problem: Any, shapes: tuple[tuple[int, ...], ...], *, rows_a_block: int = 7) -> cases.Case:
    """Blocks that divide no number of rows here."""
    return cases.Case("test", "test", shapes, {}, 2**22 // rows_a_block, lambda: problem, {})


def check_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[checks.Check, Any, tuple[Tensor, ...]]:
    problem, shapes, _ = PROBLEMS[name]
    case = case_of(problem, shapes)
    inputs = bench.input_sets(case, replace(PLAN, dtype=dtype))[0]
    return checks.Check(case, problem.exact, inputs), problem, inputs


@pytest.mark.parametrize("name", PROBLEMS)
def test_definition_in_blocks_is_the_reference(name: str) -> None:
    check, _, inputs = check_of(name, torch.float64)
    got = check._blocks(torch.float64, None)
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = PROBLEMS[name][2](*leaves)
    want = [*outputs, *torch.autograd.grad(outputs, leaves, check.upstream(outputs))]
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        if b.any():  # a relation without edges has no loss
            assert float((a - b).detach().abs().max() / b.detach().abs().max()) <= RTOL


def test_every_implementation_can_be_asked_for() -> None:
    found = {"along its edges"}  # of relations that are held as bits, which GRAPH's are too small for
    for problem, shapes, _ in PROBLEMS.values():
        options = {"compiled": True} if "compiled" in inspect.signature(problem.peers).parameters else {}
        found |= {implementation.name for implementation in problem.peers(shapes, torch.float32, **options)}
    assert found == set(peers.NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in PROBLEMS if "rows" not in name and name != "graph_attention"])
def test_ours_and_dense_pass_the_check(name: str, dtype: torch.dtype) -> None:
    check, problem, inputs = check_of(name, dtype)
    builds = [problem.ours]
    if name == "edges":
        builds += [problem.sdpa, *([problem.conv] if find_spec("torch_geometric") else [])]
    elif name != "dropout":
        builds.append(getattr(problem, "dense", lambda *_: peers.dense_logsumexp))
    for build in builds:
        error, bound, _ = check(Implementation("peer", build), build(*inputs))
        assert error <= bound, build


def test_pairs_as_a_relation_pass_the_check() -> None:
    check, problem, inputs = check_of("shared terms")
    error, bound, _ = check(Implementation("peer", problem.pairs), problem.pairs(*inputs))
    assert error <= bound


def gathered(problem: TiedAttention) -> Callable[..., peers.Function]:
    return problem.gather(lambda: reference.attention)


def compiled_as_eager(problem: TiedAttention) -> Callable[..., peers.Function]:
    return problem.dense


@pytest.mark.parametrize("rows", [None, ROWS], ids=["all rows", "some rows"])
@pytest.mark.parametrize("build", [lambda p: p.ours, compiled_as_eager, gathered], ids=["ours", "dense", "gather"])
def test_attention_peers_compute_the_same(build: Callable[..., Any], rows: Tensor | None) -> None:
    ties = tuple(tie for tie in TIES if tie[0] != "none")  # whose loss is 0: it has no relative error
    problem = TiedAttention(GRAPH, ties, rows)
    case = case_of(problem, THREE)
    inputs = bench.input_sets(case, PLAN)[0]
    check, peer = checks.Check(case, problem.exact, inputs), build(problem)
    error, bound, _ = check(Implementation("peer", peer), peer(*inputs))
    assert error <= bound == checks.SMALL[torch.float32]


def test_negatives_are_checked_by_their_mean() -> None:
    problem = GraphLoss(GRAPH, "a", "bce", num_negatives=8)
    case = case_of(problem, PAIR)
    inputs = bench.input_sets(case, PLAN)[0]
    check, f = checks.Check(case, problem.exact, inputs), problem.ours(*inputs)
    ours = next(iter(problem.peers(PAIR, torch.float32)))
    torch.manual_seed(0)
    error, bound, _ = check(ours, f)
    assert error <= bound
    error, bound, _ = check(ours, lambda q, k: (1.3 * f(q, k)[0],))
    assert error > bound


def test_head_is_padded_only_where_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    widths, true_sdpa = [], F.scaled_dot_product_attention

    def picky(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        widths.append(q.shape[-1])
        if q.shape[-1] % 8:
            raise RuntimeError("No available kernel.")
        return true_sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", picky)
    q, k, v = (torch.randn(H, T, D, dtype=torch.float64) for _ in range(3))
    (out,) = peers.sdpa(SDPBackend.MATH, q, k, v)(q, k, v)
    assert widths == [D, 8, 8]
    assert (out - reference.attention(q, k, v)[0]).abs().max() <= RTOL


# ------------------------------------------------------------------------------------------------------------- outcomes


def outcome_of(implementation: Implementation) -> dict[str, Any]:
    problem, shapes, _ = PROBLEMS["kl"]
    case = case_of(problem, shapes)
    sets = bench.input_sets(case, PLAN)
    return bench.measure(implementation, checks.Check(case, problem.exact, sets[0]), sets, PLAN)


def refuses(error: Exception) -> Callable[..., peers.Function]:
    def build(*inputs: Tensor) -> peers.Function:
        raise error

    return build


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("\nhead of 5\nand more"), "head of 5"),
        (RuntimeError("backend raised:\nno such kernel\nand more"), "backend raised: no such kernel"),
        (torch.OutOfMemoryError("tried to allocate 7 GiB"), "out of memory: tried to allocate 7 GiB"),
        (ModuleNotFoundError("No module named 'peer'"), "ModuleNotFoundError: No module named 'peer'"),
    ],
    ids=["first line", "two lines", "memory", "not installed"],
)
def test_what_cannot_run_is_listed_with_its_reason(error: Exception, reason: str) -> None:
    assert outcome_of(Implementation("peer", refuses(error))) == {"status": "cannot run", "reason": reason}


def test_a_failing_backward_is_listed() -> None:
    detached = Implementation("peer", lambda *_: lambda q, k: ((q @ k.mT).sum().detach(),))
    outcome = outcome_of(detached)
    assert outcome["status"] == "cannot run"
    assert "does not require grad" in outcome["reason"]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_result_gets_no_speed(factor: float) -> None:
    def build(*inputs: Tensor) -> peers.Function:
        f = PROBLEMS["kl"][0].ours(*inputs)
        return lambda q, k: (factor * f(q, k)[0],)

    outcome = outcome_of(Implementation("peer", build))
    assert outcome["status"] == "wrong"
    assert not outcome.keys() & {"forward", "backward", "both", "bytes"}


def test_a_wrong_gradient_gets_no_speed() -> None:
    def build(*inputs: Tensor) -> peers.Function:
        f = PROBLEMS["kl"][0].ours(*inputs)
        return lambda q, k: (f(q, k.detach())[0] + 0 * k.sum(),)

    assert outcome_of(Implementation("peer", build))["status"] == "wrong"


def test_what_does_not_fit_is_left_out_with_its_bytes() -> None:
    outcome = outcome_of(Implementation("peer", refuses(AssertionError("built")), num_bytes=10**15))
    assert outcome["status"] == "left out"
    assert "1,000,000 GB" in outcome["reason"]


def test_a_right_result_is_timed() -> None:
    outcome = outcome_of(Implementation("ours", PROBLEMS["kl"][0].ours))
    assert outcome["status"] == "measured"
    for phase in ("forward", "backward", "both"):
        assert 0 < outcome[phase]["q20"] <= outcome[phase]["median"] <= outcome[phase]["q80"]
    assert outcome["error"] <= outcome["bound"]
    assert isinstance(outcome["bytes"], int)


# ------------------------------------------------------------------------------------------------------------------ runs


def quick(suite: Callable[..., Iterator[cases.Case]]) -> Callable[..., Iterator[cases.Case]]:
    """A suite without what takes long to compile: on a CPU, FlexAttention only to be refused."""

    def smaller(plan: cases.Plan) -> Iterator[cases.Case]:
        for case in suite(plan):

            def problem(case: cases.Case = case) -> Any:
                return _Quick(case.problem())

            yield replace(case, problem=problem)

    return smaller


class _Quick:
    def __init__(self, problem: Any) -> None:
        self.exact, self._peers = problem.exact, problem.peers

    def peers(self, *arguments: Any, **options: Any) -> Iterator[Implementation]:
        for peer in self._peers(*arguments, **options):
            skipped = "compiled" in peer.name or "Flex" in peer.name
            yield replace(peer, build=refuses(RuntimeError("left out of this test"))) if skipped else peer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for name, suite in cases.SUITES.items():
            patch.setitem(cases.SUITES, name, quick(suite))
        return bench.run(PLAN, suites=tuple(cases.SUITES), out=out), out


def test_results_are_written_as_returned(whole: tuple[dict[str, Any], Path]) -> None:
    result, out = whole
    assert json.loads((out / "attention.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "length.png").read_bytes().startswith(b"\x89PNG")
    assert {"environment", "graph", "dtype", "suites", "rows", "not_reached", "seconds", "targets"} == result.keys()
    assert result["not_reached"] == []
    assert {row["suite"] for row in result["rows"]} == set(cases.SUITES)


def test_every_row_has_ours_and_a_verdict_on_each_peer(whole: tuple[dict[str, Any], Path]) -> None:
    for row in whole[0]["rows"]:
        outcomes = row["implementations"]
        assert outcomes["ours"]["status"] == "measured", (row["name"], outcomes["ours"])
        for name, outcome in outcomes.items():
            assert outcome["status"] in ("measured", "cannot run"), (row["name"], name, outcome)
            assert outcome["status"] == "measured" or outcome["reason"]
        if "dense eager" in outcomes:
            assert outcomes["dense eager"]["status"] == "measured", (row["name"], outcomes["dense eager"])
    outcomes = [outcome for row in whole[0]["rows"] for outcome in row["implementations"].values()]
    text = tables.table(whole[0]["rows"])
    assert len(text.splitlines()) == 2 + sum(outcome["status"] == "measured" for outcome in outcomes)
    absent = tables.missing(whole[0]["rows"])
    assert all(outcome["reason"].rstrip(".") in absent for outcome in outcomes if outcome["status"] != "measured")


def test_an_error_of_draws_stands_beside_its_bound() -> None:
    phase = {"median": 1.0, "q20": 1.0, "q80": 1.0}
    outcome = {"status": "measured", "forward": phase, "backward": phase, "both": phase, "bytes": 1}
    drawn, exact = {**outcome, "error": 0.4, "bound": 3.26}, {**outcome, "error": 4e-7, "bound": 2e-5}
    rows = [{"suite": "ops", "name": "an op", "implementations": {"ours": drawn, "dense eager": exact}}]
    lines = tables.table(rows).splitlines()
    assert lines[-2].endswith("| 4e-01 of 3.3, drawn |")
    assert lines[-1].endswith("| 4e-07 |")


def test_what_is_wrong_is_named_first() -> None:
    failed = {"a": {"status": "cannot run", "reason": "no"}, "b": {"status": "wrong", "reason": "error 1"}}
    rows = [{"suite": "ops", "name": name, "implementations": failed} for name in ("one", "two")]
    assert tables.missing(rows) == "b: WRONG in one: error 1; b: WRONG in two: error 1; a: no"


def test_the_budget_stops_between_rows(tmp_path: Path) -> None:
    result = bench.run(replace(PLAN, seconds=0.0), suites=("length",), out=tmp_path)
    assert result["rows"] == []
    assert [name.split(",")[0] for name in result["not_reached"]] == ["T 33", "T 48"]
    assert json.loads((tmp_path / "attention.json").read_text())["not_reached"] == result["not_reached"]
    assert all(entry["met"] is None and "was not run" in entry["reason"] for entry in result["targets"])


def test_the_budget_stops_between_implementations() -> None:
    (case, _) = cases.length_suite(PLAN)
    row = bench.measure_case(case, PLAN, deadline=0.0, progress=lambda _: None)
    assert {outcome["status"] for outcome in row["implementations"].values()} == {"not reached"}


def test_a_row_that_cannot_be_made_is_listed() -> None:
    (case, _) = cases.length_suite(PLAN)
    broken = replace(case, problem=refuses(RuntimeError("no graph")))
    row = bench.measure_case(broken, PLAN, deadline=float("inf"), progress=lambda _: None)
    assert row["implementations"] == {"every implementation": {"status": "cannot run", "reason": "no graph"}}


def test_one_row_of_one_implementation_writes_nothing(tmp_path: Path) -> None:
    result = bench.run(replace(PLAN, only="ours", profile=True), suites=("ops",), case="attention_kl", out=tmp_path)
    assert [(row["name"], list(row["implementations"])) for row in result["rows"]] == [("attention_kl", ["ours"])]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="case: no row of ops starts with 'nothing'"):
        bench.run(PLAN, suites=("ops",), case="nothing")


def test_a_name_is_preferred_to_those_that_start_with_it() -> None:
    plan = replace(PLAN, only="nobody")
    result = bench.run(plan, suites=("cell",), case="9 heads of 20, 9 ties")
    assert [row["name"] for row in result["rows"]] == ["9 heads of 20, 9 ties"]
    assert len(bench.run(plan, suites=("cell",), case="9 heads of 20")["rows"]) == 5


# --------------------------------------------------------------------------------------------------------------- targets


def timed(both: float, num_bytes: int = 100, forward: float = 1.0) -> dict[str, Any]:
    phases = {"forward": forward, "backward": both - forward, "both": both}
    return {
        "status": "measured",
        **{k: dict.fromkeys(("median", "q20", "q80"), t) for k, t in phases.items()},
        "bytes": num_bytes,
    }


def test_targets_of_a_synthetic_result() -> None:
    shape = {"suite": "cell", "heads": 9, "head_dim": 20, "rows": 1.0}
    tied_row = {
        "ours": timed(2.0, 50),
        "dense eager": timed(30.0, 2000),
        "FlexAttention + gather": timed(2.8),
        "FlashAttention 4 + gather": {"status": "cannot run", "reason": "no such chip"},
        "SDPA flash": timed(1.9),
        "SDPA math": timed(9.0),
        "FlashAttention 2": {"status": "wrong", "reason": "error 1"},
    }
    rows: list[dict[str, Any]] = [
        {**shape, "name": "some of the rows", "ties": 9, "rows": 0.1, "implementations": {"ours": timed(0.1)}},
        {**shape, "name": "tied", "ties": 9, "implementations": tied_row},
        {**shape, "name": "bare", "ties": 0, "implementations": {"ours": timed(1.6)}},
        {"suite": "ops", "name": "attention with lse", "implementations": {"ours": timed(3.0, forward=1.0)}},
        {"suite": "ops", "name": "attention with lse, dropout 0.1", "implementations": {"ours": timed(3.6)}},
        {
            "suite": "ops",
            "name": "edge_attention",
            "implementations": {"ours": timed(1.0, 40), SDPA_MASK: timed(20.0, 1000), CONV: timed(2.0, 700)},
        },
        {"suite": "ops", "name": "attention_logsumexp", "implementations": {"ours": timed(2.0, forward=0.6)}},
    ]
    found = {entry["target"]: entry for entry in tables.targets(rows)}
    of = "9 heads of 20, 9 ties"
    values = {
        f"graph_attention over the fastest plain attention, {of}": (2 / 1.9, True),
        f"FlexAttention + gather over graph_attention, {of}": (1.4, False),
        f"dense eager over graph_attention, {of}": (15.0, True),
        f"memory of graph_attention over dense eager, {of}": (0.025, True),
        f"graph_attention over our attention without ties, {of}": (1.25, False),
        "attention_logsumexp over attention, forward": (0.6, True),
        "attention with dropout over attention": (1.2, True),
        f"{SDPA_MASK} over edge_attention": (20.0, True),
        f"{CONV} over edge_attention": (2.0, False),
        f"memory of edge_attention over {SDPA_MASK}": (0.04, True),
        f"memory of edge_attention over {CONV}": (40 / 700, False),
    }
    for name, (value, met) in values.items():
        assert found[name]["value"] == pytest.approx(value)
        assert found[name]["met"] is met
    fa4 = found[f"FlashAttention 4 + gather over graph_attention, {of}"]
    assert fa4["met"] is None
    assert fa4["reason"] == "not measured: FlashAttention 4 + gather: no such chip"
    other = [entry for name, entry in found.items() if "8 heads of 64" in name]
    assert len(other) == 6
    assert all(entry["met"] is None and "was not run" in entry["reason"] for entry in other)
    text = measure.target_table(list(found.values()))
    assert text.count("| met |") == 7
    assert text.count("MISSED by") == 4
    assert text.count("\nNot measured (") == 2  # a line a reason
    assert f"(FlashAttention 4 + gather: no such chip): FlashAttention 4 + gather over graph_attention, {of}." in text


def test_every_kernel_has_a_profiler_line() -> None:
    files = (
        "attention",
        "edge_attention",
        "row_dot",
        "bit_sum",
        "attention_bce",
        "perturbation_attention",
    )  # what this benchmark runs
    names = [
        name
        for file in files
        for name in re.findall(r"^def (\w+_kernel\w*)\(", (ROOT / "kernels" / f"{file}.py").read_text(), flags=re.M)
    ]
    assert len(names) >= 10
    text = bench.epilog()
    rows = {case.name for case in cases.ops_suite(PLAN)}
    for name in names:
        lines = [kernel for kernel in bench.KERNELS if name.startswith(kernel)]
        assert lines, name
        assert all(f"-k regex:^{kernel} " in text and bench.KERNELS[kernel] in rows for kernel in lines)


def test_lengths_without_a_figure_have_no_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def row(tokens: int, **implementations: dict[str, Any]) -> dict[str, Any]:
        return {"suite": "length", "tokens": tokens, "implementations": implementations}

    phase = {"median": 1.0}
    measured = {"status": "measured", "forward": phase, "backward": phase, "both": phase, "bytes": 1}
    stopped = {"status": "cannot run", "reason": "too few"}
    rows = [row(16, ours=stopped), row(64, ours=measured, other=stopped), row(256, ours=measured)]
    drawn: list[Any] = []
    monkeypatch.setattr(tables, "save", lambda figure, path, environment: drawn.append(figure))
    tables.draw_lengths({"rows": rows, "environment": {}}, tmp_path / "length.png")
    assert [axis.get_xticks().tolist() for axis in drawn[0].axes] == [[64, 256]] * 2
    plt.close(drawn[0])
