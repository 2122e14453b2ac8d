"""A cell made of files: a list of genes, tables of edges and of what genes belong to, named in a TOML file, become one graph
that knows its sources.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from .._check import describe, require, require_choice, unknown
from .._file import file_path, text_of_page, write_atomic
from .._modes import without_function_modes
from .._version import __version__
from ..genes import GeneList
from ..graph import MultiGraph
from ..graph.file import notes_of
from ..graph.node_types import GENE
from .aliases import GeneNames, read_sgd_features, read_string_aliases
from .go import read_go_annotations
from .metabolic import read_metabolic_model
from .readers import read_biogrid, read_edge_list, read_edge_table, read_string_links
from .report import NO_FIGURE, figure_of, report_of
from .tables import EdgeTable, MembershipTable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_GENES: dict[str, Callable[..., GeneList | GeneNames]] = {"table": GeneList.from_table, "sgd": read_sgd_features}
_ALIASES: dict[str, Callable[..., GeneNames]] = {"string": read_string_aliases}
_RELATIONS: dict[str, Callable[..., EdgeTable | dict[str, EdgeTable]]] = {
    "string": read_string_links,
    "biogrid": read_biogrid,
    "table": read_edge_table,
    "edge-list": read_edge_list,
}
_PARTS = ("gene-reaction", "reaction-metabolite")  # of a metabolic model, the first by default


def _part_of_model(path: Path, genes: GeneList, *, part: str = _PARTS[0]) -> MembershipTable:
    """One of the two relations of `read_metabolic_model`."""
    require_choice("part", part, _PARTS)
    model = read_metabolic_model(path, genes)
    return model.gene_reaction if part == _PARTS[0] else model.stoichiometry()


_MEMBERSHIPS: dict[str, Callable[..., MembershipTable]] = {"go": read_go_annotations, "metabolic-model": _part_of_model}
_OF_MEMBERSHIP: dict[str, dict[str, Any]] = {
    "go": {"reversed": False},
    "metabolic-model": {"reversed": False, "rows": "reaction", "weighted": True},
}
_FILES = ("ontology",)  # options that name a file, relative to the configuration
_OF_RELATION = {"directed": False, "weighted": True, "duplicates": "max"}  # what a relation is made of its table by


@dataclass(frozen=True, eq=False)
class Cell:
    """What `build_cell` makes.

    Attributes:
        graph: the relations, with the genes' names.
        sources: where they come from, in JSON's types: "version" of cellattn, "config" (its file), "genes", "aliases" and
            "relations", each with its file ("path" as the configuration has it, "bytes", "sha256"), "reader", "options", and
            counts of what was found and left out.
    """

    graph: MultiGraph
    sources: dict[str, Any]

    def report(self) -> str:
        """Markdown: genes, edges by relation, what was left out of which file, and unknown names."""
        return report_of(self.graph, self.sources)

    def save(self, path: str | PathLike[str]) -> list[Path]:
        """Write the graph with its sources, the report beside it (.md) and, where matplotlib is, degrees as a figure (.png).

        `MultiGraph.load` reads the graph, `read_sources` the sources.

        Returns:
            The files that were written.

        Raises:
            ValueError: a path that does not end in .safetensors. FileNotFoundError: its folder is not there.
        """
        path = check_out(path)
        self.graph.save(path, notes={"sources": json.dumps(self.sources, sort_keys=True)})
        page, figure = path.with_suffix(".md"), path.with_suffix(".png")
        image = figure_of(self.graph)
        if image is not None:
            write_atomic(figure, image)
        shown = f"![degrees]({figure.name})" if image is not None else NO_FIGURE
        write_atomic(page, text_of_page(f"{self.report()}\n{shown}\n"))
        return [path, page, *([] if image is None else [figure])]


def check_out(path: Any) -> Path:
    """The file that a cell is to be written to, before anything is read."""
    path = file_path(path)
    require(path.suffix == ".safetensors", f"path: expected a file that ends in .safetensors, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: no folder {str(path.parent)!r}, where {path.name!r} is to be written")
    return path


@without_function_modes
def build_cell(config: str | PathLike[str]) -> Cell:
    """Make a graph of the tables that a TOML file names.

    | table | keys |
    |---|---|
    | `[genes]` | `path`; `reader`: "table" (with the arguments of `GeneList.from_table`) or "sgd" (of `read_sgd_features`) |
    | `[[aliases]]`, any number | `path`; `reader`: "string" (of `read_string_aliases`) |
    | `[relations.NAME]` | `path`; `reader`: "string", "biogrid", "table" or "edge-list", with the arguments of `read_string_links`, `read_biogrid`, `read_edge_table` or `read_edge_list`; and the keys below |
    | `[relations.NAME]` | `path`; `reader`: "go", with the arguments of `read_go_annotations`, or "metabolic-model", with `part`; and `tokens`, `reversed`, and of a model `rows`, `weighted` |

    Paths are relative to the TOML file. A relation is undirected unless `directed = true`, keeps its weights unless
    `weighted = false` (of signed ones the magnitude), and of a pair that several lines name it takes by `duplicates` the weight
    "max", "mean" or "sum", or with "error" refuses differing ones. `remove` is a regular expression whose matches are cut
    out of the names of a "table" or "edge-list". A pair given in both directions has the larger of the two weights. Several `channels` of a STRING file become relations NAME_CHANNEL.

    The readers "go" and "metabolic-model" make a relation from genes to terms, or to the reactions whose rule names them: tokens
    of the type `tokens` (by default NAME), behind the genes and named as the file names them, in the order of the relations.
    With `part = "reaction-metabolite"` the relation is from the model's reactions, tokens of the type `rows` ("reaction"), to
    their metabolites, `tokens`; its weights are the magnitudes of the coefficients unless `weighted = false`. Relations share a
    type where they name it alike and the file names its tokens alike. With `reversed = true` rows and columns change places.

    Raises:
        FileNotFoundError, ValueError, TypeError: with the file, table and key at fault; what the readers raise, likewise.
    """  # noqa: E501
    if not isinstance(config, (str, PathLike)):
        raise TypeError(f"config: expected a path, got {describe(config)}")
    config = Path(config)
    content = config.read_bytes()
    try:
        given = tomllib.loads(content.decode("utf-8-sig"))
    except ValueError as error:  # of a file that is no text, too
        raise ValueError(f"{config}: no TOML: {error}") from error
    for key in given:
        if key not in ("genes", "aliases", "relations"):
            unknown(f"{config}: key", key, ("genes", "aliases", "relations"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown genes are in the report
        genes, told = _genes(config, given)
        tables: dict[str, EdgeTable | MembershipTable] = {}
        sources: dict[str, dict[str, Any]] = {}
        relations = given.get("relations")
        if not isinstance(relations, dict) or not relations:
            raise ValueError(f"{config}: relations: expected at least one table [relations.NAME], got {describe(relations)}")
        for name, entry in relations.items():
            require(name != "", f"{config}: relations: expected a name of each, got ''")
            reader = entry.get("reader") if isinstance(entry, dict) else None
            of_kind = _OF_MEMBERSHIP.get(reader) if isinstance(reader, str) else None
            made = _OF_RELATION if of_kind is None else {"tokens": name, **of_kind}
            source = _Source.of(config, f"relations.{name}", entry, {**_RELATIONS, **_MEMBERSHIPS}, made)
            found = source.read(genes)
            options = source.told["options"]
            if source.reader is _part_of_model:
                options.setdefault("part", _PARTS[0])
            if isinstance(found, MembershipTable) and found.rows is None:
                for key in ("rows", "weighted"):
                    require(
                        key not in entry,
                        f"{config}: {source.table}.{key}: expected none, the rows are genes, got {entry.get(key)!r}",
                    )
                    options.pop(key, None)  # of the other part of a model
            parts = (
                {f"{name}_{channel}": table for channel, table in found.items()} if isinstance(found, dict) else {name: found}
            )
            for part, table in parts.items():
                require(part not in tables, f"{config}: {source.table}: there is a relation {part!r} already")
                with source.blamed():
                    tables[part], counts = _made(table, source.made)
                sources[part] = source.told | {"counts": counts | _left_out(table, told["retired"])}
    graph = _graph(config, genes, tables, {name: source["options"] for name, source in sources.items()})
    return Cell(graph, {"version": __version__, "config": _file(config.name, content), **told, "relations": sources})


def read_sources(path: str | PathLike[str]) -> dict[str, Any]:
    """Where the relations of a cell come from, as `Cell.sources` has it, from the file that `Cell.save` wrote.

    Raises:
        ValueError: a file of a graph without sources, no file of a graph, or a damaged one.
    """
    notes = notes_of(path)
    require("sources" in notes, f"path: {str(path)!r} holds a graph without its sources")
    return dict(json.loads(notes["sources"]))


# ------------------------------------------------------------------------------------------------------- configuration


class _Source(NamedTuple):
    """One table of the configuration."""

    config: Path
    table: str  # its name
    reader: Callable[..., Any]
    path: Path
    options: dict[str, Any]  # of the reader
    made: dict[str, Any]  # what else is done with what it returns
    told: dict[str, Any]  # file, reader and options, in JSON's types

    @classmethod
    def of(
        cls,
        config: Path,
        table: str,
        entry: Any,
        readers: Mapping[str, Callable[..., Any]],
        others: Mapping[str, Any] | None = None,
    ) -> _Source:
        """Check a table, its keys and its path."""
        where = f"{config}: {table}"
        if not isinstance(entry, dict):
            raise TypeError(f"{where}: expected a table, got {describe(entry)}")
        for key in ("path", "reader"):
            require(key in entry, f"{where}: expected the key {key!r}, its keys are {', '.join(entry) or 'none'}")
            require(isinstance(entry[key], str), f"{where}.{key}: expected a string, got {describe(entry[key])}")
        if entry["reader"] not in readers:
            unknown(f"{where}.reader", entry["reader"], readers)
        reader = readers[entry["reader"]]
        parameters = inspect.signature(reader).parameters.values()
        allowed = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        if "rename" in allowed:
            allowed = allowed - {"rename"} | {"remove"}
        made = dict(others or {})
        options = {}
        for key, value in entry.items():
            if key in made:
                kind = type(made[key])
                require(isinstance(value, kind), f"{where}.{key}: expected a {kind.__name__}, got {describe(value)}")
                made[key] = value
            elif key not in ("path", "reader"):
                if key not in allowed:
                    unknown(f"{where}: key", key, ("path", "reader", *made, *sorted(allowed)))
                options[key] = value
        for p in parameters:
            needed = p.kind is p.KEYWORD_ONLY and p.default is p.empty
            require(not needed or p.name in options, f"{where}: the reader {entry['reader']!r} needs the key {p.name!r}")
        told = _found(config, f"{where}.path", entry["path"]) | {"reader": entry["reader"], "options": options | made}
        for key in _FILES:
            if key in options:
                told[key] = _found(config, f"{where}.{key}", options[key])
                options = options | {key: config.parent / options[key]}
        if "remove" in options:
            options = {key: value for key, value in options.items() if key != "remove"} | {
                "rename": _without(where, entry["remove"])
            }
        return cls(config, table, reader, config.parent / entry["path"], options, made, told)

    def read(self, *genes: GeneList) -> Any:
        """What the reader returns."""
        with self.blamed():
            return self.reader(self.path, *genes, **self.options)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Errors name the configuration, the table and, where it is a key's value, the key."""
        try:
            yield
        except (ValueError, TypeError) as error:
            argument = re.match(r"(\w+)[\[:]", str(error))
            is_key = argument is not None and argument[1] in {**self.options, **self.made}
            raise type(error)(f"{self.config}: {self.table}{'.' if is_key else ': '}{error}") from error


def _found(config: Path, where: str, name: Any) -> dict[str, Any]:
    """What is told of a file that the configuration names."""
    require(isinstance(name, str), f"{where}: expected a string, got {describe(name)}")
    path = config.parent / name
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no file {str(path)!r}")
    return _file(name, path.read_bytes())


def _file(path: str, content: bytes) -> dict[str, Any]:
    """What is told of a file."""
    return {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _without(where: str, pattern: Any) -> Callable[[str], str]:
    """Cuts the matches of a regular expression out of names."""
    require(isinstance(pattern, str), f"{where}.remove: expected a regular expression, got {describe(pattern)}")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}.remove: {pattern!r} is no regular expression: {error}") from error
    return lambda name: compiled.sub("", name)


def _genes(config: Path, given: Mapping[str, Any]) -> tuple[GeneList, dict[str, Any]]:
    """The gene list with all aliases, and what is told of it."""
    require("genes" in given, f"{config}: expected the table [genes]")
    source = _Source.of(config, "genes", given["genes"], _GENES)
    found = source.read()
    ambiguous: dict[str, Sequence[str]] = {}
    retired: dict[str, str] = {}
    aliases = []
    genes = found
    if isinstance(found, GeneNames):
        genes, ambiguous, retired = found.genes, dict(found.ambiguous), dict(found.retired)
    entries = given.get("aliases", [])
    if not isinstance(entries, list):
        raise TypeError(f"{config}: aliases: expected tables [[aliases]], got {describe(entries)}")
    for at, entry in enumerate(entries):
        more = _Source.of(config, f"aliases[{at}]", entry, _ALIASES)
        named = more.read(genes)
        genes, ambiguous, retired = named.genes, ambiguous | dict(named.ambiguous), retired | dict(named.retired)
        aliases.append(more.told | {"counts": _left_out(named, {})})
    require(len(genes) > 0, f"{config}: genes: no gene in {source.told['path']!r}")
    told = source.told | {"counts": {"genes": len(genes), "aliases": len(genes.aliases)}, "digest": genes.digest()}
    return genes, {
        "genes": told,
        "aliases": aliases,
        "ambiguous": {alias: list(names) for alias, names in sorted(ambiguous.items())},
        "retired": retired,
    }


# ------------------------------------------------------------------------------------------------------- relations


def _graph(
    config: Path, genes: GeneList, tables: Mapping[str, EdgeTable | MembershipTable], options: Mapping[str, Mapping[str, Any]]
) -> MultiGraph:
    """Genes, and behind them the tokens of every membership."""
    tokens: dict[str, Sequence[str]] = {GENE: list(genes)}
    first = {GENE: 0}
    owner: dict[str, str] = {}  # of the name of each token behind the genes, its type
    joins, edges = {}, {}
    for name, table in tables.items():
        edges[name] = table.edge_index
        if isinstance(table, MembershipTable):
            ends = []
            for key, names in (("rows", table.rows), ("tokens", table.names)):
                if names is None:  # genes
                    ends.append(GENE)
                    continue
                where, kind = f"{config}: relations.{name}", options[name][key]
                ends.append(kind)
                if kind in tokens:
                    same = tuple(tokens[kind]) == names
                    require(same, f"{where}.{key}: there are tokens {kind!r} already; give others a name of their own")
                    continue
                for other in names:
                    require(other not in genes, f"{where}: {other!r} is the name of a gene and one of {kind!r}")
                    require(other not in owner, f"{where}: {other!r} is one of {owner.get(other)!r} and one of {kind!r}")
                first[kind] = sum(map(len, tokens.values()))
                tokens[kind] = names
                owner |= dict.fromkeys(names, kind)
            index = table.edge_index + table.edge_index.new_tensor([[first[kind]] for kind in ends])
            is_reversed = options[name]["reversed"]
            edges[name] = index.flip(0) if is_reversed else index
            joins[name] = (ends[1], ends[0]) if is_reversed else (ends[0], ends[1])
    everyone = [name for names in tokens.values() for name in names]
    return MultiGraph.from_edge_index(
        edges,
        len(everyone),
        edge_weight={n: t.weight for n, t in tables.items() if t.weight is not None},
        undirected=[name for name in tables if name not in joins and not options[name]["directed"]],
        names=genes.extend(everyone[len(genes) :]),
        node_types={kind: len(names) for kind, names in tokens.items()},
        joins=joins,
    )


def _made(
    table: EdgeTable | MembershipTable, made: Mapping[str, Any]
) -> tuple[EdgeTable | MembershipTable, dict[str, int]]:  # fmt: skip
    """Each pair once, with its weight, and counts of what was merged."""
    if isinstance(table, MembershipTable):  # has each pair once
        table = replace(table, weight=table.weight if made.get("weighted") else None)
        num_pairs, num_rows = table.edge_index.shape[1], table.edge_index[0].unique().numel()
        counts = {"repeated": 0, "pairs": num_pairs, "genes": num_rows if table.rows is None else 0, "self_loops": 0}
        counts |= {"weight_0": 0 if table.weight is None else int((table.weight == 0).sum())}
        return table, {"lines": table.num_lines, **counts, "tokens": len(table.names)}
    weight = table.weight.abs() if table.weight is not None and made["weighted"] else None
    table = replace(table, weight=weight)
    if made["duplicates"] == "error" and not made["directed"]:  # nor may the two directions differ
        replace(table, edge_index=table.edge_index.sort(0).values).merged("error")
    edge_index, merged, repeated = table.merged(made["duplicates"])
    pairs = edge_index if made["directed"] else edge_index.sort(0).values.unique(dim=1)
    counts = {
        "lines": table.num_lines,
        "repeated": repeated,
        "pairs": pairs.shape[1],
        "genes": pairs.unique().numel(),
        "self_loops": int((pairs[0] == pairs[1]).sum()),
        "weight_0": 0 if merged is None else int((merged == 0).sum()),
    }
    return replace(table, edge_index=edge_index, weight=merged), counts


def _left_out(table: EdgeTable | MembershipTable | GeneNames, retired: Mapping[str, str]) -> dict[str, Any]:
    """Lines by reason, unknown names, and names found by alias."""
    return {
        "left_out": {reason: len(lines) for reason, lines in table.left_out.items() if len(lines)},
        "unknown": dict(table.unknown),
        "by_alias": len(table.by_alias),
        "retired": {name: gene for name, gene in table.by_alias.items() if name in retired},
    }
