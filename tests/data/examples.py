"""Lines of tables as their sources have them, and a list of genes."""

from __future__ import annotations

import json
from typing import Any

import torch

from cellattn.data import GeneList

GENES = GeneList(["YAL001C", "YAL015C", "YBL007C", "YDL227C"], aliases={"TFC3": "YAL001C"})


def rows(*lines: list[str], sep: str = "\t") -> str:
    return "".join(sep.join(line) + "\n" for line in lines)


def gaf(symbol: str, synonyms: str, qualifier: str, term: str) -> list[str]:
    return ["SGD", "S1", symbol, qualifier, term, "PMID:1", "IDA", "", "P", 'a "b" c', synonyms, "protein", "taxon:1", "1", "SGD", "", ""]  # noqa: E501  # fmt: skip


def sgd(kind: str, name: str, standard: str = "", aliases: str = "") -> list[str]:
    return ["S1", kind, "Verified", name, standard, aliases, *[""] * 9, 'said "so"']


TRIGENIC = [
    "Query strain ID", "Query allele name", "Array strain ID", "Array allele name", "Combined mutant type",
    "Raw genetic interaction score (epsilon)", "Adjusted genetic interaction score (epsilon or tau)", "P-value",
    "Query single/double mutant fitness", "Array single mutant fitness", "Double/triple mutant fitness",
    "Double/triple mutant fitness standard deviation",
]  # fmt: skip
TRIGENIC_LINES = [
    ["YAL015C+YBL007C_tm461", 'ntg "a"', "YAL001C_tsa91", "", "trigenic", "-0.1", "-0.125", "0.01", "0.9", "0.8", "0.6", "0.1"],
    ["YAL015C+YDL227C_tm462", "ntg1", "YBL007C_dma1", "sla1", "digenic", "-0.1", "0.5", "0.2", "0.9", "0.8", "0.7", "0.1"],
]  # fmt: skip
MODEL = json.dumps(
    {
        "metabolites": [{"id": "a_c"}, {"id": "b_c"}],
        "reactions": [
            {"id": "R1", "metabolites": {"b_c": 0.125, "a_c": -1.0}, "gene_reaction_rule": "YAL001C and (YAL015C or YBL007C)"},
            {"id": "EX", "metabolites": {"a_c": -1.0}, "gene_reaction_rule": ""},
        ],
        "genes": [],
    },
    indent=1,
)
OBO = """format-version: 1.2
data-version: releases/2024-01-17

[Term]
id: GO:1
name: root

[Term]
id: GO:2
name: kept
alt_id: GO:9
is_a: GO:1 {source="x"} ! root
relationship: part_of GO:3 ! other

[Term]
id: GO:3
name: other "one"

[Term]
id: GO:4
is_obsolete: true

[Typedef]
id: part_of
"""


def values(found: Any) -> Any:
    """What was read, in Python's own types."""
    if isinstance(found, dict):
        return {name: values(table) for name, table in found.items()}
    parts = {}
    for name, value in vars(found).items():
        if name == "gene_reaction":
            parts[name] = values(value)
        elif isinstance(value, GeneList):
            parts[name] = (value.names, value.aliases)
        elif name not in ("path", "num_lines", "left_out"):
            parts[name] = str(value.tolist()) if isinstance(value, torch.Tensor) else value  # NaN equals itself in text
    return parts
