from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellattn.nn import PerturbedGeneReadout

from . import dense

N, DIM = 11, 8
SEEDS = torch.tensor([4, 7, 1, 0, 10, 4, 2, 7])
PTR = torch.tensor([0, 2, 2, 3, 6, 8])  # sets of 2, 0, 1, 3 and 2


FORMS: dict[str, dict[str, Any]] = {
    "post": {},
    "rezero": {"residual": "rezero"},
    "sink": {"null_sink": -0.4},
    "rezero and sink": {"residual": "rezero", "null_sink": 0.0},
}


def readout(**options: Any) -> PerturbedGeneReadout:
    torch.manual_seed(0)
    module = PerturbedGeneReadout(DIM, **{"num_heads": 2, **options}).double()
    with torch.no_grad():
        module.qkv.bias.normal_()  # keys and values of a sink, 0 at the start
        if module.rezero is not None:
            module.rezero.copy_(torch.tensor([0.7, -0.3]))
    return module


def genes() -> Tensor:
    return torch.randn(N, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def of_all_genes(module: PerturbedGeneReadout, h: Tensor) -> Tensor:
    """Every gene attends to every set, [B, N, dim], and the rows of the sets' genes are read."""
    sets = [SEEDS[begin:end] for begin, end in itertools.pairwise(PTR.tolist())]
    every = torch.stack([dense.readout(module, h, h[members]) for members in sets])
    return torch.cat([rows[members] for rows, members in zip(every, sets, strict=True)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_size", [None, 3, 5])
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_rows_of_the_readout_of_all_genes(num_heads: int, max_size: int | None, form: str) -> None:
    module = readout(num_heads=num_heads, max_size=max_size, **FORMS[form])
    h = genes().requires_grad_()
    results = []
    for out in (module(F.embedding(SEEDS, h), PTR), of_all_genes(module, h)):
        results.append((out, torch.autograd.grad(out.pow(3).sum(), [h, *module.parameters()])))
    assert results[0][0].shape == (len(SEEDS), DIM)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)  # float64, sums of a few dozen terms


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_size", [None, 4])
def test_genes_that_attend_to_every_set(max_size: int | None, form: str) -> None:
    """[B, N, dim], all of the read-out, beside an empty set too."""
    module, h = readout(max_size=max_size, **FORMS[form]), genes().requires_grad_()
    sets = [SEEDS[begin:end] for begin, end in itertools.pairwise(PTR.tolist())]
    want = torch.stack([dense.readout(module, h, h[members]) for members in sets])
    got = module(F.embedding(SEEDS, h), PTR, genes=h)
    inputs = [h, *module.parameters()]
    results = [(out, torch.autograd.grad(out.pow(3).sum(), inputs)) for out in (got, want)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    some = torch.tensor([3, 0, 3])
    torch.testing.assert_close(module(h[SEEDS], PTR, genes=h[some]), got[:, some], rtol=1e-12, atol=1e-12)
    own = torch.arange(len(PTR) - 1).repeat_interleave(PTR.diff())
    torch.testing.assert_close(module(h[SEEDS], PTR), got[own, SEEDS], rtol=1e-12, atol=1e-12)


def test_without_a_sink_a_gene_alone_does_not_look() -> None:
    """The weight of the only entry is 1: queries and keys learn nothing from sets of one, and do with a sink."""
    for null_sink, learns in ((None, False), (0.0, True)):
        module = readout(null_sink=null_sink)
        module(genes()[:3], torch.arange(4)).pow(3).sum().backward()
        assert module.qkv.weight.grad is not None
        assert bool(module.qkv.weight.grad[: 2 * DIM].abs().max() > 1e-12) == learns


def test_rezero_starts_as_nothing() -> None:
    module = PerturbedGeneReadout(DIM, residual="rezero", null_sink=0.0).double()
    assert torch.equal(module(genes()[SEEDS], PTR), genes()[SEEDS])


def test_a_sink_that_was_saved_without_dimensions_loads() -> None:
    module = readout(null_sink=-0.4)
    model = nn.ModuleDict({"readout": module})
    state = model.state_dict()
    state["readout.null_bias"] = torch.tensor(0.25, dtype=torch.float64)
    model.load_state_dict(state)
    assert module.null_bias is not None
    assert module.null_bias.tolist() == [0.25]
    assert state["readout.null_bias"].ndim == 0  # the caller's stays as it is


@pytest.mark.parametrize("form", ["post", "rezero and sink"])
def test_gradcheck(form: str) -> None:
    module = readout(**FORMS[form])
    assert torch.autograd.gradcheck(lambda x: module(x, PTR), genes()[SEEDS].requires_grad_())


def test_sets_do_not_mix() -> None:
    module, x = readout(), genes()[SEEDS]
    changed = x.clone()
    changed[3:6] += 1.0  # the fourth set
    before, after = module(x, PTR), module(changed, PTR)
    same = torch.ones(len(x), dtype=torch.bool).index_fill(0, torch.arange(3, 6), False)
    torch.testing.assert_close(after[same], before[same], rtol=0, atol=0)
    assert (after[3:6] != before[3:6]).all()


def test_order_within_a_set_is_free() -> None:
    order = torch.tensor([1, 0, 2, 5, 3, 4, 7, 6])
    module, x = readout(), genes()[SEEDS]
    torch.testing.assert_close(module(x[order], PTR), module(x, PTR)[order], rtol=1e-12, atol=1e-12)


def test_a_gene_alone_attends_to_itself() -> None:
    """The softmax over one entry is 1, whatever the query: the attended value is the gene's own."""
    module, x = readout(), genes()[:1]
    y = module.norm1(x + module.out(module.qkv(x)[:, 2 * DIM :]))
    torch.testing.assert_close(module(x, torch.tensor([0, 1])), module.norm2(y + module.ffn(y)))


@pytest.mark.parametrize("max_size", [None, 3])
@pytest.mark.parametrize("sets", [0, 1, 3])
def test_empty_sets(sets: int, max_size: int | None) -> None:
    x = torch.empty(0, DIM, dtype=torch.float64, requires_grad=True)
    module, ptr = readout(max_size=max_size, null_sink=0.0), torch.zeros(sets + 1, dtype=torch.int64)
    out = module(x, ptr)
    assert out.shape == (0, DIM)
    out.sum().backward()
    h = genes().requires_grad_()
    of_all = module(x, ptr, genes=h)
    assert of_all.shape == (sets, N, DIM)
    of_all.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("x", "ptr", "message"),
    [
        (torch.zeros(3, 7), [0, 3], "x: expected a last dimension of 8"),
        (torch.zeros(8), [0, 1], "x: expected 2 dimension"),
        (torch.zeros(3, 8), [0, 2], "ptr: expected to end with 3, the length of x, got 2"),
        (torch.zeros(3, 8), [0, 2, 1, 3], "ptr: expected to rise, got 1 after 2 at position 2"),
        (torch.zeros(5, 8), [0, 1, 5], "max_size: expected at least 4, the entries of set 1, got 3"),
    ],
    ids=["width", "dimensions", "end", "falls", "size"],
)
def test_bad_input(x: Tensor, ptr: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerturbedGeneReadout(DIM, max_size=3)(x, torch.tensor(ptr))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of dim, 8, got 3"),
        ({"ffn_dim": 0}, "ffn_dim: expected at least 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"max_size": 0}, "max_size: expected at least 1, got 0"),
        ({"residual": "pre"}, "residual: unknown value 'pre'"),
        ({"null_sink": float("nan")}, "null_sink: expected a finite number"),
        ({"null_sink": True}, "null_sink: expected a finite number, got bool True"),
    ],
    ids=str,
)
def test_bad_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        readout(**options)


def test_bad_genes() -> None:
    with pytest.raises(ValueError, match="genes: expected a last dimension of 8"):
        PerturbedGeneReadout(DIM)(torch.zeros(3, 8), torch.tensor([0, 3]), genes=torch.zeros(4, 7))
