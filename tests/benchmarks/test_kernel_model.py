"""The model's counts, held to what the machine for PTX counts, and to a kernel that is counted by hand."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from benchmarks.kernel_model.chips import CHIPS
from benchmarks.kernel_model.cost import code_of, counts_of, rounds_of
from benchmarks.kernel_model.flex import flex_attention
from benchmarks.kernel_model.machine_code import reached
from benchmarks.kernel_model.trips import RULES, Tied, Trips, trips_of
from cellattn import MultiGraph, kernels
from cellattn.ops.attention import attention
from cellattn.ops.relational_spmm import relational_spmm
from cellattn.ops.row_dot import row_dot

from .. import ptx
from ..bounds import as_list
from ..compare import random_graph
from ..conftest import exhaustive
from ..kernels.aot import Launch
from ..ops.sets import between, graph_of
from ..ptx.device import Counted
from ..ptx.machine import Program
from ..ptx.subjects import SUBJECTS, Subject

MEMORY = ("ld", "cp")


@dataclass
class Loop:
    body: set[int]  # its instructions
    latches: set[int]  # those from which it begins again


def loops_of(program: Program) -> dict[int, Loop]:
    """By the first instruction of each, without loops that only count.

    From a latch a way leads back to the first, and there is no way to it but through the first.
    """
    steps = program.steps
    after: list[list[int]] = [[] for _ in steps]
    for i, step in enumerate(steps):
        if step.kind == "branch":
            after[i].append(step.target)
        if i + 1 < len(steps) and (step.instruction.predicate is not None or step.kind not in ("branch", "exit")):
            after[i].append(i + 1)
    before: list[list[int]] = [[] for _ in steps]
    for i, following in enumerate(after):
        for n in following:
            before[n].append(i)
    found: dict[int, Loop] = {}
    for i, following in enumerate(after):
        for head in following:
            if before[i] and len(before[head]) > 1 and i not in reached(after, without=head):
                loop = found.setdefault(head, Loop({head}, set()))
                loop.body |= reached(before, start=i, without=head)
                loop.latches.add(i)
    return {head: found[head] for head in sorted(found) if any(steps[i].instruction.opcode in MEMORY for i in found[head].body)}


def rounds(counted: Counted) -> list[int]:
    """Rounds of each loop, of all CTAs, that were executed."""
    warps, loops = counted.launch.options["num_warps"], loops_of(counted.program)
    executed = counted.counts.warps
    # a loop that is left at its beginning begins once more than it goes round
    found = {head: int(min(executed[head], executed[list(loop.latches)].sum())) // warps for head, loop in loops.items()}
    args = counted.launch.args
    if args.get("copyptr_ptr") is None or "BE" not in args:
        return list(found.values())
    # Of the loop over copies of a row, inside of that over edges, PTX has two, one for threads without an entry.
    inside = {
        head: number
        for head, number in found.items()
        if any(head in loop.body for other, loop in loops.items() if other != head)
    }
    outside = [number for head, number in found.items() if head not in inside]
    edges = 1 if args.get("HAS_SEGMENTS") else 0
    return [*outside[: edges + 1], max(inside.values()), *outside[edges + 1 :]]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tokens", [80, 209])
def test_rules_of_attention(arch: int, tokens: int) -> None:
    q, k, v = (torch.randn(1, 2, tokens, 20, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with ptx.device(arch, count=True) as device:
        out, lse = attention(q, k, v)
        (out.float().sum() + lse.sum()).backward()
    assert {counted.launch.fn.__name__ for counted in device.counted} >= {"attention_fwd_kernel", "attention_bwd_kernel_dkv"}
    for counted in device.counted:
        trips = trips_of(counted.launch)
        assert trips.loops == rounds(counted), counted.launch.fn.__name__
        assert len(code_of(counted.launch, arch).parts) == 1 + len(trips.loops)


def test_rules_of_ties() -> None:
    """A relation with a hub among its rows, one with a hub among its columns, and one with neither."""
    n, many = 1060, torch.arange(1050)
    plain = random_graph(n, {"plain": 3000})
    edges = {
        "row": torch.stack([torch.zeros_like(many), many]),
        "column": torch.stack([many, torch.full_like(many, 7)]),
        "plain": torch.stack([torch.arange(n).repeat_interleave(plain.rowptr("plain").diff()), plain.col("plain").long()]),
    }
    graph = MultiGraph.from_edge_index(edges, n)
    q, k = (torch.randn(1, 3, n + 1, 20, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with ptx.device(80, count=True) as device:
        row_dot(q, k, graph, [(name, i) for i, name in enumerate(graph.relations)], [None] * 3, num_prefix=1).sum().backward()
    tied = Tied.of(graph)
    assert len(device.counted) == 5
    entries = sum(graph.num_edges(name) for name in graph.relations)
    for counted in device.counted:
        trips = trips_of(counted.launch, tied)
        name = counted.launch.fn.__name__
        if "weight_ptr" in counted.launch.args:  # 1,050 of a hub, which the launch for hubs reads and the other does not
            read = 1050 if name.endswith("segments") else entries - 1050
            assert trips.share["weight_ptr"] == pytest.approx(read / entries), name
        assert trips.loops == rounds(counted), counted.launch.fn.__name__
        assert len(code_of(counted.launch, 80).parts) == 1 + len(trips.loops)


# Whose shapes have hubs, empty rows, repeated rows, sharp entries, drawn negatives, and genes that some samples drop.
FAMILIES = "edge_attention", "masked_spmm", "relational_spmm", "perturbation_attention", "set_sum", "bit_sum", "attention_bce"
MARKS = "has_large", "has_large_ptr", "wild_ptr"  # of rows that are walked apart
# where there are none of those, the log-sum-exps themselves
LARGE = "bce_rows_fwd_kernel_large"
OTHERS = [x for x in SUBJECTS if x.family in FAMILIES or x.name.startswith("few queries")]
SLOW = "few queries", "hubs", "dropout", "shared x"
LONG = [x for x in OTHERS if x.family == "attention_bce" or any(part in x.name for part in SLOW)]


def entered(loops: list[int]) -> list[int]:
    """The first alone, where no other has a round: how many others the compiler makes is nothing that a rule says."""
    return loops if any(loops[1:]) else loops[:1]


@pytest.mark.parametrize("subject", [*(x for x in OTHERS if x not in LONG), *exhaustive(*LONG)], ids=str)
def test_rules_of_other_kernels(subject: Subject) -> None:
    """All shapes that faults are planted at."""
    for make in subject.shapes:
        shape = make()
        given = [x.clone().requires_grad_() for x in shape.inputs]
        with ptx.device(subject.arch, count=True) as device:
            torch.stack([y.float().sum() for y in as_list(shape.op(*given))]).sum().backward()
        for counted in device.counted:
            if subject.owns(counted.launch.fn.__name__):
                trips, warps = trips_of(counted.launch), counted.launch.options["num_warps"]
                args = counted.launch.args
                large = counted.launch.fn.__name__ == LARGE and bool((args["lse_ptr"].abs() > 709).any())
                if large or any(args[marks].any() for marks in MARKS if args.get(marks) is not None):
                    assert trips.loops[:1] == rounds(counted)[:1]  # the rule is of a cell, where no row is marked
                    continue
                where = f"{counted.launch.fn.__name__}, {counted.launch.config}"
                assert entered(trips.loops) == entered(rounds(counted)), where
                for loop, passed in trips.jumps.items():
                    if loop == 0:  # of code that is in no loop, what leads to one may be passed over too
                        continue
                    body = sorted(list(loops_of(counted.program).values())[loop - 1].body)
                    least = int(counted.counts.warps[body].min()) // warps
                    assert least == trips.loops[loop - 1] - passed, where
                for arch in (80, 90):
                    rounds_of(code_of(counted.launch, arch), trips)


@pytest.mark.parametrize("total", [False, True], ids=["each relation", "summed"])
def test_rules_of_shared_messages(total: bool) -> None:
    """Gradients of what all samples share are sums over samples."""
    graph, sets = graph_of(75, 3), between(5, 75)
    x = torch.randn(75, 20, dtype=torch.bfloat16, requires_grad=True)
    with ptx.device(80, count=True) as device:
        relational_spmm(graph, x, *sets, sum_relations=total, shared=True).sum().backward()
    assert any(counted.launch.args.get("SUM_SAMPLES") for counted in device.counted)
    for counted in device.counted:
        assert trips_of(counted.launch).loops == rounds(counted), counted.launch.fn.__name__
        rounds_of(code_of(counted.launch, 80), trips_of(counted.launch))


def test_rule_of_chosen_rows() -> None:
    graph = random_graph(40, {"a": 100})
    q, k = (torch.randn(1, 41, 20, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with ptx.device(80, count=True) as device:
        row_dot(q, k, graph, [("a", 0)], [torch.tensor([3, 3, 17, 3])], num_prefix=1).sum().backward()
    (counted,) = (x for x in device.counted if x.launch.fn.__name__ == "row_dot_bwd_kernel_g")
    assert trips_of(counted.launch).loops == rounds(counted)


def test_every_kernel_has_a_rule() -> None:
    launched = {
        name
        for module in (import_module(f"cellattn.kernels.{found.name}") for found in pkgutil.iter_modules(kernels.__path__))
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and "_kernel" in name and value.fn.__module__ == module.__name__
    }
    assert launched == set(RULES)


@triton.jit
def _by_hand(x_ptr, y_ptr, out_ptr):
    offsets = tl.arange(0, 1024)
    x = tl.load(x_ptr + offsets)
    x = x * x + tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, tl.exp2(x) * x)


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_counts_by_hand(arch: int) -> None:
    """1,024 numbers on 4 warps are 8 a thread.

    Two loads of 16 bytes from either input and two stores; 8 multiply-adds, 8 exponentials and 8 products. On sm_80 the
    compiler makes one constant in the pipe of the multiply-adds.
    """
    arguments = {name: torch.empty(4096, device="meta") for name in ("x_ptr", "y_ptr", "out_ptr")}
    launch = Launch(_by_hand, arguments, {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True})
    (part,) = code_of(launch, arch).parts
    assert (part["global"], part["special"], part["fp32"], part["tensor"], part["waves"]) == (6, 8, 8 + 8 + (arch == 80), 0, 0)
    total = counts_of(code_of(launch, arch), Trips(ctas=5, loops=[]))
    assert (total["global"], total["special"]) == (4 * 5 * 6, 4 * 5 * 8)
    with pytest.raises(ValueError, match="0 loops"):
        counts_of(code_of(launch, arch), Trips(ctas=5, loops=[15]))


def test_a_chip_holds_so_many_ctas() -> None:
    """65,536 registers: 128 a thread are 4,096 a warp, 16 warps; 24 KiB and 1 of the system's fit 6 times in 164."""
    chip = CHIPS["A100"]
    assert chip.resident(registers=128, shared=0, warps=8) == 2
    assert chip.resident(registers=32, shared=24 << 10, warps=4) == 6
    assert chip.resident(registers=16, shared=0, warps=1) == 32


def test_flex_attention_is_compiled_with_its_loops() -> None:
    forward, backward = flex_attention(80, 9, 6608, 20, torch.bfloat16)
    assert [part["products"] > 0 for part in forward.code.parts] == [False, True]
    # dq makes three products of two matrices, dk and dv four
    _, dq, dkv = backward.code.parts
    assert 4 * dq["products"] == 3 * dkv["products"] > 0
