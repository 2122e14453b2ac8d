"""NaN where the CPU's implementation of an operator has it, and nowhere else, in values and gradients of kernels on graphs.

Each case puts NaN into one place of one argument. Attention itself is in `test_attention.py`, by the dense formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn import MultiGraph
from cellattn.graph import SEGMENT
from cellattn.kernels import attention_bce, edge_attention, perturbation_attention, row_dot
from cellattn.ops._negatives import sample_negatives

from .test_attention_bce import problem_of
from .test_edge_attention import problem as edge_problem
from .test_row_dot import cut

OPS = torch.ops.cellattn
N, PREFIX = 7, 1
UNKNOWN, LONELY = 6, 2  # gene 2 is known, and has no edge of its own
GRAPH = MultiGraph.from_edge_index(
    {"a": torch.tensor([[0, 0, 1, 3, 3, 4, 5], [1, 4, 1, 0, 2, 5, 3]])}, N, known={"a": torch.arange(N) != UNKNOWN}
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_as_on_the_cpu(kernels: Any, forward: str, given: dict[str, Tensor], rest: tuple[Any, ...]) -> None:
    """The forward and the backward, of upstream gradients of any size."""

    def run(launcher: Callable[[str], Callable[..., Any]]) -> list[Tensor]:
        problem = (*given.values(), *rest)
        out = launcher(forward)(*problem)
        first, *kept = out if isinstance(out, (tuple, list)) else (out,)
        grads = launcher(f"{forward}_backward")(*backward(draw(*first.shape, seed=7), kept, problem))
        return [first, *grads]

    def backward(above: Tensor, kept: list[Tensor], problem: tuple[Any, ...]) -> tuple[Any, ...]:
        if forward == "row_dot":
            q, _, _, _, _, colptr, row, weight, _, _, _, segptr, segment_col, segments, *ties = problem
            return above, q, kept[0], colptr, row, weight, segptr, segment_col, segments, *ties
        return above, *kept, *problem

    ours, theirs = (run(functools.partial(getattr, module)) for module in (kernels, OPS))
    for i, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        at, expected = got.isnan(), want.isnan()
        assert not (wrong := (at != expected).nonzero().tolist()), f"result {i}: NaN, or none, against the CPU's at {wrong}"
        largest = max(1.0, float(want.nan_to_num().abs().max()) if want.numel() else 0.0)
        # float32 sums of fewer than 20 products of numbers around 1
        torch.testing.assert_close(got.nan_to_num(), want.nan_to_num(), rtol=0, atol=1e-5 * largest)


TOKENS = {"unknown gene": PREFIX + UNKNOWN, "gene without an edge": PREFIX + LONELY, "gene": PREFIX + 3, "prefix": 0}


@pytest.mark.parametrize("longest", [SEGMENT, 1], ids=["whole rows", "segments"])
@pytest.mark.parametrize("drawn", [False, True], ids=["dense", "drawn"])
@pytest.mark.parametrize(
    ("size", "rows"),
    [(1.0, None), (6.0, None), (6.0, [5, 0, 2, 5]), (None, None)],
    ids=["softmax", "sharp", "sharp, some rows", "sigmoid"],
)
def test_bce(size: float | None, drawn: bool, rows: list[int] | None, longest: int) -> None:
    """With log-sum-exps of the caller's own, made before: only pairs of the loss are read, and by rows with a sharp entry, of
    which large scores make some, all tokens.
    """
    cases = [(argument, token, torch.nan) for argument in "qk" for token in TOKENS.values()]
    cases += [(argument, TOKENS[name], torch.inf) for argument in "qk" for name in ("unknown gene", "prefix")]
    cases += [("q", TOKENS["gene without an edge"], -torch.inf)]
    if size == 6:  # a share of 0 of an infinite key is 0 * inf = NaN on the CPU, and 0 in the kernels
        cases = [case for case in cases if case[0] == "q" or case[2] is torch.nan]
    if size == 6 and not drawn:  # a known gene's NaN is in every row with an edge, and which entry is sharp then, means nothing
        cases = [case for case in cases if case[0] == "q" or case[1] in (TOKENS["prefix"], TOKENS["unknown gene"])]
    q, k = draw(len(cases) + 1, PREFIX + N, 4), draw(len(cases) + 1, PREFIX + N, 4, seed=1)
    index = None if rows is None else torch.tensor(rows)
    total = None
    if size is not None:
        q *= size
        total = (0.5 * q @ k.mT).logsumexp(-1)[:, PREFIX:]
        total = total if index is None else total[:, index]
        total[-1, 0] = torch.nan
    for i, (argument, token, value) in enumerate(cases):
        {"q": q, "k": k}[argument][i, token, 2] = value
    negatives = sample_negatives(GRAPH, "a", index, 3, torch.Generator().manual_seed(0)) if drawn else None
    q, k, total, *rest = problem_of(
        GRAPH, "a", q, k, total, index, negatives, num_prefix=PREFIX, scale=0.5, longest=longest
    )  # fmt: skip
    assert_as_on_the_cpu(attention_bce, "bce_rows", {"q": q, "k": k, "lse": total}, tuple(rest))


@pytest.mark.parametrize("rows", [None, [5, 0, 2, 5]], ids=["all rows", "some rows"])
def test_row_dot(rows: list[int] | None) -> None:
    cases = [(argument, token, torch.nan) for argument in "qk" for token in TOKENS.values()]
    cases += [("k", TOKENS["gene"], torch.inf), ("q", TOKENS["gene"], -torch.inf), ("q", TOKENS["prefix"], torch.inf)]
    given = {"q": draw(len(cases), 1, PREFIX + N, 4), "k": draw(len(cases), 1, PREFIX + N, 4, seed=1)}
    for i, (argument, token, value) in enumerate(cases):
        given[argument][i, 0, token, 2] = value
    index = None if rows is None else torch.tensor(rows)
    ties = [0, 0], [0, 0], None if index is None else torch.cat([index, index]), [N if rows is None else len(rows)] * 2, PREFIX
    assert_as_on_the_cpu(row_dot, "row_dot", given, (*cut(GRAPH, 100), *ties))


@pytest.mark.parametrize(
    ("argument", "row"),
    [("query", 0), ("query", 1), ("key", 3), ("key", 6), ("value", 3), ("value", 6), ("override", 1), ("lse", 0)],
)
def test_perturbation_correction(argument: str, row: int) -> None:
    """A set of two genes, an empty one, and one of one gene."""
    index, ptr = torch.tensor([3, 1, 0]), torch.tensor([0, 2, 2, 3])
    given = {"query": draw(2, 3, 4), "key": draw(2, N, 4, seed=1), "value": draw(2, N, 3, seed=2), "lse": 4 + 0.1 * draw(2, 3)}
    override = draw(2, 3, 3, seed=3)
    {**given, "override": override}[argument][1, row] = torch.nan
    if argument == "value":  # what values that are not finite add is added beside the kernel
        given["value"] = given["value"].nan_to_num(0.0)
    assert_as_on_the_cpu(
        perturbation_attention, "perturbation_correction", {**given, "index": index, "ptr": ptr, "override": override}, (0.5,)
    )


@pytest.mark.parametrize("longest", [100, 1], ids=["whole rows", "segments"])
def test_edge_attention(longest: int) -> None:
    """A head of a relation twice; rows of q are genes alone."""
    nan, inf, gene = torch.nan, torch.inf, PREFIX + 3
    cases = [
        ("q", 3, nan), ("q", LONELY, inf), ("k", 0, nan), ("k", gene, nan), ("k", gene, inf), ("k", gene, -inf),
        ("v", 0, inf), ("v", gene, nan), ("v", gene, inf),
    ]  # fmt: skip
    given = {name: draw(len(cases), 1, N + PREFIX * (name != "q"), 4, seed=i) for i, name in enumerate("qkv")}
    for i, (argument, row, value) in enumerate(cases):
        given[argument][i, 0, row, 2] = value
    rest = None, *edge_problem(GRAPH, [("a", 0), ("a", 0)], False, longest, PREFIX, True, 0.5), None, 0
    problem = (*given.values(), *rest)

    def run(module: Any) -> list[Tensor]:
        out, lse = module.edge_attention(*problem)
        above, dlse = draw(*out.shape, seed=7), draw(*lse.shape, seed=8)
        return [out, lse, *module.edge_attention_backward(above, dlse, out, lse, *problem)[:3]]

    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), run(edge_attention), run(OPS), strict=True):
        for what in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(what(got), what(want)), f"{name}: {what.__name__} at {what(got).nonzero().tolist()}"
        a, b = (torch.where(want.isfinite(), x, 0) for x in (got, want))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.abs().max())))  # as above
