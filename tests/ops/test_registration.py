"""What torch.library and torch.compile ask of every operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import cellattn
import cellattn.nn
from cellattn import MultiGraph

from ..compare import leaves, random_graph
from ..conftest import exhaustive
from .sets import ragged, random_sets

N = 20
OPS = torch.ops.cellattn


def graph() -> MultiGraph:
    return random_graph(N, {"a": 60, "b": 40}, weighted=True)


def differentiable(args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in args)


def readout_tables() -> tuple[Any, ...]:
    """Arguments of `screen_readout`: two sets of three of N entries, 6 wide with two heads, rows of 16."""
    sets, row = torch.tensor([[0, 1, 2], [5, 9, 3]]), torch.rand(16)
    tables = torch.rand(N, 3, 16), torch.rand(N, 3, 16), torch.rand(N, 2, 16), torch.rand(N, 16)
    return sets, *tables, row, row, 1e-5, torch.rand(9, 6), torch.rand(9), torch.rand(6, 9), row, row, row, 1e-5


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    g = graph()
    q, k, v = leaves((2, 3, N + 1, 8), (2, 3, N + 1, 8), (2, 3, N + 1, 5))
    dout, dlse, lse = (x.detach() for x in leaves((2, 3, N + 1, 5), (2, 3, N + 1), (2, 3, N + 1)))
    mask = torch.arange(N + 1) % 3 > 0
    q1, k1, lse1, dloss = leaves((N + 1, 8), (N + 1, 8), (N,), (N,))
    lse1 = lse1.detach().add_(9).requires_grad_()  # above any score
    rows, every = torch.arange(N), (None, None, None, None)
    drawn = (torch.arange(3 * N) % N, torch.arange(3 * N) // 3, torch.arange(N + 1) * 3, torch.ones(N).double())
    cut_rows, cut_columns = g.segments
    dot = (*g.stacked, *g.stacked_by_column(), *cut_rows, *cut_columns)
    problem = (*dot, g.inv_mass, g.known("a"), rows)
    sharp = torch.arange(N, dtype=torch.int32) - 1, *torch.full((2, N), 0.5).double().unbind(0)
    index, ptr = torch.tensor([1, 5, 3]), torch.tensor([0, 2, 2, 3])
    head = leaves((3, 8), (N, 8), (N, 5), (3,), (3, 5))
    sets = leaves((3, 2, 4), (3, 2, 4), (3, 2, 4))
    detached = [x.detach() for x in (q, k, v)]
    draw = torch.tensor([2**62 + 5, 7])
    flat = [x.flatten(0, 1) for x in detached]
    rowptr, col, _ = g.stacked
    colptr, row, edge = g.transpose()
    (bias,), genes = leaves((4,)), q.detach()[..., 1:, :].contiguous()
    logs = [x[2].double().log() for x in (g.stacked, g.stacked_by_column())]
    edges_of, of_ties = (rowptr, col, logs[0], colptr, row, logs[1]), ([0, 1, 0, 1], [0, 1, 2, 2], 1, True, 0.3)
    edges_cut = (*edges_of, *cut_rows, *cut_columns, *of_ties)
    whole = None, 0
    seeds, sets_ptr = random_sets(N, 70)
    one = g.rowptr("a"), g.col("a")
    words = OPS.set_words(seeds, sets_ptr, N, False)
    words_by_column = OPS.pack_words(OPS.unpack_words(words, 70).t().contiguous())
    node_ptr, edge_ptr, offsets = OPS.induced_sizes(rowptr, col, words, 70)
    room = edge_ptr[:, -1].tolist()
    places = [torch.zeros(int(node_ptr[-1]), dtype=dtype) for dtype in (torch.int64, torch.bool)]
    edges = [torch.zeros(factor * sum(room), dtype=torch.int64) for factor in (2, 1)]
    rowptrs = torch.zeros(2 * (places[0].numel() + 1), dtype=torch.int64)
    induced = (rowptr, col, words, words, node_ptr, edge_ptr, offsets, *places)
    by_column = (colptr[: N + 1], row[: one[1].numel()], edge[: one[1].numel()])
    message, weight = leaves((70, N, 3), (one[1].numel(),))
    message_args = (words, *one, *by_column, 70, True, False)
    decoder = leaves((1, N, 4), (1, N, 4), (1, N))
    network = (g.weight("a").double(), *2 * (g.known("a")[None],), *one, *by_column, [0.1])
    source, source_ptr, target, target_ptr = (
        torch.tensor([1, 5, 3]),
        ptr,
        torch.tensor([0, 1, 2, 9]),
        torch.tensor([0, 1, 1, 4]),
    )
    between = (source, source_ptr, target, target_ptr)
    scale = torch.rand(4, 2).double()
    sent, received = leaves((3, 2, 5), (4, 5))
    relational = (*between, rowptr, col, g.stacked[2].double(), colptr, row, g.stacked_by_column()[2].double(), [1, 0], N)
    screened, wide = torch.tensor([[0, 1, 2], [5, 9, 3]]), torch.rand(2, N, 6)
    scores = torch.rand(3, N).double()
    of_map = torch.tensor([0, 4, 2]), *one, g.weight("a").double(), g.inv_mass[:N], torch.tensor([7])
    return {
        "attention": (OPS.attention, (q, k, v, None, 0.3)),
        "attention masked": (OPS.attention, (q, k, v, mask, 0.3)),
        "attention_backward": (OPS.attention_backward, (dout, dlse, *detached, None, dout, lse, 0.3)),
        "attention dropout": (OPS.attention, (q, k, v, None, 0.3, draw, 20_000)),
        "attention_backward dropout": (OPS.attention_backward, (dout, dlse, *detached, None, dout, lse, 0.3, draw, 20_000)),
        "attention_rows": (OPS.attention_rows, (*detached, None, None, 0.3, 0, 0.0)),
        "attention_rows masked": (OPS.attention_rows, (*flat, flat[1][..., 0] > 0, draw, 0.3, 20_000, 0.0)),
        "attention_rows_backward": (
            OPS.attention_rows_backward, (dout, dlse, *detached, None, dout, lse, draw, 0.3, 20_000, 0.0)
        ),
        "attention_rows_backward plain": (
            OPS.attention_rows_backward, (dout, None, *detached, detached[1][..., 0] > 0, dout, lse, None, 0.3, 0, 0.0)
        ),
        "is_ordinary": (OPS.is_ordinary, (*detached, 0.0)),
        "edge_attention": (OPS.edge_attention, (q[..., 1:, :], k, v, bias, *edges_cut, *whole)),
        "edge_attention plain": (
            OPS.edge_attention, (q[..., 1:, :], k, v, None, rowptr, col, None, colptr, row, None, *edges_cut[6:], *whole)
        ),
        "edge_attention_backward": (
            OPS.edge_attention_backward,
            (dout[..., 1:, :], dlse[..., 1:], dout[..., 1:, :], lse[..., 1:], q.detach()[..., 1:, :], *detached[1:],
             bias.detach(), *edges_cut, *whole),
        ),
        "edge_attention dropout": (OPS.edge_attention, (q[..., 1:, :], k, v, bias, *edges_cut, draw, 20_000)),
        "edge_attention_backward dropout": (
            OPS.edge_attention_backward,
            (dout[..., 1:, :], dlse[..., 1:], dout[..., 1:, :], lse[..., 1:], q.detach()[..., 1:, :], *detached[1:],
             bias.detach(), *edges_cut, draw, 20_000),
        ),
        "edge_rows": (OPS.edge_rows, (genes, *detached[1:], bias.detach(), *edges_of[:3], *of_ties, draw, 20_000)),
        "edge_rows_backward": (
            OPS.edge_rows_backward,
            (dout[..., 1:, :].contiguous(), dlse[..., 1:].contiguous(), lse[..., 1:].contiguous(), genes, *detached[1:],
             bias.detach(), *edges_of, *of_ties, *whole),
        ),
        "row_dot": (OPS.row_dot, (q, k, *dot, [0, 1], [2, 0], None, [N, N], 1)),
        "row_dot rows": (OPS.row_dot, (q, k, *dot, [0, 1], [2, 0], torch.tensor([1, 2, 0]), [2, 1], 1)),
        "row_dot_backward": (
            OPS.row_dot_backward,
            (torch.ones(2, 2 * N).double(), q.detach(), torch.ones(2, 2 * N, 8).double(), *g.stacked_by_column(),
             *cut_columns, [0, 1], [2, 0], None, [N, N], 1),
        ),
        "bce_map": (OPS.bce_map, (scores.clone(), scores.logsumexp(1), *of_map, -0.4, 1.0)),
        "bce_map sigmoid": (OPS.bce_map, (scores.clone(), None, *of_map, -0.4, 1.0)),
        "bce_map_backward": (
            OPS.bce_map_backward,
            (scores[0, :3].clone(), torch.tensor([-1, 0, 4]), scores.clone(), scores.logsumexp(1), *of_map, 1.0),
        ),
        "bit_spmm": (OPS.bit_spmm, (words, None, torch.rand(70, 8))),
        "bit_spmm rows": (OPS.bit_spmm, (words, torch.tensor([3, 0]), torch.rand(70, 8))),
        "bit_sum": (OPS.bit_sum, (leaves((2, 70, 3))[0], words, words_by_column, None, None)),
        "bit_sum rows": (
            OPS.bit_sum, (leaves((4, 3))[0], words, words_by_column, torch.tensor([3, 0, 3]), torch.tensor([9, 2, 9, 0]))
        ),
        "bce_rows": (OPS.bce_rows, (q1, k1, lse1, *problem, *every, 0, 1, 0.3, True)),
        "bce_rows all": (OPS.bce_rows, (q1, k1, lse1, *problem[:-1], None, *every, 0, 1, 0.3, True)),
        "bce_rows sampled": (OPS.bce_rows, (q1, k1, lse1, *problem, *drawn, 0, 1, 0.3, True)),
        "bce_rows sigmoid": (OPS.bce_rows, (q1, k1, None, *problem, *every, 0, 1, 0.3, False)),
        "bce_rows_backward": (
            OPS.bce_rows_backward,
            (dloss.detach(), *sharp, *(x.detach() for x in (q1, k1, lse1)), *problem, *every, 0, 1, 0.3, True),
        ),
        "nonedges": (OPS.nonedges, (*g.stacked[:2], *g.known_ranks("b"), rows, torch.arange(N) % 3, 1)),
        "set_sum": (OPS.set_sum, (sets[0].detach().flatten(1).requires_grad_(), ptr)),
        "set_attention": (OPS.set_attention, (*sets, ptr)),
        "set_attention bound": (OPS.set_attention, (*sets, ptr, 4, True)),
        "set_attention null": (OPS.set_attention, (*sets, ptr, None, True, sets[0][..., 0], sets[2][0])),
        "set_attention_backward": (
            OPS.set_attention_backward,
            (torch.ones(3, 2, 4).double(), *(x.detach() for x in sets), ptr, None, False, None, None),
        ),
        "perturbation_correction": (OPS.perturbation_correction, (*head[:4], index, ptr, head[4], 0.3)),
        "perturbation_correction_backward": (
            OPS.perturbation_correction_backward,
            (torch.ones(3, 5).double(), *(x.detach() for x in head[:4]), index, ptr, head[4].detach(), 0.3),
        ),
        "are_sets": (OPS.are_sets, (seeds, sets_ptr, N, True, False)),
        "set_words": (OPS.set_words, (seeds, sets_ptr, N, True)),
        "khop_words": (OPS.khop_words, (rowptr, col, colptr, row, seeds, sets_ptr, N, 2, False, True, False)),
        "unpack_words": (OPS.unpack_words, (words, 70)),
        "pack_words": (OPS.pack_words, (OPS.unpack_words(words, 70),)),
        "edge_words": (OPS.edge_words, (*one, words)),
        "subgraph_rows": (OPS.subgraph_rows, (rowptr, col, torch.tensor([4, 0, 9]), N)),
        "induced_avx512": (OPS.induced_avx512, (N,)),
        "induced_sizes": (OPS.induced_sizes, (rowptr, col, words, 70)),
        "induced_write": (OPS.induced_write, (*induced, *edges, None, room)),
        "induced_write csr": (OPS.induced_write, (*induced, edges[1], None, rowptrs, room)),
        "masked_spmm": (OPS.masked_spmm, (*one, weight.detach(), message.detach(), words, 70, True)),
        "masked_spmm shared": (OPS.masked_spmm, (*one, None, message[0].detach(), words, 70, False)),
        "masked_sddmm": (OPS.masked_sddmm, (*one, message.detach(), message[0].detach(), words, 70)),
        "masked_degree": (OPS.masked_degree, (*one, words, 70)),
        "masked_sum": (OPS.masked_sum, (message, weight, *message_args)),
        "masked_sum shared": (OPS.masked_sum, (leaves((N, 3))[0], weight, *message_args[:-1], True)),
        "masked_sum_backward": (
            OPS.masked_sum_backward,
            (torch.ones(70, N, 3).double(), message.detach(), weight.detach(), *message_args, True, False),
        ),
        "network_mse": (OPS.network_mse, (*decoder, *network)),
        "network_mse_backward": (
            OPS.network_mse_backward,
            (torch.ones(1, N).double(), network[0], *(x.detach() for x in decoder), *network),
        ),
        "relational_spmm": (
            OPS.relational_spmm,
            (rowptr, col, g.stacked[2].double(), sent.detach(), *between, None, scale, [1, 0], N, False, False, False),
        ),
        "relational_spmm samples": (
            OPS.relational_spmm,
            (rowptr, col, g.stacked[2].double(), sent.detach()[:, 0].contiguous(), *between, scale[:3], None, [1, 0], N, False,
             True, True),
        ),
        "screen_readout": (OPS.screen_readout, readout_tables()),
        "screen_cross_attention": (
            OPS.screen_cross_attention,
            (screened, screened % 4, screened, torch.rand(4, 2, N), torch.rand(2, N, 4), torch.rand(2, N), *wide),
        ),
        "screen_mlp": (OPS.screen_mlp, (torch.rand(5, 7), torch.rand(9, 7), torch.rand(9), torch.rand(9))),
        "relational_degree": (OPS.relational_degree, (rowptr, col, *between, [1, 0], N)),
        "relational_sum": (OPS.relational_sum, (sent, scale, *relational, True, False)),
        "relational_sum shared": (OPS.relational_sum, (leaves((N, 5))[0], None, *relational, False, True)),
        "relational_sum_backward": (
            OPS.relational_sum_backward,
            (received.detach(), scale, *relational, True, False, True),
        ),
        "relational_sum_backward shared": (
            OPS.relational_sum_backward,
            (received.detach(), scale, *relational, True, True, False),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_opcheck(name: str) -> None:
    op, args = cases()[name]
    results = opcheck(op.default, args)
    assert set(results.values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("cellattn::")}
    assert registered == {name.split(" ")[0] for name in cases()}


@pytest.mark.parametrize("name", [name for name, (op, args) in cases().items() if differentiable(args)])
def test_a_backward_unpacks_each_saved_tensor_once(name: str) -> None:
    """Non-reentrant checkpointing hands out each of them a single time."""
    op, args = cases()[name]
    times: list[int] = []

    def unpack(saved: tuple[int, Tensor]) -> Tensor:
        position, x = saved
        times[position] += 1
        return x

    def pack(x: Tensor) -> tuple[int, Tensor]:
        times.append(0)
        return len(times) - 1, x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        outputs = op(*args)
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        total = sum(x.double().sum() for x in outputs if x.requires_grad)
        count = len(times)  # the sums above save nothing that is counted below
    total.backward()
    assert count > 0
    assert max(times[:count]) == 1


def losses(q: Tensor, k: Tensor, v: Tensor, g: MultiGraph, rows: Tensor | None) -> tuple[Tensor, ...]:
    out, (kl_a, kl_b) = cellattn.graph_attention(q, k, v, g, [("a", 0), ("b", 2)], rows=rows)
    valid = cellattn.attention_kl(q[:, 1], k[:, 1], g, "b", num_prefix=1, over="valid", reduction="sum")
    bce = cellattn.attention_bce(q[:, 1], k[:, 1], g, "b", num_prefix=1, rows=rows)
    lse = cellattn.attention_logsumexp(q, k)
    return out, kl_a, kl_b, valid, bce, lse


def head(q: Tensor, k: Tensor, v: Tensor, g: MultiGraph, rows: Tensor | None) -> tuple[Tensor, ...]:
    queries, index = q[0, 0, :3], torch.tensor([1, 5, 3])
    return (cellattn.perturbation_attention(queries, k[0, 0], v[0, 0], index, torch.tensor([0, 2, 2, 3]), v[0, 1, :3]),)


@pytest.mark.parametrize("f", [losses, head], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [*exhaustive(False), True], ids=["static", "dynamic"])
def test_compiled_equals_eager(f: Callable[..., tuple[Tensor, ...]], dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, rows in ((20, None), (20, torch.tensor([1, 2])), (31, torch.tensor([1, 2, 5]))):
        g = random_graph(n, {"a": 60, "b": 40})
        inputs = leaves((2, 3, n + 1, 8), (2, 3, n + 1, 8), (2, 3, n + 1, 5))
        results = []
        for run in (f, compiled):
            outputs = run(*inputs, g, rows)
            total = torch.stack([(y * y).sum() for y in outputs]).sum()
            results.append([*outputs, *torch.autograd.grad(total, inputs)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


def masks(g: MultiGraph, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    node_keep, edge_keep = cellattn.perturbation_mask(g, seeds, ptr)
    words, edge_words = cellattn.perturbation_mask(g, seeds, ptr, packed=True)
    mixed = cellattn.khop_mask(g, seeds, ptr, 2, traversal="mixed", direction="both", packed=True)
    return cellattn.khop_mask(g, seeds, ptr, 2), mixed, node_keep, *edge_keep.values(), words, *edge_words.values()


def subgraphs(g: MultiGraph, seeds: Tensor, ptr: Tensor) -> tuple[Tensor, ...]:
    coo = cellattn.khop_subgraph(g, seeds, ptr, 1, max_nodes=200, max_edges=100)
    assert coo.edge_id is not None
    csr = cellattn.khop_subgraph(
        g, seeds, ptr, 1, drop_seeds=True, index_dtype=torch.int32, layout="csr", return_edge_id=False, max_nodes=200,
        max_edges={"a": 90, "b": 2},
    )  # fmt: skip
    sums = torch.zeros(200).index_add(0, coo.edge_index["a"][0], torch.ones(100))  # what a model does with it
    return (
        sums, coo.node, coo.node_ptr, coo.seed_mask, coo.sample, coo.overflow, *coo.edge_index.values(),
        *coo.edge_ptr.values(), *coo.edge_id.values(), csr.node, csr.overflow, *csr.rowptr.values(), *csr.col.values(),
    )  # fmt: skip


@pytest.mark.parametrize("f", [masks, subgraphs], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [*exhaustive(False), True], ids=["static", "dynamic"])
def test_compiled_sets_equal_eager(f: Callable[..., tuple[Tensor, ...]], dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, num_sets in ((20, 5), (20, 70), (31, 3), (31, 0)):
        g = random_graph(n, {"a": 60, "b": 40})
        sets = random_sets(n, num_sets)
        for eager, other in zip(f(g, *sets), compiled(g, *sets), strict=True):
            assert torch.equal(other, eager)


def test_a_whole_batch_leaves_a_compiled_function() -> None:
    torch._dynamo.reset()
    g = graph()
    sets = random_sets(N, 5)

    def extract(seeds: Tensor, ptr: Tensor) -> cellattn.SubgraphBatch:
        return cellattn.khop_subgraph(g, seeds, ptr, 1, max_nodes=100, max_edges=150)

    batch, want = torch.compile(extract, fullgraph=True, backend="aot_eager")(*sets), extract(*sets)
    assert isinstance(batch, cellattn.SubgraphBatch)
    assert repr(batch) == repr(want)
    assert torch.equal(batch[4].edge_index["b"], want[4].edge_index["b"])


@pytest.mark.parametrize("dynamic", [*exhaustive(False), True], ids=["static", "dynamic"])
def test_compiled_messages_equal_eager(dynamic: bool) -> None:
    def messages(x: Tensor, w: Tensor, g: MultiGraph, seeds: Tensor, ptr: Tensor) -> Tensor:
        keep, _ = cellattn.perturbation_mask(g, seeds, ptr)
        y = cellattn.masked_spmm(g, "a", x, keep, edge_weight=w)
        return cellattn.masked_spmm(g, "b", y, keep, reduce="mean", transpose=True)

    torch._dynamo.reset()
    compiled = torch.compile(messages, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, num_sets in ((20, 5), (20, 70), (31, 3)):
        g = random_graph(n, {"a": 60, "b": 40}, weighted=True)
        x, w = leaves((n, 4), (g.num_edges("a"),))
        results = []
        for run in (messages, compiled):
            out = run(x, w, g, *random_sets(n, num_sets))
            results.append([out, *torch.autograd.grad((out * out).sum(), (x, w))])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("dynamic", [*exhaustive(False), True], ids=["static", "dynamic"])
def test_compiled_messages_between_subsets_equal_eager(dynamic: bool) -> None:
    def messages(x: Tensor, g: MultiGraph, seeds: Tensor, ptr: Tensor, node: Tensor, node_ptr: Tensor) -> Tensor:
        degree = cellattn.relational_degree(g, seeds, ptr, node, node_ptr)
        scale = 1 / degree.clamp(min=1)
        y = cellattn.relational_spmm(g, x, seeds, ptr, node, node_ptr, scale=scale, shared=True)
        z = cellattn.relational_spmm(g, y, node, node_ptr, node, node_ptr, sum_relations=False)
        return cellattn.relational_spmm(g, z, node, node_ptr, seeds, ptr, relations=("b", "a"))

    torch._dynamo.reset()
    compiled = torch.compile(messages, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, sets in ((20, [[0, 3], [7]]), (20, [[1], [], [2, 9, 11]]), (31, [[30], [4]])):
        g = random_graph(n, {"a": 60, "b": 40}, weighted=True)
        (x,) = leaves((n, 4))
        seeds, ptr = ragged(sets)
        node, node_ptr = torch.arange(n).repeat(len(sets)), torch.arange(len(sets) + 1) * n
        results = []
        for run in (messages, compiled):
            out = run(x, g, seeds, ptr, node, node_ptr)
            results.append([out, *torch.autograd.grad((out * out).sum(), x)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


def test_random_draws_compile() -> None:
    torch._dynamo.reset()
    g = graph()
    q, k = leaves((N, 4), (N, 4))

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(q: Tensor, k: Tensor) -> Tensor:
        rows = cellattn.sample_rows(g, "a", 5)
        return cellattn.attention_bce(q, k, g, "a", rows=rows, num_negatives=4)

    loss = step(q, k)
    loss.backward()
    assert loss > 0
    assert q.grad is not None
    assert q.grad.isfinite().all()
