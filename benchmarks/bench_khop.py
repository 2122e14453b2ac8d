"""k-hop extraction and message passing over masked graphs against what else a user could run: time, peak memory, write rate.

    python -m benchmarks.bench_khop [--sets 28 256] [--hops 1 2 3] [--heaps default kept] [--seconds 2700] [--short]

Every implementation runs in a process of its own, because a heap's settings are read at the start of one: "default", and
"kept", where freed pages stay with the process. What it returns is first held to the definition in `khop_peers.py`; one that
is wrong, cannot run or dies is a line without a speed. Writes `khop.json`, `khop.md` and `khop.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nvtx
import torch
from torch import Tensor
from tqdm import tqdm

import cellattn
from cellattn import MultiGraph
from cellattn.data import synthetic_cell
from cellattn.graph import write_atomic

from .khop_peers import INDEX, PACKAGES, PEERS, PRODUCTS, Definition, Extractor, Ours, exact_product, variants
from .measure import environment, memory_limit, peak_memory, phase_times, results_dir, synchronize
from .peers import first_line

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[1]

# glibc reads these when a process starts. "kept": no mapping of its own for large arrays, nothing given back.
HEAPS: dict[str, dict[str, str]] = {
    "default": {},
    "kept": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_TOP_PAD_": str(2**26),
    },
}
SET_SIZE = 3
MASKS = ("all but 3 genes", "2 hops")
NUM_BATCHES = 2  # of different sets, taken in turn
DIRECTED = ("regulatory", "tflink")  # relations of the synthetic cell that symmetrising leaves as they are
# float32 sums in another order than float64 over up to some thousand neighbours, and of 28 samples in the gradient, leave
# about 1e-6 of the largest entry
MAX_ERROR = 2e-5
SHARE = 0.4  # of a run's time that one process may take, so that a slow peer leaves the others some
GRACE = 120.0  # seconds that a process may take for the row which it began last
NO_TIME = "the time for the run, or for one process, was over"

# What the group counted and measured: hops -> (nodes a sample, edges a sample).
GROUP = {1: (697.0, 196_445.6), 2: (3_758.9, 1_878_158.4), 3: (4_508.1, 2_166_602.5)}

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a run measures and for how long."""

    device: str = DEVICE
    genes: int = 6607
    set_counts: tuple[int, ...] = (28, 256)
    hops: tuple[int, ...] = (1, 2, 3)
    ways: tuple[str, ...] = tuple(variants())  # to call ours
    compared: int = 28  # samples of a batch whose edges are compared one by one; genes and numbers of edges are of all
    heaps: tuple[str, ...] = ("default", "kept")
    relations: tuple[str, ...] = ("physical", "string12_coexpression")  # of message passing
    masks: tuple[str, ...] = MASKS
    features: int = 64
    curve_sets: tuple[int, ...] = (28, 64, 256, 1024, 4096, 16384)
    curve_genes: tuple[int, ...] = (20_000, 100_000)
    curve_small_sets: tuple[int, ...] = (28, 1024)  # over those
    count_sets: int = 1000
    count_sizes: tuple[int, ...] = (3, 2, 1)
    fill_bytes: int = 2**30
    seconds: float = 2700.0
    seconds_each: float = 2.0  # of measured steps
    repeats: int = 20

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


def short_plan(**given: Any) -> Plan:
    """What `make bench` has the time for: B = 28 under the kept heap, which is kinder to the peers."""
    return replace(
        Plan(
            set_counts=(28,), heaps=("kept",), relations=("physical",), masks=MASKS[:1], compared=7, curve_genes=(),
            ways=tuple(name for name in variants() if "ids" not in name and "portable" not in name), count_sizes=(3,),
            curve_sets=(28, 256, 2048, 16384), seconds=150.0, seconds_each=0.3, repeats=10,
        ),
        **given,
    )  # fmt: skip


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


def extract_rows(plan: Plan, heap: str, name: str) -> list[Row]:
    return [
        {"kind": "extract", "implementation": name, "heap": heap, "sets": b, "hops": h}
        for b in plan.set_counts for h in plan.hops
    ]  # fmt: skip


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

PARTS = ("khop_mask", "khop_mask, packed", "sizes", "writing, int64 COO", "writing, int32 CSR")


def our_rows(plan: Plan, heap: str) -> list[Row]:
    fills = [{"kind": "fill", "implementation": name, "heap": heap} for name in fills_of(plan)]
    parts = [
        {**row, "kind": "part"} for name in PARTS for row in extract_rows(plan, heap, name)
        if not (name.startswith("writing") and row["sets"] > min(plan.set_counts))  # larger ones are seen as a whole
    ]  # fmt: skip
    whole = [row for name in plan.ways for row in extract_rows(plan, heap, name)]
    return [
        *({**row, "when": "before"} for row in fills), *parts, *whole, *({**row, "when": "after"} for row in fills)
    ]  # fmt: skip


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


# --------------------------------------------------------------------------------------------------- how fast memory fills

# 512-bit stores past the caches where the processor has them, 128-bit ones otherwise.
_STREAM = """
#include <immintrin.h>
#include <stddef.h>
#include <string.h>
__attribute__((target("avx512f"))) static void wide(char* p, size_t n) {
  const __m512i x = _mm512_set1_epi64(7);
  for (size_t i = 0; i < n; i += 64) _mm512_stream_si512((void*)(p + i), x);
}
static void narrow(char* p, size_t n) {
  const __m128i x = _mm_set1_epi32(7);
  for (size_t i = 0; i < n; i += 16) _mm_stream_si128((__m128i*)(p + i), x);
}
void stream_fill(char* p, size_t n) { /* p and n multiples of 64 */
  if (__builtin_cpu_supports("avx512f")) wide(p, n); else narrow(p, n);
  _mm_sfence();
}
"""
FILLS = ("torch fill_", "numpy fill, one thread", "memset, all threads", "non-temporal stores, all threads")


def fills_of(plan: Plan) -> tuple[str, ...]:
    return ("torch copy_", "torch fill_") if plan.torch_device.type == "cuda" else FILLS


def measure_fill(bench: Bench, name: str) -> Row:
    """GB/s written; a copy counts what it reads and what it writes."""
    num_bytes = bench.plan.fill_bytes
    x = torch.zeros(num_bytes // 8, dtype=torch.int64, device=bench.plan.device)
    moved = num_bytes
    if name == "torch fill_":
        f: Callable[[], Any] = functools.partial(x.fill_, 7)
    elif name == "torch copy_":
        f, moved = functools.partial(torch.zeros_like(x).copy_, x), 2 * num_bytes
    elif name == "numpy fill, one thread":
        f = functools.partial(x.numpy().fill, 7)
    elif name == "memset, all threads":
        f = _threaded(lambda p, n: ctypes.memset(p, 7, n), x)
    else:
        stream = _stream_fill()
        f = _threaded(stream, x)
    f()
    times = bench.times(lambda i: f())
    return {"status": "measured", **times, "rate": moved / times["seconds"]["median"]}


def _threaded(fill: Callable[[int, int], Any], x: Tensor) -> Callable[[], None]:
    """Calls of C, which let go of the interpreter lock, over as many parts as PyTorch has threads."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    size = x.numel() * x.element_size() // threads // 64 * 64
    places = [(x.data_ptr() + i * size, size) for i in range(threads)]
    return lambda: [*pool.map(lambda place: fill(*place), places)].clear()


def _stream_fill() -> Callable[[int, int], Any]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "stream.c", Path(folder) / "stream.so"
        source.write_text(_STREAM)
        done = subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", source, "-o", library], capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{compiler}: {first_line(done.stderr)}")
        f = ctypes.CDLL(os.fspath(library)).stream_fill
    f.argtypes, f.restype = (ctypes.c_void_p, ctypes.c_size_t), None
    return f


# -------------------------------------------------------------------------------------------------------- message passing


def product_rows(plan: Plan, heap: str, name: str) -> list[Row]:
    return [
        {
            "kind": "product", "implementation": name, "heap": heap, "relation": relation, "mask": mask,
            "sets": min(plan.set_counts), "features": plan.features, "backward": backward,
        }
        for relation in plan.relations for mask in plan.masks for backward in (False, True)
    ]  # fmt: skip


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


def curve_rows(plan: Plan, heap: str) -> list[Row]:
    sizes = [(plan.genes, b) for b in plan.curve_sets]
    sizes += [(n, b) for n in plan.curve_genes for b in plan.curve_small_sets]
    return [
        {"kind": "curve", "implementation": "khop_mask, packed", "heap": heap, "genes": n, "sets": b, "hops": max(plan.hops)}
        for n, b in sizes
    ]  # fmt: skip


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


def count_rows(plan: Plan, heap: str) -> list[Row]:
    return [
        {"kind": "counts", "implementation": "khop_subgraph", "heap": heap, "graph": graph, "size": size, "hops": h}
        for graph in ("as stored", "symmetrised") for size in plan.count_sizes for h in plan.hops
    ]  # fmt: skip


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


# -------------------------------------------------------------------------------------------------------------- processes


def tasks(plan: Plan) -> list[tuple[str, str, list[Row]]]:
    """(process, heap, the rows that it gives), what the targets are made of first."""
    heaps = [heap for heap in ("kept", "default") if heap in plan.heaps]
    if plan.torch_device.type == "cuda":
        heaps = heaps[-1:]  # a GPU has its own allocator
    found: list[tuple[str, str, list[Row]]] = []
    for heap in heaps:
        found.append(("ours", heap, our_rows(plan, heap)))
        found.extend((f"extract {name}", heap, extract_rows(plan, heap, name)) for name in PEERS)
        if heap == heaps[0]:
            found += [("counts", heap, count_rows(plan, heap)), ("curves", heap, curve_rows(plan, heap))]
        found.extend((f"product {name}", heap, product_rows(plan, heap, name)) for name in PRODUCTS)
    return found


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


def run_worker(name: str, heap: str, plan: Plan, graph: Path, out: Path) -> None:
    """Measure the rows of one process and append each to `out`; failures are the reason why a row has no figure."""
    start = time.monotonic()
    bench = Bench(plan, MultiGraph.load(graph).to(plan.device), heap)
    bench.graph.transpose()  # built once a graph, not once a batch
    gc.collect()
    gc.freeze()  # collections would go through all of PyTorch again and again
    with open(out, "a") as file:
        for row, measure in work(name, bench):
            if time.monotonic() - start > plan.seconds:
                outcome: Row = {"status": "not reached", "reason": NO_TIME}
            else:
                try:
                    with nvtx.annotate(f"{name}: {row}", domain="cellattn"):
                        outcome = measure()
                except Exception as failure:
                    outcome = {"status": "cannot run", "reason": first_line(failure)}
            synchronize(plan.torch_device)
            peak_memory(lambda: None)  # collects garbage and gives the pages back that the next row may need
            print(json.dumps(row | outcome), file=file, flush=True)


def start_worker(name: str, heap: str, plan: Plan, graph: Path, *, seconds: float, rows: list[Row]) -> list[Row]:
    """`rows` with what became of each in a process of its own."""
    package = PACKAGES.get(name.removeprefix("extract "))
    if package is not None and importlib.util.find_spec(package) is None:
        return [{**row, "status": "cannot run", "reason": f"No module named {package!r}"} for row in rows]
    if seconds <= 0:
        return [{**row, "status": "not reached", "reason": NO_TIME} for row in rows]
    others = {key: value for key, value in os.environ.items() if key not in HEAPS["kept"]}
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "rows", Path(folder) / "errors"
        command = [
            sys.executable, "-m", "benchmarks.bench_khop", "--worker", name, "--heap", heap, "--graph", os.fspath(graph),
            "--out", os.fspath(out), "--plan", json.dumps(asdict(replace(plan, seconds=seconds))),
        ]  # fmt: skip
        with open(errors, "w") as stderr:
            try:
                status = subprocess.run(
                    command, cwd=ROOT, env={**others, **HEAPS[heap]}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=stderr, timeout=seconds + GRACE, check=False,
                ).returncode  # fmt: skip
                ending = _ending(status, errors.read_text(errors="replace"))
            except subprocess.TimeoutExpired:
                ending = NO_TIME
        done = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")] if out.exists() else []
    missing = rows[len(done) :]
    for i, row in enumerate(missing):
        reason = ending if i == 0 else f"its process had ended: {ending}"
        done.append({**row, "status": "died" if i == 0 else "not reached", "reason": reason})
    return done


def _ending(status: int, errors: str) -> str:
    """How a process ended, and the last line it wrote."""
    if status < 0:
        how = f"killed by {signal.Signals(-status).name}" if -status in set(signal.Signals) else f"killed by signal {-status}"
    else:
        how = f"exit status {status}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"{how}: {lines[-1]}" if lines and status > 0 else how


def run(plan: Plan | None = None, *, out: Path | None = None, name: str = "khop") -> dict[str, Any]:
    """Measure everything of a plan.

    Args:
        plan: what and how long; the whole benchmark if None.
        out: folder that gets `<name>.json`, process by process, `<name>.md` and `<name>.png`; the device's if None.
        name: of the files.

    Returns:
        What the JSON file holds.
    """
    plan = Plan() if plan is None else plan
    folder = results_dir() if out is None else out
    start = time.monotonic()
    graph = synthetic_cell(0, num_genes=plan.genes)
    rows: list[Row] = []
    result: dict[str, Any] = {
        "name": name,
        "environment": environment(),
        "graph": f"synthetic cell of {graph.num_nodes:,} genes, {graph.num_edges():,} entries",
        "avx512": torch.ops.cellattn.induced_avx512(graph.num_nodes),
        "plan": asdict(plan),
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph"
        graph.save(path)
        del graph
        with tqdm(tasks(plan), desc="khop", unit="process", disable=None) as bar:
            for worker, heap, expected in bar:
                bar.set_postfix_str(f"{worker}, {heap} heap")
                left = min(plan.seconds - (time.monotonic() - start), SHARE * plan.seconds)
                rows += start_worker(worker, heap, plan, path, seconds=left, rows=expected)
                result["seconds"] = time.monotonic() - start
                result["targets"] = targets(rows, on_gpu=plan.torch_device.type == "cuda")
                write_atomic(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    draw(rows, folder / f"{name}.png")
    write_atomic(folder / f"{name}.md", page(result).encode())
    return result


# ---------------------------------------------------------------------------------------------------------------- targets


def find(rows: Sequence[Row], kind: str, implementation: str, **facts: Any) -> Row | None:
    """The row of an implementation with these facts, measured or not."""
    for row in rows:
        mine = row["kind"] == kind and row["implementation"] == implementation
        if mine and all(row.get(key) == value for key, value in facts.items()):
            return row
    return None


def median(row: Row | None, phase: str = "seconds") -> float | None:
    """Seconds; None where it was not measured."""
    return float(row[phase]["median"]) if row is not None and row["status"] == "measured" else None


def best_fill(rows: Sequence[Row]) -> Row | None:
    """The fastest way to fill memory that was seen in the run; on a GPU the copy."""
    fills = [row for row in rows if row["kind"] == "fill" and row["status"] == "measured"]
    copies = [row for row in fills if row["implementation"] == "torch copy_"]
    return max(copies or fills, key=lambda row: row["rate"], default=None)


def targets(rows: Sequence[Row], *, on_gpu: bool = False) -> list[dict[str, Any]]:
    """What the library is held to: a value a line, its bound, whether it is met, or why it was not measured."""
    found: list[dict[str, Any]] = []
    batch = min((row["sets"] for row in rows if row["kind"] == "extract"), default=28)

    def add(name: str, value: float | None, *parts: Row | None, least: float | None = None, most: float | None = None) -> None:
        bound = {"least": least} if least is not None else {"most": most}
        entry: dict[str, Any] = {"target": name, "value": value, **bound}
        if value is None:
            entry |= {"met": None, "reason": f"not measured: {_why(parts)}"}
        else:
            entry["met"] = value >= least if least is not None else most is not None and value <= most
        found.append(entry)

    def ratio(over: float | None, under: float | None) -> float | None:
        return None if over is None or under is None or under <= 0 else over / under

    heaps = [heap for heap in ("kept", "default") if any(row["heap"] == heap for row in rows)]
    peers_heap = heaps[0] if heaps else "kept"
    for h in (1, 2, 3):
        at = {"heap": peers_heap, "sets": batch, "hops": h}
        pyg = find(rows, "extract", "PyG", **at)
        for way in ("fresh", "reused"):
            ours = find(rows, "extract", f"ours, int64 COO, {way}", **at)
            name = f"PyG over khop_subgraph, int64 COO, {way}, {_hops(h)}, {peers_heap} heap"
            add(name, ratio(median(pyg), median(ours)), ours, pyg, least=20)
    for heap in heaps:
        for h in (1, 2, 3):
            at = {"heap": heap, "sets": batch, "hops": h}
            for index in ("int64", "int32"):
                ours = find(rows, "extract", f"ours, {index} COO, fresh", **at)
                peers = [find(rows, "extract", name, **at) for name in PEERS if INDEX[name] == index]
                times = [t for t in map(median, peers) if t is not None]
                name = f"fastest {index} peer over khop_subgraph, {index} COO, fresh, {_hops(h)}, {heap} heap"
                add(name, ratio(min(times, default=None), median(ours)), ours, *peers, least=8)
    fill = best_fill(rows)
    for h in (2, 3):
        for form in ("int64 COO", "int32 COO", "int32 CSR"):
            ours = find(rows, "extract", f"ours, {form}, reused", heap=peers_heap, sets=batch, hops=h)
            rate = ours["rate"] if ours is not None and ours["status"] == "measured" else None
            of = "copy bandwidth" if on_gpu else "fill bandwidth"
            add(
                f"write rate over {of}, {form}, reused, {h} hops", ratio(rate, fill["rate"] if fill else None), ours, fill,
                least=0.5 if on_gpu else 0.7,
            )  # fmt: skip
    at = {"heap": peers_heap, "sets": batch, "hops": 3}
    mask, pyg = find(rows, "part", "khop_mask", **at), find(rows, "extract", "PyG", **at)
    seconds, slowest = median(mask), median(pyg)
    allowed = max(2.0, slowest * 1e3 / 200 if slowest is not None else 0.0)
    add("khop_mask, 3 hops, ms (2, or 1/200 of PyG)", None if seconds is None else seconds * 1e3, mask, most=allowed)
    _product_targets(rows, add, ratio)
    curve = [row for row in rows if row["kind"] == "curve" and row["status"] == "measured"]
    for n in sorted({row["genes"] for row in rows if row["kind"] == "curve"}):
        mine = sorted((row for row in curve if row["genes"] == n), key=lambda row: row["sets"])
        value = ratio(mine[-1]["seconds_a_sample"], mine[0]["seconds_a_sample"]) if len(mine) > 1 else None
        ends = f"B = {mine[-1]['sets']:,} over B = {mine[0]['sets']:,}" if len(mine) > 1 else "largest B over smallest"
        missed = next((r for r in rows if r["kind"] == "curve" and r["genes"] == n and r["status"] != "measured"), None)
        add(f"traversal a sample, {n:,} genes, {ends}", value, missed, most=1.0)
    if on_gpu:
        ours = find(rows, "extract", "ours, int64 COO, reused", **at)
        milliseconds = median(ours)
        add("khop_subgraph on a GPU, 3 hops, ms", None if milliseconds is None else milliseconds * 1e3, ours, most=1.0)
    else:
        for name, least in (("extraction on a GPU over its copy bandwidth", 0.5), ("1 ms over 3 hops on a GPU, B = 28", 1.0)):
            found.append(
                {"target": name, "value": None, "least": least, "met": None, "reason": "not measured: run on a CPU"}
            )  # fmt: skip
    return found


def _product_targets(
    rows: Sequence[Row], add: Callable[..., None], ratio: Callable[[float | None, float | None], float | None]
) -> None:  # fmt: skip
    unions = ("SparseTensor of the union", "PyG MessagePassing")
    cases = dict.fromkeys(
        (row["heap"], row["relation"], row["mask"], row["backward"]) for row in rows if row["kind"] == "product"
    )  # fmt: skip
    heap = "kept" if any(case[0] == "kept" for case in cases) else "default"
    for case in cases:
        if case[0] != heap:
            continue
        at = dict(zip(("heap", "relation", "mask", "backward"), case, strict=True))
        ours = find(rows, "product", "ours", **at)
        peers = [find(rows, "product", name, **at) for name in unions]
        what = f"{at['relation']}, {at['mask']}, forward{' + backward' if at['backward'] else ''}"
        for phase, title in (("both", "build and product"), ("product", "product alone")):
            times = [t for t in (median(peer, phase) for peer in peers) if t is not None]
            add(
                f"fastest union over masked_spmm, {title}, {what}", ratio(min(times, default=None), median(ours, "both")),
                ours, *peers, least=5,
            )  # fmt: skip
        sizes = [row["bytes"] for row in peers if row is not None and row["status"] == "measured"]
        mine = ours["bytes"] if ours is not None and ours["status"] == "measured" else None
        smallest = min(sizes, default=None)
        add(f"memory of masked_spmm over the smallest union, {what}", ratio(mine, smallest), ours, *peers, most=0.1)


def _why(parts: Sequence[Row | None]) -> str:
    reasons = [
        "its row was not run" if row is None else f"{row['implementation']}: {row['reason']}"
        for row in parts if row is None or row["status"] != "measured"
    ]  # fmt: skip
    return "; ".join(dict.fromkeys(reasons)) or "too little to be seen"


# ----------------------------------------------------------------------------------------------------------------- tables


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def target_table(result: dict[str, Any]) -> str:
    lines = []
    for entry in result["targets"]:
        least = "least" in entry
        bound = f">= {entry['least']:.3g}" if least else f"<= {entry['most']:.3g}"
        if entry["met"] is None:
            lines.append([entry["target"], bound, entry["reason"], ""])
            continue
        value = entry["value"]
        by = entry["least"] / value if least and value > 0 else value / entry["most"] if not least else math.inf
        lines.append([entry["target"], bound, f"{value:.3g}", "met" if entry["met"] else f"MISSED by {by:.2f} x"])
    return table(("target", "bound", "measured", ""), lines)


def extract_table(rows: Sequence[Row], num_sets: int) -> str:
    """Median ms a batch by heap and hops; peak and output at the most hops of 2 and fewer that were run."""
    mine = [row for row in rows if row["kind"] == "extract" and row["sets"] == num_sets]
    columns = list(dict.fromkeys((row["heap"], row["hops"]) for row in mine))
    columns.sort(key=lambda column: (column[0] != "kept", column[1]))
    names = list(dict.fromkeys(row["implementation"] for row in mine))
    names.sort(key=lambda name: name.startswith("ours"))
    shown = max((h for _, h in columns if h <= 2), default=max((h for _, h in columns), default=0))
    head = ["implementation", *(f"{_hops(h)}, {heap}" for heap, h in columns)]
    head += [f"{what}, {_hops(shown)}" for what in ("peak MiB", "output MiB", "GB/s")]
    lines = []
    for name in names:
        cells = [_cell(find(mine, "extract", name, heap=heap, hops=h)) for heap, h in columns]
        if len(set(cells)) == 1 and not cells[0][:1].isdigit():  # one reason for all of them
            lines.append([name, cells[0], *[""] * (len(columns) + 2)])
            continue
        sizes = [
            row for heap in HEAPS for row in mine
            if (row["implementation"], row["heap"], row["hops"], row["status"]) == (name, heap, shown, "measured")
        ]  # fmt: skip
        last = sizes[0] if sizes else {}
        for key in ("bytes", "output_bytes"):
            cells.append(f"{last[key] / 2**20:,.0f}" if key in last else "")
        cells.append(f"{sizes[-1]['rate'] / 1e9:.1f}" if sizes and "rate" in sizes[-1] else "")
        lines.append([name, *cells])
    return table(head, lines)


def _hops(count: int) -> str:
    return f"{count} hop{'' if count == 1 else 's'}"


def _cell(row: Row | None) -> str:
    if row is None:
        return "not run"
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    t = row["seconds"]
    return f"{_ms(t['median'])} ({_ms(t['q20'])} to {_ms(t['q80'])})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def part_table(rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row["kind"] in ("part", "fill")]
    lines = [
        [
            row["implementation"], row["heap"], str(row.get("sets", "")), str(row.get("hops", row.get("when", ""))),
            _cell(row), f"{row['rate'] / 1e9:.1f}" if "rate" in row else "",
        ]
        for row in mine
    ]  # fmt: skip
    return table(("part", "heap", "B", "hops", "ms", "GB/s"), lines)


def product_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["kind"] != "product":
            continue
        passes = "forward + backward" if row["backward"] else "forward"
        where = [row["implementation"], row["relation"], row["mask"], passes, row["heap"]]
        if row["status"] != "measured":
            lines.append([*where, f"{row['status']}: {row['reason']}", *[""] * 4])
            continue
        cells = [_ms(row[phase]["median"]) for phase in ("build", "product", "both")]
        lines.append([*where, *cells, f"{row['bytes'] / 2**20:,.0f}", f"{row['error']:.1e}"])
    lines.sort(key=lambda line: (line[1], line[2], line[3], line[4]))
    head = ("implementation", "relation", "mask", "passes", "heap", "build ms", "product ms", "both ms", "peak MiB", "error")
    return table(head, lines)


def curve_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["kind"] == "curve":
            done = row["status"] == "measured"
            cost = f"{row['seconds_a_sample'] * 1e6:.3g}" if done else ""
            lines.append([f"{row['genes']:,}", f"{row['edges']:,}" if done else "", f"{row['sets']:,}", _cell(row), cost])
    return table(("genes", "entries", "B", "ms a batch", "us a sample"), lines)


def count_table(rows: Sequence[Row]) -> str:
    """Nodes and edges a sample beside the group's."""
    hops = sorted({row["hops"] for row in rows if row["kind"] == "counts"})
    group = [f"{nodes:,.1f} nodes, {edges:,.1f} edges" for nodes, edges in (GROUP[h] for h in hops if h in GROUP)]
    lines = [["the group's cell and measured mutants", *group]] if len(group) == len(hops) else []
    for graph, size in dict.fromkeys((row["graph"], row["size"]) for row in rows if row["kind"] == "counts"):
        cells = []
        for h in hops:
            row = find(rows, "counts", "khop_subgraph", graph=graph, size=size, hops=h)
            right = row is not None and row["status"] == "measured"
            cells.append(f"{row['nodes']:,.1f} nodes, {row['edges']:,.1f} edges" if row and right else _why([row]))
        lines.append([f"synthetic cell {graph}, sets of {size}", *cells])
    return table(("", *(_hops(h) for h in hops)), lines)


def _described(implementations: Mapping[str, Callable[..., Any]]) -> str:
    return "\n".join(f"* {name}: {(made.__doc__ or '').splitlines()[0]}" for name, made in implementations.items())


def page(result: dict[str, Any]) -> str:
    """Everything as Markdown."""
    rows, about = result["rows"], ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    loops = "AVX-512" if result["avx512"] else "themselves: this processor has no AVX-512"
    fill = best_fill(rows)
    fastest = "" if fill is None else f" The fastest was {fill['implementation']}: {fill['rate'] / 1e9:.1f} GB/s."
    sets = sorted({row["sets"] for row in rows if row["kind"] == "extract"})
    measured = [row for row in rows if row["kind"] == "extract" and row["status"] == "measured"]
    firsts = [next(row for row in measured if row["sets"] == b) for b in sorted({row["sets"] for row in measured})]
    batches = "\n\n".join(f"B = {b}:\n\n{extract_table(rows, b)}" for b in sets)
    compared = ", ".join(f"{row['compared']} of {row['sets']}" for row in firsts)
    kept = ", ".join(f"{key}={value}" for key, value in HEAPS["kept"].items())
    samples = next((row["samples"] for row in rows if row["kind"] == "counts" and row["status"] == "measured"), 0)
    return f"""# k-hop

{about}

{result["graph"]}; sets of {SET_SIZE} genes, direction "in", per relation. Every implementation ran in a process of its own, and
what it returned was held to the definition before it was timed: the genes of every sample, the number of its edges in every
relation, and as pairs of genes the edges of {compared} samples. Medians of ms a batch, 20% to 80%
quantile behind; freeing what was returned is not timed. The heap "kept" is glibc's with {kept}.

## Targets

{target_table(result)}

## Extraction

"fresh" makes its arrays in every batch, as the peers do; "reused" is `out=` the batch before. The peak is above graph and sets,
with the arrays that are reused, under the default heap where it was run. GB/s is output over time of the whole call, under the
kept heap. "portable" is CELLATTN_ISA=portable, the loops that every processor runs, beside {loops}.

{_described(PEERS)}

{batches}

## Its parts, and how fast memory fills

Fills are of {result["plan"]["fill_bytes"] / 2**20:,.0f} MiB that were touched before.{fastest}

{part_table(rows)}

## Message passing

B = {min(result["plan"]["set_counts"])}, {result["plan"]["features"]} features, float32, x shared by the samples; `error` is the
largest against float64, output and gradient, over the largest entry. `masked_spmm` has nothing to build. Unions number the
genes of all samples.

{_described(PRODUCTS)}

{product_table(rows)}

## Traversal over B and N

{curve_table(rows)}

![cost]({result["name"]}.png)

## Nodes and edges a sample

Means over {samples:,} sets, beside the group's report of its cell.

{count_table(rows)}

The figures differ for three reasons. The synthetic cell shares its hubs between all relations, so that one hop more reaches
most genes where real relations lead to different ones. Its sets are drawn evenly from all genes; the group's are measured
mutants, of one to three genes. And undirected relations are stored in one direction, which halves what a hop follows;
symmetrised, every such edge is counted twice.
"""


# ---------------------------------------------------------------------------------------------------------------- picture


def draw(rows: Sequence[Row], path: Path) -> None:
    """Extraction by implementation, and the cost of traversal a sample over B and over N."""
    drawn, axes = plt.subplots(1, 3, figsize=(16, 5.6), layout="constrained", width_ratios=(1.5, 1, 1))
    batch = min((row["sets"] for row in rows if row["kind"] == "extract"), default=0)
    extracted = [row for row in rows if row["kind"] == "extract" and row["status"] == "measured" and row["sets"] == batch]
    heap = "kept" if any(row["heap"] == "kept" for row in extracted) else "default"
    extracted = [row for row in extracted if row["heap"] == heap]
    names = list(dict.fromkeys(row["implementation"] for row in extracted))
    names.sort(key=lambda name: name.startswith("ours"))
    hops = sorted({row["hops"] for row in extracted})
    for k, h in enumerate(hops):
        mine = [row for row in extracted if row["hops"] == h]
        places = [names.index(row["implementation"]) + 0.27 * (k - 1) for row in mine]
        values = [row["seconds"]["median"] * 1e3 for row in mine]
        bars = axes[0].barh(places, values, height=0.25, color=f"C{k}", label=_hops(h))
        axes[0].bar_label(bars, fmt=lambda x: _ms(x / 1e3), padding=2, fontsize=6)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set(xscale="log", xlabel=f"ms a batch, B = {batch}, {heap} heap", title="extraction")
    axes[0].margins(x=0.15)
    if hops:
        axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    curve = [row for row in rows if row["kind"] == "curve" and row["status"] == "measured"]
    panels = (
        (axes[1], "sets", "genes", "samples a batch (B)", "{:,} genes"),
        (axes[2], "genes", "sets", "genes (N)", "B = {:,}"),
    )
    for axis, over, by, label, title in panels:
        ticks: set[int] = set()
        for k, fixed in enumerate(sorted({row[by] for row in curve})):
            line = sorted((row for row in curve if row[by] == fixed), key=lambda row: row[over])
            if len(line) < 2:
                continue
            ticks |= {row[over] for row in line}
            x, y = [row[over] for row in line], [row["seconds_a_sample"] * 1e6 for row in line]
            axis.plot(x, y, marker="o", markersize=4, color=f"C{k}", label=title.format(fixed))
        axis.set(xscale="log", yscale="log", xlabel=label, title="traversal, us a sample")
        axis.set_visible(bool(ticks))
        if ticks:
            axis.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)], fontsize=7, rotation=30)
            axis.legend(frameon=False, fontsize=8)
            axis.set_xticks([], minor=True)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--short", action="store_true", help="what `make bench` runs: B = 28; writes khop_short.json instead")
    parser.add_argument("--sets", type=int, nargs="+", dest="set_counts", help="samples a batch")
    parser.add_argument("--hops", type=int, nargs="+")
    parser.add_argument("--heaps", nargs="+", choices=HEAPS)
    parser.add_argument("--genes", type=int, help="of the cell (as published)")
    parser.add_argument("--relations", nargs="+", help="of message passing")
    parser.add_argument("--seconds", type=float, help="no row is begun after so many")
    parser.add_argument("--seconds-each", type=float, help="of measured steps a row")
    parser.add_argument("--repeats", type=int, help="most measured steps a row")
    for name in ("--worker", "--heap", "--graph", "--out", "--plan"):  # how a run starts its processes
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    worker, heap, graph, out, plan, short = (given.pop(k) for k in ("worker", "heap", "graph", "out", "plan", "short"))
    if worker is not None:
        run_worker(worker, heap, plan_from(json.loads(plan)), Path(graph), Path(out))
        return
    chosen: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if value is not None
    }
    result = run(short_plan(**chosen) if short else Plan(**chosen), name="khop_short" if short else "khop")
    print(page(result))


def plan_from(values: dict[str, Any]) -> Plan:
    """A plan out of JSON."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Plan(**given)


if __name__ == "__main__":
    main()
