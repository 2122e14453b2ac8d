"""Planted faults are found: a sample of what `python -m tests.ptx.mutations` plants, and how it plants."""

from __future__ import annotations

import collections
import csv
from pathlib import Path

import pytest

from .mutations import judge, sample
from .planting import mutants_of_line
from .verdicts import PAGE, RESULTS, ROOT, read, tables, write

SUBJECTS = (
    "attention, bf16, D 32, sm_80", "attention, bf16, D 64, sm_90", "masked_spmm, bf16, F 20, sm_80",
    "perturbation_attention, bf16, D 20, sm_80", "set_sum, bf16, F 20, sm_80",
)  # fmt: skip


@pytest.mark.parametrize(
    ("line", "planted"),
    [
        ("bar.sync \t0;", [("barrier", "")]),
        ("cp.async.wait_group \t0;", [("wait", "")]),
        ("fence.proxy.async.shared::cta;", [("fence", "")]),
        (
            "@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];",
            [("mask", "ld.global.b32 { %r1 }, [ %rd1 + 0 ];"), ("offset", "@%p1 ld.global.b32 { %r1 }, [%rd1+4];")],
        ),
        ("@%p2 st.shared.b16 [ %r1 + 0 ], %rs1;", [("offset", "@%p2 st.shared.b16 [%r1+2], %rs1;")]),  # %p2 is a constant
        (
            "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;",
            [
                ("mask", "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 16;"),
                ("offset", "cp.async.cg.shared.global [%r1+16], [ %rd1 + 0 ], 0x10, %r2;"),
                ("offset", "cp.async.cg.shared.global [ %r1 + 0 ], [%rd1+16], 0x10, %r2;"),
            ],
        ),
        ("mul.lo.s32 \t%r1, %r2, 20;", [("stride", "mul.lo.s32 \t%r1, %r2, 21;")]),
        ("mad.wide.u32 \t%rd1, %r1, 4, %rd2;", [("stride", "mad.wide.u32 \t%rd1, %r1, 5, %rd2;")]),
        ("sub.f32 \t%r1, %r2, %r3;", [("swap", "sub.f32 \t%r1, %r3, %r2;")]),
        ("fma.rn.f32 \t%r1, %r2, %r3, %r4;", [("swap", "fma.rn.f32 \t%r1, %r2, %r4, %r3;")]),
        ("add.f32 \t%r1, %r2, %r3;", []),
        (
            "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r1, %r2}, [%r3];",
            [
                ("offset", "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r1, %r2}, [%r3+16];"),
                ("swap", "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r2, %r1}, [%r3];"),
                ("trans", "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r2}, [%r3];"),
            ],
        ),
        (
            "wgmma.mma_async.sync.aligned.x {%r1}, %rd1, %rd2, 0, 1, 1, 0, 1;",
            [("trans", "wgmma.mma_async.sync.aligned.x {%r1}, %rd1, %rd2, 0, 1, 1, 0, 0;")],
        ),
        ("ld.param.b64 \t%rd1, [kernel_param_0];", []),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_planting(line: str, planted: list[tuple[str, str]]) -> None:
    assert list(mutants_of_line(line, frozenset({"%p2"}))) == planted


def test_a_sample_of_planted_faults_is_found() -> None:
    """All of docs/compiled.md takes an hour; here 30, of which about one in six changes nothing that anybody could see."""
    verdicts = [judge(*mutant, reasons=False) for mutant in sample(30, SUBJECTS)]
    count = collections.Counter(x.verdict for x in verdicts)
    assert len({x.kind for x in verdicts}) >= 6
    assert count["reported"] + count["failing"] >= 18, count
    assert count["reported"] >= 8, count
    assert count["failing"] >= 3, count
    assert count["surviving"] <= 1, [x for x in verdicts if x.verdict == "surviving"]


def test_the_page_is_of_the_verdicts_that_are_kept(tmp_path: Path) -> None:
    verdicts = read(RESULTS)
    assert PAGE.read_text().endswith("\n" + tables(verdicts)), "python -m tests.ptx.mutations --page"
    write(tmp_path / "again.csv", verdicts)
    assert RESULTS.read_text() == (tmp_path / "again.csv").read_text(), "rows in another order, or twice"


def test_every_kernel_is_planted_in() -> None:
    """Of kernels/ and csrc/cuda, by the tables of their registers."""
    paths = (ROOT / "kernels" / "resources.csv", ROOT / "csrc" / "resources.csv")
    kernels = {row["kernel"].partition("<")[0] for path in paths for row in csv.DictReader(path.read_text().splitlines())}
    missing = kernels - {x.kernel for x in read(RESULTS)}
    assert not missing, f"python -m tests.ptx.mutations plants in {sorted(missing)}"
