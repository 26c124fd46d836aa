"""A process's side of the host store: maps the slab, writes objects into leased extents, reads them in place.

Theory of operation. The node daemon owns the slab's free space (`residency`). A process leases a chunk of it at a time and
carves small objects out of the chunk without a round trip; a large object is leased exactly. The rest of a chunk goes back
when a new one is leased. What is written the caller makes known. Readers map the same slab read-only, so a value's buffers
are views of shared memory, and stay valid for as long as any of them lives: a `ViewPin` keeps the part in its place.

`empty` makes an array whose memory is an extent already ("born in the store"). If nothing but the returned value refers to
it when the value is stored, its memory becomes part of the object as it is; otherwise somebody could still write to it, and
the store copies.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from afield.gpu_store.shared_memory import mapped

ALIGNMENT = 64
#: An object above this size gets an extent of its own; smaller ones are carved out of chunks.
LARGE_BYTES = 4 << 20
#: A process that uses up its chunks gets larger ones, so that it asks less often; the first is small.
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 1 << 20, 32 << 20
#: No chunk takes more than this part of the store.
MAX_CHUNK_SHARE = 64

Piece = tuple[int, int]

_MADV_POPULATE_READ = 22
_BLOCK_BYTES = 1 << 20
#: Pages are asked for so many at a time, so that others get at the address space of the process in between.
_POPULATE_BYTES = 32 << 20
#: Called without the interpreter lock, as all that ctypes calls.
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Writable(Protocol):
    """What the store needs of a serialised value (`runtime.serialization.Serialized`)."""

    buffers: list[memoryview]

    @property
    def size(self) -> int: ...

    def write(self, target: memoryview, born: list[tuple[int, int] | None] | None = None) -> int: ...


class ViewPin:
    """What keeps one mapped part in its place; `on_death(view_pin)` is called when nothing uses the memory any more.

    `object_id` is set once the memory counts as a handle of its object.
    """

    __slots__ = ("__weakref__", "object_id", "on_death", "slot")

    def __init__(self, slot: int, object_id: bytes | None, on_death: Callable[[ViewPin], None]) -> None:
        self.slot = slot
        self.object_id = object_id
        self.on_death = on_death

    def __del__(self) -> None:
        self.on_death(self)


class SlabFile:
    """A descriptor of the slab, for those who map pieces of it again; it is closed when nobody can."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = -1  # for `__del__`, which is called too when there is no descriptor left
        self.fd = os.dup(fd)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class View(np.ndarray[Any, np.dtype[np.uint8]]):
    """Exports the memory of one part; its pin ends with the last view."""

    view_pin: Any = None
    #: The slab's file, and where in it the part begins; None for memory that may be written to.
    source: tuple[SlabFile, int] | None = None


class BornExtent:
    """An extent that backs an `empty` array. `claimed` while the store decides whether it may keep the memory."""

    __slots__ = ("claimed", "dead", "offset", "size")

    def __init__(self, offset: int, size: int) -> None:
        self.offset = offset
        self.size = size
        self.claimed = False
        self.dead = False


class HostStoreClient:
    """Leases, writes and reads.

    Args:
        fd: the slab's shared memory.
        capacity: its size in bytes.
        lease: blocks until an extent of the given size is granted, and returns its (offset, size); raises
            `ObjectStoreFullError`.
        give_back: returns an unused (offset, size) to the daemon; may be called from any thread and from `__del__`.
    """

    def __init__(
        self,
        fd: int,
        capacity: int,
        lease: Callable[[int], Piece],
        give_back: Callable[[int, int], None],
    ) -> None:
        self.capacity = capacity
        self._file = SlabFile(fd)
        self._mapping = mapped(fd, capacity)
        self._writable = memoryview(self._mapping)
        self._touched = bytearray(capacity // _BLOCK_BYTES + 1)
        self._readable = mapped(fd, capacity, prot=mmap.PROT_READ)
        self._base = np.frombuffer(self._writable, np.uint8).__array_interface__["data"][0]
        self._lease = lease
        self._give_back = give_back
        self._chunk = self._chunk_end = 0
        self._chunk_bytes = MIN_CHUNK_BYTES // 2  # doubled for each lease
        self._born: dict[int, BornExtent] = {}
        self.bytes_copied_in = 0
        self.bytes_shared = 0
        self.bytes_born = 0

    def close(self) -> None:
        """Let go of the memory; it goes back to the system when the last view of it is gone."""
        self._writable = memoryview(b"")
        del self._mapping, self._readable, self._file

    # -- writing -------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> int:
        """Return the offset of `size` leased bytes, 64-byte aligned."""
        size = _aligned(size)
        if size > LARGE_BYTES:
            offset = self._lease(size)[0]
            self._map_in(offset, size)
            return offset
        while self._chunk_end - self._chunk < size:
            # Another thread may take the chunk while this one waits for the grant: look again.
            offset, granted = self._lease(self._next_chunk(size))
            self._map_in(offset, granted)
            old, old_end = self._chunk, self._chunk_end
            self._chunk, self._chunk_end = offset, offset + granted
            if old_end > old:
                self._give_back(old, old_end - old)
        offset = self._chunk
        self._chunk = offset + size
        return offset

    def _next_chunk(self, size: int) -> int:
        """Return how much to lease for an object of `size` bytes and those that follow it."""
        self._chunk_bytes = min(2 * self._chunk_bytes, MAX_CHUNK_BYTES)
        return max(size, min(self._chunk_bytes, self.capacity // MAX_CHUNK_SHARE))

    def _map_in(self, offset: int, size: int) -> None:
        """Enter pages that this process has not used yet into its page table at once.

        A page fault costs more than copying the page. The pages are mostly there, written by others; asking for them as
        for reading makes the kernel map sixteen at a time.
        """
        first, last = offset // _BLOCK_BYTES, (offset + size - 1) // _BLOCK_BYTES
        touched = self._touched
        while first <= last and touched[first]:
            first += 1
        if first <= last:
            start = first * _BLOCK_BYTES
            length = min((last + 1) * _BLOCK_BYTES, self.capacity) - start
            # Not by `mmap.madvise`, which keeps the interpreter lock: making pages takes up to a second for a GiB.
            for at in range(start, start + length, _POPULATE_BYTES):
                # Where it fails (a kernel before 5.14), the pages fault in one by one.
                _madvise(self._base + at, min(_POPULATE_BYTES, start + length - at), _MADV_POPULATE_READ)
            touched[first : last + 1] = b"\1" * (last + 1 - first)

    def store(
        self,
        value: Writable,
        holder: list[Any],
        inline_bytes: int = -1,
        before_writing: Callable[[], None] = lambda: None,
    ) -> tuple[bytes, list[Piece]]:
        """Write a serialised value; return its frame if that takes at most `inline_bytes`, and its pieces (offset, size).

        The pieces are the extents that were born in the store, in the order in which the frame numbers them, and last the
        frame itself, unless it is returned.

        Args:
            value: what to write.
            holder: the only reference to the value itself; emptied here, so that memory born in the store and
                referred to by nothing else can be kept instead of copied.
            inline_bytes: see above.
            before_writing: called when the value has been let go; it may still write into the value's buffers.

        Raises:
            ObjectStoreFullError: no room came free in time.
        """
        born, pieces = self._keep_born(value, holder)
        size = value.size
        if born is not None:
            size -= sum(b.nbytes for b, place in zip(value.buffers, born, strict=True) if place is not None)
            size += ALIGNMENT * len(born)
        try:
            if size <= inline_bytes:
                before_writing()
                frame = bytearray(size)
                return bytes(memoryview(frame)[: value.write(memoryview(frame), born)]), pieces
            offset = self.allocate(size)
            try:
                before_writing()
            except BaseException:
                self._give_back(offset, _aligned(size))
                raise
        except BaseException:
            for piece in pieces:
                self._give_back(*piece)
            raise
        written = value.write(self._writable[offset : offset + size], born)
        self.bytes_copied_in += written
        room, used = _aligned(size), _aligned(written)
        if room > used:
            self._give_back(offset + used, room - used)
        pieces.append((offset, written))
        return b"", pieces

    @property
    def born(self) -> int:
        """How many arrays that were born in the store are alive."""
        return len(self._born)

    def _keep_born(self, value: Writable, holder: list[Any]) -> tuple[list[tuple[int, int] | None] | None, list[Piece]]:
        if not self._born:
            holder.clear()
            return None, []
        found: list[tuple[int, int, BornExtent]] = []
        starts: list[int] = []
        for index, buffer in enumerate(value.buffers):
            place = self._offset_of(buffer)
            extent = self._born_at(starts, place, buffer.nbytes) if place is not None else None
            if place is not None and extent is not None:
                # From here on the bytes are read through the slab: our view of the array must not keep it alive.
                value.buffers[index] = self._writable[place : place + buffer.nbytes]
                buffer.release()
                extent.claimed = True
                found.append((index, place, extent))
        holder.clear()
        if not found:
            return None, []
        born: list[tuple[int, int] | None] = [None] * len(value.buffers)
        kept: dict[int, int] = {}  # offset of an extent -> the part that it becomes
        pieces: list[Piece] = []
        for index, place, extent in found:
            if extent.dead:
                if extent.offset not in kept:
                    kept[extent.offset] = len(pieces)
                    pieces.append((extent.offset, extent.size))
                born[index] = (kept[extent.offset], place - extent.offset)
                self._born.pop(extent.offset, None)
                self.bytes_born += value.buffers[index].nbytes
            else:
                extent.claimed = False
        return born, pieces

    def _offset_of(self, buffer: memoryview) -> int | None:
        if not buffer.nbytes:
            return None
        offset: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0] - self._base
        return offset if 0 <= offset < self.capacity else None

    def _born_at(self, starts: list[int], offset: int, size: int) -> BornExtent | None:
        """Return the extent that these bytes lie in; `starts` gets the offsets of all in order, once they are needed."""
        extent = self._born.get(offset)
        if extent is None:
            starts += [] if starts else sorted(self._born.copy())
            index = bisect.bisect_right(starts, offset) - 1
            extent = self._born.get(starts[index]) if index >= 0 else None  # None too if it died meanwhile
        return extent if extent is not None and offset + size <= extent.offset + extent.size else None

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an uninitialised array in the store."""
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise TypeError(f"afield.empty() cannot hold Python objects (dtype {kind}); use a numeric dtype")
        count = math.prod(shape) if isinstance(shape, tuple) else int(shape)
        size = max(count * kind.itemsize, 1)
        offset = self.allocate(size)
        extent = BornExtent(offset, _aligned(size))
        flat = np.frombuffer(self._writable[offset : offset + count * kind.itemsize], np.uint8)
        # `View` is the last owner of the memory: every array derived from it keeps it alive.
        owner = flat.view(View)
        self._born[offset] = extent
        weakref.finalize(owner, self.on_born_died, extent).atexit = False
        return np.frombuffer(owner.data, kind, count).reshape(shape)

    def on_born_died(self, extent: BornExtent) -> None:
        """Nothing refers to an `empty` array any more; called by the garbage collector."""
        extent.dead = True
        if not extent.claimed:
            self._born.pop(extent.offset, None)
            self._give_back(extent.offset, extent.size)

    # -- reading -------------------------------------------------------------------------------------------------

    def view(self, offset: int, size: int, view_pin: ViewPin) -> memoryview:
        """Map `size` bytes read-only; `view_pin` lives as long as any view of them."""
        view = np.frombuffer(self._readable, np.uint8, size, offset).view(View)
        view.view_pin = view_pin
        view.source = self._file, offset
        self.bytes_shared += size
        return view.data


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) & -ALIGNMENT
