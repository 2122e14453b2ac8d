"""What one format has and no other: versions of its headers, alleles, qualifiers, rules, parts of models."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from cellattn.data import (
    EdgeTable,
    GeneList,
    read_edge_list,
    read_go_annotations,
    read_interactions,
    read_metabolic_model,
    read_obo,
    read_sga,
    read_sgd_features,
    read_string_aliases,
    read_string_links,
)

from .examples import GENES, MODEL, OBO, TRIGENIC, TRIGENIC_LINES, gaf, rows, sgd, values

STRING_HEADERS = {
    "v9-links": "",
    "v9-detailed": "neighborhood fusion cooccurence coexpression experimental database textmining",
    "v12-full": "neighborhood neighborhood_transferred fusion cooccurence homology coexpression coexpression_transferred "
    "experiments experiments_transferred database database_transferred textmining textmining_transferred",
    "v12-physical-detailed": "experimental database textmining",
    "v12-physical-full": "homology experiments experiments_transferred database database_transferred textmining "
    "textmining_transferred",
}


@pytest.mark.parametrize("header", STRING_HEADERS.values(), ids=STRING_HEADERS)
def test_string_of_all_versions(tmp_path: Path, header: str) -> None:
    channels = [*header.split(), "combined_score"]
    scores = [str(100 + position) for position in range(len(channels))]
    path = tmp_path / "links.txt"
    path.write_text(f"protein1 protein2 {' '.join(channels)}\n4932.YAL001C 4932.YAL015C {' '.join(scores)}\n")
    found: Any = read_string_links(path, GENES, channels=channels)
    assert {name: table.weight.tolist() for name, table in found.items()} == {
        name: [float(score)] for name, score in zip(channels, scores, strict=True)
    }
    if len(channels) > 1:
        found = read_string_links(path, GENES, channels="all")
        assert list(found) == channels[:-1]


def test_sga_alleles_controls_and_choices(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(rows(TRIGENIC, *TRIGENIC_LINES))
    table = read_sga(path, GENES)
    assert (table.seeds.tolist(), table.ptr.tolist()) == ([1, 2, 0, 1, 2], [0, 3, 5])  # without HO, the control
    assert table.types is not None
    assert table.types.tolist() == [1, 1, 5, 1, 1]
    assert read_sga(path, GENES, controls=()).seeds.tolist() == [1, 2, 0, 1, 3, 2]
    assert read_sga(path, GENES, phenotype="fitness").score.tolist() == pytest.approx([0.6, 0.7])
    three = read_sga(path, GENES, mutants="trigenic")
    assert (three.num_lines, three.left_out["other_mutants"].tolist(), three.score.tolist()) == (2, [3], [-0.125])
    few = read_sga(path, GENES, max_p_value=0.05)
    for impossible in (-0.05, 5):  # percent
        with pytest.raises(ValueError, match=r"^max_p_value: expected a p-value in \[0, 1\], got "):
            read_sga(path, GENES, max_p_value=impossible)
    assert few.left_out["above_p_value"].tolist() == [3]
    assert few.p_value is not None
    assert few.p_value.tolist() == pytest.approx([0.01])
    lines = [
        ["YAL001C_damp", "", "YAL001C", "", "-0.5", "0.1", "0.01"],
        ["YAL001C_sn1", "", "YBL007C_y3", "", "-0.5", "0.1", ""],
    ]
    path.write_text(rows(*lines))
    table = read_sga(path, GENES)
    assert table.left_out["repeated"].tolist() == [1]
    assert table.types is not None
    assert table.types.tolist() == [1, 5]
    with pytest.raises(ValueError, match="line 1: names gene 'YAL001C' twice"):
        read_sga(path, GENES, repeated="error")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"phenotype": "fitness"}, "phenotype: .* no column for 'fitness'"),
        ({"mutants": "trigenic"}, "mutants: .* no column"),
        ({"phenotype": "score"}, "phenotype: unknown value"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            read_sga(path, GENES, **options)


def test_sga_types_reach_the_dataset(tmp_path: Path) -> None:
    from cellattn.data import PERTURBATION_TYPES, PerturbationDataset

    path = tmp_path / "t.txt"
    path.write_text(
        rows(
            ["YAL001C_damp", "", "YBL007C_tsa3", "", "-0.5", "0.1", "0.01"],
            ["YAL001C+YAL015C_y91", "", "YBL007C_tsa3", "", "-0.5", "0.1", "0.01"],  # of two genes both are deleted
        )
    )
    data = PerturbationDataset.from_interactions(read_sga(path, GENES))
    told = ["knocked_down", "mutated", "deleted", "deleted", "mutated"]
    assert [PERTURBATION_TYPES[kind] for kind in data.types.tolist()] == told


@pytest.mark.parametrize("negation", ["NOT|involved_in", "not|involved_in", "contributes_to|NOT"])
def test_go_closure_filters_and_qualifiers(tmp_path: Path, negation: str) -> None:
    obo, path = tmp_path / "go.obo", tmp_path / "x.gaf"
    obo.write_text(OBO)
    lines = [
        gaf("TFC3", "", "involved_in", "GO:2"),
        gaf("NTG1", "YAL015C", negation, "GO:2"),
        gaf("NTG1", "YAL015C", "", "GO:9"),
        gaf("NTG1", "YAL015C", "", "GO:4"),
        gaf("NTG1", "YAL015C", "", "GO:77"),
        [word.replace("IDA", "IEA") for word in gaf("SLA1", "YBL007C", "", "GO:3")],
    ]
    path.write_text(rows(["!gaf-version: 2.1"], *lines))
    plain = read_go_annotations(path, GENES)
    assert plain.names == ("GO:2", "GO:3", "GO:4", "GO:77", "GO:9")
    assert {reason: out.tolist() for reason, out in plain.left_out.items() if len(out)} == {"negated": [3]}
    closed = read_go_annotations(path, GENES, ontology=obo, without_evidence=["IEA"])
    assert closed.names == ("GO:1", "GO:2")
    assert closed.titles == ("root", "kept")
    assert closed.edge_index.tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert {reason: out.tolist() for reason, out in closed.left_out.items() if len(out)} == {
        "negated": [3],
        "other_evidence": [7],
        "obsolete": [5],
        "unknown_term": [6],
    }
    parts = read_go_annotations(path, GENES, ontology=read_obo(obo), relations=("is_a", "part_of"), max_genes=2)
    assert parts.names == ("GO:1", "GO:2")  # GO:3 has three genes
    assert parts.left_out["other_size"].tolist() == [7]  # and is all that this line says
    assert read_go_annotations(path, GENES, aspects=["C"]).edge_index.shape == (2, 0)
    with pytest.raises(ValueError, match="evidence: unknown value 'IDB'"):
        read_go_annotations(path, GENES, evidence=["IDB"])


def test_names_of_the_list_go_before_aliases_in_annotations(tmp_path: Path) -> None:
    path = tmp_path / "x.gaf"
    path.write_text(rows(gaf("TFC3", "other|YAL015C", "", "GO:1"), gaf("other", "TFC3", "", "GO:1")))
    found = read_go_annotations(path, GENES)
    assert found.edge_index.tolist() == [[0, 1], [0, 0]]
    assert found.by_alias == {"TFC3": "YAL001C"}


def test_symbols_of_other_organisms_are_not_annotated(tmp_path: Path) -> None:
    taxa = ["taxon:559292", "taxon:9606|taxon:559292", "taxon:559292|taxon:9606", ""]
    lines = [gaf("TFC3", "", "", f"GO:{row}") for row in range(4)]
    for line, taxon in zip(lines, taxa, strict=True):
        line[12] = taxon
    path = tmp_path / "a.gaf"
    path.write_text(rows(*lines))
    with pytest.raises(
        ValueError, match=r"a\.gaf: genes of the list .* several organisms, '559292 \(line 1\)', '9606 \(line 2\)'"
    ):
        read_go_annotations(path, GENES)
    found = read_go_annotations(path, GENES, organism=559292)
    assert (found.names, found.left_out["other_organism"].tolist()) == (("GO:0", "GO:2"), [2, 4])
    assert read_go_annotations(path, GENES, organism=[559292, 9606]).names == ("GO:0", "GO:1", "GO:2")
    with pytest.raises(ValueError, match=r"^organism: .*a\.gaf: no line is of '4932', expected one of '559292', '9606'"):
        read_go_annotations(path, GENES, organism=4932)
    path.write_text(rows(lines[0], lines[3]))
    assert read_go_annotations(path, GENES).names == ("GO:0", "GO:3")


def test_a_file_of_all_organisms_needs_a_list_with_the_taxon(tmp_path: Path) -> None:
    """The same name, or names of one list, may be of several."""
    links, aliases = tmp_path / "links.txt", tmp_path / "aliases.txt"
    links.write_text("protein1 protein2 combined_score\n4932.YAL001C 4932.YAL015C 900\n9606.YBL007C 9606.YAL001C 800\n")
    aliases.write_text("#string_protein_id\talias\tsource\n4932.YAL001C\tA\ts\n9606.YAL001C\tB\ts\n")
    told = "of several organisms, '4932 .line 2.', '9606 .line 3.'; a list whose names have the taxon in front"
    for read, path in ((read_string_links, links), (read_string_aliases, aliases)):
        with pytest.raises(ValueError, match=told):
            read(path, GENES)
    aliases.write_text("## species_ncbi_taxon_id ##\n4932\tYAL001C\tA\ts\n9606\tYAL001C\tB\ts\n")
    with pytest.raises(ValueError, match=told):
        read_string_aliases(aliases, GENES)
    both = GeneList(["4932.YAL001C", "9606.YAL001C", "4932.YAL015C", "9606.YBL007C"])
    assert read_string_aliases(aliases, both).genes.aliases == {"A": "4932.YAL001C", "B": "9606.YAL001C"}
    found = read_string_links(links, both)
    assert isinstance(found, EdgeTable)
    assert found.edge_index.tolist() == [[0, 3], [2, 1]]
    links.write_text("protein1 protein2 combined_score\nYAL001C YAL015C 900\nYBL007C YAL015C 800\n")
    with pytest.warns(UserWarning, match=r"1 unknown gene: YAL001C \(1\)"):  # which of the two it is nobody knows
        found = read_string_links(links, both)
    assert isinstance(found, EdgeTable)
    assert found.edge_index.tolist() == [[3], [2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("is_a: GO:1", "is_a: GO:7"), r"line 12: 'GO:7' is no term"),
        (("name: root", "is_a: GO:2"), r"term 'GO:[12]' is above itself"),
        (("id: GO:3", "id: GO:1"), r"line 16: term 'GO:1' stands twice"),
        (("name: root", "root"), r"line 6: expected 'tag: value'"),
        (("is_obsolete: true", "is_obsolete: 1"), r"line 21: expected true or false: 'is_obsolete: 1'"),
        (("name: other", "id: GO:5\nname: other"), r"line 17: a second id of term 'GO:3'"),
        (("format-version", "format"), r"line 1: expected an ontology in OBO format"),
    ],
    ids=["parent", "circle", "twice", "no-tag", "obsolete", "second-id", "other-file"],
)
def test_malformed_ontologies(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "go.obo"
    path.write_text(OBO.replace(*change))
    with pytest.raises(ValueError, match=message):
        read_obo(path).ancestors()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[Term]\nid: GO:3", "[Term] ! the third\nid: GO:3"),
        ("[Term]\nid: GO:3", "[term]\nid: GO:3"),
        ("part_of GO:3", "part_of\tGO:3"),
        ("is_a: GO:1", " is_a : GO:1"),
        ("is_obsolete: true", "is_obsolete: True"),
    ],
)
def test_spellings_of_an_ontology(tmp_path: Path, old: str, new: str) -> None:
    """Each was passed over, and a term, a parent or that it is obsolete was lost."""
    path, other = tmp_path / "go.obo", tmp_path / "other.obo"
    path.write_text(OBO)
    assert old in OBO
    other.write_text(OBO.replace(old, new))
    expected, found = read_obo(path), read_obo(other)
    assert (found.terms, found.parents, found.obsolete) == (expected.terms, expected.parents, expected.obsolete)
    assert (found.parents["part_of"], found.obsolete) == ({"GO:2": ("GO:3",)}, {"GO:4"})


def test_an_id_that_is_a_term_is_not_replaced(tmp_path: Path) -> None:
    """A term's own id goes before the same as another's alternative, and what two terms claim is neither's."""
    path, gafs = tmp_path / "go.obo", tmp_path / "a.gaf"
    path.write_text(OBO.replace("id: GO:3\n", "id: GO:3\nalt_id: GO:1\nalt_id: GO:8\n").replace("name: root", "alt_id: GO:8"))
    assert read_obo(path).replaced == {"GO:9": "GO:2"}
    gafs.write_text(rows(*[gaf("TFC3", "", "", term) for term in ("GO:1", "GO:8", "GO:9")]))
    found = read_go_annotations(gafs, GENES, ontology=path)
    assert (found.names, found.left_out["unknown_term"].tolist()) == (("GO:1", "GO:2"), [2])


def test_ancestors_of_a_deep_ontology(tmp_path: Path) -> None:
    """No recursion: a chain of terms longer than Python's stack."""
    terms = "".join(f"\n[Term]\nid: T{i}\n" + (f"is_a: T{i - 1}\n" if i else "") for i in range(3000))
    path = tmp_path / "deep.obo"
    path.write_text("format-version: 1.4\n" + terms)
    assert len(read_obo(path).ancestors()["T2999"]) == 3000


def test_an_obsolete_id_is_replaced_by_the_term_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "go.obo"
    path.write_text(OBO.replace("id: GO:3\n", "id: GO:3\nalt_id: GO:4\n"))
    found = read_obo(path)
    assert (found.replaced["GO:4"], found.obsolete) == ("GO:3", {"GO:4"})


def test_qualifiers_of_features(tmp_path: Path) -> None:
    """Only those asked for; the others are counted, those without one among them."""
    lines = [sgd("ORF", f"YAL00{i}C") for i in range(4)]
    for line, qualifier in zip(lines, ("Verified", "Dubious", "Uncharacterized", ""), strict=True):
        line[2] = qualifier
    path = tmp_path / "SGD_features.tab"
    path.write_text(rows(*lines))
    assert len(read_sgd_features(path).genes) == 4
    found = read_sgd_features(path, qualifiers=["Verified", "Uncharacterized"])
    assert found.genes.names == ("YAL000C", "YAL002C")
    assert found.left_out["other_type"].tolist() == [2, 4]


def test_names_aliases_and_retired_names(tmp_path: Path) -> None:
    path = tmp_path / "SGD_features.tab"
    lines = [
        sgd("ORF", "YAL001C", "TFC3", "TSV115|YAL999C|X"),
        sgd("ORF", "YAL015C", "NTG1", "X|TFC3"),
        sgd("ORF", "YBL007C", "", "YAL015C"),
        sgd("tRNA_gene", "tA", "TRNA"),
    ]
    path.write_text(rows(*lines))
    found = read_sgd_features(path)
    assert found.genes.names == ("YAL001C", "YAL015C", "YBL007C")
    assert found.genes.aliases == {"TFC3": "YAL001C", "NTG1": "YAL015C", "TSV115": "YAL001C", "YAL999C": "YAL001C"}
    assert found.retired == {"YAL999C": "YAL001C"}
    assert found.ambiguous == {
        "TFC3": ("YAL001C", "YAL015C"),
        "X": ("YAL001C", "YAL015C"),
        "YAL015C": ("YAL015C", "YBL007C"),
    }
    assert found.left_out["other_type"].tolist() == [4]
    with pytest.raises(ValueError, match=r"line 2: name 'TFC3' stands for 'YAL001C' and 'YAL015C'; ambiguous='drop'"):
        read_sgd_features(path, ambiguous="error")
    with pytest.raises(ValueError, match=r"types: .*unknown value 'ORFs'.*did you mean 'ORF'"):
        read_sgd_features(path, types=["ORFs"])
    edges = tmp_path / "edges.tsv"
    edges.write_text("YAL999C\tNTG1\nYAL015C\tYBL007C\n")
    assert read_edge_list(edges, found.genes).by_alias == {"YAL999C": "YAL001C", "NTG1": "YAL015C"}


@pytest.mark.parametrize("taxon", ["", "4932."])
def test_string_aliases_of_all_versions(tmp_path: Path, taxon: str) -> None:
    genes = GeneList([f"{taxon}YAL001C", f"{taxon}YBL007C"], aliases={"TFC3": f"{taxon}YAL001C"})
    lines = [
        ["YAL001C", "TSV115", "SGD BLAST"],
        ["YBL007C", "TFC3", "SGD"],
        ["YBL007C", "SLA1", "UniProt"],
        ["YXX", "X", "SGD"],
    ]
    path = tmp_path / "aliases.txt"
    path.write_text("## string_protein_id ## alias ## source ##\n" + rows(*(["4932." + line[0], *line[1:]] for line in lines)))
    found = read_string_aliases(path, genes)
    assert found.genes.aliases == {"TFC3": f"{taxon}YAL001C", "TSV115": f"{taxon}YAL001C", "SLA1": f"{taxon}YBL007C"}
    assert found.ambiguous == {"TFC3": (f"{taxon}YAL001C", f"{taxon}YBL007C")}
    assert (found.num_unknown_lines, found.num_lines) == (1, 4)
    path.write_text("## species_ncbi_taxon_id ##\n" + rows(*(["4932", *line] for line in lines)))
    assert read_string_aliases(path, genes).genes == found.genes
    only = read_string_aliases(path, genes, sources=["BLAST"])
    assert list(only.genes.aliases) == ["TFC3", "TSV115"]
    assert only.left_out["other_source"].tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match=r"sources: .*unknown value 'Uniprot'"):
        read_string_aliases(path, genes, sources=["Uniprot"])


@pytest.mark.parametrize(("duplicates", "weight"), [("max", 0.5), ("mean", 0.375), ("sum", 0.75)])
def test_merged_edges(tmp_path: Path, duplicates: str, weight: float) -> None:
    path = tmp_path / "e.tsv"
    path.write_text("TFC3\tYAL015C\t0.5\nYAL001C\tYAL015C\t0.25\nYAL015C\tYAL001C\t1\nYBL007C\tYBL007C\t2\n")
    table = read_edge_list(path, GENES)
    edges, merged, repeated = table.merged(duplicates)
    assert merged is not None
    assert (edges.tolist(), merged.tolist(), repeated) == ([[0, 1, 2], [1, 0, 2]], [weight, 1, 2], 1)
    with pytest.raises(ValueError, match=re.escape("1 pairs have lines with different weights, genes (0, 1) from 0.25 to 0.5")):
        table.merged("error")
    path.write_text("TFC3\tYAL015C\nYAL001C\tYAL015C\n")
    assert read_edge_list(path, GENES).merged("error")[1:] == (None, 1)


@pytest.mark.parametrize(
    "rule", ["YAL001C and", "(YAL001C", "YAL001C)", "YAL001C YAL015C", "and", "()", "YAL001C or or YAL015C"]
)
def test_rules_that_are_none(tmp_path: Path, rule: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(MODEL.replace("YAL001C and (YAL015C or YBL007C)", rule))
    with pytest.raises(ValueError, match=r"m\.json: reaction 'R1': no rule"):
        read_metabolic_model(path, GENES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"id": "R1"', '"id": "EX"'), "a reaction stands twice"),
        (('"id": "b_c"', '"id": "a_c"'), "a metabolite stands twice"),
        (('"b_c": 0.125', '"a_c": 0.125'), r"m\.json: no JSON: the key 'a_c' stands twice in an object"),
        (('"genes": []', '"reactions": []'), r"m\.json: no JSON: the key 'reactions' stands twice in an object"),
        (('"genes": []', '"genes": ' + '{"a":' * 100_000), r"m\.json: no JSON: .* while decoding a JSON object"),
        (('"id": "b_c"', '"id": "c_c"'), "reaction 'R1': metabolite 'b_c' is not among those of the model"),
        (("0.125", '"x"'), "reaction 'R1': metabolite 'b_c': expected a finite number, got str 'x'"),
        (("0.125", "1e39"), r"metabolite 'b_c': expected a finite number, got float 1e\+39"),  # infinite in float32
        (("0.125", "1e-50"), r"metabolite 'b_c': 1e-50 is 0 in float32"),
        (("0.125", "1" + "0" * 400), r"metabolite 'b_c': expected a finite number, got int 10{76}\.\.\."),
        (('"reactions"', '"react"'), "reactions: expected a list, as COBRApy writes it"),
        (('"id": "R1"', '"name": "R1"'), r"reactions\[0\]: expected an object with an id"),
    ],
)
def test_malformed_models(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(MODEL.replace(*change))
    with pytest.raises(ValueError, match=message):
        read_metabolic_model(path, GENES)


def test_models_by_cobra(tmp_path: Path) -> None:
    cobra_io = pytest.importorskip("cobra.io")
    path = tmp_path / "m.json"
    path.write_text(MODEL)
    expected = read_metabolic_model(path, GENES)
    assert expected.reactions == ("R1", "EX")
    assert expected.gene_reaction.edge_index.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert expected.reaction_metabolite.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert expected.coefficient.tolist() == [-1, 0.125, -1]
    whole = json.loads(MODEL)
    whole |= {"id": "m", "version": "1", "compartments": {"c": "cytosol"}}
    whole["genes"] = [{"id": gene, "name": gene} for gene in GENES.names[:3]]
    for part in whole["metabolites"]:
        part |= {"name": part["id"], "compartment": "c"}
    for part in whole["reactions"]:
        part |= {"name": part["id"], "lower_bound": 0, "upper_bound": 10}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # COBRApy's own
        model = cobra_io.model_from_dict(whole)
        cobra_io.write_sbml_model(model, str(tmp_path / "m.xml"))
        cobra_io.save_yaml_model(model, str(tmp_path / "m.yml"))
        for name in ("m.xml", "m.yml"):
            found = read_metabolic_model(tmp_path / name, GENES)
            assert values(found.gene_reaction) | {"titles": None} == values(expected.gene_reaction) | {"titles": None}
            assert found.coefficient.tolist() == expected.coefficient.tolist()
            assert found.metabolites == expected.metabolites
        (tmp_path / "m.xml").write_text('<sbml level="3">')
        with pytest.raises(ValueError, match=r"m\.xml: COBRApy reads no model from it"):
            read_metabolic_model(tmp_path / "m.xml", GENES)


def test_models_without_cobra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cobra", None)
    path = tmp_path / "m.xml"
    path.write_text("<sbml/>")
    with pytest.raises(ImportError, match=r"m\.xml: .*pip install 'cellattn\[cobra\]'"):
        read_metabolic_model(path, GENES)


def test_names_that_a_spreadsheet_took_for_dates(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    dates, others = ("1-Mar", "Sep-07", "2026-10-01", "2026-10-01 00:00:00"), ("sep-1", "MAR1", "31-Foo", "Mar-1x")
    for name in (*dates, *others):
        path.write_text(f"gene_a\tgene_b\tscore\nYAL001C\t{name}\t1\n")
        with pytest.warns(UserWarning, match="unknown gene") as seen:
            assert read_interactions(path, GENES).left_out["unknown"].tolist() == [2]
        assert (f"{name!r} looks like the date that a spreadsheet makes" in str(seen[0].message)) is (name in dates)


def test_hints_are_of_the_readers_own_arguments(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("protein1 protein2 coexpression combined_score\n")
    with pytest.raises(ValueError, match=r"^channels: .* no column 'coexpresion', .*; did you mean 'coexpression'\?$"):
        read_string_links(path, GENES, channels="coexpresion")
    with pytest.raises(ValueError, match=r"^channels: .* no column 'fusion', its columns are .*'combined_score'$"):
        read_string_links(path, GENES, channels="fusion")
    for header, hint in (
        ("#gene_a\tgene_b\tscore", "comment='#' leaves lines out"),
        ('"gene_a"\t"gene_b"\t"score"', "quote='\"' takes the quotes off"),
        ("gene_a,gene_b,score", "it was split at '\\\\t', is sep another"),
        ("gene_a\tgene_2\tscore", "did you mean 'gene_a'"),
        ("GENE_A\tgene_b\tscore", "did you mean 'GENE_A'"),
        ("Gene1\tGene2\tscore", "where the first line is no header, header=False takes columns"),
    ):
        path.write_text(f"{header}\nYAL001C\tYAL015C\t1\n")
        with pytest.raises(ValueError, match=rf"has no column 'gene_.', its columns are .*; {hint}"):
            read_interactions(path, GENES)
