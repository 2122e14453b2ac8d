"""What the site needs beyond its pages.

Pictures of the benchmarks are named where they lie in the repository, which a site does not hold; a mean and its deviation stay
in one line of a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
THERE, HERE = "../benchmarks/results/", "results/"


def on_files(files: Files, config: Any) -> Files:
    """Add every picture of every device, as if it lay in docs/results."""
    for path in sorted(RESULTS.rglob("*.png")):
        files.append(File.generated(config, HERE + path.relative_to(RESULTS).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let a page's pictures be the site's (pages in folders of docs/ show none), and break no line at ±."""
    return markdown.replace(f"]({THERE}", f"]({HERE}").replace(" ± ", "\u00a0±\u00a0")
