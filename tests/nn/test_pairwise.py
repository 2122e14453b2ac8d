from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cellattn.nn import CellOutput, PairwiseInteraction
from cellattn.ops.set_pairs import set_pairs

from . import dense, dense_sets

N, FEATURES = 15, 5
GRAPH = dense.random_graph(N, {"physical": 45})
SEEDS = torch.tensor([4, 7, 1, 0, 10, 4, 3, 2, 9, 14])
TYPES = torch.tensor([1, 2, 1, 1, 1, 2, 0, 1, 2, 1])
PTR = torch.tensor([0, 2, 2, 3, 6, 10])  # sets of 2, 0, 1, 3 and 4
BATCH = (SEEDS, PTR, TYPES)
SETS = {"mixed": [0, 2, 2, 3, 7, 10], "singles": [0, 1, 2, 3], "one": [0, 5], "empty": [0, 0, 0], "no sets": [0]}
INPUTS: dict[str, dict[str, Any]] = {
    "embedding": {},
    "features": {"num_genes": None, "feature_dim": FEATURES},
    "both": {"feature_dim": FEATURES},
}


def model(**options: Any) -> PairwiseInteraction:
    torch.manual_seed(0)
    made = PairwiseInteraction(8, **{"num_types": 3, "num_genes": N, "dropout": 0.0, **options}).double()
    nn.init.normal_(made.bias)
    return made


def features(number: int = N) -> Tensor:
    return torch.randn(number, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(prediction: Tensor, made: PairwiseInteraction) -> tuple[Tensor, ...]:
    return torch.autograd.grad(prediction.pow(3).sum(), list(made.parameters()))


@pytest.mark.parametrize("max_size", [None, 5, 7])
@pytest.mark.parametrize("ptr", SETS.values(), ids=SETS)
def test_pairs_are_all_combinations(ptr: list[int], max_size: int | None) -> None:
    pairs = set_pairs(torch.tensor(ptr), ptr[-1], max_size)
    ends = pairs.ptr.tolist()
    assert len(ends) == len(ptr) + 1
    assert ends[-1] == len(pairs.first) == len(pairs.second)
    for b, (begin, end) in enumerate(itertools.pairwise(ptr)):
        here = slice(ends[b], ends[b + 1])
        got = zip(pairs.first[here].tolist(), pairs.second[here].tolist(), strict=True)
        assert sorted(got) == list(itertools.combinations(range(begin, end), 2))
    assert not pairs.first[ends[-2] :].any()
    assert not pairs.second[ends[-2] :].any()


@pytest.mark.parametrize(("size", "num_pairs"), [(1, 0), (2, 10), (3, 30)])
def test_no_slot_is_wasted_on_sets_of_the_largest_size(size: int, num_pairs: int) -> None:
    pairs = set_pairs(size * torch.arange(11), 10 * size, size)
    assert len(pairs.first) == int(pairs.ptr[-2]) == num_pairs


def test_a_bound_leaves_nothing_to_wait_for() -> None:
    """No value of ptr is read on the host: on "meta" there is none. Without a bound the number of pairs has to be known."""
    ptr = torch.empty(6, dtype=torch.int64, device="meta")
    assert set_pairs(ptr, 10, 3).first.shape == (10,)
    with pytest.raises(ValueError, match="max_size: expected a number for tensors on meta"):
        set_pairs(ptr, 10)


@pytest.mark.parametrize("max_size", [None, 4, 6])
@pytest.mark.parametrize("inputs", INPUTS)
def test_dense(inputs: str, max_size: int | None) -> None:
    made = model(max_size=max_size, out_dim=2, **INPUTS[inputs])
    x = None if inputs == "embedding" else features()
    out, expected = made(GRAPH, *BATCH, features=x), dense_sets.pairwise(made, GRAPH, *BATCH, x)
    assert isinstance(out, CellOutput)
    torch.testing.assert_close(out.prediction, expected, rtol=1e-9, atol=1e-11)  # float64, sums of a few dozen terms
    torch.testing.assert_close(gradients(out.prediction, made), gradients(expected, made), rtol=1e-9, atol=1e-11)
    assert out.losses == {}
    assert out.regularization == 0


def test_gradcheck() -> None:
    made = model(num_genes=None, feature_dim=FEATURES)
    assert torch.autograd.gradcheck(lambda x: made(GRAPH, *BATCH, features=x).prediction, features().requires_grad_())


def test_gradients_reach_every_parameter() -> None:
    made = model(feature_dim=FEATURES)
    made(GRAPH, *BATCH, features=features()).prediction.square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_pair_is_its_single_effects_and_one_interaction() -> None:
    """f(a, b) - f(a) - f(b) + f() is the pair's term, the same for (b, a); f(a, b, c) adds those of three pairs."""
    made = model()
    sets = [[], [4], [7], [9], [4, 7], [7, 4], [4, 9], [7, 9], [9, 4, 7]]
    seeds = torch.tensor([gene for genes in sets for gene in genes])
    ptr = torch.tensor([0, *itertools.accumulate(map(len, sets))])
    f = dict(zip(map(tuple, sets), made(GRAPH, seeds, ptr, torch.ones_like(seeds)).prediction[:, 0], strict=True))

    def interaction(a: int, b: int) -> Tensor:
        return f[a, b] - f[a,] - f[b,] + f[()]

    assert float(interaction(4, 7).detach().abs()) > 1e-3
    torch.testing.assert_close(interaction(4, 7), interaction(7, 4))
    three = f[()] + sum(f[g,] - f[()] for g in (4, 7, 9)) + interaction(4, 7) + interaction(4, 9) + interaction(7, 9)
    torch.testing.assert_close(f[9, 4, 7], three)


def test_relabelled_genes() -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    made = model(feature_dim=FEATURES)
    out = made(GRAPH, *BATCH, features=features())
    same = made(GRAPH.subgraph(order), order.argsort()[SEEDS], PTR, TYPES, features=features()[order], gene_ids=order)
    torch.testing.assert_close(same.prediction, out.prediction)


def test_order_within_a_set_is_free() -> None:
    order = torch.tensor([1, 0, 2, 5, 3, 4, 9, 7, 6, 8])
    made = model()
    permuted = made(GRAPH, SEEDS[order], PTR, TYPES[order]).prediction
    torch.testing.assert_close(permuted, made(GRAPH, *BATCH).prediction, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_size", [None, 3])
@pytest.mark.parametrize("sets", [0, 1, 3])
def test_empty_sets(sets: int, max_size: int | None) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    made = model(out_dim=2, max_size=max_size)
    out = made(GRAPH, nothing, torch.zeros(sets + 1, dtype=torch.int64), nothing)
    torch.testing.assert_close(out.prediction, made.bias.expand(sets, 2))
    out.prediction.sum().backward()


def test_one_gene_with_a_bound() -> None:
    """More slots for pairs than entries."""
    one = torch.tensor([3])
    torch.testing.assert_close(
        model(max_size=6)(GRAPH, one, torch.tensor([0, 1]), one * 0 + 1), model()(GRAPH, one, torch.tensor([0, 1]), one * 0 + 1)
    )


def test_state_dict_round_trip() -> None:
    made, file = model(), io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    other = model(max_size=4)  # no parameter depends on it
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(GRAPH, *BATCH).prediction, made(GRAPH, *BATCH).prediction, rtol=1e-12, atol=1e-12)


def test_equal_from_run_to_run_on_several_threads() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    made = PairwiseInteraction(64, num_types=3, num_genes=50).eval()
    seeds = torch.stack([torch.randperm(50)[:3] for _ in range(300)]).flatten()
    batch = dense.random_graph(50, {}), seeds, torch.arange(0, 901, 3), torch.ones_like(seeds)
    first, *others = (gradients(made(*batch).prediction, made) for _ in range(10))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_autocast() -> None:
    made = model().float()
    expected = made(GRAPH, *BATCH).prediction
    with torch.autocast("cpu", torch.bfloat16):
        out = made(GRAPH, *BATCH).prediction
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0.05)  # 8 bits of mantissa, on values of about 1
    out.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in made.parameters())


def test_compile_training_step() -> None:
    """With a bound on the sets, one graph, forward and backward, with batches of other sizes after the first."""
    torch.compiler.reset()
    made = model(max_size=4)
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (BATCH, (SEEDS[:3], torch.tensor([0, 2, 3]), TYPES[:3])):
        results = []
        for run in (made, compiled):
            out = run(GRAPH, *batch).prediction
            results.append((out, gradients(out, made)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)  # float64, other order of sums


def fit(made: PairwiseInteraction, graph: Any, batch: tuple[Tensor, ...], y: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (made(graph, *batch).prediction[:, 0] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_learns() -> None:
    """Phenotypes of pairs planted as products of single effects."""
    torch.manual_seed(0)
    effect = torch.randn(N)
    pairs = torch.combinations(torch.arange(N))
    batch = pairs.flatten(), torch.arange(0, 2 * len(pairs) + 1, 2), torch.ones(2 * len(pairs), dtype=torch.int64)
    losses = fit(model().float(), GRAPH, batch, effect[pairs].prod(1), 80)
    assert losses[-1] < 0.1 * losses[0]


def test_learns_on_real_tables(labelled_cell: Any) -> None:
    torch.manual_seed(0)
    batch = labelled_cell.train.__getitems__(list(range(512)))
    y = (batch.y - batch.y.mean()) / batch.y.std()
    made = PairwiseInteraction(32, num_types=5, num_genes=labelled_cell.graph.num_nodes, max_size=2)
    losses = fit(made, labelled_cell.graph, (batch.seeds, batch.ptr, batch.types), y, 40)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_genes": None}, "num_genes, feature_dim: expected at least one"),
        ({"num_types": 0}, "num_types: expected at least 1, got 0"),
        ({"out_dim": 0}, "out_dim: expected at least 1, got 0"),
        ({"hidden_dim": -2}, "hidden_dim: expected at least 1, got -2"),
        ({"dropout": 1.5}, "dropout: expected a probability"),
        ({"max_size": 0}, "max_size: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"graph": {}}, TypeError, "graph: expected a MultiGraph, got dict"),
        ({"graph": GRAPH.extend(1)}, ValueError, "graph: 16 genes, but num_genes is 15"),
        ({"features": features()}, ValueError, "features: the model has feature_dim=None"),
        ({"seeds": SEEDS.index_fill(0, torch.tensor([0, 1]), 4)}, ValueError, "seeds: set 0 holds gene 4 twice"),
        ({"seeds": SEEDS + 10}, ValueError, "seeds: position 1 holds 17"),
        ({"types": TYPES + 1}, ValueError, "types: position 1 holds 3"),
        ({"ptr": PTR[:-1]}, ValueError, "ptr: expected to end with 10"),
        ({"ptr": torch.tensor([0, 5, 10])}, ValueError, "max_size: expected at least 5, the entries of set 0, got 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(max_size=4)(**{"graph": GRAPH, "seeds": SEEDS, "ptr": PTR, "types": TYPES, **arguments})
