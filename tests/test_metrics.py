from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scipy import stats

from cellattn import MultiGraph
from cellattn.metrics import (
    PearsonCorr,
    SpearmanCorr,
    edge_recovery,
    oversmoothing,
    record_layers,
    residual_update_ratio,
    tied_edge_recovery,
)
from cellattn.nn import CellEncoder
from cellattn.nn.encoder import EncoderLayer

BOTH = pytest.mark.parametrize("metric", [PearsonCorr, SpearmanCorr])
SCIPY = {PearsonCorr: stats.pearsonr, SpearmanCorr: stats.spearmanr}


def pairs(n: int, *, offset: float = 0.0, grid: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dtype=torch.float64, generator=generator)
    y = 0.5 * x + torch.randn(n, dtype=torch.float64, generator=generator)
    if grid:  # many ties
        x, y = x.mul(2).round(), y.mul(2).round()
    return x + offset, y + offset


@BOTH
@pytest.mark.parametrize("sizes", [[200], [1, 0, 99, 3, 97], [1] * 7], ids=str)
@pytest.mark.parametrize("grid", [False, True], ids=["distinct", "ties"])
def test_scipy(metric: Any, sizes: list[int], grid: bool) -> None:
    x, y = pairs(sum(sizes), grid=grid)
    corr = metric()
    for one, other in zip(x.split(sizes), y.split(sizes), strict=True):
        corr.update(one, other)
    assert corr.compute() == pytest.approx(SCIPY[metric](x, y).statistic, abs=1e-12)


@BOTH
def test_large_offset_costs_no_digits(metric: Any) -> None:
    x, y = pairs(1000, offset=1e6)
    corr = metric()
    for one, other in zip(x.split(10), y.split(10), strict=True):
        corr.update(one, other)
    assert corr.compute() == pytest.approx(SCIPY[metric](x, y).statistic, abs=1e-9)  # x itself holds 1e-10


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_dtypes(metric: Any, dtype: torch.dtype) -> None:
    x, y = (side.mul(10).to(dtype) for side in pairs(50))
    corr = metric()
    corr.update(x.reshape(10, 5), y.reshape(10, 5))
    assert corr.compute() == pytest.approx(SCIPY[metric](x.double(), y.double()).statistic, abs=1e-12)


@BOTH
def test_merge_and_reset(metric: Any) -> None:
    x, y = pairs(60)
    whole, one, other = metric(), metric(), metric()
    whole.update(x, y)
    one.update(x[:20], y[:20])
    other.update(x[20:], y[20:])
    one.merge(other)
    assert one.compute() == pytest.approx(whole.compute(), abs=1e-12)
    assert other.compute() == pytest.approx(SCIPY[metric](x[20:], y[20:]).statistic, abs=1e-12)  # left as it was
    one.reset()
    assert math.isnan(one.compute())
    one.update(x, y)
    assert one.compute() == whole.compute()


@BOTH
@pytest.mark.parametrize(
    ("x", "y"),
    [([], []), ([1.0], [2.0]), ([0.1] * 7, range(7)), (range(7), [0.1] * 7), ([1.0, math.nan, 2.0], [1.0, 2.0, 3.0])],
    ids=["none", "one", "constant prediction", "constant target", "nan"],
)
def test_undefined_is_nan(metric: Any, x: Any, y: Any) -> None:
    corr = metric()
    for one, other in zip(x, y, strict=True):
        corr.update(torch.tensor([one]).double(), torch.tensor([other]).double())
    assert math.isnan(corr.compute())
    whole = metric()
    whole.update(torch.tensor(list(x)).double(), torch.tensor(list(y)).double())
    assert math.isnan(whole.compute())


@BOTH
@pytest.mark.parametrize("sizes", [[60], [1, 20, 9, 30]], ids=["whole", "batches"])
@pytest.mark.parametrize("scales", [(1e-200, 1e200), (1e-310, 1), (1e300, 1e-300), (2e307, 2e307), (1e-5, 1e-5)], ids=str)
def test_scale_does_not_matter(metric: Any, sizes: list[int], scales: tuple[float, float]) -> None:
    """Squares of these are 0 or infinite. Values near 1e-310 have 43 bits: relative errors of 1e-13."""
    x, y = pairs(60)
    want, got = metric(), metric()
    want.update(x, y)
    for one, other in zip((x * scales[0]).split(sizes), (y * scales[1]).split(sizes), strict=True):
        got.update(one, other)
    assert got.compute() == pytest.approx(want.compute(), abs=1e-12 if min(scales) > 1e-307 else 1e-11)


@BOTH
def test_powers_of_two_change_no_bit(metric: Any) -> None:
    x, y = pairs(60)
    want, got = metric(), metric()
    for one, other in zip(x.split(20), y.split(20), strict=True):
        want.update(one, other)
        got.update(one * 2.0**900, other * 2.0**-800)
    assert got.compute() == want.compute()


@BOTH
def test_batches_of_different_scale(metric: Any) -> None:
    """A large batch decides, whichever comes first; one of zeros has no scale."""
    x, y = pairs(60)
    zeros = torch.zeros(20, dtype=torch.float64)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        parts = [(zeros, zeros), (x[:20] * 1e-200, y[:20] * 1e-180), (x[20:] * 1e-190, y[20:] * 1e-200)]
        corr = metric()
        for part in order:
            corr.update(*parts[part])
        whole = [torch.cat(side) * scale for side, scale in zip(zip(*parts, strict=True), (1e190, 1e180), strict=True)]
        assert corr.compute() == pytest.approx(SCIPY[metric](*whole).statistic, abs=1e-12)


@pytest.mark.parametrize("sizes", [[64], [7, 1, 56]], ids=["whole", "batches"])
@pytest.mark.parametrize("mean", [1e6, 2.0**52, -(2.0**52), 2.0**200], ids=str)
def test_variance_in_the_last_digits(sizes: list[int], mean: float) -> None:
    """Steps of one unit in the last place: what a rounded mean would lose. All of it is exact here but the quotient."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 9, (64,), generator=generator).double()
    y = steps + torch.randint(0, 9, (64,), generator=generator)
    x = mean + steps * math.ulp(mean)
    corr = PearsonCorr()
    for one, other in zip(x.split(sizes), y.split(sizes), strict=True):
        corr.update(one, other)
    assert corr.compute() == pytest.approx(stats.pearsonr(steps, y).statistic, abs=1e-13)


@BOTH
@pytest.mark.parametrize("constant", [1e-320, 1e200, -1e308, 0.1], ids=str)
def test_constants_of_any_scale_are_constant(metric: Any, constant: float) -> None:
    corr = metric()
    for size in (3, 7, 1):
        corr.update(torch.full((size,), constant, dtype=torch.float64), torch.arange(size).double())
    assert math.isnan(corr.compute())


@BOTH
def test_the_largest_numbers(metric: Any) -> None:
    x = torch.tensor([1.7e308, -1.7e308, 1.6e308, 0.0], dtype=torch.float64)
    corr = metric()
    corr.update(x, x)
    assert corr.compute() == pytest.approx(1, abs=1e-15)
    corr.update(torch.tensor([math.inf]), torch.tensor([1.0]))
    assert math.isnan(corr.compute()) == (metric is PearsonCorr)  # infinity has a rank, and no distance


@BOTH
def test_values_are_looked_at(metric: Any) -> None:
    with pytest.raises(ValueError, match="pred: expected a tensor that holds values, got one on device meta"):
        metric().update(torch.zeros(3, device="meta"), torch.zeros(3))


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e30, 1e200, 1e307], ids=str)
def test_health_of_layers_at_any_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    h, g = torch.randn(2, 3, 11, 4, dtype=torch.float64, generator=generator).unbind(0)
    assert oversmoothing(h * scale) == pytest.approx(oversmoothing(h), rel=1e-13)
    assert residual_update_ratio(h * scale, g * scale) == pytest.approx(residual_update_ratio(h, g), rel=1e-13)
    for n in range(2, 30):  # of some of which the mean is not the value
        constant = torch.full((n, 3), scale / 3, dtype=torch.float64)
        assert oversmoothing(constant) == 0
        assert residual_update_ratio(constant, constant) == 0
    assert math.isnan(oversmoothing(torch.zeros(5, 3)))


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e38], ids=str)
@pytest.mark.parametrize("sign", [None, 0.5, -2.0], ids=str)
def test_edge_recovery_at_any_scale(scale: float, sign: float | None) -> None:
    """Products of these are 0 or infinite in float32, and of the largest with numbers of about 1 too."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 30, 8, generator=generator).clamp(-3, 3).unbind(0)
    q[:, 0] = 0
    graph = MultiGraph.from_edge_index({"a": torch.randint(30, (2, 200), generator=generator)}, 30)
    want = edge_recovery(q, k, graph, "a", scale=sign)
    assert edge_recovery(q * scale, k * scale, graph, "a", scale=sign) == want


@BOTH
def test_bad_pairs(metric: Any) -> None:
    with pytest.raises(ValueError, match=r"target: expected the shape of pred, \[3, 1\], got \[3\]"):
        metric().update(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(TypeError, match="pred: expected a tensor, got list"):
        metric().update([1.0], torch.zeros(1))
    with pytest.raises(ValueError, match="pred: expected real values"):
        metric().update(torch.zeros(1, dtype=torch.complex64), torch.zeros(1))


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y = pairs(50, grid=True)
    mine = slice(0, 13) if rank == 0 else slice(13, 50)  # uneven shares
    values = []
    for metric in (PearsonCorr(), SpearmanCorr()):
        metric.update(x[mine], y[mine])
        values.append(metric.compute())
    Path(folder, f"rank{rank}").write_text(json.dumps(values))
    dist.destroy_process_group()


@pytest.mark.xdist_group("processes")
def test_ranks(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(900)
        assert process.exitcode == 0
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    x, y = pairs(50, grid=True)
    assert first == second
    assert first == pytest.approx([stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic], abs=1e-12)


def test_oversmoothing() -> None:
    h = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    projector = torch.eye(40, dtype=torch.float64) - 1 / 40
    assert oversmoothing(h) == pytest.approx(float((projector @ h.double()).norm() / h.double().norm()), rel=1e-9)
    assert oversmoothing(5 * h) == pytest.approx(oversmoothing(h))
    assert oversmoothing(h[:1].expand(40, 6)) == pytest.approx(0, abs=1e-12)
    assert oversmoothing(torch.cat([h, -h])) == pytest.approx(1)
    assert oversmoothing(torch.stack([h, h[:1].expand(40, 6)])) == pytest.approx(oversmoothing(h) / 2)


def test_residual_update_ratio() -> None:
    x = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(0))
    assert residual_update_ratio(x, x) == 0
    assert residual_update_ratio(x, -x) == pytest.approx(2)
    assert residual_update_ratio(x, x * torch.tensor([1.5, 2.0])[:, None, None]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oversmoothing(torch.zeros(3)), r"h: expected \[..., N, d\]"),
        (lambda: oversmoothing(torch.zeros(3, 3, dtype=torch.int64)), "h: expected dtype"),
        (lambda: residual_update_ratio(torch.zeros(3), torch.zeros(3)), "x_in: expected"),
        (lambda: residual_update_ratio(torch.zeros(3, 2), torch.zeros(2, 3)), "x_out: expected the shape of x_in"),
    ],
    ids=["dimensions", "dtype", "x_in", "shapes"],
)
def test_bad_features(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------ edges recovered


def recovery_by_hand(q: torch.Tensor, k: torch.Tensor, graph: MultiGraph, relation: str, num_prefix: int) -> float:
    q, k, known = q[num_prefix:], k[num_prefix:], graph.known(relation)
    hits = total = 0
    source, target = graph.edge_index(relation)
    for i in range(graph.num_nodes):
        edges = set(target[source == i].tolist())
        order = [j for j in (q[i] @ k.T).argsort(descending=True).tolist() if known[j]]
        hits += len(edges & set(order[: len(edges)]))
        total += len(edges)
    return hits / total


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("block_rows", [1, 7, 512])
@pytest.mark.parametrize("new_genes", [0, 5], ids=["all known", "new genes"])
def test_edge_recovery(num_prefix: int, block_rows: int, new_genes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    edges = {
        "a": torch.randint(2, 30, (2, 90), generator=generator),
        "b": torch.randint(0, 30, (2, 5), generator=generator),
    }
    graph = MultiGraph.from_edge_index(edges, 30).extend(new_genes)
    q, k = (torch.randn(num_prefix + 30 + new_genes, 4, generator=generator) for _ in range(2))
    for relation in edges:
        share = edge_recovery(q, k, graph, relation, num_prefix=num_prefix, block_rows=block_rows)
        assert share == recovery_by_hand(q, k, graph, relation, num_prefix)


def test_edge_recovery_extremes() -> None:
    n = 9
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    graph = MultiGraph.from_edge_index({"ring": ring, "none": ring[:, :0]}, n)
    k = torch.eye(n)
    assert edge_recovery(k[ring[1]], k, graph, "ring") == 1.0
    assert edge_recovery(k, k, graph, "ring") == 0.0
    assert edge_recovery(k[ring[1]], k, graph, "ring", scale=-1.0) == 0.0
    assert math.isnan(edge_recovery(k, k, graph, "none"))
    assert math.isnan(edge_recovery(k, k, graph, "ring", scale=math.nan))
    with pytest.raises(ValueError, match=r"'rings'.*did you mean 'ring'"):
        edge_recovery(k, k, graph, "rings")
    with pytest.raises(ValueError, match=r"q: expected num_prefix \+ num_nodes = 10 tokens, got 9"):
        edge_recovery(k, k, graph, "ring", num_prefix=1)
    with pytest.raises(ValueError, match=r"k: expected the shape of q, \[9, 9\], got \[8, 9\]"):
        edge_recovery(k, k[1:], graph, "ring")


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_record_layers(norm: str) -> None:
    torch.manual_seed(0)
    graph = MultiGraph.from_edge_index({"a": torch.randint(0, 20, (2, 50))}, 20)
    encoder = CellEncoder(8, 3, 2, ties=[(1, 1, "a", 1.0)], norm=norm, dropout=0.0)
    x = torch.randn(20, 8)
    with record_layers(encoder) as layers:
        _, h, _ = encoder(x, graph)
    assert len(layers) == 3
    torch.testing.assert_close(layers[0].x_in[1:], x)
    torch.testing.assert_close(layers[0].x_out, layers[1].x_in)
    torch.testing.assert_close(encoder.norm(layers[2].x_out)[1:], h)
    assert not any(tensor.requires_grad for layer in layers for tensor in layer)
    layer = encoder.layers[1]
    assert isinstance(layer, EncoderLayer)
    q, k, _ = layer.attention.project(layers[1].x_in if norm == "post" else layer.norm1(layers[1].x_in))
    torch.testing.assert_close((layers[1].q, layers[1].k), (q, k))
    expected = {"kl/layer1/head1/a": edge_recovery(q[1], k[1], graph, "a", num_prefix=1)}
    assert tied_edge_recovery(encoder, layers, graph) == expected
    assert all(residual_update_ratio(layer.x_in, layer.x_out) > 0 for layer in layers)
    encoder(x, graph)
    assert len(layers) == 3  # nothing is recorded outside
    assert not any(module._forward_hooks for module in encoder.modules())
    with pytest.raises(ValueError, match="layers: expected one record a layer, 3, got 2"):
        tied_edge_recovery(encoder, layers[:2], graph)


def test_training_recovers_edges() -> None:
    """The graph loss does what it is for: the tied head's top entries become the graph's edges."""
    torch.manual_seed(0)
    graph = MultiGraph.from_edge_index({"a": torch.randint(0, 30, (2, 60))}, 30, undirected=True)
    encoder = CellEncoder(16, 1, 2, ties=[(0, 0, "a", 1.0)], dropout=0.0)
    x = torch.nn.Parameter(torch.randn(30, 16))
    optimizer = torch.optim.Adam([x, *encoder.parameters()], lr=0.02)

    def share() -> float:
        with torch.no_grad(), record_layers(encoder) as layers:
            encoder(x, graph)
        return tied_edge_recovery(encoder, layers, graph)["kl/layer0/head0/a"]

    before = share()
    for _ in range(100):
        optimizer.zero_grad()
        encoder.regularization(encoder(x, graph)[2]).backward()
        optimizer.step()
    assert share() > 0.9 > 0.4 > before
