"""What is watched in training: correlations over batches and ranks, the health of the layers, edges recovered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from ._check import FLOAT_DTYPES, count_of, describe, require, require_same, require_tensor
from .graph import MultiGraph

if TYPE_CHECKING:
    from .nn import CellEncoder

__all__ = [
    "LayerRecord",
    "PearsonCorr",
    "SpearmanCorr",
    "edge_recovery",
    "oversmoothing",
    "record_layers",
    "residual_update_ratio",
    "tied_edge_recovery",
]


def _values(name: str, value: Any) -> Tensor:
    """A metric's input as a detached float64 vector on the CPU."""
    require_tensor(name, value)
    require(not value.is_complex(), f"{name}: expected real values, got a {describe(value)}")
    require(value.device.type != "meta", f"{name}: expected a tensor that holds values, got one on device meta")
    return value.detach().reshape(-1).to("cpu", torch.float64)


def _pair(pred: Any, target: Any) -> tuple[Tensor, Tensor]:
    x, y = _values("pred", pred), _values("target", target)
    require_same("shape", pred=list(pred.shape), target=list(target.shape))
    return x, y


def _over_ranks(state: Any) -> list[Any]:
    """The states of all ranks, in rank order; this one's alone where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


_MIN_EXPONENT = -1074  # of the smallest float64


def _unit(largest: Tensor) -> Tensor:
    """The largest power of two that is no larger than each entry, 1 for entries of 0: dividing by it rounds nothing."""
    mantissa, _ = torch.frexp(largest)
    return torch.where(largest > 0, largest / (2 * mantissa), 1)


def _norm(x: Tensor) -> Tensor:
    """Frobenius norms [...] of float64 matrices [..., N, d], at any scale."""
    if x.shape[-2:].numel() == 0:
        return x.new_zeros(x.shape[:-2])
    unit = _unit(x.abs().amax((-2, -1), keepdim=True))
    return torch.linalg.matrix_norm(x / unit) * unit[..., 0, 0]


class _Side(NamedTuple):
    """What is known of one side of the pairs, in units of 2^exponent, in which no value is as large as 2.

    The mean is `first + mean`, the second the small one: differences of means are exact where values differ in last digits.
    """

    exponent: int = _MIN_EXPONENT
    first: float = 0.0  # the first value
    mean: float = 0.0
    square: float = 0.0  # sum of centred squares

    def rescaled(self, exponent: int) -> _Side:
        shift = self.exponent - exponent
        return _Side(exponent, math.ldexp(self.first, shift), math.ldexp(self.mean, shift), math.ldexp(self.square, 2 * shift))


class _Moments(NamedTuple):
    """Count, means, and sums of centred products of pairs (x, y)."""

    n: int = 0
    x: _Side = _Side()
    y: _Side = _Side()
    product: float = 0.0  # sum of centred products, in units of 2^(x.exponent + y.exponent)

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Moments:
        if len(x) == 0:
            return cls()
        sides: list[_Side] = []
        centred: list[Tensor] = []
        for v in (x, y):
            largest = float(v.abs().max())
            exponent = math.frexp(largest)[1] - 1 if 0 < largest < math.inf else _MIN_EXPONENT
            v = v / math.ldexp(1.0, exponent)
            # centred at the first value first, so that constant input has exactly no variance
            d = v - v[0]
            mean = d.mean()
            d = d - mean
            centred.append(d)
            sides.append(_Side(exponent, float(v[0]), float(mean), float(d @ d)))
        return cls(len(x), sides[0], sides[1], float(centred[0] @ centred[1]))

    def merge(self, other: _Moments) -> _Moments:
        """Chan, Golub, LeVeque 1979: pairwise update, exact up to rounding and free of cancellation."""
        if self.n == 0 or other.n == 0:
            return self if other.n == 0 else other
        n = self.n + other.n
        share, common = other.n / n, self.n * other.n / n
        x, y = max(self.x.exponent, other.x.exponent), max(self.y.exponent, other.y.exponent)
        a, b = self._rescaled(x, y), other._rescaled(x, y)
        dx, dy = ((v.first - u.first) + (v.mean - u.mean) for u, v in ((a.x, b.x), (a.y, b.y)))
        merged = [
            _Side(u.exponent, u.first, u.mean + d * share, u.square + v.square + d * d * common)
            for u, v, d in ((a.x, b.x, dx), (a.y, b.y, dy))
        ]
        return _Moments(n, merged[0], merged[1], a.product + b.product + dx * dy * common)

    def _rescaled(self, x: int, y: int) -> _Moments:
        shift = self.x.exponent - x + self.y.exponent - y
        return _Moments(self.n, self.x.rescaled(x), self.y.rescaled(y), math.ldexp(self.product, shift))

    def correlation(self) -> float:
        scale = self.x.square**0.5 * self.y.square**0.5
        r = self.product / scale if scale != 0 else math.nan
        return r if math.isnan(r) else min(1.0, max(-1.0, r))  # rounding may leave [-1, 1]


class PearsonCorr:
    """Pearson correlation of all pairs since the last reset, in float64, in constant memory, at any scale of either side."""

    def __init__(self) -> None:
        self._state = _Moments()

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch: two real tensors of one shape, any dtype. Raises ValueError where the shapes differ."""
        self._state = self._state.merge(_Moments.of(*_pair(pred, target)))

    def merge(self, other: Self) -> None:
        """Add all pairs that another one has seen."""
        self._state = self._state.merge(other._state)

    def compute(self) -> float:
        """The correlation, over all ranks where torch.distributed is initialised (then every rank calls it).

        NaN for fewer than two pairs, a constant side, or where a NaN or infinity was seen.
        """
        state = _Moments()
        for one in _over_ranks(self._state):
            state = state.merge(one)
        return state.correlation()

    def reset(self) -> None:
        """Forget all pairs."""
        self._state = _Moments()


class SpearmanCorr:
    """Spearman correlation (average ranks for ties) of all pairs since the last reset, in float64. Keeps them all."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch: two real tensors of one shape, any dtype. Raises ValueError where the shapes differ."""
        self._pairs.append(_pair(pred, target))

    def merge(self, other: Self) -> None:
        """Add all pairs that another one has seen."""
        self._pairs = self._pairs + other._pairs

    def compute(self) -> float:
        """The correlation, over all ranks where torch.distributed is initialised (then every rank calls it).

        NaN for fewer than two pairs, a constant side, or where a NaN was seen.
        """
        pairs = [pair for rank in _over_ranks(self._pairs) for pair in rank]
        if not pairs:
            return math.nan
        x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
        if x.isnan().any() or y.isnan().any():
            return math.nan
        return _Moments.of(_average_ranks(x), _average_ranks(y)).correlation()

    def reset(self) -> None:
        """Forget all pairs."""
        self._pairs = []


def _average_ranks(x: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs: float64 [n]."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def oversmoothing(h: Tensor) -> float:
    """How far token features are from being all alike: ||H - 1 m||_F / ||H||_F with m the mean token.

    The measure mu of Wu et al. 2023 (Demystifying oversmoothing in attention-based graph neural networks, section 3),
    here relative to the norm of H so that layers compare: 0 when all tokens are equal, at most 1.

    Args:
        h: [..., N, d], floating; leading dimensions are averaged over. O(N d).

    Returns:
        A float in [0, 1]; NaN where h is all zeros.

    Raises:
        ValueError: another dtype or fewer than 2 dimensions.
    """
    require_tensor("h", h, dtypes=FLOAT_DTYPES)
    require(h.ndim >= 2, f"h: expected [..., N, d], got a {describe(h)}")
    h = h.detach().double()
    centred = h / 2 - h[..., :1, :] / 2  # equal tokens are exactly 0; halves, since a difference may overflow
    centred = centred - centred.mean(-2, keepdim=True)
    return float((_norm(centred) / _norm(h / 2)).mean())


def residual_update_ratio(x_in: Tensor, x_out: Tensor) -> float:
    """How much a layer changes its input: ||x_out - x_in||_F / ||x_in||_F.

    Args:
        x_in, x_out: [..., N, d], floating, the tokens before and after; leading dimensions are averaged over.

    Returns:
        A float of at least 0; NaN or infinite where x_in is all zeros.

    Raises:
        ValueError: another dtype, fewer than 2 dimensions, or two shapes.
    """
    require_tensor("x_in", x_in, dtypes=FLOAT_DTYPES)
    require_tensor("x_out", x_out, dtypes=FLOAT_DTYPES)
    require(x_in.ndim >= 2, f"x_in: expected [..., N, d], got a {describe(x_in)}")
    require_same("shape", x_in=list(x_in.shape), x_out=list(x_out.shape))
    x_in, x_out = x_in.detach().double() / 2, x_out.detach().double() / 2  # halves, since a difference may overflow
    return float((_norm(x_out - x_in) / _norm(x_in)).mean())


class LayerRecord(NamedTuple):
    """One layer in one forward pass, detached: tokens [..., 1 + N, dim], q and k [..., H, 1 + N, head_dim]."""

    x_in: Tensor
    x_out: Tensor
    q: Tensor
    k: Tensor


@contextmanager
def record_layers(encoder: CellEncoder) -> Iterator[list[LayerRecord]]:
    """Collect one `LayerRecord` a layer from each forward pass inside the context; nothing is done outside it.

    The list is ordered by pass, then layer. It holds references to the activations: meant for a single pass, and of the
    module itself rather than a compiled one.

        with record_layers(encoder) as layers, torch.no_grad():
            encoder(x, graph)
        ratios = [residual_update_ratio(layer.x_in, layer.x_out) for layer in layers]
    """
    records: list[LayerRecord] = []
    projections: list[tuple[Tensor, Tensor]] = []

    def after_attention(module: Any, args: tuple[Any, ...], output: Any) -> None:
        with torch.no_grad():
            q, k, _ = module.project(args[0])
        projections.append((q, k))

    def after_layer(module: Any, args: tuple[Any, ...], output: Any) -> None:
        records.append(LayerRecord(args[0].detach(), output[0].detach(), *projections.pop()))

    hooks = [layer.get_submodule("attention").register_forward_hook(after_attention) for layer in encoder.layers]
    hooks += [layer.register_forward_hook(after_layer) for layer in encoder.layers]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def edge_recovery(
    q: Tensor,
    k: Tensor,
    graph: MultiGraph,
    relation: str,
    *,
    num_prefix: int = 0,
    scale: float | None = None,
    block_rows: int = 512,
) -> float:
    """Share of a graph's edges among the top attention entries of a head, as many a row as the row has edges.

    For a row with E_i valid edges the E_i gene columns of the highest score are taken, among its valid columns; what is
    returned is (edges among them, over all rows) / (sum of E_i). A head that knows nothing reaches the graph's density.
    The map is streamed over blocks of rows.

    Args:
        q, k: [T, D], floating, one head, T = num_prefix + graph.num_nodes.
        graph, relation: the graph the head is tied to.
        num_prefix: tokens before the genes.
        scale: of the scores; `1 / sqrt(D)` by default. Their order, hence the result, depends on its sign alone.
        block_rows: rows scored at a time.

    Returns:
        A float in [0, 1]; NaN for a graph without a valid edge, and where a score is NaN, which has no place in an order.

    Raises:
        ValueError: a shape, dtype or relation that does not fit.
    """
    require_tensor("q", q, ndim=2, dtypes=FLOAT_DTYPES)
    require_tensor("k", k, ndim=2, dtypes=FLOAT_DTYPES)
    require_same("shape", q=list(q.shape), k=list(k.shape))
    require_same("dtype", q=q.dtype, k=k.dtype)
    num_prefix, block_rows = count_of("num_prefix", num_prefix), count_of("block_rows", block_rows, minimum=1)
    tokens = num_prefix + graph.num_nodes
    require(len(q) == tokens, f"q: expected num_prefix + num_nodes = {tokens} tokens, got {len(q)}")
    # at least float32: scores rounded to 16 bits tie
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.detach()[num_prefix:].to(dtype), k.detach()[num_prefix:].to(dtype)
    if q.numel():  # neither overflow nor underflow has a part in the order within a row
        q, k = q / _unit(q.abs().amax(1, keepdim=True)), k / _unit(k.abs().max())
    q = q if scale is None or scale > 0 else -q if scale < 0 else q * scale
    known, degree = graph.known_columns(relation), graph.degree(relation)
    source, target = graph.edge_index(relation)  # both ends known: the graph holds no other edge
    if len(source) == 0:
        return math.nan
    hits = 0
    for rows in degree.nonzero().squeeze(-1).split(block_rows):
        scores = (q[rows] @ k.mT).masked_fill(~known, float("-inf"))
        if scores.isnan().any():
            return math.nan
        first, last = torch.searchsorted(source, torch.stack([rows[0], rows[-1] + 1])).tolist()
        edges = torch.zeros_like(scores, dtype=torch.bool)
        edges[torch.searchsorted(rows, source[first:last]), target[first:last]] = True
        top = scores.topk(int(degree[rows].max()), dim=-1).indices
        within = torch.arange(top.shape[1], device=top.device) < degree[rows, None]
        hits += int((edges.gather(1, top) & within).sum())
    return hits / len(source)


def tied_edge_recovery(encoder: CellEncoder, layers: list[LayerRecord], graph: MultiGraph) -> dict[str, float]:
    """`edge_recovery` of every tie of an encoder, by the name of its loss.

    Args:
        encoder: the encoder; layers: its `record_layers` of one pass over tokens [N, dim]; graph: that of the pass.

    Raises:
        ValueError: another number of records than layers, or tokens with leading dimensions.
    """
    require(
        len(layers) == len(encoder.layers),
        f"layers: expected one record a layer, {len(encoder.layers)}, got {len(layers)}",
    )
    shares = {}
    for name, tie in zip(encoder.weights, encoder.ties, strict=True):
        q, k = layers[tie.layer].q, layers[tie.layer].k
        require(q.ndim == 3, f"layers: expected tokens [1 + N, dim], got q as a {describe(q)}")
        shares[name] = edge_recovery(q[tie.head], k[tie.head], graph, tie.relation, num_prefix=1)
    return shares
