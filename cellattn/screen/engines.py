"""Who computes the units: this process, on one device or several, or the actors of a Ray cluster."""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .._check import require, require_choice
from .job import Job, Result
from .store import Store, Unit

ENGINES = ("local", "ray")
Tell = Callable[[int], Any]  # is told of ranks that were scored


def compute(engine: str, store: Store, job: Job, numbers: Sequence[int], devices: Sequence[str], tell: Tell) -> None:
    """Compute units and write them; units that somebody else has finished meanwhile are passed over.

    Raises:
        OSError: a unit cannot be written. KeyboardInterrupt: Ctrl-C. Units that were finished before are whole.
    """
    require_choice("engine", engine, ENGINES)
    if engine == "ray":
        with_ray(store, job, numbers, devices, tell)
    elif len(devices) > 1:
        on_devices(store, job, numbers, devices, tell)
    else:
        for number in numbers:
            one(store, job, number, tell)


def one(store: Store, job: Job, number: int, tell: Tell) -> None:
    """Compute one unit and write it, unless it is whole."""
    unit = store.unit(number)
    if store.problem(number) is None:
        tell(unit.end - unit.begin)
        return
    start = time.perf_counter()
    result = job.compute(unit, tell)
    store.write(unit, result.rows, result.tables, sets=result.sets, seconds=time.perf_counter() - start)


def on_devices(store: Store, job: Job, numbers: Sequence[int], devices: Sequence[str], tell: Tell) -> None:
    """A thread a device, each of which takes the next unit when it is done with one."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        waiting.put(number)
    job.forget_scorers()  # each thread makes its own
    failed: list[BaseException] = []
    stop = threading.Event()

    def told(ranks: int) -> None:
        tell(ranks)
        if stop.is_set():
            raise _StoppedError

    def work(device: str) -> None:
        mine = copy.copy(job)
        mine.options = {**job.options, "device": device}
        try:
            while not stop.is_set():
                one(store, mine, waiting.get_nowait(), told)
        except (queue.Empty, _StoppedError):
            pass
        except BaseException as error:
            failed.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(device,)) for device in devices]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        stop.set()  # each drops its unit at the next chunk
        for thread in threads:
            thread.join()
        raise
    if failed:
        raise failed[0]


class _StoppedError(Exception):
    """Another thread failed, or the run was interrupted."""


# ------------------------------------------------------------------------------------------------------- Ray


def with_ray(store: Store, job: Job, numbers: Sequence[int], devices: Sequence[str], tell: Tell) -> None:
    """Units as tasks of actors that hold the models, one an actor at a time; this process writes them.

    Joins the cluster of RAY_ADDRESS, or that of an earlier `ray.init`; where there is none, one of this machine is started, and
    stopped at the end. Actors are as many as the cluster has room for: one a GPU where `devices` are of CUDA, else one for
    each `num_threads` CPUs (1 by default). Ray starts a lost actor again, elsewhere if its node is gone, and repeats its task.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine 'ray' needs Ray: pip install 'cellattn[ray]'") from error

    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, configure_logging=False)
    try:
        on_gpu = devices[0].startswith("cuda")
        threads = job.options["num_threads"] or 1
        need: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"num_cpus": threads}
        here = ray.cluster_resources()
        room = int(here.get("GPU" if on_gpu else "CPU", 0)) // (1 if on_gpu else threads)
        require(room > 0, f"engine: the Ray cluster has room for no actor with {need}, it has {here}")
        shared = ray.put(job)
        remote = ray.remote(max_restarts=-1, max_task_retries=-1, **need)(_Actor)
        options = {"device": devices[0], "num_threads": None if on_gpu else threads}
        actors = [remote.remote(shared, options) for _ in range(min(room, len(numbers)))]
        waiting = iter(numbers)
        running: dict[Any, tuple[Any, Unit]] = {}

        def start(actor: Any) -> None:
            for number in waiting:
                unit = store.unit(number)
                if store.problem(number) is not None:
                    running[actor.compute.remote(unit)] = actor, unit
                    return
                tell(unit.end - unit.begin)
            ray.kill(actor)  # makes room for one whose node was lost

        for actor in actors:
            start(actor)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, unit = running.pop(done)
            result, seconds = ray.get(done)
            start(actor)  # works while this process writes
            store.write(unit, result.rows, result.tables, sets=result.sets, seconds=seconds)
            tell(unit.end - unit.begin)
    finally:
        if own:
            ray.shutdown()


class _Actor:
    """Holds the models of a job, their cells encoded."""

    def __init__(self, job: Job, options: dict[str, Any]) -> None:
        self.job = job
        self.job.options = {**job.options, **options}

    def compute(self, unit: Unit) -> tuple[Result, float]:
        """A unit, and the seconds that it took."""
        start = time.perf_counter()
        return self.job.compute(unit), time.perf_counter() - start
