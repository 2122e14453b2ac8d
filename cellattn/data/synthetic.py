"""A synthetic cell of the published size, and phenotypes planted in its graphs, for machines without data.

Each gene has a latent propensity, shared by all relations, and a relation multiplies it with noise of its own: degrees
are heavy-tailed, and a hub of one relation tends to be a hub of the others. The edges of a relation are then drawn
without replacement, pair (i, j) in proportion to the product of the two weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._check import count_of, describe, number_of, require, seed_of
from .._modes import without_function_modes
from ..graph import MultiGraph
from .dataset import PERTURBATION_TYPES, PerturbationDataset

_PUBLISHED_GENES = 6607
MIN_GENES = 32  # below, a relation has too few genes to hold one edge each
_SPREAD = 1.7  # of log propensity, shared
_RELATION_SPREAD = 0.5  # of log weight, a relation's own; the largest hub of "physical" then has some 2,500 edges
_REGULATOR_SHARE = 0.05  # of a directed relation's genes


class _Relation(NamedTuple):
    genes: int  # with an edge
    edges: int  # in one direction
    directed: bool = False


RELATIONS = {
    "regulatory": _Relation(3632, 9753, directed=True),
    "physical": _Relation(5721, 139463),
    "tflink": _Relation(5092, 201898, directed=True),
    "string12_neighborhood": _Relation(2204, 147874),
    "string12_fusion": _Relation(3095, 11810),
    "string12_cooccurence": _Relation(2615, 11115),
    "string12_coexpression": _Relation(6503, 1002538),
    "string12_experimental": _Relation(6036, 825101),
    "string12_database": _Relation(4044, 73818),
}


@without_function_modes
def synthetic_cell(
    seed: int = 0,
    *,
    num_genes: int = _PUBLISHED_GENES,
    edge_scale: float | None = None,
    symmetrize: bool = False,
    self_loops: bool = True,
) -> MultiGraph:
    """Make a multigraph with the nine relations of the published yeast cell, 2,482,833 entries as it stands.

    Genes and edges of each relation are exact. An undirected relation holds each pair once, in a random direction; in
    the directed ones ("regulatory", "tflink") a twentieth of the genes are the sources. Genes are named "gene0", "gene1", ...

    Args:
        seed: equal seeds give equal graphs.
        num_genes: size of the cell, at least 32; each relation covers its published share of the genes.
        edge_scale: factor on the published edges; None for `num_genes` / 6,607, which keeps mean degrees. The edges of
            a relation are held between one a gene and half of its pairs.
        symmetrize: store both directions of the undirected relations.
        self_loops: add one self-loop a gene and relation.

    Raises:
        TypeError, ValueError: a seed, size or scale that cannot be.
    """
    seed = seed_of("seed", seed)
    num_genes = count_of("num_genes", num_genes, minimum=MIN_GENES)
    size = num_genes / _PUBLISHED_GENES
    scale = size if edge_scale is None else number_of("edge_scale", edge_scale)
    require(scale > 0, f"edge_scale: expected a finite number above 0, got {edge_scale}")
    rng = np.random.default_rng(seed)
    propensity = rng.normal(scale=_SPREAD, size=num_genes)
    regulator = rng.normal(size=num_genes)  # the genes ahead in it are the sources of every directed relation
    edge_index = {}
    for name, published in RELATIONS.items():
        weight = np.exp(propensity + rng.normal(scale=_RELATION_SPREAD, size=num_genes))
        # genes join a relation in proportion to sqrt(weight), without replacement: the largest log + Gumbel noise. In
        # proportion to weight itself, a relation of few genes would hold hubs alone and lose its heavy tail
        joins = np.argsort(-(0.5 * np.log(weight) + rng.gumbel(size=num_genes)))[: round(published.genes * size)]
        sources = joins
        if published.directed:
            sources = joins[np.argsort(-regulator[joins])][: max(2, round(_REGULATOR_SHARE * len(joins)))]
        pairs = len(sources) * (len(joins) - 1) // (1 if published.directed else 2)
        num_edges = max(len(joins), min(round(published.edges * scale), pairs // 2))
        edges = torch.from_numpy(_draw_edges(rng, joins, sources, weight, num_edges, published.directed))
        if symmetrize and not published.directed:
            edges = torch.cat([edges, edges.flip(0)], 1)
        if self_loops:
            edges = torch.cat([edges, torch.arange(num_genes).expand(2, -1)], 1)
        edge_index[name] = edges
    return MultiGraph.from_edge_index(edge_index, num_genes, names=[f"gene{i}" for i in range(num_genes)])


def _draw_edges(
    rng: np.random.Generator, genes: np.ndarray, sources: np.ndarray, weight: np.ndarray, num_edges: int, directed: bool
) -> np.ndarray:
    """Draw `num_edges` distinct edges [2, num_edges], no self-loops, such that each of `genes` has one."""
    num_nodes = len(weight)

    def keys_of(source: np.ndarray, target: np.ndarray) -> np.ndarray:
        if not directed:
            source, target = np.minimum(source, target), np.maximum(source, target)
        return source * num_nodes + target

    # one edge for each gene, as the target; a gene that drew itself takes its neighbour in the list of sources
    drawn = _draw(rng, weight[sources], len(genes))
    drawn = np.where(sources[drawn] == genes, (drawn + 1) % len(sources), drawn)
    keys = _distinct(keys_of(sources[drawn], genes))
    temper = 1.0
    while len(keys) < num_edges:
        missing = num_edges - len(keys)
        count = missing + missing // 4 + 16
        source = sources[_draw(rng, weight[sources] ** temper, count)]
        target = genes[_draw(rng, weight[genes] ** temper, count)]
        fresh = np.setdiff1d(_distinct(keys_of(source, target)[source != target]), keys, assume_unique=True)
        keys = np.concatenate([keys, rng.permutation(fresh)[:missing]])
        temper *= 0.9  # pairs of hubs run out: later rounds move towards pairs drawn evenly, so that the loop ends
    edges = np.stack([keys // num_nodes, keys % num_nodes])
    if not directed:
        swapped = rng.random(num_edges) < 0.5
        edges[:, swapped] = edges[::-1, swapped]
    return edges


def _distinct(keys: np.ndarray) -> np.ndarray:
    """The distinct of keys that are not negative, ascending; much faster than `np.unique` on this kind of integers."""
    keys = np.sort(keys)
    return keys[np.diff(keys, prepend=-1) > 0]


def _draw(rng: np.random.Generator, weight: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` positions in proportion to `weight`, with replacement."""
    cumulative = np.cumsum(weight)
    # rounding may carry the largest draw to the total itself
    return np.minimum(np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right"), len(weight) - 1)


@without_function_modes
def synthetic_phenotypes(
    graph: MultiGraph,
    num_samples: int,
    *,
    seed: int = 0,
    set_size: int | Sequence[int] = 2,
    noise: float = 0.3,
    num_hubs: int = 32,
    num_factors: int = 8,
) -> PerturbationDataset:
    """Plant phenotypes in a multigraph such that the graphs tell what an additive model cannot know.

    The `num_hubs` genes of highest degree lead pathways: each carries a random factor z. A gene takes the mean factor
    of the hubs it is tied to, summed over the relations, f_i = sum_r mean_{h in N_r(i)} z_h (N_r in both directions),
    standardised over the genes. A set scores

        y_S = 0.5 sum_{i in S} a_i  +  sum_{i < j in S} f_i . f_j / c  +  noise e

    with a_i and e standard normal and c the standard deviation of f_i . f_j over random pairs: genes whose
    neighbourhoods share hubs in several relations interact. Of pairs, a third of the noiseless variance is additive.

    Args:
        graph: the relations; edge weights are not used.
        num_samples: number of sets.
        seed: equal seeds give equal data.
        set_size: genes a set, or several sizes to draw from. Sets are drawn evenly from all genes.
        noise: standard deviation of the measurement noise.
        num_hubs: number of hubs that carry a factor, at most the number of genes.
        num_factors: length of a factor.

    Returns:
        Deletions with y float32 [num_samples] and splits "train" (about 80%), "validation" and "test" (10% each); equal
        sets share a split.

    Raises:
        TypeError, ValueError: a count or size that cannot be.
    """
    if not isinstance(graph, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph, got {describe(graph)}")
    num_genes = graph.num_nodes
    num_samples = count_of("num_samples", num_samples)
    seed = seed_of("seed", seed)
    num_factors = count_of("num_factors", num_factors, minimum=1)
    num_hubs = count_of("num_hubs", num_hubs, minimum=1)
    require(num_hubs <= num_genes, f"num_hubs: expected at most {num_genes}, the number of genes, got {num_hubs}")
    several = set_size if isinstance(set_size, Sequence) else (set_size,)
    sizes = tuple(count_of("set_size", size) for size in several)
    require(len(sizes) > 0, "set_size: expected at least one size, got none")
    for size in sizes:
        require(size <= num_genes, f"set_size: expected at most {num_genes}, the number of genes, got {size}")
    noise = number_of("noise", noise)
    require(noise >= 0, f"noise: expected a finite number of at least 0, got {noise}")

    rng = np.random.default_rng(seed)
    factor = _pathway_factors(graph, num_hubs, torch.from_numpy(rng.normal(size=(num_hubs, num_factors)))).numpy()
    additive = rng.normal(size=num_genes)
    pairs = rng.integers(num_genes, size=(2, 10_000))
    unit = (factor[pairs[0]] * factor[pairs[1]]).sum(1)[pairs[0] != pairs[1]].std() if num_genes > 1 else 0.0

    drawn_size = rng.choice(sizes, num_samples)
    members = _draw_sets(rng, num_samples, max(sizes), num_genes)
    inside = np.arange(max(sizes)) < drawn_size[:, None]
    # sum_{i < j} f_i . f_j = (|sum_i f_i|^2 - sum_i |f_i|^2) / 2
    f = factor[members] * inside[..., None]
    interaction = ((f.sum(1) ** 2).sum(1) - (f**2).sum((1, 2))) / 2
    y = 0.5 * (additive[members] * inside).sum(1) + noise * rng.normal(size=num_samples)
    if unit > 0:
        y += interaction / unit

    canonical = np.sort(np.where(inside, members, num_genes), 1)
    _, distinct = np.unique(canonical, axis=0, return_inverse=True)
    place = rng.random(num_samples)[distinct.reshape(-1)]
    split = np.select([place < 0.8, place < 0.9], ["train", "validation"], "test").tolist()
    seeds = torch.from_numpy(members[inside])
    return PerturbationDataset(
        seeds,
        torch.from_numpy(np.concatenate([[0], np.cumsum(drawn_size, dtype=np.int64)])),
        torch.full_like(seeds, PERTURBATION_TYPES.index("deleted")),
        torch.from_numpy(y),
        num_genes=num_genes,
        split=split,
        names=graph.names,
    )


def _pathway_factors(graph: MultiGraph, num_hubs: int, hub_factor: Tensor) -> Tensor:
    """Factors of all genes, float64 [N, num_factors], from those of the hubs; zero for genes tied to none."""
    edges = {relation: graph.edge_index(relation).cpu() for relation in graph.relations}
    edges = {relation: e[:, e[0] != e[1]] for relation, e in edges.items()}
    degree = torch.zeros(graph.num_nodes, dtype=torch.int64)
    for e in edges.values():
        degree += torch.bincount(e.reshape(-1), minlength=graph.num_nodes)
    z = torch.zeros(graph.num_nodes, hub_factor.shape[1], dtype=torch.float64)
    hubs = degree.argsort(descending=True, stable=True)[:num_hubs]
    z[hubs] = hub_factor
    is_hub = torch.zeros(graph.num_nodes, dtype=torch.float64)
    is_hub[hubs] = 1
    factor = torch.zeros_like(z)
    for e in edges.values():
        gene, neighbour = torch.cat([e, e.flip(0)], 1)
        tied = is_hub[neighbour] > 0
        gene, neighbour = gene[tied], neighbour[tied]
        count = torch.bincount(gene, minlength=graph.num_nodes).clamp(min=1)
        factor += torch.zeros_like(z).index_add_(0, gene, z[neighbour]) / count[:, None]
    deviation = factor.std(0)
    return torch.where(deviation > 0, (factor - factor.mean(0)) / deviation, 0.0)


def _draw_sets(rng: np.random.Generator, num_sets: int, size: int, num_genes: int) -> np.ndarray:
    """Draw sets of `size` distinct genes evenly, int64 [num_sets, size]."""
    members = np.empty((num_sets, size), dtype=np.int64)
    for k in range(size):
        # a position among the genes not yet drawn; stepping over those drawn, in ascending order, gives the gene
        gene = rng.integers(num_genes - k, size=num_sets)
        for earlier in np.sort(members[:, :k], 1).T:
            gene += gene >= earlier
        members[:, k] = gene
    return members
