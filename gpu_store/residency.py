"""Host store core: decides who holds which bytes of one node's host store. Pure: no I/O, no clock, no threads.

Theory of operation. The store is one range of `capacity` bytes, cut up by an `ExtentAllocator`. Every allocated byte
is in exactly one of two states:

- **leased**: part of a chunk granted to a client (a process) that may write there and tells nobody what it writes;
- **sealed**: part of an object, immutable, until the object is freed.

    free --lease--> leased --seal--> sealed --free--> free
      ^               |
      +--give_back,---+
         client_died

A client leases a large chunk, fills it piece by piece without asking, seals the pieces, and gives the tail back. A
sealed object survives the client that made it; leased space does not.

Requests that find no room wait in one queue, strictly first in first out: while anybody waits, nobody overtakes, so a
big request is served as soon as the frees before it add up, however many small ones come after it. Whoever waits
brings a deadline; `expire` refuses those whose time is over, and a refusal says how much was asked, how much there is
and who holds it. Nothing else blocks the queue for good: its head fits in an empty store, or it would have been
refused at once.

Messages about one object travel on different channels, so a free may overtake the seal it belongs to. It is
remembered until the seal comes (at most `MAX_EARLY_FREES` of them, the oldest forgotten first). Ids are
deterministic: a task that runs again seals the same object id. So an early free should name the process whose seal it
expects: it then spares the seal of a later execution, and dies with that process. And a second seal while readers may
still map the first copy adds to the object, which then consists of both copies until it is freed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from afield.gpu_store.extents import ExtentAllocator
from afield.units import format_bytes

# A free overtakes its seal by milliseconds, so the number in flight is about the number of large results per
# millisecond; the bound only matters for seals that never come. An entry takes about 150 bytes.
MAX_EARLY_FREES = 65_536

# An error message names the few holders that matter.
TOP_HOLDERS = 5


class StoreUsageError(AssertionError):
    """A client named space that is not leased to it, or repeated a request id: its bug; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Granted:
    """`client` may write to [offset, offset + size); `size` is what it asked for, rounded up."""

    client: bytes
    request_id: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Refused:
    """`client` gets nothing; `never_fits` says that waiting longer or freeing objects would not help."""

    client: bytes
    request_id: int
    reason: str
    never_fits: bool = False


Effect = Granted | Refused


class _Waiting:
    """One request in the queue."""

    __slots__ = ("client", "deadline", "request_id", "size")

    def __init__(self, client: bytes, request_id: int, size: int, deadline: float | None) -> None:
        self.client = client
        self.request_id = request_id
        self.size = size
        self.deadline = deadline


class _Object:
    """One sealed object: where it lies and who answers for it; `size` in bytes, rounding included."""

    __slots__ = ("owner", "pieces", "size")

    def __init__(self, owner: bytes) -> None:
        self.owner = owner
        self.pieces: list[tuple[int, int]] = []
        self.size = 0


class _Holdings:
    """The objects of one owner and their bytes."""

    __slots__ = ("ids", "size")

    def __init__(self) -> None:
        self.ids: dict[bytes, None] = {}
        self.size = 0


class _LeasedRanges:
    """The leased and unsealed byte ranges of one client, sorted. Few: a client has one or two chunks open at a time."""

    __slots__ = ("ends", "size", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.size = 0

    def add(self, start: int, end: int) -> None:
        at = bisect_right(self.starts, start)
        self.starts.insert(at, start)
        self.ends.insert(at, end)
        self.size += end - start

    def holds(self, start: int, end: int) -> bool:
        at = bisect_right(self.starts, start) - 1
        return at >= 0 and end <= self.ends[at]

    def cut(self, start: int, end: int) -> None:
        """Take [start, end), which one range holds, out of it."""
        at = bisect_right(self.starts, start) - 1
        first, last = self.starts[at], self.ends[at]
        self.size -= end - start
        if start == first and end == last:
            del self.starts[at], self.ends[at]
        elif start == first:
            self.starts[at] = end
        else:
            self.ends[at] = start
            if end != last:
                self.starts.insert(at + 1, end)
                self.ends.insert(at + 1, last)


class HostStoreCore:
    """Accounts for one node's host store; all sizes in bytes, all times on the caller's clock in seconds."""

    __slots__ = ("_early_frees", "_extents", "_leased", "_objects", "_owners", "_sealed_bytes", "_waiting")

    def __init__(self, capacity: int, alignment: int = 64) -> None:
        self._extents = ExtentAllocator(capacity, alignment)
        self._leased: dict[bytes, _LeasedRanges] = {}
        self._waiting: OrderedDict[tuple[bytes, int], _Waiting] = OrderedDict()
        self._objects: dict[bytes, _Object] = {}
        self._owners: dict[bytes, _Holdings] = {}
        self._early_frees: dict[bytes, bytes | None] = {}  # object id -> the client whose seal is expected, if known
        self._sealed_bytes = 0

    # -- space ----------------------------------------------------------------------------------------------------

    def lease(
        self, client: bytes, request_id: int, size: int, block: bool, deadline: float | None = None
    ) -> list[Effect]:
        """Grant a chunk of `size` bytes, or queue the request (`block`) until there is room or `deadline` is past.

        Refuses at once what can never fit, and without `block` what does not fit now or would overtake a waiting
        request.
        """
        if size <= 0 or (client, request_id) in self._waiting:
            raise StoreUsageError(
                f"lease of {size} bytes as request {request_id}: bad size, or the request waits already"
            )
        rounded = self._extents.rounded(size)
        if rounded > self._extents.capacity:
            return [Refused(client, request_id, self.describe_full(size), never_fits=True)]
        if not self._waiting:
            offset = self._extents.allocate(rounded)
            if offset is not None:
                return [self._grant(client, request_id, offset, rounded)]
        if not block:
            return [Refused(client, request_id, self.describe_full(size))]
        self._waiting[client, request_id] = _Waiting(client, request_id, rounded, deadline)
        return []

    def give_back(self, client: bytes, offset: int, size: int) -> list[Effect]:
        """Free [offset, offset + size), a leased and unsealed part (usually the tail) of a chunk of `client`."""
        pieces = [(offset, size)]
        ranges = self._check_leased(client, pieces)
        self._cut(client, ranges, pieces)
        self._extents.free(offset, size)
        return self._serve_waiting()

    def client_died(self, client: bytes) -> list[Effect]:
        """Free what `client` leased and did not seal, and forget its waiting requests; its sealed objects stay."""
        for key in [key for key in self._waiting if key[0] == client]:
            del self._waiting[key]
        for object_id in [object_id for object_id, sealer in self._early_frees.items() if sealer == client]:
            del self._early_frees[object_id]
        ranges = self._leased.pop(client, None)
        if ranges is not None:
            for start, end in zip(ranges.starts, ranges.ends, strict=True):
                self._extents.free(start, end - start)
        return self._serve_waiting()

    def expire(self, now: float) -> list[Effect]:
        """Refuse the waiting requests whose deadline is not after `now`; those behind them may be granted."""
        late = [w for w in self._waiting.values() if w.deadline is not None and w.deadline <= now]
        effects: list[Effect] = []
        for request in late:
            effects.append(Refused(request.client, request.request_id, self.describe_full(request.size)))
            del self._waiting[request.client, request.request_id]
        return effects + self._serve_waiting() if late else effects

    def next_deadline(self) -> float | None:
        """Return the earliest deadline among the waiting requests: when to call `expire` at the latest."""
        return min((w.deadline for w in self._waiting.values() if w.deadline is not None), default=None)

    # -- objects --------------------------------------------------------------------------------------------------

    def seal(self, client: bytes, object_id: bytes, owner: bytes, pieces: Sequence[tuple[int, int]]) -> list[Effect]:
        """Make the pieces (offset, size), which lie in chunks leased to `client`, an object of `owner`.

        Raises StoreUsageError when a piece is not leased to `client` or two overlap.
        """
        ranges = self._check_leased(client, pieces)
        self._cut(client, ranges, pieces)
        if object_id in self._early_frees and self._early_frees[object_id] in (None, client):
            del self._early_frees[object_id]
            for offset, size in pieces:
                self._extents.free(offset, size)
            return self._serve_waiting()
        record = self._objects.get(object_id)
        if record is None:
            record = self._objects[object_id] = _Object(owner)
            self._holdings(owner).ids[object_id] = None
        elif record.owner != owner:
            self.set_owner(object_id, owner)
        rounded = self._extents.rounded
        size = sum(rounded(size) for _, size in pieces)
        record.pieces.extend(pieces)
        record.size += size
        self._owners[owner].size += size
        self._sealed_bytes += size
        return []

    def free(self, object_id: bytes, sealer: bytes | None = None) -> list[Effect]:
        """Free all pieces of the object now, or, if it is not sealed yet, as soon as it is (by `sealer`, if given)."""
        record = self._objects.pop(object_id, None)
        if record is None:
            early = self._early_frees
            early[object_id] = sealer
            if len(early) > MAX_EARLY_FREES:
                del early[next(iter(early))]
            return []
        self._disown(object_id, record)
        self._sealed_bytes -= record.size
        for offset, size in record.pieces:
            self._extents.free(offset, size)
        return self._serve_waiting()

    def set_owner(self, object_id: bytes, owner: bytes) -> bool:
        """Make `owner` answer for the object; returns False when there is no such object (it may be freed already)."""
        record = self._objects.get(object_id)
        if record is None:
            return False
        self._disown(object_id, record)
        record.owner = owner
        holdings = self._holdings(owner)
        holdings.ids[object_id] = None
        holdings.size += record.size
        return True

    def owner_died(self, owner: bytes) -> list[bytes]:
        """Return the ids of the objects of `owner`, oldest first; what becomes of them the caller decides."""
        holdings = self._owners.get(owner)
        return list(holdings.ids) if holdings else []

    def pieces(self, object_id: bytes) -> list[tuple[int, int]] | None:
        """Return the (offset, size) pieces of the object, or None when it is not sealed."""
        record = self._objects.get(object_id)
        return list(record.pieces) if record else None

    def objects(self) -> Iterator[tuple[bytes, bytes, int]]:
        """Yield (id, owner, bytes held) of every sealed object."""
        for object_id, record in self._objects.items():
            yield object_id, record.owner, record.size

    # -- arithmetic -----------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Bytes in the store."""
        return self._extents.capacity

    @property
    def used_bytes(self) -> int:
        """Bytes leased or sealed."""
        return self._extents.used

    @property
    def sealed_bytes(self) -> int:
        """Bytes that belong to objects."""
        return self._sealed_bytes

    @property
    def leased_bytes(self) -> int:
        """Bytes that clients hold and have not sealed."""
        return self._extents.used - self._sealed_bytes

    @property
    def high_water(self) -> int:
        """One past the highest byte ever handed out: pages from here on are fresh."""
        return self._extents.high_water

    @property
    def waiting_requests(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def describe_full(self, asked: int) -> str:
        """Return the sentence that tells a user why `asked` bytes were not granted, and what to do."""
        extents = self._extents
        if extents.rounded(asked) > extents.capacity:
            verdict = "is larger than the whole host store and can never fit; raise host_memory= in afield.init()"
        elif extents.rounded(asked) <= extents.largest_free:
            verdict = "would fit in the host store, but larger requests wait before it and may not be overtaken"
        else:
            verdict = (
                "does not fit in the host store now; drop references to large values, or raise host_memory= in init()"
            )
        holders = [(held.size, f"owner {o.hex()[:16]}", len(held.ids)) for o, held in self._owners.items()]
        holders += [(r.size, f"process {c.hex()[:16]} (being written)", 0) for c, r in self._leased.items()]
        top = [
            f"{who}: {format_bytes(size)}" + (f" in {count} objects" if count else "")
            for size, who, count in heapq.nlargest(TOP_HOLDERS, holders)
        ]
        return (
            f"{format_bytes(asked)} ({asked} bytes) {verdict}. Capacity {format_bytes(extents.capacity)}, "
            f"used {format_bytes(extents.used)} ({format_bytes(self._sealed_bytes)} in {len(self._objects)} objects, "
            f"{format_bytes(self.leased_bytes)} leased to processes that write), "
            f"largest free piece {format_bytes(extents.largest_free)}, {len(self._waiting)} requests waiting. "
            f"Top holders: {'; '.join(top) or 'none'}."
        )

    # -- inside ---------------------------------------------------------------------------------------------------

    def _grant(self, client: bytes, request_id: int, offset: int, size: int) -> Granted:
        ranges = self._leased.get(client)
        if ranges is None:
            ranges = self._leased[client] = _LeasedRanges()
        ranges.add(offset, offset + size)
        return Granted(client, request_id, offset, size)

    def _serve_waiting(self) -> list[Effect]:
        effects: list[Effect] = []
        while self._waiting:
            request = next(iter(self._waiting.values()))
            offset = self._extents.allocate(request.size)
            if offset is None:
                break
            del self._waiting[request.client, request.request_id]
            effects.append(self._grant(request.client, request.request_id, offset, request.size))
        return effects

    def _check_leased(self, client: bytes, pieces: Sequence[tuple[int, int]]) -> _LeasedRanges:
        """Return the ranges of `client` if each piece lies in one of them and none overlaps another, else raise."""
        ranges = self._leased.get(client)
        rounded = self._extents.rounded
        misaligned = self._extents.alignment - 1
        free_from = 0
        for offset, size in sorted(pieces) if len(pieces) > 1 else pieces:
            end = offset + rounded(size)
            if (
                ranges is None
                or size <= 0
                or offset & misaligned
                or offset < free_from
                or not ranges.holds(offset, end)
            ):
                raise StoreUsageError(
                    f"[{offset}, +{size}) is not an aligned, unsealed part of a chunk of {client.hex()}"
                )
            free_from = end
        if ranges is None or not pieces:
            raise StoreUsageError(f"no pieces of a chunk of {client.hex()} are named")
        return ranges

    def _cut(self, client: bytes, ranges: _LeasedRanges, pieces: Sequence[tuple[int, int]]) -> None:
        for offset, size in pieces:
            ranges.cut(offset, offset + self._extents.rounded(size))
        if not ranges.starts:
            del self._leased[client]

    def _holdings(self, owner: bytes) -> _Holdings:
        holdings = self._owners.get(owner)
        if holdings is None:
            holdings = self._owners[owner] = _Holdings()
        return holdings

    def _disown(self, object_id: bytes, record: _Object) -> None:
        holdings = self._owners[record.owner]
        del holdings.ids[object_id]
        holdings.size -= record.size
        if not holdings.ids:
            del self._owners[record.owner]
