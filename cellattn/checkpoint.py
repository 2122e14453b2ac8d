"""Trained models on disk: weights, what makes the model again, and the genes and the graph that they belong to.

One safetensors file, without a line of code in it. Its tensors are "model.*", the model's state; "features", if its genes
have any; and "state.*", those of whatever else was given to be kept, such as an optimizer's. All else is JSON in its metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._check import describe, require, require_tensor, unboxed
from ._file import file_path, not_whole, write_atomic
from ._wrapped import require_values, unwrapped
from .genes import GeneList, require_same_genes
from .graph import MultiGraph
from .nn import CellTransformer, Dango, PairwiseInteraction, WildtypeDifference

_FORMAT = "cellattn.checkpoint/1"
MODELS: dict[str, type[nn.Module]] = {
    model.__name__: model for model in (CellTransformer, Dango, PairwiseInteraction, WildtypeDifference)
}
"""The models that a file is enough to make again, by name."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        model: in evaluation mode, on the CPU, in the dtype that it was saved in.
        genes: names of the genes in the order of their indices; None if the file was written without.
        features: [N, F], the features that the model is called with; None if it has none.
        graph_digest: of the graph that the model belongs to; None if the file was written without.
        graph_file: where that graph was written; None if it was not said. The file may have gone since.
        digest: of the model, its features and genes; what was given as `metadata` and `state` does not change it.
        metadata: what the writer had to say, plain values.
        state: what was to be kept beside the model; None if nothing.
    """

    model: nn.Module
    genes: GeneList | None
    features: Tensor | None
    graph_digest: str | None
    graph_file: Path | None
    digest: str
    metadata: dict[str, Any]
    state: Any


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    genes: GeneList | Sequence[str] | None = None,
    graph: MultiGraph | None = None,
    graph_file: str | os.PathLike[str] | None = None,
    features: Tensor | None = None,
    metadata: Mapping[str, Any] | None = None,
    state: Any = None,
) -> None:
    """Write a model to one safetensors file, which appears whole or not at all.

    Args:
        path: the file.
        model: any module; what `torch.compile`, data-parallel training or `AveragedModel` wrap around one is taken off, and is
            not kept. `load` makes those of `cellattn.nn` (`MODELS`) again by itself; for others it has to be given one.
        genes: the names of the genes; those of the graph, where it has names, are the default.
        graph: the graph that the model is called with. Its digest is written, so that another one is noticed.
        graph_file: the file that `graph.save` wrote, which has to be there, to be found from this one; stored relative to it.
        features: [N, F], the features that the model is called with.
        metadata: plain values (of JSON) to go with it.
        state: tensors and plain values, in dicts, lists and tuples, that `load` gives back equal: of an optimizer, for one.

    Raises:
        FileNotFoundError: there is no `graph_file`.
        ValueError: names that do not fit the graph, or the features; numbers of genes that differ; a model of `MODELS` whose
            weights are not those that its class makes (pruned, parametrized, with modules added), so that `load` would fail;
            a tensor without values, or one that is not dense. TypeError: a value that the file cannot hold.
    """
    from safetensors.torch import save as to_bytes

    path = file_path(path)
    require(isinstance(model, nn.Module), f"model: expected a module, got {describe(model)}")
    model, _ = unwrapped(model)
    require_values(model)
    _require_own_weights(model)
    if features is not None:
        require_tensor("features", features, ndim=2)
    if graph_file is not None:
        _require_file("graph_file", graph_file)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected a dict, got {describe(metadata)}")
    if graph is not None and not isinstance(graph, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph or None, got {describe(graph)}")
    genes = genes if genes is None or isinstance(genes, GeneList) else GeneList(genes)
    named = None if graph is None else graph.names
    if genes is not None and named is not None:
        require_same_genes(genes, named, what=("genes", "graph"))
    genes = named if genes is None else genes
    for name, size in (("graph", graph and graph.num_nodes), ("features", None if features is None else len(features))):
        if genes is not None and size is not None:
            require(size == len(genes), f"{name}: {size} genes, but genes has {len(genes)} names")
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if features is not None:
        tensors["features"] = features
    kept = _flatten(state, "state", tensors)
    for name, value in tensors.items():
        require(not value.is_meta, f"{name}: expected a tensor that holds values, got one on device meta")
        if value.layout != torch.strided or value.is_nested or value.is_quantized:
            raise ValueError(f"{name}: expected a dense tensor, got a {describe(value)}, {value.layout}")
    header: dict[str, Any] = {
        "model": _class_name(model),
        "config": _config_of(model),
        "genes": None if genes is None else {"names": list(genes), "aliases": genes.aliases},
        "graph_digest": None if graph is None else graph.digest(),
        "graph_file": None if graph_file is None else _relative(graph_file, path),
        "digest": digest(model, features=features, genes=genes),
        "metadata": dict(metadata or {}),
        "state": kept,
    }
    try:
        text = json.dumps(header, default=_number)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata, or an argument of the model: expected values that JSON can hold ({error})") from error
    # copies: two names of one tensor are two tensors in a file
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_atomic(path, to_bytes(tensors, {"format": _FORMAT, "checkpoint": text, "crc32": _checksum(text, tensors)}))


def _number(value: Any) -> Any:
    """What JSON does not know: NumPy's and PyTorch's numbers."""
    number = unboxed(value)
    if not isinstance(number, (int, float)):
        raise TypeError(describe(value))
    return number


def _require_file(name: str, path: Any) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {describe(path)}")
    if not Path(path).is_file():
        found = "is a folder" if Path(path).is_dir() else "is not there"
        raise FileNotFoundError(f"{name}: expected the file that graph.save wrote, but {str(path)!r} {found}")


def _relative(file: str | os.PathLike[str], path: Path) -> str:
    """A file as it is found from the folder of another, where folders may be links: ".." goes where the system takes it."""
    file = Path(file)
    folders = (os.path.realpath(folder) for folder in (file.parent, Path(os.path.realpath(path)).parent))
    return (Path(os.path.relpath(*folders)) / file.name).as_posix()


def load(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> Checkpoint:
    """Read what `save` wrote.

    Args:
        path: the file.
        model: the module that takes the weights, where it is not one of `MODELS`; the file says which class it was.

    Raises:
        FileNotFoundError: there is no such file. ValueError: the file is damaged, none of these or of another model; the
            message names the path.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    path = file_path(path)
    content = path.read_bytes()  # not mapped: another program may rewrite the file at any moment
    try:
        tensors = from_bytes(content)
    except (SafetensorError, KeyError) as error:
        raise not_whole(path, content, error) from error
    written = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    found = written.get("format")
    require(found == _FORMAT, f"path: {str(path)!r} is no checkpoint: expected format {_FORMAT!r}, got {found!r}")
    sound = written.get("crc32") == _checksum(written.get("checkpoint", ""), tensors)
    require(sound, f"path: {str(path)!r} is damaged: its checksum does not fit")
    header = json.loads(written["checkpoint"])
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    model = _take(path, header, weights, model)
    genes = None if header["genes"] is None else GeneList(header["genes"]["names"], aliases=header["genes"]["aliases"])
    features = tensors.get("features")
    folder = (Path(os.path.realpath(path)) if path.is_symlink() else path).parent
    return Checkpoint(
        model=model.eval(),
        genes=genes,
        features=features,
        graph_digest=header["graph_digest"],
        graph_file=None if header["graph_file"] is None else folder / header["graph_file"],
        digest=header["digest"],
        metadata=header["metadata"],
        state=_restore(header["state"], tensors),
    )


def digest(model: nn.Module, *, features: Tensor | None = None, genes: GeneList | None = None) -> str:
    """SHA-256, in hex, of all that a model is (class, arguments, state), of its features and gene names; on whatever device."""
    named = {f"model.{name}": value for name, value in model.state_dict().items()}
    if features is not None:
        named["features"] = features
    about = [_class_name(model), _config_of(model), None if genes is None else genes.digest()]
    sha = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(named.items()):
        sha.update(f"\0{name} {value.dtype} {list(value.shape)}\0".encode())
        sha.update(_bytes(value))
    return sha.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    """What a tensor holds, in its order; numpy has no bfloat16, but every dtype is bytes."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


# ------------------------------------------------------------------------------------------------------- models


def _require_own_weights(model: nn.Module) -> None:
    """Find out now what `load` could not take: weights by other names than an equal model has, or of other shapes."""
    config = _config_of(model)
    if config is None:
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        equal = type(model)(**config)
    want, got = ({(name, *value.shape) for name, value in x.state_dict().items()} for x in (equal, model))
    if want != got:
        more, fewer = (", ".join(sorted({str(name) for name, *_ in x})) or "none" for x in (got - want, want - got))
        raise ValueError(
            f"model: expected the weights that a {_class_name(model)} of its arguments has, so that it can be made again; "
            f"got of its own {more}; without its own {fewer}; save a plain copy, or the `state_dict` by `torch.save`"
        )


def _class_name(model: nn.Module) -> str:
    """The name in `MODELS`, or where another class stands."""
    kind = type(model)
    return kind.__name__ if MODELS.get(kind.__name__) is kind else f"{kind.__module__}:{kind.__qualname__}"


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    """The arguments that make an equal model; None where that is not known."""
    if type(model) not in MODELS.values():
        return None
    config = dict(vars(model)["config"])
    tokens = model.get_submodule("tokens")
    return config | {"num_genes": tokens.num_genes}  # genes may have been added since


def _take(path: Path, header: dict[str, Any], weights: dict[str, Tensor], model: nn.Module | None) -> nn.Module:
    """The model with its weights."""
    name = header["model"]
    made = model is None
    if model is None:
        if name not in MODELS:
            raise ValueError(
                f"path: {str(path)!r} holds a {name}, which is not one of {', '.join(MODELS)}: give the module as model="
            )
        with torch.random.fork_rng(devices=[]):
            model = MODELS[name](**header["config"])
    elif _class_name(model) != name:
        raise ValueError(f"path: {str(path)!r} holds a {name}, but model is a {_class_name(model)}")
    try:
        model.load_state_dict(weights, assign=made)  # in the dtype of the file; a user's model keeps its own
    except RuntimeError as error:
        raise ValueError(f"path: {str(path)!r} holds other weights than the {name} has: {error}") from error
    return model


# ------------------------------------------------------------------------------------------------------- other state


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a tree whose tensors are put aside; what JSON would change (tuples, keys that are no strings) is written out."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        parts = [
            [_plain(key, name), _flatten(part, f"{name}.{position}", tensors)]
            for position, (key, part) in enumerate(value.items())
        ]
        return {"dict": parts}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"  # named ones too
        if all(isinstance(part, int) for part in value):  # the thousands of numbers of a generator's state
            return {kind: list(value)}
        return {kind: [_flatten(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]}
    return _plain(value, name)


def _plain(value: Any, name: str) -> Any:
    value = unboxed(value)
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}  # JSON has neither infinities nor NaN
    raise TypeError(f"{name}: expected tensors and plain values, got {describe(value)}")


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {_restore(key, tensors): _restore(part, tensors) for key, part in content}
    parts = [_restore(part, tensors) for part in content]
    return tuple(parts) if kind == "tuple" else parts
