"""The page of a finished screen: what was screened, its distribution, the best sets, genes by best partner, agreement."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from .._file import text_of_page, write_atomic

if TYPE_CHECKING:
    from .merge import Merged

SHOWN = 20  # rows of either end in tables and figures
FEW_BINS = 20  # show less than a distribution


def write_page(merged: Merged, ranking: pl.DataFrame, folder: Path) -> Path:
    """Write `page.md`, and its figures where matplotlib is installed; returns the page."""
    figures = draw(merged, folder)
    path = folder / "page.md"
    write_atomic(path, text_of_page(page(merged, ranking, figures)))
    return path


def page(merged: Merged, ranking: pl.DataFrame, figures: Sequence[str]) -> str:
    """The page as Markdown."""
    plan, status = merged.store.plan, merged.status
    members = merged.store.labels["models"]
    about = [
        ("sets scored", f"{status.sets:,}"),
        ("ranks", f"{merged.store.total:,}, in {merged.store.num_units:,} units"),
        ("of", _describe_sets(plan["sets"])),
        ("models", ", ".join(members)),
        ("kept", plan["keep"]["rule"] + {"mean": "", "certainty": " by |mean| / sd"}[plan["keep"]["by"]]),
        (
            "products in",
            plan["dtype"] + (", or float32 where a processor has no instructions for it" * (plan["dtype"] == "bfloat16")),
        ),
        ("computed with", "; ".join(status.versions)),
        ("gene names", f"SHA-256 {plan['digests']['genes'][:12]}"),
    ]
    if status.rate is not None:
        about.append(("ranks a second", f"{status.rate:,.0f}, all workers together"))
    parts = ["# Screen", "", table(["", ""], about), ""]
    parts += ["## Distribution", "", table(["", "mean over the models"], merged.tables.moments()), ""]
    parts += _figure(figures, "histogram.png", "histogram of all sets")
    if len(merged.tables.histogram()[1]) < FEW_BINS:
        parts += [f"Few of the {merged.tables.bins.number:,} bins hold all sets: `--bins LOW:HIGH:N` makes finer ones.", ""]
    shown = min(SHOWN, len(ranking))
    for title, rows in _ends(merged):
        parts += [f"## {title}", "", _rows(rows.head(shown)), ""]
    parts += _figure(figures, "top.png", "the sets of the ranking's ends")
    genes = merged.genes
    parts += ["## Genes by their best partner", "", _rows(genes.head(SHOWN)), ""]
    parts += _figure(figures, "genes.png", "genes by their best partner")
    if len(members) > 1:
        correlation = merged.agreement.correlation.tolist()
        lines = [(name, *(f"{x:.3f}" for x in row)) for name, row in zip(members, correlation, strict=True)]
        parts += ["## Agreement of the models", "", "Pearson correlation of predictions over all sets:", ""]
        parts += [table(["", *members], lines), "", *_figure(figures, "agreement.png", "correlation of the models")]
    parts.append(
        f"`ranking.parquet` has {len(ranking):,} rows, the highest first. Everything that was kept is in the units: "
        '`polars.scan_parquet("../*.parquet")`.'
    )
    if not figures:
        parts += ["", "No figures: matplotlib is not installed (`pip install 'cellattn[bench]'`)."]
    return "\n".join(parts) + "\n"


def _ends(merged: Merged) -> list[tuple[str, pl.DataFrame]]:
    """What the ends of the ranking are called, and their rows."""
    if merged.store.plan["keep"]["by"] == "certainty":
        return [("Most certain, by |mean| / sd", merged.high)]
    return [("Highest", merged.high), ("Lowest", merged.low)]


def _figure(figures: Sequence[str], name: str, what: str) -> list[str]:
    return [f"![{what}]({name})", ""] if name in figures else []


def _describe_sets(sets: dict[str, Any]) -> str:
    """What was combined, in words."""
    parts = [f"{sets['kind']}, {sets['order']} of {len(sets['roster']):,} genes a set"]
    types = sets.get("types")
    if types is not None:
        parts += [
            types if isinstance(types, str) else "types by gene" if isinstance(types, dict) else "each " + " or ".join(types)
        ]
    parts += [f"filter: {', '.join(f'{key} {value}' for key, value in f.items() if key != 'digest')}" for f in sets["filters"]]
    return "; ".join(parts)


def _rows(frame: pl.DataFrame) -> str:
    """A frame as Markdown."""
    return table(frame.columns, [[_text(x) for x in row] for row in frame.iter_rows()])


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


# ------------------------------------------------------------------------------------------------------- figures


def draw(merged: Merged, folder: Path) -> list[str]:
    """Names of the figures that were written; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    figures = {"histogram.png": _histogram, "top.png": _top, "genes.png": _genes}
    if len(merged.store.labels["models"]) > 1:
        figures["agreement.png"] = _agreement
    for name, f in figures.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")  # without pyplot: nothing of it is global
        f(merged, figure)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        image = io.BytesIO()
        figure.savefig(image, dpi=130, format="png")
        write_atomic(folder / name, image.getvalue())
    return list(figures)


def _histogram(merged: Merged, figure: Any) -> None:
    axis = figure.add_subplot()
    edges, counts = merged.tables.histogram()
    axis.stairs(counts, edges, fill=True, color="#1b6ca8")
    axis.set(xlabel="mean over the models", ylabel="sets", yscale="log" if sum(counts) else "linear")  # of nothing no logarithm


def _top(merged: Merged, figure: Any) -> None:
    ends = _ends(merged)[::-1]
    for axis, (title, frame) in zip(figure.subplots(1, len(ends), squeeze=False)[0], ends, strict=True):
        shown = frame.head(SHOWN)
        genes, types = (shown.select(f"^{column}[0-9]+$").cast(pl.String).rows() for column in ("gene", "type"))
        names = [
            " ".join(row) + "".join(f", {kind}" for kind in kinds) for row, kinds in zip_longest(genes, types, fillvalue=())
        ]
        axis.errorbar(
            shown["mean"].to_list(), range(len(names)), xerr=shown["sd"].to_list(), fmt="o", markersize=3, color="#1b6ca8"
        )
        axis.set_yticks(range(len(names)), names, fontsize=6, parse_math=False)
        axis.invert_yaxis()
        axis.set(title=title.lower(), xlabel="mean ± sd over the models")
        axis.locator_params(axis="x", nbins=4)  # numbers of many digits side by side


def _genes(merged: Merged, figure: Any) -> None:
    axis = figure.add_subplot()
    shown = merged.genes.head(SHOWN)
    axis.barh(range(len(shown)), shown["highest"].to_list(), color="#1b6ca8")
    names = [f"{gene} with {others}" for gene, others in shown.select("gene", "highest_with").iter_rows()]
    axis.set_yticks(range(len(shown)), names, fontsize=7, parse_math=False)
    axis.invert_yaxis()
    axis.set(xlabel="mean over the models of the gene's best set")


def _agreement(merged: Merged, figure: Any) -> None:
    axis = figure.add_subplot()
    names = merged.store.labels["models"]
    correlation = merged.agreement.correlation
    image = axis.imshow(correlation.tolist(), cmap="viridis", vmax=1)
    figure.colorbar(image, label="Pearson correlation over all sets")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7, parse_math=False)
    axis.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
