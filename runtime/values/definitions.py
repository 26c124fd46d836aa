"""Functions and classes on their way to workers: a large one lies in the store, and what travels only names it.

Theory of operation. A definition up to `MAX_DEFINITION_BYTES` is bytes, which a message carries. A larger one (it has captured
an array, or a table) becomes a stored object of whoever defines it, and the bytes are those of a `Stored` with its ref; the
worker gets the object when it needs the function. The object lives as long as the `Definition` that its owner keeps.

Definitions that are equal by content are one, as long as anybody keeps it: a function and what `options()` makes of it, or a
function that is defined in a loop. Its digest names it to the workers.

The objects have ids from a scope of their own: whether a function is known in a process already must not change the ids of what
a task that runs again submits.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

from afield.ids import PUT_INDEX, Scope
from afield.runtime.process.refs import ObjectRef
from afield.runtime.process.serialization import Serialized, deserialize, serialize
from afield.runtime.values.values import Values

#: Larger definitions are stored: a message is copied several times, and each worker that needs the function gets one.
MAX_DEFINITION_BYTES = 1 << 20


DIGEST_BYTES = 16


class Stored:
    """Stands for a definition that lies in the store."""

    __slots__ = ("ref",)

    def __init__(self, ref: ObjectRef) -> None:
        self.ref = ref

    def __reduce__(self) -> tuple[Any, ...]:
        return Stored, (self.ref,)


class Definition:
    """A pickled function or class; `ref` holds what is stored of it. Equal digests mean equal content."""

    __slots__ = ("__weakref__", "blob", "digest", "ref")

    def __init__(self, blob: bytes, ref: ObjectRef | None = None, digest: bytes = b"") -> None:
        self.blob = blob
        self.ref = ref
        self.digest = digest


class Defined:
    """What one function or class is defined as, once it is; what `options()` makes of it has the same one."""

    __slots__ = ("_known", "_value", "_what")

    def __init__(self, value: Any, what: str) -> None:
        self._value = value
        self._what = what
        #: The session, and the definition in it. One tuple, as another thread may use it in the next session already.
        self._known: tuple[object, Definition] | None = None

    def within(self, session: object, definitions: Definitions) -> Definition:
        """Return the definition in a session, pickling it if that was not done there yet; see `Definitions.define`."""
        known = self._known
        if known is None or known[0] is not session:
            known = self._known = session, definitions.define(self._value, self._what)
        return known[1]

    def has_changed(self) -> None:
        """It is pickled again when it is needed the next time."""
        self._known = None


class Definitions:
    """Makes the definitions of one process."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self._scope = Scope()
        self._known: weakref.WeakValueDictionary[bytes, Definition] = weakref.WeakValueDictionary()

    def define(self, value: Any, what: str) -> Definition:
        """Pickle a function or class; `what` names it in errors, and where refs are listed that it has captured.

        Raises:
            SerializationError: it cannot be pickled.
            ObjectStoreFullError: it is large, and there is no room for it.
        """
        serialized = serialize(value, what, stored=False)
        digest = _digest(serialized)
        known = self._known.get(digest)
        if known is None:
            known = self._known[digest] = self._define(serialized, what, digest)
        return known

    def _define(self, serialized: Serialized, what: str, digest: bytes) -> Definition:
        if serialized.size <= MAX_DEFINITION_BYTES:
            for ref in serialized.refs:  # captured: they live as long as it may be called
                self._values.process.pin_for_ever(ref, f"captured by {what}")
            return Definition(serialized.pack(), None, digest)
        stored = self._values.own(self._scope.next_task_id() + PUT_INDEX, None, serialized, serialized.refs)
        return Definition(serialize(Stored(stored), what).pack(), stored, digest)


def _digest(serialized: Serialized) -> bytes:
    made = hashlib.blake2b(serialized.pickled, digest_size=DIGEST_BYTES)
    for buffer in serialized.buffers:
        made.update(buffer)
    return made.digest()


def rebuild(blob: bytes, what: str, values: Values) -> Any:
    """Rebuild a function or class where it is needed, which may run code of the user's."""
    value = deserialize(blob, what, None)
    return values.get(value.ref, None) if type(value) is Stored else value
