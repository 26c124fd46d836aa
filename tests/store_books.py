"""What the tests of residency share: a pin board in a dict, and the books with shorthand for what processes do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from afield.gpu_store.books.residency import Residency
from afield.gpu_store.tiers import HOST, Collect, Effect, Granted, Move, PartCopy, ReadFile, Refused, WriteFile

KIB = 1024
A, B, C = b"client-a", b"client-b", b"client-c"
OWNER, OTHER = b"owner-1", b"owner-2"
GPU, PEER = 1, 2

E = TypeVar("E")


class FakePins:
    """A pin board in a dict: which serial is open in which slot, and which slots somebody has pinned."""

    def __init__(self, slots: int = 1 << 12) -> None:
        self.free = list(range(slots - 1, 0, -1))
        self.open: dict[int, int] = {}
        self.pinned: dict[int, int] = {}
        self.taken: set[int] = set()
        self.serials = 0
        self.barriers = 0

    def take(self) -> tuple[int, int]:
        if not self.free:
            return 0, 0
        self.serials += 1
        slot = self.free.pop()
        self.taken.add(slot)
        return slot, self.serials

    def publish(self, slot: int, serial: int) -> None:
        assert slot in self.taken
        self.open[slot] = serial

    def close(self, copies: Sequence[tuple[int, int]], /) -> list[bool]:
        self.barriers += 1
        for slot, serial in copies:
            assert slot, "a copy without a slot never moves"
            assert self.open[slot] == serial
            if not self.pinned.get(slot):
                del self.open[slot]
        return [slot not in self.open for slot, _ in copies]

    def holders(self, slots: Sequence[int], /) -> dict[int, list[bool]]:
        """All pins are those of process 1."""
        held = [bool(self.pinned.get(slot)) for slot in slots]
        return {1: held} if any(held) else {}

    def release(self, slot: int) -> None:
        if slot:
            self.taken.remove(slot)
            self.open.pop(slot, None)
            self.free.append(slot)


class Books(Residency):
    """The books with a pin board, and shorthand for what processes do.

    Requests to collect garbage are no answers to anything: they are kept in `collects`, by arena, and not returned.
    """

    def __init__(
        self, host: int, gpu: int = 0, peer: int = 0, *, high: float = 1.0, low: float = 1.0, **options: int
    ) -> None:
        self.pins = FakePins()
        self.collects: list[int] = []
        super().__init__(host, self.pins, high=high, low=low, **options)
        self.request = 1000
        for arena, capacity in ((GPU, gpu), (PEER, peer)):
            if capacity:
                self.add_arena(arena, capacity, f"device GPU-{arena}")

    def store(
        self, object_id: bytes, *places: tuple[int, int], owner: bytes = OWNER, slots: bool = True
    ) -> list[Effect]:
        """Client A leases and seals an object of parts (arena, size); returns what followed, grants left out."""
        self.request += 1
        parts = []
        effects: list[Effect] = []
        for arena, size in places:
            followed = self.lease(A, self.request, arena, size, block=False)
            grant = only(Granted, followed)
            slot, serial = self.pins.take() if slots else (0, 0)
            if slot:
                self.pins.publish(slot, serial)
            parts.append(PartCopy(arena, grant.offset, size, slot, serial, arena, grant.life))
            effects += [effect for effect in followed if effect is not grant]
        return effects + self.seal(A, object_id, owner, parts)

    def _conclude(self) -> list[Effect]:
        effects = super()._conclude()
        self.collects += [effect.arena for effect in effects if isinstance(effect, Collect)]
        return [effect for effect in effects if not isinstance(effect, Collect)]

    def where(self, object_id: bytes) -> list[int]:
        parts = self.parts(object_id)
        assert parts is not None
        return [part.arena for part in parts]

    def pin(self, object_id: bytes, index: int = 0) -> int:
        parts = self.parts(object_id)
        assert parts is not None
        part = parts[index]
        assert self.pins.open[part.slot] == part.serial
        self.pins.pinned[part.slot] = 1
        return part.slot

    def finish(self, effects: list[Effect]) -> list[Effect]:
        """Finish all jobs that are there and follow; returns the other effects."""
        rest: list[Effect] = []
        queue = list(effects)
        while queue:
            effect = queue.pop(0)
            if isinstance(effect, Move | WriteFile | ReadFile):
                queue += self.finished(effect.job)
            else:
                rest.append(effect)
        return rest


def only(kind: type[E], effects: Sequence[Effect]) -> E:
    (effect,) = [effect for effect in effects if isinstance(effect, kind)]
    return effect


def granted(effects: list[Effect]) -> Granted:
    (effect,) = effects
    assert isinstance(effect, Granted)
    return effect


def refused(effects: list[Effect]) -> Refused:
    (effect,) = effects
    assert isinstance(effect, Refused)
    return effect


def sealed_store(capacity: int, *sizes: int) -> Books:
    """Return a store in which client A sealed immovable objects b"0", b"1", ... of these sizes for OWNER."""
    store = Books(capacity)
    for i, size in enumerate(sizes):
        assert store.store(b"%d" % i, (HOST, size), slots=False) == []
    return store


def host_part(offset: int, size: int) -> list[PartCopy]:
    return [PartCopy(HOST, offset, size)]
