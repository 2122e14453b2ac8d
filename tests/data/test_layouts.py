"""Tables in the layouts they are published in, each read by one call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellattn.data import EdgeTable, GeneList, PerturbationDataset, read_edge_table, read_interactions, read_string_links

HO = "YDL227C"  # deleted in every control strain
GENES = GeneList(["YAL001C", "YAL015C", "YBL007C", "YBR160W", "YCR009C", "YDL017W"], aliases={"TFC3": "YAL001C"})


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def write(folder: Path, *lines: str, name: str = "table.txt") -> Path:
    path = folder / name
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_trigenic_interactions(tmp_path: Path) -> None:
    """Kuzmin et al. 2018, data file S1: a query of two genes, or of one and the control."""
    path = write(
        tmp_path,
        "Query strain ID\tQuery allele name\tArray strain ID\tArray allele name\tCombined mutant type\t"
        "Raw genetic interaction score (epsilon)\tAdjusted genetic interaction score (epsilon or tau)\tP-value\t"
        "Query single/double mutant fitness\tArray single mutant fitness\tDouble/triple mutant fitness\t"
        "Double/triple mutant fitness standard deviation",
        "YAL015C+YCR009C_tm461\tntg1Δ+rvs161Δ\tYBL007C_dma91\tsla1Δ\ttrigenic\t-0.1\t-0.0932\t0.01\t0.9\t0.8\t0.6\t0.05",
        "YAL015C+YDL227C_tm462\tntg1Δ+hoΔ\tYBR160W_tsa1065\tcdc28-td\tdigenic\t0.04\t0.0411\t0.3\t0.9\t0.8\t0.7\t0.05",
        "YDL227C+YCR009C_tm463\thoΔ+rvs161Δ\tYDL017W_tsa1\tcdc7-1\tdigenic\tNaN\tNaN\tNaN\tNaN\t0.8\tNaN\tNaN",
        "YAL015C+YBL007C_tm464\tntg1Δ+sla1Δ\tYBL007C_dma91\tsla1Δ\ttrigenic\t-0.5\t-0.5\t0.01\t0.9\t0.8\t0.6\t0.05",
    )
    table = read_interactions(
        path,
        GENES,
        gene_columns=("Query strain ID", "Array strain ID"),
        score="Adjusted genetic interaction score (epsilon or tau)",
        split="Combined mutant type",
        rename=lambda strain: [gene for gene in strain.partition("_")[0].split("+") if gene != HO],
        missing="drop",
        repeated="drop",
    )
    assert table.seeds.tolist() == GENES.index(["YAL015C", "YCR009C", "YBL007C", "YAL015C", "YBR160W"]).tolist()
    assert table.ptr.tolist() == [0, 3, 5]
    assert table.score.tolist() == pytest.approx([-0.0932, 0.0411], rel=1e-6)  # float32
    assert table.split == ("trigenic", "digenic")
    assert {reason: lines.tolist() for reason, lines in table.left_out.items()} == {
        "unknown": [],
        "missing": [4],
        "repeated": [5],
    }
    assert (table.num_lines, table.num_missing_lines, table.num_repeated_lines, table.num_unknown_lines) == (4, 1, 1, 0)
    assert "1 lines left out whose number is missing [line 4]" in table.report()
    assert len(PerturbationDataset.from_interactions(table)) == 2


def test_sga_interactions(tmp_path: Path) -> None:
    """Costanzo et al. 2016, data file S1: strain ids end in the allele, and a gene may be crossed with its own allele."""
    path = write(
        tmp_path,
        "Query Strain ID\tQuery allele name\tArray Strain ID\tArray allele name\tArraytype/Temp\t"
        "Genetic interaction score (ε)\tP-value\tQuery single mutant fitness (SMF)\tArray SMF\tDouble mutant fitness\t"
        "Double mutant fitness standard deviation",
        "YAL001C_tsq508\ttfc3-g349e\tYBL007C_dma123\tsla1\tDMA30\t-0.0348\t0.005\t0.8285\t1.0503\t0.8102\t0.0053",
        "YAL001C_tsq508\ttfc3-g349e\tYBR160W_tsa1065\tcdc28-td\tTSA30\t-3.5e-3\t0.4\t0.8285\t1.0122\t0.8051\t0.0121",
        'YAL001C_tsq508\ttfc3-g349e\tYCR009C_dma1\trvs161 "a"\tDMA30\tNaN\tNaN\t0.8285\tNaN\tNaN\tNaN',
        "YBR160W_tsq1\tcdc28-1\tYBR160W_tsa1065\tcdc28-td\tTSA30\t-0.3\t0.01\t0.8\t1.01\t0.4\t0.01",
    )
    table = read_interactions(
        path,
        GENES,
        gene_columns=("Query Strain ID", "Array Strain ID"),
        score="Genetic interaction score (ε)",
        rename=lambda strain: strain.partition("_")[0],
        missing="drop",
        repeated="drop",
    )
    assert table.seeds.view(2, 2).tolist() == [[0, 2], [0, 3]]
    assert table.score.tolist() == pytest.approx([-0.0348, -0.0035], rel=1e-6)
    assert (table.left_out["missing"].tolist(), table.left_out["repeated"].tolist()) == ([4], [5])


BIOGRID = (
    "#BioGRID Interaction ID\tEntrez Gene Interactor A\tEntrez Gene Interactor B\tBioGRID ID Interactor A\t"
    "BioGRID ID Interactor B\tSystematic Name Interactor A\tSystematic Name Interactor B\tOfficial Symbol Interactor A\t"
    "Official Symbol Interactor B\tSynonyms Interactor A\tSynonyms Interactor B\tExperimental System\t"
    "Experimental System Type\tAuthor\tPublication Source\tOrganism ID Interactor A\tOrganism ID Interactor B\tThroughput\t"
    "Score\tModification\tQualifications\tTags\tSource Database"
)


def biogrid_line(a: str, b: str, score: str, note: str = "-") -> str:
    return (
        f"241405\t851262\t851263\t31676\t31677\t{a}\t{b}\tTFC3\tNTG1\tTSV115|tau 138\t-\tNegative Genetic\tgenetic\t"
        f"Costanzo M (2016)\tPUBMED:27708008\t559292\t559292\tHigh Throughput\t{score}\t-\t{note}\t-\tBIOGRID"
    )


@pytest.mark.parametrize("comment", [None, "#"], ids=["plain", "comment"])
def test_biogrid_interactions(tmp_path: Path, comment: str | None) -> None:
    """BioGRID tab3: the header begins with the sign of a comment, fields hold quotes, scores may be "-"."""
    lines = (
        biogrid_line("YAL001C", "YAL015C", "-0.1316"),
        biogrid_line("YBL007C", "YAL001C", "-", 'growth in "heat shock"'),
        biogrid_line("YBL007C", "YBR160W", "-0.2", 'a 3" plate'),
    )
    path = write(tmp_path, BIOGRID, *lines, name="BIOGRID-ORGANISM.tab3.txt")
    a, b = "Systematic Name Interactor A", "Systematic Name Interactor B"
    assert read_edge_table(path, GENES, source=a, target=b, comment=comment).edge_index.tolist() == [[0, 2, 2], [1, 0, 3]]
    table = read_edge_table(path, GENES, source=a, target=b, weight="Score", signed=True, missing="drop", comment=comment)
    assert table.edge_index.tolist() == [[0, 2], [1, 3]]
    assert (table.left_out["missing"].tolist(), table.num_lines) == ([3], 3)
    scored = read_interactions(path, GENES, gene_columns=(a, b), score="Score", missing="drop", comment=comment)
    assert (scored.seeds.tolist(), scored.num_missing_lines) == ([0, 1, 2, 3], 1)
    with pytest.raises(ValueError, match=r"line 3: column 'Score' is '-', expected a finite number; missing='drop' leaves"):
        read_interactions(path, GENES, gene_columns=(a, b), score="Score", comment=comment)


@pytest.mark.parametrize("line", ["YAL001C\tYAL015C\t0.5", "YAL001C\tYAL015C\t0.5\t"], ids=["plain", "trailing-separator"])
def test_edge_lists_without_header(tmp_path: Path, line: str) -> None:
    end = "\t" * (line.count("\t") - 2)
    path = write(tmp_path, line, f"YBL007C\tTFC3\t0.25{end}", name="table.el")
    table = read_edge_table(path, GENES, source=0, target=1, weight=2, header=False)
    assert table.edge_index.tolist() == [[0, 2], [1, 0]]
    assert table.weight is not None
    assert table.weight.tolist() == [0.5, 0.25]
    scored = read_interactions(path, GENES, gene_columns=(0, 1), score=2, header=False)
    assert (scored.seeds.tolist(), scored.num_lines) == ([0, 1, 2, 0], 2)


@pytest.mark.parametrize("rename", [None, lambda name: name.partition("_")[0]], ids=["plain", "rename"])
def test_a_header_of_genes_is_warned_about(tmp_path: Path, rename: None) -> None:
    path = write(tmp_path, "YAL001C_1\tYAL015C" if rename else "YAL001C\tYAL015C", "YBL007C\tTFC3")
    source = "YAL001C_1" if rename else "YAL001C"
    with pytest.warns(
        UserWarning, match=r"the header names genes of the list \('YAL001C.*', 'YAL015C'\).*header=False"
    ) as caught:
        read_edge_table(path, GENES, source=source, target="YAL015C", rename=rename)
    assert caught[0].filename == __file__
    scored = write(tmp_path, "TFC3\tYAL015C\t0.5", "YBL007C\tTFC3\t0.25")
    with pytest.warns(UserWarning, match=r"\('TFC3', 'YAL015C'\)"):
        read_interactions(scored, GENES, gene_columns=("TFC3", "YAL015C"), score="0.5")


@pytest.mark.parametrize(
    ("lines", "comment"),
    [
        (("!gaf-version: 2.2", "!", "a\tb\tw", "YAL001C\tYAL015C\t1", "! inside", "YBL007C\tTFC3\t2", "!end"), "!"),
        (("# made by hand", "", "# twice", "a\tb\tw", "YAL001C\tYAL015C\t1", "", "#", "#")[:5], "#"),
        (("# made by hand", "# a\tb\tw", "YAL001C\tYAL015C\t1", "#YBL007C\tTFC3\t9", "YBL007C\tTFC3\t2"), "#"),
        (("## x", "#a\tb\tw", "YAL001C\tYAL015C\t1", "YBL007C\tTFC3\t2", "", "#"), "#"),
        (("// x", "a\tb\tw", "YAL001C\tYAL015C\t1"), "//"),
    ],
    ids=["gaf", "blank-lines", "commented-header", "marked-header", "two-characters"],
)
@pytest.mark.parametrize("sep", ["\t", ","], ids=["tab", "comma"])
def test_commented_tables(tmp_path: Path, lines: tuple[str, ...], comment: str, sep: str) -> None:
    path = write(tmp_path, *(line.replace("\t", sep) for line in lines))
    table = read_edge_table(path, GENES, source="a", target="b", weight="w", sep=sep, comment=comment)
    kept = sum(line.startswith("Y") for line in lines)
    assert (table.edge_index.tolist(), table.num_lines) == ([[0, 2][:kept], [1, 0][:kept]], kept)
    bad = write(tmp_path, *(line.replace("\t", sep) for line in lines if line), f"TFC3{sep}YAL015C{sep}x")
    number = sum(bool(line) for line in lines) + 1  # lines are those of the file
    with pytest.raises(ValueError, match=rf"line {number}: column 'w' is 'x'"):
        read_edge_table(bad, GENES, source="a", target="b", weight="w", sep=sep, comment=comment)


def test_conditions_of_perturb_seq(tmp_path: Path) -> None:
    path = write(tmp_path, "condition,effect", "YAL001C+YAL015C,0.5", "YBL007C+ctrl,-1", "ctrl,0", name="table.csv")
    table = read_interactions(
        path,
        GENES,
        gene_columns=("condition",),
        score="effect",
        sep=",",
        rename=lambda condition: [gene for gene in condition.split("+") if gene != "ctrl"],
    )
    assert (table.seeds.tolist(), table.ptr.tolist(), table.score.tolist()) == ([0, 1, 2], [0, 2, 3, 3], [0.5, -1, 0])


def test_an_edge_has_one_gene_at_each_end(tmp_path: Path) -> None:
    path = write(tmp_path, "a\tb", "YAL001C\tYAL015C", "YBL007C+TFC3\tYAL015C")
    with pytest.raises(ValueError, match=r"line 3: column 'a' names 2 genes, expected one end of an edge"):
        read_edge_table(path, GENES, source="a", target="b", rename=lambda name: name.split("+"))


@pytest.mark.parametrize("in_list", [True, False], ids=["list-with", "list-without"])
@pytest.mark.parametrize("in_file", [True, False], ids=["file-with", "file-without"])
def test_string_names_with_and_without_their_taxon(tmp_path: Path, in_list: bool, in_file: bool) -> None:
    first, second = ("4932." if there else "" for there in (in_list, in_file))
    info = write(
        tmp_path,
        "#string_protein_id\tpreferred_name\tprotein_size\tannotation",
        f'{first}YAL001C\tTFC3\t1160\tSubunit of "tau 138"; 5" end.',
        f"{first}YAL015C\tNTG1\t399\tDNA N-glycosylase.",
        name="4932.protein.info.v12.0.txt",
    )
    genes = GeneList.from_table(info, name="#string_protein_id", alias="preferred_name")
    file = write(tmp_path, "protein1 protein2 combined_score", f"{second}YAL001C {second}YAL015C 900", name="links.txt")
    table = read_string_links(file, genes)
    assert isinstance(table, EdgeTable)
    assert table.edge_index.tolist() == [[0], [1]]
    other = write(tmp_path, "protein1 protein2 combined_score", f"9606.YAL001C {second}YAL015C 900", name="human.txt")
    if in_list:
        with pytest.warns(UserWarning, match="1 unknown gene: YAL001C"):
            read_string_links(other, genes)


def test_other_tables_say_that_a_taxon_is_in_front(tmp_path: Path) -> None:
    path = write(tmp_path, "a\tb", "4932.YAL001C\t4932.YAL015C")
    with pytest.warns(UserWarning, match="names differ by the taxon in front, cut it off the list or by rename"):
        read_edge_table(path, GENES, source="a", target="b")
