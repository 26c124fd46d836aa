"""Notes to the daemon that it need not be woken for: a ring of records in shared memory for each process.

Theory of operation. What a process has sealed the daemon has to know before it does anything about the object, and not
sooner. So the note is left in memory: the daemon reads all rings before it handles any message, and whoever can name the
object has heard of it after the note was written. A message would cost a system call, and the daemon a turn, for each
object. What a process left before it died is still there. When the ring is full the process sends a message after all.

    ring:    u64 bytes written so far, u64 bytes read so far, then the records, each at a multiple of 8
    record:  u32 length (WRAP: the next record is at the start), u32 checksum, the bytes

Only the process writes the first number, only the daemon the second. The checksum is for processors that may show the number
before the record: such a record is read at the next look.

The numbers and records are memory that any process of the session can write to by mistake. What cannot be is damage: the ring
is not read any more, and `take` tells whose it is.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Final
from zlib import crc32

from afield.gpu_store.pins import BOARD_BYTES, MAX_PROCESSES
from afield.gpu_store.shared_memory import mapped

RING_BYTES: Final = 1 << 16
#: The pin board and the rings behind it, in one sparse memory file.
SHARED_BYTES: Final = BOARD_BYTES + MAX_PROCESSES * RING_BYTES

_HEADER_BYTES: Final = 64
_ROOM: Final = RING_BYTES - _HEADER_BYTES
_WRAP: Final = 0xFFFF_FFFF
_RECORD = struct.Struct("<II")
#: A processor shows a record so late as the number is seen, at most: some nanoseconds. A look takes longer than that.
MOST_LOOKS: Final = 1000
#: The daemon maps so many rings at once: a mapping costs it a file descriptor.
_WINDOW: Final = 64


class RingWriter:
    """A process's own ring; the caller sees to it that one thread writes at a time."""

    def __init__(self, fd: int, index: int) -> None:
        self._map = mapped(fd, RING_BYTES, offset=BOARD_BYTES + index * RING_BYTES)
        self._data = memoryview(self._map)
        self._counts = self._data[:16].cast("Q")
        self._written = self._counts[0]

    def put(self, record: bytes) -> bool:
        """Leave a record; False: there is no room (or the ring was closed), and nothing was done."""
        if self._map.closed:
            return False
        size = (_RECORD.size + len(record) + 7) & -8
        at = self._written % _ROOM
        skipped = _ROOM - at if at + size > _ROOM else 0
        if size > _ROOM or self._written + skipped + size - self._counts[1] > _ROOM:
            return False
        data = self._data
        if skipped:
            _RECORD.pack_into(data, _HEADER_BYTES + at, _WRAP, 0)
            at = 0
        start = _HEADER_BYTES + at
        _RECORD.pack_into(data, start, len(record), crc32(record))
        data[start + _RECORD.size : start + _RECORD.size + len(record)] = record
        self._written += skipped + size
        self._counts[0] = self._written
        return True

    def close(self) -> None:
        """Give the mapping up; what was left stays for the daemon."""
        self._counts.release()
        self._data.release()
        self._map.close()


class RingDamagedError(Exception):
    """A ring holds what no writer leaves."""


class _Ring:
    """One process's ring, as the daemon reads it; `unread` counts the looks at a record that was not whole."""

    __slots__ = ("counts", "data", "read", "unread")

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.counts = data[:16].cast("Q")
        self.read = self.counts[1]
        self.unread = 0


class Rings:
    """The daemon's side: the rings of all processes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rings: dict[int, _Ring] = {}
        self._windows: dict[int, mmap.mmap] = {}

    def add(self, index: int) -> None:
        """Read the ring of this process from now on."""
        number, place = divmod(index, _WINDOW)
        window = self._windows.get(number)
        if window is None:
            size = _WINDOW * RING_BYTES
            window = self._windows[number] = mapped(self._fd, size, offset=BOARD_BYTES + number * size)
        self._rings[index] = _Ring(memoryview(window)[place * RING_BYTES : (place + 1) * RING_BYTES])

    def remove(self, index: int) -> None:
        """Forget a process that has ended, after the last `take`; an index is not used twice."""
        if self._rings.pop(index, None) is not None:
            number, place = divmod(index, _WINDOW)
            with suppress(OSError):  # its memory is not given back: the ring is not looked at any more all the same
                self._windows[number].madvise(mmap.MADV_REMOVE, place * RING_BYTES, RING_BYTES)
            if not any(other // _WINDOW == number for other in self._rings):
                del self._windows[number]

    def take(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield (index of the process, record) for all that was left, in the order of each process.

        None instead of a record: the ring is damaged, and will not be read again.
        """
        for index, ring in list(self._rings.items()):
            if ring.counts[0] != ring.read:
                try:
                    for record in _records(ring):
                        yield index, record
                except RingDamagedError:
                    del self._rings[index]
                    yield index, None


def _records(ring: _Ring) -> Iterator[bytes]:
    data = ring.data
    while ring.read != (written := ring.counts[0]):
        at, waiting = ring.read % _ROOM, written - ring.read
        if not 0 < waiting <= _ROOM or waiting % 8:
            raise RingDamagedError
        length, checksum = _RECORD.unpack_from(data, _HEADER_BYTES + at)
        size = _ROOM - at if length == _WRAP else (_RECORD.size + length + 7) & -8
        start = _HEADER_BYTES + at + _RECORD.size
        record = b"" if length == _WRAP else bytes(data[start : start + min(length, _ROOM)])
        if size > waiting or at + size > _ROOM or (length != _WRAP and crc32(record) != checksum):
            ring.unread += 1
            if ring.unread > MOST_LOOKS:
                raise RingDamagedError
            return
        ring.unread = 0
        ring.read += size
        ring.counts[1] = ring.read
        if length != _WRAP:
            yield record
