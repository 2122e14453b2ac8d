"""Operators under the transforms of torch.func and in forward mode."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import cellattn
from cellattn.ops._csr import both_ways
from cellattn.ops.set_sum import set_sum

from ..compare import leaves, random_graph

N = 7
GRAPH = random_graph(N, {"a": 20}, weighted=True)
KEEP = torch.arange(3 * N).reshape(3, N) % 4 > 0
EVERYONE = torch.arange(N), torch.tensor([0, N])
PTR = torch.tensor([0, 3, 3, 7])


def inputs(*lead: int) -> list[Tensor]:
    return [x.detach() for x in leaves((*lead, N, 4), (*lead, N, 4), (*lead, N, 3))]


def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = cellattn.attention(q, k, v)
    kl = cellattn.attention_kl(q, k, GRAPH, "a", rows=torch.tensor([1, 5]))
    return out.square().sum() + lse.sin().sum() + kl + cellattn.attention_bce(q, k, GRAPH, "a")


def by_backward(f: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, ...]:
    args = tuple(x.clone().requires_grad_() for x in args)
    return torch.autograd.grad(f(*args), args)


def close(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # float64, in other orders of addition


def test_grad_vjp_and_jacrev_are_those_of_backward() -> None:
    args = inputs()
    want = by_backward(total, *args)
    close(grad(total, argnums=(0, 1, 2))(*args), want)
    close(vjp(total, *args)[1](torch.ones((), dtype=torch.float64)), want)
    rows = jacrev(lambda q: cellattn.attention(q, *args[1:])[0])(args[0])
    dense = jacrev(lambda q: (q @ args[1].mT / 2).softmax(-1) @ args[2])(args[0])
    close(rows, dense)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 2)], ids=str)
def test_vmap_is_a_loop(in_dims: tuple[int | None, ...]) -> None:
    args = [x if dim is None else torch.stack([x, x.sin(), x.cos()], dim) for x, dim in zip(inputs(), in_dims, strict=True)]
    samples = [[x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)] for i in range(3)]
    f = vmap(total, in_dims)
    close(f(*args), torch.stack([total(*sample) for sample in samples]))
    of_samples = vmap(grad(total, argnums=(0, 1, 2)), in_dims)(*args)
    for i, sample in enumerate(samples):
        close(tuple(x[i] for x in of_samples), by_backward(total, *sample))
    close(grad(lambda *args: f(*args).sum(), argnums=(0, 1, 2))(*args), by_backward(lambda *args: f(*args).sum(), *args))


LINEAR: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "masked_spmm": (
        lambda x, w: cellattn.masked_spmm(GRAPH, "a", x, KEEP, reduce="mean", edge_weight=w),
        leaves((N, 3), (GRAPH.num_edges("a"),)),
    ),
    "relational_spmm": (
        lambda x: cellattn.relational_spmm(GRAPH, x, *EVERYONE, *EVERYONE),
        leaves((N, 3)),
    ),
    "set_sum": (lambda x: set_sum(x, PTR), leaves((N, 3))),
}


@pytest.mark.parametrize("name", LINEAR)
def test_forward_mode_of_linear_operators(name: str) -> None:
    f, arguments = LINEAR[name]
    primals = [x.detach() for x in arguments]
    tangents = [x.cos() for x in primals]
    value, tangent = jvp(f, tuple(primals), tuple(tangents))[:2]
    close(value, f(*primals))
    # a quadratic function at most, so that the central difference is exact
    step = [(f(*(x + h * t for x, t in zip(primals, tangents, strict=True)))) for h in (1, -1)]
    close(tangent, (step[0] - step[1]) / 2)
    with forward_ad.dual_level():
        dual = f(*map(forward_ad.make_dual, primals, tangents))
        close(forward_ad.unpack_dual(dual).tangent, tangent)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: cellattn.attention(x, x, x)[0],
    "attention_kl": lambda x: cellattn.attention_kl(x, x.detach(), GRAPH, "a", lse=x.detach()[:, 0]),
    "attention_bce": lambda x: cellattn.attention_bce(x, x.detach(), GRAPH, "a", lse=x.detach()[:, 0]),
    "network_mse": lambda x: cellattn.network_mse(x, x, x[:, 0], GRAPH, "a"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_formula_is_an_error(name: str) -> None:
    f, x = REFUSED[name], inputs()[0]
    message = f"cellattn.{name}: forward-mode derivatives .* use reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        jvp(f, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        f(forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match=message):
        hessian(lambda x: f(x).sum())(x)
    with pytest.raises(RuntimeError, match=f"cellattn.{name}: double backward"):
        grad(lambda x: grad(lambda x: f(x).square().sum())(x).sum())(x)


def test_make_fx_records_them() -> None:
    """Rows are looked at where one may look; what is recorded is right for other inputs."""
    recorded = make_fx(grad(total, argnums=(0, 1, 2)))(*inputs())
    others = [x.cos() for x in inputs()]
    close(recorded(*others), by_backward(total, *others))


def test_transforms_inside_a_compiled_function_run_uncompiled() -> None:
    torch._dynamo.reset()
    q, k, _ = inputs()
    step = torch.compile(lambda q: grad(lambda q: cellattn.attention_logsumexp(q, k).sum())(q), backend="aot_eager")
    close(step(q), by_backward(lambda q: cellattn.attention_logsumexp(q, k).sum(), q)[0])
    torch._dynamo.reset()  # what ran uncompiled is remembered otherwise


@pytest.mark.parametrize(
    "transform", [lambda f, x: grad(f)(x), vjp, lambda f, x: jvp(f, (x,), (x,))], ids=["grad", "vjp", "jvp"]
)
def test_what_a_graph_keeps_of_its_first_use_outlives_the_transform(transform: Callable[..., object]) -> None:
    """Tensors of a transform have no storage once it ends: no process could be sent the graph."""
    graph = random_graph(N, {"a": 20, "b": 9}, weighted=True)

    def f(x: Tensor) -> Tensor:
        return cellattn.masked_spmm(graph, "b", x, KEEP).sum()

    transform(f, torch.randn(N, 4))
    assert pickle.loads(pickle.dumps(graph)) == graph
    assert all(y.data_ptr() or not y.numel() for y in (*graph.transpose(), *both_ways(graph, 1)))
