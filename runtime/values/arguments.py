"""Arguments of tasks and actor calls: serialised, pinned until the reply, resolved before anything is pushed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from afield.errors import AfieldError, ObjectLostError, pass_on
from afield.ids import ARGUMENTS_INDEX
from afield.runtime.cores.dispatch import Task
from afield.runtime.cores.objects import FAILED, LOCATED, PENDING
from afield.runtime.process.process import INLINE_BYTES, Process
from afield.runtime.process.refs import ObjectRef
from afield.runtime.process.serialization import (
    Arg,
    Serialized,
    deserialize_unopened,
    dumps_plain,
    serialize,
    serialize_error,
)
from afield.runtime.values.values import Values
from afield.runtime.wire import messages
from afield.transport.interrupts import uninterruptible

#: The error of an argument that is no larger becomes that of its task with the task's name in it; a larger one as it is.
MAX_PASSED_ON_BYTES = 16384


class Arguments:
    """The arguments of what this process submits."""

    def __init__(self, process: Process, values: Values) -> None:
        self.process = process
        self.values = values
        self.table = process.table
        #: The last error that was passed on, by which function, and what became of it: many tasks may take one argument.
        self._last_passed: tuple[bytes, str, bytes] = b"", "", b""

    def encode(self, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        """Serialise the arguments into `task`, with its top-level refs as dependencies."""
        refs: list[bytes] = []
        if any(type(arg) is ObjectRef for arg in args):
            args = tuple(_placeholder(arg, refs) for arg in args)
        if kwargs and any(type(arg) is ObjectRef for arg in kwargs.values()):
            kwargs = {key: _placeholder(arg, refs) for key, arg in kwargs.items()}
        if refs:
            for oid in refs:
                if oid not in self.table.entries:
                    raise ObjectLostError(f"ObjectRef({oid.hex()}) belongs to a runtime that was shut down")
            task.dependencies = refs
        data = dumps_plain((args, kwargs))
        nested: list[bytes] = []
        if data is None or len(data) > INLINE_BYTES:
            # What is plain has been pickled already, however large.
            plain = Serialized(data, [], []) if data is not None else None
            serialized = plain or serialize((args, kwargs), f"the arguments of {name}()")
            nested = serialized.refs
            if not serialized.fits(INLINE_BYTES):
                self._store(task, serialized)
                data = b""
            else:
                data = serialized.pack()
        task.arguments = data
        task.pinned = (task.pinned or []) + refs + nested or None

    @uninterruptible
    def _store(self, task: Task, value: Serialized) -> None:
        """Large arguments become an object of their own that lives as long as the task."""
        process = self.process
        argument_id = task.task_id + ARGUMENTS_INDEX
        # The caller's arguments are still referred to from its frame: nothing that was born in the store can be kept.
        task.location = self.values.parts.write(argument_id, process.process_id, value, [])

        def own() -> None:
            self.table.put(argument_id, LOCATED, task.location)
            self.table.pin(argument_id)
            self.table.drop(argument_id)  # the task's pin is the only hold

        process.locked(own)
        task.pinned = [argument_id]

    def pin(self, task: Task) -> None:
        """Hold everything the task refers to until its reply; the caller holds the lock."""
        argument_id = task.task_id + ARGUMENTS_INDEX
        for pinned in task.pinned or ():
            if pinned != argument_id:
                self.table.pin(pinned)

    def unpin(self, task: Task) -> None:
        """The task's outcome is known."""
        if task.pinned is not None:
            self.table.let_go(task)

    def when_resolved(self, task: Task, proceed: Callable[[Task], None]) -> None:
        """Call `proceed` once every top-level argument is there; the caller holds the lock."""

        def one_resolved() -> None:
            task.unresolved -= 1
            if not task.unresolved:
                proceed(task)

        task.unresolved = 1
        for dependency in task.dependencies or ():
            task.unresolved += 1
            if self.table.when_done(dependency, one_resolved):
                task.unresolved -= 1
        one_resolved()

    def failure(self, task: Task) -> bytes | None:
        """Return the serialised error of a top-level argument (or of all arguments as one object), if one failed."""
        if task.location is not None:
            stored = self.table.entries.get(task.task_id + ARGUMENTS_INDEX)
            if stored is not None and stored.state == FAILED:
                lost: bytes = stored.value
                return lost
        for dependency in task.dependencies or ():
            entry = self.table.entries[dependency]
            if entry.state == FAILED:
                return self._passed_on(entry.value, task)
        return None

    def _passed_on(self, data: bytes, task: Task) -> bytes:
        """Return an argument's error as that of the task: it says so, unless that would copy much for each of many tasks."""
        if len(data) > MAX_PASSED_ON_BYTES or task.function is None:
            return data
        before, by, after = self._last_passed
        if before is data and by == task.function.name:
            return after
        try:
            error = deserialize_unopened(data, "the error of an argument")  # we hold the lock
            pass_on(error, task.function.name)
            passed = serialize_error(error)
        except AfieldError:
            return data
        self._last_passed = data, task.function.name, passed
        return passed

    def lost_again(self, task: Task) -> bool:
        """Tell whether a top-level argument is to be waited for once more, as its value was lost since it was there."""
        return any(self.table.entries[dependency].state == PENDING for dependency in task.dependencies or ())

    def describe(self, task: Task) -> list[messages.Dependency] | None:
        """Describe the values of the task's top-level refs for its push."""
        if task.dependencies is None:
            return None
        described = []
        for oid in task.dependencies:
            entry = self.table.entries[oid]
            owner = entry.owner or self.process.process_id
            if entry.state == LOCATED:
                described.append(messages.Dependency(oid, owner, LOCATED, b"", entry.value))
            else:
                described.append(messages.Dependency(oid, owner, entry.state, entry.value))
        return described


def _placeholder(arg: Any, refs: list[bytes]) -> Any:
    if type(arg) is not ObjectRef:
        return arg
    refs.append(arg.id)
    return Arg(len(refs) - 1)
