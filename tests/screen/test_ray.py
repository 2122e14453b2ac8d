"""A Ray cluster of two nodes, one of which is killed in the middle: the units are those of one process, bit for bit."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from cellattn.screen import screen, status

from .stubs import Additive, N

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

OPTIONS: dict[str, Any] = {"names": [f"Y{i}" for i in range(N)], "order": 3, "keep": "all", "unit": 100, "progress": False}
UNITS = 41  # of 4,060 triples


class Slow(Additive):
    """Takes its time, so that there is a middle."""

    def forward(self, seeds: Tensor, ptr: Tensor, types: Tensor) -> Tensor:
        time.sleep(0.1)
        return super().forward(seeds, ptr, types)


class Cluster:
    """Two nodes of one CPU each, beside a head that has none."""

    def __init__(self) -> None:
        self.cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        # actors find the modules of this checkout as this process does
        environment = {"env_vars": {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}}
        ray.init(address=self.cluster.address, runtime_env=environment, log_to_driver=False)

    def kill_node(self) -> None:
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    found = Cluster()
    yield found
    ray.shutdown()
    found.cluster.shutdown()


def assert_same_units(folder: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.glob("unit-*") if path.suffix != ".json")
    assert len(names) == 2 * UNITS
    assert sorted(path.name for path in folder.glob("unit-*") if path.suffix != ".json") == names
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_node_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    models: list[nn.Module] = [Slow(0), Slow(1)]
    screen(models, out=tmp_path / "local", num_threads=1, **OPTIONS)
    done_when_killed: list[int] = []

    def kill() -> None:
        while len(list((tmp_path / "ray").glob("unit-*.json"))) < 8:
            time.sleep(0.01)
        done_when_killed.append(len(list((tmp_path / "ray").glob("unit-*.json"))))
        cluster.kill_node()

    killer = threading.Thread(target=kill)
    killer.start()
    found = screen(models, out=tmp_path / "ray", engine="ray", **OPTIONS)
    killer.join()
    assert done_when_killed[0] < UNITS - 2
    assert found.complete
    assert_same_units(tmp_path / "ray", tmp_path / "local")


def test_goes_on_with_what_a_process_began(cluster: Cluster, tmp_path: Path) -> None:
    models = [Additive(0), Additive(1)]
    screen(models, out=tmp_path / "local", **OPTIONS)
    screen(models, out=tmp_path / "ray", shard="0/3", **OPTIONS)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ray").glob("unit-*")}
    assert screen(models, out=tmp_path / "ray", engine="ray", **OPTIONS).complete
    assert {name: (tmp_path / "ray" / name).stat().st_mtime_ns for name in before} == before
    assert_same_units(tmp_path / "ray", tmp_path / "local")


def test_an_error_of_an_actor_is_the_error(cluster: Cluster, tmp_path: Path) -> None:
    model = Additive(0)
    model.effect.data[N - 1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"Additive predicts inf for \{Y0, Y1, Y29\}"):
        screen(model, out=tmp_path / "s", engine="ray", **OPTIONS)
    found = status(tmp_path / "s")
    assert not found.damaged
    assert 0 < found.done < UNITS


def test_no_room(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine: the Ray cluster has room for no actor with"):
        screen(Additive(0), out=tmp_path / "s", engine="ray", num_threads=8, **OPTIONS)


def test_ray_is_found_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"engine 'ray' needs Ray: pip install 'cellattn\[ray\]'"):
        screen(Additive(0), out=tmp_path / "s", engine="ray", **OPTIONS)
