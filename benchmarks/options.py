"""Options of the benchmarks' command lines: what cannot be is one line, said before anything is begun."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from cellattn._check import device_of
from cellattn._file import out_folder
from cellattn.data.synthetic import MIN_GENES


def parser(door: str, doc: str | None, *, epilog: str | None = None) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.<door>`, which the help names as it is called; `doc` and `epilog` stay as they are written."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{door}", description=doc, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def genes(text: str) -> int:
    """The size of a synthetic cell."""
    return _whole(text, MIN_GENES)


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"expected at least {least}, got {number}")
    return number


def positive(text: str) -> float:
    """A finite number above 0, of seconds or GB."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return number


def device(text: str) -> str:
    """A device that is there."""
    try:
        device_of("device", text, present=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def backend(text: str) -> str:
    """A backend of torch.compile."""
    from torch._dynamo import list_backends  # slow to import

    if text not in list_backends(exclude_tags=()):
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(list_backends())}, got {text!r}")
    return text


def folder(text: str) -> Path:
    """A folder that is there."""
    path = Path(text)
    if not text.strip() or not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}, which is none")
    return path


def results(text: str) -> Path:
    """A folder for results that is there or can be made: whoever first writes to it makes it."""
    path = out_folder(text)
    made: list[Path] = []
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    finally:
        for folder in made:  # another option may be wrong, and nothing is left behind then
            with contextlib.suppress(OSError):
                folder.rmdir()
    return path


@contextlib.contextmanager
def told(*more: type[Exception]) -> Iterator[None]:
    """What is read and checked before the work: an error of a value or a file, or of these kinds, ends the program in one line,
    exit status 1."""
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, argparse.ArgumentTypeError, *more)
    try:
        yield
    except kinds as error:
        sys.exit(f"error: {error}")
