"""How often the loops of a kernel run: the one thing that its machine code does not say.

Of each kernel, from the arguments of a launch and the degrees of the graph, for all CTAs together. The loops are in the order
in which they begin in the code. `tests/benchmarks/test_kernel_model.py` holds every rule to what a run of the compiled code
counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellattn import MultiGraph
from tests.kernels.aot import Launch


@dataclass(frozen=True)
class Trips:
    ctas: int  # that do not return at once
    loops: list[int]


@dataclass(frozen=True)
class Side:
    """A relation by rows, or by columns."""

    degree: np.ndarray  # [N]
    segments: np.ndarray  # [N]: into how many parts a long one is cut, 0 where it is not


@dataclass(frozen=True)
class Tied:
    """What the launches of a layer's ties depend on: tie t joins relation t with head t, all rows of it."""

    rows: list[Side]
    columns: list[Side]

    @classmethod
    def of(cls, graph: MultiGraph) -> Tied:
        by_row, by_column = graph.segments
        sides = []
        for pointers, segments in ((_stacked(graph), by_row), (graph.transpose()[0].numpy(), by_column)):
            degree, cut = np.diff(pointers), np.diff(segments.ptr.numpy())
            n = graph.num_nodes
            sides.append([Side(degree[r * n : (r + 1) * n], cut[r * n : (r + 1) * n]) for r in range(len(graph.relations))])
        return cls(*sides)


def _stacked(graph: MultiGraph) -> np.ndarray:
    degrees = [np.diff(graph.rowptr(name).numpy()) for name in graph.relations]
    return np.concatenate([[0], np.cumsum(np.concatenate(degrees))])


def _steps(total: np.ndarray | int, each: int) -> Any:
    return -(-total // each)


def _by_tiles(length: str, step: str) -> Callable[[Launch, Tied | None], Trips]:
    """A loop over whole tiles of one side, in parts, and one masked step for what is left of a part."""

    def trips(launch: Launch, tied: Tied | None) -> Trips:
        a = launch.args
        parts = [min((s + 1) * a["part"], a[length]) - s * a["part"] for s in range(a["NS"])]
        each = launch.ctas // a["NS"]
        if not a["TAIL"]:
            return Trips(launch.ctas, [each * sum(_steps(n, a[step]) for n in parts)])
        return Trips(launch.ctas, [each * sum(n // a[step] for n in parts), each * sum(n % a[step] > 0 for n in parts)])

    return trips


def _straight(launch: Launch, tied: Tied | None) -> Trips:
    return Trips(launch.ctas, [])


def _segments(side: str) -> Callable[[Launch, Tied | None], Trips]:
    def trips(launch: Launch, tied: Tied | None) -> Trips:
        assert tied is not None
        a = launch.args
        lead = launch.ctas // (a["num_ties"] * a["max_segments"])
        steps = count = 0
        for part in getattr(tied, side):
            for degree, cut in zip(part.degree[part.segments > 0], part.segments[part.segments > 0], strict=True):
                ends = degree * np.arange(cut + 1) // cut
                steps += int(_steps(np.diff(ends), a["EDGES"]).sum())
                count += int(cut)
        return Trips(lead * count, [lead * steps])

    return trips


def _walk(part: Side, edges: int, has_segments: bool) -> tuple[int, int]:
    """(steps over partial sums, steps over entries) of all rows."""
    cut = part.segments if has_segments else np.zeros_like(part.segments)
    return int(_steps(cut, edges).sum()), int(_steps(part.degree[cut == 0], edges).sum())


def _rows(launch: Launch, tied: Tied | None) -> Trips:
    assert tied is not None
    a = launch.args
    lead = launch.ctas // (a["num_ties"] * a["max_length"])
    sums = [_walk(part, a["EDGES"], a["HAS_SEGMENTS"]) for part in tied.rows]
    partial, entries = (lead * sum(x) for x in zip(*sums, strict=True))
    return Trips(launch.ctas, [partial, entries] if a["HAS_SEGMENTS"] else [entries])


def _columns(launch: Launch, tied: Tied | None) -> Trips:
    assert tied is not None
    a = launch.args
    lead = launch.ctas // (a["num_heads"] * (a["num_prefix"] + a["num_genes"]))
    sums = [_walk(part, a["EDGES"], a["HAS_SEGMENTS"]) for part in tied.columns]
    partial, entries = (lead * sum(x) for x in zip(*sums, strict=True))
    outer = lead * a["num_ties"] * a["num_genes"]
    return Trips(launch.ctas, [outer, partial, entries] if a["HAS_SEGMENTS"] else [outer, entries])


def _rows_backward(launch: Launch, tied: Tied | None) -> Trips:
    return Trips(launch.ctas, [launch.ctas * launch.args["num_ties"] // launch.args["num_heads"]])


RULES: dict[str, Callable[[Launch, Tied | None], Trips]] = {
    "attention_fwd_kernel": _by_tiles("Tk", "BN"),
    "attention_bwd_kernel_delta": _straight,
    "attention_bwd_kernel_dq": _by_tiles("Tk", "BN"),
    "attention_bwd_kernel_dkv": _by_tiles("Tq", "BM"),
    "row_dot_fwd_kernel_segments": _segments("rows"),
    "row_dot_fwd_kernel": _rows,
    "row_dot_bwd_kernel_dq": _rows_backward,
    "row_dot_bwd_kernel_dk_segments": _segments("columns"),
    "row_dot_bwd_kernel_dk": _columns,
}


def trips_of(launch: Launch, tied: Tied | None = None) -> Trips:
    """Of a launch.

    Raises:
        KeyError: for a kernel that has no rule.
    """
    return RULES[launch.fn.__name__](launch, tied)
