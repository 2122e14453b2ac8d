"""Units: written whole or not at all, done once, found out when they are damaged; whatever stops the one who writes them."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from cellattn.genes import GeneList
from cellattn.screen import engines
from cellattn.screen import store as store_module
from cellattn.screen.job import Job
from cellattn.screen.keep import Keep
from cellattn.screen.members import members_of
from cellattn.screen.store import PLAN, ScreenError, Status, Store, duration, ranges, shard_of

from .stubs import Additive, Count, N, Pairs

ROSTER = torch.arange(0, N, 2)  # 15 genes: 105 pairs
NAMES = GeneList(f"Y{i}" for i in range(N))


def job_of(num_models: int = 1, keep: str = "all", order: int = 2) -> Job:
    options = {"phenotype": 0, "dtype": None, "device": "cpu", "num_threads": None}
    members = members_of([Additive(seed) for seed in range(num_models)])
    return Job(Pairs(ROSTER, order), members, NAMES, ROSTER, Keep(keep), Count, options)


def plan_of(job: Job, unit: int = 10) -> dict[str, Any]:
    return {"total": job.sets.total, "unit": unit, "sets": job.sets.describe(), "digests": {"models": ["abc"]}}


def work(store: Store, job: Job, numbers: Any = None) -> None:
    numbers = range(store.num_units) if numbers is None else numbers
    engines.compute("local", store, job, list(numbers), ["cpu"], lambda ranks: None)


def make(folder: Path, numbers: Any = None, **options: Any) -> Store:
    """A screen of 11 units, of which some are done."""
    job = job_of(**options)
    store = Store.open(folder, plan_of(job))
    work(store, job, numbers)
    return store


def content(folder: Path) -> dict[str, Any]:
    """What the files say, without what a clock says."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}
    for path in folder.glob("*.json"):
        found = json.loads(path.read_text())
        files[path.name] = {key: value for key, value in found.items() if key not in ("seconds", "finished", "crc32")}
    return files


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("expected") / "screen"
    make(folder)
    return content(folder)


# ------------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("num_models", [1, 3])
def test_rows_are_read_without_our_code(num_models: int, tmp_path: Path) -> None:
    make(tmp_path / "s", num_models=num_models)
    rows = pl.scan_parquet(tmp_path / "s" / "*.parquet").collect().sort("rank")
    pairs = Pairs(ROSTER)
    assert rows["rank"].to_list() == list(range(105))
    assert rows["gene1"].cast(pl.String).to_list() == [NAMES[gene] for gene in pairs.genes[:, 0].tolist()]
    assert rows["gene2"].cast(pl.String).to_list() == [NAMES[gene] for gene in pairs.genes[:, 1].tolist()]
    ptr, types = torch.arange(106) * 2, torch.ones(210, dtype=torch.int64)
    scores = torch.stack([Additive(seed)(pairs.genes.flatten(), ptr, types) for seed in range(num_models)]).double()
    found = {name: torch.tensor(rows[name].to_list()) for name in rows.columns[3:]}
    assert torch.equal(found["mean"], scores.mean(0).float())
    if num_models == 1:
        assert list(found) == ["mean", "sd"]
        assert found["sd"].eq(0).all()
    else:
        assert list(found) == ["mean", "sd", "min", "max"]
        assert torch.equal(found["sd"], scores.std(0).float())
        assert torch.equal(found["min"], scores.amin(0).float())
        assert torch.equal(found["max"], scores.amax(0).float())


def test_columns_as_another_reader_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(store_module, "ROW_GROUP", 4)
    store = make(tmp_path / "s", [3])
    file = parquet.ParquetFile(store.folder / "unit-00000003.parquet")
    schema = {field.name: str(field.type) for field in file.schema_arrow}
    assert schema["rank"] == "int64"
    assert schema["mean"] == schema["sd"] == "float"
    for gene in ("gene1", "gene2"):
        assert schema[gene].startswith("dictionary<values=")
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    assert len(groups) == 3
    assert [(g.column(0).statistics.min, g.column(0).statistics.max) for g in groups] == [(30, 33), (34, 37), (38, 39)]
    assert all(group.column(i).compression == "ZSTD" for group in groups for i in range(group.num_columns))
    assert all("RLE_DICTIONARY" in groups[0].column(i).encodings for i in (1, 2))


def test_a_unit_without_rows_is_a_unit(tmp_path: Path) -> None:
    store = make(tmp_path / "s", keep="above:1e9")
    assert store.status().complete
    assert pl.scan_parquet(store.folder / "*.parquet").collect().shape == (0, 5)


def test_manifest(tmp_path: Path) -> None:
    store = make(tmp_path / "s", [10], keep="above:1")
    manifest = store.manifest(10)
    assert manifest["ranks"] == [100, 105]
    assert manifest["sets"] == 5
    assert manifest["rows"] == len(store.rows(10)) < 5
    assert manifest["screen"] == store.digest
    assert manifest["digests"] == {"models": ["abc"]}
    assert set(manifest["versions"]) == {"cellattn", "torch"}
    assert store.tables(10)["by_gene"].sum() == 10


# ------------------------------------------------------------------------------------------------------- never twice


def test_only_what_is_missing_is_computed(tmp_path: Path, expected: dict[str, Any]) -> None:
    store = make(tmp_path / "s", [0, 4, 5])
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.glob("unit-*")}
    status = store.status()
    assert (status.done, status.missing, status.damaged) == (3, (1, 2, 3, 6, 7, 8, 9, 10), {})
    work(store, job_of())
    assert {name: (store.folder / name).stat().st_mtime_ns for name in before} == before
    assert store.status().complete
    assert content(store.folder) == expected


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _edit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("ending", ["parquet", "tables", "json"])
@pytest.mark.parametrize("harm", [_cut, _edit, _empty, Path.unlink], ids=["cut", "edited", "emptied", "gone"])
def test_damaged_units_are_found_and_computed_again(
    harm: Callable[[Path], Any], ending: str, tmp_path: Path, expected: dict[str, Any]
) -> None:
    store = make(tmp_path / "s")
    harm(store.folder / f"unit-00000004.{ending}")
    status = store.status()
    assert [*status.damaged, *status.missing] == [4]
    assert (4 in status.missing) == (ending == "json" and harm is Path.unlink)
    if ending != "json":
        assert f"unit-00000004.{ending}" in status.damaged[4]
    work(store, job_of())
    assert store.status().complete
    assert content(store.folder) == expected


def test_a_manifest_says_what_it_is_of(tmp_path: Path) -> None:
    """One copied from another unit, or another screen, does not make a unit."""
    store = make(tmp_path / "s")
    folder = store.folder
    (folder / "unit-00000001.json").write_bytes((folder / "unit-00000002.json").read_bytes())
    other = make(tmp_path / "other", order=3, numbers=[3])
    (folder / "unit-00000003.json").write_bytes((other.folder / "unit-00000003.json").read_bytes())
    assert store.status().damaged == {1: "its manifest is that of another unit", 3: "it belongs to another screen"}


def test_two_workers_on_the_same_units(tmp_path: Path, expected: dict[str, Any]) -> None:
    """Both compute everything, and neither sees what the other has done until it writes."""
    job = job_of()
    store = Store.open(tmp_path / "s", plan_of(job))
    together = threading.Barrier(2)

    def write_all() -> None:
        mine = job_of()
        for number in range(store.num_units):
            unit = store.unit(number)
            result = mine.compute(unit)
            together.wait()
            store.write(unit, result.rows, result.tables, sets=result.sets, seconds=1.0)

    threads = [threading.Thread(target=write_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.status().complete
    assert content(store.folder) == expected


@pytest.mark.parametrize("asked", [1, 3])
def test_a_unit_is_counted_on_the_threads_that_score_it(asked: int, tmp_path: Path) -> None:
    """Threads of what is done beside the scores would spin on the cores of processes that share the screen."""
    seen = set()

    class Looks(Count):
        def add(self, *columns: torch.Tensor) -> None:
            seen.add(torch.get_num_threads())
            super().add(*columns)

    before, job = torch.get_num_threads(), job_of()
    job.tables, job.options = Looks, {**job.options, "num_threads": asked}
    work(Store.open(tmp_path / "s", plan_of(job)), job)
    assert seen == {asked}
    assert torch.get_num_threads() == before


def test_threads_of_several_devices(tmp_path: Path, expected: dict[str, Any]) -> None:
    job = job_of()
    store = Store.open(tmp_path / "s", plan_of(job))
    told: list[int] = []
    engines.compute("local", store, job, list(range(store.num_units)), ["cpu", "cpu"], told.append)
    assert sum(told) == 105
    assert content(store.folder) == expected


def test_an_error_on_one_device_ends_all(tmp_path: Path) -> None:
    job = job_of()
    job.members = [replace(job.members[0], model=Additive(0).to(torch.float64))]
    job.members[0].model.get_parameter("effect").data[ROSTER[-1]] = float("inf")
    store = Store.open(tmp_path / "s", plan_of(job))
    with pytest.raises(FloatingPointError, match=r"Additive predicts -?(inf|nan) for \{Y"):
        engines.compute("local", store, job, list(range(store.num_units)), ["cpu", "cpu"], lambda ranks: None)
    assert not store.status().damaged


# ------------------------------------------------------------------------------------------------------- never lost


@pytest.mark.parametrize("writes", range(4), ids="write{}".format)
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_a_disk_that_is_full(
    reason: int, writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    """At each of the writes of a unit, half of the file is written: nothing of it stays, and what was whole still is."""
    store = make(tmp_path / "s", [0])
    real, left = os.fsync, writes

    def fsync(descriptor: int) -> None:
        nonlocal left
        if os.path.isfile(f"/proc/self/fd/{descriptor}"):
            left -= 1
            if left < 0:
                raise OSError(reason, os.strerror(reason))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=os.strerror(reason)):
            work(store, job_of())
    status = store.status()
    assert (status.done, status.damaged) == (1 + writes // 3, {})
    assert not [path.name for path in store.folder.iterdir() if path.name.startswith(".")]
    work(store, job_of())
    assert content(store.folder) == expected


def another_process(f: Callable[..., None], *args: Any) -> ForkServerProcess:
    """f(*args) in a process that has loaded everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=f, args=args)
    process.start()
    return process


def make_with_limited_files(folder: Path, told: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))
    try:
        make(folder)
    except OSError as error:
        told.send(error.errno)


def test_a_real_limit_on_files(tmp_path: Path) -> None:
    """The kernel itself refuses the bytes above a limit, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    another_process(make_with_limited_files, tmp_path / "s", theirs).join(300)
    assert ours.poll()
    assert ours.recv() == errno.EFBIG
    status = Store.read(tmp_path / "s").status()
    assert (status.done, status.damaged) == (0, {})
    assert not [path.name for path in (tmp_path / "s").iterdir() if path.name.startswith(".")]
    assert make(tmp_path / "s").status().complete


def make_slowly(folder: Path, told: Connection) -> None:
    """Writing takes longer than computing, so that kills meet writes."""
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.005)
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", slow)
        told.send("ready")
        make(folder)
        told.send("done")


def test_kill(tmp_path: Path, expected: dict[str, Any]) -> None:
    """kill -9 at any moment, again and again, until the screen is done: nothing is damaged, nothing done is done again."""
    folder = tmp_path / "s"
    kept: dict[int, int] = {}
    for delay in [0.05, 0.0, 0.03, 0.11, 0.07, 0.09, 0.15, 60.0]:
        ours, theirs = multiprocessing.Pipe()
        process = another_process(make_slowly, folder, theirs)
        assert ours.recv() == "ready"
        done = ours.poll(delay)
        process.kill()
        process.join()
        if not (folder / PLAN).exists():
            continue
        store = Store.read(folder)
        status = store.status()
        assert not status.damaged
        whole = [number for number in range(store.num_units) if number not in status.missing]
        times = {number: (folder / f"{store.unit(number).name}.json").stat().st_mtime_ns for number in whole}
        assert kept.items() <= times.items()
        kept = times
        if done:
            break
    assert Store.read(folder).status().complete
    old = time.time() - 2 * store_module.ABANDONED
    for part in folder.glob(".*"):
        os.utime(part, (old, old))
    Store.read(folder).clear_parts()
    assert content(folder) == expected


def test_parts_of_those_who_still_write_stay(tmp_path: Path) -> None:
    store = make(tmp_path / "s", [0])
    fresh, old, other = (store.folder / name for name in (".unit-00000001.json.a", ".unit-00000001.json.b", ".mine"))
    for path in (fresh, old, other):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    store.clear_parts()
    assert fresh.exists()
    assert not old.exists()
    assert other.exists()


# ------------------------------------------------------------------------------------------------------- the folder


def test_another_screen_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "s", [0])
    before = content(tmp_path / "s")
    with pytest.raises(ScreenError, match=r"out: '.*s' is the folder of another screen: total is 105 there and 455 here"):
        make(tmp_path / "s", order=3)
    job = job_of()
    plan = {**plan_of(job), "sets": {"roster": [0, 2, 5], "order": 2}}
    with pytest.raises(ScreenError, match=r"another screen: sets\.roster\[2\] is 4 there and 5 here"):
        Store.open(tmp_path / "s", plan)
    assert content(tmp_path / "s") == before


def test_what_is_no_screen_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ScreenError, match=r"is no screen and not empty: it holds 'thesis\.txt'"):
        make(tmp_path)
    with pytest.raises(ScreenError, match=r"expected a folder, '.*thesis\.txt' is a file"):
        make(tmp_path / "thesis.txt")
    with pytest.raises(ScreenError, match=r"is no screen: there is no screen\.json"):
        Store.read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("harm", [_cut, _edit, _empty], ids=["cut", "edited", "emptied"])
def test_a_plan_that_somebody_edited_is_refused(harm: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "s", [0])
    plan = tmp_path / "s" / PLAN
    harm(plan)
    before = content_of_units(tmp_path / "s")
    with pytest.raises(ScreenError, match=r"screen\.json' is damaged"):
        make(tmp_path / "s")
    assert content_of_units(tmp_path / "s") == before


def content_of_units(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("unit-*")}


# ------------------------------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize("count", [1, 3, 4, 20])
def test_shards_share_all_units(count: int) -> None:
    parts = [list(shard_of(11, (index, count))) for index in range(count)]
    assert sorted(number for part in parts for number in part) == list(range(11))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_status_in_words(tmp_path: Path) -> None:
    status = Status(tmp_path, 1000, 10, 7, (1, 2, 5), {}, 700, 650, 30, 20.0, ("cellattn 1, torch 2",))
    text = str(status)
    assert "7 of 10 units done, 70.0% of 1,000 ranks" in text
    assert "650 sets scored, 30 rows kept" in text
    assert "missing: units 1-2, 5" in text
    assert "20 ranks a second, 15 s left at that rate" in text
    assert ranges([3]) == "unit 3"
    assert ranges([1, 2, 4, 6, 8, 9], most=2) == "units 1-2, 4 and 3 more"
    assert [duration(x) for x in (None, 12.3, 190, 7501)] == ["an unknown time", "12 s", "3 min 10 s", "2 h 05 min"]


def test_rate_is_of_all_workers_and_of_time_at_work() -> None:
    def unit(begin: int, seconds: float, finished: float) -> dict[str, Any]:
        return {"ranks": [begin, begin + 100], "seconds": seconds, "finished": finished}

    one_after_the_other = [unit(0, 2.0, 2.0), unit(100, 2.0, 4.0)]
    assert store_module._rate(one_after_the_other) == 50
    assert store_module._rate([*one_after_the_other, unit(200, 2.0, 1004.0)]) == 50  # an interrupted night
    assert store_module._rate([unit(0, 2.0, 2.0), unit(100, 2.0, 2.0)]) == 100  # two at once
    assert store_module._rate([]) is None
