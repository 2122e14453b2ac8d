"""Batches as PyG's `HeteroData`: against what PyG's own loader collates, and back."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from cellattn import MultiGraph, khop_subgraph
from cellattn.data import PERTURBATION_TYPES, PerturbationBatch, PerturbationDataset

pyg = pytest.importorskip("torch_geometric")
from torch_geometric.data import Batch, HeteroData  # noqa: E402
from torch_geometric.loader import DataLoader  # noqa: E402

NUM_GENES = 7
SETS = [[3, 1], [], [0, 2, 4], [6], []]
TYPES = [["deleted", "added"], [], ["mutated", "deleted", "deleted"], ["overexpressed"], []]
FOLLOW = ["perturbation_indices"]


class Numbered(HeteroData):
    """A sample whose indices PyG counts up in collation."""

    def __inc__(self, key: str, value: Any, store: Any = None, *args: Any, **kwargs: Any) -> Any:
        return NUM_GENES if key == "perturbation_indices" else super().__inc__(key, value, store, *args, **kwargs)


def dataset(num_phenotypes: int | None = None) -> PerturbationDataset:
    shape = (len(SETS),) if num_phenotypes is None else (len(SETS), num_phenotypes)
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return PerturbationDataset.from_sets(SETS, y, types=TYPES, num_genes=NUM_GENES)


def whole(data: PerturbationDataset) -> PerturbationBatch:
    return data.__getitems__(range(len(data)))


def sample_of(
    seeds: Tensor, types: Tensor | None, y: Tensor, *, masks: bool = False, kind: Callable[[], HeteroData] = HeteroData
) -> HeteroData:
    """One mutant as the group's processors give it."""
    data = kind()
    genes = data["gene"]
    genes.perturbation_indices, genes.num_nodes = seeds, NUM_GENES
    if types is not None:
        genes.perturbation_types = types
    genes.phenotype_values = y.reshape(-1)
    genes.phenotype_type_indices = torch.arange(y.numel())
    genes.phenotype_sample_indices = torch.zeros(y.numel(), dtype=torch.int64)
    if masks:
        genes.pert_mask = torch.zeros(NUM_GENES, dtype=torch.bool).index_fill(0, seeds, True)
        genes.mask = ~genes.pert_mask
    return data


def samples(data: PerturbationDataset, **options: Any) -> list[HeteroData]:
    return [sample_of(*data[b], **options) for b in range(len(data))]


def collated(data: PerturbationDataset, **options: Any) -> Any:
    (batch,) = DataLoader(samples(data, **options), batch_size=len(data), follow_batch=FOLLOW)
    return batch


def assert_same_batch(a: PerturbationBatch, b: PerturbationBatch) -> None:
    for name in ("seeds", "ptr", "types", "y"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype, name
        assert torch.equal(left, right), name


def assert_same_store(got: Any, want: Any, *, but: tuple[str, ...] = ()) -> None:
    assert set(want.keys()) - set(got.keys()) == set(but)
    for key, value in got.items():
        if isinstance(value, Tensor):
            assert value.dtype == want[key].dtype, key
            assert torch.equal(value, want[key]), key
        else:
            assert value == want[key], key


@pytest.mark.parametrize("num_phenotypes", [None, 3], ids="{}-phenotypes".format)
@pytest.mark.parametrize("masks", [False, True], ids=["indices", "masks"])
@pytest.mark.parametrize("offset", [False, True], ids=["genes", "offset"])
def test_is_what_a_loader_of_pyg_gives(offset: bool, masks: bool, num_phenotypes: int | None) -> None:
    data = dataset(num_phenotypes)
    want = collated(data, masks=masks, kind=Numbered if offset else HeteroData)
    got = whole(data).to_hetero_data(NUM_GENES, masks=masks, offset=offset)
    # the samples' own indices are all 0 and PyG does not count them up: ours say which sample a value is of
    want["gene"].phenotype_sample_indices = torch.arange(5).repeat_interleave(num_phenotypes or 1)
    # one entry a gene and sample: made on request only
    assert_same_store(got["gene"], want["gene"], but=() if masks else ("batch", "ptr"))
    assert isinstance(got, Batch)
    assert isinstance(got, HeteroData)
    assert got.num_graphs == len(got) == 5
    for one, other in zip(got.to_data_list(), samples(data, masks=masks), strict=True):
        assert_same_store(one["gene"], other["gene"])
    assert got[2]["gene"].num_nodes == NUM_GENES
    assert_same_store(got[2]["gene"], samples(data, masks=masks)[2]["gene"])


@pytest.mark.parametrize("num_phenotypes", [None, 3], ids="{}-phenotypes".format)
@pytest.mark.parametrize("offset", [False, True], ids=["genes", "offset"])
@pytest.mark.parametrize("part", [[0, 1, 2, 3, 4], [2], [3, 0, 1]], ids=str)
def test_collated_again_is_the_same_batch(part: list[int], offset: bool, num_phenotypes: int | None) -> None:
    data = dataset(num_phenotypes)
    given = pickle.loads(pickle.dumps(whole(data).to_hetero_data(NUM_GENES, masks=True, offset=offset))).to_data_list()
    again = Batch.from_data_list([given[b] for b in part], follow_batch=FOLLOW)
    want = data.__getitems__(part)
    assert_same_store(again["gene"], want.to_hetero_data(NUM_GENES, masks=True, offset=offset)["gene"])
    assert_same_batch(PerturbationBatch.from_hetero_data(again), want)


@pytest.mark.parametrize("offset", [False, True], ids=["genes", "offset"])
@pytest.mark.parametrize("num_phenotypes", [None, 2], ids="{}-phenotypes".format)
@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4], [1], [4, 1], []], ids=str)
def test_round_trip(indices: list[int], num_phenotypes: int | None, offset: bool) -> None:
    batch = dataset(num_phenotypes).__getitems__(indices)
    back = PerturbationBatch.from_hetero_data(batch.to_hetero_data(NUM_GENES, offset=offset))
    if indices:
        assert_same_batch(back, batch)
    else:  # no values: their number a sample is nowhere
        assert len(back) == back.seeds.numel() == back.y.numel() == 0


@pytest.mark.parametrize("follow", [FOLLOW, []], ids=["follow_batch", "books"])
@pytest.mark.parametrize("kind", [HeteroData, Numbered], ids=["genes", "offset"])
@pytest.mark.parametrize("num_phenotypes", [None, 3], ids="{}-phenotypes".format)
def test_reads_what_a_loader_of_pyg_gives(num_phenotypes: int | None, kind: Any, follow: list[str]) -> None:
    data = dataset(num_phenotypes)
    loader = DataLoader(samples(data, masks=True, kind=kind), batch_size=3, follow_batch=follow)
    for first, batch in zip((0, 3), loader, strict=True):
        want = data.__getitems__(range(first, min(first + 3, len(data))))
        assert_same_batch(PerturbationBatch.from_hetero_data(batch), want)


def test_types_default_to_deleted() -> None:
    data = dataset()
    batch = Batch.from_data_list([sample_of(seeds, None, y) for seeds, _, y in map(data.__getitem__, range(5))])
    assert set(PerturbationBatch.from_hetero_data(batch).types.tolist()) == {PERTURBATION_TYPES.index("deleted")}
    added = PerturbationBatch.from_hetero_data(batch, types="added")
    assert set(added.types.tolist()) == {PERTURBATION_TYPES.index("added")}
    with pytest.raises(ValueError, match="types: unknown value 'present'"):
        PerturbationBatch.from_hetero_data(batch, types="present")


def test_one_sample_is_a_batch_of_one() -> None:
    data = dataset()
    assert_same_batch(PerturbationBatch.from_hetero_data(samples(data)[2]), data.__getitems__([2]))


def test_phenotypes_in_any_order() -> None:
    """A `HeteroData` that PyG did not collate: the index fields say which value is which."""
    data = HeteroData()
    data["gene"].perturbation_indices = torch.tensor([4, 0, 2])
    data["gene"].perturbation_indices_ptr = torch.tensor([0, 1, 3])
    data["gene"].phenotype_values = torch.tensor([21.0, 10.0, 20.0, 11.0])
    data["gene"].phenotype_type_indices = torch.tensor([7, 3, 3, 7])
    data["gene"].phenotype_sample_indices = torch.tensor([1, 0, 1, 0])
    batch = PerturbationBatch.from_hetero_data(data)
    assert batch.y.tolist() == [[10, 11], [20, 21]]
    assert batch.seeds.tolist() == [4, 0, 2]
    data["gene"].phenotype_values = data["gene"].phenotype_values.double()
    assert PerturbationBatch.from_hetero_data(data).y.dtype == torch.float32
    data["gene"].phenotype_sample_indices = torch.tensor([1, 1, 1, 0])
    with pytest.raises(ValueError, match="data: expected every phenotype once for each of 2 samples"):
        PerturbationBatch.from_hetero_data(data)


@pytest.mark.parametrize("again", [False, True], ids=["ours", "collated-again"])
@pytest.mark.parametrize("offset", [False, True], ids=["local", "offset"])
def test_subgraphs_give_genes(offset: bool, again: bool) -> None:
    """Positions in the subgraphs of a batch, or in the batch, become the genes that stand there."""
    batch = whole(dataset())
    edges = torch.tensor([[0, 1, 2, 3, 5], [1, 2, 3, 6, 0]])
    graph = MultiGraph.from_edge_index({"a": edges}, NUM_GENES)
    data = khop_subgraph(graph, batch.seeds, batch.ptr, 1).to_hetero_data(offset=offset)
    if again:
        data = Batch.from_data_list(data.to_data_list(), follow_batch=FOLLOW)
    data["gene"].phenotype_values = batch.y
    back = PerturbationBatch.from_hetero_data(data)
    want = [sorted(members) for members in SETS]  # subgraphs are in ascending order
    assert [back.seeds[a:b].tolist() for a, b in zip(back.ptr, back.ptr[1:], strict=False)] == want


def test_other_node_type() -> None:
    batch = whole(dataset())
    data = batch.to_hetero_data(NUM_GENES, node_type="protein")
    assert data.node_types == ["protein"]
    assert_same_batch(PerturbationBatch.from_hetero_data(data, node_type="protein"), batch)
    with pytest.raises(ValueError, match="node_type: unknown value 'gene', expected one of 'protein'"):
        PerturbationBatch.from_hetero_data(data)


def test_num_bytes() -> None:
    batch = whole(dataset())
    assert batch.num_bytes == 8 * (6 + 6 + 6) + 4 * 5  # seeds, types, ptr; y


@pytest.mark.parametrize("together", [False, True], ids=["samples", "batches"])
def test_dataset(together: bool) -> None:
    data = dataset(2)
    given = list(DataLoader(samples(data, kind=Numbered), batch_size=2)) if together else samples(data)
    back = PerturbationDataset.from_hetero_data(given, split=["a", "a", "b", "b", "b"])
    assert_same_batch(whole(back), whole(data))
    assert back.num_genes == NUM_GENES
    assert back.split == ["a", "a", "b", "b", "b"]


def test_dataset_without_the_number_of_genes() -> None:
    data = samples(dataset())
    for sample in data:
        del sample["gene"].num_nodes
    with pytest.raises(ValueError, match="num_genes: node type 'gene' does not tell it"):
        PerturbationDataset.from_hetero_data(data)
    assert PerturbationDataset.from_hetero_data(data, num_genes=9).num_genes == 9
    with pytest.raises(ValueError, match="samples: expected at least one sample, got none"):
        PerturbationDataset.from_hetero_data([])
    with pytest.raises(TypeError, match="samples: expected a sequence of HeteroData, got HeteroData"):
        PerturbationDataset.from_hetero_data(data[0])


def test_bad_input() -> None:
    batch = whole(dataset())
    with pytest.raises(ValueError, match=re.escape("seeds: position 5 holds 6, expected an index in [0, 5) (genes)")):
        batch.to_hetero_data(5)
    with pytest.raises(ValueError, match="data: expected a HeteroData, got dict"):
        PerturbationBatch.from_hetero_data({})
    data = batch.to_hetero_data(NUM_GENES)
    del data["gene"].phenotype_values
    with pytest.raises(ValueError, match="data: node type 'gene' has no phenotype_values, but perturbation_indices, "):
        PerturbationBatch.from_hetero_data(data)
    lost = HeteroData()
    lost["gene"].perturbation_indices, lost["gene"].perturbation_indices_batch = torch.tensor([1, 2]), torch.tensor([0, 1])
    lost["gene"].phenotype_values = torch.zeros(2)
    with pytest.raises(ValueError, match="data: has perturbation_indices_batch but not perturbation_indices_ptr"):
        PerturbationBatch.from_hetero_data(lost)
    uneven = samples(dataset())
    uneven[0]["gene"].phenotype_values, uneven[1]["gene"].phenotype_values = torch.zeros(2), torch.zeros(0)
    with pytest.raises(ValueError, match="data: expected the same phenotypes for each of 5 samples, got 5"):
        PerturbationBatch.from_hetero_data(Batch.from_data_list(uneven))


T = torch.tensor
# Fields of two samples to what is said of them, alone or collated.
MALFORMED: dict[str, tuple[dict[str, list[Any]], str]] = {
    "indices-float": (
        {"perturbation_indices": [T([1.0]), T([2.0])]},
        "perturbation_indices of .* expected whole numbers, got a float32",
    ),
    "indices-mask": (
        {"perturbation_indices": [T([True]), T([False])]},
        "perturbation_indices of .*expected whole numbers, got a bool",
    ),
    "indices-words": (
        {"perturbation_indices": ["a", "b"]},
        "perturbation_indices of .*expected a tensor of whole numbers, got ",
    ),
    "indices-negative": (
        {"perturbation_indices": [T([1, -2]), T([-2])]},
        "perturbation_indices: position . holds -2, expected an",
    ),
    "indices-of-a-subgraph": (
        {"perturbation_indices": [T([0, 3]), T([3])], "n_id": [T([4, 5]), T([5, 6])], "num_nodes": [2, 2]},
        "perturbation_indices: position . holds 3, which its subgraph does not have",
    ),
    "n_id-float": (
        {"n_id": [T([4.0, 5.0]), T([5.0, 6.0])], "num_nodes": [2, 2]},
        "n_id of .*: expected whole numbers, got a float32",
    ),
    "types-float": ({"perturbation_types": [T([1.0]), T([1.0])]}, "perturbation_types of .*: expected whole numbers"),
    "types-length": (
        {"perturbation_types": [T([1, 1]), T([1, 1])]},
        "perturbation_types: expected . entries as in perturbation_",
    ),
    "types-range": (
        {"perturbation_types": [T([6]), T([6])]},
        r"perturbation_types: position 0 holds 6, expected an index in \[0, 6\)",
    ),
    "values-words": ({"phenotype_values": ["a", "b"]}, "phenotype_values of .*: expected a tensor of numbers, got "),
    "values-complex": ({"phenotype_values": [T([1j]), T([1j])]}, "phenotype_values of .*: expected numbers, got a complex64"),
    "kinds-float": ({"phenotype_type_indices": [T([0.0]), T([0.0])]}, "phenotype_type_indices of .*: expected whole numbers"),
    "kinds-length": (
        {"phenotype_type_indices": [T([0, 1]), T([0, 1])]},
        "phenotype_type_indices: expected . entries as in phenotype_",
    ),
}


@pytest.mark.parametrize("together", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_fields_are_named(case: str, together: bool) -> None:
    fields, message = MALFORMED[case]
    data = [HeteroData(), HeteroData()]
    for position, one in enumerate(data):
        one["gene"].perturbation_indices, one["gene"].phenotype_values = T([1]), T([0.5])
        one["gene"].num_nodes = NUM_GENES
        for name, values in fields.items():
            setattr(one["gene"], name, values[position])
    given = Batch.from_data_list(data) if together else data[0]
    with pytest.raises((ValueError, TypeError), match=f"^data: {message}"):
        PerturbationBatch.from_hetero_data(given)


def test_numbers_of_any_kind_are_read() -> None:
    """Lists, NumPy arrays and other whole dtypes, where each sample is its own; what PyG collates of them where it can."""
    for make in (list, np.array, lambda x: T(x, dtype=torch.int32), lambda x: T(x, dtype=torch.uint8), lambda x: T(x)[:, None]):
        data = HeteroData()
        data["gene"].perturbation_indices, data["gene"].perturbation_types = make([4, 2]), make([1, 5])
        data["gene"].phenotype_values, data["gene"].num_nodes = make([3]), NUM_GENES
        batch = PerturbationBatch.from_hetero_data(data)
        assert (batch.seeds.tolist(), batch.ptr.tolist(), batch.types.tolist()) == ([4, 2], [0, 2], [1, 5])
        assert (batch.seeds.dtype, batch.types.dtype, batch.y.tolist()) == (torch.int64, torch.int64, [3.0])


def test_samples_of_a_subset() -> None:
    """As `random_split` gives them, which can be gone through by positions alone."""
    data = []
    for gene in range(3):
        data.append(HeteroData())
        data[-1]["gene"].perturbation_indices, data[-1]["gene"].num_nodes = T([gene]), NUM_GENES
    chosen = torch.utils.data.Subset(cast(Any, data), [2, 0])
    assert PerturbationDataset.from_hetero_data(cast(Any, chosen), num_genes=NUM_GENES).seeds.tolist() == [2, 0]


def test_samples_that_do_not_tell_how_many_genes_there_are() -> None:
    """Those of graphs of several sizes, alone or in a batch, and subgraphs, whose size is not that of the graph."""

    def sample(num_nodes: int) -> HeteroData:
        data = HeteroData()
        data["gene"].perturbation_indices, data["gene"].num_nodes = T([1]), num_nodes
        return data

    read = PerturbationDataset.from_hetero_data
    alike = [sample(9), Batch.from_data_list([sample(9), sample(9)])]
    assert read(alike).num_genes == 9
    silent = HeteroData()
    silent["gene"].perturbation_indices = T([8])
    assert read([*alike, silent]).num_genes == 9
    with pytest.raises(ValueError, match=r"^num_genes: node type 'gene' does not tell it, so give it here"):
        read([silent])
    for others in ([sample(9), sample(5)], [Batch.from_data_list([sample(4), sample(8)])], [*alike, sample(8)]):
        with pytest.raises(
            ValueError, match=r"^num_genes: the samples are of [94] genes and, sample [13], of [58], so give it"
        ):
            read(others)
        assert read(others, num_genes=9).num_genes == 9
    alike[0]["gene"].n_id = torch.arange(9) + 3
    with pytest.raises(ValueError, match=r"^num_genes: node type 'gene' holds subgraphs \(n_id\), which do not tell it"):
        read(alike[:1])
    assert read(alike[:1], num_genes=12).seeds.tolist() == [4]


def test_other_forms_of_fields() -> None:
    data = HeteroData()
    data["gene"].perturbation_indices, data["gene"].n_id, data["gene"].num_nodes = T([1]), [4, 5], 2
    assert PerturbationBatch.from_hetero_data(data).seeds.tolist() == [5]
    data["gene"].perturbation_indices = T([1]).to_sparse()
    with pytest.raises(ValueError, match=r"^data: perturbation_indices of .*: expected whole numbers, got a "):
        PerturbationBatch.from_hetero_data(data)


@pytest.mark.parametrize("ptr", [[0, 1], [0, 2, 1, 2], [1, 2], [0, 3]], ids=str)
def test_ptr_is_of_the_indices(ptr: list[int]) -> None:
    data = HeteroData()
    data["gene"].perturbation_indices, data["gene"].perturbation_indices_ptr = T([1, 2]), T(ptr)
    with pytest.raises(ValueError, match=r"^data: perturbation_indices_ptr: expected to "):
        PerturbationBatch.from_hetero_data(data)
    flat = HeteroData()
    flat["gene"].perturbation_indices = T([[1, 2]])
    with pytest.raises(ValueError, match=r"^data: perturbation_indices_ptr: expected to end with 4"):
        PerturbationBatch.from_hetero_data(Batch.from_data_list([flat, flat]))


def test_batches_without_phenotypes() -> None:
    data = PerturbationDataset.from_sets([[3, 1], [], [2]], num_genes=NUM_GENES)
    batch = data.__getitems__([0, 1, 2])
    for offset in (False, True):
        pyg = batch.to_hetero_data(NUM_GENES, offset=offset)
        assert not any("phenotype" in name for name in pyg["gene"].keys())  # noqa: SIM118
        assert_same_batch(PerturbationBatch.from_hetero_data(pyg), batch)
        again = Batch.from_data_list(pyg.to_data_list(), follow_batch=["perturbation_indices"])
        assert_same_batch(PerturbationBatch.from_hetero_data(again), batch)
    assert PerturbationDataset.from_hetero_data([batch.to_hetero_data(NUM_GENES)]).y.shape == (3, 0)
    whole_batch = PerturbationDataset.from_hetero_data([batch.to_hetero_data(NUM_GENES)], names=list("abcdefgh")[:NUM_GENES])
    assert whole_batch.names is not None
