"""Models on disk: every model of the library comes back from its file alone; what is wrong with a file is said."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from cellattn import MultiGraph, checkpoint
from cellattn.data import GeneList
from cellattn.nn import CellTransformer, Dango, PairwiseInteraction, WildtypeDifference, extend_genes

N = 6
NAMES = [f"Y{i}" for i in range(N)]
EDGES = {"a": torch.tensor([[0, 1, 2], [1, 2, 3]]), "b": torch.tensor([[4, 5], [0, 0]])}
GRAPH = MultiGraph.from_edge_index(EDGES, N)
SETS = {"seeds": torch.tensor([0, 3, 5]), "ptr": torch.tensor([0, 2, 3]), "types": torch.tensor([1, 2, 1])}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: CellTransformer(
        8, 2, 2, num_types=3, num_genes=N, ties=[(0, 1, "a", 0.5)], pool=("sum", "readout"), loss="bce", num_negatives=2
    ),
    "transformer, features": lambda: CellTransformer(8, 1, 2, num_types=3, feature_dim=4),
    "dango": lambda: Dango(8, relations={"a": 0.5, "b": 1.0}, num_genes=N),
    "pairwise": lambda: PairwiseInteraction(8, num_types=3, num_genes=N, out_dim=2),
    "wildtype": lambda: WildtypeDifference(8, 1, relations=["b"], num_types=3, num_genes=N, mode="delta"),
}


def features_of(model: nn.Module) -> Tensor | None:
    width = model.get_submodule("tokens").feature_dim
    return None if not isinstance(width, int) else torch.randn(N, width, generator=torch.Generator().manual_seed(0))


def predict(model: nn.Module, features: Tensor | None) -> Tensor:
    prediction: Tensor = model.eval()(GRAPH, **SETS, features=features).prediction
    return prediction


@pytest.mark.parametrize("name", MODELS)
def test_models_come_back_from_their_file(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    features = features_of(model)
    file = tmp_path / "model.safetensors"
    checkpoint.save(file, model, genes=NAMES, graph=GRAPH, features=features, metadata={"epoch": 3})
    before = torch.get_rng_state()
    found = checkpoint.load(file)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(found.model) is type(model)
    assert not found.model.training
    assert torch.equal(predict(found.model, found.features), predict(model, features))
    assert list(found.genes or ()) == NAMES
    assert found.graph_digest == GRAPH.digest()
    assert found.metadata == {"epoch": 3}
    assert found.state is None


def test_names_are_those_of_the_graph(tmp_path: Path) -> None:
    genes = GeneList(NAMES, aliases={"RAD1": "Y3"})
    graph = MultiGraph.from_edge_index(EDGES, N, names=genes)
    checkpoint.save(tmp_path / "m", MODELS["dango"](), graph=graph)
    assert checkpoint.load(tmp_path / "m").genes == genes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS["pairwise"]().to(dtype)
    checkpoint.save(tmp_path / "m", model)
    assert {p.dtype for p in checkpoint.load(tmp_path / "m").model.parameters()} == {dtype}


def test_added_genes_come_back(tmp_path: Path) -> None:
    model = MODELS["pairwise"]()
    extend_genes(model, 2)
    checkpoint.save(tmp_path / "m", model)
    table = checkpoint.load(tmp_path / "m").model.get_parameter("tokens.embedding.weight")
    assert table.shape == (N + 2, 8)


def test_state_comes_back_equal(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp": weight}}, "betas": (0.9, 0.98)},
        "generator": (3, (1, 2, 3), None),
        "best": None,
        "worst": float("-inf"),
        "again": weight,
        "list": [1, 2.5, "x", True, [], {}],
    }
    checkpoint.save(tmp_path / "m", MODELS["pairwise"](), state=state)
    found = checkpoint.load(tmp_path / "m").state
    assert torch.equal(found["optimizer"]["state"][0].pop("exp"), weight)
    assert torch.equal(found.pop("again"), weight)
    assert found.pop("optimizer") == {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.98)}
    assert found == {key: state[key] for key in ("generator", "best", "worst", "list")}
    assert isinstance(found["generator"][1], tuple)


def test_digest_tells_what_is_another() -> None:
    model = MODELS["transformer"]()
    other = copy.deepcopy(model)
    assert checkpoint.digest(other) == checkpoint.digest(model)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    assert checkpoint.digest(other) != checkpoint.digest(model)


def test_digest_of_a_file_is_of_model_genes_and_features(tmp_path: Path) -> None:
    model = MODELS["transformer, features"]()
    features = features_of(model)
    assert features is not None

    def saved(**options: Any) -> str:
        checkpoint.save(tmp_path / "m", model, **{"genes": NAMES, "features": features, **options})
        return checkpoint.load(tmp_path / "m").digest

    assert saved() == saved(state={"step": 1}, metadata={"epoch": 1})
    assert len({saved(), saved(genes=NAMES[::-1]), saved(genes=None), saved(features=features + 1)}) == 4


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))


def test_other_modules_are_given(tmp_path: Path) -> None:
    own = Own()
    nn.init.ones_(own.weight)
    checkpoint.save(tmp_path / "m", own)
    with pytest.raises(ValueError, match=r"holds a .*:Own, which is not one of CellTransformer, .*: give the module"):
        checkpoint.load(tmp_path / "m")
    assert torch.equal(checkpoint.load(tmp_path / "m", model=Own()).model.get_parameter("weight"), torch.ones(2))
    with pytest.raises(ValueError, match=r"holds a .*:Own, but model is a PairwiseInteraction"):
        checkpoint.load(tmp_path / "m", model=MODELS["pairwise"]())


def test_the_graph_file_is_found_from_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    GRAPH.save(tmp_path / "graph.safetensors")
    checkpoint.save(tmp_path / "run/m", MODELS["dango"](), graph=GRAPH, graph_file=tmp_path / "graph.safetensors")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    file = checkpoint.load(moved / "m").graph_file
    assert file is not None
    assert MultiGraph.load(file) == GRAPH


class Best(NamedTuple):
    epoch: int
    score: Tensor


def test_numbers_that_numpy_boxes_and_named_tuples_are_kept(tmp_path: Path) -> None:
    state = {"best": np.float32(0.5), "step": np.int64(3), np.int64(1): [np.bool_(True), 2], "named": Best(2, torch.ones(1))}
    metadata = {"lr": np.float32(0.5), "epoch": np.int64(7), "loss": torch.tensor(0.25), "all": [np.float64(1.5)]}
    checkpoint.save(tmp_path / "m", MODELS["pairwise"](), state=state, metadata=metadata)
    found = checkpoint.load(tmp_path / "m")
    assert found.state == {"best": 0.5, "step": 3, 1: [True, 2], "named": (2, torch.ones(1))}
    assert type(found.state["step"]) is int
    assert type(found.state["named"]) is tuple
    assert found.metadata == {"lr": 0.5, "epoch": 7, "loss": 0.25, "all": [1.5]}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": torch.eye(2).to_sparse()}, r"^state\.0: expected a dense tensor, got .*sparse_coo"),
        ({"a": [torch.empty(2, device="meta")]}, r"^state\.0\.0: expected a tensor that holds values, got .* meta"),
    ],
    ids=["sparse", "meta"],
)
def test_tensors_that_no_file_holds_are_named(state: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        checkpoint.save(tmp_path / "m", MODELS["pairwise"](), state=state)
    with pytest.raises(TypeError, match=r"^graph: expected a MultiGraph or None, got str 'g'"):
        checkpoint.save(tmp_path / "m", MODELS["pairwise"](), graph="g")  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()


def test_a_graph_file_that_is_not_there_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    model = MODELS["dango"]()
    for file, words in ((tmp_path / "gone", "'.*gone' is not there"), (tmp_path, "is a folder")):
        with pytest.raises(FileNotFoundError, match=f"^graph_file: expected the file that graph.save wrote, but .*{words}"):
            checkpoint.save(tmp_path / "m", model, graph=GRAPH, graph_file=file)
    with pytest.raises(TypeError, match=r"^graph_file: expected a path, got int 3"):
        checkpoint.save(tmp_path / "m", model, graph_file=3)  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()


def test_the_graph_file_is_found_through_links(tmp_path: Path) -> None:
    """ ".." of a folder that is a link leads out of where it points to."""
    (tmp_path / "disk/runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk/runs")
    GRAPH.save(tmp_path / "graph.safetensors")
    checkpoint.save(tmp_path / "runs/m", MODELS["dango"](), graph=GRAPH, graph_file=tmp_path / "graph.safetensors")
    (tmp_path / "latest").symlink_to(tmp_path / "disk/runs/m")
    for path in (tmp_path / "runs/m", tmp_path / "disk/runs/m", tmp_path / "latest"):
        file = checkpoint.load(path).graph_file
        assert file is not None
        assert MultiGraph.load(file) == GRAPH


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        torch.nn.DataParallel,
        lambda model: torch.nn.DataParallel(torch.optim.swa_utils.AveragedModel(model)),
    ],
    ids=["compile", "data parallel", "averages in it"],
)
def test_what_pytorch_wraps_around_a_model_is_taken_off(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = MODELS["pairwise"]().eval()
    checkpoint.save(tmp_path / "plain", model)
    checkpoint.save(tmp_path / "m", wrap(model))
    found = checkpoint.load(tmp_path / "m")
    assert type(found.model) is type(model)
    assert found.digest == checkpoint.load(tmp_path / "plain").digest


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_could_not_be_made_again_is_not_saved(name: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    pruned, grown, cut = (MODELS[name]() for _ in range(3))
    linear = next(x for x in pruned.modules() if isinstance(x, nn.Linear))
    prune.random_unstructured(linear, "weight", 0.5)
    grown.add_module("extra", nn.Linear(2, 2))
    next(x for x in cut.modules() if isinstance(x, nn.Linear)).weight = nn.Parameter(torch.ones(1, 1))
    for model, words in (
        (pruned, "weight_mask, .*weight_orig; without"),
        (grown, "own extra.bias, extra.weight; without its own none"),
        (cut, "weight; without its own"),
    ):
        with pytest.raises(ValueError, match=f"model: expected the weights that a .* has, .*{words}"):
            checkpoint.save(file, model)
        assert not file.exists()
    prune.remove(linear, "weight")
    checkpoint.save(file, pruned)
    assert checkpoint.load(file).digest == checkpoint.digest(pruned)


def test_files_of_torch_save_are_told(tmp_path: Path) -> None:
    torch.save(MODELS["dango"]().state_dict(), tmp_path / "m.pt")
    for load in (checkpoint.load, MultiGraph.load):
        with pytest.raises(ValueError, match=r"m\.pt' is not a complete safetensors file .*may be one of `torch\.save`"):
            load(tmp_path / "m.pt")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = MODELS["pairwise"]()
    with pytest.raises(TypeError, match=r"features: expected a tensor, got list \[\[1\.0\]\]"):
        checkpoint.save(tmp_path / "m", model, features=[[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"metadata: expected a dict, got list \[1\]"):
        checkpoint.save(tmp_path / "m", model, metadata=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model\..*: expected a tensor that holds values, got one on device meta"):
        checkpoint.save(tmp_path / "m", MODELS["pairwise"]().to("meta"))
    assert not (tmp_path / "m").exists()
    with pytest.raises(ValueError, match="graph: 6 genes, but genes has 5 names"):
        checkpoint.save(tmp_path / "m", model, genes=NAMES[:5], graph=GRAPH)
    named = MultiGraph.from_edge_index(EDGES, N, names=NAMES)
    with pytest.raises(ValueError, match="genes, graph: expected the same genes in the same order, got 'Y5' in the genes and"):
        checkpoint.save(tmp_path / "m", model, genes=NAMES[::-1], graph=named)
    with pytest.raises(ValueError, match="features: 4 genes, but genes has 6 names"):
        checkpoint.save(tmp_path / "m", model, genes=NAMES, features=torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"state.1: expected tensors and plain values, got object"):
        checkpoint.save(tmp_path / "m", model, state={"a": 1, "b": object()})
    with pytest.raises(TypeError, match="values that JSON can hold"):
        checkpoint.save(tmp_path / "m", model, metadata={"a": object()})
    with pytest.raises(ValueError, match="model: expected a module, got str 'x'"):
        checkpoint.save(tmp_path / "m", "x")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m"
    checkpoint.save(file, MODELS["pairwise"](), genes=NAMES)
    whole = file.read_bytes()
    where = re.escape(repr(str(file)))
    for cut in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"path: {where} is not a complete safetensors file"):
            checkpoint.load(file)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"path: {where} is damaged"):
        checkpoint.load(file)
    file.write_bytes(whole.replace(b"Y3", b"Y9"))
    with pytest.raises(ValueError, match=f"path: {where} is damaged"):
        checkpoint.load(file)
    GRAPH.save(file)
    with pytest.raises(ValueError, match=f"path: {where} is no checkpoint: expected format 'cellattn.checkpoint/1', got"):
        checkpoint.load(file)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none")


def test_nothing_in_a_file_is_code(tmp_path: Path) -> None:
    """The header is JSON, the rest numbers."""
    checkpoint.save(tmp_path / "m", MODELS["dango"](), genes=NAMES, state={"a": torch.zeros(2)})
    content = (tmp_path / "m").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["checkpoint"])["model"] == "Dango"
