"""Core books of one arena: who holds which bytes of it, who waits for some, and what could go to make room.

Theory of operation. The arena is one range of bytes, cut up by an `ExtentAllocator`. Every allocated byte is in exactly one
of three states:

- **leased**: part of a chunk granted to a client (a process) that may write there and tells nobody what it writes;
- **sealed**: a copy of a part of an object, immutable;
- **moving**: reserved for a copy that is being made; or a copy whose object was freed, but that a job still reads or that
  was promised to a process.

    free --lease--> leased --seal--> sealed --free, evict--> free
      ^               |                ^ \\--freed in use--> moving --> free
      +--give_back,---+                |
      |  client_died     moving -------+ finished
      +--- reserve ------> moving

Those who find no room wait in one queue, in the order of their keys (priority, then arrival): while somebody waits, nobody
who comes after him is served before him, so a big request is served as soon as the frees before it add up, however many
small ones come after it. But who has leased bytes already and asks for a little (`FINISHING_SHARE`) comes first: he may have
to finish before anybody's turn can come.

The copies stand on *shelves*, each in the order of their last use, as far as the books are told of it:

- **spares**, of objects that are kept for lineage alone: they go first, with their objects;
- **secondaries**, away from home while another copy is in memory: they go next, at no cost;
- **primaries**: all others that can go;
- **leaving**: a copy of them is being made below, so that they can go when it is there;
- **fixed**: without a slot on the pin board, or of a second execution;
- **dying**: freed, but in use.

Over the *high mark* the arena is *draining* until it is below the low mark.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort_right
from collections import OrderedDict
from collections.abc import Sequence

from afield.gpu_store.books.lives import COPY
from afield.gpu_store.books.records import Copy, Key, Making, Request
from afield.gpu_store.extents import ExtentAllocator
from afield.gpu_store.tiers import FINISH, FIRST_LIFE, PREFETCH, ArenaUsage, StoreUsageError
from afield.machines import FlightRecorder

Shelf = OrderedDict[Copy, None]
#: So small a part of an arena, and so many bytes, are little: no client's chunk of a device is larger.
FINISHING_SHARE = 64
FINISHING_BYTES = 32 << 20
#: No key comes before this.
NOBODY: Key = (FINISH - 1, 0)


class LeasedRanges:
    """The leased and unsealed byte ranges of one client, sorted. Few: a client has one or two chunks open at a time.

    Ranges that touch are one: the client coalesces what it has free, so that what it seals may lie across two chunks.
    """

    __slots__ = ("ends", "size", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.size = 0

    def add(self, start: int, end: int) -> None:
        self.size += end - start
        at = bisect_right(self.starts, start)
        if at < len(self.starts) and self.starts[at] == end:
            end = self.ends[at]
            del self.starts[at], self.ends[at]
        if at and self.ends[at - 1] == start:
            self.ends[at - 1] = end
        else:
            self.starts.insert(at, start)
            self.ends.insert(at, end)

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


class RoomQueue:
    """Those who wait for room, in the order of their keys; equal keys in the order of arrival."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[Request] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def head(self) -> Request | None:
        return self._waiting[0] if self._waiting else None

    def keeps_waiting(self, key: Key) -> bool:
        """Tell whether a newcomer with this key has to wait behind somebody."""
        return bool(self._waiting) and self._waiting[0].key <= key

    def add(self, request: Request) -> None:
        insort_right(self._waiting, request, key=_key)

    def discard(self, request: Request) -> None:
        at = bisect_left(self._waiting, request.key, key=_key)
        while at < len(self._waiting) and self._waiting[at].key == request.key:
            if self._waiting[at] is request:
                del self._waiting[at]
                return
            at += 1


def _key(request: Request) -> Key:
    return request.key


class Holding:
    """What one owner has in one arena."""

    __slots__ = ("count", "size")

    def __init__(self) -> None:
        self.count = 0
        self.size = 0


class ArenaBooks:
    """Accounts for one life of one arena; all sizes in bytes. Rare changes of its copies are noted in `recorder`."""

    def __init__(
        self,
        number: int,
        label: str,
        capacity: int,
        alignment: int,
        marks: tuple[float, float],
        recorder: FlightRecorder,
        life: int = FIRST_LIFE,
    ) -> None:
        high, low = marks
        self._recorder = recorder
        self.number = number
        self.life = life
        self.label = label
        self.extents = ExtentAllocator(capacity, alignment)
        self.queue = RoomQueue()
        self.makings: dict[Making, None] = {}  # the copies that are to come here
        self.leased: dict[bytes, LeasedRanges] = {}
        self.leased_bytes = 0
        self.sealed_bytes = 0
        self.moving_bytes = 0
        self.leaving_bytes = 0
        self.reserved = 0
        self.primaries: Shelf = OrderedDict()
        self.secondaries: Shelf = OrderedDict()
        self.spares: Shelf = OrderedDict()
        self.leaving: Shelf = OrderedDict()
        self.fixed: Shelf = OrderedDict()
        self.dying: Shelf = OrderedDict()
        self.owners: dict[bytes, Holding] = {}
        self._high = int(self.extents.capacity * high)
        self._low = int(self.extents.capacity * low)
        self.draining = False
        self.trimming = False  # clients were asked to give back, and none has yet
        #: Nothing that may go was found: look again at `due`, which the next `expire` sets.
        self.blocked = False
        self.blocked_for = NOBODY
        self.due: float | None = None

    @property
    def capacity(self) -> int:
        return self.extents.capacity

    # -- leases ---------------------------------------------------------------------------------------------------

    def is_finishing(self, client: bytes, room: int) -> bool:
        """Tell whether a request is for a little more than the client has: see above."""
        return client in self.leased and room <= min(self.capacity // FINISHING_SHARE, FINISHING_BYTES)

    def lease(self, client: bytes, offset: int, room: int) -> None:
        """Enter an extent that was allocated as leased to `client`."""
        ranges = self.leased.get(client)
        if ranges is None:
            ranges = self.leased[client] = LeasedRanges()
        ranges.add(offset, offset + room)
        self.leased_bytes += room

    def check_leased(self, client: bytes, pieces: Sequence[tuple[int, int]]) -> None:
        """Raise StoreUsageError unless each piece (offset, size) lies in a chunk of `client` and none overlaps another."""
        ranges = self.leased.get(client)
        rounded = self.extents.rounded
        misaligned = self.extents.alignment - 1
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
                    f"[{offset}, +{size}) of {self.label} is not an aligned, unsealed part of a chunk of {client.hex()}"
                )
            free_from = end

    def cut(self, client: bytes, offset: int, size: int) -> int:
        """Take a piece that was checked out of the chunks of `client`; return its room. It stays allocated."""
        ranges = self.leased[client]
        room = self.extents.rounded(size)
        ranges.cut(offset, offset + room)
        self.leased_bytes -= room
        if not ranges.starts:
            del self.leased[client]
        return room

    def end_leases(self, client: bytes) -> None:
        """Free all that `client` has leased."""
        ranges = self.leased.pop(client, None)
        if ranges is not None:
            self.leased_bytes -= ranges.size
            for start, end in zip(ranges.starts, ranges.ends, strict=True):
                self.extents.free(start, end - start)

    # -- places for copies ----------------------------------------------------------------------------------------

    def reserve_place(self, room: int) -> int | None:
        """Allocate a place for a copy that is to be made; return its offset, or None without room."""
        offset = self.extents.allocate(room)
        if offset is not None:
            self.moving_bytes += room
        return offset

    def free_place(self, offset: int, room: int) -> None:
        """Free a place that `reserve_place` gave."""
        self.moving_bytes -= room
        self.extents.free(offset, room)

    # -- copies ---------------------------------------------------------------------------------------------------

    def enter(self, copy: Copy, owner: bytes) -> None:
        """Account for a copy whose bytes are allocated and in no other state any more."""
        self.sealed_bytes += copy.room
        self.credit(owner, copy.room)
        self.shelve(copy)

    def free(self, copy: Copy, owner: bytes) -> None:
        """Free a copy's bytes now."""
        self.stop_leaving(copy)
        assert copy.state == "kept", copy.state
        copy.state = "over"  # as `COPY` says, which is not asked: this is done for each object
        self._leave_shelf(copy)
        self.debit(owner, copy.room)
        self.sealed_bytes -= copy.room
        self.extents.free(copy.offset, copy.room)

    def free_later(self, copy: Copy, owner: bytes) -> None:
        """The copy's object was freed while the copy is in use: it is dead, and only its bytes remain for now."""
        self.go(copy, "free_in_use")
        self.debit(owner, copy.room)
        self.sealed_bytes -= copy.room
        self.moving_bytes += copy.room
        self.shelve(copy)

    def bury(self, copy: Copy) -> None:
        """Free the bytes of a dead copy."""
        self.go(copy, "bury")
        self._leave_shelf(copy)
        self.moving_bytes -= copy.room
        self.extents.free(copy.offset, copy.room)

    def shelve(self, copy: Copy) -> None:
        """Put a copy on the shelf where it belongs by now, as the one used last, unless it is there already."""
        state = copy.state
        if state == "dying":
            shelf = self.dying
        elif state == "dying_leaving":
            shelf = self.leaving
        elif not copy.slot or copy.part.copies.get(copy.arena) is not copy:
            shelf = self.fixed
        elif state == "leaving":
            shelf = self.leaving
        elif copy.part.object.spare:
            shelf = self.spares
        elif copy.arena != copy.part.home and len(copy.part.copies) > 1:
            shelf = self.secondaries
        else:
            shelf = self.primaries
        if copy.shelf is not shelf:
            self._put(copy, shelf)

    def touch(self, copy: Copy) -> None:
        """It was used."""
        if copy.shelf is not None:
            copy.shelf.move_to_end(copy)

    def start_leaving(self, copy: Copy) -> None:
        self.go(copy, "leave")
        self.leaving_bytes += copy.room
        self.shelve(copy)

    def stop_leaving(self, copy: Copy) -> None:
        if copy.state in ("leaving", "dying_leaving"):
            self.go(copy, "stay")
            self.leaving_bytes -= copy.room
            self.shelve(copy)

    def go(self, copy: Copy, event: str) -> None:
        """Move a copy on in its life."""
        key = (copy.part.object.id, copy.part.index, self.number)
        copy.state = COPY.after(copy.state, event, key, self._recorder)

    def copies(self) -> list[Copy]:
        """Return all copies in the arena, the dead ones included."""
        return [*self.primaries, *self.secondaries, *self.spares, *self.leaving, *self.fixed, *self.dying]

    def credit(self, owner: bytes, size: int) -> None:
        holding = self.owners.get(owner)
        if holding is None:
            holding = self.owners[owner] = Holding()
        holding.count += 1
        holding.size += size

    def debit(self, owner: bytes, size: int) -> None:
        holding = self.owners[owner]
        holding.count -= 1
        holding.size -= size
        if not holding.count:
            del self.owners[owner]

    # -- arithmetic -----------------------------------------------------------------------------------------------

    @property
    def pressed(self) -> bool:
        """True if something has to go, or somebody waits: cheap, to be asked after each event."""
        return (
            len(self.queue) > 0
            or self.draining
            or bool(self.leaving)
            or self.extents.used > self._high
            or (self.reserved > 0 and self.sealed_bytes > self.capacity - self.reserved)
        )

    def has_plenty(self, size: int) -> bool:
        """Tell whether the arena would stay below its low mark with `size` bytes more."""
        return not self.queue and self.extents.used + size <= self._low

    def shortage(self) -> int:
        """Return the bytes that have to start leaving for the head of the queue; 0 if what is leaving will do."""
        head = self.queue.head
        if head is None or head.key[0] >= PREFETCH or head.room <= self.extents.largest_free:
            return 0
        missing = head.room - self.extents.free_bytes - self.leaving_bytes
        if missing > 0:
            return missing
        return 0 if self.leaving_bytes else head.room  # enough is free, but in pieces

    def excess(self) -> int:
        """Return the bytes that have to start leaving because the arena is too full."""
        used = self.extents.used
        if used > self._high:
            self.draining = True
        elif used <= self._low:
            self.draining = False
        over = used - self._low if self.draining else 0
        if self.reserved:
            over = max(over, self.sealed_bytes - (self.capacity - self.reserved))
        return over - self.leaving_bytes

    def block(self, key: Key = NOBODY) -> None:
        """Nothing was found that may go for somebody with this key: only who comes before him looks before `due`."""
        self.blocked = True
        self.blocked_for = key
        self.due = None

    @property
    def may_find_more(self) -> bool:
        """True if somebody waits, and looking again may turn up something, although no event tells of it."""
        return bool(self.queue and (self.primaries or self.secondaries or self.spares or self.leased_bytes))

    def admits_prefetch(self, room: int) -> bool:
        """Tell whether a copy that nobody waits for may come: it drives nothing else out."""
        return self.extents.used + room <= self._high

    def usage(self) -> ArenaUsage:
        """Return the figures; counts the secondaries one by one."""
        return ArenaUsage(
            label=self.label,
            capacity=self.capacity,
            used=self.extents.used,
            leased=self.leased_bytes,
            sealed=self.sealed_bytes,
            moving=self.moving_bytes,
            secondary=sum(copy.room for copy in self.secondaries),
            leaving=self.leaving_bytes,
            reserved=self.reserved,
            largest_free=self.extents.largest_free,
            high_water=self.extents.high_water,
            waiting=len(self.queue),
        )

    # -- inside ---------------------------------------------------------------------------------------------------

    def _put(self, copy: Copy, shelf: Shelf) -> None:
        self._leave_shelf(copy)
        shelf[copy] = None
        copy.shelf = shelf

    def _leave_shelf(self, copy: Copy) -> None:
        if copy.shelf is not None:
            del copy.shelf[copy]
            copy.shelf = None
