"""What is measured: problems, and who computes them, ours and the same quantities by other means.

A problem (`TiedAttention`, `DroppedAttention`, `EdgeAttention`, `GraphLoss`, `LogSumExp`, `PerturbationHead`) has an exact
definition and one method a peer, and attention without a loss is the floor. The definition is dense PyTorch on a block of
query rows, so that it can be taken in float64 at any length. A peer is built, imports included, when its turn comes: whatever
it raises is the reason why it could not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import cellattn
from cellattn import Comembership, MultiGraph
from cellattn.ops._dropout import draw_dropout, multiplier, threshold_of

from .peers import (
    CONV,
    SDPA_BACKENDS,
    SDPA_MASK,
    Attend,
    Function,
    compile_one,
    dense_attention,
    dense_head,
    dense_logsumexp,
    dense_loss,
    flash_attention_2,
    flash_attention_4,
    flex_attention_with_lse,
    generator_of,
    sdpa,
)


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case: `build` gets inputs like the measured ones and returns the function, or raises."""

    name: str
    build: Callable[..., Function]
    num_outputs: int | None = None  # it computes the case's first so many outputs; None: all
    num_bytes: int = 0  # that it is known to need at least
    num_draws: int = 1  # that are averaged before they are compared, of a random function


@dataclass(frozen=True)
class TiedAttention:
    """Attention over a prefix token and a graph's genes; each tied (relation, head) adds the KL of its rows, in the mean.

    Inputs q, k, v [H, T, D]; outputs out [H, T, D], lse [H, T] if asked, and one loss a tie.
    """

    graph: MultiGraph
    ties: tuple[tuple[str, int], ...] = ()
    rows: Tensor | None = None  # genes that are compared; None: all
    lse: bool = False

    def exact(self, first: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        alpha = scores.softmax(-1)
        lse = (scores.logsumexp(-1),) if self.lse else ()
        return alpha @ v, *lse, *(_loss(self.graph, r, "kl", self.rows, first, alpha[head]) for r, head in self.ties)

    def ours(self, *inputs: Tensor) -> Function:
        if self.lse:
            return cellattn.attention

        def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            out, losses = cellattn.graph_attention(q, k, v, self.graph, self.ties, rows=self.rows)
            return out, *losses

        return f

    def dense(self, *inputs: Tensor, compiled: bool = False, dynamic: bool = False) -> Function:
        f = compile_one(dense_attention, dynamic=dynamic) if compiled else dense_attention
        targets = [_target(self.graph, relation, self.rows).to(inputs[0].dtype) for relation, _ in self.ties]
        counts = [int((target.sum(1) > 0).sum()) for target in targets]
        heads = [head for _, head in self.ties]
        return partial(f, rows=self.rows, targets=targets, counts=counts, heads=heads, with_lse=self.lse)

    def num_dense_bytes(self, num_heads: int, element_size: int) -> int:
        """Alpha, its gradient and two maps in between for every head; target, logarithm and its gradient for a tie."""
        return (4 * num_heads + 3 * len(self.ties)) * (self.graph.num_nodes + 1) ** 2 * element_size

    def gather(self, attend: Callable[[], Attend]) -> Callable[..., Function]:
        """The identity KL_i = sum_j t log t - scale q_i . sum_j t k_j + LSE_i, its products by gather, its sums by scatter."""

        def build(*inputs: Tensor) -> Function:
            attention = attend()
            edges = [_edges(self.graph, relation, self.rows) for relation, _ in self.ties]

            def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
                out, lse = attention(q, k, v)
                losses = [
                    edge.loss(q[head], k[head], lse[head]) for edge, (_, head) in zip(edges, self.ties, strict=True)
                ]  # fmt: skip
                return out, *((lse,) if self.lse else ()), *losses

            return f

        return build

    def peers(
        self,
        inputs: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        *,
        compiled: bool = True,
        dynamic: bool = False,
        full: bool = True,
        floors: bool = True,
    ) -> Iterator[Implementation]:
        """Everybody; without dense maps and floors where not `full`."""
        dense_bytes = self.num_dense_bytes(inputs[0][0], dtype.itemsize)
        yield Implementation("ours", self.ours)
        if full:
            yield Implementation("dense eager", self.dense, num_bytes=dense_bytes)
        if full and compiled:
            build = partial(self.dense, compiled=True, dynamic=dynamic)
            yield Implementation("dense compiled", build, num_bytes=dense_bytes // 2)  # it fuses what lies between
        yield Implementation("FlexAttention + gather", self.gather(flex_attention_with_lse))
        yield Implementation("FlashAttention 4 + gather", self.gather(flash_attention_4))
        if full and floors:
            for name, backend in SDPA_BACKENDS.items():
                # alpha and its gradient, in float32 for 16-bit inputs
                num_bytes = 2 * 4 * inputs[0][0] * inputs[0][1] ** 2 if backend == SDPBackend.MATH else 0
                yield Implementation(name, partial(sdpa, backend), num_outputs=1, num_bytes=num_bytes)
            yield Implementation("FlashAttention 2", flash_attention_2, num_outputs=1)


@dataclass(frozen=True)
class DroppedAttention:
    """Attention whose map is dropped, one draw for all steps: inputs q, k, v [H, T, D], outputs out [H, T, D] and lse [H, T].

    The definition drops the same entries, so that it is compared as exactly as without dropout, which is the row to compare its
    time with.
    """

    dropout_p: float

    def exact(self, first: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        threshold = threshold_of(self.dropout_p)
        draw = draw_dropout(threshold, generator_of(q.device), q.device)
        assert draw is not None
        alpha = scores.softmax(-1)
        return (alpha * multiplier(draw, threshold, alpha, first)) @ v, scores.logsumexp(-1)

    def ours(self, *inputs: Tensor) -> Function:
        return lambda q, k, v: cellattn.attention(q, k, v, dropout_p=self.dropout_p, generator=generator_of(q.device))

    def peers(self, inputs: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Iterator[Implementation]:
        yield Implementation("ours", self.ours)


@dataclass(frozen=True)
class EdgeAttention:
    """Heads that see a graph alone: inputs q, k, v [H, T, D], output out [H, T, D].

    Of the tokens, a prefix token sees all, a gene the prefix, itself and its neighbours, in every head. The relation has no
    self-loops, so that each is seen once, which is what a mask can say. A dense mask is [H, T, T], which heads of several
    relations need; PyG has one list of edges for all heads.
    """

    graph: MultiGraph
    relation: str

    def mask(self, first: int = 0, rows: int | None = None) -> Tensor:
        """bool [rows, T], those of the tokens from `first` on."""
        tokens = torch.arange(first, self.graph.num_nodes + 1 if rows is None else first + rows, device=self.graph.device)
        mask = torch.zeros(len(tokens), self.graph.num_nodes + 1, dtype=torch.bool, device=tokens.device)
        mask[:, 0] = True
        mask[tokens - first, tokens] = True
        mask[tokens == 0] = True
        genes = tokens[tokens > 0] - 1
        segment, col, _ = _entries(self.graph, self.relation, genes)
        mask[len(tokens) - len(genes) + segment, 1 + col] = True
        return mask

    def exact(self, first: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~self.mask(first, q.shape[-2]), -torch.inf)
        return (scores.softmax(-1) @ v,)

    def ours(self, *inputs: Tensor) -> Function:
        heads = [(self.relation, head) for head in range(inputs[0].shape[0])]
        return lambda q, k, v: (cellattn.edge_attention(q, k, v, self.graph, heads)[0],)

    def sdpa(self, *inputs: Tensor) -> Function:
        mask = self.mask().repeat(1, inputs[0].shape[0], 1, 1)  # of three dimensions, PyTorch's flash attention refuses it
        return lambda q, k, v: (F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0],)

    def flex(self, *inputs: Tensor) -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        heads, tokens, _ = inputs[0].shape
        mask = self.mask().repeat(heads, 1, 1)
        blocks = create_block_mask(lambda b, h, i, j: mask[h, i, j], None, heads, tokens, tokens, device=mask.device)
        compiled = compile_one(flex_attention)
        return lambda q, k, v: (compiled(q[None], k[None], v[None], block_mask=blocks)[0],)

    def conv(self, *inputs: Tensor) -> Function:
        """The messages of PyG's `TransformerConv`, without its projections: tokens are the nodes."""
        heads, _, dim = inputs[0].shape
        conv = import_module("torch_geometric.nn").TransformerConv(dim, dim, heads=heads, root_weight=False)
        edges = self.mask().nonzero().t().flip(0).contiguous()  # from the token that is seen

        def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            query, key, value = (x.transpose(0, 1) for x in (q, k, v))
            out = conv.propagate(edges, query=query, key=key, value=value, edge_attr=None)
            conv._alpha = None  # it keeps the map for its caller
            return (out.transpose(0, 1),)

        return f

    def peers(
        self, inputs: Sequence[tuple[int, ...]], dtype: torch.dtype, *, compiled: bool = True
    ) -> Iterator[Implementation]:
        (heads, tokens, dim), _, _ = inputs
        yield Implementation("ours", self.ours)
        yield Implementation(SDPA_MASK, self.sdpa, num_bytes=heads * tokens**2)
        if compiled:
            yield Implementation("FlexAttention, block mask", self.flex, num_bytes=heads * tokens**2)
        seen = self.graph.num_edges(self.relation) + 3 * tokens
        yield Implementation(CONV, self.conv, num_bytes=3 * seen * heads * dim * dtype.itemsize)  # q, k, v of each edge


@dataclass(frozen=True)
class GraphLoss:
    """KL or BCE of one head against a relation: inputs q, k [T, D], output the mean over the rows with an edge."""

    graph: MultiGraph
    relation: str
    kind: str
    num_negatives: int | None = None

    @classmethod
    def of_pairs(cls, num_genes: int, share: float, device: torch.device) -> GraphLoss:
        """The KL against such a share of all pairs, at random."""
        index = (torch.rand(num_genes, num_genes, generator=torch.Generator().manual_seed(0)) < share).nonzero().t()
        return cls(MultiGraph.from_edge_index({"pairs": index}, num_genes).to(device), "pairs", "kl")

    def exact(self, first: int, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        alpha = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return (_loss(self.graph, self.relation, self.kind, None, first, alpha),)

    def ours(self, *inputs: Tensor) -> Function:
        if self.kind == "kl":
            return lambda q, k: (cellattn.attention_kl(q, k, self.graph, self.relation, num_prefix=1),)
        return lambda q, k: (
            cellattn.attention_bce(q, k, self.graph, self.relation, num_prefix=1, num_negatives=self.num_negatives),
        )

    def edges(self, *inputs: Tensor) -> Function:
        """The same target as one of weights, whose edges are walked."""
        index = self.graph.edge_index(self.relation)
        weight = {self.relation: torch.full((index.shape[1],), 2.0, device=index.device)}
        weighted = MultiGraph.from_edge_index({self.relation: index}, self.graph.num_nodes, edge_weight=weight)
        return lambda q, k: (cellattn.attention_kl(q, k, weighted, self.relation, num_prefix=1),)

    def dense(self, *inputs: Tensor, compiled: bool = False) -> Function:
        if not self.graph.known(self.relation).all():
            raise ValueError("the dense loss is written for graphs whose genes are all known")
        target = _target(self.graph, self.relation, None).to(inputs[0].dtype)
        f = compile_one(dense_loss) if compiled else dense_loss
        return partial(f, target=target, counted=(target.sum(1) > 0).nonzero()[:, 0], kind=self.kind)

    def peers(self, inputs: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Iterator[Implementation]:
        dense_bytes = 4 * inputs[0][0] ** 2 * dtype.itemsize
        sampled = self.num_negatives is not None
        yield Implementation("ours", self.ours, num_draws=8 if sampled else 1)
        if self.kind == "kl" and self.graph.bits(self.relation) is not None:
            yield Implementation("along its edges", self.edges)
        if not sampled:  # with negatives drawn, the dense loss is that of the row over every non-edge
            yield Implementation("dense eager", self.dense, num_bytes=dense_bytes)
            yield Implementation("dense compiled", partial(self.dense, compiled=True), num_bytes=dense_bytes // 2)


@dataclass(frozen=True)
class SharedTerms:
    """KL of one head to who shares terms with whom: inputs q, k [T, D] of a prefix token and the genes, output the mean."""

    target: Comembership

    @classmethod
    def draw(cls, num_genes: int, device: torch.device) -> SharedTerms:
        """Terms of 2 to 2,000 genes as the Gene Ontology has them: few large ones, many small ones; some eight a gene."""
        g = torch.Generator().manual_seed(0)
        num_terms = max(num_genes * 6 // 10, 1)
        largest = min(2000, num_genes)
        sizes = (largest / torch.arange(1, num_terms + 1) ** 0.75).long().clamp(min(2, num_genes), largest)
        genes = torch.cat([torch.randperm(num_genes, generator=g)[:size] for size in sizes.tolist()])
        index = torch.stack([genes, num_genes + torch.arange(num_terms).repeat_interleave(sizes)]).to(device)
        graph = MultiGraph.from_edge_index(
            {"has": index},
            num_genes + num_terms,
            node_types={"gene": num_genes, "term": num_terms},
            joins={"has": ("gene", "term")},
        )
        return cls(graph.comembership("has"))

    def exact(self, first: int, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        alpha = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        genes = torch.arange(max(first - 1, 0), first + len(alpha) - 1, device=q.device)  # token 0 is no gene
        t = self.target.rows(genes).to(alpha.dtype)
        terms = torch.xlogy(t, t) - t * alpha[len(alpha) - len(genes) :, 1:].log()
        wide = torch.promote_types(alpha.dtype, torch.float32)
        counted = int((self.target.inv_mass > 0).sum())
        return (terms.to(wide).sum() / max(counted, 1),)

    def ours(self, *inputs: Tensor) -> Function:
        return lambda q, k: (cellattn.attention_kl_comembership(q, k, self.target, num_prefix=1),)

    def pairs(self, *inputs: Tensor) -> Function:
        """The same matrix as a relation between genes, for `attention_kl`."""
        graph, relation = self.target.graph, self.target.relation
        genes, terms = self.target.genes.stop, graph.num_nodes
        index = graph.edge_index(relation).cpu()
        b = torch.sparse_coo_tensor(index, torch.ones(index.shape[1]), (genes, terms))
        c = torch.sparse.mm(b, b.t()).coalesce()
        others = c.indices()[0] != c.indices()[1]
        index, weight = (x[..., others].to(graph.device) for x in (c.indices(), c.values()))
        made = MultiGraph.from_edge_index({"pairs": index}, genes, edge_weight={"pairs": weight})
        return lambda q, k: (cellattn.attention_kl(q, k, made, "pairs", num_prefix=1),)

    def dense(self, *inputs: Tensor, compiled: bool = False) -> Function:
        genes = torch.arange(self.target.genes.stop, device=self.target.graph.device)
        target = self.target.rows(genes).to(inputs[0].dtype)
        f = compile_one(dense_loss) if compiled else dense_loss
        return partial(f, target=target, counted=(target.sum(1) > 0).nonzero()[:, 0], kind="kl")

    def peers(self, inputs: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Iterator[Implementation]:
        dense_bytes = 4 * inputs[0][0] ** 2 * dtype.itemsize
        yield Implementation("ours", self.ours)
        yield Implementation("pairs as a relation", self.pairs)
        yield Implementation("dense eager", self.dense, num_bytes=dense_bytes)
        yield Implementation("dense compiled", partial(self.dense, compiled=True), num_bytes=dense_bytes // 2)


@dataclass(frozen=True)
class LogSumExp:
    """The log-sum-exp alone: inputs q, k [H, T, D], output lse [H, T]."""

    def exact(self, first: int, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return dense_logsumexp(q, k)

    def ours(self, *inputs: Tensor) -> Function:
        return lambda q, k: (cellattn.attention_logsumexp(q, k),)

    def peers(
        self, inputs: Sequence[tuple[int, ...]], dtype: torch.dtype, *, compiled: bool = True
    ) -> Iterator[Implementation]:
        dense_bytes = 2 * inputs[0][0] * inputs[0][1] ** 2 * dtype.itemsize
        yield Implementation("ours", self.ours)
        yield Implementation("dense eager", lambda *_: dense_logsumexp, num_bytes=dense_bytes)
        if compiled:
            yield Implementation("dense compiled", lambda *_: compile_one(dense_logsumexp), num_bytes=dense_bytes // 2)


@dataclass(frozen=True)
class PerturbationHead:
    """`num_sets` sets of two genes over all: inputs query [B, D], key, value [N, D], override [2 B, D], output z [B, D]."""

    index: Tensor  # int64 [2 B]
    ptr: Tensor  # int64 [B + 1]

    @classmethod
    def draw(cls, num_sets: int, num_genes: int, device: torch.device) -> PerturbationHead:
        g = torch.Generator().manual_seed(0)
        one = torch.randint(num_genes, (num_sets,), generator=g)
        other = (one + torch.randint(1, num_genes, (num_sets,), generator=g)) % num_genes  # never the same gene twice
        return cls(torch.stack([one, other], 1).flatten().to(device), 2 * torch.arange(num_sets + 1, device=device))

    def exact(self, first: int, query: Tensor, key: Tensor, value: Tensor, override: Tensor) -> tuple[Tensor, ...]:
        mine = slice(2 * first, 2 * (first + len(query)))
        return dense_head(query, key, value, override[mine], index=self.index[mine])

    def ours(self, *inputs: Tensor) -> Function:
        return lambda query, key, value, override: (
            cellattn.perturbation_attention(
                query, key, value, self.index, self.ptr, override, scale=query.shape[-1] ** -0.5
            ),
        )  # fmt: skip

    def dense(self, *inputs: Tensor, compiled: bool = False) -> Function:
        return partial(compile_one(dense_head) if compiled else dense_head, index=self.index)

    def peers(
        self, inputs: Sequence[tuple[int, ...]], dtype: torch.dtype, *, compiled: bool = True
    ) -> Iterator[Implementation]:
        (num_sets, _), (num_genes, width) = inputs[0], inputs[2]
        dense_bytes = 2 * num_sets * num_genes * width * dtype.itemsize  # every set's values, and their gradient
        yield Implementation("ours", self.ours)
        yield Implementation("dense eager", self.dense, num_bytes=dense_bytes)
        if compiled:
            yield Implementation("dense compiled", partial(self.dense, compiled=True), num_bytes=dense_bytes // 2)


# --------------------------------------------------------------------------------------------------------- the graph's side


@dataclass(frozen=True)
class _Edges:
    """The edges of the compared rows: `segment` numbers the row, `row` and `col` are tokens."""

    segment: Tensor  # int64 [E]
    row: Tensor  # int64 [E]
    col: Tensor  # int64 [E]
    target: Tensor  # float32 [E]
    entropy: Tensor  # float32 [R], sum_j t log t
    counted: Tensor  # bool [R]
    tokens: Tensor  # int64 [R]

    def loss(self, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        """q, k [T, D], lse [T]: the mean KL."""
        product = (q.index_select(0, self.row) * k.index_select(0, self.col)).sum(-1, dtype=lse.dtype)
        cross = torch.zeros_like(self.entropy, dtype=lse.dtype).index_add(0, self.segment, self.target.to(lse.dtype) * product)
        kl = self.entropy - q.shape[-1] ** -0.5 * cross + self.counted * lse.index_select(0, self.tokens)
        return kl.sum() / self.counted.sum().clamp_min(1)


def _entries(graph: MultiGraph, relation: str, genes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The edges of some genes: number of the row in `genes`, column, and the row over its sum in float64, each [E]."""
    degree = graph.degree(relation)[genes]
    segment = torch.arange(len(genes), device=graph.device).repeat_interleave(degree)
    start = graph.rowptr(relation)[genes] - (degree.cumsum(0) - degree)
    entry = start[segment] + torch.arange(len(segment), device=graph.device)
    weight = graph.weight(relation)[entry].double()
    mass = torch.zeros(len(genes), dtype=torch.float64, device=graph.device).index_add(0, segment, weight)
    return segment, graph.col(relation)[entry].long(), weight / mass[segment]


def _edges(graph: MultiGraph, relation: str, rows: Tensor | None) -> _Edges:
    genes = torch.arange(graph.num_nodes, device=graph.device) if rows is None else rows
    segment, col, target = _entries(graph, relation, genes)
    zero = torch.zeros(len(genes), dtype=torch.float64, device=graph.device)
    return _Edges(
        segment=segment,
        row=1 + genes[segment],
        col=1 + col,
        target=target.float(),
        entropy=zero.index_add(0, segment, torch.xlogy(target, target)).float(),
        counted=graph.degree(relation)[genes] > 0,
        tokens=1 + genes,
    )


def _target(graph: MultiGraph, relation: str, genes: Tensor | None) -> Tensor:
    """Rows of the graph, each over its sum: float64 [R, N]."""
    genes = torch.arange(graph.num_nodes, device=graph.device) if genes is None else genes
    segment, col, target = _entries(graph, relation, genes)
    return torch.zeros(len(genes), graph.num_nodes, dtype=torch.float64, device=graph.device).index_put((segment, col), target)


def _loss(graph: MultiGraph, relation: str, kind: str, rows: Tensor | None, first: int, alpha: Tensor) -> Tensor:
    """What the tokens from `first` on add to the mean loss of a head, by the definition: alpha [tokens, T]."""
    genes = torch.arange(max(first - 1, 0), first + len(alpha) - 1, device=graph.device)  # token 0 is no gene
    a = alpha[len(alpha) - len(genes) :, 1:]
    # sums over rows in more than 16 bits, as eager's own reductions keep them
    wide = torch.promote_types(alpha.dtype, torch.float32)
    if kind == "kl":
        segment, col, target = _entries(graph, relation, genes)
        target = target.to(alpha.dtype)
        terms = torch.xlogy(target, target) - target * a[segment, col].log()
        loss = torch.zeros(len(genes), dtype=wide, device=graph.device).index_add(0, segment, terms.to(wide))
    else:
        target = _target(graph, relation, genes).to(alpha.dtype)
        known = graph.known(relation)
        terms = -(target * a.log() + (1 - target) * torch.log1p(-a))
        loss = torch.where(known[genes, None] & known, terms, 0).sum(-1).to(wide)
    chosen = graph.degree(relation) > 0
    if rows is not None:
        chosen = chosen & torch.zeros_like(chosen).index_fill(0, rows, True)
    return loss[chosen[genes]].sum() / chosen.sum().clamp_min(1)
