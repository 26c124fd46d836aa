"""Core of residency: which copy of which part of which object lies where in a node's memory, and what moves when it is short.

Theory of operation. A stored object is a list of *parts*, each an immutable range of bytes with a home: the arena that it was
made in. A part has copies in arenas (0: the host slab, 1 + i: the slab of device i) and perhaps on disk. Clients (processes)
lease ranges of an arena, write there, and seal what they have written; from then on it belongs to an object and survives them.
They read through the pin board without asking; where what they want is not, or no longer, they say what they `need`.

All decisions are made here and nothing is done here: every event is a method that returns effects (`tiers`), to be executed in
their order; each job among them (Move, WriteFile, ReadFile) is answered with one `finished`. The work is divided:

- `arena_books`: the bytes of one arena, the queue for them, the shelves in the order of use;
- `disk_books`: spill files;
- `catalogue`: objects, copies, owners, early frees, losses;
- `copying`: copies in the making, and the jobs;
- `eviction`: what goes when an arena is short of room;
- `needs`: who waits for which parts, and to whom some were promised.

After each event, while it helps: needs that have got all they want are answered, those who wait for room are served, in each
arena strictly in the order of (priority, arrival), and where that does not help room is made. Whoever waits brings a deadline;
`expire` refuses those whose time is over, and a refusal says how much was asked, how much there is, and who holds it. Nothing
else blocks a queue for good: its head fits in an empty arena, or it would have been refused at once.

A device that is lost takes its arena along: its copies, leases, queue and jobs. Parts with another copy live on; the owners of
objects of which a part has none are told (`Lost`). The object stays in the books, to be sealed again or freed by its owner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from afield.gpu_store.books.arena_books import ArenaBooks
from afield.gpu_store.books.catalogue import Catalogue, best_copy
from afield.gpu_store.books.checks import complaints
from afield.gpu_store.books.copying import Copying
from afield.gpu_store.books.disk_books import DiskBooks
from afield.gpu_store.books.eviction import RETRY_S, Eviction
from afield.gpu_store.books.needs import Needs
from afield.gpu_store.books.records import Key, LeaseRequest, Making, Need
from afield.gpu_store.tiers import (
    ARGUMENT,
    DISK,
    FINISH,
    FIRST_LIFE,
    GET,
    HOST,
    PREFETCH,
    ArenaUsage,
    Effect,
    Granted,
    PartCopy,
    Pins,
    Refused,
    StoreUsageError,
)

#: Each round of work after an event serves somebody, or frees or starts to move something: there is far less of this.
MAX_ROUNDS = 100_000


class Residency:
    """The books of all tiers of one node; all sizes in bytes, all times on the caller's clock in seconds."""

    def __init__(
        self,
        host_bytes: int,
        pins: Pins,
        *,
        high: float = 0.85,
        low: float = 0.70,
        disk_limit_bytes: int | None = None,
        host_alignment: int = 64,
        device_alignment: int = 512,
    ) -> None:
        """Keep the books of a host slab of `host_bytes`; devices are added when their slabs are there.

        Args:
            host_bytes: size of the host slab.
            pins: the pin board.
            high: the part of an arena above which it is emptied,
            low: and the part down to which.
            disk_limit_bytes: what spill files may take; None: what the disk holds.
            host_alignment: of extents in the host slab, in bytes,
            device_alignment: and in those of devices.
        """
        self._disk = DiskBooks(disk_limit_bytes)
        self._catalogue = Catalogue(pins, self._disk)
        self._arenas = self._catalogue.arenas
        self._copying = Copying(self._catalogue)
        self._eviction = Eviction(self._catalogue, self._copying)
        self._needs = Needs(self._catalogue, self._copying)
        self._leases: dict[tuple[bytes, int], LeaseRequest] = {}
        self._marks = high, low
        self._device_alignment = device_alignment
        self._arrivals = 0
        self.recorder = self._catalogue.recorder
        self._arenas[HOST] = ArenaBooks(HOST, "the host store", host_bytes, host_alignment, self._marks, self.recorder)

    # -- arenas ---------------------------------------------------------------------------------------------------

    def add_arena(self, arena: int, capacity_bytes: int, label: str, life: int = FIRST_LIFE) -> list[Effect]:
        """The slab of a device is there; `label` names it in errors, and `life` is a number that grows with each slab.

        Raises StoreUsageError if it was there already.
        """
        if arena <= HOST or arena in self._arenas:
            raise StoreUsageError(f"arena {arena} is there already, or is not a device's")
        alignment = self._device_alignment
        self._arenas[arena] = ArenaBooks(arena, label, capacity_bytes, alignment, self._marks, self.recorder, life)
        return self._conclude()

    def remove_arena(self, arena: int, cause: str) -> list[Effect]:
        """A device is lost, with all that was in its slab; of an arena that was not there only the cause is noted.

        Call this when nothing reads or writes for the device any more. The jobs that it was part of end by this, and need
        not be `finished`. Raises StoreUsageError for the host store.
        """
        if arena <= HOST:
            raise StoreUsageError(f"arena {arena} is not a device's")
        catalogue = self._catalogue
        catalogue.gone[arena] = cause
        books = self._arenas.pop(arena, None)
        if books is None:
            return []
        for request in [request for request in self._leases.values() if request.arena == arena]:
            del self._leases[request.client, request.request_id]
            catalogue.effects.append(
                Refused(request.client, request.request_id, arena, cause, never_fits=True, lost=True)
            )
        self._copying.arena_lost(books, cause)
        self._unblock()
        return self._conclude()

    def reserve(self, arena: int, size: int) -> list[Effect]:
        """Of the arena, `size` bytes in all are for tasks' own use: what is sealed is kept below the rest."""
        books = self._arenas.get(arena)
        if books is not None:
            books.reserved = min(size, books.capacity)
        return self._conclude()

    # -- room -----------------------------------------------------------------------------------------------------

    def lease(
        self,
        client: bytes,
        request_id: int,
        arena: int,
        size: int,
        *,
        priority: int = ARGUMENT,
        block: bool = True,
        deadline: float | None = None,
        life: int | None = None,
    ) -> list[Effect]:
        """Grant a chunk of `size` bytes, or queue the request (`block`) until there is room or `deadline` is past.

        Refuses at once what can never fit, what is for another `life` of the arena than the present one (None: for whichever it
        is), and without `block` what does not fit now or would overtake a waiting request.
        Raises StoreUsageError for a bad size, and for a request that waits already.
        """
        if size <= 0 or (client, request_id) in self._leases:
            raise StoreUsageError(
                f"lease of {size} bytes as request {request_id}: bad size, or the request waits already"
            )
        books = self._arenas.get(arena)
        if life is not None and self._catalogue.is_over(arena, life):
            return [Refused(client, request_id, arena, self._catalogue.gone[arena], never_fits=True, lost=True)]
        if books is None or books.extents.rounded(size) > books.capacity:
            return [Refused(client, request_id, arena, self.describe_full(arena, size), never_fits=True)]
        room = books.extents.rounded(size)
        key = self._next_key(FINISH if books.is_finishing(client, room) else priority)
        if not books.queue.keeps_waiting(key):
            offset = books.extents.allocate(room)
            if offset is not None:
                books.lease(client, offset, room)
                granted = Granted(client, request_id, arena, offset, room, books.life)
                return [granted, *self._conclude()] if books.pressed else [granted]
        request = LeaseRequest(key, room, client, request_id, arena, size, deadline)
        if not books.queue:
            books.trimming = False
        books.queue.add(request)
        self._leases[client, request_id] = request
        self._work_off()
        if not block and (client, request_id) in self._leases:
            reason = self.describe_full(arena, size)
            del self._leases[client, request_id]
            books.queue.discard(request)
            self._catalogue.effects.append(Refused(client, request_id, arena, reason))
        return self._conclude()

    def give_back(self, client: bytes, arena: int, offset: int, size: int, life: int = FIRST_LIFE) -> list[Effect]:
        """Free [offset, offset + size), a leased and unsealed part (usually the tail) of a chunk of `client`.

        Raises StoreUsageError, and changes nothing, if it is not. Of a life that is over nothing can be given back.
        """
        if self._catalogue.is_over(arena, life):
            return []
        books = self._arenas[arena]
        books.check_leased(client, [(offset, size)])
        books.extents.free(offset, books.cut(client, offset, size))
        books.trimming = False
        return self._conclude()

    def client_died(self, client: bytes) -> list[Effect]:
        """Free what `client` leased and did not seal, and forget its waiting requests; its sealed objects stay."""
        self._catalogue.client_died(client)
        for request in [request for request in self._leases.values() if request.client == client]:
            del self._leases[request.client, request.request_id]
            self._arenas[request.arena].queue.discard(request)
        self._needs.client_died(client)
        for books in self._arenas.values():
            books.end_leases(client)
            books.trimming = False
        self._unblock()
        return self._conclude()

    # -- objects --------------------------------------------------------------------------------------------------

    def seal(self, client: bytes, object_id: bytes, owner: bytes, parts: Sequence[PartCopy]) -> list[Effect]:
        """Make the parts, which lie in chunks leased to `client`, object `object_id` of `owner`; their slots are published.

        If the object is there already, its task ran again: the parts replace those that were lost, and are kept beside those
        that are whole. Raises StoreUsageError, and changes nothing, when a part is not leased to `client` or two overlap.
        """
        stored = self._catalogue.seal(client, object_id, owner, parts)
        if stored is not None:
            self._needs.sealed(stored)
        return self._conclude()

    def free(self, object_id: bytes, sealer: bytes | None = None) -> list[Effect]:
        """Free all copies of the object now, or, if it is not sealed yet, as soon as it is.

        With `sealer` only what this client sealed is meant: an object that somebody else has sealed since stays. Pins are not
        looked at: nobody reads what its owner frees. What a job reads is freed when the job ends.
        """
        stored = self._catalogue.objects.get(object_id)
        if stored is not None:
            if sealer is not None and stored.sealer != sealer:
                return []
            if stored.needs:
                self._needs.object_freed(stored)
            self._copying.object_freed(stored.parts)
        self._catalogue.free(object_id, sealer)
        return self._conclude()

    def set_spare(self, owner: bytes, object_ids: Sequence[bytes], spare: bool) -> list[Effect]:
        """Nothing but lineage of their owner needs these objects (or not any more): they go before others have to move."""
        for object_id in object_ids:
            self._catalogue.set_spare(object_id, owner, spare)
        return self._conclude()

    def owner_died(self, owner: bytes) -> list[bytes]:
        """Return the ids of the objects of `owner`, oldest first; what becomes of them the caller decides."""
        return list(self._catalogue.owners.get(owner, ()))

    def parts(self, object_id: bytes) -> list[PartCopy] | None:
        """Return where each part is best read, as a hint (DISK: on disk only; NOWHERE: lost), or None without the object."""
        stored = self._catalogue.objects.get(object_id)
        return None if stored is None else [best_copy(part) for part in stored.parts]

    def lost_from(self, object_id: bytes) -> bytes | None:
        """Return the owner of an object of which a part is lost; None if it is whole, or not in the books."""
        stored = self._catalogue.objects.get(object_id)
        return stored.owner if stored is not None and any(part.lost for part in stored.parts) else None

    def objects(self) -> Iterator[tuple[bytes, bytes, dict[int, int]]]:
        """Yield (id, owner, bytes by arena, rounding included) of every object; DISK counts the pieces on disk."""
        for object_id, stored in self._catalogue.objects.items():
            sizes: dict[int, int] = {}
            for copy in self._catalogue.copies_of(stored):
                sizes[copy.arena] = sizes.get(copy.arena, 0) + copy.room
            on_disk = sum(part.size for part in stored.parts if part.disk is not None)
            if on_disk:
                sizes[DISK] = on_disk
            yield object_id, stored.owner, sizes

    def counts(self) -> list[tuple[bytes, int]]:
        """Return (owner, number of its objects) of all owners."""
        return [(owner, len(ids)) for owner, ids in self._catalogue.owners.items()]

    # -- reading --------------------------------------------------------------------------------------------------

    def need(
        self,
        client: bytes,
        request_id: int,
        object_id: bytes,
        wants: Sequence[tuple[int, int]],
        *,
        priority: int = GET,
        deadline: float | None = None,
    ) -> list[Effect]:
        """Have parts (index, arena) of the object brought there; answered with Found, or NotFound at `deadline` at the latest.

        Raises StoreUsageError for a request id that is in use, and if nothing is wanted, or on disk.
        """
        key = self._next_key(priority)
        self._needs.ask(Need(key, client, request_id, object_id, list(wants), deadline))
        return self._conclude()

    def mapped(self, client: bytes, request_id: int) -> list[Effect]:
        """`client` has pinned what it was promised as `request_id`, or does not want it any more."""
        self._needs.mapped(client, request_id)
        return self._conclude()

    def prefetch(self, object_id: bytes, wants: Sequence[tuple[int, int]]) -> list[Effect]:
        """Have parts brought to arenas when there is room to spare; nobody is told."""
        self._needs.prefetch(object_id, wants, self._next_key(PREFETCH))
        return self._conclude()

    def finished(self, job: int, error: str = "") -> list[Effect]:
        """A Move, WriteFile or ReadFile is done, or failed and `error` says how."""
        return self.finished_all([(job, error)])

    def finished_all(self, done: Sequence[tuple[int, str]]) -> list[Effect]:
        """As `finished`, for several jobs at once: what follows from all of them is done together."""
        for job, error in done:
            if self._copying.finished(job, error) and not error:
                self._unblock()
        self._copying.drop_what_left()
        return self._conclude()

    # -- time -----------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Effect]:
        """Refuse the waiting requests whose deadline is not after `now`, and look again for what may leave by now."""
        if self._is_calm():
            return []
        for request in [r for r in self._leases.values() if r.deadline is not None and r.deadline <= now]:
            reason = self.describe_full(request.arena, request.size)
            del self._leases[request.client, request.request_id]
            self._arenas[request.arena].queue.discard(request)
            self._catalogue.effects.append(Refused(request.client, request.request_id, request.arena, reason))
        self._needs.expire(now)
        self._disk.expire(now)
        for books in self._arenas.values():
            if books.blocked:
                if books.due is None:
                    books.due = now + RETRY_S
                elif books.due <= now:
                    books.blocked = False
                    books.trimming = False  # what clients had in use then may be free by now
        effects = self._conclude()
        for books in self._arenas.values():
            if books.blocked and books.due is None:  # again: pins vanish without an event, so nobody else would call
                books.due = now + RETRY_S
        return effects

    def next_deadline(self) -> float | None:
        """Return when to call `expire` at the latest; the times of what has just begun are known after the next call."""
        if self._is_calm():
            return None
        times = [request.deadline for request in self._leases.values() if request.deadline is not None]
        due = self._needs.next_deadline()
        if due is not None:
            times.append(due)
        for books in self._arenas.values():
            if books.blocked and books.due is not None and books.may_find_more:
                times.append(books.due)
        if self._disk.bad and self._disk.due is not None and self._arenas[HOST].queue:
            times.append(self._disk.due)
        return min(times, default=None)

    def _is_calm(self) -> bool:
        """Tell whether nobody waits and nothing failed, so that time changes nothing: the daemon asks in each turn."""
        if self._leases or self._needs or self._disk.bad or self._disk.revived:
            return False
        return not any(books.blocked for books in self._arenas.values())

    # -- arithmetic -----------------------------------------------------------------------------------------------

    @property
    def arenas(self) -> list[int]:
        """The arenas that are there."""
        return list(self._arenas)

    @property
    def moved_bytes(self) -> dict[str, int]:
        """Bytes moved so far: device_to_host, host_to_device, peer, disk_write, disk_read; counted at completion."""
        return dict(self._copying.moved_bytes)

    def usage(self, arena: int) -> ArenaUsage:
        """Return how an arena, or the disk, is used. Raises KeyError for an arena that is not there."""
        if arena != DISK:
            return self._arenas[arena].usage()
        disk = self._disk
        return ArenaUsage("the disk", disk.limit or 0, disk.used, 0, disk.live_bytes, 0, 0, 0, 0, 0, 0, 0)

    def has_plenty(self, arena: int, size: int) -> bool:
        """Tell whether an arena would stay below its low mark with `size` bytes more."""
        books = self._arenas.get(arena)
        return books is not None and books.has_plenty(size)

    def describe_full(self, arena: int, asked: int) -> str:
        """Return what tells a user why `asked` bytes were not granted in an arena, and what to do; names each tier."""
        return self._needs.describe_full(arena, asked)

    def validate(self) -> list[str]:
        """Return what is wrong with the books, none if all is well."""
        return complaints(self._catalogue, self._copying)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _next_key(self, priority: int) -> Key:
        self._arrivals += 1
        return priority, self._arrivals

    def _unblock(self) -> None:
        for books in self._arenas.values():
            books.blocked = False

    def _conclude(self) -> list[Effect]:
        """Do all that follows from an event, and return what is to be done."""
        self._work_off()
        return self._catalogue.flush()

    def _work_off(self) -> None:
        catalogue, needs = self._catalogue, self._needs
        if self._disk.revived:
            self._disk.revived = self._arenas[HOST].blocked = False
        again, rounds = True, 0
        while again:
            rounds += 1
            assert rounds < MAX_ROUNDS, "the books of residency run in circles"
            again = bool(catalogue.ready or catalogue.rewanted or catalogue.failed) and needs.work_off()
            for books in self._arenas.values():
                if books.pressed:
                    again |= self._serve(books)
                    again |= self._eviction.make_room(books)

    def _serve(self, books: ArenaBooks) -> bool:
        """Give room to those who wait, in their order, until there is none."""
        served = False
        while (request := books.queue.head) is not None:
            if isinstance(request, LeaseRequest):
                offset = books.extents.allocate(request.room)
                if offset is None:
                    break
                books.queue.discard(request)
                del self._leases[request.client, request.request_id]
                books.lease(request.client, offset, request.room)
                granted = Granted(request.client, request.request_id, books.number, offset, request.room, books.life)
                self._catalogue.effects.append(granted)
            else:
                assert isinstance(request, Making)
                if request.key[0] >= PREFETCH and not books.admits_prefetch(request.room):
                    break
                offset = books.reserve_place(request.room)
                if offset is None:
                    break
                books.queue.discard(request)
                self._copying.place(request, offset)
            served = True
        if not books.queue:
            books.trimming = False  # whoever waits next asks anew
        return served
