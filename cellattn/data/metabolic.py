"""A genome-scale metabolic model as two relations: genes to the reactions they catalyse, reactions to their metabolites.

JSON is read as COBRApy writes it (`cobra.io.save_json_model`, which BiGG serves too); SBML and YAML are read by COBRApy, which
has to be installed (`pip install 'cellattn[cobra]'`), and come out in the same form.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._check import describe, require, shown
from .._modes import without_function_modes
from ._lookup import most_first, require_genes, warn_of_unknown
from ._table import ANY_NUMBER, read_string
from .genes import GeneList
from .tables import MembershipTable

_TOKEN = re.compile(r"\s*([()]|&&?|\|\|?|[^\s()&|]+)")
_OPERATORS = frozenset(("and", "or", "&", "&&", "|", "||"))


@dataclass(frozen=True, eq=False, kw_only=True)
class MetabolicModel:
    """Reactions, their genes and their metabolites.

    Attributes:
        gene_reaction: pairs of a gene and a reaction whose rule names it, whether with "and" or "or". Its `names` are the R
            reactions; its lines are the genes that the rules name, counted from 1 through all rules in their order.
        metabolites: M ids.
        reaction_metabolite: int64 [2, E], positions of reactions and metabolites, ascending.
        coefficient: float32 [E], negative for what the reaction consumes.
        rules: the rule of each reaction, as the file has it.
    """

    gene_reaction: MembershipTable
    metabolites: tuple[str, ...]
    reaction_metabolite: Tensor
    coefficient: Tensor
    rules: tuple[str, ...]

    @property
    def reactions(self) -> tuple[str, ...]:
        """R ids."""
        return self.gene_reaction.names

    def stoichiometry(self) -> MembershipTable:
        """Reactions (`rows`) and their metabolites (`names`), weighted by the magnitudes of the coefficients."""
        return MembershipTable(
            path=self.gene_reaction.path,
            num_lines=len(self.coefficient),
            edge_index=self.reaction_metabolite,
            names=self.metabolites,
            rows=self.reactions,
            weight=self.coefficient.abs(),
        )

    def report(self) -> str:
        """Counts of reactions, metabolites and genes, and of those left out, on one line."""
        parts = f"{len(self.reactions)} reactions of {len(self.metabolites)} metabolites, {len(self.coefficient)} coefficients"
        return f"{self.gene_reaction.report()}; {parts}"


@without_function_modes
def read_metabolic_model(path: str | PathLike[str], genes: GeneList) -> MetabolicModel:
    """Read a genome-scale metabolic model: JSON of COBRApy's schema, or SBML or YAML through COBRApy.

    Args:
        path: the file, plain or compressed; its content tells which of the three it is.
        genes: the gene list, by systematic name or alias.

    Raises:
        ImportError: SBML or YAML without COBRApy.
        ValueError: no such model; the message names the file and the reaction.

    Warns:
        UserWarning: rules that name unknown genes.
    """
    require_genes(genes)
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"path: expected a path, got {describe(path)}")
    path = Path(path)
    model = _loaded(path, read_string(path).lstrip())
    metabolites = tuple(_id(path, "metabolites", at, entry) for at, entry in enumerate(_list(path, model, "metabolites")))
    number = {metabolite: at for at, metabolite in enumerate(metabolites)}
    require(len(number) == len(metabolites), f"{path}: a metabolite stands twice")
    names, titles, rules = [], [], []
    pairs: list[tuple[int, int]] = []
    unknown_at: list[int] = []
    unknown: dict[str, int] = {}
    by_alias: dict[str, str] = {}
    stoichiometry: list[tuple[int, int, float]] = []
    num_named = 0
    for at, reaction in enumerate(_list(path, model, "reactions")):
        name = _id(path, "reactions", at, reaction)
        where = f"{path}: reaction {shown(name)}"
        rule = reaction.get("gene_reaction_rule", "")
        require(isinstance(rule, str), f"{where}: gene_reaction_rule: expected a string, got {describe(rule)}")
        for gene in _genes_of(where, rule):
            num_named += 1
            index = genes.get(gene)
            if index is None:
                unknown[gene] = unknown.get(gene, 0) + 1
                unknown_at.append(num_named)
                continue
            pairs.append((index, at))
            if genes[index] != gene:
                by_alias[gene] = genes[index]
        parts = reaction.get("metabolites", {})
        require(isinstance(parts, Mapping), f"{where}: metabolites: expected an object, got {describe(parts)}")
        for metabolite, coefficient in parts.items():
            require(metabolite in number, f"{where}: metabolite {shown(metabolite)} is not among those of the model")
            is_number = isinstance(coefficient, (int, float)) and not isinstance(coefficient, bool)
            fits = is_number and ANY_NUMBER[0] <= coefficient <= ANY_NUMBER[1]  # integers have no bound of their own
            require(fits, f"{where}: metabolite {shown(metabolite)}: expected a finite number, got {describe(coefficient)}")
            lost = coefficient != 0 and np.float32(coefficient) == 0
            require(not lost, f"{where}: metabolite {shown(metabolite)}: {coefficient} is 0 in float32")
            stoichiometry.append((at, number[metabolite], float(coefficient)))
        names.append(name)
        titles.append(str(reaction.get("name") or ""))
        rules.append(rule)
    require(len(set(names)) == len(names), f"{path}: a reaction stands twice")
    stoichiometry.sort()
    edge_index = torch.tensor(sorted(set(pairs)), dtype=torch.int64).view(-1, 2).T.contiguous()
    members = MembershipTable(
        path=path,
        num_lines=num_named,
        left_out={"unknown": torch.tensor(unknown_at, dtype=torch.int64)},
        unknown=most_first(unknown),
        by_alias=dict(sorted(by_alias.items())),
        edge_index=edge_index,
        names=tuple(names),
        titles=tuple(titles),
    )
    warn_of_unknown(members, genes)
    ends = np.array([entry[:2] for entry in stoichiometry], dtype=np.int64).reshape(-1, 2).T
    return MetabolicModel(
        gene_reaction=members,
        metabolites=metabolites,
        reaction_metabolite=torch.from_numpy(np.ascontiguousarray(ends)),
        coefficient=torch.tensor([entry[2] for entry in stoichiometry], dtype=torch.float32),
        rules=tuple(rules),
    )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of whose keys that stand twice the first would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} stands twice in an object")
    return found


def _loaded(path: Path, text: str) -> Mapping[str, Any]:
    """The model in COBRApy's JSON schema."""
    if text.startswith("{"):
        try:
            return dict(json.loads(text, object_pairs_hook=_distinct))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: no JSON: {error}") from error
    is_yaml = text.startswith(("---", "!!omap", "- ", "%YAML"))
    require(
        is_yaml or text.startswith("<"),
        f"{path}: expected a metabolic model in JSON, SBML or YAML, it begins with {text[:40]!r}",
    )
    try:
        from cobra import io
    except ImportError as error:
        raise ImportError(f"{path}: SBML and YAML are read by COBRApy: pip install 'cellattn[cobra]'") from error
    logger = logging.getLogger("cobra")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it writes of a file without bounds or an objective, which are nothing to us
    try:
        return dict(io.model_to_dict(io.from_yaml(text) if is_yaml else io.read_sbml_model(text)))
    except Exception as error:  # of what parsers raise there is no list
        first = str(error).partition("\n")[0]
        raise ValueError(f"{path}: COBRApy reads no model from it: {type(error).__name__}: {first}") from error
    finally:
        logger.setLevel(level)


def _list(path: Path, model: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    entries = model.get(key)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: {key}: expected a list, as COBRApy writes it, got {describe(entries)}")
    return entries


def _id(path: Path, key: str, at: int, entry: Any) -> str:
    name = entry.get("id") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: {key}[{at}]: expected an object with an id, got {describe(entry)}")
    return name


def _genes_of(where: str, rule: str) -> Iterator[str]:
    """The genes of a rule, as (A and B) or C, in their order; refuses what is none."""
    depth, operand = 0, True  # whether an operand comes next
    for word in _TOKEN.findall(rule):
        is_operator = word.lower() in _OPERATORS
        require(operand != (is_operator or word == ")"), f"{where}: no rule at {shown(word)}: {shown(rule)}")
        depth += (word == "(") - (word == ")")
        require(depth >= 0, f"{where}: no rule, a bracket closes that was not opened: {shown(rule)}")
        if word not in "()" and not is_operator:
            yield word
            operand = False
        elif is_operator:
            operand = True
    require(depth == 0 and not (operand and rule.strip()), f"{where}: no rule, it ends too early: {shown(rule)}")
