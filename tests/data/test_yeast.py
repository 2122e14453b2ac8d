"""The real yeast tables, as their README describes them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from cellattn import MultiGraph
from cellattn.data import (
    GeneList,
    load_dcell_subset,
    load_yeast,
    read_biogrid,
    read_edge_list,
    read_go_annotations,
    read_interactions,
    read_metabolic_model,
    read_sga,
    read_string_links,
)

# stored entries: both directions of undirected relations, lines that name an unknown gene left out
ENTRIES = {
    "physical": 352606,
    "neighborhood": 2 * (45610 - 9),
    "fusion": 2 * (1361 - 3),
    "cooccurence": 2 * (2664 - 5),
    "database": 2 * 33486,
    "regulatory": 11486 - 136,
    "motif": 71305 - 199,
    "coexpression": 2 * 14826,
    "complex": 2 * (7075 - 20),
}


@pytest.fixture(scope="module")
def yeast(yeast_dir: Path) -> tuple[GeneList, MultiGraph]:
    with pytest.warns(UserWarning, match="unknown gene"):
        return load_yeast(yeast_dir)


def test_load_yeast_counts(yeast: tuple[GeneList, MultiGraph]) -> None:
    genes, graph = yeast
    assert len(genes) == graph.num_nodes == 6600
    assert genes.index(["COX1"]).equal(genes.index(["Q0045"]))
    assert {relation: graph.num_edges(relation) for relation in graph.relations} == ENTRIES


def test_load_yeast_direction_and_weights(yeast: tuple[GeneList, MultiGraph]) -> None:
    genes, graph = yeast
    for relation in graph.relations:
        edges = graph.edge_index(relation)
        key, flipped = edges[0] * 6600 + edges[1], edges[1] * 6600 + edges[0]
        assert torch.equal(key, flipped.sort().values) == (relation not in ("regulatory", "motif")), relation
        assert (graph.weight(relation) > 0).all()
    row, col = genes.index(["YBR070C", "YAL069W"]).tolist()  # the first line of the motif table, value 4.0
    span = slice(*graph.rowptr("motif")[row : row + 2].tolist())
    assert graph.weight("motif")[span][graph.col("motif")[span] == col] == 4
    assert graph.weight("physical").max() == 999


@pytest.mark.filterwarnings("ignore:.*unknown gene")
def test_load_yeast_unweighted(yeast_dir: Path) -> None:
    _, graph = load_yeast(yeast_dir, weighted=False)
    assert {relation: graph.num_edges(relation) for relation in graph.relations} == ENTRIES
    assert all((graph.weight(relation) == 1).all() for relation in graph.relations)


def test_physical_links_lines(yeast: tuple[GeneList, MultiGraph], yeast_dir: Path) -> None:
    table = read_string_links(yeast_dir / "4932.protein.physical.links.v12.0.txt.gz", yeast[0], score_threshold=700)
    assert not isinstance(table, dict)
    assert table.num_lines == 352606
    assert table.weight is not None
    assert table.weight.min() >= 700
    assert table.num_below_threshold == 352606 - table.edge_index.shape[1]


def test_dcell_subset(yeast: tuple[GeneList, MultiGraph], yeast_dir: Path) -> None:
    data = load_dcell_subset(yeast_dir, yeast[0])
    train, test = data.subset("*_training"), data.subset("*_testing")
    # no pair of the public table stands on both sides, so nothing is removed
    assert (len(data), len(train), len(test)) == (18467, 8783 + 5092, 2868 + 1724)
    assert not train.overlaps(test).any()
    assert data.seeds.unique().numel() == 259
    assert set(data.split_names) == {f"GO_{term}_{side}" for term in ("0006281", "0000790") for side in ("training", "testing")}
    assert data[0].seeds.equal(yeast[0].index(["YLR035C", "YML060W"]))
    assert float(data[0].y) == pytest.approx(0.0447)


def test_dcell_training_pairs_of_the_test_split_are_removed(tmp_path: Path) -> None:
    lines = ["A\tB\t0.1\tX_training", "B\tC\t0.2\tX_training", "B\tA\t0.3\tY_testing", "C\tA\t0.4\tY_testing"]
    text = "gene_a\tgene_b\tscore\tsplit\n" + "\n".join(lines) + "\n"
    (tmp_path / "costanzo2016_dcell_subset.tsv.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.warns(UserWarning, match="1 training pairs removed"):
        data = load_dcell_subset(tmp_path, GeneList(["A", "B", "C"]))
    assert data.split == ["X_training", "Y_testing", "Y_testing"]
    assert data.subset("*_training").seeds.tolist() == [1, 2]


def test_costanzo_2010_lines(yeast: tuple[GeneList, MultiGraph], yeast_dir: Path) -> None:
    with pytest.warns(UserWarning, match="797 lines left out that name 57 unknown genes"):
        table = read_interactions(yeast_dir / "costanzo2010_raw_gi.tsv.gz", yeast[0], score="weight")
    assert table.num_lines == 78701
    assert len(table.score) == 78701 - 797


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"genes\.tsv\.gz"):
        load_yeast(tmp_path)


LISTS = {
    "4932": (352606, 0),
    "bionic_Hu": (14826, 0),
    "bionic_Krogan": (7075, 20),
    "string9_1_n": (45610, 9),
    "yeastract": (11486, 136),
}


@pytest.mark.filterwarnings("ignore:.*unknown gene")
@pytest.mark.parametrize("name", LISTS)
def test_the_same_tables_as_plain_edge_lists(yeast: tuple[GeneList, MultiGraph], yeast_dir: Path, name: str) -> None:
    (path,) = yeast_dir.glob(f"{name}*")
    table = read_edge_list(path, yeast[0], rename=lambda protein: protein.removeprefix("4932."))
    assert (table.num_lines, table.num_unknown_lines) == LISTS[name]


def test_other_readers_refuse_tables_that_are_not_theirs(yeast: tuple[GeneList, MultiGraph], yeast_dir: Path) -> None:
    path, genes = yeast_dir / "costanzo2010_raw_gi.tsv.gz", yeast[0]
    for read, message in (
        (read_sga, "none of the published layouts of SGA tables"),
        (read_biogrid, "no column 'Systematic Name Interactor A'"),
        (read_string_links, "no column 'protein1'"),
        (read_go_annotations, "expected the 17 columns of a GAF file"),
        (read_metabolic_model, "expected a metabolic model in JSON, SBML or YAML"),
    ):
        with pytest.raises(ValueError, match=message):
            read(path, genes)
