"""Graphs of genes and of tokens of other types: what is where, and what is refused of a relation that joins two."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cellattn import MultiGraph, reference
from cellattn.data import GeneList, require_same_genes

from ..compare import cell_with_terms, typed_graph

SIZES = {"gene": 5, "reaction": 3, "metabolite": 4}
INDEX = {
    "physical": torch.tensor([[0, 1, 4], [1, 0, 4]]),
    "catalyses": torch.tensor([[0, 2, 2, 4], [5, 5, 6, 7]]),
    "consumes": torch.tensor([[5, 6, 6], [8, 8, 11]]),
    "regulates": torch.tensor([[9], [3]]),
}
JOINS = {"catalyses": ("gene", "reaction"), "consumes": ("reaction", "metabolite"), "regulates": ("metabolite", "gene")}
WEIGHT = {"consumes": torch.tensor([2.0, 1.0, 0.5])}
NAMES = [f"{name}{i}" for name, size in SIZES.items() for i in range(size)]


def cell(**options: Any) -> MultiGraph:
    options = {"edge_weight": WEIGHT, "node_types": SIZES, "joins": JOINS, **options}
    return MultiGraph.from_edge_index(INDEX, sum(SIZES.values()), **options)


def test_types_stand_one_after_another() -> None:
    graph = cell()
    assert graph.num_nodes == 12
    assert graph.node_types == {"gene": range(5), "reaction": range(5, 8), "metabolite": range(8, 12)}
    assert list(graph.node_types) == list(SIZES)
    assert [graph.joins(name) for name in graph.relations] == [("gene", "gene"), *JOINS.values()]
    assert all(torch.equal(graph.edge_index(name), index) for name, index in INDEX.items())


def test_names_of_a_type() -> None:
    graph = cell(names=GeneList(NAMES, aliases={"alias": "gene2", "other": "reaction0"}))
    assert graph.names_of("gene") == GeneList(NAMES[:5], aliases={"alias": "gene2"})
    assert graph.names_of("reaction") == GeneList(NAMES[5:8], aliases={"other": "reaction0"})
    require_same_genes(graph.names_of("gene"), GeneList(NAMES[:5]))
    assert cell().names_of("gene") is None
    with pytest.raises(ValueError, match=r"node_type: unknown value 'genes', .*did you mean 'gene'"):
        graph.names_of("genes")


def test_genes_alone_are_the_case_of_one_type() -> None:
    graph = MultiGraph.from_edge_index({"a": INDEX["physical"]}, 5)
    assert graph.node_types == {"gene": range(5)}
    assert graph.joins("a") == ("gene", "gene")
    assert graph == MultiGraph.from_edge_index(
        {"a": INDEX["physical"]}, 5, node_types={"gene": 5}, joins={"a": ("gene", "gene")}
    )
    known = graph.known("a")
    assert known.data_ptr() == graph.known_rows("a").data_ptr() == graph.known_columns("a").data_ptr(), "one mask, not three"


def test_known_tokens_are_those_of_the_two_types() -> None:
    given = torch.ones(12, dtype=torch.bool)
    given[[1, 7, 10]] = False
    graph = MultiGraph.from_edge_index(
        {name: index[:, :2] for name, index in INDEX.items()}, 12, node_types=SIZES, joins=JOINS, known={"catalyses": given}
    )
    place = torch.arange(12)
    genes, reactions = place < 5, (place >= 5) & (place < 8)
    assert torch.equal(graph.known_rows("catalyses"), genes & given)
    assert torch.equal(graph.known_columns("catalyses"), reactions & given)
    assert torch.equal(graph.known("catalyses"), (genes | reactions) & given)
    assert torch.equal(graph.known("physical"), genes)
    assert torch.equal(graph.known_columns("consumes"), place >= 8)
    assert graph.num_known("catalyses") == 2
    for name in graph.relations:
        _, edges, valid = reference.target(graph, name)
        rows, columns = (torch.zeros(12, dtype=torch.bool) for _ in range(2))
        for mask, end in zip((rows, columns), graph.joins(name), strict=True):
            mask[graph.node_types[end].start : graph.node_types[end].stop] = True
        measured = graph.known(name)
        assert torch.equal(valid, (rows & measured)[:, None] & (columns & measured))
        assert not bool((edges & ~valid).any())
        assert torch.equal(graph.num_free(name), graph.num_known(name) - graph.degree(name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"node_types": {"gene": 5}}, r"node_types: expected num_nodes = 12 tokens, got 5 of \('gene',\)"),
        ({"node_types": {**SIZES, "": 0}}, "node_types: expected non-empty str names, got str ''"),
        ({"node_types": {}}, "node_types: expected at least one type"),
        ({"node_types": [12]}, "node_types: expected a dict from type to number of tokens, got list"),
        ({"node_types": {**SIZES, "x": -1}}, r"node_types\['x'\]: expected at least 0, got -1"),
        ({"node_types": {**SIZES, "x": 0.5}}, r"node_types\['x'\]: expected an int, got float 0.5"),
        ({"joins": {"catalyse": ("gene", "reaction")}}, "joins relation: unknown value 'catalyse'.*mean 'catalyses'"),
        ({"joins": {**JOINS, "regulates": ("drug", "gene")}}, r"joins\['regulates'\]: unknown value 'drug'"),
        ({"joins": {**JOINS, "regulates": "gene"}}, r"joins\['regulates'\]: expected two types, .* got str 'gene'"),
        ({"joins": {**JOINS, "regulates": ("gene",)}}, r"joins\['regulates'\]: expected two types"),
        ({"joins": ["gene"]}, "joins: expected a dict by relation, got list"),
        ({"joins": {}}, r"edge_index\['catalyses'\]: position 0 holds .*\[0, 5\], expected one from a 'gene' in \[0, 5\) to"),
        (
            {"joins": {**JOINS, "consumes": ("metabolite", "reaction")}},
            r"'consumes'\]: position 0 .*\[5, 8\], expected one from a 'metabolite' in \[8, 12\) to a 'reaction' in \[5, 8\)",
        ),
        ({"undirected": True}, "undirected: 'catalyses' joins 'gene' to 'reaction'; give its reverse as a relation of its own"),
        ({"undirected": "regulates"}, "undirected: 'regulates' joins 'metabolite' to 'gene'"),
        ({"known": {"catalyses": torch.arange(12) != 5}}, r"\['catalyses'\]: position 0 .*`known` marks a gene as unknown"),
        ({"names": NAMES[:5]}, "names: expected 12, one a gene, got 5"),
    ],
)  # fmt: skip
def test_what_is_no_graph_of_types(change: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        cell(**change)


def test_a_relation_of_one_type_may_be_undirected() -> None:
    graph = cell(undirected="physical")
    assert torch.equal(graph.edge_index("physical"), INDEX["physical"])
    assert graph == cell()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda g: g.hops("consumes", 2), "relation: 'consumes' joins 'reaction' to 'metabolite'; a walk along it has one"),
        (lambda g: g.hops(None, 3), "relation: 'catalyses' joins"),
        (lambda g: g.symmetrized("regulates"), "relation: 'regulates' joins 'metabolite' to 'gene'; give its reverse as"),
        (lambda g: g.with_self_loops("catalyses"), "relation: 'catalyses' joins 'gene' to 'reaction'; `edge_attention` lets"),
        (lambda g: g.subgraph(torch.tensor([0, 6, 3])), "nodes: expected tokens of one type after another, in the order gene, "
         "reaction, metabolite, got 'gene' 3 after 'reaction' 6"),
    ],
    ids=["hops", "hops-all", "symmetrized", "loops", "subgraph"],
)  # fmt: skip
def test_what_has_no_meaning_for_two_types(make: Callable[[MultiGraph], MultiGraph], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(cell())


@pytest.mark.parametrize("node_type", ["gene", "reaction", "metabolite"])
def test_new_tokens_stand_behind_those_of_their_type(node_type: str) -> None:
    """As if they had been there from the start: the tokens behind move up, in edges, names and what is known."""
    graph = cell(names=NAMES)
    first = graph.node_types[node_type].stop
    sizes = {name: len(at) + 2 * (name == node_type) for name, at in graph.node_types.items()}
    moved = {name: index + 2 * (index >= first) for name, index in ((r, graph.edge_index(r)) for r in graph.relations)}
    ends = {name: range(sum([*sizes.values()][:i]), sum([*sizes.values()][: i + 1])) for i, name in enumerate(sizes)}
    fresh = {}
    for name in graph.relations:
        source, target = graph.joins(name)
        if node_type in (source, target):
            fresh[name] = torch.tensor(
                [[first if source == node_type else ends[source][0]], [first if target == node_type else ends[target][0]]]
            )
    known = {}
    for name in graph.relations:
        known[name] = torch.zeros(14, dtype=torch.bool)
        known[name][[i + 2 * (i >= first) for i in graph.known(name).nonzero()[:, 0].tolist()]] = True
        known[name][fresh.get(name, torch.empty(0, dtype=torch.int64)).flatten()] = True
    want = MultiGraph.from_edge_index(
        {name: torch.cat([moved[name], fresh.get(name, moved[name][:, :0])], 1) for name in graph.relations},
        14,
        edge_weight={
            name: torch.cat([graph.weight(name), torch.ones(fresh.get(name, moved[name][:, :0]).shape[1])])
            for name in graph.relations
        },
        known=known,
        names=[*NAMES[:first], "x", "y", *NAMES[first:]],
        node_types=sizes,
        joins={name: graph.joins(name) for name in graph.relations},
    )
    assert graph.extend(2, fresh, names=["x", "y"], node_type=node_type) == want
    assert graph.extend(0) == graph
    if node_type == "gene":
        assert graph.extend(2, fresh, names=["x", "y"]) == want


def test_new_tokens_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"edge \[0, 6\] joins two genes that are not new \(new are 'gene' 5 to 5\)"):
        cell().extend(1, {"catalyses": torch.tensor([[0], [6]])})
    with pytest.raises(ValueError, match="expected one from a 'gene' in \\[0, 6\\) to a 'reaction' in \\[6, 9\\)"):
        cell().extend(1, {"catalyses": torch.tensor([[5], [5]])})
    with pytest.raises(ValueError, match=r"node_type: unknown value 'genes'.*did you mean 'gene'"):
        cell().extend(1, node_type="genes")
    with pytest.raises(ValueError, match="undirected: 'catalyses' joins 'gene' to 'reaction'"):
        cell().extend(1, {"catalyses": torch.tensor([[5], [6]])}, undirected=["catalyses"])


def test_new_from_old_keeps_types() -> None:
    graph = cell(names=NAMES)
    for new in (
        graph.hops("physical", 2), graph.symmetrized("physical"), graph.with_self_loops("physical"),
        graph.without_self_loops(None), graph.permuted(None), graph.rewired(None), graph.hops("catalyses", 1),
        copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), graph.select(graph.relations),
    ):  # fmt: skip
        assert new.node_types == graph.node_types
        assert [new.joins(name) for name in new.relations] == [graph.joins(name) for name in graph.relations]
        assert all(torch.equal(new.known(name), graph.known(name)) for name in graph.relations)
    assert graph.with_self_loops("physical").degree("physical")[5:].sum() == 0, "no loop at a reaction"
    part = graph.select(["regulates", "catalyses"])
    assert part.joins("regulates") == ("metabolite", "gene")
    assert torch.equal(part.known_columns("regulates"), graph.known_columns("regulates"))
    assert part.node_types == graph.node_types


def test_subgraph() -> None:
    graph = cell(names=NAMES)
    part = graph.subgraph(torch.tensor([4, 2, 6, 5, 8]))
    assert part.node_types == {"gene": range(2), "reaction": range(2, 4), "metabolite": range(4, 5)}
    assert part.names is not None
    assert part.names.names == ("gene4", "gene2", "reaction1", "reaction0", "metabolite0")
    assert part.edge_index("catalyses").tolist() == [[1, 1], [2, 3]]
    assert part.edge_index("consumes").tolist() == [[2, 3], [4, 4]]
    assert part.known_columns("consumes").tolist() == [False] * 4 + [True]
    genes = graph.subgraph(torch.arange(5))
    assert genes.node_types == {"gene": range(5), "reaction": range(5, 5), "metabolite": range(5, 5)}
    assert torch.equal(genes.edge_index("physical"), INDEX["physical"])


@pytest.mark.parametrize("seed", range(5))
def test_controls_stay_within_types(seed: int) -> None:
    graph = cell_with_terms()
    kept = {name: graph.known(name) for name in graph.relations}
    for new in (graph.permuted(None, seed), graph.rewired(None, seed)):
        for name in graph.relations:  # the constructor refuses an edge at a token of another type, or an unknown one
            checked = MultiGraph.from_edge_index(
                {name: new.edge_index(name)}, graph.num_nodes, known={name: kept[name]},
                node_types={"gene": 23, "term": 9}, joins={name: graph.joins(name)},
            )  # fmt: skip
            assert checked.num_edges(name) == graph.num_edges(name)
            moved = new.edge_index(name).tolist() != graph.edge_index(name).tolist()
            assert moved or name == "is_a", "which has few edges to draw anew"
            assert sorted(new.weight(name).tolist()) == sorted(graph.weight(name).tolist())
    rewired = graph.rewired("annotated", seed)
    assert torch.equal(rewired.degree("annotated"), graph.degree("annotated"))
    by_term = [g.edge_index("annotated")[1].bincount(minlength=32) for g in (rewired, graph)]
    assert torch.equal(*by_term)


def test_genes_are_permuted_the_same_way_in_all_relations() -> None:
    """Gene i has term i and itself as its neighbour: so it stays, whatever the genes and terms are called."""
    n = torch.arange(6)
    graph = MultiGraph.from_edge_index(
        {"self": torch.stack([n, n]), "of": torch.stack([n, n + 6]), "members": torch.stack([n + 6, n])}, 12,
        node_types={"gene": 6, "term": 6}, joins={"of": ("gene", "term"), "members": ("term", "gene")},
        edge_weight=dict.fromkeys(("self", "of", "members"), n + 1.0),
    )  # fmt: skip
    for seed in range(5):
        new = graph.permuted(None, seed)
        gene_of, of, members = (dict(zip(new.weight(name).tolist(), new.edge_index(name).t().tolist(), strict=True))
                                for name in ("self", "of", "members"))  # fmt: skip
        assert all(of[w][0] == members[w][1] == gene_of[w][0] and of[w][1] == members[w][0] for w in (n + 1.0).tolist())


# ---------------------------------------------------------------------------------------------------------- files, values


def test_files(tmp_path: Path) -> None:
    graph, path = cell(names=NAMES), tmp_path / "cell.safetensors"
    for written in (graph, cell(), graph.subgraph(torch.arange(5)), MultiGraph.from_edge_index({}, 3, node_types={"drug": 3})):
        written.save(path)
        read = MultiGraph.load(path)
        assert read == written
        assert list(read.node_types) == list(written.node_types)
        assert b"cellattn.MultiGraph/3" in path.read_bytes()


@pytest.mark.parametrize(("names", "format"), [(None, 1), (NAMES[:5], 2)], ids=["plain", "names"])
def test_a_graph_of_genes_is_written_as_before(tmp_path: Path, names: list[str] | None, format: int) -> None:
    graph = MultiGraph.from_edge_index({"a": INDEX["physical"]}, 5, names=names)
    graph.save(tmp_path / "g")
    assert f"cellattn.MultiGraph/{format}".encode() in (tmp_path / "g").read_bytes()
    assert MultiGraph.load(tmp_path / "g") == graph


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'[\\"gene\\", 5]', b'[\\"gene\\", 6]', "checksum"),
        (b"cellattn.MultiGraph/3", b"cellattn.MultiGraph/2", "checksum"),
        (b"cellattn.MultiGraph/3", b"cellattn.MultiGraph/9", "expected format .*MultiGraph/4', got 'cellattn.MultiGraph/9'"),
    ],
    ids=["size", "older", "newer"],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    cell().save(tmp_path / "g")
    content = (tmp_path / "g").read_bytes()
    assert content.count(old) == 1
    (tmp_path / "g").write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match=f"holds no valid MultiGraph: .*{words}"):
        MultiGraph.load(tmp_path / "g")


def test_equality_and_digests() -> None:
    graph, weight = cell(), {**WEIGHT}
    renamed = {"gene": 5, "protein": 3, "metabolite": 4}
    others = [
        cell(node_types=renamed, joins={n: tuple("protein" if t == "reaction" else t for t in p) for n, p in JOINS.items()}),
        MultiGraph.from_edge_index(INDEX, 12, edge_weight=weight),
        cell(node_types={**SIZES, "drug": 0}),
        cell(known={"catalyses": torch.arange(12) != 1}),
    ]
    assert all(graph != other for other in others)
    assert len({graph.digest(), *(other.digest() for other in others)}) == 1 + len(others)
    assert graph.digest() == cell().digest()


def test_the_digest_of_genes_alone_is_what_it_was() -> None:
    """It is written into checkpoints."""
    graph = MultiGraph.from_edge_index({"a": INDEX["physical"]}, 5)
    assert graph.digest() == "6ae70765e376ef25897ce9a5bfaa320589f4a9ec4160f14f8ee13956cf1bc588"


@pytest.mark.parametrize("make", [cell, lambda: cell().select(["physical"])], ids=["types", "select"])
def test_torch_save_is_read_with_weights_only(make: Callable[[], MultiGraph], tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "g.pt")
    read = torch.load(tmp_path / "g.pt")
    assert read == make()
    assert torch.equal(read.known_columns("physical"), make().known_columns("physical"))


def test_what_was_pickled_before_there_were_types() -> None:
    graph = MultiGraph.from_edge_index({"a": INDEX["physical"]}, 5, known={"a": torch.arange(5) != 2})
    state = {name: x for name, x in graph.__getstate__().items() if name not in ("types", "_known_rows", "_known_columns")}
    old = object.__new__(MultiGraph)
    old.__setstate__(state)
    assert old == graph
    assert torch.equal(old.known_columns("a"), graph.known("a"))


def test_repr() -> None:
    lines = repr(cell(names=NAMES)).splitlines()
    head = (
        "MultiGraph(num_nodes=12, num_edges=11, device=cpu, node_types={gene: 5, reaction: 3, metabolite: 4}, names=GeneList("
    )
    assert lines[0].startswith(head)
    assert lines[1].split() == ["relation", "nodes", "edges", "mean", "deg", "max", "deg", "unknown"]
    assert lines[3].split() == ["catalyses", "6", "4", "1.3", "2", "0", "gene", "->", "reaction"]


# ----------------------------------------------------------------------------------------------------------- HeteroData


def hetero(**names: list[str]) -> Any:
    data = pytest.importorskip("torch_geometric.data").HeteroData()
    for node_type, size in {"metabolite": 4, "unused": 2, "gene": 5, "reaction": 3}.items():
        data[node_type].num_nodes = size
        if node_type in names:
            data[node_type].names = names[node_type]
    first = {"gene": 0, "reaction": 5, "metabolite": 8}
    for name, index in INDEX.items():
        source, target = JOINS.get(name, ("gene", "gene"))
        data[source, name, target].edge_index = index - torch.tensor([[first[source]], [first[target]]])
        if name in WEIGHT:
            data[source, name, target].edge_weight = WEIGHT[name]
    return data


def test_hetero_data_of_several_node_types() -> None:
    """The type that is named comes first, the others as in the data; one that nothing joins is left out."""
    graph = MultiGraph.from_hetero_data(hetero())
    assert graph.node_types == {"gene": range(5), "metabolite": range(5, 9), "reaction": range(9, 12)}
    order = torch.tensor([0, 1, 2, 3, 4, 9, 10, 11, 5, 6, 7, 8])
    for name, index in INDEX.items():
        assert sorted(order[index].t().tolist()) == graph.edge_index(name).t().tolist()
        assert graph.joins(name) == JOINS.get(name, ("gene", "gene"))
    some = MultiGraph.from_hetero_data(hetero(), "reaction", relations=["catalyses"])
    assert some.node_types == {"reaction": range(3), "gene": range(3, 8)}
    assert some.edge_index("catalyses").tolist() == [[3, 5, 5, 7], [0, 0, 1, 2]]


def test_hetero_data_round_trip() -> None:
    pytest.importorskip("torch_geometric")
    for graph in (cell(names=NAMES), cell(), MultiGraph.from_edge_index({"a": INDEX["physical"]}, 5)):
        data = graph.to_hetero_data()
        data.validate()
        assert MultiGraph.from_hetero_data(data) == graph
    assert "edge_weight" not in cell().to_hetero_data()["gene", "catalyses", "reaction"]


def test_hetero_data_brings_the_names_of_all_types() -> None:
    names = {name: [f"{name}{i}" for i in range(size)] for name, size in SIZES.items()}
    want = GeneList([*names["gene"], *names["metabolite"], *names["reaction"]])
    assert MultiGraph.from_hetero_data(hetero(**names)).names == want
    assert MultiGraph.from_hetero_data(hetero(gene=names["gene"])).names is None


def test_edge_types_called_alike() -> None:
    data = hetero()
    data["gene", "to", "reaction"].edge_index = torch.tensor([[0], [1]])
    data["reaction", "to", "metabolite"].edge_index = torch.tensor([[2], [3]])
    data["reaction", "physical", "reaction"].edge_index = torch.tensor([[2], [1]])
    graph = MultiGraph.from_hetero_data(data)
    new = ["gene__to__reaction", "reaction__to__metabolite", "reaction__physical__reaction"]
    assert graph.relations == (*INDEX, *new)
    assert graph.edge_index("reaction__to__metabolite").tolist() == [[11], [8]]
    assert MultiGraph.from_hetero_data(data, relations=[new[0]]).edge_index(new[0]).tolist() == [[0], [6]]
    with pytest.raises(ValueError, match=re.escape("relations: unknown value 'to', expected one of 'physical', 'catalyses'")):
        MultiGraph.from_hetero_data(data, relations=["to"])


def test_hetero_data_with_an_index_past_its_type() -> None:
    data = hetero()
    data["gene", "catalyses", "reaction"].edge_index = torch.tensor([[0], [3]])
    with pytest.raises(
        ValueError, match=r"edge_index\['catalyses'\]: position \[1, 0\] holds 3, expected an index in \[0, 3\)"
    ):
        MultiGraph.from_hetero_data(data)
    with pytest.raises(ValueError, match="undirected: 'catalyses' joins 'gene' to 'reaction'"):
        MultiGraph.from_hetero_data(hetero(), undirected=True)


def test_the_graphs_of_the_tests_have_what_they_promise() -> None:
    graph = cell_with_terms()
    assert all(graph.num_edges(name) > 5 for name in graph.relations)
    assert int((~graph.known("annotated")[:23]).sum()) == int((~graph.known("annotated")[23:]).sum()) == 1
    assert typed_graph({"a": 2, "b": 3}, {"r": ("a", "b", 30)}).known("r").tolist() == [True, False, True, True, False]
