"""The simulated world: all processes, the network between them, the store, and the truth about every value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from afield.gpu_store.tiers import SPARE
from afield.runtime.cores.lineage import Lineage
from afield.runtime.cores.objects import FAILED, LOCATED
from afield.runtime.cores.ownership import OwnershipTable
from afield.runtime.wire import messages
from tests.sim.network import Network
from tests.sim.participant import Get, Participant, Task
from tests.sim.values import (
    NODE,
    InvariantError,
    LostError,
    Ref,
    object_at,
    owner_of,
    place_of,
    show,
    show_id,
    version_at,
)


@dataclass(slots=True)
class Stored:
    """A value in the store. `claimed` once its owner knows of it: then nobody but the owner frees it.

    A value that is `lost` is still in the books, until it is freed.
    """

    refs: list[Ref]
    there: bool = True
    claimed: bool = False
    lost: bool = False


def _nothing(get: Get) -> None:
    """Whoever drives the world looks for gets that are ready by itself."""


def _unchecked(object_id: bytes) -> None:
    """Replaced by `checkers.on_emptied`."""


def _no_other(participant: Participant, task: Task) -> bytes | None:
    """A task whose worker died fails."""
    return None


class World:
    """All processes, the network between them, the store, and the truth about every value.

    Args:
        table: the core under test.
        lineage: the core beside it.
        recording: whether to keep a transcript in `log`.
        lineage_bytes: how much each process may keep for the sake of lineage alone.
    """

    def __init__(
        self,
        table: type[OwnershipTable] = OwnershipTable,
        *,
        lineage: type[Lineage] = Lineage,
        recording: bool = False,
        lineage_bytes: int = 1 << 30,
    ) -> None:
        self.table = table
        self.lineage = lineage
        self.lineage_bytes = lineage_bytes
        self.given_up = 0  # losses that were not made good
        self.most_rounds = 16  # how often a task is pushed whose worker could not read an argument
        self.network = Network()
        self.processes: dict[bytes, Participant] = {}
        self.dead: list[bytes] = []
        self.store: dict[bytes, list[Stored]] = {}  # each time that the object was stored
        self.spares: set[bytes] = set()  # whose owners have said that only lineage needs them
        self.early_frees: set[bytes] = set()  # freed while not there: the store undoes what is stored next
        self.contents: dict[bytes, list[bytes]] = {}  # finished object -> what is inside
        self.failed: set[bytes] = set()  # objects that are the error of a task
        self.excused: set[bytes] = set()  # see `checkers`
        self.pickles: list[tuple[bytes, bytes]] = []  # (object, who pickled it) out of band
        self.on_emptied: Callable[[bytes], None] = _unchecked
        self.on_ready: Callable[[Get], None] = _nothing
        self.retarget: Callable[[Participant, Task], bytes | None] = _no_other
        self.log: list[str] | None = [] if recording else None

    def add(self, name: bytes) -> Participant:
        """Start a process."""
        process = self.processes[name] = Participant(self, name)
        return process

    def note(self, who: bytes, text: str) -> None:
        """Write a line of the transcript; call it only if `log` is not None."""
        assert self.log is not None
        self.log.append(f"{who.decode()} {text}")

    def send(self, source: bytes, target: bytes, message: Any) -> None:
        """Put a message on its way."""
        if target in self.processes:
            self.network.send(source, target, message)
            if self.log is not None:
                self.note(source, f"  -> {target.decode()}: {show(message)}")
        elif self.log is not None:
            self.note(source, f"  -> {target.decode()} (dead): {show(message)}")

    def write(self, object_id: bytes, object_ids: Sequence[bytes]) -> messages.Location:
        """Store a value."""
        if object_id in self.early_frees:
            raise InvariantError(f"{show_id(object_id)} is stored after its last free, which would undo that")
        versions = self.store.setdefault(object_id, [])
        versions.append(Stored([(inner, owner_of(inner)) for inner in object_ids]))
        return place_of(object_id, len(versions))

    def read(self, location: messages.Location, *, excused: bool = False) -> list[Ref]:
        """Return the refs in a stored value, which must still be there.

        Raises:
            LostError: it is lost.
        """
        object_id = object_at(location)
        stored = self.store[object_id][version_at(location) - 1]
        if stored.lost:
            raise LostError
        if not stored.there and not excused:
            raise InvariantError(f"{show_id(object_id)} is read after its memory was freed")
        return stored.refs

    def losable(self) -> list[bytes]:
        """Return the objects whose value can be lost."""
        return [
            object_id
            for object_id, versions in self.store.items()
            if versions[-1].there and not versions[-1].lost and owner_of(object_id) in self.processes
        ]

    def lose(self, object_id: bytes) -> None:
        """All copies of a stored value are gone; its owner is told."""
        for stored in self.store[object_id]:
            stored.lost = True
        if self.log is not None:
            self.note(NODE, f"loses {show_id(object_id)}")
        kind = SPARE if object_id in self.spares else ""
        self.send(NODE, owner_of(object_id), messages.Lost([object_id], "lost", kind))

    def set_spare(self, object_id: bytes, spare: bool) -> None:
        """Execute `Spare`: what the store loses of these it has let go on purpose."""
        (self.spares.add if spare else self.spares.discard)(object_id)

    def free(self, object_id: bytes) -> None:
        """Execute `FreeStored`."""
        versions = self.store.get(object_id, [])
        if not any(stored.there for stored in versions):
            if len(versions) < 2:
                raise InvariantError(f"{show_id(object_id)} is freed twice")
            self.early_frees.add(object_id)  # what was stored twice may go at once, and is then freed once more
        for stored in versions:
            stored.there = False

    def finished(self, object_id: bytes, kind: int, inside: Sequence[bytes]) -> None:
        """The owner of an object has its value."""
        if kind == FAILED:
            self.failed.add(object_id)
            return
        self.contents[object_id] = list(inside)
        if kind == LOCATED:
            for stored in self.store[object_id]:
                stored.claimed = True

    def unprotected(self, object_id: bytes) -> bool:
        """Say whether faults allow the object to be gone although somebody can reach it."""
        return object_id in self.excused or owner_of(object_id) not in self.processes

    def excuse(self, object_ids: Sequence[bytes]) -> None:
        """From now on the objects, and what is inside them, may be lost."""
        stack = list(object_ids)
        while stack:
            object_id = stack.pop()
            if object_id not in self.excused:
                self.excused.add(object_id)
                stack += self.contents.get(object_id, ())

    def kill(self, name: bytes) -> None:
        """A process dies: it loses everything, and what is on its way to it is lost."""
        process = self.processes.pop(name)
        self.dead.append(name)
        for source in self.network.to(name):
            self.network.lose(source, name, 0)
        carried = [object_id for object_ids in process.handed_on.values() for object_id in object_ids]
        carried += [object_id for task in [*process.inflight.values(), *process.waiting] for object_id in task.pinned]
        carried += [object_id for object_id, holder in self.pickles if holder == name]
        for object_id, inside in self.contents.items():
            if owner_of(object_id) == name:
                carried += inside
        self.excuse(carried)
        self.pickles = [pickle for pickle in self.pickles if pickle[1] != name]
        process.table.entries.clear()  # see `forget`

    def forget(self) -> None:
        """Take the world apart at the end of its use.

        Nothing else would free it: entries refer to who waits for them, those to the world, and the world to the entries, which
        are hidden from the garbage collector. And what refers to nothing that refers to it is freed without a collection.
        """
        for process in self.processes.values():
            process.table.entries.clear()
            for execution in process.unsettled:
                execution.obligation.token = None
            vars(process).clear()
        vars(self).clear()
