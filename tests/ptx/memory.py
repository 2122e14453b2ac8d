"""What threads touch: global memory between guards, and shared memory that remembers who touched it last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any

UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
GUARD = 4096  # bytes before an allocation that belong to nobody; after it comes the rest of 4 GiB
MANY = -1  # instead of a thread or CTA: several


class AccessError(Exception):
    """An access that is a fault; `bad` tells which of the accessing threads."""

    def __init__(self, what: str, bad: Array, address: Array) -> None:
        super().__init__(what)
        self.what, self.bad, self.address = what, bad, address


def _require(ok: Array, what: str, address: Array) -> None:
    if not np.all(ok):
        bad = ~np.asarray(ok)
        raise AccessError(what, bad.reshape(len(address), -1).any(1), address)


# -------------------------------------------------------------------------------------------------------------- global


@dataclass
class Storage:
    """Bytes that one or more tensor arguments lie in."""

    data: np.ndarray  # uint8
    is_input: bool = False  # made before the launchers ran: not to be written
    written: np.ndarray | None = None  # uint8, 255 where something wrote; None: all of it
    # of the launch that runs: who wrote and who read each byte, as CTA + 1, 0 for nobody, MANY for several or an atomic
    writer: np.ndarray | None = None
    reader: np.ndarray | None = None
    _views: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def view(self, name: str, unit: int) -> np.ndarray:
        """`data` or `written` in units of so many bytes (a rest that fills none is left out)."""
        found = self._views.get((name, unit))
        if found is None:
            whole: np.ndarray = getattr(self, name)
            found = whole[: len(whole) // unit * unit].view(UNITS[unit])
            self._views[name, unit] = found
        return found


@dataclass
class Window:
    """A tensor argument: what of its storage may be touched through its pointer, in bytes of the storage."""

    name: str
    storage: Storage
    low: int
    high: int


class Global:
    """Arguments side by side, each in 4 GiB of its own, so that an address tells which argument it came from."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self.bases: list[int] = []
        self.storages: list[Storage] = []

    def add(self, window: Window, remainder: int) -> int:
        """The address of the storage as seen through this argument, equal to `remainder` modulo 256."""
        self.windows.append(window)
        self.bases.append((len(self.windows) << 32) + GUARD + remainder % 256)
        if not any(window.storage is known for known in self.storages):
            self.storages.append(window.storage)
        return self.bases[-1]

    def begin(self) -> None:
        """A launch begins: nobody has touched anything."""
        for storage in self.storages:
            storage.writer = storage.reader = None

    def _each(self, address: Array, size: int) -> list[tuple[Window, Array, Array | None]]:
        """(window, offsets in its storage, which threads; None for all) of the accesses; faults outside."""
        _require((address & (size - 1)) == 0, f"misaligned access of {size} bytes", address)
        number = self._numbers(address)
        found = []
        first = int(number[0])
        groups: Sequence[int] = [first] if (number == first).all() else [int(x) for x in np.unique(number)]
        for n in groups:
            pick = None if len(groups) == 1 else np.flatnonzero(number == n)
            mine = address if pick is None else address[pick]
            if not 1 <= n <= len(self.windows):
                raise AccessError("access outside of every argument", number == n, address)
            window = self.windows[n - 1]
            offset = mine - self.bases[n - 1]
            outside = (offset < window.low) | (offset + size > window.high)
            if outside.any():
                bad = np.zeros(len(address), bool)
                bad[outside if pick is None else pick[outside]] = True
                one = int(offset[outside][0])
                where = f"{window.low - one} bytes before" if one < window.low else f"{one + size - window.high} bytes past"
                raise AccessError(f"access outside: {where} argument {window.name}", bad, address)
            found.append((window, offset, pick))
        return found

    def _numbers(self, address: Array) -> Array:
        """Of the window that each address belongs to, from 1; others belong to none."""
        return address >> 32

    def load(self, address: Array, unit: int, count: int, cta: Array, *, strong: bool = False) -> np.ndarray:
        """[n, count] units; `strong`: an access that is meant to meet others' (.relaxed, .volatile, .acquire)."""
        out = np.zeros((len(address), count), UNITS[unit])
        for window, offset, pick in self._each(address, unit * count):
            storage = window.storage
            at = (offset // unit)[:, None] + np.arange(count)
            got = storage.view("data", unit)[at]
            if storage.written is not None:
                ok = storage.view("written", unit)[at] == np.iinfo(UNITS[unit]).max
                self._check(ok, f"read of bytes of {window.name} that nothing wrote", pick, address)
            if not storage.is_input and not strong:
                self._note_read(storage, offset, unit * count, cta if pick is None else cta[pick], pick, address, window)
            if pick is None:
                return got
            out[pick] = got
        return out

    def store(self, address: Array, value: np.ndarray, cta: Array, *, strong: bool = False) -> None:
        """value: [n, count] units."""
        unit, count = value.itemsize, value.shape[1]
        for window, offset, pick in self._each(address, unit * count):
            storage = window.storage
            if storage.is_input:
                bad = np.ones(len(address), bool) if pick is None else np.isin(np.arange(len(address)), pick)
                raise AccessError(f"write to the input {window.name}", bad, address)
            if not strong:
                self._note_write(storage, offset, unit * count, cta if pick is None else cta[pick], pick, address, window)
            at = (offset // unit)[:, None] + np.arange(count)
            mine = value if pick is None else value[pick]
            data = storage.view("data", unit)
            data[at] = mine
            self._check(data[at] == mine, f"two threads wrote different values to {window.name}", pick, address)
            if storage.written is not None:
                storage.view("written", unit)[at] = np.iinfo(UNITS[unit]).max

    def atomic(self, address: Array, change: Callable[[int, Array], Array], unit: int, dtype: Any) -> np.ndarray:
        """One thread after another: the old value goes to change(thread, old), what it gives back is stored."""
        old = np.zeros(len(address), dtype)
        for window, offset, pick in self._each(address, unit):
            storage = window.storage
            order = range(len(address)) if pick is None else pick
            if storage.is_input:
                raise AccessError(f"write to the input {window.name}", np.isin(np.arange(len(address)), order), address)
            if storage.written is not None:
                ok = storage.view("written", unit)[offset // unit] == np.iinfo(UNITS[unit]).max
                self._check(ok[:, None], f"read of bytes of {window.name} that nothing wrote", pick, address)
            writer = self._of(storage, "writer")
            bytes_ = offset[:, None] + np.arange(unit)
            self._check((writer[bytes_] <= 0), f"atomic on bytes of {window.name} written in the same launch", pick, address)
            writer[bytes_] = MANY
            data = storage.view("data", unit).view(dtype)
            for k, thread in enumerate(order):
                at = int(offset[k]) // unit
                old[thread] = data[at]
                data[at] = change(int(thread), old[thread])
        return old

    @staticmethod
    def _check(ok: Array, what: str, pick: Array | None, address: Array) -> None:
        if not ok.all():
            bad = np.zeros(len(address), bool)
            rows = ~ok.all(1)
            bad[rows if pick is None else pick[rows]] = True
            raise AccessError(what, bad, address)

    @staticmethod
    def _of(storage: Storage, name: str) -> np.ndarray:
        found: np.ndarray | None = getattr(storage, name)
        if found is None:
            found = np.zeros(len(storage.data), np.int32)
            setattr(storage, name, found)
        return found

    def _note_read(
        self, storage: Storage, offset: Array, size: int, cta: Array, pick: Array | None, address: Array, window: Window
    ) -> None:
        at, mine = offset[:, None] + np.arange(size), (cta + 1)[:, None]
        if storage.writer is not None:
            ok = (storage.writer[at] == 0) | (storage.writer[at] == mine)
            self._check(ok, f"read of bytes of {window.name} that another CTA writes in the same launch", pick, address)
        reader = self._of(storage, "reader")
        before = reader[at]
        reader[at] = np.where((before == 0) | (before == mine), mine, MANY)
        lost = reader[at] != mine
        if lost.any():
            reader[at[lost]] = MANY

    def _note_write(
        self, storage: Storage, offset: Array, size: int, cta: Array, pick: Array | None, address: Array, window: Window
    ) -> None:
        at, mine = offset[:, None] + np.arange(size), (cta + 1)[:, None]
        writer = self._of(storage, "writer")
        before = writer[at]
        ok = (before == 0) | (before == mine)
        self._check(ok, f"two CTAs write the same bytes of {window.name} without an atomic", pick, address)
        writer[at] = mine
        self._check(writer[at] == mine, f"two CTAs write the same bytes of {window.name} without an atomic", pick, address)
        if storage.reader is not None:
            before = storage.reader[at]
            ok = (before == 0) | (before == mine)
            self._check(ok, f"write to bytes of {window.name} that another CTA reads in the same launch", pick, address)


class Flat(Global):
    """Storages at the addresses of the host, for launches whose arguments hold pointers that only their kernel knows of.

    Allocations may be neighbours, so that an access far outside of one is found only where it meets none.
    """

    def put(self, window: Window, address: int) -> None:
        self.windows.append(window)
        self.bases.append(address)
        self.storages.append(window.storage)

    def begin(self) -> None:
        order = np.argsort(self.bases)
        self.windows, self.bases = [self.windows[k] for k in order], [self.bases[k] for k in order]
        self._starts = np.array(self.bases, np.int64)
        super().begin()

    def _numbers(self, address: Array) -> Array:
        return np.searchsorted(self._starts, address, "right")


# -------------------------------------------------------------------------------------------------------------- shared


class Shared:
    """Shared memory of the CTAs that run side by side.

    Two accesses of one granule by two threads, one of them a write, are ordered where a barrier of the CTA lies between them
    (the epoch of the later one is larger) or, for two threads of one warp, a barrier of the warp (its step is larger).
    """

    def __init__(
        self, num_ctas: int, size: int, threads: int, granule: int, *, async_proxy: bool, fenced_copies: bool = True
    ) -> None:
        self.size, self.granule, self.threads = size, granule, threads
        self.stride = -(-max(size, 1) // 128) * 128
        total = num_ctas * self.stride
        self.data = np.full(total, 0xFF, np.uint8)
        n = total // granule
        self.written = np.zeros(n, bool)
        self.pending = np.zeros(n, np.int16)  # copies under way
        # the last write, and the last reads: in which epoch, after which step of the warp, by which thread
        self.w_epoch, self.w_step, self.w_thread = np.full(n, -1, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.r_epoch, self.r_step, self.r_thread = np.full(n, -1, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32)
        num_threads = num_ctas * threads
        self.epoch = np.zeros(num_threads, np.int32)  # barriers of the CTA that a thread has passed
        self.step = np.zeros(num_threads, np.int32)  # barriers of the CTA or the warp
        # the asynchronous proxy (sm_90): when the last write came, and when each thread last put a fence
        self.async_proxy = async_proxy
        self.clock = 0
        self.w_clock = np.zeros(n if async_proxy else 0, np.int64)
        self.fenced_copies = fenced_copies  # whether what a cp.async wrote needs a fence, as PTX says, or the wait will do
        self.copied = np.zeros(n, bool)  # the last write was a cp.async
        self.in_flight = np.zeros(n if async_proxy else 0, np.int16)  # reads of wgmma that were not waited for
        self.fence_clock = np.full(num_threads, -1, np.int64)
        self.fence_epoch = np.full(num_threads, -1, np.int32)

    # ------------------------------------------------------------------------------------------------ addresses

    def _at(self, address: Array, size: int, thread: Array) -> np.ndarray:
        _require((address >= 0) & (address + size <= self.size), f"shared access outside of its {self.size} bytes", address)
        _require((address & (size - 1)) == 0, f"misaligned shared access of {size} bytes", address)
        return thread // self.threads * self.stride + address

    def _granules(self, at: Array, size: int) -> np.ndarray:
        return (at // self.granule)[:, None] + np.arange(max(1, size // self.granule))

    def _gather(self, at: Array, unit: int, count: int) -> np.ndarray:
        return self.data.view(UNITS[unit])[(at // unit)[:, None] + np.arange(count)]

    # ------------------------------------------------------------------------------------------------ accesses

    def load(self, address: Array, unit: int, count: int, thread: Array, *, strong: bool = False) -> np.ndarray:
        """[n, count] units."""
        at = self._at(address, unit * count, thread)
        self.note_read(self._granules(at, unit * count), thread, address, strong=strong)
        return self._gather(at, unit, count)

    def store(self, address: Array, value: np.ndarray, thread: Array, *, strong: bool = False) -> None:
        unit, count = value.itemsize, value.shape[1]
        at = self._at(address, unit * count, thread)
        granules = self._granules(at, unit * count)
        places = (at // unit)[:, None] + np.arange(count)
        data = self.data.view(UNITS[unit])
        self.note_write(granules, thread, address, strong=strong)
        data[places] = value
        if not strong:
            _require(data[places] == value, "race: two threads write different values to a shared byte at once", address)
        self.written[granules] = True
        self.copied[granules] = False

    def begin_copy(self, address: Array, size: int, thread: Array) -> np.ndarray:
        """A cp.async writes from its issue on; gives where. `end_copy` puts the bytes there."""
        at = self._at(address, size, thread)
        granules = self._granules(at, size)
        self.note_write(granules, thread, address)
        self.pending[granules] += 1
        return at

    def end_copy(self, at: Array, data: np.ndarray, thread: Array) -> None:
        """Waited for: the thread itself sees the bytes, others after the next barrier."""
        size = data.shape[1]
        self.data[at[:, None] + np.arange(size)] = data
        granules = self._granules(at, size)
        self.pending[granules] -= 1
        self.written[granules] = True
        self.copied[granules] = True
        self._stamp_write(granules, thread)

    # ------------------------------------------------------------------------------------------------ who saw what

    def note_read(self, at: Array, thread: Array, address: Array, *, strong: bool = False) -> None:
        _require(self.pending[at] == 0, "read of shared bytes whose cp.async has not been waited for", address)
        _require(self.written[at], "read of shared bytes that nothing wrote", address)
        mine = thread[:, None]
        epoch, step = self.epoch[mine], self.step[mine]
        if not strong:
            self._unordered(
                at, mine, epoch, step, self.w_epoch, self.w_step, self.w_thread,
                "race: read of a shared byte that another thread wrote, no barrier between", address,
            )  # fmt: skip
        before, fresh = self.r_thread[at], self.r_epoch[at] == epoch
        self._put_readers(at, np.where(fresh, self._both(before, mine), mine))
        self.r_epoch[at] = epoch
        self.r_step[at] = step

    def _put_readers(self, at: Array, readers: Array) -> None:
        """Several readers of one granule in one instruction are all remembered."""
        self.r_thread[at] = readers
        while (lost := self.r_thread[at] != readers).any():
            at, readers = at[lost], self._both(self.r_thread[at[lost]], readers[lost])
            self.r_thread[at] = readers

    @staticmethod
    def _both(a: Array, b: Array) -> np.ndarray:
        """Two readers as one number: a thread, -2 - warp for several of a warp, MANY for several warps."""
        warp_a, warp_b = (np.where(x >= 0, x >> 5, -2 - x) for x in (a, b))
        one_warp = (warp_a == warp_b) & (a != MANY) & (b != MANY)
        return np.where(a == b, a, np.where(one_warp, -2 - warp_b, MANY)).astype(np.int32)

    def note_write(self, at: Array, thread: Array, address: Array, *, strong: bool = False) -> None:
        _require(self.pending[at] == 0, "write to shared bytes that a cp.async under way also writes", address)
        if self.async_proxy:
            _require(self.in_flight[at] == 0, "write to shared bytes that a wgmma under way reads", address)
        mine = thread[:, None]
        epoch, step = self.epoch[mine], self.step[mine]
        if not strong:
            self._unordered(
                at, mine, epoch, step, self.w_epoch, self.w_step, self.w_thread,
                "race: two threads write a shared byte, no barrier between", address,
            )  # fmt: skip
            self._unordered(
                at, mine, epoch, step, self.r_epoch, self.r_step, self.r_thread,
                "race: write to a shared byte that another thread read, no barrier between", address,
            )  # fmt: skip
        self._stamp_write(at, thread)

    def _stamp_write(self, at: Array, thread: Array) -> None:
        mine = thread[:, None]
        self.w_epoch[at], self.w_step[at], self.w_thread[at] = self.epoch[mine], self.step[mine], mine
        if self.async_proxy:
            self.w_clock[at] = self.clock

    @staticmethod
    def _unordered(
        at: Array, mine: Array, epoch: Array, step: Array, then_epoch: Array, then_step: Array, then_thread: Array,
        what: str, address: Array,
    ) -> None:  # fmt: skip
        other = then_thread[at]
        race = (then_epoch[at] == epoch) & (other != mine)
        if race.any():
            warp = np.where(other >= 0, other >> 5, -2 - other)
            same_warp = (warp == mine >> 5) & (other != MANY)
            race &= ~(same_warp & (then_step[at] < step))
            _require(~race, what, address)

    # ------------------------------------------------------------------------------------------------ sm_90

    def fence(self, thread: Array) -> None:
        """fence.proxy.async: what these threads see written is seen by wgmma too."""
        self.fence_clock[thread], self.fence_epoch[thread] = self.clock, self.epoch[thread]

    def begin_async_read(self, address: Array, size: int, thread: Array) -> tuple[np.ndarray, np.ndarray]:
        """wgmma reads [n, size] bytes from its issue until it is waited for; gives the bytes and the granules."""
        at = self._at(address, size, thread)
        granules = self._granules(at, size)
        _require(self.pending[granules] == 0, "wgmma reads shared bytes whose cp.async has not been waited for", address)
        _require(self.written[granules], "wgmma reads shared bytes that nothing wrote", address)
        mine = thread[:, None]
        writer, then = self.w_thread[granules], self.w_epoch[granules]
        _require(
            (then < self.epoch[mine]) | (writer == mine),
            "race: wgmma reads a shared byte that another thread wrote, no barrier between",
            address,
        )
        by_writer = self.fence_clock[writer] > self.w_clock[granules]
        by_reader = (self.fence_clock[mine] > self.w_clock[granules]) & ((self.fence_epoch[mine] > then) | (writer == mine))
        excused = self.copied[granules] & (not self.fenced_copies)
        fenced = by_writer | by_reader | excused
        _require(fenced, "wgmma reads shared bytes with no fence.proxy.async after their write", address)
        np.add.at(self.in_flight, granules, 1)
        return self.data[at[:, None] + np.arange(size)], granules

    def end_async_read(self, granules: np.ndarray, thread: Array) -> None:
        """Waited for: others may write after the next barrier."""
        np.add.at(self.in_flight, granules, -1)
        mine = thread[:, None]
        fresh = self.r_epoch[granules] == self.epoch[mine]
        self._put_readers(granules, np.where(fresh, self._both(self.r_thread[granules], mine), mine))
        self.r_epoch[granules], self.r_step[granules] = self.epoch[mine], self.step[mine]
