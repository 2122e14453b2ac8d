"""Every public function and model with one small call, for the tests that hold all of them to the same.

A name of `cellattn`, `cellattn.nn`, `cellattn.metrics` or `cellattn.data` that is in no entry and not among `EXCEPTIONS`
fails `tests/test_registry.py`: a new function is in every such test by being registered here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import cellattn
from cellattn import Comembership, MultiGraph, SubgraphBatch, metrics
from cellattn import nn as models
from cellattn.data import PerturbationBatch, PerturbationDataset, leakage, split

N = 7  # genes
T = N + 1  # tokens, one prefix
D = 4
NUM_TYPES = 6


def _graph() -> MultiGraph:
    """Weighted; a self-loop, rows without edges (2 and 6 in a), and a gene (6) that is unknown in b."""
    edges = {
        "a": torch.tensor([[0, 0, 1, 3, 3, 4, 5, 5], [1, 4, 1, 0, 5, 6, 2, 3]]),
        "b": torch.tensor([[0, 1, 2, 2, 4, 5], [2, 0, 3, 5, 1, 0]]),
    }
    weight = {name: 0.5 + torch.arange(index.shape[1]) / 8 for name, index in edges.items()}
    return MultiGraph.from_edge_index(edges, N, edge_weight=weight, known={"b": torch.arange(N) < 6})


GRAPH = _graph()
RELATIONS = GRAPH.relations


def _shared() -> Comembership:
    """Genes by three terms, one of a single gene; gene 6 is unknown and gene 3 alone."""
    index = torch.tensor([[0, 1, 5, 5, 2, 0, 4, 3], [7, 7, 7, 8, 8, 8, 8, 9]])
    graph = MultiGraph.from_edge_index(
        {"of": index}, N + 3, edge_weight={"of": 0.5 + torch.arange(8) / 8}, known={"of": torch.arange(N + 3) != 6},
        node_types={"gene": N, "term": 3}, joins={"of": ("gene", "term")},
    )  # fmt: skip
    return graph.comembership("of", weight=torch.tensor([0.5, 1.0, 2.0]))


SHARED = _shared()

SEEDS, PTR = torch.tensor([1, 5, 0, 3, 6]), torch.tensor([0, 2, 2, 4, 5])  # four sets, one of them empty
TYPES = torch.tensor([1, 2, 3, 1, 5])
B = len(PTR) - 1
SOURCE, SOURCE_PTR = torch.tensor([0, 2, 5, 1, 3, 6]), torch.tensor([0, 3, 3, 6])
TARGET, TARGET_PTR = torch.tensor([1, 3, 5, 0, 3]), torch.tensor([0, 2, 3, 5])
ROWS = torch.tensor([5, 0, 2, 5])
KEEP = torch.arange(B * N).reshape(B, N) % 4 > 0


def draw(*shape: int, seed: int = 0) -> Tensor:
    """float64, standard normal."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100 * sum(shape)))


@dataclass(frozen=True)
class Entry:
    """One call of a public function.

    Attributes:
        covers: the public names that it calls.
        call: the tensors of the user's by name (and the module first, where there is one) to a result.
        floats: differentiable tensors, float64.
        constants: floating tensors that have no gradient.
        indices: integer and bool tensors.
        module: makes the module, its parameters drawn from one seed, in float64 and in evaluation.
        fullgraph: whether torch.compile makes one graph of it; not where sizes depend on values, or the call makes a generator.
    """

    covers: Sequence[str]
    call: Callable[..., Any]
    floats: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    module: Callable[[], nn.Module] | None = None
    fullgraph: bool = True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is the user's."""
        return {**self.floats, **self.constants, **self.indices}

    def make_module(self) -> nn.Module | None:
        """The module, the same at every call."""
        if self.module is None:
            return None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = self.module().double().eval()
            for parameter in module.parameters():  # those that start at zero (ReZero) would hide what comes before them
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        return module

    def run(self, tensors: Mapping[str, Tensor], module: nn.Module | None = None) -> list[Tensor]:
        """The tensors of the result."""
        result = self.call(**tensors) if self.module is None else self.call(module or self.make_module(), **tensors)
        return outputs(result)


def outputs(result: Any) -> list[Tensor]:
    """All tensors of a result, in order; numbers as tensors."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, float):
        return [torch.tensor(result, dtype=torch.float64)]
    if isinstance(result, Mapping):
        return [x for value in result.values() for x in outputs(value)]
    if isinstance(result, SubgraphBatch):
        names = ("edge_index",) if result.layout == "coo" else ("rowptr", "col")
        return outputs([result.node, result.node_ptr, result.seed_mask, result.edge_ptr, *(getattr(result, n) for n in names)])
    if isinstance(result, MultiGraph):
        return outputs([[result.rowptr(r), result.col(r), result.weight(r), result.known(r)] for r in result.relations])
    if isinstance(result, PerturbationBatch | PerturbationDataset):
        return [result.seeds, result.ptr, result.types, result.y]
    return [x for value in result for x in outputs(value)]


SETS = {"seeds": SEEDS, "ptr": PTR}
MUTANTS = {**SETS, "types": TYPES}
QK = {"q": draw(2, T, D), "k": draw(2, T, D, seed=1)}
QKV = {**{name: x.expand(2, *x.shape).contiguous() * torch.tensor([1.0, 0.5])[:, None, None, None] for name, x in QK.items()},
       "v": draw(2, 2, T, 3)}  # fmt: skip
LSE = 4 + 0.1 * draw(2, T)  # above the scores
BETWEEN = {"source": SOURCE, "source_ptr": SOURCE_PTR, "target": TARGET, "target_ptr": TARGET_PTR}
NETWORK = {"z": draw(N, D), "weight": draw(N, D, seed=1), "bias": draw(N)}


def _generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _mask(graph_mask: Any) -> list[Tensor]:
    node_keep, edge_keep = graph_mask
    return [node_keep, *edge_keep.values()]


OPS: dict[str, Entry] = {
    "attention": Entry(["attention"], cellattn.attention, QKV),
    "attention dropout": Entry(
        ["attention"], lambda **x: cellattn.attention(dropout_p=0.2, generator=_generator(7), **x), QKV, fullgraph=False
    ),
    "attention_logsumexp": Entry(["attention_logsumexp"], cellattn.attention_logsumexp, QK),
    "attention_logsumexp key_mask": Entry(
        ["attention_logsumexp"], cellattn.attention_logsumexp, QK,
        indices={"key_mask": torch.arange(2 * T).reshape(2, T) % 3 > 0},
    ),
    "attention_kl": Entry(
        ["attention_kl"], lambda **x: cellattn.attention_kl(graph=GRAPH, relation="a", num_prefix=1, reduction="none", **x),
        {**QK, "lse": LSE}, indices={"rows": ROWS},
    ),
    "attention_kl valid": Entry(
        ["attention_kl"], lambda **x: cellattn.attention_kl(graph=GRAPH, relation="b", num_prefix=1, over="valid", **x), QK
    ),
    "attention_kl_comembership": Entry(
        ["attention_kl_comembership", "Comembership"],
        lambda **x: cellattn.attention_kl_comembership(target=SHARED, num_prefix=1, reduction="none", **x), {**QK, "lse": LSE},
        indices={"rows": ROWS},
    ),
    "attention_kl_comembership valid": Entry(
        ["attention_kl_comembership"],
        lambda **x: cellattn.attention_kl_comembership(target=SHARED, num_prefix=1, over="valid", **x), QK,
    ),
    "attention_bce": Entry(
        ["attention_bce"], lambda **x: cellattn.attention_bce(graph=GRAPH, relation="b", num_prefix=1, reduction="none", **x),
        {**QK, "lse": LSE}, indices={"rows": ROWS},
    ),
    "attention_bce drawn": Entry(
        ["attention_bce"],
        lambda **x: cellattn.attention_bce(
            graph=GRAPH, relation="a", num_prefix=1, num_negatives=3, generator=_generator(), **x
        ),
        QK, indices={"rows": ROWS}, fullgraph=False,
    ),
    "attention_bce sigmoid": Entry(
        ["attention_bce"],
        lambda **x: cellattn.attention_bce(
            graph=GRAPH, relation="a", num_prefix=1, link="sigmoid", target="binary", reduction="none", **x
        ),
        QK,
    ),
    "edge_attention": Entry(
        ["edge_attention"],
        lambda **x: cellattn.edge_attention(graph=GRAPH, heads=[("a", 1), ("b", 0), ("b", 1)], weighted=True, **x),
        {**QKV, "edge_bias": draw(3)},
    ),
    "edge_attention dropout": Entry(
        ["edge_attention"],
        lambda **x: cellattn.edge_attention(
            graph=GRAPH, heads=[("a", 1), ("b", 0), ("b", 1)], dropout_p=0.2, generator=_generator(7), **x
        ),
        {**QKV, "edge_bias": draw(3)},
        fullgraph=False,
    ),
    "graph_attention": Entry(
        ["graph_attention"], lambda **x: cellattn.graph_attention(graph=GRAPH, ties=[("a", 1), ("b", 0)], **x), QKV
    ),
    "graph_attention dropout": Entry(
        ["graph_attention"],
        lambda **x: cellattn.graph_attention(graph=GRAPH, ties=[("a", 1)], dropout_p=0.2, generator=_generator(7), **x), QKV,
        fullgraph=False,
    ),
    "graph_attention bce": Entry(
        ["graph_attention"], lambda **x: cellattn.graph_attention(graph=GRAPH, ties=[("b", 1)], loss="bce", **x), QKV,
        indices={"rows": ROWS},
    ),
    "perturbation_attention": Entry(
        ["perturbation_attention"], cellattn.perturbation_attention,
        {"query": draw(2, B, D), "key": draw(2, N, D), "value": draw(2, N, 3), "override": draw(2, len(SEEDS), 3)},
        indices={"index": SEEDS, "ptr": PTR},
    ),
    "masked_spmm": Entry(
        ["masked_spmm"], lambda **x: cellattn.masked_spmm(GRAPH, "a", **x),
        {"x": draw(B, N, 3), "edge_weight": draw(GRAPH.num_edges("a"))}, indices={"keep": KEEP},
    ),
    "masked_spmm packed": Entry(
        ["masked_spmm"],
        lambda **x: cellattn.masked_spmm(GRAPH, "b", num_sets=5, reduce="mean", transpose=True, **x),
        {"x": draw(N, 3)}, indices={"keep": torch.arange(3, 3 + N)[:, None]},
    ),
    "relational_spmm": Entry(
        ["relational_spmm"], lambda **x: cellattn.relational_spmm(GRAPH, **x),
        {"x": draw(len(SOURCE), 2, 3)}, {"scale": draw(len(TARGET), 2)}, BETWEEN,
    ),
    "relational_spmm shared": Entry(
        ["relational_spmm"],
        lambda **x: cellattn.relational_spmm(GRAPH, relations=("b",), sum_relations=False, shared=True, **x),
        {"x": draw(N, 3)}, indices=BETWEEN,
    ),
    "relational_degree": Entry(["relational_degree"], lambda **x: cellattn.relational_degree(GRAPH, **x), indices=BETWEEN),
    "network_mse": Entry(
        ["network_mse"], lambda **x: cellattn.network_mse(graph=GRAPH, relation="b", reduction="none", **x), NETWORK,
        indices={"rows": ROWS},
    ),
    "khop_mask": Entry(["khop_mask"], lambda **x: cellattn.khop_mask(GRAPH, num_hops=1, **x), indices=SETS),
    "khop_subgraph": Entry(
        ["khop_subgraph", "SubgraphBatch"], lambda **x: cellattn.khop_subgraph(GRAPH, num_hops=1, **x), indices=SETS,
        fullgraph=False,
    ),
    "perturbation_mask": Entry(["perturbation_mask"], lambda **x: _mask(cellattn.perturbation_mask(GRAPH, **x)), indices=SETS),
}  # fmt: skip

GRAPHS: dict[str, Entry] = {
    "MultiGraph.from_edge_index": Entry(
        ["MultiGraph"],
        lambda index, weight, known: MultiGraph.from_edge_index(
            {"a": index}, N, edge_weight={"a": weight}, known={"a": known}, undirected=True
        ),
        constants={"weight": draw(6).abs()},
        indices={"index": torch.tensor([[4, 0, 1, 4, 2, 5], [0, 3, 1, 0, 2, 4]]), "known": torch.arange(N) < 6},
    ),
    "MultiGraph.extend": Entry(
        ["MultiGraph"], lambda index: GRAPH.extend(2, {"a": index}), indices={"index": torch.tensor([[7, 8, 2], [0, 7, 8]])}
    ),
}

MODELS: dict[str, Entry] = {
    **{
        f"CellTransformer {pool}": Entry(
            ["nn.CellTransformer", "nn.CellOutput", "nn.Tie", "nn.GraphLossOptions"],
            lambda module, **x: module(GRAPH, **x),
            {"features": draw(N, 3)},
            indices={**MUTANTS, "gene_ids": torch.tensor([0, 1, 2, 0, 3, 1, 4])},
            module=lambda pool=pool, loss=loss: models.CellTransformer(  # type: ignore[misc]
                8, 1, 2, num_types=NUM_TYPES, num_genes=5, feature_dim=3, pool=pool, loss=loss,
                ties=[(0, 0, "a", 0.1), (0, 1, "b", 0.2)],
            ),
        )
        for pool, loss in (("sum", "kl"), ("mean", "bce"), ("pairwise", "kl"), ("hypersagnn", "kl"), ("readout", "kl"))
    },
    **{
        f"WildtypeDifference {mode} {conv}": Entry(
            ["nn.WildtypeDifference"],
            lambda module, **x: module(GRAPH, **x),
            {"features": draw(N, 3)},
            indices=MUTANTS,
            module=lambda mode=mode, conv=conv: models.WildtypeDifference(  # type: ignore[misc]
                8, 2, relations=RELATIONS, num_types=NUM_TYPES, feature_dim=3, mode=mode, conv=conv
            ),
        )
        for mode, conv in (("lazy", "sage"), ("khop", "gin"), ("delta", "gat"), ("delta", "sage"), ("lazy", "gat"))
    },
    "Dango": Entry(
        ["nn.Dango"], lambda module, **x: module(GRAPH, **x), {"features": draw(N, 3)}, indices=MUTANTS,
        module=lambda: models.Dango(8, relations=RELATIONS, feature_dim=3),
    ),
    "PairwiseInteraction": Entry(
        ["nn.PairwiseInteraction", "nn.GeneTokens"], lambda module, **x: module(GRAPH, **x), {"features": draw(N, 3)},
        indices=MUTANTS, module=lambda: models.PairwiseInteraction(8, num_types=NUM_TYPES, feature_dim=3),
    ),
    "CellEncoder": Entry(
        ["nn.CellEncoder"], lambda module, **x: module(graph=GRAPH, **x), {"x": draw(N, 8)}, indices={"rows": ROWS},
        module=lambda: models.CellEncoder(8, 2, 2, ties=[(1, 0, "b", 0.5)], norm="post"),
    ),
    "CellEncoder comembership": Entry(
        ["nn.CellEncoder"], lambda module, **x: module(graph=GRAPH, **x), {"x": draw(N, 8)}, indices={"rows": ROWS},
        module=lambda: models.CellEncoder(8, 1, 2, ties=[(0, 0, "a", 0.5), (0, 1, "b", 0.1, {"loss": "kl_comembership"})]),
    ),
    "CellEncoder rezero": Entry(
        ["nn.CellEncoder"], lambda module, **x: module(graph=GRAPH, **x), {"x": draw(N, 8)}, indices={"rows": ROWS},
        module=lambda: models.CellEncoder(8, 1, 2, ties=[(0, 0, "a", 0.5, {"loss": "bce"})], norm="rezero"),
    ),
    "GraphRegularizedAttention": Entry(
        ["nn.GraphRegularizedAttention"], lambda module, **x: module(graph=GRAPH, **x), {"x": draw(2, T, 8)},
        indices={"rows": ROWS}, module=lambda: models.GraphRegularizedAttention(8, 2, ties=[("a", 1)]),
    ),
    "PerturbationHead": Entry(
        ["nn.PerturbationHead"], lambda module, **x: module(**x), {"h_cls": draw(8), "h": draw(N, 8)}, indices=MUTANTS,
        module=lambda: models.PerturbationHead(8, num_types=NUM_TYPES, pool=("sum", "pairwise"), num_heads=2),
    ),
    "PerturbationHead published": Entry(
        ["nn.PerturbationHead"], lambda module, **x: module(**x), {"h_cls": draw(8), "h": draw(N, 8)}, indices=MUTANTS,
        module=lambda: models.PerturbationHead(
            8, num_types=None, pool="readout_sum", num_heads=0, activation="relu", readout_residual="rezero",
            readout_null_sink=0.0,
        ),
    ),
    "HyperSAGNN": Entry(
        ["nn.HyperSAGNN"], lambda module, **x: module(**x), {"x": draw(len(SEEDS), 8)}, indices={"ptr": PTR},
        module=lambda: models.HyperSAGNN(8, 2),
    ),
    "PerturbedGeneReadout": Entry(
        ["nn.PerturbedGeneReadout"], lambda module, **x: module(**x), {"x": draw(len(SEEDS), 8)}, indices={"ptr": PTR},
        module=lambda: models.PerturbedGeneReadout(8, 2),
    ),
    "PerturbedGeneReadout of all genes": Entry(
        ["nn.PerturbedGeneReadout"], lambda module, **x: module(**x), {"x": draw(len(SEEDS), 8), "genes": draw(N, 8)},
        indices={"ptr": PTR}, module=lambda: models.PerturbedGeneReadout(8, 2, residual="rezero", null_sink=0.0, max_size=2),
    ),
}  # fmt: skip


def _correlation(metric: Callable[[], Any]) -> Callable[..., float]:
    def call(pred: Tensor, target: Tensor) -> float:
        state, other = metric(), metric()
        state.update(pred[:3], target[:3])
        other.update(pred[3:], target[3:])
        state.merge(other)
        return state.compute()

    return call


def _recorded(module: models.CellEncoder, x: Tensor) -> list[Any]:
    with metrics.record_layers(module) as layers:
        module(x, GRAPH)
    return [list(layers[0]), metrics.tied_edge_recovery(module, layers, GRAPH)]


def _split(seeds: Tensor, ptr: Tensor, types: Tensor) -> list[Any]:
    data = PerturbationDataset(seeds, ptr, types, draw(B).float(), num_genes=N)
    parts = split(data, "random", test=0.3, validation=0.2)
    numbers = [float(number) for counts in leakage(data, parts).values() for number in counts.values()]
    return [*parts.values(), *numbers]


PAIR = {"pred": draw(6), "target": draw(6, seed=1)}
OTHERS: dict[str, Entry] = {
    "PearsonCorr": Entry(["metrics.PearsonCorr"], _correlation(metrics.PearsonCorr), constants=PAIR),
    "SpearmanCorr": Entry(["metrics.SpearmanCorr"], _correlation(metrics.SpearmanCorr), constants=PAIR),
    "oversmoothing": Entry(["metrics.oversmoothing"], metrics.oversmoothing, constants={"h": draw(2, N, D)}),
    "residual_update_ratio": Entry(
        ["metrics.residual_update_ratio"], metrics.residual_update_ratio,
        constants={"x_in": draw(2, N, D), "x_out": draw(2, N, D, seed=1)},
    ),
    "edge_recovery": Entry(
        ["metrics.edge_recovery"], lambda q, k: metrics.edge_recovery(q, k, GRAPH, "a", num_prefix=1),
        constants={name: x[0] for name, x in QK.items()},
    ),
    "record_layers": Entry(
        ["metrics.record_layers", "metrics.tied_edge_recovery", "metrics.LayerRecord"], _recorded, constants={"x": draw(N, 8)},
        module=lambda: models.CellEncoder(8, 1, 2, ties=[(0, 0, "a", 0.5)]),
    ),
    "PerturbationDataset": Entry(
        ["data.PerturbationDataset", "data.PerturbationBatch", "data.PerturbationSample"],
        lambda selection, y, **x: PerturbationDataset(**x, y=y, num_genes=N).subset(selection),
        constants={"y": draw(B, 2).float()}, indices={**MUTANTS, "selection": torch.tensor([3, 0, 2])},
    ),
    "split": Entry(["data.split", "data.leakage"], _split, indices=MUTANTS, fullgraph=False),
}  # fmt: skip

ENTRIES: dict[str, Entry] = {**OPS, **GRAPHS, **MODELS, **OTHERS}

EXCEPTIONS = {
    "__version__": "a string",
    "sample_rows": "takes no tensor",
    "nn.extend_genes": "takes a module and a number",
    "nn.weight_from_row_sum": "takes a graph and numbers",
    "data.PERTURBATION_TYPES": "strings",
    "data.Cell": "a graph and its sources",
    "data.EdgeTable": "what a reader returns",
    "data.GeneList": "takes names",
    "data.GeneNames": "what a reader returns",
    "data.InteractionTable": "what a reader returns",
    "data.MembershipTable": "what a reader returns",
    "data.MetabolicModel": "what a reader returns",
    "data.Ontology": "what a reader returns",
    "data.batches_on": "moves batches between devices",
    "data.build_cell": "takes a path",
    "data.load_dcell_subset": "takes a path",
    "data.load_yeast": "takes a path",
    "data.read_biogrid": "takes a path",
    "data.read_edge_list": "takes a path",
    "data.read_edge_table": "takes a path",
    "data.read_go_annotations": "takes a path",
    "data.read_interactions": "takes a path",
    "data.read_metabolic_model": "takes a path",
    "data.read_obo": "takes a path",
    "data.read_sga": "takes a path",
    "data.read_sgd_features": "takes a path",
    "data.read_sources": "takes a path",
    "data.read_string_aliases": "takes a path",
    "data.read_string_links": "takes a path",
    "data.require_same_genes": "takes gene lists",
    "data.synthetic_cell": "takes numbers",
    "data.synthetic_phenotypes": "takes a graph and numbers",
    "screen.Bins": "numbers",
    "screen.DistanceFilter": "takes names",
    "screen.LabelFilter": "takes names",
    "screen.MeasuredSets": "indices, held to lists of sets in tests/screen",
    "screen.PairFilter": "takes names",
    "screen.SetSpace": "takes names",
    "screen.UnmeasuredFilter": "takes measured sets",
    "screen.rank_of": "indices, held to itertools in tests/screen",
    "screen.read_roster": "takes a path",
    "screen.set_of": "indices, held to itertools in tests/screen",
    "screen.support": "indices, held to lists of sets in tests/screen",
    "screen.ScreenError": "an error",
    "screen.Scorer": "what make_scorer returns",
    "screen.Status": "numbers",
    "screen.make_scorer": "takes a trained model; held to every model in tests/screen",
    "screen.merge": "takes a folder",
    "screen.screen": "takes models and names, writes a folder",
    "screen.status": "takes a folder",
}
