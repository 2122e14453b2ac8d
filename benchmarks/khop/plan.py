"""What is measured and for how long: its plan, and the rows that come of it, each with what it will be known by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .peers import PEERS, PRODUCTS, variants

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

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
PARTS = ("khop_mask", "khop_mask, packed", "sizes", "writing, int64 COO", "writing, int32 CSR")
FILLS = ("torch fill_", "numpy fill, one thread", "memset, all threads", "non-temporal stores, all threads")

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

    @property
    def ordered_heaps(self) -> tuple[str, ...]:
        """Those of the run. Targets ask for the first; under others extraction alone is run, to which a heap matters."""
        heaps = tuple(heap for heap in ("kept", "default") if heap in self.heaps)
        return heaps[-1:] if self.torch_device.type == "cuda" else heaps  # a GPU has its own allocator


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


def plan_from(values: dict[str, Any]) -> Plan:
    """A plan out of JSON."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Plan(**given)


def extract_rows(plan: Plan, heap: str, name: str) -> list[Row]:
    return [
        {"kind": "extract", "implementation": name, "heap": heap, "sets": b, "hops": h}
        for b in plan.set_counts for h in plan.hops
    ]  # fmt: skip


def fills_of(plan: Plan) -> tuple[str, ...]:
    return ("torch copy_", "torch fill_") if plan.torch_device.type == "cuda" else FILLS


def our_rows(plan: Plan, heap: str) -> list[Row]:
    fills = [{"kind": "fill", "implementation": name, "heap": heap} for name in fills_of(plan)]
    parts = [
        {**row, "kind": "part"} for name in PARTS for row in extract_rows(plan, heap, name)
        if not (name.startswith("writing") and row["sets"] > min(plan.set_counts))  # larger ones are seen as a whole
    ]  # fmt: skip
    whole = [row for name in plan.ways for row in extract_rows(plan, heap, name)]
    if heap != plan.ordered_heaps[0]:
        return whole
    return [
        *({**row, "when": "before"} for row in fills), *parts, *whole, *({**row, "when": "after"} for row in fills)
    ]  # fmt: skip


def product_rows(plan: Plan, heap: str, name: str) -> list[Row]:
    return [
        {
            "kind": "product", "implementation": name, "heap": heap, "relation": relation, "mask": mask,
            "sets": min(plan.set_counts), "features": plan.features, "backward": backward,
        }
        for relation in plan.relations for mask in plan.masks for backward in (False, True)
    ]  # fmt: skip


def curve_rows(plan: Plan, heap: str) -> list[Row]:
    sizes = [(plan.genes, b) for b in plan.curve_sets]
    sizes += [(n, b) for n in plan.curve_genes for b in plan.curve_small_sets]
    return [
        {"kind": "curve", "implementation": "khop_mask, packed", "heap": heap, "genes": n, "sets": b, "hops": max(plan.hops)}
        for n, b in sizes
    ]  # fmt: skip


def count_rows(plan: Plan, heap: str) -> list[Row]:
    return [
        {"kind": "counts", "implementation": "khop_subgraph", "heap": heap, "graph": graph, "size": size, "hops": h}
        for graph in ("as stored", "symmetrised") for size in plan.count_sizes for h in plan.hops
    ]  # fmt: skip


def tasks(plan: Plan) -> list[tuple[str, str, list[Row]]]:
    """(process, heap, the rows that it gives), what the targets are made of first."""
    found: list[tuple[str, str, list[Row]]] = []
    for heap in plan.ordered_heaps:
        found.append(("ours", heap, our_rows(plan, heap)))
        found.extend((f"extract {name}", heap, extract_rows(plan, heap, name)) for name in PEERS)
        if heap == plan.ordered_heaps[0]:
            found += [("counts", heap, count_rows(plan, heap)), ("curves", heap, curve_rows(plan, heap))]
            found.extend((f"product {name}", heap, product_rows(plan, heap, name)) for name in PRODUCTS)
    return found


def hops_label(count: int) -> str:
    return f"{count} hop{'' if count == 1 else 's'}"
