"""The GPU check on a machine without a GPU: it says so, and its cases hold on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cellattn
from benchmarks import gpu_check
from benchmarks.engine import Method
from benchmarks.methods import METHODS

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no GPU" in done.stdout
    assert not (tmp_path / "out").exists()


CASES = {case.name: case for case in (*gpu_check.cases(gpu_check.cell(70, device=CPU)), *gpu_check.hub_cases(CPU))}


@pytest.mark.parametrize("name", CASES)
def test_cases_hold_on_the_cpu(name: str) -> None:
    """The comparison itself: in float32 the CPU implementations pass it."""
    case = CASES[name]
    results = list(gpu_check.accuracy(case, CPU))
    assert len(results) == (0 if case.exact is None else 3)
    assert all(result.passed for result in results), results
    if case.exact is None:
        outputs = gpu_check.step(case.ours, gpu_check.inputs_of(case, torch.float32, CPU))
        assert all(x.isfinite().all() for x in outputs)


def test_a_wrong_result_fails() -> None:
    case = CASES["attention_kl"]
    assert case.exact is not None
    exact = case.exact
    wrong = gpu_check.Case("wrong", case.inputs, lambda *x: tuple(1.01 * y for y in exact(*x)), exact)
    assert not any(result.passed for result in gpu_check.accuracy(wrong, CPU))


def test_the_cell_has_rows_and_columns_that_are_cut() -> None:
    by_row, by_column = gpu_check.cell(6607, device=CPU).segments
    assert by_row.row.unique().numel() == 27
    assert by_column.row.unique().numel() == 26


def test_khop_checks_hold_on_the_cpu() -> None:
    """The CPU held to itself: what is compared can be compared, and nothing is left out in silence."""
    results = list(gpu_check.khop(gpu_check.cell(70, device=CPU)))
    assert len(results) == 4 * 4 + 3 * 3 * 2
    assert all(result.passed for result in results), results


def test_a_wrong_subgraph_fails() -> None:
    graph = gpu_check.cell(70, device=CPU)
    sets = gpu_check.random_sets(5, 70, device=CPU)
    a, b = (gpu_check.tensors_of(cellattn.khop_subgraph(graph, *sets, hops)) for hops in (1, 2))
    assert not gpu_check.equal(a, b)


def test_kernels_resolve_in_a_bare_checkout() -> None:
    """Without what an editable install puts into site-packages: -S leaves it out, PYTHONPATH holds what is imported."""
    folder = str(Path(torch.__file__).parents[1])
    code = f"import sys; sys.path.append({folder!r}); import cellattn.kernels; print(cellattn.kernels.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"


def test_models_hold_on_the_cpu() -> None:
    results = list(gpu_check.models(CPU, num_genes=64, num_sets=3))
    assert len(results) == 2 * len(METHODS)
    assert all(result.passed for result in results), [result for result in results if not result.passed]


def test_a_model_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, device: torch.device) -> None:
        raise ArithmeticError("no such model")

    monkeypatch.setattr(gpu_check, "METHODS", {"broken": Method("broken", broken)})  # type: ignore[arg-type]
    (result,) = gpu_check.models(CPU, num_genes=64)
    assert result.passed is False
    assert "no such model" in result.detail


def test_commands_elsewhere() -> None:
    def python(code: str, seconds: float | None = None) -> tuple[gpu_check.Result, str]:
        return gpu_check.elsewhere("a", "b", [sys.executable, "-c", code], seconds)

    right, said = python("print('one'); print('two')")
    assert (right.passed, right.detail, said) == (True, "exit status 0: one / two", "one\ntwo\n")
    wrong, said = python("raise SystemExit('no kernel')")
    assert (wrong.passed, wrong.detail, said) == (False, "exit status 1: no kernel", "no kernel\n")
    slow, said = python("import time; print('begun', flush=True); time.sleep(60)", seconds=2.0)
    assert (slow.passed, slow.detail, said) == (None, "not finished after 2 s", "begun\n")


def test_a_benchmark_leaves_what_it_said(tmp_path: Path) -> None:
    result = gpu_check.benchmark("report", tmp_path, "--help")
    assert result.passed
    assert "--full" in (tmp_path / "report.txt").read_text()


def test_without_pytest_the_tests_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu_check.gpu_tests().passed is None
