"""Core of the needs: processes that wait for parts of objects to be where they can read them.

Theory of operation. A need names parts and, for each, the arena in which it is wanted. A copy that is there already is held,
what is not there is made (`copying`); when all are there, the process is told (`Found`), and each copy is promised to it until
it says that it has pinned it (`mapped`) or dies. Its life is the table `NEED` (`lives`).

A need travels on another channel than the seal of its object, and may overtake it: it waits for it for `SEAL_WAIT_S`. What can
never fit is refused at once. While a need waits, what it has is only *held*: who comes before it may take it away, and then it
is wanted again.

The deadline of a need is for room. What is on its way by then may take its time, according to its size: once.
"""

from __future__ import annotations

from collections.abc import Sequence

from afield.gpu_store.books.catalogue import Catalogue
from afield.gpu_store.books.copying import Copying
from afield.gpu_store.books.lives import NEED
from afield.gpu_store.books.records import Key, Need, StoredObject
from afield.gpu_store.books.refusals import describe_full
from afield.gpu_store.tiers import DISK, HOST, Found, NotFound, StoreUsageError
from afield.units import format_bytes

#: A seal that was overtaken is behind by milliseconds.
SEAL_WAIT_S = 0.5
#: What is on its way is waited for this much longer, as if links and disks carried no more than so much.
MOVE_PATIENCE_S = 5.0
SLOWEST_BYTES_PER_S = 10e6
#: More prefetches than this are not kept waiting: what comes then is not fetched ahead.
MAX_PREFETCHES = 256


class Needs:
    """Who waits for which parts, and who was promised some."""

    def __init__(self, catalogue: Catalogue, copying: Copying) -> None:
        self._catalogue = catalogue
        self._copying = copying
        self._waiting: dict[tuple[bytes, int], Need] = {}
        self._unknown: dict[bytes, dict[Need, None]] = {}  # object id -> needs that wait for its seal
        self._promised: dict[tuple[bytes, int], Need] = {}

    def __contains__(self, request: tuple[bytes, int]) -> bool:
        return request in self._waiting or request in self._promised

    # -- events ---------------------------------------------------------------------------------------------------

    def ask(self, need: Need) -> None:
        """A process needs parts; it is answered exactly once.

        Raises StoreUsageError for a request id that is in use, and for nothing or the disk wanted.
        """
        request = (need.client, need.request_id)
        if request in self or not need.wants or any(arena == DISK for _, arena in need.wants):
            raise StoreUsageError(f"need {need.request_id} of {need.client.hex()}: in use, or nothing that can be had")
        self._waiting[request] = need
        stored = self._catalogue.objects.get(need.object_id)
        if stored is None:
            self._unknown.setdefault(need.object_id, {})[need] = None
        else:
            self._start(need, stored)

    def prefetch(self, object_id: bytes, wants: Sequence[tuple[int, int]], key: Key) -> None:
        """Somebody may need these parts later."""
        stored = self._catalogue.objects.get(object_id)
        arenas = self._catalogue.arenas
        for index, arena in wants:
            if stored is None or not 0 <= index < len(stored.parts) or len(self._copying.prefetches) >= MAX_PREFETCHES:
                return
            part = stored.parts[index]
            copy = part.copies.get(arena)
            if copy is not None:
                arenas[arena].touch(copy)
            elif (
                arena in arenas and not part.lost and arenas[arena].extents.rounded(part.size) <= arenas[arena].capacity
            ):
                self._copying.prefetch(part, arena, key)

    def sealed(self, stored: StoredObject) -> None:
        """The object is there: those who asked too early get on."""
        for need in self._unknown.pop(stored.id, {}):
            self._start(need, stored)

    def mapped(self, client: bytes, request_id: int) -> None:
        """The process has pinned what it was promised."""
        need = self._promised.pop((client, request_id), None)
        if need is None:
            return
        self._go(need, "mapped")
        for copy in need.promised:
            copy.promised -= 1
            self._catalogue.bury_if_unused(copy)

    def object_freed(self, stored: StoredObject) -> None:
        """Nobody gets parts of it any more."""
        for need in list(stored.needs or ()):
            self._refuse(need, "unknown", f"object {stored.id.hex()} was freed")

    def client_died(self, client: bytes) -> None:
        """Nobody waits for the answers to this process, and it will not map what it was promised."""
        for need in [need for need in self._waiting.values() if need.client == client]:
            self._end(need, "forget")
        for request in [request for request in self._promised if request[0] == client]:
            self.mapped(*request)

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def expire(self, now: float) -> None:
        """Refuse those whose time is over."""
        for needs in self._unknown.values():
            for need in needs:
                if need.due is None:
                    need.due = now + SEAL_WAIT_S
        for need in [need for need in self._waiting.values() if _is_late(need, now)]:
            if need.state == "asked":
                self._refuse(need, "unknown", f"object {need.object_id.hex()} was freed, or never stored here")
                continue
            late = min(need.missing.values(), key=lambda making: making.offset)
            if late.parent is not None:
                late = late.parent
            if late.state == "queued":
                size = sum(making.part.size for making in need.missing.values() if making.arena == late.arena)
                size = max(size, late.part.size)
                self._refuse(need, _full(late.arena), self.describe_full(late.arena, size))
            elif need.state == "waiting":
                self._go(need, "extend")
                size = sum(making.part.size for making in need.missing.values())
                need.deadline = now + MOVE_PATIENCE_S + size / SLOWEST_BYTES_PER_S
            else:
                self._refuse(
                    need,
                    "failed",
                    f"part {late.part.index} ({format_bytes(late.part.size)}) could not be brought in time: its device or "
                    "the disk hardly answers",
                )

    def next_deadline(self) -> float | None:
        """Return when `expire` has something to do."""
        times = [time for need in self._waiting.values() for time in (need.deadline, need.due) if time is not None]
        return min(times, default=None)

    def work_off(self) -> bool:
        """Do what follows from what happened to copies and makings; returns whether there was anything."""
        catalogue = self._catalogue
        worked = False
        while catalogue.rewanted or catalogue.failed or catalogue.ready:
            worked = True
            rewanted, catalogue.rewanted = catalogue.rewanted, []
            for need, want in rewanted:
                if self._is_waiting(need):
                    self._want(need, want)
            failed, catalogue.failed = catalogue.failed, []
            for need, kind, reason in failed:
                if self._is_waiting(need):
                    self._refuse(need, kind, reason)
            ready, catalogue.ready = catalogue.ready, []
            for need in ready:
                if self._is_waiting(need) and len(need.held) == len(need.wants):
                    self._promise(need)
        return worked

    def describe_full(self, arena: int, asked: int) -> str:
        """Return what tells a user why `asked` bytes were not to be had in an arena; names each tier below it."""
        return describe_full(self._catalogue, arena, asked)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _is_waiting(self, need: Need) -> bool:
        return need.state in ("waiting", "extended")

    def _go(self, need: Need, event: str) -> None:
        key = (need.client, need.request_id, need.object_id)
        need.state = NEED.after(need.state, event, key, self._catalogue.recorder)

    def _start(self, need: Need, stored: StoredObject) -> None:
        need.object = stored
        need.due = None
        self._go(need, "know")
        need.wants = list(dict.fromkeys(need.wants))
        if not self._can_be_met(need, stored):
            return
        if stored.needs is None:
            stored.needs = {}
        stored.needs[need] = None
        for want in need.wants:
            if self._is_waiting(need):
                self._want(need, want)

    def _can_be_met(self, need: Need, stored: StoredObject) -> bool:
        """Refuse at once what cannot be had, now or ever."""
        arenas = self._catalogue.arenas
        asked: dict[int, int] = {}
        for index, arena in need.wants:
            if not 0 <= index < len(stored.parts):
                self._refuse(
                    need, "unknown", f"object {stored.id.hex()} has {len(stored.parts)} parts, none is number {index}"
                )
                return False
            if arena not in arenas:
                self._refuse(need, "device_lost", self._catalogue.gone.get(arena, f"there is no arena {arena} here"))
                return False
            asked[arena] = asked.get(arena, 0) + arenas[arena].extents.rounded(stored.parts[index].size)
        for arena, size in asked.items():
            if size > arenas[arena].capacity:
                self._refuse(need, _full(arena), self.describe_full(arena, size))
                return False
        return True

    def _want(self, need: Need, want: tuple[int, int]) -> None:
        index, arena = want
        assert need.object is not None
        part = need.object.parts[index]
        copy = part.copies.get(arena)
        if part.lost:
            self._refuse(need, "lost", f"no copy of part {index} of object {need.object.id.hex()} is left: {part.lost}")
        elif copy is not None:
            self._catalogue.hold(need, want, copy)
        elif arena not in self._catalogue.arenas:
            self._refuse(need, "device_lost", self._catalogue.gone[arena])
        else:
            making = self._copying.want(part, arena, need.key)
            making.needs[need] = None
            need.missing[want] = making

    def _promise(self, need: Need) -> None:
        held = dict(need.held)
        self._end(need, "promise")
        for copy in held.values():
            copy.promised += 1
        need.promised = list(held.values())
        self._promised[need.client, need.request_id] = need
        parts = [(want[0], held[want].public()) for want in need.wants]
        self._catalogue.effects.append(Found(need.client, need.request_id, parts))

    def _refuse(self, need: Need, kind: str, reason: str) -> None:
        self._end(need, "refuse")
        self._catalogue.effects.append(NotFound(need.client, need.request_id, kind, reason))

    def _end(self, need: Need, event: str) -> None:
        """It waits no longer; what is being made for nobody else is given up."""
        self._go(need, event)
        del self._waiting[need.client, need.request_id]
        if need.object is None:
            needs = self._unknown[need.object_id]
            del needs[need]
            if not needs:
                del self._unknown[need.object_id]
        elif need.object.needs:
            need.object.needs.pop(need, None)
        missing, need.missing = need.missing, {}
        for making in missing.values():
            self._copying.leave(making, need)
        self._catalogue.unhold(need)


def _is_late(need: Need, now: float) -> bool:
    return (need.deadline is not None and need.deadline <= now) or (need.due is not None and need.due <= now)


def _full(arena: int) -> str:
    return "full" if arena == HOST else "device_full"
