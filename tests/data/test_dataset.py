"""PerturbationDataset: ragged sets, splits, and batches through a DataLoader."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, random_split

from cellattn.data import (
    PERTURBATION_TYPES,
    GeneList,
    PerturbationBatch,
    PerturbationDataset,
    PerturbationSample,
    batches_on,
    read_interactions,
    require_same_genes,
    split,
    synthetic_cell,
    synthetic_phenotypes,
)

SETS = [[3, 1], [], [0, 2, 4], [4], [1, 3]]
SPLIT = ["a_training", "a_testing", "b_training", "b_testing", "b_testing"]


def dataset(**options: Any) -> PerturbationDataset:
    return PerturbationDataset.from_sets(SETS, torch.arange(5.0), **{"num_genes": 5, "split": SPLIT, **options})


def parts(batch: PerturbationBatch) -> list[list[float]]:
    return [batch.seeds.tolist(), batch.ptr.tolist(), batch.types.tolist(), batch.y.tolist()]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([1, 2], r"samples\[0\]: expected \(seeds, types, y\), got int 1"),
        ([(torch.tensor([1]), torch.tensor([1]))], r"samples\[0\]: expected \(seeds, types, y\), got tuple"),
        (None, "samples: expected a sequence of samples, got NoneType None"),
    ],
)
def test_collate_refuses_what_are_no_samples(samples: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PerturbationDataset.collate(samples)


def test_present_is_type_zero() -> None:
    assert PERTURBATION_TYPES[0] == "present"
    assert len(set(PERTURBATION_TYPES)) == len(PERTURBATION_TYPES)


def test_getitem_gives_one_set() -> None:
    data = dataset()
    assert len(data) == 5
    assert data[2].seeds.tolist() == [0, 2, 4]
    assert data[2].types.tolist() == [1, 1, 1]
    assert data[1].seeds.shape == (0,)
    assert data[-2].seeds.tolist() == [4]
    assert data[2].y == 2
    with pytest.raises(IndexError, match=re.escape("index: expected one in [-5, 5), got 5")):
        data[5]


@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 2, 1], [1], [], [4, 3, 2, 1, 0]], ids=str)
def test_getitems_equals_collated_samples(indices: list[int]) -> None:
    data = dataset(types=[["deleted", "added"], [], ["mutated"] * 3, ["added"], ["deleted"] * 2])
    batch = data.__getitems__(indices)
    assert parts(data.__getitems__(torch.tensor(indices, dtype=torch.int64))) == parts(batch)
    assert len(batch) == len(indices)
    assert indices or parts(data.__getitems__(torch.tensor([]))) == parts(batch)
    assert batch.seeds.dtype == batch.ptr.dtype == batch.types.dtype == torch.int64
    assert batch.y.dtype == torch.float32
    if indices:
        assert parts(batch) == parts(data.collate([data[index] for index in indices]))
    assert data.collate(batch) is batch


def pick(index: Any) -> list[int]:
    """The samples that an index takes, told by y."""
    part = dataset()[index]
    assert isinstance(part, PerturbationDataset)
    assert (part.split or []) == [SPLIT[b] for b in part.y.int().tolist()]
    whole = dataset()
    for b, sample in zip(part.y.int().tolist(), part, strict=True):
        assert torch.equal(sample.seeds, whole[b].seeds)
    return [int(y) for y in part.y]


def test_indexing_as_a_list() -> None:
    for index in (slice(2, 4), slice(None), slice(None, None, -2), slice(-2, None), slice(3, 1), slice(-99, 99)):
        assert pick(index) == list(range(5))[index]
    for positions in ([3, 0, 3], [], range(1, 3)):
        assert pick(positions) == list(positions)
    assert pick(torch.tensor([4, 1])) == pick(np.array([4, 1])) == pick((4, 1)) == [4, 1]
    mask = [True, False, False, True, True]
    assert pick(mask) == pick(torch.tensor(mask)) == pick(np.array(mask)) == [0, 3, 4]
    for one in (np.int64(2), torch.tensor(2), -3):
        assert dataset()[one].seeds.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ("a_training", TypeError, "index: expected an int, a slice, positions or a mask (subset takes splits), got str"),
        (1.5, TypeError, "index: expected an int"),
        (True, TypeError, "index: expected an int"),
        (torch.tensor(True), TypeError, "index: expected an int"),  # which operator.index takes for 1
        (None, TypeError, "index: expected an int"),
        ([0, 9], ValueError, "position 1 holds 9, expected an index in [0, 5) (samples)"),
        ([True], ValueError, "selection: expected a mask of 5, got 1"),
        ([0.5], ValueError, "selection: expected dtype"),
        (np.int64(9), IndexError, "index: expected one in [-5, 5), got 9"),
    ],
)
def test_indexing_names_what_came(index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        dataset()[index]


def test_a_batch_holds_samples() -> None:
    data = dataset()
    batch = data.__getitems__([4, 1])
    assert [sample.y for sample in batch] == [4, 1]
    assert batch[-2].seeds.tolist() == [1, 3]
    with pytest.raises(IndexError, match="index: expected one in"):
        batch[2]
    with pytest.raises(TypeError, match="index: expected an int, got slice"):
        batch[:1]  # type: ignore[index]


class _Weighted(torch.utils.data.Dataset[Any]):
    """Somebody's dataset with ours inside."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return {"mutant": dataset()[index], "weight": float(index)}


def test_a_loader_needs_no_collate_fn() -> None:
    data = dataset()
    want = parts(data.__getitems__([0, 1]))
    assert parts(next(iter(DataLoader(data, batch_size=2)))) == want
    assert [len(batch) for batch in DataLoader(data, batch_size=2)] == [2, 2, 1]
    assert parts(next(iter(DataLoader(torch.utils.data.Subset(data, [0, 1, 4]), batch_size=2)))) == want
    assert parts(next(iter(DataLoader(torch.utils.data.ConcatDataset([data, data]), batch_size=2)))) == want
    assert parts(next(iter(DataLoader([data[0], data[1]], batch_size=2)))) == want  # type: ignore[arg-type]
    batch = next(iter(DataLoader(_Weighted(), batch_size=2)))
    assert parts(batch["mutant"]) == want
    assert batch["weight"].tolist() == [0, 1]
    assert parts(next(iter(DataLoader(data, batch_size=2, num_workers=1)))) == want
    sample = next(iter(DataLoader(data, batch_size=None)))
    assert isinstance(sample, PerturbationSample)


def test_several_phenotypes() -> None:
    data = PerturbationDataset.from_sets(SETS, torch.arange(10.0).reshape(5, 2), num_genes=5)
    assert data.__getitems__([1, 3]).y.tolist() == [[2, 3], [6, 7]]
    assert data.collate([data[1], data[3]]).y.tolist() == [[2, 3], [6, 7]]


def test_no_samples_is_a_dataset() -> None:
    data = PerturbationDataset.from_sets([], [], num_genes=5)
    assert len(data) == 0
    assert len(data.__getitems__([])) == 0


def test_from_sets_takes_names() -> None:
    genes = GeneList(["A", "B", "C"], aliases={"GAMMA": "C"})
    data = PerturbationDataset.from_sets([["GAMMA", "A"], [1]], [0.5, 1.0], genes=genes, types="knocked_down")
    assert data.seeds.tolist() == [2, 0, 1]
    assert data.num_genes == 3
    assert set(data.types.tolist()) == {PERTURBATION_TYPES.index("knocked_down")}


def test_from_sets_takes_numpy_indices() -> None:
    data = PerturbationDataset.from_sets(np.array([[2, 0], [1, 2]]), np.array([0.5, 1.0]), num_genes=3)  # type: ignore[arg-type]
    assert data.seeds.tolist() == [2, 0, 1, 2]
    assert data.y.dtype == torch.float32


def test_subset_by_split_mask_and_positions() -> None:
    data = dataset()
    assert data.subset("a_training").y.tolist() == [0]
    assert data.subset("*_testing").y.tolist() == [1, 3, 4]
    assert data.subset("*_testing").split == ["a_testing", "b_testing", "b_testing"]
    assert data.subset(data.y > 2).seeds.tolist() == [4, 1, 3]
    assert data.subset((data.y > 2).tolist()).seeds.tolist() == [4, 1, 3]
    assert data.subset([4, 0]).y.tolist() == [4, 0]
    assert len(data.subset([])) == 0
    assert data.split == SPLIT
    assert "a_training 1" in repr(data)


def test_overlaps_ignores_the_order_of_genes() -> None:
    data = dataset()
    assert data.overlaps(data.subset("*_testing")).tolist() == [True, True, False, True, True]
    other = dataset(types="overexpressed")  # the same genes, another perturbation
    assert data.overlaps(other).tolist() == [False, True, False, False, False]


def test_overlaps_are_of_the_same_genes() -> None:
    """Indices of another list, or of the same in another order, are other genes."""
    sets: list[list[int | str]] = [[0, 1], [2]]
    names = GeneList(["A", "B", "C"])
    data, bare = PerturbationDataset.from_sets(sets, genes=names), PerturbationDataset.from_sets(sets, num_genes=3)
    assert data.overlaps(bare).tolist() == bare.overlaps(data).tolist() == [True, True]
    aliased = PerturbationDataset.from_sets(sets, genes=GeneList(["A", "B", "C"], aliases={"a": "A"}))
    assert data.overlaps(aliased).tolist() == [True, True]
    others = PerturbationDataset.from_sets(sets, genes=GeneList(["A", "C", "B"]))
    with pytest.raises(
        ValueError, match=r"^other, dataset: expected the same genes .* 'C' in the other and 'B' in the dataset"
    ):
        data.overlaps(others)
    with pytest.raises(ValueError, match=r"^other: expected 3 genes, got 4"):
        data.overlaps(PerturbationDataset.from_sets(sets, num_genes=4))


@pytest.mark.parametrize("num_workers", [0, 2], ids=lambda n: f"workers{n}")
def test_data_loader_gives_every_sample_once(num_workers: int) -> None:
    torch.manual_seed(0)
    sets = [torch.randperm(50)[: i % 4].tolist() for i in range(101)]
    data = PerturbationDataset.from_sets(sets, torch.arange(101.0), num_genes=50)
    loader = DataLoader(
        data,
        batch_size=8,
        shuffle=True,
        collate_fn=data.collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    seen = {}
    for batch in loader:
        assert isinstance(batch, PerturbationBatch)
        assert batch.seeds.is_pinned() == torch.cuda.is_available()
        for b, y in enumerate(batch.y.tolist()):
            seen[int(y)] = batch.seeds[batch.ptr[b] : batch.ptr[b + 1]].tolist()
    assert [seen[i] for i in range(101)] == sets


def test_data_loader_over_a_torch_subset() -> None:
    data = dataset()
    part, _ = random_split(data, [3, 2], generator=torch.Generator().manual_seed(0))
    (batch,) = DataLoader(part, batch_size=3, collate_fn=data.collate)
    assert len(batch) == 3


def test_batch_moves() -> None:
    batch = dataset().__getitems__([0, 2])
    moved = batch.to("meta", non_blocking=True)
    assert {moved.seeds.device.type, moved.ptr.device.type, moved.types.device.type, moved.y.device.type} == {"meta"}
    assert parts(batch.to("cpu")) == parts(batch)


def build(**changes: Any) -> PerturbationDataset:
    """A sound dataset of two sets, {0, 1} and {2}, but for the changes."""
    arguments: dict[str, Any] = {
        "seeds": torch.tensor([0, 1, 2]),
        "ptr": torch.tensor([0, 2, 3]),
        "types": torch.tensor([1, 1, 1]),
        "y": torch.tensor([0.5, 1.5]),
        "num_genes": 4,
    }
    arguments.update(changes)
    return PerturbationDataset(**arguments)


def sample(seeds: list[int], types: list[int] | None = None, y: Tensor | None = None) -> PerturbationSample:
    types = [1] * len(seeds) if types is None else types
    return PerturbationSample(torch.tensor(seeds), torch.tensor(types), torch.tensor(1.0) if y is None else y)


def from_sets(sets: Any, y: Any = (1.0,), **options: Any) -> Callable[[], PerturbationDataset]:
    return lambda: PerturbationDataset.from_sets(sets, y, **{"num_genes": 4, **options})


T = torch.tensor
NAN = float("nan")
MALFORMED = [
    ("seeds-list", lambda: build(seeds=[0, 1, 2]), TypeError, "seeds: expected a tensor, got list [0, 1, 2]"),
    ("seeds-int32", lambda: build(seeds=T([0, 1, 2], dtype=torch.int32)), ValueError, "seeds: expected dtype int64"),
    ("seeds-shape", lambda: build(seeds=T([[0, 1, 2]])), ValueError, "seeds: expected 1 dimension(s), got a int64"),
    (
        "seeds-high",
        lambda: build(seeds=T([0, 1, 4])),
        ValueError,
        "seeds: position 2 holds 4, expected an index in [0, 4)",
    ),
    ("seeds-negative", lambda: build(seeds=T([0, -1, 2])), ValueError, "seeds: position 1 holds -1"),
    ("gene-twice", lambda: build(seeds=T([3, 3, 2])), ValueError, "seeds: sample 0 holds gene 3 twice"),
    ("ptr-empty", lambda: build(ptr=T([], dtype=torch.int64)), ValueError, "ptr: expected B + 1 entries, got none"),
    ("ptr-start", lambda: build(ptr=T([1, 2, 3])), ValueError, "ptr: expected to begin with 0, got 1"),
    ("ptr-end", lambda: build(ptr=T([0, 2, 4])), ValueError, "ptr: expected to end with 3, the number of seeds, got 4"),
    ("ptr-falls", lambda: build(ptr=T([0, 4, 3])), ValueError, "ptr: falls from 4 to 3 at position 2"),
    ("types-short", lambda: build(types=T([1, 1])), ValueError, "types: expected 3 entries as in seeds, got 2"),
    (
        "types-high",
        lambda: build(types=T([1, 9, 1])),
        ValueError,
        "types: position 1 holds 9, expected an index in [0, 6)",
    ),
    ("types-present", lambda: build(types=T([1, 0, 1])), ValueError, "types: sample 0, gene 1 is 'present'"),
    ("y-length", lambda: build(y=T([1.0])), ValueError, "y: expected shape [2] or [2, P] for 2 sets, got a float32"),
    ("y-int", lambda: build(y=T([1, 2])), ValueError, "y: expected a floating-point tensor, got a int64"),
    ("y-nan", lambda: build(y=T([1.0, NAN])), ValueError, "y: sample 1 holds nan, expected finite numbers"),
    ("y-overflow", lambda: build(y=T([1e39, 1.0], dtype=torch.float64)), ValueError, "y: sample 0 holds inf"),
    ("split-length", lambda: build(split=["train"]), ValueError, "split: expected 2 names, one a sample, got 1"),
    ("split-string", lambda: build(split="train"), TypeError, "split: expected one string a sample, got str 'train'"),
    ("num-genes-negative", lambda: build(num_genes=-1), ValueError, "num_genes: expected at least 0, got -1"),
    ("num-genes-float", lambda: build(num_genes=4.0), TypeError, "num_genes: expected an int, got float 4.0"),
    ("meta-device", lambda: build(y=torch.empty(2, device="meta")), ValueError, "y: expected a tensor on the CPU"),
    (
        "sets-string",
        from_sets(["AB"]),
        TypeError,
        "sets: expected a sequence of genes for sample 0, got str 'AB'",
    ),
    ("sets-name", from_sets([["A"]]), TypeError, "sets: sample 0: expected an index for each gene, got str 'A'"),
    ("sets-float", from_sets([[1.0]]), TypeError, "sets: sample 0: expected an index for each gene, got float 1.0"),
    ("sets-unknown", from_sets([["Z"]], genes=GeneList(["A", "B"])), ValueError, "sets: sample 0 names gene 'Z'"),
    ("sets-repeat", from_sets([[1], [2, 3, 2]], [1.0, 2.0]), ValueError, "seeds: sample 1 holds gene 2 twice"),
    (
        "sets-repeat-names",
        from_sets([["B", "b"]], [1.0], genes=GeneList(["A", "B", "C", "D"], aliases={"b": "B"})),
        ValueError,
        "seeds: sample 0 holds gene 1, 'B', twice",
    ),
    ("sets-size", from_sets([[1]], num_genes=None), ValueError, "num_genes: expected the number of genes, or genes"),
    (
        "types-name",
        from_sets([[1]], types="delete"),
        ValueError,
        "types: unknown value 'delete', expected one of 'deleted'",
    ),
    ("types-names", from_sets([[1]], types=[["gone"]]), ValueError, "types: sample 0: unknown value 'gone'"),
    ("types-count", from_sets([[1]], types=[["added"] * 2]), ValueError, "types: sample 0 has 1 genes, got 2 types"),
    ("types-sets", from_sets([[1]], types=[]), ValueError, "types: expected 1 sequences as in sets, got 0"),
    ("types-flat", from_sets([[1]], types=["added"]), TypeError, "types: expected a sequence of names for sample 0"),
    ("collate-none", lambda: PerturbationDataset.collate([]), ValueError, "samples: expected at least one sample"),
    (
        "collate-twice",
        lambda: PerturbationDataset.collate([sample([1]), sample([2, 5, 2])]),
        ValueError,
        "sample 1 holds gene 2",
    ),
    (
        "collate-types",
        lambda: PerturbationDataset.collate([sample([1], [1, 1])]),
        ValueError,
        "samples[0].types: expected 1",
    ),
    (
        "collate-y",
        lambda: PerturbationDataset.collate([sample([1]), sample([1], y=T([1.0]))]),
        ValueError,
        "samples[1].y: expe",
    ),
    ("subset-name", lambda: dataset().subset("a_train"), ValueError, "split: unknown value 'a_train', expected one of"),
    (
        "subset-no-split",
        lambda: build().subset("train"),
        ValueError,
        "split: unknown value 'train', expected one of nothing",
    ),
    ("subset-mask", lambda: dataset().subset(T([True])), ValueError, "selection: expected a mask of 5, got 1"),
    (
        "subset-high",
        lambda: dataset().subset([5]),
        ValueError,
        "indices: position 0 holds 5, expected an index in [0, 5)",
    ),
    (
        "subset-strings",
        lambda: dataset().subset(["a"]),  # type: ignore[list-item]
        TypeError,
        "selection: expected a tensor or numbers, got list ['a']",
    ),
    ("sets-huge", from_sets([[10**30]]), TypeError, "sets: expected a tensor or numbers, got list [1000"),
    ("sets-int", from_sets([3]), TypeError, "sets: expected a sequence of genes for sample 0, got int 3"),
    ("y-strings", from_sets([[1]], ["a"]), TypeError, "y: expected a tensor or numbers, got list ['a']"),
    (
        "types-none",
        from_sets([[1]], types=None),
        TypeError,
        "types: expected a name or one sequence of names a set, got None",
    ),
    ("split-int", lambda: build(split=3), TypeError, "split: expected one string a sample, got int 3"),
    ("split-0-d", lambda: build(split=torch.tensor(3)), TypeError, "split: expected one string a sample, got"),
    ("subset-float", lambda: dataset().subset(T([1.0])), ValueError, "selection: expected dtype bool or int64"),
    ("overlaps-list", lambda: dataset().overlaps([1]), TypeError, "other: expected a PerturbationDataset, got list"),  # type: ignore[arg-type]
    ("batches-samples", lambda: next(batches_on("cpu", dataset())), TypeError, "batches: expected PerturbationBatch objects"),  # type: ignore[arg-type]
    (
        "hetero-none",
        lambda: PerturbationDataset.from_hetero_data(cast(Any, None)),
        TypeError,
        "samples: expected a sequence of HeteroData",
    ),
    ("table-type", lambda: PerturbationDataset.from_interactions([]), TypeError, "table: expected an InteractionTable"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in MALFORMED])
def test_refuses(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_copy_in_place() -> None:
    data = dataset()
    batch, other = data.__getitems__([0]), data.__getitems__([4])
    seeds = batch.seeds
    assert batch.copy_(other) is batch
    assert parts(batch) == parts(other)
    assert batch.seeds is seeds


def test_batches_on_a_device() -> None:
    data = dataset()
    loader = DataLoader(data, batch_size=2, collate_fn=data.collate)
    for moved, batch in zip(batches_on("cpu", loader), loader, strict=True):
        assert parts(moved) == parts(batch)
    (elsewhere, *_) = batches_on("meta", loader)
    assert elsewhere.seeds.device == elsewhere.y.device == torch.device("meta")


NAMES = ["a", "b", "c", "d"]


def test_names_stay_with_every_part() -> None:
    data = PerturbationDataset.from_sets(
        [["a", "c"], ["d"], ["b"]], [1.0, 2.0, 3.0], genes=GeneList(NAMES), split=["x", "y", "y"]
    )
    assert data.names == GeneList(NAMES)
    for part in (data.subset("y"), data[1:], data[torch.tensor([0])], pickle.loads(pickle.dumps(data)), copy.deepcopy(data)):
        assert part.names == GeneList(NAMES)
    again = PerturbationDataset(data.seeds, data.ptr, data.types, data.y, num_genes=4, names=NAMES)
    require_same_genes(again.names, data.names)
    assert PerturbationDataset.from_sets([[0]], [1.0], num_genes=4).names is None
    assert PerturbationDataset.from_sets([["a"]], [1.0], genes=GeneList(NAMES), num_genes=5).names is None
    with pytest.raises(ValueError, match="names: expected 5, one a gene, got 4"):
        PerturbationDataset(data.seeds, data.ptr, data.types, data.y, num_genes=5, names=NAMES)


def test_planted_phenotypes_carry_the_names_of_their_graph() -> None:
    graph = synthetic_cell(num_genes=40)
    assert graph.names is not None
    assert graph.names[39] == "gene39"
    assert synthetic_phenotypes(graph, 5).names is graph.names


def test_mutants_to_predict_have_no_phenotypes() -> None:
    data = PerturbationDataset.from_sets(SETS, num_genes=5)
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch.y.shape == (3, 0)
    assert parts(batch)[:3] == [[3, 1, 0, 2, 4], [0, 2, 2, 5], [1] * 5]
    assert batch.to("cpu").y.shape == (3, 0)
    assert data[0].y.shape == (0,)
    assert data.subset([4, 1]).y.shape == (2, 0)
    plain = PerturbationDataset(data.seeds, data.ptr, data.types, num_genes=5)
    assert parts(plain.__getitems__([0, 4])) == parts(data.__getitems__([0, 4]))
    default = next(iter(DataLoader(ConcatDataset([data]), batch_size=3)))
    assert parts(default) == parts(batch)


def test_numpy_arrays_go_in() -> None:
    data = dataset()
    arrays: Any = (x.numpy() for x in (data.seeds, data.ptr, data.types, data.y))
    again = PerturbationDataset(*arrays, num_genes=5)
    assert parts(again.__getitems__(range(5))) == parts(data.__getitems__(range(5)))


class Column:
    """Of a data frame whose rows were chosen: labels are left, by which it is indexed."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values

    def __getitem__(self, label: Any) -> Any:
        raise KeyError(label)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


@pytest.mark.parametrize("make", [Column, np.array, pl.Series, list], ids=lambda make: make.__name__)
def test_columns_of_data_frames_go_in(make: Callable[[Any], Any]) -> None:
    sets = [[0, 1], [2], [1]]
    data = PerturbationDataset.from_sets(sets, make([0.5, 1.5, 2.5]), num_genes=3, split=make(["a", "b", "a"]))
    assert data.y.tolist() == [0.5, 1.5, 2.5]
    assert data.split == ["a", "b", "a"]
    assert PerturbationDataset.from_sets(sets, make([3, 1, 2]), num_genes=3).y.tolist() == [3.0, 1.0, 2.0]
    assert data.subset(make([True, False, True])).y.tolist() == [0.5, 2.5]
    assert data.subset(make([2, 0])).y.tolist() == [2.5, 0.5]
    assert data.__getitems__(make([2, 0])).y.tolist() == [2.5, 0.5]
    for wrong in ([0.0, 1.9], [True, False], ["a", "b"]):
        with pytest.raises((TypeError, ValueError), match=r"^indices: expected "):
            data.__getitems__(make(wrong))
    with pytest.raises(TypeError, match=r"^y: expected a tensor or numbers, got"):
        PerturbationDataset.from_sets(sets, make(["1", "2", "3"]), num_genes=3)
    with pytest.raises(TypeError, match=r"^split: expected one string a sample, got"):
        PerturbationDataset.from_sets(sets, num_genes=3, split=make([1, 2, 3]))


def test_torch_save_is_read_with_weights_only() -> None:
    data = PerturbationDataset.from_sets(
        [["A", "B"], [], ["C"]], [1.0, 2.0, 3.0], genes=GeneList(["A", "B", "C"]), split=["x", "y", "x"]
    )
    file = io.BytesIO()
    torch.save([data, data.__getitems__([0, 2]), data[0]], file)
    file.seek(0)
    read, batch, sample = torch.load(file, weights_only=True)
    assert (read.split, read.names) == (data.split, data.names)
    for ours, theirs in ((read, data), (batch, data[[0, 2]]), (sample, data[0])):
        assert torch.equal(ours.seeds, theirs.seeds)
        assert torch.equal(ours.types, theirs.types)
        assert torch.equal(ours.y, theirs.y)


def test_another_default_device(tmp_path: Path) -> None:
    """Datasets stay on the CPU: what went to another device by mistake would be lost on meta."""
    path = tmp_path / "table.csv"
    path.write_text("first,second,score\nA,B,1\nC,A,2\nB,C,3\n")

    def everything() -> list[Tensor]:
        genes = GeneList(["A", "B", "C"])
        table = read_interactions(path, genes, gene_columns=("first", "second"), sep=",")
        data = PerturbationDataset.from_interactions(table)
        named = PerturbationDataset.from_sets([["A", "B"], ["C"]], [1.0, 2.0], genes=genes, split=["x", "y"])
        batch = named.__getitems__([1, 0])
        parts: list[Any] = [data, data[1:], named.subset("y"), batch, PerturbationDataset.collate(list(named))]
        found = [x for part in parts for x in (part.seeds, part.ptr, part.types, part.y)]
        return [*found, data.overlaps(named), genes.index(["C"]), *split(data, "random", test=0.3, validation=0.3).values()]

    want = everything()
    with torch.device("meta"):
        got = everything()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
