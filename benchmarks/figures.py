"""What all pictures share: one look for an implementation wherever it is drawn, and how a picture is written.

Colours differ in lightness too, and each has a hatch and a marker of its own, so that a print in black and white can be read.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cellattn._file import write_atomic

OURS, INK, PALE = "#1b6ca8", "#404040", "#e9e9e9"


@dataclass(frozen=True)
class Look:
    """How an implementation is drawn.

    Attributes:
        colour: of its bar or line.
        hatch: of its bar.
        marker, dashes: of its line.
        label: what a legend calls it; its name if "".
    """

    colour: str
    hatch: str = ""
    marker: str = "o"
    dashes: Any = "-"
    label: str = ""

    def bar(self) -> dict[str, Any]:
        """Of `barh`."""
        return {"color": self.colour, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0.5}

    def line(self) -> dict[str, Any]:
        """Of `plot`."""
        width = 2.6 if self.colour == OURS else 1.4
        return {"color": self.colour, "linestyle": self.dashes, "marker": self.marker, "markersize": 4, "linewidth": width}


_LOOKS = {
    "ours": Look(OURS, label="cellattn"),
    "dense eager": Look("#b4b4b4", "", "s", "--"),
    "dense compiled": Look("#6f6f6f", "////", "D", "-.", "dense, torch.compile"),
    "dense PyTorch": Look("#b4b4b4", "", "s", "--"),
    "loop over sets": Look("#b4b4b4", "...", "s", "--", "a loop over sets in PyTorch"),
    "PyG": Look("#e07b39", "\\\\\\", "v", (0, (5, 1))),
    "PyG and dense reconstructions": Look("#e07b39", "xxx", "v", (0, (5, 1))),
    "PyG TransformerConv": Look("#e07b39", "\\\\\\", "v", (0, (5, 1))),
    "torch-sparse": Look("#4f9d69", "---", "^", ":"),
    "scipy": Look("#e3c565", "|||", "P", (0, (3, 1, 1, 1))),
    "SDPA flash": Look("#8a6fb0", "+++", "^", ":", "SDPA flash, no loss"),
    "SDPA math": Look("#a0522d", "ooo", "X", (0, (5, 1)), "SDPA math, no loss"),
    "dense SDPA, bool mask": Look("#a0522d", "ooo", "X", (0, (5, 1)), "SDPA with the mask as a matrix"),
    "SDPA efficient": Look("#c79ecf", "|||", "<", ":", "SDPA efficient, no loss"),
    "SDPA cudnn": Look("#5b3f8c", "---", ">", ":", "SDPA cudnn, no loss"),
    "FlashAttention 2": Look("#d0a0a0", "...", "p", ":", "FlashAttention 2, no loss"),
    "FlashAttention 4 + gather": Look("#c44e52", "xxx", "P", (0, (3, 1, 1, 1))),
    "FlexAttention + gather": Look("#4f9d69", "---", "*", (0, (1, 1))),
}
_OTHER = Look("#d8d8d8", "**", "d", (0, (1, 2)))


def look(name: str) -> Look:
    """Of an implementation by the name it has in results; all ways to call ours are of one colour."""
    return _LOOKS.get(name, _LOOKS["ours"] if name.startswith("ours") else _OTHER)


def ink(colour: str) -> str:
    """A colour, made dark enough for letters."""
    red, green, blue = to_rgb(colour)
    darker = min(1.0, 0.45 / (0.3 * red + 0.59 * green + 0.11 * blue))
    return to_hex((darker * red, darker * green, darker * blue))


def label(name: str) -> str:
    """What a legend calls an implementation."""
    return look(name).label or name


def finding(axis: Axes, text: str, **of_axes: Any) -> None:
    """What a panel shows, in words, above it; and what its axes are."""
    axis.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)
    if not axis.has_data():  # which a logarithmic axis cannot show
        of_axes = {name: value for name, value in of_axes.items() if not name.endswith("scale")}
    axis.set(**of_axes)
    axis.spines[["top", "right"]].set_visible(False)


def plain_numbers(axis: Axis) -> None:
    """1,000 in place of 10^3, on a logarithmic axis on which all is drawn; 2 and 5 too where there are few powers of ten."""
    low, high = axis.get_view_interval()
    if not 0 < low < high < float("inf"):  # nothing is drawn on it
        return
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """A number on a bar."""
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def factor(value: float) -> str:
    """How many times."""
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"


def span(values: Iterable[float]) -> str:
    """1.2 to 13, of factors."""
    low, high = factor(min(values := list(values))), factor(max(values))
    return low if low == high else f"{low} to {high}"


def name_lines(axis: Axes, ends: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Names beside the last points of lines, ((x, y), name, colour) each, moved apart where they would overlap.

    The lines are on the axis already, in the scale that it keeps.
    """
    if not ends:
        return
    axis.set(xlim=axis.get_xlim(), ylim=axis.get_ylim())  # which makes them what they will be
    to_axes = axis.transData + axis.transAxes.inverted()
    here = sorted(((to_axes.transform(point)[1], point, name, colour) for point, name, colour in ends), key=lambda end: end[0])
    gap = 0.045
    places = list(itertools.accumulate((y for y, *_ in here), lambda below, y: max(y, below + gap)))
    back = sum(place - y for place, (y, *_) in zip(places, here, strict=True)) / len(here)  # the mean of what they moved up
    for place, (_, point, name, colour) in zip(places, here, strict=True):
        axis.annotate(
            name, point, (1.04, place - back), textcoords="axes fraction", color=ink(colour), fontsize=8, va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)},
        )  # fmt: skip


def save(figure: Figure, path: Path, environment: Mapping[str, str]) -> None:
    """Write a picture, whole or not at all; in its corner where and when its figures were measured (`measure.environment`)."""
    where = f"{environment['device']}; torch {environment['torch']}; {environment['date']}"
    figure.supxlabel(where, x=0.995, ha="right", fontsize=7, color=INK)
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    plt.close(figure)
    write_atomic(path, image.getvalue())
