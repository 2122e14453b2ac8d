"""Malformed input through the public interface: each case ends in an exception that names the argument and the value."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellattn import (
    MultiGraph,
    attention,
    attention_bce,
    attention_kl,
    attention_logsumexp,
    graph_attention,
    khop_mask,
    khop_subgraph,
    masked_spmm,
    network_mse,
    perturbation_attention,
    perturbation_mask,
    relational_degree,
    relational_spmm,
    sample_rows,
)
from cellattn.data import GeneList, PerturbationDataset, read_edge_table, read_string_links, synthetic_cell
from cellattn.nn import CellEncoder, GeneTokens, GraphRegularizedAttention, HyperSAGNN, PerturbationHead, extend_genes

N, H, D = 5, 2, 4
T = N + 1  # one prefix token

Call = Callable[[], Any]
Case = tuple[str, Call, type[Exception], tuple[str, ...]]  # id, call, exception, words of its message

ids = torch.tensor
nan, inf = float("nan"), float("inf")


def rand(*shape: int, **options: Any) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(**options)


EDGES = {"physical": ids([[0, 1, 2], [1, 2, 0]]), "tflink": ids([[0, 0], [1, 3]])}
GRAPH = MultiGraph.from_edge_index(EDGES, N)
LONELY = MultiGraph.from_edge_index({"physical": torch.empty(2, 0, dtype=torch.int64)}, N)
QUERIES = rand(H, T, D)
META = torch.empty(H, T, D, device="meta")
SPARSE = torch.eye(N).to_sparse()


# ------------------------------------------------------------- one wrong argument beside right ones, for each function


def build(index: Any = EDGES, num_nodes: Any = N, **options: Any) -> Call:
    return lambda: MultiGraph.from_edge_index(index, num_nodes, **options)


def build_one(index: Any, **options: Any) -> Call:
    return build({"physical": index}, **options)


def weigh(*weight: Any, **options: Any) -> Call:
    return build(edge_weight={"tflink": ids(weight, **options)})


def attend(q: Any = QUERIES, k: Any = QUERIES, v: Any = QUERIES, **options: Any) -> Call:
    return lambda: attention(q, k, v, **options)


def log_sum(q: Any = QUERIES, k: Any = QUERIES, **options: Any) -> Call:
    return lambda: attention_logsumexp(q, k, **options)


def kl(q: Any = QUERIES, k: Any = QUERIES, graph: Any = GRAPH, relation: Any = "physical", **options: Any) -> Call:
    return lambda: attention_kl(q, k, graph, relation, **{"num_prefix": 1, **options})


def bce(q: Any = QUERIES, k: Any = QUERIES, graph: Any = GRAPH, relation: Any = "physical", **options: Any) -> Call:
    return lambda: attention_bce(q, k, graph, relation, **{"num_prefix": 1, **options})


def tied(ties: Any = (("physical", 0),), q: Any = QUERIES, graph: Any = GRAPH, **options: Any) -> Call:
    return lambda: graph_attention(q, q, q, graph, ties, **options)


def rows(num_rows: Any = 1, graph: Any = GRAPH, relation: Any = "physical", **options: Any) -> Call:
    return lambda: sample_rows(graph, relation, num_rows, **options)


def perturb(**options: Any) -> Call:
    """Two sets, {0, 3} and {1}, over N genes."""
    right = {
        "query": rand(2, D),
        "key": rand(N, D),
        "value": rand(N, 3),
        "index": ids([0, 3, 1]),
        "ptr": ids([0, 2, 3]),
        "override": rand(3, 3),
    }
    return lambda: perturbation_attention(**{**right, **options})


def with_sets(op: Callable[..., Any], **hops: int) -> Callable[..., Call]:
    """Two sets, {0, 3} and {1}, over N genes."""
    right = {"graph": GRAPH, "seeds": ids([0, 3, 1]), "ptr": ids([0, 2, 3])}
    return lambda **options: lambda: op(**{**right, **hops, **options})


mask = with_sets(khop_mask, num_hops=1)
extract = with_sets(khop_subgraph, num_hops=1)
perturbed = with_sets(perturbation_mask)


def messages(**options: Any) -> Call:
    """Two masks over N genes."""
    right = {"graph": GRAPH, "relation": "physical", "x": rand(N, D), "keep": torch.ones(2, N).bool()}
    return lambda: masked_spmm(**{**right, **options})


def reconstruct(**options: Any) -> Call:
    """A decoder of D numbers over N genes."""
    right = {"z": rand(N, D), "weight": rand(N, D), "bias": rand(N), "graph": GRAPH, "relation": "physical"}
    return lambda: network_mse(**{**right, **options})


def between(**options: Any) -> dict[str, Any]:
    """{0, 3} and {1} send to {2} and {0, 1, 4} of N genes."""
    subsets = {
        "source": ids([0, 3, 1]),
        "source_ptr": ids([0, 2, 3]),
        "target": ids([2, 0, 1, 4]),
        "target_ptr": ids([0, 1, 4]),
    }
    return {"graph": GRAPH, **subsets, **options}


def relational(**options: Any) -> Call:
    return lambda: relational_spmm(**between(**{"x": rand(3, D), **options}))


def degrees(**options: Any) -> Call:
    return lambda: relational_degree(**between(**options))


def weighted_edge(weight: Any) -> nx.Graph:
    graph = nx.Graph()
    graph.add_edge(0, 1, weight=weight)
    return graph


def hetero_data(**changes: Any) -> Any:
    data = pytest.importorskip("torch_geometric.data").HeteroData()
    data["gene"].num_nodes = 3
    data["gene", "physical", "gene"].edge_index = ids([[0], [1]])
    for name, value in changes.items():
        setattr(data["gene", "physical", "gene"], name, value)
    return data


def dataset(**options: Any) -> Call:
    right: dict[str, Any] = {"seeds": ids([0, 3]), "ptr": ids([0, 2]), "types": ids([1, 1]), "y": rand(1), "num_genes": N}
    return lambda: PerturbationDataset(**{**right, **options})


def head(**options: Any) -> Call:
    right = {"h_cls": rand(8), "h": rand(N, 8), "seeds": ids([0, 3]), "ptr": ids([0, 2]), "types": ids([1, 1])}
    return lambda: PerturbationHead(8, num_types=5)(**{**right, **options})


def of_every_batch_of_sets(call: Callable[..., Call]) -> list[Case]:
    return [
        ("graph-none", call(graph=None), TypeError, ("graph", "None")),
        ("graph-dict", call(graph=EDGES), TypeError, ("graph", "dict")),
        ("seeds-list", call(seeds=[0, 3, 1]), TypeError, ("seeds", "list [0, 3, 1]")),
        ("seeds-float", call(seeds=rand(3)), ValueError, ("seeds", "float32")),
        ("seeds-int32", call(seeds=ids([0, 3, 1]).int()), ValueError, ("seeds", "int32")),
        ("seeds-mask", call(seeds=torch.ones(N).bool()), ValueError, ("seeds", "bool")),
        ("seeds-2d", call(seeds=ids([[0, 3, 1]])), ValueError, ("seeds", "[1, 3]")),
        ("seeds-large", call(seeds=ids([0, 5, 1])), ValueError, ("seeds", "position 1 holds 5", "[0, 5)")),
        ("seeds-negative", call(seeds=ids([0, 3, -1])), ValueError, ("seeds", "position 2 holds -1")),
        ("seeds-meta", call(seeds=ids([0, 3, 1], device="meta")), ValueError, ("seeds", "meta")),
        ("ptr-list", call(ptr=[0, 2, 3]), TypeError, ("ptr", "list [0, 2, 3]")),
        ("ptr-none", call(ptr=None), TypeError, ("ptr", "None")),
        ("ptr-empty", call(ptr=ids([]).long()), ValueError, ("ptr", "at least one entry")),
        ("ptr-int32", call(ptr=ids([0, 2, 3]).int()), ValueError, ("ptr", "int32")),
        ("ptr-start", call(ptr=ids([1, 2, 3])), ValueError, ("ptr", "1")),
        ("ptr-end", call(ptr=ids([0, 2, 4])), ValueError, ("ptr", "4", "seeds")),
        ("ptr-short", call(ptr=ids([0, 2])), ValueError, ("ptr", "3", "2")),
        ("ptr-falls", call(ptr=ids([0, 2, 1, 3])), ValueError, ("ptr", "1 after 2")),
        ("ptr-huge", call(ptr=ids([0, 10**18, 3])), ValueError, ("ptr", "3 after 1000000000000000000")),
    ]


def of_every_product_between_subsets(call: Callable[..., Call]) -> list[Case]:
    return [
        ("graph-none", call(graph=None), TypeError, ("graph", "None")),
        ("source-list", call(source=[0, 3, 1]), TypeError, ("source", "list [0, 3, 1]")),
        ("source-int32", call(source=ids([0, 3, 1]).int()), ValueError, ("source", "int32")),
        ("source-mask", call(source=torch.ones(2, N).bool()), ValueError, ("source", "[2, 5]")),
        ("source-large", call(source=ids([0, 5, 1])), ValueError, ("source", "position 1 holds 5", "[0, 5)")),
        ("source-negative", call(source=ids([-1, 3, 1])), ValueError, ("source", "position 0 holds -1")),
        ("source-falls", call(source=ids([3, 0, 1])), ValueError, ("source", "ascend", "0 after 3 at position 1")),
        ("source-twice", call(source=ids([3, 3, 1])), ValueError, ("source", "ascend", "3 after 3 at position 1")),
        ("source-meta", call(source=ids([0, 3, 1]).to("meta")), ValueError, ("source", "meta")),
        ("source_ptr-none", call(source_ptr=None), TypeError, ("source_ptr", "None")),
        ("source_ptr-empty", call(source_ptr=ids([]).long()), ValueError, ("source_ptr", "at least one entry")),
        ("source_ptr-start", call(source_ptr=ids([1, 2, 3])), ValueError, ("source_ptr", "start with 0", "1")),
        ("source_ptr-end", call(source_ptr=ids([0, 2, 4])), ValueError, ("source_ptr", "4", "source")),
        ("target-float", call(target=rand(4)), ValueError, ("target", "float32")),
        ("target-falls", call(target=ids([2, 0, 4, 1])), ValueError, ("target", "ascend", "1 after 4 at position 3")),
        ("target-large", call(target=ids([2, 0, 1, 7])), ValueError, ("target", "position 3 holds 7")),
        ("target_ptr-falls", call(target_ptr=ids([0, 5, 4])), ValueError, ("target_ptr", "4 after 5")),
        ("target_ptr-samples", call(target_ptr=ids([0, 4])), ValueError, ("target_ptr", "3 entries", "2")),
        ("target_ptr-meta", call(target_ptr=ids([0, 1, 4]).to("meta")), ValueError, ("target_ptr", "meta")),
        ("relations-word", call(relations="physical"), TypeError, ("relations", "str 'physical'")),
        ("relations-int", call(relations=1), TypeError, ("relations", "int 1")),
        ("relations-unknown", call(relations=["physic"]), ValueError, ("relation", "'physic'", "'physical'?")),
        ("relations-none", call(relations=[None]), ValueError, ("relation", "None")),
    ]


def of_every_traversal(call: Callable[..., Call]) -> list[Case]:
    return [
        *of_every_batch_of_sets(call),
        ("num_hops-negative", call(num_hops=-1), ValueError, ("num_hops", "-1")),
        ("num_hops-float", call(num_hops=1.0), TypeError, ("num_hops", "1.0")),
        ("num_hops-bool", call(num_hops=True), TypeError, ("num_hops", "True")),
        ("num_hops-none", call(num_hops=None), TypeError, ("num_hops", "None")),
        ("traversal-word", call(traversal="per-relation"), ValueError, ("traversal", "'per_relation'?")),
        ("traversal-none", call(traversal=None), ValueError, ("traversal", "None")),
        ("direction-word", call(direction="incoming"), ValueError, ("direction", "'incoming'")),
        ("direction-flow", call(direction="source_to_target"), ValueError, ("direction", "'source_to_target'")),
    ]


def of_every_loss(loss: Callable[..., Call]) -> list[Case]:
    return [
        ("graph-none", loss(graph=None), TypeError, ("graph", "None")),
        ("graph-dense", loss(graph=torch.eye(N)), TypeError, ("graph", "[5, 5]")),
        ("graph-dict", loss(graph=EDGES), TypeError, ("graph", "dict")),
        ("relation-unknown", loss(relation="physic"), ValueError, ("relation", "'physic'", "'physical'?")),
        ("relation-none", loss(relation=None), ValueError, ("relation", "None")),
        ("q-tuple", loss(q=(QUERIES, QUERIES)), TypeError, ("q", "tuple")),
        ("q-and-k-differ", loss(k=rand(H, T + 1, D)), ValueError, ("k", "[2, 7, 4]")),
        ("tokens", loss(q=rand(N, D), k=rand(N, D)), ValueError, ("q", "1 prefix tokens + 5 genes", "[5, 4]")),
        ("meta", loss(q=META, k=META), ValueError, ("graph", "meta", "cpu")),
        ("num_prefix-few", loss(num_prefix=0), ValueError, ("q", "0 prefix tokens", "[2, 6, 4]")),
        ("num_prefix-negative", loss(num_prefix=-1), ValueError, ("num_prefix", "-1")),
        ("num_prefix-float", loss(num_prefix=1.0), TypeError, ("num_prefix", "1.0")),
        ("num_prefix-bool", loss(num_prefix=True), TypeError, ("num_prefix", "True")),
        ("num_prefix-none", loss(num_prefix=None), TypeError, ("num_prefix", "None")),
        ("scale-nan", loss(scale=nan), ValueError, ("scale", "nan")),
        ("reduction-word", loss(reduction="avg"), ValueError, ("reduction", "'avg'")),
        ("reduction-case", loss(reduction="Mean"), ValueError, ("reduction", "'Mean'", "'mean'?")),
        ("reduction-none", loss(reduction=None), ValueError, ("reduction", "None")),
        ("lse-genes", loss(lse=rand(H, N)), ValueError, ("lse", "[2, 6]", "[2, 5]")),
        ("lse-dtype", loss(lse=rand(H, T).double()), ValueError, ("lse", "float64")),
        ("lse-int", loss(lse=torch.zeros(H, T).long()), ValueError, ("lse", "int64")),
        ("lse-pair", loss(lse=(QUERIES, rand(H, T))), TypeError, ("lse", "tuple")),
        ("lse-meta", loss(lse=META[..., 0]), ValueError, ("lse", "meta")),
        ("rows-large", loss(rows=ids([0, 5])), ValueError, ("rows", "position 1 holds 5", "[0, 5)")),
        ("rows-negative", loss(rows=ids([-1])), ValueError, ("rows", "holds -1")),
        ("rows-float", loss(rows=ids([1.0])), ValueError, ("rows", "float32")),
        ("rows-mask", loss(rows=torch.ones(N).bool()), ValueError, ("rows", "bool")),
        ("rows-2d", loss(rows=ids([[1]])), ValueError, ("rows", "[1, 1]")),
        ("rows-scalar", loss(rows=ids(1)), ValueError, ("rows", "shape []")),
        ("rows-list", loss(rows=[0, 1]), TypeError, ("rows", "[0, 1]")),
        ("rows-int", loss(rows=3), TypeError, ("rows", "int 3")),
        ("rows-dict", loss(rows={"physical": ids([0])}), TypeError, ("rows", "dict")),
        ("rows-meta", loss(rows=ids([0], device="meta")), ValueError, ("rows", "meta")),
    ]


# ------------------------------------------------------------------------------------------------------------ the table

CONSTRUCTORS: list[Case] = [
    ("edge_index-tensor", build(EDGES["tflink"]), TypeError, ("edge_index", "int64 tensor of shape [2, 2]")),
    ("edge_index-none", build(None), TypeError, ("edge_index", "None")),
    ("edge_index-list", build([EDGES["tflink"]]), TypeError, ("edge_index", "list")),
    ("edge_index-lists", build_one([[0], [1]]), TypeError, ("edge_index['physical']", "list [[0], [1]]")),
    ("edge_index-numpy-floats", build_one(np.array([[0.0], [1.0]])), ValueError, ("edge_index['physical']", "float64")),
    ("edge_index-missing", build_one(None), TypeError, ("edge_index['physical']", "None")),
    ("edge_index-float", build_one(ids([[0.0], [1.0]])), ValueError, ("edge_index['physical']", "float32")),
    ("edge_index-bool", build_one(torch.ones(2, 3).bool()), ValueError, ("edge_index['physical']", "bool tensor")),
    ("edge_index-adjacency", build_one(torch.eye(N).long()), ValueError, ("edge_index['physical']", "[5, 5]")),
    ("edge_index-pairs", build_one(ids([[0, 1], [1, 2], [2, 3]])), ValueError, ("edge_index['physical']", "[3, 2]")),
    ("edge_index-flat", build_one(ids([0, 1])), ValueError, ("edge_index['physical']", "[2]")),
    ("edge_index-sparse", build_one(SPARSE), ValueError, ("edge_index['physical']", "torch.sparse_coo")),
    (
        "edge_index-nested",
        lambda: build_one(torch.nested.nested_tensor([ids([0]), ids([1])], layout=torch.jagged))(),
        ValueError,
        ("edge_index['physical']", "nested int64 tensor"),
    ),
    ("edge_index-meta", build_one(EDGES["tflink"].to("meta")), ValueError, ("edge_index['physical']", "meta")),
    ("edge_index-two-devices", build({**EDGES, "x": META.long()}), ValueError, ("edge_index", "one device", "meta")),
    ("index-too-large", build_one(ids([[0, 4], [1, 5]])), ValueError, ("edge_index['physical']", "[1, 1] holds 5")),
    ("index-negative", build_one(ids([[0, -1], [1, 4]])), ValueError, ("edge_index['physical']", "[0, 1] holds -1")),
    ("index-one-based", build_one(ids([[1], [N]])), ValueError, ("holds 5", "[0, 5)")),
    ("relation-int", build({0: EDGES["tflink"]}), ValueError, ("edge_index", "int 0")),
    ("relation-none", build({None: EDGES["tflink"]}), ValueError, ("edge_index", "None")),
    ("relation-empty", build({"": EDGES["tflink"]}), ValueError, ("edge_index", "''")),
    ("relation-triple", build({("g", "r", "g"): EDGES["tflink"]}), ValueError, ("edge_index", "('g', 'r', 'g')")),
    ("num_nodes-0", build(num_nodes=0), ValueError, ("num_nodes", "0")),
    ("num_nodes-negative", build(num_nodes=-3), ValueError, ("num_nodes", "-3")),
    ("num_nodes-float", build(num_nodes=5.0), TypeError, ("num_nodes", "float 5.0")),
    ("num_nodes-bool", build(num_nodes=True), TypeError, ("num_nodes", "True")),
    ("num_nodes-tensor", build(num_nodes=ids([5])), TypeError, ("num_nodes", "int64 tensor")),
    ("num_nodes-none", build(num_nodes=None), TypeError, ("num_nodes", "None")),
    ("num_nodes-huge", build(num_nodes=10**12), ValueError, ("num_nodes", "1000000000000")),
    ("num_nodes-beyond-int64", build(num_nodes=10**30), ValueError, ("num_nodes", "1" + "0" * 30)),
    ("weight-nan", weigh(1.0, nan), ValueError, ("edge_weight['tflink']", "position 1 holds nan")),
    ("weight-inf", weigh(inf, 1.0), ValueError, ("edge_weight['tflink']", "position 0 holds inf")),
    ("weight-negative", weigh(1.0, -0.5), ValueError, ("edge_weight['tflink']", "position 1 holds -0.5")),
    ("weight-int", weigh(1, 2), ValueError, ("edge_weight['tflink']", "int64")),
    ("weight-complex", weigh(1j, 2j), ValueError, ("edge_weight['tflink']", "complex64")),
    ("weight-short", weigh(1.0), ValueError, ("edge_weight['tflink']", "2 weights", "got 1")),
    ("weight-column", weigh([1.0], [1.0]), ValueError, ("edge_weight['tflink']", "[2, 1]")),
    ("weight-scalar", build(edge_weight={"tflink": ids(1.0)}), ValueError, ("edge_weight['tflink']", "shape []")),
    ("weight-number", build(edge_weight={"tflink": 1.0}), TypeError, ("edge_weight['tflink']", "float 1.0")),
    ("weight-list", build(edge_weight={"tflink": [1.0, 2.0]}), TypeError, ("edge_weight['tflink']", "[1.0, 2.0]")),
    ("weight-meta", weigh(1.0, 1.0, device="meta"), ValueError, ("edge_weight['tflink']", "meta")),
    ("weights-tensor", build(edge_weight=ids([1.0, 1.0])), TypeError, ("edge_weight", "float32 tensor of shape [2]")),
    ("weights-list", build(edge_weight=[1.0, 1.0]), TypeError, ("edge_weight", "list [1.0, 1.0]")),
    ("weight-relation", build(edge_weight={"tflnk": ids([1.0])}), ValueError, ("edge_weight", "'tflnk'", "'tflink'?")),
    ("weight-relation-int", build(edge_weight={1: ids([1.0])}), ValueError, ("edge_weight", "1")),
    (
        "weight-sum-overflows",
        build_one(ids([[0, 0], [1, 1]]), edge_weight={"physical": ids([3e38, 3e38])}),
        ValueError,
        ("edge_weight['physical']", "row 0", "inf"),
    ),
    (
        "weight-sum-vanishes",
        build_one(ids([[3], [1]]), edge_weight={"physical": ids([1e-310], dtype=torch.float64)}),
        ValueError,
        ("edge_weight['physical']", "row 3", "1e-310"),
    ),
    ("known-tensor", build(known=torch.ones(N).bool()), TypeError, ("known", "bool tensor of shape [5]")),
    ("known-indices", build(known={"tflink": ids([0, 1])}), ValueError, ("known['tflink']", "int64")),
    ("known-short", build(known={"tflink": torch.ones(3).bool()}), ValueError, ("known['tflink']", "got 3")),
    ("known-matrix", build(known={"tflink": torch.ones(N, N).bool()}), ValueError, ("known['tflink']", "[5, 5]")),
    ("known-list", build(known={"tflink": [True] * N}), TypeError, ("known['tflink']", "list")),
    ("known-edge", build(known={"tflink": torch.arange(N) < 3}), ValueError, ("'tflink'", "position 1", "[0, 3]")),
    ("known-relation", build(known={"x": torch.ones(N).bool()}), ValueError, ("known relation", "'x'")),
    (
        "known-meta",
        build(known={"tflink": torch.ones(N, device="meta").bool()}),
        ValueError,
        ("known['tflink']", "device", "meta"),
    ),
    ("undirected-none", build(undirected=None), TypeError, ("undirected", "None")),
    ("undirected-int", build(undirected=1), TypeError, ("undirected", "int 1")),
    ("undirected-dict", build(undirected={"tflink": False}), TypeError, ("undirected", "dict {'tflink': False}")),
    ("undirected-name", build(undirected="physicl"), ValueError, ("undirected", "'physicl'", "'physical'?")),
    ("undirected-names", build(undirected=["physical", 3]), ValueError, ("undirected", "3")),
    ("scipy-bare", lambda: MultiGraph.from_scipy(sp.eye(3)), TypeError, ("matrices", "matrix")),
    ("scipy-dense", lambda: MultiGraph.from_scipy({"r": np.eye(3)}), ValueError, ("matrices['r']", "ndarray")),
    ("scipy-none", lambda: MultiGraph.from_scipy({"r": None}), ValueError, ("matrices['r']", "None")),
    ("scipy-no-relation", lambda: MultiGraph.from_scipy({}), ValueError, ("matrices", "at least one")),
    ("scipy-oblong", lambda: MultiGraph.from_scipy({"r": sp.coo_matrix((3, 4))}), ValueError, ("matrices['r']", "(3, 4)")),
    (
        "scipy-sizes",
        lambda: MultiGraph.from_scipy({"r": sp.eye(3), "s": sp.eye(4)}),
        ValueError,
        ("matrices['s']", "(3, 3)", "(4, 4)"),
    ),
    ("scipy-1d", lambda: MultiGraph.from_scipy({"r": sp.coo_array([1.0])}), ValueError, ("matrices['r']", "(1,)")),
    ("scipy-empty", lambda: MultiGraph.from_scipy({"r": sp.csr_matrix((0, 0))}), ValueError, ("num_nodes", "0")),
    ("scipy-complex", lambda: MultiGraph.from_scipy({"r": 1j * sp.eye(3)}), ValueError, ("matrices['r']", "complex128")),
    (
        "scipy-longdouble",
        lambda: MultiGraph.from_scipy({"r": sp.eye(3, dtype=np.longdouble)}),
        ValueError,
        ("matrices['r']", str(np.dtype(np.longdouble))),
    ),
    ("scipy-negative", lambda: MultiGraph.from_scipy({"r": -sp.eye(3)}), ValueError, ("'r'", "position 0 holds -1.0")),
    ("scipy-nan", lambda: MultiGraph.from_scipy({"r": nan * sp.eye(3)}), ValueError, ("'r'", "holds nan")),
    ("scipy-relation", lambda: MultiGraph.from_scipy({3: sp.eye(3)}), ValueError, ("int 3",)),  # type: ignore[dict-item]
    ("torch-bare", lambda: MultiGraph.from_sparse_tensor(SPARSE), TypeError, ("tensors", "tensor")),  # type: ignore[arg-type]
    ("torch-dense", lambda: MultiGraph.from_sparse_tensor({"r": torch.eye(3)}), ValueError, ("tensors['r']", "[3, 3]")),
    ("torch-numpy", lambda: MultiGraph.from_sparse_tensor({"r": np.eye(3)}), ValueError, ("tensors['r']", "ndarray")),
    (
        "torch-hybrid",
        lambda: MultiGraph.from_sparse_tensor({"r": torch.eye(3).to_sparse(1)}),
        ValueError,
        ("tensors['r']", "float32 tensor of shape [3, 3]"),
    ),
    (
        "torch-edge-features",
        lambda: MultiGraph.from_sparse_tensor({"r": torch.ones(3, 3, 2).to_sparse(2)}),
        ValueError,
        ("tensors['r']", "[3, 3, 2]"),
    ),
    ("torch-complex", lambda: MultiGraph.from_sparse_tensor({"r": 1j * SPARSE}), ValueError, ("'r'", "complex64")),
    ("torch-meta", lambda: MultiGraph.from_sparse_tensor({"r": SPARSE.to("meta")}), ValueError, ("'r'", "meta")),
    ("networkx-bare", lambda: MultiGraph.from_networkx(nx.Graph(), []), TypeError, ("graphs", "Graph")),
    ("networkx-edges", lambda: MultiGraph.from_networkx({"r": [(0, 1)]}, [0, 1]), ValueError, ("graphs['r']", "[(0, 1)]")),
    ("networkx-node", lambda: MultiGraph.from_networkx({"r": nx.path_graph(3)}, [0, 1]), ValueError, ("'r'", "node 2")),
    ("nodelist-none", lambda: MultiGraph.from_networkx({}, None), TypeError, ("nodelist", "None")),  # type: ignore[arg-type]
    ("nodelist-int", lambda: MultiGraph.from_networkx({}, 3), TypeError, ("nodelist", "int 3")),  # type: ignore[arg-type]
    ("nodelist-str", lambda: MultiGraph.from_networkx({}, "YAL001C"), TypeError, ("nodelist", "'YAL001C'")),
    ("nodelist-set", lambda: MultiGraph.from_networkx({}, {0, 1}), TypeError, ("nodelist", "set {0, 1}")),  # type: ignore[arg-type]
    ("nodelist-unhashable", lambda: MultiGraph.from_networkx({}, [[0]]), TypeError, ("nodelist", "[[0]]")),
    ("nodelist-repeated", lambda: MultiGraph.from_networkx({}, [0, 0]), ValueError, ("nodelist", "1 repeated")),
    (
        "networkx-weight-str",
        lambda: MultiGraph.from_networkx({"r": weighted_edge("high")}, [0, 1]),
        ValueError,
        ("graphs['r']", "(0, 1)", "'high'"),
    ),
    (
        "networkx-weight-none",
        lambda: MultiGraph.from_networkx({"r": weighted_edge(None)}, [0, 1]),
        ValueError,
        ("graphs['r']", "(0, 1)", "None"),
    ),
    (
        "networkx-weight-negative",
        lambda: MultiGraph.from_networkx({"r": weighted_edge(-2)}, [0, 1]),
        ValueError,
        ("'r'", "position 0 holds -2.0"),
    ),
    ("hetero_data-none", lambda: MultiGraph.from_hetero_data(None), ValueError, ("data", "NoneType")),
    ("hetero_data-dict", lambda: MultiGraph.from_hetero_data(EDGES), ValueError, ("data", "dict")),
    (
        "hetero_data-node_type",
        lambda: MultiGraph.from_hetero_data(hetero_data(), "genes"),
        ValueError,
        ("node_type", "'genes'", "'gene'?"),
    ),
    (
        "hetero_data-weight",
        lambda: MultiGraph.from_hetero_data(hetero_data(edge_weight=ids([nan]))),
        ValueError,
        ("edge_weight['physical']", "holds nan"),
    ),
    (
        "hetero_data-index",
        lambda: MultiGraph.from_hetero_data(hetero_data(edge_index=ids([[0], [3]]))),
        ValueError,
        ("edge_index['physical']", "holds 3"),
    ),
]

METHODS: list[Case] = [
    ("relation-unknown", lambda: GRAPH.col("physcal"), ValueError, ("relation", "'physcal'", "'physical'?")),
    ("relation-position", lambda: GRAPH.num_edges(0), ValueError, ("relation", "0")),  # type: ignore[arg-type]
    ("relation-list", lambda: GRAPH.weight(["tflink"]), ValueError, ("relation", "['tflink']")),  # type: ignore[arg-type]
    ("relation-missing", lambda: GRAPH.known(None), ValueError, ("relation", "None")),  # type: ignore[arg-type]
    ("relation-of-none", lambda: MultiGraph.from_edge_index({}, 3).rowptr("x"), ValueError, ("relation", "'x'", "nothing")),
    ("extend-negative", lambda: GRAPH.extend(-1), ValueError, ("num_new", "-1")),
    ("extend-float", lambda: GRAPH.extend(1.5), TypeError, ("num_new", "1.5")),  # type: ignore[arg-type]
    ("extend-huge", lambda: GRAPH.extend(10**12), ValueError, ("num_nodes", "1000000000005")),
    ("extend-list", lambda: GRAPH.extend(1, [1]), TypeError, ("edge_index", "list [1]")),  # type: ignore[arg-type]
    ("extend-tensor", lambda: GRAPH.extend(1, ids([[5], [0]])), TypeError, ("edge_index", "[2, 1]")),  # type: ignore[arg-type]
    ("extend-relation", lambda: GRAPH.extend(1, {"phys": ids([[5], [0]])}), ValueError, ("relation", "'phys'", "'physical'?")),
    ("extend-range", lambda: GRAPH.extend(1, {"tflink": ids([[6], [0]])}), ValueError, ("'tflink'", "holds 6", "[0, 6)")),
    ("extend-old-pair", lambda: GRAPH.extend(1, {"tflink": ids([[2], [0]])}), ValueError, ("'tflink'", "[2, 0]", "not new")),
    (
        "extend-weight",
        lambda: GRAPH.extend(1, {"tflink": ids([[5], [0]])}, edge_weight={"tflink": ids([-1.0])}),
        ValueError,
        ("edge_weight['tflink']", "holds -1.0"),
    ),
    (
        "extend-meta",
        lambda: GRAPH.extend(1, {name: torch.zeros(2, 1, dtype=torch.int64, device="meta") for name in EDGES}),
        ValueError,
        ("edge_index['physical']", "meta"),
    ),
    ("subgraph-list", lambda: GRAPH.subgraph([0, 1]), TypeError, ("nodes", "[0, 1]")),  # type: ignore[arg-type]
    ("subgraph-mask", lambda: GRAPH.subgraph(torch.ones(N).bool()), ValueError, ("nodes", "bool")),
    ("subgraph-float", lambda: GRAPH.subgraph(ids([0.0])), ValueError, ("nodes", "float32")),
    ("subgraph-negative", lambda: GRAPH.subgraph(ids([0, -2])), ValueError, ("nodes", "-2")),
    ("subgraph-large", lambda: GRAPH.subgraph(ids([0, 5])), ValueError, ("nodes", "5", "[0, 5)")),
    ("subgraph-twice", lambda: GRAPH.subgraph(ids([3, 0, 3])), ValueError, ("nodes", "3 twice")),
    ("subgraph-none", lambda: GRAPH.subgraph(ids([], dtype=torch.int64)), ValueError, ("nodes", "none")),
    ("subgraph-2d", lambda: GRAPH.subgraph(ids([[0]])), ValueError, ("nodes", "[1, 1]")),
    ("subgraph-meta", lambda: GRAPH.subgraph(ids([0], device="meta")), ValueError, ("nodes", "meta")),
    ("to-unknown", lambda: GRAPH.to("gpu"), ValueError, ("device", "'gpu'")),
    ("to-none", lambda: GRAPH.to(None), ValueError, ("device", "None")),  # type: ignore[arg-type]
    ("to-dtype", lambda: GRAPH.to(torch.float64), ValueError, ("device", "torch.float64")),  # type: ignore[arg-type]
    ("to-absent", lambda: GRAPH.to("cuda:99"), ValueError, ("device", "'cuda:99' is not there")),
    ("to-meta", lambda: GRAPH.to("meta"), ValueError, ("device", "meta")),
    ("load-missing", lambda: MultiGraph.load("no/such.safetensors"), FileNotFoundError, ("no/such.safetensors",)),
    ("load-folder", lambda: MultiGraph.load(Path(__file__).parent), ValueError, ("path", str(Path(__file__).parent))),
    ("load-foreign", lambda: MultiGraph.load(__file__), ValueError, ("path", __file__)),
    ("load-none", lambda: MultiGraph.load(None), TypeError, ("path", "None")),  # type: ignore[arg-type]
    ("load-number", lambda: MultiGraph.load(3), TypeError, ("path", "int 3")),  # type: ignore[arg-type]
    ("load-bytes", lambda: MultiGraph.load(b"g"), TypeError, ("path", "b'g'")),  # type: ignore[arg-type]
    ("save-none", lambda: GRAPH.save(None), TypeError, ("path", "None")),  # type: ignore[arg-type]
    ("save-folder", lambda: GRAPH.save(Path(__file__).parent), ValueError, ("path", str(Path(__file__).parent))),
    ("save-nowhere", lambda: GRAPH.save("no/such/folder/g"), FileNotFoundError, ("no/such/folder",)),
]

ATTENTION: list[Case] = [
    ("q-none", attend(q=None), TypeError, ("q", "None")),
    ("q-numpy", attend(q=QUERIES.numpy()), TypeError, ("q", "ndarray")),
    ("q-list", attend(q=[[1.0]]), TypeError, ("q", "[[1.0]]")),
    ("q-int", attend(q=QUERIES.long()), ValueError, ("q", "int64")),
    ("q-bool", attend(q=QUERIES > 0), ValueError, ("q", "bool")),
    ("q-complex", attend(q=QUERIES.to(torch.complex64)), ValueError, ("q", "complex64")),
    ("q-float8", attend(q=QUERIES.to(torch.float8_e5m2)), ValueError, ("q", "float8_e5m2")),
    ("q-sparse", attend(q=QUERIES.to_sparse()), ValueError, ("q", "torch.sparse_coo")),
    (
        "q-nested",
        lambda: attend(q=torch.nested.nested_tensor([rand(2, D), rand(3, D)], layout=torch.jagged))(),
        ValueError,
        ("q", "nested float32 tensor"),
    ),
    (
        "q-nested-strided",
        lambda: attend(q=torch.nested.nested_tensor([rand(2, D), rand(3, D)], layout=torch.strided))(),
        ValueError,
        ("q", "nested float32 tensor"),
    ),
    ("q-1d", attend(q=rand(D)), ValueError, ("q", "[4]")),
    ("q-scalar", attend(q=ids(1.0)), ValueError, ("q", "got []")),
    ("q-no-features", attend(q=rand(H, T, 0), k=rand(H, T, 0)), ValueError, ("q", "[2, 6, 0]")),
    ("q-meta", attend(q=META), ValueError, ("q", "cpu", "meta")),
    ("k-no-tokens", attend(k=rand(H, 0, D), v=rand(H, 0, D)), ValueError, ("k", "[2, 0, 4]")),
    ("k-features", attend(k=rand(H, T, D + 1)), ValueError, ("k", "[2, 6, 5]")),
    ("k-heads", attend(k=rand(H + 1, T, D)), ValueError, ("k", "[3, 6, 4]")),
    ("k-broadcast", attend(k=rand(1, T, D)), ValueError, ("k", "[1, 6, 4]")),
    ("k-dtype", attend(k=QUERIES.double()), ValueError, ("k", "torch.float32", "torch.float64")),
    ("k-meta", attend(k=META), ValueError, ("k", "meta")),
    ("v-none", attend(v=None), TypeError, ("v", "None")),
    ("v-tokens", attend(v=rand(H, T + 1, D)), ValueError, ("v", "[2, 7, 4]")),
    ("v-dtype", attend(v=QUERIES.bfloat16()), ValueError, ("v", "torch.bfloat16")),
    ("v-scalar", attend(v=ids(1.0)), ValueError, ("v", "got []")),
    ("v-meta", attend(v=META), ValueError, ("v", "meta")),
    ("scale-nan", attend(scale=nan), ValueError, ("scale", "nan")),
    ("scale-inf", attend(scale=-inf), ValueError, ("scale", "-inf")),
    ("scale-huge", attend(scale=10**400), ValueError, ("scale", "1" + "0" * 76)),
    ("scale-str", attend(scale="0.5"), ValueError, ("scale", "'0.5'")),
    ("scale-tensor", attend(scale=ids([0.5])), ValueError, ("scale", "tensor")),
    ("scale-learned", attend(scale=torch.ones((), requires_grad=True)), ValueError, ("scale", "tensor", "gradient")),
    ("scale-bool", attend(scale=True), ValueError, ("scale", "True")),
    ("lse-k-list", log_sum(k=[1]), TypeError, ("k", "[1]")),
    ("lse-scale", log_sum(scale=nan), ValueError, ("scale", "nan")),
    ("key_mask-float", log_sum(key_mask=torch.ones(T)), ValueError, ("key_mask", "float32")),
    ("key_mask-list", log_sum(key_mask=[True] * T), TypeError, ("key_mask", "list")),
    ("key_mask-short", log_sum(key_mask=torch.ones(N).bool()), ValueError, ("key_mask", "[6]", "[5]")),
    ("key_mask-one", log_sum(key_mask=torch.ones(1).bool()), ValueError, ("key_mask", "[1]")),
    ("key_mask-scalar", log_sum(key_mask=ids(True)), ValueError, ("key_mask", "got []")),
    ("key_mask-heads", log_sum(key_mask=torch.ones(3, T).bool()), ValueError, ("key_mask", "[3, 6]")),
    ("key_mask-pairs", log_sum(key_mask=torch.ones(H, T, T).bool()), ValueError, ("key_mask", "[2, 6, 6]")),
    ("key_mask-meta", log_sum(key_mask=torch.ones(T, device="meta").bool()), ValueError, ("key_mask", "meta")),
]

LOSSES: list[Case] = [
    (f"{name}-{case}", call, expected, words)
    for name, loss in (("kl", kl), ("bce", bce))
    for case, call, expected, words in of_every_loss(loss)
]
LOSSES += [
    ("kl-over-word", kl(over="known"), ValueError, ("over", "'known'")),
    ("kl-over-none", kl(over=None), ValueError, ("over", "None")),
    ("kl-over-array", kl(over=np.array(["tokens", "valid"])), ValueError, ("over", "array")),
    ("bce-target-word", bce(target="normalised"), ValueError, ("target", "'normalised'", "'normalized'?")),
    ("bce-link-word", bce(link="sigmod"), ValueError, ("link", "'sigmod'", "'sigmoid'?")),
    ("bce-link-function", bce(link=torch.sigmoid), ValueError, ("link", "sigmoid")),
    ("bce-num_negatives-0", bce(num_negatives=0), ValueError, ("num_negatives", "0")),
    ("bce-num_negatives-negative", bce(num_negatives=-5), ValueError, ("num_negatives", "-5")),
    ("bce-num_negatives-float", bce(num_negatives=2.0), TypeError, ("num_negatives", "2.0")),
    ("bce-num_negatives-bool", bce(num_negatives=True), TypeError, ("num_negatives", "True")),
    ("bce-num_negatives-tensor", bce(num_negatives=ids([3])), TypeError, ("num_negatives", "tensor")),
    ("bce-num_negatives-huge", bce(num_negatives=10**12), ValueError, ("num_negatives", "1000000000000")),
    ("bce-generator-seed", bce(num_negatives=1, generator=0), TypeError, ("generator", "int 0")),
    ("bce-generator-numpy", bce(generator=np.random.default_rng(0)), TypeError, ("generator", "Generator")),
]

GRAPH_ATTENTION: list[Case] = [
    ("ties-none", tied(None), ValueError, ("ties", "None")),
    ("ties-str", tied("physical"), ValueError, ("ties", "'physical'")),
    ("ties-dict", tied({"physical": 0}), ValueError, ("ties", "{'physical': 0}")),
    ("ties-bare-pair", tied(("physical", 0)), ValueError, ("ties[0]", "'physical'")),
    ("ties-names", tied(["physical", "tflink"]), ValueError, ("ties[0]", "'physical'")),
    ("ties-triple", tied([("physical", 0, 1.0)]), ValueError, ("ties[0]", "('physical', 0, 1.0)")),
    ("ties-swapped", tied([(0, "physical")]), ValueError, ("relation", "0")),
    ("tie-relation", tied([("physical", 0), ("tflnk", 1)]), ValueError, ("relation", "'tflnk'", "'tflink'?")),
    ("tie-head-large", tied([("physical", 2)]), ValueError, ("ties[0]", "[0, 2)", "int 2")),
    ("tie-head-negative", tied([("physical", -1)]), ValueError, ("ties[0]", "int -1")),
    ("tie-head-float", tied([("physical", 0.0)]), ValueError, ("ties[0]", "0.0")),
    ("tie-head-bool", tied([("physical", True)]), ValueError, ("ties[0]", "True")),
    ("tie-head-none", tied([("physical", None)]), ValueError, ("ties[0]", "None")),
    ("tie-second", tied([("physical", 0), ("tflink", 7)]), ValueError, ("ties[1]", "int 7")),
    ("q-one-head", tied(q=rand(T, D)), ValueError, ("q", "heads", "[6, 4]")),
    ("q-genes-alone", tied(q=rand(H, N, D)), ValueError, ("q", "1 prefix tokens", "[2, 5, 4]")),
    ("q-meta", tied(q=META), ValueError, ("graph", "meta")),
    ("graph-none", tied(graph=None), TypeError, ("graph", "None")),
    (
        "k-tokens",
        lambda: graph_attention(QUERIES, rand(H, T + 1, D), rand(H, T + 1, D), GRAPH, ()),
        ValueError,
        ("k", "[2, 7, 4]"),
    ),
    ("v-none", lambda: graph_attention(QUERIES, QUERIES, None, GRAPH, ()), TypeError, ("v", "None")),  # type: ignore[arg-type]
    ("v-scalar", lambda: graph_attention(QUERIES, QUERIES, ids(1.0), GRAPH, ()), ValueError, ("v", "got []")),
    ("loss-word", tied(loss="mse"), ValueError, ("loss", "'mse'")),
    ("loss-case", tied(loss="KL"), ValueError, ("loss", "'KL'")),
    ("loss-none", tied(loss=None), ValueError, ("loss", "None")),
    ("over", tied(over="token"), ValueError, ("over", "'token'", "'tokens'?")),
    ("reduction", tied(reduction="batchmean"), ValueError, ("reduction", "'batchmean'")),
    ("target", tied(target=""), ValueError, ("target", "''")),
    ("link", tied(loss="bce", link="tanh"), ValueError, ("link", "'tanh'")),
    ("num_prefix", tied(num_prefix=2), ValueError, ("q", "2 prefix tokens", "[2, 6, 4]")),
    ("num_prefix-bool", tied(num_prefix=True), TypeError, ("num_prefix", "True")),
    ("scale", tied(scale=inf), ValueError, ("scale", "inf")),
    ("num_negatives", tied(num_negatives=-3), ValueError, ("num_negatives", "-3")),
    ("generator", tied(generator="seed"), TypeError, ("generator", "'seed'")),
    ("rows-large", tied(rows=ids([9])), ValueError, ("rows", "position 0 holds 9")),
    ("rows-list", tied(rows=[0]), TypeError, ("rows", "[0]")),
    ("rows-relation", tied(rows={"physicl": ids([0])}), ValueError, ("relation", "'physicl'", "'physical'?")),
    ("rows-by-relation", tied(rows={"tflink": ids([0, 7])}), ValueError, ("rows['tflink']", "position 1 holds 7")),
    ("rows-by-relation-list", tied(rows={"tflink": [0]}), TypeError, ("rows['tflink']", "[0]")),
]

SAMPLE_ROWS: list[Case] = [
    ("graph-none", rows(graph=None), TypeError, ("graph", "None")),
    ("relation", rows(relation="tflinks"), ValueError, ("relation", "'tflinks'", "'tflink'?")),
    ("num_rows-large", rows(4), ValueError, ("num_rows", "[0, 3]", "int 4")),
    ("num_rows-without-edges", rows(1, graph=LONELY), ValueError, ("num_rows", "[0, 0]", "int 1")),
    ("num_rows-negative", rows(-1), ValueError, ("num_rows", "-1")),
    ("num_rows-float", rows(2.0), ValueError, ("num_rows", "2.0")),
    ("num_rows-bool", rows(True), ValueError, ("num_rows", "True")),
    ("num_rows-none", rows(None), ValueError, ("num_rows", "None")),
    ("num_rows-fraction", rows(0.5), ValueError, ("num_rows", "0.5")),
    ("generator-seed", rows(generator=42), TypeError, ("generator", "int 42")),
    ("generator-numpy", rows(generator=np.random.default_rng(0)), TypeError, ("generator", "Generator")),
]

PERTURBATION_ATTENTION: list[Case] = [
    ("query-none", perturb(query=None), TypeError, ("query", "None")),
    ("query-int", perturb(query=torch.ones(2, D).long()), ValueError, ("query", "int64")),
    ("query-1d", perturb(query=rand(D)), ValueError, ("query", "[4]")),
    ("query-no-features", perturb(query=rand(2, 0), key=rand(N, 0)), ValueError, ("query", "[2, 0]")),
    ("query-sets", perturb(query=rand(3, D)), ValueError, ("ptr", "4 entries for 3 sets", "got 3")),
    ("query-sparse", perturb(query=rand(2, D).to_sparse()), ValueError, ("query", "torch.sparse_coo")),
    ("key-features", perturb(key=rand(N, D + 1)), ValueError, ("key", "[5, 4]", "[5, 5]")),
    ("key-no-genes", perturb(key=rand(0, D), value=rand(0, 3)), ValueError, ("key", "[0, 4]")),
    ("key-heads", perturb(key=rand(H, N, D)), ValueError, ("key", "[2, 5, 4]")),
    ("key-dtype", perturb(key=rand(N, D).double()), ValueError, ("key", "torch.float64")),
    ("value-genes", perturb(value=rand(N + 1, 3)), ValueError, ("value", "[6, 3]")),
    ("value-numpy", perturb(value=np.ones((N, 3))), TypeError, ("value", "ndarray")),
    ("value-meta", perturb(value=torch.empty(N, 3, device="meta")), ValueError, ("value", "meta")),
    ("override-entries", perturb(override=rand(2, 3)), ValueError, ("override", "[3, 3]", "[2, 3]")),
    ("override-features", perturb(override=rand(3, 2)), ValueError, ("override", "[3, 2]")),
    ("override-none", perturb(override=None), TypeError, ("override", "None")),
    ("index-none", perturb(index=None), TypeError, ("index", "None")),
    ("index-list", perturb(index=[0, 3, 1]), TypeError, ("index", "[0, 3, 1]")),
    ("index-int32", perturb(index=ids([0, 3, 1]).int()), ValueError, ("index", "int32")),
    ("index-float", perturb(index=ids([0.0, 3.0, 1.0])), ValueError, ("index", "float32")),
    ("index-large", perturb(index=ids([0, 5, 1])), ValueError, ("index", "position 1 holds 5", "[0, 5)")),
    ("index-negative", perturb(index=ids([0, 3, -1])), ValueError, ("index", "position 2 holds -1")),
    ("index-2d", perturb(index=ids([[0, 3, 1]])), ValueError, ("index", "[1, 3]")),
    ("index-scalar", perturb(index=ids(0)), ValueError, ("index", "shape []")),
    ("index-meta", perturb(index=ids([0, 3, 1], device="meta")), ValueError, ("index", "meta")),
    ("index-gene-twice", perturb(index=ids([3, 3, 1])), ValueError, ("index", "set 0", "gene 3 twice")),
    ("ptr-none", perturb(ptr=None), TypeError, ("ptr", "None")),
    ("ptr-list", perturb(ptr=[0, 2, 3]), TypeError, ("ptr", "[0, 2, 3]")),
    ("ptr-int32", perturb(ptr=ids([0, 2, 3]).int()), ValueError, ("ptr", "int32")),
    ("ptr-lengths", perturb(ptr=ids([2, 1])), ValueError, ("ptr", "3 entries for 2 sets", "got 2")),
    ("ptr-start", perturb(ptr=ids([1, 2, 3])), ValueError, ("ptr", "start with 0", "got 1")),
    ("ptr-end-large", perturb(ptr=ids([0, 2, 4])), ValueError, ("ptr", "end with 3", "got 4")),
    ("ptr-end-small", perturb(ptr=ids([0, 1, 2])), ValueError, ("ptr", "end with 3", "got 2")),
    ("ptr-negative", perturb(ptr=ids([0, -1, 3])), ValueError, ("ptr", "rise", "-1 after 0")),
    ("ptr-falls", perturb(ptr=ids([0, 7, 3])), ValueError, ("ptr", "rise", "3 after 7")),
    ("ptr-2d", perturb(ptr=ids([[0, 2, 3]])), ValueError, ("ptr", "[1, 3]")),
    ("scale-none", perturb(scale=None), ValueError, ("scale", "None")),
    ("scale-nan", perturb(scale=nan), ValueError, ("scale", "nan")),
]

KHOP_SUBGRAPH: list[Case] = [
    *of_every_traversal(extract),
    ("drop_seeds-int", extract(drop_seeds=1), TypeError, ("drop_seeds", "int 1")),
    ("return_edge_id-none", extract(return_edge_id=None), TypeError, ("return_edge_id", "None")),
    ("index_dtype-int16", extract(index_dtype=torch.int16), ValueError, ("index_dtype", "torch.int16")),
    ("index_dtype-str", extract(index_dtype="int32"), ValueError, ("index_dtype", "'int32'")),
    ("layout-word", extract(layout="csc"), ValueError, ("layout", "'csc'")),
    ("layout-torch", extract(layout=torch.sparse_csr), ValueError, ("layout", "torch.sparse_csr")),
    ("out-dict", extract(out={}), TypeError, ("out", "dict {}")),
    ("out-tensor", extract(out=rand(3)), TypeError, ("out", "float32 tensor of shape [3]")),
    ("max_nodes-alone", extract(max_nodes=9), ValueError, ("max_edges", "max_nodes", "None")),
    ("max_edges-alone", extract(max_edges=9), ValueError, ("max_nodes", "max_edges", "None")),
    ("max_nodes-negative", extract(max_nodes=-1, max_edges=9), ValueError, ("max_nodes", "-1")),
    ("max_nodes-float", extract(max_nodes=9.0, max_edges=9), TypeError, ("max_nodes", "9.0")),
    ("max_edges-negative", extract(max_nodes=9, max_edges=-1), ValueError, ("max_edges", "-1")),
    ("max_edges-list", extract(max_nodes=9, max_edges=[9, 9]), TypeError, ("max_edges", "list [9, 9]")),
    ("max_edges-missing", extract(max_nodes=9, max_edges={"physical": 9}), ValueError, ("max_edges", "'tflink'")),
    (
        "max_edges-unknown",
        extract(max_nodes=9, max_edges={"physical": 9, "tflnk": 9}),
        ValueError,
        ("relation", "'tflnk'", "'tflink'?"),
    ),
    (
        "max_edges-one-negative",
        extract(max_nodes=9, max_edges={"physical": 9, "tflink": -1}),
        ValueError,
        ("max_edges['tflink']", "-1"),
    ),
    (
        "max_nodes-int32",
        extract(max_nodes=2**31, max_edges=9, index_dtype=torch.int32),
        ValueError,
        ("index_dtype", "2147483648 nodes"),
    ),
    ("max_nodes-huge", extract(max_nodes=10**15, max_edges=9), MemoryError, ("1,000,000,000,000,000 nodes", "max_nodes")),
]

MASKED_SPMM: list[Case] = [
    ("graph-none", messages(graph=None), TypeError, ("graph", "None")),
    ("relation-unknown", messages(relation="physic"), ValueError, ("relation", "'physic'", "'physical'?")),
    ("x-list", messages(x=[1.0]), TypeError, ("x", "list [1.0]")),
    ("x-int", messages(x=torch.ones(N, D).long()), ValueError, ("x", "int64")),
    ("x-1d", messages(x=rand(N)), ValueError, ("x", "[5]")),
    ("x-tokens", messages(x=rand(T, D)), ValueError, ("x", "[5, F]", "[6, 4]")),
    ("x-samples", messages(x=rand(3, N, D)), ValueError, ("x", "[2, 5, F]", "[3, 5, 4]")),
    ("x-4d", messages(x=rand(1, 2, N, D)), ValueError, ("x", "[1, 2, 5, 4]")),
    ("x-meta", messages(x=rand(N, D).to("meta")), ValueError, ("x", "meta")),
    ("keep-none", messages(keep=None), TypeError, ("keep", "None")),
    ("keep-float", messages(keep=rand(2, N)), ValueError, ("keep", "float32")),
    ("keep-1d", messages(keep=torch.ones(N).bool()), ValueError, ("keep", "[5]")),
    ("keep-transposed", messages(keep=torch.ones(N, 2).bool()), ValueError, ("keep", "[B, 5]", "[5, 2]")),
    ("keep-meta", messages(keep=torch.ones(2, N, device="meta").bool()), ValueError, ("keep", "meta")),
    ("words-alone", messages(keep=torch.ones(N, 1).long()), ValueError, ("num_sets", "None")),
    ("words-few", messages(keep=torch.ones(N, 1).long(), num_sets=65), ValueError, ("keep", "[5, 2]", "[5, 1]")),
    ("words-genes", messages(keep=torch.ones(T, 1).long(), num_sets=2), ValueError, ("keep", "[5, 1]", "[6, 1]")),
    ("num_sets-other", messages(num_sets=3), ValueError, ("num_sets", "3", "2")),
    ("num_sets-negative", messages(keep=torch.ones(N, 0).long(), num_sets=-1), ValueError, ("num_sets", "-1")),
    ("num_sets-float", messages(keep=torch.ones(N, 1).long(), num_sets=2.0), TypeError, ("num_sets", "2.0")),
    ("reduce-word", messages(reduce="avg"), ValueError, ("reduce", "'avg'")),
    ("transpose-int", messages(transpose=1), TypeError, ("transpose", "int 1")),
    ("weight-short", messages(edge_weight=rand(2)), ValueError, ("edge_weight", "3 weights", "got 2")),
    ("weight-int", messages(edge_weight=ids([1, 2, 3])), ValueError, ("edge_weight", "int64")),
    ("weight-2d", messages(edge_weight=rand(3, 1)), ValueError, ("edge_weight", "[3, 1]")),
    ("weight-dict", messages(edge_weight={"physical": rand(3)}), TypeError, ("edge_weight", "dict")),
    ("weight-meta", messages(edge_weight=rand(3).to("meta")), ValueError, ("edge_weight", "meta")),
]

NETWORK_MSE: list[Case] = [
    ("graph-none", reconstruct(graph=None), TypeError, ("graph", "None")),
    ("relation-unknown", reconstruct(relation="physic"), ValueError, ("relation", "'physic'", "'physical'?")),
    ("z-list", reconstruct(z=[1.0]), TypeError, ("z", "list [1.0]")),
    ("z-int", reconstruct(z=torch.ones(N, D).long()), ValueError, ("z", "int64")),
    ("z-tokens", reconstruct(z=rand(T, D)), ValueError, ("z", "[5, D]", "[6, 4]")),
    ("z-3d", reconstruct(z=rand(H, N, D)), ValueError, ("z", "2 dimension(s)", "[2, 5, 4]")),
    ("z-empty", reconstruct(z=rand(N, 0), weight=rand(N, 0)), ValueError, ("z", "[5, 0]")),
    ("z-meta", reconstruct(z=rand(N, D).to("meta")), ValueError, ("z", "meta")),
    ("weight-none", reconstruct(weight=None), TypeError, ("weight", "None")),
    ("weight-transposed", reconstruct(weight=rand(D, N)), ValueError, ("weight", "[5, 4]", "[4, 5]")),
    ("weight-dtype", reconstruct(weight=rand(N, D).double()), ValueError, ("weight", "torch.float64", "torch.float32")),
    ("bias-none", reconstruct(bias=None), TypeError, ("bias", "None")),
    ("bias-column", reconstruct(bias=rand(N, 1)), ValueError, ("bias", "[5]", "[5, 1]")),
    ("bias-dtype", reconstruct(bias=rand(N).half()), ValueError, ("bias", "torch.float16")),
    ("zero_weight-negative", reconstruct(zero_weight=-0.1), ValueError, ("zero_weight", "-0.1")),
    ("zero_weight-nan", reconstruct(zero_weight=nan), ValueError, ("zero_weight", "nan")),
    ("zero_weight-tensor", reconstruct(zero_weight=rand(1)), ValueError, ("zero_weight", "float32 tensor of shape [1]")),
    ("rows-large", reconstruct(rows=ids([0, 5])), ValueError, ("rows", "position 1 holds 5", "[0, 5)")),
    ("rows-mask", reconstruct(rows=torch.ones(N).bool()), ValueError, ("rows", "bool")),
    ("rows-list", reconstruct(rows=[0, 1]), TypeError, ("rows", "[0, 1]")),
    ("reduction-word", reconstruct(reduction="avg"), ValueError, ("reduction", "'avg'")),
]

RELATIONAL_SPMM: list[Case] = [
    ("x-list", relational(x=[1.0]), TypeError, ("x", "list [1.0]")),
    ("x-int", relational(x=torch.ones(3, D).long()), ValueError, ("x", "int64")),
    ("x-1d", relational(x=rand(3)), ValueError, ("x", "[3, 2, F] or [3, F]", "[3]")),
    ("x-genes", relational(x=rand(N, D)), ValueError, ("x", "[3, 2, F] or [3, F]", "[5, 4]")),
    ("x-places", relational(shared=True), ValueError, ("x", "[5, 2, F] or [5, F]", "[3, 4]")),
    ("x-relations", relational(x=rand(3, 3, D)), ValueError, ("x", "[3, 2, F]", "[3, 3, 4]")),
    ("x-some-relations", relational(x=rand(3, 2, D), relations=["tflink"]), ValueError, ("x", "[3, 1, F]", "[3, 2, 4]")),
    ("x-4d", relational(x=rand(3, 2, D, 1)), ValueError, ("x", "[3, 2, 4, 1]")),
    ("x-meta", relational(x=rand(3, D).to("meta")), ValueError, ("x", "meta")),
    ("scale-number", relational(scale=2.0), TypeError, ("scale", "float 2.0")),
    ("scale-degree", relational(scale=torch.ones(4, 2).int()), ValueError, ("scale", "int32")),
    ("scale-1d", relational(scale=rand(4)), ValueError, ("scale", "[4]")),
    ("scale-source", relational(scale=rand(3, 2)), ValueError, ("scale", "[4, 2]", "[3, 2]")),
    ("scale-relations", relational(scale=rand(4, 2), relations=["tflink"]), ValueError, ("scale", "[4, 1]", "[4, 2]")),
    ("scale-gradient", relational(scale=rand(4, 2).requires_grad_()), ValueError, ("scale", "constant", "detach")),
    ("scale-meta", relational(scale=rand(4, 2).to("meta")), ValueError, ("scale", "meta")),
    ("sum_relations-int", relational(sum_relations=1), TypeError, ("sum_relations", "int 1")),
    ("shared-none", relational(shared=None), TypeError, ("shared", "None")),
]

DATA: list[Case] = [
    ("names-str", lambda: GeneList("YAL001C"), TypeError, ("names", "'YAL001C'")),
    ("names-twice", lambda: GeneList(["a", "b", "a"]), ValueError, ("names", "'a'", "0 and 2")),
    ("names-none", lambda: GeneList(None), TypeError, ("names", "None")),  # type: ignore[arg-type]
    ("names-set", lambda: GeneList({"a"}), TypeError, ("names", "order", "{'a'}")),
    ("aliases-list", lambda: GeneList(["a"], aliases=["b"]), TypeError, ("aliases", "['b']")),  # type: ignore[arg-type]
    ("aliases-lists", lambda: GeneList(["a"], aliases={"b": ["a"]}), ValueError, ("aliases", "'b'", "['a']")),  # type: ignore[dict-item]
    ("index-none", lambda: GeneList(["a"]).index(None), TypeError, ("names", "None")),  # type: ignore[arg-type]
    ("index-list", lambda: GeneList(["a"]).index([["a"]]), ValueError, ("names", "['a']")),  # type: ignore[list-item]
    ("extend-str", lambda: GeneList(["a"]).extend("bc"), TypeError, ("names", "'bc'")),
    ("select-list", lambda: GeneList(["a", "b"]).select([0]), TypeError, ("indices", "[0]")),  # type: ignore[arg-type]
    ("select-mask", lambda: GeneList(["a", "b"]).select(ids([True, False])), ValueError, ("indices", "bool")),
    ("select-negative", lambda: GeneList(["a", "b"]).select(ids([-1])), ValueError, ("indices", "holds -1")),
    ("select-twice", lambda: GeneList(["a", "b"]).select(ids([1, 0, 1])), ValueError, ("indices", "1 twice")),
    ("select-meta", lambda: GeneList(["a"]).select(ids([0], device="meta")), ValueError, ("indices", "meta")),
    ("sets-none", lambda: PerturbationDataset.from_sets(None, num_genes=N), TypeError, ("sets", "None")),  # type: ignore[arg-type]
    ("sets-mask", lambda: PerturbationDataset.from_sets([[True, False]], num_genes=N), TypeError, ("sets", "bool True")),
    (
        "sets-mask-numpy",
        lambda: PerturbationDataset.from_sets(np.array([[True, False]]), num_genes=N),
        TypeError,
        ("sets", "sample 0", "bool"),
    ),
    (
        "sets-mask-tensor",
        lambda: PerturbationDataset.from_sets([ids([True, False])], num_genes=N),  # type: ignore[list-item]
        TypeError,
        ("sets", "sample 0", "bool tensor"),
    ),
    ("names-int", lambda: GeneList(["a", 3]), TypeError, ("names", "position 1", "int 3")),  # type: ignore[list-item]
    (
        "table-missing",
        lambda: read_edge_table("no/such.tsv", GeneList(["a"]), source="tf", target="target"),
        FileNotFoundError,
        ("no/such.tsv",),
    ),
    ("links-path", lambda: read_string_links(None, GeneList(["a"])), TypeError, ("path", "None")),  # type: ignore[arg-type]
    ("seeds-list", dataset(seeds=[0, 3]), TypeError, ("seeds", "[0, 3]")),
    ("seeds-large", dataset(seeds=ids([0, 5])), ValueError, ("seeds", "holds 5")),
    ("types-large", dataset(types=ids([0, 99])), ValueError, ("types", "holds 99")),
    ("ptr-end", dataset(ptr=ids([0, 3])), ValueError, ("ptr", "3")),
    ("y-nan", dataset(y=ids([nan])), ValueError, ("y", "nan")),
    ("gene-twice", dataset(seeds=ids([3, 3])), ValueError, ("seeds", "3")),
    ("synthetic-genes", lambda: synthetic_cell(num_genes=-1), ValueError, ("num_genes", "-1")),
]

MODULES: list[Case] = [
    ("num_heads", lambda: GraphRegularizedAttention(10, 3), ValueError, ("num_heads", "10", "3")),
    ("ties-head", lambda: GraphRegularizedAttention(8, 2, ties=[("r", 2)]), ValueError, ("ties", "head", "2")),
    ("dim-float", lambda: CellEncoder(8.0, 1, 2), TypeError, ("dim", "8.0")),  # type: ignore[arg-type]
    ("norm", lambda: CellEncoder(8, 1, 2, norm="layer"), ValueError, ("norm", "'layer'")),
    ("dropout", lambda: CellEncoder(8, 1, 2, dropout=1.5), ValueError, ("dropout", "1.5")),
    ("ties-none", lambda: CellEncoder(8, 1, 2, ties=None), TypeError, ("ties", "None")),  # type: ignore[arg-type]
    ("ties-bare", lambda: CellEncoder(8, 1, 2, ties=(0, 0, "r", 1.0)), ValueError, ("ties", "entry 0", "int 0")),  # type: ignore[arg-type]
    (
        "ties-generator",  # it would be empty for whoever reads it next
        lambda: CellEncoder(8, 1, 2, ties=((0, h, "r", 1.0) for h in range(2))),  # type: ignore[arg-type]
        TypeError,
        ("ties", "generator"),
    ),
    ("masks-pair", lambda: CellEncoder(8, 1, 2, masks=[(0, 1)]), ValueError, ("masks", "entry 0", "(0, 1)")),  # type: ignore[list-item]
    ("pairs-bare", lambda: GraphRegularizedAttention(8, 2, ties=("r", 1)), ValueError, ("ties", "entry 0", "'r'")),  # type: ignore[arg-type]
    ("pool-none", lambda: PerturbationHead(8, num_types=5, pool=None), TypeError, ("pool", "None")),  # type: ignore[arg-type]
    (
        "gene_ids-meta",
        lambda: GeneTokens(8, num_genes=3)(2, gene_ids=ids([0, 1], device="meta")),
        ValueError,
        ("gene_ids", "cpu", "meta"),
    ),
    ("extend-model", lambda: extend_genes("m", 1), TypeError, ("model", "'m'")),  # type: ignore[arg-type]
    ("extend-nothing", lambda: extend_genes(torch.nn.Linear(2, 2), 1), ValueError, ("model", "GeneTokens", "Linear")),
    ("layer", lambda: CellEncoder(8, 1, 2, ties=[(1, 0, "r", 1.0)]), ValueError, ("ties", "layer", "1")),
    ("sagnn-ptr", lambda: HyperSAGNN(8)(rand(3, 8), ids([0, 2])), ValueError, ("ptr", "2")),
    ("pool", lambda: PerturbationHead(8, num_types=5, pool="max"), ValueError, ("pool", "'max'")),
    ("h-features", head(h=rand(N, 7)), ValueError, ("h", "[5, 7]")),
    ("head-seeds-large", head(seeds=ids([0, 9])), ValueError, ("seeds", "holds 9")),
    ("head-gene-twice", head(seeds=ids([3, 3])), ValueError, ("seeds", "gene 3 twice")),
    ("head-types-short", head(types=ids([1])), ValueError, ("types", "1")),
]

CASES = {
    "graph": CONSTRUCTORS,
    "method": METHODS,
    "attention": ATTENTION,
    "loss": LOSSES,
    "graph_attention": GRAPH_ATTENTION,
    "sample_rows": SAMPLE_ROWS,
    "perturbation_attention": PERTURBATION_ATTENTION,
    "khop_mask": of_every_traversal(mask),
    "khop_subgraph": KHOP_SUBGRAPH,
    "perturbation_mask": of_every_batch_of_sets(perturbed),
    "masked_spmm": MASKED_SPMM,
    "network_mse": NETWORK_MSE,
    "relational_spmm": [*of_every_product_between_subsets(relational), *RELATIONAL_SPMM],
    "relational_degree": of_every_product_between_subsets(degrees),
    "data": DATA,
    "nn": MODULES,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("call", "expected", "words"),
    [pytest.param(*case, id=f"{group}-{name}") for group, cases in CASES.items() for name, *case in cases],
)
def test_malformed(call: Call, expected: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(expected) as caught:
        call()
    assert caught.type is expected  # an UnicodeError is a ValueError, but no answer
    for word in words:
        # a short word, such as the argument q, must stand as a word of its own
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", str(caught.value)), f"{word!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize("call", [mask, perturbed], ids=["khop_mask", "perturbation_mask"])
@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ({"ptr": ids([0, 10**7, 3])}, "ptr: expected to rise, got 3 after 10000000"),
        pytest.param({"ptr": ids([0, 2, 10**7])}, "ptr: expected to end with 3", marks=pytest.mark.exhaustive),
        pytest.param({"seeds": ids([0, 10**7, 1])}, "seeds: position 1 holds 10000000", marks=pytest.mark.exhaustive),
    ],
    ids=["ptr-falls", "ptr-end", "seeds-large"],
)
def test_malformed_seeds_are_found_in_compiled_code(
    call: Callable[..., Call], sets: dict[str, torch.Tensor], words: str
) -> None:
    """There the extension looks."""
    with pytest.raises(RuntimeError, match=words):
        torch.compile(call(**sets), backend="eager")()


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ({"ptr": ids([0, 10**7, 3])}, "ptr: expected to rise, got 3 after 10000000"),
        pytest.param({"ptr": ids([0, 2, 10**7])}, "ptr: expected to end with 3", marks=pytest.mark.exhaustive),
        pytest.param({"index": ids([0, 10**7, 1])}, "index: position 1 holds 10000000", marks=pytest.mark.exhaustive),
        pytest.param({"index": ids([3, 3, 1])}, "index: set 0 holds gene 3 twice", marks=pytest.mark.exhaustive),
    ],
    ids=["ptr-falls", "ptr-end", "index-large", "gene-twice"],
)
def test_malformed_sets_are_found_in_compiled_code(sets: dict[str, torch.Tensor], words: str) -> None:
    """Values are out of sight while a function is compiled; a falling ptr once crashed the process there."""
    with pytest.raises(ValueError, match=words):
        torch.compile(perturb(**sets), backend="eager")()


def test_the_right_arguments_pass() -> None:
    """What the cases above change one argument of."""
    sets = mask(), extract(), extract(max_nodes=9, max_edges=9), perturbed(), messages(), reconstruct()
    for call in (build(), attend(), log_sum(), kl(), bce(), tied(), rows(), perturb(), *sets, dataset(), head()):
        call()
