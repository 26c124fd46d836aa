"""The ownership table: a core without I/O that decides how long each object lives, as seen from one process.

Theory of operation. Every process keeps one `Entry` for each object that it owns or borrows. The owner is the process
that created the ref; its entry is the truth. Three rules keep an object alive exactly as long as it can be reached:

1. *An entry is held* by handles (the `ObjectRef`s in this process and the zero-copy views of its value), by pins (pending
   tasks that take it, values that contain it, obligations below) and, at the owner, by registered borrowers. An owned
   object that nothing holds is freed; a borrowed entry that nothing holds is dropped and its owner told (`Release`).
   Beyond that, `lineage` may keep the entry of what other objects were made from.
2. *A process that receives a ref registers itself* with the owner (`Add`), and *whoever carried the ref to it keeps its own
   hold until that registration is acknowledged* (`Added`). There are three carriers: a task's arguments (the submitter pins
   them until the reply, and the reply waits for the acknowledgement), a task's result (the worker pins what it returned
   until the receiver says `Took`), and an object whose value contains the ref (the reader pins the container).
   So at every moment some registered process holds the object, and no count ever has to be guessed or merged.
3. *Only a borrower speaks for itself.* `Add` and `Release` of one borrower travel on one ordered connection, so the owner keeps
   a plain set of borrowers. `attempt` numbers tell an acknowledgement of an earlier registration from the present one; what
   the owner sends before that acknowledgement is meant for an earlier life of the entry.

When a process dies it is removed from every set of borrowers; objects that it owned are `FAILED` here with
`OwnerDiedError`, because nobody can answer for them. A ref that it was carrying may arrive after its object is gone: the
`Added` says so. Objects that contain each other in a circle are not freed while their owners live.

A stored value can be lost with the memory that it is in (`lost`). The owner's lineage makes it again or fails it; a borrower
goes back to waiting for what the owner will say. Either way the refs stay valid, and whoever waits goes on waiting.

`tests/sim` runs this file in a simulator, and every interleaving of small scenarios.

Methods are called under the process's lock. What must happen outside is appended to `effects`, in order, for the shell:
messages to send, stored values to free, replies that may leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from afield.runtime.cores.objects import (
    FAILED,
    FREED,
    INLINE,
    KNOWN,
    LOCATED,
    NEW,
    PENDING,
    SENT,
    Entry,
    FreeStored,
    Keeper,
    LifeEnded,
    Obligation,
    Send,
    Settled,
)
from afield.runtime.wire.messages import Add, Added, Location, Lost, Release, Subscribe, Took, Value

#: The room of such a value is given back without delay.
LARGE_BYTES = 1 << 20


class OwnershipTable:
    """All entries of one process.

    Args:
        process_id: who we are; refs that we own travel with it.
        owner_died: serialises the error of an object whose owner is gone, given the owner's id, or (given our own id) of an
            object that its owner no longer knows.
    """

    def __init__(self, process_id: bytes, owner_died: Callable[[bytes], bytes]) -> None:
        self.process_id = process_id
        self.entries: dict[bytes, Entry] = {}
        self.effects: list[Any] = []
        self.lineage: Keeper | None = None
        #: Objects that lineage must be asked about. Nearly all small values never are in here.
        self.lineage_knows: set[bytes] = set()
        self._owner_died = owner_died
        self._attempts = 0
        self._awaiting: dict[bytes, list[Obligation]] = {}
        self._lent_to: dict[bytes, set[bytes]] = {}  # borrower -> objects of ours that it holds
        self._borrowed_from: dict[bytes, set[bytes]] = {}  # owner -> objects of its that we hold
        self._transit: dict[tuple[bytes, int], list[bytes]] = {}  # (receiver, sequence) -> pinned until `Took`
        self._dead: set[bytes] = set()

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
                self.effects.append(FreeStored(object_id, soon))
            elif entry.life:
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

    def _forget_borrowed(self, object_id: bytes, entry: Entry) -> None:
        del self.entries[object_id]
        if entry.registration != NEW:
            self.effects.append(Send(entry.owner, Release(object_id)))
        held = self._borrowed_from.get(entry.owner)
        if held is not None:
            held.discard(object_id)
            if not held:
                del self._borrowed_from[entry.owner]
        # Our `Release` follows our `Add` on the same connection: nothing is left for the carriers to protect.
        self._acknowledge(object_id)

    # -- values --------------------------------------------------------------------------------------------------

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

    def _announce(self, object_id: bytes, entry: Entry) -> None:
        if entry.subscribers:
            for peer in sorted(entry.subscribers):
                self._send_value(peer, object_id, entry)
            entry.subscribers = None
        if entry.waiters is not None:
            waiters, entry.waiters = entry.waiters, None
            for notify in waiters:
                notify()

    def _send_value(self, peer: bytes, object_id: bytes, entry: Entry) -> None:
        if entry.state == LOCATED:
            self.effects.append(Send(peer, Value(object_id, LOCATED, b"", entry.value)))
        else:
            self.effects.append(Send(peer, Value(object_id, entry.state, entry.value)))

    def when_done(self, object_id: bytes, notify: Callable[[], None]) -> bool:
        """Call `notify` once the value is there; return True (and do not call) if it is there already."""
        entry = self.entries[object_id]
        if entry.state != PENDING and not self._revived(object_id, entry):
            return True
        if entry.waiters is None:
            entry.waiters = []
        entry.waiters.append(notify)
        if entry.owner and not entry.subscribed:
            entry.subscribed = True
            self.effects.append(Send(entry.owner, Subscribe(object_id)))
        return False

    def stop_waiting(self, object_id: bytes, notify: Callable[[], None]) -> None:
        """Undo `when_done`."""
        entry = self.entries.get(object_id)
        if entry is not None and entry.waiters is not None and notify in entry.waiters:
            entry.waiters.remove(notify)

    # -- loss ----------------------------------------------------------------------------------------------------

    def on_lost(self, message: Lost) -> None:
        """The node daemon has lost values of ours: they are made again, or fail."""
        for object_id in message.object_ids:
            entry = self.entries.get(object_id)
            if entry is not None and not entry.owner and self.lineage is not None:
                self.lineage.lost(object_id, entry, message.cause, message.kind)

    def lost(self, object_id: bytes, cause: str = "", kind: str = "") -> None:
        """Whoever reads a value here was told that it is lost: its owner is asked again, or is us (see `on_lost`)."""
        entry = self.entries.get(object_id)
        if entry is None or entry.state != LOCATED:
            return  # it is being made again already
        if not entry.owner:
            self.on_lost(Lost([object_id], cause, kind))
        else:
            entry.state, entry.value, entry.subscribed = PENDING, None, True
            self.effects.append(Send(entry.owner, Subscribe(object_id)))

    def fail(self, object_id: bytes, entry: Entry, error: bytes) -> None:
        """There will be no value."""
        entry.state, entry.value, entry.task = FAILED, error, None
        self._announce(object_id, entry)

    def is_dead(self, process_id: bytes) -> bool:
        """Tell whether we have heard of the death of a process."""
        return process_id in self._dead

    def _revived(self, object_id: bytes, entry: Entry) -> bool:
        """Have a value made again that was freed; tell whether it is pending now."""
        if entry.state != FREED or self.lineage is None:
            return False
        self.lineage.revive(object_id, entry)
        return entry.state == PENDING

    # -- borrowing: the receiving side ---------------------------------------------------------------------------

    def receive(self, object_id: bytes, owner: bytes, obligation: Obligation | None = None) -> None:
        """A ref was deserialised here: it has one more handle. `obligation` names its carrier's hold."""
        entry = self._hold(object_id, owner, obligation)
        entry.handles += 1
        if entry.state == FREED:
            self._revived(object_id, entry)

    def receive_contained(self, refs: Iterable[tuple[bytes, bytes]], sender: bytes, sequence: int) -> list[bytes]:
        """A result of ours contains `refs`: pin and register them, and tell the sender when that is done."""
        obligation = Obligation(message=Send(sender, Took(sequence)))
        pinned = []
        for object_id, owner in refs:
            self._hold(object_id, owner, obligation).pins += 1
            pinned.append(object_id)
        if not obligation.remaining:
            self._fulfil_obligation(obligation)
        return pinned

    def _hold(self, object_id: bytes, owner: bytes, obligation: Obligation | None) -> Entry:
        """Return the entry, registering it where needed. The caller adds its hold before anything else happens."""
        entry = self.entries.get(object_id)
        if entry is None:
            entry = self._new_borrowed(object_id, owner)
        elif entry.owner != owner and entry.owner in self._dead and owner not in self._dead:
            self._adopt(object_id, entry, owner)
        if entry.owner and entry.registration == NEW and owner not in self._dead:
            self._attempts += 1
            entry.attempt = self._attempts
            entry.registration = SENT
            self.effects.append(Send(owner, Add(object_id, entry.attempt)))
        if obligation is not None and entry.registration == SENT:
            obligation.remaining += 1
            if obligation.container and obligation.remaining == 1:
                self.pin(obligation.container)
            self._awaiting.setdefault(object_id, []).append(obligation)
        return entry

    def _new_borrowed(self, object_id: bytes, owner: bytes) -> Entry:
        entry = self.entries[object_id] = Entry(owner=owner)
        if owner == self.process_id or owner in self._dead:
            # A ref to something of ours that is gone (only an out-of-band copy can outlive it), or of a dead owner.
            entry.state, entry.value = FAILED, self._owner_died(owner)
            entry.owner = owner if owner != self.process_id else b""
        else:
            self._borrowed_from.setdefault(owner, set()).add(object_id)
        return entry

    def _adopt(self, object_id: bytes, entry: Entry, owner: bytes) -> None:
        """A task whose worker died ran again elsewhere, and what it had made exists again, under the same id."""
        if owner == self.process_id:
            return
        entry.owner = owner
        self._borrowed_from.setdefault(owner, set()).add(object_id)
        if entry.state == FAILED:
            entry.state, entry.value, entry.subscribed = PENDING, None, False

    def on_added(self, message: Added) -> None:
        """The owner acknowledged a registration."""
        entry = self.entries.get(message.object_id)
        if entry is None or entry.attempt != message.attempt:
            return  # of an earlier life of this entry
        entry.registration = KNOWN
        if message.gone and entry.state == PENDING:
            self.fail(message.object_id, entry, self._owner_died(self.process_id))
        self._acknowledge(message.object_id)

    def on_value(self, message: Value) -> None:
        """A value that we subscribed to."""
        entry = self.entries.get(message.object_id)
        # Before our registration is acknowledged it can only be the answer to an earlier life of this entry, and by now
        # the object may be gone.
        if entry is not None and entry.state == PENDING and entry.registration == KNOWN:
            entry.state = message.kind
            entry.value = message.location if message.kind == LOCATED else message.data
            self._announce(message.object_id, entry)

    def _acknowledge(self, object_id: bytes) -> None:
        for obligation in self._awaiting.pop(object_id, ()):
            obligation.remaining -= 1
            if not obligation.remaining:
                self._fulfil_obligation(obligation)

    def _fulfil_obligation(self, obligation: Obligation) -> None:
        if obligation.message is not None:
            self.effects.append(obligation.message)
        if obligation.token is not None:
            self.effects.append(Settled(obligation.token))
        if obligation.container:
            self.unpin(obligation.container)

    # -- borrowing: the lending side -----------------------------------------------------------------------------

    def on_add(self, peer: bytes, message: Add) -> None:
        """A peer holds an object of ours from now on."""
        entry = self.entries.get(message.object_id)
        if entry is not None and not entry.owner and peer not in self._dead:
            if entry.borrowers is None:
                entry.borrowers = set()
            entry.borrowers.add(peer)
            self._lent_to.setdefault(peer, set()).add(message.object_id)
        self.effects.append(Send(peer, Added(message.object_id, message.attempt, entry is None)))

    def on_release(self, peer: bytes, object_id: bytes) -> None:
        """A peer holds it no longer."""
        entry = self.entries.get(object_id)
        lent = self._lent_to.get(peer)
        if lent is not None:
            lent.discard(object_id)
            if not lent:
                del self._lent_to[peer]
        if entry is not None and entry.borrowers and peer in entry.borrowers:
            entry.borrowers.discard(peer)
            entry.borrowers = entry.borrowers or None  # an empty set is larger than the entry
            if entry.subscribers:
                entry.subscribers.discard(peer)
            self._maybe_collect(object_id, entry)

    def on_subscribe(self, peer: bytes, object_id: bytes) -> None:
        """A peer wants the value."""
        entry = self.entries.get(object_id)
        if entry is None:
            self.effects.append(Send(peer, Value(object_id, FAILED, self._owner_died(self.process_id))))
        elif entry.state == PENDING or self._revived(object_id, entry):
            if entry.subscribers is None:
                entry.subscribers = set()
            entry.subscribers.add(peer)
        else:
            self._send_value(peer, object_id, entry)

    def hand_on(self, receiver: bytes, sequence: int, object_ids: list[bytes]) -> list[tuple[bytes, bytes]]:
        """We return a value that contains these refs: pin them until `Took`, and name their owners."""
        if receiver not in self._dead:  # nobody would say `Took`
            for object_id in object_ids:
                self.pin(object_id)
            self._transit[receiver, sequence] = object_ids
        return [(object_id, self.entries[object_id].owner or self.process_id) for object_id in object_ids]

    def on_took(self, peer: bytes, sequence: int) -> None:
        """The receiver of a result holds its refs itself now."""
        for object_id in self._transit.pop((peer, sequence), ()):
            self.unpin(object_id)

    # -- death ---------------------------------------------------------------------------------------------------

    def on_peer_died(self, peer: bytes) -> None:
        """A process is gone: it holds nothing any more, and nobody answers for what it owned."""
        if peer in self._dead:
            return
        self._dead.add(peer)
        for object_id in sorted(self._lent_to.pop(peer, ())):
            entry = self.entries.get(object_id)
            if entry is not None and entry.borrowers:
                entry.borrowers.discard(peer)
                entry.borrowers = entry.borrowers or None  # an empty set is larger than the entry
                if entry.subscribers:
                    entry.subscribers.discard(peer)
                self._maybe_collect(object_id, entry)
        for object_id in sorted(self._borrowed_from.pop(peer, ())):
            entry = self.entries.get(object_id)
            if entry is not None:
                entry.registration = NEW
                if entry.state in (PENDING, LOCATED):
                    self.fail(object_id, entry, self._owner_died(entry.owner))
                self._acknowledge(object_id)
        for receiver, sequence in [key for key in self._transit if key[0] == peer]:
            self.on_took(receiver, sequence)
