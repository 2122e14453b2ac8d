"""What all pictures of the benchmarks share."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks import figures


def test_a_picture_says_where_its_figures_were_measured(tmp_path: Path) -> None:
    figure = plt.figure()
    environment = {"device": "a machine (3 threads)", "torch": "9.8", "python": "3", "commit": "abc", "date": "2031-02-03"}
    figures.save(figure, tmp_path / "a.png", environment)
    assert figure.get_supxlabel() == "a machine (3 threads); torch 9.8; 2031-02-03"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
