"""The GPU check on a machine without a GPU: it says so, and its cases hold on the CPU."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cellattn
from benchmarks.gpu_check import cases, checks, sections
from benchmarks.methods.registry import METHODS, Method
from benchmarks.sections import Result, plan

pytestmark = pytest.mark.xdist_group("processes")  # they start others and watch the clock: one at a time

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no GPU" in done.stdout
    assert not (tmp_path / "out").exists()


CELL = cases.cell(70, device=CPU)
CASES = {case.name: case for case in cases.all_cases(CELL)}


@pytest.mark.parametrize("name", CASES)
def test_cases_hold_on_the_cpu(name: str) -> None:
    """The comparison itself: in float32 the CPU implementations pass it."""
    case = CASES[name]
    results = list(checks.accuracy(case, CPU))
    assert len(results) == (0 if case.exact is None else 3)
    assert all(result.passed for result in results), results
    if case.exact is None:
        outputs = checks.step(case.ours, cases.inputs_of(case, torch.float32, CPU))
        assert all(x.isfinite().all() for x in outputs)


def test_a_wrong_result_fails() -> None:
    case = CASES["attention_kl"]
    assert case.exact is not None
    exact = case.exact
    wrong = cases.Case("wrong", case.inputs, lambda *x: tuple(1.01 * y for y in exact(*x)), exact)
    assert not any(result.passed for result in checks.accuracy(wrong, CPU))


def test_the_cell_has_rows_and_columns_that_are_cut() -> None:
    by_row, by_column = cases.cell(6607, device=CPU).segments
    assert by_row.row.unique().numel() == 27
    assert by_column.row.unique().numel() == 26


def test_the_packed_cases_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(
        cellattn, "attention_kl", lambda q, k, graph, name, **options: seen.append(graph.bits(name) is not None)
    )
    for case in cases.packed_cases(CPU):
        case.ours(*cases.inputs_of(case, torch.float32, CPU))
    assert seen == [True, True]


def test_khop_checks_hold_on_the_cpu() -> None:
    """The CPU held to itself: what is compared can be compared, and nothing is left out in silence."""
    results = list(checks.khop(cases.cell(70, device=CPU)))
    assert len(results) == 4 * 4 + 3 * 3 * 2
    assert all(result.passed for result in results), results


def test_a_wrong_subgraph_fails() -> None:
    graph = cases.cell(70, device=CPU)
    sets = checks.random_sets(5, 70, device=CPU)
    a, b = (checks.tensors_of(cellattn.khop_subgraph(graph, *sets, hops)) for hops in (1, 2))
    assert not checks.equal(a, b)


def test_kernels_resolve_in_a_bare_checkout() -> None:
    """Without what an editable install puts into site-packages: -S leaves it out, PYTHONPATH holds what is imported."""
    folder = str(Path(torch.__file__).parents[1])
    code = f"import sys; sys.path.append({folder!r}); import cellattn.kernels; print(cellattn.kernels.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"


def test_models_hold_on_the_cpu() -> None:
    results = list(checks.models(CPU, num_genes=64, num_sets=3))
    assert len(results) == 2 * len(METHODS)
    assert all(result.passed for result in results), [result for result in results if not result.passed]


def test_a_model_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, device: torch.device) -> None:
        raise ArithmeticError("no such model")

    monkeypatch.setattr(checks, "METHODS", {"broken": Method("broken", broken)})  # type: ignore[arg-type]
    (result,) = checks.models(CPU, num_genes=64)
    assert result.passed is False
    assert "no such model" in result.detail


def test_sections_go_through_all_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As they are, of a small cell on the CPU; what the checks themselves say is tested above."""
    monkeypatch.setattr(sections, "gpu", lambda: CPU)
    monkeypatch.setattr(checks, "cell", lambda num_nodes, device: CELL)
    asked = ("accuracy", "repeats", "capture")
    for check in asked:
        monkeypatch.setattr(checks, check, lambda case, device, check=check: iter([Result(check, case.name, True, "")]))
    found = [each for name in ("attention", "losses", "products") for each in sections.SECTIONS[name].run(tmp_path)]
    assert sorted((each.check, each.case) for each in found) == sorted((check, name) for check in asked for name in CASES)
    monkeypatch.setattr(checks, "METHODS", {})
    assert list(sections.SECTIONS["models"].run(tmp_path)) == []
    monkeypatch.setattr(checks, "khop_capture", lambda graph: iter([Result("capture", "", True, "")]))
    assert len(list(sections.SECTIONS["khop"].run(tmp_path))) == 4 * 4 + 3 * 3 * 2 + 1


def test_a_device_that_is_lost_takes_one_case_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases after it run in a process of their own, where nothing is lost."""
    monkeypatch.setattr(checks, "lost", lambda device: True)
    monkeypatch.setattr(checks, "accuracy", lambda case, device: iter([Result("accuracy", case.name, True, "")]))
    found = list(checks.ops(["masked_spmm"], CPU, 70))
    assert [x.case for x in found if x.check == "device"] == ["masked_spmm sum"]
    later = [x for x in found if x.case.startswith("masked_spmm mean")]
    assert [x.passed for x in later if x.check == "accuracy"] == [True] * 3  # by dtype, as they are
    assert len({x.check for x in later}) == 3

    monkeypatch.setattr(checks, "METHODS", {"first": METHODS["dango"]})
    assert [x.check for x in checks.models(CPU, 64, 3)][-1] == "device"
    ended = list(checks.elsewhere(os._exit, 3))
    assert [(x.passed, x.detail) for x in ended] == [(False, "ended with 3 before its end")]


def test_every_case_is_in_one_section() -> None:
    prefixes = (sections.ATTENTION, sections.LOSSES, sections.PRODUCTS)
    for name in CASES:
        assert sum(name.startswith(each) for each in prefixes) == 1, name


def test_every_op_with_a_gradient_has_a_case() -> None:
    without = {"khop_mask", "khop_subgraph", "perturbation_mask", "relational_degree", "sample_rows"}
    functions = {name for name in cellattn.__all__ if inspect.isfunction(getattr(cellattn, name))}
    assert functions - {re.split(r"[ ,]", name)[0] for name in CASES} == without


def test_kernels_are_compiled_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = cases.all_cases(cases.cell(2, device=CPU))[:1]
    monkeypatch.setattr(checks, "all_cases", lambda graph: few)
    results = list(checks.compiled(CPU, num_nodes=70))
    assert [result.case for result in results] == [f"{few[0].name}, {dtype}" for dtype in cases.DTYPES]
    assert all(result.passed for result in results), results


def test_the_tools_find_their_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "cell", lambda num_nodes, device: CELL)
    checks.run_once(CPU, 70)


def test_the_check_fits_half_an_hour_but_for_its_end() -> None:
    """Each section within nine minutes; all but the last three in three commands of nine."""
    names = [name for name in sections.SECTIONS if name != "report"]
    assert all(sections.SECTIONS[name].seconds <= 540 for name in names)
    runs = plan({name: sections.SECTIONS[name] for name in names}, 540)
    assert [name for part in runs[:3] for name in part] == names[:-3]
    assert len(runs) == 4


def test_the_plan_is_printed_without_a_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--plan", "540"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first = done.stdout.splitlines()[0]
    assert first == "python -m benchmarks.gpu_check --out FOLDER --only compile attention losses products"


def test_a_benchmark_leaves_what_it_said(tmp_path: Path) -> None:
    (result,) = sections.benchmark("report", tmp_path, "--help")
    assert result.passed
    assert "--full" in (tmp_path / "report.txt").read_text()


def test_without_tools_they_are_not_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tests,) = sections.gpu_tests(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    (tool,) = sections.sanitizer("memcheck", tmp_path)
    assert tests.passed is None
    assert tool.passed is None
