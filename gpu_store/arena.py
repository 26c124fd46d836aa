"""A process's share of one device's memory: leases chunks of the slab, hands out blocks, gives up what becomes an object.

Theory of operation. The device's slab is mapped in this process, and the node daemon says which of its bytes are ours. An
`allocate` is served from the first of these that can:

    cache    freed blocks of exactly this size, freed by the same stream: a dictionary and a list
    pool     all other free bytes that we lease, coalesced, best fit: an `ExtentAllocator` in which everything that is
             not ours counts as taken
    lease    a round trip to the daemon: a chunk for a small block, an extent of its own for a large one

Blocks are counted by Python's references. `Block.__del__` runs in any thread at any moment, the garbage collector's
included, so it only appends to `dead`; whoever next allocates, trims or asks drains it. Chunks grow with what the process
has (`CHUNK_SHARE`), which bounds what a half-used chunk can waste; free memory goes back to the daemon by `trim`, and by as
much as it helps before a large lease.

*Objects.* What a task returns becomes an object without a copy if nothing but the value referred to it. `claim` takes note
of a block without referring to it: when the block dies then, its memory waits for the claims on it instead of being
free. `sole` tells whether it died, `take` lets it leave the arena (the daemon accounts for it from then on), and
`release` ends a claim. A block that still lives is copied; while a claim on it stands, its memory is not used again.

*Streams.* Emulated arrays are computed when a call returns. With CUDA a freed block may still be in use by kernels in the
stream it was allocated for, so the cache is kept by stream, the pool remembers the one stream (if any) that may use it as
it is, and for any other the device is synchronised first, as it is before memory leaves this process. The pins of stored
memory that died are given up then as well (`retire`).
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from afield.errors import OutOfDeviceMemoryError
from afield.gpu_store.backends.base import Device, DeviceUsageError, Slab, Stream
from afield.gpu_store.blocks import ALIGNMENT, ArenaStats, Block, Claim
from afield.gpu_store.extents import ExtentAllocator
from afield.gpu_store.tiers import FIRST_LIFE

MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 2 << 20, 32 << 20
#: A chunk is at most this part of what the process has leased so far, and may have given up to objects since ...
CHUNK_SHARE = 32
#: ... and of the slab.
MAX_SLAB_SHARE = 64
#: A block above this part of the next chunk gets an extent of its own.
ALONE_SHARE = 4
#: A process that asks for more keeps this part of what it leases in reserve, and gives larger free ranges back.
IDLE_SHARE = 8
#: Stands for the stream of `DeviceArena.copy`.
COPIES = -1
#: Blocks in the cache, and sizes that it remembers. What lies there does not coalesce: a loop of mixed sizes leased a
#: quarter more with thousands, 3 % more with 64.
MAX_CACHED = 16


class DeviceArena:
    """One process's share of one device's slab; usable from any thread.

    Args:
        device: the device, open in this process.
        slab: its memory, mapped here.
        arena: the slab's number on this node.
        lease: blocks until an extent of the given size in bytes is granted; returns its (offset, size), multiples of
            ALIGNMENT; raises OutOfDeviceMemoryError.
        give_back: returns an unused (offset, size) to the daemon, without blocking; may be called from any thread.
        check: raises what stands against using the device (it was lost).
        lease_now: as `lease`, but refuses what it would have to wait for; `lease` by default.
        lease_ahead: asks for as many bytes without waiting; what is granted, if anything, comes by `put_back`.
        current_stream: the stream of this thread that arrays compute in, by a number of its own; None where
            computations are complete when a call returns.
        life: which of the arena's lives this is.
    """

    def __init__(
        self,
        device: Device,
        slab: Slab,
        arena: int,
        lease: Callable[[int], tuple[int, int]],
        give_back: Callable[[int, int], None],
        check: Callable[[], None] = lambda: None,
        *,
        lease_now: Callable[[int], tuple[int, int]] | None = None,
        lease_ahead: Callable[[int], None] | None = None,
        current_stream: Callable[[], int] | None = None,
        life: int = FIRST_LIFE,
    ) -> None:
        self.device = device
        self.life = life
        self.slab = slab
        self.arena = arena
        self.check = check
        #: (offset, size, stream) of blocks that died and claims that were released; appended to at any moment.
        self.dead: deque[tuple[int, int, int] | Claim] = deque()
        #: Copied into, or kept as, objects; counted by whoever packs values.
        self.bytes_born = 0
        self.bytes_copied = 0
        self._lease = lease
        self._lease_now = lease if lease_now is None else lease_now
        self._lease_ahead = lease_ahead
        #: The size of the last extent that was leased for one block, and whether that was the size before as well.
        self._alone, self._again = 0, False
        self._give_back = give_back
        self._current_stream = current_stream
        memory = getattr(slab, "memory", None)
        self._readable = None if memory is None else memoryview(memory).toreadonly()
        self._lock = threading.RLock()
        self._busy = False
        self._cache: dict[tuple[int, int], list[int]] = {}
        self._cached = 0
        self._pool = ExtentAllocator(slab.size_bytes, ALIGNMENT)
        self._pool.allocate(slab.size_bytes)
        #: The one stream that may use the pool as it is; None: any.
        self._pool_stream: int | None = None
        self._claims: dict[int, Claim] = {}
        self._leased = self._turnover = self._used = self._round_trips = 0
        self._retired: deque[tuple[Callable[[Any], None], Any]] = deque()
        #: A stream for each thread that copies: whoever waits for his own copies hears of their failure, and of no others'.
        self._copies = threading.local()

    # ---- allocating ----------------------------------------------------------------------------------------------

    def allocate(self, size: int, stream: int | None = None) -> Block:
        """Return a block of at least `size` bytes, which are undefined; waits where the daemon has to make room.

        It is for work in this thread's current stream, unless `stream` says otherwise (`COPIES`, for `copy`). Raises
        OutOfDeviceMemoryError with the arithmetic, and what `check` raises.
        """
        size = (size + ALIGNMENT - 1) & -ALIGNMENT or ALIGNMENT
        if self._current_stream is None:
            stream = 0
        elif stream is None:
            stream = self._current_stream()
        with self._lock:
            if self._busy:
                raise self._reentered()
            self._busy = True
            try:
                if self.dead:
                    self._drain()
                same_size = self._cache.get((size, stream))
                if same_size:
                    offset: int | None = same_size.pop()
                    self._cached -= 1
                else:
                    offset = self._carve(size, stream)
                if offset is not None:
                    self._used += size
            finally:
                self._busy = False
        if offset is None:
            offset = self._lease_block(size, stream)
        return Block(self, offset, size, stream)

    def _carve(self, size: int, stream: int) -> int | None:
        """Take `size` bytes from what is free here; what the cache holds is coalesced when nothing else fits."""
        offset = self._from_pool(size, stream)
        if offset is None and self._cached:
            self._flush(stream)
            offset = self._from_pool(size, stream)
        return offset

    def _from_pool(self, size: int, stream: int) -> int | None:
        if self._pool_stream is not None and self._pool_stream != stream:
            if self._pool.largest_free < size:
                return None
            self._wait()
        return self._pool.allocate(size)

    def _lease_block(self, size: int, stream: int) -> int:
        self.check()
        chunk = self._next_chunk()
        alone = size * ALONE_SHARE > chunk
        if alone:
            self._alone, self._again = size, size == self._alone
        self._give_up_reserve()
        if self._used + size <= self.slab.size_bytes:
            if not alone:
                # A chunk is for what may follow: that is not worth waiting for.
                with contextlib.suppress(OutOfDeviceMemoryError):
                    return self._granted(size, *self._lease_now(chunk))
            try:
                return self._granted(size, *self._lease(size))
            except OutOfDeviceMemoryError:
                offset = self._collected(size, stream)
                if offset is not None:
                    return offset
                if not self.trim():
                    raise
        else:
            offset = self._collected(size, stream)
            if offset is not None:
                return offset
            self.trim()
        # What this process uses comes free by nobody's waiting.
        fits = self._used + size <= self.slab.size_bytes
        return self._granted(size, *(self._lease if fits else self._lease_now)(size))

    def _collected(self, size: int, stream: int) -> int | None:
        """Try once more without arrays in reference cycles, which hold memory that nobody can use."""
        gc.collect()
        with _Entered(self):
            offset = self._carve(size, stream)
            if offset is not None:
                self._used += size
        return offset

    def _next_chunk(self) -> int:
        """Return how much to lease for a small block and those that follow it."""
        wanted = min(max(self._turnover // CHUNK_SHARE, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
        return max(min(wanted, self.slab.size_bytes // MAX_SLAB_SHARE) & -ALIGNMENT, ALIGNMENT)

    def _granted(self, size: int, offset: int, granted: int) -> int:
        with _Entered(self):
            self._leased += granted
            self._turnover += granted
            self._used += size
            self._round_trips += 1
            if granted > size:
                self._pool.free(offset + size, granted - size)
        return offset

    # ---- freeing -------------------------------------------------------------------------------------------------

    def trim(self, least_bytes: int = ALIGNMENT) -> int:
        """Give memory that nothing uses back to the daemon, in ranges of `least_bytes` or more; return how many bytes.

        Waits for the device where something was freed in a stream; raises what the device raises.
        """
        self.synchronize()
        with _Entered(self):
            self._flush(None)
            pieces = self._shed(self._leased, least_bytes)
        return self._return(pieces)

    def _give_up_reserve(self) -> None:
        """More is to be leased: what is free here and of no use for that may be of use to others."""
        with _Entered(self):
            pieces = self._shed(self._leased - self._used - self._leased // IDLE_SHARE, self._next_chunk())
        self._return(pieces)

    def _shed(self, limit: int, least: int) -> list[tuple[int, int]]:
        """Take the largest free ranges, of `least` bytes or more, out of the arena until they add up to `limit` bytes."""
        if self._pool_stream is not None:
            self._wait()
        pieces = []
        while limit > 0 and (size := self._pool.largest_free) >= least:
            offset = self._pool.allocate(size)
            assert offset is not None
            pieces.append((offset, size))
            self._leased -= size
            limit -= size
        return pieces

    def _return(self, pieces: list[tuple[int, int]]) -> int:
        for offset, size in pieces:
            self._give_back(offset, size)
        return sum(size for _, size in pieces)

    def _drain(self) -> None:
        dead, claims = self.dead, self._claims
        while dead:
            entry = dead.popleft()
            if isinstance(entry, Claim):
                self._end(entry)
                continue
            offset, size, stream = entry
            if claims and offset in claims:
                claims[offset].dead = True
            else:
                self._put(offset, size, stream)

    def _put(self, offset: int, size: int, stream: int) -> None:
        """Free bytes that were used."""
        self._used -= size
        key = size, stream
        same_size = self._cache.get(key)
        if same_size is not None:
            same_size.append(offset)
        else:
            self._cache[key] = [offset]
        self._cached += 1
        if self._cached > MAX_CACHED or len(self._cache) > MAX_CACHED:
            self._flush(stream)

    def _flush(self, stream: int | None) -> None:
        """Coalesce what the cache holds; `stream` is the one that asks for memory, None: somebody else does."""
        if self._current_stream is not None:
            freed_in = {key[1] for key, offsets in self._cache.items() if offsets}
            if self._pool_stream is not None:
                freed_in.add(self._pool_stream)
            if freed_in == {stream}:
                self._pool_stream = stream
            elif freed_in:
                self._wait()
        for (size, _), offsets in self._cache.items():
            for offset in offsets:
                self._pool.free(offset, size)
        self._cache.clear()
        self._cached = 0

    def _wait(self) -> None:
        self.device.synchronize()
        self._pool_stream = None

    # ---- memory that becomes objects -----------------------------------------------------------------------------

    def claim(self, block: Block) -> Claim:
        """Note that the memory of `block`, of this arena, may become an object; ends with `release`."""
        with _Entered(self):
            claim = self._claims.get(block.offset)
            if claim is None:
                claim = self._claims[block.offset] = Claim(block)
            else:
                claim.count += 1
            return claim

    def take(self, claim: Claim, offset: int, size: int) -> bool:
        """Let `size` bytes at `offset` of a block that is solely claimed leave the arena; the rest of it is free.

        The daemon must hear of them: sealed or given back, rounded up to ALIGNMENT. Returns False, and changes nothing, where
        somebody else has the block.
        """
        end = offset + size + (-size) % ALIGNMENT
        block_end = claim.offset + claim.size
        assert claim.offset <= offset < end <= block_end, (claim.offset, offset, size)
        assert offset % ALIGNMENT == 0
        with _Entered(self):
            if not _is_sole(claim):
                return False
            claim.taken = True
            # Its address may begin another block from here on.
            del self._claims[claim.offset]
            self._gone(end - offset)
            if offset > claim.offset:
                self._put(claim.offset, offset - claim.offset, claim.stream)
            if end < block_end:
                self._put(end, block_end - end, claim.stream)
            ahead = self._again and claim.size == self._alone > self._pool.largest_free
        if ahead and self._lease_ahead is not None:
            # Large results of one size follow one another: the next one shall find its memory here.
            self._lease_ahead(claim.size)
        return True

    def release(self, claim: Claim) -> None:
        """End a claim; memory that was not taken is free if nothing refers to its block. Never blocks."""
        self.dead.append(claim)

    def detach(self, block: Block) -> None:
        """Let all memory of a block leave the arena; as `take`, for a block of which the caller has the only reference."""
        with _Entered(self):
            size, block.size = block.size, 0
            self._gone(size)

    def put_back(self, offset: int, size: int) -> None:
        """Undo `take` or `detach` of bytes that the daemon has not heard of, or take what was leased ahead."""
        size += (-size) % ALIGNMENT
        stream = self._current_stream() if self._current_stream is not None else 0
        with _Entered(self):
            self._leased += size
            self._used += size
            self._put(offset, size, stream)

    def _gone(self, size: int) -> None:
        self._leased -= size
        self._used -= size

    def _end(self, claim: Claim) -> None:
        claim.count -= 1
        if claim.count == 0 and not claim.taken:
            del self._claims[claim.offset]
            if claim.dead:
                self._put(claim.offset, claim.size, claim.stream)

    def copy(self, source: Slab, source_offset: int, target_offset: int, size: int) -> None:
        """Copy bytes of this device into the slab; it has happened, or raised, when `finish` returns."""
        stream: Stream | None = getattr(self._copies, "stream", None)
        if stream is None:
            stream = self._copies.stream = self.device.new_stream()
        self.device.copy_within(source, source_offset, self.slab, target_offset, size, stream)

    def finish(self) -> None:
        """Wait for this thread's copies; raises what they raised."""
        stream: Stream | None = getattr(self._copies, "stream", None)
        if stream is not None:
            try:
                stream.synchronize()
            except BaseException:
                del self._copies.stream  # what failed has failed: the next copies are not blamed for it
                raise

    # ---- stored memory -------------------------------------------------------------------------------------------

    def view(self, offset: int, size: int) -> memoryview:
        """Return `size` bytes at `offset` of the slab as read-only host memory.

        Raises DeviceUsageError where the host cannot see device memory.
        """
        if self._readable is None:
            raise DeviceUsageError(f"the memory of device {self.slab.device_uuid} cannot be seen by the host: copy it")
        return self._readable[offset : offset + size]

    def retire(self, callback: Callable[[Any], None], view_pin: Any) -> None:
        """Call `callback(view_pin)` as soon as no work that was begun can use stored memory any more; never blocks."""
        if self._current_stream is None:
            callback(view_pin)
        else:
            self._retired.append((callback, view_pin))

    def synchronize(self) -> None:
        """Wait for what arrays compute, and then retire what died before; raises what the device raises.

        A worker calls this at the end of a task, so that pins end with the task that made them.
        """
        if self._current_stream is None:
            return
        count = len(self._retired)
        self.device.synchronize()
        for _ in range(count):
            callback, view_pin = self._retired.popleft()
            callback(view_pin)

    # ---- the rest ------------------------------------------------------------------------------------------------

    def stats(self) -> ArenaStats:
        """Return what the process holds now."""
        with _Entered(self):
            return ArenaStats(self._leased, self._used, self._round_trips, self.bytes_born, self.bytes_copied)

    def _enter(self) -> None:
        self._lock.acquire()
        if self._busy:
            self._lock.release()
            raise self._reentered()
        self._busy = True
        if self.dead:
            try:
                self._drain()
            except BaseException:
                self._leave()
                raise

    def _leave(self) -> None:
        self._busy = False
        self._lock.release()

    def _reentered(self) -> DeviceUsageError:
        return DeviceUsageError(
            f"memory of device {self.slab.device_uuid} was asked for in a finaliser (or signal handler) that ran in the "
            "middle of another allocation: do not compute in __del__"
        )


class _Entered:
    """Have the books of an arena for oneself, up to date; a generator would cost as much as what is done inside."""

    __slots__ = ("_arena",)

    def __init__(self, arena: DeviceArena) -> None:
        self._arena = arena

    def __enter__(self) -> None:
        self._arena._enter()

    def __exit__(self, *_: object) -> None:
        self._arena._leave()


def _is_sole(claim: Claim) -> bool:
    """Tell whether nothing refers to the block any more, and nobody else claims it: then it may be taken."""
    return claim.dead and claim.count == 1 and not claim.taken
