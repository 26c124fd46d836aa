"""`ObjectRef`: the future that users hold."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Generator
from concurrent.futures import Future
from types import GenericAlias
from typing import Any

import msgspec

from afield.errors import NotInitializedError
from afield.runtime.process import current
from afield.runtime.process.serialization import collector
from afield.transport.interrupts import uninterruptible


class ObjectRef(msgspec.Struct, gc=False, eq=False, repr_omit_defaults=True):
    """A reference to a value that may not exist yet and may live anywhere.

    It can be passed to tasks, nested in values, compared, hashed and awaited. Pickling it copies the reference, never the
    value. The value is freed when the last reference to it, in any process, is gone.
    """

    id: bytes

    def hex(self) -> str:
        """Return the object's id as text."""
        return self.id.hex()

    def binary(self) -> bytes:
        """Return the object's id."""
        return self.id

    def task_id(self) -> bytes:
        """Return the id of the task that creates the object."""
        return self.id[:16]

    def future(self) -> Future[Any]:
        """Return a `concurrent.futures.Future` of the value."""
        return current.require_values(f"{self!r} belongs to a runtime that was shut down").future(self)

    def as_future(self) -> asyncio.Future[Any]:
        """Return a future of the value for asyncio; cancelling it cancels the wait, not the task."""
        return asyncio.wrap_future(self.future())

    def __await__(self) -> Generator[Any, None, Any]:
        return current.require_values(f"{self!r} belongs to a runtime that was shut down").result(self).__await__()

    @classmethod
    def __class_getitem__(cls, item: Any) -> GenericAlias:
        """Allow `ObjectRef[int]` in annotations."""
        return GenericAlias(cls, (item,))

    def __repr__(self) -> str:
        return f"ObjectRef({self.id.hex()})"

    def __hash__(self) -> int:
        return hash(self.id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and self.id == other.id

    @uninterruptible
    def __del__(self) -> None:
        process = current.process
        if process is not None:
            process.handle_dropped(self.id)

    def __copy__(self) -> ObjectRef:
        """Return the ref itself, which never changes: nothing leaves the process, so nothing has to be kept for it."""
        return self

    def __deepcopy__(self, memo: Any) -> ObjectRef:
        return self

    def __replace__(self, **changes: Any) -> ObjectRef:
        raise TypeError("an ObjectRef cannot be made with another id")

    def __reduce__(self) -> tuple[Any, ...]:
        process = current.process
        if process is None:
            raise NotInitializedError("an ObjectRef cannot be pickled after afield.shutdown()")
        if collector.refs is not None:
            collector.refs.append(self.id)
        else:
            warnings.warn(
                f"{self!r} was pickled outside of afield: its value is now kept until its owner ends. "
                "Pass it as an argument, or inside a value given to put() or returned from a task.",
                stacklevel=2,
            )
            process.pin_for_ever(self.id)
        return rebuild_ref, (self.id, process.owner_of(self.id))


def rebuild_ref(object_id: bytes, owner: bytes) -> ObjectRef:
    """Unpickle a reference: this process holds the object from here on."""
    if collector.on_ref is not None:
        collector.on_ref(object_id, owner)
    elif current.process is not None:
        current.process.receive_ref(object_id, owner)
    else:
        raise NotInitializedError("an ObjectRef can only be unpickled in a process of its cluster; call afield.init()")
    return ObjectRef(object_id)
