"""Ids and values of the simulated world.

A value is nothing but the refs inside it, inline (`encode`d) or in the `World`'s store. Object ids tell who made them:
b"2.7x" is process p2's seventh object, a `put`; `r` and `s` are outputs of a task, `a` its stored arguments, `l` an actor's
life. So an id, with the number of times that the object was stored, is also its place in the store, and no place is used
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from afield.runtime.wire import messages

Ref = tuple[bytes, bytes]
#: Who tells owners of losses. It is not one of the processes and never dies.
NODE = b"node"


class InvariantError(AssertionError):
    """An invariant does not hold."""


class LostError(Exception):
    """The store has no copy of the value that somebody reads."""


def owner_of(object_id: bytes) -> bytes:
    """Return who made, and therefore owns, an object."""
    return b"p" + object_id[:1]


def lost(owner: bytes) -> bytes:
    """Return the error of an object that `owner` does not answer for any more."""
    return b"!lost with " + owner


def encode(object_ids: Sequence[bytes]) -> bytes:
    """Serialise an inline value."""
    return msgspec.msgpack.encode(list(object_ids))


def decode(data: bytes) -> list[Ref]:
    """Return the refs inside an inline value."""
    if not data:
        return []
    return [(object_id, owner_of(object_id)) for object_id in msgspec.msgpack.decode(data, type=list[bytes])]


def place_of(object_id: bytes, version: int) -> messages.Location:
    """Return where the value of an object lies that was stored at the `version`th time."""
    return messages.Location([messages.Part(0, int.from_bytes(object_id, "big"), len(object_id), serial=version)])


def object_at(location: messages.Location) -> bytes:
    """Return which object lies there."""
    return location.parts[0].offset.to_bytes(location.size, "big")


def version_at(location: messages.Location) -> int:
    """Return which of its values it is."""
    return location.parts[0].serial


def show_id(object_id: bytes) -> str:
    """Name an object in a transcript."""
    return object_id.decode()


def show(message: Any) -> str:
    """Name a message in a transcript."""
    fields = ", ".join(f"{name}={getattr(message, name)!r}" for name in message.__struct_fields__)
    return f"{type(message).__name__}({fields})".replace("b'", "'")
