"""A graph as one safetensors file, and back."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._check import describe, require, require_tensor
from .._file import file_path, not_whole, write_atomic
from ..genes import GeneList
from .comembership import check_column_weight
from .node_types import NodeTypes

_TEXTS = {  # of each format, which is the oldest that can hold a graph
    "cellattn.MultiGraph/1": ("relations",),
    "cellattn.MultiGraph/2": ("relations", "names"),
    "cellattn.MultiGraph/3": ("relations", "names", "node_types", "joins"),
    "cellattn.MultiGraph/4": ("relations", "names", "node_types", "joins"),  # and, as an array, the weights of columns
}
_OWN = ("format", "relations", "names", "node_types", "joins", "crc32")  # texts of the file itself; others are notes


def write(
    path: str | os.PathLike[str],
    relations: tuple[str, ...],
    names: GeneList | None,
    types: NodeTypes,
    arrays: Mapping[str, Tensor],
    notes: Mapping[str, str],
) -> None:
    """See `MultiGraph.save`."""
    from safetensors.torch import save

    for name, note in notes.items():
        valid = isinstance(name, str) and isinstance(note, str) and name not in _OWN
        require(
            valid, lambda: f"notes: expected strings, under names other than {', '.join(_OWN)}, got {describe((name, note))}"
        )
    path = file_path(path)
    tensors = {name: x.cpu().contiguous() for name, x in arrays.items()}
    told: dict[str, Any] = {
        "relations": relations,
        "names": None if names is None else [names.names, names.aliases],
        "node_types": None if types.are_genes else list(zip(types.names, types.sizes, strict=True)),
        "joins": None if types.are_genes else types.joins,
    }
    needed = {name for name, value in told.items() if value is not None}
    fitting = [(format, fields) for format, fields in _TEXTS.items() if needed <= set(fields)]
    format, fields = fitting[-1 if "column_weight" in arrays else 0]
    texts = {name: json.dumps(told[name]) for name in fields} | dict(sorted(notes.items()))
    metadata = {"format": format, **texts, "crc32": _checksum(texts, tensors)}
    write_atomic(path, save(tensors, metadata))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Tensor | None]:
    """What `write` was given, as the arguments of `from_edge_index`, which checks the edges, and weights of columns, if any.

    Raises:
        ValueError: no whole safetensors file, another format, a damaged one, or arrays that are no graph.
    """
    metadata, tensors = _parts(path)
    with of_file(path):
        told = {name: json.loads(metadata[name]) for name in _OWN if name in metadata}
        genes = types = None
        if told.get("names") is not None:
            names, aliases = told["names"]
            genes = GeneList(names, aliases=aliases)
        if told.get("node_types") is not None:
            kinds, sizes = zip(*told["node_types"], strict=True)
            types = NodeTypes(kinds, sizes, tuple(map(tuple, told["joins"])))
        return _edges_of(tuple(told["relations"]), genes, types, **tensors)


def _edges_of(
    relations: tuple[Any, ...],
    names: GeneList | None,
    types: NodeTypes | None,
    *,
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    known: Tensor,
    column_weight: Tensor | None = None,
) -> tuple[dict[str, Any], Tensor | None]:
    """Stacked arrays, checked, as edges by relation: they enter by the same door as any others."""
    require_tensor("rowptr", rowptr, ndim=1, dtypes=(torch.int64,))
    require_tensor("col", col, ndim=1, dtypes=(torch.int32, torch.int64))
    require_tensor("weight", weight, ndim=1, dtypes=(torch.float32, torch.float64))
    require_tensor("known", known, ndim=2, dtypes=(torch.bool,))
    n = known.shape[1]
    require(len(set(relations)) == len(relations), f"relations: expected distinct names, got {list(relations)}")
    require(known.shape[0] == len(relations), f"known: expected {len(relations)} rows, got {known.shape[0]}")
    require(
        rowptr.numel() == len(relations) * n + 1,
        f"rowptr: expected {len(relations) * n + 1} entries, got {rowptr.numel()}",
    )
    require(bool((rowptr.diff() >= 0).all()) and int(rowptr[0]) == 0, "rowptr: expected to rise from 0")
    require(int(rowptr[-1]) == col.numel() == weight.numel(), "rowptr, col, weight: lengths differ")
    if column_weight is not None:
        require_tensor("column_weight", column_weight, ndim=2, dtypes=(torch.float64,))
        require(
            column_weight.shape == known.shape,
            f"column_weight: expected {list(known.shape)}, got {list(column_weight.shape)}",
        )
        check_column_weight(column_weight.view(-1), known.numel(), known.device)
    row = torch.arange(n, device=rowptr.device).repeat(len(relations)).repeat_interleave(rowptr.diff())
    offset = rowptr[::n].tolist()
    span = {name: slice(offset[r], offset[r + 1]) for r, name in enumerate(relations)}
    given = {
        "edge_index": {name: torch.stack([row[at], col[at].long()]) for name, at in span.items()},
        "num_nodes": n,
        "edge_weight": {name: weight[at] for name, at in span.items()},
        "known": dict(zip(relations, known, strict=True)),
        "names": names,
        "node_types": None if types is None else dict(zip(types.names, types.sizes, strict=True)),
        "joins": None if types is None else dict(zip(relations, types.joins, strict=True)),
    }
    return given, column_weight


def notes_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """The notes that `write` was given, of a file whose checksum fits. Raises ValueError as `read`."""
    return {name: text for name, text in _parts(path)[0].items() if name not in _OWN}


def _parts(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts and arrays of a file whose checksum fits."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = file_path(path)
    content = path.read_bytes()  # not mapped: another program may rewrite the file at any moment
    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: of a dtype that torch does not have
        raise not_whole(path, content, error) from error
    # behind its length, the header that `load` found whole
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    with of_file(path):
        fields = _texts_of(metadata.get("format"))
        crc = metadata["crc32"]
        texts = {name: metadata[name] for name in (*fields, *sorted(metadata.keys() - set(_OWN)))}
        require(crc == _checksum(texts, tensors), "its checksum does not fit, it is damaged")
        return texts, tensors


@contextmanager
def of_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of which file a fault is."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {str(path)!r} holds no valid MultiGraph: {error}") from error


def _texts_of(format: Any) -> tuple[str, ...]:
    """The names of the texts in a file of this format."""
    require(format in _TEXTS, f"expected format {' or '.join(map(repr, _TEXTS))}, got {format!r}")
    return _TEXTS[format]


def _checksum(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of the names and the arrays, so that a damaged weight does not pass for another weight."""
    crc = zlib.crc32("".join(texts.values()).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy().data, crc)
    return f"{crc:08x}"
