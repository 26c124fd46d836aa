"""The ownership table: a core without I/O that decides how long each object lives, as seen from one process.

Theory of operation. Every process keeps one `Entry` for each object that it owns or borrows. What holds an entry within its
process, and its value, is the business of `entries`; here is what processes owe to one another. The owner is the process
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

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from afield.runtime.cores.entries import MOST_VALIDATED, Entries
from afield.runtime.cores.objects import (
    FAILED,
    FREED,
    KNOWN,
    LOCATED,
    NEW,
    PENDING,
    SENT,
    Entry,
    Obligation,
    Send,
    Settled,
)
from afield.runtime.wire.messages import Add, Added, Lost, Release, Subscribe, Took, Value


class OwnershipTable(Entries):
    """All entries of one process.

    Args:
        process_id: who we are; refs that we own travel with it.
        owner_died: serialises the error of an object whose owner is gone, given the owner's id, or (given our own id) of an
            object that its owner no longer knows.
    """

    def __init__(self, process_id: bytes, owner_died: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self.process_id = process_id
        self._owner_died = owner_died
        self._attempts = 0
        self._awaiting: dict[bytes, list[Obligation]] = {}
        self._lent_to: dict[bytes, set[bytes]] = {}  # borrower -> objects of ours that it holds
        self._borrowed_from: dict[bytes, set[bytes]] = {}  # owner -> objects of its that we hold
        self._transit: dict[tuple[bytes, int], list[bytes]] = {}  # (receiver, sequence) -> pinned until `Took`
        self._dead: set[bytes] = set()

    def is_dead(self, process_id: bytes) -> bool:
        """Tell whether we have heard of the death of a process."""
        return process_id in self._dead

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
            self._turn(object_id, entry, "is lost")
            entry.value, entry.subscribed = None, True
            self.effects.append(Send(entry.owner, Subscribe(object_id)))

    def fail_all(self, error: bytes) -> None:
        """Nothing will arrive any more, whoever owns it."""
        for object_id, entry in list(self.entries.items()):
            if entry.state == PENDING:
                if entry.owner:
                    self._no_more_of(entry.owner, object_id)
                    entry.owner, entry.registration = b"", NEW  # there is nobody left to tell when it is dropped
                self.fulfil(object_id, FAILED, error)

    # -- borrowing: the receiving side ---------------------------------------------------------------------------

    def receive(self, object_id: bytes, owner: bytes, obligation: Obligation | None = None) -> None:
        """A ref was deserialised here: it has one more handle. `obligation` names its carrier's hold."""
        entry = self._entry_for(object_id, owner, obligation)
        entry.handles += 1
        if entry.state == FREED:
            self._revived(object_id, entry)

    def receive_contained(self, refs: Iterable[tuple[bytes, bytes]], sender: bytes, sequence: int) -> list[bytes]:
        """A result of ours contains `refs`: pin and register them, and tell the sender when that is done."""
        obligation = Obligation(message=Send(sender, Took(sequence)))
        pinned = []
        for object_id, owner in refs:
            self._entry_for(object_id, owner, obligation).pins += 1
            pinned.append(object_id)
        if not obligation.remaining:
            self._fulfil_obligation(obligation)
        return pinned

    def _entry_for(self, object_id: bytes, owner: bytes, obligation: Obligation | None) -> Entry:
        """Return the entry, registering it where needed. The caller adds its hold before anything else happens."""
        entry = self.entries.get(object_id)
        if entry is None:
            entry = self._new_borrowed(object_id, owner)
        elif entry.owner != owner and entry.owner in self._dead and owner not in self._dead:
            self._adopt(object_id, entry, owner)
        if entry.owner and entry.registration == NEW and entry.owner not in self._dead:
            self._attempts += 1
            entry.attempt = self._attempts
            entry.registration = SENT
            self.recorder.note((object_id, "is borrowed from", owner, "attempt", entry.attempt))
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
            self._turn(object_id, entry, "is made elsewhere")
            entry.value, entry.subscribed = None, False

    def _forget_borrowed(self, object_id: bytes, entry: Entry) -> None:
        del self.entries[object_id]
        if entry.registration != NEW:
            self.recorder.note((object_id, "is given back to", entry.owner))
            self.effects.append(Send(entry.owner, Release(object_id)))
        self._no_more_of(entry.owner, object_id)
        # Our `Release` follows our `Add` on the same connection: nothing is left for the carriers to protect.
        self._acknowledge(object_id)

    def _no_more_of(self, owner: bytes, object_id: bytes) -> None:
        held = self._borrowed_from.get(owner)
        if held is not None:
            held.discard(object_id)
            if not held:
                del self._borrowed_from[owner]

    def _ask_owner(self, object_id: bytes, entry: Entry) -> None:
        entry.subscribed = True
        self.effects.append(Send(entry.owner, Subscribe(object_id)))

    def on_added(self, message: Added) -> None:
        """The owner acknowledged a registration."""
        entry = self.entries.get(message.object_id)
        if entry is None or entry.attempt != message.attempt or entry.owner in self._dead:
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
            self.recorder.note((message.object_id, "is lent to", peer))
            self._lent_to.setdefault(peer, set()).add(message.object_id)
        self.effects.append(Send(peer, Added(message.object_id, message.attempt, entry is None)))

    def on_release(self, peer: bytes, object_id: bytes) -> None:
        """A peer holds it no longer."""
        lent = self._lent_to.get(peer)
        if lent is not None:
            lent.discard(object_id)
            if not lent:
                del self._lent_to[peer]
        self._no_longer_lent(peer, object_id, "is given back by")

    def _no_longer_lent(self, peer: bytes, object_id: bytes, how: str) -> None:
        entry = self.entries.get(object_id)
        if entry is not None and entry.borrowers and peer in entry.borrowers:
            self.recorder.note((object_id, how, peer))
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

    def _tell_subscribers(self, object_id: bytes, entry: Entry) -> None:
        for peer in sorted(entry.subscribers or ()):
            self._send_value(peer, object_id, entry)

    def _send_value(self, peer: bytes, object_id: bytes, entry: Entry) -> None:
        if entry.state == LOCATED:
            self.effects.append(Send(peer, Value(object_id, LOCATED, b"", entry.value)))
        else:
            self.effects.append(Send(peer, Value(object_id, entry.state, entry.value)))

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
        self.recorder.note((peer, "has died"))
        for object_id in sorted(self._lent_to.pop(peer, ())):
            self._no_longer_lent(peer, object_id, "was lent to the dead")
        for object_id in sorted(self._borrowed_from.pop(peer, ())):
            entry = self.entries.get(object_id)
            if entry is not None:
                entry.registration = NEW
                if entry.state in (PENDING, LOCATED):
                    self.fail(object_id, entry, self._owner_died(entry.owner))
                self._acknowledge(object_id)
        for receiver, sequence in [key for key in self._transit if key[0] == peer]:
            self.on_took(receiver, sequence)

    # -- the books are right -------------------------------------------------------------------------------------

    def pins_known(self, entries: Iterable[tuple[bytes, Entry]]) -> Counter[bytes]:
        """Count the pins that these entries, results on their way and obligations explain."""
        known = super().pins_known(entries)
        for pinned in self._transit.values():
            known.update(pinned)
        waiting = {id(each): each for obligations in self._awaiting.values() for each in obligations}
        known.update([each.container for each in waiting.values() if each.container])
        return known

    def validate(self) -> list[str]:
        """Return what is wrong with the table; nothing, if all is well. For the moments between transitions."""
        complaints = super().validate()
        for what, books in (("lent to", self._lent_to), ("borrowed from", self._borrowed_from)):
            for peer, object_ids in islice(books.items(), MOST_VALIDATED):
                if not object_ids or peer in self._dead:
                    complaints.append(f"{len(object_ids)} objects are {what} {peer.hex()}, dead: {peer in self._dead}")
        for peer, object_ids in islice(self._lent_to.items(), MOST_VALIDATED):
            for object_id in islice(object_ids, MOST_VALIDATED):
                entry = self.entries.get(object_id)
                if entry is None or peer not in (entry.borrowers or ()):
                    complaints.append(f"{object_id.hex()} is lent to {peer.hex()}, and its entry does not say so")
        for owner, object_ids in islice(self._borrowed_from.items(), MOST_VALIDATED):
            for object_id in islice(object_ids, MOST_VALIDATED):
                entry = self.entries.get(object_id)
                if entry is None or entry.owner != owner:
                    complaints.append(
                        f"{object_id.hex()} is borrowed from {owner.hex()}, and its entry does not say so"
                    )
        for object_id, obligations in islice(self._awaiting.items(), MOST_VALIDATED):
            entry = self.entries.get(object_id)
            if entry is None or not entry.owner or entry.registration != SENT:
                complaints.append(f"{object_id.hex()} is not being registered, and {len(obligations)} wait for that")
            complaints += [f"nothing remains, and waits for {object_id.hex()}" for e in obligations if e.remaining <= 0]
        return complaints + [
            f"nobody took {key[1]} of {key[0].hex()}, dead" for key in self._transit if key[0] in self._dead
        ]

    def _complaints(self, object_id: bytes, entry: Entry) -> Iterator[str]:
        yield from super()._complaints(object_id, entry)
        if not entry.owner:
            if entry.registration != NEW or entry.subscribed:
                yield "is ours, and is registered or subscribed to elsewhere"
            for peer in entry.borrowers or ():
                if object_id not in self._lent_to.get(peer, ()):
                    yield f"is borrowed by {peer.hex()}, to whom nothing says that it is lent"
            return
        if entry.borrowers or entry.subscribers or entry.life or entry.task is not None:
            yield f"is owned by {entry.owner.hex()}, and has what only an owner's entry has"
        alive = entry.owner not in self._dead
        if alive != (entry.registration != NEW) or alive != (object_id in self._borrowed_from.get(entry.owner, ())):
            yield f"is owned by {entry.owner.hex()}, alive: {alive}, and its registration is {entry.registration}"
        if alive and entry.state == PENDING and entry.waiters and not entry.subscribed:
            yield f"is waited for, and {entry.owner.hex()} was not asked for it"
