"""Messages between the owner of an object and those who borrow it."""

from __future__ import annotations

import msgspec

from afield.runtime.wire.tier_messages import Location


class Add(msgspec.Struct, array_like=True, tag=8, gc=False):
    """The sender holds the object from now on; `attempt` comes back in the `Added`."""

    object_id: bytes
    attempt: int


class Added(msgspec.Struct, array_like=True, tag=9, gc=False):
    """The owner knows the borrower (or, with `gone`, no longer knows the object)."""

    object_id: bytes
    attempt: int
    gone: bool


class Release(msgspec.Struct, array_like=True, tag=10, gc=False):
    """The sender holds the object no longer."""

    object_id: bytes


class Subscribe(msgspec.Struct, array_like=True, tag=11, gc=False):
    """Send the value as soon as there is one."""

    object_id: bytes


class Value(msgspec.Struct, array_like=True, tag=12, gc=False):
    """The value that was subscribed to."""

    object_id: bytes
    kind: int
    data: bytes
    location: Location | None = None


class Took(msgspec.Struct, array_like=True, tag=13, gc=False):
    """The refs inside the result that was sent with this token are registered with their owners."""

    sequence: int
