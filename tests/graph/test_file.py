"""Graphs are written whole or not at all, and read as they were, or refused."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cellattn import MultiGraph
from cellattn._file import write_atomic

from .samples import INDEX, N, named, weighted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = {"physical": torch.rand(6, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 0.1}
    known = {"empty": torch.arange(N) < 4}
    graph = MultiGraph.from_edge_index(INDEX, N, edge_weight=weight, known=known).extend(1)
    graph.save(tmp_path / "graph.safetensors")
    loaded = MultiGraph.load(str(tmp_path / "graph.safetensors"))
    assert loaded == graph
    assert loaded.weight("physical").dtype == dtype
    assert os.listdir(tmp_path) == ["graph.safetensors"]


def test_save_and_load_names_of_any_script(tmp_path: Path) -> None:
    graph = MultiGraph.from_edge_index({"méthode Δ/1": torch.tensor([[0], [1]]), " ": torch.tensor([[1], [1]])}, 2)
    graph.save(tmp_path / "g")
    assert MultiGraph.load(tmp_path / "g") == graph


def test_save_replaces_the_old_file(tmp_path: Path) -> None:
    weighted().save(tmp_path / "g")
    weighted().extend(3).save(tmp_path / "g")
    assert MultiGraph.load(tmp_path / "g").num_nodes == N + 3


def test_saved_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    weighted().save(tmp_path / "g")
    assert (tmp_path / "g").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    weighted().save(tmp_path / "g")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="no space left"):
            weighted().extend(1).save(tmp_path / "g")
    assert MultiGraph.load(tmp_path / "g") == weighted()
    assert os.listdir(tmp_path) == ["g"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444 | 0o200, 0o777], ids=oct)
def test_a_file_that_is_there_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    weighted().save(tmp_path / "g")
    (tmp_path / "g").chmod(mode)
    weighted().extend(1).save(tmp_path / "g")
    assert stat.S_IMODE((tmp_path / "g").stat().st_mode) == mode
    assert MultiGraph.load(tmp_path / "g").num_nodes == N + 1


def test_new_content_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while it is being written: the mode of a private file is on the part before the content is."""
    path, modes = tmp_path / "g", list[int]()
    write_atomic(path, b"old")
    path.chmod(0o600)
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(stat.S_IMODE(os.fstat(fd).st_mode)))
    write_atomic(path, b"new")
    assert modes[0] == 0o600
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'") as caught:
        write_atomic(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == ["f"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("links", [1, 3])
@pytest.mark.parametrize("there", [True, False], ids=["there", "dangling"])
def test_links_are_written_through(tmp_path: Path, links: int, there: bool) -> None:
    (tmp_path / "store").mkdir()
    real = tmp_path / "store" / "real"
    if there:
        weighted().save(real)
    names = [tmp_path / f"link{i}" for i in range(links)]
    for name, target in zip(names, ["store/real", *(name.name for name in names)], strict=False):
        name.symlink_to(target)
    weighted().extend(2).save(names[-1])
    assert all(name.is_symlink() for name in names)
    assert not real.is_symlink()
    assert MultiGraph.load(real) == MultiGraph.load(names[-1]) == weighted().extend(2)
    assert os.listdir(tmp_path / "store") == ["real"]


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ELOOP))):
        weighted().save(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert (tmp_path / "a").is_symlink()


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="regular file"):
        weighted().save(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_file_without_leave_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighted().save(tmp_path / "g")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(PermissionError, match="g'"):
        weighted().extend(1).save(tmp_path / "g")
    assert MultiGraph.load(tmp_path / "g") == weighted()


def test_the_longest_name_of_a_file(tmp_path: Path) -> None:
    for name in ("g" * 255, "Δ" * 127):
        weighted().save(tmp_path / name)
        assert MultiGraph.load(tmp_path / name) == weighted()


def test_a_file_cut_or_rewritten_while_it_is_loaded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read of the file once its content is taken: it may be emptied in place at any later moment."""
    path = tmp_path / "g"
    large = MultiGraph.from_edge_index({"a": torch.randint(5000, (2, 100_000))}, 5000)
    large.save(path)
    read = Path.read_bytes

    def read_and_cut(file: Path) -> bytes:
        content = read(file)
        os.truncate(file, 0)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_and_cut)
        assert MultiGraph.load(path) == large
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        MultiGraph.load(path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    weighted().save(tmp_path / "g")
    content = (tmp_path / "g").read_bytes()
    for length in range(len(content)):
        (tmp_path / "part").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"path: '.*part'"):
            MultiGraph.load(tmp_path / "part")


@pytest.mark.parametrize("with_names", [False, True], ids=["plain", "names"])
def test_every_flipped_bit_is_found(tmp_path: Path, with_names: bool) -> None:
    graph = named() if with_names else weighted()
    graph.save(tmp_path / "g")
    content = (tmp_path / "g").read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            loaded = MultiGraph.load(tmp_path / "damaged")
        except ValueError as error:
            assert "damaged'" in str(error)  # noqa: PT017 (a flip in the padding of the header does no harm)
        else:
            assert loaded == graph, f"byte {position}"


@pytest.mark.parametrize("content", [b"", b"YAL001C\tYAL002W\n" * 10, bytes(100)], ids=["empty", "text", "zeros"])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(ValueError, match=r"path: '.*foreign'"):
        MultiGraph.load(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "format"),
        ({"format": "other"}, "other"),
        ({"format": "cellattn.MultiGraph/1"}, "crc32"),
        ({"format": "cellattn.MultiGraph/1", "relations": '["r"]', "crc32": "00000000"}, "checksum"),
    ],
    ids=["none", "other-format", "no-checksum", "wrong-checksum"],
)
def test_safetensors_file_of_something_else(tmp_path: Path, metadata: dict[str, str] | None, words: str) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, tmp_path / "model", metadata)
    with pytest.raises(ValueError, match=rf"path: '.*model'.*{words}"):
        MultiGraph.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("relations", "change", "words"),
    [
        (("r", "r"), {}, "distinct"),
        (("r", "s"), {"rowptr": torch.tensor([0, 1, 1, 0, 1])}, "rise"),
        (("r", "s"), {"rowptr": torch.tensor([1, 1, 1, 1, 1])}, "rise"),
        (("r", "s"), {"rowptr": torch.tensor([0, 1, 1, 1])}, "rowptr: expected 5"),
        (("r", "s"), {"rowptr": torch.tensor([0, 1, 1, 1, 2])}, "lengths"),
        (("r", "s"), {"rowptr": torch.tensor([0.0, 1, 1, 1, 1])}, "rowptr"),
        (("r", "s"), {"col": torch.tensor([2], dtype=torch.int32)}, "holds 2"),
        (("r", "s"), {"col": torch.tensor([-1], dtype=torch.int32)}, "holds -1"),
        (("r", "s"), {"weight": torch.tensor([torch.nan])}, "holds nan"),
        (("r", "s"), {"weight": torch.tensor([1])}, "weight"),
        (("r", "s"), {"known": torch.ones(3, 2, dtype=torch.bool)}, "known: expected 2 rows"),
        (("r", "s"), {"known": torch.zeros(2, 2, dtype=torch.bool)}, "unknown"),
        (("r", 3), {}, "int 3"),
        (("r", "s"), {"extra": torch.ones(1)}, "extra"),
    ],
    ids=[
        "names-twice", "falling", "not-from-0", "short", "wrong-end", "float", "col-large", "col-negative", "weight-nan",
        "weight-int", "known-rows", "edge-unknown", "name-int", "extra",
    ],
)  # fmt: skip
def test_file_with_impossible_arrays(tmp_path: Path, relations: Any, change: dict[str, Tensor], words: str) -> None:
    import json
    import zlib

    from safetensors.torch import save_file

    arrays = {
        "rowptr": torch.tensor([0, 1, 1, 1, 1]),
        "col": torch.tensor([1], dtype=torch.int32),
        "weight": torch.ones(1),
        "known": torch.ones(2, 2, dtype=torch.bool),
        **change,
    }
    names = json.dumps(list(relations))
    crc = zlib.crc32(names.encode())
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].numpy().tobytes(), crc)
    metadata = {"format": "cellattn.MultiGraph/1", "relations": names, "crc32": f"{crc:08x}"}
    save_file(arrays, tmp_path / "g", metadata)
    with pytest.raises(ValueError, match=rf"path: '.*g' holds no valid MultiGraph.*{words}"):
        MultiGraph.load(tmp_path / "g")


def test_a_graph_without_names_has_the_file_that_it_had(tmp_path: Path) -> None:
    weighted().save(tmp_path / "g")
    assert b"cellattn.MultiGraph/1" in (tmp_path / "g").read_bytes()
    assert b"names" not in (tmp_path / "g").read_bytes()
