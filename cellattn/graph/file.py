"""A graph as one safetensors file, and back."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .._check import describe, require
from .._file import file_path, write_atomic
from ..genes import GeneList

_FORMAT, _FORMAT_WITH_NAMES = "cellattn.MultiGraph/1", "cellattn.MultiGraph/2"
_OWN = ("format", "relations", "names", "crc32")  # texts of the file itself; others are notes


def write(
    path: str | os.PathLike[str],
    relations: tuple[str, ...],
    names: GeneList | None,
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
    format, texts = _FORMAT, {"relations": json.dumps(list(relations))}
    if names is not None:
        format, texts["names"] = _FORMAT_WITH_NAMES, json.dumps([names.names, names.aliases])
    texts |= dict(sorted(notes.items()))
    metadata = {"format": format, **texts, "crc32": _checksum(texts, tensors)}
    write_atomic(path, save(tensors, metadata))


def read(path: str | os.PathLike[str]) -> tuple[tuple[Any, ...], GeneList | None, dict[str, Tensor]]:
    """What `write` was given, as far as the file tells: its checksum fits, and nothing else is checked.

    Raises:
        ValueError: no whole safetensors file, another format, or a damaged one.
    """
    metadata, tensors = _parts(path)
    with of_file(path):
        genes = None
        if "names" in metadata:
            names, aliases = json.loads(metadata["names"])
            genes = GeneList(names, aliases=aliases)
        return tuple(json.loads(metadata["relations"])), genes, tensors


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
        raise ValueError(f"path: {str(path)!r} is not a complete safetensors file ({error})") from error
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
    require(format in (_FORMAT, _FORMAT_WITH_NAMES), f"expected format {_FORMAT!r} or {_FORMAT_WITH_NAMES!r}, got {format!r}")
    return ("relations",) if format == _FORMAT else ("relations", "names")


def _checksum(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of the names and the arrays, so that a damaged weight does not pass for another weight."""
    crc = zlib.crc32("".join(texts.values()).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy().data, crc)
    return f"{crc:08x}"
