"""Files that appear whole or not at all."""

from __future__ import annotations

import argparse
import errno
import io
import os
import stat
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from ._check import describe, require


def write_atomic(path: str | os.PathLike[str], content: bytes, *, keep: bool = False) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part.

    A link is followed, and stays one; a file that is there keeps its mode, and its owner where this process may give it;
    a new one has the mode that the umask leaves it. Nothing else is left behind. With `keep` a file that is there stays as it
    is, also one that another process writes at the same moment.

    Raises:
        OSError: the file may not be written, or is no regular one.
    """
    path = Path(os.path.realpath(path))  # the new content takes the place of what the link points to
    try:
        old: os.stat_result | None = path.lstat()
    except FileNotFoundError:
        old = None
    if old is not None and stat.S_ISLNK(old.st_mode):  # of a circle of links nothing else is left
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EINVAL, "expected a regular file, which can be replaced in one step", str(path))
    if old is not None and not os.access(path, os.W_OK):  # replacing it takes no more than write access to its folder
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if not path.parent.is_dir():  # said of the file, not of the part
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(path.parent))
    part = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}")  # no longer than a name may be
    try:
        # nobody else reads it before it has its mode
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if old is None else 0o600), "wb") as file:
            if old is not None:
                _keep_owner_and_mode(part, old)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _put_new(part, path) if keep else os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # a full disk names no file
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def _put_new(part: Path, path: Path) -> None:
    """Give a part its name unless there is such a file."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.replace(part, path)
    part.unlink(missing_ok=True)


def _keep_owner_and_mode(path: Path, old: os.stat_result) -> None:
    new = path.stat()
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with suppress(PermissionError):
            os.chown(path, old.st_uid, old.st_gid)
    path.chmod(stat.S_IMODE(old.st_mode))  # after the owner, whose change may clear bits


def _sync_folder(folder: Path) -> None:
    """Make the name of a file last, where a folder can be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def not_whole(path: Path, content: bytes, error: Exception) -> ValueError:
    """What to say of a file that is none of safetensors'."""
    hint = "; it may be one of `torch.save`, which `torch.load` reads" if content.startswith(b"PK\x03\x04") else ""
    return ValueError(f"path: {str(path)!r} is not a complete safetensors file ({error}){hint}")


def out_folder(text: str) -> Path:
    """A folder of a command line. Nothing, as of a variable of the shell that is not set, is not the one where one stands."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}")
    return Path(text)


def say_in_any_encoding() -> None:
    """Let a command print what the encoding of its output lacks, as escapes: names are of files, which are in UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def text_of_page(text: str) -> bytes:
    """A page in UTF-8; bytes of a path that are none are escapes."""
    return text.encode(errors="backslashreplace")


def file_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a path, got {describe(path)}")
    path = Path(path)
    require(not path.is_dir(), f"path: {str(path)!r} is a folder, expected a file")
    return path
