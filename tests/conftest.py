from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from cellattn import MultiGraph

ROOT = Path(__file__).parents[1]

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # read when torch is imported, which nothing has done yet
    # Workers share the cores. Two threads at least: on one, loops that several share would prove nothing. They wait asleep.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, (os.cpu_count() or 1) // int(workers))))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # inductor would take what it compiled for other vectors from its cache
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"inductor-{os.getuid()}-{capability}")))

# A slow or busy machine is no fault; and the fixture `isa` sets one variable for all examples of a test. A commit is tested
# with the same examples everywhere; --hypothesis-profile=search draws others each time.
for name, same in (("cellattn", True), ("search", False)):
    settings.register_profile(
        name,
        deadline=None,
        derandomize=same,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
settings.load_profile("cellattn")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes name no test: those of archives hold the time, and workers that collect a second apart would not agree."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist the tests of a file share a worker, for its fixtures, where nothing else groups them."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def exhaustive(*cases: Any) -> list[Any]:
    """Cases for parametrize that add to what the others prove: not in `make test`."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive) for case in cases]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose much to waiting for them on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def decoded_programs() -> Iterator[None]:
    """Go with the tests that ran them: millions of objects, through which every collection of garbage would walk."""
    yield
    if (device := sys.modules.get("tests.ptx.device")) is not None:
        device.program_of.cache_clear()


@pytest.fixture(scope="session")
def yeast_dir() -> Path:
    """The folder of real yeast tables: CELLATTN_DATA, or `../shared/data/yeast` beside the repository."""
    folder = Path(os.environ.get("CELLATTN_DATA", ROOT.parent / "shared" / "data" / "yeast"))
    if not (folder / "genes.tsv.gz").is_file():
        pytest.skip(f"no yeast tables in {folder} (set CELLATTN_DATA)")
    return folder


@pytest.fixture(scope="session")
def yeast_graph(yeast_dir: Path) -> MultiGraph:
    """The graph of the real tables."""
    from cellattn.data import load_yeast

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown gene names are reported where the tables are the subject
        return load_yeast(yeast_dir)[1]
