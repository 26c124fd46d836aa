"""The board of an emulated machine: what all processes know about its devices, in memory that they share.

Theory of operation. The devices of an emulated machine are not in any process: capacity, epoch, who holds which slab, the
faults that wait for their moment and the news about health lie in one anonymous memory file, which every process of the
machine maps. Its creator hands out an `address` (its pid, the file's descriptor and inode), and any process of the same user
opens `/proc/<pid>/fd/<fd>`; no name appears in a file system, and nothing is left behind however processes end. That the
file is the one that was meant is known from its inode: a descriptor number is used again, an inode number is not while a
descriptor holds it.

Changes are made under `locked()`, a `flock` on this process's own open file (so the kernel gives it back when its holder
dies) around a lock for the threads. Readers of one word (epoch, lost, armed) take none: those words are written whole.

Slabs are memory files of their own, opened by others in the same way. A row stands for each: who made it, which descriptor,
how large. A row whose process has ended counts no more, so the memory of a killed process comes back as it does on a
device. A board does not survive a fork, as CUDA does not: the child attaches for itself.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import get_args

import msgspec
import numpy as np

from afield.errors import NoDeviceError
from afield.gpu_store import shared_memory
from afield.gpu_store.backends import base
from afield.gpu_store.backends.base import DeviceCallError, DeviceInfo, DeviceUsageError, HealthEvent, HealthKind, Link
from afield.gpu_store.backends.health import judge_xid

#: 4 GiB in the smallest slabs; a store holds few and large ones.
MAX_SLABS = 2048
#: A plan is written by hand.
MAX_FAULTS = 16
#: News that a reader who polls late may miss; it is told so.
MAX_EVENTS = 64

KINDS: tuple[HealthKind, ...] = get_args(HealthKind)
#: What news without a number are in words.
WORDS = {"lost": "it is not on its bus any more", "reset": "it was reset"}

_SLAB = np.dtype([(name, "u8") for name in ("serial", "pid", "started", "fd", "inode", "size")])
_FAULT = np.dtype([("kind", "u8"), ("at", "u8"), ("code", "i8"), ("factor", "f8"), ("pid", "u8")])
_EVENT = np.dtype([("kind", "u8"), ("epoch", "u8"), ("code", "i8"), ("fatal", "u8")])
_DEVICE = np.dtype(
    [
        ("epoch", "u8"),
        ("lost", "u8"),
        ("serial", "u8"),  # of the slab made last
        ("armed", "u8"),  # rows of `faults` that are in use
        ("slowness", "f8"),
        ("events_written", "u8"),
        ("slabs", _SLAB, MAX_SLABS),
        ("faults", _FAULT, MAX_FAULTS),
        ("events", _EVENT, MAX_EVENTS),
    ]
)


class _Header(msgspec.Struct):
    devices: list[DeviceInfo]
    links: list[Link]


class Board:
    """One process's mapping of the board; devices go by their position in `devices`."""

    def __init__(self, fd: int, address: str) -> None:
        """Map the board behind `fd`, which this object closes from now on; use `create` or `attach`."""
        self._fd = fd
        self.address = address
        self._pid = os.getpid()
        self._threads = threading.RLock()
        self._depth = 0
        self._memory = shared_memory.mapped(fd, os.fstat(fd).st_size)
        length = int.from_bytes(self._memory[:8], "little")
        header = msgspec.msgpack.decode(self._memory[8 : 8 + length], type=_Header)
        self.devices: Sequence[DeviceInfo] = tuple(header.devices)
        self.links: Sequence[Link] = tuple(header.links)
        self._index = {info.uuid: index for index, info in enumerate(header.devices)}
        self._rows = np.frombuffer(self._memory, _DEVICE, len(header.devices), _rows_offset(length))

    @classmethod
    def create(cls, devices: Sequence[DeviceInfo], links: Sequence[Link]) -> Board:
        """Make a new machine."""
        header = msgspec.msgpack.encode(_Header(list(devices), list(links)))
        offset = _rows_offset(len(header))
        fd = shared_memory.create("afield-emulated-machine", offset + len(devices) * _DEVICE.itemsize)
        os.pwrite(fd, len(header).to_bytes(8, "little") + header, 0)
        inode = os.fstat(fd).st_ino
        board = cls(fd, f"{os.getpid()}.{fd}.{inode}")
        board._rows["epoch"] = 1
        board._rows["slowness"] = 1.0
        return board

    @classmethod
    def attach(cls, address: str) -> Board:
        """Map the machine of another process of this user; raises NoDeviceError where that process is gone."""
        try:
            pid, fd, inode = map(int, address.split("."))
            return cls(open_foreign(pid, fd, inode), address)
        except (OSError, ValueError) as error:
            raise NoDeviceError(
                f"there is no emulated machine at {address[:80]!r} ({error}): the process that made it may have ended; "
                'start a new one with devices="emulated:2"'
            ) from None

    def close(self) -> None:
        """Let go of the board; closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def index(self, uuid: str) -> int:
        """Return a device's position; raises NoDeviceError with what there is."""
        if uuid not in self._index:
            raise base.unknown_device(uuid, self._index)
        return self._index[uuid]

    def check_process(self) -> None:
        """Raise DeviceUsageError in a child of the process that mapped the board, or after `close`."""
        base.check_process(self._pid)
        if self._fd < 0:
            raise DeviceUsageError("the backend was closed")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process and thread from changing the board; may be nested."""
        self.check_process()
        with self._threads:
            if self._depth == 0:
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)

    # ---- one word ----------------------------------------------------------------------------------------------

    def epoch(self, index: int) -> int:
        return int(self._rows["epoch"][index])

    def lost(self, index: int) -> bool:
        return bool(self._rows["lost"][index])

    def armed(self, index: int) -> bool:
        return bool(self._rows["armed"][index])

    def slowness(self, index: int) -> float:
        """By how much every link of the device is slower than it should be."""
        return float(self._rows["slowness"][index])

    def set_slowness(self, index: int, factor: float) -> None:
        self._rows["slowness"][index] = factor

    # ---- slabs -------------------------------------------------------------------------------------------------

    def reserve(self, index: int, size_bytes: int, fd: int, inode: int) -> int | None:
        """Count a slab of this process and return its serial number, or None where there is no room."""
        with self.locked():
            if sum(self.holders(index).values()) + size_bytes > self.devices[index].memory_bytes:
                return None
            rows = self._rows["slabs"][index]
            free = np.flatnonzero(rows["serial"] == 0)
            if not free.size:
                raise DeviceCallError(
                    f"device {self.devices[index].uuid} has {MAX_SLABS} slabs: take fewer, larger ones"
                )
            self._rows["serial"][index] += 1
            serial = int(self._rows["serial"][index])
            # The serial number last: a process that dies here leaves a free row behind.
            rows[free[0]] = (0, self._pid, _started(self._pid), fd, inode, size_bytes)
            rows["serial"][free[0]] = serial
            return serial

    def release(self, index: int, serial: int) -> None:
        """Count a slab no more; one that is not there (from before a reset) is none's error."""
        with self.locked():
            rows = self._rows["slabs"][index]
            rows[rows["serial"] == serial] = 0

    def holds(self, index: int, serial: int) -> bool:
        """Tell whether a slab is still allocated."""
        with self.locked():
            return bool((self._rows["slabs"][index]["serial"] == serial).any())

    def holders(self, index: int) -> dict[int, int]:
        """Return the bytes that each process holds; forget what belonged to processes that have ended."""
        with self.locked():
            rows = self._rows["slabs"][index]
            started = {pid: _started(pid) for pid in map(int, np.unique(rows["pid"][rows["serial"] != 0]))}
            held = dict.fromkeys(started, 0)
            for at in np.flatnonzero(rows["serial"]):
                pid = int(rows["pid"][at])
                if started[pid] == int(rows["started"][at]):
                    held[pid] += int(rows["size"][at])
                else:
                    rows[at] = 0
            return held

    # ---- lives and news ----------------------------------------------------------------------------------------

    def end_life(self, index: int, *, lost: bool) -> None:
        """Wipe all slabs of a device and let its epoch grow; it is usable again at once unless it is `lost`."""
        with self.locked():
            # First the epoch: no process starts anything in the old life while its memory goes.
            self._rows["lost"][index] = lost
            self._rows["epoch"][index] += 1
            rows = self._rows["slabs"][index]
            for at in np.flatnonzero(rows["serial"]):
                with suppress(OSError):  # its process has ended, and the memory with it
                    fd = open_foreign(int(rows["pid"][at]), int(rows["fd"][at]), int(rows["inode"][at]))
                    try:
                        wipe(fd)
                    finally:
                        os.close(fd)
            rows[:] = 0

    def announce(self, index: int, kind: HealthKind, code: int, *, fatal: bool) -> None:
        """Publish news about the present life of a device."""
        with self.locked():
            written = int(self._rows["events_written"][index])
            event = (KINDS.index(kind), self.epoch(index), code, fatal)
            self._rows["events"][index][written % MAX_EVENTS] = event
            self._rows["events_written"][index] = written + 1

    def events(self, index: int, seen: int) -> tuple[list[HealthEvent], int]:
        """Return the news after the first `seen`, and how many there have been."""
        written = int(self._rows["events_written"][index])
        if written == seen:
            return [], seen
        with self.locked():
            written = int(self._rows["events_written"][index])
            uuid = self.devices[index].uuid
            news = []
            if written - seen > MAX_EVENTS:
                text = f"{written - seen - MAX_EVENTS} events were missed"
                news.append(HealthEvent(uuid, self.epoch(index), "suspect", 0, False, text))
            for number in range(max(seen, written - MAX_EVENTS), written):
                row = self._rows["events"][index][number % MAX_EVENTS]
                kind, code = KINDS[int(row["kind"])], int(row["code"])
                text = f"Xid {code}: {judge_xid(code)[1]}" if kind == "xid" else WORDS.get(kind, kind)
                news.append(HealthEvent(uuid, int(row["epoch"]), kind, code, bool(row["fatal"]), text))
            return news, written

    def last_fatal(self, index: int) -> str:
        """Return in words why the device was lost."""
        fatal = [event.text for event in self.events(index, 0)[0] if event.fatal]
        return fatal[-1] if fatal else "for an unknown reason"

    # ---- faults ------------------------------------------------------------------------------------------------

    def arm(self, index: int, kind: int, at: int, code: int, factor: float, pid: int) -> None:
        """Keep a fault until its `at`-th call."""
        with self.locked():
            rows = self._rows["faults"][index]
            free = np.flatnonzero(rows["kind"] == 0)
            if not free.size:
                raise DeviceUsageError(f"{MAX_FAULTS} faults are waiting on device {self.devices[index].uuid} already")
            rows[free[0]] = (kind, at, code, factor, pid)
            self._rows["armed"][index] += 1

    def disarm(self, index: int) -> None:
        """Forget the faults that wait on a device."""
        with self.locked():
            self._rows["faults"][index]["kind"] = 0
            self._rows["armed"][index] = 0

    def count_down(self, index: int, kinds: frozenset[int]) -> list[tuple[int, int, float]]:
        """Count one call for the waiting faults of these kinds; return (kind, code, factor) of those whose time has come."""
        due = []
        with self.locked():
            rows = self._rows["faults"][index]
            for at in np.flatnonzero(rows["kind"]):
                row = rows[at]
                if int(row["kind"]) not in kinds or int(row["pid"]) not in (0, self._pid):
                    continue
                rows["at"][at] -= 1
                if rows["at"][at] == 0:
                    due.append((int(row["kind"]), int(row["code"]), float(row["factor"])))
                    rows[at] = 0
                    self._rows["armed"][index] -= 1
        return due


def open_foreign(pid: int, fd: int, inode: int) -> int:
    """Open a memory file of a process of this user by its descriptor; raises OSError where it is not that file any more.

    Linux allows this to whoever could trace the process: the same user, unless the process made itself undumpable.
    """
    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    if os.fstat(opened).st_ino != inode:
        os.close(opened)
        raise OSError(f"descriptor {fd} of process {pid} is something else by now")
    return opened


def wipe(fd: int) -> None:
    """Give the memory of a file back to the system; whoever maps it reads zeros from then on."""
    with mmap.mmap(fd, os.fstat(fd).st_size) as memory:
        memory.madvise(mmap.MADV_REMOVE)


def _started(pid: int) -> int:
    """Return when a process started, in clock ticks since the machine did, or 0 where it has ended: pids are used again."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the program's name, in parentheses, and may hold anything.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def _rows_offset(header_bytes: int) -> int:
    return -(-(8 + header_bytes) // 64) * 64
