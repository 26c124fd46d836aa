"""Functions and classes on their way to workers: a large one lies in the store, and what travels only names it.

Theory of operation. A definition up to `MAX_DEFINITION_BYTES` is bytes, which a message carries. A larger one (it has captured
an array, or a table) becomes a stored object of whoever defines it, and the bytes are those of a `Stored` with its ref; the
worker gets the object when it needs the function. The object lives as long as the `Definition` that its owner keeps.

The objects have ids from a scope of their own: whether a function is known in a process already must not change the ids of what
a task that runs again submits.
"""

from __future__ import annotations

from typing import Any

from afield.ids import PUT_INDEX, Scope
from afield.runtime.process.refs import ObjectRef
from afield.runtime.process.serialization import deserialize, serialize
from afield.runtime.values.values import Values

#: Larger definitions are stored: a message is copied several times, and each worker that needs the function gets one.
MAX_DEFINITION_BYTES = 1 << 20


class Stored:
    """Stands for a definition that lies in the store."""

    __slots__ = ("ref",)

    def __init__(self, ref: ObjectRef) -> None:
        self.ref = ref

    def __reduce__(self) -> tuple[Any, ...]:
        return Stored, (self.ref,)


class Definition:
    """A pickled function or class; `ref` holds what is stored of it."""

    __slots__ = ("blob", "ref")

    def __init__(self, blob: bytes, ref: ObjectRef | None = None) -> None:
        self.blob = blob
        self.ref = ref


class Definitions:
    """Makes the definitions of one process."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self._scope = Scope()

    def define(self, value: Any, what: str, owner: str) -> Definition:
        """Pickle a function or class; `what` names it in errors, `owner` where refs are listed that it has captured.

        Raises:
            SerializationError: it cannot be pickled.
            ObjectStoreFullError: it is large, and there is no room for it.
        """
        serialized = serialize(value, what, stored=False)
        if serialized.size <= MAX_DEFINITION_BYTES:
            for ref in serialized.refs:  # captured: they live as long as it may be called
                self._values.process.pin_for_ever(ref, f"captured by {owner}")
            return Definition(serialized.pack())
        stored = self._values.own(self._scope.next_task_id() + PUT_INDEX, None, serialized, serialized.refs)
        return Definition(serialize(Stored(stored), what).pack(), stored)


def rebuild(blob: bytes, what: str, values: Values) -> Any:
    """Rebuild a function or class where it is needed, which may run code of the user's."""
    value = deserialize(blob, what, None)
    return values.get(value.ref, None) if type(value) is Stored else value
