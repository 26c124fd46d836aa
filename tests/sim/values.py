"""Ids and values of the simulated world.

A value is nothing but the refs inside it, inline (`encode`d) or in the `World`'s store. Object ids tell who made them:
b"2.7x" is process p2's seventh object, a `put`; `r` and `s` are outputs of a task, `a` its stored arguments, `l` an actor's
life. So an id is also its object's place in the store, and no place is used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from afield.runtime import messages as m

Ref = tuple[bytes, bytes]


class InvariantError(AssertionError):
    """An invariant does not hold."""


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


def place_of(object_id: bytes) -> m.Location:
    """Return where a stored object lies."""
    return m.Location(0, int.from_bytes(object_id, "big"), len(object_id))


def object_at(location: m.Location) -> bytes:
    """Return which object lies there."""
    return location.offset.to_bytes(location.size, "big")


def show_id(object_id: bytes) -> str:
    """Name an object in a transcript."""
    return object_id.decode()


def show(message: Any) -> str:
    """Name a message in a transcript."""
    fields = ", ".join(f"{name}={getattr(message, name)!r}" for name in message.__struct_fields__)
    return f"{type(message).__name__}({fields})".replace("b'", "'")
