"""Core of eviction: which copies go when an arena is short of room, and how.

Theory of operation. An arena is short when somebody waits for room, and then exactly as much is made as the first in the queue
lacks, less what is leaving already; or when it is too full (over its high mark, or when what is sealed takes room that is
reserved for tasks), and then it is emptied to the low mark, but for this nobody waits for room below. Copies go in this order:

0. spares, with all copies of their objects: nothing but lineage needs them, and their owners hear of it (`Lost`);
1. secondaries, the least recently used first: each is closed on the pin board and freed at once;
2. primaries, the least recently used first: what has a copy elsewhere, memory or disk, is closed and freed at once too; what
   has none has one made below (`copying`), and is freed when that is done.

If enough is free, but in pieces, the copies of one stretch of the arena go instead (`windows`), whatever they are.

Which copies are pinned only the board knows, and it tells by closing them; those that are to stay readable while they are
copied are opened again at once. What is found pinned was used just now, and counts so. At most `MAX_SPILLS` copies, or
`MAX_SMALL_SPILLS` small ones, leave a device at a time, and at most `MAX_WRITES` files are written. If nothing that may go is
found, the arena is *blocked*: pins vanish without a message, so the caller looks again `RETRY_S` later, and whenever a job
ends. If somebody waits for room then, all processes are asked to `Collect` garbage, as a cycle of references may be all that
a copy is pinned for.
"""

from __future__ import annotations

from itertools import islice

from afield.gpu_store.books.arena_books import ArenaBooks, Shelf
from afield.gpu_store.books.catalogue import Catalogue
from afield.gpu_store.books.copying import Copying
from afield.gpu_store.books.disk_books import MAX_FILE_BYTES
from afield.gpu_store.books.records import LAST, Copy, Key
from afield.gpu_store.books.windows import cheapest_window, looks_at_all, stretches_of
from afield.gpu_store.tiers import HOST, PREFETCH, Collect, Trim

MAX_SPILLS = 8
#: Of small copies more may leave at a time, as long as all that leave are not more than so many, and so many bytes.
MAX_SMALL_SPILLS = 512
SMALL_SPILLS_BYTES = 8 << 20
MAX_WRITES = 2
RETRY_S = 0.05

#: So many copies are looked at in one round, and so many rounds are made at a time: the rest waits for the next time.
_SCAN = 1024
_ROUNDS = 4
#: After a round that found only pinned copies, so many are closed at once: a barrier costs more than a copy.
_PROBE = 256


class _Allowance:
    """How many copies, about how many bytes, and how large copies may start to leave; or of small ones, so many and so much."""

    __slots__ = ("count", "largest", "size", "small_bytes", "small_count")

    def __init__(self, count: int, size: int, largest: int, small_count: int = 0, small_bytes: int = 0) -> None:
        self.count = count
        self.size = size
        self.largest = largest if max(count, small_count) > 0 else 0
        self.small_count = small_count
        self.small_bytes = small_bytes

    def admits(self, room: int) -> bool:
        """Tell whether one more copy may leave, and count it."""
        is_small = self.small_count > 0 and room <= self.small_bytes
        if room > self.largest or self.size <= 0 or (self.count <= 0 and not is_small):
            return False
        self.count -= 1
        self.size -= room
        self.small_count -= 1
        self.small_bytes -= room
        return True


class Eviction:
    """Makes room."""

    def __init__(self, catalogue: Catalogue, copying: Copying) -> None:
        self._catalogue = catalogue
        self._copying = copying

    def make_room(self, books: ArenaBooks) -> bool:
        """Let go, or start to let go, of what the arena is short of; True: something went, so look who fits now."""
        shortage = books.shortage()
        head = books.queue.head
        if books.number != HOST and books.leaving and (head is None or head.key[0] >= PREFETCH):
            self._copying.stop_spills(books.number)
        if books.blocked and (not shortage or head is None or head.key >= books.blocked_for):
            return False
        if shortage > 0 and head is not None:
            self._trim(books)
            if head.room <= books.extents.free_bytes:
                if self._clear_window(books, head.room, head.key):
                    return True
                if not looks_at_all(books) and self._evict(books, shortage, head.key, True):
                    return True  # of very many copies those used longest ago go, until there is room
            elif self._evict(books, shortage, head.key, True):
                return True
            books.block(head.key)
            self._collect(books)
            return False
        excess = books.excess()
        if excess > 0:
            if self._evict(books, excess, LAST, False):
                return True
            books.block(LAST)
        return False

    def _trim(self, books: ArenaBooks) -> None:
        if books.leased_bytes and not books.trimming:
            books.trimming = True
            self._catalogue.effects.append(Trim(books.number))

    def _collect(self, books: ArenaBooks) -> None:
        """What cannot go is in use, perhaps by nothing but garbage: each time that this is found out, all look for it."""
        if books.primaries or books.secondaries or books.spares or books.fixed or books.leased_bytes:
            self._catalogue.effects.append(Collect(books.number))

    def _evict(self, books: ArenaBooks, wanted: int, key: Key, may_wait: bool) -> bool:
        if books.spares and self._shed(books, wanted):
            return True
        for round_number in range(_ROUNDS):
            probe = _PROBE if round_number else 1
            secondaries = self._pick(books, books.secondaries, wanted, key, probe)
            if secondaries and self._catalogue.drop(secondaries):
                return True
            picked = self._pick(books, books.primaries, wanted, key, probe)
            if not picked and not secondaries:
                return False
            if picked and self._let_go(books, picked, wanted, key, may_wait):
                return True
        return False

    def _clear_window(self, books: ArenaBooks, room: int, key: Key) -> bool:
        """Have the copies leave that lie where `room` bytes in one piece are to be had most cheaply."""
        for _ in range(_ROUNDS):
            allowance = self._allowance(books)
            stretches = stretches_of(books, self._catalogue.pins, key, allowance.largest)
            copies = cheapest_window(stretches, room)
            if not copies:
                return False
            spares = [copy for copy in copies if copy.part.object.spare]
            others = [copy for copy in copies if not copy.part.object.spare]
            backed = [copy for copy in others if copy.part.backed]
            alone = [copy for copy in others if not copy.part.backed and allowance.admits(copy.room)]
            freed = bool(spares) and self._catalogue.shed(spares) > 0
            picked = [*backed, *alone]
            if picked and self._let_go(books, picked, sum(copy.room for copy in picked), key, True):
                freed = True
            if freed:
                return True
        return False

    def _pick(self, books: ArenaBooks, shelf: Shelf, wanted: int, key: Key, at_least: int) -> list[Copy]:
        """Return copies from the front of a shelf that may go as far as the books know: `wanted` bytes, or all there are."""
        allowance = self._allowance(books)
        picked: list[Copy] = []
        in_use: list[Copy] = []
        found = 0
        for copy in islice(shelf, _SCAN):
            if not copy.may_leave(key):
                in_use.append(copy)
                continue
            if not copy.part.backed and not allowance.admits(copy.room):
                continue
            picked.append(copy)
            found += copy.room
            if found >= wanted and len(picked) >= at_least:
                break
        for copy in in_use:
            books.touch(copy)
        return picked

    def _shed(self, books: ArenaBooks, wanted: int) -> bool:
        """Let go of what only lineage needs."""
        picked: list[Copy] = []
        found = 0
        for copy in islice(books.spares, _SCAN):
            picked.append(copy)
            found += copy.room
            if found >= wanted:
                break
        return self._catalogue.shed(picked) > 0

    def _allowance(self, books: ArenaBooks) -> _Allowance:
        """Return what may start to leave an arena by being copied."""
        if books.number != HOST:
            host_bytes = self._catalogue.arenas[HOST].capacity
            leaving = len(books.leaving)
            small = MAX_SMALL_SPILLS - leaving, SMALL_SPILLS_BYTES - books.leaving_bytes
            return _Allowance(MAX_SPILLS - leaving, host_bytes, host_bytes, *small)
        disk = self._catalogue.disk
        if disk.bad:
            return _Allowance(0, 0, 0)
        writes = MAX_WRITES - self._copying.writes
        largest = books.capacity if disk.limit is None else disk.limit
        return _Allowance(_SCAN * writes, MAX_FILE_BYTES * writes, largest)

    def _let_go(self, books: ArenaBooks, picked: list[Copy], wanted: int, key: Key, may_wait: bool) -> bool:
        """Free those of the primaries that are not pinned and have another copy; start to copy the others."""
        catalogue = self._catalogue
        closed = catalogue.pins.close([(copy.slot, copy.serial) for copy in picked])
        enough = 0
        freed = False
        alone: list[Copy] = []
        for copy, is_closed in zip(picked, closed, strict=True):
            if not is_closed:
                books.touch(copy)
            elif copy.part.backed and enough < wanted:
                enough += copy.room
                catalogue.remove(copy)
                freed = True
            else:
                catalogue.pins.publish(copy.slot, copy.serial)
                if enough < wanted and not copy.part.backed:
                    enough += copy.room
                    alone.append(copy)
        if not alone:
            return freed
        if books.number == HOST:
            return self._copying.write(alone, MAX_WRITES - self._copying.writes) > 0 or freed
        started = [self._copying.spill(copy, key, may_wait) for copy in alone]
        return freed or any(started)
