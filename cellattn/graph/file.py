"""A graph as one safetensors file, and back."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .._check import require
from .._file import file_path, write_atomic
from ..genes import GeneList

_FORMAT, _FORMAT_WITH_NAMES = "cellattn.MultiGraph/1", "cellattn.MultiGraph/2"


def write(
    path: str | os.PathLike[str], relations: tuple[str, ...], names: GeneList | None, arrays: Mapping[str, Tensor]
) -> None:
    """See `MultiGraph.save`."""
    from safetensors.torch import save

    path = file_path(path)
    tensors = {name: x.cpu().contiguous() for name, x in arrays.items()}
    format, texts = _FORMAT, {"relations": json.dumps(list(relations))}
    if names is not None:
        format, texts["names"] = _FORMAT_WITH_NAMES, json.dumps([names.names, names.aliases])
    metadata = {"format": format, **texts, "crc32": _checksum(texts, tensors)}
    write_atomic(path, save(tensors, metadata))


def read(path: str | os.PathLike[str]) -> tuple[tuple[Any, ...], GeneList | None, dict[str, Tensor]]:
    """What `write` was given, as far as the file tells: its checksum fits, and nothing else is checked.

    Raises:
        ValueError: no whole safetensors file, another format, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = file_path(path)
    content = path.read_bytes()  # not mapped: another program may rewrite the file at any moment
    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: of a dtype that torch does not have
        raise ValueError(f"path: {str(path)!r} is not a complete safetensors file ({error})") from error
    # behind its length, the header that `load` found whole
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    with of_file(path):
        fields = _texts_of(metadata.get("format"))
        crc, texts = metadata["crc32"], {name: metadata[name] for name in fields}
        require(crc == _checksum(texts, tensors), "its checksum does not fit, it is damaged")
        genes = None
        if "names" in texts:
            names, aliases = json.loads(texts["names"])
            genes = GeneList(names, aliases=aliases)
        return tuple(json.loads(texts["relations"])), genes, tensors


@contextmanager
def of_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of which file a fault is."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {str(path)!r} holds no valid MultiGraph: {error}") from error


def _texts_of(format: Any) -> tuple[str, ...]:
    """The names of the texts in a file of this format."""
    require(format in (_FORMAT, _FORMAT_WITH_NAMES), f"expected format {_FORMAT!r} or {_FORMAT_WITH_NAMES!r}, got {format!r}")
    return ("relations",) if format == _FORMAT else ("relations", "names")


def _checksum(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of the names and the arrays, so that a damaged weight does not pass for another weight."""
    crc = zlib.crc32("".join(texts.values()).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy().data, crc)
    return f"{crc:08x}"
