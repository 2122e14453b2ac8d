"""Rows load in pieces of 16 bytes, however the caller's tensors lie in memory: read from compiled code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cellattn.kernels import (
    attention,
    attention_bce,
    bit_sum,
    edge_attention,
    masked_spmm,
    perturbation_attention,
    relational_spmm,
    row_dot,
)

from ..conftest import exhaustive
from .aot import recorded
from .loads import feature_loads

# Where features lie: (name, features, tokens and heads of them in bfloat16 on "meta"). None begins at a multiple of 16 bytes
# in every row, nor in every head, but the first.
H, T = 9, 500


def _contiguous(d: int) -> Callable[[], Tensor]:
    return lambda: torch.empty(H, T, d, dtype=torch.bfloat16, device="meta")


def _joint(d: int, part: int) -> Callable[[], Tensor]:
    """One of q, k and v, as views of their joint projection [T, 3, H, d]."""
    return lambda: torch.empty(T, 3, H, d, dtype=torch.bfloat16, device="meta")[:, part].transpose(0, 1)


def _shifted(d: int) -> Callable[[], Tensor]:
    """Without the first token."""
    return lambda: torch.empty(H, T + 1, d, dtype=torch.bfloat16, device="meta")[:, 1:]


LAYOUTS = {
    "aligned": _contiguous(32),
    "heads of 20": _contiguous(20),
    "k of a joint projection": _joint(20, 1),
    "v of a joint projection": _joint(20, 2),
    "second token on": _shifted(180),
    "odd": _shifted(7),
    "features far apart": lambda: torch.empty(H, 20, T, dtype=torch.bfloat16, device="meta").mT,
}


def _attention(make: Callable[[], Tensor]) -> None:
    q, k, v = make(), make(), make()
    out, lse = attention.attention(q, k, v, None, 0.3)
    attention.attention_backward(v, lse, q, k, v, None, out, lse, 0.3)


def _row_dot(make: Callable[[], Tensor]) -> None:
    n, q, k = T - 1, make(), make()
    entries = torch.empty(20 * n, dtype=torch.int32, device="meta")
    weight = torch.empty(20 * n, device="meta")
    ptr = torch.empty(n + 1, dtype=torch.int64, device="meta")
    cut = ptr, torch.empty(3, dtype=torch.int64, device="meta"), [0, 3]
    ties = [0], [4], None, [n], 1
    y, kbar = row_dot.row_dot(q, k, ptr, entries, weight, ptr, entries, weight, *cut, *cut, *ties)
    row_dot.row_dot_backward(y, q, kbar, ptr, entries, weight, *cut, *ties)


def _bit_sum(make: Callable[[], Tensor]) -> None:
    x = make()
    bit_sum.bit_sum(x, _longs(x.shape[-2], -(-x.shape[-2] // 64)), None)


def _edge_attention(make: Callable[[], Tensor]) -> None:
    q, k, v = make()[:, 1:], make(), make()
    n = q.shape[1]
    ptr, entries = torch.empty(n + 1, dtype=torch.int64, device="meta"), torch.empty(20 * n, dtype=torch.int32, device="meta")
    cut = ptr, torch.empty(3, dtype=torch.int64, device="meta"), [0, 3]
    problem = q, k, v, None, *(ptr, entries, None) * 2, *cut, *cut, [0] * H, list(range(H)), 1, True, 0.3
    out, lse = edge_attention.edge_attention(*problem)
    edge_attention.edge_attention_backward(v[:, 1:], lse, out, lse, *problem)


def _longs(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.int64, device="meta")


def _graph(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    entries = 20 * num_rows
    return _longs(num_rows + 1), torch.empty(entries, dtype=torch.int32, device="meta"), torch.empty(entries, device="meta")


def _attention_bce(make: Callable[[], Tensor]) -> None:
    """Edges alone with drawn negatives of the sigmoid link, and every pair of the softmax link."""
    n, q, k = T - 1, make(), make()
    row = torch.empty(H, n, device="meta")
    cut = _longs(n + 1), _longs(3), [0, 3]
    for lse, drawn in ((None, (_longs(5 * n), _longs(5 * n), _longs(n + 1), row[0])), (row, (None,) * 4)):
        problem = (
            q, k, lse, *_graph(n), *_graph(n), *cut, *cut, row[0], torch.empty(n, dtype=torch.bool, device="meta"), None,
            *drawn, 0, 1, 0.3, True,
        )  # fmt: skip
        _, *sharp = attention_bce.bce_rows(*problem)
        attention_bce.bce_rows_backward(row, *sharp, *problem)


def _masked_spmm(make: Callable[[], Tensor]) -> None:
    """H samples, and what they share."""
    x = make()
    n = x.shape[1]
    rowptr, col, value = _graph(n)
    for features in (x, x[1]):
        masked_spmm.masked_spmm(rowptr, col, value, features, _longs(n, 1), H, False)
        masked_spmm.masked_sddmm(rowptr, col, x, features, _longs(n, 1), H)


def _relational_spmm(make: Callable[[], Tensor]) -> None:
    """Features of each of H relations, and of all at once, forward and backward."""
    x = make().transpose(0, 1)
    n = x.shape[0]
    rowptr, col, value = _graph(H * n)
    places = _longs(n), _longs(3), _longs(n), _longs(3)
    for features, sum_samples in ((x, False), (x[:, 1], True)):
        relational_spmm.relational_spmm(
            rowptr, col, value, features, *places, None, None, list(range(H)), n, False, True, sum_samples
        )


def _perturbation_attention(make: Callable[[], Tensor]) -> None:
    query, key, value, override = make(), make(), make(), make()
    n = query.shape[1]
    problem = query, key, value, torch.empty(H, n, device="meta"), _longs(n), _longs(n + 1), override, 0.3
    perturbation_attention.perturbation_correction_backward(make(), *problem)
    perturbation_attention.perturbation_correction(*problem)


# Every launcher that loads rows of features: (its call, kernels that load none in a loop).
LAUNCHERS: dict[str, tuple[Callable[[Callable[[], Tensor]], None], set[str]]] = {
    "attention": (_attention, {"attention_fwd_kernel_combine", "attention_bwd_kernel_delta"}),
    "edge_attention": (_edge_attention, {"attention_bwd_kernel_delta"}),
    "attention_bce": (_attention_bce, {"bce_rows_fwd_kernel_sharp", "bce_rows_bwd_kernel_operands"}),
    "row_dot": (_row_dot, {"row_dot_bwd_kernel_dq"}),
    "bit_sum": (_bit_sum, {"bit_sum_kernel_pieces"}),
    "masked_spmm": (_masked_spmm, set()),
    "relational_spmm": (_relational_spmm, {"place_table_kernel"}),
    "perturbation_attention": (_perturbation_attention, set()),
}


# Their loads stand in branches that the compiler puts behind the loop; outside of it they load nothing narrower.
BRANCHES_IN_LOOPS = {"masked_spmm_kernel", "masked_sddmm_kernel"}

# They walk over the rows of large scores one by one, of which there is nearly always none.
RARE = {f"{family}_bwd_kernel_large_{part}" for family in ("attention", "edge") for part in ("dq", "dkv")}
RARE |= {f"bce_rows_{kernel}" for kernel in ("fwd_kernel_large", "bwd_kernel_large_dq", "bwd_kernel_large_dk")}

# Read where it is not finite, row by row.
RARE_ARGUMENTS = {("bit_sum_kernel", "x_ptr")}

# Of seven features the addresses of these go through shared memory, where they are not followed.
THROUGH_SHARED = {
    (name, "odd") for name in ("edge_attention", "row_dot", "masked_spmm", "relational_spmm", "perturbation_attention")
}
# A tile of 64 rows of 16 numbers is four a thread.
WIDTHS = {("attention", "odd"): {8, 16}, ("attention_bce", "odd"): {8, 16}}
CASES = [(name, layout, 80) for name in LAUNCHERS for layout in LAYOUTS if (name, layout) not in THROUGH_SHARED] + [
    (name, "heads of 20", 90) for name in LAUNCHERS
]


SHORT = ("k of a joint projection", "odd", "heads of 20")


@pytest.mark.parametrize(
    ("name", "layout", "arch"),
    [*(case for case in CASES if case[1] in SHORT), *exhaustive(*(case for case in CASES if case[1] not in SHORT))],
)
def test_rows_load_in_16_bytes(name: str, layout: str, arch: int) -> None:
    call, without = LAUNCHERS[name]
    with recorded(arch) as launches:
        call(LAYOUTS[layout])
    kernels = {launch.fn.__name__: launch for launch in launches if launch.fn.__name__ not in RARE}
    loads = {
        kernel: {
            argument: widths
            for argument, widths in feature_loads(launch, arch, loops_only=kernel not in BRANCHES_IN_LOOPS).items()
            if (kernel, argument) not in RARE_ARGUMENTS
        }
        for kernel, launch in kernels.items()
    }
    assert {kernel for kernel, found in loads.items() if not found} == without
    wide = WIDTHS.get((name, layout), {16})
    assert {kernel: found for kernel, found in loads.items() if any(not widths <= wide for widths in found.values())} == {}


def test_narrow_loads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows taken as they lie, at an odd address."""
    monkeypatch.setattr(row_dot, "aligned", lambda x, lead, num_prefix: x[None])
    with recorded(80) as launches:
        _row_dot(_joint(20, 1))
    assert [feature_loads(launch, 80) for launch in launches if launch.fn is row_dot.row_dot_fwd_kernel] == [{"k_ptr": {2}}]
