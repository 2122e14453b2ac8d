"""How rows are measured: each is held to the definition first, then its memory and time are taken."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nvtx
import torch
from torch import Tensor

import cellattn
from cellattn import MultiGraph
from cellattn.data import synthetic_cell

from ..measure import memory_limit, peak_memory, phase_times
from .fill import fill_of
from .peers import PEERS, PRODUCTS, Definition, Extractor, Ours, exact_product, variants
from .plan import (
    NUM_BATCHES,
    SET_SIZE,
    Plan,
    Row,
    count_rows,
    curve_rows,
    extract_rows,
    our_rows,
    product_rows,
)

DIRECTED = ("regulatory", "tflink")  # relations of the synthetic cell that symmetrising leaves as they are
# float32 sums in another order than float64 over up to some thousand neighbours, and of 28 samples in the gradient, leave
# about 1e-6 of the largest entry
MAX_ERROR = 2e-5

# --------------------------------------------------------------------------------------------------- inputs of a process


@dataclass
class Bench:
    """What the rows of one process share."""

    plan: Plan
    graph: MultiGraph
    heap: str

    def __post_init__(self) -> None:
        self.definition = functools.cache(lambda: Definition(self.graph))
        self.sets = functools.cache(self._sets)
        self.keep = functools.cache(self._keep)  # by number of sets, hops, batch
        self.num_edges = functools.cache(lambda *batch: self.definition().num_edges(self.keep(*batch)))
        self.peaks: dict[tuple[str, int], tuple[int, int]] = {}  # implementation, hops -> (sets, bytes)

    def _sets(self, num_sets: int) -> list[tuple[Tensor, Tensor]]:
        drawn = (draw_sets(self.graph.num_nodes, num_sets, seed=i) for i in range(NUM_BATCHES))
        return [(seeds.to(self.plan.device), ptr.to(self.plan.device)) for seeds, ptr in drawn]

    def _keep(self, num_sets: int, num_hops: int, batch: int) -> Tensor:
        return self.definition().keep(*self.sets(num_sets)[batch], num_hops)

    def times(self, f: Callable[[int], Any], *, phases: tuple[str, ...] = ("seconds",)) -> dict[str, Any]:
        """Medians and quantiles of f(i), i = 0, 1, ...; freeing what it returns is not timed."""

        def step(i: int, mark: Callable[[], None]) -> None:
            mark()
            result = f(i)
            mark()
            del result

        plan = self.plan
        found = phase_times(step, phases, plan.torch_device, seconds=plan.seconds_each, repeats=plan.repeats)
        return {name: found[name] for name in phases}


def draw_sets(num_genes: int, num_sets: int, *, size: int = SET_SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(seeds, ptr) of sets of `size` different genes, drawn evenly."""
    g = torch.Generator().manual_seed(1000 * size + seed)
    sets = torch.randint(num_genes, (num_sets, size), generator=g)
    while True:
        ordered = sets.sort(1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if not twice.any():
            return sets.flatten(), size * torch.arange(num_sets + 1)
        sets[twice] = torch.randint(num_genes, (int(twice.sum()), size), generator=g)


@contextlib.contextmanager
def portable_loops(wanted: bool) -> Iterator[None]:
    """CELLATTN_ISA is read at each call."""
    before = os.environ.pop("CELLATTN_ISA", None)
    if wanted:
        os.environ["CELLATTN_ISA"] = "portable"
    try:
        yield
    finally:
        os.environ.pop("CELLATTN_ISA", None)
        if before is not None:
            os.environ["CELLATTN_ISA"] = before


# ------------------------------------------------------------------------------------------------------------- extraction


def measure_extraction(bench: Bench, row: Row, make: Callable[[], Extractor]) -> Row:
    """Check, then peak memory, then time."""
    f = make()
    name, b, hops = row["implementation"], row["sets"], row["hops"]
    batches = bench.sets(b)
    known = bench.peaks.get((name, hops))
    if known is not None and known[0] < b:
        needed, limit = known[1] * b // known[0], memory_limit(bench.plan.torch_device)
        if needed > limit:
            reason = f"needs about {needed / 1e9:,.1f} GB, as its peak at B = {known[0]} says; {limit / 1e9:,.1f} GB can be had"
            return {"status": "left out", "reason": reason}
    compared = range(0, b, max(1, b // bench.plan.compared))
    outcome: Row = {"status": "measured", "compared": len(compared)}
    # the larger first: of arrays that are reused, larger ones would be made while the old are still there
    order = sorted(range(NUM_BATCHES), key=lambda i: -int(bench.num_edges(b, hops, i).sum()))
    for i in order:
        result = f(*batches[i], hops)
        batch = b, hops, i
        wrong = bench.definition().difference(bench.keep(*batch), bench.num_edges(*batch), f.collated(result), compared)
        if wrong is not None:
            return {"status": "wrong", "reason": wrong}
        if isinstance(f, Ours):
            outcome["output_bytes"] = f.num_bytes(result)
        del result
    f.reset()

    def calls() -> None:
        for _ in range(2 if isinstance(f, Ours) and f.reuse else 1):  # what is reused from batch to batch is counted with it
            f(*batches[order[0]], hops)

    outcome["bytes"] = peak_memory(calls)
    bench.peaks.setdefault((name, hops), (b, outcome["bytes"]))
    f(*batches[order[0]], hops)  # the measure of memory gave the heap's pages back
    outcome |= bench.times(lambda i: f(*batches[order[i % NUM_BATCHES]], hops))
    f.reset()
    if "output_bytes" in outcome:
        outcome["rate"] = outcome["output_bytes"] / outcome["seconds"]["median"]
    return outcome


def peer_worker(name: str, bench: Bench) -> Iterator[tuple[Row, Callable[[], Row]]]:
    make = functools.cache(lambda: PEERS[name](bench.graph))
    for row in extract_rows(bench.plan, bench.heap, name):
        yield row, functools.partial(measure_extraction, bench, row, make)


# ------------------------------------------------------------------------------------------------------- ours, by its parts


def our_worker(bench: Bench) -> Iterator[tuple[Row, Callable[[], Row]]]:
    make = functools.cache(lambda name: Ours(bench.graph, **variants()[name].options))
    for row in our_rows(bench.plan, bench.heap):
        if row["kind"] == "fill":
            yield row, functools.partial(measure_fill, bench, row["implementation"])
        elif row["kind"] == "part":
            yield row, functools.partial(measure_part, bench, row)
        else:
            yield row, functools.partial(measure_ours, bench, row, functools.partial(make, row["implementation"]))


def measure_ours(bench: Bench, row: Row, make: Callable[[], Extractor]) -> Row:
    with portable_loops(variants()[row["implementation"]].portable):
        return measure_extraction(bench, row, make)


def measure_fill(bench: Bench, name: str) -> Row:
    """Bytes moved a second."""
    f, moved = fill_of(name, bench.plan.fill_bytes, bench.plan.device)
    f()
    times = bench.times(lambda i: f())
    return {"status": "measured", **times, "rate": moved / times["seconds"]["median"]}


def measure_part(bench: Bench, row: Row) -> Row:
    """Traversal, sizes or writing alone, by the operators that `khop_subgraph` calls one after the other."""
    name, b, hops = row["implementation"], row["sets"], row["hops"]
    graph, batches, n = bench.graph, bench.sets(row["sets"]), bench.graph.num_nodes
    keeps = [bench.keep(b, hops, i) for i in range(NUM_BATCHES)]
    if name.startswith("khop_mask"):
        packed = name.endswith("packed")
        masks = [cellattn.khop_mask(graph, *sets, hops, packed=packed) for sets in batches]
        right = all(
            torch.equal(unpacked(mask, b) if packed else mask.cpu(), keep) for mask, keep in zip(masks, keeps, strict=True)
        )  # fmt: skip
        f = functools.partial(cellattn.khop_mask, graph, num_hops=hops, packed=packed)
        times = bench.times(lambda i: f(seeds=batches[i % NUM_BATCHES][0], ptr=batches[i % NUM_BATCHES][1]))
        return {"status": "measured", **times} if right else {"status": "wrong", "reason": "other genes"}
    rowptr, col, _ = graph.stacked
    words = [cellattn.khop_mask(graph, *sets, hops, packed=True) for sets in batches]
    sizes = [torch.ops.cellattn.induced_sizes(rowptr, col, w, b) for w in words]
    if name == "sizes":
        for i, (node_ptr, edge_ptr, _) in enumerate(sizes):
            keep, counts = keeps[i], bench.num_edges(b, hops, i)
            right = torch.equal(node_ptr.diff().cpu(), keep.sum(1)) and torch.equal(edge_ptr.diff(dim=1).cpu().T, counts)
            if not right:
                return {"status": "wrong", "reason": "other numbers of nodes or edges"}
        return {
            "status": "measured",
            **bench.times(lambda i: torch.ops.cellattn.induced_sizes(rowptr, col, words[i % NUM_BATCHES], b)),
        }
    dtype = torch.int64 if "int64" in name else torch.int32
    layout = name.split()[-1].lower()
    calls = []
    for sets, w, (node_ptr, edge_ptr, offsets) in zip(batches, words, sizes, strict=True):
        num_nodes, *num_edges = torch.cat([node_ptr[-1:], edge_ptr[:, -1]]).tolist()
        empty = functools.partial(torch.empty, dtype=dtype, device=graph.device)
        node, seed_mask = empty(num_nodes), torch.empty(num_nodes, dtype=torch.bool, device=graph.device)
        edge = empty(sum(num_edges) * (2 if layout == "coo" else 1))
        csr_rowptr = empty(len(num_edges) * (num_nodes + 1)) if layout == "csr" else None
        seed_words = torch.ops.cellattn.set_words(*sets, n, False)
        call = functools.partial(
            torch.ops.cellattn.induced_write, rowptr, col, w, seed_words, node_ptr, edge_ptr, offsets,
            node, seed_mask, edge, None, csr_rowptr, num_edges,
        )  # fmt: skip
        call()
        want = cellattn.khop_subgraph(graph, *sets, hops, index_dtype=dtype, layout=layout, return_edge_id=False)
        parts = want.edge_index if layout == "coo" else want.col
        same = torch.equal(edge, torch.cat([parts[name].reshape(-1) for name in graph.relations]))
        if not (same and torch.equal(node, want.node) and torch.equal(seed_mask, want.seed_mask)):
            return {"status": "wrong", "reason": "not what khop_subgraph returns"}
        del want, parts
        calls.append(call)
    written = [x for x in (node, seed_mask, edge, csr_rowptr) if x is not None]
    num_bytes = sum(x.numel() * x.element_size() for x in written)
    times = bench.times(lambda i: calls[i % NUM_BATCHES]())
    return {"status": "measured", **times, "output_bytes": num_bytes, "rate": num_bytes / times["seconds"]["median"]}


def unpacked(words: Tensor, num_sets: int, samples: Sequence[int] | None = None) -> Tensor:
    """bool [samples, N] of words [N, W], written without the operator that does it."""
    chosen = torch.arange(num_sets) if samples is None else torch.as_tensor(samples)
    return ((words.cpu()[:, chosen // 64] >> (chosen % 64)) & 1).bool().T.contiguous()


# -------------------------------------------------------------------------------------------------------- message passing


def product_worker(name: str, bench: Bench) -> Iterator[tuple[Row, Callable[[], Row]]]:
    for row in product_rows(bench.plan, bench.heap, name):
        yield row, functools.partial(measure_product, bench, row)


def measure_product(bench: Bench, row: Row) -> Row:
    """Error against float64, then peak memory of build and product together, then both timed apart and together."""
    plan, graph, b, backward = bench.plan, bench.graph, row["sets"], row["backward"]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(graph.num_nodes, plan.features, generator=g)
    upstream = torch.randn(b, graph.num_nodes, plan.features, generator=g)
    keeps = [_product_mask(bench, row["mask"], b, i) for i in range(NUM_BATCHES)]
    peer = PRODUCTS[row["implementation"]](graph, row["relation"])
    rows, cols = graph.edge_index(row["relation"])
    needed = peer.num_bytes(int(sum((m[rows] & m[cols]).sum() for m in keeps[0])), plan.features, backward)
    limit = memory_limit(plan.torch_device)
    if needed > limit:
        reason = f"needs {needed / 1e9:,.1f} GB at least, where {limit / 1e9:,.1f} GB can be had"
        return {"status": "left out", "reason": reason}
    leaf = x.to(plan.device).requires_grad_(backward)
    on_device = upstream.to(plan.device)

    def product(state: Any) -> tuple[Tensor, ...]:
        out = peer.product(state, leaf)
        return (out, *torch.autograd.grad(out, leaf, on_device)) if backward else (out,)

    errors = []
    for keep in keeps:
        got = [y.detach().cpu().double() for y in product(peer.build(keep, backward))]
        want = exact_product(graph, row["relation"], keep, x, upstream)[: len(got)]
        errors += [(y - z).abs().max() / z.abs().max().clamp(min=1e-30) for y, z in zip(got, want, strict=True)]
    error = float(torch.stack(errors).max())
    if not error <= MAX_ERROR:
        return {"status": "wrong", "reason": f"error {error:.1e}, at most {MAX_ERROR:.1e} expected"}
    del got, want
    num_bytes = peak_memory(lambda: product(peer.build(keeps[0], backward)))

    def step(i: int, mark: Callable[[], None]) -> None:
        mark()
        with nvtx.annotate("build", domain="cellattn"):
            state = peer.build(keeps[i % NUM_BATCHES], backward)
        mark()
        with nvtx.annotate("product", domain="cellattn"):
            result = product(state)
        mark()
        del state, result

    step(0, lambda: None)  # the measure of memory gave the heap's pages back
    times = phase_times(
        step, ("build", "product"), plan.torch_device, seconds=plan.seconds_each, repeats=plan.repeats
    )  # fmt: skip
    return {"status": "measured", "error": error, "bound": MAX_ERROR, "bytes": num_bytes, **times}


def _product_mask(bench: Bench, mask: str, num_sets: int, batch: int) -> Tensor:
    if mask == "2 hops":
        return bench.keep(num_sets, 2, batch).to(bench.plan.device)
    seeds, ptr = bench.sets(num_sets)[batch]
    keep = torch.ones(num_sets, bench.graph.num_nodes, dtype=torch.bool, device=seeds.device)
    keep[torch.arange(num_sets, device=seeds.device).repeat_interleave(ptr.diff()), seeds] = False
    return keep


# ------------------------------------------------------------------------------------------------------ curves and counts


def curve_worker(bench: Bench) -> Iterator[tuple[Row, Callable[[], Row]]]:
    @functools.lru_cache(maxsize=1)
    def other(num_genes: int) -> Bench:
        # Mean degrees stay those of the cell up to twice its edges; more take longer to draw than a run has.
        graph = synthetic_cell(0, num_genes=num_genes, edge_scale=min(num_genes / 6607, 2.0)).to(bench.plan.device)
        return Bench(bench.plan, graph, bench.heap)

    for row in curve_rows(bench.plan, bench.heap):
        own = row["genes"] == bench.graph.num_nodes
        yield row, functools.partial(measure_curve, (lambda genes: bench) if own else other, row)


def measure_curve(bench_of: Callable[[int], Bench], row: Row) -> Row:
    bench = bench_of(row["genes"])
    b, hops, graph = row["sets"], row["hops"], bench.graph
    batches = bench.sets(b)
    chosen = sorted({*range(min(b, 32)), *range(max(0, b - 32), b)})  # those of the first words and of the last
    for seeds, ptr in batches:
        words = cellattn.khop_mask(graph, seeds, ptr, hops, packed=True)
        some = torch.cat([seeds[ptr[i] : ptr[i + 1]] for i in chosen])
        keep = bench.definition().keep(some, SET_SIZE * torch.arange(len(chosen) + 1), hops)
        if not torch.equal(unpacked(words, b, chosen), keep):
            return {"status": "wrong", "reason": "other genes"}
    times = bench.times(lambda i: cellattn.khop_mask(graph, *batches[i % NUM_BATCHES], hops, packed=True))
    a_sample = times["seconds"]["median"] / b
    return {"status": "measured", "edges": graph.num_edges(), **times, "seconds_a_sample": a_sample}


def count_worker(bench: Bench) -> Iterator[tuple[Row, Callable[[], Row]]]:
    @functools.cache
    def bench_of(graph: str) -> Bench:
        if graph == "as stored":
            return bench
        edges = {name: bench.graph.edge_index(name) for name in bench.graph.relations}
        both = [name for name in edges if name not in DIRECTED]
        return Bench(bench.plan, MultiGraph.from_edge_index(edges, bench.graph.num_nodes, undirected=both), bench.heap)

    for row in count_rows(bench.plan, bench.heap):
        yield row, functools.partial(count, bench_of, row)


def count(bench_of: Callable[[str], Bench], row: Row) -> Row:
    """Nodes and edges a sample; capacities of 0 write nothing and count everything."""
    bench = bench_of(row["graph"])
    num_sets, hops, graph = bench.plan.count_sets, row["hops"], bench.graph
    seeds, ptr = draw_sets(graph.num_nodes, num_sets, size=row["size"])
    batch = cellattn.khop_subgraph(
        graph, seeds.to(graph.device), ptr.to(graph.device), hops, return_edge_id=False, max_nodes=0, max_edges=0
    )
    edges = torch.stack([batch.edge_ptr[name].cpu() for name in graph.relations])  # [K, B + 1]
    some = min(4, num_sets)
    keep = bench.definition().keep(seeds[: some * row["size"]], ptr[: some + 1], hops)
    same = torch.equal(batch.node_ptr[: some + 1].cpu().diff(), keep.sum(1))
    if not (same and torch.equal(edges[:, : some + 1].diff(dim=1).T, bench.definition().num_edges(keep))):
        return {"status": "wrong", "reason": "other numbers of nodes or edges"}
    nodes, total = int(batch.node_ptr[-1]), int(edges[:, -1].sum())
    return {
        "status": "measured", "samples": num_sets, "entries": graph.num_edges(),
        "nodes": nodes / num_sets, "edges": total / num_sets,
    }  # fmt: skip


def work(name: str, bench: Bench) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """The rows of a process, each with how it is measured."""
    if name == "ours":
        return our_worker(bench)
    if name == "counts":
        return count_worker(bench)
    if name == "curves":
        return curve_worker(bench)
    kind, _, implementation = name.partition(" ")
    return (peer_worker if kind == "extract" else product_worker)(implementation, bench)
