"""The comparisons can fail, and not by chance: whatever an op computes on its way, made larger by one part in 10,000, is found,
while other roundings of the same sums stay far within the bounds.

Steps are not found by name: a mode counts the operations of a public function, forward and backward and inside its operators,
and repeats the whole once for each of their results that holds numbers, with that result made wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode

import cellattn
from cellattn import reference
from cellattn.ops.set_attention import set_attention

from ..bounds import as_list, gradients, ratio_to_bound, with_bounds
from ..compare import leaves, random_graph, typed_graph
from ..nn.test_hypersagnn import block_mask
from .test_attention_kl_comembership import by_sums
from .test_perturbation_attention import attention_and_correction

# Half precision rounds by more than one part in 10,000.
WRONG = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.25}

GRAPH = random_graph(60, {"a": 500}, weighted=True)
SETS = torch.tensor([1, 5, 0, 2, 3, 7]), torch.tensor([0, 2, 3, 6])
KEEP = torch.rand(5, 60, generator=torch.Generator().manual_seed(0)) < 0.7
GENES = torch.arange(60), torch.tensor([0, 30, 60])
SHARED = typed_graph({"gene": 60, "term": 12}, {"of": ("gene", "term", 150)}).comembership("of")


class Problem(NamedTuple):
    """run(module, *inputs) of the library or of the reference, inputs of these shapes, whether results are sums of parts."""

    run: Callable[..., Any]
    shapes: list[tuple[int, ...]]
    parts: bool = False
    reference: Any = reference
    dtypes: Collection[torch.dtype] = tuple(WRONG)


def graph_attention(module: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, losses = module.graph_attention(q, k, v, GRAPH, [("a", 0), ("a", 1)], reduction="none")
    return out, *losses


def of_sets(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    f = set_attention if module is cellattn else block_mask
    return f(q, k, v, SETS[1], include_self=True)


def of_sets_and_null(module: Any, q: Tensor, k: Tensor, v: Tensor, score: Tensor, value: Tensor) -> Tensor:
    if module is cellattn:
        return set_attention(q, k, v, SETS[1], None, True, score, value)
    return module.set_attention(q, k, v, SETS[1], null_score=score, null_value=value)


PROBLEMS = {
    "attention": Problem(lambda m, q, k, v: m.attention(q, k, v), [(2, 40, 8), (2, 50, 8), (2, 50, 6)]),
    "attention dropout": Problem(
        lambda m, q, k, v: m.attention(q, k, v, dropout_p=0.3, generator=torch.Generator().manual_seed(0)),
        [(2, 40, 8), (2, 50, 8), (2, 50, 6)],
    ),
    "attention_kl": Problem(
        lambda m, q, k: m.attention_kl(q, k, GRAPH, "a", num_prefix=1, reduction="none"), [(61, 4), (61, 4)], parts=True
    ),
    "attention_kl_comembership": Problem(
        lambda m, q, k: m.attention_kl_comembership(q, k, SHARED, num_prefix=1, reduction="none"),
        [(61, 4), (61, 4)],
        parts=True,
        reference=SimpleNamespace(attention_kl_comembership=by_sums),
    ),
    "attention_bce sigmoid": Problem(
        lambda m, q, k: m.attention_bce(q, k, GRAPH, "a", num_prefix=1, link="sigmoid", target="binary", reduction="none"),
        [(61, 4), (61, 4)],
    ),
    # Its steps come together in sums of 60 terms, of which float32 hides one by one.
    "attention_bce softmax": Problem(
        lambda m, q, k: m.attention_bce(q, k, GRAPH, "a", num_prefix=1, reduction="none"),
        [(61, 4), (61, 4)],
        dtypes=(torch.float64,),
    ),
    "graph_attention": Problem(graph_attention, [(2, 61, 4), (2, 61, 4), (2, 61, 3)], parts=True),
    "set_attention": Problem(of_sets, [(6, 2, 4), (6, 2, 4), (6, 2, 3)]),
    "set_attention null": Problem(of_sets_and_null, [(6, 2, 4), (6, 2, 4), (6, 2, 3), (6, 2), (2, 3)]),
    "network_mse": Problem(
        lambda m, z, w, b: m.network_mse(z, w, b, GRAPH, "a", zero_weight=0.5, reduction="none"), [(60, 4), (60, 4), (60,)]
    ),
    "masked_spmm": Problem(
        lambda m, x, w: m.masked_spmm(GRAPH, "a", x, KEEP, edge_weight=w, reduce="mean"), [(60, 8), (GRAPH.num_edges("a"),)]
    ),
    "relational_spmm": Problem(lambda m, x: m.relational_spmm(GRAPH, x, *GENES, *GENES), [(60, 8)]),
    "perturbation_attention": Problem(
        lambda m, q, k, v, u: m.perturbation_attention(q, k, v, *SETS, u, scale=0.3),
        [(3, 8), (8, 8), (8, 6), (6, 6)],
        parts=True,
        reference=SimpleNamespace(perturbation_attention=attention_and_correction),
    ),
}


aten = torch.ops.aten
# Constants, of which some are overwritten, what is only compared, and a scale of which the result is freed again.
NOT_COMPUTED = {
    aten.aminmax, aten.empty, aten.empty_like, aten.exp2_, aten.new_empty, aten.new_zeros, aten.ones, aten.zeros,
    aten.zeros_like,
}  # fmt: skip


class Mutation(TorchDispatchMode):
    """Makes the result `wrong_at`, counted from 0, larger; afterwards `results` names them all."""

    def __init__(self, wrong_at: int = -1, wrong: float = 0.0) -> None:
        super().__init__()
        self.wrong_at, self.wrong = wrong_at, wrong
        self.results: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = _maybe_get_opdef(func)
        if operator is None:
            out = func(*args, **kwargs)
        else:  # the operator's own steps are seen too
            with self:
                out = inspect.unwrap(operator._init_fn)(*args, **kwargs)
        if func.is_view or func.overloadpacket in NOT_COMPUTED:
            return out
        if isinstance(out, (tuple, list)):
            return type(out)([self.counted(func, y) for y in out])
        return self.counted(func, out)

    def counted(self, func: Any, y: Any) -> Any:
        if not isinstance(y, Tensor) or y.layout != torch.strided or not y.is_floating_point():
            return y
        if not (y.isfinite() & (y != 0)).any():
            return y
        self.results.append(f"{len(self.results)} {func}")
        if len(self.results) - 1 != self.wrong_at:
            return y
        if func._schema.is_mutable:
            return y.mul_(1 + self.wrong)
        return y * (1 + self.wrong)


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, p in PROBLEMS.items() for dtype in p.dtypes], ids=str)
def test_every_step_matters(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    inputs = leaves(*problem.shapes, dtype=dtype)
    outputs = as_list(problem.run(cellattn, *inputs))
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=g).to(y.dtype) for y in outputs]
    want = with_bounds(lambda *x: problem.run(problem.reference, *x), inputs, upstream)

    def results(mode: Mutation) -> list[Tensor]:
        with mode:
            outputs = as_list(problem.run(cellattn, *inputs))
            return [*outputs, *gradients(outputs, inputs, upstream)]

    def largest_ratio(got: list[Tensor]) -> float:
        return max(ratio_to_bound(a, b, parts=problem.parts) for a, b in zip(got, want, strict=True))

    whole = Mutation()
    right = results(whole)
    assert largest_ratio(right) <= 0.5
    unseen, seen = [], 0
    for i, step in enumerate(whole.results):
        got = results(Mutation(i, WRONG[dtype]))
        if not all(torch.equal(a, b) for a, b in zip(got, right, strict=True)):  # a result that nothing reads changes nothing
            seen += 1
            if largest_ratio(got) <= 1:
                unseen.append(step)
    assert not unseen
    assert seen > 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_other_roundings_are_within_half_a_bound(name: str, dtype: torch.dtype) -> None:
    """Ours, and the definition in eager PyTorch at the dtype, of ten draws of the inputs."""
    problem = PROBLEMS[name]
    for seed in range(10):
        inputs = leaves(*problem.shapes, dtype=dtype, seed=seed)
        upstream = [torch.randn(y.shape).to(y.dtype) for y in as_list(problem.run(cellattn, *inputs))]
        want = with_bounds(lambda *x: problem.run(problem.reference, *x), inputs, upstream)
        for module in (cellattn, problem.reference):
            outputs = as_list(problem.run(module, *inputs))
            got = [*outputs, *gradients(outputs, inputs, upstream)]
            for a, b in zip(got, want, strict=True):
                assert ratio_to_bound(a, b, parts=problem.parts) <= 0.5
