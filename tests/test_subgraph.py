"""SubgraphBatch: its parts, its samples, and the PyG batch it turns into."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cellattn import MultiGraph, SubgraphBatch, khop_subgraph, reference

from .compare import cell_with_terms
from .ops.sets import problem, ragged
from .ops.test_khop_subgraph import arrays, assert_equal, assert_samples

P = problem(0, 40, [90, 0, 300], 9)
FORMATS = [
    pytest.param({"layout": layout, "index_dtype": dtype, "return_edge_id": edge_id}, id=f"{layout}-{dtype}-{edge_id}")
    for layout in ("coo", "csr")
    for dtype in (torch.int64, torch.int32)
    for edge_id in (True, False)
]


def room_to_spare(exact: SubgraphBatch, **options: Any) -> SubgraphBatch:
    return khop_subgraph(*P, 1, max_nodes=exact.num_nodes + 7, max_edges=exact.num_edges() + 5, **options)


@pytest.mark.parametrize("options", FORMATS)
def test_one_sample(options: dict[str, Any]) -> None:
    batch = khop_subgraph(*P, 1, **options)
    want = reference.khop_subgraph(*P, 1)
    for whole in (batch, room_to_spare(batch, **options)):
        assert len(whole) == len(want) == 9
        for b, sample in enumerate(whole):
            assert len(sample) == 1
            assert sample.layout == options["layout"]
            assert sample.node.dtype == options["index_dtype"]
            assert (sample.edge_id is None) == (not options["return_edge_id"])
            assert_samples(sample, [want[b]])
            assert_equal(sample, whole[b - 9])


def test_a_sample_is_a_copy() -> None:
    batch = khop_subgraph(*P, 1)
    want = [x.clone() for x in arrays(batch)]
    sample = batch[2]
    khop_subgraph(*P, 0, out=sample)
    for x in sample._buffers:
        if x is not None:
            x.zero_()
    for a, b in zip(arrays(batch), want, strict=True):
        assert torch.equal(a, b)


def test_samples_that_are_not_there() -> None:
    batch = khop_subgraph(*P, 1)
    for b in (9, -10):
        with pytest.raises(IndexError, match=rf"b: expected a sample in \[-9, 9\), got {b}"):
            batch[b]
    for wrong in ("0", slice(2), True, 1.0):
        with pytest.raises(TypeError, match="b: expected an int"):
            batch[wrong]  # type: ignore[index]


def test_no_relation_and_no_sample() -> None:
    graph = MultiGraph.from_edge_index({}, 4)
    batch = khop_subgraph(graph, *ragged([[3, 0, 3], []]), 2)
    assert batch.node.tolist() == [0, 3]
    assert batch.edge_index == batch.edge_ptr == batch.edge_id == {}
    assert batch[0].node.tolist() == [0, 3]
    assert batch[1].node.tolist() == []
    assert batch.to_hetero_data()["gene"].n_id.tolist() == [0, 3]
    nothing = khop_subgraph(P.graph, *ragged([]), 2)
    assert len(nothing) == nothing.num_nodes == nothing.num_edges() == 0
    assert "num_samples=0" in repr(nothing)
    assert nothing.to_hetero_data().num_graphs == 0


def test_sizes() -> None:
    batch = khop_subgraph(*P, 1)
    assert batch.num_nodes == batch.node.numel() == int(batch.node_ptr[-1])
    assert batch.num_edges("r2") == batch.edge_index["r2"].shape[1] == int(batch.edge_ptr["r2"][-1])
    assert batch.num_edges() == sum(batch.num_edges(name) for name in batch.relations)
    assert batch.device == torch.device("cpu")
    with pytest.raises(ValueError, match="relation: unknown value 'r9'"):
        batch.num_edges("r9")


def test_sample_of_each_place() -> None:
    batch = khop_subgraph(*P, 1)
    want = torch.arange(9).repeat_interleave(batch.node_ptr.diff())
    assert torch.equal(batch.sample, want)
    spare = room_to_spare(batch)
    assert torch.equal(spare.sample, torch.cat([want, torch.full((7,), 9)]))


@pytest.mark.parametrize(("layout", "names"), [("coo", ("rowptr", "col")), ("csr", ("edge_index",))])
def test_arrays_of_the_other_layout(layout: str, names: tuple[str, ...]) -> None:
    batch = khop_subgraph(*P, 1, layout=layout)
    for name in names:
        with pytest.raises(AttributeError, match=f"{name}: a batch with layout='{layout}' holds"):
            getattr(batch, name)
        assert not hasattr(batch, name)
    with pytest.raises(AttributeError, match="'SubgraphBatch' object has no attribute 'edges'"):
        _ = batch.edges


@pytest.mark.parametrize("options", FORMATS)
def test_copies(options: dict[str, Any]) -> None:
    batch = khop_subgraph(*P, 1, **options)
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch), torch.load(file, weights_only=True)):
        assert_equal(other, batch)
        assert not {x.data_ptr() for x in arrays(other) if x.numel()} & {x.data_ptr() for x in arrays(batch) if x.numel()}
    assert_equal(copy.copy(batch), batch)


def test_from_the_workers_of_a_loader() -> None:
    samples = [ragged([[b, 3 * b]]) for b in range(4)]

    def extract(sets: tuple[Tensor, Tensor]) -> SubgraphBatch:
        return khop_subgraph(P.graph, *sets, 1)

    loader: Any = DataLoader(samples, batch_size=None, num_workers=2, collate_fn=extract)  # type: ignore[arg-type]
    for batch, sets in zip(loader, samples, strict=True):
        assert_equal(batch, khop_subgraph(P.graph, *sets, 1))


@pytest.mark.parametrize("options", FORMATS)
def test_to(options: dict[str, Any]) -> None:
    batch = khop_subgraph(*P, 1, **options)
    assert batch.to("cpu") is batch
    moved = batch.to("meta", non_blocking=True)
    assert {x.device.type for x in arrays(moved)} == {"meta"}
    assert [(x.shape, x.dtype) for x in arrays(moved)] == [(x.shape, x.dtype) for x in arrays(batch)]


def test_pin_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array goes through; there is nothing to pin for without a GPU."""
    pinned = []

    def pin_memory(x: Tensor) -> Tensor:
        pinned.append(x.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    batch = khop_subgraph(*P, 1, layout="csr", out=khop_subgraph(*P, 2, layout="csr"))
    other = batch.pin_memory()
    assert_equal(other, batch)
    held = {x.untyped_storage().data_ptr() for x in pinned}
    assert {x.untyped_storage().data_ptr() for x in arrays(other)} <= held
    # without the room that `out` left
    assert sum(x.numel() for x in pinned) < sum(x.numel() for x in batch._buffers if x is not None)


def test_repr() -> None:
    batch = khop_subgraph(*P, 1)
    lines = repr(batch).splitlines()
    edges = batch.num_edges()
    assert lines[0].startswith(f"SubgraphBatch(num_samples=9, num_nodes={batch.num_nodes}, num_edges={edges}, layout='coo'")
    assert "index_dtype=int64" in lines[0]
    assert "MiB" in lines[0]
    assert "device=cpu" in lines[0]
    table = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert table["nodes"] == [str(batch.num_nodes), f"{batch.num_nodes / 9:.1f}"]
    assert table["r2"] == [str(batch.num_edges("r2")), f"{batch.num_edges('r2') / 9:.1f}"]
    assert table["r1"] == ["0", "0.0"]
    spare = repr(room_to_spare(batch)).splitlines()
    assert spare[2:] == lines[2:]  # what is there, not the room for it
    assert "overflow" in repr(khop_subgraph(*P, 1, max_nodes=1, max_edges=1))


# ------------------------------------------------------------------------------------------------------------------ PyG


def pyg_batch(drop_seeds: bool, edge_id: bool, offset: bool, of: Any = P) -> tuple[Any, list[Any]]:
    """What a PyG DataLoader gives for the reference's samples, and these."""
    data = pytest.importorskip("torch_geometric.data")
    loader = pytest.importorskip("torch_geometric.loader")

    class CellData(data.HeteroData):  # type: ignore[name-defined]
        def __inc__(self, key: str, value: Any, store: Any = None, *args: Any, **kwargs: Any) -> Any:
            return store.num_nodes if key == "perturbation_indices" else super().__inc__(key, value, store, *args, **kwargs)

    samples = []
    graph, seeds, ptr = of
    for sample in reference.khop_subgraph(graph, seeds, ptr, 1, drop_seeds=drop_seeds):
        one = CellData() if offset else data.HeteroData()
        first = {}
        for kind, at in graph.node_types.items():
            here = torch.tensor([int(node) in at for node in sample["node"]], dtype=torch.bool)
            first[kind] = int((sample["node"] < at.start).sum())
            one[kind].n_id = sample["node"][here] - at.start
            one[kind].pert_mask, one[kind].mask = sample["seed_mask"][here], ~sample["seed_mask"][here]
            one[kind].perturbation_indices = sample["seed_mask"][here].nonzero().flatten()
            one[kind].num_nodes = int(here.sum())
        for name in graph.relations:
            source, target = graph.joins(name)
            edges = one[source, name, target]
            edges.edge_index = sample["edge_index"][name] - torch.tensor([[first[source]], [first[target]]])
            if edge_id:
                edges.e_id = sample["edge_id"][name]
        samples.append(one)
    batch = next(iter(loader.DataLoader(samples, len(samples), follow_batch=["perturbation_indices"])))
    return batch, samples


def assert_same_data(got: Any, want: Any) -> None:
    assert got.node_types == want.node_types
    assert got.edge_types == want.edge_types
    for store, other in zip(got.stores, want.stores, strict=True):
        assert set(store.keys()) == set(other.keys())
        for name, value in other.items():
            if isinstance(value, Tensor):
                assert store[name].dtype == value.dtype, name
                assert torch.equal(store[name], value), name
            else:
                assert store[name] == value, name


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "local"])
@pytest.mark.parametrize("drop_seeds", [False, True], ids=["whole", "drop_seeds"])
@pytest.mark.parametrize("options", FORMATS)
def test_to_hetero_data_is_what_a_loader_of_pyg_gives(options: dict[str, Any], drop_seeds: bool, offset: bool) -> None:
    from torch_geometric.data import Batch, HeteroData

    batch = khop_subgraph(*P, 1, drop_seeds=drop_seeds, **options)
    want, samples = pyg_batch(drop_seeds, options["return_edge_id"], offset)
    for whole in (batch, room_to_spare(batch, drop_seeds=drop_seeds, **options)):
        got = whole.to_hetero_data(offset=offset)
        assert isinstance(got, Batch)
        assert isinstance(got, HeteroData)
        assert_same_data(got, want)
        assert got.num_graphs == len(got) == want.num_graphs == 9
        assert got.num_nodes == want.num_nodes
        assert got.validate()
        for one, other in zip(got.to_data_list(), samples, strict=True):
            assert_same_data(one, other)
        assert_same_data(got[3], samples[3])
        assert [one["gene"].num_nodes for one in got[2:5]] == [one["gene"].num_nodes for one in samples[2:5]]


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "local"])
@pytest.mark.parametrize("drop_seeds", [False, True], ids=["whole", "drop_seeds"])
@pytest.mark.parametrize("options", FORMATS)
def test_to_hetero_data_of_several_node_types(options: dict[str, Any], drop_seeds: bool, offset: bool) -> None:
    """Each type is numbered by itself; a set may hold tokens of any, or none, and a neighbourhood lack a type."""
    of = cell_with_terms(), torch.tensor([3, 24, 0, 0, 5, 31, 22]), torch.tensor([0, 2, 2, 3, 6, 7])
    batch = khop_subgraph(*of, 1, drop_seeds=drop_seeds, **options)
    want, samples = pyg_batch(drop_seeds, options["return_edge_id"], offset, of)
    got = batch.to_hetero_data(offset=offset)
    assert_same_data(got, want)
    assert got.validate()
    for b, (one, other) in enumerate(zip(got.to_data_list(), samples, strict=True)):
        assert_same_data(one, other)
        assert_same_data(batch[b].to_hetero_data(offset=offset)[0], other)
    again = type(got).from_data_list(got.to_data_list(), follow_batch=["perturbation_indices"])
    assert_same_data(again, got)
    with pytest.raises(
        ValueError, match=r"node_type: expected None of a graph of several node types \(gene, term\), got 'gene'"
    ):
        batch.to_hetero_data("gene")


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "local"])
def test_to_hetero_data_collated_again_is_the_same_batch(offset: bool) -> None:
    """Whole, in part, in another order, and after a pickle: the samples themselves say what is counted up."""
    Batch = pytest.importorskip("torch_geometric.data").Batch
    batch = khop_subgraph(*P, 1)
    data = batch.to_hetero_data(offset=offset)
    samples = pickle.loads(pickle.dumps(data)).to_data_list()
    assert_same_data(Batch.from_data_list(samples, follow_batch=["perturbation_indices"]), data)
    for part in ([3], [5, 2], list(range(8, -1, -1))):
        sets = [P.seeds[P.ptr[b] : P.ptr[b + 1]] for b in part]
        ptr = torch.tensor([0, *(len(members) for members in sets)]).cumsum(0)
        want = khop_subgraph(P.graph, torch.cat(sets), ptr, 1).to_hetero_data(offset=offset)
        again = Batch.from_data_list([samples[b] for b in part], follow_batch=["perturbation_indices"])
        assert_same_data(again, want)


def test_to_hetero_data_passes_through_a_pyg_model() -> None:
    """One convolution over the batch gives each sample what it gives alone."""
    nn = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    x = torch.randn(P.graph.num_nodes, 5, dtype=torch.float64)
    conv = nn.HeteroConv({("gene", name, "gene"): nn.SAGEConv(5, 3) for name in P.graph.relations}).double()
    batch = khop_subgraph(*P, 1)

    def out(data: Any) -> Tensor:
        return conv({"gene": x[data["gene"].n_id]}, data.edge_index_dict)["gene"]

    together = out(batch.to_hetero_data())
    alone = torch.cat([out(sample.to_hetero_data()) for sample in batch])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)  # float64 sums over other shapes


def test_to_hetero_data_of_another_node_type() -> None:
    data = khop_subgraph(*P, 1).to_hetero_data("protein")
    assert data.node_types == ["protein"]
    assert data.edge_types == [("protein", name, "protein") for name in P.graph.relations]


def test_to_hetero_data_refuses_what_overflowed() -> None:
    with pytest.raises(ValueError, match=r"overflow: .* did not fit max_nodes=3 and max_edges=\[4, 4, 4\]"):
        khop_subgraph(*P, 1, max_nodes=3, max_edges=4).to_hetero_data()
