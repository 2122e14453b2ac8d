"""A folder of public yeast tables as a gene list, a multigraph and measured double mutants."""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from .._check import describe
from .._modes import without_function_modes
from ..graph import MultiGraph
from .dataset import PerturbationDataset
from .genes import GeneList
from .readers import read_edge_table, read_interactions, read_string_links
from .tables import EdgeTable


class _Source(NamedTuple):
    file: str
    source: str = "gene_a"
    target: str = "gene_b"
    weight: str = "score"
    directed: bool = False


_PHYSICAL = "4932.protein.physical.links.v12.0.txt.gz"
_TABLES = {
    "neighborhood": _Source("string9_1_neighborhood.tsv.gz"),
    "fusion": _Source("string9_1_fusion.tsv.gz"),
    "cooccurence": _Source("string9_1_cooccurence.tsv.gz"),
    "database": _Source("string9_1_database.tsv.gz"),
    "regulatory": _Source("yeastract2019_regulatory.tsv.gz", "tf", "target", "value", directed=True),
    "motif": _Source("motif_prior.tsv.gz", "tf", "target", "value", directed=True),
    "coexpression": _Source("bionic_Hu-2007.tsv.gz", weight="weight"),
    "complex": _Source("bionic_Krogan-2006.tsv.gz", weight="weight"),
}


@without_function_modes
def load_yeast(folder: str | PathLike[str], *, weighted: bool = True) -> tuple[GeneList, MultiGraph]:
    """Read the gene list and all nine relations of the folder; interaction tables, which are labels, are not read.

    | relation | what | directed |
    |---|---|---|
    | physical | STRING v12.0 physical links, scores 0 to 1000 | no |
    | neighborhood, fusion, cooccurence, database | STRING v9.1 channels, scores 0 to 1 | no |
    | regulatory | YEASTRACT 2019, factor -> target | yes |
    | motif | binding motifs, factor -> target; the weight is the magnitude of the signed value | yes |
    | coexpression | Hu et al. 2007 | no |
    | complex | Krogan et al. 2006 | no |

    Args:
        folder: the folder with the tables.
        weighted: keep the weights of the tables; otherwise each edge weighs 1.

    Returns:
        The gene list (systematic names, standard names as aliases) and the multigraph, undirected relations symmetric, which
        carries it as `names`.

    Raises:
        FileNotFoundError: a table is not there.
        ValueError: a malformed table.
    """
    if not isinstance(weighted, bool):
        raise TypeError(f"weighted: expected a bool, got {describe(weighted)}")
    folder = Path(folder)
    genes = GeneList.from_table(folder / "genes.tsv.gz", name="systematic", alias="standard")
    physical = read_string_links(folder / _PHYSICAL, genes)
    assert isinstance(physical, EdgeTable)  # one channel was asked for
    tables = {"physical": physical}
    for relation, table in _TABLES.items():
        tables[relation] = read_edge_table(
            folder / table.file,
            genes,
            source=table.source,
            target=table.target,
            weight=table.weight,
            signed=relation == "motif",  # activation or repression; as evidence for an edge only the magnitude counts
        )
    graph = MultiGraph.from_edge_index(
        {relation: table.edge_index for relation, table in tables.items()},
        len(genes),
        edge_weight={r: t.weight.abs() for r, t in tables.items() if t.weight is not None} if weighted else None,
        # the STRING file holds both directions already
        undirected=[relation for relation, table in _TABLES.items() if not table.directed],
        names=genes,
    )
    return genes, graph


@without_function_modes
def load_dcell_subset(folder: str | PathLike[str], genes: GeneList) -> PerturbationDataset:
    """Read the signed digenic interaction scores of Costanzo et al. 2016 for two GO terms, with the source's split.

    The splits keep their names: `GO_0006281_training`, `GO_0006281_testing` (DNA repair), `GO_0000790_training` and
    `GO_0000790_testing` (nuclear chromatin); `dataset.subset("*_training")` and `dataset.subset("*_testing")` are the
    two sides of both terms. A training pair that also stands in a testing split, in either order, is removed, with a
    warning that says how many were (none in the public table). A pair listed under both terms stays twice.

    Args:
        folder: the folder with the tables.
        genes: the gene list.

    Returns:
        Double deletions, y float32 [B] the interaction score, in the order of the file.

    Raises:
        FileNotFoundError: the table is not there.
        ValueError: a malformed table.
    """
    table = read_interactions(Path(folder) / "costanzo2016_dcell_subset.tsv.gz", genes, split="split")
    dataset = PerturbationDataset.from_interactions(table)
    leaking = dataset.split_mask("*_training") & dataset.overlaps(dataset.subset("*_testing"))
    if leaking.any():
        warnings.warn(
            f"{table.path}: {int(leaking.sum())} training pairs removed that also stand in a testing split",
            stacklevel=3,
        )
    return dataset.subset(~leaking)
