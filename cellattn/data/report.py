"""What a cell was made of, for a person: a page of Markdown, and the degrees of its relations as a figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..graph import MultiGraph
from ..graph.node_types import GENE

NO_FIGURE = "No figure of degrees: matplotlib is not installed (`pip install 'cellattn[bench]'`)."
_SHOWN = 10  # names that are shown of many


def report_of(graph: MultiGraph, sources: Mapping[str, Any]) -> str:
    genes, names = sources["genes"], graph.names
    assert names is not None
    num_genes = len(graph.node_types[GENE])
    alone = torch.ones(len(names), dtype=torch.bool)
    for relation in graph.relations:
        alone[graph.edge_index(relation).flatten()] = False
    without_edge = [names[i] for i in alone[:num_genes].nonzero()[:, 0].tolist()]
    lines = [
        f"# {sources['config']['path']}",
        "",
        f"{num_genes:,} genes of {genes['path']}, with {len(names.aliases):,} aliases; "
        f"{len(without_edge):,} in no relation{_listed(without_edge)}.",
        f"Names that two genes claim: {len(sources['ambiguous']):,}{_listed(sources['ambiguous'])}.",
        f"Retired systematic names: {len(sources['retired']):,}{_listed(sources['retired'])}.",
        "",
        "| relation | entries | pairs | genes | most neighbours | of all | lines | left out | repeated | by alias | file |",
        f"{'|---' * 11}|",
    ]
    for name, source in sources["relations"].items():
        counts = source["counts"]
        left_out = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in counts["left_out"].items())
        degree, entries = graph.degree(name), graph.num_edges(name)
        rows, columns = (len(graph.node_types[kind]) for kind in graph.joins(name))
        able, joined = rows * columns, ""
        if "tokens" in counts:
            one, other = graph.joins(name)
            joined = f" (to {columns:,} {other})" if one == GENE else f" (from {rows:,} {one} to {columns:,} {other})"
        cells = [
            name + (" (directed)" if source["options"].get("directed") else joined),
            f"{entries:,}",
            f"{counts['pairs']:,}",
            f"{counts['genes']:,}",
            f"{int(degree.max()):,}",
            f"{entries / max(able, 1):.2%}",
            f"{counts['lines']:,}",
            left_out or "none",
            f"{counts['repeated']:,}",
            f"{counts['by_alias']:,}",
            source["path"],
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    for name, source in sources["relations"].items():
        counts = source["counts"]
        told = {
            "unknown names": [f"{gene} ({count})" for gene, count in counts["unknown"].items()],
            "retired names": [f"{old} (now {new})" for old, new in counts["retired"].items()],
        }
        for what, some in told.items():
            lines += ["", f"{name}: {len(some):,} {what}{_listed(some)}."] if some else []
        for what, count in (("self-loops", counts["self_loops"]), ("edges of weight 0, which are none", counts["weight_0"])):
            lines += ["", f"{name}: {count:,} {what}."] if count else []
    return "\n".join(lines) + "\n"


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    shown = ", ".join([*names][:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
    return f": {shown}" if shown else ""


def figure_of(graph: MultiGraph) -> bytes | None:
    """How many genes have how many neighbours or more, a line a relation, as PNG; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # without pyplot: nothing of it is global
    axis = figure.add_subplot()
    lines = {}
    for name in graph.relations:
        degree = graph.degree(name).sort(descending=True).values
        degree = degree[degree > 0]
        (line,) = axis.plot(degree.tolist(), range(1, len(degree) + 1), drawstyle="steps-post")
        lines[name.replace("$", r"\$")] = line  # no formula, and no label that a legend leaves out
    scale = "log" if graph.num_edges() else "linear"  # of nothing there is no logarithm
    axis.set(
        xlabel="neighbours (of directed relations: targets)", ylabel="genes with as many or more", xscale=scale, yscale=scale
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(list(lines.values()), list(lines), fontsize=7, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format="png", metadata={"Software": None})
    return image.getvalue()
