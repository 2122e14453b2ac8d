"""The public functions on CUDA tensors without a GPU: checks, dispatch and what the operators promise of their results.

Forward under FakeTensorMode, whose tensors say "cuda" and hold nothing. The autograd engine asks the CUDA runtime for the
current stream, which ends the process where PyTorch was built without it; so gradients are taken on the device "meta", where
the same operators answer with the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import cellattn
from cellattn import MultiGraph
from cellattn.graph import Bits, Segments, Targets, Transpose, multigraph

from ..compare import random_graph

B, H, N, D, DV, R = 2, 3, 20, 8, 5, 4
T = N + 1  # one prefix token
TIES = [("a", 0), ("b", 2)]
MASKS = [("a", 0), ("b", 2), ("b", 1), ("a", 2)]
CPU = random_graph(N, {"a": 60, "b": 40}, weighted=True)
CPU.transpose()
with mock.patch.object(multigraph, "_MIN_PACKED", 0):
    DENSE = random_graph(N, {"a": 60, "b": 2})  # of which the first relation is bits
DENSE.transpose()
assert [bits is None for bits in DENSE._bits] == [False, True]

Shapes = list[tuple[tuple[int, ...], torch.dtype]]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class _WithoutRuntime(TorchFunctionMode):
    """Python's own operators (x[...], ~x) and random draws ask for the CUDA runtime; without it they are answered on "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        assert {x.device.type for x in tensors} == {"cuda"}
        args, kwargs = tree_map_only(Tensor, lambda x: _like(x, "meta"), (args, kwargs))
        return tree_map_only(Tensor, lambda x: _like(x, "cuda"), func(*args, **kwargs))


def _like(x: Tensor, device: torch.device | str) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def graph_on(device: str, of: MultiGraph = CPU) -> MultiGraph:
    """A graph's arrays on a device without values, which `MultiGraph.to` would have to read."""
    graph = object.__new__(MultiGraph)
    graph.__dict__.update({name: _like(x, device) if isinstance(x, Tensor) else x for name, x in vars(of).items()})
    graph._transpose = Transpose(*(_like(x, device) for x in of.transpose()))
    by_row, by_column = (Segments(_like(ptr, device), _like(row, device), offset) for ptr, row, offset in of.segments)
    graph._segments = by_row, by_column
    double, single = (Targets(*(_like(x, device) for x in of.targets(dtype))) for dtype in (torch.float64, torch.float32))
    graph._targets, graph._made = (double, single), {}
    for name, make in (("_ranks", of._make_ranks), ("_free", of._make_free)):
        setattr(graph, name, tuple(_like(x, device) for x in of._kept(name, make)))
    graph._bits = tuple(None if bits is None else Bits(*(_like(x, device) for x in bits)) for bits in of._bits)
    return graph


class Inputs:
    """Tensors of a device and dtype; q, k, v and what else is floating are leaves where gradients are wanted."""

    def __init__(self, device: str, dtype: torch.dtype, requires_grad: bool = False) -> None:
        def floating(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device, requires_grad=requires_grad)

        def genes(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int64, device=device)

        self.graph, self.dense = graph_on(device), graph_on(device, DENSE)
        self.q, self.k, self.v = floating(B, H, T, D), floating(B, H, T, D), floating(B, H, T, DV)
        self.q1, self.k1 = floating(B, T, D), floating(B, T, D)
        self.query, self.key, self.value, self.override = floating(R, D), floating(N, D), floating(N, DV), floating(6, DV)
        self.bias = floating(len(MASKS))
        self.rows, self.index, self.ptr = genes(R), genes(6), genes(R + 1)
        self.mask = torch.empty(T, dtype=torch.bool, device=device)


def _flat(result: tuple[Tensor, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return result[0], *result[1]


def calls(x: Inputs, dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], Shapes, list[Tensor]]]:
    """name: (call, shapes and dtypes of its results, what it has gradients for); a name is a function, then a variant."""
    f32 = torch.float32
    one = x.q1, x.k1, x.graph, "a"
    row: dict[str, Any] = {"num_prefix": 1, "reduction": "none"}
    per_head: Shapes = [((), f32), ((), f32)]
    out = ((B, H, T, DV), dtype)
    return {
        "attention": (lambda: cellattn.attention(x.q, x.k, x.v), [out, ((B, H, T), f32)], [x.q, x.k, x.v]),
        "attention dropout": (
            lambda: cellattn.attention(x.q, x.k, x.v, dropout_p=0.3), [out, ((B, H, T), f32)], [x.q, x.k, x.v]
        ),
        "attention_logsumexp": (
            lambda: cellattn.attention_logsumexp(x.q, x.k, key_mask=x.mask),
            [((B, H, T), f32)],
            [x.q, x.k],
        ),
        "attention_kl": (lambda: cellattn.attention_kl(*one, num_prefix=1), [((), f32)], [x.q1, x.k1]),
        "attention_kl rows": (lambda: cellattn.attention_kl(*one, rows=x.rows, **row), [((B, R), f32)], [x.q1, x.k1]),
        "attention_kl valid": (lambda: cellattn.attention_kl(*one, over="valid", **row), [((B, N), f32)], [x.q1, x.k1]),
        "attention_kl bits": (lambda: cellattn.attention_kl(x.q1, x.k1, x.dense, "a", num_prefix=1), [((), f32)], [x.q1, x.k1]),
        "attention_kl bits, rows": (
            lambda: cellattn.attention_kl(x.q1, x.k1, x.dense, "a", rows=x.rows, **row), [((B, R), f32)], [x.q1, x.k1]
        ),
        "attention_bce": (lambda: cellattn.attention_bce(*one, num_prefix=1), [((), f32)], [x.q1, x.k1]),
        "attention_bce rows": (lambda: cellattn.attention_bce(*one, rows=x.rows, **row), [((B, R), f32)], [x.q1, x.k1]),
        "attention_bce drawn": (lambda: cellattn.attention_bce(*one, num_negatives=3, **row), [((B, N), f32)], [x.q1, x.k1]),
        "attention_bce sigmoid": (lambda: cellattn.attention_bce(*one, link="sigmoid", **row), [((B, N), f32)], [x.q1, x.k1]),
        "graph_attention": (
            lambda: _flat(cellattn.graph_attention(x.q, x.k, x.v, x.graph, TIES, rows=x.rows)),
            [out, *per_head],
            [x.q, x.k, x.v],
        ),
        "graph_attention bits": (
            lambda: _flat(cellattn.graph_attention(x.q, x.k, x.v, x.dense, TIES, rows=x.rows)),
            [out, *per_head],
            [x.q, x.k, x.v],
        ),
        "graph_attention dropout": (
            lambda: _flat(cellattn.graph_attention(x.q, x.k, x.v, x.graph, TIES, dropout_p=0.3)),
            [out, *per_head],
            [x.q, x.k, x.v],
        ),
        "graph_attention bce": (
            lambda: _flat(cellattn.graph_attention(x.q, x.k, x.v, x.graph, TIES, loss="bce")),
            [out, *per_head],
            [x.q, x.k, x.v],
        ),
        "edge_attention": (
            lambda: cellattn.edge_attention(x.q, x.k, x.v, x.graph, MASKS, weighted=True, edge_bias=x.bias),
            [out, ((B, H, T), f32)],
            [x.q, x.k, x.v, x.bias],
        ),
        "edge_attention dropout": (
            lambda: cellattn.edge_attention(x.q, x.k, x.v, x.graph, MASKS, edge_bias=x.bias, dropout_p=0.3),
            [out, ((B, H, T), f32)],
            [x.q, x.k, x.v, x.bias],
        ),
        "edge_attention no prefix": (
            lambda: cellattn.edge_attention(
                x.q[..., 1:, :], x.k[..., 1:, :], x.v[..., 1:, :], x.graph, MASKS, num_prefix=0, self_loops=False
            ),
            [((B, H, N, DV), dtype), ((B, H, N), f32)],
            [x.q, x.k, x.v],
        ),
        "sample_rows": (lambda: cellattn.sample_rows(x.graph, "a", R), [((R,), torch.int64)], []),
        "perturbation_attention": (
            lambda: cellattn.perturbation_attention(x.query, x.key, x.value, x.index, x.ptr, x.override),
            [((R, DV), dtype)],
            [x.query, x.key, x.value, x.override],
        ),
    }  # fmt: skip


NAMES = list(calls(Inputs("meta", torch.float32), torch.float32))
IN_THE_EXTENSION = {
    "attention_kl_comembership",
    "khop_mask",
    "khop_subgraph",
    "masked_spmm",
    "network_mse",
    "perturbation_mask",
    "relational_degree",
    "relational_spmm",
}  # no Triton; it may be built for CPUs alone


def results(call: Callable[[], Any], expected: Shapes, device: str) -> list[Tensor]:
    got = call()
    outputs = list(got) if isinstance(got, tuple) else [got]
    assert [(tuple(x.shape), x.dtype) for x in outputs] == expected
    assert {x.device.type for x in outputs} == {device}
    return outputs


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=False), _WithoutRuntime():
        yield


@dtypes
@pytest.mark.parametrize("name", NAMES)
def test_forward_on_cuda(name: str, dtype: torch.dtype, fake: None) -> None:
    call, expected, _ = calls(Inputs("cuda", dtype), dtype)[name]
    results(call, expected, "cuda")


@dtypes
@pytest.mark.parametrize("name", [name for name in NAMES if name != "sample_rows"])
def test_backward_on_meta(name: str, dtype: torch.dtype) -> None:
    call, expected, inputs = calls(Inputs("meta", dtype, requires_grad=True), dtype)[name]
    total = torch.stack([x.float().sum() for x in results(call, expected, "meta")]).sum()
    for x, dx in zip(inputs, torch.autograd.grad(total, inputs), strict=True):
        assert (dx.shape, dx.dtype, dx.device.type) == (x.shape, dtype, "meta")


def test_no_function_is_left_out() -> None:
    functions = {name for name in cellattn.__all__ if name.islower() and callable(getattr(cellattn, name))}
    assert functions - IN_THE_EXTENSION == {name.split(" ")[0] for name in NAMES}


# Each is refused by the public function, before an operator is called: `device` and `dtype` of a name are changed.
BAD: list[tuple[str, dict[str, tuple[str, torch.dtype | None]], str]] = [
    ("attention", {"k": ("cpu", None)}, "k: expected the device of q, cuda:0, got cpu"),
    ("attention", {"v": ("cpu", None)}, "v: expected the device of q, cuda:0, got cpu"),
    ("attention", {"q": ("cuda", torch.int64)}, "q: expected dtype float64 or float32 or bfloat16 or float16, got a int64"),
    ("attention", {"v": ("cuda", torch.float16)}, "v: expected the dtype of q"),
    ("attention_logsumexp", {"mask": ("cpu", None)}, "key_mask: expected the device of q, cuda:0, got cpu"),
    ("attention_logsumexp", {"mask": ("cuda", torch.uint8)}, "key_mask: expected dtype bool, got a uint8"),
    ("attention_kl", {"graph": ("cpu", None)}, "graph: expected the device of q, cuda:0, got cpu"),
    ("attention_kl", {"k1": ("cuda", torch.float16)}, "k: expected the dtype of q"),
    ("attention_kl rows", {"rows": ("cpu", None)}, "rows: expected the device of graph, cuda:0, got cpu"),
    ("attention_kl rows", {"rows": ("cuda", torch.float32)}, "rows: expected dtype int64 or int32, got a float32"),
    ("attention_bce", {"graph": ("cpu", None)}, "graph: expected the device of q, cuda:0, got cpu"),
    ("attention_bce rows", {"rows": ("cpu", None)}, "rows: expected the device of graph, cuda:0, got cpu"),
    ("graph_attention", {"graph": ("cpu", None)}, "graph: expected the device of q, cuda:0, got cpu"),
    ("graph_attention bce", {"q": ("cpu", None)}, "k: expected the device of q, cpu, got cuda:0"),
    ("edge_attention", {"graph": ("cpu", None)}, "graph: expected the device of q, cuda:0, got cpu"),
    ("edge_attention", {"bias": ("cpu", None)}, "edge_bias: expected the device of q, cuda:0, got cpu"),
    ("edge_attention", {"bias": ("cuda", torch.float64)}, "edge_bias: expected dtype float32, got a float64"),
    ("perturbation_attention", {"index": ("cpu", None)}, "index: expected the device of query, cuda:0, got cpu"),
    ("perturbation_attention", {"ptr": ("cuda", torch.int32)}, "ptr: expected dtype int64, got a int32"),
    ("perturbation_attention", {"override": ("cpu", None)}, "override: expected the device of query, cuda:0, got cpu"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=[f"{name}-{next(iter(change))}" for name, change, _ in BAD])
def test_bad_input_is_refused(
    name: str, change: dict[str, tuple[str, torch.dtype | None]], message: str, fake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = Inputs("cuda", torch.float32)
    for argument, (device, dtype) in change.items():
        old = getattr(x, argument)
        new = (
            graph_on(device) if isinstance(old, MultiGraph) else torch.empty(old.shape, dtype=dtype or old.dtype, device=device)
        )
        setattr(x, argument, new)

    def launched(*args: Any) -> None:
        raise AssertionError("an operator was called")

    for operator in ("attention", "bce_rows", "edge_attention", "row_dot", "perturbation_correction"):
        monkeypatch.setattr(getattr(torch.ops.cellattn, operator), "default", launched)
    with pytest.raises(ValueError, match=message):
        calls(x, torch.float32)[name][0]()
