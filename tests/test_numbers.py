"""Numbers that NumPy or PyTorch box (scalars, arrays and tensors without dimensions) are numbers, wherever one is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cellattn
from cellattn import MultiGraph, checkpoint
from cellattn.data import (
    EdgeTable,
    PerturbationDataset,
    read_edge_table,
    read_string_links,
    split,
    synthetic_cell,
    synthetic_phenotypes,
)
from cellattn.data.genes import GeneList
from cellattn.metrics import edge_recovery
from cellattn.nn import (
    CellEncoder,
    CellTransformer,
    Dango,
    HyperSAGNN,
    PairwiseInteraction,
    PerturbationHead,
    PerturbedGeneReadout,
    WildtypeDifference,
    extend_genes,
    weight_from_row_sum,
)
from cellattn.screen import Bins, DistanceFilter, SetSpace, screen
from cellattn.screen.ranks import set_of

N, D = 6, 4
GRAPH = MultiGraph.from_edge_index({"p": torch.tensor([[0, 1, 2, 4], [1, 2, 3, 0]])}, N, names=[f"G{i}" for i in range(N)])
NAMES = GeneList([f"G{i}" for i in range(N)])
SEEDS, PTR = torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])
SETS = PerturbationDataset.from_sets([[i % N, (i + 1 + i // N) % N] for i in range(20)], list(range(20)), num_genes=N)


class Whole:
    """What `operator.index` takes."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


Number = Callable[[Any], Any]
INTS: dict[str, Number] = {
    "np.int64": np.int64,
    "np.uint8": np.uint8,
    "0-d array": lambda x: np.array(x),
    "0-d tensor": lambda x: torch.tensor(x),
    "__index__": lambda x: Whole(x),
}
FLOATS: dict[str, Number] = {
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.float16": np.float16,
    "0-d array": lambda x: np.array(x),
    "0-d tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "fraction": Fraction,
    "decimal": lambda x: Decimal(str(x)),
}


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


Q, TOKENS = rand(N, D), rand(2, N + 1, D)


def own() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def parameters(model: torch.nn.Module) -> Any:
    config = getattr(model, "config", None)
    return [{name: tuple(value.shape) for name, value in model.state_dict().items()}, config and json.dumps(config)]


def extended(number: Number) -> torch.nn.Module:
    model = PairwiseInteraction(8, num_types=3, num_genes=N)
    extend_genes(model, number(2), at=number(1))
    return model


def screened(number: Number, folder: Path) -> Any:
    model = PairwiseInteraction(8, num_types=3, num_genes=N, out_dim=2)
    out = folder / f"screen-{len(list(folder.iterdir()))}"
    options: dict[str, Any] = {"unit": number(4), "num_threads": number(1), "progress": False}
    done = screen(model, names=NAMES, out=out, order=number(2), phenotype=number(1), shard=(number(0), number(1)), **options)
    return [done.complete, done.total]


def table(folder: Path) -> Path:
    path = folder / "table.tsv"
    path.write_text("G0\tG1\t0.5\n")
    return path


def links(folder: Path) -> Path:
    path = folder / "links.txt"
    path.write_text("protein1 protein2 combined_score\n4932.G0 4932.G1 900\n4932.G0 4932.G2 200\n")
    return path


# name -> what is made with a number: equal however it is boxed
# fmt: off
COUNTS: dict[str, Callable[[Number, Path], Any]] = {
    "attention_kl num_prefix": lambda n, _: cellattn.attention_kl(TOKENS, TOKENS, GRAPH, "p", num_prefix=n(1)),
    "attention_bce num_prefix": lambda n, _: cellattn.attention_bce(TOKENS, TOKENS, GRAPH, "p", num_prefix=n(1)),
    "attention_bce num_negatives": lambda n, _: cellattn.attention_bce(Q, Q, GRAPH, "p", num_negatives=n(2), generator=own()),
    "attention_bce neg_sample_ratio": lambda n, _: cellattn.attention_bce(
        Q, Q, GRAPH, "p", neg_sample_ratio=n(2), generator=own()
    ),
    "graph_attention": lambda n, _: cellattn.graph_attention(
        TOKENS, TOKENS, TOKENS, GRAPH, [("p", n(1))], loss="bce", num_prefix=n(1), num_negatives=n(2), generator=own()
    )[1][0],
    "edge_attention": lambda n, _: cellattn.edge_attention(
        TOKENS, TOKENS, TOKENS, GRAPH, [("p", n(0)), ("p", n(1))], num_prefix=n(1)
    )[0],
    "attention scale": lambda n, _: cellattn.attention(Q[None], Q[None], Q[None], scale=n(2))[0],
    "sample_rows": lambda n, _: cellattn.sample_rows(GRAPH, "p", n(2), generator=own()),
    "khop_mask": lambda n, _: cellattn.khop_mask(GRAPH, SEEDS, PTR, n(2)),
    "khop_subgraph": lambda n, _: cellattn.khop_subgraph(GRAPH, SEEDS, PTR, n(2), max_nodes=n(30), max_edges={"p": n(30)}).node,
    "khop_subgraph item": lambda n, _: cellattn.khop_subgraph(GRAPH, SEEDS, PTR, 1)[n(1)].node,
    "perturbation_attention scale": lambda n, _: cellattn.perturbation_attention(Q[:2], Q, Q, SEEDS, PTR, Q[:3], scale=n(2)),
    "network_mse zero_weight": lambda n, _: cellattn.network_mse(Q, Q, Q[:, 0].contiguous(), GRAPH, "p", zero_weight=n(2)),
    "MultiGraph": lambda n, _: (
        MultiGraph.from_edge_index({"p": torch.tensor([[0], [1]])}, n(3), node_types={"gene": n(2), "term": n(1)}).num_nodes
    ),
    "extend": lambda n, _: GRAPH.extend(n(2)).num_nodes,
    "hops": lambda n, _: GRAPH.hops("p", n(2)).digest(),
    "rewired": lambda n, _: GRAPH.rewired("p", n(3)).digest(),
    "permuted": lambda n, _: GRAPH.permuted("p", n(3)).digest(),
    "GeneList.extend": lambda n, _: list(NAMES.extend(["x"], at=n(2))),
    "CellEncoder": lambda n, _: parameters(
        CellEncoder(n(8), n(2), n(2), ties=[(n(1), n(0), "p", n(2))], masks=[(n(0), n(1), "p")], ffn_dim=n(16), head_dim=n(4))
    ),
    "CellTransformer": lambda n, _: parameters(
        CellTransformer(
            n(8), n(1), n(2), num_types=n(3), num_genes=n(N), out_dim=n(2), cross_heads=n(2), hidden_dim=n(4), max_size=n(3),
            sampled_rows=n(2), readout_null_sink=n(1),
            ties=[(n(0), n(0), "p", n(1), {"num_negatives": n(2), "loss": "bce"})],
        )
    ),
    "WildtypeDifference": lambda n, _: parameters(
        WildtypeDifference(
            n(8), num_layers=n(1), relations=["p"], num_types=n(3), num_genes=n(N), mode="khop", num_hops=n(2),
            num_heads=n(2), hidden_dim=n(4), out_dim=n(2),
        )
    ),
    "Dango": lambda n, _: parameters(
        Dango(
            n(8), relations={"p": n(2)}, num_genes=n(N), zero_weight={"p": n(1)}, num_heads=n(2), num_layers=n(1),
            out_dim=n(2), max_size=n(3), sampled_rows=n(2),
        )
    ),
    "PairwiseInteraction": lambda n, _: parameters(
        PairwiseInteraction(n(8), num_types=n(3), num_genes=n(N), hidden_dim=n(4), out_dim=n(2), max_size=n(3))
    ),
    "HyperSAGNN": lambda n, _: parameters(HyperSAGNN(n(8), n(2), n(1), max_size=n(3))),
    "PerturbedGeneReadout": lambda n, _: parameters(
        PerturbedGeneReadout(n(8), n(2), ffn_dim=n(8), max_size=n(3), null_sink=n(1))
    ),
    "PerturbationHead": lambda n, _: parameters(
        PerturbationHead(n(8), num_types=n(3), num_heads=n(2), hidden_dim=n(4), out_dim=n(2))
    ),
    "extend_genes": lambda n, _: parameters(extended(n)),
    "weight_from_row_sum": lambda n, _: weight_from_row_sum(n(2), GRAPH, "p", num_rows=n(2), num_edges=n(3)),
    "synthetic_cell": lambda n, _: synthetic_cell(seed=n(1), num_genes=n(64), edge_scale=n(1)).digest(),
    "synthetic_phenotypes": lambda n, _: (
        synthetic_phenotypes(GRAPH, n(5), set_size=[n(1), n(2)], seed=n(1), noise=n(1), num_factors=n(2), num_hubs=n(2)).seeds
    ),
    "split": lambda n, _: split(SETS, "random", test=0.25, validation=0.25, seed=n(3))["test"],
    "read_string_links": lambda n, folder: (
        read_string_links(links(folder), GeneList(["G0", "G1", "G2"]), score_threshold=n(200))
    ),
    "read_edge_table": lambda n, folder: read_edge_table(
        table(folder), GeneList(["G0", "G1"]), source=n(1), target=n(0), weight=n(2), header=False
    ),
    "SetSpace.combinations": lambda n, _: SetSpace.combinations(NAMES, n(2)).block(n(1), n(5)).genes,
    "SetSpace.crossed": lambda n, _: SetSpace.crossed(NAMES, [(["G0", "G1"], n(1)), (["G2", "G3"], n(1))]).total,
    "Bins": lambda n, _: repr(Bins(0.0, n(8), n(4))),
    "DistanceFilter": lambda n, _: DistanceFilter(NAMES, {name: ("I", n(3)) for name in NAMES}, distance=n(2)).describe(),
    "edge_recovery": lambda n, _: edge_recovery(TOKENS[0], TOKENS[1], GRAPH, "p", num_prefix=n(1), block_rows=n(2)),
    "screen": screened,
    "set_of": lambda n, _: set_of(torch.tensor([1]), n(5), n(2)),
}
# fmt: on

SHARES: dict[str, Callable[[Number], Any]] = {
    "dropout_p": lambda x: cellattn.attention(Q[None], Q[None], Q[None], dropout_p=x(0.25), generator=own())[0],
    "scale": lambda x: cellattn.attention_kl(Q, Q, GRAPH, "p", scale=x(0.25)),
    "lse": lambda x: cellattn.attention_logsumexp(Q, Q, scale=x(0.25)),
    "edge_attention dropout_p": lambda x: cellattn.edge_attention(
        TOKENS, TOKENS, TOKENS, GRAPH, [("p", 0), ("p", 1)], num_prefix=1, dropout_p=x(0.25), generator=own()
    )[0],
    "neg_sample_ratio": lambda x: cellattn.attention_bce(Q, Q, GRAPH, "p", neg_sample_ratio=x(0.5), generator=own()),
    "zero_weight": lambda x: cellattn.network_mse(Q, Q, Q[:, 0].contiguous(), GRAPH, "p", zero_weight=x(0.25)),
    "perturbation_attention": lambda x: cellattn.perturbation_attention(Q[:2], Q, Q, SEEDS, PTR, Q[:3], scale=x(0.25)),
    "models": lambda x: parameters(
        CellTransformer(
            8,
            1,
            2,
            num_types=3,
            num_genes=N,
            ties=[(0, 0, "p", x(0.25))],
            dropout=x(0.25),
            dropout_p=x(0.5),
            ffn_dropout=x(0.25),
            sampled_rows=x(0.5),
            readout_null_sink=x(0.5),
            pool="readout",
        )
    ),
    "Dango": lambda x: parameters(Dango(8, relations={"p": x(0.5)}, num_genes=N, zero_weight=x(0.25), sampled_rows=x(0.5))),
    "PairwiseInteraction": lambda x: parameters(PairwiseInteraction(8, num_types=3, num_genes=N, dropout=x(0.25))),
    "weight_from_row_sum": lambda x: weight_from_row_sum(x(0.25), GRAPH, "p"),
    "synthetic_cell": lambda x: synthetic_cell(num_genes=64, edge_scale=x(0.25)).digest(),
    "synthetic_phenotypes": lambda x: synthetic_phenotypes(GRAPH, 5, num_hubs=2, noise=x(0.25)).y,
    "split": lambda x: split(SETS, "random", test=x(0.25), validation=x(0.25))["test"],
    "Bins": lambda x: repr(Bins(x(-0.5), x(0.5), 4)),
    "DistanceFilter": lambda x: DistanceFilter(NAMES, dict.fromkeys(NAMES, ("I", 3)), distance=x(0.5)).describe(),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, EdgeTable):
        return torch.equal(a.edge_index, b.edge_index)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.mark.parametrize("box", INTS.values(), ids=INTS)
@pytest.mark.parametrize("call", COUNTS.values(), ids=COUNTS)
def test_counts(call: Callable[[Number, Path], Any], box: Number, tmp_path: Path) -> None:
    assert same(call(box, tmp_path), call(int, tmp_path))


@pytest.mark.parametrize("box", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("call", SHARES.values(), ids=SHARES)
def test_shares(call: Callable[[Number], Any], box: Number) -> None:
    assert same(call(box), call(float))


@pytest.mark.parametrize(
    "wrong",
    [
        True,
        np.True_,
        np.array(True),
        torch.tensor(True),
        "2",
        np.array([2]),
        torch.tensor([2]),
        2.0,
        np.float32(2),
        None,
        torch.tensor(2, device="meta"),
        np.timedelta64(2, "ns"),
        np.datetime64("2026-01-01", "ns"),
        np.ma.masked,
    ],
    ids=repr,
)
def test_what_is_no_count(wrong: Any) -> None:
    for call, name in (
        (lambda: cellattn.khop_mask(GRAPH, SEEDS, PTR, wrong), "num_hops"),
        (lambda: cellattn.attention_kl(Q, Q, GRAPH, "p", num_prefix=wrong), "num_prefix"),
        (lambda: cellattn.sample_rows(GRAPH, "p", wrong), "num_rows"),
        (lambda: GRAPH.rewired("p", wrong), "seed"),
        (lambda: CellEncoder(wrong, 1, 1), "dim"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected an int"):
            call()


@pytest.mark.parametrize(
    "wrong",
    [True, np.True_, torch.tensor(True), "0.5", np.float32("nan"), torch.tensor([0.5]), 0.5j, np.complex64(0.5)],
    ids=repr,
)
def test_what_is_no_number(wrong: Any) -> None:
    for call, name in (
        (lambda: cellattn.attention_logsumexp(Q, Q, scale=wrong), "scale"),
        (lambda: cellattn.attention(Q[None], Q[None], Q[None], dropout_p=wrong), "dropout_p"),
        (lambda: split(SETS, "random", test=wrong), "test"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected a"):
            call()


def test_a_model_of_boxed_numbers_is_saved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_types": torch.tensor(3), "num_genes": np.int64(N), "dropout": np.float32(0.25)}
    ties = [(np.int64(0), np.int64(1), "p", np.float32(0.5), {"loss": "bce", "num_negatives": np.int64(2)})]
    model = CellTransformer(np.int64(8), np.int32(1), np.int64(2), ties=ties, **options)
    checkpoint.save(tmp_path / "model", model)
    again = checkpoint.load(tmp_path / "model").model
    assert json.dumps(vars(again)["config"]) == json.dumps(vars(model)["config"])


def test_compiled_with_boxed_numbers() -> None:
    scale, prefix = np.float64(0.5), np.int64(1)

    def f(q: torch.Tensor) -> torch.Tensor:
        return cellattn.attention_kl(q, q, GRAPH, "p", scale=scale, num_prefix=prefix)

    compiled = torch.compile(f, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), cellattn.attention_kl(TOKENS, TOKENS, GRAPH, "p", scale=0.5, num_prefix=1))


HEADS = (TOKENS[:1],) * 3
OF_TENSOR: dict[str, Callable[[Any], Any]] = {
    "scale of attention": lambda x: cellattn.attention(*HEADS, scale=x),
    "scale of attention_logsumexp": lambda x: cellattn.attention_logsumexp(Q, Q, scale=x),
    "scale of attention_kl": lambda x: cellattn.attention_kl(Q, Q, GRAPH, "p", scale=x),
    "scale of attention_bce": lambda x: cellattn.attention_bce(Q, Q, GRAPH, "p", scale=x),
    "scale of graph_attention": lambda x: cellattn.graph_attention(*HEADS, GRAPH, [("p", 0)], scale=x),
    "scale of edge_attention": lambda x: cellattn.edge_attention(*HEADS, GRAPH, [("p", 0)], scale=x),
    "scale of perturbation_attention": lambda x: cellattn.perturbation_attention(Q[:2], Q, Q, SEEDS, PTR, Q[:3], scale=x),
    "dropout_p": lambda x: cellattn.attention(*HEADS, dropout_p=x),
    "zero_weight": lambda x: cellattn.network_mse(Q, Q, Q[:, 0], GRAPH, "p", zero_weight=x),
    "neg_sample_ratio": lambda x: cellattn.attention_bce(Q, Q, GRAPH, "p", neg_sample_ratio=x),
    "num_prefix": lambda x: cellattn.attention_kl(Q, Q, GRAPH, "p", num_prefix=(0 * x).long()),
    "num_hops": lambda x: cellattn.khop_mask(GRAPH, SEEDS, PTR, (2 * x).long()),
    "num_rows": lambda x: cellattn.sample_rows(GRAPH, "p", (2 * x).long()),
    r"heads\[0\]": lambda x: cellattn.edge_attention(*HEADS, GRAPH, [("p", (0 * x).long())]),
}


@pytest.mark.parametrize("argument", OF_TENSOR)
def test_a_number_in_a_tensor_is_read_or_refused_with_a_reason(argument: str) -> None:
    """The same everywhere: read in eager mode, which is how PyTorch goes on after what it cannot compile, refused elsewhere."""
    call, name = OF_TENSOR[argument], argument.partition(" of ")[0]
    number = torch.tensor(0.5)
    call(number)
    torch.func.grad(lambda y: (call(number), y.sum())[1])(torch.ones(1))  # a constant there
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=rf"{name}: expected .*not known while a function is compiled"):
        torch.compile(call, fullgraph=True, backend="eager")(number)
    with pytest.raises((ValueError, TypeError), match=f"{name}: expected .*it would not pass on"):
        torch.func.vmap(call)(torch.tensor([0.5, 0.25]))
    with pytest.raises((ValueError, TypeError), match=f"{name}: expected .*holds no value"):
        call(number.to("meta"))
