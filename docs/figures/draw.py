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
    grid(axis, 0.2, 2.5, alpha / alpha.max(), 0.2, GREY, crossed=True)
    axis.text(1.0, 0.45, "attention map\n[N, N]: never made", ha="center", fontsize=9)
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


def neighbourhoods() -> None:
    """A bit a gene and sample, over one graph."""
    figure, axis = plain(9, 2.9)
    rng = np.random.default_rng(3)
    places = np.empty((0, 2))
    while len(places) < 14:  # genes that stand apart
        place = np.array([0.5 + 2.4 * rng.random(), 0.55 + 1.9 * rng.random()])
        if (np.linalg.norm(places - place, axis=1) > 0.4).all():
            places = np.vstack([places, place])
    far = np.linalg.norm(places[:, None] - places[None], axis=2)
    near = np.argsort(far, axis=1)[:, 1:3]
    edges = {tuple(sorted((i, int(j)))) for i in range(14) for j in near[i]}
    for i, j in sorted(edges):
        axis.plot(*places[[i, j]].T, color=GREY, lw=1.2, zorder=1)
    colours = (OURS, WARM, "#4f9d69")
    reached = []
    for sample, seed in enumerate((0, 5, 9)):
        hops = {seed}
        for _ in range(2):
            hops |= {j for pair in edges for i, j in (pair, pair[::-1]) if i in hops}
        reached.append(hops)
        axis.plot(*places[seed], "o", color=colours[sample], markersize=11, zorder=2)
    axis.plot(*places.T, "o", color="white", markeredgecolor="#404040", markersize=6, zorder=3)
    axis.text(1.7, 0.1, "one graph, and three sets", ha="center", fontsize=9)
    axis.add_patch(FancyArrowPatch((3.2, 1.5), (4.0, 1.5), arrowstyle="->", mutation_scale=14, color="#606060"))
    for sample, hops in enumerate(reached):
        for gene in range(14):
            face = colours[sample] if gene in hops else "none"
            axis.add_patch(
                Rectangle((4.3 + 0.22 * gene, 2.0 - 0.5 * sample), 0.2, 0.36, facecolor=face, edgecolor=GREY, lw=0.6)
            )
        axis.text(7.5, 2.1 - 0.5 * sample, f"set {sample}: {len(hops)} genes", fontsize=9)
    axis.text(5.8, 2.55, "within two hops: a bit a gene and set", ha="center", fontsize=9)
    axis.text(5.8, 0.45, "all sets at once, 64 bits a word; the graph is read, not copied", ha="center", fontsize=9)
    figure.savefig(HERE / "neighbourhoods.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    kl()
    sets()
    neighbourhoods()
