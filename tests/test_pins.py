"""The pin board: slots and serials, what can be closed and what cannot, and the race of readers with the closer."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from afield.gpu_store import pins
from afield.gpu_store.pins import BOARD_BYTES, SERIAL_BITS, SLOTS, PinBoard, Pinner

PATIENCE_S = 20.0


@pytest.fixture
def fd() -> Iterator[int]:
    """The file of a board."""
    file = os.memfd_create("pins-of-a-test")
    os.ftruncate(file, BOARD_BYTES)
    yield file
    os.close(file)


@pytest.fixture
def board(fd: int) -> PinBoard:
    made = PinBoard(fd)
    made.add_process(1)
    made.add_process(2)
    return made


@contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """Run `work` in a process of its own beside the block; fails unless it ends well, or was killed by the block."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -9)


# -- one copy -----------------------------------------------------------------------------------------------------


def test_a_published_copy_can_be_pinned_and_not_closed(fd: int, board: PinBoard) -> None:
    slot, serial = board.take()
    reader = Pinner(fd, 1)
    assert slot and serial and not reader.pin(slot, serial)
    board.publish(slot, serial)
    assert reader.pin(slot, serial) and reader.pin(slot, serial) and reader.pinned == 1
    assert board.close([(slot, serial)]) == [False]
    reader.unpin(slot)
    reader.drain()
    assert board.close([(slot, serial)]) == [False]
    reader.unpin(slot)
    assert board.close([(slot, serial)]) == [False]  # only a note as yet
    reader.drain()
    assert board.close([(slot, serial)]) == [True]
    assert not reader.pin(slot, serial) and not reader.pinned


def test_a_copy_that_could_not_be_closed_can_be_pinned_again(fd: int, board: PinBoard) -> None:
    slot, serial = board.take()
    board.publish(slot, serial)
    first, second = Pinner(fd, 1), Pinner(fd, 2)
    assert first.pin(slot, serial)
    assert board.close([(slot, serial)]) == [False]
    assert second.pin(slot, serial)


def test_a_batch_is_closed_with_one_barrier(fd: int) -> None:
    passed: list[int] = []
    board = PinBoard(fd, lambda: passed.append(1))
    board.add_process(1)
    copies = [board.take() for _ in range(20)]
    for copy in copies:
        board.publish(*copy)
    reader = Pinner(fd, 1)
    assert reader.pin(*copies[3]) and reader.pin(*copies[17])
    assert board.close(copies) == [number not in (3, 17) for number in range(20)]
    assert len(passed) == 1
    assert board.close([]) == []


def test_slot_0_never_moves(fd: int, board: PinBoard) -> None:
    reader = Pinner(fd, 1)
    assert reader.pin(0, 7)
    reader.unpin(0)
    reader.drain()
    board.publish(0, 7)
    reader.publish(0, 7)
    assert board.close([(0, 7)]) == [False]
    board.release(0)
    assert board.take()[0] != 0


def test_an_old_serial_does_not_pin_what_is_in_the_slot_now(fd: int, board: PinBoard) -> None:
    slot, old = board.take()
    board.publish(slot, old)
    reader = Pinner(fd, 1)
    assert board.close([(slot, old)]) == [True]
    board.release(slot)
    again, new = board.take()
    assert again == slot and new != old
    board.publish(slot, new)
    assert not reader.pin(slot, old)
    assert reader.pin(slot, new)
    assert not reader.pin(slot, old)
    reader.unpin(slot)
    reader.drain()
    assert board.close([(slot, new)]) == [True]


def test_a_copy_made_by_a_process(fd: int, board: PinBoard) -> None:
    writer, reader = Pinner(fd, 1), Pinner(fd, 2)
    (slot,) = board.lease_slots(1, 1)
    serial = writer.new_serial()
    assert serial >> SERIAL_BITS == 1 and serial != writer.new_serial() != reader.new_serial()
    writer.publish(slot, serial)
    assert reader.pin(slot, serial)
    assert board.close([(slot, serial)]) == [False]


# -- slots --------------------------------------------------------------------------------------------------------


def test_slots_come_back(board: PinBoard) -> None:
    first, _ = board.take()
    leased = board.lease_slots(3, 1)
    assert len({first, *leased}) == 4 and board.in_use == 4
    board.adopt(leased[:1], 1)
    board.release(leased[0])
    board.release(first)
    assert board.in_use == 2
    assert {board.take()[0], board.take()[0]} == {first, leased[0]}


def test_slots_end(board: PinBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "SLOTS", 4)
    assert board.lease_slots(10, 1) == [1, 2, 3]
    assert board.take() == (0, 0) and board.lease_slots(1, 2) == []
    board.remove_process(1)
    assert {board.take()[0] for _ in range(3)} == {1, 2, 3}


def test_a_process_that_ends_leaves_what_it_did_not_use(fd: int, board: PinBoard) -> None:
    used, unused = board.lease_slots(2, 1)
    writer = Pinner(fd, 1)
    for slot in (used, unused):
        writer.publish(slot, writer.new_serial())
    board.adopt([used, 0], 1)
    board.remove_process(1)
    board.remove_process(1)  # nothing more
    assert board.in_use == 1
    assert board.take()[0] == unused
    reader = Pinner(fd, 2)
    assert not reader.pin(unused, (1 << SERIAL_BITS) + 2)
    assert reader.pin(used, (1 << SERIAL_BITS) + 1)


@pytest.mark.parametrize("slots", [[2], [1, 1], [1000]])
def test_slots_of_nobody(board: PinBoard, slots: list[int]) -> None:
    assert board.lease_slots(1, 1) == [1] and board.lease_slots(1, 2) == [2]
    with pytest.raises(ValueError, match="is not leased to process 1"):
        board.adopt(slots, 1)
    with pytest.raises(ValueError, match="is not leased to process 3"):
        board.adopt([1], 3)


@pytest.mark.parametrize("index", [0, -1, pins.MAX_PROCESSES])
def test_processes_that_cannot_be(fd: int, board: PinBoard, index: int) -> None:
    with pytest.raises(ValueError, match="process index"):
        board.add_process(index)
    with pytest.raises(ValueError, match="process index"):
        Pinner(fd, index)


def test_the_last_process_and_the_last_slot_are_on_the_board(fd: int) -> None:
    board = PinBoard(fd)
    last = pins.MAX_PROCESSES - 1
    board.add_process(last)
    board.publish(SLOTS - 1, 5)
    reader = Pinner(fd, last)
    assert reader.new_serial() < 1 << 64
    assert reader.pin(SLOTS - 1, 5)
    assert board.close([(SLOTS - 1, 5)]) == [False]
    board.remove_process(last)
    assert board.close([(SLOTS - 1, 5)]) == [True]


def test_the_board_takes_little_memory_and_few_files(fd: int) -> None:
    files = len(os.listdir("/proc/self/fd"))
    board = PinBoard(fd)
    for index in range(1, 200):
        board.add_process(index)
    assert len(os.listdir("/proc/self/fd")) - files <= 5
    slot, serial = board.take()
    board.publish(slot, serial)
    assert board.close([(slot, serial)]) == [True]
    assert os.fstat(fd).st_blocks * 512 < 2 << 20
    for index in range(1, 200):
        board.remove_process(index)
    assert len(os.listdir("/proc/self/fd")) - files <= 1


# -- ends ---------------------------------------------------------------------------------------------------------


def test_close_drops_all_and_forget_nothing(fd: int, board: PinBoard) -> None:
    slot, serial = board.take()
    board.publish(slot, serial)
    parent, copy = Pinner(fd, 1), Pinner(fd, 1)
    assert parent.pin(slot, serial) and copy.pin(slot, serial)
    copy.forget()
    assert not copy.pin(slot, serial)
    copy.unpin(slot)
    copy.drain()
    assert board.close([(slot, serial)]) == [False]
    parent.close()
    assert board.close([(slot, serial)]) == [True]
    parent.unpin(slot)
    parent.drain()


def test_the_pins_of_a_killed_process_go_with_its_row(fd: int, board: PinBoard) -> None:
    slot, serial = board.take()
    board.publish(slot, serial)
    read, write = os.pipe()

    def hold() -> None:
        assert Pinner(fd, 2).pin(slot, serial)
        os.write(write, b"!")
        time.sleep(PATIENCE_S)

    with child(hold) as pid:
        assert os.read(read, 1) == b"!"
        os.kill(pid, 9)
    assert board.close([(slot, serial)]) == [False]
    board.remove_process(2)
    assert board.close([(slot, serial)]) == [True]
    os.close(read)
    os.close(write)


# -- the race -----------------------------------------------------------------------------------------------------


class Arena:
    """What closer and readers share besides the board: the present serial, which ones are closed, who saw what."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.words = np.frombuffer(mmap.mmap(-1, 4096), np.uint64)
        self.closed = np.frombuffer(mmap.mmap(-1, rounds + 4096), np.uint8)

    def read(self, fd: int, index: int, slot: int, registered: bool | None) -> None:
        """Pin whatever is there until told to stop; count pins, and pins of what was closed."""
        reader = Pinner(fd, index, registered=registered)
        words, closed = self.words, self.closed
        deadline = time.monotonic() + PATIENCE_S
        while not words[1] and time.monotonic() < deadline:
            serial = int(words[0])
            if reader.pin(slot, serial):
                for _ in range(3):
                    if closed[serial]:
                        words[8 + index] += 1
                words[16 + index] += 1
                reader.unpin(slot)
                reader.drain()

    def close(self, board: PinBoard, slot: int, seconds: float) -> int:
        """Publish and close one copy after the other; return how often one was pinned."""
        refused = 0
        deadline = time.monotonic() + seconds
        for serial in range(1, self.rounds):
            board.publish(slot, serial)
            self.words[0] = serial
            while not board.close([(slot, serial)])[0]:
                refused += 1
                if refused % 8 == 0:
                    time.sleep(0)
            self.closed[serial] = 1
            if time.monotonic() > deadline:
                break
        self.words[1] = 1
        return refused


@pytest.mark.parametrize("way", ["membarrier", "sleep", "fence"])
def test_never_pinned_and_closed(fd: int, way: str) -> None:
    """Real processes: what was closed is pinned by nobody, not even by who had begun before."""
    board = PinBoard(fd, (lambda: time.sleep(pins._SETTLE_S)) if way == "sleep" else None)
    for index in (1, 2):
        board.add_process(index)
    arena = Arena(1 << 20)
    slot, _ = board.take()
    registered = False if way == "fence" else None
    with child(lambda: arena.read(fd, 1, slot, registered)), child(lambda: arena.read(fd, 2, slot, registered)):
        refused = arena.close(board, slot, 0.6)
    assert arena.words[9:11].sum() == 0, "a copy was pinned after it was closed"
    assert arena.words[17:19].all() and refused, "they never met"


def test_threads_of_one_process_count_together(fd: int, board: PinBoard) -> None:
    slot, serial = board.take()
    board.publish(slot, serial)
    reader = Pinner(fd, 1)
    assert reader.pin(slot, serial)
    failed: list[Any] = []

    def work() -> None:
        for _ in range(2000):
            if not reader.pin(slot, serial):
                failed.append(slot)
            reader.unpin(slot)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.drain()
    assert not failed and board.close([(slot, serial)]) == [False]
    reader.unpin(slot)
    reader.drain()
    assert board.close([(slot, serial)]) == [True]


def test_a_copy_that_was_lost_while_pinned_cannot_be_pinned_again(fd: int, board: PinBoard) -> None:
    """Its slot goes to another copy, which the old pins keep in its place, too."""
    reader = Pinner(fd, 1)
    slot, _ = board.take()
    board.publish(slot, 7)
    assert reader.pin(slot, 7)
    board.release(slot)
    assert not reader.pin(slot, 7)
    assert board.take()[0] == slot
    board.publish(slot, 8)
    assert not reader.pin(slot, 7) and reader.pin(slot, 8)
    for closed in (False, False, True):
        reader.drain()
        assert board.close([(slot, 8)]) == [closed]
        reader.unpin(slot)


def test_without_membarrier_the_closer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "_membarrier", lambda command: False)
    began = time.monotonic()
    pins.make_barrier()()
    assert time.monotonic() - began >= pins._SETTLE_S
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    assert not pins._membarrier(0)


def test_holders_names_who_has_pinned_what(fd: int, board: PinBoard) -> None:
    first, second = Pinner(fd, 1), Pinner(fd, 2)
    board.add_process(1)
    board.add_process(2)
    places = [board.take() for _ in range(3)]
    for slot, serial in places:
        board.publish(slot, serial)
    slots = [slot for slot, _ in places]
    assert board.holders(slots) == {} and board.holders([]) == {}
    assert first.pin(*places[0]) and first.pin(*places[2]) and second.pin(*places[2])
    assert board.holders(slots) == {1: [True, False, True], 2: [False, False, True]}
    first.unpin(slots[2])
    first.drain()
    assert board.holders(slots) == {1: [True, False, False], 2: [False, False, True]}
    assert board.close(places) == [False, True, False]
