"""A gene appended to a trained model, as a heterologous addition is: of type "added", and unknown in every graph.

Nothing about the other genes' losses changes but what a denominator over all tokens says it must, and predictions for old
mutants change through attention alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cellattn import MultiGraph
from cellattn.data import PERTURBATION_TYPES
from cellattn.nn import (
    CellEncoder,
    CellTransformer,
    Dango,
    GeneTokens,
    PairwiseInteraction,
    PerturbationHead,
    extend_genes,
)
from cellattn.nn.encoder import EncoderLayer

from . import dense

N, NEW, DIM, FEATURES = 15, 2, 8, 5
GRAPH = dense.random_graph(N, {"fusion": 45, "database": 12})
EXTENDED = GRAPH.extend(NEW)
DELETED, ADDED = PERTURBATION_TYPES.index("deleted"), PERTURBATION_TYPES.index("added")
SEEDS, PTR = torch.tensor([4, 7, 1, 0, 10, 4]), torch.tensor([0, 2, 2, 3, 6])
OLD_MUTANTS = (SEEDS, PTR, torch.full_like(SEEDS, DELETED))
TIES = [(0, 0, "fusion", 0.5), (0, 1, "database", 0.25)]
ROUNDING: dict[str, Any] = {
    "rtol": 1e-12,
    "atol": 1e-12,
}  # float64, sums over two more entries that are zeros, or in another order


def transformer(**options: Any) -> CellTransformer:
    defaults = {"num_types": len(PERTURBATION_TYPES), "ties": TIES, "dropout": 0.0}
    return CellTransformer(DIM, 1, 2, **{**defaults, **options})


def dango(**options: Any) -> Dango:
    model = Dango(DIM, relations=["fusion", "database"], **options)
    nn.init.constant_(model.sets.rezero, 0.7)
    return model


def pairwise(**options: Any) -> PairwiseInteraction:
    return PairwiseInteraction(DIM, num_types=len(PERTURBATION_TYPES), dropout=0.0, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {"transformer": transformer, "dango": dango, "pairwise": pairwise}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](**options).double()


def features(number: int) -> Tensor:
    """Of the same genes, as many as are asked for."""
    return torch.randn(40, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))[:number]


def mean_growth_of_denominators(model: CellTransformer, head: int, relation: str) -> Tensor:
    """Mean over the rows with an edge of log(sum over all tokens / sum over the old ones) in layer 0."""
    layer = model.encoder.layers[0]
    assert isinstance(layer, EncoderLayer)
    x = torch.cat([model.encoder.cls[None], model.tokens(N + NEW, features(N + NEW))])
    q, k, _ = layer.attention.project(layer.norm1(x))
    scores = q[head] @ k[head].T / q.shape[-1] ** 0.5
    growth = scores.logsumexp(1) - scores[:, : 1 + N].logsumexp(1)
    return growth[1 : 1 + N][GRAPH.degree(relation) > 0].mean()


@pytest.mark.parametrize(
    "options",
    [{"over": "valid"}, {"loss": "bce", "link": "sigmoid", "target": "binary"}],
    ids=["KL over valid", "BCE sigmoid"],
)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_losses_of_old_genes_do_not_change(norm: str, options: dict[str, Any]) -> None:
    """The genes themselves are not touched before the first attention, and no pair with a new gene is valid."""
    model = build("transformer", feature_dim=FEATURES, norm=norm, **options)
    before = model(GRAPH, *OLD_MUTANTS, features=features(N))
    after = model(EXTENDED, *OLD_MUTANTS, features=features(N + NEW))
    torch.testing.assert_close(after.losses, before.losses, **ROUNDING)


def test_losses_over_tokens_have_new_genes_in_their_denominators() -> None:
    """The attention map as it is: each row's KL grows by the logarithm of what new genes add to its denominator."""
    model = build("transformer", feature_dim=FEATURES, over="tokens")
    assert isinstance(model, CellTransformer)
    before = model(GRAPH, *OLD_MUTANTS, features=features(N)).losses
    after = model(EXTENDED, *OLD_MUTANTS, features=features(N + NEW)).losses
    for tie, name in zip(model.encoder.ties, before, strict=True):
        growth = mean_growth_of_denominators(model, tie.head, tie.relation)
        assert growth > 0.01
        torch.testing.assert_close(after[name] - before[name], growth)


def silent(key: nn.Linear | tuple[Tensor, Tensor], query: Tensor) -> Tensor:
    """A token whose key is -10^4 query, so that it gets no attention in any head, beside ordinary keys, from that query."""
    weight, bias = (key.weight, key.bias) if isinstance(key, nn.Linear) else key
    return torch.linalg.solve(weight, -1e4 * query - bias).detach()


@pytest.mark.parametrize("over", ["tokens", "valid"])
def test_old_genes_change_through_attention_alone(over: str) -> None:
    """Encoded beside new genes whose keys get no attention, they and their losses are what they were."""
    torch.manual_seed(0)
    encoder = CellEncoder(DIM, 1, 2, ties=TIES, norm="post", dropout=0.0, over=over).double()
    (layer,) = encoder.layers
    assert isinstance(layer, EncoderLayer)
    w, b = layer.attention.qkv.weight, layer.attention.qkv.bias
    with torch.no_grad():
        w[:DIM] = 0  # the same query for all
        b[:DIM] = torch.randn(DIM)
    x = torch.randn(N, DIM, dtype=torch.float64)
    no_key = silent((w[DIM : 2 * DIM], b[DIM : 2 * DIM]), b[:DIM])
    before = encoder(x, GRAPH)
    h_cls, h, losses = encoder(torch.cat([x, no_key.expand(NEW, -1)]), EXTENDED)
    torch.testing.assert_close((h_cls, h[:N], losses), before, **ROUNDING)
    _, heard, _ = encoder(torch.cat([x, -no_key.expand(NEW, -1)]), EXTENDED)
    assert ((heard[:N] - before[1]).abs() > 1e-3).any()


@pytest.mark.parametrize("pool", ["sum", "hypersagnn", "pairwise", "readout"])
def test_old_mutants_change_through_attention_alone(pool: str) -> None:
    torch.manual_seed(0)
    head = PerturbationHead(DIM, num_types=len(PERTURBATION_TYPES), pool=pool, num_heads=2, dropout=0.0).double()
    nn.init.zeros_(head.query.weight)  # the same query for all sets
    h_cls, h = torch.randn(DIM, dtype=torch.float64), torch.randn(N, DIM, dtype=torch.float64)
    no_key = silent(head.key, head.query.bias)
    before = head(h_cls, h, *OLD_MUTANTS)
    torch.testing.assert_close(head(h_cls, torch.cat([h, no_key[None]]), *OLD_MUTANTS), before, **ROUNDING)
    heard = head(h_cls, torch.cat([h, -no_key[None]]), *OLD_MUTANTS)
    assert ((heard - before).abs() > 1e-3).any()


@pytest.mark.parametrize("name", ["dango", "pairwise"])
def test_models_without_attention_over_genes_do_not_change_at_all(name: str) -> None:
    model = build(name, feature_dim=FEATURES)
    before = model(GRAPH, *OLD_MUTANTS, features=features(N))
    after = model(EXTENDED, *OLD_MUTANTS, features=features(N + NEW))
    torch.testing.assert_close(tuple(after), tuple(before), **ROUNDING)


@every_model
def test_mutants_with_an_added_gene(name: str) -> None:
    """Added alone, added beside a deletion, and each of two added genes: told apart by features, learned from like others."""
    model = build(name, feature_dim=FEATURES)
    x = features(N + NEW).requires_grad_()
    seeds, ptr = torch.tensor([N, 4, N, 4, N + 1]), torch.tensor([0, 1, 3, 5])
    out = model(EXTENDED, seeds, ptr, torch.tensor([ADDED, DELETED, ADDED, DELETED, ADDED]), features=x)
    assert len(set(out.prediction[:, 0].tolist())) == 3
    (dx,) = torch.autograd.grad(out.prediction.sum(), x)
    assert dx[N:].any(1).all()


@every_model
def test_the_same_weights_on_a_cell_of_another_size(name: str) -> None:
    model = build(name, feature_dim=FEATURES)
    parameters = dict(model.named_parameters())
    for number in (11, 40):
        graph = dense.random_graph(number, {"fusion": 60, "database": 20}, seed=number)
        out = model(graph, *OLD_MUTANTS, features=features(number))
        assert out.prediction.isfinite().all()
        (out.prediction.sum() + out.regularization).backward()
    assert dict(model.named_parameters()).keys() == parameters.keys()


@every_model
@pytest.mark.parametrize("feature_dim", [None, FEATURES], ids=["embedding", "both"])
def test_extended_tables(name: str, feature_dim: int | None) -> None:
    """The old cell gives the same to the bit, and the new one is what a model on the extended cell takes."""
    model = build(name, num_genes=N, feature_dim=feature_dim)
    old, new = (None, None) if feature_dim is None else (features(N), features(N + NEW))
    with pytest.raises(ValueError, match="graph: 17 genes, but num_genes is 15"):
        model(EXTENDED, *OLD_MUTANTS, features=new)
    before = model(GRAPH, *OLD_MUTANTS, features=old)
    extend_genes(model, NEW)
    torch.testing.assert_close(tuple(model(GRAPH, *OLD_MUTANTS, features=old)), tuple(before), rtol=0, atol=0)
    after = model(EXTENDED, *OLD_MUTANTS, features=new)
    if name != "transformer":  # whose genes attend to the new ones
        torch.testing.assert_close(tuple(after), tuple(before), **ROUNDING)
    larger = build(name, num_genes=N + NEW, feature_dim=feature_dim)
    larger.load_state_dict(model.state_dict())
    torch.testing.assert_close(tuple(larger(EXTENDED, *OLD_MUTANTS, features=new)), tuple(after), rtol=0, atol=0)


@pytest.mark.parametrize("node_type", ["gene", "reaction"])
def test_extended_tables_of_several_types(node_type: str) -> None:
    """Every token that was there keeps its row, those that move up too."""
    sizes, edges = {"gene": 5, "reaction": 3}, {"catalyses": torch.tensor([[0, 1, 3], [5, 6, 5]])}
    graph = MultiGraph.from_edge_index(edges, 8, node_types=sizes, joins={"catalyses": ("gene", "reaction")})
    model = transformer(num_genes=8, ties=[(0, 0, "catalyses", 0.5)])
    table = model.tokens.embedding
    assert table is not None
    at = graph.node_types[node_type].stop
    extend_genes(model, NEW, at=at)
    larger, extended = model.tokens.embedding, graph.extend(NEW, node_type=node_type)
    assert larger is not None
    for kind, tokens in graph.node_types.items():
        moved = extended.node_types[kind].start
        assert torch.equal(larger.weight[moved : moved + len(tokens)], table.weight[tokens.start : tokens.stop])
    torch.testing.assert_close(larger.weight[at : at + NEW], table.weight.mean(0).expand(NEW, -1))
    with pytest.raises(ValueError, match="at: expected at most 10, the rows of the table, got 11"):
        extend_genes(model, 1, at=11)


def test_training_goes_on_with_another_optimizer() -> None:
    """The state of the old rows can be carried over; the old optimizer holds a table that is no longer the model's."""
    model = build("pairwise", num_genes=N)
    assert isinstance(model, PairwiseInteraction)
    table = model.tokens.embedding
    assert table is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(GRAPH, *OLD_MUTANTS).prediction.square().sum().backward()
    optimizer.step()
    extend_genes(model, NEW)
    larger = model.tokens.embedding
    assert larger is not None
    assert larger.weight is not table.weight
    assert larger.weight.requires_grad
    torch.testing.assert_close(larger.weight[N:], table.weight.mean(0).expand(NEW, -1))

    fresh = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = optimizer.state[table.weight]
    fresh.state[larger.weight] = {
        key: torch.cat([value, value.new_zeros(NEW, DIM)]) if value.ndim else value for key, value in state.items()
    }
    before = larger.weight.detach().clone()
    added = torch.tensor([N, 4])
    model(EXTENDED, added, torch.tensor([0, 2]), torch.tensor([ADDED, DELETED])).prediction.sum().backward()
    fresh.step()
    assert (larger.weight[N] != before[N]).all()


def test_a_new_gene_may_start_as_another() -> None:
    """By its row (`init`), which then goes its own way, or by name (`gene_ids`), sharing the old gene's for good."""
    homologues = torch.tensor([4, 9])
    torch.manual_seed(0)
    shared, own = (build("pairwise", num_genes=N) for _ in range(2))
    assert isinstance(own, PairwiseInteraction)
    table = own.tokens.embedding
    assert table is not None
    own.tokens.extend(NEW, init=table.weight[homologues])
    batch = torch.tensor([N, N + 1]), torch.tensor([0, 1, 2]), torch.full((2,), ADDED)
    named = shared(EXTENDED, *batch, gene_ids=torch.cat([torch.arange(N), homologues]))
    torch.testing.assert_close(own(EXTENDED, *batch).prediction, named.prediction, rtol=0, atol=0)


def test_extending_by_features_alone() -> None:
    tokens = GeneTokens(DIM, feature_dim=FEATURES)
    tokens.extend(NEW)
    assert tokens.embedding is None
    assert tokens(N + NEW, features(N + NEW).float()).shape == (N + NEW, DIM)


@pytest.mark.parametrize(
    ("options", "num_new", "init", "error", "message"),
    [
        ({"num_genes": N}, -1, None, ValueError, "num_new: expected at least 0, got -1"),
        ({"num_genes": N}, 1.0, None, TypeError, "num_new: expected an int, got float 1.0"),
        ({"num_genes": N}, 2, torch.zeros(1, DIM), ValueError, "init: expected 2 rows, one a new gene, got 1"),
        ({"num_genes": N}, 2, torch.zeros(2, DIM - 1), ValueError, "init: expected a last dimension of 8"),
        ({"num_genes": N}, 2, torch.zeros(2, DIM).double(), ValueError, "init: expected the dtype of module"),
        ({"feature_dim": FEATURES}, 2, torch.zeros(2, DIM), ValueError, "init: the model has no embeddings"),
    ],
    ids=["negative", "float", "rows", "width", "dtype", "no table"],
)
def test_bad_extension(
    options: dict[str, int], num_new: Any, init: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GeneTokens(DIM, **options).extend(num_new, init=init)


def test_the_graph_knows_nothing_of_new_genes() -> None:
    assert EXTENDED.num_nodes == N + NEW
    for relation in GRAPH.relations:
        assert not EXTENDED.known(relation)[N:].any()
        assert torch.equal(EXTENDED.edge_index(relation), GRAPH.edge_index(relation))
    assert isinstance(EXTENDED, MultiGraph)
