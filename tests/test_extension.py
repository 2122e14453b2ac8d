"""The compiled extension: what it may ask of Python and torch, and that it serves this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cellattn._C
from cellattn import _extension

OPERATORS = (
    "bce_map",
    "bce_map_backward",
    "bit_spmm",
    "edge_words",
    "induced_sizes",
    "induced_write",
    "khop_words",
    "masked_degree",
    "masked_spmm",
    "masked_sddmm",
    "pack_words",
    "relational_degree",
    "relational_spmm",
    "set_words",
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


def test_an_extension_of_other_sources_says_so():
    """As after a change of branch: the file is there, and lacks an operator that the ops were written for."""
    with pytest.raises(ImportError, match="has no operator cellattn::of_tomorrow: it was built from other sources; build it"):
        _extension.fake("of_tomorrow")
