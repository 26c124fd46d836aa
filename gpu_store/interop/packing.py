"""From device arrays inside a value to parts of an object.

Theory of operation. While a value is pickled, `reduce` turns each device array in it into a record, an out-of-band buffer
whose content `commit` fills in: the pickle's own bytes say nothing about where memory will be. Of an array in a block of our
arena nothing is kept but a claim on the block, so that what else refers to it decides whether it may become the object's; of
any other array the packer keeps the array, because its memory has to live until it is copied.

`commit` comes after the value itself was let go. It looks at the bytes that the arrays of one block touch:

- an array that touches less than half of the bytes it spans, and lies in none that are stored anyway, is gathered into C
  order in a block of its own;
- the others' spans are merged where they overlap. If nothing else has the block, and they make up half of it, it becomes a
  part of the object as it is (*born* there); what lies before and after them is free again;
- otherwise they are copied on the device: as one part if they make up half of what lies between the first and the last,
  else as a part each. Memory that is not our arena's is copied as well. Where there are many copies, small ones lie side by
  side in one part.

So two views of one block share a part. A copy keeps the bytes' position relative to the arena's alignment.
"""

from __future__ import annotations

import contextlib
import pickle
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from afield.errors import AfieldError, SerializationError
from afield.gpu_store.arena import COPIES, DeviceArena
from afield.gpu_store.backends import base
from afield.gpu_store.blocks import ALIGNMENT, Claim
from afield.gpu_store.interop.places import Adapter, Description, c_strides
from afield.gpu_store.interop.registry import adapter_of
from afield.gpu_store.interop.unpacking import NOWHERE, UNCOMMITTED, rebuild, record_struct

#: Less than one byte in this many wanted: the bytes are copied out instead of kept or copied whole.
_DENSE = 2

#: From so many copies on, small ones are parts together, of so many bytes: a part has its price, here and in the books.
_MANY = 16
_JOINT_BYTES = 1 << 20

_Span = tuple[int, int]


class _Piece:
    """One device array of a value."""

    __slots__ = ("adapter", "array", "claim", "description", "is_dense", "kind", "record", "span")

    def __init__(self, adapter: Adapter, description: Description, claim: Claim | None, array: Any) -> None:
        self.adapter = adapter
        self.description = description
        self.claim = claim
        #: Only where there is no claim.
        self.array = array
        self.span = first, end = description.span
        self.is_dense = _DENSE * description.nbytes >= end - first
        self.record = bytearray(record_struct(len(description.shape)).size)
        self.kind: type | None = None
        self.write(UNCOMMITTED, 0)

    def write(self, part: int, offset: int, strides: tuple[int, ...] | None = None) -> None:
        steps = self.description.strides if strides is None else strides
        record_struct(len(steps)).pack_into(self.record, 0, part, offset, *steps)


class DevicePacker:
    """Collects the device arrays of one value and stores them; used by one thread, for one value.

    Use it in a `with` block: what was not committed by its end is let go; without one, when the packer itself goes.
    """

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        self._claims: dict[tuple[int, int], Claim] = {}
        self._parts: list[tuple[DeviceArena, int, int]] = []

    def __enter__(self) -> DevicePacker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __len__(self) -> int:
        """Return how many device arrays were found."""
        return len(self._pieces)

    def reduce(self, value: Any) -> tuple[Any, ...] | None:
        """Return what `reducer_override` returns for a device array; None for everything else.

        The pickler must use protocol 5 with a `buffer_callback`, has to be dropped before `commit` (its memo refers to every
        array), and the buffers may be written after `commit` only.
        """
        adapter = adapter_of(type(value))
        if adapter is None:
            return None
        description = adapter.describe(value)
        if description is None:
            return None
        claim = self._claim(description)
        piece = _Piece(adapter, description, claim, value if claim is None else None)
        piece.kind = type(value)
        self._pieces.append(piece)
        record = pickle.PickleBuffer(piece.record)
        return rebuild, (adapter.kind_of(value), description.shape, description.dtype, record)

    def _claim(self, description: Description) -> Claim | None:
        block, description.block = description.block, None
        if block is None:
            return None
        key = id(block.home), block.offset
        if key not in self._claims:
            self._claims[key] = block.home.claim(block)
        return self._claims[key]

    def commit(self, arenas: Mapping[str, DeviceArena]) -> list[tuple[int, int, int, int]]:
        """Make parts of everything that was found; return (arena number, its life, offset, exact size in bytes) for each.

        From here on the daemon must hear of them, sealed, or `revert` is called. The value must have been let go, or all of
        its arrays are copied. Waits for the work that produces the arrays, and for the copies.

        Args:
            arenas: this process's arenas by their device's UUID.

        Raises:
            SerializationError: an array is on a device of which this process has no arena.
            OutOfDeviceMemoryError: there is no room for a copy.
            DeviceLostError: and what else the device raises.
        """
        groups: dict[object, tuple[DeviceArena, list[_Piece]]] = {}
        try:
            for piece in self._pieces:
                if 0 in piece.description.shape:
                    piece.write(NOWHERE, 0)
                    continue
                arena = _arena_of(piece, arenas)
                key = id(piece.claim) if piece.claim is not None else (piece.adapter.kind, arena.arena)
                groups.setdefault(key, (arena, []))[1].append(piece)
            used = {id(arena): arena for arena, _ in groups.values()}.values()
            for arena in used:
                arena.check()
                arena.synchronize()
            copies: dict[int, list[_Copy]] = {id(arena): [] for arena in used}
            for arena, pieces in groups.values():
                self._place(arena, pieces, copies[id(arena)])
            for arena in used:
                self._copy_all(arena, copies[id(arena)])
                arena.finish()
        except BaseException:
            self.revert()
            raise
        finally:
            self.close()
        return [(arena.arena, arena.life, offset, size) for arena, offset, size in self._parts]

    def revert(self) -> None:
        """Take back what `commit` returned, for a value that cannot be stored after all; not after it was sealed."""
        for arena, offset, size in self._parts:
            with contextlib.suppress(AfieldError):  # a copy that fails has ended as well
                arena.finish()
            arena.put_back(offset, size)
        self._parts.clear()

    def close(self) -> None:
        """Let go of everything that was found; twice is allowed."""
        for claim in self._claims.values():
            claim.home.release(claim)
        self._claims.clear()
        for piece in self._pieces:
            piece.array = None

    # ---- one block's arrays, or all those in other memory of one device -------------------------------------------

    def _place(self, arena: DeviceArena, pieces: list[_Piece], copies: list[_Copy]) -> None:
        """Take the block as it is, or note what of it is to be copied."""
        islands = _merged(piece.span for piece in pieces if piece.is_dense)
        rest = []
        for piece in pieces:
            if piece.is_dense or _island_of(islands, piece.span) >= 0:
                rest.append(piece)
            else:
                copies.append(_Copy(None, [piece]))
        if not islands:
            return
        first, end = islands[0][0], islands[-1][1]
        touched = sum(hi - lo for lo, hi in islands)
        claim = rest[0].claim
        if claim is not None and _DENSE * touched >= claim.size:
            start = (first - arena.slab.address) & -ALIGNMENT
            size = end - arena.slab.address - start
            if arena.take(claim, start, size):
                arena.bytes_born += size
                for piece in rest:
                    piece.write(len(self._parts), piece.description.address - arena.slab.address - start)
                self._parts.append((arena, start, size))
                return
        if claim is not None and _DENSE * touched >= end - first:
            islands = [(first, end)]  # other memory may be several allocations, which no copy may cross
        found = [_Copy(island, []) for island in islands]
        for piece in rest:
            found[_island_of(islands, piece.span)].pieces.append(piece)
        copies += found

    def _copy_all(self, arena: DeviceArena, copies: list[_Copy]) -> None:
        """Make the copies, each as a part of its own; of many small ones several are one part."""
        joint_bytes = _JOINT_BYTES if len(copies) >= _MANY else 0
        batch: list[tuple[_Copy, int]] = []
        end = 0
        for copy in copies:
            start = end + (-end) % ALIGNMENT
            if batch and start + copy.room > joint_bytes:
                self._copy(arena, batch, end)
                batch, start = [], 0
            batch.append((copy, start))
            end = start + copy.room
        if batch:
            self._copy(arena, batch, end)

    def _copy(self, arena: DeviceArena, batch: list[tuple[_Copy, int]], size: int) -> None:
        """Make one part of `size` bytes of copies, each at a place in it."""
        block = arena.allocate(size, COPIES)
        part = len(self._parts)
        for copy, start in batch:
            if copy.island is None:
                (piece,) = copy.pieces
                description = piece.description
                piece.adapter.gather(description, arena, block.offset + start)
                arena.bytes_copied += description.nbytes
                piece.write(part, start, c_strides(description.shape, description.itemsize))
                continue
            lo, hi = copy.island
            lead, length = lo % ALIGNMENT, hi - lo
            position = lo - arena.slab.address
            if 0 <= position <= arena.slab.size_bytes - length:
                arena.copy(arena.slab, position, block.offset + start + lead, length)
            else:
                foreign = copy.pieces[0].adapter.foreign(arena, lo, length)
                arena.copy(foreign, 0, block.offset + start + lead, length)
            arena.bytes_copied += length
            for piece in copy.pieces:
                piece.write(part, start + lead + piece.description.address - lo)
        self._parts.append((arena, block.offset, size))
        arena.detach(block)


class _Copy:
    """Bytes that are to be copied: the pieces in an island, or one piece that is gathered from where its elements lie."""

    __slots__ = ("island", "pieces", "room")

    def __init__(self, island: _Span | None, pieces: list[_Piece]) -> None:
        self.island = island
        self.pieces = pieces
        self.room = pieces[0].description.nbytes if island is None else island[1] - island[0] + island[0] % ALIGNMENT


def _arena_of(piece: _Piece, arenas: Mapping[str, DeviceArena]) -> DeviceArena:
    device = piece.description.device
    if isinstance(device, str):
        arena = arenas.get(device)
    else:
        arena = next((one for one in arenas.values() if getattr(one.slab, "ordinal", None) == device), None)
    if piece.claim is not None and piece.claim.home is not arena:
        piece.claim.home.check()  # it may be of a session that has ended
    if arena is None:
        name = device if isinstance(device, str) else f"number {device} (as CUDA counts here)"
        type_name = f"{piece.kind.__module__}.{piece.kind.__qualname__}" if piece.kind else "device array"
        raise SerializationError(
            f"a {type_name} in the value is on device {name}, which this process has no lease of"
            f" (it has: {', '.join(arenas) or 'none'}): copy the array to one of these devices, or to the host "
            "(array.get(), tensor.cpu(), copy_to_host()), before it is returned or put"
        )
    if piece.claim is not None and piece.claim.home is not arena:
        raise base.stale(arena.slab.device_uuid, piece.claim.home.slab.epoch, arena.slab.epoch)
    return arena


def _merged(spans: Iterable[_Span]) -> list[_Span]:
    """Return the union of spans as spans in order that do not overlap."""
    merged: list[_Span] = []
    for lo, hi in sorted(spans):
        if merged and lo < merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], hi)
        else:
            merged.append((lo, hi))
    return merged


def _island_of(islands: list[_Span], span: _Span) -> int:
    """Return the number of the island, of those in order, that has all of a span in it; -1 if none has."""
    at = bisect_right(islands, span[0], key=_first) - 1
    return at if at >= 0 and span[1] <= islands[at][1] else -1


def _first(span: _Span) -> int:
    return span[0]
