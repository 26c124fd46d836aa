"""A process's share of a device's slab: blocks, leases, streams, and memory that becomes objects.

`Books` plays the daemon. `churn` is the loop of mixed sizes that fragmentation is measured with.
"""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import pytest

from afield.errors import DeviceLostError, OutOfDeviceMemoryError
from afield.gpu_store.arena import MIN_CHUNK_BYTES, DeviceArena, _Entered, _is_sole
from afield.gpu_store.backends.base import Device, DeviceUsageError, Slab
from afield.gpu_store.backends.cuda import CudaBackend
from afield.gpu_store.backends.emulated import EmulatedBackend
from afield.gpu_store.blocks import ALIGNMENT, Block, Claim
from afield.gpu_store.extents import ExtentAllocator
from tests.device_helpers import emulated_devices
from tests.fake_cuda import libraries
from tests.test_device_backend import peer_process, read, unpack, write

MIB = 2**20
GIB = 2**30


class Books:
    """What the daemon knows: which bytes of the slab are free. An ExtentError here is a bug of the arena."""

    def __init__(self, capacity: int) -> None:
        self.extents = ExtentAllocator(capacity, ALIGNMENT)
        self.leases: list[int] = []
        self.given_back: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def lease(self, size: int) -> tuple[int, int]:
        with self._lock:
            offset = self.extents.allocate(size)
        if offset is None:
            raise OutOfDeviceMemoryError(f"no room for {size}")
        self.leases.append(size)
        return offset, self.extents.rounded(size)

    def give_back(self, offset: int, size: int) -> None:
        self.given_back.append((offset, size))
        with self._lock:
            self.extents.free(offset, size)

    def free(self, size_bytes: int, offset: int) -> None:
        """An object is freed."""
        self.extents.free(offset, self.extents.rounded(size_bytes))


@contextmanager
def arena_on(
    memory_bytes: int = 256 * MIB, *, backend: EmulatedBackend | CudaBackend | None = None, **options: Any
) -> Iterator[tuple[DeviceArena, Books]]:
    """An arena over all memory of an emulated device, or of the first device of `backend`."""
    machine = backend or EmulatedBackend.create(emulated_devices(1, memory_bytes))
    device = machine.open(machine.inventory()[0].uuid)
    slab = device.allocate_slab(memory_bytes)
    books = Books(slab.size_bytes)
    yield DeviceArena(device, slab, 1, books.lease, books.give_back, **options), books
    machine.close()


def sole(arena: DeviceArena, claim: Claim) -> bool:
    """Tell whether nothing refers to the block of a claim any more, and nobody else claims it."""
    with _Entered(arena):
        return _is_sole(claim)


def churn(arena: DeviceArena, count: int, live: int, size: Callable[[random.Random], int], seed: int = 1) -> float:
    """Replace one of `live` random blocks by one of another size, `count` times; return the median time in seconds.

    The blocks that live at the end are on `arena` until the caller drops them: they are kept in `churn.blocks`.
    """
    rng = random.Random(seed)
    blocks: list[Block] = []
    times = []
    for _ in range(count):
        if len(blocks) == live:
            index = rng.randrange(live)
            blocks[index], blocks[-1] = blocks[-1], blocks[index]
            blocks.pop()
        wanted = size(rng)
        start = time.perf_counter()
        block = arena.allocate(wanted)
        times.append(time.perf_counter() - start)
        blocks.append(block)
    churn.blocks = blocks  # type: ignore[attr-defined]
    return median(times)


def uniform(rng: random.Random) -> int:
    return rng.randrange(1, 4 * MIB)


def logarithmic(rng: random.Random) -> int:
    return int(2 ** rng.uniform(9, 24))


def test_large_blocks_that_leave_one_after_the_other_are_leased_ahead() -> None:
    asked: list[int] = []
    with arena_on(lease_ahead=asked.append) as (arena, books):

        def make() -> tuple[int, int]:
            block = arena.allocate(40 * MIB)
            claim, offset = arena.claim(block), block.offset
            del block
            assert sole(arena, claim) and arena.take(claim, offset, 40 * MIB)
            arena.release(claim)
            return offset, 40 * MIB

        books.free(*reversed(make()))
        assert asked == []  # one is no habit
        books.free(*reversed(make()))
        assert asked == [40 * MIB]
        arena.put_back(*books.lease(asked.pop()))
        trips = arena.stats().round_trips
        books.free(*reversed(make()))
        assert arena.stats().round_trips == trips and asked == [40 * MIB]  # and so on
        arena.trim()
        assert arena.stats().leased_bytes == 0


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_a_block_is_aligned_and_its_memory_is_reused() -> None:
    with arena_on() as (arena, books):
        block = arena.allocate(1000)
        assert (block.size, block.arena, block.address) == (1024, 1, arena.slab.address + block.offset)
        assert block.offset % ALIGNMENT == 0
        where = block.offset
        del block
        assert arena.allocate(1024).offset == where
        assert arena.allocate(0).size == ALIGNMENT
        assert books.leases == [MIN_CHUNK_BYTES]
        assert arena.stats().used_bytes == 0


def test_large_blocks_get_extents_of_their_own_and_are_reused() -> None:
    with arena_on() as (arena, books):
        block = arena.allocate(64 * MIB)
        assert books.leases == [64 * MIB]
        del block
        blocks = [arena.allocate(32 * MIB) for _ in range(2)]
        del blocks
        again = arena.allocate(64 * MIB)
        assert books.leases == [64 * MIB]
        del again


def test_chunks_grow_with_use_and_stay_small_on_a_small_slab() -> None:
    with arena_on(8 * GIB) as (arena, books):
        blocks = [arena.allocate(100_000) for _ in range(10_000)]
        assert books.leases[0] == MIN_CHUNK_BYTES
        assert 16 * MIB <= max(books.leases) <= 32 * MIB
        assert len(books.leases) < 200
        del blocks
    with arena_on(2 * MIB) as (arena, books):
        block = arena.allocate(10)
        assert books.leases == [2 * MIB // 64]
        del block


def test_trim_gives_back_all_that_is_free() -> None:
    with arena_on() as (arena, books):
        blocks = [arena.allocate(size) for size in (1, 5000, 3 * MIB, 40 * MIB)]
        kept = blocks[1]
        del blocks
        leased = arena.stats().leased_bytes
        assert arena.trim() == leased - kept.size
        assert arena.stats().leased_bytes == books.extents.used == kept.size
        del kept
        arena.trim()
        assert books.extents.used == 0
        assert arena.trim() == 0


def test_trim_of_large_ranges_only() -> None:
    with arena_on() as (arena, books):
        large, small = arena.allocate(16 * MIB), arena.allocate(10)
        del large
        assert arena.trim(4 * MIB) == 16 * MIB
        assert books.extents.used == MIN_CHUNK_BYTES
        del small


def test_what_is_free_here_goes_back_before_more_is_leased() -> None:
    with arena_on(128 * MIB) as (arena, books):
        block = arena.allocate(100 * MIB)
        del block
        block = arena.allocate(110 * MIB)  # fits only if the first is given back
        assert books.extents.used == 110 * MIB
        del block


def test_out_of_memory_collects_garbage_first() -> None:
    with arena_on(64 * MIB) as (arena, _):

        class Cycle:
            def __init__(self) -> None:
                self.block = arena.allocate(48 * MIB)
                self.me = self

        gc.disable()
        try:
            Cycle()
            block = arena.allocate(48 * MIB)
        finally:
            gc.enable()
        with pytest.raises(OutOfDeviceMemoryError):
            arena.allocate(48 * MIB)
        assert arena.stats().used_bytes == block.size


def test_a_chunk_that_does_not_fit_is_not_insisted_on() -> None:
    with arena_on(128 * MIB) as (arena, books):
        filler = books.extents.allocate(128 * MIB - 4096)
        assert filler is not None
        assert arena.allocate(1000).size == 1024
        assert books.leases == [1024]


def test_nobody_waits_for_a_chunk() -> None:

    def lease_now(size: int) -> tuple[int, int]:
        raise OutOfDeviceMemoryError(f"{size} bytes only by waiting")

    with arena_on(128 * MIB, lease_now=lease_now) as (arena, books):
        assert arena.allocate(1000).size == 1024
    assert books.leases == [1024]


def test_check_is_asked_before_a_lease() -> None:
    def lost() -> None:
        raise DeviceLostError("gone")

    with arena_on(check=lost) as (arena, _), pytest.raises(DeviceLostError):
        arena.allocate(1)


def test_an_allocation_within_an_allocation_is_refused() -> None:
    """A finaliser that the collector runs in the middle of the books' own work."""
    with arena_on() as (arena, _):
        raised = []

        def reenter(*_: Any) -> None:
            try:
                arena.allocate(1)
            except DeviceUsageError as error:
                raised.append(str(error))

        arena._carve, carve = reenter, arena._carve  # type: ignore[method-assign, assignment]
        arena.allocate(1)
        arena._carve = carve  # type: ignore[method-assign]
        assert "__del__" in raised[0]


def test_threads_never_share_bytes() -> None:
    with arena_on(64 * MIB) as (arena, books):
        memory: Any = arena.slab.memory  # type: ignore[attr-defined]
        wrong: list[int] = []

        def work(number: int) -> None:
            rng = random.Random(number)
            blocks: list[Block] = []
            for _ in range(400):
                block = arena.allocate(rng.randrange(1, 60_000))
                memory[block.offset : block.offset + block.size] = number
                blocks.append(block)
                if len(blocks) > 10:
                    gone = blocks.pop(rng.randrange(len(blocks)))
                    if (memory[gone.offset : gone.offset + gone.size] != number).any():
                        wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert arena.stats().used_bytes == 0
        arena.trim()
        assert books.extents.used == 0


def test_mixed_sizes_leave_little_fragmentation() -> None:
    with arena_on(8 * GIB) as (arena, books):
        churn(arena, 25_000, 1000, uniform)
        stats = arena.stats()
        assert stats.fragmentation < 0.15
        assert stats.round_trips < 400
        churn.blocks.clear()  # type: ignore[attr-defined]
        churn(arena, 25_000, 1000, logarithmic)
        # Sizes over five orders of magnitude: what is not in use now and then is kept, and can go back in useful pieces.
        arena.trim(MIN_CHUNK_BYTES)
        assert arena.stats().fragmentation < 0.15
        assert arena.stats().leased_bytes == books.extents.used
        churn.blocks.clear()  # type: ignore[attr-defined]
        arena.trim()
        assert books.extents.used == 0


def test_a_block_of_a_known_size_is_quick() -> None:
    """A few times what it takes on an idle machine (1 µs)."""
    with arena_on() as (arena, _):
        blocks = [arena.allocate(4096) for _ in range(8)]
        blocks.clear()
        times = []
        for _ in range(200):
            start = time.perf_counter()
            for _ in range(50):
                arena.allocate(4096)
            times.append((time.perf_counter() - start) / 50)
        assert median(times) < 10e-6


# ---- memory that becomes objects ------------------------------------------------------------------------------------


def test_a_dead_claimed_block_is_taken_in_part() -> None:
    with arena_on() as (arena, books):
        block = arena.allocate(1 * MIB)
        claim, start = arena.claim(block), block.offset
        assert not sole(arena, claim)
        del block
        assert sole(arena, claim)
        arena.take(claim, start + ALIGNMENT, 1000)
        arena.release(claim)
        stats = arena.stats()
        assert (stats.used_bytes, stats.leased_bytes) == (0, 1 * MIB - 1024)
        arena.trim()
        assert books.extents.used == 1024
        books.free(1000, start + ALIGNMENT)


def test_a_claimed_block_is_not_reused_before_the_release() -> None:
    with arena_on() as (arena, _):
        block = arena.allocate(4096)
        claim, where = arena.claim(block), block.offset
        del block
        other = arena.allocate(4096)
        assert other.offset != where
        arena.release(claim)
        assert arena.allocate(4096).offset == where
        assert arena.stats().used_bytes == other.size


def test_a_claim_on_a_living_block_changes_nothing() -> None:
    with arena_on() as (arena, _):
        block = arena.allocate(4096)
        claim = arena.claim(block)
        arena.release(claim)
        assert arena.stats().used_bytes == 4096
        del block
        assert arena.stats().used_bytes == 0


def test_two_claims_and_nobody_may_take() -> None:
    with arena_on() as (arena, _):
        block = arena.allocate(4096)
        first, second = arena.claim(block), arena.claim(block)
        del block
        assert not sole(arena, first)
        arena.release(second)
        assert sole(arena, first)
        arena.release(first)
        assert arena.stats().used_bytes == 0


def test_memory_before_what_was_taken_is_free_at_once() -> None:
    """Another block may start where the claimed one did, and die before the claim is released."""
    with arena_on() as (arena, _):
        block = arena.allocate(4096)
        claim, start = arena.claim(block), block.offset
        del block
        arena.take(claim, start + 2048, 2048)
        assert arena.allocate(2048).offset == start
        arena.release(claim)
        assert arena.stats().used_bytes == 0


def test_what_was_taken_can_be_put_back() -> None:
    with arena_on() as (arena, books):
        block = arena.allocate(5000)
        where = block.offset
        arena.detach(block)
        del block
        assert arena.stats().used_bytes == 0
        arena.put_back(where, 5000)
        assert arena.allocate(5000).offset == where
        arena.trim()
        assert books.extents.used == 0


def test_copies_happen_on_the_device() -> None:
    with arena_on() as (arena, _):
        source, target = arena.allocate(1000), arena.allocate(1000)
        write(arena.device, arena.slab, source.offset, b"bytes")
        arena.copy(arena.slab, source.offset, target.offset, 5)
        arena.finish()
        assert read(arena.device, arena.slab, target.offset, 5) == b"bytes"
        assert bytes(arena.view(target.offset, 5)) == b"bytes"
        with pytest.raises(TypeError):
            arena.view(target.offset, 5)[0] = 1


def test_an_arena_over_a_slab_of_another_process() -> None:
    backend = EmulatedBackend.create(emulated_devices(1, 64 * MIB))
    device = backend.open(backend.inventory()[0].uuid)
    with peer_process(backend.address) as peer:
        slab = device.import_slab(unpack(peer.do("allocate", device, size=64 * MIB)))
        books = Books(slab.size_bytes)
        arena = DeviceArena(device, slab, 1, books.lease, books.give_back)
        block = arena.allocate(1000)
        np.frombuffer(slab.memory, np.uint8)[block.offset : block.offset + 5] = list(b"hello")
        assert peer.do("read", device, slab=0, offset=block.offset, size=5) == "hello"
    backend.close()


# ---- streams --------------------------------------------------------------------------------------------------------


class Streams:
    """A device on which the test says what the current stream is; counts synchronisations."""

    def __init__(self) -> None:
        self.current = 0
        self.backend = CudaBackend(libraries())
        self.calls: list[str] = self.backend.libraries.runtime.calls

    @property
    def waits(self) -> int:
        return self.calls.count("deviceSynchronize")

    @contextmanager
    def arena(self) -> Iterator[tuple[DeviceArena, Books]]:
        with arena_on(64 * MIB, backend=self.backend, current_stream=lambda: self.current) as found:
            yield found


def test_a_stream_reuses_its_own_blocks_without_waiting() -> None:
    streams = Streams()
    with streams.arena() as (arena, _):
        where = arena.allocate(4096).offset
        assert arena.allocate(4096).offset == where
        assert streams.waits == 0


def test_another_stream_waits_for_the_device_first() -> None:
    streams = Streams()
    with streams.arena() as (arena, _):
        where = arena.allocate(60 * MIB).offset
        streams.current = 7
        assert arena.allocate(60 * MIB).offset == where
        assert streams.waits == 1
        # Coalesced by stream 7: it may go on using the bytes, stream 8 may not.
        block = arena.allocate(30 * MIB)
        assert (block.offset, streams.waits) == (where, 1)
        streams.current = 8
        block = arena.allocate(20 * MIB)
        assert (block.offset, streams.waits) == (where + 30 * MIB, 2)


def test_memory_is_given_back_after_the_device_is_done_with_it() -> None:
    streams = Streams()
    with streams.arena() as (arena, books):
        arena.allocate(4096)
        given_back_after: list[int] = []
        arena._give_back = lambda offset, size: given_back_after.append(streams.waits)
        arena.trim()
        assert min(given_back_after) >= 1
        assert books.leases


def test_pins_are_given_up_after_the_device_is_done_with_them() -> None:
    streams = Streams()
    with streams.arena() as (arena, _):
        retired: list[str] = []
        arena.retire(retired.append, "part")
        assert not retired
        arena.synchronize()
        assert retired == ["part"]
        assert streams.waits == 1
    with arena_on() as (arena, _):
        arena.retire(retired.append, "another")
        assert retired == ["part", "another"]


def test_device_memory_that_the_host_cannot_see() -> None:
    with Streams().arena() as (arena, _), pytest.raises(DeviceUsageError, match="host"):
        arena.view(0, 1)


def test_stream_books_survive_anything() -> None:
    """Random blocks in random streams: no two that live overlap, and all comes back."""
    streams, rng = Streams(), random.Random(3)
    with streams.arena() as (arena, books):
        blocks: list[Block] = []
        for step in itertools.count():
            streams.current = rng.randrange(3)
            if rng.random() < 0.6 and len(blocks) < 100:
                blocks.append(arena.allocate(rng.choice([1, 600, 5000, 70_000, 400_000])))
            elif blocks:
                blocks.pop(rng.randrange(len(blocks)))
            if step % 100 == 0:
                ends = sorted((block.offset, block.offset + block.size) for block in blocks)
                assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
                assert arena.stats().used_bytes == sum(block.size for block in blocks)
            if step == 3000:
                break
        blocks.clear()
        arena.trim()
        assert books.extents.used == 0


def _protocols(device: Device, slab: Slab) -> DeviceArena:
    """The arena is content with the protocols: for the type checker."""
    return DeviceArena(device, slab, 1, lambda size: (0, size), lambda offset, size: None)
