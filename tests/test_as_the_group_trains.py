"""A training step in dense PyTorch, as users have it, and the same step on this library: equal losses, equal gradients.

The dense model makes the maps, drops entries of them, compares the map before that with each graph as a sum over rows divided
by the edges a gene, lets all genes attend to each set in a loop over the batch, and reads the rows of the set. Both sides have
one set of weights and one mask of dropout. In float64 they agree to the order of their sums, for every option; in float32 and
under autocast to bfloat16 each is within the roundings that follow one another of the exact result.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellattn import MultiGraph, reference
from cellattn.nn import CellTransformer, weight_from_row_sum

from .compare import RTOL, random_graph

N, HEADS, DIM = 24, 9, 36
GRAPHS = tuple(f"graph{i}" for i in range(HEADS))
LAMBDA, DROPOUT = 0.7, 0.25
SEEDS, PTR = torch.tensor([4, 7, 1, 0, 10, 4, 2, 7]), torch.tensor([0, 2, 3, 6, 8])
PHENOTYPE = torch.tensor([0.3, -1.2, 0.7, 0.1])
GRAPH = random_graph(N, {name: 30 + 8 * i for i, name in enumerate(GRAPHS)})


class Option(NamedTuple):
    """What a run has beside, or in place of, nine KL terms with dropout and a mean of post-norm rows."""

    dropout: float = DROPOUT
    graph: MultiGraph = GRAPH
    loss: Mapping[str, Any] = {}  # of all ties
    own: Mapping[int, Mapping[str, Any]] = {}  # of the tie of a head
    masked: Sequence[int] = ()  # heads that see their graph alone, in place of a tie
    rows: Mapping[str, Tensor] | None = None
    pool: str = "mean"
    residual: str = "post"
    null_sink: float | None = None
    norm: str = "post"

    def of_tie(self, head: int) -> dict[str, Any]:
        return {**self.loss, **self.own.get(head, {})}

    @property
    def tied(self) -> list[int]:
        return [head for head in range(HEADS) if head not in self.masked]


# ------------------------------------------------------------------------------------------------------ the dense model


class Dense(nn.Module):
    """One layer, its graph term, and the read-out."""

    def __init__(self, option: Option) -> None:
        super().__init__()
        self.option = option
        self.embedding = nn.Parameter(torch.randn(N, DIM))
        self.cls = nn.Parameter(torch.randn(1, DIM))
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.ffn = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.beta = nn.Parameter(torch.tensor([0.4, -0.6]))
        self.cross = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.cross_ffn = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.cross_norm1, self.cross_norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.cross_beta = nn.Parameter(torch.tensor([0.5, 0.8]))
        self.null_bias = nn.Parameter(torch.tensor([option.null_sink or 0.0]))
        self.mlp = nn.Sequential(nn.Linear(2 * DIM, DIM), nn.ReLU(), nn.Linear(DIM, 1))

    def forward(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean squared error and graph term."""
        h, alpha, scores = self.layer(torch.cat([self.cls, self.embedding]), generator)
        prediction = torch.cat([self.read(h, members) for members in SEEDS.tensor_split(PTR[1:-1])])
        error = (prediction.to(self.cls.dtype) - PHENOTYPE.to(self.cls.dtype)).square().sum() / len(PHENOTYPE)
        return error, self.graph_term(alpha, scores)

    def layer(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, and the map and scores [H, N, N] of genes and genes."""
        q, k, v = (project(x).view(N + 1, HEADS, -1).transpose(0, 1) for project in (self.q, self.k, self.v))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if self.option.masked:
            seen = torch.ones(HEADS, N + 1, N + 1, dtype=torch.bool)
            for head in self.option.masked:
                seen[head, 1:, 1:] = (reference.adjacency(self.option.graph, GRAPHS[head]) > 0) | torch.eye(N, dtype=torch.bool)
            scores = scores.masked_fill(~seen, -torch.inf)
        alpha = scores.softmax(-1)
        dropped = alpha
        if self.option.dropout > 0:  # masked heads draw first, and each kind counts from 0
            mask = torch.ones(alpha.shape, dtype=alpha.dtype)
            masked, tied = list(self.option.masked), self.option.tied
            if masked:
                mask[masked] = self.masked_multiplier(len(masked), generator).to(mask.dtype)
            if tied:
                shape = len(tied), N + 1, N + 1
                mask[tied] = reference.dropout_multiplier(shape, self.option.dropout, generator).to(mask.dtype)
            dropped = alpha * mask
        y = self.o((dropped @ v).transpose(0, 1).reshape(N + 1, DIM))
        if self.option.norm == "rezero":
            x = x + self.beta[0] * y
            x = x + self.beta[1] * self.ffn(x)
        else:
            x = self.norm1(x + y)
            x = self.norm2(x + self.ffn(x))
        return x, alpha[:, 1:, 1:], scores[:, 1:, 1:]

    def masked_multiplier(self, heads: int, generator: torch.Generator) -> Tensor:
        """Of masked heads, a relation each: entries of CLS and of a gene itself are copy 0, edges that of their relation."""
        shape, tokens = (heads, N + 1, N + 1), torch.arange(N + 1)
        near = (tokens[:, None] == 0) | (tokens[None, :] == 0) | (tokens[:, None] == tokens[None, :])
        own, *edges = reference.dropout_multiplier(shape, self.option.dropout, generator, copies=range(heads + 1))
        return torch.where(near, own, torch.stack([copy[head] for head, copy in enumerate(edges)]))

    def read(self, h: Tensor, members: Tensor) -> Tensor:
        """All genes attend to one set; its rows are pooled: [1]."""
        genes = h[1:]
        keys, mask = genes[members], None
        if self.option.null_sink is not None:
            mask = torch.cat([self.null_bias.expand(N, 1), torch.zeros(N, len(members), dtype=self.null_bias.dtype)], 1)
            keys = torch.cat([torch.zeros(1, DIM, dtype=keys.dtype), keys])
        attended, _ = self.cross(genes, keys, keys, attn_mask=mask, average_attn_weights=False)
        if self.option.residual == "rezero":
            y = genes + self.cross_beta[0] * attended
            y = y + self.cross_beta[1] * self.cross_ffn(y)
        else:
            y = self.cross_norm1(genes + attended)
            y = self.cross_norm2(y + self.cross_ffn(y))
        rows = y[members].sum(0)
        return self.mlp(torch.cat([h[0], rows / len(members) if self.option.pool == "mean" else rows]))

    def graph_term(self, alpha: Tensor, scores: Tensor) -> Tensor:
        """lambda times the sum over rows, as `reduction="batchmean"` of a batch of one has it, divided by the edges a gene."""
        graph, total = self.option.graph, torch.zeros((), dtype=torch.float64)
        for head in self.option.tied:
            name, options = GRAPHS[head], self.option.of_tie(head)
            target = reference.target(graph, name)[0].to(alpha.dtype)
            counted = target.sum(1) > 0
            if self.option.rows is not None:
                rows = self.option.rows[name]
                target, counted = target[rows], counted[rows]
            else:
                rows = torch.arange(N)
            a, s = alpha[head][rows], scores[head][rows]
            if options.get("over") == "valid":
                a = s.softmax(-1)
            if options.get("loss", "kl") == "kl":
                loss = F.kl_div(a.log()[None], target[None], reduction="batchmean")
            elif options.get("link") == "sigmoid":
                loss = F.binary_cross_entropy_with_logits(s, (target > 0).to(s.dtype), reduction="none")[counted].sum()
            else:
                loss = F.binary_cross_entropy(a, target, reduction="none")[counted].sum()
            total = total + LAMBDA * loss.double() / (graph.num_edges(name) / N)
        return total


# ------------------------------------------------------------------------------------------------------------ this one


def ours(option: Option) -> CellTransformer:
    ties: list[Any] = []
    for head in option.tied:
        num_rows = None if option.rows is None else len(option.rows[GRAPHS[head]])
        weight = weight_from_row_sum(LAMBDA, option.graph, GRAPHS[head], num_rows=num_rows)
        ties.append((0, head, GRAPHS[head], weight, dict(option.own.get(head, {}))))
    return CellTransformer(
        DIM, 1, HEADS, num_genes=N, num_types=None, ties=ties, masks=[(0, head, GRAPHS[head]) for head in option.masked],
        norm=option.norm, dropout=0.0, dropout_p=option.dropout, ffn_dim=2 * DIM, cross_heads=0, pool_heads=HEADS,
        pool="readout" if option.pool == "mean" else "readout_sum", readout_residual=option.residual,
        readout_null_sink=option.null_sink, hidden_dim=DIM, activation="relu", **option.loss,
    )  # fmt: skip


def names(option: Option) -> dict[str, Sequence[str]]:
    """Parameters of ours, and those of the dense model that they hold one after another."""
    layer, pool, mlp = "encoder.layers.0", "head.pools.0.readout", "head.mlp"
    pairs: dict[str, Sequence[str]] = {
        "tokens.embedding.weight": ["embedding"],
        "encoder.cls": ["cls"],
    }
    for kind in ("weight", "bias"):
        pairs |= {
            f"{layer}.attention.qkv.{kind}": [f"q.{kind}", f"k.{kind}", f"v.{kind}"],
            f"{layer}.attention.out.{kind}": [f"o.{kind}"],
            f"{layer}.ffn.0.{kind}": [f"ffn.0.{kind}"],
            f"{layer}.ffn.2.{kind}": [f"ffn.2.{kind}"],
            f"{pool}.qkv.{kind}": [f"cross.in_proj_{kind}"],
            f"{pool}.out.{kind}": [f"cross.out_proj.{kind}"],
            f"{pool}.ffn.0.{kind}": [f"cross_ffn.0.{kind}"],
            f"{pool}.ffn.2.{kind}": [f"cross_ffn.2.{kind}"],
            f"{mlp}.0.{kind}": [f"mlp.0.{kind}"],
            f"{mlp}.3.{kind}": [f"mlp.2.{kind}"],
        }
        for i in (1, 2):
            if option.norm == "post":
                pairs[f"{layer}.norm{i}.{kind}"] = [f"norm{i}.{kind}"]
            if option.residual == "post":
                pairs[f"{pool}.norm{i}.{kind}"] = [f"cross_norm{i}.{kind}"]
    if option.norm == "rezero":
        pairs[f"{layer}.rezero"] = ["beta"]
    if option.residual == "rezero":
        pairs[f"{pool}.rezero"] = ["cross_beta"]
    if option.null_sink is not None:
        pairs[f"{pool}.null_bias"] = ["null_bias"]
    return pairs


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def models(option: Option) -> tuple[Dense, CellTransformer]:
    """With equal weights, all of which bfloat16 holds exactly, and biases and norms that are not what they start as."""
    torch.manual_seed(0)
    dense, own = Dense(option), ours(option)
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
        held, pairs = dict(dense.named_parameters()), names(option)
        parameters = dict(own.named_parameters())
        assert parameters.keys() == pairs.keys()
        for name, parts in pairs.items():
            parameters[name].copy_(torch.cat([held[part] for part in parts]).view_as(parameters[name]))
    return dense, own


def losses_of_ours(model: CellTransformer, option: Option) -> tuple[Tensor, Tensor]:
    out = model(option.graph, SEEDS, PTR, torch.zeros_like(SEEDS), rows=option.rows, generator=generator())
    assert len(out.losses) == len(option.tied)
    error = (out.prediction[:, 0].to(model.encoder.cls.dtype) - PHENOTYPE.to(model.encoder.cls.dtype)).square().mean()
    return error, out.regularization


def gradients(losses: tuple[Tensor, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    total = losses[0] + losses[1]
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, grads, strict=True))


def assert_near(got: Tensor, want: Tensor, name: str, least: float) -> None:
    error = float((got - want).detach().abs().max()) / max(float(want.detach().abs().max()), least)
    assert error <= RTOL, f"{name}: relative error {error:.1e}"


SIGMOID = {"loss": "bce", "target": "binary", "link": "sigmoid"}
OPTIONS: dict[str, Option] = {
    "nine ties, dropout": Option(),
    "no dropout": Option(dropout=0.0),
    "sampled rows": Option(rows={name: (GRAPH.degree(name) > 0).nonzero()[2:7, 0] for name in GRAPHS}),
    "over valid": Option(loss={"over": "valid"}),
    "bce": Option(loss={"loss": "bce"}),
    "bce, binary, sigmoid": Option(loss=SIGMOID),
    "two hops": Option(graph=GRAPH.hops(None, 2)),
    "symmetrised": Option(graph=GRAPH.symmetrized(None)),
    "two hops, symmetrised": Option(graph=GRAPH.symmetrized(None).hops(None, 2)),
    "self-loops": Option(graph=GRAPH.with_self_loops(None)),
    "rewired": Option(graph=GRAPH.rewired(None, seed=3)),
    "permuted": Option(graph=GRAPH.permuted(None, seed=3)),
    # a mask of bool has each gene see itself once, where a relation's own self-loop is a second entry
    "hard masks": Option(masked=range(HEADS), dropout=0.0, graph=GRAPH.without_self_loops(None)),
    "hard masks, dropout": Option(masked=range(HEADS), graph=GRAPH.without_self_loops(None)),
    "tied and masked heads": Option(masked=(1, 4, 8), graph=GRAPH.without_self_loops(None)),
    "options a tie": Option(own={0: {"loss": "bce"}, 3: {"over": "valid"}, 5: SIGMOID}),
    "sum": Option(pool="sum"),
    "null sink": Option(null_sink=0.25),
    "ReZero read-out": Option(residual="rezero"),
    "ReZero encoder": Option(norm="rezero"),
    "all of the later form": Option(pool="sum", null_sink=-1.0, residual="rezero", graph=GRAPH.with_self_loops(None)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_equal_losses_and_gradients(name: str) -> None:
    option = OPTIONS[name]
    dense, own = models(option)
    dense, own = dense.double(), own.double()
    theirs, mine = dense(generator()), losses_of_ours(own, option)
    for kind, got, want in zip(("error", "graph term"), mine, theirs, strict=True):
        assert_near(got, want, kind, 1e-6)
    want_grads = gradients(theirs, dict(dense.named_parameters()))
    got_grads = gradients(mine, dict(own.named_parameters()))
    largest = max(float(grad.abs().max()) for grad in want_grads.values())
    for key, parts in names(option).items():
        want = torch.cat([want_grads[part] for part in parts]).view_as(got_grads[key])
        assert_near(got_grads[key], want, key, 1e-6 * largest)


CHAIN = 16  # roundings that follow one another between a weight and its gradient, in the matrices that are multiplied
PRECISIONS = {"float32": torch.float32, "bfloat16 autocast": torch.bfloat16}


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("name", ["nine ties, dropout", "options a tie", "all of the later form"])
def test_both_are_as_near_as_the_dtype_allows(name: str, dtype: torch.dtype) -> None:
    """Loss and gradient, in norm, of both sides with products in the dtype, beside the dense model's in float64."""
    option = OPTIONS[name]
    dense, own = models(option)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        results = [(sum(dense(generator())), dense), (sum(losses_of_ours(own, option)), own)]
    exact = copy.deepcopy(dense).double()
    total = sum(exact(generator()))
    want = torch.autograd.grad(total, list(exact.parameters()), allow_unused=True, materialize_grads=True)
    norm = torch.cat([grad.flatten() for grad in want]).norm()
    by_name = dict(zip(dict(exact.named_parameters()), want, strict=True))
    pairs: tuple[Mapping[str, Sequence[str]], ...] = ({key: [key] for key in by_name}, names(option))
    bound = CHAIN * torch.finfo(dtype).eps / 2
    for (loss, model), parts in zip(results, pairs, strict=True):
        assert float((loss - total).detach().abs()) <= bound * float(total.detach())
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        errors = [
            grad.double().flatten() - torch.cat([by_name[part].flatten() for part in parts[key]])
            for key, grad in zip(parameters, grads, strict=True)
        ]
        assert torch.cat(errors).norm() <= bound * norm
