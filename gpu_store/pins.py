"""The pin board: which process reads which copy of a part, in memory that all share, so that reading costs no message.

Theory of operation. The board is one sparse memory file: a 64-bit *state word* for each *slot*, and for each process a *row*
of bytes, one for each slot. A copy of a part has a slot and a *serial*, a number that is never used again. The word of its
slot holds the serial for as long as the copy may be pinned, and 0 otherwise.

    reader                                daemon, before it frees or moves the copy
    1. sets its own byte of the slot      1. writes 0 into the word
    2. reads the word: its serial?        2. lets every running thread pass a memory barrier
       yes: pinned                        3. looks at the byte of every process
       no: clears the byte                   all clear: closed, nobody reads it and nobody will
                                             any set: pinned; the word is written back

Each side writes first and looks afterwards, so at least one of the two sees the other. For that a store must not be overtaken
by the load behind it, and preventing this at every read would need an instruction that Python does not have. So the daemon
pays for both: membarrier(2) runs a barrier on every processor that runs a registered process. Where the kernel has no such
call, the daemon sleeps for longer than a store can take to become visible. A reader that is in its step 2 when the daemon
looks may make a copy look pinned for a moment; it stays, and is closed another time. A reader that asks within the daemon's
three steps may be refused although the copy stays; it asks the daemon, which knows.

The shared byte is 0 or 1; how many readers a process has in itself, it counts itself. `unpin` only leaves a note, since it is
called by finalisers, in any thread, at any moment; the notes are read at the next `pin` or `drain`. The row of a process that
ended is wiped, and with it all that it had pinned.

Slot 0 stands for a copy that never moves: it is pinned always, by everybody. Slots are handed out last back, first out, so
that the pages of the board that are ever touched are few. A slot that a process leased for what it will write goes back with
the process unless `adopt` said that it belongs to an object by now.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt

from afield.gpu_store.shared_memory import mapped

#: Copies that can be on the board at a time; what is beyond has no slot, and does not move.
SLOTS: Final = 1 << 20
#: A serial is (index of the process that made it << SERIAL_BITS) | a counter; indices are not used twice.
SERIAL_BITS: Final = 40
MAX_PROCESSES: Final = 1 << (64 - SERIAL_BITS)
_STATE_BYTES: Final = 8 * SLOTS
#: The size of the board's memory file, which takes memory only where it was touched.
BOARD_BYTES: Final = _STATE_BYTES + MAX_PROCESSES * SLOTS

#: The daemon maps so many rows at once: a mapping costs it a file descriptor.
_WINDOW_ROWS: Final = 64
#: Where there is no membarrier: a store is visible long before this is over.
_SETTLE_S: Final = 0.001

_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283}
_GLOBAL_EXPEDITED: Final = 1 << 1
_REGISTER_GLOBAL_EXPEDITED: Final = 1 << 2

_Row = npt.NDArray[np.uint8]


def _membarrier(command: int) -> bool:
    """Call membarrier(2); return False where the system has it not, or does not let us."""
    number = _MEMBARRIER.get(platform.machine())
    if number is None:
        return False
    return int(ctypes.CDLL(None).syscall(number, command, 0, 0)) == 0


def make_barrier() -> Callable[[], None]:
    """Return what lets every running thread of all registered processes pass a memory barrier."""
    if not _membarrier(_REGISTER_GLOBAL_EXPEDITED) or not _membarrier(_GLOBAL_EXPEDITED):
        return lambda: time.sleep(_SETTLE_S)
    syscall, number = ctypes.CDLL(None).syscall, _MEMBARRIER[platform.machine()]

    def barrier() -> None:
        if syscall(number, _GLOBAL_EXPEDITED, 0, 0):  # it did work, so this does not happen; nothing depends on it
            time.sleep(_SETTLE_S)

    return barrier


class PinBoard:
    """The daemon's side: hands out slots, and closes copies that nobody reads. Not for several threads."""

    def __init__(self, fd: int, barrier: Callable[[], None] | None = None) -> None:
        """Map the board behind `fd`, a file of BOARD_BYTES; `barrier` stands for `make_barrier()` in tests."""
        self._fd = fd
        self._states = memoryview(mapped(fd, _STATE_BYTES)).cast("Q")
        self._barrier = barrier or make_barrier()
        self._rows: dict[int, _Row] = {}
        self._windows: dict[int, mmap.mmap] = {}
        self._free: list[int] = []
        self._fresh = 1  # slots from here on were never used
        self._leased: dict[int, set[int]] = {}
        self._next_serial = itertools.count(1).__next__

    # -- processes -----------------------------------------------------------------------------------------------

    def add_process(self, index: int) -> None:
        """Look at the row of this process from now on: before it can pin anything."""
        if not 0 < index < MAX_PROCESSES:
            raise ValueError(f"process index {index}: from 1 to {MAX_PROCESSES - 1} processes can be told apart")
        number, place = divmod(index, _WINDOW_ROWS)
        window = self._windows.get(number)
        if window is None:
            size = _WINDOW_ROWS * SLOTS
            window = self._windows[number] = mapped(self._fd, size, offset=_STATE_BYTES + number * size)
        self._rows[index] = np.frombuffer(window, np.uint8, SLOTS, place * SLOTS)

    def remove_process(self, index: int) -> None:
        """Drop what a process that has ended had pinned, and take back the slots that it leased and did not use."""
        if self._rows.pop(index, None) is None:
            return
        for slot in self._leased.pop(index, ()):
            self.release(slot)
        number, place = divmod(index, _WINDOW_ROWS)
        with suppress(OSError):  # its memory is not given back: the row is not looked at any more all the same
            self._windows[number].madvise(mmap.MADV_REMOVE, place * SLOTS, SLOTS)
        if not any(other // _WINDOW_ROWS == number for other in self._rows):
            del self._windows[number]

    # -- slots ---------------------------------------------------------------------------------------------------

    @property
    def in_use(self) -> int:
        """Slots that are leased or belong to a copy."""
        return self._fresh - 1 - len(self._free)

    def take(self) -> tuple[int, int]:
        """Return (slot, serial) for a copy that the daemon makes, or (0, 0) when there is none."""
        slot = self._take_slot()
        return (slot, self._next_serial()) if slot else (0, 0)

    def lease_slots(self, count: int, index: int) -> list[int]:
        """Return up to `count` slots for what process `index` will write; they are its own until `adopt`."""
        slots = [slot for slot in (self._take_slot() for _ in range(count)) if slot]
        self._leased.setdefault(index, set()).update(slots)
        return slots

    def adopt(self, slots: Iterable[int], index: int) -> None:
        """A process has sealed copies in slots that it leased: they are the daemon's to `release`, also when it ends.

        Raises ValueError for a slot that is not leased to it. Slot 0 is nobody's.
        """
        leased = self._leased.get(index, set())
        for slot in slots:
            if slot and slot not in leased:
                raise ValueError(f"slot {slot} of the pin board is not leased to process {index}")
            leased.discard(slot)

    def publish(self, slot: int, serial: int) -> None:
        """Let the copy of this serial be pinned from now on."""
        if slot:
            self._states[slot] = serial

    def close(self, copies: Sequence[tuple[int, int]]) -> list[bool]:
        """Close copies, each (slot, serial), unless they are pinned; one barrier for all of them.

        Returns for each True: nobody reads it, and nobody can pin it; or False: it is pinned, or has no slot, and stays
        as it was.
        """
        states = self._states
        before = [states[slot] for slot, _ in copies]
        for slot, _ in copies:
            states[slot] = 0
        self._barrier()
        slots = np.fromiter((slot for slot, _ in copies), np.intp, len(copies))
        pinned: _Row = np.equal(slots, 0).view(np.uint8)
        for row in self._rows.values():
            pinned |= row[slots]
        for (slot, _), word, held in zip(copies, before, pinned, strict=True):
            if held:
                states[slot] = word
        return [not held for held in pinned]

    def holders(self, slots: Sequence[int]) -> dict[int, list[bool]]:
        """Return, by the index of each process that has pinned any of these slots, which of them.

        A glance at the board, without a barrier: what it shows may be over, or about to begin.
        """
        places = np.fromiter(slots, np.intp, len(slots))
        seen = ((index, row[places]) for index, row in self._rows.items())
        return {index: pinned.astype(bool).tolist() for index, pinned in seen if pinned.any()}

    def release(self, slot: int) -> None:
        """The slot is free again; its copy was closed, or never published."""
        if slot:
            self._states[slot] = 0
            self._free.append(slot)

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        if self._fresh == SLOTS:
            return 0
        self._fresh += 1
        return self._fresh - 1


class Pinner:
    """A process's side: pins copies and publishes its own; may be used by several threads."""

    def __init__(self, fd: int, index: int, *, registered: bool | None = None) -> None:
        """Map the board and this process's row of it; the daemon knows `index` (`PinBoard.add_process`) already.

        `registered` overrides, in tests, whether the daemon's barrier reaches this process.
        """
        if not 0 < index < MAX_PROCESSES:
            raise ValueError(f"process index {index} is not on the pin board")
        self.index = index
        self._states = memoryview(mapped(fd, _STATE_BYTES)).cast("Q")
        self._row = memoryview(mapped(fd, SLOTS, offset=_STATE_BYTES + index * SLOTS))
        if registered is None:
            registered = _membarrier(_REGISTER_GLOBAL_EXPEDITED)
        #: Where the daemon's barrier does not reach us: taking a lock is one, or as good as one.
        self._fence = None if registered else threading.Lock()
        # Reentrant, since a signal handler may read a value too; each step leaves a state that another `pin` can stand.
        self._lock = threading.RLock()
        self._held: dict[int, list[int]] = {}  # slot -> [serial, number of pins]
        self._dropped: deque[int] = deque()
        #: Undo one `pin` of a slot. Called from `__del__`, in any thread, also inside the garbage collector.
        self.unpin: Callable[[int], None] = self._dropped.append
        self._next_serial = itertools.count((index << SERIAL_BITS) + 1).__next__

    def pin(self, slot: int, serial: int) -> bool:
        """Keep a copy where it is until `unpin`; False: it is not there any more, or about to go, so ask the daemon."""
        if not slot:
            return True
        with self._lock:
            if self._dropped:
                self.drain()
            held = self._held.get(slot)
            if held is not None:
                # It was in the slot before, or we have pinned it and its device was lost.
                if self._states[slot] != serial:
                    return False
                held[0] = serial  # what was there before is lost, and its pins go on for this one
                held[1] += 1
                return True
            self._row[slot] = 1
            if self._fence is not None:
                with self._fence:
                    pass
            if self._states[slot] == serial:
                self._held.setdefault(slot, [serial, 0])[1] += 1
                return True
            if slot not in self._held:
                self._row[slot] = 0
            return False

    def drain(self) -> None:
        """Let go of what was unpinned."""
        with self._lock:
            held, dropped = self._held, self._dropped
            while dropped:
                slot = dropped.popleft()
                record = held.get(slot)
                if record is None:  # slot 0, or from before `close`
                    continue
                record[1] -= 1
                if not record[1]:
                    del held[slot]
                    self._row[slot] = 0

    def drain_if_free(self) -> bool:
        """Do the same unless another thread is at it, or pins; tell whether it is done. For who holds other locks."""
        if self._dropped:
            if not self._lock.acquire(blocking=False):
                return False
            try:
                self.drain()
            finally:
                self._lock.release()
        return True

    @property
    def pinned(self) -> int:
        """Copies that this process has pinned, as far as was drained."""
        return len(self._held)

    def new_serial(self) -> int:
        """Return a serial for a copy that this process makes."""
        return self._next_serial()

    def publish(self, slot: int, serial: int) -> None:
        """Let a copy that this process has written, in a slot leased to it, be pinned from now on."""
        if slot:
            self._states[slot] = serial

    def close(self) -> None:
        """Drop all pins, and the mappings."""
        with self._lock:
            for slot in self._held:
                self._row[slot] = 0
            self.forget()

    def forget(self) -> None:
        """Drop the mappings and leave the pins alone: in a forked child they are its parent's. Nothing is pinned after."""
        self._lock = threading.RLock()  # a thread that exists only in the parent may hold it
        self._held = {}
        self._dropped.clear()
        self._row = memoryview(mmap.mmap(-1, SLOTS))
        self._states = memoryview(mmap.mmap(-1, _STATE_BYTES)).cast("Q")
