from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cellattn import MultiGraph
from cellattn.nn import CellTransformer, PerturbationHead, perturbation

from ..conftest import exhaustive
from . import dense

N, DIM, TYPES = 11, 8, 3
SEEDS = torch.tensor([4, 7, 1, 0, 10, 4, 2, 7])
KINDS = torch.tensor([1, 2, 1, 1, 1, 0, 2, 1])
PTR = torch.tensor([0, 2, 2, 3, 6, 8])  # sets of 2, 0, 1, 3 and 2
POOLS: list[str | tuple[str, ...]] = [*perturbation.POOLS, ("sum", "pairwise"), ("mean", "hypersagnn", "pairwise")]


def head(**options: Any) -> PerturbationHead:
    torch.manual_seed(0)
    model = PerturbationHead(DIM, **{"num_types": TYPES, "dropout": 0.0, **options}).double()
    for name, parameter in model.named_parameters():
        if name.endswith("rezero"):
            torch.nn.init.constant_(parameter, 0.7)  # 0 at the start, where the attention has no say
    return model


def cell() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(1 + N, DIM, dtype=torch.float64, generator=generator)
    return h[0], h[1:]


def test_sums_and_means_are_what_they_are_called() -> None:
    """By their names, which `dense` asks a pool for."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(len(SEEDS), DIM, dtype=torch.float64, generator=generator)
    for kind, of in (("sum", torch.sum), ("mean", torch.mean)):
        pool = head(pool=kind).pools[0]
        want = torch.stack([of(part, 0) if len(part) else torch.zeros(DIM).double() for part in u.tensor_split(PTR[1:-1])])
        torch.testing.assert_close(pool(u, PTR), want, rtol=1e-14, atol=1e-14)
    mean, total = (head(pool=kind).pools[0] for kind in ("readout", "readout_sum"))
    torch.testing.assert_close(mean(u, PTR) * PTR.diff()[:, None], total(u, PTR), rtol=1e-13, atol=1e-13)
    assert total(u, PTR).abs().max() > 0.1


@pytest.mark.parametrize(("dim", "heads"), [(8, 4), (6, 1)])
def test_sizes_by_default(dim: int, heads: int) -> None:
    """As the docstrings say: what is saved of a model made by default has to fit one that is told."""

    def model(**options: Any) -> CellTransformer:
        torch.manual_seed(0)
        pools = ("hypersagnn", "readout", "pairwise")
        return CellTransformer(dim, 1, 2, num_genes=5, num_types=TYPES, pool=pools, dropout=0.0, **options)

    whole = MultiGraph.from_edge_index({}, 5)
    by_default, told = model(), model(pool_heads=heads, hidden_dim=2 * dim, ffn_dim=4 * dim, cross_heads=1, head_dim=dim // 2)
    for one in (by_default, told):
        torch.manual_seed(1)
        for parameter in one.parameters():
            torch.nn.init.normal_(parameter)
    sets = torch.tensor([0, 1, 2]), torch.tensor([0, 3]), torch.tensor([1, 1, 2])
    assert torch.equal(by_default(whole, *sets).prediction, told(whole, *sets).prediction)
    assert by_default.head.mlp[0].out_features == 2 * dim


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("num_heads", [1, 4])
def test_dense(pool: str | Sequence[str], num_heads: int) -> None:
    model = head(pool=pool, num_heads=num_heads, out_dim=2)
    inputs = [part.requires_grad_() for part in cell()]
    results = []
    for predict in (model, lambda *args: dense.predict(model, *args)):
        out = predict(*inputs, SEEDS, PTR, KINDS)
        results.append((out, torch.autograd.grad(out.pow(3).sum(), [*inputs, *model.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)  # float64, sums of about 1e3 terms


@pytest.mark.parametrize("pool", ["mean", "readout", "readout_sum"])
@pytest.mark.parametrize("residual", ["post", "rezero"])
@pytest.mark.parametrize("null_sink", [None, 0.0], ids=["", "sink"])
def test_published_heads(pool: str, residual: str, null_sink: float | None) -> None:
    """No types, and a ReLU; with a read-out no cross-attention either."""
    options: dict[str, Any] = {"readout_residual": residual, "readout_null_sink": null_sink, "activation": "relu"}
    model = head(pool=pool, num_types=None, num_heads=int(pool == "mean"), **options)
    inputs = [part.requires_grad_() for part in cell()]
    results = []
    for predict in (model, lambda *args: dense.predict(model, *args)):
        out = predict(*inputs, SEEDS, PTR, KINDS)
        grads = torch.autograd.grad(out.pow(3).sum(), [*inputs, *model.parameters()], allow_unused=True)
        results.append((out, [x for x in grads if x is not None]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    assert isinstance(model.mlp[1], torch.nn.ReLU)
    assert torch.equal(model(*inputs, SEEDS, PTR, KINDS + 100), results[0][0])  # types of any number


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_gradients_reach_every_parameter(pool: str | Sequence[str]) -> None:
    model = head(pool=pool)
    model(*cell(), SEEDS, PTR, KINDS).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name == "key.bias":
            continue  # one number added to all scores of a query: softmax does not see it
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("pool", ["hypersagnn", "readout", ("sum", "readout")], ids=str)
def test_bounded_sets(pool: str | Sequence[str]) -> None:
    expected = head(pool=pool)(*cell(), SEEDS, PTR, KINDS)
    torch.testing.assert_close(head(pool=pool, max_size=3)(*cell(), SEEDS, PTR, KINDS), expected)
    with pytest.raises(ValueError, match="max_size: expected at least 3, the entries of set 3, got 2"):
        head(pool=pool, max_size=2)(*cell(), SEEDS, PTR, KINDS)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("sets", [0, 1, 3])
def test_empty_sets(pool: str | Sequence[str], sets: int) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    model = head(pool=pool)
    h_cls, h = (part.requires_grad_() for part in cell())
    out = model(h_cls, h, nothing, torch.zeros(sets + 1, dtype=torch.int64), nothing)
    assert out.shape == (sets, 1)
    torch.testing.assert_close(out, out[:1].expand_as(out))  # the same wild type
    out.sum().backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_copies(pool: str | Sequence[str]) -> None:
    """A head can be copied (for averaged parameters) and pickled (for `torch.save` of a whole module)."""
    model = head(pool=pool)
    expected = model(*cell(), SEEDS, PTR, KINDS)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(*cell(), SEEDS, PTR, KINDS), expected)


def test_equal_gradients_on_several_threads() -> None:
    """Genes that stand in many sets add their gradients in one order, whatever the threads do."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = PerturbationHead(64, num_types=TYPES, pool=("sum", "pairwise"))
    h_cls, h = torch.randn(64), torch.randn(50, 64, requires_grad=True)
    seeds = torch.stack([torch.randperm(50)[:2] for _ in range(400)]).flatten()  # 800 * 64 values: enough for two threads
    batch = seeds, torch.arange(0, 801, 2), torch.ones_like(seeds)
    first, *others = (torch.autograd.grad(model.eval()(h_cls, h, *batch).sum(), h)[0] for _ in range(8))
    assert all(torch.equal(other, first) for other in others)


def test_present_perturbs_nothing() -> None:
    """A gene in the set as "present" changes the query by its pool alone, never the values."""
    model = head(pool="pairwise")
    h_cls, h = cell()
    one = model(h_cls, h, torch.tensor([4]), torch.tensor([0, 1]), torch.tensor([0]))  # a set of one has no pairs
    none = model(h_cls, h, torch.tensor([], dtype=torch.int64), torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64))
    torch.testing.assert_close(one, none)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_order_within_a_set_is_free(pool: str | Sequence[str]) -> None:
    model = head(pool=pool)
    order = torch.tensor([1, 0, 2, 5, 3, 4, 7, 6])
    torch.testing.assert_close(
        model(*cell(), SEEDS[order], PTR, KINDS[order]), model(*cell(), SEEDS, PTR, KINDS), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_batch_is_its_sets(pool: str | Sequence[str]) -> None:
    model = head(pool=pool)
    whole = model(*cell(), SEEDS, PTR, KINDS)
    for b, (begin, end) in enumerate(itertools.pairwise(PTR)):
        alone = model(*cell(), SEEDS[begin:end], torch.stack([begin * 0, end - begin]), KINDS[begin:end])
        torch.testing.assert_close(alone, whole[b : b + 1])


def test_types_matter() -> None:
    model = head()
    other = model(*cell(), SEEDS, PTR, (KINDS + 1) % TYPES)
    changed = (other != model(*cell(), SEEDS, PTR, KINDS)).squeeze(1)
    assert changed.tolist() == [True, False, True, True, True]  # all but the empty set


def test_pairwise_expresses_an_interaction() -> None:
    """What pairs add over single genes, f(a, b) - f(a) - f(b) + f(), is the product of their embeddings."""
    model = head(pool="pairwise")
    _, h = cell()
    u = model.phi(h[[4, 7]], torch.tensor([1, 2]))
    pooled = model.pools[0](u, torch.tensor([0, 2, 2]))
    torch.testing.assert_close(pooled, torch.stack([u[0] * u[1], torch.zeros_like(u[0])]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h_cls": torch.zeros(1, DIM)}, "h_cls: expected 1 dimension"),
        ({"h_cls": torch.zeros(DIM - 1)}, "h_cls: expected a last dimension of 8"),
        ({"h": torch.zeros(N, DIM - 1)}, "h: expected a last dimension of 8"),
        ({"h": torch.zeros(2, N, DIM)}, "h: expected 2 dimension"),
        ({"seeds": SEEDS.int()}, "seeds: expected dtype int64"),
        ({"seeds": SEEDS[None]}, "seeds: expected 1 dimension"),
        ({"seeds": SEEDS + 1}, r"seeds: position 4 holds 11, expected an index in \[0, 11\)"),
        ({"seeds": SEEDS - 1}, r"seeds: position 3 holds -1, expected an index in \[0, 11\)"),
        ({"seeds": torch.tensor([4, 4, 1, 0, 10, 4, 2, 7])}, "seeds: set 0 holds gene 4 twice"),
        ({"types": KINDS + 1}, r"types: position 1 holds 3, expected an index in \[0, 3\)"),
        ({"types": KINDS[:-1]}, "types: expected the length of seeds, 8, got 7"),
        ({"types": KINDS.float()}, "types: expected dtype int64"),
        ({"ptr": PTR[:-1]}, "ptr: expected to end with 8, the length of seeds, got 6"),
        ({"ptr": torch.tensor([0, 5, 3, 8])}, "ptr: expected to rise, got 3 after 5 at position 2"),
        ({"ptr": torch.tensor([], dtype=torch.int64)}, "ptr: expected at least one entry, got none"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_bad_input(changes: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"h_cls": torch.zeros(DIM), "h": torch.zeros(N, DIM), "seeds": SEEDS, "ptr": PTR, "types": KINDS}
    with pytest.raises(ValueError, match=message):
        head().float()(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool: unknown value 'max'"),
        ({"pool": ()}, "pool: expected at least one, got none"),
        ({"pool": ("sum", "sum")}, "pool: expected each once"),
        ({"num_types": 0}, "num_types: expected at least 1, got 0"),
        ({"num_heads": 3}, "num_heads: expected a divisor of dim, 8, got 3"),
        ({"out_dim": 0}, "out_dim: expected at least 1, got 0"),
        ({"hidden_dim": -2}, "hidden_dim: expected at least 1, got -2"),
        ({"dropout": 1.5}, "dropout: expected a probability"),
        ({"activation": "silu"}, "activation: unknown value 'silu'"),
        ({"pool": "readout", "readout_residual": "pre"}, "residual: unknown value 'pre'"),
    ],
    ids=str,
)
def test_bad_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head(**options)


BAD_PTRS = [[0, 5, 3], [0, 2, 9], [0, -4, 3], [1, 2, 3]]


@pytest.mark.parametrize(
    ("pool", "ptr"),
    [
        *(("mean", ptr) for ptr in BAD_PTRS),
        *((pool, BAD_PTRS[0]) for pool in ("sum", "pairwise", "hypersagnn", "readout")),
        *exhaustive(*((pool, ptr) for pool in ("sum", "pairwise", "hypersagnn", "readout") for ptr in BAD_PTRS[1:])),
    ],
    ids=str,
)
def test_bad_ptr_in_a_compiled_head(pool: str, ptr: list[int]) -> None:
    """Regression test: values cannot be checked while compiling, and a falling ptr reached a segment sum that reads by it."""
    torch._dynamo.reset()
    head = torch.compile(PerturbationHead(8, num_types=3, pool=pool), fullgraph=True, backend="aot_eager")
    genes, types = torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="ptr: expected to"):
        head(torch.randn(8), torch.randn(20, 8), genes, torch.tensor(ptr), types)
