"""The model's counts, held to what the machine for PTX counts, and to a kernel that is counted by hand."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.kernel_model.chips import CHIPS
from benchmarks.kernel_model.cost import code_of, counts_of
from benchmarks.kernel_model.flex import flex_attention
from benchmarks.kernel_model.trips import Tied, Trips, trips_of
from cellattn import MultiGraph
from cellattn.ops.attention import attention
from cellattn.ops.row_dot import row_dot

from .. import ptx
from ..compare import random_graph
from ..kernels.aot import Launch
from ..ptx.device import Counted


def rounds(counted: Counted) -> list[int]:
    """Rounds of each loop, of all CTAs, that were executed; a loop is where branches lead back."""
    steps, warps = counted.program.steps, counted.launch.options["num_warps"]
    heads = sorted({step.target for i, step in enumerate(steps) if step.kind == "branch" and 0 <= step.target <= i})
    return [int(counted.counts.warps[head]) // warps for head in heads]


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
    for counted in device.counted:
        trips = trips_of(counted.launch, tied)
        assert trips.loops == rounds(counted), counted.launch.fn.__name__
        assert len(code_of(counted.launch, 80).parts) == 1 + len(trips.loops)


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
