"""What one process holds: a core without I/O, and the half of the ownership table that needs no other process.

Theory of operation. `Entries` has one `Entry` for each object that the process knows. It counts what holds the entry here (the
handles and the pins), keeps its value, calls whoever waits for it, and lets go of it when nothing holds it any more, with the
refs inside it. What entries owe to other processes, `ownership` adds: borrowers that hold an object of ours, owners that are
told when we let go of theirs.

Nothing but this class and the one built on it writes to an entry (`tests/test_house.py` keeps that): an entry that is found
wrong was made wrong by one of their methods. Rare transitions go through `_turn`, which looks them up in `objects.LIFE`, so
that an illegal one raises, and notes them. What happens once for each small task is written without either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from afield.machines import FlightRecorder
from afield.runtime.cores.objects import (
    FAILED,
    FREED,
    INLINE,
    LIFE,
    LOCATED,
    NUMBERS,
    PENDING,
    STATES,
    Entry,
    FreeStored,
    Keeper,
    LifeEnded,
)
from afield.runtime.wire.messages import Location, Reply

#: The room of such a value is given back without delay.
LARGE_BYTES = 1 << 20
#: `validate` looks at no more entries than this, the newest first: a process may have millions.
MOST_VALIDATED = 10_000


class Entries:
    """All entries of one process, as far as it goes by itself."""

    def __init__(self) -> None:
        #: Everybody may read them; only methods of this class and of `OwnershipTable` write.
        self.entries: dict[bytes, Entry] = {}
        self.effects: list[Any] = []
        self.recorder = FlightRecorder()
        #: Told of each object that fails: whoever waits for several wants to hear of the first.
        self.on_failed: list[Callable[[bytes], None]] = []
        self.lineage: Keeper | None = None
        #: Objects that lineage must be asked about. Nearly all small values never are in here.
        self.lineage_knows: set[bytes] = set()

    # -- what there is to do about other processes; see `ownership` ----------------------------------------------

    def _forget_borrowed(self, object_id: bytes, entry: Entry) -> None:
        """Nothing here holds an object of another process any more."""
        raise NotImplementedError

    def _ask_owner(self, object_id: bytes, entry: Entry) -> None:
        """Somebody here waits for the value of an object of another process."""
        raise NotImplementedError

    def _tell_subscribers(self, object_id: bytes, entry: Entry) -> None:
        """The value that other processes wait for is there."""
        raise NotImplementedError

    # -- life of an entry ----------------------------------------------------------------------------------------

    def own(self, object_id: bytes, task: Any) -> None:
        """A task was submitted: its future output has one handle."""
        self.entries[object_id] = Entry(handles=1, task=task)

    def put(self, object_id: bytes, kind: int, value: bytes | Location, contained: Iterable[bytes] = ()) -> None:
        """A value was put: it is there, has one handle, and holds the refs inside it."""
        self.entries[object_id] = Entry(state=kind, value=value, handles=1, contained=self._pin_all(contained))

    def begin_life(self, object_id: bytes) -> None:
        """An actor was created: the object that stands for it has one handle."""
        self.entries[object_id] = Entry(state=INLINE, value=b"", handles=1, life=True)

    def add_item(self, object_id: bytes, kind: int, value: Any, contained: list[bytes]) -> None:
        """An item of a stream is there, pinned by its stream; the refs in `contained` are pinned by the caller already."""
        self.entries[object_id] = Entry(state=kind, value=value, pins=1, contained=contained or None)

    def take_item(self, object_id: bytes) -> None:
        """An item is consumed: a handle takes over from the stream's pin."""
        self.entries[object_id].handles += 1
        self.unpin(object_id)

    def created(self, object_id: bytes, where: str) -> None:
        """Remember where in the user's program an object was created."""
        self.entries[object_id].created_at = where

    def add_handle(self, entry: Entry) -> None:
        """A view of a value lives: one more handle. Needs no lock, as the caller has a handle already."""
        entry.handles += 1

    def drop(self, object_id: bytes) -> None:
        """One handle is gone."""
        entry = self.entries.get(object_id)
        if entry is not None:
            entry.handles -= 1
            if not entry.handles:
                self._maybe_collect(object_id, entry)

    def pin(self, object_id: bytes) -> None:
        """Hold the object beyond its handles."""
        self.entries[object_id].pins += 1

    def unpin(self, object_id: bytes) -> None:
        """Undo one `pin`."""
        entry = self.entries.get(object_id)
        if entry is not None:
            entry.pins -= 1
            if not entry.pins:
                self._maybe_collect(object_id, entry)

    def let_go(self, task: Any) -> None:
        """The outcome of a task is known: undo the pins of its arguments."""
        pinned, task.pinned = task.pinned, None
        for object_id in pinned:
            self.unpin(object_id)

    def _pin_all(self, object_ids: Iterable[bytes]) -> list[bytes] | None:
        pinned = list(object_ids)
        for object_id in pinned:
            self.pin(object_id)
        return pinned or None

    def _maybe_collect(self, object_id: bytes, entry: Entry) -> None:
        if entry.handles or entry.pins or entry.borrowers:
            return
        lineage = self.lineage if object_id in self.lineage_knows else None
        if lineage is not None and lineage.retain(object_id, entry):
            return
        if entry.owner:
            self._forget_borrowed(object_id, entry)
        elif entry.state != PENDING:  # a pending one is collected when its task ends
            del self.entries[object_id]
            if entry.state == LOCATED or (lineage is not None and lineage.has_remains(object_id)):
                soon = entry.state == LOCATED and entry.value.size >= LARGE_BYTES
                self.recorder.note((object_id, "is collected, and freed in the store"))
                self.effects.append(FreeStored(object_id, soon))
            elif entry.life:
                self.recorder.note((object_id, "is collected, and a life ends"))
                self.effects.append(LifeEnded(object_id))
        else:
            return
        if lineage is not None:
            lineage.gone(object_id)
        for inner in entry.contained or ():
            self.unpin(inner)

    def reconsider(self, object_id: bytes) -> None:
        """Lineage needs the object no longer."""
        entry = self.entries.get(object_id)
        if entry is not None:
            self._maybe_collect(object_id, entry)

    def clear(self) -> None:
        """The process leaves its cluster. The collector does not look into entries: nothing may lead from them back to us."""
        for entry in self.entries.values():
            entry.task = entry.waiters = None
        self.entries.clear()

    # -- values --------------------------------------------------------------------------------------------------

    def fulfil_plain(self, batch: Sequence[Any], start: int, tasks: dict[int, Any]) -> int:
        """Write down the values of the plain replies that `batch[start:]` begins with; return where the first other is.

        On the path of every small task. A reply is plain if it has a small value without refs inside, to a task among `tasks`
        (sequence number -> task, which goes) that has one `output`, and if nobody waits for the value and lineage has no say in
        it. For all others there is `fulfil`.
        """
        entries = self.entries
        lineage_knows = self.lineage_knows
        at = start
        for message in islice(batch, start, None):
            if type(message) is not Reply or message.kind or message.contained is not None:
                break
            task = tasks.get(message.sequence)
            if task is None:
                break
            entry = entries.get(task.output)
            if (
                entry is None
                or entry.state != PENDING
                or not entry.handles
                or entry.waiters is not None
                or entry.subscribers is not None
                or task.output in lineage_knows
            ):
                break
            del tasks[message.sequence]
            entry.state = INLINE
            entry.value = message.data
            entry.task = None
            if task.pinned is not None:
                self.let_go(task)
            at += 1
        return at

    def fulfil(self, object_id: bytes, kind: int, value: Any, contained: Iterable[bytes] = ()) -> None:
        """An output of ours is there (or has failed); the refs in `contained` are pinned by the caller already."""
        entry = self.entries.get(object_id)
        if entry is None or entry.state != PENDING:
            if kind == LOCATED:
                self._stored_in_vain(object_id, entry)
            for inner in contained:
                self.unpin(inner)
            return
        entry.state = kind
        entry.value = value
        entry.task = None
        if contained:
            # What was inside a value that was lost stays: somebody may just have read it there.
            entry.contained = [*(entry.contained or ()), *contained]
        self._announce(object_id, entry)
        # Whoever waited may have been the last to hold it, and has let go of it by now.
        if not entry.handles and object_id in self.entries:
            self._maybe_collect(object_id, entry)

    def _stored_in_vain(self, object_id: bytes, entry: Entry | None) -> None:
        """A value is in the store that nobody waited for, or that a second execution has made without need."""
        if entry is None or (self.lineage is not None and self.lineage.unwanted(object_id, entry)):
            self.effects.append(FreeStored(object_id))

    def moved(self, entry: Entry, location: Location) -> None:
        """Whoever has read a stored value found it at a better location. Needs no lock, as the caller has a handle."""
        if entry.state == LOCATED:
            entry.value = location

    def _announce(self, object_id: bytes, entry: Entry) -> None:
        if entry.subscribers:
            self._tell_subscribers(object_id, entry)
            entry.subscribers = None
        if entry.waiters is not None:
            waiters, entry.waiters = entry.waiters, None
            for notify in waiters:
                notify()
        if entry.state == FAILED and self.on_failed:
            for tell in list(self.on_failed):
                tell(object_id)

    def watch_for_failures(self, object_ids: Iterable[bytes], tell: Callable[[bytes], None]) -> None:
        """Call `tell` with each object that fails from here on, of these at least, until it is taken out of `on_failed`."""
        self.on_failed.append(tell)
        for object_id in object_ids:
            entry = self.entries.get(object_id)
            if entry is not None and entry.state == FAILED:
                tell(object_id)
            elif entry is not None and entry.state == PENDING and entry.owner and not entry.subscribed:
                self._ask_owner(object_id, entry)

    def when_done(self, object_id: bytes, notify: Callable[[], None]) -> bool:
        """Call `notify` once the value is there; return True (and do not call) if it is there already."""
        entry = self.entries[object_id]
        if entry.state != PENDING and not self._revived(object_id, entry):
            return True
        if entry.waiters is None:
            entry.waiters = []
        entry.waiters.append(notify)
        if entry.owner and not entry.subscribed:
            self._ask_owner(object_id, entry)
        return False

    def stop_waiting(self, object_id: bytes, notify: Callable[[], None]) -> None:
        """Undo `when_done`."""
        entry = self.entries.get(object_id)
        if entry is not None and entry.waiters is not None and notify in entry.waiters:
            entry.waiters.remove(notify)

    # -- values that are lost, freed and made again --------------------------------------------------------------

    def _turn(self, object_id: bytes, entry: Entry, event: str) -> None:
        """Take one of the rare transitions.

        Raises:
            InternalError: `objects.LIFE` does not have it.
        """
        entry.state = NUMBERS[LIFE.after(STATES[entry.state], event, object_id, self.recorder)]

    def fail(self, object_id: bytes, entry: Entry, error: bytes) -> None:
        """There will be no value."""
        self._turn(object_id, entry, "fails")
        entry.value, entry.task = error, None
        self._announce(object_id, entry)

    def make_again(self, object_id: bytes, entry: Entry, task: Any) -> None:
        """A value of ours that was lost or freed is to be made by `task`."""
        self._turn(object_id, entry, "is lost" if entry.state == LOCATED else "is needed")
        entry.value, entry.task = None, task

    def run_again(self, object_ids: Iterable[bytes], before: Any, task: Any) -> None:
        """`task` takes the place of the one that was to make these objects `before`."""
        for object_id in object_ids:
            entry = self.entries[object_id]
            if entry.task is before:
                entry.task = task

    def free(self, object_id: bytes, entry: Entry, *, lost: bool = False) -> None:
        """Only lineage holds the object, and can have it made again: its value goes, if it is not `lost` already."""
        self._turn(object_id, entry, "is freed")
        entry.value = None
        if lost:
            return  # what is inside stays: somebody may just have read it there
        self.effects.append(FreeStored(object_id))
        contained, entry.contained = entry.contained, None
        for inner in contained or ():
            self.unpin(inner)

    def is_postponed(self, object_id: bytes) -> bool:
        """Tell whether an object that has failed is made again if somebody asks for it: see `when_done`."""
        return self.lineage is not None and object_id in self.lineage.postponed

    def _revived(self, object_id: bytes, entry: Entry) -> bool:
        """Have a value made again that was freed, or postponed; tell whether it is pending now."""
        if self.lineage is None or (
            entry.state != FREED and not (entry.state == FAILED and self.is_postponed(object_id))
        ):
            return False
        self.lineage.revive(object_id, entry)
        return entry.state == PENDING

    # -- the books are right -------------------------------------------------------------------------------------

    def newest(self) -> list[tuple[bytes, Entry]]:
        """Return the entries that `validate` looks at."""
        return list(islice(reversed(self.entries.items()), MOST_VALIDATED))

    def pins_known(self, entries: Iterable[tuple[bytes, Entry]]) -> Counter[bytes]:
        """Count the pins that these entries explain; there may be others."""
        known: Counter[bytes] = Counter()
        for _, entry in entries:
            if entry.contained is not None:
                known.update(entry.contained)
        return known

    def validate(self) -> list[str]:
        """Return what is wrong with the entries; nothing, if all is well. For the moments between transitions."""
        newest = self.newest()
        complaints = [f"{each[0].hex()} {text}" for each in newest for text in self._complaints(*each)]
        for object_id, count in self.pins_known(newest).items():
            entry = self.entries.get(object_id)
            if entry is None or entry.pins < count:
                has = "is not there" if entry is None else f"has {entry.pins} pins"
                complaints.append(f"{object_id.hex()} {has}, and {count} are known")
        return complaints

    def _complaints(self, object_id: bytes, entry: Entry) -> Iterator[str]:
        """Say what is wrong with one entry."""
        state = entry.state
        if entry.handles < 0 or entry.pins < 0:
            yield f"has {entry.handles} handles and {entry.pins} pins"
        if state not in STATES or not _fits(state, entry.value):
            yield f"is {STATES.get(state, state)} with the value {type(entry.value).__name__}"
        if state != PENDING:
            if entry.task is not None:
                yield f"is {STATES.get(state, state)}, and a task is still to make it"
            if entry.waiters or entry.subscribers:
                yield f"is {STATES.get(state, state)}, and somebody waits for it"
            if not (entry.handles or entry.pins or entry.borrowers or object_id in self.lineage_knows):
                yield "is held by nothing"
        if state == FREED and (entry.owner or object_id not in self.lineage_knows):
            yield "is freed, and no lineage of ours knows it"


def _fits(state: int, value: Any) -> bool:
    """Tell whether an entry in this state can have this value."""
    if state in (PENDING, FREED):
        return value is None
    return value is not None and (state == LOCATED) == isinstance(value, Location)
