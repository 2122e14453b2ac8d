"""A check in sections keeps what it found, however a section, or all of it, ends."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import measure, processes, sections
from benchmarks.sections import Record, Result, Section

from .process_tree import alive, soon

pytestmark = pytest.mark.xdist_group("processes")  # they start others and watch the clock: one at a time

ROOT = Path(__file__).parents[2]
FAKE = "tests.benchmarks.fake_sections"


def test_sections_end_apart_from_each_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records = sections.drive(FAKE, ["fine", "slow", "killed", "raises", "late"], tmp_path, about={"device": "none"})
    found = [(each.section, each.result.check, each.result.case, each.result.passed) for each in records]
    assert found == [
        *(("fine", "fine", str(i), True) for i in range(3)),
        ("fine", "section", "fine", True),
        ("slow", "slow", "first", True),
        ("slow", "section", "slow", None),
        ("killed", "killed", "first", True),
        ("killed", "section", "killed", False),
        ("raises", "raises", "first", False),
        ("raises", "error", "raises", False),
        ("raises", "section", "raises", False),
        *(("late", "fine", str(i), True) for i in range(3)),
        ("late", "section", "late", True),
    ]
    details = {each.section: each.result.detail for each in records if each.result.check == "section"}
    assert details["slow"].startswith("not finished after 6 s")
    assert details["killed"].startswith("killed by SIGKILL")
    assert "no such kernel" in next(each.result.detail for each in records if each.result.check == "error")
    assert not alive(int((tmp_path / "grandchild").read_text()))
    assert [name for name in ("fine", "slow", "killed", "raises", "late") if sections.ended(records, name)] == ["fine", "late"]
    assert "pass  fine  2: as it should be" in capfd.readouterr().out


def test_a_section_again_takes_the_place_of_its_last_run(tmp_path: Path) -> None:
    first = sections.drive(FAKE, ["raises", "fine"], tmp_path, about={})
    again = sections.drive(FAKE, ["fine"], tmp_path, about={})
    assert [each.section for each in first] == ["fine"] * 4 + ["raises"] * 3  # in the order of SECTIONS
    assert [each.section for each in again] == ["raises"] * 3 + ["fine"] * 4


def test_no_section_begins_without_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sections.drive(FAKE, ["fine"], tmp_path, about={}, seconds=20.0) == []
    assert "fine: may take 30 s, and 20 s are left" in capsys.readouterr().out


def start(out: Path, *names: str) -> subprocess.Popen[bytes]:
    code = f"drive({FAKE!r}, {names!r}, Path({str(out)!r}), about={{}})"
    code = f"from pathlib import Path; from benchmarks.sections import drive; {code}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)


def test_a_kill_at_any_moment_keeps_all_results_and_leaves_no_process(tmp_path: Path) -> None:
    """Of the driver, with SIGKILL, which nothing can catch: while a section hangs, and three times in the midst of writing."""
    driver = start(tmp_path / "hangs", "fine", "slow")
    grandchild = tmp_path / "hangs" / "grandchild"
    assert soon(lambda: grandchild.exists() and grandchild.read_text() != "", 60.0)
    driver.kill()
    driver.wait()
    assert soon(lambda: not alive(int(grandchild.read_text())))
    found = sections.read(tmp_path / "hangs")
    assert [each.section for each in found] == ["fine"] * 4 + ["slow"]

    for i in range(3):
        out = tmp_path / str(i)
        driver = start(out, "endless")
        path = out / sections.RESULTS
        assert soon(functools.partial(holds, path, 10 * (i + 1)), 60.0)
        driver.kill()
        driver.wait()
        assert soon(functools.partial(stops, path))
        cases = [each.result.case for each in sections.read(out)]
        assert cases == [str(k) for k in range(len(cases))]
        assert len(cases) >= 10 * (i + 1)


def holds(path: Path, lines: int) -> bool:
    return path.exists() and path.read_text().count("\n") > lines


def stops(path: Path) -> bool:
    """Whether nobody writes to a file any more."""
    size = path.stat().st_size
    time.sleep(0.3)
    return path.stat().st_size == size


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    Record("a", Result("b", "c", True, "d")).write(tmp_path)
    with (tmp_path / sections.RESULTS).open("a") as file:
        file.write('{"section": "a", "chec')
    assert sections.read(tmp_path) == [Record("a", Result("b", "c", True, "d"))]


def test_plan() -> None:
    """In their order, in as few runs as it allows; one that is longer than a run has a run of its own."""
    few = {name: Section(seconds, lambda out: iter(()), "") for name, seconds in zip("abcde", (5, 4, 3, 20, 1), strict=True)}
    assert sections.plan(few, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert sections.plan(few, 100) == [["a", "b", "c", "d", "e"]]


def test_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(sections.COMMIT, raising=False)
    assert measure.environment()["commit"] == "unknown"
    monkeypatch.setenv(sections.COMMIT, "abc1234")
    assert measure.environment()["commit"] == "abc1234"
    (first, *_) = sections.drive(FAKE, ["fine"], tmp_path / "out", about=measure.environment())
    assert first.result.passed
    begin = json.loads((tmp_path / "out" / sections.RESULTS).read_text().splitlines()[0])
    assert json.loads(begin["detail"])["commit"] == "abc1234"


def test_results_go_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CELLATTN_RESULTS", str(tmp_path / "here"))
    assert measure.results_dir() == tmp_path / "here"
    assert (tmp_path / "here").is_dir()


def test_commands_as_sections(tmp_path: Path) -> None:
    def python(code: str) -> Result:
        return sections.command([sys.executable, "-c", code], tmp_path / "said.txt")

    assert python("print('one'); print('two')") == Result("command", "said", True, "exit status 0: one / two")
    assert (tmp_path / "said.txt").read_text() == "one\ntwo\n"
    assert python("raise SystemExit('no kernel')") == Result("command", "said", False, "exit status 1: no kernel")


def test_how_a_process_ends() -> None:
    def python(code: str, seconds: float | None = None) -> processes.Ended:
        return processes.run([sys.executable, "-c", code], seconds=seconds)

    assert str(python("raise SystemExit(3)")) == "exit status 3"
    assert str(python("import time; time.sleep(600)", 0.5)) == "not finished after 0 s"
    assert str(python(f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})")) == "killed by SIGSEGV"


WORKERS = {
    "multiprocessing": """
import multiprocessing, sys, time
from tests.benchmarks.fake_sections import sleep_until_the_end
if __name__ == "__main__":
    for kind in ("spawn", "fork"):
        for i in range(2):
            multiprocessing.get_context(kind).Process(target=sleep_until_the_end, args=(sys.argv[1] + kind + str(i),)).start()
    time.sleep(600)
""",
    "run": """
import sys
from benchmarks.processes import run
code = "import sys; from tests.benchmarks.fake_sections import sleep_until_the_end; sleep_until_the_end(sys.argv[1])"
run([sys.executable, "-c", code, sys.argv[1] + "run"])
""",
}


@pytest.mark.parametrize("how", WORKERS)
def test_workers_end_with_the_process_that_started_them(how: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(WORKERS[how])
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(program), f"{tmp_path}/pid-"], cwd=ROOT, env=env)
    count = {"multiprocessing": 4, "run": 1}[how]

    def pids() -> list[int]:
        return [int(path.read_text() or 0) for path in tmp_path.glob("pid-*")]

    assert soon(lambda: len(pids()) == count and all(pids()), 60.0)
    assert all(alive(pid) for pid in pids())
    parent.kill()
    parent.wait()
    assert soon(lambda: not any(alive(pid) for pid in pids()))


def test_summary() -> None:
    """What did not pass, line by line, and how many."""
    found = [Record("a", Result("check", str(i), passed, "why")) for i, passed in enumerate((True, False, None, True))]
    assert sections.summary(found) == (
        "FAIL  check  1: why\n----  check  2: why\n2 passed, 1 failed, 1 not looked at or not finished"
    )
