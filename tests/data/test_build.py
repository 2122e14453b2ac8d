"""A cell made of files: the graph, its sources in the file, the report, and what a configuration may not say."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cellattn import MultiGraph
from cellattn.data import build_cell, read_sources
from cellattn.data.__main__ import main

FILES = {
    "tables/SGD_features.tab": "".join(
        "\t".join(["S1", kind, "Verified", name, standard, aliases, *[""] * 10]) + "\n"
        for kind, name, standard, aliases in (
            ("ORF", "YAL001C", "TFC3", "YAL999C"),
            ("ORF", "YAL015C", "NTG1", "X"),
            ("ORF", "YBL007C", "SLA1", "X"),
            ("CDS", "", "", ""),
            ("ORF", "YCR001W", "", ""),
        )
    ),
    "aliases.tsv": "#string_protein_id\talias\tsource\n4932.YAL001C\tTSV115\tSGD\n4932.YZZ\tZ\tSGD\n",
    "links.txt": (
        "protein1 protein2 neighborhood fusion combined_score\n4932.YAL001C 4932.YAL015C 300 0 800\n"
        "4932.YAL015C 4932.YAL001C 300 0 800\n4932.YAL001C 4932.YXX 1 1 900\n4932.YBL007C 4932.YAL001C 0 100 100\n"
    ),
    "edges.tsv": "YAL999C\tNTG1_1\t0.5\nTSV115\tYAL015C_2\t0.25\nYAL015C\tYAL001C\t-1\nYBL007C\tYBL007C\t0\nX\tTFC3\t1\n",
}
CONFIG = """
[genes]
reader = "sgd"
path = "tables/SGD_features.tab"

[[aliases]]
reader = "string"
path = "aliases.tsv"

[relations.physical]
reader = "string"
path = "links.txt"
score_threshold = 400

[relations.string]
reader = "string"
path = "links.txt"
channels = "all"
weighted = false

[relations.list]
reader = "edge-list"
path = "edges.tsv"
remove = "_.*$"
signed = true
directed = true
"""


MEMBERS = {
    "go.obo": "format-version: 1.2\n[Term]\nid: GO:1\n[Term]\nid: GO:2\nis_a: GO:1\n",
    "sgd.gaf": "!gaf-version: 2.2\n"
    + "".join(
        "\t".join(["SGD", "S1", symbol, "involved_in", term, "PMID:1", "IDA", "", "P", "", name, "protein", *["-"] * 5]) + "\n"
        for symbol, name, term in (("TFC3", "YAL001C", "GO:2"), ("NTG1", "YAL015C", "GO:1"), ("Q", "YXX", "GO:1"))
    ),
    "model.json": '{"metabolites": [{"id": "atp"}], "reactions": [{"id": "R2", "metabolites": {"atp": -1}, '
    '"gene_reaction_rule": "YBL007C and TSV115"}, {"id": "R1", "metabolites": {}}]}',
}
MEMBER_CONFIG = """
[relations.term]
reader = "go"
path = "sgd.gaf"
ontology = "go.obo"
evidence = ["IDA"]

[relations.catalyses]
reader = "metabolic-model"
path = "model.json"
tokens = "reaction"
"""


@pytest.fixture
def cell_of_types(folder: Path) -> Path:
    for name, text in MEMBERS.items():
        (folder / name).write_text(text)
    (folder / "cell.toml").write_text(CONFIG + MEMBER_CONFIG)
    return folder / "cell.toml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "cell.toml").write_text(CONFIG)
    return tmp_path


def changed(folder: Path, old: str, new: str) -> Path:
    assert old in CONFIG
    (folder / "cell.toml").write_text(CONFIG.replace(old, new))
    return folder / "cell.toml"


def edges(graph: MultiGraph, relation: str) -> list[tuple[Any, ...]]:
    return list(zip(*graph.edge_index(relation).tolist(), graph.weight(relation).tolist(), strict=True))


def test_the_graph_of_the_files(folder: Path) -> None:
    graph = build_cell(folder / "cell.toml").graph
    assert graph.names is not None
    assert graph.names.names == ("YAL001C", "YAL015C", "YBL007C", "YCR001W")
    assert graph.relations == ("physical", "string_neighborhood", "string_fusion", "list")
    assert edges(graph, "physical") == [(0, 1, 800), (1, 0, 800)]
    assert edges(graph, "string_neighborhood") == [(0, 1, 1), (1, 0, 1)]
    assert edges(graph, "string_fusion") == [(0, 2, 1), (2, 0, 1)]
    assert edges(graph, "list") == [(0, 1, 0.5), (1, 0, 1)]  # X stands for two genes, and a weight of 0 is no edge


def test_terms_and_reactions_are_tokens(cell_of_types: Path) -> None:
    cell = build_cell(cell_of_types)
    graph, before = cell.graph, build_cell(_without_members(cell_of_types)).graph
    assert graph.node_types == {"gene": range(4), "term": range(4, 6), "reaction": range(6, 8)}
    assert graph.names is not None
    assert graph.names.names == ("YAL001C", "YAL015C", "YBL007C", "YCR001W", "GO:1", "GO:2", "R2", "R1")
    assert graph.relations == (*before.relations, "term", "catalyses")
    assert (graph.joins("term"), graph.joins("catalyses")) == (("gene", "term"), ("gene", "reaction"))
    assert edges(graph, "term") == [(0, 4, 1), (0, 5, 1), (1, 4, 1)]
    assert edges(graph, "catalyses") == [(0, 6, 1), (2, 6, 1)]
    assert all(edges(graph, name) == edges(before, name) for name in before.relations)
    written = cell.save(cell_of_types.with_suffix(".safetensors"))
    assert MultiGraph.load(written[0]) == graph
    assert read_sources(written[0]) == cell.sources
    term = cell.sources["relations"]["term"]
    content = (cell_of_types.parent / "go.obo").read_bytes()
    assert term["ontology"] == {"path": "go.obo", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert term["options"] == {"ontology": "go.obo", "evidence": ["IDA"], "tokens": "term", "reversed": False}
    assert term["counts"]["left_out"] == {"unknown": 1}
    for text in (
        "4 genes of tables/SGD_features.tab, with 5 aliases; 1 in no relation: YCR001W.",
        "| term (to 2 term) | 3 | 3 | 2 | 2 | 37.50% | 3 | unknown 1 | 0 | 0 | sgd.gaf |",
        "| catalyses (to 2 reaction) | 2 | 2 | 2 | 1 | 25.00% | 2 | none | 0 | 1 | model.json |",
    ):
        assert text in cell.report()


STOICHIOMETRY = """
[relations.converts]
reader = "metabolic-model"
path = "model.json"
part = "reaction-metabolite"
tokens = "metabolite"

[relations.catalysed_by]
reader = "metabolic-model"
path = "model.json"
tokens = "reaction"
reversed = true
"""


def test_metabolites_are_tokens_and_relations_share_types(cell_of_types: Path) -> None:
    """Reactions are those that genes catalyse, whichever relation comes first; both ways, weighted or not."""
    model = {
        "metabolites": [{"id": "atp"}, {"id": "adp"}],
        "reactions": [
            {"id": "R2", "metabolites": {"atp": -2.5, "adp": 1}, "gene_reaction_rule": "YBL007C and TSV115"},
            {"id": "R1", "metabolites": {"adp": 0}},
        ],
    }
    (cell_of_types.parent / "model.json").write_text(json.dumps(model))
    cell_of_types.write_text(CONFIG + MEMBER_CONFIG + STOICHIOMETRY)
    cell = build_cell(cell_of_types)
    graph = cell.graph
    assert graph.node_types == {"gene": range(4), "term": range(4, 6), "reaction": range(6, 8), "metabolite": range(8, 10)}
    assert (graph.joins("converts"), graph.joins("catalysed_by")) == (("reaction", "metabolite"), ("reaction", "gene"))
    assert edges(graph, "converts") == [(6, 8, 2.5), (6, 9, 1)]
    assert edges(graph, "catalysed_by") == [(6, 0, 1), (6, 2, 1)]
    assert "| converts (from 2 reaction to 2 metabolite) | 2 | 3 | 0 | 2 | 50.00% | 3 | none |" in cell.report()
    assert "converts: 1 edges of weight 0, which are none." in cell.report()
    (written, *_) = cell.save(cell_of_types.with_suffix(".safetensors"))
    assert MultiGraph.load(written) == graph
    of_genes = {"part": "gene-reaction", "tokens": "reaction"}
    of_metabolites = {"part": "reaction-metabolite", "rows": "reaction", "tokens": "metabolite", "weighted": True}
    relations = read_sources(written)["relations"]
    assert relations["converts"]["options"] == {**of_metabolites, "reversed": False}
    assert relations["catalyses"]["options"] == {**of_genes, "reversed": False}
    assert relations["catalysed_by"]["options"] == {**of_genes, "reversed": True}
    cell_of_types.write_text(
        CONFIG
        + STOICHIOMETRY.replace('tokens = "metabolite"', 'rows = "step"\nweighted = false').replace('"reaction"', '"step"')
    )
    graph = build_cell(cell_of_types).graph
    assert edges(graph, "converts") == [(4, 6, 1), (4, 7, 1), (5, 7, 1)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('part = "reaction-metabolite"', 'part = "metabolites"', "relations.converts.part: unknown value 'metabolites'"),
        ('part = "reaction-metabolite"', 'rows = "x"', "relations.converts.rows: expected none, the rows are genes, got 'x'"),
        ('part = "reaction-metabolite"', "weighted = false", "relations.converts.weighted: expected none, the rows are genes"),
        ('tokens = "metabolite"', 'tokens = "term"', "relations.converts.tokens: there are tokens 'term' already"),
        ('tokens = "metabolite"', 'rows = "term"', "relations.converts.rows: there are tokens 'term' already"),
        ('tokens = "metabolite"', 'rows = "step"', "relations.converts: 'R2' is one of 'reaction' and one of 'step'"),
        ("reversed = true", "reversed = 1", "relations.catalysed_by.reversed: expected a bool, got int 1"),
    ],
)
def test_errors_of_parts_of_a_model(cell_of_types: Path, old: str, new: str, message: str) -> None:
    assert old in STOICHIOMETRY
    cell_of_types.write_text(CONFIG + MEMBER_CONFIG + STOICHIOMETRY.replace(old, new))
    with pytest.raises((ValueError, TypeError), match=message):
        build_cell(cell_of_types)


def _without_members(config: Path) -> Path:
    path = config.with_name("plain.toml")
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('tokens = "reaction"', 'tokens = "term"', "relations.catalyses.tokens: there are tokens 'term' already"),
        ('tokens = "reaction"', 'tokens = "gene"', "relations.catalyses.tokens: there are tokens 'gene' already"),
        ('tokens = "reaction"', "tokens = 3", "relations.catalyses.tokens: expected a str, got int 3"),
        ('tokens = "reaction"', "directed = true", "relations.catalyses: key: unknown value 'directed'"),
        ('"go.obo"', '"gone.obo"', r"relations.term.ontology: no file .*gone\.obo"),
        ('"go.obo"', "3", "relations.term.ontology: expected a string, got int 3"),
        ('["IDA"]', '["IDEA"]', "relations.term.evidence: unknown value 'IDEA'"),
        ('"metabolic-model"', '"metabolic"', "relations.catalyses.reader: unknown value .*did you mean 'metabolic-model'"),
    ],
    ids=["twice", "gene", "type", "key", "no-ontology", "ontology-type", "evidence", "reader"],
)  # fmt: skip
def test_bad_memberships(cell_of_types: Path, old: str, new: str, message: str) -> None:
    assert MEMBER_CONFIG.count(old) == 1
    cell_of_types.write_text(CONFIG + MEMBER_CONFIG.replace(old, new))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        build_cell(cell_of_types)


def test_a_reaction_called_as_a_gene(cell_of_types: Path) -> None:
    (cell_of_types.parent / "model.json").write_text(MEMBERS["model.json"].replace('"R1"', '"NTG1"'))
    with pytest.raises(ValueError, match=r"relations\.catalyses: 'NTG1' is the name of a gene and one of 'reaction'"):
        build_cell(cell_of_types)


@pytest.mark.parametrize(
    ("duplicates", "directed", "expected"),
    [
        ("max", True, [(0, 1, 0.5), (1, 0, 1)]),
        ("mean", True, [(0, 1, 0.375), (1, 0, 1)]),
        ("sum", True, [(0, 1, 0.75), (1, 0, 1)]),
        ("sum", False, [(0, 1, 1), (1, 0, 1)]),
        ("error", True, "genes (0, 1) from 0.25 to 0.5"),
        ("error", False, "genes (0, 1) from 0.25 to 1"),
    ],
)
def test_pairs_of_several_lines(folder: Path, duplicates: str, directed: bool, expected: Any) -> None:
    new = f'duplicates = "{duplicates}"\ndirected = {str(directed).lower()}'
    path = changed(folder, "directed = true", new)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape("cell.toml: relations.list: ") + ".*" + re.escape(expected)):
            build_cell(path)
    else:
        assert edges(build_cell(path).graph, "list") == expected


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_words_that_an_output_cannot_encode_are_escapes(folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """Names of relations and files in other scripts, or in bytes that are no UTF-8, with any locale."""
    config = folder / os.fsdecode(b"cell-\xff.toml")
    config.write_text(CONFIG.replace("[relations.physical]", '[relations."gène→"]'), encoding="utf-8")
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding=encoding, write_through=True))
    assert main(["build", str(config), "--out", str(folder / os.fsdecode(b"cell-\xff.safetensors"))]) == 0
    told = {"ascii": b"g\\xe8ne\\u2192", "latin-1": b"g\xe8ne\\u2192", "utf-8": "gène→".encode()}[encoding]
    assert b"| " + told + b" |" in out.getvalue()
    page = (folder / os.fsdecode(b"cell-\xff.md")).read_text(encoding="utf-8")
    assert "| gène→ |" in page
    assert "cell-\\udcff.toml" in page
    graph = MultiGraph.load(folder / os.fsdecode(b"cell-\xff.safetensors"))
    assert "gène→" in graph.relations


def test_the_command_and_what_it_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "cell.safetensors"
    assert main(["build", str(folder / "cell.toml"), "--out", str(out)]) == 0
    said, page = capsys.readouterr().out, (folder / "cell.md").read_text()
    assert page.partition("\n![")[0] in said
    cell = build_cell(folder / "cell.toml")
    assert MultiGraph.load(out) == cell.graph
    sources = read_sources(out)
    assert sources == cell.sources  # of a second time: no clock and no machine is in them
    physical = sources["relations"]["physical"]
    content = (folder / "links.txt").read_bytes()
    assert (physical["path"], physical["bytes"]) == ("links.txt", len(content))
    assert physical["sha256"] == hashlib.sha256(content).hexdigest()
    assert physical["options"] == {"score_threshold": 400, "directed": False, "weighted": True, "duplicates": "max"}
    assert physical["counts"]["left_out"] == {"unknown": 1, "below_threshold": 1}
    assert sources["relations"]["list"]["counts"]["retired"] == {"YAL999C": "YAL001C"}
    assert sources["genes"]["counts"] == {"genes": 4, "aliases": 5}
    for text in (
        "4 genes of tables/SGD_features.tab, with 5 aliases; 1 in no relation: YCR001W.",
        "Names that two genes claim: 1: X.",
        "| physical | 2 | 1 | 2 | 1 | 12.50% | 4 | unknown 1, below threshold 1 | 0 | 0 | links.txt |",
        "| list (directed) | 2 | 3 | 3 | 1 | 12.50% | 5 | unknown 1 | 1 | 4 | edges.tsv |",
        "physical: 1 unknown names: YXX (1).",
        "list: 1 retired names: YAL999C (now YAL001C).",
        "list: 1 edges of weight 0, which are none.",
    ):
        assert text in page


def test_figure_or_a_word_without_it(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["build", str(folder / "cell.toml"), "--out", str(folder / "cell.safetensors")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert main(arguments) == 0
        assert "matplotlib is not installed (`pip install 'cellattn[bench]'`)" in capsys.readouterr().out
        assert "matplotlib is not installed" in (folder / "cell.md").read_text()
        assert not (folder / "cell.png").exists()
    pytest.importorskip("matplotlib")
    assert main(arguments) == 0
    assert (folder / "cell.png").read_bytes().startswith(b"\x89PNG")
    assert "![degrees](cell.png)" in (folder / "cell.md").read_text()


@pytest.mark.filterwarnings("error")  # of a legend that leaves a line out
def test_a_figure_of_any_relations(folder: Path) -> None:
    """Without an edge, as where no name is found; with names that are a formula, or hidden, to matplotlib."""
    pytest.importorskip("matplotlib")
    for relations in ({"none": ["X", "Y"]}, {"_a": ["YAL001C", "YBL007C"], "$x": ["YAL015C", "TFC3"], "y$z{": ["X", "Y"]}):
        text = CONFIG[: CONFIG.index("[relations")]
        for number, (name, ends) in enumerate(relations.items()):
            (folder / f"{number}.txt").write_text("\t".join(ends) + "\n")
            text += f'[relations."{name}"]\nreader = "edge-list"\npath = "{number}.txt"\n'
        (folder / "cell.toml").write_text(text)
        written = build_cell(folder / "cell.toml").save(folder / "cell.safetensors")
        assert [path.suffix for path in written] == [".safetensors", ".md", ".png"]
        assert MultiGraph.load(written[0]).relations == tuple(relations)


def test_where_to_write_is_looked_at_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not when all has been read."""
    (folder / "cell.toml").write_text("no TOML")
    (folder / "d.safetensors").mkdir()
    for out, message in (
        ("no/such/cell.safetensors", f"path: no folder '{folder}/no/such', where 'cell.safetensors' is to be written"),
        ("cell.pt", "path: expected a file that ends in .safetensors"),
        ("d.safetensors", f"path: '{folder}/d.safetensors' is a folder, expected a file"),
    ):
        assert main(["build", str(folder / "cell.toml"), "--out", str(folder / out)]) == 1
        assert capsys.readouterr().err.startswith(f"error: {message}")


BAD = {
    "no-toml": ("[genes]", "[genes", "cell.toml: no TOML: "),
    "no-genes": ("[genes]", "[gene]", "cell.toml: key: unknown value 'gene', .*did you mean 'genes'"),
    "no-name": ("[relations.list]", '[relations.""]', "relations: expected a name of each, got ''"),
    "no-path": ('path = "links.txt"\nscore', "score", "relations.physical: expected the key 'path'"),
    "no-file": ('path = "links.txt"\nscore', 'path = "gone.txt"\nscore', r"relations.physical.path: no file .*gone\.txt"),
    "path-type": ('path = "edges.tsv"', "path = 3", "relations.list.path: expected a string, got int 3"),
    "reader": (
        'reader = "edge-list"',
        'reader = "edgelist"',
        "relations.list.reader: unknown value .*did you mean 'edge-list'",
    ),
    "key": ("score_threshold", "score_treshold", "relations.physical: key: unknown value .*did you mean 'score_threshold'"),
    "value": ("= 400", "= 4000", r"relations.physical.score_threshold: expected a score in \[0, 1000\], got 4000"),
    "type": ("= 400", '= "a"', "relations.physical.score_threshold: expected a finite number, got str 'a'"),
    "own-type": ("directed = true", "directed = 1", "relations.list.directed: expected a bool, got int 1"),
    "duplicates": ("directed = true", 'duplicates = "min"', "relations.list.duplicates: unknown value 'min'"),
    "channel": ('"all"', '["coexpression"]', "relations.string.channels: .*no column 'coexpression'"),
    "remove": ('"_.*$"', '"("', r"relations.list.remove: '\(' is no regular expression"),
    "line": ("signed = true", "signed = false", r"relations.list: .*edges\.tsv, line 3: column 2 is '-1'"),
    "twice": ("[relations.list]", "[relations.string_fusion]", "there is a relation 'string_fusion' already"),
    "aliases": ("[[aliases]]", "[aliases]", r"aliases: expected tables \[\[aliases\]\]"),
    "alias-reader": (
        '[[aliases]]\nreader = "string"',
        '[[aliases]]\nreader = "sgd"',
        r"aliases\[0\].reader: unknown value 'sgd'",
    ),
    "needed": ('reader = "edge-list"', 'reader = "table"', "relations.list: the reader 'table' needs the key 'source'"),
}


@pytest.mark.parametrize(("old", "new", "message"), BAD.values(), ids=BAD)
def test_bad_configurations(folder: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str) -> None:
    path = changed(folder, old, new)
    assert main(["build", str(path), "--out", str(folder / "cell.safetensors")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: ")
    assert re.search(message, said), said
    assert not (folder / "cell.safetensors").exists()


def test_a_list_without_genes(folder: Path) -> None:
    path = changed(folder, 'path = "tables/SGD_features.tab"', 'path = "names.tsv"\nname = "n"')
    path.write_text(path.read_text().replace('reader = "sgd"', 'reader = "table"'))
    (folder / "names.tsv").write_text("n\n")
    with pytest.raises(ValueError, match=r"cell\.toml: genes: no gene in 'names\.tsv'"):
        build_cell(path)


def test_no_relations_or_another_name_for_the_file(folder: Path) -> None:
    path = changed(folder, CONFIG[CONFIG.index("[relations") :], "")
    with pytest.raises(ValueError, match=r"cell\.toml: relations: expected at least one table"):
        build_cell(path)
    (folder / "cell.toml").write_text(CONFIG)
    with pytest.raises(ValueError, match=r"expected a file that ends in \.safetensors"):
        build_cell(path).save(folder / "cell.pt")
    with pytest.raises(FileNotFoundError):
        build_cell(folder / "none.toml")


def test_sources_of_other_files(folder: Path) -> None:
    graph = build_cell(folder / "cell.toml").graph
    graph.save(folder / "g.safetensors")
    with pytest.raises(ValueError, match="holds a graph without its sources"):
        read_sources(folder / "g.safetensors")
    with pytest.raises(ValueError, match="notes: expected strings, under names other than format"):
        graph.save(folder / "g.safetensors", notes={"names": "x"})
    graph.save(folder / "g.safetensors", notes={"sources": '{"a": 1}', "z": "y"})
    assert read_sources(folder / "g.safetensors") == {"a": 1}
    assert MultiGraph.load(folder / "g.safetensors") == graph
    content = (folder / "g.safetensors").read_bytes().replace(b'{\\"a\\": 1}', b'{\\"a\\": 2}')
    (folder / "g.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="its checksum does not fit"):
        read_sources(folder / "g.safetensors")


def test_real_tables_make_a_cell(yeast_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "cell.toml").write_text(
        f'[genes]\nreader = "table"\npath = "{yeast_dir}/genes.tsv.gz"\nname = "systematic"\nalias = "standard"\n'
        f'[relations.complex]\nreader = "edge-list"\npath = "{yeast_dir}/bionic_Krogan-2006.tsv.gz"\n'
        f'[relations.regulatory]\nreader = "table"\npath = "{yeast_dir}/yeastract2019_regulatory.tsv.gz"\n'
        'source = "tf"\ntarget = "target"\nweight = "value"\ndirected = true\n'
    )
    cell = build_cell(tmp_path / "cell.toml")
    assert (cell.graph.num_edges("complex"), cell.graph.num_edges("regulatory")) == (2 * 7055, 11350)
    assert torch.equal(cell.graph.weight("complex"), torch.ones(2 * 7055))
    assert cell.sources["relations"]["complex"]["counts"]["left_out"] == {"unknown": 20}
