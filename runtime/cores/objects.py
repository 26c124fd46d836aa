"""What the ownership table and lineage both speak of: entries and their states, obligations, and the effects they ask for.

What can happen to an entry is `LIFE`, a table of transitions (`docs/state-machines.md` has its diagram). The ownership table
looks rare transitions up in it and notes them (`Entries._turn`). Two are too frequent for that: a value arrives, once for each
task (`Entries.fulfil_plain`, `fulfil`, `OwnershipTable.on_value`), and a new entry begins with its value. Those check for
themselves that the entry is `PENDING`; `validate` then checks that what an entry has belongs to its state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from afield.machines import Table
from afield.runtime.wire.messages import FAILED, INLINE, LOCATED

PENDING = 3
FREED = 5
NEW, SENT, KNOWN = 0, 1, 2  # registration of a borrowed entry with its owner

#: The names of the states, which are numbers as they travel in messages.
STATES = {PENDING: "pending", INLINE: "inline", LOCATED: "located", FAILED: "failed", FREED: "freed"}
NUMBERS = {name: number for number, name in STATES.items()}

LIFE = Table(
    "object",
    initial="pending",
    transitions={
        ("pending", "arrives"): "inline",
        ("pending", "arrives stored"): "located",
        ("pending", "fails"): "failed",
        ("located", "is lost"): "pending",
        ("located", "fails"): "failed",
        ("located", "is freed"): "freed",
        ("freed", "is needed"): "pending",
        ("freed", "fails"): "failed",
        ("failed", "is needed"): "pending",  # its making was postponed
        ("failed", "is made elsewhere"): "pending",
    },
    states={
        "pending": "its value is still to come: a task makes it, or its owner will tell",
        "inline": "the value is here, as bytes",
        "located": "the value is in the store, at a `Location`",
        "failed": "there is an error instead",
        "freed": "only lineage needs it: its value was freed and can be made again",
    },
)

__all__ = [
    "FAILED",
    "FREED",
    "INLINE",
    "KNOWN",
    "LIFE",
    "LOCATED",
    "NEW",
    "NUMBERS",
    "PENDING",
    "SENT",
    "STATES",
    "Entry",
    "FreeStored",
    "Keeper",
    "LifeEnded",
    "Obligation",
    "Recompute",
    "Send",
    "Settled",
    "Spare",
]


class Send(msgspec.Struct, frozen=True, gc=False):
    """Effect: send `message` to process `to`."""

    to: bytes
    message: Any


class FreeStored(msgspec.Struct, frozen=True, gc=False):
    """Effect: free the stored value of an object that we own; `soon`: it is large, and its room may be waited for."""

    object_id: bytes
    soon: bool = False


class Spare(msgspec.Struct, frozen=True, gc=False):
    """Effect: tell the store that nothing but lineage needs the value of an object of ours, or (not `spare`) that more does."""

    object_id: bytes
    spare: bool


class LifeEnded(msgspec.Struct, frozen=True, gc=False):
    """Effect: nothing holds the object that stands for an actor of ours any more."""

    object_id: bytes


class Recompute(msgspec.Struct, frozen=True, gc=False):
    """Effect: run the task of a lineage record again, whose holds are pinned for it; then tell `Lineage.ended`."""

    record: Any


class Settled(msgspec.Struct, frozen=True, gc=False):
    """Effect: all registrations that `token` waited for are acknowledged."""

    token: Any


class Entry(msgspec.Struct, eq=False, gc=False):
    """What this process knows of one object. `owner` is empty if that is this process."""

    owner: bytes = b""
    state: int = PENDING
    value: Any = None  # bytes (INLINE: the value, FAILED: the error) or a Location
    handles: int = 0
    pins: int = 0
    registration: int = NEW
    attempt: int = 0
    task: Any = None  # the pending task that will produce it
    contained: list[bytes] | None = None
    borrowers: set[bytes] | None = None
    subscribers: set[bytes] | None = None
    waiters: list[Callable[[], None]] | None = None
    subscribed: bool = False
    life: bool = False  # stands for an actor: the actor ends with it
    created_at: str = ""


class Obligation:
    """Something to be done once `remaining` registrations are acknowledged: unpin a container, or a `Settled` effect."""

    __slots__ = ("container", "message", "remaining", "token")

    def __init__(self, container: bytes = b"", message: Send | None = None, token: Any = None) -> None:
        self.remaining = 0
        self.container = container
        self.message = message
        self.token = token


class Keeper(Protocol):
    """What the table asks lineage about the objects that it knows.

    Attributes:
        postponed: objects that have failed, and are to be made again when somebody asks for them anew.
    """

    postponed: set[bytes]

    def retain(self, object_id: bytes, entry: Entry) -> bool:
        """Nothing but lineage can hold the object any more: tell whether its entry stays."""

    def has_remains(self, object_id: bytes) -> bool:
        """Tell whether the store may have something of an object that is not located (any more)."""

    def gone(self, object_id: bytes) -> None:
        """The table has forgotten the object."""

    def unwanted(self, object_id: bytes, entry: Entry) -> bool:
        """A value was stored that is not waited for: tell whether to free it now."""

    def lost(self, object_id: bytes, entry: Entry, cause: str, kind: str) -> None:
        """The stored value of an object of ours is gone."""

    def revive(self, object_id: bytes, entry: Entry) -> None:
        """A value that was freed, or whose making was postponed, is needed after all."""
