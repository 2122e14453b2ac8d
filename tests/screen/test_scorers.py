"""Scores of sets are what the model predicts for them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from cellattn import MultiGraph
from cellattn.nn import CellTransformer, Dango, PairwiseInteraction, WildtypeDifference, screening
from cellattn.nn.perturbation import POOLS
from cellattn.screen import make_scorer

# A screening that disagrees with its model gives way to calls of the model, whose scores are right.
pytestmark = pytest.mark.filterwarnings("error:model.*called on batches of sets instead")

N, DIM, NUM_TYPES = 37, 12, 4


def random_graph() -> MultiGraph:
    g = torch.Generator().manual_seed(3)
    return MultiGraph.from_edge_index({name: torch.randint(N, (2, 90), generator=g) for name in ("a", "b")}, N)


GRAPH = random_graph()


class Additive(nn.Module):
    """A user's own: without a graph, a tensor [B] of which comes back."""

    num_genes, num_types = N, NUM_TYPES

    def __init__(self) -> None:
        super().__init__()
        self.effect = nn.Parameter(torch.randn(NUM_TYPES, N))

    def forward(self, seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
        return torch.segment_reduce(self.effect[types, seeds], "sum", offsets=ptr)


def transformer(pool: Any = "sum", **options: Any) -> CellTransformer:
    return CellTransformer(DIM, 1, 3, num_genes=N, num_types=NUM_TYPES, pool=pool, out_dim=2, **options)


def wildtype(conv: str, mode: str) -> WildtypeDifference:
    return WildtypeDifference(
        DIM, 2, relations=GRAPH.relations, num_genes=N, num_types=NUM_TYPES, conv=conv, mode=mode, out_dim=2
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"transformer {pool}": partial(transformer, pool) for pool in POOLS},
    "transformer sum, 3 cross heads": lambda: transformer(cross_heads=3),
    "transformer sum, no cross heads": lambda: transformer(cross_heads=0),
    "transformer readout, no cross heads": lambda: transformer("readout", cross_heads=0, pool_heads=3),
    **{
        f"transformer {pool} {residual} {null_sink}": partial(
            transformer, pool, cross_heads=0, pool_heads=3, readout_residual=residual, readout_null_sink=null_sink
        )
        for pool, residual, null_sink in (("readout", "rezero", None), ("readout_sum", "post", 0.3))
    },
    "published transformer": lambda: CellTransformer(
        DIM, 1, 3, num_genes=N, num_types=None, out_dim=2, norm="post", pool="readout_sum", cross_heads=0, pool_heads=3,
        readout_residual="rezero", readout_null_sink=-0.4, activation="relu", hidden_dim=DIM,
    ),
    "transformer without types": lambda: CellTransformer(DIM, 1, 3, num_genes=N, num_types=None, out_dim=2, norm="rezero"),
    "transformer sum and mean": lambda: transformer(("sum", "mean")),
    "transformer mean and pairwise": lambda: transformer(("mean", "pairwise")),
    "pairwise interaction": lambda: PairwiseInteraction(DIM, num_genes=N, num_types=NUM_TYPES, out_dim=2),
    "dango": lambda: Dango(DIM, relations=GRAPH.relations, num_genes=N, out_dim=2),
    **{f"wildtype {conv}": partial(wildtype, conv, "delta") for conv in ("sage", "gin", "gat")},
    "wildtype lazy": lambda: wildtype("sage", "lazy"),
    "wildtype khop": lambda: wildtype("sage", "khop"),
}  # fmt: skip


def make(name: str) -> nn.Module:
    """A model whose predictions differ about as much as they are large, as a trained one's."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "rezero" in key:
                parameter.fill_(0.5)  # at its first value the others of a set are not seen
            elif parameter.ndim > 1:
                parameter.mul_(2)
    return model


def sets_of(k: int, number: int = 300) -> tuple[Tensor, Tensor]:
    """Sets in the order of their ranks, and types of every gene."""
    genes = torch.tensor(list(itertools.combinations(range(12 if k > 2 else N), k))).flip(0)[:number].flip(1)
    return genes, torch.randint(NUM_TYPES, genes.shape, generator=torch.Generator().manual_seed(k))


def called(model: nn.Module, genes: Tensor, types: Tensor, phenotype: int) -> Tensor:
    """What the model predicts of the sets, as it would be asked without a screen."""
    ptr = torch.arange(len(genes) + 1) * genes.shape[1]
    with torch.no_grad():
        return model.eval()(GRAPH, genes.flatten(), ptr, types.flatten()).prediction[:, phenotype]


def assert_scores(got: Tensor, want: Tensor, share: float) -> None:
    """Equal to a share of how far the predictions lie apart, and to a few roundings of the predictions themselves."""
    spread = float(want.max() - want.min())
    assert spread > 0
    assert got.shape == want.shape
    error = float((got.double() - want.double()).abs().max())
    rounding = 4 * torch.finfo(got.dtype).eps * float(want.abs().max())
    assert error <= share * spread + rounding, f"{error / spread:.1e} of the spread"


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_model(name: str, dtype: torch.dtype, share: float) -> None:
    """Sets of one to four genes, all types among them."""
    model = make(name)
    scorer = make_scorer(model, GRAPH, phenotype=1, dtype=dtype)
    assert scorer.num_genes == N
    sets = [sets_of(k) for k in (1, 2, 3, 4)]
    want = torch.cat([called(copy.deepcopy(model).double(), *part, 1) for part in sets])
    assert_scores(torch.cat([scorer.score(*part) for part in sets]), want, share)


@pytest.mark.parametrize("name", ["transformer sum", "transformer readout, no cross heads", "pairwise interaction", "dango"])
def test_layout_of_sets_is_free(name: str) -> None:
    genes, types = sets_of(3)
    scorer = make_scorer(make(name), GRAPH)
    by_column = scorer.score(genes.T.contiguous().T, types.T.contiguous().T)
    assert torch.equal(by_column, scorer.score(genes, types))


@pytest.mark.parametrize("name", MODELS)
def test_another_default_device_changes_nothing(name: str) -> None:
    """Sets stay where they are: on meta, what goes there by mistake is lost on any machine."""
    genes, types = sets_of(2)
    want = make_scorer(make(name), GRAPH).score(genes, types)
    model = make(name)
    with torch.device("meta"):
        assert torch.equal(make_scorer(model, GRAPH).score(genes, types), want)


def test_own_module() -> None:
    torch.manual_seed(0)
    model = Additive()
    genes, types = sets_of(3)
    got = make_scorer(model).score(genes, types)
    assert_scores(got, model.effect[types, genes].sum(1).detach(), 1e-6)


def test_types_default_to_deleted() -> None:
    scorer = make_scorer(Additive())
    genes, _ = sets_of(2)
    assert torch.equal(scorer.score(genes), scorer.score(genes, torch.ones_like(genes)))


def test_model_is_left_as_it_was() -> None:
    model = make("transformer sum").train()
    make_scorer(model, GRAPH, dtype=torch.float64).score(*sets_of(2))
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("size", [0, 1])
def test_small_calls(size: int) -> None:
    genes, types = sets_of(3)
    assert make_scorer(make("transformer sum"), GRAPH).score(genes[:size], types[:size]).shape == (size,)


@pytest.mark.parametrize(
    ("genes", "types", "message"),
    [
        ([[0, N]], None, "genes"),
        ([[0, -1]], None, "genes"),
        ([[3, 3]], None, "distinct"),
        ([[0, 1]], [[0, NUM_TYPES]], "types"),
        ([[0, 1]], [[0]], "types"),
        ([0, 1], None, "genes"),
        ([[0.0, 1.0]], None, "genes"),
    ],
)
def test_bad_sets(genes: Any, types: Any, message: str) -> None:
    scorer = make_scorer(make("transformer sum"), GRAPH)
    with pytest.raises((ValueError, TypeError), match=message):
        scorer.score(torch.tensor(genes), None if types is None else torch.tensor(types))


def test_bad_arguments() -> None:
    model = make("transformer sum")
    with pytest.raises(TypeError, match="model"):
        make_scorer("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="graph"):
        make_scorer(model, "graph")  # type: ignore[arg-type]
    for name in ("transformer sum", "pairwise interaction", "dango", "wildtype sage"):  # each reads its last layer itself
        with pytest.raises(ValueError, match=r"phenotype: expected .*2.* got 2"):
            make_scorer(make(name), GRAPH, phenotype=2)
    with pytest.raises(ValueError, match="dtype"):
        make_scorer(model, GRAPH, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_threads"):
        make_scorer(model, GRAPH, num_threads=0)


def test_weights_that_underflow_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Genes that look at different ones so sharply that the product of their weights is 0 in float32."""
    model = make("transformer sum")
    assert isinstance(model, CellTransformer)
    with torch.no_grad():
        model.head.query.weight.mul_(100)
    genes, types = sets_of(3)
    again: list[int] = []
    attended = screening.HeadScreening._attended

    def watch(self: screening.HeadScreening, entries: Tensor) -> Tensor:
        again.append(len(entries))
        return attended(self, entries)

    monkeypatch.setattr(screening.HeadScreening, "_attended", watch)
    # scores in the hundreds have few digits after the point
    for dtype, share in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        got = make_scorer(model, GRAPH, phenotype=1, dtype=dtype).score(genes, types)
        assert_scores(got, called(copy.deepcopy(model).double(), genes, types, 1), share)
    assert again


@pytest.mark.parametrize("name", ["transformer sum", "transformer readout", "pairwise interaction", "dango"])
def test_more_genes_than_the_extension_takes(name: str) -> None:
    model = make(name)
    genes = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i))[:6] for i in range(30)])
    types = torch.ones_like(genes)
    got = make_scorer(model, GRAPH, phenotype=1).score(genes, types)
    assert_scores(got, called(copy.deepcopy(model).double(), genes, types, 1), 1e-6)


def test_tables_start_over_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("transformer sum")
    genes, types = sets_of(2)
    want = make_scorer(model, GRAPH).score(genes, types)
    monkeypatch.setattr(screening, "available_memory", lambda device: 0)
    monkeypatch.setattr(screening, "BATCH", 16)
    assert_scores(make_scorer(model, GRAPH).score(genes, types), want, 1e-6)


@pytest.mark.parametrize("pool", ["readout", "readout_sum"])
def test_norms_of_a_readout_have_each_their_own_eps(pool: str) -> None:
    model = transformer(pool, cross_heads=0, pool_heads=3)
    norms = [module for module in model.head.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2
    for norm, eps in zip(norms, (0.1, 2.0), strict=True):
        norm.eps = eps
    for k in (2, 3):
        genes, types = sets_of(k)
        got = make_scorer(model, GRAPH, phenotype=1).score(genes, types)
        assert_scores(got, called(copy.deepcopy(model).double(), genes, types, 1), 1e-6)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_sets_that_differ_in_their_first_gene(k: int) -> None:
    """Groups of them share what the others have in common; the next group has some of that, or all, or none."""
    others = list(itertools.combinations(range(32, 36), k - 1))
    numbers = itertools.cycle((32, 15, 16))  # a group of 15 is filled up with its last set
    genes = torch.tensor([[first, *rest] for rest, number in zip(others, numbers, strict=False) for first in range(number)])
    types = torch.zeros_like(genes)
    model = make("transformer sum")
    got = make_scorer(model, GRAPH, phenotype=1).score(genes, types)
    assert_scores(got, called(copy.deepcopy(model).double(), genes, types, 1), 1e-6)


def test_pairs_are_made_again_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "available_memory", lambda device: 0)
    genes, types = sets_of(3)
    model = make("pairwise interaction")
    got = make_scorer(model, GRAPH, phenotype=1, dtype=torch.float64).score(genes, types)
    assert_scores(got, called(copy.deepcopy(model).double(), genes, types, 1), 1e-12)


def test_bfloat16_products() -> None:
    model = make("transformer readout, no cross heads")
    genes, types = sets_of(3)
    want = called(copy.deepcopy(model).double(), genes, types, 1)
    scorer = make_scorer(model, GRAPH, phenotype=1, dtype=torch.bfloat16)
    assert scorer.dtype in (torch.float32, torch.bfloat16)
    forced = make_scorer(model, GRAPH, phenotype=1, dtype=torch.bfloat16, force=True)
    assert forced.dtype == torch.bfloat16
    assert_scores(forced.score(genes, types), want, 2**-5)  # a few roundings to 8 bits


class Adapted(nn.Module):
    """Around a layer whose weights are read through it, as wrappers of layers let theirs be."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "layer" else getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.layer(x)


class AdaptedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


class Exponential(PairwiseInteraction):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return out._replace(prediction=out.prediction.exp())


def adapted(layer: Any) -> nn.Module:
    made = AdaptedLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.load_state_dict(layer.state_dict())
    return made


def replace(name: str, path: str, change: Callable[[Any], nn.Module]) -> nn.Module:
    model = make(name)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, change(model.get_submodule(path)))
    return model


def hooked() -> nn.Module:
    model = make("pairwise interaction")
    model.register_forward_hook(lambda module, given, out: out._replace(prediction=out.prediction + 1))
    return model


ALTERED: dict[str, Callable[[], nn.Module]] = {
    "a layer of the head": partial(replace, "transformer sum", "head.mlp.0", adapted),
    "around a layer of the head": partial(replace, "transformer sum", "head.query", Adapted),
    "a layer of a readout": partial(replace, "transformer readout", "head.pools.0.readout.out", adapted),
    "another activation": partial(replace, "transformer sum", "head.mlp.1", lambda layer: nn.SiLU()),
    "a layer more": partial(
        replace, "transformer sum", "head.mlp.1", lambda layer: nn.Sequential(layer, nn.LayerNorm(2 * DIM))
    ),
    "the last layer of DANGO": partial(replace, "dango", "out", adapted),
    "around a layer of Hyper-SAGNN": partial(replace, "dango", "sets.out.0", Adapted),
    "single effects": partial(replace, "pairwise interaction", "single", adapted),
    "a subclass": lambda: Exponential(DIM, num_genes=N, num_types=NUM_TYPES, out_dim=2),
    "a hook": hooked,
}


@pytest.mark.parametrize("name", ALTERED)
def test_what_weights_do_not_say_is_scored_by_calls(name: str) -> None:
    model = ALTERED[name]()
    with pytest.warns(UserWarning, match="^model: .*called on batches of sets instead"):
        scorer = make_scorer(model, GRAPH, phenotype=1, dtype=torch.float64)
    genes, types = sets_of(2)
    assert_scores(scorer.score(genes, types), called(copy.deepcopy(model).double(), genes, types, 1), 1e-12)


def test_what_is_called_may_be_altered(recwarn: pytest.WarningsRecorder) -> None:
    """The cell's encoder is called, and so is what torch.compile was given."""
    model = replace("transformer sum", "encoder.layers.0.ffn.0", adapted)
    model.get_submodule("encoder").register_forward_hook(lambda module, given, out: None)
    genes, types = sets_of(2)
    want = called(copy.deepcopy(model).double(), genes, types, 1)
    compiled: Any = torch.compile(model, backend="eager")
    scorer = make_scorer(compiled, GRAPH, phenotype=1, dtype=torch.float64)
    assert_scores(scorer.score(genes, types), want, 1e-12)
    assert not [w for w in recwarn if "batches of sets" in str(w.message)]


HELD: dict[str, Callable[[nn.Linear], Any]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "the older spectral norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.parametrize("how", HELD)
@pytest.mark.parametrize("name", ["transformer sum", "transformer hypersagnn", "pairwise interaction", "dango", "wildtype gat"])
def test_weights_may_be_made_of_others(name: str, how: str) -> None:
    """As in training, where what was made last has a gradient's graph, which PyTorch does not copy."""
    model = make(name).double()
    for layer in [layer for layer in model.modules() if type(layer) is nn.Linear]:
        HELD[how](layer)
    genes, types = sets_of(2)
    model(GRAPH, genes.flatten(), torch.arange(len(genes) + 1) * 2, types.flatten())
    scorer = make_scorer(model, GRAPH, phenotype=1)
    assert_scores(scorer.score(genes, types), called(model, genes, types, 1), 1e-12)


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": AveragedModel,
    "data-parallel": nn.DataParallel,
    "an average of what was compiled": lambda model: AveragedModel(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("how", WRAPPED)
def test_what_pytorch_wraps_around_a_model_is_taken_off(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    genes, types = sets_of(2)
    want = make_scorer(make("transformer sum"), GRAPH).score(genes, types)
    wrapped = WRAPPED[how](make("transformer sum"))
    monkeypatch.setattr(CellTransformer, "forward", None)  # not called set by set
    assert torch.equal(make_scorer(wrapped, GRAPH).score(genes, types), want)


@pytest.mark.filterwarnings("default:model.*called on batches of sets instead")
@pytest.mark.parametrize("how", WRAPPED)
def test_hooks_on_what_is_wrapped_around_a_model(how: str) -> None:
    """They change what a call returns as the model's own do."""
    genes, types = sets_of(2)
    model = make("transformer sum")
    want = make_scorer(model, GRAPH).score(genes, types)
    wrapped = WRAPPED[how](model)
    wrapped.register_forward_hook(lambda module, given, out: out._replace(prediction=out.prediction + 1))
    if how == "compiled":
        with pytest.raises(ValueError, match=r"^model: expected its hooks on the model itself"):
            make_scorer(wrapped, GRAPH)
    else:
        with pytest.warns(UserWarning, match="a call is more than what its"):
            scorer = make_scorer(wrapped, GRAPH)
        assert_scores(scorer.score(genes, types), want.double() + 1, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_around_changes_nothing(name: str) -> None:
    genes, types = sets_of(3)
    want = make_scorer(make(name), GRAPH).score(genes, types)
    with torch.autocast("cpu", torch.bfloat16):
        scorer = make_scorer(make(name), GRAPH)
        assert torch.equal(scorer.score(genes, types), want)
    assert torch.equal(scorer.score(genes, types), want)


@pytest.mark.parametrize("made_in", ["model", "scorer", "first scores"])
@pytest.mark.parametrize("name", MODELS)
def test_inference_mode_comes_and_goes(name: str, made_in: str) -> None:
    """What is kept from one call to the next may be added to in either."""
    genes, types = sets_of(3)
    want = make_scorer(make(name), GRAPH).score(genes, types)
    with torch.inference_mode(made_in == "model"):
        model = make(name)
    with torch.inference_mode(made_in == "scorer"):
        scorer = make_scorer(model, GRAPH)
    with torch.inference_mode(made_in == "first scores"):
        scorer.score(genes[:40], types[:40])
    assert torch.equal(scorer.score(genes, types), want)
    with torch.inference_mode():
        assert torch.equal(scorer.score(genes, types), want)
