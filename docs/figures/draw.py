"""The drawings of the concepts: python docs/figures/draw.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "cellattn"  # the same file from the same drawing
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
OURS, GREY, WARM = "#1b6ca8", "#c8c8c8", "#e07b39"


def grid(axis: Axes, x: float, y: float, values: np.ndarray, size: float, colour: str, *, crossed: bool = False) -> None:
    """A matrix as squares, dark where it is large."""
    rows, columns = values.shape
    for i in range(rows):
        for j in range(columns):
            alpha = float(values[i, j])
            axis.add_patch(
                Rectangle((x + j * size, y - (i + 1) * size), size, size, facecolor=colour, alpha=alpha, edgecolor="none")
            )
    axis.add_patch(Rectangle((x, y - rows * size), columns * size, rows * size, fill=False, edgecolor="#404040", lw=0.8))
    if crossed:
        for a, b in ((0, 1), (1, 0)):
            axis.plot([x, x + columns * size], [y - a * rows * size, y - b * rows * size], color=WARM, lw=2.5)


def plain(width: float, height: float) -> tuple[plt.Figure, Axes]:
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.axis("off")
    return figure, axis


def kl() -> None:
    """The map is not made; three terms are."""
    figure, axis = plain(9, 3)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(8, 8)) * 1.5
    alpha = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    graph = (rng.random((8, 8)) < 0.2).astype(float)
    grid(axis, 0.2, 2.5, alpha / alpha.max(), 0.22, GREY, crossed=True)
    axis.text(1.08, 0.45, "attention map\n[N, N]: never made", ha="center", fontsize=9)
    axis.text(2.5, 1.6, "instead", ha="center", fontsize=9, color="#606060")
    axis.add_patch(FancyArrowPatch((2.15, 1.4), (2.85, 1.4), arrowstyle="->", mutation_scale=14, color="#606060"))
    terms = ((3.2, "a constant\nof the graph"), (5.1, "edges alone:\n$q_i \\cdot \\sum_j t_{ij} k_j$"))
    for x, label in terms:
        grid(axis, x, 2.5, graph * (0.35 if x < 4 else 1.0), 0.2, OURS)
        axis.text(x + 0.8, 0.45, label, ha="center", fontsize=9)
    grid(axis, 7.5, 2.5, np.abs(scores).sum(1, keepdims=True) / 14, 0.2, OURS)
    axis.text(7.6, 0.45, "LSE of each row,\nwith its gradient", ha="center", fontsize=9)
    for x, sign in ((4.95, "-"), (7.1, "+")):
        axis.text(x, 1.6, sign, ha="center", fontsize=16)
    figure.savefig(HERE / "kl.svg", metadata={"Date": None})
    plt.close(figure)


def sets() -> None:
    """One row of values for all, and corrections."""
    figure, axis = plain(9, 2.7)
    for j in range(24):
        axis.add_patch(Rectangle((0.3 + 0.22 * j, 1.9), 0.2, 0.4, facecolor=OURS, alpha=0.35 + 0.02 * (j * 7 % 24), lw=0))
    axis.text(2.9, 2.4, "values of all genes: made once", ha="center", fontsize=9)
    for b, (genes, y) in enumerate((((3, 17), 1.2), ((9,), 0.7), ((5, 12, 20), 0.2))):
        for j in range(24):
            hit = j in genes
            axis.add_patch(Rectangle((0.3 + 0.22 * j, y), 0.2, 0.32, facecolor=WARM if hit else "none", edgecolor=GREY, lw=0.6))
        axis.text(5.75, y + 0.08, f"set {b}: {len(genes)} correction{'s' * (len(genes) > 1)}", fontsize=9)
    axis.text(7.6, 2.0, "not [B, N, d]\nbut [N, d] and |S| rows", fontsize=9, ha="center")
    figure.savefig(HERE / "sets.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    kl()
    sets()
