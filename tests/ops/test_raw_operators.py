"""The extension's operators with hostile tensors: an exception or a result, never a read or write out of bounds.

In processes of their own, so that a crash is a failure that names its seed. Tensors that an operator writes are the middle of
larger ones, whose ends are looked at afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn import MultiGraph

from ..conftest import exhaustive
from .sets import problem

OPS = torch.ops.cellattn
GUARD = 1024  # entries left and right of a tensor that is written
POISON = 77
ROUNDS = 500
HUGE = (-(2**63), -(2**40), -1, 0, 1, 63, 64, 65, 2**31 - 1, 2**31, 2**40, 2**63 - 1)

Arguments = dict[str, Any]


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)

    def int(self, low: int, high: int) -> int:
        """In [low, high)."""
        return int(torch.randint(low, high, (), generator=self.g))

    def of(self, choices: Any) -> Any:
        return choices[self.int(0, len(choices))]


# ------------------------------------------------------------------------------------------------------ right arguments


def guarded(length: int, dtype: torch.dtype) -> Tensor:
    """The middle of a longer tensor."""
    return torch.full((length + 2 * GUARD,), POISON, dtype=dtype)[GUARD : GUARD + length]


def right_arguments(draw: Draw) -> dict[str, Arguments]:
    """What each operator takes, for one small problem."""
    p = problem(
        draw.int(0, 1000), draw.of([1, 2, 7, 40]), draw.of([[], [0], [60], [5, 0, 300]]), draw.of([0, 1, 5, 64, 65, 130])
    )
    graph, num_sets, n = p.graph, p.ptr.numel() - 1, p.graph.num_nodes
    rowptr, col, _ = graph.stacked
    colptr, row, _ = graph.transpose()
    stack = {"rowptr": rowptr.clone(), "col": col.clone()}
    one = one_relation(graph)
    words = OPS.khop_words(rowptr, col, colptr, row, p.seeds, p.ptr, n, 1, False, True, False)
    node_ptr, edge_ptr, offsets = OPS.induced_sizes(rowptr, col, words, num_sets)
    dtype, csr = draw.of([torch.int64, torch.int32]), draw.of([False, True])
    num_nodes, room = int(node_ptr[-1]), edge_ptr[:, -1].tolist()
    sets = {"seeds": p.seeds.clone(), "ptr": p.ptr.clone()}
    features = torch.randn(num_sets, n, 3)
    value = draw.of([None, torch.rand(one["col"].numel())])
    relations = [draw.int(0, len(graph.relations)) for _ in range(draw.int(0, 4))] if graph.relations else []
    between, shared = right_subsets(num_sets, n, draw), draw.of([False, True])
    sent = torch.randn(*[n if shared else between["source"].numel(), *draw.of([[], [len(relations)]])], 20)
    scale = torch.rand(between["target"].numel(), len(relations))
    heads, num_queries, dim_v = draw.of([0, 1, 3]), draw.of([0, 1, 33, 200]), draw.of([0, 1, 20])
    qkv = {"q": torch.randn(heads, num_queries, 5), "k": torch.randn(heads, n, 5), "v": torch.randn(heads, n, dim_v)}
    threshold = draw.of([0, 1, 20_000, 65_535])
    attention = {
        "key_mask": draw.of([None, torch.rand(heads, n) < 0.5]), "draw": torch.tensor([-1, 3]) if threshold else None,
        "scale": 0.5, "threshold": threshold, "rounding": 0.0,
    }  # fmt: skip
    rows = torch.randn(2, heads, num_queries)
    values = torch.randn(2, heads, num_queries, dim_v)
    ties, num_prefix = draw.int(0, 4) if graph.relations else 0, draw.of([0, 1, 3])
    log_weight = draw.of([None, torch.randn(col.numel())])
    edge_tensors = {
        "q": torch.randn(2, 3, n, 5), "k": torch.randn(2, 3, num_prefix + n, 5), "v": torch.randn(2, 3, num_prefix + n, dim_v),
        "edge_bias": draw.of([None, torch.randn(ties)]),
    }  # fmt: skip
    by_row = {"rowptr": rowptr.clone(), "col": col.clone(), "log_weight": log_weight}
    edge_options = {
        "relations": [draw.int(0, len(graph.relations)) for _ in range(ties)], "heads": [draw.int(0, 3) for _ in range(ties)],
        "num_prefix": num_prefix, "self_loops": draw.of([False, True]), "scale": 0.5,
        "draw": attention["draw"], "threshold": threshold,
    }  # fmt: skip
    rows_of_scores, dtype_of_scores = draw.int(0, 5), draw.of([torch.float32, torch.float64])
    bce = {
        "scores": guarded(rows_of_scores * n, dtype_of_scores).view(rows_of_scores, n),
        "total": draw.of([None, torch.full((rows_of_scores,), 3.0, dtype=dtype_of_scores)]),
        "rows": torch.randint(n, (rows_of_scores,), generator=draw.g), **one,
        "weight": draw.of([None, torch.rand(one["col"].numel(), dtype=dtype_of_scores)]),
        "inv_mass": torch.rand(n, dtype=dtype_of_scores),
        "unknown": torch.randint(n, (draw.int(0, 3),), generator=draw.g),
    }  # fmt: skip
    return {
        "attention_rows": {**qkv, **attention},
        "attention_rows_backward": {
            "dout": values[0], "dlse": draw.of([None, rows[0]]), **qkv, "key_mask": attention["key_mask"], "out": values[1],
            "lse": rows[1], **attention,
        },
        "is_ordinary": {**qkv, "rounding": draw.of([0.0, 1.0])},
        "bce_map": {**bce, "least": -0.5, "most": draw.of([-0.7, float("inf")])},
        "bce_map_backward": {
            "dloss": torch.rand(rows_of_scores, dtype=dtype_of_scores),
            "sharp": torch.randint(-1, n, (0 if bce["total"] is None else rows_of_scores,), generator=draw.g), **bce,
            "most": -0.7,
        },
        "edge_rows": {**edge_tensors, **by_row, **edge_options},
        "edge_rows_backward": {
            "dout": torch.randn(2, 3, n, dim_v), "delta": torch.randn(2, 3, n), "lse": torch.randn(2, 3, n), **edge_tensors,
            **by_row, "colptr": colptr.clone(), "row": row.clone(),
            "log_weight_by_column": None if log_weight is None else log_weight.clone(), **edge_options,
        },
        "are_sets": {
            "index": sets["seeds"], "ptr": sets["ptr"], "size": n, "ascending": draw.of([False, True]), "distinct": True,
        },
        "set_words": {**sets, "num_nodes": n, "complement": False},
        "khop_words": {
            **stack, "colptr": colptr.clone(), "row": row.clone(), **sets, "num_nodes": n, "num_hops": 2,
            "mixed": draw.of([False, True]), "incoming": True, "outgoing": draw.of([False, True]),
        },
        "unpack_words": {"words": words, "num_sets": num_sets},
        "pack_words": {"keep": torch.rand(num_sets, n) < 0.5},
        "edge_words": {**one, "words": words},
        "bit_spmm": {
            "words": words, "rows": draw.of([None, torch.randint(n, (5,), generator=draw.g)]),
            "x": torch.randn(num_sets, draw.of([0, 1, 20, 33])),
        },
        "subgraph_rows": {
            **stack, "nodes": torch.randperm(n, generator=draw.g)[: draw.int(0, n + 1)], "num_nodes": n,
        },
        "induced_sizes": {**stack, "words": words, "num_sets": num_sets},
        "induced_write": {
            **stack, "words": words, "seed_words": words.clone(), "node_ptr": node_ptr, "edge_ptr": edge_ptr,
            "offsets": offsets, "node": guarded(num_nodes, dtype), "seed_mask": guarded(num_nodes, torch.bool),
            "edge_index": guarded((1 if csr else 2) * sum(room), dtype),
            "edge_id": draw.of([None, guarded(sum(room), dtype)]),
            "csr_rowptr": guarded(len(room) * (num_nodes + 1), dtype) if csr else None, "edge_capacity": room,
        },
        "masked_spmm": {
            **one, "value": value, "x": draw.of([features, torch.randn(n, 3)]), "words": words, "num_sets": num_sets,
            "mean": draw.of([False, True]),
        },
        "masked_sddmm": {
            **one, "g": features, "x": draw.of([features, torch.randn(n, 3)]), "words": words, "num_sets": num_sets,
        },
        "masked_degree": {**one, "words": words, "num_sets": num_sets},
        "relational_spmm": {
            **stack, "value": torch.rand(col.numel()), "x": sent, **between,
            "source_scale": draw.of([None, torch.rand(sent.shape[0], len(relations))]), "target_scale": draw.of([None, scale]),
            "relations": relations, "num_nodes": n, "shared": shared, "sum_relations": draw.of([False, True]),
            "sum_samples": draw.of([False, True]),
        },
        "relational_degree": {**stack, **between, "relations": relations, "num_nodes": n},
    }  # fmt: skip


def right_subsets(num_sets: int, num_nodes: int, draw: Draw) -> Arguments:
    """Genes that send and that receive in each sample, ascending."""
    subsets = {}
    for name in ("source", "target"):
        member = torch.rand(num_sets, num_nodes, generator=draw.g) < 0.5
        subsets[name] = member.nonzero()[:, 1].contiguous()
        subsets[f"{name}_ptr"] = torch.cat([torch.zeros(1, dtype=torch.int64), member.sum(1).cumsum(0)])
    return subsets


def one_relation(graph: MultiGraph) -> Arguments:
    if not graph.relations:
        return {"rowptr": torch.zeros(graph.num_nodes + 1, dtype=torch.int64), "col": torch.empty(0, dtype=torch.int32)}
    name = graph.relations[-1]
    return {"rowptr": graph.rowptr(name).clone(), "col": graph.col(name).clone()}


# ---------------------------------------------------------------------------------------------------------- hostile ones


def other_dtype(x: Tensor, draw: Draw) -> Tensor:
    return x.to(draw.of([torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, torch.bool]))


def strided(x: Tensor, draw: Draw) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def other_shape(x: Tensor, draw: Draw) -> Tensor:
    return draw.of([lambda: x[None], lambda: x.reshape(-1), lambda: x.new_zeros(()), lambda: x[..., None]])()


def shorter(x: Tensor, draw: Draw) -> Tensor:
    dim = draw.int(0, max(x.ndim, 1))
    return x.narrow(dim, 0, draw.int(0, x.shape[dim] + 1)).contiguous() if x.ndim else x


def longer(x: Tensor, draw: Draw) -> Tensor:
    dim = draw.int(0, max(x.ndim, 1))
    return torch.cat([x, x, x], dim) if x.ndim else x


def empty(x: Tensor, draw: Draw) -> Tensor:
    return x.new_empty((0,) * x.ndim)


def elsewhere(x: Tensor, draw: Draw) -> Tensor:
    return x.to("meta")


def wild_values(x: Tensor, draw: Draw) -> Tensor:
    """Some entries replaced: far out of range, negative, next to what they were."""
    x = x.clone()
    if x.numel() == 0 or x.dtype == torch.bool or x.is_floating_point():
        return x
    low, high = torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max
    for _ in range(draw.int(1, 4)):
        position = draw.int(0, x.numel())
        around = int(x.reshape(-1)[position]) + draw.of([-1, 1, 7])
        x.view(-1)[position] = min(max(draw.of([*HUGE, around]), low), high)
    return x


def shuffled(x: Tensor, draw: Draw) -> Tensor:
    return x.reshape(-1)[torch.randperm(x.numel(), generator=draw.g)].reshape(x.shape)


CHANGES: list[Callable[[Tensor, Draw], Tensor]] = [
    other_dtype, strided, other_shape, shorter, longer, empty, elsewhere, wild_values, wild_values, wild_values, shuffled,
]  # fmt: skip
WRITTEN = ("scores", "node", "seed_mask", "edge_index", "edge_id", "csr_rowptr")


def hostile(name: str, value: Any, draw: Draw) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        # sizes that a result would be allocated with stay small: a refusal to allocate is no finding
        return draw.of([size for size in HUGE if size < 100 or name not in ("num_nodes",)])
    if isinstance(value, float):
        return draw.of([0.0, -1e300, 1e300, float("nan"), float("inf")])
    if isinstance(value, list):
        return draw.of([[], value[:-1], [*value, 5], [draw.of(HUGE) for _ in value], [max(size - 3, 0) for size in value]])
    if value is None:
        return draw.of([torch.ones(5), torch.ones(5, dtype=torch.int64), guarded(200, torch.int64)])
    if name in WRITTEN and draw.of([True, False]):
        return guarded(draw.of([0, 1, max(value.numel() - 1, 0), value.numel() + 1]), value.dtype)
    return draw.of([*CHANGES, lambda x, draw: None])(value, draw)


def guards(arguments: Arguments) -> list[Tensor]:
    """What lies left and right of the tensors that are written."""
    ends = []
    for name in WRITTEN:
        x = arguments.get(name)
        if isinstance(x, Tensor) and x.device.type == "cpu" and x.storage_offset() == GUARD and x.is_contiguous():
            whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            ends += [whole[:GUARD], whole[GUARD + x.numel() :]]
    return ends


def check_result(operator: str, arguments: Arguments, result: Any) -> None:
    """What a finished call may leave: indices in range, poison where it was."""
    for end in guards(arguments):
        assert (end == torch.tensor(POISON).to(end.dtype)).all(), "written out of bounds"
    if operator in ("khop_words", "set_words", "pack_words"):
        num_sets = arguments["keep"].shape[0] if operator == "pack_words" else arguments["ptr"].numel() - 1
        assert result.shape[1] == -(-num_sets // 64)
        for b in range(num_sets, 64 * result.shape[1]):
            assert not ((result[:, b // 64] >> (b % 64)) & 1).any(), "bits past the last sample"
    if operator == "bit_spmm":
        rows = arguments["rows"]
        assert result.shape == (arguments["words"].shape[0] if rows is None else rows.numel(), arguments["x"].shape[1])
    if operator == "induced_sizes":
        for pointers in (result[0][None], result[1]):
            assert (pointers[:, 0] == 0).all()
            assert (pointers.diff(dim=1) >= 0).all()
    if operator == "relational_degree":
        assert result.shape == (arguments["target"].numel(), len(arguments["relations"]))
        assert ((result >= 0) & (result <= arguments["num_nodes"])).all()
    if operator == "relational_spmm":
        places = arguments["num_nodes"] if arguments["sum_samples"] else arguments["target"].numel()
        assert result.shape[0] == places
        assert result.ndim == (2 if arguments["sum_relations"] else 3)
    if operator in ("masked_degree", "masked_spmm"):
        assert result.shape[:2] == (arguments["num_sets"], arguments["words"].shape[0])


def attack(seed: int) -> str:
    """One call with up to three hostile arguments; how it ended."""
    draw = Draw(seed)
    every = right_arguments(draw)
    operator = draw.of(list(every))
    arguments = every[operator]
    changed = {draw.of(list(arguments)): None for _ in range(draw.int(0, 4))}  # in order, each once
    for name in changed:
        arguments[name] = hostile(name, arguments[name], draw)
    try:
        result = getattr(OPS, operator)(*arguments.values())
    except Exception:  # any will do, the fakes that meta tensors reach have an IndexError
        for end in guards(arguments):
            assert (end == torch.tensor(POISON).to(end.dtype)).all(), "written out of bounds before an exception"
        return "refused"
    if not any(isinstance(x, Tensor) and x.device.type == "meta" for x in arguments.values()):
        check_result(operator, arguments, result)
    return "ran" if changed else "right"


def main(first: int, count: int) -> None:
    ends = {"right": 0, "ran": 0, "refused": 0}
    for seed in range(first, first + count):
        print(f"seed {seed}", flush=True)  # the last one printed is that of a crash
        ends[attack(seed)] += 1
    # all three happen, or the attacks miss their aim
    assert min(ends.values()) > count // 20, ends


@pytest.mark.parametrize("isa", ["", "portable", *exhaustive("avx2")])
@pytest.mark.parametrize(("first", "rounds"), [(0, ROUNDS), *exhaustive((ROUNDS, 5 * ROUNDS))], ids=["", "more"])
def test_hostile_arguments(first: int, rounds: int, isa: str) -> None:
    environment = {**os.environ, "CELLATTN_ISA": isa}
    code = f"from tests.ops.test_raw_operators import main; main({first}, {rounds})"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment,
    )  # fmt: skip
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{last}: exit status {done.returncode}\n{done.stderr[-3000:]}"


def test_right_arguments_run() -> None:
    """What the attacks change arguments of, so that an exception there comes from the change."""
    for seed in range(30):
        for operator, arguments in right_arguments(Draw(seed)).items():
            check_result(operator, arguments, getattr(OPS, operator)(*arguments.values()))
