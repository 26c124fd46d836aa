"""Notes to the daemon in shared memory: in order, whole, bounded, and there after their writer has died."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Iterator

import numpy as np
import pytest

import afield
from afield.gpu_store import rings
from afield.gpu_store.pins import BOARD_BYTES
from afield.gpu_store.rings import RING_BYTES, SHARED_BYTES, Rings, RingWriter
from tests.helpers import poll

MIB = 1 << 20


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("rings")
    os.ftruncate(fd, SHARED_BYTES)
    yield fd
    os.close(fd)


def test_records_arrive_once_in_order_and_whole_around_the_end(fd: int) -> None:
    reader, dice = Rings(fd), random.Random(7)
    writers = {index: RingWriter(fd, index) for index in (1, 2, 65)}
    for index in writers:
        reader.add(index)
    sent: dict[int, list[bytes]] = {index: [] for index in writers}
    received: dict[int, list[bytes]] = {index: [] for index in writers}
    for _ in range(20_000):
        index = dice.choice(list(writers))
        record = dice.randbytes(dice.choice((0, 1, 7, 8, 90, 3000)))
        if writers[index].put(record):
            sent[index].append(record)
        else:
            for who, taken in reader.take():
                received[who].append(taken)
    for who, taken in reader.take():
        received[who].append(taken)
    assert received == sent and sum(map(len, sent.values())) > 15_000
    assert list(reader.take()) == []


def test_a_full_ring_refuses_and_has_room_again(fd: int) -> None:
    reader, writer = Rings(fd), RingWriter(fd, 3)
    reader.add(3)
    count = 0
    while writer.put(b"x" * 1000):
        count += 1
    assert RING_BYTES // 1100 < count < RING_BYTES // 1000
    assert not writer.put(b"y" * RING_BYTES)
    assert len(list(reader.take())) == count
    assert writer.put(b"x" * 1000)


def test_a_record_that_is_not_there_yet_is_read_at_the_next_look(fd: int) -> None:
    reader, writer = Rings(fd), RingWriter(fd, 1)
    reader.add(1)
    assert writer.put(b"first") and writer.put(b"second")
    place = BOARD_BYTES + RING_BYTES + rings._HEADER_BYTES + 16  # of the second record
    whole = os.pread(fd, 16, place)
    os.pwrite(fd, struct.pack("<II", 0, 0) + whole[8:], place)
    os.pwrite(fd, b"\xff", place + 4)  # as if only part of it could be seen
    assert list(reader.take()) == [(1, b"first")]
    os.pwrite(fd, whole, place)
    assert list(reader.take()) == [(1, b"second")]


def test_who_ended_is_forgotten_and_leaves_no_memory(fd: int) -> None:
    reader, writer = Rings(fd), RingWriter(fd, 9)
    reader.add(9)
    assert writer.put(b"last words")
    assert list(reader.take()) == [(9, b"last words")]
    reader.remove(9)
    assert writer.put(b"nobody hears this")
    assert list(reader.take()) == []


def test_what_a_worker_made_outlives_it(runtime: afield.ClusterInfo) -> None:
    """The result's note is the last thing that the worker leaves: no message follows it."""

    @afield.remote
    class Maker:
        def make(self, i: int) -> np.ndarray:
            return np.full(MIB, i)

    makers = [Maker.remote() for _ in range(3)]
    refs = [maker.make.remote(i) for i, maker in enumerate(makers)]
    afield.wait(refs, num_returns=len(refs))
    for maker in makers:
        afield.kill(maker)
    assert [int(afield.get(ref)[-1]) for ref in refs] == [0, 1, 2]
    del refs, makers, maker
    assert poll(lambda: not afield.memory(), 10)


@pytest.mark.parametrize("seed", range(30))
def test_damage_is_found_and_costs_one_ring(fd: int, seed: int) -> None:
    """The daemon once read a damaged ring for ever."""
    dice, reader = random.Random(seed), Rings(fd)
    writers = {index: RingWriter(fd, index) for index in (1, 2)}
    for index in writers:
        reader.add(index)
    writers[1].put(b"whole")
    kind = seed % 3
    if kind == 0:  # the number of what was written
        os.pwrite(fd, struct.pack("<Q", dice.choice([1, 3, 1 << 20, 1 << 63, (1 << 64) - 8])), BOARD_BYTES + RING_BYTES)
    elif kind == 1:  # all of it
        noise = (
            dice.choice([b"\xff", b"\x00", b"\x07"]) * (RING_BYTES - 64)
            if seed % 2
            else dice.randbytes(RING_BYTES - 64)
        )
        os.pwrite(fd, struct.pack("<Q", 8 * dice.randrange(2, 9000)), BOARD_BYTES + RING_BYTES)
        os.pwrite(fd, noise, BOARD_BYTES + RING_BYTES + 64)
    else:  # one record
        os.pwrite(fd, dice.randbytes(4), BOARD_BYTES + RING_BYTES + 64 + dice.choice([0, 4, 8]))
    found = []
    for _ in range(rings.MOST_LOOKS + 10):
        found += list(reader.take())
    assert len(found) <= RING_BYTES // 8 + 1
    writers[2].put(b"still heard")
    assert [record for index, record in reader.take() if index == 2] == [b"still heard"]


@afield.remote(max_retries=0)
def damage_own_ring() -> None:
    """Write into the ring of this worker, as a wild pointer would."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "afield-pins" in os.readlink(f"/proc/self/fd/{fd}"):
                index = int(os.environ["AFIELD_PROCESS_INDEX"])
                os.pwrite(int(fd), b"\xff" * RING_BYTES, BOARD_BYTES + index * RING_BYTES)
        except FileNotFoundError:
            pass
    time.sleep(60)


@pytest.mark.slow
def test_a_worker_whose_ring_is_damaged_is_ended_and_the_session_goes_on(no_runtime: None) -> None:
    with afield.init(num_cpus=2):
        with pytest.raises(afield.WorkerCrashedError, match="shared memory"):
            afield.get(damage_own_ring.remote(), timeout=60)
        array = np.arange(1 << 20)
        assert (afield.get(afield.put(array)) == array).all()
        assert afield.get(afield.remote(lambda: 3).remote(), timeout=60) == 3
