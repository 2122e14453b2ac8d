"""The pages of the reference, an entry a public name: python docs/reference/make.py. A test holds them to what is public."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import cellattn
import cellattn.checkpoint
import cellattn.data
import cellattn.metrics
import cellattn.nn
import cellattn.reference
import cellattn.screen

GRAPHS = ("MultiGraph", "Comembership", "SubgraphBatch")
INTRODUCED = {
    "Ops": "Functions of tensors and graphs, on a CPU or a GPU, with gradients where inputs have them.",
    "Definitions": "Every op again, dense and plain: what tests hold its paths to. The source, folded, is the meaning.",
}


def public(module: ModuleType) -> list[str]:
    """What it exports; without a list, what it defines."""
    listed: list[str] | None = getattr(module, "__all__", None)
    names = (
        listed
        if listed is not None
        else [n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
    )
    return [name for name in names if not name.startswith("_") and hasattr(getattr(module, name), "__module__")]


def page(title: str, *parts: tuple[ModuleType, list[str]]) -> str:
    """Markdown for mkdocstrings; names by where they are defined, since an op and its module share one."""
    lines = [f"# {title}", *(("", INTRODUCED[title]) if title in INTRODUCED else ())]
    for module, names in parts:
        for name in names:
            lines += ["", f"::: {getattr(module, name).__module__}.{name}"]
            if module is cellattn.reference:
                lines += ["    options:", "      show_source: true"]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Every page by its file."""
    ops = [name for name in public(cellattn) if name not in GRAPHS]
    whole = {
        "data": ("Data", [cellattn.data]),
        "definitions": ("Definitions", [cellattn.reference]),
        "metrics": ("Metrics", [cellattn.metrics]),
        "models": ("Models", [cellattn.nn]),
        "screens": ("Screens and checkpoints", [cellattn.screen, cellattn.checkpoint]),
    }
    return {
        "ops.md": page("Ops", (cellattn, ops)),
        "graphs.md": page("Graphs", (cellattn, list(GRAPHS))),
        **{f"{file}.md": page(title, *((m, public(m)) for m in modules)) for file, (title, modules) in whole.items()},
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for file, text in pages().items():
        (HERE / file).write_text(text)
