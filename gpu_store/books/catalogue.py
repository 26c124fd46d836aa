"""Core catalogue of the sealed objects: their parts and copies in all arenas, their owners, and what was lost.

Theory of operation. All changes of which copy lies where go through here, so that an arena's books, the shelves, the slots of
the pin board and those who hold a copy agree. What follows from a change for others is noted in lists that the facade works
off after each event: needs that have all they want (`ready`), that lost a copy they had (`rewanted`), that cannot be met
(`failed`), and objects that were lost.

Messages about one object travel on different channels, so a free may overtake the seal it belongs to. It is remembered until
the seal comes (at most `MAX_EARLY_FREES` of them, the oldest forgotten first). Ids are deterministic: a task that runs again
seals the same object id. So an early free should name the process whose seal it expects: it then spares the seal of a later
execution, and dies with that process.

A second seal of an object replaces, by position, the parts that were lost; where the first copy of a part is whole, readers
may map either, and the second one is kept beside it until the object is freed.
"""

from __future__ import annotations

from collections.abc import Sequence

from afield.gpu_store.books.arena_books import ArenaBooks
from afield.gpu_store.books.disk_books import DiskBooks
from afield.gpu_store.books.records import LAST, Copy, Need, Part, StoredObject
from afield.gpu_store.tiers import (
    DISK,
    HOST,
    NOWHERE,
    SPARE,
    DeleteFile,
    Effect,
    Lost,
    PartCopy,
    Pins,
    StoreUsageError,
)
from afield.machines import FlightRecorder

# A free overtakes its seal by milliseconds, so the number in flight is about the number of large results per
# millisecond; the bound only matters for seals that never come. An entry takes about 150 bytes.
MAX_EARLY_FREES = 65_536


class Catalogue:
    """Which copy of which part of which object lies where; `effects` collects what is to be done."""

    def __init__(self, pins: Pins, disk: DiskBooks) -> None:
        self.recorder = FlightRecorder()
        self.pins = pins
        self.disk = disk
        self.arenas: dict[int, ArenaBooks] = {}
        self.gone: dict[int, str] = {}  # arenas that were lost, and why
        self.objects: dict[bytes, StoredObject] = {}
        self.owners: dict[bytes, dict[bytes, None]] = {}
        self.effects: list[Effect] = []
        self.ready: list[Need] = []
        self.rewanted: list[tuple[Need, tuple[int, int]]] = []
        self.failed: list[tuple[Need, str, str]] = []
        self._lost: dict[tuple[bytes, str, str], dict[bytes, None]] = {}
        self._early_frees: dict[bytes, bytes | None] = {}  # object id -> the client whose seal is expected, if known

    # -- objects --------------------------------------------------------------------------------------------------

    def seal(self, client: bytes, object_id: bytes, owner: bytes, parts: Sequence[PartCopy]) -> StoredObject | None:
        """Make the parts, which lie in chunks leased to `client`, an object; None: it was freed before.

        Raises StoreUsageError, and changes nothing, when a part is not leased to `client` or two overlap.
        """
        causes = self._check(client, parts)
        early = self._early_frees
        if early and object_id in early and early[object_id] in (None, client):
            del early[object_id]
            for part in parts:
                if part.arena not in causes:
                    books = self.arenas[part.arena]
                    books.extents.free(part.offset, books.cut(client, part.offset, part.size))
                self.pins.release(part.slot)
            return None
        stored = self.objects.get(object_id)
        if stored is None:
            stored = self.objects[object_id] = StoredObject(object_id, owner)
            ids = self.owners.get(owner)
            if ids is None:
                ids = self.owners[owner] = {}
            ids[object_id] = None
        elif stored.owner != owner:
            self._set_owner(stored, owner)
        stored.sealer = client
        for index, sealed in enumerate(parts):
            self._seal_part(client, stored, index, sealed, causes)
        return stored

    def _seal_part(
        self, client: bytes, stored: StoredObject, index: int, sealed: PartCopy, causes: dict[int, str]
    ) -> None:
        arena = sealed.arena
        if index == len(stored.parts):
            part = Part(stored, index, sealed.size, sealed.home)
            stored.parts.append(part)
        else:
            part = stored.parts[index]
        if arena in causes:
            self.pins.release(sealed.slot)
            if not part.copies and part.disk is None:
                self.note_lost(part, causes[arena])
            return
        books = self.arenas[arena]
        room = books.cut(client, sealed.offset, sealed.size)
        if part.copies or part.disk is not None:
            extra = Copy(part, books, sealed.offset, room, sealed.slot, sealed.serial)
            stored.extras.append(extra)
            books.enter(extra, stored.owner)
            return
        part.size, part.home, part.lost = sealed.size, sealed.home, ""
        stored.spare = False  # it was made again: somebody needs it
        copy = part.copies[arena] = Copy(part, books, sealed.offset, room, sealed.slot, sealed.serial)
        books.enter(copy, stored.owner)

    def _check(self, client: bytes, parts: Sequence[PartCopy]) -> dict[int, str]:
        """Return which arenas of the parts are lost, and why; raise unless the rest is leased to `client`."""
        if len(parts) == 1:
            part = parts[0]
            books = self.arenas.get(part.arena)
            if books is not None and books.life == part.life:
                books.check_leased(client, [(part.offset, part.size)])
                return {}
        if not parts:
            raise StoreUsageError(f"no parts in chunks of {client.hex()} are named")
        places: dict[int, list[tuple[int, int]]] = {}
        causes: dict[int, str] = {}
        for part in parts:
            if self.is_over(part.arena, part.life):
                causes[part.arena] = self.gone[part.arena]
            else:
                places.setdefault(part.arena, []).append((part.offset, part.size))
        for arena, pieces in places.items():
            self.arenas[arena].check_leased(client, pieces)
        return causes

    def is_over(self, arena: int, life: int) -> bool:
        """Tell whether this life of an arena is over; raise StoreUsageError if it never was."""
        books = self.arenas.get(arena)
        if books is not None and books.life == life:
            return False
        if arena not in self.gone or (books is not None and life > books.life):
            raise StoreUsageError(f"arena {arena} has no life {life}")
        return True

    def free(self, object_id: bytes, sealer: bytes | None) -> StoredObject | None:
        """Take the object out and free its copies; None: it is not sealed yet, and will be freed as soon as it is."""
        stored = self.objects.pop(object_id, None)
        if stored is None:
            early = self._early_frees
            early[object_id] = sealer
            if len(early) > MAX_EARLY_FREES:
                del early[next(iter(early))]
            return None
        self._disown(stored)
        for part in stored.parts:
            for copy in part.copies.values():
                self._discard(copy)
            part.copies.clear()
            self.disk.remove(part)
        for copy in stored.extras:
            self._discard(copy)
        return stored

    def client_died(self, client: bytes) -> None:
        """Forget the frees that expect a seal of this client."""
        for object_id in [object_id for object_id, sealer in self._early_frees.items() if sealer == client]:
            del self._early_frees[object_id]

    def _set_owner(self, stored: StoredObject, owner: bytes) -> None:
        """Make `owner` answer for the object."""
        for copy in self.copies_of(stored):
            books = self.arenas[copy.arena]
            books.debit(stored.owner, copy.room)
            books.credit(owner, copy.room)
        self._disown(stored)
        stored.owner = owner
        self.owners.setdefault(owner, {})[stored.id] = None

    def copies_of(self, stored: StoredObject) -> list[Copy]:
        """Return all copies in memory, those of second executions included."""
        return [copy for part in stored.parts for copy in part.copies.values()] + stored.extras

    # -- copies ---------------------------------------------------------------------------------------------------

    def add_copy(self, part: Part, arena: int, offset: int, room: int) -> Copy:
        """Enter a copy that was made in a place of its own, and let it be pinned."""
        slot, serial = self.pins.take()
        books = self.arenas[arena]
        books.moving_bytes -= room
        copy = part.copies[arena] = Copy(part, books, offset, room, slot, serial)
        books.enter(copy, part.object.owner)
        self._reshelve(part)
        if slot:
            self.pins.publish(slot, serial)
        return copy

    def remove(self, copy: Copy) -> None:
        """Free a copy that is closed and not in use; those who held it have to get another."""
        part = copy.part
        del part.copies[copy.arena]
        self.arenas[copy.arena].free(copy, part.object.owner)
        self.pins.release(copy.slot)
        self._unhold_all(copy)
        self._reshelve(part)

    def drop(self, copies: Sequence[Copy]) -> int:
        """Free those of the copies, each of a part that has another one, that nobody has pinned; return their bytes."""
        freed = 0
        closed = self.pins.close([(copy.slot, copy.serial) for copy in copies]) if copies else []
        for copy, is_closed in zip(copies, closed, strict=True):
            if is_closed and copy.part.backed:
                freed += copy.room
                self.remove(copy)
            else:
                if is_closed:  # another copy of the same part went before it
                    self.pins.publish(copy.slot, copy.serial)
                self.arenas[copy.arena].touch(copy)
        return freed

    def shed(self, copies: Sequence[Copy]) -> int:
        """Give up the objects of these copies, which only lineage needs, unless a process has pinned them; return the bytes."""
        objects = list(dict.fromkeys(copy.part.object for copy in copies))
        all_copies = [self.copies_of(stored) for stored in objects]
        closable = [
            []
            if stored.needs
            or any(part.makings for part in stored.parts)
            or any(not c.slot or not c.may_leave(LAST) for c in theirs)
            else theirs
            for stored, theirs in zip(objects, all_copies, strict=True)
        ]
        flat = [(copy.slot, copy.serial) for theirs in closable for copy in theirs]
        closed = iter(self.pins.close(flat) if flat else [])
        freed = 0
        for stored, kept, theirs in zip(objects, all_copies, closable, strict=True):
            are_closed = [next(closed) for _ in theirs]
            if theirs and all(are_closed):
                freed += sum(copy.room for copy in theirs)
                self._shed(stored)
                continue
            for copy, is_closed in zip(theirs, are_closed, strict=True):
                if is_closed:
                    self.pins.publish(copy.slot, copy.serial)
            for copy in kept:
                self.arenas[copy.arena].touch(copy)
        return freed

    def _shed(self, stored: StoredObject) -> None:
        """All copies of the object are closed: free them. It stays in the books until its owner frees it."""
        for copy in self.copies_of(stored):
            self._discard(copy)
        stored.extras.clear()
        for part in stored.parts:
            part.copies.clear()
            self.disk.remove(part)
            self.note_lost(part, "memory was short, and nothing but lineage needed it", SPARE)

    def set_spare(self, object_id: bytes, owner: bytes, spare: bool) -> None:
        """The owner says whether nothing but lineage needs the object."""
        stored = self.objects.get(object_id)
        if stored is not None and stored.owner == owner and stored.spare != spare:
            stored.spare = spare
            for part in stored.parts:
                self._reshelve(part)

    def lose_copy(self, copy: Copy, books: ArenaBooks) -> None:
        """A copy went with its arena, whose books are closed; its part may be lost by that."""
        books.go(copy, "lose")
        copy.arena, arena = NOWHERE, copy.arena
        self.pins.release(copy.slot)
        copy.slot = 0
        part = copy.part
        if part.copies.get(arena) is copy:
            del part.copies[arena]
            self._unhold_all(copy, arena)
            self._reshelve(part)
        elif copy in part.object.extras:
            part.object.extras.remove(copy)

    def bury_if_unused(self, copy: Copy) -> None:
        """A job or a process does not need the copy any more: free it if only that was waited for."""
        if copy.state == "dying" and not copy.in_use and copy.arena in self.arenas:
            self.arenas[copy.arena].bury(copy)

    # -- who waits ------------------------------------------------------------------------------------------------

    def hold(self, need: Need, want: tuple[int, int], copy: Copy) -> None:
        """A copy that a need wants is there; it is kept for it while others may not come before the need."""
        if copy.held is None:
            copy.held = {}
        copy.held[need] = None
        need.held[want] = copy
        need.missing.pop(want, None)
        self.arenas[copy.arena].touch(copy)
        if not need.missing:
            self.ready.append(need)

    def unhold(self, need: Need) -> list[Copy]:
        """The need is over; return what was held for it."""
        copies = list(need.held.values())
        need.held.clear()
        for copy in copies:
            if copy.held is not None:
                copy.held.pop(need, None)
        return copies

    def note_lost(self, part: Part, cause: str, kind: str = "") -> None:
        """No copy of the part is left: its owner is to be told."""
        part.lost = cause
        self._lost.setdefault((part.object.owner, cause, kind), {})[part.object.id] = None

    def flush(self) -> list[Effect]:
        """Return what is to be done, once."""
        if self._lost:
            for (owner, cause, kind), ids in self._lost.items():
                self.effects.append(Lost(owner, list(ids), cause, kind))
            self._lost = {}
        effects, self.effects = self.effects, []
        deleted: list[Effect] = [DeleteFile(number) for number in self.disk.deleted()]
        return deleted + effects if deleted else effects  # first, since what is written may need the room

    # -- inside ---------------------------------------------------------------------------------------------------

    def _discard(self, copy: Copy) -> None:
        """The copy's object is freed: from now on it cannot be pinned, also by whom it was promised to."""
        books = self.arenas[copy.arena]
        if copy.in_use:
            books.free_later(copy, copy.part.object.owner)
        else:
            books.free(copy, copy.part.object.owner)
        self.pins.release(copy.slot)
        copy.slot = 0

    def _unhold_all(self, copy: Copy, arena: int | None = None) -> None:
        if not copy.held:
            return
        want = (copy.part.index, copy.arena if arena is None else arena)
        for need in copy.held:
            if need.held.pop(want, None) is not None:
                self.rewanted.append((need, want))
        copy.held = None

    def _reshelve(self, part: Part) -> None:
        """Whether a copy is secondary depends on the others."""
        for copy in part.copies.values():
            self.arenas[copy.arena].shelve(copy)

    def _disown(self, stored: StoredObject) -> None:
        ids = self.owners[stored.owner]
        del ids[stored.id]
        if not ids:
            del self.owners[stored.owner]


def best_copy(part: Part) -> PartCopy:
    """Return where a part is best read, as a hint: at home, else in the host store, else on a device, else on disk."""
    copies = part.copies
    copy = copies.get(part.home) or copies.get(HOST) or next(iter(copies.values()), None)
    if copy is not None:
        return copy.public()
    if part.disk is not None:
        return PartCopy(DISK, part.disk.offset, part.size, 0, 0, part.home)
    return PartCopy(NOWHERE, 0, part.size, 0, 0, part.home)
