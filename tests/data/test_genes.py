"""The gene list: names and aliases to indices."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellattn import MultiGraph
from cellattn.data import GeneList, PerturbationDataset, require_same_genes


def test_index_takes_names_and_aliases() -> None:
    genes = GeneList(["YAL001C", "YBR002W"], aliases={"TFC3": "YAL001C", "YBR002W": "YBR002W"})
    index = genes.index(["YBR002W", "TFC3"])
    assert index.tolist() == [1, 0]
    assert index.dtype == torch.int64
    assert genes.index([]).shape == (0,)
    assert list(genes) == ["YAL001C", "YBR002W"]
    assert len(genes) == 2
    assert genes[1] == "YBR002W"
    assert "TFC3" in genes
    assert "RAD1" not in genes
    assert genes.get("RAD1") is None
    with pytest.raises(TypeError, match=r"index: expected the index of a gene, got the name 'TFC3'; `get` gives"):
        genes["TFC3"]  # type: ignore[index]


def test_from_table(tmp_path: Path) -> None:
    path = tmp_path / "genes.tsv"
    path.write_text("id\tname\nY1\tRAD1\nY2\t\nY3\tY3\n")
    genes = GeneList.from_table(path, name="id", alias="name")
    assert genes == GeneList(["Y1", "Y2", "Y3"], aliases={"RAD1": "Y1"})
    assert GeneList.from_table(path, name="id").get("RAD1") is None


@pytest.mark.parametrize(
    ("names", "aliases", "error", "message"),
    [
        pytest.param("YAL", None, TypeError, "names: expected several gene names, got the one string 'YAL'", id="string"),
        pytest.param(["A", 3], None, TypeError, "names: expected a string at position 1, got int 3", id="int"),
        pytest.param(
            np.array([["A"], ["B"]]),
            None,
            TypeError,
            "names: expected one column of gene names, got ndarray of (2, 1)",
            id="frame",
        ),
        pytest.param(["A", ""], None, ValueError, "names: the name at position 1 is empty", id="empty"),
        pytest.param(["A", "B", "A"], None, ValueError, "names: 'A' stands at positions 0 and 2", id="twice"),
        pytest.param(["A"], {"X": "B"}, ValueError, "aliases: 'X' stands for 'B', which is not", id="alias-unlisted"),
        pytest.param(["A", "B"], {"A": "B"}, ValueError, "aliases: 'A' stands for 'B' and is a name of 'A'", id="alias-name"),
        pytest.param(["A"], {"": "A"}, ValueError, "aliases: expected non-empty strings", id="alias-empty"),
    ],
)
def test_refuses(names: Any, aliases: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        GeneList(names, aliases=aliases)


def test_index_names_the_unknown_gene_and_the_nearest() -> None:
    genes = GeneList(["YAL001C", "YBR002W"])
    with pytest.raises(ValueError, match=r"names: unknown value 'YAL001W'.*did you mean 'YAL001C'"):
        genes.index(["YBR002W", "YAL001W"])
    with pytest.raises(TypeError, match="names: expected several gene names, got the one string 'YAL001C'"):
        genes.index("YAL001C")


def test_from_table_refuses_an_alias_of_two_genes(tmp_path: Path) -> None:
    path = tmp_path / "genes.tsv"
    path.write_text("id\tname\nY1\tRAD1\nY2\tRAD1\n")
    with pytest.raises(ValueError, match=r"genes\.tsv, line 3: alias 'RAD1' stands for 'Y1' and 'Y2'"):
        GeneList.from_table(path, name="id", alias="name")
    with pytest.raises(ValueError, match=r"name: .*has no column 'gene', its columns are 'id', 'name'"):
        GeneList.from_table(path, name="gene")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Y1\tA\nY2\tB\nY1\tC\n", "line 3: gene 'Y1' stands in line 1 already"),
        ("Y1\tY2\nY2\tB\n", "line 1: alias 'Y2' of 'Y1'"),
    ],
    ids=["repeated", "another-gene"],
)
def test_from_table_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "genes.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        GeneList.from_table(path, header=False, name=0, alias=1)


def test_from_table_reads_a_list_without_header(tmp_path: Path) -> None:
    path = tmp_path / "genes.txt"
    path.write_text("# yeast\nY1\nY2\n")
    assert GeneList.from_table(path, header=False, name=0, comment="#").names == ("Y1", "Y2")
    with pytest.raises(ValueError, match=r"no column 'name', its columns are 'Y1'; .* header=False takes columns by"):
        GeneList.from_table(path, comment="#")


def test_digest_is_of_the_names_in_their_order() -> None:
    genes = GeneList(["YAL001C", "YBR002W"])
    # sha256 of '["YAL001C","YBR002W"]': what stands in files must be found again by any version and any other program
    assert genes.digest() == "4d0b8c43761c2acc6e7eacee01b06b2c3c50fd027e36807afed314ed9c6132df"
    assert genes.digest() == GeneList(["YAL001C", "YBR002W"], aliases={"TFC3": "YAL001C"}).digest()
    others = [
        GeneList(names) for names in (["YBR002W", "YAL001C"], ["YAL001C"], ["YAL001CYBR002W"], ["YAL001C", "YBR002", "W"])
    ]
    assert len({genes.digest(), *(other.digest() for other in others)}) == 5


def test_select_and_extend_keep_aliases() -> None:
    genes = GeneList(["a", "b", "c"], aliases={"A": "a", "C": "c", "b": "b"})
    assert genes.aliases == {"A": "a", "C": "c"}
    chosen = genes.select(torch.tensor([2, 1]))
    assert chosen == GeneList(["c", "b"], aliases={"C": "c"})
    assert chosen.index(["C", "c", "b"]).tolist() == [0, 0, 1]
    assert chosen.get("A") is None
    assert genes.extend(["d"]) == GeneList(["a", "b", "c", "d"], aliases={"A": "a", "C": "c"})
    with pytest.raises(ValueError, match="'a' stands at positions 0 and 3"):
        genes.extend(["a"])
    assert GeneList(["new2", "x"]).fresh(3) == ["new1", "new3", "new4"]


def test_same_genes() -> None:
    a = GeneList(["x", "y"], aliases={"X": "x"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_same_genes(a, GeneList(["x", "y"]))
        require_same_genes(a, a)
        require_same_genes(None, None)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (["x", "y", "z"], ["x", "z", "y"], "got 'y' in the graph and 'z' in the data at position 1 (3 and 3 genes)"),
        (["x", "y"], ["x"], "got 'y' in the graph and no gene in the data at position 1 (2 and 1 genes)"),
        (["x"], ["x", "y"], "got no gene in the graph and 'y' in the data at position 1"),
    ],
    ids=["order", "short", "long"],
)
def test_other_genes_are_named(a: list[str], b: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        require_same_genes(GeneList(a), GeneList(b), what=("graph", "data"))


def test_what_has_no_names_is_said() -> None:
    with pytest.warns(UserWarning, match="dataset: has no gene names, so it is not checked .* are those of the graph"):
        require_same_genes(GeneList(["x"]), None)
    with pytest.warns(UserWarning, match="^graph: has no gene names, .* those of the dataset"):
        require_same_genes(None, GeneList(["x"]))
    with pytest.raises(TypeError, match="dataset: expected its GeneList or None, got list"):
        require_same_genes(None, ["x"])  # type: ignore[arg-type]


def test_an_unknown_name_does_not_print_the_genome() -> None:
    genes = GeneList([f"Y{i}" for i in range(6607)])
    with pytest.raises(ValueError, match="expected one of 6607 names; did you mean 'Y66") as caught:
        genes.index(["Y66O7"])
    assert len(str(caught.value)) < 200


def test_names_that_numpy_holds_are_strings(tmp_path: Path) -> None:
    """A subclass of str, as NumPy's, is in no file that `torch.load` reads unless it is told to trust it."""
    text = np.str_
    genes = GeneList(np.array(["x", "y", "z"]), aliases={text("other"): text("x")})
    graph = MultiGraph.from_edge_index(
        {text("a"): torch.tensor([[0], [2]])},
        3,
        names=genes,
        node_types={text("gene"): 2, text("term"): 1},
        joins={text("a"): (text("gene"), text("term"))},
    )
    whole = MultiGraph.from_edge_index({text("b"): torch.tensor([[0], [1]])}, 3)
    data = PerturbationDataset.from_sets([[text("x")], ["z"]], [0.0, 1.0], genes=genes, split=list(np.array(["train", "test"])))
    made = {
        "graph": graph,
        "of its relations": whole.select([text("b")]),
        "relation": whole[text("b")],
        "shared": graph.comembership(text("a")),
        "dataset": data,
    }
    torch.save(made, tmp_path / "made.pt")
    found = torch.load(tmp_path / "made.pt")
    assert found["graph"] == graph
    assert found["dataset"].split_names == ("train", "test")
    assert type(found["graph"].names[0]) is str
