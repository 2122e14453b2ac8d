"""The gene list: names and aliases to indices."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cellattn.data import GeneList


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
