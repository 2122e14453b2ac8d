"""The compiled extension: what it may ask of Python and torch, and that it serves this machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import cellattn._C
from cellattn import _extension

OLDEST_TORCH = (2, 11)

OPERATORS = (
    "are_sets",
    "attention_rows",
    "attention_rows_backward",
    "bce_map",
    "bce_map_backward",
    "bit_spmm",
    "edge_rows",
    "edge_rows_backward",
    "edge_words",
    "induced_sizes",
    "induced_write",
    "is_ordinary",
    "khop_words",
    "masked_degree",
    "masked_spmm",
    "masked_sddmm",
    "pack_words",
    "relational_degree",
    "relational_spmm",
    "screen_cross_attention",
    "screen_mlp",
    "screen_readout",
    "set_words",
    "subgraph_rows",
    "unpack_words",
)


def test_one_file_serves_every_supported_torch_and_python():
    """Only symbols of LibTorch's stable ABI, since 2.11, and of Python's limited API: judged by torch-abi-audit."""
    command = [str(Path(sys.executable).with_name("torch-abi-audit")), "--json", "--check", "both", str(cellattn._C.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = json.dumps(json.loads(done.stdout)).lower()
    assert "2.11" in text
    assert "abi3" in text


def test_every_operator_runs_on_the_cpu():
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cellattn::{name}", "CPU"), name


def test_importing_loads_no_compiler():
    """Dynamo takes ten times as long to load as all of the library; PyTorch loads it when something is compiled."""
    code = "import sys, torch, cellattn.nn; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_extension_of_other_sources_says_so():
    """As after a change of branch: the file is there, and lacks an operator that the ops were written for."""
    with pytest.raises(ImportError, match="has no operator cellattn::of_tomorrow: it was built from other sources; build it"):
        _extension.fake("of_tomorrow")
    takes = len(torch._C._get_schema("cellattn::khop_words", "").arguments)
    message = (
        rf"has an operator cellattn::khop_words of {takes} arguments, expected 1: it was built from other sources; build it"
    )
    with pytest.raises(ImportError, match=message):

        @_extension.fake("khop_words")
        def _(x: torch.Tensor) -> torch.Tensor:
            return x


def test_no_macro_of_a_later_torch_is_used():
    """Today's headers define some for older targets too, in an #else, so that only a build against the oldest torch fails."""
    later = set()
    for header in Path(include_paths()[0], "torch/csrc/stable").rglob("*.h"):
        conditions: list[bool] = []  # around this line, innermost last: whether one asks for more than the oldest torch
        for line in header.read_text().splitlines():
            if re.match(r"\s*#\s*if", line):
                version = re.search(r"TORCH_FEATURE_VERSION\s*>=\s*TORCH_VERSION_(\d+)_(\d+)", line)
                conditions.append(version is not None and (int(version[1]), int(version[2])) > OLDEST_TORCH)
            elif re.match(r"\s*#\s*endif", line):
                conditions.pop()
            elif any(conditions) and (macro := re.match(r"\s*#\s*define\s+(\w+)", line)):
                later.add(macro[1])
    assert later or tuple(map(int, torch.__version__.split(".")[:2])) <= OLDEST_TORCH
    sources = "\n".join(path.read_text() for path in (Path(__file__).parents[1] / "csrc").rglob("*.[ch]*"))
    assert not [macro for macro in later if re.search(rf"\b{macro}\b", sources)]
