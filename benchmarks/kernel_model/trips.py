"""How often the loops of a kernel run: the one thing that its machine code does not say.

Of each kernel, from the arguments of a launch, for all CTAs together; where an argument is a tensor without values, those of
the graph that it stands for (`Tied`). The loops are in the order in which they begin in the code.
`tests/benchmarks/test_kernel_model.py` holds every rule to what a run of the compiled code counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from cellattn import MultiGraph
from tests.kernels.aot import Launch


@dataclass(frozen=True)
class Trips:
    ctas: int  # that do not return at once
    loops: list[int]
    jumps: Mapping[int, int] = field(
        default_factory=dict
    )  # of loop 1, 2, ... the rounds that pass over its longest branch, of 0 CTAs
    share: Mapping[str, float] = field(default_factory=dict)  # of arguments of which a launch reads a part alone


@dataclass(frozen=True)
class Side:
    """A relation by rows, or by columns."""

    degree: np.ndarray  # [N]
    segments: np.ndarray  # [N]: into how many parts a long one is cut, 0 where it is not


@dataclass(frozen=True)
class Tied:
    """What the launches of a layer's ties depend on: tie t joins relation t with head t, all rows of it."""

    rows: list[Side]
    columns: list[Side]
    values: Mapping[str, np.ndarray] = field(default_factory=dict)  # of arguments, by their names, where a launch has none

    @classmethod
    def of(cls, graph: MultiGraph, **values: Tensor) -> Tied:
        """Args:
        values: of other arguments.
        """
        by_row, by_column = graph.segments
        sides = []
        pointers_of = {"rowptr_ptr": _stacked(graph), "colptr_ptr": graph.transpose()[0].numpy()}
        known = pointers_of | {"row_segptr": by_row.ptr.numpy(), "segrow_ptr": by_row.row.numpy()}
        known |= {"col_segptr": by_column.ptr.numpy(), "segcol_ptr": by_column.row.numpy()}
        for pointers, segments in zip(pointers_of.values(), (by_row, by_column), strict=True):
            degree, cut = np.diff(pointers), np.diff(segments.ptr.numpy())
            n = graph.num_nodes
            sides.append([Side(degree[r * n : (r + 1) * n], cut[r * n : (r + 1) * n]) for r in range(len(graph.relations))])
        rows, columns = sides
        return cls(rows, columns, known | {name: x.numpy() for name, x in values.items()})


def _stacked(graph: MultiGraph) -> np.ndarray:
    degrees = [np.diff(graph.rowptr(name).numpy()) for name in graph.relations]
    return np.concatenate([[0], np.cumsum(np.concatenate(degrees))])


def _steps(total: np.ndarray | int, each: int) -> Any:
    return -(-total // each)


def _by_tiles(length: str, step: str) -> Callable[[Launch, Tied | None], Trips]:
    """A loop over whole tiles of one side, in parts, and one masked step for what is left of a part."""

    def trips(launch: Launch, tied: Tied | None) -> Trips:
        a = launch.args
        parts = [min((s + 1) * a["part"], a[length]) - s * a["part"] for s in range(a["NS"])]
        each = launch.ctas // a["NS"]
        if not a["TAIL"]:
            return Trips(launch.ctas, [each * sum(_steps(n, a[step]) for n in parts)])
        return Trips(launch.ctas, [each * sum(n // a[step] for n in parts), each * sum(n % a[step] > 0 for n in parts)])

    return trips


def _straight(launch: Launch, tied: Tied | None) -> Trips:
    return Trips(launch.ctas, [])


def _of_hubs(launch: Launch, cut: np.ndarray, degree: np.ndarray, *, read: bool) -> dict[str, float]:
    """The share of arguments that is read by a launch for hubs, or by the one for the other rows (columns).

    Args:
        cut, degree: segments and entries of each row.
        read: hubs.
    """
    total = max(int(degree.sum()), 1)
    hubs = int(degree[cut > 0].sum()) / total
    lists = ("col_ptr", "row_ptr", "weight_ptr", "log_weight_ptr")
    share = {name: hubs if read else 1 - hubs for name in lists if isinstance(launch.args.get(name), Tensor)}
    if read:
        share |= {name: float((cut > 0).mean()) for name in ("rowptr_ptr", "colptr_ptr", "segptr_ptr") if name in launch.args}
    return share


def _of_large_scores(launch: Launch, tied: Tied | None) -> Trips:
    """No row has any: what marks those that have is read, and that is all."""
    a = launch.args
    marks = a["L"] * _steps(a["Tq"], a["BM"])
    unread = {name: 0.0 for name, value in a.items() if isinstance(value, Tensor) and name != "has_large"}
    return Trips(launch.ctas, [launch.ctas * _steps(marks, 4096), 0, 0, 0, 0], share=unread)


def _of_large_rows(loops: int) -> Callable[[Launch, Tied | None], Trips]:
    """The same of rows along edges, in as many loops."""

    def trips(launch: Launch, tied: Tied | None) -> Trips:
        a = launch.args
        marks = a["num_leading"] * a["num_heads"] * _steps(a["num_genes"], a["BM"])
        unread = {name: 0.0 for name, value in a.items() if isinstance(value, Tensor) and name != "has_large_ptr"}
        return Trips(launch.ctas, [launch.ctas * _steps(marks, 4096), *[0] * (loops - 1)], share=unread)

    return trips


def _of_large_bce(marks: str) -> Callable[[Launch, Tied | None], Trips]:
    """The same of rows with every token: by rows, blocks are looked at one by one; by tokens, all at once."""

    def trips(launch: Launch, tied: Tied | None) -> Trips:
        a = launch.args
        blocks = a["num_leading"] * _steps(a["num_rows"], a["BM"])
        unread = {name: 0.0 for name, value in a.items() if isinstance(value, Tensor) and name != marks}
        by_tokens = launch.fn.__name__.endswith("dk")
        first = launch.ctas * _steps(blocks, 4096) if by_tokens else blocks
        return Trips(launch.ctas, [first, 0], share=unread)

    return trips


def _segments(side: str) -> Callable[[Launch, Tied | None], Trips]:
    def trips(launch: Launch, tied: Tied | None) -> Trips:
        assert tied is not None
        a = launch.args
        lead = launch.ctas // (a["num_ties"] * a["max_segments"])
        steps = count = 0
        for part in getattr(tied, side):
            for degree, cut in zip(part.degree[part.segments > 0], part.segments[part.segments > 0], strict=True):
                ends = degree * np.arange(cut + 1) // cut
                steps += int(_steps(np.diff(ends), a["EDGES"]).sum())
                count += int(cut)
        return Trips(lead * count, [lead * steps], share=_of_hubs(launch, *_joined(getattr(tied, side)), read=True))

    return trips


def _joined(sides: list[Side]) -> tuple[np.ndarray, np.ndarray]:
    """(segments, degree) of all relations."""
    return np.concatenate([x.segments for x in sides]), np.concatenate([x.degree for x in sides])


def _walk(part: Side, edges: int, has_segments: bool) -> tuple[int, int]:
    """(steps over partial sums, steps over entries) of all rows."""
    cut = part.segments if has_segments else np.zeros_like(part.segments)
    return int(_steps(cut, edges).sum()), int(_steps(part.degree[cut == 0], edges).sum())


def _rows(launch: Launch, tied: Tied | None) -> Trips:
    assert tied is not None
    a = launch.args
    lead = launch.ctas // (a["num_ties"] * a["max_length"])
    sums = [_walk(part, a["EDGES"], a["HAS_SEGMENTS"]) for part in tied.rows]
    partial, entries = (lead * sum(x) for x in zip(*sums, strict=True))
    filled = lead * sum(int((part.degree > 0).sum()) for part in tied.rows)  # a row without entries returns
    share = _of_hubs(launch, *_joined(tied.rows), read=False) if a["HAS_SEGMENTS"] else {}
    return Trips(filled, [partial, entries] if a["HAS_SEGMENTS"] else [entries], share=share)


def _columns(launch: Launch, tied: Tied | None) -> Trips:
    assert tied is not None
    a = launch.args
    lead = launch.ctas // (a["num_heads"] * (a["num_prefix"] + a["num_genes"]))
    sums = [_walk(part, a["EDGES"], a["HAS_SEGMENTS"]) for part in tied.columns]
    partial, entries = (lead * sum(x) for x in zip(*sums, strict=True))
    outer = lead * a["num_ties"] * a["num_genes"]
    filled = lead * sum(int((part.degree > 0).sum()) for part in tied.columns)
    jumps = {0: launch.ctas - filled, 1: outer - filled}  # a column without entries is passed over, and not added up
    share = _of_hubs(launch, *_joined(tied.columns), read=False) if a["HAS_SEGMENTS"] else {}
    return Trips(launch.ctas, [outer, partial, entries] if a["HAS_SEGMENTS"] else [outer, entries], jumps, share)


def _rows_backward(launch: Launch, tied: Tied | None) -> Trips:
    return Trips(launch.ctas, [launch.ctas * launch.args["num_ties"] // launch.args["num_heads"]])


def _values(launch: Launch, name: str, tied: Tied | None, known: str | None = None) -> np.ndarray:
    """Of an argument, or where it has none those that it stands for, `known` by another name."""
    x = launch.args[name]
    assert isinstance(x, Tensor)
    if x.device.type != "meta":
        found: np.ndarray = x.detach().numpy()
        return found
    found = (tied.values if tied is not None else {})[known or name]
    assert found.shape == x.shape, f"{launch.fn.__name__}: {name} is {list(x.shape)}, what is known {list(found.shape)}"
    return found


def _walked(lengths: np.ndarray, each: int) -> int:
    """Steps over all of so many entries, each list by itself."""
    return int(_steps(lengths, each).sum())


def _fullest(lengths: np.ndarray, block: int) -> int:
    """The sum over blocks of what the longest list of each has."""
    return int(np.pad(lengths, (0, -len(lengths) % block)).reshape(-1, block).max(1).sum())


def _combined(launch: Launch, tied: Tied | None) -> Trips:
    return Trips(launch.ctas, [launch.ctas * launch.args["NS"]])


def _chosen(launch: Launch, tied: Tied | None) -> Trips:
    a = launch.args
    lead = launch.ctas // _steps(a["num_keys"], a["BLOCK"])
    return Trips(launch.ctas, [lead * _fullest(np.diff(_values(launch, "ptr_ptr", tied)), a["BLOCK"])])


# ------------------------------------------------------------------------------------------------------ edge_attention


def _edge_segments(pointers: str, owner: str) -> Callable[[Launch, Tied | None], Trips]:
    """The tables of ties and segments have values in every launch."""

    def trips(launch: Launch, tied: Tied | None) -> Trips:
        a = launch.args
        lead = launch.ctas // (a["num_ties"] * a["max_segments"])
        degree = np.diff(_values(launch, pointers, tied))
        first, owners = _values(launch, "segptr_ptr", tied), _values(launch, owner, tied)
        steps = count = 0
        for _, begin, number, _ in _values(launch, "ties_ptr", tied).reshape(-1, 4):
            mine = np.arange(begin, begin + number)
            rows = owners[mine]
            cut, rank = first[rows + 1] - first[rows], mine - first[rows]
            steps += _walked(degree[rows] * (rank + 1) // cut - degree[rows] * rank // cut, a["EDGES"])
            count += int(number)
        return Trips(lead * count, [lead * steps], share=_of_hubs(launch, np.diff(first), degree, read=True))

    return trips


def _edge_rows(pointers: str, *, near: bool, sums: int) -> Callable[[Launch, Tied | None], Trips]:
    """Of every head: the tokens that all rows see, and by ties the partial sums of hubs and the entries of other rows.

    Args:
        near: there is a loop over the tokens that all rows see.
        sums: loops over partial sums; 2 are of keys and values, or where there is a bias of that.
    """

    def trips(launch: Launch, tied: Tied | None) -> Trips:
        a = launch.args
        genes = a["num_genes"]
        lead = launch.ctas // (a["num_heads"] * genes)
        degree = np.diff(_values(launch, pointers, tied)).reshape(-1, genes)
        cut = np.diff(_values(launch, "segptr_ptr", tied)).reshape(-1, genes) if a["HAS_SEGMENTS"] else np.zeros_like(degree)
        outer = partial = entries = 0
        for _, relation, _ in _values(launch, "ties_ptr", tied).reshape(-1, 3):
            some, all_ = _walk(Side(degree[relation], cut[relation]), a["EDGES"], a["HAS_SEGMENTS"])
            outer, partial, entries = outer + lead * genes, partial + lead * some, entries + lead * all_
        loops = [launch.ctas * _steps(a["num_prefix"] + a["SELF_LOOPS"], a["EDGES"])] if near else []
        number = (sums if a.get("dbias_ptr", True) is not None else 1) if a["HAS_SEGMENTS"] else 0
        share = _of_hubs(launch, cut, degree, read=False) if a["HAS_SEGMENTS"] else {}
        return Trips(launch.ctas, [*loops, outer, *[partial] * number, entries], share=share)

    return trips


# ------------------------------------------------------------------------------------------------------- attention_bce


def _part_steps(launch: Launch, total: int, each: int) -> int:
    """Steps of all parts of a launch, of one block of what it is dealt out by."""
    part = launch.args["part"]
    return sum(_steps(min(part, total - first), each) for first in range(0, total, part))


def _sharp_blocks(launch: Launch) -> int:
    """Blocks of rows with a sharp entry: none where the launch has no values."""
    a = launch.args
    sharp = a["sharp_ptr"]
    if sharp is None or sharp.device.type == "meta":
        return 0
    rows = (sharp.numpy() >= 0).reshape(-1, a["num_rows"])
    return sum(_fullest(x.astype(int), a["BM"]) for x in rows)


def _bce_dense_forward(launch: Launch, tied: Tied | None) -> Trips:
    return Trips(launch.ctas, [launch.grid[0] * _part_steps(launch, launch.args["num_genes"], launch.args["BN"])])


def _bce_dense_dq(launch: Launch, tied: Tied | None) -> Trips:
    """What sharp entries add is a branch; with drawn negatives there is nothing else."""
    a, sharp = launch.args, _sharp_blocks(launch)
    steps = _part_steps(launch, a["num_prefix"] + a["num_genes"], a["BN"])
    blocks = launch.grid[0] if a["DENSE"] else sharp
    return Trips(launch.ctas, [blocks * steps], {} if a["SIGMOID"] else {1: (blocks - sharp) * steps})


def _bce_dense_dk(launch: Launch, tied: Tied | None) -> Trips:
    """Likewise, row block by row block."""
    a = launch.args
    steps = launch.grid[0] * _part_steps(launch, a["num_rows"], a["BM"])
    across = launch.grid[0] // a["num_leading"]
    return Trips(launch.ctas, [steps], {} if a["SIGMOID"] else {1: steps - across * _sharp_blocks(launch)})


def _bce_rest(launch: Launch, tied: Tied | None) -> Trips:
    a, blocks = launch.args, _sharp_blocks(launch)
    return Trips(blocks * launch.grid[1], [blocks * _part_steps(launch, a["num_prefix"] + a["num_genes"], a["BN"])])


def _bce_sharp(launch: Launch, tied: Tied | None) -> Trips:
    return Trips(launch.ctas, [launch.ctas * launch.args["num_parts"]])


def _bce_rows(launch: Launch, tied: Tied | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(edges, segments that are added, drawn negatives that are looked at) of each row of a launch."""
    a = launch.args
    genes = np.arange(a["num_rows"]) if a["rows_ptr"] is None else _values(launch, "rows_ptr", tied)
    degree = np.diff(_values(launch, "rowptr_ptr", tied))[a["first_row"] + genes]
    cut = np.zeros_like(degree)
    if a["HAS_SEGMENTS"]:
        cut = np.diff(_values(launch, "segptr_ptr", tied, "row_segptr"))[a["first_row"] + genes]
        if a["slot_ptr"] is not None:  # where a gene is named first
            cut = cut * (_values(launch, "slot_ptr", tied)[genes] == np.arange(genes.size))
    drawn = np.zeros_like(degree) if a["DENSE"] else np.diff(_values(launch, "negptr_ptr", tied)) * (degree > 0)
    return degree, cut, drawn


def _share(launch: Launch, entries: int) -> dict[str, float]:
    """Of the stacked graph: one relation's, of so many entries."""
    a = launch.args
    lists = [name for name in ("col_ptr", "row_ptr", "weight_ptr") if name in a]
    pointers = [name for name in ("rowptr_ptr", "colptr_ptr", "segptr_ptr", "inv_mass_ptr") if a.get(name) is not None]
    genes = len(a["inv_mass_ptr"])
    rows = min(1.0, a.get("num_genes", a["num_rows"]) / genes)
    return dict.fromkeys(lists, entries / max(len(a["weight_ptr"]), 1)) | dict.fromkeys(pointers, rows)


def _bce_segments(pointers: str, owner: str, *, parts: bool) -> Callable[[Launch, Tied | None], Trips]:
    """Args:
    parts: there is a loop over those of the dense pass.
    """

    def trips(launch: Launch, tied: Tied | None) -> Trips:
        a = launch.args
        lead = launch.ctas // a["num_segments"]
        mine = np.arange(a["first_segment"], a["first_segment"] + a["num_segments"])
        if a.get("slot_ptr") is not None:  # a segment of a row that was not chosen returns
            genes = _values(launch, owner, tied)[mine] - a["first_row"]
            mine = mine[_values(launch, "slot_ptr", tied)[genes] < a["num_rows"]]
        pointer, rows = _values(launch, pointers, tied), _values(launch, owner, tied)[mine]
        first = _values(launch, "segptr_ptr", tied, "row_segptr" if pointers == "rowptr_ptr" else "col_segptr")
        degree, cut, rank = np.diff(pointer)[rows], np.diff(first)[rows], mine - first[rows]
        ends = degree * rank // cut, degree * (rank + 1) // cut
        loops = [lead * mine.size * a["num_parts"]] if parts and a["DENSE"] and not a["SIGMOID"] else []
        loops.append(lead * _walked(ends[1] - ends[0], a["BE"]))
        if a.get("copyptr_ptr") is not None:
            begins = pointer[rows]
            loops.append(lead * _most_copies(launch, begins + ends[0], begins + ends[1], tied))
        share = _share(launch, int((ends[1] - ends[0]).sum()))
        hubs = len(set(rows.tolist())) / len(a["inv_mass_ptr"])  # by columns, rows are read of any
        share |= dict.fromkeys(("segptr_ptr", pointers), hubs)
        return Trips(lead * mine.size, loops, share=share)

    return trips


def _most_copies(launch: Launch, begins: np.ndarray, ends: np.ndarray, tied: Tied | None) -> int:
    """The rounds over copies of rows, step by step of entries from begins to ends."""
    number = np.diff(_values(launch, "copyptr_ptr", tied))[_values(launch, "row_ptr", tied)]
    return sum(_fullest(number[first:last], launch.args["BE"]) for first, last in zip(begins, ends, strict=True))


def _bce_edges(launch: Launch, tied: Tied | None) -> Trips:
    a = launch.args
    lead = launch.ctas // a["num_rows"]
    degree, cut, drawn = _bce_rows(launch, tied)
    filled, walked = lead * int((degree > 0).sum()), np.where(cut > 0, 0, degree)
    loops = [filled * a["num_parts"]] if a["DENSE"] else []
    loops += [lead * _walked(cut, a["BE"])] if a["HAS_SEGMENTS"] else []
    loops += [lead * _walked(walked, a["BE"])]
    loops += [] if a["DENSE"] else [lead * _walked(drawn, a["BE"])]
    return Trips(filled, loops, share=_share(launch, int(walked.sum())))


def _bce_edges_dq(launch: Launch, tied: Tied | None) -> Trips:
    a = launch.args
    lead = launch.ctas // (a["num_rows"] + (a["num_prefix"] if a["rows_ptr"] is None else 0))
    degree, cut, drawn = _bce_rows(launch, tied)
    filled, walked = lead * int((degree > 0).sum()), np.where(cut > 0, 0, degree)
    loops = [lead * _walked(cut, a["BE"])] * (1 if a["SIGMOID"] else 2) if a["HAS_SEGMENTS"] else []
    loops += [lead * _walked(walked, a["BE"])]
    loops += [] if a["DENSE"] else [lead * _walked(drawn, a["BE"])]
    loops += [] if a["dense_dq_ptr"] is None else [filled * a["num_parts"]]
    return Trips(filled, loops, share=_share(launch, int(walked.sum())))


def _bce_edges_dk(launch: Launch, tied: Tied | None) -> Trips:
    a = launch.args
    lead = launch.ctas // (a["num_prefix"] + a["num_genes"])
    pointers = _values(launch, "colptr_ptr", tied)[a["first_row"] : a["first_row"] + a["num_genes"] + 1]
    degree = np.diff(pointers)
    cut = np.zeros_like(degree)
    if a["HAS_SEGMENTS"]:
        cut = np.diff(_values(launch, "segptr_ptr", tied, "col_segptr"))[a["first_row"] : a["first_row"] + a["num_genes"]]
    walked = np.where(cut > 0, 0, degree)
    loops = [lead * _walked(cut, a["BE"])] if a["HAS_SEGMENTS"] else []
    loops += [lead * _walked(walked, a["BE"])]
    if a["copyptr_ptr"] is not None:  # otherwise a row is there once, and is not looped over
        loops.append(lead * _most_copies(launch, pointers[:-1], pointers[:-1] + walked, tied))
    filled = degree > 0
    if not a["DENSE"]:
        drawn = np.diff(_values(launch, "drawnptr_ptr", tied))
        loops.append(lead * _walked(drawn, a["BE"]))
        filled = filled | (drawn > 0)
    loops += [] if a["dense_ptr"] is None else [launch.ctas * a["num_parts"]]
    jumps = {0: launch.ctas - lead * int(filled.sum())}  # a column without entries has what the dense pass gives it
    return Trips(launch.ctas, loops, jumps, _share(launch, int(walked.sum())))


def _bce_copies(launch: Launch, tied: Tied | None) -> Trips:
    a = launch.args
    copies = np.diff(_values(launch, "copyptr_ptr", tied))
    lead = launch.ctas // _steps(a["num_prefix"] + a["num_genes"], a["BT"])
    return Trips(launch.ctas, [lead * _fullest(np.pad(copies, (a["num_prefix"], 0)), a["BT"])])


def _bisected(argument: str) -> Callable[[Launch, Tied | None], Trips]:
    return lambda launch, tied: Trips(launch.ctas, [launch.ctas * launch.args[argument]])


# ---------------------------------------------------------------------------------------------- products along graphs


def _kept(launch: Launch) -> np.ndarray:
    """The samples that keep each gene, bool [N, 32 H], the last ones of none."""
    halves = launch.args["words_ptr"].numpy()
    return (halves[:, :, None] >> np.arange(32) & 1).astype(bool).reshape(len(halves), -1)


def _masked_spmm(launch: Launch, tied: Tied | None) -> Trips:
    a, kept = launch.args, _kept(launch)
    pointers, col = _values(launch, "rowptr_ptr", tied), _values(launch, "col_ptr", tied)
    degree, row = np.diff(pointers), np.repeat(np.arange(a["num_genes"]), np.diff(pointers))
    samples, together, apart = a["S"], 0, 0
    blocks = _steps(a["F"], a["BF"])
    for first in range(0, a["num_sets"], samples):
        mine = kept[:, first : min(first + samples, a["num_sets"])]
        there = mine.any(1)
        together += blocks * _walked(degree[there], samples * a["EDGES"])
        if a["SHARED"]:
            some = mine[row] & mine[col]
            split = some.any(1) & (some != mine[row]).any(1)  # kept by some of the samples that keep the row, not by all
            there = np.bincount(row[split], minlength=a["num_genes"]) > 0
        apart += blocks * _walked(degree[there], a["EDGES"])
    if samples == 1:
        return Trips(launch.ctas, [together])
    return Trips(launch.ctas, [together, apart] if a["SHARED"] else [apart])


def _masked_sddmm(launch: Launch, tied: Tied | None) -> Trips:
    a = launch.args
    halves = range(a["first_half"], a["last_half"])
    samples = sum(min(a["num_sets"] - 32 * h, 32) for h in halves)
    return Trips(launch.ctas, [launch.ctas * x for x in (a["num_bisections"], len(halves), samples)])


def _masked_degree(launch: Launch, tied: Tied | None) -> Trips:
    a, degree = launch.args, np.diff(_values(launch, "rowptr_ptr", tied))
    halves: np.ndarray = _kept(launch).reshape(a["num_genes"], -1, 32).max(2)[:, : _steps(a["num_sets"], 32)]
    return Trips(launch.ctas, [sum(_walked(degree[x], a["EDGES"]) for x in halves.T)])


def _degrees_of_relations(launch: Launch, tied: Tied | None) -> np.ndarray:
    """[K, N], of the relations of a launch."""
    a = launch.args
    degree = np.diff(_values(launch, "rowptr_ptr", tied)).reshape(-1, a["num_genes"])
    found: np.ndarray = degree[_values(launch, "relations_ptr", tied)]
    return found


def _in_launch(launch: Launch, tied: Tied | None) -> np.ndarray:
    """The genes whose rows a launch makes, of its samples alone."""
    a = launch.args
    sample = np.searchsorted(_values(launch, "targetptr_ptr", tied), np.arange(len(a["target_ptr"])), side="right") - 1
    return _values(launch, "target_ptr", tied)[(sample >= a["first"]) & (sample < a["first"] + a["count"])]


def _relational_spmm(launch: Launch, tied: Tied | None) -> Trips:
    a, degree = launch.args, _degrees_of_relations(launch, tied)
    steps = _steps(degree, a["EDGES"]).sum(0)  # [N]
    blocks = _steps(a["F"], a["BF"])
    if a["SUM_SAMPLES"]:
        places = a["num_genes"] * a["count"]
        entries = int(((_values(launch, "receive_ptr", tied) >= 0).sum(0) * steps).sum())
    else:
        genes = _in_launch(launch, tied)
        places, entries = len(genes), int(steps[genes].sum())
    relations = blocks * places * len(degree)
    loops = [blocks * places, relations, blocks * entries] if a["SUM_RELATIONS"] else [relations, blocks * entries]
    # where samples are summed, the compiler makes a loop of its own for a gene that is none
    return Trips(launch.ctas, [*loops, 0] if a["SUM_SAMPLES"] else [launch.ctas * a["num_bisections"], *loops])


def _relational_degree(launch: Launch, tied: Tied | None) -> Trips:
    a, degree = launch.args, _degrees_of_relations(launch, tied)
    steps = _walked(degree[:, _in_launch(launch, tied)], a["EDGES"])
    return Trips(launch.ctas, [launch.ctas * a["num_bisections"], steps])


# ---------------------------------------------------------------------------------------------------------------- sets


def _by_sets(launch: Launch, tied: Tied | None) -> Trips:
    a = launch.args
    lead = launch.ctas // _steps(a["num_sets"], a["BS"])
    # the first loop is that of sets with large scores, of which there is none
    return Trips(launch.ctas, [0, lead * _fullest(np.diff(_values(launch, "ptr_ptr", tied)), a["BS"])])


def _by_genes(launch: Launch, tied: Tied | None) -> Trips:
    a = launch.args
    lead, entries = launch.ctas // a["num_genes"], np.diff(_values(launch, "geneptr_ptr", tied))
    return Trips(lead * int((entries > 0).sum()), [lead * _walked(entries, a["EDGES"])])  # a gene of no set returns


def _bits(launch: Launch, tied: Tied | None) -> Trips:
    """All of x is finite: the two loops over what is not are not entered."""
    a, (programs, parts) = launch.args, launch.grid
    lengths = [min(a["part"], a["num_rows"] - i * a["part"]) for i in range(parts)]
    return Trips(launch.ctas, [programs * sum(_steps(n, a["BN"]) for n in lengths), 0, 0], share={"x_ptr": 0.0})


def _set_sum(launch: Launch, tied: Tied | None) -> Trips:
    a = launch.args
    blocks = launch.ctas // a["num_sets"]
    return Trips(launch.ctas, [blocks * _walked(np.diff(_values(launch, "ptr_ptr", tied)), a["ROWS"])])


RULES: dict[str, Callable[[Launch, Tied | None], Trips]] = {
    "attention_fwd_kernel": _by_tiles("Tk", "BN"),
    "attention_bwd_kernel_delta": _straight,
    "attention_bwd_kernel_dq": _by_tiles("Tk", "BN"),
    "attention_bwd_kernel_dkv": _by_tiles("Tq", "BM"),
    "attention_bwd_kernel_large_dq": _of_large_scores,
    "attention_bwd_kernel_large_dkv": _of_large_scores,
    "attention_fwd_kernel_combine": _combined,
    "row_dot_fwd_kernel_segments": _segments("rows"),
    "row_dot_fwd_kernel": _rows,
    "row_dot_bwd_kernel_dq": _rows_backward,
    "row_dot_bwd_kernel_dk_segments": _segments("columns"),
    "row_dot_bwd_kernel_dk": _columns,
    "row_dot_bwd_kernel_g": _chosen,
    "bit_sum_kernel_pieces": _straight,
    "bit_sum_kernel": _bits,
    "edge_fwd_kernel_segments": _edge_segments("rowptr_ptr", "segrow_ptr"),
    "edge_fwd_kernel": _edge_rows("rowptr_ptr", near=True, sums=1),
    "edge_bwd_kernel_dq_segments": _edge_segments("rowptr_ptr", "segrow_ptr"),
    "edge_bwd_kernel_dq": _edge_rows("rowptr_ptr", near=True, sums=2),
    "edge_bwd_kernel_dkv_segments": _edge_segments("colptr_ptr", "segcol_ptr"),
    "edge_bwd_kernel_dkv": _edge_rows("colptr_ptr", near=False, sums=2),
    "edge_bwd_kernel_large_dq": _of_large_rows(9),
    "edge_bwd_kernel_large_dkv": _of_large_rows(6),
    "bce_rows_fwd_kernel_bits": _bisected("steps"),
    "bce_rows_fwd_kernel_dense": _bce_dense_forward,
    "bce_rows_fwd_kernel_segments": _bce_segments("rowptr_ptr", "segrow_ptr", parts=True),
    "bce_rows_fwd_kernel_edges": _bce_edges,
    "bce_rows_fwd_kernel_rest": _bce_rest,
    "bce_rows_fwd_kernel_sharp": _bce_sharp,
    "bce_rows_bwd_kernel_operands": _straight,
    "bce_rows_bwd_kernel_dense_dq": _bce_dense_dq,
    "bce_rows_bwd_kernel_segments_dq": _bce_segments("rowptr_ptr", "segrow_ptr", parts=False),
    "bce_rows_bwd_kernel_edges_dq": _bce_edges_dq,
    "bce_rows_bwd_kernel_dense_dk": _bce_dense_dk,
    "bce_rows_bwd_kernel_segments_dk": _bce_segments("colptr_ptr", "segcol_ptr", parts=False),
    "bce_rows_bwd_kernel_edges_dk": _bce_edges_dk,
    "bce_rows_bwd_kernel_dq": _bce_copies,
    "bce_rows_fwd_kernel_large": _of_large_bce("lse_ptr"),
    "bce_rows_bwd_kernel_large_dq": _of_large_bce("has_large_ptr"),
    "bce_rows_bwd_kernel_large_dk": _of_large_bce("has_large_ptr"),
    "nonedges_kernel": _bisected("steps"),
    "masked_spmm_kernel": _masked_spmm,
    "masked_sddmm_kernel": _masked_sddmm,
    "masked_degree_kernel": _masked_degree,
    "place_table_kernel": _bisected("num_bisections"),
    "relational_spmm_kernel": _relational_spmm,
    "relational_degree_kernel": _relational_degree,
    "perturbation_attention_fwd_kernel": _by_sets,
    "perturbation_attention_bwd_kernel_sets": _by_sets,
    "perturbation_attention_bwd_kernel_genes": _by_genes,
    "set_sum_kernel": _set_sum,
}


def trips_of(launch: Launch, tied: Tied | None = None) -> Trips:
    """Of a launch.

    Raises:
        KeyError: for a kernel that has no rule.
    """
    return RULES[launch.fn.__name__](launch, tied)
